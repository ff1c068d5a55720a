"""What the tests of the plugin for vLLM share: vLLM's interface or a stand-in of it, files, and how it is asked."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import logging
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pico
import pytest
import torch

import bayou
from bayou.integrations import vllm as plugin
from bayou.integrations.vllm import Settings, Shelf


def stand_in() -> dict[str, types.ModuleType]:
    """vllm.lora.request, vllm.lora.resolver and vllm.platforms, as far as vLLM documents them."""

    @dataclass
    class LoRARequest:
        lora_name: str
        lora_int_id: int
        lora_path: str

    class LoRAResolver(ABC):
        @abstractmethod
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None: ...

    class Registry:
        def __init__(self) -> None:
            self.resolvers: dict[str, LoRAResolver] = {}

        def get_supported_resolvers(self) -> Any:
            return self.resolvers.keys()

        def get_resolver(self, name: str) -> LoRAResolver:
            return self.resolvers[name]

        def register_resolver(self, name: str, resolver: LoRAResolver) -> None:
            self.resolvers[name] = resolver

    class Platform:
        @staticmethod
        def is_cpu() -> bool:
            return False

    names = ("vllm", "vllm.lora", "vllm.lora.request", "vllm.lora.resolver", "vllm.platforms")
    modules = {name: types.ModuleType(name) for name in names}
    modules["vllm.lora.request"].LoRARequest = LoRARequest  # type: ignore[attr-defined]
    modules["vllm.lora.resolver"].LoRAResolver = LoRAResolver  # type: ignore[attr-defined]
    modules["vllm.lora.resolver"].LoRAResolverRegistry = Registry()  # type: ignore[attr-defined]
    modules["vllm.platforms"].current_platform = Platform()  # type: ignore[attr-defined]
    return modules


def interface(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vllm.lora.resolver, with nothing registered: vLLM's own where it is installed, else the stand-in's."""
    if importlib.util.find_spec("vllm") is None:
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    found = importlib.import_module("vllm.lora.resolver")
    monkeypatch.setattr(found.LoRAResolverRegistry, "resolvers", {})
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # else caplog hears nothing
    return found


def make(folder: Path) -> Path:
    """base, tuned, and deltas/: sql.bayou, signs.bayou (which has no rank of its own)."""
    base = pico.pico("llama_gqa", folder / "base", dtype=torch.float32)
    pico.perturb(base, folder / "tuned", scale=0.3)
    (folder / "deltas").mkdir()
    for name, method, options in (("sql", "lowrank", {"ratio": 3}), ("signs", "bitdelta", {})):
        out = folder / "deltas" / f"{name}.bayou"
        bayou.compress(base, folder / "tuned", out, method=method, calibration="none", distill_steps=0, **options)
    return folder


def copied(folder: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """A shelf of copies of the folder's files, so that a test may spoil them; with a cache of its own."""
    (to / "deltas").mkdir()
    for path in (folder / "deltas").iterdir():
        (to / "deltas" / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv("BAYOU_CACHE", str(to / "cache"))
    return Shelf(Settings(to / "deltas", 16, None))


def flip(path: Path, at: int) -> None:
    """Another bit in the byte at `at`."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def ask(shelf: Shelf, base: Path, *names: str) -> list[Any]:
    """What vLLM is told of these names, asked for all at once."""
    resolver = plugin.resolver(shelf.settings)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(resolver.resolve_lora(str(base), name) for name in names))

    return asyncio.run(all_of_them())
