"""Attachments: the fine-tune's outputs over an untouched base, on every architecture."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from dense import dense_file
from pico import NAMES, perturb, pico
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayou import skeleton
from bayou.attach import AttachedEmbedding, AttachedLinear, Attachment, attach, detach, load
from bayou.checkpoint import DTYPES
from bayou.compress import compress
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput, Unsupported, WrongBase
from bayou.restore import restore

IDS = torch.randint(5, 100, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Path]]:
    """Name -> base, fine-tune and file of each architecture."""
    root = tmp_path_factory.mktemp("pairs")
    made = {}
    for name in NAMES:
        base = pico(name, root / name)
        tuned = perturb(base, root / f"{name}-tuned")
        made[name] = (base, tuned, dense_file(base, tuned, root / f"{name}.bayou"))
    return made


def pretrained(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= tolerance * wanted.norm()


def snapshot(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return {path: (id(tensor), tensor.clone()) for path, tensor in tensors}


def unchanged_since(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for path, (identity, value) in before.items():
        assert after[path][0] == identity, path
        assert torch.equal(after[path][1], value), path


@pytest.mark.parametrize("name", NAMES)
def test_load_gives_the_fine_tune(name: str, pairs: dict[str, tuple[Path, Path, Path]]) -> None:
    base, tuned, file = pairs[name]
    model = load(base, file)
    wanted, original = logits(pretrained(tuned)), logits(pretrained(base))
    assert (wanted - original).norm() > 1e-2 * wanted.norm()
    close(logits(model), wanted)
    detach(model)
    assert torch.equal(logits(model), original)
    with pytest.raises(BadInput, match="nothing is attached"):
        detach(model)


@pytest.mark.parametrize("name", NAMES)
def test_attach_leaves_the_base_alone(name: str, pairs: dict[str, tuple[Path, Path, Path]]) -> None:
    base, tuned, file = pairs[name]
    model = pretrained(base)
    before, modules, original = snapshot(model), [id(m) for m in model.modules()], logits(model)
    attachment = attach(model, file)
    close(logits(model), logits(pretrained(tuned)))
    with pytest.raises(BadInput, match="attached to this model already"):
        attach(model, file)
    held = {id(p) for p in model.parameters()}
    places = skeleton.places(skeleton.build(base), DeltaFile(file).tensors())
    for place in places.values():
        if place.role in ("linear", "head", "embedding", "expert"):
            assert before[place.path][0] in held, place.path
    assert attachment.done
    detach(model)
    unchanged_since(model, before)
    assert [id(m) for m in model.modules()] == modules
    assert torch.equal(logits(model), original)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma3", "gpt2", "mixtral"])
def test_gain_scales_the_base_but_not_the_bias(name: str, pairs: dict, tmp_path: Path) -> None:
    base, tuned, _ = pairs[name]
    file = dense_file(base, tuned, tmp_path / "gain.bayou", gain=0.75)
    close(logits(load(base, file)), logits(pretrained(tuned)))


def test_gain_zero_and_no_reference(pairs: dict, tmp_path: Path) -> None:
    base, tuned, _ = pairs["qwen2"]
    file = dense_file(base, tuned, tmp_path / "zero.bayou", gain=0.0)
    model = load(base, file)
    close(logits(model), logits(pretrained(tuned)))
    assert model.model.layers[0].mlp.up_proj.gain == 0.0


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "gemma3"])
def test_generate_is_the_fine_tunes(name: str, pairs: dict) -> None:
    base, tuned, file = pairs[name]
    model, reference = load(base, file), pretrained(tuned)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **options), reference.generate(IDS, **options))


@pytest.mark.parametrize("name", ["llama_gqa", "llama_tied"])
@pytest.mark.parametrize("grown", [0, 3])
def test_grown_vocabulary_and_untied_head(name: str, grown: int, tmp_path: Path) -> None:
    base = pico(name, tmp_path / "base")
    tuned = perturb(base, tmp_path / "tuned", grow_vocab=grown, untie=name == "llama_tied", shard=True)
    refer = {"lm_head.weight": "model.embed_tokens.weight"} if name == "llama_tied" else {}
    file = dense_file(base, tuned, tmp_path / "x.bayou", refer=lambda n: refer.get(n, n))
    ids = IDS.clone()
    if grown:
        ids[0, 3], ids[1, 5] = 128, 130
    wanted = logits(pretrained(tuned), ids)
    model = load(base, file)
    close(logits(model, ids), wanted)
    assert model.get_input_embeddings().base.shape == (128, 64)
    assert model.get_input_embeddings().num_embeddings == model.lm_head.out_features == 128 + grown
    assert model.config.vocab_size == 128 + grown

    over = pretrained(base)
    before = snapshot(over)
    attach(over, file)
    close(logits(over, ids), wanted)
    assert over.config.vocab_size == 128 + grown
    loss = over(ids, labels=ids).loss
    close(loss, pretrained(tuned)(ids, labels=ids).loss)
    detach(over)
    unchanged_since(over, before)
    assert over.config.vocab_size == 128


def test_a_tied_table_that_only_grew(tmp_path: Path) -> None:
    base = pico("llama_tied", tmp_path / "base")
    tuned = perturb(base, tmp_path / "tuned", scale=0.0, grow_vocab=2)
    file = tmp_path / "x.bayou"
    dense_file(base, tuned, file)
    ids = torch.full_like(IDS, 129)
    model = load(base, file)
    close(logits(model, ids), logits(pretrained(tuned), ids), 1e-6)
    assert model.get_input_embeddings().extra is not None
    detach(model)
    whole = dense_file(base, tuned, file, refer=lambda n: None if "embed" in n else n)
    attach(model, whole)
    assert model.config.vocab_size == 130
    close(logits(model, ids), logits(pretrained(tuned), ids), 1e-6)


def test_vision_language_model_over_a_text_base(tmp_path: Path) -> None:
    base = pico("llama_gqa", tmp_path / "base")
    whole = pico("llava", tmp_path / "whole", text=base)
    tuned = perturb(whole, tmp_path / "tuned")

    def refer(name: str) -> str | None:
        found = name.removeprefix("language_model.")
        return found if found != name else None

    file = dense_file(base, tuned, tmp_path / "x.bayou", refer=refer)
    model, reference = load(base, file), pretrained(tuned)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    close(logits(model), logits(reference))
    ids = IDS[:1].clone()
    ids[0, 2:6] = 3
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, wanted = (m(input_ids=ids, pixel_values=pixels).logits for m in (model, reference))
    close(found, wanted)
    with pytest.raises(Unsupported, match=r"use bayou\.load"):
        attach(pretrained(whole), file)


def test_a_layer_that_refers_to_another(pairs: dict, tmp_path: Path) -> None:
    """A delta between layers: the reference is another tensor of the base."""
    for name in ("llama", "gpt2", "mixtral"):
        base, tuned, _ = pairs[name]
        second, first = ("h.1.", "h.0.") if name == "gpt2" else ("layers.1.", "layers.0.")
        file = dense_file(base, tuned, tmp_path / f"{name}.bayou", refer=lambda n, a=second, b=first: n.replace(a, b))
        wanted = logits(pretrained(tuned))
        close(logits(load(base, file)), wanted)
        model = pretrained(base)
        before = snapshot(model)
        attach(model, file)
        close(logits(model), wanted)
        detach(model)
        unchanged_since(model, before)


def test_experts_stored_as_one_tensor(tmp_path: Path) -> None:
    """Sites of one index each, of a 3-D tensor, (in, out) on disk."""
    config = transformers.GptOssConfig(
        vocab_size=128, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        pad_token_id=0, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.1)
    model.save_pretrained(tmp_path / "base")
    tuned = perturb(tmp_path / "base", tmp_path / "tuned")
    file = dense_file(tmp_path / "base", tuned, tmp_path / "x.bayou")
    sites = DeltaFile(file).sites
    site = sites["model.layers.0.mlp.experts.gate_up_proj[3]"]
    assert site.transposed
    assert site.shape == site.disk_shape[::-1]
    close(logits(load(tmp_path / "base", file)), logits(pretrained(tuned)))
    over = pretrained(tmp_path / "base")
    attach(over, file)
    close(logits(over), logits(pretrained(tuned)))


def test_an_exact_expert_and_an_exact_matrix(pairs: dict, tmp_path: Path) -> None:
    base, tuned, _ = pairs["mixtral"]
    whole = {"model.layers.0.block_sparse_moe.experts.2.w1.weight", "model.layers.1.self_attn.q_proj.weight"}
    file = dense_file(base, tuned, tmp_path / "x.bayou", refer=lambda n: None if n in whole else n)
    assert whole <= set(DeltaFile(file).exact)
    model = load(base, file)
    close(logits(model), logits(pretrained(tuned)))
    detach(model)
    assert torch.equal(logits(model), logits(pretrained(base)))


def test_a_conversion_that_is_no_index(pairs: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters that transformers computes from disk tensors are swapped, and need the base's folder."""
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    class CutLlamaForCausalLM(transformers.LlamaForCausalLM):
        pass

    cut = WeightConverter("mlp.both_proj.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)])
    register_checkpoint_conversion_mapping("CutLlamaForCausalLM", [cut], overwrite=True)
    monkeypatch.setattr(CutLlamaForCausalLM, "is_custom_code", lambda self: False)
    monkeypatch.setattr(transformers, "CutLlamaForCausalLM", CutLlamaForCausalLM, raising=False)
    folders = []
    for kind, folder in zip(("base", "tuned"), pairs["llama"], strict=False):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        for i in range(2):
            halves = [tensors.pop(f"model.layers.{i}.mlp.{part}_proj.weight") for part in ("gate", "up")]
            tensors[f"model.layers.{i}.mlp.both_proj.weight"] = torch.cat(halves)
        (tmp_path / kind).mkdir()
        save_file(tensors, tmp_path / kind / "model.safetensors")
        config = json.loads((folder / "config.json").read_text()) | {"architectures": ["CutLlamaForCausalLM"]}
        (tmp_path / kind / "config.json").write_text(json.dumps(config))
        folders.append(tmp_path / kind)
    file = dense_file(folders[0], folders[1], tmp_path / "x.bayou")
    model = load(folders[0], file)
    close(logits(model), logits(pretrained(pairs["llama"][1])))
    detach(model)
    assert torch.equal(logits(model), logits(pretrained(pairs["llama"][0])))
    with pytest.raises(Unsupported, match="computed from several tensors"):
        attach(model, file)
    assert not hasattr(model, "bayou_attachment")


def test_wrappers_answer_for_what_they_wrap(pairs: dict) -> None:
    base, tuned, file = pairs["llama_tied"]
    model, reference = load(base, file), pretrained(tuned)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, AttachedEmbedding)
    assert isinstance(head, AttachedLinear)
    assert embedding.base is head.base
    assert head.in_features == 64
    assert embedding.padding_idx == 0
    close(embedding.weight, reference.get_input_embeddings().weight, 1e-6)
    model.tie_weights()
    close(logits(model), logits(reference))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = head.nonsense
    close(
        load(*pairs["gpt2"][::2]).transformer.h[0].attn.c_attn.weight,
        pretrained(pairs["gpt2"][1]).transformer.h[0].attn.c_attn.weight,
        1e-6,
    )
    experts = load(*pairs["mixtral"][::2]).model.layers[0].mlp.experts
    assert experts.num_experts == 4
    wanted = pretrained(pairs["mixtral"][1]).model.layers[0].mlp.experts
    close(experts.gate_up_proj, wanted.gate_up_proj, 1e-6)


