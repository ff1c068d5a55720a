"""Page-locked memory through which threads copy to a GPU: a buffer and a stream for each thread."""

import threading

import torch
from torch import Tensor

PIECE = 4 * 2**20
"""Bytes of a buffer. Page-locking memory takes longer than a copy of it, so there is little, and it is used often."""


class Staging(threading.local):
    """What each thread that uses it sees is its own. buffer: (PIECE,) uint8 on the CPU, page-locked for a GPU."""

    def __init__(self, device: torch.device) -> None:
        # threading.local runs this again in every thread.
        gpu = device.type == "cuda"
        self.buffer = torch.empty(PIECE, dtype=torch.uint8, pin_memory=gpu)
        self._stream = torch.cuda.Stream(device) if gpu else None

    def copy(self, nbytes: int, placed: Tensor) -> None:
        """The buffer's first `nbytes` into `placed`; the buffer is free again when this returns."""
        if self._stream is None:
            placed.copy_(self.buffer[:nbytes])
            return
        # What ran on this memory before it was allocated to us must be through first.
        self._stream.wait_stream(torch.cuda.current_stream(placed.device))
        with torch.cuda.stream(self._stream):
            placed.copy_(self.buffer[:nbytes], non_blocking=True)
        self._stream.synchronize()
