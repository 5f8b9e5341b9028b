"""Pacing: the schedule against exact arithmetic, gaps, speeds, and the compiled variant."""

from __future__ import annotations

import asyncio
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.transports.pacing import Pace, PaceError, due
from tickmesh.transports.toolbox import outlined

T0 = 1_700_000_000_000_000_000
MS = 1_000_000


class Clock:
    """A clock that moves when it is slept on, or by hand."""

    def __init__(self) -> None:
        self.now_ns = 77
        self.slept: list[int] = []

    def __call__(self) -> int:
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds * 1e9))
        self.now_ns += round(seconds * 1e9)


@outlined
def compiled_waits(pace: Any, stamps: Any, clocks: Any, out: Any) -> Any:
    for i in range(stamps.size):
        out[i] = due(pace, stamps[i], clocks[i])


def exact_waits(stamps: list[int], clocks: list[int], factor: Fraction, max_wait_ns: int) -> list[Fraction]:
    """The twin: replayed time moves by min(gap / factor, limit); each event is due when the clock has moved as far."""
    waits, replayed, last = [], Fraction(0), stamps[0]
    for ts_ns, now_ns in zip(stamps, clocks):
        if ts_ns > last:
            replayed += min(Fraction(ts_ns - last) / factor, max_wait_ns)
            last = ts_ns
        behind = Fraction(last - ts_ns) / factor
        waits.append(max(Fraction(0), clocks[0] + replayed - behind - now_ns))
    return waits


gaps = st.lists(st.integers(-5 * MS, 10**12), min_size=1, max_size=30)


@settings(deadline=None)
@given(gaps, st.lists(st.integers(0, 10**9), min_size=31, max_size=31), st.sampled_from([1, 2, 10, Fraction(1, 4)]), st.integers(1, 10**5))
def test_waits_are_those_of_exact_arithmetic(steps: list[int], ticks: list[int], factor: Fraction, max_wait_ms: int) -> None:
    stamps = [T0, *(T0 + int(x) for x in np.cumsum(steps))]
    clocks = [int(x) for x in np.cumsum(ticks[: len(stamps)])]
    pace = Pace(float(factor), max_wait_ms=max_wait_ms)
    waits = np.zeros(len(stamps), np.int64)
    compiled_waits(pace.state, np.array(stamps), np.array(clocks), waits)
    by_hand = Pace(float(factor), max_wait_ms=max_wait_ms, clock=iter(clocks).__next__)
    assert [by_hand.wait_ns(ts_ns) for ts_ns in stamps] == waits.tolist()
    for wait_ns, exact in zip(waits.tolist(), exact_waits(stamps, clocks, Fraction(factor), max_wait_ms * MS)):
        assert abs(wait_ns - exact) <= 2


def test_late_wakeups_do_not_add_up() -> None:
    clock = Clock()
    pace = Pace("realtime", clock=clock)
    for i in range(1000):
        clock.now_ns += pace.wait_ns(T0 + i * MS) + 300_000  # every wait ends 0.3 ms late
    assert clock.now_ns == 77 + 999 * MS + 300_000


@pytest.mark.parametrize(("speed", "waits_ns"), [("max", 0), ("realtime", 50 * MS), (10, 5 * MS), ("0.5", 100 * MS)])
def test_speeds(speed: Any, waits_ns: int) -> None:
    pace = Pace(speed, clock=Clock())
    assert pace.wait_ns(T0) == 0
    assert pace.wait_ns(T0 + 50 * MS) == waits_ns
    assert pace.wait_ns(T0 + 50 * MS) == waits_ns  # asked again: the same


def test_a_night_is_shortened_and_counted() -> None:
    clock = Clock()
    pace = Pace("realtime", max_wait_ms=100, clock=clock, sleep=clock.sleep)
    night_ns = 8 * 3600 * 10**9
    for ts_ns in (T0, T0 + night_ns, T0 + night_ns + 10 * MS):
        pace.sleep(ts_ns)
    assert clock.slept == [100 * MS, 10 * MS]
    assert pace.shortened == (1, night_ns - 100 * MS)


def test_an_event_before_the_last_one_is_due() -> None:
    pace = Pace("realtime", clock=Clock())
    assert [pace.wait_ns(T0), pace.wait_ns(T0 - MS), pace.wait_ns(T0 + MS)] == [0, 0, MS]


def test_coroutines_wait_too() -> None:
    pace = Pace("realtime")

    async def play() -> int:
        for ts_ns in (T0, T0 + 2 * MS):
            await pace.wait(ts_ns)
        return pace.wait_ns(T0 + 2 * MS)

    assert asyncio.run(play()) == 0


@pytest.mark.parametrize("speed", ["fast", 0, -1, float("nan"), float("inf"), None])
def test_what_is_no_speed_is_refused(speed: Any) -> None:
    with pytest.raises(PaceError, match="use 'max'") as caught:
        Pace(speed)
    assert caught.value.speed is speed
