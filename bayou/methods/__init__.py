"""The contract of a method, and how one is found: the word in the command is the name of the file.

A method is a module of this package with

    encode(site: Site, *, rank: int, ...) -> tuple[Term, ...]
        the terms that stand for the site's delta; its keyword-only arguments are its configuration
    layout(shape, *, rank: int, ...) -> tuple[TermLayout, ...]
        what encode will return, without the bits: kinds, shapes and number formats, hence bytes
    encode_many(sites, options) -> list of terms
        optional: encode of each site with the options of its place, which differ in the rank at most, faster
    EMBEDDINGS: dict
        the method and options that it leaves embeddings and heads to
    USES_GRAM: bool = False
        whether it wants the second moments of each matrix's input (then a calibration runs)
    DISTILL_STEPS: int = 0
        steps of bayou.distillation.gains that follow unless told otherwise
    ACTIVATIONS: str = "finetuned"
        whose activations calibrate unless told otherwise (see compress)
    SIZED: bool = False
        whether its files are entropy-coded unless told otherwise, and have then the size that was asked for

`rank` is the dial that a byte budget turns; a method without one (BitDelta) has one size. A new file here is
listed, budgeted, saved, verified, loaded and tested (tests/test_methods.py) with no other edit.
"""

import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bayou.decompose import Matrix
from bayou.delta import Dense, LowRank, Term
from bayou.errors import BadInput
from bayou.packed import Packed, Spec, aligned
from bayou.quantize import Factor, factorize

BLOCK = 128
"""A LowRank is stored in blocks of at most this many ranks, so that a prefix of ranks is a contiguous read."""


class Gram:
    """Second moments of a linear's input, (in, in), and what is computed from them once for all sites sharing it."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._factors: dict[tuple[float, bool], Factor] = {}

    def factor(self, damping: float, act_order: bool) -> Factor:
        """GPTQ's Cholesky factor (see quantize.factorize), computed at the first call."""
        key = (damping, act_order)
        if key not in self._factors:
            self._factors[key] = factorize(self.matrix, damping=damping, act_order=act_order)
        return self._factors[key]


@dataclass(frozen=True, eq=False)
class Site:
    """What a method sees of one matrix: its delta, read in fp32 in blocks of rows, and the gram of its input.

    delta: (out, in), whatever the tensor's orientation on disk. role: linear, expert, embedding, head or other.
    gram: None where no calibration ran, or the matrix multiplies no activation.
    """

    name: str
    delta: Matrix
    role: str = "linear"
    gram: Gram | None = None


