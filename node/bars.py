"""OHLCV bars by event time: one 64-byte BAR event when an interval is over."""

from __future__ import annotations

from typing import Any

import numpy as np

from tickmesh.node.calculation import calculation
from tickmesh.node.event import Flag, Kind
from tickmesh.transports.toolbox import inlined

_TIMER, _ROUNDED = np.uint8(Kind.TIMER), np.uint16(Flag.ROUNDED)
_U32_MAX, _I32_MAX = np.int64(0xFFFF_FFFF), np.int64(0x7FFF_FFFF)
_STATE = [
    ("end", "i8"),
    ("open", "i8"),
    ("high", "i8"),
    ("low", "i8"),
    ("close", "i8"),
    ("volume", "i8"),
    ("trades", "i8"),
    ("start", "i8"),
]


@calculation(inputs="trade", state=_STATE, emits="bar", timer=True, bounds={"interval_ms": (1, 366 * 86_400_000)})
def bars(event: Any, state: Any, out: Any, *, interval_ms: int = 60_000, tick: int = 1) -> Any:
    """Bars of `interval_ms` of event time, aligned to the epoch; `ts_event` of a bar is its start, its end is exclusive.

    A bar is emitted by the first trade or timer at or past its end; an interval without trades emits nothing. A trade that comes late
    (its time before the open bar's start) counts in the open bar; if a timer has closed its interval already, in the next one.
    Volume and prices are exact integers; a price that is no multiple of `tick` away from the open is rounded towards it and the bar
    flagged ROUNDED.
    """
    closes = state.trades > 0 and event.ts_event >= state.end
    if closes:
        _fill(state, out, tick)
        state.trades = 0
    if event.kind == _TIMER:
        return closes
    if state.trades == 0:
        length = np.int64(interval_ms) * np.int64(1_000_000)
        state.start = max(event.ts_event - event.ts_event % length, state.end)
        state.end = state.start + length
        state.open = event.price
        state.high = event.price
        state.low = event.price
        state.volume = 0
    state.high = max(state.high, event.price)
    state.low = min(state.low, event.price)
    state.close = event.price
    state.volume += event.qty
    state.trades += 1
    return closes


@inlined
def _fill(state: Any, out: Any, tick: Any) -> None:
    """Write the finished bar into `out`, whose header the shard has filled."""
    size = max(np.int64(tick), np.int64(1))
    up = state.high - state.open
    down = state.open - state.low
    move = state.close - state.open
    high_ticks = min(up // size, _U32_MAX)
    low_ticks = min(down // size, _U32_MAX)
    distance = min(abs(move) // size, _I32_MAX)
    exact = high_ticks * size == up and low_ticks * size == down and distance * size == abs(move)
    out.ts_event = state.start
    out.flags = np.uint16(0) if exact else _ROUNDED
    out.open = state.open
    out.volume = state.volume
    out.high_ticks = np.uint32(high_ticks)
    out.low_ticks = np.uint32(low_ticks)
    out.close_ticks = np.int32(distance if move >= 0 else -distance)
    out.trades = np.uint32(min(state.trades, _U32_MAX))
