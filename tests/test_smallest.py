"""--max-kl: the smallest file whose measured KL stays below a bound."""

import math
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from typer.testing import CliRunner

import bayou
from bayou.cli import app
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput
from bayou.evaluate import read_model
from bayou.smallest import NEAR, next_ratio, smallest

FEW: dict[str, Any] = {"tokens": 2048, "length": 64}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("smallest")
    base = pico.pico("llama_gqa", folder / "base", dtype=torch.float32)
    return base, pico.perturb(base, folder / "tuned", scale=0.3)


def kl(base: Path, tuned: Path, file: Path) -> float:
    ids = torch.arange(128).reshape(2, 64) % 90 + 5
    with torch.no_grad():
        wanted = read_model(tuned)(ids).logits.log_softmax(-1)
        found = bayou.load(base, file)(ids).logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize("bound", [1e-4, 0.01, 3.0])
@pytest.mark.parametrize(("scale", "slope", "bend"), [(1e-6, 3.0, 0.0), (1e-4, 1.0, 0.2), (1e-9, 6.0, -0.3)])
def test_the_search_ends_near_the_bound(bound: float, scale: float, slope: float, bend: float) -> None:
    """On curves of other slopes than the one that it begins with, bent in logarithms."""

    def curve(ratio: float) -> float:
        x = math.log(ratio)
        return scale * math.exp(slope * x + bend * x * x * (1 if bend > 0 else 0.5))

    trials: list[tuple[float, float]] = []
    while (ratio := next_ratio(trials, bound)) is not None and len(trials) < 12:
        assert 1.2 < ratio < 1100 and ratio not in [tried for tried, _ in trials]
        trials.append((ratio, curve(ratio)))
    best = max((ratio for ratio, found in trials if found <= bound), default=None)
    true = max((r for r in torch.logspace(0.1, 3, 4000).tolist() if curve(r) <= bound), default=0.0)
    if best is None:
        assert true < 1.4
    else:
        assert best >= min(true, 1024) / NEAR / 1.01 and len(trials) <= 9


def test_ratios_that_no_file_has_are_left_behind() -> None:
    trials: list[tuple[float, float]] = []
    while (ratio := next_ratio(trials, 1.0)) is not None:
        trials.append((ratio, math.inf if ratio > 7.3 else 0.001))
    best = max(ratio for ratio, found in trials if found <= 1.0)
    assert 7.3 / NEAR <= best <= 7.3 and len(trials) <= 9


@pytest.mark.parametrize(("method", "above"), [("deltacome", 1), ("lowrank", 1), ("auto", 4)])
def test_the_file_keeps_the_bound_and_a_smaller_one_does_not(
    pair: tuple[Path, Path], tmp_path: Path, method: str, above: int
) -> None:
    base, tuned = pair
    loose = smallest(base, tuned, tmp_path / "loose", 0.02 * above, method=method, **FEW)
    tight = smallest(base, tuned, tmp_path / "tight", 0.004 * above, method=method, **FEW)
    for told, bound in ((loose, 0.02 * above), (tight, 0.004 * above)):
        assert told.kl is not None and told.kl <= bound and told.bytes == Path(told.path).stat().st_size
        assert DeltaFile(told.path).verify() and (told.ratio, told.kl) not in told.trials
        assert any(found is None or found > bound for _, found in told.trials)
    assert tight.bytes > loose.bytes
    assert kl(base, tuned, tmp_path / "tight") < kl(base, tuned, tmp_path / "loose") < 0.06 * above
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loose", "tight"]


def test_what_cannot_be_done_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    out = tmp_path / "a"
    out.write_bytes(b"old")
    for how, words in (
        ({"max_kl": 0.0}, "--max-kl 0: a number above 0 is needed"),
        ({"max_kl": 1.0, "method": "bitdelta"}, "files of bitdelta have one only"),
        ({"max_kl": 1.0, "method": "exact"}, "files of exact have one only"),
        ({"max_kl": 1.0, "calibration": "none"}, "leave --calibration none out"),
        ({"max_kl": 1.0, "ratio": 4.0}, "leave --ratio and --budget out"),
        ({"max_kl": 1.0, "accounting": "paper"}, "leave --accounting paper out"),
        ({"max_kl": 1e-9, "options": {"bands": "1"}}, "no file of deltacome has a KL of 1e-09 or less here; the best"),
        ({"max_kl": 1.0, "tokens": 64}, "the text has 1 windows of 64 tokens"),
        ({"max_kl": 1.0, "distill_steps": 5}, "--max-kl with distilling needs a text of yours"),
        ({"max_kl": 1.0, "out": tuned / "model.safetensors"}, "is a file of the model in"),
        ({"max_kl": 1.0, "out": tmp_path / "no" / "a"}, "is not a folder; make it first"),
    ):
        with pytest.raises(BadInput, match=words):
            smallest(base, tuned, **({"out": out} | FEW | how))  # type: ignore[arg-type]
    assert out.read_bytes() == b"old" and list(tmp_path.iterdir()) == [out]


def test_a_kl_that_is_no_number_counts_as_none(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bayou.objective.measure", lambda *_, **__: (0.0, math.nan))
    with pytest.raises(BadInput, match="can be made or has a KL at all"):
        smallest(*pair, tmp_path / "a", 1.0, **FEW)
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    words = ["compress", str(base), str(tuned), "-o", str(tmp_path / "a"), "--max-kl", "0.02", "--json"]
    done = CliRunner().invoke(app, [*words, "--tokens", "2048", "--length", "64"])
    assert done.exit_code == 0, done.output
    assert "nats a token on held-back text;" in done.output and '"trials": [[16.0, ' in done.output
