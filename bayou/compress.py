"""From a base and a fine-tune to one small file. START READING HERE.

    take stock of every tensor        inventory.take
    choose ranks for the budget       allocate.allocate
    walk the layers, encode           encoder.Encoder, methods.NAME.encode
    train what is stored in floats    distillation.Asked.run
    write, atomically                 contents.Contents.write

Encoded sites go to OUT.journal/ one by one, so memory holds about a layer, and a killed run goes on where it was.
"""

import hashlib
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from bayou import (
    allocate,
    calibrate,
    clock,
    coded,
    distillation,
    exact,
    inventory,
    methods,
    preflight,
    sidecar,
    skeleton,
    workers,
)
from bayou.checkpoint import Checkpoint, resolve
from bayou.contents import Contents
from bayou.delta import Delta, Term
from bayou.deltafile import DeltaFile
from bayou.distillation import Asked, Distilled
from bayou.encoder import Encoder, Progress
from bayou.entry import pack_terms
from bayou.errors import BadInput, TooSmall
from bayou.journal import Journal
from bayou.momentfiles import MomentFiles
from bayou.outcome import Report, errors_by_role
from bayou.plan import SiteRecord
from bayou.spending import Spending
from bayou.version import __version__
from bayou.workers import Workers

EMBEDDING_RATE = 0.5
"""Bytes a weight of embeddings and heads, relative to the linears' (LOG.md has the sweep)."""


