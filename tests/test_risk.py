"""Risk limits against a definition in whole numbers and fractions, and the rate limit against a list of times."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from calculation_twins import interpreted
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node.calculation import PlainRecord
from tickmesh.node.event import ASK, BID, EVENT, NO_PRICE, NO_SIDE, Flag, Kind, RiskReason
from tickmesh.node.exact_math import add_product, multiply_saturating, multiply_wide, wide_float
from tickmesh.node.risk import LimitError, make_limits, make_risk_state, no_limits, risk_check, risk_fill

CENT = 10**7


def check(limits: Any, intent: Any, bid: int, ask: int, flags: int = 0, exponent: int = 0, risk: Any = None) -> RiskReason:
    risk = make_risk_state(1) if risk is None else risk
    return RiskReason(risk_check(limits[0], risk[0], risk[-1], intent[0], bid, ask, np.uint16(flags), exponent))


def intent_at(price: int, qty: int = 1, side: int = BID, ts_event: int = 0) -> Any:
    intent = np.zeros(1, EVENT)
    intent["kind"], intent["price"], intent["qty"], intent["side"], intent["ts_event"] = Kind.INTENT, price, qty, side, ts_event
    return intent


def test_accepts_without_limits() -> None:
    assert check(no_limits(), intent_at(100 * CENT), 99 * CENT, 101 * CENT) is RiskReason.ACCEPTED


@pytest.mark.parametrize(
    ("intent", "book", "flags", "reason"),
    [
        (intent_at(1, side=NO_SIDE), (1, 2), 0, RiskReason.BAD_INTENT),
        (intent_at(1, qty=0), (1, 2), 0, RiskReason.BAD_INTENT),
        (intent_at(NO_PRICE), (1, 2), 0, RiskReason.BAD_INTENT),
        (intent_at(1), (1, 2), Flag.STALE, RiskReason.STALE_BOOK),
        (intent_at(1), (1, 2), Flag.HALTED, RiskReason.HALTED_BOOK),
        (intent_at(1), (NO_PRICE, NO_PRICE), 0, RiskReason.NO_BOOK),
        (intent_at(1), (1, NO_PRICE), 0, RiskReason.ACCEPTED),
        (intent_at(1), (1, 2), Flag.LOCKED, RiskReason.ACCEPTED),
    ],
)
def test_the_book_and_the_intent_must_be_sound(intent: Any, book: tuple[int, int], flags: int, reason: RiskReason) -> None:
    assert check(no_limits(), intent, *book, flags=flags) is reason


def test_kill_switch_comes_first() -> None:
    assert check(make_limits(kill_switch=True), intent_at(NO_PRICE), NO_PRICE, NO_PRICE) is RiskReason.KILL_SWITCH


def test_collar_needs_its_reference() -> None:
    opposite, mid = make_limits(price_collar_bps=10), make_limits(price_collar_bps=10, collar_reference="mid")
    assert check(opposite, intent_at(100, side=BID), 100, NO_PRICE) is RiskReason.NO_BOOK
    assert check(opposite, intent_at(100, side=ASK), 100, NO_PRICE) is RiskReason.ACCEPTED
    assert check(mid, intent_at(100, side=ASK), 100, NO_PRICE) is RiskReason.NO_BOOK


def test_collar_is_exact_at_its_edge() -> None:
    limits = make_limits(price_collar_bps=25)
    bid, ask = 9_990 * CENT, 10_000 * CENT
    assert check(limits, intent_at(10_025 * CENT), bid, ask) is RiskReason.ACCEPTED
    assert check(limits, intent_at(10_025 * CENT + 1), bid, ask) is RiskReason.PRICE_COLLAR
    assert check(limits, intent_at(9_975 * CENT), bid, ask) is RiskReason.ACCEPTED
    assert check(limits, intent_at(9_975 * CENT - 1), bid, ask) is RiskReason.PRICE_COLLAR


prices = st.integers(-(2**62) + 1, 2**62 - 1) | st.integers(1, 10**14)
quantities = st.integers(1, 2**63 - 1) | st.integers(1, 10**6)


@settings(max_examples=300, deadline=None)
@given(
    prices, quantities, st.sampled_from([BID, ASK]), prices, prices, st.integers(0, 18),
    st.none() | st.integers(0, 2**63 - 1).map(lambda n: Decimal(n).scaleb(-9)),
    st.none() | st.integers(0, 2**63 - 1).map(lambda n: Decimal(n).scaleb(-4)),
    st.none() | st.integers(0, 10**6).map(lambda n: Decimal(n).scaleb(-2)),
    st.sampled_from(["opposite", "mid"]),
)  # fmt: skip
def test_limits_are_exact(
    price: int, qty: int, side: int, bid: int, ask: int, exponent: int,
    max_qty: Decimal | None, max_notional: Decimal | None, collar: Decimal | None, reference: str,
) -> None:  # fmt: skip
    limits = make_limits(max_qty=max_qty, max_notional=max_notional, price_collar_bps=collar, collar_reference=reference)
    units = Fraction(qty, 10**exponent)
    around = Fraction(bid + ask, 2) if reference == "mid" else Fraction(ask if side == BID else bid)
    wanted = RiskReason.ACCEPTED
    if max_qty is not None and units > Fraction(max_qty):
        wanted = RiskReason.MAX_QTY
    elif max_notional is not None and abs(price) * units / 10**9 > Fraction(max_notional):
        wanted = RiskReason.MAX_NOTIONAL
    elif collar is not None and abs(price - around) * 10_000 > Fraction(collar) * abs(around):
        wanted = RiskReason.PRICE_COLLAR
    assert check(limits, intent_at(price, qty, side), bid, ask, exponent=exponent) is wanted


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 2)), min_size=1, max_size=120), st.integers(0, 4), st.integers(0, 6))
def test_no_window_holds_more_than_the_rate(steps: list[tuple[int, int]], each: int, total: int) -> None:
    limits, risk = make_limits(max_rate=each, max_rate_total=total, rate_window_ms=1), make_risk_state(3)
    accepted: list[tuple[int, int]] = []
    clock = 0
    for step, instrument in steps:
        clock += step * 1000
        intent = intent_at(100, ts_event=clock)
        reason = risk_check(limits[0], risk[instrument], risk[3], intent[0], 99, 101, np.uint16(0), 0)
        recent = [i for t, i in accepted if clock - t <= 1_000_000]
        longer = [i for t, i in accepted if clock - t <= 1_000_000 * 18 // 16]
        if reason == RiskReason.ACCEPTED:
            accepted.append((clock, instrument))
            assert recent.count(instrument) < each
            assert len(recent) < total
        else:
            assert reason == RiskReason.MAX_RATE
            assert longer.count(instrument) >= each or len(longer) >= total


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-(10**6), 10**7), prices, quantities, st.sampled_from([BID, ASK, NO_SIDE])), max_size=30),
    st.integers(0, 5), st.booleans(),
)  # fmt: skip
def test_compiled_and_interpreted_agree(rows: list[tuple[int, int, int, int]], rate: int, mid: bool) -> None:
    reference = "mid" if mid else "opposite"
    amounts = {"max_qty": 10**5, "max_notional": 10**7}
    limits = make_limits(**amounts, price_collar_bps=500, max_rate=rate, rate_window_ms=2.5, collar_reference=reference)
    slow = interpreted(risk_check.py_func)
    risks = [make_risk_state(1), make_risk_state(1)]
    clock = 10**15
    for wait, price, qty, side in rows:
        clock += wait
        intent = intent_at(price, qty, side, clock)
        records = PlainRecord(limits[0]), PlainRecord(intent[0])
        twin = [PlainRecord(row) for row in risks[1]]
        with np.errstate(all="ignore"):
            wanted = slow(records[0], twin[0], twin[1], records[1], np.int64(price - 3), np.int64(price + 4), np.uint16(0), np.int64(2))
        assert check(limits, intent, price - 3, price + 4, exponent=2, risk=risks[0]) == wanted
        assert risks[0].tobytes() == risks[1].tobytes()


def test_a_new_window_length_starts_counting_anew() -> None:
    risk = make_risk_state(1)
    limits = make_limits(max_rate=1, rate_window_ms=1000)
    assert check(limits, intent_at(100), 99, 101, risk=risk) is RiskReason.ACCEPTED
    assert check(limits, intent_at(100), 99, 101, risk=risk) is RiskReason.MAX_RATE
    assert check(make_limits(max_rate=1, rate_window_ms=500), intent_at(100), 99, 101, risk=risk) is RiskReason.ACCEPTED


def test_decision_event() -> None:
    intent, out = intent_at(100, 7, ASK), np.zeros(1, EVENT)
    intent["seq"] = 42
    risk_fill(out[0], intent[0], np.int64(RiskReason.MAX_QTY))
    row = out[0]
    assert (row["kind"], row["side"], row["price"], row["qty"], row["id"], row["aux"]) == (Kind.RISK, ASK, 100, 7, 42, RiskReason.MAX_QTY)
    assert row["flags"] == Flag.REFUSED
    risk_fill(out[0], intent[0], np.int64(RiskReason.ACCEPTED))
    assert row["flags"] == 0


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        ({"max_qty": "0.0000000001"}, "max_qty"),
        ({"max_notional": -1}, "max_notional"),
        ({"max_notional": 10**16}, "max_notional"),
        ({"price_collar_bps": 0.001}, "price_collar_bps"),
        ({"max_rate": 1.5}, "max_rate"),
        ({"rate_window_ms": 0}, "rate_window_ms"),
        ({"collar_reference": "last"}, "collar_reference"),
    ],
)
def test_limits_that_cannot_be_held_exactly_are_refused(limits: dict[str, Any], name: str) -> None:
    with pytest.raises(LimitError) as caught:
        make_limits(**limits)
    assert caught.value.name == name


# ---------------------------------------------------------------- 128-bit arithmetic

u64 = st.integers(0, 2**64 - 1)
i64 = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=200, deadline=None)
@given(u64, u64, u64)
def test_wide_products(a: int, b: int, c: int) -> None:
    high, low = multiply_wide(np.uint64(a), np.uint64(b))
    assert (int(high) << 64 | int(low)) == a * b
    high, low = multiply_saturating(np.uint64(a), np.uint64(b), np.uint64(c))
    assert (int(high) << 64 | int(low)) == min((a << 64 | b) * c, 2**128 - 1)


@settings(max_examples=200, deadline=None)
@given(st.integers(-(2**126), 2**126 - 1), i64, i64)
def test_signed_wide_sums(start: int, a: int, b: int) -> None:
    high, low = add_product(np.int64(start >> 64), np.uint64(start & (2**64 - 1)), np.int64(a), np.int64(b))
    total = start + a * b
    assert (int(high) << 64) + int(low) == total
    value = wide_float(np.int64(high), np.uint64(low))
    assert abs(Fraction(value) - total) <= Fraction(abs(total), 2**52)
