"""The deltas that the kernels are measured on: a Llama-2-7B layer's, as `bayou compress` writes them at ratio 16.

Stored: those of the first layer of a file (`bayou bench compress --keep`). random: the layouts of such a file, random
codes. signs: BitDelta's.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bayou.allocate import allocate
from bayou.delta import Dense, LowRank, Term
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput
from bayou.methods import TermLayout, bitdelta
from bayou.packed import Packed
from bayou.plan import SiteRecord

RATIO = 16

Shape = tuple[int, int]

LAYER: tuple[tuple[Shape, ...], ...] = (
    ((4096, 4096), (4096, 4096), (4096, 4096)),
    ((4096, 4096),),
    ((11008, 4096), (11008, 4096)),
    ((4096, 11008),),
)
"""(out, in) of a Llama-2-7B layer's matrices, those together that share an input: qkv, o, gate and up, down."""

NAMES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The same matrices by name."""

Terms = Callable[[Sequence[Shape]], list[Term]]
"""A term for each of the projections of these shapes that share an input, new in memory at every call."""


def layouts(shapes: Sequence[Shape]) -> list[TermLayout]:
    """What `compress --ratio 16` writes for bf16 matrices of these shapes, with deltacome."""
    sites = [
        SiteRecord(
            tensor=f"{i}.weight",
            part=None,
            shape=shape,
            disk_shape=shape,
            dtype="BF16",
            transposed=False,
            reference=f"{i}.weight",
            reference_part=None,
            gain=1.0,
            role="linear",
            method="deltacome",
            options={},
            terms=(),
        )
        for i, shape in enumerate(shapes)
    ]
    budget = sum(2 * out * cols for out, cols in shapes) // RATIO
    return [site.terms[0] for site in allocate(sites, budget, embedding_rate=1.0)]


def term(layout: TermLayout, shape: Shape, gain: float = 0.01, device: str = "cuda") -> Term:
    """A term of this layout with random codes and small scales, in one buffer as a file's site is."""
    buffer = torch.randint(0, 256, (layout.nbytes(shape),), dtype=torch.uint8, device=device)
    matrices, offset = [], 0
    for spec, size in layout.matrices(shape):
        packed, offset = Packed.view(spec, size, buffer, offset)
        for part in packed.parts:
            if part.is_floating_point():
                part.copy_(torch.rand(part.shape, device=device) * 0.05 + 0.01)
        matrices.append(packed)
    if layout.kind == "Dense":
        return Dense(matrices[0], gain)
    return LowRank(tuple(zip(matrices[::2], matrices[1::2], strict=True)), gain)


def random(shapes: Sequence[Shape]) -> list[Term]:
    """Terms of deltacome's layout."""
    return [term(layout, shape) for layout, shape in zip(layouts(shapes), shapes, strict=True)]


def signs(shapes: Sequence[Shape]) -> list[Term]:
    """BitDelta's."""
    return [term(bitdelta.layout(shape)[0], shape) for shape in shapes]


class Stored:
    """The terms of a file's first layer, as a loader puts them on the device."""

    def __init__(self, path: Path, layer: Sequence[Sequence[Shape]] = LAYER, device: str = "cuda") -> None:
        """Raises BadInput where the file has no layer of these shapes, one term a matrix."""
        file = DeltaFile(path)
        first = next((name.partition("layers.0.")[0] for name in file.sites if "layers.0." in name), "")
        names = [[f"{first}layers.0.{name}.weight" for name in group] for group in NAMES]
        deltas = file.deltas([name for group in names for name in group if name in file.sites], device)
        self._terms: dict[tuple[Shape, ...], list[Term]] = {}
        for group, shapes in zip(names, layer, strict=True):
            here = [deltas[name] for name in group if name in deltas and len(deltas[name].terms) == 1]
            if [delta.shape for delta in here] != list(shapes):
                found = ", ".join(f"{delta.shape[0]}x{delta.shape[1]}" for delta in here) or "none"
                raise BadInput(
                    f"{path}: {', '.join(group)} must be of {shapes} with one term each; found {found}; make the file "
                    "with bayou bench compress --layers 2 --keep FILE"
                )
            self._terms[tuple(shapes)] = [delta.terms[0] for delta in here]

    def __call__(self, shapes: Sequence[Shape]) -> list[Term]:
        """A copy of each."""
        return [copy.deepcopy(each) for each in self._terms[tuple(shapes)]]
