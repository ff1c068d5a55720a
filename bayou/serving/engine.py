"""Continuous batching over one base, every row of a step a tenant's or the base's own.

    submit -> waiting -> (ticket ready, slot free) -> prefill, in pieces -> a token a step -> done

One thread runs the steps. Before each it takes in who has come, lets go who has gone, and gives free slots to those
whose tenants are on the device, in the order of their coming; then one piece of prefill and one decode step. A step
that fails is done again a tenant at a time, so that only the culprit's requests fail.

Where all that decode want their best tokens, a step is launched before those of the one before are read: the device is
busy while these are made text and sent. An answer that turns out to have ended has one row too many in it, unheard.
"""

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bayou.errors import BayouError
from bayou.serving.bank import Bank
from bayou.serving.decode import Flight
from bayou.serving.forward import Part, Runner
from bayou.serving.refusals import Refused, busy
from bayou.serving.sampling import Chosen, Row, Sampling
from bayou.serving.tenant import Tenant, Ticket
from bayou.serving.voice import Speech

_PATIENCE = 5.0
"""Seconds that a request waits for room for its tenant before later ones must wait behind it."""


@dataclass(frozen=True)
class Piece:
    """What is new of an answer. reason: "stop" or "length" with the last piece. refused: there is no more, and why."""

    text: str = ""
    chosen: tuple[Chosen, ...] = ()
    reason: str | None = None
    refused: Refused | None = None

    @property
    def last(self) -> bool:
        """Whether no piece follows."""
        return self.reason is not None or self.refused is not None


Hear = Callable[[Piece], None]


@dataclass(eq=False)
class Answer:
    """One answer in the making: tokens, of which the first `done` have their keys and values in the slot."""

    tokens: list[int]
    row: Row
    hear: Hear
    ticket: Ticket
    speech: Speech
    prompt: int
    done: int = 0
    slot: int = 0
    cancelled: bool = False
    arrived: float = field(default_factory=time.monotonic)

    @property
    def tenant(self) -> Tenant:
        """Whose it is."""
        return self.ticket.tenant


@dataclass(frozen=True)
class Settings:
    """How much the engine takes.

    memory, host_memory: bytes of deltas on the device and beside it. tenants: on the device at once. batch: answers at
    once. length: tokens of a prompt and its answer. queue: answers that may wait. piece: tokens of a prefill step.
    unpack: hold the deltas' factors as fp32 numbers, for speed on a CPU. kernels, base_bits: see Runner.
    """

    memory: int = 8 * 10**9
    host_memory: int = 32 * 10**9
    tenants: int = 256
    batch: int = 32
    length: int = 2048
    queue: int = 256
    piece: int = 512
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    unpack: bool = False
    kernels: bool | None = None
    base_bits: int = 16


