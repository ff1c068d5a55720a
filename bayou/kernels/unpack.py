"""Packed matrices of a table's records as plain 16-bit ones, for products of so many rows that cuBLAS is faster.

    out[row, column] = gain * output_scale[row] * input_scale[column] * scale * (code - zero)

in fp32, rounded once; the plain version is Packed.unpack. One launch for all records of a slot: those of "shrink" make
V (ranks, in), those of "expand" U (out, ranks), that of "dense" the term (out, in).
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from bayou.kernels.table import FIELDS, Table

TALL, WIDE = 16, 128


def unpack(table: Table, stage: str, record: int, count: int, out: Tensor) -> None:
    """Unpack `count` records of slot 0 from `record` on into `out`, at the places that the records name."""
    records, _ = table.lists[stage]
    grid = (-(-out.shape[1] // WIDE), -(-out.shape[0] // TALL), count)
    _kernel()[grid](records[0, record:], out, out.stride(0), UP=stage == "expand", FIELDS=FIELDS, M=TALL, K=WIDE)


def product(table: Table, x: Tensor) -> Tensor:
    """x (rows, in) bf16 or fp16 -> the product with the only projection of slot 0 (rows, out), in x's dtype."""
    (out_features, in_features), ranks = table.shapes[0], table.ranks
    y = x.new_zeros(x.shape[0], out_features)
    if ranks:
        v, u = x.new_empty(ranks, in_features), x.new_empty(out_features, ranks)
        unpack(table, "shrink", 0, table.lists["shrink"][0].shape[1], v)
        unpack(table, "expand", 0, table.lists["expand"][0].shape[1], u)
        torch.mm(x @ v.T, u.T, out=y)
    for record in range(table.lists["dense"][0].shape[1]):
        whole = x.new_empty(out_features, in_features)
        unpack(table, "dense", record, 1, whole)
        y.addmm_(x, whole.T)
    return y


@cache
def _kernel() -> Any:
    """The kernel, made at the first call: Triton is not needed to import this file."""
    import triton
    import triton.language as tl

    @triton.jit
    def whole(table, out, line, UP: tl.constexpr, FIELDS: tl.constexpr, M: tl.constexpr, K: tl.constexpr):  # type: ignore[no-untyped-def]
        rec = table + tl.program_id(2) * FIELDS
        rows = tl.load(rec + 7).to(tl.int32)
        cols = tl.load(rec + 8).to(tl.int32)
        bits = tl.load(rec + 9).to(tl.int32)
        group = tl.load(rec + 10).to(tl.int32)
        groups = tl.load(rec + 11).to(tl.int32)
        kind = tl.load(rec + 12)
        row = tl.program_id(1) * M + tl.arange(0, M)
        column = tl.program_id(0) * K + tl.arange(0, K)
        there = (row < rows)[:, None] & (column < cols)[None, :]
        first = tl.load(rec)
        if kind == 3:
            at = row.to(tl.int64)[:, None] * cols + column[None, :]
            value = tl.load(first.to(tl.pointer_type(tl.float16)) + at, mask=there, other=0.0).to(tl.float32)
        elif kind == 4:
            at = row.to(tl.int64)[:, None] * cols + column[None, :]
            value = tl.load(first.to(tl.pointer_type(tl.bfloat16)) + at, mask=there, other=0.0).to(tl.float32)
        elif kind == 5:
            at = row.to(tl.int64)[:, None] * cols + column[None, :]
            value = tl.load(first.to(tl.pointer_type(tl.float32)) + at, mask=there, other=0.0)
        else:
            # A run of matrices of 128 columns: which of them, and the column there.
            run = tl.load(rec + 29)
            member = tl.where(run != 0, column // 128, 0)
            own = tl.where(run != 0, column % 128, column)
            wide = tl.where(run != 0, 128, cols)
            code = tl.zeros((M, K), dtype=tl.int32)
            index = row[:, None] * groups + (own // group)[None, :]
            zero_at = tl.load(rec + 4)
            twice = tl.zeros((M, K), dtype=tl.int32)
            shift = 0
            for p in tl.static_range(3):
                log = 6 - tl.load(rec + 20 + p).to(tl.int32)
                if log < 6:
                    width = 32 >> log
                    low = (1 << width) - 1
                    words = tl.load(rec + p).to(tl.pointer_type(tl.int32)) + (member * (run // 2))[None, :]
                    stride = (wide * width + 31) // 32
                    word = tl.load(
                        words + row.to(tl.int64)[:, None] * stride + (own >> log)[None, :], mask=there, other=0
                    )
                    code |= ((word >> ((own & ((1 << log) - 1)) * width)[None, :]) & low) << shift
                    if zero_at != 0:
                        zeros = tl.load(rec + 4 + p).to(tl.pointer_type(tl.int32))
                        at = index + tl.load(rec + 16).to(tl.int32)
                        zeros += (member * tl.load(rec + 31))[None, :]
                        word = tl.load(zeros + (at >> log), mask=there, other=0)
                        twice |= ((word >> ((at & ((1 << log) - 1)) * width)) & low) << (shift + 1)
                    shift += width
            if zero_at == 0:
                twice += (1 << bits) - 1
            value = code.to(tl.float32) - 0.5 * twice.to(tl.float32)
            scale_at = tl.load(rec + 3)
            if scale_at != 0:
                scales = scale_at.to(tl.pointer_type(tl.float16)) + (member * tl.load(rec + 30))[None, :]
                value *= tl.load(scales + index, mask=there, other=0.0).to(tl.float32)
        value *= tl.load((rec + 17).to(tl.pointer_type(tl.float32)))
        scale_out = tl.load(rec + 18)
        if scale_out != 0:
            scales = scale_out.to(tl.pointer_type(tl.float16))
            value *= tl.load(scales + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        scale_in = tl.load(rec + 19)
        if scale_in != 0:
            scales = scale_in.to(tl.pointer_type(tl.float16))
            value *= tl.load(scales + column, mask=column < cols, other=0.0).to(tl.float32)[None, :]
        if UP:
            column += tl.load(rec + 13).to(tl.int32)
        else:
            row += tl.load(rec + 14).to(tl.int32)
        tl.store(out + row.to(tl.int64)[:, None] * line + column[None, :], value.to(out.dtype.element_ty), mask=there)

    return whole
