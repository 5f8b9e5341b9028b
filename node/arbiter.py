"""A/B arbitration of a sequenced packet feed: the first copy of every message wins, what is early waits, what is missing becomes a GAP.

The compiled decoder asks :func:`offer` about every packet and :func:`next_step` what is due. A packet ahead of the expected sequence
is held (copied) until the missing piece comes on either line, or until it has waited `gap_wait_ns`, or there is no room to hold more:
then one GAP event covers the missing sequences and decoding goes on. Time is the packets' receive time (and what `flush` is told).

* A packet that is wholly old is a duplicate; of one that is partly old, only the new messages are used.
* A heartbeat says which sequence comes next, so a gap shows even when no packet follows it.
* A new session id first settles what is held of the old session, then emits CLEAR for all instruments (the venue has started anew;
  its sequences start at 1, so a later first packet is a gap). Packets of the session before are dropped as duplicates. A framing
  without a session id restarts where sequence 1 comes again after at least `restart_distance` messages.
* The first packet ever sets the expected sequence, unless `start_sequence` names it: 1 where the source is there before the session begins,
  so that a loss of the very first packets shows.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np

from tickmesh.node.event import ALL_INSTRUMENTS, NO_SIDE, Kind
from tickmesh.transports.capture import PACKET
from tickmesh.transports.toolbox import inlined, outlined

HELD = np.dtype(
    [("seq", "<i8"), ("ts_recv", "<i8"), ("arrival", "<i8"), ("count", "<i4"), ("length", "<i4"), ("slot", "<i4"), ("line", "<i4")]
)
"""One packet that waits: its bytes are ``Arbiter.bytes[slot * slot_bytes :]``."""

Arbiter = namedtuple("Arbiter", "state held bytes lines no_packets")
"""`state` i64 (indices below); `held` HELD[packets]; `bytes` u8; `lines` u64[LINES_MAX, 4] counters of each line; an empty PACKET[1]."""

LINES_MAX = 4
LINE_PACKETS, LINE_DUPLICATES, LINE_HELD, LINE_MESSAGES = range(4)

(
    EXPECTED, KNOWN_NEXT, KNOWN_SINCE, SESSION, PREVIOUS_SESSION, HAS_SESSION, HELD_COUNT, HELD_SEQ_MIN, HELD_ARRIVAL_MIN, NOW, FORCE_TO,
    CLEAR_DUE, GAP_WAIT, SLOT_BYTES, RESTART_DISTANCE, START_SEQUENCE, CURRENT, CURRENT_INDEX, CURRENT_POS, CURRENT_END, CURRENT_LEFT,
    CURRENT_SEQ, CURRENT_SKIP, HEADER_BYTES,
    GAPS, MISSING, SESSIONS, RESTARTS, ENDS, HEARTBEATS, OVERLAPS, HOLD_OVERFLOWS, STALE_SESSION, UNSEQUENCED,
) = range(34)  # fmt: skip
"""Indices of ``Arbiter.state``; those from GAPS on are counters."""
COUNTERS = {
    "gaps": GAPS, "missing": MISSING, "sessions": SESSIONS, "restarts": RESTARTS, "ends": ENDS, "heartbeats": HEARTBEATS,
    "overlaps": OVERLAPS, "hold_overflows": HOLD_OVERFLOWS, "stale_session": STALE_SESSION, "unsequenced": UNSEQUENCED,
}  # fmt: skip
STATE_WORDS = 40

NOTHING_CURRENT, FROM_PACKET, FROM_HELD, FROM_UNSEQUENCED = range(4)
"""What ``state[CURRENT]`` says is being decoded."""

DECODE, CONSUMED, HOLD, AGAIN, BAD = range(5)
"""Verdicts of :func:`offer`: decode it now; done with it; hold it; something else is due first, offer it again; sequence out of bounds."""

IDLE, CONTINUE, EMIT_GAP, EMIT_CLEAR = range(4)
"""Answers of :func:`next_step`."""

FIRST_SEQUENCE = 1
JUMP_MAX = 1 << 40
"""A packet further ahead than this (also the first, of where sequences begin) is damaged: it would make all that comes after it old."""
_FAR = (1 << 63) - 1
_ONE = np.uint64(1)
_GAP, _CLEAR, _NO_SIDE = np.uint8(Kind.GAP), np.uint8(Kind.CLEAR), np.uint8(NO_SIDE)
_ALL = np.uint32(ALL_INSTRUMENTS)


def make_arbiter(
    *, header_bytes: int, gap_wait_ns: int, hold_packets: int, hold_bytes: int, start_sequence: int, restart_distance: int
) -> Arbiter:
    """Arbiter state. `restart_distance` 0: never restart within a session."""
    state = np.zeros(STATE_WORDS, np.int64)
    state[HEADER_BYTES], state[GAP_WAIT], state[SLOT_BYTES] = header_bytes, gap_wait_ns, hold_bytes
    state[START_SEQUENCE], state[RESTART_DISTANCE] = start_sequence, restart_distance
    state[HELD_SEQ_MIN] = state[HELD_ARRIVAL_MIN] = _FAR
    held = np.zeros(max(1, hold_packets), HELD)
    held["slot"] = np.arange(held.size)
    memory = np.zeros(max(1, hold_packets) * hold_bytes + 64, np.uint8)
    return Arbiter(state, held, memory, np.zeros((LINES_MAX, 4), np.uint64), np.zeros(1, PACKET))


# ---------------------------------------------------------------- sessions


@outlined
def _settle(arb: Any) -> Any:
    """Make what is held of the old session due at once; true when nothing is left."""
    s = arb.state
    if s[HELD_COUNT] > 0:
        s[FORCE_TO] = s[HELD_SEQ_MIN]
        return False
    if s[EXPECTED] > 0 and s[KNOWN_NEXT] > s[EXPECTED]:
        s[FORCE_TO] = s[KNOWN_NEXT]
        return False
    return True


@outlined
def _restart(arb: Any) -> Any:
    """Expect a new run of sequences, after a CLEAR."""
    s = arb.state
    s[EXPECTED], s[KNOWN_NEXT], s[FORCE_TO], s[CLEAR_DUE] = FIRST_SEQUENCE, 0, 0, 1


@outlined
def _other_session(arb: Any, session: Any, line: Any) -> Any:
    """Verdict on a packet whose session is not the current one."""
    s = arb.state
    if s[HAS_SESSION] == 0:
        s[HAS_SESSION], s[SESSION], s[EXPECTED] = 1, session, s[START_SEQUENCE]
        s[PREVIOUS_SESSION] = session
        return AGAIN
    if session == s[PREVIOUS_SESSION]:
        s[STALE_SESSION] += 1
        arb.lines[line, LINE_DUPLICATES] += _ONE
        return CONSUMED
    if _settle(arb):
        s[PREVIOUS_SESSION], s[SESSION] = s[SESSION], session
        s[SESSIONS] += 1
        _restart(arb)
    return AGAIN


# ---------------------------------------------------------------- packets


@outlined
def _ahead(arb: Any, seq: Any, count: Any, line: Any) -> Any:
    """Verdict on a packet ahead of the expected sequence: held already, or to be held."""
    for i in range(arb.state[HELD_COUNT]):
        if arb.held[i].seq == seq and arb.held[i].count >= count:
            arb.lines[line, LINE_DUPLICATES] += _ONE
            return CONSUMED
    return HOLD


@outlined
def _heartbeat(arb: Any, seq: Any) -> Any:
    s = arb.state
    s[HEARTBEATS] += 1
    if seq > s[EXPECTED] and seq > s[KNOWN_NEXT]:
        if s[KNOWN_NEXT] <= s[EXPECTED]:
            s[KNOWN_SINCE] = s[NOW]
        s[KNOWN_NEXT] = seq
    return CONSUMED


@inlined
def offer(arb: Any, seq: Any, count: Any, session: Any, line: Any) -> Any:
    """Verdict on a packet of messages `seq` … `seq + count - 1` (`count` 0: heartbeat, `seq` comes next). All i64, `line` < LINES_MAX."""
    s = arb.state
    if session != s[SESSION] or s[HAS_SESSION] == 0:
        return _other_session(arb, session, line)
    if seq < 0 or seq - s[EXPECTED] > JUMP_MAX:
        return BAD
    if s[EXPECTED] == 0:
        s[EXPECTED] = seq
    expected = s[EXPECTED]
    if count == 0:
        return _heartbeat(arb, seq)
    if seq + count <= expected:
        if s[RESTART_DISTANCE] > 0 and seq == FIRST_SEQUENCE and expected - seq > s[RESTART_DISTANCE]:
            if _settle(arb):
                s[RESTARTS] += 1
                _restart(arb)
            return AGAIN
        arb.lines[line, LINE_DUPLICATES] += _ONE
        return CONSUMED
    if seq <= expected:
        return DECODE
    return _ahead(arb, seq, count, line)


@outlined
def hold(arb: Any, buf: Any, offset: Any, length: Any, seq: Any, count: Any, line: Any, ts_recv: Any) -> Any:
    """Copy a packet aside; false if it cannot be, and then the gap before it is forced."""
    s = arb.state
    if s[HELD_COUNT] >= arb.held.size or length > s[SLOT_BYTES]:
        s[HOLD_OVERFLOWS] += 1
        s[FORCE_TO] = seq
        return False
    h = arb.held[s[HELD_COUNT]]
    h.seq, h.ts_recv, h.arrival, h.count, h.length, h.line = seq, ts_recv, s[NOW], np.int32(count), np.int32(length), np.int32(line)
    start = np.int64(h.slot) * s[SLOT_BYTES]
    for i in range(length):
        arb.bytes[start + i] = buf[offset + i]
    s[HELD_COUNT] += 1
    s[HELD_SEQ_MIN] = min(s[HELD_SEQ_MIN], seq)
    s[HELD_ARRIVAL_MIN] = min(s[HELD_ARRIVAL_MIN], s[NOW])
    arb.lines[line, LINE_HELD] += _ONE
    return True


@outlined
def release(arb: Any, index: Any) -> Any:
    """Give a held packet's place back; the last one moves into it, slots are swapped."""
    s = arb.state
    s[HELD_COUNT] -= 1
    gone, last = arb.held[index], arb.held[s[HELD_COUNT]]
    slot = gone.slot
    gone.seq, gone.ts_recv, gone.arrival = last.seq, last.ts_recv, last.arrival
    gone.count, gone.length, gone.line, gone.slot = last.count, last.length, last.line, last.slot
    last.slot = slot
    first, arrival = np.int64(_FAR), np.int64(_FAR)
    for i in range(s[HELD_COUNT]):
        first = min(first, arb.held[i].seq)
        arrival = min(arrival, arb.held[i].arrival)
    s[HELD_SEQ_MIN], s[HELD_ARRIVAL_MIN] = first, arrival


