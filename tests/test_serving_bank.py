"""Which deltas are in memory: limits, order, what is refused, and that nobody notices anybody else's trouble."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dense import dense_file
from pico import perturb, pico
from tenants import Asked, alone, greedy, prompts

from bayou.attached import AttachedEmbedding
from bayou.delta import Delta, LowRank
from bayou.errors import BadFile, BadInput, DamagedFile, Unsupported, WrongBase
from bayou.packed import Packed
from bayou.serving import resident
from bayou.serving.bank import Bank
from bayou.serving.engine import Engine, Settings
from bayou.serving.refusals import Refused
from bayou.serving.sampling import Sampling
from bayou.serving.voice import Speech, Voice

GREEDY = Sampling(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def sizes(made: tuple) -> dict[str, int]:
    """Bytes that each tenant takes in memory."""
    engine = opened(made)
    try:
        for name in made[1]:
            engine.load(engine.bank.find(name))
        return {name: place["device"] for name, place in engine.bank.places().items()}
    finally:
        engine.close()


def opened(made: tuple, **settings: object) -> Engine:
    base, files = made
    engine = Engine(base, "base", Settings(**{"batch": 8, **settings}))
    for name, file in files.items():
        engine.bank.register(name, file)
    return engine


@pytest.fixture
def engine(made: tuple) -> Iterator[Engine]:
    found = opened(made)
    yield found
    found.close()


def on_device(bank: Bank) -> set[str]:
    return set(bank.places())


def test_the_longest_unused_go_first(made: tuple, sizes: dict[str, int]) -> None:
    engine = opened(made, memory=sizes["dense"] + sizes["second"] + sizes["grown"])
    try:
        for name in ("dense", "second", "grown", "dense"):
            engine.load(engine.bank.find(name))
        assert on_device(engine.bank) == {"dense", "second", "grown"} and engine.bank.evictions == 0
        engine.load(engine.bank.find("lowrank"))
        assert on_device(engine.bank) == {"dense", "grown", "lowrank"}
        engine.load(engine.bank.find("second"))
        assert on_device(engine.bank) == {"dense", "second", "lowrank"} or "grown" not in on_device(engine.bank)
        assert engine.bank.nbytes["device"] <= sizes["dense"] + sizes["second"] + sizes["grown"]
        assert [load.tenant for load in engine.bank.loads] == ["dense", "second", "grown", "lowrank", "second"]
    finally:
        engine.close()


def test_more_tenants_than_fit_all_get_their_answers(made: tuple, sizes: dict[str, int], tmp_path: Path) -> None:
    base, files = made
    limit = max(sizes.values()) + min(sizes.values())
    engine = opened(made, memory=limit, tenants=2)
    try:
        models = {name: alone(base, file, tmp_path / name) for name, file in files.items()}
        asked = [(name, p, Asked(engine, name, p, GREEDY)) for p in prompts(4, seed=1) for name in files]
        most = 0
        for name, prompt, answer in asked:
            assert answer.wait().tokens == greedy(models[name], prompt, 8)
            most = max(most, engine.bank.nbytes["device"])
        assert most <= limit and len(on_device(engine.bank)) <= 2
        assert engine.bank.evictions >= 6
        assert all(engine.bank.find(name).held == 0 for name in files)
    finally:
        engine.close()


def test_a_line_of_the_tables_is_nobody_elses(made: tuple, tmp_path: Path) -> None:
    """One line, taken by one tenant after the other: each has its own norms, and then the base's again."""
    base, files = made
    engine = opened(made, tenants=1)
    try:
        table = engine.model.router.modules["model.norm"].table["weight"]
        for name in ("dense", "lowrank", "dense"):
            engine.load(engine.bank.find(name))
            wanted = alone(base, files[name], tmp_path / f"{name}{time.monotonic()}").model.norm.weight
            assert torch.equal(table[1], wanted)
            assert torch.equal(table[0], engine.model.base.model.norm.weight)
    finally:
        engine.close()


def test_what_is_larger_than_the_limit_is_refused(made: tuple, sizes: dict[str, int]) -> None:
    engine = opened(made, memory=min(sizes.values()) - 1)
    try:
        heard = Asked(engine, "dense", [5], GREEDY).wait()
        assert isinstance(heard.refused, Refused) and heard.refused.code == "too_large"
        assert Asked(engine, "base", [5], GREEDY).wait().reason == "length"
        assert engine.bank.nbytes == {"device": 0, "host": 0}
    finally:
        engine.close()


def test_unused_room_is_kept_for_those_that_wait(made: tuple, sizes: dict[str, int], monkeypatch) -> None:
    """A tenant that everybody asks for does not keep another one out for ever."""
    monkeypatch.setattr("bayou.serving.engine._PATIENCE", 0.2)
    engine = opened(made, memory=sizes["dense"] + 10, batch=2, queue=1000)
    try:
        popular = [Asked(engine, "dense", [5, 6], Sampling(30, ignore_eos=True)) for _ in range(40)]
        patient = Asked(engine, "second", [5, 6], GREEDY)
        more = [Asked(engine, "dense", [5, 6], Sampling(30, ignore_eos=True)) for _ in range(40)]
        assert patient.wait().reason == "length"
        assert not more[-1].pieces, "it was let in before all of the others"
        assert all(asked.wait().reason == "length" for asked in (*popular, *more))
    finally:
        engine.close()


