"""The Triton version of packed_product.py, which has the formula; imported where Triton is there only.

A program computes M rows (ranks of V, or outputs) for ROWS rows of one segment. It goes through the records (table.py)
that add to these; a record's loop is chosen by its format, and VARIANTS says which loops are compiled at all.
"""

# ruff: noqa: SIM102, SIM108 (an `if` of constants decides what is compiled)
# mypy: disable-error-code="no-untyped-def,attr-defined"

import triton
import triton.language as tl


@triton.jit
def zeros(rec, index, there):
    """Twice the zero point of each index, fp32."""
    z = tl.zeros_like(index)
    if tl.load(rec + 4) == 0:
        z += (1 << tl.load(rec + 9).to(tl.int32)) - 1
    else:
        shift = 1
        for p in tl.static_range(3):
            log = 6 - tl.load(rec + 20 + p).to(tl.int32)  # a word holds 2^log codes
            if log < 6:
                width = 32 >> log
                words = tl.load(rec + 4 + p).to(tl.pointer_type(tl.int32))
                word = tl.load(words + (index >> log), mask=there, other=0)
                z |= ((word >> ((index & ((1 << log) - 1)) * width)) & ((1 << width) - 1)) << shift
                shift += width
    return z.to(tl.float32)


@triton.jit
def gathered(
    src, rows, there, column, ok, part, factor, scale, slice_stride, SLICES: tl.constexpr, SCALED: tl.constexpr
):
    """x of some columns (K, N), fp32: the sum of the slices, times the input scale and `factor`."""
    at = src + rows[None, :] + column[:, None]
    mask = there[None, :] & ok[:, None]
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(1, SLICES):
        x += tl.load(at + i * slice_stride, mask=mask, other=0.0).to(tl.float32)
    if SCALED and scale != 0:
        scales = scale.to(tl.pointer_type(tl.float16))
        x *= tl.load(scales + column, mask=ok, other=0.0).to(tl.float32)[:, None]
    return x * factor


