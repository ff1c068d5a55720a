"""Which row of a step belongs to which tenant, and the modules that compute each row as its tenant does.

A step's rows lie sorted by tenant, in segments. The routed modules stand in a copy of the base's module tree, around
the same parameters:

    RoutedLinear     one product with the base's weight for all rows, and each segment's delta.apply on its rows
    RoutedEmbedding  a look-up by segment
    RoutedNorm       one pass with each row's own weight and bias, gathered from a table with a line a resident
    RoutedModule     whatever else has parameters (experts, a gate), a segment at a time

On a GPU the first three take what they need of all tenants from tables, in the same few launches whoever they are.

Rows of the base itself are computed with the base's own modules, as if there were no tenants.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bayou.attached import Around, AttachedLinear, as_inner
from bayou.errors import Unsupported
from bayou.kernels.row_norm import kind_of, row_norm
from bayou.kernels.table import PROJECTIONS
from bayou.serving.few_bits import base_product
from bayou.serving.resident import Resident
from bayou.serving.tables import DeltaTable, EmbeddingTable, LinearTable, compile_ahead, misfit
from bayou.skeleton import is_linear


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows that a module is given in one step, sorted by tenant.

    segments: (first row, row after the last, tenant or None for the base); empty in a step that is the same whoever its
    tenants are. slots: (rows,) each row's line in the tables. tables: whether linears, embeddings and norms compute all
    rows at once, by their lines. For kernels then, offsets: (segments + 1,) int32 the segments' first rows and the end,
    lines: (segments,) int32 their lines, -1 for the base; None where all rows are the base's. most: no segment has more
    rows.
    """

    segments: tuple[tuple[int, int, Resident | None], ...]
    slots: Tensor
    tables: bool = False
    offsets: Tensor | None = None
    lines: Tensor | None = None
    most: int = 0

    @property
    def count(self) -> int:
        """All rows."""
        return len(self.slots)

    def own(self, path: str) -> Iterator[tuple[int, int, nn.Module | None, dict[str, Tensor] | None]]:
        """(start, stop, attached module, own parameters) of each segment, both None where the base's do."""
        for start, stop, resident in self.segments:
            if resident is None:
                yield start, stop, None, None
            else:
                yield start, stop, resident.modules.get(path), resident.tensors.get(path)


_NOBODY = Rows(((0, 0, None),), torch.zeros(0, dtype=torch.long))


@dataclass(eq=False)
class Router:
    """Lets the modules of a served tree know the rows of the step; `rows` of all tokens, `kept` of the head's.

    lines: of the tables. kernels: whether there are tables of deltas. version: changes when a step that was captured no
    longer holds; compiled: the one whose kernels are, for products of the `sizes` (segments, most). apart: line -> why
    the tenant there has no place in tables. own: the base's parameters by path; a step may swap a module's meanwhile.
    """

    lines: int = 1
    kernels: bool = False
    rows: Rows = _NOBODY
    kept: Rows = _NOBODY
    probing: int = 0
    modules: dict[str, "Routed"] = field(default_factory=dict)
    called: list[tuple["RoutedLinear", Tensor]] = field(default_factory=list)
    own: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)
    tables: list[DeltaTable] = field(default_factory=list)
    version: int = 0
    compiled: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    apart: dict[int, str] = field(default_factory=dict)

    @property
    def alone(self) -> list[str]:
        """Modules that are computed tenant by tenant in any step."""
        return [path for path, module in self.modules.items() if isinstance(module, RoutedModule)]

    @contextmanager
    def step(self, rows: Rows, kept: Rows) -> Iterator[None]:
        """While a step with these rows runs."""
        self.rows, self.kept = rows, kept
        try:
            yield
        finally:
            self.rows = self.kept = _NOBODY

    @contextmanager
    def probe(self, rows: Rows) -> Iterator[None]:
        """While a first step runs, in which modules find out along which axis rows lie, and who shares an input."""
        self.probing = rows.count
        try:
            with self.step(rows, rows):
                yield
            if self.kernels:
                self._make_tables()
        finally:
            self.probing = 0
            self.called.clear()

    @torch.inference_mode(False)  # other threads write to them
    def _make_tables(self) -> None:
        groups: list[list[RoutedLinear]] = []
        last = None
        for module, x in self.called:
            alike = last is x and type(module.inner) is type(groups[-1][-1].inner) and not module.head
            if alike and isinstance(module.inner, nn.Linear) and len(groups[-1]) < PROJECTIONS:
                groups[-1].append(module)
            else:
                groups.append([module])
            last = x
        for group in groups:
            biases = [module.table.get("bias") for module in group]
            table = LinearTable({m.path: m.inner for m in group}, biases, self.lines, self.outdate)
            for place, linear in enumerate(group):
                linear.deltas, linear.place = table, place
            self.tables.append(table)
        for path, routed in self.modules.items():
            if isinstance(routed, RoutedEmbedding):
                routed.deltas = EmbeddingTable({path: routed.inner}, self.lines, self.outdate)
                self.tables.append(routed.deltas)

    def outdate(self) -> None:
        """What was captured no longer holds."""
        self.version += 1

    def install(self, resident: Resident) -> None:
        """Write a resident into its line of the tables. No row of a step may be using the line."""
        why = misfit(resident, self.own) if self.kernels else None
        for path, module in self.modules.items():
            module.write(resident.slot, resident.tensors.get(path, {}))
        if why:
            self.apart[resident.slot] = why
            return
        for table in self.tables:
            table.write(resident.slot, resident)
        if self.compiled != self.version:  # here, where nobody's step waits for it
            self.compiled = self.version
            compile_ahead(self.tables, self.sizes)

    def clear(self, line: int) -> None:
        """Let go of the deltas in a line of the tables. The device is not told: nobody's rows are there any more."""
        self.apart.pop(line, None)
        for table in self.tables:
            table.forget(line)


