"""Progress bars for people."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Bars:
    """Progress bars on `screen`, one a step of the work; nothing where that is no terminal."""

    def __init__(self, screen: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=screen, disable=not screen.is_terminal)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, step: str, done: int, total: int) -> None:
        """A step, "name" or "name: how it stands"."""
        name = step.partition(":")[0]
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(step, total=total)
        self._progress.update(self._tasks[name], description=step, completed=done, total=total)
