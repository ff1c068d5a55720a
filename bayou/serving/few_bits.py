"""The base's linears in 4 bits, by PyTorch's own product of 16-bit rows with 4-bit weights; deltas stay as they are.

    y = x @ W.T + bias,    W = scale * (code - zero), rounded to nearest in groups of columns (quantize.nearest)

Only base(x) + delta(x) is ever needed, so a delta made against the 16-bit base runs over it unchanged; what that costs
is measured by bench/quantised_base.py. Embeddings, head and experts keep 16 bits.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bayou import skeleton
from bayou.errors import BadInput
from bayou.packed import Spec
from bayou.quantize import grid, spread

_GROUPS = (64, 32)
"""Columns that share a scale; the product takes these, and the first that divides a matrix's is taken."""


class FewBits(nn.Linear):
    """In the place of a linear: `weight` says its shape and holds nothing (it is on the meta device).

    Raises BadInput for a dtype that the device's product does not take.
    """

    computes_linear = True

    def __init__(self, inner: nn.Linear, group: int) -> None:
        super().__init__(inner.in_features, inner.out_features, bias=False, device="meta", dtype=inner.weight.dtype)
        self.weight.requires_grad_(False)
        self.bias = inner.bias
        self.group = group
        self.training = inner.training
        weight = inner.weight.detach()
        if weight.is_cuda and weight.dtype != torch.bfloat16:
            raise BadInput(f"a base in 4 bits computes in bfloat16 on a GPU, not in {weight.dtype}")
        spec = Spec.parse(f"4g{group}z")
        scale, zero = grid(weight.float(), spec)
        codes = spread(scale, zero, spec, weight.shape[1]).round(weight.float())[0].to(torch.uint8)
        both = torch.stack([scale, scale * (8 - zero)], -1).transpose(0, 1).contiguous()
        self.register_buffer("scales", both.to(weight.dtype), persistent=False)
        self.register_buffer("codes", _laid(codes), persistent=False)

    def product(self, x: Tensor) -> Tensor:
        """x (rows, in) -> (rows, out), without the bias."""
        run = torch.ops.aten._weight_int4pack_mm if x.is_cuda else torch.ops.aten._weight_int4pack_mm_for_cpu
        found: Tensor = run(x.contiguous(), self.codes, self.group, self.scales)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y = self.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def base_product(module: nn.Module, x: Tensor) -> Tensor:
    """x (rows, in) -> (rows, out) of a linear of the base, without its bias."""
    if isinstance(module, FewBits):
        return module.product(x)
    weight: Tensor = module.weight  # type: ignore[assignment]
    return functional.linear(x, weight.T if isinstance(module, Conv1D) else weight)


def _laid(codes: Tensor) -> Tensor:
    """uint8 codes (out, in) as the device's product reads them."""
    if not codes.is_cuda:
        made: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        return made
    inner = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0)
    made = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], inner)
    return made


def shrink(model: PreTrainedModel) -> int:
    """Put FewBits in the place of the decoder layers' linears; returns how many. Odd shapes stay as they are."""
    done = 0
    prefix, _ = skeleton.decoder_layers(model)
    for path, module in list(model.named_modules()):
        if not (path.startswith(f"{prefix}.") and type(module) is nn.Linear):
            continue
        group = next((g for g in _GROUPS if module.in_features % g == 0 and module.out_features % 16 == 0), None)
        if group is not None:
            model.set_submodule(path, FewBits(module, group))
            done += 1
    return done
