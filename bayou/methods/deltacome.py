"""Delta-CoMe: singular vectors of large singular values in more bits, of small ones in fewer.

https://arxiv.org/abs/2406.08903 (NeurIPS 2024). delta = U diag(s) V^T is cut into bands of ranks; in each band

    Vq = GPTQ(V, X)             rows are ranks, Hessian X X^T (the site's gram)
    Uq = GPTQ(U, s Vq X)        Hessian Vq X X^T Vq^T: no further pass over the data           (equation 5)

with groups of 128, asymmetric ranges, act-order and damping .01. The published bands, "8x2,3x32,2", are 2 ranks in
8 bits, 32 in 3, the rest in 2. A band is stored in blocks of at most 128 ranks, and a block is a group of U's columns.

`refit` (not in the paper) costs no bytes:

    rows    each row of U is scaled (its scales are) so that the coded row q of the delta has the strength of the true
            one, d: by the quotient (<d, d X X^T> / <q, d X X^T>) to the power `strength`. The default
    full    before that, U is replaced by the least squares fit of the delta to the rounded V (PrinMix's idea, arXiv
            2506.11087), min ||(delta - U Vq) X||^2 + ridge ||(U - s U) diag(H)^(1/2)||^2 with H = Vq X X^T Vq^T, and
            all bands are rounded together, so that a later band also mends the earlier ones' errors
    none    as published

"""

import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor

from bayou import clock
from bayou.decompose import svd
from bayou.delta import LowRank, Term
from bayou.errors import BadInput
from bayou.methods import Site, TermLayout, agreement, cut, normalised
from bayou.packed import Packed, Spec
from bayou.quantize import Factor, Grid, factorize, gptq, grid, spread

EMBEDDINGS = {"method": "lowrank", "bits": 4}
"""No activation reaches an embedding's rows, so GPTQ has nothing to go by; see LOG.md for the choice of 4 bits."""

USES_GRAM = True
"""Wants the second moments of each matrix's input."""

_BAND = re.compile(r"([1-8]|16)(?:x([0-9]{1,9}))?")


def parse_bands(bands: str) -> list[tuple[int, int | None]]:
    """[(8, 2), (3, 32), (2, None)] for "8x2,3x32,2": bits and ranks of each band, the last takes the rest.

    Raises BadInput for bits other than 1 to 8 or 16, or a band without ranks that is not the last.
    """
    parsed: list[tuple[int, int | None]] = []
    for word in bands.split(","):
        match = _BAND.fullmatch(word.strip())
        if not match:
            raise BadInput(f"bands {bands!r}: {word!r} is not BITSxRANKS with 1 to 8 or 16 bits, e.g. 8x2,3x32,2")
        parsed.append((int(match[1]), int(match[2]) if match[2] else None))
    if any(ranks is None for _, ranks in parsed[:-1]) or parsed[-1][1] is not None:
        raise BadInput(f"bands {bands!r}: every band but the last names its ranks, and the last takes the rest")
    return parsed


def _blocks(bands: str, rank: int) -> Iterator[tuple[int, int, int]]:
    """(band, bits, ranks) of each block of a delta of `rank` ranks."""
    left = rank
    for band, (bits, ranks) in enumerate(parse_bands(bands)):
        take = left if ranks is None else min(ranks, left)
        left -= take
        yield from ((band, bits, part) for part in cut(take))


def _specs(shape: tuple[int, int], bits: int, ranks: int, group: int) -> tuple[str, str]:
    """Number formats of a block's u and v: fp16 where that is no larger than codes with their scales and zeros."""
    if bits == 16:
        return "f16", "f16"
    coded = f"{bits}g{group}z"
    chosen = []
    for rows, cols in ((shape[0], ranks), (ranks, shape[1])):
        smaller = Spec.parse("f16").nbytes(rows, cols) <= Spec.parse(coded).nbytes(rows, cols)
        chosen.append("f16" if smaller else coded)
    return chosen[0], chosen[1]


