"""The .bayou file: written once, atomically; read lazily, every byte checked. README.md specifies it byte by byte.

    8 bytes, header    safetensors; __metadata__ has format, version, base, plan, unchanged, files
    sites              one U8 entry a coded matrix, in the Plan's order: its terms, every section on 16 bytes; its steps
    exact tensors      in their own dtypes, under their own names ("name[rows:]": the rows that a vocabulary grew by)
    .fidelity          F16: relative Frobenius error of each site's delta
    .base              32 bytes a base tensor used: its fingerprint
    .file.NAME         config and tokenizer files, as differences from the base's (see sidecar.py)
    .digests           32 bytes an entry before it: its sha256
    .root              sha256 of header and .digests

A flipped bit is therefore an error anywhere: in a tensor's entry when that is read, elsewhere when the file is opened,
and `verify` reads all.
"""

import hashlib
import json
import os
import re
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayou import coded, plan, sidecar, steps
from bayou.checkpoint import DTYPES, Checkpoint, as_tensor, read_bytes, read_header, read_into, resolve
from bayou.contents import CODED_VERSION, FILE_PREFIX, FORMAT, VERSION
from bayou.delta import Delta
from bayou.entry import unpack_terms
from bayou.errors import BadFile, BadInput, DamagedFile, Unsupported, WrongBase
from bayou.plan import SiteRecord
from bayou.staging import PIECE, Staging

SLICED = "sliced.json"
"""Marks a folder that stands in a file's place: the model of `bayou share --method slicegpt`."""
_MAX_ELEMENTS = 2**40
BASE_FIELD = re.compile(r"[\w./-]{0,300}", re.ASCII)  # the base's id and revision are printed, and asked of the Hub


def _floats(word: str) -> bool:
    return DTYPES[word].is_floating_point


def _kind(site: SiteRecord) -> tuple[Any, ...]:
    """What all parts of a tensor must have alike."""
    return site.disk_shape, site.dtype, site.anchor is None


