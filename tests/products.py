"""Cases for the packed products: run by tests/test_kernels_product.py in Triton's interpreter, and on a GPU."""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from interpreter import write_errors
from torch import Tensor

from bayou.delta import Delta, Dense, LowRank, Term
from bayou.kernels import packed_product, unpack
from bayou.kernels.table import Table
from bayou.kernels.tuning import Choice, Pair
from bayou.packed import Packed, Spec, aligned

Case = Callable[[str], float]
"""device -> relative error against the reference."""


def packed(spec_text: str, rows: int, cols: int, g: torch.Generator) -> Packed:
    """Random numbers; scales and zero points too."""
    spec = Spec.parse(spec_text)
    if spec.floats:
        return Packed.floats(torch.randn(rows, cols, generator=g), spec.floats)
    codes = torch.randint(0, 2**spec.bits, (rows, cols), generator=g, dtype=torch.uint8)
    groups = spec.groups(cols)
    scales = torch.rand(rows, groups, generator=g) + 0.5 if groups else None
    zeros = torch.randint(0, 2**spec.bits, (rows, groups), generator=g, dtype=torch.uint8) if spec.zeros else None
    return Packed.codes(codes, spec, scales, zeros)


def laid(matrices: Sequence[Packed], device: str) -> list[Packed]:
    """The same matrices one after another in one buffer, as in a file."""
    buffer = torch.zeros(sum(m.nbytes for m in matrices), dtype=torch.uint8, device=device)
    views, offset = [], 0
    for matrix in matrices:
        view, offset = Packed.view(matrix.spec, matrix.shape, buffer, offset)
        for part, source in zip(view.parts, matrix.parts, strict=True):
            part.copy_(source)
        views.append(view)
    assert offset == len(buffer) and offset % aligned(1) == 0
    return views


def dense(spec: str, shape: tuple[int, int], device: str, seed: int = 0, **options: Any) -> Dense:
    g = torch.Generator().manual_seed(seed)
    return Dense(laid([packed(spec, *shape, g)], device)[0], 0.7, **options)


def lowrank(
    shape: tuple[int, int], blocks: Sequence[tuple[int, str, str]], device: str, seed: int = 0, **options: Any
) -> LowRank:
    """blocks: (ranks, u, v) of each."""
    g = torch.Generator().manual_seed(seed)
    matrices = []
    for ranks, u, v in blocks:
        matrices += [packed(u, shape[0], ranks, g), packed(v, ranks, shape[1], g)]
    views = laid(matrices, device)
    return LowRank(tuple(zip(views[::2], views[1::2], strict=True)), 0.3, **options)


def bands(rank: int) -> list[tuple[int, str, str]]:
    """Delta-CoMe's blocks of a delta of `rank` ranks."""
    blocks = [(min(rank, 2), "f16", "8g128z")]
    if rank > 2:
        blocks.append((min(rank - 2, 32), "3g128z", "3g128z"))
    return blocks + [(min(128, rank - start), "2g128z", "2g128z") for start in range(34, rank, 128)]


