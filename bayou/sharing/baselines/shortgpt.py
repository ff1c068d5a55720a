"""ShortGPT (https://arxiv.org/abs/2403.03853): remove the layers that change the residual stream least.

Block influence of layer i: BI_i = 1 - E_t[cos(X_i,t, X_i+1,t)], X_i the hidden state entering it, before its norm. The
layers of smallest BI are removed at once; nothing is measured again.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayou import skeleton
from bayou.sharing.baselines.baseline import Baseline, Similarities, count, first, keep_layers, load, nearest, observe


def block_influence(model: PreTrainedModel, windows: Tensor, *, batch: int = 8) -> list[float]:
    """BI of every decoder layer over the windows (n, length)."""
    _, layers = skeleton.decoder_layers(model)
    similarities = Similarities()

    def hook(i: int, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        similarities.add(i, args[0] if args else kwargs["hidden_states"], first(output))

    hooks = [layer.register_forward_hook(partial(hook, i), with_kwargs=True) for i, layer in enumerate(layers)]
    observe(model, windows, batch, hooks)
    means = similarities.means()
    return [1 - means[i] for i in range(len(layers))]


def share(
    folder: Path | str,
    *,
    reduce: float,
    windows: Tensor,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 8,
) -> Baseline:
    """The model of `folder` without its least influential layers.

    Args: reduce: share of all parameters to remove. windows: (n, length) token ids to measure on.
    Raises BadInput for a reduction that would leave no layer.
    """
    model = load(folder, device=device, dtype=dtype)
    before = count(model)
    _, layers = skeleton.decoder_layers(model)
    influence = block_influence(model, windows, batch=batch)
    order = sorted(range(len(layers)), key=lambda i: influence[i])
    number = nearest([count(layers[i]) for i in order[:-1]], before, reduce)
    gone = sorted(order[:number])
    kept = [i for i in range(len(layers)) if i not in gone]
    keep_layers(model, [layers[i] for i in kept], kept)
    described = {"removed_layers": gone, "block_influence": [round(value, 6) for value in influence]}
    return Baseline("shortgpt", model, before, before - count(model), described, origin=tuple(kept))
