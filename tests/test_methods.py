"""methods/: what every method promises, checked for every file there is, and what each paper's method does.

A new file under bayou/methods is tested on arrival: nothing above the line "deltacome" names a method, but for the
further options in VARIANTS.
"""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from pico import power_law
from torch import Tensor

from bayou import decompose, methods, plan
from bayou.decompose import Matrix
from bayou.delta import Delta, Dense, LowRank, Term
from bayou.deltafile import pack_terms, unpack_terms
from bayou.errors import BadInput
from bayou.methods import BLOCK, Gram, Site, TermLayout, cut, float_lowrank, layout_of, nbytes, normalised
from bayou.methods.deltacome import parse_bands
from bayou.packed import Packed, Spec
from bayou.plan import SiteRecord

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "lowrank": [{"bits": 8}, {"bits": 4}, {"bits": 3}, {"bits": 1}],
    "deltacome": [
        {"bands": "8x2,3x4,2"},
        {"bands": "8x2,3x4,2", "refit": False},
        {"bands": "16"},
        {"bands": "4", "group": 32},
        {"bands": "16x3,1", "act_order": False},
    ],
}
CASES = [(name, options) for name in methods.names() for options in ({}, *VARIANTS.get(name, []))]
cases = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n} {json.dumps(o)}" for n, o in CASES])
each = pytest.mark.parametrize("name", methods.names())

Encoded = tuple[Tensor, tuple[Term, ...], tuple[TermLayout, ...]]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gram_of(cols: int, tokens: int = 300, seed: int = 9) -> Gram:
    x = torch.randn(tokens, cols, generator=generator(seed)) * torch.logspace(-1, 0.5, cols)
    return Gram(x.T @ x)


def site_of(delta: Tensor, gram: Gram | None = None) -> Site:
    return Site("layer.weight", Matrix((delta.shape[0], delta.shape[1]), lambda a, b: delta[a:b]), "linear", gram)


def dial(name: str, shape: tuple[int, int], rank: int = 12) -> dict[str, int]:
    return {"rank": min(rank, *shape)} if methods.has_rank(name) else {}


def encode(
    name: str, delta: Tensor, options: dict[str, Any], gram: Gram | None = None, rank: int = 12
) -> tuple[Term, ...]:
    shape = (delta.shape[0], delta.shape[1])
    return methods.get(name).encode(site_of(delta, gram), **options, **dial(name, shape, rank))


def coded(delta: Tensor, terms: tuple[Term, ...]) -> Tensor:
    return Delta((delta.shape[0], delta.shape[1]), terms).materialize()


def lost(delta: Tensor, terms: tuple[Term, ...], gram: Gram | None = None) -> float:
    """||(delta - coded) X|| / ||delta X||, or without the X."""
    error, whole = delta.double() - coded(delta, terms), delta.double()
    if gram is None:
        return float(error.norm() / whole.norm())
    h = gram.matrix.double()
    return float(((error @ h * error).sum() / (whole @ h * whole).sum()) ** 0.5)


DELTAS: dict[str, Callable[[], Tensor]] = {
    "33x100": lambda: power_law(33, 100, generator(0)) * 0.1,
    "100x33": lambda: power_law(100, 33, generator(1)) * 0.1,
    "1x70": lambda: power_law(1, 70, generator(2)) * 0.1,
    "70x1": lambda: power_law(70, 1, generator(3)) * 0.1,
    "rank 2 of 33": lambda: power_law(33, 100, generator(4), rank=2) * 0.1,
    "200x160": lambda: power_law(200, 160, generator(5)) * 0.1,
    "huge": lambda: power_law(40, 50, generator(6)) * 1e6,
    "tiny": lambda: power_law(40, 50, generator(7)) * 1e-15,
}
deltas = pytest.mark.parametrize("which", DELTAS)
calibrated = pytest.mark.parametrize("calibrated", [False, True], ids=["no gram", "gram"])


# ------------------------------------------------------------------------------------------------ every method


