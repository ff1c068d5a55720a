"""`bayou compare`, as the command line has it."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bayou import methods
from bayou.bars import Bars
from bayou.errors import BadInput


def compare(
    base: Annotated[str, typer.Argument(help="The base: a model folder or a Hub id.")],
    finetuned: Annotated[str, typer.Argument(help="The fine-tune: a model folder or a Hub id.")],
    data: Annotated[Path, typer.Option(help="Held-out text: a text file, or .jsonl with prompt and answer.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to fill, or to go on with.")],
    names: Annotated[
        str | None, typer.Option("--methods", help=f"Some of {','.join(methods.names())}; all unless given.")
    ] = None,
    ratios: Annotated[str, typer.Option(help="Sizes, as of compress --ratio.")] = "16,32,64",
    calibration: Annotated[str | None, typer.Option(help="A text or .jsonl file; none = no calibration.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens; 32768 on the CPU, 262144 on a GPU.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a calibration window.")] = 512,
    rows: Annotated[int | None, typer.Option(help="--data: so many rows or windows, drawn by the seed.")] = None,
    distill_steps: Annotated[int | None, typer.Option(help="Steps of distilling, for every method; 0 is none.")] = None,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw KL against bytes (matplotlib).")] = True,
    bound: Annotated[bool, typer.Option("--bound/--no-bound", help="Find the spectra and the bound.")] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the calibration's order, and of which rows.")] = 0,
    base_revision: Annotated[str | None, typer.Option(help="The base's revision on the Hub.")] = None,
    revision: Annotated[str | None, typer.Option(help="The fine-tune's revision on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on a line of its own.")] = False,
) -> None:
    """Compress by several methods to several sizes and compare the files on held-out text."""
    from bayou.comparison.columns import WIDTH, table
    from bayou.comparison.rows import compare as run

    chosen = None if names is None else [word.strip() for word in names.split(",") if word.strip()]
    with Bars(Console(stderr=True)) as bars:
        found = run(
            base,
            finetuned,
            out,
            data=data,
            names=chosen,
            ratios=_numbers(ratios),
            calibration=calibration,
            tokens=tokens,
            length=length,
            rows=rows,
            distill_steps=distill_steps,
            seed=seed,
            device=device,
            plot=plot,
            bound=bound,
            base_revision=base_revision,
            revision=revision,
            progress=bars.show,
        )
    Console(width=max(Console().width, WIDTH)).print(table(found))  # a narrow screen folds lines, no figure is cut
    print(
        f"{out}: the files, compare.json, report.html{' and plot.svg' if plot and (out / 'plot.svg').exists() else ''}"
    )
    if as_json:
        print(json.dumps(found))


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise BadInput(f"--ratios {text}: write numbers, e.g. 16,32,64") from None
