"""A fine-tune as what a LoRA adapter can carry of it: a low-rank change of each of the base's matrices, and the rest.

An adapter says W = base + B @ A for the linears of the base, at 16 bits or more, one rank a matrix. So of a .bayou
file the linears go in, cut to a rank where one is asked for; embeddings and head where asked; norms and biases only as
whole modules, which PEFT alone loads; new rows of a vocabulary, experts and changes of the config not at all. What is
lost is measured: the share of the delta's squared norm ("energy") that arrives, for each kind of tensor.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayou import preflight, skeleton
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput, Unsupported
from bayou.integrations.difference import Change, Differences
from bayou.inventory import natural
from bayou.skeleton import Place

Progress = Callable[[str, int, int], None]

EMBEDDINGS = ("leave", "lora", "full")
TABLES = ("embedding", "head")
_NO_MATTER = {
    *("_from_model_config", "_name_or_path", "architectures", "bos_token_id", "dtype", "pad_token_id"),
    *("tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache", "vocab_size"),
}
"""Keys of a config that do not change what a model says, or that the tensors speak for."""


@dataclass
class Kind:
    """What became of the tensors of a kind; delta, lost and base are squared norms (lost: of what does not arrive)."""

    tensors: int = 0
    how: set[str] = field(default_factory=set)
    ranks: list[int] = field(default_factory=list)
    delta: float = 0.0
    lost: float = 0.0
    base: float = 0.0

    def report(self) -> dict[str, Any]:
        """As plain data; energy: share of the delta's squared norm that arrives; relative: norm of delta over base."""
        return {
            "tensors": self.tensors,
            "how": ", ".join(sorted(self.how)),
            "ranks": [min(self.ranks), max(self.ranks)] if self.ranks else None,
            "energy": 1 - self.lost / self.delta if self.delta else 1.0,
            "relative": (self.delta / self.base) ** 0.5 if self.base else None,
        }


