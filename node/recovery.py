"""Books brought back after a gap from a venue's snapshot channel: a loop of packets with every book in turn, beside the sequenced feed.

A snapshot says the last packet of the feed that it contains. It is of use for a book that a gap has made stale if it contains the gap, and
nothing that the feed has not brought yet. What the feed has brought since is kept here, and done again on top of the snapshot, aside and
for that book only, so that what comes out is the book as it is now: CLEAR and its levels, all with SNAPSHOT, at the sequence of the last
packet. Trades are not told again. A snapshot that is too old waits for the next turn of the loop.

* Packets are kept while they come ahead of the expected one, and while a book is stale: the last `KEPT_PACKETS` of them. A snapshot that
  is older than those is counted (`not_kept`) and of no use.
* A whole turn of the loop, in which every snapshot was of use and no book was stale, ends the search. One that breaks off, or lacks a
  packet, does not, whatever it brought: the sequences of its packets tell, and the number of snapshots that the venue says it has.
* A feed that begins in the middle of a session begins with a gap, so its books come from the snapshots too.

**Known** is a book whose levels by position the decoder has: from the beginning of a session, from a snapshot, or since the venue has
emptied it. A gap ends that for all. It is noted from which packet on a book is known (``Feed.known``): a standby that takes over has to say
of which books it has not followed the changes from the journal's end on.

The decoder contains these kernels where a mapping has ``[recovery]`` (:mod:`tickmesh.node.sbe_decoder`). Source: CME Globex MDP 3.0,
Market Recovery; the loop's packets have a sequence of their own, which begins with 1 at every turn.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np

from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, NO_PRICE, NO_SIDE, Flag, Kind
from tickmesh.transports.toolbox import copy_record, inlined, outlined

KEPT = np.dtype([("seq", "<i8"), ("ts_recv", "<i8"), ("length", "<i8")])
"""A packet of the feed that is kept: its bytes are ``Recovery.bytes[slot * SLOT_BYTES :]``; free where `seq` is 0."""
Recovery = namedtuple("Recovery", "words kept bytes known ladders counts malformed scratch staged asked")
"""`words` i64 (indices below); `kept` KEPT; `bytes` u8; `known`, `ladders`, `counts`, `malformed`: what the decoder writes in place of the
feed's own; `scratch`, `staged` EVENT; `asked` u8 by instrument: another thread wants its book from a snapshot."""
NEVER = np.int64((1 << 63) - 1)
"""In place of a packet from which on a book is known: it is not."""

KEPT_PACKETS, SLOT_BYTES = 4096, 2048
_SCRATCH, _STAGED = 256, 512
(
    LINE, WANTED, GAP_END, POSITION, COUNT, TAKEN, CODE, INSTRUMENT, BROKEN, LOOP_NEXT, LOOP_CLEAN, LOOP_WHOLE, LOOP_JUDGED, LOOP_SEEN,
    LOOP_TOTAL, ASKED,
    SNAPSHOTS, RECOVERED, TOO_OLD, AHEAD, NOT_KEPT, OVERFLOWS, TURNS, BROKEN_TURNS,
) = range(24)  # fmt: skip
"""Indices of ``Recovery.words``. LINE is that of the snapshots' packets, -1: there is none. Of the loop's present turn: the packet that
comes next, whether nothing was stale, whether no packet is missing, whether its snapshots were looked at from the first on, how many there
were, and how many there are (0: not told). Those from SNAPSHOTS on are counters."""
COUNTERS = {
    "snapshots": SNAPSHOTS, "recovered": RECOVERED, "too_old": TOO_OLD, "ahead": AHEAD, "not_kept": NOT_KEPT, "overflows": OVERFLOWS,
    "turns": TURNS, "broken_turns": BROKEN_TURNS,
}  # fmt: skip
_NONE = -1
_CLEAR, _LEVEL, _STATUS, _REFERENCE = (np.uint8(kind) for kind in (Kind.CLEAR, Kind.LEVEL, Kind.STATUS, Kind.REFERENCE))
_MORE, _SNAPSHOT, _NO_SIDE = np.uint16(Flag.MORE), np.uint16(Flag.SNAPSHOT), np.uint8(NO_SIDE)
_ALL = np.uint32(ALL_INSTRUMENTS)


