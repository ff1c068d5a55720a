"""The fine-tune bit for bit: low rank foretells it, and entropy-coded steps between neighbouring floats do the rest.

What the encoder of a site gives here are only the terms that foretell; bayou.exact adds the steps (bayou.steps), coded
by rANS (Duda 2013, arXiv 1311.2540). Steps from the base alone are what FM-Delta (NeurIPS 2024) codes, and ZipNN the
bytes of the xor (arXiv 2411.05239). But a delta's first directions hold much of its energy in few bytes, and where what
is left is half as large, a step takes a bit less.

Both sides must foretell the same bits, in whatever order they sum. So u's codes have no scales and v's one a rank, all
within 2^13 of each other; the gain is a power of two; and every product and sum is exact in fp64:

    23 bits of scales + 8 + 8 of codes + 7 of 128 ranks = 46 of 53
"""

import math
import re

import torch
from torch import Tensor

from bayou.decompose import svd
from bayou.delta import LowRank, Term
from bayou.errors import BadInput
from bayou.methods import BLOCK, Site, TermLayout, nbytes
from bayou.packed import Packed, Spec

EMBEDDINGS = {"method": "exact"}
"""Embeddings are stored in the same way."""

EXACT = True
"""The steps to the very fine-tune follow the terms, so the size is known only when all is encoded."""

_NOMINAL = "4x16"
_BAND = re.compile(r"([2-8])x([1-9][0-9]{0,2})")
_FIRST = (4, 8, 16)  # ranks in 8 bits that are tried before others
_CLIPS = (1.0, 0.85, 0.7, 0.55, 0.4)
_TOP, _RANGE = 9, 12  # the largest scale of v is in 2^9 .. 2^10, the least that is kept 2^12 below


def _bands(bands: str, most: int) -> list[tuple[int, int]]:
    """[(8, 2), (4, 14)] for "8x2,4x14": bits and ranks of each block, `most` ranks in all; [] for "none"."""
    found: list[tuple[int, int]] = []
    asked = 0
    words = [] if bands == "none" else (_NOMINAL if bands == "auto" else bands).split(",")
    for word in words:
        match = _BAND.fullmatch(word.strip())
        if not match:
            raise BadInput(
                f"bands {bands!r}: {word!r} is not BITSxRANKS with 2 to 8 bits, e.g. 7x2,4x14; or auto, none"
            )
        ranks = min(int(match[2]), most - sum(ranks for _, ranks in found))
        found += [(int(match[1]), ranks)] if ranks > 0 else []
        asked += int(match[2])
    if asked > BLOCK:
        raise BadInput(f"bands {bands!r}: more than {BLOCK} ranks, whose sum might not be exact")
    return found


def layout(shape: tuple[int, int], *, bands: str = "auto") -> tuple[TermLayout, ...]:
    """One LowRank with a block a band. auto, as long as `foretold` has not looked at the matrix, is 4x16."""
    blocks = tuple((ranks, str(bits), f"{bits}r") for bits, ranks in _bands(bands, min(shape)))
    return (TermLayout("LowRank", blocks),) if blocks else ()


def encode(site: Site, *, bands: str = "auto") -> tuple[Term, ...]:
    """The first singular vectors, u rounded to nearest, v fitted to what came of it and rounded."""
    wanted = _bands(bands, min(site.delta.shape))
    return _coded(site, wanted, svd(site.delta, sum(ranks for _, ranks in wanted))[0]) if wanted else ()


def _coded(site: Site, wanted: list[tuple[int, int]], u: Tensor) -> tuple[Term, ...]:
    u = u[:, : sum(ranks for _, ranks in wanted)]
    parts = u.split([ranks for _, ranks in wanted], dim=1)
    codes = [_codes(part.T, bits)[0].T for part, (bits, _) in zip(parts, wanted, strict=True)]
    levels = torch.cat([c.double() - (2**bits - 1) / 2 for c, (bits, _) in zip(codes, wanted, strict=True)], dim=1)
    normal = levels.T @ levels
    normal.diagonal().add_(1e-9 * normal.diagonal().mean())
    product = torch.zeros(levels.shape[1], site.delta.shape[1], dtype=torch.float64, device=levels.device)
    for start, block in site.delta.blocks():
        product += levels[start : start + len(block)].T @ block.double()
    v = torch.linalg.solve(normal, product)

    fitted = [_codes(part, bits) for part, (bits, _) in zip(v.split([r for _, r in wanted]), wanted, strict=True)]
    top = max(float(scale.max()) for _, scale in fitted)
    # Not so small that the gain, in fp32, were none.
    gain = 2.0 ** max(-126, math.floor(math.log2(top)) - _TOP) if top > 0 else 1.0
    blocks = []
    for (bits, _), u_codes, part, (_, scale) in zip(
        wanted, codes, v.split([r for _, r in wanted]), fitted, strict=True
    ):
        stored = (scale / gain).half()
        stored[stored < 2.0 ** (_TOP - _RANGE)] = 0
        divisor = torch.where(stored > 0, stored.double() * gain, torch.inf)[:, None]
        v_codes = _rounded(part / divisor, bits)
        blocks.append(
            (
                Packed.codes(u_codes, Spec.parse(str(bits))),
                Packed.codes(v_codes, Spec.parse(f"{bits}r"), stored[:, None]),
            )
        )
    return (LowRank(tuple(blocks), gain),)


