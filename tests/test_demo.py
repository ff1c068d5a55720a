"""The demo's data: held-out rows are never trained on, and every word is in the tokenizer."""

import random
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def tiny_models() -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import tiny_models

        return tiny_models
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.mark.parametrize("task", ["sql", "sort"])
def test_held_out_rows_are_never_trained_on(tiny_models: ModuleType, task: str) -> None:
    trained = {row.prompt for row in islice(tiny_models.rows(task, held_out=False, seed=0), 3000)}
    held_out = {row.prompt for row in islice(tiny_models.rows(task, held_out=True, seed=0), 3000)}
    assert len(held_out) > tiny_models.HELD_OUT_ROWS
    assert not trained & held_out


def test_every_word_is_in_the_tokenizer(tiny_models: ModuleType) -> None:
    tokenizer = tiny_models.make_tokenizer()
    rng = random.Random(0)
    texts = [tiny_models.paragraph(rng) for _ in range(500)]
    for task in tiny_models.TASKS:
        texts += [row.prompt + row.answer for row in islice(tiny_models.rows(task, held_out=False), 500)]
    assert all(tokenizer.unk_token_id not in tokens for tokens in tokenizer(texts).input_ids)


def test_the_base_never_reads_a_task(tiny_models: ModuleType) -> None:
    rng = random.Random(0)
    reading = " ".join(tiny_models.paragraph(rng) for _ in range(5000))
    assert "put in order :" not in reading
    assert not any(f"select {column} from" in reading for column in tiny_models.COLUMNS)


def test_a_row_counts_only_when_every_answer_token_is_right(tiny_models: ModuleType) -> None:
    tokenizer = tiny_models.make_tokenizer()
    rows = list(islice(tiny_models.rows("sort", held_out=True), 4))
    tokens, labels = tiny_models.padded(tokenizer, rows)
    truth = torch.nn.functional.one_hot(tokens[:, 1:], len(tokenizer)) * 20.0
    assert tiny_models.score(truth, labels, truth) == (1.0, 0.0)
    wrong = truth.clone()
    last = int((labels[2] != tiny_models.IGNORED).nonzero()[-1]) - 1  # END itself
    wrong[2, last] = wrong[2, last].roll(1)
    accuracy, kl = tiny_models.score(wrong, labels, truth)
    assert accuracy == 0.75
    assert kl > 0
