"""plan.py: what is written is what is read, and nothing but a well-formed Plan is read."""

import copy
import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from bayou import plan
from bayou.errors import BadFile
from bayou.methods import TermLayout
from bayou.plan import SiteRecord

BANDS = TermLayout("LowRank", ((2, "f16", "8g128z"), (32, "3g128z", "3g128z"), (128, "2g128z", "2g128z")))


def site(tensor: str, part: int | None = None, **changes: Any) -> SiteRecord:
    record = SiteRecord(
        tensor=tensor,
        part=part,
        shape=(1536, 576),
        disk_shape=(1536, 576),
        dtype="BF16",
        transposed=False,
        reference=tensor,
        reference_part=part,
        gain=1.0,
        role="linear",
        method="deltacome",
        options={"rank": 162, "bands": "8x2,3x32,2", "damping": 0.01, "refit": "rows"},
        terms=(BANDS,),
    )
    return replace(record, **changes)


SITES = [
    site("model.layers.0.mlp.up_proj.weight"),
    site("model.layers.1.mlp.up_proj.weight"),
    site("transformer.h.0.attn.c_attn.weight", transposed=True, disk_shape=(576, 1536)),
    site("patch.weight", shape=(16, 588), disk_shape=(16, 3, 14, 14), terms=(TermLayout("Dense", ((0, "1", ""),)),)),
    site("lm_head.weight", reference="model.embed_tokens.weight", role="head", gain=0.25),
    site("new.weight", reference=None, gain=0.0),
    site("experts.down_proj", 0),
    site("experts.down_proj", 17, reference="block.experts.w2", reference_part=3),
    site("experts.gate", 2, reference="block.experts.2.w1", reference_part=None),
    site("experts.up", 4, reference="experts.up", reference_part=1),
    site("experts.whole", 0, reference="experts.whole", reference_part=None),
    site("cast.weight", method="", options={}, terms=()),
    site("scaled.weight", terms=(TermLayout("Dense", ((0, "4g128z", ""),), True, True), BANDS)),
    site("out.weight", terms=(TermLayout("LowRank", ((1, "bf16", "f32"),), True),)),
    site("in.weight", terms=(TermLayout("LowRank", ((1, "3r", "3r"),), False, True),), dtype="F32"),
    site('odd "name" \\ \u00fc [3] x'),
]
NAMES = [record.name for record in SITES]


# ------------------------------------------------------------------------------------------------ there and back


def test_what_is_written_is_read() -> None:
    assert plan.loads(plan.dumps(SITES), NAMES) == SITES
    assert plan.loads(plan.dumps([]), []) == []


def test_reading_and_writing_again_gives_the_same_text() -> None:
    text = plan.dumps(SITES)
    assert plan.dumps(plan.loads(text, NAMES)) == text


def test_an_entry_is_named_by_its_tensor_and_its_part() -> None:
    assert SITES[0].name == "model.layers.0.mlp.up_proj.weight" and SITES[7].name == "experts.down_proj[17]"
    assert plan.split_name("experts.w[3]") == ("experts.w", 3)
    assert plan.split_name("a[1][20]") == ("a[1]", 20)
    assert plan.split_name("w[0]") == ("w", 0)


@pytest.mark.parametrize(
    "name",
    ["w", "w[]", "w[-1]", "w[x]", "w[007]", "w[ 1]", "w[1", "w1]", "w[1:]", "w[\u00b2]", "w[\u0663]", "w[9999999999]"],
)
def test_what_is_no_index_is_part_of_the_name(name: str) -> None:
    assert plan.split_name(name) == (name, None)


def test_every_entry_s_name_is_its_site_s_name() -> None:
    # A file is read by these names: one that came back changed would not be found.
    text = plan.dumps([site("w")])
    for name in ("w[007]", "w[\u00b2]", "[0]", "w[12]", "]["):
        assert plan.loads(text, [name])[0].name == name


def test_bytes_are_those_of_the_terms() -> None:
    record = site("w", shape=(4, 256), disk_shape=(4, 256), terms=(TermLayout("Dense", ((0, "2g128z", ""),), True),))
    # gain, 4 output scales, codes, 8 scales, 8 zero points of 2 bits: each on 16 bytes
    assert record.nbytes == 16 + 16 + 4 * 64 + 16 + 16
    assert site("w", terms=()).nbytes == 0


def test_sites_of_a_kind_share_a_template_and_cost_a_number_each() -> None:
    many = [site(f"model.layers.{i}.mlp.up_proj.weight") for i in range(200)]
    text = plan.dumps(many)
    assert json.loads(text)["sites"] == [0] * 200 and len(json.loads(text)["templates"]) == 1
    assert len(text) - len(plan.dumps(many[:1])) == 2 * 199


