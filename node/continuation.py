"""How a shard goes on with its sources on another node: ids that do not depend on the node, and where in each source the journal ends.

Every node numbers instruments as they appear to it. A shard numbers its own, in the order in which its journal meets them, so that a
journal means the same everywhere: :func:`localize` turns the one into the other before an event is journalled.

A standby receives the same feeds as its leader, and throws away what the leader's journal has already (:func:`trim`). When it takes over,
it goes on after the last event that the journal has (:func:`resume`): by the source's own sequence, and among events of one message by
count. Timers are judged by their time, since silence is not measured alike on two hosts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tickmesh.node.event import ALL_INSTRUMENTS, NO_INSTRUMENT, Kind
from tickmesh.transports.ring import ring_available, ring_read_slot, ring_release
from tickmesh.transports.toolbox import copy_record, inlined, outlined, quick

POSITION = np.dtype(
    [
        ("sequence", "<u8"),
        ("same", "<i8"),
        ("session", "<u8"),
        ("timer_ns", "<i8"),
        ("own_session", "<u8"),
        ("resuming", "<i8"),
        ("left", "<i8"),
    ]
)
"""Where a journal stands in a source: the last sequence and how many events with it, the venue's session (the `id` of the last CLEAR or
CODE of the whole source, 0 before the first), the time of the last timer (ns, the source's clock). And of this node's own receiver: the
session that its ring begins in; while a new leader looks for its place, `resuming` is not 0, `left` events of the last sequence are to be
skipped. A CODE of the whole source says that it begins at sequence `seq` of session `id`; unlike a CLEAR it empties nothing.

With `same` 0 there is nothing more of the last sequence: a gap has ended there, or the source began behind it."""

_CLEAR, _REFERENCE, _GAP, _TIMER, _CONFIG, _CODE, _PEER_REFERENCE = (
    np.uint8(kind) for kind in (Kind.CLEAR, Kind.REFERENCE, Kind.GAP, Kind.TIMER, Kind.CONFIG, Kind.CODE, Kind.PEER_REFERENCE)
)
_ALL, _NONE = np.uint32(ALL_INSTRUMENTS), np.uint32(NO_INSTRUMENT)
_U = np.uint64
MADE_HERE = 1
"""In the `aux` of a CLEAR: the node empties the source's books, and the venue's session goes on."""
UNSEEN = np.uint32(NO_INSTRUMENT)
"""In a table of ids: the shard has not met the instrument."""


def make_ids(instruments_max: int) -> tuple[Any, Any]:
    """A shard's table of ids (u32 by the node's id), and i64[1], how many it has given."""
    return np.full(instruments_max, UNSEEN, np.uint32), np.zeros(1, np.int64)


def make_positions(sources: int) -> Any:
    """POSITION[sources], at the beginning of every source."""
    return np.zeros(sources, POSITION)


class Place(NamedTuple):
    """Where the journals of a node's shards end in a source.

    Attributes:
        sequence: the first of the source's sequences that one of them may lack; another may have it, or a part of its events.
        session: the venue's session in which it counts; 0: not known.
        is_one: whether they all stand in one session; else the venue's current one is begun with anew.
    """

    sequence: int
    session: int
    is_one: bool


@inlined
def localize(ids: Any, given: Any, batch: Any, count: Any) -> None:
    """Give the events of ``batch[:count]`` the shard's ids in place of the node's; an instrument that is new gets the next one."""
    for i in range(count):
        event = batch[i]
        if event.instrument < np.uint32(ids.size):
            known = ids[event.instrument]
            if known == UNSEEN:
                known = np.uint32(given[0])
                ids[event.instrument] = known
                given[0] += 1
            event.instrument = known


@inlined
def _is_whole(event: Any) -> Any:
    return event.instrument == _ALL


@inlined
def _is_session(event: Any) -> Any:
    """Whether a new session of the venue begins."""
    return event.kind == _CLEAR and _is_whole(event) and event.aux != MADE_HERE


@inlined
def advance(position: Any, event: Any) -> None:
    """Take note of an event of a source that the journal has now."""
    if event.kind == _PEER_REFERENCE:
        return
    if event.kind == _TIMER:
        position.timer_ns = max(position.timer_ns, event.ts_event)
        return
    if _is_session(event):  # a new session counts from the beginning
        position.sequence = _U(0)
        position.same = np.int64(0)
        position.session = event.id
    elif event.kind == _CODE and _is_whole(event):  # what comes next, none of which the journal has
        if event.id != _U(0):
            position.session = event.id
        if event.seq > position.sequence + _U(1):
            position.sequence = event.seq - _U(1)
            position.same = np.int64(0)
    elif event.kind == _GAP and _is_whole(event):
        if _U(event.aux) > position.sequence:
            position.sequence = _U(event.aux)
            position.same = np.int64(0)
    elif event.seq > position.sequence:
        position.sequence = event.seq
        position.same = np.int64(1)
    elif event.seq == position.sequence:
        position.same += 1


@inlined
def _source_of(owners: Any, event: Any) -> Any:
    if event.kind == _CONFIG:
        return np.int64(-1)
    if _is_whole(event):
        return event.price
    if event.instrument >= np.uint32(owners.size):
        return np.int64(-1)
    if event.kind == _REFERENCE or event.kind == _CODE or event.kind == _PEER_REFERENCE:
        owners[event.instrument] = np.int32(event.flags)
    return np.int64(owners[event.instrument])


@quick
def follow_positions(positions: Any, owners: Any, batch: Any) -> None:
    """Take note of events of a journal, as they were journalled: where each source stands after them.

    Args:
        positions: POSITION by source.
        owners: i32 by the shard's instrument, its source; -1 before its REFERENCE. Kept up here.
        batch: EVENT.
    """
    for i in range(batch.size):
        source = _source_of(owners, batch[i])
        if 0 <= source < positions.size:
            advance(positions[source], batch[i])


def first_lacking(position: Any) -> int:
    """The first sequence of a source of which its journal may lack an event; 0: the source counts none."""
    return int(position["sequence"]) + int(position["same"] == 0)


@inlined
def _introduces(ids: Any, event: Any) -> Any:
    """Whether it is a definition of an instrument that the shard has not met, or says that its book is not known."""
    met = event.instrument >= np.uint32(ids.size) or ids[event.instrument] != UNSEEN
    return not met and (event.kind == _REFERENCE or event.kind == _CODE or event.kind == _GAP)


@outlined
def resume(position: Any, ids: Any, batch: Any, count: Any) -> Any:
    """Take out of ``batch[:count]``, events of one source as its receiver gave them, what the journal has already; returns how many stay.

    `position` is POSITION[1], `ids` the shard's by the node's. A gap that begins before the place and ends after it is cut; a session that
    is newer than the place is taken from its beginning. A gap of unknown size stays wherever it is, and so does what introduces an
    instrument: a definition channel goes round beside the feed, and not at the same place on every node. From the first other event that
    stays, everything stays.
    """
    at = position[0]
    kept = np.int64(0)
    for i in range(count):
        event = batch[i]
        if at.resuming != 0:
            if event.kind == _TIMER:
                if event.ts_event <= at.timer_ns:
                    continue
            elif _introduces(ids, event):
                pass
            elif at.own_session != at.session:
                if _is_session(event):
                    at.own_session = event.id
                continue
            elif _is_session(event):
                at.resuming = 0
            elif event.kind == _CODE and _is_whole(event):
                if at.session != 0:
                    continue
            elif event.kind == _GAP and _is_whole(event):
                if event.aux != 0:  # of an unknown one nobody knows whether the journal has it: it stays
                    if _U(event.aux) <= at.sequence:
                        continue
                    event.id = max(event.id, at.sequence + _U(1))
                    at.resuming = 0
            elif event.seq < at.sequence or (event.seq == at.sequence and at.same == 0 and at.sequence > _U(0)):
                continue
            elif event.seq == at.sequence and at.left > 0:
                at.left -= 1
                continue
            else:
                at.resuming = 0
        if kept != i:
            copy_record(batch, kept, batch, i)
        kept += 1
    return kept


def begin_resuming(positions: Any) -> None:
    """Before a new leader reads its sources: look for the place in each that the journal has anything of."""
    positions["resuming"] = (positions["sequence"] > 0) | (positions["timer_ns"] != 0) | (positions["session"] != 0)
    positions["left"] = positions["same"]


@outlined
def trim(position: Any, ring: Any, reader: Any, most: Any) -> Any:
    """A standby: let go of up to `most` events at the front of a source's ring that the leader's journal has; returns how many.

    What has the journal's last sequence stays: only a takeover knows how many of those it has.
    """
    at = position[0]
    gone = np.int64(0)
    available = min(ring_available(ring, reader), np.int64(most))
    while gone < available:
        event = ring.slots[ring_read_slot(ring, reader, gone)]
        if event.kind == _TIMER:
            if event.ts_event > at.timer_ns:
                break
        elif at.own_session != at.session:
            if _is_session(event):
                at.own_session = event.id
        elif _is_session(event):
            break
        elif event.kind == _GAP and _is_whole(event):
            if _U(event.aux) > at.sequence:
                break
        elif event.seq >= at.sequence:
            break
        gone += 1
    if gone > 0:
        ring_release(ring, reader, gone)
    return gone
