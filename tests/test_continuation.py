"""A shard's ids do not depend on the node, and a new leader goes on after the last event of the journal, whatever its own receiver did."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tickmesh.node.continuation import (
    UNSEEN,
    advance,
    begin_resuming,
    follow_positions,
    localize,
    make_ids,
    make_positions,
    resume,
    trim,
)  # fmt: skip
from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, NO_INSTRUMENT, EventArray, Kind
from tickmesh.node.restore import Restored, RestoredShard
from tickmesh.transports.ring import Ring
from tickmesh.transports.toolbox import loop


@loop
def _localize_now(ids: Any, given: Any, batch: Any, count: Any) -> None:
    localize(ids, given, batch, count)


@loop
def _advance_all(position: Any, batch: Any, count: Any) -> None:
    for i in range(count):
        advance(position[0], batch[i])


@loop
def _resume_compiled(position: Any, ids: Any, batch: Any, count: Any) -> Any:
    return resume(position, ids, batch, count)


def _resume_now(position: Any, batch: EventArray, count: int, ids: Any = None) -> int:
    """`ids`: of the shard; default: it has met every instrument."""
    return int(_resume_compiled(position, np.zeros(16, np.uint32) if ids is None else ids, batch, count))


@loop
def _trim_now(position: Any, ring: Any, reader: Any, most: Any) -> Any:
    return trim(position, ring, reader, most)


def events(rows: list[dict[str, Any]]) -> EventArray:
    out = np.zeros(len(rows), EVENT)
    for one, row in zip(out, rows):
        for name, value in row.items():
            one[name] = value
    return out


@st.composite
def feeds(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A source as its decoder gives it: messages of one to three events, gaps, a new session now and then; no timers."""
    out: list[dict[str, Any]] = []
    sequence, session, now = 1, 0, 1000
    for _ in range(draw(st.integers(1, 40))):
        now += draw(st.integers(1, 50))
        what = draw(st.integers(0, 19))
        if what == 0 and out:
            session += 1
            out.append({"kind": Kind.CLEAR, "instrument": ALL_INSTRUMENTS, "ts_event": now, "id": session})
            sequence = 1
        elif what == 1:
            last = sequence + draw(st.integers(0, 5))
            out.append({"kind": Kind.GAP, "instrument": ALL_INSTRUMENTS, "id": sequence, "aux": last, "seq": sequence, "ts_event": now})
            sequence = last + 1
        else:
            for part in range(draw(st.integers(1, 3))):
                instrument = draw(st.sampled_from([3, 9, 4]))
                out.append({"kind": Kind.ADD, "seq": sequence, "id": 100 * len(out) + part, "ts_event": now, "instrument": instrument})
            sequence += 1
    return out


def with_timers(feed: list[dict[str, Any]], every: int, phase: int) -> list[dict[str, Any]]:
    """The same with timers; more of them where a receiver has counted silence."""
    out: list[dict[str, Any]] = []
    due = every
    for row in feed:
        if row["ts_event"] >= due:
            boundary = row["ts_event"] // every * every
            if phase and boundary - every >= due:
                out.append({"kind": Kind.TIMER, "instrument": ALL_INSTRUMENTS, "ts_event": boundary - every, "price": 0})
            out.append({"kind": Kind.TIMER, "instrument": ALL_INSTRUMENTS, "ts_event": boundary, "price": 0})
            due = boundary + every
        out.append(row)
    return out


def market(batch: EventArray) -> list[tuple[int, ...]]:
    """What a batch says beside timers; a gap that was cut counts for what it leaves."""
    rows: list[tuple[int, ...]] = []
    for one in batch:
        if one["kind"] == Kind.GAP:
            rows.extend((15, number) for number in range(int(one["id"]), int(one["aux"]) + 1))
        elif one["kind"] != Kind.TIMER:
            rows.append((int(one["kind"]), int(one["seq"]), int(one["id"]), int(one["ts_event"])))
    return rows


