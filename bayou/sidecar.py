"""The small files beside the weights (config, tokenizer, chat template): stored as what they differ by from the base's.

A fine-tune's tokenizer.json is usually the base's, or the base's with a few entries added; whole it would be a fifth of
a small delta. `difference` cuts both files after newlines and commas and states the new one as runs copied from the
old one and literal text; the result is zlib-compressed JSON, and `patched` gives the file back byte for byte.
"""

import hashlib
import json
import re
import zlib
from pathlib import Path
from typing import Any

from bayou.errors import BadFile, WrongBase

SUFFIXES = (".json", ".jinja", ".txt", ".model")
"""Only these are carried: data that transformers reads. Never code."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")
MAX_SIZE = 128 * 2**20
_PIECE = re.compile(rb"[^\n,]*[\n,]|[^\n,]+")


def is_carried(name: str) -> bool:
    """Whether a file of this name is data that a model folder holds; weights and their indexes are not."""
    return NAME.fullmatch(name) is not None and name.endswith(SUFFIXES) and not name.endswith(".index.json")


def carried(folder: Path) -> dict[str, bytes]:
    """Name -> content of the folder's small files, in order of name; weights' indexes are left out."""
    found = {}
    for path in sorted(folder.iterdir()):
        if is_carried(path.name) and path.is_file() and path.stat().st_size <= MAX_SIZE:
            found[path.name] = path.read_bytes()
    return found


def digest(content: bytes) -> str:
    """sha256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def difference(old: bytes | None, new: bytes) -> bytes:
    """`new` in terms of `old` (None: of nothing), compressed."""
    pieces = _PIECE.findall(old or b"")
    where: dict[bytes, int] = {}
    for index, piece in enumerate(pieces):
        where.setdefault(piece, index)
    runs: list[Any] = []  # [first piece, count] or text (latin-1, so that any byte fits)
    following = -1
    for piece in _PIECE.findall(new):
        if 0 <= following < len(pieces) and pieces[following] == piece:
            runs[-1][1] += 1
            following += 1
        elif piece in where:
            runs.append([where[piece], 1])
            following = where[piece] + 1
        else:
            following = -1
            if runs and isinstance(runs[-1], str):
                runs[-1] += piece.decode("latin-1")
            else:
                runs.append(piece.decode("latin-1"))
    stated = {"old": None if old is None else digest(old), "new": digest(new), "size": len(new), "runs": runs}
    return zlib.compress(json.dumps(stated, separators=(",", ":")).encode(), 9)


def patched(name: str, old: bytes | None, stored: bytes) -> bytes:
    """The new file. Raises WrongBase where `old` is not the file it was made against, BadFile where it is malformed."""
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(stored, 8 * MAX_SIZE)
        if inflate.unconsumed_tail or not inflate.eof:
            raise ValueError("too large")
        stated = json.loads(text)
        expected, size, runs = stated["old"], stated["size"], stated["runs"]
        if not isinstance(size, int) or size > MAX_SIZE:
            raise ValueError(f"size {size}")
    except (zlib.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadFile(f"the stored difference of {name} is not well-formed ({error})") from None
    if expected is not None and (old is None or digest(old) != expected):
        raise WrongBase(
            f"the base's {name} is not the one that this file was made against; use the base's own revision"
        )
    pieces = _PIECE.findall(old or b"") if expected is not None else []
    new = bytearray()
    try:
        for run in runs:
            new += run.encode("latin-1") if isinstance(run, str) else b"".join(pieces[run[0] : run[0] + run[1]])
            if len(new) > size:
                raise ValueError("longer than stated")
    except (ValueError, TypeError, LookupError) as error:
        raise BadFile(f"the stored difference of {name} is not well-formed ({error})") from None
    if digest(bytes(new)) != stated.get("new"):
        raise BadFile(f"the stored difference of {name} does not give the file that was stored")
    return bytes(new)
