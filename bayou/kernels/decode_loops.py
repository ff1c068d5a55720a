"""The Triton versions of decode_attention.py, row_norm.py and rotary.py, which have the formulas.

Imported where Triton is there only.
"""

# ruff: noqa: SIM108 (an `if` of constants decides what is compiled)
# mypy: disable-error-code="no-untyped-def,attr-defined"

import triton
import triton.language as tl


@triton.jit
def capped(scores, cap, CAPPED: tl.constexpr):
    """cap * tanh(scores / cap)."""
    if CAPPED:
        scores = cap * (2 * tl.sigmoid(2 * scores / cap) - 1)
    return scores


@triton.jit(do_not_specialize=["window"])
def attend(
    q, k, v, keys, values, slots, positions, out,
    q_row, q_head, k_row, k_head, v_row, v_head, key_slot, key_head, value_slot, value_head, out_row, out_head,
    scale, cap, window,
    D: tl.constexpr, E: tl.constexpr, WIDE_D: tl.constexpr, WIDE_E: tl.constexpr, GROUP: tl.constexpr,
    QUERIES: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + row)
    last = tl.load(positions + row).to(tl.int32)
    d = tl.arange(0, WIDE_D)
    e = tl.arange(0, WIDE_E)
    in_d = d < D
    in_e = e < E
    new_k = tl.load(k + row * k_row + head * k_head + d, mask=in_d, other=0.0)
    new_v = tl.load(v + row * v_row + head * v_head + e, mask=in_e, other=0.0)
    keys += slot * key_slot + head * key_head
    values += slot * value_slot + head * value_head
    tl.store(keys + last * D + d, new_k, mask=in_d)
    tl.store(values + last * E + e, new_v, mask=in_e)
    # The row's own key and value are taken from where they came from: what was just stored may not be readable yet.
    n = tl.arange(0, BLOCK)
    first = 0
    if WINDOWED:
        first = tl.maximum(last - window + 1, 0) // BLOCK * BLOCK
    if GROUP == 1:
        query = tl.load(q + row * q_row + head * q_head + d, mask=in_d, other=0.0).to(tl.float32) * scale
        top = capped(tl.sum(query * new_k.to(tl.float32), 0), cap, CAPPED)
        total = tl.exp(top - top)
        acc = new_v.to(tl.float32)
        for start in range(first, last, BLOCK):
            at = start + n
            ok = at < last
            if WINDOWED:
                ok = ok & (at > last - window)
            key = tl.load(keys + at[:, None] * D + d[None, :], mask=ok[:, None] & in_d[None, :], other=0.0)
            value = tl.load(values + at[:, None] * E + e[None, :], mask=ok[:, None] & in_e[None, :], other=0.0)
            scores = capped(tl.sum(key.to(tl.float32) * query[None, :], 1), cap, CAPPED)
            scores = tl.where(ok, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 0))
            weights = tl.exp(scores - higher)
            less = tl.exp(top - higher)
            total = total * less + tl.sum(weights, 0)
            acc = acc * less + tl.sum(weights[:, None] * value.to(tl.float32), 0)
            top = higher
        tl.store(out + row * out_row + head * out_head + e, (acc / total).to(out.dtype.element_ty), mask=in_e)
    else:
        g = tl.arange(0, QUERIES)
        in_g = g < GROUP
        mine = q + row * q_row + (head * GROUP + g)[:, None] * q_head + d[None, :]
        queries = tl.load(mine, mask=in_g[:, None] & in_d[None, :], other=0.0)
        tops = tl.sum(queries.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale
        tops = capped(tops, cap, CAPPED)
        totals = tl.exp(tops - tops)
        sums = tl.zeros((QUERIES, WIDE_E), dtype=tl.float32) + new_v.to(tl.float32)[None, :]
        for start in range(first, last, BLOCK):
            at = start + n
            ok = at < last
            if WINDOWED:
                ok = ok & (at > last - window)
            key = tl.load(keys + at[None, :] * D + d[:, None], mask=ok[None, :] & in_d[:, None], other=0.0)
            value = tl.load(values + at[:, None] * E + e[None, :], mask=ok[:, None] & in_e[None, :], other=0.0)
            scores2 = tl.dot(queries.to(DOT), key.to(DOT), input_precision="ieee") * scale
            scores2 = tl.where(ok[None, :], capped(scores2, cap, CAPPED), float("-inf"))
            highers = tl.maximum(tops, tl.max(scores2, 1))
            weights2 = tl.exp(scores2 - highers[:, None])
            lesses = tl.exp(tops - highers)
            totals = totals * lesses + tl.sum(weights2, 1)
            sums = sums * lesses[:, None] + tl.dot(weights2.to(DOT), value.to(DOT), input_precision="ieee")
            tops = highers
        to = out + row * out_row + (head * GROUP + g)[:, None] * out_head + e[None, :]
        found = sums / totals[:, None]
        tl.store(to, found.to(out.dtype.element_ty), mask=in_g[:, None] & in_e[None, :])


@triton.jit
def normalise(x, table, lines, out, x_row, x_each, table_row, out_row, d, eps, PLUS: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    each = tl.program_id(1)
    c = tl.arange(0, WIDE)
    ok = c < d
    value = tl.load(x + row * x_row + each * x_each + c, mask=ok, other=0.0).to(tl.float32)
    weight = tl.load(table + tl.load(lines + row) * table_row + c, mask=ok, other=0.0).to(tl.float32)
    n = value * tl.rsqrt(tl.sum(value * value, 0) / d + eps)
    if PLUS:
        y = (1 + weight) * n
    else:
        y = weight * n.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * out_row + each * d + c, y.to(out.dtype.element_ty), mask=ok)


@triton.jit
def rotate(q, k, cos, sin, q_out, k_out, q_row, q_head, k_row, k_head, heads, few, half, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    c = tl.arange(0, WIDE)
    ok = c < half
    x = q + row * q_row + head * q_head
    out = q_out + (row * heads + head) * half * 2
    if head >= heads:
        x = k + row * k_row + (head - heads) * k_head
        out = k_out + (row * few + head - heads) * half * 2
    cos += row * half * 2 + c
    sin += row * half * 2 + c
    one = tl.load(x + c, mask=ok, other=0.0).to(tl.float32)
    two = tl.load(x + half + c, mask=ok, other=0.0).to(tl.float32)
    cos_one = tl.load(cos, mask=ok, other=0.0).to(tl.float32)
    cos_two = tl.load(cos + half, mask=ok, other=0.0).to(tl.float32)
    first = one * cos_one - two * tl.load(sin, mask=ok, other=0.0).to(tl.float32)
    second = two * cos_two + one * tl.load(sin + half, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + c, first.to(out.dtype.element_ty), mask=ok)
    tl.store(out + half + c, second.to(out.dtype.element_ty), mask=ok)
