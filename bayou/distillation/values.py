"""The numbers that distilling trains, and the tensors that a model computes with, which they make.

A stored number is start + size * step: `start` as the file has it, `size` how far a step of the rate goes (the number
itself for scales and gains, the root mean square of its tensor for others), `step` what AdamW trains, in fp32, from 0.
The model computes with the numbers as the file would store them, rounded, times their codes. A model has thousands of
such tensors of a few thousand numbers each, and a GPU would spend its time on starting work on them: so those of one
kind lie in one piece of memory, and the model's tensors are views of it, as are their gradients.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from bayou.packed import Packed


@dataclass(eq=False)
class Piece:
    """Stored numbers (n,), of one tensor or several.

    codes: (n, width), what each is multiplied by; None is 1. shape: of `leaf`, what the model computes with and gets
    gradients for. stored: the dtype in the file. kind: "scales", "gains", "floats" or "exact", each with its own rate.
    values: the numbers as the file would store them now. `leaf` and `values` are there once the pieces are a Values.
    """

    start: Tensor
    size: Tensor
    codes: Tensor | None
    shape: tuple[int, ...]
    stored: torch.dtype
    kind: str
    leaf: Tensor = field(init=False)
    values: Tensor = field(init=False)


def piece(tensor: Tensor, kind: str) -> Piece:
    """Numbers that nothing multiplies, of the shape and dtype of `tensor`."""
    start = tensor.detach().float().reshape(-1)
    size = start.abs() if kind == "gains" else start.square().mean().sqrt().expand_as(start)
    return Piece(start, size, None, tuple(tensor.shape), tensor.dtype, kind)


def matrices(parts: Iterable[Packed]) -> list[tuple[list[Packed], Piece | Tensor]]:
    """Pieces of matrices of one width, neighbours that are stored alike in one piece, row under row.

    A piece's shape is (rows, columns padded to whole groups). Codes without scales, in which is nothing to train, are a
    Tensor, in bf16, which holds them exactly.
    """
    runs: list[list[Packed]] = []
    for packed in parts:
        like = runs and _kind(runs[-1][0]) == _kind(packed)
        runs = [*runs[:-1], [*runs[-1], packed]] if like else [*runs, [packed]]
    return [(run, _joined(run)) for run in runs]


def _width(packed: Packed) -> int:
    """Columns that a scale stands for."""
    return min(packed.spec.group or packed.shape[1], packed.shape[1])


def _kind(packed: Packed) -> object:
    """What matrices must have in common to be one piece, beside their columns."""
    return packed.spec.floats or (_width(packed), packed.scales is None)


def _joined(run: list[Packed]) -> Piece | Tensor:
    if run[0].spec.floats:
        return piece(torch.cat([packed.parts[0] for packed in run]), "floats")
    width, cols = _width(run[0]), run[0].shape[1]
    groups = -(-cols // width)
    codes = torch.cat([functional.pad(packed.centred(), (0, groups * width - cols)) for packed in run])
    codes = codes.to(torch.bfloat16)
    scales = [packed.scales for packed in run if packed.scales is not None]
    if not scales:
        return codes
    start = torch.cat(scales).float().reshape(-1)
    return Piece(start, start.abs(), codes.view(-1, width), tuple(codes.shape), torch.float16, "scales")


class _Heap:
    """Pieces of one width, stored dtype and kind, in one piece of memory."""

    def __init__(self, pieces: list[Piece], dtype: torch.dtype) -> None:
        self.pieces, self.stored, self.kind = pieces, pieces[0].stored, pieces[0].kind
        self.start = torch.cat([piece.start for piece in pieces])
        self.size = torch.cat([piece.size for piece in pieces])
        self.codes = None if pieces[0].codes is None else torch.cat([p.codes for p in pieces if p.codes is not None])
        self.step = nn.Parameter(torch.zeros_like(self.start))
        width = 1 if self.codes is None else self.codes.shape[1]
        self.made = torch.empty(len(self.start), width, dtype=dtype, device=self.start.device)
        self.gradient = torch.zeros_like(self.made)
        self.values = self.start.clone()
        counts = [len(piece.start) for piece in pieces]
        parts = (part.split(counts) for part in (self.made, self.gradient, self.values))
        for piece, made, gradient, values in zip(pieces, *parts, strict=True):
            piece.start = piece.size = piece.codes = None  # they lie here now
            piece.leaf = made.view(piece.shape).requires_grad_()
            piece.leaf.grad = gradient.view(piece.shape)
            piece.values = values

    def make(self) -> None:
        torch.addcmul(self.start, self.size, self.step, out=self.values)
        self.values.copy_(self.values.to(self.stored))
        made = self.values[:, None]
        self.made.copy_(made if self.codes is None else self.codes * made)

    def collect(self) -> None:
        gradient = self.gradient if self.codes is None else self.gradient * self.codes
        self.step.grad = gradient.sum(1, dtype=torch.float32) * self.size
        self.gradient.zero_()


class Values:
    """All pieces that one model is trained by; the model computes in `dtype`.

    The order of things: `make` (the leaves get their values), forward and backward passes (the leaves' gradients add
    up), `collect` (the steps' gradients), an optimiser's step on the `parameters`.
    """

    def __init__(self, pieces: list[Piece], dtype: torch.dtype) -> None:
        heaps: dict[tuple[object, ...], list[Piece]] = {}
        for piece in pieces:
            width = 0 if piece.codes is None else piece.codes.shape[1]
            heaps.setdefault((width, piece.stored, piece.kind), []).append(piece)
        # A gain in bf16 would hardly move.
        self._heaps = [_Heap(heap, torch.float32 if key[2] == "gains" else dtype) for key, heap in heaps.items()]
        self.make()

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained, with the kind of each."""
        return [(heap.kind, heap.step) for heap in self._heaps]

    @torch.no_grad()
    def make(self) -> None:
        """Give the leaves what the numbers of now make."""
        for heap in self._heaps:
            heap.make()

    @torch.no_grad()
    def collect(self) -> None:
        """Turn the leaves' gradients into the steps' own, and leave zeros."""
        for heap in self._heaps:
            heap.collect()

    @torch.no_grad()
    def state(self) -> list[Tensor]:
        """A copy of all steps."""
        return [heap.step.detach().clone() for heap in self._heaps]

    @torch.no_grad()
    def restore(self, state: list[Tensor]) -> None:
        """Put a copy of all steps back."""
        for heap, step in zip(self._heaps, state, strict=True):
            heap.step.copy_(step)
        self.make()
