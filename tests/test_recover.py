"""bayou share --train: the search for how to train, and what is kept of it."""

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from test_share import FEW, agree

import bayou
from bayou import objective
from bayou.checkpoint import Checkpoint
from bayou.cli import main
from bayou.errors import BadInput, Diverged, JournalMismatch
from bayou.evaluate import read_model
from bayou.sharing import baselines, recover, tune
from bayou.sharing.draft import Draft, draw_up
from bayou.sharing.layouts import Dial
from bayou.sharing.original import Original
from bayou.sharing.recover import Training, train, train_rival

DIAL = Dial(blocks=(3,), rank=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.pico("llama_gqa", tmp_path_factory.mktemp("recover") / "model", num_hidden_layers=6)


@pytest.fixture
def training(tmp_path: Path) -> Training:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog.\n\n" * 200)
    return Training(tmp_path / "a.txt", tokens=60 * 4 * 32, batch=4, length=32, rate=5e-3, search=3)


def grid(measured: Any, ranges: Any, *, trials: int, seed: int) -> Any:
    """What tune.search does, without optuna: the given numbers, then rates ever larger."""
    first = {name: where.first for name, where in ranges.items()}
    tried = []
    for i in range(trials):
        values = first | {"rate": first["rate"] * 2**i, "alpha": 1 / (i + 1)}
        try:
            tried.append((values, measured(values)))
        except Diverged:
            tried.append((values, math.inf))
    return min(tried, key=lambda item: item[1])[0], tried


@pytest.fixture
def without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "require", lambda: None)
    monkeypatch.setattr(tune, "search", grid)


def trained(model: Path, training: Training, checkpoint: Path, steps: list[str] | None = None) -> Draft:
    draft = draw_up(model, dial=DIAL, initialisation="zero", **FEW)
    return train(draft, training, checkpoint, lambda step, *_: None if steps is None else steps.append(step))


@pytest.mark.usefixtures("without_optuna")
def test_the_numbers_of_least_held_out_loss_train(model: Path, training: Training, tmp_path: Path) -> None:
    steps: list[str] = []
    made = trained(model, training, tmp_path / "c", steps)
    told = made.trained["search"]
    best = min(told["trials"], key=lambda trial: trial["loss"])
    assert len(told["trials"]) == 3 and len({trial["loss"] for trial in told["trials"]}) == 3
    assert told["chosen"] == {name: best[name] for name in ("rate", "alpha", "start")}
    assert told["trial_tokens"] == 20 * 4 * 32 and told["held_out"] % 32 == 0
    assert made.trained["rate"] == best["rate"] and made.trained["alpha"] == best["alpha"]
    assert steps[0].startswith("search: trial 1 of 3, loss ") and steps[60].startswith("train: loss ")
    plain = trained(model, replace(training, search=0, **told["chosen"]), tmp_path / "d")
    assert all(torch.equal(a.u, b.u) for a, b in zip(made.shared.ties, plain.shared.ties, strict=True))
    assert "search" not in plain.trained


