"""kill -9, Ctrl-C and full disks: the output is absent or whole, and nothing else stays (promise 4).

The tests of full counts run under `make torture`.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
from tamper import sha

import bayou
from bayou.errors import BayouError

CHECKOUT = Path(__file__).resolve().parent.parent


def command(base: Path, tuned: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "bayou", "compress", str(base), str(tuned), "-o", str(out), *options]

    def heed() -> None:
        """A job in the background of a shell is born deaf to Ctrl-C, and so would be what it starts."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(words, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=heed)


def ended(process: subprocess.Popen[bytes], timeout: float = 900) -> tuple[int, str]:
    """Exit code and what was printed as an error."""
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, errors.decode()


def kill_when(process: subprocess.Popen[bytes], moment: Callable[[], bool]) -> bool:
    """kill -9 at that moment; False where the process ended before."""
    while process.poll() is None:
        if moment():
            process.kill()
            break
        time.sleep(0.001)
    ended(process)
    return process.returncode == -signal.SIGKILL


def sites_in(journal: Path) -> int:
    return len(list(journal.glob("*.site")))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of six layers and its fine-tune, for a run that takes a while."""
    folder = tmp_path_factory.mktemp("deep")
    base = pico.pico("llama_gqa", folder / "base", num_hidden_layers=6)
    return base, pico.perturb(base, folder / "tuned")


CALIBRATED = ("--ratio", "4", "--tokens", "2048", "--length", "64")


def compressed(base: Path, tuned: Path, out: Path) -> bytes:
    """What the command writes, by this process: from the start, or going on where a killed one was."""
    bayou.compress(base, tuned, out, ratio=4, tokens=2048, length=64)
    return out.read_bytes()


def assert_absent_or_whole(out: Path, old: bytes | None, whole: bytes) -> None:
    assert (out.read_bytes() if out.exists() else None) in (old, whole)


@pytest.mark.slow
def test_atomic_a_killed_compression_goes_on_to_the_same_bytes(deep: tuple[Path, Path], tmp_path: Path) -> None:
    """Promise 4, with a kill among the sites and one as the output is written."""
    whole = compressed(*deep, tmp_path / "whole.bayou")
    for round, old in enumerate((None, b"an older file")):
        out = tmp_path / f"{round}.bayou"
        journal = tmp_path / f"{round}.bayou.journal"
        if old is not None:
            out.write_bytes(old)
        process = command(*deep, out, *CALIBRATED)
        if round == 0:
            assert kill_when(process, lambda journal=journal: sites_in(journal) >= 20)  # type: ignore[misc]
            assert 20 <= sites_in(journal) < 44
        else:
            pattern = f".{out.name}.*.tmp"
            kill_when(process, lambda pattern=pattern: bool(list(tmp_path.glob(pattern))))  # type: ignore[misc]
        assert_absent_or_whole(out, old, whole)
        assert sha(compressed(*deep, out)) == sha(whole)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            [*(f"{i}.bayou" for i in range(round + 1)), "whole.bayou"]
        )


@pytest.mark.torture
def test_thirty_kills_at_random_moments_leave_all_or_nothing(deep: tuple[Path, Path], tmp_path: Path) -> None:
    whole = compressed(*deep, tmp_path / "whole.bayou")
    out, journal = tmp_path / "a.bayou", tmp_path / "a.bayou.journal"
    started = time.perf_counter()
    process = command(*deep, out, *CALIBRATED)
    while not journal.exists():
        time.sleep(0.001)
    before = time.perf_counter() - started
    assert ended(process)[0] == 0
    during = time.perf_counter() - started - before
    rng, killed, midway = random.Random(4), 0, 0
    for round in range(30):
        out.unlink(missing_ok=True)
        old = b"old" if round % 2 else None
        if old is not None:
            out.write_bytes(old)
        process = command(*deep, out, *CALIBRATED)
        if round % 6 == 0:
            moment = time.perf_counter() + rng.random() * before
        else:
            while not journal.exists() and process.poll() is None:
                time.sleep(0.0005)
            moment = time.perf_counter() + rng.random() * during
        killed += kill_when(process, lambda moment=moment: time.perf_counter() >= moment)  # type: ignore[misc]
        midway += sites_in(journal) > 0
        assert_absent_or_whole(out, old, whole)
        assert sha(compressed(*deep, out)) == sha(whole)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bayou", "whole.bayou"]
    assert killed >= 20 and midway >= 8


@pytest.mark.torture
def test_three_kills_on_a_real_model_leave_all_or_nothing(testbed: Path, tmp_path: Path) -> None:
    models, options = (testbed / "base", testbed / "intent"), ("--tokens", "1024", "--length", "256")
    assert ended(command(*models, tmp_path / "whole.bayou", *options))[0] == 0
    whole = (tmp_path / "whole.bayou").read_bytes()
    out, journal = tmp_path / "a.bayou", tmp_path / "a.bayou.journal"
    rng = random.Random(5)
    for least, most in ((0, 70), (70, 140), (140, 210)):  # one run, killed three times on its way
        at = rng.randrange(least, most) + 1
        assert kill_when(command(*models, out, *options), lambda at=at: sites_in(journal) >= at)  # type: ignore[misc]
        assert not out.exists() and sites_in(journal) >= at
    assert ended(command(*models, out, *options))[0] == 0
    assert sha(out.read_bytes()) == sha(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bayou", "whole.bayou"]


@pytest.mark.slow
def test_ctrl_c_says_so_and_keeps_the_journal_and_two_at_once_are_refused(
    deep: tuple[Path, Path], tmp_path: Path
) -> None:
    out, journal = tmp_path / "a.bayou", tmp_path / "a.bayou.journal"
    process = command(*deep, out, *CALIBRATED)
    while sites_in(journal) < 3:
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(BayouError, match=r"another compression is writing .*a\.bayou; wait for it"):
            bayou.compress(*deep, out, ratio=4, tokens=2048, length=64)
        process.send_signal(signal.SIGINT)  # pending, and delivered as the process goes on
    finally:
        os.kill(process.pid, signal.SIGCONT)
    code, errors = ended(process)
    assert code == 130 and "what is encoded so far is kept" in errors and "Traceback" not in errors
    assert not out.exists() and sites_in(journal) >= 3
    assert compressed(*deep, out) == compressed(*deep, tmp_path / "whole.bayou")


# ---------------------------------------------------------------------------------------------- full disks


def assert_clean_or_done(base: Path, tuned: Path, folder: Path, whole: bytes) -> bool:
    """Compress into the folder: a clear error and nothing left, or the whole file. Whether it was done."""
    try:
        bayou.compress(base, tuned, folder / "a.bayou", ratio=4, calibration="none")
    except BayouError as error:
        assert "no space left to write" in str(error) or "bytes free" in str(error)
        assert "a.bayou" in str(error) or str(folder) in str(error)
        assert list(folder.iterdir()) == []
        return False
    assert (folder / "a.bayou").read_bytes() == whole
    (folder / "a.bayou").unlink()
    assert list(folder.iterdir()) == []
    return True


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = pico.pico("llama_gqa", folder / "base")
    return base, pico.perturb(base, folder / "tuned", grow_vocab=2)


@pytest.fixture(scope="module")
def unlimited(pair: tuple[Path, Path]) -> bytes:
    """The file that the tests of full disks ask for."""
    path = pair[0].with_name("unlimited.bayou")
    bayou.compress(*pair, path, ratio=4, calibration="none")
    return path.read_bytes()


def test_a_limit_on_files_leaves_nothing(pair: tuple[Path, Path], unlimited: bytes, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stops the key, a site, or the output itself, wherever mounting a small disk is not allowed."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    done = []
    for limit in (0, 10, 100, 700, 2000, 10_000, len(unlimited) - 1, len(unlimited)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            done.append(assert_clean_or_done(*pair, tmp_path, unlimited))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert done == [False] * 7 + [True]


def test_a_full_disk_leaves_nothing(pair: tuple[Path, Path], unlimited: bytes, tmp_path: Path) -> None:
    """On real small disks of many sizes, so that each step of a compression meets the end of one."""
    disk, done = tmp_path / "disk", []
    disk.mkdir()
    for pages in range(8, 64, 3):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={4096 * pages}", "tmpfs", str(disk)]
        try:
            mounted = subprocess.run(mount, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount here")
        if mounted.returncode:
            pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
        try:
            done.append(assert_clean_or_done(*pair, disk, unlimited))
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    assert done == sorted(done) and set(done) == {False, True}
