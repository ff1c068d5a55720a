"""What a layer-shared model is made of, in memory: which matrices are tied to others, which sub-layers are left out."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tie:
    """What stands for one matrix: W = gain * reference + u @ v.

    tensor, reference: disk names; the reference is a tensor that is not tied itself, None is no base (the control).
    u (out, rank) and v (rank, in) are fp32.
    """

    tensor: str
    reference: str | None
    gain: float
    u: Tensor
    v: Tensor


@dataclass(frozen=True)
class Shared:
    """A shared model: its ties, and the sub-layers whose contribution to the residual stream is zero.

    dropped: names without the parameter, e.g. "model.layers.7.mlp" or "model.layers.7.self_attn".
    """

    ties: tuple[Tie, ...]
    dropped: tuple[str, ...] = ()
