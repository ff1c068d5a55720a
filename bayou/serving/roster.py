"""From the names that clients send to tenants: files in one folder, and never anything outside it.

A name is one to four words joined by "/", each of letters, digits, "_", "-" and "." and not beginning with "." or "-".
So "..", absolute paths, drive letters, percent signs, backslashes and NULs are no names at all; links are not followed.
"""

import re
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from bayou.errors import BayouError
from bayou.serving.engine import Engine
from bayou.serving.refusals import Refused, unknown_model
from bayou.serving.tenant import Tenant, taken

SUFFIX = ".bayou"
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", re.ASCII)
_DEPTH = 4


def check_name(name: str) -> str:
    """The name as it is. Raises Refused where it is none."""
    words = name.split("/")
    if len(words) > _DEPTH or not all(_WORD.fullmatch(word) for word in words):
        raise Refused(f"{name!r:.120} is no name of a model", 400, "bad_name", "model")
    return name


def resolve(root: Path, name: str) -> Path:
    """The file of a name under `root`. Raises Refused: 400 for what is no name, or a link; 404 where no file is."""
    words = check_name(name.removesuffix(SUFFIX)).split("/")
    path = root
    for word in (*words[:-1], words[-1] + SUFFIX):
        path = path / word
        try:
            mode = path.lstat().st_mode
        except OSError:
            raise unknown_model(name) from None
        if stat.S_ISLNK(mode):
            raise Refused(f"{name!r:.120} is a link, which is not followed", 400, "bad_name", "model")
    if not stat.S_ISREG(mode):
        raise unknown_model(name)
    return path


class Roster:
    """The models that an engine can be asked for.

    root: the folder whose files may be asked for by name; None for those that were registered only.
    """

    def __init__(self, engine: Engine, root: Path | None) -> None:
        self._engine, self._bank = engine, engine.bank
        self._root = None if root is None else root.resolve()
        self._lock = threading.Lock()
        self._unloaded: set[str] = set()

    def register_all(self) -> Iterator[tuple[Path, BayouError]]:
        """Register every file in the folder itself; yields those that cannot be served, and why."""
        for path in sorted(self._root.glob("*" + SUFFIX)) if self._root else ():
            try:
                name = path.name.removesuffix(SUFFIX)
                if self._bank.find(name) is None:
                    self._bank.register(name, resolve(self._root, name) if self._root else path)
            except BayouError as error:
                yield path, error

    def find(self, name: str) -> Tenant:
        """The tenant called `name`, or base:name; its file is opened now where it came later. Raises BayouError."""
        name = name.removeprefix(f"{self._bank.base.name}:").removesuffix(SUFFIX)
        tenant = self._bank.find(name)
        if tenant is not None:
            return tenant
        check_name(name)
        if self._root is None or name in self._unloaded:
            raise unknown_model(name)
        with self._lock:  # two requests for a new file open it once
            return self._bank.find(name) or self._register(name, resolve(self._root, name))

    def _register(self, name: str, path: Path) -> Tenant:
        try:
            return self._bank.register(name, path)
        except BayouError as error:
            raise self._bank.told(error, name, path) from None

    def load(self, name: str, path: str, *, replacing: bool = False) -> None:
        """Serve a file of the folder under a name, all of it read and verified before anyone can ask for it.

        Raises BayouError; everything is as it was then.
        """
        if self._root is None:
            raise Refused("no --delta-dir was given, so no files can be loaded", 400, "no_delta_dir")
        name = check_name(name.removesuffix(SUFFIX))
        if self._bank.find(name) is not None and not replacing:
            raise taken(name)
        file = resolve(self._root, path)
        try:
            trial = self._bank.open(name, file)
        except BayouError as error:
            raise self._bank.told(error, name, file) from None
        try:
            self._engine.load(trial)
            self._bank.enter(trial, replacing=replacing)
        except BaseException:
            self._bank.forget(trial)
            raise
        self._unloaded.discard(name)

    def unload(self, name: str) -> None:
        """Serve it no longer; what is being answered goes on. A file of the folder can be loaded again by name."""
        name = name.removesuffix(SUFFIX)
        with self._lock:
            if not self._bank.unregister(name):
                raise unknown_model(name)
            self._unloaded.add(name)
