"""A stand-in of vLLM's inside: a Llama with its fused layers, rows of several prompts in a step, its configuration.

Only what worker.py, places.py and rows.py use is here, as vLLM 0.32 has it; test_vllm_packed.py runs the real one.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pico
import plugged
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import bayou
from bayou.checkpoint import Checkpoint
from bayou.evaluate import read_model
from bayou.integrations.vllm.worker import Manager


class LinearBase(nn.Module):
    """A linear layer of one projection or several, that returns (output, bias it has not added)."""

    skip_bias_add = False

    def __init__(self, parts: Sequence[Tensor], bias: Tensor | None = None) -> None:
        super().__init__()
        self.output_sizes = [len(part) for part in parts]
        self.output_size, self.input_size = sum(self.output_sizes), parts[0].shape[1]
        self.weight = nn.Parameter(torch.cat(list(parts)), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return functional.linear(x, self.weight, self.bias), None


class VocabParallelEmbedding(nn.Module):
    """A table whose rows are filled up to a multiple of 64."""

    tp_size = 1

    def __init__(self, rows: Tensor | nn.Parameter) -> None:
        super().__init__()
        self.org_vocab_size = len(rows)
        filled = functional.pad(rows, (0, 0, 0, -len(rows) % 64))
        self.weight = rows if isinstance(rows, nn.Parameter) else nn.Parameter(filled, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.weight)


class ParallelLMHead(VocabParallelEmbedding):
    """Its weight is used, it is never called."""

    def forward(self, ids: Tensor) -> Tensor:
        raise RuntimeError("a head is never called")


class RMSNorm(nn.Module):
    """Adds the residual first, and changes its arguments in place, as vLLM's kernel does."""

    variance_size_override = None

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(weight, requires_grad=False), eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return self._of(x)
        residual += x
        x.copy_(self._of(residual))
        return x, residual

    def _of(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight


class OtherNorm(RMSNorm):
    """A class whose formula Bayou does not know."""


class LogitsProcessor(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def _apply_head(self, head: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, head.weight, bias)

    def forward(self, head: Any, x: Tensor) -> Tensor:
        return self._apply_head(head, x, None)[:, : self.vocabulary]


def _rotated(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """x (rows, heads, d)."""
    half = x.shape[-1] // 2
    angle = positions[:, None].float() * theta ** (-torch.arange(half, device=x.device).float() / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    def __init__(self, config: Any, read: Any, norm: type[RMSNorm]) -> None:
        super().__init__()
        self.config = config
        bias = [read(f"self_attn.{p}_proj.bias") for p in "qkv"] if config.model_type == "qwen2" else None
        self.self_attn = nn.Module()
        self.self_attn.qkv_proj = LinearBase(
            [read(f"self_attn.{p}_proj.weight") for p in "qkv"], None if bias is None else torch.cat(bias)
        )
        self.self_attn.o_proj = LinearBase([read("self_attn.o_proj.weight")])
        self.mlp = nn.Module()
        self.mlp.gate_up_proj = LinearBase([read("mlp.gate_proj.weight"), read("mlp.up_proj.weight")])
        self.mlp.down_proj = LinearBase([read("mlp.down_proj.weight")])
        self.input_layernorm = norm(read("input_layernorm.weight"), config.rms_norm_eps)
        self.post_attention_layernorm = norm(read("post_attention_layernorm.weight"), config.rms_norm_eps)

    def forward(self, positions: Tensor, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        config = self.config
        if residual is None:
            residual, x = x.clone(), self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        d = config.hidden_size // config.num_attention_heads
        sizes = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        fused, _ = self.self_attn.qkv_proj(x)
        q, k, v = (part.unflatten(-1, (-1, d)) for part in fused.split([n * d for n in sizes], -1))
        theta = config.rope_parameters["rope_theta"]
        q, k = _rotated(q, positions, theta), _rotated(k, positions, theta)
        k, v = (part.repeat_interleave(sizes[0] // sizes[1], 1) for part in (k, v))
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(positions)]
        pieces = []
        for start, stop in zip(starts, starts[1:], strict=False):
            one = (part[start:stop].transpose(0, 1) for part in (q, k, v))
            pieces.append(functional.scaled_dot_product_attention(*one, is_causal=True).transpose(0, 1).flatten(1))
        x, _ = self.self_attn.o_proj(torch.cat(pieces))
        x, residual = self.post_attention_layernorm(x, residual)
        gate, up = self.mlp.gate_up_proj(x)[0].chunk(2, -1)
        return self.mlp.down_proj(functional.silu(gate) * up)[0], residual


class Llama(nn.Module):
    """vLLM's Llama (and Qwen2) of a folder, in fp32."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def __init__(self, folder: Path, norm: type[RMSNorm] = RMSNorm) -> None:
        super().__init__()
        config, base = transformers.AutoConfig.from_pretrained(folder), Checkpoint(folder)
        self.model, self.config = nn.Module(), config
        self.model.embed_tokens = VocabParallelEmbedding(base.read("model.embed_tokens.weight").float())
        self.model.layers = nn.ModuleList(
            Block(config, lambda name, i=i: base.read(f"model.layers.{i}.{name}").float(), norm)
            for i in range(config.num_hidden_layers)
        )
        self.model.norm = norm(base.read("model.norm.weight").float(), config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = ParallelLMHead(
            self.model.embed_tokens.weight if tied else base.read("lm_head.weight").float(),
        )
        self.lm_head.org_vocab_size = config.vocab_size
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        x, residual = self.model.embed_tokens(input_ids), None
        for layer in self.model.layers:
            x, residual = layer(positions, x, residual)
        return self.model.norm(x, residual)[0]

    def compute_logits(self, x: Tensor) -> Tensor:
        return self.logits_processor(self.lm_head, x)


@dataclass(frozen=True)
class Request:
    """vLLM's LoRARequest."""

    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool = False


@dataclass(frozen=True)
class Mapping:
    """vLLM's LoRAMapping."""

    index_mapping: tuple[int, ...]
    prompt_mapping: tuple[int, ...]


@dataclass
class Config:
    """vLLM's configuration."""

    base: Path
    max_loras: int = 2
    max_cpu_loras: int = 3
    speculative_config: Any = None
    parallel: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def lora_config(self) -> Any:
        return SimpleNamespace(max_loras=self.max_loras, max_cpu_loras=self.max_cpu_loras)

    @property
    def parallel_config(self) -> Any:
        kinds = ("tensor", "pipeline", "decode_context", "prefill_context")
        usual: dict[str, Any] = {f"{kind}_parallel_size": 1 for kind in kinds}
        usual |= {"use_ubatching": False, "enable_batch_sharded_sampling": False}
        return SimpleNamespace(**usual | self.parallel)

    @property
    def model_config(self) -> Any:
        usual = {"runner_type": "generate", "enforce_eager": True, "dtype": torch.float32}
        usual |= {"is_multimodal_model": False, "enable_prompt_embeds": False}
        return SimpleNamespace(model=str(self.base), revision=None, **usual | self.model)


def tenants(folder: Path, count: int) -> None:
    """base, and t0, t1, ...: fine-tunes of all of it, as files, and restored."""
    base = pico.pico("llama_gqa", folder / "base", dtype=torch.float32)
    for seed in range(count):
        tuned, file = pico.perturb(base, folder / f"t{seed}", scale=0.3, seed=seed), folder / f"t{seed}.bayou"
        bayou.compress(base, tuned, file, method="bitdelta", calibration="none", distill_steps=0)
        bayou.restore(base, file, folder / "restored" / f"t{seed}", dtype="float32")


def put(monkeypatch: pytest.MonkeyPatch, cache: Path | None = None, version: str = "0.32.1") -> Any:
    """Have `import vllm` find this; returns the module in which vLLM looks up its manager."""
    if cache is not None:
        monkeypatch.setenv("BAYOU_CACHE", str(cache))
        for name in ("BAYOU_DELTAS", "BAYOU_MODE", "BAYOU_DELTA_MEMORY"):
            monkeypatch.delenv(name, raising=False)
    modules: dict[str, Any] = plugged.stand_in()
    names = [
        "vllm",
        "vllm.config",
        "vllm.forward_context",
        "vllm.v1",
        "vllm.v1.worker",
        "vllm.model_executor",
        "vllm.distributed",
    ]
    names += ["vllm.v1.worker.lora_model_runner_mixin", "vllm.model_executor.layers"]
    names += ["vllm.model_executor.layers.linear", "vllm.model_executor.layers.vocab_parallel_embedding"]
    modules |= {name: types.ModuleType(name) for name in names}
    modules["vllm"].__version__ = version
    modules["vllm.distributed"].tensor_model_parallel_all_gather = None
    modules["vllm.config"].set_current_vllm_config = lambda config: contextlib.nullcontext()
    modules["vllm.forward_context"].set_forward_context = lambda *_, **__: contextlib.nullcontext()
    modules["vllm.v1.worker.lora_model_runner_mixin"].LRUCacheWorkerLoRAManager = object
    modules["vllm.model_executor.layers.linear"].LinearBase = LinearBase
    modules["vllm.model_executor.layers.vocab_parallel_embedding"].VocabParallelEmbedding = VocabParallelEmbedding
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # else caplog hears nothing
    return modules["vllm.v1.worker.lora_model_runner_mixin"]


PROMPTS = [torch.randint(5, 128, (n,), generator=torch.Generator().manual_seed(n)) for n in (7, 3, 12, 5, 1, 9, 4)]


class Served:
    """vLLM's worker: a model, and what the runner does with it in a step."""

    def __init__(
        self, base: Path, kind: type[Llama] = Llama, norm: type[RMSNorm] = RMSNorm, device: str = "cpu", **config: Any
    ) -> None:
        found, self.device = Config(base, **config), torch.device(device)
        self.manager = Manager(found, self.device, {})
        self.model = self.manager.create_lora_manager(kind(base, norm).to(self.device), found)

    def step(self, rows: list[tuple[Request | None, torch.Tensor]], padding: int = 0) -> list[torch.Tensor]:
        """Scores of the token after each prompt, and then of every token of each prompt, as vLLM asks for both."""
        numbers = [0 if request is None else request.lora_int_id for request, _ in rows]
        lengths = [len(prompt) for _, prompt in rows]
        tokens = tuple(n for n, length in zip(numbers, lengths, strict=True) for _ in range(length))
        self.manager.set_active_adapters({r for r, _ in rows if r}, Mapping(tokens, tuple(numbers)))
        nobody = torch.zeros(padding, dtype=torch.long)
        ids = torch.cat([*(prompt for _, prompt in rows), nobody])
        positions = torch.cat([*(torch.arange(length) for length in lengths), nobody])
        with torch.no_grad():
            hidden = self.model(input_ids=ids.to(self.device), positions=positions.to(self.device))
            ends = torch.tensor(lengths, device=self.device).cumsum(0)
            last = self.model.compute_logits(hidden[ends - 1])
            whole = [
                self.model.compute_logits(hidden[end - n : end]) for end, n in zip(ends.tolist(), lengths, strict=True)
            ]
        for one, each in zip(last, whole, strict=True):
            assert torch.allclose(one, each[-1], atol=1e-5 if self.device.type == "cpu" else 5e-3)
        return [scores.cpu() for scores in whole]


def request(folder: Path, name: str, number: int) -> Request:
    return Request(name, number, str(folder / f"{name}.bayou"))


def expected(folder: Path, name: str | None, prompt: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return read_model(folder / "base" if name is None else folder / "restored" / name)(prompt[None]).logits[0]


def right(folder: Path, names: list[str | None], found: list[torch.Tensor], atol: float = 2e-4) -> None:
    for i, (name, scores) in enumerate(zip(names, found, strict=True)):
        wanted = expected(folder, name, PROMPTS[i])
        assert torch.allclose(scores, wanted, atol=atol), (i, name, float((scores - wanted).abs().max()))
