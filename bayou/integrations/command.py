"""`bayou export` and `bayou eval`, as the command line has them."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bayou.bars import Bars
from bayou.errors import BadInput


def export(
    base: Annotated[str, typer.Argument(help="The base: a model folder or a Hub id.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .bayou file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder (peft) or file (gguf-lora) to write.")],
    to: Annotated[str, typer.Option(help="peft (vLLM, SGLang, LoRAX, ...) or gguf-lora (llama.cpp).")] = "peft",
    rank: Annotated[
        int | None, typer.Option(help="Cut every matrix to this rank; the file's own ranks unless given.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the factors: float16, bfloat16 or float32.")] = "float16",
    embeddings: Annotated[
        str, typer.Option(help="Embedding and head: leave them out, or as lora, or (peft) full.")
    ] = "leave",
    exact: Annotated[bool, typer.Option("--exact", help="peft: norms and biases too; servers refuse them.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Measure the KL lost on a text file, or .jsonl with prompt and answer.")
    ] = None,
    rows: Annotated[int | None, typer.Option(help="--data: so many rows or windows, drawn by the seed.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="--data: which rows.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on a line of its own.")] = False,
) -> None:
    """Write a fine-tune as a LoRA adapter for other programs, and say what that loses."""
    from bayou.integrations.export import export as run
    from bayou.integrations.export import table

    with Bars(Console(stderr=True)) as bars:
        found = run(
            base,
            file,
            out,
            to=to,
            rank=rank,
            dtype=dtype,
            embeddings=embeddings,
            exact=exact,
            data=data,
            rows=rows,
            device=device,
            seed=seed,
            progress=bars.show,
        )
    Console().print(table(found))
    if as_json:
        print(json.dumps(found))


def evaluate(
    base: Annotated[str, typer.Argument(help="The base: a model folder or a Hub id.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .bayou file, or a restored or sliced folder.")],
    finetuned: Annotated[
        str | None, typer.Argument(help="The fine-tune that it stands for; --tasks can do without.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="A text file, or .jsonl with prompt and answer.")] = None,
    rows: Annotated[int | None, typer.Option(help="--data: so many rows or windows, drawn by the seed.")] = None,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, e.g. arc_easy,winogrande.")] = "",
    include_path: Annotated[Path | None, typer.Option(help="--tasks: a folder with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="--tasks: the first so many documents of each.")] = None,
    shots: Annotated[int | None, typer.Option(help="--tasks: examples before each document.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="--tasks: put prompts through the chat template.")] = False,
    batch: Annotated[int, typer.Option(help="--tasks: rows at a time.")] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="--data: which rows.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on a line of its own.")] = False,
) -> None:
    """How true is a compressed model to its fine-tune: KL, NLL, flips, accuracy or perplexity; or scores on tasks."""
    from bayou.calibrate import read_tokenizer
    from bayou.checkpoint import resolve
    from bayou.evaluate import evaluate as run
    from bayou.evaluate import read_model, table
    from bayou.integrations import tasks as harness
    from bayou.load import load
    from bayou.sharing.baselines.slicegpt import is_sliced

    names = [word.strip() for word in tasks.split(",") if word.strip()]
    if data is None and not names:
        raise BadInput("nothing to score on: give --data FILE, or --tasks NAMES, or both")
    if data is not None and finetuned is None:
        raise BadInput("--data compares with the fine-tune: give it after the file")
    if not names and (include_path, limit, shots, chat, batch) != (None, None, None, False, 16):
        raise BadInput("--include-path, --limit, --shots, --chat and --batch say how to run --tasks; give some")
    found: dict[str, Any] = {}
    if data is not None and finetuned is not None:
        folder = resolve(finetuned)
        tokenizer = read_tokenizer(folder)
        reference = read_model(folder, device)
        alone = file.is_dir() and not is_sliced(file)
        candidate = read_model(file, device) if alone else load(base, file, device=device)
        found = run(reference, candidate, tokenizer, data, rows=rows, device=device, seed=seed)
        Console().print(table(found))
        del reference, candidate
    if names:
        scores = harness.evaluate_tasks(
            base,
            file,
            names,
            finetuned=finetuned,
            include_path=include_path,
            limit=limit,
            shots=shots,
            batch=batch,
            chat=chat,
            device=device,
        )
        Console().print(harness.table(scores))
        found |= scores
    if as_json:
        print(json.dumps(found))
