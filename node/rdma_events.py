"""Outputs of one node as inputs of another, over RDMA: the frames in a channel, how they are made, and what becomes of their events.

A frame is one record that says what follows, and up to :data:`FRAME_EVENTS` events. Its check covers both, so that a frame of which
something is not there yet, whatever the buses between us do, is never taken for whole; its place in the channel is in it, so that an old
one is never taken for new. Sequences are the outputs' own, in the events: what is missing between two of them is a gap.

What the subscriber's shards get: see :func:`take_frames`.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np

from tickmesh.node.event import ALL_INSTRUMENTS, ASK, BID, EVENT, NO_INSTRUMENT, NO_PRICE, NO_SIDE, Flag, Kind
from tickmesh.node.instruments import FILTERED, InstrumentTable, intern
from tickmesh.transports.rdma import (
    S_CONSUMED,
    S_FAILED,
    S_PUBLISHED,
    S_STAGED,
    channel_available,
    channel_consume,
    channel_inbox_slot,
    channel_room,
    channel_slot,
    channel_stage,
    no_channel,
    post_and_reap,
)
from tickmesh.transports.ring import HEADER_BYTES, RECORD, W_CAPACITY, W_CLAIMED, W_PUBLISHED, ring_free
from tickmesh.transports.toolbox import (
    copy_record,
    idle,
    inlined,
    load_acquire,
    loop,
    monotonic_ns,
    now_ns,
    outlined,
    quick,
    zeros_aligned,
)
from tickmesh.transports.verbs_post import make_poster

FRAME_EVENTS = 127
"""Most events of a frame: with its head, 8 KiB."""
FRAME = np.dtype(
    [("magic", "<u4"), ("shard", "<u2"), ("version", "u1"), ("unused", "u1"), ("count", "<u8"), ("epoch", "<u8"), ("place", "<u8"),
     ("check", "<u8"), ("spare", "<u8", 3)]
)  # fmt: skip
"""The first record: whose outputs they are, how many, under which epoch; `place` in the channel."""
assert FRAME.itemsize == RECORD.itemsize == EVENT.itemsize
MAGIC, VERSION = int.from_bytes(b"TMRE", "little"), 1
_HEAD = np.uint64(MAGIC | VERSION << 48)
_ZERO, _ONE = np.uint64(0), np.uint64(1)
_K0, _K1, _K2, _K3 = (np.uint64(k) for k in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63))
_ROTATE, _BACK = np.uint64(29), np.uint64(35)

# ---------------------------------------------------------------- the check


@inlined
def _fold(check: Any, record: Any) -> Any:
    """One record more: eight products that do not wait for each other, then one step that depends on the order of records."""
    a = (record.word0 ^ _K0) * _K1 + (record.word1 ^ _K1) * _K2
    b = (record.word2 ^ _K2) * _K3 + (record.word3 ^ _K3) * _K0
    c = (record.word4 ^ _K0) * _K2 + (record.word5 ^ _K1) * _K3
    d = (record.word6 ^ _K2) * _K0 + (record.word7 ^ _K3) * _K1
    x = check * _K0 + (a ^ (b << _ROTATE | b >> _BACK)) + (c ^ (d << _BACK | d >> _ROTATE))
    return x ^ (x >> _ROTATE)


# ---------------------------------------------------------------- publishing


@outlined
def stage_frame(channel: Any, words: Any, slots: Any, position: Any, count: Any, shard: Any, epoch: Any) -> Any:
    """Copy outputs from a ring to the outbox as one frame, if they are whole; publishing it is the caller's.

    Args:
        words, slots: of the ring (:class:`tickmesh.transports.ring.RingArrays` of RECORD).
        position: of the first of them in the ring, u64.
        count: 1 to FRAME_EVENTS, published already; `count` + 1 records have room.

    Returns:
        False if the ring's writer has come round meanwhile: nothing has been staged.
    """
    mask, head = words[W_CAPACITY] - _ONE, channel_slot(channel, 0)
    check = _head_check(channel, head, count, shard, epoch)
    for i in range(np.uint64(count)):
        slot = channel_slot(channel, i + _ONE)
        copy_record(channel.outbox, slot, slots, (position + i) & mask)
        check = _fold(check, channel.outbox[slot])
    if load_acquire(words, W_CLAIMED) > position + words[W_CAPACITY]:
        return False
    channel.outbox[head].word4 = check
    channel_stage(channel, count + 1)
    return True


@inlined
def _head_check(channel: Any, slot: Any, count: Any, shard: Any, epoch: Any) -> Any:
    """Write a frame's first record, without its check; returns the check so far."""
    head = channel.outbox[slot]
    head.word0 = _HEAD | np.uint64(shard) << np.uint64(32)
    head.word1, head.word2, head.word3 = np.uint64(count), np.uint64(epoch), channel.state[S_STAGED]
    head.word4 = head.word5 = head.word6 = head.word7 = _ZERO
    return _fold(_K3, head)


