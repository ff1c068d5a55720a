"""The smallest file whose KL stays below a bound: files of several sizes are made, by the curve of KL over bytes.

KL(fine-tune || file) in nats a token is close to a power of the ratio (LOG.md), so each trial's ratio is read off a
line through the trials on either side of the bound, in logarithms. The KL is measured, never predicted: of what was
made, the smallest file that keeps the bound is the one that is left.
"""

import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayou import calibrate, exact, methods, objective, preflight, skeleton, workers
from bayou.attach import load
from bayou.checkpoint import Checkpoint, resolve
from bayou.compress import compress
from bayou.encoder import Progress
from bayou.errors import BadInput, TooSmall
from bayou.evaluate import read_model
from bayou.momentfiles import MomentFiles
from bayou.outcome import Report

FIRST = 16.0
SLOPE = 3.0
"""Of log KL over log ratio, until two trials have told: eight times the KL at half the bytes, as deltacome's."""

NEAR = 1.05
"""Ratios so near to each other are told apart no further."""

TRIALS = 8
LEAST, MOST = 1.25, 1024.0
HELD = 9
"""One window in so many is held back from calibration, to measure KL on; on a CPU 16 windows of them at most."""

LARGE = 3e9
"""Bytes of a fine-tune from which on a GPU measures in bf16: in fp32 it and the base might not fit side by side."""

Trial = tuple[float, float]
"""(ratio, KL)."""


def next_ratio(trials: Sequence[Trial], bound: float) -> float | None:
    """The ratio to try next; None where the largest that keeps the bound is known to within NEAR.

    A line through the nearest trial that keeps the bound and the nearest that does not, in logarithms; with trials on
    one side only, a line of slope SLOPE through the nearest of them, at most a factor of 4 away.
    """
    if not trials:
        return FIRST
    kept = max((trial for trial in trials if trial[1] <= bound), default=None)
    lost = min((trial for trial in trials if trial[1] > bound and (kept is None or trial[0] > kept[0])), default=None)
    if kept is not None and lost is not None:
        low, high = math.log(kept[0]), math.log(lost[0])
        if high - low <= math.log(NEAR):
            return None
        share = 0.5  # no file of the larger ratio can be made
        if lost[1] < math.inf:
            below, above = (math.log(max(kl, 1e-12)) for kl in (kept[1], lost[1]))
            share = (math.log(bound) - below) / max(1e-9, above - below)
        return math.exp(low + (high - low) * min(0.9, max(0.1, 0.95 * share)))  # a little on the side that keeps it
    ratio, kl = kept or lost  # type: ignore[misc]
    step = (bound / max(kl, 1e-12)) ** (1 / SLOPE) * (0.97 if kept is None else 1.0)
    wanted = ratio * min(4.0, max(0.25, step if kept is None else max(step, NEAR)))
    wanted = min(MOST, max(LEAST, wanted))
    return None if wanted == ratio else wanted


