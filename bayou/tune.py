"""Search for a learning rate by measured loss, with optuna."""

import math
from collections.abc import Callable
from typing import Any

from bayou.errors import BadInput, Diverged


def search(
    measured: Callable[[float], float], *, trials: int, low: float = 1e-4, high: float = 1e-2, seed: int = 0
) -> tuple[float, list[tuple[float, float]]]:
    """The learning rate in low..high (searched on a log scale) for which `measured` (a loss) is least.

    measured trains with a rate and returns the loss on data held out; inf or nan is a failed trial. Searched by
    optuna's Bayesian (tree-structured Parzen) sampler; returns the best rate and all (rate, loss) tried.

    Raises:
        BadInput: no optuna, or no trial. Diverged: every trial failed.
    """
    try:
        import optuna
    except ImportError:
        raise BadInput("a search needs optuna: pip install 'bayou[train]'; or give one learning rate") from None
    if trials < 1 or not 0 < low < high:
        raise BadInput(f"cannot search {trials} rates between {low} and {high}")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    tried: list[tuple[float, float]] = []

    def trial(choice: Any) -> float:
        rate = choice.suggest_float("rate", low, high, log=True)
        try:
            found = measured(rate)
        except Diverged:
            found = math.inf
        tried.append((rate, found))
        if not math.isfinite(found):
            raise optuna.TrialPruned
        return found

    study.optimize(trial, n_trials=trials)
    finite = [(loss, rate) for rate, loss in tried if math.isfinite(loss)]
    if not finite:
        raise Diverged(f"no learning rate between {low} and {high} gave a finite loss; widen the range downwards")
    return min(finite)[1], tried
