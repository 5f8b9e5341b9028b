"""Sums over the last `window` values in constant time per value, with a bound on the rounding error.

Adding the newest and subtracting the oldest value lets rounding errors pile up without end. Here a second set of sums is built from
nothing beside the live one; after `window` values it covers exactly the live window, having seen additions only, and replaces it. So
a live sum is never older than two windows, no value is ever rescanned, and the cost per value is constant.

Values are summed as distances from an anchor (a value at most two windows old), so that a price of 60,000 with moves of 0.01 keeps its
digits. With ``u = 2**-53`` and `R` the largest distance from the anchor within the last two windows, the error of the sum of squared
deviations is at most ``10 u (window + 4) peak`` where `peak <= window R**2` is the largest sum of squares since the sums were renewed;
a sum of squared deviations within that bound counts as zero.

State fields are made by :func:`window_fields`; the ring holds a power of two of values, so a live change of `window` up to that size
needs no new code: the window shrinks at once or grows as values arrive.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tickmesh.transports.toolbox import inlined, outlined

_ROUNDING = 10.0 * 2.0**-53


def capacity(window: int) -> int:
    """Smallest power of two that holds `window` values."""
    return 1 << max(0, int(window) - 1).bit_length()


def window_fields(window: int) -> list[tuple[Any, ...]]:
    """State fields of a window of at most `window` values: the ring, the live sums, the sums being built."""
    counts = [(name, "i8") for name in ("window", "n", "pushed", "next_n")]
    sums = [(name, "f8") for name in ("anchor", "total", "squares", "peak", "next_anchor", "next_total", "next_squares")]
    return [*counts, *sums, ("ring", "f8", (capacity(window),))]


@outlined
def window_resize(state: Any, window: Any) -> None:
    """Make the window `window` long: keep the newest values that fit, sum them anew."""
    mask = np.int64(state.ring.size - 1)
    state.n = min(state.n, window)
    first = state.pushed - state.n
    state.window = window
    state.anchor = state.ring[first & mask]
    state.total = 0.0
    state.squares = 0.0
    state.next_n = 0
    for k in range(state.n):
        distance = state.ring[(first + k) & mask] - state.anchor
        state.total += distance
        state.squares += distance * distance
    state.peak = state.squares


@inlined
def window_push(state: Any, x: Any, window: Any) -> None:
    """Take in the value `x`; the window then holds ``state.n <= window`` values. `window` beyond the ring's size is cut to it."""
    window = min(window, np.int64(state.ring.size))
    if state.window != window:
        window_resize(state, window)
    mask = np.int64(state.ring.size - 1)
    if state.n == 0:
        state.anchor = x
    distance = x - state.anchor
    if state.n < window:
        state.n += 1
        state.total += distance
        state.squares += distance * distance
    else:
        oldest = state.ring[(state.pushed - window) & mask] - state.anchor
        state.total += distance - oldest
        state.squares += distance * distance - oldest * oldest
    state.peak = max(state.peak, state.squares)
    state.ring[state.pushed & mask] = x
    state.pushed += 1
    _renew(state, x, window)


@inlined
def _renew(state: Any, x: Any, window: Any) -> None:
    """Add `x` to the sums being built; when they cover the window they become the live ones."""
    if state.next_n == 0:
        state.next_anchor = x
        state.next_total = 0.0
        state.next_squares = 0.0
    distance = x - state.next_anchor
    state.next_total += distance
    state.next_squares += distance * distance
    state.next_n += 1
    if state.next_n == window:
        state.anchor = state.next_anchor
        state.total = state.next_total
        state.squares = state.next_squares
        state.peak = state.next_squares
        state.next_n = 0


@inlined
def window_mean(state: Any) -> Any:
    """Mean of the values in the window, which must not be empty."""
    return state.anchor + state.total / np.float64(state.n)


@inlined
def window_deviations(state: Any) -> Any:
    """Sum of squared deviations from the mean; 0 where it is below the rounding error."""
    n = np.float64(state.n)
    value = state.squares - state.total * state.total / n
    return value if value > _ROUNDING * (n + 4.0) * state.peak else 0.0


@inlined
def window_variance(state: Any, sample: Any) -> Any:
    """Variance of the window: divided by ``n - 1`` if `sample`, else by ``n``. NaN if that is 0."""
    divisor = np.float64(state.n - 1) if sample else np.float64(state.n)
    return window_deviations(state) / divisor if divisor > 0.0 else np.nan


# ---------------------------------------------------------------- least squares


def regression_fields(window: int) -> list[tuple[Any, ...]]:
    """State fields of a window with sums for a least-squares line over the values' positions 0 … n-1."""
    return [("products", "f8"), ("next_products", "f8"), *window_fields(window)]


@outlined
def _regression_resize(state: Any, window: Any) -> None:
    window_resize(state, window)
    mask = np.int64(state.ring.size - 1)
    first = state.pushed - state.n
    state.products = 0.0
    for k in range(state.n):
        state.products += np.float64(k) * (state.ring[(first + k) & mask] - state.anchor)


@inlined
def regression_push(state: Any, x: Any, window: Any) -> None:
    """Like :func:`window_push`, and keep the sum of position x distance, renewed in the same rhythm."""
    window = min(window, np.int64(state.ring.size))
    if state.window != window:
        _regression_resize(state, window)
    was_full = state.n == window
    window_push(state, x, window)
    renewed = state.next_n == 0
    position = window - 1 if renewed else state.next_n - 1
    if position == 0:
        state.next_products = 0.0
    state.next_products += np.float64(position) * (x - state.next_anchor)
    if renewed:
        state.products = state.next_products
    elif was_full:
        state.products += np.float64(state.n) * (x - state.anchor) - state.total
    else:
        state.products += np.float64(state.n - 1) * (x - state.anchor)


@inlined
def regression_line(state: Any) -> Any:
    """``(slope, value, r2)``: slope per value, the line's value at the newest, share of variance explained. NaN below two values."""
    n = np.float64(state.n)
    if state.n < 2:
        return np.nan, np.nan, np.nan
    centre = (n - 1.0) * 0.5
    spread = n * (n * n - 1.0) / 12.0
    shared = state.products - centre * state.total
    slope = shared / spread
    deviations = window_deviations(state)
    r2 = min(1.0, shared * slope / deviations) if deviations > 0.0 else np.nan
    return slope, window_mean(state) + slope * centre, r2