@settings(deadline=None)
@given(feeds(), st.data())
def test_a_new_leader_goes_on_after_the_last_event_of_the_journal(feed: list[dict[str, Any]], data: st.DataObject) -> None:
    leader = events(with_timers(feed, 100, 0))
    standby = events(with_timers(feed, 100, data.draw(st.integers(0, 1))))
    cut = data.draw(st.integers(0, len(leader)))
    position = make_positions(1)
    _advance_all(position, leader[:cut], cut)
    begin_resuming(position)
    kept, at = [], 0
    while at < len(standby):
        size = data.draw(st.integers(1, 8))
        batch = standby[at : at + size].copy()
        kept.append(batch[: _resume_now(position, batch, len(batch))])
        at += size
    assert market(np.concatenate([leader[:cut], *kept])) == market(leader)
    taken = np.concatenate([leader[:cut], *kept])
    timers = taken["ts_event"][taken["kind"] == Kind.TIMER]
    assert (np.diff(timers) > 0).all()


@settings(deadline=None)
@given(feeds(), st.data())
def test_a_standby_keeps_everything_that_a_takeover_may_need(feed: list[dict[str, Any]], data: st.DataObject) -> None:
    leader, standby = events(with_timers(feed, 100, 0)), events(with_timers(feed, 100, 1))
    cut = data.draw(st.integers(0, len(leader)))
    position = make_positions(1)
    with Ring.create(None, 512, EVENT) as ring:
        reader = ring.reader("standby")
        for first in range(0, max(1, cut), 7):
            part = leader[first : min(first + 7, cut)]
            _advance_all(position, part, len(part))
            mine = standby[first : first + 7]
            ring.writer.write(mine)
            _trim_now(position, ring.arrays, reader.slot, 64)
        ring.writer.write(standby[len(range(0, max(1, cut), 7)) * 7 :])
        while _trim_now(position, ring.arrays, reader.slot, 3):
            pass
        begin_resuming(position)
        left = reader.read(512).view(EVENT).copy()
        left = left[: _resume_now(position, left, len(left))]
    assert market(np.concatenate([leader[:cut], left])) == market(leader)


@settings(deadline=None)
@given(feeds(), st.data())
def test_a_restarted_node_gives_each_shard_what_its_journal_lacks(feed: list[dict[str, Any]], data: st.DataObject) -> None:
    """Two shards whose journals were cut anywhere; the receiver begins again where one of them may lack something."""
    shards = [_defined(feed, instruments) for instruments in ((3, 9), (4,))]
    cuts = [data.draw(st.integers(1, len(rows))) for rows in shards]
    restored = Restored()
    for rows, cut in zip(shards, cuts):
        restored.shards.append(RestoredShard())
        restored.shards[-1].take(events(rows[:cut]))
    place = restored.place(0)
    assert place is not None
    assume(place.is_one)
    for rows, cut, shard in zip(shards, cuts, restored.shards):
        begun = max((i for i, row in enumerate(rows) if row.get("id") == place.session and row["kind"] in (Kind.CLEAR, Kind.CODE)))
        known = {row["instrument"] for row in rows[:cut] if row["kind"] == Kind.REFERENCE} - {shard.unfinished}
        again = [
            row
            for row in rows[begun + 1 :]
            if (row["kind"] == Kind.CLEAR or max(row["seq"], row.get("aux", 0)) >= place.sequence or _later(rows, row, begun))
            and not (row["kind"] in (Kind.REFERENCE, Kind.CODE) and row["instrument"] in known)
        ]
        position, batch = shard.resuming(0), events(again)
        kept = batch[: _resume_now(position, batch, len(batch))]
        journal = events(rows[: cut - 1 if shard.unfinished >= 0 else cut])  # an unfinished definition comes again
        assert market(np.concatenate([journal, kept])) == market(events(rows))


def _later(rows: list[dict[str, Any]], row: dict[str, Any], begun: int) -> bool:
    """Whether it is of a session that begins behind `begun`."""
    place = next(i for i, one in enumerate(rows) if one is row)
    return any(one["kind"] == Kind.CLEAR for one in rows[begun + 1 : place])


def _defined(feed: list[dict[str, Any]], instruments: tuple[int, ...]) -> list[dict[str, Any]]:
    """What a shard gets of a feed: where it begins, and each instrument's definition before its first event."""
    out: list[dict[str, Any]] = [{"kind": Kind.CODE, "instrument": ALL_INSTRUMENTS, "id": 1 << 40, "seq": 1, "ts_event": 1}]
    met: set[int] = set()
    for row in feed:
        row = {"seq": 0, **row}
        number = row["instrument"]
        if number != ALL_INSTRUMENTS and number not in instruments:
            continue
        if number != ALL_INSTRUMENTS and number not in met:
            met.add(number)
            out += [{**row, "kind": kind, "id": 7} for kind in (Kind.REFERENCE, Kind.CODE)]
        out.append(row)
    return out