@cases
@calibrated
@deltas
def test_what_is_encoded_is_what_was_promised_and_no_worse_than_nothing(
    name: str, options: dict[str, Any], calibrated: bool, which: str
) -> None:
    delta = DELTAS[which]()
    shape = (delta.shape[0], delta.shape[1])
    gram = gram_of(shape[1]) if calibrated else None
    terms = encode(name, delta, options, gram)
    promised = methods.get(name).layout(shape, **options, **dial(name, shape))

    assert tuple(layout_of(term) for term in terms) == promised
    raw = pack_terms(terms)
    assert len(raw) == nbytes(promised, shape)

    whole = Delta(shape, terms)
    matrix = whole.materialize()
    assert matrix.shape == shape and bool(matrix.isfinite().all())
    x = torch.randn(5, shape[1], generator=generator(8))
    expected = x.double() @ matrix.T
    assert float((whole.apply(x).double() - expected).norm()) <= 1e-5 * float(expected.norm())

    again = unpack_terms(torch.frombuffer(bytearray(raw), dtype=torch.uint8), promised, shape)
    assert pack_terms(again) == raw
    assert torch.equal(Delta(shape, again).materialize(), matrix)
    assert [type(term) for term in again] == [type(term) for term in terms]

    # A method that knows the inputs answers for what they give; the others for the weights.
    answers_for = gram if getattr(methods.get(name), "USES_GRAM", False) else None
    assert lost(delta, terms, answers_for) < 0.95


@cases
def test_encoding_is_deterministic_and_leaves_the_random_state_alone(name: str, options: dict[str, Any]) -> None:
    delta = DELTAS["33x100"]()
    gram = gram_of(100)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = pack_terms(encode(name, delta, options, gram))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert pack_terms(encode(name, delta, options, gram_of(100))) == first


@cases
@calibrated
def test_a_delta_of_zeros_stays_one(name: str, options: dict[str, Any], calibrated: bool) -> None:
    # An expert that fine-tuning did not touch, beside others that it did.
    delta = torch.zeros(40, 50)
    terms = encode(name, delta, options, gram_of(50) if calibrated else None)
    base = torch.randn(40, 50, generator=generator(0))
    assert torch.equal(Delta((40, 50), terms, "w").restore(base, torch.float32), base)
    raw = bytearray(pack_terms(terms))
    layouts = tuple(layout_of(term) for term in terms)
    assert torch.equal(
        Delta((40, 50), unpack_terms(torch.frombuffer(raw, dtype=torch.uint8), layouts, (40, 50))).materialize(),
        coded(delta, terms),
    )


@cases
def test_inputs_that_never_were_or_hardly_do_no_harm(name: str, options: dict[str, Any]) -> None:
    delta = DELTAS["33x100"]()
    for gram in (Gram(torch.zeros(100, 100)), gram_of(100, tokens=3)):
        assert bool(coded(delta, encode(name, delta, options, gram)).isfinite().all())


