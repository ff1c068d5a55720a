"""Hugging Face folders: lazy reading, streamed and atomic writing, and fingerprints of tensors.

We read safetensors ourselves, with pread into buffers, because a memory map of two models counts as resident memory
page by page, and because a .bayou file from a stranger deserves a strict reader: every promise about the header is
checked here, for both.
"""

import contextlib
import hashlib
import json
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bayou.errors import BadFile, BadInput, Unsupported, disk_error

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' words for the dtypes that Bayou reads and writes; the decoder's allow-list."""
WORDS = {dtype: word for word, dtype in DTYPES.items()}

MAX_HEADER = 64 * 2**20
MAX_ENTRIES = 500_000
MAX_NAME = 512
_CHUNK = 8 * 2**20


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: dtype word, shape, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def read_header(file: BinaryIO, path: Path) -> tuple[bytes, dict[str, Entry], dict[str, str]]:
    """The raw header (its 8 length bytes included), the entries in the order of the file, and the metadata.

    Raises BadFile for anything that safetensors forbids: a header too large, a name twice, holes, overlaps, bytes
    that do not fit dtype and shape, a file too short or too long.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = os.pread(file.fileno(), 8, 0)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
        raise BadFile(f"{path}: the header claims {length:,} bytes in a file of {size:,}; the file is cut or damaged")
    raw = os.pread(file.fileno(), length, 8)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata is not text")
        if len(header) > MAX_ENTRIES:
            raise ValueError(f"{len(header):,} entries")
        entries = sorted(((name, _entry(name, value, 8 + length)) for name, value in header.items()), key=_position)
        at = 8 + length
        for name, entry in entries:
            if entry.start != at:
                raise ValueError(f"{name!r} starts at byte {entry.start:,} instead of {at:,}")
            at = entry.stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadFile(
            f"{path}: the header is not well-formed ({error}); the file is damaged, or not safetensors"
        ) from None
    if at != size:
        raise BadFile(f"{path}: the header describes {at:,} bytes, the file has {size:,}; it is cut or damaged")
    return prefix + raw, dict(entries), metadata


def _position(item: tuple[str, Entry]) -> tuple[int, int]:
    return item[1].start, item[1].stop


def _entry(name: str, value: dict[str, Any], data: int) -> Entry:
    if len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(f"the name {name[:40]!r}")
    dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
    numbers = [*shape, start, stop]
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers) or len(shape) > 16:
        raise ValueError(f"{name!r} has shape {shape} at {start}:{stop}")
    if dtype in DTYPES:
        count = 1
        for n in shape:  # a product of hostile numbers would only grow: stop as soon as it is too much
            count *= n
            if count > 2**62:
                raise ValueError(f"{name!r} has shape {shape}")
        if count * DTYPES[dtype].itemsize != stop - start:
            raise ValueError(f"{name!r} has {stop - start} bytes for {dtype} {shape}")
    elif not isinstance(dtype, str) or stop < start:
        raise ValueError(f"{name!r} has dtype {dtype!r}")
    return Entry(dtype, tuple(shape), data + start, data + stop)


def read_bytes(file: BinaryIO, start: int, stop: int) -> bytearray:
    """Bytes start:stop of an open file. Raises BadFile where the file ends before."""
    buffer = bytearray(stop - start)
    read_into(memoryview(buffer), file, start)
    return buffer


def read_into(view: memoryview, file: BinaryIO, start: int) -> None:
    """Fill `view` with the file's bytes from `start` on. Raises BadFile where the file ends before."""
    done = 0
    while done < len(view):
        got = os.preadv(file.fileno(), [view[done : done + 2**30]], start + done)
        if got == 0:
            raise BadFile(f"{file.name}: the file ended at byte {start + done:,}; it changed while being read")
        done += got


