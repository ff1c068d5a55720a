"""Root mean square normalisation in which each row has its tenant's own weight, from a table with a line a tenant.

n = x / sqrt(mean(x^2) + eps), in fp32
y = weight[line] * n, n rounded to x's dtype first        "times", as Llama, Mistral, Qwen and Phi do
y = (1 + weight[line]) * n, rounded at the end            "plus", as Gemma does
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bayou.kernels import use_triton

KINDS = ("times", "plus")


def row_norm(x: Tensor, table: Tensor, lines: Tensor, eps: float, kind: str) -> Tensor:
    """x (rows, several, d), table (lines, d), lines (rows,) int64 -> as x. No synchronisation on a GPU."""
    return (triton_version if use_triton(x) else reference)(x, table, lines, eps, kind)


def reference(x: Tensor, table: Tensor, lines: Tensor, eps: float, kind: str) -> Tensor:
    """The formula in plain torch."""
    n = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    weight = table[lines][:, None]
    return weight * n.to(x.dtype) if kind == "times" else ((1 + weight.float()) * n).to(x.dtype)


def triton_version(x: Tensor, table: Tensor, lines: Tensor, eps: float, kind: str) -> Tensor:
    """A program a vector."""
    import triton

    from bayou.kernels import decode_loops

    rows, several, d = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    out = torch.empty((rows, several, d), dtype=x.dtype, device=x.device)
    wide = triton.next_power_of_2(d)
    decode_loops.normalise[(rows, several)](
        *(x, table, lines, out, x.stride(0), x.stride(1), table.stride(0), out.stride(0), d, eps),
        PLUS=kind == "plus",
        WIDE=wide,
        num_warps=min(8, max(1, wide // 512)),
    )
    return out


def kind_of(module: nn.Module) -> tuple[str, float] | None:
    """Which of KINDS a module computes, and its eps; None for neither. Found out by trying, on the CPU in fp32."""
    eps = next((v for name in ("variance_epsilon", "eps") if isinstance(v := getattr(module, name, None), float)), None)
    weights = dict(module.named_parameters())
    if eps is None or list(weights) != ["weight"] or isinstance(module, nn.LayerNorm):
        return None
    trial: Any = copy.deepcopy(module).to("cpu", torch.float32)
    g = torch.Generator().manual_seed(0)
    d = len(trial.weight)
    table, x = torch.randn(1, d, generator=g), torch.randn(3, 1, d, generator=g) * 0.1
    with torch.no_grad():
        trial.weight.copy_(table[0])
        found = trial(x)
    line = torch.zeros(3, dtype=torch.long)
    return next(((k, eps) for k in KINDS if torch.allclose(found, reference(x, table, line, eps, k), 1e-5, 1e-6)), None)
