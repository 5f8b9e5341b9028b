"""Joins: what a calculation over several instruments takes, put into one order, wherever the instruments live.

Such a calculation has *legs*, ``inputs = ["bbo:AAPL", "trade:MSFT"]``. A leg's events come from the shard's own books or, if the
instrument lives on another shard, from that one's output stream, at their own pace. Each waits here until no earlier one of another leg
can come, and then they are taken in the order of their time; of the same time, in the order of the legs. So what the calculation sees
depends on what each instrument has put out, and not on which shards they are on, nor on what travels how fast.

A leg is known to have come to a time by its next event, or by a TIMER of its source: no event made before the TIMER follows it. A TIMER
that the host's clock has made in a silence promises nothing of the kind, and counts only where the legs are of several sources, which
have no order of their own. What comes late nevertheless is taken as if it had come at the time that its leg had reached.

What waits is bounded, :data:`DEPTH` events a leg. Where a leg is full, its events go on without waiting for the others, which is counted.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import Any

import numpy as np

from tickmesh.node.event import ANY_VIEW, DERIVED, Kind, Told
from tickmesh.node.instruments import symbol_words
from tickmesh.node.symbol_filter import symbol_word
from tickmesh.transports.toolbox import inlined, outlined

DEPTH = 4096
"""Events of one leg that wait, a power of two."""
LEGS_MAX = 128
BY_KIND = {"bbo": 0, "trade": 1}
"""What a leg can be, and its row in `Join.legs`."""
_FULL = DEPTH - 8  # one input event adds one to a leg, so that this is room enough

LANE = np.dtype([("time", "<i8"), ("head", "<i8"), ("tail", "<i8"), ("source", "<i4"), ("feed", "<i4")])
"""One leg: how far it is known to have come (ns; 0: nothing is known), its events taken and put, the source number of its instrument in
this shard (-1: not met yet), and the number of the feed that it comes from there where it lives."""
STATE = np.dtype([("home", "<i8"), ("several", "<i8"), ("met", "<i8"), ("forced", "<i8")])
"""Instrument + 1 that stands for the calculation (0: it is at home on another shard, or not announced yet); whether the legs are of several
sources; whether the instruments from before have been looked at; events that went on without waiting."""

Join = namedtuple("Join", "slots times lanes state legs names")
"""`slots` ANY_VIEW[legs * DEPTH], the events that wait; `times` i64, when each counts as of; `lanes` LANE[legs]; `state` STATE[1]; `legs`
u8[2, instruments], leg + 1 of an instrument's BBOs and of its trades; `names` u64[legs + 1, 4], symbol and row in `legs`, last our own."""

_U = np.uint64
_DERIVED, _BY_CLOCK = np.int32(DERIVED), np.int64(Told.BY_CLOCK)
_BBO, _TRADE = np.uint8(Kind.BBO), np.uint8(Kind.TRADE)
_NEVER = np.int64((1 << 63) - 1)


def make_join(name: str, legs: Sequence[tuple[str, str]], instruments_max: int) -> Any:
    """The arrays of one calculation's join.

    Args:
        name: of the calculation.
        legs: (``bbo`` or ``trade``, symbol) of each.
        instruments_max: highest instrument id + 1.
    """
    names = np.array([(*symbol_words(symbol), BY_KIND[kind]) for kind, symbol in legs] + [(*symbol_words(name), 0)], np.uint64)
    lanes, count = np.zeros(len(legs), LANE), len(legs)
    lanes["source"] = -1
    slots, times = np.zeros(count * DEPTH, ANY_VIEW), np.zeros(count * DEPTH, np.int64)
    return Join(slots, times, lanes, np.zeros(1, STATE), np.zeros((2, instruments_max), np.uint8), names)


