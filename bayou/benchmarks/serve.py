"""How fast many tenants decode over one base in our engine, against the memory's floor and against other ways.

`decode` (7B shapes): the base alone, and T tenants in one batch of 64 answers, each against its floor; all of a
workload at once against one tenant after another and against swapping merged models; memory by T. The tenants are one
delta at 1/16, read from a file as any, and copies of it at addresses of their own.

Times are the engine's, from the first token that all answers run to the first that ends: scheduling, sampling and
text are in them.
"""

import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bayou.benchmarks import record, stand_in
from bayou.benchmarks.kernels import BANDWIDTH
from bayou.benchmarks.pair import SHAPES, Shape
from bayou.checkpoint import Checkpoint
from bayou.errors import BadInput
from bayou.serving.engine import Engine, Piece, Settings
from bayou.serving.sampling import Sampling
from bayou.serving.tenant import Tenant

RATIO = 16.0
CARD = 80e9
"""Bytes of the GPU that the issue's memory line is about."""

FLOORS = {"llama-2-7b": (5.7e-3, 0.28e-3)}
"""Seconds of a decode step of the base and of each tenant more, without keys and values, that were agreed on."""


@dataclass(frozen=True)
class Size:
    """What is measured. batch: answers at once. tenants: numbers of them; memory: likewise. many: of the workload."""

    batch: int = 64
    tenants: tuple[int, ...] = (8, 32, 64)
    memory: tuple[int, ...] = (2, 4, 8, 16, 32, 50, 64)
    many: int = 32
    prompt: int = 127
    tokens: int = 128
    length: int = 256
    part: int = 4
    piece: int = 512

    @property
    def warm(self) -> int:
        """Tokens of a first go in which all answers run at once, however long their prompts take."""
        return 6 + self.batch * self.prompt // self.piece


QUICK = Size(tenants=(8, 32), memory=(2, 8, 32), tokens=48, part=2)
TINY = Size(batch=8, tenants=(2, 4), memory=(2, 4), many=4, prompt=8, tokens=12, length=64, part=2)


@dataclass(eq=False)
class Listener:
    """Hears one answer; seconds of each token since `began`."""

    began: float
    left: threading.Semaphore
    times: list[float] = field(default_factory=list)
    failed: BaseException | None = None

    def __call__(self, piece: Piece) -> None:
        """A piece came."""
        self.times += [time.perf_counter() - self.began] * len(piece.chosen)
        if piece.last:
            self.failed = piece.refused
            self.left.release()


def ask(engine: Engine, tenants: Sequence[Tenant], prompt: int, tokens: int, vocabulary: int) -> list[Listener]:
    """An answer of so many tokens from each of `tenants`, to random prompts, asked for at once; returns at the end."""
    left, g = threading.Semaphore(0), torch.Generator().manual_seed(len(tenants))
    began = time.perf_counter()
    listeners = [Listener(began, left) for _ in tenants]
    for tenant, listener in zip(tenants, listeners, strict=True):
        ids = torch.randint(3, vocabulary, (prompt,), generator=g).tolist()
        engine.submit(tenant, ids, Sampling(max_tokens=tokens, ignore_eos=True), listener)
    for _ in listeners:
        left.acquire()
    for listener in listeners:
        if listener.failed is not None:
            raise listener.failed
    return listeners


def steady(listeners: Sequence[Listener]) -> dict[str, float]:
    """Rate while all of them ran, and the median step."""
    start, stop = max(one.times[0] for one in listeners), min(one.times[-1] for one in listeners)
    inside = [sum(start < t <= stop for t in one.times) for one in listeners]
    late = max(listeners, key=lambda one: one.times[0])
    steps = [b - a for a, b in zip(late.times, late.times[1:], strict=False) if b <= stop]
    return {
        "tokens_a_second": sum(inside) / (stop - start),
        "step_ms": statistics.median(steps) * 1e3,
        "steps": len(steps),
        "wall_s": max(one.times[-1] for one in listeners),
    }


