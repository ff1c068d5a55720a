"""allocate.py: the largest ranks that fit a budget, never a byte over, and the least size is named and reachable."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pico import perturb, pico

from bayou import methods
from bayou.allocate import TABLES, allocate, by_paper, fixed, least, paper_rank, with_rank, within
from bayou.compress import compress
from bayou.errors import TooSmall
from bayou.methods.deltacome import parse_bands
from bayou.plan import SiteRecord

DIALLED = [name for name in methods.names() if methods.has_rank(name)]


def site(name: str, shape: tuple[int, int], method: str, role: str = "linear", **options: Any) -> SiteRecord:
    return SiteRecord(
        tensor=name,
        part=None,
        shape=shape,
        disk_shape=shape,
        dtype="BF16",
        transposed=False,
        reference=name,
        reference_part=None,
        gain=1.0,
        role=role,
        method=method,
        options=methods.check(method, options),
        terms=(),
    )


def model(method: str, layers: int = 6, width: int = 192, inner: int = 512, vocab: int = 2000) -> list[SiteRecord]:
    """Sites of a small Llama, embedding and head included, in the table method's own options."""
    table = methods.get(method).EMBEDDINGS
    options = {key: value for key, value in table.items() if key != "method"}
    own = table.get("method", method)
    sites = [
        site("embed", (vocab, width), own, "embedding", **options),
        site("head", (vocab, width), own, "head", **options),
    ]
    for i in range(layers):
        sites += [site(f"{i}.{name}", (width, width), method) for name in "qo"]
        sites += [site(f"{i}.{name}", (inner, width), method) for name in ("gate", "up")]
        sites.append(site(f"{i}.down", (width, inner), method))
    return sites


def total(sites: list[SiteRecord]) -> int:
    return sum(record.nbytes for record in sites)


def least_of(sites: list[SiteRecord]) -> int:
    return total(least(sites))


def run(sites: list[SiteRecord], budget: int, embedding_rate: float = 0.5) -> list[SiteRecord]:
    return allocate(sites, budget, embedding_rate=embedding_rate)


# ------------------------------------------------------------------------------------------------ the budget


@pytest.mark.parametrize("method", methods.names())
def test_never_a_byte_over_and_less_than_one_step_under(method: str) -> None:
    sites = model(method)
    smallest = least_of(sites)
    source = random.Random(method)
    for budget in [smallest, smallest + 1, *(int(smallest * source.uniform(1, 6)) for _ in range(12))]:
        chosen = run(sites, budget, source.choice((0.25, 0.5, 1.0, 2.0)))
        left = budget - total(chosen)
        assert left >= 0
        for record in chosen:
            if methods.has_rank(record.method) and record.options["rank"] < min(record.shape):
                more = with_rank(record, record.options["rank"] + 1)
                assert more.nbytes - record.nbytes > left, (budget, record.name)


@pytest.mark.parametrize("method", DIALLED)
def test_a_budget_beyond_all_need_gives_every_rank_and_no_more(method: str) -> None:
    chosen = run(model(method, layers=1), 10**12)
    assert [record.options["rank"] for record in chosen] == [min(record.shape) for record in chosen]


@pytest.mark.parametrize("method", methods.names())
def test_the_least_is_rank_one_and_what_a_budget_below_it_gets(method: str) -> None:
    sites = model(method)
    smallest = least(sites)
    for record in smallest:
        assert record.options.get("rank", 1) == 1
        assert record.terms == methods.get(record.method).layout(record.shape, **record.options)
    for budget in (total(smallest), total(smallest) - 1, 0, -5000):
        assert run(sites, budget) == smallest


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = pico("llama_gqa", folder / "base")
    return base, perturb(base, folder / "tuned")


