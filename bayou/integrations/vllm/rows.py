"""Which row of a step of vLLM belongs to which slot, and the hooks that compute each row as its tenant's model does.

vLLM's own modules stay where they are: a hook behind each adds, to the rows of a slot, what its tenant has otherwise.

    RowLinear      linears, merged ones too, and the head      gain * y + x @ delta.T for each of its projections
    RowEmbedding   the input table                             gain * row + the delta's row
    RowNorm        normalisations                              once more for rows of tenants, with their own weights

Rows of the base itself stay what vLLM has computed. On a GPU (but for BAYOU_PACKED=0) a few launches serve all slots of
a linear's projections, for rows that are sorted by slot; else each slot's rows are multiplied by themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bayou.delta import Delta
from bayou.errors import BadInput
from bayou.kernels.packed_product import packed_product
from bayou.kernels.table import Table

Where = slice | Tensor


@dataclass(frozen=True)
class Cut:
    """Columns start to stop of a layer's output: rows first, first + 1, ... of a matrix of `rows`. With tensor
    parallelism each process has others of them.
    """

    start: int
    stop: int
    first: int
    rows: int

    @property
    def mine(self) -> slice:
        """The rows of the matrix."""
        return slice(self.first, self.first + self.stop - self.start)

    @property
    def all(self) -> bool:
        """Whether these are all rows."""
        return self.stop - self.start == self.rows


@dataclass(frozen=True, eq=False)
class Part:
    """What a tenant has otherwise in one projection: gain * the base's + the delta's, or a weight of its own.

    delta: of all rows of the matrix; whole and bias, of this process's. bias: what is added to the base's.
    """

    delta: Delta | None = None
    gain: float = 1.0
    whole: Tensor | None = None
    bias: Tensor | None = None

    @property
    def only_adds(self) -> bool:
        """Whether the product with the delta is all but a bias, so that a kernel may add it."""
        return self.delta is not None and self.gain == 1 and self.whole is None

    def changed(self, x: Tensor, y: Tensor, bias: Tensor | None, mine: slice = slice(None)) -> Tensor:
        """The tenant's output for inputs x (rows, in), of which the base's is y (rows, out), `bias` in it."""
        if self.whole is not None:
            y = functional.linear(x, self.whole).to(y.dtype)
            y = y if bias is None else y + bias
        elif self.gain != 1:
            y = y * self.gain if bias is None else (y - bias) * self.gain + bias
        if self.delta is not None and self.delta.terms:
            y = y + self.delta.apply(x)[:, mine].to(y.dtype)
        return y if self.bias is None else y + self.bias

    def row(self, ids: Tensor, y: Tensor) -> Tensor:
        """The tenant's rows for ids (rows,), of which the base's are y (rows, d)."""
        if self.whole is not None:
            return functional.embedding(ids, self.whole).to(y.dtype)
        return y if self.delta is None else (self.gain * y.float() + self.delta.lookup(ids)).to(y.dtype)


class Rows:
    """The rows of one step.

    slots: (rows,) each row's slot, -1 for the base's. parts: (slot, its rows) of every slot that has any.
    """

    def __init__(self, slots: Sequence[int] | np.ndarray, device: torch.device) -> None:
        self.slots = np.asarray(slots, dtype=np.int64)
        self.device = device
        self.count = len(self.slots)
        self.parts = tuple((int(slot), self._where(self.slots == slot)) for slot in np.unique(self.slots) if slot >= 0)

    def _where(self, mask: np.ndarray) -> Where:
        found = np.flatnonzero(mask)
        if found[-1] - found[0] + 1 == len(found):
            return slice(int(found[0]), int(found[-1]) + 1)
        return torch.from_numpy(found).to(self.device)

    def from_row(self, first: int, count: int) -> "Rows":
        """The rows first, first + 1, ... of these."""
        return Rows(self.slots[first : first + count], self.device)

    @cached_property
    def owned(self) -> tuple[Where, Tensor]:
        """All rows that are not the base's, and their slots."""
        mine = self.slots >= 0
        return self._where(mine), torch.from_numpy(self.slots[mine]).to(self.device)

    @cached_property
    def sorted(self) -> tuple[Tensor | None, Tensor, Tensor, int]:
        """For kernels: the order that sorts the rows by slot (None: they are), the segments' bounds, their slots, and
        the rows of the largest.
        """
        order = np.argsort(self.slots, kind="stable")
        lines, starts = np.unique(self.slots[order], return_index=True)
        bounds = np.append(starts, self.count)
        plain = bool((order == np.arange(self.count)).all())
        placed = [torch.from_numpy(a.astype(np.int32)).to(self.device) for a in (bounds, lines)]
        moved = None if plain else torch.from_numpy(order).to(self.device)
        return moved, placed[0], placed[1], int(np.diff(bounds).max())


