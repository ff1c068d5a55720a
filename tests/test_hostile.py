"""Files that were made to do harm are refused, though every hash in them holds (promise 5)."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tamper import Entry, Forged, Made, everything, experts_of, take_apart

from bayou import sidecar
from bayou.checkpoint import Checkpoint
from bayou.deltafile import DeltaFile
from bayou.errors import BadFile
from bayou.report import verify
from bayou.restore import Restorer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return everything(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return experts_of(tmp_path_factory.mktemp("experts"))


Forge = Callable[[Forged], Any]


def plan_with(**changes: Any) -> Forge:
    """Changes of the first template that has terms."""

    def forge(forged: Forged) -> None:
        plan = forged.plan
        template = next(t for t in plan["templates"] if t["terms"])
        template.update(changes)
        forged.plan = plan

    return forge


def site_with(value: Any) -> Forge:
    def forge(forged: Forged) -> None:
        plan = forged.plan
        index = plan["sites"][0] if isinstance(plan["sites"][0], int) else plan["sites"][0][0]
        plan["sites"][0] = [index, value] if isinstance(value, dict) else value
        forged.plan = plan

    return forge


def metadata(key: str, value: str | None) -> Forge:
    return lambda f: f.metadata.pop(key) if value is None else f.metadata.__setitem__(key, value)


def renamed(old: str, new: str) -> Forge:
    return lambda f: setattr(f[old], "name", new)


def add(entry: Entry) -> Forge:
    return lambda f: f.entries.append(entry)


HEAD, TAIL, NORM = "lm_head.weight", "lm_head.weight[128:]", "model.layers.0.input_layernorm.weight"
LOWRANK = ["LowRank", [[1, "f16", "f16"]]]
HOSTILE: dict[str, Forge] = {
    "another format": metadata("format", "pt"),
    "no format": metadata("format", None),
    "no version": metadata("version", None),
    "an unknown version": metadata("version", "3"),
    "an unknown version with a point": metadata("version", "10.1"),
    "no plan": metadata("plan", None),
    "a plan that is no JSON": metadata("plan", "{"),
    "a plan that is a list": metadata("plan", "[]"),
    "a plan nested deeply": metadata("plan", "[" * 100_000 + "]" * 100_000),
    "a plan without sites": metadata("plan", '{"templates": []}'),
    "a plan without templates": metadata("plan", '{"sites": [0]}'),
    "more sites than entries": metadata("plan", json.dumps({"templates": [], "sites": [0] * 10**5})),
    "fewer sites": lambda f: setattr(f, "plan", f.plan | {"sites": f.plan["sites"][1:]}),
    "a template that is a number": lambda f: setattr(f, "plan", f.plan | {"templates": [1]}),
    "an index of no template": site_with(10**9),
    "a negative index": site_with(-1),
    "an index that is true": site_with(True),
    "an index that is a float": site_with(0.0),
    "an index that is a text": site_with("00"),
    "a reference that is a number": site_with({"reference": 5}),
    "a reference's part below 0": site_with({"reference": HEAD, "part": -1}),
    "a gain that is a text": site_with({"gain": "1"}),
    "a gain that is NaN": site_with({"gain": float("nan")}),
    "an infinite gain": site_with({"gain": float("inf")}),
    "a gain of 401 digits": site_with({"gain": 10**400}),
    "a gain that is true": site_with({"gain": True}),
    "a shape of zero": plan_with(shape=[0, 64]),
    "a negative shape": plan_with(shape=[-128, -64]),
    "a shape of one number": plan_with(shape=[8192]),
    "a shape of three numbers": plan_with(shape=[2, 64, 64]),
    "a shape of floats": plan_with(shape=[128.0, 64.0]),
    "a huge shape": plan_with(shape=[2**27, 2**27]),
    "a shape of 2^60": plan_with(shape=[2**60, 2**60]),
    "a shape of other bytes": plan_with(shape=[128, 65]),
    "a shape on disk of another size": plan_with(disk=[128, 63]),
    "a shape on disk of another form": plan_with(disk=[64, 128]),
    "a shape on disk of no dimension": plan_with(shape=[1, 1], disk=[]),
    "a transposed shape that is not": plan_with(transposed=True),
    "a dtype that is a number": plan_with(dtype=5),
    "an unknown dtype": plan_with(dtype="F8_E4M3"),
    "a dtype of integers": plan_with(dtype="I64"),
    "a dtype of booleans": plan_with(dtype="BOOL"),
    "options that are a list": plan_with(options=[]),
    "a role that is a table": plan_with(role={}),
    "a role that draws on the screen": plan_with(role="[/bold]"),
    "a method that draws on the screen": plan_with(method="[/bold]\x1b[2J"),
    "terms that are a number": plan_with(terms=3),
    "an unknown term": plan_with(terms=[["Sparse", [[1, "f16", "f16"]]]]),
    "a term without parts": plan_with(terms=[["LowRank", []]]),
    "a Dense of two parts": plan_with(terms=[["Dense", [[0, "1", ""], [0, "1", ""]]]]),
    "a rank of zero": plan_with(terms=[["LowRank", [[0, "f16", "f16"]]]]),
    "a negative rank": plan_with(terms=[["LowRank", [[-1, "f16", "f16"]]]]),
    "a rank beyond a block": plan_with(terms=[["LowRank", [[129, "f16", "f16"]]]]),
    "an unknown number format": plan_with(terms=[["LowRank", [[1, "f16", "9g128z"]]]]),
    "a group of zero": plan_with(terms=[["LowRank", [[1, "f16", "4g0"]]]]),
    "zero points without scales": plan_with(terms=[["LowRank", [[1, "f16", "4z"]]]]),
    "a number format that is null": plan_with(terms=[["LowRank", [[1, "f16", None]]]]),
    "unknown scales": plan_with(terms=[[*LOWRANK, "x"]]),
    "scales that are a number": plan_with(terms=[[*LOWRANK, 1]]),
    "terms of other bytes": plan_with(terms=[LOWRANK]),
    "ten thousand terms": plan_with(terms=[LOWRANK] * 10**4),
    "no terms for bytes": plan_with(terms=[]),
    "no base": metadata("base", None),
    "a base that is a list": metadata("base", "[]"),
    "unchanged that is a table": metadata("unchanged", "{}"),
    "files that are a list": metadata("files", "[]"),
    "a site's entry of another dtype": lambda f: setattr(f[HEAD], "dtype", "I8"),
    "a site's bytes cut": lambda f: f.replace(HEAD, f[HEAD].payload[:-16]),
    "a site's name of index 03": renamed("lm_head.weight", "lm_head.weight[03]"),
    "a site's name of a Devanagari index": renamed("lm_head.weight", "lm_head.weight[\u0969]"),
    "a site that is a part of none": renamed("lm_head.weight", "lm_head.weight[1]"),
    "a site and its part": renamed("model.embed_tokens.weight", "lm_head.weight[0]"),
    "grown rows that start elsewhere": renamed(TAIL, "lm_head.weight[127:]"),
    "grown rows of no site": renamed(TAIL, "nothing[128:]"),
    "grown rows of another width": lambda f: setattr(f[TAIL], "shape", [12, 32]),
    "grown rows of another dtype": lambda f: setattr(f[TAIL], "dtype", "F16"),
    "grown rows twice": add(Entry("lm_head.weight[0128:]", "BF16", [1, 64], bytes(128))),
    "an exact tensor of an unknown dtype": lambda f: setattr(f[NORM], "dtype", "F8_E5M2"),
    "a tensor exact and coded": lambda f: f.metadata.__setitem__("unchanged", json.dumps([HEAD])),
    "a tensor exact and unchanged": lambda f: f.metadata.__setitem__("unchanged", json.dumps([NORM])),
    "no fidelity": lambda f: f.entries.remove(f[".fidelity"]),
    "a fidelity of another length": lambda f: f.replace(".fidelity", bytes(2), dtype="F16", shape=[1]),
    "a fidelity that is no number": lambda f: setattr(f[".fidelity"], "dtype", "BOOL"),
    "no fingerprints": lambda f: f.entries.remove(f[".base"]),
    "a file with a path": add(Entry(".file.../../config.json", "U8", [1], b"x")),
    "a file at an absolute path": add(Entry(".file./etc/x.json", "U8", [1], b"x")),
    "a hidden file": add(Entry(".file..x.json", "U8", [1], b"x")),
    "a file of code": add(Entry(".file.modeling_x.py", "U8", [1], b"x")),
    "a file of weights": add(Entry(".file.model.safetensors", "U8", [1], b"x")),
    "an index of shards": add(Entry(".file.model.safetensors.index.json", "U8", [1], b"x")),
    "a file without a name": add(Entry(".file.", "U8", [1], b"x")),
    "an equal file with a path": metadata("files", '{"../config.json": ""}'),
    "an equal index of shards": metadata("files", '{"model.safetensors.index.json": ""}'),
}


@pytest.mark.parametrize("forge", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused_when_opened(made: Made, tmp_path: Path, forge: Forge) -> None:
    """Promise 5. Every hash in these files holds, so it is the reader's own checks that refuse them."""
    forged = take_apart(made.file)
    forge(forged)
    (tmp_path / "x.bayou").write_bytes(forged.pack())
    with pytest.raises(BadFile):
        DeltaFile(tmp_path / "x.bayou")


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (site_with({"reference": "model.norm.weight"}), "its reference"),
        (site_with({"reference": "model.layers.0.self_attn.k_proj.weight"}), "its reference"),
        (site_with({"reference": HEAD, "part": 0}), "its reference"),
        (lambda f: f.replace(".base", f[".base"].payload[:-32]), "fingerprints for"),
    ],
)
def test_references_that_do_not_fit_are_refused_with_the_base(
    made: Made, tmp_path: Path, forge: Forge, message: str
) -> None:
    forged = take_apart(made.file)
    forge(forged)
    base = Checkpoint(made.base)
    if message == "its reference":
        own = [s["reference"] for s in [forged.plan["sites"][0][1]]]
        plan_names = sorted({*(n for n in base.names() if n != "lm_head.weight"), *own})
        used = [n for n in plan_names if n in _used(forged, own[0])]
        forged.replace(".base", b"".join(base.fingerprint(name) for name in used))
    (tmp_path / "x.bayou").write_bytes(forged.pack())
    with pytest.raises(BadFile, match=message):
        DeltaFile(tmp_path / "x.bayou").check_base(base)


