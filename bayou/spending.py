"""Ranks for a file whose entropy-coded bytes are what was asked for, chosen as the sites are encoded.

How much a site's codes shrink is known when it is encoded. So ranks are chosen by a guess, and again now and then, for
all sites that are left, by how much those of the same shape and method have shrunk. What is encoded together is a
*turn*. A first turn of a kind that has missed the guess by much is encoded again, and so is the last one of all until
the file fits. What was chosen depends on the sizes alone: a run that goes on, or several processes, choose the same.
"""

from dataclasses import replace
from typing import Any

from bayou import allocate
from bayou.contents import Contents
from bayou.errors import TooSmall
from bayou.methods import nbytes
from bayou.packed import ALIGN
from bayou.plan import SiteRecord

_GUESS = 0.86
"""Coded bytes over bytes: deltacome's files of the test bed have .855 (LOG.md, "Entropy-coded terms")."""
_MISSED = 0.04
_TIMES = (0.0, 0.02, 0.1, 0.25, 0.5, 0.75)
"""Ranks are chosen again when these shares of the weights are done, and near the end: each time the Plan grows."""
_NEAR = 0.92
_SCARCE = 1.5
"""Below so many times the least file nothing is expected to shrink: what one turn took too much no other could save."""
_ATTEMPTS = 5
_FULL = 0.99
"""A file of less than this of what was asked for is tried again."""


class Spending:
    """sites: as they stand; `coded` of those to come is what is expected of them.

    limit: bytes of the file at most; what: what asked for that. Raises TooSmall where the least file, coded or not, is
    larger.
    """

    def __init__(self, contents: Contents, limit: int, what: str, embedding_rate: float) -> None:
        self._contents, self._limit, self._what, self._rate = contents, limit, what, embedding_rate
        self.sites = list(contents.sites)
        self._done = {index for index, site in enumerate(self.sites) if not site.method}
        self._ratios: dict[Any, float] = {}
        self._weights = sum(site.shape[0] * site.shape[1] for site in self.sites if site.method)
        self._times = list(_TIMES)
        self._surprised = False
        coded = [index for index, site in enumerate(self.sites) if site.method]
        smallest = dict(zip(coded, allocate.least([self.sites[index] for index in coded]), strict=True))
        least = self._bytes([smallest.get(index, site) for index, site in enumerate(self.sites)])
        if least > limit:
            room = least - sum(site.nbytes for site in smallest.values())
            raise TooSmall(
                f"{what} is {limit:,} bytes, but the least that this method can make of this model is {least:,} bytes "
                f"({room:,} of them exact tensors and header); ask for a larger file, or choose another method",
                least,
            )
        self._shrinks = limit >= _SCARCE * least
        self._choose(0, [])

    def turn(self, indexes: list[int], attempt: int) -> None:
        """Ranks for the sites of a turn are in `sites` after this. attempt: how often it has been encoded already."""
        self._done -= set(indexes)
        share = sum(self._size(index) for index in self._done) / max(1, self._weights)
        due = attempt > 0 or share >= _NEAR or self._surprised or self._last(indexes)
        while self._times and share >= self._times[0]:
            self._times.pop(0)
            due = True
        self._turn_is_new = not attempt and any(_key(self.sites[i]) not in self._ratios for i in indexes)
        if due:
            self._choose(attempt, indexes if self._last(indexes) else [])
        self._attempt = attempt

    def settle(self, records: dict[int, SiteRecord]) -> bool:
        """The turn's sites as they came out, `coded` measured; False where the turn must be encoded again."""
        expected = sum(self.sites[index].nbytes for index in records)
        sums: dict[Any, list[int]] = {}
        for index, record in records.items():
            total = sums.setdefault(_key(record), [0, 0])
            total[0] += record.nbytes
            total[1] += nbytes(record.terms, record.shape)
            self.sites[index] = record
        self._ratios |= {key: coded / whole for key, (coded, whole) in sums.items() if whole}
        self._done |= set(records)
        if len(self._done) < len(self.sites):
            found = sum(record.nbytes for record in records.values())
            self._surprised = abs(found - expected) > _MISSED * expected
            return not (self._shrinks and self._turn_is_new and self._surprised)
        size = self._bytes(self.sites)
        if self._attempt >= _ATTEMPTS:
            if size > self._limit:
                raise TooSmall(
                    f"{self._what} is {self._limit:,} bytes, and the file has {size:,}; ask for a larger", size
                )
            return True
        full = all(record.options.get("rank") == min(record.shape) for record in records.values())
        return size <= self._limit and (full or size >= _FULL * self._limit)

    def _last(self, indexes: list[int]) -> bool:
        return len(self._done) + len(indexes) == len(self.sites)

    def _size(self, index: int) -> int:
        site = self.sites[index]
        return site.shape[0] * site.shape[1] if site.method else 0

    def _bytes(self, sites: list[SiteRecord]) -> int:
        return replace(self._contents, sites=sites).nbytes()

    def _expected(self, site: SiteRecord) -> SiteRecord:
        whole = nbytes(site.terms, site.shape)
        return replace(site, coded=min(whole, round(self._ratios.get(_key(site), _GUESS) * whole)))

    def _choose(self, attempt: int, last: list[int]) -> None:
        """Ranks for all that is not done, so that the whole file is as large as the limit, if expectations hold.

        last: the sites of the last turn, at its `attempt`.
        """
        left = [index for index in range(len(self.sites)) if index not in self._done]
        # What a last turn was expected to take it may miss by a few bytes a site.
        margin = (1 + attempt) * (ALIGN * len(last) + self._limit // 5000) if last and self._shrinks else 0
        expected = self._expected if self._shrinks or (last and attempt) else allocate.as_it_is
        if attempt >= _ATTEMPTS:
            margin, expected = 0, allocate.as_it_is

        def size(chosen: list[SiteRecord]) -> int:
            sites = list(self.sites)
            for index, site in zip(left, chosen, strict=True):
                sites[index] = site
            return self._bytes(sites)

        sites = [replace(self.sites[index], coded=0) for index in left]
        chosen, _ = allocate.within(sites, self._limit - margin, size, embedding_rate=self._rate, expected=expected)
        for index, site in zip(left, chosen, strict=True):
            self.sites[index] = site


def _key(site: SiteRecord) -> Any:
    """What sites shrink alike by."""
    options = tuple(sorted((key, value) for key, value in site.options.items() if key != "rank"))
    return site.shape, site.method, options
