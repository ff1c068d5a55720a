"""The packed products against their floor, against plain PyTorch and against the base's own.

Deltas are those of a Llama-2-7B layer at ratio 16 (terms.py). Whatever is timed is first compared with the fp32
reference. Times are those of CUDA graphs, over deltas enough that no cache holds them.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.table import Table as Printed
from torch import Tensor

from bayou.benchmarks.terms import LAYER, Shape, Stored, Terms, layouts, random, signs
from bayou.delta import Delta
from bayou.kernels import packed_product as kernel
from bayou.kernels import tuning
from bayou.kernels.one_delta import one_delta
from bayou.kernels.table import Table
from bayou.kernels.unpack import product as unpacked_product

BANDWIDTH = 3.0e12
"""Bytes a second that an H100's memory gives to a plain copy: what the floors are made of."""

COLD = 192 * 2**20
"""Bytes that a measurement goes through at least: several times the L2 cache."""


class Group:
    """Projections that share an input, with T tenants of one row each."""

    def __init__(self, shapes: Sequence[Shape], terms: Terms, tenants: int) -> None:
        self.shapes, self.tenants = shapes, tenants
        self.deltas = [[(each,) for each in terms(shapes)] for _ in range(tenants)]
        self.table = Table(shapes, tenants, self.deltas[:1])
        for slot, deltas in enumerate(self.deltas):
            self.table.write(slot, deltas)
        self.x = torch.randn(tenants, shapes[0][1], device="cuda", dtype=torch.bfloat16)
        self.outs = [torch.zeros(tenants, out, device="cuda", dtype=torch.bfloat16) for out, _ in shapes]
        self.offsets = torch.arange(tenants + 1, dtype=torch.int32, device="cuda")
        self.slots = torch.arange(tenants, dtype=torch.int32, device="cuda")
        self.scratch = self.table.scratch(tenants)

    @property
    def nbytes(self) -> int:
        """Of the packed deltas, all tenants'."""
        return sum(f.nbytes for deltas in self.deltas for terms in deltas for t in terms for f in t.factors())

    def arguments(self) -> tuple[Any, ...]:
        """What packed_product and each launch are called with."""
        return self.table, self.x, self.offsets, self.slots, self.outs

    def run(self) -> None:
        """The kernels."""
        kernel.packed_product(*self.arguments(), most=1, scratch=self.scratch)

    def launch(self, stage: str, chosen: tuning.Pair | None = None) -> int:
        """One launch."""
        return kernel.launch(stage, *self.arguments(), most=1, scratch=self.scratch, chosen=chosen)

    def plain(self) -> None:
        """PyTorch: unpack each tenant's factors, and multiply."""
        for row, deltas in enumerate(self.deltas):
            for out, terms in zip(self.outs, deltas, strict=True):
                for each in terms:
                    out[row : row + 1] += each.apply(self.x[row : row + 1])

    def error(self) -> float:
        """The kernels' relative error against the fp32 reference, over all projections."""
        found = [torch.zeros(out.shape, device="cuda") for out in self.outs]
        wanted = [out.clone() for out in found]
        kernel.packed_product(self.table, self.x, self.offsets, self.slots, found, most=1, scratch=self.scratch)
        kernel.reference(self.table, self.x, self.offsets, self.slots, wanted, most=1, scratch=self.scratch)
        return relative(torch.cat(found, 1), torch.cat(wanted, 1))


