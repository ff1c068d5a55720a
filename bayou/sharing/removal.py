"""Blocks that are dropped whole: an identity is no layer, so the model is stored, and exported, without them.

The layers that follow are renumbered, and config.json is told: the number of layers, and the lists that have one
element a layer (the kinds of layer, in models that alternate them). A config that leaves such a list out has it made
from a period, by the layers' numbers, which are others now: so the list is written.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from bayou.errors import BadInput
from bayou.sharing.original import Original
from bayou.sidecar import LAYER_COUNTS

PER_LAYER = ("layer_types", "no_rope_layers", "attention_layers", "mlp_layer_types")


def removed_blocks(original: Original, dropped: Collection[str]) -> list[int]:
    """The blocks of which every sub-layer is dropped. Raises BadInput for a name that is no sub-layer."""
    by_name = {sub.name: sub for sub in original.sublayers.values()}
    for name in dropped:
        if name not in by_name:
            raise BadInput(f"{name!r} is no sub-layer of {original.folder}; there are e.g. {', '.join([*by_name][:2])}")
    if len(set(dropped)) != len(dropped):
        raise BadInput("a sub-layer is dropped twice")
    left = {sub.block for sub in by_name.values() if sub.name not in dropped}
    gone = sorted({by_name[name].block for name in dropped} - left)
    if len(gone) == len(original.layers):
        raise BadInput("all layers are dropped; one must stay")
    return gone


def block_of(original: Original, name: str) -> int | None:
    """The decoder layer that a disk tensor belongs to, if any."""
    place = original.places.get(name)
    if place is None or not place.path.startswith(original.layers_path + "."):
        return None
    return int(place.path[len(original.layers_path) + 1 :].split(".")[0])


def renamed(original: Original, name: str, gone: list[int]) -> str:
    """The disk name once the blocks `gone` are not counted."""
    block = block_of(original, name)
    if block is None or not gone:
        return name
    before, after = _around(name, block)
    return f"{before}.{block - sum(b < block for b in gone)}.{after}"


def _around(name: str, block: int) -> tuple[str, str]:
    """What stands before and after the layer's number in a name."""
    parts = name.split(".")
    at = parts.index(str(block))
    return ".".join(parts[:at]), ".".join(parts[at + 1 :])


def without(original: Original, files: Mapping[str, bytes], gone: list[int]) -> dict[str, bytes]:
    """The model's small files, config.json without the blocks `gone`."""
    if not gone:
        return dict(files)
    config: dict[str, Any] = json.loads(files["config.json"])
    layers = len(original.layers)
    text = config.get("text_config")
    inner: dict[str, Any] = text if isinstance(text, dict) else config
    effective = original.model.config.get_text_config()
    for key in PER_LAYER:
        value: Any = getattr(effective, key, None)
        if key not in inner and _a_layer(value, layers) and any(item != value[0] for item in value):
            inner[key] = value
    for part in (config,) if inner is config else (config, inner):
        for key, value in part.items():
            if key in PER_LAYER and _a_layer(value, layers):
                part[key] = [item for i, item in enumerate(value) if i not in gone]
            elif key in LAYER_COUNTS and value == layers:
                part[key] = layers - len(gone)
    return dict(files) | {"config.json": (json.dumps(config, indent=2) + "\n").encode()}


def _a_layer(value: Any, layers: int) -> bool:
    return isinstance(value, list) and len(value) == layers
