"""n-bit codes with scales, packed as they lie on disk. The only bit-twiddling in the repository.

A `Packed` is a matrix of `rows` x `cols`, where `cols` is the axis that a product sums over. Its *spec* says how its
numbers are stored:

    f16 bf16 f32      floats, row after row
    3                 3-bit codes, no scale             value = code - 3.5
    3r                ... one fp16 scale a row          value = scale * (code - 3.5)
    2g128             ... a scale per 128 columns       value = scale * (code - 1.5)
    2g128z            ... and a zero point per scale    value = scale * (code - zero)

so one bit is a sign: code - 0.5 is -0.5 or +0.5. Without zero points the levels are (2^bits - 1)/2 away from the
middle code, symmetric about 0.

Codes are cut into bit planes whose widths divide 32 (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1; the low bits come
first). In each plane a row is packed least significant first into little-endian 32-bit words; its last word is padded
with zeros. Zero points are packed likewise, all of them as one long row. Each plane, the scales and the zero points
start on 16 bytes. README.md states this byte by byte.

We pad rows to 4 bytes, not to 16: a 3-bit U band of 32 ranks has rows of 8 + 4 bytes, which 16-byte rows would
make 32 (LOG.md, 2026-11-23).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

ALIGN = 16
"""Every section of a site (a plane, scales, zero points, a float matrix) starts on this many bytes."""

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
FLOATS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_SPEC = re.compile(r"([1-8])(?:r|g([1-9][0-9]{0,5}))?(z?)")


@dataclass(frozen=True)
class Spec:
    """How the numbers of a Packed are stored; `str(spec)` and `Spec.parse` are each other's inverse.

    bits: 1 to 8, or 0 for floats. group: columns that share a scale; 0 = one scale a row; None = no scales.
    zeros: whether each scale has a zero point. floats: "f16", "bf16", "f32", or "" for codes.
    """

    bits: int = 0
    group: int | None = None
    zeros: bool = False
    floats: str = ""

    @classmethod
    def parse(cls, text: str) -> "Spec":
        """The Spec that `text` states. Raises ValueError if it states none."""
        if text in FLOATS:
            return cls(floats=text)
        match = _SPEC.fullmatch(text)
        if not match or (match[3] and match[2] is None and "r" not in text):
            raise ValueError(f"{text!r} is not a number format; expected f16, bf16, f32 or e.g. 1, 8r, 2g128, 3g128z")
        group = int(match[2]) if match[2] else (0 if "r" in text else None)
        return cls(int(match[1]), group, bool(match[3]))

    def __str__(self) -> str:
        if self.floats:
            return self.floats
        grouping = "" if self.group is None else f"g{self.group}" if self.group else "r"
        return f"{self.bits}{grouping}{'z' if self.zeros else ''}"

    def groups(self, cols: int) -> int:
        """Scales in a row of `cols` numbers."""
        if self.group is None:
            return 0
        return -(-cols // self.group) if self.group else 1

    def sections(self, rows: int, cols: int) -> Iterator[tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each stored section, in the order of the file."""
        if self.floats:
            yield FLOATS[self.floats], (rows, cols)
            return
        for width in PLANES[self.bits]:
            yield torch.int32, (rows, -(-cols * width // 32))
        groups = self.groups(cols)
        if groups:
            yield torch.float16, (rows, groups)
            if self.zeros:
                for width in PLANES[self.bits]:
                    yield torch.int32, (1, -(-rows * groups * width // 32))

    def nbytes(self, rows: int, cols: int) -> int:
        """Bytes on disk and in memory, alignment of each section included."""
        return sum(aligned(prod(shape) * dtype.itemsize) for dtype, shape in self.sections(rows, cols))


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to the next multiple of ALIGN."""
    return -(-nbytes // ALIGN) * ALIGN


def _pack_plane(codes: Tensor, width: int, shift: int) -> Tensor:
    """`width` bits of each code, from bit `shift` on, as int32 words. codes (rows, cols) uint8."""
    rows, cols = codes.shape
    per_byte, words = 8 // width, -(-cols * width // 32)
    # Least significant first in a little-endian word is least significant first in its bytes, so bytes suffice.
    packed = torch.zeros(rows, words * 4, dtype=torch.uint8, device=codes.device)
    for k in range(per_byte):
        part = (codes[:, k::per_byte] >> shift) & ((1 << width) - 1)
        packed[:, : part.shape[1]] |= part << (width * k)
    return packed.view(torch.int32)


def _unpack_plane(words: Tensor, width: int, cols: int) -> Tensor:
    raw = words.contiguous().view(torch.uint8)
    per_byte = 8 // width
    codes = torch.empty(raw.shape[0], raw.shape[1] * per_byte, dtype=torch.uint8, device=raw.device)
    for k in range(per_byte):
        codes[:, k::per_byte] = (raw >> (width * k)) & ((1 << width) - 1)
    return codes[:, :cols]


def _pack(codes: Tensor, bits: int) -> tuple[Tensor, ...]:
    planes, shift = [], 0
    for width in PLANES[bits]:
        planes.append(_pack_plane(codes, width, shift))
        shift += width
    return tuple(planes)


def _unpack(planes: tuple[Tensor, ...], bits: int, cols: int) -> Tensor:
    codes, shift = torch.zeros((), dtype=torch.uint8), 0
    for width, words in zip(PLANES[bits], planes, strict=True):
        part = _unpack_plane(words, width, cols) << shift
        codes, shift = part if shift == 0 else codes | part, shift + width
    return codes


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix as it is stored. `parts` are its sections, in the order and with the shapes of `spec.sections`.

    Knows nothing of what it multiplies. Immutable; on any device.
    """

    spec: Spec
    shape: tuple[int, int]
    parts: tuple[Tensor, ...]

    @classmethod
    def floats(cls, values: Tensor, kind: str = "f16") -> "Packed":
        """`values` (rows, cols) stored as floats of `kind`."""
        return cls(Spec(floats=kind), (values.shape[0], values.shape[1]), (values.to(FLOATS[kind]).contiguous(),))

    @classmethod
    def codes(cls, codes: Tensor, spec: Spec, scales: Tensor | None = None, zeros: Tensor | None = None) -> "Packed":
        """Pack uint8 `codes` (rows, cols) with fp16 `scales` and uint8 `zeros`, both (rows, groups)."""
        parts = list(_pack(codes, spec.bits))
        if scales is not None:
            parts.append(scales.to(torch.float16).contiguous())
        if zeros is not None:
            parts += _pack(zeros.reshape(1, -1), spec.bits)
        packed = cls(spec, (codes.shape[0], codes.shape[1]), tuple(parts))
        expected = [(dtype, shape) for dtype, shape in spec.sections(*packed.shape)]
        found = [(part.dtype, tuple(part.shape)) for part in parts]
        if found != expected:
            raise ValueError(f"spec {spec} of a {packed.shape} matrix stores {expected}, was given {found}")
        return packed

    @classmethod
    def view(cls, spec: Spec, shape: tuple[int, int], buffer: Tensor, offset: int) -> tuple["Packed", int]:
        """The Packed that lies in the uint8 `buffer` at `offset`, without a copy, and the offset after it."""
        parts = []
        for dtype, part_shape in spec.sections(*shape):
            size = prod(part_shape) * dtype.itemsize
            parts.append(buffer[offset : offset + size].view(dtype).view(part_shape))
            offset += aligned(size)
        return cls(spec, shape, tuple(parts)), offset

    @property
    def nbytes(self) -> int:
        """Bytes on disk and in memory, alignment included."""
        return self.spec.nbytes(*self.shape)

    def to(self, device: torch.device | str) -> "Packed":
        """The same on another device."""
        return moved(self, device)

    def unpack(self, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop as floats (rows, cols); the arithmetic is fp32, one multiplication a number."""
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        return self.take(slice(start, stop)).to(dtype)

    def take(self, rows: slice | Tensor) -> Tensor:
        """The rows of a slice, or those whose indexes are given (n,), as fp32 (n, cols)."""
        if self.spec.floats:
            return self.parts[0][rows].float()
        scales, values = self.scales, self.centred(rows)
        return values if scales is None else values * self._spread(scales[rows].float())

    def centred(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Codes less their zero points, or less the middle code, as fp32 (n, cols): the values but for their scales.

        Multiples of 1/2 of at most 255, so bf16 holds them too.
        """
        planes = len(PLANES[self.spec.bits])
        codes = _unpack(tuple(p[rows] for p in self.parts[:planes]), self.spec.bits, self.shape[1]).float()
        if not self.spec.zeros:
            return codes - (2**self.spec.bits - 1) / 2
        groups = self.spec.groups(self.shape[1])
        zeros = _unpack(self.parts[planes + 1 :], self.spec.bits, self.shape[0] * groups)
        return codes - self._spread(zeros.view(self.shape[0], groups)[rows].float())

    @property
    def scales(self) -> Tensor | None:
        """The fp16 scales of codes, (rows, groups), where there are any."""
        return self.parts[len(PLANES[self.spec.bits])] if self.spec.groups(self.shape[1]) else None

    def with_scales(self, scales: Tensor) -> "Packed":
        """The same codes with other scales, (rows, groups), rounded to fp16."""
        at = len(PLANES[self.spec.bits])
        return replace(self, parts=(*self.parts[:at], scales.to(torch.float16).contiguous(), *self.parts[at + 1 :]))

    def raw_codes(self) -> Tensor:
        """The codes (rows, cols), uint8."""
        return _unpack(self.parts[: len(PLANES[self.spec.bits])], self.spec.bits, self.shape[1])

    def zero_points(self) -> Tensor | None:
        """The zero points (rows, groups), uint8, where there are any."""
        if not self.spec.zeros:
            return None
        groups = self.spec.groups(self.shape[1])
        found = _unpack(self.parts[len(PLANES[self.spec.bits]) + 1 :], self.spec.bits, self.shape[0] * groups)
        return found.view(self.shape[0], groups)

    def _spread(self, per_group: Tensor) -> Tensor:
        """(rows, groups) -> (rows, cols), or (rows, 1) where a row has one group."""
        if per_group.shape[1] == 1 or not self.spec.group:
            return per_group
        return per_group.repeat_interleave(self.spec.group, dim=1)[:, : self.shape[1]]


def moved(value: Any, device: torch.device | str) -> Any:
    """`value` on another device: a tensor, or whatever tensors a tuple or a frozen dataclass holds, at any depth.

    They come to lie in one piece of memory, in order: equal blocks at equal distances, which kernels like.
    """
    device = torch.empty(0, device=device).device
    tensors = list(tensors_in(value))
    if all(tensor.device == device for tensor in tensors):
        return value
    starts = [0, *accumulate(aligned(tensor.nbytes) for tensor in tensors)]
    buffer = torch.empty(starts[-1], dtype=torch.uint8, device=device)
    copies = []
    for start, tensor in zip(starts, tensors, strict=False):
        place = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies.append(place.copy_(tensor))
    return with_tensors(value, iter(copies))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors that a tuple or a frozen dataclass holds, at any depth, in order; of a tensor itself."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def with_tensors(value: Any, following: Iterator[Tensor]) -> Any:
    """`value` with others in the place of the tensors that `tensors_in` gives, taken in that order."""
    if isinstance(value, Tensor):
        return next(following)
    if isinstance(value, tuple):
        return tuple(with_tensors(item, following) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: with_tensors(getattr(value, field.name), following) for field in fields(value)}
        return replace(value, **changed)
    return value


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp64 -> dtype, to nearest even, in one rounding.

    torch converts fp64 to a 16-bit float by way of fp32, which rounds twice and is off by one ulp about once in
    2^17 numbers. Rounding to fp32 *to odd* first keeps what the second rounding needs to know.
    """
    if dtype in (torch.float32, torch.float64):
        return x.to(dtype)
    single = x.float()
    past = single.double().abs() > x.abs()
    inexact = single.double() != x
    bits = single.view(torch.int32)
    bits = torch.where(past, bits - 1, bits) | inexact.int()
    return torch.where(single.isfinite(), bits.view(torch.float32), single).to(dtype)
