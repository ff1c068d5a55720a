"""Fit the gains of all terms to the fine-tune's logits: BitDelta's scale distillation.

https://arxiv.org/abs/2402.10193, section 3.2: with the signs fixed, minimise over the scales the mean squared error
between the fine-tune's logits Z and the compressed model's, ||Z(x) - Z'(x; gains)||^2, with AdamW and a cosine
schedule, 200 steps of 4 windows of 128 tokens. Nothing but one number a term is trained, so it works for any method's
terms. The step is relative to the gain, since a gain is as small as the delta it scales.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bayou import skeleton
from bayou.attach import AttachedLinear, load
from bayou.checkpoint import Checkpoint
from bayou.delta import Dense, LowRank, Term
from bayou.deltafile import DeltaFile

BATCH, LENGTH = 4, 128
LEARNING_RATE = 0.01
"""A step's size relative to a gain (LOG.md has the comparison)."""


class _Fitted(nn.Module):
    """An attached linear whose terms' gains are parameters, relative to the gains they start from."""

    def __init__(self, attached: AttachedLinear) -> None:
        super().__init__()
        self.inner = attached.inner
        self.starts = tuple(term.gain for term in attached.delta.terms)
        self.factors = nn.Parameter(torch.ones(len(self.starts), device=attached.base.device))
        self._products = [self._product(term) for term in attached.delta.terms]

    @staticmethod
    def _product(term: Term) -> Callable[[Tensor], Tensor]:
        if isinstance(term, LowRank):
            return term.apply
        matrix = (term.weight.unpack() * term.gain).T  # unpacked once: it is multiplied hundreds of times
        return lambda x: x @ matrix

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y = self.inner(x)
        for factor, product in zip(self.factors, self._products, strict=True):
            y = y + factor * product(x)
        return y

    def gains(self) -> tuple[float, ...]:
        """The terms' gains as they are now, exact in fp32."""
        return tuple(
            torch.tensor(start * factor, dtype=torch.float32).item()
            for start, factor in zip(self.starts, self.factors.tolist(), strict=True)
        )


def fit(
    base: Path,
    tuned: Checkpoint,
    file: DeltaFile,
    windows: Tensor,
    *,
    steps: int,
    learning_rate: float = LEARNING_RATE,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[Term, ...]]:
    """Site name -> its terms with fitted gains, for every linear that the file codes.

    Args:
        base, tuned: the base's folder and the fine-tune. file: the compressed fine-tune as it is so far.
        windows: (n, LENGTH) token ids; BATCH of them a step, in order, over again when they run out.

    Holds both models in memory, in fp32. Embeddings, experts and tied heads keep their gains.
    """
    torch.manual_seed(0)  # dropout is off and nothing is drawn, but a model's code might
    teacher = skeleton.build(tuned.folder)
    skeleton.fill(teacher, "", skeleton.places(teacher, tuned.names()), tuned.read, device=device)
    student = load(base, file, device=device).requires_grad_(False)
    places = skeleton.places(teacher, [site.tensor for site in file.sites.values()])
    # A tied head is the embedding's site, which has one gain for two uses: it keeps it.
    by_module = {place.path.rpartition(".")[0]: name for name, place in places.items()}
    fitted: dict[str, _Fitted] = {}
    for path, module in list(student.named_modules()):
        if path in by_module and isinstance(module, AttachedLinear) and _plain(module):
            fitted[path] = _Fitted(module)
            student.set_submodule(path, fitted[path])
    if not fitted:
        return {}
    optimiser = torch.optim.AdamW([module.factors for module in fitted.values()], lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=steps)
    windows = windows.to(device)
    for step in range(steps):
        batch = windows[torch.arange(step * BATCH, (step + 1) * BATCH, device=device) % len(windows)]
        with torch.no_grad():
            wanted = teacher(input_ids=batch, use_cache=False).logits
        loss = (student(input_ids=batch, use_cache=False).logits - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)
    return {name: _with(file, name, fitted[path].gains()) for path, name in by_module.items() if path in fitted}


def _with(file: DeltaFile, name: str, gains: tuple[float, ...]) -> tuple[Term, ...]:
    terms = file.delta(name).terms
    return tuple(replace(term, gain=gain) for term, gain in zip(terms, gains, strict=True))


def _plain(module: AttachedLinear) -> bool:
    """Whether the module is one linear over its own base weight, with terms."""
    own = module.base is module.inner.weight and module.extra is None and module.gain == 1
    terms = all(isinstance(term, Dense | LowRank) for term in module.delta.terms)
    return own and terms and bool(module.delta.terms) and type(module.inner) is not nn.Embedding
