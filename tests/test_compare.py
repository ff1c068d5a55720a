"""`bayou compare`: its files are those of compress, its figures those of eval, and it goes on where it was stopped."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compared import HELD, OPTIONS, TRAIN, done, models, plain, row_of, run
from pico import perturb, pico
from safetensors.torch import load_file

import bayou
from bayou.calibrate import read_tokenizer
from bayou.comparison import measured, rows
from bayou.comparison.bound import decibels
from bayou.comparison.rows import compare
from bayou.errors import BadInput, TooSmall
from bayou.evaluate import read_model
from bayou.momentfiles import MomentFiles

__all__ = ["done", "models"]  # fixtures


@pytest.mark.parametrize("method", ["bitdelta", "deltacome", "lowrank"])
def test_the_files_are_those_of_compress_byte_for_byte(
    models: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path, method: str
) -> None:
    folder, found = done
    how = {name: OPTIONS[name] for name in ("tokens", "length", "distill_steps")}
    text = models / "train.txt"
    report = bayou.compress(
        models / "base", models / "tuned", tmp_path / "a", method=method, ratio=4, calibration=text, **how
    )
    row = row_of(found, method)
    assert (folder / row["file"]).read_bytes() == (tmp_path / "a").read_bytes()
    assert (row["bytes"], row["ratio"], row["errors"]) == (report.bytes, report.ratio, report.errors)


@pytest.mark.parametrize("method", ["bitdelta", "deltacome", "lowrank"])
def test_the_figures_are_those_of_eval(models: Path, done: tuple[Path, dict[str, Any]], method: str) -> None:
    folder, found = done
    row = row_of(found, method)
    candidate = bayou.load(models / "base", folder / row["file"])
    tuned = models / "tuned"
    wanted = bayou.evaluate(read_model(tuned), candidate, read_tokenizer(tuned), models / "held.txt", length=256)
    ours = {name: row[name] for name in ("kl", "kl_se", "flip", "nll", "ppl")}
    ours |= {f"{name}_reference": value for name, value in found["reference"].items()}
    assert ours | {name: found[name] for name in ("kind", "rows", "tokens")} == wanted
    assert row["kl"] > 1e-4 and row["kl_se"] > 0


def test_a_size_out_of_reach_is_a_row_that_says_why(models: Path, done: tuple[Path, dict[str, Any]]) -> None:
    folder, found = done
    for method in OPTIONS["names"]:
        row = row_of(found, method, 1000)
        assert set(row) == {"method", "asked", "reason", "least"}
        with pytest.raises(TooSmall) as refused:
            how = {"method": method, "ratio": 1000, "calibration": "none", "distill_steps": 0}
            bayou.compress(models / "base", models / "tuned", folder / "x", **how)
        assert (row["reason"], row["least"]) == (str(refused.value), refused.value.least)
    with pytest.raises(TooSmall, match="--ratio 1000"):
        run(models, folder.with_name("none"), ratios=[1000])


def test_losses_are_those_of_the_deltas_outputs(
    models: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """From whole matrices and the moments of a model that is all in memory, nothing of it read in blocks."""
    folder, found = done
    row = row_of(found, "deltacome")
    windows = rows.calibrate.windows(
        models / "train.txt", models / "tuned", read_model(models / "tuned").config, 2000, 64
    )
    model, grams = read_model(models / "tuned"), {}

    def keep(name: str) -> Any:
        def hook(_module: Any, args: tuple[torch.Tensor]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            grams[f"{name}.weight"] = x.T @ x

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        model(windows)
    bayou.restore(models / "base", folder / row["file"], tmp_path / "out", dtype="float32")
    old, new, made = (
        {n: w.double() for n, w in load_file(f / "model.safetensors").items()}
        for f in (models / "base", models / "tuned", tmp_path / "out")
    )
    lost, weights, cells = 0.0, 0, {(cell["kind"], cell["layer"]): cell for cell in row["cells"]}
    for name in (name for name, w in new.items() if w.ndim == 2):
        gram = grams.get(name, torch.eye(new[name].shape[1], dtype=torch.float64))
        delta, rest = new[name] - old[name], new[name] - made[name]
        share = float(((rest @ gram) * rest).sum() / ((delta @ gram) * delta).sum())
        lost, weights = lost + share * delta.numel(), weights + delta.numel()
        cell = cells.pop(measured.kind_and_layer(name))
        assert cell["output"] == pytest.approx(math.sqrt(share), rel=2e-3)
        assert cell["error"] == pytest.approx(float(rest.norm() / delta.norm()), rel=2e-3)
        assert (cell["matrices"], cell["weights"]) == (1, delta.numel())
    assert not cells and row["lost"] == pytest.approx(lost / weights, rel=2e-3)


def test_every_file_is_above_the_bound(done: tuple[Path, dict[str, Any]]) -> None:
    _, found = done
    for method in OPTIONS["names"]:
        row = row_of(found, method)
        assert row["decibels"] == decibels(row["lost"], found["curves"]["bound"], row["bytes"])
        assert row["decibels"] > row["decibels_factors"] > 0
    file = bayou.DeltaFile(done[0] / row["file"])
    assert found["curves"]["fixed"] == sum(file.entry_nbytes(name) for name in file.exact) > 0
    assert found["curves"]["bound"][0] == [found["curves"]["fixed"], pytest.approx(1)]


class Stopped(KeyboardInterrupt):
    """Somebody pressed Ctrl-C."""


FEW: dict[str, Any] = {"names": ["deltacome"], "ratios": [4, 6, 1000], "plot": False}


@pytest.fixture(scope="module")
def few(models: Path) -> dict[str, Any]:
    """What a comparison of one method says that nobody stopped."""
    return run(models, models / "few", **FEW)


@pytest.mark.parametrize(
    "where,turn,compressed,evaluated,loaded",
    [("compress", 2, 2, 1, 0), ("evaluate", 1, 2, 2, 1), ("Remembered.release", 1, 2, 2, 0), ("evaluate", 2, 1, 1, 0)],
)
def test_a_stopped_comparison_goes_on_where_it_was(
    models: Path,
    few: dict[str, Any],
    tmp_path: Path,
    where: str,
    turn: int,
    compressed: int,
    evaluated: int,
    loaded: int,
) -> None:
    """Stopped at the turn-th call of `where`; then so many compressions, evaluations and loads are left to do."""
    name, _, attribute = where.partition(".")
    owner, key = (getattr(rows, name), attribute) if attribute else (rows, name)
    original, count = getattr(owner, key), 0

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == turn:
            raise Stopped
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, key, stopping)
        with pytest.raises(Stopped):
            run(models, tmp_path / "out", **FEW)
    assert (tmp_path / "out" / "work").is_dir() and not (tmp_path / "out" / "report.html").exists()
    calls = {"compress": 0, "evaluate": 0, "read_model": 0, "walk": 0}
    with pytest.MonkeyPatch.context() as patch:
        for name, owner in (("compress", rows), ("evaluate", rows), ("read_model", rows), ("walk", rows.calibrate)):
            counted(patch, owner, name, calls)
        found = run(models, tmp_path / "out", **FEW)
    assert plain(found) == plain(few) and found == json.loads((tmp_path / "out" / "compare.json").read_text())
    assert calls == {"compress": compressed, "evaluate": evaluated, "read_model": loaded, "walk": 0}
    for name in ("deltacome-4.bayou", "deltacome-6.bayou"):
        assert (tmp_path / "out" / name).read_bytes() == (models / "few" / name).read_bytes()
    assert not (tmp_path / "out" / "work").exists()


def counted(patch: pytest.MonkeyPatch, owner: Any, name: str, calls: dict[str, int]) -> None:
    """Count the calls of a function."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return original(*args, **kwargs)

    patch.setattr(owner, name, call)


