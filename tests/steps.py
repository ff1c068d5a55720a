"""Cases for the kernels of a decode step: run by tests/test_kernels_step.py in Triton's interpreter, and on a GPU."""

from collections.abc import Callable, Sequence

import torch
from interpreter import write_errors
from products import bands, dense, lowrank
from torch import Tensor

from bayou.kernels import decode_attention, rotary, row_lookup, row_norm
from bayou.kernels.table import Table

Case = Callable[[str], float]
"""device -> relative error against the reference."""


def relative(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||; infinity for a NaN."""
    error = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    return error if error == error else float("inf")


def attention(
    heads: tuple[int, int],
    d: int,
    e: int,
    positions: Sequence[int],
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    softcap: float | None = None,
) -> Case:
    """heads: of queries, of keys. The slots are full of other sequences' noise beyond each position."""

    def run(device: str) -> float:
        g = torch.Generator().manual_seed(0)
        rows, (many, few), length = len(positions), heads, max(positions) + 9

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g).to(device, dtype)

        wide = noise(rows, 3 * many, d)  # as parts of one product of several projections lie
        q, k, v = wide[:, :many], wide[:, many : many + few], noise(rows, few, e)
        keys, values = noise(rows + 2, few, length, d), noise(rows + 2, few, length, e)
        slot = torch.arange(1, rows + 1).flip(0).to(device)
        position = torch.tensor(positions, device=device)
        options = {"scale": d**-0.5, "window": window, "softcap": softcap}
        copies = [(keys.clone(), values.clone()) for _ in range(2)]
        wanted = decode_attention.reference(q, k, v, *copies[0], slot, position, **options)
        found = decode_attention.triton_version(q, k, v, *copies[1], slot, position, **options)
        assert all(torch.equal(a, b) for a, b in zip(*copies, strict=True)), "other places were written to"
        return relative(found, wanted)

    return run


def norm(rows: int, several: int, d: int, kind: str, dtype: torch.dtype = torch.float32) -> Case:
    def run(device: str) -> float:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(rows, several + 1, d, generator=g).to(device, dtype)[:, :several]
        table = torch.randn(5, d, generator=g).to(device, dtype)
        lines = torch.randint(0, 5, (rows,), generator=g).to(device)
        given = x, table, lines, 1e-5, kind
        return relative(row_norm.triton_version(*given), row_norm.reference(*given))

    return run


def turn(heads: tuple[int, int], rows: int, d: int, dtype: torch.dtype = torch.float32) -> Case:
    def run(device: str) -> float:
        g = torch.Generator().manual_seed(0)
        wide = torch.randn(1, rows, sum(heads) + 2, d, generator=g).to(device, dtype).transpose(1, 2)
        q, k = wide[:, : heads[0]], wide[:, heads[0] : sum(heads)]
        cos, sin = torch.randn(2, 1, rows, d, generator=g).to(device, dtype)
        found, wanted = rotary.triton_version(q, k, cos, sin), rotary.reference(q, k, cos, sin)
        assert [f.shape for f in found] == [w.shape for w in wanted]
        return max(map(relative, found, wanted))

    return run


