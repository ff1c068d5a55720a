"""Decode steps of fixed shape: the very function that a GPU captures, run as it is, gives what eager steps give."""

import logging
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import tenants
import torch
from tenants import Asked, alone, greedy, prompts

from bayou.kernels import packed_product
from bayou.serving import decode, tables
from bayou.serving.decode import Decoder
from bayou.serving.engine import Engine, Settings
from bayou.serving.forward import Part
from bayou.serving.sampling import Row, Sampling
from bayou.serving.tables import segments

GREEDY = Sampling(max_tokens=12, ignore_eos=True)
FITTING = tuple(name for name in tenants.NAMES if name != "grown")


@pytest.fixture
def engine(made: tuple) -> Iterator[Engine]:
    base, files = made
    opened = Engine(base, "base", Settings(batch=21, piece=32, kernels=True))
    try:
        for name, file in files.items():
            opened.bank.register(name, file)
        yield opened
    finally:
        opened.close()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, most) of every step of fixed shape."""
    seen: list[tuple[int, int]] = []
    compute = Decoder._compute

    def spied(self: Decoder, count: int, most: int) -> torch.Tensor:
        seen.append((count, most))
        return compute(self, count, most)

    monkeypatch.setattr(Decoder, "_compute", spied)
    return seen


def test_mixed_rows_that_come_and_go(engine: Engine, references: dict, launches: list) -> None:
    asked = []
    for i, prompt in enumerate(prompts(12)):
        for j, name in enumerate((*FITTING, "base")):
            wish = Sampling(3 + (5 * i + 3 * j) % 14, ignore_eos=True)
            asked.append((name, prompt, wish.max_tokens, Asked(engine, name, prompt, wish)))
    for name, prompt, count, answer in asked:
        assert answer.wait().tokens == greedy(references[name], prompt, count), name
    assert {rows for rows, _ in launches} <= {1, 2, 4, 8, 16, 32} and len(launches) > 20
    assert engine.load_now["running"] == engine.load_now["waiting"] == 0
    assert all(engine.bank.find(name).held == 0 for name in FITTING)


def test_a_step_is_the_eager_step(engine: Engine) -> None:
    """Scores of rows of seven tenants, of one that has most of them, and of the base, by both ways."""
    model = engine.model
    for name in FITTING:
        engine.load(engine.bank.find(name))
    residents = [engine.bank.find(name).on_device for name in FITTING]
    mine = [None, *residents, *[residents[2]] * 5, None, None, *[residents[0]] * 2]
    row = Row(Sampling(logprobs=0))
    g = torch.Generator().manual_seed(0)
    prompt = torch.randint(5, 100, (len(mine), 7), generator=g).tolist()
    parts = [Part(prompt[i][:6], 0, i + 1, who, row) for i, who in enumerate(mine)]
    next_parts = [Part(prompt[i][6:], 6, i + 1, who, row) for i, who in enumerate(mine)]
    with torch.inference_mode():
        model.step(parts, decode=False)
        decoder, model._decoder = model._decoder, None
        wanted = model.step(next_parts, decode=True)
        model._decoder = decoder
        for order in (range(len(mine)), reversed(range(len(mine)))):
            chosen = list(order)
            found = model.step([next_parts[i] for i in chosen], decode=True)
            for i, token in zip(chosen, found, strict=True):
                assert token.token == wanted[i].token
                assert token.logprob == pytest.approx(wanted[i].logprob, abs=1e-4)


def test_tokens_that_the_host_has_not_seen(engine: Engine, references: dict) -> None:
    """Steps launched one after another, each with the tokens of the one before, by slot, in changing orders."""
    model = engine.model
    engine.load(engine.bank.find("lowrank"))
    engine.load(engine.bank.find("exact"))
    who = {1: "lowrank", 2: "base", 3: "exact", 4: "lowrank"}
    residents = {slot: engine.bank.find(name).on_device for slot, name in who.items()}
    asked = dict(zip(who, prompts(4, seed=3), strict=True))
    found: dict[int, list[int]] = {}
    with torch.inference_mode():
        for slot, prompt in asked.items():
            part = Part(prompt, 0, slot, residents[slot], Row(GREEDY))
            found[slot] = [model.step([part], decode=False)[0].token]
        for step in range(8):
            slots = sorted(who, key=lambda slot, step=step: (slot * 7 + step * 3) % 5)[: 4 - step % 2]
            parts = []
            for slot in slots:
                first = len(asked[slot]) + len(found[slot]) - 1
                token = found[slot][-1] if step == 0 or step % 3 == 2 else -1
                parts.append(Part((token,), first, slot, residents[slot], None))
            flight = model.launch(parts)
            for slot, chosen in zip(slots, model.land(flight, [None] * len(slots)), strict=True):
                found[slot].append(chosen.token)
    for slot, tokens in found.items():
        assert tokens == greedy(references[who[slot]], asked[slot], len(tokens))
    assert len({len(tokens) for tokens in found.values()}) > 1


def test_who_does_not_fit_is_computed_apart(engine: Engine, references: dict, launches: list, caplog) -> None:
    with caplog.at_level(logging.WARNING, "bayou.serving"):
        for _ in range(2):
            asked = [(name, p, Asked(engine, name, p, GREEDY)) for p in prompts(2) for name in ("grown", "lowrank")]
            for name, prompt, answer in asked:
                assert answer.wait().tokens == greedy(references[name], prompt, 12)
    assert sum("131 rows, the base's 128" in record.message for record in caplog.records) == 1
    before = len(launches)
    (prompt,) = prompts(1)
    assert Asked(engine, "lowrank", prompt, GREEDY).wait().tokens == greedy(references["lowrank"], prompt, 12)
    assert len(launches) == before + 11, "without the other tenant, steps are of fixed shape again"


def test_a_model_with_experts_says_that_it_is_not_captured(tmp_path: Path, caplog) -> None:
    base = tenants.pico("mixtral", tmp_path / "base")
    with caplog.at_level(logging.WARNING, "bayou.serving"):
        engine = Engine(base, settings=Settings(kernels=True))
    try:
        (prompt,) = prompts(1)
        assert engine.model._decoder is None
        assert any("tenant by tenant, so decoding is not captured" in record.message for record in caplog.records)
        assert Asked(engine, "base", prompt, GREEDY).wait().tokens == greedy(alone(base, None, tmp_path), prompt, 12)
    finally:
        engine.close()


@pytest.mark.parametrize("architecture", ["llama_tied", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2"])
def test_architectures(architecture: str, tmp_path: Path, launches: list) -> None:
    base = tenants.pico(architecture, tmp_path / "base")
    engine = Engine(base, "base", Settings(batch=6, piece=16, kernels=True))
    try:
        models = {"base": alone(base, None, tmp_path)}
        for seed in (1, 2):
            tuned = tenants.perturb(base, tmp_path / f"tuned{seed}", seed=seed, scale=0.3)
            file = tenants.dense_file(base, tuned, tmp_path / f"{seed}.bayou", gain=1.0 if seed == 1 else 0.75)
            engine.bank.register(f"t{seed}", file)
            models[f"t{seed}"] = alone(base, file, tmp_path / f"r{seed}")
        asked = [(name, p, Asked(engine, name, p, GREEDY)) for p in prompts(4, seed=3, longest=50) for name in models]
        for name, prompt, answer in asked:
            assert answer.wait().tokens == greedy(models[name], prompt, 12), name
        assert len(launches) > 10
    finally:
        engine.close()


def test_a_step_that_cannot_be_captured_is_made_without(engine: Engine, references: dict, monkeypatch, caplog) -> None:
    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Decoder, "_compute", fails)
    with caplog.at_level(logging.WARNING, "bayou.serving"):
        asked = [(name, p, Asked(engine, name, p, GREEDY)) for p in prompts(2) for name in ("dense", "lowrank")]
        for name, prompt, answer in asked:
            assert answer.wait().tokens == greedy(references[name], prompt, 12)
    assert sum("stream is capturing" in record.message for record in caplog.records) == 1


class Graph:
    """What a CUDA graph is to its owner: a step that was made once, and is made again in the same memory."""

    made = replayed = 0
    decoder: Decoder

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert pool is not None and capture_error_mode == "thread_local"
        self.before = Graph.decoder._last.clone()

    def capture_end(self) -> None:
        Graph.made += 1
        Graph.decoder._last.copy_(self.before)  # a GPU does none of what it captures

    def replay(self) -> None:
        Graph.replayed += 1
        decoder, count, most, scores = self.step
        scores.copy_(decoder._compute(count, most))


def test_what_is_captured_is_replayed_and_captured_anew(engine: Engine, references: dict, monkeypatch) -> None:
    """The owner of the graphs, with graphs that a CPU has."""
    cuda = MagicMock()
    cuda.CUDAGraph, cuda.graph_pool_handle = Graph, object
    monkeypatch.setattr(decode.torch, "cuda", cuda)
    decoder = Graph.decoder = engine.model._decoder
    decoder._captures, decoder._stream = True, MagicMock()
    captured = Decoder._captured

    def with_step(self: Decoder, count: int, most: int):
        graph, scores, kept = captured(self, count, most)
        graph.step = (self, count, most, scores)
        return graph, scores, kept

    monkeypatch.setattr(Decoder, "_captured", with_step)
    wish = Sampling(30, ignore_eos=True)
    for names in (("lowrank",), ("lowrank", "dense", "exact"), ("gain", "bitdelta", "base", "deltacome")):
        asked = [(name, p, Asked(engine, name, p, wish)) for p in prompts(2, seed=len(names)) for name in names]
        for name, prompt, answer in asked:
            assert answer.wait().tokens == greedy(references[name], prompt, 30), name
    assert 5 <= Graph.made < Graph.replayed / 3
    made, version = Graph.made, engine.model.router.version
    asked = [
        Asked(engine, "lowrank", [7, 8], Sampling(30, temperature=1.0, seed=s, ignore_eos=True)) for s in (1, 1, 2)
    ]
    first, again, other = (answer.wait().tokens for answer in asked)
    assert first == again != other
    assert engine.model.router.version == version and Graph.made <= made + 3


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ([0, 0, 0], (0, [0, 3, 3, 3], [-1, -1, -1])),
        ([0, 2, 2, 5], (4, [0, 1, 3, 4, 4], [-1, 2, 5, -1])),
        ([3] * 6, (16, [0, 6, 6, 6, 6, 6, 6], [3, -1, -1, -1, -1, -1])),
        ([0] * 20 + [1] * 35, (16, [0, 20, 36, 52, *[55] * 52], [-1, 1, 1, 1, *[-1] * 51])),
    ],
)
def test_segments(lines: list[int], wanted: tuple) -> None:
    assert segments(lines, len(lines)) == wanted
    most, offsets, owners = wanted
    assert len(offsets) == len(lines) + 1 == len(owners) + 1
    assert segments([7] * 17, 4) == (16, [0, 16, 17, 17, 17], [7, 7, -1, -1])
    assert all(b - a <= most for a, b, line in zip(offsets, offsets[1:], owners, strict=False) if line > 0)


def test_kernels_are_compiled_ahead_once_each(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple] = []

    def launch(stage: str, table, x, offsets, slots, outs, *, most: int, scratch: torch.Tensor) -> int:
        assert slots.eq(-1).all() and len(offsets) == len(slots) + 1 and not offsets.any()
        assert [out.shape for out in outs] == [(len(slots), shape[0]) for shape in table.shapes]
        launched.append((stage, table.loops.get(stage, 0), len(slots), most))
        return 1

    asked: list[tuple] = []
    monkeypatch.setattr(packed_product, "launch", launch)
    monkeypatch.setattr(tables, "use_triton", lambda _: True)
    monkeypatch.setattr(
        tables.packed_product,
        "compile_ahead",
        lambda *a, ahead=packed_product.compile_ahead: asked.append(a) or ahead(*a),
    )
    for name in ("deltacome", "lowrank"):
        engine.load(engine.bank.find(name))
    sizes = tables.sizes(21)
    assert sizes == [(1, 4), (2, 4), (4, 4), (8, 4), (8, 16), (16, 4), (16, 16), (32, 4), (32, 16)]
    assert 1 <= len(asked) <= 2 and all(given[1] == sizes for given in asked)
    assert {most for _, _, _, most in launched} == {4, 16} and {stage for stage, *_ in launched} >= {"shrink", "expand"}
    assert len(launched) < len(asked) * len(asked[0][0]) * len(sizes), "what many tables share is compiled once"


def test_rows_are_given_back_in_the_order_of_asking() -> None:
    flight = decode.Flight([2, 0, 1], 1, torch.tensor([[9.0], [20], [0], [10]]), torch.tensor([7, 22, 0, 11]))
    assert flight.tokens() == [0, 11, 22]
    assert flight.own_scores()[:, 0].tolist() == [0, 10, 20]
