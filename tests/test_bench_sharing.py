"""bench/sharing.py from end to end on a tiny model: tokens, training, stopping and going on, scores, tables."""

import gzip
import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from pico import pico, tokenizer

CHECKOUT = Path(__file__).resolve().parent.parent

TESTBED = """
import os
HERE = os.path.dirname(os.path.abspath(__file__))
def documents(name):
    return [f"{name} {i}: the quick brown fox jumps over {i} lazy dogs. " * 3 for i in range(40)]
"""


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(CHECKOUT / "bench"))
    try:
        return importlib.import_module("sharing")
    finally:
        sys.path.remove(str(CHECKOUT / "bench"))


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, BASE, and a test bed of its own, testbed.py with a few questions."""
    root = tmp_path_factory.mktemp("bench")
    pico("llama_tied", root / "base", num_hidden_layers=8)
    (root / "testbed.py").write_text(TESTBED)
    (root / "benchmarks").mkdir()
    for name in ("arc_easy", "mmlu_redux", "winogrande"):
        with gzip.open(root / "benchmarks" / f"{name}.jsonl.gz", "wt") as file:
            for i in range(6):
                options = {"choices": ["yes", "no, never", str(i)], "gold": i % 3, "context": f"Is it {i}?"}
                pair = {"contexts": [f"The cat {i}", "The dog"], "continuation": "sat down.", "gold": i % 2}
                file.write(json.dumps(pair if name == "winogrande" else options) + "\n")
    return root


def call(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["sharing.py", *map(str, words)])
    try:
        bench.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def common(ground: Path, out: Path) -> list[object]:
    places = ["--base", ground / "base", "--testbed", ground / "testbed.py", "--out", out, "--work", out / "work"]
    sizes = ["--length", 32, "--batch", 4, "--train-tokens", 4 * 4 * 32, "--tune-tokens", 2 * 4 * 32, "--every", 2]
    return [*places, "--tokens", ground / "tokens.npy", *sizes, "--calibration", 256, "--rows", 4, "--report", 0]


def test_from_text_to_table(
    bench: ModuleType, ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--base", ground / "base", "--testbed", ground / "testbed.py"]
    assert call(bench, monkeypatch, "tokenise", *where, "--out", ground / "tokens.npy") == 0
    tokens = np.load(ground / "tokens.npy")
    assert tokens.dtype == np.uint16 and (tokens == tokenizer().eos_token_id).sum() == 40
    rivals = {name: {"method": name} for name in ("shortgpt", "slicegpt", "lastlayers")}
    monkeypatch.setattr(bench.sharing_runs, "RIVALS", rivals)
    words = [*common(ground, tmp_path), "--together", 2, "--score-seconds", 0]
    assert call(bench, monkeypatch, "run", *words, "--set", "tune24", "base") == 0
    tuned = bench.lines(tmp_path / "sharing-tune24.jsonl")
    assert len(tuned) == 9 and all(r["held_out"]["loss"] > 0 and r["tokens"] == 256 for r in tuned)
    with monkeypatch.context() as hurry:  # the seconds are over at once: a step a process
        fit = bench.fit
        hurry.setattr(bench, "fit", lambda *a, **k: fit(*a, **{**k, "stop_after": 0.0}))
        codes = [call(bench, hurry, "run", *words, "--set", "main24") for _ in range(3)]
    assert codes == [bench.AGAIN] * 3
    assert call(bench, monkeypatch, "run", *words, "--set", "main24", "--seconds", 1) == bench.AGAIN
    assert list((tmp_path / "work").glob("main24-*.checkpoint"))
    assert call(bench, monkeypatch, "run", *words, "--set", "main24") == 0
    found = bench.lines(tmp_path / "sharing-main24.jsonl")
    assert [r["name"] for r in found] == list(rivals)
    for r in found:
        assert r["tokens"] == 512 and sum(1 for _ in r["curve"]) == 4 and r["returns"] == 0
        assert 1 < r["scores"]["ppl"] < 1e4 and 0 <= r["scores"]["arc_easy"] <= 1
        assert r["parameters"] < r["original"] and r["bytes_at_16_bits"] == 2 * r["parameters"]
        best = min((t for t in tuned if t["config"]["rival"] == r["name"]), key=lambda t: t["held_out"]["loss"])
        assert r["config"]["rate"] == best["config"]["rate"]
    capsys.readouterr()
    assert call(bench, monkeypatch, "run", *words, "--set", "main24") == 0  # nothing is left to do
    assert "parameters," not in capsys.readouterr().out
    assert call(bench, monkeypatch, "table", "--out", tmp_path, "--set", "main24", "base") == 0
    assert capsys.readouterr().out.count("\n") == 2 + 3 + 1
    pair = ["--pair", "shortgpt", "lastlayers"]
    assert call(bench, monkeypatch, "paired", "--out", tmp_path, "--set", "main24", *pair) == 0
    assert "winogrande nll: " in capsys.readouterr().out
    kept = (tmp_path / "sharing-tune24.jsonl").read_text().splitlines()
    (tmp_path / "sharing-tune24.jsonl").write_text("\n".join(kept[:-1]) + "\n")  # one run is missing: it is done alone
    for checkpoint in (tmp_path / "work").glob("tune24-*.checkpoint"):
        checkpoint.unlink()
    capsys.readouterr()
    assert call(bench, monkeypatch, "run", *words, "--set", "tune24") == 0
    assert capsys.readouterr().out.count("parameters,") == 1
    again = bench.lines(tmp_path / "sharing-tune24.jsonl")
    assert [r["name"] for r in again] == [r["name"] for r in tuned]
    assert again[-1]["held_out"]["loss"] == pytest.approx(tuned[-1]["held_out"]["loss"], rel=1e-4)
    hasty = [*common(ground, tmp_path / "hasty"), "--score-seconds", 0, "--spend", 1e-6]
    assert call(bench, monkeypatch, "run", *hasty, "--set", "tune24", "main24") == 0  # a step is the least
    assert [r["tokens"] for r in bench.lines(tmp_path / "hasty" / "sharing-main24.jsonl")] == [4 * 32] * 3


@pytest.mark.slow
def test_deltas_are_trained_scored_and_kept(
    bench: ModuleType, ground: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = bench.sharing_runs
    where = ["--base", ground / "base", "--testbed", ground / "testbed.py"]
    call(bench, monkeypatch, "tokenise", *where, "--out", ground / "tokens.npy")
    monkeypatch.setattr(runs, "RIVALS", {k: v for k, v in runs.RIVALS.items() if v["method"] in ("deltallm", "search")})
    monkeypatch.setattr(runs, "BLOCKS", (3, 5))
    monkeypatch.setattr(runs, "SIZES", {"12": 0.05})
    original = runs.runs

    def smaller(which: str, **options: object) -> list[dict[str, object]]:
        found = original(which, **options)
        small = {"untrained": {"rank": 8}}.get(which, {"reduce": 0.03})
        return [{**run, **{k: v for k, v in small.items() if run.get(k)}} for run in found]

    monkeypatch.setattr(runs, "runs", smaller)
    words = [*common(ground, tmp_path), "--together", 3, "--score-seconds", 0]
    assert call(bench, monkeypatch, "plan", *words, "--set", "main12") == 0
    (plan,) = (tmp_path / "work").glob("searched-all-*.shared")
    searched = plan.stat().st_mtime_ns
    assert call(bench, monkeypatch, "run", *words, "--set", "untrained", "main12", "ablation") == 0
    assert plan.stat().st_mtime_ns == searched  # read, not made anew
    assert call(bench, monkeypatch, "run", *words, "--set", "pmr", "--only", "seed 0") == 0
    untrained = {r["name"]: r for r in bench.lines(tmp_path / "sharing-untrained.jsonl")}
    assert len(untrained) == 8 and untrained["untouched"]["reduction"] == 0
    assert untrained["dropped"]["parameters"] == untrained["tied, no delta"]["parameters"]
    assert len(bench.lines(tmp_path / "sharing-main12.jsonl")) == 7
    assert len(bench.lines(tmp_path / "sharing-ablation.jsonl")) == 12
    assert len(bench.lines(tmp_path / "sharing-pmr.jsonl")) == 3
    assert call(bench, monkeypatch, "plot", "--out", tmp_path, "--set", "pmr") == 0
    assert (tmp_path / "sharing-pmr.png").stat().st_size > 5000
    (kept,) = (tmp_path / "work").glob("main12-deltallm.shared")
    shared = runs.load_shared(kept)
    assert shared.ties and all(tie.u.abs().sum() > 0 and tie.reference for tie in shared.ties)
    words += ["--plan", f"again={kept}"]
    assert call(bench, monkeypatch, "run", *words, "--set", "tuneplans", "plans") == 0
    assert len(bench.lines(tmp_path / "sharing-tuneplans.jsonl")) == 3
    (found,) = bench.lines(tmp_path / "sharing-plans.jsonl")
    assert found["tokens"] == 512 and found["config"]["rival"] == "again"
    again = {"name": "kept", "method": "plan", "file": str(kept), "tokens": 0, "rate": 0.0}
    monkeypatch.setattr(runs, "runs", lambda which, **_: [again])
    assert call(bench, monkeypatch, "run", *words, "--set", "kept") == 0
    (found,) = bench.lines(tmp_path / "sharing-kept.jsonl")
    trained = bench.lines(tmp_path / "sharing-main12.jsonl")[0]
    assert found["scores"] == pytest.approx(trained["scores"], rel=1e-5)
    assert found["parameters"] == trained["parameters"]


def test_scores_are_those_of_the_test_bed(bench: ModuleType, ground: Path) -> None:
    named = os.environ.get("BAYOU_TESTBED")
    builder = Path(named) if named else CHECKOUT.parent / "shared" / "testbed" / "testbed.py"
    if not builder.is_file():
        pytest.skip("the test bed is absent")
    testbed = bench.load_testbed(builder)
    torch.set_default_device("cpu")
    wanted = testbed.general(str(ground / "base"), 12)
    questions = bench.general.prepare(testbed, tokenizer(), 12)
    found, single = bench.general.score(bench.load(ground / "base"), questions, budget=2000)
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-5)
    assert len(single["arc_easy"]["nll"]) == len(single["arc_easy"]["right"]) == 12