def test_a_method_or_size_can_be_added_later(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(models, tmp_path / "out", names=["lowrank"], ratios=[4], plot=False)
    asked = []
    original = rows.compress
    monkeypatch.setattr(rows, "compress", lambda **k: (asked.append((k["method"], k["ratio"])), original(**k))[1])
    found = run(models, tmp_path / "out", names=["lowrank", "deltacome"], ratios=[6], plot=False)
    assert asked == [("deltacome", 6), ("lowrank", 6)]
    assert [(row["method"], row["asked"]) for row in found["candidates"]] == [
        ("deltacome", 6),
        ("lowrank", 4),
        ("lowrank", 6),
    ]
    assert found["candidates"][1] == first["candidates"][0]


def test_the_calibration_and_the_fine_tunes_logits_are_found_once(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"walk": 0, "read_model": 0, "eigvalsh": 0, "eigh": 0}
    owners = {"walk": rows.calibrate, "read_model": rows, "eigvalsh": torch.linalg, "eigh": torch.linalg}
    for name, owner in owners.items():
        counted(monkeypatch, owner, name, counts)
    run(models, tmp_path / "out", names=["deltacome", "lowrank"], ratios=[4, 6], plot=False)
    # 14 linears, embedding and head; and the roots of the moments for the 9 matrices that are not wide.
    assert counts == {"walk": 1, "read_model": 1, "eigvalsh": 16, "eigh": 16 + 9}


def test_a_folder_of_another_comparison_is_refused(
    models: Path, done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = done
    before = (folder / "compare.json").read_bytes()
    (tmp_path / "other.txt").write_text(HELD[:300])
    for other in ({"seed": 1}, {"distill_steps": 2}, {"data": tmp_path / "other.txt"}, {"calibration": None}):
        with pytest.raises(BadInput, match="holds a comparison of other models, texts, options or versions"):
            run(models, folder, **other)
    assert (folder / "compare.json").read_bytes() == before
    with pytest.raises(BadInput, match="is no empty folder, and holds no comparison"):
        run(models, models)
    (tmp_path / "compare.json").write_text("{")
    with pytest.raises(BadInput, match="not what `bayou compare` writes"):
        run(models, tmp_path)


def test_held_out_text_must_not_be_the_calibrations(models: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is the text of --calibration"):
        run(models, tmp_path / "out", calibration=models / "held.txt")
    (tmp_path / "copy.txt").write_text(HELD)
    with pytest.raises(BadInput, match="hold out some of its rows"):
        run(models, tmp_path / "out", calibration=tmp_path / "copy.txt")
    assert not (tmp_path / "out").exists()
    lines = HELD.splitlines(keepends=True)
    (tmp_path / "some.txt").write_text(TRAIN + "".join(lines[:3]))
    (warning,) = rows.check_held_out(models / "held.txt", tmp_path / "some.txt")
    assert warning.startswith("3 of the 10 lines of")
    assert rows.check_held_out(models / "held.txt", models / "train.txt") == []
    assert rows.check_held_out(models / "held.txt", None) == rows.check_held_out(models / "held.txt", "none") == []


@pytest.mark.parametrize(
    "options,message",
    [
        ({"names": ["squeeze"]}, "there is no method 'squeeze'"),
        ({"names": []}, "name a method and a ratio at least"),
        ({"ratios": [-1]}, "ratio -1.0: a number above 0"),
        ({"calibration": "none", "distill_steps": None}, "200 steps of fitting gains need a text"),
        ({"data": Path("absent.txt")}, "cannot read absent.txt"),
        ({"data": Path("empty.txt")}, "0 tokens of text: too few"),
        ({"data": Path("long.jsonl")}, "long.jsonl has a row of 302 tokens; the model has 256 positions"),
        ({"rows": 0}, "cannot evaluate 0 rows"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    Path("long.jsonl").write_text(json.dumps({"prompt": "x" * 300, "answer": "yo"}))
    with pytest.raises(BadInput, match=message):
        run(models, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="without torchrun"):
        run(models, tmp_path / "out")


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_other_layouts_of_matrices(name: str, models: Path, tmp_path: Path) -> None:
    """Matrices that lie transposed, and experts: every cell has both errors, and the files lose what they say."""
    base = pico(name, tmp_path / "base")
    tuned = perturb(base, tmp_path / "tuned", scale=0.3)
    given = OPTIONS | {"names": ["deltacome"], "ratios": [3], "data": models / "held.txt", "plot": False}
    (row,) = compare(base, tuned, tmp_path / "out", calibration=models / "train.txt", **given)["candidates"]
    assert 0 < row["lost"] < 1 and row["decibels"] > 0
    assert all(0 < cell["output"] < 1 and 0 < cell["error"] < 1 for cell in row["cells"])
    if name == "mixtral":
        experts = [cell for cell in row["cells"] if "experts" in cell["kind"]]
        assert len(experts) == 2 * 3 and all(cell["matrices"] == 4 for cell in experts)


def test_an_unchanged_model_loses_nothing(models: Path, tmp_path: Path) -> None:
    given = {"names": ["lowrank"], "ratios": [4], "calibration": "none", "distill_steps": 0}
    found = compare(models / "base", models / "base", tmp_path / "out", data=models / "held.txt", **given)
    (row,) = found["candidates"]
    assert (row["kl"], row["lost"], row["cells"], row["flip"]) == (0, 0, [], 0) and "decibels" not in row
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare.json", "lowrank-4.bayou", "report.html"}


def test_a_row_that_was_refused_is_tried_again(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = rows.compress

    def refusing(**options: Any) -> Any:
        if options["method"] == "deltacome":
            raise BadInput("not today")
        return original(**options)

    given = {"names": ["deltacome", "lowrank"], "ratios": [4], "plot": False, "bound": False}
    with monkeypatch.context() as patch:
        patch.setattr(rows, "compress", refusing)
        first = run(models, tmp_path / "out", **given)
        assert row_of(first, "deltacome") == {"method": "deltacome", "asked": 4, "reason": "not today"}
        with pytest.raises(BadInput, match="not today"):
            run(models, tmp_path / "none", **given | {"names": ["deltacome"]})
    second = run(models, tmp_path / "out", **given)
    assert "reason" not in row_of(second, "deltacome") and row_of(second, "deltacome")["kl"] > 0
    assert row_of(second, "lowrank") == row_of(first, "lowrank")


def test_moment_files_give_what_the_walk_found(models: Path, tmp_path: Path) -> None:
    tuned = rows.Checkpoint(models / "tuned")
    model = rows.skeleton.build(tuned.folder)
    places = rows.skeleton.places(model, tuned.names())
    ids = torch.arange(5, 101).reshape(3, 32)
    kept = MomentFiles(tmp_path / "moments", ids)
    with pytest.raises(BadInput, match="make them first"):
        kept.check(ids)
    kept.make(tuned, model, places, "cpu")
    kept.check(ids)
    with pytest.raises(BadInput, match="of the same text"):
        kept.check(ids + 1)
    assert not MomentFiles(tmp_path / "moments", ids + 1).complete
    assert kept.layers() == [0, 1, 2] and kept.where()["lm_head"] == 2
    whole, seen = read_model(models / "tuned"), {}
    for name, module in whole.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _m, a, name=name: seen.update({name: a[0].flatten(0, 1)}))
    with torch.no_grad():
        whole(ids)
    found = {name: gram for layer in kept.layers() for name, gram in kept.get(layer).items()}
    assert set(found) == set(seen)
    for name, x in seen.items():
        torch.testing.assert_close(found[name], x.T @ x, rtol=1e-4, atol=1e-3)
    one = kept.get(0)
    assert one["model.layers.0.self_attn.q_proj"] is one["model.layers.0.self_attn.v_proj"]
    assert one["model.layers.0.self_attn.q_proj"] is not one["model.layers.0.mlp.up_proj"]
    with pytest.raises(BadInput, match="go without moments"):
        how = {"calibration": ids, "moments": kept, "activations": "compressed"}
        bayou.compress(models / "base", models / "tuned", tmp_path / "a", ratio=4, **how)
