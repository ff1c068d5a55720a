"""Requests that come as they do, for more tenants than the device holds: waiting times, and stalls while tenants load.

Arrivals are a Poisson process; which tenant a request is for follows Zipf's law; prompts and answers vary in length.
The files of the tenants are a few different ones under many names, in the page cache. Tenants that are not on the
device come from page-locked memory or from their file, every byte verified.
"""

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayou.benchmarks import stand_in
from bayou.benchmarks.pair import SHAPES
from bayou.benchmarks.serve import RATIO, Listener, ask, opened
from bayou.serving.engine import Engine
from bayou.serving.sampling import Sampling
from bayou.serving.tenant import Tenant


@dataclass(frozen=True)
class Load:
    """tenants on disk, under as many names for `files` files; `resident` on the device, `kept` beside it.

    rate: requests a second, for `seconds`. prompt, tokens: the least and the most of each. streams: answers that run
    while `loads` tenants load. limit_ms: what none of them may wait.
    """

    tenants: int = 200
    files: int = 4
    resident: int = 40
    kept: int = 60
    batch: int = 64
    rate: float = 16.0
    seconds: float = 40.0
    zipf: float = 1.5
    prompt: tuple[int, int] = (32, 192)
    tokens: tuple[int, int] = (16, 96)
    streams: int = 32
    loads: int = 8
    length: int = 1024
    limit_ms: float = 200.0


QUICK = Load(seconds=15.0, tenants=80)
TINY = Load(
    tenants=10, files=2, resident=4, kept=3, batch=8, rate=30.0, seconds=1.0, prompt=(4, 12), tokens=(3, 8), streams=3,
    loads=2, length=40,
)  # fmt: skip


