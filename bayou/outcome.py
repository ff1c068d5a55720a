"""What came of a compression, as compress returns it and the command line prints it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bayou.plan import SiteRecord


@dataclass(frozen=True)
class Report:
    """What came of a compression. ratio: bytes of the fine-tune's weight files over bytes of the file.

    steps: seconds of each step. errors: relative Frobenius error of the delta by role, over all sites of it.
    distilled: what distilling came to, see distillation.training.Outcome; empty where there was none.
    kl, trials: of `smallest` (--max-kl): the file's KL on held-back text, and each (ratio, KL) that was tried.
    """

    path: str
    method: str
    bytes: int
    ratio: float
    sites: int
    exact: int
    unchanged: int
    seconds: float
    steps: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    distilled: dict[str, Any] = field(default_factory=dict)
    kl: float | None = None
    trials: list[tuple[float, float | None]] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


def errors_by_role(sites: Sequence[SiteRecord], errors: Mapping[int, float]) -> dict[str, float]:
    """Root mean square of the sites' errors (by index) over the sites of each role, weighted by their weights."""
    sums: dict[str, list[float]] = {}
    for index, site in enumerate(sites):
        if site.method:
            total = sums.setdefault(site.role, [0.0, 0.0])
            weights = site.shape[0] * site.shape[1]
            total[0] += weights * errors[index] ** 2
            total[1] += weights
    return {role: (total / count) ** 0.5 for role, (total, count) in sums.items()}
