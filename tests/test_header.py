"""The strict reader of safetensors headers: everything that the format forbids is refused."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bayou import checkpoint
from bayou.checkpoint import Checkpoint, read_header
from bayou.errors import BadFile


def entry(begin: Any = 0, end: Any = 4, shape: Any = (4,), dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def as_file(header: Any, data: bytes = bytes(4), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


HUGE = 2**62
MALFORMED = {
    "empty file": b"",
    "seven bytes": bytes(7),
    "no header": as_file(b"", b""),
    "header longer than the file": as_file({"w": entry()}, length=10**6),
    "header of 2^63 bytes": as_file({"w": entry()}, length=2**63),
    "not JSON": as_file(b"{]", bytes(4)),
    "not UTF-8": as_file(b'{"\xff": 1}'),
    "a list": as_file([entry()]),
    "null": as_file(None),
    "a number": as_file(b"17"),
    "deep nesting": as_file(b"[" * 200_000),
    "deep nesting inside": as_file(b'{"w": ' + b'{"w": ' * 100_000 + b"1" + b"}" * 100_001),
    "a number of 10,000 digits": as_file(
        b'{"w": {"dtype": "U8", "shape": [' + b"9" * 10_000 + b'], "data_offsets": [0, 4]}}'
    ),
    "a name twice": as_file(b'{"w": %s, "w": %s}' % ((json.dumps(entry()).encode(),) * 2)),
    "a key twice": as_file(b'{"w": {"dtype": "U8", "dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}'),
    "metadata not a table": as_file({"__metadata__": [], "w": entry()}),
    "metadata not text": as_file({"__metadata__": {"a": 1}, "w": entry()}),
    "an entry not a table": as_file({"w": [0, 4]}),
    "no dtype": as_file({"w": {"shape": [4], "data_offsets": [0, 4]}}),
    "dtype a list": as_file({"w": entry(dtype=["U8"])}),
    "dtype null": as_file({"w": entry(dtype=None)}),
    "shape a text": as_file({"w": entry(shape="4")}),
    "shape a number": as_file({"w": entry(shape=4)}),
    "shape of floats": as_file({"w": entry(shape=[4.0])}),
    "shape of booleans": as_file({"w": entry(0, 1, [True])}, bytes(1)),
    "negative shape": as_file({"w": entry(shape=[-2, -2])}),
    "17 dimensions": as_file({"w": entry(shape=[4] + [1] * 16)}),
    "a shape whose product wraps 2^64": as_file({"w": entry(shape=[HUGE, 4, 4])}),
    "three offsets": as_file({"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 4]}}),
    "offsets reversed": as_file({"w": entry(4, 0)}),
    "offset past the end": as_file({"w": entry(0, 8, [8])}),
    "offset of 2^80": as_file({"w": entry(2**80, 2**80 + 4)}),
    "bytes that do not fit the shape": as_file({"w": entry(shape=[3])}),
    "bytes that do not fit the dtype": as_file({"w": entry(dtype="F32")}),
    "a hole": as_file({"v": entry(0, 1, [1]), "w": entry(2, 4, [2])}),
    "a hole at the start": as_file({"w": entry(1, 4, [3])}),
    "an overlap": as_file({"v": entry(0, 3, [3]), "w": entry(2, 4, [2])}),
    "the same bytes twice": as_file({"v": entry(), "w": entry()}),
    "bytes at the end": as_file({"w": entry()}, bytes(5)),
    "bytes missing": as_file({"w": entry()}, bytes(3)),
    "an empty name's control character": as_file({"w\n": entry()}),
    "a terminal escape in a name": as_file({"\x1b[2J": entry()}),
    "a lone surrogate in a name": as_file(b'{"\\ud800": %s}' % json.dumps(entry()).encode()),
    "a name of 600 characters": as_file({"w" * 600: entry()}),
}  # fmt: skip


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_header_is_a_bad_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with open(path, "rb") as file, pytest.raises(BadFile, match=re.escape(str(path))):
        read_header(file, path)


@pytest.mark.parametrize(("cap", "content"), [("MAX_HEADER", 100), ("MAX_ENTRIES", 3)])
def test_caps_bound_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cap: str, content: int) -> None:
    monkeypatch.setattr(checkpoint, cap, content)
    path = tmp_path / "x.safetensors"
    path.write_bytes(as_file({f"w{i}": entry(i, i + 1, [1]) for i in range(4)}))
    with open(path, "rb") as file, pytest.raises(BadFile):
        read_header(file, path)
    path.write_bytes(as_file({"w": entry()}))
    with open(path, "rb") as file:
        assert list(read_header(file, path)[1]) == ["w"]


def test_a_file_that_shrinks_while_it_is_read_is_a_bad_file(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1000)}, tmp_path / "model.safetensors")
    read = Checkpoint(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 500)
    with pytest.raises(BadFile, match="the file ended at byte 500; it changed while being read"):
        read.read("w")
