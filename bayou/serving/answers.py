"""From the pieces that the engine's thread tells to OpenAI's answers, whole or as a stream of events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from bayou.serving.engine import Answer, Engine, Piece
from bayou.serving.refusals import Refused
from bayou.serving.requests import MOST_ANSWERS, Chat, Completion
from bayou.serving.sampling import Chosen
from bayou.serving.tenant import Tenant
from bayou.serving.voice import Voice


@dataclass
class Choice:
    """One answer as far as it has come."""

    text: str = ""
    chosen: list[Chosen] = field(default_factory=list)
    reason: str | None = None


class Gone(Exception):
    """The client has closed the connection."""


class Conversation:
    """One request: its answers in the making, and how they are told."""

    def __init__(self, engine: Engine, tenant: Tenant, wishes: Completion | Chat) -> None:
        self._engine, self._tenant, self._wishes = engine, tenant, wishes
        self._voice: Voice = tenant.voice
        self._chat = isinstance(wishes, Chat)
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._answers: list[Answer] = []
        self._prompt_tokens = 0
        self._choices: list[Choice] = []
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def ask(self, prompts: list[list[int]], loop: asyncio.AbstractEventLoop) -> None:
        """Hand the prompts to the engine, all of them or none. Raises Refused."""
        count = len(prompts) * self._wishes.n
        if count > MOST_ANSWERS:
            raise Refused(
                f"{len(prompts)} prompts times n = {self._wishes.n} are more than {MOST_ANSWERS} answers", param="n"
            )
        self._choices = [Choice() for _ in range(count)]
        self._prompt_tokens = sum(map(len, prompts))
        try:
            for i, prompt in enumerate(prompts):
                sampling = self._wishes.sampling(self._voice, len(prompt), self._engine.length)
                hearers = [self._hearer(i * self._wishes.n + k, loop) for k in range(self._wishes.n)]
                self._answers += self._engine.submit(self._tenant, prompt, sampling, *hearers)
        except BaseException:
            self.leave()
            raise

    def _hearer(self, index: int, loop: asyncio.AbstractEventLoop) -> Callable[[Piece], None]:
        def hear(piece: Piece) -> None:
            if not loop.is_closed():  # it is when the server ends before the engine does
                loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

        return hear

    def leave(self) -> None:
        """Free what the answers hold; does nothing for those that have ended."""
        self._engine.cancel(self._answers)

    async def _told(self) -> AsyncIterator[tuple[int, Piece]]:
        left = len(self._choices)
        while left:
            index, piece = await self._pieces.get()
            if piece.refused is not None:
                raise piece.refused
            choice = self._choices[index]
            choice.text += piece.text
            choice.chosen += piece.chosen
            choice.reason = piece.reason
            left -= piece.last
            yield index, piece

    async def whole(self, request: Request) -> dict[str, Any]:
        """The answer in one object. Raises Refused, and Gone when the client has left."""

        async def collect() -> None:
            async for _ in self._told():
                pass

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.ensure_future(collect()), asyncio.ensure_future(watch())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise Gone
            tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            self.leave()
        choices = [
            self._choice(i, choice.text, choice.chosen, choice.reason, 0) for i, choice in enumerate(self._choices)
        ]
        return {
            **self._head("chat.completion" if self._chat else "text_completion"),
            "choices": choices,
            "usage": self._usage(),
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, the first of them once the first token is there. Raises Refused before it only."""
        wishes = self._wishes
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        with_usage = wishes.stream_options is not None and wishes.stream_options.include_usage
        empty = {"usage": None} if with_usage else {}
        begun: set[int] = set()
        offsets = [0] * len(self._choices)
        try:
            async for index, piece in self._told():
                if self._chat and index not in begun:
                    first = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None}
                    yield _event({**self._head(kind), "choices": [{**first, "finish_reason": None}], **empty})
                begun.add(index)
                if not piece.text and not piece.last and wishes.wanted_logprobs() is None:
                    continue
                choice = self._choice(index, piece.text, list(piece.chosen), piece.reason, offsets[index], chunk=True)
                offsets[index] += len(piece.text)
                yield _event({**self._head(kind), "choices": [choice], **empty})
            if with_usage:
                yield _event({**self._head(kind), "choices": [], "usage": self._usage()})
        except Refused as refused:
            if not begun:
                raise
            yield _event(error_body(refused))
        finally:
            self.leave()
        yield b"data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._tenant.name}

    def _usage(self) -> dict[str, int]:
        said = sum(len(choice.chosen) for choice in self._choices)
        prompt = self._prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}

    def _choice(
        self, index: int, text: str, chosen: list[Chosen], reason: str | None, offset: int, *, chunk: bool = False
    ) -> dict[str, Any]:
        logprobs = None
        if self._wishes.wanted_logprobs() is not None:
            logprobs = self._chat_logprobs(chosen) if self._chat else self._logprobs(chosen, offset)
        found: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": reason}
        if not self._chat:
            return {**found, "text": text}
        if chunk:
            return {**found, "delta": {"content": text} if text else {}}
        return {**found, "message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, chosen: list[Chosen], offset: int) -> dict[str, Any]:
        tokens = [self._voice.token_text(one.token) for one in chosen]
        offsets = [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))]
        best = [{self._voice.token_text(token): value for token, value in one.best} for one in chosen]
        values = [one.logprob for one in chosen]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": best, "text_offset": offsets}

    def _chat_logprobs(self, chosen: list[Chosen]) -> dict[str, Any]:
        def entry(token: int, value: float) -> dict[str, Any]:
            text = self._voice.token_text(token)
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        return {"content": [{**entry(c.token, c.logprob), "top_logprobs": [entry(*b) for b in c.best]} for c in chosen]}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


def error_body(refused: Refused) -> dict[str, Any]:
    """OpenAI's shape of an error. What cannot be written as UTF-8 is written as an escape."""
    message = str(refused).encode("utf-8", "backslashreplace").decode()
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(refused.status)
    kind = kind or ("server_error" if refused.status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": refused.param, "code": refused.code}}
