"""What is in a file: bytes by kind of tensor, bits, ranks, captured energy, and the spectrum with its bit bands."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from bayou.delta import LowRank
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput
from bayou.plan import SiteRecord

BOOKKEEPING = "header, digests and Plan"


@dataclass
class Kind:
    """One kind of tensor in a file. bits: bytes * 8 / weights. energy: share of the delta's squared norm kept."""

    tensors: int = 0
    weights: int = 0
    bytes: int = 0
    ranks: list[int] = field(default_factory=list)
    formats: list[str] = field(default_factory=list)
    lost: float = 0.0

    @property
    def bits(self) -> float:
        """Bits a weight, everything counted."""
        return 8 * self.bytes / self.weights if self.weights else 0.0


def inspect(file: str | Path) -> dict[str, Any]:
    """What a .bayou file holds, as plain data: version, base, method, bytes by kind, one entry a site.

    Energy is 1 - (relative Frobenius error)^2 of the deltas, as measured when the file was made. Raises BadFile,
    DamagedFile.
    """
    opened = DeltaFile(file)
    errors = opened.errors()
    kinds: dict[str, Kind] = {}
    sites = []
    for name, site in opened.sites.items():
        kind = kinds.setdefault(site.role if site.terms or site.steps else "equal but for the dtype", Kind())
        weights = site.shape[0] * site.shape[1]
        rank = sum(part[0] for term in site.terms for part in term.parts)
        kind.tensors += 1
        kind.weights += weights
        kind.bytes += opened.entry_nbytes(name)
        kind.lost += weights * errors[name] ** 2
        kind.ranks.append(rank)
        kind.formats += [word for word in _formats(site) if word not in kind.formats]
        sites.append(
            {
                "name": name,
                "shape": list(site.shape),
                "dtype": site.dtype,
                "reference": site.reference,
                "method": site.method,
                "options": site.options,
                "bytes": opened.entry_nbytes(name),
                "bits": 8 * opened.entry_nbytes(name) / weights,
                "energy": 1 - errors[name] ** 2,
            }
        )
    exact = sum(opened.entry_nbytes(name) for name in opened.exact)
    files = sum(opened.entry_nbytes(name) for name in opened.entries() if name.startswith(".file."))
    coded = sum(kind.bytes for kind in kinds.values())
    return {
        "path": str(file),
        "bytes": opened.nbytes,
        "parameters": parameters(opened),
        "self_contained": opened.self_contained,
        "base": opened.base,
        "root": opened.root,
        "methods": sorted({site.method for site in opened.sites.values() if site.method}),
        "kinds": {
            name: {
                "tensors": kind.tensors,
                "weights": kind.weights,
                "bytes": kind.bytes,
                "bits": kind.bits,
                "ranks": [min(kind.ranks), max(kind.ranks)],
                "formats": kind.formats,
                "energy": 1 - kind.lost / kind.weights,
            }
            for name, kind in kinds.items()
        },
        "exact": {"tensors": len(opened.exact), "bytes": exact},
        "unchanged": len(opened.unchanged),
        "files": {"names": opened.files, "bytes": files},
        "bookkeeping": opened.nbytes - coded - exact - files,
        "sites": sites,
    }


def parameters(opened: DeltaFile) -> int:
    """Numbers that a file holds: those of its exact tensors, of its sites with steps, and of other sites' terms.

    Scales and gains do not count.
    """
    exact = sum(prod(opened.exact_shape(name)) for name in opened.exact)
    exact += sum(prod(site.shape) for site in opened.sites.values() if site.steps)
    terms = ((term, site.shape) for site in opened.sites.values() for term in site.terms if not site.steps)
    return exact + sum(prod(size) for term, shape in terms for _, size in term.matrices(shape))


def _formats(site: SiteRecord) -> list[str]:
    words = [word for term in site.terms for _, u, v in term.parts for word in (u, v) if word]
    return [*words, "steps"] if site.steps else words


def table(found: dict[str, Any]) -> Group:
    """`inspect`'s answer for people."""
    shown = Table(title=f"{found['path']}: {found['bytes']:,} bytes, {' + '.join(found['methods']) or 'nothing coded'}")
    for heading in ("", "tensors", "bytes", "bits a weight", "ranks", "stored as", "energy kept"):
        shown.add_column(heading, justify="left" if heading in ("", "stored as") else "right")
    for name, kind in found["kinds"].items():
        low, high = kind["ranks"]
        ranks = "" if not high else str(high) if low == high else f"{low}-{high}"
        words = (str(kind["tensors"]), f"{kind['bytes']:,}", f"{kind['bits']:.3f}", ranks)
        shown.add_row(name, *words, " ".join(kind["formats"]), f"{100 * kind['energy']:.2f} %")
    shown.add_row("exact", str(found["exact"]["tensors"]), f"{found['exact']['bytes']:,}", "", "", "", "100 %")
    shown.add_row("unchanged", str(found["unchanged"]), "0", "", "", "", "100 %")
    shown.add_row("config, tokenizer", str(len(found["files"]["names"])), f"{found['files']['bytes']:,}")
    share = 100 * found["bookkeeping"] / found["bytes"]
    shown.add_row(BOOKKEEPING, "", f"{found['bookkeeping']:,}", "", "", f"{share:.2f} % of the file")
    base = found["base"]
    whose = "none" if found["self_contained"] else f"{base['id'] or 'a local folder'}, root {base['root'][:16]}"
    return Group(shown, f"base: {whose}   file root: {found['root'][:16]}   numbers: {found['parameters']:,}")


