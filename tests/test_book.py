"""Order books: every kind of event, every refusal, window moves, tick refinement, far levels; compared with a dict book by hypothesis."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from bounds import check_again
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node.book import (
    _FAR_USED,
    _SPILLED,
    DEFAULT_TICK,
    Books,
    Refusal,
    apply_events,
    book_tick,
    counts,
    levels_count,
    make_books,
    numbering_of,
    renumber_orders,
    renumbered,
    resting_orders,
    top,
)
from tickmesh.node.event import ALL_INSTRUMENTS, ASK, BID, EVENT, NO_INSTRUMENT, NO_PRICE, NO_SIDE, Flag, Kind, TradingStatus
from tickmesh.transports.toolbox import loop

PRICE = 1_000_000_000
TICK = DEFAULT_TICK
INSTRUMENTS = 4
KEY_MAX = (1 << 31) - 1

Row = tuple[Any, ...]


def event(
    kind: int, instrument: int = NO_INSTRUMENT, side: int = NO_SIDE, price: int = 0, qty: int = 0, id: int = 0, aux: int = 0, flags: int = 0
) -> Row:
    """One event as the tuple of an ``EVENT`` record."""
    return (0, 0, 0, instrument, int(kind), side, flags, price, qty, id, aux)


def add(id: int, side: int, price: int, qty: int, instrument: int = 0) -> Row:
    return event(Kind.ADD, instrument, side, price, qty, id)


def apply(books: Books, *rows: Row) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Results, completed events and the BBO events that followed."""
    events = np.array(list(rows), EVENT)
    results = np.zeros(len(rows), np.int64)
    quotes = np.zeros(len(rows) + 1, EVENT)
    written = apply_events(books, events, results, quotes)
    return results.tolist(), events, quotes[:written]


