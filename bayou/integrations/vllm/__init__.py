"""Stock vLLM serves .bayou files: a plugin that answers its question for a LoRA of a name it does not know.

    BAYOU_DELTAS=deltas VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora --max-lora-rank 64

A request for the model "sql" then finds deltas/sql.bayou. Every byte of it is verified, and the files of the base that
vLLM was started with are hashed (not its parameters, which it fuses). A file that is damaged, or of another base, is
refused. What vLLM is given then, BAYOU_MODE says:

    lora (unless set)  a PEFT adapter, written once to $BAYOU_CACHE/adapters, under the file's root. Any vLLM takes it,
                       but norms, embeddings and heads stay the base's; one line of the log says what is left out.
    packed             the file itself, as it is, with all that is in it. This is done inside vLLM, of one version: see
                       worker.py, and places.py and rows.py.

    BAYOU_DELTAS         the folder of the files; without it the plugin does nothing
    BAYOU_CACHE          where adapters and fingerprints are kept; ~/.cache/bayou unless set
    BAYOU_MAX_RANK       lora: what every matrix is cut to that has more: 8, 16, ..., 256, 320 or 512 (unless set)
    BAYOU_DELTA_MEMORY   packed: bytes of a delta in memory at most; unless set, of the largest file in the folder
    BAYOU_BASE_REVISION  a Hub id's, where vLLM was given --revision

Nothing of vLLM is imported before it calls `register`.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import stat
import tempfile
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from bayou.checkpoint import Checkpoint, atomic, cache_folder, resolve
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput, BayouError, DamagedFile, disk_error
from bayou.integrations.peft import VLLM_RANKS
from bayou.integrations.vllm.places import footprint
from bayou.restore import parse_size
from bayou.version import __version__

TIERS = VLLM_RANKS[1:]
"""Ranks that an adapter may be cut to: those of --max-lora-rank, which vLLM pads every adapter to."""

_SUFFIX = ".bayou"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", re.ASCII)
_REPORT = "bayou.json"
_CONFIGS = ("config.json", "generation_config.json")
Made = TypeVar("Made")
_log = logging.getLogger("vllm.bayou")  # below vLLM's own logger, whose handler and level it takes


@dataclass(frozen=True)
class Settings:
    """deltas: the folder of files. rank: a tier. revision: of a base that is a Hub id; None is what vLLM loads then.

    packed: BAYOU_MODE. memory: bytes of a delta at most; None: see `room`.
    """

    deltas: Path
    rank: int
    revision: str | None
    packed: bool = False
    memory: int | None = None

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "Settings | None":
        """From the variables above; None without BAYOU_DELTAS. Raises BadInput."""
        mode = environment.get("BAYOU_MODE") or "lora"
        if mode not in ("lora", "packed"):
            raise BadInput(f"BAYOU_MODE={mode}: choose lora or packed")
        if mode == "packed" and not environment.get("BAYOU_DELTAS"):
            raise BadInput("BAYOU_MODE=packed needs BAYOU_DELTAS, the folder that your .bayou files lie in")
        if not environment.get("BAYOU_DELTAS"):
            return None
        folder = Path(environment["BAYOU_DELTAS"])
        if not folder.is_dir():
            raise BadInput(f"BAYOU_DELTAS={folder} is not a folder; name the one that your .bayou files lie in")
        word = environment.get("BAYOU_MAX_RANK") or str(TIERS[-1])
        if word not in map(str, TIERS):
            raise BadInput(f"BAYOU_MAX_RANK={word}: choose {', '.join(map(str, TIERS))}, as for --max-lora-rank")
        size = environment.get("BAYOU_DELTA_MEMORY")
        revision = environment.get("BAYOU_BASE_REVISION") or None
        return cls(folder.resolve(), int(word), revision, mode == "packed", parse_size(size) if size else None)

    def room(self, dtype: torch.dtype) -> int | None:
        """Bytes of a delta at most: as told, else of the largest file that is there now; None where there is none."""
        if self.memory is not None:
            return self.memory
        sizes = []
        for path in sorted(self.deltas.glob(f"*{_SUFFIX}")):
            with contextlib.suppress(BayouError):  # which is said when the file is asked for
                sizes.append(footprint(DeltaFile(path), dtype))
        return max(sizes, default=None)


@dataclass(frozen=True)
class Expanded:
    """A file as a PEFT adapter. folder: where it lies. root: the file's. report: what `bayou export` said of it."""

    folder: Path
    root: str
    report: dict[str, Any]

    def line(self) -> str:
        """What it is and what it lacks, on one line."""
        rank, kinds = self.report["rank"], self.report["kinds"]
        left = [f"{kind['tensors']} {name}" for name, kind in kinds.items() if kind["how"] == "left out"]
        tier = next(tier for tier in TIERS if tier >= rank)
        found = [
            f"LoRA of rank {rank} (--max-lora-rank {tier} at least) of the file {self.root[:12]}",
            f"{100 * self.report['energy']:.2f} % of its delta's energy is served, "
            f"{100 * kinds['linear']['energy']:.2f} % of the linears'",
            f"left out: {', '.join(left) or 'nothing'}",
            *self.report["warnings"],
        ]
        if self.report["tokenizer"]:
            found.append(f"the base's {', '.join(self.report['tokenizer'])} stay in force")
        return "; ".join(found)


