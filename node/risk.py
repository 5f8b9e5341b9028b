"""Risk limits: every order intent of a calculation gets one decision, in exact integer arithmetic.

:func:`risk_check` is a kernel over plain records; limits are one :data:`LIMITS` record, swapped live. Nothing rounds: quantities and
notionals are compared as 128-bit integers, prices as integers, rates over event time.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np

from tickmesh.node.event import ASK, BID, NO_PRICE, Flag, Kind, RiskReason
from tickmesh.node.exact_math import magnitude, multiply_saturating, multiply_wide
from tickmesh.transports.toolbox import inlined

NO_LIMIT = -1
RATE_SLICES = 16
"""A rate's window is counted in this many slices; see :func:`risk_check`."""

LIMITS = np.dtype(
    [
        ("max_qty", "<i8"),
        ("max_notional", "<i8"),
        ("price_collar", "<i8"),
        ("max_rate", "<i8"),
        ("max_rate_total", "<i8"),
        ("slice_ns", "<i8"),
        ("kill_switch", "u1"),
        ("collar_from_mid", "u1"),
        ("_unused", "u1", (6,)),
    ]
)
"""The limits, each :data:`NO_LIMIT` where there is none: `max_qty` in 1e-9 whole units, `max_notional` in 1e-4 of the quote currency,
`price_collar` in 1e-6 of the reference price, rates in intents per 16 slices of `slice_ns`. Made by :func:`make_limits`."""

RISK_STATE = np.dtype([("newest", "<i8"), ("slice_ns", "<i8"), ("total", "<i8"), ("counts", "<i4", (RATE_SLICES + 1,)), ("_unused", "<i4")])
"""Accepted intents by slice of event time: one record per instrument, one for the whole shard."""

_QTY_UNITS, _NOTIONAL_UNITS, _COLLAR_UNITS = 9, 4, 6
_PRICE_TO_NOTIONAL = 5
_PRICE_MAX = np.int64(1 << 62)
_I64_MAX = (1 << 63) - 1
_U = np.uint64
_BID, _ASK, _NO_PRICE = np.uint8(BID), np.uint8(ASK), np.int64(NO_PRICE)
_STALE, _HALTED = np.uint16(Flag.STALE), np.uint16(Flag.HALTED)
_RISK, _REFUSED = np.uint8(Kind.RISK), np.uint16(Flag.REFUSED)
_SLOTS = np.int64(RATE_SLICES + 1)
_ACCEPTED = np.int64(RiskReason.ACCEPTED)
_KILL_SWITCH, _MAX_QTY, _MAX_NOTIONAL = np.int64(RiskReason.KILL_SWITCH), np.int64(RiskReason.MAX_QTY), np.int64(RiskReason.MAX_NOTIONAL)
_PRICE_COLLAR, _MAX_RATE, _NO_BOOK = np.int64(RiskReason.PRICE_COLLAR), np.int64(RiskReason.MAX_RATE), np.int64(RiskReason.NO_BOOK)
_STALE_BOOK, _HALTED_BOOK = np.int64(RiskReason.STALE_BOOK), np.int64(RiskReason.HALTED_BOOK)
_BAD_INTENT = np.int64(RiskReason.BAD_INTENT)


class LimitError(ValueError):
    """A limit that cannot be held exactly: its `name`, its `value` and what is wrong."""

    def __init__(self, name: str, value: object, reason: str) -> None:
        super().__init__(f"{name} = {value}: {reason}")
        self.name, self.value = name, value


# ---------------------------------------------------------------- limits


