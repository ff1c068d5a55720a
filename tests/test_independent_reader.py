"""README.md says enough to read a .bayou file: a reader written from it alone finds the same bits as bayou does."""

import ast
import itertools
import re
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import independent_reader
import independent_steps
import numpy as np
import pico
import pytest
import torch
from safetensors.torch import load_file
from tamper import everything, experts_of

import bayou
from bayou.delta import Delta, Dense, LowRank
from bayou.deltafile import DeltaFile
from bayou.entry import pack_terms
from bayou.packed import Packed, Spec

FEW: dict[str, Any] = {"tokens": 1024, "length": 64}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "deltacome": ("llama_gqa", {"fp32_names": ("model.norm.weight",), "integer_buffer": True}, {"ratio": 2, **FEW}),
    "conv1d": ("gpt2", {}, {"ratio": 2, **FEW}),
    "bitdelta": ("mixtral", {}, {"method": "bitdelta", "ratio": 2, "distill_steps": 1, **FEW}),
    "grown": (
        "llama_tied",
        {"grow_vocab": 3},
        {"method": "lowrank", "options": {"bits": 4}, "ratio": 2, "calibration": "none"},
    ),
    "exact": ("llama_gqa", {"grow_vocab": 3}, {"method": "exact", "options": {"bands": "8x2,4x8,3x4"}}),
    "exact conv1d": ("gpt2", {}, {"method": "exact"}),
    "coded": ("llama_gqa", {}, {"ratio": 2, "entropy": True, **FEW}),
    "coded lowrank": ("gpt2", {}, {"method": "lowrank", "ratio": 2, "entropy": True}),
}
GROUPS = ("", "r", "rz", "g1", "g16z", "g32", "g128", "g128z")
WORDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
README = Path(__file__).parent.parent / "README.md"


