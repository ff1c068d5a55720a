"""coded.py: --entropy changes the bytes of a file and nothing that it stands for; hostile ones are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from encoded import DELTAS, dial, encode, gram_of
from tamper import take_apart, tensors

import bayou
from bayou import coded, methods
from bayou.deltafile import DeltaFile
from bayou.entry import pack_terms
from bayou.errors import BadFile
from bayou.methods import TermLayout, layout_of
from bayou.report import verify


@pytest.fixture(scope="module")
def plain(base: Path, tuned: Path) -> Path:
    out = base.with_name("plain.bayou")
    bayou.compress(base, tuned, out, ratio=3, calibration="none")
    return out


@pytest.fixture(scope="module")
def small(base: Path, tuned: Path) -> Path:
    out = base.with_name("small.bayou")
    bayou.compress(base, tuned, out, ratio=3, calibration="none", entropy=True)
    return out


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("which", ["33x100", "200x160", "70x1", "tiny"])
def test_terms_come_back_byte_for_byte(name: str, which: str) -> None:
    delta = DELTAS[which]()
    shape = (delta.shape[0], delta.shape[1])
    terms = encode(name, delta, {}, gram_of(shape[1]))
    raw, layouts = pack_terms(terms), tuple(layout_of(term) for term in terms)
    found = coded.encode(raw, layouts, shape)
    if found is not None:
        assert len(found) < len(raw) and len(found) % 16 == 0
        assert bytes(coded.decode(memoryview(found), layouts, shape)) == raw
    options = methods.check(name, {}) | dial(name, shape)
    assert methods.get(name).layout(shape, **options) == layouts


def test_codes_that_are_not_uniform_take_less_and_noise_is_left_alone() -> None:
    layouts, shape = (TermLayout("Dense", ((0, "2g128", ""),)),), (256, 512)
    rng = np.random.default_rng(0)

    def raw(weights: tuple[float, ...]) -> bytes:
        codes = rng.choice(4, (256, 128, 4), p=weights)
        plane = (codes << np.arange(0, 8, 2)).sum(-1).astype(np.uint8).tobytes()
        return bytes(16) + plane + np.abs(rng.normal(1, 0.1, (256, 4))).astype(np.float16).tobytes()

    even, uneven = raw((0.25, 0.25, 0.25, 0.25)), raw((0.1, 0.4, 0.4, 0.1))
    few = coded.encode(uneven, layouts, shape)
    assert few is not None and len(few) < 0.9 * len(uneven)  # 1.72 bits of 2
    assert bytes(coded.decode(memoryview(few), layouts, shape)) == uneven
    left = coded.encode(even, layouts, shape)  # but for the scales' high bytes
    assert left is None or len(left) > 0.97 * len(even)
    assert coded.encode(b"", (), shape) is None


def test_a_coded_file_is_smaller_and_stands_for_the_same(base: Path, plain: Path, small: Path, tmp_path: Path) -> None:
    assert small.stat().st_size < plain.stat().st_size
    one, other = DeltaFile(plain), DeltaFile(small)
    assert take_apart(plain).metadata["version"] == "1" and take_apart(small).metadata["version"] == "2"
    assert any(site.coded for site in other.sites.values()) and not other.stepped
    for name in one.sites:
        assert pack_terms(one.delta(name).terms) == pack_terms(other.delta(name).terms)
    assert one.errors() == other.errors() and verify(small, base)["base_tensors"] > 0
    loaded = other.deltas(list(other.sites))
    assert all(pack_terms(loaded[name].terms) == pack_terms(one.delta(name).terms) for name in one.sites)
    for file, out in ((plain, tmp_path / "a"), (small, tmp_path / "b")):
        bayou.restore(base, file, out)
    assert tensors(tmp_path / "a") == tensors(tmp_path / "b")
    model, ids = bayou.load(base, small), torch.arange(5, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, bayou.load(base, plain)(ids).logits)
    bayou.detach(model)


def test_the_same_input_gives_the_same_coded_file(base: Path, tuned: Path, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.bayou"
    bayou.compress(base, tuned, out, ratio=3, calibration="none", entropy=True)
    assert out.read_bytes() == small.read_bytes() and not out.with_name("again.bayou.journal").exists()


def coded_site(small: Path) -> tuple[str, bytes, tuple[TermLayout, ...], tuple[int, int]]:
    opened = DeltaFile(small)
    name = next(name for name, site in opened.sites.items() if site.coded)
    return name, bytes(opened.read_raw(name)), opened.sites[name].terms, opened.sites[name].shape


def test_damage_is_refused_or_gives_other_bytes_but_never_anything_else(small: Path) -> None:
    _, stored, layouts, shape = coded_site(small)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(stored)
        for at in rng.integers(0, len(stored), rng.integers(1, 4)):
            damaged[at] ^= int(rng.integers(1, 256))
        try:
            coded.decode(memoryview(damaged), layouts, shape)
        except ValueError:
            refused += 1
    assert refused > 60
    for wrong in (b"", stored[:16], stored[:-16], stored + bytes(16), bytes(len(stored)), b"\xff" * len(stored)):
        with pytest.raises(ValueError):
            coded.decode(memoryview(wrong), layouts, shape)


def test_coded_terms_that_cannot_be_are_refused(base: Path, small: Path, tmp_path: Path) -> None:
    name, stored, _, _ = coded_site(small)
    forged = take_apart(small)
    forged.replace(name, b"\xff" * len(stored))
    (tmp_path / "x.bayou").write_bytes(forged.pack())
    with pytest.raises(BadFile, match="its coded terms are not as specified"):
        verify(tmp_path / "x.bayou")
    with pytest.raises(BadFile, match="its coded terms are not as specified"):
        bayou.restore(base, tmp_path / "x.bayou", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    forged = take_apart(small)
    forged.metadata["version"] = "1"
    (tmp_path / "x.bayou").write_bytes(forged.pack())
    with pytest.raises(BadFile, match="coded terms, but is of version 1"):
        DeltaFile(tmp_path / "x.bayou")


@pytest.mark.parametrize("size", [-16, 8, 16, 2**30, 16.0, True, None])
def test_sizes_that_cannot_be_are_refused(small: Path, tmp_path: Path, size: object) -> None:
    forged = take_apart(small)
    plan = forged.plan
    index = next(i for i, site in enumerate(plan["sites"]) if isinstance(site, list) and "coded" in site[1])
    plan["sites"][index][1]["coded"] = size
    forged.plan = plan
    (tmp_path / "x.bayou").write_bytes(forged.pack())
    with pytest.raises(BadFile):
        DeltaFile(tmp_path / "x.bayou")


def test_few_bytes_cannot_claim_many(small: Path, tmp_path: Path) -> None:
    forged = take_apart(small)
    plan = forged.plan
    index = next(i for i, site in enumerate(plan["sites"]) if isinstance(site, list) and "coded" in site[1])
    plan["sites"][index][1]["coded"] = 16
    template = plan["templates"][plan["sites"][index][0]]
    template["terms"] = template["terms"] * 100
    forged.replace(forged.entries[index].name, bytes(16))
    forged.plan = plan
    (tmp_path / "x.bayou").write_bytes(forged.pack())
    with pytest.raises(BadFile, match="16 bytes for terms of"):
        DeltaFile(tmp_path / "x.bayou")
