"""What Bayou does when no method is named: the truest file that it knows to make of any size.

    factors     Delta-CoMe's (arXiv 2406.08903): singular vectors, all in 2 bits, GPTQ-rounded, each
                row at its full strength
    targets     not each delta D as it is, but D + W C: what the fine-tune's linear gives of its input x, from the input
                y that the compressed model has; so each matrix makes good what those before it have lost
                (moments.correction; PrinMix's corrected targets, arXiv 2506.11087, here over both models' inputs)
    bytes       entropy-coded, and as many ranks as fill the size that is asked for then (spending.py)

LOG.md has what each is worth. Each can be had apart: `--method deltacome --activations corrected`, `--entropy`.
"""

from collections.abc import Sequence
from typing import Any

from bayou import methods
from bayou.delta import Term
from bayou.methods import Site, TermLayout, deltacome

EMBEDDINGS = {"method": "lowrank", "bits": 4}
"""As deltacome's. A table's delta is its own target: no activation reaches it that could lack something."""

USES_GRAM = True
"""Wants the second moments of each matrix's input."""

ACTIVATIONS = "corrected"
"""Of the fine-tune and of the compressed model, side by side."""

SIZED = True
"""The size that is asked for is that of the entropy-coded file."""


def layout(
    shape: tuple[int, int], *, rank: int, bands: str = "2", group: int = 128, damping: float = 0.01
) -> tuple[TermLayout, ...]:
    """deltacome's."""
    return deltacome.layout(shape, rank=rank, bands=bands, group=group, damping=damping)


def encode(site: Site, *, rank: int, bands: str = "2", group: int = 128, damping: float = 0.01) -> tuple[Term, ...]:
    """deltacome's factors of what the site should give, `rank` ranks in all; the options are deltacome's."""
    return deltacome.encode(site, rank=rank, bands=bands, group=group, damping=damping)


def encode_many(sites: Sequence[Site], options: Sequence[dict[str, Any]]) -> list[tuple[Term, ...]]:
    """What `encode` gives of each site with its own options, in fewer sweeps."""
    known = methods.options("deltacome")
    return deltacome.encode_many(sites, [known | chosen for chosen in options])