def measure(shape_name: str, load: Load, device: str, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Files, engine, waiting times, stalls."""
    shape = SHAPES[shape_name]
    base = stand_in.base(folder / "base", shape)
    stand_in.tokenizer(base.folder, shape.vocabulary)
    made = [folder / f"{i}.bayou" for i in range(load.files)]
    size = [stand_in.delta_file(path, base, RATIO, seed) for seed, path in enumerate(made)][0]
    say(f"{load.files} deltas of {size:,} bytes are written")
    wishes = {"tenants": load.resident, "batch": load.batch, "length": load.length, "queue": 100_000}
    with opened(base, device, host_memory=load.kept * size, **wishes) as engine:
        tenants = [engine.bank.register(f"t{i}", made[i % len(made)]) for i in range(load.tenants)]
        say(f"{len(tenants)} tenants are known")
        _warm(engine, tenants[: load.resident], load, shape.vocabulary)
        say("warm")
        found: dict[str, Any] = {"shape": shape_name, "load": load.__dict__, "file_bytes": size}
        found |= {"fixed_shape": engine.model.fixed, "arrivals": _arrivals(engine, tenants, load, shape.vocabulary)}
        say("arrivals: TTFT {ttft_ms[p50]:.0f} / {ttft_ms[p99]:.0f} ms".format(**found["arrivals"]))
        found["stalls"] = _stalls(engine, tenants, load, shape.vocabulary)
        say("longest stall {longest_ms:.0f} ms while {loads} tenants loaded".format(**found["stalls"]))
        return found


def _warm(engine: Engine, tenants: Sequence[Tenant], load: Load, vocabulary: int) -> None:
    """Compile and capture: every number of rows, of one tenant and of as many as there are."""
    rows = 1
    while rows <= load.batch:
        for who in ([tenants[0]] * rows, [tenants[i % len(tenants)] for i in range(rows)]):
            ask(engine, who, load.prompt[0], 6 + rows * load.prompt[0] // engine.settings.piece, vocabulary)
        rows *= 2
    ask(engine, [engine.bank.base] * load.batch, load.prompt[0], 8, vocabulary)


def _arrivals(engine: Engine, tenants: Sequence[Tenant], load: Load, vocabulary: int) -> dict[str, Any]:
    chance = random.Random(0)
    order = list(tenants)
    chance.shuffle(order)  # the popular ones are not those that were loaded last
    weights = [(i + 1) ** -load.zipf for i in range(len(order))]
    left = threading.Semaphore(0)
    asked: list[tuple[bool, Listener]] = []
    evictions, loads = engine.bank.evictions, len(engine.bank.loads)
    began = due = time.perf_counter()
    while due < began + load.seconds:
        time.sleep(max(0.0, due - time.perf_counter()))
        (tenant,) = chance.choices(order, weights)
        prompt = [chance.randrange(3, vocabulary) for _ in range(chance.randint(*load.prompt))]
        listener = Listener(time.perf_counter(), left)
        asked.append((tenant.on_device is not None, listener))
        sampling = Sampling(max_tokens=chance.randint(*load.tokens), ignore_eos=True)
        engine.submit(tenant, prompt, sampling, listener)
        due += chance.expovariate(load.rate)
    for _ in asked:
        left.acquire()
    wall = time.perf_counter() - began
    for _, listener in asked:
        if listener.failed is not None:
            raise listener.failed
    every = [one.times for _, one in asked]
    return {
        "requests": len(asked),
        "wall_s": wall,
        "tokens_a_second": sum(map(len, every)) / wall,
        "ttft_ms": percentiles([times[0] for times in every]),
        "ttft_resident_ms": percentiles([one.times[0] for there, one in asked if there]),
        "ttft_loaded_ms": percentiles([one.times[0] for there, one in asked if not there]),
        "tpot_ms": percentiles([(times[-1] - times[0]) / (len(times) - 1) for times in every]),
        "loads": len(engine.bank.loads) - loads,
        "evictions": engine.bank.evictions - evictions,
        "load_s": _loads(engine, loads),
    }


def _loads(engine: Engine, since: int) -> dict[str, dict[str, float]]:
    """Seconds of the loads since, by where from."""
    found: dict[str, list[float]] = {}
    for load in engine.bank.loads[since:]:
        found.setdefault(load.source, []).append(load.seconds)
    return {source: {"count": len(seconds), **percentiles(seconds, 1.0)} for source, seconds in found.items()}


def percentiles(seconds: Sequence[float], times: float = 1e3) -> dict[str, float]:
    """{"p50", "p99"} by the nearest rank, in milliseconds unless told otherwise; empty of nothing."""
    ordered = sorted(seconds)
    return {
        f"p{share}": ordered[min(len(ordered) - 1, len(ordered) * share // 100)] * times
        for share in (50, 99)
        if ordered
    }


def _stalls(engine: Engine, tenants: Sequence[Tenant], load: Load, vocabulary: int) -> dict[str, Any]:
    """The longest time between two tokens of an answer, without loads and with."""
    there = [tenant for tenant in tenants if tenant.on_device is not None]
    running = [there[i % max(1, len(there) - load.loads)] for i in range(load.streams)]
    tokens = load.length - load.prompt[0] - 1
    found: dict[str, Any] = {"streams": load.streams, "limit_ms": load.limit_ms}
    for key, loads in (("quiet_ms", 0), ("longest_ms", load.loads)):
        done = threading.Event()
        since = len(engine.bank.loads)

        def bring(count: int, done: threading.Event = done) -> None:
            absent = [tenant for tenant in tenants if tenant.on_device is None][:count]
            for tenant in absent:
                if not done.is_set():
                    engine.load(tenant)

        loader = threading.Thread(target=bring, args=(loads,))
        left, began = threading.Semaphore(0), time.perf_counter()
        listeners = [Listener(began, left) for _ in running]
        g = random.Random(1)
        for tenant, listener in zip(running, listeners, strict=True):
            prompt = [g.randrange(3, vocabulary) for _ in range(load.prompt[0])]
            engine.submit(tenant, prompt, Sampling(max_tokens=tokens, ignore_eos=True), listener)
        while not all(listener.times for listener in listeners):
            time.sleep(0.001)
        loader.start()
        for _ in listeners:
            left.acquire()
        done.set()
        loader.join()
        start = max(listener.times[0] for listener in listeners)
        gaps = [b - a for one in listeners for a, b in zip(one.times, one.times[1:], strict=False) if a >= start]
        found[key] = max(gaps) * 1e3
        found["loads"] = len(engine.bank.loads) - since
    return found


def table(found: dict[str, Any]) -> str:
    """The figures for a reader."""
    one, load = found["arrivals"], found["load"]

    def pair(key: str) -> str:
        return " / ".join(f"{value:.1f}" for value in one[key].values()) or "none"

    stalls = found["stalls"]
    return "\n".join(
        [
            f"{found['shape']}, {load['tenants']} tenants on disk, {load['resident']} resident, {load['rate']:g} "
            f"requests a second for {load['seconds']:g} s, zipf {load['zipf']:g}; p50 / p99 in ms",
            f"  first token {pair('ttft_ms')} (tenant there: {pair('ttft_resident_ms')}, to be loaded: "
            f"{pair('ttft_loaded_ms')}); each token after {pair('tpot_ms')}",
            f"  {one['loads']} loads, {one['tokens_a_second']:.0f} tokens a second",
            f"  {stalls['streams']} streams: longest wait for a token {stalls['quiet_ms']:.1f} ms, "
            f"{stalls['longest_ms']:.1f} ms while {stalls['loads']} tenants were loaded",
        ]
    )