# ---------------------------------------------------------------- what is due


@outlined
def _due_held(arb: Any) -> Any:
    """Make the first held packet with news current; drop those that are wholly old. True if one is current now."""
    s = arb.state
    while s[HELD_COUNT] > 0 and s[HELD_SEQ_MIN] <= s[EXPECTED]:
        index = np.int64(0)
        while arb.held[index].seq != s[HELD_SEQ_MIN]:
            index += 1
        h = arb.held[index]
        if h.seq + h.count > s[EXPECTED]:
            start = np.int64(h.slot) * s[SLOT_BYTES]
            s[CURRENT], s[CURRENT_INDEX] = FROM_HELD, index
            s[CURRENT_POS], s[CURRENT_END] = start + s[HEADER_BYTES], start + h.length
            s[CURRENT_LEFT], s[CURRENT_SEQ], s[CURRENT_SKIP] = h.count, h.seq, s[EXPECTED] - h.seq
            s[OVERLAPS] += s[CURRENT_SKIP] > 0
            return True
        arb.lines[h.line, LINE_DUPLICATES] += _ONE
        release(arb, index)
    return False


@outlined
def _waiting(arb: Any) -> Any:
    """The answer of :func:`next_step` where something is held, known to be missing or forced."""
    s = arb.state
    if s[HELD_COUNT] > 0 and s[HELD_SEQ_MIN] <= s[EXPECTED] and _due_held(arb):
        return CONTINUE
    if s[FORCE_TO] > s[EXPECTED]:
        return EMIT_GAP
    s[FORCE_TO] = 0
    if s[HELD_COUNT] > 0:
        return EMIT_GAP if s[NOW] - s[HELD_ARRIVAL_MIN] >= s[GAP_WAIT] else IDLE
    if s[KNOWN_NEXT] > s[EXPECTED]:
        return EMIT_GAP if s[NOW] - s[KNOWN_SINCE] >= s[GAP_WAIT] else IDLE
    return IDLE


