"""`bayou share`: from a model to a smaller one whose layers share other layers' matrices. https://arxiv.org/abs/2501.18596

    which blocks, what rank      layouts.arrange, or search.search by measured loss
    the ties, in closed form     ties.fit, ties.learn
    training, if asked for       train (of what `draw_up` returns)
    the file                     sharedfile.write

Methods other than `deltallm` are modules of bayou.baselines, by the name of their file.
"""

import inspect
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from torch import Tensor

from bayou import layouts, preflight, search, ties
from bayou.errors import BadInput
from bayou.layouts import Dial
from bayou.original import Original, Progress
from bayou.sharedfile import Report, write
from bayou.sharing import Shared, Tie
from bayou.ties import Metric

OWN = "deltallm"
LISTED = ("shortgpt", "laco", "laco-code", "slicegpt", "jointdrop", "lastlayers")
"""Rivals, by the word of the command; "laco-code" is the module laco_code, and so on."""


@dataclass(frozen=True)
class Draft:
    """A shared model before it is written or trained.

    tensors: values of tensors that replace the model's own (learned anchors). windows: what it was calibrated on.
    """

    original: Original
    shared: Shared
    tensors: dict[str, Tensor]
    windows: Tensor | None


def draw_up(
    model: str | Path,
    *,
    dial: Dial | None = None,
    initialisation: str = "whitened+gain",
    plan: str = "layout",
    calibration: str | Path | None = None,
    tokens: int | None = None,
    length: int = 512,
    seed: int = 0,
    device: str = "cpu",
    revision: str | None = None,
    progress: Progress | None = None,
) -> Draft:
    """The ties of a model, without writing anything: what training starts from.

    Args:
        model: folder or Hub id; revision: on the Hub.
        dial: layout, kinds, how much. initialisation: a word of ties.INITIALISATIONS.
        plan: "layout" follows the dial's layout; "search" chooses per sub-layer by measured loss (search.py).
        calibration: a text or .jsonl file; "none" goes without; None takes English text that Python carries.
        tokens, length, seed: of it, as in bayou.compress.

    Grams of all sub-layers involved are held at once, (in, in) fp32 each. Raises BadInput, Unsupported.
    """
    dial, show = dial or Dial(), progress or (lambda *_: None)
    if initialisation not in ties.INITIALISATIONS:
        raise BadInput(f"--init {initialisation}: choose one of {', '.join(ties.INITIALISATIONS)}")
    if plan not in ("layout", "search"):
        raise BadInput(f"--plan {plan}: choose layout or search")
    original = Original(model, revision=revision, device=device)
    if plan == "search":
        windows = original.windows(calibration, tokens, length, seed)
        if windows is None:
            raise BadInput("--plan search measures the loss on text, and --calibration none gives none")
        return Draft(original, search.search(original, dial, windows, show), {}, windows)
    pairs, rank = layouts.arrange(dial, original.sublayers, original.parameters)
    wanted = initialisation in ties.USE_GRAM
    windows = original.windows(calibration, tokens, length, seed) if wanted else None
    groups: dict[str, list[str]] = {}  # anchor -> matrices tied to it
    for delta, lender in pairs.items():
        for kind in layouts.KINDS[dial.kinds]:
            mine, theirs = original.sublayers[delta, kind], original.sublayers[lender, kind]
            for leaf in mine.matrices:
                groups.setdefault(f"{theirs.name}.{leaf}", []).append(f"{mine.name}.{leaf}")
    involved = {name for users in groups.values() for name in users}
    involved |= set(groups) if initialisation == "als" else set()
    grams = original.grams(windows, involved, show)
    metrics: dict[int, Metric] = {}

    def metric(name: str) -> Metric:
        gram = grams.get(name)
        return metrics.setdefault(id(gram), Metric(gram))

    made: list[Tie] = []
    tensors: dict[str, Tensor] = {}
    for done, (anchor, users) in enumerate(groups.items()):
        reference = original.matrix(anchor)
        if initialisation == "als":
            matrices = {anchor: reference} | {name: original.matrix(name) for name in users}
            kept = {name: metric(name) for name in matrices}
            learned = ties.learn(anchor, matrices, kept, rank, dtype=original.checkpoint.dtype(anchor))
            made += learned.ties
            tensors[anchor] = learned.base.T.contiguous() if original.places[anchor].transposed else learned.base
        else:
            for name in users:
                found = (anchor, reference)
                made.append(ties.fit(name, original.matrix(name), found, metric(name), rank, initialisation, seed=seed))
        show("groups", done + 1, len(groups))
    return Draft(original, Shared(tuple(made)), tensors, windows)


