"""The training: KL(fine-tune || compressed) on the logits, averaged over tokens, by AdamW with a cosine schedule.

A tenth of the windows is held back. The state whose KL on them is the least is kept, the start among them, so that a
file can only become better on text that the training has not seen. A step's text is a function of its number, so the
same number of steps gives the same numbers.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayou import objective
from bayou.distillation.student import Student
from bayou.schedule import cosine

RATES = {"scales": 0.003, "gains": 0.003, "floats": 0.003, "exact": 0.001}
"""Peak rate of each kind of number: relative to a scale or a gain, or to the root mean square of its tensor."""


@dataclass(frozen=True)
class Recipe:
    """How to train. rate multiplies RATES. batch: windows a step. chunk: positions whose logits are held at once.

    held, held_most: the share of the windows that is held back, and how many at most. looks: how often the KL on them
    is measured, but not more often than every `apart` steps. timed: steps that are timed to tell how many fit, or one
    where that takes `long` seconds.
    """

    rate: float = 1.0
    batch: int = 8
    warmup: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    chunk: int = 4096
    held: float = 0.1
    held_most: int = 64
    looks: int = 8
    apart: int = 25
    timed: int = 10
    long: float = 1.0
    seed: int = 0

    def every(self, steps: int) -> int:
        """Steps from one measurement to the next."""
        return max(self.apart, -(-steps // self.looks))


@dataclass
class Outcome:
    """What a training came to. before, after: KL on held-back windows, nats a token; after == before: it did not help.

    steps: those done; best: after which of them the state was that is kept. seconds: of all of it.
    """

    before: float
    after: float
    steps: int = 0
    best: int = 0
    tokens: int = 0
    held: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)


def train(
    student: Student,
    teacher: nn.Module,
    windows: Tensor,
    recipe: Recipe,
    *,
    steps: int | None = None,
    until: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Train the student's values in place, and leave them at their best.

    Args:
        windows: (n, length) token ids, n at least 2.
        steps: how many; None takes as many as are expected to be done at `until`, a value of time.monotonic(). With
            `until` it ends by then in any case.
    """
    return _Run(student, teacher, windows, recipe).run(steps, until, progress)


class _Run:
    def __init__(self, student: Student, teacher: nn.Module, windows: Tensor, recipe: Recipe) -> None:
        self.student, self.teacher, self.recipe = student, teacher, recipe
        self.device = next(teacher.parameters()).device
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(recipe.seed))
        count = min(max(1, int(recipe.held * len(windows))), recipe.held_most)
        self.held, self.windows = windows[order[:count]].long(), windows[order[count:]]
        self.parameters = student.values.parameters()
        groups = [{"params": [step], "peak": recipe.rate * RATES[kind]} for kind, step in self.parameters]
        self.each = 0.0  # seconds of a step, where it has been measured
        self.optimiser = torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas, weight_decay=0.0)

    def run(self, steps: int | None, until: float | None, progress: Callable[[int, int], None] | None) -> Outcome:
        started = time.monotonic()
        with arithmetic(self.device):
            before = self._measure()
            look = time.monotonic() - started
            if steps is None:
                assert until is not None
                steps = self._fitting(look, until)
            found = Outcome(before, before, held=len(self.held), curve=[(0, before)])
            kept = self.student.values.state()
            for step in range(steps):
                if until is not None and self._clock(step) + self.each + look > until:
                    break  # slower than it was when it was timed
                self._gradients(step)
                for group in self.optimiser.param_groups:
                    group["lr"] = group["peak"] * cosine(step, steps, warmup=self.recipe.warmup)
                self.optimiser.step()
                self.student.values.make()
                found.steps = step + 1
                if progress is not None:
                    progress(step + 1, steps)
                if (step + 1) % self.recipe.every(steps) == 0 and step + 1 < steps:
                    kept = self._look(found, kept)
            if found.steps:
                kept = self._look(found, kept)
            self.student.values.restore(kept)
        found.tokens = found.steps * self._batch(0).numel()
        found.seconds = time.monotonic() - started
        return found

    def _look(self, found: Outcome, kept: list[Tensor]) -> list[Tensor]:
        """Measure; the state to keep."""
        now = self._measure()
        found.curve.append((found.steps, now))
        if not now < found.after:  # nor where it is not a number
            return kept
        found.after, found.best = now, found.steps
        return self.student.values.state()

    def _measure(self) -> float:
        recipe = self.recipe
        batch = max(1, min(recipe.batch * 2, len(self.held)))
        return objective.measure(self.student.model, self.held, self.teacher, batch=batch, chunk=recipe.chunk)[1]

    def _gradients(self, step: int) -> None:
        ids = self._batch(step).to(self.device)
        taught = objective.Taught(self.teacher, ids, chunk=self.recipe.chunk)
        objective.loss(self.student.model, ids, alpha=1.0, taught=taught, chunk=self.recipe.chunk, weight=1.0)
        self.student.values.collect()

    def _batch(self, step: int) -> Tensor:
        """The windows of a step: all of them in a drawn order, then all again in another."""
        count = min(self.recipe.batch, len(self.windows))
        per_epoch = len(self.windows) // count
        epoch, place = divmod(step, per_epoch)
        draw = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch + 1)
        order = torch.randperm(len(self.windows), generator=draw)
        return self.windows[order[place * count : (place + 1) * count]].long()

    def _fitting(self, look: float, until: float) -> int:
        """How many steps, and measurements beside them, are done at `until`; some are timed for it, without effect."""
        each = self._timed(1)
        if each < self.recipe.long:  # else there is nothing to warm up, and no time to lose
            each = self._timed(self.recipe.timed)
        self.each = 1.02 * each
        room = 0.97 * (until - time.monotonic())
        steps = max(0, int(room / self.each))
        while steps and steps * self.each + math.ceil(steps / self.recipe.every(steps)) * look > room:
            steps = int(0.99 * steps)
        return steps

    def _timed(self, steps: int) -> float:
        """Seconds of a step, but for the optimiser's; nothing changes by it."""
        started = self._clock(0)
        for step in range(steps):
            self._gradients(step)
        return (self._clock(0) - started) / steps

    def _clock(self, step: int) -> float:
        """The time, once a GPU has done what it was given; asked every so often only, since waiting costs."""
        if self.device.type == "cuda" and step % 10 == 0:
            torch.cuda.synchronize(self.device)
        return time.monotonic()


@contextlib.contextmanager
def arithmetic(device: torch.device) -> Iterator[None]:
    """fp32 as TF32, ten bits of mantissa, on a GPU, and attention whose backward pass gives the same sums each time."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
