"""Encodes the sites of a compression into its journal, layer by layer.

    a layer's weights are read, its inputs' moments summed       calibrate.walk
    sites of one shape in the layer are encoded together         methods.encode_many
    terms are packed and kept                                    entry.pack_terms, Journal.put

On a GPU the next layer's weights of both models are read while this one is worked on (ahead.py), sites are packed and
written by a thread, and the model runs in bf16. On a CPU each site is encoded by itself, and in fp32.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayou import calibrate, clock, coded, inventory, methods, plan, skeleton, turns
from bayou.ahead import Ahead
from bayou.calibrate import Activations
from bayou.checkpoint import Checkpoint
from bayou.decompose import Matrix
from bayou.delta import Delta, Term
from bayou.entry import pack_terms, unpack_terms
from bayou.errors import Unsupported
from bayou.inventory import Reads
from bayou.journal import Journal
from bayou.methods import Gram, Site
from bayou.momentfiles import MomentFiles
from bayou.moments import correction, input_of
from bayou.plan import SiteRecord
from bayou.skeleton import Place
from bayou.spending import Spending
from bayou.turns import TOGETHER
from bayou.workers import Workers

Progress = Callable[[str, int, int], None]

RIDGE = 3.0
"""Of corrections, in shares of the inputs' mean second moment (LOG.md, "Corrected targets")."""


