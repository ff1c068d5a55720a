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

from bayou.errors import BadFile, BadInput, WrongBase

SUFFIXES = (".json", ".jinja", ".txt", ".model")
"""Only these may be in a file: data that transformers reads. Never code."""

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""What configs call the number of layers."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")
MAX_SIZE = 64 * 2**20
_WRITTEN = re.compile(
    r"(config|generation_config|tokenizer[\w.-]*|special_tokens_map|added_tokens|vocab|tekken|chat_template"
    r"|[\w.-]*processor_config)\.json|(vocab|merges)\.txt|chat_template\.jinja"
    r"|(tokenizer[\w.-]*|spiece|sentencepiece[\w.-]*)\.model",
    re.ASCII,
)
"""The names that a writer takes: a folder may also hold logs and training data, which are nobody else's business."""
_PIECE = re.compile(rb"[^\n,]*[\n,]|[^\n,]+")


def is_carried(name: str) -> bool:
    """Whether a reader takes a file of this name: data that a model folder holds, not weights and their indexes."""
    return NAME.fullmatch(name) is not None and name.endswith(SUFFIXES) and not name.endswith(".index.json")


def carried(folder: Path) -> dict[str, bytes]:
    """Name -> content of the folder's config and tokenizer files, in order of name; no other file is taken."""
    found = {}
    for path in sorted(folder.iterdir()):
        named = is_carried(path.name) and _WRITTEN.fullmatch(path.name)
        if named and path.is_file() and path.stat().st_size <= MAX_SIZE:
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
    runs: list[Any] = []  # [first piece, count] or list of literal pieces
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
            if not runs or isinstance(runs[-1][0], int):
                runs.append([])
            runs[-1].append(piece)
    # Literal pieces as one text (latin-1, so that any byte fits).
    runs = [run if isinstance(run[0], int) else b"".join(run).decode("latin-1") for run in runs]
    stated = {"old": None if old is None else digest(old), "new": digest(new), "size": len(new), "runs": runs}
    text = json.dumps(stated, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > 2 * MAX_SIZE:
        raise BadInput(f"a config or tokenizer file of {len(new):,} bytes is larger than a .bayou file may hold")
    return zlib.compress(text, 9)


def patched(name: str, old: bytes | None, stored: bytes) -> bytes:
    """The new file. Raises WrongBase where `old` is not the file it was made against, BadFile where it is malformed."""
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(stored, 2 * MAX_SIZE)
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


def check_layers(config: dict[str, Any], tensors: int) -> None:
    """Raises BadFile for more layers than there are tensors: a module tree of them is memory that no file backs."""
    parts = [config]
    while parts:
        part = parts.pop()
        parts += [value for value in part.values() if isinstance(value, dict)]
        for key in LAYER_COUNTS:
            value = part.get(key)
            if isinstance(value, int | float) and not value <= tensors:
                raise BadFile(f"its config.json says {key} {value}, but the file has {tensors} tensors")