class Routing:
    """What the hooks of a model know of the step: whose rows its tokens are, and those that scores are wanted for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.hidden: Tensor | None = None
        self.probing = 0
        self.called: set[str] = set()
        self.set((), ())

    def set(self, tokens: Sequence[int], kept: Sequence[int]) -> None:
        """Begin a step. tokens, kept: the slots of its rows, and of the rows that the head is given."""
        self.tokens, self.kept = Rows(tokens, self.device), Rows(kept, self.device)
        self.hidden = None

    def of_tokens(self, path: str, count: int) -> Rows:
        """Whose rows the module `path` is given, `count` in all; while a probe runs with `probing` rows, that it is."""
        if count == self.probing:
            self.called.add(path)
        if count < self.tokens.count:  # vLLM may fill up a step with rows that are nobody's, but never leaves any out
            raise RuntimeError(f"bayou: {path} is given {count} rows of the {self.tokens.count} of the step")
        return self.tokens

    def heard(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the whole model: its output is what vLLM takes rows of for the head."""
        self.hidden = output[0] if isinstance(output, tuple) else output

    def of_head(self, x: Tensor) -> Rows:
        """Whose rows the head is given: those that were asked for, or a run of the step's tokens as they lie there,
        which is what vLLM takes for the scores of a prompt's own tokens.
        """
        hidden = self.hidden
        if hidden is not None and x.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr():
            first = (x.storage_offset() - hidden.storage_offset()) // hidden.stride(0)
            return self.tokens.from_row(first, len(x))
        if self.kept.parts and len(x) != self.kept.count:
            raise RuntimeError(f"bayou: vLLM wants {len(x)} rows of scores where {self.kept.count} were announced")
        return self.kept


