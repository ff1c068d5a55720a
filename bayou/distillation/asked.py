"""What a user asks of distilling, what is refused, and what comes of it.

"all" is our own: every stored float, by KL, on the text given or on the fine-tune's own. "gains" is BitDelta's: one
number a term, by squared error (gains.py). A method whose paper distils does the latter unless something is asked for.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bayou import objective, skeleton
from bayou.checkpoint import Checkpoint
from bayou.contents import Exact
from bayou.delta import Term
from bayou.deltafile import DeltaFile
from bayou.distillation import gains, samples
from bayou.distillation.student import Student
from bayou.distillation.training import Recipe, train
from bayou.errors import BadInput

LARGE = 3 * 10**9
"""Bytes of a fine-tune from which on a GPU trains in bf16; the rounding of bf16 is a KL of its own, some 1e-4."""

Windows = Callable[[str | Path | Tensor | None, int, int], Tensor | None]


@dataclass(frozen=True)
class Amounts:
    """How much text is taken. length: of a window; given: tokens of the user's text, at most; own: windows sampled, so
    many `together`; batch: windows a step; held: windows held back, at most."""

    length: int
    given: int
    own: int
    together: int
    batch: int
    held: int


_CPU, _GPU = Amounts(128, 2**18, 96, 32, 4, 16), Amounts(512, 2**22, 768, 128, 8, 64)


@dataclass(frozen=True)
class Distilled:
    """What is stored in the place of what was: terms by site name, exact tensors by theirs; and a report."""

    terms: dict[str, tuple[Term, ...]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def exact(self, stored: list[Exact]) -> list[Exact]:
        """The exact tensors of a file, with those that were trained."""
        new = self.tensors
        return [replace(one, read=partial(new.__getitem__, one.name)) if one.name in new else one for one in stored]


@dataclass(frozen=True)
class Asked:
    """what: all or gains. steps, or minutes of training (0 and None: none). seed: of the order and of samples."""

    what: str
    steps: int
    minutes: float | None
    seed: int

    def __bool__(self) -> bool:
        return bool(self.steps or self.minutes)

    def told(self) -> list[Any]:
        """What of this determines a file's bytes."""
        return [self.what, self.steps, self.minutes, *([self.seed] if self and self.what == "all" else [])]

    def check(self, calibration: object) -> None:
        """Raises BadInput where there is no text for gains: BitDelta's recipe knows no other."""
        if self.steps and self.what == "gains" and isinstance(calibration, str) and calibration == "none":
            raise BadInput(
                f"{self.steps} steps of fitting gains need a text, and --calibration none gives none; "
                "give one, or --distill-steps 0"
            )

    def suits(self, model: PreTrainedModel) -> None:
        """Raises Unsupported for a model whose logits training does not know how to make; needs no weights."""
        if self and self.what == "all":
            objective.head(model)

    def text(self, windows: Windows, calibration: str | Path | Tensor | None, device: str) -> Tensor | None:
        """Windows of the text to train on; None where nothing is trained, or on the fine-tune's own.

        windows(calibration, tokens, length) reads them. Raises BadInput for fewer than two.
        """
        if not self:
            return None
        if self.what == "gains":
            return windows(calibration, self.steps * gains.BATCH * gains.LENGTH, gains.LENGTH)
        if calibration is None or (isinstance(calibration, str) and calibration == "none"):
            return None
        size = amounts(device)
        found = windows(calibration, size.given, size.length)
        if found is None or len(found) < 2:
            raise BadInput(
                f"{calibration} has too little text to distil on: two windows of {size.length} tokens are the least; "
                "give more, or --calibration none, and the fine-tune writes its own"
            )
        return found

    def run(
        self,
        base: Path,
        tuned: Checkpoint,
        file: DeltaFile,
        text: Tensor | None,
        device: str,
        progress: Callable[[str, int, int], None],
    ) -> Distilled:
        """Distil the fine-tune `tuned` into `file` as it is so far."""
        started = time.monotonic()
        if self.what == "gains":
            assert text is not None  # Asked.check sees to it
            told = lambda done, total: progress("distil", done, total)  # noqa: E731
            fitted = gains.fit(base, tuned, file, text, steps=self.steps, device=device, progress=told)
            report = {"what": "gains", "steps": self.steps, "seconds": time.monotonic() - started}
            return Distilled(fitted, {}, report)
        return self._all(base, tuned, file, text, torch.device(device), progress)

    def _all(
        self,
        base: Path,
        tuned: Checkpoint,
        file: DeltaFile,
        text: Tensor | None,
        device: torch.device,
        progress: Callable[[str, int, int], None],
    ) -> Distilled:
        large = device.type == "cuda" and tuned.nbytes >= LARGE
        dtype = torch.bfloat16 if large else torch.float32
        teacher = skeleton.build(tuned.folder)
        skeleton.fill(teacher, "", skeleton.places(teacher, tuned.names()), tuned.read, dtype=dtype, device=device)
        places = skeleton.places(teacher, file.tensors())
        student = Student(base, file, places, dtype=dtype, device=device)
        if not student.values.parameters():
            return Distilled(report={"what": "nothing to train", "steps": 0, "kept": False})
        started, size = time.monotonic(), amounts(device.type)
        until = None if self.minutes is None else started + 60 * self.minutes
        own = text is None
        if text is None:
            told = lambda done, total: progress("sample", done, total)  # noqa: E731
            how = {"batch": size.together, "seed": self.seed}
            length = min(size.length, getattr(teacher.config.get_text_config(), "max_position_embeddings", size.length))
            text = samples.windows(teacher, size.own, length, **how, progress=told)
        found = train(
            student,
            teacher,
            text,
            Recipe(batch=size.batch, held_most=size.held, seed=self.seed),
            steps=None if self.minutes is not None else self.steps,
            until=until,
            progress=lambda done, total: progress("distil", done, total),
        )
        kept = found.best > 0
        report = {"what": "all", "text": "the fine-tune's own" if own else "given", "kept": kept, **asdict(found)}
        report["seconds"] = time.monotonic() - started
        return Distilled(student.terms(), student.exact(), report) if kept else Distilled(report=report)


