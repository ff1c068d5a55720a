"""From a step's scores to its tokens, each row by its own request's wishes and its own random numbers.

A row draws one uniform number a token from a generator of its own, seeded by the request, and takes the token in
whose part of the row's cumulated probabilities it falls. So equal requests with equal seeds get equal answers, whatever
else is in the batch.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a request wants its tokens.

    temperature: 0 is greedy. top_k: 0 is all. top_p: share of the probability that is kept. seed: None draws one.
    logprobs: most likely tokens to report for each position, None for no log-probabilities at all. late: the text
    is wanted at the end only.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    late: bool = False

    def draws(self, choice: int) -> random.Random:
        """The random numbers of the request's answer number `choice`."""
        if self.seed is None:
            return random.Random()
        return random.Random(f"{self.seed}/{choice}")


@dataclass(frozen=True)
class Chosen:
    """A row's token; with log-probabilities asked for, its own and those of the most likely ones, best first."""

    token: int
    logprob: float = 0.0
    best: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Row:
    """What `choose` needs of a row's request."""

    sampling: Sampling
    draws: random.Random = field(default_factory=random.Random)

    @property
    def greedy(self) -> bool:
        """Whether the best token is all that is wanted."""
        return self.sampling.temperature <= 0 and self.sampling.logprobs is None


def choose(scores: Tensor, rows: Sequence[Row]) -> list[Chosen | None]:
    """The next token of each row of `scores` (rows, vocabulary); None where no score is a number.

    Log-probabilities are those of the model, before temperature and cuts.
    """
    scores = scores.float()
    best, tokens = scores.max(-1)
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        some = torch.tensor(drawn, device=scores.device)
        tokens = tokens.index_copy(0, some, _draw(scores[some], [rows[i] for i in drawn]))
    sound = (best.isfinite() & ~scores.isnan().any(-1)).tolist()
    wanted = max((row.sampling.logprobs for row in rows if row.sampling.logprobs is not None), default=None)
    ids = tokens.tolist()
    if wanted is None:
        return [Chosen(token) if good else None for token, good in zip(ids, sound, strict=True)]
    logprobs = scores.log_softmax(-1)
    own = logprobs.gather(-1, tokens[:, None])[:, 0].tolist()
    tops = logprobs.topk(max(1, min(wanted, scores.shape[-1])))
    values, indexes = tops.values.tolist(), tops.indices.tolist()
    found: list[Chosen | None] = []
    for i, row in enumerate(rows):
        count = row.sampling.logprobs or 0
        pairs = tuple((t, v) for t, v in zip(indexes[i][:count], values[i][:count], strict=True) if v > -torch.inf)
        found.append(Chosen(ids[i], own[i], pairs) if sound[i] else None)
    return found


def _draw(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=scores.device)[:, None]

    temperature = column([max(row.sampling.temperature, 1e-4) for row in rows])
    top_p = column([row.sampling.top_p for row in rows])
    top_k = column([row.sampling.top_k or scores.shape[-1] for row in rows])
    uniform = column([row.draws.random() for row in rows]).clamp(max=1 - 2**-24)  # in fp32 a draw may round to 1
    ordered, ids = scores.nan_to_num(nan=-torch.inf).sort(stable=True, dim=-1, descending=True)
    chances = ((ordered - ordered[:, :1]) / temperature).softmax(-1)
    before = chances.cumsum(-1) - chances
    kept = (before < top_p) & (torch.arange(scores.shape[-1], device=scores.device) < top_k)
    kept &= chances > 0
    kept[:, 0] = True
    cumulated = (chances * kept).cumsum(-1)
    index = (cumulated <= uniform * cumulated[:, -1:]).sum(-1).clamp(max=scores.shape[-1] - 1)
    last = kept.sum(-1) - 1
    return ids.gather(-1, torch.minimum(index, last)[:, None])[:, 0]
