"""Routing: a receiver's decoded events go to the input rings of the shards that own their instruments.

Each receiver is the one writer of one ring per shard. Events that concern a whole source (a gap, a new session, a timer) go to every shard
and are stamped with the source's number, and so is an instrument's definition, so that a shard knows whom they concern. After a
definition goes the instrument's numeric code, so that a journal is enough to restart from in the middle of a session.

A shard that gets nothing of a source for :data:`MARK_EVERY` sequences is told how far the source has come, by a CODE of the whole source,
so that its journal says that it lacks nothing before: after a restart that need not be asked for again.

Timers are made here: every event of every source passes, in the order in which its shards see it, on its way to their journals.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, NO_SIDE, Kind, Told
from tickmesh.node.timers import C_HOLD, NOT_LIVE, fill_timer, make_clock, timer_due, timer_in_silence, timer_seen
from tickmesh.transports.ring import RingArrays, ring_wait, ring_write_some
from tickmesh.transports.toolbox import copy_record, inlined, loop, monotonic_ns, now_ns, outlined, zeros_aligned

ROUTE_EVENTS = 256
"""Most events routed at once."""
MARK_EVERY = 4096
S_MARKS = 3
"""In ``Router.settings``."""
_STAGED = 3 * ROUTE_EVENTS
"""Room per shard: each event may have a timer before it, and be an instrument's definition, which is followed by its code."""
_REFERENCE, _CODE = np.uint8(Kind.REFERENCE), np.uint8(Kind.CODE)
_ALL = np.uint32(ALL_INSTRUMENTS)
_BY_EVENT, _BY_CLOCK = np.int64(Told.BY_EVENT), np.int64(Told.BY_CLOCK)


class Router(NamedTuple):
    """What the routing kernel works on.

    Attributes:
        rings: tuple of :class:`RingArrays` with EVENT slots, one per shard.
        records: the instrument table's records (their `shard`).
        staged: EVENT[shards * 3 * ROUTE_EVENTS], events on their way to a ring.
        counts: i64[shards + 2]: staged events per shard, then events routed, then times a ring was full.
        stop: i64[1], ends a wait for a full ring.
        settings: i64[4]: number of the source, idle mode, whether `ts_recv` becomes the time of routing (recordings played live), whether
            shards are told how far the source has come (its sequences rise from event to event).
        told: i64[shards], the source's sequence up to which each shard knows of it.
        clock: the source's (:mod:`tickmesh.node.timers`).
        timer: EVENT[1], the timer being routed.
    """

    rings: Any
    records: Any
    staged: Any
    counts: Any
    stop: Any
    settings: Any
    told: Any
    clock: Any
    timer: Any


def make_router(
    rings: tuple[RingArrays, ...],
    records: Any,
    stop: Any,
    source: int,
    idle_mode: int,
    restamp: bool = False,
    *,
    timer_ns: int = 0,
    hold_ns: int = NOT_LIVE,
) -> Router:
    """A router of one receiver; `rings` have EVENT slots and no other writer.

    Args:
        timer_ns, hold_ns: see :func:`tickmesh.node.timers.make_clock`.
    """
    shards = len(rings)
    settings, told = np.array([source, idle_mode, restamp, 0], np.int64), np.zeros(shards, np.int64)
    staged, counts = zeros_aligned(shards * _STAGED, EVENT), np.zeros(shards + 2, np.int64)
    return Router(rings, records, staged, counts, stop, settings, told, make_clock(timer_ns, hold_ns), np.zeros(1, EVENT))


@inlined
def _stage(router: Any, shard: Any, batch: Any, i: Any) -> None:
    copy_record(router.staged, shard * _STAGED + router.counts[shard], batch, i)
    router.counts[shard] += 1


@outlined
def _stage_code(router: Any, shard: Any, batch: Any, i: Any) -> None:
    """After an instrument's definition, its numeric code at the venue, if it has one, and how many levels of its book are shown."""
    code, depth = router.records[batch[i].instrument].code, router.records[batch[i].instrument].depth
    if code == np.uint64(0):
        return
    _stage(router, shard, batch, i)
    event = router.staged[shard * _STAGED + router.counts[shard] - 1]
    event.kind, event.side, event.id = _CODE, np.uint8(NO_SIDE), code
    event.price, event.qty, event.aux = np.int64(0), np.int64(0), depth


