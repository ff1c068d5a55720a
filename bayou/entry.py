"""A site's entry in the file: its terms as bytes, every section on 16 of them. README.md, "A site's bytes"."""

import struct
from collections.abc import Iterable

import torch
from torch import Tensor

from bayou.checkpoint import as_bytes
from bayou.delta import Dense, LowRank, Term
from bayou.methods import TermLayout
from bayou.packed import Packed, aligned


def pack_terms(terms: Iterable[Term]) -> bytes:
    """A site's entry: for each term its gain (fp32), channel scales (fp16) and matrices, each on 16 bytes."""
    pieces = bytearray()

    def put(raw: bytes | memoryview) -> None:
        pieces.extend(raw)
        pieces.extend(bytes(aligned(len(raw)) - len(raw)))

    for term in terms:
        put(struct.pack("<f", term.gain))
        for scale in (term.output_scale, term.input_scale):
            if scale is not None:
                put(as_bytes(scale.to(torch.float16)))
        for packed in term.factors():
            for part in packed.parts:
                put(as_bytes(part))
    return bytes(pieces)


def unpack_terms(buffer: Tensor, layouts: tuple[TermLayout, ...], shape: tuple[int, int]) -> tuple[Term, ...]:
    """The terms that lie in a site's entry, as views of it."""
    terms: list[Term] = []
    at = 0
    for layout in layouts:
        gain = float(buffer[at : at + 4].view(torch.float32))
        at += aligned(4)
        scales: list[Tensor | None] = []
        for present, length in ((layout.output_scale, shape[0]), (layout.input_scale, shape[1])):
            scales.append(buffer[at : at + 2 * length].view(torch.float16) if present else None)
            at += aligned(2 * length) * present
        matrices = []
        for spec, size in layout.matrices(shape):
            packed, at = Packed.view(spec, size, buffer, at)
            matrices.append(packed)
        if layout.kind == "Dense":
            terms.append(Dense(matrices[0], gain, *scales))
        else:
            terms.append(LowRank(tuple(zip(matrices[::2], matrices[1::2], strict=True)), gain, *scales))
    return tuple(terms)
