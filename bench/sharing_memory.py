"""Memory and decode speed of a loaded shared model, beside the dense model that it was made of.

    python bench/sharing_memory.py --dense BASE --shared small.bayou --out bench/results/sharing-memory.json

Each of the two is loaded in a process of its own, several times in turn. Memory: bytes of its tensors, and what the
process's resident set (on a GPU: the allocator) grew by. Speed: greedy decoding of one row with a cache.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from quality import machine

import bayou
from bayou.sharing.baselines.baseline import load


def resident() -> int:
    """Bytes of this process in memory, without what was freed and not given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def one(source: Path, device: str, tokens: int) -> dict[str, Any]:
    """Load and decode once, in this process."""
    word = torch.bfloat16 if device.startswith("cuda") else torch.float32
    load_one(source, "cpu", word)  # what the first load of a process brings with it
    before = torch.cuda.memory_allocated() if device.startswith("cuda") else resident()
    model = load_one(source, device, word)
    grown = (torch.cuda.memory_allocated() if device.startswith("cuda") else resident()) - before
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    ids = torch.arange(5, 37, device=device)[None]
    model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    started = time.perf_counter()
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return {
        "tensors": sum(tensors.values()),
        "grown": grown,
        "tokens_per_second": tokens / (time.perf_counter() - started),
    }


def load_one(source: Path, device: str, dtype: torch.dtype) -> Any:
    """The dense model of a folder, or the shared one of a file."""
    if source.is_dir():
        return load(source, device=device, dtype=dtype)
    return bayou.load(None, source, device=device, dtype=dtype)


def main() -> None:
    """Run both in turn and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--one", type=Path, help="measure this in this process, and print it")
    a = parser.parse_args()
    if a.one:
        print(json.dumps(one(a.one, a.device, a.tokens)))
        return
    found: dict[str, list[dict[str, Any]]] = {"dense": [], "shared": []}
    for _ in range(a.times):
        for name, source in (("dense", a.dense), ("shared", a.shared)):
            command = [sys.executable, __file__, "--one", str(source), "--device", a.device, "--tokens", str(a.tokens)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, found[name][-1], flush=True)
    medians = {n: {k: statistics.median(r[k] for r in rs) for k in rs[0]} for n, rs in found.items()}
    ratios = {k: medians["shared"][k] / medians["dense"][k] for k in medians["dense"]}
    result = {"median": medians, "shared_over_dense": ratios, "all": found, "machine": machine(a.device)}
    print(json.dumps(ratios))
    a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
