"""Built-in calculations that emit signals, and one that emits order intents.

Each is defined in docs/reference/calculations.md. None uses fast-math or the C library: same events, same bits, on every host.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tickmesh.node.calculation import calculation
from tickmesh.node.event import ASK, BID, NO_PRICE, Flag, Kind
from tickmesh.node.exact_math import add_product, exp, log, wide_float
from tickmesh.node.window import (
    capacity,
    regression_fields,
    regression_line,
    regression_push,
    window_deviations,
    window_fields,
    window_mean,
    window_push,
    window_variance,
)
from tickmesh.transports.toolbox import inlined

WINDOW_MAX = 65536
"""Longest window in values: 512 KiB of state per instrument."""
_WINDOW = {"window": (1, WINDOW_MAX)}
_WINDOW_2 = {"window": (2, WINDOW_MAX)}
_LN2 = 0.6931471805599453
_NO_PRICE, _BBO = np.int64(NO_PRICE), np.uint8(Kind.BBO)
_BID, _ASK = np.uint8(BID), np.uint8(ASK)
_STALE = np.uint16(Flag.STALE)


def _window_state(p: dict[str, Any]) -> list[tuple[Any, ...]]:
    return window_fields(p["window"])


@inlined
def _seeded(value: Any, n: Any, x: Any, window: Any) -> Any:
    """Next value of an average with factor ``2 / (window + 1)`` that starts as the mean of its first `window` values; `n` counts `x`."""
    if n <= window:
        return value + (x - value) / np.float64(n)
    return value + (2.0 / np.float64(window + 1)) * (x - value)


# ---------------------------------------------------------------- averages


@calculation(state=[("value", "f8"), ("n", "i8")], bounds={"window": (1, 1 << 31)})
def ema(x: Any, state: Any, *, window: int = 10, sma_seed: bool = False) -> Any:
    """Exponential moving average with factor 2 / (window + 1), from the first value or (`sma_seed`) from the mean of the first `window`."""
    state.n += 1
    if sma_seed:
        state.value = _seeded(state.value, state.n, x, window)
        return state.value if state.n >= window else math.nan
    state.value = x if state.n == 1 else state.value + (2.0 / np.float64(window + 1)) * (x - state.value)
    return state.value


@calculation(state=_window_state, bounds=_WINDOW)
def sma(x: Any, state: Any, *, window: int = 20) -> Any:
    """Mean of the last `window` values."""
    window_push(state, x, window)
    return window_mean(state) if state.n >= window else math.nan


@calculation(state=_window_state, bounds=_WINDOW_2)
def rolling_std(x: Any, state: Any, *, window: int = 20, sample: bool = False) -> Any:
    """Standard deviation of the last `window` values: of the population, or of a `sample` (divided by n - 1)."""
    window_push(state, x, window)
    return math.sqrt(window_variance(state, sample)) if state.n >= window else math.nan


@calculation(state=_window_state, bounds=_WINDOW_2)
def zscore(x: Any, state: Any, *, window: int = 20, sample: bool = False) -> Any:
    """Distance of the newest value from the mean of the last `window` (itself included) in standard deviations; NaN while these are 0."""
    window_push(state, x, window)
    variance = window_variance(state, sample)
    if state.n < window or not variance > 0.0:
        return math.nan
    return (x - window_mean(state)) / math.sqrt(variance)


@calculation(state=_window_state, outputs=("middle", "upper", "lower"), bounds={**_WINDOW_2, "width": (0.0, 100.0)})
def bollinger(x: Any, state: Any, *, window: int = 20, width: float = 2.0) -> Any:
    """Mean of the last `window` values, and `width` population standard deviations above and below it."""
    window_push(state, x, window)
    if state.n < window:
        return math.nan, math.nan, math.nan
    middle = window_mean(state)
    reach = width * math.sqrt(window_variance(state, False))
    return middle, middle + reach, middle - reach


@calculation(state=lambda p: regression_fields(p["window"]), outputs=("slope", "value", "r2"), bounds=_WINDOW_2)
def linear_regression(x: Any, state: Any, *, window: int = 32) -> Any:
    """Least-squares line through the last `window` values: slope per value, the line at the newest value, r² (NaN if all are equal)."""
    regression_push(state, x, window)
    if state.n < window:
        return math.nan, math.nan, math.nan
    return regression_line(state)


@calculation(
    state=lambda p: [("last", "f8"), ("seen", "i8"), *window_fields(p["window"])], bounds={**_WINDOW, "scale": (0.0, math.inf)}
)
def realised_volatility(x: Any, state: Any, *, window: int = 100, centred: bool = False, scale: float = 1.0) -> Any:
    """Root mean square of the last `window` logarithmic returns, or (`centred`) their sample standard deviation; times `scale`."""
    last = state.last
    if not x > 0.0:
        return math.nan
    state.last = x
    state.seen += 1
    if state.seen == 1:
        return math.nan
    window_push(state, log(x / last), window)
    if state.n < window:
        return math.nan
    if centred:
        return scale * math.sqrt(window_variance(state, True))
    mean = window_mean(state)
    return scale * math.sqrt(window_deviations(state) / np.float64(state.n) + mean * mean)


# ---------------------------------------------------------------- oscillators


@calculation(state=[("last", "f8"), ("gain", "f8"), ("loss", "f8"), ("n", "i8")], bounds={"window": (1, 1 << 31)})
def rsi(x: Any, state: Any, *, window: int = 14) -> Any:
    """Wilder's relative strength index, 0 … 100; NaN until `window` changes are seen, and while nothing has moved."""
    change = x - state.last
    state.last = x
    state.n += 1
    if state.n == 1:
        return math.nan
    weight = np.float64(min(state.n - 1, window))
    state.gain += (max(change, 0.0) - state.gain) / weight
    state.loss += (max(-change, 0.0) - state.loss) / weight
    total = state.gain + state.loss
    if state.n <= window or not total > 0.0:
        return math.nan
    return 100.0 * state.gain / total


