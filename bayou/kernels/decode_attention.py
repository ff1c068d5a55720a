"""Attention of one new row a sequence over the keys and values in its slot, which the row's own join first.

For row r with slot s and position p, of head h of the keys and each query head g of its group:

    keys[s, h, p] = k[r, h];  values[s, h, p] = v[r, h]
    out[r, g] = softmax over n of (scale * q[r, g] . keys[s, h, n]) times values[s, h, n],    n <= p, n > p - window

and, where the model caps its scores, cap * tanh(score / cap) in their place. In fp32. Lengths are read on the device:
a launch is the same whatever they are, and only what a sequence has is read.
"""

import torch
from torch import Tensor

from bayou.kernels import interpreted, use_triton


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    position: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Write k and v to their places and attend; no synchronisation on a GPU, so it can be captured.

    Args:
        q: (rows, heads, d). k: (rows, as many or fewer heads, d). v: (rows, those, e). The last axis contiguous.
        keys, values: (slots, heads of k, positions, d or e), contiguous.
        slot, position: (rows,) int64; a slot has one row, but for one whose content nobody needs.

    Returns (rows, heads, e) in q's dtype.
    """
    run = triton_version if use_triton(q) else reference
    return run(q, k, v, keys, values, slot, position, scale=scale, window=window, softcap=softcap)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    position: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The formula in plain torch and fp32."""
    keys[slot, :, position] = k
    values[slot, :, position] = v
    reach = int(position.max()) + 1
    grouped = q.float().view(*k.shape[:2], -1, q.shape[-1])
    scores = grouped @ keys[slot, :, :reach].float().transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    n = torch.arange(reach, device=q.device)
    seen = n <= position[:, None]
    if window is not None:
        seen &= n > position[:, None] - window
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    return (weights @ values[slot, :, :reach].float()).view(*q.shape[:2], -1).to(q.dtype)


def triton_version(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    position: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """A program a row and head of keys, which goes through the positions once."""
    import triton
    import triton.language as tl

    from bayou.kernels import decode_loops

    rows, heads, d = q.shape
    e = v.shape[-1]
    group = heads // k.shape[1]
    out = q.new_empty(rows, heads, e)
    exact = interpreted() or q.dtype == torch.float32
    decode_loops.attend[(rows, k.shape[1])](
        *(q, k, v, keys, values, slot, position, out),
        *(q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        *(keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)),
        *(out.stride(0), out.stride(1)),
        scale,
        0.0 if softcap is None else softcap,
        0 if window is None else window,
        D=d,
        E=e,
        WIDE_D=triton.next_power_of_2(d),
        WIDE_E=triton.next_power_of_2(e),
        GROUP=group,
        QUERIES=max(16, triton.next_power_of_2(group)),
        CAPPED=softcap is not None,
        WINDOWED=window is not None,
        BLOCK=64,
        DOT=tl.float32 if exact else tl.bfloat16 if q.dtype == torch.bfloat16 else tl.float16,
        num_warps=4,
    )
    return out
