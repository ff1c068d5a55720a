"""The .bayou file: what stands in it, that nobody's other file passes for one, that only the right base will do."""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tamper import Made, everything, header_of, sha, take_apart, tensors

import bayou
from bayou.checkpoint import Checkpoint
from bayou.deltafile import DeltaFile
from bayou.entry import pack_terms, unpack_terms
from bayou.errors import BayouError, DamagedFile, WrongBase
from bayou.methods import layout_of
from bayou.report import verify
from bayou.restore import Restorer
from bayou.staging import Staging


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return everything(tmp_path_factory.mktemp("made"))


# ---------------------------------------------------------------------------------------------- what stands in it


def test_it_is_a_safetensors_file_that_the_library_reads(made: Made) -> None:
    opened = DeltaFile(made.file)
    with safe_open(made.file, framework="pt") as file:
        assert sorted(file.keys()) == sorted(opened.entries())
        assert file.metadata()["format"] == "bayou" and file.metadata()["version"] == "1"
        for name in opened.exact:
            assert torch.equal(file.get_tensor(name), opened.read_exact(name))
        for name in opened.sites:
            assert file.get_tensor(name).numpy().tobytes() == bytes(opened.read_raw(name))


def test_every_entry_lies_on_a_multiple_of_its_element(made: Made) -> None:
    header, start = header_of(made.file.read_bytes())
    assert start % 64 == 0
    size = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "U8": 1}
    for name, entry in header.items():
        if name != "__metadata__":
            alignment = 16 if name in DeltaFile(made.file).sites else size[entry["dtype"]]
            assert (start + entry["data_offsets"][0]) % alignment == 0, name


def test_the_hashes_are_those_that_the_format_states(made: Made) -> None:
    content = made.file.read_bytes()
    header, start = header_of(content)
    order = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    parts = [content[start + b : start + e] for b, e in (header[n]["data_offsets"] for n in order)]
    assert order[-2:] == [".digests", ".root"]
    assert parts[-2] == b"".join(sha(part) for part in parts[:-2])
    assert parts[-1] == sha(content[:start] + parts[-2])
    assert DeltaFile(made.file).root == parts[-1].hex()


def test_the_base_is_stated_by_the_fingerprints_of_all_that_is_used(made: Made) -> None:
    forged, base = take_apart(made.file), tensors(made.base)
    used = sorted(base)  # of this file: all
    prints = [
        sha(json.dumps([name, base[name][0], list(base[name][1])]).encode() + b"\n" + base[name][2]) for name in used
    ]
    coded = {s.tensor for s in DeltaFile(made.file).sites.values()}
    wanted = [
        p for name, p in zip(used, prints, strict=True) if name in coded or name in DeltaFile(made.file).unchanged
    ]
    assert forged[".base"].payload == b"".join(wanted)
    assert json.loads(forged.metadata["base"])["root"] == hashlib.sha256(b"".join(wanted)).hexdigest()


def test_a_forged_file_equals_the_original_but_for_the_headers_spelling(made: Made, tmp_path: Path) -> None:
    """So that the refusals below are of what was changed, not of the forging."""
    path = tmp_path / "same.bayou"
    path.write_bytes(take_apart(made.file).pack())
    verify(path, made.base)
    one, two = (Restorer(Checkpoint(made.base), DeltaFile(p)) for p in (made.file, path))
    for name in DeltaFile(path).tensors():
        assert torch.equal(one.tensor(name), two.tensor(name))


def test_nothing_in_it_says_when_where_or_by_whom_it_was_made(made: Made) -> None:
    content = made.file.read_bytes()
    header, start = header_of(content)
    assert set(header["__metadata__"]) == {"format", "version", "base", "plan", "unchanged", "files"}
    stated = json.loads(header["__metadata__"]["base"])
    assert stated.pop("root") and stated == {"id": "", "revision": ""}  # a local folder has neither
    assert str(made.base.parent).encode() not in content
    for word in (made.base.name + "/", "time", "date", "host", "user", "path"):
        assert word.encode() not in content[:start], word


def test_every_tensor_has_one_place(made: Made) -> None:
    opened = DeltaFile(made.file)
    assert opened.tensors() == sorted(tensors(made.tuned))
    assert opened.unchanged == ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    assert "bayou_test.position_ids" in opened.exact
    assert opened.tail("model.embed_tokens.weight") == "model.embed_tokens.weight[128:]"
    assert opened.tail("model.norm.weight") is None
    assert not set(opened.sites) & set(opened.exact) and not set(opened.unchanged) & set(opened.sites)


def test_exact_tensors_and_grown_rows_are_bit_for_bit(made: Made) -> None:
    opened, tuned = DeltaFile(made.file), load_file(made.tuned / "model.safetensors")
    for name in opened.exact:
        tensor, _, start = name.partition("[")
        wanted = tuned[tensor][int(start[:-2]) :] if start else tuned[name]
        assert torch.equal(opened.read_exact(name), wanted) and opened.exact_shape(name) == tuple(wanted.shape)


