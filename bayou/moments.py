"""Second moments of what a model's linears are given: sums of x x^T over tokens, gathered by hooks.

Of a compressed model, beside the moments of its inputs y, also those of what they lack of the fine-tune's inputs x, and
from both what a linear must have more, to give from y what it should give from x (`correction`).

Activations of 16 bits are multiplied as they are, on the tensor cores, and summed in fp32: the products of two 16-bit
numbers are exact there, so the only rounding is that of the sum, as it is for fp32 activations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

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

    def __enter__(self) -> Self:
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

    def add(self, name: str, x: Tensor) -> bool:
        """Add the tokens of x (..., in) to the gram of `name`, shared with whoever was given x before in this step;
        False where it was."""
        # The same place in memory in the same step (in which every x is kept, so that no place is used twice)
        # is the same input: q, k and v are given one tensor, a router and its experts two views of one.
        key = _key(x)
        if key in self._seen:
            self.named.setdefault(name, self._seen[key][1])
            return False
        flat = x.reshape(-1, x.shape[-1])
        gram = self.named.get(name)
        if gram is None:
            gram = self.named[name] = flat.new_zeros(flat.shape[1], flat.shape[1], dtype=torch.float32)
        with clock.step("gram"):
            _sum(gram, flat, flat)
        self._seen[key] = (x, gram)
        return True

    def end_of_step(self) -> None:
        """Forget the inputs of this step."""
        self._seen.clear()


class Pairs(Grams):
    """One input of a layer's linears, y in the compressed model and x in the fine-tune: the sums of y y^T as `named`
    and of (x - y) y^T as `lacking`, token by token.

    The input is the first in a forward that none of the modules of `done` has; all modules that are given it are named,
    and the forward ends at the next input (Enough), but for rest=True, which takes all that are left.
    In each step the fine-tune's forward comes first, within `listening`, then the compressed model's.
    """

    class Enough(Exception):
        """The forward has come to the next input."""

    def __init__(self, root: nn.Module, path: str, done: Collection[str] = (), *, rest: bool = True) -> None:
        super().__init__(root, path)
        self._done, self._rest = done, rest
        self._listening = False
        self._here: object = None  # the input of this forward, and how many modules have been given it
        self._given, self._modules = 0, 0  # ... and how many will be, once a forward has shown that
        self._wanted: dict[str, list[tuple[Tensor, int]]] = {}
        self._lacking: dict[int, Tensor] = {}  # by the id of the gram that goes with it
        self._unpaired: set[int] = set()

    @property
    def all_done(self) -> bool:
        """Whether no module is left whose input could come."""
        names = {f"{self._path}.{name}" for name, module in self._root.named_modules() if _takes_vectors(module)}
        return names <= set(self._done)

    @contextmanager
    def forward(self, *, listening: bool = False) -> Iterator[None]:
        """Around a forward; listening: it is the fine-tune's, whose inputs are remembered."""
        self._listening, self._here, self._given = listening, None, 0
        with suppress(Pairs.Enough):
            yield
        self._listening = False
        self._modules = self._modules or self._given

    def add(self, name: str, x: Tensor) -> bool:
        """Add the tokens of x (..., in), or remember them while listening. Raises Enough."""
        if name in self._done:
            return False
        key = _key(x)
        if not self._rest and self._here not in (None, key):
            raise Pairs.Enough
        self._here = key
        self._given += 1
        fresh = self._add(name, x)
        if not self._rest and self._given == self._modules:
            raise Pairs.Enough  # before the last of them has even been run
        return fresh

    def _add(self, name: str, x: Tensor) -> bool:
        if self._listening:
            self._wanted.setdefault(name, []).append((x, _version(x)))
            return True
        waiting = self._wanted.get(name)
        wanted, version = waiting.pop(0) if waiting else (None, 0)
        if not super().add(name, x):
            return False
        gram = self.named[name]
        if wanted is None or wanted.shape != x.shape or _version(wanted) != version:
            self._unpaired.add(id(gram))  # an expert of its own, say, which other tokens have chosen
            return True
        y = x.reshape(-1, x.shape[-1])
        lacking = (wanted.float() - x.float()).to(x.dtype).reshape(y.shape)
        with clock.step("gram"):
            _sum(self._lacking.setdefault(id(gram), torch.zeros_like(gram)), lacking, y)
        return True

    @property
    def lacking(self) -> dict[str, Tensor]:
        """Module path -> the sum of (x - y) y^T, one tensor for modules of one input; not where the two models' tokens
        are not the same ones."""
        paired = {name: id(gram) for name, gram in self.named.items() if id(gram) not in self._unpaired}
        return {name: self._lacking[key] for name, key in paired.items() if key in self._lacking}

    def end_of_step(self) -> None:
        """Forget the inputs of this step."""
        super().end_of_step()
        self._wanted.clear()


def correction(gram: Tensor, lacking: Tensor, ridge: float) -> Tensor:
    """C (in, in) fp32 by which W (y + C y) is nearest to W x: E[(x-y) y^T] (E[y y^T] + ridge * its mean diagonal)^-1.

    gram, lacking: the sums of `Pairs`. A weight W + W C gives from the compressed model's input y, as nearly as a
    linear can, what W gives from the fine-tune's input x. The ridge keeps C small in directions of which y has little.
    """
    normal = gram.double()
    normal = normal + ridge * normal.diagonal().mean().clamp_min(1e-30) * torch.eye(len(normal), device=normal.device)
    return torch.cholesky_solve(lacking.double().T, torch.linalg.cholesky(normal)).T.float()


def _key(x: Tensor) -> tuple[Any, ...]:
    return (x.data_ptr(), x.numel(), x.shape[-1], x.stride()[-2:], _version(x))


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _sum(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (m, n) fp32 += left^T right, of (tokens, m) and (tokens, n)."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        total.add_(torch.mm(left.T, right, out_dtype=torch.float32))
    else:
        # One fp32 sum, no copy of the gram: some hundred steps add 1e-5 of rounding at the very most.
        total.addmm_(left.float().T, right.float())


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
