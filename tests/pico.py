"""Tiny models and tiny "fine-tunes" of them, written to disk as Hugging Face folders; no network.

`pico(name, folder)` writes a random model of one of NAMES; `perturb(src, dst)` writes a fine-tune of it whose
deltas look like real ones (every singular value used, falling as a power law).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCAB, HIDDEN, INNER, LAYERS = 128, 64, 96, 2
IMAGE_TOKEN = 3  # llava's and qwen2_vl's placeholder of a picture

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = {**_TEXT, "num_key_value_heads": 2}


def _llava(**overrides: Any) -> transformers.PreTrainedConfig:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    )
    return transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**{**_GQA, **overrides}),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


def _qwen2_vl(**overrides: Any) -> transformers.PreTrainedConfig:
    text = {
        **_GQA,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": HIDDEN,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return transformers.Qwen2VLConfig(
        text_config={**text, **overrides},
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=False,
    )


def _of(config: type, **fixed: Any) -> Callable[..., transformers.PreTrainedConfig]:
    return lambda **overrides: config(**{**fixed, **overrides})


_MOE: dict[str, Any] = {**_GQA, "num_experts_per_tok": 2}
_CONFIGS: dict[str, Callable[..., transformers.PreTrainedConfig]] = {
    "llama": _of(transformers.LlamaConfig, **_TEXT),
    "llama_gqa": _of(transformers.LlamaConfig, **_GQA),
    "llama_tied": _of(transformers.LlamaConfig, **{**_GQA, "tie_word_embeddings": True}),
    "mistral": _of(transformers.MistralConfig, **_GQA, sliding_window=16),
    "qwen2": _of(transformers.Qwen2Config, **_GQA),
    "qwen3": _of(transformers.Qwen3Config, **_GQA, head_dim=16),
    "gemma3": _of(
        transformers.Gemma3TextConfig,
        **{**_GQA, "tie_word_embeddings": True},
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": _of(transformers.Phi3Config, **_GQA),
    "gpt2": _of(
        transformers.GPT2Config,
        vocab_size=VOCAB,
        n_embd=HIDDEN,
        n_inner=INNER,
        n_layer=LAYERS,
        n_head=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "mixtral": _of(transformers.MixtralConfig, **_MOE, num_local_experts=4),
    "qwen3_moe": _of(transformers.Qwen3MoeConfig, **_MOE, num_experts=4, moe_intermediate_size=32, head_dim=16),
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
}
_VISION = ("llava", "qwen2_vl")
NAMES = tuple(_CONFIGS)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character; 0 <pad>, 1 <s>, 2 </s>, 3 <image>, 4 <unk>."""
    marks = ["<pad>", "<s>", "</s>", "<image>", "<unk>"]
    letters = ["\n", *(chr(c) for c in range(32, 127))]
    words = {word: i for i, word in enumerate(marks + letters)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def pico(
    name: str,
    folder: Path | str,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.bfloat16,
    text: Path | str | None = None,
    **config_overrides: Any,
) -> Path:
    """Write a random model called `name` (one of NAMES), its config and a tokenizer to `folder`.

    Every parameter is random (norms around 1, biases around 0, matrices ~ N(0, 0.08^2), so that logits are
    far from flat). `text` names a folder of pico("llama_gqa"): the language tower of a "llava" is made equal
    to it, bit for bit, and its config fields are taken from it.
    """
    folder = Path(folder)
    overrides = dict(config_overrides)
    if text is not None:
        stored = json.loads((Path(text) / "config.json").read_text())
        overrides = {**{k: stored[k] for k in _GQA if k in stored}, **overrides}
    config = _CONFIGS[name](**overrides)
    auto = transformers.AutoModelForImageTextToText if name in _VISION else transformers.AutoModelForCausalLM
    random = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = auto.from_config(config).eval()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape)
                if parameter.ndim >= 2:
                    parameter.copy_(noise * 0.08)
                elif path.endswith("bias"):
                    parameter.copy_(noise * 0.02)
                else:  # a norm's weight: near the 1 (Gemma: 0) that it starts from
                    parameter.add_(noise * 0.05)
    finally:
        torch.random.set_rng_state(random)
    if text is not None:
        tower = transformers.AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32)
        model.model.language_model.load_state_dict(tower.model.state_dict())
        model.lm_head.load_state_dict(tower.lm_head.state_dict())
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def power_law(
    rows: int, columns: int, generator: torch.Generator, *, exponent: float = 0.7, rank: int | None = None
) -> torch.Tensor:
    """(rows, columns) of norm 1: random orthonormal u_k, v_k, sigma_k ~ k^-exponent, of full rank or `rank`."""
    k = min(rows, columns, rank or rows)
    u = torch.linalg.qr(torch.randn(rows, k, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(columns, k, generator=generator))[0]
    sigma = torch.arange(1, k + 1, dtype=torch.float32) ** -exponent
    return (u * (sigma / sigma.norm())) @ v.T


def _delta(name: str, weight: torch.Tensor, scale: float, rank: int, g: torch.Generator) -> torch.Tensor:
    if weight.ndim < 2:
        return torch.randn(weight.shape, generator=g) * scale * 0.1
    flat = weight.float().reshape(-1, *weight.shape[-2:]) if weight.ndim == 3 else weight.float().flatten(1)[None]
    embedding = any(part in name for part in ("embed_tokens", "wte", "lm_head"))
    deltas = [
        power_law(*m.shape, g, exponent=1.5 if embedding else 0.7, rank=rank if embedding else None)
        * (scale * m.norm())
        for m in flat
    ]
    return torch.stack(deltas).reshape(weight.shape)


def perturb(
    src: Path | str,
    dst: Path | str,
    *,
    rank: int = 8,
    seed: int = 1,
    scale: float = 0.03,
    grow_vocab: int = 0,
    untie: bool = False,
    fp32_names: tuple[str, ...] = (),
    integer_buffer: bool = False,
    shard: bool = False,
) -> Path:
    """Write a "fine-tune" of the folder `src` to `dst`.

    Every matrix gets a full-rank delta with singular values ~ k^-0.7 and Frobenius norm `scale` times its
    own; embeddings and heads one of rank `rank` with ~ k^-1.5; norms and biases small noise. dtypes are kept,
    but for the disk names in `fp32_names`, stored in F32. `grow_vocab` adds rows to embedding and head
    (config updated), `untie` gives a tied model a head of its own, `integer_buffer` adds an int64 tensor,
    `shard` writes two files.
    """
    src, dst = Path(src), Path(dst)
    shutil.copytree(src, dst, ignore=shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json"))
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(src.glob("*.safetensors")):
        tensors.update(load_file(path))
    config = json.loads((dst / "config.json").read_text())
    text = config.get("text_config", config)
    g = torch.Generator().manual_seed(seed)
    tuned = {}
    for name in sorted(tensors):
        old = tensors[name]
        if not old.is_floating_point():
            tuned[name] = old
            continue
        new = old.float() + _delta(name, old, scale, rank, g)
        tuned[name] = new.to(torch.float32 if name in fp32_names else old.dtype).contiguous()

    embedding = next(n for n in tuned if n.endswith(("embed_tokens.weight", "wte.weight")))
    if untie:
        if any(name.endswith("lm_head.weight") for name in tuned):
            raise ValueError(f"{src} has a head of its own already")
        head = tuned[embedding].float()
        tuned["lm_head.weight"] = (head + _delta("lm_head", head, scale, rank, g)).to(tuned[embedding].dtype)
        config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    if grow_vocab:
        for name in [n for n in tuned if n == embedding or n.endswith("lm_head.weight")]:
            rows = torch.randn(grow_vocab, tuned[name].shape[1], generator=g) * 0.08
            tuned[name] = torch.cat([tuned[name], rows.to(tuned[name].dtype)])
        text["vocab_size"] += grow_vocab
        if "vocab_size" in config:
            config["vocab_size"] = text["vocab_size"]
    if integer_buffer:
        tuned["bayou_test.position_ids"] = torch.arange(16, dtype=torch.int64)[None]
    (dst / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    if not shard:
        save_file(tuned, dst / "model.safetensors", metadata={"format": "pt"})
        return dst
    names = sorted(tuned)
    files = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, part in files.items():
        save_file({n: tuned[n] for n in part}, dst / file, metadata={"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in tuned.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": {n: f for f, part in files.items() for n in part},
    }
    (dst / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return dst