def make_recovery(line: int, instruments: int, ladders: int, counters: int, reasons: int) -> Recovery:
    """The state of a source's recovery; `line` -1: it has no snapshot channel, and the arrays are as small as can be.

    Args:
        instruments, ladders, counters, reasons: sizes of the feed's arrays that this one has of its own.
    """
    here = line >= 0
    words = np.zeros(24, np.int64)
    words[LINE] = line
    return Recovery(
        words,
        np.zeros(KEPT_PACKETS if here else 1, KEPT),
        np.zeros(KEPT_PACKETS * SLOT_BYTES + 64 if here else 1, np.uint8),
        np.zeros(instruments if here else 1, np.int64),
        np.full(ladders if here else 1, NO_PRICE, np.int64),
        np.zeros(counters, np.uint64),
        np.zeros(reasons, np.uint64),
        np.zeros(_SCRATCH if here else 1, EVENT),
        np.zeros(_STAGED if here else 1, EVENT),
        np.zeros(instruments if here else 1, np.uint8),
    )


def recovery_counters(recovery: Recovery) -> dict[str, int]:
    """What came of the snapshots: ``snapshots`` seen while books were stale, books ``recovered``, and why others were of no use; ``turns``
    of the loop, and those of them that lacked something while books were stale."""
    return {name: int(recovery.words[index]) for name, index in COUNTERS.items()}


# ---------------------------------------------------------------- which books are known


@inlined
def known_since(known: Any, since: Any, instrument: Any) -> Any:
    """From which packet of the feed on an instrument's book is known, or NEVER; `since`: of books of which nothing else is said."""
    own = known[instrument]
    return own if own != 0 else since


def ask_for_books(recovery: Recovery, instruments: Any) -> bool:
    """From another thread than the receiver's: bring these books from the next snapshots, known or not. False: there is no such channel."""
    if recovery.words[LINE] < 0:
        return False
    recovery.asked[instruments] = 1
    recovery.words[ASKED] = 1  # what it is about is there before it
    return True


@outlined
def _take_asked(recovery: Any, known: Any) -> None:
    """Books that another thread has asked for are looked for like those that a gap has made stale."""
    w = recovery.words
    w[ASKED] = 0
    for i in range(recovery.asked.size):
        if recovery.asked[i] != np.uint8(0):
            recovery.asked[i] = np.uint8(0)
            known[i] = NEVER
    w[WANTED], w[LOOP_CLEAN] = 1, 0


@inlined
def want_books(recovery: Any) -> None:
    """There is a book that is not known: look for it in the snapshots."""
    w = recovery.words
    if w[LINE] >= 0 and w[WANTED] == 0:
        w[WANTED], w[LOOP_CLEAN] = 1, 0


# ---------------------------------------------------------------- the feed's side


@inlined
def wants_packet(recovery: Any, seq: Any, expected: Any) -> Any:
    """Whether a packet of the feed is to be kept: it may be one that comes after a gap."""
    w = recovery.words
    return w[LINE] >= 0 and (w[WANTED] != 0 or seq > expected)


@outlined
def keep_packet(recovery: Any, buf: Any, at: Any, length: Any, seq: Any, ts_recv: Any) -> None:
    """Keep a packet of the feed; one that is there already, or longer than any that a venue sends, is not."""
    slot = np.int64(seq) % recovery.kept.size
    k = recovery.kept[slot]
    if seq <= 0 or k.seq == seq or length > SLOT_BYTES:
        return
    k.seq, k.ts_recv, k.length = seq, ts_recv, length
    for i in range(length):
        recovery.bytes[slot * SLOT_BYTES + i] = buf[at + i]


@outlined
def begin_recovery(recovery: Any, gap_end: Any) -> None:
    """A gap that ends with sequence `gap_end` has made the books stale."""
    w = recovery.words
    if w[LINE] >= 0:
        w[GAP_END], w[WANTED], w[LOOP_CLEAN] = gap_end, 1, 0


@outlined
def forget_recovery(recovery: Any) -> None:
    """The venue has begun a new session: its books are empty, and sequences mean something else."""
    w = recovery.words
    w[WANTED] = w[GAP_END] = w[COUNT] = w[TAKEN] = w[LOOP_CLEAN] = w[LOOP_JUDGED] = 0
    for i in range(recovery.kept.size):
        recovery.kept[i].seq = 0


# ---------------------------------------------------------------- the snapshots' side


@outlined
def _end_turn(recovery: Any) -> None:
    """A turn has ended: if it had every book, and none was stale, there is nothing to look for any more."""
    w = recovery.words
    if w[LOOP_WHOLE] == 0 or (w[LOOP_TOTAL] != 0 and w[LOOP_SEEN] < w[LOOP_TOTAL]):
        w[BROKEN_TURNS] += 1
    elif w[LOOP_CLEAN] != 0:
        w[WANTED] = 0