@calculation(
    state=[("fast", "f8"), ("slow", "f8"), ("signal", "f8"), ("n", "i8")],
    outputs=("macd", "signal", "histogram"),
    bounds={"fast": (1, 1 << 31), "slow": (1, 1 << 31), "signal": (1, 1 << 31)},
)
def macd(x: Any, state: Any, *, fast: int = 12, slow: int = 26, signal: int = 9) -> Any:
    """Fast minus slow exponential average, its own average, and the difference. All three averages start as means; both first ones end
    their means at the `slow`-th value."""
    state.n += 1
    late = max(slow - fast, 0)
    state.slow = _seeded(state.slow, state.n, x, slow)
    if state.n > late:
        state.fast = _seeded(state.fast, state.n - late, x, fast)
    if state.n < max(slow, fast):
        return math.nan, math.nan, math.nan
    difference = state.fast - state.slow
    count = state.n - max(slow, fast) + 1
    state.signal = _seeded(state.signal, count, difference, signal)
    if count < signal:
        return math.nan, math.nan, math.nan
    return difference, state.signal, difference - state.signal


# ---------------------------------------------------------------- volume-weighted prices


@calculation(
    inputs="trade",
    state=[("high", "i8"), ("low", "u8"), ("volume", "i8"), ("session", "i8")],
    bounds={"session_ms": (0, 366 * 86_400_000), "offset_ms": (0, 366 * 86_400_000)},
)
def vwap(event: Any, state: Any, *, session_ms: int = 0, offset_ms: int = 0) -> Any:
    """Volume-weighted average price of all trades, summed exactly in 128 bits. `session_ms` > 0 starts anew every so much event time
    (86,400,000: each UTC day), `offset_ms` after the epoch's multiples."""
    if session_ms > 0:
        session = (event.ts_event - np.int64(offset_ms) * np.int64(1_000_000)) // (np.int64(session_ms) * np.int64(1_000_000))
        if session > state.session:
            state.session = session
            state.high = 0
            state.low = np.uint64(0)
            state.volume = 0
    high, low = add_product(state.high, state.low, event.price, event.qty)
    state.high = high
    state.low = low
    state.volume += event.qty
    return wide_float(high, low) / (np.float64(state.volume) * 1e9) if state.volume > 0 else math.nan


def _trades_state(p: dict[str, Any]) -> list[tuple[Any, ...]]:
    size = capacity(p["window"])
    sums = [("high", "i8"), ("low", "u8"), ("volume", "i8"), ("n", "i8"), ("pushed", "i8")]
    return [*sums, ("price", "i8", (size,)), ("qty", "i8", (size,))]


@calculation(inputs="trade", state=_trades_state, bounds=_WINDOW)
def vwap_window(event: Any, state: Any, *, window: int = 100) -> Any:
    """Volume-weighted average price of the last `window` trades (of as many as there are); its sums are exact, so nothing drifts."""
    mask = np.int64(state.price.size - 1)
    length = min(window, np.int64(state.price.size))
    high = state.high
    low = state.low
    while state.n >= length:
        oldest = (state.pushed - state.n) & mask
        high, low = add_product(high, low, -state.price[oldest], state.qty[oldest])
        state.volume -= state.qty[oldest]
        state.n -= 1
    high, low = add_product(high, low, event.price, event.qty)
    state.high = high
    state.low = low
    state.price[state.pushed & mask] = event.price
    state.qty[state.pushed & mask] = event.qty
    state.pushed += 1
    state.n += 1
    state.volume += event.qty
    return wide_float(high, low) / (np.float64(state.volume) * 1e9) if state.volume > 0 else math.nan


