"""bayou bench serve, on the tiny shape: the figures are there, and are of what they say."""

import json
import threading
from typing import Any

import pytest

from bayou.benchmarks import serve, traffic
from bayou.benchmarks.pair import SHAPES
from bayou.cli import main
from bayou.errors import BadInput


def listener(times: list[float]) -> serve.Listener:
    return serve.Listener(0.0, threading.Semaphore(0), times)


def test_the_rate_is_that_of_the_time_in_which_all_ran() -> None:
    early, late = [1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 3.5, 4.0, 4.5, 5.0, 5.5]
    found = serve.steady([listener(early), listener(late)])
    assert found == {"tokens_a_second": (2 + 4) / 2, "step_ms": 500, "steps": 4, "wall_s": 5.5}


def test_percentiles_are_values_that_occurred() -> None:
    assert traffic.percentiles([0.3, 0.1, 0.2]) == {"p50": 200, "p99": 300}
    assert traffic.percentiles([float(i) for i in range(1000)], 1) == {"p50": 500, "p99": 990}
    assert traffic.percentiles([]) == {}


def test_the_floors_are_those_of_the_issue() -> None:
    floor = serve.Floor("llama-2-7b", SHAPES["llama-2-7b"], 0)
    assert floor.position == 2 * 2 * 32 * 4096
    assert floor.alone(64, 0) == pytest.approx(2 * (6_738_415_616 - 32000 * 4096) / 3e12, rel=1e-3)
    assert floor.together(32, 64, 0) == pytest.approx(5.7e-3 + 32 * 0.28e-3)
    assert floor.alone(64, 128) - floor.alone(64, 0) == pytest.approx(64 * 128 * 524288 / 3e12)
    small = serve.Floor("llama-3.2-1b", SHAPES["llama-3.2-1b"], 3 * 10**9)
    assert small.position == 2 * 2 * 16 * 512 and small.each == pytest.approx(1e-3)


@pytest.mark.slow
def test_decode_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "serve", "--shape", "tiny", "--part", "decode", "--device", "cpu", "--quick", "--json"])
    assert stop.value.code == 0
    out = capsys.readouterr().out.splitlines()
    found: dict[str, Any] = json.loads(out[-1])
    one = found["decode"]
    assert one["fixed_shape"] and "traffic" not in found and found["device"] == "cpu"
    assert [row["tenants"] for row in one["tenants"]] == [2, 4]
    for row in one["tenants"]:
        assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["step_ms"])
        assert 0 < row["of_base"] < 1 and row["steps"] >= 5
    weights = 2 * 2 * sum(size[0] * (size[1] if len(size) > 1 else 1) for _, size in SHAPES["tiny"].tensors(4))
    two, four = one["memory"]
    assert two["separate_bytes"] - two["kv_bytes"] == 2 * weights, "fp32 on the CPU"
    assert four["bytes"] - two["bytes"] == 2 * one["delta_bytes"]
    assert one["others"]["answers_a_tenant"] == 2 and "one by one: 2 of 4 tenants" in one["others"]["done"]
    assert any("4 tenants' answers" in line for line in out)


@pytest.mark.slow
def test_traffic_is_measured() -> None:
    found = serve.run(shape="tiny", part="traffic", device="cpu")["traffic"]
    arrivals, load = found["arrivals"], traffic.TINY
    assert arrivals["requests"] > load.rate * load.seconds / 3
    assert arrivals["loads"] == sum(source["count"] for source in arrivals["load_s"].values()) > 0
    assert arrivals["evictions"] >= arrivals["loads"] - load.resident
    assert arrivals["ttft_loaded_ms"]["p50"] >= arrivals["load_s"]["disk"]["p50"] * 500
    for key in ("ttft_ms", "tpot_ms"):
        assert 0 < arrivals[key]["p50"] <= arrivals[key]["p99"]
    assert found["stalls"]["loads"] == load.loads and found["stalls"]["longest_ms"] > 0
    assert "longest wait" in traffic.table(found)


@pytest.mark.parametrize("options", [{"part": "prefill"}, {"shape": "llama-9"}])
def test_what_cannot_be_measured_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        serve.run(**options)
