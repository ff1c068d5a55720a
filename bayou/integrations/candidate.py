"""The base in memory with an adapter merged into it: what the adapter is worth is measured on it."""

from pathlib import Path

import torch
from torch import Tensor, nn

from bayou.evaluate import read_model


class Candidate:
    """The model in `folder`, fp32 on `device`, that takes the parts of an adapter as they are written."""

    def __init__(self, folder: Path, device: str) -> None:
        self.model = read_model(folder, device)

    def add(self, path: str, b: Tensor, a: Tensor, transposed: bool = False) -> None:
        """The parameter at `path` becomes itself plus b @ a (out, in); transposed: it lies as (in, out)."""
        product = b.to(self.model.device).float() @ a.to(self.model.device).float()
        self.add_to(path, product.T if transposed else product)

    def add_to(self, path: str, value: Tensor) -> None:
        """The parameter at `path`, one of zeros where the module has none, becomes itself plus `value`."""
        module, _, leaf = path.rpartition(".")
        old = getattr(self.model.get_submodule(module), leaf)
        self.put(path, value if old is None else old + value.to(old.device))

    def put(self, path: str, value: Tensor) -> None:
        """`value` takes the place of the parameter at `path`."""
        module, _, leaf = path.rpartition(".")
        # A parameter of its own: a tied head's must not change with the embedding's, which is a part by itself.
        parameter = nn.Parameter(value.to(self.model.device, torch.float32), requires_grad=False)
        self.model.get_submodule(module)._parameters[leaf] = parameter
