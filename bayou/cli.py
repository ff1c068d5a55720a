"""The command line: `bayou compress | share | inspect | verify | restore | export | eval | compare | bench | serve`."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from bayou import methods
from bayou.bars import Bars
from bayou.benchmarks import command as bench
from bayou.comparison.command import compare
from bayou.errors import BadInput, BayouError, TooSmall
from bayou.integrations.command import evaluate, export
from bayou.serving.command import serve

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tuned LLMs as small, verified differences from their base.",
)
app.add_typer(bench.app, name="bench")
_screen = Console(stderr=True)

Base = Annotated[str, typer.Argument(help="The base: a model folder or a Hub id.")]
DeltaPath = Annotated[Path, typer.Argument(metavar="FILE", help="A .bayou file.")]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object on a line of its own.")]


def _value(text: str) -> Any:
    """An option's value as the method's signature wants it: number, true/false, or text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _options(pairs: list[str] | None) -> dict[str, Any]:
    chosen = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise BadInput(f"--option {pair!r}: write NAME=VALUE, e.g. --option group=64")
        chosen[key.replace("-", "_")] = _value(value)
    return chosen


@app.command(epilog="Example: bayou compress org/base ./my-finetune -o math.bayou --ratio 16")
def compress(
    base: Base,
    finetuned: Annotated[str, typer.Argument(help="The fine-tune: a model folder or a Hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    method: Annotated[str, typer.Option(help=f"One of {', '.join(methods.names())}.")] = "deltacome",
    ratio: Annotated[
        float | None, typer.Option(help="Bytes of the fine-tune over bytes of the file; 16 unless given.")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="The file's size instead, e.g. 350MB.")] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Instead of a size: the smallest file of this KL at most, on held-back text.")
    ] = None,
    bands: Annotated[
        str | None, typer.Option(help="auto, deltacome: BITSxRANKS,...; the last band takes the rest.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="lowrank: bits of the factors, 16 or 1 to 8.")] = None,
    refit: Annotated[
        str | None, typer.Option(help="deltacome: rows, full or none (as published); rows unless given.")
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="Any other option of the method, NAME=VALUE.")] = None,
    accounting: Annotated[str, typer.Option(help="file (every byte) or paper (Delta-CoMe's nominal bits).")] = "file",
    keep: Annotated[
        str, typer.Option(help="Stored exactly: embeddings,heads,norms,biases,linears,experts or patterns.")
    ] = "",
    embedding_rate: Annotated[
        float | None, typer.Option(help="Bytes a weight of embeddings, relative to linears.")
    ] = None,
    embedding_option: Annotated[list[str] | None, typer.Option(help="How embeddings are coded, e.g. bits=4.")] = None,
    calibration: Annotated[str | None, typer.Option(help="A text or .jsonl file; none = no calibration.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens; 32768 on the CPU, 262144 on a GPU.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a calibration window.")] = 512,
    activations: Annotated[
        str | None,
        typer.Option(help="Calibrate on those of the finetuned or compressed model, or of both: corrected (auto)."),
    ] = None,
    distill: Annotated[
        float | None, typer.Option(help="Minutes of training scales, gains and norms to the fine-tune's logits.")
    ] = None,
    distill_steps: Annotated[int | None, typer.Option(help="The same as a number of steps; 0 is none.")] = None,
    distill_what: Annotated[
        str, typer.Option(help="all; gains: BitDelta's recipe, which bitdelta has by itself (200 steps).")
    ] = "all",
    entropy: Annotated[
        bool | None,
        typer.Option("--entropy/--no-entropy", help="Code by entropy: smaller, a little slower to load; auto does."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Order of the calibration documents.")] = 0,
    base_revision: Annotated[str | None, typer.Option(help="The base's revision on the Hub.")] = None,
    revision: Annotated[str | None, typer.Option(help="The fine-tune's revision on the Hub.")] = None,
    as_json: Json = False,
) -> None:
    """Write a fine-tune as one small file of differences from its base."""
    from bayou import distillation
    from bayou.compress import EMBEDDING_RATE
    from bayou.compress import compress as run
    from bayou.restore import parse_size
    from bayou.smallest import smallest
    from bayou.workers import speaks

    chosen = _options(option)
    chosen |= {k: v for k, v in {"bands": bands, "bits": bits, "refit": refit}.items() if v is not None}
    if accounting not in ("file", "paper"):
        raise BadInput(f"--accounting {accounting}: choose file or paper")
    tables = methods.get(method).EMBEDDINGS | _options(embedding_option) if embedding_option else None
    make = run if max_kl is None else partial(smallest, max_kl=max_kl)
    with Bars(_screen) as bars:
        report = make(
            base,
            finetuned,
            out,
            method=method,
            options=chosen,
            ratio=ratio,
            budget=parse_size(budget) if budget else None,
            accounting=accounting,  # type: ignore[arg-type]
            keep=tuple(word.strip() for word in keep.split(",") if word.strip()),
            embedding_rate=EMBEDDING_RATE if embedding_rate is None else embedding_rate,
            embedding_options=tables,
            calibration=calibration,
            tokens=tokens,
            length=length,
            activations=activations,  # type: ignore[arg-type]
            distill=distill,
            distill_steps=distill_steps,
            distill_what=distill_what,
            entropy=entropy,
            seed=seed,
            device=device,
            base_revision=base_revision,
            revision=revision,
            progress=bars.show,
        )
    if not speaks():  # torchrun started several of us, and the first one prints
        return
    errors = ", ".join(f"{role} {error:.3f}" for role, error in report.errors.items())
    print(f"{report.path}: {report.bytes:,} bytes, 1/{report.ratio:.2f} of the fine-tune, in {report.seconds:.1f} s")
    print(f"  {report.sites} matrices coded, {report.exact} tensors exact, {report.unchanged} unchanged")
    print(f"  relative error of the delta: {errors or 'none'}")
    if report.kl is not None:
        print(f"  KL {report.kl:.3g} nats a token on held-back text; {len(report.trials)} sizes tried")
    if told := report.distilled:
        print(f"  distilled: {distillation.words(told)}")
    print("  seconds: " + ", ".join(f"{name} {spent:.1f}" for name, spent in report.steps.items()))
    _finish(as_json, report.json())


@app.command(epilog="Example: bayou share org/model -o small.bayou --reduce 0.12 --layout sequential --kinds mlp")
def share(
    model: Annotated[str, typer.Argument(help="The model: a folder or a Hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write; for slicegpt a folder.")],
    method: Annotated[
        str, typer.Option(help="deltallm; shortgpt, laco, laco-code, slicegpt, jointdrop, lastlayers; dense (control).")
    ] = "deltallm",
    plan: Annotated[str, typer.Option(help="layout, or search: choose per sub-layer by measured loss.")] = "layout",
    layout: Annotated[str, typer.Option(help="alternating or sequential.")] = "alternating",
    kinds: Annotated[str, typer.Option(help="What is shared: mlp, attention or all.")] = "mlp",
    keep_ends: Annotated[int, typer.Option(help="Blocks kept whole at either end.")] = 2,
    reduce: Annotated[float | None, typer.Option(help="Share of all parameters to remove; 0.12 unless given.")] = None,
    ratio: Annotated[float | None, typer.Option(help="The same as parameters of the model over those left.")] = None,
    budget: Annotated[str | None, typer.Option(help="--plan search: the file's size instead, e.g. 200MB.")] = None,
    near: Annotated[int, typer.Option(help="--plan search: anchors are so many blocks before at most.")] = 1,
    rank: Annotated[int | None, typer.Option(help="Rank of every delta.")] = None,
    count: Annotated[int | None, typer.Option(help="Delta blocks.")] = None,
    blocks: Annotated[str, typer.Option(help="The delta blocks themselves, e.g. 8,12,16.")] = "",
    per_anchor: Annotated[int | None, typer.Option(help="sequential: delta blocks of one anchor.")] = None,
    init: Annotated[
        str, typer.Option(help="zero, svd, whitened, whitened+gain, als, or no-base (control).")
    ] = "whitened+gain",
    delta_method: Annotated[str, typer.Option(help=f"Deltas stored by {', '.join(methods.names())}.")] = "lowrank",
    bits: Annotated[int | None, typer.Option(help="lowrank: bits of the factors, 16 or 1 to 8.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Any other option of --delta-method, NAME=VALUE.")] = None,
    anchor_bits: Annotated[int | None, typer.Option(help="Store anchors in 1 to 8 bits (GPTQ).")] = None,
    quantise: Annotated[
        str | None, typer.Option(help="What --anchor-bits is for: anchors, linears (default of dense) or all.")
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="A text or .jsonl file; none = no calibration.")] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="32768 on the CPU, 262144 on a GPU.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a calibration window.")] = 512,
    train: Annotated[str | None, typer.Option(help="Train the deltas on this text or .jsonl file.")] = None,
    tokens: Annotated[str, typer.Option(help="--train: tokens, e.g. 15M.")] = "15M",
    rate: Annotated[float | None, typer.Option(help="--train: peak learning rate; 1e-3, lastlayers 1e-4.")] = None,
    alpha: Annotated[float, typer.Option(help="--train: share of KL to the model in the loss.")] = 0.5,
    pmr: Annotated[bool, typer.Option("--pmr/--no-pmr", help="--train: Progressive Module Replacement.")] = True,
    blend: Annotated[bool, typer.Option("--blend", help="--train: mix original and delta, not draw.")] = False,
    pmr_start: Annotated[float, typer.Option(help="--train: share replaced at the start.")] = 0.3,
    lora: Annotated[int, typer.Option(help="--train: rank of LoRA on all other linears; 0 is none.")] = 0,
    whole: Annotated[bool, typer.Option("--whole", help="--train: train all else whole, embeddings too.")] = False,
    rest_rate: Annotated[float | None, typer.Option(help="--train: peak rate of LoRA or --whole; else --rate.")] = None,
    search: Annotated[int, typer.Option(help="--train: first try so many rates, alphas and PMR starts.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the calibration's and training's order, and of --init zero.")] = 0,
    revision: Annotated[str | None, typer.Option(help="The model's revision on the Hub.")] = None,
    as_json: Json = False,
) -> None:
    """Write a model whose layers share other layers' matrices, as one small file that needs no base."""
    from bayou.restore import parse_size
    from bayou.share import Training
    from bayou.share import share as run
    from bayou.sharing.layouts import Dial, reduction

    chosen = _options(option) | ({} if bits is None else {"bits": bits})
    dial = Dial(layout, kinds, keep_ends, reduction(reduce, ratio), rank, count, _numbers(blocks), per_anchor)
    dial = replace(dial, budget=parse_size(budget) if budget else None, near=near)
    training = None
    how = (tokens, rate, alpha, pmr, blend, pmr_start, lora, whole, rest_rate, search)
    if train is None and how != ("15M", None, 0.5, True, False, 0.3, 0, False, None, 0):
        raise BadInput(
            "--tokens, --rate, --alpha, --no-pmr, --blend, --pmr-start, --lora, --whole, --rest-rate and --search say "
            "how to train; give --train TEXT with them (tokens to calibrate on are --calibration-tokens)"
        )
    if train is not None:
        amount = parse_size(tokens + "B" if tokens[-1:] in "kKMG" else tokens)
        training = Training(
            train,
            amount,
            rate,
            alpha,
            progressive=pmr,
            blend=blend,
            start=pmr_start,
            lora=lora,
            whole=whole,
            rest_rate=rest_rate,
            search=search,
        )
    with Bars(_screen) as bars:
        report = run(
            model,
            out,
            method=method,
            dial=dial,
            initialisation=init,
            plan=plan,
            delta_method=delta_method,
            delta_options=chosen,
            anchor_bits=anchor_bits,
            quantise=quantise,
            calibration=calibration,
            tokens=calibration_tokens,
            length=length,
            seed=seed,
            device=device,
            revision=revision,
            training=training,
            progress=bars.show,
        )
    print(f"{report.path}: {report.bytes:,} bytes, 1/{report.ratio:.2f} of the model, in {report.seconds:.1f} s")
    print(
        f"  {report.parameters:,} parameters of {report.original:,}: {100 * report.removed:.2f} % fewer "
        f"({100 * report.removed_of_layers:.2f} % without embeddings)"
    )
    print(f"  {report.ties} matrices tied, {report.dropped} sub-layers dropped")
    if found := report.training.get("search"):
        best = " ".join(
            f"--{name.replace('start', 'pmr-start')} {value:.3g}" for name, value in found["chosen"].items()
        )
        print(f"  chosen of {len(found['trials'])} trials on {found['trial_tokens']:,} tokens each: {best}")
    if told := report.training:
        times = told["tokens"] / (told["windows"] * told["length"])
        print("  trained on {tokens:,} tokens to loss {loss:.3f} (CE {ce:.3f}, KL {kl:.3f})".format(**told), end="")
        print(f"; the text was taken {times:.1f} times")
        if told["batch"] < told["batch_asked"]:
            print(
                "  the text fills {windows} windows of {length} tokens, fewer than the {batch_asked} of a step: a step "
                "had {batch}; give more text".format(**told)
            )
        if told["returns"]:
            print("  the loss was not a number {returns} times; rate lowered to {rate:.2g}".format(**told))
    _finish(as_json, report.json())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise BadInput(f"--blocks {text}: write numbers of blocks, e.g. 8,12,16") from None


