"""`bayou bench ...`: how fast this machine does what README claims. One JSON a run, device and versions in it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Measure this machine: one JSON a run, device and versions in it.")

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write the figures to this file as JSON.")]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on a line of its own.")]


def _finish(text: str, found: dict[str, Any], out: Path | None, as_json: bool) -> None:
    from bayou.benchmarks import record

    record.write(out, found)
    print(text)
    if as_json:
        print(json.dumps(found))


@app.command(epilog="Example: bayou bench compress --layers 2 --json")
def compress(
    shape: Annotated[str, typer.Option(help="llama-2-7b or tiny.")] = "llama-2-7b",
    layers: Annotated[int | None, typer.Option(help="The first so many; all unless given.")] = None,
    ratio: Annotated[float, typer.Option(help="Of the whole model; a few layers get the same ranks.")] = 16.0,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 262_144,
    length: Annotated[int, typer.Option(help="Tokens of a calibration window.")] = 2048,
    plain: Annotated[bool, typer.Option("--plain", help="Also do a layer the plain way, for the ratio.")] = False,
    keep: Annotated[Path | None, typer.Option(help="Keep the delta file here, e.g. for bayou bench kernels.")] = None,
    device: Device = "cuda",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Compress a pair of models made in memory; each step's seconds and operations a second, peak memory."""
    from bayou.benchmarks import compress as bench

    found = bench.run(
        shape=shape,
        layers=layers,
        ratio=ratio,
        tokens=tokens,
        length=length,
        device=device,
        beside_plain=plain,
        keep=keep,
    )
    _finish(bench.table(found), found, out, as_json)


@app.command(epilog="Example: bayou bench load --device cuda --json")
def load(
    shape: Annotated[str, typer.Option(help="llama-2-7b or tiny.")] = "llama-2-7b",
    ratio: Annotated[float, typer.Option(help="Bytes of the fine-tune over bytes of the file.")] = 16.0,
    repeats: Annotated[int, typer.Option(help="Loads; the best and the first are told.")] = 5,
    folder: Annotated[Path | None, typer.Option(help="Where the file is put for the time.")] = None,
    device: Device = "cuda",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Load a delta file from the page cache to the device, every byte verified."""
    from bayou.benchmarks import load as bench

    found = bench.run(shape=shape, ratio=ratio, repeats=repeats, device=device, folder=folder)
    _finish(bench.table(found), found, out, as_json)


@app.command(epilog="Example: bayou bench serve --part decode --json")
def serve(
    part: Annotated[str, typer.Option(help="decode (a 7B's shapes), traffic (a 1B's), or all.")] = "all",
    shape: Annotated[str | None, typer.Option(help="Of both parts: llama-2-7b, llama-3.2-1b or tiny.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer tenants, tokens and seconds.")] = False,
    device: Device = "cuda",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Serve many tenants: decode steps against the memory's floor and other ways, waiting times and stalls."""
    from bayou.benchmarks import serve as bench

    found = bench.run(shape=shape, part=part, quick=quick, device=device)
    _finish(bench.table(found), found, out, as_json)


@app.command(epilog="Example: bayou bench kernels --quick")
def kernels(
    quick: Annotated[bool, typer.Option("--quick", help="A part of it only, in less than a minute.")] = False,
    file: Annotated[Path | None, typer.Option(help="Deltas of this file, made by bench compress --keep.")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Multiply by many tenants' packed deltas: the kernels against their floor, plain PyTorch and the base (a GPU)."""
    import torch
    from rich.console import Console

    from bayou.benchmarks import kernels as bench
    from bayou.benchmarks import record
    from bayou.errors import Unsupported

    if not torch.cuda.is_available():
        raise Unsupported("bayou bench kernels measures a GPU, and torch finds none here")
    found = record.surroundings("cuda") | bench.measure(quick, file)
    for table in bench.tables(found):
        Console().print(table)
    _finish("", found, out, as_json)