@pytest.mark.usefixtures("without_optuna")
def test_a_stopped_search_goes_on_and_leaves_the_checkpoint_alone(
    model: Path, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(model, training, tmp_path / "whole")
    fits: list[Any] = []
    fit = recover.trainer.fit

    def counted(*words: Any, **options: Any) -> Any:
        fits.append(options["checkpoint"])
        if len(fits) == 3:
            raise KeyboardInterrupt
        return fit(*words, **options)

    monkeypatch.setattr(recover.trainer, "fit", counted)
    with pytest.raises(KeyboardInterrupt):
        trained(model, training, tmp_path / "c")
    assert len(json.loads((tmp_path / "c.search").read_text())["trials"]) == 2 and not (tmp_path / "c").exists()
    again = trained(model, training, tmp_path / "c")
    assert fits == [None] * 4 + [tmp_path / "c"]
    assert again.trained["search"] == whole.trained["search"]
    assert all(torch.equal(a.u, b.u) for a, b in zip(again.shared.ties, whole.shared.ties, strict=True))
    for other in (replace(training, tokens=999), replace(training, lora=2), replace(training, rate=1e-3)):
        with pytest.raises(JournalMismatch, match=r"c\.search is of a search with another"):
            trained(model, other, tmp_path / "c")
    (tmp_path / "c.search").write_text("{")
    with pytest.raises(JournalMismatch, match=r"c\.search holds no trials"):
        trained(model, training, tmp_path / "c")


@pytest.mark.usefixtures("without_optuna")
def test_a_trial_that_diverges_is_not_chosen(
    model: Path, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = recover.trainer.fit

    def diverging(pupils: Any, *words: Any, **options: Any) -> Any:
        if pupils[0].rate == 5e-3:
            raise Diverged("too high")
        return fit(pupils, *words, **options)

    monkeypatch.setattr(recover.trainer, "fit", diverging)
    told = trained(model, training, tmp_path / "c").trained["search"]
    assert told["trials"][0]["loss"] == math.inf and told["chosen"]["rate"] > 5e-3
    assert json.loads((tmp_path / "c.search").read_text())["trials"][0][1] == math.inf


@pytest.mark.usefixtures("without_optuna")
def test_the_command_tells_what_was_chosen_and_leaves_only_the_file(
    model: Path, training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["share", str(model), "-o", str(tmp_path / "a.bayou"), "--blocks", "3", "--rank", "4", "--no-pmr"]
    words += ["--train", str(training.text), "--tokens", "1500", "--search", "2", "--init", "zero", "--json"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    *lines, last = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    chosen = json.loads(last)["training"]["search"]["chosen"]
    assert chosen.keys() == {"rate", "alpha"}  # no PMR, so no start
    shown = f"--rate {chosen['rate']:.3g} --alpha {chosen['alpha']:.3g}"
    assert f"  chosen of 2 trials on 1,500 tokens each: {shown}" in lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bayou", "a.txt"]
    agree(model, tmp_path / "a.bayou", tmp_path / "out")


def test_a_file_holds_what_was_trained_whole(
    model: Path, training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["share", str(model), "-o", str(tmp_path / "a.bayou"), "--blocks", "3", "--rank", "4", "--no-pmr"]
    words += ["--train", str(training.text), "--tokens", "1500", "--init", "zero", "--whole", "--rest-rate", "0.02"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    agree(model, tmp_path / "a.bayou", tmp_path / "out")
    before, after = Checkpoint(model), Checkpoint(tmp_path / "out")
    moved = [name for name in before.names() if not torch.equal(before.read(name), after.read(name))]
    assert sorted(moved) == sorted(before.names())  # norms and embeddings too
    for words, why in ((["--lora", "2", "--whole"], "choose one"), (["--rest-rate", "1e-4"], "the rest be trained")):
        with pytest.raises(SystemExit):
            main(["share", str(model), "-o", str(tmp_path / "b.bayou"), "--train", str(training.text), *words])
        assert why in capsys.readouterr().err


def test_optuna_itself_chooses(model: Path, training: Training, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    told = trained(model, training, tmp_path / "c").trained["search"]
    assert told["trials"][0]["rate"] == 5e-3 and told["trials"][0]["alpha"] == 0.5
    assert len({trial["start"] for trial in told["trials"]}) == 3
    (tmp_path / "c").unlink()
    kept = (tmp_path / "c.search").read_bytes()
    assert trained(model, training, tmp_path / "c").trained["search"] == told
    assert (tmp_path / "c.search").read_bytes() == kept  # all trials were known


def test_a_search_without_optuna_or_text_to_hold_out_is_refused_before_the_work(
    model: Path, training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("bayou.share")
    with monkeypatch.context() as absent:
        absent.setitem(sys.modules, "optuna", None)
        absent.setattr(module, "draw_up", None)
        with pytest.raises(BadInput, match=r"needs optuna: pip install 'bayou\[train\]'"):
            module.share(model, tmp_path / "a.bayou", dial=DIAL, training=training)
    monkeypatch.setattr(tune, "require", lambda: None)
    with pytest.raises(BadInput, match="it fills but one"):
        trained(model, replace(training, tokens=32), tmp_path / "c")
    with pytest.raises(BadInput, match="-1 trials"):
        replace(training, search=-1)
    with pytest.raises(BadInput, match=r"PMR from 1\.5 on"):
        replace(training, start=1.5)
    with pytest.raises(BadInput, match="--pmr-start say how"):
        replace(training, progressive=False, start=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


RIVALS = ("shortgpt", "laco", "laco-code", "jointdrop", "lastlayers")


@pytest.mark.parametrize("method", RIVALS)
def test_rivals_recover_by_the_same_command(
    method: str, model: Path, training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = {"lastlayers": "3e-4"}.get(method, "5e-3")
    words = ["share", str(model), "--method", method, "--reduce", "0.2", "--calibration-tokens", "2048"]
    kept = tmp_path / "plain.bayou.train"
    kept.write_bytes(b"a training that was stopped")
    with pytest.raises(SystemExit) as stop:
        main([*words, "-o", str(tmp_path / "plain.bayou")])
    assert stop.value.code == 0 and kept.exists()  # nobody asked for training: it is not touched
    kept.unlink()
    how = ["--train", str(training.text), "--tokens", "20k", "--alpha", "1", "--rate", rate]
    with pytest.raises(SystemExit) as stop:
        main([*words, "-o", str(tmp_path / "a.bayou"), *how, "--json"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    found = json.loads(last)
    assert found["method"] == method and found["training"]["rate"] == float(rate)
    assert any(line.startswith("  trained on ") for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bayou", "a.txt", "plain.bayou"]
    agree(model, tmp_path / "a.bayou", tmp_path / "out")
    teacher = read_model(model)
    windows = Original(model).windows(training.text, 2048, 64, 0)
    plain, taught = (
        objective.measure(bayou.load(None, tmp_path / f"{name}.bayou"), windows, teacher)[1] for name in ("plain", "a")
    )
    assert taught < 0.95 * plain


def test_a_rivals_training_goes_on_and_leaves_the_rival_as_it_was(
    model: Path, training: Training, tmp_path: Path
) -> None:
    original = Original(model)
    text = original.windows(None, 2048, 64, 0)
    assert text is not None
    for method in ("lastlayers", "laco"):
        rival = baselines.share(method, model, reduce=0.2, windows=text)
        before = {name: value.clone() for name, value in rival.model.state_dict().items()}
        plain = replace(training, search=0, rate=None, tokens=512)
        made, told = train_rival(original, rival, plain, tmp_path / method, lambda *_: None)
        assert told["rate"] == (1e-4 if method == "lastlayers" else 1e-3)
        after = rival.model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
        again, _ = train_rival(original, rival, plain, tmp_path / method, lambda *_: None)
        assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), again.model.parameters(), strict=True))
        assert not all(
            torch.equal(a, b) for a, b in zip(made.model.parameters(), rival.model.parameters(), strict=True)
        )
        other = baselines.share(method, model, reduce=0.4, windows=text)
        with pytest.raises(JournalMismatch):
            train_rival(original, other, plain, tmp_path / method, lambda *_: None)


@pytest.mark.usefixtures("without_optuna")
@pytest.mark.parametrize("method", ["lastlayers", "shortgpt"])
def test_a_search_for_how_a_rival_is_trained_begins_each_trial_anew(
    method: str, model: Path, training: Training, tmp_path: Path
) -> None:
    original = Original(model)
    text = original.windows(None, 2048, 64, 0)
    assert text is not None
    rival = baselines.share(method, model, reduce=0.2, windows=text)
    made, told = train_rival(original, rival, training, tmp_path / "a", lambda *_: None)
    chosen = told["search"]["chosen"]
    assert chosen.keys() == {"rate", "alpha"} and told["alpha"] == chosen["alpha"]
    plain, _ = train_rival(original, rival, replace(training, search=0, **chosen), tmp_path / "b", lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), plain.model.parameters(), strict=True))


@pytest.mark.parametrize("option", [["--no-pmr"], ["--blend"], ["--pmr-start", "0.1"], ["--lora", "4"]], ids=str)
def test_options_of_our_training_are_refused_for_rivals(
    option: list[str], model: Path, training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["share", str(model), "--method", "laco", "-o", str(tmp_path / "a.bayou")]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--train", str(training.text), *option])
    assert stop.value.code == 1 and "say how deltallm is trained" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_text_of_fewer_windows_than_a_batch_is_said(
    model: Path, training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training.text.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 25)  # type: ignore[union-attr]
    one_step = replace(training, search=0, tokens=64 * 32, batch=64)
    for how, asked, said in ((one_step, 64, True), (replace(one_step, tokens=10 * 32), 10, False)):
        steps: list[str] = []
        told = trained(model, how, tmp_path / str(asked), steps).trained
        assert told["windows"] == told["batch"] < 64 and told["batch_asked"] == asked
        assert (told["batch"] < asked) == said
        assert steps[-1].startswith(f"train: {told['batch']} windows a step, all that the text fills, loss") == said
    words = ["share", str(model), "-o", str(tmp_path / "a.bayou"), "--blocks", "3", "--rank", "4", "--init", "zero"]
    with pytest.raises(SystemExit):
        main([*words, "--train", str(training.text), "--tokens", "20k", "--json"])
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)["training"]
    assert found["windows"] == found["batch"] < found["batch_asked"] == 32
    times = found["tokens"] / (found["windows"] * found["length"])
    assert times > 1 and any(line.endswith(f"; the text was taken {times:.1f} times") for line in lines)
    said = f"the text fills {found['windows']} windows of {found['length']} tokens, fewer than the 32 of a step"
    assert any(said in line for line in lines)


@pytest.mark.slow
def test_several_processes_search_and_train_as_one(model: Path, training: Training, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("optuna")
    words = ["share", str(model), "--blocks", "3", "--rank", "4", "--init", "zero", "--train", str(training.text)]
    words += ["--tokens", "8k", "--search", "3", "--json"]
    children = []
    for rank in range(2):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path]),
            "WORLD_SIZE": "2",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29714",
            "ACCELERATE_USE_CPU": "true",
        }
        command = [sys.executable, "-m", "bayou", *words, "-o", str(tmp_path / "a.bayou")]
        children.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    told = [json.loads(child.communicate(timeout=240)[0].splitlines()[-1])["training"] for child in children]
    assert told[0]["search"] == told[1]["search"] and len(told[0]["search"]["trials"]) == 3
    assert told[0]["loss"] == told[1]["loss"] and told[0]["tokens"] == told[1]["tokens"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bayou", "a.txt"]
    agree(model, tmp_path / "a.bayou", tmp_path / "out")
