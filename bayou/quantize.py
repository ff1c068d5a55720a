"""Float -> Packed: round to nearest, or GPTQ where the second moments of the input are known.

GPTQ (Frantar et al. 2022, arXiv 2210.17323) rounds a matrix column by column and moves each column's rounding error
onto the columns not yet rounded, by the inverse of the Hessian H = X X^T of what the matrix multiplies:
argmin ||W X - What X||^2 approximately. `gptq` works on a batch of matrices of one shape at once, since on a GPU
one matrix's column loop is bound by launches.

Groups are *static*: scales and zero points are fixed before any rounding, for groups that are contiguous on disk, and
act-order (columns of large H_jj first) orders the rounding alone. So no permutation is stored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bayou.kernels.gptq_block import WIDTH, gptq_block
from bayou.packed import Packed, Spec

_CLIPS = tuple(1 - 0.05 * step for step in range(13))
"""Fractions of the largest magnitude that `grid(search=True)` tries as a group's range."""


@dataclass(frozen=True, eq=False)
class Factor:
    """What GPTQ needs of a Hessian: the order of the columns, and the upper Cholesky factor of the inverse in it.

    order, inverse: (..., cols) and (..., cols, cols). dead: columns that no input ever reaches (..., cols).
    """

    order: Tensor
    inverse: Tensor
    dead: Tensor


def factorize(hessian: Tensor, *, damping: float = 0.01, act_order: bool = True) -> Factor:
    """Cholesky factor of the damped inverse of `hessian` (..., cols, cols), in fp64; GPTQ's Algorithm 1.

    damping: share of the mean diagonal that is added to the diagonal. act_order: largest diagonal first.
    """
    h = hessian.double().clone()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    diagonal[dead] = 1
    diagonal += damping * diagonal.mean(-1, keepdim=True)
    if act_order:
        order = diagonal.argsort(dim=-1, descending=True, stable=True)
        h = h.gather(-2, order[..., :, None].expand_as(h)).gather(-1, order[..., None, :].expand_as(h))
    else:
        order = torch.arange(h.shape[-1], device=h.device).expand(h.shape[:-1])
    if h.is_cuda:
        return Factor(order, root_of_inverse(h).float(), dead)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return Factor(order, torch.linalg.cholesky(inverse, upper=True).float(), dead)


def root_of_inverse(h: Tensor) -> Tensor:
    """The upper triangular R with R^T R = H^-1, for a positive definite `h` (..., n, n).

    By one Cholesky and one triangular inverse, half the work of inverting H and factorising that: with
    the rows and columns in reverse, J H J = L L^T, so H = M M^T with M = J L J upper triangular, and R = M^-1.
    """
    lower = torch.linalg.cholesky(h.flip(-1, -2))
    one = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    return torch.linalg.solve_triangular(lower, one.expand_as(h), upper=False).flip(-1, -2)


