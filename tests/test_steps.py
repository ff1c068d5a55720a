"""steps.py: any matrix becomes any other of its dtype, bit for bit; sections that cannot be are refused."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from bayou import entropy, steps
from bayou.errors import BadFile

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def chunks(predicted: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = steps.chunk_rows(predicted.shape[1])
    return zip(predicted.split(rows), wanted.split(rows), strict=True)


def coded(predicted: Tensor, wanted: Tensor) -> bytes:
    return steps.encode(chunks(predicted, wanted), predicted.shape[1])


def moved(section: bytes, predicted: Tensor) -> Tensor:
    weight = predicted.clone()
    shape = (weight.shape[0], weight.shape[1])
    steps.check(memoryview(section), shape, weight.element_size(), "w")
    steps.move(memoryview(section), weight, "w")
    return weight


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(INTEGERS[a.dtype]), b.view(INTEGERS[b.dtype]))


def pair(shape: tuple[int, int], dtype: torch.dtype, size: float = 1e-3, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(shape, generator=g) * 0.05
    return old.to(dtype), (old.to(dtype).float() + size * torch.randn(shape, generator=g)).to(dtype)


@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (3, 70), (70, 3), (130, 200), (64, 64)])
def test_a_matrix_becomes_another_bit_for_bit(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    predicted, wanted = pair(shape, dtype)
    section = coded(predicted, wanted)
    assert len(section) % 16 == 0
    assert same(moved(section, predicted), wanted)


@dtypes
def test_every_number_there_is_comes_back(dtype: torch.dtype) -> None:
    odd = [
        0.0,
        -0.0,
        1e-40,
        -1e-45,
        6e-8,
        torch.finfo(dtype).max,
        torch.finfo(dtype).min,
        torch.inf,
        -torch.inf,
        torch.nan,
    ]
    wanted = torch.tensor(odd * 100).to(dtype).reshape(50, -1)
    predicted = wanted.flatten()[torch.randperm(wanted.numel(), generator=torch.Generator().manual_seed(0))]
    predicted = predicted.nan_to_num(0.5).reshape(wanted.shape)
    assert same(moved(coded(predicted, wanted), predicted), wanted)
    bits = torch.randint(-(2**15), 2**15, (40, 50), dtype=torch.int16)
    if dtype != torch.float32:
        noise = bits.view(dtype)
        assert same(
            moved(coded(predicted[:40, :1].expand(40, 50).contiguous(), noise), predicted[:40, :1].expand(40, 50)),
            noise,
        )


@dtypes
def test_ordered_integers_are_neighbours_where_the_floats_are(dtype: torch.dtype) -> None:
    width = torch.iinfo(INTEGERS[dtype])
    bits = torch.randint(width.min, width.max, (4000,), dtype=INTEGERS[dtype]).numpy()
    assert np.array_equal(steps.ordered(steps.ordered(bits)), bits)
    values = torch.from_numpy(bits).view(dtype).float().numpy()
    finite = np.isfinite(values)
    by_integer = np.argsort(steps.ordered(bits[finite]), kind="stable")
    assert (np.diff(values[finite][by_integer]) >= 0).all()
    zeros = torch.tensor([-0.0, 0.0], dtype=dtype).view(INTEGERS[dtype]).numpy()
    assert steps.ordered(zeros).tolist() == [-1, 0]


@dtypes
def test_chunks_of_rows_give_the_whole(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    predicted, wanted = pair((130, 70), dtype)
    whole = coded(predicted, wanted)
    monkeypatch.setattr(steps, "CHUNK", 70 * 33)
    section = coded(predicted, wanted)
    assert section[:4] == (33).to_bytes(4, "little") and section != whole
    assert same(moved(section, predicted), wanted)


def test_a_small_change_takes_few_bytes_and_the_contexts_pay() -> None:
    old, new = pair((512, 512), torch.bfloat16)
    size = len(coded(old, new))
    plain = new.nbytes
    assert size < 0.45 * plain
    # Rows of their own size: without the classes all would be coded as the mixture.
    scale = torch.logspace(-2, 1, 512)[:, None]
    varied = (old.float() + (new.float() - old.float()) * scale).bfloat16()
    shuffled = (
        old.float()
        + (new.float() - old.float()) * scale[torch.randperm(512)].T.expand(512, 512)[:, torch.randperm(512)]
    ).bfloat16()
    assert abs(len(coded(old, varied)) / len(coded(old, shuffled)) - 1) < 0.03
    few = old.clone()
    few.view(-1)[::200] = new.view(-1)[::200]
    assert len(coded(old, few)) < 0.01 * plain
    assert len(coded(old, old)) < 0.002 * plain


def test_noise_is_stored_as_it_is() -> None:
    noise = torch.randint(-(2**15), 2**15, (100, 100), dtype=torch.int16).view(torch.bfloat16)
    section = coded(torch.zeros(100, 100, dtype=torch.bfloat16), noise)
    assert len(section) == 16 + 32 + noise.nbytes
    assert same(moved(section, torch.zeros(100, 100, dtype=torch.bfloat16)), noise)


def test_the_same_input_gives_the_same_bytes() -> None:
    assert coded(*pair((100, 80), torch.bfloat16)) == coded(*pair((100, 80), torch.bfloat16))


def test_a_section_of_another_size_or_matrix_is_refused() -> None:
    predicted, wanted = pair((64, 80), torch.bfloat16)
    section = coded(predicted, wanted)
    for wrong in (b"", section[:10], section[:16], section[:40], section[:-16], section + bytes(16)):
        for what in (
            lambda w: steps.check(w, (64, 80), 2, "x.bayou: w"),
            lambda w: steps.move(w, predicted.clone(), "x.bayou: w"),
        ):
            with pytest.raises(BadFile, match=r"^x\.bayou: w: its steps are not as specified"):
                what(memoryview(wrong))
    for other in (predicted[:, :79].contiguous(), predicted[:63], predicted.flip(0)):
        with pytest.raises(BadFile):
            steps.move(memoryview(section), other.clone(), "w")


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (3, 255),
        (16, 2),
        (17, 0),
        (17, 9),
        (18, 0),
        (18, 129),
        (20, 0),
        (23, 255),
        (27, 255),
        (31, 255),
        (35, 255),
    ]
    + [(24, 7), (28, 7), (32, 7)],
)
def test_fields_that_cannot_be_are_refused(at: int, value: int) -> None:
    predicted, wanted = pair((64, 80), torch.bfloat16, size=0.1)
    section = bytearray(coded(predicted, wanted))
    assert section[at] != value
    section[at] = value
    with pytest.raises(BadFile):
        moved(bytes(section), predicted)


def test_chunks_of_no_rows_or_of_too_many_are_refused() -> None:
    predicted, wanted = pair((64, 80), torch.bfloat16)
    section = coded(predicted, wanted)
    for rows in (0, steps.CHUNK // 80 + 1, 2**32 - 1):
        with pytest.raises(BadFile, match="chunks of"):
            moved(rows.to_bytes(4, "little") + section[4:], predicted)


def test_a_step_out_of_the_dtype_is_refused() -> None:
    old = torch.full((70, 70), 0.1, dtype=torch.bfloat16)
    section = coded(old, torch.full((70, 70), 3e38, dtype=torch.bfloat16))
    with pytest.raises(BadFile):
        steps.move(memoryview(section), torch.full((70, 70), 1e38, dtype=torch.bfloat16), "w")


@dtypes
def test_damage_is_refused_or_gives_other_numbers_but_never_anything_else(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entropy, "lanes_for", lambda *_: 7)  # numpy's loops over one or two lanes are slow
    rng = np.random.default_rng(0)
    predicted, wanted = pair((64, 80), dtype, size=0.02)
    section = coded(predicted, wanted)
    refused = 0
    for _ in range(300):
        damaged = bytearray(section)
        for at in rng.integers(0, len(section), rng.integers(1, 4)):
            damaged[at] ^= int(rng.integers(1, 256))
        try:
            moved(bytes(damaged), predicted)
        except BadFile:
            refused += 1
    assert refused > 60  # of fp32 most are plain bits, which are what they are
