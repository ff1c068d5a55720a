"""Keys and values of the sequences that run: a slot each, which belongs to one request and so to one tenant.

Nothing is shared between slots: equal prompts of two tenants have different keys and values, and a slot is given to the
next request with its old content out of every mask's reach.

transformers' models call the attention function that their config names; ours writes the step's keys and values into
the slots and attends to them there. A slot's keys of one head lie in one piece, as decoding reads them.
"""

from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from bayou.errors import Unsupported
from bayou.kernels.decode_attention import decode_attention
from bayou.kernels.rotary import in_place_of

NAME = "bayou_slots"
_FIRST = 256
"""Positions that slots have room for to begin with; doubled as needed."""


@dataclass(eq=False)
class Places:
    """Where the rows of a step go.

    slot, position: (rows,) int64. spans: (first row, row after the last, slot, first position) of each sequence of a
    prefill. by_slot: of a decode step instead, (slots,) the row of each slot that is read, any row for an idle one.
    filled: (slots,) the position after the last of each. reach: positions that are read, at least all of `filled`.
    With neither, a decode step of which the host need not know the slots and positions.
    """

    slot: Tensor
    position: Tensor
    spans: tuple[tuple[int, int, int, int], ...] = ()
    by_slot: Tensor | None = None
    filled: Tensor | None = None
    reach: int = 0
    masks: dict[Any, Tensor] = field(default_factory=dict)


class Slots:
    """Room for `count` sequences of at most `most` positions, made layer by layer as the first step reaches it."""

    def __init__(self, count: int, most: int) -> None:
        self.count, self.most = count, most
        self.length = min(_FIRST, most)
        self.places: Places | None = None
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that all slots take now."""
        return sum(t.nbytes for pair in self.layers.values() for t in pair)

    def reserve(self, positions: int) -> bool:
        """Make room for sequences of so many positions; whether memory had to move (what was captured is void then)."""
        if positions <= self.length:
            return False
        length = self.length
        while length < positions:
            length = min(2 * length, self.most)
        for layer, pair in self.layers.items():
            if pair[0].shape[2] < length:  # where memory ran out half way, the next try goes on from there
                self.layers[layer] = (_longer(pair[0], length), _longer(pair[1], length))
        self.length = length
        return True

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """query (1, heads, rows, d), key and value (1, fewer heads, rows, d) -> (1, rows, heads, d of value)."""
        places = self.places
        assert places is not None  # set for the step by the engine
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        k, v = key[0].transpose(0, 1), value[0].transpose(0, 1)
        if layer not in self.layers:
            self.layers[layer] = tuple(  # type: ignore[assignment]
                t.new_zeros(self.count, t.shape[1], self.length, t.shape[2]) for t in (k, v)
            )
        keys, values = self.layers[layer]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        rows = query[0].transpose(0, 1)
        if places.by_slot is None and not places.spans:
            where = places.slot, places.position
            return decode_attention(rows, k, v, keys, values, *where, scale=scale, window=window, softcap=softcap)[None]
        keys[places.slot, :, places.position] = k
        values[places.slot, :, places.position] = v
        if places.by_slot is not None:
            return self._decode(rows, keys, values, places, scale, window, softcap)[None]
        out = rows.new_empty(*rows.shape[:2], v.shape[-1])
        for start, stop, slot, first in places.spans:
            past = first + stop - start
            mask = None if first == 0 and (window is None or past <= window) else _causal(places, first, past, window)
            found = _attention(
                rows[start:stop].transpose(0, 1)[None],
                keys[slot : slot + 1, :, :past],
                values[slot : slot + 1, :, :past],
                mask,
                scale,
                softcap,
            )
            out[start:stop] = found[0].transpose(0, 1)
        return out[None]

    def _decode(
        self,
        rows: Tensor,
        keys: Tensor,
        values: Tensor,
        places: Places,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """One row a sequence: the few queries are put into the order of the slots, the keys and values stay."""
        assert places.by_slot is not None and places.filled is not None
        slots, heads = len(places.by_slot), keys.shape[1]
        if window not in places.masks:
            position = torch.arange(places.reach, device=rows.device)
            seen = position < places.filled[:, None]
            if window is not None:
                seen &= position >= places.filled[:, None] - window
            places.masks[window] = seen[:, None, None, :]
        # The queries that share a head of keys stand as if they were several positions of it.
        grouped = rows[places.by_slot].view(slots, heads, -1, rows.shape[-1])
        found = _attention(
            grouped,
            keys[:slots, :, : places.reach],
            values[:slots, :, : places.reach],
            places.masks[window],
            scale,
            softcap,
        )
        return found.reshape(slots, -1, values.shape[-1])[places.slot]


def _longer(old: Tensor, length: int) -> Tensor:
    new = old.new_zeros(*old.shape[:2], length, old.shape[3])
    new[:, :, : old.shape[2]] = old
    return new


def _causal(places: Places, first: int, past: int, window: int | None) -> Tensor:
    """(rows, past) of a sequence that goes on at `first`: what each row sees."""
    if ("causal", first, past, window) not in places.masks:
        device = places.slot.device
        row, seen = torch.arange(first, past, device=device)[:, None], torch.arange(past, device=device)
        mask = seen <= row
        places.masks["causal", first, past, window] = mask if window is None else mask & (seen > row - window)
    return places.masks["causal", first, past, window]


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """Causal without a mask. q (n, heads, rows, d), k and v (n, as many or fewer heads, positions, d)."""
    groups = q.shape[1] // k.shape[1]
    if softcap is None:
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, scale=scale, enable_gqa=groups > 1
        )
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.tanh(q @ k.transpose(-1, -2) * scale / softcap) * softcap
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface."""
    unknown = [word for word in ("s_aux", "position_bias", "head_mask") if others.get(word) is not None]
    if unknown:
        raise Unsupported(f"{type(module).__name__} needs {unknown[0]}, which serving cannot compute")
    slots = module.bayou_slots
    assert isinstance(slots, Slots)
    return slots.attend(module, query, key, value, scaling, sliding_window, softcap), None


def put_into(tree: PreTrainedModel, slots: Slots, *, kernels: bool = False) -> None:
    """Let the attention modules of a served tree keep their keys and values in `slots`.

    kernels: and turn queries and keys in one launch, in the modules of this tree only.
    """
    AttentionInterface.register(NAME, _forward)
    tree.config._attn_implementation = NAME
    turned: dict[Any, Any] = {}
    for module in tree.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.bayou_slots = slots
            if kernels:
                _turn_fast(module, turned)


def _turn_fast(module: nn.Module, known: dict[Any, Any]) -> None:
    """Give a module a forward of its own, of the same code, that calls kernels/rotary.py by the name that it knows."""
    forward = type(module).forward
    name = "apply_rotary_pos_emb"
    if not isinstance(forward, FunctionType) or name not in forward.__code__.co_names:
        return
    original = forward.__globals__.get(name)
    if original is not None:
        known.setdefault(original, in_place_of(original))
        scope = {**forward.__globals__, name: known[original]}
        own = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
        own.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(own, module)
