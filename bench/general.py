"""The test bed's `general` scores for a model in memory, in large batches: a GPU is busy, not waiting.

Same texts, options, weights and sums as `testbed.py general` (tests/test_bench_sharing.py compares them), and beside
the means the single values, for paired tests between models. The head runs only where an answer's tokens are.
"""

import copy
import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from bayou import objective

BENCHMARKS = ("arc_easy", "mmlu_redux", "winogrande")
Pair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Benchmark:
    """Options of all questions end to end; question q has options start[q]:start[q + 1], gold[q] is the right one."""

    pairs: list[Pair]
    weight: np.ndarray
    start: list[int]
    gold: list[int]


@dataclass(frozen=True)
class Questions:
    """All that is scored, tokenised once. rows: questions a benchmark at most."""

    texts: list[list[int]]
    benchmarks: dict[str, Benchmark]
    rows: int


def prepare(testbed: ModuleType, tokenizer: PreTrainedTokenizerBase, rows: int, seed: int = 3) -> Questions:
    """The test bed's held-out texts and benchmarks as token ids."""
    known: dict[str, list[int]] = {}

    def ids(text: str) -> list[int]:
        if text not in known:
            known[text] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return known[text]

    texts = [t for t in (ids(d)[:512] for d in testbed.documents("corpus_heldout")[:60]) if len(t) > 8]
    found = {}
    for name in BENCHMARKS:
        with gzip.open(Path(testbed.HERE) / "benchmarks" / f"{name}.jsonl.gz", "rt") as file:
            data = [json.loads(line) for line in file]
        data = random.Random(seed).sample(data, min(rows, len(data)))
        pairs: list[Pair] = []
        weight: list[float] = []
        start = [0]
        for r in data:
            if name == "winogrande":
                options = [(ids(c), ids(" " + r["continuation"].strip())) for c in r["contexts"]]
                weight += [1.0] * len(options)
            else:
                head = r["context"] if name == "arc_easy" else "Question: " + r["context"]
                options = [(ids(head + "\nAnswer:"), ids(" " + str(c))) for c in r["choices"]]
                weight += [max(1, len(str(c).encode())) for c in r["choices"]]
            pairs += options
            start.append(len(pairs))
        found[name] = Benchmark(pairs, np.array(weight), start, [r["gold"] for r in data])
    return Questions(texts, found, rows)


@torch.no_grad()
def log_likelihoods(model: nn.Module, pairs: list[Pair], *, budget: int, chunk: int = 4096) -> np.ndarray:
    """Summed log-likelihood of each continuation, fp32; `budget` tokens (padding counted) a forward."""
    device = next(model.parameters()).device
    head = objective.head(model)
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    sums = torch.zeros(len(pairs), device=device, dtype=torch.float64)
    at = 0
    while at < len(order):
        width = len(pairs[order[at]][0]) + len(pairs[order[at]][1])
        part = order[at : at + max(1, budget // width)]
        at += len(part)
        # Right padding: causal attention never sees it.
        x = np.zeros((len(part), width), dtype=np.int64)
        rows, places, targets, owners = [], [], [], []
        for row, j in enumerate(part):
            p, c = pairs[j]
            x[row, : len(p) + len(c)] = p + c
            rows += [row] * len(c)
            places += range(len(p) - 1, len(p) + len(c) - 1)
            targets += c
            owners += [j] * len(c)
        hidden = objective.hidden_states(model, torch.from_numpy(x).to(device))
        wanted = hidden[torch.tensor(rows, device=device), torch.tensor(places, device=device)]
        for start in range(0, len(targets), chunk):
            target = torch.tensor(targets[start : start + chunk], device=device)
            owner = torch.tensor(owners[start : start + chunk], device=device)
            log_p = torch.log_softmax(head(wanted[start : start + chunk]).float(), dim=-1)
            sums.index_add_(0, owner, log_p.gather(1, target[:, None])[:, 0].double())
    return sums.cpu().numpy()


def score(model: nn.Module, questions: Questions, *, budget: int = 32_768) -> tuple[dict[str, Any], dict[str, Any]]:
    """(scores as the test bed's, single values: {"text": nll of each, "tokens", benchmark: {"nll", "right"}}).

    The model is copied to fp32 for it and left as it is; TF32 is off, as in the test bed.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    scored = copy.deepcopy(model).float().eval()
    total = log_likelihoods(scored, [(t[:1], t[1:]) for t in questions.texts], budget=budget)
    tokens = [len(t) - 1 for t in questions.texts]
    result: dict[str, Any] = {"ppl": float(np.exp(-total.sum() / sum(tokens)))}
    single: dict[str, Any] = {"text": [round(-float(v), 4) for v in total], "tokens": tokens}
    for name, benchmark in questions.benchmarks.items():
        lp = log_likelihoods(scored, benchmark.pairs, budget=budget) / benchmark.weight
        right, nll = [], []
        for q, gold in enumerate(benchmark.gold):
            own = lp[benchmark.start[q] : benchmark.start[q + 1]]
            right.append(bool(own.argmax() == gold))
            nll.append(float(np.logaddexp.reduce(own) - own[gold]))
        result[name] = float(np.mean(right))
        result[name + "_se"] = float(np.std(right) / len(right) ** 0.5)
        result[name + "_nll"] = float(np.mean(nll))
        result[name + "_nll_se"] = float(np.std(nll) / len(nll) ** 0.5)
        single[name] = {"nll": [round(v, 4) for v in nll], "right": "".join("01"[r] for r in right)}
    result["rows"] = questions.rows
    return result, single
