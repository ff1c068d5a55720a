"""clock.py: each second is counted once, under the innermost step."""

from types import SimpleNamespace

import pytest

from bayou import clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only the test moves: now[0] seconds."""
    time = [100.0]
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: time[0]))
    return time


def test_a_step_counts_its_own_time_and_not_that_of_the_steps_inside(now: list[float]) -> None:
    with clock.measuring() as seconds:
        with clock.step("outer"):
            now[0] += 1
            with clock.step("inner"):
                now[0] += 2
                with clock.step("innermost"):
                    now[0] += 4
            now[0] += 8
            with clock.step("inner"):
                now[0] += 16
        now[0] += 32
    assert seconds == {"outer": 9, "inner": 18, "innermost": 4}


def test_a_step_inside_one_of_the_same_name_is_not_counted_twice(now: list[float]) -> None:
    with clock.measuring() as seconds, clock.step("a"):
        now[0] += 1
        with clock.step("a"):
            now[0] += 2
    assert seconds == {"a": 3}


def test_seconds_are_there_as_soon_as_a_step_ends(now: list[float]) -> None:
    with clock.measuring() as seconds:
        with clock.step("a"):
            now[0] += 1
            assert seconds == {}
        assert seconds == {"a": 1}


def test_a_step_that_fails_is_counted_and_its_error_passes(now: list[float]) -> None:
    with clock.measuring() as seconds, clock.step("outer"):
        with pytest.raises(RuntimeError, match="mine"), clock.step("failing"):
            now[0] += 5
            raise RuntimeError("mine")
        now[0] += 1
    assert seconds == {"failing": 5, "outer": 1}


def test_a_step_outside_measuring_does_nothing(now: list[float]) -> None:
    with clock.step("before"):
        now[0] += 1
    with clock.measuring() as seconds:
        pass
    with clock.step("after"):
        now[0] += 1
    assert seconds == {}


def test_a_measurement_within_another_keeps_to_itself(now: list[float]) -> None:
    with clock.measuring() as outer:
        with clock.step("a"):
            with clock.measuring() as inner, clock.step("b"):
                now[0] += 1
            now[0] += 2
        with clock.step("c"):
            now[0] += 4
    assert inner == {"b": 1} and outer == {"a": 3, "c": 4}


def test_real_seconds() -> None:
    import time

    start = time.perf_counter()
    with clock.measuring() as seconds:
        with clock.step("work"):
            sum(range(10_000))
        whole = time.perf_counter() - start
    assert 0 < seconds["work"] <= whole


def test_a_device_is_waited_for_at_both_ends_of_a_step(now: list[float]) -> None:
    """Work that a step set going is the step's, and what was going before it is not."""
    left = [2.0]  # seconds of work that the device was given and has not done

    def finish() -> None:
        now[0] += left[0]
        left[0] = 0.0

    with clock.measuring() as seconds, clock.exact(finish):
        with clock.step("a"):
            left[0] = 3.0
        left[0] = 5.0
        with clock.step("b"):
            left[0] = 1.0
    assert seconds == {"a": 3.0, "b": 1.0}