def _used(forged: Forged, first: str) -> set[str]:
    """The base's tensors that a file leans on whose first site refers to `first`."""
    sites = [entry.name for entry in forged.entries[: len(forged.plan["sites"])]]
    return {first, *sites[1:], *json.loads(forged.metadata["unchanged"])}


def test_experts_are_sites_of_one_tensor(experts: Made) -> None:
    opened = DeltaFile(experts.file)
    assert [n for n in opened.sites if n.startswith("experts[")] == [f"experts[{i}]" for i in range(4)]
    restored = Restorer(Checkpoint(experts.base), opened).tensor("experts")
    tuned = load_file(experts.tuned / "model.safetensors")["experts"]
    assert restored.shape == tuned.shape and float((restored - tuned).norm() / tuned.norm()) < 0.01


@pytest.mark.parametrize(
    "names",
    [
        {"experts[3]": "experts[4]"},
        {"experts[0]": "experts[1]", "experts[1]": "experts[0]"},
        {"experts[2]": "experts[02]"},
        {"experts[0]": "experts"},
        {"experts[3]": "experts"},
    ],
)
def test_parts_that_are_not_all_of_a_tensor_in_order_are_refused(
    experts: Made, tmp_path: Path, names: dict[str, str]
) -> None:
    forged = take_apart(experts.file)
    for entry in forged.entries:
        entry.name = names.get(entry.name, entry.name)
    (tmp_path / "x.bayou").write_bytes(forged.pack())
    with pytest.raises(BadFile):
        DeltaFile(tmp_path / "x.bayou")


