"""Headless Chromium, driven through its DevTools protocol over two pipes, as a person would: mouse, keys and eyes."""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "headless_shell")
_KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), " ": (32, " ")}  # key: its number on Windows, the text that it types


def program() -> str:
    """Where Chromium is: $BAYOU_CHROMIUM, else on the path. Skips the test where there is none."""
    named = os.environ.get("BAYOU_CHROMIUM")
    if named:
        if shutil.which(named) is None:
            pytest.fail(f"BAYOU_CHROMIUM={named}: no program that can be run")
        return named
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"no Chromium: none of {', '.join(_NAMES)} is on the path; BAYOU_CHROMIUM=PATH names one")
    return found


class Browser:
    """One Chromium with one tab. `requests` are the addresses it asked for, `complaints` what its console says."""

    def __init__(self, folder: Path) -> None:
        commands, self._commands = _pipe()
        self._answers, answers = _pipe()
        words = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run"]
        words += ["--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-extensions"]
        words += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to have one as root
        # It reads its commands from file 3 and writes to file 4.
        # (A shell's `3<&12` may stop at the first digit.)
        shell = [
            "sh",
            "-c",
            f'exec 3</dev/fd/{commands} 4>/dev/fd/{answers} "$0" "$@"',
            program(),
            *words,
            "about:blank",
        ]
        self._log = folder / "stderr.txt"
        with self._log.open("wb") as log:
            quiet: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": log}
            self._process = subprocess.Popen(shell, pass_fds=(commands, answers), **quiet)
        os.close(commands)
        os.close(answers)
        self._rest = b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.do(f"{domain}.enable")

    def close(self) -> None:
        """End it; the processes that it started end with it."""
        self._session = None
        with contextlib.suppress(AssertionError, OSError):  # it may end before it answers
            self.do("Browser.close")
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol and its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        for heard in self._heard():
            if heard.get("id") == number:
                assert "error" not in heard, f"{method}: {heard['error']}"
                return heard["result"]
            self._note(heard.get("method", ""), heard.get("params", {}))
        raise AssertionError(f"Chromium ended before it answered {method}: {self._log.read_text()[-2000:]}")

    def _heard(self) -> Iterator[dict[str, Any]]:
        while True:
            while b"\0" not in self._rest:
                assert select.select([self._answers], [], [], 60)[0], "Chromium says nothing any longer"
                new = os.read(self._answers, 2**16)
                if not new:
                    return
                self._rest += new
            message, self._rest = self._rest.split(b"\0", 1)
            yield json.loads(message)

    def _note(self, event: str, what: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])
        elif event == "Log.entryAdded":
            self.complaints.append(what["entry"]["text"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(what["exceptionDetails"]))

    # ---------------------------------------------------------------------------------------------- what a person does

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page, awaited."""
        found = self.do("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 30) -> None:
        """Until a JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < deadline, f"not within {seconds} s: {condition}\n{self.text('body')}"
            time.sleep(0.02)

    def go(self, url: str) -> None:
        """Open a page, anew."""
        self.do("Page.navigate", url=url)
        self.wait(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")
        self.requests.clear()
        self.complaints.clear()
        self.do("Page.reload", ignoreCache=True)
        self.wait("document.readyState === 'complete' && document.querySelector('#models li, #trouble:not([hidden])')")

    def text(self, selector: str) -> str:
        """What can be read there."""
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector: str) -> None:
        """With the mouse, where it is shown."""
        script = f"""(() => {{ const it = document.querySelector({json.dumps(selector)});
            it.scrollIntoView({{ block: "center" }}); const r = it.getBoundingClientRect();
            return [r.x + r.width / 2, r.y + r.height / 2]; }})()"""
        x, y = self.run(script)
        for kind in ("mousePressed", "mouseReleased"):
            self.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, key: str, *, control: bool = False) -> None:
        """Press and release."""
        number, text = _KEYS[key]
        found = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": number}
        found |= {"modifiers": 2 if control else 0}
        self.do("Input.dispatchKeyEvent", type="keyDown", **found, **({"text": text} if text and not control else {}))
        self.do("Input.dispatchKeyEvent", type="keyUp", **found)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.do("Input.insertText", text=text)

    def shape(self, width: int, height: int, *, dark: bool = False) -> None:
        """The window's size in pixels, and what the system prefers."""
        self.do(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        wish = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.do("Emulation.setEmulatedMedia", features=[wish])

    def picture(self, file: Path) -> None:
        """What is shown, as PNG."""
        file.write_bytes(base64.b64decode(self.do("Page.captureScreenshot", format="png")["data"]))


def _pipe() -> tuple[int, int]:
    """Its ends have numbers that no end is moved to."""
    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return moved[0], moved[1]
