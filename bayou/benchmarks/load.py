"""How long a delta file takes from the page cache to the device, every byte verified, the base's hashes cached.

The file has the Plan, ranks and sizes of a real one and random codes; the base is a sparse file of zeros with the true
tensors' names and shapes, so that checking it against the file is the real check at its real cost.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bayou.benchmarks import record, stand_in
from bayou.benchmarks.pair import SHAPES
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput

LIMIT = 1.0
"""Seconds that loading a 7B model's file may take on an H100's host."""


def run(
    *,
    shape: str = "llama-2-7b",
    ratio: float = 16.0,
    repeats: int = 5,
    device: str = "cuda",
    folder: Path | None = None,
) -> dict[str, Any]:
    """Write such a file and load it `repeats` times; seconds of each, and of the best one's steps.

    folder: where the file goes (0.85 GB for llama-2-7b); the system's folder for temporary files unless given.
    Raises BadInput for an unknown shape.
    """
    if shape not in SHAPES or repeats < 1:
        raise BadInput(f"shape {shape!r}, {repeats} times: choose one of {', '.join(SHAPES)}, 1 time or more")
    with tempfile.TemporaryDirectory(dir=folder) as name, stand_in.cache(Path(name) / "cache"):
        base = stand_in.base(Path(name) / "base", SHAPES[shape])
        path = Path(name) / "random.bayou"
        size = stand_in.delta_file(path, base, ratio)
        torch.empty(1, device=device)  # the device is up before the clock starts
        record.finish(device)
        times = [_load(path, base.folder, device) for _ in range(repeats)]
    best = min(times, key=lambda steps: steps["seconds"])
    return {
        "benchmark": "load",
        "shape": shape,
        "ratio": ratio,
        "bytes": size,
        "seconds": best["seconds"],
        "first": times[0]["seconds"],
        "all": [steps["seconds"] for steps in times],
        "steps": best,
        "gigabytes_a_second": size / best["seconds"] / 1e9,
        **record.surroundings(device),
    }


def _load(path: Path, base: Path, device: str) -> dict[str, float]:
    marks = [time.perf_counter()]
    file = DeltaFile(path)
    marks.append(time.perf_counter())
    file.lean_on(base)
    marks.append(time.perf_counter())
    deltas = file.deltas(file.sites, device)
    record.finish(device)
    marks.append(time.perf_counter())
    assert len(deltas) == len(file.sites)
    spans = [after - before for before, after in zip(marks, marks[1:], strict=False)]
    return dict(zip(("open", "check the base", "sites"), spans, strict=True)) | {"seconds": marks[-1] - marks[0]}


def table(found: dict[str, Any]) -> str:
    """The figures for a reader."""
    steps = ", ".join(f"{name} {seconds:.3f}" for name, seconds in found["steps"].items() if name != "seconds")
    return (
        f"{found['bytes']:,} bytes to {found.get('gpu', found['device'])}: {found['seconds']:.3f} s the best of "
        f"{len(found['all'])}, {found['first']:.3f} s the first ({steps}); {found['gigabytes_a_second']:.1f} GB/s"
    )
