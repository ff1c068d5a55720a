"""What tenants have otherwise than the base's linears and embeddings, in tables with a line each that kernels read.

A step that takes it from here makes the same launches whoever its rows belong to, so it can be captured as a graph; a
tenant that comes or goes is a line that is written. What has no place in a line is told by `misfit`: steps with such a
tenant are computed tenant by tenant.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from bayou.attached import AttachedEmbedding, AttachedExperts, AttachedLinear
from bayou.delta import Dense, Term
from bayou.errors import BadInput
from bayou.kernels import packed_product, use_triton
from bayou.kernels.row_lookup import row_lookup
from bayou.kernels.table import PROJECTIONS, Table
from bayou.packed import FLOATS, Packed
from bayou.serving.few_bits import FewBits, base_product
from bayou.serving.resident import Resident

_SEGMENTS = (4, 16)
"""Rows of a segment at most: the kernels' tiles have as many. Few sizes, for each is compiled anew."""

_WORDS = {dtype: word for word, dtype in FLOATS.items()}


class DeltaTable:
    """The deltas of modules that share an input, and the gains of the base beside them; line 0 is the base's own.

    modules: path of each -> the module. changed: called when graphs that were captured no longer hold.
    """

    def __init__(self, modules: Mapping[str, nn.Module], lines: int, changed: Callable[[], None]) -> None:
        self.modules, self.lines, self.changed = dict(modules), lines, changed
        self.shapes = [_oriented(module).shape for module in modules.values()]
        self.deltas: Table | None = None
        first = next(iter(modules.values()))
        held = [*first.parameters(), *first.buffers()]
        self.gains = torch.ones(len(self.shapes), lines, device=next(t.device for t in held if not t.is_meta))
        self.dtype = held[0].dtype
        self.gained = False  # whether any gain is not 1

    def forget(self, line: int) -> None:
        """Let a line's deltas go. It must be written before a row uses it."""
        if self.deltas is not None:
            self.deltas.forget(line)

    def write(self, line: int, resident: Resident) -> None:
        """A line: the resident's. No row of a step may be using it."""
        found = [_terms(path, module, resident) for path, module in self.modules.items()]
        terms = [each for each, _ in found]
        if any(gain != 1 for _, gain in found) or self.gained:
            self.gains[:, line] = torch.tensor([gain for _, gain in found])
            if not self.gained:
                self.gained = True
                self.changed()
        if self.deltas is not None or any(terms):
            self._write_terms(line, terms)

    def _write_terms(self, line: int, terms: list[tuple[Term, ...]]) -> None:
        old = self.deltas
        with contextlib.suppress(BadInput):  # which says that the table was made for smaller deltas, or other formats
            if old is not None:
                old.write(line, terms, grow=False)
                return
        every: dict[int, Any] = {i: each for i, each in enumerate(old.terms if old else ()) if any(each)}
        every[line] = terms
        shapes = [(shape[0], shape[1]) for shape in self.shapes]
        table = Table(shapes, self.lines, list(every.values()), self.gains.device)
        for i, each in every.items():
            table.write(i, each)
        # It takes the old one's place when all is in it. A step that runs may still be reading the old one's memory,
        # and graphs do until they are captured anew; whoever has these keeps it.
        self.deltas = table
        self.changed()


class LinearTable(DeltaTable):
    """Linears that are given one input, one after another: all their products are made when the first is called.

    biases: a table by line for each module, or none. The weights of several nn.Linear come to lie in one piece, so that
    the base's product is one too; as parameters they stay the same objects.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        biases: Sequence[Tensor | None],
        lines: int,
        changed: Callable[[], None],
    ) -> None:
        if not 1 <= len(modules) <= PROJECTIONS:
            raise ValueError(f"{len(modules)} linears share an input: 1 to {PROJECTIONS} are expected")
        self.biases = biases
        self.products: list[Callable[[Tensor], Tensor]] = []
        if any(isinstance(module, FewBits) for module in modules.values()):
            self.products = [partial(base_product, module) for module in modules.values()]
        elif len(modules) > 1:
            weights = [_oriented(module) for module in modules.values()]
            self.weight = torch.cat([weight.data for weight in weights])
            for weight, part in zip(weights, self.weight.split([len(w) for w in weights]), strict=True):
                weight.data = part
        else:
            self.weight = _oriented(next(iter(modules.values())))
        super().__init__(modules, lines, changed)
        self._given: Tensor | None = None
        self._made: tuple[Tensor, ...] = ()

    def output(self, place: int, x: Tensor, rows: Any) -> Tensor:
        """What module number `place` makes of x (..., in): (rows, out), for the Rows of router.py."""
        if self._given is not x:
            self._given, self._made = x, self._outputs(x.reshape(-1, x.shape[-1]), rows)
        found = self._made[place]
        if place == len(self.shapes) - 1:
            self._given, self._made = None, ()
        return found

    def _outputs(self, x: Tensor, rows: Any) -> tuple[Tensor, ...]:
        if self.products:
            made = tuple(product(x) for product in self.products)
        else:
            made = functional.linear(x, self.weight).split([shape[0] for shape in self.shapes], dim=1)
        if self.gained:
            for y, gains in zip(made, self.gains, strict=True):
                y *= gains[rows.slots][:, None]
        table = self.deltas  # the loader may put a larger one in its place meanwhile
        if table is not None and rows.lines is not None:
            x = x if x.stride(1) == 1 else x.contiguous()
            scratch = table.scratch(len(x))
            packed_product.packed_product(table, x, rows.offsets, rows.lines, made, most=rows.most, scratch=scratch)
        for y, bias in zip(made, self.biases, strict=True):
            if bias is not None:
                y += bias[rows.slots]
        return made


class EmbeddingTable(DeltaTable):
    """One embedding."""

    def look_up(self, ids: Tensor, lines: Tensor) -> Tensor:
        """The rows (n, d) of ids (n,), each its line's."""
        (module,) = self.modules.values()
        weight: Tensor = module.weight  # type: ignore[assignment]
        return row_lookup(self.deltas, weight, self.gains[0], ids, lines)


