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
from bayou.integrations.vllm.rows import Part
from bayou.packed import moved, tensors_in

HEAD = "lm_head"


@dataclass(frozen=True)
class Spot:
    """Rows start to stop of the parameter `leaf` of the module `path`, which is its projection number `part`.

    kind: linear, embedding, head or norm. tied: path of the module whose parameter this is.
    """

    path: str
    leaf: str
    kind: str
    part: int
    start: int
    stop: int
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
        self.cuts: dict[str, list[tuple[int, int]]] = {}
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
                    self._spots[f"{path}.{leaf}"] = Spot(path, leaf, "norm", 0, 0, len(p), tuple(p.shape), path)

    def _add(self, path: str, module: nn.Module, cuts: list[tuple[int, int]]) -> None:
        self.modules[path], self.cuts[path] = module, cuts

    def _add_table(self, path: str, module: Any, parameters: Mapping[str, Tensor], tied: str) -> None:
        kind = "head" if path.rpartition(".")[2] == HEAD else "embedding"
        self._add(path, module, [(0, module.org_vocab_size)])  # it may have rows more, which are nobody's
        for leaf, p in parameters.items():
            shape = (module.org_vocab_size, *p.shape[1:])
            self._spots[f"{path}.{leaf}"] = Spot(path, leaf, kind, 0, 0, shape[0], shape, tied)

    def _add_linear(self, path: str, module: Any, fused: Mapping[str, list[str]]) -> None:
        parent, _, leaf = path.rpartition(".")
        names = fused.get(leaf, [])
        sizes = list(getattr(module, "output_sizes", None) or [module.output_size])
        if len(names) < 2:
            names, sizes = [leaf], [sum(sizes)]
        if len(names) != len(sizes):
            return  # fused in another way than by rows; a file that changes it is refused
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        cuts = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self._add(path, module, cuts)
        for i, (name, (start, stop)) in enumerate(zip(names, cuts, strict=True)):
            for kind, shape in (("weight", (stop - start, int(module.input_size))), ("bias", (stop - start,))):
                spot = Spot(path, kind, "linear", i, start, stop, shape, path)
                self._spots[".".join(filter(None, (parent, name, kind)))] = spot

    def keep(self, paths: set[str]) -> None:
        """Forget the modules but `paths` and the head: a run of the model has not called them with a row a token."""
        silent = {path for path in self.modules if path not in paths and path.rpartition(".")[2] != HEAD}
        self._spots = {name: spot for name, spot in self._spots.items() if spot.path not in silent}
        for path in silent:
            del self.modules[path]
            self.cuts.pop(path, None)

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
                self._put(parts, spot, Part(whole=value))
            else:
                old: Tensor = module.bias[spot.start : spot.stop]  # type: ignore[index]
                self._put_bias(parts, spot, value - old.cpu())
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
        if base is None or (base.tied, base.start, base.stop) != (spot.tied, spot.start, spot.stop):
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
        if head.tied in parts:
            parts[head.path] = parts[head.tied]


def footprint(file: DeltaFile, dtype: torch.dtype) -> int:
    """Bytes that a file's tensors take in memory, as its header says."""
    exact = sum(torch.Size(file.exact_shape(name)).numel() for name in file.exact if not name.startswith("."))
    return sum(site.nbytes for site in file.sites.values()) + exact * dtype.itemsize