def compress(
    base: str | Path | Checkpoint,
    finetuned: str | Path | Checkpoint,
    out: str | Path,
    *,
    method: str = "deltacome",
    options: dict[str, Any] | None = None,
    ratio: float | None = None,
    budget: int | None = None,
    accounting: Literal["file", "paper"] = "file",
    keep: tuple[str, ...] = (),
    embedding_rate: float = EMBEDDING_RATE,
    embedding_options: dict[str, Any] | None = None,
    calibration: str | Path | Tensor | None = None,
    tokens: int | None = None,
    length: int = 512,
    activations: calibrate.Activations | None = None,
    distill: float | None = None,
    distill_steps: int | None = None,
    distill_what: str = "all",
    entropy: bool | None = None,
    seed: int = 0,
    device: str = "cpu",
    base_revision: str | None = None,
    revision: str | None = None,
    moments: MomentFiles | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write the file `out` by which `restore` and `load` make `finetuned` from `base`.

    Args:
        base, finetuned: model folders or Hub ids, or such opened; base_revision, revision: their Hub revisions.
        method: a name of `methods.names()`; options: its keyword arguments, e.g. {"bands": "8x2,3x32,2"}.
        ratio: the file is at most the bytes of the fine-tune's weight files over this (16 if neither is given; for
            "exact" no limit).
        budget: the same as a number of bytes. A method of one size (bitdelta) may leave some of it unused.
        accounting: "paper" takes Delta-CoMe's nominal budget instead, 16 / ratio bits a weight of each linear in
            codes alone, with embeddings and all else exact; the file is then larger than its ratio.
        keep: what is stored exactly: embeddings, heads, norms, biases, linears, experts, or patterns of names.
        embedding_rate: bytes a weight of embeddings relative to linears'. embedding_options: {"method": ..., ...}.
        calibration: a text or .jsonl file (see calibrate.read_tokens); "none" goes without; None takes English text
            that Python carries; a tensor is windows of ids, (windows, length). tokens: 32,768 on the CPU and 262,144
            on a GPU unless given; length: of a window.
        activations: whose activations calibrate: the fine-tune's own, the partly compressed model's, or both
            ("corrected": each matrix makes good what those before it have lost). None is the method's own choice.
        distill: minutes of training what is stored in floats (scales, gains, norms, biases) to the fine-tune's logits,
            on the calibration's text, or for None and "none" on the fine-tune's own. distill_steps: a number of steps
            instead (0: none). distill_what: "gains" is BitDelta's recipe, which the method of that name has by itself.
        entropy: code the terms' bytes by their entropy: the file is then smaller than asked for, a tenth or more, and
            takes a little longer to load. "exact" does so always, and "auto" unless told not to; auto's ranks are
            chosen so that the coded file has the size.
        device: "cuda" calibrates in bf16 and encodes matrices of one shape together. Under torchrun the processes
            share out the matrices, "cuda" being a GPU for each; the file is that of a single process.
        moments: what a calibration on the same text has found of the fine-tune's activations; spares another one.

    Raises:
        TooSmall: the size cannot be reached; names the least that can. BadInput, Unsupported, JournalMismatch, and
        BayouError for a full disk. Nothing is left at `out` then, or the old file is untouched.
    """
    started = time.perf_counter()
    preflight.check_size(ratio, budget, accounting)
    preflight.check_activations(activations)
    asked = distillation.ask(methods.get(method), distill, distill_steps, distill_what, seed)
    asked.check(calibration)
    chosen_by_method = activations is None
    activations = activations or methods.activations(method)
    sized = entropy is not False and accounting == "file" and methods.is_sized(method)
    entropy = sized if entropy is None else entropy
    with clock.measuring() as steps, workers.joined() as here:
        job = _Job(base, finetuned, Path(out), base_revision, revision, device, here, progress or (lambda *_: None))
        chosen = methods.check(method, options or {})
        tables = embedding_options or methods.get(method).EMBEDDINGS
        exact.check(method, tables.get("method", method), accounting, bool(asked))
        asked.suits(job.model)
        if accounting == "paper":
            keep = (*keep, "embeddings")
        with clock.step("take stock"):
            job.take_stock(method, chosen, tables, keep)
        if accounting == "paper":
            job.contents = replace(job.contents, sites=allocate.by_paper(job.sites, ratio or 16.0))
        elif not job.bit_for_bit:
            job.allocate(ratio, budget, embedding_rate, sized, bool(asked))
        needs = any(getattr(methods.get(site.method), "USES_GRAM", False) for site in job.sites if site.method)
        windows = job.windows(calibration, tokens, length, seed) if needs else None
        if moments is not None and windows is not None:
            if activations != "finetuned" and not chosen_by_method:
                raise BadInput("the moments of compressed activations depend on the file; go without moments")
            moments.check(windows)
        if activations != "finetuned":
            moments = None
        text = asked.text(partial(job.windows, seed=seed), calibration, device)
        with clock.step("hash"):
            key = job.key(windows, activations, text, asked.told())
        held = Journal(job.out, key, guest=not here.first)
        # What comes of exact nobody knows yet: half of the fine-tune is a careful guess.
        size = job.tuned.nbytes // 2 if job.bit_for_bit else job.contents.nbytes()
        preflight.check_room(job.out, held.folder, size, 3 if asked or entropy else 2)
        if not here.first:
            here.wait()  # until the journal is there
        with held as journal:
            if here.first:
                here.wait()
            if job.bit_for_bit:
                job.encode_exactly(journal)
            else:
                job.encode(journal, windows, activations, moments)
            here.wait()  # until all have read what they want of the journal, which the first one ends
            if job.bit_for_bit:
                job.check_limit(ratio, budget)
            found = job.distil(journal, text, asked) if asked and here.first else Distilled()
            if here.first:
                with clock.step("write"):
                    job.write(journal, job.out, found.terms, entropy and not job.bit_for_bit)
                journal.finish()
            here.wait()
        size = job.out.stat().st_size
        steps_now = dict(steps)
    errors = errors_by_role(job.sites, job.errors)
    seconds = time.perf_counter() - started
    counts = (len(job.sites), len(job.contents.exact), len(job.contents.unchanged))
    return Report(str(out), method, size, job.tuned.nbytes / size, *counts, seconds, steps_now, errors, found.report)


def _opened(model: str | Path | Checkpoint, revision: str | None) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else Checkpoint(resolve(model, revision))


class _Job:
    """One compression: the two checkpoints, what stands for each tensor, and the steps in their order."""

    def __init__(
        self,
        base: str | Path | Checkpoint,
        finetuned: str | Path | Checkpoint,
        out: Path,
        base_revision: str | None,
        revision: str | None,
        device: str,
        workers: Workers,
        progress: Progress,
    ) -> None:
        preflight.check_device(device)
        preflight.check_revision(base_revision)
        self.out, self.device, self.workers, self.progress = out, device, workers, progress
        self.base, self.tuned = _opened(base, base_revision), _opened(finetuned, revision)
        self.base_id = "" if isinstance(base, Checkpoint) or Path(base).is_dir() else str(base)
        self.revision = base_revision or (preflight.snapshot_commit(self.base.folder) if self.base_id else "")
        for folder in (self.base.folder, self.tuned.folder):
            preflight.check_output(out, folder)
        self.model = skeleton.build(self.tuned.folder)
        self.places = skeleton.places(self.model, self.tuned.names())
        self.errors: dict[int, float] = {}
        self.spending: Spending | None = None

    # ------------------------------------------------------------------------------------------ the Plan

    def take_stock(self, method: str, options: dict[str, Any], tables: dict[str, Any], keep: tuple[str, ...]) -> None:
        self.bit_for_bit = exact.is_exact(method)
        base_places = skeleton.places(skeleton.build(self.base.folder), self.base.names())
        matched = inventory.match(self.base, self.tuned, base_places, self.places)
        if not matched:
            raise BadInput(
                f"no tensor of {self.tuned.folder} has a counterpart in {self.base.folder}; is it the right base?"
            )
        found = inventory.take(
            self.base,
            self.tuned,
            matched,
            self.places,
            method=method,
            options=options,
            tables=tables,
            keep=keep,
            device=self.workers.device(self.device),
        )
        used = {site.reference for site in found.sites if site.reference is not None} | set(found.unchanged)
        old, new = sidecar.carried(self.base.folder), sidecar.carried(self.tuned.folder)
        with clock.step("hash"):
            fingerprints = self.base.fingerprints(sorted(used))
        same = {name: sidecar.digest(content) for name, content in new.items() if old.get(name) == content}
        differing = {name: sidecar.difference(old.get(name), new[name]) for name in new if name not in same}
        self.contents = Contents(
            sites=found.sites,
            exact=found.exact,
            unchanged=found.unchanged,
            base_id=self.base_id,
            revision=self.revision,
            used=fingerprints,
            files=same,
            changed_files=differing,
        )

    @property
    def sites(self) -> list[SiteRecord]:
        return self.contents.sites

    def allocate(
        self, ratio: float | None, budget: int | None, embedding_rate: float, sized: bool, distilled: bool
    ) -> None:
        limit, what = self._limit(ratio or 16.0, budget)
        if sized:
            # Trained scales do not code as those that the ranks were chosen by: a little is left for them.
            self.spending = Spending(self.contents, limit - distilled * limit // 200, what, embedding_rate)
            self.contents = replace(self.contents, sites=self.spending.sites)
            return

        def size(sites: list[SiteRecord]) -> int:
            return replace(self.contents, sites=sites).nbytes()

        sites, least = allocate.within(self.sites, limit, size, embedding_rate=embedding_rate)
        if least > limit:
            room = least - sum(site.nbytes for site in sites)
            raise TooSmall(
                f"{what} is {limit:,} bytes, but the least that this method can make of this model is {least:,} bytes "
                f"({room:,} of them exact tensors and header); ask for a larger file, or choose another method",
                least,
            )
        self.contents = replace(self.contents, sites=sites)

    def _limit(self, ratio: float, budget: int | None) -> tuple[int, str]:
        """The most bytes that the file may have, and what asks for that."""
        if budget is not None:
            return budget, f"--budget {budget:,}"
        return int(self.tuned.nbytes / ratio), f"--ratio {ratio:g}"

    def check_limit(self, ratio: float | None, budget: int | None) -> None:
        """Raises TooSmall where a size was asked for that the encoded sites do not keep."""
        if ratio is None and budget is None:
            return
        exact.check_size(self.contents.nbytes(), *self._limit(ratio or 1.0, budget))

    # ------------------------------------------------------------------------------------------ calibration

    def windows(
        self, calibration: str | Path | Tensor | None, tokens: int | None, length: int, seed: int
    ) -> Tensor | None:
        if isinstance(calibration, Tensor):
            return calibration
        if calibration == "none":
            return None
        source = None if calibration is None else Path(calibration)
        config = self.model.config
        return calibrate.windows(source, self.tuned.folder, config, tokens, length, seed=seed, device=self.device)

    def key(self, windows: Tensor | None, activations: str, text: Tensor | None, distil: list[Any]) -> str:
        """What determines the bytes: inputs, Plan, calibration, versions, device and threads."""
        hashes = self.tuned.fingerprints(self.tuned.names())
        calibration = [None if ids is None else [*ids.shape, calibrate.digest(ids)] for ids in (windows, text)]
        parts = [
            __version__,
            torch.__version__,
            transformers.__version__,
            self.device,
            torch.get_num_threads(),
            self.contents.metadata(),
            {name: value.hex() for name, value in sorted(hashes.items())},
            calibration,
            activations,
            distil,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def encode(
        self,
        journal: Journal,
        windows: Tensor | None,
        activations: calibrate.Activations,
        moments: MomentFiles | None,
    ) -> None:
        """Every site goes into the journal; finds their errors, and the ranks where the coded size is asked for."""
        device = self.workers.device(self.device)
        parts = (self.base, self.tuned, self.model, self.places, self.sites, device, self.workers, self.progress)
        encoder = Encoder(*parts)
        encoder.encode(journal, windows, activations, moments, self.spending)
        self.errors = encoder.errors
        self.contents = replace(self.contents, sites=[replace(site, coded=0) for site in encoder.sites])

    def encode_exactly(self, journal: Journal) -> None:
        """Every site goes into the journal; the Plan is then what came of it."""
        sites = exact.encode(self.base, self.tuned, self.sites, journal, self.workers, self.progress)
        self.contents = replace(self.contents, sites=sites)
        self.errors = dict.fromkeys(range(len(sites)), 0.0)

    def distil(self, journal: Journal, text: Tensor | None, asked: Asked) -> Distilled:
        """Trains on the file as it is so far, written beside the journal's sites; the exact tensors are then new."""
        draft = journal.folder / "draft.bayou"
        self.write(journal, draft, {})
        device = self.workers.device(self.device)
        with clock.step("distil"):
            try:
                found = asked.run(self.base.folder, self.tuned, DeltaFile(draft), text, device, self.progress)
            finally:
                draft.unlink()  # the output needs its room
        self.contents = replace(self.contents, exact=found.exact(self.contents.exact))
        return found

    # ------------------------------------------------------------------------------------------ the file

    def write(self, journal: Journal, path: Path, terms: dict[str, tuple[Term, ...]], small: bool = False) -> int:
        """Write the file to `path`, with distilled `terms` of the sites that have any; returns its bytes.

        small: with coded terms, which lie in the journal until then: the header comes first and has their sizes.
        """

        def blob(index: int) -> bytes:
            if (name := self.sites[index].name) in terms:
                return pack_terms(terms[name])
            return held(index)

        def held(index: int) -> bytes:
            done = journal.get(index)
            assert done is not None  # every site has been encoded by now
            return done[0]

        for index, site in enumerate(self.sites):
            if site.name in terms:
                delta = Delta(site.shape, terms[site.name]).to(self.device)
                matrix = inventory.delta_matrix(site, self.base, self.tuned, self.device)
                self.errors[index] = inventory.relative_error(matrix, delta)
        count, errors = len(self.sites), [self.errors[i] for i in range(len(self.sites))]
        if not small:
            return self.contents.write(path, blob, errors)
        sites = coded.shrink(self.sites, blob, lambda index, raw: journal.put(count + index, raw, errors[index]))
        return replace(self.contents, sites=sites).write(path, lambda index: held(count + index), errors)
