"""bayou bench compress and load, on the tiny shape: the figures are there, and what they are of is the real thing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bayou.benchmarks import compress, load, plain, terms
from bayou.benchmarks.pair import SHAPES, STRENGTH, pair
from bayou.cli import main
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput
from bayou.packed import Spec
from bayou.quantize import factorize, gptq, grid, spread

TINY: dict[str, Any] = {"shape": "tiny", "tokens": 1024, "length": 64, "device": "cpu"}


def test_the_pair_is_of_its_shape_and_its_deltas_of_their_strength(tmp_path: Path) -> None:
    base, tuned = pair(SHAPES["tiny"], 2, tmp_path, "cpu")
    assert base.names() == tuned.names() and len(base.names()) == 3 + 2 * 9
    name = "model.layers.1.mlp.down_proj.weight"
    old, new = base.read(name).float(), tuned.read(name).float()
    assert base.shape(name) == (64, 176) and float((new - old).norm() / old.norm()) == pytest.approx(STRENGTH, rel=0.1)
    s = torch.linalg.svdvals(new - old)
    assert s[0] > 3 * s[20] > 3 * s[40] > 0
    assert torch.equal(base.read(name, 3, 5), base.read(name)[3:5])
    assert base.fingerprints([name])[name] != tuned.fingerprints([name])[name]


def test_compress_says_where_the_time_went(tmp_path: Path) -> None:
    found = compress.run(**TINY, layers=2, ratio=8)
    steps = found["steps"]
    assert {"calibrate", "gram", "decompose", "gptq of v", "gptq of u", "write", "take stock", "hash"} <= set(steps)
    spent = sum(step["seconds"] for step in steps.values())
    assert 0.5 * found["seconds"] < spent <= 1.01 * found["seconds"]
    assert found["without_disk"] == pytest.approx(found["seconds"] - steps["write"]["seconds"], abs=1e-3)
    assert all(step["gflop"] > 0 for name, step in steps.items() if name in ("gram", "decompose", "calibrate"))
    assert found["device"] == "cpu" and found["torch"] == torch.__version__ and "peak_bytes" not in found
    assert found["bytes"] < 2 * 8 * (2 * 50_000 + 65_536) / 8
    assert "decompose" in compress.table(found)


def test_a_kept_file_s_first_layer_is_what_the_kernels_are_measured_on(tmp_path: Path) -> None:
    kept = tmp_path / "new" / "a.bayou"
    found = compress.run(**TINY, layers=2, ratio=8, keep=kept)
    assert kept.stat().st_size == found["bytes"]
    sizes, file = SHAPES["tiny"].linears(), DeltaFile(kept)
    layer = [[sizes[f"{name}.weight"] for name in group] for group in terms.NAMES]
    stored = terms.Stored(kept, layer, "cpu")
    (query, *_), again = (stored(layer[0]) for _ in range(2))
    delta = file.delta("model.layers.0.self_attn.q_proj.weight")
    x = torch.randn(3, 64)
    assert torch.equal(query.apply(x), delta.terms[0].apply(x)) and torch.equal(again[0].apply(x), query.apply(x))
    places = {next(term.factors()).parts[0].data_ptr() for term in (query, again[0])}
    assert len(places) == 2  # each tenant has its own
    with pytest.raises(BadInput, match=r"must be of .*4096, 4096.* with one term each; found 64x64, 64x64, 64x64"):
        terms.Stored(kept, device="cpu")


def test_a_few_layers_get_the_ranks_of_the_whole_model() -> None:
    few, all_of_them = (compress.run(**TINY, layers=layers, ratio=8)["ranks"] for layers in (2, 4))
    for key, ranks in all_of_them.items():
        if key.startswith("linear"):
            assert abs(few[key][0] - ranks[0]) <= 2


def test_the_plain_way_takes_27_passes_and_is_compared(tmp_path: Path) -> None:
    out = tmp_path / "found" / "a.json"
    main_returns(
        ["bench", "compress", "--shape", "tiny", "--layers", "2", "--tokens", "256", "--length", "64"]
        + ["--device", "cpu", "--plain", "--out", str(out)]
    )
    found = json.loads(out.read_text())
    assert found["plain"]["passes"] == 27 and set(found["plain"]["steps"]) >= {"svd", "passes", "column loops"}
    assert found["times"] == pytest.approx(found["plain"]["seconds"] / found["a_layer"])


def main_returns(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0


def test_the_plain_column_loop_is_gptq() -> None:
    """It rounds as ours does where both have the same scales: the yardstick measures the same thing."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(20, 160, generator=generator)
    x = torch.randn(600, 160, generator=generator) @ (torch.randn(160, 160, generator=generator) / 12 + torch.eye(160))
    hessian = x.T @ x
    spec = Spec.parse("3g128z")
    _, ours = gptq(w, factorize(hessian), spread(*grid(w, spec), spec, 160))
    theirs = plain.column_loop(w, hessian, 3)

    def lost(values: torch.Tensor) -> float:
        return float(((w - values) @ x.T).norm())

    nearest = spread(*grid(w, spec), spec, 160).expand(w.shape).round(w)[1]
    assert lost(theirs) == pytest.approx(lost(ours), rel=0.05)
    assert lost(theirs) < 0.9 * lost(nearest)


def test_load_reads_a_file_of_the_real_size(capsys: pytest.CaptureFixture[str]) -> None:
    main_returns(["bench", "load", "--shape", "tiny", "--ratio", "6", "--repeats", "2", "--device", "cpu", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["all"]) == 2 and found["seconds"] == min(found["all"]) and found["first"] == found["all"][0]
    assert found["seconds"] == pytest.approx(sum(v for k, v in found["steps"].items() if k != "seconds"), rel=1e-6)
    tensors = sum(2 * torch.Size(shape).numel() for _, shape in SHAPES["tiny"].tensors(4))
    assert 0.8 * tensors / 6 < found["bytes"] <= tensors / 6 + 4096


@pytest.mark.parametrize(
    ("run", "options"),
    [
        (compress.run, {"shape": "llama-9"}),
        (compress.run, {"layers": 5}),
        (compress.run, {"layers": 0}),
        (compress.run, {"tokens": 8}),
        (compress.run, {"layers": 1, "beside_plain": True}),
        (load.run, {"shape": "llama-9"}),
        (load.run, {"shape": "tiny", "repeats": 0}),
    ],
)
def test_what_cannot_be_measured_is_refused(run: Any, options: dict[str, Any]) -> None:
    given = (TINY if run is compress.run else {"device": "cpu"}) | options
    with pytest.raises(BadInput):
        run(**given)