def relative(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||."""
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def graph(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """`run`, captured after a first go outside, which compiles."""
    run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured


def seconds(run: Callable[[], Any], repeats: int = 10, samples: int = 3) -> float:
    """Of one call of `run`: the median of some timings of repeated calls, by the GPU's clock."""
    run()
    times = []
    for _ in range(samples):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / repeats)
    return sorted(times)[len(times) // 2]


def timed(runs: Sequence[Callable[[], Any]], repeats: int = 10) -> float:
    """Of all `runs` after one another, as one CUDA graph."""
    captured = graph(lambda: [run() for run in runs])
    return seconds(captured.replay, repeats)


def tuned(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Measure the tiles for groups of one shape, and keep the best; all that was measured."""
    first = groups[0]
    stages = {"shrink": ["shrink"], "rest": [stage for stage in first.table.stages if stage in ("expand", "dense")]}

    def measure(which: str, chosen: tuning.Pair) -> float:
        if which == "shrink" and "shrink" not in first.table.stages:
            return math.inf
        try:
            runs = [lambda g=g, s=s: g.launch(s, chosen) for g in groups for s in stages[which]]
            return timed(runs, 5) / len(groups)
        except Exception as error:  # tiles that do not fit a device fail in Triton's own ways
            failed.append({"launch": which, "tiles": str(chosen), "failed": f"{type(error).__name__}: {error}"[:300]})
            return math.inf

    def compiled(which: str, chosen: tuning.Pair) -> None:
        for stage in stages[which]:
            with contextlib.suppress(Exception), torch.inference_mode():
                first.launch(stage, chosen)

    # Compiling is most of the time, and threads share it; what fails here fails again below, and is told of there.
    with ThreadPoolExecutor(12) as pool:
        pairs = [("shrink", (c, tuning.REST[0])) for c in tuning.SHRINK]
        pairs += [("rest", (tuning.SHRINK[0], c)) for c in tuning.REST]
        list(pool.map(lambda each: compiled(*each), pairs))
    failed: list[dict[str, Any]] = []
    _, tried = tuning.tune(first.table.key, first.tenants, 1, measure)
    kept = [{"launch": which, "tiles": str(c), "us": t * 1e6} for which, c, t in tried if t < math.inf]
    return sorted(kept, key=lambda row: (row["launch"], row["us"])) + failed


def decode(tenants: int, layer: Sequence[Sequence[Shape]], terms: Terms, tune: bool, plain: bool) -> dict[str, Any]:
    """The products of a layer for one row of each tenant."""
    layers: list[list[Group]] = []
    while not layers or sum(g.nbytes for part in layers for g in part) < COLD and len(layers) < 32:
        layers.append([Group(shapes, terms, tenants) for shapes in layer])
    found: dict[str, Any] = {"tenants": tenants, "bytes": sum(g.nbytes for g in layers[0]), "launches": []}
    for i in range(len(layer)):
        same = [part[i] for part in layers]
        entry: dict[str, Any] = {"shapes": layer[i], "error": same[0].error(), "bytes": same[0].nbytes}
        if tune:
            entry["tried"] = tuned(same)
        pair = tuning.choice(same[0].table.key, tenants, 1)
        for stage in same[0].table.stages:
            time = timed([lambda g=g, s=stage: g.launch(s) for g in same]) / len(same)  # type: ignore[misc]
            matrices = [t for terms in same[0].deltas for (t,) in terms]
            entry[stage] = {"us": time * 1e6, "programs": same[0].launch(stage)}
            if stage in ("inputs", "ranks"):
                continue
            half = sum(f.nbytes for t in matrices for f in list(t.factors())[stage == "shrink" :: 2])
            entry[stage] |= {"bytes": half, "GB/s": half / time / 1e9, "tiles": str(pair[stage != "shrink"])}
        found["launches"].append(entry)
    floor = found["bytes"] / BANDWIDTH
    time = timed([g.run for part in layers for g in part]) / len(layers)
    found |= {"us": time * 1e6, "floor_us": floor * 1e6, "over_floor": time / floor}
    found["error"] = max(entry["error"] for entry in found["launches"])
    if plain:

        def all_plain() -> None:
            for group in layers[0]:
                group.plain()

        found["pytorch_us"] = seconds(all_plain, 1, 1) * 1e6
    return found


def unpacked_bmm(tenants: int) -> float:
    """Seconds of the layer's products with bf16 factors, one batched product for all tenants."""
    runs = []
    for shapes in LAYER:
        x = torch.randn(tenants, 1, shapes[0][1], device="cuda", dtype=torch.bfloat16)
        for layout, (out, cols) in zip(layouts(shapes), shapes, strict=True):
            rank = sum(part[0] for part in layout.parts)
            v = torch.randn(tenants, cols, rank, device="cuda", dtype=torch.bfloat16)
            u = torch.randn(tenants, rank, out, device="cuda", dtype=torch.bfloat16)
            runs.append(lambda x=x, v=v, u=u: torch.bmm(torch.bmm(x, v), u))
    return timed(runs)


def base(rows: int) -> float:
    """Seconds of the base layer's own seven products."""
    runs = []
    for shapes in LAYER:
        x = torch.randn(rows, shapes[0][1], device="cuda", dtype=torch.bfloat16)
        for out, cols in shapes:
            weight = torch.randn(out, cols, device="cuda", dtype=torch.bfloat16)
            runs.append(lambda x=x, w=weight: x @ w.T)
    return timed(runs)


def prefill(rows: int, terms: Terms) -> dict[str, Any]:
    """Base plus delta of one tenant against the base alone, all seven products of the layer."""
    runs, errors = [], []
    for shapes in LAYER:
        x = torch.randn(rows, shapes[0][1], device="cuda", dtype=torch.bfloat16)
        deltas = terms(shapes)
        for each, shape in zip(deltas, shapes, strict=True):
            wanted = kernel.term_product(each, x.float())
            errors.append(relative(one_delta(Delta(shape, (each,)), x), wanted))
        table = Table(shapes, 1, [[(each,) for each in deltas]])
        table.write(0, [(each,) for each in deltas])
        weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
        runs.append(lambda x=x, ws=weights, t=table: unpacked_product(t, x, [x @ w.T for w in ws]))
    with_delta, alone = timed(runs, 5), base(rows)
    return {
        "rows": rows,
        "us": with_delta * 1e6,
        "base_us": alone * 1e6,
        "over_base": with_delta / alone,
        "error": max(errors),
    }


def figure(batches: Sequence[int], hidden: Sequence[int]) -> list[dict[str, Any]]:
    """The paper's Figure 3: one square matrix, a delta for each row of the batch."""
    points = []
    for size in hidden:
        for batch in batches:
            point = decode(batch, [((size, size),)], random, tune=False, plain=True)
            kept = ("us", "floor_us", "over_floor", "pytorch_us", "error")
            points.append({"hidden": size, "batch": batch, **{key: point[key] for key in kept}})
    return points


def measure(quick: bool, file: Path | None = None) -> dict[str, Any]:
    """All of it; quick: T = 1 and 16, tiles measured for 16 only, no 1-bit deltas, and four points of the figure.

    file: whose first layer's deltas are taken, but for the 1-bit ones and the figure; random codes without one.
    """
    terms: Terms = random if file is None else Stored(file)
    began = time.monotonic()

    def say(step: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {step}", file=sys.stderr, flush=True)

    torch.manual_seed(0)
    with torch.inference_mode():
        found: dict[str, Any] = {"codes": "random" if file is None else "of a file"}
        found |= {"base_us": {str(rows): base(rows) * 1e6 for rows in (1, 4, 16, 64)}, "decode": []}
        for tenants in (1, 16) if quick else (1, 4, 16, 64):
            tune = tenants == 16 or not quick and tenants != 4
            row = decode(tenants, LAYER, terms, tune=tune, plain=True)
            found["decode"].append(row)
            say(f"T = {tenants}: {row['us']:.1f} us, {row['over_floor']:.2f} floors, error {row['error']:.1e}")
        found["unpacked_bmm_us"] = {"4": unpacked_bmm(4) * 1e6}
        found["prefill"] = prefill(2048, terms)
        say(f"prefill: {found['prefill']['over_base']:.2f} times the base")
        if not quick:
            row = found["bitdelta"] = decode(16, LAYER, signs, tune=True, plain=True)
            say(f"1-bit: {row['us']:.1f} us, {row['over_floor']:.2f} floors")
        found["figure3"] = figure(*(((1, 16), (1024, 4096)) if quick else ((1, 4, 16, 64), (1024, 2048, 4096, 8192))))
        say("figure 3 is done")
    return found


def tables(found: dict[str, Any]) -> list[Printed]:
    """The numbers as people read them."""
    summary = Printed(title=f"A Llama-2-7B layer's seven products, one row a tenant, microseconds; {found['device']}")
    for column in ("T", "kernel", "floor", "over floor", "PyTorch", "base", "bmm bf16", "error"):
        summary.add_column(column, justify="right")
    bits = [("1-bit 16", found["bitdelta"])] if "bitdelta" in found else []
    for name, row in [(str(row["tenants"]), row) for row in found["decode"]] + bits:
        summary.add_row(
            name,
            *(f"{row[key]:.1f}" for key in ("us", "floor_us")),
            f"{row['over_floor']:.2f}",
            f"{row['pytorch_us']:.0f}",
            f"{found['base_us'].get(str(row['tenants']), math.nan):.1f}",
            f"{found['unpacked_bmm_us'].get(name, math.nan):.1f}",
            f"{row['error']:.1e}",
        )
    launches = Printed(title="Each launch")
    for column in ("T", "shapes", "launch", "us", "GB/s", "programs", "tiles"):
        launches.add_column(column, justify="left" if column in ("shapes", "launch", "tiles") else "right")
    for name, row in [(str(row["tenants"]), row) for row in found["decode"]] + bits:
        for entry in row["launches"]:
            shapes = f"{len(entry['shapes'])} x {entry['shapes'][0][0]}x{entry['shapes'][0][1]}"
            for stage in ("inputs", "shrink", "ranks", "expand", "dense"):
                if stage in entry:
                    one = entry[stage]
                    speed = f"{one['GB/s']:.0f}" if "GB/s" in one else ""
                    numbers = f"{one['us']:.1f}", speed, str(one["programs"]), one.get("tiles", "")[7:-1]
                    launches.add_row(name, shapes, stage, *numbers)
    after = Printed(title="Prefill, one tenant")
    for column in ("rows", "base + delta", "base", "over base", "error"):
        after.add_column(column, justify="right")
    row = found["prefill"]
    numbers = f"{row['us']:.0f}", f"{row['base_us']:.0f}", f"{row['over_base']:.2f}", f"{row['error']:.1e}"
    after.add_row(str(row["rows"]), *numbers)
    curve = Printed(title="Figure 3: one square matrix, a delta a row; microseconds")
    for column in ("hidden", "batch", "kernel", "PyTorch", "over floor", "error"):
        curve.add_column(column, justify="right")
    for row in found["figure3"]:
        curve.add_row(
            *(str(row[key]) for key in ("hidden", "batch")),
            *(f"{row[key]:.1f}" for key in ("us", "pytorch_us")),
            f"{row['over_floor']:.2f}",
            f"{row['error']:.1e}",
        )
    return [summary, launches, after, curve]
