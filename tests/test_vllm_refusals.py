"""What the plugin for vLLM refuses: names that lead elsewhere, damaged files, other bases. With vLLM or a stand-in."""

import os
from pathlib import Path
from typing import Any

import pico
import plugged
import pytest
import torch
from plugged import ask, flip

import bayou
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput, BayouError, DamagedFile, Unsupported, WrongBase
from bayou.integrations.vllm import Shelf

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own, where it is installed


@pytest.fixture(autouse=True)
def interface(monkeypatch: pytest.MonkeyPatch) -> Any:
    return plugged.interface(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plugged.make(tmp_path_factory.mktemp("vllm"))


@pytest.fixture
def shelf(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    return plugged.copied(folder, tmp_path, monkeypatch)


def test_names_lead_to_files_of_the_folder_only(folder: Path, shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    deltas = shelf.settings.deltas
    outside = deltas.parent / "outside.bayou"
    outside.write_bytes((deltas / "sql.bayou").read_bytes())
    (deltas / "inner").mkdir()
    (deltas / "inner" / "deep.bayou").write_bytes(outside.read_bytes())
    (deltas / "link.bayou").symlink_to(outside)
    (deltas / "near.bayou").symlink_to(deltas / "sql.bayou")
    (deltas / "folder.bayou").mkdir()
    (deltas / ".hidden.bayou").write_bytes(outside.read_bytes())
    os.mkfifo(deltas / "pipe.bayou")  # opening one would wait for ever
    names = ["../outside", "..", ".", "", "inner/deep", str(outside.with_suffix("")), "/etc/passwd", "../../etc/passwd"]
    names += ["%2e%2e%2foutside", "..%2foutside", "..\\outside", "sql\0", "sql\n", "sql/", "./sql", "link", "near"]
    names += ["folder", "pipe", ".hidden", "sql.bayou", "sql ", "sq*", "-sql", "a" * 101, "ｓql", "nothing"]
    assert ask(shelf, folder / "base", *names) == [None] * len(names)
    assert [name for name in names if shelf.find(name)] == [] and not caplog.records
    assert not (deltas.parent / "cache").exists(), "nothing was even opened"
    assert shelf.find("sql") == deltas / "sql.bayou"


def test_a_flipped_bit_anywhere_is_refused_and_nothing_written(
    folder: Path, shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    path = shelf.settings.deltas / "sql.bayou"
    content, opened = path.read_bytes(), DeltaFile(path)
    places = [9, len(content) - 1] + [opened._entries[name].start for name in opened.entries()]
    for at in places:
        path.write_bytes(content)
        flip(path, at)
        with pytest.raises(BayouError):
            shelf.adapter(folder / "base", "sql")
    path.write_bytes(content[:-1])
    caplog.clear()
    assert ask(shelf, folder / "base", "sql", "sql") == [None, None]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and all(line.startswith("bayou: sql is refused: ") and "\n" not in line for line in lines)
    assert not (shelf.settings.deltas.parent / "cache" / "adapters").exists()


def test_a_damaged_adapter_of_a_damaged_file_is_not_served_from_the_cache(folder: Path, shelf: Shelf) -> None:
    assert shelf.adapter(folder / "base", "sql") is not None
    path = shelf.settings.deltas / "sql.bayou"
    opened = DeltaFile(path)
    flip(path, opened._entries["model.norm.weight"].start)  # one that no adapter holds
    with pytest.raises(DamagedFile, match=r"'model\.norm\.weight' is damaged"):
        shelf.adapter(folder / "base", "sql")


def test_another_base_is_refused_also_when_the_adapter_is_there(
    folder: Path, shelf: Shelf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert shelf.adapter(folder / "base", "sql") is not None
    other = pico.pico("llama_gqa", tmp_path / "other", seed=1, dtype=torch.float32)
    with pytest.raises(WrongBase, match=r"'lm_head\.weight' differs in .*other; pass the base it was made against"):
        shelf.adapter(other, "sql")
    assert ask(shelf, other, "sql") == [None] and "bayou: sql is refused: " in caplog.text
    assert shelf.adapter(folder / "base", "sql") is not None, "the refusal is this base's alone"
    with pytest.raises(BadInput, match="neither a folder nor a Hub id"):
        shelf.adapter(tmp_path / "nowhere", "sql")


def test_what_is_wrong_is_remembered_until_the_file_changes(
    folder: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shelf.settings.deltas / "sql.bayou"
    content, read, verify = path.read_bytes(), [], DeltaFile.verify
    monkeypatch.setattr(DeltaFile, "verify", lambda self: read.append(1) or verify(self))
    flip(path, DeltaFile(path)._entries["model.norm.weight"].start)
    messages = set()
    for _ in range(3):
        with pytest.raises(DamagedFile) as error:
            shelf.adapter(folder / "base", "sql")
        messages.add(str(error.value))
    assert len(read) == 1 and len(messages) == 1
    path.unlink()
    path.write_bytes(content)
    assert shelf.adapter(folder / "base", "sql") is not None and len(read) == 2


def test_a_full_disk_is_said_and_tried_again(
    folder: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from bayou.integrations import peft

    with monkeypatch.context() as patch:
        patch.setattr(peft, "write_safetensors", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        assert ask(shelf, folder / "base", "sql") == [None]
        with pytest.raises(BayouError, match="no space left"):
            shelf.adapter(folder / "base", "sql")
    assert "bayou: sql is refused: no space left to write" in caplog.text
    assert list((shelf.settings.deltas.parent / "cache" / "adapters").iterdir()) == []
    assert shelf.adapter(folder / "base", "sql") is not None


def test_a_file_that_changes_under_the_reader_is_refused(
    folder: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bayou.integrations import export as module

    path, real = shelf.settings.deltas / "sql.bayou", module.export

    def swapped(*given: Any, **options: Any) -> Any:
        os.replace(shelf.settings.deltas / "signs.bayou", path)
        return real(*given, **options)

    monkeypatch.setattr(module, "export", swapped)
    with pytest.raises(DamagedFile, match="changed while it was read"):
        shelf.adapter(folder / "base", "sql")
    assert list((shelf.settings.deltas.parent / "cache" / "adapters").iterdir()) == []


def test_a_whole_model_of_its_own_is_refused(folder: Path, shelf: Shelf, tmp_path: Path) -> None:
    from bayou.sharing.layouts import Dial

    model = pico.pico("llama_gqa", tmp_path / "model", num_hidden_layers=4)
    dial = Dial(layout="sequential", count=1, rank=4, keep_ends=1)
    bayou.share(model, shelf.settings.deltas / "small.bayou", dial=dial, calibration="none")
    with pytest.raises(Unsupported, match="whole model of its own"):
        shelf.adapter(folder / "base", "small")