def test_a_part_that_the_base_has_not_is_refused(experts: Made, tmp_path: Path) -> None:
    forged = take_apart(experts.file)
    plan, index = forged.plan, [e.name for e in forged.entries].index("experts[0]")
    plan["sites"][index] = [plan["sites"][index], {"reference": "experts", "part": 4}]
    forged.plan = plan
    (tmp_path / "x.bayou").write_bytes(forged.pack())
    with pytest.raises(BadFile, match=re.escape("'experts[0]'")):
        DeltaFile(tmp_path / "x.bayou").check_base(Checkpoint(experts.base))


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"{}", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_bayou_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(BadFile, match=re.escape(str(tmp_path / "x"))):
        DeltaFile(tmp_path / "x")


def test_a_model_a_folder_and_nothing_are_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="is not a .bayou file"):
        DeltaFile(made.base / "model.safetensors")
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BadFile, match="cannot open"):
            DeltaFile(path)


def test_a_later_version_is_refused_with_the_way_out(made: Made, tmp_path: Path) -> None:
    forged = take_apart(made.file)
    forged.metadata["version"] = "3.0"
    (tmp_path / "x.bayou").write_bytes(forged.pack())
    with pytest.raises(BadFile, match=r"of format version '3\.0'; this Bayou reads 1 and 2; install a newer Bayou"):
        DeltaFile(tmp_path / "x.bayou")
    forged.entries.append(Entry(".later", "U8", [1], b"x"))
    for version in ("1.7", "2.7"):  # of a known major version: what is new may be ignored
        forged.metadata["version"] = version
        (tmp_path / "x.bayou").write_bytes(forged.pack())
        verify(tmp_path / "x.bayou")


