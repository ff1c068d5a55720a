"""The bodies of requests, in OpenAI's shape, with their bounds. What we cannot do is refused, not passed over."""

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from bayou.serving.refusals import Refused
from bayou.serving.sampling import Sampling
from bayou.serving.voice import Voice

MOST_ANSWERS = 128
"""Prompts times n of one request."""

Name = Annotated[str, StringConstraints(min_length=1, max_length=500)]
Text = Annotated[str, StringConstraints(max_length=10_000_000)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=1_000_000)]
Stop = Annotated[str, StringConstraints(max_length=500)]

_NOT_DONE = {
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
}


_OF_NO_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
"""What OpenAI's clients may send, and what changes no answer."""


class StreamOptions(BaseModel):
    """What a stream is to carry besides."""

    include_usage: bool = False


class Wishes(BaseModel, ABC):
    """What completions and chats have alike."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, protected_namespaces=())

    model: Name
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False

    @model_validator(mode="after")
    def _nothing_else(self) -> "Wishes":
        for key, value in (self.model_extra or {}).items():
            if key not in _OF_NO_EFFECT and value not in _NOT_DONE.get(key, (None,)):
                raise ValueError(f"{key} is not supported")
        return self

    def sampling(self, voice: Voice, prompt: int, length: int) -> Sampling:
        """The tenant's defaults, and what the request says of them. prompt: its tokens; length: positions at most."""
        most = self.most_tokens() or voice.max_tokens or self.usual_tokens() or length
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        top_k = voice.top_k if self.top_k is None else self.top_k
        temperature = voice.temperature if self.temperature is None else self.temperature
        top_p = voice.top_p if self.top_p is None else self.top_p
        return Sampling(
            max_tokens=max(1, min(most, length - prompt)),
            temperature=1.0 if temperature is None else temperature,
            top_p=top_p or 1.0,
            top_k=max(0, top_k or 0),
            seed=self.seed,
            stop=tuple(stop for stop in stops if stop),
            logprobs=self.wanted_logprobs(),
            ignore_eos=self.ignore_eos,
            late=not self.stream,
        )

    def most_tokens(self) -> int | None:
        """What the request says."""
        return self.max_tokens

    def usual_tokens(self) -> int | None:
        """Where neither request nor tenant says anything; None is as many as there is room for."""
        return None

    @abstractmethod
    def wanted_logprobs(self) -> int | None:
        """Most likely tokens to report; None for no log-probabilities."""

    @abstractmethod
    def prompts(self, voice: Voice, most: int) -> list[list[int]]:
        """Tokens of each prompt; `most` are what may be answered. Raises Refused for a text that is far too long."""


class Completion(Wishes):
    """The body of /v1/completions."""

    prompt: Text | Tokens | Annotated[list[Text | Tokens], Field(min_length=1, max_length=MOST_ANSWERS)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def usual_tokens(self) -> int | None:
        """OpenAI's."""
        return 16

    def wanted_logprobs(self) -> int | None:
        """As given."""
        return self.logprobs

    def prompts(self, voice: Voice, most: int) -> list[list[int]]:
        """Each as it stands."""
        given = self.prompt
        several = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        voice.check_length((one for one in several if isinstance(one, str)), most)
        return [voice.encode(one) if isinstance(one, str) else list(one) for one in several]


class Part(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="ignore")

    role: Annotated[str, StringConstraints(min_length=1, max_length=50)]
    content: Text | Annotated[list[Part], Field(max_length=1000)] | None = None
    name: Annotated[str, StringConstraints(max_length=200)] | None = None

    @field_validator("content")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        return "".join(part.text for part in content) if isinstance(content, list) else content


class Chat(Wishes):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def most_tokens(self) -> int | None:
        """The newer field first."""
        return self.max_completion_tokens or self.max_tokens

    def wanted_logprobs(self) -> int | None:
        """None without `logprobs`."""
        if self.top_logprobs and not self.logprobs:
            raise Refused("top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def prompts(self, voice: Voice, most: int) -> list[list[int]]:
        """One, of the conversation, by the tenant's own template."""
        voice.check_length((m.content for m in self.messages if isinstance(m.content, str)), most)
        turns = [message.model_dump(exclude_none=True) for message in self.messages]
        return [voice.encode_chat([{**turn, "content": turn.get("content", "")} for turn in turns])]


class LoadAdapter(BaseModel):
    """The body of /v1/load_lora_adapter, as vLLM has it; the path is one inside --delta-dir."""

    lora_name: Name
    lora_path: Name
    load_inplace: bool = False


class UnloadAdapter(BaseModel):
    """The body of /v1/unload_lora_adapter."""

    lora_name: Name
