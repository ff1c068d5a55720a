"""kernels/: the plain version against the formula in fp64, and the Triton version against the plain one.

Triton's interpreter runs the kernel on the CPU, in a process of its own: the variable that asks for it must be set
before Triton is imported. With a CUDA device the compiled kernel is compared as well.
"""

import sys
import warnings
from types import SimpleNamespace
from typing import Any

import interpreter
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bayou import kernels
from bayou.kernels import gptq_block

SHAPES = [(1, 1, 1), (1, 9, 2), (3, 1, 31), (2, 4, 33), (1, 5, 64), (2, 3, 100), (1, 8, 127), (3, 9, 128)]
"""(batch, rows, n): rows beside the 4 of a program, columns up to the widest block."""
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

INTERPRETED = """
import sys, torch
from interpreter import stop_measuring
from safetensors.torch import load_file, save_file
from bayou.kernels import gptq_block
given, results = load_file(sys.argv[1]), {}
for case in sorted({name.split(".")[0] for name in given}):
    parts = [given[f"{case}.{part}"] for part in ("w", "inverse", "scale", "zero", "top")]
    n = parts[0].shape[2]
    # As gptq calls it: every matrix is a part of a larger one. What lies outside must not matter.
    wide = [torch.nn.functional.pad(part, (2, 1, 1, 3), value=float("nan")) for part in parts]
    inside = [part[:, 1:-3, 2:-1] for part in wide]
    values, errors = gptq_block._triton(*inside)
    assert all(torch.equal(a, b) for a, b in zip(parts, inside)), "the inputs were written to"
    results[f"{case}.values"], results[f"{case}.errors"] = values, errors
    if parts[0].shape[1] > 4:  # more rows than a program has: it went through all lines
        stop_measuring()
save_file(results, sys.argv[2])
"""


