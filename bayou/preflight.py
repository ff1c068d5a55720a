"""What can be refused before hours of work are begun: the size asked for, the device, the revision, the disk."""

import contextlib
import re
import shutil
from pathlib import Path

import torch

from bayou.calibrate import ACTIVATIONS
from bayou.deltafile import BASE_FIELD
from bayou.errors import BadInput, BayouError


def check_size(ratio: float | None, budget: int | None, accounting: str) -> None:
    """Raises BadInput for a ratio and a budget that do not go together, or with the accounting."""
    if ratio is not None and budget is not None:
        raise BadInput(f"give a ratio ({ratio}) or a budget ({budget:,} bytes), not both")
    if ratio is not None and not ratio > 0:
        raise BadInput(f"ratio {ratio}: a number above 0 is needed, e.g. 16")
    if budget is not None and accounting == "paper":
        raise BadInput(f"--accounting paper counts bits a weight, not a budget ({budget:,} bytes); give a ratio")


def check_output(out: Path, folder: Path) -> None:
    """Raises BadInput for an output that is no file of its own, or lies among the weights of the model in `folder`."""
    if not out.parent.is_dir():
        raise BadInput(f"{out.parent} is not a folder; make it first")
    if out.is_dir():
        raise BadInput(f"{out} is a folder; give the name of a file, e.g. {out / 'small.bayou'}")
    if out.exists() and out.suffix != ".bayou" and out.parent.resolve() == folder.resolve():
        raise BadInput(f"{out} is a file of the model in {folder}; choose another name, e.g. {out.name}.bayou")


def check_new_folder(out: Path) -> None:
    """Raises BadInput for a folder to be written that is there already, or has no place to be in."""
    if out.exists():
        raise BadInput(f"{out} exists; choose another folder")
    if not out.parent.is_dir():
        raise BadInput(f"{out.parent} is not a folder; make it first")


def check_device(device: str) -> None:
    """Raises BadInput for a device that this torch cannot use."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a CPU build asserts that it has no CUDA
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"--device {device} cannot be used here ({reason}); choose another, e.g. cpu") from None


def check_activations(activations: str | None) -> None:
    """Raises BadInput for whose activations nobody has."""
    if activations is not None and activations not in ACTIVATIONS:
        raise BadInput(f"--activations {activations}: choose {', '.join(ACTIVATIONS)}")


def check_revision(revision: str | None) -> None:
    """Raises BadInput for a base's revision that no reader of the file would take."""
    if revision and not BASE_FIELD.fullmatch(revision):
        raise BadInput(f"--base-revision {revision!r:.80}: a branch, tag or commit of A-Z a-z 0-9 _ . / - is needed")


def snapshot_commit(folder: Path) -> str:
    """The commit of a snapshot in the Hub's cache, by the names of its folders; "" for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name) else ""


def check_room(out: Path, journal: Path, nbytes: int, copies: int) -> None:
    """Raises BayouError unless `copies` of a file of `nbytes` fit beside `out`, what the journal holds counted in."""
    held = 0
    for path in journal.glob("*"):
        with contextlib.suppress(OSError):  # another process's, just renamed or removed
            held += path.stat().st_size
    free, need = shutil.disk_usage(out.parent).free, max(0, copies * nbytes - held)
    if free < need:
        raise BayouError(
            f"{out.parent} has {free:,} bytes free, {need:,} are needed (file and journal); free some space"
        )
