"""Encodes the sites of a compression into its journal, layer by layer.

    a layer's weights are read, its inputs' moments summed       calibrate.walk
    sites of one shape in the layer are encoded together         methods.encode_many
    terms are packed and kept                                    entry.pack_terms, Journal.put

On a GPU the next layer's weights of both models are read while this one is worked on (ahead.py), sites are packed and
written by a thread, and the model runs in bf16. On a CPU each site is encoded by itself, and in fp32.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayou import calibrate, clock, inventory, methods, skeleton
from bayou.ahead import Ahead
from bayou.checkpoint import Checkpoint
from bayou.delta import Delta, Term
from bayou.entry import pack_terms, unpack_terms
from bayou.inventory import Reads
from bayou.journal import Journal
from bayou.methods import Gram, Site
from bayou.momentfiles import MomentFiles
from bayou.moments import input_of
from bayou.plan import SiteRecord
from bayou.skeleton import Place
from bayou.workers import Workers

Progress = Callable[[str, int, int], None]

_TOGETHER = 2**27
"""Weights of sites that are encoded together: their factors are in memory at once."""


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
        activations: Literal["finetuned", "compressed"],
        moments: MomentFiles | None = None,
    ) -> None:
        """Put every site in the journal that is not there yet; calibrates on `windows`, if there are any.

        moments: those of the windows, where they have been found before.
        """
        path, layers = "", nn.ModuleList()
        if windows is not None:
            path, layers = skeleton.decoder_layers(self.model)
        by_layer = self._by_layer(path) if windows is not None else {}
        apart = sorted(set(range(len(self.sites))) - {i for indexes in by_layer.values() for i in indexes})
        todo = [apart[i] for i in self.workers.shared([self._cost([i]) for i in apart])]
        pending = any(journal.get(i) is None for indexes in by_layer.values() for i in indexes)
        self.workers.wait()  # all look before anyone goes on: a layer is walked by all or by none
        mine = {layer: self._ours(indexes) for layer, indexes in by_layer.items()}
        turns = [self._layer_turn(f"{path}.{layer}", mine.get(layer, [])) for layer in range(len(layers))]
        turns += [self._site_turn(index) for index in todo]
        current = torch.cuda.device(self.device) if self.gpu else nullcontext()  # Triton launches on the current one
        with current, ThreadPoolExecutor(1, "journal") as writer, Ahead(turns, self.device) as ahead:
            self._writer = writer
            self._writing: list[Future[None]] = []
            if self.ahead:
                self._old, self._new = ahead.view(self.base), ahead.view(self.tuned)
            turn = ahead.turn if self.ahead else lambda _: None
            if windows is not None and pending:
                self._walk(journal, windows, activations, path, layers, mine, by_layer, turn, moments)
            else:
                for index in (i for groups in mine.values() for group in groups for i in group):
                    self.errors[index] = _done(journal, index)[1]
            for done, index in enumerate(todo):
                if journal.get(index) is None:
                    turn(len(layers) + done)
                self._encode(journal, [index], {})
                self._flush()
                self.progress("matrices", done + 1, len(todo))
            self._old, self._new = self.base, self.tuned
        self.workers.wait()
        if self.workers.count > 1:
            self.errors = {index: _done(journal, index)[1] for index in range(len(self.sites))}

    def _walk(
        self,
        journal: Journal,
        windows: Tensor,
        activations: Literal["finetuned", "compressed"],
        path: str,
        layers: nn.ModuleList,
        mine: dict[int, list[list[int]]],
        by_layer: dict[int, list[int]],
        turn: Callable[[int], None],
        moments: MomentFiles | None,
    ) -> None:
        def fill(layer: int | None) -> None:
            with clock.step("read layers"):
                if layer is not None:
                    turn(layer)
                calibrate.fill(self.model, self.places, self._new.read, layer, self.device)

        def visit(layer: int, grams: dict[str, Tensor]) -> None:
            shared: dict[int, Gram] = {}
            wrapped = {key: shared.setdefault(id(gram), Gram(gram)) for key, gram in grams.items()}
            for group in mine.get(layer, []):
                self._encode(journal, group, wrapped)
            self._flush()
            if activations == "compressed":
                self.workers.wait()
                for index in by_layer.get(layer, []):
                    self._overwrite(journal, index)

        if moments is not None:
            for layer in moments.layers():
                if layer < len(layers):
                    turn(layer)
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
                progress=lambda done, total: self.progress("layers", done, total),
            )
        skeleton.empty(self.model)

    # ------------------------------------------------------------------------------------------ who does what, when

    def _by_layer(self, path: str) -> dict[int, list[int]]:
        """Layer -> the sites that are encoded as it is walked."""
        found: dict[int, list[int]] = {}
        for index, site in enumerate(self.sites):
            place = self.places.get(site.tensor)
            if site.method and place and place.path.startswith(path + "."):
                found.setdefault(int(place.path[len(path) + 1 :].split(".")[0]), []).append(index)
        return found

    def _ours(self, indexes: list[int]) -> list[list[int]]:
        """The groups of a layer's sites that this process encodes. A group is never divided: bytes do not depend on
        the number of processes."""
        groups: dict[object, list[list[int]]] = {}
        for index in indexes:
            site = self.sites[index]
            options = tuple(sorted((k, v) for k, v in site.options.items() if k != "rank"))
            alike = groups.setdefault((site.method, site.shape, options), [[]])
            weights = (len(alike[-1]) + 1) * site.shape[0] * site.shape[1]
            if alike[-1] and (not self.together or weights > _TOGETHER):
                alike.append([])
            alike[-1].append(index)
        every = [group for alike in groups.values() for group in alike]
        every.sort()
        return [every[i] for i in self.workers.shared([self._cost(group) for group in every])]

    def _cost(self, group: list[int]) -> float:
        """About what the sites take: decompositions, and the Hessian of their input, which goes by its width."""
        shapes = [self.sites[index].shape for index in group]
        return sum(10.0 * min(shape) ** 3 + shape[0] * shape[1] for shape in shapes) + float(shapes[0][1]) ** 3

    def _site_turn(self, index: int) -> list[tuple[Checkpoint, str]]:
        """The tensors of one site, where it is coded at all."""
        site = self.sites[index]
        if not site.method:
            return []
        return [(self.tuned, site.tensor), *([(self.base, site.reference)] if site.reference is not None else [])]

    def _layer_turn(self, prefix: str, groups: list[list[int]]) -> list[tuple[Checkpoint, str]]:
        """The fine-tune's tensors of a layer, and the base's of those sites that are ours."""
        found = [(self.tuned, name) for name, place in self.places.items() if place.path.startswith(prefix + ".")]
        return found + [pair for group in groups for index in group for pair in self._site_turn(index)]

    # ------------------------------------------------------------------------------------------ sites

    def _encode(self, journal: Journal, group: list[int], grams: dict[str, Gram]) -> None:
        found = [journal.get(index) for index in group]
        if None not in found:
            self.errors |= {index: done[1] for index, done in zip(group, found, strict=True) if done}
            return
        # One site is missing: all are encoded, since on a GPU a site's bits may depend on the group it is in.
        records = [self.sites[index] for index in group]
        if not records[0].method:
            self._keep(journal, group[0], (), 0.0)
            return
        matrices = [inventory.delta_matrix(record, self._old, self._new, self.device) for record in records]
        sites = [
            Site(record.name, matrix, record.role, self._gram(index, grams))
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

    def _gram(self, index: int, grams: dict[str, Gram]) -> Gram | None:
        """The gram of the module whose input the site multiplies."""
        gram = grams.get(input_of(self.places.get(self.sites[index].tensor)) or "")
        if gram is not None and len(gram.matrix) != self.sites[index].shape[1]:
            return None  # of the other side: Llama 4's experts are (in, out), and nothing says so
        return gram

    def _keep(self, journal: Journal, index: int, terms: tuple[Term, ...], error: float) -> None:
        self.errors[index] = error
        self._writing.append(self._writer.submit(lambda: journal.put(index, pack_terms(terms), error)))

    def _flush(self) -> None:
        """Wait until what was kept is in the journal; raises what went wrong there."""
        with clock.step("journal"):
            while self._writing:
                self._writing.pop(0).result()

    def _overwrite(self, journal: Journal, index: int) -> None:
        """Put the compressed weight in the skeleton, where the fine-tune's lies, so that the next layer sees it."""
        site, place = self.sites[index], self.places[self.sites[index].tensor]
        if place.converted or site.reference is None:
            return  # computed from several tensors: the fine-tune's own stays
        rows = inventory.read_matrix(self._old, site.reference, site.reference_part, site, 0, site.shape[0])
        delta = stored_delta(journal, index, site).to(self.device)
        weight = delta.restore(rows.to(self.device), torch.float32)
        parameter = self.model.get_parameter(place.path)
        part = parameter if place.index is None else parameter[place.index]
        part = part if site.part is None else part[site.part]
        part[: site.disk_shape[0]].copy_((weight.T if site.transposed else weight).reshape(site.disk_shape))


def _done(journal: Journal, index: int) -> tuple[bytes, float]:
    done = journal.get(index)
    assert done is not None  # every site has been encoded by now
    return done


def stored_delta(journal: Journal, index: int, site: SiteRecord) -> Delta:
    """The delta of a site that is in the journal."""
    buffer = torch.frombuffer(bytearray(_done(journal, index)[0]) or bytearray(1), dtype=torch.uint8)
    return Delta(site.shape, unpack_terms(buffer, site.terms, site.shape), site.reference, site.gain)