def relative(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """||found - wanted|| / ||wanted|| over all outputs; infinity for a NaN."""
    error = sum(float((f.float() - w.float()).square().sum()) for f, w in zip(found, wanted, strict=True))
    size = sum(float(w.float().square().sum()) for w in wanted)
    return (error / size) ** 0.5 if error == error else float("inf")


def product(
    deltas: Sequence[Sequence[Sequence[Term]]],
    shapes: Sequence[tuple[int, int]],
    segments: Sequence[tuple[int, int]],
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    tiles: Pair | None = None,
    out: torch.dtype = torch.float32,
    write: Callable[[Table], None] | None = None,
) -> float:
    """Error of a product; segments: (slot, rows) of each. Outputs start as noise, and strangers' columns surround x."""
    table = Table(shapes, len(deltas), deltas, device)
    for slot, each in enumerate(deltas):
        table.write(slot, each)
    if write is not None:
        write(table)
    g = torch.Generator().manual_seed(1)
    rows = sum(count for _, count in segments)
    wide = torch.randn(rows, shapes[0][1] + 8, generator=g).to(device, dtype)
    x = wide[:, : shapes[0][1]]
    bounds = [0]
    for _, count in segments:
        bounds.append(bounds[-1] + count)
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    slots = torch.tensor([slot for slot, _ in segments], dtype=torch.int32, device=device)
    most = max(count for _, count in segments)
    found = [torch.randn(rows, size, generator=g).to(device, out) for size, _ in shapes]
    wanted, before = [y.to(torch.float32, copy=True) for y in found], [y.clone() for y in found]
    scratch = table.scratch(rows).fill_(255)  # NaN in all its types
    for stage in table.stages:
        packed_product.launch(stage, table, x, offsets, slots, found, most=most, scratch=scratch, chosen=tiles)
    packed_product.reference(table, x, offsets, slots, wanted, most=most, scratch=scratch)
    for (slot, _), (first, last) in zip(segments, pairwise(bounds), strict=True):
        if slot < 0:  # the base's rows are left as they were, to the bit
            assert all(torch.equal(y[first:last], b[first:last]) for y, b in zip(found, before, strict=True))
    if out == torch.float32:  # the delta alone: what was there before must not hide an error
        found = [y - b for y, b in zip(found, before, strict=True)]
        wanted = [y - b for y, b in zip(wanted, before, strict=True)]
    return relative(found, wanted)


def one(term: Term, shape: tuple[int, int], rows: int, device: str, **options: Any) -> float:
    """Error of the product with one delta."""
    return product([[(term,)]], [shape], [(0, rows)], device, **options)


def popular(kind: str, rows: int, tenants: int) -> list[int]:
    """Rows of each tenant where `rows` ask by this law."""
    chance = random.Random(3)
    if kind == "identical":
        return [rows] + [0] * (tenants - 1)
    if kind == "distinct":
        return [1] * tenants
    weights = [1.0 if kind == "uniform" else (i + 1) ** -1.5 for i in range(tenants)]
    drawn = chance.choices(range(tenants), weights, k=rows)
    return [drawn.count(i) for i in range(tenants)]


def batch(kind: str, tenants: int, scale: int, device: str) -> float:
    """A batch of tenants of several ranks and formats over three projections, with rows of the base between."""
    shapes = [(scale, scale), (scale // 2 + 3, scale), (scale, scale)]
    most = bands(300 if scale > 100 else 170)  # the interpreter's time goes by the blocks
    formats = [bands(2), bands(33), most, [(40, "4r", "4r")], [(16, "f16", "f16")], [(24, "2g16z", "2g16z")]]
    deltas = []
    for tenant in range(tenants):
        terms: list[tuple[Term, ...]] = []
        for p, shape in enumerate(shapes):
            blocks = formats[(tenant + p) % len(formats)] if tenant % 5 < 4 else None
            seed = 10 * tenant + p
            terms.append((lowrank(shape, blocks, device, seed) if blocks else dense("1", shape, device, seed),))
        terms[1] = terms[1] if tenant % 3 else ()  # this projection is as the base's
        deltas.append(terms)
    counts = popular(kind, tenants, tenants)
    segments = [(slot, count) for slot, count in enumerate(counts)]
    segments.insert(tenants // 2, (-1, 2))
    return product(deltas, shapes, segments, device)


def sizes(shape: tuple[int, int], rank: int, rows: int) -> Case:
    return lambda device: one(lowrank(shape, bands(rank), device), shape, rows, device)


def format_case(spec: str, cols: int) -> Case:
    shape = (20 if cols <= 512 else 150, cols)
    return lambda device: one(dense(spec, shape, device), shape, 3, device)


def tile_case(tile: int, warps: int, split: int) -> Case:
    tiles = Choice(tile, warps, 3, split), Choice(tile, warps, 3)
    blocks = bands(34 + 128 * 2 + 9)
    return lambda device: one(lowrank((80, 512), blocks, device), (80, 512), 2, device, tiles=tiles)


def scaled(device: str) -> float:
    scales = {
        "output_scale": (torch.rand(70) + 0.5).half().to(device),
        "input_scale": (torch.rand(256) + 0.5).half().to(device),
    }
    terms = (lowrank((70, 256), bands(40), device, **scales), dense("2r", (70, 256), device, **scales))
    return product([[terms]], [(70, 256)], [(0, 5)], device)


def crowded(table: Table) -> None:
    """What a table does not keep alive is written over."""
    crowded.held = [  # type: ignore[attr-defined]
        torch.full((size,), -1, dtype=torch.int32, device=table.device) for size in (16, 640, 1024, 2048, 4096) * 60
    ]


def shrunk(device: str) -> float:
    """A slot's tenant gives way to one of fewer ranks, in two terms; rows of none and of the base are between."""
    shape = (20, 256)
    many = (lowrank(shape, bands(300), device), dense("3r", shape, device))
    few = (lowrank(shape, [(5, "2g128z", "2g128z")], device, 4), lowrank(shape, [(3, "f16", "bf16")], device, 5))

    def write(table: Table) -> None:
        table.write(0, [few])

    return product([[many]], [shape], [(0, 3), (0, 0), (-1, 2), (0, 1)], device, write=write)


def rewritten(device: str) -> float:
    """A slot is given to another tenant, and one is cleared."""
    shape = (40, 128)
    deltas = [[(lowrank(shape, bands(rank), device, rank),)] for rank in (60, 50)]

    def write(table: Table) -> None:
        assert not table.write(0, deltas[1])
        table.clear(1)

    return product(deltas, [shape], [(0, 3), (1, 2)], device, write=write)


def unpacked(dtype: torch.dtype) -> Case:
    """For many rows: the 16-bit matrices, which PyTorch then multiplies; here only that they are the right ones."""

    def run(device: str) -> float:
        shape = (20, 136)
        blocks = [*bands(34 + 128 * 2 + 7), (5, "bf16", "f32"), (130, "5g20z", "3r")]
        scales = {"input_scale": (torch.rand(136) + 0.5).half().to(device), "output_scale": torch.ones(20).half()}
        scales["output_scale"] = scales["output_scale"].to(device) * 1.5
        terms = (lowrank(shape, blocks, device, **scales), dense("7g24z", shape, device))
        other = ((7, 136), (lowrank((7, 136), bands(40), device, 5),))
        shapes, deltas = [shape, other[0], (9, 136)], [terms, other[1], ()]
        table = Table(shapes, 1, [deltas], device)
        table.write(0, deltas)
        x = torch.eye(136, dtype=dtype, device=device)
        outs = [torch.full((136, size), 3.0, dtype=dtype, device=device) for size, _ in shapes]
        unpack.product(table, x, outs, keep=False)
        kept = [y.clone() for y in outs]
        unpack.product(table, x, kept)
        wanted = [Delta(s, t).materialize().to(device) for s, t in zip(shapes, deltas, strict=True)]
        return max(relative([y.T for y in outs], wanted), relative([y.T / 2 for y in kept], wanted))

    return run


GROUPS = ("", "r", "rz", "g128", "g128z", "g32z", "g48z", "g20z")


def small() -> dict[str, Case]:
    """Cases that the interpreter can do in a minute."""
    cases: dict[str, Case] = {}
    for bits in range(1, 9):
        for i, group in enumerate(GROUPS):
            cases[f"{bits}{group}"] = format_case(
                f"{bits}{group}", 512 if i < 5 and bits < 3 else 256 if i < 5 else 100
            )
        cases[f"{bits}g128z odd"] = format_case(f"{bits}g128z", 300)
    for kind in ("f16", "bf16", "f32"):
        cases[kind] = format_case(kind, 100)
    for rank in (2, 33):
        for rows in (1, 7):
            cases[f"100x33 rank {rank} rows {rows}"] = sizes((100, 33), rank, rows)
    cases["33x100 rank 33 rows 70"] = sizes((33, 100), 33, 70)
    cases["rank 130"] = sizes((20, 64), 130, 3)
    cases["300 rows"] = sizes((20, 64), 2, 300)
    for tile, warps, split in ((32, 1, 1), (64, 2, 4), (128, 4, 8)):
        cases[f"tile {tile} warps {warps} split {split}"] = tile_case(tile, warps, split)
    for kind in ("identical", "distinct", "uniform", "zipf"):
        cases[kind] = lambda device, kind=kind: batch(kind, 6, 48, device)  # type: ignore[misc]
    for dtype in (torch.float16, torch.float32):
        cases[str(dtype)] = lambda device, dtype=dtype: one(  # type: ignore[misc]
            lowrank((70, 256), bands(50), device), (70, 256), 3, device, dtype=dtype
        )
    cases["four bits in a run"] = lambda device: one(
        lowrank((70, 128), [(128, "4g128z", "4g128z")] * 3, device), (70, 128), 2, device
    )
    for name, blocks in {
        "three bits in a run": [(128, "3g128z", "3g128z")] * 3,
        "one bit after another": [(2, "f16", "f16"), (256, "1r", "1r"), (130, "8r", "8g128z")],
        "wide groups": [(130, "8g256z", "8g256z"), (140, "4g384z", "2g256z"), (20, "8r", "8")],
    }.items():
        cases[name] = lambda device, blocks=blocks: one(  # type: ignore[misc]
            lowrank((40, 256), blocks, device), (40, 256), 2, device, write=crowded
        )
    cases["two terms and a shrunk tenant"] = shrunk
    cases["channel scales"] = scaled
    cases["rewritten"] = rewritten
    cases["unpacked"] = unpacked(torch.float32)
    return cases


MEASURED = (
    *("1", "1g20z", "1g32z", "1g128z", "2", "2g48z", "3g128", "4g128z", "5", "8", "8g20z", "8g48z"),
    *("f16", "bf16", "f32", "100x33 rank 2 rows 7", "channel scales", "four bits in a run", "identical", "rewritten"),
)
"""Cases whose coverage is measured: together they go through all loops."""


def large() -> dict[str, Case]:
    """Cases for a GPU, besides the small ones."""
    cases: dict[str, Case] = {}
    for shape in ((4096, 4096), (11008, 4096), (4096, 11008), (100, 33)):
        for rank in (2, 33, 1002):
            for rows in (1, 3, 17, 64, 300):
                if rank <= min(shape):
                    cases[f"{shape[0]}x{shape[1]} rank {rank} rows {rows}"] = sizes(shape, rank, rows)
    for bits in range(1, 9):
        for group in GROUPS:
            for cols in (4096, 1000):
                cases[f"{bits}{group} x {cols}"] = format_case(f"{bits}{group}", cols)
    for tile, warps, split in ((32, 1, 1), (32, 2, 4), (64, 1, 2), (64, 2, 1), (64, 4, 8), (128, 2, 1), (128, 4, 4)):
        cases[f"tile {tile} warps {warps} split {split}"] = tile_case(tile, warps, split)
    for kind in ("identical", "distinct", "uniform", "zipf"):
        for tenants in (4, 64):
            cases[f"{kind} {tenants}"] = lambda device, kind=kind, tenants=tenants: batch(  # type: ignore[misc]
                kind, tenants, 1024, device
            )
    # The interpreter cuts numbers to bf16 instead of rounding them.
    cases["bf16 outputs"] = lambda device: one(
        lowrank((70, 256), bands(50), device), (70, 256), 3, device, out=torch.bfloat16
    )
    return cases


if __name__ == "__main__":
    write_errors(small(), MEASURED)
