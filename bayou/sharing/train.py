"""Train students to do what their teacher does: one loop for layer sharing and for its rivals' recovery.

Several students may learn from one teacher at once: the teacher's forward is run once a batch for all of them. The
loop knows nothing of what a student is; it is given its model, its trainable parameters and, for Progressive Module
Replacement, a function that sets its switches. AdamW, cosine with warm-up, clipped gradients; on a GPU in bf16
(autocast), trainable parameters and the optimiser's state in fp32.

Everything in a step (batch, draws, rate) is a function of its number, so a run that was killed and started again goes
on from its checkpoint to the same result. A loss that is not a number sends the run back to the last checkpoint, with
a smaller step for the student in question; after two returns that student has failed.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from bayou import objective
from bayou.checkpoint import atomic
from bayou.errors import BadInput, DamagedFile, Diverged, JournalMismatch
from bayou.schedule import cosine
from bayou.sharing.world import World

RETURNS = 2
"""How often a student may go back to a checkpoint before it has failed."""
SMALLER = 0.3
"""What its step is multiplied by each time."""


@dataclass(frozen=True)
class Recipe:
    """How to train; the same for all students of a run.

    alpha: share of KL in the loss. batch: windows a step, all processes together. micro: windows a forward (None: the
    batch). warmup: share of the steps in which the rate rises from 0; it then falls as a cosine to `floor` times the
    peak. clip: largest norm of a student's gradient. chunk: positions whose logits are held at once. every: steps
    between checkpoints. seed: of the windows' order. compile: let torch.compile fuse the norms and the loss, where most
    of the time beside the products goes; whole layers would be compiled anew for every rank, switch and adapter.
    """

    alpha: float = 0.5
    batch: int = 32
    micro: int | None = None
    warmup: float = 0.05
    floor: float = 0.0
    decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    chunk: int = 4096
    every: int = 100
    seed: int = 0
    compile: bool = False

    def factor(self, step: int, steps: int) -> float:
        """The rate of step `step` (from 0) of `steps`, relative to its peak."""
        return cosine(step, steps, warmup=self.warmup, floor=self.floor)


@dataclass(frozen=True)
class Pupil:
    """A student as the loop sees it: its model, what is trained of it, the peak rate, and what sets its switches.

    advance(progress, forward number) -> share of modules replaced; see student.Student.advance. multiples: of the rate,
    one a parameter; None is 1 for all. identity: what a checkpoint must belong to beside the parameters' shapes; a hash
    of what the model is and of what is tied in it.
    """

    name: str
    model: nn.Module
    parameters: tuple[nn.Parameter, ...]
    rate: float
    advance: Callable[[float, int], float] | None = None
    multiples: tuple[float, ...] | None = None
    identity: str = ""


@dataclass
class Outcome:
    """What became of a student. curve: (loss, CE, KL, share replaced) of every step; failed: why it was given up."""

    name: str
    rate: float
    returns: int = 0
    failed: str | None = None
    curve: list[tuple[float, float, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """A step has been done: outcomes so far, tokens seen, seconds since this process began the run."""

    step: int
    steps: int
    tokens: int
    seconds: float
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class Fitted:
    """The end of a run: finished False where it was stopped by its time limit and can be gone on with.

    seconds: of training, in all processes that went on with it.
    """

    outcomes: tuple[Outcome, ...]
    finished: bool
    steps: int
    tokens: int
    seconds: float


def packed(ids: Tensor, length: int = 512) -> Tensor:
    """A stream of token ids (n,) as windows (n // length, length); the rest is left out. BadInput for too few."""
    if len(ids) < length or length < 2:
        raise BadInput(f"{len(ids)} tokens do not fill one window of {length}; give more text or shorter windows")
    return ids[: len(ids) // length * length].view(-1, length)


def fit(
    pupils: list[Pupil],
    teacher: nn.Module | None,
    windows: Tensor,
    recipe: Recipe,
    *,
    tokens: int | None = None,
    checkpoint: Path | None = None,
    stop_after: float | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Fitted:
    """Train all `pupils`, in place.

    Args:
        teacher: on the pupils' device, left as it is; None where alpha is 0.
        windows: (n, length) token ids of any integer dtype, on the CPU; taken in an order of the recipe's seed, again
            (in another order) when they run out.
        tokens: how many to train on, rounded to whole steps; None is all windows once.
        checkpoint: file to go on from, if it exists, and to write every so many steps and at the end.
        stop_after: seconds after which to write the checkpoint and return, unfinished.

    Several processes (started by `accelerate launch` or torchrun) share out each batch; each has the models on its own
    GPU, cuda:LOCAL_RANK, and the first one writes.

    Raises:
        BadInput: sizes that do not fit. JournalMismatch: the checkpoint is of another run. Diverged: every pupil
        failed (where others are left, a failed one's Outcome says so).
    """
    return _Run(pupils, teacher, windows, recipe, tokens, checkpoint).run(stop_after, progress)


class _Run:
    def __init__(
        self,
        pupils: list[Pupil],
        teacher: nn.Module | None,
        windows: Tensor,
        recipe: Recipe,
        tokens: int | None,
        checkpoint: Path | None,
    ) -> None:
        self.world = World()
        micro = recipe.micro or recipe.batch // self.world.count
        if not pupils or any(not pupil.parameters for pupil in pupils):
            raise BadInput("nothing to train: give at least one student, each with parameters")
        if micro < 1 or recipe.batch % (micro * self.world.count):
            raise BadInput(f"batch {recipe.batch} is no multiple of {micro} windows x {self.world.count} processes")
        if windows.ndim != 2 or windows.shape[1] < 2 or not len(windows):
            raise BadInput(f"windows of token ids must be (n, length), not {tuple(windows.shape)}")
        self.pupils, self.teacher, self.windows = pupils, teacher, windows
        self.recipe, self.micro, self.path = recipe, micro, checkpoint
        self.steps = max(1, round((tokens or windows.numel()) / (recipe.batch * windows.shape[1])))
        self.device = pupils[0].parameters[0].device
        self.outcomes = [Outcome(pupil.name, pupil.rate) for pupil in pupils]
        self.optimisers = [
            torch.optim.AdamW(_groups(pupil), lr=pupil.rate, betas=recipe.betas, weight_decay=recipe.decay)
            for pupil in pupils
        ]
        if recipe.compile:
            for model in [pupil.model for pupil in pupils] + ([] if teacher is None else [teacher]):
                for module in model.modules():
                    if type(module).__name__.endswith("Norm"):
                        module.compile()
        self.key = self._key()
        self.step, self.seconds = 0, 0.0
        self._order: tuple[int, Tensor] = (-1, windows[:0, 0])

    def run(self, stop_after: float | None, progress: Callable[[Progress], None] | None) -> Fitted:
        started = time.monotonic()
        if self.path is not None and self.path.exists():
            self._restore(*_read(self.path))
        last = self._state()
        earlier, stopped = self.seconds, False
        while self.step < self.steps and not stopped:
            stepped = self._do_step()
            seconds = time.monotonic() - started
            if not stepped:
                self._restore(last[0], last[1] | {"outcomes": self._returned(last[1])})
                continue
            self.step, self.seconds = self.step + 1, earlier + seconds
            stopped = self._agreed(stop_after is not None and seconds > stop_after) and self.step < self.steps
            if stopped or self.step % self.recipe.every == 0 or self.step == self.steps:
                last = self._state()
                self._write(last)
            if progress is not None:
                progress(Progress(self.step, self.steps, self._tokens(), seconds, tuple(self.outcomes)))
        self.world.wait()
        return Fitted(tuple(self.outcomes), not stopped, self.step, self._tokens(), self.seconds)

    def _tokens(self) -> int:
        return self.step * self.recipe.batch * self.windows.shape[1]

    def _do_step(self) -> bool:
        """One step of every pupil that has not failed; False where one must go back to the last checkpoint."""
        forwards = self.recipe.batch // (self.micro * self.world.count)
        batches = [ids.to(self.device) for ids in self._batch().split(self.micro)]
        taught: list[objective.Taught | None] = [None] * forwards
        if self.teacher is not None and self.recipe.alpha > 0:
            # A GPU has room for the logits of a batch, and several students then share the head's work too.
            keep = len(self.pupils) > 1 and self.device.type == "cuda"
            with self._autocast():
                taught = [objective.Taught(self.teacher, ids, chunk=self.recipe.chunk, keep=keep) for ids in batches]
        factor = self.recipe.factor(self.step, self.steps)
        for pupil, optimiser, outcome in zip(self.pupils, self.optimisers, self.outcomes, strict=True):
            if outcome.failed:
                continue
            sums, replaced = torch.zeros(3, device=self.device), float(pupil.advance is None)
            for i, ids in enumerate(batches):
                if pupil.advance is not None:
                    replaced += pupil.advance(self.step / self.steps, self.step * forwards + i) / forwards
                with self._autocast():
                    found = objective.loss(
                        pupil.model,
                        ids,
                        alpha=self.recipe.alpha,
                        taught=taught[i],
                        chunk=self.recipe.chunk,
                        weight=1 / forwards,
                        compiled=self.recipe.compile,
                    )
                sums += torch.stack([found.total, found.ce, found.kl]) / forwards
            gradients = [parameter.grad for parameter in pupil.parameters if parameter.grad is not None]
            self.world.mean([*gradients, sums])
            norm = torch.nn.utils.clip_grad_norm_(pupil.parameters, self.recipe.clip)
            total, ce, kl, size = torch.cat([sums, norm.reshape(1).to(sums)]).tolist()  # the step's only sync
            if not (math.isfinite(total) and math.isfinite(size)):
                optimiser.zero_grad()
                if self._returns(outcome):
                    return False
                continue
            for group in optimiser.param_groups:
                group["lr"] = outcome.rate * factor * group["multiple"]
            optimiser.step()
            optimiser.zero_grad()
            outcome.curve.append((round(total, 6), round(ce, 6), round(kl, 6), round(replaced, 4)))
        return True

    def _returns(self, outcome: Outcome) -> bool:
        """Note that the loss of a pupil is not a number; True where it gets another chance."""
        if outcome.returns < RETURNS:
            outcome.returns += 1
            outcome.rate *= SMALLER
            return True
        outcome.failed = (
            f"the loss of {outcome.name} is not a number at step {self.step + 1}, again after {RETURNS} returns to the "
            f"last checkpoint (learning rate now {outcome.rate:.2g}); take a lower learning rate or other data"
        )
        if all(other.failed for other in self.outcomes):
            raise Diverged(outcome.failed)
        return False

    def _returned(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """The outcomes of a checkpoint, with the rates and returns of now."""
        return [
            stated | {"rate": now.rate, "returns": now.returns, "failed": now.failed}
            for stated, now in zip(state["outcomes"], self.outcomes, strict=True)
        ]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.device.type == "cuda":
            # No cache: a head in fp32 is used chunk by chunk, each with a backward pass of its own.
            return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
        return contextlib.nullcontext()

    def _batch(self) -> Tensor:
        """This process's windows of the step, int64."""
        first, share = self.step * self.recipe.batch, self.recipe.batch // self.world.count
        numbers = range(first + self.world.rank * share, first + (self.world.rank + 1) * share)
        return torch.stack([self._window(number) for number in numbers]).long()

    def _window(self, number: int) -> Tensor:
        epoch, index = divmod(number, len(self.windows))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.windows), generator=generator))
        return self.windows[self._order[1][index]]

    def _agreed(self, stop: bool) -> bool:
        """Whether any process wants to stop."""
        flag = torch.tensor([float(stop)], device=self.device)
        self.world.mean([flag])
        return bool(flag.item() > 0) if self.world.count > 1 else stop

    def _key(self) -> str:
        """What a checkpoint must belong to: recipe, data, students."""
        shapes = [
            [p.name, p.rate, [list(q.shape) for q in p.parameters], *filter(None, [p.multiples, p.identity])]
            for p in self.pupils
        ]
        # Where checkpoints lie in time and how a batch is cut up do not belong to a run.
        recipe = asdict(replace(self.recipe, every=1, micro=self.micro * self.world.count, chunk=1, compile=False))
        data = hashlib.sha256(self.windows.contiguous().numpy().tobytes()).hexdigest()
        return hashlib.sha256(json.dumps([recipe, shapes, data, self.steps]).encode()).hexdigest()

    def _parts(self) -> Iterator[tuple[str, torch.optim.AdamW, nn.Parameter]]:
        for i, (pupil, optimiser) in enumerate(zip(self.pupils, self.optimisers, strict=True)):
            for j, parameter in enumerate(pupil.parameters):
                yield f"{i}.{j}", optimiser, parameter

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that changes in a run: parameters and moments (copies on the CPU), step, outcomes."""
        tensors = {}
        for name, optimiser, parameter in self._parts():
            tensors[f"{name}.value"] = parameter.detach().cpu().clone()
            for kind, value in optimiser.state.get(parameter, {}).items():
                tensors[f"{name}.{kind}"] = value.detach().cpu().clone()
        outcomes = [asdict(outcome) for outcome in self.outcomes]
        return tensors, {"key": self.key, "step": self.step, "seconds": self.seconds, "outcomes": outcomes}

    @torch.no_grad()
    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        if state["key"] != self.key:
            raise JournalMismatch(
                f"{self.path} is of a training with other students, data or recipe; remove it, or give another path"
            )
        for name, optimiser, parameter in self._parts():
            parameter.copy_(tensors[f"{name}.value"])
            optimiser.state.pop(parameter, None)
            if f"{name}.exp_avg" in tensors:
                moments = {k: tensors[f"{name}.{k}"].to(parameter.device, copy=True) for k in ("exp_avg", "exp_avg_sq")}
                optimiser.state[parameter] = {"step": tensors[f"{name}.step"].clone(), **moments}
        self.step, self.seconds = state["step"], state["seconds"]
        stated = [{**o, "curve": [tuple(point) for point in o["curve"]]} for o in state["outcomes"]]
        self.outcomes = [Outcome(**o) for o in stated]

    def _write(self, state: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
        if self.path is not None and self.world.rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(self.path) as file:
                file.write(save(state[0], {"state": json.dumps(state[1])}))
        self.world.wait()


def _groups(pupil: Pupil) -> list[dict[str, Any]]:
    """The pupil's parameters as AdamW wants them, those of one multiple of the rate together."""
    multiples = pupil.multiples or (1.0,) * len(pupil.parameters)
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, multiple in zip(pupil.parameters, multiples, strict=True):
        groups.setdefault(multiple, []).append(parameter)
    return [{"params": parameters, "multiple": multiple} for multiple, parameters in groups.items()]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, ValueError) as error:
        raise DamagedFile(f"{path} is not a training checkpoint ({error}); remove it to begin again") from None
