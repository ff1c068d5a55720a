"""A fine-tune over a base model in memory: the base's parameters stay where and what they are.

`attach` puts the thin modules of attached.py, all over one Delta.apply, around those of a transformers model;
norms, biases and whatever else differs are swapped for their restored values. `detach` takes all of it away
again: every parameter of the base is the same object, bit for bit. `load` does the whole from a folder and a
file.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from bayou import skeleton
from bayou.attached import AttachedEmbedding, AttachedExperts, AttachedLinear, Change, merged
from bayou.borrowed import Borrowed
from bayou.checkpoint import Checkpoint
from bayou.delta import Delta
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput, Unsupported
from bayou.plan import SiteRecord
from bayou.restore import Restorer
from bayou.skeleton import Index, Place

__all__ = ["AttachedEmbedding", "AttachedExperts", "AttachedLinear", "Attachment", "attach", "detach", "load"]


@dataclass
class Attachment:
    """What `attach` did to a model: (object, attribute, what was there before), in that order."""

    done: list[tuple[Any, str, Any]] = field(default_factory=list)

    def put(self, owner: Any, leaf: str, new: Any) -> None:
        """Set an attribute (a module, parameter, buffer or number) and remember the old one."""
        self.done.append((owner, leaf, getattr(owner, leaf)))
        setattr(owner, leaf, new)

    def detach(self) -> None:
        """Put everything back, the last thing first."""
        while self.done:
            owner, leaf, old = self.done.pop()
            setattr(owner, leaf, old)


_MARK = "bayou_attachment"


def attach(model: PreTrainedModel, delta_file: DeltaFile | str | Path) -> Attachment:
    """Make `model`, the base in memory, compute as the fine-tune does; `detach` undoes it.

    The base's parameters are neither copied nor changed. Rows that a vocabulary grew by are served beside the
    base's table, a head that is tied in the base only gets a delta of its own. That `model` holds the right
    base is the caller's word (DeltaFile.check_base compares it on disk); what the fine-tune's config changes
    beyond the vocabulary (rotary base, another architecture around it) needs `load`. Attach to a model that
    is on its device already, and save the fine-tune with `bayou.restore`, not from here. Raises BadInput if
    something is attached, Unsupported for a tensor that cannot be served over this model.
    """
    return _attach(model, delta_file if isinstance(delta_file, DeltaFile) else DeltaFile(delta_file), None)


def detach(model: PreTrainedModel) -> None:
    """Take what `attach` or `load` put around the base away. Raises BadInput if nothing is attached."""
    attachment = getattr(model, _MARK, None)
    if attachment is None:
        raise BadInput("nothing is attached to this model")
    attachment.detach()
    delattr(model, _MARK)


def differences(
    model: PreTrainedModel, file: DeltaFile, *, deltas_on: torch.device | str | None = None
) -> list[tuple[Any, str, Any]]:
    """What `attach` would set on `model`: (object, attribute, new value). Nothing is set.

    deltas_on: where the deltas of linears and embeddings are to lie, beside the base unless given.
    """
    return _Planner(model, file, None, deltas_on=deltas_on).steps()


def _attach(
    model: PreTrainedModel, file: DeltaFile, base: Checkpoint | None, done: frozenset[str] = frozenset()
) -> Attachment:
    """base: given if each parameter of the model holds its own site's reference, as `load` makes them.

    done: tensors that the model computes with already.
    """
    if hasattr(model, _MARK):
        raise BadInput("a fine-tune is attached to this model already; detach it first")
    attachment = Attachment()
    setattr(model, _MARK, attachment)
    try:
        for step in _Planner(model, file, base, done).steps():
            attachment.put(*step)
    except BaseException:
        detach(model)
        raise
    return attachment


class _Planner:
    """Finds all that is to be set on a model, looking at the base only, before anything is set."""

    def __init__(
        self,
        model: PreTrainedModel,
        file: DeltaFile,
        base: Checkpoint | None,
        done: frozenset[str] = frozenset(),
        deltas_on: torch.device | str | None = None,
    ) -> None:
        self.model, self.file, self.base, self.deltas_on = model, file, base, deltas_on
        shared = next((site for site in file.sites.values() if site.anchor and site.tensor not in done), None)
        if shared is not None:
            raise Unsupported(f"{shared.name} shares {shared.anchor}, another layer of its own model; use bayou.load")
        self.sites: dict[str, list[SiteRecord]] = defaultdict(list)
        for site in file.sites.values():
            self.sites[site.tensor].append(site)
        self.finished = done | set(file.unchanged)
        self.places = skeleton.places(model, file.tensors())
        foreign = {s.reference for s in file.sites.values() if s.reference is not None and s.reference != s.tensor}
        self.foreign = skeleton.places(model, foreign) if base is None else {}
        self.planned: list[tuple[Any, str, Any]] = []
        self.parts: dict[Place, list[Change]] = defaultdict(list)  # the index of these places is None
        self.converted: set[str] = set()

    def steps(self) -> list[tuple[Any, str, Any]]:
        """(object, attribute, new value) of all that is to be set."""
        served = [name for name, place in self.places.items() if name not in self.finished and not place.converted]
        device = next(iter(self.model.parameters())).device if self.deltas_on is None else torch.device(self.deltas_on)
        # All at once, since threads read and hash them; a model spread over devices moves some once more.
        self.deltas = self.file.deltas([site.name for name in served for site in self.sites[name]], device)
        for name, place in self.places.items():
            sites = self.sites[name]
            if name in self.finished:
                continue
            if place.converted:
                self._convert(place)
            elif place.index is not None or any(site.part is not None for site in sites):
                self.parts[replace(place, index=None)] += self._changes(name, place)
            elif place.role in ("linear", "head", "embedding") and sites:
                for path in (place.path, *place.also):
                    self._wrap(sites[0], path)
            else:
                self._swap(place, self._whole(name, place))
        experts: dict[str, dict[str, list[Change]]] = defaultdict(dict)
        for place, changes in self.parts.items():
            parent, _, leaf = place.path.rpartition(".")
            if place.role == "expert":
                experts[parent][leaf] = changes
            else:
                self._swap(place, merged(self._get(place.path), changes))
        for path, by_leaf in experts.items():
            self._set(path, AttachedExperts(self.model.get_submodule(path), by_leaf))
        return self.planned

    def _set(self, path: str, new: Any) -> None:
        parent, _, leaf = path.rpartition(".")
        self.planned.append((self.model.get_submodule(parent), leaf, new))

    def _get(self, path: str) -> Tensor:
        parent, _, leaf = path.rpartition(".")
        return getattr(self.model.get_submodule(parent), leaf)

    def _swap(self, place: Place, value: Tensor) -> None:
        old = self._get(place.path)
        if value.shape == old.shape and torch.equal(value, old):
            return  # `load` has put it there already, the base having nothing in its place
        new = nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value
        for path in (place.path, *place.also):
            self._set(path, new)
        self._grow(place.path, len(value) - len(old))

    def _grow(self, path: str, rows: int) -> None:
        """The model's vocabulary is the input table's rows."""
        if rows and self.model.get_submodule(path.rpartition(".")[0]) is self.model.get_input_embeddings():
            text = self.model.config.get_text_config()
            self.planned.append((text, "vocab_size", len(self._get(path)) + rows))

    def _reference(self, site: SiteRecord, place: Place) -> tuple[Tensor, Index | None]:
        """The base's parameter, and its part, that `site` is a difference from."""
        part = site.part
        own = self.base is not None or site.reference is None
        if not own and (site.reference, site.reference_part) != (site.tensor, site.part):
            found = self.foreign.get(str(site.reference)) if site.reference != site.tensor else place
            if found is None or found.converted:
                raise Unsupported(f"{site.name} differs from {site.reference}, which this model lacks; use bayou.load")
            place, part = found, site.reference_part
        return self._get(place.path), place.index if part is None else (part,)

    def _delta(self, site: SiteRecord, device: torch.device) -> Delta:
        if site.name not in self.deltas:
            self.deltas[site.name] = self.file.delta(site.name)
        delta = self.deltas[site.name]  # kept: a tied head is one delta with two uses
        return delta if delta.device == device else delta.to(device)

    def _tail(self, name: str, like: Tensor) -> Tensor | None:
        tail = self.file.tail(name)
        return None if tail is None else self.file.read_exact(tail).to(like.device, like.dtype)

    def _wrap(self, site: SiteRecord, path: str) -> None:
        parent = path.rpartition(".")[0]
        module = self.model.get_submodule(parent)
        base, index = self._reference(site, Place(path, None, "", False, ()))
        if index is not None:
            raise Unsupported(f"{site.name} differs from an expert, {site.reference}; use bayou.load")
        place = base.device if self.deltas_on is None else torch.device(self.deltas_on)
        delta, extra = self._delta(site, place), self._tail(site.name, base)
        kind = AttachedEmbedding if isinstance(module, nn.Embedding) else AttachedLinear
        attached = kind(module, base, delta, extra)
        if not attached.same:
            self._set(parent, attached)
            self._grow(path, attached.rows - len(module.weight))

    def _changes(self, name: str, place: Place) -> list[Change]:
        """The parts of a parameter that the tensor `name` replaces."""
        sites = self.sites[name]
        if not sites:
            exact = self.file.read_exact(name)
            return [Change(place.index, self._get(place.path), None, exact, tuple(exact.shape), False)]
        found = []
        for site in sites:
            base, base_index = self._reference(site, place)
            index = place.index if site.part is None else (site.part,)
            delta = self._delta(site, base.device)
            found.append(Change(index, base, base_index, delta, site.disk_shape, site.transposed))
        return found

    def _whole(self, name: str, place: Place) -> Tensor:
        """The fine-tune's tensor that takes a whole parameter's place."""
        old = self._get(place.path)
        if not self.sites[name]:
            return self.file.read_exact(name).to(old.device, old.dtype)
        (change,) = self._changes(name, place)
        value, tail = change.restore(), self._tail(name, old)
        return value if tail is None else torch.cat([value, tail])

    def _convert(self, place: Place) -> None:
        """Swap parameters that transformers computes from disk tensors: these are restored, then
        converted."""
        if place.path in self.converted:
            return
        if self.base is None:
            raise Unsupported(f"{place.path} is computed from several tensors as it is loaded; use bayou.load")
        self.converted.add(place.path)
        restorer, dtype = Restorer(self.base, self.file), self._get(place.path).dtype
        names = [name for name, other in self.places.items() if other.converted == place.converted]
        tensors = {name: restorer.tensor(name, dtype) for name in names}
        for path, value in skeleton.convert(self.model, tensors).items():
            self._swap(Place(path, None, "other", False, ()), value.to(self._get(path).device))