def verify(
    file: str | Path, base: str | Path | None = None, progress: Callable[[str, int, int], None] | None = None
) -> dict[str, Any]:
    """Check every byte of a file and, given a base, rehash all of its tensors that the file uses.

    progress: see DeltaFile.verify.
    Raises BadFile, DamagedFile or WrongBase; returns what was checked.
    """
    opened = DeltaFile(file)
    entries = opened.verify(progress)
    if base is not None:
        checkpoint = opened.lean_on(base)
        if checkpoint is not None:
            opened.check_base(checkpoint, rehash=True)
    return {
        "path": str(file),
        "bytes": opened.nbytes,
        "entries": entries,
        "root": opened.root,
        "base_tensors": len(opened.used()) if base is not None else 0,
    }


def spectrum(opened: DeltaFile, name: str) -> list[tuple[str, list[float]]]:
    """(number format of v, singular values) of each block of a site's low-rank term, largest blocks first.

    A rank's value is |u_k| |v_k| of the stored factors: the singular value, but for the rounding.
    """
    bands = []
    for term in opened.delta(name).terms:
        if isinstance(term, LowRank):
            for u, v in term.blocks:
                sizes = u.unpack().double().norm(dim=0) * v.unpack().double().norm(dim=1) * abs(term.gain)
                bands.append((str(v.spec), sizes.tolist()))
    return bands


def plot(file: str | Path, out: str | Path, site: str | None = None) -> None:
    """Draw the singular spectrum of some sites with their bit bands, as PNG, SVG or PDF by `out`'s ending.

    site: a name; None takes one matrix of each kind of shape from the middle of the model. Raises BadInput where
    no low-rank term is to be drawn, matplotlib is missing, or cannot write a file of that ending.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("--plot needs matplotlib: pip install 'bayou[plot]'") from None
    endings = Figure().canvas.get_supported_filetypes()
    if Path(out).suffix[1:].lower() not in endings:
        raise BadInput(f"--plot {out}: matplotlib draws files that end in .{', .'.join(sorted(endings))}")
    opened = DeltaFile(file)
    names = [site] if site else _examples(opened)
    if site and site not in opened.sites:
        raise BadInput(f"{file} has no site {site!r}; `bayou inspect --json` lists them")
    drawn = [(name, bands) for name in names if (bands := spectrum(opened, name))]
    if not drawn:
        raise BadInput(f"{file} has no low-rank terms, so there is no spectrum to draw")
    drawn = drawn[:6]
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
    for place, (name, bands) in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, place + 1)
        start = 0
        labels: dict[str, Any] = {}
        for spec, values in bands:
            bits = {"f16": "16", "bf16": "16", "f32": "32"}.get(spec) or spec[0]
            colour = f"C{(int(bits) - 1) % 10}"
            x = range(start + 1, start + len(values) + 1)
            axes.axvspan(start + 0.5, start + len(values) + 0.5, color=colour, alpha=0.12, lw=0)
            (line,) = axes.plot(x, values, color=colour, lw=1.6, marker="." if len(values) < 4 else None)
            labels.setdefault(f"{bits} bit", line)
            start += len(values)
        axes.set_yscale("log")
        axes.set_xscale("log")
        axes.set_title(name.removesuffix(".weight"), fontsize=8)
        axes.set_xlabel("rank", fontsize=8)
        axes.set_ylabel("singular value of the delta", fontsize=8)
        axes.legend(list(labels.values()), list(labels), fontsize=7)
    figure.savefig(str(out), dpi=140)


def _examples(opened: DeltaFile) -> list[str]:
    """For each kind of matrix (its name without the layer number), the one in the middle of the model."""
    kinds: dict[str, list[str]] = {}
    for name, record in opened.sites.items():
        if record.terms:
            kinds.setdefault("".join("#" if c.isdigit() else c for c in name).replace("##", "#"), []).append(name)
    return [names[len(names) // 2] for names in kinds.values()]


def as_json(found: dict[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(found, default=lambda value: value.tolist() if isinstance(value, torch.Tensor) else str(value))
