"""`bayou share`: from a model to a smaller one whose layers share other layers' matrices. https://arxiv.org/abs/2501.18596

    the ties, in closed form     draft.draw_up
    training, if asked for       recover.train, recover.train_rival
    the file                     sharedfile.write

Methods other than `deltallm` are those of bayou.sharing.baselines.
"""

import os
import time
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from bayou import preflight
from bayou.checkpoint import Checkpoint
from bayou.errors import BadInput
from bayou.sharing import Shared, baselines, tune
from bayou.sharing.baselines import slicegpt
from bayou.sharing.draft import DEFAULT, Draft, draw_up
from bayou.sharing.layouts import Dial
from bayou.sharing.original import Original, Progress
from bayou.sharing.recover import OWN, Training, forget, train, train_rival
from bayou.sharing.sharedfile import Report, calibrates, check, write

__all__ = ["Draft", "Training", "dense", "draw_up", "methods", "own_gpu", "share", "train"]

SLICED = "slicegpt"
"""The method whose model no file of the format holds: its shapes are no architecture's."""
DENSE = "dense"
"""The control at equal bytes: nothing is shared, matrices are quantised."""


def own_gpu(device: str) -> str:
    """Of processes that train together (torchrun, accelerate launch) each has a GPU; "cuda" is this one's."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def methods() -> list[str]:
    """The words of --method: our own, the control that shares nothing, and the rivals of bayou.sharing.baselines."""
    return [OWN, DENSE, *baselines.METHODS]


def share(
    model: str | Path,
    out: str | Path,
    *,
    method: str = OWN,
    dial: Dial | None = None,
    initialisation: str = DEFAULT,
    plan: str = "layout",
    delta_method: str = "lowrank",
    delta_options: dict[str, Any] | None = None,
    anchor_bits: int | None = None,
    quantise: str | None = None,
    calibration: str | Path | None = None,
    tokens: int | None = None,
    length: int = 512,
    seed: int = 0,
    device: str = "cpu",
    revision: str | None = None,
    training: Training | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write a model as a self-contained file in which layers share other layers' matrices.

    Args:
        method: "deltallm", "dense" (see `dense`) or a rival (see `methods`); of the dial, those take `reduce` alone.
            slicegpt's `out` is a new folder, which `bayou.load` loads.
        dial ... progress: see `draw_up`. delta_method ... quantise: see `sharedfile.write`. training: see
            `recover.Training`; it goes on from OUT.train where a run was stopped. Processes that train together all
            write the same file.

    With `anchor_bits` the ties are fitted to their anchors as they are once quantised. Raises BadInput, Unsupported,
    and BayouError for a full disk; nothing is left at `out` then, or the old file is untouched.
    """
    if method == SLICED:  # before the work
        preflight.check_new_folder(Path(out))
    else:
        preflight.check_output(Path(out), Path(model))
    started = time.perf_counter()
    device = own_gpu(device)
    text: dict[str, Any] = {"calibration": calibration, "tokens": tokens, "length": length, "seed": seed}
    text |= {"device": device, "revision": revision, "progress": progress}
    if method not in methods():
        raise BadInput(f"there is no sharing method {method!r}; choose one of {', '.join(methods())}")
    dial, show = dial or Dial(), progress or (lambda *_: None)
    checkpoint = Path(out).with_name(Path(out).name + ".train")
    if training is not None and training.search:
        tune.require()
    if method != OWN:
        own = (initialisation, plan, delta_method, delta_options or {}) != (DEFAULT, "layout", "lowrank", {})
        if method == DENSE:
            if own or dial != Dial() or training is not None or anchor_bits is None:
                raise BadInput("--method dense shares nothing and needs --anchor-bits; it takes --quantise beside it")
            return dense(model, out, bits=anchor_bits, quantise=quantise or "linears", **text)
        if own or (anchor_bits, quantise) != (None, None) or dial != Dial(reduce=dial.reduce):
            raise BadInput(
                f"--method {method} takes --reduce or --ratio, and --train; all else of how to share is for {OWN}"
            )
        report = _rival(method, model, out, dial.reduce, training, checkpoint, **text | {"progress": show})
        return replace(report, seconds=time.perf_counter() - started)
    quantise = quantise or "anchors"
    check(delta_method, delta_options or {}, anchor_bits, quantise)  # before the work too
    storage: dict[str, Any] = {"delta_method": delta_method, "delta_options": delta_options}
    storage |= {"anchor_bits": anchor_bits, "quantise": quantise}
    draft = draw_up(model, dial=dial, initialisation=initialisation, plan=plan, storage=storage, **text)
    if training is not None:
        draft = train(draft, training, checkpoint, show, seed=seed)
    windows = draft.windows
    if windows is None and calibrates(delta_method, anchor_bits):  # of an initialisation that wanted none
        windows = draft.original.windows(calibration, tokens, length, seed)
    drawn = time.perf_counter() - started
    report = write(
        draft.original,
        draft.shared,
        out,
        tensors=draft.tensors,
        **storage,
        refit=training is None and initialisation != "zero",
        whiten=initialisation != "svd",
        windows=windows,
        progress=progress,
    )
    if training is not None:
        forget(checkpoint)
    whole = time.perf_counter() - started
    return replace(report, seconds=whole, steps={"draw up": drawn} | report.steps, training=draft.trained)