class Shelf:
    """The files of one folder, by name, as adapters for vLLM."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._refused: dict[str, tuple[tuple[Any, ...], type[BayouError], str]] = {}

    def find(self, name: str) -> Path | None:
        """NAME.bayou in the folder; None where there is none. A name is a word, so it leads nowhere else; links and
        whatever is no ordinary file are not followed either.
        """
        if not _NAME.fullmatch(name):
            return None
        path = self.settings.deltas / (name + _SUFFIX)
        try:
            return path if stat.S_ISREG(path.lstat().st_mode) else None
        except OSError:
            return None

    def adapter(self, base: str | Path, name: str) -> Expanded | None:
        """The adapter of a name, verified; None where the folder has no such file.

        base: what vLLM was started with, a folder or a Hub id. Raises BayouError for a base that is not here, and for
        a file that is damaged, of another base, or none that a LoRA could stand for. What is wrong with a file is
        remembered until it changes, so that nobody can have a large one read again and again.
        """
        return self._remembering(base, name, self._adapter)

    def packed(self, base: str | Path, name: str) -> str | None:
        """The file of a name as vLLM's worker reads it (worker.py), verified; otherwise as `adapter`."""
        return self._remembering(base, name, self._packed)

    def _remembering(self, base: str | Path, name: str, make: Callable[[Path, Path], Made]) -> Made | None:
        path = self.find(name)
        if path is None:
            return None
        folder = resolve(base, self.settings.revision)
        there = path.lstat()
        stamp = (str(folder), there.st_ino, there.st_size, there.st_mtime_ns)
        known = self._refused.get(name)
        if known is not None and known[0] == stamp:
            raise known[1](known[2])
        try:
            return make(folder, path)
        except BayouError as error:
            if type(error) is not BayouError:  # which is a disk's, and may be free again
                self._refused[name] = stamp, type(error), str(error)
            raise

    def _packed(self, base: Path, path: Path) -> str:
        from bayou.integrations.vllm.worker import check, named

        file = DeltaFile(path)
        file.verify()
        check(file, Checkpoint(base))
        others = _other_files(file, base, ())
        _log.info(
            "bayou: %s: all of the file %s is served, norms, embeddings and head too%s",
            *(path.stem, file.root[:12], f"; the base's {', '.join(others)} stay in force" if others else ""),
        )
        return named(path, file.root)

    def _adapter(self, base: Path, path: Path) -> Expanded:
        file = DeltaFile(path)
        file.verify()
        file.lean_on(base)
        target = cache_folder("adapters") / f"{file.root}-{self.settings.rank}"
        found = _kept(target, file.root)
        if found is not None:
            return found
        if target.exists():
            _log.warning("bayou: %s is not what this version has written there; writing it again", target)
        try:
            return self._expand(base, file, target)
        except BayouError:
            found = _kept(target, file.root)
            if found is None:
                raise
            return found  # another process, or another host on the same cache, was first

    def _expand(self, base: Path, file: DeltaFile, target: Path) -> Expanded:
        """Write the adapter; its folder appears whole, and says of each of its files what it is."""
        from bayou.integrations.export import export  # late: vLLM's workers, which load the plugin too, never need it

        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # A name that no one else has: containers on one cache may have the same process number.
            with tempfile.TemporaryDirectory(prefix=".", dir=target.parent, ignore_cleanup_errors=True) as made:
                work = Path(made) / target.name
                found = export(base, file.path, work, rank=self.settings.rank)
                if DeltaFile(file.path).root != file.root:
                    raise DamagedFile(f"{file.path} changed while it was read; ask again")
                report = {key: found[key] for key in ("rank", "kinds", "energy", "warnings")}
                report["tokenizer"] = _other_files(file, base)
                digests = {one.name: _digest(one) for one in sorted(work.iterdir())}
                said = {"bayou": __version__, "root": file.root, "report": report, "sha256": digests}
                with atomic(work / _REPORT) as handle:
                    handle.write(json.dumps(said, indent=1).encode())
                with contextlib.suppress(FileNotFoundError):
                    os.replace(target, Path(made) / "spoiled")
                os.replace(work, target)
        except OSError as error:
            raise disk_error(error, target) from error
        return Expanded(target, file.root, report)