@outlined
def join_meet(join: Any, info: Any, i: Any) -> None:
    """An instrument is defined: is it one of the legs, or does it stand for the calculation?"""
    r, count = info[i], join.lanes.size
    w0, w1, w2 = symbol_word(r.symbol, 0), symbol_word(r.symbol, 8), symbol_word(r.symbol, 16)
    own = join.names[count]
    if r.source == _DERIVED:
        if own[0] == w0 and own[1] == w1 and own[2] == w2:
            join.state[0].home = i + 1
        return
    for j in range(count):
        name = join.names[j]
        if name[0] == w0 and name[1] == w1 and name[2] == w2:
            join.legs[np.int64(name[3]), i] = np.uint8(j + 1)
            join.lanes[j].source = r.source
            join.lanes[j].feed = r.feed
    first = np.int32(-1)
    for j in range(count):
        feed = join.lanes[j].feed
        if join.lanes[j].source >= 0:
            if first < 0:
                first = feed
            elif feed != first:
                join.state[0].several = 1


@outlined
def _meet_all(join: Any, core: Any, info: Any) -> None:
    join.state[0].met = 1
    for i in range(core[0].instruments):
        if info[i].tick_size != 0:
            join_meet(join, info, i)


@inlined
def join_put(join: Any, core: Any, info: Any, row: Any, i: Any, event: Any) -> None:
    """A BBO (`row` 0) or trade (1) of instrument `i` comes in."""
    if join.state[0].met == 0:
        _meet_all(join, core, info)
    leg = join.legs[row, i]
    if leg != 0 and join.state[0].home != 0:
        _put(join, core, row, np.int64(leg) - 1, event)


@outlined
def _put(join: Any, core: Any, row: Any, leg: Any, event: Any) -> None:
    lane = join.lanes[leg]
    lane.time = max(lane.time, event.ts_event)
    place = leg * DEPTH + (lane.tail & (DEPTH - 1))
    join.times[place] = lane.time
    slot = join.slots[place]
    slot.seq = _U(0)
    slot.ts_event = event.ts_event
    slot.ts_recv = event.ts_recv
    slot.instrument = np.uint32(join.state[0].home - 1)
    slot.kind = _TRADE if row == 1 else _BBO
    slot.side = event.side
    slot.flags = event.flags
    slot.price = event.price
    slot.qty = event.qty
    slot.id = event.id
    slot.aux = event.aux
    lane.tail += 1
    core[0].releasing = 1


@outlined
def join_time(join: Any, core: Any, info: Any, source: Any, feed: Any, time_ns: Any, told: Any) -> None:
    """A source has come to a time, here (`source` = `feed`) or on another shard (`source` is that shard's number, see PEERS)."""
    if join.state[0].met == 0:
        _meet_all(join, core, info)
    if join.state[0].home == 0 or (np.int64(told) == _BY_CLOCK and join.state[0].several == 0):
        return
    for j in range(join.lanes.size):
        lane = join.lanes[j]
        if np.int64(lane.source) == np.int64(source) and np.int64(lane.feed) == np.int64(feed):
            lane.time = max(lane.time, np.int64(time_ns))
            core[0].releasing = 1


@outlined
def join_next(join: Any) -> Any:
    """The leg whose first event is next; -1: one has to wait for another leg, or there is none."""
    best, waiting = np.int64(-1), np.int64(-1)
    best_time, waiting_time = _NEVER, _NEVER
    full = False
    for j in range(join.lanes.size):
        lane = join.lanes[j]
        time_ns, held = lane.time, lane.tail - lane.head
        if held > 0:
            time_ns = join.times[j * DEPTH + (lane.head & (DEPTH - 1))]
            full = full or held >= _FULL
            if time_ns < waiting_time:
                waiting, waiting_time = np.int64(j), time_ns
        if time_ns < best_time:
            best, best_time = np.int64(j), time_ns
    if best == waiting:
        return best
    if full:
        join.state[0].forced += 1
        return waiting
    return np.int64(-1)


@inlined
def join_take(join: Any, leg: Any) -> Any:
    """Place of a leg's first event, which is taken out; it stays readable until the next one is put in."""
    lane = join.lanes[leg]
    place = leg * DEPTH + (lane.head & (DEPTH - 1))
    lane.head += 1
    return place


def forced(arrays: Any) -> int:
    """Events of a shard's joins that went on without waiting, since a leg was full."""
    return sum(int(getattr(arrays, name).state["forced"][0]) for name in arrays._fields if name[0] == "q")
