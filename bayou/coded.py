"""A site's terms, entropy-coded: byte by byte, in the contexts that the Plan tells. README.md, "Coded terms".

2-bit codes are not uniform (GPTQ's groups of 128 use their outer levels less), and of a scale the high byte hardly
varies. So each byte of the terms belongs to a class, by what it is a part of; a class is coded with frequencies of its
own where that is smaller, and else stored as it is. What comes out is the terms' bytes, on which kernels work as ever.
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from bayou import entropy
from bayou.checkpoint import as_tensor
from bayou.delta import Term
from bayou.entry import unpack_terms
from bayou.errors import BadFile
from bayou.methods import TermLayout, nbytes
from bayou.packed import aligned
from bayou.plan import EXPANSION, SiteRecord

_HEAD = struct.Struct("<III4x")
_MAX_CLASS = 255
_PLAN = 32
_TABLE_BYTES = 1.2  # about what a frequency takes in the side

Bytes = NDArray[np.uint8]


def _classes(layouts: tuple[TermLayout, ...], shape: tuple[int, int]) -> Bytes:
    """The class of each byte of the terms; 0 for gains, channel scales and padding, which are never coded."""
    found = np.zeros(nbytes(layouts, shape), np.uint8)
    known: dict[tuple[bool, str, int, int], int] = {}
    at = 0
    for layout in layouts:
        at += aligned(4) + aligned(2 * shape[0]) * layout.output_scale + aligned(2 * shape[1]) * layout.input_scale
        for index, (spec, size) in enumerate(layout.matrices(shape)):
            second = layout.kind == "LowRank" and index % 2 == 1
            for section, (dtype, (rows, cols)) in enumerate(spec.sections(*size)):
                width = (
                    1 if dtype == torch.int32 else dtype.itemsize
                )  # a word of codes has no order of bytes that tells
                stop = at + rows * cols * dtype.itemsize
                for byte in range(width):
                    number = known.setdefault((second, str(spec), section, byte), len(known) + 1)
                    found[at + byte : stop : width] = number if number <= _MAX_CLASS else 0
                at += aligned(stop - at)
    return found


def encode(raw: bytes, layouts: tuple[TermLayout, ...], shape: tuple[int, int]) -> bytes | None:
    """The terms' bytes `raw`, coded, a multiple of 16 bytes; None where that is not smaller."""
    kind, data = _classes(layouts, shape), np.frombuffer(raw, np.uint8)
    if not len(data):
        return None
    counts = np.bincount(kind.astype(np.int32) * 256 + data, minlength=256 * (int(kind.max()) + 1)).reshape(-1, 256)
    counts[0] = 0
    table = entropy.frequencies(counts)
    for number, count in enumerate(counts):
        takes = entropy.cost(count[None], table[number : number + 1]) / 8 + _TABLE_BYTES * np.count_nonzero(count)
        if takes >= count.sum():
            table[number] = counts[number] = 0
    chosen = _any(table)[kind]
    symbols = data[chosen]
    lanes = entropy.lanes_for(len(symbols), entropy.cost(counts, table))
    states, words = entropy.encode(symbols, kind[chosen], table, lanes)
    lengths = np.where(_any(table), 256 - (table[:, ::-1] > 0).argmax(axis=1), 0)[1:]
    listed = table[1:][np.arange(256) < lengths[:, None]]
    parts = [part.astype("<u2").view(np.uint8).reshape(-1, 2).T for part in (lengths, listed)]
    side = zlib.compress(b"".join(part.tobytes() for part in parts), 9)
    head = _HEAD.pack(len(states), len(words), len(side))
    content = b"".join([head, states.tobytes(), words.tobytes(), side, data[~chosen].tobytes()])
    content += bytes(aligned(len(content)) - len(content))
    # What the Plan takes to say so is saved at least: a coded file is never larger than a plain one.
    return content if len(content) + _PLAN < len(raw) <= EXPANSION * len(content) else None


def decode(stored: memoryview, layouts: tuple[TermLayout, ...], shape: tuple[int, int]) -> bytearray:
    """The terms' bytes. Raises ValueError for what `encode` cannot have made."""
    kind = _classes(layouts, shape)
    if len(stored) < _HEAD.size:
        raise ValueError("no room for a header")
    lanes, words, side = _HEAD.unpack_from(stored)
    ends = np.cumsum([_HEAD.size, 4 * lanes, 2 * words, side]).tolist()
    if ends[-1] > len(stored):
        raise ValueError(f"{ends[-1]:,} bytes in {len(stored):,}")
    table = _table(stored[ends[2] : ends[3]], int(kind.max(initial=0)))
    chosen = _any(table)[kind]
    plain = len(kind) - int(np.count_nonzero(chosen))
    if len(stored) != aligned(ends[-1] + plain):
        raise ValueError(f"{len(stored):,} bytes where {aligned(ends[-1] + plain):,} are needed")
    states = np.frombuffer(stored[ends[0] : ends[1]], np.uint32)
    coded = np.frombuffer(stored[ends[1] : ends[2]], np.uint16)
    found = bytearray(len(kind))
    data = np.frombuffer(found, np.uint8)
    data[chosen] = entropy.decode(states, coded, kind[chosen], table)
    data[~chosen] = np.frombuffer(stored[ends[3] : ends[3] + plain], np.uint8)
    return found


def _any(table: entropy.Frequencies) -> NDArray[np.bool_]:
    """Which classes are coded."""
    return np.asarray(table.any(axis=1))


def _table(side: memoryview, classes: int) -> entropy.Frequencies:
    """Frequencies (1 + classes, 256); a row of zeros is a class that is stored as it is."""
    inflater = zlib.decompressobj()
    try:
        raw = np.frombuffer(inflater.decompress(side, 2 * classes * 257 + 1), np.uint8)
    except zlib.error as error:
        raise ValueError(f"tables that do not inflate ({error})") from None
    if not inflater.eof or inflater.unused_data or len(raw) < 2 * classes:
        raise ValueError("tables of another length")
    lengths = raw[:classes].astype(np.uint16) | (raw[classes : 2 * classes].astype(np.uint16) << 8)
    total = int(lengths.sum(dtype=np.int64))
    if len(raw) != 2 * (classes + total) or (lengths > 256).any():
        raise ValueError("tables of another length")
    low, high = raw[2 * classes :].reshape(2, total)
    table = np.zeros((1 + classes, 256), np.uint16)
    table[1:][np.arange(256) < lengths[:, None]] = low.astype(np.uint16) | (high.astype(np.uint16) << 8)
    entropy.check(table)
    return table


def shrink(
    sites: list[SiteRecord], blob: Callable[[int], bytes], keep: Callable[[int, bytes], None]
) -> list[SiteRecord]:
    """The sites, with coded terms where those are smaller; blob: a site's bytes; keep: is given those to be written."""
    found = []
    for index, site in enumerate(sites):
        raw = blob(index)
        small = encode(raw, site.terms, site.shape)
        keep(index, raw if small is None else small)
        found.append(replace(site, coded=len(small or b"")))
    return found


def terms(raw: bytearray, site: SiteRecord, where: str) -> tuple[Term, ...]:
    """The terms of a site, of whose entry `raw` is all but the steps. Raises BadFile, beginning with `where`."""
    if site.coded:
        try:
            raw = decode(memoryview(raw)[: site.coded], site.terms, site.shape)
        except ValueError as error:
            raise BadFile(f"{where}: its coded terms are not as specified: {error}") from None
    return unpack_terms(as_tensor(raw, torch.uint8, (len(raw),)), site.terms, site.shape)
