"""Kernels in Triton's interpreter: in a process of their own, since Triton decides as it is imported."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bayou import kernels


def run(*command: Path | str) -> None:
    """`python *command`, interpreted; the test is skipped where there is no Triton, or a GPU to compile for."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed (it has no build for this system)")
    if torch.cuda.is_available():
        pytest.skip("the compiled kernels are tested here; what interprets them is another NumPy than Triton's")
    checkout = Path(kernels.__file__).parents[2]
    paths = os.pathsep.join(str(path) for path in (checkout, checkout / "tests"))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    words = [sys.executable, *(str(word) for word in command)]
    ran = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def errors(script: str | None, folder: Path) -> dict[str, float]:
    """What `script FILE` (a module's file that calls write_errors) says of its cases, interpreted."""
    assert script is not None
    run("-W", "error", script, folder / "errors.json")
    found: dict[str, float] = json.loads((folder / "errors.json").read_text())
    return found


def stop_measuring() -> None:
    """From here on the coverage of this process is not measured, which triples the time of what is interpreted."""
    import coverage

    measuring = coverage.Coverage.current()
    if measuring is not None:
        measuring.stop()


def write_errors(cases: Mapping[str, Callable[[str], float]], measured: Collection[str] | None = None) -> None:
    """The error of each case on the CPU, as JSON, to the file that the command line names.

    measured: those whose coverage is measured, all if None. They run first.
    """
    measured = cases.keys() if measured is None else measured
    assert set(measured) <= cases.keys(), "cases to be measured that there are not"
    found: dict[str, Any] = {}
    for name in sorted(cases, key=lambda name: name not in measured):
        if name not in measured:
            stop_measuring()
        case = cases[name]
        try:
            found[name] = case("cpu")
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    Path(sys.argv[1]).write_text(json.dumps(found))
