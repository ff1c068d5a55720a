"""LoRA (https://arxiv.org/abs/2106.09685): y = W x + scale * B (A x) with W frozen, A random, B zero at first.

Used to train what a smaller model keeps. `merge` adds the product to the weight, so that nothing of it is left.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional


class LoRALinear(nn.Module):
    """An nn.Linear whose weight is frozen, plus scale * B A; a (rank, in) and b (out, rank) are fp32 and trainable."""

    def __init__(self, inner: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        out, into = inner.weight.shape
        bound = 1 / math.sqrt(into)  # LoRA's: Kaiming uniform with a = sqrt(5)
        a = (torch.rand(rank, into, generator=generator) * 2 - 1) * bound
        self.inner = inner.requires_grad_(False)
        self.a = nn.Parameter(a.to(inner.weight.device))
        self.b = nn.Parameter(torch.zeros(out, rank, device=inner.weight.device))
        self.scale = scale

    def product(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), without the bias."""
        y = functional.linear(x, self.inner.weight)
        return y + functional.linear(functional.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y = self.product(x)
        return y if self.inner.bias is None else y + self.inner.bias

    def merged(self) -> nn.Linear:
        """A linear of its own with W + scale * B A, summed in fp32 and rounded once to W's dtype."""
        weight = self.inner.weight
        whole = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        total = weight.detach().float() + self.scale * (self.b.detach() @ self.a.detach())
        whole.weight = nn.Parameter(total.to(weight.dtype), requires_grad=False)
        whole.bias = self.inner.bias
        return whole


def add(root: nn.Module, *, rank: int, alpha: float, seed: int = 0, skip: tuple[nn.Module, ...] = ()) -> int:
    """Put LoRA on every nn.Linear under `root` but for those inside the modules `skip`; returns how many.

    alpha: the product's scale is alpha / rank. A module that stands in several places gets one LoRA.
    """
    generator = torch.Generator().manual_seed(seed)
    left_out = {id(part) for module in skip for part in module.modules()}
    made: dict[int, LoRALinear] = {}
    for path, module in list(root.named_modules(remove_duplicate=False)):
        if type(module) is nn.Linear and id(module) not in left_out:
            if id(module) not in made:
                made[id(module)] = LoRALinear(module, rank, alpha / rank, generator)
            root.set_submodule(path, made[id(module)])
    return len(made)


def inside(root: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(path, module) of every LoRA under `root`."""
    for path, module in root.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module


def merge(root: nn.Module) -> dict[int, nn.Linear]:
    """Replace every LoRA under `root` by its merged linear; id of the LoRALinear -> the linear in its place.

    The frozen weights themselves are not written to: another model may share them.
    """
    done: dict[int, nn.Linear] = {}
    for path, module in list(root.named_modules(remove_duplicate=False)):
        if isinstance(module, LoRALinear):
            if id(module) not in done:
                done[id(module)] = module.merged()
            root.set_submodule(path, done[id(module)])
    return done
