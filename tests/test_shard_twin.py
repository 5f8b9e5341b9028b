"""The generated shard loop against its plain Python twin: any events, any batches, held up or not, every output byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounds import check_again
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_twin import PLAN, ShardTwin
from test_book import DictBook

from tickmesh.control.config import parse_config
from tickmesh.node.book import DEFAULT_TICK, Refusal, counts, top
from tickmesh.node.event import ALL_INSTRUMENTS, ANY_VIEW, DERIVED, EVENT, NO_INSTRUMENT, NO_SIDE, PEERS, EventArray, Flag, Kind
from tickmesh.node.pipeline import make_plan, risk_limits
from tickmesh.node.shard import Shard, ShardPlan
from tickmesh.transports.ring import Ring

INSTRUMENTS = 7
SYMBOLS = (b"BTC", b"ESM4", b"XYZ", b"pair", b"several", b"FAR")
SOURCES = (0, 0, 1, DERIVED, DERIVED, PEERS + 2)
EXPONENTS = (0, 3, 8, 0, 0, 0)
FAR = 5
CONFIG = parse_config(PLAN)
_plans: list[ShardPlan] = []


def the_plan() -> ShardPlan:
    if not _plans:
        _plans.append(make_plan(CONFIG, Path()))
    return _plans[0]


def reference(instrument: int) -> tuple[Any, ...]:
    symbol, kind = int.from_bytes(SYMBOLS[instrument], "little"), Kind.PEER_REFERENCE if instrument == FAR else Kind.REFERENCE
    return (0, 0, 0, instrument, kind, EXPONENTS[instrument], SOURCES[instrument], DEFAULT_TICK, symbol, 0, 0)


def rows_to_events(rows: list[tuple[Any, ...]]) -> EventArray:
    """Events of (kind, instrument, side, flags, price, qty, id, aux, wait), on a clock that mostly goes on."""
    events, clock = np.zeros(len(rows), EVENT), 10**15
    for event, (kind, instrument, side, flags, price, qty, name, aux, wait) in zip(events, rows):
        clock += wait
        event["seq"], event["ts_event"], event["ts_recv"] = clock % 1000, clock, clock + 7
        for field, value in zip(EVENT.names[3:], (instrument, kind, side, flags, price, qty, name, aux)):
            event[field] = value
    return np.concatenate([np.array([reference(i) for i in range(len(SYMBOLS))], EVENT), events])


def loop_outputs(events: EventArray, capacity: int, seed: int) -> tuple[Shard, EventArray]:
    """Outputs of the compiled loop, stepped in odd pieces through a ring of `capacity`."""
    ring, rng = Ring.create(None, capacity, EVENT, mode="lossless"), np.random.default_rng(seed)
    reader = ring.reader("test")
    shard = Shard(the_plan(), ring.arrays, instruments_max=INSTRUMENTS, orders_max=64)
    shard.arrays.limits[:] = np.repeat(risk_limits(CONFIG), 2)
    batch, parts, first, taken = events.copy().view(ANY_VIEW), [], 0, np.zeros(0, EVENT)
    while first < len(batch) or len(taken):
        first += shard.step(batch, first, min(first + int(rng.integers(1, 40)), len(batch)))
        taken = reader.read(int(rng.integers(1, capacity)))
        parts.append(taken.copy())
    return shard, np.concatenate(parts)


def check(rows: list[tuple[Any, ...]], capacity: int = 4096, seed: int = 1) -> EventArray:
    """Both must agree in every output, every book and every refusal."""
    return check_events(rows_to_events(rows), capacity, seed)


def check_events(events: EventArray, capacity: int = 4096, seed: int = 1) -> EventArray:
    """The same for events that bring their own definitions."""
    shard, found = loop_outputs(events, capacity, seed)
    plan = the_plan()
    twin = ShardTwin(plan.instances, plan.outputs, risk_limits(CONFIG), INSTRUMENTS)
    wanted = twin.step(events)
    for k, (a, b) in enumerate(zip(found, wanted)):
        assert a.tobytes() == b.tobytes(), (k, Kind(a["kind"]), a, Kind(b["kind"]), b)
    assert len(found) == len(wanted)
    for instrument in range(INSTRUMENTS):
        assert top(shard.arrays.books, instrument, 1 << 30) == twin.book.top(instrument)
    got = counts(shard.arrays.books)
    assert {r: got[r.name.lower()] for r in Refusal} == twin.book.counted
    return wanted


# ---------------------------------------------------------------- any events

IDS = st.integers(1, 5)
PRICES = st.integers(9_990, 10_010).map(lambda ticks: ticks * DEFAULT_TICK) | st.sampled_from([0, 5_000_000, -DEFAULT_TICK, 10**12])
QTYS = st.integers(1, 8) | st.sampled_from([0, -1, 10**6, 1 << 40])
SIDES = st.sampled_from([0, 1, 0, 1, 2, 3])
WAITS = st.sampled_from([0, 1000, 10**8, 6 * 10**8, 10**10, -(10**7)])
SOME = st.sampled_from([0, 0, 1, 2, 6, INSTRUMENTS])
MAYBE = SOME | st.just(NO_INSTRUMENT)
FLAGS = st.sampled_from([0, 0, 0, Flag.MORE, Flag.NON_PRINTABLE, Flag.PRICED, Flag.HIDDEN]).map(int)


def rows_of(kinds: list[Kind], instrument: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[Any, ...]]:
    chosen = st.sampled_from([int(kind) for kind in kinds])
    return st.tuples(chosen, instrument, SIDES, FLAGS, PRICES, QTYS, IDS, IDS, WAITS)


ORDERS = rows_of([Kind.ADD], SOME)
CHANGES = rows_of([Kind.EXECUTE, Kind.EXECUTE, Kind.CANCEL, Kind.DELETE, Kind.REPLACE, Kind.MODIFY], MAYBE)
LEVELS = rows_of([Kind.LEVEL], st.sampled_from([2, 2, 2, 0, INSTRUMENTS]))
TRADES = rows_of([Kind.TRADE], SOME)
SESSION = st.tuples(
    st.sampled_from([int(k) for k in (Kind.TIMER, Kind.GAP, Kind.CLEAR, Kind.STATUS, Kind.CONFIG, Kind.SYSTEM, Kind.BREAK, Kind.QUOTE)]),
    SOME | st.just(ALL_INSTRUMENTS), SIDES, st.just(0), st.integers(0, 1), st.integers(0, 1), st.just(3), st.integers(0, 7), WAITS,
).filter(lambda row: row[0] in (Kind.TIMER, Kind.GAP, Kind.CLEAR) or row[1] != ALL_INSTRUMENTS)  # fmt: skip
PEERS_OUTPUTS = st.tuples(
    st.sampled_from([int(k) for k in (Kind.PEER_BBO, Kind.PEER_TRADE)]),
    st.sampled_from([FAR, FAR, FAR, 1, INSTRUMENTS]), SIDES, st.sampled_from([0, 0, int(Flag.STALE)]), PRICES, QTYS, IDS, PRICES, WAITS,
)  # fmt: skip
PEERS_TIMES = st.tuples(
    st.just(int(Kind.PEER_TIMER)),
    st.just(ALL_INSTRUMENTS), SIDES, st.integers(0, 2), st.sampled_from([PEERS + 2, PEERS + 2, PEERS + 1]), QTYS, IDS, st.integers(0, 1),
    WAITS,
)  # fmt: skip
ROWS = st.lists(st.one_of(ORDERS, ORDERS, CHANGES, LEVELS, TRADES, TRADES, SESSION, PEERS_OUTPUTS, PEERS_TIMES), min_size=1, max_size=80)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(ROWS, st.sampled_from([64, 64, 4096]), st.integers(0, 1000))
def test_any_events_give_the_twins_outputs(rows: list[tuple[Any, ...]], capacity: int, seed: int) -> None:
    check(rows, capacity, seed)


def market(seed: int, count: int) -> list[tuple[Any, ...]]:
    """A plausible flow on two books by order and one by level, with everything that happens in a day."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[Any, ...]] = []
    centre, alive = 10_000, [1]
    for number in range(2, count + 2):
        centre += int(rng.integers(-2, 3))
        instrument, side, wait = int(rng.integers(2)), int(rng.integers(2)), int(rng.integers(0, 10**8))
        price = (centre + int(rng.integers(1, 8)) * (1 if side else -1)) * DEFAULT_TICK
        flags = int(rng.choice([0, 0, 0, Flag.MORE]))
        draw = rng.random()
        if draw < 0.35:
            rows.append((Kind.ADD, instrument, side, flags, price, int(rng.integers(1, 9)), number % 50 + 1, 0, wait))
            alive.append(number % 50 + 1)
        elif draw < 0.65:
            kind = int(rng.choice([Kind.EXECUTE, Kind.CANCEL, Kind.DELETE, Kind.REPLACE, Kind.MODIFY]))
            old = int(rng.choice(alive))
            rows.append((kind, NO_INSTRUMENT, NO_SIDE, flags, price, int(rng.integers(1, 4)), old, int(rng.choice(alive)), wait))
        elif draw < 0.8:
            rows.append((Kind.LEVEL, 2, side, flags, price, int(rng.integers(0, 9)), 0, 0, wait))
        elif draw < 0.85:
            kind, wait = int(rng.choice([Kind.PEER_BBO, Kind.PEER_TRADE])), 0
            rows.append((kind, FAR, side, 0, centre * DEFAULT_TICK, int(rng.integers(1, 9)), number, (centre + 2) * DEFAULT_TICK, wait))
            rows.append((Kind.PEER_TIMER, ALL_INSTRUMENTS, NO_SIDE, 0, PEERS + 2, 0, 0, 0, 1))
        elif draw < 0.95:
            rows.append((Kind.TRADE, int(rng.integers(3)), side, 0, centre * DEFAULT_TICK, int(rng.integers(1, 9)), number, 0, wait))
        else:
            kind = int(rng.choice([Kind.TIMER, Kind.TIMER, Kind.TIMER, Kind.STATUS, Kind.CLEAR, Kind.GAP]))
            everyone = kind == Kind.TIMER or (rng.random() < 0.5 and kind != Kind.STATUS)
            where = ALL_INSTRUMENTS if everyone else int(rng.integers(3))
            rows.append((kind, where, NO_SIDE, 0, int(rng.integers(2)), 0, 0, int(rng.integers(7)), wait))
    return rows


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_long_market_gives_the_twins_outputs(seed: int) -> None:
    kinds = set(check(market(seed, 1500), capacity=64 if seed == 2 else 4096, seed=seed)["kind"].tolist())
    assert {Kind.BBO, Kind.TRADE, Kind.SIGNAL, Kind.ALERT, Kind.BAR, Kind.INTENT, Kind.RISK, Kind.GAP, Kind.STATUS} <= kinds


