"""Plans by measured loss: under a budget of bytes, with anchors further away; a file's size before it is made."""

import shutil
from pathlib import Path
from typing import Any

import pico
import pytest
from safetensors.torch import save_file
from test_share import FEW, agree, tie

from bayou import share as share_function
from bayou.cli import main
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput, TooSmall
from bayou.sharing import Shared, sharedfile
from bayou.sharing.draft import draw_up
from bayou.sharing.layouts import Dial
from bayou.sharing.original import Original
from bayou.sharing.recover import Training
from bayou.sharing.sharedfile import write

UP = "model.layers.{}.mlp.up_proj.weight"
STORED: list[dict[str, Any]] = [
    {},
    {"delta_method": "lowrank", "delta_options": {"bits": 8}},
    {"delta_method": "deltacome"},
    {"delta_method": "bitdelta"},
    {"anchor_bits": 4},
    {"anchor_bits": 4, "quantise": "linears", "delta_method": "deltacome"},
    {"anchor_bits": 3, "quantise": "all"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.pico("llama_gqa", tmp_path_factory.mktemp("search") / "model", num_hidden_layers=6)


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_the_size_of_a_file_is_known_before_it_is_made(stored: dict[str, Any], model: Path, tmp_path: Path) -> None:
    original = Original(model)
    drawn = draw_up(model, dial=Dial(kinds="all", blocks=(3,), rank=5), **FEW).shared.ties
    block = ("model.layers.4.mlp", "model.layers.4.self_attn")
    plans = [Shared(()), Shared(drawn), Shared(drawn, ("model.layers.1.mlp",)), Shared(drawn, block)]
    plans.append(Shared((tie(UP.format(2), None, rank=0), tie(UP.format(4), UP.format(3), 0.1, rank=0))))
    for number, plan in enumerate(plans):
        made = write(original, plan, tmp_path / str(number), **stored)
        assert sharedfile.nbytes(original, plan, **stored) == made.bytes


def test_a_plan_fits_into_a_budget_of_bytes(model: Path, tmp_path: Path) -> None:
    whole = write(model, Shared(()), tmp_path / "whole").bytes
    for stored in ({}, {"anchor_bits": 8, "delta_method": "deltacome"}):
        budget = int(0.85 * whole)
        dial = Dial(kinds="all", budget=budget)
        made = share_function(model, tmp_path / "a.bayou", plan="search", dial=dial, **stored, **FEW)
        assert 0.85 * budget < made.bytes <= budget and made.bytes == (tmp_path / "a.bayou").stat().st_size
        agree(model, tmp_path / "a.bayou", tmp_path / f"out{len(stored)}", 2e-2 if stored else 1e-4)


def test_training_does_not_break_the_budget(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog.\n\n" * 50)
    budget = int(0.9 * write(model, Shared(()), tmp_path / "whole").bytes)
    training = Training(tmp_path / "a.txt", tokens=512, batch=4, length=32)
    made = share_function(
        model, tmp_path / "a.bayou", plan="search", dial=Dial(rank=4, budget=budget), training=training, **FEW
    )
    assert made.bytes <= budget and made.ties


def test_anchors_further_away_are_tried(model: Path, tmp_path: Path) -> None:
    """Layer 3's MLP is 1.5 times layer 1's, and nothing like layer 2's."""
    own = Original(model).checkpoint
    values = {name: own.read(name) for name in own.names()}
    for name in Original(model).sublayers[3, "mlp"].tensors():
        values[name] = values[name.replace(".3.", ".1.")] * 1.5
    alike = shutil.copytree(model, tmp_path / "alike")
    save_file(values, alike / "model.safetensors", {"format": "pt"})

    def anchors(near: int) -> dict[tuple[str, str | None], float]:
        dial = Dial(reduce=0.05, rank=1, near=near, keep_ends=1)
        made = draw_up(alike, plan="search", dial=dial, **FEW).shared
        return {(t.tensor, t.reference): t.gain for t in made.ties}

    assert all(anchor is None or int(anchor[13]) == int(own[13]) - 1 for own, anchor in anchors(1))
    assert anchors(2)[UP.format(3), UP.format(1)] == pytest.approx(1.5, abs=0.02)


def test_what_a_search_cannot_do_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = sharedfile.nbytes(Original(model), Shared(()))
    refused: list[tuple[dict[str, Any], str]] = [
        ({"dial": Dial(budget=10, reduce=0.1)}, "not both"),
        ({"dial": Dial(near=0)}, "--near 0"),
        ({"dial": Dial(budget=whole)}, f"--budget {whole:,}: the file has {whole:,} bytes with nothing shared"),
        ({"dial": Dial(budget=10**6, count=1)}, "leave out --layout, --count"),
    ]
    for options, message in refused:
        with pytest.raises(BadInput, match=message):
            share_function(model, tmp_path / "a.bayou", plan="search", **options, **FEW)
    for dial in (Dial(budget=10**6), Dial(near=2)):
        with pytest.raises(BadInput, match="are for --plan search"):
            share_function(model, tmp_path / "a.bayou", dial=dial, **FEW)
    with pytest.raises(BadInput, match="--method laco takes --reduce"):
        share_function(model, tmp_path / "a.bayou", method="laco", dial=Dial(budget=10**6), **FEW)
    with pytest.raises(TooSmall, match=r"no plan makes a file of 2,000 bytes; the last one had [\d,]+") as small:
        share_function(model, tmp_path / "a.bayou", plan="search", dial=Dial(budget=2_000), **FEW)
    assert 2_000 < small.value.least < whole
    words = ["share", str(model), "-o", str(tmp_path / "a.bayou"), "--plan", "search", "--calibration-tokens", "2048"]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--length", "64", "--budget", "2KB", "--near", "2"])
    assert stop.value.code == 1 and "no plan makes a file of 2,000 bytes" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*words, "--length", "64", "--budget", str(small.value.least), "--near", "2"])
    assert stop.value.code == 0 and DeltaFile(tmp_path / "a.bayou").nbytes <= small.value.least
