"""Layer sharing, its rivals and its controls, trained and scored: the figures of README's section on sharing.

    python bench/sharing.py tokenise --base BASE --testbed PATH/testbed.py --out tokens.npy
    python bench/sharing.py run --base BASE --testbed PATH/testbed.py --tokens tokens.npy --set tune12 main12 \\
        --device cuda --out bench/results --work WORK --seconds 500
    python bench/sharing.py table --out bench/results --set main12   (bench/sharing_all.sh does all of them)
    python bench/sharing.py plot --out bench/results --set pmr
    python bench/sharing.py paired --out bench/results --set main12 --pair deltallm shortgpt

Sets are in bench/sharing_runs.py. Students of a set are trained several at a time on one forward of the teacher
(--together). Training text is the test bed's corpus_train alone, of which 64 windows, evenly spread, are held out:
rates are chosen on them. Scores are those of the test bed's `general`, on corpus_heldout and the benchmarks. Each run
appends one JSON line to OUT/sharing-SET.jsonl as it is scored; its values one by one go to
OUT/sharing-SET-single.jsonl, trained factors to WORK. A process ends by itself after --seconds (exit code 3: start it
again and it goes on); nothing that is done is done again.
"""

import argparse
import hashlib
import importlib.util
import json
import platform
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import general
import numpy as np
import sharing_runs
import torch
import transformers
from sharing_runs import Maker, Run, Subject
from sharing_tables import lines, paired, plot, table

import bayou
from bayou import objective
from bayou.calibrate import read_tokenizer
from bayou.errors import Diverged
from bayou.sharing.baselines.baseline import load
from bayou.sharing.train import Fitted, Progress, Recipe, fit, packed

HELD_OUT = 64
"""Windows, evenly spread over the text, that are not trained on: the rates are chosen by their loss."""
AGAIN = 3
"""Exit code of a process that ran out of its seconds."""


