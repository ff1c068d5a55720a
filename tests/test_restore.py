"""From base and file back to an ordinary checkpoint: every tensor, every small file, in the dtype that was asked."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tamper import header_of, snapshot, tensors

import bayou
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput, BayouError, DamagedFile, WrongBase
from bayou.restore import parse_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned (a fine-tune with added tokens, a chat template, an integer buffer, mixed dtypes) and a.bayou."""
    folder = tmp_path_factory.mktemp("restore")
    base = pico.pico("llama_gqa", folder / "base")
    tuned = pico.perturb(base, folder / "tuned", grow_vocab=3, integer_buffer=True, fp32_names=("model.norm.weight",))
    tokenizer = pico.tokenizer()
    tokenizer.add_tokens(["<tool>", "<answer>", "caf\u00e9"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tuned)
    bayou.compress(base, tuned, folder / "a.bayou", ratio=2.5, calibration="none")
    return folder


def by_hand(folder: Path, name: str) -> torch.Tensor:
    """A tensor of the fine-tune, from the formula: reference + terms in fp64, cast; grown rows behind it."""
    opened, old = DeltaFile(folder / "a.bayou"), load_file(folder / "base" / "model.safetensors")
    if name in opened.exact:
        return opened.read_exact(name)
    site = opened.sites[name]
    total = old[name].double() + opened.delta(name).materialize()
    tail = opened.tail(name)
    whole = total.to(torch.bfloat16)
    return torch.cat([whole, opened.read_exact(tail)]) if tail else whole.view(site.disk_shape)


def test_restored_tensors_are_reference_plus_terms(folder: Path, tmp_path: Path) -> None:
    assert bayou.restore(folder / "base", folder / "a.bayou", tmp_path / "out") == tmp_path / "out"
    found, tuned = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "tuned" / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in tuned.items()}
    for name, tensor in found.items():
        wanted = by_hand(folder, name)
        if wanted.is_floating_point():  # torch rounds fp64 to bf16 twice, so one in many may be an ulp off
            assert float((tensor != wanted).float().mean()) < 1e-3, name
            assert torch.allclose(tensor.double(), wanted.double(), rtol=2**-7, atol=0), name
        else:
            assert torch.equal(tensor, wanted), name


def test_restored_equals_loaded(folder: Path, tmp_path: Path) -> None:
    bayou.restore(folder / "base", folder / "a.bayou", tmp_path / "out", dtype="float32")
    restored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    loaded = bayou.load(folder / "base", folder / "a.bayou").eval()
    ids = torch.tensor([[1, 7, 128, 130, 40]])
    with torch.no_grad():
        a, b = restored(ids).logits, loaded(ids).logits
    assert a.shape == (1, 5, 131) and torch.allclose(a, b, atol=2e-5)


def test_small_files_come_back_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    bayou.restore(folder / "base", folder / "a.bayou", tmp_path / "out")
    names = sorted(p.name for p in (folder / "tuned").iterdir() if p.suffix in (".json", ".jinja"))
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= set(names)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*names, "model.safetensors"])
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (folder / "tuned" / name).read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("<tool>caf\u00e9")["input_ids"] == [101, 103]


