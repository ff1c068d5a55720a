"""What the commands do with their own arguments: any architecture, clear refusals, and never a repository's code."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from pico import perturb, pico

import bayou
from bayou import report
from bayou.calibrate import read_tokenizer
from bayou.cli import main
from bayou.errors import BadInput


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A vision-language base, its fine-tune and the file between them."""
    folder = tmp_path_factory.mktemp("vision")
    base = pico("llava", folder / "base")
    tuned = perturb(base, folder / "tuned", scale=0.3)
    bayou.compress(base, tuned, folder / "a.bayou", method="lowrank", ratio=2, calibration="none")
    return base, tuned, folder / "a.bayou"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, object]]:
    """Exit code and the JSON that a command ends with."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words), "--json"])
    return int(stop.value.code or 0), json.loads(capsys.readouterr().out.splitlines()[-1])


def test_eval_compares_vision_language_models(
    vision: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned, file = vision
    (tmp_path / "a.txt").write_text("Every number of this text counts.\n")
    bayou.restore(base, file, tmp_path / "restored")
    found = {}
    for candidate in (file, tmp_path / "restored", tuned, base):
        code, found[candidate.name] = run(capsys, "eval", base, candidate, tuned, "--data", tmp_path / "a.txt")
        assert code == 0
    kl = {name: float(str(result["kl"])) for name, result in found.items()}
    assert abs(kl["tuned"]) < 1e-9 and 1e-6 < kl["a.bayou"] < kl["base"]
    assert kl["restored"] == pytest.approx(kl["a.bayou"], rel=0.05)


def test_a_tokenizer_s_own_code_is_never_run_nor_asked_about(
    vision: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, marker = tmp_path / "own", tmp_path / "marker"
    pico("llama_gqa", folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    own = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(BadInput, match="no tokenizer that transformers can load"):
        read_tokenizer(folder)
    (tmp_path / "a.txt").write_text("text")
    code, found = run(capsys, "eval", vision[0], folder, folder, "--data", tmp_path / "a.txt")
    assert code == 1 and found["error"] == "BadInput"
    assert not marker.exists() and sys.stdin.read() == "y\n" * 9


@pytest.mark.parametrize("name", ["a.xyz", "a", "a.", "a.png.bak"])
def test_a_drawing_of_an_unknown_ending_is_refused_with_those_that_work(
    vision: tuple[Path, Path, Path], tmp_path: Path, name: str
) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(BadInput, match=r"a.*: matplotlib draws files that end in .*\.pdf, .*\.png, .*\.svg"):
        report.plot(vision[2], tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_drawing_is_of_the_kind_that_its_ending_says(vision: tuple[Path, Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, start in (("a.png", b"\x89PNG"), ("a.SVG", b"<?xml"), ("a.pdf", b"%PDF")):
        report.plot(vision[2], tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize(
    "words,message",
    [
        (["a.bayou", "tuned"], "give --data FILE, or --tasks NAMES, or both"),
        (["a.bayou", "--data", "a.txt"], "--data compares with the fine-tune: give it after the file"),
        (["a.bayou", "tuned", "--data", "a.txt", "--limit", "3"], "say how to run --tasks; give some"),
        (["a.bayou", "--tasks", "arc_easy"], r"--tasks needs lm-evaluation-harness .*pip install 'bayou\[eval\]'"),
    ],
)
def test_eval_says_what_it_lacks(
    vision: tuple[Path, Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(vision[0].parent)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, found = run(capsys, "eval", "base", *words)
    assert code == 1 and found["error"] == "BadInput" and re.search(message, str(found["message"]))