def load_testbed(path: Path) -> ModuleType:
    """The test bed's script as a module."""
    spec = importlib.util.spec_from_file_location("testbed", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["testbed"] = module
    spec.loader.exec_module(module)
    return module


def tokenise(arguments: argparse.Namespace) -> None:
    """corpus_train as one stream of token ids (uint16), documents in the file's order joined by the eos token."""
    tokenizer = read_tokenizer(arguments.base)
    if len(tokenizer) > 65_536:
        raise SystemExit(f"{len(tokenizer)} tokens do not fit uint16")
    documents = load_testbed(arguments.testbed).documents("corpus_train")
    pieces: list[np.ndarray] = []
    total = 0
    for start in range(0, len(documents), 1000):
        found = tokenizer(documents[start : start + 1000], add_special_tokens=False, verbose=False).input_ids
        pieces.append(np.concatenate([np.array([*ids, tokenizer.eos_token_id], dtype=np.uint16) for ids in found]))
        total += len(pieces[-1])
        print(f"{start + len(found):,} of {len(documents):,} documents, {total:,} tokens", flush=True)
        if arguments.tokens and total >= arguments.tokens:
            break
    np.save(arguments.out, np.concatenate(pieces)[: arguments.tokens or None])


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a JSON line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


class Bench:
    """Everything that is loaded once a process."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.started = arguments, time.monotonic()
        Path(arguments.work).mkdir(parents=True, exist_ok=True)
        self.trained: list[tuple[int, float]] = []  # (student tokens, seconds) of this process's trainings
        self.device = torch.device(arguments.device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        stream = torch.from_numpy(np.load(arguments.tokens).astype(np.int32))
        windows = packed(stream, arguments.length)
        held = min(HELD_OUT, len(windows) // 4)
        kept_out = torch.arange(held) * len(windows) // held
        kept = torch.ones(len(windows), dtype=torch.bool)
        kept[kept_out] = False
        self.windows, self.held = windows[kept].contiguous(), windows[kept_out].long()
        self.teacher = load(arguments.base, device=arguments.device, dtype=dtype)
        few = min(len(self.windows), max(1, arguments.calibration // arguments.length))
        calibration = self.windows[torch.arange(few) * len(self.windows) // few].long()
        self.maker = Maker(arguments.base, self.teacher, calibration, Path(arguments.work))
        tokenizer = read_tokenizer(arguments.base)
        self.questions = general.prepare(load_testbed(arguments.testbed), tokenizer, arguments.rows)
        self.machine = {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else platform.processor() or "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "bayou": bayou.__version__,
            "compiled": arguments.compile,
        }
        self.say(f"{len(self.windows):,} windows of {arguments.length} to train on, {held} held out")

    def left(self) -> float:
        """Seconds of this process that are left."""
        return self.arguments.seconds - (time.monotonic() - self.started)

    def say(self, text: str) -> None:
        """A line with the seconds since the start."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)

    def results(self, which: str) -> Path:
        """Where a set's results lie."""
        return Path(self.arguments.out) / f"sharing-{which}.jsonl"

    def best(self, rival: str, size: str) -> float:
        """The rate whose held-out loss was least in tuning; the middle one, said aloud, where nothing was tuned."""
        found = [r for r in lines(self.results(f"tune{size}")) if r["config"]["rival"] == rival and not r["failed"]]
        if found:
            return float(min(found, key=lambda r: r["held_out"]["loss"])["config"]["rate"])
        options = sharing_runs.RIVALS.get(rival, {})
        rate = sharing_runs.rates(options.get("method", "deltallm"), options.get("whole", False))[1]
        self.say(f"{rival} was not tuned (set tune{size}): rate {rate:g}")
        return rate

    def perform(self, which: str) -> None:
        """Train and score what is left of a set."""
        a = self.arguments
        plans = dict(plan.split("=", 1) for plan in a.plan)
        tokens = self.affordable(which) if a.spend and which.startswith("main") else a.train_tokens
        sizes = {"tokens": tokens, "tune_tokens": a.tune_tokens}
        wanted = sharing_runs.runs(which, **sizes, best=self.best, plans=plans)
        wanted = [sharing_runs.scaled(run, a.scale) for run in wanted if a.only in run["name"]]
        groups = [[run] for run in wanted if not run["tokens"]]
        trained = [run for run in wanted if run["tokens"]]
        trained.sort(key=lambda run: run["method"] == "search")  # last: another process may be searching meanwhile
        groups += [trained[i : i + a.together] for i in range(0, len(trained), a.together)]
        for group in groups:
            done = {r["name"] for r in lines(self.results(which))}
            if not self.checkpoint(which, group).exists():  # else all are trained, and some scored already
                group = [run for run in group if run["name"] not in done]
            if not all(run["name"] in done for run in group):
                self.group(which, group, done)

    def checkpoint(self, which: str, group: list[Run]) -> Path:
        """Where the training of a group lies."""
        key = hashlib.sha256(json.dumps([which, group]).encode()).hexdigest()[:16]
        return Path(self.arguments.work) / f"{which}-{key}.checkpoint"

    def affordable(self, which: str) -> int:
        """The tokens a run with which a set takes --spend seconds, at the throughput that this process has seen."""
        if not self.trained:
            raise SystemExit("--spend goes by the throughput of a set tuned before, in the same process")
        tokens, seconds = (sum(numbers) for numbers in zip(*self.trained, strict=True))
        runs = len(sharing_runs.runs(which, tokens=1, tune_tokens=1, best=lambda *_: 0.0))
        whole = self.arguments.batch * self.arguments.length
        fit = min(self.arguments.train_tokens, self.arguments.spend * tokens / seconds / runs)
        found = max(1, int(fit) // whole) * whole
        self.say(f"{tokens / seconds:,.0f} student tokens/s so far: {found:,} tokens a run of {which}")
        return found

    def group(self, which: str, group: list[Run], done: set[str]) -> None:
        """Train the runs of a group together, then score those that are not done."""
        self.need(20)
        subjects = []
        for run in group:
            subjects.append(self.maker.subject(run))
            made = subjects[-1]
            self.say(
                f"{run['name']}: {made.parameters:,} parameters, {1 - made.parameters / self.maker.total:.2%} fewer"
            )
        fitted = self.train(which, group, subjects)
        for i, subject in enumerate(subjects):
            if subject.run["name"] not in done:
                self.need(self.arguments.score_seconds)
                self.finish(which, subject, fitted, i)
            subjects[i] = None  # type: ignore[call-overload]
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def train(self, which: str, group: list[Run], subjects: list[Subject]) -> Fitted | None:
        """Train a group; exits the process where its seconds are over before the end."""
        pupils = [subject.pupil for subject in subjects if subject.pupil is not None]
        if not pupils:
            return None
        a = self.arguments
        recipe = Recipe(alpha=a.alpha, batch=a.batch, micro=a.micro, chunk=a.chunk, every=a.every, compile=a.compile)
        last, before = time.monotonic(), -1

        def progress(now: Progress) -> None:
            nonlocal last, before
            if before < 0:  # tokens of earlier processes
                before = now.tokens - a.batch * a.length
            if time.monotonic() - last > a.report or now.step == now.steps:
                last = time.monotonic()
                seen = now.tokens - before
                losses = "  ".join(
                    f"{o.name} failed" if o.failed else f"{o.name} {o.curve[-1][0]:.3f} ({o.curve[-1][3]:.0%})"
                    for o in now.outcomes
                )
                rate = seen * len(pupils) / max(now.seconds, 1e-9)
                self.say(f"step {now.step}/{now.steps}, {rate:,.0f} student tokens/s, loss (replaced): {losses}")

        try:
            fitted = fit(
                pupils,
                self.teacher,
                self.windows,
                recipe,
                tokens=group[0]["tokens"],
                checkpoint=self.checkpoint(which, group),
                stop_after=self.left() - 15,
                progress=progress,
            )
        except Diverged as error:
            self.say(f"every student of the group failed: {error}")
            for subject in subjects:
                append(self.results(which), {"name": subject.run["name"], "config": subject.run, "failed": str(error)})
            raise SystemExit(AGAIN) from None
        self.trained.append((fitted.tokens * len(pupils), fitted.seconds))
        if not fitted.finished:
            self.say(f"stopped at step {fitted.steps}; start again to go on")
            raise SystemExit(AGAIN)
        return fitted

    def finish(self, which: str, subject: Subject, fitted: Fitted | None, i: int) -> None:
        """Score a student as it would be in a file, and write its line."""
        a, run = self.arguments, subject.run
        result: dict[str, Any] = {
            "name": run["name"],
            "set": which,
            "config": run,
            "original": self.maker.total,
            "parameters": subject.parameters,
            "reduction": 1 - subject.parameters / self.maker.total,
            "bytes_at_16_bits": 2 * subject.parameters,
            "description": subject.description,
            "failed": None,
            "machine": self.machine,
        }
        if fitted is not None:
            outcome = fitted.outcomes[i]
            every = max(1, len(outcome.curve) // 200)
            result |= {
                "tokens": fitted.tokens,
                "group_seconds": fitted.seconds,
                "together": len(fitted.outcomes),
                "final_rate": outcome.rate,
                "returns": outcome.returns,
                "failed": outcome.failed,
                "curve": [
                    [j * a.batch * a.length, *np.mean(outcome.curve[j : j + every], axis=0).round(4).tolist()]
                    for j in range(0, len(outcome.curve), every)
                ],
            }
        if not result["failed"]:
            model, shared = subject.finish()
            if shared is not None and shared.ties and run["tokens"]:
                name = "".join(c if c.isalnum() else "-" for c in f"{which}-{run['name']}")
                sharing_runs.save_shared(Path(a.work) / f"{name}.shared", shared)
            with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
                ce, kl = objective.measure(model, self.held, self.teacher, batch=a.micro or 8, chunk=a.chunk)
            result["held_out"] = {"ce": ce, "kl": kl, "loss": (1 - a.alpha) * ce + a.alpha * kl}
            self.say(f"{run['name']}: held out CE {ce:.4f}, KL {kl:.4f}")
            if not which.startswith("tune"):
                scores, single = general.score(model, self.questions, budget=a.budget)
                result["scores"] = scores
                append(Path(a.out) / f"sharing-{which}-single.jsonl", {"name": run["name"], **single})
                self.say("  ".join(f"{k} {v:.4f}" for k, v in scores.items() if k != "rows"))
        append(self.results(which), result)

    def need(self, seconds: float) -> None:
        """End the process where fewer seconds are left than the next thing takes."""
        if self.left() < seconds:
            self.say("out of time; start again to go on")
            raise SystemExit(AGAIN)


def run(arguments: argparse.Namespace) -> None:
    """Train and score sets."""
    if arguments.device.startswith("cuda"):
        torch.set_float32_matmul_precision("highest")
    torch._dynamo.config.recompile_limit = 256  # type: ignore[attr-defined]  # a graph a rank and switch
    bench = Bench(arguments)
    for which in arguments.set:
        bench.perform(which)
    bench.say("all done")


def plan(arguments: argparse.Namespace) -> None:
    """Search the plans of the sets, and nothing else: where `run` looks for them."""
    bench = Bench(arguments)
    for which in arguments.set:
        for run in sharing_runs.runs(which, tokens=0, tune_tokens=0, best=lambda *_: 0.0):
            if run["method"] == "search":
                subject = bench.maker.subject(run)
                bench.say(f"{run['name']}: {subject.parameters:,} parameters, {subject.description}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    first = verbs.add_parser("tokenise")
    first.add_argument("--tokens", type=int, help="stop after so many")
    second, third = verbs.add_parser("run"), verbs.add_parser("plan")
    for verb in (first, second, third):
        verb.add_argument("--base", type=Path, required=True)
        verb.add_argument("--testbed", type=Path, required=True)
        verb.add_argument("--out", type=Path, required=True)
    for verb in (second, third):
        add = verb.add_argument
        add("--tokens", type=Path, required=True, help="what tokenise wrote")
        add("--set", nargs="+", required=True)
        add("--plan", nargs="*", default=[], help="NAME=FILE of a Shared, for the sets tuneplans and plans")
        add("--only", default="", help="runs whose name contains this")
        add("--work", type=Path, required=True, help="checkpoints and trained factors")
        add("--device", default="cpu")
        add("--seconds", type=float, default=520, help="after which to end, to be started again")
        add("--score-seconds", type=float, default=60, help="kept free for scoring a student")
        add("--together", type=int, default=4, help="students on one teacher's forward")
        add("--train-tokens", type=int, default=15_000_000)
        add("--tune-tokens", type=int, default=3_000_000)
        add("--spend", type=float, help="seconds for a main set; fewer tokens than --train-tokens if need be")
        add("--scale", type=float, default=1.0, help="multiplies all tokens")
        add("--length", type=int, default=512)
        add("--batch", type=int, default=64, help="windows a step")
        add("--micro", type=int, help="windows a forward")
        add("--chunk", type=int, default=8192, help="positions whose logits are held at once")
        add("--budget", type=int, default=32_768, help="tokens a forward in scoring")
        add("--alpha", type=float, default=0.5)
        add("--every", type=int, default=50, help="steps between checkpoints")
        add("--calibration", type=int, default=131_072, help="tokens for grams and the rivals' measurements")
        add("--rows", type=int, default=3000)
        add("--report", type=float, default=10, help="seconds between lines")
        add("--compile", action="store_true")
    for name in ("table", "paired", "plot"):
        verb = verbs.add_parser(name)
        verb.add_argument("--out", type=Path, required=True)
        verb.add_argument("--set", nargs="+", required=True)
        if name == "paired":
            verb.add_argument("--pair", nargs=2, required=True)
    arguments = parser.parse_args()
    {"tokenise": tokenise, "run": run, "plan": plan, "table": table, "paired": paired, "plot": plot}[arguments.verb](
        arguments
    )


if __name__ == "__main__":
    main()
