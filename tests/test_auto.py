"""--method auto, whole: the size of the coded file, corrected targets, and that its files are files like any other."""

import functools
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import transformers
from safetensors.torch import load_file

import bayou
from bayou import encoder
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput, TooSmall

FEW: dict[str, Any] = {"tokens": 2048, "length": 64}
IDS = torch.randint(4, 128, (16, 64), generator=torch.Generator().manual_seed(5))


@functools.cache
def models(name: str, folder: Path) -> tuple[Path, Path]:
    base = pico.pico(name, folder / f"{name}-base")
    return base, pico.perturb(base, folder / f"{name}-tuned")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("auto")


def lost(base: Path, tuned: Path, file: Path) -> float:
    """Squared error of the logits, over that of the base's."""
    wanted, plain = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (tuned, base)
    )
    with torch.no_grad():
        wanted, plain = wanted(IDS).logits, plain(IDS).logits
        found = bayou.load(base, file).float()(IDS).logits
    return float((found - wanted).square().sum() / (plain - wanted).square().sum())


@pytest.mark.parametrize("name", ["llama_gqa", "llama_tied", "gpt2", "mixtral", "phi3", "gemma3", "llava"])
@pytest.mark.parametrize("ratio", [3, 3.2])
def test_the_coded_file_has_the_size_that_was_asked_for(name: str, ratio: float, folder: Path, tmp_path: Path) -> None:
    base, tuned = models(name, folder)
    told = bayou.compress(base, tuned, tmp_path / "a", ratio=ratio, method="auto", **FEW)
    limit = int(sum(path.stat().st_size for path in tuned.glob("*.safetensors")) / ratio)
    size = (tmp_path / "a").stat().st_size
    assert told.bytes == size <= limit and told.method == "auto"
    file = DeltaFile(tmp_path / "a")
    assert file.verify() and any(site.coded for site in file.sites.values())
    full = all(site.options.get("rank", 0) == min(site.shape) for site in file.sites.values() if site.method == "auto")
    assert full or size > 0.95 * limit  # so small a model has few ranks to give out


def test_each_matrix_makes_good_what_those_before_have_lost(folder: Path, tmp_path: Path) -> None:
    base, tuned = models("llama_gqa", folder)
    found = {}
    for activations in ("finetuned", "corrected"):
        out = tmp_path / activations
        how: dict[str, Any] = {"activations": activations, "options": {"bands": "8x2,3x32,2"}}
        bayou.compress(base, tuned, out, ratio=4, **how, **FEW)
        found[activations] = lost(base, tuned, out)
    assert found["corrected"] < 0.9 * found["finetuned"] < 0.9


def test_a_ridge_without_end_corrects_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments are then still the compressed model's: the file is that of --activations compressed, nearly."""
    base, tuned = models("llama_gqa", folder)
    sizes = {"method": "deltacome", "ratio": 4, **FEW}
    monkeypatch.setattr(encoder, "RIDGE", 0.3)
    bayou.compress(base, tuned, tmp_path / "some", activations="corrected", **sizes)
    monkeypatch.setattr(encoder, "RIDGE", 1e12)
    bayou.compress(base, tuned, tmp_path / "none", activations="corrected", **sizes)
    bayou.compress(base, tuned, tmp_path / "own", activations="compressed", **sizes)
    errors = {name: DeltaFile(tmp_path / name).errors() for name in ("some", "none", "own")}
    for site, error in errors["own"].items():
        assert errors["none"][site] == pytest.approx(error, rel=0.02)
    worse = [site for site in errors["own"] if errors["some"][site] > 1.02 * errors["none"][site]]
    assert len(worse) > 5  # further from the deltas, which are not what is asked for


def test_its_file_is_restored_and_evaluated_as_any_other(folder: Path, tmp_path: Path) -> None:
    base, tuned = models("llama_tied", folder)
    bayou.compress(base, tuned, tmp_path / "a", ratio=3, method="auto", **FEW)
    assert 0 < lost(base, tuned, tmp_path / "a") < 0.5
    bayou.restore(base, tmp_path / "a", tmp_path / "out")
    restored, wanted = load_file(tmp_path / "out/model.safetensors"), load_file(tuned / "model.safetensors")
    assert restored.keys() == wanted.keys()
    loaded = dict(bayou.load(base, tmp_path / "a").named_parameters())
    assert all(torch.equal(loaded[name].float(), value.float()) for name, value in restored.items() if name in loaded)


def test_its_parts_can_be_had_apart(folder: Path, tmp_path: Path) -> None:
    base, tuned = models("llama_gqa", folder)
    plain = bayou.compress(base, tuned, tmp_path / "plain", ratio=3, entropy=False, method="auto", **FEW)
    assert not any(site.coded for site in DeltaFile(tmp_path / "plain").sites.values())
    assert plain.bytes <= plain.ratio * plain.bytes / 3
    told = bayou.compress(base, tuned, tmp_path / "paper", ratio=3, accounting="paper", method="auto", **FEW)
    assert told.bytes == (tmp_path / "paper").stat().st_size and DeltaFile(tmp_path / "paper").verify()


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    base, tuned = models("llama_gqa", folder)
    with pytest.raises(BadInput, match="--activations both: choose finetuned, compressed, corrected"):
        bayou.compress(base, tuned, tmp_path / "a", activations="both", method="auto", **FEW)  # type: ignore[arg-type]
    with pytest.raises(TooSmall, match="--budget 5,000 is 5,000 bytes, but the least that this method can make"):
        bayou.compress(base, tuned, tmp_path / "a", budget=5000, method="auto", **FEW)
    assert not list(tmp_path.iterdir())
