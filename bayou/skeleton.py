"""From a checkpoint folder to a module tree without weights, and from disk names to places in that tree.

transformers renames and merges tensors as it loads them: `language_model.model.x` becomes
`model.language_model.x`, the matrices of all experts of a layer become one 3-D parameter. `places` says where
each disk tensor ends up, through transformers' own conversion mapping; `fill` and `empty` bring any part of
the tree to life and back, so that a model larger than the memory can be walked layer by layer.

Of transformers we use three things below its documented surface, all of them used by PEFT too or by every
model: `get_model_conversion_mapping(model)`, `rename_source_key(...)` with the converters' `convert`, and a
model's `_init_weights(module)`, which computes the buffers that no checkpoint holds (rotary frequencies).
"""

import copy
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from bayou.errors import BadInput, Unsupported

Index = tuple[int | slice, ...]
Read = Callable[[str], Tensor]
Source = Path | str | Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a disk tensor lies in the module tree.

    path: the parameter or (persistent) buffer. index: the part of it that the disk tensor is, None for the
    whole: `parameter[index]` is the disk tensor. role: linear, embedding, head, expert, norm, bias or other.
    transposed: the disk tensor (or each matrix of a 3-D one) is (in, out). also: paths that share the
    parameter (a tied head). converted: paths of all parameters that transformers computes from this tensor
    in a way that no index states (rotary permutation, a fused matrix cut up); empty for the others.
    """

    path: str
    index: Index | None
    role: str
    transposed: bool
    also: tuple[str, ...]
    converted: tuple[str, ...] = ()


def build(source: Source, *, attn_implementation: str | None = None) -> PreTrainedModel:
    """The model that a folder's config.json (or the dict `source`, its content) describes, on meta.

    The class is the one that config.architectures names. Eval mode, no gradients, no memory, and never the
    repository's own code. attn_implementation None lets transformers choose (sdpa where the model has it).
    Raises BadInput without a readable config.json, Unsupported for a model that transformers does not know.
    """
    raw = dict(source) if isinstance(source, Mapping) else _read_config(Path(source))
    config = _config(raw)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    with torch.device("meta"):
        model = _model_class(config, raw)(config)
    return model.eval().requires_grad_(False)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read ({error}); give a Hugging Face model folder") from error
    if not isinstance(raw, dict):
        raise BadInput(f"{path} is not a JSON object; give a Hugging Face model folder")
    return raw


def _config(raw: dict[str, Any]) -> PreTrainedConfig:
    kind = raw.get("model_type")
    if raw.get("quantization_config"):
        raise Unsupported("the checkpoint is quantised (quantization_config); give the unquantised model")
    if kind not in transformers.CONFIG_MAPPING:
        own = "; Bayou never runs the code that its repository brings (auto_map)" if raw.get("auto_map") else ""
        raise Unsupported(f"transformers {transformers.__version__} knows no model_type {kind!r}{own}")
    return transformers.CONFIG_MAPPING[kind].from_dict(copy.deepcopy(raw))


def _model_class(config: PreTrainedConfig, raw: dict[str, Any]) -> type[PreTrainedModel]:
    for name in raw.get("architectures") or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    for task in ("FOR_IMAGE_TEXT_TO_TEXT_", "FOR_CAUSAL_LM_", ""):
        mapping = getattr(transformers, f"MODEL_{task}MAPPING")
        if type(config) in mapping:
            return mapping[type(config)]
    version = transformers.__version__
    raise Unsupported(f"architectures {raw.get('architectures')} name no model class of transformers {version}")


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and list of the text decoder's blocks, also in a vision-language model; else Unsupported."""
    count = model.config.get_text_config().num_hidden_layers
    inside = {id(module) for module in model.get_decoder().modules()}
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and id(module) in inside
    ]
    if not lists:
        raise Unsupported(f"{type(model).__name__} has no list of {count} decoder layers")
    return min(lists, key=lambda found: found[0].count("."))


@dataclass
class _Target:
    """The disk tensors that make a parameter, in loading order: (disk name, converter's pattern or None)."""

    sources: list[tuple[str, str | None]]
    converter: WeightConverter | None


