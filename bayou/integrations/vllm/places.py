"""Where the tensors of a checkpoint lie in vLLM's model, and what a file changes there.

vLLM fuses matrices that a checkpoint has apart (q, k and v; gate and up): a tensor is then some rows of a parameter.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayou.deltafile import DeltaFile
from bayou.errors import Unsupported
from bayou.integrations.vllm.rows import Cut, Part
from bayou.packed import moved, tensors_in

HEAD = "lm_head"


@dataclass(frozen=True)
class Spot:
    """The parameter `leaf` of the module `path`, or of its projection number `part`.

    kind: linear, embedding, head or norm. shape: of the tensor in a checkpoint. tied: path of the module whose
    parameter this is.
    """

    path: str
    leaf: str
    kind: str
    part: int
    shape: tuple[int, ...]
    tied: str


@dataclass(frozen=True, eq=False)
class Own:
    """What one tenant has otherwise, in one memory.

    parts: path of a linear, embedding or head -> its projections' changes, None where there is none. norms: path of a
    normalisation -> its parameters, whole.
    """

    parts: Mapping[str, tuple[Part | None, ...]]
    norms: Mapping[str, dict[str, Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._tensors()}
        return sum(storages.values())

    def _tensors(self) -> Iterator[Tensor]:
        for parts in self.parts.values():
            yield from tensors_in(parts)
        for values in self.norms.values():
            yield from values.values()

    def to(self, device: torch.device) -> "Own":
        """The same on another device; what stands twice here (a tied head) does so there."""
        known: dict[int, Part | None] = {}

        def one(part: Part | None) -> Part | None:
            if id(part) not in known:
                known[id(part)] = moved(part, device)
            return known[id(part)]

        parts = {path: tuple(one(part) for part in found) for path, found in self.parts.items()}
        norms = {path: {leaf: t.to(device) for leaf, t in values.items()} for path, values in self.norms.items()}
        return Own(parts, norms)


class Places:
    """The spots of a model of vLLM, by the names that a checkpoint gives its tensors.

    model: as vLLM has loaded it. linear, table: vLLM's classes of linear layers and of embeddings, heads among them.
    """

    def __init__(self, model: nn.Module, linear: type, table: type) -> None:
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        self._renamed: Callable[[str], str | None] = str if mapper is None else mapper.get_rename_mapper().map_name
        fused: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
        self.modules: dict[str, nn.Module] = {}
        self.cuts: dict[str, list[Cut]] = {}
        self.split: set[str] = set()
        """Linear layers that are given a part of their input each process."""
        self._spots: dict[str, Spot] = {}
        owners: dict[int, str] = {}
        for path, module in model.named_modules():
            parameters = dict(module.named_parameters(recurse=False))
            if isinstance(module, linear):
                self._add_linear(path, module, fused)
            elif isinstance(module, table) and "weight" in parameters:
                tied = owners.setdefault(id(parameters["weight"]), path)
                self._add_table(path, module, parameters, tied)
            elif (
                parameters and "norm" in type(module).__name__.lower() and all(p.ndim == 1 for p in parameters.values())
            ):
                self.modules[path] = module
                for leaf, p in parameters.items():
                    self._spots[f"{path}.{leaf}"] = Spot(path, leaf, "norm", 0, tuple(p.shape), path)

    def _add_table(self, path: str, module: Any, parameters: Mapping[str, Tensor], tied: str) -> None:
        rows, kind = int(module.org_vocab_size), "embedding"  # it may have rows more, which are nobody's
        cut = Cut(0, rows, 0, rows)
        if path.rpartition(".")[2] == HEAD:
            kind = "head"
            if module.tp_size > 1:
                held = module.shard_indices
                first, last = held.org_vocab_start_index, min(held.org_vocab_end_index, rows)
                cut = Cut(0, max(0, last - first), first, rows)
        self.modules[path], self.cuts[path] = module, [cut]
        for leaf, p in parameters.items():
            self._spots[f"{path}.{leaf}"] = Spot(path, leaf, kind, 0, (rows, *p.shape[1:]), tied)

    def _add_linear(self, path: str, module: Any, fused: Mapping[str, list[str]]) -> None:
        parent, _, leaf = path.rpartition(".")
        sizes = _sizes(module)
        names = fused.get(leaf, [])
        if sizes is None:
            return
        if len(names) < 2:
            if len(sizes) > 1 and module.tp_size > 1:
                return  # each process has rows of it here and there
            names, sizes = [leaf], [(sum(mine for mine, _, _ in sizes), sizes[0][1], sum(size for _, _, size in sizes))]
        if len(names) != len(sizes):
            return  # fused in another way than by rows; a file that changes it is refused
        self.modules[path], self.cuts[path], start = module, [], 0
        if hasattr(module, "input_is_parallel") and module.tp_size > 1:
            self.split.add(path)
        for i, (name, (mine, first, size)) in enumerate(zip(names, sizes, strict=True)):
            self.cuts[path].append(Cut(start, start + mine, first, size))
            start += mine
            for kind, shape in (("weight", (size, int(module.input_size))), ("bias", (size,))):
                self._spots[".".join(filter(None, (parent, name, kind)))] = Spot(path, kind, "linear", i, shape, path)

    def keep(self, paths: set[str]) -> None:
        """Forget the modules but `paths`: a run of the model has not called them with a row a token."""
        self._spots = {name: spot for name, spot in self._spots.items() if spot.path in paths}
        self.modules = {path: module for path, module in self.modules.items() if path in paths}
        self.cuts = {path: cuts for path, cuts in self.cuts.items() if path in paths}

    def spot(self, tensor: str) -> Spot | None:
        """Where the tensor of a checkpoint lies."""
        return self._spots.get(self._renamed(tensor) or "")

    @property
    def head(self) -> Spot | None:
        """The head's weight."""
        return next((s for s in self._spots.values() if s.kind == "head" and s.leaf == "weight"), None)

    def read(self, file: DeltaFile, dtype: torch.dtype) -> Own:
        """What a file changes, in the CPU's memory; every entry that is read is checked.

        dtype: of vLLM's parameters. Raises DamagedFile, and Unsupported, naming the tensor, for what cannot differ from
        row to row.
        """
        deltas = file.deltas(file.sites)
        parts: dict[str, list[Part | None]] = {}
        norms: dict[str, dict[str, Tensor]] = {}
        for name, site in file.sites.items():
            spot = self._checked(file, site.tensor, site.disk_shape[::-1] if site.transposed else site.disk_shape)
            if site.part is not None or spot.kind == "norm" or spot.leaf != "weight":
                raise Unsupported(f"{file.path}: {name} cannot differ from row to row in vLLM; use bayou serve")
            gain = self._gain(file, site.tensor, site.reference, site.gain, spot)
            if deltas[name].terms or gain != 1:
                self._put(parts, spot, Part(deltas[name], gain))
        for name in file.exact:
            spot = self._checked(file, name, file.exact_shape(name))
            value = file.read_exact(name).to(dtype)
            module = self.modules[spot.path]
            if spot.kind == "norm":
                norms.setdefault(spot.path, {})[spot.leaf] = value
            elif spot.leaf == "weight":
                self._put(parts, spot, Part(whole=value[self.cuts[spot.path][spot.part].mine].clone()))
            else:
                cut = self.cuts[spot.path][spot.part]
                old: Tensor = module.bias[cut.start : cut.stop]  # type: ignore[index]
                self._put_bias(parts, spot, value[cut.mine] - old.cpu())
        self._tie(file, parts)
        return Own({path: tuple(found) for path, found in parts.items()}, norms)

    def _checked(self, file: DeltaFile, tensor: str, shape: tuple[int, ...]) -> Spot:
        spot = self.spot(tensor)
        grown = tensor.endswith(":]") or file.tail(tensor) is not None
        if grown or (spot is not None and len(shape) == len(spot.shape) and shape[0] != spot.shape[0]):
            raise Unsupported(
                f"{file.path}: {tensor.partition('[')[0]} has another number of rows than the base's; vLLM has one "
                "vocabulary for all models; use bayou serve"
            )
        if spot is None or shape != spot.shape:
            raise Unsupported(f"{file.path}: {tensor} {shape} cannot differ from row to row in vLLM; use bayou serve")
        return spot

    def _gain(self, file: DeltaFile, tensor: str, reference: str | None, gain: float, spot: Spot) -> float:
        if reference is None:
            return 0.0
        base = self.spot(reference)
        if base is None or (base.tied, base.part) != (spot.tied, spot.part):
            raise Unsupported(f"{file.path}: {tensor} differs from {reference}, which is not in its place in vLLM")
        return gain

    def _put(self, parts: dict[str, list[Part | None]], spot: Spot, part: Part) -> None:
        mine = parts.setdefault(spot.path, [None] * len(self.cuts[spot.path]))
        old = mine[spot.part]
        mine[spot.part] = part if old is None else Part(part.delta, part.gain, part.whole, old.bias)

    def _put_bias(self, parts: dict[str, list[Part | None]], spot: Spot, bias: Tensor) -> None:
        mine = parts.setdefault(spot.path, [None] * len(self.cuts[spot.path]))
        old = mine[spot.part] or Part()
        mine[spot.part] = Part(old.delta, old.gain, old.whole, bias)

    def _tie(self, file: DeltaFile, parts: dict[str, list[Part | None]]) -> None:
        """A head that is the base's embedding, and no tensor of the fine-tune's own, changes as the embedding does."""
        head = self.head
        if head is None or head.tied == head.path or any(self.spot(name) == head for name in file.tensors()):
            return
        (part,), (cut,) = parts.get(head.tied, [None]), self.cuts[head.path]
        if part is not None and part.whole is not None and not cut.all:
            part = Part(whole=part.whole[cut.mine].clone())
        if part is not None:
            parts[head.path] = [part]


