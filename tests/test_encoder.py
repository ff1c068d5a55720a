"""encoder.py as a GPU runs it: sites in groups, weights read ahead. On the CPU, where the files can be compared."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from encoded import encode, generator, gram_of, site_of

import bayou
from bayou import compress as entrance
from bayou import methods
from bayou.delta import Term
from bayou.deltafile import DeltaFile
from bayou.encoder import Encoder
from bayou.entry import pack_terms
from bayou.methods import deltacome
from bayou.packed import PLANES

FEW: dict[str, Any] = {"ratio": 4, "tokens": 1024, "length": 64}


def codes_of(terms: tuple[Term, ...]) -> torch.Tensor:
    """All bytes of the codes in the terms' matrices."""
    planes = []
    for term in terms:
        for packed in term.factors():
            count = 1 if packed.spec.floats else len(PLANES[packed.spec.bits])
            planes += [part.reshape(-1).view(torch.uint8) for part in packed.parts[:count]]
    return torch.cat(planes)


def nearly(one: tuple[Term, ...], other: tuple[Term, ...]) -> None:
    """The same layout and size, and all but one in a thousand bytes of codes."""
    assert [methods.layout_of(term) for term in one] == [methods.layout_of(term) for term in other]
    assert len(pack_terms(one)) == len(pack_terms(other))
    assert float((codes_of(one) != codes_of(other)).float().mean()) < 1e-3


# ------------------------------------------------------------------------------------------------ a method's group


@pytest.mark.parametrize("refit", ["rows", "full", "none"])
def test_together_is_one_by_one(refit: str) -> None:
    """Two inputs, three shapes, and ranks that differ: only what is alike shares a sweep."""
    shared, own = gram_of(96), gram_of(96, seed=3)
    shapes = [(96, 96), (96, 96), (160, 96), (96, 96), (96, 96)]
    ranks = [40, 40, 50, 41, 40]
    grams = [shared, shared, shared, shared, own]
    deltas = [pico.power_law(*shape, generator(i)) for i, shape in enumerate(shapes)]
    chosen = methods.check("deltacome", {"bands": "8x2,3x8,2", "group": 32, "refit": refit})
    sites = [site_of(delta, gram) for delta, gram in zip(deltas, grams, strict=True)]
    every = methods.encode_many("deltacome", sites, [chosen | {"rank": rank} for rank in ranks])
    for delta, gram, rank, terms in zip(deltas, grams, ranks, every, strict=True):
        nearly(terms, encode("deltacome", delta, chosen, gram, rank))


def test_sweeps_are_shared_by_one_input_and_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, own = gram_of(64), gram_of(64, seed=3)
    swept: list[tuple[int, ...]] = []
    real = deltacome.gptq
    monkeypatch.setattr(deltacome, "gptq", lambda w, *rest: (swept.append(tuple(w.shape)), real(w, *rest))[1])
    sites = [site_of(pico.power_law(64, 64, generator(i)), gram) for i, gram in enumerate((shared, shared, own))]
    methods.encode_many("deltacome", sites, [methods.check("deltacome", {}) | {"rank": 40}] * 3)
    assert swept == [(80, 64), (40, 64), (3, 64, 40)]


@pytest.mark.parametrize("name", methods.names())
def test_any_method_takes_several_sites(name: str) -> None:
    deltas = [pico.power_law(48, 64, generator(i)) for i in range(3)]
    dial = {"rank": 12} if methods.has_rank(name) else {}
    options = [methods.check(name, {}) | dial] * 3
    every = methods.encode_many(name, [site_of(delta) for delta in deltas], options)
    for delta, terms in zip(deltas, every, strict=True):
        nearly(terms, encode(name, delta, methods.check(name, {})))


# ------------------------------------------------------------------------------------------------ a whole compression


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.pico("mixtral", tmp_path_factory.mktemp("encoder") / "base")


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    return pico.perturb(base, base.parent / "tuned")


@pytest.fixture()
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def switch() -> None:
        owner = entrance.__globals__
        monkeypatch.setitem(owner, "Encoder", functools.partial(Encoder, together=True, ahead=True))

    return switch


@pytest.mark.parametrize(
    "options",
    [
        FEW,
        FEW | {"activations": "compressed"},
        FEW | {"calibration": "none"},
        FEW | {"method": "bitdelta", "distill_steps": 0},
    ],
    ids=["calibrated", "compressed", "none", "bitdelta"],
)
def test_the_plan_and_the_size_are_the_same(
    base: Path, tuned: Path, tmp_path: Path, as_on_a_gpu: Callable[[], None], options: dict[str, Any]
) -> None:
    bayou.compress(base, tuned, tmp_path / "alone", **options)
    as_on_a_gpu()
    bayou.compress(base, tuned, tmp_path / "together", **options)
    alone, together = DeltaFile(tmp_path / "alone"), DeltaFile(tmp_path / "together")
    assert alone.nbytes == together.nbytes
    assert alone.sites == together.sites
    for name, error in alone.errors().items():
        assert together.errors()[name] == pytest.approx(error, rel=1e-2)
    if options.get("activations") != "compressed":  # there each layer sees what the one before has lost
        for name in alone.sites:
            nearly(alone.delta(name).terms, together.delta(name).terms)


class Killed(BaseException):
    """Stands for whatever stops a process between two sites."""


@pytest.mark.parametrize("after", [1, 5, 12])
def test_a_group_that_was_cut_short_is_done_again_whole(
    base: Path,
    tuned: Path,
    tmp_path: Path,
    as_on_a_gpu: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    """So that what a site's bytes are never depends on where the run was stopped."""
    as_on_a_gpu()
    bayou.compress(base, tuned, tmp_path / "whole", **FEW)
    put, kept = bayou.journal.Journal.put, []  # type: ignore[attr-defined]

    def stopping(journal: Any, index: int, blob: bytes, error: float, note: str) -> None:
        if len(kept) == after:
            raise Killed
        kept.append(index)
        put(journal, index, blob, error, note)

    with monkeypatch.context() as patch:
        patch.setattr("bayou.journal.Journal.put", stopping)
        with pytest.raises(Killed):
            bayou.compress(base, tuned, tmp_path / "cut", **FEW)
    assert len(list((tmp_path / "cut.journal").glob("*.site"))) == len(set(kept)) > 0
    bayou.compress(base, tuned, tmp_path / "cut", **FEW)
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_full_disk_is_told_though_a_thread_writes(
    base: Path, tuned: Path, tmp_path: Path, as_on_a_gpu: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_gpu()

    def full(*_: Any) -> None:
        raise bayou.BayouError("no space left")

    monkeypatch.setattr("bayou.journal.Journal.put", full)
    with pytest.raises(bayou.BayouError, match="no space left"):
        bayou.compress(base, tuned, tmp_path / "o", **FEW)
    assert not list(tmp_path.iterdir())


def test_other_codes_are_told_from_the_same_ones() -> None:
    """The comparison that the tests above make can fail."""
    one, two = (encode("deltacome", pico.power_law(64, 64, generator(i)), {}, gram_of(64), 20) for i in (0, 1))
    nearly(one, one)
    with pytest.raises(AssertionError):
        nearly(one, two)
