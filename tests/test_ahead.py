"""ahead.py: what a turn wants is there, read once; what it does not want is let go; errors come with the turn."""

import threading
from pathlib import Path
from typing import Any

import pico
import pytest
import torch

from bayou.ahead import Ahead
from bayou.checkpoint import Checkpoint
from bayou.errors import BadFile


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.pico("llama_gqa", tmp_path_factory.mktemp("ahead") / "model")


class Counting(Checkpoint):
    """Remembers what was read whole, and by which thread."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reads: list[tuple[str, str]] = []

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        self.reads.append((name, threading.current_thread().name))
        return super().read(name, start, stop)


def test_a_turn_holds_what_it_wants_and_the_next_is_on_its_way(model: Path) -> None:
    checkpoint = Counting(model)
    first, second, third = checkpoint.names()[:3]
    turns = [[(checkpoint, first), (checkpoint, second)], [(checkpoint, second)], [(checkpoint, third)]]
    with Ahead(turns, "cpu") as ahead:
        view = ahead.view(checkpoint)
        ahead.turn(0)
        assert set(ahead.held) == {(id(checkpoint), first), (id(checkpoint), second)}
        assert torch.equal(view.read(first), Checkpoint(model).read(first))
        assert torch.equal(view.read(first, 1, 3), Checkpoint(model).read(first, 1, 3))
        ahead.turn(1)
        assert set(ahead.held) == {(id(checkpoint), second)}
        ahead.turn(2)
        assert set(ahead.held) == {(id(checkpoint), third)}
    assert sorted(name for name, _ in checkpoint.reads) == sorted([first, second, third])
    assert all(thread.startswith("ahead") for _, thread in checkpoint.reads)
    assert not ahead.held


def test_what_is_not_held_is_read_from_the_checkpoint(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Counting(model)
    name = checkpoint.names()[0]
    monkeypatch.setattr("bayou.ahead._MOST", checkpoint.tensor_nbytes(name) - 1)
    with Ahead([[(checkpoint, name)]], "cpu") as ahead:
        ahead.turn(0)
        assert not ahead.held
        assert torch.equal(ahead.view(checkpoint).read(name, 0, 2), Checkpoint(model).read(name, 0, 2))


def test_turns_that_are_skipped_leave_nothing_behind(model: Path) -> None:
    checkpoint = Counting(model)
    with Ahead([[(checkpoint, name)] for name in checkpoint.names()[:6]], "cpu") as ahead:
        for index in (0, 3, 5):
            ahead.turn(index)
            assert len(ahead.held) == 1 and set(ahead._coming) <= {index + 1}


def test_an_error_comes_with_the_turn_that_wanted_the_tensor(model: Path) -> None:
    class Broken(Counting):
        def read(self, name: str, start: int = 0, stop: int | None = None) -> Any:
            if name == broken:
                raise BadFile("gone")
            return super().read(name, start, stop)

    checkpoint = Broken(model)
    sound, broken = checkpoint.names()[:2]
    with Ahead([[(checkpoint, sound)], [(checkpoint, broken)]], "cpu") as ahead:
        ahead.turn(0)
        with pytest.raises(BadFile, match="gone"):
            ahead.turn(1)
