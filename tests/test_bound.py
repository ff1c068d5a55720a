"""The rate-distortion curves against sources whose answer is known, and against a search that knows no formula."""

import itertools
import math

import pytest
import torch

from bayou.comparison.bound import Bound, Spectrum, decibels, error_at, spectrum
from bayou.comparison.measured import kind_and_layer
from bayou.decompose import Matrix


def gaussian(out: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def matrix(values: torch.Tensor) -> Matrix:
    return Matrix((values.shape[0], values.shape[1]), lambda start, stop: values[start:stop])


def flat(shape: tuple[int, int], energies: list[float]) -> Spectrum:
    return Spectrum(shape, torch.tensor(energies, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)])
def test_a_spectrum_is_that_of_the_outputs(shape: tuple[int, int]) -> None:
    w = gaussian(*shape)
    x = gaussian(100, shape[1], 1) * torch.arange(1, shape[1] + 1) ** -1.0
    found = spectrum(matrix(w), x.T @ x).energies
    wanted = torch.linalg.svdvals(w.double() @ x.T.double()).square()
    torch.testing.assert_close(found, wanted[: min(shape)], rtol=1e-6, atol=1e-6 * float(wanted[0]))
    torch.testing.assert_close(spectrum(matrix(w), None).energies, torch.linalg.svdvals(w.double()).square())
    # Inputs of a few directions leave the others nil, not negative.
    few = spectrum(matrix(w), x[:3].T @ x[:3]).energies
    assert float(few.min()) >= 0 and float(few[3:].sum()) < 1e-4 * float(few.sum())


def test_equal_energies_give_the_gaussian_formula() -> None:
    """n equal components of m numbers: D = 2^(-2 R), at every rate."""
    curve = Bound([flat((48, 16), [3.0] * 16)], fixed=100).curves()["bound"]
    for bits in (0.1, 0.5, 1, 3):
        assert error_at(curve, 100 + bits * 48 * 16 / 8) == pytest.approx(2 ** (-2 * bits), rel=1e-2)
    assert curve[0] == (100, pytest.approx(1))


def test_water_filling_is_the_best_division_of_the_bits() -> None:
    """Against all divisions on a grid, over two matrices of different lengths and weights."""
    spectra = [flat((8, 2), [5.0, 1.0]), flat((2, 4), [2.0, 0.5])]
    curve = Bound(spectra).curves()["bound"]
    weights = [16 / 24, 8 / 24]
    energies = [weights[0] * 5 / 6, weights[0] / 6, weights[1] * 0.8, weights[1] * 0.2]
    grid = [step / 20 for step in range(81)]  # bits a number
    budget = 12.0
    best = math.inf
    for a, b, c in itertools.product(grid, grid, grid):
        rest = budget - 8 * a - 8 * b - 4 * c
        if rest >= 0:
            rates = (a, b, c, rest / 4)
            best = min(best, sum(e * 4.0**-r for e, r in zip(energies, rates, strict=True)))
    assert error_at(curve, budget / 8) == pytest.approx(best, rel=5e-3)


def test_factors_are_coded_at_the_best_rates() -> None:
    """One pair of unequal lengths: no division of the bits between u and v beats the curve, and one reaches it."""
    out, width = 12, 5
    one = Bound([Spectrum((out, width), torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64))])
    curve = one.curves()["factors"]
    for bits in (25.0, 40.0, 60.0):
        shares = torch.linspace(0.001, 0.999, 9999, dtype=torch.float64)
        a, b = (4.0 ** (-bits * part / (size - 0.5)) for part, size in ((shares, out), (1 - shares, width)))
        best = float((1 - (1 - a) * (1 - b)).min())
        assert error_at(curve, bits / 8) == pytest.approx(best, rel=1e-2)


def test_what_the_docstring_says_of_noise() -> None:
    """White noise at one bit a weight: 6.02 dB is the truth; the bound is below it, the factors are above."""
    for shape, below in (((600, 200), 0.8), ((256, 256), 3.0)):
        found = spectrum(matrix(gaussian(*shape)), None)
        curves = Bound([found]).curves()
        nbytes = shape[0] * shape[1] / 8
        assert decibels(0.25, curves["bound"], nbytes) == pytest.approx(below, abs=0.1)
        if shape[0] == shape[1]:
            assert decibels(0.25, curves["factors"], nbytes) == pytest.approx(-1.5, abs=0.1)


def test_a_code_of_a_gaussian_source_is_above_its_bound() -> None:
    """Scalar quantisation of the components, at the water-filled rates: above, and within the 1.53 dB + of scalars."""
    out, width = 4000, 8
    scales = torch.tensor([2.0**-k for k in range(width)])
    w = gaussian(out, width) * scales
    curve = Bound([spectrum(matrix(w), None)]).curves()["bound"]
    step = 0.05
    codes = (w / step).round()
    entropy = 0.0
    for column in codes.T:
        share = column.unique(return_counts=True)[1] / out
        entropy -= out * float((share * share.log2()).sum())
    lost = float((w - codes * step).square().sum() / w.square().sum())
    above = decibels(lost, curve, entropy / 8)
    assert above is not None and 0.3 < above < 2.2


def test_both_curves_fall_and_nil_matrices_do_not_count() -> None:
    spectra = [spectrum(matrix(gaussian(30, 20, seed)), None) for seed in range(3)]
    with_nil = Bound([*spectra, flat((30, 20), [0.0] * 20)])
    assert with_nil.weights == 4 * 600
    for name, points in with_nil.curves().items():
        sizes, errors = zip(*points, strict=True)
        assert list(sizes) == sorted(set(sizes)) and list(errors) == sorted(set(errors), reverse=True), name
        assert errors[0] == pytest.approx(0.75) and len(points) > 50
    bound, factors = with_nil.curves()["bound"], with_nil.curves()["factors"]
    assert all((error_at(bound, n) or 0) < (error_at(factors, n) or 0) for n in (50, 200, 500))
    assert Bound([]).curves() == {"bound": [(0.0, 0.0)], "factors": [(0.0, 0.0)]}


def test_beyond_a_curve_there_is_no_figure() -> None:
    curve = [(10.0, 1.0), (20.0, 0.25), (30.0, 0.01)]
    assert error_at(curve, 15) == pytest.approx(0.5)
    assert error_at(curve, 9) is None and error_at(curve, 31) is None and error_at(curve[:1], 10) is None
    assert decibels(0.5, curve, 20) == pytest.approx(10 * math.log10(2)) and decibels(0.0, curve, 20) is None


@pytest.mark.parametrize(
    "name,kind,layer",
    [
        ("model.layers.11.mlp.up_proj.weight", "mlp.up_proj", 11),
        ("transformer.h.0.attn.c_attn.weight", "attn.c_attn", 0),
        ("model.layers.3.block_sparse_moe.experts.5.w1.weight", "block_sparse_moe.experts.*.w1", 3),
        ("model.layers.3.mlp.experts.gate_up_proj[7]", "mlp.experts.gate_up_proj", 3),
        ("model.embed_tokens.weight", "embed_tokens", None),
        ("lm_head.weight", "lm_head", None),
    ],
)
def test_a_name_says_its_kind_and_layer(name: str, kind: str, layer: int | None) -> None:
    assert kind_and_layer(name) == (kind, layer)
