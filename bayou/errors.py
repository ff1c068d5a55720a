"""What can go wrong, one class per cause; every message says what is wrong, with the value, and the way out.

BayouError
├── BadInput        an argument, a text file or a checkpoint folder that cannot be used as it is
├── Unsupported     a model or tensor that Bayou cannot handle (named)
├── TooSmall        a size that the method cannot reach; `.least` is the smallest it can, in bytes
├── BadFile         not a well-formed .bayou file (wrong format, hostile header, unknown version)
├── DamagedFile     a .bayou file whose bytes are not those that were written
├── WrongBase       the base model is not the one the file was made against
├── JournalMismatch a half-finished compression in OUT.journal/, or training, that belongs to other inputs
└── Diverged        a training whose loss stopped being a number, again after a smaller step
"""

import errno
from pathlib import Path


class BayouError(Exception):
    """Any error that is the input's, not Bayou's; the command line prints it in one line and exits with 1."""


class BadInput(BayouError):
    """An argument, text file or checkpoint folder that cannot be used as it is."""


class Unsupported(BayouError):
    """A model or tensor that Bayou cannot handle; the message names it."""


class TooSmall(BayouError):
    """A size that the method cannot reach.

    Args:
        message: what was asked and what is possible.
        least: the smallest file, in bytes, that the method can make of this model.
    """

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least


class BadFile(BayouError):
    """Not a well-formed .bayou file, or of a version that this Bayou does not read."""


class DamagedFile(BayouError):
    """A .bayou file whose bytes differ from those that were written: a flipped bit, a cut end."""


class WrongBase(BayouError):
    """The base model is not the one that the file was made against; names the first differing tensor."""


class JournalMismatch(BayouError):
    """OUT.journal/ (or a checkpoint) belongs to other inputs, another Plan, recipe or version."""


class Diverged(BayouError):
    """A training whose loss stopped being a number, again and again with smaller steps."""


def disk_error(error: OSError, path: Path) -> BayouError:
    """A full disk or a forbidden folder in one clear sentence."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        way_out = "nothing was left behind. Free some space, or write elsewhere"
        return BayouError(f"no space left to write {path}; {way_out}")
    return BayouError(f"cannot write {path}: {error.strerror or error}")
