"""The worker's side of the plugin for vLLM, over a stand-in of vLLM's model: each row is its own tenant's model's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inside_vllm
import pico
import plugged
import pytest
import torch
from inside_vllm import PROMPTS, Llama, OtherNorm, Request, RMSNorm, Served, expected, request, right
from torch import nn

import bayou
from bayou.delta import Delta, Dense
from bayou.errors import BadFile, BadInput, BayouError, DamagedFile, Unsupported, WrongBase
from bayou.integrations.vllm import worker
from bayou.integrations.vllm.places import Places
from bayou.integrations.vllm.rows import Part, Routing, RowLinear
from bayou.integrations.vllm.worker import Manager, named
from bayou.packed import Packed

METHODS = {
    "come": ("deltacome", {"ratio": 3}),
    "signs": ("bitdelta", {}),
    "ranks": ("lowrank", {"ratio": 4}),
}


@pytest.fixture(scope="module", params=["llama_gqa", "llama_tied", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp(request.param)
    base = pico.pico(request.param, found / "base", dtype=torch.float32)
    for seed, (name, (method, options)) in enumerate(METHODS.items()):
        tuned = pico.perturb(base, found / name, scale=0.3, seed=seed)
        file = found / f"{name}.bayou"
        bayou.compress(base, tuned, file, method=method, calibration="none", distill_steps=0, **options)
        bayou.restore(base, file, found / "restored" / name, dtype="float32")
    return found


@pytest.fixture(autouse=True)
def inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    return inside_vllm.put(monkeypatch, tmp_path / "cache")


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("norm", [RMSNorm, OtherNorm])
def test_every_row_is_its_own_model_s(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kernels: bool, norm: type[RMSNorm]
) -> None:
    monkeypatch.setattr(worker, "suits", lambda x: kernels)
    served = Served(folder / "base", norm=norm)
    come, signs, ranks = (request(folder, name, i + 1) for i, name in enumerate(METHODS))
    names: list[str | None] = ["come", None, "signs", "come", None, "signs", "come"]
    which = {"come": come, "signs": signs, "ranks": ranks, None: None}
    right(folder, names, served.step([(which[n], PROMPTS[i]) for i, n in enumerate(names)]))
    right(folder, names, served.step([(which[n], PROMPTS[i]) for i, n in enumerate(names)], padding=5))
    names = [None, None, "ranks", "ranks", "signs", "signs", "signs"]  # sorted, and another one in come's slot
    right(folder, names, served.step([(which[n], PROMPTS[i]) for i, n in enumerate(names)]))
    names = ["come"] * 7
    right(folder, names, served.step([(come, prompt) for prompt in PROMPTS]))
    right(folder, [None] * 7, served.step([(None, prompt) for prompt in PROMPTS]))
    assert all((hook.table is not None) == kernels for hook in served.manager.hooks.values() if hasattr(hook, "table"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device for the compiled kernels")
@pytest.mark.parametrize("packed", ["0", "1"])
def test_every_row_is_its_own_model_s_on_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch, packed: str) -> None:
    monkeypatch.setenv("BAYOU_PACKED", packed)
    served = Served(folder / "base", device="cuda")
    which: dict[str | None, Request | None] = {name: request(folder, name, i + 1) for i, name in enumerate(METHODS)}
    for names in (["come", None, "signs", "come", None, "signs", "come"], [None, None, *["ranks"] * 3, *["signs"] * 2]):
        found = served.step([(which.get(name), PROMPTS[i]) for i, name in enumerate(names)], padding=1)
        right(folder, names, found, atol=5e-3)
    tables = [hook.table for hook in served.manager.hooks.values() if isinstance(hook, RowLinear)]
    assert all((table is not None) == (packed == "1") for table in tables)


@pytest.mark.parametrize("kind", ["llama_gqa", "llama_tied", "qwen2"])
@pytest.mark.parametrize("kernels", [False, True])
def test_matrices_that_are_stored_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, kernels: bool
) -> None:
    monkeypatch.setattr(worker, "suits", lambda x: kernels)
    base = pico.pico(kind, tmp_path / "base", dtype=torch.float32)
    for seed, keep in enumerate((["linears"], ["embeddings"], ["linears", "embeddings"])):
        tuned, file = pico.perturb(base, tmp_path / f"t{seed}", scale=0.3, seed=seed), tmp_path / f"t{seed}.bayou"
        options: dict[str, Any] = {"keep": tuple(keep), "ratio": 0.5, "calibration": "none", "distill_steps": 0}
        bayou.compress(base, tuned, file, method="bitdelta", **options)
        bayou.restore(base, file, tmp_path / "restored" / f"t{seed}", dtype="float32")
    served = Served(base, max_loras=3)
    names = ["t0", None, "t1", "t2", "t0", None, "t2"]
    asked = [None if name is None else request(tmp_path, name, int(name[1]) + 1) for name in names]
    right(tmp_path, names, served.step(list(zip(asked, PROMPTS, strict=True))))


def test_a_part_with_a_gain_is_the_formula() -> None:
    x, weight, bias = torch.randn(5, 7), torch.randn(4, 7), torch.randn(4)
    delta = Delta((4, 7), (Dense(Packed.floats(torch.randn(4, 7), "f32")),))
    for gain, own in ((1.0, None), (0.5, None), (0.0, torch.randn(4))):
        for shift in (None, bias):
            y = x @ weight.T + (0 if shift is None else shift)
            wanted = gain * (x @ weight.T) + x @ delta.materialize().float().T
            wanted = wanted + (0 if shift is None else shift) + (0 if own is None else own)
            part = Part(delta, gain, bias=own)
            assert torch.allclose(part.changed(x, y, shift), wanted, atol=1e-5)
            assert part.only_adds == (gain == 1)
    ids, table = torch.tensor([3, 0, 3]), torch.randn(4, 7)
    wanted = 0.5 * table[ids] + delta.materialize().float()[ids]
    assert torch.allclose(Part(delta, 0.5).row(ids, table[ids]), wanted, atol=1e-6)
    assert torch.equal(Part(bias=bias).row(ids, table[ids]), table[ids])


class Share(nn.Module):
    """What a process has of a linear layer with tensor parallelism, with vLLM's attributes; `more`: of its kind."""

    def __init__(self, rank: int, weight: torch.Tensor, sizes: list[int], **more: Any) -> None:
        super().__init__()
        self.tp_size, self.tp_rank, self.output_sizes, self.input_size = 2, rank, sizes, 7
        self.bias, self.weight = None, nn.Parameter(weight, requires_grad=False)
        for name, value in more.items():
            setattr(self, name, value)