def _targets(model: PreTrainedModel, names: Iterable[str]) -> dict[str, _Target]:
    """Parameter path (the first, if a converter makes several) -> what transformers loads into it."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    targets: dict[str, _Target] = {}
    for name in sorted(names, key=_natural):
        path, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if path not in state and name in state:  # renamed by a pattern that was not meant for it
            path, pattern = rename_source_key(name, [], [], prefix, state)
        if path in state:
            converter = None if pattern is None else by_pattern[pattern]
            targets.setdefault(path, _Target([], converter)).sources.append((name, pattern))
    return targets


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts layers.2 before layers.10: the order in which transformers collects the experts of a layer."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def places(model: PreTrainedModel, disk_names: Iterable[str]) -> dict[str, Place]:
    """Where each of `disk_names` lies in `model`, a skeleton or not. Names that the model ignores are absent.

    The head of a tied model has a Place of its own only if it is among `disk_names`, else it is in the `also`
    of the embedding's. Raises Unsupported if an expert's number does not fit the model's parameter.
    """
    targets = _targets(model, disk_names)
    groups = _tied_groups(model)
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    state = model.state_dict()
    result = {}
    for path, target in targets.items():
        group = groups.get(path, ())
        owner, also = path, tuple(other for other in group if other != path and other not in targets)
        if group and group[0] not in targets:  # only the head is on disk: it is the embedding
            owner, also = group[0], tuple(other for other in (path, *also) if other != group[0])
        module = modules[owner.rpartition(".")[0]]
        role = _role(module, owner, state[owner].ndim, module is head)
        transposed = isinstance(module, Conv1D) and role in ("linear", "head")
        if role == "expert":
            transposed = bool(getattr(module, "is_transposed", False))
        for name, pattern in target.sources:
            index: Index | None = None
            converted: tuple[str, ...] = ()
            if target.converter is not None:
                index = _expert_index(target.converter, name, str(pattern), tuple(state[path].shape))
                if index is None:
                    converted = _conversion_paths(target.converter, path, state)
            kind = ("other", False) if converted else (role, transposed)
            result[name] = Place(owner, index, *kind, also, converted)
    return result


def _tied_groups(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Path -> all paths that share its parameter, the source (the embedding) first."""
    by_source: dict[str, list[str]] = defaultdict(list)
    for tied, source in model.all_tied_weights_keys.items():
        by_source[source].append(tied)
    return {path: (source, *sorted(tied)) for source, tied in by_source.items() for path in (source, *tied)}


def is_linear(module: nn.Module) -> bool:
    """Whether calling the module is x @ weight.T + bias: nn.Linear, and GPT-2's Conv1D (weight transposed).

    The output projection of nn.MultiheadAttention is an nn.Linear that is never called, so it is not one. A class whose
    own forward computes the same says so by `computes_linear`.
    """
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    if isinstance(module, Conv1D) or getattr(type(module), "computes_linear", False):
        return True
    return getattr(type(module), "forward", None) is nn.Linear.forward


def _role(module: nn.Module, path: str, ndim: int, is_head: bool) -> str:
    kind = type(module).__name__.lower()
    if path.endswith("bias"):
        return "bias"
    if is_linear(module):
        return "head" if is_head else "linear"
    if isinstance(module, nn.Embedding):
        return "other" if re.search(r"pos|wpe", path.rsplit(".", 2)[-2].lower()) else "embedding"
    if ndim == 3 and "expert" in kind:
        return "expert"
    return "norm" if "norm" in kind else "other"


def _expert_index(merge: WeightConverter, name: str, pattern: str, shape: tuple[int, ...]) -> Index | None:
    """Where `name` goes in the merged parameter: [expert], or [expert, rows] of gate and up. Else None.

    Known are the stacking of a list of tensors, alone or followed by joining as many rows of each pattern.
    """
    chain = [(type(step).__name__, getattr(step, "dim", None)) for step in merge.operations]
    number = re.search(r"\.(\d+)" + pattern.rpartition("*")[2] + "$", name) if "*" in pattern else None
    stack = ("MergeModulelist", 0)
    if number is None or chain not in ([stack], [stack, ("Concatenate", 1)]):
        return None
    expert, patterns = int(number[1]), merge.source_patterns
    if expert >= shape[0] or shape[1] % len(patterns):
        raise Unsupported(f"{name} does not fit into the model's parameter {shape}; is config.json its own?")
    if len(chain) == 1:
        return (expert,)
    rows = shape[1] // len(patterns)
    first = patterns.index(pattern) * rows
    return (expert, slice(first, first + rows))


