"""`bayou export`: the adapters that it writes say what the file says, and the numbers on what is lost are right."""

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
from tamper import header_of, snapshot
from torch import Tensor

import bayou
from bayou.calibrate import read_tokenizer
from bayou.cli import main
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput, BayouError, DamagedFile, Unsupported, WrongBase
from bayou.evaluate import evaluate, read_model
from bayou.sharing.layouts import Dial

ROOT = "base_model.model."
IDS = torch.arange(5, 60)[None]


def make(folder: Path, name: str = "llama_gqa", method: str = "lowrank", **tuned: Any) -> Path:
    """A folder with base, tuned and a.bayou, all in fp32, so that what is kept exactly is the same to the last bit."""
    base = pico.pico(name, folder / "base", dtype=torch.float32)
    pico.perturb(base, folder / "tuned", **{"scale": 0.3, **tuned})
    bayou.compress(
        base, folder / "tuned", folder / "a.bayou", method=method, ratio=3, calibration="none", distill_steps=0
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("export"))


def export(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    found = bayou.export(folder / "base", folder / "a.bayou", out, **options)
    json.dumps(found)
    return found


def stored(out: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((out / "adapter_config.json").read_text()), load_file(out / "adapter_model.safetensors")


def product(out: Path, module: str) -> Tensor:
    """What the adapter adds to a module's weight, by PEFT's formula for scales and by vLLM's, which must agree."""
    config, tensors = stored(out)
    a, b = (tensors[f"{ROOT}{module}.lora_{end}.weight"].double() for end in "AB")
    by_key = {
        key: (config["rank_pattern"].get(key, config["r"]), config["alpha_pattern"].get(key, config["lora_alpha"]))
        for key in (module, module.rpartition(".")[2])
    }
    rank, alpha = min(by_key.values())
    assert rank == len(a) == b.shape[1] and alpha / rank == config["lora_alpha"] / config["r"] == 1
    return b @ a


def deltas(folder: Path) -> dict[str, Tensor]:
    """Site -> what the file adds to the base, (out, in) fp64."""
    opened = DeltaFile(folder / "a.bayou")
    return {name: opened.delta(name).materialize() for name in opened.sites}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# ----------------------------------------------------------------------------------------------------- peft


def test_at_its_own_rank_every_linear_is_the_file_s(folder: Path, tmp_path: Path) -> None:
    found = export(folder, tmp_path / "out", dtype="float32")
    config, tensors = stored(tmp_path / "out")
    linears = {name: delta for name, delta in deltas(folder).items() if "proj" in name}
    assert len(linears) == 14 and len(tensors) == 28
    for name, delta in linears.items():
        assert torch.allclose(product(tmp_path / "out", name.removesuffix(".weight")), delta, atol=1e-6), name
    assert config["target_modules"] == sorted({name.split(".")[-2] for name in linears})
    assert config["modules_to_save"] is None and config["lora_bias"] is False
    assert config["base_model_name_or_path"] == str(folder / "base") and config["task_type"] == "CAUSAL_LM"
    assert found["kinds"]["linear"]["energy"] == pytest.approx(1, abs=1e-9)
    low, high = found["kinds"]["linear"]["ranks"]
    assert low < high == found["rank"] == config["r"], "the ranks differ, or the patterns go untested"
    assert found["bytes"] == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize(("dtype", "error"), [("float16", 1e-6), ("bfloat16", 1e-4)])
def test_a_dtype_s_rounding_is_in_the_energy(folder: Path, tmp_path: Path, dtype: str, error: float) -> None:
    found = export(folder, tmp_path / "out", dtype=dtype)
    _, tensors = stored(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    lost = total = 0.0
    for name, delta in deltas(folder).items():
        if "proj" in name:
            lost += float((delta - product(tmp_path / "out", name.removesuffix(".weight"))).square().sum())
            total += float(delta.square().sum())
    assert 0 < lost / total < error
    assert 1 - found["kinds"]["linear"]["energy"] == pytest.approx(lost / total, rel=1e-3)


@pytest.mark.parametrize("method", ["lowrank", "bitdelta", "deltacome"])
def test_a_cut_to_a_rank_is_the_best_and_its_energy_that_of_the_spectrum(tmp_path: Path, method: str) -> None:
    folder = make(tmp_path / "in", method=method)
    found = export(folder, tmp_path / "out", rank=5, dtype="float32")
    kept, total, left = 0.0, 0.0, {"embedding": 0.0, "head": 0.0}
    for name, delta in deltas(folder).items():
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        if "proj" in name:
            kept, total = kept + float(s[:5].square().sum()), total + float(s.square().sum())
            best = (u[:, :5] * s[:5]) @ v[:5]
            assert torch.allclose(product(tmp_path / "out", name.removesuffix(".weight")), best, atol=1e-5), name
        else:
            left["head" if "lm_head" in name else "embedding"] += float(s.square().sum())
    kinds = found["kinds"]
    assert kinds["linear"]["ranks"] == [5, 5] and kinds["linear"]["how"] == "LoRA"
    assert kinds["linear"]["energy"] == pytest.approx(kept / total, rel=1e-6)
    base, tuned = (load_file(folder / side / "model.safetensors") for side in ("base", "tuned"))
    norms = sum(float((tuned[name] - base[name]).double().square().sum()) for name in base if "norm" in name)
    for kind, energy in (*left.items(), ("norm", norms)):
        names = [name for name in base if {"embedding": "embed", "head": "lm_head", "norm": "norm"}[kind] in name]
        size = sum(float(base[name].double().square().sum()) for name in names)
        assert kinds[kind]["energy"] == 0 and kinds[kind]["how"] == "left out" and kinds[kind]["tensors"] == len(names)
        assert kinds[kind]["relative"] == pytest.approx((energy / size) ** 0.5, rel=1e-5)
    assert found["energy"] == pytest.approx(kept / (total + sum(left.values()) + norms), rel=1e-6)


def test_what_is_stored_element_by_element_needs_a_rank(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", method="bitdelta")
    with pytest.raises(BadInput, match=r"stored element by element \(bitdelta\).* give one with --rank, 1 to 64"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = export(folder, tmp_path / "out", rank=10**6, dtype="float32")
    assert found["rank"] == 64 and found["kinds"]["linear"]["energy"] == pytest.approx(1, abs=1e-9)


PAIRS = [("llama_gqa", "full"), ("llama_tied", "full"), ("llama_tied", "lora"), ("qwen2", "full"), ("gpt2", "full")]
PAIRS += [("gemma3", "full"), ("phi3", "lora"), ("llava", "full")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "embeddings"), PAIRS)
def test_peft_over_the_base_computes_as_the_restored_fine_tune(tmp_path: Path, name: str, embeddings: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    folder = make(tmp_path / "in", name)
    if embeddings == "lora":  # then norms cannot be the only thing that is not carried: give them the base's values
        tensors, base = (load_file(folder / side / "model.safetensors") for side in ("tuned", "base"))
        same = {n: base[n] if t.ndim < 2 else t for n, t in tensors.items()}
        save_file(same, folder / "tuned" / "model.safetensors")
        (folder / "a.bayou").unlink()
        bayou.compress(folder / "base", folder / "tuned", folder / "a.bayou", ratio=3, calibration="none")
    found = export(folder, tmp_path / "out", dtype="float32", embeddings=embeddings, exact=embeddings == "full")
    assert found["energy"] == pytest.approx(1, abs=0.01 if name == "llava" else 1e-9)
    kind = transformers.AutoModelForImageTextToText if name == "llava" else transformers.AutoModelForCausalLM
    model = peft.PeftModel.from_pretrained(kind.from_pretrained(folder / "base", dtype=torch.float32), tmp_path / "out")
    bayou.restore(folder / "base", folder / "a.bayou", tmp_path / "restored")
    restored = logits(kind.from_pretrained(tmp_path / "restored", dtype=torch.float32))
    plain = logits(kind.from_pretrained(folder / "base", dtype=torch.float32))
    assert torch.allclose(logits(model), restored, atol=2e-4)
    assert (plain - restored).abs().max() > 0.1, "the adapter has nothing to do"


def test_the_kl_is_that_of_base_and_adapter_to_the_fine_tune(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Every number of this text counts.\n" * 3)
    found = export(folder, tmp_path / "cut", rank=4, data=tmp_path / "a.txt")
    model = read_model(folder / "base")
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data += product(tmp_path / "cut", name.removesuffix(".weight")).float()
    tokenizer = read_tokenizer(folder / "tuned")
    bayou.restore(folder / "base", folder / "a.bayou", tmp_path / "restored")
    expected = evaluate(read_model(tmp_path / "restored"), model, tokenizer, tmp_path / "a.txt")
    assert found["data"]["kl"] == pytest.approx(expected["kl"], rel=1e-4) and expected["kl"] > 1e-3
    whole = {"dtype": "float32", "embeddings": "full", "exact": True}
    assert export(folder, tmp_path / "whole", data=tmp_path / "a.txt", **whole)["data"]["kl"] < 1e-6
    (tmp_path / "b.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(BadInput, match='"answer" must be a string'):
        export(folder, tmp_path / "none", data=tmp_path / "b.jsonl")
    assert not (tmp_path / "none").exists()


def test_what_vllm_takes(folder: Path, tmp_path: Path) -> None:
    assert export(folder, tmp_path / "a", rank=9)["vllm"] == {"max_lora_rank": 16, "objections": []}
    assert export(folder, tmp_path / "b", rank=8)["vllm"]["max_lora_rank"] == 8
    found = export(folder, tmp_path / "c", embeddings="full")["vllm"]
    assert found["max_lora_rank"] is None and "modules_to_save" in found["objections"][0]
    wide = tmp_path / "wide"
    base = pico.pico(
        "llama_gqa", wide / "base", hidden_size=520, intermediate_size=528, head_dim=16, num_hidden_layers=1
    )
    pico.perturb(base, wide / "tuned")
    bayou.compress(base, wide / "tuned", wide / "a.bayou", method="bitdelta", distill_steps=0, calibration="none")
    found = export(wide, tmp_path / "d", rank=513)
    assert found["rank"] == 513 and found["vllm"]["objections"] == [
        "rank 513 is over its limit of 512 (give --rank 512)"
    ]


def test_new_tokens_are_lost_and_said_to_be_unless_the_tables_go_whole(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", grow_vocab=3)
    found = export(folder, tmp_path / "out")
    assert found["new_rows"] == 3 and any("3 tokens that the fine-tune added are lost" in w for w in found["warnings"])
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(BadInput, match="3 tokens more than the base"):
        export(folder, tmp_path / "none", data=tmp_path / "a.txt")
    found = export(folder, tmp_path / "full", embeddings="full", exact=True, data=tmp_path / "a.txt", dtype="float32")
    assert found["new_rows"] == 0 and found["data"]["kl"] < 1e-6
    assert any("call resize_token_embeddings(131) on the base" in warning for warning in found["warnings"])
    config, tensors = stored(tmp_path / "full")
    assert {"lm_head", "model.embed_tokens"} < set(config["modules_to_save"])
    tuned = load_file(folder / "tuned" / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(tensors[f"{ROOT}model.embed_tokens.weight"][128:], tuned[128:])
    assert (tmp_path / "full" / "tokenizer.json").is_file() and not (tmp_path / "full" / "config.json").exists()


def test_a_head_that_was_tied_is_a_change_of_its_own(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "llama_tied", untie=True)
    export(folder, tmp_path / "out", embeddings="lora", rank=64, dtype="float32")
    base, tuned = (load_file(folder / side / "model.safetensors") for side in ("base", "tuned"))
    opened = DeltaFile(folder / "a.bayou")
    wanted = opened.delta("lm_head.weight").restore(base["model.embed_tokens.weight"], torch.float32)
    assert torch.allclose(
        product(tmp_path / "out", "lm_head").float(), wanted - base["model.embed_tokens.weight"], atol=1e-5
    )
    assert (wanted - tuned["lm_head.weight"]).norm() < tuned["lm_head.weight"].norm() * 0.3


def test_layers_that_did_not_change_are_no_targets_and_exact_matrices_are(tmp_path: Path) -> None:
    folder = make(tmp_path / "in")
    tensors, base = (load_file(folder / side / "model.safetensors") for side in ("tuned", "base"))
    name = "model.layers.0.self_attn.q_proj"
    save_file({**tensors, f"{name}.weight": base[f"{name}.weight"]}, folder / "tuned" / "model.safetensors")
    keep = "model.layers.1.self_attn.q_proj.weight"
    bayou.compress(folder / "base", folder / "tuned", folder / "a.bayou", ratio=2, calibration="none", keep=(keep,))
    found = export(folder, tmp_path / "out", rank=64, dtype="float32")
    config, stored_tensors = stored(tmp_path / "out")
    assert found["kinds"]["linear"]["tensors"] == 13 and f"{ROOT}{name}.lora_A.weight" not in stored_tensors
    assert len(config["target_modules"]) == 13 and name not in config["target_modules"]
    assert torch.allclose(product(tmp_path / "out", keep[:-7]).float(), tensors[keep] - base[keep], atol=1e-5)


def test_a_bias_that_changed_alone_goes_with_a_lora_that_does_nothing(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "qwen2")
    tensors, base = (load_file(folder / side / "model.safetensors") for side in ("tuned", "base"))
    module = "model.layers.0.self_attn.q_proj"
    save_file({**tensors, f"{module}.weight": base[f"{module}.weight"]}, folder / "tuned" / "model.safetensors")
    (folder / "a.bayou").unlink()
    bayou.compress(folder / "base", folder / "tuned", folder / "a.bayou", ratio=3, calibration="none")
    found = export(folder, tmp_path / "out", exact=True)
    config, stored_tensors = stored(tmp_path / "out")
    assert config["lora_bias"] and found["vllm"]["objections"][-1] == "it refuses changes of biases (--exact)"
    assert not product(tmp_path / "out", module).any()
    bias = stored_tensors[f"{ROOT}{module}.lora_B.bias"]
    assert torch.equal(bias, tensors[f"{module}.bias"] - base[f"{module}.bias"]) and bias.any()
    assert not stored_tensors[f"{ROOT}model.layers.0.mlp.up_proj.lora_B.bias"].any()
    assert found["kinds"]["bias"] == {**found["kinds"]["bias"], "tensors": 6, "how": "exact", "energy": 1}


def test_experts_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = make(tmp_path / "in", "mixtral")
    kinds = export(folder, tmp_path / "out", rank=4)["kinds"]
    assert kinds["expert"] == {**kinds["expert"], "tensors": 24, "how": "left out", "energy": 0, "ranks": None}
    wanted = sum(float(delta.square().sum()) for name, delta in deltas(folder).items() if "experts" in name)
    base = load_file(folder / "base" / "model.safetensors")
    size = sum(float(tensor.double().square().sum()) for name, tensor in base.items() if "experts" in name)
    assert kinds["expert"]["relative"] == pytest.approx((wanted / size) ** 0.5, rel=1e-5)
    assert kinds["linear"]["tensors"] == 8


def test_a_changed_config_is_said(tmp_path: Path) -> None:
    folder = make(tmp_path / "in")
    for name, key, value in (("config.json", "rope_parameters", None), ("generation_config.json", "eos_token_id", 7)):
        config = json.loads((folder / "tuned" / name).read_text())
        config[key] = value or {**config[key], "rope_theta": 5e5}
        (folder / "tuned" / name).write_text(json.dumps(config))
    bayou.compress(folder / "base", folder / "tuned", folder / "b.bayou", ratio=3, calibration="none")
    found = bayou.export(folder / "base", folder / "b.bayou", tmp_path / "out")
    changed = "config.json rope_parameters.rope_theta, generation_config.json eos_token_id"
    assert found["warnings"] == [f"the base's settings stay in force where the fine-tune has others: {changed}"]
    assert export(folder, tmp_path / "same")["warnings"] == []


# -------------------------------------------------------------------------------------------------- failing


def test_a_shared_model_is_refused_with_the_way_out(folder: Path, tmp_path: Path) -> None:
    model = pico.pico("llama_gqa", tmp_path / "model", num_hidden_layers=4)
    dial = Dial(layout="sequential", count=1, rank=4, keep_ends=1)
    bayou.share(model, tmp_path / "s.bayou", dial=dial, calibration="none")
    with pytest.raises(Unsupported, match=r"whole model of its own .* bayou restore .*s\.bayou -o FOLDER"):
        bayou.export(folder / "base", tmp_path / "s.bayou", tmp_path / "out")


def test_options_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"to": "lora"}, "choose peft or gguf-lora"),
        ({"dtype": "int8"}, "choose peft or gguf-lora, float32"),
        ({"rank": 0}, "--rank 0: a LoRA has rank 1 at least"),
        ({"embeddings": "some"}, "--embeddings some: choose leave, lora, full"),
        ({"device": "cuda:99"}, "--device cuda:99 cannot be used here"),
    ):
        with pytest.raises(BadInput, match=message):
            export(folder, tmp_path / "out", **options)
    with pytest.raises(
        BadInput, match=r"no changes of biases beside a LoRA of an embedding .*choose --embeddings full"
    ):
        export(make(tmp_path / "in", "qwen2"), tmp_path / "out", exact=True, embeddings="lora")


def test_what_is_there_is_never_overwritten_and_a_wrong_base_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    export(folder, tmp_path / "out")
    before = snapshot(tmp_path)
    for out in (tmp_path / "out", tmp_path / "file", folder / "base"):
        with pytest.raises(BadInput, match="exists and holds a model"):
            export(folder, out)
    with pytest.raises(BadInput, match=r"file exists; choose another file"):
        export(folder, tmp_path / "file", to="gguf-lora")
    with pytest.raises(WrongBase):
        bayou.export(folder / "tuned", folder / "a.bayou", tmp_path / "new")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("to", ["peft", "gguf-lora"])
def test_damage_and_a_full_disk_leave_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    if to == "gguf-lora":
        pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")
    content = bytearray((folder / "a.bayou").read_bytes())
    header, start = header_of(bytes(content))
    name = "model.layers.1.self_attn.v_proj.weight"
    content[start + header[name]["data_offsets"][1] - 20] ^= 1
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.bayou").write_bytes(content)
    shutil.copytree(folder / "base", tmp_path / "bad" / "base")
    with pytest.raises(DamagedFile):
        export(tmp_path / "bad", tmp_path / "out", to=to)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BayouError, match="no space left to write"):
        export(folder, tmp_path / "out", to=to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "export",
        str(folder / "base"),
        str(folder / "a.bayou"),
        "-o",
        str(tmp_path / "out"),
        "--rank",
        "8",
        "--json",
    ]
    with pytest.raises(SystemExit) as stop:
        main(words)
    shown = capsys.readouterr().out
    found = json.loads(shown.splitlines()[-1])
    assert not stop.value.code and found["rank"] == 8 and (tmp_path / "out" / "adapter_config.json").is_file()
    assert "left out" in shown and "--max-lora-rank 8" in shown
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 1 and json.loads(capsys.readouterr().out.splitlines()[-1])["error"] == "BadInput"
