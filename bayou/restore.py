"""From the base and a .bayou file back to an ordinary Hugging Face checkpoint, loadable by anything.

Tensor by tensor: gain * reference + terms, summed in fp64 and rounded once to the fine-tune's dtype; exact and
unchanged tensors, and sites with steps, bit for bit. The base is checked before the first byte is written.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from bayou import steps
from bayou.checkpoint import DTYPES, Checkpoint, Output, atomic, write_safetensors
from bayou.deltafile import DeltaFile
from bayou.errors import BadFile, BadInput, disk_error
from bayou.inventory import read_matrix
from bayou.plan import SiteRecord

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """ "350MB" -> 350,000,000; also KB, GB, KiB, MiB, GiB or plain bytes. Raises BadInput."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise BadInput(f"{text!r} is not a size; write e.g. 350MB, 1.5GB, 64MiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


class Restorer:
    """The model's tensors, made one at a time from a base that has been checked (None: the file leans on none)."""

    def __init__(self, base: Checkpoint | None, file: DeltaFile) -> None:
        self._base, self._file, self._exact = base, file, set(file.exact)
        self._anchor: tuple[str, Tensor] | None = None  # the last one, which several sites in a row may refer to
        self._parts: dict[str, list[str]] = {}
        for name, site in file.sites.items():
            self._parts.setdefault(site.tensor, []).append(name)

    def spec(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype word and shape on disk of a tensor of the fine-tune."""
        if name in self._parts:
            site = self._file.sites[self._parts[name][0]]
            tail = self._file.tail(name)
            grown = self._file.exact_shape(tail)[0] if tail else 0
            if site.part is not None:
                return site.dtype, (len(self._parts[name]), *site.disk_shape)
            return site.dtype, (site.disk_shape[0] + grown, *site.disk_shape[1:])
        if name in self._exact:
            return self._file.exact_dtype(name), self._file.exact_shape(name)
        return self._leaned_on().word(name), self._leaned_on().shape(name)

    def _leaned_on(self) -> Checkpoint:
        assert self._base is not None  # DeltaFile.lean_on gives one wherever the file names one of its tensors
        return self._base

    def pieces(self, name: str, dtype: torch.dtype) -> Iterable[Tensor]:
        """The tensor in `dtype`, in pieces along dimension 0."""
        if name in self._parts:
            for entry in self._parts[name]:
                yield self._site(entry, dtype)
            if tail := self._file.tail(name):
                yield self._file.read_exact(tail).to(dtype)
        elif name in self._exact:
            yield self._file.read_exact(name).to(dtype)
        else:
            yield self._leaned_on().read(name).to(dtype)

    def _site(self, entry: str, dtype: torch.dtype) -> Tensor:
        site = self._file.sites[entry]
        reference = None
        if site.anchor is not None:
            if self._anchor is None or self._anchor[0] != site.anchor:
                self._anchor = site.anchor, self.tensor(site.anchor)
            reference = oriented(self._anchor[1], site.reference_part, site)
        elif site.reference is not None:
            reference = read_matrix(self._leaned_on(), site.reference, site.reference_part, site, 0, site.shape[0])
        delta, section = self._file.with_steps(entry)
        weight = delta.restore(reference, DTYPES[site.dtype] if site.steps else dtype)
        if site.steps:  # between floats of the fine-tune's own dtype
            steps.move(section, weight, f"{self._file.path}: {entry}")
            weight = weight.to(dtype)
        return (weight.T if site.transposed else weight).reshape(site.disk_shape).contiguous()

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The whole tensor, in the fine-tune's dtype unless told."""
        word, shape = self.spec(name)
        own = DTYPES[word]
        wanted = own if dtype is None or not own.is_floating_point else dtype
        pieces = list(self.pieces(name, wanted))
        return (pieces[0] if len(pieces) == 1 else torch.cat([p.reshape(-1) for p in pieces])).reshape(shape)


def oriented(whole: Tensor, part: int | None, site: SiteRecord) -> Tensor:
    """The rows of a tensor, or of its index `part`, that a site refers to, as its terms lie: (out, in)."""
    rows = (whole if part is None else whole[part])[: site.disk_shape[0]]
    return rows.T if site.transposed else rows.reshape(site.shape)


def restore(
    base: str | Path | None,
    file: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    base_revision: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write the fine-tune as a Hugging Face folder `out`; returns it.

    Args:
        base: the folder or Hub id of the base that the file was made against; None, or any, for a file that leans on
            none (`bayou share`).
        dtype: float32, float16 or bfloat16 for all floating point tensors; None keeps the fine-tune's own.
        max_shard_size: e.g. "5GB"; more than this goes to shards with an index.
        progress: called with ("tensors", done, all) after each tensor.

    Raises:
        WrongBase, before anything is written; BadFile, DamagedFile; BadInput where `out` holds a model already, or a
        base is needed and none given; BayouError for a full disk. `out` is then as it was.
    """
    opened = DeltaFile(file)
    checkpoint = opened.lean_on(base, base_revision)
    words = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    if dtype is not None and dtype not in words:
        raise BadInput(f"--dtype {dtype}: choose float32, float16 or bfloat16")
    limit = parse_size(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.glob("*.safetensors*"))):
        raise BadInput(f"{folder} exists and holds a model (or is a file); choose another folder")
    base_folder = None if checkpoint is None else checkpoint.folder
    files = {name: opened.read_file(name, base_folder) for name in opened.files}
    restorer = Restorer(checkpoint, opened)
    for name in opened.unchanged:
        if checkpoint is None or name not in checkpoint:
            raise BadFile(f"{file}: tensor {name!r} is said to equal the base's, which has none")
    outputs = []
    names = opened.tensors()
    written = 0

    def pieces(name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        nonlocal written
        yield from restorer.pieces(name, dtype)
        written += 1
        if progress is not None:
            progress("tensors", written, len(names))

    for name in names:
        word, shape = restorer.spec(name)
        target = words[dtype] if dtype and DTYPES[word].is_floating_point else word
        outputs.append(Output(name, target, shape, partial(pieces, name, DTYPES[target])))
    if dtype and "config.json" in files:
        files["config.json"] = _with_dtype(files["config.json"], dtype)
    with appearing(folder) as work:
        _write_shards(work, outputs, limit)
        for name, content in files.items():
            with atomic(work / name) as handle:
                handle.write(content)
    return folder


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to write in, whose files come to lie in `folder` at the end; half a model is worse than none.

    It lies beside `folder`, or inside where that is there already: on the same file system.
    """
    target = folder.resolve()
    work = (target if target.is_dir() else target.parent) / f".{target.name}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(work, ignore_errors=True)  # of a killed process of the same number
        work.mkdir(parents=True)
        yield work
        if target.is_dir():
            for path in sorted(work.iterdir(), key=lambda path: path.suffix == ".safetensors"):
                os.replace(path, target / path.name)
        else:
            os.replace(work, target)
    except OSError as error:
        raise disk_error(error, folder) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_shards(folder: Path, outputs: list[Output], limit: int) -> None:
    shards: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if shards[-1] and filled + output.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += output.nbytes
    for shard in shards:  # larger elements first, so that every tensor lies on a multiple of its element
        shard.sort(key=lambda o: (-DTYPES[o.dtype].itemsize, o.name))
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, {"format": "pt"})
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(prod(o.shape) * DTYPES[o.dtype].itemsize for o in outputs)},
            "weight_map": {o.name: name for name, shard in zip(names, shards, strict=True) for o in shard},
        }
        with atomic(folder / "model.safetensors.index.json") as handle:
            handle.write(json.dumps(index, indent=2).encode())


def _with_dtype(content: bytes, dtype: str) -> bytes:
    config = json.loads(content)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = dtype
    return (json.dumps(config, indent=2) + "\n").encode()
