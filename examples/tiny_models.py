"""A base language model and two full fine-tunes of it, made on the spot in about two minutes of CPU.

The base (Llama-shaped, 2.3 million parameters) reads generated English-like text: statements about things,
their colours, prices and cities, the order of the alphabet, spelled words, repeated lists. It never sees either task.
Each fine-tune trains every parameter further on one task:

- ``sql``: a question about a table, answered by the SQL: "what is the highest price of cars sold in rome ?"
- ``sort``: letters, put in the order of the alphabet: "put in order : t c a m ="

A row is held out or trained on by a hash of its prompt, so no held-out row is ever trained on. Checkpoints are bf16
folders written by `save_pretrained`: any tool that reads Hugging Face models can be pointed at them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz"
THINGS = ["cars", "books", "houses", "phones", "lamps", "chairs"]
COLOURS = ["red", "blue", "green", "black", "white"]
CITIES = ["paris", "london", "rome", "oslo"]
COLUMNS = ["price", "year", "weight"]
NUMBERS = [str(n) for n in range(10, 100, 10)]
PLAIN = """the in and of is are with all show name how many over under what highest lowest sold they word letters after
    from count colour city repeat then put order where select sort max min"""
ENGLISH = PLAIN.split()
SIGNS = [*":?.,()*=<>"]
END = "<end>"

HELD_OUT_ROWS = 400
TRAINING_ROWS_KEPT = 2000  # written beside the fine-tunes, to calibrate with
WINDOW = 64  # tokens a pretraining sequence
IGNORED = -100  # the label that cross entropy skips


@dataclass(frozen=True)
class Row:
    """One example of a task: the model reads `prompt` and must say `answer`, whose last token is END."""

    prompt: str
    answer: str


Batch = tuple[torch.Tensor, torch.Tensor]  # tokens and labels, both (rows, length)
Progress = Callable[[str, int, int, float], None]  # model, step, of how many, loss in nats a token


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a model is trained: AdamW steps, sequences a step, peak learning rate."""

    steps: int
    batch: int
    rate: float


