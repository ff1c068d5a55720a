"""`bayou share`: from a model to a smaller one whose layers share other layers' matrices. https://arxiv.org/abs/2501.18596

    which blocks, what rank      layouts.arrange, or search.search by measured loss
    the ties, in closed form     ties.fit, ties.learn
    training, if asked for       student.apply, train.fit
    the file                     sharedfile.write

Methods other than `deltallm` are those of bayou.baselines.
"""

import hashlib
import json
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayou import baselines, layouts, preflight, search, skeleton, student, ties
from bayou import train as trainer
from bayou.errors import BadInput, Unsupported
from bayou.layouts import Dial
from bayou.original import Original, Progress
from bayou.sharedfile import Report, calibrates, check, write
from bayou.sharing import Shared, Tie
from bayou.ties import Metric

OWN = "deltallm"
DEFAULT = "whitened+gain"
"""How ties are made unless it is said."""


@dataclass(frozen=True)
class Draft:
    """A shared model before it is written or trained.

    tensors: values of tensors that replace the model's own (learned anchors). windows: what it was calibrated on.
    initialisation: how its ties were made. trained: what became of its training, if there was any.
    """

    original: Original
    shared: Shared
    tensors: dict[str, Tensor]
    windows: Tensor | None
    initialisation: str
    trained: dict[str, Any] = field(default_factory=dict)


def draw_up(
    model: str | Path,
    *,
    dial: Dial | None = None,
    initialisation: str = DEFAULT,
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
    if plan == "search" and initialisation != DEFAULT:
        raise BadInput(f"--plan search tries {DEFAULT} and no-base itself; leave out --init {initialisation}")
    original = Original(model, revision=revision, device=device)
    if plan == "search":
        windows = original.windows(calibration, tokens, length, seed)
        if windows is None:
            raise BadInput("--plan search measures the loss on text, and --calibration none gives none")
        return Draft(original, search.search(original, dial, windows, show), {}, windows, "search")
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
        if id(gram) not in metrics:
            metrics[id(gram)] = Metric(gram)  # an eigendecomposition, for all linears that are given the same input
        return metrics[id(gram)]

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
    return Draft(original, Shared(tuple(made)), tensors, windows, initialisation)


@dataclass(frozen=True)
class Training:
    """How a shared model is trained after its original (bayou.train); --train of the command.

    text: a text or .jsonl file. tokens: to train on; the text is taken again where it runs out. rate: peak of AdamW.
    alpha: share of KL(model || student) in the loss, the rest is cross-entropy. progressive: Progressive Module
    Replacement, else the deltas run from the start. gain: train the gains too. lora: rank of LoRA on the rest, 0: none.
    """

    text: str | Path
    tokens: int = 15_000_000
    rate: float = 1e-3
    alpha: float = 0.5
    batch: int = 32
    length: int = 512
    progressive: bool = True
    blend: bool = False
    gain: bool = True
    lora: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.alpha <= 1 and self.rate > 0 and self.lora >= 0 and min(self.tokens, self.batch) >= 1):
            raise BadInput(
                f"cannot train with alpha {self.alpha:g}, rate {self.rate:g}, LoRA of rank {self.lora}, {self.tokens} "
                f"tokens, {self.batch} windows a step: alpha is 0 to 1, the rate above 0, the rank 0 or more"
            )
        if self.blend and not self.progressive:
            raise BadInput("--blend is a kind of progressive replacement: leave out --no-pmr")


def train(draft: Draft, training: Training, checkpoint: Path, progress: Progress, *, seed: int = 0) -> Draft:
    """The draft after training: its factors and gains, and, with LoRA on the rest, the tensors that it changed.

    checkpoint: where the run is kept, and goes on from. On the CPU in fp32. Raises BadInput, Diverged.
    """
    original = draft.original
    model = skeleton.build(original.folder)
    skeleton.fill(model, "", original.places, original.checkpoint.read, device=original.device)
    teacher = student.twin(model)
    with torch.no_grad():
        for name, value in draft.tensors.items():  # learned anchors: the student's alone
            path = original.places[name].path
            parent, _, leaf = path.rpartition(".")
            own = model.get_parameter(path)
            setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(value.to(own.device, own.dtype), False))
    schedule = student.Replacement(blend=training.blend, seed=seed) if training.progressive else None
    learner = student.apply(
        model, draft.shared, replacement=schedule, train_gain=training.gain, lora_rank=training.lora, seed=seed
    )
    windows = original.windows(training.text, training.tokens, training.length, seed)
    if windows is None:
        raise BadInput("--train none: a text to train on is needed")
    batch = max(1, min(training.batch, len(windows)))
    recipe = trainer.Recipe(alpha=training.alpha, batch=batch, seed=seed)
    rate, identity = training.rate, _identity(draft, training)
    pupil = trainer.Pupil(OWN, model, tuple(learner.parameters()), rate, learner.advance, identity)
    fitted = trainer.fit(
        [pupil],
        teacher,
        windows,
        recipe,
        tokens=training.tokens,
        checkpoint=checkpoint,
        progress=lambda at: progress(_told(at.outcomes[0].curve[-1]), at.step, at.steps),
    )
    learner.finish()
    by_path = {place.path: name for name, place in original.places.items()}
    changed = {by_path[path]: value.cpu() for path, value in learner.dense().items()}
    shared = Shared(learner.factors(), draft.shared.dropped)
    return replace(draft, shared=shared, tensors=draft.tensors | changed, trained=_trained(fitted))


def _told(point: tuple[float, float, float, float]) -> str:
    return f"train: loss {point[0]:.3f}, {100 * point[3]:.0f} % replaced"


