"""Layers that hold no matrix of their own: they share another layer's, which is in memory once, or are factors alone.

    W = gain * anchor + u @ v      y = gain * anchor(x) + u (v x) + bias

The anchor is the weight of another module of the same model; the layer itself has its factors and its bias. What cannot
be computed so (an expert of a 3-D tensor, a table, a matrix that transformers makes of several) is restored, and then
it is an ordinary parameter.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayou.attached import AttachedLinear
from bayou.checkpoint import Checkpoint
from bayou.deltafile import DeltaFile
from bayou.plan import SiteRecord
from bayou.restore import Restorer
from bayou.skeleton import Place


class Borrowed:
    """The tensors of a file that lean on no base: which load as factors, and which are restored.

    factored: disk name -> site, of linears over an anchor that is a parameter of the model, or over nothing.
    restored: disk names whose whole value stands in the model.
    """

    def __init__(
        self, model: PreTrainedModel, places: Mapping[str, Place], file: DeltaFile, base: Checkpoint | None
    ) -> None:
        self._model, self._places, self._file = model, places, file
        self._restorer = Restorer(base, file)
        sites: dict[str, list[SiteRecord]] = defaultdict(list)
        for site in file.sites.values():
            sites[site.tensor].append(site)
        free = {name for name, parts in sites.items() if all(p.reference is None for p in parts)}
        free = {name for name in free if base is None or name not in base}
        tied = {name for name, parts in sites.items() if any(p.anchor is not None for p in parts)}
        anchors = {site.anchor for site in file.sites.values()}
        # Of a file over a base, an anchor may itself be a layer with something attached, which has no plain weight.
        plain = {name for name in places if name not in file.unchanged and (name not in sites or name in free)}
        self.factored: dict[str, SiteRecord] = {}
        for name in sorted((free - anchors) | tied):
            first = sites[name][0]
            factors = all(term.kind == "LowRank" for term in first.terms)
            lender = None if first.anchor is None else places.get(first.anchor)
            if first.anchor is not None:
                lent = first.anchor in plain and lender is not None and self._whole_linear(lender, first)
            else:
                lent = factors
            own = places.get(name)
            if lent and own is not None and self._whole_linear(own, first) and file.tail(name) is None:
                self.factored[name] = first
        self.restored = (free | tied) - set(self.factored)
        if file.stepped:  # the whole model as it is: what has steps is no sum that a module could compute
            self.restored, self.factored = set(file.tensors()), {}

    @staticmethod
    def _whole_linear(place: Place, site: SiteRecord) -> bool:
        """Whether the place is one linear's whole weight, which lies as the site's terms do."""
        whole = place.index is None and not place.converted and not place.also and site.part is None
        return whole and place.role == "linear" and place.transposed == site.transposed and site.reference_part is None

    @property
    def done(self) -> frozenset[str]:
        """Disk names of all tensors that the loaded model computes with as they are."""
        return frozenset(self.factored) | self.restored

    def restore(self, name: str) -> Tensor:
        """The tensor's value, in its own dtype."""
        return self._restorer.tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape on disk."""
        return self._restorer.spec(name)[1]

    def strip(self) -> None:
        """Take the weights off the factored linears of a skeleton, so that none is ever allocated."""
        for name in self.factored:
            self._module(name).register_parameter("weight", None)

    def attach(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """Let the factored linears, stripped, compute with their anchors' weights, which are filled by now."""
        deltas = self._file.deltas(self.factored, device)
        for name, site in self.factored.items():
            if site.anchor is None:
                base = nn.Parameter(torch.empty(0, site.shape[1], dtype=dtype, device=device), requires_grad=False)
            else:
                base = self._model.get_parameter(self._places[site.anchor].path)
            linear = AttachedLinear(self._module(name), base, deltas[name])
            self._model.set_submodule(self._places[name].path.rpartition(".")[0], linear)

    def _module(self, name: str) -> nn.Module:
        return self._model.get_submodule(self._places[name].path.rpartition(".")[0])