def _whole(kind: Kind, **values: int) -> dict[str, Any]:
    return {"kind": kind, "instrument": ALL_INSTRUMENTS, **values}


@pytest.mark.parametrize("begins", [1, 7])
def test_a_gap_at_the_very_beginning_is_not_taken_for_journalled(begins: int) -> None:
    """The journal has only that the source begins; what its first sequences were nobody knows, and the shard must be told."""
    shard = RestoredShard()
    shard.take(events([_whole(Kind.CODE, id=1 << 40, seq=begins)]))
    restored = Restored([shard])
    place = restored.place(0)
    assert place == (begins, 1 << 40, True)
    position = shard.resuming(0)
    batch = events([_whole(Kind.GAP, id=begins, aux=begins + 2, seq=begins), {"kind": Kind.ADD, "seq": begins + 3}])
    assert _resume_now(position, batch, 2) == 2
    assert (int(batch["id"][0]), int(batch["aux"][0])) == (begins, begins + 2)


def test_what_a_journalled_gap_has_told_does_not_come_again() -> None:
    """A server may still have it, for another shard that lacks more; this one's journal says that it was lost."""
    shard = RestoredShard()
    shard.take(events([_whole(Kind.CODE, id=5, seq=1), _whole(Kind.GAP, id=1, aux=4, seq=1)]))
    place = Restored([shard]).place(0)
    assert place is not None
    assert place.sequence == 5
    batch = events([{"kind": Kind.ADD, "seq": seq} for seq in (3, 4, 4, 5, 5)])
    assert batch[: _resume_now(shard.resuming(0), batch, 5)]["seq"].tolist() == [5, 5]


def test_what_introduces_an_instrument_is_taken_wherever_it_is() -> None:
    """A definition channel goes round beside the feed: our receiver may have come by a definition before the journal's end, and later than
    the takeover."""
    position = make_positions(1)
    journal = events([{"kind": Kind.ADD, "seq": 20, "instrument": 0}])
    _advance_all(position, journal, 1)
    begin_resuming(position)
    ids, given = make_ids(8)
    ids[5], given[0] = 0, 1
    rows = [
        {"kind": Kind.REFERENCE, "seq": 18, "instrument": 5}, {"kind": Kind.CODE, "seq": 18, "instrument": 5},
        {"kind": Kind.GAP, "seq": 18, "instrument": 5}, {"kind": Kind.REFERENCE, "seq": 18, "instrument": 6},
        {"kind": Kind.CODE, "seq": 18, "instrument": 6}, {"kind": Kind.GAP, "seq": 18, "instrument": 6},
        {"kind": Kind.ADD, "seq": 19, "instrument": 6}, {"kind": Kind.ADD, "seq": 20, "instrument": 5},
        {"kind": Kind.ADD, "seq": 21, "instrument": 6}, {"kind": Kind.GAP, "seq": 21, "instrument": 5},
    ]  # fmt: skip
    mine = events(rows)
    kept = mine[: _resume_now(position, mine, len(mine), ids)]
    assert [(Kind(int(e["kind"])), int(e["seq"]), int(e["instrument"])) for e in kept] == [
        (Kind.REFERENCE, 18, 6), (Kind.CODE, 18, 6), (Kind.GAP, 18, 6), (Kind.ADD, 21, 6), (Kind.GAP, 21, 5)
    ]  # fmt: skip
    place = position.copy()
    _advance_all(position, kept[:3], 3)
    assert position.tolist() == place.tolist(), "the journal stands where it stood"


def test_a_snapshot_of_an_earlier_release_loses_nothing() -> None:
    """There, nothing of a sequence also meant that it came next."""
    shard = RestoredShard()
    shard.positions[0]["sequence"], shard.positions[0]["session"] = 7, 9
    facts = shard.as_json()
    del facts["positions_mean"]
    place = Restored([RestoredShard.from_json(facts)]).place(0)
    assert place is not None
    assert place.sequence == 7
    again = Restored([RestoredShard.from_json(shard.as_json())]).place(0)
    assert again is not None
    assert again.sequence == 8


def test_a_gap_of_unknown_size_stays_and_what_the_journal_has_behind_it_goes() -> None:
    position = make_positions(1)
    position["sequence"], position["same"] = 10, 1
    begin_resuming(position)
    rows = [{"kind": Kind.ADD, "seq": seq, "id": seq} for seq in (9, 10, 11)]
    batch = events([{"kind": Kind.GAP, "instrument": ALL_INSTRUMENTS}, *rows])
    kept = batch[: _resume_now(position, batch, len(batch))]
    assert kept["seq"].tolist() == [0, 11]


