"""The kernels of a decode step against their plain references: interpreted, and compiled for an H100."""

import json
from pathlib import Path

import interpreted_engine
import interpreter
import pytest
import steps
import torch
from torch import nn

from bayou.kernels import rotary, row_norm

LIMITS = {"bfloat16": 1e-2, "float16": 2e-3}
"""Relative error by dtype, and of fp32 1e-5; the interpreter cuts numbers to bf16 instead of rounding them."""

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device for the compiled kernels")


def limit(case: str) -> float:
    return next((value for word, value in LIMITS.items() if word in case), 1e-5)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The error of each small case, interpreted."""
    return interpreter.errors(steps.__file__, tmp_path_factory.mktemp("interpreted"))


@pytest.mark.slow
@pytest.mark.parametrize("case", steps.small())
def test_the_triton_version_is_the_reference(case: str, interpreted: dict[str, float]) -> None:
    assert interpreted[case] <= limit(case)


@on_gpu
@pytest.mark.parametrize("case", steps.small() | steps.large())
def test_the_compiled_kernels_are_the_reference(case: str) -> None:
    close = 2e-3 if "attention" in case and limit(case) < 2e-3 else limit(case)
    assert (steps.small() | steps.large())[case]("cuda") <= close


@pytest.mark.slow
def test_the_engine_gives_every_kernel_what_it_takes(tmp_path: Path) -> None:
    interpreter.run(interpreted_engine.__file__, tmp_path / "models", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["fixed"] and found["equal"] == found["asked"] == 4
    assert set(found["ran"]) == {"packed_product", "row_norm", "rotary", "decode_attention", "row_lookup"}


BF16, F32, I64, I32 = "*bf16", "*fp32", "*i64", "*i32"
ATTEND = [BF16] * 5 + [I64, I64, BF16] + ["i32"] * 12 + ["fp32", "fp32", "i32"]
SPREAD = [BF16] + ["i32"] * 4 + [BF16] * 4
PRODUCT = [I64, I32, "i32", F32, "i32", "i32", "i32"] + [BF16] * 8 + ["i32"] * 7 + [I32, I32, "i32", "i32"]
PLAIN = {"FIELDS": 32, "M": 64, "MOST": 128, "ROWS": 4, "SCALED": False, "STAGES": 3, "ASM": True}
SUM = [I64, I32, "i32", I64, I32, "i32", BF16, "i32", F32, I64, I64, F32, "i32", BF16, "i32", "i32"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "types", "fixed"),
    [
        ("attend", ATTEND, {"D": 128, "E": 128, "GROUP": 1, "CAPPED": False, "WINDOWED": False}),
        ("attend", ATTEND, {"D": 64, "E": 64, "GROUP": 4, "CAPPED": False, "WINDOWED": False}),
        ("attend", ATTEND, {"D": 256, "E": 256, "GROUP": 2, "CAPPED": True, "WINDOWED": True}),
        ("normalise", [BF16, BF16, I64, BF16] + ["i32"] * 5 + ["fp32"], {"PLUS": False, "WIDE": 4096}),
        ("rotate", [BF16] * 6 + ["i32"] * 7, {"WIDE": 64}),
        ("whole", [I64, BF16, "i32", "i32"], {"UP": True, "FIELDS": 32, "M": 32, "K": 128}),
        ("spread", SPREAD, {"WIDTHS": 15, "PARTS": 1, "SLICES": 1, "C": 256}),
        ("spread", [F32, *SPREAD[1:]], {"WIDTHS": 14, "PARTS": 2, "SLICES": 8, "C": 256}),
        ("product", PRODUCT, PLAIN | {"SHRINK": True, "PARTS": 1, "SPLIT": 4, "LOOPS": 0b01_0010_0100}),
        ("product", PRODUCT, PLAIN | {"SHRINK": False, "PARTS": 2, "SPLIT": 1, "LOOPS": 0b11_1111_1111_1110}),
        ("row_of_u", [I64, I32, I64, I64, F32, "i32", "i32"], {"FIELDS": 32, "K": 128}),
        ("row_of_sum", SUM, {"DELTAS": True, "FIELDS": 32, "TALL": 16, "K": 128}),
    ],
)
def test_they_compile_for_an_h100(name: str, types: list, fixed: dict, tmp_path: Path, monkeypatch) -> None:
    """To machine code, which needs no GPU: the interpreter takes much that the compiler does not."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bayou.kernels import decode_loops, entries, packed_loops, packed_panels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if name == "attend":
        fixed = fixed | {"WIDE_D": fixed["D"], "WIDE_E": fixed["E"], "QUERIES": 16, "BLOCK": 64}
    if name in ("attend", "product"):
        fixed = fixed | {"DOT": triton.language.bfloat16}
    kernel = next(
        getattr(part, name) for part in (decode_loops, entries, packed_loops, packed_panels) if hasattr(part, name)
    )
    free = iter(types)
    signature = {word: "constexpr" if word in fixed else next(free) for word in kernel.arg_names}
    assert next(free, None) is None
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(word),): value for word, value in fixed.items()})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(made.asm["cubin"]) > 1000
    # Tiles are copied ahead of their use, each step's x among them: a loop without is several times slower.
    assert name != "product" or made.asm["ptx"].count("cp.async.c") >= 60


def test_which_norm_a_module_is() -> None:
    class Plus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.zeros(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (1 + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    class Other(Plus):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    assert row_norm.kind_of(LlamaRMSNorm(8, eps=1e-4)) == ("times", 1e-4)
    assert row_norm.kind_of(Plus()) == ("plus", 1e-6)
    assert row_norm.kind_of(Other()) is None and row_norm.kind_of(nn.LayerNorm(8)) is None


def test_a_function_of_another_formula_stays() -> None:
    q, k, cos, sin = (torch.randn(1, *shape) for shape in ((2, 3, 8), (1, 3, 8), (3, 8), (3, 8)))

    def interleaved(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> rotary.Pair:
        return q * cos[0, 0, 0], k * sin[0, 0, 0]

    for original in (interleaved, rotary.reference):
        apply = rotary.in_place_of(original)
        for _ in range(2):
            found, wanted = apply(q, k, cos, sin), original(q, k, cos, sin)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
