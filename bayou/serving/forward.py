"""One step of the model over rows of many tenants: from tokens to scores to the tokens that follow.

On a GPU a decode step's shapes are rounded up (rows and slots to powers of two, positions to 64s) by rows that are
nobody's, and nothing in it waits for the device before the tokens are read; so steps of equal shapes can be replayed as
one graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bayou import skeleton
from bayou.checkpoint import Checkpoint
from bayou.errors import Unsupported
from bayou.kernels.one_delta import suits
from bayou.serving import slots as kv
from bayou.serving.resident import Resident
from bayou.serving.router import Rows, served
from bayou.serving.sampling import Chosen, Row, choose

_REACH = 64
_PROBES = (13, 17, 19, 23, 29, 31, 37, 41, 43)
"""Numbers of rows of the first step: one that is no other size in the model shows where its rows lie."""


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


_FILLER = Part((0,), 0, 0, None, None)
"""A row that is nobody's: its keys and values go to slot 0, which no answer has."""


class Runner:
    """The base in memory, and the tree of routed modules over it.

    Args:
        folder: of the base.
        lines: of the router's tables, see Bank.
        batch: answers at once.
        length: positions of an answer with its prompt at most; less where the model has fewer.
        kernels: multiply by all tenants' deltas at once; None: on a GPU with Triton, where BAYOU_PACKED=1 asks for it.

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
    ) -> None:
        checkpoint = Checkpoint(folder)
        self.device = torch.device(device)
        self.rounding = self.device.type == "cuda"
        self.base = skeleton.build(folder)
        places = skeleton.places(self.base, checkpoint.names())
        skeleton.fill(self.base, "", places, checkpoint.read, dtype=dtype, device=self.device)
        config = self.base.config.get_text_config()
        self.rows = len(self.base.get_input_embeddings().weight)
        if kernels is None:
            kernels = suits(self.base.get_input_embeddings().weight)
        self.tree, self.router = served(self.base, lines, kernels=kernels)
        self.slots = kv.Slots(batch + 1, min(length, getattr(config, "max_position_embeddings", None) or length))
        kv.put_into(self.tree, self.slots)
        sizes = {size for p in self.base.parameters() for size in p.shape}
        sizes |= {value for value in vars(config).values() if isinstance(value, int)}
        self._probe(next(rows for rows in _PROBES if rows not in sizes))

    @property
    def nbytes(self) -> int:
        """Bytes of the base's weights."""
        return sum({p.data_ptr(): p.nbytes for p in self.base.parameters()}.values())

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

    @torch.inference_mode()
    def step(self, parts: Sequence[Part], decode: bool) -> list[Chosen | None]:
        """The token that follows each part, None where none is wanted or no score is a number.

        decode: each part is one token.
        """
        self.slots.reserve(max(part.first + len(part.tokens) for part in parts))
        order = sorted(range(len(parts)), key=lambda i: parts[i].line)
        sorted_parts = [parts[i] for i in order]
        filled = 0
        if decode and self.rounding:
            filled = (1 << (len(parts) - 1).bit_length()) - len(parts)
            sorted_parts = [_FILLER] * filled + sorted_parts
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
                found[order[rows[at][0] - filled]] = token
        return found

    def _places(self, table: Tensor, spans: list[tuple[int, int, int, int]], decode: bool) -> kv.Places:
        if not decode:
            return kv.Places(table[2], table[1], spans=tuple(spans))
        used = max(slot for _, _, slot, _ in spans) + 1
        reach = max(first for _, _, _, first in spans) + 1
        if self.rounding:
            used = min(1 << (used - 1).bit_length(), self.slots.count)
            reach = min(-(-reach // _REACH) * _REACH, self.slots.length)
        by_slot, filled = [0] * used, [1] * used
        for row, _, slot, first in spans:
            by_slot[slot], filled[slot] = row, first + 1
        read = torch.tensor([by_slot, filled], device=self.device)
        return kv.Places(table[2], table[1], by_slot=read[0], filled=read[1], reach=reach)

    def _rows(self, parts: Sequence[Part], counts: Sequence[int], slots: Tensor) -> Rows:
        """The segments of parts that lie sorted by line."""
        segments: list[tuple[int, int, Resident | None]] = []
        lines: list[int] = []
        at = 0
        for part, count in zip(parts, counts, strict=True):
            if lines and part.line == lines[-1]:
                segments[-1] = (segments[-1][0], at + count, part.resident)
            else:
                segments.append((at, at + count, part.resident))
                lines.append(part.line)
            at += count
        if not self.router.kernels:
            return Rows(tuple(segments), slots)
        offsets = [*(start for start, _, _ in segments), at]
        both = torch.tensor([*offsets, *(line or -1 for line in lines)], dtype=torch.int32, device=self.device)
        return Rows(tuple(segments), slots, both[: len(offsets)], both[len(offsets) :])
