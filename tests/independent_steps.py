"""The steps of a .bayou file of version 2, read as README.md's section "Steps" says, number by number: nothing of bayou
and nothing vectorised, so that it shares no mistake with the reader that is."""

import struct
import zlib

import numpy as np

EXPONENT = {"BF16": (7, 255), "F16": (10, 31), "F32": (23, 255)}


def check(good, complaint):
    if not good:
        raise ValueError(complaint)


def ordered(bits, width):
    return bits if bits >= 0 else bits ^ (2 ** (width - 1) - 1)


def move(predicted, word, section):
    """The matrix (out, in), given as its bits, moved by the section's steps."""
    (rows,), at = struct.unpack_from("<I", section), 16
    width = 8 * predicted.dtype.itemsize
    signed = predicted.view(f"<i{width // 8}")
    out = signed.copy()
    for first in range(0, len(signed), rows):
        at = chunk(signed[first : first + rows], out[first : first + rows], width, EXPONENT[word], section, at)
    check(at == len(section), "bytes after the last chunk")
    return out.view(predicted.dtype)


def chunk(predicted, out, width, field, section, at):
    kind, q, contexts, lanes, words, side, plain = struct.unpack_from("<BBBxIIII", section, at)
    at += 32
    if kind == 0:
        out[:] = np.frombuffer(section, out.dtype, out.size, at).reshape(out.shape)
        return -(-(at + out.nbytes) // 16) * 16
    check(kind == 1, "kind")
    states = list(struct.unpack_from(f"<{lanes}I", section, at))
    supply = iter(struct.unpack_from(f"<{words}H", section, at := at + 4 * lanes))
    tables = zlib.decompress(section[at + 2 * words : (at := at + 2 * words + side)])
    bits = (byte >> j & 1 for byte in section[at : at + plain] for j in range(8))

    counts, thresholds = tables[:contexts], struct.unpack_from(f"<{contexts - 1}h", tables, contexts)
    low = contexts + 2 * (contexts - 1)
    high = low + sum(counts)
    frequencies = []
    for count in counts:
        frequencies.append([tables[low + j] + 256 * tables[high + j] for j in range(count)])
        low, high = low + count, high + count
    row_class, column_class = tables[high : high + len(out)], tables[high + len(out) :]
    check(len(column_class) == out.shape[1], "length of the side")

    mantissa, most = field
    for i in range(out.size):
        row, column = divmod(i, out.shape[1])
        before = int(predicted[row, column])
        level = row_class[row] + column_class[column] - q * max(before >> mantissa & most, 1)
        table, x = frequencies[sum(t <= level for t in thresholds)], states[i % lanes]
        slot, symbol, start = x % 4096, 0, 0
        while slot >= start + table[symbol]:
            start, symbol = start + table[symbol], symbol + 1
        x = table[symbol] * (x // 4096) + slot - start
        states[i % lanes] = 65536 * x + next(supply) if x < 65536 else x
        step = (symbol + 1) // 2 * (1 if symbol % 2 else -1)
        if symbol >= 31:
            e, k = 4 + (symbol - 31) // 4, (symbol - 31) % 4
            sign = next(bits)
            step = (4 + k) * 2 ** (e - 2) + sum(next(bits) << j for j in range(e - 2))
            step = -step if sign else step
        out[row, column] = ordered(ordered(before, width) + step, width)
    check(next(supply, None) is None and set(states) == {65536}, "the end of the stream")
    return -(-(at + plain) // 16) * 16
