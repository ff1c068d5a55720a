"""A .bayou file taken apart and put together again, so that tests can forge one whose hashes all hold.

Written from the format's description alone, with json and hashlib: a second reader and writer beside Bayou's own.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file

import bayou


def sha(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


@dataclass
class Entry:
    name: str
    dtype: str
    shape: list[int]
    payload: bytes


@dataclass
class Forged:
    """What a file holds but for .digests and .root, which `pack` computes."""

    metadata: dict[str, str]
    entries: list[Entry] = field(default_factory=list)

    def __getitem__(self, name: str) -> Entry:
        return next(entry for entry in self.entries if entry.name == name)

    @property
    def plan(self) -> dict[str, Any]:
        return json.loads(self.metadata["plan"])

    @plan.setter
    def plan(self, value: dict[str, Any]) -> None:
        self.metadata["plan"] = json.dumps(value)

    def replace(self, name: str, payload: bytes, **changes: Any) -> None:
        """Other bytes (of U8, unless told) for an entry."""
        entry = self[name]
        entry.payload, entry.shape = payload, [len(payload)]
        for key, value in changes.items():
            setattr(entry, key, value)

    def header(self) -> dict[str, Any]:
        """The safetensors header, .digests and .root included."""
        closing = [Entry(".digests", "U8", [32 * len(self.entries)], b""), Entry(".root", "U8", [32], b"")]
        sizes = [len(entry.payload) for entry in self.entries] + [32 * len(self.entries), 32]
        header: dict[str, Any] = {"__metadata__": self.metadata}
        at = 0
        for entry, size in zip(self.entries + closing, sizes, strict=True):
            header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [at, at + size]}
            at += size
        return header

    def pack(self, text: bytes | None = None) -> bytes:
        """The file, with hashes that hold; `text` stands in the header's place."""
        raw = json.dumps(self.header()).encode() if text is None else text
        raw = len(raw).to_bytes(8, "little") + raw
        digests = b"".join(sha(entry.payload) for entry in self.entries)
        return raw + b"".join(entry.payload for entry in self.entries) + digests + sha(raw + digests)


def header_of(content: bytes) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begin."""
    stop = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:stop]), stop


def take_apart(path: Path) -> Forged:
    """The parts of a sound file."""
    content = path.read_bytes()
    header, start = header_of(content)
    forged = Forged(header.pop("__metadata__"))
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if name not in (".digests", ".root"):
            begin, end = entry["data_offsets"]
            payload = content[start + begin : start + end]
            forged.entries.append(Entry(name, entry["dtype"], entry["shape"], payload))
    return forged


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a model folder's safetensors files: dtype word, shape, bytes."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        header, start = header_of(content)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = (entry["dtype"], tuple(entry["shape"]), content[start + begin : start + end])
    return found


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """sha256 and modification time of every file under the folder."""
    return {
        str(path.relative_to(folder)): (sha(path.read_bytes()).hex(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@dataclass(frozen=True)
class Made:
    """A file, and the models that it was made of."""

    base: Path
    tuned: Path
    file: Path


def everything(folder: Path) -> Made:
    """A file with coded, exact, grown, integer and unchanged tensors, and with changed and equal small files."""
    base = pico.pico("llama_gqa", folder / "base")
    tuned = pico.perturb(base, folder / "tuned", grow_vocab=6, integer_buffer=True)
    whole, old = load_file(tuned / "model.safetensors"), load_file(base / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        whole[name] = old[name]
    save_file(whole, tuned / "model.safetensors", metadata={"format": "pt"})
    bayou.compress(base, tuned, folder / "a.bayou", ratio=3, calibration="none")
    return Made(base, tuned, folder / "a.bayou")


def experts_of(folder: Path) -> Made:
    """A file with a 3-D tensor "experts", one site for each of its four matrices."""
    base, tuned = folder / "base", folder / "tuned"
    pico.pico("mixtral", base)
    g = torch.Generator().manual_seed(0)
    old = load_file(base / "model.safetensors") | {"experts": torch.randn(4, 24, 32, generator=g)}
    new = {
        name: tensor + torch.randn(tensor.shape, generator=g).to(tensor.dtype) * 0.01 for name, tensor in old.items()
    }
    save_file(old, base / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(base, tuned)
    save_file(new, tuned / "model.safetensors", metadata={"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bayou.inventory.SMALL", 0)  # or so small a tensor of no known role were stored exactly
        bayou.compress(base, tuned, folder / "a.bayou", ratio=2, calibration="none")
    return Made(base, tuned, folder / "a.bayou")
