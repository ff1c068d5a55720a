"""What `bayou compare` shows: the page, the plot, the table on the terminal."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from compared import done, models, row_of, run

from bayou.cli import main
from bayou.comparison import drawing
from bayou.errors import BadInput

__all__ = ["done", "models"]  # fixtures


def test_without_matplotlib_it_says_so_before_any_work(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BadInput, match=r"--no-plot, or pip install 'bayou\[plot\]'"):
        run(models, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(
        models,
        tmp_path / "out",
        names=["lowrank"],
        ratios=[4],
        plot=False,
        bound=False,
        calibration="none",
        distill_steps=0,
    )
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"compare.json", "lowrank-4.bayou", "report.html"}


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_whole_and_loads_nothing(done: tuple[Path, dict[str, Any]]) -> None:
    folder, found = done
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags} == set()
    for _, attributes in page.tags:
        for name, value in attributes.items():
            if name.endswith(("href", "src")):
                assert value and value.startswith("#")
    assert re.findall(r"url\((?!#)|@import", text) == []
    row = row_of(found, "deltacome")
    for word in (
        f"{row['bytes']:,}",
        f"{row['kl']:.5f} ± {row['kl_se']:.5f}",
        row_of(found, "lowrank", 1000)["reason"],
    ):
        assert word in page.texts
    titles = [a["title"] for tag, a in page.tags if tag == "td" and "title" in a]
    assert len(titles) == 3 * 16 and sum("layer 1, mlp.down_proj: output" in str(title) for title in titles) == 3
    svg = (folder / "plot.svg").read_text()
    assert svg[svg.index("<svg") :] in text
    assert "bound: reverse water-filling" in svg and "ideal codes" in svg and "nats a token" in svg and "1/4" in svg


def test_names_cannot_put_markup_into_the_page(done: tuple[Path, dict[str, Any]]) -> None:
    from bayou.comparison import page

    hostile = "<script>alert(1)</script>"
    state = json.loads(json.dumps(done[1])) | {"finetuned": hostile, "base": hostile, "warnings": [hostile]}
    state["settings"]["data"] = hostile
    state["candidates"][0]["cells"][0]["kind"] = hostile
    assert "<script" not in page.html(state, "")


def test_a_file_without_any_error_leaves_no_plot_and_no_bound(done: tuple[Path, dict[str, Any]]) -> None:
    state = json.loads(json.dumps(done[1]))
    for row in state["candidates"]:
        row |= {"kl": 0.0} if "kl" in row else {}
    assert drawing.comparison(state) == ""


def test_the_command_prints_all_figures_at_any_width(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rowed = "".join(json.dumps({"prompt": f"{i}+1=", "answer": f"{i + 1}</s>"}) + "\n" for i in range(6))
    (tmp_path / "a.jsonl").write_text(rowed)
    words = ["compare", models / "base", models / "tuned", "--data", tmp_path / "a.jsonl", "-o", tmp_path / "out"]
    words += ["--methods", "lowrank, deltacome", "--ratios", "4,1000", "--calibration", models / "train.txt"]
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words), "--tokens", "2000", "--length", "64", "--rows", "5", "--json"])
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert stop.value.code == 0 and found["rows"] == 5 and found["kind"] == "answers"
    for method in ("lowrank", "deltacome"):
        row = row_of(found, method)
        (line,) = (line for line in out.splitlines() if line.strip().startswith(f"{method} 1/4 "))
        for word in (f"{row['bytes']:,}", f"{row['kl']:.5f} ± {row['kl_se']:.5f}", f"{row['acc']:.4f}"):
            assert word in line
        assert f"{row['decibels']:.1f}" in line and f"{row['nll']:.4f}" in line and f"{row['flip']:.4f}" in line
    assert "lowrank 1/1000: --ratio 1000 is" in out
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words), "--ratios", "many"])
    assert stop.value.code == 1