class Adapter:
    """What a LoRA adapter takes of a file: its LoRAs, its whole modules, and what it has to leave.

    Args:
        base: folder or Hub id of the base that the file was made against.
        rank: of every LoRA whose delta has as many; None keeps each matrix's own.
        embeddings: "leave" them and the head, take them as "lora", or "full" (with the rows that a vocabulary grew by).
        exact: also take norms, biases and other small modules, exactly.
        device: where the decompositions run.

    loras: changes that are a LoRA. whole: changes that go as they are, and modules: path of each module that does ->
    {parameter: disk name in the fine-tune}. biases: path of a LoRA's module -> the change of its bias. left: changes
    that are not taken. new_rows: rows of the vocabulary that are not. kinds: what `lora` and `measure` have counted.

    Raises WrongBase, BadFile, DamagedFile; Unsupported for a file that is no difference from a base, or whose
    fine-tune has another architecture; BadInput for a rank that is none, or that is needed and not given.
    """

    def __init__(
        self,
        base: str | Path,
        file: str | Path,
        *,
        rank: int | None = None,
        embeddings: str = "leave",
        exact: bool = False,
        base_revision: str | None = None,
        device: str = "cpu",
    ) -> None:
        if rank is not None and rank < 1:
            raise BadInput(f"--rank {rank}: a LoRA has rank 1 at least")
        if embeddings not in EMBEDDINGS:
            raise BadInput(f"--embeddings {embeddings}: choose {', '.join(EMBEDDINGS)}")
        preflight.check_device(device)
        self.file, self._rank = DeltaFile(file), rank
        self.file.check_linear()
        shared = any(site.anchor is not None for site in self.file.sites.values())
        checkpoint = None if shared else self.file.lean_on(base, base_revision)
        if checkpoint is None:
            raise Unsupported(
                f"{file} is a whole model of its own (bayou share), not a difference from a base: no adapter can stand "
                f"for it. Make an ordinary model of it: bayou restore {file} -o FOLDER"
            )
        self.base = checkpoint
        self.model = skeleton.build(self.base.folder)
        tuned = skeleton.build(self.file.fine_tune_config(self.base.folder))
        odd = sorted(tuned.state_dict().keys() ^ self.model.state_dict().keys(), key=natural)
        if type(tuned) is not type(self.model) or odd:
            where = f" (the first difference: {odd[0]})" if odd else ""
            raise Unsupported(
                f"the fine-tune is a {type(tuned).__name__}, its base a {type(self.model).__name__} of other "
                f"parameters{where}: an adapter cannot carry that; use bayou restore"
            )
        self.differences = Differences(self.file, self.base, device)
        self.restorer = self.differences.restorer
        self._there = {
            path: name
            for name, place in skeleton.places(self.model, self.base.names()).items()
            if place.index is None and not place.converted
            for path in (place.path, *place.also)
        }
        self.loras: list[Change] = []
        self.modules: dict[str, dict[str, str]] = {}
        self.biases: dict[str, Change] = {}
        self.left: list[Change] = []
        self.new_rows = 0
        self.kinds: dict[str, Kind] = {}
        self.whole: list[Change] = []
        self._sort(skeleton.places(tuned, self.file.tensors()), embeddings, exact)
        if not self.loras:
            raise BadInput(f"{file} changes no matrix that a LoRA could carry; use bayou restore")

    def config_changes(self) -> list[str]:
        """Where the fine-tune's model is set up otherwise than the base's: "config.json rope_theta", ..."""

        def flat(config: dict[str, Any], prefix: str) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for key, value in config.items():
                if key not in _NO_MATTER:
                    found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
            return found

        changed: set[str] = set()
        for name in ("config.json", "generation_config.json"):
            path = self.base.folder / name
            ours = self.file.read_file(name, self.base.folder) if name in self.file.files else b"{}"
            theirs = path.read_bytes() if path.is_file() else b"{}"
            new, old = (flat(_settings(content), f"{name} ") for content in (ours, theirs))
            changed |= {key for key in new.keys() | old.keys() if new.get(key) != old.get(key)}
        return sorted(changed)

    # ------------------------------------------------------------------------------------- what goes where

    def _changes(self, places: dict[str, Place]) -> Iterator[Change]:
        """Each parameter that is not the base's; a table that a head is tied to is one for either use."""
        for tensor in sorted(places, key=natural):
            place = places[tensor]
            plain = place.index is None and not place.converted
            for path in (place.path, *place.also):
                base = self._there.get(path) if plain else tensor if tensor in self.base else None
                if not self.differences.equal(tensor, base):
                    kind = "head" if place.role == "embedding" and path != place.path else place.role
                    yield Change(tensor, path, base, kind, place.transposed)

    def _sort(self, places: dict[str, Place], embeddings: str, exact: bool) -> None:
        by_path = {path: name for name, place in places.items() for path in (place.path, *place.also)}
        for change in self._changes(places):
            module = self.model.get_submodule(change.module)
            small = change.kind in ("norm", "bias", "other") and change.base is not None
            if change.kind in TABLES and embeddings != "full":
                self.new_rows = max(self.new_rows, self.rows_beyond(change))
            if change.kind == "linear" or (change.kind in TABLES and embeddings == "lora"):
                self._take(change)
            elif exact and change.kind == "bias" and skeleton.is_linear(module):
                self.biases[change.module] = change
            elif (change.kind in TABLES and embeddings == "full") or (exact and small and not any(module.children())):
                leaves = [leaf for leaf, _ in module.named_parameters(recurse=False)]
                self.modules[change.module] = {leaf: by_path[f"{change.module}.{leaf}"] for leaf in leaves}
                self.whole.append(change)
            else:
                self.left.append(change)
        targets = {change.module for change in self.loras}
        for path in [path for path in self.biases if path not in targets]:
            if path in self.modules:
                self.whole.append(self.biases.pop(path))
                continue
            # PEFT knows a bias only as that of a LoRA: one that changes nothing bears it.
            weight = f"{path}.weight"
            place = places[by_path[weight]]
            self._take(Change(by_path[weight], weight, self._there[weight], place.role, place.transposed), least=1)

    def rows_beyond(self, change: Change) -> int:
        """Rows that the fine-tune's tensor has more than the base's."""
        rows = self.restorer.spec(change.tensor)[1][0]
        return rows - self.base.shape(change.base)[0] if change.base is not None else 0

    def _take(self, change: Change, least: int = 0) -> None:
        """Make a LoRA of the change, or leave it where it has no rank at all."""
        if change.base is None:
            raise Unsupported(f"the base has nothing where the fine-tune has {change.tensor}; use bayou restore")
        shape = self._oriented(self.base.shape(change.base), change)
        tuned = self._oriented(self.restorer.spec(change.tensor)[1], change)
        if tuned[1] != shape[1] or tuned[0] < shape[0] or (tuned[0] > shape[0] and change.kind not in TABLES):
            raise Unsupported(f"{change.tensor} is {tuned}, the base has {shape} there; use bayou restore")
        own = self.differences.rank(change)
        if own is None and self._rank is None:
            way = next((site.method for site in self.differences.sites.get(change.tensor, ())), "exact")
            raise BadInput(
                f"{change.tensor} is stored element by element ({way}), so its delta has no rank of its own; "
                f"give one with --rank, 1 to {min(shape)}"
            )
        rank = max(min(rank for rank in (self._rank, own, *shape) if rank is not None), least)
        (self.loras if rank else self.left).append(replace(change, rank=rank, shape=shape))

    def _oriented(self, disk: tuple[int, ...], change: Change) -> tuple[int, int]:
        return (disk[1], disk[0]) if change.transposed else (disk[0], prod(disk[1:]))

    # --------------------------------------------------------------------------------------------- numbers

    def lora(self, change: Change, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """A (rank, in) and scale * B (out, rank), in `dtype`, of the best B @ A; counts what that loses.

        Raises BadInput where `dtype` overflows.
        """
        best = self.differences.best(change, dtype, scale)
        self._count(change, "LoRA", best.norm, best.lost)
        return best.a, best.b

    def bias(self, change: Change) -> Tensor:
        """The change of a bias, fp32."""
        assert change.base is not None  # `_sort` leaves others out
        return self.restorer.tensor(change.tensor, torch.float32) - self.base.read(change.base).float()

    def measure(self) -> None:
        """Count what goes whole and what is left out."""
        for change in (*self.whole, *self.biases.values()):
            self._count(change, "exact", self.differences.norm(change), 0.0)
        for change in self.left:
            norm = self.differences.norm(change)
            self._count(change, "left out", norm, norm)

    def _count(self, change: Change, how: str, delta: float, lost: float) -> None:
        kind = self.kinds.setdefault(change.kind, Kind())
        kind.tensors += 1
        kind.how.add(how)
        kind.ranks += [change.rank] if change.rank else []
        kind.delta += delta
        kind.lost += lost
        kind.base += self.differences.base_norm(change)


def _settings(content: bytes) -> dict[str, Any]:
    """What a JSON file says; nothing where it is not JSON, which nobody's model then heeds."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
