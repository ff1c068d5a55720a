"""A shared model before it is trained or written: which matrices are tied to which, in closed form.

which blocks, what rank      layouts.arrange, or search.search by measured loss
the ties                     ties.fit, ties.learn
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from bayou.errors import BadInput
from bayou.methods import Gram
from bayou.sharing import Shared, Tie, layouts, search, sharedfile, ties
from bayou.sharing.layouts import Dial
from bayou.sharing.original import Original, Progress
from bayou.sharing.ties import Metric

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
    storage: dict[str, Any] | None = None,
) -> Draft:
    """The ties of a model, without writing anything: what training starts from.

    Args:
        model: folder or Hub id; revision: on the Hub.
        dial: layout, kinds, how much. initialisation: a word of ties.INITIALISATIONS.
        plan: "layout" follows the dial's layout; "search" chooses per sub-layer by measured loss (search.py).
        calibration: a text or .jsonl file; "none" goes without; None takes English text that Python carries.
        tokens, length, seed: of it, as in bayou.compress.
        storage: how the file will be stored (sharedfile.nbytes), for a search under a budget of bytes.

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
        size = partial(sharedfile.nbytes, original, **storage or {})
        return Draft(original, search.search(original, dial, windows, show, size), {}, windows, "search")
    wanted = initialisation in ties.USE_GRAM
    windows = original.windows(calibration, tokens, length, seed) if wanted else None
    shared, tensors = closed_form(
        original, dial, initialisation, lambda names: original.grams(windows, names, show), seed=seed, progress=show
    )
    return Draft(original, shared, tensors, windows, initialisation)


def closed_form(
    original: Original,
    dial: Dial,
    initialisation: str,
    measured: Callable[[set[str]], Mapping[str, Gram]],
    *,
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> tuple[Shared, dict[str, Tensor]]:
    """The ties of the dial's layout in closed form, and the tensors that replace the model's own (learned anchors).

    measured: the grams of the matrices named, or none. seed: of the random factors of "zero". Raises BadInput.
    """
    pairs, rank = layouts.arrange(dial, original.sublayers, original.parameters)
    groups: dict[str, list[str]] = {}  # anchor -> matrices tied to it
    for delta, lender in pairs.items():
        for kind in layouts.KINDS[dial.kinds]:
            mine, theirs = original.sublayers[delta, kind], original.sublayers[lender, kind]
            for leaf in mine.matrices:
                groups.setdefault(f"{theirs.name}.{leaf}", []).append(f"{mine.name}.{leaf}")
    involved = {name for users in groups.values() for name in users}
    involved |= set(groups) if initialisation == "als" else set()
    grams = measured(involved) if initialisation in ties.USE_GRAM else {}
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
        progress("groups", done + 1, len(groups))
    return Shared(tuple(made)), tensors
