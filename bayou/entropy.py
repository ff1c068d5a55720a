"""An entropy coder for small symbols in contexts: static tables, interleaved rANS, all lanes at once.

rANS (Duda 2013, arXiv 1311.2540) with 32-bit states and 16-bit renormalisation. Symbol i belongs to lane i mod L, and
the states of all lanes take a step together, so that numpy's loops do the work: the more lanes, the faster, and three
bytes of the stream are lost to each. A context's symbols have integer frequencies that sum to 2^12; README.md, "Coded
symbols", states the decoder.

General libraries were looked at: zlib and zstd know nothing of a number's context, by which the steps of `exact` gain a
fifth, and constriction's formats are a Rust library's own. bench/lossless.py measures.
"""

import numpy as np
from numpy.typing import NDArray

PRECISION = 12
TOTAL = 2**PRECISION
"""Sum of a context's frequencies."""
LEAST = 2**16
"""A state lies in LEAST .. 2^32 - 1, but between its step and its renormalisation; encoding begins at LEAST."""
MAX_LANES = 2**16
Words = NDArray[np.uint16]
States = NDArray[np.uint32]
Bytes = NDArray[np.uint8]
Frequencies = NDArray[np.uint16]
"""(contexts, symbols); a row sums to TOTAL, or to 0 for a context that never occurs."""


def lanes_for(count: int, bits: float) -> int:
    """How many lanes `count` symbols of together `bits` bits are given: a lane's end costs about 3 bytes.

    One in 9600 bits, which keeps that to a quarter of a percent; but no fewer than one in 16384 symbols, below which
    numpy's loops are short and slow, whatever little the symbols take.
    """
    return max(1, min(MAX_LANES, count, int(max(bits / 9600, count / 16384))))


