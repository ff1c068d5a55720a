"""Stock vLLM serves whole fine-tunes, packed, in one batch with the base. `make test-vllm` runs it, where vLLM is."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pico
import plugged
import pytest
import torch
from vllm_process import NEW, PROMPTS, Server, behind, command, environment, running

import bayou
from bayou.evaluate import read_model
from bayou.integrations.vllm.worker import Manager

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


def files(folder: Path, name: str = "llama_gqa", **shape: int) -> None:
    """A base; three fine-tunes of all its tensors, a method each; a damaged file, one of another base, a grown one."""
    shape |= {"hidden_size": 128, "head_dim": 32}  # vLLM's kernels for the CPU know heads of 32 and more
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
    static = ("--lora-modules", f"static={folder / 'outside.bayou'}")
    with running(folder, PACKED, "--max-loras", "3", "--max-cpu-loras", "4", *static) as found:
        yield found


def test_vllm_is_as_it_was_when_this_was_written() -> None:
    """All of vLLM's inside that the worker relies on; a test that fails here names what a new version has changed."""
    import vllm
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.model_executor.layers import layernorm, linear, logits_processor, vocab_parallel_embedding
    from vllm.v1.worker import lora_model_runner_mixin as mixin

    assert vllm.__version__.startswith("0.32.")
    assert mixin.LRUCacheWorkerLoRAManager is LRUCacheWorkerLoRAManager
    asked = set()
    for source in (Path(vllm.__file__).parent / "v1" / "worker").rglob("*.py"):
        asked |= set(re.findall(r"\blora_manager\.(\w+)", source.read_text()))
    assert asked >= {"set_active_adapters", "add_adapter", "create_lora_manager", "add_dummy_lora"}
    assert {name for name in asked if not hasattr(Manager, name)} == set()
    for name in asked:
        theirs, ours = (inspect.signature(getattr(each, name)) for each in (LRUCacheWorkerLoRAManager, Manager))
        assert len(theirs.parameters) == len(ours.parameters), name
    assert {"index_mapping", "prompt_mapping"} <= set(inspect.signature(LoRAMapping).parameters)
    head = inspect.signature(logits_processor.LogitsProcessor._apply_head)
    assert list(head.parameters) == ["self", "lm_head", "hidden_states", "embedding_bias"]
    for name in ("_get_logits", "get_top_tokens", "get_top_k_tokens"):
        assert "_apply_head(" in inspect.getsource(getattr(logits_processor.LogitsProcessor, name))
    assert issubclass(vocab_parallel_embedding.ParallelLMHead, vocab_parallel_embedding.VocabParallelEmbedding)
    assert issubclass(linear.QKVParallelLinear, linear.LinearBase)
    assert {"variance_epsilon", "variance_size_override"} <= set(layernorm.RMSNorm.__init__.__code__.co_names)


def reference(server: Server, model: str) -> torch.nn.Module:
    """What vLLM should compute, by transformers: the base, or the file, restored in fp32."""
    folder = server.folder / model if model == "base" else server.folder / "restored" / model
    if not folder.exists():
        file = server.folder / "deltas" / f"{model}.bayou"
        bayou.restore(server.folder / "base", file, folder, dtype="float32")
    return read_model(folder)


def answer_as_the_restored_models(server: Server) -> None:
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


def test_base_and_three_fine_tunes_in_one_batch_answer_as_the_restored_models(server: Server) -> None:
    answer_as_the_restored_models(server)


@pytest.mark.parametrize("kind", ["mistral", "qwen3", "phi3"])
def test_other_models(tmp_path: Path, kind: str) -> None:
    files(tmp_path, kind)
    with running(tmp_path, PACKED, "--max-loras", "3") as server:
        answer_as_the_restored_models(server)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two processes that share the layers need two cores")
@pytest.mark.parametrize(("kind", "shape"), [("llama_tied", {"num_key_value_heads": 1}), ("qwen2", {})])
def test_two_processes_with_half_of_each_layer(tmp_path: Path, kind: str, shape: dict[str, int]) -> None:
    files(tmp_path, kind, **shape)
    mine = PACKED | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with running(tmp_path, mine, "--max-loras", "3", "--tensor-parallel-size", "2") as server:
        answer_as_the_restored_models(server)


def test_more_deltas_than_slots_and_than_memory(server: Server) -> None:
    answers = server.asked_at_once(("base", *TENANTS))
    for i in range(3):
        shutil.copy(server.folder / "deltas" / f"{TENANTS[i]}.bayou", server.folder / "deltas" / f"again{i}.bayou")
    six = [*TENANTS, "again0", "again1", "again2"]  # three slots, four in memory
    found = server.asked_at_once(("base", *six))
    for model, same in zip(("base", *six), ("base", *TENANTS, *TENANTS), strict=True):
        assert [found[model, i] for i in range(len(PROMPTS))] == [answers[same, i] for i in range(len(PROMPTS))], model


