"""Packed matrices of a table's records as plain 16-bit ones, for products of so many rows that cuBLAS is faster.

    out[row, column] = gain * output_scale[row] * input_scale[column] * scale * (code - zero)

in fp32, rounded once; the plain version is Packed.unpack, the Triton one in entries.py. One launch for all records of
"shrink", which make V (ranks, in) of all projections, for those of "expand" that make one projection's U (out, ranks),
and for one of "dense", a term (out, in).
"""

from collections.abc import Sequence

from torch import Tensor

from bayou.kernels.table import EVEN, FIELDS, Table

TALL, WIDE = 32, 128


def unpack(table: Table, stage: str, first: int, last: int, out: Tensor, before: int = 0) -> None:
    """Unpack the records first:last of slot 0 into `out`, at the places that they name, less `before`."""
    from bayou.kernels import entries

    records, _ = table.lists[stage]
    grid = (-(-out.shape[1] // WIDE), -(-out.shape[0] // TALL), last - first)
    entries.whole[grid](
        records[0, first:], out, out.stride(0), before, UP=stage == "expand", FIELDS=FIELDS, M=TALL, K=WIDE
    )


def product(table: Table, x: Tensor, outs: Sequence[Tensor], keep: bool = True) -> None:
    """Add x (rows, in), bf16 or fp16, times the deltas of slot 0 to `outs`, (rows, out) a projection, in x's dtype.

    keep: whether something is in `outs` already; else it is overwritten.
    """
    found = table.host[0]
    assert found is not None  # slot 0 has been written
    total = -(-found.spans[-1][1] // EVEN) * EVEN
    t = None
    if total:
        v = x.new_empty(total, x.shape[1])
        for (_, end), (following, _) in zip(found.spans, [*found.spans[1:], (total, total)], strict=True):
            v[end:following] = 0
        unpack(table, "shrink", 0, found.bounds["shrink"][-1], v)
        t = x @ v.T
    for p, (out, (begin, end)) in enumerate(zip(outs, found.spans, strict=True)):
        beta = float(keep)
        if end > begin:
            assert t is not None
            even = -(-end // EVEN) * EVEN
            u = x.new_empty(out.shape[1], even - begin)
            u[:, end - begin :] = 0
            first, last = found.bounds["expand"][p : p + 2]
            unpack(table, "expand", first, last, u, begin)
            out.addmm_(t[:, begin:even], u.T, beta=beta)
            beta = 1.0
        for record in range(*found.bounds["dense"][p : p + 2]):
            whole = x.new_empty(out.shape[1], x.shape[1])
            unpack(table, "dense", record, record + 1, whole)
            out.addmm_(x, whole.T, beta=beta)
            beta = 1.0
        if not beta:
            out.zero_()
