"""Choose per sub-layer by measured loss: keep it, tie it with a delta, low rank alone, or drop it.

Greedy. The loss is KL(model || shared) in nats a token on probe windows that no fit has seen. Every option of every
sub-layer between the ends is tried once alone; then, until enough is removed, the option with the least increase of KL
a parameter is taken. An increase measured earlier counts as a lower bound, since errors add up: the best candidate is
measured again over what has been chosen, and taken only if it stays the best.

The options share their decompositions: a truncated whitened SVD of rank r is the first r columns of a longer one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bayou import layouts, skeleton, ties
from bayou.errors import BadInput
from bayou.layouts import Dial, SubLayer
from bayou.methods import Gram
from bayou.original import Original, Progress
from bayou.sharing import Shared, Tie
from bayou.ties import Metric

PROBE = 4096
"""Tokens of the probe windows, at most a quarter of what there is."""
RANKS = (0.125, 0.25, 0.375)
"""Ranks tried where none is given, as shares of the shortest side."""
NEAR = 1
"""Anchors tried: so many blocks before."""
_WINDOWS = 4  # that a forward takes
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


def search(original: Original, dial: Dial, windows: Tensor, progress: Progress) -> Shared:
    """The plan that removes `dial.reduce` (0.12) of the parameters of the kinds `dial.kinds` at the least KL found.

    The model is held whole, in fp32, on the device. dial.rank: the only rank to try; the layout is not the dial's.
    Raises BadInput where too much is asked for, or what a search does not follow.
    """
    if dial != Dial(kinds=dial.kinds, keep_ends=dial.keep_ends, reduce=dial.reduce, rank=dial.rank):
        raise BadInput("--plan search chooses the blocks; leave out --layout, --count, --blocks and --per-anchor")
    layers = len(original.layers)
    middle = range(dial.keep_ends, layers - dial.keep_ends)
    if dial.kinds not in layouts.KINDS or dial.keep_ends < 0 or len(middle) < 1:
        raise BadInput(
            f"--kinds {dial.kinds} --keep-ends {dial.keep_ends}: nothing of {layers} layers is left to choose"
        )
    goal = (0.12 if dial.reduce is None else dial.reduce) * original.parameters
    subs = [
        s for (block, kind), s in original.sublayers.items() if block in middle and kind in layouts.KINDS[dial.kinds]
    ]
    if not 0 < goal <= sum(sub.parameters for sub in subs):
        most = sum(sub.parameters for sub in subs) / original.parameters
        raise BadInput(f"--reduce {dial.reduce}: a share above 0 and up to {most:.2f}, all that may go, is needed")
    if dial.rank is not None and not any(dial.rank >= 0 and sub.factors(dial.rank) < sub.parameters for sub in subs):
        raise BadInput(f"rank {dial.rank} is too large (or below 0): no factors would be smaller than their matrices")
    count = max(1, min(len(windows) // 4, PROBE // windows.shape[1]))
    if len(windows) < 2:
        raise BadInput("the calibration text is too short to fit on one part and measure on another; give more")
    fitting, probe = windows[count:], windows[:count].to(original.device)
    names = {name for sub in subs for name in sub.tensors()}
    bench = _Bench(original, original.grams(fitting, names, progress), probe)
    return bench.choose([*_options(original, subs, dial)], goal, progress)


def _options(original: Original, subs: list[SubLayer], dial: Dial) -> Iterator[Option]:
    for sub in subs:
        shortest = min(min(shape) for shape in sub.matrices.values())
        ranks = [dial.rank] if dial.rank is not None else sorted({max(1, int(share * shortest)) for share in RANKS})
        for rank in ranks:
            if sub.factors(rank) >= sub.parameters:
                continue
            yield Option(sub, None, rank)
            for near in range(1, NEAR + 1):
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

    def choose(self, options: list[Option], goal: float, progress: Progress) -> Shared:
        """Greedy, lazily measured: see the head of this file."""
        increase: dict[Option, float] = {}
        for done, option in enumerate(options):
            increase[option] = self.trial(option)
            progress("options", done + 1, len(options))
        now, saved = 0.0, 0
        fresh: set[Option] = set()
        while saved < goal:
            open_to = [option for option in options if self._possible(option)]
            if not open_to:
                raise BadInput(f"no plan removes {goal:,.0f} parameters; the last one removed {saved:,}")

            def price(option: Option, left: float = goal - saved) -> float:
                own = self.chosen.get(option.sub.name)
                return increase[option] / min(option.saved - (own.saved if own else 0), left)

            best = min(open_to, key=price)
            if best not in fresh:
                increase[best] = self.trial(best) - now
                fresh.add(best)
                continue
            own = self.chosen.get(best.sub.name)
            self.chosen[best.sub.name] = best
            self.put(best.sub, best)
            now, saved = now + increase[best], saved + best.saved - (own.saved if own else 0)
            for other in options:  # from here on, these count from what has been taken
                if other.sub is best.sub and other is not best:
                    increase[other] = max(0.0, increase[other] - increase[best])
            fresh.clear()
            progress("removed", min(saved, int(goal)), int(goal))
        made = [tie for option in self.chosen.values() for tie in self.ties_of(option)]
        dropped = tuple(option.sub.name for option in self.chosen.values() if option.rank is None)
        return Shared(tuple(made), dropped)

    def _possible(self, option: Option) -> bool:
        """Whether it removes more than what is chosen for its sub-layer, and no anchor is changed."""
        own = self.chosen.get(option.sub.name)
        lent = any(o.anchor is not None and o.anchor.name == option.sub.name for o in self.chosen.values())
        borrows = option.anchor is not None and option.anchor.name in self.chosen
        return not lent and not borrows and option.saved > (own.saved if own else 0)
