"""entropy.py: what goes in comes out, in few bytes, and what cannot have been written is refused in bounded time."""

import numpy as np
import pytest
from numpy.typing import NDArray

from bayou import entropy


def drawn(count: int, contexts: int = 9, symbols: int = 50, seed: int = 0) -> tuple[NDArray[np.uint8], ...]:
    """(symbols, contexts) whose distributions differ from context to context."""
    rng = np.random.default_rng(seed)
    context = rng.integers(0, contexts, count).astype(np.uint8)
    value = np.abs(rng.normal(0, 1, count)) * (0.1 + context / 2)
    return np.minimum(value, symbols - 1).astype(np.uint8), context


def counted(symbols: NDArray[np.uint8], contexts: NDArray[np.uint8], width: int) -> NDArray[np.int64]:
    rows = int(contexts.max(initial=0)) + 1
    places = contexts.astype(np.int64) * width + symbols
    return np.bincount(places, minlength=rows * width).reshape(rows, width)


def bits(counts: NDArray[np.int64]) -> float:
    """The empirical entropy of all symbols, given their contexts."""
    total = counts.sum(1, keepdims=True)
    used = counts > 0
    return float((counts * np.log2(np.where(used, total / np.maximum(counts, 1), 1))).sum())


@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 5000])
@pytest.mark.parametrize("lanes", [1, 3, 64, 300])
def test_what_goes_in_comes_out(count: int, lanes: int) -> None:
    symbols, contexts = drawn(count)
    table = entropy.frequencies(counted(symbols, contexts, 50))
    states, words = entropy.encode(symbols, contexts, table, lanes)
    assert len(states) == lanes
    found = entropy.decode(states, words, contexts, table)
    assert found.dtype == np.uint8 and np.array_equal(found, symbols)


@pytest.mark.parametrize("width", [2, 147, 256])
def test_alphabets_of_any_size_and_contexts_of_one_symbol(width: int) -> None:
    rng = np.random.default_rng(1)
    symbols, contexts = rng.integers(0, width, 3000).astype(np.uint8), np.zeros(3000, np.uint8)
    for of_one in (0, 1, width - 1):
        symbols[contexts == 1] = of_one
        contexts[:1000] = 1
        symbols[:1000] = of_one
        table = entropy.frequencies(counted(symbols, contexts, width))
        entropy.check(table)
        states, words = entropy.encode(symbols, contexts, table, 10)
        assert np.array_equal(entropy.decode(states, words, contexts, table), symbols)


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_the_bytes_are_within_half_a_percent_of_the_entropy(scale: float) -> None:
    rng = np.random.default_rng(2)
    contexts = rng.integers(0, 6, 400_000).astype(np.uint8)
    symbols = np.clip(np.round(rng.normal(0, scale, len(contexts)) * (1 + contexts) + 100), 0, 255).astype(np.uint8)
    counts = counted(symbols, contexts, 256)
    table = entropy.frequencies(counts)
    cost = entropy.cost(counts, table)
    states, words = entropy.encode(symbols, contexts, table, entropy.lanes_for(len(symbols), cost))
    assert bits(counts) <= cost <= 1.0015 * bits(counts)
    # Few lanes make slow loops, so what takes hardly anything has more than half a percent of them.
    lanes = 32 * len(symbols) / 16384
    assert 4 * len(states) + 2 * len(words) <= max(1.005 * bits(counts), bits(counts) + lanes) / 8 + 8


def test_frequencies_are_whole_and_leave_nothing_out() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        counts = rng.integers(0, 2, (4, 200)) * rng.geometric(10.0 ** rng.uniform(-8, 0), (4, 200))
        table = entropy.frequencies(counts)
        entropy.check(table)
        assert (table[counts > 0] > 0).all() and table.max() < entropy.TOTAL
        assert np.array_equal(table.any(axis=1), counts.any(axis=1))


def stream() -> tuple[entropy.States, entropy.Words, NDArray[np.uint8], entropy.Frequencies]:
    symbols, contexts = drawn(4000)
    table = entropy.frequencies(counted(symbols, contexts, 50))
    return *entropy.encode(symbols, contexts, table, 16), contexts, table


def test_a_stream_of_another_length_is_refused() -> None:
    states, words, contexts, table = stream()
    for wrong in (words[:-1], words[1:], np.append(words, np.uint16(0)), words[:0]):
        with pytest.raises(ValueError, match="stream"):
            entropy.decode(states, wrong, contexts, table)
    for number in (contexts[:-1], np.append(contexts, contexts[:1])):
        with pytest.raises(ValueError):
            entropy.decode(states, words, number, table)


def test_states_that_cannot_be_are_refused() -> None:
    states, words, contexts, table = stream()
    low = states.copy()
    low[3] = 65535
    for wrong in (low, states[:0], np.zeros(16, np.uint32)):
        with pytest.raises(ValueError, match="states"):
            entropy.decode(wrong, words, contexts, table)


def test_tables_that_cannot_be_are_refused() -> None:
    states, words, contexts, table = stream()
    for change in (1, -1):
        wrong = table.copy()
        wrong[0, np.argmax(wrong[0])] = int(wrong[0].max()) + change
        with pytest.raises(ValueError, match="sum"):
            entropy.decode(states, words, contexts, wrong)
    certain = table.copy()
    certain[0] = 0
    certain[0, 0] = entropy.TOTAL
    with pytest.raises(ValueError, match="sum"):
        entropy.decode(states, words, contexts, certain)
    nothing = table.copy()
    nothing[2] = 0
    for wrong in (nothing, table[:-1]):
        with pytest.raises(ValueError, match="context"):
            entropy.decode(states, words, contexts, wrong)


def test_noise_in_place_of_a_stream_ends_in_a_value_error_or_in_symbols_of_the_table() -> None:
    rng = np.random.default_rng(4)
    states, words, contexts, table = stream()
    refused = 0
    for _ in range(100):
        noise = rng.integers(0, 2**16, len(words) + int(rng.integers(-9, 10))).astype(np.uint16)
        begin = rng.integers(0, 2**32, len(states), dtype=np.uint32)
        try:
            found = entropy.decode(begin if rng.random() < 0.5 else states, noise, contexts, table)
            assert len(found) == len(contexts) and (table[contexts, found] > 0).all()
        except ValueError:
            refused += 1
    assert refused == 100  # by chance a stream ends right about once in 2^256
