"""Every tensor of a fine-tune, through one door: coded against the base, kept exactly, or equal to the base's.

Names are matched across the prefixes that wrappers add (a vision-language model over a text base has
"language_model.", some GPT-2 files lack "transformer."), heads to the embedding they were tied to, grown vocabularies
to the rows that the base has. What is small, odd-shaped, integral or without a counterpart is stored as it is.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from bayou import methods
from bayou.checkpoint import Checkpoint
from bayou.contents import Exact
from bayou.decompose import Matrix
from bayou.delta import ROWS, Delta
from bayou.errors import BadInput, Unsupported
from bayou.plan import SELF, STEPPED, SiteRecord
from bayou.skeleton import Place

LEAST_SIDE = 16
"""A matrix with a shorter side than this is stored exactly: factors would hardly be smaller."""

SMALL = 2**20
"""Bytes up to which a matrix of no known role (a router, a small positional table) is stored exactly."""

KEEP = {
    "embeddings": ("embedding", "head"),
    "heads": ("head",),
    "norms": ("norm",),
    "biases": ("bias",),
    "linears": ("linear",),
    "experts": ("expert",),
}
"""What `keep` may name, and the roles that each means."""

_WRAPPERS = {"model", "language_model", "transformer", "text_model", "base_model", "module"}
_BLOCK = 64 * 2**20
_THREADS = 4


class Reads(Protocol):
    """A checkpoint, or one whose tensors may be on the device already (see ahead.py)."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop of a tensor, in its own dtype."""
        ...


@dataclass(frozen=True)
class Inventory:
    """sites: coded matrices, their ranks not chosen yet. exact: stored as they are. unchanged: equal to the base's."""

    sites: list[SiteRecord]
    exact: list[Exact]
    unchanged: list[str]


def natural(name: str) -> list[Any]:
    """Sort key by which layer 10 comes after layer 9."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name)]


def canonical(name: str) -> str:
    """The name without the prefixes by which wrappers differ."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)


def match(
    base: Checkpoint, tuned: Checkpoint, base_places: dict[str, Place], places: dict[str, Place]
) -> dict[str, str]:
    """Disk name in the fine-tune -> disk name in the base. Tensors without a counterpart are absent."""
    by_canonical: dict[str, list[str]] = {}
    for name in base.names():
        by_canonical.setdefault(canonical(name), []).append(name)
    tied = {canonical(path): name for name, place in base_places.items() for path in place.also}
    found = {}
    for name in tuned.names():
        if name in base:
            found[name] = name
        elif len(by_canonical.get(canonical(name), ())) == 1:
            found[name] = by_canonical[canonical(name)][0]
        elif name in places and canonical(places[name].path) in tied:
            found[name] = tied[canonical(places[name].path)]
    return found


