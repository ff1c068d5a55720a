"""A small comparison that several tests look at: models and texts, and what `compare` made of them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import perturb, pico

from bayou.comparison.rows import compare

LETTERS = torch.randint(97, 123, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
WORDS = re.sub("[qxz]", " ", "".join(map(chr, LETTERS)))
HELD = "".join(f"{WORDS[i : i + 60]}\n" for i in range(0, 600, 60))
TRAIN = "".join(f"{WORDS[i : i + 60]}\n\n" for i in range(600, 4000, 60))
OPTIONS: dict[str, Any] = {
    "names": ["bitdelta", "deltacome", "lowrank"],
    "ratios": [4, 1000],
    "tokens": 2000,
    "length": 64,
    "distill_steps": 1,
}
ABSENT = {"seconds", "steps", "shared"}  # what two equal runs may differ in


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, tuned, held.txt and train.txt."""
    folder = tmp_path_factory.mktemp("models")
    pico("llama_gqa", folder / "base", hidden_size=128, intermediate_size=192)
    perturb(folder / "base", folder / "tuned", scale=0.3)
    (folder / "held.txt").write_text(HELD)
    (folder / "train.txt").write_text(TRAIN)
    return folder


def run(models: Path, out: Path, **options: Any) -> dict[str, Any]:
    given = {"data": models / "held.txt", "calibration": models / "train.txt"} | OPTIONS | options
    return compare(models / "base", models / "tuned", out, **given)


@pytest.fixture(scope="module")
def done(models: Path) -> tuple[Path, dict[str, Any]]:
    """A finished comparison: its folder and what it returned."""
    return models / "done", run(models, models / "done")


def row_of(found: dict[str, Any], method: str, asked: float = 4) -> dict[str, Any]:
    (row,) = (row for row in found["candidates"] if (row["method"], row["asked"]) == (method, asked))
    return row


def plain(value: Any) -> Any:
    """Without what a clock says."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in ABSENT}
    return [plain(item) for item in value] if isinstance(value, list) else value