@pytest.mark.parametrize("method", methods.names())
def test_too_small_names_the_least_file_which_can_be_had(method: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "x.bayou"
    given: dict[str, Any] = {"method": method, "calibration": "none", "distill_steps": 0}
    with pytest.raises(TooSmall) as error:
        compress(*pair, out, ratio=100_000, **given)
    smallest = error.value.least
    assert f"{smallest:,} bytes" in str(error.value) and "--ratio 100000 is" in str(error.value)
    assert "ask for a larger file, or choose another method" in str(error.value)
    with pytest.raises(TooSmall, match=f"--budget {smallest - 1:,} is") as again:
        compress(*pair, out, budget=smallest - 1, **given)
    assert again.value.least == smallest and not list(tmp_path.iterdir())
    size = compress(*pair, out, budget=smallest, **given).bytes
    # What entropy coding saves of so small a file may be too little for another rank.
    assert size == out.stat().st_size and (size == smallest or (methods.is_sized(method) and size < smallest))


@pytest.mark.parametrize("method", DIALLED)
def test_no_file_is_a_byte_over_its_budget(method: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    given: dict[str, Any] = {"method": method, "calibration": "none"}
    with pytest.raises(TooSmall) as error:
        compress(*pair, tmp_path / "x.bayou", ratio=100_000, **given)
    for extra in (1, 777, 5001, 20_000):
        budget = error.value.least + extra
        report = compress(*pair, tmp_path / f"{extra}.bayou", budget=budget, **given)
        assert budget - 1000 < report.bytes <= budget
        assert (tmp_path / f"{extra}.bayou").stat().st_size == report.bytes


@pytest.mark.parametrize("method", DIALLED)
def test_no_rank_is_smaller_than_rank_one_and_more_ranks_never_cost_less(method: str) -> None:
    for shape in ((64, 64), (192, 512), (512, 192), (33, 100)):
        sizes = [with_rank(site("w", shape, method), rank).nbytes for rank in range(1, min(shape) + 1)]
        assert sizes == sorted(sizes)


def test_without_sites_nothing_is_needed() -> None:
    assert run([], 0) == []


# ------------------------------------------------------------------------------------------------ who gets what


@pytest.mark.parametrize("method", DIALLED)
def test_sites_of_one_shape_get_the_same_but_for_what_is_left_over(method: str) -> None:
    sites = model(method)
    chosen = run(sites, 4 * least_of(sites))
    for shape in {record.shape for record in chosen}:
        ranks = [record.options["rank"] for record in chosen if record.shape == shape and record.role == "linear"]
        assert not ranks or max(ranks) - min(ranks) <= 31  # 16 + 8 + 4 + 2 + 1
    ordered = [record.options["rank"] for record in chosen if record.role == "linear" and record.shape == (512, 192)]
    assert ordered == sorted(ordered, reverse=True)


@pytest.mark.parametrize("method", DIALLED)
@pytest.mark.parametrize("rate", [0.25, 0.5, 1.0, 2.0])
def test_embeddings_get_their_rate_of_the_linears_bytes_a_weight(method: str, rate: float) -> None:
    sites = model(method, layers=24, width=256, inner=768, vocab=12_000)
    weights = sum(record.shape[0] * record.shape[1] for record in sites)
    chosen = run(sites, weights // 12, rate)

    def share(record: SiteRecord, more: int = 0) -> float:
        """Bytes a weight, with so many more ranks."""
        return with_rank(record, record.options["rank"] + more).nbytes / (record.shape[0] * record.shape[1])

    # The linears' common bytes a weight lie below one more rank of any, and above the least that one has.
    linears = [record for record in chosen if record.role == "linear"]
    low, high = min(share(record) for record in linears), min(share(record, 1) for record in linears)
    for role in TABLES:
        table = next(record for record in chosen if record.role == role)
        assert share(table, 1) > rate * low
        assert share(table, -1) < rate * high  # one rank may come from what was left over


def test_where_linears_have_one_size_the_rest_goes_to_the_tables() -> None:
    fixed_methods = [name for name in methods.names() if not methods.has_rank(name)]
    fixed_methods = [name for name in fixed_methods if methods.has_rank(methods.get(name).EMBEDDINGS["method"])]
    for method in fixed_methods:
        sites = model(method)
        budget = least_of(sites) + 40_000
        chosen = run(sites, budget, 0.001)
        assert [record.options["rank"] for record in chosen if record.role in TABLES] > [1, 1]
        assert budget - 40_000 < total(chosen) <= budget
        assert all("rank" not in record.options for record in chosen if record.role == "linear")
    assert fixed_methods  # BitDelta at least


@pytest.mark.parametrize("method", methods.names())
def test_only_ranks_and_terms_are_set(method: str) -> None:
    sites = model(method)
    before = list(sites)
    chosen = run(sites, 2 * least_of(sites))
    assert sites == before
    for old, new in zip(sites, chosen, strict=True):
        assert replace(new, options=old.options, terms=()) == old
        ranked = {key: value for key, value in new.options.items() if key != "rank"}
        assert ranked == old.options
        assert new.terms == methods.get(new.method).layout(new.shape, **new.options)


@pytest.mark.parametrize("method", DIALLED)
def test_the_same_sites_and_budget_give_the_same_ranks(method: str) -> None:
    sites = model(method)
    assert run(sites, 3 * least_of(sites)) == run(sites, 3 * least_of(sites))


def test_a_rank_chosen_before_is_chosen_anew() -> None:
    once = with_rank(site("w", (64, 64), "lowrank"), 7)
    assert once.options == {"bits": 16, "rank": 7}
    assert with_rank(once, 3) == with_rank(site("w", (64, 64), "lowrank"), 3)


# ------------------------------------------------------------------------------------------------ the paper's ranks


@pytest.mark.parametrize(("shape", "last"), [((4096, 4096), 968), ((11008, 4096), 1436), ((4096, 11008), 1436)])
def test_the_papers_accounting_gives_the_papers_ranks(shape: tuple[int, int], last: int) -> None:
    # arXiv 2406.08903: at 1/16 with 8x2,3x32,2 the 2-bit band of Llama-2-7B's matrices has these ranks.
    assert paper_rank(shape, 1 / 16, parse_bands("8x2,3x32,2")) == 2 + 32 + last


def test_the_papers_accounting_spends_its_bits_and_no_more() -> None:
    source = random.Random(0)
    for _ in range(200):
        shape = (source.randint(64, 9000), source.randint(64, 9000))
        alpha = source.choice((1 / 8, 1 / 16, 1 / 32))
        bands = parse_bands(source.choice(("8x2,3x32,2", "16", "4", "8x16,2", "16x4,1")))
        rank, spent, left = paper_rank(shape, alpha, bands), 0, 0
        left = rank
        for bits, ranks in bands:
            take = left if ranks is None else min(ranks, left)
            spent, left = spent + bits * take, left - take
        nominal = 16 * alpha * shape[0] * shape[1] / (shape[0] + shape[1])
        assert spent <= nominal or rank == 1
        assert nominal - spent < bands[-1][0] or rank == min(shape) or spent < sum(b * (r or 0) for b, r in bands)


def test_the_papers_ranks_are_at_least_one_and_at_most_the_shorter_side() -> None:
    bands = parse_bands("8x2,3x32,2")
    assert paper_rank((16, 16), 1 / 64, bands) == 1
    assert paper_rank((100, 40), 4.0, bands) == 40
    assert paper_rank((4096, 4096), 1 / 16, parse_bands("16")) == 128


def test_the_papers_order_is_bands_first() -> None:
    # 16 * alpha * 64 = 32 bits: two ranks of 8, five of 3, and the bit left over buys nothing.
    assert paper_rank((128, 128), 1 / 32, parse_bands("8x2,3x32,2")) == 2 + 5


def test_the_papers_ranks_follow_each_methods_own_bits() -> None:
    """A lowrank of 4 bits has four times the ranks of one of 16; what has no rank or no method keeps its size."""
    shape = (512, 768)
    alpha = 1 / 16
    sites = [
        site("a", shape, "lowrank"),
        site("b", shape, "lowrank", bits=4),
        site("c", shape, "deltacome", bands="8x2,2"),
        site("d", shape, "bitdelta"),
        replace(site("e", shape, "lowrank"), method="", options={}),
    ]
    found = by_paper(sites, 1 / alpha)
    assert [record.options.get("rank") for record in found] == [
        paper_rank(shape, alpha, [(16, None)]),
        paper_rank(shape, alpha, [(4, None)]),
        paper_rank(shape, alpha, [(8, 2), (2, None)]),
        None,
        None,
    ]
    assert found[1].options["rank"] // found[0].options["rank"] == 4
    assert found[3] == fixed(sites[3]) and found[4] == sites[4]


# ------------------------------------------------------------------------------------------------ the whole file


@pytest.mark.parametrize("method", DIALLED)
def test_a_file_is_filled_up_to_its_limit_whatever_its_header_costs(method: str) -> None:
    """No file falls back to the least for a few bytes by which a first guess was over (a Mixtral once did)."""
    sites = [*model(method, layers=2), replace(site("same", (64, 64), "lowrank"), method="", options={})]

    def size(picked: list[SiteRecord]) -> int:
        variety = len({(record.shape, str(record.options)) for record in picked})
        return total(picked) + 64 * -(-(5000 + 90 * variety) // 64)

    smallest = [fixed(record) if not record.method else record for record in least(sites[:-1])] + sites[-1:]
    fewest = size(smallest)
    assert within(sites, fewest - 1, size, embedding_rate=0.5) == (smallest, fewest)
    assert within(sites, fewest, size, embedding_rate=0.5) == (smallest, fewest)
    widest = max(with_rank(record, 2).nbytes - with_rank(record, 1).nbytes for record in sites[:-1])
    for limit in range(fewest + 20_000, fewest + 20_000 + 64 * 97, 97):
        chosen, named = within(sites, limit, size, embedding_rate=0.5)
        assert named == fewest and [record.name for record in chosen] == [record.name for record in sites]
        assert limit - widest - 1024 < size(chosen) <= limit
        assert chosen[-1] == sites[-1]
