"""A compression that was stopped goes on to the same bytes, and never with what belongs to another."""

import functools
from pathlib import Path
from typing import Any

import pico
import pytest

import bayou
from bayou.deltafile import DeltaFile
from bayou.errors import JournalMismatch
from bayou.journal import Journal
from bayou.methods import deltacome

NONE: dict[str, Any] = {"calibration": "none", "method": "deltacome"}
FEW: dict[str, Any] = {"tokens": 1024, "length": 64}


class Stop:
    """A progress that ends the run like Ctrl-C after some matrices."""

    def __init__(self, at: int, step: str = "matrices") -> None:
        self.at, self.step = at, step

    def __call__(self, step: str, done: int, total: int) -> None:
        if step == self.step and done == self.at:
            raise KeyboardInterrupt


def stopped(base: Path, tuned: Path, out: Path, at: int = 3, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        bayou.compress(base, tuned, out, progress=Stop(at), **options)


def test_ctrl_c_keeps_what_is_done_and_the_next_run_goes_on(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out, whole = tmp_path / "a.bayou", tmp_path / "whole.bayou"
    bayou.compress(base, tuned, whole, ratio=4, **NONE)
    stopped(base, tuned, out, ratio=4, **NONE)
    journal = tmp_path / "a.bayou.journal"
    done = sorted(path.name for path in journal.glob("*.site"))
    assert len(done) == 3 and not out.exists()
    encoded: list[str] = []
    real = deltacome.encode

    @functools.wraps(real)
    def encode(site: Any, **options: Any) -> Any:
        encoded.append(site.name)
        return real(site, **options)

    monkeypatch.setattr(deltacome, "encode", encode)
    bayou.compress(base, tuned, out, ratio=4, **NONE)
    sites = list(DeltaFile(out).sites)
    linears = {name for i, name in enumerate(sites) if f"{i}.site" not in done and "_proj" in name}
    assert set(encoded) == linears and len(encoded) == len(linears)
    assert out.read_bytes() == whole.read_bytes() and not journal.exists()


@pytest.mark.parametrize("activations", ["finetuned", "compressed"])
@pytest.mark.parametrize("layer", [1, 2])
def test_a_calibrated_run_goes_on_to_the_same_bytes(
    base: Path, tuned: Path, tmp_path: Path, activations: Any, layer: int
) -> None:
    options: dict[str, Any] = {"ratio": 4, **FEW, "activations": activations}
    bayou.compress(base, tuned, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        bayou.compress(base, tuned, tmp_path / "a", progress=Stop(layer, "layers"), **options)
    assert list((tmp_path / "a.journal").glob("*.site"))
    bayou.compress(base, tuned, tmp_path / "a", **options)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("options", [FEW, {"calibration": "none"}], ids=["calibrated", "none"])
@pytest.mark.parametrize("after", [1, 4, 9, 14])
def test_auto_goes_on_to_the_same_bytes_wherever_it_was_stopped(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], after: int
) -> None:
    """Within a layer, or between two trials of one turn: its ranks depend on the sizes of what is done."""
    bayou.compress(base, tuned, tmp_path / "whole", ratio=4, method="auto", **options)
    put, kept = Journal.put, []

    def stopping(journal: Journal, index: int, blob: bytes, error: float, note: str = "") -> None:
        if len(kept) == after:
            raise KeyboardInterrupt
        kept.append(index)
        put(journal, index, blob, error, note)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "put", stopping)
        with pytest.raises(KeyboardInterrupt):
            bayou.compress(base, tuned, tmp_path / "a", ratio=4, method="auto", **options)
    bayou.compress(base, tuned, tmp_path / "a", ratio=4, method="auto", **options)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "whole"]


def test_a_distilled_run_goes_on_to_the_same_bytes(base: Path, tuned: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"ratio": 4, "method": "bitdelta", "distill_steps": 2}
    bayou.compress(base, tuned, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        bayou.compress(base, tuned, tmp_path / "a", progress=Stop(1, "distil"), **options)
    assert (tmp_path / "a.journal").is_dir() and not (tmp_path / "a").exists()
    bayou.compress(base, tuned, tmp_path / "a", **options)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "whole"]


@pytest.mark.parametrize(
    "other",
    [
        {"ratio": 3},
        {"method": "lowrank"},
        {"keep": ("norms", "model.embed.*")},
        {"options": {"damping": 0.02}},
        {"seed": 1},
        {"length": 32},
        {"tokens": 2048},
        {"activations": "compressed"},
        {"calibration": "none"},
        {"device": "cpu:0"},
    ],
    ids=str,
)
def test_a_journal_of_other_options_is_refused(base: Path, tuned: Path, tmp_path: Path, other: dict[str, Any]) -> None:
    """length: 16 windows of 64 tokens hold the very tokens of 32 windows of 32, and calibrate otherwise."""
    options: dict[str, Any] = {"ratio": 4, **FEW}
    with pytest.raises(KeyboardInterrupt):
        bayou.compress(base, tuned, tmp_path / "a", progress=Stop(1, "layers"), **options)
    with pytest.raises(JournalMismatch, match=r"a\.journal holds a half-finished compression of other models, options"):
        bayou.compress(base, tuned, tmp_path / "a", **(options | other))
    bayou.compress(base, tuned, tmp_path / "a", **options)


def test_a_journal_of_other_models_is_refused(base: Path, tuned: Path, tmp_path: Path) -> None:
    pico.perturb(base, tmp_path / "tuned2", seed=2)
    pico.pico("llama_gqa", tmp_path / "base2", seed=3)
    stopped(base, tuned, tmp_path / "a", ratio=4, **NONE)
    for models in ((base, tmp_path / "tuned2"), (tmp_path / "base2", tuned)):
        with pytest.raises(JournalMismatch):
            bayou.compress(*models, tmp_path / "a", ratio=4, **NONE)


def test_sites_of_another_fine_tune_never_get_into_a_file(base: Path, tuned: Path, tmp_path: Path) -> None:
    """What a kill leaves that comes while a finished journal is being removed: sites, and no key."""
    pico.perturb(base, tmp_path / "tuned2", seed=2)
    stopped(base, tmp_path / "tuned2", tmp_path / "a", ratio=4, **NONE)
    (tmp_path / "a.journal" / "key").unlink()
    for name in ("a", "whole"):
        bayou.compress(base, tuned, tmp_path / name, ratio=4, **NONE)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "whole").read_bytes()