class Routed(Around):
    """A module of the base in a served tree; `path` is its own there."""

    def __init__(self, inner: nn.Module, router: Router, path: str, head: bool = False) -> None:
        super().__init__(inner)
        self.router, self.path, self.head = router, path, head
        self.table: dict[str, Tensor] = {}

    @property
    def rows(self) -> Rows:
        """The rows of its input."""
        return self.router.kept if self.head else self.router.rows

    def make_table(self, leaves: list[str], lines: int) -> None:
        """Lines of these parameters, (lines, n), all of them the base's to begin with."""
        for leaf in leaves:
            own = getattr(self.inner, leaf)
            if own is not None:
                self.table[leaf] = own.detach().expand(lines, -1).clone()

    def write(self, line: int, values: dict[str, Tensor]) -> None:
        """A line of the table: `values`, the base's where there are none."""
        for leaf, table in self.table.items():  # line 0, not inner's own: a step that runs now swaps those for a moment
            table[line] = values.get(leaf, table[0])


def _axis(tensor: Tensor, rows: int, path: str) -> int:
    found = [axis for axis, size in enumerate(tensor.shape) if size == rows]
    if len(found) != 1:
        raise Unsupported(
            f"{path} takes or gives {tuple(tensor.shape)}, of which no axis or several are the {rows} rows"
        )
    return found[0] - tensor.ndim


class RoutedLinear(Routed):
    """nn.Linear or Conv1D; of the head, tokens that a row's tenant lacks have the score -inf."""

    deltas: LinearTable | None = None
    place = 0

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), with as many rows in all as the step has."""
        rows = self.rows
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) != rows.count:
            raise Unsupported(f"{self.path} is given {len(flat)} rows of the {rows.count} that the step has")
        if self.router.probing and self.router.kernels:
            self.router.called.append((self, x))
        if rows.tables:
            assert self.deltas is not None
            return self.deltas.output(self.place, x, rows).view(*x.shape[:-1], -1)
        parts = [part for part in rows.own(self.path) if part[2] is not None or part[3] is not None]
        if not parts:
            y = self.inner(flat)
        elif all(module is not None and module.gain == 1 and module.aligned and not own for _, _, module, own in parts):
            y = self.inner(flat)
            self._add_deltas(flat, y, parts)
        else:
            y = self._apart(flat, parts, rows)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def _add_deltas(x: Tensor, y: Tensor, parts: list[Any]) -> None:
        """y += x @ delta.T of each segment, in place."""
        for start, stop, module, _ in parts:
            y[start:stop] += module.delta.apply(x[start:stop])

    def _apart(self, x: Tensor, parts: list[Any], rows: Rows) -> Tensor:
        """As above where a gain, a bias, a whole weight or another number of outputs differs too."""
        y = base_product(self.inner, x)
        plain, found = [], {}
        for start, stop, module, own in parts:
            if own is not None and "weight" in own:
                whole = own["weight"].T if isinstance(self.inner, Conv1D) else own["weight"]
                found[start, stop] = functional.linear(x[start:stop], whole)
            elif module is not None and module.aligned:
                y[start:stop] *= module.gain
                plain.append((start, stop, module, own))
            elif module is not None:
                assert isinstance(module, AttachedLinear)
                found[start, stop] = module.product(x[start:stop])
        self._add_deltas(x, y, plain)
        if self.head:
            wide = max(y.shape[1], *(part.shape[1] for part in found.values()), 0)
            y = functional.pad(y, (0, wide - y.shape[1]), value=-torch.inf)
            for (start, stop), part in found.items():
                y[start:stop] = functional.pad(part, (0, wide - part.shape[1]), value=-torch.inf)
        else:
            for (start, stop), part in found.items():
                y[start:stop] = part
        return y + self.table["bias"][rows.slots] if "bias" in self.table else y


class RoutedEmbedding(Routed):
    """nn.Embedding, scaled ones too."""

    deltas: EmbeddingTable | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """ids, as many as the step has rows -> (..., d)."""
        flat = ids.reshape(-1)
        if self.rows.tables:
            assert self.deltas is not None
            found = as_inner(self.inner, self.deltas.look_up(flat, self.rows.slots), flat)
            return found.view(*ids.shape, found.shape[-1])
        pieces = []
        for start, stop, module, own in self.rows.own(self.path):
            if module is not None:
                pieces.append(module(flat[start:stop]))
            elif own is not None:
                pieces.append(functional_call(self.inner, own, (flat[start:stop],)))
            else:
                pieces.append(self.inner(flat[start:stop]))
        found = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return found.view(*ids.shape, found.shape[-1])


class RoutedNorm(Routed):
    """A normalisation over the last axis, with weight and bias by row."""

    axis = -2
    kind: tuple[str, float] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x -> the same shape."""
        if self.router.probing:
            self.axis = _axis(x, self.router.probing, self.path)
            self.kind = kind_of(self.inner) if self.router.kernels else None
        rows = self.rows
        if rows.tables and self.kind is not None:
            kind, eps = self.kind
            lead = x.movedim(self.axis, 0)
            found = row_norm(lead.reshape(rows.count, -1, x.shape[-1]), self.table["weight"], rows.slots, eps, kind)
            return found.view(lead.shape).movedim(0, self.axis)
        if not rows.tables and not any(own for _, _, _, own in rows.own(self.path)):
            return self.inner(x)
        shape = [1] * x.ndim
        shape[self.axis], shape[-1] = rows.count, x.shape[-1]
        lines = {leaf: table[rows.slots].view(shape) for leaf, table in self.table.items()}
        if isinstance(self.inner, nn.LayerNorm):
            y = functional.layer_norm(x, self.inner.normalized_shape, None, None, self.inner.eps)
            y = y * lines["weight"] if "weight" in lines else y
            return y + lines["bias"] if "bias" in lines else y
        return functional_call(self.inner, lines, (x,))


