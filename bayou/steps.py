"""Steps between neighbouring floats: what moves a predicted matrix to the very bits of another, entropy-coded.

Floats of one dtype have an order, and with it an integer: the bits where the sign is +, ~bits in all but the sign where
it is -. A step is the difference of two such integers. The larger the predicted number, the further its neighbours
are apart and the fewer steps a difference is; and rows and columns differ in how far they are moved. So the context of
a step is

    how many of the chunk's thresholds are <= R[row] + C[column] - q * exponent of the predicted number

where R and C are log2 of the mean difference in 1/q octaves. Steps of up to 15 are symbols; of larger ones the symbol
has the octave and two bits more, and the rest are plain bits. README.md, "Steps", states every byte.

A matrix is cut into chunks of rows, each with its own tables, so that memory does not grow with it.
"""

import contextlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayou import entropy
from bayou.errors import BadFile
from bayou.packed import aligned

CHUNK = 2**22
"""Elements of a chunk, at most, but for a matrix whose one row has more."""
DIRECT = 15
"""Steps up to this size are symbols of their own: 0, +1, -1, +2, ... are 0, 1, 2, 3, ..."""
_FIRST = 2 * DIRECT + 1  # the first symbol of an octave's quarter: sizes 16 .. 19
_OCTAVES = range(4, 33)
SYMBOLS = _FIRST + 4 * len(_OCTAVES)
MAX_CONTEXTS = 128
_FINENESS = 4
_RAW, _CODED = 0, 1
_HEAD, _CHUNK_HEAD = struct.Struct("<I12x"), struct.Struct("<BBBxIIII12x")
_NARROW = 64  # a mean over fewer numbers than this costs more than it tells
_APART = 64  # the class of the least that has moved at all, above that of what has not
_HIGHEST, _LOWEST = 2 * 255, -255 * 8
"""Bounds of what thresholds are compared with: classes are at most 255, q at most 8."""
_TABLE_BITS = 8  # about what a symbol of a context's table takes

KINDS = {
    torch.bfloat16: (torch.int16, 7, 255),
    torch.float16: (torch.int16, 10, 31),
    torch.float32: (torch.int32, 23, 255),
}
"""Of each dtype that has steps: integers of its width, bits of its mantissa, its largest exponent field."""

Bytes = NDArray[np.uint8]
Steps = NDArray[np.signedinteger]