def test_a_gap_that_the_journal_had_in_part_is_cut() -> None:
    position = make_positions(1)
    seen = events([{"kind": Kind.ADD, "seq": number, "instrument": 1, "ts_event": number} for number in range(1, 12)])
    _advance_all(position, seen, len(seen))
    begin_resuming(position)
    mine = events([{"kind": Kind.GAP, "instrument": ALL_INSTRUMENTS, "id": 9, "aux": 14, "seq": 9, "ts_event": 20}])
    assert _resume_now(position, mine, 1) == 1
    assert (int(mine["id"][0]), int(mine["aux"][0])) == (12, 14)


def test_a_source_that_the_journal_has_nothing_of_is_taken_from_its_beginning() -> None:
    position = make_positions(1)
    begin_resuming(position)
    mine = events([{"kind": Kind.ADD, "seq": 5, "instrument": 1}] * 2)
    assert _resume_now(position, mine, 2) == 2


@settings(deadline=None)
@given(st.lists(st.integers(0, 31), max_size=200))
def test_instruments_are_numbered_as_the_journal_meets_them(numbers: list[int]) -> None:
    ids, given_out = make_ids(32)
    batch = events([{"kind": Kind.ADD, "instrument": number} for number in numbers])
    _localize_now(ids, given_out, batch, len(batch))
    order = list(dict.fromkeys(numbers))
    assert batch["instrument"].tolist() == [order.index(number) for number in numbers]
    assert given_out[0] == len(order)
    assert all((ids[number] == UNSEEN) == (number not in order) for number in range(32))


def test_what_concerns_no_single_instrument_keeps_its_number() -> None:
    ids, given_out = make_ids(8)
    batch = events([{"instrument": ALL_INSTRUMENTS}, {"instrument": NO_INSTRUMENT}])
    _localize_now(ids, given_out, batch, 2)
    assert batch["instrument"].tolist() == [ALL_INSTRUMENTS, NO_INSTRUMENT]
    assert given_out[0] == 0


def test_a_standby_knows_of_each_event_which_source_it_is_of() -> None:
    owners = np.array([-1, 0, 2, -1], np.int32)
    positions = make_positions(3)
    batch = events([
        {"kind": Kind.ADD, "instrument": 1, "seq": 7},
        {"kind": Kind.ADD, "instrument": 2, "seq": 40},
        {"kind": Kind.ADD, "instrument": 2, "seq": 40},
        {"kind": Kind.REFERENCE, "instrument": 3, "seq": 9, "flags": 1},
        {"kind": Kind.CONFIG, "instrument": ALL_INSTRUMENTS, "price": 0, "seq": 99},
        {"kind": Kind.TIMER, "instrument": ALL_INSTRUMENTS, "price": 2, "ts_event": 5000},
        {"kind": Kind.ADD, "instrument": 0, "seq": 77},
    ])  # fmt: skip
    follow_positions(positions, owners, batch)
    assert owners.tolist() == [-1, 0, 2, 1]
    assert positions["sequence"].tolist() == [7, 9, 40]
    assert positions["same"].tolist() == [1, 1, 2]
    assert positions["timer_ns"].tolist() == [0, 0, 5000]


@settings(deadline=None)
@given(feeds(), st.data())
def test_a_receiver_that_started_in_a_later_session_finds_its_place(feed: list[dict[str, Any]], data: st.DataObject) -> None:
    leader = events(feed)
    cut = data.draw(st.integers(0, len(leader)))
    position = make_positions(1)
    _advance_all(position, leader[:cut], cut)
    begun = data.draw(st.integers(0, cut))
    while 0 < begun < len(leader) and leader[begun]["seq"] == leader[begun - 1]["seq"]:
        begun -= 1  # a receiver begins with a whole message
    session = max([int(one["id"]) for one in leader[:begun] if one["kind"] == Kind.CLEAR], default=0)
    position["own_session"] = session or position["session"]
    begin_resuming(position)
    mine = leader[begun:].copy()
    mine = mine[: _resume_now(position, mine, len(mine))]
    if session or not position["session"][0]:
        assert market(np.concatenate([leader[:cut], mine])) == market(leader)
