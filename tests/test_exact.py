"""--method exact: every tensor comes back bit for bit, in few bytes, and nothing takes the file for a sum of terms."""

import json
import shutil
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tamper import take_apart, tensors

import bayou
from bayou import exact, share
from bayou.attach import attach, detach
from bayou.checkpoint import Checkpoint
from bayou.compress import compress
from bayou.decompose import Matrix
from bayou.delta import Delta, LowRank
from bayou.deltafile import DeltaFile
from bayou.entry import pack_terms
from bayou.errors import BadFile, BadInput, TooSmall, Unsupported
from bayou.integrations.export import export
from bayou.methods import Site
from bayou.methods import exact as forecast
from bayou.report import inspect, verify

NAMES = ("llama_gqa", "gpt2", "mixtral", "gemma3", "llava")


def made(folder: Path, name: str = "llama_gqa", **changes: Any) -> tuple[Path, Path, Path]:
    base = pico.pico(name, folder / "base")
    tuned = pico.perturb(base, folder / "tuned", **changes)
    compress(base, tuned, folder / "a.bayou", method="exact")
    return base, tuned, folder / "a.bayou"


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, a fine-tune of it, and its file."""
    return made(tmp_path_factory.mktemp("exact"))


def come_back(base: Path, tuned: Path, file: Path, out: Path) -> None:
    bayou.restore(base, file, out)
    assert tensors(out) == tensors(tuned)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_every_architecture_comes_back(name: str, tmp_path: Path) -> None:
    base, tuned, file = made(tmp_path, name)
    come_back(base, tuned, file, tmp_path / "out")
    opened = DeltaFile(file)
    assert opened.stepped and all(site.steps for site in opened.sites.values())
    assert set(opened.errors().values()) == {0.0}
    report = verify(file, base)
    assert report["base_tensors"] > 0


@pytest.mark.parametrize(
    "changes",
    [{"grow_vocab": 5}, {"integer_buffer": True}, {"shard": True}, {"fp32_names": ("lm_head.weight",)}],
    ids=str,
)
def test_odd_fine_tunes_come_back(changes: dict[str, Any], tmp_path: Path) -> None:
    come_back(*made(tmp_path, **changes), tmp_path / "out")


@pytest.mark.parametrize("old", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("new", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_over_any_other_comes_back(old: torch.dtype, new: torch.dtype, tmp_path: Path) -> None:
    base = pico.pico("llama_gqa", tmp_path / "base", dtype=old, num_hidden_layers=1)
    tuned = pico.perturb(base, tmp_path / "tuned")
    whole = {name: tensor.to(new) for name, tensor in load_file(tuned / "model.safetensors").items()}
    save_file(whole, tuned / "model.safetensors", metadata={"format": "pt"})
    compress(base, tuned, tmp_path / "a.bayou", method="exact")
    come_back(base, tuned, tmp_path / "a.bayou", tmp_path / "out")
    assert DeltaFile(tmp_path / "a.bayou").stepped == (new != torch.float64)  # whose tensors are stored as they are


def test_numbers_that_are_none_come_back(tmp_path: Path) -> None:
    base = pico.pico("llama_gqa", tmp_path / "base")
    tuned = pico.perturb(base, tmp_path / "tuned")
    whole = load_file(tuned / "model.safetensors")
    whole["lm_head.weight"][3, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0], dtype=torch.bfloat16)
    whole["model.layers.0.mlp.up_proj.weight"].zero_().neg_()
    save_file(whole, tuned / "model.safetensors", metadata={"format": "pt"})
    compress(base, tuned, tmp_path / "a.bayou", method="exact")
    come_back(base, tuned, tmp_path / "a.bayou", tmp_path / "out")
    assert "lm_head.weight" in DeltaFile(tmp_path / "a.bayou").exact


def test_an_untouched_fine_tune_and_one_of_a_few_changes_take_hardly_anything(tmp_path: Path) -> None:
    base = pico.pico("llama_gqa", tmp_path / "base", hidden_size=256, intermediate_size=512)
    shutil.copytree(base, tmp_path / "tuned")
    whole = load_file(base / "model.safetensors")
    moved = whole["model.layers.1.mlp.down_proj.weight"].view(-1)
    moved[::1000] = (moved[::1000].float() * 1.01).bfloat16()
    save_file(whole, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    compress(base, tmp_path / "tuned", tmp_path / "a.bayou", method="exact")
    opened = DeltaFile(tmp_path / "a.bayou")
    assert list(opened.sites) == ["model.layers.1.mlp.down_proj.weight"]
    assert opened.entry_nbytes("model.layers.1.mlp.down_proj.weight") < moved.nbytes / 100
    come_back(base, tmp_path / "tuned", tmp_path / "a.bayou", tmp_path / "out")


# ------------------------------------------------------------------------------------------------ the file


def test_only_files_with_steps_are_of_version_2(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, file = trio
    assert take_apart(file).metadata["version"] == "2"
    compress(base, tuned, tmp_path / "b.bayou", method="lowrank", ratio=2)
    assert take_apart(tmp_path / "b.bayou").metadata["version"] == "1"
    assert not DeltaFile(tmp_path / "b.bayou").stepped


def forged(file: Path, out: Path, own: dict[str, Any] | None = None, **changes: Any) -> Path:
    """The file with other keys of its first site, and other metadata."""
    parts = take_apart(file)
    plan = parts.plan
    plan["sites"][0] = [plan["sites"][0][0], plan["sites"][0][1] | (own or {})]
    parts.plan = plan
    parts.metadata |= changes
    out.write_bytes(parts.pack())
    return out


@pytest.mark.parametrize(
    "own",
    [{"steps": n} for n in (-16, 8, 2**41, 16.0, True, "16", None)]
    + [{"steps": 16}, {"reference": None}, {"reference": "self:model.norm.weight"}],
    ids=str,
)
def test_steps_that_cannot_be_are_refused_when_opened(
    trio: tuple[Path, Path, Path], tmp_path: Path, own: dict[str, Any]
) -> None:
    with pytest.raises(BadFile):
        DeltaFile(forged(trio[2], tmp_path / "x.bayou", own))


def test_steps_in_a_file_of_version_1_or_of_another_dtype_are_refused(
    trio: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(BadFile, match="sites with steps or coded terms, but is of version 1"):
        DeltaFile(forged(trio[2], tmp_path / "x.bayou", version="1"))
    parts = take_apart(trio[2])
    parts.metadata["plan"] = parts.metadata["plan"].replace('"BF16"', '"F64"')
    (tmp_path / "x.bayou").write_bytes(parts.pack())
    with pytest.raises(BadFile, match="bytes of steps for a site of F64"):
        DeltaFile(tmp_path / "x.bayou")


def test_steps_of_other_bytes_are_refused_though_the_hashes_hold(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, file = trio
    parts = take_apart(file)
    name, raw = parts.entries[0].name, bytearray(parts.entries[0].payload)
    steps = parts.plan["sites"][0][1]["steps"]
    raw[len(raw) - steps + 16] = 7  # the kind of its first chunk
    parts.replace(name, bytes(raw))
    (tmp_path / "x.bayou").write_bytes(parts.pack())
    told = f"{name}: its steps are not as specified: a chunk of kind 7"
    with pytest.raises(BadFile, match=told):
        verify(tmp_path / "x.bayou")
    with pytest.raises(BadFile, match=told):
        bayou.restore(base, tmp_path / "x.bayou", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inspect_tells_bits_and_that_nothing_is_lost(trio: tuple[Path, Path, Path]) -> None:
    found = inspect(trio[2])
    assert found["methods"] == ["exact"] and found["bytes"] == trio[2].stat().st_size
    assert all(kind["energy"] == 1 for kind in found["kinds"].values())
    assert 0 < found["kinds"]["linear"]["bits"] < 16
    assert found["parameters"] == sum(t.numel() for t in load_file(trio[1] / "model.safetensors").values())


# ------------------------------------------------------------------------------------------------ compressing


def test_the_same_input_gives_the_same_file(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    compress(trio[0], trio[1], tmp_path / "b.bayou", method="exact")
    assert (tmp_path / "b.bayou").read_bytes() == trio[2].read_bytes()


def test_a_stopped_run_goes_on_to_the_same_file(
    trio: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(step: str, done: int, total: int) -> None:
        if (step, done) == ("matrices", 3):
            raise KeyboardInterrupt

    out = tmp_path / "b.bayou"
    with pytest.raises(KeyboardInterrupt):
        compress(trio[0], trio[1], out, method="exact", progress=stop)
    assert len(list((tmp_path / "b.bayou.journal").glob("*.site"))) == 3
    encoded, real = [], exact._encoded
    monkeypatch.setattr(exact, "_encoded", lambda site, *rest: encoded.append(site.name) or real(site, *rest))
    compress(trio[0], trio[1], out, method="exact")
    assert len(encoded) == len(DeltaFile(out).sites) - 3
    assert out.read_bytes() == trio[2].read_bytes() and not out.with_name("b.bayou.journal").exists()


def test_a_size_that_is_asked_for_is_kept_or_refused_with_what_it_takes(
    trio: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, tuned, file = trio
    size = file.stat().st_size
    for asked in ({"ratio": 16}, {"budget": size - 1}):
        with pytest.raises(TooSmall, match=f"this fine-tune bit for bit takes {size:,} bytes") as error:
            compress(base, tuned, tmp_path / "b.bayou", method="exact", **asked)
        assert error.value.least == size
    assert list(tmp_path.iterdir()) == []
    assert compress(base, tuned, tmp_path / "b.bayou", method="exact", budget=size).bytes == size


def test_what_does_not_go_with_it_is_refused(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, tuned, _ = trio
    wrong: list[dict[str, Any]] = [
        {"method": "exact", "distill_steps": 5},
        {"method": "exact", "accounting": "paper"},
        {"method": "exact", "embedding_options": {"method": "lowrank"}},
        {"method": "lowrank", "embedding_options": {"method": "exact"}},
        {"method": "exact", "options": {"bands": "9x4"}},
        {"method": "exact", "options": {"bands": "4x65,4x64"}},
    ]
    for options in wrong:
        with pytest.raises(BadInput):
            compress(base, tuned, tmp_path / "b.bayou", **options)
    with pytest.raises(BadInput, match="here is none"):
        share(base, tmp_path / "b.bayou", delta_method="exact")
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_exactly_is_stored_as_it_is(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    compress(trio[0], trio[1], tmp_path / "b.bayou", method="exact", keep=("heads",))
    assert "lm_head.weight" in DeltaFile(tmp_path / "b.bayou").exact
    come_back(trio[0], trio[1], tmp_path / "b.bayou", tmp_path / "out")


# ------------------------------------------------------------------------------------------------ using


@pytest.mark.parametrize("name", NAMES)
def test_load_gives_the_fine_tune_itself(name: str, tmp_path: Path) -> None:
    base, tuned, file = made(tmp_path, name)
    model = bayou.load(base, file)
    architecture = json.loads((tuned / "config.json").read_text())["architectures"][0]
    wanted = getattr(transformers, architecture).from_pretrained(tuned, dtype=torch.float32)
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted(ids).logits)
    with pytest.raises(BadInput, match="nothing is attached"):
        detach(model)


def test_what_multiplies_by_deltas_refuses_such_a_file(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, file = trio
    told = "is a fine-tune bit for bit, which nothing can multiply by; bayou restore writes its model, bayou.load"
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with pytest.raises(Unsupported, match=told):
        attach(model, file)
    with pytest.raises(BadInput, match="nothing is attached"):
        detach(model)
    for to in ("peft", "gguf-lora"):
        with pytest.raises(Unsupported, match=told):
            export(base, file, tmp_path / "adapter", to=to)
        assert not (tmp_path / "adapter").exists()


# ------------------------------------------------------------------------------------------------ the forecast


def test_a_forecast_is_the_same_bits_in_whatever_order_it_is_summed() -> None:
    g = torch.Generator().manual_seed(0)
    delta = (
        torch.randn(300, 200, generator=g) @ torch.diag(torch.logspace(0, -6, 200)) @ torch.randn(200, 256, generator=g)
    )
    base = torch.randn(300, 256, generator=g).bfloat16()
    (term,) = forecast.encode(Site("w", Matrix((300, 256), lambda a, b: delta[a:b])), bands="8x16,4x40,3x72")
    assert isinstance(term, LowRank) and term.rank == 128
    wanted = Delta((300, 256), (term,), "w").materialize()
    u = torch.cat([u.unpack() for u, _ in term.blocks], 1).double()
    v = torch.cat([v.unpack() for _, v in term.blocks]).double()
    for _ in range(5):
        order = torch.randperm(128, generator=g)
        total = torch.zeros(300, 256, dtype=torch.float64)
        for k in order:
            total += u[:, k, None] * v[k]
        assert torch.equal(total * term.gain, wanted)
    assert torch.frexp(torch.tensor(term.gain)).mantissa == 0.5
    assert Delta((300, 256), (term,), "w").restore(base, torch.bfloat16).shape == base.shape


def test_the_forecast_pays_where_the_delta_is_of_low_rank_and_is_left_out_where_not() -> None:
    g = torch.Generator().manual_seed(0)
    low = torch.randn(400, 20, generator=g) @ torch.randn(20, 360, generator=g) * 1e-3
    noise = torch.randn(400, 360, generator=g) * 1e-3

    def site(delta: torch.Tensor) -> Site:
        return Site("w", Matrix((400, 360), lambda a, b: delta[a:b]))

    bands, terms = forecast.foretold(site(low))
    assert bands != "none" and sum(f.nbytes for t in terms for f in t.factors()) < 400 * 360 // 4
    assert pack_terms(terms) == pack_terms(forecast.encode(site(low), bands=bands))
    for nothing in (noise, torch.zeros(400, 360)):
        assert forecast.foretold(site(nothing)) == ("none", ())


def test_the_test_bed_s_fine_tunes_take_less_than_a_quarter(shallow: Path, tmp_path: Path) -> None:
    report = compress(shallow / "base", shallow / "intent", tmp_path / "a.bayou", method="exact")
    assert report.ratio > 5.1  # 4.96 of whole models; as xz-coded steps of the test bed's own 3.05
    come_back(shallow / "base", shallow / "intent", tmp_path / "a.bayou", tmp_path / "out")
    assert Checkpoint(tmp_path / "out").names() == Checkpoint(shallow / "intent").names()
