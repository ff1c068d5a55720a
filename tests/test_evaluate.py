"""Every number of `evaluate` against one computed by hand, a row at a time, from the models' full logits."""

from __future__ import annotations

import importlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pico import perturb, pico, tokenizer
from rich.console import Console

from bayou.errors import BadInput
from bayou.evaluate import Remembered, evaluate, table

MODULE = importlib.import_module("bayou.evaluate")  # the package's `evaluate` is the function

ROWS = [
    {"prompt": "2+2=", "answer": "4</s>"},
    {"prompt": "the capital of France is ", "answer": "Paris</s>"},
    {"prompt": "x", "answer": "a rather long answer, much longer than its prompt</s>"},
    {"prompt": "say b: ", "answer": "b"},
]


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def pair(tmp_path: Path, name: str = "llama_gqa") -> tuple[Any, Any]:
    base = pico(name, tmp_path / "base")
    return load(perturb(base, tmp_path / "tuned", scale=0.3)), load(base)


def by_hand(reference: Any, candidate: Any, rows: list[tuple[list[int], int]]) -> dict[str, Any]:
    """The same numbers, in fp64, from the whole logits of one row at a time."""
    kl, flip, nll, nll_reference, right, right_reference = [], [], [], [], [], []
    for ids, start in rows:
        target = torch.tensor(ids[start:])[:, None]
        with torch.no_grad():
            p, q = (
                m(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].double().log_softmax(-1)
                for m in (reference, candidate)
            )
        kl.append((p.exp() * (p - q)).sum(-1))
        flip.append((p.argmax(-1) != q.argmax(-1)).double())
        nll.append(-q.gather(1, target)[:, 0])
        nll_reference.append(-p.gather(1, target)[:, 0])
        right.append(float((q.argmax(-1) == target[:, 0]).all()))
        right_reference.append(float((p.argmax(-1) == target[:, 0]).all()))
    tokens, n = sum(len(row) for row in kl), len(rows)
    mean = {
        name: (torch.cat(v).sum() / tokens).item()
        for name, v in {"kl": kl, "flip": flip, "nll": nll, "nll_reference": nll_reference}.items()
    }
    spread = sum((row.sum().item() - mean["kl"] * len(row)) ** 2 for row in kl)
    acc = sum(right) / n
    return {
        **mean,
        "rows": n,
        "tokens": tokens,
        "kl_se": math.sqrt(n / (n - 1) * spread) / tokens,
        "acc": acc,
        "acc_se": math.sqrt(acc * (1 - acc) / (n - 1)),
        "acc_reference": sum(right_reference) / n,
        "ppl": math.exp(mean["nll"]),
        "ppl_reference": math.exp(mean["nll_reference"]),
    }