def _codes(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """uint8 codes of rows (n, m), and the scale (n,) of each by which it loses least."""
    peak = rows.abs().amax(dim=1).double()
    best = torch.full_like(peak, torch.inf)
    codes, scales = torch.zeros(rows.shape, dtype=torch.uint8, device=rows.device), torch.zeros_like(peak)
    for clip in _CLIPS:
        scale = peak * clip / ((2**bits - 1) / 2)
        tried = _rounded(rows / scale.clamp_min(1e-300)[:, None], bits)
        values = (tried.double() - (2**bits - 1) / 2) * scale[:, None]
        lost = (values - rows).square().sum(1)
        better = lost < best
        best = torch.where(better, lost, best)
        codes, scales = torch.where(better[:, None], tried, codes), torch.where(better, scale, scales)
    return codes, scales


def _rounded(levels: Tensor, bits: int) -> Tensor:
    """The nearest codes of values in units of the scale."""
    return (levels + (2**bits - 1) / 2).round().clamp(0, 2**bits - 1).to(torch.uint8)


def foretold(site: Site) -> tuple[str, tuple[Term, ...]]:
    """The bands by which terms and steps together are smallest, as the spectrum lets expect; and the terms.

    Steps of a row of which an energy R is left take in/2 log2 R bits and a constant; rows differ in R by much in an
    embedding, where most tokens hardly moved. Ranks come in numbers that fill the words of u's rows.
    """
    out, width = shape = site.delta.shape
    # So many are found by passing over the matrix a few times (see decompose.svd); more hardly ever pay.
    most = max(1, min(BLOCK, min(shape) // 12))
    u, s, v = svd(site.delta, most)
    energy = torch.cat([block.double().square().sum(1) for _, block in site.delta.blocks()])
    if not float(energy.sum()) > 0:
        return "none", ()
    each = s.double().square()
    caught = torch.cumsum(each * u.double().square(), dim=1)
    noise = {bits: torch.cumsum(each * (_noise(u.T, bits) + _noise(v, bits)), 0) / out for bits in (3, 4, 8)}

    def expected(bands: str) -> float:
        rest, ranks = energy.clone(), 0
        for bits, more in _bands(bands, most):
            for ends, sign in ((ranks, 1), (ranks + more, -1)):
                if ends:
                    rest += sign * (caught[:, ends - 1] - noise[bits][ends - 1])
            ranks += more
        # Below a step's own size nothing is saved any more; nor does a sum of squares say more than this.
        bits_of_steps = width / 2 * torch.log2(torch.maximum(rest, 1e-3 * energy.mean())).sum()
        return float(bits_of_steps) + 8 * nbytes(layout(shape, bands=bands), shape)

    counts = [(bits, n) for bits, step in ((4, 8), (3, 32)) for n in range(step, most + step, step)]
    recipes = ["none", *(f"8x{first}" for first in _FIRST), *(f"{bits}x{n}" for bits, n in counts if n <= BLOCK)]
    recipes += [f"8x{first},{bits}x{n}" for first in _FIRST for bits, n in counts if first + n <= BLOCK]
    bands = min(recipes, key=expected)
    wanted = _bands(bands, most)
    return bands, _coded(site, wanted, u) if wanted else ()


def _noise(rows: Tensor, bits: int) -> Tensor:
    """Share of each row's energy that rounding it loses."""
    codes, scale = _codes(rows, bits)
    lost = (codes.double() - (2**bits - 1) / 2) * scale[:, None] - rows
    return lost.square().sum(1) / rows.double().square().sum(1).clamp_min(1e-300)
