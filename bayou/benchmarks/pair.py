"""A base and a fine-tune of a known model's shape, random, made tensor by tensor in memory: nothing is downloaded.

The base is normal with the deviation of trained weights. The delta of each matrix has singular values that fall as
k^-0.7, as full fine-tuning leaves them, over a floor of noise, and 3 % of the base's norm.
"""

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from bayou.checkpoint import Checkpoint, Entry, as_bytes

DEVIATION, STRENGTH, RANK, EXPONENT, FLOOR = 0.02, 0.03, 256, 0.7, 0.5
"""Of the base's numbers; of the delta relative to it; of the delta's low-rank part, which leaves FLOOR to noise."""


@dataclass(frozen=True)
class Shape:
    """A Llama: sizes as in its config. layers: of the whole model. keys: heads of keys, as many as `heads` for 0."""

    hidden: int
    inner: int
    heads: int
    vocabulary: int
    layers: int
    keys: int = 0
    tied: bool = False

    @property
    def tables(self) -> int:
        """Numbers of the embedding, and of the head where it is another matrix."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a layer's matrices, by the end of their names."""
        few = self.hidden * (self.keys or self.heads) // self.heads
        square = {
            f"self_attn.{leaf}_proj.weight": (few if leaf in "kv" else self.hidden, self.hidden) for leaf in "qkvo"
        }
        wide = {f"mlp.{leaf}_proj.weight": (self.inner, self.hidden) for leaf in ("gate", "up")}
        return square | wide | {"mlp.down_proj.weight": (self.hidden, self.inner)}

    def tensors(self, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Disk name and shape of every tensor of a model of so many layers."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(layers):
            for name, shape in self.linears().items():
                yield f"model.layers.{layer}.{name}", shape
            for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
                yield f"model.layers.{layer}.{name}", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self, layers: int) -> dict[str, object]:
        """config.json of such a model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.keys or self.heads,
            "num_hidden_layers": layers,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    "llama-2-7b": Shape(4096, 11008, 32, 32000, 32),
    "llama-3.2-1b": Shape(2048, 8192, 32, 128256, 16, keys=8, tied=True),
    "tiny": Shape(64, 176, 4, 512, 4),
}


class MemoryCheckpoint(Checkpoint):
    """A checkpoint whose tensors are in memory; its folder holds config.json alone."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        self.folder = folder
        self._files = {}
        self._tensors = tensors
        self._entries, at = {}, 0
        for name, tensor in tensors.items():
            self._entries[name] = ("", Entry("BF16", tuple(tensor.shape), at, at + tensor.nbytes))
            at += tensor.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop, without a copy."""
        return self._tensors[name][start:stop]

    def fingerprint(self, name: str) -> bytes:
        """sha256 as of a tensor on disk."""
        tensor = self._tensors[name]
        digest = sha256(json.dumps([name, "BF16", list(tensor.shape)]).encode() + b"\n")
        digest.update(as_bytes(tensor))
        return digest.digest()

    def fingerprints(self, names: Iterable[str], *, rehash: bool = False) -> dict[str, bytes]:
        """Computed by threads, as those of a folder are, and never cached."""
        wanted = list(names)
        with ThreadPoolExecutor(16) as pool:
            return dict(zip(wanted, pool.map(self.fingerprint, wanted), strict=True))


def pair(shape: Shape, layers: int, folder: Path, device: str) -> tuple[MemoryCheckpoint, MemoryCheckpoint]:
    """Base and fine-tune in bf16 on the CPU, made on `device`; their config.json goes to two folders in `folder`."""
    generator = torch.Generator(device).manual_seed(0)
    old: dict[str, Tensor] = {}
    new: dict[str, Tensor] = {}
    for name, size in shape.tensors(layers):
        if len(size) == 1:
            old[name] = new[name] = torch.ones(size, dtype=torch.bfloat16)
            continue
        weight = torch.randn(size, generator=generator, device=device).mul_(DEVIATION).bfloat16()
        tuned = (weight.float() + _delta((size[0], size[1]), generator)).bfloat16()
        old[name], new[name] = weight.cpu(), tuned.cpu()
    folders = [folder / "base", folder / "tuned"]
    for path in folders:
        path.mkdir()
        (path / "config.json").write_text(json.dumps(shape.config(layers)))
    return MemoryCheckpoint(folders[0], old), MemoryCheckpoint(folders[1], new)


def _delta(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    rank = min(RANK, *size)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    scales = torch.arange(1, rank + 1, device=generator.device).pow(-EXPONENT)
    low = (normal(size[0], rank) * scales) @ normal(rank, size[1])
    low *= (1 - FLOOR**2) ** 0.5 / low.square().mean().sqrt()
    return (low + FLOOR * normal(*size)) * (STRENGTH * DEVIATION)
