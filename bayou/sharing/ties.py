"""Closed forms of a tie W ~ gain * reference + u @ v, and of a base that several layers share.

    zero            u = 0, v random: LoRA's start, for training
    svd             truncated SVD of W - reference
    whitened        the same in the metric of the input's second moments C: min ||(W - reference - u v) C^1/2||
    whitened+gain   the gain <W C, reference> / <reference C, reference> first, then whitened
    als             whitened+gain over a base that is itself learned (see `learn`)
    no-base         whitened, of W itself: the control with the same factors and nothing shared

Adjacent layers' weights are uncorrelated on real models, so a fitted gain is nearly 0 and `whitened+gain` nearly
`no-base` until something is trained (LOG.md has the measurement).
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bayou.decompose import Matrix, svd
from bayou.methods import Gram
from bayou.sharing import Tie

INITIALISATIONS = ("zero", "svd", "whitened", "whitened+gain", "als", "no-base")
USE_GRAM = ("whitened", "whitened+gain", "als", "no-base")
"""Those that want calibration; without it the metric is the identity."""

DAMPING = 1e-3
"""Share of the mean eigenvalue that is added to a gram's: directions that no calibration token took count a little."""


class Metric:
    """C = root @ root.T of a linear's input, (in, in) fp32, with root's inverse; None is the identity."""

    def __init__(self, gram: Gram | None) -> None:
        self.gram = None if gram is None else gram.matrix.double()
        if self.gram is None:
            return
        # Damped for all uses alike: a base learned in the bare metric runs off in directions that few tokens took.
        self.gram.diagonal().add_(DAMPING * self.gram.diagonal().mean().clamp_min(1e-30))
        values, vectors = torch.linalg.eigh(self.gram)
        values = values.clamp_min(1e-30).sqrt()
        self._root, self._inverse = vectors * values, vectors.T / values[:, None]

    def low_rank(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """argmin ||(matrix - u v) root||: u (out, rank), v (rank, in), the singular values' roots on either side."""
        if rank == 0:
            return matrix.new_zeros(matrix.shape[0], 0), matrix.new_zeros(0, matrix.shape[1])
        seen = matrix if self.gram is None else (matrix.double() @ self._root).float()
        u, s, v = svd(Matrix((seen.shape[0], seen.shape[1]), lambda a, b: seen[a:b]), rank)
        back = v if self.gram is None else (v.double() @ self._inverse).float()
        return u * s.sqrt(), back * s.sqrt()[:, None]

    def inner(self, a: Tensor, b: Tensor) -> float:
        """<a C, b>."""
        acted = a.double() if self.gram is None else a.double() @ self.gram
        return float((acted * b.double()).sum())

    def gain(self, matrix: Tensor, reference: Tensor) -> float:
        """The g of least ||(matrix - g reference) C^1/2||; 0 for a reference that does nothing."""
        power = self.inner(reference, reference)
        return self.inner(matrix, reference) / power if power > 0 else 0.0


def fit(
    name: str,
    matrix: Tensor,
    reference: tuple[str, Tensor],
    metric: Metric,
    rank: int,
    how: str,
    *,
    seed: int = 0,
) -> Tie:
    """The tie of one matrix (out, in) fp32 to a reference of its shape, by `how` of INITIALISATIONS (als: as
    whitened+gain, the reference being the learned base)."""
    label, base = reference
    if how == "no-base":
        return _tie(name, None, 0.0, metric.low_rank(matrix, rank))
    if how == "zero":
        g = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        bound = matrix.shape[1] ** -0.5
        v = (torch.rand(rank, matrix.shape[1], generator=g) * 2 - 1) * bound
        return _tie(name, label, 1.0, (torch.zeros(matrix.shape[0], rank), v))
    if how == "svd":
        metric = Metric(None)
    gain = metric.gain(matrix, base) if how in ("whitened+gain", "als") else 1.0
    return _tie(name, label, gain, metric.low_rank(matrix - gain * base, rank))


def _tie(name: str, reference: str | None, gain: float, factors: tuple[Tensor, Tensor]) -> Tie:
    return Tie(name, reference, gain, factors[0].cpu().contiguous(), factors[1].cpu().contiguous())


@dataclass(frozen=True)
class Learned:
    """A base (out, in), of its tensor's dtype, the ties of the layers that share it, and the error after each step."""

    base: Tensor
    ties: tuple[Tie, ...]
    errors: tuple[float, ...]


def learn(
    anchor: str,
    matrices: Mapping[str, Tensor],
    metrics: Mapping[str, Metric],
    rank: int,
    *,
    dtype: torch.dtype,
    steps: int = 8,
) -> Learned:
    """A base for a group of matrices of one shape, the anchor's among them, by alternating least squares.

        min over B, g_l, U_l V_l of  sum_l w_l ||(W_l - g_l B - U_l V_l) C_l^1/2||^2,   w_l = 1 / ||W_l C_l^1/2||^2

    B takes the anchor's place in the file, so the anchor's own layer computes with B alone (g = 1, U V = 0): a tie of
    its own would need a second tensor for B, which is no tensor of the model. Its error is in the sum, and the start
    is B = W_anchor, where it is 0; so the total never exceeds that of whitened+gain. Each of the three updates (gain;
    factors; B = (sum w g (W - U V) C) (sum w g^2 C)^-1) lowers the sum or leaves it. At the end B is rounded to
    `dtype`, and gains and factors are fitted to what was rounded.
    """
    users = {name: matrix for name, matrix in matrices.items() if name != anchor}
    whole = {name: max(metrics[name].inner(matrix, matrix), 1e-30) for name, matrix in matrices.items()}
    base = matrices[anchor].clone()
    factors = {name: metrics[name].low_rank(matrix, 0) for name, matrix in matrices.items()}
    gains = dict.fromkeys(matrices, 1.0)
    errors: list[float] = []

    def fit_users() -> None:
        for name, matrix in users.items():
            u, v = factors[name]
            gains[name] = metrics[name].gain(matrix - u @ v, base)
            factors[name] = metrics[name].low_rank(matrix - gains[name] * base, rank)

    def error() -> float:
        left = {n: m - gains[n] * base - factors[n][0] @ factors[n][1] for n, m in matrices.items()}
        return sum(metrics[n].inner(e, e) / whole[n] for n, e in left.items())

    for _ in range(steps):
        fit_users()
        errors.append(error())
        base = _base(matrices, metrics, factors, gains, whole)
    base = base.to(dtype).float()
    fit_users()
    errors.append(error())
    ties = tuple(_tie(name, anchor, gains[name], factors[name]) for name in users)
    return Learned(base.to(dtype).cpu(), ties, tuple(errors))


def _base(
    matrices: Mapping[str, Tensor],
    metrics: Mapping[str, Metric],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    gains: Mapping[str, float],
    whole: Mapping[str, float],
) -> Tensor:
    width = next(iter(matrices.values())).shape[1]
    right = next(iter(matrices.values())).new_zeros(width, width, dtype=torch.float64)
    left: Tensor | None = None
    for name, matrix in matrices.items():
        u, v = factors[name]
        gram = metrics[name].gram
        moments = torch.eye(width, dtype=torch.float64, device=right.device) if gram is None else gram
        wanted = (matrix.double() - u.double() @ v.double()) @ moments * (gains[name] / whole[name])
        left = wanted if left is None else left + wanted
        right = right + moments * (gains[name] ** 2 / whole[name])
    assert left is not None  # a group has an anchor
    right.diagonal().add_(1e-9 * right.diagonal().mean())
    return torch.linalg.solve(right, left.T).T.float()
