"""Joins: events of several legs in the order of their time, whatever travels how fast; against an order made by sorting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node.event import DERIVED, EVENT, PEERS, Kind, Told
from tickmesh.node.instruments import symbol_words
from tickmesh.node.joining import DEPTH, join_meet, join_next, join_put, join_take, join_time, make_join
from tickmesh.node.shard_state import CORE, INSTRUMENT_INFO

LEGS = (("bbo", "AAA"), ("trade", "BBB"), ("bbo", "CCC"))
HOME = 7
BY_EVENT, BY_CLOCK = int(Told.BY_EVENT), int(Told.BY_CLOCK)


class Joined:
    """A join of :data:`LEGS`, whose instruments are 0, 1, 2 and come from sources 4, 4 and, if `several`, 5."""

    def __init__(self, several: bool = False, at_home: bool = True) -> None:
        self.join, self.core, self.info = make_join("pair", LEGS, 16), np.zeros(1, CORE), np.zeros(16, INSTRUMENT_INFO)
        self.sources = (4, PEERS + 3, PEERS + 3)
        self.feeds = (4, 4, 5 if several else 4)
        for i, (_, symbol) in enumerate(LEGS):
            self.define(i, symbol, self.sources[i], self.feeds[i])
        if at_home:
            self.define(HOME, "pair", DERIVED, DERIVED)

    def define(self, i: int, symbol: str, source: int, feed: int) -> None:
        record = self.info[i]
        record["tick_size"], record["source"], record["feed"] = 1, source, feed
        record["symbol"] = np.frombuffer(b"".join(int(word).to_bytes(8, "little") for word in symbol_words(symbol)), np.uint8)
        self.core["instruments"] = max(int(self.core["instruments"][0]), i + 1)
        join_meet(self.join, self.info, i)

    def put(self, leg: int, time_ns: int, number: int) -> None:
        event = np.zeros(1, EVENT)
        event["kind"], event["ts_event"], event["id"], event["instrument"] = Kind.BBO, time_ns, number, leg
        join_put(self.join, self.core, self.info, 1 if LEGS[leg][0] == "trade" else 0, leg, event[0])

    def tell(self, leg: int, time_ns: int, told: int = BY_EVENT) -> None:
        """All legs of the same source, on the same shard."""
        join_time(self.join, self.core, self.info, self.sources[leg], self.feeds[leg], time_ns, told)

    def taken(self) -> list[tuple[int, int]]:
        """(leg, number) of what waits for nothing any more."""
        found = []
        while (leg := int(join_next(self.join))) >= 0:
            slot: Any = self.join.slots[int(join_take(self.join, leg))]
            assert slot["instrument"] == HOME
            assert slot["kind"] == (Kind.TRADE if LEGS[leg][0] == "trade" else Kind.BBO)
            found.append((leg, int(slot["id"])))
        return found


def sorted_order(events: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(leg, number) of (leg, time) events in the order of their time, then of the legs; what is late counts as of the leg's time."""
    reached, keyed = [0] * len(LEGS), []
    for number, (leg, time_ns) in enumerate(events):
        reached[leg] = max(reached[leg], time_ns)
        keyed.append((reached[leg], leg, number))
    return [(leg, number) for _, leg, number in sorted(keyed)]


steps = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30)), max_size=60)


@settings(deadline=None, max_examples=150)
@given(events=steps, speeds=st.lists(st.integers(0, 2), max_size=300), data=st.data())
def test_the_order_is_that_of_the_times_however_the_legs_travel(events: list[tuple[int, int]], speeds: list[int], data: Any) -> None:
    joined, wanted, taken = Joined(), sorted_order(events), []
    queues = [[(number, time_ns) for number, (leg, time_ns) in enumerate(events) if leg == mine] for mine in range(3)]
    for leg in speeds:  # an arrival of this leg's next event
        if queues[leg]:
            number, time_ns = queues[leg].pop(0)
            joined.put(leg, time_ns, number)
            taken += joined.taken()
            assert taken == wanted[: len(taken)]
    for leg, queue in enumerate(queues):
        for number, time_ns in queue:
            joined.put(leg, time_ns, number)
    joined.tell(0, 1000)
    joined.tell(1, 1000)
    assert taken + joined.taken() == wanted


def test_the_same_time_is_in_the_order_of_the_legs() -> None:
    joined = Joined()
    joined.put(2, 5, 0)
    joined.put(1, 5, 1)
    joined.tell(1, 5)
    assert joined.taken() == []
    joined.put(0, 5, 2)
    assert joined.taken() == [(0, 2)]  # leg 0 may have another one of this time
    joined.tell(0, 6)
    joined.tell(1, 6)
    assert joined.taken() == [(1, 1), (2, 0)]


def test_a_clock_tells_nothing_of_legs_of_one_source() -> None:
    joined = Joined()
    joined.put(0, 5, 0)
    joined.tell(1, 9, BY_CLOCK)
    assert joined.taken() == []
    joined.tell(1, 9)
    assert joined.taken() == [(0, 0)]


def test_a_clock_tells_the_time_of_several_sources() -> None:
    joined = Joined(several=True)
    joined.put(0, 5, 0)
    joined.tell(1, 9, BY_CLOCK)
    assert joined.taken() == []
    joined.tell(2, 9, BY_CLOCK)
    assert joined.taken() == [(0, 0)]


def test_what_comes_late_counts_as_of_the_time_that_its_leg_had_reached() -> None:
    joined = Joined()
    joined.tell(1, 10)
    joined.put(0, 8, 0)
    assert joined.taken() == [(0, 0)]
    joined.put(1, 9, 1)
    joined.put(0, 11, 2)
    joined.tell(1, 12)
    assert joined.taken() == [(1, 1), (0, 2)]


def test_nothing_is_taken_before_the_calculation_is_at_home_here() -> None:
    joined = Joined(at_home=False)
    joined.put(0, 5, 0)
    joined.tell(0, 6)
    joined.tell(1, 6)
    assert joined.taken() == []
    assert joined.core["releasing"][0] == 0


def test_a_leg_that_is_full_waits_no_more_and_that_is_counted() -> None:
    joined, taken = Joined(), []
    for number in range(2 * DEPTH):
        joined.put(0, number + 1, number)
        taken += joined.taken()
    assert [number for _, number in taken] == list(range(len(taken)))
    assert len(taken) == joined.join.state["forced"][0] >= DEPTH
    joined.tell(1, 1 << 40)
    joined.tell(0, 1 << 40)
    assert [number for _, number in taken + joined.taken()] == list(range(2 * DEPTH))


def test_instruments_that_were_there_before_are_found() -> None:
    joined = Joined()
    fresh = make_join("pair", LEGS, 16)
    event = np.zeros(1, EVENT)
    event["ts_event"] = 3
    join_put(fresh, joined.core, joined.info, 0, 2, event[0])
    assert fresh.state["home"][0] == HOME + 1
    assert fresh.lanes["source"].tolist() == list(joined.sources)
    assert fresh.lanes["tail"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("row", [0, 1])
def test_other_instruments_and_other_kinds_are_left_alone(row: int) -> None:
    joined = Joined()
    event = np.zeros(1, EVENT)
    event["ts_event"] = 3
    join_put(joined.join, joined.core, joined.info, row, HOME, event[0])
    join_put(joined.join, joined.core, joined.info, 1 - row, 0 if row == 0 else 1, event[0])
    assert joined.join.lanes["tail"].sum() == 0
