"""OUT.journal/: what is done survives a kill and only a kill, belongs to one key, and is one process's at a time."""

import errno
import multiprocessing
import os
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from bayou.checkpoint import atomic
from bayou.errors import BadInput, BayouError, JournalMismatch
from bayou.journal import Journal


class Killed(BaseException):
    """Stands for whatever stops a process between two lines."""


def half_done(out: Path, key: str, sites: dict[int, bytes], error: type[BaseException] = Killed) -> None:
    """A journal as a run leaves it that `error` ended after these sites."""
    with pytest.raises(error), Journal(out, key) as journal:
        for index, blob in sites.items():
            journal.put(index, blob, index / 3)
        raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [Killed, KeyboardInterrupt, MemoryError, RuntimeError])
def test_what_is_done_survives_a_stop(tmp_path: Path, error: type[BaseException]) -> None:
    half_done(tmp_path / "o.bayou", "k", {0: b"", 7: bytes(range(256))}, error)
    with Journal(tmp_path / "o.bayou", "k") as journal:
        assert journal.get(0) == (b"", 0.0)
        assert journal.get(7) == (bytes(range(256)), 7 / 3)
        assert journal.get(1) is None
        journal.finish()
    assert names(tmp_path) == []


def test_an_error_of_the_input_leaves_nothing(tmp_path: Path) -> None:
    """Another run would meet the same error, so there is nothing to go on with."""
    half_done(tmp_path / "o.bayou", "k", {0: b"x"}, BadInput)
    assert names(tmp_path) == []


@pytest.mark.parametrize("step", ["key", "site", "output"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def run() -> None:
        if step == "key":
            monkeypatch.setattr(Path, "write_bytes", full)
        with Journal(tmp_path / "o.bayou", "k") as journal:
            journal.put(0, b"x", 0.0)
            if step == "site":
                monkeypatch.setattr(Path, "write_bytes", full)
                journal.put(1, b"x", 0.0)
            with atomic(tmp_path / "o.bayou") as file:
                file.write(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(BayouError, match="no space left to write .*o.bayou; nothing was left behind"):
        run()
    assert names(tmp_path) == []


def test_another_key_is_refused_and_nothing_lost(tmp_path: Path) -> None:
    half_done(tmp_path / "o.bayou", "k", {0: b"x"})
    with pytest.raises(JournalMismatch, match="o.bayou.journal holds a half-finished compression of other models"):
        Journal(tmp_path / "o.bayou", "other").__enter__()
    with Journal(tmp_path / "o.bayou", "k") as journal:
        assert journal.get(0) == (b"x", 0.0)


def test_sites_of_another_key_never_count_as_done(tmp_path: Path) -> None:
    """A kill while a finished journal is being removed may leave sites without the key that they belong to."""
    half_done(tmp_path / "o.bayou", "k", {0: b"x"})
    (tmp_path / "o.bayou.journal" / "key").unlink()
    with Journal(tmp_path / "o.bayou", "other") as journal:
        assert journal.get(0) is None


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:-1], lambda b: bytes([b[0] ^ 1]) + b[1:], lambda b: b + b"x"]
)
def test_a_damaged_site_is_done_again(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    half_done(tmp_path / "o.bayou", "k", {0: b"some bytes", 1: b"others"})
    path = tmp_path / "o.bayou.journal" / "0.site"
    path.write_bytes(damage(path.read_bytes()))
    with Journal(tmp_path / "o.bayou", "k") as journal:
        assert journal.get(0) is None
        assert journal.get(1) == (b"others", 1 / 3)


def test_what_a_killed_write_left_beside_the_output_goes(tmp_path: Path) -> None:
    half_done(tmp_path / "o.bayou", "k", {})
    for name in (".o.bayou.123.tmp", ".o.bayou2.123.tmp", ".o.bayou.tmp"):
        (tmp_path / name).touch()
    with Journal(tmp_path / "o.bayou", "k"):
        assert names(tmp_path) == [".o.bayou.tmp", ".o.bayou2.123.tmp", "o.bayou.journal"]


def test_a_second_compression_of_the_same_output_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "o.bayou", "k") as journal:
        journal.put(0, b"x", 0.5)
        for key in ("k", "other"):
            with pytest.raises(BayouError, match="another compression is writing .*o.bayou; wait for it"):
                Journal(tmp_path / "o.bayou", key).__enter__()
        with Journal(tmp_path / "p.bayou", "k"):
            pass  # another output is free
        assert journal.get(0) == (b"x", 0.5)


def _hold(out: Path, held: Event) -> None:
    with Journal(out, "k"):
        held.set()
        multiprocessing.Event().wait()


def test_a_killed_process_lets_go_of_the_output(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "o.bayou", held))
    process.start()
    assert held.wait(30)
    with pytest.raises(BayouError, match="another compression"):
        Journal(tmp_path / "o.bayou", "k").__enter__()
    process.kill()
    process.join()
    with Journal(tmp_path / "o.bayou", "k") as journal:
        journal.finish()
    assert names(tmp_path) == []
