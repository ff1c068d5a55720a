"""Train a smaller model after the one it was made of: `bayou share --train`, and the search for how.

One loop (bayou.sharing.train) for shared models and rivals. With `search`, a few short trainings on a share of the
tokens come first; their numbers are chosen by the loss on windows that they did not see, and what each came to is kept
in a file beside the checkpoint, so that a run that was stopped goes on without doing them again.
"""

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayou import objective, skeleton
from bayou.checkpoint import atomic
from bayou.errors import BadInput, Diverged, JournalMismatch
from bayou.sharing import Shared, student, tune
from bayou.sharing import train as trainer
from bayou.sharing.baselines.baseline import Baseline, load
from bayou.sharing.draft import Draft
from bayou.sharing.original import Original, Progress
from bayou.sharing.student import Replacement

OWN = "deltallm"
RATE, WHOLE_RATE = 1e-3, 1e-4
"""Peak learning rates where none is given: of factors and LoRAs, and of matrices that are trained whole."""
TRIAL, STEPS = 10, 20
"""A trial of a search trains on one of so many parts of the tokens, and takes so many steps at least (or all)."""
HELD = 65_536
"""Tokens that trials are measured on, at most a tenth of the text."""


@dataclass(frozen=True)
class Training:
    """How a smaller model is trained after its original (bayou.sharing.train); --train of the command.

    text: a text or .jsonl file. tokens: to train on; the text is taken again where it runs out. batch: windows of
    `length` tokens a step; where the text fills fewer, all of them, which progress and report say. rate: peak of AdamW;
    None is RATE, or WHOLE_RATE. alpha: share of KL(model || student) in the loss, the rest is cross-entropy.
    progressive: Progressive Module Replacement, whose probability begins at `start`; else the deltas run from the
    start. gain: train the gains too. lora: rank of LoRA on the rest, 0: none. whole: train the rest whole instead,
    embeddings and norms too. rest_rate: peak rate of the rest; None is `rate`. search: trials of rate, alpha and start,
    on a tenth of the tokens (or STEPS steps) each, those given first; the rate is looked for within a factor of ten.

    From progressive to rest_rate: of shared models alone. A rival's recovery is LoRA, or of some modules whole, as its
    Baseline says.
    """

    text: str | Path
    tokens: int = 15_000_000
    rate: float | None = None
    alpha: float = 0.5
    batch: int = 32
    length: int = 512
    progressive: bool = True
    blend: bool = False
    gain: bool = True
    lora: int = 0
    start: float = Replacement.start
    whole: bool = False
    rest_rate: float | None = None
    search: int = 0

    def __post_init__(self) -> None:
        rate = RATE if self.rate is None else self.rate
        least = min(self.tokens, self.batch) >= 1 and min(self.lora, self.search) >= 0
        if not (0 <= self.alpha <= 1 and 0 <= self.start <= 1 and rate > 0 and least):
            raise BadInput(
                f"cannot train with alpha {self.alpha:g}, PMR from {self.start:g} on, rate {rate:g}, LoRA of rank "
                f"{self.lora}, {self.tokens} tokens, {self.batch} windows a step, {self.search} trials: alpha and PMR "
                "are of 0 to 1, the rate is above 0, rank and trials are 0 or more"
            )
        if self.rest_rate is not None and (self.rest_rate <= 0 or not (self.lora or self.whole)):
            raise BadInput(
                f"a rate of {self.rest_rate:g} for the rest: it must be above 0, and the rest be trained, by --lora or "
                "--whole"
            )
        if self.lora and self.whole:
            raise BadInput(f"--lora {self.lora} and --whole both train what is not tied: choose one")
        if not self.progressive and (self.blend or self.start != Replacement.start):
            raise BadInput("--blend and --pmr-start say how to replace progressively: leave out --no-pmr")

    @property
    def general(self) -> bool:
        """Whether nothing is set that is of shared models alone."""
        alone = (self.progressive, self.blend, self.gain, self.lora, self.start, self.whole, self.rest_rate)
        return alone == (True, False, True, 0, Replacement.start, False, None)


