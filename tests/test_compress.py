"""Two model folders in, one file out: of the size that was asked, the same each time, the base untouched."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from tamper import sha, snapshot

import bayou
from bayou.checkpoint import Checkpoint
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput, BayouError, TooSmall, Unsupported
from bayou.restore import Restorer

NONE: dict[str, Any] = {"calibration": "none"}
FEW: dict[str, Any] = {"tokens": 1024, "length": 64}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def rewrite(source: Path, folder: Path, change: Any) -> Path:
    """A copy of a model folder whose tensors `change` has altered."""
    shutil.copytree(source, folder)
    found = weights(folder)
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def restored(base: Path, file: Path) -> dict[str, torch.Tensor]:
    opened = DeltaFile(file)
    return {name: Restorer(Checkpoint(base), opened).tensor(name) for name in opened.tensors()}


def distance(found: torch.Tensor, wanted: torch.Tensor, old: torch.Tensor) -> float:
    """Relative error of the delta."""
    return float((found.double() - wanted.double()).norm() / (wanted.double() - old.double()).norm())


# ---------------------------------------------------------------------------------------------- size


@pytest.mark.parametrize("method", ["deltacome", "lowrank"])
@pytest.mark.parametrize("ratio", [2.6, 3.3, 5])
def test_whole_file_honesty(base: Path, tuned: Path, tmp_path: Path, method: str, ratio: float) -> None:
    """A ratio counts every byte of the file against the fine-tune's weight files, and is used to the full."""
    report = bayou.compress(base, tuned, tmp_path / "a.bayou", method=method, ratio=ratio, **NONE)
    limit = (tuned / "model.safetensors").stat().st_size / ratio
    size = (tmp_path / "a.bayou").stat().st_size
    assert 0.97 * limit < size <= limit
    assert report.bytes == size and report.ratio == (tuned / "model.safetensors").stat().st_size / size


def test_a_budget_is_a_number_of_bytes(base: Path, tuned: Path, tmp_path: Path) -> None:
    for budget in (30_000, 43_210, 60_000):
        bayou.compress(base, tuned, tmp_path / "a.bayou", budget=budget, **NONE)
        assert 0.97 * budget < (tmp_path / "a.bayou").stat().st_size <= budget


