"""`bayou export`, as the command line has it."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bayou.bars import Bars


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