class Engine:
    """One base, its tenants, and the thread that answers.

    Args:
        folder: the base's.
        name: what requests for the base itself call it.

    Raises BadInput, and Unsupported for a model that cannot be served.
    """

    def __init__(self, folder: Path, name: str = "base", settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        chosen = self.settings
        if chosen.device != "cpu":  # the thread that steps must not wait 5 ms for one that unpacks a tenant's Plan
            sys.setswitchinterval(min(sys.getswitchinterval(), 5e-4))
        lines = chosen.tenants + 1
        self.model = Runner(
            folder, chosen.device, chosen.dtype, lines, chosen.batch, chosen.length, chosen.kernels, chosen.base_bits
        )
        self.length = self.model.slots.most
        self._free = list(range(self.settings.batch, 0, -1))
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []
        self._flying: tuple[list[Answer], Flight] | None = None
        self._over: list[Ticket] = []  # of answers that ended while a step with their rows was under way
        self._lock = threading.Condition()
        self._closed = False
        self.on_token: Callable[[Answer], None] = lambda _: None
        self.on_end: Callable[[Answer, Piece], None] = lambda _, __: None
        self.bank = Bank(
            folder,
            name,
            self.model.base,
            self.model.router,
            limit=self.settings.memory,
            host=self.settings.host_memory,
            lines=lines,
            unpack=self.settings.unpack,
            changed=self._wake,
        )
        self._thread = threading.Thread(target=self._run, name="bayou-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------------ from outside

    def submit(self, tenant: Tenant, prompt: Sequence[int], sampling: Sampling, *hearers: Hear) -> list[Answer]:
        """Ask for an answer for each of `hearers`, which gets its pieces from the engine's thread and must not block.

        The sampled answers to one request differ; those to an equal request with an equal seed are the same ones.
        Raises Refused for a prompt that is empty or too long, and where the queue is full.
        """
        if not prompt:
            raise Refused("the prompt has no tokens", param="prompt")
        if len(prompt) + 1 > self.length:
            raise Refused(
                f"the prompt has {len(prompt):,} tokens, and prompt and answer may have {self.length:,}",
                code="context_length_exceeded",
                param="prompt",
            )
        with self._lock:
            if self._closed:
                raise Refused("the server is shutting down", 503, "shutting_down")
            if len(self._waiting) + len(hearers) > self.settings.queue:
                raise busy(len(self._waiting))
            found = []
            for choice, hear in enumerate(hearers):
                row = Row(sampling, sampling.draws(choice))
                speech = Speech(tenant.voice, sampling.stop, sampling.late)
                ticket = self.bank.ticket(tenant)
                found.append(Answer(list(prompt), row, hear, ticket, speech, len(prompt)))
            self._waiting.extend(found)
            self._lock.notify_all()
        return found

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Nobody listens any longer: free what they hold before the next step."""
        with self._lock:
            for answer in answers:
                answer.cancelled = True
            self._lock.notify_all()

    def load(self, tenant: Tenant) -> None:
        """Bring a tenant to the device now, as a request for it would; returns when it is there.

        Raises Refused for a file that cannot be loaded. A later tenant may put it out again.
        """
        ticket = self.bank.ticket(tenant)
        try:
            with self._lock:
                while not self.bank.hold(ticket) and ticket.error is None and not self._closed:
                    self._lock.wait()
        finally:
            self.bank.give_back(ticket)
        if ticket.error is not None:
            raise ticket.error

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return not self._closed

    @property
    def load_now(self) -> dict[str, int]:
        """Answers that run and wait, and the bytes of keys and values."""
        with self._lock:
            return {"running": len(self._running), "waiting": len(self._waiting), "kv_bytes": self.model.slots.nbytes}

    def close(self) -> None:
        """End the threads; answers in the making are refused."""
        self._closed = True
        self._wake()
        self._thread.join()
        self.bank.close()

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify_all()

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            while not self._closed:
                self._once()
        finally:
            with self._lock:
                self._closed = True
                left = [*self._running, *self._waiting]
            self._flying = None
            for ticket in self._over:
                self.bank.give_back(ticket)
            for answer in left:
                self._finish(answer, Piece(refused=Refused("the server is shutting down", 503, "shutting_down")))

    def _once(self) -> None:
        with self._lock:
            self._let_go()
            self._admit()
            batch = list(self._running)
            if not batch and self._flying is None:
                if not self._closed:
                    self._lock.wait(_PATIENCE)
                return
        self._prefill([s for s in batch if len(s.tokens) - s.done > 1])
        self._decode([s for s in batch if s in self._running and len(s.tokens) - s.done == 1])

    def _let_go(self) -> None:
        for answer in [s for s in (*self._running, *self._waiting) if s.cancelled]:
            self._finish(answer, Piece(reason="cancelled"))
        for answer in [s for s in self._waiting if s.ticket.error is not None]:
            assert answer.ticket.error is not None
            self._finish(answer, Piece(refused=answer.ticket.error))

    def _admit(self) -> None:
        for answer in list(self._waiting):
            if not self._free:
                return
            if not self.bank.hold(answer.ticket):
                if self.bank.short_of_room > _PATIENCE:
                    return  # let those that run come to an end: it waits for the room of their tenants
                continue
            resident = answer.ticket.resident
            rows = self.model.rows if resident is None else resident.rows
            if max(answer.tokens) >= rows or min(answer.tokens) < 0:
                refused = Refused(f"the prompt has a token outside the model's 0 .. {rows - 1}", param="prompt")
                self._finish(answer, Piece(refused=refused))
                continue
            self._waiting.remove(answer)
            answer.slot = self._free.pop()
            self._running.append(answer)

    def _finish(self, answer: Answer, piece: Piece) -> None:
        with self._lock:
            if answer in self._running:
                self._running.remove(answer)
                self._free.append(answer.slot)
                self._free.sort(reverse=True)
            with contextlib.suppress(ValueError):
                self._waiting.remove(answer)
        if self._flying is None:
            self.bank.give_back(answer.ticket)
        else:  # its line and deltas may be read until that step is over
            self._over.append(answer.ticket)
        self.on_end(answer, piece)
        if not answer.cancelled:
            answer.hear(piece)

    # ------------------------------------------------------------------------------------------------ steps

    def _prefill(self, answers: list[Answer]) -> None:
        """One piece: the oldest prompts, as many of their tokens as a step takes."""
        work, left = [], self.settings.piece
        for answer in answers:
            take = min(left, len(answer.tokens) - answer.done)
            if take:
                work.append((answer, take))
                left -= take
        if work:
            self._step(work, decode=False)

    def _decode(self, answers: list[Answer]) -> None:
        before = self._flying
        if answers and all(answer.row.greedy for answer in answers):
            flying, parts = [], []
            for answer in answers:
                known = len(answer.tokens)
                ahead = before is not None and answer in before[0]
                if ahead and (known + 1 - answer.prompt >= answer.row.sampling.max_tokens or known + 1 >= self.length):
                    continue  # it ends with the token that is under way
                flying.append(answer)
                token = -1 if ahead else answer.tokens[-1]
                parts.append(Part((token,), answer.done + ahead, answer.slot, answer.ticket.resident, answer.row))
            flight = self.model.launch(parts) if parts else None
            self._flying = (flying, flight) if flight is not None else before
            if flight is not None or not parts:
                self._land(before, after=self._flying if flight is not None else None)
                return
        self._land(before, after=None)
        left = [answer for answer in answers if answer in self._running]
        if left:
            self._step([(answer, 1) for answer in left], decode=True)

    def _land(self, flown: tuple[list[Answer], Flight] | None, after: tuple[list[Answer], Flight] | None) -> None:
        """Hear the tokens of a step that was launched; `after` is under way by now."""
        if flown is None:
            return
        answers, flight = flown
        over, self._over = self._over, []
        found = self.model.land(flight, [None] * len(answers))
        self._flying = after
        for ticket in over:
            self.bank.give_back(ticket)
        for answer, token in zip(answers, found, strict=True):
            if answer in self._running:
                answer.done += 1
                self._hear(answer, token)

    def _step(self, work: list[tuple[Answer, int]], decode: bool) -> None:
        parts = []
        for answer, count in work:
            stop = answer.done + count
            row = answer.row if stop == len(answer.tokens) else None
            parts.append(Part(answer.tokens[answer.done : stop], answer.done, answer.slot, answer.ticket.resident, row))
        try:
            chosen = self.model.step(parts, decode)
        except Exception as error:  # any tenant's rows may have caused it: find out whose
            tenants = {answer.tenant for answer, _ in work}
            if len(tenants) > 1:
                for tenant in tenants:
                    self._step([item for item in work if item[0].tenant is tenant], decode)
                return
            refused = _failure(error)
            for answer, _ in work:
                self._finish(answer, Piece(refused=refused))
            return
        for (answer, count), found in zip(work, chosen, strict=True):
            answer.done += count
            if answer.done == len(answer.tokens):
                self._hear(answer, found)

    def _hear(self, answer: Answer, found: Chosen | None) -> None:
        try:
            self._hear_token(answer, found)
        except BaseException as error:  # a tenant's tokenizer may raise anything, even panic in Rust
            if answer in self._running:
                self._finish(answer, Piece(refused=_failure(error)))

    def _hear_token(self, answer: Answer, found: Chosen | None) -> None:
        if found is None:
            refused = Refused("the model's scores are not numbers; its delta is at fault", 422, "model_failed")
            self._finish(answer, Piece(refused=refused))
            return
        sampling = answer.row.sampling
        answer.tokens.append(found.token)
        self.on_token(answer)
        if found.token in answer.tenant.voice.ends and not sampling.ignore_eos:
            self._finish(answer, Piece(answer.speech.end(), (found,), "stop"))
            return
        text = answer.speech.add(found.token)
        if answer.speech.stopped:
            self._finish(answer, Piece(text, (found,), "stop"))
        elif len(answer.tokens) - answer.prompt >= sampling.max_tokens or len(answer.tokens) >= self.length:
            text += answer.speech.end()
            self._finish(answer, Piece(text, (found,), "stop" if answer.speech.stopped else "length"))
        else:
            answer.hear(Piece(text, (found,)))


def _failure(error: BaseException) -> Refused:
    if isinstance(error, torch.OutOfMemoryError):
        return Refused("the device has no memory left for this answer; ask for fewer tokens", 503, "out_of_memory")
    message = str(error) if isinstance(error, BayouError) else f"{type(error).__name__}: {error!s:.300}"
    return Refused(f"the model failed to answer: {message}", 422, "model_failed")
