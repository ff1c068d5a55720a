"""The processes that train one student together, through accelerate."""

import os
from typing import Any

from torch import Tensor

from bayou.errors import BadInput


class World:
    """The processes that train together, through accelerate; just this one where none others were started."""

    def __init__(self) -> None:
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", "1")), 0
        self._accelerator: Any = None
        if self.count > 1:
            try:
                from accelerate import Accelerator
            except ImportError:
                raise BadInput("training with several processes needs accelerate: pip install 'bayou[train]'") from None
            self._accelerator = Accelerator()
            self.count, self.rank = self._accelerator.num_processes, self._accelerator.process_index

    def mean(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        if self._accelerator is not None:
            for tensor in tensors:
                tensor.copy_(self._accelerator.reduce(tensor, "mean"))

    def wait(self) -> None:
        """Until all are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
