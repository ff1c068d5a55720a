"""The product with one delta, x (..., in) -> (..., out): one tenant, whatever number of rows."""

import os
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bayou.kernels import use_triton
from bayou.kernels.packed_product import packed_product
from bayou.kernels.table import Table
from bayou.kernels.unpack import product

MANY = 512
"""Rows from which on unpacking, and cuBLAS on what comes of it, is the faster way."""

_tables: WeakKeyDictionary[Any, tuple[Table, dict[int, Tensor], Tensor]] = WeakKeyDictionary()


def suits(x: Tensor) -> bool:
    """Whether the kernels take this x: on a GPU, of a usual dtype, and nobody wants its gradient.

    BAYOU_PACKED=0 has plain PyTorch do it, to compare the two.
    """
    if os.environ.get("BAYOU_PACKED") == "0":
        return False
    floats = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return floats and not (x.requires_grad and torch.is_grad_enabled()) and use_triton(x)


def one_delta(delta: Any, x: Tensor, onto: Tensor | None = None) -> Tensor:
    """The product of x with a Delta of delta.py, without the reference, in x's dtype.

    onto: (..., out), contiguous, to which it is added, in place.

    The delta's table is made at the first call, and lives as long as the delta does. Calls with a number of rows that
    came before, below MANY, can be captured in a CUDA graph.
    """
    if delta not in _tables:
        table = Table([delta.shape], 1, [[delta.terms]], x.device)
        table.write(0, [delta.terms])
        _tables[delta] = table, {}, torch.zeros(1, dtype=torch.int32, device=x.device)
    table, offsets, slot = _tables[delta]
    given = x.reshape(-1, x.shape[-1])
    rows = given.shape[0]
    many = rows >= MANY and x.dtype != torch.float32
    if onto is not None:
        out = onto.view(rows, delta.shape[0])
    else:
        out = (given.new_empty if many else given.new_zeros)(rows, delta.shape[0])
    if many:
        product(table, given, [out], keep=onto is not None)
        return out.view(*x.shape[:-1], delta.shape[0])
    if rows:
        given = given if given.stride(1) == 1 else given.contiguous()
        if rows not in offsets:
            offsets[rows] = torch.tensor([0, rows], dtype=torch.int32, device=x.device)
        packed_product(table, given, offsets[rows], slot, [out], most=rows, scratch=table.scratch(rows))
    return out.view(*x.shape[:-1], delta.shape[0])