def frequencies(counts: NDArray[np.int64]) -> Frequencies:
    """Integer frequencies for the counts (contexts, symbols, at least 2 and at most 256) of each context.

    What occurs has a frequency of at least 1 and at most TOTAL - 1, so a context has at least two symbols.
    """
    table = np.zeros(counts.shape, np.int64)
    for row, count in zip(table, counts, strict=True):
        seen = np.flatnonzero(count)
        if len(seen) == 0:
            continue
        if len(seen) == 1:  # a frequency of TOTAL would need a 13th bit
            row[seen[0]], row[0 if seen[0] else 1] = TOTAL - 1, 1
            continue
        share = count[seen] * (TOTAL / count.sum())
        row[seen] = np.maximum(1, np.round(share)).astype(np.int64)
        while excess := int(row.sum()) - TOTAL:
            # Where one more or less changes the length of the stream least: count * log2 of the quotient.
            after = row[seen] - np.sign(excess)
            with np.errstate(divide="ignore"):
                cost = np.where(after < 1, np.inf, count[seen] * np.log2(row[seen] / after))
            take = np.argsort(cost, kind="stable")[: max(1, min(abs(excess), len(seen) // 2))]
            take = take[np.isfinite(cost[take])]
            row[seen[take]] -= np.sign(excess)
    return table.astype(np.uint16)


def cost(counts: NDArray[np.int64], table: Frequencies) -> float:
    """Bits that symbols of these counts take with these frequencies."""
    used = counts > 0
    return float((counts[used] * (PRECISION - np.log2(table[used].astype(np.float64)))).sum())


def encode(symbols: Bytes, contexts: NDArray[np.integer], table: Frequencies, lanes: int) -> tuple[States, Words]:
    """The states (lanes,) to begin decoding with, and the words that it reads. symbols, contexts: (count,)."""
    wide = table.astype(np.uint32)
    starts = (np.cumsum(wide, axis=1, dtype=np.uint32) - wide).ravel()
    flat, width = wide.ravel(), table.shape[1]
    state = np.full(lanes, LEAST, np.uint32)
    words: list[Words] = []
    places = contexts.astype(np.int32) * np.int32(width) + symbols
    each, starts = flat[places], starts[places]
    full_from = each.astype(np.uint32) << 20  # at TOTAL << 20 a frequency would be beyond 32 bits: it cannot be
    for first in range((len(symbols) - 1) // lanes * lanes, -1, -lanes):  # the last symbols first, as a stack
        frequency = each[first : first + lanes]
        now = state[: len(frequency)]
        full = (now >= full_from[first : first + lanes]).nonzero()[0]
        words.append(now[full].astype(np.uint16))
        now[full] >>= 16
        quotient = now // frequency
        # quotient * TOTAL + the rest + start, with the rest as now - quotient * frequency
        now += quotient * (TOTAL - frequency) + starts[first : first + lanes]
    return state, np.concatenate([*reversed(words), np.zeros(0, np.uint16)])


def decode(states: States, words: Words, contexts: NDArray[np.integer], table: Frequencies) -> Bytes:
    """The symbols, one for each of `contexts`. Raises ValueError for what `encode` cannot have made.

    Time and memory go by the number of contexts, whatever stands in the words.
    """
    check(table)
    lanes, count = len(states), len(contexts)
    if not 1 <= lanes <= MAX_LANES or (states < LEAST).any():
        raise ValueError(f"{lanes} states, or one below {LEAST}")
    occurring = np.flatnonzero(np.bincount(contexts, minlength=1))
    if count and (occurring[-1] >= len(table) or not table[occurring].any(axis=1).all()):
        raise ValueError("a context without frequencies occurs")
    slots = _slots(table)
    first_slots = contexts.astype(np.int32) << PRECISION
    state, supply = states.copy(), words.astype(np.uint32)
    symbols = np.empty(count, np.uint8)
    at = 0
    place: NDArray[np.int64] = np.empty(lanes, np.int64)
    entry: NDArray[np.uint32] = np.empty(lanes, np.uint32)
    part: NDArray[np.uint32] = np.empty(lanes, np.uint32)
    low: NDArray[np.bool_] = np.empty(lanes, bool)
    now = state
    for first in range(0, count, lanes):
        here = first_slots[first : first + lanes]
        if len(here) < lanes:
            last = slice(len(here))
            now, place, entry, part, low = now[last], place[last], entry[last], part[last], low[last]
        np.bitwise_and(now, TOTAL - 1, out=part)
        np.add(here, part, out=place)
        slots.take(place, out=entry, mode="clip")  # in range by the checks above; clip spares numpy a buffer
        symbols[first : first + lanes] = entry  # its low 8 bits
        np.right_shift(now, PRECISION, out=now)
        np.right_shift(entry, 8, out=part)
        np.bitwise_and(part, TOTAL - 1, out=part)
        np.multiply(now, part, out=now)
        np.right_shift(entry, 20, out=entry)
        np.add(now, entry, out=now)
        short = np.less(now, LEAST, out=low).nonzero()[0]
        stop = at + len(short)
        if stop > len(supply):
            raise ValueError(f"the stream of {len(supply)} words ends too early")
        now[short] = (now[short] << 16) | supply[at:stop]
        at = stop
    if at != len(supply) or (state != LEAST).any():
        raise ValueError(f"the stream does not end where it should: {at} of {len(supply)} words were read")
    return symbols


def check(table: Frequencies) -> None:
    """Raises ValueError unless each row of frequencies sums to TOTAL, none of them TOTAL itself, or to 0."""
    sums = table.sum(axis=1, dtype=np.int64)
    if not np.isin(sums, (0, TOTAL)).all() or (table >= TOTAL).any() or not 1 <= table.shape[1] <= 256:
        raise ValueError(f"frequencies that do not sum to {TOTAL}")


def _slots(table: Frequencies) -> NDArray[np.uint32]:
    """For each context and low 12 bits of a state: symbol | frequency << 8 | (bits - the symbol's start) << 20."""
    slots = np.zeros((len(table), TOTAL), np.uint32)
    for row, frequency in zip(slots, table.astype(np.uint32), strict=True):
        if frequency.any():
            symbol = np.repeat(np.arange(len(frequency), dtype=np.uint32), frequency)
            start = np.cumsum(frequency, dtype=np.uint32) - frequency
            row[:] = symbol | (frequency[symbol] << 8) | ((np.arange(TOTAL, dtype=np.uint32) - start[symbol]) << 20)
    return slots.ravel()
