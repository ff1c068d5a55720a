"""What a file loses, matrix by matrix: in the delta itself, and in its output over the calibration text.

error     ||D - D'|| / ||D||                       as the file says it (and `bayou inspect`)
output    ||(D - D') H^(1/2)|| / ||D H^(1/2)||     H: second moments of the input; the identity where there are none
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any

from torch import Tensor

from bayou.checkpoint import Checkpoint
from bayou.comparison.bound import Spectrum, spectrum
from bayou.decompose import Matrix
from bayou.delta import ROWS
from bayou.deltafile import DeltaFile
from bayou.inventory import delta_matrix
from bayou.momentfiles import MomentFiles
from bayou.moments import input_of
from bayou.plan import SiteRecord
from bayou.skeleton import Place

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Models:
    """The pair. places: of the fine-tune's tensors. moments: of its inputs; None without calibration."""

    base: Checkpoint
    tuned: Checkpoint
    places: dict[str, Place]
    moments: MomentFiles | None
    device: str

    def inputs(self, sites: Iterable[SiteRecord]) -> Iterator[tuple[SiteRecord, Tensor | None]]:
        """Each site with the moments of its input, layer by layer: one layer's are in memory at a time."""
        by_layer: dict[int | None, list[SiteRecord]] = defaultdict(list)
        where = {} if self.moments is None else self.moments.where()
        for site in sites:
            by_layer[where.get(input_of(self.places.get(site.tensor)) or "")].append(site)
        for layer, members in by_layer.items():
            held = {} if layer is None or self.moments is None else self.moments.get(layer, self.device)
            for site in members:
                gram = held.get(input_of(self.places.get(site.tensor)) or "")
                # Llama 4's experts are (in, out), and nothing says so.
                yield site, gram if gram is not None and len(gram) == site.shape[1] else None

    def spectra(self, file: DeltaFile, progress: Progress = lambda *_: None) -> dict[str, Spectrum]:
        """The spectrum of every matrix that a file codes."""
        coded, found = _coded(file), {}
        for site, moments in self.inputs(coded):
            found[site.name] = spectrum(delta_matrix(site, self.base, self.tuned, self.device), moments)
            progress(len(found), len(coded))
        return found

    def losses(
        self, file: DeltaFile, spectra: dict[str, Spectrum], progress: Progress = lambda *_: None
    ) -> dict[str, float]:
        """Site -> output error squared, of matrices that have a spectrum; what a file has exactly loses nothing."""
        found = dict.fromkeys(spectra, 0.0)
        errors = file.errors()
        coded = [site for site in _coded(file) if site.name in spectra and errors[site.name] > 0]
        for done, (site, moments) in enumerate(self.inputs(coded), 1):
            whole = float(spectra[site.name].energies.sum())
            matrix = delta_matrix(site, self.base, self.tuned, self.device)
            found[site.name] = self._lost(file, site, matrix, moments) / whole if whole > 0 else 0.0
            progress(done, len(coded))
        return found

    def _lost(self, file: DeltaFile, site: SiteRecord, matrix: Matrix, moments: Tensor | None) -> float:
        delta, total = file.delta(site.name).to(self.device), 0.0
        weight = None if moments is None else moments.double()
        for start, block in matrix.blocks():
            for first in range(0, len(block), ROWS):
                rows = block[first : first + ROWS].double()
                rest = rows - delta.materialize(start + first, start + first + len(rows)).to(rows.device)
                total += float((rest * (rest if weight is None else rest @ weight)).sum())
        return total


def _coded(file: DeltaFile) -> list[SiteRecord]:
    return [site for site in file.sites.values() if site.terms]


def total(losses: dict[str, float], spectra: dict[str, Spectrum]) -> float:
    """E of `bound`: the mean of the losses by numbers of weights."""
    weights = {name: one.shape[0] * one.shape[1] for name, one in spectra.items()}
    return sum(weights[name] * losses[name] for name in spectra) / max(1, sum(weights.values()))


def kind_and_layer(name: str) -> tuple[str, int | None]:
    """("mlp.experts.*.w1", 3) of "model.layers.3.mlp.experts.5.w1.weight"; layer None where the name has no number."""
    stem = re.sub(r"(\.weight)?(\[\d+\])?$", "", name)
    parts = stem.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if first is None or first == len(parts) - 1:
        return parts[-1], None
    return ".".join("*" if part.isdigit() else part for part in parts[first + 1 :]), int(parts[first])


def cells(file: DeltaFile, losses: dict[str, float]) -> list[dict[str, Any]]:
    """One entry a kind of matrix and layer: matrices, weights, error and output (root mean squares by weights)."""
    errors = file.errors()
    sums: dict[tuple[str, int | None], list[float]] = {}
    for site in _coded(file):
        entry = sums.setdefault(kind_and_layer(site.name), [0, 0, 0.0, 0.0])
        weights = site.shape[0] * site.shape[1]
        for i, value in enumerate((1, weights, weights * errors[site.name] ** 2, weights * losses.get(site.name, 0.0))):
            entry[i] += value
    return [
        {
            "kind": kind,
            "layer": layer,
            "matrices": int(count),
            "weights": int(weights),
            "error": sqrt(error / weights),
            "output": sqrt(output / weights),
        }
        for (kind, layer), (count, weights, error, output) in sums.items()
    ]


def fixed_bytes(file: DeltaFile) -> int:
    """Bytes of a file that stand for no coded matrix: exact tensors, changed config and tokenizer files."""
    names = [*file.exact, *(name for name in file.entries() if name.startswith(".file."))]
    return sum(file.entry_nbytes(name) for name in names)
