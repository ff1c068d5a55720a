"""The packed products of kernels/ against the fp32 reference: in Triton's interpreter, and compiled where a GPU is."""

from pathlib import Path

import interpreter
import products
import pytest
import torch

from bayou.delta import Delta
from bayou.errors import BadInput
from bayou.kernels import packed_product, tuning
from bayou.kernels.one_delta import one_delta
from bayou.kernels.table import Table

LIMIT = 2e-3
"""Relative error of the kernels with bf16 inputs."""

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device for the compiled kernels")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The error of each small case, interpreted."""
    return interpreter.errors(products.__file__, tmp_path_factory.mktemp("interpreted"))


@pytest.mark.slow
@pytest.mark.parametrize("case", products.small())
def test_the_triton_version_is_the_reference(case: str, interpreted: dict[str, float]) -> None:
    assert interpreted[case] <= LIMIT


@on_gpu
@pytest.mark.parametrize("case", products.small() | products.large())
def test_the_compiled_kernels_are_the_reference(case: str) -> None:
    run = (products.small() | products.large())[case]
    assert run("cuda") <= LIMIT


@on_gpu
def test_a_captured_graph_serves_the_tenants_that_are_written_later() -> None:
    shape = (256, 512)
    deltas = [[(products.lowrank(shape, products.bands(200), "cuda", seed),)] for seed in range(3)]
    table = Table([shape], 2, deltas)
    table.write(0, deltas[0])
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    offsets = torch.tensor([0, 3, 4], dtype=torch.int32, device="cuda")
    slots = torch.tensor([0, -1], dtype=torch.int32, device="cuda")
    out, scratch = torch.zeros(4, 256, device="cuda"), table.scratch(4)

    def run() -> None:
        packed_product.packed_product(table, x, offsets, slots, [out], most=4, scratch=scratch)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    table.write(1, deltas[1])
    table.write(0, deltas[2])
    slots.copy_(torch.tensor([0, 1]))
    offsets.copy_(torch.tensor([0, 1, 4]))
    out.zero_()
    graph.replay()
    wanted = [
        packed_product.term_product(deltas[i][0][0], x[rows].float())
        for i, rows in ((2, slice(0, 1)), (1, slice(1, 4)))
    ]
    assert products.relative([out], [torch.cat(wanted)]) <= LIMIT


