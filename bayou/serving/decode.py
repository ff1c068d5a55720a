"""A decode step that is the same work whoever its rows belong to: on a GPU captured once, as a graph, and replayed.

The rows are rounded up to a power of two by rows that are nobody's. What the step has to know of its rows (token,
position, slot, the tenant's line, segments) is one copy into memory that stays where it is. Its tokens are kept on the
device by slot, so that the next step can be launched before the host has seen them.

A graph belongs to a number of rows and to the largest segment, see tables.segments.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayou.serving.router import Router, Rows
from bayou.serving.slots import Places, Slots
from bayou.serving.tables import segments


@dataclass(frozen=True)
class Place:
    """A row of a step: a token, at a position of a slot, of the tenant in a line of the tables.

    token: -1 is the one that the last step found for this slot.
    """

    token: int
    position: int
    slot: int
    line: int


@dataclass(eq=False)
class Flight:
    """A step that was launched. order: the index of each row among those that were asked for; filled: rows before."""

    order: list[int]
    filled: int
    scores: Tensor
    found: Tensor
    ready: Any = None

    def tokens(self) -> list[int]:
        """The best token of each row, in the order of asking; -1 where no score is a number. Waits for the step."""
        if self.ready is not None:
            self.ready.synchronize()
        values = self.found.tolist()[self.filled :]
        return [token for _, token in sorted(zip(self.order, values, strict=True))]

    def own_scores(self) -> Tensor:
        """(rows, vocabulary) in the order of asking; to be used before the next launch."""
        back = sorted(range(len(self.order)), key=lambda i: self.order[i])
        return self.scores[torch.tensor(back, device=self.scores.device) + self.filled]


class Decoder:
    """The steps of one model.

    forward: (ids (rows,), positions (rows,)) -> scores (rows, vocabulary), with router and slots set for the step.
    batch: rows at most.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor], Tensor],
        router: Router,
        slots: Slots,
        batch: int,
        device: torch.device,
    ) -> None:
        self._forward, self._router, self._slots, self.device = forward, router, slots, device
        most = 1 << (batch - 1).bit_length()
        self._captures = device.type == "cuda"
        self._last = torch.zeros(slots.count, dtype=torch.int64, device=device)
        self._given = torch.zeros(6 * most + 1, dtype=torch.int64, device=device)
        self._found = torch.zeros(most, dtype=torch.int64, device=device)
        # Two of each in turn: a copy of the step before may be under way.
        self._staging = [torch.zeros(6 * most + 1, dtype=torch.int64, pin_memory=self._captures) for _ in range(2)]
        self._landing = [torch.zeros(most, dtype=torch.int64, pin_memory=self._captures) for _ in range(2)]
        self._turn = 0
        self._graphs: dict[tuple[int, int], tuple[Any, Tensor, Any]] = {}
        self._holds: Any = None
        self._stream = torch.cuda.Stream(device) if self._captures else None
        self._pool: Any = None

    def launch(self, places: Sequence[Place]) -> Flight:
        """Set a step going. The one before may be under way still; of one two before, the tokens must have been read.

        All slots must have room for the positions, and all lines be such that `Router.apart` does not name.
        """
        order = sorted(range(len(places)), key=lambda i: places[i].line)
        count = 1 << (len(order) - 1).bit_length()
        filled = count - len(order)
        rows = [Place(0, 0, 0, 0)] * filled + [places[i] for i in order]
        most, offsets, lines = segments([row.line for row in rows], count)
        self._turn ^= 1
        staged = self._staging[self._turn][: 6 * count + 1]
        told = [[row.token for row in rows], [row.position for row in rows], [row.slot for row in rows]]
        told += [[row.line for row in rows], offsets, lines]
        staged.copy_(torch.tensor([number for part in told for number in part]))
        self._given[: len(staged)].copy_(staged, non_blocking=True)
        scores = self._replay(count, most) if self._captures else self._compute(count, most)
        found = self._landing[self._turn][:count]
        found.copy_(self._found[:count], non_blocking=True)
        flight = Flight(order, filled, scores, found)
        if self._captures:
            flight.ready = torch.cuda.Event()
            flight.ready.record()
        return flight

    def _compute(self, count: int, most: int) -> Tensor:
        """The step; everything that depends on its rows is read from `_given`. most: 0 where all are the base's."""
        ids, position, slot, line = self._given[: 4 * count].view(4, count)
        ids = torch.where(ids < 0, self._last[slot], ids)
        rows = Rows((), line, True)
        if most:
            # Each in memory of its own, which is aligned: kernels would be compiled anew for what is not.
            bounds = self._given[4 * count : 5 * count + 1].to(torch.int32)
            owners = self._given[5 * count + 1 : 6 * count + 1].to(torch.int32)
            rows = Rows((), line, True, bounds, owners, most)
        self._slots.places = Places(slot, position)
        with self._router.step(rows, rows):
            scores = self._forward(ids, position)
        best, tokens = scores.float().max(-1)
        self._last[slot] = tokens
        self._found[:count] = torch.where(best.isfinite(), tokens, -1)
        return scores

    def _replay(self, count: int, most: int) -> Tensor:
        holds = self._router.version, self._slots.length
        if self._holds != holds:
            if self._graphs:
                torch.cuda.current_stream(self.device).synchronize()
            self._graphs.clear()
            self._pool = torch.cuda.graph_pool_handle()  # the old one ends with the last of its graphs
            self._holds = holds
        if (count, most) not in self._graphs:
            self._graphs[count, most] = self._captured(count, most)
        graph, scores, _ = self._graphs[count, most]
        graph.replay()
        return scores

    def _captured(self, count: int, most: int) -> tuple[Any, Tensor, Any]:
        """Graph, its scores, and what it reads that others may let go of."""
        assert self._stream is not None
        graph, now = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        kept = [table.deltas for table in self._router.tables]
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            last = self._last.clone()
            self._compute(count, most)  # compiles, and lets libraries allocate what they need
            self._last.copy_(last)  # the graph will do this step once more
            self._stream.synchronize()
            # The loader's thread may allocate meanwhile, which any other mode would take for a fault of ours.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                scores = self._compute(count, most)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # which would hide what went wrong
                    graph.capture_end()
                raise
            graph.capture_end()
        now.wait_stream(self._stream)
        # Those of before and of now: the loader may have put larger ones in their places meanwhile.
        return graph, scores, [kept, [table.deltas for table in self._router.tables]]
