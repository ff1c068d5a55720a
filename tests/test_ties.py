"""The closed forms of a tie: each is the best of what it claims to be the best of."""

import pytest
import torch
from encoded import gram_of
from torch import Tensor

from bayou.sharing import Tie, ties
from bayou.sharing.ties import Metric

G = torch.Generator().manual_seed(0)
BASE = torch.randn(24, 40, generator=G)
OTHER = 0.6 * BASE + torch.randn(24, 40, generator=G)
GRAM = gram_of(40)


def made(how: str, rank: int = 5, metric: Metric | None = None, seed: int = 0) -> Tie:
    return ties.fit("w", OTHER, ("base", BASE), metric or Metric(GRAM), rank, how, seed=seed)


def weight(tie: Tie) -> Tensor:
    found = tie.u @ tie.v
    return found if tie.reference is None else found + tie.gain * BASE


def lost(matrix: Tensor) -> float:
    error = (OTHER - matrix).double()
    return float((error @ GRAM.matrix.double() * error).sum())


def test_zero_is_the_reference_and_random_directions() -> None:
    tie = made("zero")
    assert torch.equal(weight(tie), BASE) and tie.gain == 1 and tie.u.shape == (24, 5) and tie.v.shape == (5, 40)
    assert torch.equal(tie.v, made("zero").v) and not torch.equal(tie.v, made("zero", seed=1).v)
    assert 0 < tie.v.abs().max() <= 40**-0.5


def test_svd_is_the_truncation_of_the_difference() -> None:
    u, s, vh = torch.linalg.svd(OTHER - BASE, full_matrices=False)
    wanted = BASE + (u[:, :5] * s[:5]) @ vh[:5]
    assert torch.allclose(weight(made("svd")), wanted, atol=1e-4)
    assert torch.allclose(weight(made("whitened", metric=Metric(None))), wanted, atol=1e-4)


def test_each_form_is_better_than_the_one_before_in_the_metric_of_the_inputs() -> None:
    error = {how: lost(weight(made(how))) for how in ("svd", "whitened", "whitened+gain", "no-base")}
    assert error["whitened+gain"] < error["whitened"] < error["svd"] < lost(BASE)
    assert error["whitened+gain"] < error["no-base"]  # the two matrices are alike here
    assert made("no-base").reference is None


@pytest.mark.parametrize(("how", "reference"), [("whitened", BASE), ("no-base", 0 * BASE)])
def test_whitened_is_the_best_of_its_rank(how: str, reference: Tensor) -> None:
    damped = Metric(GRAM).gram
    assert damped is not None
    added = damped - GRAM.matrix.double()
    assert torch.allclose(added, added.diagonal().mean() * torch.eye(40, dtype=torch.float64))
    assert 0 < added[0, 0] < 2e-3 * GRAM.matrix.diagonal().mean()
    left = torch.linalg.svdvals((OTHER - reference).double() @ torch.linalg.cholesky(damped))[5:].square().sum()
    error = (OTHER - weight(made(how))).double()
    assert float((error @ damped * error).sum()) == pytest.approx(float(left), rel=1e-5)  # Eckart and Young
    best = lost(weight(made("whitened")))
    assert lost(weight(made("whitened", rank=24))) < 1e-6 * best


def test_the_gain_is_that_of_least_squares() -> None:
    gain = Metric(GRAM).gain(OTHER, BASE)
    assert all(lost(gain * BASE) < lost((gain + step) * BASE) for step in (-0.01, 0.01))
    assert Metric(GRAM).gain(OTHER, torch.zeros(24, 40)) == 0


def test_rank_zero_has_no_factors() -> None:
    tie = made("svd", rank=0)
    assert tie.u.shape == (24, 0) and tie.v.shape == (0, 40) and torch.equal(weight(tie), BASE)


def test_a_learned_base_never_loses_to_the_neighbour() -> None:
    third = 0.5 * BASE + torch.randn(24, 40, generator=G)
    matrices = {"base": BASE, "w": OTHER, "x": third}
    metrics = {name: Metric(gram_of(40, seed=i)) for i, name in enumerate(matrices)}
    learned = ties.learn("base", matrices, metrics, 5, dtype=torch.float32)
    assert len(learned.errors) == 9 and learned.errors[-1] < learned.errors[0]
    assert all(
        later <= earlier * (1 + 1e-5) for earlier, later in zip(learned.errors, learned.errors[1:], strict=False)
    )
    assert [tie.tensor for tie in learned.ties] == ["w", "x"] and {tie.reference for tie in learned.ties} == {"base"}
    total = metrics["base"].inner(BASE - learned.base, BASE - learned.base) / metrics["base"].inner(BASE, BASE)
    for tie in learned.ties:
        left = matrices[tie.tensor] - tie.gain * learned.base - tie.u @ tie.v
        total += metrics[tie.tensor].inner(left, left) / metrics[tie.tensor].inner(
            matrices[tie.tensor], matrices[tie.tensor]
        )
    assert total == pytest.approx(learned.errors[-1], rel=1e-3)
    half = ties.learn("base", matrices, metrics, 5, dtype=torch.bfloat16, steps=1)
    assert half.base.dtype == torch.bfloat16