def test_a_hostile_config_is_a_bad_file(made: Made, tmp_path: Path) -> None:
    for content in (b"[", b"[]", b"\xff", b"[" * 100_000):
        forged = take_apart(made.file)
        forged.replace(".file.config.json", sidecar.difference(None, content))
        (tmp_path / "x.bayou").write_bytes(forged.pack())
        with pytest.raises(BadFile, match=r"config\.json"):
            DeltaFile(tmp_path / "x.bayou").fine_tune_config(made.base)
    tensors = len(DeltaFile(made.file).tensors())
    for config in ({"num_hidden_layers": tensors + 1}, {"text_config": {"n_layer": 10**9}}, {"num_layers": 1e300}):
        forged = take_apart(made.file)
        forged.replace(".file.config.json", sidecar.difference(None, json.dumps(config).encode()))
        (tmp_path / "x.bayou").write_bytes(forged.pack())
        with pytest.raises(BadFile, match=rf"says \w+ .*, but the file has {tensors} tensors"):
            DeltaFile(tmp_path / "x.bayou").fine_tune_config(made.base)
    forged = take_apart(made.file)
    forged.entries.remove(forged[".file.config.json"])
    (tmp_path / "x.bayou").write_bytes(forged.pack())
    with pytest.raises(BadFile, match=r"holds no config\.json"):
        DeltaFile(tmp_path / "x.bayou").fine_tune_config(made.base)


def test_a_sites_gain_is_read_as_the_float_that_it_is(made: Made, tmp_path: Path) -> None:
    forged = take_apart(made.file)
    site_with({"gain": 0.25})(forged)
    raw = bytearray(forged[HEAD].payload)
    struct.pack_into("<f", raw, 0, 0.0)  # and its term counts for nothing
    forged.replace(HEAD, bytes(raw))
    (tmp_path / "x.bayou").write_bytes(forged.pack())
    base = Checkpoint(made.base)
    found = Restorer(base, DeltaFile(tmp_path / "x.bayou")).tensor(HEAD)
    assert torch.equal(found[:128], (base.read(HEAD).double() * 0.25).to(found.dtype))
