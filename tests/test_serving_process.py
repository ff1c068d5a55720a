"""`bayou serve` as a process: its options, how it ends, and that a killed one leaves nothing behind."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from running import GREEDY

from bayou.cli import main
from bayou.errors import BadInput
from bayou.serving import command


class Process:
    """A server in a process of its own, once it listens."""

    def __init__(self, *words: object) -> None:
        arguments = [sys.executable, "-m", "bayou", "serve", *map(str, words), "--port", "0", "--json"]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        self.said: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if found := re.search(r"on (http://\S+) after", line):
                self.url = found[1]
                return
        raise AssertionError(f"it ended with {self.process.wait()}: {self.said}")

    def ask(self, name: str, **wishes: object) -> httpx2.Response:
        asked = {**GREEDY, "model": name, "prompt": "hello", **wishes}
        return httpx2.post(f"{self.url}/v1/completions", json=asked, timeout=60)

    def end(self, number: int) -> tuple[int, list[str]]:
        self.process.send_signal(number)
        rest = self.process.communicate(timeout=180)[0]
        return self.process.returncode, rest.splitlines()


@pytest.fixture
def folder(made: tuple, tmp_path: Path) -> Iterator[Path]:
    for name in ("dense", "lowrank"):
        os.link(made[1][name], tmp_path / f"{name}.bayou")
    (tmp_path / "broken.bayou").write_bytes(b"nothing")
    yield tmp_path


@pytest.mark.slow
def test_a_drain_lets_answers_end_and_a_kill_leaves_nothing(made: tuple, folder: Path) -> None:
    words = (made[0], "--delta", f"mine={made[1]['gain']}", "--delta-dir", folder, "--max-length", 256, "--drain", 120)
    first = Process(*words)
    assert any("left out: broken.bayou" in line for line in first.said)
    assert "serving base and 3 deltas" in first.said[-1]
    answer = {name: first.ask(name).json()["choices"][0]["text"] for name in ("base", "mine", "dense", "lowrank")}
    assert len(set(answer.values())) == 4
    code, _ = first.end(signal.SIGKILL)
    assert code == -signal.SIGKILL
    second = Process(*words)
    assert {name: second.ask(name).json()["choices"][0]["text"] for name in answer} == answer
    long = {"max_tokens": 240, "n": 4, "seed": 1, "temperature": 1}
    slow: list[httpx2.Response] = []
    asking = threading.Thread(target=lambda: slow.append(second.ask("dense", **long)))
    asking.start()
    deadline = time.monotonic() + 60
    while "bayou_running_answers 4.0" not in httpx2.get(f"{second.url}/metrics").text:
        assert time.monotonic() < deadline and not slow, "the answers ended before they could be waited for"
    code, said = second.end(signal.SIGTERM)
    asking.join()
    assert slow[0].status_code == 200 and slow[0].json()["usage"]["completion_tokens"] == 960
    assert code == 0
    assert json.loads(said[-1]) == {"answers": 8, "tokens": 4 * 8 + 960}
    with pytest.raises(httpx2.ConnectError):
        second.ask("dense")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "much"], "'much' is not a size"),
        (["--max-batch", "0"], "--max-batch 0: at least 1"),
        (["--delta-dir", "nowhere"], "nowhere is not a folder"),
        (["--delta", "dense"], "write NAME=FILE"),
        (["--delta", "../x=y"], "'../x' is no name"),
        (["--dtype", "int8"], "choose float32"),
        (["--port", "70000"], "0 to 65535"),
        (["--host", "256.1.1.1"], "cannot listen"),
        (["--name", "a b"], "'a b' is no name"),
    ],
)
def test_options_that_make_no_sense(words: list[str], message: str, made: tuple, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(made[0]), *(["--port", "0"] if "--port" not in words else []), *words])
    assert ended.value.code == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_without_the_extra_it_says_what_to_install(made: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(BadInput, match=r"pip install 'bayou\[serve\]'"):
        command.serve(str(made[0]))
