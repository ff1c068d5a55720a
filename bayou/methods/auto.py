"""The default: directions chosen by what the inputs make of them, few of them in many bits, many in few.

    U     the leading left singular vectors of delta L, where L L^T is the second moment of the inputs: no other `rank`
          directions of the output keep more of what the delta does to activations
    V     U^T delta, which is as homogeneous from column to column as the delta itself. (Undoing the metric on V instead
          makes rows that no scale fits, which is what made a whitened decomposition fail; LOG.md has the figures.)

V is rounded by GPTQ under L L^T, U under V L L^T V^T (Delta-CoMe's equation 5, arXiv 2406.08903), all ranks together. By
reverse water-filling every kept number should carry about the same error; since U's columns are all of unit norm and stand for
ever less energy, the first ranks get 8 bits and the last 2 (`bands`). U has no scales: a rank's is folded into its row of V,
of which each has one, so that a rank costs 2 bytes beside its codes. At the end the gain gives the whole matrix back the
strength <delta, delta L L^T> that cutting and rounding took from it (an exponent, `strength`).
"""

import re
from collections.abc import Iterator, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from bayou import clock
from bayou.decompose import projection
from bayou.delta import LowRank, Term
from bayou.errors import BadInput
from bayou.methods import Site, TermLayout, agreement, cut
from bayou.methods.deltacome import alike, round_u, round_v
from bayou.packed import Packed, Spec
from bayou.quantize import Grid

EMBEDDINGS = {"method": "lowrank", "bits": 4}
"""As with deltacome."""

USES_GRAM = True
"""Wants the second moments of each matrix's input."""

_BAND = re.compile(r"([1-8])/([1-8])(?:x([0-9]{1,9})(%?))?")