def as_tensor(buffer: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The bytes as a tensor, without a copy."""
    return torch.frombuffer(buffer, dtype=dtype).view(shape) if buffer else torch.empty(shape, dtype=dtype)


def as_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, little-endian, row after row."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


class Checkpoint:
    """A Hugging Face folder's tensors, read lazily: one file of safetensors, or shards with their index.

    Raises BadInput where the folder has none, or only pickles or an adapter.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, BinaryIO] = {}
        self._entries: dict[str, tuple[str, Entry]] = {}
        for file_name in _weight_files(self.folder):
            file = self._files[file_name] = open(self.folder / file_name, "rb")  # noqa: SIM115 (kept open: read lazily)
            weakref.finalize(self, file.close)
            _, entries, _ = read_header(file, self.folder / file_name)
            for name, entry in entries.items():
                if name in self._entries:
                    raise BadInput(
                        f"{self.folder}: tensor {name!r} stands in two shards, {self._entries[name][0]} and {file_name}"
                    )
                self._entries[name] = (file_name, entry)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight files, headers included."""
        return sum(os.fstat(file.fileno()).st_size for file in self._files.values())

    @property
    def config(self) -> dict[str, Any]:
        """config.json. Raises BadInput where there is none."""
        try:
            config = json.loads((self.folder / "config.json").read_text("utf-8"))
        except FileNotFoundError:
            raise BadInput(f"{self.folder} has no config.json; a Hugging Face model folder is needed") from None
        except ValueError as error:
            raise BadInput(f"{self.folder / 'config.json'} is not JSON: {error}") from None
        assert isinstance(config, dict)
        return config

    def names(self) -> list[str]:
        """Disk names of all tensors, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape on disk."""
        return self._entries[name][1].shape

    def tensor_nbytes(self, name: str) -> int:
        """Bytes of one tensor."""
        return self._entries[name][1].stop - self._entries[name][1].start

    def word(self, name: str) -> str:
        """safetensors' word for the dtype, e.g. BF16."""
        return self._entries[name][1].dtype

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype. Raises Unsupported, naming the tensor, for one that Bayou does not read."""
        word = self.word(name)
        if word not in DTYPES:
            raise Unsupported(
                f"{self.folder}: tensor {name!r} has dtype {word}, which Bayou does not read ({', '.join(DTYPES)})"
            )
        return DTYPES[word]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop of dimension 0 (the whole of a scalar), in the tensor's own dtype, on the CPU."""
        file_name, entry = self._entries[name]
        dtype = self.dtype(name)
        if not entry.shape:
            return as_tensor(read_bytes(self._files[file_name], entry.start, entry.stop), dtype, ())
        stop = entry.shape[0] if stop is None else min(stop, entry.shape[0])
        row = prod(entry.shape[1:]) * dtype.itemsize
        buffer = read_bytes(self._files[file_name], entry.start + start * row, entry.start + stop * row)
        return as_tensor(buffer, dtype, (stop - start, *entry.shape[1:]))

    def fingerprint(self, name: str) -> bytes:
        """sha256 over (name, dtype, shape, bytes), always computed."""
        file_name, entry = self._entries[name]
        digest = hashlib.sha256(json.dumps([name, entry.dtype, list(entry.shape)]).encode() + b"\n")
        for start in range(entry.start, entry.stop, _CHUNK):
            digest.update(read_bytes(self._files[file_name], start, min(start + _CHUNK, entry.stop)))
        return digest.digest()

    def fingerprints(self, names: Iterable[str], *, rehash: bool = False) -> dict[str, bytes]:
        """Fingerprints of `names`; those of an unchanged file come from a cache in the user's cache folder.

        A file is unchanged when its path, size, modification time in nanoseconds and inode are, or when it is a blob
        of the Hub's cache, whose name is its sha256. rehash: read every byte all the same.
        """
        file_of = {name: self._entries[name][0] for name in names}
        known = {file: {} if rehash else _cached(self._key(file)) for file in set(file_of.values())}
        missing = [name for name, file in file_of.items() if name not in known[file]]
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # hashing and reading let other threads run
            for name, digest in zip(missing, pool.map(self.fingerprint, missing), strict=True):
                known[file_of[name]][name] = digest.hex()
        for file in {file_of[name] for name in missing}:
            _cache(self._key(file), known[file])
        return {name: bytes.fromhex(known[file][name]) for name, file in file_of.items()}

    def _key(self, file_name: str) -> str:
        path = (self.folder / file_name).resolve()
        if re.fullmatch(r"[0-9a-f]{64}", path.name) and path.parent.name == "blobs":
            return path.name
        stat = path.stat()
        return hashlib.sha256(json.dumps([str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino]).encode()).hexdigest()


