"""How a learning rate goes over a training."""

import math


def cosine(step: int, steps: int, *, warmup: float, floor: float = 0.0) -> float:
    """The rate of step `step` (from 0) of `steps`, relative to its peak.

    It rises from 0 in the first steps, a share `warmup` of all, then falls as a cosine to `floor`.
    """
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