def methods() -> list[str]:
    """The words of --method: our own, and the modules of bayou.baselines that have a function `share`."""
    found = [OWN]
    if find_spec("bayou.baselines") is not None:
        package = import_module("bayou.baselines")
        names = {module.name.replace("_", "-") for module in iter_modules(package.__path__)}
        found += [name for name in LISTED if name in names]
    return found


def share(
    model: str | Path,
    out: str | Path,
    *,
    method: str = OWN,
    dial: Dial | None = None,
    initialisation: str = "whitened+gain",
    plan: str = "layout",
    delta_method: str = "lowrank",
    delta_options: dict[str, Any] | None = None,
    anchor_bits: int | None = None,
    quantise: str = "anchors",
    calibration: str | Path | None = None,
    tokens: int | None = None,
    length: int = 512,
    seed: int = 0,
    device: str = "cpu",
    revision: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Write a model as a self-contained file in which layers share other layers' matrices.

    Args:
        method: "deltallm", or a rival (see `methods`), to which `options` go besides what it has in common with this.
        dial ... progress: see `draw_up`. delta_method ... quantise: see `sharedfile.write`.

    With `anchor_bits` the ties are fitted to their anchors as they are once quantised. Raises BadInput, Unsupported,
    and BayouError for a full disk; nothing is left at `out` then, or the old file is untouched.
    """
    if method != OWN:
        common: dict[str, Any] = {
            "dial": dial,
            "calibration": calibration,
            "tokens": tokens,
            "length": length,
            "seed": seed,
        }
        common |= {"device": device, "revision": revision, "progress": progress}
        return _rival(method, model, out, common, options)
    if options:
        raise BadInput(f"method {OWN} has no option {next(iter(options))!r}")
    preflight.check_output(Path(out), Path(model))  # before the work
    started = time.perf_counter()
    draft = draw_up(
        model,
        dial=dial,
        initialisation=initialisation,
        plan=plan,
        calibration=calibration,
        tokens=tokens,
        length=length,
        seed=seed,
        device=device,
        revision=revision,
        progress=progress,
    )
    drawn = time.perf_counter() - started
    report = write(
        draft.original,
        draft.shared,
        out,
        tensors=draft.tensors,
        delta_method=delta_method,
        delta_options=delta_options,
        anchor_bits=anchor_bits,
        quantise=quantise,
        refit=initialisation != "zero",
        windows=draft.windows,
        method=method,
        progress=progress,
    )
    return replace(report, seconds=time.perf_counter() - started, steps={"draw up": drawn} | report.steps)


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
    progress: Progress | None = None,
) -> Report:
    """The control at equal bytes: nothing shared, the model's linears (or all matrices) in `bits` bits by GPTQ."""
    original = Original(model, device=device)
    windows = original.windows(calibration, tokens, length, seed)
    nothing = Shared(())
    return write(original, nothing, out, anchor_bits=bits, quantise=quantise, windows=windows, progress=progress)


def _rival(
    method: str, model: str | Path, out: str | Path, common: Mapping[str, Any], options: Mapping[str, Any]
) -> Report:
    """A rival's own `share(model, out, ...)`, given those of the common arguments that it takes."""
    if method not in methods():
        raise BadInput(f"there is no sharing method {method!r}; choose one of {', '.join(methods())}")
    run = import_module(f"bayou.baselines.{method.replace('-', '_')}").share
    known = inspect.signature(run).parameters
    for name in options:
        if name not in known:
            raise BadInput(f"method {method} has no option {name!r}; it has {', '.join(known)}")
    report: Report = run(model, out, **{k: v for k, v in common.items() if k in known}, **options)
    return report