def test_a_reference_of_the_same_name_is_not_stated() -> None:
    stated = json.loads(plan.dumps(SITES))["sites"]
    assert isinstance(stated[0], int) and isinstance(stated[6], int)
    assert stated[4][1] == {"reference": "model.embed_tokens.weight", "gain": 0.25}
    assert stated[5][1] == {"reference": None, "gain": 0.0}
    assert stated[7][1] == {"reference": "block.experts.w2", "part": 3}


# ------------------------------------------------------------------------------------------------ hostile Plans


def hostile(where: str, value: Any) -> str:
    """A good Plan of one site with `value` at the place that `where` spells: "templates/0/shape/1"."""
    good = json.loads(plan.dumps([site("w", gain=0.5, reference="v")]))
    keys = [int(key) if key.isdigit() else key for key in where.split("/")]
    at: Any = good
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    return json.dumps(good)


WRONG = {
    "templates": [None, 3, "x", [], {}, [None], [3], ["shape"], [[]], [{}]],
    "sites": [
        None,
        3,
        "0",
        [],
        {},
        {"a": 1},
        [0, 0],
        [None],
        ["0"],
        [0.0],
        [True],
        [-1],
        [1],
        [10**30],
        [[]],
        [[0]],
        [[0, {}, 1]],
    ],
    "sites/0/0": [None, "0", 1.0, True, -1, 1, 10**30, []],
    "sites/0/1": [None, 3, "x", "reference", "gain", [], ["gain"]],
    "sites/0/1/gain": [None, "1", True, [], {}, math.nan, math.inf, -math.inf, 1e31, -1e31, 10**400],
    "sites/0/1/reference": [3, True, [], {}, 1.5],
    "sites/0/1/part": [None, -1, 1.5, "0", True, 2**27 + 1, 10**30],
    "templates/0/shape": [None, 3, "ab", [], [4], [4, 4, 4], {}, [[1536, 576]]],
    "templates/0/shape/0": [None, 0, -1536, 1536.0, "1536", True, 2**27 + 1, 10**30, []],
    "templates/0/disk": [
        None,
        3,
        [],
        [1536],
        [576, 1535],
        [1536, 576, 0],
        [-1536, -576],
        [2**27] * 9,
        [1536, 576, *[1] * 7],
        "x",
    ],
    "templates/0/dtype": [None, 3, [], {}],
    "templates/0/role": [None, 3, []],
    "templates/0/method": [None, 3, []],
    "templates/0/options": [None, 3, "x", [], [["rank", 1]]],
    "templates/0/terms": [None, 3, "LowRank", [3], [None], [[]], [["LowRank"]], [{}], {"a": 1}],
    "templates/0/terms/0/0": [None, 3, "Sparse", "lowrank", "", [], ["LowRank"], "Dense"],
    "templates/0/terms/0/1": [
        None,
        3,
        "x",
        "abc",
        [],
        {},
        [[]],
        [[1, "f16"]],
        [[1, "f16", "f16", 1]],
        [None],
        {"2gr": 1},
    ],
    "templates/0/terms/0/1/0/0": [None, 0, -1, 129, 2**31, 10**30, 2.0, "2", True, []],
    "templates/0/terms/0/1/0/1": [None, 3, "", "0", "9r", "3z", "f8", "2g0", "2g9999999", [], {}],
    "templates/0/terms/0/1/0/2": [None, 3, "", "16", "f64", "2g128zz", True],
}


@pytest.mark.parametrize("where", WRONG)
def test_a_plan_with_a_wrong_value_anywhere_is_refused(where: str) -> None:
    for value in WRONG[where]:
        with pytest.raises(BadFile, match="the Plan is not well-formed"):
            plan.loads(hostile(where, value), ["w"])


@pytest.mark.parametrize("scales", [3, None, [], "x", "io", "oo", "oio"])
def test_unknown_channel_scales_are_refused(scales: Any) -> None:
    good = json.loads(plan.dumps([site("w")]))
    good["templates"][0]["terms"][0].append(scales)
    with pytest.raises(BadFile, match="the Plan is not well-formed"):
        plan.loads(json.dumps(good), ["w"])


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "3", "[]", '"plan"', "{}", '{"templates":[]}', '{"sites":[0]}', "NaN", "\x00", "[" * 100_000]
    + ['{"templates":[],"sites":' + "9" * 5000 + "}", '{"a":' * 50_000],
    ids=lambda text: text[:12],
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(BadFile, match="the Plan is not well-formed"):
        plan.loads(text, ["w"])