def smallest(
    base: str | Path,
    finetuned: str | Path,
    out: Path | str,
    max_kl: float,
    *,
    method: str = "deltacome",
    calibration: str | Path | None = None,
    tokens: int | None = None,
    length: int = 512,
    seed: int = 0,
    device: str = "cpu",
    base_revision: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Write the smallest file `out` whose KL(fine-tune || file) is at most `max_kl`; the arguments are compress's.

    The KL is measured on a ninth of the calibration text's windows, which calibrates nothing. distill is minutes for
    each file that is tried. The report's `kl` is the file's, its `trials` are all (ratio, KL) that were tried, None for
    a ratio that the method cannot reach.

    Raises:
        BadInput: a bound that is no positive number, a method of one size or without loss, no text (calibration
            "none"), several processes, or a bound that no file of this method keeps, which names the best that came.
        Whatever compress raises. Nothing is left at `out` then, or the old file is untouched.
    """
    started = time.perf_counter()
    out = Path(out)
    _check(max_kl, method, calibration, options)
    options = {name: value for name, value in options.items() if name not in ("ratio", "budget")}
    preflight.check_device(device)
    tuned = Checkpoint(resolve(finetuned, revision))
    folder = resolve(base, base_revision)
    for place in (folder, tuned.folder):
        preflight.check_output(out, place)
    model = skeleton.build(tuned.folder)
    asked = (32_768 if device == "cpu" else 262_144) if tokens is None else tokens
    source = None if calibration is None else Path(calibration)
    asked += asked // (HELD - 1)
    windows = calibrate.windows(source, tuned.folder, model.config, asked, length, seed=seed, device=device)
    if len(windows) < 2:
        raise BadInput(f"--max-kl: the text has {len(windows)} windows of {length} tokens; give more text, or --length")
    held = windows[::HELD][: 16 if device == "cpu" else None]
    kept = windows[torch.arange(len(windows)) % HELD != 0]
    dtype = torch.bfloat16 if device != "cpu" and tuned.nbytes > LARGE else torch.float32
    teacher = read_model(tuned.folder, device).to(dtype)
    trials: list[Trial] = []
    best: Report | None = None
    with tempfile.TemporaryDirectory(prefix=out.name + ".", dir=out.parent) as folder_of_trials:
        moments = _moments(folder_of_trials, tuned, kept, method, device, options)
        while len(trials) < TRIALS and (ratio := next_ratio(trials, max_kl)) is not None:
            trial = Path(folder_of_trials) / f"{len(trials)}.bayou"
            try:
                report = compress(
                    base,
                    finetuned,
                    trial,
                    method=method,
                    ratio=ratio,
                    calibration=kept,
                    seed=seed,
                    device=device,
                    base_revision=base_revision,
                    revision=revision,
                    moments=moments,
                    progress=progress,
                    **options,
                )
            except TooSmall:
                trials.append((ratio, math.inf))  # no such file: the next one is larger
                continue
            kl = _measured(folder, trial, teacher, held, dtype, device)
            trials.append((ratio, kl))
            if kl <= max_kl and (best is None or report.bytes < best.bytes):
                os.replace(trial, Path(folder_of_trials) / "best")
                best = replace(report, path=str(out), kl=kl)
            else:
                trial.unlink()
        if best is None:
            raise BadInput(_none(method, max_kl, trials))
        os.replace(Path(folder_of_trials) / "best", out)
    told = [(ratio, None if kl == math.inf else kl) for ratio, kl in trials]
    return replace(best, trials=told, seconds=time.perf_counter() - started)


def _check(max_kl: float, method: str, calibration: str | Path | None, options: dict[str, Any]) -> None:
    if not 0 < max_kl < math.inf:
        raise BadInput(f"--max-kl {max_kl:g}: a number above 0 is needed, in nats a token, e.g. 0.01")
    if exact.is_exact(method) or not methods.has_rank(method):
        raise BadInput(f"--max-kl chooses the size, and files of {method} have one only; choose another method")
    if calibration == "none":
        raise BadInput("--max-kl is measured on the calibration's text; leave --calibration none out, or give a text")
    if options.get("ratio") is not None or options.get("budget") is not None:
        raise BadInput("--max-kl chooses the size itself; leave --ratio and --budget out")
    if calibration is None and (options.get("distill") or options.get("distill_steps")):
        raise BadInput("--max-kl with distilling needs a text of yours: give --calibration FILE")
    if options.get("accounting", "file") != "file":
        raise BadInput("--max-kl goes by the file's bytes; leave --accounting paper out")
    with workers.joined() as here:
        if here.count > 1:
            raise BadInput(f"--max-kl runs in one process, not in {here.count}; start it without torchrun")


def _none(method: str, max_kl: float, trials: Sequence[Trial]) -> str:
    """Why there is no file."""
    ratio, kl = min(trials, key=lambda trial: trial[1])
    found = f"the best that was tried, 1/{ratio:.2f} of the fine-tune, has {kl:.3g}"
    if kl == math.inf:
        found = (
            f"none of the {len(trials)} sizes that were tried, down to 1/{ratio:.2f}, can be made or has a KL at all"
        )
    return (
        f"no file of {method} has a KL of {max_kl:g} or less here; {found}. "
        "Raise --max-kl, or choose another method: exact has no loss"
    )


def _moments(
    place: str, tuned: Checkpoint, windows: Tensor, method: str, device: str, options: dict[str, Any]
) -> MomentFiles | None:
    """One calibration for all trials, where it does not depend on the file; on a GPU walking again is faster than a
    disk."""
    activations = options.get("activations") or methods.activations(method)
    if device != "cpu" or activations != "finetuned" or not getattr(methods.get(method), "USES_GRAM", False):
        return None
    found = MomentFiles(Path(place) / "moments", windows)
    model = skeleton.build(tuned.folder)
    found.make(tuned, model, skeleton.places(model, tuned.names()), device)
    return found


def _measured(base: Path, file: Path, teacher: torch.nn.Module, held: Tensor, dtype: torch.dtype, device: str) -> float:
    """KL(fine-tune || file) on the held-back windows, nats a token."""
    student = load(base, file, dtype=dtype, device=device)
    with torch.inference_mode():
        _, kl = objective.measure(student, held, teacher, batch=1 if device == "cpu" else 8)
    return kl if math.isfinite(kl) else math.inf