def read_unplaced(file: DeltaFile, places: Mapping[str, Place]) -> None:
    """Read, and so check, what the model has no use for: damage is refused wherever it is. Raises DamagedFile."""
    for entry in (*file.sites, *file.exact):
        if entry not in places and entry.rpartition("[")[0] not in places:
            file.read_raw(entry)


def load(
    base: str | Path | None,
    file: DeltaFile | str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    base_revision: str | None = None,
) -> PreTrainedModel:
    """The fine-tune as a transformers model: the base's weights, with the deltas of `file` attached.

    Args:
        base: folder or Hub id of the base that the file was made against. A file that leans on none (`bayou share`)
            does without: then it may be None, and is not looked at.
        file: a .bayou file.
        dtype: of the weights in memory and of the arithmetic.
        device: where the model goes.
        base_revision: of the Hub id; the one that the file names by default.

    The model is built from the fine-tune's config, so a grown vocabulary, an untied head and a
    vision-language model over a text base work. `detach` turns it into the base, but for tensors that the
    base has not. A layer that shares another's matrix holds only what it adds (see borrowed.py). A file of
    `--method exact` loads as the fine-tune itself, with nothing attached.

    Raises:
        WrongBase unless the base is the one that the file was made against; BadInput for none where one is
        needed; BadFile, DamagedFile, Unsupported.
    """
    opened = file if isinstance(file, DeltaFile) else DeltaFile(file)
    checkpoint = opened.lean_on(base, base_revision)
    folder = None if checkpoint is None else checkpoint.folder
    model = skeleton.build(opened.fine_tune_config(folder))
    places = skeleton.places(model, opened.tensors())
    read_unplaced(opened, places)
    borrowed = Borrowed(model, places, opened, checkpoint)
    sources = _Sources(opened, checkpoint, borrowed)
    for name, place in places.items():
        if place.index is None and not place.converted and name not in borrowed.factored:
            _reshape(model, place, sources.shape(name))
    borrowed.strip()
    skeleton.fill(model, "", places, sources.read, dtype=dtype, device=device)
    borrowed.attach(dtype, device)
    if "generation_config.json" in opened.files:
        stored = json.loads(opened.read_file("generation_config.json", folder))
        model.generation_config = GenerationConfig.from_dict(stored)
    model.name_or_path = str(opened.path if folder is None else folder)
    if checkpoint is not None and not opened.stepped:
        _attach(model, opened, checkpoint, borrowed.done)
    return model


