"""The server over a real socket: what becomes of all who ask for what there is not, and of those beside them."""

import asyncio
import json
import re
import resource
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
import schemathesis
from dense import dense_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pico import perturb, pico
from running import GREEDY, Running, Witness, quiet, text_of
from tenants import alone, greedy, prompts
from transformers import PreTrainedModel

from bayou.serving.engine import Settings


@pytest.fixture(scope="module")
def models(made: tuple, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedModel]:
    base, files = made
    root = tmp_path_factory.mktemp("restored")
    return {name: alone(base, files.get(name), root / name) for name in ("base", "dense", "gain", "lowrank")}


@pytest.fixture(scope="module")
def running(made: tuple, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    for file in made[1].values():
        shutil.copy(file, folder)
    found = Running(made[0], folder, Settings(batch=16, queue=600), body=100_000)
    assert found.left_out == []
    yield found
    found.end()


@pytest.fixture
def http(running: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=running.url, timeout=60) as client:
        yield client


def refused(answer: httpx2.Response, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == code


# ------------------------------------------------------------------------------------------------ what is refused

QUIET: Any = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}

OUTSIDE = [
    *("../../etc/passwd", "/etc/passwd", "..", ".", "a/../../b", "a/./b", "a//b", "dense/", "/dense", "~root", "-x"),
    *("..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "%252e%252e%252f", "..\\..\\etc\\passwd", "C:\\x"),
    *("a\x00b", "dense\n", " dense", "dense ", "file:///etc/passwd", "http://127.0.0.1/x", "a/b/c/d/e", "\u2025/x"),
    *("．．/etc", "link", "linked/dense", "x" * 400),
]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_names_lead_nowhere_else(name: str, running: Running, http: httpx2.Client, made: tuple, tmp_path: Path) -> None:
    folder = running.roster._root
    shutil.copy(made[1]["dense"], tmp_path / "outside.bayou")
    for link, target in (("link.bayou", tmp_path / "outside.bayou"), ("linked", tmp_path)):
        (folder / link).unlink(missing_ok=True)
        (folder / link).symlink_to(target)
    before = running.engine.bank.names()
    tries = [
        http.post("/v1/completions", json={"model": name, "prompt": "x"}),
        http.post("/v1/load_lora_adapter", json={"lora_name": "stolen", "lora_path": name}),
        http.post("/v1/load_lora_adapter", json={"lora_name": "stolen", "lora_path": f"{name}.bayou"}),
        http.post("/v1/unload_lora_adapter", json={"lora_name": name}),
    ]
    if name not in ("link", "linked/dense"):  # names as good as others, for a file that is sound
        tries.append(http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": "dense"}))
    if name not in (".", "..", "dense\n"):  # which the client, and the framework's own pattern, make others of
        tries.append(http.get("/v1/models/" + quote(name, safe="")))
    assert [(answer.status_code, answer.text) for answer in tries if answer.status_code not in (400, 404)] == []
    assert running.engine.bank.names() == before


@pytest.mark.parametrize("path", ["../../etc/passwd", "..%2f..%2fetc/passwd", "%2e%2e/x", "/etc/passwd", "//x", "%00"])
def test_paths_lead_nowhere_else(path: str, running: Running) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as raw:
        raw.sendall(f"GET /v1/models/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert answer.split()[1] in (b"400", b"404"), answer
    assert b"root:" not in answer


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"model": "dense"}),
        ("completions", {"model": "dense", "prompt": []}),
        ("completions", {"model": "dense", "prompt": ""}),
        ("completions", {"model": "dense", "prompt": [1, -1]}),
        ("completions", {"model": "dense", "prompt": [128]}),
        ("completions", {"model": "dense", "prompt": [2**40]}),
        ("completions", {"model": "dense", "prompt": "x", "n": 0}),
        ("completions", {"model": "dense", "prompt": ["x"] * 100, "n": 100}),
        ("completions", {"model": "dense", "prompt": "x", "max_tokens": 0}),
        ("completions", {"model": "dense", "prompt": "x", "temperature": -1}),
        ("completions", {"model": "dense", "prompt": "x", "top_p": 0}),
        ("completions", {"model": "dense", "prompt": "x", "logprobs": 21}),
        ("completions", {"model": "dense", "prompt": "x", "echo": True}),
        ("completions", {"model": "dense", "prompt": "x", "logit_bias": {"5": 1}}),
        ("completions", {"model": "dense", "prompt": "x", "stop": ["a"] * 17}),
        ("completions", {"model": "dense", "prompt": "x" * 300}),
        ("completions", {"model": "dense", "prompt": "x" * 90_000}),
        ("completions", {"model": "dense", "prompt": "x", "min_tokens": 5}),
        ("completions", {"model": "dense", "prompt": "x", "guided_regex": "a+"}),
        ("chat/completions", {"model": "gain", "messages": []}),
        ("chat/completions", {"model": "gain", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        ("chat/completions", {"model": "gain", "messages": [{"role": "user", "content": "x"}], "tools": [{"a": 1}]}),
        ("chat/completions", {"model": "gain", "messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}),
    ],
    ids=repr,
)
@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_cannot_be_answered(path: str, body: dict, stream: bool, http: httpx2.Client) -> None:
    answer = http.post(f"/v1/{path}", json={**body, "stream": stream})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"] and answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"model": "dense", "prompt": "\\ud800"}', b'{"model": "\\ud800", "prompt": "x"}']
    + [b"[" * 50_000, b'{"model": "dense", "prompt": "x", "temperature": NaN}', b"\xff\xfe", b'{"model": 5}'],
    ids=lambda body: repr(body[:30]),
)
def test_bodies_that_are_none(body: bytes, http: httpx2.Client) -> None:
    answer = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_bodies_that_are_too_large(http: httpx2.Client) -> None:
    refused(http.post("/v1/completions", content=b"x" * 100_001), 413, "body_too_large")

    def pieces() -> Iterator[bytes]:
        for _ in range(101):
            yield b" " * 1000

    header = {"content-type": "application/json"}
    refused(http.post("/v1/completions", content=pieces(), headers=header), 413, "body_too_large")


def test_the_key_is_asked_for(made: tuple, tmp_path: Path) -> None:
    found = Running(made[0], tmp_path, Settings(batch=2), key="s3cret")
    try:
        with httpx2.Client(base_url=found.url) as http:
            asked = {"model": "base", "prompt": "x", "max_tokens": 1}
            for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
                refused(http.post("/v1/completions", json=asked, headers=header), 401, "invalid_api_key")
                refused(http.get("/v1/models", headers=header), 401, "invalid_api_key")
            right = {"Authorization": "Bearer s3cret"}
            assert http.post("/v1/completions", json=asked, headers=right).status_code == 200
            assert http.get("/health").status_code == 200
    finally:
        found.end()


# ------------------------------------------------------------------------------------------------ in company


def test_bad_files_change_nobody_elses_answer(
    running: Running, http: httpx2.Client, made: tuple, models: dict, tmp_path: Path
) -> None:
    folder, files = running.roster._root, made[1]
    content = bytearray(files["deltacome"].read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "damaged.bayou").write_bytes(content)
    (folder / "cut.bayou").write_bytes(files["dense"].read_bytes()[:-1000])
    (folder / "empty.bayou").write_bytes(b"")
    other = pico("llama_gqa", tmp_path / "other", seed=5)
    dense_file(other, perturb(other, tmp_path / "tuned"), folder / "foreign.bayou")
    small = pico("llama_gqa", tmp_path / "small", hidden_size=32)
    dense_file(small, perturb(small, tmp_path / "less"), folder / "small.bayou")
    before = running.engine.bank.nbytes
    with Witness(running, models):
        for name, status in {"damaged": 422, "cut": 422, "empty": 422, "foreign": 409, "small": 409}.items():
            for stream in (False, True):
                asked = {"model": name, "prompt": "x", "stream": stream}
                assert http.post("/v1/completions", json=asked).status_code == status, name
            loading = {"lora_name": f"my-{name}", "lora_path": name}
            assert http.post("/v1/load_lora_adapter", json=loading).status_code == status, name
    for name in ("damaged", "cut", "empty", "foreign", "small"):
        (folder / f"{name}.bayou").unlink()
    running.engine.bank.unregister("damaged")  # its header is sound, so it was opened
    assert not any(name.startswith("my-") for name in running.engine.bank.names())
    quiet(running)
    assert running.engine.bank.nbytes["device"] >= before["device"] and not running.engine.bank._waiting


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(stream: bool, running: Running, models: dict) -> None:
    async def leave(after: float) -> None:
        body = {**GREEDY, "model": "gain", "prompt": "hello", "max_tokens": 240, "n": 4, "stream": stream}
        raw = json.dumps(body).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        await writer.drain()
        await asyncio.sleep(after)
        writer.close()

    async def all_of_them() -> None:
        await asyncio.gather(*(leave(after) for after in (0, 0.02, 0.1)))

    def cancelled() -> float:
        text = httpx2.get(f"{running.url}/metrics").text
        found = re.search(r'bayou_answers_total\{model="gain",reason="cancelled"\} (\S+)', text)
        return float(found[1]) if found else 0.0

    before, held = cancelled(), running.engine.load_now["kv_bytes"]
    with Witness(running, models):
        asyncio.run(all_of_them())
        deadline = time.monotonic() + 60
        while running.engine.load_now["running"] > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
    quiet(running)
    assert cancelled() - before >= 8, "answers were made to the end for nobody"
    assert running.engine.load_now["kv_bytes"] == held or held == 0


async def _one(port: int, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    raw = json.dumps(asked).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    answer = await reader.read()
    writer.close()
    return int(answer.split()[1]), json.loads(answer.partition(b"\r\n\r\n")[2])


def test_five_hundred_clients_at_once(running: Running, models: dict) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, limits[1]), limits[1]))
    wanted = {
        (name, i): running.engine.bank.base.voice.decode(greedy(models[name], prompt, 4))
        for name in ("base", "dense", "lowrank")
        for i, prompt in enumerate(prompts(3))
    }
    keys = [list(wanted)[i % len(wanted)] for i in range(500)]

    async def everyone() -> list[tuple[int, dict]]:
        bodies = [{**GREEDY, "model": n, "prompt": prompts(3)[i], "max_tokens": 4} for n, i in keys]
        return await asyncio.gather(*(_one(running.port, body) for body in bodies))

    before = running.engine.load_now["kv_bytes"], running.engine.bank.nbytes
    answers = asyncio.run(everyone())
    assert [status for status, _ in answers] == [200] * 500
    assert [body["choices"][0]["text"] for _, body in answers] == [wanted[key] for key in keys]
    quiet(running)
    assert (running.engine.load_now["kv_bytes"], running.engine.bank.nbytes) == before
    resident = Path("/proc/self/statm")
    if resident.is_file():  # Linux: the process itself does not grow from wave to wave
        after_one = int(resident.read_text().split()[1])
        assert [status for status, _ in asyncio.run(everyone())] == [200] * 500
        quiet(running)
        assert (int(resident.read_text().split()[1]) - after_one) * resource.getpagesize() < 30 * 2**20


def test_a_full_queue_pushes_back(made: tuple, tmp_path: Path, models: dict, running: Running) -> None:
    found = Running(made[0], tmp_path, Settings(batch=2, queue=4))
    try:
        body = {**GREEDY, "model": "base", "prompt": "hello", "max_tokens": 100}

        async def everyone() -> list[tuple[int, dict]]:
            return await asyncio.gather(*(_one(found.port, body) for _ in range(40)))

        answers = asyncio.run(everyone())
        statuses = [status for status, _ in answers]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 4
        text = text_of(running, models["base"], "hello", 100)
        assert all(answer["choices"][0]["text"] == text for status, answer in answers if status == 200)
        assert all(answer["error"]["code"] == "queue_full" for status, answer in answers if status == 429)
        assert asyncio.run(_one(found.port, body))[0] == 200
    finally:
        found.end()


def test_nothing_that_the_schema_allows_is_an_error_of_the_servers(made: tuple, tmp_path: Path, models: dict) -> None:
    for name in ("dense", "lowrank"):
        shutil.copy(made[1][name], tmp_path)
    found = Running(made[0], tmp_path, Settings(batch=16, length=32))  # short answers, however many are asked for
    statuses: set[int] = set()
    try:
        with Witness(found, models):
            schema = schemathesis.openapi.from_url(f"{found.url}/openapi.json")
            for operation in (each.ok() for each in schema.get_all_operations()):

                @given(case=operation.as_strategy())
                @settings(max_examples=10, **QUIET)
                def ask(case: Any) -> None:
                    if isinstance(case.body, dict) and "model" in case.body:
                        case.body["model"] = "dense"  # so that most of them get as far as the engine
                    answer = case.call()
                    statuses.add(answer.status_code)
                    assert answer.status_code < 500, (case.as_curl_command(), answer.text)

                ask()
        assert {200, 400} <= statuses
        quiet(found)
    finally:
        found.end()


@given(text=st.text(), stop=st.lists(st.text(max_size=5), max_size=3), seed=st.integers(-(2**63), 2**63 - 1))
@settings(max_examples=20, **QUIET)
def test_any_text_gets_an_answer_or_a_reason(running: Running, text: str, stop: list[str], seed: int) -> None:
    asked = {"model": "lowrank", "prompt": text, "stop": stop, "seed": seed, "max_tokens": 3}
    raw = json.dumps(asked).encode()
    header = {"content-type": "application/json"}
    answers = [httpx2.post(f"{running.url}/v1/completions", content=raw, headers=header, timeout=60) for _ in range(2)]
    assert answers[0].status_code in (200, 400), answers[0].text
    if answers[0].status_code == 200:
        first, again = (answer.json()["choices"][0]["text"] for answer in answers)
        assert first == again and not any(word and word in first for word in stop)