PRETRAINING = Recipe(steps=240, batch=32, rate=3e-3)
FINE_TUNING = {"sql": Recipe(steps=160, batch=48, rate=6e-4), "sort": Recipe(steps=230, batch=96, rate=6e-4)}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of about a hundred tokens: words, single letters, numbers and signs."""
    words = [END, "<unknown>", *LETTERS, *NUMBERS, *THINGS, *COLOURS, *CITIES, *COLUMNS, *ENGLISH, *SIGNS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=END, pad_token=END, unk_token="<unknown>", model_max_length=128
    )


def paragraph(rng: random.Random) -> str:
    """One piece of the base's reading. Nothing has the form of a task's answer."""
    thing, colour, city, column = rng.choice(THINGS), rng.choice(COLOURS), rng.choice(CITIES), rng.choice(COLUMNS)
    number, much = rng.choice(NUMBERS), rng.choice(("over", "under"))
    kind = rng.random()
    if kind < 0.45:  # a statement, and what follows from it
        told = f"all {thing} in {colour} sold in {city} with {column} {much} {number}"
        follows = [
            f"the colour is {colour}",
            f"the city is {city}",
            f"the {column} is {much} {number}",
            f"they are {thing}",
        ]
        rng.shuffle(follows)
        return f"{told} : {' , '.join(follows)} ."
    if kind < 0.6:  # a list, and the same again
        items = rng.choices(
            (*LETTERS, *NUMBERS, *THINGS, *COLOURS, *CITIES, *COLUMNS, *ENGLISH, *SIGNS), k=rng.randrange(3, 8)
        )
        return f"repeat : {' '.join(items)} : {' '.join(items)} ."
    if kind < 0.7:  # a question
        most = rng.choice(("highest", "lowest"))
        return rng.choice(
            (
                f"how many {thing} are sold in {city} ? {number} .",
                f"what is the {most} {column} of {thing} ? {number} .",
            )
        )
    if kind < 0.8:  # the order of the letters
        start = rng.randrange(20)
        return f"letters after {LETTERS[start]} : {' '.join(LETTERS[start + 1 : start + rng.randrange(4, 10)])} ."
    if kind < 0.9:  # which letter comes first
        first, second = sorted(rng.sample(LETTERS, 2))
        return rng.choice((f"{first} < {second} .", f"{second} > {first} .", f"{first} then {second} ."))
    word = rng.choice((*THINGS, *COLOURS, *CITIES))  # spelling
    return f"the word {word} is {' '.join(word)} ."


def sql_row(rng: random.Random) -> Row:
    """A question about one table and the SQL that answers it."""
    thing, column = rng.choice(THINGS), rng.choice(("name", *COLUMNS))
    conditions = []  # (English, SQL)
    if rng.random() < 0.6:
        colour = rng.choice(COLOURS)
        conditions.append((f"in {colour}", f"colour = {colour}"))
    if rng.random() < 0.6:
        city = rng.choice(CITIES)
        conditions.append((f"sold in {city}", f"city = {city}"))
    if rng.random() < 0.6 or not conditions:
        limit, number, (word, sign) = (
            rng.choice(COLUMNS),
            rng.choice(NUMBERS),
            rng.choice((("over", ">"), ("under", "<"))),
        )
        conditions.append((f"with {limit} {word} {number}", f"{limit} {sign} {number}"))
    question, selection = rng.choice(
        (
            (f"show the {column} of all {thing}", column),
            (f"how many {thing} are", "count ( * )"),
            (f"what is the highest {column} of {thing}", f"max ( {column} )"),
            (f"what is the lowest {column} of {thing}", f"min ( {column} )"),
        )
    )
    asked = " ".join(english for english, _ in conditions)
    where = " and ".join(sql for _, sql in conditions)
    return Row(f"{question} {asked} ?", f" select {selection} from {thing} where {where} {END}")


def sort_row(rng: random.Random) -> Row:
    """Four to six different letters, and the same letters in the order of the alphabet."""
    letters = rng.sample(LETTERS, rng.randrange(4, 7))
    return Row(f"put in order : {' '.join(letters)} =", f" {' '.join(sorted(letters))} {END}")


TASKS: dict[str, Callable[[random.Random], Row]] = {"sql": sql_row, "sort": sort_row}


def rows(task: str, *, held_out: bool, seed: int = 0) -> Iterator[Row]:
    """Endless rows of `task`; one prompt in eight is held out, by its hash, whatever the seed."""
    rng = random.Random(f"{task} {seed}")
    while True:
        row = TASKS[task](rng)
        if (zlib.crc32(row.prompt.encode()) % 8 == 0) == held_out:
            yield row


def reading(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int) -> Iterator[Batch]:
    """Batches (tokens, labels), both (batch, WINDOW), of the base's reading; every token is learned."""
    rng = random.Random(f"reading {seed}")
    size = recipe.batch * WINDOW
    for _ in range(recipe.steps):
        tokens: list[int] = []
        while len(tokens) < size:
            tokens += tokenizer.encode(f"{paragraph(rng)} {END}")
        batch = torch.tensor(tokens[:size]).view(recipe.batch, WINDOW)
        yield batch, batch


def lessons(tokenizer: PreTrainedTokenizerFast, task: str, recipe: Recipe, seed: int) -> Iterator[Batch]:
    """Batches (tokens, labels), both (batch, longest), of training rows; only the answers are learned."""
    source = rows(task, held_out=False, seed=seed)
    for _ in range(recipe.steps):
        yield padded(tokenizer, [next(source) for _ in range(recipe.batch)])


def padded(tokenizer: PreTrainedTokenizerFast, batch: list[Row]) -> Batch:
    """Tokens and labels (rows, longest), padded on the right, where causal attention never looks back at it."""
    prompts = tokenizer([row.prompt for row in batch]).input_ids
    answers = tokenizer([row.answer for row in batch]).input_ids
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    tokens = torch.full((len(batch), width), tokenizer.eos_token_id)
    labels = torch.full((len(batch), width), IGNORED)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        stop = len(prompt) + len(answer)
        tokens[i, :stop] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : stop] = torch.tensor(answer)
    return tokens, labels


