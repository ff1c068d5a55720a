"""How a tenant reads and speaks: its tokenizer, chat template, end tokens and the defaults of its generation config."""

import hashlib
import json
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from bayou.calibrate import tokenizer_of
from bayou.errors import BadFile, BadInput, BayouError
from bayou.serving.refusals import Refused
from bayou.sidecar import carried

_NO_TOKENIZER = ("config.json", "generation_config.json")
_CUT = "\ufffd"
"""What a tokenizer gives for the first bytes of a character whose last ones have not come yet."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer that several tenants may share, used by one thread at a time."""

    inner: PreTrainedTokenizerBase
    lock: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token, at least: a text of n times as many has more than n tokens."""
        return max((len(piece) for piece in self.inner.get_vocab()), default=1)


@dataclass(frozen=True, eq=False)
class Voice:
    """A tenant's tokenizer and what its configs say of generating.

    ends: tokens that end an answer. temperature, top_p, top_k, max_tokens: its generation config's, None without.
    """

    tokenizer: Tokenizer
    ends: frozenset[int]
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return bool(self.tokenizer.inner.chat_template)

    def check_length(self, texts: Iterable[str], most: int) -> None:
        """Raises Refused for a text that has more than `most` tokens however it is read.

        Reading a long text holds up whoever speaks by this tokenizer, so what cannot be answered is not read.
        """
        for text in texts:
            if len(text) > most * self.tokenizer.longest:
                raise Refused(
                    f"a text of {len(text):,} characters has more than the {most:,} tokens that an answer may have",
                    code="context_length_exceeded",
                    param="prompt",
                )

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, those that the tokenizer sets before every text among them."""
        return self._tokens(text, special=True)

    def _tokens(self, text: str, special: bool) -> list[int]:
        with self.tokenizer.lock:
            try:
                return list(self.tokenizer.inner(text, add_special_tokens=special).input_ids)
            except (TypeError, ValueError, UnicodeError) as error:  # half a surrogate pair, which is no text
                raise Refused(f"the prompt cannot be read as text: {error!s:.200}", param="prompt") from None

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of a conversation through the tenant's own chat template. Raises Refused where it has none."""
        if not self.chats:
            raise Refused("this model has no chat template; use /v1/completions", code="no_chat_template")
        try:  # without the lock, which whoever speaks needs: a template may take long
            text = self.tokenizer.inner.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise anything, on purpose too (two user turns in a row)
            raise Refused(f"the model's chat template refuses these messages: {error!s:.300}") from None
        return self._tokens(text, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        with self.tokenizer.lock:
            return str(self.tokenizer.inner.decode(list(ids), skip_special_tokens=True))

    def token_text(self, token: int) -> str:
        """One token as it stands in the vocabulary's text, special ones too."""
        with self.tokenizer.lock:
            return str(self.tokenizer.inner.decode([token]))


class Speech:
    """An answer's text as its tokens come: whole characters only, and nothing that may become a stop string.

    late: all of it comes at the end, in one; possible where there are no stop strings, and less work a step.
    """

    def __init__(self, voice: Voice, stops: Sequence[str], late: bool = False) -> None:
        self._voice, self._stops = voice, [stop for stop in stops if stop]
        self._late = late and not self._stops
        self._ids: list[int] = []
        self._start = self._read = 0  # tokens before _read are in _text; those from _start on are decoded with new ones
        self._text = ""
        self._said = 0
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is new and certain after one more token. `stopped` tells that a stop string was reached."""
        self._ids.append(token)
        if self._late:
            return ""
        known = self._voice.decode(self._ids[self._start : self._read])
        now = self._voice.decode(self._ids[self._start :])
        if len(now) > len(known) and not now.endswith(_CUT):
            self._take(now[len(known) :])
            self._start, self._read = self._read, len(self._ids)
        return self._say(False)

    def end(self) -> str:
        """The rest of the text, when no token follows."""
        if not self.stopped:
            known = self._voice.decode(self._ids[self._start : self._read])
            self._take(self._voice.decode(self._ids[self._start :])[len(known) :])
        return self._say(True)

    def _take(self, new: str) -> None:
        searched = max(0, len(self._text) - max((len(stop) for stop in self._stops), default=1) + 1)
        self._text += new
        found = [at for at in (self._text.find(stop, searched) for stop in self._stops) if at >= 0]
        if found:
            self._text, self.stopped = self._text[: min(found)], True

    def _say(self, all_of_it: bool) -> str:
        certain = len(self._text)
        if not (all_of_it or self.stopped):
            for stop in self._stops:
                for size in range(min(len(stop) - 1, len(self._text)), 0, -1):
                    if self._text.endswith(stop[:size]):
                        certain = min(certain, len(self._text) - size)
                        break
        said, self._said = self._text[self._said : certain], max(self._said, certain)
        return said


class Voices:
    """Voices from the small files of model folders and deltas; equal tokenizers are in memory once."""

    def __init__(self, folder: Path) -> None:
        self._base = carried(folder)
        self._tokenizers: weakref.WeakValueDictionary[str, Tokenizer] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self.base = self.of(self._base, folder)

    def of(self, files: Mapping[str, bytes], whose: object) -> Voice:
        """The voice that a model's files give; the base's tokenizer where they hold none. Raises BadFile."""
        config, generation = (_object(files, name, whose) for name in ("config.json", "generation_config.json"))
        ends = generation.get("eos_token_id", _text_config(config).get("eos_token_id"))
        listed = ends if isinstance(ends, list) else [ends]
        return Voice(
            self._tokenizer(files, whose),
            frozenset(end for end in listed if isinstance(end, int) and not isinstance(end, bool)),
            _number(generation, "temperature", 0, 100),
            _number(generation, "top_p", 0, 1),
            None if (k := _number(generation, "top_k", 0, 2**31)) is None else int(k),
            None if (most := _number(generation, "max_new_tokens", 1, 2**31)) is None else int(most),
        )

    def _tokenizer(self, files: Mapping[str, bytes], whose: object) -> Tokenizer:
        own = {name: content for name, content in files.items() if name not in _NO_TOKENIZER}
        own = own or {name: content for name, content in self._base.items() if name not in _NO_TOKENIZER}
        config = files.get("config.json", b"")
        digest = hashlib.sha256(json.dumps(_object(files, "config.json", whose).get("model_type")).encode())
        for name in sorted(own):
            digest.update(json.dumps([name, len(own[name])]).encode() + own[name])
        key = digest.hexdigest()
        with self._lock:
            found = self._tokenizers.get(key)
            if found is None:
                found = self._tokenizers[key] = Tokenizer(_read(own | {"config.json": config}, whose))
            return found


def _read(files: Mapping[str, bytes], whose: object) -> PreTrainedTokenizerBase:
    try:
        return tokenizer_of(files)
    except BadInput as error:
        raise BadFile(f"{whose}: {error}") from None
    except BayouError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions for malformed files
        raise BadFile(f"{whose}: its tokenizer cannot be loaded: {error!s:.200}") from None


def _object(files: Mapping[str, bytes], name: str, whose: object) -> dict[str, Any]:
    try:
        found = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{whose}: its {name} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise BadFile(f"{whose}: its {name} is not a JSON object")
    return found


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) and "eos_token_id" in inner else config


def _number(config: dict[str, Any], key: str, least: float, most: float) -> float | None:
    value = config.get(key)
    sound = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
    return float(value) if sound and value is not None else None
