"""bayou share --method slicegpt: a folder of its own, what bayou.load makes of it, and what refuses it."""

import json
from pathlib import Path

import pico
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_share import FEW, IDS, logits

import bayou
from bayou import share as share_function
from bayou.cli import main
from bayou.errors import BadFile, BadInput, Unsupported
from bayou.sharing.baselines import slicegpt
from bayou.sharing.layouts import Dial
from bayou.sharing.recover import Training


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.pico("llama_tied", tmp_path_factory.mktemp("sliced") / "model", num_hidden_layers=4)


@pytest.fixture(scope="module")
def folder(model: Path) -> Path:
    out = model.parent / "small"
    share_function(model, out, method="slicegpt", dial=Dial(reduce=0.2), **FEW)
    return out


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words)])
    return int(stop.value.code or 0)


def test_the_command_writes_a_folder_and_prints_what_is_in_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    words = ["share", model, "-o", out, "--method", "slicegpt", "--reduce", 0.2, "--calibration-tokens", 2048]
    assert run(*words, "--length", 64, "--json") == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found, tensors = json.loads(last), load_file(out / "model.safetensors")
    assert found["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    own = load_file(model / "model.safetensors")
    assert found["original"] == sum(tensor.numel() for tensor in own.values())
    assert {tensor.dtype for tensor in tensors.values()} == {own["model.norm.weight"].dtype} == {torch.bfloat16}
    tables = sum(tensors[name].numel() for name in ("model.embed_tokens.weight", "lm_head.weight"))
    before = found["original"] - own["model.embed_tokens.weight"].numel()
    assert found["removed_of_layers"] == pytest.approx(1 - (found["parameters"] - tables) / before)
    assert f"{out}: {found['bytes']:,} bytes" in lines[0] and f"{found['parameters']:,} parameters" in lines[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
    assert run(*words) == 1 and "exists; choose another folder" in capsys.readouterr().err


def test_it_loads_and_computes_nearly_what_the_model_does(model: Path, folder: Path) -> None:
    wanted = logits(transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval())
    found = logits(bayou.load(folder))
    assert 0 < (found - wanted).norm() < wanted.norm() and torch.equal(
        found, logits(slicegpt.load(folder, dtype=torch.float32))
    )
    for other in (bayou.load(None, folder), bayou.load(model, folder)):
        assert torch.equal(logits(other), found)
    half = bayou.load(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.generation_config.eos_token_id is not None
    made = bayou.load(folder).generate(IDS[:1, :8], attention_mask=torch.ones(1, 8), max_new_tokens=3, do_sample=False)
    assert made.shape[1] > 8


def test_a_file_that_needs_no_base_loads_alone(model: Path, tmp_path: Path) -> None:
    share_function(model, tmp_path / "a.bayou", dial=Dial(keep_ends=1, count=1, rank=4), **FEW)
    assert torch.equal(logits(bayou.load(tmp_path / "a.bayou")), logits(bayou.load(None, tmp_path / "a.bayou")))
    with pytest.raises(BadInput, match="ordinary model folder; give a .bayou file too"):
        bayou.load(model)
    with pytest.raises(BadInput, match="nothing to load"):
        bayou.load(None)
    with pytest.raises(BadFile, match="cannot open"):
        bayou.load(tmp_path)


def test_what_needs_a_plain_form_says_that_there_is_none(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["restore", folder], ["restore", model, folder]):
        assert run(*words, "-o", tmp_path / "out") == 1
        assert "has no plain form; bayou.load takes it" in capsys.readouterr().err
    for words in (["inspect", folder], ["verify", folder]):
        assert run(*words) == 1 and "has no plain form" in capsys.readouterr().err
    with pytest.raises(Unsupported, match="has no plain form"):
        bayou.DeltaFile(folder)
    assert list(tmp_path.iterdir()) == []


def test_eval_takes_a_sliced_folder(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("Every number of this text counts.\n")
    assert run("eval", model, folder, model, "--data", tmp_path / "a.txt", "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["kl"] > 0


def test_it_recovers_by_training(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog.\n\n" * 200)
    training = Training(tmp_path / "a.txt", tokens=20 * 4 * 32, batch=4, length=32)
    made = share_function(model, tmp_path / "small", method="slicegpt", dial=Dial(reduce=0.2), training=training, **FEW)
    assert made.training["tokens"] == 20 * 4 * 32 and made.training["rate"] == 1e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "small"]
    assert logits(bayou.load(tmp_path / "small")).isfinite().all()


def test_a_folder_without_a_place_and_several_processes_are_refused_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match="is not a folder; make it first"):
        share_function(model, tmp_path / "no" / "small", method="slicegpt", **FEW)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="written by one process"):
        share_function(model, tmp_path / "small", method="slicegpt", **FEW)
    assert list(tmp_path.iterdir()) == []