@outlined
def begin_packet(recovery: Any, known: Any, seq: Any) -> None:
    """A packet of the snapshot channel: with the loop's first one a turn has ended."""
    w = recovery.words
    if w[ASKED] != 0:
        _take_asked(recovery, known)
    if seq == 1:
        if w[LOOP_JUDGED] != 0 and w[WANTED] != 0:
            _end_turn(recovery)
        w[TURNS] += 1
        w[LOOP_CLEAN] = w[LOOP_WHOLE] = 1
        w[LOOP_JUDGED], w[LOOP_SEEN], w[LOOP_TOTAL] = w[WANTED], 0, 0
    elif seq != w[LOOP_NEXT]:
        w[LOOP_WHOLE] = 0
    w[LOOP_NEXT] = seq + 1


@inlined
def see_snapshot(recovery: Any, total: Any) -> None:
    """One of the `total` snapshots of a turn; 0: the venue does not say how many."""
    w = recovery.words
    w[LOOP_SEEN] += 1
    w[LOOP_TOTAL] = total


@outlined
def of_use(recovery: Any, last: Any, done: Any) -> Any:
    """Whether a snapshot that contains the feed up to `last` can bring a book back, where the feed is done up to `done`."""
    w = recovery.words
    w[SNAPSHOTS] += 1
    reason: Any = np.int64(0)
    if last < w[GAP_END]:
        reason = TOO_OLD
    elif last > done:
        reason = AHEAD
    elif done - last > recovery.kept.size:
        reason = NOT_KEPT
    else:
        for seq in range(last + 1, done + 1):
            if recovery.kept[seq % recovery.kept.size].seq != seq:
                reason = NOT_KEPT
    if reason != 0:
        w[reason] += 1
        w[LOOP_CLEAN] = 0
    return reason == 0


@outlined
def begin_book(recovery: Any) -> None:
    """Of which instrument a snapshot is, its first event tells."""
    w = recovery.words
    w[COUNT], w[TAKEN], w[CODE], w[INSTRUMENT], w[BROKEN] = 0, 0, _NONE, _NONE, 0


@outlined
def _drop(recovery: Any, instrument: Any, side: Any, price: Any, every: Any) -> None:
    """Take levels of a side (NO_SIDE: of both), that of one price or `every` one, out of what is staged."""
    w, kept = recovery.words, np.int64(0)
    for i in range(w[COUNT]):
        e = recovery.staged[i]
        is_side = side == _NO_SIDE or e.side == side
        if not (e.kind == _LEVEL and e.instrument == instrument and is_side and (every or e.price == price)):
            if kept != i:
                copy_record(recovery.staged, kept, recovery.staged, i)
            kept += 1
    w[COUNT] = kept


@outlined
def _stages(recovery: Any, kind: Any, instrument: Any) -> Any:
    for i in range(recovery.words[COUNT]):
        if recovery.staged[i].kind == kind and recovery.staged[i].instrument == instrument:
            return True
    return False


@outlined
def _append(recovery: Any, event: Any, i: Any) -> Any:
    """Stage ``event[i]``; returns its place, or -1 if there is no room, which spoils the book."""
    w = recovery.words
    at = w[COUNT]
    if at >= recovery.staged.size:
        w[OVERFLOWS] += w[BROKEN] == 0
        w[BROKEN] = 1
        return np.int64(_NONE)
    copy_record(recovery.staged, at, event, i)
    w[COUNT] += 1
    return at


@outlined
def _empty(recovery: Any, event: Any, i: Any, side: Any) -> None:
    """Nothing staged of a side stays; that the book was emptied first is staged once."""
    instrument = event[i].instrument
    _drop(recovery, instrument, side, np.int64(0), True)
    if not _stages(recovery, _CLEAR, instrument):
        at = _append(recovery, event, i)
        if at >= 0:
            e = recovery.staged[at]
            e.kind, e.side, e.flags = _CLEAR, _NO_SIDE, np.uint16(0)
            e.price, e.qty, e.id, e.aux = np.int64(0), np.int64(0), np.uint64(0), np.int64(0)


