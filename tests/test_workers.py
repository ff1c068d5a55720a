"""workers.py: several processes share out the sites, and the file is that of one."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pico
import pytest

from bayou.compress import compress
from bayou.journal import Journal
from bayou.workers import Workers, joined, speaks


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_piece_is_one_workers_and_the_shares_are_even(count: int) -> None:
    costs = [5.0, 1.0, 1.0, 4.0, 3.0, 2.0, 2.0, 1.0, 1.0]
    shares = [Workers(rank, count).shared(costs) for rank in range(count)]
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    loads = [sum(costs[index] for index in share) for share in shares]
    assert max(loads) <= max(5.0, sum(costs) / count + 1)
    assert all(share == sorted(share) for share in shares)


def test_alone_nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(word, raising=False)
    with joined() as here:
        assert here == Workers(0, 1) and here.first and speaks()
        here.wait()
        assert here.device("cuda") == "cuda"


def test_only_the_first_of_several_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(word, value)
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert speaks() == said


def test_a_guest_neither_makes_nor_removes_the_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "o", "k") as owner:
        with Journal(tmp_path / "o", "k", guest=True) as guest:
            guest.put(3, b"x", 0.5)
        assert owner.get(3) == (b"x", 0.5)
        with pytest.raises(RuntimeError), Journal(tmp_path / "o", "k", guest=True):
            raise RuntimeError
        assert owner.get(3) == (b"x", 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["finetuned", "compressed", "corrected"])
def test_two_processes_write_the_file_of_one(base: Path, tuned: Path, tmp_path: Path, activations: Any) -> None:
    compress(base, tuned, tmp_path / "one", ratio=4, tokens=1024, length=64, activations=activations)
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bayou", "compress"]
    command += [str(base), str(tuned), "-o", str(tmp_path / "two"), "--ratio", "4", "--tokens", "1024"]
    command += ["--length", "64", "--activations", activations]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert done.stdout.count("matrices coded") == 1
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["one", "two"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.pico("llama_gqa", tmp_path_factory.mktemp("workers") / "base")


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    return pico.perturb(base, base.parent / "tuned")
