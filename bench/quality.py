"""Compress, restore and score the test bed's fine-tunes: every quality figure in README and LOG.md comes from here.

    python bench/quality.py --testbed PATH/testbed.py --models TB --set sixteen --device cuda --workers 4

TB is what `testbed.py build TB` makes. Scores are the test bed's own (1,500 test rows of intent, all of sql); sets
whose name begins with "tune" are scored on training rows that calibration does not see. One JSON line a run is
appended to OUT/SET.jsonl, with device and versions; runs that are there already are not repeated.
"""

import argparse
import importlib.util
import inspect
import json
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from activation_error import activation_error
from safetensors.torch import load_file, save_file

import bayou
from bayou.decompose import Matrix, svd
from bayou.distillation import gains
from bayou.methods import Gram, Site, deltacome, lowrank
from bayou.restore import restore

TASKS = ("intent", "sql")
LINEAR_BYTES = 212_336_640  # the 210 matrices in bf16
EXACT_BYTES = 56_623_104 + 70_272 + 47_300  # embedding, norms, header and digests with the Plan
LINEARS_ONLY = {"keep": ("embeddings", "norms"), "budget": int(LINEAR_BYTES / 14.9) + EXACT_BYTES}

TASK_TEXT = {"strength": 2.0}  # for calibration on the task's own rows

Run = dict[str, Any]


def machine(device: str) -> dict[str, str]:
    """What a result was measured on."""
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bayou": bayou.__version__,
    }


def both(name: str, **options: Any) -> Iterator[Run]:
    """The same run for each task."""
    for task in TASKS:
        yield {"name": name, "task": task, **options}