def amounts(device: str) -> Amounts:
    return _CPU if torch.device(device).type == "cpu" else _GPU


def ask(method: ModuleType, minutes: float | None, steps: int | None, what: str, seed: int) -> Asked:
    """What is asked for by --distill, --distill-steps and --distill-what, or by the method where that is nothing.

    Raises BadInput for what does not go together.
    """
    if what not in ("all", "gains"):
        raise BadInput(f"--distill-what {what}: choose all or gains")
    if minutes is not None and steps is not None:
        raise BadInput(f"give --distill ({minutes:g} minutes) or --distill-steps ({steps}), not both")
    if minutes is not None and (what == "gains" or not minutes >= 0):
        raise BadInput(
            f"--distill {minutes:g}: minutes of 0 or more are needed; gains are fitted in steps, --distill-steps 200"
        )
    if steps is not None and steps < 0:
        raise BadInput(f"--distill-steps {steps}: a number of 0 or more is needed")
    if minutes is None and steps is None:
        own = int(getattr(method, "DISTILL_STEPS", 0))
        if what == "gains" and not own:
            raise BadInput("--distill-what gains needs --distill-steps, e.g. 200")
        return Asked("gains", own, None, seed)
    return Asked(what, steps or 0, minutes, seed)


def words(report: dict[str, Any]) -> str:
    """The report of a distilling, for people."""
    if "after" not in report:
        return f"{report['what']}, {report['steps']} steps"
    if not report["steps"]:
        return "not one step fitted into the time; the file is as it was"
    how = "{steps} steps on {tokens:,} tokens ({text}) in {seconds:.0f} s".format(**report)
    if not report["kept"]:
        return "{how} did not help (KL {before:.5f} on {held} held-back windows); the file is as it was".format(
            how=how, **report
        )
    return "KL {before:.5f} -> {after:.5f} on {held} held-back windows; {how}".format(how=how, **report)