@calculation(inputs="trade", state=[("notional", "f8"), ("volume", "f8"), ("last", "i8")], bounds={"halflife_ms": (1e-6, 1e12)})
def vwap_decay(event: Any, state: Any, *, halflife_ms: float = 60_000.0) -> Any:
    """Volume-weighted average price where a trade's weight halves every `halflife_ms` of event time."""
    elapsed = max(np.int64(0), event.ts_event - state.last) if state.last != 0 else np.int64(0)
    keep = exp(-_LN2 * (np.float64(elapsed) / (halflife_ms * 1e6)))
    state.last = max(state.last, event.ts_event)
    qty = np.float64(event.qty)
    state.notional = state.notional * keep + np.float64(event.price) * qty
    state.volume = state.volume * keep + qty
    return state.notional / state.volume / 1e9 if state.volume > 0.0 else math.nan


# ---------------------------------------------------------------- the top of the book


@calculation(inputs="bbo", state=[])
def book_imbalance(event: Any, state: Any) -> Any:
    """(bid quantity - ask quantity) / (their sum) at the best prices: -1 … 1; NaN while a side is empty."""
    if event.bid == _NO_PRICE or event.ask == _NO_PRICE:
        return math.nan
    bid_qty = np.float64(event.bid_qty)
    ask_qty = np.float64(event.ask_qty)
    return (bid_qty - ask_qty) / (bid_qty + ask_qty) if bid_qty + ask_qty > 0.0 else math.nan


@calculation(inputs="bbo", state=[])
def microprice(event: Any, state: Any) -> Any:
    """Mid weighted by the other side's quantity; NaN while a side is empty."""
    if event.bid == _NO_PRICE or event.ask == _NO_PRICE:
        return math.nan
    bid_qty = np.float64(event.bid_qty)
    total = bid_qty + np.float64(event.ask_qty)
    if not total > 0.0:
        return math.nan
    return (np.float64(event.bid) + np.float64(event.ask - event.bid) * (bid_qty / total)) / 1e9


# ---------------------------------------------------------------- over bars


@inlined
def power_of_ten(exponent: Any) -> Any:
    """10 to the power of a small non-negative integer, float64, exact up to 22."""
    value = 1.0
    for _ in range(exponent):
        value *= 10.0
    return value


@calculation(inputs="bar", state=[], outputs=("close", "open", "high", "low", "volume"))
def bar_prices(event: Any, state: Any, *, tick: int = 1, exponent: int = 0) -> Any:
    """A bar's prices and volume in real units, to feed other calculations (``of = "NAME.close"``)."""
    start = event.open
    close = np.float64(start + np.int64(event.close_ticks) * tick) / 1e9
    high = np.float64(start + np.int64(event.high_ticks) * tick) / 1e9
    low = np.float64(start - np.int64(event.low_ticks) * tick) / 1e9
    return close, np.float64(start) / 1e9, high, low, np.float64(event.volume) / power_of_ten(exponent)


@calculation(inputs="bar", state=[("close", "i8"), ("value", "f8"), ("n", "i8")], bounds={"window": (1, 1 << 31)})
def atr(event: Any, state: Any, *, window: int = 14, tick: int = 1) -> Any:
    """Wilder's average true range of bars; starts as the mean of the first `window` true ranges, the first bar having none."""
    high = event.open + np.int64(event.high_ticks) * tick
    low = event.open - np.int64(event.low_ticks) * tick
    last = state.close
    state.close = event.open + np.int64(event.close_ticks) * tick
    state.n += 1
    if state.n == 1:
        return math.nan
    true_range = np.float64(max(high, last) - min(low, last)) / 1e9
    state.value += (true_range - state.value) / np.float64(min(state.n - 1, window))
    return state.value if state.n > window else math.nan


@inlined
def _wilder_sum(total: Any, n: Any, x: Any, window: Any) -> Any:
    """Next Wilder sum: the plain sum of the first `window - 1` values, then a `window`-th of it goes as `x`, number `n`, comes."""
    return total + x if n < window else total - total / np.float64(window) + x


_ADX_STATE = [(name, "i8") for name in ("high", "low", "close", "n")] + [(name, "f8") for name in ("up", "down", "range", "value")]


