"""Processes that compress one model together, as torchrun starts them: who we are, and waiting for the others.

They share a journal on one file system and nothing else. Each calibrates by itself, so that the sums, and with them
the bytes of the file, are those of a single process.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

_PATIENCE = timedelta(days=7)  # a worker with nothing to do waits for one with much; torchrun ends all when one fails


@dataclass(frozen=True)
class Workers:
    """rank: our number, 0 .. count - 1."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether what is done once is ours to do: making the journal, writing the file, printing."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            dist.barrier()

    def shared(self, costs: Sequence[float]) -> list[int]:
        """The indexes of those pieces of work that are ours; the same costs give the same shares in every process."""
        loads = [0.0] * self.count
        mine = []
        for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            least = min(range(self.count), key=lambda worker: (loads[worker], worker))
            loads[least] += costs[index]
            if least == self.rank:
                mine.append(index)
        return sorted(mine)

    def device(self, device: str) -> str:
        """Our own device: "cuda" is one GPU a process."""
        if self.count > 1 and device == "cuda":
            return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"
        return device


def speaks() -> bool:
    """Whether this process is the one that prints: any that torchrun did not start, and the first of those it did."""
    return os.environ.get("RANK", "0") == "0" or not _launched()


def _launched() -> bool:
    return all(word in os.environ for word in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@contextmanager
def joined() -> Iterator[Workers]:
    """Ourselves among the processes that torchrun started, or alone. Waiting goes over gloo, on any device."""
    if dist.is_available() and dist.is_initialized():
        yield Workers(dist.get_rank(), dist.get_world_size())
    elif dist.is_available() and _launched() and int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo", timeout=_PATIENCE)
        try:
            yield Workers(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()
    else:
        yield Workers()