def shares(rank: int, w: torch.Tensor) -> nn.Module:
    """Process `rank` of two of a layer of each kind, all of the matrix w (12, 7), or of two of its halves."""
    model = nn.Module()
    model.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "both_proj": ["a_proj", "b_proj"]}
    half, heads = slice(6 * rank, 6 * rank + 6), slice(4 * rank, 4 * rank + 4)
    few = {"num_heads": 2, "num_kv_heads": 1, "head_size": 2, "v_head_size": 2, "total_num_kv_heads": 1}
    qkv = torch.cat([w[:8][heads], w[8:10], w[10:12]])
    both = torch.cat([w[:6][3 * rank : 3 * rank + 3], w[6:][3 * rank : 3 * rank + 3]])
    model.column = Share(rank, w[half], [12], gather_output=False)
    model.qkv_proj = Share(rank, qkv, [8, 4, 4], gather_output=False, num_kv_head_replicas=2, **few)
    model.both_proj = Share(rank, both, [6, 6], gather_output=False)
    model.row = Share(rank, w, [12], input_is_parallel=True, reduce_results=True)
    model.whole = Share(rank, w, [12])
    model.late = Share(rank, w, [12], input_is_parallel=True, reduce_results=False)
    model.gathered = Share(rank, w, [12], gather_output=True)
    return model


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("slots", [[0, 0, 1, 1, 1], [1, -1, 0, 1, 0], [1, 1, 1, 1, 1]])
def test_each_process_adds_to_its_own_rows(kernels: bool, slots: list[int]) -> None:
    w, x = torch.randn(12, 7), torch.randn(5, 7)
    routing = Routing(torch.device("cpu"))
    routing.set(slots, slots)
    changes = [torch.randn(12, 7) for _ in range(2)]
    wanted = torch.stack([x[i] @ (w + (changes[s] if s >= 0 else 0)).T for i, s in enumerate(slots)])
    for rank in range(2):
        model = shares(rank, w)
        places = Places(model, Share, nn.Embedding)
        assert set(places.modules) == {"column", "qkv_proj", "both_proj", "row", "whole"} and places.split == {"row"}
        for path, rows in (
            ("column", list(range(6 * rank, 6 * rank + 6))),
            ("qkv_proj", [*range(4 * rank, 4 * rank + 4), 8, 9, 10, 11]),
            ("both_proj", [*range(3 * rank, 3 * rank + 3), *range(6 + 3 * rank, 9 + 3 * rank)]),
            ("row", list(range(12))),
            ("whole", list(range(12))),
        ):
            module, cuts = places.modules[path], places.cuts[path]
            gather = (lambda part: x) if path in places.split else None
            hook = RowLinear(routing, path, module, cuts, 2, kernels, gather)
            for slot, change in enumerate(changes):
                pieces = change.split([cut.rows for cut in cuts])
                dense = [Dense(Packed.floats(piece.contiguous(), "f32")) for piece in pieces]
                hook.write(slot, tuple(Part(Delta(tuple(d.weight.shape), (d,))) for d in dense))
            y = x @ module.weight.T
            hook.add(x[:, :3] if gather else x, y, routing.tokens)
            assert torch.allclose(y, wanted[:, rows], atol=1e-5), path


