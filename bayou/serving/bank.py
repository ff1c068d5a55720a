"""Which deltas are in memory: on the device, beside it in the CPU's (page-locked) memory, or only in their files.

A request has a Ticket for its tenant from its coming to its end. While it waits, the ticket makes the tenant be loaded;
once it runs, the ticket holds the tenant there. A tenant that nobody holds may be put out when another one needs the
room, the longest unused one first, but never one that an older ticket waits for: so whoever has waited longest is next.
One thread loads, verifying every byte that it reads, while the engine's thread goes on with whoever is there. A tenant
is there in one step, after all of it was read and found sound: a damaged file fails its own requests only.

On the CPU there is one memory, so a tenant that is put out is in its file only.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bayou.deltafile import DeltaFile
from bayou.errors import BayouError, Unsupported
from bayou.serving.refusals import Refused, refusal
from bayou.serving.resident import Resident, check_config, read
from bayou.serving.router import Router
from bayou.serving.tenant import CheckedOnce, Tenant, Ticket, taken
from bayou.serving.voice import Voices


@dataclass(frozen=True)
class Load:
    """One tenant coming to the device. source: "disk" or "host"."""

    tenant: str
    source: str
    seconds: float
    nbytes: int


class Bank:
    """The tenants over one base.

    Args:
        folder: of the base.
        name: the base's as a tenant.
        model: the base in memory, as it is.
        router: of the tree that serves.
        limit: bytes of deltas on the device at most.
        host: bytes of deltas kept beside it in page-locked memory; a device that is the CPU has none.
        lines: of the router's tables: the base and at most lines - 1 tenants on the device.
        unpack: hold factors as fp32 numbers.
        changed: called when something has become ready, failed or gone; from any thread.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        model: PreTrainedModel,
        router: Router,
        *,
        limit: int,
        host: int,
        lines: int,
        unpack: bool = False,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._checkpoint = CheckedOnce(folder)
        self.base_bytes = self._checkpoint.nbytes  # on disk
        self._config = self._checkpoint.config
        self._model, self._router, self._changed = model, router, changed
        self.device = model.get_input_embeddings().weight.device
        self._unpack = unpack
        self._limit, self._host_limit = limit, host if self.device.type == "cuda" else 0
        self._voices = Voices(folder)
        self.base = Tenant(name, None, self._voices.base)
        self._tenants: dict[str, Tenant] = {}
        self._free = list(range(lines - 1, 0, -1))
        self._used: OrderedDict[Tenant, None] = OrderedDict()  # on the device, the longest unused first
        self._kept: OrderedDict[Tenant, None] = OrderedDict()  # on the host, likewise
        self._waiting: OrderedDict[Ticket, None] = OrderedDict()  # the oldest first
        self._lock = threading.Condition()
        self._closed = False
        self._short_since: float | None = None
        self.loads: list[Load] = []
        self.on_load: Callable[[Load], None] = self.loads.append
        self.evictions = 0
        self._thread = threading.Thread(target=self._run, name="bayou-loader", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------------ who there is

    def names(self) -> list[str]:
        """The tenants' names, without the base's."""
        with self._lock:
            return sorted(self._tenants)

    def find(self, name: str) -> Tenant | None:
        """The tenant of this name, the base too."""
        with self._lock:
            return self.base if name == self.base.name else self._tenants.get(name)

    def register(self, name: str, path: Path) -> Tenant:
        """Let a file be asked for by `name`. It is opened and compared with the base, and not loaded yet.

        Raises BadInput where the name is taken, WrongBase, BadFile, DamagedFile, Unsupported.
        """
        if self.find(name) is not None:
            raise taken(name)
        tenant = self.open(name, path)
        self.enter(tenant)
        return tenant

    def open(self, name: str, path: Path) -> Tenant:
        """A tenant that tickets can be had for, and that nobody can ask for by its name yet. Raises as `register`."""
        file = DeltaFile(path)
        if file.self_contained:
            raise Unsupported(f"{path} leans on no base, so it is not served over one; use bayou.load")
        file.check_base(self._checkpoint)
        check_config(self._config, file.fine_tune_config(self._checkpoint.folder), path)
        files = {small: file.read_file(small, self._checkpoint.folder) for small in file.files}
        tenant = Tenant(name, file, self._voices.of(files, path))
        _ = tenant.fidelity  # read by now, so that no other thread reads the file beside the loading one
        return tenant

    def enter(self, tenant: Tenant, *, replacing: bool = False) -> None:
        """Let a tenant be asked for by its name. Raises BadInput where that is taken, unless by one to be replaced."""
        with self._lock:
            old = self._tenants.get(tenant.name)
            if tenant.name == self.base.name or (old is not None and not replacing):
                raise taken(tenant.name)
            self._tenants[tenant.name] = tenant
            if old is not None:
                self._leave(old)

    def unregister(self, name: str) -> bool:
        """Let a tenant be asked for no longer; whether there was one. Requests that hold tickets run to their end."""
        with self._lock:
            tenant = self._tenants.pop(name, None)
            if tenant is not None:
                self._leave(tenant)
            return tenant is not None

    def told(self, error: BayouError, name: str, path: Path) -> Refused:
        """An error of the file of a tenant, as clients are told it."""
        return refusal(error, (path, name), (self._checkpoint.folder, self.base.name))

    def forget(self, tenant: Tenant) -> None:
        """Let go of a tenant that was opened and not entered."""
        with self._lock:
            self._leave(tenant)

    def _leave(self, tenant: Tenant) -> None:
        tenant.gone = True
        self._drop_host(tenant)
        self._drop_if_over(tenant)
        self._lock.notify_all()

    def _drop_if_over(self, tenant: Tenant) -> None:
        if tenant.gone and not tenant.held and not any(ticket.tenant is tenant for ticket in self._waiting):
            self._drop_device(tenant)

    # ------------------------------------------------------------------------------------------------ tickets

    def ticket(self, tenant: Tenant) -> Ticket:
        """A claim to a tenant, which is loaded if it is not there. To be given back in any case."""
        ticket = Ticket(tenant)
        with self._lock:
            self._waiting[ticket] = None
            self._lock.notify_all()
        return ticket

    def hold(self, ticket: Ticket) -> bool:
        """Keep a ticket's tenant on the device until it is given back; False if it is not there (any longer)."""
        with self._lock:
            if not ticket.ready:
                return False
            del self._waiting[ticket]
            ticket.state = "holding"
            ticket.tenant.held += 1
            if ticket.tenant in self._used:
                self._used.move_to_end(ticket.tenant)
            return True

    def give_back(self, ticket: Ticket) -> None:
        """End a claim."""
        with self._lock:
            self._waiting.pop(ticket, None)
            ticket.tenant.held -= ticket.state == "holding"
            ticket.state = "over"
            self._drop_if_over(ticket.tenant)
            self._lock.notify_all()

    @property
    def short_of_room(self) -> float:
        """Seconds since a tenant has been waiting until others' requests end, 0 if none is."""
        since = self._short_since
        return 0.0 if since is None else time.monotonic() - since

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of all deltas on the device and on the host."""
        with self._lock:
            return {"device": self._device_bytes(), "host": self._host_bytes()}

    def places(self) -> dict[str, dict[str, int]]:
        """Bytes by tenant and memory."""
        with self._lock:
            found: dict[str, dict[str, int]] = {}
            for tenant in self._used:
                found.setdefault(tenant.name, {})["device"] = self._size(tenant.on_device)
            for tenant in self._kept:
                found.setdefault(tenant.name, {})["host"] = self._size(tenant.on_host)
            return found

    def close(self) -> None:
        """End the loading thread."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._thread.join()

    # ------------------------------------------------------------------------------------------------ memory

    @staticmethod
    def _size(resident: Resident | None) -> int:
        return 0 if resident is None else resident.nbytes

    def _device_bytes(self) -> int:
        return sum(self._size(tenant.on_device) for tenant in self._used)

    def _host_bytes(self) -> int:
        return sum(self._size(tenant.on_host) for tenant in self._kept)

    def _drop_device(self, tenant: Tenant) -> None:
        if tenant.on_device is not None:
            self._router.clear(tenant.on_device.slot)
            self._free.append(tenant.on_device.slot)
            tenant.on_device = None
            del self._used[tenant]

    def _drop_host(self, tenant: Tenant) -> None:
        tenant.on_host = None
        self._kept.pop(tenant, None)

    def _make_room(self, nbytes: int, asking: Ticket) -> bool:
        """Put tenants out until there is room for so many bytes and a line; whether there is."""
        while not self._free or self._device_bytes() + nbytes > self._limit:
            older = set()
            for ticket in self._waiting:
                if ticket is asking:
                    break
                older.add(ticket.tenant)
            idle = next((tenant for tenant in self._used if not tenant.held and tenant not in older), None)
            if idle is None:
                return False
            self._drop_device(idle)
            self.evictions += 1
        return True

    def _keep_on_host(self, tenant: Tenant, resident: Resident) -> None:
        if resident.nbytes > self._host_limit or tenant.gone:
            return
        while self._host_bytes() + resident.nbytes > self._host_limit:
            self._drop_host(next(iter(self._kept)))
        tenant.on_host = resident
        self._kept[tenant] = None

    # ------------------------------------------------------------------------------------------------ loading

    def _next(self) -> Ticket | None:
        """The oldest ticket whose tenant is not there."""
        return next((ticket for ticket in self._waiting if not ticket.ready), None)

    def _run(self) -> None:
        while True:
            with self._lock:
                while (asking := self._next()) is None and not self._closed:
                    self._lock.wait()
                if self._closed or asking is None:
                    return
            tenant = asking.tenant
            try:
                self._load(tenant, asking)
                error: Refused | None = None
            except BayouError as known:
                assert tenant.file is not None
                error = self.told(known, tenant.name, tenant.file.path)
            except Exception as unknown:  # a tenant's trouble, out of memory too, must not end the loading of others
                error = Refused(f"the model {tenant.name!r} cannot be loaded: {unknown!s:.300}", 503, "load_failed")
            with self._lock:
                if error is not None:
                    for ticket in [ticket for ticket in self._waiting if ticket.tenant is tenant]:
                        ticket.error = error
                        del self._waiting[ticket]
            self._changed()

    def _load(self, tenant: Tenant, asking: Ticket) -> None:
        """Bring a tenant to the device, waiting for room. Does nothing where nobody waits for it any longer."""
        started = time.perf_counter()
        source = "disk" if tenant.on_host is None else "host"
        host = tenant.on_host
        if host is None:
            assert tenant.file is not None  # the base is always there
            host = read(self._model, tenant.file, {path: routed.inner for path, routed in self._router.modules.items()})
            if self._unpack:
                host = host.unpacked()
            if self.device.type == "cuda":
                host = host.pinned()
        nbytes = host.nbytes
        if nbytes > self._limit:
            raise Refused(
                f"the model {tenant.name!r} takes {nbytes:,} bytes, more than all of --memory ({self._limit:,})",
                422,
                "too_large",
            )
        spent = time.perf_counter() - started
        with self._lock:
            try:
                while not self._make_room(nbytes, asking):
                    self._short_since = self._short_since or time.monotonic()
                    self._lock.wait()
                    if self._closed or asking not in self._waiting:
                        return
            finally:
                self._short_since = None
            line = self._free.pop()
        started = time.perf_counter()
        try:
            resident = replace(self._placed(host), slot=line)
            self._install(resident)
        except BaseException:
            with self._lock:
                self._free.append(line)
            raise
        with self._lock:
            tenant.on_device = resident
            self._used[tenant] = None
            if source == "host":
                if tenant in self._kept:
                    self._kept.move_to_end(tenant)
            elif self._host_limit:
                self._keep_on_host(tenant, host)
            self._drop_if_over(tenant)
        self.on_load(Load(tenant.name, source, spent + time.perf_counter() - started, nbytes))

    def _placed(self, host: Resident) -> Resident:
        if self.device.type != "cuda":
            return host
        # A stream of its own, so that steps that run meanwhile are not waited for.
        with torch.cuda.stream(self._stream()):
            placed = host.to(self.device)
            torch.cuda.current_stream().synchronize()
        return placed

    def _install(self, resident: Resident) -> None:
        if self.device.type != "cuda":
            self._router.install(resident)
            return
        with torch.cuda.stream(self._stream()):
            self._router.install(resident)
            torch.cuda.current_stream().synchronize()

    def _stream(self) -> torch.cuda.Stream:
        if not hasattr(self, "_own_stream"):
            self._own_stream = torch.cuda.Stream(self.device)
        return self._own_stream
