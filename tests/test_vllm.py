"""The plugin for vLLM: its settings, and that an adapter is what the file says.

Where vLLM is installed (`make test-vllm`) these tests run against its own interface, else against a stand-in of what it
documents; test_vllm_server.py starts it.
"""

import asyncio
import importlib
import json
import logging
import os
import threading
import tomllib
from pathlib import Path
from typing import Any

import pico
import plugged
import pytest
import torch
from plugged import ask, flip
from safetensors.torch import load_file

import bayou
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput
from bayou.integrations import vllm as plugin
from bayou.integrations.vllm import Settings, Shelf

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own, where it is installed
CHECKOUT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def interface(monkeypatch: pytest.MonkeyPatch) -> Any:
    return plugged.interface(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plugged.make(tmp_path_factory.mktemp("vllm"))


@pytest.fixture
def shelf(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    return plugged.copied(folder, tmp_path, monkeypatch)


# ------------------------------------------------------------------------------------------------- settings


def test_settings() -> None:
    assert Settings.read({}) is None and Settings.read({"BAYOU_DELTAS": ""}) is None
    here = str(Path(__file__).parent)
    assert Settings.read({"BAYOU_DELTAS": here}) == Settings(Path(here), 512, None)
    told = {"BAYOU_DELTAS": here, "BAYOU_MAX_RANK": "64", "BAYOU_BASE_REVISION": "v2"}
    assert Settings.read(told) == Settings(Path(here), 64, "v2")
    with pytest.raises(BadInput, match=r"BAYOU_DELTAS=.*none is not a folder"):
        Settings.read({"BAYOU_DELTAS": here + "/none"})
    for word in ("1", "24", "1024", "-8", "x", "8.0", "٨"):
        with pytest.raises(BadInput, match=f"BAYOU_MAX_RANK={word}: choose 8, 16, 32, 64, 128, 256, 320, 512"):
            Settings.read({"BAYOU_DELTAS": here, "BAYOU_MAX_RANK": word})


def test_the_entry_point_is_that_function() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["bayou"].partition(":")
    assert getattr(importlib.import_module(module), name) is plugin.register


def test_registering(
    interface: Any, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = interface.LoRAResolverRegistry
    for name in ("BAYOU_DELTAS", "BAYOU_MAX_RANK", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        monkeypatch.delenv(name, raising=False)
    plugin.register()
    assert not registry.get_supported_resolvers(), "nothing is asked for"
    monkeypatch.setenv("BAYOU_DELTAS", str(shelf.settings.deltas))
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    platform = importlib.import_module("vllm.platforms").current_platform
    monkeypatch.setattr(platform, "is_cpu", lambda: False)
    plugin.register()
    first = registry.get_resolver("bayou")
    assert isinstance(first, interface.LoRAResolver) and not caplog.records
    plugin.register()
    assert registry.get_resolver("bayou") is first, "vLLM may call it several times"
    registry.resolvers.clear()
    monkeypatch.delenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING")
    plugin.register()
    assert "unless VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 is set" in caplog.text and "on CPUs" not in caplog.text
    registry.resolvers.clear()
    monkeypatch.setattr(platform, "is_cpu", lambda: True)
    plugin.register()
    assert "on CPUs vLLM may add the adapter of its last slot" in caplog.text
    registry.resolvers.clear()
    monkeypatch.setenv("BAYOU_MAX_RANK", "100")
    with pytest.raises(BadInput, match="BAYOU_MAX_RANK=100"):
        plugin.register()


# ------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize(("name", "rank"), [("sql", 16), ("signs", 16), ("signs", 8), ("sql", 512)])
def test_the_adapter_is_the_best_of_the_file_s_delta(folder: Path, shelf: Shelf, name: str, rank: int) -> None:
    found = Shelf(Settings(shelf.settings.deltas, rank, None)).adapter(folder / "base", name)
    assert found is not None
    tensors, opened = load_file(found.folder / "adapter_model.safetensors"), DeltaFile(shelf.find(name) or "")
    config = json.loads((found.folder / "adapter_config.json").read_text())
    own = max(len(a) for key, a in tensors.items() if "lora_A" in key)
    assert config["r"] == own == found.report["rank"] <= rank and (rank == 512 or own == rank)
    for site in opened.sites:
        if "proj" not in site:
            continue
        a, b = (tensors[f"base_model.model.{site.removesuffix('weight')}lora_{end}.weight"].double() for end in "AB")
        u, s, v = torch.linalg.svd(opened.delta(site).materialize().double(), full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert (b @ a - best).norm() < 2e-3 * best.norm(), site
    assert found.report["kinds"]["linear"]["energy"] <= 1
    assert found.folder.name == f"{opened.root}-{rank}"


def test_the_line_says_what_is_left_out(folder: Path, shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (request,) = ask(shelf, folder / "base", "sql")
    lines = [record.getMessage() for record in caplog.records if record.name == "vllm.bayou"]
    report = bayou.export(folder / "base", folder / "deltas" / "sql.bayou", shelf.settings.deltas / "out", rank=16)
    linear = report["kinds"]["linear"]["energy"]
    assert lines == [
        f"bayou: sql: LoRA of rank 16 (--max-lora-rank 16 at least) of the file {Path(request.lora_path).name[:12]}; "
        f"{100 * report['energy']:.2f} % of its delta's energy is served, {100 * linear:.2f} % of the linears'; "
        "left out: 1 head, 1 embedding, 5 norm"
    ]
    assert 0.1 < report["energy"] < linear < 0.999


def test_a_tokenizer_and_a_config_of_its_own_and_new_tokens_are_said_to_be_missing(folder: Path, shelf: Shelf) -> None:
    tuned = pico.perturb(folder / "base", shelf.settings.deltas.parent / "grown", scale=0.3, grow_vocab=3)
    (tuned / "chat_template.jinja").write_text("{{ messages }}")
    config = json.loads((tuned / "generation_config.json").read_text())
    (tuned / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    bayou.compress(folder / "base", tuned, shelf.settings.deltas / "grown.bayou", ratio=3, calibration="none")
    found = shelf.adapter(folder / "base", "grown")
    assert found is not None and "3 tokens that the fine-tune added are lost" in found.line()
    assert "where the fine-tune has others: generation_config.json eos_token_id" in found.line()
    assert found.line().endswith("the base's chat_template.jinja stay in force")
    assert not (found.folder / "config.json").exists()


def test_a_request_is_what_vllm_wants_and_its_path_is_the_content_s(folder: Path, shelf: Shelf) -> None:
    first, signs = ask(shelf, folder / "base", "sql", "signs")
    again, none = ask(shelf, folder / "base", "sql", "nothing")
    assert none is None and (first.lora_name, signs.lora_name) == ("sql", "signs")
    assert (again.lora_int_id, again.lora_path) == (first.lora_int_id, first.lora_path)
    assert len({first.lora_int_id, signs.lora_int_id}) == 2 and 0 < first.lora_int_id < 2**63
    (shelf.settings.deltas / "sql.bayou").write_bytes((folder / "deltas" / "signs.bayou").read_bytes())
    (other,) = ask(shelf, folder / "base", "sql")
    assert other.lora_path == signs.lora_path and other.lora_int_id not in (first.lora_int_id, signs.lora_int_id)


def test_an_adapter_is_written_once_and_used_while_it_is_whole(
    folder: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = shelf.adapter(folder / "base", "sql")
    assert first is not None
    weights = first.folder / "adapter_model.safetensors"
    content, written = weights.read_bytes(), weights.stat().st_mtime_ns
    fresh = Shelf(shelf.settings).adapter(folder / "base", "sql")
    assert fresh == first and weights.stat().st_mtime_ns == written and not caplog.records
    for spoil in (
        lambda: flip(weights, len(content) - 1),
        weights.unlink,
        (first.folder / "adapter_config.json").unlink,
    ):
        caplog.clear()
        spoil()
        assert Shelf(shelf.settings).adapter(folder / "base", "sql") == first
        assert weights.read_bytes() == content and "writing it again" in caplog.text
    (first.folder / "bayou.json").write_text("[")
    assert Shelf(shelf.settings).adapter(folder / "base", "sql") == first
    monkeypatch.setattr(plugin, "__version__", "0.0.9")
    caplog.clear()
    assert Shelf(shelf.settings).adapter(folder / "base", "sql") == first and "not what this version has" in caplog.text
    assert [path.name for path in first.folder.parent.iterdir()] == [first.folder.name], "something was left behind"


def test_many_who_ask_at_once_get_one_adapter(folder: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    written, expand = [], Shelf._expand

    def counted(self: Shelf, *given: Any) -> Any:
        written.append(threading.current_thread().name)
        return expand(self, *given)

    monkeypatch.setattr(Shelf, "_expand", counted)
    found = ask(shelf, folder / "base", *["sql"] * 5, "signs")
    assert len({request.lora_path for request in found}) == 2
    assert len(written) == 2 and all(name.startswith("bayou") for name in written), "not in vLLM's own thread"


def test_two_processes_that_write_at_once_leave_one_whole_adapter(folder: Path, shelf: Shelf) -> None:
    alone = shelf.adapter(folder / "base", "sql")
    assert alone is not None
    content = {path.name: path.read_bytes() for path in alone.folder.iterdir()}
    for path in alone.folder.iterdir():
        path.unlink()
    alone.folder.rmdir()
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            code = 2
            try:
                code = int(Shelf(shelf.settings).adapter(folder / "base", "sql") != alone)
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert {path.name: path.read_bytes() for path in alone.folder.iterdir()} == content


def test_where_another_process_was_first_its_adapter_is_taken(
    folder: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bayou.integrations import export as module

    real, first = module.export, []

    def late(*given: Any, **options: Any) -> Any:
        if not first:
            first.append(None)
            first.append(Shelf(shelf.settings).adapter(folder / "base", "sql"))
            raise OSError(39, "Directory not empty")
        return real(*given, **options)

    monkeypatch.setattr(module, "export", late)
    assert shelf.adapter(folder / "base", "sql") == first[1] is not None


def test_other_requests_go_on_while_a_file_is_read(folder: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, adapter = threading.Event(), Shelf.adapter
    monkeypatch.setattr(Shelf, "adapter", lambda *given: gate.wait(30) and adapter(*given))
    resolver = plugin.resolver(shelf.settings)

    async def both() -> Any:
        slow = asyncio.create_task(resolver.resolve_lora(str(folder / "base"), "sql"))
        await asyncio.sleep(0)
        assert await resolver.resolve_lora(str(folder / "base"), "nothing") is None and not slow.done()
        gate.set()
        return await slow

    assert asyncio.run(both()).lora_name == "sql"
