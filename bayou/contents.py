"""What goes into a .bayou file, written entry by entry and atomically; deltafile.py says what stands where."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bayou import plan
from bayou.checkpoint import DTYPES, Output, as_bytes, header_bytes, write_safetensors
from bayou.plan import SiteRecord

FORMAT, VERSION, CODED_VERSION = "bayou", "1", "2"
"""A file is of version 1 unless a site has steps or coded terms: then older readers must refuse it."""
FILE_PREFIX = ".file."


@dataclass(frozen=True)
class Exact:
    """A tensor, or the rows by which one grew, that the file holds as it is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Contents:
    """All that goes into a file, but for the sites' bytes.

    used: fingerprints of the base tensors that the file leans on, by name. unchanged: names of fine-tuned tensors that
    equal the base's. files: name -> sha256 of small files that equal the base's. changed_files: name -> difference.
    """

    sites: list[SiteRecord]
    exact: list[Exact]
    unchanged: list[str]
    base_id: str
    revision: str
    used: dict[str, bytes]
    files: dict[str, str]
    changed_files: dict[str, bytes]

    def metadata(self) -> dict[str, str]:
        """The file's __metadata__."""
        root = hashlib.sha256(b"".join(self.used[name] for name in sorted(self.used))).hexdigest()
        base = {"id": self.base_id, "revision": self.revision, "root": root}
        return {
            "format": FORMAT,
            "version": CODED_VERSION if any(site.steps or site.coded for site in self.sites) else VERSION,
            "base": json.dumps(base, separators=(",", ":")),
            "plan": plan.dumps(self.sites),
            "unchanged": json.dumps(self.unchanged, separators=(",", ":")),
            "files": json.dumps(self.files, separators=(",", ":")),
        }

    def _outputs(self, blob: Callable[[int], bytes], errors: list[float]) -> list[Output]:
        sites = [
            Output(site.name, "U8", (site.nbytes,), lambda index=index: [blob(index)])  # type: ignore[misc]
            for index, site in enumerate(self.sites)
        ]
        rest = [
            Output(exact.name, exact.dtype, exact.shape, lambda exact=exact: [exact.read()])  # type: ignore[misc]
            for exact in self.exact
        ]
        fidelity = torch.tensor(errors, dtype=torch.float16)
        hashes = b"".join(self.used[name] for name in sorted(self.used))
        rest.append(Output(".fidelity", "F16", (len(self.sites),), lambda: [fidelity]))
        rest.append(Output(".base", "U8", (len(hashes),), lambda: [hashes]))
        for name, content in self.changed_files.items():
            rest.append(Output(FILE_PREFIX + name, "U8", (len(content),), lambda content=content: [content]))  # type: ignore[misc]
        # Larger elements first, so that every tensor lies on a multiple of its element.
        rest.sort(key=lambda output: (-DTYPES[output.dtype].itemsize, output.name))
        return sites + rest

    def nbytes(self) -> int:
        """Bytes of the whole file."""
        outputs = self._outputs(lambda _: b"", [0.0] * len(self.sites))
        closing = _closing(len(outputs), [], {})
        return len(header_bytes(outputs + closing, self.metadata())) + sum(o.nbytes for o in outputs + closing)

    def write(self, path: Path, blob: Callable[[int], bytes], errors: list[float]) -> int:
        """Write the file; blob(i) gives the bytes of site i, errors the relative error of each. Returns its bytes."""
        digests: list[bytes] = []
        metadata = self.metadata()

        def digested(output: Output) -> Output:
            def produce() -> Iterable[Tensor | bytes]:
                digest = hashlib.sha256()
                for piece in output.produce():
                    digest.update(as_bytes(piece) if isinstance(piece, Tensor) else piece)
                    yield piece
                digests.append(digest.digest())

            return Output(output.name, output.dtype, output.shape, produce)

        outputs = [digested(output) for output in self._outputs(blob, errors)]
        return write_safetensors(path, outputs + _closing(len(outputs), digests, metadata, outputs), metadata)


def _closing(
    count: int, digests: list[bytes], metadata: dict[str, str], outputs: list[Output] | None = None
) -> list[Output]:
    """The entries .digests and .root; their bytes are known once all others have been written."""
    closing: list[Output] = []

    def root() -> list[bytes]:
        header = header_bytes((outputs or []) + closing, metadata)
        return [hashlib.sha256(header + b"".join(digests)).digest()]

    closing.append(Output(".digests", "U8", (32 * count,), lambda: [b"".join(digests)]))
    closing.append(Output(".root", "U8", (32,), root))
    return closing
