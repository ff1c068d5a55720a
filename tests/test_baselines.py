"""The rivals: each formula against a computation of its own, counts of parameters, folders that load, recovery."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from pico import pico
from torch import Tensor, nn
from torch.nn import functional

import bayou
from bayou import objective
from bayou.errors import BadInput, Unsupported
from bayou.sharing import baselines, sharedfile
from bayou.sharing.baselines import jointdrop, laco, lastlayers, shortgpt, slicegpt
from bayou.sharing.baselines.baseline import Baseline, count, load, nearest
from bayou.sharing.student import apply
from bayou.sharing.train import Pupil, Recipe, fit

WINDOWS = torch.randint(5, 100, (12, 32), generator=torch.Generator().manual_seed(0))
LAYERS = 6
NAMES = ("llama_tied", "qwen2", "phi3", "gemma3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("rivals")
    extra = {"gemma3": {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}}
    options = {name: {"num_hidden_layers": LAYERS, **extra.get(name, {})} for name in NAMES}
    return {name: pico(name, root / name, dtype=torch.float32, **options[name]) for name in NAMES}


def logits(model: nn.Module, ids: Tensor = WINDOWS[:3]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def saved(baseline: Baseline, out: Path, folder: Path) -> nn.Module:
    baseline.save(out, folder)
    assert (out / "tokenizer.json").is_file()
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert logits(model).shape[-1] == 128
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["shortgpt", "laco", "laco-code", "lastlayers"])
def test_a_model_of_fewer_layers_loads_as_an_ordinary_one(
    folders: dict[str, Path], tmp_path: Path, name: str, method: str
) -> None:
    found = baselines.share(method, folders[name], reduce=0.3, windows=WINDOWS)
    model = saved(found, tmp_path / "out", folders[name])
    assert torch.allclose(logits(model), logits(found.model), atol=1e-5)
    assert count(model) == found.parameters == count(found.model) == found.before - found.removed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == LAYERS - round(0.3 * found.before / count(found.model.model.layers[0]))
    if name == "gemma3":
        assert len(config["layer_types"]) == config["num_hidden_layers"]
    ids = WINDOWS[:1, :8]
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, use_cache=True)
    for _ in range(made.shape[1] - 8):  # the caches of the layers that are left
        ids = torch.cat([ids, logits(found.model, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, ids)


def test_block_influence_is_one_minus_the_mean_cosine(folders: dict[str, Path]) -> None:
    model = load(folders["llama_tied"])
    influence = shortgpt.block_influence(model, WINDOWS, batch=5)
    inputs: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda m, a, o: inputs.append(a[0])) for layer in model.model.layers]
    final = model.model.norm.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    logits(model, WINDOWS)
    for i in range(LAYERS):
        x, y = inputs[i], inputs[i + 1]
        wanted = 1 - ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean()
        assert influence[i] == pytest.approx(float(wanted), abs=1e-5)
    for hook in (*hooks, final):
        hook.remove()
    found = shortgpt.share(folders["llama_tied"], reduce=0.3, windows=WINDOWS)
    gone = found.description["removed_layers"]
    assert sorted(influence)[: len(gone)] == sorted(influence[i] for i in gone)


def test_laco_adds_the_differences_and_its_code_keeps_the_last_layer(folders: dict[str, Path]) -> None:
    layers = load(folders["qwen2"]).model.layers
    run = list(layers[1:4])
    joined = laco.merged(run, code=False)
    parameters = [dict(layer.named_parameters()) for layer in run]
    for name, parameter in joined.named_parameters():
        a, b, c = (p[name] for p in parameters)
        assert torch.allclose(parameter, a + (b - a) + (c - a), atol=1e-5)
    assert laco.merged(run, code=True) is run[-1]


def test_laco_merges_from_the_top_while_the_output_stays_alike(folders: dict[str, Path]) -> None:
    original = load(folders["llama_tied"])
    found = laco.share(folders["llama_tied"], reduce=0.3, windows=WINDOWS, merge=3, interval=1)
    again = laco.share(folders["llama_tied"], reduce=0.3, windows=WINDOWS, merge=3, interval=1)
    assert found.description == again.description
    removed = sum(last - first for first, last in found.description["merged_layers"])
    assert removed == LAYERS - len(found.model.model.layers) > 0
    one = original.model(input_ids=WINDOWS[:5]).last_hidden_state.flatten(1)
    two = found.model.model(input_ids=WINDOWS[:5]).last_hidden_state.flatten(1)
    wanted = functional.cosine_similarity(one, two, dim=-1).mean()
    assert found.description["similarity"] == pytest.approx(float(wanted), abs=1e-4)
    assert found.description["similarity"] > found.description["threshold"]
    easy = laco._merge_all(lambda runs: 1.0, 10, 5, 0.5, 4, 2, 0, 10)
    assert [(run.first, run.last) for run in easy] == [(0, 0), (1, 1), (2, 2), (3, 5), (6, 9)]
    assert len(laco._merge_all(lambda runs: 0.0, 10, 5, 0.5, 4, 2, 0, 10)) == 10
    for wrong in ({"merge": 1}, {"low": 6}, {"high": 9}, {"interval": 0}):
        with pytest.raises(BadInput, match="cannot merge runs"):
            laco.share(folders["llama_tied"], reduce=0.3, windows=WINDOWS, **wrong)
    with pytest.raises(BadInput, match="widen the range"):
        laco.share(folders["llama_tied"], reduce=0.5, windows=WINDOWS, merge=2, low=4)


@pytest.mark.parametrize("name", NAMES)
def test_jointdrop_ranks_all_sub_layers_and_its_plain_form_has_zeros(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    original = load(folders[name])
    cosines = jointdrop.similarities(original, WINDOWS, batch=5)
    layer, states = original.model.layers[2], {}
    hook = layer.register_forward_pre_hook(lambda m, a, k: states.update(x=a[0], rest=k), with_kwargs=True)
    logits(original, WINDOWS)
    hook.remove()
    with torch.no_grad():
        x = states["x"]
        y = layer.self_attn(hidden_states=layer.input_layernorm(x), **states["rest"])[0]
        y = x + (layer.post_attention_layernorm(y) if name == "gemma3" else y)
        z = layer(x, **states["rest"])
    for key, a, b in (((2, "self_attn"), x, y), ((2, "mlp"), y, z)):
        assert cosines[key] == pytest.approx(float(functional.cosine_similarity(a, b, dim=-1).mean()), abs=1e-5)
    found = baselines.share("jointdrop", folders[name], reduce=0.25, windows=WINDOWS)
    dropped = [(i, "self_attn") for i in found.description["dropped_attentions"]]
    dropped += [(i, "mlp") for i in found.description["dropped_mlps"]]
    assert sorted(cosines, key=lambda k: -cosines[k])[: len(dropped)] == sorted(dropped, key=lambda k: -cosines[k])
    norms = 64 * (2 if name == "gemma3" else 1)
    sizes = [count(original.model.layers[i].get_submodule(kind)) + norms for i, kind in dropped]
    assert found.removed == sum(sizes) and abs(found.reduction - 0.25) < 0.06
    model = saved(found, tmp_path / "out", folders[name])
    assert torch.allclose(logits(model), logits(found.model), atol=1e-5)
    assert count(model) == found.before
    zeros = sum(not parameter.any() for n, parameter in model.named_parameters() if n.endswith("weight"))
    assert zeros == len(dropped)


def test_lastlayers_trains_the_head_and_the_last_three(folders: dict[str, Path]) -> None:
    found = lastlayers.share(folders["qwen2"], reduce=0.3)
    left = len(found.model.model.layers)
    parameters = found.trainable()
    wanted = [p for layer in found.model.model.layers[left - 3 :] for p in layer.parameters()]
    assert {id(p) for p in parameters} == {id(p) for p in (*wanted, found.model.lm_head.weight)}
    tied = lastlayers.share(folders["llama_tied"], reduce=0.3)
    assert any(p is tied.model.model.embed_tokens.weight for p in tied.trainable())


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "phi3"])
def test_slicing_at_full_width_changes_nothing_and_less_loses_little(folders: dict[str, Path], name: str) -> None:
    original = load(folders[name])
    errors = []
    for width in (64, 56, 32):
        model = load(folders[name])
        slicegpt.slice_to(model, WINDOWS, width, batch=5)
        errors.append(float((logits(model) - logits(original)).norm() / logits(original).norm()))
        assert count(model) == slicegpt._parameters(load(folders[name]), width)
    assert errors[0] < 1e-4 and errors[0] < errors[1] < errors[2]


def test_the_principal_directions_come_in_falling_order() -> None:
    scales = torch.tensor([1.0, 5.0, 3.0, 0.1])
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * scales
    basis = slicegpt.principal([x[:200], x[200:]])
    assert basis.dtype == torch.float64 and torch.allclose(basis.T @ basis, torch.eye(4, dtype=torch.float64))
    assert basis.abs().argmax(0).tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize("name", ["llama_tied", "qwen2"])
def test_a_sliced_model_is_saved_and_loaded_by_its_own_module(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    found = baselines.share("slicegpt", folders[name], reduce=0.2, windows=WINDOWS)
    width = found.description["width"]
    assert width % 8 == 0 and abs(found.reduction - 0.2) < 0.1
    assert found.parameters == count(found.model) and found.description["shortcut_parameters"] == 2 * width**2 * LAYERS
    assert found.description["head_untied"] == (name == "llama_tied")
    out = slicegpt.save(found, tmp_path / "out", folders[name])
    assert not (out / "config.json").exists() and (out / "tokenizer.json").is_file()
    model = slicegpt.load(out)
    assert torch.equal(logits(model), logits(found.model)) and count(model) == found.parameters
    ids = WINDOWS[:1, :8]
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert made.shape[1] > 8
    with pytest.raises(Unsupported, match="no plain"):
        found.save(tmp_path / "plain", folders[name])
    with pytest.raises(BadInput, match="exists"):
        slicegpt.save(found, out, folders[name])
    with pytest.raises(BadInput, match="not a sliced model"):
        slicegpt.save(replace(found, own=False), tmp_path / "x", folders[name])
    with pytest.raises(BadInput, match="does not hold a sliced model"):
        slicegpt.load(folders[name])


@pytest.mark.parametrize("method", baselines.METHODS)
def test_recovery_training_helps_and_adds_no_parameters(folders: dict[str, Path], tmp_path: Path, method: str) -> None:
    folder = folders["llama_tied"]
    teacher = load(folder)
    found = baselines.share(method, folder, reduce=0.25, windows=WINDOWS)
    # What is trained here is to agree with the teacher on these very windows.
    before = objective.measure(found.model, WINDOWS, teacher)[1]
    pupil = Pupil(method, found.model, tuple(found.trainable(rank=4)), 0.005)
    fit([pupil], teacher, WINDOWS, Recipe(batch=4, alpha=1.0), tokens=20 * 4 * 32)
    trained = logits(found.model)
    model = found.finish()
    assert torch.allclose(logits(model), trained, atol=1e-4)
    assert objective.measure(model, WINDOWS, teacher)[1] < before
    unused = 64 * len(found.zeroed)  # the norms of dropped sub-layers are there, and do nothing
    assert sum(p.numel() for p in model.parameters()) == found.parameters + unused
    assert torch.equal(logits(teacher), logits(load(folder)))
    if not found.own:
        assert torch.allclose(logits(saved(found, tmp_path / "out", folder)), logits(model), atol=1e-5)


@pytest.mark.parametrize("method", ["shortgpt", "laco", "laco-code", "jointdrop", "lastlayers"])
@pytest.mark.parametrize("name", ["llama_tied", "phi3"])
def test_a_rival_can_be_told_as_what_is_dropped_and_what_is_changed(
    folders: dict[str, Path], tmp_path: Path, method: str, name: str
) -> None:
    folder = folders[name]
    found = baselines.share(method, folder, reduce=0.25, windows=WINDOWS)
    assert bool(found.shared(folder)[1]) == (method == "laco")  # the others leave what they keep as it is
    with torch.no_grad():
        for parameter in found.trainable(rank=2):
            parameter.add_(0.01)
    found.finish()
    shared, tensors = found.shared(folder)
    model = load(folder)
    with torch.no_grad():
        for disk, tensor in tensors.items():
            model.get_parameter(disk).copy_(tensor)
    apply(model, shared).finish()  # a dropped block adds nothing: it is no block
    assert shared.dropped and torch.allclose(logits(model), logits(found.model), atol=1e-4)
    report = sharedfile.write(folder, shared, tmp_path / "small.bayou", tensors=tensors, method=method)
    assert report.parameters == found.parameters + 64 * len(found.zeroed)  # a file keeps the norms of what is dropped
    assert torch.allclose(logits(bayou.load(None, tmp_path / "small.bayou")), logits(found.model), atol=1e-4)
    sliced = replace(found, own=True)
    with pytest.raises(Unsupported, match="no model of shared layers"):
        sliced.shared(folder)


def test_the_nearest_number_of_pieces() -> None:
    assert nearest([10, 10, 10, 10], 100, 0.12) == 1 and nearest([10, 10, 10, 10], 100, 0.16) == 2
    assert nearest([10, 10], 100, 0.01) == 1
    with pytest.raises(BadInput, match="at most 20.0%"):
        nearest([10, 10], 100, 0.3)
    for share in (0.0, 1.0):
        with pytest.raises(BadInput, match="between 0 and 1"):
            nearest([10], 100, share)


def test_what_a_method_does_not_know_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no method 'magic'; choose one of shortgpt"):
        baselines.share("magic", folders["qwen2"], reduce=0.1, windows=WINDOWS)
    with pytest.raises(Unsupported, match="Llama's form"):
        baselines.share("slicegpt", folders["gemma3"], reduce=0.1, windows=WINDOWS)
    for method in baselines.METHODS:
        with pytest.raises(BadInput):
            baselines.share(method, folders["llama_tied"], reduce=0.99, windows=WINDOWS)
    gpt2 = pico("gpt2", tmp_path / "gpt2")
    for method in ("jointdrop", "slicegpt"):
        with pytest.raises(Unsupported):
            baselines.share(method, gpt2, reduce=0.2, windows=WINDOWS)
    found = baselines.share("shortgpt", folders["qwen2"], reduce=0.2, windows=WINDOWS)
    with pytest.raises(BadInput, match="exists"):
        found.save(tmp_path, folders["qwen2"])
    assert copy.deepcopy(found.description) == found.description
