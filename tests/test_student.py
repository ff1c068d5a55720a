"""Students: ties, dropped sub-layers, the switches of Progressive Module Replacement, LoRA on the rest."""

from pathlib import Path

import pytest
import torch
from pico import pico
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayou import skeleton
from bayou.checkpoint import Checkpoint
from bayou.errors import BadInput, Unsupported
from bayou.sharing import Shared, Tie
from bayou.sharing.student import Replacement, TiedLinear, apply, twin

IDS = torch.randint(5, 100, (2, 24), generator=torch.Generator().manual_seed(0))
KINDS = {
    "llama_gqa": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"),
    "qwen2": ("mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj", "self_attn.o_proj"),  # q has a bias
    "phi3": ("mlp.gate_up_proj", "mlp.down_proj", "self_attn.qkv_proj"),  # fused
    "gemma3": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("students")
    extra = {"gemma3": {"layer_types": ["sliding_attention", "full_attention"] * 2}}
    return {name: pico(name, root / name, num_hidden_layers=4, **extra.get(name, {})) for name in KINDS}


def model_of(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    checkpoint = Checkpoint(folder)
    model = skeleton.build(folder)
    skeleton.fill(model, "", skeleton.places(model, checkpoint.names()), checkpoint.read, dtype=dtype)
    return model


def ties(model: nn.Module, kinds: tuple[str, ...], *, targets: tuple[int, ...] = (1, 3), rank: int = 4) -> list[Tie]:
    """Layers `targets` refer to the layers below them, by random u and v."""
    g = torch.Generator().manual_seed(1)
    made = []
    for layer in targets:
        for kind in kinds:
            out, into = model.get_submodule(f"model.layers.{layer}.{kind}").weight.shape
            u, v = torch.randn(out, rank, generator=g) * 0.05, torch.randn(rank, into, generator=g) * 0.05
            name = f"model.layers.{layer}.{kind}.weight"
            made.append(Tie(name, name.replace(f".{layer}.", f".{layer - 1}."), 0.75, u, v))
    return made


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", KINDS)
def test_a_student_computes_what_the_dense_model_of_its_matrices_would(folders: dict[str, Path], name: str) -> None:
    model, dense = model_of(folders[name]), model_of(folders[name])
    shared = Shared(tuple(ties(model, KINDS[name], targets=(1,))), ("model.layers.2.self_attn",))
    with torch.no_grad():
        state = dict(dense.named_parameters())
        for tie in shared.ties:
            state[tie.tensor].copy_(tie.gain * state[tie.reference or ""] + tie.u @ tie.v)
        last = "o_proj.weight"
        state[f"model.layers.2.self_attn.{last}"].zero_()
    student = apply(model, shared)
    assert torch.allclose(logits(student.model), logits(dense), atol=1e-4)
    assert torch.equal(logits(student.finish()), logits(model))
    assert torch.allclose(logits(model), logits(dense), atol=1e-4)
    found = {tie.tensor: tie for tie in student.factors()}
    assert all(torch.equal(found[tie.tensor].u, tie.u) and found[tie.tensor].gain == 0.75 for tie in shared.ties)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_every_switch_on_the_originals_it_is_the_teacher_bit_for_bit(
    folders: dict[str, Path], name: str, dtype: torch.dtype
) -> None:
    model = model_of(folders[name], dtype)
    before, teacher = logits(model), twin(model)
    student = apply(
        model,
        Shared(tuple(ties(model, KINDS[name], targets=(1,))), ("model.layers.2.mlp",)),
        replacement=Replacement(start=0, slope=0, lead=0),
    )
    assert not torch.equal(logits(model), before)
    assert student.advance(0.0, 0) == 0
    assert torch.equal(logits(model), before)
    student.advance(1.0, 1)
    assert torch.equal(logits(teacher), before) and not torch.equal(logits(model), before)


@pytest.mark.parametrize("train_gain", [False, True])
def test_gradients_reach_u_v_and_gain_alone(folders: dict[str, Path], train_gain: bool) -> None:
    model = model_of(folders["llama_gqa"])
    student = apply(model, Shared(tuple(ties(model, KINDS["llama_gqa"]))), train_gain=train_gain)
    model(input_ids=IDS, use_cache=False).logits.square().mean().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    leaves = {"u", "v", "gain"} if train_gain else {"u", "v"}
    assert reached == trained and {name.rpartition(".")[2] for name in reached} == leaves
    assert len(student.parameters()) == len(leaves) * 8
    assert all(p.grad.norm() > 0 for p in student.parameters() if p.grad is not None)


def test_an_anchor_is_the_very_parameter_and_is_held_once(folders: dict[str, Path]) -> None:
    model = model_of(folders["llama_gqa"])
    anchor = model.model.layers[0].mlp.gate_proj.weight
    count = sum(p.numel() for p in model.parameters())
    student = apply(model, Shared(tuple(ties(model, KINDS["llama_gqa"], targets=(1,)))))
    student.finish()
    tied = model.model.layers[1].mlp.gate_proj
    assert isinstance(tied, TiedLinear) and tied.anchor is not None and tied.anchor.weight is anchor
    saved = 3 * 64 * 96 + 64 * 64
    added = 4 * (3 * (64 + 96) + 2 * 64) + 4  # the gains too
    assert sum(p.numel() for p in model.parameters()) == count - saved + added


def test_no_reference_is_a_low_rank_matrix_alone(folders: dict[str, Path]) -> None:
    model = model_of(folders["llama_gqa"])
    (tie,) = ties(model, ("mlp.up_proj",), targets=(1,))
    student = apply(model, Shared((Tie(tie.tensor, None, 0.0, tie.u, tie.v),)), train_gain=True)
    x = torch.randn(3, 64)
    assert torch.allclose(student.tied[0](x), x @ (tie.u @ tie.v).T, atol=1e-6)
    assert len(student.parameters()) == 2 and student.factors()[0].reference is None


def test_each_module_is_drawn_for_itself_and_the_deepest_come_first(folders: dict[str, Path]) -> None:
    model = model_of(folders["llama_gqa"])
    student = apply(
        model,
        Shared(tuple(ties(model, ("mlp.up_proj", "self_attn.q_proj")))),
        replacement=Replacement(start=0.1, slope=0.5, lead=0.6, final=0.25),
    )
    assert list(student.switches) == [f"model.layers.{i}.{m}" for i in (1, 3) for m in ("self_attn", "mlp")]
    draws = []
    for i in range(2000):
        student.advance(0.2, i)
        draws.append([switch.amount for switch in student.switches.values()])
    share = torch.tensor(draws).mean(0)
    assert torch.allclose(share, torch.tensor([0.2, 0.4, 0.6, 0.8]), atol=0.04)
    assert set(torch.tensor(draws).unique().tolist()) == {0.0, 1.0}
    together = torch.tensor(draws)[:, 1] * torch.tensor(draws)[:, 2]
    assert abs(together.mean() - 0.24) < 0.04  # independent
    again = student.advance(0.2, 7)
    assert [switch.amount for switch in student.switches.values()] == draws[7] and again == sum(draws[7]) / 4
    assert student.advance(0.75, 0) == 1.0


def test_the_blend_mixes_both_modules(folders: dict[str, Path]) -> None:
    model = model_of(folders["llama_gqa"])
    schedule = Replacement(start=0.25, slope=0, lead=0, blend=True)
    student = apply(
        model, Shared(tuple(ties(model, ("mlp.up_proj", "self_attn.q_proj"), targets=(1,)))), replacement=schedule
    )
    assert student.advance(0.0, 0) == 0.25
    x = torch.randn(2, 5, 64)
    switch = student.switches["model.layers.1.mlp"]
    assert torch.allclose(switch(x), 0.75 * switch.original(x) + 0.25 * switch.delta(x), atol=1e-6)
    assert logits(model).isfinite().all()  # the attention's tuple too


@pytest.mark.parametrize("kwargs", [{"final": 0.1}, {"start": 1.5}, {"slope": -1}])
def test_a_schedule_that_never_ends_is_refused(kwargs: dict[str, float]) -> None:
    with pytest.raises(BadInput):
        Replacement(**kwargs)  # type: ignore[arg-type]


def test_lora_on_the_rest_is_merged_and_anchors_stay_shared(folders: dict[str, Path]) -> None:
    model = model_of(folders["llama_gqa"])
    teacher = twin(model)
    before = logits(teacher)
    kinds = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    student = apply(model, Shared(tuple(ties(model, kinds, targets=(1,)))), lora_rank=2)
    frozen = {id(p) for p in teacher.parameters()}
    # 7 linears in 3 layers, the attention of the tied one, u and v of three
    assert len(student.parameters()) == 2 * (3 * 7 + 4) + 6 and not frozen & {id(p) for p in student.parameters()}
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.02)
    trained = logits(model)
    assert torch.equal(logits(teacher), before)
    student.finish()
    assert torch.allclose(logits(model), trained, atol=1e-4)
    assert torch.equal(logits(teacher), before)  # its weights were not written to
    dense = student.dense()
    assert len(dense) == 25 and "model.layers.0.mlp.up_proj.weight" in dense
    tied = model.model.layers[1].mlp.up_proj
    assert tied.anchor is model.model.layers[0].mlp.up_proj
    assert not any("lora" in type(m).__name__.lower() for m in model.modules())


@pytest.mark.parametrize("name", ["llama_gqa", "qwen2"])
def test_the_rest_is_trained_whole_and_the_teacher_stays(folders: dict[str, Path], name: str) -> None:
    model = model_of(folders[name])
    teacher = twin(model)
    before, kept = logits(teacher), {path: p.detach().clone() for path, p in teacher.named_parameters()}
    shared = Shared(tuple(ties(model, ("mlp.up_proj", "mlp.down_proj"), targets=(1,))), ("model.layers.2.self_attn",))
    student = apply(model, shared, rest=True, train_gain=True)
    wanted = {path for path in kept if not path.startswith("model.layers.2.self_attn.")}
    wanted -= {tie.tensor for tie in shared.ties}
    assert len(student.parameters()) == len(wanted) + 3 * len(shared.ties)
    multiples = student.multiples(0.5)
    assert multiples.count(1.0) == 3 * len(shared.ties) and multiples.count(0.5) == len(wanted)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    # The norm before a sub-layer that is dropped has nothing to do.
    idle = {"model.layers.2.input_layernorm.weight"}
    found = {path for path, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert found == idle
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(-0.1 if parameter.grad is None else -0.1 * parameter.grad)
    trained = logits(model)
    assert not torch.equal(trained, before) and torch.equal(logits(teacher), before)
    student.finish()
    assert torch.equal(logits(model), trained)  # fp32 before and after: nothing to round
    changed = student.dense()
    assert set(changed) == wanted and all(not torch.equal(changed[path], kept[path]) for path in wanted)
    assert len(student.parameters()) == 3 * len(shared.ties) and torch.equal(logits(teacher), before)
    with pytest.raises(BadInput, match="LoRA of rank 2 on the rest, and the rest trained whole"):
        apply(twin(teacher), shared, rest=True, lora_rank=2)


def test_twins_share_every_tensor(folders: dict[str, Path]) -> None:
    model = model_of(folders["gemma3"])
    other = twin(model)
    assert [id(p) for p in model.parameters()] == [id(p) for p in other.parameters()]
    assert not {id(m) for m in model.modules()} & {id(m) for m in other.modules()}
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("name", KINDS)
def test_a_cache_counts_its_tokens_though_the_first_attention_is_dropped(folders: dict[str, Path], name: str) -> None:
    model = model_of(folders[name])
    apply(model, Shared((), ("model.layers.0.self_attn", "model.layers.3.self_attn", "model.layers.1.mlp"))).finish()
    ids = IDS[:1, :6]
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    for _ in range(made.shape[1] - 6):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert made.shape[1] > 8 and torch.equal(made, ids)


def test_an_anchor_in_a_group_that_is_tied_in_part(folders: dict[str, Path]) -> None:
    model = model_of(folders["llama_gqa"])
    a, b = (
        ties(model, ("mlp.up_proj",), targets=(2,))[0],
        ties(model, ("mlp.gate_proj",), targets=(3,))[0],
    )
    student = apply(model, Shared((a, b)), lora_rank=2)
    expected = student.switches["model.layers.2.mlp"].delta.gate_proj
    assert student.tied[1].anchor is expected
    student.finish()
    assert student.tied[1].anchor is model.model.layers[2].mlp.gate_proj


def test_what_cannot_be_tied_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    model = model_of(folders["llama_gqa"])
    one, other = ties(model, ("mlp.up_proj",))
    u, v = one.u, one.v
    up = "model.layers.{}.mlp.up_proj.weight"
    for shared, message in (
        (Shared((Tie(up.format(9), None, 0.0, u, v),)), "no tensor 'model.layers.9"),
        (Shared((one, one)), "tied twice"),
        (Shared((one, Tie(up.format(2), up.format(1), 1.0, u, v))), "tied itself"),
        (Shared((one,), ("model.layers.1.mlp",)), "choose one"),
        (Shared((one,), ("model.layers.0.mlp",)), "refer to a kept one"),
        (Shared((), ("model.layers.9.mlp",)), "no sub-layer"),
        (Shared((), ("mlp",)), "no sub-layer; write"),
        (Shared((Tie(one.tensor, one.reference, 1.0, v.T, u.T),)), "do not fit"),
    ):
        with pytest.raises(BadInput, match=message):
            apply(model, shared)
    with pytest.raises(Unsupported, match="only those of nn.Linear"):
        apply(model, Shared((Tie("model.norm.weight", None, 0.0, u, v),)))
    with pytest.raises(Unsupported, match="not inside"):
        apply(model, Shared((Tie("lm_head.weight", None, 0.0, u, v),)))
    gpt2 = model_of(pico("gpt2", tmp_path / "gpt2"))
    with pytest.raises(Unsupported, match="Conv1D"):
        apply(gpt2, Shared((Tie("transformer.h.1.mlp.c_fc.weight", None, 0.0, u, v),)))
