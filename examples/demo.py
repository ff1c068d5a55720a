"""Bayou from end to end, on a bare machine: CPU only, no downloads, about five minutes (`make demo`).

Trains a small base and two full fine-tunes of it (tiny_models.py), stores each fine-tune as a file of 1/15 of its size
by three methods, restores it, measures what was lost, and shows that a damaged file or a wrong base is refused. The
exit code is 1 where anything is not as it should be. The last line is one JSON object with all numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import tiny_models
import torch
import transformers
from rich.console import Console
from rich.table import Table
from tiny_models import Row
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import bayou

METHODS = ("bitdelta", "lowrank", "deltacome")  # bitdelta first: its size is the others' budget
LEARNED = 0.9  # accuracy that a fine-tune must have
UNTAUGHT = 0.02  # accuracy that the base may have
LOST = 0.02  # accuracy that deltacome may lose against its fine-tune
WINDOW = 64  # tokens of a calibration window, as long as the texts that the models know
# For the processes that this one starts: no network, and threads that sleep while they wait for each other, which on
# a machine with other work to do is up to three times as fast as spinning.
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}

console = Console(highlight=False)


class Unexpected(Exception):
    """Something in the demo did not go as it must."""


@dataclass(frozen=True)
class Result:
    """One line of the table. bytes: of the weights or the .bayou file; kl: nats an answer token; seconds: to make."""

    task: str
    model: str
    bytes: int
    ratio: float
    kl: float
    accuracy: float
    seconds: float | None


@dataclass(frozen=True)
class Ran:
    """How a command ended: exit code, its JSON object (empty where it printed none), and what it told people."""

    code: int
    found: dict[str, Any]
    errors: str


def run_bayou(*words: object) -> Ran:
    """Run `bayou WORDS --json` in a process of its own."""
    command = [sys.executable, "-m", "bayou", *map(str, words), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    lines = ended.stdout.splitlines()
    found = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return Ran(ended.returncode, found, ended.stderr.strip())


def must_run(*words: object) -> dict[str, Any]:
    """The JSON object of a command that has to succeed."""
    ran = run_bayou(*words)
    if ran.code:
        raise Unexpected(f"`bayou {' '.join(map(str, words))}` ended with exit code {ran.code}:\n{ran.errors[-2000:]}")
    return ran.found


def heading(text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


# ------------------------------------------------------------------------------------------------ 1. the models


def prepare(folder: Path, seed: int, fresh: bool) -> dict[str, float]:
    """Train the three models, or take those of an earlier run by the same recipe. Returns seconds by model."""
    record = folder / "made.json"
    made = json.loads(record.read_text()) if record.exists() else {}
    if made.get("recipe") == tiny_models.recipe_of(seed) and not fresh:
        console.print(f"Taken from {folder}, where an earlier run left them; --fresh trains them anew.")
        return made["seconds"]
    rmtree(folder, ignore_errors=True)
    command = [sys.executable, tiny_models.__file__, str(folder), "--seed", str(seed)]
    if subprocess.run(command, env=ENVIRONMENT).returncode:
        raise Unexpected("training the models failed; the reason is above")
    return json.loads(record.read_text())["seconds"]


# ------------------------------------------------------------------------------------------------ 2. compressing


class Judge:
    """Scores models on one task's held-out rows against the fine-tune for it."""

    def __init__(self, models: Path, task: str) -> None:
        self.task = task
        self.rows = tiny_models.read_rows(models / f"{task}-test.jsonl")
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(models / task)
        self.truth, (_, self.labels) = tiny_models.answer_logits(open_model(models / task), self.tokenizer, self.rows)

    def score(self, model: torch.nn.Module) -> tuple[float, float]:
        """(accuracy, KL from the fine-tune)."""
        logits, _ = tiny_models.answer_logits(model, self.tokenizer, self.rows)
        return tiny_models.score(logits, self.labels, self.truth)

    def say(self, model: LlamaForCausalLM, row: Row) -> str:
        """What a model answers to a row's prompt, greedily."""
        prompt = self.tokenizer(row.prompt, return_tensors="pt")
        said = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt.input_ids.shape[1] :]
        return self.tokenizer.decode(said, skip_special_tokens=True)


def open_model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def least_size(words: list[object]) -> int:
    """The smallest file in bytes that a method can make, from its answer to a ratio out of reach."""
    refused = run_bayou("compress", *words, "--ratio", 1000)
    if refused.code == 0 or "least" not in refused.found:
        raise Unexpected(f"a file of 1/1000 should be refused with the least possible size:\n{refused.errors[-2000:]}")
    return refused.found["least"]


