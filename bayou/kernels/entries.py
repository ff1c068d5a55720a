"""Numbers of a record's matrix, unpacked, by row and column; imported where Triton is there only. See table.py.

gain * output_scale[row] * input_scale[column] * scale * (code - zero)
"""

# mypy: disable-error-code="no-untyped-def,attr-defined"

import triton
import triton.language as tl


@triton.jit
def entries(rec, row, column, there):
    """(rows, columns) fp32 of the matrix that `rec` names, 0 where `there` is not. row (M,), column (K,) int32."""
    group = tl.load(rec + 10).to(tl.int32)
    groups = tl.load(rec + 11).to(tl.int32)
    cols = tl.load(rec + 8).to(tl.int32)
    kind = tl.load(rec + 12)
    first = tl.load(rec)
    at = row.to(tl.int64)[:, None] * cols + column[None, :]
    if kind == 3:
        value = tl.load(first.to(tl.pointer_type(tl.float16)) + at, mask=there, other=0.0).to(tl.float32)
    elif kind == 4:
        value = tl.load(first.to(tl.pointer_type(tl.bfloat16)) + at, mask=there, other=0.0).to(tl.float32)
    elif kind == 5:
        value = tl.load(first.to(tl.pointer_type(tl.float32)) + at, mask=there, other=0.0)
    else:
        # A run of matrices of 128 columns: which of them, and the column there.
        run = tl.load(rec + 29)
        member = tl.where(run != 0, column // 128, 0)
        own = tl.where(run != 0, column % 128, column)
        wide = tl.where(run != 0, 128, cols)
        index = row[:, None] * groups + (own // group)[None, :]
        log = 6 - tl.load(rec + 20).to(tl.int32)
        width = 32 >> log
        low, last = (1 << width) - 1, (1 << log) - 1
        words = tl.load(rec).to(tl.pointer_type(tl.int32)) + (member * (run // 2))[None, :]
        stride = (wide * width + 31) // 32
        word = tl.load(words + row.to(tl.int64)[:, None] * stride + (own >> log)[None, :], mask=there, other=0)
        code = (word >> ((own & last) * width)[None, :]) & low
        zero_at = tl.load(rec + 4)
        spot = index + tl.load(rec + 16).to(tl.int32)
        zeros = zero_at.to(tl.pointer_type(tl.int32)) + (member * tl.load(rec + 31))[None, :]
        word = tl.load(zeros + (spot >> log), mask=there & (zero_at != 0), other=0)
        twice = tl.where(zero_at != 0, ((word >> ((spot & last) * width)) & low) * 2, low)
        value = code.to(tl.float32) - 0.5 * twice.to(tl.float32)
        scale_at = tl.load(rec + 3)
        if scale_at != 0:
            scales = scale_at.to(tl.pointer_type(tl.float16)) + (member * tl.load(rec + 30))[None, :]
            value *= tl.load(scales + index, mask=there, other=0.0).to(tl.float32)
    value *= tl.load((rec + 17).to(tl.pointer_type(tl.float32)))
    rows = tl.load(rec + 7).to(tl.int32)
    scale_out = tl.load(rec + 18)
    if scale_out != 0:
        scales = scale_out.to(tl.pointer_type(tl.float16))
        value *= tl.load(scales + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    scale_in = tl.load(rec + 19)
    if scale_in != 0:
        scales = scale_in.to(tl.pointer_type(tl.float16))
        value *= tl.load(scales + column, mask=column < cols, other=0.0).to(tl.float32)[None, :]
    return tl.where(there, value, 0.0)


@triton.jit
def tile(rec, row, start, there, K: tl.constexpr):
    """As entries, of K columns from `start` on that share their scales."""
    group = tl.load(rec + 10).to(tl.int32)
    groups = tl.load(rec + 11).to(tl.int32)
    wide = tl.load(rec + 8).to(tl.int32)
    words = tl.load(rec).to(tl.pointer_type(tl.int32))
    scale_at, zero_at = tl.load(rec + 3), tl.load(rec + 4)
    scales = scale_at.to(tl.pointer_type(tl.float16))
    zeros = zero_at.to(tl.pointer_type(tl.int32))
    own = start
    run = tl.load(rec + 29)
    if run != 0:
        member = start // 128
        words += member * (run // 2)
        scales += member * tl.load(rec + 30)
        zeros += member * tl.load(rec + 31)
        own, wide, group = 0, 128, 128
    log = 6 - tl.load(rec + 20).to(tl.int32)
    width = 32 >> log
    low, last = (1 << width) - 1, (1 << log) - 1
    column = own + tl.arange(0, K)
    word = tl.load(words + (row * ((wide * width + 31) // 32))[:, None] + (column >> log)[None, :], mask=there, other=0)
    code = (word >> ((column & last) * width)[None, :]) & low
    index = row * groups + own // group
    spot = index + tl.load(rec + 16).to(tl.int32)
    inside = row < tl.load(rec + 7).to(tl.int32)
    word = tl.load(zeros + (spot >> log), mask=inside & (zero_at != 0), other=0)
    twice = tl.where(zero_at != 0, ((word >> ((spot & last) * width)) & low) * 2, low)
    s = tl.load(scales + index, mask=inside & (scale_at != 0), other=1.0).to(tl.float32)
    s *= tl.load((rec + 17).to(tl.pointer_type(tl.float32)))
    scale_out = tl.load(rec + 18)
    if scale_out != 0:
        s *= tl.load(scale_out.to(tl.pointer_type(tl.float16)) + row, mask=inside, other=0.0).to(tl.float32)
    return (code * 2 - twice[:, None]).to(tl.float32) * (0.5 * s)[:, None]


@triton.jit
def whole(table, out, line, before, UP: tl.constexpr, FIELDS: tl.constexpr, M: tl.constexpr, K: tl.constexpr):
    """Tiles of the matrix of record program_id(2), at its place in `out`, less `before`."""
    rec = table + tl.program_id(2) * FIELDS
    row = tl.program_id(1) * M + tl.arange(0, M)
    start = tl.program_id(0) * K
    column = start + tl.arange(0, K)
    rows, cols = tl.load(rec + 7).to(tl.int32), tl.load(rec + 8).to(tl.int32)
    if (tl.program_id(1) * M < rows) & (start < cols):
        there = (row < rows)[:, None] & (column < cols)[None, :]
        value = tile(rec, row, start, there, K) if tl.load(rec + 21) != 0 else entries(rec, row, column, there)
        place = tl.load(rec + 22).to(tl.int32) - before
        if UP:
            column += place
        else:
            row += place
        tl.store(out + row.to(tl.int64)[:, None] * line + column[None, :], value.to(out.dtype.element_ty), mask=there)


@triton.jit
def row_of_u(table, bounds, ids, lines, ranks, ranks_row, records, FIELDS: tl.constexpr, K: tl.constexpr):
    """ranks[row] = the row ids[row] of the u of record program_id(1) of the row's line."""
    row = tl.program_id(0)
    line = tl.load(lines + row)
    if tl.program_id(1) < tl.load(bounds + line * 2 + 1):
        rec = table + (line * records + tl.program_id(1)) * FIELDS
        mine = tl.load(ids + row).to(tl.int32) + tl.arange(0, 1)
        inside = mine < tl.load(rec + 7).to(tl.int32)
        cols = tl.load(rec + 8).to(tl.int32)
        to = ranks + row.to(tl.int64) * ranks_row + tl.load(rec + 13)
        for c in range(0, cols, K):
            column = c + tl.arange(0, K)
            value = entries(rec, mine, column, inside[:, None] & (column < cols)[None, :])
            tl.store(to + column, tl.sum(value, 0), mask=column < cols)


@triton.jit
def row_of_sum(
    v_table, v_bounds, v_records, dense_table, dense_bounds, dense_records, base, base_row, gains, ids, lines,
    ranks, ranks_row, out, out_row, d,
    DELTAS: tl.constexpr, FIELDS: tl.constexpr, TALL: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out[row] of some columns: gain * base, u's row times v, and the row of what is dense."""
    row = tl.program_id(0)
    line = tl.load(lines + row)
    mine = tl.load(ids + row)
    column = tl.program_id(1) * K + tl.arange(0, K)
    ok = column < d
    acc = tl.load(base + mine * base_row + column, mask=ok, other=0.0).to(tl.float32) * tl.load(gains + line)
    if DELTAS:
        for i in range(0, tl.load(v_bounds + line * 2 + 1)):
            rec = v_table + (line * v_records + i) * FIELDS
            tall = tl.load(rec + 7).to(tl.int32)
            of = ranks + row.to(tl.int64) * ranks_row + tl.load(rec + 14)
            for r in range(0, tall, TALL):
                k = r + tl.arange(0, TALL)
                u = tl.load(of + k, mask=k < tall, other=0.0)
                acc += tl.sum(entries(rec, k, column, (k < tall)[:, None] & ok[None, :]) * u[:, None], 0)
        for i in range(0, tl.load(dense_bounds + line * 2 + 1)):
            rec = dense_table + (line * dense_records + i) * FIELDS
            k = mine.to(tl.int32) + tl.arange(0, 1)
            inside = (k < tl.load(rec + 7).to(tl.int32))[:, None] & ok[None, :]
            acc += tl.sum(entries(rec, k, column, inside), 0)
    tl.store(out + row.to(tl.int64) * out_row + column, acc.to(out.dtype.element_ty), mask=ok)