@cases
def test_a_delta_read_in_blocks_is_encoded_alike(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = DELTAS["100x33"]()
    whole = coded(delta, encode(name, delta, options))
    monkeypatch.setattr(decompose, "ROWS", 17)
    in_blocks = coded(delta, encode(name, delta, options))
    assert float((whole - in_blocks).norm()) <= 0.05 * float(whole.norm())  # a code may fall to the other side of a tie


@cases
def test_the_delta_and_the_gram_are_left_alone(name: str, options: dict[str, Any]) -> None:
    delta, gram = DELTAS["33x100"](), gram_of(100)
    before = delta.clone(), gram.matrix.clone()
    encode(name, delta, options, gram)
    assert torch.equal(delta, before[0]) and torch.equal(gram.matrix, before[1])


@cases
def test_options_survive_the_plan(name: str, options: dict[str, Any]) -> None:
    shape = (33, 100)
    chosen = methods.check(name, options) | dial(name, shape)
    record = SiteRecord(
        tensor="layer.weight",
        part=None,
        shape=shape,
        disk_shape=shape,
        dtype="BF16",
        transposed=False,
        reference="layer.weight",
        reference_part=None,
        gain=1.0,
        role="linear",
        method=name,
        options=chosen,
        terms=methods.get(name).layout(shape, **chosen),
    )
    (read,) = plan.loads(plan.dumps([record]), [record.name])
    assert read == record
    delta = DELTAS["33x100"]()
    again = methods.get(read.method).encode(site_of(delta), **read.options)
    assert pack_terms(again) == pack_terms(encode(name, delta, options))
    assert len(pack_terms(again)) == read.nbytes


@each
def test_the_module_says_what_it_is_and_where_it_comes_from(name: str) -> None:
    text = methods.get(name).__doc__ or ""
    title = text.splitlines()[0]
    assert len(title.split()) >= 5 and title[0].isupper(), title
    assert re.search(r"arxiv(\.org/abs/| )\d{4}\.\d{5}", text, re.IGNORECASE), f"{name} links no paper"
    assert methods.get(name).encode.__doc__ and methods.get(name).layout.__doc__


@each
def test_embeddings_are_left_to_a_method_that_there_is_with_options_that_it_has(name: str) -> None:
    given = dict(methods.get(name).EMBEDDINGS)
    table = given.pop("method")
    own = methods.options(name) if table == name else {}
    checked = methods.check(table, own | given)
    layouts = methods.get(table).layout((4000, 64), **checked, **dial(table, (4000, 64)))
    assert nbytes(layouts, (4000, 64)) < 2 * 4000 * 64


@each
def test_layout_takes_the_options_of_encode(name: str) -> None:
    chosen = methods.options(name)
    assert methods.get(name).layout((64, 96), **chosen, **dial(name, (64, 96)))
    assert json.loads(json.dumps(chosen)) == chosen
    assert "rank" not in chosen


@each
def test_an_unknown_option_is_refused_by_name_with_those_there_are(name: str) -> None:
    with pytest.raises(BadInput, match=f"method {name} has no option 'colour'") as error:
        methods.check(name, {"colour": 3})
    for known in methods.options(name):
        assert known in str(error.value)
    with pytest.raises(BadInput, match="no option 'rank'"):
        methods.check(name, {"rank": 3})


@each
def test_an_option_of_the_wrong_type_is_refused_with_its_value(name: str) -> None:
    for option, default in methods.options(name).items():
        wrong = 3 if isinstance(default, str) else "red"
        with pytest.raises(BadInput, match=f"method {name}: {option}={wrong!r} is not"):
            methods.check(name, {option: wrong})


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("lowrank", "bits", 9), ("lowrank", "bits", 0), ("lowrank", "bits", True), ("lowrank", "bits", 4.0)]
    + [("deltacome", "group", 0), ("deltacome", "group", -1), ("deltacome", "bands", "2,3"), ("deltacome", "refit", 1)],
)
def test_a_value_that_the_method_cannot_use_is_refused_before_any_work(name: str, option: str, value: Any) -> None:
    with pytest.raises(BadInput, match=re.escape(str(value))):
        methods.check(name, {option: value})


def test_check_fills_in_the_defaults_and_takes_a_whole_number_for_a_fraction() -> None:
    assert methods.check("lowrank", {}) == {"bits": 16}
    assert methods.check("lowrank", {"bits": 4}) == {"bits": 4}
    assert methods.check("deltacome", {"damping": 1})["damping"] == 1
    assert methods.check("bitdelta", {}) == {}


def test_an_unknown_method_is_refused_with_the_list() -> None:
    for name in ("zip", "", "../lowrank", "__init__", "low_rank"):
        with pytest.raises(BadInput, match=re.escape(f"there is no method {name!r}; choose one of bitdelta, delta")):
            methods.get(name)


# ------------------------------------------------------------------------------------------------ common pieces


def test_cut_makes_full_blocks_and_a_rest() -> None:
    assert [cut(n) for n in (0, 1, 128, 129, 300)] == [[], [1], [128], [128, 1], [128, 128, 44]]
    assert cut(7, 3) == [3, 3, 1]


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e8])
def test_normalised_factors_are_about_one_and_their_product_is_kept(scale: float) -> None:
    u, s, v = torch.linalg.svd(torch.randn(30, 20, generator=generator(0)) * scale, full_matrices=False)
    left, right, gain = normalised(u * s.sqrt(), v * s.sqrt()[:, None])
    assert 1 <= float(left.abs().max()) < 2 and 1 <= float(right.abs().max()) < 2
    assert torch.allclose(gain * (left @ right), (u * s) @ v, rtol=1e-4, atol=1e-6 * scale)
    assert float(torch.tensor(gain, dtype=torch.float32)) == gain  # as it is stored


