"""What all rivals have in common: loading, counting, choosing how much to remove, recovery training, saving.

A reduction is a share of *all* parameters of the model, embeddings counted (a tied head once). Each method removes
whole pieces, so the nearest reachable number is taken and the exact one reported.

Recovery training is LoRA of rank 32, alpha 10 (SliceGPT's recipe, without its dropout) on all remaining linears of the
decoder layers, for every rival but `lastlayers`, whose definition says what is trained.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayou import sidecar, skeleton
from bayou.checkpoint import Checkpoint
from bayou.errors import BadInput, Unsupported, disk_error
from bayou.sharing import Shared, lora
from bayou.sharing.student import twin

LORA_RANK, LORA_ALPHA = 32, 10.0


@dataclass(frozen=True)
class Baseline:
    """A smaller model, as one of the rivals makes it.

    before, removed: parameters of the original, and how many of them are gone (added ones subtracted). description:
    what was chosen, for a report. tuned: modules trained whole in recovery (empty: LoRA). zeroed: path -> the sub-layer
    that stood there; a plain folder needs one, so it is written with a zero output matrix. origin: the original layer
    whose place each layer has. own: it has no plain form, nor one as a Shared.
    """

    name: str
    model: PreTrainedModel
    before: int
    removed: int
    description: dict[str, Any]
    tuned: tuple[str, ...] = ()
    zeroed: dict[str, nn.Module] = field(default_factory=dict)
    origin: tuple[int, ...] = ()
    own: bool = False

    def shared(self, original: Path | str) -> tuple[Shared, dict[str, Tensor]]:
        """(what is dropped, disk name -> tensor for each that is not the original's): what sharedfile.write takes.

        original: the folder the baseline was made of. Removed layers are both their sub-layers; merged, tuned or
        trained ones are tensors. Raises Unsupported for SliceGPT, and for models converted on loading.
        """
        if self.own:
            raise Unsupported(f"{self.name} changes the shapes of all matrices: it is no model of shared layers")
        checkpoint = Checkpoint(Path(original))
        whole = skeleton.build(checkpoint.folder)
        layers, _ = skeleton.decoder_layers(whole)
        number = {origin: i for i, origin in enumerate(self.origin)}
        dropped: dict[str, None] = {}
        tensors = {}
        for name, place in skeleton.places(whole, checkpoint.names()).items():
            if place.index is not None or place.converted:
                raise Unsupported(f"{name} is converted on loading; {self.name} cannot be told in the file's names")
            path = place.path
            if path.startswith(layers + "."):
                block, child, *leaf = path[len(layers) + 1 :].split(".")
                if int(block) not in number or f"{layers}.{block}.{child}" in self.zeroed:
                    if place.role == "linear":
                        dropped[name.removesuffix("." + ".".join(leaf))] = None
                    continue
                path = ".".join([layers, str(number[int(block)]), child, *leaf])
            stored, now = checkpoint.read(name), self.model.get_parameter(path).detach().cpu()
            if not torch.equal(now, stored.to(now.dtype)):
                tensors[name] = now.to(stored.dtype)
        return Shared((), tuple(dropped)), tensors

    @property
    def parameters(self) -> int:
        """Parameters of the smaller model."""
        return self.before - self.removed

    @property
    def reduction(self) -> float:
        """The share of all parameters that is gone."""
        return self.removed / self.before

    def trainable(self, *, rank: int = LORA_RANK, alpha: float = LORA_ALPHA, seed: int = 0) -> list[nn.Parameter]:
        """Prepare recovery training; returns what it trains, in fp32. All else is frozen."""
        self.model.requires_grad_(False)
        for path in self.tuned:
            self.model.get_submodule(path).float().requires_grad_(True)
        if not self.tuned:
            layers, _ = skeleton.decoder_layers(self.model)
            lora.add(self.model.get_submodule(layers), rank=rank, alpha=alpha, seed=seed)
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def finish(self) -> PreTrainedModel:
        """End recovery training: LoRAs are merged, nothing is trainable; the number of parameters is as before it."""
        lora.merge(self.model)
        return self.model.requires_grad_(False)

    def save(self, out: Path | str, original: Path | str) -> Path:
        """Write a plain Hugging Face folder, with the tokenizer of the folder `original`; returns it.

        Raises Unsupported for a model without a plain form (SliceGPT), BadInput where `out` exists.
        """
        if self.own:
            raise Unsupported(
                f"{self.name} has no plain Hugging Face form; bayou.sharing.baselines.slicegpt has save and load"
            )
        model = self.model
        if self.zeroed:
            model = twin(self.model)
            for path, module in self.zeroed.items():
                model.set_submodule(path, _silent(module, path))
        return save_plain(model, out, original)


def save_plain(model: PreTrainedModel, out: Path | str, original: Path | str) -> Path:
    """Write `model` as a Hugging Face folder that appears whole or not at all; tokenizer files from `original`."""
    out = Path(out)
    if out.exists():
        raise BadInput(f"{out} exists; choose another folder")
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        model.save_pretrained(work)
        for name, content in sidecar.carried(Path(original)).items():
            if name != "config.json":
                (work / name).write_bytes(content)
        os.replace(work, out)
    except OSError as error:
        raise disk_error(error, out) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def load(folder: Path | str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a folder, frozen and in eval mode."""
    checkpoint = Checkpoint(Path(folder))
    model = skeleton.build(checkpoint.folder)
    places = skeleton.places(model, checkpoint.names())
    skeleton.fill(model, "", places, checkpoint.read, dtype=dtype, device=device)
    model.config.dtype = dtype
    return model


def count(module: nn.Module) -> int:
    """Parameters, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def nearest(sizes: Sequence[int], total: int, reduce: float) -> int:
    """How many of the pieces, taken in order, remove the share of `total` that is nearest to `reduce`; 1 at least.

    Raises BadInput for a share outside 0..1, or one so large that all pieces together fall short of it.
    """
    if not 0 < reduce < 1:
        raise BadInput(f"a reduction of {reduce}: give the share of parameters to remove, between 0 and 1")
    wanted = reduce * total
    if not sizes or sum(sizes) < wanted:
        most = sum(sizes) / total
        raise BadInput(f"at most {most:.1%} of the parameters can be removed in this way, not {reduce:.1%}")
    removed, best, found = 0, float("inf"), 1
    for n, size in enumerate(sizes, 1):
        removed += size
        if abs(removed - wanted) < best:
            best, found = abs(removed - wanted), n
    return found


def batches(model: PreTrainedModel, windows: Tensor, batch: int) -> Iterator[Tensor]:
    """Run the decoder (without the head) over the windows; yields each batch's final hidden states."""
    device = next(model.parameters()).device
    with torch.no_grad():
        for part in windows.split(batch):
            yield model.get_decoder()(input_ids=part.to(device), use_cache=False).last_hidden_state


def observe(model: PreTrainedModel, windows: Tensor, batch: int, hooks: list[Any]) -> None:
    """Run all windows through the model for what its `hooks` (handles) see, and take those away, come what may."""
    try:
        for _ in batches(model, windows, batch):
            pass
    finally:
        for handle in hooks:
            handle.remove()


class Similarities:
    """Mean cosine between pairs of states, over all tokens, in fp32; for layers seen through hooks."""

    def __init__(self) -> None:
        self._sums: dict[Any, Tensor] = {}
        self._tokens: dict[Any, int] = {}

    def add(self, key: Any, x: Tensor, y: Tensor) -> None:
        """Count cos(x_t, y_t) of every token t; x and y (..., d)."""
        cosines = nn.functional.cosine_similarity(x.float(), y.float(), dim=-1)
        self._sums[key] = self._sums.get(key, 0) + cosines.sum()
        self._tokens[key] = self._tokens.get(key, 0) + cosines.numel()

    def means(self) -> dict[Any, float]:
        """Key -> mean."""
        return {key: float(total) / self._tokens[key] for key, total in self._sums.items()}


def first(value: Any) -> Tensor:
    """The hidden states in what a layer returns."""
    found: Tensor = value[0] if isinstance(value, tuple) else value
    return found


def keep_layers(model: PreTrainedModel, kept: Sequence[nn.Module], indices: Sequence[int]) -> None:
    """Let `kept` be the decoder's layers, in place; `indices` are the original layers whose settings they have.

    The config's layer count and its lists with an element a layer (layer_types) are cut, caches renumbered.
    """
    path, layers = skeleton.decoder_layers(model)
    config, total = model.config.get_text_config(), len(layers)
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == total and name != "architectures":
            setattr(config, name, [value[i] for i in indices])
    config.num_hidden_layers = len(kept)
    model.set_submodule(path, nn.ModuleList(kept))
    for number, layer in enumerate(kept):
        for module in layer.modules():
            if "layer_idx" in module.__dict__:
                module.__dict__["layer_idx"] = number


def _silent(module: nn.Module, path: str) -> nn.Module:
    """A copy of an attention or MLP whose output matrix (and its bias) is zero."""
    for leaf in ("o_proj", "down_proj"):
        linear = getattr(module, leaf, None)
        if isinstance(linear, nn.Linear):
            zero = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
            weight = linear.weight
            zero.weight = nn.Parameter(torch.zeros_like(weight), False)
            if linear.bias is not None:
                zero.bias = nn.Parameter(torch.zeros_like(linear.bias), False)
            copy = _shallow(module)
            copy.set_submodule(leaf, zero)
            return copy
    raise Unsupported(f"{path} ({type(module).__name__}) has neither o_proj nor down_proj: no plain form without it")


def _shallow(module: nn.Module) -> nn.Module:
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__.update(module.__dict__)
    copy._modules = dict(module._modules)
    return copy
