"""Where the packed deltas of a group of tenants lie: a table on the device that packed_product.py's kernels read.

A table serves the projections that share an input (q, k and v; gate and up), and has a slot for each tenant. What a
kernel has to know of a block of a tenant's delta is a *record* of 64-bit numbers: pointers, shape, bits, groups. Giving
a slot to another tenant is one small copy into memory that stays where it is, so a CUDA graph goes on to work.

`Table.write` does not copy the deltas: their tensors stay where they are, and are kept alive; but codes that lie in
several planes (3, 5, 6 and 7 bits) are written anew as codes of 4 or 8 bits. Blocks of 128 ranks that lie at equal
distances, as those of one site do in the file, make one record, which is read without a stop.
"""

import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bayou.errors import BadInput
from bayou.packed import PLANES, Packed

BLOCK = 128
"""Ranks of a record of v at most: a larger block is several records."""

FIELDS = 32
"""64-bit numbers of a record; see `_record`."""

PROJECTIONS = 4
"""Projections that may share an input."""

SLICES = 8
"""Parts at most that shrink cuts the columns into."""

EVEN = 64
"""Ranks of a projection are made a multiple of this where they are unpacked: cuBLAS is slower on odd numbers."""

CHUNK = 256
"""Columns of x, and ranks, come in panels of whole chunks; see packed_product.py."""

FLOAT_KINDS = {"f16": 3, "bf16": 4, "f32": 5}

LOOPS = {
    # (width of a code, how tiles lie): the kernel's loop
    (1, "whole"): 1,
    (2, "whole"): 2,
    (2, "run"): 3,
    (2, "ragged"): 4,
    (4, "whole"): 5,
    (4, "run"): 6,
    (4, "ragged"): 7,
    (8, "whole"): 8,
    (8, "ragged"): 9,
    (4, "narrow"): 10,
    (8, "narrow"): 11,
}
CODES, FLOATS = 12, 13
"""The loops for other groups, and for floats."""

Terms = Sequence[Any]
"""LowRank and Dense of delta.py, which imports this package."""


