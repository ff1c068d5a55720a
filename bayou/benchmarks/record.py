"""What every benchmark's JSON says beside its figures: the device, the versions, and when."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bayou.version import __version__


def surroundings(device: str) -> dict[str, Any]:
    """Device and versions."""
    found: dict[str, Any] = {"device": device, "bayou": __version__, "torch": torch.__version__}
    for package in ("triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found |= {"python": platform.python_version(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.device(device).type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def write(path: Path | None, found: dict[str, Any]) -> None:
    """Write the figures as JSON, where a file is named."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


def finish(device: str) -> None:
    """Wait until the device has done what it was given here; what other threads copy meanwhile is not waited for."""
    if torch.device(device).type == "cuda":
        torch.cuda.current_stream(device).synchronize()
