"""Whole files by `bayou compress`, a variant each, scored by KL on doubtful training rows: what auto's parts are worth.

    python bench/auto_files.py --testbed PATH/testbed.py --models TB --task intent --calibration TRAIN.jsonl \
        --keep FOLDER --ratio 16 32 64 --only deltacome auto --out FILE.jsonl [--device cuda]

Rows, words left out and the score as auto_bed.py has them; never a test row. The calibration must be of other training
rows than the odd ones that are scored (quality.training_rows). A line has the bytes of the file as it lies on disk.
"""

import argparse
import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from auto_bed import Bed
from quality import load_testbed, machine
from torch import Tensor

import bayou
from bayou import calibrate, encoder
from bayou.deltafile import DeltaFile

VARIANTS: dict[str, dict[str, Any]] = {
    "deltacome": {"method": "deltacome"},
    "deltacome as published": {"method": "deltacome", "options": {"refit": "none"}},
    "entropy": {"activations": "finetuned"},
    "corrected, not coded": {"method": "deltacome", "activations": "corrected"},
    "auto": {},
    "auto, both begin with the fine-tune's embedding": {"begin": False},
    **{f"auto, ridge {ridge}": {"ridge": ridge} for ridge in (0.1, 0.3, 1.0, 10.0, 30.0)},
    **{f"auto, embedding rate {rate}": {"embedding_rate": rate} for rate in (0.15, 0.25, 0.35, 0.75, 1.0)},
    **{
        f"auto, embedding in {bits} bits": {"embedding_options": {"method": "lowrank", "bits": bits}} for bits in (3, 8)
    },
    **{
        f"auto, bands {bands}": {"options": {"bands": bands}}
        for bands in (
            "8x2,3x32,2",
            "8x2,4x16,2",
            "4x8,2",
            "4x2,2",
            "2x32,1",
            "8x2,4",
            "4x16,1",
            "8x2,3x32,2x48,1",
            "8x4,4x16,3x48,2",
            "3",
            "2",
        )
    },
    **{
        f"auto, ridge 10, bands {bands}": {"ridge": 10.0, "options": {"bands": bands}}
        for bands in ("8x2,3x8,2", "8x2,2", "8x1,3x4,2", "3x8,2", "8x2,3x32,2x48,1")
    },
    **{f"auto, group {group}": {"options": {"group": group}} for group in (64, 256, 512)},
    **{f"auto, damping {damping}": {"options": {"damping": damping}} for damping in (0.001, 0.1)},
    **{f"auto, {tokens} tokens": {"tokens": tokens} for tokens in (4096, 8192, 16384, 65536, 262144)},
}

RIDGE, walk = encoder.RIDGE, calibrate.walk


class Rows(Bed):
    """The rows alone, of one task."""

    def _moments(self, ids: Any, testbed: Any, text: str, tokens: int) -> tuple[dict[str, Tensor], Tensor]:
        return {}, torch.zeros(1)

    @torch.no_grad()
    def kl_of(self, path: Path) -> float:
        """KL(fine-tune || base + the file's deltas), nats an answer token; all else is the fine-tune's own."""
        file, state = DeltaFile(path), dict(self.model.named_parameters())
        for name in file.sites:
            reference = self.base.get(name, self.base_table)
            restored = file.delta(name).restore(reference.cpu(), torch.bfloat16)
            state[name].copy_(restored)
        return self.scored(self.model.get_input_embeddings().weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--testbed", "--models", "--calibration", "--keep", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration")
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--ratio", type=float, nargs="+", default=[16.0, 32.0, 64.0])
    parser.add_argument("--only", nargs="*", default=["deltacome", "entropy", "auto"], help="variants; all = all")
    a = parser.parse_args()
    drop = {"intent": 0.25, "sql": 0.08}[a.task]
    rows = Rows(load_testbed(a.testbed), a.models, a.task, a.device, "rows", 0, a.rows, drop, a.keep)
    path = a.keep / f"{a.task}-{os.getpid()}.bayou"
    for name in list(VARIANTS) if a.only == ["all"] else a.only:
        chosen = {"method": "auto", "tokens": a.tokens} | VARIANTS[name]
        encoder.RIDGE = chosen.pop("ridge", RIDGE)
        same = {} if chosen.pop("begin", True) else {"begin": nullcontext}
        calibrate.walk = lambda *given, **how: walk(*given, **how | same)  # noqa: B023
        for ratio in a.ratio:
            started = time.perf_counter()
            told = bayou.compress(
                a.models / "base", a.models / a.task, path,
                ratio=ratio, calibration=a.calibration, device=a.device, **chosen,
            )  # fmt: skip
            seconds = time.perf_counter() - started
            line = {"name": name, "task": a.task, "ratio": ratio, "bytes": told.bytes, "true_ratio": told.ratio}
            line |= {"rows": a.rows, "tokens": chosen["tokens"], "kl": rows.kl_of(path), "seconds": round(seconds, 1)}
            line |= {"steps": {k: round(v, 1) for k, v in told.steps.items()}, "errors": told.errors}
            line["machine"] = machine(a.device)
            with open(a.out, "a") as file:
                file.write(json.dumps(line) + "\n")
            path.unlink()
            print(f"{name:32s} {a.task} 1/{told.ratio:.2f} KL {line['kl']:.6f} {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
