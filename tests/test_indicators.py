"""Built-in calculations against outside references (TA-Lib columns) and against slow exact definitions."""

from __future__ import annotations

import csv
import json
import math
import os
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calculation_twins import Run, over_events, quote, records, series, trades
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node import indicators as built
from tickmesh.node.event import ANY_VIEW, NO_PRICE
from tickmesh.node.exact_math import exp, log

DATA = Path(os.environ.get("TICKMESH_DATA", Path(__file__).parents[2] / "shared" / "data")) / "indicators_talib"
ROUNDING = 2.0**-53


# ---------------------------------------------------------------- TA-Lib


@pytest.fixture(scope="module")
def bars() -> list[dict[str, float]]:
    if not DATA.exists():
        pytest.skip(f"no reference columns at {DATA}")
    with (DATA / "bars.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def expected() -> dict[str, list[float]]:
    if not DATA.exists():
        pytest.skip(f"no reference columns at {DATA}")
    with (DATA / "expected.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {column: [float(row[column]) if row[column] else math.nan for row in rows] for column in rows[0]}


def agree(got: list[float], wanted: list[float], within: float = 1e-9) -> None:
    """Same gaps at the start, and values equal to the 12 digits that the reference gives."""
    np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
    np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=within)


@pytest.mark.parametrize(
    ("made", "params", "columns"),
    [
        (built.ema, {"window": 12, "sma_seed": True}, ["EMA12"]),
        (built.ema, {"window": 26, "sma_seed": True}, ["EMA26"]),
        (built.sma, {"window": 20}, ["SMA20"]),
        (built.rsi, {"window": 14}, ["RSI14"]),
        (built.macd, {}, ["MACD", "MACD_signal", "MACD_hist"]),
        (built.bollinger, {"window": 20, "width": 2.0}, ["BB_mid", "BB_up", "BB_low"]),
        (built.rolling_std, {"window": 20}, ["STDDEV20"]),
        (built.linear_regression, {"window": 14}, ["LINREG_SLOPE14", "LINREG14"]),
    ],
)
def test_same_as_talib(
    made: Any, params: dict[str, Any], columns: list[str], bars: list[dict[str, float]], expected: dict[str, list[float]]
) -> None:
    values = series(made, [bar["close"] for bar in bars], **params)
    for k, column in enumerate(columns):
        agree([v[k] if isinstance(v, tuple) else v for v in values], expected[column])


def bar_events(bars: list[dict[str, float]], tick: int) -> Any:
    events = np.zeros(len(bars), ANY_VIEW)
    for event, bar in zip(events, bars):
        prices = {k: round(bar[k] * 10**9) for k in ("open", "high", "low", "close")}
        event["open"], event["volume"] = prices["open"], round(bar["volume"] * 10**4)
        event["high_ticks"] = (prices["high"] - prices["open"]) // tick
        event["low_ticks"] = (prices["open"] - prices["low"]) // tick
        event["close_ticks"] = (prices["close"] - prices["open"]) // tick
    return events


def test_adx_same_as_talib(bars: list[dict[str, float]], expected: dict[str, list[float]]) -> None:
    values = over_events(built.adx, bar_events(bars, 10**7), window=14, tick=10**7)
    agree([value for value, _, _ in values], expected["ADX14"])


def test_atr_and_obv_same_as_talib(bars: list[dict[str, float]], expected: dict[str, list[float]]) -> None:
    events = bar_events(bars, 10**7)
    agree(over_events(built.atr, events, window=14, tick=10**7), expected["ATR14"])
    agree(over_events(built.obv, events, tick=10**7, exponent=4), expected["OBV"], within=2e-3)


def test_whole_series_figures(bars: list[dict[str, float]]) -> None:
    wanted = json.loads((DATA / "expected.json").read_text())
    closes = [bar["close"] for bar in bars]
    slope, value, r2 = series(built.linear_regression, closes, window=2000)[-1]
    line = wanted["ols_close_on_index"]
    assert slope == pytest.approx(line["slope"], rel=1e-11)
    assert value - 1999 * slope == pytest.approx(line["intercept"], rel=1e-12)
    assert r2 == pytest.approx(line["r2"], rel=1e-10)
    volatility = series(built.realised_volatility, closes, window=1999, centred=True)[-1]
    assert volatility == pytest.approx(wanted["logret"]["std_ddof1"], rel=1e-12)
    events = trades(closes, [round(bar["volume"] * 10**4) for bar in bars])
    assert over_events(built.vwap, events)[-1] == pytest.approx(wanted["vwap_close"], rel=1e-14)


# ---------------------------------------------------------------- exact definitions

WALKS = st.lists(st.integers(-5, 5) | st.sampled_from([-4000, 4000]), min_size=3, max_size=120)


def walk(steps: list[int]) -> list[float]:
    """Prices in cents around 60,000, with some jumps."""
    return [cents / 100 for cents in np.cumsum([6_000_000, *steps])]


def reach(xs: list[float], k: int, window: int) -> float:
    """Largest distance between values of the last two windows."""
    recent = xs[max(0, k + 1 - 2 * window) : k + 1]
    return max(recent) - min(recent)


@settings(max_examples=40, deadline=None)
@given(WALKS, st.integers(2, 16))
def test_rolling_mean_and_std_within_their_bound(steps: list[int], window: int) -> None:
    xs = walk(steps)
    means, stds, zs = Run(built.sma, True, window=16), Run(built.rolling_std, True, window=16), Run(built.zscore, True, window=16)
    for k, x in enumerate(xs):
        mean, std, z = (run(None, x, window=window)[0] for run in (means, stds, zs))
        recent = [Fraction(v) for v in xs[max(0, k + 1 - window) : k + 1]]
        if len(recent) < window:
            assert math.isnan(mean)
            assert math.isnan(std)
            continue
        exact_mean = sum(recent) / window
        exact_variance = sum((v - exact_mean) ** 2 for v in recent) / window
        distance = Fraction(reach(xs, k, window))
        assert abs(Fraction(mean) - exact_mean) <= Fraction(ROUNDING) * (4 * window * distance + 2 * abs(exact_mean))
        bound = 20 * Fraction(ROUNDING) * (window + 4) * distance**2
        assert abs(Fraction(std) ** 2 - exact_variance) <= bound + exact_variance * Fraction(ROUNDING) * 8
        if exact_variance == 0:
            assert std == 0.0
            assert math.isnan(z)
        elif exact_variance > bound:
            assert z == pytest.approx(float(Fraction(x) - exact_mean) / math.sqrt(exact_variance), rel=1e-6, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(WALKS, st.integers(2, 16))
def test_regression_within_its_bound(steps: list[int], window: int) -> None:
    xs = walk(steps)
    run = Run(built.linear_regression, True, window=16)
    for k, x in enumerate(xs):
        slope, value, r2 = run(None, x, window=window)[0]
        if k + 1 < window:
            assert math.isnan(slope)
            continue
        recent = [Fraction(v) for v in xs[k + 1 - window : k + 1]]
        centre, mean = Fraction(window - 1, 2), sum(recent) / window
        exact = sum((i - centre) * v for i, v in enumerate(recent)) / sum((i - centre) ** 2 for i in range(window))
        distance = Fraction(reach(xs, k, window))
        assert abs(Fraction(slope) - exact) <= 100 * Fraction(ROUNDING) * distance
        assert abs(Fraction(value) - (mean + exact * centre)) <= Fraction(ROUNDING) * ((60 * window + 10) * distance + 4 * abs(mean))
        assert math.isnan(r2) or 0.0 <= r2 <= 1.0
        if len(set(recent)) == 1:
            assert math.isnan(r2)


def test_long_runs_do_not_drift() -> None:
    rng = np.random.default_rng(7)
    xs = 60_000 + np.cumsum(rng.integers(-3, 4, 5_000)) / 100
    run = Run(built.linear_regression, True, window=50)
    std = Run(built.rolling_std, True, window=50)
    worst = 0.0
    for k, x in enumerate(xs):
        slope, deviation = run(None, x)[0][0], std(None, x)[0]
        if k > 50 and k % 97 == 0:
            recent = xs[k - 49 : k + 1] - xs[k]
            worst = max(worst, abs(slope - np.polyfit(np.arange(50), recent, 1)[0]), abs(deviation - np.std(recent)))
    assert worst < 1e-11


@pytest.mark.parametrize("made", [built.sma, built.rolling_std, built.linear_regression])
def test_a_window_can_change_while_it_runs(made: Any) -> None:
    xs = walk([3, -1, 4, 1, -5, 9, 2, -6, 5, 3, -5, 8, 9, -7, 9, 3, 2, -3, 8, 4])
    run = Run(made, True, window=16)
    for k, x in enumerate(xs):
        window = 12 if k < 9 else 4 if k < 13 else 7
        got = run(None, x, window=window)[0]
    wanted = series(made, xs, window=7)[-1]
    np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_a_window_larger_than_its_state_is_cut() -> None:
    run = Run(built.sma, True, window=4)
    assert [run(None, float(x), window=1000)[0] for x in range(6)][-1] != 0.0
    assert run.state["n"][0] == 4


@pytest.mark.parametrize("made", [built.sma, built.rolling_std])
def test_an_infinite_value_is_forgotten(made: Any) -> None:
    run = Run(made, True, window=4)
    values = [run(None, x)[0] for x in (1.0, 2.0, math.inf, *[3.0] * 12)]
    assert values[-1] == (3.0 if made is built.sma else 0.0)


# ---------------------------------------------------------------- the others


def test_ema_from_the_first_value() -> None:
    xs = [10.0, 11.0, 9.5, 12.25]
    value = xs[0]
    wanted = [value := value + 2 / 6 * (x - value) if k else value for k, x in enumerate(xs)]
    assert series(built.ema, xs, window=5) == wanted


def test_rsi_says_nothing_while_nothing_moves() -> None:
    assert all(math.isnan(v) for v in series(built.rsi, [5.0] * 30, window=3))
    assert series(built.rsi, [1.0, 2.0, 3.0, 4.0, 5.0], window=3)[-1] == 100.0


def test_realised_volatility() -> None:
    xs = [100.0, 101.0, 100.5, 102.0, 101.0, 103.0]
    returns = np.diff(np.log(xs))
    got = series(built.realised_volatility, xs, window=3, scale=10.0)
    assert got[-1] == pytest.approx(10 * math.sqrt(np.mean(returns[-3:] ** 2)), rel=1e-13)
    assert math.isnan(got[2])
    assert series(built.realised_volatility, xs, window=3, centred=True)[-1] == pytest.approx(np.std(returns[-3:], ddof=1), rel=1e-12)


def test_a_price_of_zero_or_less_leaves_volatility_alone() -> None:
    got = series(built.realised_volatility, [100.0, 101.0, -37.0, 0.0, 102.0], window=2)
    assert got[-1] == pytest.approx(math.sqrt((math.log(1.01) ** 2 + math.log(102 / 101) ** 2) / 2), rel=1e-12)


TRADES = st.lists(st.tuples(st.integers(-(10**12), 10**14), st.integers(0, 10**12)), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(TRADES, st.integers(1, 16))
def test_vwap_is_exact_to_the_last_digit(rows: list[tuple[int, int]], window: int) -> None:
    events = np.zeros(len(rows), ANY_VIEW)
    events["price"], events["qty"] = [p for p, _ in rows], [q for _, q in rows]
    whole = over_events(built.vwap, events)
    run = Run(built.vwap_window, True, window=16)
    rolling = [run(event, window=window)[0] for event in records(events)]
    for k in range(len(rows)):
        for got, recent in ((whole[k], rows[: k + 1]), (rolling[k], rows[max(0, k + 1 - window) : k + 1])):
            volume = sum(q for _, q in recent)
            if volume == 0:
                assert math.isnan(got)
                continue
            exact = Fraction(sum(p * q for p, q in recent), volume * 10**9)
            assert abs(Fraction(got) - exact) <= abs(exact) * Fraction(2) ** -50


def test_vwap_by_session() -> None:
    events = trades([10, 20, 30, 40], [1, 1, 1, 3], step_ns=600_000_000)
    assert over_events(built.vwap, events, session_ms=1000) == [10.0, 20.0, 25.0, 40.0]
    assert over_events(built.vwap, events, session_ms=1000, offset_ms=500) == [10.0, 15.0, 30.0, 37.5]


def test_vwap_decay_halves_the_weight() -> None:
    events = trades([10, 20], [4, 4], step_ns=1_000_000_000)
    assert over_events(built.vwap_decay, events, halflife_ms=1000.0)[-1] == pytest.approx((10 * 2 + 20 * 4) / 6, rel=1e-15)


def test_top_of_book() -> None:
    event = quote(100 * 10**9, 300, 102 * 10**9, 100)
    assert Run(built.book_imbalance, True)(event)[0] == 0.5
    assert Run(built.microprice, True)(event)[0] == 101.5
    for empty in (quote(bid=1, bid_qty=1), quote(ask=1, ask_qty=1), quote(1, 0, 2, 0)):
        assert math.isnan(Run(built.book_imbalance, True)(empty)[0])
        assert math.isnan(Run(built.microprice, True)(empty)[0])
    assert quote().ask == NO_PRICE


def test_bar_prices() -> None:
    events = bar_events([{"open": 10.0, "high": 10.5, "low": 9.75, "close": 9.8, "volume": 12.5}], 10**7)
    assert over_events(built.bar_prices, events, tick=10**7, exponent=4) == [(9.8, 10.0, 10.5, 9.75, 12.5)]


def exact_adx(bars: list[tuple[int, int, int]], window: int) -> list[tuple[Fraction | None, Fraction | None, Fraction | None]]:
    """Wilder's definition in fractions, over (high, low, close): (ADX, +DI, -DI) of each bar, None where there is none yet."""
    moves = []
    for (high, low, _), (last_high, last_low, last_close) in zip(bars[1:], bars):
        rise, fall = high - last_high, last_low - low
        moves.append((rise * (rise > fall and rise > 0), fall * (fall > rise and fall > 0), max(high, last_close) - min(low, last_close)))
    found: list[tuple[Fraction | None, Fraction | None, Fraction | None]] = [(None, None, None)] * min(window, len(bars))
    sums = [Fraction(sum(move[k] for move in moves[: window - 1])) for k in range(3)]
    indices: list[Fraction | None] = []
    average = Fraction(0)
    for move in moves[window - 1 :]:
        sums = [total - total / window + new for total, new in zip(sums, move)]
        up, down, span = sums
        indices.append(100 * abs(up - down) / (up + down) if up + down else None)
        if len(indices) <= window:
            average = sum((i for i in indices if i is not None), Fraction(0)) / window
        elif indices[-1] is not None:
            average = (average * (window - 1) + indices[-1]) / window
        di = (100 * up / span, 100 * down / span) if span else (None, None)
        found.append((average if len(indices) >= window else None, *di))
    return found


BARS = st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None)
@given(BARS, st.integers(1, 9))
def test_adx_is_wilders_definition(rows: list[tuple[int, int, int]], window: int) -> None:
    events, bars, middle = np.zeros(len(rows), ANY_VIEW), [], 1000
    for event, (step, above, below) in zip(events, rows):
        middle += step
        event["open"], event["high_ticks"], event["low_ticks"], event["close_ticks"] = middle, above, below, above - below
        bars.append((middle + above, middle - below, middle + above - below))
    for got, wanted in zip(over_events(built.adx, events, window=window, tick=1), exact_adx(bars, window)):
        for value, exact in zip(got, wanted):
            assert math.isnan(value) if exact is None else value == pytest.approx(float(exact), rel=1e-12, abs=1e-9)


def test_adx_of_a_steady_rise_and_of_a_market_that_stands_still() -> None:
    steps = [{"open": 10.0 + k, "high": 10.5 + k, "low": 9.5 + k, "close": 10.0 + k, "volume": 1.0} for k in range(12)]
    assert over_events(built.adx, bar_events(steps, 10**7), window=3, tick=10**7)[-1] == pytest.approx((100.0, 100 / 1.5, 0.0))
    average, *indicators = over_events(built.adx, bar_events([{**steps[0], "high": 10.0, "low": 10.0}] * 12, 10**7), window=3)[-1]
    assert average == 0.0
    assert all(math.isnan(value) for value in indicators)


def test_cross_intent() -> None:
    run = Run(built.cross_intent, True)
    event = records(trades([50.0]))[0]
    decisions = [run(event, x, 10.0, qty=5)[0] for x in (9.0, 9.5, 11.0, 12.0, 10.0, 9.0)]
    assert decisions == [False, False, True, False, False, True]
    _, out = run(quote(49 * 10**9, 1, 51 * 10**9, 1), 11.0, 10.0, qty=5)
    assert (out.side, out.price, out.qty) == (0, 51 * 10**9, 5)
    run(event, 9.0, 10.0)
    assert run(quote(bid=49 * 10**9, bid_qty=1), 11.0, 10.0)[0] is False


# ---------------------------------------------------------------- logarithm and exponential


def ulps(got: float, exact: Fraction) -> float:
    return float(abs(Fraction(got) - exact) / Fraction(math.ulp(got)))


@settings(max_examples=300, deadline=None)
@given(st.floats(min_value=5e-324, allow_infinity=False, allow_nan=False) | st.floats(0.9, 1.1))
def test_log_within_one_ulp(x: float) -> None:
    with localcontext(prec=60):
        assert ulps(log(x), Fraction(Decimal(x).ln())) < 1.0 or log(x) == math.log(x) == 0.0


@settings(max_examples=300, deadline=None)
@given(st.floats(-745, 709.7) | st.floats(-0.1, 0.1))
def test_exp_within_one_ulp(x: float) -> None:
    with localcontext(prec=60):
        assert ulps(exp(x), Fraction(Decimal(x).exp())) < 1.0


def test_log_and_exp_at_their_ends() -> None:
    assert log(0.0) == -math.inf
    assert math.isnan(log(-1.0))
    assert math.isnan(log(math.nan))
    assert log(math.inf) == math.inf
    assert log(1.0) == 0.0
    assert exp(-1000.0) == 0.0
    assert exp(1000.0) == math.inf
    assert math.isnan(exp(math.nan))
    assert exp(0.0) == 1.0
