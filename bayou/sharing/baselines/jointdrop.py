"""Joint Layer Drop of LLM-Drop (https://arxiv.org/abs/2406.15786): drop attentions and MLPs by one ranking.

For each sub-layer the cosine, averaged over tokens, of what comes in and what goes out of it, the residual counted:
attention: X before the input norm, Y = X + attention(norm(X)); MLP: X before its norm, Y = X + mlp(norm(X)). Of the 2 L
sub-layers those with the largest cosine are dropped at once, each with its norm.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayou import skeleton
from bayou.errors import Unsupported
from bayou.sharing import Shared
from bayou.sharing.baselines.baseline import Baseline, Similarities, count, first, load, nearest, observe
from bayou.sharing.student import apply

KINDS = ("self_attn", "mlp")
_NORMS = {
    "self_attn": ("input_layernorm", "post_attention_layernorm"),
    "mlp": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
"""The norms before and after each kind where a layer has four of them (Gemma)."""


def norms(layer: nn.Module) -> dict[str, tuple[nn.Module, ...]]:
    """Kind -> the norms that go with it, the one before it first. Raises Unsupported for an unknown layer."""
    if any(not hasattr(layer, name) for name in (*KINDS, "input_layernorm", "post_attention_layernorm")):
        raise Unsupported(f"jointdrop does not know the sub-layers of {type(layer).__name__}")
    if hasattr(layer, "pre_feedforward_layernorm"):
        return {kind: tuple(getattr(layer, name) for name in names) for kind, names in _NORMS.items()}
    return {"self_attn": (layer.input_layernorm,), "mlp": (layer.post_attention_layernorm,)}  # type: ignore[dict-item]


def similarities(model: PreTrainedModel, windows: Tensor, *, batch: int = 8) -> dict[tuple[int, str], float]:
    """(layer, kind) -> mean cosine of the residual stream before and after the sub-layer."""
    _, layers = skeleton.decoder_layers(model)
    found, between = Similarities(), {}
    hooks: list[Any] = []

    def middle(i: int, _: nn.Module, args: Any) -> None:
        between[i] = args[0]

    def end(i: int, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        start, halfway = args[0] if args else kwargs["hidden_states"], between.pop(i)
        found.add((i, "self_attn"), start, halfway)
        found.add((i, "mlp"), halfway, first(output))

    for i, layer in enumerate(layers):
        hooks.append(norms(layer)["mlp"][0].register_forward_pre_hook(partial(middle, i)))
        hooks.append(layer.register_forward_hook(partial(end, i), with_kwargs=True))
    observe(model, windows, batch, hooks)
    return found.means()


def share(
    folder: Path | str,
    *,
    reduce: float,
    windows: Tensor,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 8,
) -> Baseline:
    """The model of `folder` without its least useful sub-layers; as many as come nearest to the reduction.

    Args: reduce: share of all parameters to remove. windows: (n, length) token ids to measure on.
    A plain folder holds dropped sub-layers with their output matrix at zero: it has the function of the smaller model,
    not its size.
    """
    model = load(folder, device=device, dtype=dtype)
    before = count(model)
    path, layers = skeleton.decoder_layers(model)
    cosines = similarities(model, windows, batch=batch)
    order = sorted(cosines, key=lambda key: -cosines[key])

    def size(key: tuple[int, str]) -> int:
        layer = layers[key[0]]
        return count(layer.get_submodule(key[1])) + sum(count(norm) for norm in norms(layer)[key[1]])

    number = nearest([size(key) for key in order], before, reduce)
    gone = sorted(order[:number])
    removed = sum(size(key) for key in gone)
    names = [f"{path}.{i}.{kind}" for i, kind in gone]
    zeroed = {name: model.get_submodule(name) for name in names}
    apply(model, Shared((), tuple(names))).finish()
    described = {
        "dropped_attentions": [i for i, kind in gone if kind == "self_attn"],
        "dropped_mlps": [i for i, kind in gone if kind == "mlp"],
        "similarity": {f"{i}.{kind}": round(cosines[i, kind], 6) for i, kind in sorted(cosines)},
    }
    return Baseline("jointdrop", model, before, removed, described, zeroed=zeroed, origin=tuple(range(len(layers))))
