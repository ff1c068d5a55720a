"""The Triton version of packed_product.py, which has the formula; imported where Triton is there only.

A program of `product` computes M rows (ranks of V, or outputs) for ROWS rows of one segment. It goes through the
records (table.py) that add to these; a record's loop is chosen by its format, and LOOPS says which are compiled at all.
`stream` is the loop that matters; packed_panels.py makes the panels of x that it multiplies.
"""

# ruff: noqa: SIM102, SIM108 (an `if` of constants decides what is compiled)
# mypy: disable-error-code="no-untyped-def,attr-defined"

import triton
import triton.language as tl


@triton.jit
def lifted(tile, K: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr, DOT: tl.constexpr):
    """128 + 2^up * code of the K-th code of each 16-bit word."""
    LIFT: tl.constexpr = 7 // BITS
    UP: tl.constexpr = K % LIFT * BITS
    if ASM:
        MASK: tl.constexpr = (((1 << BITS) - 1) << UP) * 65537
        RIGHT: tl.constexpr = K // LIFT * LIFT * BITS
        words = tile
        if RIGHT > 0:
            words = tl.inline_asm_elementwise(
                asm=f"shr.b32 $0, $1, {RIGHT};", constraints="=r,r", args=[tile], dtype=tl.int16, is_pure=True, pack=2
            )
        a = tl.inline_asm_elementwise(
            asm=f"lop3.b32 $0, $1, {MASK}, 1124090624, 0xEA;",
            constraints="=r,r", args=[words], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        code = (tile.to(tl.int32) >> (K * BITS)) & ((1 << BITS) - 1)
        a = (code.to(tl.float32) * (2.0**UP) + 128.0).to(DOT)
    return a


@triton.jit
def stream(
    acc, panel, rec, m, row, factor, lines, position, wide, start, stop,
    WIDTH: tl.constexpr, LIES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    ASM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """acc + factor * block @ x of columns start:stop; position: where the block's first column lies in x's panel.

    LIES: 0 = whole tiles on 16 bytes, 1 = a run of matrices of 128 columns, 2 = tiles need masks, 3 = one tile, of 16
    words at most. A tile's columns share their scales.
    """
    SPAN: tl.constexpr = 256 if WIDTH == 1 else 128
    CODES: tl.constexpr = 16 // WIDTH
    BITS: tl.constexpr = 4 if WIDTH == 8 else WIDTH
    STEPS: tl.constexpr = 16 // BITS
    TWICE: tl.constexpr = 2 if WIDTH == 8 else 1
    J: tl.constexpr = SPAN // CODES
    LINE: tl.constexpr = SPAN * TWICE
    chunks = wide // SPAN
    line = chunks * LINE + (chunks * 4 + 7) // 8 * 8
    x_at = panel + tl.multiple_of(lines * line, 8) + tl.multiple_of(position * TWICE, 8)
    sums_at = (panel + lines * line + chunks * LINE).to(tl.pointer_type(tl.float32)) + position // SPAN * 2
    cols = tl.load(rec + 8).to(tl.int32)
    marks_line = tl.load(rec + 6).to(tl.int32)
    words = tl.load(rec).to(tl.pointer_type(tl.int16))
    stride = (cols * WIDTH + 31) // 32 * 2
    run = 0
    if LIES == 1:
        stride = J
        run = tl.multiple_of(tl.load(rec + 29), 8)
    elif LIES == 0:
        stride = tl.multiple_of(stride, 8)
    marks = tl.load(rec + 5).to(tl.pointer_type(tl.int32)) + tl.load(rec + 23) + m
    real = m < tl.load(rec + 7).to(tl.int32)
    WORDS: tl.constexpr = 16 if LIES == 3 else J
    j = tl.arange(0, WORDS)
    at = words + row.to(tl.int64)[:, None] * stride + j[None, :]
    for c in tl.range(start, stop, SPAN, num_stages=STAGES):
        chunk = c // SPAN
        mark = tl.load(marks + chunk * marks_line, mask=real, other=0)
        if LIES >= 2:
            # What lies beyond the last column is multiplied by zeros of the panel.
            ok = tl.max_constancy(chunk * J + j < stride, 2)
            tile = tl.load(tl.max_contiguous(tl.multiple_of(at + chunk * J, (1, 2)), (1, 2)), mask=ok[None, :], other=0)
        else:
            move = chunk * J
            if LIES == 1:
                move = chunk * run
            tile = tl.load(tl.max_contiguous(tl.multiple_of(at + tl.multiple_of(move, 8), (1, 16)), (1, 8)))
        total = tl.zeros((M, N), dtype=tl.float32)
        for k in tl.static_range(STEPS):
            b_at = x_at[None, :] + chunk * LINE + (k * J + j)[:, None]
            b = tl.load(tl.max_contiguous(tl.multiple_of(b_at, (16, 1)), (16, 1)))
            total = tl.dot(lifted(tile, k, BITS, ASM, DOT), b.to(DOT), total)
        whole = tl.load(sums_at + 2 * chunk)
        sum_x = tl.load(sums_at + 2 * chunk + 1)
        s = (mark & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * factor
        z = (mark >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        acc += (total - whole[None, :] - z[:, None] * sum_x[None, :]) * s[:, None]
    return acc


@triton.jit
def gathered(src, rows, column, ok, scale, SCALED: tl.constexpr):
    """x of some columns (K, N), fp32, times the input scale."""
    x = tl.load(src + rows[None, :] + column[:, None], mask=ok[:, None], other=0.0).to(tl.float32)
    if SCALED and scale != 0:
        scales = scale.to(tl.pointer_type(tl.float16))
        x *= tl.load(scales + column, mask=ok, other=0.0).to(tl.float32)[:, None]
    return x


@triton.jit
def twofold(
    acc, a, factor, src, rows, part, column, ok, scale_in, PARTS: tl.constexpr, SCALED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """acc + factor * a @ x for fp32 a (M, K), as two bf16 parts."""
    x = gathered(src, rows, column, ok, scale_in, SCALED)
    b = x.to(tl.bfloat16)
    if PARTS == 2:
        b = tl.where((part == 1)[None, :], (x - b.to(tl.float32)).to(tl.bfloat16), b)
    high = a.to(tl.bfloat16)
    low = (a - high.to(tl.float32)).to(tl.bfloat16)
    total = tl.dot(low.to(DOT), b.to(DOT))
    return acc + tl.dot(high.to(DOT), b.to(DOT), total) * factor[:, None]


@triton.jit
def floats(
    acc, rec, kind, row, factor, src, rows, part, scale_in, start, stop,
    PARTS: tl.constexpr, SCALED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """acc + factor * block @ x for a block of floats."""
    cols = tl.load(rec + 8).to(tl.int32)
    first = tl.load(rec)
    if cols <= 8:  # a band of the first ranks: tensor cores would multiply zeros for the most part
        for c in range(start, stop):
            a = number(first, kind, row * cols + c, row >= 0) * factor
            x = tl.load(src + rows + c).to(tl.float32)
            if SCALED and scale_in != 0:
                x *= tl.load(scale_in.to(tl.pointer_type(tl.float16)) + c).to(tl.float32)
            acc += a[:, None] * tl.where(part == 0, x, 0.0)[None, :]
    else:
        lines = row.to(tl.int64)[:, None] * cols
        for c in tl.range(start, stop, 16, num_stages=1):
            column = c + tl.arange(0, 16)
            ok = column < stop
            a = number(first, kind, lines + column[None, :], (row >= 0)[:, None] & ok[None, :])
            acc = twofold(acc, a, factor, src, rows, part, column, ok, scale_in, PARTS, SCALED, DOT)
    return acc


@triton.jit
def number(first, kind, at, there):
    """Floats of a kind (table.FLOAT_KINDS), as fp32."""
    if kind == 3:
        a = tl.load(first.to(tl.pointer_type(tl.float16)) + at, mask=there, other=0.0).to(tl.float32)
    elif kind == 4:
        a = tl.load(first.to(tl.pointer_type(tl.bfloat16)) + at, mask=there, other=0.0).to(tl.float32)
    else:
        a = tl.load(first.to(tl.pointer_type(tl.float32)) + at, mask=there, other=0.0)
    return a


@triton.jit
def codes(
    acc, rec, row, factor, src, rows, part, scale_in, start, stop,
    PARTS: tl.constexpr, SCALED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """acc + factor * block @ x for any codes, whatever shares their scales: right, not fast."""
    cols = tl.load(rec + 8).to(tl.int32)
    group = tl.load(rec + 10).to(tl.int32)
    groups = tl.load(rec + 11).to(tl.int32)
    log = 6 - tl.load(rec + 20).to(tl.int32)
    width = 32 >> log
    zero_at = tl.load(rec + 4)
    scale_at = tl.load(rec + 3)
    words = tl.load(rec).to(tl.pointer_type(tl.int32))
    zeros = zero_at.to(tl.pointer_type(tl.int32))
    scales = scale_at.to(tl.pointer_type(tl.float16))
    last = (1 << log) - 1
    lines = row.to(tl.int64)[:, None] * ((cols * width + 31) // 32)
    for c in tl.range(start, stop, 32, num_stages=1):
        column = c + tl.arange(0, 32)
        ok = column < stop
        there = (row >= 0)[:, None] & ok[None, :]
        word = tl.load(words + lines + (column >> log)[None, :], mask=there, other=0)
        code = (word >> ((column & last) * width)[None, :]) & ((1 << width) - 1)
        index = row[:, None] * groups + (column // group)[None, :]
        spot = index + tl.load(rec + 16).to(tl.int32)
        zero = tl.load(zeros + (spot >> log), mask=there & (zero_at != 0), other=0)
        zero = (zero >> ((spot & last) * width)) & ((1 << width) - 1)
        twice = tl.where(zero_at != 0, zero * 2, (1 << width) - 1)
        a = code.to(tl.float32) - 0.5 * twice.to(tl.float32)
        a *= tl.load(scales + index, mask=there & (scale_at != 0), other=1.0).to(tl.float32)
        acc = twofold(
            acc, a, factor, src, rows, part, column, ok, scale_in, PARTS, SCALED, DOT
        )  # fmt: skip
    return acc


@triton.jit(
    do_not_specialize=[
        *("records", "src_stride", "slice_stride", "wide", "s0", "s1", "s2", "s3", "e0", "e1", "e2", "row_tiles"),
        "count",
    ]
)
def product(
    table, bounds, records, src, src_stride, slice_stride, wide, p1, p2, p4, p8, y0, y1, y2, y3, s0, s1, s2, s3,
    e0, e1, e2, offsets, slots, row_tiles, count,
    SHRINK: tl.constexpr, FIELDS: tl.constexpr, M: tl.constexpr, MOST: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr,
    STAGES: tl.constexpr, LOOPS: tl.constexpr, ASM: tl.constexpr, DOT: tl.constexpr,
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
        # Columns of the tile beyond the segment's rows repeat its last row: their sums are not stored.
        mine = tl.minimum(begin + n // PARTS, end - 1).to(tl.int64)
        lines = mine * src_stride
        parts = mine * PARTS + part
        acc = tl.zeros((M, N), dtype=tl.float32)
        out_rows = 0
        out_at = 0
        for i in range(first, last):
            rec = table + (slot.to(tl.int64) * records + i) * FIELDS
            out_rows = tl.load(rec + 7).to(tl.int32)
            out_at = tl.load(rec + 14).to(tl.int32)
            cols = tl.load(rec + 8).to(tl.int32)
            kind = tl.load(rec + 12).to(tl.int32)
            loop = tl.load(rec + 21).to(tl.int32)
            scale_in = tl.load(rec + 19)
            position = tl.load(rec + 13).to(tl.int32)
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
                common = rec, m0 + tl.arange(0, M), row, factor, parts, position, wide, start, stop
                if start < stop:
                    if loop > 0:
                        if (LOOPS >> 1) & 1:
                            if loop == 1:
                                acc = stream(acc, p1, *common, 1, 0, M, N, STAGES, ASM, DOT)
                        if (LOOPS >> 2) & 1:
                            if loop == 2:
                                acc = stream(acc, p2, *common, 2, 0, M, N, STAGES, ASM, DOT)
                        if (LOOPS >> 3) & 1:
                            if loop == 3:
                                acc = stream(acc, p2, *common, 2, 1, M, N, STAGES, ASM, DOT)
                        if (LOOPS >> 4) & 1:
                            if loop == 4:
                                acc = stream(acc, p2, *common, 2, 2, M, N, 1, ASM, DOT)
                        if (LOOPS >> 5) & 1:
                            if loop == 5:
                                acc = stream(acc, p4, *common, 4, 0, M, N, STAGES, ASM, DOT)
                        if (LOOPS >> 6) & 1:
                            if loop == 6:
                                acc = stream(acc, p4, *common, 4, 1, M, N, STAGES, ASM, DOT)
                        if (LOOPS >> 7) & 1:
                            if loop == 7:
                                acc = stream(acc, p4, *common, 4, 2, M, N, 1, ASM, DOT)
                        if (LOOPS >> 8) & 1:
                            if loop == 8:
                                acc = stream(acc, p8, *common, 8, 0, M, N, 2, ASM, DOT)
                        if (LOOPS >> 9) & 1:
                            if loop == 9:
                                acc = stream(acc, p8, *common, 8, 2, M, N, 1, ASM, DOT)
                        if (LOOPS >> 10) & 1:
                            if loop == 10:
                                acc = stream(acc, p4, *common, 4, 3, M, N, 1, ASM, DOT)
                        if (LOOPS >> 11) & 1:
                            if loop == 11:
                                acc = stream(acc, p8, *common, 8, 3, M, N, 1, ASM, DOT)
                    elif kind == 2:
                        if (LOOPS >> 12) & 1:
                            acc = codes(
                                acc, rec, row, factor, src, lines + position, part, scale_in, start, stop,
                                PARTS, SCALED, DOT,
                            )  # fmt: skip
                    elif (LOOPS >> 13) & 1:
                        acc = floats(
                            acc, rec, kind, row, factor, src, lines + position, part, scale_in, start, stop,
                            PARTS, SCALED, DOT,
                        )  # fmt: skip
        top = out_rows
        if SHRINK:  # zeros where the record's place among the ranks goes on: panels have whole chunks
            top = tl.where(first < last, MOST, 0)
        if m0 < top:
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
            mask = (m < top)[:, None] & (r < end)[None, :]
            if SHRINK:
                tl.store(at, tl.where((m < out_rows)[:, None], sums, 0.0), mask=mask)
            else:
                tl.store(
                    at, (tl.load(at, mask=mask, other=0.0).to(tl.float32) + sums).to(y.dtype.element_ty), mask=mask
                )