def compress(models: Path, files: Path, task: str, method: str, budget: int | None) -> tuple[Path, dict[str, Any]]:
    """Write one .bayou file, of the method's smallest size where no budget is given; returns it and the report."""
    out = files / f"{task}-{method}.bayou"
    words: list[object] = [models / "base", models / task, "-o", out, "--method", method]
    words += ["--calibration", models / f"{task}-train.jsonl", "--length", WINDOW]
    limit = least_size(words) if budget is None else budget
    report = must_run("compress", *words, "--budget", limit)
    size = out.stat().st_size
    if size != report["bytes"]:
        raise Unexpected(f"{out} has {size:,} bytes, and the report says {report['bytes']:,}")
    if size > limit:
        raise Unexpected(f"{out} has {size:,} bytes, over its budget of {limit:,}")
    return out, report


def judge_file(models: Path, file: Path, report: dict[str, Any], judge: Judge) -> Result:
    """Verify and restore a file, attach it to the base as well, and score both: they must be the same model."""
    base, restored = models / "base", file.with_suffix("")
    must_run("verify", file, "--base", base)
    must_run("restore", base, file, "-o", restored)
    accuracy, kl = judge.score(open_model(restored))
    attached, _ = judge.score(bayou.load(base, file))
    if abs(attached - accuracy) > 0.01:  # the attached one is not rounded to bf16
        raise Unexpected(f"{file}: accuracy {accuracy:.3f} restored, but {attached:.3f} attached to the base")
    return Result(judge.task, report["method"], report["bytes"], report["ratio"], kl, accuracy, report["seconds"])


def compare(models: Path, files: Path, judge: Judge, seconds: dict[str, float]) -> list[Result]:
    """The fine-tune, the base and every method on one task."""
    task = judge.task
    size = weights_bytes(models / task)
    taught, _ = judge.score(open_model(models / task))
    untaught, distance = judge.score(open_model(models / "base"))
    if taught < LEARNED or untaught > UNTAUGHT:
        raise Unexpected(
            f"{task}: the fine-tune is right on {taught:.1%} of the held-out rows, the base on {untaught:.1%}; at "
            f"least {LEARNED:.0%} and at most {UNTAUGHT:.0%} are needed to show anything: try another --seed"
        )
    results = [
        Result(task, "fine-tune", size, 1.0, 0.0, taught, seconds[task]),
        Result(task, "base", 0, 0.0, distance, untaught, None),
    ]
    budget = None
    for method in METHODS:
        file, report = compress(models, files, task, method, budget)
        result = judge_file(models, file, report, judge)
        budget = budget or result.bytes
        results.append(result)
        console.print(f"  {file.name:22} {result.bytes:,} bytes; verified, restored, attached, scored")
    lost = taught - results[-1].accuracy
    if lost > LOST:
        raise Unexpected(
            f"{task}: deltacome is right on {lost:.1%} fewer rows than the fine-tune; at most {LOST:.0%} is expected"
        )
    return results


def show(results: list[Result]) -> None:
    table = Table(title="Held-out rows: what is left of each fine-tune")
    for name in ("task", "model"):
        table.add_column(name)
    for name in ("bytes", "ratio", "KL, nats", "accuracy", "seconds"):
        table.add_column(name, justify="right")
    for i, result in enumerate(results):
        last = i + 1 == len(results) or results[i + 1].task != result.task
        table.add_row(
            result.task,
            result.model,
            f"{result.bytes:,}" if result.bytes else "-",
            f"1/{result.ratio:.2f}" if result.bytes else "-",
            f"{result.kl:.4f}",
            f"{result.accuracy:.1%}",
            "-" if result.seconds is None else f"{result.seconds:.1f}",
            end_section=last,
        )
    console.print(table)


# ------------------------------------------------------------------------------------------------ 3. refusals


def must_refuse(why: str, error: str, *words: object) -> str:
    """The message with which a command refuses; `error` names the class that its JSON must give."""
    ran = run_bayou(*words)
    if ran.code == 0:
        raise Unexpected(f"{why} was accepted by `bayou {words[0]}`")
    if ran.found.get("error") != error:
        raise Unexpected(f"{why}: `bayou {words[0]}` failed, but with no clear {error}:\n{ran.errors[-2000:]}")
    console.print(f"  bayou {words[0]}: exit code {ran.code}, {ran.found['message']}", soft_wrap=True, markup=False)
    return ran.found["message"]


