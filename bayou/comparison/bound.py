"""How small the error of a file of so many bytes could be: rate-distortion over the measured spectra, two models.

The error of a file is E = sum_i n_i r_i / sum_i n_i over its coded matrices i, with n_i weights each, and

    r_i = ||(D - D') H^(1/2)||^2 / ||D H^(1/2)||^2        D the delta, D' what the file says it is

where H holds the second moments of the matrix's input: r_i is the share of the delta's *output* that is lost, over the
calibration text (Frobenius norms; without a calibration, and for embeddings, H = I). Spectra are those of D H^(1/2):
out times in, n = min(out, in) singular values s_k, m = max(out, in).

    bound     reverse water-filling. The source: m independent Gaussian vectors of length n whose covariance has the
              eigenvalues s_k^2 / m. Component k is then m numbers of variance s_k^2 / m, and for a water level t

                  bits = sum_k m/2 log2+(s_k^2 / (m t)),   E = sum_k min(s_k^2, m t)       (Cover and Thomas, 10.3.3)

              with one t for all matrices. No code of that source is below it, whatever it does.
    factors   the same for codes of singular vectors: pair k is (out - k - 1/2) + (in - k - 1/2) Gaussian numbers (what
              orthogonality to the pairs before leaves free; over all k that is out times in), u with relative error a
              and v with b cost their Gaussian rates, and the pair loses 1 - (1 - a)(1 - b) of its energy.

What this does not say. A delta is one matrix, not a Gaussian source: "bound" is exact for the model only. It gives the
decoder the covariance (n numbers and a basis of n x n) and H for nothing, and a sample's spectrum is more uneven than
its source's; both make it too low, for noise without any structure by 0.8 dB (m = 3n) to 3 dB (m = n) at one bit a
weight. "factors" is no bound: noise at one bit a weight is coded 1.5 dB better by no factors at all. And neither knows
what an error costs in KL, which depends on its direction and on the layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log, log10

import numpy
import torch
from torch import Tensor

from bayou import clock
from bayou.decompose import Matrix

_STEP = 0.25  # of the logarithm of the water level between two points of a curve
_DEPTH = 30.0  # and how far it goes below the largest variance: 2^-30, 15 bits a number


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A matrix's squared singular values in the metric of its input, largest first, (min(out, in),) fp64 on the CPU."""

    shape: tuple[int, int]
    energies: Tensor


def spectrum(matrix: Matrix, moments: Tensor | None) -> Spectrum:
    """The spectrum of `matrix` H^(1/2); moments: H, (in, in), up to a factor; None is the identity."""
    with clock.step("spectra"):
        out, width = matrix.shape
        if out < width:
            whole = matrix.whole().double()
            weighted = whole if moments is None else whole @ moments.to(whole.device).double()
            gram = weighted @ whole.T
        else:
            gram = sum(
                (block.double().T @ block.double() for _, block in matrix.blocks()),
                torch.zeros(width, width, dtype=torch.float64, device=matrix.read(0, 1).device),
            )
            if moments is not None:
                root = _root(moments.to(gram.device).double())
                gram = root @ gram @ root
        values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
        return Spectrum((out, width), values.cpu())


def _root(moments: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moments)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


class Bound:
    """The two curves of a model's matrices. fixed: bytes that every file has beside their codes (exact tensors)."""

    def __init__(self, spectra: Sequence[Spectrum], fixed: int = 0) -> None:
        self.fixed = fixed
        self.weights = sum(one.shape[0] * one.shape[1] for one in spectra)
        # A matrix whose input never was, or that did not change there, loses nothing.
        known = [one for one in spectra if float(one.energies.sum()) > 0]
        shares = [one.energies * (one.shape[0] * one.shape[1] / self.weights / one.energies.sum()) for one in known]
        none = torch.zeros(0, dtype=torch.float64)
        self._energy = torch.cat([none, *shares])
        self._longer = torch.cat([none, *(torch.full_like(one.energies, max(one.shape)) for one in known)])
        at = [torch.arange(len(one.energies), dtype=torch.float64) + 0.5 for one in known]
        self._left = torch.cat([none, *(one.shape[0] - k for one, k in zip(known, at, strict=True))])
        self._right = torch.cat([none, *(one.shape[1] - k for one, k in zip(known, at, strict=True))])

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Names "bound" and "factors" -> (bytes of the file, E) from nothing coded on; E falls strictly."""
        return {"bound": self._curve(self._filled), "factors": self._curve(self._factored)}

    def _curve(self, at: Callable[[float], tuple[float, float]]) -> list[tuple[float, float]]:
        points = [(float(self.fixed), float(self._energy.sum()))]
        if not len(self._energy):
            return points
        top = float(torch.log2((self._energy / self._longer).max())) + 4  # "factors" begins above the largest variance
        for step in range(int((_DEPTH + 4) / _STEP)):
            bits, lost = at(2.0 ** (top - step * _STEP))
            if 0 < lost < points[-1][1] and bits > 0:
                points.append((self.fixed + bits / 8, lost))
        return points

    def _filled(self, level: float) -> tuple[float, float]:
        """(bits, E) at the water level `level`, a variance."""
        bits = 0.5 * self._longer * torch.log2(self._energy / (self._longer * level)).clamp_min(0)
        return float(bits.sum()), float(torch.minimum(self._energy, self._longer * level).sum())

    def _factored(self, price: float) -> tuple[float, float]:
        """(bits, E) of factors, each pair coded or not as is best where a bit is worth 2 ln 2 `price` of energy.

        At the best rates a / (out (1 - a)) = b / (in (1 - b)) = t, say, and e (1 - a)(1 - b) t = price for a pair of
        energy e: a quadratic equation, whose smaller root is the minimum.
        """
        left, right = self._left, self._right
        middle = self._energy / price - left - right
        inside = middle.square() - 4 * left * right
        t = 2 / (middle + inside.clamp_min(0).sqrt())
        kept = 1 / ((1 + left * t) * (1 + right * t))
        bits = 0.5 * (left * torch.log2(1 + 1 / (left * t)) + right * torch.log2(1 + 1 / (right * t)))
        worth = (middle > 0) & (inside >= 0)
        worth &= (
            self._energy * kept > 2 * log(2) * price * bits
        )  # the kept energy is not concave in the bits: all or none
        zero = torch.zeros_like(bits)
        lost = self._energy * (1 - torch.where(worth, kept, zero))
        return float(torch.where(worth, bits, zero).sum()), float(lost.sum())


def error_at(curve: Sequence[tuple[float, float]], nbytes: float) -> float | None:
    """E of a curve at a file's bytes, its logarithm linear between two points; None beyond either end."""
    sizes, errors = zip(*curve, strict=True)
    if not sizes[0] <= nbytes <= sizes[-1] or len(curve) < 2:
        return None
    return float(numpy.exp(numpy.interp(nbytes, sizes, numpy.log(errors))))


def decibels(error: float, curve: Sequence[tuple[float, float]], nbytes: float) -> float | None:
    """How far an error lies above a curve, 10 log10 of their quotient; None for no error, or beyond the curve."""
    least = error_at(curve, nbytes)
    return None if least is None or error <= 0 else 10 * log10(error / least)
