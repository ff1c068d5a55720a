"""What distilling is worth: the same file distilled in several ways, each scored on the test bed's test rows.

    python bench/distilling.py --testbed PATH/testbed.py --models TB --task intent --ratio 64 --minutes 1 \\
        --rates 0.3 1 3 10 --text task own --device cuda

A file is made once (deltacome, strength 2, calibrated on training rows), then trained from its start for each rate
(a multiple of distillation.training.RATES) and text. Scored with `bayou.evaluate` on the rows that the test bed's own
score takes. One JSON line a run is appended to OUT/distilling.jsonl, the first of a file being that without distilling.
"""

import argparse
import json
import random
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from quality import TASK_TEXT, calibration_file, load_testbed, machine

import bayou
from bayou import calibrate, skeleton
from bayou.checkpoint import Checkpoint
from bayou.deltafile import DeltaFile
from bayou.distillation import samples
from bayou.distillation.asked import amounts
from bayou.distillation.student import Student
from bayou.distillation.training import Recipe, train
from bayou.evaluate import evaluate, read_model


def test_rows(testbed: Any, task: str, folder: Path) -> Path:
    """The rows that the test bed's score takes of 1,500, as a file for `bayou.evaluate`."""
    rows = testbed.rows(task, "test")
    rows = random.Random(3).sample(rows, min(1500, len(rows)))
    lines = [json.dumps({"prompt": testbed.prompt(task, q), "answer": a + "<|im_end|>"}) for q, a in rows]
    (folder / "test.jsonl").write_text("\n".join(lines))
    return folder / "test.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", required=True, type=Path)
    parser.add_argument("--models", required=True, type=Path)
    parser.add_argument("--task", default="intent")
    parser.add_argument("--ratio", type=float, default=64)
    parser.add_argument("--file", type=Path, help="distil this file instead of making one")
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--steps", type=int, help="so many, not minutes")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0])
    parser.add_argument("--batch", type=int, nargs="+", default=[0], help="windows a step; 0 is the device's own")
    parser.add_argument("--text", nargs="+", default=["task"], help="task, wikitext, own")
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="float32 (TF32 on a GPU), bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    a = parser.parse_args()
    testbed, device, size = load_testbed(a.testbed), torch.device(a.device), amounts(a.device)
    base, tuned = a.models / "base", Checkpoint(a.models / a.task)
    tokenizer = calibrate.read_tokenizer(tuned.folder)
    a.out.mkdir(parents=True, exist_ok=True)

    def tell(name: str, model: Any, **more: Any) -> None:
        score = evaluate(reference, model, tokenizer, rows, batch=50)
        found = {"name": name, "task": a.task, "ratio": a.ratio, **more, "score": score, "machine": machine(a.device)}
        with open(a.out / "distilling.jsonl", "a") as out:
            out.write(json.dumps(found) + "\n")
        trained = more.get("outcome", {})
        told = {k: trained[k] for k in ("before", "after", "steps", "best", "seconds") if k in trained}
        print(f"{a.task} 1/{a.ratio:g} {name}: KL {score['kl']:.5f} acc {score['acc']:.4f} {told}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        folder, path = Path(scratch), a.file or Path(scratch) / "x.bayou"
        rows, started = test_rows(testbed, a.task, folder), time.perf_counter()
        given = {
            "options": TASK_TEXT,
            "tokens": 65_536,
            "calibration": calibration_file(testbed, a.task, "task", folder),
        }
        if a.file is None:
            bayou.compress(base, tuned, path, ratio=a.ratio, device=a.device, **given)
        seconds = time.perf_counter() - started
        file, reference = DeltaFile(path), read_model(tuned.folder, device)
        texts, first = {}, True
        for text, dtype in ((text, dtype) for text in a.text for dtype in a.dtype):
            teacher = reference
            if dtype != "float32":
                teacher = skeleton.build(tuned.folder)
                places = skeleton.places(teacher, tuned.names())
                skeleton.fill(teacher, "", places, tuned.read, dtype=getattr(torch, dtype), device=device)
            places = skeleton.places(teacher, file.tensors())
            if text not in texts:
                began = time.perf_counter()
                if text == "own":
                    texts[text] = samples.windows(reference, size.own, size.length, batch=size.together, seed=0)
                else:
                    source = Path(str(calibration_file(testbed, a.task, text, folder)))
                    texts[text] = calibrate.read_tokens(source, tokenizer, tokens=size.given, length=size.length)
                print(f"{text}: {texts[text].shape} in {time.perf_counter() - began:.1f} s", flush=True)
            for rate, batch in ((rate, batch) for rate in a.rates for batch in a.batch):
                student = Student(base, file, places, dtype=getattr(torch, dtype), device=device)
                if first:
                    tell("not distilled", student.model, bytes=file.nbytes, seconds=seconds)
                    first = False
                recipe = Recipe(rate=rate, batch=batch or size.batch, held_most=size.held)
                until = None if a.steps else time.monotonic() + 60 * a.minutes
                outcome = train(student, teacher, texts[text], recipe, steps=a.steps, until=until)
                long = f"{a.steps} steps" if a.steps else f"{a.minutes:g} min"
                name = f"{text}, {dtype}, rate {rate:g}, {recipe.batch} windows, {long}"
                tell(name, student.model, bytes=file.nbytes, outcome=asdict(outcome))
                if device.type == "cuda":
                    print(f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)


if __name__ == "__main__":
    main()
