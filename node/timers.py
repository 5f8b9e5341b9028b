"""Timers: TIMER events at the boundaries of an interval of a source's own time, so that a quiet instrument's bar closes too.

A source's time is the `ts_event` of its events. The TIMER of a boundary goes in front of the first event at or past it, wherever a batch
ends: what a recording gives depends on its events alone. Where several boundaries are passed at once, there is one TIMER, at the last.
A live source's time also goes on while the line is silent, as fast as the host's monotonic clock, held back by what may still come. Such
a TIMER says so (:class:`tickmesh.node.event.Told`), and so does that of an event that comes behind it nevertheless. Where the interval is
short they become rarer as a silence lasts, an eighth of it apart, a second at most: a night is not worth a million of them.

Time does not go back for an event that comes late. An event that lies further back than :data:`REWIND_NS` starts it anew: a second day
that counts from midnight again, or the end of a damaged time in the far future. Events of a whole source do not count: a gap has no
time of the venue's.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tickmesh.node.event import ALL_INSTRUMENTS, NO_SIDE, EventArray, Kind, Told
from tickmesh.transports.toolbox import copy_record, inlined, loop, outlined

REWIND_NS = 3_600_000_000_000
"""An event that is this much and an interval older than the next boundary starts the clock anew."""
NOT_LIVE = -1
_SPACING_NS = 1_000_000_000

C_INTERVAL, C_DUE, C_LOW, C_SPAN, C_HOLD, C_EVENT, C_SEEN, C_SILENT, _WORDS = 0, 1, 2, 3, 4, 5, 6, 7, 8
"""Words of a clock, all ns: the interval; the next boundary for events (0: there was none); an event in ``[low, low + span)`` passes none;
how far a live source is held back; `ts_event` of its last event, and the monotonic clock then; the next boundary after a silence."""
_TIMER, _NO_SIDE = np.uint8(Kind.TIMER), np.uint8(NO_SIDE)
_ALL = np.uint32(ALL_INSTRUMENTS)
_BY_EVENT, _BY_CLOCK, _LATE = (np.int64(told) for told in Told)


def make_clock(interval_ns: int, hold_ns: int = NOT_LIVE) -> Any:
    """The clock of one source, i64[8].

    Args:
        interval_ns: distance of its timers; 0: none.
        hold_ns: for a live source how far its time is held back while it is silent; :data:`NOT_LIVE`: it has only the time of its events.
    """
    clock = np.zeros(_WORDS, np.int64)
    clock[C_INTERVAL], clock[C_HOLD] = interval_ns, hold_ns
    if interval_ns == 0:
        clock[C_SPAN] = -1
    return clock


def go_on(clock: Any) -> None:
    """After a restart: a TIMER goes in front of the very first event, for what was left open."""
    if clock[C_INTERVAL]:
        clock[C_DUE] = 1


@inlined
def timer_due(clock: Any, event: Any) -> Any:
    """Whether a TIMER goes in front of `event` (:func:`fill_timer` makes it); moves the clock on."""
    if np.uint64(event.ts_event - clock[C_LOW]) < np.uint64(clock[C_SPAN]):
        return False
    return _passed(clock, event)


@outlined
def _passed(clock: Any, event: Any) -> Any:
    if event.ts_event <= 0 or event.instrument == _ALL or clock[C_INTERVAL] == 0:
        return False
    fires = clock[C_DUE] != 0 and event.ts_event >= clock[C_DUE]
    if not fires:
        clock[C_SILENT] = 0  # the first one, or time begins anew
    _move(clock, event.ts_event)
    return fires


@inlined
def _move(clock: Any, time_ns: Any) -> None:
    interval = clock[C_INTERVAL]
    clock[C_DUE] = time_ns - time_ns % interval + interval
    clock[C_SPAN] = REWIND_NS + interval
    clock[C_LOW] = clock[C_DUE] - clock[C_SPAN]


@inlined
def timer_seen(clock: Any, event: Any, monotonic_ns: Any) -> None:
    """Remember when a live source's last event came."""
    if event.ts_event > 0 and event.instrument != _ALL:
        clock[C_EVENT] = event.ts_event
        clock[C_SEEN] = monotonic_ns


@outlined
def timer_in_silence(clock: Any, monotonic_ns: Any) -> Any:
    """Whether a live source's time has passed a boundary since its last event; moves the clock on."""
    if clock[C_SEEN] == 0 or clock[C_DUE] == 0:
        return False
    time_ns = clock[C_EVENT] + (monotonic_ns - clock[C_SEEN]) - clock[C_HOLD]
    spacing = min(_SPACING_NS, (monotonic_ns - clock[C_SEEN]) >> 3) - clock[C_INTERVAL]  # the longer the silence, the fewer
    if time_ns < clock[C_DUE] or time_ns < clock[C_SILENT] + max(spacing, np.int64(0)):
        return False
    clock[C_SILENT] = time_ns - time_ns % clock[C_INTERVAL] + clock[C_INTERVAL]
    return True


@outlined
def fill_timer(clock: Any, source: Any, ts_recv: Any, told: Any, out: Any) -> None:
    """The TIMER of the boundary passed last, for the instruments of `source`, into the event record `out`.

    `told`: what has passed it, an event (it may turn out to be late) or the clock in a silence, see :class:`tickmesh.node.event.Told`.
    """
    out.seq = np.uint64(0)
    due = clock[C_SILENT] if told == _BY_CLOCK else clock[C_DUE]
    out.ts_event = due - clock[C_INTERVAL]
    out.aux = _LATE if told == _BY_EVENT and due <= clock[C_SILENT] else told
    out.ts_recv = ts_recv
    out.instrument = _ALL
    out.kind = _TIMER
    out.side = _NO_SIDE
    out.flags = np.uint16(0)
    out.price = source
    out.qty = np.int64(0)
    out.id = np.uint64(0)


@loop
def _insert(clock: Any, batch: Any, source: Any, out: Any) -> Any:
    n = 0
    for i in range(batch.size):
        if timer_due(clock, batch[i]):
            fill_timer(clock, source, batch[i].ts_recv, _BY_EVENT, out[n])
            n += 1
        copy_record(out, n, batch, i)
        n += 1
    return n


def with_timers(clock: Any, batch: EventArray, source: int, out: EventArray) -> EventArray:
    """A batch with its timers in place: the filled part of `out`, an EVENT array with room for twice the batch."""
    filled: EventArray = out[: int(_insert(clock, batch, np.int64(source), out))]
    return filled
