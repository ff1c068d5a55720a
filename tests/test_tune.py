"""The search for numbers by measured loss."""

import math
import sys

import pytest

from bayou.errors import BadInput, Diverged
from bayou.sharing import tune
from bayou.sharing.tune import Range, Values

RATE = {"rate": Range(1e-4, 1e-2, 2e-3, log=True)}


def test_it_needs_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(BadInput, match=r"pip install 'bayou\[train\]'; or leave out --search"):
        tune.search(lambda values: values["rate"], RATE, trials=1)


def test_it_finds_the_best_of_several_numbers_and_begins_with_those_given() -> None:
    pytest.importorskip("optuna")

    def measured(values: Values) -> float:
        if values["rate"] > 5e-3:
            raise Diverged("too high")
        return (math.log(values["rate"]) - math.log(1e-3)) ** 2 + (values["alpha"] - 0.8) ** 2

    ranges = RATE | {"alpha": Range(0, 1, 0.5)}
    best, tried = tune.search(measured, ranges, trials=40)
    assert len(tried) == 40 and tried[0][0] == {"rate": 2e-3, "alpha": 0.5}
    assert 5e-4 < best["rate"] < 2e-3 and 0.6 < best["alpha"] <= 1
    assert min(loss for _, loss in tried) == measured(best) < measured(tried[0][0])
    assert all(math.isinf(loss) == (values["rate"] > 5e-3) for values, loss in tried)
    assert tune.search(measured, ranges, trials=40) == (best, tried)
    assert tune.search(measured, ranges, trials=40, seed=1)[1][1:] != tried[1:]


def test_what_cannot_be_searched_is_refused() -> None:
    pytest.importorskip("optuna")
    with pytest.raises(Diverged, match=r"none of 2 trials .* lower --rate"):
        tune.search(lambda values: math.nan, RATE, trials=2)
    with pytest.raises(BadInput, match="0 trials"):
        tune.search(lambda values: 1.0, RATE, trials=0)
    for wrong in (Range(0, 1, 0.5, log=True), Range(1, 2, 3)):
        with pytest.raises(BadInput, match="cannot search x between"):
            tune.search(lambda values: 1.0, {"x": wrong}, trials=1)
