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
from collections.abc import Iterator
from math import inf

import torch
from torch import Tensor

from bayou.decompose import svd
from bayou.delta import LowRank, Term
from bayou.errors import BadInput
from bayou.methods import Site, TermLayout, agreement, cut, normalised
from bayou.packed import Packed, Spec
from bayou.quantize import Grid, factorize, gptq, grid, spread

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
    u, s, v = svd(site.delta, rank)
    blocks = list(_blocks(bands, len(s)))
    specs = [_specs(site.delta.shape, bits, ranks, group) for _, bits, ranks in blocks]
    widths = [ranks for _, _, ranks in blocks]
    u, v, gain = normalised(u * s.sqrt(), v * s.sqrt()[:, None])

    v_specs = [Spec.parse(v_spec) for _, v_spec in specs]
    v_scales = [_grid(part, spec) for part, spec in zip(v.split(widths), v_specs, strict=True)]
    factor = site.gram.factor(damping, act_order) if site.gram else None
    v_levels = [_levels(scale, spec, v.shape[1]) for scale, spec in zip(v_scales, v_specs, strict=True)]
    # Ranks are rows here: they never exchange errors, so one sweep rounds all bands.
    v_codes, v_hat = gptq(v, factor, _stack(v_levels, [(w, v.shape[1]) for w in widths], 0, v.device))

    weighted = v_hat.double()
    if site.gram:
        moments = site.gram.matrix.to(v.device).double()
        weighted = weighted @ moments
    hessian = weighted @ v_hat.double().T
    if refit == "full":
        u = _refit(site, u, v_hat, gain, weighted, hessian, ridge)
    else:
        band = torch.tensor([b for b, _, ranks in blocks for _ in range(ranks)], device=u.device)
        hessian = hessian * (band[:, None] == band)
    u_specs = [Spec.parse(u_spec) for u_spec, _ in specs]
    u_scales = [_grid(part, spec) for part, spec in zip(u.split(widths, dim=1), u_specs, strict=True)]
    u_levels = [_levels(scale, spec, w) for scale, spec, w in zip(u_scales, u_specs, widths, strict=True)]
    levels = _stack(u_levels, [(u.shape[0], w) for w in widths], 1, u.device)
    u_codes, u_hat = gptq(u, factorize(hessian, damping=damping, act_order=act_order), levels)
    if refit != "none":
        factors = _factors(site, u_hat * gain, v_hat, strength)
        u_hat = u_hat * factors
        u_scales = [scales and (scales[0] * factors, scales[1]) for scales in u_scales]

    packed, start = [], 0
    for index, width in enumerate(widths):
        ranks = slice(start, start + width)
        packed.append(
            (
                _pack(u_codes[:, ranks], u_hat[:, ranks], u_specs[index], u_scales[index]),
                _pack(v_codes[ranks], v_hat[ranks], v_specs[index], v_scales[index]),
            )
        )
        start += width
    return (LowRank(tuple(packed), gain),)


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
