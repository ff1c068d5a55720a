"""A model that can be asked for, and a request's claim to it."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from bayou.checkpoint import Checkpoint
from bayou.deltafile import DeltaFile
from bayou.errors import BadInput
from bayou.serving.refusals import Refused
from bayou.serving.resident import Resident
from bayou.serving.voice import Voice


@dataclass(eq=False)
class Tenant:
    """A fine-tune that can be asked for, or the base (file None)."""

    name: str
    file: DeltaFile | None
    voice: Voice
    created: int = field(default_factory=lambda: int(time.time()))
    on_device: Resident | None = None
    on_host: Resident | None = None
    held: int = 0
    gone: bool = False

    @cached_property
    def fidelity(self) -> dict[str, float]:
        """Relative Frobenius errors of the deltas, measured when the file was made: their mean and their largest."""
        errors = [] if self.file is None else list(self.file.errors().values())
        return {"mean_error": sum(errors) / len(errors), "largest_error": max(errors)} if errors else {}

    @property
    def root(self) -> str:
        """What identifies the file's content; "" for the base."""
        return "" if self.file is None else self.file.root


@dataclass(eq=False)
class Ticket:
    """A request's claim to its tenant. `error` is set where it cannot be loaded."""

    tenant: Tenant
    error: Refused | None = None
    state: str = "waiting"  # then "holding", "over"

    @property
    def ready(self) -> bool:
        """Whether the tenant is on the device at this moment."""
        return self.tenant.file is None or self.tenant.on_device is not None

    @property
    def resident(self) -> Resident | None:
        """What the tenant has otherwise than the base, None for the base."""
        return self.tenant.on_device


class CheckedOnce(Checkpoint):
    """The base, each of whose tensors is hashed at most once while we run."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._known: dict[str, bytes] = {}

    def fingerprints(self, names: Iterable[str], *, rehash: bool = False) -> dict[str, bytes]:
        """As a Checkpoint's."""
        wanted = list(names)
        missing = [name for name in wanted if rehash or name not in self._known]
        if missing:
            self._known |= super().fingerprints(missing, rehash=rehash)
        return {name: self._known[name] for name in wanted}


def taken(name: str) -> BadInput:
    """The error for a name that a tenant has."""
    return BadInput(f"the model {name!r} is loaded already; unload it first")