def cache_folder(room: str) -> Path:
    """A folder of Bayou's cache: in BAYOU_CACHE, else in the user's cache folder."""
    usual = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "bayou")
    return Path(os.environ.get("BAYOU_CACHE") or usual) / room


def _cached(key: str) -> dict[str, str]:
    try:
        found = json.loads((cache_folder("fingerprints") / f"{key}.json").read_text())
        return {name: value for name, value in found.items() if re.fullmatch(r"[0-9a-f]{64}", value)}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # a cache may be absent or unreadable; hashing again is always right


def _cache(key: str, values: dict[str, str]) -> None:
    path = cache_folder("fingerprints") / f"{key}.json"
    temporary = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):  # a read-only home only costs the next run some hashing
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(json.dumps(values))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _weight_files(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder; give a Hugging Face model folder or a Hub id such as org/model")
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{index} is not an index of shards: {error!r}") from None
        for name in files:
            if not isinstance(name, str) or name != os.path.basename(name) or name.startswith("."):
                raise BadInput(f"{index} names the shard {name!r}; shards must lie in the folder itself")
            if not (folder / name).is_file():
                raise BadInput(f"{folder} lacks the shard {name} that its index names; download it again")
        return files
    found = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("adapter"))
    if len(found) == 1:
        return found
    if found:
        raise BadInput(f"{folder} has {len(found)} safetensors files and no model.safetensors.index.json")
    if (folder / "adapter_model.safetensors").is_file():
        raise BadInput(f"{folder} holds an adapter; merge it into its base first (merge_and_unload, save_pretrained)")
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
        raise BadInput(f"{folder} holds pickled weights only; save it again with safe_serialization=True")
    raise BadInput(f"{folder} has no model.safetensors and no shards")


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """A local folder as it is, or a Hub id's snapshot (fetched by huggingface_hub where it is not cached yet)."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", str(model)):
        raise BadInput(f"{model} is neither a folder nor a Hub id such as org/model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        taken, left = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"], ["consolidated*", "*/*"]
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=taken, ignore_patterns=left))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(f"{model} is not a folder here, and the Hub did not give it: {error}") from None


Producer = Callable[[], Iterable[Tensor | bytes]]


@dataclass(frozen=True)
class Output:
    """A tensor to write: name, dtype word, shape, and what produces its bytes when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    produce: Producer

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def header_bytes(outputs: list[Output], metadata: dict[str, str]) -> bytes:
    """The safetensors header of these tensors in this order, its 8 length bytes included, padded to 64 bytes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for output in outputs:
        end = at + output.nbytes
        header[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under `path` whole or not at all: temporary in the same folder, fsync, rename.

    Raises BayouError where the disk is full; nothing is left behind then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A killed process of the same number may have left one: containers repeat them.
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_safetensors(path: Path, outputs: list[Output], metadata: dict[str, str]) -> int:
    """Write a safetensors file tensor by tensor, atomically; returns its bytes."""
    with atomic(path) as file:
        file.write(header_bytes(outputs, metadata))
        for output in outputs:
            done = 0
            for piece in output.produce():
                view = as_bytes(piece) if isinstance(piece, Tensor) else memoryview(piece)
                done += file.write(view)
            if done != output.nbytes:
                raise AssertionError(f"{output.name}: {done} bytes written of {output.nbytes}")
        return file.tell()
