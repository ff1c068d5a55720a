"""A fine-tune as what a LoRA adapter can carry of it: a low-rank change of each of the base's matrices, and the rest.

An adapter says W = base + B @ A for the linears of the base, at 16 bits or more, one rank a matrix. So of a .bayou
file the linears go in, cut to a rank where one is asked for; embeddings and head where asked; norms and biases only as
whole modules, which PEFT alone loads; new rows of a vocabulary, experts and changes of the config not at all. What is
lost is measured: the share of the delta's squared norm ("energy") that arrives, for each kind of tensor.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayou import preflight, skeleton
from bayou.decompose import Matrix, svd
from bayou.delta import LowRank
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput, Unsupported
from bayou.inventory import natural, read_matrix
from bayou.plan import SiteRecord
from bayou.restore import Restorer
from bayou.skeleton import Place

EMBEDDINGS = ("leave", "lora", "full")
TABLES = ("embedding", "head")
_BLOCK = 2**24  # numbers of a base's tensor read at a time
_NO_MATTER = {
    *("_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
    *("torch_dtype", "transformers_version", "use_cache", "vocab_size"),
}
"""Keys of a config that do not change what a model computes, or that the tensors speak for."""


@dataclass(frozen=True)
class Change:
    """A parameter of the base that the fine-tune has otherwise.

    tensor: its disk name in the fine-tune. path: the parameter in the model. base: the disk name of what the base has
    there; None where it has nothing to compare with. kind: linear, embedding, head, expert, norm, bias or other.
    transposed: on disk it is (in, out). rank: that of its LoRA, 0 where it is none. shape: (out, in) of the LoRA.
    """

    tensor: str
    path: str
    base: str | None
    kind: str
    transposed: bool
    rank: int = 0
    shape: tuple[int, int] = (0, 0)

    @property
    def module(self) -> str:
        """Path of the module that the parameter belongs to."""
        return self.path.rpartition(".")[0]


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

    loras: changes that are a LoRA. modules: path of each module that goes whole -> {parameter: disk name in the
    fine-tune}. biases: path of a LoRA's module -> the change of its bias. left: changes that are not taken. new_rows:
    rows of the vocabulary that are not. kinds: what `lora` and `measure` have seen so far.

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
        self.file, self.device, self._rank = DeltaFile(file), device, rank
        shared = any(site.anchor is not None for site in self.file.sites.values())
        checkpoint = None if shared else self.file.lean_on(base, base_revision)
        if checkpoint is None:
            raise Unsupported(
                f"{file} is a whole model of its own (bayou share), not a difference from a base: no adapter can stand "
                f"for it. Make an ordinary model of it: bayou restore {file} -o FOLDER"
            )
        self.base = checkpoint
        self.config = self.file.fine_tune_config(self.base.folder)
        self.model = skeleton.build(self.base.folder)
        tuned = skeleton.build(self.config)
        if type(tuned) is not type(self.model):
            raise Unsupported(
                f"the fine-tune is a {type(tuned).__name__}, its base a {type(self.model).__name__}: an adapter cannot "
                "carry that; use bayou restore"
            )
        self.restorer = Restorer(self.base, self.file)
        self._sites: dict[str, list[SiteRecord]] = defaultdict(list)
        for site in self.file.sites.values():
            self._sites[site.tensor].append(site)
        self._exact = set(self.file.exact)
        self.loras: list[Change] = []
        self.modules: dict[str, dict[str, str]] = {}
        self.biases: dict[str, Change] = {}
        self.left: list[Change] = []
        self.new_rows = 0
        self.kinds: dict[str, Kind] = {}
        self._whole: list[Change] = []
        self._sort(skeleton.places(tuned, self.file.tensors()), embeddings, exact)
        if not self.loras:
            raise BadInput(f"{file} changes no matrix that a LoRA could carry; use bayou restore")

    def config_changes(self) -> list[str]:
        """Keys of config.json in which the fine-tune's model computes otherwise than the base's."""

        def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
            found: dict[str, Any] = {}
            for key, value in config.items():
                if key not in _NO_MATTER:
                    found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
            return found

        ours, theirs = flat(self.config), flat(self.base.config)
        return sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))

    # ------------------------------------------------------------------------------------- what goes where

    def _changes(self, places: dict[str, Place]) -> Iterator[Change]:
        """Each parameter that is not the base's; a table that a head is tied to is one for either use."""
        there = {
            path: name
            for name, place in skeleton.places(self.model, self.base.names()).items()
            if place.index is None and not place.converted
            for path in (place.path, *place.also)
        }
        for tensor in sorted(places, key=natural):
            place = places[tensor]
            plain = place.index is None and not place.converted
            for path in (place.path, *place.also):
                base = there.get(path) if plain else tensor if tensor in self.base else None
                if not self._equal(tensor, base):
                    kind = "head" if place.role == "embedding" and path != place.path else place.role
                    yield Change(tensor, path, base, kind, place.transposed)

    def _equal(self, tensor: str, base: str | None) -> bool:
        sites = self._sites[tensor]
        if not sites:
            return tensor not in self._exact and tensor == base
        same = all(not s.terms and s.gain == 1 and s.reference == base and s.reference_part == s.part for s in sites)
        return same and self.file.tail(tensor) is None

    def _sort(self, places: dict[str, Place], embeddings: str, exact: bool) -> None:
        by_path = {path: name for name, place in places.items() for path in (place.path, *place.also)}
        for change in self._changes(places):
            module = self.model.get_submodule(change.module)
            small = change.kind in ("norm", "bias", "other") and change.base is not None
            if change.kind in TABLES and embeddings != "full":
                self.new_rows = max(self.new_rows, self._rows_beyond(change))
            if change.kind == "linear" or (change.kind in TABLES and embeddings == "lora"):
                self._take(change)
            elif exact and change.kind == "bias" and skeleton.is_linear(module):
                self.biases[change.module] = change
            elif (change.kind in TABLES and embeddings == "full") or (exact and small and not any(module.children())):
                leaves = [leaf for leaf, _ in module.named_parameters(recurse=False)]
                self.modules[change.module] = {leaf: by_path[f"{change.module}.{leaf}"] for leaf in leaves}
                self._whole.append(change)
            else:
                self.left.append(change)
        targets = {change.module for change in self.loras}
        for path in [path for path in self.biases if path not in targets]:
            if path in self.modules:
                self._whole.append(self.biases.pop(path))
                continue
            # PEFT knows a bias only as that of a LoRA: one that changes nothing bears it.
            weight = f"{path}.weight"
            place = places[by_path[weight]]
            self._take(Change(by_path[weight], weight, by_path[weight], place.role, place.transposed), least=1)

    def _rows_beyond(self, change: Change) -> int:
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
        own = self._own_rank(change)
        if own is None and self._rank is None:
            way = self._sites[change.tensor][0].method if self._sites[change.tensor] else "exact"
            raise BadInput(
                f"{change.tensor} is stored element by element ({way}), so its delta has no rank of its own; "
                f"give one with --rank, 1 to {min(shape)}"
            )
        rank = max(min(rank for rank in (self._rank, own, *shape) if rank is not None), least)
        (self.loras if rank else self.left).append(replace(change, rank=rank, shape=shape))

    def _oriented(self, disk: tuple[int, ...], change: Change) -> tuple[int, int]:
        return (disk[1], disk[0]) if change.transposed else (disk[0], prod(disk[1:]))

    def _own_rank(self, change: Change) -> int | None:
        if self._equal(change.tensor, change.base):
            return 0
        sites = self._sites[change.tensor]
        if not sites or not _low_rank(change, sites[0]):
            return None
        return sum(part[0] for term in sites[0].terms for part in term.parts)

    # --------------------------------------------------------------------------------------------- numbers

    def lora(self, change: Change, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """A (rank, in) and scale * B (out, rank), in `dtype`, of the best B @ A; counts what that loses.

        The singular values lie half in A, half in B. Low-rank terms are decomposed by QR of their factors and the SVD
        of a matrix of their rank, others from the matrix, read in blocks. Raises BadInput where `dtype` overflows.
        """
        if self._equal(change.tensor, change.base):
            self._count(change, "LoRA", 0.0, 0.0)
            zeros = (torch.zeros(change.rank, change.shape[1]), torch.zeros(change.shape[0], change.rank))
            return zeros[0].to(dtype), zeros[1].to(dtype)
        (site,) = self._pieces(change)
        factors, matrix = self._factors(change, site), self._matrix(change, site)
        if factors is None:
            u, s, v = svd(matrix, change.rank)
        else:
            left, upper = torch.linalg.qr(factors[0])
            right, lower = torch.linalg.qr(factors[1].T)
            core = upper @ lower.T
            u, s, v = svd(Matrix((core.shape[0], core.shape[1]), lambda a, b: core[a:b].float()), change.rank)
            u, v = left @ u.double(), v.double() @ right.T
        root = s.sqrt()
        a, b = (v * root[:, None]).to(dtype), (u * root * scale).to(dtype)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise BadInput(f"{change.tensor}: the factors do not fit into {dtype}; choose --dtype float32 or bfloat16")
        whole = lost = 0.0
        if factors is None:
            for start, block in matrix.blocks():
                made = b[start : start + len(block)].double() @ a.double() / scale
                whole += float(block.double().square().sum())
                lost += float((block.double() - made).square().sum())
        else:
            whole = _energy(*factors)
            lost = _energy(torch.cat([factors[0], b.double() / -scale], 1), torch.cat([factors[1], a.double()]))
        self._count(change, "LoRA", whole, max(lost, 0.0))  # rounding may take a square below nil
        return a.cpu().contiguous(), b.cpu().contiguous()

    def bias(self, change: Change) -> Tensor:
        """The change of a bias, fp32."""
        assert change.base is not None  # `_sort` leaves others out
        return self.restorer.tensor(change.tensor, torch.float32) - self.base.read(change.base).float()

    def measure(self) -> None:
        """Count what goes whole and what is left out."""
        for change in (*self._whole, *self.biases.values()):
            self._count(change, "exact", self._norm(change), 0.0)
        for change in self.left:
            norm = self._norm(change)
            self._count(change, "left out", norm, norm)

    def _count(self, change: Change, how: str, delta: float, lost: float) -> None:
        kind = self.kinds.setdefault(change.kind, Kind())
        kind.tensors += 1
        kind.how.add(how)
        kind.ranks += [change.rank] if change.rank else []
        kind.delta += delta
        kind.lost += lost
        if change.base is not None:
            shape = self.base.shape(change.base)
            step = max(1, _BLOCK // prod(shape[1:]))
            for start in range(0, shape[0] if shape else 1, step):
                kind.base += float(self.base.read(change.base, start, start + step).double().square().sum())

    def _norm(self, change: Change) -> float:
        """Squared norm of a change, of those of its rows that the base has; all of it where the base has nothing."""
        total = 0.0
        for site in self._pieces(change):
            factors = self._factors(change, site)
            if factors is not None:
                total += _energy(*factors)
                continue
            for _, block in self._matrix(change, site).blocks():
                total += float(block.double().square().sum())
        return total

    def _pieces(self, change: Change) -> list[SiteRecord | None]:
        """The sites that make up the tensor, or None for a whole that none codes."""
        return [*self._sites[change.tensor]] or [None]

    def _factors(self, change: Change, site: SiteRecord | None) -> tuple[Tensor, Tensor] | None:
        """u (out, r) and v (r, in), fp64, whose product is all of the change; None where there are none."""
        if site is None or not _low_rank(change, site):
            return None
        us = [torch.zeros(site.shape[0], 0, dtype=torch.float64, device=self.device)]
        vs = [torch.zeros(0, site.shape[1], dtype=torch.float64, device=self.device)]
        for term in self.file.delta(site.name).to(self.device).terms:
            assert isinstance(term, LowRank)  # `_low_rank` has looked
            for u, v in term.blocks:
                left, right = u.unpack().double() * term.gain, v.unpack().double()
                us.append(left if term.output_scale is None else left * term.output_scale.double()[:, None])
                vs.append(right if term.input_scale is None else right * term.input_scale.double())
        return torch.cat(us, 1), torch.cat(vs)

    def _matrix(self, change: Change, site: SiteRecord | None) -> Matrix:
        """The change as a matrix, fine-tune minus base, fp32."""
        if site is None:
            return self._exact_matrix(change)
        delta = self.file.delta(site.name).to(self.device)

        def rows(name: str, part: int | None, start: int, stop: int) -> Tensor:
            return read_matrix(self.base, name, part, site, start, stop).to(self.device).double()

        def read(start: int, stop: int) -> Tensor:
            total = delta.materialize(start, stop).to(self.device)
            if site.reference is not None:
                total = total + site.gain * rows(site.reference, site.reference_part, start, stop)
            if change.base is not None:
                total = total - rows(change.base, site.part, start, stop)
            return total.float()

        return Matrix(site.shape, read)

    def _exact_matrix(self, change: Change) -> Matrix:
        """The same of a tensor that no site codes, of the rows that both have."""

        def oriented(tensor: Tensor) -> Tensor:
            matrix = tensor.reshape(len(tensor), -1) if tensor.ndim else tensor.reshape(1, 1)
            return matrix.T if change.transposed else matrix

        new = oriented(self.restorer.tensor(change.tensor))
        old = new.new_zeros(()).expand(new.shape) if change.base is None else oriented(self.base.read(change.base))

        def read(start: int, stop: int) -> Tensor:
            return new[start:stop].to(self.device).float() - old[start:stop].to(self.device).float()

        return Matrix((min(len(new), len(old)), new.shape[1]), read)


def _low_rank(change: Change, site: SiteRecord) -> bool:
    """Whether the terms of a site are all of the change, and low-rank."""
    alone = site.gain == 1 and (site.reference, site.reference_part) == (change.base, site.part)
    return alone and all(term.kind == "LowRank" for term in site.terms)


def _energy(u: Tensor, v: Tensor) -> float:
    """||u @ v||^2 without the product."""
    return float(((u.T @ u) * (v @ v.T)).sum())