@outlined
def _stage_book(recovery: Any, i: Any) -> None:
    """One event of the book that is being recovered: only what is left of it in the end is told."""
    scratch = recovery.scratch
    e = scratch[i]
    if e.kind == _CLEAR:
        _empty(recovery, scratch, i, e.side)
    elif e.kind == _LEVEL:
        if not _stages(recovery, _CLEAR, e.instrument):
            _empty(recovery, scratch, i, _NO_SIDE)
        _drop(recovery, e.instrument, e.side, e.price, False)
        if e.qty != 0:
            _append(recovery, scratch, i)
    elif e.kind == _STATUS:
        for k in range(recovery.words[COUNT]):
            if recovery.staged[k].kind == _STATUS and recovery.staged[k].instrument == e.instrument:
                copy_record(recovery.staged, k, scratch, i)
                return
        _append(recovery, scratch, i)


@outlined
def stage(recovery: Any, records: Any, known: Any, since: Any, count: Any, implied: Any) -> Any:
    """Take what belongs to the book out of ``scratch[:count]``; false once it is of no use, as it is not stale or the channel was reset.

    `known` and `since` are the feed's, for :func:`known_since`; `implied` is the bit of a code that says "the implied book of".
    Definitions of instruments are always kept.
    """
    w = recovery.words
    for i in range(count):
        e = recovery.scratch[i]
        if e.kind == _REFERENCE:
            _append(recovery, recovery.scratch, i)
            continue
        if e.instrument == _ALL:
            if e.kind == _CLEAR:
                w[BROKEN] = 1
            continue
        code = np.int64(records[e.instrument].code & ~implied)
        if w[INSTRUMENT] == _NONE and records[e.instrument].code & implied == np.uint64(0):
            w[CODE], w[INSTRUMENT] = code, np.int64(e.instrument)
            if known_since(known, since, w[INSTRUMENT]) != NEVER:
                w[BROKEN] = 1
        if w[CODE] == _NONE or code == w[CODE]:
            _stage_book(recovery, i)
    return w[BROKEN] == 0


@inlined
def _rank(event: Any, instrument: Any) -> Any:
    """Order of what is told: definitions, status, the implied book, the book."""
    if event.kind == _REFERENCE:
        return 0
    if event.kind == _STATUS:
        return 1
    return 3 if np.int64(event.instrument) == instrument else 2


@outlined
def _order(recovery: Any, seq: Any) -> None:
    """Sort what is staged by rank, each rank in its order, and stamp it."""
    w, staged = recovery.words, recovery.staged
    for i in range(1, w[COUNT]):
        k = i
        copy_record(recovery.scratch, 0, staged, i)
        rank = _rank(recovery.scratch[0], w[INSTRUMENT])
        while k > 0 and _rank(staged[k - 1], w[INSTRUMENT]) > rank:
            copy_record(staged, k, staged, k - 1)
            k -= 1
        copy_record(staged, k, recovery.scratch, 0)
    for i in range(w[COUNT]):
        e = staged[i]
        e.seq = np.uint64(seq)
        if e.kind != _REFERENCE:
            e.flags = _SNAPSHOT
        if i > 0 and e.kind <= _LEVEL and staged[i - 1].kind <= _LEVEL and staged[i - 1].instrument == e.instrument:
            staged[i - 1].flags |= _MORE


@outlined
def end_book(recovery: Any, seq: Any) -> Any:
    """The book is complete, or of no use: what is to be told is staged now. Returns its instrument, or -1."""
    w = recovery.words
    found = w[INSTRUMENT] if w[BROKEN] == 0 else np.int64(_NONE)
    if found < 0:
        kept = np.int64(0)
        for i in range(w[COUNT]):
            if recovery.staged[i].kind == _REFERENCE:
                copy_record(recovery.staged, kept, recovery.staged, i)
                kept += 1
        w[COUNT] = kept
    else:
        w[RECOVERED] += 1
        w[LOOP_CLEAN] = 0
    _order(recovery, seq)
    return found


@outlined
def take_ladder(recovery: Any, ladders: Any, instrument: Any, depth: Any) -> None:
    """The instrument's ladders are those that the recovery has arrived at."""
    base = np.int64(instrument) * 2 * depth
    for i in range(base, base + 2 * depth):
        ladders[i] = recovery.ladders[i]


@outlined
def tell(recovery: Any, out: Any, n: Any) -> Any:
    """Write what is staged, as far as `out` has room; returns the new n."""
    w = recovery.words
    while w[TAKEN] < w[COUNT] and n < out.size:
        copy_record(out, n, recovery.staged, w[TAKEN])
        w[TAKEN] += 1
        n += 1
    if w[TAKEN] == w[COUNT]:
        w[TAKEN] = w[COUNT] = 0
    return n
