"""The thin modules that stand around a base model's own while a fine-tune is attached: see attach.py.

AttachedLinear      nn.Linear, Conv1D, fused qkv, a tied head      gain * base(x) + delta.apply(x)
AttachedEmbedding   nn.Embedding, scaled ones too                  gain * base[ids] + delta.lookup(ids)
AttachedExperts     modules with a 3-D parameter, one matrix       gain * base[i] + delta_i, made at each
                    an expert                                      forward, one layer at a time
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from bayou.delta import Delta
from bayou.kernels.one_delta import one_delta, suits
from bayou.skeleton import Index


class Around(nn.Module):
    """A module around `inner`, whose attributes can be asked for as if they were its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.training = inner.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


class _Attached(Around):
    """A module around one with a weight; the delta is (out, in), out possibly less than the base has rows.

    base: the reference: inner's own weight, or that of another module (of the base; of a layer that this one
    shares it with, and inner has no weight then). extra: rows that the base has not. `weight` is the
    fine-tune's, computed at each access: code that looks at a module's weight instead of calling the module
    gets a right answer, slowly.
    """

    def __init__(self, inner: nn.Module, base: Tensor, delta: Delta, extra: Tensor | None = None) -> None:
        super().__init__(inner)
        self.base = base
        self.delta = delta
        self.gain = 0.0 if delta.reference is None else delta.gain
        self.register_buffer("extra", extra, persistent=False)
        self.rows = delta.shape[0] + (0 if extra is None else extra.shape[0])

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As usual, but for `weight`: tie_weights() would set what holds, both ends having base and delta."""
        if name != "weight":
            super().register_parameter(name, param)

    @property
    def same(self) -> bool:
        """Whether the fine-tune's module is the base's."""
        own = self.base is self.inner.weight and self.extra is None and self.gain == 1
        return own and not self.delta.terms and self.rows == len(self.base)

    def reference(self) -> Tensor:
        """The part of the base's weight that the delta is added to, (out, in)."""
        return (self.base.T if isinstance(self.inner, Conv1D) else self.base)[: self.delta.shape[0]]

    @property
    def weight(self) -> nn.Parameter:
        """The fine-tune's weight, oriented as inner's."""
        rows = self.delta.restore(self.reference() if self.gain else None, self.base.dtype)
        rows = rows if self.extra is None else torch.cat([rows, self.extra])
        return nn.Parameter(rows.T if isinstance(self.inner, Conv1D) else rows, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Attached":
        super()._apply(fn, recurse)
        if self.delta.device != self.base.device:
            self.delta = self.delta.to(self.base.device)
        return self


class AttachedLinear(_Attached):
    """x -> gain * x @ base.T + delta.apply(x) + bias, with an output for each extra row."""

    @property
    def out_features(self) -> int:
        """Outputs, those of the extra rows among them."""
        return self.rows

    @property
    def aligned(self) -> bool:
        """Whether gain * inner's product + the delta's is all there is, but for the bias."""
        outputs = self.base.shape[1 if isinstance(self.inner, Conv1D) else 0]
        return self.base is self.inner.weight and self.extra is None and self.rows == outputs

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        if self.gain == 1 and self.aligned:
            y: Tensor = self.inner(x)
            alike = y.is_contiguous() and y.dtype == x.dtype and not y.requires_grad
            if alike and type(self.delta) is Delta and self.delta.terms and suits(x):
                return one_delta(self.delta, x, onto=y)
            return y + self.delta.apply(x)
        bias: Tensor | None = getattr(self.inner, "bias", None)
        return self.product(x) if bias is None else self.product(x) + bias

    def product(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), without the bias."""
        y = self.delta.apply(x)
        if self.gain:
            y = y + self.gain * functional.linear(x, self.reference())
        return y if self.extra is None else torch.cat([y, functional.linear(x, self.extra)], dim=-1)


class AttachedEmbedding(_Attached):
    """ids -> gain * base[ids] + delta.lookup(ids), or an extra row; then scaled if inner scales (Gemma)."""

    @property
    def num_embeddings(self) -> int:
        """Rows, the extra ones among them."""
        return self.rows

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., d)."""
        count = self.delta.shape[0]
        known = ids if self.extra is None else ids.clamp(max=count - 1)
        rows = self.delta.lookup(known)
        if self.gain:
            rows = rows + self.gain * functional.embedding(known, self.base).float()
        rows = rows.to(self.base.dtype)
        if self.extra is not None:
            rows = torch.where((ids < count)[..., None], rows, self.extra[(ids - count).clamp(min=0)])
        return as_inner(self.inner, rows, ids)


def as_inner(inner: nn.Module, rows: Tensor, ids: Tensor) -> Tensor:
    """What an embedding module makes of ids (...) whose rows of its table are `rows` (..., d): some scale them."""
    if type(inner).forward is nn.Embedding.forward:
        return rows
    # Inner's own forward on a table of just these rows, and of the row that its padding_idx needs.
    table = rows.reshape(-1, rows.shape[-1])
    padding: int = getattr(inner, "padding_idx", None) or 0
    short = max(0, padding + 1 - table.shape[0])
    table = functional.pad(table, (0, 0, 0, short))
    order = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    return functional_call(inner, {"weight": table}, (order,))


@dataclass(frozen=True)
class Change:
    """What the fine-tune has in place of one matrix of a larger parameter, or of a parameter of any kind.

    index: its place there. base, base_index: the reference, a parameter of the base and its part. value: a
    delta from it, or the tensor itself. shape: on disk. transposed: the delta is (out, in), the disk's is
    not. An index that is None is the whole.
    """

    index: Index | None
    base: Tensor
    base_index: Index | None
    value: Delta | Tensor
    shape: tuple[int, ...]
    transposed: bool

    def restore(self) -> Tensor:
        """The fine-tune's tensor, in the base's dtype, summed in fp64 and rounded once."""
        if isinstance(self.value, Tensor):
            return self.value.to(self.base.device, self.base.dtype)
        reference = None
        if self.value.reference is not None:
            reference = self.base if self.base_index is None else self.base[self.base_index]
            reference = reference[: self.shape[0]]
            reference = reference.T if self.transposed else reference.reshape(self.value.shape)
        made = self.value.restore(reference, self.base.dtype)
        return made.T if self.transposed else made.reshape(self.shape)


def merged(whole: Tensor, changes: list[Change]) -> Tensor:
    """A copy of the parameter `whole` with the fine-tune's parts in it."""
    made = whole.detach().clone()
    for change in changes:
        made[... if change.index is None else change.index] = change.restore()
    return made


class AttachedExperts(Around):
    """A module whose parameters are made of the base's and of deltas at each forward, and then freed.

    Right for every experts module, whatever it does with its 3-D parameters, and for every back end; the
    parameters of one layer at a time are held twice. changes: parameter name -> the parts of it that differ.
    These parameters are the fine-tune's to whoever asks for them, made at each access.
    """

    def __init__(self, inner: nn.Module, changes: Mapping[str, list[Change]]) -> None:
        super().__init__(inner)
        self.changes = dict(changes)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        changes = self.__dict__.get("changes", {})
        return merged(value, changes[name]) if name in changes else value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the inner module's, with the fine-tune's parameters."""
        current = {leaf: merged(getattr(self.inner, leaf), parts) for leaf, parts in self.changes.items()}
        return functional_call(self.inner, current, args, kwargs)
