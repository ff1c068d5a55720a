"""Second moments of what a model's linears are given: sums of x x^T over tokens, gathered by hooks.

Activations of 16 bits are multiplied as they are, on the tensor cores, and summed in fp32: the products of two 16-bit
numbers are exact there, so the only rounding is that of the sum, as it is for fp32 activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bayou import clock
from bayou.skeleton import Place


class Grams:
    """Sums x x^T over the tokens x that the linears inside `root` (at `path` in the model) are given."""

    def __init__(self, root: nn.Module, path: str) -> None:
        self.named: dict[str, Tensor] = {}
        self._root, self._path = root, path
        self._hooks: list[Any] = []
        self._seen: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> Grams:
        for name, module in self._root.named_modules():
            if _takes_vectors(module):
                hook = self._hook(f"{self._path}.{name}")
                self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self.end_of_step()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel():
                self.add(name, x)

        return hook

    def add(self, name: str, x: Tensor) -> None:
        """Add the tokens of x (..., in) to the gram of `name`, shared with whoever was given x before."""
        # The same place in memory in the same step (in which every x is kept, so that no place is used twice)
        # is the same input: q, k and v are given one tensor, a router and its experts two views of one.
        version = 0 if x.is_inference() else x._version
        key = (x.data_ptr(), x.numel(), x.shape[-1], x.stride()[-2:], version)
        if key in self._seen:
            self.named.setdefault(name, self._seen[key][1])
            return
        flat = x.reshape(-1, x.shape[-1])
        gram = self.named.get(name)
        if gram is None:
            gram = self.named[name] = flat.new_zeros(flat.shape[1], flat.shape[1], dtype=torch.float32)
        with clock.step("gram"):
            if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
                gram.add_(torch.mm(flat.T, flat, out_dtype=torch.float32))
            else:
                # One fp32 sum, no copy of the gram: some hundred steps add 1e-5 of rounding at the very most.
                flat = flat.float()
                gram.addmm_(flat.T, flat)
        self._seen[key] = (x, gram)

    def end_of_step(self) -> None:
        """Forget the inputs of this step."""
        self._seen.clear()


def input_of(place: Place | None) -> str | None:
    """Path of the module whose input a disk tensor multiplies; None for merged experts' second matrices, which have an
    input of their own, and for what is in no module."""
    if place is None:
        return None
    module, _, leaf = place.path.rpartition(".")
    return None if place.role == "expert" and "down" in leaf else module


def _takes_vectors(module: nn.Module) -> bool:
    """Is the module's first argument multiplied by a matrix: a linear, a Conv1D, a router, merged experts?"""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    if isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
        return False
    own = dict(module.named_parameters(recurse=False))
    return any(p.ndim == 3 for p in own.values()) or ("weight" in own and own["weight"].ndim == 2)
