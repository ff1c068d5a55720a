"""spending.py: whatever entropy coding makes of the sites, the file is as large as was asked for and never larger."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from bayou import methods
from bayou.contents import Contents
from bayou.errors import TooSmall
from bayou.methods import nbytes
from bayou.plan import SiteRecord
from bayou.spending import Spending


def contents(layers: int = 6) -> Contents:
    sites = []
    for name, shape, role, method in (
        ("embed", (512, 64), "embedding", "lowrank"),
        *((f"layers.{i}.{n}", shape, "linear", "auto") for i in range(layers) for n, shape in KINDS.items()),
    ):
        options = methods.check(method, {"bits": 4} if method == "lowrank" else {})
        common = {"part": None, "dtype": "BF16", "transposed": False, "reference_part": None, "gain": 1.0, "terms": ()}
        own = {"tensor": name, "reference": name, "shape": shape, "disk_shape": shape, "role": role}
        sites.append(SiteRecord(**own, **common, method=method, options=options))  # type: ignore[arg-type]
    return Contents(sites, [], [], "", "", {}, {}, {})


KINDS = {"q": (128, 128), "k": (64, 128), "down": (128, 256)}


def spend(limit: int, shrinks: Callable[[SiteRecord], float], layers: int = 6) -> tuple[int, int]:
    """Bytes of the file, and how many sites were encoded, again ones too; shrinks: coded bytes over bytes."""
    start = contents(layers)
    spending, encoded = Spending(start, limit, "--ratio 16", 0.5), 0
    turns = [[0], *([1 + 3 * i, 2 + 3 * i] if half else [3 + 3 * i] for i in range(layers) for half in (1, 0))]
    for turn in turns:
        for attempt in range(99):
            spending.turn(turn, attempt)
            records = {}
            for index in turn:
                site = replace(spending.sites[index], coded=0)
                whole = nbytes(site.terms, site.shape)
                small = int(shrinks(site) * whole) // 16 * 16
                records[index] = replace(site, coded=small if small + 32 < whole else 0)  # as coded.encode decides
                encoded += 1
            if spending.settle(records):
                break
    return replace(start, sites=spending.sites).nbytes(), encoded


@pytest.mark.parametrize("limit", [60_000, 80_000, 100_000])
@pytest.mark.parametrize(
    "shrinks",
    [
        lambda site: 0.86,
        lambda site: 1.0,
        lambda site: 0.65,
        lambda site: {"q": 0.95, "k": 0.7, "n": 0.85}.get(site.tensor[-1], 0.8),
        lambda site: 0.7 + 0.05 * (int(site.tensor.split(".")[1]) if "." in site.tensor else 0),  # ever less
        lambda site: 1.0 if site.tensor == "layers.5.down" else 0.8,  # the very last is a surprise
        lambda site: 0.75 + site.options["rank"] / 500,
    ],
)
def test_the_size_is_met_whatever_shrinks(limit: int, shrinks: Callable[[SiteRecord], float]) -> None:
    size, encoded = spend(limit, shrinks)
    assert 0.99 * limit <= size <= limit
    assert encoded <= 19 + 1 + 3 + 5  # all sites, first turns again, and the last one a few times


def test_where_bytes_are_scarce_nothing_is_relied_on() -> None:
    with pytest.raises(TooSmall, match="--ratio 16 is 100 bytes, but the least that this method can make") as error:
        spend(100, lambda site: 1.0)
    least = error.value.least
    for extra in (0, 500, 5000):
        assert spend(least + extra, lambda site: 1.0)[0] <= least + extra
        assert spend(least + extra, lambda site: 0.8 if site.tensor < "layers.4" else 1.0)[0] <= least + extra


def test_a_size_beyond_all_need_is_no_reason_to_try_again() -> None:
    _, encoded = spend(10**9, lambda site: 0.86)
    assert encoded == 19


def test_ranks_are_those_of_an_even_share_where_all_shrink_alike() -> None:
    """All layers alike, but for what a first guess and the last bytes move."""
    start = contents()
    spending = Spending(start, 90_000, "--ratio 16", 0.5)
    ranks = [spending.sites[i].options["rank"] for i in range(1, 19, 3)]
    assert max(ranks) - min(ranks) <= 1
    assert spending.sites[0].options["rank"] < min(spending.sites[0].shape)
