"""Train what a smaller model keeps at its full size: a file holds it so in any case, and training it costs no bytes.

The parameters are replaced by fp32 copies, the student's own: the teacher, whose tensors they may have been, is left as
it is. `settle` rounds them to the dtype that they had.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """A parameter that is trained whole, the places where it stands (a tied head is one of two), its dtype before."""

    parameter: nn.Parameter
    places: tuple[tuple[nn.Module, str], ...]
    dtype: torch.dtype


def unfreeze(root: nn.Module, *, skip: Iterable[nn.Module] = (), but: Iterable[Tensor] = ()) -> list[Part]:
    """Make fp32 copies of all floating-point parameters under `root` and let them be trained.

    skip: modules that are left as they are, with all inside them. but: parameters that are left as they are.
    """
    left_out = {id(part) for module in skip for part in module.modules()}
    kept = {id(parameter) for parameter in but}
    found: dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]] = {}
    for module in root.modules():
        for leaf, parameter in [] if id(module) in left_out else module.named_parameters(recurse=False):
            if id(parameter) not in kept and parameter.is_floating_point():
                found.setdefault(id(parameter), (parameter, []))[1].append((module, leaf))
    return [_put(Part(nn.Parameter(old.detach().float().clone()), tuple(at), old.dtype)) for old, at in found.values()]


def settle(parts: Iterable[Part]) -> list[Part]:
    """End it: each parameter in the dtype that it had, and frozen."""
    rounded = [(part, nn.Parameter(part.parameter.detach().to(part.dtype), requires_grad=False)) for part in parts]
    return [_put(Part(parameter, part.places, part.dtype)) for part, parameter in rounded]


def _put(part: Part) -> Part:
    for module, leaf in part.places:
        setattr(module, leaf, part.parameter)
    return part