def runs(which: str) -> list[Run]:
    """The runs of a set."""
    found: list[Run] = []
    if which == "tune-embedding":
        for ratio in (16, 32):
            for bits in (4,):
                for rate in (0.25, 0.4, 0.6, 0.85):
                    tables = {"method": "lowrank", "bits": bits}
                    options = {"ratio": ratio, "embedding_options": tables, "embedding_rate": rate}
                    found += both(f"deltacome 1/{ratio} embeddings {bits} bit rate {rate}", **options)
    if which == "tune-distil":
        for rate in (0.001, 0.003, 0.01, 0.03):
            found += both(f"bitdelta lr {rate}", method="bitdelta", ratio=16, learning_rate=rate)
        found += both("bitdelta undistilled", method="bitdelta", ratio=16, distill_steps=0)
    if which == "sixteen":
        found += both("lowrank", method="lowrank", ratio=16)
        found += both("bitdelta", method="bitdelta", ratio=16)
        found += both("bitdelta undistilled", method="bitdelta", ratio=16, distill_steps=0)
        # As published: distilled on general text (C4 there), not on the task's own.
        found += both("bitdelta, wikitext", method="bitdelta", ratio=16, text="wikitext")
        found += both("deltacome", ratio=16)
        found += both("deltacome, strength 2", ratio=16, options=TASK_TEXT)
        found += both(
            "deltacome, strength 2, distilled", ratio=16, options=TASK_TEXT, distill_steps=200, distill_what="gains"
        )
        found += both("deltacome as published", ratio=16, options={"refit": "none"})
        found += both("lora", lora=269_060_552 // 16)
    if which == "linears":
        published = {"refit": "none"}
        ways = {"published": published, "rows refit, strength 2": TASK_TEXT}
        for name, options in (ways | {"full refit, strength 2": TASK_TEXT | {"refit": "full"}}).items():
            for text in ("task", "wikitext", "python"):
                if text == "task" or "full" not in name:
                    found += both(f"{name}, finetuned activations, {text}", options=options, text=text, **LINEARS_ONLY)
            compressed = LINEARS_ONLY | {"activations": "compressed"}
            found += both(f"{name}, compressed activations, task", options=options, **compressed)
        permutation = 30 * (3 * 576 + 1536) * 2
        dynamic = LINEARS_ONLY | {"budget": LINEARS_ONLY["budget"] - permutation, "dynamic": True}
        found += both("published, dynamic groups, finetuned activations, task", options=published, **dynamic)
        found += both(
            "rows refit, strength 2, dynamic groups, finetuned activations, task", options=TASK_TEXT, **dynamic
        )
        found += both("rows refit, strength 1, finetuned activations, task", options={}, **LINEARS_ONLY)
    if which == "ladder":
        for bands in ("16", "8", "4", "3", "2", "8x2,4", "8x2,3", "8x2,2", "3x34,2", "8x2,3x32,2"):
            found += both(f"bands {bands}", ratio=16, options={"bands": bands, "refit": "none"})
    if which == "ratios":
        for ratio in (18, 20, 22, 26, 32):
            found += both(f"deltacome, strength 2, 1/{ratio}", ratio=ratio, options=TASK_TEXT)
    if not found:
        raise SystemExit(f"no set {which!r}")
    return found


def load_testbed(path: Path) -> ModuleType:
    """The test bed's script as a module."""
    spec = importlib.util.spec_from_file_location("testbed", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["testbed"] = module
    spec.loader.exec_module(module)
    return module


def training_rows(testbed: ModuleType, task: str, held: bool) -> list[list[str]]:
    """800 training rows for tuning, or all others for calibration."""
    rows = list(testbed.rows(task, "train"))
    random.Random(11).shuffle(rows)
    return rows[:800] if held else rows[800:]


def calibration_file(testbed: ModuleType, task: str, text: str, folder: Path) -> str | None:
    """Where the calibration text of a run lies; None is the default, English text that Python carries."""
    if text == "python":
        return None
    if text == "wikitext":
        (folder / "wikitext.txt").write_text(testbed.calibration_text())
        return str(folder / "wikitext.txt")
    lines = [
        {"prompt": testbed.prompt(task, q), "answer": a + "<|im_end|>"} for q, a in training_rows(testbed, task, False)
    ]
    (folder / "calibration.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "calibration.jsonl")


def extracted_lora(base: Path, tuned: Path, out: Path, nbytes: int, device: str) -> int:
    """The best fp16 LoRA of one rank over all linears in `nbytes`, merged; all else is the base's. Returns the rank."""
    old, new = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    linears = [name for name, w in new.items() if w.ndim == 2 and "embed" not in name]
    rank = nbytes // sum(2 * sum(new[name].shape) for name in linears)
    merged = dict(old)
    for name in linears:
        delta = (new[name].to(device).float() - old[name].to(device).float()).contiguous()
        u, s, v = svd(Matrix(tuple(delta.shape), lambda i, j, d=delta: d[i:j]), rank)
        adapter = (u * s.sqrt()).half().float() @ (v * s.sqrt()[:, None]).half().float()
        merged[name] = (old[name].to(device).float() + adapter).bfloat16().cpu()
    shutil.copytree(tuned, out, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(merged, out / "model.safetensors", metadata={"format": "pt"})
    return rank


class Reordered:
    """Groups formed after act-order's reordering of V's columns; the file then holds columns in that order."""

    def __init__(self, encode: Callable[..., Any]) -> None:
        self._encode = encode
        self.orders: dict[str, torch.Tensor] = {}
        self.__signature__: inspect.Signature

    def __call__(self, site: Site, **options: Any) -> Any:
        if site.gram is None:
            return self._encode(site, **options)
        order = site.gram.matrix.diagonal().argsort(descending=True, stable=True)
        whole = site.delta.whole()[:, order]
        gram = Gram(site.gram.matrix[order][:, order])
        self.orders[site.name] = order.cpu()
        matrix = Matrix(site.delta.shape, lambda i, j: whole[i:j])
        return self._encode(Site(site.name, matrix, site.role, gram), **options | {"act_order": False})

    def undo(self, base: Path, folder: Path) -> None:
        """Put the columns of the restored deltas back in their places."""
        old, made = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
        for name, order in self.orders.items():
            delta = made[name].float() - old[name].float()
            made[name] = old[name].float() + delta[:, order.argsort()]
        state = {name: w.bfloat16() for name, w in made.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def remembered(device: str) -> None:
    """Decompose each matrix once a process: a set compresses the same fine-tune again and again. (Not timed then.)"""
    if hasattr(deltacome.svd, "known"):
        return
    known: dict[bytes, Any] = {}

    def svd_once(matrix: Matrix, rank: int) -> Any:
        key = matrix.read(0, 1).cpu().numpy().tobytes()
        most = min(*matrix.shape, 256 if matrix.shape[0] > 8192 else 8192)
        if rank > most:
            return svd(matrix, rank)
        if key not in known:
            known[key] = svd(matrix, most)
        u, s, v = known[key]
        return u[:, :rank], s[:rank], v[:rank]

    svd_once.known = known  # type: ignore[attr-defined]
    deltacome.svd = lowrank.svd = svd_once  # type: ignore[assignment]


def perform(run: Run, testbed_path: str, models: str, device: str, tuning: bool) -> Run:
    """One run: compress, restore, score; its options, sizes, seconds and scores."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_default_device("cpu")
    testbed = load_testbed(Path(testbed_path))
    if device.startswith("cuda"):
        remembered(device)
    options = {key: value for key, value in run.items() if key not in ("name", "task")}
    base, tuned = Path(models) / "base", Path(models) / run["task"]
    result = dict(run)
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch), Path(scratch) / "out"
        started = time.perf_counter()
        if "lora" in options:  # linears alone, as LoRA has it
            result["rank"] = extracted_lora(base, tuned, out, options["lora"], device)
            result["bytes"] = options["lora"]
        else:
            gains.fit.__kwdefaults__["learning_rate"] = options.pop("learning_rate", gains.LEARNING_RATE)
            text = options.pop("text", "task")
            options.setdefault("tokens", 65_536)
            if "calibration" not in options:
                options["calibration"] = calibration_file(testbed, run["task"], text, folder)
            reordered = Reordered(deltacome.encode) if options.pop("dynamic", False) else None
            if reordered:
                reordered.__signature__ = inspect.signature(deltacome.encode)
            plain, many = deltacome.encode, deltacome.encode_many
            deltacome.encode = reordered or plain  # type: ignore[assignment]
            deltacome.encode_many = None if reordered else many  # type: ignore[assignment]  # or it would be passed by
            try:
                report = bayou.compress(base, tuned, folder / "x.bayou", device=device, **options)
            finally:
                deltacome.encode, deltacome.encode_many = plain, many
            found = bayou.inspect(folder / "x.bayou")
            result |= {"bytes": report.bytes, "ratio": report.ratio, "steps": report.steps, "errors": report.errors}
            result["kinds"] = {
                n: {k: kind[k] for k in ("bytes", "bits", "ranks")} for n, kind in found["kinds"].items()
            }
            result["bookkeeping"] = found["bookkeeping"]
            restore(base, folder / "x.bayou", out, dtype="float32" if reordered else None)
            if reordered:
                reordered.undo(base, out)
        result["seconds"] = time.perf_counter() - started
        torch.cuda.empty_cache()
        torch.set_default_device(device)
        if not tuning:
            texts = [
                testbed.prompt(run["task"], q) + a + "<|im_end|>" for q, a in training_rows(testbed, run["task"], True)
            ]
            texts = ["".join(texts[i : i + 10]) for i in range(0, 100, 10)]
            result["activations"] = activation_error(base, tuned, out, texts, device)
        if tuning:
            held = training_rows(testbed, run["task"], True)
            testbed.rows = lambda task, split: held
        result["score"] = testbed.score(str(tuned), str(out), run["task"], 1500)
        torch.set_default_device("cpu")
        torch.cuda.empty_cache()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", required=True)
    parser.add_argument("--models", required=True)
    parser.add_argument("--set", required=True, nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--only", default="", help="runs whose name contains this")
    arguments = parser.parse_args()
    torch.multiprocessing.set_start_method("spawn")
    with ProcessPoolExecutor(arguments.workers) as pool:
        futures = {}
        for which in arguments.set:
            path = arguments.out / f"{which}.jsonl"
            done = set()
            if path.exists():
                done = {(r["name"], r["task"]) for r in map(json.loads, path.read_text().splitlines())}
            for run in runs(which):
                if (run["name"], run["task"]) not in done and arguments.only in run["name"]:
                    job = (run, arguments.testbed, arguments.models, arguments.device, which.startswith("tune"))
                    futures[pool.submit(perform, *job)] = (path, run)
        for future in as_completed(futures):
            path, run = futures[future]
            try:
                result = future.result() | {"machine": machine(arguments.device)}
            except Exception as error:  # one failed run must not lose the others
                print(f"FAILED {run['name']} {run['task']}: {error!r}", flush=True)
                continue
            with open(path, "a") as file:
                file.write(json.dumps(result) + "\n")
            score = result["score"]
            print(
                f"{run['name']:50s} {run['task']:6s} {result['bytes']:>11,} B  KL {score['kl']:.5f}"
                f"  acc {score['acc']:.4f}  flip {score['flip']:.4f}  {result['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