def agree(found: dict[str, Any], hand: dict[str, Any]) -> None:
    numbers = {key: value for key, value in found.items() if key in hand and key != "kind"}
    assert numbers == {key: pytest.approx(hand[key], rel=1e-4) for key in numbers}


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "gemma3", "mixtral"])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_answers(name: str, batch: int, tmp_path: Path) -> None:
    reference, candidate = pair(tmp_path, name)
    encode = lambda text: tokenizer()(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    rows = [(encode(r["prompt"]) + encode(r["answer"]), len(encode(r["prompt"]))) for r in ROWS]
    # A row that both get right: its answer is what they say.
    for token in range(5, 100):
        start = torch.tensor([[token, 7]])
        said = [m(input_ids=start).logits[0, -1].argmax().item() for m in (reference, candidate)]
        word = tokenizer().decode(said[:1])
        if said[0] == said[1] and encode(word) == said[:1]:
            break
    extra = {"prompt": tokenizer().decode([token, 7]), "answer": word}
    data = write(tmp_path / "data.jsonl", *ROWS, extra)
    found = evaluate(reference, candidate, tokenizer(), data, batch=batch)
    agree(found, by_hand(reference, candidate, [*rows, ([token, 7, said[0]], 2)]))
    assert found["kind"] == "answers" and found["rows"] == 5 and found["acc"] >= 0.2 and found["kl"] > 1e-4
    assert found["tokens"] == 2 + 6 + 50 + 1 + 1 and "ppl" not in found
    json.dumps(found)


@pytest.mark.parametrize("name", ["llama_gqa", "qwen3_moe"])
def test_text(name: str, tmp_path: Path) -> None:
    reference, candidate = pair(tmp_path, name)
    text = "Every number of this text counts, the last window is shorter than the others.\n" * 3
    (tmp_path / "a.txt").write_text(text)
    found = evaluate(reference, candidate, tokenizer(), tmp_path / "a.txt", length=50)
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    agree(found, by_hand(reference, candidate, [(ids[i : i + 50], 1) for i in range(0, len(ids), 50)]))
    assert found["kind"] == "text" and found["tokens"] == len(ids) - 5 and "acc" not in found


def test_a_model_is_true_to_itself(tmp_path: Path) -> None:
    reference, _ = pair(tmp_path)
    found = evaluate(reference, reference, tokenizer(), write(tmp_path / "a.jsonl", *ROWS), batch=3)
    assert abs(found["kl"]) < 1e-9 and found["flip"] == 0 and found["kl_se"] < 1e-9
    assert found["nll"] == found["nll_reference"] and found["acc"] == found["acc_reference"]


def test_small_blocks_of_logits_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, candidate = pair(tmp_path)
    data = write(tmp_path / "a.jsonl", *ROWS)
    whole = evaluate(reference, candidate, tokenizer(), data)
    monkeypatch.setattr(MODULE, "_BLOCK", 1000)  # 7 tokens of a vocabulary of 128
    monkeypatch.setattr(MODULE, "_LOGITS", 128 * 4 * 30)  # 30 tokens
    sizes: list[int] = []
    for model in (reference, candidate):
        model.lm_head.register_forward_hook(lambda _m, _a, out: sizes.append(out.numel() // 128))
    agree(evaluate(reference, candidate, tokenizer(), data), whole)
    assert max(sizes) == 50 and sorted(set(sizes))[-2] <= 30  # a single row goes whatever its size


@pytest.mark.parametrize("limit,second", [(2**30, 0), (0, 1), (128 * 4 * 30, 1)])
def test_a_remembered_reference_runs_once(tmp_path: Path, limit: int, second: int) -> None:
    reference, candidate = pair(tmp_path)
    data = write(tmp_path / "a.jsonl", *ROWS)
    wanted = evaluate(reference, candidate, tokenizer(), data, batch=2)
    loads = []

    def load_once() -> Any:
        loads.append(1)
        return reference

    for expected in (1, second):  # a second one, as after a restart, finds in the folder what fitted
        kept = Remembered(reference.config, load_once, tmp_path / "kept", "cpu", limit)
        loads.clear()
        assert evaluate(kept, candidate, tokenizer(), data, batch=2) == wanted
        kept.release()
        assert len(loads) == expected
    assert sum(path.stat().st_size for path in (tmp_path / "kept").iterdir()) <= limit * 1.1
    with pytest.raises(BadInput, match="vocabulary of 128, the candidate of 130"):
        grown = load(perturb(tmp_path / "base", tmp_path / "grown", grow_vocab=2))
        evaluate(kept, grown, tokenizer(), data, batch=2)


def test_a_model_that_makes_all_its_logits(tmp_path: Path) -> None:
    reference, candidate = pair(tmp_path)
    data = write(tmp_path / "a.jsonl", *ROWS)

    class Plain(torch.nn.Module):
        """As a wrapper of a model may be: no logits_to_keep."""

        config, device = reference.config, reference.device

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return self.inner(input_ids=input_ids, use_cache=use_cache)

    expected = evaluate(reference, candidate, tokenizer(), data)
    agree(evaluate(Plain(reference), Plain(candidate), tokenizer(), data), expected)


def test_excluded_tokens_do_not_spoil_the_divergence(tmp_path: Path) -> None:
    reference, _ = pair(tmp_path)

    class Excluding(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).index_fill(-1, torch.tensor([3]), -math.inf)

    head = reference.lm_head
    reference.lm_head = Excluding(head.in_features, head.out_features, bias=False)
    reference.lm_head.weight = head.weight
    found = evaluate(reference, reference, tokenizer(), write(tmp_path / "a.jsonl", *ROWS))
    assert found["kl"] == 0


def test_rows_are_chosen_by_seed(tmp_path: Path) -> None:
    reference, candidate = pair(tmp_path)
    data = write(tmp_path / "a.jsonl", *ROWS)
    first = evaluate(reference, candidate, tokenizer(), data, rows=2)
    assert first["rows"] == 2 and first == evaluate(reference, candidate, tokenizer(), data, rows=2)
    assert {evaluate(reference, candidate, tokenizer(), data, rows=1, seed=s)["tokens"] for s in range(9)} > {2}
    one = evaluate(reference, candidate, tokenizer(), data, rows=1)
    assert one["kl_se"] is None and one["acc_se"] is None
    assert evaluate(reference, candidate, tokenizer(), data, rows=99)["rows"] == 4


def test_a_tokenizer_that_sets_bos(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    starting = tokenizer()
    starting._tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    reference, candidate = pair(tmp_path)
    with_bos = [{**row, "prompt": "<s>" + row["prompt"]} for row in ROWS]
    found = [
        evaluate(reference, candidate, tok, write(tmp_path / "a.jsonl", *rows))
        for tok, rows in ((starting, ROWS), (starting, with_bos), (tokenizer(), with_bos))
    ]
    assert found[0] == found[1] == found[2]
    empty = write(tmp_path / "b.jsonl", {"prompt": "", "answer": "yes"})
    assert evaluate(reference, candidate, starting, empty)["tokens"] == 3


def test_the_table_says_it_all(tmp_path: Path) -> None:
    reference, candidate = pair(tmp_path)
    (tmp_path / "a.txt").write_text("some text")
    console = Console(width=120, record=True, file=io.StringIO())
    answers = evaluate(reference, candidate, tokenizer(), write(tmp_path / "a.jsonl", *ROWS))
    console.print(table(answers))
    console.print(table(evaluate(reference, candidate, tokenizer(), tmp_path / "a.txt")))
    shown = console.export_text()
    assert f"{answers['kl']:.5f} ± {answers['kl_se']:.5f}" in shown
    assert "4 rows of answers, 59 tokens" in shown and "1 windows of text, 8 tokens" in shown
    assert "perplexity" in shown and "rows all right" in shown


@pytest.mark.parametrize(
    "rows,options,message",
    [
        ([], {}, "has no rows"),
        ([{"prompt": "x"}], {}, 'line 1: "answer" must be a string; it has prompt'),
        ([{"prompt": "x", "answer": ""}], {}, "line 1: prompt and answer must have a token each"),
        ([{"prompt": "x" * 300, "answer": "y"}], {}, "row of 301 tokens; the model has 256 positions"),
        (ROWS, {"rows": 0}, "cannot evaluate 0 rows"),
    ],
)
def test_data_that_cannot_be_used(
    rows: list[dict[str, str]], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    reference, candidate = pair(tmp_path)
    with pytest.raises(BadInput, match=message):
        evaluate(reference, candidate, tokenizer(), write(tmp_path / "a.jsonl", *rows), **options)


def test_text_that_cannot_be_used_and_other_vocabularies(tmp_path: Path) -> None:
    reference, candidate = pair(tmp_path)
    text = tmp_path / "a.txt"
    text.write_text("x")
    with pytest.raises(BadInput, match="1 tokens of text: too few"):
        evaluate(reference, candidate, tokenizer(), text)
    with pytest.raises(BadInput, match="windows of 1 tokens"):
        evaluate(reference, candidate, tokenizer(), text, length=1)
    text.write_text("enough")
    grown = load(perturb(tmp_path / "base", tmp_path / "grown", grow_vocab=2))
    with pytest.raises(BadInput, match="vocabulary of 130, the candidate of 128"):
        evaluate(grown, candidate, tokenizer(), text)