def _trained(fitted: trainer.Fitted) -> dict[str, Any]:
    """What a run came to; loss, CE and KL are means over its last steps, a tenth of them."""
    (outcome,) = fitted.outcomes
    last = outcome.curve[-max(1, len(outcome.curve) // 10) :]
    loss, ce, kl = (sum(point[i] for point in last) / len(last) for i in range(3))
    size = {"tokens": fitted.tokens, "steps": fitted.steps, "seconds": fitted.seconds}
    return size | {"loss": loss, "ce": ce, "kl": kl, "rate": outcome.rate, "returns": outcome.returns}


def _identity(draft: Draft, training: Training) -> str:
    """A hash of the model, of what is tied in it and how, and of how it is trained.

    Not of the factors' values: another number of threads, or another GPU, may have rounded them otherwise.
    """
    own = draft.original.checkpoint
    model = [[name, found.hex()] for name, found in sorted(own.fingerprints(own.names()).items())]
    ties = [[tie.tensor, tie.reference, tie.u.shape[1]] for tie in draft.shared.ties]
    how = [draft.initialisation, training.progressive, training.blend, training.gain, training.lora]
    text = "" if draft.windows is None else hashlib.sha256(draft.windows.numpy().tobytes()).hexdigest()
    told = [model, ties, sorted(draft.shared.dropped), sorted(draft.tensors), text, how]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def own_gpu(device: str) -> str:
    """Of processes that train together (torchrun, accelerate launch) each has a GPU; "cuda" is this one's."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def methods() -> list[str]:
    """The words of --method: our own, and the rivals of bayou.baselines."""
    return [OWN, *baselines.METHODS]


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
    quantise: str = "anchors",
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
        method: "deltallm", or a rival (see `methods`); of the dial, those take `reduce` alone.
        dial ... progress: see `draw_up`. delta_method ... quantise: see `sharedfile.write`. training: see `train`; it
            goes on from OUT.train where a run was stopped. Processes that train together all write the same file.

    With `anchor_bits` the ties are fitted to their anchors as they are once quantised. Raises BadInput, Unsupported,
    and BayouError for a full disk; nothing is left at `out` then, or the old file is untouched.
    """
    preflight.check_output(Path(out), Path(model))  # before the work
    started = time.perf_counter()
    device = own_gpu(device)
    text: dict[str, Any] = {"calibration": calibration, "tokens": tokens, "length": length, "seed": seed}
    text |= {"device": device, "revision": revision, "progress": progress}
    if method not in methods():
        raise BadInput(f"there is no sharing method {method!r}; choose one of {', '.join(methods())}")
    dial = dial or Dial()
    if method != OWN:
        if training is not None:
            raise BadInput(f"--train is for {OWN}; rivals' recovery training is bench/sharing.py's")
        own = (initialisation, plan, delta_method, delta_options or {}, anchor_bits, quantise)
        if own != (DEFAULT, "layout", "lowrank", {}, None, "anchors") or dial != Dial(reduce=dial.reduce):
            raise BadInput(f"--method {method} takes --reduce or --ratio; all else of how to share is for {OWN}")
        report = _rival(method, model, out, dial.reduce, **text)
        return replace(report, seconds=time.perf_counter() - started)
    check(delta_method, delta_options or {}, anchor_bits, quantise)  # before the work too
    draft = draw_up(model, dial=dial, initialisation=initialisation, plan=plan, **text)
    if training is not None:
        checkpoint = Path(out).with_name(Path(out).name + ".train")
        draft = train(draft, training, checkpoint, progress or (lambda *_: None), seed=seed)
    windows = draft.windows
    if windows is None and calibrates(delta_method, anchor_bits):  # of an initialisation that wanted none
        windows = draft.original.windows(calibration, tokens, length, seed)
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
        refit=training is None and initialisation != "zero",
        whiten=initialisation != "svd",
        windows=windows,
        progress=progress,
    )
    if training is not None:
        checkpoint.unlink(missing_ok=True)
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
    progress: Progress | None = None,
) -> Report:
    """The control at equal bytes: nothing shared, the model's linears (or all matrices) in `bits` bits by GPTQ."""
    original = Original(model, device=device)
    windows = original.windows(calibration, tokens, length, seed)
    nothing = Shared(())
    return write(original, nothing, out, anchor_bits=bits, quantise=quantise, windows=windows, progress=progress)


def _rival(
    method: str,
    model: str | Path,
    out: str | Path,
    reduce: float | None,
    *,
    calibration: str | Path | None,
    tokens: int | None,
    length: int,
    seed: int,
    device: str,
    revision: str | None,
    progress: Progress | None,
) -> Report:
    """A rival's model, of the share `reduce` (0.12) of parameters fewer, as a self-contained file."""
    if method == "slicegpt":  # before the work, not after it
        raise Unsupported(
            "slicegpt changes the shapes of all matrices: it is no model of shared layers, so no file holds it; "
            "in Python bayou.baselines.share makes it, bayou.baselines.slicegpt.save and load keep it"
        )
    original = Original(model, revision=revision, device=device)
    windows = original.windows(calibration, tokens, length, seed)
    if windows is None:
        raise BadInput(f"method {method} measures the model on text, and --calibration none gives none")
    share_gone = 0.12 if reduce is None else reduce
    made = baselines.share(method, original.folder, reduce=share_gone, windows=windows, device=device)
    shared, tensors = made.shared(original.folder)
    report = write(original, shared, out, tensors=tensors, progress=progress)
    return replace(report, method=method)