def make_limits(
    *,
    max_qty: Decimal | int | str | None = None,
    max_notional: Decimal | int | str | None = None,
    price_collar_bps: Decimal | float | str | None = None,
    max_rate: int | None = None,
    max_rate_total: int | None = None,
    rate_window_ms: float = 1000.0,
    kill_switch: bool = False,
    collar_reference: str = "opposite",
) -> np.ndarray[Any, Any]:
    """Limits as an array of one :data:`LIMITS` record.

    Args:
        max_qty: largest quantity of one intent in whole units (1.5 coins, 100 shares), to 1e-9.
        max_notional: largest price x quantity of one intent in the quote currency, to 1e-4.
        price_collar_bps: largest distance of an intent's price from the reference, in 1/10,000 of it, to 0.01 bps.
        max_rate: most accepted intents of one instrument in a window.
        max_rate_total: most accepted intents of the whole shard in a window.
        rate_window_ms: length of the window in event time.
        kill_switch: refuse everything.
        collar_reference: ``opposite`` (the best price that the intent would trade with) or ``mid``.

    Raises:
        LimitError: a limit is negative, too large or too fine to be held exactly.
    """
    if collar_reference not in ("opposite", "mid"):
        raise LimitError("collar_reference", collar_reference, "use opposite or mid")
    if not 0 < rate_window_ms <= 366 * 86_400_000:
        raise LimitError("rate_window_ms", rate_window_ms, "it must be above 0 and at most 366 days")
    limits = np.zeros(1, LIMITS)
    limits["max_qty"] = _exact("max_qty", max_qty, _QTY_UNITS)
    limits["max_notional"] = _exact("max_notional", max_notional, _NOTIONAL_UNITS)
    limits["price_collar"] = _exact("price_collar_bps", price_collar_bps, _COLLAR_UNITS - 4)
    limits["max_rate"] = _exact("max_rate", max_rate, 0)
    limits["max_rate_total"] = _exact("max_rate_total", max_rate_total, 0)
    limits["slice_ns"] = -(-int(Decimal(str(rate_window_ms)) * 1_000_000) // RATE_SLICES) or 1
    limits["kill_switch"] = kill_switch
    limits["collar_from_mid"] = collar_reference == "mid"
    return limits


def _exact(name: str, value: Decimal | float | str | None, decimals: int) -> int:
    if value is None:
        return NO_LIMIT
    scaled = Decimal(str(value)).scaleb(decimals)
    if scaled != scaled.to_integral_value():
        raise LimitError(name, value, f"it has more than {decimals} decimals")
    if not 0 <= scaled <= _I64_MAX:
        raise LimitError(name, value, "it must not be negative" if scaled < 0 else f"it is above {Decimal(_I64_MAX).scaleb(-decimals)}")
    return int(scaled)


def no_limits() -> np.ndarray[Any, Any]:
    """Limits that only refuse intents without a sound book or with nonsense in them."""
    return make_limits()


def make_risk_state(instruments_max: int) -> np.ndarray[Any, Any]:
    """Rate counters: one :data:`RISK_STATE` record per instrument, and the shard's as the last."""
    return np.zeros(instruments_max + 1, RISK_STATE)


# ---------------------------------------------------------------- kernels


@inlined
def risk_check(limits: Any, state: Any, total: Any, intent: Any, bid: Any, ask: Any, flags: Any, exponent: Any) -> Any:
    """The decision on an intent, a :class:`RiskReason` as i64; the first that applies, in the order of the code below.

    An accepted intent is counted in `state` and `total`. A rate limit holds over every window: of `window_ms` of event time, however it
    lies, never more than the limit are accepted (a window is counted in 16 slices, and the slice it begins in counts in full, so an
    intent can be refused up to a 16th of a window early). Event time that goes back counts in the newest slice.

    Args:
        limits: LIMITS record.
        state, total: RISK_STATE records of the instrument and of the shard.
        intent: event with `ts_event`, `side` (BID buys, ASK sells), `price` (1e-9) and `qty` (in `exponent`).
        bid, ask: i64 best prices (1e-9), NO_PRICE where a side is empty.
        flags: u16 state flags of the book (STALE, HALTED).
        exponent: quantity exponent of the instrument, 0 … 18.
    """
    if limits.kill_switch != 0:
        return _KILL_SWITCH
    if (intent.side != _BID and intent.side != _ASK) or intent.qty <= 0 or not _usable(intent.price):
        return _BAD_INTENT
    if flags & _STALE:
        return _STALE_BOOK
    if flags & _HALTED:
        return _HALTED_BOOK
    if bid == _NO_PRICE and ask == _NO_PRICE:
        return _NO_BOOK
    qty = _U(intent.qty)
    if limits.max_qty >= 0 and _exceeds(_U(0), qty, np.int64(_QTY_UNITS), limits.max_qty, exponent):
        return _MAX_QTY
    high, low = multiply_wide(magnitude(intent.price), qty)
    if limits.max_notional >= 0 and _exceeds(high, low, np.int64(0), limits.max_notional, exponent + np.int64(_PRICE_TO_NOTIONAL)):
        return _MAX_NOTIONAL
    if limits.price_collar >= 0:
        reason = _collar(limits, intent, bid, ask)
        if reason != _ACCEPTED:
            return reason
    return _rate(limits, state, total, intent.ts_event)


@inlined
def risk_fill(out: Any, intent: Any, reason: Any) -> None:
    """The body of a RISK event: the intent's side, price and quantity, `id` = its output sequence, `aux` = the reason."""
    out.kind = _RISK
    out.side = intent.side
    out.flags = np.uint16(0) if reason == _ACCEPTED else _REFUSED
    out.price = intent.price
    out.qty = intent.qty
    out.id = intent.seq
    out.aux = reason


@inlined
def _scaled(high: Any, low: Any, tens: Any) -> Any:
    """128-bit ``(high, low) * 10**tens``, saturating."""
    for _ in range(tens):
        high, low = multiply_saturating(high, low, _U(10))
    return high, low


@inlined
def _exceeds(high: Any, low: Any, value_tens: Any, limit: Any, limit_tens: Any) -> Any:
    """Whether ``(high, low) * 10**value_tens > limit * 10**limit_tens``; only one side is ever scaled, so a saturated limit is above."""
    tens = limit_tens - value_tens
    value_high, value_low = _scaled(high, low, -tens)
    limit_high, limit_low = _scaled(_U(0), _U(limit), tens)
    return value_high > limit_high or (value_high == limit_high and value_low > limit_low)


@inlined
def _collar(limits: Any, intent: Any, bid: Any, ask: Any) -> Any:
    """Whether the price is too far from its reference: ``|price - reference| * 10**6 > collar * |reference|``, both sides doubled."""
    first = ask if intent.side == _BID else bid
    second = first
    if limits.collar_from_mid != 0:
        first = bid
        second = ask
    if not _usable(first) or not _usable(second):
        return _NO_BOOK
    away = _sum_magnitude(intent.price - first, intent.price - second)
    reference = _sum_magnitude(first, second)
    left_high, left_low = multiply_wide(away, _U(10**_COLLAR_UNITS))
    right_high, right_low = multiply_wide(reference, _U(limits.price_collar))
    beyond = left_high > right_high or (left_high == right_high and left_low > right_low)
    return _PRICE_COLLAR if beyond else _ACCEPTED


@inlined
def _sum_magnitude(a: Any, b: Any) -> Any:
    """|a + b| as u64, exact for i64 above -2**63."""
    return magnitude(a) + magnitude(b) if (a < 0) == (b < 0) else magnitude(a + b)


@inlined
def _usable(price: Any) -> Any:
    """Whether there is a price and the collar's arithmetic is exact for it: within 2**62 (4.6e9 in currency)."""
    return -_PRICE_MAX < price < _PRICE_MAX


@inlined
def _rate(limits: Any, state: Any, total: Any, ts_event: Any) -> Any:
    """Whether one more intent fits into both windows; if so it is counted in both."""
    if limits.max_rate < 0 and limits.max_rate_total < 0:
        return _ACCEPTED
    _advance(state, limits.slice_ns, ts_event)
    _advance(total, limits.slice_ns, ts_event)
    if limits.max_rate >= 0 and state.total >= limits.max_rate:
        return _MAX_RATE
    if limits.max_rate_total >= 0 and total.total >= limits.max_rate_total:
        return _MAX_RATE
    _count(state)
    _count(total)
    return _ACCEPTED


@inlined
def _advance(state: Any, slice_ns: Any, ts_event: Any) -> None:
    """Move the counters to the slice of `ts_event`, forgetting what the window has left behind. A new slice length starts anew."""
    if state.slice_ns != slice_ns:
        state.slice_ns = slice_ns
        state.newest = ts_event // slice_ns
        state.total = 0
        for k in range(_SLOTS):
            state.counts[k] = 0
    gone = min(ts_event // slice_ns - state.newest, _SLOTS)
    for k in range(gone):
        slot = (state.newest + np.int64(1) + k) % _SLOTS
        state.total -= np.int64(state.counts[slot])
        state.counts[slot] = 0
    state.newest = max(state.newest, ts_event // slice_ns)


@inlined
def _count(state: Any) -> None:
    state.counts[state.newest % _SLOTS] += np.int32(1)
    state.total += 1
