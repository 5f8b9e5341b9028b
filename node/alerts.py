"""Alerts: an event when a series does something worth a look. Configured, not coded.

Every alert fills an ALERT event: `value` (the series, f64), `threshold` (f64, what it was held against), `side` 1 where the value went
up through it and 0 where it went down, `calculation` (index in the plan), `price` of the event that caused it.
An alert held back by its cooldown is not lost: it comes with the first value after the cooldown that still calls for it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tickmesh.node.calculation import calculation
from tickmesh.node.indicators import WINDOW_MAX
from tickmesh.node.window import window_fields, window_mean, window_push, window_variance
from tickmesh.transports.toolbox import inlined

DOWN, UP = 0, 1
"""`side` of an ALERT event."""
_DOWN, _UP = np.uint8(DOWN), np.uint8(UP)
_COOLDOWN = {"cooldown_ms": (0.0, 366 * 86_400_000.0)}
_ABOVE, _BELOW = np.uint8(1), np.uint8(2)
_SLICES = 16


@inlined
def _cooling(event: Any, state: Any, cooldown_ms: Any) -> Any:
    """Whether the last alert is less than `cooldown_ms` of event time ago."""
    return state.fired > 0 and event.ts_event - state.last < np.int64(cooldown_ms * 1e6)


@inlined
def _fire(event: Any, state: Any, out: Any, value: Any, threshold: Any, side: Any) -> Any:
    """Fill the alert; returns true."""
    state.fired += 1
    state.last = event.ts_event
    out.side = side
    out.price = event.price
    out.threshold = threshold
    out.value = value
    return True


_FIRED = [("last", "i8"), ("fired", "i8")]


@calculation(state=[*_FIRED, ("held", "u1")], emits="alert", bounds={"hysteresis": (0.0, math.inf), **_COOLDOWN})
def threshold(
    x: Any, event: Any, state: Any, out: Any, *,
    above: float = math.inf, below: float = -math.inf, hysteresis: float = 0.0, cooldown_ms: float = 0.0,
) -> Any:  # fmt: skip
    """The series is above `above` or below `below`. It alerts once, and again only after the value has come back by `hysteresis`."""
    if state.held == _ABOVE and x <= above - hysteresis:
        state.held = np.uint8(0)
    if state.held == _BELOW and x >= below + hysteresis:
        state.held = np.uint8(0)
    if not (x > above and state.held != _ABOVE) and not (x < below and state.held != _BELOW):
        return False
    if _cooling(event, state, cooldown_ms):
        return False
    if x > above:
        state.held = _ABOVE
        return _fire(event, state, out, x, above, _UP)
    state.held = _BELOW
    return _fire(event, state, out, x, below, _DOWN)


@calculation(
    state=lambda p: [("held", "u1"), *_FIRED, *window_fields(p["window"])],
    emits="alert",
    bounds={"window": (2, WINDOW_MAX), "limit": (0.0, math.inf), "hysteresis": (0.0, math.inf), **_COOLDOWN},
)
def zscore_alert(
    x: Any, event: Any, state: Any, out: Any, *,
    window: int = 100, limit: float = 4.0, hysteresis: float = 1.0, cooldown_ms: float = 0.0,
) -> Any:  # fmt: skip
    """The value is `limit` or more standard deviations from the mean of the `window` values before it. `threshold` is the value at
    which that begins. It alerts again once the distance was below ``limit - hysteresis``."""
    ready = state.n >= min(window, np.int64(state.ring.size))
    mean = window_mean(state) if ready else 0.0
    deviation = math.sqrt(window_variance(state, False)) if ready else 0.0
    window_push(state, x, window)
    if not deviation > 0.0:
        return False
    score = (x - mean) / deviation
    if abs(score) < limit - hysteresis:
        state.held = np.uint8(0)
    if abs(score) < limit or state.held != 0 or _cooling(event, state, cooldown_ms):
        return False
    state.held = _ABOVE
    if score > 0.0:
        return _fire(event, state, out, x, mean + limit * deviation, _UP)
    return _fire(event, state, out, x, mean - limit * deviation, _DOWN)


@calculation(
    state=[*_FIRED, ("newest", "i8"), ("slices", "i8"), ("low", "f8", (_SLICES,)), ("high", "f8", (_SLICES,))],
    emits="alert",
    bounds={"percent": (1e-9, math.inf), "window_ms": (1.0, 366 * 86_400_000.0), **_COOLDOWN},
)
def move(x: Any, event: Any, state: Any, out: Any, *, percent: float = 1.0, window_ms: float = 60_000.0, cooldown_ms: float = 0.0) -> Any:
    """The value is `percent` above the lowest, or below the highest, of the last `window_ms` of event time (kept in sixteenths, so
    between 15/16 and all of it). After an alert the comparison starts anew from the value that caused it."""
    width = max(np.int64(1), np.int64(window_ms * 1e6) // np.int64(_SLICES))
    _advance(state, event.ts_event // width, x)
    low = x
    high = x
    for k in range(min(state.slices, np.int64(_SLICES))):
        low = min(low, state.low[k])
        high = max(high, state.high[k])
    rises = low + abs(low) * percent / 100.0
    falls = high - abs(high) * percent / 100.0
    up = x > low and x >= rises
    down = x < high and x <= falls
    if not (up or down) or _cooling(event, state, cooldown_ms):
        return False
    state.slices = 0
    _advance(state, event.ts_event // width, x)
    return _fire(event, state, out, x, rises if up else falls, _UP if up else _DOWN)


@inlined
def _advance(state: Any, current: Any, x: Any) -> None:
    """Take `x` into the lowest and highest of slice number `current`; slices passed over repeat nothing and are emptied."""
    if state.slices == 0:
        state.newest = current
        for k in range(_SLICES):
            state.low[k] = np.inf
            state.high[k] = -np.inf
        state.slices = _SLICES
    gone = min(current - state.newest, np.int64(_SLICES))
    for k in range(gone):
        slot = (state.newest + np.int64(1) + k) & np.int64(_SLICES - 1)
        state.low[slot] = np.inf
        state.high[slot] = -np.inf
    state.newest = max(state.newest, current)
    slot = state.newest & np.int64(_SLICES - 1)
    state.low[slot] = min(state.low[slot], x)
    state.high[slot] = max(state.high[slot], x)


@calculation(state=[*_FIRED, ("side", "i8")], emits="alert", bounds={"hysteresis": (0.0, math.inf), **_COOLDOWN})
def cross(x: Any, y: Any, event: Any, state: Any, out: Any, *, hysteresis: float = 0.0, cooldown_ms: float = 0.0) -> Any:
    """The series `of` crosses the series `against`, by more than `hysteresis`. `threshold` is the other series' value."""
    side = state.side
    if x - y > hysteresis:
        side = 1
    elif y - x > hysteresis:
        side = -1
    if state.side == 0:
        state.side = side
        return False
    if side == state.side or _cooling(event, state, cooldown_ms):
        return False
    state.side = side
    return _fire(event, state, out, x, y, _UP if side > 0 else _DOWN)