@calculation(inputs="bar", state=_ADX_STATE, outputs=("adx", "plus_di", "minus_di"), bounds={"window": (1, 1 << 31)})
def adx(event: Any, state: Any, *, window: int = 14, tick: int = 1) -> Any:
    """Wilder's average directional index of bars, from bar `2 * window` on, and his directional indicators, from `window + 1` on."""
    high = event.open + np.int64(event.high_ticks) * tick
    low = event.open - np.int64(event.low_ticks) * tick
    rise = high - state.high
    fall = state.low - low
    true_range = max(high, state.close) - min(low, state.close)
    state.high = high
    state.low = low
    state.close = event.open + np.int64(event.close_ticks) * tick
    state.n += 1
    moves = state.n - 1
    if moves == 0:
        return math.nan, math.nan, math.nan
    state.up = _wilder_sum(state.up, moves, np.float64(rise) if rise > max(fall, 0) else 0.0, window)
    state.down = _wilder_sum(state.down, moves, np.float64(fall) if fall > max(rise, 0) else 0.0, window)
    state.range = _wilder_sum(state.range, moves, np.float64(true_range), window)
    if moves < window:
        return math.nan, math.nan, math.nan
    count = moves - window + 1
    directed = state.up + state.down
    if directed > 0.0:
        index = 100.0 * abs(state.up - state.down) / directed
    else:
        index = state.value if count > window else 0.0
    state.value += (index - state.value) / np.float64(min(count, window))
    average = state.value if count >= window else math.nan
    if not state.range > 0.0:
        return average, math.nan, math.nan
    return average, 100.0 * state.up / state.range, 100.0 * state.down / state.range


@calculation(inputs="bar", state=[("close", "i8"), ("volume", "i8"), ("n", "i8")])
def obv(event: Any, state: Any, *, tick: int = 1, exponent: int = 0) -> Any:
    """On-balance volume of bars, summed exactly: the first bar's volume, then plus it when the close rises, minus it when it falls."""
    close = event.open + np.int64(event.close_ticks) * tick
    if state.n == 0 or close > state.close:
        state.volume += event.volume
    elif close < state.close:
        state.volume -= event.volume
    state.close = close
    state.n += 1
    return np.float64(state.volume) / power_of_ten(exponent)


# ---------------------------------------------------------------- order intents


@calculation(state=[("side", "i8")], emits="intent", bounds={"qty": (1, 1 << 62), "band": (0.0, math.inf)})
def cross_intent(x: Any, y: Any, event: Any, state: Any, out: Any, *, qty: int = 1, band: float = 0.0) -> Any:
    """An example of a strategy: buy `qty` (in the instrument's exponent) when `x` rises above `y` by more than `band`, sell when it falls
    below; at the other side's best price, or at the trade's price where a trade drives it."""
    side = state.side
    if x - y > band:
        side = 1
    elif y - x > band:
        side = -1
    crossed = state.side != 0 and side != state.side
    state.side = side
    if not crossed:
        return False
    price = event.price
    if event.kind == _BBO and side > 0:
        price = event.ask
    out.side = _BID if side > 0 else _ASK
    out.price = price
    out.qty = qty
    return price != _NO_PRICE


# ---------------------------------------------------------------- over several instruments


@inlined
def _leg_price(event: Any) -> Any:
    """A leg's mid, or price of its trade, in currency; NaN while a side is empty or the book misses data."""
    if event.kind != _BBO:
        return np.float64(event.price) / 1e9
    if event.bid == _NO_PRICE or event.ask == _NO_PRICE or event.flags & _STALE:
        return math.nan
    return np.float64(event.bid + event.ask) / 2e9


@calculation(inputs="legs", state=[("price", "f8", (2,)), ("seen", "i8", (2,))], bounds={"legs": (2, 2)})
def spread(event: Any, leg: Any, state: Any, *, ratio: float = 1.0) -> Any:
    """Price of the first leg less `ratio` times that of the second: mids of BBOs, or prices of trades. None while one is not known."""
    state.price[leg] = _leg_price(event)
    state.seen[leg] = 1
    if state.seen[0] == 0 or state.seen[1] == 0:
        return math.nan
    return state.price[0] - ratio * state.price[1]


@calculation(inputs="legs", state=lambda p: [("price", "f8", (p["legs"],)), ("seen", "i8", (p["legs"],))])
def basket(event: Any, leg: Any, state: Any, *, scale: float = 1.0, legs: int = 1) -> Any:
    """`scale` times the mean price of all legs: mids of BBOs, or prices of trades. None while one is not known."""
    state.price[leg] = _leg_price(event)
    state.seen[leg] = 1
    total = 0.0
    for j in range(legs):
        if state.seen[j] == 0:
            return math.nan
        total += state.price[j]
    return scale * (total / np.float64(legs))