@inlined
def stage_outputs(channel: Any, words: Any, slots: Any, position: Any, until: Any, shard: Any, epoch: Any) -> Any:
    """Stage frames with the outputs from `position` up to `until` (places in the ring), as many as there is room for.

    Returns:
        (position, lost): where it goes on, and how many outputs the writer of a lossy ring has overwritten before they were taken.
    """
    lost = _ZERO
    while position < until:
        room = channel_room(channel)
        if room < 2:
            break
        count = min(np.int64(until - position), min(room - 1, np.int64(FRAME_EVENTS)))
        if stage_frame(channel, words, slots, position, count, shard, epoch):
            position += np.uint64(count)
        else:  # a quarter of the ring further there is time to read
            oldest = load_acquire(words, W_CLAIMED) - words[W_CAPACITY] + (words[W_CAPACITY] >> np.uint64(2))
            oldest = min(oldest, load_acquire(words, W_PUBLISHED))
            lost += oldest - position
            position = oldest
    return position, lost


C_POSITION, C_LIMIT, C_LOST = range(3)
"""Words of the cursor: the next output's place in the ring, how far outputs may go (any thread may write it), how many were overwritten
before they were taken."""


@inlined
def _stage(channel: Any, words: Any, slots: Any, cursor: Any, shard: Any, epoch: Any) -> None:
    end = min(load_acquire(words, W_PUBLISHED), load_acquire(cursor, C_LIMIT))
    if cursor[C_POSITION] < end:
        cursor[C_POSITION], lost = stage_outputs(channel, words, slots, cursor[C_POSITION], end, shard, epoch)
        cursor[C_LOST] += lost


@quick
def stage_now(channel: Any, words: Any, slots: Any, cursor: Any, shard: Any, epoch: Any) -> None:
    _stage(channel, words, slots, cursor, shard, epoch)


@loop
def publish_for(
    channel: Any, poster: Any, words: Any, slots: Any, cursor: Any, shard: Any, epoch: Any, stop: Any, mode: Any, ns: Any
) -> None:
    """Write outputs to the subscriber for `ns`, or until `stop` or the channel's end; `cursor` is u64[3]."""
    until, rounds, state = monotonic_ns() + ns, 0, channel.state
    while stop[0] == 0 and state[S_FAILED] == np.uint64(0):
        _stage(channel, words, slots, cursor, shard, epoch)
        staged = state[S_STAGED] > state[S_PUBLISHED]
        post_and_reap(channel, poster)
        rounds = 0 if staged else idle(mode, rounds)
        if monotonic_ns() >= until:
            return


# ---------------------------------------------------------------- taking

NOTHING, TAKEN, DAMAGED, FOREIGN, FULL = range(5)
"""What :func:`take_frames` finds; FULL: a shard has no room, and nothing was looked for."""
(
    X_SOURCE, X_EXPECTED, X_EPOCH, X_SHARD, X_DEPTH, X_SWEEP, X_SWEEP_KIND, X_SWEEP_SOURCE, X_UNKNOWN, X_FILTERED, X_DUPLICATES, X_GAPS,
    X_MISSING, X_EVENTS, X_FRAMES, X_FULL, X_PRINTS,
) = range(17)  # fmt: skip
"""Words of ``Subscription.state``: number of the source here; the next output's sequence (0: any); the publisher's epoch and shard; whether
orders or levels come (then a BBO says nothing new); a sweep over the instruments of one of its sources that is under way; counters; whether
trades come (then an execution is printed by its trade)."""
Subscription = namedtuple("Subscription", "state instruments ids sources")
"""`state` i64[32]; `instruments` :class:`tickmesh.node.instruments.Instruments`; by the publisher's instrument: `ids` u32 (ours, or
NO_INSTRUMENT, FILTERED) and `sources` u32 (its source's number there)."""


