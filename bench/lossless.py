"""`--method exact` beside general compressors and lossless peers: bytes, and CPU seconds both ways.

    python bench/lossless.py BASE FINETUNED --name intent [--other NAME=BYTES ...] [--skip zstd-19-xor ...]

Adds lines to bench/results/lossless.json, one for each way of storing FINETUNED (a folder with one model.safetensors):

    exact               bayou.compress, then bayou.restore; the tensors are compared bit for bit
    exact, no forecast  the same with --option bands=none: steps from the base alone
    zstd-19-xor         zstd -19 of the xor of both models' numbers, low bytes first, then high bytes   (pip: zstandard)
    zipnn-xor           ZipNN of that xor, as bfloat16                                                 (pip: zipnn)
    arc_v2, arc_v3      Fireworks' differences: xor + zstd, changed places            (pip: fireworks-delta-compression)

and one for the coder alone, on the symbols of the steps of a matrix: rANS against their entropy, zlib -9 and zstd -19.
CPU seconds are those of this process and its children, other work on the machine notwithstanding; one thread.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

import bayou
from bayou import entropy, steps

RESULTS = Path(__file__).parent / "results" / "lossless.json"


def cpu() -> float:
    """CPU seconds of this process and of its children that ended."""
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `work` gives, its CPU seconds and its seconds."""
    begin, clock = cpu(), time.perf_counter()
    found = work()
    return found, cpu() - begin, time.perf_counter() - clock


