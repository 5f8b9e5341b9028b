"""Alerts: when they come, when they stay away, what they say."""

from __future__ import annotations

import math
from typing import Any

import pytest
from calculation_twins import Run, records, trades
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node.alerts import DOWN, UP, cross, move, threshold, zscore_alert
from tickmesh.node.calculation import PlainRecord

SECOND = 1_000_000_000


def fired(
    made: Any, xs: list[float], ys: list[float] | None = None, times_s: list[float] | None = None, **params: Any
) -> list[tuple[int, int]]:
    """(index, side) of every alert."""
    run = Run(made, True, **params)
    events = trades([1.0] * len(xs))
    if times_s is not None:
        events["ts_event"] = [round(t * SECOND) + 10**15 for t in times_s]
    found = []
    for k, x in enumerate(xs):
        emitted, out = run(PlainRecord(events[k]), x, ys[k] if ys else 0.0)
        if emitted:
            found.append((k, int(out.side)))
    return found


def test_threshold_alerts_once_until_the_value_comes_back() -> None:
    xs = [9.0, 11.0, 12.0, 9.5, 11.0, 8.9, 11.0]
    assert fired(threshold, xs, above=10.0, hysteresis=1.0) == [(1, UP), (6, UP)]
    assert fired(threshold, xs, above=10.0) == [(1, UP), (4, UP), (6, UP)]


def test_threshold_both_ways() -> None:
    assert fired(threshold, [5.0, 11.0, 1.0, 0.5, 11.0], above=10.0, below=2.0) == [(1, UP), (2, DOWN), (4, UP)]
    assert fired(threshold, [1.0, 2.0, 1.0], below=2.0, hysteresis=0.5) == [(0, DOWN)]
    assert fired(threshold, [1e300, -1e300]) == []


def test_threshold_says_what_it_saw() -> None:
    event = records(trades([77.0]))[0]
    _, out = Run(threshold, True)(event, 11.0, above=10.0)
    assert (out.value, out.threshold, out.price, out.side) == (11.0, 10.0, 77 * 10**9, UP)


def test_a_cooldown_delays_an_alert_and_does_not_lose_it() -> None:
    xs, times = [11.0, 9.0, 11.0, 12.0, 12.0], [0, 1, 2, 4.9, 5]
    assert fired(threshold, xs, times_s=times, above=10.0, cooldown_ms=5000.0) == [(0, UP), (4, UP)]
    assert fired(threshold, [11.0, 9.0, 11.0, 9.0, 9.0], times_s=times, above=10.0, cooldown_ms=5000.0) == [(0, UP)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-10, 10), max_size=60), st.floats(0, 5), st.floats(-5, 0), st.floats(0, 3), st.floats(0, 9000))
def test_threshold_follows_its_definition(xs: list[float], above: float, below: float, hysteresis: float, cooldown_ms: float) -> None:
    wanted, held, last = [], 0, -math.inf
    for k, x in enumerate(xs):
        if (held == 1 and x <= above - hysteresis) or (held == -1 and x >= below + hysteresis):
            held = 0
        now_ns = (k + 1) * SECOND
        for side, beyond in ((1, x > above), (-1, x < below)):
            if beyond and held != side and now_ns - last >= int(cooldown_ms * 1e6):
                wanted.append((k, UP if side > 0 else DOWN))
                held, last = side, now_ns
                break
    assert fired(threshold, xs, above=above, below=below, hysteresis=hysteresis, cooldown_ms=cooldown_ms) == wanted


def test_zscore_compares_with_the_values_before() -> None:
    quiet = [100.0 + (-1) ** k for k in range(8)]
    assert fired(zscore_alert, [*quiet, 110.0, 111.0], window=8, limit=4.0) == [(8, UP)]
    assert fired(zscore_alert, [*quiet, 90.0], window=8, limit=4.0) == [(8, DOWN)]
    assert fired(zscore_alert, [*quiet, 103.0], window=8, limit=4.0) == []
    assert fired(zscore_alert, [5.0] * 10 + [9.0], window=8) == []
    run = Run(zscore_alert, True, window=8)
    events = records(trades([1.0] * 9))
    for k, x in enumerate([*quiet, 110.0]):
        _, out = run(events[k], x, limit=4.0)
    assert (out.value, out.threshold) == (110.0, 104.0)


def test_move_from_the_extremes_of_the_window() -> None:
    assert fired(move, [100.0, 99.5, 100.4, 100.6], percent=1.0) == [(3, UP)]
    assert fired(move, [100.0, 101.5, 99.0, 98.5], percent=2.0) == [(2, DOWN)]
    assert fired(move, [100.0, 100.5, 101.0, 101.5], times_s=[0, 2, 4, 6], percent=1.2, window_ms=3000.0) == []
    assert fired(move, [100.0, 101.5, 101.5, 103.5], percent=1.0) == [(1, UP), (3, UP)]
    assert fired(move, [0.0, 0.0], percent=1.0) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 900), st.integers(-3, 3)), min_size=1, max_size=60), st.floats(0.5, 6))
def test_move_sees_every_move_within_15_sixteenths_of_the_window(steps: list[tuple[int, int]], percent: float) -> None:
    run, clock, x = Run(move, True), 10**9, 100.0
    recent: list[tuple[int, float]] = []
    event = records(trades([1.0]))[0]
    for wait_ms, change in steps:
        clock, x = clock + wait_ms * 1_000_000, x + change
        event.ts_event = clock
        recent.append((clock, x))
        emitted = run(event, x, percent=percent, window_ms=1600.0)[0]
        sure = [v for t, v in recent if clock - t <= 1_500_000_000]
        possible = [v for t, v in recent if clock - t <= 1_600_000_000]
        if x >= min(sure) * (1 + percent / 100) * (1 + 1e-12) or x <= max(sure) * (1 - percent / 100) * (1 - 1e-12):
            assert emitted
        if emitted:
            assert x >= min(possible) * (1 + percent / 100) * (1 - 1e-12) or x <= max(possible) * (1 - percent / 100) * (1 + 1e-12)
            recent = [(clock, x)]


def test_cross() -> None:
    ys = [10.0] * 6
    assert fired(cross, [9.0, 11.0, 10.0, 9.0, 11.0, 12.0], ys) == [(1, UP), (3, DOWN), (4, UP)]
    assert fired(cross, [8.5, 10.5, 11.5, 9.5, 8.0, 12.0], ys, hysteresis=1.0) == [(2, UP), (4, DOWN), (5, UP)]
    assert fired(cross, [9.0, 11.0, 9.0, 11.0, 9.0, 11.0], ys, cooldown_ms=2500.0) == [(1, UP), (4, DOWN)]


@pytest.mark.parametrize("made", [threshold, zscore_alert, move, cross])
def test_alerts_are_alerts(made: Any) -> None:
    assert made.emits == "alert"
    assert made.takes_series
