"""OHLCV bars against a plain grouping of the same trades."""

from __future__ import annotations

from typing import Any

from calculation_twins import Run
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node.bars import bars
from tickmesh.node.calculation import new_event
from tickmesh.node.event import Flag, Kind

TICK = 10**7
MS = 1_000_000


def event(ts_ms: float, price_ticks: int = 0, qty: int = 0, kind: Kind = Kind.TRADE) -> Any:
    return new_event(ts_event=round(ts_ms * MS), price=price_ticks * TICK, qty=qty, kind=kind)


def collect(events: list[Any], **params: Any) -> list[tuple[int, ...]]:
    """(start ms, open, high, low, close, volume, trades) of every bar, prices in ticks."""
    run = Run(bars, True, **params)
    made = []
    for one in events:
        emitted, bar = run(one, tick=TICK)
        if emitted:
            opened = bar.open // TICK
            prices = (opened, opened + int(bar.high_ticks), opened - int(bar.low_ticks), opened + int(bar.close_ticks))
            made.append((bar.ts_event // MS, *prices, bar.volume, bar.trades))
            assert bar.flags == 0
    return [tuple(int(v) for v in bar) for bar in made]


def grouped(rows: list[tuple[int, int, int]], interval: int) -> list[tuple[int, ...]]:
    """The same from a dictionary of lists: what bars are, by definition."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for ts, price, qty in rows:
        groups.setdefault(ts - ts % interval, []).append((price, qty))
    made = []
    for start, group in groups.items():
        prices = [price for price, _ in group]
        made.append((start, prices[0], max(prices), min(prices), prices[-1], sum(qty for _, qty in group), len(group)))
    return made


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(-50, 50), st.integers(0, 10**15)), min_size=1, max_size=50), st.integers(1, 300))
def test_bars_group_trades_by_interval(steps: list[tuple[int, int, int]], interval: int) -> None:
    clock, price, rows = 0, 1000, []
    for wait, move, qty in steps:
        clock, price = clock + wait, price + move
        rows.append((clock, price, qty))
    events = [event(*row) for row in rows] + [event(clock + 2 * interval, kind=Kind.TIMER)]
    assert collect(events, interval_ms=interval) == grouped(rows, interval)


def test_a_timer_closes_a_bar_once_and_only_after_its_end() -> None:
    timers = [event(t, kind=Kind.TIMER) for t in (50, 99.999, 100, 200)]
    assert collect([event(10, 5, 2), *timers], interval_ms=100) == [(0, 5, 5, 5, 5, 2, 1)]


def test_an_empty_interval_gives_nothing() -> None:
    made = collect([event(10, 5, 1), event(1010, 6, 1), event(1100, 7, 1)], interval_ms=100)
    assert [bar[0] for bar in made] == [0, 1000]


def test_a_late_trade_counts_in_the_open_bar() -> None:
    made = collect([event(110, 5, 1), event(90, 9, 1), event(200, 7, 1)], interval_ms=100)
    assert made == [(100, 5, 9, 5, 9, 2, 2)]


def test_a_price_off_the_tick_is_rounded_and_flagged() -> None:
    run = Run(bars, True, interval_ms=100)
    for ts, price in ((10, 1000 * TICK), (20, 1001 * TICK + 1), (30, 1000 * TICK - 3)):
        trade = event(ts, qty=1)
        trade.price = price
        run(trade, tick=TICK)
    emitted, out = run(event(100, kind=Kind.TIMER), tick=TICK)
    assert emitted
    assert (out.high_ticks, out.low_ticks, out.close_ticks, out.flags) == (1, 0, 0, Flag.ROUNDED)


def test_a_distance_too_far_for_the_event_is_flagged() -> None:
    run = Run(bars, True, interval_ms=100)
    for price in (0, 2**40, 5):
        trade = event(10, qty=1)
        trade.price = price
        run(trade, tick=1)
    _, out = run(event(100, kind=Kind.TIMER), tick=1)
    assert (out.high_ticks, out.close_ticks, out.flags) == (2**32 - 1, 5, Flag.ROUNDED)


def test_a_trade_later_than_its_bars_timer_counts_in_the_next_bar() -> None:
    made = collect([event(10, 5, 1), event(100, kind=Kind.TIMER), event(90, 9, 1), event(150, 7, 1), event(200, 8, 1)], interval_ms=100)
    assert made == [(0, 5, 5, 5, 5, 1, 1), (100, 9, 9, 7, 7, 2, 2)]
