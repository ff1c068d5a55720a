"""A shared model as one self-contained file: ties as factors, anchors once, what is dropped as nothing.

tie                 site `self:ANCHOR`, its u @ v encoded by a method of bayou.methods
tie without base    site without a reference, the same terms
dropped sub-layer   its matrices as 0 times another tensor of the file (no bytes), its biases as zeros
dropped block       (both sub-layers) not in the file at all: layers are renumbered, config.json says so
anchors, linears    exact, or 1 to 8 bits: GPTQ where there is calibration, for an anchor over all its uses
embeddings, head    exact, or codes with a scale per 128 columns (--quantise all)
"""

import functools
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayou import clock, inventory, methods, preflight, sidecar
from bayou.checkpoint import DTYPES
from bayou.contents import Contents, Exact
from bayou.decompose import Matrix
from bayou.delta import Delta, Dense, LowRank, Term
from bayou.deltafile import DeltaFile
from bayou.entry import pack_terms
from bayou.errors import BadInput
from bayou.methods import Gram, Site, TermLayout, layout_of
from bayou.packed import Packed, Spec, moved
from bayou.plan import SELF, SiteRecord
from bayou.quantize import gptq, grid, spread
from bayou.report import parameters
from bayou.sharing import Shared, Tie, removal
from bayou.sharing.original import Original, Progress
from bayou.sharing.ties import Metric

QUANTISE = ("anchors", "linears", "all")
GROUP = 128
TABLE_BITS = 8
"""Least bits of embeddings and head under `quantise="all"`: they are read by every token, and few."""


@dataclass(frozen=True)
class Report:
    """What a shared file holds. parameters: numbers in it (scales and gains do not count), original those of the model.

    tables: numbers of embeddings and head, which are in both counts (tables_left, where they are not as many in the
    file: slicegpt). ratio: bytes of the model's weights over the
    file's. ties, dropped: matrices tied, sub-layers without a contribution. training: tokens, loss, ..., of a
    training; returns: how often it went back to a checkpoint, with a smaller rate; windows: that the text fills; batch:
    of them a step, fewer than batch_asked where there are no more.
    """

    path: str
    method: str
    bytes: int
    ratio: float
    parameters: int
    original: int
    tables: int
    ties: int
    dropped: int
    seconds: float
    steps: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    tables_left: int | None = None

    @property
    def removed(self) -> float:
        """Share of all parameters removed."""
        return 1 - self.parameters / self.original

    @property
    def removed_of_layers(self) -> float:
        """Share removed of the parameters outside embeddings and head."""
        left = self.parameters - (self.tables if self.tables_left is None else self.tables_left)
        return 1 - left / (self.original - self.tables)

    def json(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self) | {"removed": self.removed, "removed_of_layers": self.removed_of_layers}


def write(
    model: str | Path | Original,
    shared: Shared,
    out: str | Path,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    delta_method: str = "lowrank",
    delta_options: dict[str, Any] | None = None,
    anchor_bits: int | None = None,
    quantise: str = "anchors",
    refit: bool = False,
    whiten: bool = True,
    windows: Tensor | None = None,
    device: str = "cpu",
    method: str = "deltallm",
    progress: Progress | None = None,
) -> Report:
    """Write `shared`, a shared version of the model in a folder, as the file `out`.

    Args:
        model: the folder or Hub id (or an Original of it) that everything not tied or dropped is taken from.
        tensors: disk name -> value in place of the model's own (a learned anchor, what training changed).
        delta_method, delta_options: how u @ v of each tie is stored; a method's rank is the tie's.
        anchor_bits: None keeps matrices exact; 1 to 8 quantises those that `quantise` names: "anchors" (of the ties),
            "linears" (all that are not tied), or "all" (embeddings and head too, in 8 bits at least).
        refit: ties are made again from the model's own matrices to what their anchors are once quantised, in place of
            keeping gain * reference + u @ v (right for ties that came from the model, wrong for trained ones).
        whiten: factors that are made again are so in the metric of their inputs, else in that of the matrix alone.
        windows: (n, length) token ids that calibrate; None: rounding is to nearest, the metric is the identity.

    Raises:
        BadInput for a Shared that does not fit the model, or options that do not go together; BayouError for a full
        disk. Nothing is left at `out` then, or the old file is untouched.
    """
    started = time.perf_counter()
    with clock.measuring() as steps:
        original = model if isinstance(model, Original) else Original(model, device=device)
        writer = _Writer(original, shared, dict(tensors or {}), delta_method, delta_options or {})
        writer.choose(anchor_bits, quantise, refit, whiten)
        preflight.check_output(Path(out), original.folder)
        size = writer.write(Path(out), windows, progress or (lambda *_: None))
        opened = DeltaFile(out)
        counts = (original.parameters, original.tables, len(shared.ties), len(shared.dropped))
        found = (str(out), method, size, original.checkpoint.nbytes / size, parameters(opened), *counts)
        return Report(*found, time.perf_counter() - started, dict(steps))


