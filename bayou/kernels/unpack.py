"""Packed matrices of a table's records as plain 16-bit ones, for products of so many rows that cuBLAS is faster.

    out[row, column] = gain * output_scale[row] * input_scale[column] * scale * (code - zero)

in fp32, rounded once; the plain version is Packed.unpack, the Triton one in entries.py. One launch for all records of a
slot: those of "shrink" make V (ranks, in), those of "expand" U (out, ranks), that of "dense" the term (out, in).
"""

from torch import Tensor

from bayou.kernels.table import FIELDS, Table

TALL, WIDE = 32, 128
EVEN = 64
"""Ranks are made a multiple of this, by zeros: cuBLAS is several times slower on odd numbers of them."""


def unpack(table: Table, stage: str, record: int, count: int, out: Tensor) -> None:
    """Unpack `count` records of slot 0 from `record` on into `out`, at the places that the records name."""
    from bayou.kernels import entries

    records, _ = table.lists[stage]
    grid = (-(-out.shape[1] // WIDE), -(-out.shape[0] // TALL), count)
    entries.whole[grid](records[0, record:], out, out.stride(0), UP=stage == "expand", FIELDS=FIELDS, M=TALL, K=WIDE)


def product(table: Table, x: Tensor) -> Tensor:
    """x (rows, in) bf16 or fp16 -> the product with the only projection of slot 0 (rows, out), in x's dtype."""
    (out_features, in_features), ranks = table.shapes[0], table.packed_ranks
    even = -(-ranks // EVEN) * EVEN
    y = None
    if ranks:
        v, u = x.new_empty(even, in_features), x.new_empty(out_features, even)
        v[ranks:], u[:, ranks:] = 0, 0
        unpack(table, "shrink", 0, table.lists["shrink"][0].shape[1], v)
        unpack(table, "expand", 0, table.lists["expand"][0].shape[1], u)
        y = (x @ v.T) @ u.T
    for record in range(table.lists["dense"][0].shape[1]):
        whole = x.new_empty(out_features, in_features)
        unpack(table, "dense", record, 1, whole)
        y = x @ whole.T if y is None else y.addmm_(x, whole.T)
    return x.new_zeros(x.shape[0], out_features) if y is None else y