class RowLinear:
    """The hook of a linear layer or of a head.

    cuts: of each projection. lines: slots. kernels: multiply by the deltas of all slots at once. gather: makes the
    whole input of what this process is given of it (None: it is given all).
    """

    def __init__(
        self,
        routing: Routing,
        path: str,
        module: nn.Module,
        cuts: Sequence[Cut],
        lines: int,
        kernels: bool,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.routing, self.path, self.module, self.gather = routing, path, module, gather
        self.cuts, self.lines, self.kernels = tuple(cuts), lines, kernels
        self.own: dict[int, tuple[Part | None, ...]] = {}
        self.table: Table | None = None

    def write(self, slot: int, parts: tuple[Part | None, ...] | None) -> None:
        """Give the slot to a tenant; None: to one whose layer is the base's."""
        self.own.pop(slot, None)
        if parts is not None:
            self.own[slot] = parts
        if self.kernels:
            self._write_table(slot)

    def _terms(self, slot: int) -> list[tuple[Any, ...]]:
        parts = self.own.get(slot) or (None,) * len(self.cuts)
        return [part.delta.terms if part is not None and part.only_adds and part.delta else () for part in parts]

    def _write_table(self, slot: int) -> None:
        terms = self._terms(slot)
        if self.table is not None:
            try:
                self.table.write(slot, terms)
                return
            except BadInput:  # it was made for smaller deltas
                pass
        elif not any(terms):
            return
        every = {line: found for line in self.own if any(found := self._terms(line))}
        deltas = (part.delta for parts in self.own.values() for part in parts if part is not None)
        features = next(delta.shape[1] for delta in deltas if delta is not None)
        shapes = [(cut.rows, features) for cut in self.cuts]
        self.table = Table(shapes, self.lines, list(every.values()), self.routing.device)
        for line, found in every.items():
            self.table.write(line, found)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Change the output of the layer in place."""
        y = output[0] if isinstance(output, tuple) else output
        self.add(args[0], y, self.routing.of_tokens(self.path, y.numel() // y.shape[-1]))

    def add(self, x: Tensor, y: Tensor, rows: Rows) -> None:
        """Make of the base's y (..., out) for x (..., in) each row's own."""
        parts = [(slot, where) for slot, where in rows.parts if slot in self.own]
        if not parts:
            return
        x = x if self.gather is None else self.gather(x)
        x, y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        table = self.table if self.kernels else None
        if table is not None:
            self._add_all(table, x[: rows.count], y[: rows.count], rows)
        bias: Tensor | None = getattr(self.module, "bias", None)
        bias = None if getattr(self.module, "skip_bias_add", False) else bias
        for slot, where in parts:
            for cut, part in zip(self.cuts, self.own[slot], strict=True):
                added = table is not None and part is not None and part.only_adds
                if part is None or (added and part.bias is None):
                    continue
                columns = slice(cut.start, cut.stop)
                left = Part(bias=part.bias) if added else part
                base = None if bias is None else bias[columns]
                y[where, columns] = left.changed(x[where], y[where, columns], base, cut.mine)

    def _add_all(self, table: Table, x: Tensor, y: Tensor, rows: Rows) -> None:
        order, bounds, lines, most = rows.sorted
        given = x if order is None else x[order]
        given = given if given.stride(-1) == 1 else given.contiguous()
        columns = [y[:, cut.start : cut.stop] for cut in self.cuts]
        outs = [
            each if order is None and cut.all else y.new_zeros(len(y), cut.rows)
            for cut, each in zip(self.cuts, columns, strict=True)
        ]
        packed_product(table, given, bounds, lines, outs, most=most, scratch=table.scratch(rows.count))
        for cut, each, made in zip(self.cuts, columns, outs, strict=True):
            if order is not None:
                each.index_add_(0, order, made[:, cut.mine])
            elif not cut.all:
                each += made[:, cut.mine]


class RowEmbedding:
    """The hook of the input embedding."""

    def __init__(self, routing: Routing, path: str) -> None:
        self.routing, self.path = routing, path
        self.own: dict[int, Part] = {}

    def write(self, slot: int, parts: tuple[Part | None, ...] | None) -> None:
        """Give the slot to a tenant; None: to one whose table is the base's."""
        self.own.pop(slot, None)
        if parts is not None and parts[0] is not None:
            self.own[slot] = parts[0]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Change the rows of the output in place."""
        ids, y = args[0].reshape(-1), output.view(-1, output.shape[-1])
        for slot, where in self.routing.of_tokens(self.path, len(y)).parts:
            if slot in self.own:
                y[where] = self.own[slot].row(ids[where].long(), y[where])


class RowNorm:
    """The hook of a normalisation over the last axis, whose rows are the first axis."""

    def __init__(self, routing: Routing, path: str, module: nn.Module, lines: int) -> None:
        self.routing, self.path = routing, path
        self.base = {leaf: p.detach() for leaf, p in module.named_parameters(recurse=False)}
        self.own: dict[int, dict[str, Tensor]] = {}
        # The formula is known of this class alone; others compute each slot's rows themselves.
        plain = type(module).__name__ == "RMSNorm" and getattr(module, "variance_size_override", None) is None
        self.weights = self.base["weight"].expand(lines, -1).clone() if plain else None
        self.inside = False

    def write(self, slot: int, values: dict[str, Tensor] | None) -> None:
        """Give the slot to a tenant; None: to one whose layer is the base's."""
        self.own.pop(slot, None)
        if values is not None:
            self.own[slot] = values
        if self.weights is not None:
            self.weights[slot] = (values or {}).get("weight", self.base["weight"])

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Change the rows of the output in place. Where a residual is added first, it is in the output, added."""
        if self.inside:
            return
        y, source = (output[0], output[1]) if isinstance(output, tuple) else (output, args[0])
        rows = self.routing.of_tokens(self.path, len(y))
        parts = [(slot, where) for slot, where in rows.parts if slot in self.own]
        if not parts:
            return
        if self.weights is not None:
            where, slots = rows.owned
            weight = self.weights[slots]
            weight = weight.view(len(weight), *(1,) * (y.ndim - 2), weight.shape[-1])
            x = source[where].float()
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
            y[where] = (x.to(weight.dtype) * weight).to(y.dtype)
            return
        self.inside = True
        try:
            for slot, where in parts:
                y[where] = functional_call(module, self.own[slot], (source[where],))
        finally:
            self.inside = False
