"""Which sub-layers of a model are tied to which: the sub-layers themselves, DeltaLLM's two layouts, counts and ranks.

https://arxiv.org/abs/2501.18596: the first and the last two blocks stay whole; between them either one anchor generates
the blocks that follow it (sequential), or anchors and delta blocks take turns (alternating). An anchor always precedes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from torch import nn

from bayou.errors import BadInput, Unsupported
from bayou.skeleton import Place

KINDS: dict[str, tuple[str, ...]] = {
    "mlp": ("mlp",),
    "attention": ("attention",),
    "all": ("attention", "mlp"),
}
"""What --kinds may be, and the kinds of sub-layer that each means."""

LAYOUTS = ("sequential", "alternating")


@dataclass(frozen=True, eq=False)
class SubLayer:
    """An attention or an MLP: name is the disk names' common beginning, e.g. "model.layers.7.mlp".

    matrices: what follows name -> shape (out, in) of each of its linears, e.g. {"up_proj.weight": (1536, 576)}.
    """

    block: int
    kind: str
    name: str
    matrices: Mapping[str, tuple[int, int]]

    @property
    def parameters(self) -> int:
        """Numbers of its matrices together."""
        return sum(out * width for out, width in self.matrices.values())

    def factors(self, rank: int) -> int:
        """Numbers of factors of `rank` for each of its matrices."""
        return sum(rank * (out + width) for out, width in self.matrices.values())

    def tensors(self) -> list[str]:
        """Disk names of its matrices."""
        return [f"{self.name}.{leaf}" for leaf in self.matrices]


def sublayers(
    layers_path: str, layers: nn.ModuleList, places: Mapping[str, Place], shapes: Mapping[str, tuple[int, ...]]
) -> dict[tuple[int, str], SubLayer]:
    """(block, kind) -> sub-layer, of every child of a decoder layer that has linears of its own.

    shapes: of the disk tensors. Raises Unsupported for experts and for matrices that transformers computes.
    """
    found: dict[tuple[int, str], dict[str, tuple[int, int]]] = {}
    names: dict[tuple[int, str], str] = {}
    for name, place in places.items():
        if not place.path.startswith(layers_path + "."):
            continue
        number, _, inside = place.path[len(layers_path) + 1 :].partition(".")
        child, _, leaf = inside.partition(".")
        if place.role == "expert" or (place.converted and place.role == "other"):
            raise Unsupported(f"{name} is an expert, or computed as it is loaded; bayou share ties plain linears only")
        if place.role != "linear" or not leaf:
            continue
        kind = "attention" if "attn" in child.lower() or "attention" in child.lower() else "mlp"
        shape = shapes[name]
        key = int(number), kind
        if not name.endswith("." + leaf) or names.setdefault(key, name[: -len(leaf) - 1]) != name[: -len(leaf) - 1]:
            raise Unsupported(
                f"{name} and {names.get(key)} are not of one sub-layer; bayou share cannot tie such blocks"
            )
        found.setdefault(key, {})[leaf] = (shape[1], shape[0]) if place.transposed else (shape[0], shape[1])
    if not found:
        raise Unsupported(f"no linear lies in the {len(layers)} layers of {layers_path}; nothing can be shared")
    return {key: SubLayer(*key, names[key], matrices) for key, matrices in sorted(found.items())}


@dataclass(frozen=True)
class Dial:
    """How much is shared: numbers that the user gives, None where he leaves them open.

    reduce: share of all parameters to remove. rank: of every delta. count: delta blocks. blocks: their numbers, each
    tied to the nearest block before it that is not among them. per_anchor: delta blocks of one anchor (sequential).
    Of a search alone: budget, bytes of the whole file, in place of reduce; near, how many blocks before are tried.
    """

    layout: str = "alternating"
    kinds: str = "mlp"
    keep_ends: int = 2
    reduce: float | None = None
    rank: int | None = None
    count: int | None = None
    blocks: tuple[int, ...] = ()
    per_anchor: int | None = None
    budget: int | None = None
    near: int = 1


def reduction(reduce: float | None, ratio: float | None) -> float | None:
    """The share of parameters to remove, given as such or as parameters of the model over those left."""
    if reduce is not None and ratio is not None:
        raise BadInput(f"give --reduce ({reduce:g}) or --ratio ({ratio:g}), not both")
    if ratio is not None and not ratio > 1:
        raise BadInput(f"--ratio {ratio:g}: a number above 1 is needed, e.g. 1.14")
    return reduce if ratio is None else 1 - 1 / ratio


def arrange(dial: Dial, subs: Mapping[tuple[int, str], SubLayer], total: int) -> tuple[dict[int, int], int]:
    """Delta block -> anchor block, and the rank: as many and as large as `dial` says of a model of `total` parameters.

    With reduce alone the rank starts at a quarter of the shorter side, the fewest blocks that reach it are taken, and
    the rank is then raised to the largest that still reaches it. Raises BadInput for what the model cannot give.
    """
    if dial.layout not in LAYOUTS or dial.kinds not in KINDS:
        raise BadInput(
            f"--layout {dial.layout} --kinds {dial.kinds}: choose {' or '.join(LAYOUTS)}; {', '.join(KINDS)}"
        )
    if dial.budget is not None or dial.near != 1:
        raise BadInput("--budget and --near are for --plan search; a layout takes --reduce, --rank and --count")
    if dial.blocks and (dial.count is not None or len(set(dial.blocks)) < len(dial.blocks)):
        raise BadInput(f"--blocks {','.join(map(str, dial.blocks))}: name each once, and leave out --count")
    if dial.per_anchor is not None and (dial.blocks or dial.layout != "sequential"):
        raise BadInput(f"--per-anchor {dial.per_anchor} is for --layout sequential, without --blocks")
    layers = 1 + max(block for block, _ in subs)
    kinds = KINDS[dial.kinds]
    middle = range(dial.keep_ends, layers - dial.keep_ends)
    if dial.keep_ends < 0 or len(middle) < 2:
        raise BadInput(
            f"{layers} layers are too few to keep {dial.keep_ends} at either end and share between two others; "
            "ask for a smaller --keep-ends"
        )
    parts = [sub for kind in kinds if (sub := subs.get((middle[0], kind))) is not None]
    if not parts:
        raise BadInput(f"block {middle[0]} has no {' or '.join(kinds)}")
    most = _most(dial, middle)
    rank, count = dial.rank, len(dial.blocks) or dial.count
    if rank is not None:
        _check_rank(rank, parts)
    reduce = 0.12 if dial.reduce is None and (rank is None or count is None) else dial.reduce
    if reduce is not None:
        goal = reduce * total
        if not 0 < reduce < 1:
            raise BadInput(f"--reduce {reduce}: a share of the model's parameters between 0 and 1 is needed, e.g. 0.12")
        if count is None:
            tried = rank if rank is not None else max(1, _shortest(parts) // 4)
            count = min(most, ceil(goal / _saved(parts, tried))) if rank is None else ceil(goal / _saved(parts, tried))
        if rank is None:
            rank = _largest_rank(parts, count, goal)
        if count > most or rank is None or count * _saved(parts, rank) < goal:
            able = 100 * most * _saved(parts, rank or 1) / total
            raise BadInput(
                f"--reduce {reduce:g} cannot be reached by {min(count, most)} delta blocks"
                f"{'' if dial.rank is None else f' of rank {dial.rank}'}: {most} of them, all that the {dial.layout} "
                f"layout of {dial.kinds} holds, remove {able:.1f} %; ask for less, a smaller rank, or other kinds"
            )
    assert rank is not None and count is not None  # one or both are given, else reduce finds them
    if not 1 <= count <= most:
        raise BadInput(f"{count} delta blocks: the {dial.layout} layout has room for 1 to {most} here")
    pairs = _pairs(dial, middle, count)
    for delta, anchor in pairs.items():
        for kind in kinds:
            mine, theirs = subs.get((delta, kind)), subs.get((anchor, kind))
            if mine is None or theirs is None or mine.matrices != theirs.matrices:
                raise BadInput(
                    f"blocks {delta} and {anchor} differ in the shapes of their {kind}; choose other --blocks"
                )
    return pairs, rank


def _saved(parts: list[SubLayer], rank: int) -> int:
    return sum(sub.parameters - sub.factors(rank) for sub in parts)


def _shortest(parts: list[SubLayer]) -> int:
    return min(min(shape) for sub in parts for shape in sub.matrices.values())


def _check_rank(rank: int, parts: list[SubLayer]) -> None:
    shortest = _shortest(parts)
    if rank < 0 or rank > shortest or _saved(parts, rank) <= 0:
        even = max((r for r in range(shortest + 1) if _saved(parts, r) > 0), default=0)
        raise BadInput(
            f"rank {rank} is too large (or below 0): factors are smaller than the matrices up to rank {even}"
        )


def _largest_rank(parts: list[SubLayer], count: int, goal: float) -> int | None:
    low, high = 0, _shortest(parts)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count * _saved(parts, middle) >= goal else (low, middle - 1)
    return low or None


def _most(dial: Dial, middle: range) -> int:
    """The delta blocks that there is room for."""
    if dial.blocks:
        return len(dial.blocks)
    if dial.layout == "alternating":
        if len(middle) % 2:
            raise BadInput(
                f"the {len(middle)} blocks between the ends do not pair up for the alternating layout; choose "
                "--layout sequential, or name the delta blocks with --blocks"
            )
        return len(middle) // 2
    each = dial.per_anchor
    if each is not None and each < 1:
        raise BadInput(f"--per-anchor {each}: 1 delta block at least")
    return len(middle) - 1 if each is None else len(middle) - ceil(len(middle) / (each + 1))


def _pairs(dial: Dial, middle: range, count: int) -> dict[int, int]:
    if dial.blocks:
        chosen = sorted(set(dial.blocks))
        anchors = {b: max((a for a in range(b) if a not in chosen), default=-1) for b in chosen}
        lost = [b for b, a in anchors.items() if a < 0 or b >= middle.stop + dial.keep_ends]
        if lost:
            raise BadInput(f"--blocks {lost[0]}: no such block, or none before it that stays whole")
        return anchors
    if dial.layout == "alternating":
        room = len(middle) // 2  # evenly spread over the pairs
        firsts = [middle[0] + 2 * ((2 * i + 1) * room // (2 * count)) for i in range(count)]
        return {first + 1: first for first in firsts}
    each = dial.per_anchor or count
    pairs: dict[int, int] = {}
    at = middle.stop  # the deepest blocks, which are the most alike
    left = count
    while left:
        take = min(each, left)
        at -= take + 1
        pairs |= {at + 1 + i: at for i in range(take)}
        left -= take
    return dict(sorted(pairs.items()))
