"""SliceGPT (https://arxiv.org/abs/2401.15024): rotate the residual stream onto its principal directions and cut it.

1. Every RMSNorm's gain is folded into the linears that follow it; what is left commutes with rotations.
2. H = sum X^T X in fp64 over the calibration tokens, H += .01 mean(diag H) I, eigenvectors in falling order: Q.
3. Embeddings W_e Q, the first D' columns.
4. Block by block, on the signal as sliced so far: q, k, v and gate, up: W Q; o and down: Q'^T W with the Q' of the
   signal after them; the residual is multiplied by a *shortcut* Q^T Q' (D' x D') at each of the two places.
5. Head: W_h Q of the last signal.
D' is a multiple of 8. The norms still divide by the root of sum / D with the original D.

The shortcuts are 2 D'^2 parameters a block, and a tied head becomes a matrix of its own, since embedding and head are
rotated differently: both are counted, so a small model with a large vocabulary must be sliced hard to lose anything.
There is no plain form: `save` and `load` are its own, a folder of model.safetensors, sliced.json and the small files.
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from bayou import sidecar, skeleton
from bayou.deltafile import SLICED
from bayou.errors import BadInput, Unsupported, disk_error
from bayou.sharing.baselines.baseline import Baseline, count
from bayou.sharing.baselines.baseline import load as load_original

MULTIPLE = 8


class SlicedNorm(nn.Module):
    """RMSNorm without gain: x / sqrt(sum x^2 / width + eps), `width` being the width before slicing."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D') -> (..., D')."""
        mean = x.float().square().sum(-1, keepdim=True) / self.width
        return (x.float() * torch.rsqrt(mean + self.eps)).to(x.dtype)


