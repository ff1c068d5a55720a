"""Which tiles packed_product.py's kernels take: good defaults, and what was measured on this device, kept on disk.

`tune` measures, once for a device and a shape; a product looks the result up, and never measures by itself: it may be
inside a CUDA graph.
"""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch


@dataclass(frozen=True)
class Choice:
    """tile: rows of the delta's matrix a program. warps, stages: Triton's. split: parts of the columns, of shrink.

    registers: a thread's at most. Left alone, the compiler takes 255 for the loops that hardly ever run.
    """

    tile: int = 64
    warps: int = 4
    stages: int = 3
    split: int = 1
    registers: int = 128


Pair = tuple[Choice, Choice]
"""Of shrink, and of the launches that write the output."""


def choice(key: str, segments: int, most: int) -> Pair:
    """The tiles for a table of this `key`: the measured ones, or else the defaults."""
    return _on_disk().get(_name(key, segments, most)) or _default(segments, most)


def _name(key: str, segments: int, most: int) -> str:
    rows = 1 if most <= 4 else 1 << (most - 1).bit_length()  # up to 4 lie in one and the same tile
    return f"{key} segments {1 << (segments - 1).bit_length()} rows {rows}"


def _default(segments: int, most: int) -> Pair:
    """Small tiles where there are few programs, and columns in parts where there are very few."""
    if most > 4:
        return Choice(64, 4, 2, 4 if segments * most <= 64 else 1), Choice(64, 4, 2)
    if segments <= 2:
        return Choice(32, 1, 3, 8), Choice(32, 1, 3)
    return Choice(64, 2, 3, 2 if segments <= 8 else 1), Choice(64, 2, 3)


_TILES = ((32, 1, 128), (32, 1, 96), (64, 1, 168), (64, 2, 128), (64, 2, 96), (128, 2, 168), (128, 4, 128))
SHRINK = tuple(
    Choice(tile, warps, stages, split, registers)
    for tile, warps, registers in _TILES
    for stages in (3, 4)
    for split in (1, 4)
)
REST = tuple(
    Choice(tile, warps, stages, 1, registers)
    for tile, warps, registers in (*_TILES, (256, 4, 168), (256, 8, 128))
    for stages in (3, 4)
)


def tune(
    key: str,
    segments: int,
    most: int,
    measure: Callable[[str, Pair], float],
    *,
    shrink: Sequence[Choice] = SHRINK,
    rest: Sequence[Choice] = REST,
) -> tuple[Pair, list[tuple[str, Choice, float]]]:
    """The fastest tiles, which are also kept, and all that was measured: (stage, choice, seconds).

    measure: seconds of a launch, ("shrink" or "rest", tiles) -> seconds; infinity where they do not fit the device.
    """
    first, second = _default(segments, most)
    tried = [("shrink", c, measure("shrink", (c, second))) for c in shrink]
    first = min(tried, key=lambda t: t[2], default=("", first, 0.0))[1]
    others = [("rest", c, measure("rest", (first, c))) for c in rest]
    second = min(others, key=lambda t: t[2], default=("", second, 0.0))[1]
    known = _on_disk()
    known[_name(key, segments, most)] = first, second
    _keep(known)
    return (first, second), tried + others


def _file() -> Path:
    root = os.environ.get("BAYOU_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "bayou"
    )
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return Path(root) / "kernels" / f"{''.join(c if c.isalnum() else '-' for c in name)}.json"


@cache
def _on_disk() -> dict[str, Pair]:
    """What was measured on this device, read once a process."""
    try:
        found = json.loads(_file().read_text())
        return {key: (Choice(**first), Choice(**second)) for key, (first, second) in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # a cache may be absent or unreadable: the defaults are right, if slower


def _keep(known: dict[str, Pair]) -> None:
    path = _file()
    with contextlib.suppress(OSError):  # a read-only home only costs the next process its measurements
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        try:
            temporary.write_text(json.dumps({key: [asdict(c) for c in pair] for key, pair in known.items()}, indent=1))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
