"""The page at `/`: what is sent, that the wheel holds it, and what a person sees and does with it in Chromium."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from browser import Browser
from running import Running, quiet

from bayou.serving.engine import Settings

CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def running(made: tuple, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    for file in made[1].values():
        shutil.copy(file, folder)
    found = Running(made[0], folder, Settings(batch=16, queue=600))
    yield found
    found.end()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


@pytest.fixture
def browser(chromium: Browser, running: Running) -> Browser:
    """The page, freshly loaded, in a wide window."""
    chromium.shape(1200, 900)
    chromium.go(running.url + "/")
    return chromium


@pytest.fixture
def slow(running: Running) -> Iterator[None]:
    """Answers that take as long as those of large models do."""
    before = running.engine.on_token

    def wait(answer: Any) -> None:
        before(answer)
        time.sleep(0.02)

    running.engine.on_token = wait
    yield
    running.engine.on_token = before


def pick(browser: Browser, *names: str) -> None:
    for name in names:
        browser.click(f"#models input[value='{name}']")


def fill(browser: Browser, prompt: str, **options: object) -> None:
    browser.click("#prompt")
    browser.type(prompt)
    if options:
        browser.click("#options summary")
    for name, value in options.items():
        browser.click(f"#{name}")
        browser.run(f"document.querySelector('#{name}').select()")
        browser.type(str(value))


def part(name: str, of: str) -> str:
    return f".column[data-model='{name}'] {of}"


def said(browser: Browser, name: str) -> str:
    """The whole of a text, spaces at its end too."""
    return browser.run(f"document.querySelector({json.dumps(part(name, '.text'))}).textContent")


def over(browser: Browser) -> None:
    browser.wait("document.querySelector('#status').textContent.includes('are whole')")


def own(running: Running, name: str, **asked: object) -> dict[str, Any]:
    """The API's answer, not streamed."""
    path = "chat/completions" if "messages" in asked else "completions"
    answer = httpx2.post(f"{running.url}/v1/{path}", json={"model": name, **asked}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


# ------------------------------------------------------------------------------------------------ what is sent


def test_it_is_one_file_that_may_do_nothing_else(running: Running) -> None:
    answer = httpx2.get(running.url + "/")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "no-referrer"
    page = answer.text
    assert not re.search(r"https?:|//[a-z]|\b(src|href|srcset|action)\s*=|@import|url\(|innerHTML|\bon[a-z]+=", page)
    rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    for kind, element in (("script-src", "script"), ("style-src", "style")):
        (content,) = re.findall(f"<{element}[^>]*>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules.pop(kind) == f"'sha256-{digest}'"
    assert rules.pop("connect-src") == "'self'"
    assert rules.pop("require-trusted-types-for") == "'script'"
    assert set(rules) >= {"default-src", "frame-ancestors", "base-uri", "form-action"}
    assert set(rules.values()) == {"'none'"}


def test_the_wheel_holds_it(running: Running, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    built = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as held:
        assert held.read("bayou/serving/page.html").decode() == httpx2.get(running.url + "/").text


# ------------------------------------------------------------------------------------------------ what a person sees


def test_it_lists_the_models(browser: Browser, running: Running, made: tuple) -> None:
    names = [model["id"] for model in httpx2.get(f"{running.url}/v1/models").json()["data"]]
    assert browser.run("[...document.querySelectorAll('#models .name')].map(e => e.textContent)") == names
    described = browser.run("[...document.querySelectorAll('#models .facts')].map(e => [e.title, e.textContent])")
    facts = dict(zip(names, described, strict=True))
    weights = (made[0] / "model.safetensors").stat().st_size
    assert facts["base"][0] == f"{weights:,} bytes" and facts["base"][1].endswith("the base")
    held = made[1]["lowrank"].stat().st_size
    assert (
        facts["lowrank"][0] == f"{held:,} bytes" and f"{100 * held / weights:.2g} % of the base" in facts["lowrank"][1]
    )
    assert re.search(r"relative error of the delta 0\.\d+, at most 0\.\d+", facts["lowrank"][1])
    browser.click("#filter")
    browser.type("LOW")
    assert browser.text("#models").splitlines()[0] == "lowrank" and "dense" not in browser.text("#models")


def test_two_answers_stream_side_by_side_and_are_the_apis_own(browser: Browser, running: Running, slow: None) -> None:
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 40}
    prompts = ("hello", "one", "two", "three", "select", "what is", "if", "a b c", "xyz", "0 1 2")
    for prompt in prompts:  # random models end when they like; a text that keeps both going for long
        wanted = {name: own(running, name, prompt=prompt, **asked) for name in ("dense", "lowrank")}
        if all(answer["usage"]["completion_tokens"] == 40 for answer in wanted.values()):
            break
    else:
        pytest.fail(f"no prompt of {prompts} has two long answers")
    pick(browser, "dense", "lowrank")
    assert browser.text("#picked").startswith("2 picked")
    fill(browser, prompt, **asked)
    browser.run(
        """(() => { window.turns = []; new MutationObserver((changes) => { for (const change of changes) {
        const text = change.target.closest?.(".text"); if (text && text.textContent)
        window.turns.push(text.closest(".column").dataset.model); } }).observe(
        document.querySelector("#answers"), { subtree: true, childList: true }); })()"""
    )
    browser.click("#ask")
    over(browser)
    assert browser.text("#status") == "2 of 2 answers are whole."
    for name, answer in wanted.items():
        assert said(browser, name) == answer["choices"][0]["text"]
        assert browser.text(part(name, ".end")) == "Ended at the limit of tokens."
        size = next(m["bytes"] for m in httpx2.get(f"{running.url}/v1/models").json()["data"] if m["id"] == name)
        assert browser.run(f"document.querySelector({json.dumps(part(name, '.bytes'))}).title") == f"{size:,} bytes"
        assert browser.text(part(name, ".tokens")) == "40"
        assert re.fullmatch(r"\d+\.\d\d s", browser.text(part(name, ".first")))
        # both share steps of 0.04 s at least; a browser with other work to do hears of some together
        assert 0.1 < float(browser.text(part(name, ".rate"))) < 100
        assert browser.run(f"document.querySelector({json.dumps(part(name, '.text'))}).ariaBusy") == "false"
    turns = browser.run("window.turns")
    changes = sum(a != b for a, b in zip(turns, turns[1:], strict=False))
    assert changes > 10, f"one after the other: {turns}"
    left, right = (browser.run(f"document.querySelector({json.dumps(part(n, ''))}).offsetLeft") for n in wanted)
    assert left < right, "not side by side"
    paths = {request.removeprefix(running.url) for request in browser.requests}
    assert paths == {"/", "/v1/models", "/v1/completions"} and browser.complaints == []


def test_a_chat_with_a_system_prompt_and_a_seed(browser: Browser, running: Running) -> None:
    turns = [{"role": "system", "content": "brief"}, {"role": "user", "content": "hi"}]
    chosen: dict[str, Any] = {"temperature": 1.5, "seed": 7, "max_tokens": 12}
    talked = own(running, "gain", messages=turns, **chosen)["choices"][0]["message"]["content"]
    told = own(running, "base", prompt="brief\n\nhi", **chosen)["choices"][0]["text"]
    pick(browser, "base", "gain")
    fill(browser, "hi", system="brief", **chosen)
    browser.click("#prompt")
    browser.key("Enter", control=True)
    over(browser)
    assert (said(browser, "gain"), said(browser, "base")) == (talked, told)


def test_an_error_stands_in_its_own_column(browser: Browser, running: Running) -> None:
    wanted = own(running, "exact", prompt="hello", temperature=0, max_tokens=8)["choices"][0]["text"]
    pick(browser, "exact", "second")
    httpx2.post(f"{running.url}/v1/unload_lora_adapter", json={"lora_name": "second"})
    try:
        fill(browser, "hello", temperature=0, max_tokens=8)
        browser.click("#ask")
        over(browser)
        assert browser.text("#status") == "1 of 2 answers are whole."
        assert "the model 'second' does not exist" in browser.text(part("second", ".end.wrong"))
        assert said(browser, "exact") == wanted
        browser.click("#access summary")
        browser.click("#reload")
        browser.wait("!document.querySelector(\"#models input[value='second']\")")
        assert browser.text("#picked").startswith("1 picked")
    finally:
        loaded = {"lora_name": "second", "lora_path": "second"}
        assert httpx2.post(f"{running.url}/v1/load_lora_adapter", json=loaded).status_code == 200


def test_stop_lets_the_server_go(browser: Browser, running: Running, slow: None) -> None:
    pick(browser, "dense", "gain", "lowrank")
    fill(browser, "hello", temperature=3, max_tokens=200, seed=1)
    browser.click("#ask")
    browser.wait("[...document.querySelectorAll('.text')].filter(e => e.textContent).length === 3")
    assert browser.run("document.activeElement.id") == "stop", "the keyboard has lost its place"
    browser.click("#stop")
    over(browser)
    ends = browser.run("[...document.querySelectorAll('.end')].map(e => e.textContent)")
    assert "Stopped." in ends and set(ends) <= {"Stopped.", "Complete."}
    assert browser.run("document.activeElement.id") == "ask"
    quiet(running)


def test_what_models_say_stays_text(browser: Browser) -> None:
    """From a server that sends markup, and its bytes one at a time: characters and events come in pieces."""
    hostile = '<img src=x onerror="window.caught = 1"><script>window.caught = 1</script> é 漢 🙂 &amp;\n\nend '
    events = [{"choices": [{"text": hostile, "finish_reason": "stop"}]}]
    events += [{"choices": [], "usage": {"completion_tokens": 9}}]
    sent = "".join(f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events) + "data: [DONE]\n\n"
    browser.run(
        f"""(() => {{ window.fetch = async () => new Response(new ReadableStream({{ start(stream) {{
        for (const byte of new TextEncoder().encode({json.dumps(sent)})) stream.enqueue(new Uint8Array([byte]));
        stream.close(); }} }})); }})()"""
    )
    pick(browser, "dense", "exact")
    fill(browser, "hello")
    browser.click("#ask")
    over(browser)
    for name in ("dense", "exact"):
        assert said(browser, name) == hostile and browser.text(part(name, ".tokens")) == "9"
    assert browser.run("document.querySelectorAll('.text *').length") == 0
    assert browser.run("window.caught === undefined")
    with pytest.raises(AssertionError, match="TrustedHTML"):  # nor could a mistake in the script make it any
        browser.run("document.body.innerHTML = '<b>x</b>'")


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ('data: {"choices":[{"text":"so far"}]}\n\ndata: {"error":{"message":"it broke"}}\n\n', "it broke"),
        ('data: {"choices":[{"text":"so far"}]}\n\n', "the connection ended before the answer did"),
    ],
)
def test_a_stream_that_breaks_says_so(browser: Browser, sent: str, shown: str) -> None:
    browser.run(f"(() => {{ window.fetch = async () => new Response({json.dumps(sent)}); }})()")
    pick(browser, "dense", "exact")
    fill(browser, "hello")
    browser.click("#ask")
    over(browser)
    assert browser.text("#status") == "0 of 2 answers are whole."
    assert browser.text(part("dense", ".end.wrong")) == shown and said(browser, "dense") == "so far"


