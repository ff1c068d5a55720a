"""methods/: what every method promises, checked for every file there is, and what each paper's method does.

A new file under bayou/methods is tested on arrival: nothing above the line "lowrank, bitdelta" names a method, but for
the further options in VARIANTS. Delta-CoMe has a file of its own, test_deltacome.py.
"""

import json
import re
from math import inf, nan
from typing import Any

import pytest
import torch
from encoded import DELTAS, calibrated, coded, dial, encode, generator, gram_of, lost, site_of

from bayou import decompose, methods, plan
from bayou.delta import Delta, Dense, LowRank
from bayou.entry import pack_terms, unpack_terms
from bayou.errors import BadInput
from bayou.methods import BLOCK, Gram, TermLayout, cut, float_lowrank, layout_of, nbytes, normalised
from bayou.packed import Packed, Spec
from bayou.plan import SiteRecord

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "lowrank": [{"bits": 8}, {"bits": 4}, {"bits": 3}, {"bits": 1}],
    "deltacome": [
        {"bands": "8x2,3x4,2"},
        {"bands": "8x2,3x4,2", "refit": "none"},
        {"bands": "16"},
        {"bands": "4", "group": 32},
        {"bands": "16x3,1", "act_order": False},
    ],
}
CASES = [(name, options) for name in methods.names() for options in ({}, *VARIANTS.get(name, []))]
cases = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n} {json.dumps(o)}" for n, o in CASES])
each = pytest.mark.parametrize("name", methods.names())
deltas = pytest.mark.parametrize("which", DELTAS)


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
    + [
        ("deltacome", "group", 0),
        ("deltacome", "group", -1),
        ("deltacome", "bands", "2,3"),
        ("deltacome", "refit", "some"),
    ]
    + [("deltacome", option, value) for option in ("damping", "ridge") for value in (-1, -0.01, inf, nan)],
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
        with pytest.raises(
            BadInput, match=re.escape(f"there is no method {name!r}; choose one of auto, bitdelta, delta")
        ):
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
    assert errors == sorted(errors, reverse=True)


def test_coded_lowrank_keeps_the_strength_of_the_whole() -> None:
    delta = DELTAS["200x160"]()
    for bits, full in ((4, True), (16, False)):
        strength = float((coded(delta, encode("lowrank", delta, {"bits": bits}, rank=80)) * delta).sum())
        assert (abs(strength / float(delta.square().sum()) - 1) < 1e-5) == full


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