def inputs(shape: tuple[int, int, int]) -> Inputs:
    """w, inverse, scale, zero, top; one column in three is floats in some rows, one in all."""
    batch, rows, n = shape
    g = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(batch, 4 * n, n, generator=g, dtype=torch.float64)
    hessian = x.mT @ x + n * torch.eye(n, dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float()
    w = torch.randn(shape, generator=g)
    scale = (torch.rand(shape, generator=g) + 0.2).half().float()
    top = 2.0 ** torch.randint(1, 9, (batch, rows, n), generator=g) - 1
    zero = (torch.rand(shape, generator=g) * top).round()
    floats = (torch.rand(shape, generator=g) < 0.3) & (torch.arange(n) % 3 == 1)
    floats[..., n // 2] = n > 1
    return w, inverse, scale, torch.where(floats, 0.0, zero), torch.where(floats, 0.0, top)


def textbook(w: Tensor, inverse: Tensor, scale: Tensor, zero: Tensor, top: Tensor) -> tuple[Any, Any, Any]:
    """Values, errors, and the rows (batch, rows) of which no number is so near a tie that fp32 may go the other way."""
    left, factor, scales, zeros, tops = (part.double().numpy().copy() for part in (w, inverse, scale, zero, top))
    values, errors, clear = np.zeros(left.shape), np.zeros(left.shape), np.ones(left.shape[:2], dtype=bool)
    for b, i in np.ndindex(*left.shape[:2]):
        row = left[b, i]
        for j in range(row.size):
            if tops[b, i, j] == 0:
                half = np.float16(row[j])
                value = float(half)
                from_tie = 0.5 - abs(row[j] - value) / abs(np.spacing(half).astype(float))
            else:
                level = row[j] / scales[b, i, j] + zeros[b, i, j]
                value = scales[b, i, j] * (min(max(round(level), 0), tops[b, i, j]) - zeros[b, i, j])
                from_tie = abs(level % 1 - 0.5)
            clear[b, i] &= from_tie > 1e-3
            values[b, i, j] = value
            errors[b, i, j] = error = (row[j] - value) / factor[b, j, j]
            for k in range(j + 1, row.size):
                row[k] -= error * factor[b, j, k]
    return values, errors, clear


def agree(found: tuple[Tensor, Tensor], shape: tuple[int, int, int]) -> None:
    """`found` is what the textbook's loop gives, in the rows where rounding in fp32 cannot matter."""
    values, errors, clear = textbook(*inputs(shape))
    assert clear.mean() >= 0.5, "choose another seed"
    assert found[0].shape == found[1].shape == shape
    assert found[0].dtype == found[1].dtype == torch.float32
    np.testing.assert_allclose(found[0].cpu().numpy()[clear], values[clear], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1].cpu().numpy()[clear], errors[clear], rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the Triton kernel gives for each of SHAPES, interpreted."""
    folder = tmp_path_factory.mktemp("interpreted")
    names = ("w", "inverse", "scale", "zero", "top")
    given = {f"{i}.{n}": t for i, shape in enumerate(SHAPES) for n, t in zip(names, inputs(shape), strict=True)}
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, folder / "given")
    interpreter.run("-W", "error", "-c", INTERPRETED, folder / "given", folder / "found")
    return load_file(folder / "found")


@shapes
def test_the_plain_version_is_the_textbook_s(shape: tuple[int, int, int]) -> None:
    given = inputs(shape)
    before = [part.clone() for part in given]
    agree(gptq_block.reference(*given), shape)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@shapes
def test_the_triton_version_is_the_textbook_s(shape: tuple[int, int, int], interpreted: dict[str, Tensor]) -> None:
    case = SHAPES.index(shape)
    agree((interpreted[f"{case}.values"], interpreted[f"{case}.errors"]), shape)


@shapes
def test_the_triton_version_is_the_plain_one_in_every_row(
    shape: tuple[int, int, int], interpreted: dict[str, Tensor]
) -> None:
    """Ties included: both round to even, in fp32, in the same order."""
    case = SHAPES.index(shape)
    values, errors = gptq_block.reference(*inputs(shape))
    assert torch.equal(interpreted[f"{case}.values"], values)
    assert torch.equal(interpreted[f"{case}.errors"], errors)


@shapes
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device for the compiled kernel")
def test_the_compiled_kernel_is_the_textbook_s(shape: tuple[int, int, int]) -> None:
    given = [part.cuda() for part in inputs(shape)]
    agree(gptq_block.gptq_block(*given), shape)


def test_one_factor_may_serve_a_whole_batch() -> None:
    w, inverse, scale, zero, top = inputs((3, 9, 128))
    shared = inverse[:1].expand(3, -1, -1)
    assert shared.stride(0) == 0
    values, errors = gptq_block.gptq_block(w, shared, scale, zero, top)
    for i in range(3):
        one = slice(i, i + 1)
        alone = gptq_block.reference(w[one], inverse[:1], scale[one], zero[one], top[one])
        assert torch.equal(values[one], alone[0]) and torch.equal(errors[one], alone[1])


def test_codes_stay_between_nil_and_top_and_ties_go_to_even() -> None:
    w = torch.tensor([[[-9.0, 0.5, 1.5, 2.5, 9.0]]])
    one, nil = torch.ones_like(w), torch.zeros_like(w)
    values, errors = gptq_block.reference(w, torch.eye(5)[None] * 2, one, nil, 3 * one)
    assert values.tolist() == [[[0.0, 0.0, 2.0, 2.0, 3.0]]]
    assert errors.tolist() == [[[-4.5, 0.25, -0.25, 0.25, 3.0]]]


def test_the_cpu_takes_the_plain_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq_block, "_triton", lambda *_: pytest.fail("Triton's version was taken"))
    monkeypatch.setattr(kernels, "triton_available", lambda: pytest.fail("Triton was looked for"))
    given = inputs((1, 5, 64))
    assert torch.equal(gptq_block.gptq_block(*given)[0], gptq_block.reference(*given)[0])


def test_a_missing_triton_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it then raises ImportError
    kernels.triton_available.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"Triton is not installed: .*\(pip install 'bayou\[gpu\]'\)"):
            assert not kernels.use_triton(on_gpu)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not kernels.use_triton(on_gpu)
    finally:
        kernels.triton_available.cache_clear()


def test_triton_is_used_where_there_are_both_it_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu: Any = SimpleNamespace(is_cuda=True)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace())
    kernels.triton_available.cache_clear()
    try:
        assert kernels.use_triton(on_gpu)
        assert not kernels.use_triton(torch.zeros(1))
    finally:
        kernels.triton_available.cache_clear()