def layout(
    shape: tuple[int, int],
    *,
    rank: int,
    bands: str = "8x2,3x32,2",
    group: int = 128,
    damping: float = 0.01,
    act_order: bool = True,
    refit: str = "rows",
    ridge: float = 1.0,
    strength: float = 1.0,
) -> tuple[TermLayout, ...]:
    """One LowRank whose blocks end at the bands' edges. Raises BadInput for a negative (or NaN) damping or ridge."""
    for name, value in (("damping", damping), ("ridge", ridge), ("strength", strength)):
        if not 0 <= value < inf:
            raise BadInput(f"method deltacome: {name}={value} must be 0 or more, and finite")
    if refit not in ("rows", "full", "none"):
        raise BadInput(f"method deltacome: refit={refit!r} must be rows, full or none")
    blocks = ((ranks, *_specs(shape, bits, ranks, group)) for _, bits, ranks in _blocks(bands, rank))
    return (TermLayout("LowRank", tuple(blocks)),)


def encode(
    site: Site,
    *,
    rank: int,
    bands: str = "8x2,3x32,2",
    group: int = 128,
    damping: float = 0.01,
    act_order: bool = True,
    refit: str = "rows",
    ridge: float = 1.0,
    strength: float = 1.0,
) -> tuple[Term, ...]:
    """Delta-CoMe's factors of the site's delta, `rank` ranks in all.

    bands: see `parse_bands`. group: columns of V (and ranks of U) that share a scale. damping, act_order: GPTQ's.
    refit: rows, full or none (see above; LOG.md has what each is worth). ridge: of "full": without that pull towards
    the plain U the fit serves the calibration's text and shrinks the delta elsewhere. Without a gram, rounding is to
    nearest and the strength is that of the weights. strength: with 1 a row has its own; with 2 as much more as it had
    lost, since the next layers miss what this one lost: better where the text that calibrates is the task's own, far
    worse where it is not.
    """
    given = {"bands": bands, "group": group, "damping": damping, "act_order": act_order}
    return _encode([site], [given | {"rank": rank, "refit": refit, "ridge": ridge, "strength": strength}])[0]


def encode_many(sites: Sequence[Site], options: Sequence[dict[str, Any]]) -> list[tuple[Term, ...]]:
    """What `encode` gives of each site with its own options, which differ in the rank at most; fewer sweeps.

    The Vs of all sites with one gram are rounded in one sweep, as are the Us of one shape: for a GPU a sweep of many
    rows takes no longer than one of few.
    """
    return _encode(sites, options)


def _encode(sites: Sequence[Site], options: Sequence[dict[str, Any]]) -> list[tuple[Term, ...]]:
    common = options[0]
    ranks = [chosen["rank"] for chosen in options]
    codings = [_Coding(*pair, common["bands"], common["group"]) for pair in zip(sites, ranks, strict=True)]
    damping, act_order, refit = common["damping"], common["act_order"], common["refit"]
    for alike in _alike(codings, lambda coding: (id(coding.site.gram), coding.v.shape[1])):
        _round_v(alike, damping, act_order)
    for coding in codings:
        coding.find_hessian(refit, common["ridge"])
    for alike in _alike(codings, lambda coding: coding.u.shape):
        _round_u(alike, damping, act_order)
    return [(coding.term(refit, common["strength"]),) for coding in codings]


