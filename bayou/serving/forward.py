"""One step of the model over rows of many tenants: from tokens to scores to the tokens that follow.

Prefill, and decoding of what decode.py's steps of fixed shape have no place for, are steps of just the rows there are.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bayou import skeleton
from bayou.checkpoint import Checkpoint
from bayou.errors import BadInput, Unsupported
from bayou.kernels.one_delta import suits
from bayou.serving import slots as kv
from bayou.serving.decode import Decoder, Flight, Place
from bayou.serving.few_bits import FewBits, shrink
from bayou.serving.resident import Resident
from bayou.serving.router import Rows, served
from bayou.serving.sampling import Chosen, Row, Sampling, choose
from bayou.serving.tables import segments, sizes

_LOG = logging.getLogger("bayou.serving")
_PROBES = (13, 17, 19, 23, 29, 31, 37, 41, 43)
"""Numbers of rows of the first step: one that is no other size in the model shows where its rows lie."""
_SEGMENTS = 8
"""Segments of a step at least: with fewer, the kernels would take tiles that they take for nothing else."""


@dataclass(frozen=True)
class Part:
    """Tokens of one answer in a step, which begin at position `first` of its slot.

    row: how to choose the token that follows; None where none is wanted yet.
    """

    tokens: Sequence[int]
    first: int
    slot: int
    resident: Resident | None
    row: Row | None

    @property
    def line(self) -> int:
        """The tenant's in the router's tables."""
        return 0 if self.resident is None else self.resident.slot


class Runner:
    """The base in memory, and the tree of routed modules over it.

    Args:
        folder: of the base.
        lines: of the router's tables, see Bank.
        batch: answers at once.
        length: positions of an answer with its prompt at most; less where the model has fewer.
        kernels: compute all tenants' rows at once, and decode in steps of fixed shape (graphs on a GPU); None: on a GPU
            with Triton, but for BAYOU_PACKED=0.
        bits: 4 rounds the decoder layers' linears (few_bits.py), 16 leaves them.

    Raises BadInput, and Unsupported for a model that cannot be served.
    """

    @torch.inference_mode(False)  # whatever mode our caller is in: tables are written by other threads later
    def __init__(
        self,
        folder: Path,
        device: str,
        dtype: torch.dtype,
        lines: int,
        batch: int,
        length: int,
        kernels: bool | None = None,
        bits: int = 16,
    ) -> None:
        checkpoint = Checkpoint(folder)
        self.device = torch.device(device)
        self.base = skeleton.build(folder)
        places = skeleton.places(self.base, checkpoint.names())
        skeleton.fill(self.base, "", places, checkpoint.read, dtype=dtype, device=self.device)
        if bits == 4:
            shrink(self.base)
        elif bits != 16:
            raise BadInput(f"a base in {bits} bits: 16 or 4 are to be had")
        config = self.base.config.get_text_config()
        self.rows = len(self.base.get_input_embeddings().weight)
        if kernels is None:
            kernels = suits(self.base.get_input_embeddings().weight)
        self.tree, self.router = served(self.base, lines, kernels=kernels)
        self.slots = kv.Slots(batch + 1, min(length, getattr(config, "max_position_embeddings", None) or length))
        kv.put_into(self.tree, self.slots, kernels=kernels)
        taken = {size for p in self.base.parameters() for size in p.shape}
        taken |= {value for value in vars(config).values() if isinstance(value, int)}
        self._probe(next(rows for rows in _PROBES if rows not in taken))
        self._decoder: Decoder | None = None
        self._said: set[str] = set()
        if kernels and self.router.alone:
            self._say(f"{self.router.alone[0]} is computed tenant by tenant, so decoding is not captured: it is slower")
        elif kernels:
            self.router.sizes = sizes(batch)
            self._decoder = Decoder(self._every_score, self.router, self.slots, batch, self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the base's weights."""
        held = [p for p in self.base.parameters() if not p.is_meta]
        held += [b for module in self.base.modules() if isinstance(module, FewBits) for b in module.buffers()]
        return sum({t.data_ptr(): t.nbytes for t in held}.values())

    @property
    def fixed(self) -> bool:
        """Whether decode steps are of fixed shape."""
        return self._decoder is not None

    def _probe(self, rows: int) -> None:
        """A first step, in which every module learns where its rows lie, and slots get their memory."""
        position = torch.arange(rows, device=self.device)
        nobody = torch.zeros_like(position)
        self.slots.places = kv.Places(nobody, position, spans=((0, rows, 0, 0),))
        try:
            with torch.inference_mode(), self.router.probe(Rows(((0, rows, None),), nobody)):
                self._scores(nobody, position, position)
        except (TypeError, AttributeError) as error:
            raise Unsupported(f"{type(self.base).__name__} cannot be served: {error}") from error
        if sorted(self.slots.layers) != list(range(len(skeleton.decoder_layers(self.tree)[1]))):
            raise Unsupported(f"{type(self.base).__name__} has layers without the attention that serving knows")

    def _scores(self, ids: Tensor, position: Tensor, kept: Tensor) -> Tensor:
        """Scores (kept, vocabulary) of the tokens that follow the rows `kept`."""
        found = self.tree(input_ids=ids[None], position_ids=position[None], use_cache=False, logits_to_keep=kept)
        return found.logits[0]

    def _every_score(self, ids: Tensor, position: Tensor) -> Tensor:
        return self.tree(input_ids=ids[None], position_ids=position[None], use_cache=False, logits_to_keep=0).logits[0]

    def _say(self, why: str) -> None:
        """Warn, once for each reason, of what makes decoding slower."""
        if why not in self._said:
            self._said.add(why)
            _LOG.warning(why)

    @torch.inference_mode()
    def launch(self, parts: Sequence[Part]) -> Flight | None:
        """Set a decode step of fixed shape going; None where these parts need another. See Decoder.launch.

        parts: one token each, which is -1 for the one that the last launch found for its slot.
        """
        if self._decoder is None:
            return None
        why = next((why for part in parts if (why := self.router.apart.get(part.line))), None)
        if why is not None:
            self._say(f"steps with a tenant that is computed apart are slower: {why}")
            return None
        try:
            self.slots.reserve(max(part.first for part in parts) + 1)
            return self._decoder.launch([Place(part.tokens[0], part.first, part.slot, part.line) for part in parts])
        except Exception as error:  # whatever a library finds fault with when it is captured
            self._decoder = None
            self._say(f"decode steps of fixed shape failed, and slower ones take their place: {error!s:.300}")
            return None

    @torch.inference_mode()
    def land(self, flight: Flight, rows: Sequence[Row | None]) -> list[Chosen | None]:
        """The tokens of a step that was launched, chosen as `rows` say; the best where one lacks."""
        if any(row is not None and not row.greedy for row in rows):
            return choose(flight.own_scores(), [row or Row(Sampling()) for row in rows])
        return [Chosen(token) if token >= 0 else None for token in flight.tokens()]

    @torch.inference_mode()
    def step(self, parts: Sequence[Part], decode: bool) -> list[Chosen | None]:
        """The token that follows each part, None where none is wanted or no score is a number.

        decode: each part is one token.
        """
        flight = self.launch(parts) if decode else None
        if flight is not None:
            return self.land(flight, [part.row for part in parts])
        self.slots.reserve(max(part.first + len(part.tokens) for part in parts))
        order = sorted(range(len(parts)), key=lambda i: parts[i].line)
        sorted_parts = [parts[i] for i in order]
        ids: list[int] = []
        position: list[int] = []
        slot: list[int] = []
        line: list[int] = []
        spans, kept, wanting = [], [], []
        for i, part in enumerate(sorted_parts):
            count = len(part.tokens)
            spans.append((len(ids), len(ids) + count, part.slot, part.first))
            ids += part.tokens
            position += range(part.first, part.first + count)
            slot += [part.slot] * count
            line += [part.line] * count
            if part.row is not None or decode:
                kept.append(len(ids) - 1)
                wanting.append(i)
        if not wanting:  # a model cannot be asked for no scores at all
            kept, wanting = [len(ids) - 1], [len(sorted_parts) - 1]
        table = torch.tensor([ids, position, slot, line], device=self.device)
        wanted = torch.tensor(kept, device=self.device)
        every = self._rows(sorted_parts, [len(part.tokens) for part in sorted_parts], table[3])
        last = self._rows([sorted_parts[i] for i in wanting], [1] * len(wanting), table[3, wanted])
        self.slots.places = self._places(table, spans, decode)
        with self.router.step(every, last):
            scores = self._scores(table[0], table[1], wanted)
        rows = [(i, sorted_parts[i].row) for i in wanting]
        asked = [at for at, (_, row) in enumerate(rows) if row is not None]
        found: list[Chosen | None] = [None] * len(parts)
        if asked:
            some = scores if len(asked) == len(scores) else scores[torch.tensor(asked, device=self.device)]
            chosen = choose(some, [row for _, row in rows if row is not None])
            for at, token in zip(asked, chosen, strict=True):
                found[order[rows[at][0]]] = token
        return found

    def _places(self, table: Tensor, spans: list[tuple[int, int, int, int]], decode: bool) -> kv.Places:
        if not decode:
            return kv.Places(table[2], table[1], spans=tuple(spans))
        used = max(slot for _, _, slot, _ in spans) + 1
        reach = max(first for _, _, _, first in spans) + 1
        by_slot, filled = [0] * used, [1] * used
        for row, _, slot, first in spans:
            by_slot[slot], filled[slot] = row, first + 1
        read = torch.tensor([by_slot, filled], device=self.device)
        return kv.Places(table[2], table[1], by_slot=read[0], filled=read[1], reach=reach)

    def _rows(self, parts: Sequence[Part], counts: Sequence[int], slots: Tensor) -> Rows:
        """The segments of parts that lie sorted by line."""
        found: list[tuple[int, int, Resident | None]] = []
        lines: list[int] = []
        for part, count in zip(parts, counts, strict=True):
            at = len(lines)
            if lines and part.line == lines[-1]:
                found[-1] = (found[-1][0], at + count, part.resident)
            else:
                found.append((at, at + count, part.resident))
            lines += [part.line] * count
        if not self.router.kernels or any(part.line in self.router.apart for part in parts):
            return Rows(tuple(found), slots)
        most, offsets, owners = segments(lines, _SEGMENTS)
        if not most:
            return Rows(tuple(found), slots, True)
        starts, owned = (torch.tensor(part, dtype=torch.int32, device=self.device) for part in (offsets, owners))
        return Rows(tuple(found), slots, True, starts, owned, most)