def nbytes(
    original: Original,
    shared: Shared,
    *,
    delta_method: str = "lowrank",
    delta_options: dict[str, Any] | None = None,
    anchor_bits: int | None = None,
    quantise: str = "anchors",
) -> int:
    """Bytes of the file that `write` would write with these options, without doing the work; BadInput as there."""
    writer = _Writer(original, shared, {}, delta_method, delta_options or {})
    writer.choose(anchor_bits, quantise, False, False)
    return writer.nbytes()


def check(method: str, options: dict[str, Any], anchor_bits: int | None, quantise: str) -> None:
    """Raises BadInput for ways of storing that there are not."""
    methods.check(method, options)
    if getattr(methods.get(method), "EXACT", False):
        raise BadInput(f"--delta-method {method} stores a fine-tune over its base, and here is none")
    if quantise not in QUANTISE or (anchor_bits is not None and not 1 <= anchor_bits <= 8):
        raise BadInput(f"--anchor-bits {anchor_bits} --quantise {quantise}: choose 1 to 8 bits, {', '.join(QUANTISE)}")
    if anchor_bits is None and quantise != "anchors":
        raise BadInput(f"--quantise {quantise} needs --anchor-bits")


def calibrates(method: str, anchor_bits: int | None) -> bool:
    """Whether what is stored so is rounded to fit the inputs of the matrices."""
    return anchor_bits is not None or getattr(methods.get(method), "USES_GRAM", False)


