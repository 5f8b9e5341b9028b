"""The matching engine against a slow twin made of sorted lists, and its invariants: never crossed, fills at the resting price, FIFO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bounds import with_bounds_checks
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.ops.matching_engine import (
    ASK,
    BID,
    IOC,
    LIMIT,
    MARKET,
    NOTHING_RESTS,
    POST_ONLY,
    REFUSALS,
    REFUSED_BAND,
    REFUSED_FULL,
    REFUSED_HALTED,
    REFUSED_QTY,
    REFUSED_UNKNOWN,
    REFUSED_WOULD_CROSS,
    Engine,
    book_levels,
    engine_reduce,
    engine_replace,
    engine_submit,
    live_slots,
    make_engine,
    queue,
)

TICKS, CAPACITY, FILLS_MAX = 128, 6, 4


class Twin:
    """The same rules with lists: orders are [ref, instrument, side, qty, tick]."""

    def __init__(self) -> None:
        self.orders: list[list[int]] = []
        self.next_ref = self.next_match = 1
        self.fills: list[tuple[int, int, int, int, int]] = []
        self.halted = [False, False]

    def _side(self, instrument: int, side: int) -> list[list[int]]:
        held = [o for o in self.orders if o[1] == instrument and o[2] == side]
        return sorted(held, key=lambda o: (o[4] if side else -o[4], o[0]))

    def _crosses(self, instrument: int, side: int, tick: int) -> bool:
        other = self._side(instrument, 1 - side)
        return bool(other) and (tick >= other[0][4] if side == 0 else tick <= other[0][4])

    def submit(self, instrument: int, side: int, qty: int, tick: int, kind: int) -> int:
        self.fills = []
        if kind == MARKET:
            tick = TICKS - 1 if side == 0 else 0
        if not 0 <= tick < TICKS:
            return int(REFUSED_BAND)
        if qty <= 0:
            return int(REFUSED_QTY)
        if kind in (LIMIT, POST_ONLY) and sum(o[1] == instrument for o in self.orders) == CAPACITY:
            return int(REFUSED_FULL)
        if self._crosses(instrument, side, tick):
            if kind == POST_ONLY:
                return int(REFUSED_WOULD_CROSS)
            if self.halted[instrument]:
                return int(REFUSED_HALTED)
        while qty and self._crosses(instrument, side, tick) and len(self.fills) < FILLS_MAX:
            best = self._side(instrument, 1 - side)[0]
            traded = min(qty, best[3])
            qty, best[3] = qty - traded, best[3] - traded
            self.fills.append((best[0], self.next_match, traded, best[4], best[3]))
            self.next_match += 1
            if not best[3]:
                self.orders.remove(best)
        if qty and kind in (LIMIT, POST_ONLY) and not self._crosses(instrument, side, tick):
            self.orders.append([self.next_ref, instrument, side, qty, tick])
            self.next_ref += 1
            return self.next_ref - 1
        return 0

    def reduce(self, ref: int, qty: int) -> int:
        if qty <= 0:
            return int(REFUSED_QTY)
        order = next(o for o in self.orders if o[0] == ref)
        order[3] = max(0, order[3] - qty)
        if not order[3]:
            self.orders.remove(order)
        return order[3]

    def replace(self, ref: int, qty: int, tick: int) -> int:
        self.fills = []
        order = next(o for o in self.orders if o[0] == ref)
        if not 0 <= tick < TICKS:
            return int(REFUSED_BAND)
        if qty <= 0:
            return int(REFUSED_QTY)
        if self.halted[order[1]] and self._crosses(order[1], order[2], tick):
            return int(REFUSED_HALTED)
        self.orders.remove(order)
        return self.submit(order[1], order[2], qty, tick, int(LIMIT))

    def levels(self, instrument: int, side: int) -> list[tuple[int, int, int]]:
        found: dict[int, tuple[int, int]] = {}
        for order in self._side(instrument, side):
            qty, orders = found.get(order[4], (0, 0))
            found[order[4]] = (qty + order[3], orders + 1)
        return [(tick, *rest) for tick, rest in found.items()]


def fills_of(engine: Engine) -> list[tuple[int, ...]]:
    found = engine.fills[: int(engine.state["fills"][0])]
    return [tuple(int(f[name]) for name in ("ref", "match", "qty", "tick", "left")) for f in found]


def slot_of(engine: Engine, ref: int) -> int:
    return int(np.flatnonzero(engine.orders["ref"] == ref)[0])


def check_books(engine: Engine, twin: Twin) -> None:
    for instrument in (0, 1):
        bids, asks = (book_levels(engine, instrument, side) for side in (BID, ASK))
        assert bids == twin.levels(instrument, 0)
        assert asks == twin.levels(instrument, 1)
        assert not (bids and asks) or bids[0][0] < asks[0][0], "crossed"
        assert len(live_slots(engine, instrument)) == int(engine.touches["live"][instrument]) == sum(n for *_, n in bids + asks)
        for tick, qty, orders in bids + asks:
            waiting = queue(engine, instrument, tick)
            assert waiting == sorted(waiting), "not in order of arrival"
            assert (sum(q for _, q in waiting), len(waiting)) == (qty, orders)


TICK = st.one_of(st.integers(60, 68), st.sampled_from([-1, 0, 1, 62, 63, 64, 127, 128]))
QTY = st.integers(-1, 12)
ACTION = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 1), st.integers(0, 1), QTY, TICK, st.integers(0, 3)),
    st.tuples(st.just("reduce"), st.integers(0, 99), QTY),
    st.tuples(st.just("replace"), st.integers(0, 99), QTY, TICK),
    st.tuples(st.just("halt"), st.integers(0, 1), st.booleans()),
)


def play(actions: list[tuple]) -> None:  # type: ignore[type-arg]
    engine, twin = make_engine(2, ticks=TICKS, capacity=CAPACITY, fills_max=FILLS_MAX), Twin()
    for what, *arguments in actions:
        if what == "halt":
            twin.halted[arguments[0]] = arguments[1]
            engine.touches["halted"][arguments[0]] = arguments[1]
            continue
        if what == "submit":
            expected = twin.submit(*arguments)
            instrument, side, qty, tick, kind = arguments
            found = int(engine_submit(engine, instrument, side, qty, tick, kind, 0))
        elif not twin.orders:
            continue
        else:
            ref = twin.orders[arguments[0] % len(twin.orders)][0]
            slot = slot_of(engine, ref)
            expected = getattr(twin, what)(ref, *arguments[1:])
            found = int(engine_reduce(engine, slot, arguments[1]) if what == "reduce" else engine_replace(engine, slot, *arguments[1:]))
        if what == "reduce" or expected <= 0:
            assert found == expected
        else:
            assert int(engine.orders["ref"][found]) == expected
        if what != "reduce" and expected >= 0:
            assert fills_of(engine) == twin.fills
        check_books(engine, twin)


@settings(deadline=None, max_examples=150)
@given(st.lists(ACTION, max_size=60))
def test_engine_equals_its_twin(actions: list[tuple]) -> None:  # type: ignore[type-arg]
    play(actions)


def make() -> Engine:
    return make_engine(1, ticks=TICKS, capacity=CAPACITY, fills_max=FILLS_MAX)


def test_oldest_order_at_the_best_price_trades_first() -> None:
    engine = make()
    for qty, tick in ((10, 61), (20, 60), (30, 60)):
        engine_submit(engine, 0, 1, qty, tick, 0, 0)
    assert engine_submit(engine, 0, 0, 35, 61, 0, 0) == NOTHING_RESTS
    assert fills_of(engine) == [(2, 1, 20, 60, 0), (3, 2, 15, 60, 15)]


def test_partial_cancel_keeps_its_place_and_replace_loses_it() -> None:
    engine = make()
    first, second = (int(engine_submit(engine, 0, 0, 10, 50, 0, 0)) for _ in range(2))
    assert engine_reduce(engine, first, 4) == 6
    assert queue(engine, 0, 50) == [(1, 6), (2, 10)]
    assert engine_replace(engine, first, 6, 50) > 0
    assert queue(engine, 0, 50) == [(2, 10), (3, 6)]
    assert second in live_slots(engine, 0)


def test_market_and_immediate_orders_never_rest() -> None:
    engine = make()
    engine_submit(engine, 0, 1, 10, 60, 0, 0)
    assert engine_submit(engine, 0, 0, 25, 60, int(IOC), 0) == NOTHING_RESTS
    assert int(engine.state["remaining"][0]) == 15
    assert engine_submit(engine, 0, 0, 25, 0, int(MARKET), 0) == NOTHING_RESTS
    assert book_levels(engine, 0, BID) == book_levels(engine, 0, ASK) == []


def test_order_is_dropped_at_the_fills_limit_rather_than_left_crossed() -> None:
    engine = make()
    for _ in range(5):
        engine_submit(engine, 0, 1, 1, 60, 0, 0)
    assert engine_submit(engine, 0, 0, 9, 60, 0, 0) == NOTHING_RESTS
    assert (len(fills_of(engine)), int(engine.state["remaining"][0]), int(engine.state["dropped"][0])) == (4, 5, 1)
    assert book_levels(engine, 0, BID) == []


def test_unknown_order_is_refused_and_counted() -> None:
    engine = make()
    assert engine_reduce(engine, 3, 1) == engine_replace(engine, 3, 1, 5) == engine_reduce(engine, 0, 1) == REFUSED_UNKNOWN
    assert int(engine.state["refused"][0]) == 3
    assert all(REFUSALS.values())


@pytest.mark.parametrize("wrong", [{"ticks": 100}, {"ticks": 0}, {"capacity": 0}, {"fills_max": 0}])
def test_sizes_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        make_engine(1, **wrong)


@pytest.mark.slow
def test_no_index_leaves_its_array() -> None:
    """The twin test again with bounds checks compiled in."""
    program = "import test_matching_engine as t; t.test_engine_equals_its_twin()"
    done = with_bounds_checks("-c", program, folder=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-2000:]