def chunk_rows(width: int) -> int:
    """Rows of a chunk of a matrix of `width` columns."""
    return max(1, CHUNK // width)


def encode(chunks: Iterator[tuple[Tensor, Tensor]], width: int) -> bytes:
    """The section for a matrix; chunks: (predicted, wanted) of every `chunk_rows(width)` rows, (rows, width)."""
    pieces = [_HEAD.pack(chunk_rows(width))]
    pieces += [_chunk(predicted, wanted) for predicted, wanted in chunks]
    return b"".join(pieces)


def move(section: memoryview, weight: Tensor, where: str) -> None:
    """Move the predicted `weight` (out, in), contiguous and of a dtype in KINDS, to the wanted one, in place.

    Raises BadFile, beginning with `where`, for a section that `encode` cannot have made for such a matrix.
    """
    with _told(where):
        for start, chunk in _read(section, (weight.shape[0], weight.shape[1]), weight.element_size()):
            chunk.move(weight[start : start + chunk.shape[0]])


def check(section: memoryview, shape: tuple[int, int], itemsize: int, where: str) -> None:
    """Raises BadFile for a section whose structure does not hold: all that can be seen without the prediction."""
    with _told(where):
        for _, chunk in _read(section, shape, itemsize):
            if chunk.kind == _CODED:
                chunk.tables()


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise BadFile(f"{where}: its steps are not as specified: {error}") from None


def _read(section: memoryview, shape: tuple[int, int], itemsize: int) -> Iterator[tuple[int, "_Chunk"]]:
    """(first row, chunk) of every chunk of a matrix."""
    if len(section) < _HEAD.size:
        raise ValueError(f"{len(section)} bytes have no room for a header")
    (rows,) = _HEAD.unpack_from(section)
    if rows < 1 or rows * shape[1] > max(CHUNK, shape[1]):
        raise ValueError(f"chunks of {rows:,} rows of {shape[1]:,}")
    at = _HEAD.size
    for start in range(0, shape[0], rows):
        chunk, at = _Chunk.read(section, at, min(rows, shape[0] - start), shape[1], itemsize)
        yield start, chunk
    if at != len(section):
        raise ValueError(f"{len(section) - at:,} bytes too many")


def ordered(bits: Steps) -> Steps:
    """Bit patterns as integers in the order of the floats, -0 before +0; its own inverse."""
    most = np.iinfo(bits.dtype)
    return bits ^ ((bits >> (most.bits - 1)) & bits.dtype.type(most.max))


def _integers(tensor: Tensor) -> Steps:
    """The bit patterns of floats as signed integers of their width, a view where the tensor is contiguous."""
    return tensor.contiguous().view(KINDS[tensor.dtype][0]).numpy()


def _exponents(predicted: Tensor) -> NDArray[np.int16]:
    """The exponent field of each number; subnormal ones lie as far apart as those above them."""
    _, mantissa, most = KINDS[predicted.dtype]
    return np.maximum((_integers(predicted) >> mantissa) & most, 1).astype(np.int16)


def _spread(row: Bytes, column: Bytes, exponents: NDArray[np.int16], fineness: int) -> NDArray[np.int16]:
    """What is compared with the thresholds, (rows, width); _LOWEST .. _HIGHEST."""
    return row.astype(np.int16)[:, None] + (column.astype(np.int16) - exponents * np.int16(fineness))


def _contexts(spread: NDArray[np.int16], thresholds: NDArray[np.int16]) -> Bytes:
    """The context of each element, row after row."""
    levels = np.arange(_LOWEST, _HIGHEST + 1)
    return np.searchsorted(thresholds, levels, "right").astype(np.uint8)[spread.ravel() - np.int16(_LOWEST)]


@dataclass(frozen=True)
class _Chunk:
    """A chunk's fields as they lie in the file."""

    kind: int
    fineness: int
    contexts: int
    shape: tuple[int, int]
    pieces: tuple[memoryview, ...]

    @classmethod
    def read(cls, section: memoryview, at: int, rows: int, width: int, itemsize: int) -> tuple["_Chunk", int]:
        """The chunk at a position, and the position after it."""
        if len(section) < at + _CHUNK_HEAD.size:
            raise ValueError("a chunk is missing")
        kind, fineness, contexts, lanes, words, side, extra = _CHUNK_HEAD.unpack_from(section, at)
        at += _CHUNK_HEAD.size
        if kind == _RAW:
            lengths: tuple[int, ...] = (rows * width * itemsize,)
        elif kind == _CODED and 1 <= fineness <= 8 and 1 <= contexts <= MAX_CONTEXTS:
            lengths = (4 * lanes, 2 * words, side, extra)
        else:
            raise ValueError(f"a chunk of kind {kind}, fineness {fineness}, {contexts} contexts")
        pieces = []
        for length in lengths:
            pieces.append(section[at : at + length])
            at += length
        at = aligned(at)
        if at > len(section):
            raise ValueError("a chunk is cut")
        return cls(kind, fineness, contexts, (rows, width), tuple(pieces)), at

    def tables(self) -> tuple[entropy.Frequencies, NDArray[np.int16], Bytes, Bytes]:
        """Frequencies (contexts, SYMBOLS), thresholds, and the classes of rows and columns, of a coded chunk."""
        rows, width = self.shape
        fixed = self.contexts + 2 * (self.contexts - 1) + rows + width
        inflater = zlib.decompressobj()
        try:
            side = np.frombuffer(inflater.decompress(self.pieces[2], fixed + 2 * self.contexts * SYMBOLS + 1), np.uint8)
        except zlib.error as error:
            raise ValueError(f"tables that do not inflate ({error})") from None
        lengths = side[: self.contexts].astype(np.int64)
        total = int(lengths.sum())
        whole = inflater.eof and not inflater.unused_data
        if not whole or len(side) != fixed + 2 * total or (lengths > SYMBOLS).any():
            raise ValueError("tables of another length")
        cuts = np.cumsum([self.contexts, 2 * (self.contexts - 1), total, total, rows])
        _, between, low, high, row, column = np.split(side, cuts)
        table = np.zeros((self.contexts, SYMBOLS), np.uint16)
        table[np.arange(SYMBOLS) < lengths[:, None]] = low.astype(np.uint16) | (high.astype(np.uint16) << 8)
        entropy.check(table)
        thresholds = between.view("<i2")
        if (np.diff(thresholds) <= 0).any():
            raise ValueError("thresholds that do not rise")
        return table, thresholds, row, column

    def move(self, weight: Tensor) -> None:
        """Move these rows, in place."""
        bits = weight.view(KINDS[weight.dtype][0]).numpy()
        if self.kind == _RAW:
            bits[:] = np.frombuffer(self.pieces[0], bits.dtype).reshape(bits.shape)
            return
        table, thresholds, row, column = self.tables()
        contexts = _contexts(_spread(row, column, _exponents(weight), self.fineness), thresholds)
        states, words = (np.frombuffer(p, d) for p, d in zip(self.pieces, (np.uint32, np.uint16), strict=False))
        symbols = entropy.decode(states, words, contexts, table)
        wide = np.int32 if bits.dtype == np.int16 else np.int64
        steps: NDArray[Any] = _SMALL.astype(wide)[symbols]
        _put_large(steps, symbols, self.pieces[3], 8 * bits.dtype.itemsize)
        steps += ordered(bits).ravel()
        limits = np.iinfo(bits.dtype)
        if steps.min() < limits.min or steps.max() > limits.max:
            raise ValueError("a step leads out of the numbers that there are")
        bits[:] = ordered(steps.astype(bits.dtype)).reshape(bits.shape)


# ------------------------------------------------------------------------------------------ steps as symbols

_NUMBERS = np.arange(_FIRST)
_SMALL = np.concatenate([np.where(_NUMBERS % 2, 1, -1) * ((_NUMBERS + 1) // 2), np.zeros(SYMBOLS - _FIRST, int)])
"""The step that a symbol stands for; 0 for those that have plain bits too."""


def _symbols(steps: NDArray[np.int64]) -> tuple[Bytes, bytes]:
    """The symbols of steps, and the plain bits of those of more than DIRECT."""
    size = np.abs(steps)
    symbols = (2 * size - (steps > 0)).clip(max=_FIRST).astype(np.uint8)
    large = np.flatnonzero(size > DIRECT)
    if not len(large):
        return symbols, b""
    size = size[large]
    octave = np.frexp(size.astype(np.float64))[1].astype(np.int64) - 1  # below 2^53 a conversion is exact
    symbols[large] = _FIRST + 4 * (octave - _OCTAVES[0]) + ((size >> (octave - 2)) & 3)
    plain = (steps[large] < 0) | ((size & ((1 << (octave - 2)) - 1)) << 1)
    starts, total = _places(octave)
    bits = np.zeros(total, np.uint8)
    for j in range(int(octave.max()) - 1):
        wide = octave - 1 > j
        bits[starts[wide] + j] = (plain[wide] >> j) & 1
    return symbols, np.packbits(bits, bitorder="little").tobytes()


def _put_large(steps: Steps, symbols: Bytes, extra: memoryview, width: int) -> None:
    """Set the steps of more than DIRECT, by their symbols and plain bits."""
    large = np.flatnonzero(symbols >= _FIRST)
    octave, quarter = np.divmod(symbols[large].astype(np.int64) - _FIRST, 4)
    octave += _OCTAVES[0]
    starts, total = _places(octave)
    if len(extra) != -(-total // 8) or (octave > width).any():
        raise ValueError(f"{len(extra)} bytes of plain bits where {-(-total // 8)} are needed, or a step too large")
    if not len(large):
        return
    bits = np.unpackbits(np.frombuffer(extra, np.uint8), bitorder="little")
    plain = np.zeros(len(large), np.int64)
    for j in range(int(octave.max()) - 1):
        wide = octave - 1 > j
        plain[wide] |= bits[starts[wide] + j].astype(np.int64) << j
    size = ((4 + quarter) << (octave - 2)) + (plain >> 1)
    steps[large] = np.where(plain & 1, -size, size)


def _places(octave: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Where the plain bits of each large step begin, a sign and octave - 2 bits each; and how many there are."""
    ends = np.cumsum(octave - 1)
    return ends - (octave - 1), int(ends[-1]) if len(ends) else 0


# ------------------------------------------------------------------------------------------ finding the contexts


def _classes(moved: Tensor, dim: int) -> Bytes:
    """log2 of the mean over `dim`, in 1/_FINENESS octaves above the least; 0 for what has not moved at all."""
    count = moved.shape[dim]
    if count < _NARROW:
        return np.zeros(moved.shape[1 - dim], np.uint8)
    mean = moved.mean(dim, dtype=torch.float64).numpy()
    level = np.full(len(mean), -(2.0**15))
    level[mean > 0] = np.round(_FINENESS * np.log2(mean[mean > 0]))
    least = level[mean > 0].min(initial=2.0**15)
    return np.where(mean > 0, np.clip(level - least + _APART, _APART, 255), 0).astype(np.uint8)


def _joined(counts: NDArray[np.int64]) -> list[int]:
    """Where to cut rows of symbol counts, so that the runs between the cuts are contexts; not before the first row.

    Neighbours are joined, the pair first that saves most, for as long as a table less saves more than the symbols cost.
    """
    firsts = [int(i) for i in np.flatnonzero(counts.any(axis=1))]
    runs = [counts[i].astype(np.float64) for i in firsts]
    costs = [_cost(run) for run in runs]
    pairs = [_cost(a + b) for a, b in zip(runs, runs[1:], strict=False)]
    while pairs:
        savings = [costs[i] + costs[i + 1] - pair for i, pair in enumerate(pairs)]
        i = int(np.argmax(savings))
        if savings[i] <= 0 and len(runs) <= MAX_CONTEXTS:
            break
        runs[i] = runs[i] + runs.pop(i + 1)
        costs[i] = pairs.pop(i)
        costs.pop(i + 1)
        firsts.pop(i + 1)
        for j in (i - 1, i):
            if 0 <= j < len(pairs):
                pairs[j] = _cost(runs[j] + runs[j + 1])
    return firsts[1:]


def _cost(counts: NDArray[np.float64]) -> float:
    """Bits of a context of these counts, its table included."""
    seen = counts[counts > 0]
    return float(seen.sum() * np.log2(seen.sum()) - (seen * np.log2(seen)).sum()) + _TABLE_BITS * len(seen)


def _side(table: entropy.Frequencies, thresholds: NDArray[np.int16], row: Bytes, column: Bytes) -> bytes:
    """Tables and classes as they are stored; `_Chunk.tables` undoes it."""
    lengths = np.where(table.any(axis=1), SYMBOLS - (table[:, ::-1] > 0).argmax(axis=1), 0)
    listed = table[np.arange(SYMBOLS) < lengths[:, None]]
    parts = lengths.astype(np.uint8), thresholds, listed.astype(np.uint8), (listed >> 8).astype(np.uint8), row, column
    return zlib.compress(b"".join(part.tobytes() for part in parts), 9)


def _chunk(predicted: Tensor, wanted: Tensor) -> bytes:
    """One chunk's bytes, padded; coded or as it is, whichever is smaller."""
    plain = _integers(wanted)
    # Differences of integers of a dtype's width do not fit in it.
    symbols, extra = _symbols((ordered(plain).astype(np.int64) - ordered(_integers(predicted))).ravel())
    moved = (wanted.float() - predicted.float()).abs().nan_to_num(0.0, 0.0, 0.0)
    row, column = _classes(moved, 1), _classes(moved, 0)
    spread = _spread(row, column, _exponents(predicted), _FINENESS)
    least = int(spread.min())
    places = (spread - np.int16(least)).ravel().astype(np.int32) * np.int32(SYMBOLS) + symbols
    counts = np.bincount(places, minlength=(int(spread.max()) - least + 1) * SYMBOLS).reshape(-1, SYMBOLS)
    cuts = _joined(counts)
    thresholds = np.array(cuts, np.int16) + np.int16(least)
    counts = np.add.reduceat(counts, [0, *cuts])
    table = entropy.frequencies(counts)
    lanes = entropy.lanes_for(len(symbols), entropy.cost(counts, table))
    states, words = entropy.encode(symbols, _contexts(spread, thresholds), table, lanes)
    side = _side(table, thresholds, row, column)
    head = _CHUNK_HEAD.pack(_CODED, _FINENESS, len(table), len(states), len(words), len(side), len(extra))
    content = b"".join([head, states.tobytes(), words.tobytes(), side, extra])
    if len(content) >= _CHUNK_HEAD.size + plain.nbytes:
        content = _CHUNK_HEAD.pack(_RAW, 0, 0, 0, 0, 0, 0) + plain.tobytes()
    return content + bytes(aligned(len(content)) - len(content))
