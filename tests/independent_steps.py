"""What is new in .bayou files of version 2, read as README.md's "Steps" and "Coded terms" say, number by number:
nothing of bayou and nothing vectorised, so that it shares no mistake with the reader that is."""

import struct
import zlib

import numpy as np

EXPONENT = {"BF16": (7, 255), "F16": (10, 31), "F32": (23, 255)}


def check(good, complaint):
    if not good:
        raise ValueError(complaint)


def ordered(bits, width):
    return bits if bits >= 0 else bits ^ (2 ** (width - 1) - 1)


def symbols_of(table_of, count, states, words):
    """`count` symbols by rANS; table_of(i): the frequencies in the context of symbol i, asked for in order."""
    states, supply = list(states), iter(words)
    for i in range(count):
        table, x = table_of(i), states[i % len(states)]
        slot, symbol, start = x % 4096, 0, 0
        while slot >= start + table[symbol]:
            start, symbol = start + table[symbol], symbol + 1
        x = table[symbol] * (x // 4096) + slot - start
        states[i % len(states)] = 65536 * x + next(supply) if x < 65536 else x
        yield symbol
    check(next(supply, None) is None and set(states) == {65536}, "the end of the stream")


def sections(template):
    """(class, or None; bytes of an element; bytes) of every section of a site's terms and of what is never coded."""
    (out, width), al = template["shape"], lambda n: -(-n // 16) * 16
    for _, parts, *flags in template["terms"]:
        scales = al(2 * out) * ("o" in "".join(flags)) + al(2 * width) * ("i" in "".join(flags))
        yield None, 1, 16 + scales
        for rank, u, v in parts:
            for second, spec, rows, cols in ((False, u, out, rank or width), (True, v, rank, width)):
                if not spec:
                    continue
                size = {"f16": 2, "bf16": 2, "f32": 4}.get(spec, 0)
                lengths = [(size, rows * cols * size)]
                if not size:
                    planes = [w for w in (8, 4, 2, 1) if int(spec[0]) & w]
                    group = int(spec[2:].rstrip("z") or cols) if len(spec) > 1 else 0
                    scales = rows * -(-cols // group) if group else 0
                    lengths = [(1, rows * -(-cols * w // 32) * 4) for w in planes] + [(2, 2 * scales)] * (scales > 0)
                    lengths += [(1, -(-scales * w // 32) * 4) for w in planes] if spec[-1] == "z" else []
                for number, (size, length) in enumerate(lengths):
                    yield (second, spec, number), size, length
                    yield None, 1, al(length) - length


def inflate(stored, template):
    """The bytes of a site's terms."""
    known, kinds = {}, []
    for name, size, length in sections(template):
        numbers = [0] if name is None else [known.setdefault((name, byte), len(known) + 1) for byte in range(size)]
        kinds += [number if number <= 255 else 0 for number in numbers] * (length // size)
    lanes, words, side = struct.unpack_from("<III", stored)
    states, supply = (
        struct.unpack_from(f"<{lanes}I", stored, 16),
        struct.unpack_from(f"<{words}H", stored, 16 + 4 * lanes),
    )
    at, c = 16 + 4 * lanes + 2 * words, max(kinds)
    tables = zlib.decompress(stored[at : at + side])
    counts = [tables[k] + 256 * tables[c + k] for k in range(c)]
    low, frequencies = 2 * c, [[]]
    for count in counts:
        frequencies.append([tables[low + j] + 256 * tables[low + sum(counts) + j] for j in range(count)])
        low += count
    chosen = [kind for kind in kinds if frequencies[kind]]
    coded = symbols_of(lambda i: frequencies[chosen[i]], len(chosen), states, supply)
    plain = iter(stored[at + side :])
    found = bytes(next(coded) if frequencies[kind] else next(plain) for kind in kinds)
    check(next(coded, None) is None and not any(plain), "the end")
    return found


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
    states = struct.unpack_from(f"<{lanes}I", section, at)
    supply = struct.unpack_from(f"<{words}H", section, at := at + 4 * lanes)
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

    def table_of(i):
        row, column = divmod(i, out.shape[1])
        level = row_class[row] + column_class[column] - q * max(int(predicted[row, column]) >> mantissa & most, 1)
        return frequencies[sum(t <= level for t in thresholds)]

    for i, symbol in enumerate(symbols_of(table_of, out.size, states, supply)):
        step = (symbol + 1) // 2 * (1 if symbol % 2 else -1)
        if symbol >= 31:
            e, k = 4 + (symbol - 31) // 4, (symbol - 31) % 4
            sign = next(bits)
            step = (4 + k) * 2 ** (e - 2) + sum(next(bits) << j for j in range(e - 2))
            step = -step if sign else step
        before = int(predicted.flat[i])
        out.flat[i] = ordered(ordered(before, width) + step, width)
    return -(-(at + plain) // 16) * 16
