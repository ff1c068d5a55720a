"""A base in 4 bits: its answers, and its tenants', are those of a model with the rounded weights."""

from pathlib import Path

import pytest
import tenants
import torch
from tenants import Asked, alone, greedy, prompts
from torch import nn
from transformers import PreTrainedModel

from bayou.attach import attach
from bayou.errors import BadInput
from bayou.packed import Spec
from bayou.quantize import nearest
from bayou.serving.engine import Engine, Settings
from bayou.serving.few_bits import FewBits
from bayou.serving.refusals import Refused
from bayou.serving.sampling import Sampling

GREEDY = Sampling(max_tokens=10, ignore_eos=True)


def rounded(base: Path, file: Path | None) -> PreTrainedModel:
    """The base with each of its layers' linears as the 4 bits say, and a delta attached."""
    model = alone(base, None, base)
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            group = 64 if parameter.shape[1] % 64 == 0 else 32
            parameter.copy_(nearest(parameter, Spec.parse(f"4g{group}z")).unpack())
    if file is not None:
        attach(model, file)
    return model


@pytest.mark.parametrize("kernels", [False, True])
def test_tenants_over_a_base_in_four_bits(made: tuple, kernels: bool) -> None:
    base, files = made
    engine = Engine(base, "base", Settings(batch=7, kernels=kernels, base_bits=4))
    plain = Engine(base, "base", Settings(batch=7))
    try:
        few = [m for m in engine.model.base.modules() if isinstance(m, FewBits)]
        assert len(few) == 2 * 7 and {m.group for m in few} == {64, 32}
        saved = sum(4 * m.weight.numel() - m.codes.nbytes - m.scales.nbytes for m in few)
        assert engine.model.nbytes == plain.model.nbytes - saved
        assert saved > 0.7 * sum(4 * m.weight.numel() for m in few)
        names = ("dense", "gain", "lowrank", "bitdelta", "deltacome", "grown", "exact")
        for name in names:
            engine.bank.register(name, files[name])
        models = {name: rounded(base, files.get(name)) for name in (*names, "base")}
        asked = [(name, p, Asked(engine, name, p, GREEDY)) for p in prompts(3) for name in models]
        for name, prompt, answer in asked:
            assert answer.wait().tokens == greedy(models[name], prompt, 10), name
        other = alone(base, None, base)
        assert any(greedy(other, p, 10) != greedy(models["base"], p, 10) for p in prompts(3)), (
            "rounding changes nothing"
        )
    finally:
        engine.close()
        plain.close()


def test_what_such_a_base_has_no_place_for_is_refused(made: tuple, tmp_path: Path) -> None:
    base, _ = made
    tuned = tenants.perturb(base, tmp_path / "tuned", seed=3, scale=0.3)
    file = tmp_path / "whole.bayou"
    tenants.compress(base, tuned, file, method="lowrank", ratio=1.5, keep=(".*q_proj.*",), distill_steps=0)
    engine = Engine(base, "base", Settings(base_bits=4))
    try:
        tenant = engine.bank.register("whole", file)
        with pytest.raises(Refused, match="stored as a whole, which a base in 4 bits"):
            engine.load(tenant)
    finally:
        engine.close()
    with pytest.raises(BadInput, match="a base in 3 bits: 16 or 4"):
        Engine(base, "base", Settings(base_bits=3))


def test_the_product_is_that_of_the_rounded_weights() -> None:
    g = torch.Generator().manual_seed(0)
    inner = nn.Linear(192, 48)
    inner.weight.data = torch.randn(48, 192, generator=g)
    few = FewBits(inner, 64)
    x = torch.randn(2, 5, 192, generator=g)
    wanted = x @ nearest(inner.weight.detach(), Spec.parse("4g64z")).unpack().T + inner.bias
    assert torch.allclose(few(x), wanted, atol=1e-4)
    assert few.weight.is_meta and few.weight.shape == inner.weight.shape
