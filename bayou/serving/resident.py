"""What one tenant has otherwise than the base, ready to be computed with, and how it moves between memories.

The plan of attach.py says what would be set on the base; here it stays beside it, by the path of the module. Tensors
that are cut out of one buffer (the sections of a site) stay so wherever they go: kernels read them at equal distances.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from bayou import skeleton
from bayou.attach import differences, read_unplaced
from bayou.attached import AttachedEmbedding, AttachedExperts, AttachedLinear
from bayou.delta import Term
from bayou.deltafile import DeltaFile
from bayou.errors import BadFile, Unsupported
from bayou.packed import Packed, tensors_in, with_tensors

_SAME_MODEL = frozenset(
    {
        *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "tie_word_embeddings"),
        *("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "initializer_range", "auto_map"),
        *("max_position_embeddings", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
        *("task_specific_params", "pretraining_tp", "output_router_logits", "router_aux_loss_coef", "unsloth_version"),
    }
)
"""Fields of a config that may differ: they are served from elsewhere, or matter in training only."""


@dataclass(frozen=True, eq=False)
class Resident:
    """A tenant's differences in one memory.

    modules: path of a linear, embedding or experts module of the base -> what stands around it. tensors: path of any
    other module -> its parameters that differ, whole. rows: of the input embedding, the grown ones among them. slot:
    the tenant's line in the router's tables, which it has while it is on the device; 0 is the base's own.
    """

    modules: dict[str, nn.Module]
    tensors: dict[str, dict[str, Tensor]]
    rows: int
    slot: int = -1

    @cached_property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._each()}
        return sum(storages.values())

    def _each(self) -> Iterator[Tensor]:
        for module in self.modules.values():
            yield from tensors_in(_held(module))
        for leaves in self.tensors.values():
            yield from leaves.values()

    def to(self, device: torch.device | str) -> "Resident":
        """The same on another device, without a slot."""
        target = torch.device(device)
        return self._mapped(lambda whole: whole.to(target))

    def pinned(self) -> "Resident":
        """The same in page-locked memory of the CPU, from which a copy to the device does not hold up anyone."""
        return self._mapped(lambda whole: whole.cpu().pin_memory())

    def copy(self) -> "Resident":
        """The same in memory of its own, without a slot."""
        return self._mapped(torch.clone)

    def unpacked(self) -> "Resident":
        """The same with every factor as the fp32 numbers that it decodes to: faster on a CPU, and many times larger."""
        known: dict[int, Packed] = {}

        def floats(value: Any) -> Any:
            if isinstance(value, Packed):
                if id(value) not in known:
                    known[id(value)] = Packed.floats(value.unpack(), "f32")
                return known[id(value)]
            if isinstance(value, tuple):
                return tuple(floats(item) for item in value)
            if isinstance(value, Term):
                return replace(value, **{f.name: floats(getattr(value, f.name)) for f in fields(value)})
            return value

        def module(old: nn.Module) -> nn.Module:
            if isinstance(old, AttachedLinear | AttachedEmbedding):
                return type(old)(old.inner, old.base, replace(old.delta, terms=floats(old.delta.terms)), old.extra)
            return old  # experts are restored as wholes, which needs the factors in fp64 anyway

        return replace(self, modules={path: module(old) for path, old in self.modules.items()})

    def _mapped(self, move: Callable[[Tensor], Tensor]) -> "Resident":
        buffers: dict[int, Tensor] = {}

        def moved(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in buffers:
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                buffers[storage.data_ptr()] = move(whole)
            start = tensor.storage_offset() * tensor.itemsize
            stop = len(buffers[storage.data_ptr()]) // tensor.itemsize * tensor.itemsize
            typed = buffers[storage.data_ptr()][start % tensor.itemsize : stop].view(tensor.dtype)
            return typed.as_strided(tensor.shape, tensor.stride(), start // tensor.itemsize)

        modules = {path: _rebuilt(module, moved) for path, module in self.modules.items()}
        tensors = {path: {leaf: moved(t) for leaf, t in leaves.items()} for path, leaves in self.tensors.items()}
        return replace(self, modules=modules, tensors=tensors, slot=-1)


def _held(module: nn.Module) -> Any:
    if isinstance(module, AttachedLinear | AttachedEmbedding):
        return module.delta, module.extra
    assert isinstance(module, AttachedExperts)
    return tuple(change.value for changes in module.changes.values() for change in changes)


def _rebuilt(module: nn.Module, move: Callable[[Tensor], Tensor]) -> nn.Module:
    def through(value: Any) -> Any:
        return with_tensors(value, map(move, tensors_in(value)))

    if isinstance(module, AttachedLinear | AttachedEmbedding):
        delta, extra = through((module.delta, module.extra))
        return type(module)(module.inner, module.base, delta, extra)
    assert isinstance(module, AttachedExperts)
    changes = {
        leaf: [replace(change, value=through(change.value)) for change in parts]
        for leaf, parts in module.changes.items()
    }
    return AttachedExperts(module.inner, changes)


def read(base: PreTrainedModel, file: DeltaFile, routed: Mapping[str, nn.Module]) -> Resident:
    """The tenant of a file, its deltas in the CPU's memory; every entry that is read is checked.

    base: the model as it is, nothing attached, and never run. routed: path -> module of the tree that runs, of those
    that may differ from row to row; what is read stands around these, for a step may swap a module's parameters for a
    moment while the next tenant is read. Raises DamagedFile, and Unsupported for what cannot be served over this base.
    """
    places = skeleton.places(base, file.tensors())
    read_unplaced(file, places)
    rounded = {path for path, parameter in base.named_parameters() if parameter.is_meta}
    for name in file.exact:
        if name in places and places[name].path in rounded:
            raise Unsupported(f"{file.path}: {name} is stored as a whole, which a base in 4 bits has no place for")
    paths = {id(module): path for path, module in base.named_modules()}
    embedding = base.get_input_embeddings()
    modules: dict[str, nn.Module] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    rows = len(embedding.weight)
    for owner, leaf, value in differences(base, file, deltas_on="cpu"):
        if id(owner) not in paths:
            continue  # the config's vocab_size: here the tables themselves tell
        parent = paths[id(owner)]
        path = ".".join(filter(None, (parent, leaf))) if isinstance(value, nn.Module) else parent
        if path not in routed:
            raise Unsupported(f"{file.path}: {path}.{leaf} differs from the base's, and cannot differ from row to row")
        if isinstance(value, nn.Module):
            if isinstance(value, AttachedLinear) and value.base.is_meta and not value.aligned:
                raise Unsupported(f"{file.path}: {path} differs from a matrix that a base in 4 bits does not hold")
            value.inner = routed[path]
            modules[path] = value
            grown = getattr(value, "rows", rows)
        else:
            tensors.setdefault(path, {})[leaf] = value.data
            grown = len(value)
        if path == paths[id(embedding)]:
            rows = grown
    both = [path for path in tensors if isinstance(modules.get(path), AttachedExperts)]
    if both:
        raise Unsupported(
            f"{file.path}: {both[0]} has experts and {', '.join(tensors[both[0]])} that differ; use bayou.load"
        )
    return Resident(modules, tensors, rows)


def check_config(base: dict[str, Any], tuned: dict[str, Any], path: object) -> None:
    """Raises Unsupported, naming the fields, where the fine-tune's config asks for another computation."""
    kinds = base.get("model_type"), tuned.get("model_type")
    if kinds[0] != kinds[1] or kinds[0] not in CONFIG_MAPPING:
        raise Unsupported(
            f"{path}: a {kinds[1]!r:.60} is not served over a {kinds[0]!r:.60}; bayou.load can serve it alone"
        )
    try:  # as transformers reads them: files of several versions say the same in several ways
        old, new = (CONFIG_MAPPING[kinds[0]].from_dict(copy.deepcopy(raw)).to_dict() for raw in (base, tuned))
    except Exception as error:  # a config class may raise anything for a value that makes no sense
        raise BadFile(f"{path}: its config.json cannot be used ({error!s:.200})") from None
    if new.get("tie_word_embeddings") and not old.get("tie_word_embeddings"):
        raise Unsupported(f"{path}: its head is its embedding, not so the base's; bayou.load can serve it alone")
    words = sorted(key for key in {*old, *new} - _SAME_MODEL if old.get(key) != new.get(key))
    if words:
        told = ", ".join(f"{key} {new.get(key)!r:.60} (base: {old.get(key)!r:.60})" for key in words[:3])
        raise Unsupported(f"{path}: its config differs from the base's in {told}; bayou.load can serve it alone")
