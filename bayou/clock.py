"""Where the seconds of a long command go: `with step("svd"): ...`, read by `seconds()`."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_totals: ContextVar[dict[str, float] | None] = ContextVar("totals", default=None)
_finish: ContextVar[Callable[[], None] | None] = ContextVar("finish", default=None)
_open: ContextVar[list[list[float]] | None] = ContextVar("open", default=None)


@contextmanager
def measuring() -> Iterator[dict[str, float]]:
    """Collect the steps run inside; yields {step: seconds}, filled as they end. A nested step's time is its own."""
    totals: dict[str, float] = {}
    marks = _totals.set(totals), _open.set([])
    try:
        yield totals
    finally:
        _totals.reset(marks[0])
        _open.reset(marks[1])


@contextmanager
def exact(finish: Callable[[], None]) -> Iterator[None]:
    """Inside, `finish` (a synchronisation) runs at both ends of every step: each is charged its own work on the device,
    at the price of some overlap."""
    mark = _finish.set(finish)
    try:
        yield
    finally:
        _finish.reset(mark)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Add the wall time of the block, less that of steps inside it, to `name`; nothing outside `measuring`."""
    totals, stack = _totals.get(), _open.get()
    if totals is None or stack is None:
        yield
        return
    finish = _finish.get() or (lambda: None)
    finish()
    stack.append([0.0])
    start = time.perf_counter()
    try:
        yield
        finish()
    finally:
        spent = time.perf_counter() - start
        inner = stack.pop()[0]
        totals[name] = totals.get(name, 0.0) + spent - inner
        if stack:
            stack[-1][0] += spent