def dense(
    model: str | Path,
    out: str | Path,
    *,
    bits: int,
    quantise: str = "linears",
    calibration: str | Path | None = None,
    tokens: int | None = None,
    length: int = 512,
    seed: int = 0,
    device: str = "cpu",
    revision: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """The control at equal bytes: nothing shared, the model quantised by GPTQ (without a text: to nearest).

    bits, quantise: 1 to 8 bits for "linears", or for "all": embeddings and head too, in 8 at least. The rest as in
    `share`. Raises BadInput.
    """
    started = time.perf_counter()
    check("lowrank", {}, bits, quantise)  # before the work
    if quantise == "anchors":
        raise BadInput("--quantise anchors: where nothing is shared there are no anchors; choose linears or all")
    original = Original(model, revision=revision, device=device)
    windows = original.windows(calibration, tokens, length, seed)
    options: dict[str, Any] = {"anchor_bits": bits, "quantise": quantise, "windows": windows, "progress": progress}
    report = write(original, Shared(()), out, method=DENSE, **options)
    return replace(report, seconds=time.perf_counter() - started)


def _rival(
    method: str,
    model: str | Path,
    out: str | Path,
    reduce: float | None,
    training: Training | None,
    checkpoint: Path,
    *,
    calibration: str | Path | None,
    tokens: int | None,
    length: int,
    seed: int,
    device: str,
    revision: str | None,
    progress: Progress,
) -> Report:
    """A rival's model, of the share `reduce` (0.12) of parameters fewer, as a self-contained file or sliced folder."""
    if method == SLICED and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("slicegpt's folder is written by one process: start bayou share without torchrun or accelerate")
    if training is not None and not training.general:
        raise BadInput(
            f"--no-pmr, --blend, --pmr-start, --lora, --whole and --rest-rate say how {OWN} is trained; {method} is "
            "trained as its recovery is published, with --rate, --alpha and --tokens"
        )
    original = Original(model, revision=revision, device=device)
    windows = original.windows(calibration, tokens, length, seed)
    if windows is None:
        raise BadInput(f"method {method} measures the model on text, and --calibration none gives none")
    share_gone = 0.12 if reduce is None else reduce
    made = baselines.share(method, original.folder, reduce=share_gone, windows=windows, device=device)
    told: dict[str, Any] = {}
    if training is not None:
        made, told = train_rival(original, made, training, checkpoint, progress, seed=seed)
    if made.own:
        report = _sliced(original, made, Path(out))
    else:
        shared, tensors = made.shared(original.folder)
        report = write(original, shared, out, tensors=tensors, method=method, progress=progress)
    if training is not None:
        forget(checkpoint)
    return replace(report, training=told)


def _sliced(original: Original, made: baselines.Baseline, out: Path) -> Report:
    """slicegpt's folder, in the dtype that the model's embeddings have; all its files count."""
    table = next(name for name, place in original.places.items() if place.role == "embedding")
    dtype = original.checkpoint.dtype(table)
    made.model.to(dtype)
    made.model.config.dtype = dtype
    slicegpt.save(made, out, original.folder)
    written = Checkpoint(out)
    shapes = {name: prod(written.shape(name)) for name in written.names()}
    tables = sum(count for name, count in shapes.items() if name.endswith(("embed_tokens.weight", "lm_head.weight")))
    size = sum(path.stat().st_size for path in out.iterdir())
    counts = (sum(shapes.values()), original.parameters, original.tables, 0, 0)
    return Report(str(out), SLICED, size, original.checkpoint.nbytes / size, *counts, 0.0, tables_left=tables)
