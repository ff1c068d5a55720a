"""quantize.py: nearest levels where nothing else is known, and GPTQ as the textbook has it."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from bayou import quantize
from bayou.packed import Packed, Spec
from bayou.quantize import Factor, Grid, factorize, gptq, grid, nearest, spread

SPECS = ["1r", "1g32", "2r", "2g128z", "3g32z", "3g16", "4g32", "5g7z", "8r", "8rz"]


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moments(cols: int, *, tokens: int = 400, seed: int = 1, batch: tuple[int, ...] = ()) -> Tensor:
    """X X^T of strongly correlated inputs with very unequal channels."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(*batch, cols, cols, generator=g) / cols**0.5 + torch.eye(cols)
    x = (
        torch.randn(*batch, tokens, cols, generator=g)
        @ mix
        * torch.logspace(-1, 1, cols)[torch.randperm(cols, generator=g)]
    )
    return x.mT @ x


def levels_of(w: Tensor, text: str) -> Grid:
    spec = Spec.parse(text)
    return spread(*grid(w, spec), spec, w.shape[-1])


def lost(w: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """||(w - values) X||^2."""
    error = (w - values).double()
    return (error @ hessian.double() * error).sum((-2, -1))


# ------------------------------------------------------------------------------------------------ levels


@pytest.mark.parametrize("text", SPECS)
def test_nearest_takes_the_nearest_of_all_levels(text: str) -> None:
    spec, w = Spec.parse(text), weights(6, 75)
    found = nearest(w, spec)
    assert found.spec == spec
    scale, zero = grid(w, spec)
    size = spec.group or 75
    for group in range(spec.groups(75)):
        columns = slice(group * size, min((group + 1) * size, 75))
        codes = torch.arange(2.0**spec.bits)
        levels = scale[:, group, None] * (codes - zero[:, group, None])
        least = (w[:, columns, None] - levels[:, None]).abs().amin(-1)
        assert torch.allclose((found.unpack()[:, columns] - w[:, columns]).abs(), least, atol=1e-6)


@pytest.mark.parametrize("text", SPECS)
def test_scales_are_fp16_and_zero_points_are_codes(text: str) -> None:
    spec, w = Spec.parse(text), weights(9, 130, seed=3)
    scale, zero = grid(w, spec)
    assert scale.shape == zero.shape == (9, spec.groups(130))
    assert torch.equal(scale, scale.half().float()) and bool((scale > 0).all())
    if spec.zeros:
        assert torch.equal(zero, zero.round()) and float(zero.min()) >= 0 and float(zero.max()) < 2**spec.bits
    else:
        assert bool((zero == (2**spec.bits - 1) / 2).all())


@pytest.mark.parametrize("text", ["2g128z", "3g32z", "8rz"])
def test_with_zero_points_nothing_is_clipped_and_zero_is_a_level(text: str) -> None:
    spec = Spec.parse(text)
    w = weights(20, 128) + weights(20, 1, seed=4) * 3  # groups far off the middle, also all of one sign
    w[:, 5] = 0
    values = nearest(w, spec).unpack()
    assert bool((values[:, 5] == 0).all())
    step = spread(*grid(w, spec), spec, 128).expand(w.shape).scale
    assert bool(((values - w).abs() <= step * 1.01).all())  # half a step, and half a step by which the zero was moved


@pytest.mark.parametrize("text", ["1r", "2r", "2g32", "3g16", "4r", "8g32"])
def test_the_searched_range_is_never_worse_than_the_whole_range(text: str) -> None:
    spec, w = Spec.parse(text), weights(30, 100, seed=5)
    size = spec.group or 100
    errors = []
    for search in (True, False):
        _, values = spread(*grid(w, spec, search=search), spec, 100).expand(w.shape).round(w)
        errors.append(torch.stack([part.square().sum(-1) for part in (values - w).split(size, -1)]))
    assert bool((errors[0] <= errors[1] * (1 + 1e-6)).all())
    if spec.bits < 4:
        assert float(errors[0].sum()) < 0.9 * float(errors[1].sum())


def test_a_short_last_group_is_scaled_by_its_own_numbers_only() -> None:
    w = torch.cat([weights(4, 32), 1000 + weights(4, 3).abs()], 1)
    for text in ("4g32", "4g32z"):
        spec = Spec.parse(text)
        alone = [grid(part.contiguous(), spec) for part in w.split(32, 1)]
        for together, parts in zip(grid(w, spec), zip(*alone, strict=True), strict=True):
            assert torch.equal(together, torch.cat(parts, 1))


@pytest.mark.parametrize("text", SPECS)
def test_zeros_and_extremes_give_finite_numbers(text: str) -> None:
    spec = Spec.parse(text)
    for w in (torch.zeros(3, 40), weights(3, 40) * 1e-12, weights(3, 40) * 1e4):
        found = nearest(w, spec).unpack()
        assert bool(found.isfinite().all()) and bool((grid(w, spec)[0] > 0).all())
        assert bool(gptq(w, None, levels_of(w, text))[1].isfinite().all())
        assert float((found - w).norm()) <= float(w.norm()) + 1e-3  # a scale is at least fp16's least normal number


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32"])
def test_nearest_of_a_float_format_is_that_float(kind: str) -> None:
    w = weights(3, 5)
    assert torch.equal(nearest(w, Spec.parse(kind)).unpack(), Packed.floats(w, kind).unpack())


# ------------------------------------------------------------------------------------------------ GPTQ


def textbook(
    w: Tensor, hessian: Tensor, levels: Grid, *, damping: float, act_order: bool
) -> tuple[np.ndarray, np.ndarray]:
    """GPTQ in fp64, one matrix, one column at a time, no blocks: codes and values."""
    left, h = w.double().numpy().copy(), hessian.double().numpy().copy()
    scale, zero, top = (getattr(levels.expand(w.shape), field.name).double().numpy() for field in fields(Grid))
    count = len(h)
    for j in range(count):
        if h[j, j] == 0:
            h[j, j] = 1
            left[:, j] = 0
    h += damping * np.mean(np.diag(h)) * np.eye(count)
    order = sorted(range(count), key=lambda j: -h[j, j]) if act_order else list(range(count))
    inverse = np.linalg.inv(h[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T
    codes, values = np.zeros_like(left), np.zeros_like(left)
    for place, j in enumerate(order):
        codes[:, j] = np.clip(np.round(left[:, j] / scale[:, j] + zero[:, j]), 0, top[:, j])
        values[:, j] = scale[:, j] * (codes[:, j] - zero[:, j])
        error = (left[:, j] - values[:, j]) / upper[place, place]
        for later in range(place + 1, count):
            left[:, order[later]] -= error * upper[place, later]
    return codes, values


@pytest.mark.parametrize("act_order", [True, False], ids=["act-order", "in order"])
@pytest.mark.parametrize("text", ["2g16z", "3r", "4g32z", "8rz"])
@pytest.mark.parametrize(("rows", "cols"), [(5, 24), (12, 61), (3, 150)])
def test_gptq_is_the_textbooks(rows: int, cols: int, text: str, act_order: bool) -> None:
    w, hessian = weights(rows, cols), moments(cols)
    levels = levels_of(w, text)
    codes, values = gptq(w, factorize(hessian, damping=0.01, act_order=act_order), levels)
    expected_codes, expected = textbook(w, hessian, levels, damping=0.01, act_order=act_order)
    assert np.array_equal(codes.numpy(), expected_codes)
    assert np.allclose(values.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [1, 7, 16, 64])
def test_the_block_of_columns_makes_no_difference(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w, factor = weights(8, 50), factorize(moments(50))
    levels = levels_of(w, "3g16z")
    whole = gptq(w, factor, levels)
    monkeypatch.setattr(quantize, "WIDTH", block)
    cut = gptq(w, factor, levels)
    assert torch.equal(cut[0], whole[0]) and torch.allclose(cut[1], whole[1])


@pytest.mark.parametrize("text", SPECS)
def test_without_a_hessian_or_with_the_identity_it_is_rounding_to_nearest(text: str) -> None:
    spec, w = Spec.parse(text), weights(7, 140)
    levels = spread(*grid(w, spec), spec, 140)
    expected = nearest(w, spec).unpack()
    for factor in (None, factorize(torch.eye(140)), factorize(5 * torch.eye(140), act_order=False)):
        codes, values = gptq(w, factor, levels)
        assert torch.allclose(values, expected, atol=1e-6)
        scale, zero = grid(w, spec)
        packed = Packed.codes(codes.to(torch.uint8), spec, scale, zero.to(torch.uint8) if spec.zeros else None)
        assert torch.equal(packed.unpack(), expected)


@pytest.mark.parametrize("text", ["2g128z", "2r", "3g32z", "4g32", "8rz"])
@pytest.mark.parametrize("seed", range(3))
def test_on_correlated_inputs_gptq_loses_less_than_nearest(text: str, seed: int) -> None:
    w, hessian = weights(24, 160, seed=seed), moments(160, seed=seed + 10)
    levels = levels_of(w, text)
    _, values = gptq(w, factorize(hessian), levels)
    _, rounded = gptq(w, None, levels)
    assert float(lost(w, values, hessian)) < 0.75 * float(lost(w, rounded, hessian))


@pytest.mark.parametrize("text", ["2g16z", "4r"])
def test_codes_and_values_agree_and_make_a_packed(text: str) -> None:
    spec, w = Spec.parse(text), weights(10, 50)
    scale, zero = grid(w, spec)
    codes, values = gptq(w, factorize(moments(50)), spread(scale, zero, spec, 50))
    assert float(codes.min()) >= 0 and float(codes.max()) <= 2**spec.bits - 1
    packed = Packed.codes(codes.to(torch.uint8), spec, scale, zero.to(torch.uint8) if spec.zeros else None)
    assert torch.allclose(packed.unpack(), values, atol=1e-6)


def stacked(grids: list[Grid], shape: torch.Size) -> Grid:
    return Grid(*(torch.stack([getattr(g.expand(shape), f.name) for g in grids]) for f in fields(Grid)))


@pytest.mark.parametrize("shared", [True, False], ids=["one hessian", "a hessian each"])
def test_a_batch_is_its_matrices_one_by_one(shared: bool) -> None:
    w = weights(4, 6, 140)
    hessian = moments(140) if shared else moments(140, batch=(4,))
    factor = factorize(hessian)
    grids = [levels_of(part, "3g32z") for part in w]
    codes, values = gptq(w, factor, stacked(grids, w[0].shape))
    for i in range(4):
        one = factor if shared else factorize(hessian[i])
        alone_codes, alone = gptq(w[i], one, grids[i])
        assert torch.equal(codes[i], alone_codes)
        assert torch.allclose(values[i], alone, atol=1e-5)


def test_a_batch_of_two_dimensions_and_a_batch_of_one() -> None:
    w, factor = weights(2, 3, 4, 20), factorize(moments(20))
    levels = levels_of(w, "3r")
    codes, _ = gptq(w, factor, levels)
    assert torch.equal(codes.flatten(0, 1), gptq(w.flatten(0, 1), factor, levels_of(w.flatten(0, 1), "3r"))[0])
    assert torch.equal(codes[1, 2], gptq(w[1, 2], factor, levels_of(w[1, 2], "3r"))[0])


def test_columns_that_no_input_reaches_become_zero_and_disturb_nobody() -> None:
    w, hessian = weights(6, 40), moments(40)
    hessian[[3, 17]] = 0
    hessian[:, [3, 17]] = 0
    kept = [j for j in range(40) if j not in (3, 17)]
    factor = factorize(hessian, damping=0.0)
    assert factor.dead.nonzero().flatten().tolist() == [3, 17]
    levels = levels_of(w, "4rz")
    codes, values = gptq(w, factor, levels)
    assert bool((values[:, [3, 17]] == 0).all())
    wide = levels.expand(w.shape)
    rest = Grid(wide.scale[:, kept], wide.zero[:, kept], wide.top[:, kept])
    alone, _ = gptq(w[:, kept], factorize(hessian[kept][:, kept], damping=0.0), rest)
    assert torch.equal(codes[:, kept], alone)


def test_a_hessian_of_zeros_is_a_matrix_of_zeros() -> None:
    w = weights(3, 8)
    _, values = gptq(w, factorize(torch.zeros(8, 8)), levels_of(w, "4rz"))
    assert not values.any()


def test_columns_of_floats_take_part_uncoded() -> None:
    w, hessian = weights(6, 30), moments(30)
    coded = levels_of(w, "2rz").expand(w.shape)
    floats = torch.arange(30) % 5 == 0
    levels = Grid(coded.scale, coded.zero, torch.where(floats, 0.0, coded.top))
    _, rounded = gptq(w, None, levels)
    assert torch.equal(rounded[:, floats], w[:, floats].half().float())
    assert torch.equal(rounded[:, ~floats], coded.round(w)[1][:, ~floats])
    _, values = gptq(w, factorize(hessian), levels)
    assert torch.equal(values, torch.where(floats, values.half().float(), values))
    assert not torch.equal(values[:, floats], w[:, floats].half().float())  # they made up for others' errors
    both = [float(lost(w, v, hessian)) for v in (values, gptq(w, factorize(hessian), coded)[1])]
    assert both[0] < both[1]


def test_a_column_may_be_floats_in_some_rows_only() -> None:
    w = weights(6, 30)
    coded = levels_of(w, "2rz").expand(w.shape)
    rows = torch.arange(6) < 2
    mixed = Grid(coded.scale, coded.zero, torch.where(rows[:, None], 0.0, coded.top))
    factor = factorize(moments(30))
    _, values = gptq(w, factor, mixed)
    assert torch.equal(values[2:], gptq(w, factor, coded)[1][2:])
    assert float((values[:2] - w[:2]).abs().max()) < 1e-2


def test_the_input_is_left_alone() -> None:
    w, hessian = weights(4, 20), moments(20)
    hessian[3] = hessian[:, 3] = 0
    before = w.clone(), hessian.clone()
    gptq(w, factorize(hessian), levels_of(w, "2r"))
    assert torch.equal(w, before[0]) and torch.equal(hessian, before[1])


@pytest.mark.parametrize("act_order", [True, False])
def test_the_factor_is_the_cholesky_factor_of_the_damped_inverse(act_order: bool) -> None:
    hessian = moments(30, batch=(2,))
    factor = factorize(hessian, damping=0.05, act_order=act_order)
    assert isinstance(factor, Factor) and not factor.dead.any()
    for i in range(2):
        h = hessian[i].double()
        h = h + 0.05 * h.diagonal().mean() * torch.eye(30)
        order = factor.order[i]
        diagonal = h.diagonal()[order]
        assert sorted(order.tolist()) == list(range(30))
        assert torch.equal(diagonal, diagonal.sort(descending=True).values) == act_order
        upper = factor.inverse[i].double()
        assert torch.equal(upper, upper.triu())
        assert torch.allclose(upper.T @ upper @ h[order][:, order], torch.eye(30).double(), atol=1e-4)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_the_root_of_the_inverse_needs_no_inverse(batch: tuple[int, ...]) -> None:
    """The way a GPU takes gives the factor that two Cholesky decompositions and an inverse give."""
    h = moments(90, batch=batch).double() + 0.1 * torch.eye(90)
    root = quantize.root_of_inverse(h)
    assert torch.equal(root, root.triu())
    wanted = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    assert torch.allclose(root, wanted, rtol=1e-8, atol=1e-10)
    assert torch.allclose(root.mT @ root @ h, torch.eye(90).double().expand_as(h), atol=1e-8)