@dataclass(frozen=True, eq=False)
class Grid:
    """The levels that each element may take: value = scale * (code - zero), code in 0..top.

    All are broadcastable to (..., rows, cols): scale fp32 holding fp16 values, zero, top fp32. Where top is 0 the
    element is not coded at all but rounded to fp16.
    """

    scale: Tensor
    zero: Tensor
    top: Tensor

    def expand(self, shape: torch.Size) -> "Grid":
        """The same with every field of `shape`."""
        return Grid(self.scale.expand(shape), self.zero.expand(shape), self.top.expand(shape))

    def columns(self, order: Tensor) -> "Grid":
        """The same with its columns in `order` (..., cols)."""
        index = order[..., None, :].expand(self.scale.shape)
        return Grid(*(field.gather(-1, index) for field in (self.scale, self.zero, self.top)))

    def round(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes (fp32, integers) and their values, for w of the grid's shape."""
        code = (w / self.scale + self.zero).round().clamp_min(0).minimum(self.top)
        value = self.scale * (code - self.zero)
        return code, torch.where(self.top == 0, w.half().float(), value)


def grid(w: Tensor, spec: Spec, *, search: bool = True) -> tuple[Tensor, Tensor]:
    """Scales and zero points (..., rows, groups) of `w` (..., rows, cols) for `spec`; fp32, exact in fp16.

    With zero points: asymmetric over min(w, 0)..max(w, 0), as in GPTQ's code and Delta-CoMe. Without: symmetric, its
    range chosen per group among 13 shares of the largest magnitude by least squared error (`search`).
    """
    groups = spec.groups(w.shape[-1])
    size = spec.group or w.shape[-1]
    pad = groups * size - w.shape[-1]
    cut = torch.nn.functional.pad(w, (0, pad)).unflatten(-1, (groups, size))
    top = 2**spec.bits - 1
    if spec.zeros:
        low, high = cut.amin(-1).clamp_max(0), cut.amax(-1).clamp_min(0)
        scale = _in_fp16((high - low) / top)
        return scale, (-low / scale).round().clamp(0, top)
    middle = torch.full(cut.shape[:-1], top / 2, device=w.device)
    whole = cut.abs().amax(-1) / (top / 2)
    if not search:
        return _in_fp16(whole), middle
    valid = torch.nn.functional.pad(torch.ones_like(w), (0, pad)).unflatten(-1, (groups, size))
    best, least = _in_fp16(whole), torch.full_like(whole, torch.inf)
    for clip in _CLIPS:
        scale = _in_fp16(whole * clip)[..., None]
        code = (cut / scale + top / 2).round().clamp(0, top)
        error = ((cut - scale * (code - top / 2)).square() * valid).sum(-1)
        better = error < least
        best, least = torch.where(better, scale[..., 0], best), torch.where(better, error, least)
    return best, middle


def _in_fp16(scale: Tensor) -> Tensor:
    """Rounded to fp16, and never 0: a group of zeros gets the smallest positive scale."""
    tiny = torch.finfo(torch.float16).smallest_normal
    return scale.half().float().clamp_min(tiny)


def gptq(w: Tensor, factor: Factor | None, levels: Grid) -> tuple[Tensor, Tensor]:
    """Round `w` (..., rows, cols) to `levels`; codes and values, both fp32 (..., rows, cols).

    factor: of the Hessian (..., cols, cols), leading dimensions broadcastable to w's; None = identity, and then it
    is rounding to nearest.
    """
    levels = levels.expand(w.shape)
    if factor is None:
        return levels.round(w)
    batch = w.shape[:-2]
    order = factor.order.expand(*batch, -1)
    index = order[..., None, :].expand(w.shape)
    w = w.masked_fill(factor.dead[..., None, :], 0).gather(-1, index)
    levels = levels.columns(order)
    # Flat in the batch and contiguous from here on, as the kernel wants it.
    flat = (-1, *w.shape[-2:])
    w = w.reshape(flat)
    scale, zero, top = (part.reshape(flat) for part in (levels.scale, levels.zero, levels.top))
    inverse = factor.inverse.expand(*batch, -1, -1).reshape(-1, w.shape[-1], w.shape[-1])
    for start in range(0, w.shape[-1], WIDTH):
        at = slice(start, min(start + WIDTH, w.shape[-1]))
        block = (w[..., at], inverse[..., at, at], scale[..., at], zero[..., at], top[..., at])
        w[..., at], errors = gptq_block(*block)
        w[..., at.stop :] -= errors @ inverse[..., at, at.stop :]
    index = index.reshape(flat)
    values = torch.empty_like(w).scatter(-1, index, w)
    codes = torch.empty_like(w).scatter(-1, index, (w / scale + zero).round())
    return codes.view(*batch, *w.shape[-2:]), values.view(*batch, *w.shape[-2:])


def nearest(w: Tensor, spec: Spec) -> Packed:
    """`w` (rows, cols) rounded to nearest and packed."""
    if spec.floats:
        return Packed.floats(w, spec.floats)
    scale, zero = grid(w, spec)
    codes, _ = spread(scale, zero, spec, w.shape[-1]).round(w)
    return Packed.codes(codes.to(torch.uint8), spec, scale, zero.to(torch.uint8) if spec.zeros else None)


def spread(scale: Tensor, zero: Tensor, spec: Spec, cols: int) -> Grid:
    """Per-group scales and zero points (..., rows, groups) as a Grid over (..., rows, cols)."""
    size = spec.group or cols
    top = torch.full((1, 1), float(2**spec.bits - 1), device=scale.device)
    wide_scale, wide_zero = (part.repeat_interleave(size, dim=-1)[..., :cols] for part in (scale, zero))
    return Grid(wide_scale, wide_zero, top)
