"""How long a delta file takes from the page cache to the device, every byte verified, the base's hashes cached.

The file has the Plan, ranks and sizes of a real one and random codes; the base is a sparse file of zeros with the true
tensors' names and shapes, so that checking it against the file is the real check at its real cost.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bayou import allocate, inventory, methods, skeleton
from bayou.benchmarks import record
from bayou.benchmarks.pair import SHAPES, Shape
from bayou.checkpoint import Checkpoint, Output, header_bytes
from bayou.compress import EMBEDDING_RATE
from bayou.contents import Contents
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput
from bayou.methods import deltacome
from bayou.plan import SiteRecord

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
    with tempfile.TemporaryDirectory(dir=folder) as name, _cache(Path(name) / "cache"):
        base = _sparse_base(Path(name) / "base", SHAPES[shape])
        path = Path(name) / "random.bayou"
        size = _random_file(path, base, SHAPES[shape], ratio)
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


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """Fingerprints of the made-up base go to a cache of their own."""
    before = os.environ.get("BAYOU_CACHE")
    os.environ["BAYOU_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["BAYOU_CACHE"]
        if before is not None:
            os.environ["BAYOU_CACHE"] = before


def _sparse_base(folder: Path, shape: Shape) -> Checkpoint:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape.config(shape.layers)))
    outputs = [Output(name, "BF16", size, lambda: []) for name, size in sorted(shape.tensors(shape.layers))]
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header_bytes(outputs, {"format": "pt"}))
        file.truncate(file.tell() + sum(output.nbytes for output in outputs))
    return Checkpoint(folder)


def _random_file(path: Path, base: Checkpoint, shape: Shape, ratio: float) -> int:
    places = skeleton.places(skeleton.build(base.folder), base.names())
    tables = dict(deltacome.EMBEDDINGS)
    ways = {False: ("deltacome", methods.check("deltacome", {})), True: (str(tables.pop("method")), {})}
    ways[True] = (ways[True][0], methods.check(ways[True][0], tables))
    sites: list[SiteRecord] = []
    for name in sorted(base.names(), key=inventory.natural):
        size, role = base.shape(name), places[name].role
        if len(size) == 2:
            chosen = ways[role in allocate.TABLES]
            matrix = (size[0], size[1])
            sites.append(
                SiteRecord(name, None, matrix, matrix, "BF16", False, name, None, 1.0, role, *chosen, terms=())
            )
    unchanged = [name for name in base.names() if len(base.shape(name)) == 1]
    used = base.fingerprints(base.names())

    def contents(chosen: list[SiteRecord]) -> Contents:
        return Contents(chosen, [], unchanged, "", "", used, {}, {})

    limit = int(base.nbytes / ratio)
    sites, _ = allocate.within(sites, limit, lambda s: contents(s).nbytes(), embedding_rate=EMBEDDING_RATE)
    return contents(sites).write(path, lambda index: os.urandom(sites[index].nbytes), [0.0] * len(sites))


def table(found: dict[str, Any]) -> str:
    """The figures for a reader."""
    steps = ", ".join(f"{name} {seconds:.3f}" for name, seconds in found["steps"].items() if name != "seconds")
    return (
        f"{found['bytes']:,} bytes to {found.get('gpu', found['device'])}: {found['seconds']:.3f} s the best of "
        f"{len(found['all'])}, {found['first']:.3f} s the first ({steps}); {found['gigabytes_a_second']:.1f} GB/s"
    )
