"""Panels: x in the order in which codes lie in words, as packed_loops.py multiplies it; packed_product.py says why.

Imported where Triton is there only.
"""

# mypy: disable-error-code="no-untyped-def,attr-defined"

import triton
import triton.language as tl


@triton.jit
def spread(
    src, src_stride, slice_stride, cols, wide, o1, o2, o4, o8,
    WIDTHS: tl.constexpr, PARTS: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Add the SLICES of C columns of a row of x, and write them into the panel of each width in WIDTHS."""
    if SLICES > 1:
        column = tl.program_id(1) * C + tl.arange(0, C)
        at = src + tl.program_id(0).to(tl.int64) * src_stride + column
        x = tl.load(at, mask=column < cols, other=0.0)
        for i in tl.static_range(1, SLICES):
            x += tl.load(at + i * slice_stride, mask=column < cols, other=0.0)
        tl.store(at, x, mask=column < cols)
        tl.debug_barrier()  # other threads read it below
    common = src, src_stride, cols, wide
    if WIDTHS & 1:
        panel(o1, *common, 1, PARTS, C)
    if WIDTHS & 2:
        panel(o2, *common, 2, PARTS, C)
    if WIDTHS & 4:
        panel(o4, *common, 4, PARTS, C)
    if WIDTHS & 8:
        panel(o8, *common, 8, PARTS, C)


@triton.jit
def panel(
    out, src, src_stride, cols, wide, WIDTH: tl.constexpr, PARTS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A panel's line (a row's part, PARTS of them a row) has, for each chunk of 128 columns (256 for 1-bit codes), the
    number x * 2^-up that the k-th code of word j multiplies at k * J + j. After all chunks, as fp32, for each chunk:
    128 times their sum, and the sum of the chunk's x.
    """
    SPAN: tl.constexpr = 256 if WIDTH == 1 else 128
    CODES: tl.constexpr = 16 // WIDTH  # in a word
    TWICE: tl.constexpr = 2 if WIDTH == 8 else 1  # a code of 8 bits is two of 4
    BITS: tl.constexpr = 4 if WIDTH == 8 else WIDTH
    J: tl.constexpr = SPAN // CODES
    LINE: tl.constexpr = SPAN * TWICE
    CHUNKS: tl.constexpr = C // SPAN
    LIFT: tl.constexpr = 7 // BITS
    row = tl.program_id(0)
    start = tl.program_id(1) * C
    e = tl.arange(0, C * TWICE)
    k = e % LINE // J
    column = start + e // LINE * SPAN + e % J * CODES + k // TWICE
    at = src + row.to(tl.int64) * src_stride + column
    x = tl.load(at, mask=column < cols, other=0.0).to(tl.float32)
    if TWICE == 2:
        x *= tl.where(k % 2 == 1, 16.0, 1.0)
    power = (1 << (k % LIFT * BITS)).to(tl.float32)
    chunks = wide // SPAN
    line = chunks * LINE + (chunks * 4 + 7) // 8 * 8
    c = tl.arange(0, CHUNKS)
    for part in tl.static_range(PARTS):
        once = x.to(tl.bfloat16).to(tl.float32)
        x -= once
        to = out + (row * PARTS + part).to(tl.int64) * line
        lower = once / power
        tl.store(to + start * TWICE + e, lower.to(tl.bfloat16))
        if TWICE == 2:
            once = tl.where(k % 2 == 0, once, 0.0)
        sums = (to + chunks * LINE).to(tl.pointer_type(tl.float32)) + start // SPAN * 2
        tl.store(sums + 2 * c, 128.0 * tl.sum(tl.reshape(lower, (CHUNKS, LINE)), 1))
        tl.store(sums + 2 * c + 1, tl.sum(tl.reshape(once, (CHUNKS, LINE)), 1))
