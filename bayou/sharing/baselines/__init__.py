"""The rivals of layer sharing, one file each, by their papers' formulas.

shortgpt    the layers of least block influence are removed
laco        runs of layers are merged into one (laco-code: as its published code does, which keeps the last)
slicegpt    the residual stream is rotated and cut
jointdrop   attentions and MLPs are dropped by one ranking
lastlayers  the last layers are dropped; head and last three are what recovery trains
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bayou.errors import BadInput
from bayou.sharing.baselines import jointdrop, laco, lastlayers, shortgpt, slicegpt
from bayou.sharing.baselines.baseline import Baseline

METHODS: dict[str, Callable[..., Baseline]] = {
    "shortgpt": shortgpt.share,
    "laco": laco.share,
    "laco-code": partial(laco.share, code=True),
    "slicegpt": slicegpt.share,
    "jointdrop": jointdrop.share,
    "lastlayers": lastlayers.share,
}

__all__ = ["METHODS", "Baseline", "share"]


def share(
    method: str,
    folder: Path | str,
    *,
    reduce: float,
    windows: Tensor,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch: int = 8,
) -> Baseline:
    """The model of `folder` made smaller by `method`, one of METHODS.

    Args:
        reduce: share of all parameters (embeddings counted) to remove; the nearest that the method can reach.
        windows: (n, length) token ids, without padding, to measure or calibrate on, `batch` at a time.
        dtype: of the model that is returned. A GPU measures in it too; keep fp32 on a CPU.

    Raises:
        BadInput: an unknown method; a reduction out of reach. Unsupported: a model of a form the method does not know.
    """
    if method not in METHODS:
        raise BadInput(f"no method {method!r}; choose one of {', '.join(METHODS)}")
    return METHODS[method](folder, reduce=reduce, windows=windows, device=device, dtype=dtype, batch=batch)