def test_the_gain_of_nothing_can_be_stored() -> None:
    gain = normalised(torch.zeros(3, 2), torch.zeros(2, 3))[2]
    assert float(torch.tensor(gain, dtype=torch.float32)) == gain > 0


def test_float_lowrank_stores_blocks_of_128() -> None:
    u, s, v = torch.linalg.svd(torch.randn(300, 280, generator=generator(1)), full_matrices=False)
    term = float_lowrank(u, s, v, "f32")
    assert [part.shape[1] for part, _ in term.blocks] == [BLOCK, BLOCK, 24]
    assert torch.allclose(Delta((300, 280), (term,)).materialize(), ((u * s) @ v).double(), atol=1e-4)


def test_the_layout_of_a_term_counts_gain_scales_and_matrices() -> None:
    rows, columns = torch.ones(20).half(), torch.ones(50).half()
    dense = Dense(Packed.codes(torch.zeros(20, 50, dtype=torch.uint8), Spec.parse("1")), 1.0, rows, None)
    low = LowRank(((Packed.floats(torch.zeros(20, 3)), Packed.floats(torch.zeros(3, 50))),), 1.0, rows, columns)
    assert layout_of(dense) == TermLayout("Dense", ((0, "1", ""),), True, False)
    assert layout_of(low) == TermLayout("LowRank", ((3, "f16", "f16"),), True, True)
    assert layout_of(dense).nbytes((20, 50)) == 16 + 48 + 20 * 8 == len(pack_terms([dense]))
    assert layout_of(low).nbytes((20, 50)) == 16 + 48 + 112 + 128 + 304 == len(pack_terms([low]))


def test_a_gram_is_factorised_once_for_all_sites_that_share_it() -> None:
    gram = gram_of(20)
    assert gram.factor(0.01, True) is gram.factor(0.01, True)
    assert gram.factor(0.01, True) is not gram.factor(0.01, False)
    assert gram.factor(0.02, True) is not gram.factor(0.01, True)


# ------------------------------------------------------------------------------------------------ lowrank, bitdelta


@pytest.mark.parametrize("which", ["33x100", "100x33", "200x160"])
def test_lowrank_in_16_bits_is_the_best_of_its_rank(which: str) -> None:
    delta = DELTAS[which]()
    sigma = torch.linalg.svdvals(delta.double())
    for rank in (1, 7, len(sigma)):
        best = float(sigma[rank:].norm() / sigma.norm())
        assert lost(delta, encode("lowrank", delta, {}, rank=rank)) == pytest.approx(best, abs=1e-3)


def test_lowrank_loses_less_with_more_bits() -> None:
    delta = DELTAS["200x160"]()
    errors = [lost(delta, encode("lowrank", delta, {"bits": bits}, rank=30)) for bits in (1, 2, 3, 4, 6, 8, 16)]
    assert errors == sorted(errors, reverse=True) and errors[-2] < 1.01 * errors[-1]


def test_bitdelta_is_the_sign_times_the_mean_magnitude() -> None:
    delta = torch.tensor([[1.0, -2.0, 0.5], [-0.25, 4.0, -0.25]])
    (term,) = encode("bitdelta", delta, {})
    mean = 8 / 6
    assert torch.allclose(coded(delta, (term,)), delta.sign().double() * mean)
    assert nbytes((layout_of(term),), (4096, 4096)) == 16 + 4096 * 4096 // 8


def test_bitdelta_s_scale_is_the_best_there_is() -> None:
    delta = DELTAS["33x100"]()
    (term,) = encode("bitdelta", delta, {})
    signs = coded(delta, (term,)).sign()
    best = float((signs * delta).mean())
    assert float(coded(delta, (term,)).abs().mean()) == pytest.approx(best, rel=1e-6)


# ------------------------------------------------------------------------------------------------ deltacome


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


