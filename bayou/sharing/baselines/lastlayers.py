"""Drop the last layers and tune the head and the last three that are left.

"Reassessing layer pruning" (https://openreview.net/forum?id=04Tfwy3LLC): this beats layer metrics with LoRA. A tied
head stays tied: it is the embedding, which is then tuned with it; untying would add more parameters than are removed.
"""

from pathlib import Path

import torch
from torch import Tensor

from bayou import skeleton
from bayou.sharing.baselines.baseline import Baseline, count, keep_layers, load, nearest

TUNED = 3
"""How many of the remaining layers are trained."""


def share(
    folder: Path | str,
    *,
    reduce: float,
    windows: Tensor | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 8,
) -> Baseline:
    """The model of `folder` without its last layers. windows and batch are not needed: nothing is measured.

    Args: reduce: share of all parameters to remove. Raises BadInput for one that would leave no layer.
    """
    model = load(folder, device=device, dtype=dtype)
    before = count(model)
    path, layers = skeleton.decoder_layers(model)
    number = nearest([count(layer) for layer in reversed(layers[1:])], before, reduce)
    left = len(layers) - number
    keep_layers(model, list(layers[:left]), range(left))
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    tuned = tuple(f"{path}.{i}" for i in range(max(0, left - TUNED), left))
    described = {"removed_layers": list(range(left, left + number)), "tuned": [head, *tuned]}
    removed = before - count(model)
    return Baseline("lastlayers", model, before, removed, described, tuned=(head, *tuned), origin=tuple(range(left)))
