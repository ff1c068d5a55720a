"""Which blocks are tied to which, how many, at what rank; and what cannot be is refused."""

from pathlib import Path

import pico
import pytest

from bayou.errors import BadInput, Unsupported
from bayou.sharing.layouts import Dial, SubLayer, arrange, reduction
from bayou.sharing.original import Original

MLP = {"gate_proj.weight": (96, 64), "up_proj.weight": (96, 64), "down_proj.weight": (64, 96)}
ATTENTION = {"q_proj.weight": (64, 64), "k_proj.weight": (32, 64), "v_proj.weight": (32, 64), "o_proj.weight": (64, 64)}
EACH = 3 * 96 * 64
COST = 3 * (96 + 64)


def blocks(layers: int) -> dict[tuple[int, str], SubLayer]:
    found = {}
    for i in range(layers):
        found[i, "mlp"] = SubLayer(i, "mlp", f"model.layers.{i}.mlp", MLP)
        found[i, "attention"] = SubLayer(i, "attention", f"model.layers.{i}.self_attn", ATTENTION)
    return found


def arranged(layers: int, **dial: object) -> tuple[dict[int, int], int]:
    return arrange(Dial(**dial), blocks(layers), layers * 40_000)  # type: ignore[arg-type]


def test_alternating_pairs_each_delta_with_the_block_before() -> None:
    pairs, rank = arranged(30, count=13, rank=8)
    assert pairs == {first + 1: first for first in range(2, 28, 2)} and rank == 8
    few, _ = arranged(30, count=3, rank=8)
    assert len(few) == 3 and all(delta == anchor + 1 and anchor % 2 == 0 for delta, anchor in few.items())
    assert max(few) - min(few) >= 16  # spread over the model


def test_sequential_has_one_anchor_and_the_blocks_that_follow_it() -> None:
    pairs, _ = arranged(12, layout="sequential", count=4, rank=8)
    assert pairs == {6: 5, 7: 5, 8: 5, 9: 5}
    pairs, _ = arranged(12, layout="sequential", count=5, rank=8, per_anchor=2)
    assert pairs == {3: 2, 5: 4, 6: 4, 8: 7, 9: 7}


def test_named_blocks_lean_on_the_nearest_that_stays() -> None:
    assert arranged(12, blocks=(5, 6, 9), rank=4) == ({5: 4, 6: 4, 9: 8}, 4)
    for bad in ((0,), (12,), (5, 40)):
        with pytest.raises(BadInput, match="--blocks"):
            arranged(12, blocks=bad, rank=4)


@pytest.mark.parametrize("reduce", [0.05, 0.12, 0.17])
def test_a_reduction_is_reached_with_the_largest_rank_that_reaches_it(reduce: float) -> None:
    pairs, rank = arranged(30, reduce=reduce)
    goal = reduce * 30 * 40_000
    assert len(pairs) * (EACH - COST * rank) >= goal > len(pairs) * (EACH - COST * (rank + 1))
    pairs, rank = arranged(30, reduce=reduce, rank=4)
    assert rank == 4 and len(pairs) * (EACH - COST * 4) >= goal > (len(pairs) - 1) * (EACH - COST * 4)
    pairs, rank = arranged(30, reduce=reduce, count=13)
    assert len(pairs) == 13 and 13 * (EACH - COST * rank) >= goal


def test_what_the_model_has_no_room_for_is_one_clear_error() -> None:
    with pytest.raises(BadInput, match="5 layers are too few to keep 2 at either end"):
        arranged(5)
    with pytest.raises(BadInput, match="the 9 blocks between the ends do not pair up .* --layout sequential"):
        arranged(13)
    with pytest.raises(BadInput, match="rank 40 is too large .*: factors are smaller than the matrices up to rank 38"):
        arranged(12, rank=40)
    with pytest.raises(BadInput, match=r"--reduce 0\.5 cannot be reached by 4 delta blocks: .* remove \d+\.\d %"):
        arranged(12, reduce=0.5)
    with pytest.raises(BadInput, match=r"of rank 8: 4 of them"):
        arranged(12, reduce=0.3, rank=8)
    with pytest.raises(BadInput, match="has room for 1 to 4 here"):
        arranged(12, count=5, rank=4)
    with pytest.raises(BadInput, match="between 0 and 1"):
        arranged(12, reduce=1.5)
    with pytest.raises(BadInput, match="choose sequential or alternating; mlp, attention, all"):
        arranged(12, layout="zigzag")
    with pytest.raises(BadInput, match="--per-anchor 0"):
        arranged(12, layout="sequential", per_anchor=0)
    with pytest.raises(BadInput, match="--per-anchor 2 is for --layout sequential"):
        arranged(12, per_anchor=2)
    for wrong in ({"blocks": (3, 3)}, {"blocks": (3, 5), "count": 1}):
        with pytest.raises(BadInput, match="name each once, and leave out --count"):
            arranged(12, **wrong)


def test_a_reduction_may_be_given_as_a_ratio() -> None:
    assert reduction(0.2, None) == 0.2 and reduction(None, 1.25) == pytest.approx(0.2) and reduction(None, None) is None
    with pytest.raises(BadInput, match="not both"):
        reduction(0.2, 2)
    with pytest.raises(BadInput, match="above 1"):
        reduction(None, 1)


@pytest.mark.parametrize(("name", "leaves"), [("phi3", {"gate_up_proj.weight", "down_proj.weight"}), ("gpt2", None)])
def test_sub_layers_are_found_whatever_they_are_called(name: str, leaves: set[str] | None, tmp_path: Path) -> None:
    original = Original(pico.pico(name, tmp_path / "m"))
    assert {kind for _, kind in original.sublayers} == {"mlp", "attention"}
    mlp = original.sublayers[1, "mlp"]
    assert leaves is None or set(mlp.matrices) == leaves
    assert all(original.matrix(f"{mlp.name}.{leaf}").shape == shape for leaf, shape in mlp.matrices.items())


def test_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="expert"):
        Original(pico.pico("mixtral", tmp_path / "m"))