class DictBook:
    """The slow twin: dicts of exact integers, the same rules."""

    def __init__(self, instruments: int, order_qty_max: int = (1 << 32) - 1) -> None:
        self.instruments = instruments
        self.orders: dict[int, list[int]] = {}
        self.levels: dict[tuple[int, int], dict[int, list[int]]] = {(i, s): {} for i in range(instruments) for s in (BID, ASK)}
        self.by_level = dict.fromkeys(self.levels, False)
        self.ticks = dict.fromkeys(range(instruments), 0)
        self.halted: set[int] = set()
        self.stale: set[int] = set()
        self.published: dict[int, tuple[int, ...]] = {}
        self.counted = dict.fromkeys(Refusal, 0)

    def apply(self, row: Row) -> tuple[int, Row]:
        e = dict(zip(EVENT.names or (), row))
        refusal = self._apply(e)
        if refusal:
            self.counted[refusal] += 1
            return -int(refusal), row
        return 0, tuple(e.values())

    def _apply(self, e: dict[str, int]) -> Refusal | None:
        kind = e["kind"]
        if Kind.ADD <= kind <= Kind.MODIFY:
            return self._order(e)
        if kind == Kind.LEVEL:
            return self._level(e)
        if kind == Kind.GAP and e["instrument"] == ALL_INSTRUMENTS:
            self.stale = set(range(self.instruments))
            return None
        if kind not in (Kind.CLEAR, Kind.STATUS, Kind.GAP):
            return None
        every = kind == Kind.CLEAR and e["instrument"] == ALL_INSTRUMENTS
        if e["instrument"] >= self.instruments and not every:
            return Refusal.UNKNOWN_INSTRUMENT
        if kind == Kind.CLEAR:
            return self._clear(e, every)
        if kind == Kind.GAP:
            self.stale.add(e["instrument"])
        elif e["aux"] in (TradingStatus.HALTED, TradingStatus.PAUSED, TradingStatus.QUOTE_ONLY):
            self.halted.add(e["instrument"])
        elif e["aux"] != TradingStatus.UNKNOWN:
            self.halted.discard(e["instrument"])
        return None

    def _clear(self, e: dict[str, int], every: bool) -> Refusal | None:
        if e["side"] > NO_SIDE:
            return Refusal.BAD_SIDE
        for key in self.levels:
            if (every or key[0] == e["instrument"]) and e["side"] in (NO_SIDE, key[1]):
                if self.levels[key]:
                    self.by_level[key] = False
                self.levels[key] = {}
                self.orders = {name: order for name, order in self.orders.items() if (order[0], order[1]) != key}
                if e["side"] == NO_SIDE:
                    self.stale.discard(key[0])
        return None

    def _tick(self, instrument: int, price: int) -> Refusal | None:
        """Refine the tick so that it divides the price; everything must stay within the range of keys."""
        tick = self.ticks[instrument]
        if price == 0 and not tick:
            return None  # a level at 0 is one of whatever tick
        if tick and price % tick == 0 and -KEY_MAX - 1 <= price // tick <= KEY_MAX:
            return None
        if price == NO_PRICE:
            return Refusal.PRICE_RANGE
        prices = [p for side in (BID, ASK) for p in self.levels[instrument, side]]
        refined = math.gcd(tick if prices and tick else TICK, price)
        if any(abs(p) // refined > KEY_MAX for p in [price, *prices]):
            return Refusal.PRICE_RANGE
        self.ticks[instrument] = refined
        return None

    def _rest(self, e: dict[str, int], instrument: int, side: int) -> Refusal | None:
        if not 0 < e["qty"] < 1 << 32:
            return Refusal.BAD_QTY if e["qty"] <= 0 else Refusal.QTY_OVERFLOW
        levels = self.levels[instrument, side]
        if self.by_level[instrument, side]:
            if levels:
                return Refusal.WRONG_BOOK
            self.by_level[instrument, side] = False
        refusal = self._tick(instrument, e["price"])
        if refusal:
            return refusal
        qty, orders = levels.get(e["price"], (0, 0))
        if qty + e["qty"] >= 1 << 40 or orders >= 1 << 23:
            return Refusal.QTY_OVERFLOW
        levels[e["price"]] = [qty + e["qty"], orders + 1]
        return None

    def _take(self, order: list[int], qty: int, gone: bool) -> None:
        levels = self.levels[order[0], order[1]]
        level = levels[order[2]]
        level[0] -= qty
        level[1] -= gone
        if level == [0, 0]:
            del levels[order[2]]

    def _order(self, e: dict[str, int]) -> Refusal | None:
        kind = e["kind"]
        old = e["aux"] % (1 << 64) if kind == Kind.REPLACE else e["id"]
        if kind == Kind.ADD:
            if e["side"] > 1 or e["instrument"] >= self.instruments:
                return Refusal.BAD_SIDE if e["side"] > 1 else Refusal.UNKNOWN_INSTRUMENT
            return self._new(e, e["instrument"], e["side"])
        if old not in self.orders:
            return Refusal.UNKNOWN_ORDER
        order = self.orders[old]
        if e["instrument"] not in (NO_INSTRUMENT, order[0]):
            return Refusal.OTHER_INSTRUMENT
        if kind == Kind.MODIFY:
            return self._modify(e, order)
        if kind == Kind.REPLACE:
            refusal = self._new(e, order[0], order[1])
            if refusal:
                return refusal
        return self._old(e, order, old)

    def _new(self, e: dict[str, int], instrument: int, side: int) -> Refusal | None:
        if e["id"] in self.orders:
            return Refusal.DUPLICATE_ORDER
        refusal = self._rest(e, instrument, side)
        if refusal is None:
            self.orders[e["id"]] = [instrument, side, e["price"], e["qty"]]
        return refusal

    def _modify(self, e: dict[str, int], order: list[int]) -> Refusal | None:
        if e["side"] > NO_SIDE:
            return Refusal.BAD_SIDE
        side = order[1] if e["side"] == NO_SIDE else e["side"]
        refusal = self._rest(e, order[0], side)
        if refusal is None:
            self._take(order, order[3], True)
            order[1:] = [side, e["price"], e["qty"]]
            e["instrument"], e["side"] = order[0], side
        return refusal

    def _old(self, e: dict[str, int], order: list[int], id: int) -> Refusal | None:
        qty = e["qty"] if e["kind"] in (Kind.EXECUTE, Kind.CANCEL) else order[3]
        if not 0 < qty <= order[3]:
            return Refusal.BAD_QTY if qty <= 0 else Refusal.QTY_EXCEEDS_ORDER
        e["instrument"], e["side"] = order[0], order[1]
        if e["kind"] != Kind.REPLACE:
            e["qty"] = qty
            if not e["flags"] & Flag.PRICED:
                e["price"] = order[2]
        order[3] -= qty
        self._take(order, qty, order[3] == 0)
        if order[3] == 0:
            del self.orders[id]
        return None

    def _level(self, e: dict[str, int]) -> Refusal | None:
        if e["instrument"] >= self.instruments or e["side"] > 1:
            return Refusal.BAD_SIDE if e["side"] > 1 else Refusal.UNKNOWN_INSTRUMENT
        if e["qty"] < 0:
            return Refusal.BAD_QTY
        key = (e["instrument"], e["side"])
        if not self.by_level[key]:
            if self.levels[key]:
                return Refusal.WRONG_BOOK
            self.by_level[key] = True
        refusal = self._tick(e["instrument"], e["price"])
        if refusal is None:
            self.levels[key].pop(e["price"], None)
            if e["qty"]:
                self.levels[key][e["price"]] = [e["qty"], 0]
        return refusal

    def top(self, instrument: int) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
        bids, asks = (sorted((p, *level) for p, level in self.levels[instrument, s].items()) for s in (BID, ASK))
        return bids[::-1], asks

    def bbo(self, instrument: int) -> tuple[int, ...]:
        """(bid, bid_qty, ask, ask_qty, flags)."""
        bids, asks = self.levels[instrument, BID], self.levels[instrument, ASK]
        bid = (max(bids), bids[max(bids)][0]) if bids else (NO_PRICE, 0)
        ask = (min(asks), asks[min(asks)][0]) if asks else (NO_PRICE, 0)
        flags = Flag.STALE * (instrument in self.stale) | Flag.HALTED * (instrument in self.halted)
        if bids and asks:
            flags |= Flag.CROSSED * (bid[0] > ask[0]) | Flag.LOCKED * (bid[0] == ask[0])
        return (bid[0], bid[1], ask[0], ask[1], int(flags))

    def bbo_changed(self, instrument: int) -> bool:
        now = self.bbo(instrument)
        before = self.published.get(instrument)
        mask = ~int(Flag.CROSSED | Flag.LOCKED)
        key = (*now[:4], now[4] & mask)
        if before == key or (before is None and key == (NO_PRICE, 0, NO_PRICE, 0, 0)):
            return False
        self.published[instrument] = key
        return True


def check(books: Books, rows: list[Row], twin: DictBook) -> None:
    """Apply the rows to both; results, completed events, every BBO, full depth, order counts and refusal counters must agree."""
    results, events, quotes = apply(books, *rows)
    at = 0
    for row, result, done in zip(rows, results, events, strict=True):
        expected, completed = twin.apply(row)
        assert (Refusal(-result).name if result else "ok") == (Refusal(-expected).name if expected else "ok"), row
        assert tuple(done.item()) == completed
        instrument = completed[3]
        looks = row[4] not in (Kind.TRADE, Kind.QUOTE)  # these change no book, so that nobody looks whether an earlier CLEAR of all did
        if result == 0 and looks and instrument < twin.instruments and twin.bbo_changed(instrument):
            quote = quotes[at]
            at += 1
            got = (quote["price"], quote["qty"], quote["aux"], quote["id"], quote["flags"])
            assert tuple(int(x) for x in got) == twin.bbo(instrument), row
            assert (quote["kind"], quote["instrument"], quote["side"]) == (Kind.BBO, instrument, NO_SIDE)
    assert at == len(quotes)
    for instrument in range(twin.instruments):
        assert top(books, instrument, 1 << 30) == twin.top(instrument)
        assert levels_count(books, instrument) == tuple(len(side) for side in twin.top(instrument))
    assert resting_orders(books) == len(twin.orders)
    got_counts = counts(books)
    assert {r: got_counts[r.name.lower()] for r in Refusal} == twin.counted


# ---------------------------------------------------------------- hypothesis

SMALL_IDS = st.integers(1, 12)
PRICES = st.one_of(
    st.integers(9_990, 10_010).map(lambda ticks: ticks * TICK),
    st.integers(-40_000, 40_000).map(lambda ticks: ticks * TICK),
    st.sampled_from([0, -TICK, 5000, 100_000, 123_456_789, 3, NO_PRICE, NO_PRICE + 1, (1 << 63) - 1]),
    st.sampled_from([KEY_MAX * TICK, (KEY_MAX + 1) * TICK, -(KEY_MAX + 1) * TICK]),
)
QTYS = st.one_of(st.integers(1, 20), st.sampled_from([0, -1, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, -(1 << 63)]))
SOME = st.sampled_from([0, 0, 0, 1, 2, NO_INSTRUMENT, INSTRUMENTS])
SIDES = st.sampled_from([0, 1, 0, 1, 0, 1, 2, 3, 255])
REDUCING = st.sampled_from([Kind.EXECUTE, Kind.CANCEL, Kind.DELETE])
STATE = st.sampled_from([Kind.CLEAR, Kind.STATUS, Kind.GAP, Kind.TRADE, Kind.QUOTE])
ROWS = st.one_of(
    st.builds(add, SMALL_IDS, SIDES, PRICES, QTYS, st.sampled_from([0, 0, 1, INSTRUMENTS])),
    st.builds(event, REDUCING, SOME, SIDES, PRICES, QTYS, SMALL_IDS, flags=st.sampled_from([0, 0, int(Flag.PRICED)])),
    st.builds(event, st.sampled_from([Kind.REPLACE, Kind.MODIFY]), SOME, SIDES, PRICES, QTYS, SMALL_IDS, SMALL_IDS),
    st.builds(event, st.just(Kind.LEVEL), st.sampled_from([2, 3, 3, 0, INSTRUMENTS]), SIDES, PRICES, QTYS),
    st.builds(event, STATE, st.sampled_from([0, 1, 2, 3, INSTRUMENTS, ALL_INSTRUMENTS]), SIDES, aux=st.integers(0, 7)),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(ROWS, min_size=1, max_size=60), st.sampled_from(["sequential", "random"]))
def test_any_events_agree_with_the_dict_book(rows: list[Row], order_ids: str) -> None:
    check(make_books(INSTRUMENTS, 64, order_ids), rows, DictBook(INSTRUMENTS))


def random_rows(step: int, count: int, ids: int) -> list[Row]:
    """A long plausible flow whose price drifts by up to `step` ticks an event, with far levels and some hostile events."""
    rng = np.random.default_rng(step)
    rows: list[Row] = []
    centre = 20_000
    for _ in range(count):
        centre += int(rng.integers(-step, step + 1))
        spread = 40 if rng.random() < 0.8 else 6_000
        price = (centre + int(rng.integers(-spread, spread + 1))) * TICK + (5_000_000 if rng.random() < 0.001 else 0)
        instrument, side, name, qty = int(rng.integers(2)), int(rng.integers(2)), int(rng.integers(1, ids)), int(rng.integers(1, 500))
        kind = rng.choice([1, 1, 1, 1, 2, 3, 4, 4, 5, 6, 8])
        if kind == Kind.LEVEL:
            rows.append(event(kind, 2 + instrument, side, price, qty * int(rng.integers(0, 2)) << 40))
        elif kind == Kind.ADD:
            rows.append(add(name, side, price, qty, instrument))
        else:
            rows.append(event(kind, NO_INSTRUMENT, int(rng.integers(3)), price, qty, name, int(rng.integers(1, ids))))
        if rng.random() < 0.0005:
            rows.append(event(Kind.CLEAR, instrument, int(rng.integers(3))))
    return rows


@pytest.mark.parametrize(("order_ids", "step", "ids"), [("sequential", 15, 600), ("random", 200, 3_000), ("sequential", 800, 3_000)])
def test_a_long_flow_agrees_with_the_dict_book(order_ids: str, step: int, ids: int) -> None:
    books, twin = make_books(INSTRUMENTS, 1 << 12, order_ids), DictBook(INSTRUMENTS)
    rows = random_rows(step, 20_000, ids)
    for start in range(0, len(rows), 2_000):
        check(books, rows[start : start + 2_000], twin)
    assert counts(books)["window_moves"] > 10
    assert counts(books)["tick_refinements"] > 0


# ---------------------------------------------------------------- named cases


def test_events_are_completed_from_the_order() -> None:
    books = make_books(4)
    executions = [event(Kind.EXECUTE, qty=2, id=7), event(Kind.EXECUTE, qty=3, id=7, price=5, flags=Flag.PRICED)]
    replaced = [event(Kind.REPLACE, price=102 * PRICE, qty=5, id=8, aux=7), event(Kind.DELETE, id=8)]
    results, events, _ = apply(books, add(7, ASK, 101 * PRICE, 9, instrument=3), *executions, *replaced)
    assert results == [0] * 5
    assert events["instrument"].tolist() == [3] * 5
    assert events["side"].tolist() == [ASK] * 5
    assert events["price"].tolist() == [101 * PRICE, 101 * PRICE, 5, 102 * PRICE, 102 * PRICE]
    assert events["qty"].tolist() == [9, 2, 3, 5, 5]
    assert top(books, 3, 5) == ([], [])


def test_a_price_off_the_tick_refines_it_and_an_empty_book_takes_the_configured_one_back() -> None:
    books = make_books(1)
    books.ticks[0] = 5 * TICK
    apply(books, add(1, BID, 10 * PRICE, 1), add(2, ASK, -3 * PRICE, 2))
    assert book_tick(books, 0) == 5 * TICK
    apply(books, add(3, BID, 9_999_900_000, 4))
    assert book_tick(books, 0) == 100_000
    assert top(books, 0, 9) == ([(10 * PRICE, 1, 1), (9_999_900_000, 4, 1)], [(-3 * PRICE, 2, 1)])
    results, events, _ = apply(books, event(Kind.DELETE, id=1), event(Kind.DELETE, id=2), event(Kind.DELETE, id=3))
    assert results == [0, 0, 0]
    assert events["price"].tolist() == [10 * PRICE, -3 * PRICE, 9_999_900_000]
    apply(books, add(4, BID, 700_000 * PRICE, 4))
    assert book_tick(books, 0) == 5 * TICK


def test_orders_that_share_a_set_spill_and_come_back() -> None:
    books, twin = make_books(1, 1 << 10), DictBook(1)
    step = 1 << books.slot_bits
    ids = [5 + i * step for i in range(40)]
    check(books, [add(name, BID, (100 + i) * PRICE, 1 + i) for i, name in enumerate(ids)], twin)
    assert books.state[_SPILLED] == 36
    check(books, [add(ids[20], BID, PRICE, 1)] + [event(Kind.DELETE, id=name) for name in ids[::3]], twin)
    check(books, [event(Kind.MODIFY, price=PRICE, qty=3, id=name) for name in ids], twin)
    check(books, [event(Kind.CLEAR, 0, BID), add(ids[1], ASK, PRICE, 1)], twin)
    assert books.state[_SPILLED] == 0


def test_a_full_order_table_refuses() -> None:
    books = make_books(1, 1)
    step = 1 << books.slot_bits
    spill = books.spill_hashes.size // 2
    rows = np.zeros(spill + 6, EVENT)
    rows["kind"], rows["price"], rows["qty"] = Kind.ADD, PRICE, 1
    rows["id"] = 1 + np.arange(rows.size, dtype=np.uint64) * np.uint64(step)
    results = np.zeros(rows.size, np.int64)
    apply_events(books, rows, results, rows[:0].copy())
    assert results[:-2].tolist() == [0] * (rows.size - 2)
    assert results[-2:].tolist() == [-Refusal.ORDERS_FULL] * 2
    assert resting_orders(books) == rows.size - 2


def test_a_full_far_store_refuses_and_changes_nothing() -> None:
    books = make_books(1, far_max=3)
    rows = [event(Kind.LEVEL, 0, BID, price * PRICE, 1) for price in (10_000, 100, 200, 300)]
    assert apply(books, *rows)[0] == [0] * 4
    before = [a.copy() for a in books[:8]]
    full = -Refusal.LEVELS_FULL
    assert apply(books, event(Kind.LEVEL, 0, BID, 400 * PRICE, 1), event(Kind.LEVEL, 0, BID, 20_000 * PRICE, 1))[0] == [full, full]
    assert all(np.array_equal(a, b) for a, b in zip(before, books[:8]) if a is not before[2])
    apply(books, event(Kind.LEVEL, 0, BID, 200 * PRICE, 0))
    assert books.state[_FAR_USED] == 2
    assert apply(books, event(Kind.LEVEL, 0, BID, 20_000 * PRICE, 1))[0] == [0]
    assert [price // PRICE for price, _, _ in top(books, 0, 9)[0]] == [20_000, 10_000, 300, 100]


def test_thousands_of_far_levels_stay_exact() -> None:
    books, twin = make_books(1), DictBook(1)
    away = {BID: -TICK, ASK: TICK}
    rows = [event(Kind.LEVEL, 0, side, 60_000 * PRICE + away[side] * (i * 37 + 1), i + 1) for i in range(3_000) for side in (BID, ASK)]
    check(books, rows, twin)
    rng = np.random.default_rng(1)
    changed = [(*rows[i][:8], int(rng.integers(0, 3)), 0, 0) for i in rng.integers(0, len(rows), 3_000)]
    check(books, changed, twin)
    check(books, [(*row[:8], 0, 0, 0) for row in rows[:4_000]], twin)


def test_level_quantities_use_63_bits_and_orders_cannot_be_mixed_in() -> None:
    books = make_books(1)
    big = (1 << 63) - 1
    orders = [add(1, BID, PRICE, 1), add(2, ASK, 2 * PRICE, 1)]
    results, _, quotes = apply(books, event(Kind.LEVEL, 0, BID, PRICE, big), *orders, event(Kind.LEVEL, 0, ASK, PRICE, 1))
    assert results == [0, -Refusal.WRONG_BOOK, 0, -Refusal.WRONG_BOOK]
    assert top(books, 0, 1) == ([(PRICE, big, 0)], [(2 * PRICE, 1, 1)])
    assert quotes["qty"].tolist() == [big, big]


def test_level_overflow_is_refused_and_leaves_the_level() -> None:
    books = make_books(1)
    rows = [add(i, BID, PRICE, (1 << 32) - 1) for i in range(1, 258)]
    results, _, _ = apply(books, *rows)
    assert results == [0] * 256 + [-Refusal.QTY_OVERFLOW]
    assert top(books, 0, 1)[0] == [(PRICE, 256 * ((1 << 32) - 1), 256)]


def test_ids_may_be_unique_within_an_instrument_only() -> None:
    books = make_books(3, 64, "per_instrument")
    adds = [add(1, BID, PRICE, 1, 0), add(1, BID, PRICE, 2, 1), add(1, BID, PRICE, 3, 1)]
    rows = [*adds, event(Kind.DELETE, 1, id=1), event(Kind.DELETE, 1, id=1)]
    assert apply(books, *rows)[0] == [0, 0, -Refusal.DUPLICATE_ORDER, 0, -Refusal.UNKNOWN_ORDER]
    replaced = event(Kind.REPLACE, 0, price=2 * PRICE, qty=1, id=9, aux=1)
    assert apply(books, replaced, event(Kind.EXECUTE, 0, qty=1, id=9))[0] == [0, 0]


def test_stale_and_halted_books_say_so_until_cleared() -> None:
    books = make_books(3)
    gap, resume = event(Kind.GAP, ALL_INSTRUMENTS), event(Kind.STATUS, 1, aux=TradingStatus.TRADING)
    halted = event(Kind.STATUS, 1, aux=TradingStatus.HALTED)
    _, _, quotes = apply(books, gap, add(1, BID, PRICE, 1, 1), halted, event(Kind.CLEAR, 1), resume)
    assert quotes["flags"].tolist() == [Flag.STALE, Flag.STALE | Flag.HALTED, Flag.HALTED, 0]
    unknown, clear_all = event(Kind.STATUS, 2, aux=TradingStatus.UNKNOWN), event(Kind.CLEAR, ALL_INSTRUMENTS)
    _, _, quotes = apply(books, event(Kind.GAP, 2), clear_all, unknown, add(4, ASK, PRICE, 1, 0))
    assert quotes["instrument"].tolist() == [2, 2, 0]
    assert quotes["flags"].tolist() == [Flag.STALE, 0, 0]


def test_crossed_and_locked_books_are_flagged_and_counted() -> None:
    books = make_books(1)
    _, _, quotes = apply(books, add(1, BID, 10 * PRICE, 1), add(2, ASK, 10 * PRICE, 1), add(3, ASK, 9 * PRICE, 1), event(Kind.DELETE, id=3))
    assert quotes["flags"].tolist() == [0, Flag.LOCKED, Flag.CROSSED, Flag.LOCKED]
    assert counts(books)["crossed_bbos"] == 1


def test_a_copy_of_the_arrays_is_a_snapshot() -> None:
    books, twin = make_books(INSTRUMENTS, 1 << 10), DictBook(INSTRUMENTS)
    rows = random_rows(5, 4_000, 500)
    check(books, rows[:2_000], twin)
    restored = Books(*(part.copy() if isinstance(part, np.ndarray) else part for part in books))
    check(restored, rows[2_000:], twin)


BAD_BOUNDS = [{"instruments_max": 0}, {"order_ids": "odd"}, {"far_max": 0}, {"orders_max": 0}]


@pytest.mark.parametrize("arguments", BAD_BOUNDS)
def test_bad_bounds_are_refused_with_the_bounds(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make_books(**{"instruments_max": 4, **arguments})


MEMORY = """
import numpy as np, resource
from tickmesh.node.book import apply_events, make_books
from tickmesh.node.event import EVENT
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()
books = make_books({instruments}, 1 << 20)
events = np.zeros(1 << 20, EVENT); results = np.zeros(1 << 20, np.int64); quotes = np.zeros(0, EVENT)
results[:] = 1
apply_events(books, events[:1], results[:1], quotes)
rng = np.random.default_rng(1)
events['kind'] = 1; events['id'] = np.arange(1, (1 << 20) + 1); events['qty'] = 100
events['instrument'] = rng.integers(0, {instruments}, 1 << 20); events['side'] = rng.integers(0, 2, 1 << 20)
distance = rng.geometric(0.02, 1 << 20)
events['price'] = (10_000 + np.where(events['side'] == 0, -distance, distance)) * 10_000_000
before = resident()
apply_events(books, events, results, quotes)
assert not results.any()
print(resident() - before)
"""


@pytest.mark.parametrize(("instruments", "limit_mb"), [(1, 40), (400, 60), (4_000, 100)])
def test_a_million_orders_stay_below_100_mb_resident(instruments: int, limit_mb: int) -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY.format(instruments=instruments)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < limit_mb << 20


@pytest.mark.slow
def test_no_index_is_ever_out_of_bounds() -> None:
    check_again(__file__, "agree_with_the_dict_book or spill or far_store or refines")


# ---------------------------------------------------------------- other numbering


@loop
def _renumber_now(old: Any, new: Any) -> None:
    renumber_orders(old, new)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["sequential", "random"]), st.integers(0, 1 << 32), st.integers(1, 400))
def test_orders_that_are_numbered_otherwise_are_the_same_orders(numbering: str, seed: int, count: int) -> None:
    """Also those that are displaced or spilled: many ids want the same place."""
    rng = np.random.default_rng(seed)
    ids = [int(slot) + (int(turn) << 21) for slot, turn in zip(rng.integers(0, 40, count), rng.permutation(count))]
    draws = rng.integers((0, 50, 1, 0), (2, 90, 90, 4), (count, 4)).tolist()
    rows = [add(number, side, price * TICK, qty, instrument) for number, (side, price, qty, instrument) in zip(ids, draws)]
    old, twin = make_books(INSTRUMENTS, 1000, numbering), make_books(INSTRUMENTS, 1000, "per_instrument")
    apply(old, *rows)
    apply(twin, *rows)
    new = renumbered(old, "per_instrument")
    _renumber_now(old, new)
    assert numbering_of(new) == "per_instrument"
    assert resting_orders(new) == resting_orders(twin) == count
    owner = {row[9]: row[3] for row in rows}
    for number in rng.permutation(ids):
        gone = event(Kind.DELETE, owner[int(number)], id=int(number))
        (mine, done, _), (its, expected, _) = apply(new, gone), apply(twin, gone)
        assert mine == its
        assert done[["instrument", "side", "price", "qty"]] == expected[["instrument", "side", "price", "qty"]]
    assert resting_orders(new) == 0
    assert all(top(new, i, 9) == ([], []) for i in range(INSTRUMENTS))


def test_there_is_no_way_back_from_numbers_per_instrument() -> None:
    with pytest.raises(ValueError, match="numbered per instrument"):
        renumbered(make_books(1, 16, "per_instrument"), "sequential")
