"""Search for numbers by measured loss, with optuna."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bayou.errors import BadInput, Diverged

Values = dict[str, float]


@dataclass(frozen=True)
class Range:
    """Where one number is looked for: low..high, on a log scale or an even one. first: what is tried first."""

    low: float
    high: float
    first: float
    log: bool = False


def require() -> None:
    """Raises BadInput where optuna, which searches, is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise BadInput("a search needs optuna: pip install 'bayou[train]'; or leave out --search") from None


def search(
    measured: Callable[[Values], float], ranges: Mapping[str, Range], *, trials: int, seed: int = 0
) -> tuple[Values, list[tuple[Values, float]]]:
    """The numbers within `ranges` for which `measured` (a loss) is least; all (numbers, loss) tried beside them.

    measured trains with the numbers and returns the loss on data held out; inf or NaN is a failed trial. The first
    trial is of every range's `first`, a third of all (10 at most) are at random, the others are optuna's Bayesian
    (tree-structured Parzen) sampler's. What is tried is a function of the seed and of the losses.

    Raises BadInput without optuna, or for no trial; Diverged where every trial failed.
    """
    require()
    import optuna

    if trials < 1:
        raise BadInput(f"a search of {trials} trials: 1 at least")
    for name, where in ranges.items():
        if not where.low <= where.first <= where.high or (where.log and where.low <= 0):
            raise BadInput(f"cannot search {name} between {where.low:g} and {where.high:g} from {where.first:g} on")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(2, min(10, trials // 3)))
    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial({name: where.first for name, where in ranges.items()})
    tried: list[tuple[Values, float]] = []

    def trial(choice: Any) -> float:
        values = {name: choice.suggest_float(name, at.low, at.high, log=at.log) for name, at in ranges.items()}
        try:
            found = measured(values)
        except Diverged:
            found = math.inf
        tried.append((values, found))
        if not math.isfinite(found):
            raise optuna.TrialPruned
        return found

    study.optimize(trial, n_trials=trials)
    finite = [(loss, i) for i, (_, loss) in enumerate(tried) if math.isfinite(loss)]
    if not finite:
        raise Diverged(f"none of {trials} trials gave a finite loss; give a lower --rate to search around")
    return tried[min(finite)[1]][0], tried
