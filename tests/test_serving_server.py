"""The server over a real socket, as those see it who ask for what there is: OpenAI's API for many models."""

import shutil
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from running import GREEDY, Running, text_of
from tenants import alone, greedy
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


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def refused(answer: httpx2.Response, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == code


def test_three_models_stream_at_once(running: Running, client: openai.OpenAI, models: dict) -> None:
    streams = {
        name: client.completions.create(
            model=name, prompt="hello", temperature=0, max_tokens=30, stream=True, extra_body={"ignore_eos": True}
        )
        for name in ("base", "dense", "lowrank")
    }
    said, turns = dict.fromkeys(streams, ""), []
    threads = []

    def listen(name: str) -> None:
        for chunk in streams[name]:
            assert chunk.model == name
            said[name] += chunk.choices[0].text
            turns.append(name)

    for name in streams:
        threads.append(threading.Thread(target=listen, args=(name,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert said == {name: text_of(running, models[name], "hello", 30) for name in streams}
    assert len(set(turns[: len(turns) // 2])) == 3, "one after the other"


def test_a_chat_goes_through_the_tenants_template(running: Running, client: openai.OpenAI, models: dict) -> None:
    wanted = text_of(running, models["gain"], "<user>hi>")
    asked: dict[str, Any] = {"model": "gain", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    asked |= {"max_completion_tokens": 8, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == wanted and whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (9, 8)
    content = whole.choices[0].logprobs.content
    assert len(content) == 8 and all(len(c.top_logprobs) == 2 and c.logprob <= 0 for c in content)
    assert content[0].token == content[0].top_logprobs[0].token
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted
    assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(**{**asked, "model": "dense"})


def test_n_seed_stop_logprobs_and_usage(running: Running, http: httpx2.Client, models: dict) -> None:
    asked = {"model": "dense", "prompt": ["one", "two"], "n": 3, "seed": 7, "max_tokens": 6, "ignore_eos": True}
    first, again = (http.post("/v1/completions", json=asked).json() for _ in range(2))
    assert [c["index"] for c in first["choices"]] == list(range(6))
    texts = [choice["text"] for choice in first["choices"]]
    assert texts == [choice["text"] for choice in again["choices"]] and len(set(texts)) > 3
    assert first["usage"] == {"prompt_tokens": 6, "completion_tokens": 36, "total_tokens": 42}
    text = text_of(running, models["dense"], "hello", 20)
    cut = {**GREEDY, "model": "dense", "prompt": "hello", "max_tokens": 20, "stop": text[6:8], "logprobs": 1}
    found = http.post("/v1/completions", json=cut).json()["choices"][0]
    assert found["text"] == text[: text.index(text[6:8])] and found["finish_reason"] == "stop"
    assert len(found["logprobs"]["token_logprobs"]) == len(found["logprobs"]["tokens"]) >= text.index(text[6:8])
    by_ids = http.post("/v1/completions", json={**GREEDY, "model": "base", "prompt": [5, 6, 7]}).json()
    assert by_ids["choices"][0]["text"] == running.engine.bank.base.voice.decode(greedy(models["base"], [5, 6, 7], 8))


def test_models_tell_what_they_are(running: Running, client: openai.OpenAI, made: tuple) -> None:
    found = {model.id: model.model_dump() for model in client.models.list()}
    assert set(found) == {"base", *made[1]}
    assert found["base"]["parent"] is None
    assert found["lowrank"]["parent"] == "base" and found["lowrank"]["bytes"] == made[1]["lowrank"].stat().st_size
    assert 0 < found["lowrank"]["fidelity"]["mean_error"] < 1
    assert client.models.retrieve("lowrank").id == "lowrank"


def test_loading_and_unloading(running: Running, http: httpx2.Client, made: tuple, models: dict) -> None:
    folder = running.roster._root
    (folder / "sub").mkdir()
    shutil.copy(made[1]["lowrank"], folder / "sub" / "later.bayou")
    asked = {**GREEDY, "prompt": "hello"}
    wanted = text_of(running, models["lowrank"], "hello")
    refused(http.post("/v1/completions", json={**asked, "model": "fresh"}), 404, "model_not_found")
    loaded = http.post("/v1/load_lora_adapter", json={"lora_name": "fresh", "lora_path": "sub/later.bayou"})
    assert loaded.status_code == 200 and "added successfully" in loaded.text
    known = len(http.get("/v1/models").json()["data"])
    for name in ("fresh", "base:fresh", "fresh.bayou", "sub/later"):  # the last by its place in the folder
        answer = http.post("/v1/completions", json={**asked, "model": name})
        assert answer.json()["choices"][0]["text"] == wanted, answer.text
    assert len(http.get("/v1/models").json()["data"]) == known + 1  # sub/later: no name is a second model
    again = {"lora_name": "fresh", "lora_path": "dense"}
    refused(http.post("/v1/load_lora_adapter", json=again), 400, "bad_request")
    assert http.post("/v1/load_lora_adapter", json={**again, "load_inplace": True}).status_code == 200
    answer = http.post("/v1/completions", json={**asked, "model": "fresh"}).json()
    assert answer["choices"][0]["text"] == text_of(running, models["dense"], "hello")
    for name in ("fresh", "sub/later"):
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200
        refused(http.post("/v1/completions", json={**asked, "model": name}), 404, "model_not_found")
        refused(http.post("/v1/completions", json={**asked, "model": f"{name}.bayou"}), 404, "model_not_found")
        refused(http.post("/v1/unload_lora_adapter", json={"lora_name": name}), 404, "model_not_found")


def test_metrics_are_by_tenant_and_bounded(running: Running, http: httpx2.Client, monkeypatch) -> None:
    http.post("/v1/completions", json={**GREEDY, "model": "dense", "prompt": "hello"})
    http.post("/v1/completions", json={**GREEDY, "model": "never-there", "prompt": "hello"})
    text = http.get("/metrics").text
    assert 'bayou_generated_tokens_total{model="dense"}' in text and 'bayou_loads_total{model="dense"' in text
    assert 'bayou_first_token_seconds_count{model="dense"}' in text and 'memory="device",model="dense"' in text
    assert "never-there" not in text and 'bayou_refused_requests_total{status="404"}' in text
    metrics = running.app.state.metrics
    monkeypatch.setattr("bayou.serving.metrics._MOST_LABELS", len(metrics._labels))
    assert metrics.label("dense") == "dense" and metrics.label("one more") == "other"
    assert http.get("/health").json() == {"status": "ok"}
