"""How true a compressed model is to its fine-tune: two loaded models, teacher-forced (`bayou eval`)."""

from __future__ import annotations

import hashlib
import inspect
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from bayou import skeleton
from bayou.calibrate import encode, json_lines, opening, read_text, text_field
from bayou.checkpoint import Checkpoint, atomic
from bayou.errors import BadInput

_LOGITS = 2**28  # bytes of fp32 logits that one model may make at a time (a single row may need more)
_BLOCK = 2**23  # numbers of a block of logits that is turned into probabilities at a time
_SUMS = ("tokens", "kl", "flip", "nll", "nll_reference", "wrong", "wrong_reference")


@dataclass(frozen=True)
class _Row:
    """Token ids, of which those from `start` on are predicted and scored."""

    ids: list[int]
    start: int


class Remembered:
    """A reference that several candidates are compared with on the same rows: it is loaded, and runs, once.

    Its logits at the scored positions are kept in `folder`, as they are, so that nothing changes in what `evaluate`
    says; what does not fit into `limit` bytes is computed again. load: gives the model; not called where all is there.
    """

    def __init__(
        self, config: PreTrainedConfig, load: Callable[[], PreTrainedModel], folder: Path, device: str, limit: int
    ) -> None:
        self.config, self.device = config, torch.device(device)
        self._load, self._folder, self._limit = load, folder, limit
        self._model: PreTrainedModel | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))

    def release(self) -> None:
        """Let the model go; it is loaded again if it is needed."""
        self._model = None

    def scored(self, ids: Tensor, keep: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """(scored, vocabulary): see `_scored`."""
        name = hashlib.sha256(b"".join(part.cpu().numpy().tobytes() for part in (ids, keep, row, column))).hexdigest()
        path = self._folder / f"{name}.safetensors"
        if path.is_file():
            return load_file(path, device=str(self.device))["logits"]
        if self._model is None:
            self._model = self._load().eval().to(self.device)
        logits = _scored(self._model, ids, keep, row, column)
        if self._held + logits.nbytes <= self._limit:
            with atomic(path) as file:
                file.write(save({"logits": logits.cpu().contiguous()}))
            self._held += path.stat().st_size
        return logits


def evaluate(
    reference: PreTrainedModel | Remembered,
    candidate: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Path,
    *,
    rows: int | None = None,
    batch: int = 16,
    length: int = 512,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare the candidate's predictions with the reference's, token by token.

    Args:
        reference: the fine-tune; any causal language model, or one whose logits are kept (on its own device).
            Both are put into eval mode and on `device`.
        candidate: its compressed self, or any model with the same vocabulary.
        tokenizer: the reference's.
        data: a .jsonl file whose lines have "prompt" and "answer" (each encoded as it is, so the answer
            should end with the end-of-turn mark that the model was trained on): its tokens are scored.
            Any other file is text, cut into windows of `length` tokens (the bos token included, where the
            tokenizer sets one before every text): scored over all tokens but each window's first.
        rows: take so many of the rows (lines or windows), chosen by `seed`; None takes all.
        batch: rows at a time; fewer are taken where 256 MB of logits a model do not hold as many.
        device: None leaves both models where the reference is.

    Returns:
        kind "answers" or "text"; rows; tokens (scored ones);
        kl: mean KL(reference || candidate), nats a token; kl_se: its standard error over rows;
        flip: share of tokens whose argmax differs;
        nll, nll_reference: mean negative log-likelihood of the right token, nats;
        for answers acc, acc_se, acc_reference, acc_reference_se: share of rows whose every answer token is
        the argmax (what greedy decoding would get right); for text ppl, ppl_reference: exp(nll).
        A standard error is None where a single row is all there is. Probabilities are taken in fp32.

    Raises:
        BadInput: the file cannot be used (with the line's number), a row is longer than a model's positions,
            or the models differ in vocabulary.
    """
    kind, todo = read_rows(data, tokenizer, rows=rows, length=length, seed=seed)
    if device is None:
        device = reference.device
    for model in (reference, candidate):
        check_rows(todo, model.config, data)
        if not isinstance(model, Remembered):
            model.eval().to(device)

    sums = torch.zeros(len(todo), len(_SUMS), dtype=torch.float64)
    for part in _batches(todo, batch, reference.config.get_text_config().vocab_size):
        sums[part] = _compare(reference, candidate, [todo[i] for i in part], torch.device(device))
    return _summary(kind, dict(zip(_SUMS, sums.T, strict=True)))


def read_rows(
    data: Path, tokenizer: PreTrainedTokenizerBase, *, rows: int | None, length: int, seed: int
) -> tuple[str, list[_Row]]:
    """The kind and the rows that `evaluate` scores; raises BadInput as it does."""
    kind = "answers" if Path(data).suffix == ".jsonl" else "text"
    found = _answers(data, tokenizer) if kind == "answers" else _windows(data, tokenizer, length)
    if rows is not None:
        if rows < 1:
            raise BadInput(f"cannot evaluate {rows} rows: ask for 1 at least")
        found = random.Random(seed).sample(found, min(rows, len(found)))
    return kind, found


def check_rows(rows: list[_Row], config: PreTrainedConfig, data: Path) -> None:
    """Raises BadInput for a row that is longer than the positions of a model of this config."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(row.ids) for row in rows)
    if most is not None and longest > most:
        raise BadInput(f"{data} has a row of {longest} tokens; the model has {most} positions")


def read_model(folder: Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """All of a folder's model in fp32, of any architecture that Bayou compresses; never the repository's own code."""
    checkpoint = Checkpoint(folder)
    model = skeleton.build(checkpoint.folder)
    skeleton.fill(model, "", skeleton.places(model, checkpoint.names()), checkpoint.read, device=device)
    return model


def table(results: dict[str, Any]) -> Table:
    """The dict that `evaluate` returns, for people: the fine-tune beside the candidate."""
    kind = "rows of answers" if results["kind"] == "answers" else "windows of text"
    shown = Table(title=f"{results['rows']} {kind}, {results['tokens']} tokens")
    shown.add_column("")
    for name in ("fine-tune", "candidate"):
        shown.add_column(name, justify="right")

    def value(key: str, digits: int = 4) -> str:
        error = results.get(f"{key}_se")
        return f"{results[key]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")

    shown.add_row("KL to the fine-tune, nats a token", "0", value("kl", 5))
    shown.add_row("tokens whose argmax differs", "0", value("flip"))
    shown.add_row("negative log-likelihood, nats a token", value("nll_reference"), value("nll"))
    if results["kind"] == "answers":
        shown.add_row("rows all right", value("acc_reference"), value("acc"))
    else:
        shown.add_row("perplexity", value("ppl_reference", 3), value("ppl", 3))
    return shown


def _answers(data: Path, tokenizer: PreTrainedTokenizerBase) -> list[_Row]:
    rows = []
    start = opening(tokenizer)
    for where, record in json_lines(data):
        prompt = encode(tokenizer, text_field(record, "prompt", where))
        answer = encode(tokenizer, text_field(record, "answer", where))
        if prompt[: len(start)] != start:  # a chat template writes the bos token itself
            prompt = start + prompt
        if not prompt or not answer:
            raise BadInput(f"{where}: prompt and answer must have a token each, or nothing can be predicted")
        rows.append(_Row(prompt + answer, len(prompt)))
    if not rows:
        raise BadInput(f'{data} has no rows; it needs lines of {{"prompt": ..., "answer": ...}}')
    return rows


def _windows(data: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> list[_Row]:
    if length < 2:
        raise BadInput(f"windows of {length} tokens have nothing to predict: ask for 2 at least")
    start = opening(tokenizer)
    ids, body = encode(tokenizer, read_text(data)), length - len(start)
    windows = [start + ids[i : i + body] for i in range(0, len(ids), body)]
    rows = [_Row(window, 1) for window in windows if len(window) > 1]
    if not rows:
        raise BadInput(f"{data} has {len(ids)} tokens of text: too few to predict any")
    return rows


def _batches(rows: list[_Row], most: int, vocabulary: int) -> Iterator[list[int]]:
    """Indexes of rows of like length, as many at a time as `most` and the memory for logits allow."""
    batch: list[int] = []
    first = 0  # where the logits of the batch begin
    for i in sorted(range(len(rows)), key=lambda i: (len(rows[i].ids), rows[i].start, i)):
        first = min(first, rows[i].start) if batch else rows[i].start
        size = (len(batch) + 1) * (len(rows[i].ids) - first) * vocabulary * 4
        if batch and (len(batch) == most or size > _LOGITS):
            yield batch
            batch, first = [], rows[i].start
        batch.append(i)
    yield batch


@torch.no_grad()
def _compare(
    reference: PreTrainedModel | Remembered, candidate: PreTrainedModel, rows: list[_Row], device: torch.device
) -> Tensor:
    """(rows, _SUMS): what is summed over the scored tokens of each row."""
    width, first = max(len(row.ids) for row in rows), min(row.start for row in rows)
    # Right-padded with the row's last token: causal attention never sees it, nothing takes it for padding.
    ids = torch.tensor([row.ids + row.ids[-1:] * (width - len(row.ids)) for row in rows], device=device)
    scored = torch.tensor([[row.start <= i < len(row.ids) for i in range(first, width)] for row in rows])
    keep = torch.arange(first - 1, width - 1, device=device)  # the logits there predict the tokens first..width
    row, column = scored.nonzero().to(device).unbind(1)
    right, ours = (_scored(model, ids, keep, row, column) for model in (reference, candidate))
    vocabulary = right.shape[-1]
    if ours.shape[-1] != vocabulary:
        raise BadInput(
            f"the reference has a vocabulary of {vocabulary}, the candidate of {ours.shape[-1]}: such models "
            "cannot be compared token by token"
        )
    targets = ids[row, column + first][:, None]
    sums = torch.zeros(len(rows), len(_SUMS), dtype=torch.float64)
    for block in torch.arange(len(row), device=device).split(max(1, _BLOCK // vocabulary)):
        p, q = (logits[block].float().log_softmax(-1) for logits in (right, ours))
        target = targets[block]
        # A token that the reference excludes (logit -inf) adds nothing, whatever the candidate thinks of it.
        kl = ((p - q) * p.exp()).masked_fill_(p == -math.inf, 0).sum(-1)
        best_p, best_q = p.argmax(-1), q.argmax(-1)
        columns = {
            "tokens": torch.ones_like(kl),
            "kl": kl,
            "flip": best_p != best_q,
            "nll": -q.gather(1, target)[:, 0],
            "nll_reference": -p.gather(1, target)[:, 0],
            "wrong": best_q != target[:, 0],
            "wrong_reference": best_p != target[:, 0],
        }
        values = torch.stack([columns[name].double() for name in _SUMS], 1)
        sums.index_add_(0, row[block].cpu(), values.cpu())
    return sums


def _scored(model: PreTrainedModel | Remembered, ids: Tensor, keep: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """(scored, vocabulary): the logits at positions keep[column] of the rows `row` of ids."""
    if isinstance(model, Remembered):
        return model.scored(ids, keep, row, column)
    return _logits(model, ids, keep)[row, column]


def _logits(model: PreTrainedModel, ids: Tensor, keep: Tensor) -> Tensor:
    """(rows, keep, vocabulary), computed at the positions `keep` only where the model can."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits
    return model(input_ids=ids, use_cache=False).logits[:, keep]


def _summary(kind: str, sums: dict[str, Tensor]) -> dict[str, Any]:
    count, tokens = len(sums["tokens"]), sums["tokens"]
    mean = {name: (sums[name].sum() / tokens.sum()).item() for name in _SUMS}

    def error(deviations: Tensor, over: float) -> float | None:
        """Standard error of a sum of independent rows divided by `over`."""
        if count < 2:
            return None
        return math.sqrt(deviations.square().sum().item() * count / (count - 1)) / over

    result: dict[str, Any] = {"kind": kind, "rows": count, "tokens": int(tokens.sum())}
    # A row of many tokens weighs more, so kl is a ratio of two sums, and its error that of a ratio.
    result |= {"kl": mean["kl"], "kl_se": error(sums["kl"] - mean["kl"] * tokens, tokens.sum().item())}
    result |= {name: mean[name] for name in ("flip", "nll", "nll_reference")}
    for end in ("", "_reference"):
        if kind == "text":
            result[f"ppl{end}"] = math.exp(min(mean[f"nll{end}"], 700))
            continue
        right = (sums[f"wrong{end}"] == 0).double()
        result |= {f"acc{end}": right.mean().item(), f"acc{end}_se": error(right - right.mean(), count)}
    return result