def no_subscription(table: InstrumentTable) -> Subscription:
    """Arrays of the right types: to compile kernels with."""
    nothing = np.zeros(1, np.uint32)
    return Subscription(np.zeros(32, np.int64), table.arrays, nothing, nothing)


_NONE, _FILTERED, _ALL = np.uint32(NO_INSTRUMENT), np.uint32(FILTERED), np.uint32(ALL_INSTRUMENTS)
_ADD, _EXECUTE, _CLEAR, _LEVEL, _QUOTE = (np.uint8(k) for k in (Kind.ADD, Kind.EXECUTE, Kind.CLEAR, Kind.LEVEL, Kind.QUOTE))
_STATUS, _IMBALANCE, _REFERENCE, _GAP, _BREAK, _BBO = (
    np.uint8(k) for k in (Kind.STATUS, Kind.IMBALANCE, Kind.REFERENCE, Kind.GAP, Kind.BREAK, Kind.BBO)
)
_STALE, _NON_PRINTABLE, _MORE = np.uint16(Flag.STALE), np.uint16(Flag.NON_PRINTABLE), np.uint16(Flag.MORE)
_BID, _ASK, _NO_SIDE, _NO_PRICE = np.uint8(BID), np.uint8(ASK), np.uint8(NO_SIDE), np.int64(NO_PRICE)
_ROOM = 6
"""Events that one output may become: a gap before it, the definition of its instrument, and a BBO's CLEAR, two LEVELs and GAP."""


@inlined
def _begin(out: Any, n: Any, event: Any, instrument: Any, kind: Any) -> Any:
    e = out[n]
    e.seq, e.ts_event, e.ts_recv = event.seq, event.ts_event, now_ns()
    e.instrument, e.kind, e.side, e.flags = instrument, kind, _NO_SIDE, np.uint16(0)
    e.price, e.qty, e.id, e.aux = np.int64(0), np.int64(0), _ZERO, np.int64(0)
    return e


@outlined
def _announce(taking: Any, found: Any, event: Any, out: Any, n: Any) -> Any:
    record = taking.instruments.records[found]
    record.announced = np.uint32(1)
    e = _begin(out, n, event, found, _REFERENCE)
    e.side = np.uint8(record.qty_exponent)
    e.price, e.qty, e.id, e.aux = record.tick_size, np.int64(record.w0), record.w1, np.int64(record.w2)
    return n + 1


@outlined
def learn(taking: Any, remote: Any, source: Any, tick: Any, exponent: Any, w0: Any, w1: Any, w2: Any) -> Any:
    """The publisher's instrument `remote`, of its source number `source`, is this symbol; returns its id here (u32), or none."""
    if np.int64(remote) >= taking.ids.size:
        taking.state[X_UNKNOWN] += 1
        return _NONE
    found = intern(taking.instruments, np.uint32(taking.state[X_SOURCE]), w0, w1, w2, tick, np.int8(exponent))
    taking.ids[remote], taking.sources[remote] = found, np.uint32(source)
    if found == _NONE:
        taking.state[X_FULL] += 1
    return found


@outlined
def _take_gap(taking: Any, event: Any, out: Any, n: Any) -> Any:
    """What lies between the last output and this one is missing: every book of the source is stale."""
    first, last = taking.state[X_EXPECTED], np.int64(event.seq) - 1
    taking.state[X_GAPS] += 1
    taking.state[X_MISSING] += last - first + 1
    e = _begin(out, n, event, _ALL, _GAP)
    e.seq, e.qty, e.id, e.aux = np.uint64(first), last - first + 1, np.uint64(first), last
    return n + 1


@outlined
def _take_reference(taking: Any, event: Any, out: Any, n: Any) -> Any:
    exponent = np.int8(event.side)
    found = learn(taking, event.instrument, event.flags, event.price, exponent, np.uint64(event.qty), event.id, np.uint64(event.aux))
    if found < _FILTERED and taking.instruments.records[found].announced == np.uint32(0):
        n = _announce(taking, found, event, out, n)
    return n