class Encoder:
    """Encodes `sites`, the fine-tune `tuned` against `base`, on `device`.

    model: a skeleton of the fine-tune; places: of its tensors. workers: who shares the sites. together, ahead: whether
    sites of one shape go through a method together, and whether weights are read ahead (None: on a GPU, where both
    gain much; on a CPU they cost memory). errors: relative error of each site, by its index.
    """

    def __init__(
        self,
        base: Checkpoint,
        tuned: Checkpoint,
        model: PreTrainedModel,
        places: dict[str, Place],
        sites: list[SiteRecord],
        device: str,
        workers: Workers,
        progress: Progress,
        *,
        together: bool | None = None,
        ahead: bool | None = None,
    ) -> None:
        self.base, self.tuned, self.model, self.places, self.sites = base, tuned, model, places, sites
        self.workers, self.progress = workers, progress
        self.device = torch.device(device)
        self.gpu = self.device.type == "cuda"
        self.together = self.gpu if together is None else together
        self.ahead = self.gpu if ahead is None else ahead
        self.errors: dict[int, float] = {}
        self._old: Reads = base
        self._new: Reads = tuned

    def encode(
        self,
        journal: Journal,
        windows: Tensor | None,
        activations: Activations,
        moments: MomentFiles | None = None,
        spending: Spending | None = None,
    ) -> None:
        """Put every site in the journal that is not there yet; calibrates on `windows`, if there are any.

        moments: those of the windows, where they have been found before. spending: chooses the ranks as the sites are
        encoded; `sites` are then as they came out.
        """
        self._spending = spending
        path, layers = self._layers(windows)
        by_layer = turns.by_layer(self.sites, self.places, path) if path else {}
        heads = turns.heads(self.sites, self.places) if windows is not None and activations == "corrected" else []
        inside = {index for indexes in by_layer.values() for index in indexes} | set(heads)
        apart = [index for index in range(len(self.sites)) if index not in inside]
        mine = [apart[i] for i in self.workers.shared([turns.cost([self.sites[i].shape]) for i in apart])]
        end = 2 * len(self.sites)  # in the journal when all is encoded and, with a spending, the size is right
        wanted = [end, *inside, *apart] if spending else inside
        pending = any(journal.get(index) is None for index in wanted)
        self.workers.wait()  # all look before anyone goes on: a layer is walked by all or by none
        reads = [] if spending else [self._site_reads(index) for index in mine]
        first = len(reads)
        reads += [self._layer_reads(f"{path}.{layer}", by_layer.get(layer, [])) for layer in range(len(layers))]
        current = torch.cuda.device(self.device) if self.gpu else nullcontext()  # Triton launches on the current one
        with current, ThreadPoolExecutor(1, "journal") as writer, Ahead(reads, self.device) as ahead:
            self._writer = writer
            self._writing: list[Future[None]] = []
            if self.ahead:
                self._old, self._new = ahead.view(self.base), ahead.view(self.tuned)
            turn = ahead.turn if self.ahead else lambda _: None
            if spending and pending:
                self._encode_all(journal, apart, {})
                self.progress("matrices", len(apart), len(apart))
            for done, index in enumerate([] if spending else mine):
                if journal.get(index) is None:
                    turn(done)
                self._encode_all(journal, [index], {}, alone=True)
                self.progress("matrices", done + 1, len(mine))
            if activations == "corrected":
                self.workers.wait()  # the compressed model begins with what is outside its layers
            steps = _Layers(path, layers, by_layer, heads, lambda layer: turn(first + layer))
            if windows is not None and pending:
                self._walk(journal, windows, activations, steps, [i for i in apart if self.sites[i].method], moments)
            elif pending:
                for layer in range(len(layers)):
                    steps.turn(layer)
                    self._encode_all(journal, by_layer.get(layer, []), {})
                    self.progress("layers", layer + 1, len(layers))
            self._old, self._new = self.base, self.tuned
        self.workers.wait()
        if spending:
            if self.workers.first:
                journal.put(end, b"", 0.0)
            self.sites = [self._record(journal, index) for index in range(len(self.sites))]
        self.errors = {index: _done(journal, index)[1] for index in range(len(self.sites))}

    def _layers(self, windows: Tensor | None) -> tuple[str, nn.ModuleList]:
        """The decoder's layers; without windows only where they are turns of the spending, and the model has any."""
        if windows is None and self._spending is None:
            return "", nn.ModuleList()
        try:
            return skeleton.decoder_layers(self.model)
        except Unsupported:
            if windows is not None:
                raise
            return "", nn.ModuleList()

    def _walk(
        self,
        journal: Journal,
        windows: Tensor,
        activations: Activations,
        steps: "_Layers",
        outside: list[int],
        moments: MomentFiles | None,
    ) -> None:
        layers = steps.layers
        left = {layer: list(indexes) for layer, indexes in steps.by_layer.items()} | {len(layers): list(steps.heads)}

        def fill(layer: int | None) -> None:
            with clock.step("read layers"):
                if layer is not None:
                    steps.turn(layer)
                calibrate.fill(self.model, self.places, self._new.read, layer, self.device)

        def visit(layer: int, grams: dict[str, Tensor], lacking: dict[str, Tensor] | None = None) -> None:
            shared: dict[int, Gram] = {}
            wrapped = {key: shared.setdefault(id(gram), Gram(gram)) for key, gram in grams.items()}
            corrections = self._corrections(grams, lacking or {})
            waiting = left.get(layer, [])
            now = [index for index in waiting if lacking is None or not grams or self._input(index) in grams]
            left[layer] = [index for index in waiting if index not in now]
            self._encode_all(journal, now, wrapped, corrections)
            if activations != "finetuned" and layer < len(layers):
                self.workers.wait()
                for index in now:
                    self._overwrite(journal, index)

        @contextmanager
        def begin() -> Iterator[None]:
            for index in outside:
                self._overwrite(journal, index)
            yield
            skeleton.empty(self.model)

        if moments is not None:
            for layer in moments.layers():
                if layer < len(layers):
                    steps.turn(layer)
                visit(layer, moments.get(layer, self.device))
                self.progress("layers", layer + 1, len(layers))
            return
        with clock.step("calibrate"):
            calibrate.walk(
                self.model,
                windows,
                fill=fill,
                empty=lambda layer: skeleton.empty(layers[layer]),
                visit=visit,
                device=self.device,
                keep=activations,
                begin=begin,
                progress=lambda done, total: self.progress("layers", done, total),
            )
        skeleton.empty(self.model)
        for indexes in left.values():  # a head that is never run
            self._encode_all(journal, indexes, {})

    def _corrections(self, grams: dict[str, Tensor], lacking: dict[str, Tensor]) -> dict[str, Tensor]:
        """Module path -> C, by which W (y + C y) is nearest to what the fine-tune gives."""
        with clock.step("correct"):
            found = {id(gram): correction(grams[name], gram, RIDGE) for name, gram in lacking.items()}
        return {name: found[id(gram)] for name, gram in lacking.items()}

    # ------------------------------------------------------------------------------------------ sites

    def _site_reads(self, index: int) -> list[tuple[Checkpoint, str]]:
        """The tensors of one site, where it is coded at all."""
        site = self.sites[index]
        if not site.method:
            return []
        return [(self.tuned, site.tensor), *([(self.base, site.reference)] if site.reference is not None else [])]

    def _layer_reads(self, prefix: str, indexes: list[int]) -> list[tuple[Checkpoint, str]]:
        """The fine-tune's tensors of a layer, and the base's of its sites."""
        found = [(self.tuned, name) for name, place in self.places.items() if place.path.startswith(prefix + ".")]
        return found + [pair for index in indexes for pair in self._site_reads(index)]

    def _encode_all(
        self,
        journal: Journal,
        indexes: list[int],
        grams: dict[str, Gram],
        corrections: dict[str, Tensor] | None = None,
        *,
        alone: bool = False,
    ) -> None:
        """Encode what is ours of the sites, together those that can be; with a spending until their size is right.

        alone: all of them are ours.
        """
        spending = self._spending
        those = [index for index in indexes if self.sites[index].method]
        for attempt in count():
            if spending and those:
                spending.turn(those, attempt)
                self.sites = [replace(site, coded=0) for site in spending.sites]
            for group in [indexes] if alone else turns.ours(self.sites, indexes, self.workers, self.together):
                self._encode(journal, group, grams, corrections or {})
            self._flush()
            if not spending or not those:
                return
            self.workers.wait()
            records = {index: self._record(journal, index) for index in those}
            self.workers.wait()  # all have read them, and so may write others
            if spending.settle(records):
                return

    def _record(self, journal: Journal, index: int) -> SiteRecord:
        """A site as it was encoded, with its coded bytes."""
        return plan.loads(journal.note(index) or "", [self.sites[index].name])[0]

    def _encode(
        self, journal: Journal, group: list[int], grams: dict[str, Gram], corrections: dict[str, Tensor]
    ) -> None:
        records = [self.sites[index] for index in group]
        # One site is missing: all are encoded, since on a GPU a site's bits may depend on the group it is in.
        if all(self._is_there(journal, index) for index in group):
            return
        if not records[0].method:
            self._keep(journal, group[0], (), 0.0)
            return
        matrices = [inventory.delta_matrix(record, self._old, self._new, self.device) for record in records]
        sites = [
            Site(record.name, self._target(index, matrix, corrections), record.role, self._gram(index, grams))
            for index, record, matrix in zip(group, records, matrices, strict=True)
        ]
        with clock.step("encode"):
            every = methods.encode_many(records[0].method, sites, [record.options for record in records])
        for index, record, matrix, terms in zip(group, records, matrices, every, strict=True):
            layouts = tuple(methods.layout_of(term) for term in terms)
            if layouts != record.terms:
                raise AssertionError(f"{record.name}: {record.method} promised {record.terms}, made {layouts}")
            with clock.step("measure error"):
                error = inventory.relative_error(matrix, Delta(record.shape, terms))
            self._keep(journal, index, terms, error)

    def _is_there(self, journal: Journal, index: int) -> bool:
        """Whether a site is in the journal, encoded as it is to be now."""
        if journal.get(index) is None:
            return False
        return self._spending is None or self._record(journal, index).options == self.sites[index].options

    def _target(self, index: int, matrix: Matrix, corrections: dict[str, Tensor]) -> Matrix:
        """What the site's terms should be: its delta D, or D + W C, W the fine-tune's weight (moments.correction)."""
        site = self.sites[index]
        more = corrections.get(self._input(index))
        if more is None or len(more) != site.shape[1]:
            return matrix

        def read(start: int, stop: int) -> Tensor:
            new = inventory.read_matrix(self._new, site.tensor, site.part, site, start, stop)
            return matrix.read(start, stop) + new.to(more.device).float() @ more

        if site.shape[0] * site.shape[1] > TOGETHER:
            return Matrix(site.shape, read)
        whole = read(0, site.shape[0])  # a method reads it several times
        return Matrix(site.shape, lambda start, stop: whole[start:stop])

    def _input(self, index: int) -> str:
        """The module whose input the site multiplies; "" for none."""
        return input_of(self.places.get(self.sites[index].tensor)) or ""

    def _gram(self, index: int, grams: dict[str, Gram]) -> Gram | None:
        """The gram of the module whose input the site multiplies."""
        gram = grams.get(self._input(index))
        if gram is not None and len(gram.matrix) != self.sites[index].shape[1]:
            return None  # of the other side: Llama 4's experts are (in, out), and nothing says so
        return gram

    def _keep(self, journal: Journal, index: int, terms: tuple[Term, ...], error: float) -> None:
        site, sized = self.sites[index], self._spending is not None

        def put() -> None:
            raw = pack_terms(terms)
            small = coded.encode(raw, site.terms, site.shape) if sized else None
            journal.put(index, raw, error, plan.dumps([replace(site, coded=len(small or b""))]) if sized else "")

        self._writing.append(self._writer.submit(put))

    def _flush(self) -> None:
        """Wait until what was kept is in the journal; raises what went wrong there."""
        with clock.step("journal"):
            while self._writing:
                self._writing.pop(0).result()

    def _overwrite(self, journal: Journal, index: int) -> None:
        """Put the compressed weight in the skeleton, where the fine-tune's lies, so that the next layer sees it."""
        site, place = self.sites[index], self.places.get(self.sites[index].tensor)
        if place is None or place.converted or site.reference is None:
            return  # computed from several tensors: the fine-tune's own stays
        rows = inventory.read_matrix(self._old, site.reference, site.reference_part, site, 0, site.shape[0])
        delta = stored_delta(journal, index, site).to(self.device)
        weight = delta.restore(rows.to(self.device), torch.float32)
        parameter = self.model.get_parameter(place.path)
        part = parameter if place.index is None else parameter[place.index]
        part = part if site.part is None else part[site.part]
        part[: site.disk_shape[0]].copy_((weight.T if site.transposed else weight).reshape(site.disk_shape))


@dataclass(frozen=True)
class _Layers:
    """Path and modules of a decoder's layers, the sites of each and of the head, and what makes a layer ready."""

    path: str
    layers: nn.ModuleList
    by_layer: dict[int, list[int]]
    heads: list[int]
    turn: Callable[[int], None]


def _done(journal: Journal, index: int) -> tuple[bytes, float]:
    done = journal.get(index)
    assert done is not None  # every site has been encoded by now
    return done


def stored_delta(journal: Journal, index: int, site: SiteRecord) -> Delta:
    """The delta of a site that is in the journal."""
    buffer = torch.frombuffer(bytearray(_done(journal, index)[0]) or bytearray(1), dtype=torch.uint8)
    return Delta(site.shape, unpack_terms(buffer, site.terms, site.shape), site.reference, site.gain)