@app.command(epilog="Example: bayou inspect math.bayou --plot spectrum.png")
def inspect(
    file: DeltaPath,
    plot: Annotated[Path | None, typer.Option(help="Draw the singular spectrum with its bit bands there.")] = None,
    site: Annotated[str | None, typer.Option(help="With --plot: draw this matrix.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a file holds: bytes by kind of tensor, bits, ranks, captured energy."""
    from bayou import report

    found = report.inspect(file)
    Console().print(report.table(found))
    if plot is not None:
        report.plot(file, plot, site)
        print(f"drawn: {plot}")
    _finish(as_json, found)


@app.command(epilog="Example: bayou verify math.bayou --base org/base")
def verify(
    file: DeltaPath,
    base: Annotated[str | None, typer.Option(help="Also rehash this base and compare.")] = None,
    as_json: Json = False,
) -> None:
    """Check every byte of a file, and with --base that the base is the right one."""
    from bayou import report

    with Bars(_screen) as bars:
        found = report.verify(file, base, bars.show)
    against = f", and {found['base_tensors']} tensors of the base are the right ones" if base else ""
    print(f"{file}: sound; {found['entries']} entries, {found['bytes']:,} bytes, root {found['root'][:16]}{against}")
    _finish(as_json, found)


@app.command(epilog="Example: bayou restore org/base math.bayou -o ./math --dtype float16")
def restore(
    base: Annotated[str, typer.Argument(help="The base: a model folder or a Hub id. Left out for a shared model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    file: Annotated[Path | None, typer.Argument(metavar="FILE", help="A .bayou file.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; the fine-tune's own unless given.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Larger models are cut into shards of this size.")] = "5GB",
    as_json: Json = False,
) -> None:
    """Write the model of a file as an ordinary Hugging Face folder."""
    from bayou.restore import restore as run

    lender, path = (base, file) if file is not None else (None, base)  # one argument is a file that leans on no base
    with Bars(_screen) as bars:
        folder = run(lender, path, out, dtype=dtype, max_shard_size=max_shard_size, progress=bars.show)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"{folder}: {size:,} bytes of weights")
    _finish(as_json, {"path": str(folder), "bytes": size})


app.command(epilog="Example: bayou export org/base math.bayou --rank 256 -o ./math-lora --data test.jsonl")(export)
app.command(epilog="Example: bayou serve org/base --delta sql=sql.bayou --delta-dir deltas --memory 8GB")(serve)


app.command(epilog="Example: bayou compare org/base ./my-finetune --data test.jsonl --calibration train.jsonl -o cmp")(
    compare
)


app.command("eval", epilog="Example: bayou eval org/base math.bayou ./my-finetune --data test.jsonl")(evaluate)


def _finish(as_json: bool, found: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps(found))


def _fail(error: BayouError, as_json: bool) -> NoReturn:
    _screen.print(f"bayou: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
    if as_json:
        found: dict[str, Any] = {"error": type(error).__name__, "message": str(error)}
        if isinstance(error, TooSmall):
            found["least"] = error.least
        print(json.dumps(found))
    sys.exit(1)


def main(arguments: list[str] | None = None, run: Callable[..., Any] = app) -> None:
    """Run the command line. Exit codes: 0 done, 1 an error of the input (printed), 2 wrong usage, 130 Ctrl-C."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        run(words, prog_name="bayou", standalone_mode=True)
    except BayouError as error:
        _fail(error, "--json" in words)
    except (KeyboardInterrupt, SystemExit) as stop:  # typer makes a SystemExit of 130 of a Ctrl-C
        if isinstance(stop, SystemExit) and stop.code != 130:
            raise
        kept = "; what is encoded so far is kept, run the same command to go on" if "compress" in words[:1] else ""
        if "compare" in words[:1]:
            kept = "; what is done so far is kept in OUT, run the same command to go on"
        if "share" in words[:1] and "--train" in words:
            kept = "; what is trained so far is kept in OUT.train every 100 steps, run the same command to go on"
        _screen.print(f"bayou: stopped{kept}", style="yellow", soft_wrap=True)
        sys.exit(130)