@inlined
def _fill(taking: Any, e: Any, event: Any) -> None:
    """The body of an output as an input."""
    e.side, e.flags = event.side, event.flags
    e.price, e.qty, e.id, e.aux = event.price, event.qty, event.id, event.aux
    if event.kind == _EXECUTE and taking.state[X_PRINTS] != 0:  # its trade comes as a TRADE of its own
        e.flags = event.flags | _NON_PRINTABLE


@inlined
def _put_level(found: Any, event: Any, side: Any, price: Any, qty: Any, out: Any, n: Any) -> Any:
    if price == _NO_PRICE:
        return n
    e = _begin(out, n, event, found, _LEVEL)
    e.side, e.price, e.qty = side, price, qty
    return n + 1


@outlined
def _take_bbo(found: Any, event: Any, out: Any, n: Any) -> Any:
    """A BBO as a book of one level: always all of it, so that it comes out the same whatever came before. A stale one is stale here too."""
    first = n
    _begin(out, n, event, found, _CLEAR)
    n = _put_level(found, event, _BID, event.price, event.qty, out, n + 1)
    n = _put_level(found, event, _ASK, event.aux, np.int64(event.id), out, n)
    if event.flags & _STALE != np.uint16(0):
        _begin(out, n, event, found, _GAP)
        n += 1
    for i in range(first, n - 1):
        out[i].flags = _MORE
    return n


@inlined
def _is_taken(taking: Any, event: Any) -> Any:
    """Whether an output says something about the market that a shard takes as input."""
    kind = event.kind
    if kind == _BBO:
        return taking.state[X_DEPTH] == 0
    return (_ADD <= kind <= _QUOTE) or kind in (_STATUS, _IMBALANCE, _BREAK, _GAP)


@outlined
def _take_event(taking: Any, event: Any, out: Any, n: Any) -> Any:
    """One output, in sequence; returns the new `n`."""
    kind = event.kind
    if kind == _REFERENCE:
        return _take_reference(taking, event, out, n)
    if not _is_taken(taking, event):
        taking.state[X_FILTERED] += 1
        return n
    if event.instrument == _ALL:  # of one of its sources: each of that one's instruments, in turn
        if kind in (_GAP, _CLEAR):
            taking.state[X_SWEEP], taking.state[X_SWEEP_KIND], taking.state[X_SWEEP_SOURCE] = 0, np.int64(kind), event.price
        return n
    if np.int64(event.instrument) >= taking.ids.size or taking.ids[event.instrument] == _NONE:
        taking.state[X_UNKNOWN] += 1
        return n
    found = taking.ids[event.instrument]
    if found == _FILTERED:
        taking.state[X_FILTERED] += 1
        return n
    if taking.instruments.records[found].announced == np.uint32(0):
        n = _announce(taking, found, event, out, n)
    if kind == _BBO:
        return _take_bbo(found, event, out, n)
    _fill(taking, _begin(out, n, event, found, kind), event)
    return n + 1


@outlined
def _sweep(taking: Any, event: Any, out: Any, n: Any) -> Any:
    """Go on with a GAP or CLEAR of a whole source of the publisher: one for each of its instruments that were met; returns the new `n`."""
    state = taking.state
    while state[X_SWEEP] < taking.ids.size and n < out.size:
        remote = state[X_SWEEP]
        state[X_SWEEP] += 1
        found = taking.ids[remote]
        if found >= _FILTERED or np.int64(taking.sources[remote]) != state[X_SWEEP_SOURCE]:
            continue
        if taking.instruments.records[found].announced != np.uint32(0):
            _begin(out, n, event, found, np.uint8(state[X_SWEEP_KIND]))
            n += 1
    return n


@outlined
def _whole(channel: Any) -> Any:
    """Events of the next frame, once it is whole (i64); 0: it is not there; -1: damaged, or not all of it is visible yet."""
    available = channel_available(channel)
    if available < 1:
        return np.int64(0)
    slot = channel_inbox_slot(channel, 0)
    head = channel.inbox[slot]
    count, place = np.int64(head.word1), head.word3
    if head.word0 & ~np.uint64(0xFFFF00000000) != _HEAD or place != channel.state[S_CONSUMED] or count < 1 or count > FRAME_EVENTS:
        return np.int64(-1)
    if available < count + 1:
        return np.int64(-1)
    given, head.word4 = head.word4, _ZERO
    check = _fold(_K3, head)
    head.word4 = given
    for i in range(np.uint64(count)):
        check = _fold(check, channel.inbox[channel_inbox_slot(channel, i + _ONE)])
    return count if check == given else np.int64(-1)


