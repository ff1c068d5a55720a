"""Layers that share another's matrix in one self-contained file: the format, restoring, loading, what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import independent_reader
import pico
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tamper import Forged, take_apart
from test_independent_reader import bits, same
from torch import Tensor

import bayou
from bayou import report, sidecar
from bayou.attached import AttachedLinear
from bayou.checkpoint import Checkpoint
from bayou.cli import main
from bayou.contents import Contents, Exact
from bayou.delta import Dense, LowRank, Term
from bayou.deltafile import DeltaFile
from bayou.entry import pack_terms
from bayou.errors import BadFile, BadInput, Unsupported
from bayou.methods import float_lowrank, layout_of
from bayou.packed import Packed, Spec
from bayou.plan import EXPANSION, SiteRecord
from bayou.quantize import nearest

UP = "model.layers.{}.mlp.up_proj.weight"
DOWN = "model.layers.{}.mlp.down_proj.weight"
QUERY = "model.layers.{}.self_attn.q_proj.weight"


def lowrank(shape: tuple[int, int], rank: int, seed: int) -> tuple[Term, ...]:
    g = torch.Generator().manual_seed(seed)
    return (
        float_lowrank(
            torch.randn(shape[0], rank, generator=g) * 0.1, torch.ones(rank), torch.randn(rank, shape[1], generator=g)
        ),
    )


def site(name: str, weight: Tensor, reference: str | None, terms: tuple[Term, ...], gain: float = 1.0) -> SiteRecord:
    shape = (weight.shape[0], weight.shape[1])
    layouts = tuple(layout_of(term) for term in terms)
    return SiteRecord(name, None, shape, shape, "BF16", False, reference, None, gain, "linear", "test", {}, layouts)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.pico("llama_gqa", tmp_path_factory.mktemp("model") / "model", num_hidden_layers=4)


@pytest.fixture(scope="module")
def file(model: Path) -> Path:
    """1's up shares the exact 0's, 2's down 3's of 8 bits; 3's q is nothing but 0's, 2's q is factors alone."""
    checkpoint, coded = Checkpoint(model), {}
    whole = checkpoint.read(DOWN.format(3)).float()
    coded[DOWN.format(3)] = (None, (Dense(nearest(whole, Spec.parse("8g32"))),), 1.0)
    coded[UP.format(1)] = ("self:" + UP.format(0), lowrank((96, 64), 5, 1), 0.75)
    coded[DOWN.format(2)] = ("self:" + DOWN.format(3), lowrank((64, 96), 4, 2), -0.5)
    coded[QUERY.format(3)] = ("self:" + QUERY.format(0), (), 0.25)
    coded[QUERY.format(2)] = (None, lowrank((64, 64), 6, 3), 1.0)
    sites = [site(name, checkpoint.read(name), how[0], how[1], how[2]) for name, how in coded.items()]
    blobs = [pack_terms(terms) for _, terms, _ in coded.values()]
    exact = [
        Exact(name, checkpoint.word(name), checkpoint.shape(name), lambda name=name: checkpoint.read(name))
        for name in checkpoint.names()
        if name not in coded
    ]
    files = {name: sidecar.difference(None, content) for name, content in sidecar.carried(model).items()}
    path = model.parent / "shared.bayou"
    Contents(sites, exact, [], "", "", {}, {}, files).write(path, blobs.__getitem__, [0.0] * len(sites))
    return path


def by_hand(model: Path, file: Path) -> dict[str, Tensor]:
    """Every tensor of the shared model, from the formula."""
    found, opened = load_file(model / "model.safetensors"), DeltaFile(file)
    for anchored in (False, True):
        for name, record in opened.sites.items():
            if (record.anchor is not None) == anchored:
                reference = None if record.anchor is None else found[record.anchor]
                found[name] = opened.delta(name).restore(reference, torch.bfloat16)
    return found


def test_it_leans_on_no_base(file: Path) -> None:
    opened = DeltaFile(file)
    assert opened.self_contained and opened.used() == [] and opened.unchanged == []
    assert opened.base["id"] == opened.base["revision"] == ""
    assert opened.entry_nbytes(".base") == opened.entry_nbytes(QUERY.format(3)) == 0
    assert report.verify(file)["entries"] == len(opened.entries())
    assert report.verify(file, "nowhere")["base_tensors"] == 0
    assert report.inspect(file)["self_contained"]


def test_the_numbers_counted_are_those_in_the_file(model: Path, file: Path) -> None:
    dense = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
    factors = 5 * (96 + 64) + 4 * (96 + 64) + 6 * (64 + 64)
    assert report.inspect(file)["parameters"] == dense - 2 * 96 * 64 - 2 * 64 * 64 + factors


def test_restoring_follows_the_formula_and_needs_no_base(model: Path, file: Path, tmp_path: Path) -> None:
    bayou.restore(None, file, tmp_path / "out")
    found, wanted = load_file(tmp_path / "out" / "model.safetensors"), by_hand(model, file)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    for name, content in sidecar.carried(model).items():
        assert (tmp_path / "out" / name).read_bytes() == content