def tamper(models: Path, files: Path, task: str) -> dict[str, str]:
    """Flip one bit in a copy of a file and try a wrong base; returns the messages of the refusals."""
    sound = files / f"{task}-deltacome.bayou"
    damaged = files / f"{task}-damaged.bayou"
    content = bytearray(sound.read_bytes())
    place = len(content) // 2
    content[place] ^= 1
    damaged.write_bytes(content)
    messages = {}
    console.print(f"One bit flipped, in byte {place:,} of {len(content):,} ({damaged}):", soft_wrap=True)
    messages["verify"] = must_refuse("a flipped bit", "DamagedFile", "verify", damaged)
    try:
        bayou.load(models / "base", damaged)
    except bayou.BayouError as error:
        messages["load"] = str(error)
        console.print(f"  bayou.load: {type(error).__name__}, {error}", soft_wrap=True, markup=False)
    else:
        raise Unexpected("a flipped bit was accepted by bayou.load")
    other = next(name for name in tiny_models.TASKS if name != task)
    console.print(f"\nThe {other} fine-tune given for the base:")
    messages["wrong base"] = must_refuse("a wrong base", "WrongBase", "verify", sound, "--base", models / other)
    folder = files / "never-written"
    must_refuse("a wrong base", "WrongBase", "restore", models / other, sound, "-o", folder)
    if folder.exists():
        raise Unexpected(f"a wrong base was refused, but {folder} was written")
    return messages


# ------------------------------------------------------------------------------------------------ the demo


def demo(work: Path, seed: int, fresh: bool) -> dict[str, Any]:
    """All of it; returns the numbers. Raises Unexpected."""
    started = time.perf_counter()
    models, files = work / "models", work / "files"
    heading("1. A base model and two full fine-tunes of it")
    console.print(
        "The base reads generated English, the alphabet and lists. sql turns questions into SQL, sort puts letters in "
        "order; both have every parameter trained, as real fine-tunes have. About two minutes on two cores."
    )
    seconds = prepare(models, seed, fresh)

    heading("2. Each fine-tune as a small difference from the base")
    size = weights_bytes(models / "sql")
    console.print(
        f"A fine-tune is {size:,} bytes of bf16 weights. Three methods store what it differs by: the signs of the "
        "difference (bitdelta), its largest singular vectors in 16 bits (lowrank), and singular vectors in 8, 3 and 2 "
        "bits, more for the larger ones (deltacome). bitdelta is given its smallest size, the others the same bytes. "
        "All bytes count: embeddings, norms, scales, header."
    )
    rmtree(files, ignore_errors=True)
    files.mkdir(parents=True)
    results, judges = [], {task: Judge(models, task) for task in tiny_models.TASKS}
    for judge in judges.values():
        results += compare(models, files, judge, seconds)
    console.print()
    show(results)
    console.print(
        f"{tiny_models.HELD_OUT_ROWS} rows a task that no model has seen. accuracy: every token of the answer right, "
        "to the end. KL: how far the model's predictions are from the fine-tune's, an answer token; 0 is the same. "
        "seconds: to train the fine-tune, to make the file."
    )
    judge = judges["sql"]
    row = judge.rows[0]
    console.print(f"\nFor example: {row.prompt}")
    served = bayou.load(models / "base", files / "sql-deltacome.bayou")
    answers = {
        "base": judge.say(open_model(models / "base"), row),
        "fine-tune": judge.say(open_model(models / "sql"), row),
        "deltacome": judge.say(served, row),
    }
    for name, said in answers.items():
        console.print(f"  {name:10} {said}", soft_wrap=True, markup=False)

    heading("3. Why singular vectors deserve different bits")
    spectrum = work / "spectrum.png"
    must_run("inspect", files / "sql-deltacome.bayou", "--plot", spectrum)
    console.print(
        "The first directions of a difference weigh several times more than the last ones kept, so they are worth more "
        f"bits. The singular values with their bits are drawn in {spectrum}"
    )

    heading("4. The right file over the right base, or nothing")
    messages = tamper(models, files, "sql")

    total = time.perf_counter() - started
    heading(f"All as it should be, in {total:.0f} s")
    console.print(f"Models: {models}   files and restored models: {files}", soft_wrap=True)
    return {
        "results": [asdict(result) for result in results],
        "training_seconds": seconds,
        "answers": answers,
        "refusals": messages,
        "spectrum": str(spectrum),
        "seconds": total,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("demo-out"), help="where all is written (default: demo-out)")
    parser.add_argument("--fresh", action="store_true", help="train the models anew")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        numbers = demo(given.work, given.seed, given.fresh)
    except (Unexpected, bayou.BayouError) as error:
        console.print(f"\n[bold red]The demo failed.[/bold red] {type(error).__name__}:", end=" ")
        console.print(str(error), soft_wrap=True, markup=False)
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        return 1
    print(json.dumps(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
