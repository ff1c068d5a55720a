"""vLLM's server in a process of its own, with the plugin, and how the tests ask it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

NEW, WAIT = 24, 300
PROMPTS = [[1, *torch.randint(5, 128, (12,), generator=torch.Generator().manual_seed(i)).tolist()] for i in range(16)]


@dataclass
class Server:
    """vLLM's server. folder: base, the fine-tunes, deltas, cache. log: all that it has said."""

    folder: Path
    port: int
    log: Path

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content, kind = answer.read(), answer.getheader("Content-Type", "")
            return answer.status, json.loads(content) if "json" in kind else content.decode()
        finally:
            connection.close()

    def complete(self, model: str, prompt: list[int], **more: Any) -> dict[str, Any]:
        wanted = {"max_tokens": NEW, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        status, answer = self.post("/v1/completions", model=model, prompt=prompt, **wanted | more)
        assert status == 200, answer
        return answer["choices"][0]

    def lines(self, word: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if word in line]

    def asked_at_once(
        self, models: Sequence[str], prompts: Sequence[list[int]] = PROMPTS
    ) -> dict[tuple[str, int], list[int]]:
        """The answers to every prompt by every model, all of them asked for at the same time."""
        todo = [(model, index) for index in range(len(prompts)) for model in models]
        with ThreadPoolExecutor(len(todo)) as clients:
            found = clients.map(lambda one: self.complete(one[0], prompts[one[1]])["token_ids"], todo)
            return dict(zip(todo, found, strict=True))


def command(folder: Path, *options: str) -> list[str]:
    """What starts the server of folder/base, in fp32."""
    found = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "base")]
    found += ["--served-model-name", "base", "--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    return [*found, "--enable-lora", "--max-logprobs", "128", "--host", "127.0.0.1", *options]


def environment(folder: Path, mine: Mapping[str, object]) -> dict[str, str]:
    mine = {"BAYOU_DELTAS": folder / "deltas", "BAYOU_CACHE": folder / "cache", **mine}
    # bf16 on a virtual machine that says it has AMX may be an illegal instruction: hence float32 and this ISA.
    theirs = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": 1, "VLLM_CPU_KVCACHE_SPACE": 1, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    theirs |= {"VLLM_NO_USAGE_STATS": 1, "HF_HUB_OFFLINE": 1}
    return os.environ | {key: str(value) for key, value in (mine | theirs).items()}


@contextmanager
def running(folder: Path, mine: Mapping[str, object], *options: str, log: str = "server.log") -> Iterator[Server]:
    """The server, once it answers. mine: variables, beside those of the folder's deltas and cache."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(folder / log, "wb") as out:
        child = subprocess.Popen(
            command(folder, *options, "--port", str(port)),
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(folder, mine),
            cwd=folder,
            start_new_session=True,
        )
    found = Server(folder, port, folder / log)
    try:
        end = time.monotonic() + WAIT
        while not found.lines("Application startup complete"):
            if child.poll() is not None or time.monotonic() > end:
                pytest.fail(f"vLLM did not start:\n{found.log.read_text()[-6000:]}", pytrace=False)
            time.sleep(0.5)
        yield found
    finally:
        child.terminate()
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def behind(expected: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """By how much each token's logit is below the greatest, after the tokens before it; 0 for the right token."""
    with torch.no_grad():
        logits = expected(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.amax(1) - logits[torch.arange(len(answer)), torch.tensor(answer)]
