"""A GGUF LoRA, for llama.cpp's `--lora`: its names, its metadata, its order of rows.

    blk.N.attn_q.weight.lora_a     A (rank, in)
    blk.N.attn_q.weight.lora_b     B (out, rank): y = base(x) + alpha / rank * B (A x)

llama.cpp has one alpha for all tensors and divides it by each tensor's own rank; what is left of that is in B. A model
of the llama family has the rows of q and k in another order there: those of a head's two rotary halves take turns, and
so do B's. llama.cpp takes no norms or biases from an adapter.
"""

import contextlib
from math import prod
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from bayou.checkpoint import WORDS
from bayou.errors import BadInput, Unsupported
from bayou.integrations.adapter import Adapter, Progress
from bayou.integrations.candidate import Candidate
from bayou.integrations.difference import Change

ARCHITECTURES = {
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "gpt2": "GPT2",
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "phi3": "PHI3",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
}
"""transformers' model_type -> gguf's MODEL_ARCH, for those whose matrices llama.cpp has one for one."""

_ROTARY_HALVES_TAKE_TURNS = ("LLAMA",)
_TABLE = "token_embd.weight"


def check(adapter: Adapter, embeddings: str, exact: bool) -> None:
    """Raises BadInput or Unsupported, before any work, for what llama.cpp could not load."""
    _library()
    if exact or embeddings == "full":
        raise BadInput("llama.cpp takes nothing but LoRAs from an adapter: leave --exact and --embeddings full out")
    kind = adapter.base.config.get("model_type")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise Unsupported(
            f"gguf-lora: a model of type {kind!r} is not laid out as here in llama.cpp; known are {known}"
        )
    if embeddings == "lora" and adapter.model.all_tied_weights_keys:
        raise Unsupported("llama.cpp has one tensor for a table and the head tied to it: leave --embeddings lora out")
    names(adapter)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise BadInput("--to gguf-lora needs the gguf package: pip install 'bayou[gguf]'") from None
    return gguf


def names(adapter: Adapter) -> dict[str, str]:
    """Module of each LoRA -> llama.cpp's name of its tensor. Raises Unsupported where there is none."""
    gguf = _library()
    layers = adapter.model.config.get_text_config().num_hidden_layers
    known = gguf.get_tensor_name_map(_architecture(adapter), layers)
    found = {change.module: known.get_name(change.module) for change in adapter.loras}
    for module, name in found.items():
        if name is None:
            raise Unsupported(f"gguf-lora: gguf has no name for {module}")
    return {module: f"{name}.weight" for module, name in found.items()}


def _architecture(adapter: Adapter) -> Any:
    return _library().MODEL_ARCH[ARCHITECTURES[adapter.base.config["model_type"]]]


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows in the order in which llama.cpp's rotary pairs lie: of each head 0, half, 1, half + 1, ..."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def write(
    adapter: Adapter, path: str | Path, dtype: torch.dtype, candidate: Candidate | None, progress: Progress
) -> None:
    """Write the file, one matrix in memory at a time; `candidate` is given each of them too."""
    gguf = _library()
    alpha = max(change.rank for change in adapter.loras)
    kind = gguf.GGMLQuantizationType[WORDS[dtype]]
    place = names(adapter)
    with contextlib.closing(gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[_architecture(adapter)])) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        writer.add_string("bayou.file.root", adapter.file.root)
        writer.add_string("bayou.base.root", adapter.file.base["root"])
        for change in adapter.loras:
            name = place[change.module]
            for end, shape in zip(("lora_a", "lora_b"), _shapes(name, change), strict=True):
                # float32 only says that the shape counts elements, not bytes.
                nbytes = prod(shape) * dtype.itemsize
                writer.add_tensor_info(f"{name}.{end}", shape, numpy.float32, nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, change in enumerate(adapter.loras):
            scale = change.rank / alpha
            a, b = adapter.lora(change, dtype, scale)
            if candidate is not None:
                candidate.add(change.path, b.float() / scale, a, change.transposed)
            for part in _laid_out(adapter, place[change.module], change, a, b):
                writer.write_tensor_data(part.contiguous().view(torch.uint8).numpy())
            progress("matrices", done + 1, len(adapter.loras))


def _shapes(name: str, change: Change) -> tuple[tuple[int, int], tuple[int, int]]:
    (out, width), rank = change.shape, change.rank
    return ((out, rank), (width, rank)) if name == _TABLE else ((rank, width), (out, rank))


def _laid_out(adapter: Adapter, name: str, change: Change, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B as llama.cpp has them; a table's, which it looks up in A, are the other way round."""
    if name == _TABLE:
        return b, a.T
    config = adapter.model.config.get_text_config()
    leaf = change.module.rpartition(".")[2]
    if ARCHITECTURES[adapter.base.config["model_type"]] in _ROTARY_HALVES_TAKE_TURNS and leaf in ("q_proj", "k_proj"):
        b = interleaved(b, config.num_attention_heads if leaf == "q_proj" else config.num_key_value_heads)
    return a, b