def train(draft: Draft, training: Training, checkpoint: Path, progress: Progress, *, seed: int = 0) -> Draft:
    """The draft after training: its factors and gains, and, with LoRA on the rest, the tensors that it changed.

    checkpoint: where the run is kept, and goes on from; a search's trials are in a file beside it. On the CPU in fp32.
    Raises BadInput, Diverged, JournalMismatch.
    """
    original, training = draft.original, replace(training, rate=training.rate or RATE)
    model = skeleton.build(original.folder)
    skeleton.fill(model, "", original.places, original.checkpoint.read, device=original.device)
    teacher = student.twin(model)
    with torch.no_grad():
        for name, value in draft.tensors.items():  # learned anchors: the student's alone
            path = original.places[name].path
            parent, _, leaf = path.rpartition(".")
            own = model.get_parameter(path)
            setattr(model.get_submodule(parent), leaf, nn.Parameter(value.to(own.device, own.dtype), False))

    def enrol(training: Training) -> tuple[trainer.Pupil, student.Student]:
        schedule = Replacement(start=training.start, blend=training.blend, seed=seed) if training.progressive else None
        learner = student.apply(
            student.twin(model),
            draft.shared,
            replacement=schedule,
            train_gain=training.gain,
            lora_rank=training.lora,
            rest=training.whole,
            seed=seed,
        )
        parameters, rate = tuple(learner.parameters()), training.rate or RATE
        multiples = learner.multiples((training.rest_rate or rate) / rate)
        identity = _identity(draft, training)
        return trainer.Pupil(OWN, learner.model, parameters, rate, learner.advance, multiples, identity), learner

    school = _School(original, teacher, training, _identity(draft, training), checkpoint, progress, seed)
    learner, told = school.taught(enrol)
    learner.finish()
    by_path = {place.path: name for name, place in original.places.items()}
    changed = {by_path[path]: value.cpu() for path, value in learner.dense().items()}
    shared = Shared(learner.factors(), draft.shared.dropped)
    return replace(draft, shared=shared, tensors=draft.tensors | changed, trained=told)


def train_rival(
    original: Original, rival: Baseline, training: Training, checkpoint: Path, progress: Progress, *, seed: int = 0
) -> tuple[Baseline, dict[str, Any]]:
    """A rival after its recovery training (Baseline.trainable), and what that came to; otherwise as `train`."""
    rate = training.rate or (WHOLE_RATE if rival.tuned else RATE)
    training = replace(training, rate=rate, progressive=False, start=Replacement.start)
    teacher = load(original.folder, device=original.device)
    merged = rival.description.get("merged_layers")
    what = [rival.name, rival.removed, rival.origin, sorted(rival.zeroed), rival.tuned, merged]
    identity = hashlib.sha256(json.dumps([_fingerprints(original), what]).encode()).hexdigest()

    def enrol(training: Training) -> tuple[trainer.Pupil, Baseline]:
        # What is trained whole must be the student's own; LoRAs leave the matrices below them as they are.
        model = copy.deepcopy(rival.model) if rival.tuned else student.twin(rival.model)
        learner = replace(rival, model=model)
        parameters = tuple(learner.trainable(seed=seed))
        return trainer.Pupil(rival.name, model, parameters, training.rate or rate, identity=identity), learner

    learner, told = _School(original, teacher, training, identity, checkpoint, progress, seed).taught(enrol)
    learner.finish()
    return learner, told


Learner = TypeVar("Learner")
Enrol = Callable[[Training], tuple[trainer.Pupil, Learner]]
"""A new student, untrained, as a training wants it: as the loop sees it, and as itself."""


