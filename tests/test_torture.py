"""Flipped bits, cut files, fuzzed headers: small counts always, full ones under `make torture`.

Kills and full disks are in test_kills.py.
"""

import copy
import json
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
from rich.console import Console
from tamper import Entry, Forged, header_of, take_apart

import bayou
from bayou import report
from bayou.checkpoint import Checkpoint
from bayou.deltafile import DeltaFile
from bayou.errors import BadFile, DamagedFile, WrongBase
from bayou.restore import Restorer

CHECKOUT = Path(__file__).resolve().parent.parent


def counts(few: int, many: int) -> Any:
    """The same test twice: with few rounds in every run, with all of them under the marker."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.torture)])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.pico("llama_gqa", tmp_path_factory.mktemp("torture") / "base")


@pytest.fixture(scope="module")
def file(base: Path) -> Path:
    tuned = pico.perturb(base, base.with_name("tuned"), grow_vocab=2, integer_buffer=True)
    bayou.compress(base, tuned, base.with_name("a.bayou"), ratio=4, tokens=1024, length=64)
    return base.with_name("a.bayou")


class Scratch:
    """A copy of a file whose bits are flipped in place and back."""

    def __init__(self, source: Path, path: Path) -> None:
        self.content, self.path = source.read_bytes(), path
        path.write_bytes(self.content)
        self.bits = 8 * len(self.content)
        self.header_bits = 8 * header_of(self.content)[1]

    def flipped(self, bits: Iterator[int] | list[int] | range) -> Iterator[int]:
        with open(self.path, "r+b", buffering=0) as handle:
            for bit in bits:
                at, byte = bit // 8, self.content[bit // 8]
                os.pwrite(handle.fileno(), bytes([byte ^ 1 << bit % 8]), at)
                yield bit
                os.pwrite(handle.fileno(), bytes([byte]), at)


def refused(use: Callable[[], Any]) -> bool:
    """Whether it ends with one of our two errors for a file that is not sound."""
    try:
        use()
    except (BadFile, DamagedFile):
        return True
    return False


# ---------------------------------------------------------------------------------------------- damage


@counts(300, 3000)
def test_a_flipped_bit_anywhere_is_an_error(file: Path, tmp_path: Path, count: int) -> None:
    """Promise 2: `verify` refuses each."""
    scratch = Scratch(file, tmp_path / "x.bayou")
    bits = random.Random(0).sample(range(scratch.bits), count)
    assert [bit for bit in scratch.flipped(bits) if not refused(lambda: report.verify(scratch.path))] == []
    report.verify(scratch.path)


@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.torture)])
def test_a_flipped_bit_of_the_header_is_seen_when_the_file_is_opened(file: Path, tmp_path: Path, step: int) -> None:
    scratch = Scratch(file, tmp_path / "x.bayou")
    bits = range(0, scratch.header_bits, step)
    assert len(bits) > 800
    assert [bit for bit in scratch.flipped(bits) if not refused(lambda: DeltaFile(scratch.path))] == []
    DeltaFile(scratch.path)


@counts(60, 300)
def test_load_refuses_a_flipped_bit_anywhere(base: Path, file: Path, tmp_path: Path, count: int) -> None:
    scratch = Scratch(file, tmp_path / "x.bayou")
    bits = random.Random(1).sample(range(scratch.bits), count)
    assert [bit for bit in scratch.flipped(bits) if not refused(lambda: bayou.load(base, scratch.path))] == []
    bayou.load(base, scratch.path)


@pytest.fixture(scope="module")
def testbed_file(testbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("real") / "intent.bayou"
    bayou.compress(testbed / "base", testbed / "intent", path, calibration="none")
    return path


@pytest.mark.torture
def test_a_flipped_bit_of_a_real_file_is_an_error(testbed_file: Path, tmp_path: Path) -> None:
    scratch = Scratch(testbed_file, tmp_path / "x.bayou")
    bits = random.Random(2).sample(range(scratch.bits), 3000)
    assert [bit for bit in scratch.flipped(bits) if not refused(lambda: report.verify(scratch.path))] == []
    header = range(scratch.header_bits)
    assert [bit for bit in scratch.flipped(header) if not refused(lambda: DeltaFile(scratch.path))] == []


@pytest.mark.torture
def test_header_digests_and_plan_take_half_a_percent_of_a_real_file(testbed: Path, testbed_file: Path) -> None:
    opened = DeltaFile(testbed_file)
    assert opened.nbytes <= (testbed / "intent" / "model.safetensors").stat().st_size / 16
    assert (opened.header_nbytes + opened.entry_nbytes(".digests")) / opened.nbytes <= 0.005


@counts(60, 200)
def test_a_cut_file_is_refused(base: Path, file: Path, tmp_path: Path, count: int) -> None:
    content, path = file.read_bytes(), tmp_path / "x.bayou"
    for length in [0, 1, 7, 8, 9, len(content) - 1, *random.Random(3).sample(range(len(content)), count)]:
        path.write_bytes(content[:length])
        assert refused(lambda: report.verify(path)), length
        assert refused(lambda: bayou.restore(base, path, tmp_path / "out")), length
    path.write_bytes(content + b"\0")
    assert refused(lambda: report.verify(path))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- fuzzed headers

NESTED: Any = []
for _ in range(100):  # deeper nesting is among TEXTS
    NESTED = [NESTED]
VALUES = (
    *(None, True, False, -1, 0, 1, 2, 16, 128, 2**27, 2**31, 2**62, 2**63, 2**64 + 1, 10**300, -(2**63), 0.5, 1e308),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "0",
        "BF16",
        "F8_E4M3",
        "U8",
        "f16",
        "8g128z",
        "1r",
        "Dense",
        "../../x",
        "/etc/x",
    ),
    *(
        "\x00",
        "\ud800",
        "\x1b[2J",
        "[/bold]",
        "x" * 600,
        "model.norm.weight",
        "lm_head.weight",
        "lm_head.weight[0]",
        ".base",
    ),
    *([], {}, [[]], [0] * 500, [1, 2], {"reference": None}, {"part": 3}, {"gain": 1e31}, NESTED),
)
TEXTS = (
    b"[" * 50_000,
    b'{"a":' * 50_000,
    b"9" * 5000,
    b"\xff\xfe",
    b"\\ud800",
    b'"\\u0000"',
    b"NaN",
    b"-",
    b"1e999",
    b" " * 70_000,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    found: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        inside = todo.pop()
        pairs = (
            list(inside.items())
            if isinstance(inside, dict)
            else list(enumerate(inside))
            if isinstance(inside, list)
            else []
        )
        found += [(inside, key) for key, _ in pairs]
        todo += [item for _, item in pairs]
    return found


def mutated(value: Any, rng: random.Random) -> Any:
    """The JSON value with something in it replaced, nudged, removed, doubled or moved."""
    value = copy.deepcopy(value)
    spots = places(value)
    if not spots or rng.random() < 0.02:
        return copy.copy(rng.choice(VALUES))
    inside, key = rng.choice(spots)
    old = inside[key]
    what = rng.randrange(6)
    if what == 0:
        inside[key] = copy.deepcopy(rng.choice(VALUES))
    elif what == 1 and isinstance(old, int):
        inside[key] = rng.choice([old + 1, old - 1, -old, old * 2, old << 40, float(old), str(old)])
    elif what == 2:
        del inside[key]
    elif what == 3 and isinstance(inside, list):
        inside.insert(rng.randrange(len(inside) + 1), copy.deepcopy(old))
    elif what == 4:
        other, place = rng.choice(spots)
        inside[key] = copy.deepcopy(other[place])
    elif isinstance(old, str) and old:
        at = rng.randrange(len(old))
        inside[key] = old[:at] + rng.choice("[]:0.x/\x00\u0663\n") + old[at + 1 :]
    else:
        inside[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def scrambled(raw: bytes, rng: random.Random) -> bytes:
    """Bytes with a few of them changed, cut, doubled, or hostile text among them."""
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(raw) + 1)
        length = rng.randrange(1, 30)
        some = rng.choice(
            [b"", raw[at : at + length] * 2, rng.randbytes(length), bytes([rng.randrange(256)]), rng.choice(TEXTS)]
        )
        raw = raw[:at] + some + raw[at + length * (rng.random() < 0.5) :]
    return raw


def fuzzed(sound: Forged, rng: random.Random) -> bytes:
    """A file made of the sound one by a random attack; in most of them, every hash holds."""
    forged = copy.deepcopy(sound)
    attack = rng.randrange(8)
    if attack <= 2:  # what the metadata say, the Plan most of all
        key = rng.choice(["plan", "plan", "plan", "base", "unchanged", "files"])
        value = json.loads(forged.metadata[key])
        for _ in range(rng.randrange(1, 4)):
            value = mutated(value, rng)
        forged.metadata[key] = json.dumps(value)
    elif attack == 3:  # the metadata as texts
        key = rng.choice(list(forged.metadata))
        forged.metadata[key] = scrambled(forged.metadata[key].encode(), rng).decode("latin-1")
    elif attack == 4:  # the header, as JSON: offsets, dtypes, shapes, names
        header = mutated(forged.header(), rng)
        return forged.pack(json.dumps(header).encode())
    elif attack == 5:  # the header, as bytes; a name twice
        text = json.dumps(forged.header()).encode()
        if rng.random() < 0.3:
            return forged.pack(text[:-1] + b"," + text[1:])
        return forged.pack(scrambled(text, rng))
    elif attack == 6:  # the entries: names, dtypes, shapes and bytes of sites, fingerprints, small files
        entry = rng.choice(forged.entries)
        what = rng.randrange(6)
        if what == 0:
            entry.name = rng.choice([str(rng.choice(VALUES)), scrambled(entry.name.encode(), rng).decode("latin-1")])
        elif what == 1:
            entry.payload = rng.randbytes(len(entry.payload))
        elif what == 2:
            entry.payload = scrambled(entry.payload, rng)
            entry.shape = [len(entry.payload)]
            entry.dtype = rng.choice([entry.dtype, "U8"])
        elif what == 3:
            forged.entries.remove(entry)
        elif what == 4:
            rng.shuffle(forged.entries)
        else:
            forged.entries.append(Entry(rng.choice([".file.", ".", ""]) + str(rng.choice(VALUES)), "U8", [3], b"abc"))
    else:  # the file's bytes, unsealed
        content = bytearray(forged.pack())
        for _ in range(rng.randrange(1, 5)):
            content[rng.randrange(rng.choice([8, header_of(bytes(sound.pack()))[1]]))] = rng.randrange(256)
        return bytes(content)
    try:
        return forged.pack()
    except UnicodeEncodeError:
        return forged.pack(b"{}")


def use(path: Path, base: Checkpoint, rng: random.Random, screen: Console) -> str:
    """Open, check, show and restore what the file says; returns how it ended."""
    try:
        opened = DeltaFile(path)
        opened.verify()
        screen.print(report.table(report.inspect(path)))
        for name, site in opened.sites.items():
            if site.shape[1] < 2**16:
                assert opened.delta(name).materialize(0, 2).shape[1] == site.shape[1]
        opened.check_base(base)
        restorer = Restorer(base, opened)
        names = opened.tensors()
        for name in rng.sample(names, min(3, len(names))):
            word, shape = restorer.spec(name)
            if sum(shape) < 2**16:
                assert restorer.tensor(name).shape == shape
        for name in opened.files:
            opened.read_file(name, base.folder)
        opened.fine_tune_config(base.folder)
    except (BadFile, DamagedFile, WrongBase) as error:
        return type(error).__name__
    return "sound"


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@counts(400, 20_000)
def test_a_fuzzed_header_is_refused_or_harmless(base: Path, file: Path, tmp_path: Path, count: int) -> None:
    """Promise 5: no crash, no hang, no flood of memory; nothing but our own three errors comes out."""
    sound, checkpoint, path = take_apart(file), Checkpoint(base), tmp_path / "x.bayou"
    screen = Console(file=open(os.devnull, "w"))  # noqa: SIM115 (closed below)
    ends: dict[str, int] = {}
    before, slowest, largest = 0, 0.0, 0
    try:
        for seed in range(count):
            rng = random.Random(seed)
            path.write_bytes(fuzzed(sound, rng))
            start = time.perf_counter()
            try:
                end = use(path, checkpoint, rng, screen)
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise
            slowest = max(slowest, time.perf_counter() - start)
            ends[end] = ends.get(end, 0) + 1
            if seed == 50:
                before = resident()  # by then all code and buffers are there
            largest = max(largest, resident())
    finally:
        screen.file.close()
    assert largest - before < 200 * 2**20 and slowest < 10
    assert all(ends.get(end, 0) > count / 100 for end in ("sound", "BadFile", "WrongBase")), ends
