"""What vLLM is told of a name with BAYOU_MODE=packed, over a stand-in of vLLM; test_vllm.py has the other mode."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import inside_vllm
import pico
import plugged
import pytest
import torch
from inside_vllm import PROMPTS, Request, Served, right

import bayou
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput, Unsupported
from bayou.integrations import vllm as plugin
from bayou.integrations.vllm import Settings, Shelf
from bayou.integrations.vllm.worker import Manager, named
from bayou.sharing.layouts import Dial


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("plain")
    inside_vllm.tenants(found, 2)
    return found


@pytest.fixture(autouse=True)
def inside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    return inside_vllm.put(monkeypatch, tmp_path / "cache")


def test_settings(plain: Path) -> None:
    told = {"BAYOU_MODE": "packed", "BAYOU_DELTAS": str(plain), "BAYOU_DELTA_MEMORY": "2MB"}
    assert Settings.read(told) == Settings(plain.resolve(), 512, None, True, 2_000_000)
    assert Settings.read(told | {"BAYOU_MODE": "lora"}) == Settings(plain.resolve(), 512, None, False, 2_000_000)
    for change, message in (
        ({"BAYOU_MODE": "packd"}, "BAYOU_MODE=packd: choose lora or packed"),
        ({"BAYOU_DELTAS": ""}, "BAYOU_MODE=packed needs BAYOU_DELTAS"),
        ({"BAYOU_DELTA_MEMORY": "much"}, "'much' is not a size"),
    ):
        with pytest.raises(BadInput, match=message):
            Settings.read(told | change)
    (plain / "empty").mkdir()
    assert Settings(plain / "empty", 512, None, True).room(torch.float32) is None


def test_a_name_becomes_a_verified_file(plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vllm")
    for name in ("t0", "t1"):
        shutil.copy(plain / f"{name}.bayou", tmp_path)
    plugged.flip(tmp_path / "t1.bayou", 3000)
    shelf = Shelf(Settings(tmp_path, 16, None, True))
    found, damaged, nothing = plugged.ask(shelf, plain / "base", "t0", "t1", "t2")
    root = DeltaFile(tmp_path / "t0.bayou").root
    assert found.lora_path == named(tmp_path / "t0.bayou", root) and damaged is None and nothing is None
    said = f"bayou: t0: all of the file {root[:12]} is served, norms, embeddings and head too"
    assert said in [record.getMessage() for record in caplog.records] and "bayou: t1 is refused: " in caplog.text
    assert not (tmp_path / "cache" / "adapters").exists(), "no adapter is written"
    served = Served(plain / "base")
    right(plain, ["t0"], served.step([(Request("t0", 1, found.lora_path), PROMPTS[0])]))


def test_what_stays_the_base_s_is_said(plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vllm")
    tuned = pico.perturb(plain / "base", tmp_path / "tuned", scale=0.3)
    (tuned / "chat_template.jinja").write_text("{{ messages }}")
    config = json.loads((tuned / "generation_config.json").read_text())
    (tuned / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    bayou.compress(
        plain / "base", tuned, tmp_path / "own.bayou", method="bitdelta", calibration="none", distill_steps=0
    )
    (found,) = plugged.ask(Shelf(Settings(tmp_path, 16, None, True)), plain / "base", "own")
    assert found is not None
    assert "too; the base's chat_template.jinja, generation_config.json stay in force" in caplog.text


def test_another_computation_and_a_whole_model_are_refused(plain: Path, tmp_path: Path) -> None:
    tuned = pico.perturb(plain / "base", tmp_path / "tuned")
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    bayou.compress(
        plain / "base", tuned, tmp_path / "eps.bayou", method="bitdelta", calibration="none", distill_steps=0
    )
    model = pico.pico("llama_gqa", tmp_path / "model", num_hidden_layers=4)
    dial = Dial(layout="sequential", count=1, rank=4, keep_ends=1)
    bayou.share(model, tmp_path / "small.bayou", dial=dial, calibration="none")
    shelf = Shelf(Settings(tmp_path, 16, None, True))
    for name, message in (("eps", "differs from the base's in rms_norm_eps"), ("small", "a whole model of its own")):
        with pytest.raises(Unsupported, match=message):
            shelf.packed(plain / "base", name)


def test_registering(inside: Any, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAYOU_DELTAS", str(plain))
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    plugin.register()
    assert inside.LRUCacheWorkerLoRAManager is object
    sys.modules["vllm.lora.resolver"].LoRAResolverRegistry.resolvers.clear()
    monkeypatch.setenv("BAYOU_MODE", "packed")
    plugin.register()
    assert inside.LRUCacheWorkerLoRAManager is Manager
