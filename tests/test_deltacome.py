"""methods/deltacome.py: bands and blocks, the refit, the ridge, and what each of them is for."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from encoded import DELTAS, calibrated, encode, generator, gram_of, lost
from pico import power_law

from bayou import methods
from bayou.delta import Delta, LowRank, Term
from bayou.entry import pack_terms
from bayou.errors import BadInput
from bayou.methods.deltacome import parse_bands
from bayou.packed import Packed


def test_bands_are_bits_and_ranks_and_the_last_takes_the_rest() -> None:
    assert parse_bands("8x2,3x32,2") == [(8, 2), (3, 32), (2, None)]
    assert parse_bands("16") == [(16, None)] and parse_bands(" 4x10 , 1 ") == [(4, 10), (1, None)]


@pytest.mark.parametrize(
    "bands",
    [
        "",
        ",",
        "8x2",
        "8x2,3x32",
        "8,2",
        "9",
        "0",
        "32",
        "x2,2",
        "8x,2",
        "8xx2,2",
        "8x-2,2",
        "a",
        "8x2;2",
        "-3",
        "8x2,,2",
    ]
    + ["2.5", "\u00b2", "\u0663x2,2", "8x\u00b2,2", "016x2,2", "8x1e3,2", "8x9999999999,2"],
)
def test_bands_that_say_something_else_are_refused_with_their_text(bands: str) -> None:
    with pytest.raises(BadInput, match="^bands ") as error:
        parse_bands(bands)
    assert repr(bands) in str(error.value)
    assert "8x2,3x32,2" in str(error.value) or "the last takes the rest" in str(error.value)


def test_blocks_end_at_the_bands_edges() -> None:
    (layout,) = methods.get("deltacome").layout((4096, 4096), rank=300)
    assert [part[0] for part in layout.parts] == [2, 32, 128, 128, 10]
    assert [part[2] for part in layout.parts] == ["8g128z", "3g128z", "2g128z", "2g128z", "2g128z"]
    assert layout.parts[0][1] == "f16"  # two columns: codes, a scale and a zero point a row would be larger
    (short,) = methods.get("deltacome").layout((4096, 4096), rank=5)
    assert [part[0] for part in short.parts] == [2, 3]
    for rank in (1, 2, 3, 34, 35, 162, 163):
        (layout,) = methods.get("deltacome").layout((4096, 4096), rank=rank)
        assert sum(part[0] for part in layout.parts) == rank


@pytest.mark.parametrize("refit", ["rows", "full", "none"])
@calibrated
def test_full_rank_in_floats_gives_the_delta_back(refit: str, calibrated: bool) -> None:
    for which in ("33x100", "100x33", "rank 2 of 33"):
        delta = DELTAS[which]()
        gram = gram_of(delta.shape[1]) if calibrated else None
        terms = encode("deltacome", delta, {"bands": "16", "refit": refit}, gram, rank=1000)
        assert lost(delta, terms) < 2e-3


@pytest.mark.parametrize("bands", ["8x2,3x4,2", "2", "4", "8x2,3x32,2"])
@pytest.mark.parametrize("seed", range(3))
def test_the_full_refit_loses_less_of_what_the_inputs_give(bands: str, seed: int) -> None:
    delta, gram = power_law(96, 128, generator(seed + 20)), gram_of(128, seed=seed)
    errors = [
        lost(delta, encode("deltacome", delta, {"bands": bands, "refit": r}, gram, rank=48), gram)
        for r in ("full", "none")
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("refit", ["rows", "full", "none"])
def test_knowing_the_inputs_loses_less_of_what_they_give(refit: str) -> None:
    delta, gram = power_law(96, 128, generator(30)), gram_of(128)
    options = {"bands": "8x2,3x8,2", "refit": refit}
    errors = [lost(delta, encode("deltacome", delta, options, given, rank=48), gram) for given in (gram, None)]
    assert errors[0] < errors[1]


def blocks(terms: tuple[Term, ...]) -> list[tuple[Packed, Packed]]:
    (term,) = terms
    assert isinstance(term, LowRank)
    return list(term.blocks)


def same(a: Packed, b: Packed) -> bool:
    return a.spec == b.spec and all(torch.equal(x, y) for x, y in zip(a.parts, b.parts, strict=True))


def test_without_the_refit_each_band_is_what_it_would_be_with_others_of_other_bits() -> None:
    delta, gram = power_law(300, 256, generator(40)), gram_of(256)
    encoded = [
        blocks(encode("deltacome", delta, {"bands": bands, "refit": "none"}, gram, rank=40))
        for bands in ("8x2,3x8,2", "4x2,3x8,2", "8x2,5x8,2", "8x2,3x8,4")
    ]
    for changed, other in enumerate(encoded[1:]):
        for band in range(3):
            assert same(encoded[0][band][1], other[band][1]) == (band != changed)
            assert band == changed or same(encoded[0][band][0], other[band][0])


def test_with_the_refit_a_later_band_knows_of_the_earlier_ones() -> None:
    delta, gram = power_law(300, 256, generator(40)), gram_of(256)
    a, b = (
        blocks(encode("deltacome", delta, {"bands": bands, "refit": "full"}, gram, rank=40))
        for bands in ("3x2,3x8,2", "1x2,3x8,2")
    )
    assert same(a[2][1], b[2][1]) and not same(a[2][0], b[2][0])


def test_the_refit_changes_u_alone_where_the_ridge_is_nil() -> None:
    delta, gram = power_law(100, 128, generator(41)), gram_of(128)
    ways: tuple[dict[str, Any], ...] = ({"ridge": 0.0, "refit": "full"}, {"refit": "none"})
    a, b = (blocks(encode("deltacome", delta, {"bands": "8x2,2"} | way, gram, rank=20)) for way in ways)
    assert all(same(x[1], y[1]) and not same(x[0], y[0]) for x, y in zip(a, b, strict=True))


def test_the_ridge_serves_other_inputs_than_the_few_that_calibrated() -> None:
    delta, few, other = power_law(100, 128, generator(43)), gram_of(128, tokens=20), gram_of(128, tokens=2000, seed=77)
    fitted = [encode("deltacome", delta, {"refit": "full", "ridge": ridge}, few, rank=40) for ridge in (1.0, 0.0)]
    on_other = [lost(delta, terms, other) for terms in fitted]
    assert on_other[0] < on_other[1]


def test_a_great_ridge_gives_the_plain_u() -> None:
    delta, gram = DELTAS["33x100"](), gram_of(100)
    plain = encode("deltacome", delta, {"refit": "none", "bands": "2"}, gram, rank=20)
    pulled = encode("deltacome", delta, {"refit": "full", "ridge": 1e9, "bands": "2"}, gram, rank=20)
    for (u, v), (other_u, other_v) in zip(plain[0].blocks, pulled[0].blocks, strict=True):
        # But for the scales of U's rows, which the refit makes up for lost strength.
        assert torch.equal(u.parts[0], other_u.parts[0]) and torch.equal(v.unpack(), other_v.unpack())


def test_the_ridge_belongs_to_the_refit() -> None:
    delta, gram = DELTAS["33x100"](), gram_of(100)
    options = {"refit": "none"}
    a, b = (pack_terms(encode("deltacome", delta, options | {"ridge": ridge}, gram)) for ridge in (0.0, 0.5))
    assert a == b


def test_the_refit_gives_each_row_of_the_delta_its_full_strength() -> None:
    delta, gram = power_law(60, 100, generator(5)), gram_of(100)
    acted = delta.double() @ gram.matrix.double()
    for refit in ("rows", "full", "none"):
        coded = Delta(
            tuple(delta.shape), encode("deltacome", delta, {"refit": refit, "strength": 1.0}, gram, rank=40)
        ).materialize()
        strength = (coded * acted).sum(1) / (delta.double() * acted).sum(1)
        # Within the rounding of the scales to fp16 with it, short without.
        assert (float((strength - 1).abs().max()) < 2e-3) == (refit != "none")
        assert float(strength.mean()) < 1 + 1e-3 and (refit != "none") == (float(strength.mean()) > 1 - 1e-3)


def test_more_bits_and_more_ranks_lose_less() -> None:
    delta, gram = power_law(128, 128, generator(42)), gram_of(128)
    by_bits = [
        lost(delta, encode("deltacome", delta, {"bands": bits}, gram, rank=40), gram)
        for bits in ("1", "2", "4", "8", "16")
    ]
    by_rank = [lost(delta, encode("deltacome", delta, {}, gram, rank=rank), gram) for rank in (2, 10, 34, 80)]
    assert all(a > b for values in (by_bits[:4], by_rank) for a, b in pairwise(values))
    assert by_bits[4] < 1.02 * by_bits[3]