def test_a_short_prompt_with_a_scaled_embedding(pairs: dict) -> None:
    base, tuned, file = pairs["gemma3"]
    model = load(base, file)
    model.get_input_embeddings().inner.padding_idx = 5
    close(logits(model, IDS[:1, :1]), logits(pretrained(tuned), IDS[:1, :1]))


def test_other_dtypes_and_copies(pairs: dict) -> None:
    base, tuned, file = pairs["llama_gqa"]
    model = load(base, file, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    close(logits(model), logits(pretrained(tuned).double()))
    twin = copy.deepcopy(model)
    detach(model)
    close(logits(twin), logits(pretrained(tuned).double()))
    detach(twin)
    assert torch.equal(logits(twin), logits(model))


def test_bf16_parameters_are_the_bases(pairs: dict) -> None:
    for name in ("qwen3_moe", "gemma3", "llava"):
        base, _, file = pairs[name]
        model, reference = load(base, file, dtype=torch.bfloat16), pretrained(base, torch.bfloat16)
        detach(model)
        found = dict(model.named_parameters(remove_duplicate=False))
        for path, wanted in reference.named_parameters(remove_duplicate=False):
            assert found[path].dtype == wanted.dtype
            assert torch.equal(found[path], wanted), path


def test_failures_leave_the_model_as_it_was(pairs: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _, file = pairs["llama"]
    with pytest.raises(WrongBase):
        load(pairs["llama_gqa"][0], file)
    model = pretrained(base)
    before = snapshot(model)
    puts = iter(range(5))

    def put(self: Attachment, owner: object, leaf: str, new: object) -> None:
        next(puts)
        self.done.append((owner, leaf, getattr(owner, leaf)))
        setattr(owner, leaf, new)

    monkeypatch.setattr(Attachment, "put", put)
    with pytest.raises(StopIteration):
        attach(model, file)
    unchanged_since(model, before)
    assert not hasattr(model, "bayou_attachment")


def test_tensors_the_model_ignores_and_fp32_ones(tmp_path: Path) -> None:
    base = pico("llama", tmp_path / "base")
    names = ("model.norm.weight", "model.layers.0.mlp.up_proj.weight")
    tuned = perturb(base, tmp_path / "tuned", integer_buffer=True, fp32_names=names)
    file = dense_file(base, tuned, tmp_path / "x.bayou")
    assert DTYPES[DeltaFile(file).exact_dtype("model.norm.weight")] == torch.float32
    close(logits(load(base, file)), logits(pretrained(tuned)))


@pytest.mark.parametrize("name", NAMES)
def test_compressed_and_restored_and_loaded_are_one(name: str, pairs: dict, tmp_path: Path) -> None:
    base, tuned, _ = pairs[name]
    file = tmp_path / "x.bayou"
    compress(base, tuned, file, method="lowrank", ratio=1.4, calibration="none")
    restored = pretrained(restore(base, file, tmp_path / "restored", dtype="float32"))
    model = load(base, file)
    wanted = logits(restored)
    close(logits(model), wanted)
    assert (wanted - logits(pretrained(tuned))).norm() < 0.5 * (wanted - logits(pretrained(base))).norm()
    detach(model)
    assert torch.equal(logits(model), logits(pretrained(base)))


def test_a_compressed_vision_language_model_over_a_text_base(tmp_path: Path) -> None:
    base = pico("llama_gqa", tmp_path / "base")
    tuned = perturb(pico("llava", tmp_path / "whole", text=base), tmp_path / "tuned")
    file = tmp_path / "x.bayou"
    compress(base, tuned, file, method="lowrank", ratio=1.4, calibration="none")
    restored = pretrained(restore(base, file, tmp_path / "restored", dtype="float32"))
    close(logits(load(base, file)), logits(restored))
