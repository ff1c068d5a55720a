"""The decoder: W = gain * reference + terms. It never learns which method wrote the terms.

A term is a matrix (out, in) given by a few bits:

    Dense     gain * weight
    LowRank   gain * sum over blocks of u @ v         blocks of at most 128 ranks, each with its own bits

both with optional fp16 scales per output and input channel: diag(output_scale) @ term @ diag(input_scale).
The decoding is exact by specification: factors are dequantised in fp32; scales, products and the sum with the
reference are fp64; one rounding to the target's dtype ends it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from bayou.kernels.one_delta import one_delta, suits
from bayou.packed import Packed, moved, round_once

ROWS = 4096
"""Rows restored at once: bounds the fp64 scratch to 4096 x in, whatever the size of an embedding."""


def _scaled(matrix: Tensor, gain: float, output_scale: Tensor | None, input_scale: Tensor | None) -> Tensor:
    """diag(output_scale) @ matrix @ diag(input_scale) * gain."""
    if output_scale is not None:
        matrix = matrix * output_scale.to(matrix.dtype)[:, None]
    if input_scale is not None:
        matrix = matrix * input_scale.to(matrix.dtype)
    return matrix * gain


@dataclass(frozen=True, eq=False)
class Dense:
    """gain * diag(output_scale) @ weight @ diag(input_scale), every element stored. BitDelta is one of 1 bit."""

    weight: Packed
    gain: float = 1.0
    output_scale: Tensor | None = None
    input_scale: Tensor | None = None

    def factors(self) -> Iterator[Packed]:
        """The stored matrices, in the order of the file."""
        yield self.weight

    def apply(self, x: Tensor) -> Tensor:
        """x (..., in) -> x @ term.T (..., out), in x's dtype."""
        weight = _scaled(self.weight.unpack(), self.gain, self.output_scale, self.input_scale)
        return x @ weight.to(x.dtype).T

    def rows(self, rows: slice | Tensor) -> Tensor:
        """Rows of the term, (n, in) fp64."""
        scale = None if self.output_scale is None else self.output_scale[rows]
        return _scaled(self.weight.take(rows).double(), self.gain, scale, self.input_scale)


@dataclass(frozen=True, eq=False)
class LowRank:
    """gain * diag(output_scale) @ (sum of u @ v) @ diag(input_scale); blocks ((u (out, r), v (r, in)), ...)."""

    blocks: tuple[tuple[Packed, Packed], ...]
    gain: float = 1.0
    output_scale: Tensor | None = None
    input_scale: Tensor | None = None

    @property
    def rank(self) -> int:
        """Ranks of all blocks together."""
        return sum(v.shape[0] for _, v in self.blocks)

    def factors(self) -> Iterator[Packed]:
        """The stored matrices, in the order of the file."""
        for u, v in self.blocks:
            yield u
            yield v

    def apply(self, x: Tensor) -> Tensor:
        """x (..., in) -> x @ term.T (..., out), in x's dtype."""
        if self.input_scale is not None:
            x = x * self.input_scale.to(x.dtype)
        y = reduce(torch.add, ((x @ v.unpack(x.dtype).T) @ u.unpack(x.dtype).T for u, v in self.blocks))
        return y * self.gain if self.output_scale is None else y * self.gain * self.output_scale.to(x.dtype)

    def rows(self, rows: slice | Tensor) -> Tensor:
        """Rows of the term, (n, in) fp64."""
        total = reduce(torch.add, (u.take(rows).double() @ v.unpack().double() for u, v in self.blocks))
        scale = None if self.output_scale is None else self.output_scale[rows]
        return _scaled(total, self.gain, scale, self.input_scale)


Term = Dense | LowRank


@dataclass(frozen=True, eq=False)
class Delta:
    """What one tensor adds to its reference; never holds the reference's weight.

    shape: (out, in) of the sum of the terms. reference: the disk name of the base's tensor, or None.
    """

    shape: tuple[int, int]
    terms: tuple[Term, ...]
    reference: str | None = None
    gain: float = 1.0

    def apply(self, x: Tensor) -> Tensor:
        """The terms' product x @ terms.T, (..., in) -> (..., out), in x's dtype, without the reference."""
        if not self.terms:
            return x.new_zeros(*x.shape[:-1], self.shape[0])
        products = [one_delta(self, x)] if suits(x) else [term.apply(x) for term in self.terms]
        return torch.stack(products).sum(0) if len(products) > 1 else products[0]

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows of the sum of the terms for `ids` (...) -> (..., in) fp32: an embedding's delta."""
        total = torch.zeros(ids.numel(), self.shape[1], dtype=torch.float64, device=ids.device)
        for term in self.terms:
            total += term.rows(ids.reshape(-1))
        return total.float().view(*ids.shape, self.shape[1])

    def materialize(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop of the sum of the terms, (rows, in) fp64, without the reference."""
        rows = slice(start, self.shape[0] if stop is None else min(stop, self.shape[0]))
        if not self.terms:
            return torch.zeros(rows.stop - start, self.shape[1], dtype=torch.float64)
        return reduce(torch.add, (term.rows(rows) for term in self.terms))

    def restore(self, reference: Tensor | None, dtype: torch.dtype) -> Tensor:
        """gain * reference + terms, (out, in), summed in fp64 and rounded once to `dtype`."""
        device = reference.device if reference is not None else self.device
        out = torch.empty(self.shape, dtype=dtype, device=device)
        for start in range(0, self.shape[0], ROWS):
            total = self.materialize(start, start + ROWS).to(device)
            if reference is not None:
                scaled = self.gain * reference[start : start + ROWS].double()
                total = total + scaled if self.terms else scaled  # 0.0 + -0.0 would lose the sign
            out[start : start + ROWS] = round_once(total, dtype)
        return out

    @property
    def device(self) -> torch.device:
        """Where the terms lie."""
        return next((f.parts[0].device for term in self.terms for f in term.factors()), torch.device("cpu"))

    def to(self, device: torch.device | str) -> "Delta":
        """The same on another device."""
        return moved(self, device)
