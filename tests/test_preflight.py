"""What cannot come to a good end is refused before the work, by name; what was done stays; many sites cost little."""

import errno
import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pico
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_allocate import run, site, total

import bayou
from bayou.checkpoint import Checkpoint, resolve
from bayou.deltafile import DeltaFile
from bayou.distillation import gains
from bayou.errors import BadInput, BayouError, Unsupported
from bayou.journal import Journal
from bayou.restore import Restorer

NONE: dict[str, Any] = {"calibration": "none", "method": "deltacome"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accounting": "paper", "budget": 50_000}, r"--accounting paper counts bits a weight, not a budget \(50,000"),
        ({"accounting": "paper", "ratio": 0}, "ratio 0: a number above 0"),
        ({"accounting": "paper", "ratio": -4}, "ratio -4: a number above 0"),
        ({"method": "bitdelta"}, "200 steps of fitting gains need a text, .* or --distill-steps 0"),
        ({"distill_steps": 3, "distill_what": "gains"}, "3 steps of fitting gains need a text"),
        ({"device": "cuda:99"}, "--device cuda:99 cannot be used here"),
        ({"device": "abacus"}, "--device abacus cannot be used here"),
        ({"base_revision": "a b"}, "--base-revision 'a b': a branch"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    base: Path, tuned: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        bayou.compress(base, tuned, tmp_path / "a.bayou", **(NONE | options))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_what_is_done_which_counts_as_room(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "a.bayou"

    def stop(step: str, done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bayou.compress(base, tuned, out, ratio=4, progress=stop, **NONE)
    journal = tmp_path / "a.bayou.journal"
    held = sum(path.stat().st_size for path in journal.iterdir())
    done = {path.name: path.read_bytes() for path in journal.glob("*.site")}
    limit = 2 * int(sum(path.stat().st_size for path in tuned.glob("*.safetensors")) / 4)
    assert len(done) == 10

    def room(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, free))

    room(limit // 4)
    with pytest.raises(BayouError, match="bytes free, .* are needed"):
        bayou.compress(base, tuned, out, ratio=4, **NONE)
    assert {path.name: path.read_bytes() for path in journal.glob("*.site")} == done
    room(limit - held)
    bayou.compress(base, tuned, out, ratio=4, **NONE)
    assert DeltaFile(out).verify() and not journal.exists()


def test_distillation_needs_room_for_a_draft_which_goes_after_it(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    options: dict[str, Any] = {"method": "bitdelta", "distill_steps": 1, "distill_what": "gains", "ratio": 4}
    seen: list[bool] = []
    write = bayou.compress.__globals__["_Job"].write

    def spied(job: Any, journal: Any, path: Path, gains: Any, *rest: Any) -> int:
        seen.append((journal.folder / "draft.bayou").exists())
        return write(job, journal, path, gains, *rest)

    monkeypatch.setattr(bayou.compress.__globals__["_Job"], "write", spied)
    size = bayou.compress(base, tuned, tmp_path / "a", **options).bytes
    assert seen == [False, False]
    for copies, fits in ((2.9, False), (3, True)):
        free = int(copies * size)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(10**9, 0, free))
        if fits:
            bayou.compress(base, tuned, tmp_path / "b", **options)
            continue
        with pytest.raises(BayouError, match="bytes free"):
            bayou.compress(base, tuned, tmp_path / "b", **options)


def test_a_run_that_did_nothing_leaves_no_journal(tmp_path: Path) -> None:
    """Else its key would refuse the corrected command."""
    with pytest.raises(RuntimeError), Journal(tmp_path / "a", "k"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_only_a_held_lock_means_another_compression(tmp_path: Path, monkeypatch: Any) -> None:
    def locked(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", locked)
    with pytest.raises(BayouError, match="cannot write .*: No locks available"):
        Journal(tmp_path / "a", "k").__enter__()


def with_tensors(source: Path, folder: Path, **more: torch.Tensor) -> Path:
    shutil.copytree(source, folder)
    save_file(load_file(source / "model.safetensors") | more, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_infinite_masks_are_taken_where_nothing_must_be_coded(base: Path, tuned: Path, tmp_path: Path) -> None:
    mask = torch.full((48, 48), float("-inf")).triu(1)
    mask[0, 1] = float("nan")
    old = with_tensors(base, tmp_path / "base", same=mask, other=mask.clone())
    new = with_tensors(tuned, tmp_path / "tuned", same=mask, other=mask.T.contiguous())
    bayou.compress(old, new, tmp_path / "a", ratio=2, **NONE)
    opened = DeltaFile(tmp_path / "a")
    assert "same" in opened.unchanged and "other" in opened.exact
    for name, wanted in (("same", mask), ("other", mask.T)):
        found = Restorer(Checkpoint(old), opened).tensor(name)
        assert torch.equal(found.view(torch.int32), wanted.contiguous().view(torch.int32))
    name = "model.layers.0.mlp.up_proj.weight"
    bad = load_file(new / "model.safetensors")[name].index_fill(0, torch.tensor([3]), float("inf"))
    worse = with_tensors(new, tmp_path / "worse", **{name: bad})
    with pytest.raises(Unsupported, match=f"tensor '{name}'"):
        bayou.compress(old, worse, tmp_path / "b", ratio=2, **NONE)
    bayou.compress(old, worse, tmp_path / "b", ratio=1.1, keep=(name,), **NONE)
    assert name in DeltaFile(tmp_path / "b").exact


def test_experts_that_lie_the_other_way_round_are_coded_without_a_gram(tmp_path: Path, monkeypatch: Any) -> None:
    llama4 = pico._of(
        transformers.Llama4TextConfig, **pico._MOE, num_local_experts=4, head_dim=16, intermediate_size_mlp=96
    )
    monkeypatch.setitem(pico._CONFIGS, "llama4", llama4)
    base = pico.pico("llama4", tmp_path / "base")
    tuned = pico.perturb(base, tmp_path / "tuned")
    report = bayou.compress(base, tuned, tmp_path / "a", ratio=3, tokens=512, length=64)
    assert report.errors["expert"] < 1


def test_a_tied_head_is_not_trained(tmp_path: Path, monkeypatch: Any) -> None:
    base = pico.pico("llama_tied", tmp_path / "base")
    tuned = pico.perturb(base, tmp_path / "tuned")
    made: list[Any] = []
    real = gains._Fitted
    monkeypatch.setattr(gains, "_Fitted", lambda attached: made.append(attached) or real(attached))
    bayou.compress(base, tuned, tmp_path / "a", ratio=4, method="bitdelta", distill_steps=1, distill_what="gains")
    linears = [record for record in DeltaFile(tmp_path / "a").sites.values() if record.role == "linear"]
    assert len(made) == len(linears) > 0


def test_ranks_of_a_large_mixture_of_experts_are_chosen_in_seconds() -> None:
    shapes = {"gate": (768, 2048), "up": (768, 2048), "down": (2048, 768)}
    first = {name: site(name, shape, "deltacome", "expert") for name, shape in shapes.items()}
    sites = [record for _ in range(48 * 128) for record in first.values()]
    budget = len(sites) * 768 * 2048 // 8
    started = time.process_time()
    chosen = run(sites, budget)
    assert time.process_time() - started < 3
    assert len(chosen) == 18_432 and 0 <= budget - total(chosen) < 5000


def test_the_snapshots_commit_is_the_revision_and_only_the_model_is_fetched(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    snapshot = shutil.copytree(base, tmp_path / "snapshots" / COMMIT)
    asked: list[dict[str, Any]] = []

    def fetch(name: str, **given: Any) -> str:
        asked.append(given)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    for given, stored in (({}, COMMIT), ({"base_revision": "v1"}, "v1")):
        bayou.compress("org/base", tuned, tmp_path / "a", ratio=4, **given, **NONE)
        assert DeltaFile(tmp_path / "a").base["revision"] == stored
    bayou.compress(snapshot, tuned, tmp_path / "a", ratio=4, **NONE)
    assert DeltaFile(tmp_path / "a").base["revision"] == ""
    assert resolve("org/base") == snapshot
    assert all(given["ignore_patterns"] == ["consolidated*", "*/*"] for given in asked)