def lookup(shape: tuple[int, int], kinds: Sequence[str], dtype: torch.dtype = torch.float32) -> Case:
    """A tenant for each of `kinds`, and the base; the ids reach from the first row to the last."""

    def run(device: str) -> float:
        rows = shape[0]
        made = {
            "bands": lambda i: (lowrank(shape, bands(60), device, i),),
            "run": lambda i: (lowrank(shape, [(128, "4r", "4r")] * 3 + [(17, "4r", "4r")], device, i),),
            "groups": lambda i: (lowrank(shape, [(20, "5g16z", "3g20z")], device, i),),
            "dense": lambda i: (dense("f16", shape, device, i),),
            "signs": lambda i: (dense("1r", shape, device, i), lowrank(shape, [(5, "bf16", "f32")], device, i)),
            "scaled": lambda i: (
                lowrank(
                    shape,
                    bands(40),
                    device,
                    i,
                    output_scale=(torch.rand(rows) + 0.5).half().to(device),
                    input_scale=(torch.rand(shape[1]) + 0.5).half().to(device),
                ),
            ),
            "nothing": lambda i: (),
        }
        deltas = [[made[kind](i)] for i, kind in enumerate(("nothing", *kinds))]
        table = Table([shape], len(deltas), deltas, device)
        for line, each in enumerate(deltas):
            table.write(line, each)
        g = torch.Generator().manual_seed(0)
        base = torch.randn(shape, generator=g).to(device, dtype)
        gains = torch.rand(len(deltas), generator=g).to(device)
        lines = torch.arange(len(deltas), device=device).repeat_interleave(3)
        ids = torch.randint(0, rows, (len(lines),), generator=g).to(device)
        ids[0], ids[-1] = rows - 1, 0
        errors = [
            relative(row_lookup.triton_version(*given), row_lookup.reference(*given))
            for given in ((table, base, gains, ids, lines), (None, base, gains, ids, lines))
        ]
        return max(errors)

    return run


def small() -> dict[str, Case]:
    """Cases that the interpreter can do in a minute."""
    cases = {
        "attention": attention((4, 4), 32, 32, [0, 1, 63, 64, 65, 130, 7]),
        "attention, odd width": attention((3, 3), 24, 40, [5, 70, 0]),
        "attention, groups": attention((8, 2), 32, 32, [0, 64, 100, 3]),
        "attention, groups of three, odd width": attention((6, 2), 20, 12, [0, 64, 100, 3]),
        "attention, one head of keys": attention((20, 1), 16, 16, [10, 90]),
        "attention, window": attention((4, 4), 32, 32, [0, 5, 15, 16, 17, 140], window=16),
        "attention, window and groups": attention((4, 2), 32, 32, [0, 5, 70, 140], window=70),
        "attention, cap": attention((4, 4), 32, 32, [0, 80], softcap=2.0),
        "attention, cap and groups": attention((4, 2), 32, 32, [0, 80], softcap=2.0, window=30),
        "norm": norm(5, 1, 300, "times"),
        "norm, heads": norm(3, 4, 64, "times"),
        "norm, plus": norm(3, 2, 100, "plus"),
        "turn": turn((4, 2), 5, 32),
        "turn, odd width": turn((3, 3), 2, 20),
        "lookup": lookup((50, 72), ("bands", "dense", "signs")),
        "lookup, runs": lookup((40, 130), ("run", "nothing", "groups")),
        "lookup, scales": lookup((33, 64), ("scaled",)),
    }
    for dtype in (torch.float16, torch.bfloat16):
        cases[f"attention, {dtype}"] = attention((4, 4), 32, 32, [0, 70, 128], dtype)
        cases[f"norm, {dtype}"] = norm(3, 1, 128, "times", dtype)
        cases[f"turn, {dtype}"] = turn((4, 2), 3, 16, dtype)
        cases[f"lookup, {dtype}"] = lookup((50, 72), ("bands",), dtype)
    return cases


def large() -> dict[str, Case]:
    """Cases for a GPU, besides the small ones."""
    cases: dict[str, Case] = {}
    for dtype in (torch.bfloat16, torch.float32):
        cases[f"attention 7b {dtype}"] = attention((32, 32), 128, 128, [i * 4 for i in range(64)], dtype)
        cases[f"attention 1b {dtype}"] = attention((32, 8), 64, 64, [i * 60 for i in range(32)], dtype)
        cases[f"norm 7b {dtype}"] = norm(64, 1, 4096, "times", dtype)
        cases[f"turn 7b {dtype}"] = turn((32, 32), 64, 128, dtype)
        cases[f"lookup 4096 {dtype}"] = lookup((3000, 4096), ("run", "bands", "signs", "scaled"), dtype)
    return cases


if __name__ == "__main__":
    write_errors(small())
