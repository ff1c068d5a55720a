"""Stock vLLM serves whole fine-tunes, packed, in one batch with the base. `make test-vllm` runs it, where vLLM is."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pico
import plugged
import pytest
import torch
from vllm_process import PROMPTS, Server, behind, running

import bayou
from bayou.evaluate import read_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm"),
]

PACKED = {"BAYOU_MODE": "packed"}
TENANTS = ("come", "signs", "ranks")
METHODS = {
    "come": ("deltacome", {"ratio": 3}),
    "signs": ("bitdelta", {}),
    "ranks": ("lowrank", {"ratio": 4}),
}


def files(folder: Path, name: str = "llama_gqa") -> None:
    """A base; three fine-tunes of all its tensors, a method each; a damaged file, one of another base, a grown one."""
    shape = {"hidden_size": 128, "head_dim": 32}  # vLLM's kernels for the CPU know heads of 32 and more
    base = pico.pico(name, folder / "base", dtype=torch.float32, **shape)
    other = pico.pico(name, folder / "other", dtype=torch.float32, seed=1, **shape)
    (folder / "deltas").mkdir()
    made = [(tenant, base, *METHODS[tenant], {}) for tenant in TENANTS]
    made += [("foreign", other, "bitdelta", {}, {}), ("grown", base, "bitdelta", {}, {"grow_vocab": 3})]
    for seed, (tenant, source, method, options, change) in enumerate(made):
        tuned = pico.perturb(source, folder / tenant, scale=0.3, seed=seed, **change)
        out = folder / "deltas" / f"{tenant}.bayou"
        bayou.compress(source, tuned, out, method=method, calibration="none", distill_steps=0, **options)
    shutil.copy(folder / "deltas" / "come.bayou", folder / "outside.bayou")
    damaged = folder / "deltas" / "damaged.bayou"
    shutil.copy(folder / "outside.bayou", damaged)
    plugged.flip(damaged, damaged.stat().st_size // 2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("packed")
    files(folder)
    with running(folder, PACKED, "--max-loras", "3", "--max-cpu-loras", "4") as found:
        yield found


def reference(server: Server, model: str) -> torch.nn.Module:
    """What vLLM should compute, by transformers: the base, or the file, restored in fp32."""
    folder = server.folder / model if model == "base" else server.folder / "restored" / model
    if not folder.exists():
        file = server.folder / "deltas" / f"{model}.bayou"
        bayou.restore(server.folder / "base", file, folder, dtype="float32")
    return read_model(folder)


def test_base_and_three_fine_tunes_in_one_batch_answer_as_the_restored_models(server: Server) -> None:
    models = ("base", *TENANTS)
    answers = server.asked_at_once(models)
    gaps = {}
    for model in models:
        expected = reference(server, model)
        gaps[model] = torch.cat([behind(expected, prompt, answers[model, i]) for i, prompt in enumerate(PROMPTS)])
    every = torch.cat(list(gaps.values()))
    ties = int((every > 0).sum())
    print(f"{len(every) - ties} tokens equal, {ties} of a logit within 1e-3 of the greatest")
    assert {model: float(found.max()) for model, found in gaps.items() if found.max() >= 1e-3} == {}
    assert ties <= 0.01 * len(every)
    for i, one in enumerate(models):
        for another in models[:i]:
            different = sum(answers[one, index] != answers[another, index] for index in range(len(PROMPTS)))
            assert different > 12, f"{one} and {another} answer {len(PROMPTS) - different} prompts alike"
