"""`bayou bench NAME`: each file here measures one thing, `measure(quick)` -> numbers, and prints them by `tables`."""

import json
import pkgutil
import platform
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from bayou.errors import BadInput, Unsupported
from bayou.version import __version__


def names() -> list[str]:
    """What can be measured."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def run(name: str, out: Path | None = None, quick: bool = False) -> tuple[dict[str, Any], list[Table], Path]:
    """Measure; (numbers, tables of them, the JSON file that they were written to).

    out: the file; by default bench/results/NAME-DEVICE.json. Raises BadInput for an unknown name, Unsupported without
    a GPU.
    """
    if name not in names():
        raise BadInput(f"bench {name!r}: expected {' or '.join(names())}")
    if not torch.cuda.is_available():
        raise Unsupported(f"bayou bench {name} measures a GPU, and torch finds none here")
    module = import_module(f"bayou.benchmarks.{name}")
    measure: Callable[[bool], dict[str, Any]] = module.measure
    found = {"bench": name, "quick": quick, **surroundings(), **measure(quick)}
    device = "".join(c if c.isalnum() else "-" for c in found["device"]).strip("-").lower()
    path = out or Path("bench/results") / f"{name}-{device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found, module.tables(found), path


def surroundings() -> dict[str, Any]:
    """The device and the versions that a measurement depends on."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    return {
        "device": torch.cuda.get_device_name(),
        "versions": {
            "bayou": __version__,
            "torch": torch.__version__,
            "triton": version,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
    }
