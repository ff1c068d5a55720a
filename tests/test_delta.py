"""delta.py: the decoder. Everything that reads a delta sees the same matrix, and a restored tensor is rounded once."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from bayou import delta as decoder
from bayou.delta import Delta, Dense, LowRank, Term
from bayou.packed import Packed, Spec

OUT, IN = 45, 70


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(rows: int, cols: int, text: str, seed: int = 0) -> Packed:
    spec = Spec.parse(text)
    if spec.floats:
        return Packed.floats(random(rows, cols, seed=seed), text)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**spec.bits, (rows, cols), generator=generator, dtype=torch.uint8)
    groups = spec.groups(cols)
    zeros = torch.randint(0, 2**spec.bits, (rows, groups), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, groups, generator=generator) if groups else None
    return Packed.codes(codes, spec, scales, zeros if spec.zeros else None)


def low_rank(*blocks: tuple[int, str, str], gain: float = 1.0, **scales: Tensor) -> LowRank:
    pairs = tuple((packed(OUT, r, u, i), packed(r, IN, v, i + 50)) for i, (r, u, v) in enumerate(blocks))
    return LowRank(pairs, gain, **scales)


OUTPUT, INPUT = random(OUT, seed=7).half(), random(IN, seed=8).half()
TERMS: dict[str, tuple[Term, ...]] = {
    "nothing": (),
    "dense": (Dense(packed(OUT, IN, "3g32z"), 0.5),),
    "sign": (Dense(packed(OUT, IN, "1"), -0.25),),
    "dense, scaled": (Dense(packed(OUT, IN, "4r"), 2.0, OUTPUT, INPUT),),
    "floats, input scaled": (Dense(packed(OUT, IN, "bf16"), 1.5, None, INPUT),),
    "low rank": (low_rank((5, "f16", "f16"), gain=0.75),),
    "bands": (low_rank((2, "f16", "8g32z"), (9, "3g128z", "3g32z"), (20, "2r", "2g128z"), gain=0.01),),
    "low rank, scaled": (low_rank((4, "f16", "8r"), (3, "f16", "4r"), output_scale=OUTPUT, input_scale=INPUT),),
    "low rank, output scaled": (low_rank((4, "f32", "f32"), gain=3.0, output_scale=OUTPUT),),
    "three terms": (
        Dense(packed(OUT, IN, "1"), 0.1, OUTPUT),
        low_rank((6, "f16", "2g32"), gain=-1.0),
        low_rank((1, "bf16", "bf16"), input_scale=INPUT),
    ),
}
every = pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)


def by_hand(terms: tuple[Term, ...]) -> np.ndarray:
    """The sum of the terms in fp64, from the stored matrices, as the specification states it."""
    total = np.zeros((OUT, IN))
    for term in terms:
        if isinstance(term, Dense):
            matrix = term.weight.unpack().double().numpy()
        else:
            matrix = sum(u.unpack().double().numpy() @ v.unpack().double().numpy() for u, v in term.blocks)
        left = 1.0 if term.output_scale is None else term.output_scale.double().numpy()[:, None]
        right = 1.0 if term.input_scale is None else term.input_scale.double().numpy()
        total += left * matrix * right * term.gain
    return total


# ------------------------------------------------------------------------------------------------ one matrix


@every
def test_materialize_is_the_sum_of_the_terms_in_fp64(terms: tuple[Term, ...]) -> None:
    found = Delta((OUT, IN), terms).materialize()
    assert found.shape == (OUT, IN) and found.dtype == torch.float64
    assert np.allclose(found.numpy(), by_hand(terms), rtol=1e-13, atol=1e-13)


@every
def test_any_rows_are_those_rows_of_the_whole(terms: tuple[Term, ...]) -> None:
    delta = Delta((OUT, IN), terms)
    whole = delta.materialize()
    for start, stop in ((0, 1), (3, 17), (40, None), (40, 1000), (44, 45)):
        assert torch.allclose(delta.materialize(start, stop), whole[start:stop], rtol=1e-13, atol=1e-13)


@every
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_apply_is_x_times_the_transpose(terms: tuple[Term, ...], dtype: torch.dtype, tolerance: float) -> None:
    delta = Delta((OUT, IN), terms)
    x = random(2, 3, IN, seed=3).to(dtype)
    expected = x.double() @ delta.materialize().T
    found = delta.apply(x)
    assert found.shape == (2, 3, OUT) and found.dtype == dtype
    assert float((found.double() - expected).norm()) <= tolerance * float(expected.norm())


@every
def test_lookup_is_rows_of_the_same_matrix(terms: tuple[Term, ...]) -> None:
    delta = Delta((OUT, IN), terms)
    ids = torch.tensor([[0, 44, 7], [7, 7, 21]])
    found = delta.lookup(ids)
    assert found.shape == (2, 3, IN) and found.dtype == torch.float32
    assert torch.allclose(found, delta.materialize()[ids].float(), rtol=1e-6, atol=1e-7)
    assert delta.lookup(torch.tensor(5)).shape == (IN,)
    assert delta.lookup(torch.empty(0, 4, dtype=torch.int64)).shape == (0, 4, IN)


def test_channel_scales_multiply_rows_and_columns() -> None:
    ones = Packed.floats(torch.ones(2, 3))
    rows, columns = torch.tensor([2.0, 3.0]).half(), torch.tensor([1.0, 10.0, 100.0]).half()
    expected = [[1.0, 10.0, 100.0], [1.5, 15.0, 150.0]]
    flat = LowRank(((Packed.floats(torch.ones(2, 1)), Packed.floats(torch.ones(1, 3))),), 0.5, rows, columns)
    for term in (Dense(ones, 0.5, rows, columns), flat):
        delta = Delta((2, 3), (term,))
        assert delta.materialize().tolist() == expected
        assert delta.apply(torch.eye(3)).T.tolist() == expected
        assert delta.lookup(torch.tensor([1])).tolist() == expected[1:]


def test_the_rank_is_that_of_all_blocks_and_the_factors_come_in_the_order_of_the_file() -> None:
    term = low_rank((5, "f16", "f16"), (7, "2r", "2r"))
    assert term.rank == 12
    assert [factor.shape for factor in term.factors()] == [(OUT, 5), (5, IN), (OUT, 7), (7, IN)]
    assert [factor.shape for factor in Dense(packed(OUT, IN, "1")).factors()] == [(OUT, IN)]


# ------------------------------------------------------------------------------------------------ restoring


def to_nearest(value: Fraction, digits: int) -> float:
    """Rounded to `digits` binary digits, ties to even, exactly; for numbers of an ordinary size."""
    if value == 0:
        return 0.0
    ulp = Fraction(2) ** (math.floor(math.log2(abs(value))) - digits + 1)
    return float(round(value / ulp) * ulp)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24)], ids=str)
def test_restore_is_gain_times_reference_plus_terms_rounded_once(dtype: torch.dtype, digits: int) -> None:
    # Powers of two and few-bit numbers: the fp64 sums below are exact, so the one rounding is all there is.
    weight = Packed.floats(torch.tensor([[2.0**-9, 2.0**-9, 2.0**-12], [-(2.0**-12), 3 * 2.0**-13, 1.0]]), "f32")
    reference = torch.tensor([[1.0, 1 + 2**-7, 1.0], [1 + 2**-10, -1.0, 0.0]])
    terms = (Dense(weight, 1.0), Dense(weight, 2.0**-30))
    for gain in (1.0, -1.5, 0.0):
        found = Delta((2, 3), terms, "w", gain).restore(reference, dtype)
        for i in range(2):
            for j in range(3):
                code = Fraction(float(weight.unpack()[i, j]))
                exact = Fraction(gain) * Fraction(float(reference[i, j])) + code + code / 2**30
                assert float(found[i, j]) == to_nearest(exact, digits), (gain, i, j)


def test_one_rounding_where_a_second_would_show() -> None:
    # 1 + 2^-8 lies halfway between two bf16 numbers; 2^-40 above it decides, and is lost on the way through fp32.
    terms = tuple(Dense(Packed.floats(torch.tensor([[value]]), "f32")) for value in (2.0**-8, 2.0**-40))
    delta = Delta((1, 1), terms, "w")
    assert float((1 + delta.materialize()).float().bfloat16()) == 1.0
    assert float(delta.restore(torch.ones(1, 1), torch.bfloat16)) == 1 + 2**-7


@every
@pytest.mark.parametrize("gain", [1.0, 0.0, -0.5])
def test_restore_with_a_reference(terms: tuple[Term, ...], gain: float) -> None:
    reference = random(OUT, IN, seed=4).bfloat16()
    found = Delta((OUT, IN), terms, "w", gain).restore(reference, torch.float64)
    expected = gain * reference.double().numpy() + by_hand(terms)
    assert found.dtype == torch.float64 and np.allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


@every
def test_restore_without_a_reference_is_the_terms_whatever_the_gain(terms: tuple[Term, ...]) -> None:
    delta = Delta((OUT, IN), terms, None, 5.0)
    assert torch.equal(delta.restore(None, torch.float32), delta.materialize().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_reference_without_terms_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    reference = random(OUT, IN, seed=5).to(dtype)
    reference[0, :2] = torch.tensor([-0.0, 0.0])
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    restored = Delta((OUT, IN), (), "w").restore(reference, dtype)
    assert torch.equal(restored.view(bits), reference.view(bits))


@every
def test_restoring_in_blocks_of_rows_changes_nothing(terms: tuple[Term, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    delta, reference = Delta((OUT, IN), terms, "w"), random(OUT, IN, seed=6)
    whole = delta.restore(reference, torch.float64)
    monkeypatch.setattr(decoder, "ROWS", 8)
    assert torch.allclose(delta.restore(reference, torch.float64), whole, rtol=1e-14, atol=1e-14)


def test_restore_leaves_the_reference_alone() -> None:
    reference = random(OUT, IN)
    before = reference.clone()
    Delta((OUT, IN), TERMS["dense"], "w", 2.0).restore(reference, torch.float32)
    assert torch.equal(reference, before)


# ------------------------------------------------------------------------------------------------ an immutable value


@every
def test_a_moved_delta_is_the_same(terms: tuple[Term, ...]) -> None:
    delta = Delta((OUT, IN), terms, "w", 0.5)
    moved = delta.to("cpu")
    assert (moved.shape, moved.reference, moved.gain, moved.device) == (delta.shape, "w", 0.5, torch.device("cpu"))
    assert [type(term) for term in moved.terms] == [type(term) for term in terms]
    assert torch.equal(moved.materialize(), delta.materialize())


def test_moving_moves_every_tensor() -> None:
    delta = Delta((OUT, IN), TERMS["three terms"] + TERMS["dense, scaled"]).to("meta")
    held: list[Tensor] = []
    for term in delta.terms:
        held += [scale for scale in (term.output_scale, term.input_scale) if scale is not None]
        held += [part for factor in term.factors() for part in factor.parts]
    assert {tensor.device.type for tensor in held} == {"meta"} and len(held) > 10
    assert delta.device.type == "meta"


@pytest.mark.parametrize(
    "change",
    [
        lambda delta: setattr(delta, "gain", 2.0),
        lambda delta: setattr(delta.terms[0], "gain", 2.0),
        lambda delta: setattr(delta.terms[0].weight, "shape", (1, 1)),
    ],
    ids=["delta", "term", "packed"],
)
def test_nothing_can_be_assigned_to(change: Callable[[Delta], None]) -> None:
    with pytest.raises(AttributeError, match="cannot assign"):
        change(Delta((OUT, IN), TERMS["dense"]))