def test_terms_come_back_from_their_bytes(made: Made) -> None:
    opened = DeltaFile(made.file)
    for name, site in opened.sites.items():
        raw, delta = bytes(opened.read_raw(name)), opened.delta(name)
        assert pack_terms(delta.terms) == raw and len(raw) == site.nbytes
        assert tuple(layout_of(term) for term in delta.terms) == site.terms
        scaled = tuple(
            dataclasses.replace(term, gain=0.5, output_scale=torch.ones(site.shape[0]).half(), input_scale=None)
            for term in delta.terms
        )
        layouts = tuple(layout_of(term) for term in scaled)
        again = unpack_terms(torch.frombuffer(bytearray(pack_terms(scaled)), dtype=torch.uint8), layouts, site.shape)
        for term, other in zip(scaled, again, strict=True):
            assert torch.equal(term.rows(slice(0, None)), other.rows(slice(0, None)))


def test_stated_errors_are_those_of_the_deltas(made: Made) -> None:
    opened, old, new = DeltaFile(made.file), *(load_file(f / "model.safetensors") for f in (made.base, made.tuned))
    for name, error in opened.errors().items():
        site = opened.sites[name]
        delta = new[site.tensor][: site.shape[0]].double() - old[site.reference].double()
        found = float((delta - opened.delta(name).materialize()).norm() / delta.norm())
        assert math.isclose(error, found, rel_tol=2e-3)


def test_sizes_add_up_to_the_file(made: Made) -> None:
    opened = DeltaFile(made.file)
    assert opened.nbytes == made.file.stat().st_size
    assert opened.header_nbytes + sum(opened.entry_nbytes(name) for name in opened.entries()) == opened.nbytes


# ---------------------------------------------------------------------------------------------- damage


def test_each_entry_is_checked_against_its_own_digest(made: Made, tmp_path: Path) -> None:
    content, opened = bytearray(made.file.read_bytes()), DeltaFile(made.file)
    header, start = header_of(bytes(content))
    for name in opened.sites:
        damaged = bytearray(content)
        damaged[start + header[name]["data_offsets"][0]] ^= 4
        (tmp_path / "x.bayou").write_bytes(damaged)
        lazily = DeltaFile(tmp_path / "x.bayou")
        for other in lazily.sites:
            if other != name:
                lazily.delta(other)
        with pytest.raises(DamagedFile, match=re.escape(f"entry {name!r} is damaged")):
            lazily.delta(name)
        with pytest.raises(DamagedFile):
            lazily.verify()


def test_damage_where_no_site_lies_is_seen_when_the_file_is_opened(made: Made, tmp_path: Path) -> None:
    """What few readers ever read (.fidelity, tokenizer differences) must not stay damaged unseen."""
    content = made.file.read_bytes()
    header, start = header_of(content)
    ours = [name for name in header if name.startswith(".")]
    assert {".fidelity", ".base", ".digests", ".root", ".file.config.json"} <= set(ours)
    for name in ours:
        damaged = bytearray(content)
        damaged[start + header[name]["data_offsets"][1] - 1] ^= 128
        (tmp_path / "x.bayou").write_bytes(damaged)
        with pytest.raises(DamagedFile):
            DeltaFile(tmp_path / "x.bayou")


def test_swapped_entries_of_one_size_are_damage(made: Made, tmp_path: Path) -> None:
    content = bytearray(made.file.read_bytes())
    header, start = header_of(bytes(content))
    k, v = (header[f"model.layers.{i}.input_layernorm.weight"]["data_offsets"] for i in "01")
    one, two = (bytes(content[start + b : start + e]) for b, e in (k, v))
    assert len(one) == len(two) and one != two
    content[start + k[0] : start + k[1]], content[start + v[0] : start + v[1]] = two, one
    (tmp_path / "x.bayou").write_bytes(content)
    with pytest.raises(DamagedFile):
        verify(tmp_path / "x.bayou")


# ---------------------------------------------------------------------------------------------- the right base


def other_base(base: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    shutil.copytree(base, folder)
    whole = load_file(folder / "model.safetensors")
    change(whole)
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def ulp(tensor: torch.Tensor) -> None:
    flat = tensor.view(torch.int16).view(-1)
    flat[-1] ^= 1


K, V = (f"model.layers.1.self_attn.{p}_proj.weight" for p in "kv")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: [ulp(w[V]), ulp(w[K])], K),
        (lambda w: ulp(w["model.norm.weight"]), "model.norm.weight"),  # an unchanged tensor counts as well
        (lambda w: w.update({V: w[V].float()}), V),
        (lambda w: w.update({V: w[V].view(16, -1)}), V),
        (lambda w: w.update({V: w[K], K: w[V]}), K),
        (lambda w: w.update({K: w[K].half().bfloat16() * 0 + w[K] * 2}), K),
    ],
)
def test_right_base_or_nothing(made: Made, tmp_path: Path, change: Callable[..., Any], named: str) -> None:
    """Promise 1: the first differing tensor, in order of name, is named before any output."""
    other = other_base(made.base, tmp_path / "other", change)
    message = rf"was made against another base \(root [0-9a-f]{{12}}\), but {named!r} differs in .*other; pass the base"
    for use in (
        lambda: DeltaFile(made.file).check_base(Checkpoint(other)),
        lambda: bayou.verify(made.file, other),
        lambda: bayou.restore(other, made.file, tmp_path / "out"),
        lambda: bayou.load(other, made.file),
    ):
        with pytest.raises(WrongBase, match=message):
            use()
    assert not (tmp_path / "out").exists()


