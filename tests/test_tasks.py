"""`bayou eval --tasks`: through the harness, base and delta score as the restored model does; all offline.

Needs lm-eval, which `make test-eval` installs; skipped without.
"""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import perturb, pico

import bayou
from bayou.calibrate import read_tokenizer
from bayou.cli import main
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput

pytestmark = pytest.mark.filterwarnings("default")  # the harness's own imports warn
lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (make test-eval)")

from lm_eval.models.huggingface import HFLM  # noqa: E402

from bayou.integrations.lm_eval import Bayou, tokenizer_in  # noqa: E402
from bayou.integrations.tasks import evaluate_tasks  # noqa: E402

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["z"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module", autouse=True)
def own_datasets(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """datasets caches what it reads in a folder of its own."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setenv("HF_DATASETS_CACHE", str(cache))  # for the processes that tests start
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks on 12 made-up documents."""
    folder = tmp_path_factory.mktemp("tasks")
    words = ["red", "a longer one", "no", "Paris, France"]
    rows = [{"context": f"Question: number {i} of {7 * i % 5}?", "choices": words, "gold": i % 4} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("tiny_choice", CHOICE), ("tiny_words", GENERATE)):
        (folder / f"{name}.yaml").write_text(text.format(name=name, data=folder / "rows.jsonl"))
    return folder


@pytest.fixture(scope="module", params=["llama_gqa", "llama_untied", "gemma3"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, tuned, a.bayou and what is restored from it in fp32."""
    folder = tmp_path_factory.mktemp(request.param)
    pico("llama_tied" if request.param == "llama_untied" else request.param, folder / "base")
    perturb(folder / "base", folder / "tuned", scale=0.5, untie=request.param == "llama_untied")
    bayou.compress(folder / "base", folder / "tuned", folder / "a.bayou", method="lowrank", ratio=2, calibration="none")
    bayou.restore(folder / "base", folder / "a.bayou", folder / "restored", dtype="float32")
    return folder


def plain(model: Path, tasks: Path) -> dict[str, Any]:
    """What the harness alone says of an ordinary folder, in fp32."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    arguments = {"pretrained": str(model), "dtype": "float32", "device": "cpu", "batch_size": 5}
    found = lm_eval.simple_evaluate(
        "hf", arguments, tasks=["tiny_choice", "tiny_words"], task_manager=manager, log_samples=True
    )
    assert found is not None
    return found


def answers(found: dict[str, Any]) -> dict[str, list[Any]]:
    """Of each task, what the model said to each request of each document."""
    return {
        name: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in found["samples"].items()
    }


def test_base_and_delta_answer_as_the_restored_model_does(models: Path, tasks: Path) -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    arguments = {"base": str(models / "base"), "delta": str(models / "a.bayou"), "device": "cpu", "batch_size": 5}
    ours = lm_eval.simple_evaluate(
        "bayou", arguments, tasks=["tiny_choice", "tiny_words"], task_manager=manager, log_samples=True
    )
    restored, base = plain(models / "restored", tasks), plain(models / "base", tasks)
    assert ours is not None and ours["results"] == restored["results"]
    mine, theirs, others = answers(ours), answers(restored), answers(base)
    assert mine["tiny_words"] == theirs["tiny_words"] != others["tiny_words"]
    for one, other, foreign in zip(*(found["tiny_choice"] for found in (mine, theirs, others)), strict=True):
        for ((a, greedy),), ((b, same),), ((c, _),) in zip(one, other, foreign, strict=True):
            assert a == pytest.approx(b, rel=1e-4) and greedy == same and abs(a - c) > 1e-2
    info = Bayou(**arguments).get_model_info()
    assert info["delta_root"] == DeltaFile(models / "a.bayou").root and info["model_dtype"] == "float32"


def test_the_command_has_the_fine_tune_beside_it(
    models: Path, tasks: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("Every number of this text counts.\n")
    words = ["eval", models / "base", models / "a.bayou", models / "tuned", "--tasks", "tiny_choice,tiny_words"]
    words += ["--include-path", tasks, "--data", tmp_path / "a.txt", "--batch", "5", "--json"]
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words)])
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert stop.value.code == 0 and found["kl"] > 0 and found["documents"] == {"tiny_choice": 12, "tiny_words": 12}
    for ours, wanted in (("", plain(models / "restored", tasks)), ("reference", plain(models / "tuned", tasks))):
        for task, metric in (("tiny_choice", "acc"), ("tiny_choice", "acc_norm"), ("tiny_words", "exact_match")):
            values = found["tasks"][task][metric]
            assert values[ours or "value"] == wanted["results"][task][f"{metric},none"]
            assert values[f"{ours or 'se'}{'_se' if ours else ''}"] == wanted["results"][task][f"{metric}_stderr,none"]
    shown = found["tasks"]["tiny_choice"]["acc"]
    assert f"{shown['value']:.4f} ± {shown['se']:.4f}" in out and "tiny_words" in out


@pytest.mark.parametrize("models", ["llama_gqa"], indirect=True)
def test_limits_and_folders(models: Path, tasks: Path) -> None:
    how = {"include_path": tasks, "limit": 3}
    by_file = evaluate_tasks(models / "base", models / "a.bayou", ["tiny_choice"], **how)
    by_folder = evaluate_tasks(None, models / "restored", ["tiny_choice"], **how)
    assert by_file["tasks"] == by_folder["tasks"] and by_file["documents"] == {"tiny_choice": 3}
    assert set(by_file["tasks"]["tiny_choice"]["acc"]) == {"value", "se"}


@pytest.mark.parametrize("models", ["llama_gqa"], indirect=True)
def test_the_harness_s_own_command_knows_the_model(models: Path, tasks: Path, tmp_path: Path) -> None:
    arguments = f"base={models / 'base'},delta={models / 'a.bayou'}"
    command = [sys.executable, "-m", "bayou.integrations.lm_eval", "--model", "bayou", "--model_args", arguments]
    command += ["--tasks", "tiny_choice", "--include_path", tasks, "--device", "cpu", "--output_path", tmp_path / "o"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "o").rglob("results_*.json")
    told = json.loads(written.read_text())
    ours = evaluate_tasks(models / "base", models / "a.bayou", ["tiny_choice"], include_path=tasks)
    assert told["results"]["tiny_choice"]["acc,none"] == ours["tasks"]["tiny_choice"]["acc"]["value"]
    assert told["config"]["delta_root"] == DeltaFile(models / "a.bayou").root


def test_a_file_without_a_tokenizer_takes_the_base_s(tmp_path: Path) -> None:
    base = pico("llama_gqa", tmp_path / "base")
    tuned = perturb(base, tmp_path / "tuned")
    for path in tuned.glob("*token*"):
        path.unlink()
    bayou.compress(base, tuned, tmp_path / "a.bayou", method="lowrank", ratio=2, calibration="none")
    found = tokenizer_in(DeltaFile(tmp_path / "a.bayou"), base)
    assert found("two words")["input_ids"] == read_tokenizer(base)("two words")["input_ids"]


@pytest.mark.parametrize(
    "name,untie", [("llama_tied", False), ("llama_tied", True), ("gemma3", False), ("gpt2", False)]
)
def test_a_head_stays_what_the_delta_makes_it(name: str, untie: bool, tmp_path: Path) -> None:
    """The harness ties weights as it takes a model: that must not undo what is attached."""
    base = pico(name, tmp_path / "base")
    tuned = perturb(base, tmp_path / "tuned", scale=0.5, untie=untie)
    bayou.compress(base, tuned, tmp_path / "a.bayou", method="lowrank", ratio=2, calibration="none")
    model, ids = bayou.load(base, tmp_path / "a.bayou"), torch.arange(5, 60)[None]
    with torch.no_grad():
        before = model(ids).logits
        taken = HFLM(pretrained=model, tokenizer=read_tokenizer(tuned), backend="causal")
        assert torch.equal(taken.model(ids).logits, before)


@pytest.mark.parametrize("models", ["llama_gqa"], indirect=True)
@pytest.mark.parametrize(
    "options,message",
    [
        ({"tasks": ["tiny_choice", "absent"]}, "knows no task absent"),
        ({"tasks": []}, "name a task"),
        ({"limit": 0}, "--limit 0"),
        ({"include_path": "nowhere"}, "nowhere is not a folder"),
    ],
)
def test_what_cannot_be_run_is_refused(models: Path, tasks: Path, options: dict[str, Any], message: str) -> None:
    given = {"tasks": ["tiny_choice"], "include_path": tasks} | options
    with pytest.raises(BadInput, match=message):
        evaluate_tasks(models / "base", models / "a.bayou", **given)
    with pytest.raises(BadInput, match="delta=None"):
        Bayou(str(models / "base"))


@pytest.mark.slow
def test_arc_easy_on_real_models(testbed: Path, tmp_path: Path) -> None:
    """The first 24 questions of ARC-Easy, from the test bed's copy of them."""
    from conftest import _builder

    source = _builder().parent / "benchmarks" / "arc_easy.jsonl.gz"
    if not source.is_file():
        pytest.skip("the test bed has no benchmarks/arc_easy.jsonl.gz")
    (tmp_path / "arc.jsonl").write_bytes(gzip.decompress(source.read_bytes()))
    (tmp_path / "arc.yaml").write_text(CHOICE.format(name="arc_easy_local", data=tmp_path / "arc.jsonl"))
    base, tuned = testbed / "base", testbed / "intent"
    bayou.compress(base, tuned, tmp_path / "a.bayou", method="lowrank", ratio=16, calibration="none")
    bayou.restore(base, tmp_path / "a.bayou", tmp_path / "restored", dtype="float32")
    how = {"include_path": tmp_path, "limit": 24, "batch": 8}
    ours = evaluate_tasks(base, tmp_path / "a.bayou", ["arc_easy_local"], finetuned=tmp_path / "restored", **how)
    values = ours["tasks"]["arc_easy_local"]
    assert values["acc"]["value"] == values["acc"]["reference"] > 0.2
    assert values["acc_norm"]["value"] == values["acc_norm"]["reference"]
