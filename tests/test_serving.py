"""The engine: a batch of many tenants gives what each gives by itself, token for token."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tenants
import torch
from dense import dense_file
from pico import perturb, pico
from tenants import Asked, alone, gap, greedy, prompts
from transformers import PreTrainedModel

from bayou.errors import Unsupported
from bayou.serving import slots
from bayou.serving.engine import Engine, Settings
from bayou.serving.refusals import Refused
from bayou.serving.sampling import Sampling

GREEDY = Sampling(max_tokens=12, ignore_eos=True)
CLOSE = 1e-3


@pytest.fixture
def engine(made: tuple) -> Iterator[Engine]:
    base, files = made
    opened = Engine(base, "base", Settings(batch=12, piece=32))
    try:
        for name, file in files.items():
            opened.bank.register(name, file)
        yield opened
    finally:
        opened.close()


def same(model: PreTrainedModel, prompt: list[int], found: list[int], wanted: list[int]) -> bool:
    """Whether the answers are equal; a first difference where two scores tie counts, and is told by False."""
    if found == wanted:
        return True
    at = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    distance = gap(model, [*prompt, *wanted[:at]])
    assert distance < CLOSE, f"token {at} is {found[at]}, by itself {wanted[at]}, which is better by {distance:.2g}"
    return False


def test_a_mixed_batch_is_what_each_is_by_itself(engine: Engine, references: dict) -> None:
    asked = []
    for i, prompt in enumerate(prompts(20)):
        # Each prompt to eight tenants, and some to the base, as they come.
        asked += [(name, prompt, Asked(engine, name, prompt, GREEDY)) for name in (*tenants.NAMES, "base")[: 8 + i % 2]]
    ties = 0
    for name, prompt, answer in asked:
        heard = answer.wait()
        assert heard.reason == "length" and heard.refused is None
        ties += not same(references[name], prompt, heard.tokens, greedy(references[name], prompt, 12))
    assert len(asked) == 170
    assert ties <= 2, "two scores within 1e-3 of each other are rare"
    assert engine.load_now["running"] == engine.load_now["waiting"] == 0


def test_one_prompt_to_eight_tenants_gives_eight_right_answers(engine: Engine, references: dict) -> None:
    every = ({name: greedy(references[name], p, 12) for name in tenants.NAMES} | {"": p} for p in prompts(40, seed=5))
    wanted = next(each for each in every if len({tuple(tokens) for tokens in each.values()}) == 9)
    prompt = wanted.pop("")
    answers = {name: Asked(engine, name, prompt, GREEDY) for name in tenants.NAMES}
    assert {name: answer.wait().tokens for name, answer in answers.items()} == wanted


def test_added_tokens_are_the_tenants_alone(engine: Engine, references: dict) -> None:
    prompt = [7, 129, 8]  # a token that only `grown` has
    refused = Asked(engine, "dense", prompt, GREEDY).wait().refused
    assert isinstance(refused, Refused) and "0 .. 127" in str(refused)
    assert Asked(engine, "grown", prompt, GREEDY).wait().tokens == greedy(references["grown"], prompt, 12)
    for name in ("base", "lowrank"):
        beside = [Asked(engine, "grown", p, GREEDY) for p in prompts(4, seed=9)]
        mine = [Asked(engine, name, p, Sampling(24, temperature=5.0, seed=1, ignore_eos=True)) for p in prompts(4)]
        assert all(max(answer.wait().tokens) < 128 for answer in mine)
        assert all(answer.wait().reason == "length" for answer in beside)


@pytest.mark.parametrize(
    "architecture", ["mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "mixtral", "qwen3_moe"]
)
def test_every_architecture(architecture: str, tmp_path: Path) -> None:
    base = pico(architecture, tmp_path / "base")
    engine = Engine(base, "base", Settings(batch=6, piece=16))
    try:
        models = {"base": alone(base, None, tmp_path)}
        for seed in (1, 2):
            tuned = perturb(base, tmp_path / f"tuned{seed}", seed=seed, scale=0.3)
            engine.bank.register(f"t{seed}", dense_file(base, tuned, tmp_path / f"{seed}.bayou"))
            models[f"t{seed}"] = alone(base, tmp_path / f"{seed}.bayou", tmp_path / f"r{seed}")
        asked = [(name, p, Asked(engine, name, p, GREEDY)) for p in prompts(4, seed=3, longest=50) for name in models]
        for name, prompt, answer in asked:
            same(models[name], prompt, answer.wait().tokens, greedy(models[name], prompt, 12))
    finally:
        engine.close()


def test_a_tied_head_that_one_tenant_unties(tmp_path: Path) -> None:
    base = pico("llama_tied", tmp_path / "base")
    engine = Engine(base)
    try:
        models = {"base": alone(base, None, tmp_path)}
        for seed, (untie, grown) in enumerate([(False, 0), (True, 0), (True, 3), (False, 5)], 1):
            tuned = perturb(base, tmp_path / f"t{seed}", seed=seed, scale=0.3, untie=untie, grow_vocab=grown)
            refer = {"lm_head.weight": "model.embed_tokens.weight"} if untie else {}
            file = dense_file(base, tuned, tmp_path / f"{seed}.bayou", refer=lambda n, r=refer: r.get(n, n))
            engine.bank.register(f"t{seed}", file)
            models[f"t{seed}"] = alone(base, file, tmp_path / f"r{seed}")
        asked = [(name, p, Asked(engine, name, p, GREEDY)) for p in prompts(4, seed=3) for name in models]
        for name, prompt, answer in asked:
            same(models[name], prompt, answer.wait().tokens, greedy(models[name], prompt, 12))
        assert any(max(greedy(models["t4"], [n], 8)) >= 128 for n in range(5, 100))
    finally:
        engine.close()


@pytest.mark.parametrize("architecture", ["llava", "qwen2_vl"])
def test_more_than_a_text_decoder_is_refused(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="more than a text decoder and a head"):
        Engine(pico(architecture, tmp_path / "base"))


def test_long_prompts_are_read_in_pieces_and_slots_grow(made: tuple, references: dict) -> None:
    base, files = made
    engine = Engine(base, "base", Settings(batch=3, piece=7, length=250))
    try:
        engine.bank.register("lowrank", files["lowrank"])
        long = [p * 8 for p in prompts(4, seed=2, longest=20)]
        running = [Asked(engine, "lowrank", p, GREEDY) for p in (*long, [9])]
        for prompt, answer in zip((*long, [9]), running, strict=True):
            assert answer.wait().tokens == greedy(references["lowrank"], prompt, 12)
        assert engine.model.slots.length == 250 or max(map(len, long)) < 244
    finally:
        engine.close()


def test_slots_grow_and_keep_what_they_hold(made: tuple, references: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayou.serving.slots._FIRST", 48)  # the probe needs 43 at most
    base, files = made
    engine = Engine(base, "base", Settings(batch=3))
    try:
        engine.bank.register("gain", files["gain"])
        asked = [(p, Asked(engine, "gain", p, Sampling(60, ignore_eos=True))) for p in ([5, 6], list(range(20, 60)))]
        for prompt, answer in asked:
            assert answer.wait().tokens == greedy(references["gain"], prompt, 60)
        assert engine.model.slots.length == 192
    finally:
        engine.close()


def test_ends_are_the_tenants_own(engine: Engine, references: dict) -> None:
    ending = 0
    for prompt in prompts(12, seed=4):
        wanted = greedy(references["gain"], prompt, 40)
        heard = Asked(engine, "gain", prompt, Sampling(max_tokens=40)).wait()
        stop = next((i for i, token in enumerate(wanted) if token in (2, 40)), None)
        assert heard.tokens == (wanted if stop is None else wanted[: stop + 1])
        assert heard.reason == ("length" if stop is None else "stop")
        ending += stop is not None
    assert ending, "none of the prompts tests anything"


def test_a_seed_gives_the_same_answer_in_any_company(engine: Engine) -> None:
    (prompt,) = prompts(1, seed=6)
    wish = Sampling(16, temperature=0.9, top_p=0.9, top_k=40, seed=3, ignore_eos=True)
    first = Asked(engine, "lowrank", prompt, wish).wait().tokens
    crowd = [Asked(engine, name, p, Sampling(20, temperature=1.0)) for p in prompts(3) for name in tenants.NAMES[:3]]
    again = [Asked(engine, "lowrank", prompt, wish) for _ in range(2)]
    assert [answer.wait().tokens for answer in again] == [first, first]
    assert all(answer.wait().refused is None for answer in crowd)
    others = {tuple(Asked(engine, "lowrank", prompt, Sampling(16, temperature=0.9)).wait().tokens) for _ in range(3)}
    assert len(others) == 3, "without a seed every request draws anew"
    tenant = engine.bank.find("lowrank")
    assert tenant is not None
    done, heard = threading.Semaphore(0), [[], []]

    def hear(n: int):
        return lambda piece: (heard[n].extend(c.token for c in piece.chosen), piece.last and done.release())

    engine.submit(tenant, prompt, wish, hear(0), hear(1))
    assert done.acquire(timeout=60) and done.acquire(timeout=60)
    assert heard[0] == first and heard[1] != first


def test_stop_strings_end_an_answer_before_them(engine: Engine, references: dict) -> None:
    (prompt,) = prompts(1, seed=7)
    voice = engine.bank.base.voice
    text = voice.decode(greedy(references["dense"], prompt, 30))
    stop = text[10:13]
    heard = Asked(engine, "dense", prompt, Sampling(30, stop=(stop, "never there"), ignore_eos=True)).wait()
    assert heard.text == text[: text.index(stop)] and heard.reason == "stop"
    whole = Asked(engine, "dense", prompt, Sampling(30, stop=("never there",), ignore_eos=True)).wait()
    assert whole.text == text and whole.reason == "length"


def test_logprobs_are_the_models(engine: Engine, references: dict) -> None:
    (prompt,) = prompts(1, seed=8)
    heard = Asked(engine, "bitdelta", prompt, Sampling(6, logprobs=3, ignore_eos=True)).wait()
    ids = torch.tensor([[*prompt, *heard.tokens]])
    wanted = references["bitdelta"](ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for i, chosen in enumerate(c for piece in heard.pieces for c in piece.chosen):
        assert chosen.logprob == pytest.approx(wanted[i, chosen.token].item(), abs=1e-3)
        top = wanted[i].topk(3)
        assert [token for token, _ in chosen.best] == top.indices.tolist()
        assert [value for _, value in chosen.best] == pytest.approx(top.values.tolist(), abs=1e-3)


def test_who_is_gone_holds_nothing(engine: Engine, references: dict) -> None:
    stays = Asked(engine, "dense", [5, 6, 7], Sampling(60, ignore_eos=True))
    leaves = [Asked(engine, "lowrank", p, Sampling(200, ignore_eos=True)) for p in prompts(20, seed=1)]
    engine.cancel([asked.answer for asked in leaves])
    assert stays.wait().tokens == greedy(references["dense"], [5, 6, 7], 60)
    after = Asked(engine, "lowrank", [5], GREEDY)
    after.wait()
    assert engine.load_now["running"] == engine.load_now["waiting"] == 0
    assert all(not asked.pieces or not asked.pieces[-1].last for asked in leaves)
    assert all(engine.bank.find(name).held == 0 for name in tenants.NAMES)


def test_what_is_refused_before_it_waits(made: tuple) -> None:
    engine = Engine(made[0], "base", Settings(batch=1, queue=2, length=64))
    try:
        for prompt, code in (([], "bad_request"), ([5] * 64, "context_length_exceeded")):
            with pytest.raises(Refused) as caught:
                Asked(engine, "base", prompt, GREEDY)
            assert caught.value.code == code and caught.value.status == 400
        running = []
        with pytest.raises(Refused, match="try again") as caught:
            for _ in range(40):
                running.append(Asked(engine, "base", [5, 6], Sampling(50, ignore_eos=True)))
        assert caught.value.status == 429
        assert all(asked.wait().reason == "length" for asked in running)
        assert Asked(engine, "base", [5], GREEDY).wait().reason == "length"
    finally:
        engine.close()


def test_a_failing_tenant_fails_alone(engine: Engine, references: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bitdelta", "deltacome", "dense"):
        engine.load(engine.bank.find(name))
    broken = engine.bank.find("bitdelta").on_device.modules["model.layers.1.mlp.up_proj"]
    spoiled = engine.bank.find("deltacome").on_device.tensors["model.norm"]["weight"]
    monkeypatch.setattr(broken, "delta", None)
    engine.model.router.modules["model.norm"].table["weight"][engine.bank.find("deltacome").on_device.slot] = torch.nan
    assert spoiled.isfinite().all()
    names = ("bitdelta", "dense", "deltacome", "dense", "base")
    answers = [(name, p, Asked(engine, name, p, GREEDY)) for p in prompts(3, seed=11) for name in names]
    for name, prompt, asked in answers:
        heard = asked.wait()
        if name in ("bitdelta", "deltacome"):
            assert isinstance(heard.refused, Refused) and heard.refused.status == 422
        else:
            assert heard.tokens == greedy(references[name], prompt, 12)


def test_slots_that_memory_ran_out_for_can_grow_later(made: tuple, references: dict, monkeypatch) -> None:
    monkeypatch.setattr("bayou.serving.slots._FIRST", 48)
    engine = Engine(made[0], "base", Settings(batch=2))
    try:
        real, calls = slots._longer, []

        def short(old: torch.Tensor, length: int) -> torch.Tensor:
            calls.append(length)
            if len(calls) == 3:  # the second layer's keys
                raise torch.OutOfMemoryError("none left")
            return real(old, length)

        monkeypatch.setattr("bayou.serving.slots._longer", short)
        wish = Sampling(60, ignore_eos=True)
        refused = Asked(engine, "base", [5, 6], wish).wait().refused
        assert isinstance(refused, Refused) and (refused.status, refused.code) == (503, "out_of_memory")
        assert Asked(engine, "base", [5, 6], wish).wait().tokens == greedy(references["base"], [5, 6], 60)
    finally:
        engine.close()


def test_an_ended_engine_refuses(made: tuple) -> None:
    engine = Engine(made[0])
    asked = Asked(engine, "base", [5], Sampling(200, ignore_eos=True))
    engine.close()
    assert isinstance(asked.wait().refused, Refused)
    with pytest.raises(Refused, match="shutting down"):
        Asked(engine, "base", [5], GREEDY)
    assert not engine.alive
