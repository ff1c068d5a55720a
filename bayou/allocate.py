"""Ranks under a byte budget: the largest that fit, per matrix shape, every byte counted.

All linears get the same bytes a weight; embeddings and heads get `embedding_rate` times that (their deltas are far
more concentrated: LOG.md has the sweep). What the whole-rank steps leave over is handed out rank by rank at the end.
A method without a rank takes what it takes, and the rest of the budget goes to the embeddings.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bayou import methods
from bayou.methods import TermLayout
from bayou.methods.deltacome import parse_bands
from bayou.plan import SiteRecord

TABLES = ("embedding", "head")
"""Roles whose matrices are tables of tokens."""

Expected = Callable[[SiteRecord], SiteRecord]


def as_it_is(site: SiteRecord) -> SiteRecord:
    """Expects that nothing is smaller than it is before it is entropy-coded."""
    return site


def _options(site: SiteRecord) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((key, value) for key, value in site.options.items() if key != "rank"))


@functools.lru_cache(65_536)  # a mixture of experts has ten thousand sites of three shapes
def _layout(
    method: str, shape: tuple[int, int], options: tuple[tuple[str, Any], ...], rank: int | None
) -> tuple[TermLayout, ...]:
    return methods.get(method).layout(shape, **dict(options), **({} if rank is None else {"rank": rank}))


def with_rank(site: SiteRecord, rank: int) -> SiteRecord:
    """The same site with its method's rank set, and the layout that follows."""
    options = {key: value for key, value in site.options.items() if key != "rank"}
    return replace(site, options=options | {"rank": rank}, terms=_layout(site.method, site.shape, _options(site), rank))


def fixed(site: SiteRecord) -> SiteRecord:
    """A site of a method without a rank, with its layout."""
    return replace(site, terms=_layout(site.method, site.shape, _options(site), None))


def paper_rank(shape: tuple[int, int], alpha: float, bands: list[tuple[int, int | None]]) -> int:
    """Ranks by Delta-CoMe's own accounting: sum of bits * ranks = 16 alpha out in / (out + in), nothing else counted.

    arXiv 2406.08903, section 3.3; 4096 x 4096 at alpha 1/16 and 8x2,3x32,2 gives 2 + 32 + 968.
    """
    left = 16 * alpha * shape[0] * shape[1] / (shape[0] + shape[1])
    total = 0
    for bits, ranks in bands:
        take = int(left // bits) if ranks is None else min(ranks, int(left // bits))
        total += take
        left -= bits * take
    return max(1, min(total, *shape))


def by_paper(sites: list[SiteRecord], ratio: float) -> list[SiteRecord]:
    """Every site that has a method at `paper_rank` for alpha = 1 / ratio. lowrank is one band of its own bits."""

    def chosen(site: SiteRecord) -> SiteRecord:
        if not site.method:
            return site
        if not methods.has_rank(site.method):
            return fixed(site)
        bands = parse_bands(site.options.get("bands", str(site.options.get("bits", 16))))
        return with_rank(site, paper_rank(site.shape, 1 / ratio, bands))

    return [chosen(site) for site in sites]


class _Group:
    """Sites of one shape, method, options and weight: the same rank is right for all, so it is looked for once."""

    def __init__(self, site: SiteRecord, weight: float, expected: Expected) -> None:
        self.site = site
        self._expected = expected
        self.members: list[int] = []
        self._share = weight * site.shape[0] * site.shape[1]
        self._sizes: dict[int, int] = {}

    def size(self, rank: int) -> int:
        """Bytes of one site at this rank."""
        if rank not in self._sizes:
            self._sizes[rank] = self._expected(with_rank(self.site, rank)).nbytes
        return self._sizes[rank]

    def rank(self, rate: float) -> int:
        """The largest rank within `rate` bytes a weight, times the group's own."""
        low, high = 1, min(self.site.shape)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.size(middle) <= rate * self._share else (low, middle - 1)
        return low


def least(sites: list[SiteRecord], expected: Expected = as_it_is) -> list[SiteRecord]:
    """The smallest that the sites can be: rank 1 wherever there is a rank."""
    return [expected(with_rank(site, 1) if methods.has_rank(site.method) else fixed(site)) for site in sites]


def allocate(
    sites: list[SiteRecord], budget: int, *, embedding_rate: float, expected: Expected = as_it_is
) -> list[SiteRecord]:
    """Ranks for `sites` so that their entries take at most `budget` bytes together; `least(sites)` where none do.

    embedding_rate: bytes a weight of embeddings and heads, relative to linears'. expected: a site of a rank as it is
    expected to come out, where that is not known (see spending.py).
    """
    chosen = least(sites, expected)
    dialled = [i for i, site in enumerate(sites) if methods.has_rank(site.method)]
    constant = sum(site.nbytes for site in chosen) - sum(chosen[i].nbytes for i in dialled)
    weight = {i: embedding_rate if sites[i].role in TABLES else 1.0 for i in dialled}
    if constant:  # only tables have a dial: then only their mutual proportions matter
        weight = dict.fromkeys(dialled, 1.0)
    if sum(site.nbytes for site in chosen) > budget:
        return chosen
    groups: dict[tuple[Any, ...], _Group] = {}
    for i in dialled:
        key = (sites[i].shape, sites[i].method, _options(sites[i]), weight[i])
        groups.setdefault(key, _Group(sites[i], weight[i], expected)).members.append(i)

    low, high = 0.0, 8.0
    for _ in range(50):
        middle = (low + high) / 2
        total = constant + sum(len(group.members) * group.size(group.rank(middle)) for group in groups.values())
        low, high = (middle, high) if total <= budget else (low, middle)
    group_of = {i: group for group in groups.values() for i in group.members}
    even = {id(group): group.rank(low) for group in groups.values()}
    final = {i: even[id(group_of[i])] for i in dialled}
    left = budget - constant - sum(group_of[i].size(rank) for i, rank in final.items())
    order = sorted(dialled, key=lambda i: (sites[i].role in TABLES, i))
    for step in (16, 8, 4, 2, 1):
        for i in order:
            more = min(final[i] + step, *sites[i].shape)
            cost = group_of[i].size(more) - group_of[i].size(final[i])
            if cost <= left:
                final[i], left = more, left - cost
    for i, rank in final.items():
        chosen[i] = expected(with_rank(sites[i], rank))
    return chosen


def within(
    sites: list[SiteRecord],
    limit: int,
    size: Callable[[list[SiteRecord]], int],
    *,
    embedding_rate: float,
    expected: Expected = as_it_is,
) -> tuple[list[SiteRecord], int]:
    """All sites of a file, at ranks by which it has at most `limit` bytes, and the least bytes that it can have.

    size: bytes of the whole file with given sites. Where the least is above `limit`, the sites are the smallest.
    """
    coded = [site for site in sites if site.method]

    def among_all(picked: list[SiteRecord]) -> list[SiteRecord]:
        following = iter(picked)
        return [next(following) if site.method else site for site in sites]

    smallest = among_all(least(coded, expected))
    fewest = size(smallest)
    if fewest > limit:
        return smallest, fewest
    room = fewest - sum(site.nbytes for site in smallest)
    # The header grows a little with the variety of ranks, so the room for it is found by trying. This ends: the entries
    # fit into what the room left, so a file that is too large has found more room, or it is the smallest, which fits.
    while True:
        trial = among_all(allocate(coded, limit - room, embedding_rate=embedding_rate, expected=expected))
        total = size(trial)
        if total <= limit:
            return trial, fewest
        room = total - sum(site.nbytes for site in trial)