class _Coding:
    """A site on its way to codes: u (out, rank), v (rank, in) fp32 of its delta over `gain`, cut into blocks."""

    v_codes: Tensor
    v_hat: Tensor
    u_codes: Tensor
    u_hat: Tensor
    hessian: Tensor

    def __init__(self, site: Site, rank: int, bands: str, group: int) -> None:
        self.site = site
        u, s, v = svd(site.delta, rank)
        self.blocks = list(_blocks(bands, len(s)))
        specs = [_specs(site.delta.shape, bits, ranks, group) for _, bits, ranks in self.blocks]
        self.u_specs = [Spec.parse(u_spec) for u_spec, _ in specs]
        self.v_specs = [Spec.parse(v_spec) for _, v_spec in specs]
        self.widths = [ranks for _, _, ranks in self.blocks]
        self.u, self.v, self.gain = normalised(u * s.sqrt(), v * s.sqrt()[:, None])

    def v_levels(self) -> Grid:
        """What each element of v may be; finds the scales."""
        v, width = self.v, self.v.shape[1]
        self.v_scales = [_grid(part, spec) for part, spec in zip(v.split(self.widths), self.v_specs, strict=True)]
        levels = [_levels(scale, spec, width) for scale, spec in zip(self.v_scales, self.v_specs, strict=True)]
        return _stack(levels, [(ranks, width) for ranks in self.widths], 0, v.device)

    def u_levels(self) -> Grid:
        """What each element of u may be; finds the scales."""
        parts = self.u.split(self.widths, dim=1)
        self.u_scales = [_grid(part, spec) for part, spec in zip(parts, self.u_specs, strict=True)]
        three = zip(self.u_scales, self.u_specs, self.widths, strict=True)
        levels = [_levels(scale, spec, ranks) for scale, spec, ranks in three]
        return _stack(levels, [(self.u.shape[0], ranks) for ranks in self.widths], 1, self.u.device)

    def find_hessian(self, refit: str, ridge: float) -> None:
        """The second moments of what u multiplies, band by band; or of all bands, with u fitted to the rounded v."""
        with clock.step("hessian of u"):
            v_hat = self.v_hat.double()
            weighted = v_hat
            if self.site.gram:
                weighted = weighted @ self.site.gram.matrix.to(v_hat.device).double()
            hessian = weighted @ v_hat.T
            if refit == "full":
                self.u = _refit(self.site, self.u, self.v_hat, self.gain, weighted, hessian, ridge)
            else:
                band = [band for band, _, ranks in self.blocks for _ in range(ranks)]
                bands = torch.tensor(band, device=hessian.device)
                hessian = hessian * (bands[:, None] == bands)
            self.hessian = hessian

    def term(self, refit: str, strength: float) -> LowRank:
        """The codes, packed."""
        if refit != "none":
            with clock.step("rows of u"):
                factors = _factors(self.site, self.u_hat * self.gain, self.v_hat, strength)
                self.u_hat = self.u_hat * factors
                self.u_scales = [scales and (scales[0] * factors, scales[1]) for scales in self.u_scales]
        packed, start = [], 0
        with clock.step("pack"):
            for index, width in enumerate(self.widths):
                at = slice(start, start + width)
                u, v = (self.u_codes[:, at], self.u_hat[:, at]), (self.v_codes[at], self.v_hat[at])
                packed.append(
                    (
                        _pack(*u, self.u_specs[index], self.u_scales[index]),
                        _pack(*v, self.v_specs[index], self.v_scales[index]),
                    )
                )
                start += width
        return LowRank(tuple(packed), self.gain)


def _alike(codings: list[_Coding], key: Callable[[_Coding], Hashable]) -> list[list[_Coding]]:
    """The codings in groups of one key."""
    groups: dict[Hashable, list[_Coding]] = {}
    for coding in codings:
        groups.setdefault(key(coding), []).append(coding)
    return list(groups.values())


def _round_v(codings: list[_Coding], damping: float, act_order: bool) -> None:
    """Round the v of all, which have the gram in common. Ranks are rows: they never exchange errors, so that one
    sweep rounds all bands of all sites."""
    gram = codings[0].site.gram
    with clock.step("factorise"):
        factor = gram.factor(damping, act_order) if gram else None
    with clock.step("gptq of v"):
        every = [coding.v_levels() for coding in codings]
        levels = Grid(*(torch.cat([getattr(part, f) for part in every]) for f in ("scale", "zero", "top")))
        codes, values = gptq(torch.cat([coding.v for coding in codings]), factor, levels)
        ranks = [len(coding.v) for coding in codings]
        for coding, v_codes, v_hat in zip(codings, codes.split(ranks), values.split(ranks), strict=True):
            coding.v_codes, coding.v_hat = v_codes, v_hat


