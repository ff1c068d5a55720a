"""Compress by every method to every size, score each file on held-out text, and write what came of it.

What runs have in common is done once: the fine-tune's activations (second moments, momentfiles.py), its logits on the
held-out text (evaluate.Remembered), the spectra, and on a CPU most eigendecompositions. All that is done is in DIR, so
that a stopped comparison goes on where it was, and a later one with other methods or sizes adds its rows:

    compare.json        everything that was found; written anew after each step
    METHOD-RATIO.bayou  the files, each as `bayou compress` writes it, byte for byte
    report.html, plot.svg
    work/               moments, logits and spectra; goes at the end
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from bayou import calibrate, decompose, distillation, methods, preflight, skeleton
from bayou.checkpoint import Checkpoint, atomic, resolve
from bayou.comparison import drawing, measured, page
from bayou.comparison.bound import Bound, Spectrum, decibels
from bayou.compress import compress
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput, BayouError, TooSmall, Unsupported
from bayou.evaluate import Remembered, check_rows, evaluate, read_model, read_rows
from bayou.load import load
from bayou.momentfiles import MomentFiles
from bayou.version import __version__

Progress = Callable[[str, int, int], None]

_LOGITS = 2**33  # bytes of the fine-tune's logits that are kept at most, and at most half of what the disk has free
_VECTORS = 2**30  # bytes of eigenvectors that are kept in memory between one method or size and the next
_WINDOW = 512  # tokens of a window of held-out text, as `bayou eval` has it; fewer where the model has fewer positions
_REFERENCE = {"nll_reference": "nll", "ppl_reference": "ppl", "acc_reference": "acc", "acc_reference_se": "acc_se"}


def compare(
    base: str | Path,
    finetuned: str | Path,
    out: str | Path,
    *,
    data: str | Path,
    names: Sequence[str] | None = None,
    ratios: Sequence[float] = (16, 32, 64),
    calibration: str | Path | None = None,
    tokens: int | None = None,
    length: int = 512,
    rows: int | None = None,
    distill_steps: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    plot: bool = True,
    bound: bool = True,
    base_revision: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress `finetuned` by each method to each size and compare the files on held-out text; fills the folder `out`.

    Args:
        base, finetuned: model folders or Hub ids; base_revision, revision: their Hub revisions.
        out: the folder to write to: a new or empty one, or one of the same models, texts and options, whose rows stay.
        data: the held-out text, see `bayou.evaluate`, of which `rows` rows or windows are scored, drawn by `seed`.
        names: methods (all of `methods.names()` unless given), by their own defaults. ratios: as for `bayou.compress`.
        calibration, tokens, length, distill_steps, seed, device: as for `bayou.compress`.
        plot: draw plot.svg, which needs matplotlib. bound: find the spectra, and how far each file is from the bound.

    Returns:
        candidates: one a method and size: method, asked (the ratio), and either reason (why there is no file; least,
        the fewest bytes that there could be) or file, root, bytes, ratio, seconds, and what `bayou.evaluate` says of
        it; with `bound` also lost (E of bound.py: the share of the delta's output that is lost), decibels (above
        the bound) and decibels_factors, cells (error and output of each kind of matrix and layer);
        reference: nll, and acc or ppl of the fine-tune itself; kind, rows and tokens of the held-out text;
        curves: bound and factors, each [bytes, E], and fixed; warnings: in words; shared: seconds of what was done
        once; versions, device, base and finetuned, settings: what was asked; original: bytes of the fine-tune.

    Raises:
        BadInput for held-out text that is the calibration's, a folder of another comparison, matplotlib missing, and
        whatever compress, load and evaluate raise; what is done by then is kept. A size that a method cannot reach,
        or a model or option that it cannot take, is a row with the reason; if no row has a file, the last such error.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("compare is one process; start it without torchrun")
    if plot:
        drawing.check("compare draws plot.svg with matplotlib; go without by --no-plot, or")
    told = progress or (lambda *_: None)
    asked = _asked(names, ratios, distill_steps, calibration)
    folder = Path(out)
    warnings = check_held_out(Path(data), calibration)
    job = _Comparison(base, finetuned, folder, base_revision, revision, device, told)
    settings = {
        "calibration": None if calibration is None else str(calibration),
        "tokens": tokens,
        "length": length,
        "distill_steps": distill_steps,
        "data": str(data),
        "rows": rows,
        "seed": seed,
    }
    job.open(settings, warnings, asked)
    with decompose.remembering(_VECTORS):
        job.run(bound)
    return job.finish(plot)


def _asked(
    names: Sequence[str] | None, ratios: Sequence[float], distill_steps: int | None, calibration: object
) -> list[tuple[str, float]]:
    chosen = list(dict.fromkeys(methods.names() if names is None else names))
    sizes = list(dict.fromkeys(float(ratio) for ratio in ratios))
    if not chosen or not sizes:
        raise BadInput("nothing to compare: name a method and a ratio at least")
    for ratio in sizes:
        preflight.check_size(ratio, None, "file")
    for name in chosen:
        distillation.ask(methods.get(name), None, distill_steps, "all", 0).check(calibration)
    return [(name, ratio) for name in chosen for ratio in sizes]


def check_held_out(data: Path, calibration: str | Path | None) -> list[str]:
    """Raises BadInput where the two are one file, or equal; a warning for lines that stand in both."""
    held = calibrate.read_text(data)
    if calibration is None or str(calibration) == "none":
        return []
    other = calibrate.read_text(Path(calibration))
    if held == other:
        raise BadInput(
            f"--data {data} is the text of --calibration {calibration}: files that were made for a text say nothing "
            "of others when they are scored on it; hold out some of its rows"
        )
    lines = [line for line in (line.strip() for line in held.split("\n")) if len(line) >= 40]
    seen = {line.strip() for line in other.split("\n")}
    common = sum(line in seen for line in lines)
    if not common:
        return []
    return [f"{common} of the {len(lines)} lines of {data} are in {calibration} too: what is said of them is too good"]


class _Comparison:
    """One folder of a comparison. state: what compare.json holds."""

    def __init__(
        self,
        base: str | Path,
        finetuned: str | Path,
        out: Path,
        base_revision: str | None,
        revision: str | None,
        device: str,
        progress: Progress,
    ) -> None:
        preflight.check_device(device)
        self.named = {"base": base, "finetuned": finetuned, "base_revision": base_revision, "revision": revision}
        self.out, self.work, self.device, self.progress = out, out / "work", device, progress
        self.base, self.tuned = Checkpoint(resolve(base, base_revision)), Checkpoint(resolve(finetuned, revision))
        self.skeleton = skeleton.build(self.tuned.folder)
        self.places = skeleton.places(self.skeleton, self.tuned.names())
        self.state: dict[str, Any] = {}
        self.refused: BayouError | None = None

    # ------------------------------------------------------------------------------------------ what is there already

    def open(self, settings: dict[str, Any], warnings: list[str], asked: list[tuple[str, float]]) -> None:
        """Take up the folder's comparison, or begin one; adds the rows that are asked for."""
        self.settings = settings
        self.tokenizer = calibrate.read_tokenizer(self.tuned.folder)
        most = getattr(self.skeleton.config.get_text_config(), "max_position_embeddings", None) or _WINDOW
        self.sampled = {"rows": settings["rows"], "length": min(_WINDOW, most), "seed": settings["seed"]}
        _, held = read_rows(Path(settings["data"]), self.tokenizer, **self.sampled)
        check_rows(held, self.skeleton.config, Path(settings["data"]))  # not first when hours have passed
        calibration = settings["calibration"]
        self.windows: Tensor | None = None
        if calibration != "none":
            source = None if calibration is None else Path(calibration)
            how = (source, self.tuned.folder, self.skeleton.config, settings["tokens"], settings["length"])
            self.windows = calibrate.windows(*how, seed=settings["seed"], device=self.device)
        key = self._key()
        path = self.out / "compare.json"
        if path.is_file():
            self.state = _read(path)
            if self.state.get("key") != key:
                raise BadInput(
                    f"{self.out} holds a comparison of other models, texts, options or versions; choose another folder"
                )
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise BadInput(f"{self.out} is no empty folder, and holds no comparison; choose another")
        else:
            self._make(self.out)
            self.state = {
                "bayou": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "device": torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else self.device,
                **{name: None if value is None else str(value) for name, value in self.named.items()},
                "settings": settings,
                "original": self.tuned.nbytes,
                "candidates": [],
                "shared": {},
                "warnings": warnings,
                "key": key,
            }
        have = {(row["method"], row["asked"]) for row in self.state["candidates"]}
        self.state["candidates"] += [
            {"method": name, "asked": ratio} for name, ratio in asked if (name, ratio) not in have
        ]
        self.state["candidates"].sort(key=lambda row: (row["method"], row["asked"]))
        self._save()

    def _key(self) -> str:
        """What determines the figures: models, texts, options, versions and the device."""
        prints = [
            {n: h.hex() for n, h in sorted(one.fingerprints(one.names()).items())} for one in (self.base, self.tuned)
        ]
        windows = None if self.windows is None else calibrate.digest(self.windows)
        data = hashlib.sha256(Path(self.settings["data"]).read_bytes()).hexdigest()
        options = {name: self.settings[name] for name in ("length", "distill_steps", "rows", "seed")}
        versions = [__version__, torch.__version__, transformers.__version__, self.device]
        return hashlib.sha256(json.dumps([versions, prints, windows, data, options]).encode()).hexdigest()

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"cannot make the folder {folder}: {error.strerror}") from None

    def _save(self) -> None:
        with atomic(self.out / "compare.json") as file:
            file.write(json.dumps(self.state, indent=1).encode() + b"\n")

    # ------------------------------------------------------------------------------------------ the rows

    def run(self, bound: bool) -> None:
        """Do what is not done yet of each row."""
        wanted = ("kl", "lost") if bound else ("kl",)
        todo = [
            row for row in self.state["candidates"] if "least" not in row and any(name not in row for name in wanted)
        ]
        if not todo:
            return
        self._make(self.work)
        kept = self._moments()
        models = measured.Models(self.base, self.tuned, self.places, kept, self.device)
        room = min(_LOGITS, shutil.disk_usage(self.work).free // 2)
        fine_tune = lambda: read_model(self.tuned.folder, self.device)  # noqa: E731
        reference = Remembered(self.skeleton.config, fine_tune, self.work / "logits", self.device, room)
        for done, row in enumerate(todo):
            self.progress("files", done, len(todo))
            file = self._compressed(row, kept)
            if file is not None and bound and "lost" not in row:
                self._measure(row, file, models)
            if file is not None and "kl" not in row:
                self._score(row, file, reference)
            self._save()
        self.progress("files", len(todo), len(todo))

    def _moments(self) -> MomentFiles | None:
        if self.windows is None:
            return None
        kept, started = MomentFiles(self.work / "moments", self.windows), time.perf_counter()
        if not kept.complete:
            show = lambda done, total: self.progress("calibration", done, total)  # noqa: E731
            kept.make(self.tuned, self.skeleton, self.places, self.device, show)
            self.state["shared"]["calibration"] = time.perf_counter() - started
            self._save()
        return kept

    def _compressed(self, row: dict[str, Any], kept: MomentFiles | None) -> DeltaFile | None:
        """The row's file, made where it is not there; None where it cannot be."""
        path = self.out / f"{row['method']}-{row['asked']:.12g}.bayou"
        if row.get("root") and path.is_file() and (file := DeltaFile(path)).root == row["root"]:
            return file
        name = f"compress: {row['method']} 1/{row['asked']:g}"
        try:
            report = compress(
                **self.named,  # type: ignore[arg-type]
                out=path,
                method=row["method"],
                ratio=row["asked"],
                calibration=self.settings["calibration"],
                tokens=self.settings["tokens"],
                length=self.settings["length"],
                distill_steps=self.settings["distill_steps"],
                seed=self.settings["seed"],
                device=self.device,
                moments=kept,
                progress=lambda step, done, total: self.progress(f"{name} {step}", done, total),
            )
        except (TooSmall, Unsupported, BadInput) as error:
            row["reason"], self.refused = str(error), error
            if isinstance(error, TooSmall):
                row["least"] = error.least
            return None
        row.pop("reason", None)
        file = DeltaFile(path)
        made = {"file": path.name, "root": file.root, "bytes": report.bytes, "ratio": report.ratio}
        row |= made | {"seconds": report.seconds, "steps": report.steps, "errors": report.errors}
        self._save()
        return file

    def _score(self, row: dict[str, Any], file: DeltaFile, reference: Remembered) -> None:
        candidate = load(self.base.folder, file, device=self.device)
        data = Path(self.settings["data"])
        found = evaluate(reference, candidate, self.tokenizer, data, device=self.device, **self.sampled)
        reference.release()
        self.state |= {name: found.pop(name) for name in ("kind", "rows", "tokens")}
        self.state["reference"] = {own: found.pop(name) for name, own in _REFERENCE.items() if name in found}
        row |= found

    # ------------------------------------------------------------------------------------------ the bound

    def _measure(self, row: dict[str, Any], file: DeltaFile, models: measured.Models) -> None:
        spectra = self._spectra(file, models)
        name = f"errors: {row['method']} 1/{row['asked']:g}"
        losses = models.losses(file, spectra, lambda done, total: self.progress(name, done, total))
        row |= {"lost": measured.total(losses, spectra), "cells": measured.cells(file, losses)}

    def _spectra(self, file: DeltaFile, models: measured.Models) -> dict[str, Spectrum]:
        """Those of all coded matrices, and the curves; found with the first file, and kept beside the moments."""
        path, started = self.work / "spectra.safetensors", time.perf_counter()
        if path.is_file():
            with safe_open(path, "pt") as kept:
                shapes = json.loads(kept.metadata()["shapes"])
                return {name: Spectrum(tuple(shape), kept.get_tensor(name)) for name, shape in shapes.items()}
        spectra = models.spectra(file, lambda done, total: self.progress("spectra", done, total))
        both = Bound(list(spectra.values()), measured.fixed_bytes(file))
        curves = {name: [list(point) for point in points] for name, points in both.curves().items()}
        self.state["curves"] = {**curves, "fixed": both.fixed}
        self.state["shared"]["spectra"] = time.perf_counter() - started
        self._save()
        with atomic(path) as handle:
            shapes = json.dumps({name: one.shape for name, one in spectra.items()})
            handle.write(save({name: one.energies.contiguous() for name, one in spectra.items()}, {"shapes": shapes}))
        return spectra

    def _place(self) -> None:
        """Each row's distance from the curves."""
        for row in (row for row in self.state["candidates"] if row.get("lost", 0) > 0):
            curves = self.state["curves"]
            row["decibels"] = decibels(row["lost"], curves["bound"], row["bytes"])
            row["decibels_factors"] = decibels(row["lost"], curves["factors"], row["bytes"])

    def finish(self, plot: bool) -> dict[str, Any]:
        """Write the outputs and remove the work."""
        if not any("kl" in row for row in self.state["candidates"]):
            shutil.rmtree(self.work, ignore_errors=True)
            raise self.refused or BayouError(f"{self.out}: no method reaches any of the sizes; see compare.json")
        self._place()
        self._save()
        picture = drawing.comparison(self.state) if plot else ""
        if picture:
            with atomic(self.out / "plot.svg") as file:
                file.write(picture.encode())
        with atomic(self.out / "report.html") as file:
            file.write(page.html(self.state, picture).encode())
        shutil.rmtree(self.work, ignore_errors=True)
        return self.state


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        raise BadInput(f"{path} is not what `bayou compare` writes; choose another folder") from None