class DeltaFile:
    """A .bayou file, opened: header, digests and small entries checked at once, tensors when they are read.

    sites: coded matrices by entry name. exact: names of exact entries. unchanged: tensors that equal the base's.
    base: {"id", "revision", "root"}. stepped: whether some site has steps. Raises BadFile, DamagedFile.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115 (kept open: entries are read lazily)
        except OSError as error:
            if (self.path / SLICED).is_file():
                raise Unsupported(
                    f"{self.path} is a folder of a model that slicegpt sliced: its shapes are no architecture's, so it "
                    "is no .bayou file and has no plain form; bayou.load takes it"
                ) from None
            raise BadFile(f"cannot open {self.path}: {error.strerror}") from None
        weakref.finalize(self, self._file.close)
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        raw, entries, metadata = read_header(self._file, self.path)
        names = list(entries)
        if metadata.get("format") != FORMAT or names[-2:] != [".digests", ".root"]:
            raise BadFile(f"{self.path} is not a .bayou file (its metadata do not say format=bayou)")
        version = metadata.get("version", "")
        if version.split(".")[0] not in (VERSION, CODED_VERSION):
            raise BadFile(
                f"{self.path} is of format version {version!r}; this Bayou reads 1 and 2; install a newer Bayou"
            )
        digests = bytes(read_bytes(self._file, entries[".digests"].start, entries[".digests"].stop))
        root = bytes(read_bytes(self._file, entries[".root"].start, entries[".root"].stop))
        if hashlib.sha256(raw + digests).digest() != root or len(digests) != 32 * (len(names) - 2):
            raise DamagedFile(
                f"{self.path}: header and digests do not give the root that was written; the file is damaged"
            )
        self._digests = {name: digests[32 * i : 32 * i + 32] for i, name in enumerate(names[:-2])}
        self._entries = entries
        self.root = root.hex()
        self.header_nbytes = len(raw)
        for name, entry in entries.items():
            if entry.dtype not in DTYPES:
                raise BadFile(f"{self.path}: entry {name!r} has dtype {entry.dtype!r}, which the format does not allow")
        base, unchanged, files = (self._json(metadata, key) for key in ("base", "unchanged", "files"))
        if not (isinstance(base, dict) and isinstance(unchanged, list) and isinstance(files, dict)):
            raise BadFile(f"{self.path}: metadata base, unchanged or files are not as specified")
        self.base: dict[str, str] = {key: str(base.get(key, "")) for key in ("id", "revision", "root")}
        for key, value in self.base.items():
            if not BASE_FIELD.fullmatch(value):
                raise BadFile(f"{self.path}: the base's {key} is {value!r:.80}")
        self.unchanged: list[str] = [str(name) for name in unchanged]
        self._files: dict[str, str] = {str(name): str(value) for name, value in files.items()}
        self._read_sites(metadata, names)
        for name in names:
            if name.startswith("."):
                self.read_raw(name)  # few bytes, which few commands read: damage to them would go unseen

    def _json(self, metadata: dict[str, str], key: str) -> Any:
        try:
            return json.loads(metadata[key])
        except (KeyError, ValueError, RecursionError) as error:
            raise BadFile(f"{self.path}: metadata {key!r} is missing or not JSON ({error})") from None

    def _read_sites(self, metadata: dict[str, str], names: list[str]) -> None:
        planned = self._json(metadata, "plan")
        count = len(planned["sites"]) if isinstance(planned, dict) and isinstance(planned.get("sites"), list) else -1
        if not 0 <= count <= len(names):
            raise BadFile(f"{self.path}: the Plan is not well-formed")
        self.sites = {site.name: site for site in plan.loads(metadata["plan"], names[:count])}
        self.stepped = any(site.steps for site in self.sites.values())
        if any(s.steps or s.coded for s in self.sites.values()) and metadata["version"].split(".")[0] == VERSION:
            raise BadFile(f"{self.path} has sites with steps or coded terms, but is of version {VERSION}")
        for name, site in self.sites.items():
            size, word = self.entry_nbytes(name), self._entries[name].dtype
            if word != "U8" or size != site.nbytes or site.dtype not in DTYPES:
                raise BadFile(f"{self.path}: entry {name!r} has {size:,} bytes, its Plan says {site.nbytes:,}")
            if prod(site.shape) > _MAX_ELEMENTS:
                raise BadFile(f"{self.path}: site {name!r} claims a matrix of {site.shape}")
        self.exact = [name for name in names[count:] if not name.startswith(".")]
        self._tails = {name.rpartition("[")[0]: name for name in self.exact if name.endswith(":]")}
        stored = [name[len(FILE_PREFIX) :] for name in names if name.startswith(FILE_PREFIX)]
        self.files = sorted([*self._files, *stored])
        for name in self.files:
            if not sidecar.is_carried(name):
                raise BadFile(f"{self.path}: a file named {name!r} is not one that a model folder holds")
        if self._entries.get(".fidelity") is None or self._entries[".fidelity"].shape != (count,):
            raise BadFile(f"{self.path}: .fidelity is missing or of the wrong length")
        if ".base" not in self._entries:
            raise BadFile(f"{self.path}: .base is missing")
        self._check_tensors()
        self._check_anchors()

    def _check_tensors(self) -> None:
        """Raises BadFile unless each tensor stands once: whole, in parts 0, 1, ... of one kind, exact, or unchanged."""
        parts: dict[str, list[SiteRecord]] = {}
        for site in self.sites.values():
            parts.setdefault(site.tensor, []).append(site)
            if not _floats(site.dtype):
                raise BadFile(f"{self.path}: site {site.name!r} has dtype {site.dtype}, which no matrix has")
        for tensor, sites in parts.items():
            numbered = [site.part for site in sites]
            if numbered not in ([None], list(range(len(sites)))) or len({_kind(s) for s in sites}) > 1:
                raise BadFile(
                    f"{self.path}: the parts of {tensor!r} are not 0, 1, ... of one shape, dtype and kind of reference"
                )
        whole = [*parts, *self.unchanged]
        for name in self.exact:
            if not name.endswith(":]"):
                whole.append(name)
                continue
            grown, entry = self.sites.get(name.rpartition("[")[0]), self._entries[name]
            end = (
                None
                if grown is None
                else (f"{grown.tensor}[{grown.disk_shape[0]}:]", grown.dtype, grown.disk_shape[1:])
            )
            if end != (name, entry.dtype, entry.shape[1:]) or not entry.shape:
                raise BadFile(f"{self.path}: the rows {name!r} do not continue a site")
        if len(set(whole)) != len(whole):
            raise BadFile(f"{self.path}: a tensor stands twice")

    def _check_anchors(self) -> None:
        shapes = {name: self.exact_shape(name) for name in self.exact if _floats(self.exact_dtype(name))}
        parts: dict[str, int] = {}
        for site in self.sites.values():
            if site.anchor is not None:
                continue
            parts[site.tensor] = parts.get(site.tensor, 0) + 1
            shape = site.disk_shape if site.part is None else (parts[site.tensor], *site.disk_shape)
            tail = self.tail(site.tensor)
            grown = self.exact_shape(tail)[0] if tail else 0
            shapes[site.tensor] = (shape[0] + grown, *shape[1:])
        try:
            plan.check_anchors(self.sites.values(), shapes)
            plan.check_expansion(self.sites.values(), self.nbytes)
        except BadFile as error:
            raise BadFile(f"{self.path}: {error}") from None

    @property
    def self_contained(self) -> bool:
        """Whether the model can be made without any base."""
        return not self.used() and not self._files

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self._entries[".root"].stop

    def entry_nbytes(self, name: str) -> int:
        """Bytes of one entry."""
        return self._entries[name].stop - self._entries[name].start

    def entries(self) -> list[str]:
        """Names of all entries, in the order of the file."""
        return list(self._entries)

    def read_raw(self, name: str) -> bytearray:
        """An entry's bytes. Raises DamagedFile where they are not those that were written."""
        entry = self._entries[name]
        raw = read_bytes(self._file, entry.start, entry.stop)
        if name in self._digests and hashlib.sha256(raw).digest() != self._digests[name]:
            raise self._damaged(name)
        return raw

    def _damaged(self, name: str) -> DamagedFile:
        return DamagedFile(f"{self.path}: entry {name!r} is damaged (its sha256 is not the one that was written)")

    def delta(self, name: str) -> Delta:
        """The delta of one site, checked. Raises Unsupported, see check_linear."""
        self.check_linear()
        return self.with_steps(name)[0]

    def with_steps(self, name: str) -> tuple[Delta, memoryview]:
        """The delta of one site, checked, and the steps that follow when it has been restored (empty for none)."""
        site, raw = self.sites[name], self.read_raw(name)
        terms = coded.terms(raw, site, f"{self.path}: {name}")
        return Delta(site.shape, terms, site.reference, site.gain), memoryview(raw)[site.nbytes - site.steps :]

    def check_linear(self) -> None:
        """Raises Unsupported for a file with steps: its sites are no terms that something could be multiplied by."""
        way_out = "which nothing can multiply by; bayou restore writes its model, bayou.load holds it whole"
        if self.stepped:
            raise Unsupported(f"{self.path} is a fine-tune bit for bit, {way_out}")

    def deltas(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Delta]:
        """The deltas of several sites on `device`, checked, by name.

        Threads read and hash them, and copy them to a GPU piece by piece out of page-locked memory.
        """
        wanted, device = list(dict.fromkeys(names)), torch.device(device)
        # The largest first, so that no thread ends with one when all others are through.
        order = sorted(wanted, key=lambda name: -self.entry_nbytes(name))
        staging = None if device.type == "cpu" else Staging(device)

        def one(name: str) -> Delta:
            if staging is None or self.sites[name].coded:
                return self.delta(name).to(device)
            return self._staged(name, staging, device)

        with ThreadPoolExecutor(min(16, os.cpu_count() or 1), "load") as pool:
            found = dict(zip(order, pool.map(one, order), strict=True))
        return {name: found[name] for name in wanted}

    def _staged(self, name: str, staging: Staging, device: torch.device) -> Delta:
        self.check_linear()
        site, entry = self.sites[name], self._entries[name]
        placed, digest = torch.empty(site.nbytes, dtype=torch.uint8, device=device), hashlib.sha256()
        for start in range(0, site.nbytes, PIECE):
            count = min(PIECE, site.nbytes - start)
            piece = staging.buffer[:count].numpy().data
            read_into(piece, self._file, entry.start + start)
            digest.update(piece)
            staging.copy(count, placed[start : start + count])
        if digest.digest() != self._digests[name]:
            raise self._damaged(name)
        return Delta(site.shape, unpack_terms(placed, site.terms, site.shape), site.reference, site.gain)

    def read_exact(self, name: str) -> Tensor:
        """An exact tensor ("name") or grown rows ("name[32000:]"), checked."""
        entry = self._entries[name]
        return as_tensor(self.read_raw(name), DTYPES[entry.dtype], entry.shape)

    def exact_shape(self, name: str) -> tuple[int, ...]:
        """Shape of an exact entry."""
        return self._entries[name].shape

    def exact_dtype(self, name: str) -> str:
        """Dtype word of an exact entry."""
        return self._entries[name].dtype

    def errors(self) -> dict[str, float]:
        """Relative Frobenius error of each site's delta, measured when the file was made."""
        return dict(zip(self.sites, self.read_exact(".fidelity").tolist(), strict=True))

    def tail(self, tensor: str) -> str | None:
        """The exact entry with the rows that `tensor` has beyond its reference, if any."""
        return self._tails.get(tensor)

    def tensors(self) -> list[str]:
        """Disk names of all of the fine-tune's tensors, sorted."""
        whole = {name for name in self.exact if not name.endswith(":]")}
        return sorted({site.tensor for site in self.sites.values()} | whole | set(self.unchanged))

    def used(self) -> list[str]:
        """Names of the base's tensors that the file leans on, sorted as the fingerprints in .base are."""
        references = {site.base_reference for site in self.sites.values()}
        return sorted({name for name in references if name is not None} | set(self.unchanged))

    def lean_on(self, base: str | Path | None, revision: str | None = None) -> Checkpoint | None:
        """The base, found and compared; None for a self-contained file, whose base is not even looked at.

        Raises BadInput where a base is needed and none is given, WrongBase for another one.
        """
        if self.self_contained:
            if self._entries[".base"].shape != (0,):
                raise BadFile(f"{self.path} leans on no base, but .base is not empty")
            return None
        if base is None:
            whose = self.base["id"] or "a local folder"
            raise BadInput(
                f"{self.path} leans on {len(self.used())} tensors of its base ({whose}); give the base before the file"
            )
        checkpoint = Checkpoint(resolve(base, revision or self.base["revision"] or None))
        self.check_base(checkpoint)
        return checkpoint

    def check_base(self, base: Checkpoint, *, rehash: bool = False) -> None:
        """Raises WrongBase, naming the first differing tensor, unless `base` is what the file was made against."""
        names = self.used()
        hashes = bytes(self.read_raw(".base"))
        if len(hashes) != 32 * len(names):
            raise BadFile(f"{self.path}: .base has {len(hashes) // 32} fingerprints for {len(names)} tensors")
        wanted = f"{self.path} was made against {self.base['id'] or 'another base'} (root {self.base['root'][:12]})"
        for name in names:
            if name not in base:
                raise WrongBase(
                    f"{wanted}, but {base.folder} has no tensor {name!r}; pass the base it was made against"
                )
        found = base.fingerprints(names, rehash=rehash)
        for index, name in enumerate(names):
            if found[name] != hashes[32 * index : 32 * index + 32]:
                raise WrongBase(f"{wanted}, but {name!r} differs in {base.folder}; pass the base it was made against")
        self._check_shapes(base)

    def _check_shapes(self, base: Checkpoint) -> None:
        for site in self.sites.values():
            if site.base_reference is None:
                continue
            shape = base.shape(site.base_reference)
            inside = site.reference_part is None or (site.reference_part,) < shape[:1]
            shape = shape if site.reference_part is None else shape[1:]
            fits = (
                inside
                and len(shape) == len(site.disk_shape)
                and shape[1:] == site.disk_shape[1:]
                and shape[:1] >= site.disk_shape[:1]
            )
            if not fits:
                raise BadFile(f"{self.path}: site {site.name!r} is {site.disk_shape}, its reference {shape}")

    def verify(self, progress: Callable[[str, int, int], None] | None = None) -> int:
        """Read and check every entry, and decode the structure of each site; returns the entries checked.

        progress: called with ("entries", done, all) after each entry.
        """
        for done, name in enumerate(self._entries):
            self.read_raw(name)
            if progress is not None:
                progress("entries", done + 1, len(self._entries))
        for name, site in self.sites.items():
            section = self.with_steps(name)[1]
            if site.steps:
                steps.check(section, site.shape, DTYPES[site.dtype].itemsize, f"{self.path}: {name}")
        return len(self._entries)

    def read_file(self, name: str, base_folder: Path | None) -> bytes:
        """A config or tokenizer file of the fine-tune, whole, also where a difference from the base's is stored."""
        path = None if base_folder is None else base_folder / name
        old = path.read_bytes() if path is not None and path.is_file() else None
        if FILE_PREFIX + name in self._entries:
            return sidecar.patched(name, old, bytes(self.read_raw(FILE_PREFIX + name)))
        if name not in self._files:
            raise BadFile(f"{self.path} holds no {name}")
        if old is None or sidecar.digest(old) != self._files[name]:
            raise WrongBase(
                f"the base's {name} is not the one that {self.path} was made against; use the base's own revision"
            )
        return old

    def fine_tune_config(self, base_folder: Path | None) -> dict[str, Any]:
        """The fine-tune's config.json. Raises BadFile where that is no JSON object or says more layers than tensors."""
        try:
            config = json.loads(self.read_file("config.json", base_folder))
        except (ValueError, RecursionError) as error:
            raise BadFile(f"{self.path}: its config.json is not JSON ({error})") from None
        if not isinstance(config, dict):
            raise BadFile(f"{self.path}: its config.json is not a JSON object")
        try:
            sidecar.check_layers(config, len(self.tensors()))
        except BadFile as error:
            raise BadFile(f"{self.path}: {error}") from None
        return config
