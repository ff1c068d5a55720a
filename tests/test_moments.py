"""moments.py: 16-bit activations give the moments that rounding needs. (tests/test_calibrate.py has what is summed.)"""

import pytest
import torch
from torch import Tensor, nn

from bayou.moments import Grams
from bayou.packed import Spec
from bayou.quantize import factorize, gptq, grid, spread


def activations(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Correlated, with channels of very unequal size and some rare large values, as a language model's are."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g) / width**0.5 + torch.eye(width)
    x = torch.randn(tokens, width, generator=g) @ mix * torch.logspace(-1.5, 1, width)
    rare = torch.rand(tokens, width, generator=g) < 1e-3
    return torch.where(rare, 20 * x, x)


def gram(x: Tensor, steps: int = 4) -> Tensor:
    with Grams(nn.Sequential(nn.Linear(x.shape[1], 1, bias=False)), "m") as grams:
        for part in x.chunk(steps):
            grams.add("m.0", part)
            grams.end_of_step()
    return grams.named["m.0"]


def lost(w: Tensor, values: Tensor, h: Tensor) -> float:
    error = (w - values).double()
    return float((error @ h.double() * error).sum())


@pytest.mark.parametrize("bits", [2, 3])
def test_bf16_activations_round_a_matrix_as_well_as_fp32_ones(bits: int) -> None:
    """What a GPU's calibration rests on: judged by the true moments, less than 1 % is lost by it."""
    x = activations(4000, 192)
    exact, coarse = gram(x), gram(x.bfloat16().float())
    assert 0 < float((exact - coarse).norm() / exact.norm()) < 5e-3
    w = torch.randn(48, 192, generator=torch.Generator().manual_seed(1))
    spec = Spec(bits, 64, True)
    levels = spread(*grid(w, spec), spec, 192)
    by_exact, by_coarse = (lost(w, gptq(w, factorize(h), levels)[1], exact) for h in (exact, coarse))
    nearest = lost(w, levels.expand(w.shape).round(w)[1], exact)
    assert by_coarse < 1.01 * by_exact < 0.9 * nearest


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device for its tensor cores")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_cores_sum_in_fp32(dtype: torch.dtype) -> None:
    x = activations(40_000, 256).to(dtype).cuda()
    found = gram(x, steps=5)
    wanted = x.double().T @ x.double()
    assert found.dtype == torch.float32
    # Tensor cores cut off what does not fit as they sum: 1.3e-5 for fp16 on an H200, where fp16 sums would be at 1e-3.
    assert float((found - wanted).norm() / wanted.norm()) < 3e-5
    assert float((found.diagonal() / wanted.diagonal() - 1).abs().max()) < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device to take its own way")
def test_a_gpu_factorises_as_the_cpu_does() -> None:
    h = gram(activations(2000, 160))
    here, there = factorize(h), factorize(h.cuda())
    assert torch.equal(here.order, there.order.cpu()) and torch.equal(here.dead, there.dead.cpu())
    assert torch.allclose(here.inverse, there.inverse.cpu(), rtol=1e-4, atol=1e-6)