class RoutedModule(Routed):
    """Any other module without parts that have parameters, called once a segment."""

    def __init__(self, inner: nn.Module, router: Router, path: str, head: bool = False) -> None:
        super().__init__(inner, router, path, head)
        self.axes: dict[Any, int] = {}
        self.outputs: list[int] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As inner's; every tensor of the arguments and results has the rows along some axis."""
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        if self.router.probing:
            every = {key: value for key, value in given.items() if isinstance(value, Tensor)}
            self.axes = {key: _axis(value, self.router.probing, self.path) for key, value in every.items()}
        pieces = []
        for start, stop, module, own in self.rows.own(self.path):
            cut = {
                key: value.narrow(self.axes[key], start, stop - start) if isinstance(value, Tensor) else value
                for key, value in given.items()
            }
            arguments = [cut.pop(i) for i in range(len(args))]
            if own is not None and module is None:
                made = functional_call(self.inner, own, tuple(arguments), cut)
            else:
                made = (module or self.inner)(*arguments, **cut)
            pieces.append(made if isinstance(made, tuple) else (made,))
        if self.router.probing:
            self.outputs = [_axis(value, self.router.probing, self.path) for value in pieces[0]]
        joined = tuple(
            torch.cat(parts, axis) for parts, axis in zip(zip(*pieces, strict=True), self.outputs, strict=True)
        )
        return joined if isinstance(made, tuple) else joined[0]


def served(base: PreTrainedModel, lines: int, *, kernels: bool = False) -> tuple[PreTrainedModel, Router]:
    """A second module tree over the base's own parameters, whose modules are routed; and its router.

    lines: residents that may be on the device at once, and one for the base. Raises Unsupported for a model of more
    than a text decoder and a head. kernels: see Router.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    tree = copy.deepcopy(base, memo)
    router = Router(lines, kernels)
    head = base.get_output_embeddings()
    inside = {id(p) for part in (base.get_decoder(), head) if part is not None for p in part.parameters()}
    outside = next((path for path, p in base.named_parameters() if id(p) not in inside), None)
    if head is None or outside is not None:
        raise Unsupported(
            f"{type(base).__name__} is more than a text decoder and a head ({outside}); it cannot be served"
        )
    for path, module in list(base.named_modules()):
        leaves = [leaf for leaf, p in module.named_parameters(recurse=False) if p is not None]
        inner = any(True for child in module.children() for _ in child.parameters())
        if not leaves or inner:
            continue
        kind = _kind(module, leaves)
        routed = kind(tree.get_submodule(path), router, path, module is head)
        if kind is RoutedNorm:
            routed.make_table(leaves, lines)
        elif kind is RoutedLinear:
            routed.make_table([leaf for leaf in leaves if leaf == "bias"], lines)
        tree.set_submodule(path, routed)
        router.modules[path] = routed
        router.own[path] = dict(module.named_parameters(recurse=False))
    return tree, router


def _kind(module: nn.Module, leaves: list[str]) -> Callable[..., Routed]:
    if is_linear(module):
        return RoutedLinear
    flat = all(getattr(module, leaf).ndim == 1 for leaf in leaves)
    if isinstance(module, nn.LayerNorm) or ("norm" in type(module).__name__.lower() and flat):
        return RoutedNorm
    return RoutedEmbedding if isinstance(module, nn.Embedding) else RoutedModule