def take(
    base: Checkpoint,
    tuned: Checkpoint,
    matched: dict[str, str],
    places: dict[str, Place],
    *,
    method: str,
    options: dict[str, Any],
    tables: dict[str, Any],
    keep: tuple[str, ...] = (),
    device: torch.device | str = "cpu",
) -> Inventory:
    """Decide what stands for each tensor of the fine-tune; reads both checkpoints once, in blocks of rows.

    They are compared on `device`; for a GPU several threads read.

    tables: options of embeddings and heads, and "method" where they have one of their own.
    keep: words of KEEP, or regular expressions that a disk name fully matches; such tensors are stored exactly.
    Raises Unsupported, naming the tensor, for a dtype that cannot be read, and for weights that are not finite where
    they have changed and would have to be coded (a method that is exact stores such a tensor as it is).
    """
    kept = _keeper(keep)
    stepped = bool(getattr(methods.get(method), "EXACT", False))
    sites: list[SiteRecord] = []
    exact: list[Exact] = []
    unchanged: list[str] = []
    table_method = tables.get("method", method)
    table_options = {key: value for key, value in tables.items() if key != "method"}
    if table_method == method:
        table_options = options | table_options
    table_options = methods.check(table_method, table_options)

    names = sorted(tuned.names(), key=natural)
    shared = {name: _shared_rows(base, matched.get(name), tuned.shape(name)) for name in names}
    compared = _compared(base, tuned, matched, {n: rows for n, rows in shared.items() if rows}, device)
    for name in names:
        check_name(tuned, name)
        place = places.get(name)
        role = place.role if place else "other"
        dtype, shape = tuned.dtype(name), tuned.shape(name)
        reference = matched.get(name)
        rows = shared[name]
        if reference is not None and rows:
            same, finite = next(compared)
            if same and rows == shape[0] and base.dtype(reference) == dtype and reference == name:
                unchanged.append(name)
                continue
        else:
            same, finite = False, True
        coded = (
            dtype.is_floating_point
            and rows > 0
            and (same or _codable(shape, dtype, role))
            and (same or not stepped or tuned.word(name) in STEPPED)
            and not (kept(name, role) and not same)
        )
        if coded and not finite and not same and not stepped:
            raise Unsupported(
                f"{tuned.folder}: tensor {name!r} (or the base's) holds NaN or infinite values; mend the checkpoint"
            )
        if not coded or not finite or reference is None:
            exact.append(_exact(tuned, name))
            continue
        if rows < shape[0]:
            exact.append(_exact(tuned, name, rows))
        table = role in ("embedding", "head", "other")
        chosen = ("", {}) if same else (table_method, table_options) if table else (method, options)
        sites += _records(name, reference, (rows, *shape[1:]), tuned.word(name), place, role, *chosen)
    return Inventory(sites, exact, unchanged)


def check_name(checkpoint: Checkpoint, name: str) -> None:
    """Raise Unsupported for a tensor name that means something else in a .bayou file."""
    if name.startswith((".", SELF)) or name.endswith("]"):
        raise Unsupported(
            f"{checkpoint.folder}: the tensor name {name!r} has a meaning of its own in a .bayou file; rename it"
        )


def _keeper(keep: tuple[str, ...]) -> Any:
    roles = {role for word in keep for role in KEEP.get(word, ())}
    try:
        patterns = [re.compile(word) for word in keep if word not in KEEP]
    except re.error as error:
        raise BadInput(
            f"keep: {error.pattern!r} is neither one of {', '.join(KEEP)} nor a regular expression: {error}"
        ) from None
    return lambda name, role: role in roles or any(pattern.fullmatch(name) for pattern in patterns)


def _shared_rows(base: Checkpoint, reference: str | None, shape: tuple[int, ...]) -> int:
    """Rows that a tensor can take from its reference; 0 where the shapes do not go together."""
    if reference is None or not shape or shape[0] == 0:
        return 0
    old = base.shape(reference)
    if len(old) != len(shape) or old[1:] != shape[1:]:
        return 0
    return min(old[0], shape[0]) if len(shape) <= 2 else shape[0] if old == shape else 0


def _codable(shape: tuple[int, ...], dtype: torch.dtype, role: str) -> bool:
    if len(shape) < 2 or role in ("norm", "bias"):
        return False
    if role == "other" and prod(shape) * dtype.itemsize <= SMALL:
        return False
    matrix = shape[1:] if len(shape) == 3 else (shape[0], prod(shape[1:]))
    return min(matrix) >= LEAST_SIDE


