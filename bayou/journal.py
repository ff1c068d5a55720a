"""OUT.journal/: the encoded sites of a compression under way, so that a killed one goes on where it was.

One file a site, written beside and renamed, and `key`, the sha256 of all that determines the bytes. A journal of
another key is refused. A lock keeps two compressions off the same output. It goes when the output stands.
"""

import contextlib
import fcntl
import glob
import hashlib
import os
import shutil
import struct
from pathlib import Path
from types import TracebackType

from bayou.errors import BayouError, JournalMismatch, disk_error

_HEAD = struct.Struct("<dI")


class Journal:
    """A context manager. Ctrl-C, a kill or a crash keeps the sites done; `finish`, or a BayouError, removes it.

    guest: use the journal that another process of the same compression holds, and leave making and removing to it.
    """

    def __init__(self, out: Path, key: str, *, guest: bool = False) -> None:
        self.folder = out.with_name(out.name + ".journal")
        self.out = out
        self._key = key
        self._guest = guest

    def __enter__(self) -> "Journal":
        if self._guest:
            self._check()
            return self
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock = open(self.folder / "lock", "w")  # noqa: SIM115 (held until the end)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # only where it is empty: it may be another process's
            raise disk_error(error, self.out) from error
        try:
            self._claim()
        except BaseException:
            self._lock.close()
            raise
        return self

    def _claim(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BayouError(
                f"another compression is writing {self.out}; wait for it, or choose another output"
            ) from None
        except OSError as error:  # a file system without locks
            raise disk_error(error, self.out) from error
        key_file = self.folder / "key"
        try:
            for left in self.out.parent.glob(f".{glob.escape(self.out.name)}.*.tmp"):  # by a killed write of the output
                left.unlink()
            if not key_file.exists():
                self._write(key_file, self._key.encode())
            self._check()
        except OSError as error:
            self.finish()
            raise disk_error(error, self.out) from error

    def _check(self) -> None:
        if (self.folder / "key").read_bytes() != self._key.encode():
            raise JournalMismatch(
                f"{self.folder} holds a half-finished compression of other models, options or versions; "
                "run that command again to finish it, or delete the folder"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._guest:
            return
        # A full disk, or an input that would be refused again: nothing to go on with. Nor is there where no site is
        # done, and then the key would only refuse the corrected command.
        if isinstance(error, BayouError) or (error is not None and not any(self.folder.glob("*.site"))):
            self.finish()
        self._lock.close()

    def _path(self, index: int) -> Path:
        return self.folder / f"{index}.site"

    def _write(self, path: Path, content: bytes) -> None:
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)

    def put(self, index: int, blob: bytes, error: float, note: str = "") -> None:
        """Keep a site's bytes, the relative error of its delta, and a note. Raises BayouError on a full disk."""
        told = note.encode()
        payload = _HEAD.pack(error, len(told)) + told + blob
        try:
            self._write(self._path(index), self._digest(payload) + payload)
        except OSError as failure:
            raise disk_error(failure, self.out) from failure

    def _digest(self, payload: bytes) -> bytes:
        # With the key: a site of another compression, left by a removal that was cut short, never counts as done.
        return hashlib.sha256(self._key.encode() + payload).digest()

    def get(self, index: int) -> tuple[bytes, float] | None:
        """A site's bytes and error, or None where it is not done (or its file is damaged, and so done again)."""
        payload = self._read(index)
        if payload is None:
            return None
        error, told = _HEAD.unpack_from(payload)
        return payload[_HEAD.size + told :], error

    def note(self, index: int) -> str | None:
        """The note that was kept with a site, or None where it is not done."""
        payload = self._read(index)
        return None if payload is None else payload[_HEAD.size :][: _HEAD.unpack_from(payload)[1]].decode()

    def _read(self, index: int) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            content = self._path(index).read_bytes()
            if self._digest(content[32:]) == content[:32]:
                return content[32:]
        return None

    def finish(self) -> None:
        """The output stands: remove the journal."""
        shutil.rmtree(self.folder, ignore_errors=True)
