"""A base in 4 bits under deltas at 1/16: those made against the 16-bit base, and those made against the 4-bit one.

    python bench/quantised_base.py BASE --tuned sql=SQL --delta sql=sql.bayou --data sql=test.jsonl --work W -o x.json

The base's linears (not embedding and head) are rounded to nearest in groups of 64 with zero points, as what a 4-bit
product multiplies by. KL is KL(fine-tune || candidate) in nats an answer token (bayou.evaluate). Candidates:

    16-bit base, its delta              what `bayou load` gives
    4-bit base, the 16-bit base's delta     nothing is made anew for the smaller base
    4-bit base, a delta of its own      compressed against the rounded base, so it may mend some of the rounding
    fine-tune in 4 bits                 rounded in the same way, for comparison: one such model a tenant
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import bayou
from bayou.attach import attach
from bayou.benchmarks import record
from bayou.evaluate import evaluate, read_model
from bayou.packed import Spec
from bayou.quantize import nearest


def rounded(folder: Path, out: Path, spec: str) -> Path:
    """A copy of a model in one safetensors file whose decoder linears are rounded to `spec`, in the same dtype."""
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, out)
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if ".layers." in name and value.ndim == 2:
            tensors[name] = nearest(value.float(), Spec.parse(spec)).unpack().to(value.dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def pairs(words: list[str]) -> dict[str, Path]:
    return {name: Path(path) for name, _, path in (word.partition("=") for word in words)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--tuned", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--delta", action="append", required=True, metavar="NAME=FILE", help="against the 16-bit base")
    parser.add_argument("--data", action="append", required=True, metavar="NAME=JSONL", help="rows to score")
    parser.add_argument("--calibration", action="append", default=[], metavar="NAME=FILE", help="of the new deltas")
    parser.add_argument("--spec", default="4g64z")
    parser.add_argument("--ratio", type=float, default=16.0)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, required=True, help="a folder for models and deltas, kept between runs")
    parser.add_argument("-o", "--out", type=Path)
    given = parser.parse_args()
    small = given.work / f"base-{given.spec}"
    if not small.exists():
        rounded(given.base, small, given.spec)
    found: dict[str, Any] = {"spec": given.spec, "ratio": given.ratio, "machine": record.surroundings(given.device)}
    texts, deltas, data = pairs(given.calibration), pairs(given.delta), pairs(given.data)
    for name, tuned in pairs(given.tuned).items():
        own, few = given.work / f"{name}-{given.spec}.bayou", given.work / f"{name}-{given.spec}"
        started = time.perf_counter()
        if not own.exists():
            bayou.compress(
                small, tuned, own, ratio=given.ratio, calibration=texts.get(name), device=given.device, seed=0
            )
        found[name] = {"compressed_s": time.perf_counter() - started, "bytes": own.stat().st_size}
        if not few.exists():
            rounded(tuned, few, given.spec)
        reference, tokenizer = read_model(tuned, given.device), AutoTokenizer.from_pretrained(tuned)
        for label, folder, delta in (
            ("16-bit base, its delta", given.base, deltas[name]),
            ("4-bit base, the 16-bit base's delta", small, deltas[name]),
            ("4-bit base, a delta of its own", small, own),
            ("fine-tune in 4 bits", few, None),
        ):
            model = read_model(folder, given.device)
            if delta is not None:
                attach(model, delta)
            with torch.no_grad():
                scores = evaluate(reference, model, tokenizer, data[name], rows=given.rows)
            found[name][label] = {key: scores[key] for key in ("kl", "kl_se", "acc", "acc_reference", "nll", "rows")}
            print(name, label, found[name][label], flush=True)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
