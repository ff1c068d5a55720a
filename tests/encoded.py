"""Deltas of many shapes and sizes, what a method makes of them, and how much is lost: for the tests of methods."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pico import power_law
from torch import Tensor

from bayou import methods
from bayou.decompose import Matrix
from bayou.delta import Delta, Term
from bayou.methods import Gram, Site


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gram_of(cols: int, tokens: int = 300, seed: int = 9) -> Gram:
    x = torch.randn(tokens, cols, generator=generator(seed)) * torch.logspace(-1, 0.5, cols)
    return Gram(x.T @ x)


def site_of(delta: Tensor, gram: Gram | None = None) -> Site:
    return Site("layer.weight", Matrix((delta.shape[0], delta.shape[1]), lambda a, b: delta[a:b]), "linear", gram)


def dial(name: str, shape: tuple[int, int], rank: int = 12) -> dict[str, int]:
    return {"rank": min(rank, *shape)} if methods.has_rank(name) else {}


def encode(
    name: str, delta: Tensor, options: dict[str, Any], gram: Gram | None = None, rank: int = 12
) -> tuple[Term, ...]:
    shape = (delta.shape[0], delta.shape[1])
    return methods.get(name).encode(site_of(delta, gram), **options, **dial(name, shape, rank))


def coded(delta: Tensor, terms: tuple[Term, ...]) -> Tensor:
    return Delta((delta.shape[0], delta.shape[1]), terms).materialize()


def lost(delta: Tensor, terms: tuple[Term, ...], gram: Gram | None = None) -> float:
    """||(delta - coded) X|| / ||delta X||, or without the X."""
    error, whole = delta.double() - coded(delta, terms), delta.double()
    if gram is None:
        return float(error.norm() / whole.norm())
    h = gram.matrix.double()
    return float(((error @ h * error).sum() / (whole @ h * whole).sum()) ** 0.5)


DELTAS: dict[str, Callable[[], Tensor]] = {
    "33x100": lambda: power_law(33, 100, generator(0)) * 0.1,
    "100x33": lambda: power_law(100, 33, generator(1)) * 0.1,
    "1x70": lambda: power_law(1, 70, generator(2)) * 0.1,
    "70x1": lambda: power_law(70, 1, generator(3)) * 0.1,
    "rank 2 of 33": lambda: power_law(33, 100, generator(4), rank=2) * 0.1,
    "200x160": lambda: power_law(200, 160, generator(5)) * 0.1,
    "huge": lambda: power_law(40, 50, generator(6)) * 1e6,
    "tiny": lambda: power_law(40, 50, generator(7)) * 1e-15,
}
calibrated = pytest.mark.parametrize("calibrated", [False, True], ids=["no gram", "gram"])