class _School:
    """What is the same for all students: the text, the teacher, where the run is kept."""

    def __init__(
        self,
        original: Original,
        teacher: PreTrainedModel,
        training: Training,
        identity: str,
        checkpoint: Path,
        progress: Progress,
        seed: int,
    ) -> None:
        self.teacher, self.training, self.identity = teacher, training, identity
        self.checkpoint, self.progress, self.seed = checkpoint, progress, seed
        windows = original.windows(training.text, training.tokens, training.length, seed)
        if windows is None:
            raise BadInput("--train none: a text to train on is needed")
        self.windows, self.batch = windows, _batch(training.batch, len(windows))
        self.asked = min(training.batch, max(1, training.tokens // windows.shape[1]))

    def taught(self, enrol: Enrol[Learner]) -> tuple[Learner, dict[str, Any]]:
        """A student after its training, by the numbers that a search chose if asked for, and what it came to."""
        chosen, searched = self._searched(enrol) if self.training.search else (self.training, {})
        pupil, learner = enrol(chosen)

        def show(at: trainer.Progress) -> None:
            said = f"{self.batch} windows a step, all that the text fills, " if self.batch < self.asked else ""
            self.progress(f"train: {said}{_told(at, chosen)}", at.step, at.steps)

        fitted = self._fit(pupil, self.windows, chosen, self.training.tokens, show, self.checkpoint)
        text = {"windows": len(self.windows), "length": self.windows.shape[1], "batch": self.batch}
        return learner, _trained(fitted, chosen) | text | {"batch_asked": self.asked} | searched

    def _fit(
        self,
        pupil: trainer.Pupil,
        windows: Tensor,
        chosen: Training,
        tokens: int,
        show: Callable[[trainer.Progress], None],
        checkpoint: Path | None = None,
    ) -> trainer.Fitted:
        recipe = trainer.Recipe(alpha=chosen.alpha, batch=_batch(self.batch, len(windows)), seed=self.seed)
        return trainer.fit([pupil], self.teacher, windows, recipe, tokens=tokens, checkpoint=checkpoint, progress=show)

    def _searched(self, enrol: Enrol[Any]) -> tuple[Training, dict[str, Any]]:
        """The training with the numbers of least held-out loss, and what a report says of the search."""
        asked = self.training
        held = max(1, min(len(self.windows) // 10, HELD // self.windows.shape[1]))
        if len(self.windows) < 2:
            raise BadInput(f"--search {asked.search} measures on windows held out of the text, and it fills but one")
        windows, unseen = self.windows[:-held], self.windows[-held:]
        least = STEPS * _batch(self.batch, len(windows)) * windows.shape[1]
        tokens = min(asked.tokens, max(asked.tokens // TRIAL, least))
        own = {name: value for name, value in asdict(asked).items() if name not in ("text", "search")}
        text = hashlib.sha256(self.windows.contiguous().numpy().tobytes()).hexdigest()
        trials = _Trials(self.checkpoint, [self.identity, own, text, self.seed])
        number = 0

        def measured(values: tune.Values) -> float:
            nonlocal number
            number += 1
            loss = trials.known(values)
            if loss is None:
                tried = _with(asked, values)
                pupil, _ = enrol(tried)

                def show(at: trainer.Progress) -> None:
                    step = f"search: trial {number} of {asked.search}, "
                    done = (number - 1) * at.steps + at.step
                    self.progress(step + _told(at, tried), done, asked.search * at.steps)

                try:
                    self._fit(pupil, windows, tried, tokens, show)
                    if pupil.advance is not None:
                        pupil.advance(1.0, 0)  # all replaced, as it will be used
                    ce, kl = objective.measure(pupil.model, unseen, self.teacher)
                    loss = _agreed((1 - asked.alpha) * ce + asked.alpha * kl)
                except Diverged:
                    loss = math.inf
                trials.keep(values, loss)
            return loss

        assert asked.rate is not None  # train and train_rival see to it
        rate = asked.rate
        ranges = {
            "rate": tune.Range(rate / 10, rate * 10, rate, log=True),
            "alpha": tune.Range(0, 1, asked.alpha),
        }
        if asked.progressive:
            ranges["start"] = tune.Range(0, 1, asked.start)
        best, tried = tune.search(measured, ranges, trials=asked.search, seed=self.seed)
        told = {"trials": [values | {"loss": loss} for values, loss in tried], "trial_tokens": tokens}
        return _with(asked, best), {"search": told | {"chosen": best, "held_out": held * self.windows.shape[1]}}


class _Trials:
    """What the trials of a search came to, in a file beside the checkpoint: OUT.train.search."""

    def __init__(self, checkpoint: Path, told: Any) -> None:
        self._path = _beside(checkpoint)
        self._key = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        self._found: list[tuple[tune.Values, float]] = []
        if self._path.exists():
            try:
                stated = json.loads(self._path.read_text())
                self._found = [(dict(values), float(loss)) for values, loss in stated["trials"]]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise JournalMismatch(f"{self._path} holds no trials ({error}); remove it to begin again") from None
            if stated.get("key") != self._key:
                raise JournalMismatch(f"{self._path} is of a search with another model, text or training; remove it")

    def known(self, values: tune.Values) -> float | None:
        """The loss of a trial that was done before."""
        return next((loss for tried, loss in self._found if tried == values), None)

    def keep(self, values: tune.Values, loss: float) -> None:
        """Note a trial; of several processes the first one writes."""
        self._found.append((values, loss))
        if os.environ.get("RANK", "0") == "0":
            with atomic(self._path) as file:
                file.write(json.dumps({"key": self._key, "trials": self._found}).encode())


def _with(training: Training, values: tune.Values) -> Training:
    start = values.get("start", training.start)
    return replace(training, rate=values["rate"], alpha=values["alpha"], start=start)


def _beside(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + ".search")


def forget(checkpoint: Path) -> None:
    """Remove what is kept of a training, and of the search before it."""
    checkpoint.unlink(missing_ok=True)
    _beside(checkpoint).unlink(missing_ok=True)


def _batch(asked: int, windows: int) -> int:
    """Windows a step: what is asked, or as many as there are that all processes can share out evenly."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return asked if asked <= windows else max(1, windows // processes) * processes


def _agreed(loss: float) -> float:
    """The first process's loss, where several train together: all must go on with the same numbers."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return loss
    told = [loss]
    torch.distributed.broadcast_object_list(told, 0)
    return told[0]


def _told(at: trainer.Progress, training: Training) -> str:
    loss, _, _, replaced = at.outcomes[0].curve[-1]
    return f"loss {loss:.3f}" + (f", {100 * replaced:.0f} % replaced" if training.progressive else "")


def _trained(fitted: trainer.Fitted, training: Training) -> dict[str, Any]:
    """What a run came to; loss, CE and KL are means over its last steps, a tenth of them."""
    (outcome,) = fitted.outcomes
    last = outcome.curve[-max(1, len(outcome.curve) // 10) :]
    loss, ce, kl = (sum(point[i] for point in last) / len(last) for i in range(3))
    size = {"tokens": fitted.tokens, "steps": fitted.steps, "seconds": fitted.seconds}
    how = {"rate": outcome.rate, "alpha": training.alpha, "returns": outcome.returns}
    return size | {"loss": loss, "ce": ce, "kl": kl} | how


def _identity(draft: Draft, training: Training) -> str:
    """A hash of the model, of what is tied in it and how, and of how it is trained.

    Not of the factors' values: another number of threads, or another GPU, may have rounded them otherwise.
    """
    ties = [[tie.tensor, tie.reference, tie.u.shape[1]] for tie in draft.shared.ties]
    how = [draft.initialisation, training.progressive, training.blend, training.gain, training.lora, training.start]
    how += [training.whole, training.rest_rate]
    text = "" if draft.windows is None else hashlib.sha256(draft.windows.numpy().tobytes()).hexdigest()
    told = [_fingerprints(draft.original), ties, sorted(draft.shared.dropped), sorted(draft.tensors), text, how]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _fingerprints(original: Original) -> list[list[str]]:
    own = original.checkpoint
    return [[name, found.hex()] for name, found in sorted(own.fingerprints(own.names()).items())]