class SlicedLayer(nn.Module):
    """A decoder layer whose residual goes through a shortcut matrix at each of its two additions."""

    def __init__(self, layer: nn.Module, norm: SlicedNorm, incoming: Tensor, outgoing: Tensor) -> None:
        super().__init__()
        self.self_attn: Any = layer.self_attn
        self.mlp: Any = layer.mlp
        self.norm = norm
        self.attention_shortcut = nn.Parameter(incoming, requires_grad=False)
        self.mlp_shortcut = nn.Parameter(outgoing, requires_grad=False)
        # Where the model keeps its layers' kinds of attention on the layers themselves.
        for name in ("attention_type", "layer_type"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def attend(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """The signal between attention and MLP."""
        out = self.self_attn(hidden_states=self.norm(hidden_states), **kwargs)[0]
        return hidden_states @ self.attention_shortcut.to(hidden_states.dtype) + out

    def think(self, hidden_states: Tensor) -> Tensor:
        """The signal after the MLP, given that before it."""
        out: Tensor = self.mlp(self.norm(hidden_states))
        return hidden_states @ self.mlp_shortcut.to(hidden_states.dtype) + out

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """As a decoder layer's."""
        return self.think(self.attend(hidden_states, **kwargs))


def share(
    folder: Path | str,
    *,
    reduce: float,
    windows: Tensor,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 8,
) -> Baseline:
    """The model of `folder`, sliced to the width that removes the nearest share of all parameters.

    Args: reduce: share of all parameters to remove, shortcuts and an untied head counted. windows: (n, length) token
    ids to calibrate on; one layer's signals of all of them are in memory. Computed in fp32, then cast to `dtype`.

    Raises: Unsupported for models other than of Llama's form (two plain RMSNorms a layer). BadInput for a reduction
    that no width reaches.
    """
    model = load_original(folder, device=device)
    before = count(model)
    width = _width(model, before, reduce)
    after = _parameters(model, width)
    slice_to(model, windows.to(device), width, batch=batch)
    if count(model) != after:
        raise AssertionError(f"{count(model)} parameters, {after} expected")
    model.to(dtype)
    model.config.dtype = dtype
    described = {
        "width": width,
        "of": model.config.hidden_size,
        "shortcut_parameters": 2 * width * width * model.config.num_hidden_layers,
        "head_untied": bool(model.config.bayou_was_tied),
    }
    return Baseline("slicegpt", model, before, before - after, described, own=True)


def slice_to(model: PreTrainedModel, windows: Tensor, width: int, *, batch: int = 8) -> None:
    """Fuse, rotate and slice `model` in place; see the module's text."""
    _check(model)
    layers = _layers(model)
    decoder, full = model.get_decoder(), model.config.hidden_size
    arguments = _layer_arguments(model, windows, batch)
    _untie(model)
    _fuse(model)
    norm = SlicedNorm(full, model.config.rms_norm_eps)
    with torch.no_grad():
        signals = [decoder.embed_tokens(part) for part in windows.split(batch)]
        basis = principal(signals)
        _set(decoder.embed_tokens, decoder.embed_tokens.weight.double() @ basis[:, :width])
        signals = [_times(signal, basis[:, :width]) for signal in signals]
        for i, layer in enumerate(list(layers)):
            for linear in _readers(layer.self_attn):
                _set(linear, linear.weight.double() @ basis[:, :width])
            back = basis[:, :width].T
            sliced = SlicedLayer(layer, norm, _as(back, model), _as(back, model))
            middle = [sliced.attend(signal, **arguments[len(signal), i]) for signal in signals]
            basis_2 = principal(middle)
            _write(layer.self_attn.o_proj, basis_2[:, :width])
            sliced.attention_shortcut = nn.Parameter(_as(back @ basis_2[:, :width], model), False)
            for linear in _readers(layer.mlp):
                _set(linear, linear.weight.double() @ basis_2[:, :width])
            middle = [_times(signal, basis_2[:, :width]) for signal in middle]
            back = basis_2[:, :width].T
            sliced.mlp_shortcut = nn.Parameter(_as(back, model), False)
            signals = [sliced.think(signal) for signal in middle]
            basis = principal(signals)
            _write(layer.mlp.down_proj, basis[:, :width])
            sliced.mlp_shortcut = nn.Parameter(_as(back @ basis[:, :width], model), False)
            signals = [_times(signal, basis[:, :width]) for signal in signals]
            layers[i] = sliced
        decoder.norm = norm
        _set(model.lm_head, model.lm_head.weight.double() @ basis[:, :width])


def principal(signals: list[Tensor]) -> Tensor:
    """Eigenvectors (D, D), fp64, columns in falling order of eigenvalue, of sum X^T X + .01 mean(diag) I."""
    width = signals[0].shape[-1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=signals[0].device)
    for signal in signals:
        flat = signal.reshape(-1, width).double()
        gram.addmm_(flat.T, flat)
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    return torch.linalg.eigh(gram)[1].flip(1)


def save(baseline: Baseline, out: Path | str, original: Path | str) -> Path:
    """Write a sliced model (model.safetensors, sliced.json, tokenizer files of `original`) whole or not at all."""
    out, model = Path(out), baseline.model
    if not baseline.own:
        raise BadInput(f"{baseline.name} is not a sliced model; use its own save")
    if out.exists():
        raise BadInput(f"{out} exists; choose another folder")
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    config = {**model.config.to_dict(), "dtype": str(model.config.dtype).removeprefix("torch.")}
    stated = {"width": baseline.description["width"], "config": config, "removed": baseline.removed}
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, work / "model.safetensors", metadata={"format": "pt"})
        (work / SLICED).write_text(json.dumps(stated, indent=2) + "\n")
        for name, content in sidecar.carried(Path(original)).items():
            if name != "config.json":  # transformers must not take the folder for a plain one
                (work / name).write_bytes(content)
        os.replace(work, out)
    except OSError as error:
        raise disk_error(error, out) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def load(
    folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model that `save` wrote, frozen, in eval mode; dtype None is as saved. BadInput if it is none."""
    folder = Path(folder)
    try:
        stated = json.loads((folder / SLICED).read_text(encoding="utf-8"))
        width, raw = int(stated["width"]), dict(stated["config"])
        state = load_file(folder / "model.safetensors", device=str(device))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder} does not hold a sliced model ({error})") from error
    model = skeleton.build(raw)
    places = {name: skeleton.Place(name, None, "other", False, ()) for name in state}
    layers = _layers(model)
    decoder, norm = model.get_decoder(), SlicedNorm(model.config.hidden_size, model.config.rms_norm_eps)
    empty = torch.empty(width, width, device="meta")
    for i, layer in enumerate(list(layers)):
        for linear in (*_readers(layer.self_attn), *_readers(layer.mlp)):
            _set(linear, torch.empty(linear.weight.shape[0], width, device="meta"))
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            _set(linear, torch.empty(width, linear.weight.shape[1], device="meta"))
            if linear.bias is not None:
                linear.bias = nn.Parameter(torch.empty(width, device="meta"), False)
        for linear in _readers(layer.self_attn) + _readers(layer.mlp):
            if linear.bias is not None:
                linear.bias = nn.Parameter(torch.empty(linear.weight.shape[0], device="meta"), False)
        layers[i] = SlicedLayer(layer, norm, empty, empty)
    decoder.norm = norm
    for module in (decoder.embed_tokens, model.lm_head):
        _set(module, torch.empty(module.weight.shape[0], width, device="meta"))
    wanted = dtype or next(iter(state.values())).dtype
    skeleton.fill(model, "", places, state.__getitem__, dtype=wanted, device=device)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.name_or_path = str(folder)
    return model


def is_sliced(folder: Path | str) -> bool:
    """Whether `save` wrote the folder."""
    return (Path(folder) / SLICED).is_file()


def _parameters(model: PreTrainedModel, width: int) -> int:
    """Parameters of the sliced model, before it is made."""
    layers = _layers(model)
    total = 2 * model.get_input_embeddings().weight.shape[0] * width
    for layer in layers:
        read = (*_readers(layer.self_attn), *_readers(layer.mlp))
        wrote = (layer.self_attn.o_proj, layer.mlp.down_proj)
        rows = sum(linear.weight.shape[0] for linear in read) + sum(linear.weight.shape[1] for linear in wrote)
        biases = sum(0 if linear.bias is None else linear.bias.numel() for linear in read)
        biases += sum(0 if linear.bias is None else width for linear in wrote)
        inner = count(layer.self_attn) + count(layer.mlp) - sum(count(m) for m in (*read, *wrote))
        total += rows * width + biases + inner + 2 * width * width
    return total


def _width(model: PreTrainedModel, before: int, reduce: float) -> int:
    """The D' whose model comes nearest to the reduction."""
    if not 0 < reduce < 1:
        raise BadInput(f"a reduction of {reduce}: give the share of parameters to remove, between 0 and 1")
    _check(model)
    widths = range(MULTIPLE, model.config.hidden_size, MULTIPLE)
    wanted = (1 - reduce) * before
    if not widths or _parameters(model, widths[0]) > wanted:
        raise BadInput(f"slicegpt cannot remove {reduce:.1%}: even {MULTIPLE} columns leave more than that")
    return min(widths, key=lambda width: abs(_parameters(model, width) - wanted))


def _layers(model: PreTrainedModel) -> Any:
    """The decoder's layers, whose parts are asked for by name."""
    return skeleton.decoder_layers(model)[1]


def _check(model: PreTrainedModel) -> None:
    """Raise Unsupported unless every layer is norm, attention with o_proj, norm, MLP with down_proj."""
    layers = _layers(model)
    decoder = model.get_decoder()
    wanted = ("self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
    extra = ("pre_feedforward_layernorm", "post_feedforward_layernorm", "resid_scale")
    for layer in layers:
        present = {name for name, _ in layer.named_modules()}
        gained = "gemma" in type(layer).__name__.lower()  # its norms multiply by 1 + weight
        if not present.issuperset(wanted) or present.intersection(extra) or gained:
            raise Unsupported(f"slicegpt knows layers of Llama's form only, not {type(layer).__name__}")
        if any(getattr(layer, name).__class__.__name__.endswith("LayerNorm") for name in wanted[2:]):
            raise Unsupported(f"slicegpt knows RMSNorm only; {type(layer).__name__} has LayerNorm")
    if not hasattr(decoder, "embed_tokens") or not hasattr(decoder, "norm") or not hasattr(model, "lm_head"):
        raise Unsupported(f"slicegpt does not know the embedding, norm and head of {type(model).__name__}")


def _readers(module: nn.Module) -> list[nn.Linear]:
    """The linears that read the residual stream: all but the one that writes to it."""
    return [m for name, m in module.named_children() if type(m) is nn.Linear and name not in ("o_proj", "down_proj")]


def _untie(model: PreTrainedModel) -> None:
    model.config.bayou_was_tied = bool(model.config.tie_word_embeddings)
    model.config.tie_word_embeddings = False
    head = model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _fuse(model: PreTrainedModel) -> None:
    """Fold every norm's gain into the linears that follow it."""
    layers = _layers(model)
    for layer in layers:
        for norm, readers in (
            (layer.input_layernorm, _readers(layer.self_attn)),
            (layer.post_attention_layernorm, _readers(layer.mlp)),
        ):
            for linear in readers:
                _set(linear, linear.weight.double() * norm.weight.double())
    _set(model.lm_head, model.lm_head.weight.double() * model.get_decoder().norm.weight.double())


Arguments = dict[tuple[int, int], dict[str, Any]]


def _layer_arguments(model: PreTrainedModel, windows: Tensor, batch: int) -> Arguments:
    """(windows in a batch, layer) -> what the decoder gives the layer beside the hidden states (masks, positions)."""
    layers = _layers(model)
    found: Arguments = {}

    def hook(size: int, i: int, _: nn.Module, __: Any, kwargs: Any) -> None:
        found[size, i] = {key: value for key, value in kwargs.items() if key != "hidden_states"}

    for part in {len(part): part for part in windows.split(batch)}.values():
        hooks = [
            layer.register_forward_pre_hook(partial(hook, len(part), i), with_kwargs=True)
            for i, layer in enumerate(layers)
        ]
        try:
            with torch.no_grad():
                model.get_decoder()(input_ids=part, use_cache=False)
        finally:
            for handle in hooks:
                handle.remove()
    return found


def _set(module: nn.Module, weight: Tensor) -> None:
    """Give a linear or an embedding another weight, in the dtype of its own."""
    old = module.weight
    assert isinstance(old, Tensor)
    module.weight = nn.Parameter(weight.to(old.dtype).contiguous(), requires_grad=False)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]


def _write(linear: nn.Linear, basis: Tensor) -> None:
    """Let a linear write in the columns of `basis` (D, D'): basis^T W, and its bias likewise."""
    _set(linear, basis.T @ linear.weight.double())
    if linear.bias is not None:
        linear.bias = nn.Parameter((linear.bias.double() @ basis).to(linear.bias.dtype), requires_grad=False)


def _times(signal: Tensor, basis: Tensor) -> Tensor:
    return signal @ basis.to(signal.dtype)


def _as(matrix: Tensor, model: PreTrainedModel) -> Tensor:
    return matrix.to(model.lm_head.weight.dtype).contiguous()
