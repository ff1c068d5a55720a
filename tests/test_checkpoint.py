"""Model folders are read strictly, tensors fingerprinted, files written whole or not at all."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import pico
import pytest
import torch
from safetensors.torch import load, load_file, save_file

from bayou import checkpoint
from bayou.checkpoint import Checkpoint, Output, atomic, resolve, write_safetensors
from bayou.errors import BadInput, BayouError, Unsupported


def mixed() -> dict[str, torch.Tensor]:
    """A tensor of each dtype, a scalar, an empty one."""
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    found = {f"t.{i}": (torch.randn(5, 3) * 9).to(kind) for i, kind in enumerate([*kinds, torch.int8, torch.uint8])}
    return found | {"flag": torch.tensor([True, False]), "scalar": torch.tensor(2.5), "none": torch.zeros(0, 4)}


def folder_of(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


# ---------------------------------------------------------------------------------------------- reading


def test_every_dtype_reads_as_safetensors_reads_it(tmp_path: Path) -> None:
    tensors = mixed()
    read = Checkpoint(folder_of(tensors, tmp_path))
    assert read.names() == sorted(tensors)
    for name, tensor in tensors.items():
        assert same(read.read(name), tensor)
        assert (read.shape(name), read.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
    assert read.nbytes == (tmp_path / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (2, 5), (4, 99), (3, 3), (0, None)])
def test_a_range_of_rows_is_those_rows(tmp_path: Path, start: int, stop: int | None) -> None:
    whole = torch.randn(5, 2, 3).to(torch.bfloat16)
    read = Checkpoint(folder_of({"other": torch.ones(7), "w": whole}, tmp_path))
    assert same(read.read("w", start, stop), whole[start:stop])


def test_shards_are_one_model(tmp_path: Path) -> None:
    base = pico.pico("llama_gqa", tmp_path / "base")
    pico.perturb(base, tmp_path / "one")
    pico.perturb(base, tmp_path / "two", shard=True)
    one, two = Checkpoint(tmp_path / "one"), Checkpoint(tmp_path / "two")
    assert one.names() == two.names() and not (tmp_path / "two" / "model.safetensors").exists()
    assert all(same(one.read(name), two.read(name)) for name in one.names())
    assert one.fingerprints(one.names()) == two.fingerprints(two.names())


def test_weights_are_read_not_mapped(tmp_path: Path) -> None:
    read = Checkpoint(folder_of({"w": torch.ones(4096, 64)}, tmp_path))
    assert read.read("w").sum() == 4096 * 64
    assert str(tmp_path.resolve()) not in Path("/proc/self/maps").read_text()


def test_an_unreadable_dtype_is_named_and_the_rest_readable(tmp_path: Path) -> None:
    read = Checkpoint(folder_of({"eight": torch.zeros(4).to(torch.float8_e4m3fn), "w": torch.ones(2)}, tmp_path))
    assert torch.equal(read.read("w"), torch.ones(2))
    with pytest.raises(Unsupported, match="'eight' has dtype F8_E4M3"):
        read.read("eight")


def _shards(folder: Path, weight_map: Any, files: tuple[str, ...] = ("a.safetensors",)) -> None:
    for name in files:
        save_file({"w": torch.ones(2)}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: None, "no model.safetensors and no shards"),
        (lambda f: (f / "pytorch_model.bin").touch(), "pickled weights only; save it again with safe_serialization"),
        (lambda f: (f / "adapter_model.safetensors").touch(), "holds an adapter; merge it"),
        (lambda f: _shards(f, {"w": "../a.safetensors"}), r"names the shard '\.\./a\.safetensors'"),
        (lambda f: _shards(f, {"w": "/etc/passwd"}), "names the shard '/etc/passwd'"),
        (lambda f: _shards(f, {"w": ".hidden"}), "names the shard '.hidden'"),
        (lambda f: _shards(f, {"w": "b.safetensors"}), "lacks the shard b.safetensors"),
        (lambda f: _shards(f, {"w": 5}), "not an index of shards|names the shard 5"),
        (lambda f: _shards(f, ["w"]), "not an index of shards"),
        (
            lambda f: _shards(f, {"w": "a.safetensors", "v": "b.safetensors"}, ("a.safetensors", "b.safetensors")),
            "'w' stands in two shards, a.safetensors and b.safetensors",
        ),
        (lambda f: [_shards(f, {}, ("a.safetensors", "b.safetensors")), (f / "model.safetensors.index.json").unlink()],
         "2 safetensors files and no model.safetensors.index.json"),
    ],
)  # fmt: skip
def test_an_unusable_folder_is_refused_with_the_way_out(
    tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    make(tmp_path)
    with pytest.raises(BadInput, match=message):
        Checkpoint(tmp_path)


def test_a_missing_folder_or_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a folder; give a Hugging Face model folder or a Hub id"):
        Checkpoint(tmp_path / "absent")
    read = Checkpoint(folder_of({"w": torch.ones(1)}, tmp_path))
    with pytest.raises(BadInput, match="has no config.json"):
        _ = read.config
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match="config.json is not JSON"):
        _ = read.config


# ---------------------------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_is_the_sha256_that_the_format_states(tmp_path: Path) -> None:
    tensors = mixed()
    read = Checkpoint(folder_of(tensors, tmp_path))
    for name, tensor in tensors.items():
        stated = json.dumps([name, read.word(name), list(tensor.shape)]).encode() + b"\n"
        content = b"" if not tensor.numel() else bytes(tensor.reshape(-1).view(torch.uint8).tolist())
        assert read.fingerprint(name) == hashlib.sha256(stated + content).digest()


def test_name_dtype_shape_and_every_byte_count(tmp_path: Path) -> None:
    zeros = torch.zeros(2, 6)
    one = zeros.clone()
    one[1, 5] = 1e-30
    tensors = {"a": zeros, "b": zeros.clone(), "c": zeros.int(), "d": zeros.clone().view(3, 4)}
    reads = [Checkpoint(folder_of(tensors, tmp_path / "1")), Checkpoint(folder_of({"a": one}, tmp_path / "2"))]
    found = [read.fingerprint(name) for read in reads for name in read.names()]
    assert len(set(found)) == 5


def tamper(path: Path, *, keep_time: bool) -> None:
    """Another last byte; the size and inode stay, and the modification time if told."""
    stat = path.stat()
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (0 if keep_time else 1)))


def test_an_unchanged_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of({"v": torch.ones(3), "w": torch.ones(2)}, tmp_path)
    first = Checkpoint(folder).fingerprints(["w"])
    hashed: list[str] = []
    real = Checkpoint.fingerprint
    monkeypatch.setattr(Checkpoint, "fingerprint", lambda self, name: hashed.append(name) or real(self, name))
    assert Checkpoint(folder).fingerprints(["v", "w"])["w"] == first["w"]
    assert hashed == ["v"]
    Checkpoint(folder).fingerprints(["w"], rehash=True)
    assert hashed == ["v", "w"]


def test_rehash_sees_what_the_cache_cannot(tmp_path: Path) -> None:
    folder = folder_of({"w": torch.ones(2)}, tmp_path)
    before = Checkpoint(folder).fingerprints(["w"])
    tamper(folder / "model.safetensors", keep_time=True)
    assert Checkpoint(folder).fingerprints(["w"]) == before  # the price of a cache by (path, size, mtime, inode)
    after = Checkpoint(folder).fingerprints(["w"], rehash=True)
    assert after != before
    assert Checkpoint(folder).fingerprints(["w"]) == after  # and the cache has been mended


def test_a_changed_time_is_hashed_again(tmp_path: Path) -> None:
    folder = folder_of({"w": torch.ones(2)}, tmp_path)
    before = Checkpoint(folder).fingerprints(["w"])
    tamper(folder / "model.safetensors", keep_time=False)
    assert Checkpoint(folder).fingerprints(["w"]) == {"w": Checkpoint(folder).fingerprint("w")} != before


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"w": 5}', b'{"w": "short"}', b'["w"]'])
def test_a_damaged_cache_only_costs_hashing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setenv("BAYOU_CACHE", str(tmp_path / "cache"))
    folder = folder_of({"w": torch.ones(2)}, tmp_path / "m")
    wanted = Checkpoint(folder).fingerprints(["w"])
    (cached,) = (tmp_path / "cache" / "fingerprints").iterdir()
    cached.write_bytes(content)
    assert Checkpoint(folder).fingerprints(["w"]) == wanted


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BAYOU_CACHE", str(tmp_path / "file"))
    folder = folder_of({"w": torch.ones(2)}, tmp_path / "m")
    assert Checkpoint(folder).fingerprints(["w"]) == {"w": Checkpoint(folder).fingerprint("w")}


def test_a_full_disk_leaves_no_half_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAYOU_CACHE", str(tmp_path / "cache"))
    folder = folder_of({"w": torch.ones(2)}, tmp_path / "m")

    def full(path: Path, text: str) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert Checkpoint(folder).fingerprints(["w"]) == {"w": Checkpoint(folder).fingerprint("w")}
    assert list((tmp_path / "cache" / "fingerprints").iterdir()) == []


def test_a_blob_of_the_hub_is_known_by_its_name(tmp_path: Path) -> None:
    """The Hub's cache names a blob by its sha256, so two snapshots that link to it share the hashing."""
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / ("ab" * 32)
    save_file({"w": torch.ones(2)}, blob)
    for snapshot in ("1", "2"):
        (tmp_path / snapshot).mkdir()
        (tmp_path / snapshot / "model.safetensors").symlink_to(blob)
    first = Checkpoint(tmp_path / "1").fingerprints(["w"])
    os.utime(blob, ns=(1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "fingerprint", lambda *_: pytest.fail("hashed again"))
        assert Checkpoint(tmp_path / "2").fingerprints(["w"]) == first


# ---------------------------------------------------------------------------------------------- writing


def outputs(tensors: dict[str, torch.Tensor]) -> list[Output]:
    words = checkpoint.WORDS
    return [Output(n, words[t.dtype], tuple(t.shape), lambda t=t: [t]) for n, t in tensors.items()]


def test_what_is_written_safetensors_reads(tmp_path: Path) -> None:
    tensors = mixed()
    size = write_safetensors(tmp_path / "x.safetensors", outputs(tensors), {"format": "pt"})
    content = (tmp_path / "x.safetensors").read_bytes()
    assert len(content) == size and (8 + int.from_bytes(content[:8], "little")) % 64 == 0
    for found in (load_file(tmp_path / "x.safetensors"), load(content)):
        assert found.keys() == tensors.keys()
        assert all(same(found[name], tensor) for name, tensor in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no"), BayouError("no")])
def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(type(error)), atomic(tmp_path / "x") as file:
        file.write(b"half of the new")
        raise error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"old"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path, number: int) -> None:
    message = "no space left to write .*x; nothing was left behind"
    with pytest.raises(BayouError, match=message) as caught, atomic(tmp_path / "x") as file:
        file.write(b"half")
        raise OSError(number, os.strerror(number))
    assert isinstance(caught.value.__cause__, OSError) and list(tmp_path.iterdir()) == []


def test_a_write_replaces_what_a_killed_process_of_the_same_number_left(tmp_path: Path) -> None:
    """In containers, process numbers repeat: the first program is always 1."""
    with atomic(tmp_path / "x") as file:
        left = Path(file.name)
        file.write(b"first")
    left.write_bytes(b"a longer rest of a killed run")
    with atomic(tmp_path / "x") as file:
        file.write(b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"new"}


def test_a_forbidden_folder_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(BayouError, match="cannot write .*: No such file or directory"), atomic(tmp_path / "no" / "x"):
        pass


# ---------------------------------------------------------------------------------------------- Hub ids


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    assert resolve(tmp_path, "main") == tmp_path


def test_a_hub_id_is_fetched_at_its_revision_and_without_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        assert ignore_patterns == ["consolidated*", "*/*"]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve("org/model", "abc") == tmp_path and resolve("gpt2") == tmp_path
    assert [(name, revision) for name, revision, _ in asked] == [("org/model", "abc"), ("gpt2", None)]
    assert not any("*" + ending in asked[0][2] for ending in (".py", ".bin", ".pt", "")) and "*" not in asked[0][2]


@pytest.mark.parametrize("bad", ["../model", "/absent/folder", "a/b/c", "org/mo del", "", "~/x", "org\n/x", "-o/x"])
def test_what_is_no_hub_id_never_reaches_the_hub(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    monkeypatch.setattr(Path, "is_dir", lambda _: False)
    with pytest.raises(BadInput, match="neither a folder nor a Hub id"):
        resolve(bad)


@pytest.mark.parametrize("error", [OSError("offline"), huggingface_hub.errors.LocalEntryNotFoundError("not cached")])
def test_an_absent_model_is_bad_input(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(BadInput, match="org/none is not a folder here, and the Hub did not give it"):
        resolve("org/none")