def _conversion_paths(converter: WeightConverter, path: str, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    first = converter.target_patterns[0]
    every = (path.replace(first, other) for other in converter.target_patterns)
    return tuple(dict.fromkeys((path, *(other for other in every if other in state))))


def fill(
    model: PreTrainedModel,
    prefix: str,
    places: Mapping[str, Place],
    read: Read,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    skip: str | None = None,
) -> None:
    """Give every meta parameter and buffer under `prefix` ("" = all) its value, merged as transformers would.

    Args:
        model: a skeleton, or one partly filled; what is not on the meta device stays as it is.
        places: `places(model, names)` of all the checkpoint's names.
        read: disk name -> tensor, as it is on disk. Called once for each tensor that is needed.
        dtype: of the floating point parameters. Integers keep theirs; buffers that no file holds are fp32.
        skip: a path under which nothing is filled (the decoder layers, when filling all else).

    Tied parameters are one object again, wherever they are. Raises BadInput naming the missing tensors, or
    the one whose shape does not fit the model.
    """
    sources: dict[str, list[str]] = defaultdict(list)
    owner: dict[str, str] = {}
    for name, place in places.items():
        for path in place.converted or (place.path,):
            sources[path].append(name)
        owner.update(dict.fromkeys(place.also, place.path))

    def get(name: str) -> Tensor:
        tensor = read(name)
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    def within(path: str) -> bool:
        return _under(path, prefix) and not (skip and _under(path, skip))

    missing = []
    for path in [path for path, _ in model.named_parameters(remove_duplicate=False) if within(path)]:
        if _get(model, path).device.type != "meta":
            continue  # filled before, as the other end of a tie, or by a conversion that makes several
        source = owner.get(path, path)
        if not sources[source]:
            missing.append(path)
            continue
        for made, value in _assemble(model, source, sources[source], places, get).items():
            _set(model, made, value)
        for other in places[sources[source][0]].also:
            _set(model, other, _get(model, source))
    if missing:
        raise BadInput(
            f"the checkpoint lacks {len(missing)} tensors that {type(model).__name__} needs (module paths "
            f"{', '.join(missing[:4])}); is it complete, and is config.json its own?"
        )
    for path, module in model.named_modules():
        if within(path):
            computed = []
            for leaf, buffer in list(module.named_buffers(recurse=False)):
                full = f"{path}.{leaf}"
                if buffer.device.type == "meta" and sources[full]:
                    _set(model, full, _assemble(model, full, sources[full], places, get)[full])
                elif buffer.device.type == "meta":
                    computed.append(leaf)
            if computed:
                _compute_buffers(model, path, module, computed, device)


def empty(module: nn.Module) -> None:
    """Put every parameter and buffer of `module` back on the meta device and so free its memory."""
    met: dict[int, Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for leaf, tensor in table.items():
                if tensor is None or tensor.device.type == "meta":
                    continue
                if id(tensor) not in met:
                    bare = torch.empty_like(tensor, device="meta")
                    met[id(tensor)] = nn.Parameter(bare, False) if isinstance(tensor, nn.Parameter) else bare
                table[leaf] = met[id(tensor)]  # type: ignore[assignment]


def _under(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(prefix + ".")


def _get(model: nn.Module, path: str) -> Tensor:
    parent, _, leaf = path.rpartition(".")
    return getattr(model.get_submodule(parent), leaf)


def _set(model: nn.Module, path: str, value: Tensor) -> None:
    parent, _, leaf = path.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._parameters and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    setattr(module, leaf, value)


def _assemble(
    model: PreTrainedModel, path: str, names: list[str], places: Mapping[str, Place], get: Read
) -> dict[str, Tensor]:
    """Path -> value of the parameter `path`, and of its siblings if one conversion makes them all."""
    shape = tuple(_get(model, path).shape)
    if places[names[0]].converted:
        values = convert(model, {name: get(name) for name in names})
    elif places[names[0]].index is None:
        values = {path: get(names[0])}
    else:
        whole, covered = None, 0
        for name in names:
            tensor, index = get(name), places[name].index
            whole = tensor.new_empty(shape) if whole is None else whole
            if whole[index].shape != tensor.shape:
                raise BadInput(f"{name} is {tuple(tensor.shape)}, the model needs {tuple(whole[index].shape)}")
            whole[index] = tensor
            covered += tensor.numel()
        assert whole is not None  # a path has at least one name
        if covered != whole.numel():
            raise BadInput(f"{path} {shape}: some of its tensors are missing; found {', '.join(names[:4])}...")
        values = {path: whole}
    if path not in values or tuple(values[path].shape) != shape:
        found = tuple(values[path].shape) if path in values else "nothing"
        raise BadInput(f"{', '.join(names[:4])}: {path} of the model is {shape}, the checkpoint gives {found}")
    return values


def convert(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Path -> parameter: what transformers' own conversion makes of a converted place's disk tensors."""
    ((path, target),) = _targets(model, tensors).items()
    converter = copy.deepcopy(target.converter)
    assert converter is not None  # the caller's places are converted ones
    for name, pattern in target.sources:
        converter.add_tensor(path, name, pattern, tensors[name])
    made = converter.convert(path, model=model, config=model.config)
    return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


def _compute_buffers(
    model: PreTrainedModel, path: str, module: nn.Module, leaves: list[str], device: torch.device | str
) -> None:
    """Give the buffers `leaves` of `module` the values that the model computes from its config."""
    for leaf in leaves:
        setattr(module, leaf, torch.empty_like(getattr(module, leaf), device=device))
    # transformers leaves alone what bears its mark; a module's initialisation may reach into its children.
    for leaf, tensor in (*module.named_parameters(), *module.named_buffers()):
        tensor._is_hf_initialized = leaf not in leaves  # type: ignore[attr-defined]
    models = [(p, m) for p, m in model.named_modules() if isinstance(m, PreTrainedModel) and _under(path, p)]
    max(models, key=lambda found: len(found[0]))[1]._init_weights(module)