@inlined
def next_step(arb: Any) -> Any:
    """What comes before the next packet: go on with the current one, emit GAP, emit CLEAR, or nothing (IDLE)."""
    s = arb.state
    if s[CURRENT] != NOTHING_CURRENT:
        return CONTINUE
    if s[CLEAR_DUE] != 0:
        return EMIT_CLEAR
    if s[EXPECTED] == 0 or (s[HELD_COUNT] == 0 and s[KNOWN_NEXT] <= s[EXPECTED] and s[FORCE_TO] <= s[EXPECTED]):
        return IDLE
    return _waiting(arb)


@outlined
def emit_gap(arb: Any, out: Any, n: Any) -> Any:
    """Write the GAP event from the expected sequence to where messages go on, and expect those; returns the new `n`."""
    s = arb.state
    end = s[HELD_SEQ_MIN] if s[HELD_COUNT] > 0 else (s[KNOWN_NEXT] if s[KNOWN_NEXT] > s[EXPECTED] else s[FORCE_TO])
    if s[FORCE_TO] > s[EXPECTED]:
        end = min(end, s[FORCE_TO])
    first = s[EXPECTED]
    e = out[n]
    e.seq, e.ts_event, e.ts_recv = np.uint64(first), s[NOW], s[NOW]
    e.instrument, e.kind, e.side, e.flags = _ALL, _GAP, _NO_SIDE, np.uint16(0)
    e.price, e.qty, e.id, e.aux = 0, end - first, np.uint64(first), end - 1
    s[GAPS] += 1
    s[MISSING] += end - first
    s[EXPECTED] = end
    return n + 1


@outlined
def emit_clear(arb: Any, out: Any, n: Any) -> Any:
    """Write the CLEAR event (all instruments, both sides) of a new session, which its `id` tells; returns the new `n`."""
    s = arb.state
    s[CLEAR_DUE] = 0
    e = out[n]
    e.seq, e.ts_event, e.ts_recv = np.uint64(0), s[NOW], s[NOW]
    e.instrument, e.kind, e.side, e.flags = _ALL, _CLEAR, _NO_SIDE, np.uint16(0)
    e.price, e.qty, e.id, e.aux = 0, 0, np.uint64(s[SESSION]), 0
    return n + 1