def bits_of(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor's 16-bit patterns."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).view(torch.int16).numpy().view(np.uint16) for name in file.keys()}  # noqa: SIM118


def exact(base: Path, tuned: Path, work: Path, **options: Any) -> dict[str, Any]:
    file, out = work / "a.bayou", work / "out"
    report, there, wall = timed(lambda: bayou.compress(base, tuned, file, method="exact", options=options))
    _, back, wall_back = timed(lambda: bayou.restore(base, file, out))
    wanted, found = bits_of(tuned), bits_of(out)
    assert wanted.keys() == found.keys() and all(np.array_equal(wanted[n], found[n]) for n in wanted)
    shutil.rmtree(out)
    return {"bytes": report.bytes, "cpu_compress": there, "cpu_restore": back, "seconds": [wall, wall_back]}


def xor(base: Path, tuned: Path) -> np.ndarray:
    old, new = bits_of(base), bits_of(tuned)
    return np.concatenate([(old[name] ^ new[name]).ravel() for name in sorted(new)])


def zstd_xor(base: Path, tuned: Path, work: Path) -> dict[str, Any]:
    import zstandard

    whole = xor(base, tuned)
    raw = np.concatenate([(whole & 255).astype(np.uint8), (whole >> 8).astype(np.uint8)]).tobytes()
    coded, there, wall = timed(lambda: zstandard.ZstdCompressor(level=19).compress(raw))
    again, back, wall_back = timed(lambda: zstandard.ZstdDecompressor().decompress(coded))
    assert again == raw
    return {"bytes": len(coded), "cpu_compress": there, "cpu_restore": back, "seconds": [wall, wall_back]}


def zipnn_xor(base: Path, tuned: Path, work: Path) -> dict[str, Any]:
    from zipnn import ZipNN

    raw = xor(base, tuned).tobytes()
    coder = ZipNN(bytearray_dtype="bfloat16", threads=1)
    coded, there, wall = timed(lambda: coder.compress(bytearray(raw)))
    again, back, wall_back = timed(lambda: coder.decompress(coded))
    assert bytes(again) == raw
    return {"bytes": len(coded), "cpu_compress": there, "cpu_restore": back, "seconds": [wall, wall_back]}


def arc(base: Path, tuned: Path, work: Path, form: str) -> dict[str, Any]:
    from fireworks_delta_compression import decompress_delta_into_source, delta_compress_dirs

    folders = [work / form / name for name in ("base", "tuned", "diff")]
    for folder, source in zip(folders, (base, tuned, None), strict=True):
        folder.mkdir(parents=True)
        if source:  # as 16-bit integers: it reads by numpy, which has no bfloat16
            save_file({n: b.view(np.float16) for n, b in bits_of(source).items()}, folder / "model.safetensors")
    _, there, wall = timed(lambda: delta_compress_dirs(*map(str, folders), form))
    size = sum(path.stat().st_size for path in folders[2].rglob("*") if path.is_file())
    found = next(folders[2].rglob("*.safetensors"))
    _, back, wall_back = timed(
        lambda: decompress_delta_into_source(str(found), str(folders[0] / "model.safetensors"), form)
    )
    return {"bytes": size, "cpu_compress": there, "cpu_restore": back, "seconds": [wall, wall_back]}


def coder(base: Path, tuned: Path, name: str) -> dict[str, Any]:
    """rANS on the steps of the first chunk of one matrix, each in the context of its exponent."""
    with safe_open(base / "model.safetensors", "pt") as old, safe_open(tuned / "model.safetensors", "pt") as new:
        rows = steps.chunk_rows(old.get_slice(name).get_shape()[1])
        before, after = old.get_slice(name)[:rows], new.get_slice(name)[:rows]
    integers = [steps.ordered(t.view(torch.int16).numpy()).astype(np.int64) for t in (before, after)]
    moved = (integers[1] - integers[0]).ravel()
    symbols = np.clip(2 * np.abs(moved) - (moved > 0), 0, 63).astype(np.uint8)  # larger ones have plain bits
    contexts = ((before.view(torch.int16).numpy() >> 7) & 255).astype(np.uint8).ravel()
    counts = np.bincount(contexts.astype(np.int64) * 64 + symbols, minlength=256 * 64).reshape(256, 64)
    total = counts.sum(1, keepdims=True)
    limit = float((counts * np.log2(np.where(counts > 0, total / np.maximum(counts, 1), 1))).sum()) / 8
    table = entropy.frequencies(counts)
    lanes = entropy.lanes_for(len(symbols), entropy.cost(counts, table))
    (states, words), there, _ = timed(lambda: entropy.encode(symbols, contexts, table, lanes))
    again, back, _ = timed(lambda: entropy.decode(states, words, contexts, table))
    assert np.array_equal(again, symbols)
    size = states.nbytes + words.nbytes
    found: dict[str, Any] = {"symbols": len(symbols), "lanes": lanes, "entropy_bytes": limit}
    found["rans"] = {"bytes": size, "over_entropy": size / limit - 1}
    found["rans"] |= {"symbols_a_second": [len(symbols) / there, len(symbols) / back]}
    raw = symbols.tobytes()
    coded, there, _ = timed(lambda: zlib.compress(raw, 9))
    _, back, _ = timed(lambda: zlib.decompress(coded))
    found["zlib-9"] = {"bytes": len(coded), "symbols_a_second": [len(raw) / there, len(raw) / back]}
    try:
        import zstandard
    except ImportError:
        return found
    small, there, _ = timed(lambda: zstandard.ZstdCompressor(level=19).compress(raw))
    _, back, _ = timed(lambda: zstandard.ZstdDecompressor().decompress(small))
    found["zstd-19"] = {"bytes": len(small), "symbols_a_second": [len(raw) / there, len(raw) / back]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("finetuned", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--other", action="append", default=[], help="a size known otherwise, NAME=BYTES")
    parser.add_argument("--only", action="append", default=[], help="these ways only")
    parser.add_argument("--coder", default="model.embed_tokens.weight", help="the matrix for the coder alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    size = (given.finetuned / "model.safetensors").stat().st_size

    def add(way: str, found: dict[str, Any]) -> None:
        line = {"task": given.name, "way": way, "of": size, **found, "machine": machine}
        lines[:] = [other for other in lines if (other["task"], other["way"]) != (given.name, way)] + [line]
        RESULTS.write_text(json.dumps(lines, indent=1) + "\n")
        print(json.dumps(line), flush=True)

    ways: dict[str, Callable[[Path], dict[str, Any]]] = {
        "exact": lambda work: exact(given.base, given.finetuned, work),
        "exact, no forecast": lambda work: exact(given.base, given.finetuned, work, bands="none"),
        "coder": lambda work: coder(given.base, given.finetuned, given.coder),
        "zipnn-xor": lambda work: zipnn_xor(given.base, given.finetuned, work),
        "arc_v2": lambda work: arc(given.base, given.finetuned, work, "arc_v2"),
        "zstd-19-xor": lambda work: zstd_xor(given.base, given.finetuned, work),
        "arc_v3": lambda work: arc(given.base, given.finetuned, work, "arc_v3"),
    }
    for way, run in ways.items():
        if given.only and way not in given.only:
            continue
        with tempfile.TemporaryDirectory() as work:
            try:
                add(way, run(Path(work)))
            except ImportError as error:
                print(f"{way}: left out, {error}")
    for pair in given.other:
        way, _, size_of = pair.rpartition("=")
        add(way, {"bytes": int(size_of)})


if __name__ == "__main__":
    main()