def _sizes(module: Any) -> list[tuple[int, int, int]] | None:
    """Of each projection of a linear layer: the rows that this process has, the first of them, all rows. None where it
    has another share of them than vLLM's usual one, or gives sums that are not complete yet.
    """
    size, rank = getattr(module, "tp_size", 1), getattr(module, "tp_rank", 0)
    every: list[int] = list(getattr(module, "output_sizes", None) or [module.output_size])
    if size == 1 or not (hasattr(module, "gather_output") or hasattr(module, "input_is_parallel")):
        return [(each, 0, each) for each in every]
    if hasattr(module, "input_is_parallel"):
        return [(each, 0, each) for each in every] if module.reduce_results and module.input_is_parallel else None
    if module.gather_output:
        return None
    if hasattr(module, "num_kv_head_replicas"):
        queries, keys = module.num_heads * module.head_size, module.num_kv_heads * module.head_size
        values, place = module.num_kv_heads * module.v_head_size, rank // module.num_kv_head_replicas
        heads = module.total_num_kv_heads // module.num_kv_heads
        return [(queries, rank * queries, size * queries), (keys, place * keys, heads * keys)] + [
            (values, place * values, heads * values)
        ]
    return [(each // size, rank * (each // size), each) for each in every]


def footprint(file: DeltaFile, dtype: torch.dtype) -> int:
    """Bytes that a file's tensors take in memory, as its header says."""
    exact = sum(torch.Size(file.exact_shape(name)).numel() for name in file.exact if not name.startswith("."))
    return sum(site.nbytes for site in file.sites.values()) + exact * dtype.itemsize