def test_six_at_most(browser: Browser) -> None:
    names = ("base", "bitdelta", "deltacome", "dense", "exact", "gain")
    pick(browser, *names)
    assert browser.run("document.querySelectorAll('#models input:disabled').length") == 3
    pick(browser, "lowrank")
    assert browser.run("[...document.querySelectorAll('#models input:checked')].map(e => e.value)") == list(names)
    pick(browser, "gain")
    assert browser.run("document.querySelectorAll('#models input:disabled').length") == 0


def test_with_the_keyboard_alone(browser: Browser) -> None:
    def to(condition: str) -> None:
        for _ in range(40):
            browser.key("Tab")
            if browser.run(f"document.activeElement.matches({json.dumps(condition)})"):
                return
        pytest.fail(f"Tab does not lead to {condition}")

    for name in ("dense", "exact"):
        to(f"input[value='{name}']")
        browser.key(" ")
    to("#prompt")
    browser.type("hello")
    to("#ask")
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.key("Enter")
    over(browser)
    assert browser.text("#status") == "2 of 2 answers are whole."


def test_on_a_phone_and_in_the_dark(browser: Browser) -> None:
    light = browser.run("getComputedStyle(document.body).backgroundColor")
    browser.shape(360, 740, dark=True)
    assert browser.run("getComputedStyle(document.body).backgroundColor") != light
    pick(browser, "dense", "exact")
    fill(browser, "hello " * 20, max_tokens=60)
    browser.click("#ask")
    over(browser)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    places = browser.run("[...document.querySelectorAll('.column')].map(e => [e.offsetLeft, e.offsetWidth])")
    assert places[0] == places[1] and places[0][1] > 300, "one under the other"


def test_the_key_is_asked_for_and_kept_nowhere(chromium: Browser, made: tuple, tmp_path: Path) -> None:
    shutil.copy(made[1]["dense"], tmp_path)
    guarded = Running(made[0], tmp_path, Settings(batch=4), key="secret")
    try:
        chromium.shape(1200, 900)
        chromium.go(guarded.url + "/")
        chromium.wait("!document.querySelector('#trouble').hidden")
        assert chromium.text("#trouble") == "the API key is missing or wrong"
        assert (
            chromium.run("document.querySelector('#access').open && document.querySelector('#key').type") == "password"
        )
        chromium.click("#key")
        chromium.type("secret")
        chromium.key("Enter")
        chromium.wait("document.querySelectorAll('#models li').length === 2")
        assert chromium.run("document.querySelector('#trouble').hidden")
        pick(chromium, "base", "dense")
        fill(chromium, "hello", max_tokens=4)
        chromium.click("#ask")
        over(chromium)
        assert chromium.text("#status") == "2 of 2 answers are whole."
        kept = "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href, history.state])"
        assert "secret" not in chromium.run(kept) and not any("secret" in url for url in chromium.requests)
    finally:
        guarded.end()