def bits(tensor: torch.Tensor) -> np.ndarray:
    """A tensor as the independent reader gives it: bf16 as uint16."""
    return (tensor.contiguous().view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    return (found.dtype, found.shape, found.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())


def stored(path: Path) -> dict[str, list[tuple[np.ndarray, ...]]]:
    """What `independent_reader.factors` should give, from bayou."""
    opened, found = DeltaFile(path), {}
    for name in opened.sites:
        terms = opened.with_steps(name)[0].terms
        blocks = [b for term in terms for b in ([(term.weight,)] if isinstance(term, Dense) else term.blocks)]
        found[name] = [tuple(packed.unpack().numpy() for packed in block) for block in blocks]
    return found


def assert_read_alike(base: Path, file: Path, scratch: Path) -> None:
    """Factors and tensors are the same bits by either reader."""
    found, wanted = independent_reader.factors(file), stored(file)
    assert list(found) == list(wanted)
    for name, blocks in wanted.items():
        assert len(found[name]) == len(blocks), name
        assert all(map(same, itertools.chain(*found[name]), itertools.chain(*blocks))), name
    bayou.restore(base, file, scratch)
    tensors, restored = independent_reader.restore(file, base), load_file(scratch / "model.safetensors")
    assert sorted(tensors) == sorted(restored)
    assert [name for name, tensor in restored.items() if not same(tensors[name], bits(tensor))] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned and a.bayou in a folder for each of CASES, "everything" and "experts"."""
    folder = tmp_path_factory.mktemp("independent")
    for case, (name, changes, options) in CASES.items():
        base = pico.pico(name, folder / case / "base")
        tuned = pico.perturb(base, folder / case / "tuned", **changes)
        bayou.compress(base, tuned, folder / case / "a.bayou", **options)
    everything(folder / "everything")
    experts_of(folder / "experts")
    return folder


@pytest.mark.parametrize("case", [*CASES, "everything", "experts"])
def test_a_reader_made_from_the_readme_finds_the_same_bits(folder: Path, case: str, tmp_path: Path) -> None:
    assert_read_alike(folder / case / "base", folder / case / "a.bayou", tmp_path / "out")


def test_the_cases_have_what_they_are_there_for(folder: Path) -> None:
    opened = {case: DeltaFile(folder / case / "a.bayou") for case in (*CASES, "everything", "experts")}
    terms = {case: [t for name in file.sites for t in file.with_steps(name)[0].terms] for case, file in opened.items()}
    assert all(site.steps and site.terms for site in opened["exact"].sites.values())
    assert any(site.coded for site in opened["coded"].sites.values())
    assert any(site.transposed and site.steps for site in opened["exact conv1d"].sites.values())
    assert max(len(t.blocks) for t in terms["deltacome"] if isinstance(t, LowRank)) > 1
    assert "bayou_test.position_ids" in opened["deltacome"].exact
    assert any(site.transposed for site in opened["conv1d"].sites.values())
    assert {str(t.weight.spec) for t in terms["bitdelta"] if isinstance(t, Dense)} == {"1"}
    assert {v.spec.bits for t in terms["grown"] if isinstance(t, LowRank) for _, v in t.blocks} == {4}
    assert [name for name in opened["grown"].exact if name.endswith("[128:]")] == ["model.embed_tokens.weight[128:]"]
    assert "model.norm.weight" in opened["everything"].unchanged
    assert [site.part for site in opened["experts"].sites.values() if site.tensor == "experts"] == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["f16", "bf16", "f32", *(f"{n}{g}" for n in range(1, 9) for g in GROUPS)])
def test_every_number_format_is_read_alike(text: str) -> None:
    g, spec = torch.Generator().manual_seed(0), Spec.parse(text)
    for rows, cols in ((1, 1), (3, 31), (5, 33), (7, 130)):
        if spec.floats:
            packed = Packed.floats(torch.randn(rows, cols, generator=g), spec.floats)
        else:
            groups = (rows, spec.groups(cols))
            codes, zeros = (torch.randint(2**spec.bits, n, generator=g).byte() for n in ((rows, cols), groups))
            scales = torch.randn(groups, generator=g) if groups[1] else None
            packed = Packed.codes(codes, spec, scales, zeros if spec.zeros else None)
        data = pack_terms([Dense(packed)])[16:]
        assert same(independent_reader.unpack(BytesIO(data), text, rows, cols), packed.unpack().numpy())


@pytest.mark.parametrize("scaled", ["", "o", "i", "oi"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scales_gains_and_roundings_are_read_alike(scaled: str, dtype: torch.dtype) -> None:
    g, shape = torch.Generator().manual_seed(0), (24, 20)
    o, i = (torch.rand(n, generator=g).half() if k in scaled else None for k, n in zip("oi", shape, strict=True))
    u, v = (Packed.floats(torch.randn(size, generator=g)) for size in ((24, 3), (3, 20)))
    terms = (LowRank(((u, v),), 0.3, o, i), Dense(Packed.floats(torch.randn(shape, generator=g)), -0.1, o, i))
    terms = tuple(replace(t, gain=float(np.float32(t.gain))) for t in terms)
    reference = torch.randn(shape, generator=g).to(dtype)
    wanted = Delta(shape, terms, "w", 0.7).restore(reference, dtype)
    flags, word = [scaled] if scaled else [], WORDS[dtype]
    plan = {"shape": shape, "disk": shape, "transposed": False, "dtype": word}
    plan["terms"] = [["LowRank", [[3, "f16", "f16"]], *flags], ["Dense", [[0, "f16", ""]], *flags]]
    base = {"w": (word, bits(reference))}
    found = independent_reader.matrix(plan, {"reference": "w", "gain": 0.7}, pack_terms(terms), base)
    if dtype == torch.float64:  # the order of a product's sum is the reader's own
        assert np.allclose(found, wanted.numpy(), rtol=0, atol=1e-13)
    else:
        assert same(found, bits(wanted))


def test_damage_and_another_base_are_refused(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "grown" / "a.bayou").read_bytes()
    for at in (3, 200, len(whole) // 2, len(whole) - 50, len(whole) - 1):
        (tmp_path / "a.bayou").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError):
            independent_reader.load(tmp_path / "a.bayou")
    with pytest.raises(ValueError, match="model"):
        independent_reader.restore(folder / "grown" / "a.bayou", folder / "grown" / "tuned")


def test_the_example_of_the_readme_is_right() -> None:
    section = README.read_text().partition("### Example")[2]
    data = bytes.fromhex(" ".join(re.findall(r"^    [0-9a]0  ((?:[0-9a-f]{2} ?){16})", section, re.M)))
    assert len(data) == 160
    w = independent_reader.narrow((20 * np.arange(16)[:, None] + np.arange(20)) / 64 - 2, "BF16")
    template = {"shape": [16, 20], "disk": [16, 20], "transposed": False, "dtype": "BF16"}
    template["terms"] = [["LowRank", [[2, "f16", "3g16z"]]]]
    found = independent_reader.matrix(template, {"reference": "w"}, data, {"w": ("BF16", w)})
    assert [hex(found[at]) for at in ((3, 17), (0, 0), (15, 19))] == ["0xbf5a", "0xbff9", "0x4038"]


@pytest.mark.parametrize("module", [independent_reader, independent_steps])
def test_the_reader_is_short_and_shares_nothing(module: ModuleType) -> None:
    text = Path(str(module.__file__)).read_text()
    assert len(text.splitlines()) <= 160
    nodes = list(ast.walk(ast.parse(text)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= {"numpy", "independent_steps", *sys.stdlib_module_names}


@pytest.mark.testbed
@pytest.mark.slow
def test_a_real_model_reads_alike(shallow: Path, tmp_path: Path) -> None:
    bayou.compress(shallow / "base", shallow / "intent", tmp_path / "a.bayou", calibration="none")
    assert_read_alike(shallow / "base", tmp_path / "a.bayou", tmp_path / "out")