@outlined
def _stage_timer(router: Any, ts_recv: Any, told: Any) -> None:
    fill_timer(router.clock, router.settings[0], ts_recv, told, router.timer[0])
    for shard in range(len(router.rings)):
        _stage(router, shard, router.timer, 0)


@outlined
def _tell_idle(router: Any, batch: Any, last: Any) -> None:
    """Shards that have had nothing for long: what they get next has at least the sequence of ``batch[last]``, which more may follow of."""
    sequence = np.int64(batch[last].seq)
    for shard in range(len(router.rings)):
        if router.counts[shard] > 0 or sequence < router.told[shard]:
            router.told[shard] = sequence
        elif sequence - router.told[shard] >= MARK_EVERY:
            router.told[shard] = sequence
            _stage(router, shard, batch, last)
            event = router.staged[shard * _STAGED + router.counts[shard] - 1]
            event.instrument, event.kind, event.side, event.flags = _ALL, _CODE, np.uint8(NO_SIDE), np.uint16(0)
            event.price, event.qty, event.id, event.aux = router.settings[0], np.int64(0), np.uint64(0), np.int64(0)


@outlined
def _flush(router: Any, ring: Any, shard: Any) -> Any:
    """Hand the staged events of one shard over, waiting for room; false once the stop flag is set."""
    count = router.counts[shard]
    router.counts[shard] = 0
    written = ring_write_some(ring, router.staged, np.int64(shard * _STAGED), count)
    while written < count:
        router.counts[router.counts.size - 1] += 1
        if ring_wait(ring, router.stop, router.settings[1]) == 0:
            return False
        written += ring_write_some(ring, router.staged, np.int64(shard * _STAGED) + written, count - written)
    return True


@outlined
def route(router: Any, batch: Any, first: Any, count: Any) -> Any:
    """Send events ``[first, count)`` of `batch`, at most ROUTE_EVENTS, to their shards; false once the stop flag is set."""
    shards = len(router.rings)
    source = router.settings[0]
    now = now_ns() if router.settings[2] != 0 else np.int64(0)
    for i in range(np.int64(first), np.int64(count)):
        event = batch[i]
        if now != 0:
            event.ts_recv = now
        if timer_due(router.clock, event):
            _stage_timer(router, event.ts_recv, _BY_EVENT)
        if event.instrument == _ALL:
            event.price = source
            for shard in range(shards):
                _stage(router, shard, batch, i)
            continue
        owner = np.int64(0)
        if shards > 1:
            owner = np.int64(router.records[event.instrument].shard)
        if event.kind == _REFERENCE:
            event.flags = np.uint16(source)
            _stage(router, owner, batch, i)
            _stage_code(router, owner, batch, i)
        else:
            _stage(router, owner, batch, i)
    router.counts[shards] += np.int64(count) - np.int64(first)
    if count > first and router.settings[S_MARKS] != 0:
        _tell_idle(router, batch, count - 1)
    if count > first and router.clock[C_HOLD] >= 0:
        timer_seen(router.clock, batch[count - 1], monotonic_ns())
    return _flush_all(router)


@inlined
def _flush_all(router: Any) -> Any:
    for shard in range(len(router.rings)):
        if router.counts[shard] > 0 and not _flush(router, router.rings[shard], shard):
            return False
    return True


@outlined
def route_silence(router: Any) -> Any:
    """While a live source brings nothing: its timer, if one is due; false once the stop flag is set."""
    if router.clock[C_HOLD] < 0 or not timer_in_silence(router.clock, monotonic_ns()):
        return True
    _stage_timer(router, now_ns(), _BY_CLOCK)
    return _flush_all(router)


@loop
def route_now(router: Any, batch: Any, first: Any, count: Any) -> Any:
    """:func:`route`, called from Python: sources that are not compiled end to end."""
    return route(router, batch, first, count)
