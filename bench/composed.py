"""The two papers composed: a fine-tune of a shared model, compressed against it, restored and loaded.

    python bench/composed.py --base BASE --testbed PATH/testbed.py --plan main12-deltallm.shared --device cuda \\
        --work WORK --out bench/results/composed.json

1. the shared model as a file (`bayou share`'s), and restored as an ordinary checkpoint: the fine-tune's base
2. every parameter of it trained on the test bed's training rows of intent, the loss on answers alone
3. the fine-tune compressed against that checkpoint with deltacome, verified, restored, and loaded over the base
4. all scored on the test rows; the loaded model's logits are compared with those of the model restored in fp32
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from quality import load_testbed, machine, training_rows
from sharing_runs import load_shared
from torch import Tensor
from transformers import PreTrainedModel

import bayou
from bayou.calibrate import read_tokenizer
from bayou.evaluate import read_model
from bayou.sharing.baselines.baseline import load, save_plain
from bayou.sharing.sharedfile import write

TASK = "intent"


def rows_as_ids(testbed: Any, tokenizer: Any, rows: list[Any]) -> list[tuple[list[int], int]]:
    """(ids of prompt and answer, where the answer begins) of each row."""
    found = []
    for question, answer in rows:
        prompt = tokenizer(testbed.prompt(TASK, question), add_special_tokens=False).input_ids
        found.append((prompt + tokenizer(answer + "<|im_end|>", add_special_tokens=False).input_ids, len(prompt)))
    return found


def batch_of(rows: list[tuple[list[int], int]], device: str) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels (-100 outside the answers), both (rows, longest)."""
    longest = max(len(ids) for ids, _ in rows)
    ids, labels = torch.zeros(len(rows), longest, dtype=torch.long), torch.full((len(rows), longest), -100)
    for i, (row, start) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, start : len(row)] = torch.tensor(row[start:])
    return ids.to(device), labels.to(device)


def finetune(model: PreTrainedModel, rows: list[tuple[list[int], int]], steps: int, rate: float) -> list[float]:
    """Train all parameters, 32 rows a step, AdamW with a linear fall; the losses."""
    device, order = str(model.device), random.Random(0)
    model.requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        ids, labels = batch_of(order.sample(rows, 32), device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.startswith("cuda")):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    model.requires_grad_(False)
    return losses


def main() -> None:
    """Do all of it and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--base", "--testbed", "--plan", "--work", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--ratio", type=float, default=16)
    a = parser.parse_args()
    a.work.mkdir(parents=True, exist_ok=True)
    testbed, tokenizer = load_testbed(a.testbed), read_tokenizer(a.base)
    shared = write(a.base, load_shared(a.plan), a.work / "small.bayou")
    small = bayou.restore(None, a.work / "small.bayou", a.work / "small")
    print(f"{shared.bytes:,} bytes, {shared.parameters:,} parameters", flush=True)

    rows = training_rows(testbed, TASK, False)
    model = load(small, device=a.device)
    started = time.perf_counter()
    losses = finetune(model, rows_as_ids(testbed, tokenizer, rows), a.steps, a.rate)
    print(f"fine-tuned in {time.perf_counter() - started:.0f} s to {statistics.fmean(losses[-20:]):.4f}", flush=True)
    tuned = save_plain(model.cpu().bfloat16(), a.work / "tuned", small)

    lines = [{"prompt": testbed.prompt(TASK, q), "answer": r + "<|im_end|>"} for q, r in rows]
    (a.work / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"prompt": testbed.prompt(TASK, q), "answer": r + "<|im_end|>"} for q, r in testbed.rows(TASK, "test")]
    (a.work / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = a.work / "tuned.bayou"
    report = bayou.compress(
        small, tuned, file, method="deltacome", ratio=a.ratio, calibration=a.work / "train.jsonl", device=a.device
    )
    bayou.verify(file, small)
    restored = bayou.restore(small, file, a.work / "restored")
    reference, candidate = read_model(tuned, a.device), read_model(restored, a.device)
    scores = bayou.evaluate(reference, candidate, tokenizer, a.work / "test.jsonl", rows=1500, seed=3, device=a.device)
    loaded = bayou.load(small, file, device=a.device, dtype=torch.float32)
    # Rounded to bf16, the restored weights are others than those of a base with deltas beside it.
    exact = read_model(bayou.restore(small, file, a.work / "restored32", dtype="float32"), a.device)
    ids, _ = batch_of(rows_as_ids(testbed, tokenizer, testbed.rows(TASK, "test")[:16]), a.device)
    with torch.no_grad():
        wanted = exact(input_ids=ids).logits
        apart = (loaded(input_ids=ids).logits - wanted).abs().max() / wanted.abs().max()
    found = {
        "shared": {"bytes": shared.bytes, "parameters": shared.parameters, "original": shared.original},
        "finetune": {"steps": a.steps, "rate": a.rate, "loss": statistics.fmean(losses[-20:])},
        "delta": {"bytes": report.bytes, "ratio": report.ratio, "seconds": report.seconds, "errors": report.errors},
        "scores": scores,
        "largest_difference_of_logits_over_the_largest": float(apart),
        "machine": machine(a.device),
    }
    print(json.dumps(found), flush=True)
    a.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
