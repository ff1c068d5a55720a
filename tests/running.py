"""A server in a thread of this process, and a client that watches it while others do what they do."""

import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from tenants import greedy
from transformers import PreTrainedModel

from bayou.serving.engine import Engine, Settings
from bayou.serving.roster import Roster
from bayou.serving.server import application

GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


class Running:
    """A server in a thread of this process."""

    def __init__(self, base: Path, folder: Path, settings: Settings, **options: Any) -> None:
        self.engine = Engine(base, "base", settings)
        self.roster = Roster(self.engine, folder)
        self.left_out = list(self.roster.register_all())
        self.app = application(self.engine, self.roster, **options)
        self.server = uvicorn.Server(uvicorn.Config(self.app, port=0, log_level="error", timeout_graceful_shutdown=5))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def end(self) -> None:
        self.server.should_exit = True
        self.thread.join()


def text_of(running: Running, model: PreTrainedModel, prompt: str, count: int = 8) -> str:
    voice = running.engine.bank.base.voice
    return voice.decode(greedy(model, voice.encode(prompt), count))


def quiet(running: Running) -> None:
    """Wait until nothing runs: whoever left has been let go of."""
    deadline = time.monotonic() + 60
    while running.engine.load_now["running"] or running.engine.load_now["waiting"]:
        assert time.monotonic() < deadline, "answers of clients that left go on"
        time.sleep(0.01)
    assert all(tenant.held == 0 for name in running.engine.bank.names() if (tenant := running.engine.bank.find(name)))


class Witness:
    """A client that goes on asking while others do what they do, and remembers every answer."""

    def __init__(self, running: Running, models: dict) -> None:
        self._url, self._wrong, self._asked = running.url, [], 0
        self._wanted = {name: text_of(running, models[name], "hello", 20) for name in ("dense", "lowrank", "base")}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        with httpx2.Client(base_url=self._url, timeout=120) as http:
            while not self._over.is_set() or not self._asked:
                for name, text in self._wanted.items():
                    asked = {**GREEDY, "model": name, "prompt": "hello", "max_tokens": 20}
                    answer = http.post("/v1/completions", json=asked)
                    if answer.status_code != 200 or answer.json()["choices"][0]["text"] != text:
                        self._wrong.append((name, answer.text))
                    self._asked += 1

    def __enter__(self) -> "Witness":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        assert self._asked >= 3 and self._wrong == []