@outlined
def take_frames(channel: Any, events: Any, taking: Any, at: Any, out: Any) -> Any:
    """Turn what is in the inbox into input events, until `out` is full or nothing is left.

    Orders, levels, trades, quotes, statuses, imbalances and breaks go as they are. A BBO is a book of one level (CLEAR, a LEVEL for each
    side that there is, and GAP if it is stale; all but the last with MORE), unless orders or levels come too. An execution is not printed
    if trades come too. Signals, alerts, bars, intents and decisions are the publisher's own affair, and left out. A whole source's GAP or
    CLEAR goes to each instrument of that source.

    Args:
        channel: :class:`tickmesh.transports.rdma.ChannelArrays`.
        events: its inbox as EVENT.
        taking: :class:`Subscription`.
        at: i64[2]: events of the frame under way, and how many of them are done. Kept here.
        out: EVENT[], room for at least :data:`_ROOM`.

    Returns:
        (n, found): events in `out`; NOTHING, TAKEN, DAMAGED (perhaps not all visible yet: look again), FOREIGN (another epoch or shard).
    """
    n, state = np.int64(0), taking.state
    while n + _ROOM <= out.size:
        if at[1] >= at[0]:
            if at[0] > 0:
                channel_consume(channel, at[0] + 1)
                at[0] = at[1] = 0
            count = _whole(channel)
            if count <= 0:
                return n, (NOTHING if n == 0 else TAKEN) if count == 0 else DAMAGED
            head = channel.inbox[channel_inbox_slot(channel, 0)]
            if np.int64(head.word2) != state[X_EPOCH] or np.int64(head.word0 >> np.uint64(32) & np.uint64(0xFFFF)) != state[X_SHARD]:
                return n, FOREIGN
            state[X_FRAMES] += 1
            at[0] = count
        event = events[channel_inbox_slot(channel, at[1] + 1)]
        if state[X_SWEEP] < taking.ids.size:
            n = _sweep(taking, event, out, n)
            if state[X_SWEEP] < taking.ids.size:
                return n, TAKEN
            at[1] += 1
            continue
        if state[X_EXPECTED] != 0 and np.int64(event.seq) < state[X_EXPECTED]:
            state[X_DUPLICATES] += 1
            at[1] += 1
            continue
        if state[X_EXPECTED] != 0 and np.int64(event.seq) > state[X_EXPECTED]:
            n = _take_gap(taking, event, out, n)
        state[X_EXPECTED] = np.int64(event.seq) + 1
        state[X_EVENTS] += 1
        n = _take_event(taking, event, out, n)
        if state[X_SWEEP] >= taking.ids.size:
            at[1] += 1
    return n, TAKEN


@inlined
def shards_have_room(router: Any, wanted: Any) -> Any:
    """Whether each shard's ring has room for so many events: who waits in :func:`tickmesh.node.router.route` writes no heartbeats."""
    for shard in range(len(router.rings)):
        if ring_free(router.rings[shard], wanted) < wanted:
            return False
    return True


@quick
def learn_now(taking: Any, references: Any) -> None:
    """:func:`learn` the publisher's REFERENCE events."""
    for i in range(references.size):
        e = references[i]
        learn(taking, e.instrument, e.flags, e.price, np.int8(e.side), np.uint64(e.qty), e.id, np.uint64(e.aux))


def warm() -> None:
    """Compile what Python calls here (:func:`tickmesh.transports.codecache.load_compiled`)."""
    channel, words, slots, cursor = no_channel(), np.zeros(HEADER_BYTES // 8, np.uint64), zeros_aligned(8, RECORD), np.zeros(3, np.uint64)
    nobody, stop = np.uint64(0), np.ones(1, np.int64)
    stage_now(channel, words, slots, cursor, nobody, nobody)
    publish_for(channel, make_poster(), words, slots, cursor, nobody, nobody, stop, 0, np.int64(0))
    learn_now(no_subscription(InstrumentTable(1)), zeros_aligned(0, EVENT))