@pytest.mark.parametrize("refit", [True, False])
@calibrated
def test_full_rank_in_floats_gives_the_delta_back(refit: bool, calibrated: bool) -> None:
    for which in ("33x100", "100x33", "rank 2 of 33"):
        delta = DELTAS[which]()
        gram = gram_of(delta.shape[1]) if calibrated else None
        terms = encode("deltacome", delta, {"bands": "16", "refit": refit}, gram, rank=1000)
        assert lost(delta, terms) < 2e-3


@pytest.mark.parametrize("bands", ["8x2,3x4,2", "2", "4", "8x2,3x32,2"])
@pytest.mark.parametrize("seed", range(3))
def test_the_refit_loses_less_of_what_the_inputs_give(bands: str, seed: int) -> None:
    delta, gram = power_law(96, 128, generator(seed + 20)), gram_of(128, seed=seed)
    errors = [
        lost(delta, encode("deltacome", delta, {"bands": bands, "refit": r}, gram, rank=48), gram)
        for r in (True, False)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("refit", [True, False])
def test_knowing_the_inputs_loses_less_of_what_they_give(refit: bool) -> None:
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
        blocks(encode("deltacome", delta, {"bands": bands, "refit": False}, gram, rank=40))
        for bands in ("8x2,3x8,2", "4x2,3x8,2", "8x2,5x8,2", "8x2,3x8,4")
    ]
    for changed, other in enumerate(encoded[1:]):
        for band in range(3):
            assert same(encoded[0][band][1], other[band][1]) == (band != changed)
            assert band == changed or same(encoded[0][band][0], other[band][0])


def test_with_the_refit_a_later_band_knows_of_the_earlier_ones() -> None:
    delta, gram = power_law(300, 256, generator(40)), gram_of(256)
    a, b = (blocks(encode("deltacome", delta, {"bands": bands}, gram, rank=40)) for bands in ("3x2,3x8,2", "1x2,3x8,2"))
    assert same(a[2][1], b[2][1]) and not same(a[2][0], b[2][0])


def test_the_refit_changes_u_alone_where_the_ridge_is_nil() -> None:
    delta, gram = power_law(100, 128, generator(41)), gram_of(128)
    ways: tuple[dict[str, Any], ...] = ({"ridge": 0.0}, {"refit": False})
    a, b = (blocks(encode("deltacome", delta, {"bands": "8x2,2"} | way, gram, rank=20)) for way in ways)
    assert all(same(x[1], y[1]) and not same(x[0], y[0]) for x, y in zip(a, b, strict=True))


def test_the_ridge_serves_other_inputs_than_the_few_that_calibrated() -> None:
    delta, few, other = power_law(100, 128, generator(43)), gram_of(128, tokens=20), gram_of(128, tokens=2000, seed=77)
    fitted = [encode("deltacome", delta, {"ridge": ridge}, few, rank=40) for ridge in (0.1, 0.0)]
    on_few, on_other = ([lost(delta, terms, gram) for terms in fitted] for gram in (few, other))
    assert on_few[0] > on_few[1] and on_other[0] < 0.8 * on_other[1]


def test_the_ridge_belongs_to_the_refit_and_to_a_gram() -> None:
    delta, gram = DELTAS["33x100"](), gram_of(100)
    for given, options in ((gram, {"refit": False}), (None, {})):
        a, b = (pack_terms(encode("deltacome", delta, options | {"ridge": ridge}, given)) for ridge in (0.0, 0.5))
        assert a == b


def test_more_bits_and_more_ranks_lose_less() -> None:
    delta, gram = power_law(128, 128, generator(42)), gram_of(128)
    by_bits = [
        lost(delta, encode("deltacome", delta, {"bands": bits}, gram, rank=40), gram)
        for bits in ("1", "2", "4", "8", "16")
    ]
    by_rank = [lost(delta, encode("deltacome", delta, {}, gram, rank=rank), gram) for rank in (2, 10, 34, 80)]
    assert all(a > b for values in (by_bits[:4], by_rank) for a, b in pairwise(values))
    assert by_bits[4] < 1.02 * by_bits[3]
