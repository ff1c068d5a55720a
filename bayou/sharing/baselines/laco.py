"""LaCo, layer collapse (https://arxiv.org/abs/2402.11187): merge runs of layers while the output stays alike.

The paper merges layer l with the m that follow it by "reserving differences seeking common",

    theta*_l = theta_l + sum_{k=1..m} (theta_{l+k} - theta_l),    and drops l+1 .. l+m.

The published code subtracts the weight that it has just changed, so that the sum telescopes to theta_{l+m}: it keeps
the last layer of the run. Both are here, as `laco` and `laco-code`. The search is the same: from the top, l = H - C,

    M' = merge(M, l, C - 1);  s = mean over a few texts of cos(last hidden states of the original, of M'), flattened
    s > T: M = M', l = min(l - I, len(M) - C);  else l = l - 1;  until l < L.

The paper sets the threshold T by hand for each size. Here T falls in steps until enough layers are merged, and the last
merge takes no more layers than are still wanted.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayou import skeleton
from bayou.errors import BadInput
from bayou.sharing.baselines.baseline import Baseline, batches, count, keep_layers, load, nearest
from bayou.sharing.student import twin

THRESHOLDS = tuple(round(0.99 - 0.03 * i, 2) for i in range(33))


@dataclass(frozen=True)
class _Run:
    """A layer of the merged model: the original layers it stands for, and how it was made of them (nested tuples)."""

    first: int
    last: int
    recipe: tuple[object, ...]


def merged(run: list[nn.Module], *, code: bool) -> nn.Module:
    """One layer for a run of layers, the lowest first: the paper's sum in fp32, or with `code` the last of them."""
    if code:
        return run[-1]
    layer = copy.deepcopy(run[0])
    others = [dict(other.named_parameters()) for other in run[1:]]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            base = parameter.float()
            parameter.copy_(base + sum(other[name].float() - base for other in others))
    return layer


def share(
    folder: Path | str,
    *,
    reduce: float,
    windows: Tensor,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 8,
    code: bool = False,
    merge: int | None = None,
    interval: int = 2,
    low: int = 1,
    high: int | None = None,
    texts: int = 5,
) -> Baseline:
    """The model of `folder` with runs of layers merged until the reduction is reached.

    Args:
        reduce: share of all parameters to remove; the nearest whole number of layers.
        windows: (n, length) token ids; the first `texts` of them, at most 128 tokens each, are the few texts.
        code: as the published code merges. merge, interval, low, high: C, I, L and H (None: the number of layers).
            merge None tries 2, 3 and 4 and takes the result that is most like the original, to be fair: the paper
            chooses C by hand.

    Raises BadInput where the range has too few layers to merge, or no threshold reaches the reduction.
    """
    model = load(folder, device=device, dtype=dtype)
    before = count(model)
    _, layers = skeleton.decoder_layers(model)
    top = len(layers) if high is None else high
    sizes = (2, 3, 4) if merge is None else (merge,)
    if min(sizes) < 2 or not 0 <= low < top <= len(layers) or interval < 1:
        raise BadInput(f"laco cannot merge runs of {merge} layers in {low}..{top} of {len(layers)} layers")
    wanted = nearest([count(layer) for layer in layers[1:]], before, reduce)
    search = _Search(model, list(layers), windows[:texts, :128], batch, code)
    reached = []
    for size in sizes:
        for threshold in THRESHOLDS:
            runs = _merge_all(search.similarity, len(layers), wanted, threshold, size, interval, low, top)
            if len(layers) - len(runs) == wanted:
                reached.append((search.similarity(runs), -size, threshold, runs))
                break
    if not reached:
        raise BadInput(f"laco cannot merge {wanted} of {len(layers)} layers in {low}..{top}; widen the range")
    similarity, size, threshold, runs = max(reached, key=lambda found: found[:2])
    search.put(model, runs)
    name = "laco-code" if code else "laco"
    described = {
        "merged_layers": [[run.first, run.last] for run in runs if run.last > run.first],
        "merge": -size,
        "threshold": threshold,
        "similarity": round(similarity, 6),
    }
    origin = tuple(run.last if code else run.first for run in runs)
    return Baseline(name, model, before, before - count(model), described, origin=origin)


def _merge_all(
    similarity: Callable[[list[_Run]], float],
    layers: int,
    wanted: int,
    threshold: float,
    merge: int,
    interval: int,
    low: int,
    high: int,
) -> list[_Run]:
    """The paper's loop at one threshold, from the unmerged model; ends when `wanted` layers are gone."""
    runs = [_Run(i, i, (i,)) for i in range(layers)]
    at = high - merge
    while at >= low:
        take = min(merge - 1, wanted - (layers - len(runs)))
        if take == 0:
            break
        part = runs[at : at + take + 1]
        joined = _Run(part[0].first, part[-1].last, tuple(run.recipe for run in part))
        trial = [*runs[:at], joined, *runs[at + len(part) :]]
        if len(part) == take + 1 and similarity(trial) > threshold:
            runs = trial
            at = min(at - interval, len(runs) - merge)
        else:
            at -= 1
    return runs


class _Search:
    """Similarities of merged models to the original, each measured once."""

    def __init__(
        self, model: PreTrainedModel, layers: list[nn.Module], windows: Tensor, batch: int, code: bool
    ) -> None:
        self._model, self._layers, self._code = model, layers, code
        self._windows, self._batch = windows, batch
        self._original = self._states(model)
        self._known: dict[tuple[object, ...], float] = {}

    def _states(self, model: PreTrainedModel) -> Tensor:
        """(texts, length * d): the final hidden states, flattened."""
        return torch.cat([out.float().flatten(1) for out in batches(model, self._windows, self._batch)])

    def put(self, model: PreTrainedModel, runs: list[_Run]) -> None:
        """Make the layers that the runs stand for those of `model`."""
        indices = [run.last if self._code else run.first for run in runs]
        keep_layers(model, [self._made(run.recipe) for run in runs], indices)

    def _made(self, recipe: tuple[object, ...]) -> nn.Module:
        if len(recipe) == 1:
            return self._layers[int(str(recipe[0]))]
        return merged([self._made(part) for part in recipe if isinstance(part, tuple)], code=self._code)

    def similarity(self, runs: list[_Run]) -> float:
        """Mean over the texts of the cosine of the flattened final hidden states."""
        key = tuple(run.recipe for run in runs)
        if key not in self._known:
            model = twin(self._model)  # with a config of its own; the layers of a run of one are the original's
            self.put(model, runs)
            states = self._states(model)
            self._known[key] = float(nn.functional.cosine_similarity(self._original, states, dim=-1).mean())
        return self._known[key]