# ---------------------------------------------------------------------------------------- slots, memory, files


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("plain")
    inside_vllm.tenants(found, 5)
    return found


def test_more_deltas_than_slots_and_than_memory(plain: Path) -> None:
    served = Served(plain / "base", max_loras=2, max_cpu_loras=3)
    manager, requests = served.manager, [request(plain, f"t{i}", i + 1) for i in range(5)]
    for pair in ((0, 1), (2, 1), (3, 4), (0, 2), (4, 0)):
        rows = [(requests[pair[0]], PROMPTS[0]), (None, PROMPTS[1]), (requests[pair[1]], PROMPTS[2])]
        right(plain, [f"t{pair[0]}", None, f"t{pair[1]}"], served.step(rows))
        assert {pair[0] + 1, pair[1] + 1} == set(manager.slots) and len(manager.kept) <= 3
    assert manager.list_adapters() == {5, 1, 3} and 1 in manager.slots, "the longest unused went"
    with pytest.raises(RuntimeError, match="3 deltas in a step that has 2 slots"):
        served.step([(each, PROMPTS[0]) for each in requests[:3]])
    assert manager.remove_adapter(1) and not manager.remove_adapter(1) and manager.slots.count(None) == 1
    right(plain, ["t0", "t4"], served.step([(requests[0], PROMPTS[0]), (requests[4], PROMPTS[1])]))
    manager.remove_all_adapters()
    assert not manager.list_adapters() and all(not hook.own for hook in manager.hooks.values())


def test_a_pinned_delta_stays(plain: Path) -> None:
    served = Served(plain / "base", max_loras=2, max_cpu_loras=2)
    with pytest.raises(ValueError, match="Pinning failed. LoRA 1 is not registered"):
        served.manager.pin_adapter(1)
    served.manager.add_adapter(request(plain, "t0", 1))
    assert served.manager.pin_adapter(1)
    for i in (1, 2, 3):
        right(plain, [f"t{i}"], served.step([(request(plain, f"t{i}", i + 1), PROMPTS[0])]))
        assert 1 in served.manager.slots and 1 in served.manager.kept
    with pytest.raises(ValueError, match="one of the 2 slots must stay free"):
        served.manager.pin_adapter(4)


def test_what_vllm_does_to_warm_up(plain: Path) -> None:
    served = Served(plain / "base")
    manager = served.manager
    with manager.dummy_lora_cache():
        for number in (1, 2):
            assert manager.add_dummy_lora(Request("warmup", number, "/not/a/real/path"), 8)
        stand_ins = [(Request("warmup", number, "/not/a/real/path"), PROMPTS[number]) for number in (1, 2)]
        assert len(served.step(stand_ins)) == 2 and set(manager.slots) == {1, 2}
    assert torch.allclose(served.step(stand_ins)[0], expected(plain, None, PROMPTS[1]), atol=2e-4)
    manager.remove_all_adapters()
    manager.add_adapter(request(plain, "t0", 1))
    assert not manager.add_dummy_lora(Request("warmup", 1, "/not/a/real/path"), 8), "a real one is there"
    assert manager.is_enabled and manager.get_dummy_lora_warmup_rank(8) == 8
    assert not manager.supports_tower_connector_lora()
    manager.set_active_adapters(set(), None)