def test_a_changed_base_tokenizer_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b'"<unk>"', b'"<UNK>"', 1))
    with pytest.raises(WrongBase, match=r"the base's tokenizer\.json is not the one .* use the base's own revision"):
        bayou.restore(tmp_path / "base", folder / "a.bayou", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dtype", "word"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_a_dtype_holds_for_all_floats_and_the_config(folder: Path, tmp_path: Path, dtype: str, word: str) -> None:
    bayou.restore(folder / "base", folder / "a.bayou", tmp_path / "out", dtype=dtype)
    words = {name: stated for name, (stated, _, _) in tensors(tmp_path / "out").items()}
    assert words.pop("bayou_test.position_ids") == "I64" and set(words.values()) == {word}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == getattr(torch, dtype)


def test_a_wider_dtype_is_rounded_once_not_through_the_narrow_one(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    bayou.restore(folder / "base", folder / "a.bayou", tmp_path / "out", dtype="float32")
    found = load_file(tmp_path / "out" / "model.safetensors")[name]
    old = load_file(folder / "base" / "model.safetensors")[name]
    wanted = old.double() + DeltaFile(folder / "a.bayou").delta(name).materialize()
    assert torch.equal(found, wanted.float()) and not torch.equal(found, found.bfloat16().float())


def test_shards_are_as_small_as_asked_and_indexed(folder: Path, tmp_path: Path) -> None:
    bayou.restore(folder / "base", folder / "a.bayou", tmp_path / "whole")
    bayou.restore(folder / "base", folder / "a.bayou", tmp_path / "cut", max_shard_size="40KB")
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))] and len(files) > 3
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    for file in files:
        header, start = header_of((tmp_path / "cut" / file).read_bytes())
        assert {n for n, f in index["weight_map"].items() if f == file} == set(header) - {"__metadata__"}
        assert (tmp_path / "cut" / file).stat().st_size - start <= 40_000
    whole, cut = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert whole == cut and index["metadata"]["total_size"] == sum(len(content) for _, _, content in whole.values())
    one, two = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f, dtype=torch.float32) for f in ("whole", "cut")
    )
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_a_sharded_base_restores_the_same(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    whole = load_file(folder / "base" / "model.safetensors")
    parts = {"a.safetensors": sorted(whole)[::2], "b.safetensors": sorted(whole)[1::2]}
    for file, names in parts.items():
        save_file({name: whole[name] for name in names}, tmp_path / "base" / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for base in (folder / "base", tmp_path / "base"):
        bayou.restore(base, folder / "a.bayou", tmp_path / f"from {base.parent.name}")
    one, two = (tensors(tmp_path / f"from {base.name}") for base in (folder, tmp_path))
    assert one == two


@pytest.mark.parametrize(
    ("text", "size"), [("350MB", 350_000_000), ("64 KiB", 65_536), ("1.5gb", 1_500_000_000), ("7", 7)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "0", "1TBX", "5 5MB", "nan", "1e9"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="is not a size; write e.g. 350MB"):
        parse_size(text)


def test_a_folder_that_holds_a_model_is_refused(folder: Path, tmp_path: Path) -> None:
    before = snapshot(folder)
    (tmp_path / "file").touch()
    for out in (folder / "base", folder / "tuned", tmp_path / "file"):
        with pytest.raises(BadInput, match="exists and holds a model"):
            bayou.restore(folder / "base", folder / "a.bayou", out)
    with pytest.raises(BadInput, match="--dtype int8: choose float32, float16 or bfloat16"):
        bayou.restore(folder / "base", folder / "a.bayou", tmp_path / "out", dtype="int8")
    assert snapshot(folder) == before and not (tmp_path / "out").exists()


def test_an_empty_folder_and_one_with_notes_are_used(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.md").write_text("mine")
    bayou.restore(folder / "base", folder / "a.bayou", tmp_path / "out")
    assert (tmp_path / "out" / "notes.md").read_text() == "mine"
    assert (tmp_path / "out" / "model.safetensors").is_file()


# ---------------------------------------------------------------------------------------------- failing


def damaged(folder: Path, out: Path) -> Path:
    """A copy of the file with a bit flipped in the last site."""
    content = bytearray((folder / "a.bayou").read_bytes())
    header, start = header_of(bytes(content))
    content[start + header[list(DeltaFile(folder / "a.bayou").sites)[-1]]["data_offsets"][1] - 20] ^= 1
    out.write_bytes(content)
    return out


@pytest.mark.parametrize("size", ["5GB", "40KB"])
def test_damage_found_on_the_way_leaves_nothing(folder: Path, tmp_path: Path, size: str) -> None:
    file = damaged(folder, tmp_path / "damaged")
    with pytest.raises(DamagedFile):
        bayou.restore(folder / "base", file, tmp_path / "deep" / "out", max_shard_size=size)
    assert not (tmp_path / "deep" / "out").exists()


def test_damage_found_on_the_way_leaves_an_older_folder_as_it_was(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.md").write_text("mine")
    (tmp_path / "out" / "config.json").write_text("old")
    with pytest.raises(DamagedFile):
        bayou.restore(folder / "base", damaged(folder, tmp_path / "damaged"), tmp_path / "out", max_shard_size="40KB")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {
        "notes.md": "mine",
        "config.json": "old",
    }


@pytest.mark.parametrize("after", [0, 2, 5])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: Any, after: int
) -> None:
    """The disk is full at the first shard, at a later one, at a small file."""
    calls = []

    def full(fd: int) -> None:
        calls.append(fd)
        if len(calls) > 2 * after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BayouError, match="no space left to write .*; nothing was left behind"):
        bayou.restore(folder / "base", folder / "a.bayou", tmp_path / "out", max_shard_size="100KB")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_one_clear_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BayouError, match=r"cannot write .*: Not a directory"):
        bayou.restore(folder / "base", folder / "a.bayou", tmp_path / "file" / "out")


def test_progress_is_told_tensor_by_tensor(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    bayou.restore(folder / "base", folder / "a.bayou", tmp_path / "out", progress=lambda *at: seen.append(at))
    tensors = len(load_file(tmp_path / "out" / "model.safetensors"))
    assert seen == [("tensors", i + 1, tensors) for i in range(tensors)]
    entries: list[tuple[str, int, int]] = []
    checked = bayou.verify(folder / "a.bayou", progress=lambda *at: entries.append(at))["entries"]
    assert entries == [("entries", i + 1, checked) for i in range(checked)]