def _kept(folder: Path, root: str) -> Expanded | None:
    """An adapter that some process has written, if all of its files are still what they were."""
    try:
        said = json.loads((folder / _REPORT).read_text())
        there = {path.name: _digest(path) for path in folder.iterdir() if path.name in said["sha256"]}
        same = (said["bayou"], said["root"], said["sha256"]) == (__version__, root, there)
        return Expanded(folder, root, said["report"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a cache may be absent or unreadable; writing again is always right


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _other_files(file: DeltaFile, base: Path, but: Collection[str] = _CONFIGS) -> list[str]:
    """Files, tokenizer's and chat template among them, that the fine-tune has otherwise: vLLM has one for all."""

    def differs(name: str) -> bool:
        path = base / name
        return not path.is_file() or file.read_file(name, base) != path.read_bytes()

    return [name for name in file.files if name not in but and differs(name)]


def resolver(settings: Settings) -> Any:
    """A vllm.lora.resolver.LoRAResolver over the files of a folder.

    It never raises for what is wrong with a file: that is one line of the log, and None, which vLLM answers with 404.
    Files are read and expanded one after another in a thread of its own; requests for other models go on meanwhile.
    """
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    shelf, thread = Shelf(settings), ThreadPoolExecutor(1, "bayou")

    class BayouResolver(LoRAResolver):
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            if shelf.find(lora_name) is None:
                return None
            make = shelf.packed if settings.packed else shelf.adapter
            try:
                found = await asyncio.get_running_loop().run_in_executor(thread, make, base_model_name, lora_name)
            except (BayouError, OSError) as error:
                _log.warning("bayou: %s is refused: %s", lora_name, error)
                return None
            if isinstance(found, Expanded):
                _log.info("bayou: %s: %s", lora_name, found.line())
                found = str(found.folder)
            if found is None:
                return None
            # The path has the file's root in it, and vLLM keys its prefix cache by name and path.
            number = hashlib.sha256(f"{lora_name} {found}".encode()).digest()[:7]
            return LoRARequest(lora_name, int.from_bytes(number, "big") + 1, found)

    return BayouResolver()


def register() -> None:
    """The entry point (group vllm.general_plugins): vLLM calls it in each of its processes, before anything else.

    Raises BadInput for settings that cannot be, so that the server does not start with them.
    """
    settings = Settings.read(os.environ)
    if settings is None:
        return
    if settings.packed:
        from bayou.integrations.vllm.worker import install

        install()
    from vllm.lora.resolver import LoRAResolverRegistry
    from vllm.platforms import current_platform

    if "bayou" in LoRAResolverRegistry.get_supported_resolvers():
        return
    LoRAResolverRegistry.register_resolver("bayou", resolver(settings))
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").strip().lower() not in ("1", "true"):
        _log.warning("bayou: vLLM asks for no adapters by name unless VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 is set")
    if current_platform.is_cpu() and not settings.packed:
        _log.warning(
            "bayou: on CPUs vLLM may add the adapter of its last slot to requests for the base in the same batch (its "
            "pull request 48421); give --max-loras one more than there are deltas"
        )