def compile_ahead(tables: Sequence[DeltaTable], sizes: Sequence[tuple[int, int]]) -> None:
    """Compile the kernels that steps with these tables need; nothing to do on a CPU. sizes: see packed_product."""
    linears = [table for table in tables if isinstance(table, LinearTable) and table.deltas is not None]
    if linears and use_triton(linears[0].gains):
        found = [table.deltas for table in linears if table.deltas is not None]
        packed_product.compile_ahead(found, sizes, linears[0].dtype)
        for table in tables:
            if isinstance(table, EmbeddingTable):
                nothing = torch.zeros(8, dtype=torch.int64, device=table.gains.device)
                table.look_up(nothing, nothing)


def sizes(batch: int) -> list[tuple[int, int]]:
    """(segments, rows of the largest) of all steps with up to `batch` answers."""
    counts = [1 << i for i in range((batch - 1).bit_length() + 1)]
    return [(count, most) for count in counts for most in _SEGMENTS if most <= _SEGMENTS[0] or count >= 8]


def segments(lines: Sequence[int], count: int) -> tuple[int, list[int], list[int]]:
    """Cut rows, whose lines are given and sorted, into segments for packed_product.

    Returns (rows of the largest segment, 0 where all rows are the base's; the segments' first rows and the end; their
    lines, -1 for the base). More rows of a tenant than a tile has are several segments. count: segments to make at
    least; those that are left over are empty. With as many as there are rows there are never more.
    """
    runs: list[tuple[int, int, int]] = []  # first row, row after the last, line
    for i, line in enumerate(lines):
        if runs and runs[-1][2] == line:
            runs[-1] = runs[-1][0], i + 1, line
        else:
            runs.append((i, i + 1, line))
    largest = max((stop - start for start, stop, line in runs if line), default=0)
    most = next((size for size in _SEGMENTS if largest <= size), _SEGMENTS[-1]) if largest else 0
    starts, owners = [], []
    for start, stop, line in runs:
        for at in range(start, stop, most if line else stop - start):
            starts.append(at)
            owners.append(line or -1)
    empty = max(0, count - len(starts))
    return most, [*starts, *[len(lines)] * (empty + 1)], [*owners, *[-1] * empty]


def _oriented(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def _terms(path: str, module: nn.Module, resident: Resident) -> tuple[tuple[Term, ...], float]:
    """What a resident adds to gain * the base's weight, and that gain."""
    whole = resident.tensors.get(path, {}).get("weight")
    if whole is not None:
        whole = whole.T if isinstance(module, Conv1D) else whole
        return (Dense(Packed.floats(whole, _WORDS[whole.dtype])),), 0.0
    attached = resident.modules.get(path)
    if attached is None:
        return (), 1.0
    assert isinstance(attached, AttachedLinear | AttachedEmbedding)
    return attached.delta.terms, attached.gain


def misfit(resident: Resident, own: Mapping[str, Mapping[str, nn.Parameter]]) -> str | None:
    """What of a resident has no place in a line, for people to read; None if all has. own: the base's, by path."""
    for path, module in resident.modules.items():
        if isinstance(module, AttachedExperts):
            continue  # these are computed tenant by tenant in any case
        weight = own[path]["weight"]
        if module.base is not weight:
            return f"{path} differs from another matrix of the base"
        rows = weight.shape[isinstance(module.inner, Conv1D)]
        if module.rows != rows:
            return f"{path} has {module.rows} rows, the base's {rows}"
    for path, leaves in resident.tensors.items():
        for leaf, value in leaves.items():
            if value.shape != own[path][leaf].shape:
                return f"{path}.{leaf} is {tuple(value.shape)}, the base's {tuple(own[path][leaf].shape)}"
    return None
