"""Functions that run in the place of a model's modules for the time of a walk (see calibrate.walk).

The model's own forward calls them, so masks, rotary embeddings and kinds of layer are its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


class _StandIn(nn.Module):
    """Runs a function in a module's place and passes for it: any other attribute is the module's."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        # Not a child: the paths of the model's modules and parameters stay as they are.
        self.__dict__["_module"], self.__dict__["_function"] = module, function

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_function"](*args, **kwargs)


class StandIns:
    """Stand-ins in a model; at the end, whatever happened, every module is in its own place again."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._originals: dict[str, nn.Module] = {}

    def __enter__(self) -> StandIns:
        return self

    def __exit__(self, *_: object) -> None:
        for path in list(self._originals):
            self.restore(path)

    def put(self, path: str, function: Callable[..., Any]) -> None:
        """Let `function` run in the place of the module at `path`."""
        self._originals[path] = self._model.get_submodule(path)
        self._set(path, _StandIn(self._originals[path], function))

    def restore(self, path: str) -> None:
        """Put the module that belongs at `path` there."""
        self._set(path, self._originals.pop(path))

    def _set(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self._model.get_submodule(parent), name, module)


def cut(value: Any, windows: int, part: slice) -> Any:
    """The slice `part` of every tensor in `value` that holds all windows: on axis 0, or 1 (Qwen2-VL)."""
    if isinstance(value, Tensor):
        if value.ndim and value.shape[0] == windows:
            return value[part]
        return value[:, part] if value.ndim > 2 and value.shape[1] == windows else value
    if isinstance(value, dict):
        return {key: cut(item, windows, part) for key, item in value.items()}
    return type(value)(cut(item, windows, part) for item in value) if isinstance(value, tuple | list) else value


def own_head(model: PreTrainedModel) -> str | None:
    """The path of the output embedding, if it has a weight of its own (not the input embedding's)."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is table.weight:
        return None
    return next(path for path, module in model.named_modules() if module is head)
