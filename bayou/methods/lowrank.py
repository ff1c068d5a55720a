"""Low rank: the largest singular triplets of the delta, in 16-bit factors or fewer bits.

The baseline of Delta-CoMe's tables (arXiv 2406.08903, section 6.1), and what carries embeddings under every method
here: 92 % of an embedding's delta lies in 64 directions. Below 16 bits both factors are rounded to nearest with one
scale a row and block, V first; U is then refitted by least squares to the rounded V before it is rounded itself, and
the gain gives the whole its full strength.
"""

from dataclasses import replace

import torch
from torch import Tensor

from bayou.decompose import svd
from bayou.delta import LowRank, Term
from bayou.methods import Site, TermLayout, agreement, cut, float_lowrank, normalised
from bayou.packed import Packed, Spec
from bayou.quantize import nearest

EMBEDDINGS = {"method": "lowrank"}
"""Embeddings are left to the same method with the same options."""


def _spec(bits: int) -> str:
    return "f16" if bits == 16 else f"{bits}r"


def layout(shape: tuple[int, int], *, rank: int, bits: int = 16) -> tuple[TermLayout, ...]:
    """One LowRank of `rank` ranks, in blocks of 128."""
    return (TermLayout("LowRank", tuple((ranks, _spec(bits), _spec(bits)) for ranks in cut(rank))),)


def encode(site: Site, *, rank: int, bits: int = 16) -> tuple[Term, ...]:
    """u diag(s) v, truncated to `rank`; factors of `bits` bits: 16 (fp16), or 1 to 8 with a scale a row."""
    u, s, v = svd(site.delta, rank)
    if bits == 16:
        return (float_lowrank(u, s, v),)
    u, v, gain = normalised(u * s.sqrt(), v * s.sqrt()[:, None])
    spec = Spec.parse(_spec(bits))
    packed_v = [nearest(part, spec) for part in v.split(cut(len(v)))]
    rounded = torch.cat([part.unpack() for part in packed_v]).double()
    # min ||u v - U rounded||: a system of rank x rank, with the little damping that a singular one needs.
    normal = rounded @ rounded.T
    normal.diagonal().add_(1e-6 * normal.diagonal().mean())
    fitted = torch.linalg.solve(normal, rounded @ (v.double().T)).T.float()
    u = u @ fitted.T
    packed_u = [nearest(part, spec) for part in u.split(cut(len(v)), dim=1)]
    blocks: list[tuple[Packed, Packed]] = list(zip(packed_u, packed_v, strict=True))
    # Ranks that are cut weaken the delta as a whole, which costs more than the noise of what is left (LOG.md).
    wanted, kept = (float(part.sum()) for part in agreement(replace(site, gram=None), *_whole(blocks)))
    strength = wanted / (kept * gain) if kept * gain > 0.5 * wanted > 0 else 1.0
    return (LowRank(tuple(blocks), torch.tensor(gain * strength, dtype=torch.float32).item()),)


def _whole(blocks: list[tuple[Packed, Packed]]) -> tuple[Tensor, Tensor]:
    return torch.cat([u.unpack() for u, _ in blocks], 1), torch.cat([v.unpack() for _, v in blocks])
