"""How long compression takes, step by step: `bayou.compress` itself, on a pair of models that is made in memory.

Steps are timed with the device synchronised at both ends, so each is charged what it set going. The seconds without
disk leave out the writing of the file; reading is from memory. `plain` does one layer the way the paper's code does.
"""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayou import clock
from bayou.benchmarks import plain, record
from bayou.benchmarks.pair import SHAPES, Shape, pair
from bayou.compress import EMBEDDING_RATE, compress
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput
from bayou.plan import SiteRecord

DISK = ("write",)
"""Steps that are the disk's."""


def run(
    *,
    shape: str = "llama-2-7b",
    layers: int | None = None,
    ratio: float = 16.0,
    tokens: int = 262_144,
    length: int = 2048,
    method: str = "deltacome",
    device: str = "cuda",
    beside_plain: bool = False,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Compress such a pair and say where the time went.

    Args:
        shape: a name of SHAPES. layers: the first so many, with ranks as in the whole model; all unless given.
        tokens, length: of the calibration, random ids.
        beside_plain: do a layer the plain way too; "plain" then has its steps, and "times" their ratio to ours.
        keep: where to put the delta file; it goes with the pair unless given.

    Returns:
        seconds, without_disk, a_layer, steps {name: {seconds, gflops, tflops_a_second}}, bytes, ranks, peak memory ...

    Raises:
        BadInput: an unknown shape, or numbers that make no model.
    """
    if shape not in SHAPES:
        raise BadInput(f"shape {shape!r}: choose one of {', '.join(SHAPES)}")
    sizes = SHAPES[shape]
    count = sizes.layers if layers is None else layers
    if not 1 <= count <= sizes.layers or tokens < length or length < 2:
        raise BadInput(f"{count} layers of {sizes.layers}, {tokens} tokens in windows of {length}: not to be had")
    if beside_plain and count < 2:
        raise BadInput("a layer's time is told from two layers' at least: give --layers 2 or more beside --plain")
    marks: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = time.perf_counter()
        base, tuned = pair(sizes, count, folder, device)
        windows = torch.randint(
            sizes.vocabulary, (tokens // length, length), generator=torch.Generator().manual_seed(0)
        )
        _warm(device)
        made = time.perf_counter() - made
        with clock.exact(lambda: record.finish(device)):
            report = compress(
                base,
                tuned,
                folder / "out.bayou",
                method=method,
                budget=_budget(sizes, count, ratio),
                calibration=windows,
                device=device,
                progress=lambda step, *_: marks.append(time.perf_counter()) if step == "layers" else None,
            )
        sites = list(DeltaFile(report.path).sites.values())
        memory = _memory(device)
        if keep is not None:
            keep.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(report.path, keep)
        found: dict[str, Any] = {
            "benchmark": "compress",
            "shape": shape,
            "layers": count,
            "of": sizes.layers,
            "ratio": ratio,
            "method": method,
            "tokens": windows.numel(),
            "length": length,
            "seconds": report.seconds,
            "without_disk": report.seconds - sum(report.steps.get(step, 0.0) for step in DISK),
            "a_layer": (marks[-1] - marks[0]) / (count - 1) if count > 1 else None,
            "steps": _steps(report.steps, _work(sizes, count, windows, sites)),
            "bytes": report.bytes,
            "ranks": {role: ranks for role, ranks in _ranks(sites)},
            "errors": report.errors,
            "making_the_pair": made,
            **memory,
        }
        if beside_plain:
            ranks = {site.name.partition(".0.")[2]: site.options["rank"] for site in sites if ".layers.0." in site.name}
            found["plain"] = plain.layer(base, tuned, sizes, windows, ranks, device)
            found["times"] = found["plain"]["seconds"] / found["a_layer"]
    return found | record.surroundings(device)


def _warm(device: str) -> None:
    """Libraries and the compiled kernel are loaded at their first use, once a process: not what is measured."""
    one = torch.eye(64, device=device, dtype=torch.float64)
    torch.linalg.eigh(one)
    torch.linalg.cholesky(one)
    record.finish(device)
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _memory(device: str) -> dict[str, int]:
    if torch.device(device).type != "cuda":
        return {}
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def _budget(shape: Shape, layers: int, ratio: float) -> int:
    """Bytes by which `layers` layers get the ranks that they have in the whole model: embeddings weigh less there."""
    linears = sum(out * width for out, width in shape.linears().values())
    tables = shape.tables
    rate = 2 * (shape.layers * linears + tables) / ratio / (shape.layers * linears + EMBEDDING_RATE * tables)
    return int(rate * (layers * linears + EMBEDDING_RATE * tables))


def _ranks(sites: list[SiteRecord]) -> list[tuple[str, list[int]]]:
    found: dict[str, set[int]] = {}
    for site in sites:
        if "rank" in site.options:
            found.setdefault(f"{site.role} {site.shape[0]}x{site.shape[1]}", set()).add(site.options["rank"])
    return [(key, sorted(ranks)) for key, ranks in found.items()]


def _work(shape: Shape, layers: int, windows: Tensor, sites: list[SiteRecord]) -> dict[str, float]:
    """Floating point operations of each step, by the usual counts (an eigendecomposition: 9 n^3)."""
    tokens, length = windows.numel(), windows.shape[1]
    linears = shape.linears().values()
    inputs = [shape.hidden] * 3 + [shape.inner]
    coded = [(site.shape, site.options["rank"]) for site in sites if site.method == "deltacome"]
    work = {
        "calibrate": layers * (2.0 * tokens * (sum(o * i for o, i in linears) + length * shape.hidden)),
        "gram": 2.0 * tokens * (layers * sum(n**2 for n in inputs) + shape.hidden**2),
        "decompose": sum(2.0 * max(s) * min(s) ** 2 + 9.0 * min(s) ** 3 + 2.0 * s[0] * s[1] * r for s, r in coded),
        "factorise": layers * sum(4 / 3 * n**3 for n in inputs) + sum(4 / 3 * r**3 for _, r in coded),
        "gptq of v": sum(1.0 * r * s[1] ** 2 for s, r in coded),
        "hessian of u": sum(2.0 * r * s[1] ** 2 + 2.0 * r**2 * s[1] for s, r in coded),
        "gptq of u": sum(1.0 * s[0] * r**2 for s, r in coded),
        "rows of u": sum(2.0 * s[0] * s[1] ** 2 + 2.0 * s[0] * s[1] * r for s, r in coded),
        "measure error": sum(2.0 * s[0] * s[1] * r for s, r in coded),
    }
    return work


def _steps(seconds: dict[str, float], work: dict[str, float]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        found[name] = {"seconds": round(spent, 4)}
        if name in work and spent:
            found[name] |= {"gflop": round(work[name] / 1e9, 4), "tflops": round(work[name] / spent / 1e12, 2)}
    return found


def table(found: dict[str, Any]) -> str:
    """The figures for a reader."""
    lines = [
        f"{found['shape']}, {found['layers']} of {found['of']} layers, {found['method']} at 1/{found['ratio']:g}, "
        f"{found['tokens']:,} tokens, {found.get('gpu', found['device'])}",
        f"  {found['seconds']:.1f} s, {found['without_disk']:.1f} s without disk; {found['bytes']:,} bytes"
        + (f"; {found['a_layer']:.2f} s a layer" if found["a_layer"] else "")
        + (f"; {found['peak_bytes'] / 1e9:.1f} GB of GPU memory at the peak" if "peak_bytes" in found else ""),
    ]
    every = {"": found["steps"]} | ({"plain: ": found["plain"]["steps"]} if "plain" in found else {})
    for label, steps in every.items():
        for name, step in steps.items():
            rate = f"  {step['tflops']:8.2f} TFLOP/s" if "tflops" in step else ""
            lines.append(f"  {label + name:32} {step['seconds']:9.3f} s{rate}")
    if "plain" in found:
        lines.append(f"  a layer the plain way: {found['plain']['seconds']:.1f} s, {found['times']:.1f} times ours")
    return "\n".join(lines)