def _compared(
    base: Checkpoint, tuned: Checkpoint, matched: dict[str, str], rows: dict[str, int], device: torch.device | str
) -> Iterator[tuple[bool, bool]]:
    """`_compare` of each name in `rows`, in order."""
    if torch.device(device).type == "cpu":
        for name, count in rows.items():
            yield _compare(base, matched[name], tuned, name, count, device)
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        jobs = [pool.submit(_compare, base, matched[name], tuned, name, count, device) for name, count in rows.items()]
        try:
            for job in jobs:
                yield job.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _compare(
    base: Checkpoint, reference: str, tuned: Checkpoint, name: str, rows: int, device: torch.device | str
) -> tuple[bool, bool]:
    """(whether rows :rows equal the base's once cast, whether all of the delta is finite)."""
    base.dtype(reference)  # Unsupported, naming it, before any work
    dtype = tuned.dtype(name)
    row = max(1, prod(tuned.shape(name)[1:]) * max(dtype.itemsize, 4))
    same = finite = True
    for start in range(0, rows, max(1, _BLOCK // row)):
        stop = min(start + max(1, _BLOCK // row), rows)
        new, old = tuned.read(name, start, stop).to(device), base.read(reference, start, stop).to(device)
        if dtype.is_floating_point and finite:
            finite = bool((new.float() - old.float()).isfinite().all())
        # Bits, not values: -0.0 == 0.0, but a tensor that is said to equal the base's comes back bit for bit.
        same = same and torch.equal(*(part.reshape(-1).view(torch.uint8) for part in (new, old.to(dtype))))
        if not same and not finite:
            break
    return same, finite


def _exact(tuned: Checkpoint, name: str, start: int = 0) -> Exact:
    shape = tuned.shape(name)
    if start == 0:
        return Exact(name, tuned.word(name), shape, lambda: tuned.read(name))
    return Exact(f"{name}[{start}:]", tuned.word(name), (shape[0] - start, *shape[1:]), lambda: tuned.read(name, start))


def _records(
    name: str,
    reference: str,
    shape: tuple[int, ...],
    word: str,
    place: Place | None,
    role: str,
    method: str,
    options: dict[str, Any],
) -> list[SiteRecord]:
    transposed = bool(place and place.transposed)
    disk = shape[1:] if len(shape) == 3 else shape
    matrix = (disk[0], prod(disk[1:]))
    if transposed and len(disk) == 2:
        matrix = (matrix[1], matrix[0])
    return [
        SiteRecord(
            tensor=name,
            part=part,
            shape=matrix,
            disk_shape=disk,
            dtype=word,
            transposed=transposed and len(disk) == 2,
            reference=reference,
            reference_part=part,
            gain=1.0,
            role=role,
            method=method,
            options=options,
            terms=(),
        )
        for part in (range(shape[0]) if len(shape) == 3 else (None,))
    ]


def read_matrix(checkpoint: Reads, name: str, part: int | None, site: SiteRecord, start: int, stop: int) -> Tensor:
    """Rows start:stop of a tensor in the orientation of the site's terms, (out, in), in its own dtype."""
    if part is not None:
        whole = checkpoint.read(name, part, part + 1)[0]
    elif site.transposed:
        whole = checkpoint.read(name, 0, site.disk_shape[0])
    else:
        return checkpoint.read(name, start, stop).reshape(stop - start, site.shape[1])
    matrix = whole.T if site.transposed else whole.reshape(-1, site.shape[1])
    return matrix[start:stop]


def delta_matrix(site: SiteRecord, base: Reads, tuned: Reads, device: torch.device | str) -> Matrix:
    """The site's delta, fine-tune minus base, subtracted in fp32 block by block."""

    def read(start: int, stop: int) -> Tensor:
        new = read_matrix(tuned, site.tensor, site.part, site, start, stop).to(device).float()
        if site.reference is None:
            return new
        return new - read_matrix(base, site.reference, site.reference_part, site, start, stop).to(device).float()

    return Matrix(site.shape, read)


def relative_error(matrix: Matrix, delta: Delta) -> float:
    """||matrix - delta|| / ||matrix||, Frobenius; 0 for a matrix of zeros."""
    sums: list[Tensor] = []
    for start, block in matrix.blocks():
        for first in range(0, len(block), ROWS):
            rows = block[first : first + ROWS]
            coded = delta.materialize(start + first, start + first + len(rows))
            lost = (rows.double() - coded.to(rows.device)).square().sum()
            sums.append(torch.stack([lost, rows.double().square().sum()]))
    lost_all, total = (sum(parts) for parts in zip(*torch.stack(sums).tolist(), strict=True))
    return (lost_all / total) ** 0.5 if total else 0.0
