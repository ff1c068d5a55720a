"""A PEFT adapter: adapter_config.json and adapter_model.safetensors, for peft, vLLM, SGLang and LoRAX as they are.

    base_model.model.MODULE.lora_A.weight            A (rank, in)
    base_model.model.MODULE.lora_B.weight            B (out, rank): y = base(x) + alpha / rank * B (A x)
    base_model.model.MODULE.lora_B.bias              what the bias changes by, where biases go along
    base_model.model.MODULE.lora_embedding_A, _B     a table's, transposed: (rank, rows) and (width, rank)
    base_model.model.MODULE.weight                   of a module that goes whole (modules_to_save)

peft scales each matrix by its own alpha over its own rank (alpha_pattern, rank_pattern), vLLM and SGLang all of them
by lora_alpha / r: here all of these are 1. Both files are written by ourselves, so peft need not be installed.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bayou.checkpoint import DTYPES, WORDS, Output, atomic, write_safetensors
from bayou.errors import BadInput
from bayou.integrations.adapter import Adapter, Progress
from bayou.integrations.candidate import Candidate
from bayou.integrations.difference import Change

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be; it refuses an adapter whose r is above it."""

_ROOT = "base_model.model."
_WHOLE_MODEL = ("config.json", "generation_config.json")
"""Files of the fine-tune that an adapter's folder must not hold: they would speak for the base."""


def check(adapter: Adapter) -> None:
    """Raises BadInput for what peft could not load."""
    tables = [change.tensor for change in adapter.loras if _is_table(adapter, change)]
    if adapter.biases and tables:
        raise BadInput(
            f"--exact --embeddings lora: peft takes no changes of biases beside a LoRA of an embedding ({tables[0]}); "
            "choose --embeddings full or leave"
        )


def write(
    adapter: Adapter, folder: Path, base: str, dtype: torch.dtype, candidate: Candidate | None, progress: Progress
) -> None:
    """Write the adapter into an empty `folder`, one matrix in memory at a time; `candidate` is given each part too.

    base: the base's name, for adapter_config.json. The fine-tune's tokenizer goes along, unless it has tokens that the
    base has no rows for and the adapter neither.
    """
    outputs: list[Output] = []
    for module, leaves in adapter.modules.items():
        outputs += [_whole(adapter, f"{module}.{leaf}", tensor, candidate) for leaf, tensor in leaves.items()]
    if adapter.biases:
        outputs += [_bias(adapter, change, candidate) for change in adapter.loras]
    for index, change in enumerate(adapter.loras):
        step = partial(progress, "matrices", index + 1, len(adapter.loras))
        outputs += _lora(adapter, change, dtype, candidate, step)
    outputs.sort(key=lambda output: -DTYPES[output.dtype].itemsize)  # so that every tensor lies on a multiple of it
    with atomic(folder / "adapter_config.json") as handle:
        handle.write((json.dumps(config(adapter, base), indent=2) + "\n").encode())
    write_safetensors(folder / "adapter_model.safetensors", outputs, {"format": "pt"})
    for name in () if adapter.new_rows else adapter.file.files:
        if name not in _WHOLE_MODEL:
            with atomic(folder / name) as handle:
                handle.write(adapter.file.read_file(name, adapter.base.folder))


def _lora(
    adapter: Adapter, change: Change, dtype: torch.dtype, candidate: Candidate | None, done: Callable[[], None]
) -> list[Output]:
    """A and B; both are made when A's turn comes, and B waits for its own."""
    waiting: list[Tensor] = []
    table = _is_table(adapter, change)

    def first() -> list[Tensor]:
        a, b = adapter.lora(change, dtype)
        if candidate is not None:
            candidate.add(change.path, b, a, change.transposed)
        done()
        waiting.append(a.T if table else b)
        return [b.T if table else a]

    (out, width), rank = change.shape, change.rank
    shapes = ((rank, out), (width, rank)) if table else ((rank, width), (out, rank))
    leaves = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")
    names = [f"{_ROOT}{change.module}.{leaf}" for leaf in leaves]
    return [
        Output(names[0], WORDS[dtype], shapes[0], first),
        Output(names[1], WORDS[dtype], shapes[1], lambda: [waiting.pop()]),
    ]


def _bias(adapter: Adapter, change: Change, candidate: Candidate | None) -> Output:
    """What the bias of a LoRA's module changes by, fp32; nothing where it does not change."""

    def make() -> list[Tensor]:
        if change.module not in adapter.biases:
            return [torch.zeros(change.shape[0])]
        value = adapter.bias(adapter.biases[change.module])
        if candidate is not None:
            candidate.add_to(f"{change.module}.bias", value)
        return [value]

    return Output(f"{_ROOT}{change.module}.lora_B.bias", "F32", (change.shape[0],), make)


def _whole(adapter: Adapter, path: str, tensor: str, candidate: Candidate | None) -> Output:
    """A parameter that goes as it is in the fine-tune."""

    def make() -> list[Tensor]:
        value = adapter.restorer.tensor(tensor)
        if candidate is not None:
            candidate.put(path, value)
        return [value]

    return Output(_ROOT + path, *adapter.restorer.spec(tensor), make)


def _is_table(adapter: Adapter, change: Change) -> bool:
    """Whether peft looks the module up, and does not multiply by it."""
    return isinstance(adapter.model.get_submodule(change.module), nn.Embedding)


def config(adapter: Adapter, base: str) -> dict[str, Any]:
    """adapter_config.json: scale 1 for every reader, whether it knows ranks of single modules or not."""
    modules = [change.module for change in adapter.loras]
    most = max(change.rank for change in adapter.loras)
    ranks = _pattern({change.module: change.rank for change in adapter.loras}, most)
    causal = type(adapter.model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": base,
        "revision": adapter.file.base["revision"] or None,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": _targets(adapter, modules),
        "modules_to_save": list(adapter.modules) or None,
        "fan_in_fan_out": any(isinstance(adapter.model.get_submodule(module), Conv1D) for module in modules),
        "lora_bias": bool(adapter.biases),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _targets(adapter: Adapter, modules: list[str]) -> list[str]:
    """The modules' last names, which servers size their buffers by; whole paths where those name others too."""
    leaves = {module.rpartition(".")[2] for module in modules}
    named = {path for path, _ in adapter.model.named_modules() if path.rpartition(".")[2] in leaves}
    return sorted(leaves) if named == set(modules) else modules


def _pattern(ranks: dict[str, int], usual: int) -> dict[str, int]:
    """Module -> rank where it is not the usual one, by last names where all of a name agree."""
    by_leaf = defaultdict(set)
    for module, rank in ranks.items():
        by_leaf[module.rpartition(".")[2]].add(rank)
    found = {}
    for module, rank in ranks.items():
        leaf = module.rpartition(".")[2]
        if rank != usual:
            found[leaf if len(by_leaf[leaf]) == 1 else module] = rank
    return found


def vllm(adapter: Adapter) -> dict[str, Any]:
    """What vLLM needs for the adapter: the --max-lora-rank, None where it takes none; and its objections."""
    most = max(change.rank for change in adapter.loras)
    objections = []
    if most > VLLM_RANKS[-1]:
        objections.append(f"rank {most} is over its limit of {VLLM_RANKS[-1]} (give --rank {VLLM_RANKS[-1]})")
    if adapter.modules:
        objections.append("it refuses modules_to_save (--exact, --embeddings full)")
    if adapter.biases:
        objections.append("it refuses changes of biases (--exact)")
    rank = next((rank for rank in VLLM_RANKS if rank >= most), None)
    return {"max_lora_rank": None if objections else rank, "objections": objections}