@dataclass(frozen=True)
class TermLayout:
    """A term without its bits. kind: Dense or LowRank. parts: (rank, u, v) of each block, or (0, weight, "")."""

    kind: str
    parts: tuple[tuple[int, str, str], ...]
    output_scale: bool = False
    input_scale: bool = False

    def matrices(self, shape: tuple[int, int]) -> Iterator[tuple[Spec, tuple[int, int]]]:
        """Spec and shape of each stored matrix, in the order of the file."""
        out, width = shape
        for rank, u, v in self.parts:
            if self.kind == "Dense":
                yield Spec.parse(u), (out, width)
            else:
                yield Spec.parse(u), (out, rank)
                yield Spec.parse(v), (rank, width)

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of such a term of an (out, in) matrix: gain, channel scales, matrices, all aligned."""
        scales = aligned(2 * shape[0]) * self.output_scale + aligned(2 * shape[1]) * self.input_scale
        return aligned(4) + scales + sum(spec.nbytes(*size) for spec, size in self.matrices(shape))


def layout_of(term: Term) -> TermLayout:
    """The layout of a term at hand."""
    scaled = (term.output_scale is not None, term.input_scale is not None)
    if isinstance(term, Dense):
        return TermLayout("Dense", ((0, str(term.weight.spec), ""),), *scaled)
    return TermLayout("LowRank", tuple((v.shape[0], str(u.spec), str(v.spec)) for u, v in term.blocks), *scaled)


@functools.lru_cache(4096)
def nbytes(layouts: tuple[TermLayout, ...], shape: tuple[int, int]) -> int:
    """Bytes that terms of these layouts take in the file."""
    return sum(layout.nbytes(shape) for layout in layouts)


def cut(rank: int, at: int = BLOCK) -> list[int]:
    """`rank` ranks cut into blocks of at most `at`."""
    return [min(at, rank - start) for start in range(0, rank, at)]


def float_lowrank(u: Tensor, s: Tensor, v: Tensor, kind: str = "f16") -> LowRank:
    """u diag(s) v as 16-bit factors, in blocks; sqrt(s) goes to each side."""
    root = s.sqrt()
    u, v, gain = normalised(u * root, v * root[:, None])
    blocks, start = [], 0
    for ranks in cut(len(s)):
        part = slice(start, start + ranks)
        blocks.append((Packed.floats(u[:, part], kind), Packed.floats(v[part], kind)))
        start += ranks
    return LowRank(tuple(blocks), gain)


def agreement(site: "Site", u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """<d, d H> and <q, d H> of each row d of the delta and q of u v, both (out, 1) fp64; H is the gram, or identity.

    Their quotient is what a coded row must be multiplied by to have the strength of the true one.
    """
    wanted, kept = [], []
    for start, block in site.delta.blocks():
        rows = block.double()
        acted = rows @ site.gram.matrix.to(rows.device).double() if site.gram else rows
        wanted.append((acted * rows).sum(1, keepdim=True))
        kept.append(((acted @ v.double().T) * u[start : start + len(block)].double()).sum(1, keepdim=True))
    return torch.cat(wanted), torch.cat(kept)


def normalised(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, float]:
    """u and v by powers of two, so that the largest entry of each is about 1 and fp16 keeps it; and the gain for that.

    Give both sqrt(s): then a row of u, which holds all ranks of a block on one scale, spends it on the ranks that
    matter (without it a coded embedding lost all of its energy, LOG.md 2026-11-23).
    """
    # Not below 2^-63: the gain, their product, is stored in fp32, whose least normal number is 2^-126.
    peaks = [float(2.0 ** torch.floor(torch.log2(part.abs().max().clamp_min(2.0**-63)))) for part in (u, v)]
    return u / peaks[0], v / peaks[1], prod(peaks)


def encode_many(name: str, sites: Sequence[Site], options: Sequence[dict[str, Any]]) -> list[tuple[Term, ...]]:
    """The terms of each site by the method `name`: together where it can, one by one where it cannot.

    options: of each site, complete; they differ in the rank at most.
    """
    module = get(name)
    many = getattr(module, "encode_many", None)
    if len(sites) > 1 and many is not None:
        return list(many(sites, options))
    return [module.encode(site, **chosen) for site, chosen in zip(sites, options, strict=True)]


@functools.cache
def names() -> list[str]:
    """Every method, by the name of its file."""
    return sorted(module.name for module in iter_modules(__path__))


@functools.cache
def get(name: str) -> ModuleType:
    """The method's module. Raises BadInput, with the list, for an unknown name."""
    if name not in names():
        raise BadInput(f"there is no method {name!r}; choose one of {', '.join(names())}")
    return import_module(f"{__name__}.{name}")


def options(name: str) -> dict[str, Any]:
    """The method's options and their defaults, as its signature states them (without the rank)."""
    parameters = inspect.signature(get(name).encode).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "rank"}


def activations(name: str) -> Any:
    """Whose activations the method calibrates on by itself."""
    return getattr(get(name), "ACTIVATIONS", "finetuned")


def is_sized(name: str) -> bool:
    """Whether the size that is asked for is that of the method's entropy-coded file."""
    return bool(getattr(get(name), "SIZED", False))


@functools.cache
def has_rank(name: str) -> bool:
    """Whether a byte budget can turn this method's rank."""
    return "rank" in inspect.signature(get(name).encode).parameters


def check(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """All options of the method, `given` over its defaults. Raises BadInput for one it does not have or cannot use."""
    known = options(name)
    for key, value in given.items():
        if key not in known:
            raise BadInput(f"method {name} has no option {key!r}; it has {', '.join(known) or 'none'}")
        wanted = type(known[key])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise BadInput(f"method {name}: {key}={value!r} is not {wanted.__name__}; the default is {known[key]!r}")
    chosen = known | given
    try:
        nbytes(get(name).layout((128, 128), **chosen, **({"rank": 1} if has_rank(name) else {})), (128, 128))
    except ValueError as error:
        raise BadInput(f"method {name} cannot use {given}: {error}") from None
    return chosen
