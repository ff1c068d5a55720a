"""A skeleton filled from disk is the model that transformers loads, on every architecture."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from pico import NAMES, perturb, pico
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bayou import skeleton
from bayou.errors import BadInput, Unsupported

IDS = torch.randint(5, 100, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pico")
    return {name: pico(name, root / name) for name in NAMES}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found.update(load_file(path))
    return found


def pretrained(folder: Path) -> PreTrainedModel:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()


def same_state(model: nn.Module, other: nn.Module) -> None:
    expected = {**dict(other.named_parameters(remove_duplicate=False)), **dict(other.named_buffers())}
    found = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    assert found.keys() == expected.keys()
    for path, tensor in expected.items():
        assert torch.equal(found[path], tensor), path


@pytest.mark.parametrize("name", NAMES)
def test_filled_skeleton_is_the_pretrained_model(name: str, folders: dict[str, Path]) -> None:
    tensors, reference = tensors_of(folders[name]), pretrained(folders[name])
    model = skeleton.build(folders[name])
    assert all(p.device.type == "meta" for p in model.parameters())
    assert not model.training
    places = skeleton.places(model, tensors)
    assert places.keys() == tensors.keys()

    skeleton.fill(model, "", places, tensors.__getitem__)
    same_state(model, reference)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, reference(IDS).logits)

    parameters = dict(reference.named_parameters(remove_duplicate=False))
    for disk_name, place in places.items():
        whole = parameters[place.path]
        part = whole if place.index is None else whole[place.index]
        assert torch.equal(part, tensors[disk_name].float()), disk_name
        for other in place.also:
            assert parameters[other] is whole


@pytest.mark.parametrize("name", NAMES)
def test_layers_come_and_go_one_at_a_time(name: str, folders: dict[str, Path]) -> None:
    tensors, reference = tensors_of(folders[name]), pretrained(folders[name])
    model = skeleton.build(folders[name])
    places = skeleton.places(model, tensors)
    path, layers = skeleton.decoder_layers(model)
    assert len(layers) == 2
    assert path == {"gpt2": "transformer.h"}.get(name, path)

    skeleton.fill(model, "", places, tensors.__getitem__, skip=path)
    assert all(t.device.type == "meta" for t in layers.parameters())
    outside = [t for p, t in model.named_parameters() if not p.startswith(path + ".")]
    assert all(t.device.type == "cpu" for t in outside)

    read: list[str] = []
    skeleton.fill(model, f"{path}.1", places, lambda n: (read.append(n), tensors[n])[1])
    assert read
    assert all(".1." in disk_name for disk_name in read)
    same_state(layers[1], reference.get_submodule(path)[1])
    skeleton.empty(layers[1])
    assert all(t.device.type == "meta" for t in (*layers.parameters(), *layers.buffers()))
    skeleton.fill(model, "", places, tensors.__getitem__)
    same_state(model, reference)


@pytest.mark.parametrize("name", NAMES)
def test_roles_follow_the_modules(name: str, folders: dict[str, Path]) -> None:
    model = skeleton.build(folders[name])
    modules = dict(model.named_modules())
    for disk_name, place in skeleton.places(model, tensors_of(folders[name])).items():
        module, leaf = modules[place.path.rpartition(".")[0]], place.path.rpartition(".")[2]
        assert place.role in ("linear", "embedding", "head", "expert", "norm", "bias", "other")
        assert place.transposed == (isinstance(module, Conv1D) and leaf == "weight"), disk_name
        if leaf == "bias":
            assert place.role == "bias"
        elif isinstance(module, (nn.Linear, Conv1D)):
            assert place.role == ("head" if "lm_head" in place.path else "linear")
        elif "norm" in type(module).__name__.lower():
            assert place.role == "norm"
        elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
            assert place.role == "other"
        assert ("experts" in disk_name) == (place.role == "expert")
    roles = [place.role for place in skeleton.places(model, tensors_of(folders[name])).values()]
    assert roles.count("embedding") == 1


def test_positions_are_not_an_embedding(folders: dict[str, Path]) -> None:
    for name, table in (("gpt2", "transformer.wpe.weight"), ("llava", "position_embedding")):
        places = skeleton.places(skeleton.build(folders[name]), tensors_of(folders[name]))
        assert [place.role for disk, place in places.items() if table in disk] == ["other"]


def test_an_expert_is_found_without_its_neighbours(folders: dict[str, Path]) -> None:
    model = skeleton.build(folders["mixtral"])
    name = "model.layers.1.block_sparse_moe.experts.2."
    places = skeleton.places(model, [name + "w3.weight", name + "w2.weight"])
    assert places[name + "w3.weight"].index == (2, slice(96, 192))
    assert places[name + "w2.weight"].index == (2,)
    with pytest.raises(Unsupported, match=r"experts\.9"):
        skeleton.places(model, ["model.layers.1.block_sparse_moe.experts.9.w2.weight"])


def test_a_tied_head(folders: dict[str, Path]) -> None:
    tensors = tensors_of(folders["llama_tied"])
    model = skeleton.build(folders["llama_tied"])
    embedding = "model.embed_tokens.weight"
    assert skeleton.places(model, tensors)[embedding].also == ("lm_head.weight",)

    only_head = {("lm_head.weight" if n == embedding else n): t for n, t in tensors.items()}
    place = skeleton.places(model, only_head)["lm_head.weight"]
    assert (place.path, place.role, place.also) == (embedding, "embedding", ("lm_head.weight",))
    skeleton.fill(model, "lm_head", skeleton.places(model, only_head), only_head.__getitem__)
    assert model.lm_head.weight is model.model.embed_tokens.weight

    both = skeleton.places(model, [*tensors, "lm_head.weight"])
    assert both[embedding].also == ()
    assert both["lm_head.weight"].role == "head"


def test_names_the_model_ignores_are_absent(folders: dict[str, Path]) -> None:
    model = skeleton.build(folders["llama"])
    assert skeleton.places(model, ["nonsense.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]) == {}
    assert skeleton.places(model, ["layers.0.mlp.up_proj.weight"])["layers.0.mlp.up_proj.weight"].path == (
        "model.layers.0.mlp.up_proj.weight"
    )


def test_a_fine_tune_with_more_words_and_a_head_of_its_own(folders: dict[str, Path], tmp_path: Path) -> None:
    tuned = perturb(folders["llama_tied"], tmp_path / "tuned", grow_vocab=3, untie=True, shard=True)
    tensors = tensors_of(tuned)
    model = skeleton.build(json.loads((tuned / "config.json").read_text()))
    skeleton.fill(model, "", skeleton.places(model, tensors), tensors.__getitem__)
    assert model.lm_head.weight.shape == (131, 64)
    assert torch.equal(model(IDS).logits, pretrained(tuned)(IDS).logits)


def test_a_conversion_that_is_no_index(folders: dict[str, Path]) -> None:
    """transformers cuts or permutes some tensors on loading; then its own conversion fills the parameters."""
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    class FusedLlamaForCausalLM(transformers.LlamaForCausalLM):
        pass

    cut = WeightConverter("mlp.both_proj.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)])
    register_checkpoint_conversion_mapping("FusedLlamaForCausalLM", [cut], overwrite=True)
    FusedLlamaForCausalLM.is_custom_code = lambda self: False  # type: ignore[method-assign]
    reference = pretrained(folders["llama"])
    with torch.device("meta"):
        model = FusedLlamaForCausalLM(copy.deepcopy(reference.config)).eval()
    tensors = tensors_of(folders["llama"])
    for i in range(2):
        gate, up = (tensors.pop(f"model.layers.{i}.mlp.{part}_proj.weight") for part in ("gate", "up"))
        tensors[f"model.layers.{i}.mlp.both_proj.weight"] = torch.cat([gate, up])
    places = skeleton.places(model, tensors)
    fused = places["model.layers.1.mlp.both_proj.weight"]
    assert fused.converted == ("model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight")
    assert fused.role == "other"
    skeleton.fill(model, "", places, tensors.__getitem__)
    same_state(model, reference)


def test_bf16_and_what_is_filled_stays(folders: dict[str, Path]) -> None:
    tensors = tensors_of(folders["gemma3"])
    model = skeleton.build(folders["gemma3"], attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    places = skeleton.places(model, tensors)
    skeleton.fill(model, "model.layers.0", places, tensors.__getitem__, dtype=torch.bfloat16)
    before = model.model.layers[0].mlp.up_proj.weight
    assert before.dtype == torch.bfloat16
    skeleton.fill(model, "model.layers", places, tensors.__getitem__)
    assert model.model.layers[0].mlp.up_proj.weight is before
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.float32


def test_missing_and_misshapen_tensors_are_named(folders: dict[str, Path]) -> None:
    tensors = tensors_of(folders["mixtral"])
    model = skeleton.build(folders["mixtral"])

    def filled(changed: dict[str, Tensor]) -> None:
        skeleton.fill(copy.deepcopy(model), "", skeleton.places(model, changed), changed.__getitem__)

    gone = {n: t for n, t in tensors.items() if "q_proj" not in n}
    with pytest.raises(BadInput, match=r"lacks 2 tensors.*layers\.0\.self_attn\.q_proj"):
        filled(gone)
    with pytest.raises(BadInput, match=r"layers\.1\.mlp\.experts\.gate_up_proj .* missing"):
        filled({n: t for n, t in tensors.items() if "layers.1.block_sparse_moe.experts.3.w1" not in n})
    with pytest.raises(BadInput, match=r"norm.weight of the model is \(64,\).*\(63,\)"):
        filled({**tensors, "model.norm.weight": torch.ones(63)})
    name = "model.layers.0.block_sparse_moe.experts.0.w2.weight"
    with pytest.raises(BadInput, match=r"experts\.0\.w2.*\(64, 95\).*\(64, 96\)"):
        filled({**tensors, name: torch.ones(64, 95)})


def test_configs_that_cannot_be_built(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"config\.json cannot be read"):
        skeleton.build(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(BadInput, match="not a JSON object"):
        skeleton.build(tmp_path)
    with pytest.raises(Unsupported, match="auto_map"):
        skeleton.build({"model_type": "own", "auto_map": {"AutoModel": "modeling.Own"}})
    with pytest.raises(Unsupported, match="knows no model_type 'own'"):
        skeleton.build({"model_type": "own"})
    with pytest.raises(Unsupported, match="quantised"):
        skeleton.build({"model_type": "llama", "quantization_config": {"bits": 4}})
    config = json.loads((folders["qwen3"] / "config.json").read_text())
    del config["architectures"]
    assert type(skeleton.build(config)).__name__ == "Qwen3ForCausalLM"
    vision = transformers.CLIPVisionConfig().to_dict()
    vision["architectures"] = ["NoSuchModel"]
    assert type(skeleton.build(vision)).__name__ == "CLIPVisionModel"
    with pytest.raises(Unsupported, match="NoSuchModel"):
        skeleton.build({"model_type": "blip_text_model", "architectures": ["NoSuchModel"]})
