"""What each linear's input looks like: second moments over some text, found layer by layer.

`read_tokens` turns a text or JSONL file into windows of token ids; `walk` runs the model over them with one
decoder layer's weights in memory at a time and hands every layer's second moments (grams) to a visitor, which
may overwrite the layer with its compressed self: later layers then see what they will really be given.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from bayou import skeleton
from bayou.errors import BadInput
from bayou.moments import Grams, Pairs
from bayou.skeleton import Place, decoder_layers
from bayou.standins import StandIns, cut, own_head

Activations = Literal["finetuned", "compressed", "corrected"]
ACTIVATIONS: tuple[str, ...] = get_args(Activations)

_STAGES = 8  # inputs of a layer that are compressed one after the other; a layer of more has the rest at once

_DOCUMENT = 2000  # characters: paragraphs of a text file are joined until a document has that many


def read_text(path: Path) -> str:
    """The UTF-8 text in `path`; BadInput where it cannot be read, or is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("FILE, line N", record) for every line of a JSONL file that is not blank.

    Raises:
        BadInput: the file cannot be read, is not UTF-8, or a line is not a JSON object (its number is named).
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(f"{where} is not JSON ({error}): a .jsonl file has one object a line") from None
        if not isinstance(record, dict):
            raise BadInput(f"{where} is a JSON {type(record).__name__}; it must be an object")
        yield where, record