def test_a_gap_held_up_by_a_full_ring_is_told_once() -> None:
    level = (Kind.LEVEL, 2, 0, 0, 9_999 * DEFAULT_TICK, 5, 0, 0, 1)
    gaps = [(Kind.GAP, ALL_INSTRUMENTS, NO_SIDE, 0, source, 0, first, first + 1, 1) for first in range(40) for source in (0, 1)]
    clears = [(Kind.CLEAR, ALL_INSTRUMENTS, NO_SIDE, 0, source, 0, 0, 0, 1) for source in (0, 1)]
    for seed in range(8):
        check([level, *gaps[:3], *clears, *gaps], capacity=64, seed=seed)


def test_an_instrument_first_seen_after_a_gap_of_its_source_is_stale() -> None:
    """Until the source's new session clears it; one of another source is not, nor one that is first seen after the new session."""
    prices = [(Kind.ADD, 0, 0, 0, 9_990 * DEFAULT_TICK, 5, 1, 0, 1), (Kind.ADD, 1, 0, 0, 9_991 * DEFAULT_TICK, 5, 2, 0, 1)]
    gap = (Kind.GAP, ALL_INSTRUMENTS, NO_SIDE, 0, 0, 0, 3, 9, 1)
    level = (Kind.LEVEL, 2, 0, 0, 9_992 * DEFAULT_TICK, 5, 0, 0, 1)
    fresh = (Kind.CLEAR, ALL_INSTRUMENTS, NO_SIDE, 0, 0, 0, 0, 0, 1)
    definitions, (gap_event, add_1, level_2, clear, add_0) = np.split(
        rows_to_events([gap, prices[1], level, fresh, prices[0]]), [len(SYMBOLS)]
    )
    of = [definitions[i : i + 1] for i in range(3)]
    rest = [event.reshape(1) for event in (gap_event, add_1, level_2, clear, add_0)]
    outputs = check_events(np.concatenate([rest[0], of[1], rest[1], of[2], rest[2], rest[3], of[0], rest[4]]))
    bbos = [(int(b["instrument"]), bool(b["flags"] & Flag.STALE)) for b in outputs[outputs["kind"] == Kind.BBO]]
    assert bbos == [(1, True), (1, True), (2, False), (1, False), (0, False)]


def test_the_twins_book_is_the_books_twin() -> None:
    assert isinstance(ShardTwin((), frozenset(), None, 1).book, DictBook)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_index_leaves_its_array() -> None:
    """The same once more, compiled with bounds checks."""
    check_again(__file__, "outputs")