def test_the_command_restores_it_alone(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["restore", str(file), "-o", str(tmp_path / "a"), "--json"])
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["path"] == str(tmp_path / "a")
    bayou.restore("no/such base", file, tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_a_reader_made_from_the_readme_reads_it(file: Path, tmp_path: Path) -> None:
    bayou.restore(None, file, tmp_path / "out")
    restored, found = load_file(tmp_path / "out" / "model.safetensors"), independent_reader.restore(file)
    assert sorted(found) == sorted(restored)
    assert [name for name, tensor in restored.items() if not same(found[name], bits(tensor))] == []


def held(module: torch.nn.Module) -> int:
    """Bytes of all distinct storages of parameters, buffers and deltas."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*module.parameters(), *module.buffers())
    }
    return sum(storages.values())


def test_loading_shares_anchors_in_memory(model: Path, file: Path, tmp_path: Path) -> None:
    loaded, dense = bayou.load(None, file), bayou.load(None, file)
    ids = torch.arange(5, 45)[None]
    bayou.restore(None, file, tmp_path / "out", dtype="float32")
    restored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        found, wanted = loaded(input_ids=ids).logits, restored(ids).logits
        assert (found - wanted).norm() < 1e-3 * wanted.norm()  # the anchor of 8 bits counts as rounded to bf16
        assert torch.equal(loaded(input_ids=ids).logits, bayou.load("nowhere", file)(input_ids=ids).logits)
    layers = dense.model.layers
    assert isinstance(layers[1].mlp.up_proj, AttachedLinear)
    assert layers[1].mlp.up_proj.base is layers[0].mlp.up_proj.weight
    assert layers[2].mlp.down_proj.base is layers[3].mlp.down_proj.weight
    assert layers[2].self_attn.q_proj.base.numel() == 0
    saved = 4 * (2 * 96 * 64 + 2 * 64 * 64)
    assert held(restored) - held(loaded) == saved
    with pytest.raises(BadInput, match="nothing is attached"):
        bayou.detach(loaded)


def test_a_loaded_model_changes_dtype_and_has_the_weights_that_it_computes_with(file: Path) -> None:
    loaded = bayou.load(None, file)
    with torch.no_grad():
        before = loaded(input_ids=torch.arange(5, 25)[None]).logits
        half = loaded.to(torch.bfloat16)
        assert half.model.layers[1].mlp.up_proj.base is half.model.layers[0].mlp.up_proj.weight
        after = half(input_ids=torch.arange(5, 25)[None]).logits
    assert (before - after.float()).norm() < 0.05 * before.norm()
    attached = half.model.layers[1].mlp.up_proj
    assert attached.weight.shape == (96, 64) and attached.weight.dtype == torch.bfloat16


def test_it_is_not_attached_to_a_model_in_memory(model: Path, file: Path) -> None:
    with pytest.raises(Unsupported, match=r"another layer of its own model; use bayou\.load"):
        bayou.attach(bayou.load(None, file), file)


def test_a_file_that_leans_on_a_base_asks_for_it(model: Path, tmp_path: Path) -> None:
    tuned = pico.perturb(model, tmp_path / "tuned")
    bayou.compress(model, tuned, tmp_path / "a.bayou", method="lowrank", ratio=2)
    for use in (
        lambda: bayou.restore(None, tmp_path / "a.bayou", tmp_path / "out"),
        lambda: bayou.load(None, tmp_path / "a.bayou"),
    ):
        with pytest.raises(BadInput, match=r"leans on \d+ tensors of its base .*give the base before the file"):
            use()


def test_a_fine_tune_of_a_shared_model_composes(file: Path, tmp_path: Path) -> None:
    bayou.restore(None, file, tmp_path / "dense")
    tuned = pico.perturb(tmp_path / "dense", tmp_path / "tuned", scale=0.1)
    bayou.compress(tmp_path / "dense", tuned, tmp_path / "a.bayou", method="lowrank", ratio=1.5)
    bayou.restore(tmp_path / "dense", tmp_path / "a.bayou", tmp_path / "out")
    dense, wanted, found = (
        load_file(tmp_path / d / "model.safetensors")[UP.format(1)].float() for d in ("dense", "tuned", "out")
    )
    assert (found - wanted).norm() < 0.5 * (dense - wanted).norm()


Own = dict[str, Any]


def forged(file: Path, name: str, own: Own, path: Path) -> Path:
    parts: Forged = take_apart(file)
    plan = parts.plan
    index = [entry.name for entry in parts.entries].index(name)
    kind = plan["sites"][index] if isinstance(plan["sites"][index], int) else plan["sites"][index][0]
    plan["sites"][index] = [kind, own]
    parts.plan = plan
    path.write_bytes(parts.pack())
    return path


@pytest.mark.parametrize(
    "reference",
    [
        "nothing",
        "",
        UP.format(1),  # itself
        QUERY.format(3),  # refers to another
        "model.norm.weight",
        QUERY.format(0),
        DOWN.format(0),
    ],
)
def test_references_to_what_cannot_be_shared_are_refused(file: Path, tmp_path: Path, reference: str) -> None:
    bad = forged(file, UP.format(1), {"reference": f"self:{reference}"}, tmp_path / "x.bayou")
    with pytest.raises(BadFile, match=rf"x\.bayou: site '{UP.format(1)}' .*self:{reference}"):
        DeltaFile(bad)


def test_cycles_parts_and_names_are_refused(file: Path, tmp_path: Path) -> None:
    bad = forged(file, DOWN.format(3), {"reference": f"self:{DOWN.format(2)}"}, tmp_path / "x.bayou")
    with pytest.raises(BadFile, match="refers to"):
        DeltaFile(bad)
    with pytest.raises(BadFile, match="its reference"):
        DeltaFile(forged(file, UP.format(1), {"reference": f"self:{UP.format(0)}", "part": 3}, tmp_path / "y.bayou"))
    parts = take_apart(file)
    parts[UP.format(1)].name = f"self:{UP.format(0)}"
    (tmp_path / "z.bayou").write_bytes(parts.pack())
    with pytest.raises(BadFile, match="a site of the name 'self:"):
        DeltaFile(tmp_path / "z.bayou")
    parts = take_apart(file)
    parts.replace(".base", bytes(32))
    (tmp_path / "w.bayou").write_bytes(parts.pack())
    with pytest.raises(BadFile, match=r"leans on no base, but \.base is not empty"):
        bayou.load(None, tmp_path / "w.bayou")


WIDE = (512, 16_384)


def sign(shape: tuple[int, int]) -> tuple[Term, ...]:
    """A product of signs: u has 4 bytes a row, v a bit a column."""
    u, v = (Packed.codes(torch.zeros(size, dtype=torch.uint8), Spec(1)) for size in ((shape[0], 1), (1, shape[1])))
    return (LowRank(((u, v),), 1.0),)


def claiming(path: Path, references: list[str | None], exact: Tensor | None = None, used: int = 0) -> Path:
    """A file of sites w0, w1, ... with these references, those without any of `WIDE`; "a" is an exact tensor."""
    sites, blobs = [], []
    for i, reference in enumerate(references):
        like = torch.empty(WIDE if exact is None else exact.shape, device="meta")
        terms = sign(WIDE) if reference is None else ()
        sites.append(site(f"w{i}", like, reference, terms, 0.5))
        blobs.append(pack_terms(terms))
    held = [] if exact is None else [Exact("a", "BF16", tuple(exact.shape), lambda: exact)]
    leaned = {f"b{i}": bytes(32) for i in range(used)}
    Contents(sites, held, [], "", "", leaned, {}, {}).write(path, blobs.__getitem__, [0.0] * len(sites))
    return path


def test_few_bytes_that_claim_huge_matrices_are_refused_before_any_is_made(tmp_path: Path) -> None:
    one = claiming(tmp_path / "one", [None])
    assert one.stat().st_size < 6_000 and WIDE[0] * WIDE[1] > EXPANSION * one.stat().st_size
    part = claiming(tmp_path / "part", ["b0", None], used=1)  # over a base too
    anchor = torch.zeros(1024, 1024, dtype=torch.bfloat16)
    many = claiming(tmp_path / "many", ["self:a"] * 3_000, anchor)
    for path in (one, part, many):
        for use in (
            DeltaFile,
            report.verify,
            lambda p: bayou.load(p),
            lambda p: bayou.restore(None, p, tmp_path / "o"),
        ):
            with pytest.raises(BadFile, match=rf"{path.name}: [\d,]+ bytes claim matrices of [\d,]+ elements"):
                use(path)
    assert not (tmp_path / "o").exists()
    assert len(DeltaFile(claiming(tmp_path / "fewer", ["self:a"] * 2_000, anchor)).sites) == 2_000


def test_what_a_base_vouches_for_may_be_as_large_as_the_base(tmp_path: Path) -> None:
    path = claiming(tmp_path / "a", ["b0", "self:w0"], used=1)
    assert 2 * WIDE[0] * WIDE[1] > EXPANSION * path.stat().st_size and len(DeltaFile(path).sites) == 2
    mixed = claiming(tmp_path / "b", ["b0", None, "self:w1"], used=1)
    with pytest.raises(BadFile, match="claim matrices of 16,777,216 elements"):
        DeltaFile(mixed)


def test_parts_that_no_base_has_count_though_another_part_of_theirs_is_vouched_for(tmp_path: Path) -> None:
    like, terms = torch.empty(WIDE, device="meta"), sign(WIDE)
    first, second = site("w", like, "b0", ()), site("w", like, None, terms)
    sites = [replace(first, part=0, reference_part=0), replace(second, part=1)]
    contents = Contents(sites, [], [], "", "", {"b0": bytes(32)}, {}, {})
    contents.write(tmp_path / "a", [b"", pack_terms(terms)].__getitem__, [0.0, 0.0])
    with pytest.raises(BadFile, match="claim matrices of 8,388,608 elements"):
        DeltaFile(tmp_path / "a")