class Table:
    """Slots for the deltas of tenants, each a tuple of terms a projection.

    Args:
        shapes: (out, in) of each projection; all have one `in`. Four at most.
        slots: tenants that it can hold.
        like: deltas, (terms of each projection) a tenant, as large as any that will be written.
        device: where it lies, as all deltas must.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        slots: int,
        like: Sequence[Sequence[Terms]],
        device: torch.device | str = "cuda",
    ) -> None:
        if not 1 <= len(shapes) <= PROJECTIONS or len({cols for _, cols in shapes}) != 1:
            raise BadInput(f"projections {list(shapes)}: 1 to {PROJECTIONS} that share an input are expected")
        self.shapes = tuple(shapes)
        self.device = torch.empty(0, device=device).device  # "cuda" is the current one of several
        self.terms: list[Sequence[Terms]] = [[()] * len(shapes)] * slots
        self._kept: list[Any] = [None] * slots
        self.loops = dict.fromkeys(("shrink", "expand", "dense"), 0)
        """The loops that each launch needs, as bits: LOOPS, CODES and FLOATS."""
        self.scaled = False
        drafts = [self._draft(deltas) for deltas in like]
        self.ranks = -(-max((draft.ranks for draft in drafts), default=0) // BLOCK) * BLOCK
        self.packed_ranks = max((draft.spans[-1][1] for draft in drafts if draft.spans), default=0)
        self.host: list[_Draft | None] = [None] * slots
        """What was written to each slot, of which the CPU knows `bounds` and `spans`."""
        self.lists = {}
        for stage in ("shrink", "expand", "dense"):
            most = max((len(draft.records[stage]) for draft in drafts), default=0)
            self.lists[stage] = (
                torch.zeros(slots, most, FIELDS, dtype=torch.int64, device=self.device),
                torch.zeros(slots, len(shapes) + 1, dtype=torch.int32, device=self.device),
            )
        for draft in drafts:
            self._allow(draft)

    @property
    def stages(self) -> tuple[str, ...]:
        """The launches that a product takes, in their order."""
        found = [stage for stage, (records, _) in self.lists.items() if records.shape[1]]
        if self.widths("inputs"):
            found.insert(0, "inputs")
        if "expand" in found:
            found.insert(found.index("expand"), "ranks")
        return tuple(found)

    def widths(self, stage: str) -> tuple[int, ...]:
        """Of the codes that multiply a panel of x ("inputs"), or of what shrink made of it ("ranks")."""
        loops = self.loops["expand"] if stage == "ranks" else self.loops["shrink"] | self.loops["dense"]
        return tuple(sorted({width for (width, _), loop in LOOPS.items() if loops >> loop & 1}))

    @property
    def key(self) -> str:
        """What a choice of tiles depends on, but for the number of rows."""
        shapes = "+".join(str(out) for out, _ in self.shapes)
        loops = "-".join(f"{bits:x}" for bits in self.loops.values())
        return f"{shapes}x{self.shapes[0][1]} ranks {self.ranks} loops {loops}"

    def scratch(self, rows: int) -> Tensor:
        """Memory that a product of `rows` rows in all needs, uint8; see packed_product.Scratch."""
        slices = SLICES if rows <= 256 else 1
        nbytes = 4 * slices * rows * max(1, self.ranks)
        for stage, cols in (("inputs", self.shapes[0][1]), ("ranks", self.ranks)):
            nbytes += sum(2 * 2 * rows * panel_line(cols, width) for width in self.widths(stage))
        return torch.empty(nbytes + 16 * 16, dtype=torch.uint8, device=self.device)

    def write(self, slot: int, deltas: Sequence[Terms], grow: bool = True) -> bool:
        """Give `slot` to a tenant: the terms of each projection, none at all for a base's own.

        Returns whether CUDA graphs must be captured anew, which is when these deltas use number formats that none of
        `like` and of those written before did. Raises BadInput if they are larger than `like` or lie elsewhere; without
        `grow` also for new formats, which a product that runs meanwhile in another thread would take halfway.
        """
        draft = self._draft(deltas)
        new = any(loops & ~self.loops[stage] for stage, loops in draft.loops.items()) or draft.scaled > self.scaled
        if new and not grow:
            raise BadInput(f"the deltas for slot {slot} have number formats that the table was not made for")
        longer = any(len(draft.records[stage]) > records.shape[1] for stage, (records, _) in self.lists.items())
        if longer or draft.ranks > self.ranks or max((end for _, end in draft.spans), default=0) > self.packed_ranks:
            raise BadInput(f"the deltas for slot {slot} have more ranks or blocks than the table was made for")
        for stage, (records, bounds) in self.lists.items():
            found = torch.zeros(records.shape[1:], dtype=torch.int64)
            if draft.records[stage]:
                found[: len(draft.records[stage])] = torch.tensor(draft.records[stage], dtype=torch.int64)
            records[slot].copy_(found)
            bounds[slot].copy_(torch.tensor(draft.bounds[stage], dtype=torch.int32))
        self.terms[slot], self._kept[slot], self.host[slot] = deltas, draft.kept, draft
        return self._allow(draft)

    def forget(self, slot: int) -> None:
        """Let the deltas of `slot` go, without a word to the device: it must be written before it is used again."""
        self.terms[slot], self._kept[slot], self.host[slot] = [()] * len(self.shapes), None, None

    def clear(self, slot: int) -> None:
        """Make `slot` add nothing, and let its deltas go."""
        self.write(slot, [()] * len(self.shapes))

    def _allow(self, draft: "_Draft") -> bool:
        before = dict(self.loops), self.scaled
        for stage, loops in draft.loops.items():
            self.loops[stage] |= loops
        self.scaled |= draft.scaled
        return before != (self.loops, self.scaled)

    def _draft(self, deltas: Sequence[Terms]) -> "_Draft":
        if len(deltas) != len(self.shapes):
            raise BadInput(f"{len(deltas)} deltas were given for {len(self.shapes)} projections")
        draft = _Draft(self.device)
        for terms, shape in zip(deltas, self.shapes, strict=True):
            for term in terms:
                draft.add(term, shape)
            draft.close()
        return draft


class _Draft:
    """The records of one slot, as they are made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.records: dict[str, list[list[int]]] = {"shrink": [], "expand": [], "dense": []}
        self.bounds = {stage: [0] for stage in self.records}
        self.loops = dict.fromkeys(self.records, 0)
        self.ranks = 0
        """Places for ranks: each run of blocks begins at a multiple of BLOCK."""
        self.packed_ranks = 0
        self.spans: list[tuple[int, int]] = []
        """Where each projection's ranks lie, at multiples of EVEN and without gaps, for those who unpack all."""
        self.scaled = False
        self.kept: list[Any] = []
        self._made: dict[int, Tensor] = {}

    def close(self) -> None:
        """A projection's terms are all there."""
        begin = -(-self.spans[-1][1] // EVEN) * EVEN if self.spans else 0
        self.spans.append((begin, self.packed_ranks))
        self.packed_ranks = -(-self.packed_ranks // EVEN) * EVEN
        for stage, records in self.records.items():
            self.bounds[stage].append(len(records))

    def add(self, term: Any, shape: tuple[int, int]) -> None:
        """The records of one term."""
        scale_in, scale_out = self._scale(term.input_scale), self._scale(term.output_scale)
        self.scaled |= scale_in != 0
        if not hasattr(term, "blocks"):
            if term.weight.shape != shape:
                raise BadInput(f"a term of shape {term.weight.shape} was given for a projection of {shape}")
            weight = self._single(term.weight)
            record = self._record("dense", weight, term.gain, scale_in=scale_in, scale_out=scale_out)
            self.records["dense"].append(record)
            return
        blocks = [(self._single(u), self._single(v)) for u, v in term.blocks]
        for first, last in _runs([u for u, _ in blocks]):
            u, v = blocks[first]
            if (u.shape[0], v.shape[1]) != shape or u.shape[1] != v.shape[0]:
                raise BadInput(f"a block of {u.shape} times {v.shape} was given for a projection of {shape}")
            run = [u for u, _ in blocks[first:last]]
            record = self._record("expand", u, term.gain, scale_out=scale_out, run=run)
            span = CHUNK if u.spec.bits == 1 else BLOCK  # chunks of a panel begin there
            self.ranks = -(-self.ranks // span) * span
            record[13], record[22] = self.ranks, self.packed_ranks
            self.records["expand"].append(record)
            for _, part in blocks[first:last]:
                for row in range(0, part.shape[0], BLOCK):
                    record = self._record("shrink", part, scale_in=scale_in, start=row)
                    record[14], record[22] = self.ranks + row, self.packed_ranks + row
                    self.records["shrink"].append(record)
                self.ranks += part.shape[0]
                self.packed_ranks += part.shape[0]

    def _single(self, packed: Packed) -> Packed:
        """Codes of 3 bits, which lie in two planes, as codes of 4 in one; of 5 to 7 bits as codes of 8. Kept alive."""
        bits = packed.spec.bits
        if len(PLANES.get(bits, ())) < 2:
            return packed
        wide = replace(packed.spec, bits=4 if bits == 3 else 8)
        middle = 0 if packed.spec.zeros else (1 << (wide.bits - 1)) - (1 << (bits - 1))
        scales = packed.parts[len(PLANES[bits])] if packed.spec.groups(packed.shape[1]) else None
        self.kept.append(Packed.codes(packed.raw_codes() + middle, wide, scales, packed.zero_points()))
        return self.kept[-1]

    def _scale(self, scale: Tensor | None) -> int:
        if scale is None:
            return 0
        self.kept.append(scale.to(self.device, torch.float16).contiguous())
        return int(self.kept[-1].data_ptr())

    def _record(
        self,
        stage: str,
        packed: Packed,
        gain: float = 1.0,
        *,
        scale_in: int = 0,
        scale_out: int = 0,
        start: int | None = None,
        run: Sequence[Packed] = (),
    ) -> list[int]:
        """What the kernels know of a matrix, or of its BLOCK rows from `start` on, or of a `run` that begins with it.

        0 codes, or floats; 3 scales; 4 zero points; 5 marks; 6 marks of a tile; 7 rows; 8 columns; 9 bits; 10 columns
        that share a scale; 11 scales a row; 12 kind: 0 or 2 codes, 3-5 floats; 13, 14 where its input and output begin;
        15 columns that must stay together; 16 first zero point; 17 gain, the bits of an fp32; 18, 19 output and input
        scales; 20 1 + log2 of a code's width; 21 its loop, 0 for those of `kind`; 22 its place among the ranks, without
        gaps; 23 first mark; 29-31 from one matrix of a run to the next: 16-bit words,
        scales, words of zero points.
        """
        if any(part.device != self.device or not part.is_contiguous() for part in packed.parts):
            raise BadInput(f"deltas on {packed.parts[0].device} were given to a table on {self.device}")
        self.kept.append(packed)
        spec, (rows, cols) = packed.spec, packed.shape
        row = start or 0
        record = [0] * FIELDS
        record[7] = rows if start is None else min(rows - start, BLOCK)
        record[8], record[9] = cols, spec.bits
        record[10], record[11] = max(cols, 1), 1
        record[15] = 32
        record[17] = struct.unpack("<i", struct.pack("<f", gain))[0]
        record[18], record[19] = scale_out, scale_in
        if spec.floats:
            record[0] = packed.parts[0].data_ptr() + row * cols * packed.parts[0].itemsize
            record[12] = FLOAT_KINDS[spec.floats]
            self.loops[stage] |= 1 << FLOATS
            return record
        groups = spec.groups(cols)
        if 0 < (spec.group or 0) < cols:
            record[10], record[11] = int(spec.group or 0), groups
        record[0] = packed.parts[0].data_ptr() + row * packed.parts[0].shape[1] * 4
        if groups:
            record[3] = packed.parts[1].data_ptr() + row * groups * packed.parts[1].itemsize
        if spec.zeros:
            record[4] = packed.parts[2].data_ptr()
        record[16] = row * groups
        record[20] = spec.bits.bit_length()
        lies = "other" if scale_in else "run" if len(run) > 1 else _tiles(record)
        loop = LOOPS.get((spec.bits, lies), CODES)
        self.loops[stage] |= 1 << loop
        if loop == CODES:
            record[12] = 2
            return record
        record[15], record[21] = CHUNK, loop
        marks = self._marks(run or (packed,))
        record[5], record[6], record[23] = marks.data_ptr(), marks.shape[1] if marks.shape[0] > 1 else 0, row
        if len(run) > 1:
            moves = [b.data_ptr() - a.data_ptr() for a, b in zip(packed.parts, run[1].parts, strict=True)]
            record[8], record[29] = cols * len(run), moves[0] // 2
            record[30:32] = [moves[1] // 2 if groups else 0, moves[2] // 4 if spec.zeros else 0]
        return record

    def _marks(self, run: Sequence[Packed]) -> Tensor:
        """Scale and zero point of each tile and row, two fp16 in an int32: (tiles of all matrices, rows), or (1, rows).

        Rows lie together, since that is what a tile reads: the scales as they are stored would be one sector of memory
        a number.
        """
        known = self._made.get(id(run[0]))
        if known is None:
            parts = []
            for packed in run:
                groups = max(1, packed.spec.groups(packed.shape[1]))
                scales = torch.ones(packed.shape[0], groups, dtype=torch.float16, device=self.device)
                zeros = torch.full_like(scales, (2**packed.spec.bits - 1) / 2)
                if packed.spec.groups(packed.shape[1]):
                    scales = packed.parts[1]
                if (points := packed.zero_points()) is not None:
                    zeros = points.to(torch.float16)
                marks = torch.stack([scales, zeros], dim=-1).view(torch.int32)[..., 0].T
                if groups > 1:
                    span = 256 if packed.spec.bits == 1 else 128
                    marks = marks.repeat_interleave(int(packed.spec.group or 0) // span, dim=0)
                parts.append(marks)
            known = self._made[id(run[0])] = torch.cat(parts).contiguous()
            self.kept.append(known)
        return known


def panel_line(cols: int, width: int) -> int:
    """16-bit numbers of a row's line in the panel that codes of a width multiply; see packed_panels.panel."""
    span, wide = 256 if width == 1 else 128, -(-cols // CHUNK) * CHUNK
    chunks = wide // span
    return chunks * span * (2 if width == 8 else 1) + -(-chunks * 4 // 8) * 8


def _tiles(record: list[int]) -> str:
    """How the tiles of a matrix lie, of 128 columns, or 256 of 1-bit codes, where a tile's share their scales.

    whole: on 16 bytes. ragged: what is no column is masked. narrow: it is all in the first 16 words of a tile.
    """
    cols, group, bits = record[8], record[10], record[9]
    span = 256 if bits == 1 else 128
    if group < cols and group % span:
        return "other"
    whole = record[0] % 16 == 0 and -(-cols * bits // 32) % 4 == 0 and cols % span == 0
    if whole:
        return "whole"
    return "narrow" if bits > 2 and cols * bits <= 16 * 16 else "ragged"


def _runs(blocks: Sequence[Packed]) -> list[tuple[int, int]]:
    """Cuts blocks into runs (first, last) of 128 columns in one plane, that lie at equal distances on 16 bytes."""

    def follows(a: Packed, b: Packed) -> list[int] | None:
        group = a.spec.group
        if a.spec != b.spec or a.shape != b.shape or a.shape[1] != 128 or a.spec.bits not in (2, 4):
            return None
        if group and group < 128 or a.parts[0].data_ptr() % 16:
            return None
        moves = [y.data_ptr() - x.data_ptr() for x, y in zip(a.parts, b.parts, strict=True)]
        return moves if all(move % 16 == 0 for move in moves) else None

    runs = []
    first, step = 0, None
    for i in range(1, len(blocks) + 1):
        moves = follows(blocks[i - 1], blocks[i]) if i < len(blocks) else None
        if moves is None or (step is not None and moves != step):
            runs.append((first, i))
            first, step = i, None
        else:
            step = moves
    return runs