def test_more_bytes_are_less_error(base: Path, tuned: Path, tmp_path: Path) -> None:
    errors = [bayou.compress(base, tuned, tmp_path / "a", ratio=r, **NONE).errors["linear"] for r in (5, 4, 3, 2)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.6 * errors[0]


@pytest.mark.parametrize("method", ["deltacome", "lowrank", "bitdelta"])
def test_too_small_names_the_least_leaves_nothing_and_the_least_is_reached(
    base: Path, tuned: Path, tmp_path: Path, method: str
) -> None:
    options: dict[str, Any] = {"method": method, "distill_steps": 0, **NONE}
    with pytest.raises(TooSmall) as caught:
        bayou.compress(base, tuned, tmp_path / "a.bayou", budget=5000, **options)
    assert f"{caught.value.least:,} bytes" in str(caught.value) and "--budget 5,000 is 5,000 bytes" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    least = caught.value.least
    with pytest.raises(TooSmall):
        bayou.compress(base, tuned, tmp_path / "a.bayou", budget=least - 100, **options)
    bayou.compress(base, tuned, tmp_path / "a.bayou", budget=least + 200, **options)
    assert (tmp_path / "a.bayou").stat().st_size <= least + 200


def test_the_paper_accounting_keeps_embeddings_and_is_larger(base: Path, tuned: Path, tmp_path: Path) -> None:
    report = bayou.compress(base, tuned, tmp_path / "a.bayou", ratio=4, accounting="paper", **NONE)
    opened = DeltaFile(tmp_path / "a.bayou")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(opened.exact) and report.ratio < 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 4, "budget": 5000}, r"give a ratio \(4\) or a budget \(5,000 bytes\), not both"),
        ({"ratio": 0}, "ratio 0: a number above 0"),
        ({"ratio": float("nan")}, "ratio nan: a number above 0"),
        ({"method": "zip"}, "there is no method 'zip'; choose one of auto, bitdelta, deltacome"),
        ({"options": {"colour": 1}}, "method deltacome has no option 'colour'"),
        ({"keep": ("[",)}, r"keep: '\[' is neither one of embeddings, heads"),
        ({"calibration": "/absent.txt", "ratio": 4}, "/absent.txt"),
    ],
)
def test_bad_options_are_refused_and_leave_nothing(
    base: Path, tuned: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        bayou.compress(base, tuned, tmp_path / "a.bayou", **(NONE | options))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 4, **FEW},
        {"ratio": 4, **FEW, "activations": "compressed"},
        {"ratio": 4, "method": "lowrank"},
        {"ratio": 4, "method": "bitdelta", "distill_steps": 2},
    ],
    ids=["deltacome", "compressed activations", "lowrank", "bitdelta"],
)
def test_same_input_same_bytes(base: Path, tuned: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Promise 3, in one process; tests/test_torture.py compares processes."""
    shutil.copytree(base, tmp_path / "moved base")
    for name, folder in (("a", base), ("b", tmp_path / "moved base")):
        bayou.compress(folder, tuned, tmp_path / f"{name}.bayou", **options)
    assert (tmp_path / "a.bayou").read_bytes() == (tmp_path / "b.bayou").read_bytes()


def test_what_ought_to_count_changes_the_bytes(base: Path, tuned: Path, tmp_path: Path) -> None:
    """So that equal bytes above mean something."""
    found = set()
    for options in (
        {},
        {"seed": 1},
        {"tokens": 2048},
        {"activations": "compressed"},
        {"ratio": 5},
        {"options": {"group": 32}},
        {"method": "auto"},
    ):
        bayou.compress(base, tuned, tmp_path / "a", **({"ratio": 4} | FEW | options))
        found.add(sha((tmp_path / "a").read_bytes()))
    assert len(found) == 7


def test_shards_make_the_same_tensors(base: Path, tuned: Path, tmp_path: Path) -> None:
    pico.perturb(base, tmp_path / "shards", shard=True)
    bayou.compress(base, tuned, tmp_path / "a", budget=40_000, **NONE)
    bayou.compress(base, tmp_path / "shards", tmp_path / "b", budget=40_000, **NONE)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# ---------------------------------------------------------------------------------------------- what is left behind


def test_the_base_is_never_modified(base: Path, tuned: Path, tmp_path: Path) -> None:
    """Promise 6, through every command that reads it."""
    before = snapshot(base), snapshot(tuned)
    for folder in (base, tuned):
        for path in folder.iterdir():
            path.chmod(0o444)
    bayou.compress(base, tuned, tmp_path / "a", ratio=4, **FEW)
    bayou.compress(base, tuned, tmp_path / "b", ratio=4, method="bitdelta", distill_steps=1)
    bayou.verify(tmp_path / "a", base)
    bayou.restore(base, tmp_path / "a", tmp_path / "out")
    model = bayou.load(base, tmp_path / "a")
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    assert (snapshot(base), snapshot(tuned)) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_an_output_over_a_models_own_file_is_refused(base: Path, tuned: Path, tmp_path: Path, name: str) -> None:
    for which in (0, 1):
        folders = [shutil.copytree(folder, tmp_path / f"{which}{folder.name}") for folder in (base, tuned)]
        (tmp_path / f"link{which}").symlink_to(folders[which])
        before = snapshot(folders[which])
        for out in (folders[which] / name, tmp_path / f"link{which}" / name):
            with pytest.raises(BadInput, match="is a file of the model"):
                bayou.compress(*folders, out, ratio=4, **NONE)
        assert snapshot(folders[which]) == before


def test_an_output_beside_the_fine_tunes_weights_is_fine_and_may_be_replaced(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tuned, tmp_path / "tuned")
    for ratio in (4, 3):
        bayou.compress(base, folder, folder / "delta.bayou", ratio=ratio, **NONE)
    assert DeltaFile(folder / "delta.bayou").verify() and not (folder / "delta.bayou.journal").exists()


def test_a_success_leaves_the_file_alone(base: Path, tuned: Path, tmp_path: Path) -> None:
    bayou.compress(base, tuned, tmp_path / "a.bayou", ratio=4, method="bitdelta", distill_steps=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bayou"]


def test_a_failed_run_leaves_the_old_file_untouched(base: Path, tuned: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "a.bayou"
    out.write_bytes(b"old")
    with pytest.raises(TooSmall):
        bayou.compress(base, tuned, out, ratio=100, **NONE)
    with monkeypatch.context() as patch:
        patch.setattr("bayou.contents.as_bytes", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bayou.compress(base, tuned, out, ratio=4, **NONE)
    assert out.read_bytes() == b"old"
    bayou.compress(base, tuned, out, ratio=4, **NONE)
    assert DeltaFile(out).verify() and [path.name for path in tmp_path.iterdir()] == ["a.bayou"]


@pytest.mark.parametrize("free", [0, 10_000])
def test_a_disk_that_is_too_full_is_refused_before_the_work(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: Any, free: int
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - free, free))
    with pytest.raises(
        BayouError, match=rf"has {free:,} bytes free, [0-9,]+ are needed \(file and journal\); free some"
    ):
        bayou.compress(base, tuned, tmp_path / "a.bayou", ratio=4, **NONE)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- every tensor counts


def test_every_kind_of_tensor_comes_back(base: Path, tmp_path: Path) -> None:
    """Grown vocabulary, integer buffer, F32 among BF16, equal but for the dtype, tensors on one side only."""
    equal = "model.layers.0.mlp.gate_proj.weight"
    pico.perturb(
        base, tmp_path / "t", grow_vocab=5, integer_buffer=True, fp32_names=("model.layers.0.mlp.up_proj.weight",)
    )
    old = weights(base)

    def change(found: dict[str, torch.Tensor]) -> None:
        found[equal] = old[equal].float()
        found["only.here"] = torch.randn(40, 30)
        found["flags"] = torch.tensor([True, False])
        found["scalar"] = torch.tensor(3.5, dtype=torch.float64)
        del found["model.layers.1.post_attention_layernorm.weight"]

    tuned = rewrite(tmp_path / "t", tmp_path / "tuned", change)
    bayou.compress(base, tuned, tmp_path / "a", ratio=2.5, **NONE)
    opened, wanted, found = DeltaFile(tmp_path / "a"), weights(tuned), restored(base, tmp_path / "a")
    assert found.keys() == wanted.keys()
    assert all(found[n].dtype == t.dtype and found[n].shape == t.shape for n, t in wanted.items())
    exact = {"only.here", "flags", "scalar", "bayou_test.position_ids", equal, *(n for n in wanted if "norm" in n)}
    for name in exact:
        assert torch.equal(found[name], wanted[name]), name
    assert opened.sites[equal].terms == () and opened.entry_nbytes(equal) == 0
    for name in set(wanted) - exact:
        assert distance(found[name][:128], wanted[name][:128], old[name]) < 0.5, name
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert opened.tail(name) == f"{name}[128:]" and torch.equal(found[name][128:], wanted[name][128:])


@pytest.mark.parametrize(("old", "new"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")])
def test_mixed_dtypes_compare_and_restore(tmp_path: Path, old: str, new: str) -> None:
    base = pico.pico("llama_gqa", tmp_path / "base", dtype=getattr(torch, old))
    pico.perturb(base, tmp_path / "t")

    def cast(found: dict[str, torch.Tensor]) -> None:
        found.update({name: tensor.to(getattr(torch, new)) for name, tensor in found.items()})

    tuned = rewrite(tmp_path / "t", tmp_path / "tuned", cast)
    bayou.compress(base, tuned, tmp_path / "a", ratio=2.5, **NONE)
    found, wanted, before = restored(base, tmp_path / "a"), weights(tuned), weights(base)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        limit = 0 if "norm" in name else 0.5
        assert distance(found[name], tensor, before[name]) <= limit, name


def test_full_rank_factors_of_16_bits_give_the_fine_tune_back(base: Path, tuned: Path, tmp_path: Path) -> None:
    bayou.compress(base, tuned, tmp_path / "a", method="lowrank", ratio=0.3, options={"bits": 16})
    found, wanted = restored(base, tmp_path / "a"), weights(tuned)
    equal = sum(int((found[name] == tensor).sum()) for name, tensor in wanted.items())
    assert equal / sum(tensor.numel() for tensor in wanted.values()) >= 0.998


def test_a_fine_tune_that_equals_its_base_costs_a_header(base: Path, tmp_path: Path) -> None:
    bayou.compress(base, base, tmp_path / "a", ratio=16, **NONE)
    opened = DeltaFile(tmp_path / "a")
    assert (
        opened.unchanged == sorted(weights(base), key=opened.unchanged.index) and not opened.sites and not opened.exact
    )
    assert all(torch.equal(tensor, weights(base)[name]) for name, tensor in restored(base, tmp_path / "a").items())
    assert (tmp_path / "a").stat().st_size < 6000


@pytest.mark.parametrize("keep", [("linears",), ("heads", "norms"), ("embeddings",), (r"model\.layers\.1\..*",)])
def test_what_is_kept_is_bit_for_bit(base: Path, tuned: Path, tmp_path: Path, keep: tuple[str, ...]) -> None:
    bayou.compress(base, tuned, tmp_path / "a", ratio=1.05, keep=keep, **NONE)
    found, wanted, opened = restored(base, tmp_path / "a"), weights(tuned), DeltaFile(tmp_path / "a")
    kept = {
        ("linears",): lambda n: "_proj" in n,
        ("heads", "norms"): lambda n: "lm_head" in n,
        ("embeddings",): lambda n: "embed" in n or "lm_head" in n,
        (r"model\.layers\.1\..*",): lambda n: "layers.1." in n,
    }[keep]
    names = {name for name in wanted if kept(name) and "norm" not in name}
    assert names and names == {name for name in opened.exact if "norm" not in name}
    assert all(torch.equal(found[name], wanted[name]) for name in names)


def test_weights_that_are_not_finite_are_refused_by_name(base: Path, tuned: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    bad = rewrite(tuned, tmp_path / "bad", lambda found: found[name][3, 4].fill_(float("nan")))
    with pytest.raises(Unsupported, match=rf"tensor '{name}' .* holds NaN or infinite values"):
        bayou.compress(base, bad, tmp_path / "a", **NONE)
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.journal").exists()


@pytest.mark.parametrize("name", [".hidden", "w[3]", "w[128:]"])
def test_names_that_the_format_uses_itself_are_refused(base: Path, tuned: Path, tmp_path: Path, name: str) -> None:
    bad = rewrite(tuned, tmp_path / "bad", lambda found: found.update({name: torch.ones(40, 40)}))
    with pytest.raises(Unsupported, match="has a meaning of its own in a .bayou file; rename it"):
        bayou.compress(base, bad, tmp_path / "a", ratio=2, **NONE)


def test_another_architecture_is_no_base(base: Path, tmp_path: Path) -> None:
    pico.pico("gpt2", tmp_path / "gpt2")
    with pytest.raises(BadInput, match="has a counterpart in .*; is it the right base"):
        bayou.compress(base, tmp_path / "gpt2", tmp_path / "a", **NONE)


# ---------------------------------------------------------------------------------------------- names


def test_hub_ids_are_fetched_and_the_base_named_in_the_file(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    asked: list[Any] = []

    def fetch(name: str, *, revision: str | None, **_: Any) -> str:
        asked.append((name, revision))
        return str({"org/base": base, "org/tuned": tuned}[name])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    bayou.compress("org/base", "org/tuned", tmp_path / "a", ratio=4, base_revision="b1", revision="t1", **NONE)
    assert set(asked) == {("org/base", "b1"), ("org/tuned", "t1")}
    opened = DeltaFile(tmp_path / "a")
    assert (opened.base["id"], opened.base["revision"]) == ("org/base", "b1")
    asked.clear()
    bayou.load("org/base", tmp_path / "a")
    bayou.restore("org/base", tmp_path / "a", tmp_path / "out")
    bayou.verify(tmp_path / "a", "org/base")
    assert asked == [("org/base", "b1")] * 3  # the file knows the revision


@pytest.mark.parametrize(
    ("out", "message"),
    [("no/such/a.bayou", "no/such is not a folder; make it first"), (".", "is a folder; give the name")],
)
def test_an_unusable_output_is_refused_at_once(base: Path, tuned: Path, tmp_path: Path, out: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        bayou.compress(base, tuned, tmp_path / out)


def test_a_report_is_plain_data(base: Path, tuned: Path, tmp_path: Path) -> None:
    report = bayou.compress(base, tuned, tmp_path / "a", ratio=4, **FEW)
    plain = json.loads(json.dumps(report.json()))
    assert plain["sites"] == 16 and plain["exact"] == 5 and plain["unchanged"] == 0
    assert set(plain["errors"]) == {"linear", "embedding", "head"} and sum(plain["steps"].values()) <= plain["seconds"]
    opened = DeltaFile(tmp_path / "a")
    shares = [(opened.errors()[name], site.shape) for name, site in opened.sites.items() if site.role == "linear"]
    total = sum(a * b for _, (a, b) in shares)
    found = (sum(error**2 * a * b for error, (a, b) in shares) / total) ** 0.5
    assert plain["errors"]["linear"] == pytest.approx(found, rel=1e-3)