def text_field(record: dict[str, Any], key: str, where: str) -> str:
    """The string at `key` of a JSONL record; BadInput, with its place, if absent or not a string."""
    if not isinstance(value := record.get(key), str):
        have = f"it has {', '.join(record) or 'nothing'}" if key not in record else f"it is {value!r:.40}"
        raise BadInput(f'{where}: "{key}" must be a string; {have}')
    return value


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text` as it stands: nothing is put before or after it."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[bos] for a tokenizer that starts every text with it, else []: such models are lost without it."""
    return [t for t in tokenizer("")["input_ids"][:1] if t == tokenizer.bos_token_id]


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; BadInput where it has none."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(
            f"{folder} has no tokenizer that transformers can load ({str(error).splitlines()[0]}); "
            "copy the base's tokenizer files there (compress can do without: --calibration none)"
        ) from None


def tokenizer_of(files: Mapping[str, bytes]) -> PreTrainedTokenizerBase:
    """The tokenizer that small files of a model folder make, by their names; raises as `read_tokenizer`."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            return read_tokenizer(Path(folder))
        except BadInput as error:
            raise BadInput(str(error).replace(folder, "it")) from None


def read_tokens(
    source: Path | None, tokenizer: PreTrainedTokenizerBase, *, tokens: int, length: int, seed: int = 0
) -> Tensor:
    """Windows of token ids to calibrate with.

    Args:
        source: a text file (documents are runs of its paragraphs), or a .jsonl file whose lines have "text",
            or "prompt" and "answer" (joined as they are), or "messages" (put through the chat template).
            None takes the help texts that every Python carries (`pydoc_data.topics`, 0.46 million characters
            of English): the second moments hardly depend on the text, and nothing need be downloaded.
        tokens: how many tokens in all; rounded down to whole windows, one at least.
        length: tokens a window, the bos token included where the tokenizer sets one before every text.
        seed: the order in which the documents are taken; they are joined with the eos token.

    Returns:
        (windows, length) int64. Too little text gives fewer windows, or a single shorter one.

    Raises:
        BadInput: the source cannot be used, or has no text.
    """
    if tokens < 1 or length < 2:
        raise BadInput(f"cannot calibrate on {tokens} tokens in windows of {length}: need 1 and 2 at least")
    documents = _documents(source, tokenizer)
    random.Random(seed).shuffle(documents)
    start = opening(tokenizer)
    body = length - len(start)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stream: list[int] = []
    wanted = max(1, tokens // length) * body
    for document in documents:
        stream += encode(tokenizer, document) + end
        if len(stream) >= wanted:
            break
    if len(stream) < 2:
        raise BadInput(f"{source} has no text to calibrate with")
    body = min(body, len(stream))
    count = min(wanted, len(stream)) // body
    return torch.tensor([start + stream[i * body : (i + 1) * body] for i in range(count)])


def windows(
    source: Path | None,
    folder: Path,
    config: PreTrainedConfig,
    tokens: int | None,
    length: int,
    *,
    seed: int = 0,
    device: str = "cpu",
) -> Tensor:
    """The windows that the model in `folder` is calibrated on, see `read_tokens`.

    tokens: 32,768 on the CPU and 262,144 on a GPU unless given. length: at most the model's positions are taken.
    """
    if tokens is None:
        tokens = 32_768 if device == "cpu" else 262_144
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or length
    return read_tokens(source, read_tokenizer(folder), tokens=tokens, length=min(length, most), seed=seed)


def digest(ids: Tensor) -> str:
    """sha256 of token ids, by which windows are told apart."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


def fill(
    model: PreTrainedModel,
    places: dict[str, Place],
    read: Callable[..., Tensor],
    layer: int | None,
    device: torch.device,
) -> None:
    """Read the weights of a decoder layer, or (None) of all outside the layers, in the dtype that calibrates."""
    path, _ = decoder_layers(model)
    skip = path if layer is None else None
    prefix = "" if layer is None else f"{path}.{layer}"
    # The model's own arithmetic on a GPU: the moments of its activations are no better known than that.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    skeleton.fill(model, prefix, places, read, dtype=dtype, device=device, skip=skip)


def walk(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    fill: Callable[[int | None], None],
    empty: Callable[[int], None],
    visit: Callable[..., None],
    batch: int = 8,
    device: torch.device | str = "cpu",
    keep: Activations = "finetuned",
    begin: Callable[[], AbstractContextManager[None]] = nullcontext,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Run `model` over `ids` once, a decoder layer at a time, and show each layer's input moments to `visit`.

    The model's own forward runs with all windows as one batch, so that masks, rotary embeddings and kinds of
    layer are its own; for the time of the walk a stand-in in each decoder layer's place fills the layer, runs
    it over `batch` windows at a time and empties it. In memory at the peak: the hidden states of all windows,
    the activations of `batch` windows in one layer, one layer's weights and grams, what fill(None) holds.

    A gram is the sum over tokens of x x^T, (in, in) fp32, of the input x of an nn.Linear, a Conv1D, a router
    or a module of merged experts (all experts' first matrices share its input; their second have none).
    Modules that are given the same x (q, k and v; gate and up) have the same gram, as one tensor object.
    Args:
        model: the fine-tune, its weights wherever `fill` finds them (a meta skeleton, or all of it loaded).
        ids: (windows, length) int64, without padding; one window is dropped where the two are equal, since
            a batch is told from a sequence by its size.
        fill: fill(i) makes layer i's weights ready on `device`, fill(None) all outside the layers (it stays).
        empty: empty(i) lets layer i go; called also when something in the layer failed.
        visit: visit(i, {module path in the model: gram}); an untied head comes last, as i = number of layers.
            With keep="compressed" or "corrected" it overwrites the parameters of layer i by the compressed ones.
        batch: windows a step.
        device: where the ids are put, and so where the model runs.
        keep: what the next layer is given: the outputs of the fine-tune's layer, or those of the layer as
            `visit` left it (it runs twice), or "corrected": each of two streams of hidden states its own. Then `visit`
            is called for one input of the layer after the other, in the order of its forward, and once more with
            nothing at the end; the grams are those of the compressed model's inputs y; and a third argument is
            {module path: the sum of (x - y) y^T}, x the fine-tune's input. It runs about three times, in two copies.
        begin: "corrected": within the context that it makes all outside the layers is compressed; after it, and a
            second fill(None), the fine-tune's. So the compressed stream begins with what the embedding has lost.
        progress: progress(layers done, layers).

    Raises:
        BadInput: `keep` is no such word, or the windows are longer than the model's positions.
        Whatever fill, visit, empty or the model raise; every stand-in is gone by then.
    """
    if keep not in ACTIVATIONS:
        raise BadInput(f"keep must be one of {', '.join(ACTIVATIONS)}, not {keep!r}")
    windows, length = ids.shape
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    if length > most:
        raise BadInput(f"windows of {length} tokens are too long: the model has {most} positions")
    if windows == length and windows > 1:
        windows -= 1
    # Up to 4 windows go at once: an axis of that size may also be Qwen2-VL's kinds of position, never cut.
    step = windows if windows <= 4 else batch
    path, layers = decoder_layers(model)
    inner = list(layers)  # the layers themselves, while stand-ins take their places
    head = own_head(model)
    given = ids[:windows].to(device)
    # The compressed model's hidden states ("corrected"), and whether they have come through the layers.
    ours, through = torch.empty(0), False
    fill(None)

    def run(i: int, hidden: Tensor, args: Any, kwargs: Any, grams: Grams | None, over: bool) -> Any:
        """Layer i over all windows, a step at a time; `over`: its outputs take the place of its inputs."""
        for start in range(0, windows, step):
            part = slice(start, start + step)
            out = inner[i](hidden[part], *cut(args, windows, part), **cut(kwargs, windows, part))
            if over:
                hidden[part] = out[0] if isinstance(out, tuple) else out
            if grams is not None:
                grams.end_of_step()
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    def pursue(i: int, hidden: Tensor, args: Any, kwargs: Any, last: bool) -> Any:
        """Both streams through layer i, input by input, so that the next can correct what the first have lost."""
        parameters = list(inner[i].parameters())
        own, less = [p.data.clone() for p in parameters], [p.data for p in parameters]

        def both(pairs: Pairs) -> Any:
            """One pass; where no input was left it is the last, and its outputs take the places of the inputs."""
            out = None
            for start in range(0, windows, step):
                part = slice(start, start + step)
                rest = cut(args, windows, part), cut(kwargs, windows, part)
                results = []
                for stream, weights in ((hidden, own), (ours, less)):
                    for parameter, weight in zip(parameters, weights, strict=True):
                        parameter.data = weight
                    with pairs.forward(listening=stream is hidden):
                        results.append(inner[i](stream[part], *rest[0], **rest[1]))
                pairs.end_of_step()
                for stream, out in zip((ours, hidden), () if pairs.named else reversed(results), strict=False):
                    stream[part] = out[0] if isinstance(out, tuple) else out
            return out

        done: set[str] = set()
        for stage in count():
            with Pairs(inner[i], f"{path}.{i}", done, rest=stage == _STAGES) as pairs:
                out = None if last and pairs.all_done else both(pairs)
            visit(i, pairs.named, pairs.lacking)
            if not pairs.named:
                return (hidden, *out[1:]) if isinstance(out, tuple) else hidden
            done |= set(pairs.named)

    def layer(i: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal through
        # From here on the layer is in its own place again, where fill, visit and empty look for it.
        stand_ins.restore(f"{path}.{i}")
        last = i == len(inner) - 1 and head is None  # nobody wants its outputs
        try:
            fill(i)
            if keep == "corrected":
                out = pursue(i, hidden, args, kwargs, last)
            else:
                with Grams(inner[i], f"{path}.{i}") as grams:
                    out = run(i, hidden, args, kwargs, grams, over=keep == "finetuned" and not last)
                visit(i, grams.named)
            if keep == "compressed" and not last:
                out = run(i, hidden, args, kwargs, None, over=True)
        finally:
            empty(i)
        through = keep == "corrected" and i == len(inner) - 1
        if progress is not None:
            progress(i + 1, len(inner))
        if last:
            raise _Done
        return out

    def norm(module: nn.Module, hidden: Tensor) -> Tensor:
        # In place and a step at a time: a norm's temporaries are several times its input.
        for stream in (hidden, ours) if through else (hidden,):
            for part in stream.split(step):
                part.copy_(module(part))
        return hidden

    head_grams = Pairs(model, "") if keep == "corrected" else Grams(model, "")

    def end(hidden: Tensor) -> None:
        for part, other in zip(hidden.split(step), (ours if through else hidden).split(step), strict=True):
            if isinstance(head_grams, Pairs):
                with head_grams.forward(listening=True):
                    head_grams.add(str(head), part)
            head_grams.add(str(head), other)
            head_grams.end_of_step()
        raise _Done

    def first(hidden: Tensor, *_: Any, **__: Any) -> None:
        nonlocal ours
        ours = hidden.clone()
        raise _Done

    with torch.no_grad(), StandIns(model) as stand_ins:
        if keep == "corrected":
            with begin(), suppress(_Done):
                stand_ins.put(f"{path}.0", first)
                model(input_ids=given, use_cache=False)
            stand_ins.restore(f"{path}.0")
            fill(None)
        for i in range(len(inner)):
            stand_ins.put(f"{path}.{i}", partial(layer, i))
        if head is not None:
            stand_ins.put(head, end)
            decoder = path.rpartition(".")[0]
            for name, child in list(model.get_submodule(decoder).named_children()):
                if "norm" in type(child).__name__.lower():
                    stand_ins.put(f"{decoder}.{name}".lstrip("."), partial(norm, child))
        with suppress(_Done):
            model(input_ids=given, use_cache=False)
    if isinstance(head_grams, Pairs) and head is not None:
        visit(len(inner), head_grams.named, head_grams.lacking)
    elif head is not None:
        visit(len(inner), head_grams.named)


class _Done(Exception):
    """Nothing after this point of the forward is needed."""


def _documents(source: Path | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if source is None:
        from pydoc_data.topics import topics  # half a megabyte, wanted here only

        return [topics[name] for name in sorted(topics)]
    if Path(source).suffix == ".jsonl":
        return [_document(record, where, tokenizer) for where, record in json_lines(source)]
    documents = [""]
    for paragraph in read_text(source).split("\n\n"):
        if len(documents[-1]) >= _DOCUMENT:
            documents.append("")
        documents[-1] += "\n\n" + paragraph if documents[-1] else paragraph
    return [document for document in documents if document.strip()]


def _document(record: dict[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if "text" in record:
        return text_field(record, "text", where)
    if "prompt" in record:
        return text_field(record, "prompt", where) + text_field(record, "answer", where)
    if "messages" not in record:
        have = ", ".join(record) or "nothing"
        raise BadInput(f'{where} has neither "text" nor "prompt" and "answer" nor "messages"; it has {have}')
    if tokenizer.chat_template is None:
        raise BadInput(f'{where} has "messages", but the tokenizer has no chat template: give "text" instead')
    try:
        return tokenizer.apply_chat_template(record["messages"], tokenize=False)
    except Exception as error:  # templates raise whatever their author chose, on whatever they dislike
        raise BadInput(f"{where}: the chat template refuses the messages: {error}") from error