def test_the_log_says_what_is_served(server: Server) -> None:
    server.complete("come", PROMPTS[0])
    (line,) = server.lines("packed deltas in 3 slots")
    assert "behind 15 modules" in line and "one after another" in line
    (line,) = server.lines("bayou: come: all of")
    root = line.partition("of the file ")[2][:12]
    assert f"all of the file {root} is served, norms, embeddings and head too" in line
    assert server.lines(f"(file {root})") and server.lines("bayou: static: ")


def test_the_scores_of_a_prompt_are_the_tenant_s_own(server: Server) -> None:
    """vLLM takes them of other rows than those of the tokens that follow; here while other tenants are in the step."""
    for model in ("come", "base", "signs"):
        wanted = {"max_tokens": 1, "prompt_logprobs": 128}
        busy = [(other, i) for i in range(3) for other in ("ranks", "signs", "base")]
        with ThreadPoolExecutor(len(busy) + 1) as clients:
            others = [clients.submit(server.complete, other, PROMPTS[i + 3]) for other, i in busy]
            found = clients.submit(server.complete, model, PROMPTS[2], **wanted).result()["prompt_logprobs"]
            assert all(len(other.result()["token_ids"]) == NEW for other in others)
        ours = torch.tensor([[place[str(i)]["logprob"] for i in range(128)] for place in found[1:]])
        with torch.no_grad():
            logits = reference(server, model)(input_ids=torch.tensor([PROMPTS[2]])).logits[0, :-1]
        assert float((ours - logits.log_softmax(1)).abs().max()) < 1e-3, model


def test_what_is_refused_is_said_and_nobody_else_notices(server: Server) -> None:
    before = server.complete("signs", PROMPTS[3])["token_ids"]
    for name in ("damaged", "foreign", "nothing", "../outside", str(server.folder / "outside"), "..%2foutside"):
        status, answer = server.post("/v1/completions", model=name, prompt=PROMPTS[3], max_tokens=1)
        assert status == 404 and answer["error"]["type"] == "NotFoundError", (name, answer)
        assert server.complete("signs", PROMPTS[3])["token_ids"] == before
    status, answer = server.post("/v1/completions", model="grown", prompt=PROMPTS[3], max_tokens=1)
    assert status == 400 and "was found but could not be loaded" in answer["error"]["message"]
    assert server.lines("Failed to load LoRA 'grown'")
    for word, said in (
        ("bayou: damaged is refused", "is damaged"),
        ("bayou: foreign is refused", "was made against"),
        ("Failed to load LoRA 'grown'", "has another number of rows than the base's"),
    ):
        assert said in server.lines(word)[0], server.lines(word)
    body = {"lora_name": "new", "lora_path": str(server.folder / "deltas" / "foreign.bayou")}
    status, answer = server.post("/v1/load_lora_adapter", **body)
    assert status == 500 and "pass the base it was made against" in answer["error"]["message"]
    status, answer = server.post("/v1/load_lora_adapter", lora_name="new", lora_path=str(server.folder / "base"))
    assert status == 500 and "is no .bayou file" in answer["error"]["message"]
    assert server.complete("signs", PROMPTS[3])["token_ids"] == before


def test_a_file_given_by_its_path_and_one_that_changes(server: Server) -> None:
    come, signs = (server.complete(model, PROMPTS[5])["token_ids"] for model in ("come", "signs"))
    assert server.complete("static", PROMPTS[5])["token_ids"] == come != signs
    late = server.folder / "deltas" / "late.bayou"
    assert server.post("/v1/completions", model="late", prompt=PROMPTS[5], max_tokens=1)[0] == 404
    shutil.copy(server.folder / "deltas" / "come.bayou", late)
    assert server.complete("late", PROMPTS[5])["token_ids"] == come
    late.unlink()
    shutil.copy(server.folder / "deltas" / "signs.bayou", late)
    assert server.complete("late", PROMPTS[5])["token_ids"] == come
    assert server.post("/v1/unload_lora_adapter", lora_name="late")[0] == 200
    assert server.complete("late", PROMPTS[5])["token_ids"] == signs


def test_what_it_cannot_do_it_does_not_start_with(server: Server) -> None:
    for mine, change, said in (
        (PACKED, "--enforce-eager", "compilation and CUDA graphs (give --enforce-eager); leave BAYOU_MODE out"),
        ({"BAYOU_MODE": "packd"}, "", "BAYOU_MODE=packd: choose lora or packed"),
    ):
        started = [word for word in command(server.folder, "--max-loras", "1") if word != change]
        done = subprocess.run(
            started,
            env=environment(server.folder, mine),
            cwd=server.folder,
            capture_output=True,
            timeout=200,
            text=True,
        )
        assert done.returncode and said in done.stdout + done.stderr