@triton.jit
def numbers(tile, z, K: tl.constexpr, LIFT: tl.constexpr, WIDTH: tl.constexpr, ASM: tl.constexpr, DOT: tl.constexpr):
    """2 * 2^up * (code - z/2) of the K-th code of each word, for up = K % LIFT * WIDTH."""
    UP: tl.constexpr = K % LIFT * WIDTH
    MASK: tl.constexpr = (((1 << WIDTH) - 1) << (1 + UP)) * 65537
    RIGHT: tl.constexpr = K // LIFT * LIFT * WIDTH - 1
    if WIDTH == 8 or not ASM:
        code = (tile.to(tl.int32) >> (K * WIDTH)) & ((1 << WIDTH) - 1)
        a = ((code.to(tl.float32) * 2 - z[:, None]) * (2.0**UP)).to(DOT)
    else:
        minus = (-128.0 - z * (2.0**UP)).to(tl.bfloat16)[:, None]
        if RIGHT < 0:
            a = tl.inline_asm_elementwise(
                asm=f"""{{ .reg .b32 t, o; shl.b32 t, $1, 1; lop3.b32 t, t, {MASK}, 1124090624, 0xEA;
                mov.b32 o, 1065369472; fma.rn.bf16x2 $0, t, o, $2; }}""",
                constraints="=r,r,r", args=[tile, minus], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            a = tl.inline_asm_elementwise(
                asm=f"""{{ .reg .b32 t, o; shr.b32 t, $1, {RIGHT}; lop3.b32 t, t, {MASK}, 1124090624, 0xEA;
                mov.b32 o, 1065369472; fma.rn.bf16x2 $0, t, o, $2; }}""",
                constraints="=r,r,r", args=[tile, minus], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
    return a


@triton.jit
def plane(
    acc, rec, p, weight, row, factor, src, rows, there, part, scale_in, slice_stride, start, stop,
    WIDTH: tl.constexpr, HOT: tl.constexpr, FIRST: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr,
    SLICES: tl.constexpr, SCALED: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """acc + weight * factor * (plane p) @ x of columns start:stop.

    HOT: 0 = tiles need masks, 1 = whole tiles on 16 bytes, 2 = such of two groups each, 3 = a run of matrices of
    128 columns. FIRST: 0 = a later plane, 1 = the first, 2 = the only one, 3 = looked up.
    """
    PER: tl.constexpr = 16 // WIDTH
    J: tl.constexpr = 8 * WIDTH if WIDTH > 1 else 16
    LIFT: tl.constexpr = 6 // WIDTH if WIDTH < 8 else 1
    LOG: tl.constexpr = 2 if WIDTH == 8 else 3 if WIDTH == 4 else 4 if WIDTH == 2 else 5  # a word holds 2^LOG codes
    cols = tl.load(rec + 8).to(tl.int32)
    group = tl.load(rec + 10).to(tl.int32)
    groups = tl.load(rec + 11).to(tl.int32)
    scale_at = tl.load(rec + 3)
    scales = scale_at.to(tl.pointer_type(tl.float16))
    first_zero = tl.load(rec + 16).to(tl.int32)
    words = tl.load(rec + p).to(tl.pointer_type(tl.int16))
    zero_at = tl.load(rec + 4)
    zero_words = zero_at.to(tl.pointer_type(tl.int32))
    stride = (cols * WIDTH + 31) // 32 * 2
    step = J * PER
    run, run_scales, run_zeros = 0, 0, 0
    if HOT == 0:
        step = tl.load(rec + 23 + p).to(tl.int32)
    elif HOT == 3:
        stride = J
        run = tl.multiple_of(tl.load(rec + 29), 8)
        run_scales = tl.load(rec + 30)
        run_zeros = tl.load(rec + 31)
    else:
        stride = tl.multiple_of(stride, 8)
    j = tl.arange(0, J)
    lines = words + row.to(tl.int64)[:, None] * stride + j[None, :]
    everywhere = row >= 0
    for c in tl.range(start, stop, step, num_stages=STAGES):
        if HOT == 0:
            ok = (j * PER < step) & (c + j * PER < stop)
            tile = tl.load(lines + c // PER, mask=ok[None, :], other=0)
        else:
            ok = j >= 0
            move = c // PER  # a multiple of J, as c is of step
            if HOT == 3:
                move = c // 128 * run
            at = tl.multiple_of(lines + tl.multiple_of(move, 8), (1, 16))
            tile = tl.load(tl.max_contiguous(at, (1, 8)))
        for half in tl.static_range(2 if HOT == 2 else 1):
            inside = ok
            if HOT == 2:
                inside = (j >= 8) if half == 1 else (j < 8)
            if HOT == 3:
                index = row
            else:
                index = row * groups + (c + half * 128) // group
            z = tl.zeros_like(factor)
            if FIRST == 2:
                at = index + first_zero
                has = zero_at != 0
                word = tl.load(zero_words + c // 128 * run_zeros + (at >> LOG), mask=everywhere & has, other=0)
                code = (word >> ((at & (32 // WIDTH - 1)) * WIDTH)) & ((1 << WIDTH) - 1)
                z = tl.where(has, code * 2, (1 << WIDTH) - 1).to(tl.float32)
            elif FIRST == 1:
                z = zeros(rec, index + first_zero, everywhere)
            elif FIRST == 3:
                if p == 0:
                    z = zeros(rec, index + first_zero, everywhere)
            total = tl.zeros((M, N), dtype=tl.float32)
            for k in tl.static_range(PER):
                a = numbers(tile, z, k, LIFT, WIDTH, ASM, DOT)
                if HOT == 0:
                    inside = ok & (c + j * PER + k < stop)
                x = gathered(
                    src, rows, there, c + j * PER + k, inside, part, 0.5 / 2.0 ** (k % LIFT * WIDTH), scale_in,
                    slice_stride, SLICES, SCALED,
                )  # fmt: skip
                b = x.to(tl.bfloat16)
                if PARTS == 2:
                    b = tl.where((part == 1)[None, :], (x - b.to(tl.float32)).to(tl.bfloat16), b)
                total = tl.dot(a, b.to(DOT), total)
            s = factor * weight
            if scale_at != 0:
                s *= tl.load(scales + c // 128 * run_scales + index).to(tl.float32)
            acc += total * s[:, None]
    return acc


@triton.jit
def twofold(
    acc, a, src, rows, there, column, ok, part, factor, scale_in, slice_stride, PARTS: tl.constexpr,
    SLICES: tl.constexpr, SCALED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """acc + factor * a @ x for fp32 a (M, K), as two bf16 parts."""
    x = gathered(src, rows, there, column, ok, part, 1.0, scale_in, slice_stride, SLICES, SCALED)
    b = x.to(tl.bfloat16)
    if PARTS == 2:
        b = tl.where((part == 1)[None, :], (x - b.to(tl.float32)).to(tl.bfloat16), b)
    high = a.to(tl.bfloat16)
    low = (a - high.to(tl.float32)).to(tl.bfloat16)
    total = tl.dot(low.to(DOT), b.to(DOT))
    return acc + tl.dot(high.to(DOT), b.to(DOT), total) * factor[:, None]


@triton.jit
def floats(
    acc, rec, kind, row, factor, src, rows, there, part, scale_in, slice_stride, start, stop,
    PARTS: tl.constexpr, SLICES: tl.constexpr, SCALED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """acc + factor * block @ x for a block of floats."""
    cols = tl.load(rec + 8).to(tl.int32)
    first = tl.load(rec)
    lines = row.to(tl.int64)[:, None] * cols
    for c in tl.range(start, stop, 16, num_stages=1):
        column = c + tl.arange(0, 16)
        ok = column < stop
        at = lines + column[None, :]
        if kind == 3:
            a = tl.load(first.to(tl.pointer_type(tl.float16)) + at, mask=ok[None, :], other=0.0).to(tl.float32)
        elif kind == 4:
            a = tl.load(first.to(tl.pointer_type(tl.bfloat16)) + at, mask=ok[None, :], other=0.0).to(tl.float32)
        else:
            a = tl.load(first.to(tl.pointer_type(tl.float32)) + at, mask=ok[None, :], other=0.0)
        acc = twofold(
            acc, a, src, rows, there, column, ok, part, factor, scale_in, slice_stride, PARTS, SLICES, SCALED, DOT
        )  # fmt: skip
    return acc


@triton.jit
def codes(
    acc, rec, row, factor, src, rows, there, part, scale_in, slice_stride, start, stop,
    PARTS: tl.constexpr, SLICES: tl.constexpr, SCALED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """acc + factor * block @ x for groups that do not end at 16-bit words: right, not fast."""
    cols = tl.load(rec + 8).to(tl.int32)
    group = tl.load(rec + 10).to(tl.int32)
    groups = tl.load(rec + 11).to(tl.int32)
    first_zero = tl.load(rec + 16).to(tl.int32)
    lines = row.to(tl.int64)[:, None]
    for c in tl.range(start, stop, 16, num_stages=1):
        column = c + tl.arange(0, 16)
        ok = column < stop
        mask = (row >= 0)[:, None] & ok[None, :]
        code = tl.zeros_like(mask.to(tl.int32))
        shift = 0
        for p in tl.static_range(3):
            log = 6 - tl.load(rec + 20 + p).to(tl.int32)
            if log < 6:
                width = 32 >> log
                words = tl.load(rec + p).to(tl.pointer_type(tl.int32))
                stride = (cols * width + 31) // 32
                word = tl.load(words + lines * stride + (column >> log)[None, :], mask=mask, other=0)
                code |= ((word >> ((column & ((1 << log) - 1)) * width)[None, :]) & ((1 << width) - 1)) << shift
                shift += width
        index = row[:, None] * groups + (column // group)[None, :]
        scales = tl.load(rec + 3).to(tl.pointer_type(tl.float16))
        a = code.to(tl.float32) - 0.5 * zeros(rec, index + first_zero, mask)
        a *= tl.load(scales + index, mask=mask, other=0.0).to(tl.float32)
        acc = twofold(
            acc, a, src, rows, there, column, ok, part, factor, scale_in, slice_stride, PARTS, SLICES, SCALED, DOT
        )  # fmt: skip
    return acc


@triton.jit(
    do_not_specialize=[
        *("records", "src_stride", "slice_stride", "s0", "s1", "s2", "s3", "e0", "e1", "e2", "row_tiles", "count")
    ]
)
def product(
    table, bounds, records, src, src_stride, slice_stride, y0, y1, y2, y3, s0, s1, s2, s3, e0, e1, e2,
    offsets, slots, row_tiles, count,
    SHRINK: tl.constexpr, FIELDS: tl.constexpr, M: tl.constexpr, MOST: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, SLICES: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr,
    STAGES: tl.constexpr, VARIANTS: tl.constexpr, ASM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = ROWS * PARTS
    tile = tl.program_id(0)
    segment = tl.program_id(1) // row_tiles
    slot = tl.load(slots + segment)
    begin = tl.load(offsets + segment) + tl.program_id(1) % row_tiles * ROWS
    end = tl.load(offsets + segment + 1)
    if (slot >= 0) & (begin < end):
        bounds += slot * (count + 1)
        y, stride, projection = y0, s0, 0
        if SHRINK:
            MT: tl.constexpr = MOST // M
            first = tile // MT
            m0 = tile % MT * M
            last = tl.minimum(first + 1, tl.load(bounds + count))
        else:
            m0 = tile
            if tile >= e2:
                y, stride, projection, m0 = y3, s3, 3, tile - e2
            elif tile >= e1:
                y, stride, projection, m0 = y2, s2, 2, tile - e1
            elif tile >= e0:
                y, stride, projection, m0 = y1, s1, 1, tile - e0
            m0 = m0 * M
            first = tl.load(bounds + projection)
            last = tl.load(bounds + projection + 1)
        n = tl.arange(0, N)
        part = n % PARTS
        line = begin + n // PARTS
        there = line < end
        lines = line.to(tl.int64) * src_stride
        acc = tl.zeros((M, N), dtype=tl.float32)
        out_rows = 0
        out_at = 0
        for i in range(first, last):
            rec = table + (slot.to(tl.int64) * records + i) * FIELDS
            out_rows = tl.load(rec + 7).to(tl.int32)
            out_at = tl.load(rec + 14).to(tl.int32)
            cols = tl.load(rec + 8).to(tl.int32)
            kind = tl.load(rec + 12).to(tl.int32)
            scale_in = tl.load(rec + 19)
            if m0 < out_rows:
                # Rows beyond the last repeat it: their sums are not stored.
                row = tl.minimum(m0 + tl.arange(0, M), out_rows - 1)
                factor = tl.zeros((M,), dtype=tl.float32) + tl.load((rec + 17).to(tl.pointer_type(tl.float32)))
                out_scale = tl.load(rec + 18)
                if out_scale != 0:
                    factor *= tl.load(out_scale.to(tl.pointer_type(tl.float16)) + row).to(tl.float32)
                start = 0
                stop = cols
                if SPLIT > 1:
                    unit = tl.load(rec + 15).to(tl.int32)
                    chunk = tl.cdiv(tl.cdiv(cols, SPLIT), unit) * unit
                    start = tl.program_id(2) * chunk
                    stop = tl.minimum(cols, start + chunk)
                from_ = lines + tl.load(rec + 13)
                if kind < 2:
                    shift = 0
                    for p in range(3):
                        how = tl.load(rec + 26 + p).to(tl.int32)
                        weight = (1 << shift).to(tl.float32)
                        common = (
                            rec, p, weight, row, factor, src, from_, there, part, scale_in, slice_stride, start,
                            stop,
                        )  # fmt: skip
                        if (VARIANTS >> 1) & 1:
                            if how == 1:
                                acc = plane(acc, *common, 2, 1, 2, M, N, PARTS, SLICES, SCALED, STAGES, ASM, DOT)
                        if (VARIANTS >> 2) & 1:
                            if how == 2:
                                acc = plane(acc, *common, 2, 3, 2, M, N, PARTS, SLICES, SCALED, STAGES, ASM, DOT)
                        if (VARIANTS >> 3) & 1:
                            if how == 3:
                                acc = plane(acc, *common, 2, 1, 1, M, N, PARTS, SLICES, SCALED, STAGES, ASM, DOT)
                        if (VARIANTS >> 4) & 1:
                            if how == 4:
                                acc = plane(acc, *common, 1, 2, 0, M, N, PARTS, SLICES, SCALED, STAGES, ASM, DOT)
                        if (VARIANTS >> 5) & 1:
                            if how == 5:
                                acc = plane(acc, *common, 8, 1, 2, M, N, PARTS, SLICES, SCALED, STAGES, ASM, DOT)
                        if (VARIANTS >> 6) & 1:
                            if how == 6:
                                acc = plane(acc, *common, 1, 1, 2, M, N, PARTS, SLICES, SCALED, STAGES, ASM, DOT)
                        if (VARIANTS >> 7) & 1:
                            if how == 7:
                                acc = plane(acc, *common, 1, 2, 2, M, N, PARTS, SLICES, SCALED, STAGES, ASM, DOT)
                        if (VARIANTS >> 8) & 1:
                            if how == 8:
                                acc = plane(acc, *common, 4, 1, 2, M, N, PARTS, SLICES, SCALED, STAGES, ASM, DOT)
                        if (VARIANTS >> 9) & 1:
                            if how == 9:
                                acc = plane(acc, *common, 4, 3, 2, M, N, PARTS, SLICES, SCALED, STAGES, ASM, DOT)
                        if (VARIANTS >> 10) & 1:
                            if how == 10:
                                acc = plane(acc, *common, 1, 0, 3, M, N, PARTS, SLICES, SCALED, 1, ASM, DOT)
                        if (VARIANTS >> 11) & 1:
                            if how == 11:
                                acc = plane(acc, *common, 2, 0, 3, M, N, PARTS, SLICES, SCALED, 1, ASM, DOT)
                        if (VARIANTS >> 12) & 1:
                            if how == 12:
                                acc = plane(acc, *common, 4, 0, 3, M, N, PARTS, SLICES, SCALED, 1, ASM, DOT)
                        if (VARIANTS >> 13) & 1:
                            if how == 13:
                                acc = plane(acc, *common, 8, 0, 3, M, N, PARTS, SLICES, SCALED, 1, ASM, DOT)
                        width = tl.load(rec + 20 + p).to(tl.int32)
                        shift += tl.where(width > 0, 1 << tl.maximum(width - 1, 0), 0)
                elif kind == 2:
                    if (VARIANTS >> 14) & 1:
                        acc = codes(
                            acc, rec, row, factor, src, from_, there, part, scale_in, slice_stride, start, stop,
                            PARTS, SLICES, SCALED, DOT,
                        )  # fmt: skip
                elif (VARIANTS >> 15) & 1:
                    acc = floats(
                        acc, rec, kind, row, factor, src, from_, there, part, scale_in, slice_stride, start, stop,
                        PARTS, SLICES, SCALED, DOT,
                    )  # fmt: skip
        if m0 < out_rows:
            m = m0 + tl.arange(0, M)
            sums = acc
            if PARTS == 2:
                sums = tl.sum(tl.reshape(acc, (M, ROWS, PARTS)), 2)
            r = begin + tl.arange(0, ROWS)
            if SHRINK:
                at = y + tl.program_id(2) * slice_stride
            else:
                at = y
            at = at + r.to(tl.int64)[None, :] * stride + (out_at + m)[:, None]
            mask = (m < out_rows)[:, None] & (r < end)[None, :]
            if SHRINK:
                tl.store(at, sums, mask=mask)
            else:
                tl.store(
                    at, (tl.load(at, mask=mask, other=0.0).to(tl.float32) + sums).to(y.dtype.element_ty), mask=mask
                )
