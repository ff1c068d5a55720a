"""Rows of many tenants' embeddings, each tenant's a packed delta over the base's table.

    out[r] = gain[line] * base[id] + sum of the terms' row `id`,    id = ids[r], line = lines[r]

in fp32, rounded once. A LowRank's row is u[id] @ v. On a GPU one launch writes u[id], unpacked, a second one sums; they
are in entries.py. Table's records name u by "expand" and v by "shrink", as for a product.
"""

import torch
from torch import Tensor

from bayou.kernels import use_triton
from bayou.kernels.table import FIELDS, Table


def row_lookup(table: Table | None, base: Tensor, gains: Tensor, ids: Tensor, lines: Tensor) -> Tensor:
    """The rows (n, d) in base's dtype.

    Args:
        table: the deltas, one projection of (rows of base, d); None while no tenant has any.
        base: (rows, d). gains: (lines,) fp32. ids, lines: (n,) int64; ids that base lacks are not allowed.
    """
    return (triton_version if use_triton(base) else reference)(table, base, gains, ids, lines)


def reference(table: Table | None, base: Tensor, gains: Tensor, ids: Tensor, lines: Tensor) -> Tensor:
    """The formula in plain torch."""
    out = gains[lines][:, None] * base[ids].float()
    for line in lines.unique().tolist() if table is not None else ():
        mine = lines == line
        for term in table.terms[line][0] if table is not None else ():
            out[mine] += term.rows(ids[mine]).float()
    return out.to(base.dtype)


def triton_version(table: Table | None, base: Tensor, gains: Tensor, ids: Tensor, lines: Tensor) -> Tensor:
    """As above, in one launch or two."""
    from bayou.kernels import entries

    rows, d = len(ids), base.shape[1]
    out = torch.empty(rows, d, dtype=base.dtype, device=base.device)
    ranks = torch.empty(rows, table.ranks if table else 0, dtype=torch.float32, device=base.device)
    lists = {"shrink": (ids, ids), "dense": (ids, ids)} if table is None else table.lists
    if table is not None and table.ranks:
        records, bounds = table.lists["expand"]
        grid = rows, records.shape[1]
        entries.row_of_u[grid](
            *(records, bounds, ids, lines, ranks, ranks.stride(0), records.shape[1]), FIELDS=FIELDS, K=128, num_warps=1
        )
    (v, v_bounds), (dense, dense_bounds) = lists["shrink"], lists["dense"]
    entries.row_of_sum[(rows, -(-d // 128))](
        *(v, v_bounds, v.shape[-2] if table else 0, dense, dense_bounds, dense.shape[-2] if table else 0),
        *(base, base.stride(0), gains, ids, lines, ranks, ranks.stride(0), out, out.stride(0), d),
        DELTAS=table is not None,
        FIELDS=FIELDS,
        TALL=16,
        K=128,
        num_warps=4,
    )
    return out