class Floor:
    """Seconds that a step takes at least. delta: bytes of a tenant's linears and head, all read at each step."""

    def __init__(self, shape_name: str, shape: Shape, delta: int) -> None:
        linears = shape.layers * sum(out * cols for out, cols in shape.linears().values())
        self.weights = 2 * (linears + shape.vocabulary * shape.hidden)
        self.position = 2 * 2 * shape.layers * (shape.linears()["self_attn.k_proj.weight"][0])
        agreed = FLOORS.get(shape_name)
        self.base, self.each = agreed or (self.weights / BANDWIDTH, delta / BANDWIDTH)

    def keys(self, rows: int, positions: float) -> float:
        """Of the keys and values of so many rows."""
        return rows * positions * self.position / BANDWIDTH

    def alone(self, rows: int, positions: float) -> float:
        """Of the base: its weights and the keys and values."""
        return self.weights / BANDWIDTH + self.keys(rows, positions)

    def together(self, tenants: int, rows: int, positions: float) -> float:
        """Of so many tenants."""
        return self.base + tenants * self.each + self.keys(rows, positions)


def decode(shape_name: str, size: Size, device: str, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """See this file's head."""
    shape = SHAPES[shape_name]
    base = stand_in.base(folder / "base", shape)
    stand_in.tokenizer(base.folder, shape.vocabulary)
    bytes_of_file = stand_in.delta_file(folder / "one.bayou", base, RATIO)
    say(f"a delta of {bytes_of_file:,} bytes is written")
    most = max(*size.tenants, *size.memory, size.many)
    wishes = {"tenants": most, "batch": size.batch, "length": size.length, "piece": size.piece}
    with opened(base, device, queue=4 * size.batch, **wishes) as engine:
        say("the base is in memory")
        return _decode(shape_name, size, engine, folder / "one.bayou", device, say) | {"file_bytes": bytes_of_file}


@contextmanager
def opened(base: Checkpoint, device: str, **settings: Any) -> Iterator[Engine]:
    """An engine with kernels over a made-up base with random numbers in it, in the dtype that the device serves in."""
    dtype = torch.bfloat16 if _gpu(device) else torch.float32
    whole = Settings(memory=10**12, dtype=dtype, device=device, kernels=True, **settings)
    engine = Engine(base.folder, "base", whole)
    try:
        stand_in.randomise(engine.model.base)
        record.finish(device)
        yield engine
    finally:
        engine.close()


def _decode(
    shape_name: str, size: Size, engine: Engine, file: Path, device: str, say: Callable[[str], None]
) -> dict[str, Any]:
    shape = SHAPES[shape_name]
    middle = size.prompt + size.tokens / 2 + 1
    first = engine.bank.register("t1", file)
    engine.load(first)
    assert first.on_device is not None
    floor = Floor(shape_name, shape, _read_each_step(first))
    tenants = [first]
    found: dict[str, Any] = {"shape": shape_name, "batch": size.batch, "prompt": size.prompt, "tokens": size.tokens}
    found |= {"ratio": RATIO, "tenants": [], "memory": [], "delta_bytes": first.on_device.nbytes}
    found["fixed_shape"] = engine.model.fixed

    def rate(who: list[Tenant]) -> dict[str, Any]:
        rows = [who[i % len(who)] for i in range(size.batch)]
        ask(engine, rows, size.prompt, size.warm, shape.vocabulary)  # compiles and captures
        found: dict[str, Any] = steady(ask(engine, rows, size.prompt, size.tokens, shape.vocabulary))
        if _gpu(device):
            found["launches"] = _launches(lambda: ask(engine, rows, size.prompt, size.warm, shape.vocabulary))
        return found

    alone = rate([engine.bank.base])
    least = floor.alone(size.batch, middle) * 1e3
    found["base"] = alone | {"floor_ms": least, "over_floor": alone["step_ms"] / least, "limit": 1.3}
    say(f"base: {alone['step_ms']:.2f} ms a step, {found['base']['over_floor']:.2f} floors")
    weights = engine.model.nbytes
    for count in sorted({*size.tenants, *size.memory, size.many}):
        while len(tenants) < count:
            resident = replace(first.on_device.copy(), slot=len(tenants) + 1)
            engine.model.router.install(resident)
            tenants.append(Tenant(f"t{resident.slot}", None, first.voice, on_device=resident))
        if count in size.memory:
            found["memory"].append(_memory(count, engine, weights, first.on_device.nbytes, device))
        if count in size.tenants:
            row: dict[str, Any] = {"tenants": count, **rate(tenants)}
            row["floor_ms"] = floor.together(count, size.batch, middle) * 1e3
            row |= {"of_floor": row["floor_ms"] / row["step_ms"], "limit": 0.5}
            row["of_base"] = row["tokens_a_second"] / alone["tokens_a_second"]
            found["tenants"].append(row)
            say(f"T = {count}: {row['step_ms']:.2f} ms a step, {row['of_floor']:.2f} of the floor's rate")
        if count == size.many:
            other = found["others"] = _others(size, engine, tenants[: size.many], shape.vocabulary, device)
            say("{times_one:.1f} times one by one, {times_swap:.1f} times swapping".format(**other))
    return found


def _launches(run: Callable[[], Any], most: int = 16) -> list[dict[str, Any]]:
    """What the device did in `run`, prefill too: the kernels that took longest, their number, microseconds of each."""
    activity = torch.profiler.ProfilerActivity.CUDA
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a profiler that sees no CPU
        try:
            with torch.profiler.profile(activities=[activity]) as profiler:
                run()
            events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
        except RuntimeError as error:  # a device may forbid it
            return [{"failed": str(error)[:200]}]
    return [
        {"kernel": e.key[:120], "count": e.count, "us": e.self_device_time_total / max(1, e.count)}
        for e in events[:most]
    ]


def _others(size: Size, engine: Engine, tenants: list[Tenant], vocabulary: int, device: str) -> dict[str, Any]:
    """The same workload, batch / T answers a tenant, in three ways; of the slower two a part is done, and scaled."""
    each = max(1, size.batch // len(tenants))

    def run(who: Sequence[Tenant]) -> float:
        ask(engine, who, size.prompt, size.warm, vocabulary)
        return steady(ask(engine, who, size.prompt, size.tokens, vocabulary))["wall_s"]

    ours = run([tenant for tenant in tenants for _ in range(each)])
    one_by_one = sum(run([tenant] * each) for tenant in tenants[: size.part]) * len(tenants) / size.part
    merged = run([engine.bank.base] * each)  # a merged model decodes as the base does
    swap, share = _swap(engine.model.nbytes, device)
    swapping = (merged + swap) * len(tenants)
    return {
        "tenants": len(tenants),
        "answers_a_tenant": each,
        "ours_s": ours,
        "one_by_one_s": one_by_one,
        "times_one": one_by_one / ours,
        "limit_one": 5,
        "swapping_s": swapping,
        "times_swap": swapping / ours,
        "limit_swap": 8,
        "swap_s": swap,
        "done": f"one by one: {size.part} of {len(tenants)} tenants; swapping: {share:.3f} of one swap, and one merged "
        "model's answers; the rest is scaled",
    }


def _swap(weights: int, device: str) -> tuple[float, float]:
    """Seconds to bring so many bytes to the device out of one pinned buffer, ready in it, and the share that was done.

    Filling the buffer is not counted, so a real swap takes longer.
    """
    nbytes = min(weights, 2**30)
    buffer = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=_gpu(device))
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    times = []
    for _ in range(3):
        record.finish(device)
        began = time.perf_counter()
        target.copy_(buffer, non_blocking=True)
        record.finish(device)
        times.append(time.perf_counter() - began)
    return min(times) * weights / nbytes, nbytes / weights


def _memory(count: int, engine: Engine, weights: int, delta: int, device: str) -> dict[str, Any]:
    """Bytes on the device with so many tenants, and with as many models of their own."""
    keys = engine.model.slots.nbytes
    used = torch.cuda.memory_allocated(device) if _gpu(device) else weights + count * delta + keys
    separate = count * weights + keys
    return {
        "tenants": count,
        "bytes": used,
        "kv_bytes": keys,
        "separate_bytes": separate,
        "fits": used <= CARD,
        "separate_fits": separate <= CARD,
        "measured": _gpu(device),
    }


def _read_each_step(tenant: Tenant) -> int:
    """Bytes of the deltas of linears and the head; of an embedding a few rows are read only."""
    assert tenant.on_device is not None
    total = 0
    for module in tenant.on_device.modules.values():
        delta: Any = getattr(module, "delta", None)
        if delta is not None and not isinstance(module.inner, torch.nn.Embedding):
            total += sum(factor.nbytes for term in delta.terms for factor in term.factors())
    return total


def _gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def run(*, shape: str | None = None, part: str = "all", quick: bool = False, device: str = "cuda") -> dict[str, Any]:
    """Measure "decode", "traffic" (see traffic.py) or "all".

    shape: of both parts; llama-2-7b and llama-3.2-1b unless given. Raises BadInput for what is not to be had.
    """
    from bayou.benchmarks import traffic

    if part not in ("all", "decode", "traffic") or (shape is not None and shape not in SHAPES):
        raise BadInput(f"part {part!r} of shape {shape!r}: all, decode or traffic; a shape of {', '.join(SHAPES)}")
    began = time.monotonic()

    def say(step: str) -> None:
        print(f"[{time.monotonic() - began:5.1f} s] {step}", file=sys.stderr, flush=True)

    tiny = shape == "tiny"
    found: dict[str, Any] = {"benchmark": "serve", "quick": quick}
    size = TINY if tiny else QUICK if quick else Size()
    load = traffic.TINY if tiny else traffic.QUICK if quick else traffic.Load()
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "decode": lambda at: decode(shape or "llama-2-7b", size, device, at, say),
        "traffic": lambda at: traffic.measure(shape or "llama-3.2-1b", load, device, at, say),
    }
    for name, measure in parts.items():
        if part in (name, "all"):
            with tempfile.TemporaryDirectory() as folder, stand_in.cache(Path(folder) / "cache"):
                start = time.monotonic()
                found[name] = measure(Path(folder))
                found[name]["seconds"] = time.monotonic() - start
    return found | record.surroundings(device)


