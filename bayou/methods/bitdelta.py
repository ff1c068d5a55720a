"""BitDelta: the sign of the delta times one scale a matrix. https://arxiv.org/abs/2402.10193

One bit a weight. The scale that minimises the squared error is mean |delta| (equation 2); `distillation.gains` then
fits all scales of a model to the fine-tune's logits (section 3.2). Norms stay exact; what a budget leaves goes to a
low-rank delta of the embeddings, which the paper stores whole.
"""

import torch

from bayou.delta import Dense, Term
from bayou.methods import Site, TermLayout
from bayou.packed import Packed, Spec

EMBEDDINGS = {"method": "lowrank", "bits": 16}
"""Signs suit an embedding badly: most of its delta lies in a few directions."""

SPEC = "1"

DISTILL_STEPS = 200
"""Steps of scale distillation that follow by default (section 3.2)."""


def layout(shape: tuple[int, int]) -> tuple[TermLayout, ...]:
    """One Dense of 1 bit, without scales of its own: the term's gain is the scale."""
    return (TermLayout("Dense", ((0, SPEC, ""),)),)


def encode(site: Site) -> tuple[Term, ...]:
    """sign(delta) * mean |delta|; a code of 0 or 1 stands for -0.5 or +0.5, so the gain is twice the mean."""
    codes = torch.empty(site.delta.shape, dtype=torch.uint8)
    total = 0.0
    for start, block in site.delta.blocks():
        codes = codes.to(block.device)
        codes[start : start + len(block)] = block > 0
        total += float(block.abs().sum(dtype=torch.float64))
    gain = torch.tensor(2 * total / codes.numel(), dtype=torch.float32).item()
    return (Dense(Packed.codes(codes, Spec.parse(SPEC)), gain),)