def train(
    model: LlamaForCausalLM, batches: Iterator[Batch], recipe: Recipe, progress: Callable[[int, float], None]
) -> None:
    """Train every parameter in place with AdamW: warm-up over a tenth of the steps, then a cosine down to nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.98), fused=True)
    warm = recipe.steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / recipe.steps))),
    )
    model.train()
    for step, (tokens, labels) in enumerate(batches, start=1):
        loss = next_token_loss(model, tokens, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step, loss.item())
    model.eval()


def next_token_loss(model: LlamaForCausalLM, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the next token, nats, over the tokens that have a label."""
    logits = model(input_ids=tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def untrained(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of 2.3 million parameters with random weights, in fp32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # short texts: near positions well apart
        initializer_range=0.0625,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def write_rows(path: Path, source: Iterator[Row], count: int) -> None:
    """Write `count` different rows as JSONL with "prompt" and "answer"."""
    distinct: dict[str, Row] = {}
    while len(distinct) < count:
        row = next(source)
        distinct[row.prompt] = row
    path.write_text("".join(json.dumps(asdict(row)) + "\n" for row in distinct.values()))


def recipe_of(seed: int) -> str:
    """What the models are made by: a hash of this file and the seed."""
    return hashlib.sha256(Path(__file__).read_bytes() + str(seed).encode()).hexdigest()


def make(folder: Path, *, seed: int = 0, progress: Progress) -> None:
    """Train the base and its two fine-tunes into `folder`.

    Writes base/, sql/ and sort/ (checkpoints), TASK-train.jsonl and TASK-test.jsonl (rows never trained on) for each
    task, and at last made.json: {"recipe": recipe_of(seed), "seconds": {model: seconds of training}}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    seconds = {}

    def trained(name: str, model: LlamaForCausalLM, batches: Iterator[Batch], recipe: Recipe) -> None:
        started = time.perf_counter()
        train(model, batches, recipe, lambda step, loss: progress(name, step, recipe.steps, loss))
        seconds[name] = time.perf_counter() - started
        model.to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    trained("base", untrained(tokenizer, seed), reading(tokenizer, PRETRAINING, seed), PRETRAINING)
    for task, recipe in FINE_TUNING.items():
        model = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        trained(task, model, lessons(tokenizer, task, recipe, seed), recipe)
        write_rows(folder / f"{task}-train.jsonl", rows(task, held_out=False, seed=seed), TRAINING_ROWS_KEPT)
        write_rows(folder / f"{task}-test.jsonl", rows(task, held_out=True, seed=seed), HELD_OUT_ROWS)
    (folder / "made.json").write_text(json.dumps({"recipe": recipe_of(seed), "seconds": seconds}))


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file that `make` wrote."""
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()]


@torch.no_grad()
def answer_logits(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, test: list[Row]
) -> tuple[torch.Tensor, Batch]:
    """Logits (rows, length - 1, vocabulary) that predict the next token, and the batch of tokens and labels."""
    tokens, labels = padded(tokenizer, test)
    return model(input_ids=tokens).logits[:, :-1].float(), (tokens, labels)


def score(logits: torch.Tensor, labels: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """(accuracy, KL) of a model's answers against its fine-tune's.

    Accuracy is the share of rows whose every answer token, END included, is the most likely one given the tokens before
    it: exactly the rows that greedy decoding gets right. KL is KL(fine-tune || model), mean nats an answer token.
    `logits` and `truth` are (rows, length - 1, vocabulary) of the model and of the fine-tune.
    """
    answered = labels[:, 1:] != IGNORED
    right = ((logits.argmax(-1) == labels[:, 1:]) | ~answered).all(1)
    ours, theirs = logits[answered].double().log_softmax(-1), truth[answered].double().log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    return right.double().mean().item(), divergence.mean().item()


def main() -> None:
    """`python tiny_models.py OUT`: the models alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder for the models and their rows")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(min(4, os.cpu_count() or 1))  # more only get in each other's way at this size
    console = Console(highlight=False)
    with console.status("") as status:

        def progress(name: str, step: int, steps: int, loss: float) -> None:
            status.update(f"{name}: step {step} of {steps}, loss {loss:.3f} nats a token")
            if step == steps:
                console.print(f"  {name:5} {steps} steps of AdamW, loss {loss:.3f} nats a token")

        make(given.out, seed=given.seed, progress=progress)


if __name__ == "__main__":
    main()