def test_a_damaged_file_fails_its_own_requests_only(made: tuple, tmp_path: Path) -> None:
    base, files = made
    damaged = tmp_path / "damaged.bayou"
    content = bytearray(files["deltacome"].read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    engine = opened(made)
    try:
        engine.bank.register("damaged", damaged)  # its header is sound
        model = alone(base, files["dense"], tmp_path / "dense")
        asked = [(name, p, Asked(engine, name, p, GREEDY)) for p in prompts(4) for name in ("damaged", "dense")]
        for name, prompt, answer in asked:
            heard = answer.wait()
            if name == "damaged":
                assert heard.refused is not None and heard.refused.status == 422
                assert heard.refused.code == "damaged_file" and "damaged" in str(heard.refused)
            else:
                assert heard.tokens == greedy(model, prompt, 8)
        assert "damaged" not in on_device(engine.bank)
        with pytest.raises(Refused, match=r"^damaged: entry .* is damaged"):
            engine.load(engine.bank.find("damaged"))
        header = bytearray(files["dense"].read_bytes())
        header[100] ^= 1
        damaged.write_bytes(header)
        with pytest.raises((BadFile, DamagedFile)):
            engine.bank.register("header", damaged)
    finally:
        engine.close()


def test_what_is_not_registered(engine: Engine, made: tuple, tmp_path: Path) -> None:
    base, files = made
    other = pico("llama_gqa", tmp_path / "other", seed=9)
    foreign = dense_file(other, perturb(other, tmp_path / "foreign"), tmp_path / "foreign.bayou")
    with pytest.raises(WrongBase):
        engine.bank.register("foreign", foreign)
    with pytest.raises(BadInput, match="loaded already"):
        engine.bank.register("dense", files["dense"])
    with pytest.raises(BadInput, match="loaded already"):
        engine.bank.register("base", files["dense"])
    tuned = perturb(base, tmp_path / "rope")
    text = (tuned / "config.json").read_text()
    assert '"rope_theta": 10000.0' in text
    (tuned / "config.json").write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 500000.0'))
    with pytest.raises(Unsupported, match="rope_parameters"):
        engine.bank.register("rope", dense_file(base, tuned, tmp_path / "rope.bayou"))
    assert engine.bank.find("rope") is None and engine.bank.find("foreign") is None
    assert engine.bank.names() == sorted(files)


def test_unloading_lets_running_answers_end(engine: Engine, made: tuple, tmp_path: Path) -> None:
    base, files = made
    wanted = greedy(alone(base, files["lowrank"], tmp_path / "r"), [5, 6], 60)
    answer = Asked(engine, "lowrank", [5, 6], Sampling(60, ignore_eos=True))
    assert engine.bank.unregister("lowrank") and not engine.bank.unregister("lowrank")
    assert engine.bank.find("lowrank") is None
    engine.bank.register("lowrank", files["dense"])  # the name is free, for another file too
    beside = Asked(engine, "lowrank", [5, 6], Sampling(60, ignore_eos=True))
    assert answer.wait().tokens == wanted
    assert beside.wait().tokens == greedy(alone(base, files["dense"], tmp_path / "d"), [5, 6], 60)
    deadline = time.monotonic() + 10
    while len(on_device(engine.bank)) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(engine.bank.places()) == 1


def test_the_base_is_hashed_once(made: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("bayou.checkpoint._cached", lambda key: {})
    monkeypatch.setattr("bayou.checkpoint._cache", lambda key, values: None)
    from bayou.checkpoint import Checkpoint

    real = Checkpoint.fingerprint
    monkeypatch.setattr(Checkpoint, "fingerprint", lambda self, name: (seen.append(name), real(self, name))[1])
    opened(made).close()
    assert seen and len(seen) == len(set(seen))


def test_voices_are_the_tenants_own(engine: Engine) -> None:
    gain, dense = (engine.bank.find(name).voice for name in ("gain", "dense"))
    assert gain.ends == {2, 40} and dense.ends == {2}
    assert gain.temperature == 0.5 and dense.temperature is None
    messages = [{"role": "user", "content": "hi"}]
    assert gain.decode(gain.encode_chat(messages)) == "<user>hi>"
    with pytest.raises(Refused, match="no chat template"):
        dense.encode_chat(messages)
    equal = [engine.bank.find(name).voice.tokenizer for name in ("dense", "lowrank", "bitdelta")]
    assert equal[0] is equal[1] is equal[2] is not gain.tokenizer


def test_moving_keeps_what_is_cut_from_one_buffer_together(engine: Engine) -> None:
    tenant = engine.bank.find("deltacome")
    inner = {path: routed.inner for path, routed in engine.model.router.modules.items()}
    found = resident.read(engine.model.base, tenant.file, inner)
    moved = found._mapped(torch.clone)
    assert moved.nbytes == found.nbytes and moved.slot == -1
    for path, module in found.modules.items():
        if isinstance(module, AttachedEmbedding):
            continue
        x = torch.randn(3, module.delta.shape[1])
        assert torch.equal(moved.modules[path].delta.apply(x), module.delta.apply(x))
        old, new = sections(module.delta), sections(moved.modules[path].delta)
        assert [t.data_ptr() - old[0].data_ptr() for t in old] == [t.data_ptr() - new[0].data_ptr() for t in new]
        assert new[0].data_ptr() != old[0].data_ptr()


def sections(delta: Delta) -> list[torch.Tensor]:
    assert all(isinstance(term, LowRank) for term in delta.terms)
    packed: list[Packed] = [p for term in delta.terms for p in term.factors()]
    return [part for p in packed for part in p.parts]


class Letters(Voice):
    """A voice whose tokens are the bytes of UTF-8."""

    def __init__(self) -> None:
        super().__init__(None, frozenset())  # type: ignore[arg-type]

    def decode(self, ids) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def say(text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    speech = Speech(Letters(), stops)
    said = []
    for byte in text.encode():
        said.append(speech.add(byte))
        if speech.stopped:
            break
    return [*said, speech.end()], speech.stopped


def test_characters_are_said_whole() -> None:
    said, stopped = say("Grüße, 世界 🎉!")
    assert "".join(said) == "Grüße, 世界 🎉!" and not stopped
    assert "\ufffd" not in "".join(said)
    assert said[2:4] == ["", "ü"]


@pytest.mark.parametrize("stops", [(), ("END",)])
def test_late_text_comes_at_the_end_unless_a_stop_string_is_looked_for(stops: tuple[str, ...]) -> None:
    speech = Speech(Letters(), stops, late=True)
    said = [speech.add(byte) for byte in "Grüße END".encode()[: None if stops else 7]]
    assert (speech.stopped, "".join(said) + speech.end()) == (bool(stops), "Grüße " if stops else "Grüße")
    assert bool("".join(said)) == bool(stops)


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("one END two", ("END",), "one "),
        ("one ENd two", ("END",), "one ENd two"),
        ("aab", ("ab",), "a"),
        ("abcabd", ("abd", "zz"), "abc"),
        ("x\n\nUser: y", ("\nUser:", "\n\n"), "x"),
        ("naïve", ("ï",), "na"),
        ("no stop", ("",), "no stop"),
        ("ends with E", ("END",), "ends with E"),
    ],
)
def test_stop_strings(text: str, stops: tuple[str, ...], wanted: str) -> None:
    said, stopped = say(text, stops)
    assert "".join(said) == wanted
    assert stopped == (wanted != text)
    for i in range(len(said)):  # nothing was said that a stop string then took back
        assert wanted.startswith("".join(said[:i]))


def test_the_kernels_tables_give_the_same_answers(made: tuple, tmp_path: Path) -> None:
    """By the kernels' plain reference, which a CPU takes: lines that are given to others, and tables that grow."""
    base, files = made
    engine = opened(made, kernels=True, tenants=3)
    try:
        models = {name: alone(base, files[name], tmp_path / name) for name in files}
        for names in (("lowrank", "dense"), ("deltacome", "bitdelta", "gain"), tuple(files)):
            asked = [(name, p, Asked(engine, name, p, GREEDY)) for p in prompts(3) for name in (*names, "base")]
            for name, prompt, answer in asked:
                if name != "base":
                    assert answer.wait().tokens == greedy(models[name], prompt, 8), name
                assert answer.wait().refused is None
        tables = [table.deltas for table in engine.model.router.tables]
        assert len(tables) == 2 * 4 + 2, "a layer's q, k and v have one, gate and up another; embedding and head"
        held = {tenant.on_device.slot for name in files if (tenant := engine.bank.find(name)).on_device}
        assert all({i for i, terms in enumerate(table.terms) if any(terms)} <= held for table in tables)
    finally:
        engine.close()


def test_unpacked_factors_give_the_same_answers(made: tuple, sizes: dict[str, int], tmp_path: Path) -> None:
    engine = opened(made, unpack=True)
    try:
        for name in ("deltacome", "bitdelta", "grown"):
            model = alone(made[0], made[1][name], tmp_path / name)
            asked = [(p, Asked(engine, name, p, GREEDY)) for p in prompts(5)]
            assert all(answer.wait().tokens == greedy(model, p, 8) for p, answer in asked)
        taken = {name: place["device"] for name, place in engine.bank.places().items()}
        assert taken["deltacome"] > 5 * sizes["deltacome"] and taken["grown"] == sizes["grown"]
    finally:
        engine.close()
