"""The product of rows of many tenants with their packed deltas.

For the rows x_s (n, in) of segment s, which belong to the delta in slot d(s), and each projection p that shares x:

    y_p[rows of s] += gain * output_scale * (sum over blocks of (x_s * input_scale) @ v.T @ u.T)        LowRank
    y_p[rows of s] += gain * output_scale * ((x_s * input_scale) @ weight.T)                            Dense

with u, v and weight as they are stored. Two launches serve all LowRank terms of all projections: *shrink* writes
t = x @ v.T in fp32, *expand* adds t @ u.T; Dense terms take one more. Every program owns its outputs, so there are no
atomics and sums come in a fixed order: where shrink needs more programs than there are blocks of ranks, it cuts the
columns in SPLIT parts, each with a t of its own, which *ranks* adds.

How codes become numbers. A tile of the codes is read as 16-bit words, and code k of word j is column j*(16/w) + k. So
the k-th codes of all words are a matrix, which multiplies every (16/w)-th element of x. Two words lie in a register;
with a code at bits i*w of a word, one operation makes two bf16 numbers of it:

    (word & mask) | 0x4300        is 128 + 2^(i*w) * code, exactly, while i*w + w <= 7; a shift serves several i

What is too much is taken off the sum: with s and z of a group of columns,

    s * sum (code - z) * x  =  s * (sum (128 + 2^(i*w) * code) * x * 2^-(i*w) - 128 * sum x * 2^-(i*w) - z * sum x)

The tensor cores sum in fp32, so nothing is lost. Everything that depends on x alone is made once, by a launch before:
*inputs* spreads x, and *ranks* spreads t, into a panel in which what a tile multiplies lies in order, and the two sums.
A panel is bf16; t, and inputs of more bits, take two lines a row, which add up. They fill columns of the tensor
core's tile that would be idle. Codes of 8 bits are multiplied as two of 4.

Groups that tiles do not suit, input scales and floats go a way of their own, which is right and not fast.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from bayou.kernels import interpreted, use_triton
from bayou.kernels.table import BLOCK, CHUNK, FIELDS, PROJECTIONS, SLICES, Table, panel_line
from bayou.kernels.tuning import Choice, choice


def packed_product(
    table: Table, x: Tensor, offsets: Tensor, slots: Tensor, outs: Sequence[Tensor], *, most: int, scratch: Tensor
) -> None:
    """Add each row's delta's product to `outs`, in place: no allocation, no synchronisation, so it can be captured.

    Args:
        table: the deltas. What is in its slots may change between replays of a CUDA graph.
        x: (rows, in) bf16, fp16 or fp32; the last axis contiguous.
        offsets: (S + 1,) int32 on the device: segment s is the rows offsets[s]:offsets[s + 1], which may be none.
        slots: (S,) int32 on the device: the segment's slot of `table`, or -1 for rows of the base itself.
        outs: for each projection of the table (rows, out), any float dtype; the last axis contiguous.
        most: no segment has more rows than this. A segment's further rows would be left out.
        scratch: `table.scratch(rows)`, for as many rows.
    """
    (_triton if use_triton(x) else reference)(table, x, offsets, slots, outs, most=most, scratch=scratch)


def reference(
    table: Table, x: Tensor, offsets: Tensor, slots: Tensor, outs: Sequence[Tensor], *, most: int, scratch: Tensor
) -> None:
    """The formula in plain torch and fp32."""
    bounds = offsets.tolist()
    for segment, slot in enumerate(slots.tolist()):
        rows = slice(bounds[segment], bounds[segment + 1])
        if slot < 0 or rows.start >= rows.stop:
            continue
        given = x[rows].float()
        for out, terms in zip(outs, table.terms[slot], strict=True):
            for term in terms:
                out[rows] = (out[rows].float() + term_product(term, given)).to(out.dtype)


def term_product(term: Any, x: Tensor) -> Tensor:
    """x (..., in) fp32 -> x @ term.T (..., out) fp32 for a LowRank or Dense of delta.py."""
    if term.input_scale is not None:
        x = x * term.input_scale.float()
    if hasattr(term, "blocks"):
        y = sum((x @ v.unpack().T) @ u.unpack().T for u, v in term.blocks)
    else:
        y = x @ term.weight.unpack().T
    return y * term.gain if term.output_scale is None else y * term.gain * term.output_scale.float()


def _triton(
    table: Table, x: Tensor, offsets: Tensor, slots: Tensor, outs: Sequence[Tensor], *, most: int, scratch: Tensor
) -> None:
    for stage in table.stages:
        launch(stage, table, x, offsets, slots, outs, most=most, scratch=scratch)


def compile_ahead(tables: Sequence[Table], sizes: Sequence[tuple[int, int]], dtype: torch.dtype) -> int:
    """Compile what products with these tables will need, in threads; returns the number of launches that took.

    sizes: (segments, most) of the products. Launches do nothing: all their segments are the base's. On the current
    stream, on which nobody waits.
    """
    found: dict[Any, tuple[str, Table, int, int]] = {}
    for table in tables:
        for segments, most in sizes:
            pair, rows = choice(table.key, segments, most), min(32, 1 << max(2, (most - 1).bit_length()))
            for stage in table.stages:
                key = stage, table.widths(stage), table.loops.get(stage), table.scaled, rows, pair
                found.setdefault(key, (stage, table, segments, most))
    if not found:
        return 0
    stream = torch.cuda.current_stream(tables[0].device) if tables[0].device.type == "cuda" else None

    def one(stage: str, table: Table, segments: int, most: int) -> None:
        with torch.inference_mode(), torch.cuda.stream(stream):
            x = torch.zeros(segments, table.shapes[0][1], dtype=dtype, device=table.device)
            outs = [torch.zeros(segments, out, dtype=dtype, device=table.device) for out, _ in table.shapes]
            offsets = torch.zeros(segments + 1, dtype=torch.int32, device=table.device)
            slots = torch.full((segments,), -1, dtype=torch.int32, device=table.device)
            launch(stage, table, x, offsets, slots, outs, most=most, scratch=table.scratch(segments))

    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(one, *each) for each in found.values()]:
            done.result()
    return len(found)


class Scratch:
    """Where in a table's scratch memory t and the panels lie: t (slices, rows, ranks) fp32; lines of 16-bit numbers."""

    def __init__(self, table: Table, memory: Tensor, rows: int) -> None:
        slices = SLICES if rows <= 256 else 1
        used = 4 * slices * rows * max(1, table.ranks)
        self.t = memory[:used].view(torch.float32).view(slices, rows, max(1, table.ranks))
        self.panels: dict[str, dict[int, Tensor]] = {}
        for stage, cols in (("inputs", table.shapes[0][1]), ("ranks", table.ranks)):
            self.panels[stage] = {}
            for width in table.widths(stage):
                used = -(-used // 16) * 16
                size = 2 * 2 * rows * panel_line(cols, width)
                self.panels[stage][width] = memory[used : used + size].view(torch.bfloat16)
                used += size
        if used > memory.numel():
            raise ValueError(
                f"scratch of {memory.numel()} bytes was made before the table's formats grew: {used} needed"
            )


def launch(
    stage: str,
    table: Table,
    x: Tensor,
    offsets: Tensor,
    slots: Tensor,
    outs: Sequence[Tensor],
    *,
    most: int,
    scratch: Tensor,
    chosen: tuple[Choice, Choice] | None = None,
) -> int:
    """One launch of table.stages; returns the number of programs. chosen: tiles of shrink, of others."""
    import triton.language as tl

    from bayou.kernels import packed_loops, packed_panels

    segments = slots.shape[0]
    shrink, rest = chosen or choice(table.key, segments, most)
    mine = shrink if stage == "shrink" else rest
    places = Scratch(table, scratch, x.shape[0])
    split = min(shrink.split, places.t.shape[0])
    late = stage in ("ranks", "expand")  # what they read is t
    parts = 2 if late or x.dtype != torch.bfloat16 or table.scaled else 1
    source = places.t if late else x
    panels = places.panels["ranks" if late else "inputs"]
    cols = table.ranks if late else table.shapes[0][1]
    wide = -(-cols // CHUNK) * CHUNK
    lines = [panels.get(width, scratch) for width in (1, 2, 4, 8)]
    if stage in ("inputs", "ranks"):
        spreads = x.shape[0] * (wide // CHUNK)
        packed_panels.spread[(x.shape[0], wide // CHUNK)](
            source,
            source.stride(-2),
            places.t.stride(0),
            cols,
            wide,
            *lines,
            WIDTHS=sum(width for width in panels),
            PARTS=parts,
            SLICES=split if late else 1,
            C=CHUNK,
            num_warps=4,
        )
        return spreads
    # More columns of the tensor core's tile than 32 would not fit registers and shared memory.
    rows = max(8 // parts, min(32 // parts, 1 << (most - 1).bit_length()))
    row_tiles = -(-most // rows)
    if stage == "shrink":
        tiles = [table.lists[stage][0].shape[1] * (BLOCK // mine.tile)]
    else:
        tiles = [-(-out // mine.tile) for out, _ in table.shapes]
    ends = [sum(tiles[: i + 1]) for i in range(len(tiles))] + [sum(tiles)] * (PROJECTIONS - len(tiles))
    target = [places.t[0]] if stage == "shrink" else list(outs)
    target += target[-1:] * (PROJECTIONS - len(target))
    records, bounds = table.lists[stage]
    grid = (ends[-1], segments * row_tiles, split if stage == "shrink" else 1)
    packed_loops.product[grid](
        records,
        bounds,
        records.shape[1],
        source,
        source.stride(-2),
        places.t.stride(0),
        wide,
        *lines,
        *target,
        *(out.stride(0) for out in target),
        *ends[: PROJECTIONS - 1],
        offsets,
        slots,
        row_tiles,
        len(table.shapes),
        SHRINK=stage == "shrink",
        FIELDS=FIELDS,
        M=mine.tile,
        MOST=BLOCK,
        ROWS=rows,
        PARTS=parts,
        SPLIT=split if stage == "shrink" else 1,
        SCALED=table.scaled and stage != "expand",
        STAGES=mine.stages,
        LOOPS=table.loops[stage],
        ASM=not interpreted() and torch.version.hip is None,
        DOT=tl.float32 if interpreted() else tl.bfloat16,
        num_warps=mine.warps,
        **({} if torch.version.hip else {"maxnreg": mine.registers}),
    )
    return grid[0] * grid[1] * grid[2]