@on_gpu
@pytest.mark.parametrize("rows", [1, 5, 600])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_delta_on_the_gpu_takes_the_kernels(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    term = products.lowrank((256, 512), products.bands(200), "cpu")
    delta = Delta((256, 512), (term,)).to("cuda")
    x = torch.randn(2, rows, 512, device="cuda", dtype=dtype)
    wanted = packed_product.term_product(delta.terms[0], x.float())
    monkeypatch.setattr(type(term), "apply", lambda *_: pytest.fail("PyTorch's version was taken"))
    # One rounding to bf16 is 1.6e-3 already; for many rows, factors and what is between them are rounded as well.
    limit = 4e-3 if dtype == torch.bfloat16 else 1e-3
    assert products.relative([delta.apply(x)], [wanted]) <= limit


def test_the_reference_leaves_out_the_base_s_rows_and_sums_the_terms() -> None:
    shape = (6, 32)
    terms = (products.lowrank(shape, [(4, "3r", "f16")], "cpu"), products.dense("2g16z", shape, "cpu"))
    table = Table([shape], 2, [[terms]], "cpu")
    table.write(1, [terms])
    x, out = torch.randn(5, 32), torch.zeros(5, 6)
    offsets, slots = torch.tensor([0, 2, 4, 5], dtype=torch.int32), torch.tensor([1, -1, 0], dtype=torch.int32)
    packed_product.packed_product(table, x, offsets, slots, [out], most=2, scratch=table.scratch(5))
    wanted = x[:2].double() @ Delta(shape, terms).materialize().T
    torch.testing.assert_close(out[:2].double(), wanted, rtol=1e-4, atol=1e-4)
    assert not out[2:].any()


@pytest.mark.parametrize("rows", [0, 3])
def test_one_delta_adds_onto_what_is_there(rows: int) -> None:
    delta = Delta((20, 64), (products.lowrank((20, 64), products.bands(40), "cpu"),))
    x, y = torch.randn(2, rows, 64), torch.randn(2, rows, 20)
    wanted = y.double() + x.double() @ delta.materialize().T
    assert one_delta(delta, x).shape == (2, rows, 20)
    torch.testing.assert_close(one_delta(delta, x, onto=y).double(), wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-3, atol=1e-3)


def test_a_table_in_use_refuses_new_formats_and_scratch_of_before() -> None:
    shape = (40, 256)
    first, other = ([(products.lowrank(shape, [(40, spec, spec)], "cpu"),)] for spec in ("2r", "8r"))
    table = Table([shape], 1, [first], "cpu")
    scratch = table.scratch(3)
    with pytest.raises(BadInput, match="number formats that the table was not made for"):
        table.write(0, other, grow=False)
    assert not table.write(0, first, grow=False) and table.write(0, other)
    with pytest.raises(ValueError, match="before the table's formats grew"):
        packed_product.Scratch(table, scratch, 3)


def test_a_table_refuses_what_does_not_fit_it() -> None:
    shape = (40, 64)
    small, big = ([(products.lowrank(shape, products.bands(rank), "cpu"),)] for rank in (20, 30))
    table = Table([shape], 1, [small], "cpu")
    with pytest.raises(BadInput, match="more ranks or blocks than the table was made for"):
        table.write(0, big)
    with pytest.raises(BadInput, match="2 deltas were given for 1 projections"):
        table.write(0, [*small, *small])
    with pytest.raises(BadInput, match=r"block of \(40, 2\) times \(2, 64\) was given for a projection of \(41, 64\)"):
        Table([(41, 64)], 1, [small], "cpu")
    with pytest.raises(BadInput, match="that share an input are expected"):
        Table([(4, 64), (4, 63)], 1, [], "cpu")
    with pytest.raises(BadInput, match="deltas on cpu were given to a table on meta"):
        Table([shape], 1, [small], "meta")


def test_a_table_says_when_a_graph_no_longer_serves() -> None:
    shape = (40, 64)
    table = Table([shape], 1, [[(products.dense("2g16z", shape, "cpu"),)]], "cpu")
    assert not table.write(0, [(products.dense("2g16z", shape, "cpu"),)])
    assert table.write(0, [(products.dense("4", shape, "cpu"),)])
    assert not table.write(0, [(products.dense("4", shape, "cpu"),)])


def test_blocks_at_equal_distances_make_one_record() -> None:
    blocks = [(128, "2g128z", "2g128z")] * 4 + [(5, "2g128z", "2g128z")]
    term = products.lowrank((40, 128), blocks, "cpu")
    table = Table([(40, 128)], 1, [[(term,)]], "cpu")
    assert table.lists["expand"][0].shape[1] == 2 and table.lists["shrink"][0].shape[1] == 5


def test_measured_tiles_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAYOU_CACHE", str(tmp_path))
    tuning._on_disk.cache_clear()
    best = tuning.Choice(32, 1, 2, 4), tuning.Choice(256, 8, 2)

    def measure(which: str, pair: tuning.Pair) -> float:
        return float(pair[which == "rest"] != best[which == "rest"])

    candidates = {"shrink": [tuning.Choice(), best[0]], "rest": [tuning.Choice(), best[1]]}
    try:
        assert tuning.choice("shape", 16, 1) != best
        chosen, tried = tuning.tune("shape", 16, 1, measure, **candidates)
        assert chosen == best and len(tried) == 4
        tuning._on_disk.cache_clear()  # another process
        assert tuning.choice("shape", 16, 1) == best
        assert tuning.choice("shape", 64, 1) != best and tuning.choice("other", 16, 1) != best
        next(tmp_path.rglob("*.json")).write_text("{")
        tuning._on_disk.cache_clear()
        assert tuning.choice("shape", 16, 1) != best
    finally:
        tuning._on_disk.cache_clear()
