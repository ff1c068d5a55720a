"""What a fine-tune's parameters differ by from the base's, from a .bayou file: norms, and the best low-rank factors.

Low-rank terms are never multiplied out: QR of their factors and the SVD of a matrix of their rank give the singular
values of the product, and traces of Gram matrices its norm. What is stored element by element is read in blocks.
"""

from collections import defaultdict
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from bayou.checkpoint import Checkpoint
from bayou.decompose import Matrix, svd
from bayou.delta import LowRank
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput
from bayou.inventory import read_matrix
from bayou.plan import SiteRecord
from bayou.restore import Restorer

_BLOCK = 2**24  # numbers of a base's tensor read at a time


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


@dataclass(frozen=True)
class Factors:
    """The best B @ A of a rank. a (rank, in), b (out, rank) on the CPU; squared norms of the change and of its rest."""

    a: Tensor
    b: Tensor
    norm: float
    lost: float


class Differences:
    """Fine-tune minus base, of a file and the base that it was made against; computed on `device`."""

    def __init__(self, file: DeltaFile, base: Checkpoint, device: str) -> None:
        self.file, self.base, self.device = file, base, device
        self.restorer = Restorer(base, file)
        self.sites: dict[str, list[SiteRecord]] = defaultdict(list)
        for site in file.sites.values():
            self.sites[site.tensor].append(site)
        self._exact = set(file.exact)

    def equal(self, tensor: str, base: str | None) -> bool:
        """Whether a tensor is the base's tensor `base`, and has no rows beyond it."""
        sites = self.sites.get(tensor)
        if not sites:
            return tensor not in self._exact and tensor == base
        same = all(not s.terms and s.gain == 1 and s.reference == base and s.reference_part == s.part for s in sites)
        return same and self.file.tail(tensor) is None

    def rank(self, change: Change) -> int | None:
        """The rank that the terms of a change have; None where they have none of their own."""
        if self.equal(change.tensor, change.base):
            return 0
        (site, *_) = self._pieces(change)
        if site is None or not _low_rank(change, site):
            return None
        return sum(part[0] for term in site.terms for part in term.parts)

    def best(self, change: Change, dtype: torch.dtype, scale: float = 1.0) -> Factors:
        """The best A, and B times `scale`, of rank change.rank, rounded to `dtype`; half of each singular value in
        either. Raises BadInput where `dtype` overflows.
        """
        out, width = change.shape
        if self.equal(change.tensor, change.base):
            a, b = torch.zeros(change.rank, width, dtype=dtype), torch.zeros(out, change.rank, dtype=dtype)
            return Factors(a, b, 0.0, 0.0)
        (site,) = self._pieces(change)
        factors = self._factors(change, site)
        if factors is not None:
            a, b = self._rounded(change, *_product_svd(*factors, change.rank), dtype, scale)
            norm = _energy(*factors)
            lost = _energy(torch.cat([factors[0], b.double() / -scale], 1), torch.cat([factors[1], a.double()]))
        else:
            matrix, norm, lost = self._matrix(change, site), 0.0, 0.0
            a, b = self._rounded(change, *svd(matrix, change.rank), dtype, scale)
            for start, block in matrix.blocks():
                rest = block.double() - b[start : start + len(block)].double() @ a.double() / scale
                norm += float(block.double().square().sum())
                lost += float(rest.square().sum())
        return Factors(a.cpu(), b.cpu(), norm, max(lost, 0.0))  # rounding may take what is nil below it

    def _rounded(
        self, change: Change, u: Tensor, s: Tensor, v: Tensor, dtype: torch.dtype, scale: float
    ) -> tuple[Tensor, Tensor]:
        root = s.sqrt()
        a, b = (v * root[:, None]).to(dtype).contiguous(), (u * root * scale).to(dtype).contiguous()
        if not (a.isfinite().all() and b.isfinite().all()):
            raise BadInput(f"{change.tensor}: the factors do not fit into {dtype}; choose --dtype float32 or bfloat16")
        return a, b

    def norm(self, change: Change) -> float:
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

    def base_norm(self, change: Change) -> float:
        """Squared norm of what the base has in the place of a change; 0 where it has nothing."""
        if change.base is None:
            return 0.0
        shape = self.base.shape(change.base)
        step = max(1, _BLOCK // prod(shape[1:]))
        starts = range(0, shape[0] if shape else 1, step)
        return sum(float(self.base.read(change.base, s, s + step).double().square().sum()) for s in starts)

    def _pieces(self, change: Change) -> list[SiteRecord | None]:
        """The sites that make up the tensor, or None for a whole that none codes."""
        return [*self.sites.get(change.tensor, ())] or [None]

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


def _product_svd(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """u (out, rank), s (rank,), v (rank, in) of left @ right, from a matrix of their rank."""
    q, upper = torch.linalg.qr(left)
    p, lower = torch.linalg.qr(right.T)
    core = upper @ lower.T
    u, s, v = svd(Matrix((core.shape[0], core.shape[1]), lambda start, stop: core[start:stop].float()), rank)
    return q @ u.double(), s.double(), v.double() @ p.T


def _energy(u: Tensor, v: Tensor) -> float:
    """||u @ v||^2 without the product."""
    return float(((u.T @ u) * (v @ v.T)).sum())
