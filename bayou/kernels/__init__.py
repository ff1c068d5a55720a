"""Fast versions of inner loops. Each file holds, in this order: the formula, the plain reference, the Triton version.

Where Triton is missing the reference runs, and a warning says so once per process.
"""

import os
import warnings
from functools import cache

import torch


@cache
def triton_available() -> bool:
    """Whether Triton can be imported; warns once if not."""
    try:
        import triton  # noqa: F401
    except ImportError:
        warnings.warn("Triton is not installed: slower code runs on the GPU (pip install 'bayou[gpu]')", stacklevel=2)
        return False
    return True


def use_triton(x: torch.Tensor) -> bool:
    """Whether the Triton version should run on this tensor."""
    return x.is_cuda and triton_available()


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, which multiplies the bits of bf16 numbers instead of the numbers."""
    return os.environ.get("TRITON_INTERPRET") == "1"
