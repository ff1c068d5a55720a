"""decompose.py: as good as a full SVD, reading blocks of rows only."""

import pytest
import torch
from torch import Tensor

from bayou import decompose
from bayou.decompose import Matrix, remembering, svd


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def matrix(whole: Tensor) -> Matrix:
    return Matrix((whole.shape[0], whole.shape[1]), lambda start, stop: whole[start:stop])


def spectrum(rows: int, cols: int, sigma: Tensor, seed: int = 0) -> Tensor:
    """A matrix with the singular values `sigma`."""
    u = torch.linalg.qr(random(rows, len(sigma), seed=seed).double()).Q
    v = torch.linalg.qr(random(cols, len(sigma), seed=seed + 1).double()).Q
    return ((u * sigma.double()) @ v.T).float()


def product(u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    return (u.double() * s.double()) @ v.double()


def best_error(whole: Tensor, rank: int) -> float:
    """The least Frobenius error of any matrix of this rank, by torch's own SVD."""
    return float(torch.linalg.svdvals(whole.double())[rank:].norm())


def error(whole: Tensor, rank: int) -> float:
    return float((whole.double() - product(*svd(matrix(whole), rank))).norm())


SHAPES = {"tall": (90, 40), "wide": (40, 90), "square": (64, 64), "row": (1, 30), "column": (30, 1), "odd": (33, 100)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("decay", [0.0, 0.7, 2.0])
def test_the_error_is_the_least_that_the_rank_allows(shape: tuple[int, int], decay: float) -> None:
    short = min(shape)
    whole = spectrum(*shape, torch.arange(1, short + 1.0) ** -decay) * 0.01
    for rank in sorted({1, (short + 1) // 2, short}):
        assert error(whole, rank) == pytest.approx(best_error(whole, rank), rel=1e-5, abs=1e-6 * float(whole.norm()))


@pytest.mark.parametrize("shape", [(90, 40), (40, 90)])
def test_singular_values_and_vectors_are_torchs_up_to_sign(shape: tuple[int, int]) -> None:
    whole = spectrum(*shape, torch.arange(1, 41.0) ** -1)
    u, s, v = svd(matrix(whole), 10)
    assert (u.shape, s.shape, v.shape) == ((shape[0], 10), (10,), (10, shape[1]))
    assert u.dtype == s.dtype == v.dtype == torch.float32
    left, sigma, right = torch.linalg.svd(whole.double(), full_matrices=False)
    assert torch.allclose(s.double(), sigma[:10], rtol=1e-6)
    assert torch.allclose(u.double() * v.double()[:, :1].T.sign(), left[:, :10] * right[:10, :1].T.sign(), atol=1e-5)
    for vectors in (u.T, v):
        assert torch.allclose(vectors @ vectors.T, torch.eye(10), atol=1e-5)


@pytest.mark.parametrize("shape", [(90, 40), (40, 90)])
def test_reading_in_blocks_of_rows_changes_nothing(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = spectrum(*shape, torch.arange(1, 41.0) ** -0.7)
    at_once = product(*svd(matrix(whole), 7))
    monkeypatch.setattr(decompose, "ROWS", 13)
    assert torch.allclose(product(*svd(matrix(whole), 7)), at_once, atol=1e-6)


def test_a_tall_matrix_is_never_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompose, "ROWS", 13)
    whole, read = random(90, 40), []

    def rows(start: int, stop: int) -> Tensor:
        read.append((start, stop))
        return whole[start:stop]

    svd(Matrix((90, 40), rows), 5)
    cuts = [(start, min(start + 13, 90)) for start in range(0, 90, 13)]
    assert read == cuts * 2  # once for the Gram matrix, once for u


def test_blocks_cover_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompose, "ROWS", 4)
    whole = random(10, 3)
    pieces = list(matrix(whole).blocks())
    assert [start for start, _ in pieces] == [0, 4, 8]
    assert torch.equal(torch.cat([block for _, block in pieces]), whole)
    assert torch.equal(matrix(whole).whole(), whole)


@pytest.mark.parametrize("shape", [(33, 100), (100, 33)])
@pytest.mark.parametrize("rank", [1, 2, 33])
def test_a_matrix_of_rank_two_needs_two_triplets_and_the_others_are_nil(shape: tuple[int, int], rank: int) -> None:
    whole = spectrum(*shape, torch.tensor([3.0, 0.5]))
    u, s, v = svd(matrix(whole), rank)
    assert float((product(u, s, v) - whole).norm()) == pytest.approx(best_error(whole, rank), abs=1e-6)
    assert s[:2].tolist() == pytest.approx([3.0, 0.5][:rank], rel=1e-6)
    assert bool((s[2:] < 1e-6).all()) and bool(u.isfinite().all()) and bool(v.isfinite().all())


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_a_matrix_of_zeros_gives_zeros(shape: tuple[int, int]) -> None:
    u, s, v = svd(matrix(torch.zeros(shape)), 3)
    assert not s.any() and not product(u, s, v).any() and bool(u.isfinite().all()) and bool(v.isfinite().all())


@pytest.mark.parametrize("scale", [1e-20, 1e12])
def test_the_size_of_the_numbers_does_not_matter(scale: float) -> None:
    whole = spectrum(50, 30, torch.arange(1, 31.0) ** -0.7) * scale
    assert error(whole, 5) == pytest.approx(best_error(whole, 5), rel=1e-5)


def test_a_rank_beyond_the_shorter_side_is_all_there_is() -> None:
    whole = random(12, 20)
    u, s, v = svd(matrix(whole), 500)
    assert len(s) == 12 and torch.allclose(product(u, s, v).float(), whole, atol=1e-5)


def test_singular_values_come_largest_first() -> None:
    for shape in ((90, 40), (40, 90)):
        s = svd(matrix(random(*shape)), 40)[1]
        assert torch.equal(s, s.sort(descending=True).values)


@pytest.mark.parametrize("shape", [(60, 30), (30, 60)])
def test_the_signs_are_fixed(shape: tuple[int, int]) -> None:
    whole = spectrum(*shape, torch.arange(1, 31.0) ** -1)
    u, _, v = svd(matrix(whole), 10)
    vectors = v if shape[0] > shape[1] else u.T
    peaks = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    assert bool((peaks > 0).all())


# ------------------------------------------------------------------------------------------------ few of many

BIG = {"tall": (1300, 1024), "wide": (1024, 1300)}


@pytest.mark.parametrize("shape", BIG.values(), ids=BIG)
@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_few_ranks_of_a_large_matrix_are_within_one_percent_of_the_best(shape: tuple[int, int], decay: float) -> None:
    sigma = torch.arange(1, 1025.0) ** -decay
    whole = spectrum(*shape, sigma)
    best = float(sigma[40:].double().norm())
    assert best * (1 - 1e-5) <= error(whole, 40) <= 1.01 * best


def test_the_iteration_is_what_few_ranks_of_a_large_matrix_take(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(decompose, "_randomised", lambda matrix, rank: taken.append((matrix.shape, rank)))
    monkeypatch.setattr(decompose, "_leading", lambda gram, rank: torch.zeros(len(gram), rank, dtype=torch.float64))
    for shape, rank in (((1024, 1100), 85), ((1024, 1100), 86), ((1023, 5000), 3)):
        svd(Matrix(shape, lambda start, stop, cols=shape[1]: torch.zeros(stop - start, cols)), rank)
    assert taken == [((1024, 1100), 85)]


def test_the_iteration_is_deterministic_leaves_the_generator_alone_and_reads_in_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = spectrum(1024, 1040, torch.arange(1, 200.0) ** -1)
    state = torch.random.get_rng_state()
    first = svd(matrix(whole), 20)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1234)
    second = svd(matrix(whole), 20)
    torch.random.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    monkeypatch.setattr(decompose, "ROWS", 300)
    assert torch.allclose(product(*svd(matrix(whole), 20)), product(*first), atol=1e-5)


def test_the_iteration_finds_a_matrix_of_low_rank_exactly() -> None:
    whole = spectrum(1100, 1024, torch.tensor([2.0, 1.0, 0.1]))
    u, s, v = svd(matrix(whole), 8)
    assert float((product(u, s, v) - whole).norm()) < 1e-5
    assert torch.allclose(s, torch.tensor([2.0, 1.0, 0.1, 0, 0, 0, 0, 0]), atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_remembered_eigenvectors_change_no_bit(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix = Matrix(shape, lambda start, stop: whole[start:stop])
    wanted = {rank: svd(matrix, rank) for rank in (3, 24, 7)}
    eigh, calls = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: (calls.append(1), eigh(gram))[1])
    for limit, expected in ((24 * 24 * 8, 1), (24 * 24 * 8 - 1, 3)):
        calls.clear()
        with remembering(limit):
            for rank, parts in wanted.items():
                assert all(torch.equal(*pair) for pair in zip(svd(matrix, rank), parts, strict=True))
        assert len(calls) == expected
    svd(matrix, 3)
    assert len(calls) == 4  # nothing is remembered outside