@pytest.mark.parametrize("key", ["templates", "sites"])
def test_a_plan_without_a_part_is_refused(key: str) -> None:
    good = json.loads(plan.dumps([site("w")]))
    del good[key]
    with pytest.raises(BadFile, match=key):
        plan.loads(json.dumps(good), ["w"])


@pytest.mark.parametrize("key", ["shape", "dtype", "terms"])
def test_a_template_without_a_part_is_refused(key: str) -> None:
    good = json.loads(plan.dumps([site("w")]))
    del good["templates"][0][key]
    with pytest.raises(BadFile, match=key):
        plan.loads(json.dumps(good), ["w"])


def test_a_dense_term_has_one_part_without_ranks() -> None:
    for parts in ([[0, "1", ""], [0, "1", ""]], [[1, "1", ""]], [[0, "", "1"]], [[0, "1", "1"]], [[0, "1", []]]):
        with pytest.raises(BadFile, match="the Plan is not well-formed"):
            plan.loads(hostile("templates/0/terms", [["Dense", parts]]), ["w"])


def test_the_message_says_what_is_wrong_and_names_the_value() -> None:
    with pytest.raises(BadFile, match="'2g0' is not a number format"):
        plan.loads(hostile("templates/0/terms/0/1/0/1", "2g0"), ["w"])
    with pytest.raises(BadFile, match="-7 is not an integer from 1 to"):
        plan.loads(hostile("templates/0/shape/0", -7), ["w"])
    with pytest.raises(BadFile, match="unknown term .*Sparse.* a newer Bayou may read it"):
        plan.loads(hostile("templates/0/terms/0/0", "Sparse"), ["w"])
    with pytest.raises(BadFile, match="2 sites, but 1 entries"):
        plan.loads(plan.dumps(SITES[:2]), ["w"])


def test_a_site_without_a_reference_has_terms_and_is_bounded() -> None:
    terms = (TermLayout("LowRank", ((1, "f16", "f16"),)),)
    for shape in ((2**16, 2**15), (2**16 + 1, 2**15)):
        for reference, stated in ((None, terms), ("w", terms), (None, ()), ("w", ())):
            text = plan.dumps([site("w", shape=shape, disk_shape=shape, reference=reference, terms=stated)])
            if reference is None and (shape[0] > 2**16 or not stated):
                with pytest.raises(BadFile, match=f"no reference, {len(stated)} terms"):
                    plan.loads(text, ["w"])
            else:
                assert plan.loads(text, ["w"])[0].terms == stated


def test_the_part_in_an_entry_s_name_is_bounded() -> None:
    with pytest.raises(BadFile, match="999999999 is not an integer from 0 to"):
        plan.loads(plan.dumps([site("w")]), ["w[999999999]"])


VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    128,
    2**31,
    10**40,
    0.5,
    -0.0,
    1e308,
    "",
    "w",
    "f16",
    "1",
    "LowRank",
]
VALUES += [[], [0], [[]], {}, {"a": 1}, {"rank": []}, "\u0663", "x" * 300]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def mutated(good: Any, source: random.Random) -> Any:
    """The Plan with one to three values replaced, removed, doubled or nested."""
    bad = copy.deepcopy(good)
    for _ in range(source.randint(1, 3)):
        candidates = places(bad)
        if not candidates:
            return bad
        *path, key = source.choice(candidates)
        at = bad
        for step in path:
            at = at[step]
        action = source.randrange(4)
        if action == 0:
            del at[key]
        elif action == 1 and isinstance(at, list):
            at.append(copy.deepcopy(at[key]))
        elif action == 2:
            at[key] = [at[key]]
        else:
            at[key] = copy.deepcopy(source.choice(VALUES))
    return bad


@pytest.mark.parametrize("count", [1500, pytest.param(50_000, marks=pytest.mark.torture)])
def test_any_mutation_is_refused_or_read_as_a_sound_plan(count: int) -> None:
    source = random.Random(0)
    good = json.loads(plan.dumps(SITES))
    refused = 0
    for _ in range(count):
        text = json.dumps(mutated(good, source))
        try:
            sites = plan.loads(text, NAMES)
        except BadFile:
            refused += 1
            continue
        assert [record.name for record in sites] == NAMES
        for record in sites:
            assert math.isfinite(record.gain) and record.nbytes >= 0
            assert math.prod(record.disk_shape) == math.prod(record.shape) and len(record.shape) == 2
        kept = [record if record.method else replace(record, options={}) for record in sites]  # no method, no options
        assert plan.loads(plan.dumps(sites), NAMES) == kept
    assert count / 4 < refused < count
