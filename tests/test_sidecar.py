"""The small files beside the weights come back byte for byte, from the right base only, and no bomb goes off."""

import json
import random
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pico
import pytest

from bayou import sidecar
from bayou.errors import BadFile, BadInput, WrongBase

OLD = b'{"a": 1,\n"b": 2,\n"c": [1,2,3,4]}\n'


def stored(**changes: Any) -> bytes:
    """A difference from OLD, some of it replaced."""
    whole = {"old": sidecar.digest(OLD), "new": sidecar.digest(OLD), "size": len(OLD), "runs": [[0, 99]]}
    return zlib.compress(json.dumps(whole | changes).encode())


@pytest.mark.parametrize("old", [None, b"", OLD, b"one line without an end", bytes(range(256)) * 3])
@pytest.mark.parametrize("new", [b"", OLD, OLD[:-1], OLD * 3, b"\n\n,,\n", bytes(range(256)), b"\xff\xfe,\x00\n"])
def test_a_file_comes_back_byte_for_byte(old: bytes | None, new: bytes) -> None:
    assert sidecar.patched("config.json", old, sidecar.difference(old, new)) == new


def test_random_edits_come_back_byte_for_byte() -> None:
    rng = random.Random(0)
    for _ in range(200):
        lines = [bytes(rng.choices(b"ab,\n", k=rng.randrange(6))) for _ in range(20)]
        old = b"".join(lines)
        for _ in range(rng.randrange(4)):
            lines[rng.randrange(20)] = rng.choice([b"", b"new,", lines[0], b"\xe9\n"])
        rng.shuffle(lines) if rng.random() < 0.3 else None
        new = b"".join(lines)
        assert sidecar.patched("x.json", old, sidecar.difference(old, new)) == new


def test_a_tokenizer_with_added_tokens_costs_little(tmp_path: Path) -> None:
    tokenizer = pico.tokenizer()
    tokenizer.save_pretrained(tmp_path / "old")
    tokenizer.add_tokens(["<tool>", "<answer>"])
    tokenizer.save_pretrained(tmp_path / "new")
    old, new = ((tmp_path / which / "tokenizer.json").read_bytes() for which in ("old", "new"))
    assert old != new
    difference = sidecar.difference(old, new)
    assert sidecar.patched("tokenizer.json", old, difference) == new
    assert len(difference) < len(zlib.compress(new, 9)) / 2


def test_a_large_file_of_unseen_text_takes_no_time() -> None:
    new = b"".join(b"%d," % (7919 * i % 1_000_003) for i in range(450_000))
    assert len(new) > 3_000_000
    start = time.process_time()
    difference = sidecar.difference(OLD, new)
    assert time.process_time() - start < 3
    assert sidecar.patched("tokenizer.json", OLD, difference) == new


def test_a_writer_makes_no_difference_that_a_reader_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "MAX_SIZE", 1000)
    text = "\u00e9".encode() * 450  # two bytes each of the JSON, were six each as \\u00c3
    assert sidecar.patched("tokenizer.json", None, sidecar.difference(None, text)) == text
    with pytest.raises(BadInput, match="a config or tokenizer file of 900 bytes is larger"):
        sidecar.difference(None, bytes(900))


def test_the_limits_are_those_that_the_readme_states() -> None:
    assert sidecar.MAX_SIZE == 64 * 2**20
    bomb = zlib.compress(b" " * (2 * sidecar.MAX_SIZE + 1), 1)
    with pytest.raises(BadFile, match="too large"):
        sidecar.patched("tokenizer.json", None, bomb)
    with pytest.raises(BadFile, match="size 67108865"):
        sidecar.patched("tokenizer.json", OLD, stored(size=64 * 2**20 + 1))


def test_a_changed_base_file_is_refused() -> None:
    difference = sidecar.difference(OLD, OLD + b"more\n")
    for other in (None, OLD.replace(b"1", b"2", 1)):
        with pytest.raises(WrongBase, match="the base's tokenizer.json is not the one"):
            sidecar.patched("tokenizer.json", other, difference)


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"not zlib",
        zlib.compress(b"not json"),
        zlib.compress(b"[" * 100_000),
        zlib.compress(b"[]"),
        zlib.compress(b"null"),
        sidecar.difference(OLD, OLD)[:-5],
        stored(size=10**12),
        stored(size="7"),
        stored(size=-1),
        stored(new="0" * 64),
        stored(new=None),
        stored(runs=5),
        stored(runs=None),
        stored(runs=[{}]),
        stored(runs=[{"0": 1}]),
        stored(runs=[[0]]),
        stored(runs=[["a", "b"]]),
        stored(runs=[[0.5, 1]]),
        stored(runs=[[10**30, 1]]),
        stored(runs=["\u4e2d"]),
        stored(runs=["x" * 1000]),
        stored(runs=[None]),
        stored(runs=[[0, 99]] * 50),
    ],
)
def test_a_malformed_difference_is_a_bad_file(hostile: bytes) -> None:
    with pytest.raises(BadFile, match=r"the stored difference of tokenizer\.json"):
        sidecar.patched("tokenizer.json", OLD, hostile)


def test_a_zip_bomb_is_refused_before_it_fills_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "MAX_SIZE", 2**20)
    bomb = zlib.compress(b" " * 2**28, 9)
    assert len(bomb) < 2**19
    tracemalloc.start()
    try:
        with pytest.raises(BadFile, match="too large"):
            sidecar.patched("tokenizer.json", OLD, bomb)
        assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    finally:
        tracemalloc.stop()


def test_runs_that_copy_more_than_stated_are_refused_before_they_fill_memory() -> None:
    big = b"line\n" * 100_000
    bomb = zlib.compress(
        json.dumps({"old": sidecar.digest(big), "new": "", "size": 10, "runs": [[0, 10**9]] * 10_000}).encode()
    )
    tracemalloc.start()
    try:
        with pytest.raises(BadFile, match="longer than stated"):
            sidecar.patched("tokenizer.json", big, bomb)
        assert tracemalloc.get_traced_memory()[1] < 60 * 2**20
    finally:
        tracemalloc.stop()


def test_only_data_that_transformers_reads_is_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "MAX_SIZE", 1000)
    wanted = ["added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json"]
    wanted += ["merges.txt", "preprocessor_config.json", "processor_config.json", "sentencepiece.bpe.model"]
    wanted += ["special_tokens_map.json", "spiece.model", "tekken.json", "tokenizer.json", "tokenizer.model"]
    wanted += ["tokenizer.v3.model", "tokenizer_config.json", "video_preprocessor_config.json", "vocab.txt"]
    others = ["modeling_x.py", ".hidden.json", "model.safetensors", "model.safetensors.index.json", "a b.json", "x.bin"]
    # Of these a reader takes the name, but they are training data, logs and another tool's files.
    private = ["adapter_config.json", "all_results.json", "log.txt", "requirements.txt", "train.json", "my_config.json"]
    private += ["trainer_state.json", "training_config.json", "optimizer.model", "other.jinja"]
    for name in wanted + others + private:
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "tokenizer.folder.json").mkdir()
    (tmp_path / "vocab.json").write_bytes(bytes(1001))
    assert all(map(sidecar.is_carried, wanted + private))
    assert list(sidecar.carried(tmp_path)) == wanted
    assert sidecar.carried(tmp_path)["config.json"] == b"config.json"
