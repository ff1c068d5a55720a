"""The compressed fine-tune as a model whose stored floats can be trained: its deltas are made of Values.

The attached modules stay what they are (attached.py); each is given a delta that multiplies in the same way, but by
tensors that have gradients. A tied head and its embedding are one delta with two uses, and so train one set of
numbers. Norms and biases that the file holds whole are trained too; experts, and what is swapped in, stay.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from bayou.attach import AttachedEmbedding, AttachedLinear, load
from bayou.attached import Around
from bayou.delta import Delta, Dense, LowRank, Term
from bayou.deltafile import DeltaFile
from bayou.distillation.values import Piece, Values, matrices, piece
from bayou.packed import Packed
from bayou.skeleton import Place


class _Matrix:
    """Matrices of a term, one under the other or side by side: pieces, and codes that have no scales to train."""

    def __init__(self, parts: list[Packed], *, under: bool) -> None:
        self.under = under
        # Those side by side stay apart: a row of one is not a row of the other.
        self.runs = matrices(parts) if under else [found for part in parts for found in matrices([part])]

    def pieces(self) -> Iterator[Piece]:
        return (made for _, made in self.runs if isinstance(made, Piece))

    def now(self, dtype: torch.dtype) -> Tensor:
        """What the model multiplies by."""
        found = [
            (made.leaf if isinstance(made, Piece) else made.to(dtype))[:, : run[0].shape[1]] for run, made in self.runs
        ]
        return found[0] if len(found) == 1 else torch.cat(found, dim=0 if self.under else 1)

    def stored(self) -> list[Packed]:
        """The matrices with the numbers of now."""
        found: list[Packed] = []
        for run, made in self.runs:
            if not isinstance(made, Piece):
                found += run
                continue
            sizes = [packed.parts[0] if packed.spec.floats else packed.scales for packed in run]
            counts = [size.numel() for size in sizes if size is not None]
            for packed, values in zip(run, made.values.split(counts), strict=True):
                if packed.spec.floats:
                    found.append(Packed.floats(values.view(packed.shape), packed.spec.floats))
                else:
                    found.append(packed.with_scales(values.view(packed.shape[0], -1)))
        return found


class _TrainedTerm:
    """A term, gain * diag(output) @ (u @ v or weight) @ diag(input), whose stored floats have gradients."""

    def __init__(self, term: Term, dtype: torch.dtype) -> None:
        self.term, self.dtype = term, dtype
        parts = list(term.factors())
        self.low = isinstance(term, LowRank)
        split = [(parts[::2], False), (parts[1::2], True)] if self.low else [(parts, True)]
        self.matrices = [_Matrix(some, under=under) for some, under in split]
        self.gain = piece(torch.tensor([term.gain], device=parts[0].parts[0].device), "gains")
        scales = (term.output_scale, term.input_scale)
        self.scales = [None if scale is None else piece(scale, "gains") for scale in scales]

    def pieces(self) -> Iterator[Piece]:
        for matrix in self.matrices:
            yield from matrix.pieces()
        yield self.gain
        yield from (scale for scale in self.scales if scale is not None)

    def apply(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype; gains and channel scales are fp32 in any model."""
        output, inputs = self.scales
        if inputs is not None:
            x = (x * inputs.leaf).to(x.dtype)
        if self.low:
            u, v = (matrix.now(x.dtype) for matrix in self.matrices)
            y = functional.linear((functional.linear(x, v) * self.gain.leaf).to(x.dtype), u)
        else:
            y = (functional.linear(x, self.matrices[0].now(x.dtype)) * self.gain.leaf).to(x.dtype)
        return y if output is None else (y * output.leaf).to(x.dtype)

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows of the term for ids (...), (..., in) fp32."""
        output, inputs = self.scales
        rows = functional.embedding(ids, self.matrices[0].now(self.dtype))
        if self.low:
            rows = rows @ self.matrices[1].now(self.dtype)
        rows = rows * self.gain.leaf
        if output is not None:
            rows = rows * output.leaf[ids][..., None]
        return rows if inputs is None else rows * inputs.leaf

    def stored(self) -> Term:
        gain = self.gain.values.item()
        output, inputs = (None if scale is None else scale.values.to(torch.float16) for scale in self.scales)
        parts = [matrix.stored() for matrix in self.matrices]
        if isinstance(self.term, Dense):
            return Dense(parts[0][0], gain, output, inputs)
        return LowRank(tuple(zip(*parts, strict=True)), gain, output, inputs)


class TrainedDelta:
    """Stands in a Delta's place in an attached module."""

    def __init__(self, delta: Delta, dtype: torch.dtype) -> None:
        self.shape, self.reference, self.gain, self.device = delta.shape, delta.reference, delta.gain, delta.device
        self.terms = [_TrainedTerm(term, dtype) for term in delta.terms]

    def pieces(self) -> Iterator[Piece]:
        """What is trained of it."""
        for term in self.terms:
            yield from term.pieces()

    def apply(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), as Delta.apply."""
        return sum((term.apply(x) for term in self.terms[1:]), self.terms[0].apply(x))

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows for ids (...) -> (..., in) fp32, as Delta.lookup."""
        return sum((term.lookup(ids) for term in self.terms[1:]), self.terms[0].lookup(ids))

    def restore(self, reference: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The fine-tune's weight for code that looks at it instead of calling the module; it trains nothing there."""
        terms = Delta(self.shape, self.stored(), self.reference, self.gain)
        return terms.restore(reference, dtype)

    def stored(self) -> tuple[Term, ...]:
        """The terms with the numbers of now."""
        return tuple(term.stored() for term in self.terms)


class Student:
    """The model of a file, in `model`, and what is trained of it, in `values`.

    places: of the file's tensors in the model. Raises as attach.load. Nothing to train leaves `values` without
    parameters.
    """

    def __init__(
        self, base: Path, file: DeltaFile, places: dict[str, Place], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.model = load(base, file, dtype=dtype, device=device).requires_grad_(False)
        self._deltas: dict[str, TrainedDelta] = {}
        self._exact: dict[str, Piece] = {}
        parameters: list[tuple[nn.Module, str, str]] = []
        for name, place in places.items():
            for path in (place.path, *place.also):
                module = self.model.get_submodule(path.rpartition(".")[0])
                if name in file.sites and isinstance(module, AttachedLinear | AttachedEmbedding):
                    if module.delta.terms and path.endswith("weight"):
                        if name not in self._deltas:  # else the other end of a tie: the same delta
                            self._deltas[name] = TrainedDelta(module.delta, dtype)
                        module.delta = self._deltas[name]  # type: ignore[assignment]
                elif name in file.exact and place.role in ("norm", "bias") and not place.converted:
                    inner = module.inner if isinstance(module, Around) else module
                    if place.index is None and path.rpartition(".")[2] in inner._parameters:
                        self._exact.setdefault(name, piece(file.read_exact(name).to(device), "exact"))
                        parameters.append((inner, path.rpartition(".")[2], name))
        pieces = [found for delta in self._deltas.values() for found in delta.pieces()] + list(self._exact.values())
        self.values = Values(pieces, dtype)
        for owner, leaf, name in parameters:
            trained = nn.Parameter(self._exact[name].leaf.detach())
            trained.grad = self._exact[name].leaf.grad
            setattr(owner, leaf, trained)

    def terms(self) -> dict[str, tuple[Term, ...]]:
        """Site name -> its terms with the numbers of now, on the CPU."""
        return {name: Delta(d.shape, d.stored()).to("cpu").terms for name, d in self._deltas.items()}

    def exact(self) -> dict[str, Tensor]:
        """Tensor name -> the norm or bias of now, on the CPU, in the file's dtype."""
        return {name: p.values.view(p.shape).to(p.stored).cpu() for name, p in self._exact.items()}