def test_what_is_refused_leaves_everything_as_it_was(plain: Path, tmp_path: Path) -> None:
    served = Served(plain / "base")
    manager = served.manager
    other = pico.pico("llama_gqa", tmp_path / "other", dtype=torch.float32, seed=1)
    grown = pico.perturb(plain / "base", tmp_path / "grown", scale=0.3, grow_vocab=3)
    for source, tuned, name in (
        (other, pico.perturb(other, tmp_path / "f"), "foreign"),
        (plain / "base", grown, "grown"),
    ):
        out = tmp_path / f"{name}.bayou"
        bayou.compress(source, tuned, out, method="bitdelta", calibration="none", distill_steps=0)
    shutil.copy(plain / "t0.bayou", tmp_path / "damaged.bayou")
    plugged.flip(tmp_path / "damaged.bayou", (tmp_path / "damaged.bayou").stat().st_size // 2)
    right(plain, ["t0"], served.step([(request(plain, "t0", 1), PROMPTS[0])]))
    cases: list[tuple[str, type[BayouError], str]] = [
        (str(tmp_path / "damaged.bayou"), DamagedFile, "damaged"),
        (str(tmp_path / "foreign.bayou"), WrongBase, "was made against"),
        (str(tmp_path / "grown.bayou"), Unsupported, "another number of rows than the base's; vLLM has one vocabulary"),
        (str(tmp_path / "none.bayou"), BadFile, "cannot open"),
        (str(tmp_path), BadInput, "is no .bayou file; vLLM serves nothing else with BAYOU_MODE=packed"),
        (named(plain / "t1.bayou", "0" * 64), BadFile, "is another file now"),
    ]
    for path, error, message in cases:
        with pytest.raises(error, match=message):
            manager.add_adapter(Request("new", 2, path))
        assert manager.list_adapters() == {1} and manager.slots == [1, None]
        right(plain, ["t0"], served.step([(request(plain, "t0", 1), PROMPTS[0])]))


def test_a_file_that_was_replaced(plain: Path, tmp_path: Path) -> None:
    served, path = Served(plain / "base", max_loras=1, max_cpu_loras=1), tmp_path / "now.bayou"
    shutil.copy(plain / "t0.bayou", path)
    one, another = Request("now", 1, str(path)), request(plain, "t2", 2)
    right(plain, ["t0"], served.step([(one, PROMPTS[0])]))
    path.unlink()
    shutil.copy(plain / "t1.bayou", path)
    right(plain, ["t2"], served.step([(another, PROMPTS[0])]))
    right(plain, ["t0"], served.step([(one, PROMPTS[0])]))  # read again: what vLLM has begun with goes on
    for number, again in ((3, False), (1, True)):
        with pytest.raises(BadFile, match="is another file now; ask again, or load it from another path"):
            served.manager.add_adapter(Request("now", number, str(path), again))
    path.unlink()
    shutil.copy(plain / "t0.bayou", path)
    assert served.manager.add_adapter(Request("now", 1, str(path), True))
    right(plain, ["t0"], served.step([(one, PROMPTS[0])]))


def test_the_memory_of_a_delta_is_bounded(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deltas").mkdir()
    shutil.copy(plain / "t0.bayou", tmp_path / "deltas")
    monkeypatch.setenv("BAYOU_MODE", "packed")
    monkeypatch.setenv("BAYOU_DELTAS", str(tmp_path / "deltas"))
    manager = Served(plain / "base").manager
    manager.add_adapter(request(plain, "t0", 1))
    own = manager.kept[1]
    assert own is not None and manager.room is not None and 0.8 * manager.room < own.nbytes <= manager.room
    monkeypatch.setenv("BAYOU_DELTA_MEMORY", "10KB")
    with pytest.raises(BadInput, match=r"takes [0-9,]+ bytes of memory, and BAYOU_DELTA_MEMORY leaves 10,000"):
        Served(plain / "base").manager.add_adapter(request(plain, "t0", 1))
    monkeypatch.setenv("BAYOU_DELTA_MEMORY", "1MB")
    manager = Served(plain / "base").manager
    assert manager.room == 1_000_000
    manager.device = torch.device("meta")  # stands for a GPU, whose memory vLLM measures meanwhile
    with manager.dummy_lora_cache():
        assert manager.reserved is not None and manager.reserved.nbytes == 2_000_000
    assert manager.reserved is None


def test_modules_that_are_never_called_are_refused(plain: Path) -> None:
    class Bypassing(Llama):
        def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            norm = self.model.norm
            del self.model.norm
            self.model.__dict__["norm"] = norm.forward  # as a kernel would that fuses it with what comes after
            try:
                return super().forward(input_ids, positions)
            finally:
                del self.model.__dict__["norm"]
                self.model.norm = norm

    served = Served(plain / "base", Bypassing)
    with pytest.raises(Unsupported, match=r"model\.norm\.weight \(64,\) cannot differ from row to row in vLLM"):
        served.manager.add_adapter(request(plain, "t0", 1))


def test_a_model_whose_head_is_not_heard_is_refused(plain: Path) -> None:
    class Direct(Llama):
        def compute_logits(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.lm_head.weight.T

    class Headless(Llama):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            del self.logits_processor

        def compute_logits(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.model.embed_tokens.weight.T

    for kind in (Direct, Headless):
        with pytest.raises(Unsupported, match=f"finds no head in {kind.__name__} whose scores it could change"):
            Served(plain / "base", kind)


def test_a_model_that_cannot_be_run_to_see_is_refused(plain: Path) -> None:
    class Other(Llama):
        def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            raise KeyError("mrope")

    with pytest.raises(Unsupported, match=r"cannot run Other to see how it computes \('mrope'\); leave BAYOU_MODE out"):
        Served(plain / "base", Other)


# ------------------------------------------------------------------------------------------------ how it starts


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"parallel": {"decode_context_parallel_size": 2}}, "context parallelism"),
        ({"parallel": {"enable_batch_sharded_sampling": True}}, "--enable-batch-sharded-sampling"),
        ({"parallel": {"pipeline_parallel_size": 2}}, "--pipeline-parallel-size 2"),
        ({"parallel": {"use_ubatching": True}}, "two microbatches at once (--enable-dbo)"),
        ({"model": {"enforce_eager": False}}, "compilation and CUDA graphs (give --enforce-eager)"),
        ({"model": {"runner_type": "pooling"}}, "--runner pooling"),
        ({"model": {"is_multimodal_model": True}}, "a model of more than text"),
        ({"model": {"enable_prompt_embeds": True}}, "--enable-prompt-embeds"),
        ({"speculative_config": object()}, "speculative decoding"),
    ],
)
def test_what_rows_cannot_be_told_apart_in_is_refused(plain: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported) as error:
        Served(plain / "base", **config)
    assert f"BAYOU_MODE=packed is not done with {message}; leave BAYOU_MODE out" in str(error.value)


def test_only_the_version_that_it_knows(inside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.install()
    worker.install()
    assert inside.LRUCacheWorkerLoRAManager is Manager
    for version in ("0.33.0", "0.31.9", "0.3", "0.320.0", "1.0"):
        changed = inside_vllm.put(monkeypatch, version=version)
        with pytest.raises(BadInput, match=rf"knows version 0\.32 only; this is {version}: install vllm==0\.32"):
            worker.install()
        assert changed.LRUCacheWorkerLoRAManager is not Manager


def test_scores_of_other_rows_than_were_announced_are_an_error(plain: Path) -> None:
    served = Served(plain / "base")
    served.step([(request(plain, "t0", 1), PROMPTS[0])])
    with pytest.raises(RuntimeError, match="vLLM wants 3 rows of scores where 1 were announced"):
        served.model.compute_logits(torch.zeros(3, 64))
    with pytest.raises(RuntimeError, match=r"is given 2 rows of the 7 of the step"):
        served.model(torch.zeros(2, dtype=torch.long), torch.arange(2))
