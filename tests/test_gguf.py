"""`bayou export --to gguf-lora`: gguf's own reader gives back the file's deltas, in llama.cpp's order of rows."""

import sys
from pathlib import Path

import pytest
import torch
from test_export import deltas, export, make
from torch import Tensor

from bayou.errors import BadInput, Unsupported

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install gguf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("gguf"))


def ungguf(rows: Tensor, heads: int) -> Tensor:
    """transformers' order of q's or k's rows from llama.cpp's: 2 i and 2 i + 1 are i of the two halves of a head."""
    per_head = len(rows) // heads
    order = [
        h * per_head + 2 * (i % (per_head // 2)) + i // (per_head // 2) for h in range(heads) for i in range(per_head)
    ]
    return rows[order]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("llama_gqa", "llama"),
        ("mistral", "llama"),
        ("qwen2", "qwen2"),
        ("gpt2", "gpt2"),
        ("phi3", "phi3"),
        ("gemma3", "gemma3"),
    ],
)
def test_a_gguf_lora_says_what_the_file_says(tmp_path: Path, name: str, architecture: str) -> None:
    folder = make(tmp_path / "in", name)
    found = export(folder, tmp_path / "a.gguf", to="gguf-lora", dtype="float32")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    kinds = ("general.architecture", "general.type", "adapter.type")
    assert [reader.fields[key].contents() for key in kinds] == [architecture, "adapter", "lora"]
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: torch.tensor(tensor.data).double() for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], 2)
    linears = {n: d for n, d in deltas(folder).items() if "proj" in n or ".c_" in n}
    assert len(tensors) == 2 * len(linears) and found["vllm"] is None and found["bytes"] > 1000
    permuted = 0
    for site, delta in linears.items():
        place = f"{names.get_name(site.removesuffix('.weight'))}.weight"
        a, b = tensors[f"{place}.lora_a"], tensors[f"{place}.lora_b"]
        made = b @ a * (alpha / b.shape[1])  # llama.cpp's scale
        if architecture == "llama" and ("q_proj" in site or "k_proj" in site):
            permuted += not torch.allclose(made, delta, atol=1e-5)
            made = ungguf(made, 4 if "q_proj" in site else 2)
        assert torch.allclose(made, delta, atol=1e-5), site
    assert permuted == (4 if architecture == "llama" else 0)


@pytest.mark.filterwarnings("ignore")
def test_a_gguf_lora_of_tables_and_in_bf16(folder: Path, tmp_path: Path) -> None:
    export(folder, tmp_path / "a.gguf", to="gguf-lora", dtype="bfloat16", embeddings="lora")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert {tensor.tensor_type.name for tensor in tensors.values()} == {"BF16"}
    for place, site in (("token_embd", "model.embed_tokens.weight"), ("output", "lm_head.weight")):
        a, b = (torch.tensor(tensors[f"{place}.weight.lora_{end}"].data).view(torch.bfloat16).double() for end in "ab")
        rank = a.shape[1] if place == "token_embd" else b.shape[1]
        made = (a @ b.T if place == "token_embd" else b @ a) * (alpha_of(tmp_path / "a.gguf") / rank)
        delta = deltas(folder)[site]
        assert (made - delta).norm() < 0.01 * delta.norm()


def test_the_kl_is_that_of_the_peft_adapter_of_that_rank(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Every number of this text counts.\n" * 3)
    options = {"rank": 12, "dtype": "float32", "data": tmp_path / "a.txt"}
    ours = export(folder, tmp_path / "a.gguf", to="gguf-lora", **options)
    theirs = export(folder, tmp_path / "out", **options)
    assert ours["data"]["kl"] == pytest.approx(theirs["data"]["kl"], rel=1e-4) and ours["data"]["kl"] > 1e-3
    assert ours["kinds"]["linear"]["energy"] == pytest.approx(theirs["kinds"]["linear"]["energy"])


def alpha_of(path: Path) -> float:
    return float(gguf.GGUFReader(path).fields["adapter.lora.alpha"].contents())


def test_what_llama_cpp_cannot_take_is_refused(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.gguf"
    with pytest.raises(Unsupported, match="type 'mixtral' is not laid out as here in llama.cpp; known are gemma"):
        export(make(tmp_path / "moe", "mixtral"), out, to="gguf-lora")
    with pytest.raises(Unsupported, match="the head tied to it: leave --embeddings lora out"):
        export(make(tmp_path / "tied", "llama_tied"), out, to="gguf-lora", embeddings="lora")
    with pytest.raises(BadInput, match="takes nothing but LoRAs"):
        export(folder, out, to="gguf-lora", exact=True)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BadInput, match=r"pip install 'bayou\[gguf\]'"):
        export(folder, out, to="gguf-lora")
    assert not out.exists()
