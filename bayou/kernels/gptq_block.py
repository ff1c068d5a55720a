"""One block of GPTQ's column loop.

For a tile w (batch, rows, n), n <= 128, and the upper Cholesky factor of the inverse Hessian, inverse (n, n):

    for j in 0..n-1:
        code      = clamp(round(w_j / scale_j + zero_j), 0, top_j)          to nearest even
        value_j   = scale_j * (code - zero_j)         or w_j in fp16 where top_j is 0
        error_j   = (w_j - value_j) / inverse_jj
        w_k      -= error_j * inverse_jk              for k > j

Rows never meet, so a kernel gives each program a few rows and keeps their tile in registers through all columns: one
launch instead of some 1,500.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from bayou.kernels import use_triton

WIDTH = 128
"""Columns of a block at most."""


def gptq_block(w: Tensor, inverse: Tensor, scale: Tensor, zero: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Values and errors of a block, both like w.

    Args:
        w, scale, zero, top: (batch, rows, n) fp32. inverse: (batch, n, n) fp32, upper triangular.
    """
    return (_triton if use_triton(w) else reference)(w, inverse, scale, zero, top)


def reference(w: Tensor, inverse: Tensor, scale: Tensor, zero: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in plain torch."""
    w = w.clone()
    errors = torch.empty_like(w)
    # Bound by the number of operations, not by their size: everything that can be is done outside the loop.
    pivots = inverse.diagonal(dim1=-2, dim2=-1)[:, None, :]
    uncoded = (top == 0).flatten(0, -2).any(0).tolist()
    for j in range(w.shape[-1]):
        at = slice(j, j + 1)
        column = w[..., at]
        code = (column / scale[..., at]).add_(zero[..., at]).round_().clamp_min_(0).minimum(top[..., at])
        value = code.sub_(zero[..., at]).mul_(scale[..., at])
        if uncoded[j]:
            value = torch.where(top[..., at] == 0, column.half().float(), value)
        error = (column - value).div_(pivots[..., at])
        w[..., j + 1 :] -= error * inverse[:, at, j + 1 :]
        w[..., at] = value
        errors[..., at] = error
    return w, errors


def _triton(w: Tensor, inverse: Tensor, scale: Tensor, zero: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    import triton

    batch, rows, n = w.shape
    w, scale, zero, top = (part.contiguous() for part in (w, scale, zero, top))
    values, errors = torch.empty_like(w), torch.empty_like(w)
    strides = (inverse.stride(0), inverse.stride(1), inverse.stride(2))
    grid = (triton.cdiv(rows, 4), batch)
    _kernel()[grid](w, inverse, scale, zero, top, values, errors, rows, n, *strides, ROWS=4, WIDTH=WIDTH, num_warps=4)
    return values, errors


@cache
def _kernel() -> Any:
    """The kernel, made at the first call: Triton is not needed to import this file."""
    import triton
    import triton.language as tl

    @triton.jit
    def block(  # type: ignore[no-untyped-def]  # Triton takes annotations as its own
        w, inverse, scale, zero, top, values, errors, rows, n, si, sj, sk, ROWS: tl.constexpr, WIDTH: tl.constexpr
    ):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, WIDTH)
        base = tl.program_id(1).to(tl.int64) * rows * n
        lines = base + row * n
        there = (row < rows)[:, None] & (column < n)[None, :]
        tile = tl.load(w + lines[:, None] + column[None, :], mask=there, other=0.0)
        lost = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
        matrix = inverse + tl.program_id(1).to(tl.int64) * si
        for j in range(n):
            here = (column == j)[None, :]
            x = tl.sum(tl.where(here, tile, 0.0), 1)
            s = tl.load(scale + lines + j, mask=row < rows, other=1.0)
            z = tl.load(zero + lines + j, mask=row < rows, other=0.0)
            t = tl.load(top + lines + j, mask=row < rows, other=1.0)
            code = tl.minimum(tl.maximum(x / s + z, -1.0), t + 1.0)
            code = (code + 12582912.0) - 12582912.0  # 1.5 * 2^23: what is left of the point is rounded to even
            code = tl.minimum(tl.maximum(code, 0.0), t)
            value = tl.where(t == 0.0, x.to(tl.float16).to(tl.float32), (code - z) * s)
            line = tl.load(matrix + j * sj + column * sk, mask=column < n, other=0.0)
            pivot = tl.load(matrix + j * sj + j * sk)
            error = (x - value) / pivot
            later = tl.where(column > j, line, 0.0)
            tile = tl.where(here, value[:, None], tile - error[:, None] * later[None, :])
            lost = tl.where(here, error[:, None], lost)
        tl.store(values + lines[:, None] + column[None, :], tile, mask=there)
        tl.store(errors + lines[:, None] + column[None, :], lost, mask=there)

    return block
