"""Write a random base and fine-tune of Llama-3.2-1B's shapes, sharded, to measure memory on.

python bench/llama_1b_pair.py OUT
/usr/bin/time -v bayou compress OUT/base OUT/tuned -o x.bayou --method bitdelta --distill-steps 0 --ratio 14
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
SHARDS = 3


def shapes() -> dict[str, tuple[int, ...]]:
    """Disk name -> shape of every tensor."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128256, 2048), "model.norm.weight": (2048,)}
    for i in range(16):
        layer = f"model.layers.{i}."
        for part, shape in (("q", (2048, 2048)), ("k", (512, 2048)), ("v", (512, 2048)), ("o", (2048, 2048))):
            found[f"{layer}self_attn.{part}_proj.weight"] = shape
        for part, shape in (("gate", (8192, 2048)), ("up", (8192, 2048)), ("down", (2048, 8192))):
            found[f"{layer}mlp.{part}_proj.weight"] = shape
        found[f"{layer}input_layernorm.weight"] = found[f"{layer}post_attention_layernorm.weight"] = (2048,)
    return found


def main(out: Path) -> None:
    torch.manual_seed(0)
    names = list(shapes().items())
    shard_of = {name: min(SHARDS - 1, i * SHARDS // len(names)) for i, (name, _) in enumerate(names)}
    file_of = [f"model-{s + 1:05d}-of-{SHARDS:05d}.safetensors" for s in range(SHARDS)]
    for which in ("base", "tuned"):
        (out / which).mkdir(parents=True, exist_ok=True)
        (out / which / "config.json").write_text(json.dumps(CONFIG))
        index = {"metadata": {}, "weight_map": {name: file_of[s] for name, s in shard_of.items()}}
        (out / which / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard in range(SHARDS):
        base, tuned = {}, {}
        for name, shape in names:
            if shard_of[name] == shard:
                base[name] = (torch.randn(shape) * 0.02).bfloat16()
                tuned[name] = (base[name].float() + torch.randn(shape) * 0.0005).bfloat16()
        save_file(base, out / "base" / file_of[shard], metadata={"format": "pt"})
        save_file(tuned, out / "tuned" / file_of[shard], metadata={"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