_STEPS = {1: 1.596, 2: 0.9957, 3: 0.586, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
"""Best step of a uniform quantiser of so many bits for a Gaussian of variance 1 (Max 1960)."""

_TRIED = (0.75, 0.85, 0.95, 1.05, 1.2, 1.4, 1.7, 2.2, 3.0, 4.5, 7.0)
"""Multiples of it that each row is tried with: heavier tails want longer ranges."""

_WORD = 8
"""A share of ranks is rounded to as many: a row of U is stored in words of 32 bits, which 8 ranks fill in 4 bits."""

Bands = list[tuple[int, int, int | None, bool]]


def parse_bands(bands: str) -> Bands:
    """[(8, 4, 4, False), (4, 3, 50, True), (2, 2, None, False)] for "8/4x4,4/3x50%,2/2": bits of U and of V, ranks or
    per cent of all ranks. The last band takes the rest.

    Raises BadInput for what is not written so.
    """
    parsed: Bands = []
    for word in bands.split(","):
        match = _BAND.fullmatch(word.strip())
        if not match:
            raise BadInput(
                f"bands {bands!r}: {word!r} is not BITS/BITSxRANKS or BITS/BITSxSHARE%, the bits of U and of V, 1 to 8, "
                "e.g. 8/4x4,4/3x50%,2/2"
            )
        parsed.append((int(match[1]), int(match[2]), int(match[3]) if match[3] else None, bool(match[4])))
    if any(ranks is None for _, _, ranks, _ in parsed[:-1]) or parsed[-1][2] is not None:
        raise BadInput(f"bands {bands!r}: every band but the last names its ranks, and the last takes the rest")
    return parsed


def _blocks(bands: str, rank: int) -> Iterator[tuple[int, int, int]]:
    """(U's bits, V's bits, ranks) of each block of a delta of `rank` ranks."""
    left = rank
    for u_bits, v_bits, ranks, share in parse_bands(bands):
        wanted = left if ranks is None else _WORD * round(ranks * rank / (100 * _WORD)) if share else ranks
        take = min(wanted, left)
        left -= take
        yield from ((u_bits, v_bits, part) for part in cut(take))


def layout(
    shape: tuple[int, int],
    *,
    rank: int,
    bands: str = "8/4x4,4/3x50%,2/2",
    damping: float = 0.01,
    even: float = 0.01,
    strength: float = 1.0,
) -> tuple[TermLayout, ...]:
    """One LowRank whose blocks end at the bands' edges. Raises BadInput for a negative (or NaN) number."""
    for name, value in (("damping", damping), ("even", even), ("strength", strength)):
        if not 0 <= value < inf:
            raise BadInput(f"method auto: {name}={value} must be 0 or more, and finite")
    blocks = tuple((ranks, f"{u_bits}", f"{v_bits}r") for u_bits, v_bits, ranks in _blocks(bands, rank))
    return (TermLayout("LowRank", blocks),)


def encode(
    site: Site,
    *,
    rank: int,
    bands: str = "8/4x4,4/3x50%,2/2",
    damping: float = 0.01,
    even: float = 0.01,
    strength: float = 1.0,
) -> tuple[Term, ...]:
    """`rank` directions of the site's delta, coded.

    bands: see `parse_bands`. damping: GPTQ's. even: share of the mean moment that is added to the moment of every
    input in the metric that chooses directions: the larger, the less it matters on which text it was taken. strength:
    with 1 the matrix has its own in the end, with 2 as much more as it had lost, with 0 less. Without a gram all
    inputs count alike and rounding is to nearest.
    """
    given = {"bands": bands, "damping": damping, "even": even, "strength": strength}
    return encode_many([site], [given | {"rank": rank}])[0]


def encode_many(sites: Sequence[Site], options: Sequence[dict[str, Any]]) -> list[tuple[Term, ...]]:
    """What `encode` gives of each site with its own options, which differ in the rank at most; fewer sweeps."""
    common = options[0]
    codings = [_Coding(site, one["rank"], common["bands"], common["even"]) for site, one in zip(sites, options, strict=True)]
    for shared in alike(codings, lambda coding: (id(coding.site.gram), coding.v.shape[1])):
        round_v(shared, common["damping"], True)
    for coding in codings:
        coding.find_hessian()
    for shared in alike(codings, lambda coding: coding.u.shape):
        round_u(shared, common["damping"], True)
    return [(coding.term(common["strength"]),) for coding in codings]


class _Coding:
    """A site on its way to codes: u (out, rank) orthonormal and v (rank, in), the delta's projection; fp32."""

    hessian: Tensor
    v_codes: Tensor
    v_hat: Tensor
    u_codes: Tensor
    u_hat: Tensor

    def __init__(self, site: Site, rank: int, bands: str, even: float) -> None:
        self.site = site
        self.u, self.v = projection(site.delta, rank, _metric(site, even))
        self.blocks = list(_blocks(bands, len(self.v)))
        self.widths = [ranks for _, _, ranks in self.blocks]
        device = self.v.device
        self._u_bits, self._v_bits = (
            torch.tensor([block[i] for block in self.blocks for _ in range(block[2])], device=device) for i in (0, 1)
        )

    def v_levels(self) -> Grid:
        """What each element of v may be; finds the steps, one a row."""
        self.v_step, levels = _levels(self.v, self._v_bits)
        return levels.expand(self.v.shape)

    def u_levels(self) -> Grid:
        """What each element of u may be; finds the steps, one a column."""
        self.u_step, levels = _levels(self.u.T, self._u_bits)
        return Grid(levels.scale.T, levels.zero.T, levels.top.T).expand(self.u.shape)

    def find_hessian(self) -> None:
        """The second moments of what u multiplies."""
        with clock.step("hessian of u"):
            v_hat = self.v_hat.double()
            acted = v_hat @ self.site.gram.matrix.to(v_hat.device).double() if self.site.gram else v_hat
            self.hessian = acted @ v_hat.T

    def term(self, strength: float) -> LowRank:
        """The codes, packed, at full strength."""
        scale = self.v_step * self.u_step
        peak = float(2.0 ** torch.floor(torch.log2(scale.max().clamp_min(2.0**-100))))
        scale = (scale / peak).half()
        middle_u, middle_v = ((2.0**bits - 1) / 2 for bits in (self._u_bits, self._v_bits))
        with clock.step("strength"):
            u, v = self.u_codes - middle_u, scale.float()[:, None] * (self.v_codes - middle_v[:, None])
            wanted, kept = (float(part.sum()) for part in agreement(self.site, u, v))
            kept *= peak
            factor = (wanted / kept) ** strength if kept > 0.1 * wanted > 0 else 1.0
        packed, start = [], 0
        with clock.step("pack"):
            for u_bits, v_bits, ranks in self.blocks:
                at = slice(start, start + ranks)
                start += ranks
                u_codes, v_codes = self.u_codes[:, at].to(torch.uint8), self.v_codes[at].to(torch.uint8)
                packed.append(
                    (
                        Packed.codes(u_codes, Spec.parse(f"{u_bits}")),
                        Packed.codes(v_codes, Spec.parse(f"{v_bits}r"), scale[at, None]),
                    )
                )
        return LowRank(tuple(packed), torch.tensor(peak * factor, dtype=torch.float32).item())


def _metric(site: Site, even: float) -> Tensor:
    """Second moments of the input over their mean diagonal, `even` added to the diagonal; fp64."""
    _, first = next(site.delta.blocks())
    one = torch.eye(site.delta.shape[1], dtype=torch.float64, device=first.device)
    if site.gram is None:
        return one
    moment = site.gram.matrix.to(first.device).double()
    return moment / moment.diagonal().mean().clamp_min(1e-30) + max(even, 1e-6) * one


def _levels(rows: Tensor, bits: Tensor) -> tuple[Tensor, Grid]:
    """The step of each row by least squared error, 0 for a row of zeros, and the levels that follow, (rows, 1)."""
    top = 2.0**bits - 1
    middle = (top / 2)[:, None]
    usual = rows.square().mean(1).sqrt() * torch.tensor([0.0, *_STEPS.values()], device=rows.device)[bits]
    best, least = usual, torch.full_like(usual, torch.inf)
    for factor in _TRIED:
        step = (usual * factor).clamp_min(1e-30)[:, None]
        code = (rows / step + middle).round().clamp_min(0).minimum(top[:, None])
        error = (rows - step * (code - middle)).square().sum(1)
        best, least = torch.where(error < least, usual * factor, best), torch.minimum(error, least)
    return best, Grid(best.clamp_min(1e-30)[:, None], middle, top[:, None])
