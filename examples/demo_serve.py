"""One server, three models: a base and two full fine-tunes of it as small files (`make demo-serve`); CPU, no downloads.

Makes the models as `make demo` does (or takes what that left), stores each fine-tune at 1/8 of its size, starts `bayou
serve`, and lets the `openai` client stream from all three at once. Every answer is compared with what the restored
model says by itself; then a damaged file, an unknown name and one outside the folder are asked for. The exit code is 1
where anything is not as it should be. The last line is one JSON object with all numbers.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import openai
import tiny_models
import transformers
from demo import ENVIRONMENT, Unexpected, console, heading, must_run, open_model, prepare, weights_bytes
from rich.live import Live
from rich.table import Table
from tiny_models import Row
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import bayou

MODELS = ("base", *tiny_models.TASKS)
TOKENS = 24
ROUNDS = 10


@dataclass
class Said:
    """What one model has answered so far. first: seconds to the first token."""

    model: str
    text: str = ""
    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0


class Server:
    """`bayou serve` in a process of its own, until the block ends."""

    def __init__(self, base: Path, folder: Path) -> None:
        words = [sys.executable, "-m", "bayou", "serve", base, "--delta-dir", folder, "--port", 0, "--unpack", "--json"]
        self.process = subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        self.url = ""

    def __enter__(self) -> Server:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            console.print(f"  {line.rstrip()}", markup=False)
            if found := re.search(r"on (http://\S+) after", line):
                self.url = found[1]
                return self
        raise Unexpected(f"`bayou serve` ended with exit code {self.process.wait()}")

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def drain(self) -> dict[str, int]:
        """End it as a service manager does; what it counted."""
        self.process.send_signal(signal.SIGTERM)
        out, _ = self.process.communicate(timeout=60)
        if self.process.returncode:
            raise Unexpected(f"`bayou serve` ended with exit code {self.process.returncode} after SIGTERM")
        return json.loads(out.splitlines()[-1])


def store(models: Path, folder: Path) -> dict[str, int]:
    """A file of each fine-tune; returns its bytes by name."""
    rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sizes = {}
    for task in tiny_models.TASKS:
        out = folder / f"{task}.bayou"
        words = [models / "base", models / task, "-o", out, "--ratio", 8]
        must_run("compress", *words, "--calibration", models / f"{task}-train.jsonl", "--length", 64)
        sizes[task] = out.stat().st_size
    return sizes


def alone(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """What a model in a process of its own answers, greedily."""
    ids = tokenizer(prompt, return_tensors="pt")
    said = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.input_ids.shape[1] :]
    return tokenizer.decode(said, skip_special_tokens=True)


def stream_all(client: openai.OpenAI, prompt: str, shown: bool) -> list[Said]:
    """Ask all models at once; on a terminal the answers grow side by side."""
    answers = [Said(name) for name in MODELS]
    failed: list[BaseException] = []

    def listen(said: Said) -> None:
        started = time.perf_counter()
        try:
            asked = client.completions.create(
                model=said.model, prompt=prompt, temperature=0, max_tokens=TOKENS, stream=True,
                stream_options={"include_usage": True},
            )  # fmt: skip
            for chunk in asked:
                said.first = said.first or time.perf_counter() - started
                said.text += chunk.choices[0].text if chunk.choices else ""
                said.tokens = chunk.usage.completion_tokens if chunk.usage else said.tokens
        except BaseException as error:
            failed.append(error)
        said.seconds = time.perf_counter() - started

    threads = [threading.Thread(target=listen, args=(said,)) for said in answers]
    for thread in threads:
        thread.start()
    if shown and console.is_terminal:
        with Live(beside(answers), console=console, refresh_per_second=20) as live:
            while any(thread.is_alive() for thread in threads):
                live.update(beside(answers))
                time.sleep(0.02)
            live.update(beside(answers))
    for thread in threads:
        thread.join()
    if shown and not console.is_terminal:
        console.print(beside(answers))
    if failed:
        raise Unexpected(f"a stream broke: {failed[0]!r}")
    return answers


def beside(answers: list[Said]) -> Table:
    """The answers in columns."""
    table = Table()
    for said in answers:
        table.add_column(said.model, ratio=1)
    table.add_row(*(said.text for said in answers))
    return table


def refusals(client: openai.OpenAI, folder: Path, sound: Path) -> dict[str, str]:
    """What is said to those who ask for what there is not."""
    content = bytearray(sound.read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "damaged.bayou").write_bytes(content)
    messages = {}
    for name, status in (("damaged", 422), ("../../etc/passwd", 400), ("nobody", 404)):
        try:
            client.completions.create(model=name, prompt="show", max_tokens=1)
        except openai.APIStatusError as error:
            if error.status_code != status:
                raise Unexpected(f"{name}: {error.status_code} came where {status} was expected: {error}") from None
            messages[name] = str(error.body["message"] if isinstance(error.body, dict) else error)
            console.print(f"  {name}: {error.status_code}, {messages[name]}", markup=False, soft_wrap=True)
        else:
            raise Unexpected(f"{name} was served")
    return messages


def demo(work: Path, seed: int, fresh: bool) -> dict[str, Any]:
    """All of it; returns the numbers. Raises Unexpected."""
    models, folder = work / "models", work / "served"
    heading("1. A base model and two full fine-tunes of it")
    prepare(models, seed, fresh)
    sizes = store(models, folder)
    whole = weights_bytes(models / "base")
    told = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    console.print(f"A model is {whole:,} bytes of weights. As files of differences: {told} bytes.")

    heading("2. One server for all three")
    prompts: dict[str, list[Row]] = {t: tiny_models.read_rows(models / f"{t}-test.jsonl") for t in tiny_models.TASKS}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models / "base")
    references = {"base": open_model(models / "base")}
    for task in tiny_models.TASKS:
        restored = bayou.restore(models / "base", folder / f"{task}.bayou", work / "restored" / task, dtype="float32")
        references[task] = open_model(restored)
    with Server(models / "base", folder) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        served = {model.id for model in client.models.list()}
        if served != set(MODELS):
            raise Unexpected(f"the server has {sorted(served)}, not {sorted(MODELS)}")
        equal = asked = 0
        speeds: list[Said] = []
        rows = [prompts[task][i] for i in range(ROUNDS) for task in tiny_models.TASKS]
        for i, row in enumerate(rows):
            if i < 2:
                console.print(f"\nAll three are asked at once: {row.prompt}", markup=False)
            answers = stream_all(client, row.prompt, shown=i < 2)
            for said in answers:
                wanted = alone(references[said.model], tokenizer, row.prompt)
                equal += said.text.strip() == wanted.strip()
                asked += 1
            speeds += answers
        console.print(f"\n{equal} of {asked} answers are, token for token, what each model says by itself.")
        if equal < asked - 1:  # one tie of two scores may fall otherwise
            raise Unexpected(f"{asked - equal} of {asked} answers are not what the restored models say")
        first = sorted(said.first for said in speeds)[len(speeds) // 2]
        rate = sum(said.tokens for said in speeds) / sum(said.seconds for said in speeds)
        console.print(f"Median time to the first token {1000 * first:.0f} ms; {rate:.0f} tokens a second and stream.")

        heading("3. What is refused, with the others going on")
        messages = refusals(client, folder, folder / "sql.bayou")
        again = stream_all(client, rows[0].prompt, shown=False)
        if [said.text for said in again] != [said.text for said in speeds[: len(MODELS)]]:
            raise Unexpected("an answer changed after a refusal")
        client.close()
        totals = server.drain()
    console.print(f"\nThe server ended after {totals['answers']} answers and {totals['tokens']:,} tokens.")
    numbers = {"bytes": sizes, "model_bytes": whole, "equal": equal, "asked": asked, "first_token_seconds": first}
    examples = [asdict(said) for said in speeds[: 2 * len(MODELS)]]
    return {**numbers, "tokens_a_second": rate, "examples": examples, "refusals": messages, "totals": totals}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("demo-out"), help="where all is written (default: demo-out)")
    parser.add_argument("--fresh", action="store_true", help="train the models anew")
    parser.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        rmtree(given.work / "restored", ignore_errors=True)
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
