"""Tensors of checkpoints read by threads before they are wanted, straight onto the device.

The work is cut into *turns* (a layer, a table); `turn(i)` makes turn i's tensors ready, begins to read turn i + 1's and
lets go of all others. Between the two a reader finds them on the device, in their own dtype; whatever is not held is
read from the checkpoint as ever.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from bayou.checkpoint import Checkpoint

_THREADS = 4

_MOST = 8 * 2**30
"""Bytes held of a turn; what is beyond is read when it is asked for."""


class View:
    """Reads a checkpoint as the checkpoint itself does, but what is held comes from the device."""

    def __init__(self, ahead: "Ahead", checkpoint: Checkpoint) -> None:
        self._ahead, self._checkpoint = ahead, checkpoint

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start:stop, on the device where they are held, else on the CPU. Not to be written to."""
        held = self._ahead.held.get((id(self._checkpoint), name))
        if held is None:
            return self._checkpoint.read(name, start, stop)
        return held[start:stop] if held.ndim else held


class Ahead:
    """A context manager; turns: what is wanted together, (checkpoint, tensor's name), in the order of the work."""

    def __init__(self, turns: Sequence[Sequence[tuple[Checkpoint, str]]], device: torch.device | str) -> None:
        self.held: dict[tuple[int, str], Tensor] = {}
        self._turns, self._device = turns, torch.device(device)
        self._coming: dict[int, dict[tuple[int, str], Future[Tensor]]] = {}
        # Copies on a stream of their own wait for no kernel of the layer that is being worked on.
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def __enter__(self) -> "Ahead":
        self._pool = ThreadPoolExecutor(_THREADS, "ahead")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._coming.clear()
        self.held.clear()

    def view(self, checkpoint: Checkpoint) -> View:
        """A reader of one of the checkpoints."""
        return View(self, checkpoint)

    def turn(self, index: int) -> None:
        """Hold turn `index`'s tensors and no others. Raises what reading them raised."""
        self._coming = {at: coming for at, coming in self._coming.items() if at == index}
        self._begin(index)
        found = {key: future.result() for key, future in self._coming.pop(index).items()}
        if self._stream is not None:
            for tensor in found.values():
                # Its memory must not be given to the next copies before the kernels that read it are through.
                tensor.record_stream(torch.cuda.current_stream(self._device))
        # A turn may want what is held (all experts of a layer are one tensor): that is not read again.
        wanted = {(id(checkpoint), name) for checkpoint, name in self._turns[index]}
        self.held = {key: tensor for key, tensor in self.held.items() if key in wanted} | found
        if index + 1 < len(self._turns):
            self._begin(index + 1)

    def _begin(self, index: int) -> None:
        if index in self._coming:
            return
        self._coming[index] = coming = {}
        total = 0
        for checkpoint, name in self._turns[index]:
            key = (id(checkpoint), name)
            total += checkpoint.tensor_nbytes(name)
            if total > _MOST:
                break
            if key not in self.held and key not in coming:
                coming[key] = self._pool.submit(self._read, checkpoint, name)

    def _read(self, checkpoint: Checkpoint, name: str) -> Tensor:
        tensor = checkpoint.read(name)
        if self._stream is None:
            return tensor.to(self._device)
        with torch.cuda.stream(self._stream):
            tensor = tensor.to(self._device)
        self._stream.synchronize()
        return tensor
