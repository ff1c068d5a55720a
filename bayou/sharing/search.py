"""Choose per sub-layer by measured loss: keep it, tie it with a delta, low rank alone, or drop it.

Greedy. The loss is KL(model || shared) in nats a token on probe windows that no fit has seen. Every option of every
sub-layer between the ends is tried once alone; then, until enough is removed, the option with the least increase of KL
a parameter (or, under a budget, a byte of the file) is taken. An increase measured earlier counts as a lower bound,
since errors add up: the best candidate is measured again over what has been chosen, and taken only if it stays the
best.

The options share their decompositions: a truncated whitened SVD of rank r is the first r columns of a longer one.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from bayou import skeleton
from bayou.errors import BadInput, BayouError, TooSmall
from bayou.methods import Gram
from bayou.sharing import Shared, Tie, layouts, sharedfile, ties
from bayou.sharing.layouts import Dial, SubLayer
from bayou.sharing.original import Original, Progress
from bayou.sharing.ties import Metric

PROBE = 4096
"""Tokens of the probe windows, at most a quarter of what there is."""
RANKS = (0.125, 0.25, 0.375)
"""Ranks tried where none is given, as shares of the shortest side."""
_WINDOWS = 4  # that a forward takes
_LONGEST = -2.2250738585072014e-308  # no float has more digits
_ROWS = 1024  # positions whose logits are turned into probabilities at a time


@dataclass(frozen=True)
class Option:
    """One thing to do to a sub-layer. anchor: the one it is tied to; None: none. rank None: dropped."""

    sub: SubLayer
    anchor: SubLayer | None
    rank: int | None

    @property
    def saved(self) -> int:
        """Parameters fewer than keeping it."""
        return self.sub.parameters - (0 if self.rank is None else self.sub.factors(self.rank))


def search(
    original: Original, dial: Dial, windows: Tensor, progress: Progress, size: Callable[[Shared], int] | None = None
) -> Shared:
    """The plan that removes `dial.reduce` (0.12) of the parameters of the kinds `dial.kinds` at the least KL found.

    With dial.budget, the plan by which the file has at most so many bytes. The model is held whole, in fp32, on the
    device. dial.rank: the only rank to try; dial.near: anchors are so many blocks before at most; the layout is not
    the dial's. size: bytes of the file of a plan; None is as sharedfile.write stores it unless told.

    Raises BadInput where too much is asked for, or what a search does not follow; TooSmall for a budget out of reach.
    """
    mine = ("kinds", "keep_ends", "reduce", "rank", "budget", "near")
    if dial != Dial(**{name: getattr(dial, name) for name in mine}):
        raise BadInput("--plan search chooses the blocks; leave out --layout, --count, --blocks and --per-anchor")
    if dial.near < 1 or (dial.budget is not None and dial.reduce is not None):
        raise BadInput(
            f"--near {dial.near} --reduce {dial.reduce} --budget {dial.budget}: 1 block before or more, and a share of "
            "parameters or bytes of the file, not both"
        )
    layers = len(original.layers)
    middle = range(dial.keep_ends, layers - dial.keep_ends)
    if dial.kinds not in layouts.KINDS or dial.keep_ends < 0 or len(middle) < 1:
        raise BadInput(
            f"--kinds {dial.kinds} --keep-ends {dial.keep_ends}: nothing of {layers} layers is left to choose"
        )
    subs = [
        s for (block, kind), s in original.sublayers.items() if block in middle and kind in layouts.KINDS[dial.kinds]
    ]
    goal = (0.12 if dial.reduce is None else dial.reduce) * original.parameters
    if dial.budget is None and not 0 < goal <= sum(sub.parameters for sub in subs):
        most = sum(sub.parameters for sub in subs) / original.parameters
        raise BadInput(f"--reduce {dial.reduce}: a share above 0 and up to {most:.2f}, all that may go, is needed")
    if dial.rank is not None and not any(dial.rank >= 0 and sub.factors(dial.rank) < sub.parameters for sub in subs):
        raise BadInput(f"rank {dial.rank} is too large (or below 0): no factors would be smaller than their matrices")
    count = max(1, min(len(windows) // 4, PROBE // windows.shape[1]))
    if len(windows) < 2:
        raise BadInput("the calibration text is too short to fit on one part and measure on another; give more")
    fitting, probe = windows[count:], windows[:count].to(original.device)
    names = {name for sub in subs for name in sub.tensors()}
    measured = size or partial(sharedfile.nbytes, original)
    if dial.budget is not None and measured(Shared(())) <= dial.budget:
        raise BadInput(f"--budget {dial.budget:,}: the file has {measured(Shared(())):,} bytes with nothing shared")
    bench = _Bench(original, original.grams(fitting, names, progress), probe)
    goals = _Parameters(goal) if dial.budget is None else _Bytes(dial.budget, measured)
    return bench.choose([*_options(original, subs, dial)], goals, progress)


def _options(original: Original, subs: list[SubLayer], dial: Dial) -> Iterator[Option]:
    for sub in subs:
        shortest = min(min(shape) for shape in sub.matrices.values())
        ranks = [dial.rank] if dial.rank is not None else sorted({max(1, int(share * shortest)) for share in RANKS})
        for rank in ranks:
            if sub.factors(rank) >= sub.parameters:
                continue
            yield Option(sub, None, rank)
            for near in range(1, dial.near + 1):
                other = original.sublayers.get((sub.block - near, sub.kind))
                if other is not None and other.matrices == sub.matrices:
                    yield Option(sub, other, rank)
        yield Option(sub, None, None)


class _Bench:
    """The model in memory with what has been chosen in it, and the fits."""

    def __init__(self, original: Original, grams: dict[str, Gram], probe: Tensor) -> None:
        self.original, self.probe = original, probe
        self.model = skeleton.build(original.folder)
        skeleton.fill(self.model, "", original.places, original.checkpoint.read, device=original.device)
        self.metrics: dict[int, Metric] = {}
        self.grams = grams
        self.fits: dict[tuple[str, str | None], Tie] = {}
        self.chosen: dict[str, Option] = {}
        self.targets = [*self._logits()]

    @torch.no_grad()
    def _logits(self) -> Iterator[Tensor]:
        for windows in self.probe.split(_WINDOWS):
            yield self.model(input_ids=windows, use_cache=False).logits.flatten(0, 1)

    def loss(self) -> float:
        """KL(model as it was || as it is), nats a token of the probe."""
        total, tokens = 0.0, 0
        for target, found in zip(self.targets, self._logits(), strict=True):
            for start in range(0, len(found), _ROWS):
                rows = slice(start, start + _ROWS)
                p, q = target[rows].log_softmax(-1), found[rows].log_softmax(-1)
                total += float((p.exp() * (p - q)).sum())
            tokens += len(found)
        return total / tokens

    def tie(self, name: str, reference: str | None, rank: int) -> Tie:
        """The tie of one matrix, cut from the longest that has been fitted."""
        key = name, reference
        if key not in self.fits or self.fits[key].u.shape[1] < rank:
            gram = self.grams.get(name)
            if id(gram) not in self.metrics:
                self.metrics[id(gram)] = Metric(gram)
            metric = self.metrics[id(gram)]
            matrix = self.original.matrix(name)
            base = (str(reference), matrix if reference is None else self.original.matrix(reference))
            how = "no-base" if reference is None else "whitened+gain"
            longest = max(rank, int(max(RANKS) * min(matrix.shape)))
            self.fits[key] = ties.fit(name, matrix, base, metric, longest, how)
        whole = self.fits[key]
        return Tie(name, reference, whole.gain, whole.u[:, :rank].contiguous(), whole.v[:rank].contiguous())

    def ties_of(self, option: Option) -> list[Tie]:
        """The ties that an option means; none where it drops."""
        if option.rank is None:
            return []
        lender = option.anchor
        made = []
        for leaf in option.sub.matrices:
            reference = None if lender is None else f"{lender.name}.{leaf}"
            made.append(self.tie(f"{option.sub.name}.{leaf}", reference, option.rank))
        return made

    @torch.no_grad()
    def put(self, sub: SubLayer, option: Option | None) -> None:
        """Let the sub-layer be as the option says; None: as it was."""
        made = {tie.tensor: tie for tie in self.ties_of(option)} if option is not None else {}
        for name in sub.tensors():
            place = self.original.places[name]
            if option is None:
                weight = self.original.matrix(name)
            elif name in made:
                tie = made[name]
                weight = (tie.u.to(self.original.device)) @ tie.v.to(self.original.device)
                if tie.reference is not None:
                    weight = weight + tie.gain * self.original.matrix(tie.reference)
            else:
                weight = torch.zeros(sub.matrices[name[len(sub.name) + 1 :]], device=self.original.device)
            self.model.get_parameter(place.path).copy_(weight.T if place.transposed else weight)
            bias = f"{name.removesuffix('weight')}bias"
            if name.endswith("weight") and bias in self.original.places:
                own = self.original.checkpoint.read(bias).to(self.original.device).float()
                dropped = option is not None and option.rank is None
                self.model.get_parameter(self.original.places[bias].path).copy_(own * (0.0 if dropped else 1.0))

    def trial(self, option: Option) -> float:
        """The loss with one more option in place of what its sub-layer is now."""
        self.put(option.sub, option)
        found = self.loss()
        self.put(option.sub, self.chosen.get(option.sub.name))
        return found

    def shared(self, options: Iterable[Option]) -> Shared:
        """The plan of these options."""
        chosen = [*options]
        made = [tie for option in chosen for tie in self.ties_of(option)]
        return Shared(tuple(made), tuple(option.sub.name for option in chosen if option.rank is None))

    def choose(self, options: list[Option], goal: "_Goal", progress: Progress) -> Shared:
        """Greedy, lazily measured: see the head of this file."""
        increase: dict[Option, float] = {}
        removes: dict[Option, float] = {}
        for done, option in enumerate(options):
            increase[option] = self.trial(option)
            removes[option] = goal.removes(option, self.shared([option]))
            progress("options", done + 1, len(options))
        whole = left = goal.left([], Shared(()))
        now, fresh = 0.0, set[Option]()
        while left > 0:
            gains = {option: self._gain(option, removes) for option in options}
            open_to = [option for option, gain in gains.items() if gain > 0]
            if not open_to:
                raise goal.missed(left)

            def price(option: Option, left: float = left, gains: dict[Option, float] = gains) -> float:
                return increase[option] / min(gains[option], left)

            best = min(open_to, key=price)
            if best not in fresh:
                increase[best] = self.trial(best) - now
                fresh.add(best)
                continue
            self.chosen[best.sub.name] = best
            self.put(best.sub, best)
            now += increase[best]
            left = goal.left([*self.chosen.values()], self.shared(self.chosen.values()))
            for other in options:  # from here on, these count from what has been taken
                if other.sub is best.sub and other is not best:
                    increase[other] = max(0.0, increase[other] - increase[best])
            fresh.clear()
            progress("removed", int(whole - max(0.0, left)), int(whole))
        return self.shared(self.chosen.values())

    def _gain(self, option: Option, removes: dict[Option, float]) -> float:
        """What it removes beyond what is chosen for its sub-layer; 0 where an anchor would be changed."""
        own = self.chosen.get(option.sub.name)
        lent = any(o.anchor is not None and o.anchor.name == option.sub.name for o in self.chosen.values())
        borrows = option.anchor is not None and option.anchor.name in self.chosen
        return 0.0 if lent or borrows else removes[option] - (removes[own] if own else 0.0)


class _Goal(Protocol):
    """What a plan must come to."""

    def removes(self, option: Option, alone: Shared) -> float:
        """What the option removes, if it is the only one; `alone` is the plan of it."""

    def left(self, chosen: list[Option], plan: Shared) -> float:
        """What is still to be removed; 0 or less where nothing is."""

    def missed(self, left: float) -> BayouError:
        """The error for a goal that all there is to choose does not reach."""


@dataclass(frozen=True)
class _Parameters:
    goal: float

    def removes(self, option: Option, alone: Shared) -> float:
        return option.saved

    def left(self, chosen: list[Option], plan: Shared) -> float:
        return self.goal - sum(option.saved for option in chosen)

    def missed(self, left: float) -> BayouError:
        return BadInput(f"no plan removes {self.goal:,.0f} parameters; the last one removed {self.goal - left:,.0f}")


class _Bytes:
    """Of the whole file. Gains count as the longest that a header can hold: training may make them so."""

    def __init__(self, budget: int, size: Callable[[Shared], int]) -> None:
        self._budget, self._size = budget, size
        self._nothing = self._sized(Shared(()))

    def _sized(self, plan: Shared) -> int:
        return self._size(replace(plan, ties=tuple(replace(tie, gain=_LONGEST) for tie in plan.ties)))

    def removes(self, option: Option, alone: Shared) -> float:
        return self._nothing - self._sized(alone)

    def left(self, chosen: list[Option], plan: Shared) -> float:
        return self._sized(plan) - self._budget

    def missed(self, left: float) -> BayouError:
        least = int(self._budget + left)
        return TooSmall(
            f"no plan makes a file of {self._budget:,} bytes; the last one had {least:,}: give a larger --budget, more "
            "--kinds or fewer --keep-ends",
            least,
        )