def _round_u(codings: list[_Coding], damping: float, act_order: bool) -> None:
    """Round the u of all, which have one shape, each by its own Hessian."""
    with clock.step("factorise"):
        # One by one: a GPU's batched Cholesky is for far smaller matrices than these.
        factors = [factorize(coding.hessian, damping=damping, act_order=act_order) for coding in codings]
        factor = Factor(*(torch.stack([getattr(f, name) for f in factors]) for name in ("order", "inverse", "dead")))
    with clock.step("gptq of u"):
        every = [coding.u_levels() for coding in codings]
        levels = Grid(*(torch.stack([getattr(part, f) for part in every]) for f in ("scale", "zero", "top")))
        codes, values = gptq(torch.stack([coding.u for coding in codings]), factor, levels)
        for coding, u_codes, u_hat in zip(codings, codes, values, strict=True):
            coding.u_codes, coding.u_hat = u_codes, u_hat


def _refit(
    site: Site, u: Tensor, v_hat: Tensor, gain: float, weighted: Tensor, hessian: Tensor, ridge: float
) -> Tensor:
    """argmin over U of ||(delta / gain - U Vq) X||^2 + ridge ||(U - u) diag(hessian)^(1/2)||^2."""
    normal = hessian.clone()
    # A delta of zeros (an expert that stayed as it was), or an input that never was, makes the system nil.
    normal.diagonal().mul_(1 + ridge).add_(1e-6 * normal.diagonal().mean().clamp_min(1e-30))
    lower = torch.linalg.cholesky(normal)
    rows = []
    for start, block in site.delta.blocks():
        plain = u[start : start + len(block)].double()
        left = block.double() / gain - plain @ v_hat.double()
        rows.append(plain + torch.cholesky_solve(weighted @ left.T, lower).T)
    return torch.cat(rows).float()


def _factors(site: Site, u_hat: Tensor, v_hat: Tensor, strength: float) -> Tensor:
    """(out, 1): what to multiply each coded row by, (<d, d H> / <q, d H>) ** strength.

    Cutting ranks and least squares both shrink a delta towards the base, in all rows and layers alike, and such errors
    add up where those of rounding average out. The factor stays within 2/3 and 3/2: what lies beyond is noise.
    """
    wanted, kept = agreement(site, u_hat, v_hat)
    factor = torch.where((kept > 0) & (wanted > 0), wanted / kept, 1.0) ** strength
    return factor.clamp(2 / 3, 3 / 2).float()


def _grid(part: Tensor, spec: Spec) -> tuple[Tensor, Tensor] | None:
    return None if spec.floats else grid(part, spec)


def _levels(scales: tuple[Tensor, Tensor] | None, spec: Spec, cols: int) -> Grid | None:
    return None if scales is None else spread(*scales, spec, cols)


def _stack(levels: list[Grid | None], shapes: list[tuple[int, int]], dim: int, device: torch.device) -> Grid:
    """One grid over all blocks; where a block is floats, top is 0 (see Grid)."""
    one, nil = torch.ones((), device=device), torch.zeros((), device=device)
    wide = [(part or Grid(one, nil, nil)).expand(torch.Size(shape)) for part, shape in zip(levels, shapes, strict=True)]
    return Grid(*(torch.cat([getattr(part, f) for part in wide], dim) for f in ("scale", "zero", "top")))


def _pack(codes: Tensor, values: Tensor, spec: Spec, scales: tuple[Tensor, Tensor] | None) -> Packed:
    if scales is None:
        return Packed.floats(values, spec.floats)
    scale, zero = scales
    return Packed.codes(codes.to(torch.uint8), spec, scale, zero.to(torch.uint8) if spec.zeros else None)