def _reshape(model: PreTrainedModel, place: Place, shape: tuple[int, ...]) -> None:
    """A base's table of another number of rows stays as it is: the attachment serves the others."""
    for path in (place.path, *place.also):
        parent, _, leaf = path.rpartition(".")
        module = model.get_submodule(parent)
        if leaf in module._parameters and getattr(module, leaf).shape != shape:
            setattr(module, leaf, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))


class _Sources:
    """For each disk name of the fine-tune, the base's tensor that stands in its place in the loaded model.

    It is the site's reference; else the base's tensor of the same name; else, where the base has nothing of
    the kind, the tensor itself.
    """

    def __init__(self, file: DeltaFile, base: Checkpoint | None, borrowed: Borrowed) -> None:
        self.file, self.base, self.borrowed = file, base, borrowed
        self.sites: dict[str, list[SiteRecord]] = defaultdict(list)
        for site in file.sites.values():
            self.sites[site.tensor].append(site)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of what `read` gives."""
        if self.base is None or name in self.borrowed.restored:
            return self.borrowed.shape(name)
        sites = self.sites[name]
        if sites and sites[0].part is not None:
            return (len(sites), *sites[0].disk_shape)
        if sites and sites[0].reference is not None:
            shape = self.base.shape(sites[0].reference)
            return shape if sites[0].reference_part is None else shape[1:]
        if name in self.base:
            return self.base.shape(name)
        return sites[0].disk_shape if sites else self.file.exact_shape(name)

    def read(self, name: str) -> Tensor:
        """The tensor, as it is on disk."""
        if self.base is None or name in self.borrowed.restored:
            return self.borrowed.restore(name)
        sites = self.sites[name]
        if sites and sites[0].part is not None:
            return torch.stack([_read_reference(self.base, site) for site in sites])
        if sites and sites[0].reference is not None:
            return _read_reference(self.base, sites[0])
        return self.base.read(name) if name in self.base else self.file.read_exact(name)


def _read_reference(base: Checkpoint, site: SiteRecord) -> Tensor:
    """The base's tensor, or matrix of one, that a site refers to; zeros if it refers to none."""
    if site.reference is None:
        return torch.zeros(site.disk_shape)
    if site.reference_part is None:
        return base.read(site.reference)
    return base.read(site.reference, site.reference_part, site.reference_part + 1)[0]