def table(found: dict[str, Any]) -> str:
    """The figures for a reader."""
    lines = []
    if "decode" in found:
        one = found["decode"]
        lines.append(f"{one['shape']}, {one['batch']} answers at once, {found.get('gpu', found['device'])}")
        lines.append(
            f"  base alone: {one['base']['step_ms']:.2f} ms a step, {one['base']['over_floor']:.2f} times its floor"
        )
        for row in one["tenants"]:
            lines.append(
                f"  {row['tenants']:3} tenants: {row['step_ms']:.2f} ms a step, {row['of_floor']:.2f} of the floor's "
                f"rate, {row['of_base']:.2f} of the base's"
            )
        other = one["others"]
        lines.append(
            f"  {other['tenants']} tenants' answers: {other['ours_s']:.2f} s; one tenant after another "
            f"{other['one_by_one_s']:.1f} s ({other['times_one']:.1f} times), swapping {other['swapping_s']:.1f} s "
            f"({other['times_swap']:.1f} times)"
        )
        for row in one["memory"]:
            lines.append(
                f"  {row['tenants']:3} tenants: {row['bytes'] / 1e9:.2f} GB; models of their own "
                f"{row['separate_bytes'] / 1e9:.1f} GB"
            )
    if "traffic" in found:
        from bayou.benchmarks import traffic

        lines.append(traffic.table(found["traffic"]))
    return "\n".join(lines)