def test_a_base_that_lacks_a_tensor_is_refused(made: Made, tmp_path: Path) -> None:
    other = other_base(made.base, tmp_path / "other", lambda w: w.pop(K))
    with pytest.raises(WrongBase, match=rf"has no tensor {K!r}; pass the base it was made against"):
        DeltaFile(made.file).check_base(Checkpoint(other))


def test_a_base_with_more_than_was_used_will_do(made: Made, tmp_path: Path) -> None:
    other = other_base(made.base, tmp_path / "other", lambda w: w.update({"later": torch.ones(3)}))
    DeltaFile(made.file).check_base(Checkpoint(other))


def test_verify_with_a_base_rehashes_whatever_the_cache_says(made: Made, tmp_path: Path) -> None:
    base = other_base(made.base, tmp_path / "base", lambda w: None)
    assert verify(made.file, base)["base_tensors"] == len(DeltaFile(made.file).used())
    path = base / "model.safetensors"
    header, start = header_of(path.read_bytes())
    stat = path.stat()
    with open(path, "r+b") as file:
        file.seek(start + header[V]["data_offsets"][0])
        file.write(b"\x12\x34")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    DeltaFile(made.file).check_base(Checkpoint(base))  # the cache is trusted, as designed
    with pytest.raises(WrongBase, match=re.escape(repr(V))):
        verify(made.file, base)
    with pytest.raises(WrongBase, match=re.escape(repr(V))):  # and the cache knows better from now on
        DeltaFile(made.file).check_base(Checkpoint(base))


def test_equal_small_files_come_from_the_base_and_only_the_right_one(made: Made, tmp_path: Path) -> None:
    opened = DeltaFile(made.file)
    assert "tokenizer.json" in opened.files and ".file.tokenizer.json" not in opened.entries()
    for name in opened.files:
        assert opened.read_file(name, made.base) == (made.tuned / name).read_bytes()
    shutil.copytree(made.base, tmp_path / "base")
    with open(tmp_path / "base" / "tokenizer.json", "a") as file:
        file.write("\n")
    with pytest.raises(WrongBase, match=r"the base's tokenizer\.json is not the one"):
        opened.read_file("tokenizer.json", tmp_path / "base")
    with pytest.raises(BayouError, match=r"holds no vocab\.json"):
        opened.read_file("vocab.json", made.base)


@pytest.mark.parametrize("staged", [False, True])
def test_deltas_read_by_threads_are_those_read_one_by_one(
    made: Made, monkeypatch: pytest.MonkeyPatch, staged: bool
) -> None:
    """staged: piece by piece through a buffer, as for a GPU."""
    file = DeltaFile(made.file)
    names = [*reversed(file.sites), *file.sites]
    if staged:
        monkeypatch.setattr("bayou.staging.PIECE", 256)
        monkeypatch.setattr("bayou.deltafile.PIECE", 256)
        staging = Staging(torch.device("cpu"))
        monkeypatch.setattr(DeltaFile, "delta", lambda file, name: file._staged(name, staging, torch.device("cpu")))
    found = file.deltas(names)
    monkeypatch.undo()
    assert list(found) == list(reversed(file.sites))
    for name, delta in found.items():
        wanted = file.delta(name)
        assert (delta.shape, delta.reference, delta.gain) == (wanted.shape, wanted.reference, wanted.gain)
        assert pack_terms(delta.terms) == pack_terms(wanted.terms) == bytes(file.read_raw(name))


def test_damage_is_seen_in_every_piece(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayou.staging.PIECE", 256)
    monkeypatch.setattr("bayou.deltafile.PIECE", 256)
    whole = made.file.read_bytes()
    file = DeltaFile(made.file)
    name = max(file.sites, key=file.entry_nbytes)
    entry = file._entries[name]
    for at in (entry.start, entry.start + 300, entry.stop - 1):
        bad = tmp_path / "bad.bayou"
        bad.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        damaged = DeltaFile(bad)
        with pytest.raises(DamagedFile, match=re.escape(repr(name))):
            damaged.deltas(damaged.sites)
        with pytest.raises(DamagedFile, match=re.escape(repr(name))):
            damaged._staged(name, Staging(torch.device("cpu")), torch.device("cpu"))