class _Writer:
    """One file: what stands for each tensor, then its bits, then the file."""

    def __init__(
        self, original: Original, shared: Shared, tensors: dict[str, Tensor], method: str, options: dict[str, Any]
    ) -> None:
        self.original, self.shared, self.tensors = original, shared, tensors
        self.method, self.options = method, methods.check(method, options)
        self.ties = {tie.tensor: tie for tie in shared.ties}
        self.anchors = {tie.reference for tie in shared.ties if tie.reference is not None}
        self.gone = removal.removed_blocks(original, shared.dropped)
        inside = {name for sub in shared.dropped for name in original.within(sub)}
        self.zeros = {name for name in inside if original.role(name) in ("linear", "bias")}
        self.absent = {name for name in original.checkpoint.names() if removal.block_of(original, name) in self.gone}
        self._check(inside)
        self.bits: dict[str, int] = {}
        self.refit, self.whiten = False, True

    def _check(self, inside: set[str]) -> None:
        names = set(self.original.checkpoint.names())
        if len(self.ties) != len(self.shared.ties):
            raise BadInput("a tensor is tied twice")
        for tie in self.shared.ties:
            if tie.tensor not in names or self.original.role(tie.tensor) != "linear":
                raise BadInput(f"{tie.tensor} is no linear of {self.original.folder}, so it cannot be tied")
            shape = self.shape(tie.tensor)
            if (tie.u.shape[0], tie.v.shape[1]) != shape or tie.u.shape[1] != tie.v.shape[0]:
                raise BadInput(f"the factors of {tie.tensor} {shape} are {tuple(tie.u.shape)}, {tuple(tie.v.shape)}")
            if not (tie.u.isfinite().all() and tie.v.isfinite().all() and abs(tie.gain) < 1e30):
                raise BadInput(f"the tie of {tie.tensor} holds NaN or infinite numbers")
            if tie.reference is None:
                continue
            if tie.reference in self.ties or tie.reference not in names or tie.reference in inside | self.absent:
                raise BadInput(f"{tie.tensor} is tied to {tie.reference}, which is tied, dropped or absent itself")
            if self.original.role(tie.reference) != "linear" or self.shape(tie.reference) != shape:
                found = self.original.checkpoint.shape(tie.reference)
                raise BadInput(f"{tie.tensor} {shape} is tied to {tie.reference} {found}, no linear of its shape")
        for name in self.ties.keys() & (inside | self.absent):
            raise BadInput(f"{name} is tied and dropped")
        for name, value in self.tensors.items():
            if name not in names or tuple(value.shape) != self.original.checkpoint.shape(name):
                raise BadInput(f"{name} {tuple(value.shape)} stands for no tensor of {self.original.folder}")

    def choose(self, bits: int | None, quantise: str, refit: bool, whiten: bool) -> None:
        """Which matrices are quantised, and to how many bits."""
        check(self.method, self.options, bits, quantise)
        self.refit, self.whiten = refit, whiten
        for name in self.original.checkpoint.names() if bits is not None else ():
            role, whole = self.original.role(name), name in self.original.places
            if name in self.ties or name in self.zeros or name in self.absent or not whole:
                continue
            if role == "linear" and (quantise != "anchors" or name in self.anchors):
                self.bits[name] = bits or 8
            elif role in ("embedding", "head") and quantise == "all":
                self.bits[name] = max(bits or 8, TABLE_BITS)

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a matrix."""
        rows, columns = self.original.checkpoint.shape(name)
        return (columns, rows) if self.original.places[name].transposed else (rows, columns)

    def value(self, name: str) -> Tensor:
        """The tensor that the shared model has of this name, as on disk."""
        own = self.original.checkpoint
        return self.tensors[name].to(own.dtype(name)) if name in self.tensors else own.read(name)

    # ------------------------------------------------------------------------------------------ the bits

    def write(self, out: Path, windows: Tensor | None, progress: Progress) -> int:
        coded = self._quantised(windows, progress)
        coded |= {name: (*self._nothing(name), 0.0) for name in self._emptied()}
        contents = self._contents({n: (at, g, _layouts(terms)) for n, (at, g, terms, _) in coded.items()})
        order = [name for name in self.original.checkpoint.names() if name in coded]  # as the sites are
        blobs = [pack_terms(coded[name][2]) for name in order]
        with clock.step("write"):
            return contents.write(out, blobs.__getitem__, [coded[name][3] for name in order])

    def nbytes(self) -> int:
        """Bytes of the file that `write` would write."""
        stated: dict[str, tuple[str | None, float, tuple[TermLayout, ...]]] = {}
        for name, bits in self.bits.items():
            stated[name] = None, 1.0, (TermLayout("Dense", ((0, str(Spec(bits, GROUP)), ""),)),)
        for tie in self.shared.ties:
            if rank := tie.u.shape[1]:
                dial = {"rank": rank} if methods.has_rank(self.method) else {}
                layout = methods.get(self.method).layout(self.shape(tie.tensor), **self.options, **dial)
                stated[tie.tensor] = tie.reference, 1.0 if tie.reference is None else tie.gain, layout
            elif tie.reference is not None:
                stated[tie.tensor] = tie.reference, tie.gain, ()
        emptied = {*self._emptied(), *(self.ties.keys() - stated.keys())}
        for name in emptied:
            reference, gain, terms = self._nothing(name)
            stated[name] = reference, gain, _layouts(terms)
        return self._contents(stated).nbytes()

    def _emptied(self) -> list[str]:
        """The matrices of dropped sub-layers that are in the file."""
        return [name for name in self.zeros - self.absent if self.original.role(name) == "linear"]

    def _contents(self, coded: Mapping[str, tuple[str | None, float, tuple[TermLayout, ...]]]) -> Contents:
        """What goes into the file but for the sites' bytes; coded: disk name -> reference, gain, layouts."""
        sites: list[SiteRecord] = []
        exact: list[Exact] = []
        for name in self.original.checkpoint.names():
            inventory.check_name(self.original.checkpoint, name)
            if name in self.absent:
                continue
            here = removal.renamed(self.original, name, self.gone)
            if name in coded:
                sites.append(self._site(name, here, *coded[name]))
            else:
                exact.append(self._exact(name, here))
        carried = removal.without(self.original, sidecar.carried(self.original.folder), self.gone)
        files = {name: _alone(content) for name, content in carried.items()}
        return Contents(sites, exact, [], "", "", {}, {}, files)

    def _exact(self, name: str, here: str) -> Exact:
        own = self.original.checkpoint
        word, shape = own.word(name), own.shape(name)
        if name in self.zeros:
            return Exact(here, word, shape, lambda: torch.zeros(shape, dtype=DTYPES[word]))
        return Exact(here, word, shape, lambda: self.value(name))

    def _site(
        self, name: str, here: str, reference: str | None, gain: float, layouts: tuple[TermLayout, ...]
    ) -> SiteRecord:
        place, own = self.original.places[name], self.original.checkpoint
        anchor = None if reference is None else SELF + removal.renamed(self.original, reference, self.gone)
        method, options = (self.method, self.options) if name in self.ties and layouts else ("", {})
        disk = own.shape(name)
        shape = self.shape(name)
        kind = (shape, disk, own.word(name), place.transposed)
        return SiteRecord(here, None, *kind, anchor, None, gain, place.role, method, options, layouts)

    def _nothing(self, name: str) -> tuple[str | None, float, tuple[Term, ...]]:
        """A matrix of zeros: 0 times a tensor of its shape, or where there is none a term of rank 1 and gain 0."""
        own = self.original.checkpoint
        for other in own.names():
            free = other not in self.ties and other not in self.zeros and other not in self.absent
            same = free and self.original.role(other) == "linear" and own.shape(other) == own.shape(name)
            if same and self.original.places[other].transposed == self.original.places[name].transposed:
                return other, 0.0, ()
        out, width = self.shape(name)
        u, v = (Packed.codes(torch.zeros(size, dtype=torch.uint8), Spec(1)) for size in ((out, 1), (1, width)))
        return None, 0.0, (LowRank(((u, v),), 0.0),)

    def _quantised(
        self, windows: Tensor | None, progress: Progress
    ) -> dict[str, tuple[str | None, float, tuple[Term, ...], float]]:
        """Disk name -> reference, gain, terms, relative error, of every tie and every quantised matrix."""
        found: dict[str, tuple[str | None, float, tuple[Term, ...], float]] = {}
        grams: dict[str, Gram] = {}
        late = self.ties.keys() | self.anchors  # these wait for the grams of all layers

        def visit(seen: dict[str, Gram]) -> None:
            for name, gram in seen.items():
                if name in late:
                    grams[name] = gram
                elif name in self.bits:
                    found[name] = (None, 1.0, *self._dense(name, gram))

        if windows is not None and (self.bits or calibrates(self.method, None)):
            with clock.step("calibrate"):
                self.original.walk(windows, visit, progress)
        with clock.step("encode"):
            for name in sorted(self.bits.keys() - found.keys()):
                found[name] = (None, 1.0, *self._dense(name, self._summed(name, grams)))
            for done, tie in enumerate(self.shared.ties):
                found[tie.tensor] = self._tie(tie, found, grams.get(tie.tensor))
                progress("ties", done + 1, len(self.shared.ties))
        return found

    def _summed(self, anchor: str, grams: Mapping[str, Gram]) -> Gram | None:
        """The Hessian of all uses of an anchor: its own layer's, and g^2 times that of each tie to it."""
        if anchor not in grams:
            return None
        total = grams[anchor].matrix.double()
        for tie in self.shared.ties:
            if tie.reference == anchor and tie.tensor in grams:
                total = total + tie.gain**2 * grams[tie.tensor].matrix.double()
        return Gram(total.float())

    def _dense(self, name: str, gram: Gram | None) -> tuple[tuple[Term, ...], float]:
        """A matrix in codes, and its relative error."""
        matrix = self.original.oriented(name, self.value(name))
        spec = Spec(self.bits[name], GROUP)
        scale, zero = grid(matrix, spec)
        factor = None if gram is None else gram.factor(0.01, True)
        codes, _ = gptq(matrix, factor, spread(scale, zero, spec, matrix.shape[1]))
        term = Dense(Packed.codes(codes.to(torch.uint8), spec, scale).to("cpu"))
        return (term,), _error(matrix, Delta(self.shape(name), (term,)))

    def _tie(
        self, tie: Tie, found: Mapping[str, tuple[Any, ...]], gram: Gram | None
    ) -> tuple[str | None, float, tuple[Term, ...], float]:
        anchor, shape, rank = tie.reference, self.shape(tie.tensor), tie.u.shape[1]
        if anchor is None and not rank:  # nothing and no base: such a site would be malformed
            return *self._nothing(tie.tensor), 1.0
        u, v = (part.to(self.original.device).float() for part in (tie.u, tie.v))
        wanted = self.original.matrix(tie.tensor)  # of the model as it was
        base = torch.zeros(()) if anchor is None else self._restored(anchor, found)
        if anchor is not None and anchor in self.bits and rank:
            exact = self.original.oriented(anchor, self.value(anchor))
            target = wanted if self.refit else tie.gain * exact + u @ v
            u, v = Metric(gram if self.whiten else None).low_rank(target - tie.gain * base, rank)
        terms: tuple[Term, ...] = ()
        if rank:
            delta = u @ v
            dial = {"rank": rank} if methods.has_rank(self.method) else {}
            site = Site(tie.tensor, Matrix(shape, lambda a, b: delta[a:b]), "linear", gram)
            terms = methods.get(self.method).encode(site, **self.options, **dial)
            terms = moved(terms, "cpu")
        left = wanted if anchor is None else wanted - tie.gain * base
        return anchor, 1.0 if anchor is None else tie.gain, terms, _error(left, Delta(shape, terms))

    def _restored(self, anchor: str, found: Mapping[str, tuple[Any, ...]]) -> Tensor:
        """An anchor as a reader will have it."""
        if anchor not in found:
            return self.original.oriented(anchor, self.value(anchor))
        dtype = self.original.checkpoint.dtype(anchor)
        return Delta(self.shape(anchor), found[anchor][2]).restore(None, dtype).to(self.original.device).float()


@functools.lru_cache(16)  # a search asks for the size of many files with the same tokenizer
def _alone(content: bytes) -> bytes:
    return sidecar.difference(None, content)


def _layouts(terms: tuple[Term, ...]) -> tuple[TermLayout, ...]:
    return tuple(layout_of(term) for term in terms)


def _error(matrix: Tensor, delta: Delta) -> float:
    """||matrix - terms|| / ||matrix||, Frobenius."""
    whole = float(matrix.double().norm())
    return float((matrix.double() - delta.materialize().to(matrix.device)).norm()) / whole if whole else 0.0
