"""bayou share: write, verify, restore and load shared models of several architectures; what is dropped; quantised."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import independent_reader
import pico
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_independent_reader import bits, same

import bayou
from bayou import report
from bayou import share as share_function
from bayou.checkpoint import Checkpoint
from bayou.cli import main
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput, JournalMismatch, Unsupported
from bayou.share import Draft, Training, dense, draw_up, methods, own_gpu, train
from bayou.sharing import Shared, Tie
from bayou.sharing.layouts import Dial
from bayou.sharing.original import Original
from bayou.sharing.sharedfile import write
from bayou.sharing.ties import INITIALISATIONS

IDS = torch.randint(5, 100, (2, 24), generator=torch.Generator().manual_seed(0))
FEW: dict[str, Any] = {"tokens": 2048, "length": 64}
KINDS = ["sliding_attention", "full_attention"] * 3
NAMES: dict[str, dict[str, Any]] = {"llama_gqa": {}, "qwen2": {}, "phi3": {}, "gemma3": {"layer_types": KINDS}}
GATE = "model.layers.{}.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: pico.pico(name, root / name, num_hidden_layers=6, **more) for name, more in NAMES.items()}


@pytest.fixture
def model(models: dict[str, Path]) -> Path:
    return models["llama_gqa"]


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def agree(folder: Path, file: Path, out: Path, tolerance: float = 1e-4) -> dict[str, torch.Tensor]:
    """The tensors restored; the file is sound, and loaded it computes the same, and the second reader reads it so."""
    report.verify(file)
    bayou.restore(None, file, out)
    tensors, found = load_file(out / "model.safetensors"), independent_reader.restore(file)
    assert sorted(found) == sorted(tensors) and all(same(found[n], bits(t)) for n, t in tensors.items())
    shutil.rmtree(out)
    bayou.restore(None, file, out, dtype="float32")
    restored = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    wanted = logits(restored)
    for loaded in (bayou.load(None, file), bayou.load(folder, file)):
        assert (logits(loaded) - wanted).norm() <= tolerance * wanted.norm()
    return tensors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kinds", ["mlp", "all"])
def test_shared_models_are_whole(name: str, kinds: str, models: dict[str, Path], tmp_path: Path) -> None:
    made = share_function(models[name], tmp_path / "a.bayou", dial=Dial(kinds=kinds, count=1, rank=6), **FEW)
    agree(models[name], tmp_path / "a.bayou", tmp_path / "out")
    assert made.bytes == (tmp_path / "a.bayou").stat().st_size
    assert made.original == sum(t.numel() for t in load_file(models[name] / "model.safetensors").values())
    assert made.parameters == report.inspect(tmp_path / "a.bayou")["parameters"] < made.original
    assert made.ties > 0 and made.dropped == 0 and made.removed < made.removed_of_layers


@pytest.mark.parametrize("how", INITIALISATIONS)
def test_every_initialisation_is_written_as_it_is(how: str, model: Path, tmp_path: Path) -> None:
    draft = draw_up(model, dial=Dial(layout="sequential", count=1, rank=5), initialisation=how, **FEW)
    write(draft.original, draft.shared, tmp_path / "a.bayou", tensors=draft.tensors)
    bayou.restore(None, tmp_path / "a.bayou", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    own = Checkpoint(model)
    assert len(draft.shared.ties) == 3 and len(draft.tensors) == (3 if how == "als" else 0)
    for tie in draft.shared.ties:
        wanted = tie.u @ tie.v
        assert (tie.reference is None) == (how == "no-base")
        if tie.reference is not None:
            anchor = draft.tensors.get(tie.reference, own.read(tie.reference))
            assert torch.equal(found[tie.reference], anchor)
            wanted = wanted + tie.gain * anchor.float()
        assert (found[tie.tensor].float() - wanted).norm() < 0.01 * wanted.norm()
    changed = {tie.tensor for tie in draft.shared.ties} | set(draft.tensors)
    assert all(torch.equal(found[name], own.read(name)) for name in set(own.names()) - changed)


def test_dropped_sub_layers_are_zeros_that_cost_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["qwen2"]
    gone = ("model.layers.2.mlp", "model.layers.3.self_attn")
    made = write(model, Shared((), gone), tmp_path / "a.bayou")
    tensors = agree(model, tmp_path / "a.bayou", tmp_path / "out")
    opened = DeltaFile(tmp_path / "a.bayou")
    assert all(opened.entry_nbytes(name) == 0 for name in opened.sites) and len(opened.sites) == 7
    assert not any(tensors[name].any() for name in tensors if name.startswith(gone))
    biases = 64 + 32 + 32
    matrices = 3 * 96 * 64 + 2 * 64 * 64 + 2 * 32 * 64
    assert made.original - made.parameters == matrices and made.dropped == 2 and biases < matrices


def test_a_matrix_with_no_like_is_dropped_by_a_term_of_nothing(tmp_path: Path) -> None:
    model = pico.pico("llama_gqa", tmp_path / "m", num_hidden_layers=1)
    write(model, Shared((), ("model.layers.0.mlp",)), tmp_path / "a.bayou")
    tensors = agree(model, tmp_path / "a.bayou", tmp_path / "out")
    assert not any(tensors[f"model.layers.0.mlp.{leaf}_proj.weight"].any() for leaf in ("gate", "up", "down"))
    assert DeltaFile(tmp_path / "a.bayou").entry_nbytes(GATE.format(0)) < 600


def test_factors_of_no_rank_over_no_base_are_zeros(model: Path, tmp_path: Path) -> None:
    write(model, Shared((tie(GATE.format(3), None, rank=0),)), tmp_path / "a.bayou")
    tensors = agree(model, tmp_path / "a.bayou", tmp_path / "out")
    assert not tensors[GATE.format(3)].any() and tensors[GATE.format(2)].any()


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3"])
def test_a_block_dropped_whole_is_no_layer(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    draft = draw_up(models[name], dial=Dial(layout="sequential", count=1, rank=4, keep_ends=1), **FEW)
    assert {tie.tensor.split(".")[2] for tie in draft.shared.ties} == {"4"}
    gone = ("model.layers.2.mlp", "model.layers.2.self_attn")
    write(models[name], Shared(draft.shared.ties, gone), tmp_path / "a.bayou")
    tensors = agree(models[name], tmp_path / "a.bayou", tmp_path / "out")
    own = load_file(models[name] / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 5 and GATE.format(5) not in tensors
    assert torch.equal(tensors[GATE.format(4)], own[GATE.format(5)])
    assert not torch.equal(tensors[GATE.format(3)], own[GATE.format(4)])
    if name == "gemma3":
        assert config["layer_types"] == KINDS[:2] + KINDS[3:]


def test_kinds_of_layer_that_follow_from_a_period_outlive_a_removed_block(tmp_path: Path) -> None:
    model = pico.pico("gemma3", tmp_path / "m", num_hidden_layers=6, layer_types=KINDS)
    config = json.loads((model / "config.json").read_text())
    del config["layer_types"], config["_sliding_window_pattern"]
    (model / "config.json").write_text(json.dumps(config | {"sliding_window_pattern": 2}))
    assert transformers.AutoConfig.from_pretrained(model).layer_types == KINDS
    gone = ("model.layers.2.mlp", "model.layers.2.self_attn")
    write(model, Shared((), gone), tmp_path / "a.bayou")
    agree(model, tmp_path / "a.bayou", tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").layer_types == KINDS[:2] + KINDS[3:]


@pytest.mark.parametrize("options", [{"anchor_bits": 8}, {"anchor_bits": 4, "delta_method": "deltacome"}], ids=str)
def test_anchors_are_quantised_once_for_all_their_users(options: dict[str, Any], model: Path, tmp_path: Path) -> None:
    dial = Dial(layout="sequential", count=2, rank=8, keep_ends=1)
    plain = share_function(model, tmp_path / "a.bayou", dial=dial, **FEW)
    made = share_function(model, tmp_path / "b.bayou", dial=dial, **options, **FEW)
    tensors = agree(model, tmp_path / "b.bayou", tmp_path / "out", 2e-2)
    opened, own = DeltaFile(tmp_path / "b.bayou"), Checkpoint(model)
    anchor, users = GATE.format(2), [GATE.format(3), GATE.format(4)]
    assert [site.anchor for name, site in opened.sites.items() if name in users] == [anchor, anchor]
    assert opened.sites[anchor].reference is None and opened.sites[anchor].terms[0].kind == "Dense"
    assert made.bytes < plain.bytes and made.parameters == plain.parameters
    error = (tensors[anchor].float() - own.read(anchor).float()).norm() / own.read(anchor).float().norm()
    assert 0 < error < 0.02 * 2 ** (8 - options["anchor_bits"])


@pytest.mark.parametrize("how", ["zero", "svd"])
def test_anchors_are_calibrated_whatever_the_deltas_start_from(how: str, model: Path, tmp_path: Path) -> None:
    dial, files = Dial(blocks=(3,), rank=4), []
    for calibration in (None, "none"):
        out = tmp_path / f"{calibration}.bayou"
        options: dict[str, Any] = {"initialisation": how, "anchor_bits": 3, "calibration": calibration}
        share_function(model, out, dial=dial, **options, **FEW)
        files.append(DeltaFile(out))
    assert files[0].read_raw(GATE.format(2)) != files[1].read_raw(GATE.format(2))


def test_a_way_of_storing_that_there_is_not_is_refused_before_the_work(model: Path, tmp_path: Path) -> None:
    training = Training(tmp_path / "absent.txt")
    for options in ({"anchor_bits": 9}, {"delta_method": "magic"}, {"delta_options": {"bits": 77}}):
        with pytest.raises(BadInput, match=r"--anchor-bits 9|magic|bits"):
            share_function(model, tmp_path / "a.bayou", training=training, **options, **FEW)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [".hidden", "w[3]", "self:w"])
def test_names_that_the_format_uses_itself_are_refused(model: Path, tmp_path: Path, name: str) -> None:
    bad = shutil.copytree(model, tmp_path / "bad")
    save_file(load_file(model / "model.safetensors") | {name: torch.ones(40, 40)}, bad / "model.safetensors")
    with pytest.raises(Unsupported, match="has a meaning of its own in a .bayou file; rename it"):
        write(bad, Shared(()), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_plain_quantisation_is_a_shared_model_without_ties(model: Path, tmp_path: Path) -> None:
    linears = dense(model, tmp_path / "a.bayou", bits=4, **FEW)
    everything = dense(model, tmp_path / "b.bayou", bits=4, quantise="all", **FEW)
    nearest = dense(model, tmp_path / "c.bayou", bits=4, calibration="none")
    assert everything.bytes < linears.bytes == nearest.bytes and linears.parameters == linears.original
    agree(model, tmp_path / "b.bayou", tmp_path / "out", 2e-2)
    opened = DeltaFile(tmp_path / "b.bayou")
    assert opened.sites["lm_head.weight"].terms[0].parts[0][1] == "8g128"
    exact = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    text = Original(model).windows(None, 512, 64, 0)
    wanted = logits(exact, text)
    lost = {n: float((logits(bayou.load(None, tmp_path / f"{n}.bayou"), text) - wanted).norm()) for n in "ac"}
    words = ["share", str(model), "-o", str(tmp_path / "d.bayou"), "--method", "dense", "--anchor-bits", "4"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--calibration-tokens", "2048", "--length", "64"])
    assert stop.value.code == 0 and (tmp_path / "d.bayou").read_bytes() == (tmp_path / "a.bayou").read_bytes()
    assert lost["a"] < lost["c"]  # GPTQ, on text like that it was calibrated on, and rounding to nearest


def test_a_search_reaches_its_goal_and_keeps_anchors_whole(model: Path, tmp_path: Path) -> None:
    dial = Dial(kinds="all", reduce=0.25)
    made = share_function(model, tmp_path / "a.bayou", plan="search", dial=dial, **FEW)
    agree(model, tmp_path / "a.bayou", tmp_path / "out")
    assert made.removed >= 0.25
    again = share_function(model, tmp_path / "b.bayou", plan="search", dial=dial, **FEW)
    assert again.bytes == made.bytes and (tmp_path / "a.bayou").read_bytes() == (tmp_path / "b.bayou").read_bytes()
    with pytest.raises(BadInput, match=r"--reduce 0\.9: .*all that may go"):
        share_function(model, tmp_path / "c.bayou", plan="search", dial=Dial(reduce=0.9), **FEW)
    with pytest.raises(BadInput, match="measures the loss on text"):
        share_function(model, tmp_path / "c.bayou", plan="search", calibration="none")


def tie(tensor: str, reference: str | None, gain: float = 1.0, rank: int = 2, fill: float = 0.1) -> Tie:
    return Tie(tensor, reference, gain, torch.full((96, rank), fill), torch.full((rank, 64), fill))


WRONG: dict[str, tuple[Shared, str]] = {
    "twice": (Shared((tie(GATE.format(3), GATE.format(2)),) * 2), "tied twice"),
    "a chain": (Shared((tie(GATE.format(3), GATE.format(2)), tie(GATE.format(2), GATE.format(1)))), "tied, dropped or"),
    "to nothing": (Shared((tie(GATE.format(3), "x"),)), "tied, dropped or absent"),
    "no linear": (Shared((tie("model.norm.weight", None),)), "is no linear"),
    "a shape": (Shared((tie("model.layers.3.mlp.down_proj.weight", None),)), "the factors of"),
    "another shape": (Shared((tie(GATE.format(3), "model.layers.2.mlp.down_proj.weight"),)), "is tied to"),
    "an anchor that is a norm": (Shared((tie(GATE.format(3), "model.norm.weight"),)), "no linear of its shape"),
    "NaN": (Shared((tie(GATE.format(3), None, fill=float("nan")),)), "NaN"),
    "tied and dropped": (Shared((tie(GATE.format(3), None),), ("model.layers.3.mlp",)), "is tied and dropped"),
    "a dropped anchor": (Shared((tie(GATE.format(3), GATE.format(2)),), ("model.layers.2.mlp",)), "tied, dropped or"),
    "no sub-layer": (Shared((), ("model.layers.3",)), "is no sub-layer"),
    "dropped twice": (Shared((), ("model.layers.3.mlp",) * 2), "dropped twice"),
}


@pytest.mark.parametrize(("shared", "message"), WRONG.values(), ids=WRONG)
def test_a_plan_that_does_not_fit_is_refused(shared: Shared, message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        write(model, shared, tmp_path / "a.bayou")
    assert list(tmp_path.iterdir()) == []


def test_options_that_do_not_fit_are_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.bayou"
    refused: list[tuple[dict[str, Any], str]] = [
        ({"initialisation": "magic"}, "--init magic"),
        ({"plan": "luck"}, "--plan luck"),
        ({"method": "magic"}, "no sharing method 'magic'"),
        ({"anchor_bits": 9}, "--anchor-bits 9"),
        ({"quantise": "all"}, "needs --anchor-bits"),
        ({"delta_method": "magic"}, "no method 'magic'"),
        ({"plan": "search"}, "leave out --layout, --count"),
        ({"plan": "search", "dial": Dial(rank=4), "initialisation": "svd"}, "leave out --init svd"),
        ({"plan": "search", "dial": Dial(rank=99)}, "rank 99 is too large"),
        ({"plan": "search", "dial": Dial(keep_ends=-1)}, "--keep-ends -1"),
        ({"method": "shortgpt"}, "--method shortgpt takes --reduce"),
        ({"method": "shortgpt", "dial": Dial(), "anchor_bits": 4}, "--method shortgpt takes --reduce"),
        ({"method": "lastlayers", "dial": None, "delta_method": "deltacome"}, "--method lastlayers takes --reduce"),
        ({"method": "laco", "dial": None, "quantise": "all"}, "--method laco takes --reduce"),
        ({"method": "dense", "anchor_bits": 4}, "dense shares nothing"),
        ({"method": "dense", "dial": None}, "needs --anchor-bits"),
        ({"method": "dense", "dial": None, "anchor_bits": 4, "initialisation": "svd"}, "dense shares nothing"),
        ({"method": "dense", "dial": None, "anchor_bits": 4, "training": Training("x")}, "dense shares nothing"),
        ({"method": "dense", "dial": None, "anchor_bits": 4, "quantise": "anchors"}, "no anchors; choose linears"),
        ({"method": "dense", "dial": None, "anchor_bits": 9}, "--anchor-bits 9"),
    ]
    for options, message in refused:
        with pytest.raises(BadInput, match=message):
            share_function(model, out, **{"dial": Dial(count=1, rank=4)} | options, **FEW)
    for wrong in ({"alpha": 1.5}, {"rate": 0.0}, {"lora": -1}, {"batch": 0}, {"tokens": 0}):
        with pytest.raises(BadInput, match="cannot train with"):
            Training("x", **wrong)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="stands for no tensor"):
        write(model, Shared(()), out, tensors={"x": torch.zeros(1)})
    with pytest.raises(BadInput, match="is not a folder"):
        write(model, Shared(()), tmp_path / "no" / "a.bayou")
    with pytest.raises(BadInput, match="all layers are dropped"):
        subs = [f"model.layers.{i}.{part}" for i in range(6) for part in ("mlp", "self_attn")]
        write(model, Shared((), tuple(subs)), out)
    with pytest.raises(Unsupported, match="expert"):
        write(pico.pico("mixtral", tmp_path / "experts"), Shared(()), out)
    assert not out.exists() and methods()[0] == "deltallm"


def test_the_command_prints_what_is_in_the_file(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["share", str(model), "-o", str(tmp_path / "a.bayou"), "--blocks", "3", "--rank", "4", "--bits", "8"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--calibration-tokens", "512", "--length", "64", "--json"])
    assert stop.value.code == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["bytes"] == (tmp_path / "a.bayou").stat().st_size and f"{found['bytes']:,} bytes" in lines[0]
    assert found["parameters"] == report.inspect(tmp_path / "a.bayou")["parameters"] and found["ties"] == 3
    assert f"{found['parameters']:,} parameters of {found['original']:,}" in lines[1]
    for bad, message in (
        (["--blocks", "three"], "--blocks three"),
        (["--layout", "x"], "--layout x"),
        (["--tokens", "4096"], "--calibration-tokens"),
        (["--train", "a.txt", "--blend", "--no-pmr"], "leave out --no-pmr"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["share", str(model), "-o", str(tmp_path / "b.bayou"), *bad])
        assert stop.value.code == 1 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "a.bayou")])
    assert "base: none" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_training_changes_factors_and_gains_alone(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog.\n\n" * 200)
    training = Training(tmp_path / "a.txt", tokens=20 * 4 * 32, batch=4, length=32, rate=5e-3)
    dial = Dial(count=1, rank=6)
    plain = share_function(models[name], tmp_path / "a.bayou", dial=dial, **FEW)
    made = share_function(models[name], tmp_path / "b.bayou", dial=dial, training=training, **FEW)
    assert made.parameters == plain.parameters and sorted(p.name for p in tmp_path.iterdir()) == [
        "a.bayou",
        "a.txt",
        "b.bayou",
    ]
    tensors = agree(models[name], tmp_path / "b.bayou", tmp_path / "out")
    before, after = DeltaFile(tmp_path / "a.bayou"), DeltaFile(tmp_path / "b.bayou")
    assert all(torch.equal(after.read_exact(name), before.read_exact(name)) for name in before.exact)
    assert all(bytes(after.read_raw(name)) != bytes(before.read_raw(name)) for name in before.sites)
    assert all(after.sites[name].gain != before.sites[name].gain for name in before.sites)
    assert made.training["tokens"] == 20 * 4 * 32 and made.training["returns"] == 0 and not plain.training
    assert made.training["loss"] == pytest.approx((made.training["ce"] + made.training["kl"]) / 2, abs=1e-5)
    own = load_file(models[name] / "model.safetensors")
    assert all(torch.equal(tensors[n], own[n]) for n in own if n not in before.sites)


def test_processes_that_train_together_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_gpu("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (own_gpu("cuda"), own_gpu("cuda:0"), own_gpu("cpu")) == ("cuda:1", "cuda:0", "cpu")


def test_lora_on_the_rest_is_merged_into_the_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog.\n\n" * 200)
    training = Training(tmp_path / "a.txt", tokens=512, batch=4, length=32, rate=5e-3, lora=2, progressive=False)
    share_function(model, tmp_path / "b.bayou", dial=Dial(count=1, rank=6), training=training, **FEW)
    tensors = agree(model, tmp_path / "b.bayou", tmp_path / "out")
    own = load_file(model / "model.safetensors")
    assert not torch.equal(
        tensors["model.layers.0.self_attn.q_proj.weight"], own["model.layers.0.self_attn.q_proj.weight"]
    )
    assert torch.equal(tensors["model.embed_tokens.weight"], own["model.embed_tokens.weight"])


def test_a_stopped_training_goes_on_with_the_same_ties_only(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog.\n\n" * 200)
    training, checkpoint = Training(tmp_path / "a.txt", tokens=512, batch=4, length=32), tmp_path / "c"
    dial = Dial(blocks=(3,), rank=4)

    def trained(dial: Dial, training: Training, how: str = "zero") -> Draft:
        draft = draw_up(model, dial=dial, initialisation=how, **FEW)
        return train(draft, training, checkpoint, lambda *_: None)

    first, again = trained(dial, training), trained(dial, training)
    assert all(torch.equal(a.u, b.u) for a, b in zip(first.shared.ties, again.shared.ties, strict=True))
    for other in (
        (replace(dial, blocks=(2,)), training),
        (dial, replace(training, progressive=False)),
        (dial, replace(training, blend=True)),
        (dial, training, "svd"),
    ):
        with pytest.raises(JournalMismatch, match="is of a training with other"):
            trained(*other)


@pytest.mark.parametrize("method", [m for m in methods() if m not in ("deltallm", "dense", "slicegpt")])
def test_rivals_are_files_of_the_same_kind(method: str, model: Path, tmp_path: Path) -> None:
    made = share_function(model, tmp_path / "a.bayou", method=method, dial=Dial(reduce=0.2), **FEW)
    agree(model, tmp_path / "a.bayou", tmp_path / "out")
    assert made.method == method and 0.05 < made.removed < 0.35
    assert made.parameters == report.inspect(tmp_path / "a.bayou")["parameters"] and made.ratio > 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".bayou")] == []


def test_a_rival_without_a_text_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="measures the model on text"):
        share_function(model, tmp_path / "a.bayou", method="shortgpt", calibration="none")
    assert list(tmp_path.iterdir()) == []
