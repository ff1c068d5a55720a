"""What goes wrong in one tenant's file, tokenizer or draw, and stays there."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pico import perturb
from tamper import header_of
from tenants import Asked, prompts

import bayou
from bayou.errors import DamagedFile, Unsupported
from bayou.serving import resident
from bayou.serving.engine import Engine, Settings
from bayou.serving.refusals import Refused
from bayou.serving.sampling import Row, Sampling, choose

GREEDY = Sampling(max_tokens=8, ignore_eos=True)


@pytest.fixture
def engine(made: tuple) -> Iterator[Engine]:
    found = Engine(made[0], "base", Settings(batch=8))
    for name, file in made[1].items():
        found.bank.register(name, file)
    yield found
    found.close()


def test_a_head_that_the_fine_tune_tied_is_refused() -> None:
    # The file has no head then, and the base's own would answer in its place.
    config = {"model_type": "llama", "tie_word_embeddings": False}
    tied = config | {"tie_word_embeddings": True}
    resident.check_config(config, config, "x.bayou")
    resident.check_config(tied, config, "x.bayou")
    with pytest.raises(Unsupported, match="its head is its embedding"):
        resident.check_config(config, tied, "x.bayou")


def test_damage_where_the_model_has_no_place_is_found_too(engine: Engine, made: tuple, tmp_path: Path) -> None:
    tuned = perturb(made[0], tmp_path / "tuned", integer_buffer=True)
    file = tmp_path / "odd.bayou"
    bayou.compress(made[0], tuned, file, ratio=2.5, calibration="none")
    content = bytearray(file.read_bytes())
    header, start = header_of(bytes(content))
    content[start + header["bayou_test.position_ids"]["data_offsets"][0]] ^= 1
    file.write_bytes(content)
    tenant = engine.bank.register("odd", file)
    with pytest.raises((DamagedFile, Refused)):
        engine.load(tenant)


def test_a_tokenizer_that_fails_ends_its_own_answer_only(engine: Engine, made: tuple) -> None:
    class Panic(BaseException):
        pass

    def fail(*_: object) -> str:
        raise Panic("no such token")

    name, other = list(made[1])[:2]
    broken = Asked(engine, other, prompts(1, longest=200)[0] * 4, GREEDY)
    broken.answer.speech.add = fail  # before its prompt has been read
    asked = Asked(engine, name, prompts(1)[0], GREEDY)
    assert "Panic: no such token" in str(broken.wait().refused)
    assert asked.wait().refused is None and Asked(engine, name, prompts(1)[0], GREEDY).wait().refused is None


def test_a_draw_of_one_takes_no_token_without_a_chance() -> None:
    class Highest(random.Random):
        def random(self) -> float:
            return 1 - 2**-53

    scores = torch.full((1, 50), -torch.inf)
    scores[0, :3] = torch.tensor([2.0, 1.0, -1e9])
    row = Row(Sampling(max_tokens=1, temperature=1.0), Highest())
    (chosen,) = choose(scores, [row])
    assert chosen is not None and chosen.token in (0, 1)
