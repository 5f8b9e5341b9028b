"""Rings in another host's memory: 64-byte records that go both ways over one reliable RDMA connection, by one-sided writes.

Each side has an *inbox* that the other one writes into, and a *line* of 64 bytes in which the other one tells how far it is::

    line:  published u64 | consumed u64 | beats u64        inbox: RECORD[capacity], record `n` in slot ``n & (capacity - 1)``

Whoever sends copies records to its *outbox*, writes them from there to the same slots of the peer's inbox, and then the line, which also
gives credit for what it has consumed itself: a publication, a credit and a heartbeat are one write. The receiver looks at memory and makes
no call at all. Writes of one queue pair are performed in order, so that the line is never ahead of the records (IBA 1.4, 9.5; it needs
memory without relaxed ordering, which is what :mod:`tickmesh.transports.verbs` registers). With `strict`, the line comes with an
immediate, and its completion at the receiver is what tells of records: that order does not lean on how the host's bus works.

Rules that the kernels below keep: the line only grows; a slot of the outbox is not used again before its write has completed, since the
card may send it once more; of the writes under way there is always one, at most an eighth of the ring old, whose completion is told.

A channel ends with its connection. Another one begins with fresh memory, a fresh queue pair and fresh keys: nobody who still knows the old
ones can write into it. What goes on where, after that, is the business of whoever uses it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tickmesh.transports.ring import RECORD, RECORD_BYTES
from tickmesh.transports.toolbox import idle, inlined, load_acquire, loop, monotonic_ns, outlined, quick, zeros_aligned
from tickmesh.transports.verbs import F_IMMEDIATE, F_INLINE, F_SIGNALED, WRITE, Device, Endpoint, Poster, Queue, Region, Write, open_device
from tickmesh.transports.verbs_post import (
    WC_RECEIVED_WRITE,
    byte_swapped,
    make_poster,
    poll_completions,
    poll_now,
    post_receives,
    post_receives_now,
    post_writes,
    post_writes_now,
)

LINE_BYTES = 64
RECORDS_MAX = 1 << 22
"""Most records of an inbox: 256 MiB."""
RECORDS_MIN = 64
DEPTH = 256
"""Writes that may be under way."""
_WRITES_AT_ONCE, _POLLED = 3, 16
_RECEIVES = 128
T_PUBLISHED, T_CONSUMED, T_BEATS = range(3)
"""Words of a line."""
(
    S_STAGED, S_PUBLISHED, S_COMPLETED, S_CONSUMED, S_CREDITED, S_SEEN, S_BEATS, S_POSTED, S_REAPED, S_SIGNALLED_POSTED,
    S_SIGNALLED, S_FIRST_SIGNAL, S_SIGNALS, S_FAILED, S_OUT, S_IN, S_REMOTE, S_KEY, S_LOCAL, S_LOCAL_KEY, S_TELL, S_DEPTH, S_STRICT, S_TOLD,
) = range(24)  # fmt: skip
"""Words of a channel's state. Counts of records: copied to the outbox, published, completed, consumed of the inbox, credited, seen there.
Counts of writes: posted, completed, posted when the last completion was asked for. Then what does not change while it is connected;
S_STRICT: the peer wants to be told by completions, S_TOLD: we do."""
OK, BAD_LINE, REFUSED = 0, 0xFFFF, 0xFFFE
"""Values of S_FAILED besides a completion's status."""
_ZERO, _ONE, _LOW = np.uint64(0), np.uint64(1), np.uint64(0xFFFFFFFF)


class ChannelError(Exception):
    """The channel cannot be made, or has ended; `peer` is what is known of the other side, `status` a completion's, if that ended it."""

    def __init__(self, message: str, *, peer: str = "", status: int = 0) -> None:
        super().__init__(message)
        self.peer, self.status = peer, status


class ChannelSilent(ChannelError):
    """The other side has written nothing for as long as it may."""


class ChannelArrays(NamedTuple):
    """What kernels take.

    Attributes:
        state: u64[32], ours alone.
        told: u64[8], the line that the peer writes.
        tell: u64[8], what goes to the peer's.
        inbox: RECORD[], written by the peer.
        outbox: RECORD[], as long as the peer's inbox.
        signals: u64[DEPTH, 2], writes and records up to each completion that is asked for, a queue.
        writes: WRITE[4], what is to be posted next.
    """

    state: Any
    told: Any
    tell: Any
    inbox: Any
    outbox: Any
    signals: Any
    writes: Any


def no_channel() -> ChannelArrays:
    """Arrays of the right types, of a channel that is not there: to compile kernels with."""
    line, ring = zeros_aligned(8, np.uint64), zeros_aligned(1, RECORD)
    return ChannelArrays(zeros_aligned(32, np.uint64), line, line, ring, ring, np.zeros((DEPTH, 2), np.uint64), zeros_aligned(4, WRITE))


# ---------------------------------------------------------------- kernels: sending


@inlined
def channel_room(channel: Any) -> Any:
    """Records (i64) that may be copied to the outbox now, from :func:`channel_slot` on; 0 once the channel has failed."""
    state = channel.state
    credit = load_acquire(channel.told, T_CONSUMED)
    if credit > state[S_PUBLISHED]:
        state[S_FAILED] = np.uint64(BAD_LINE)
    if state[S_FAILED] != _ZERO:
        return np.int64(0)
    free_below = min(credit, state[S_COMPLETED]) + state[S_OUT]
    return np.int64(free_below - state[S_STAGED])


@inlined
def channel_slot(channel: Any, offset: Any) -> Any:
    """Index into ``channel.outbox`` of the `offset`-th record that is copied there next (u64)."""
    return (channel.state[S_STAGED] + np.uint64(offset)) & (channel.state[S_OUT] - _ONE)


@inlined
def channel_stage(channel: Any, count: Any) -> None:
    """`count` records more are in the outbox."""
    channel.state[S_STAGED] += np.uint64(count)


@inlined
def channel_can_post(channel: Any) -> Any:
    """Whether there is room for a publication in the queue of writes."""
    state = channel.state
    return state[S_POSTED] - state[S_REAPED] + np.uint64(_WRITES_AT_ONCE) <= state[S_DEPTH]


@inlined
def _put_write(channel: Any, n: Any, local: Any, key: Any, length: Any, remote: Any, flags: Any) -> Any:
    write = channel.writes[n]
    write.local, write.local_key, write.length = local, np.uint32(key), np.uint32(length)
    write.remote, write.remote_key, write.flags = remote, np.uint32(channel.state[S_KEY]), np.uint32(flags)
    write.immediate, write.id = np.uint32(0), _ZERO
    return n + 1


@outlined
def channel_plan(channel: Any, signal: Any) -> Any:
    """Describe in ``channel.writes`` what publishes everything in the outbox, with credit and a beat; returns how many writes (i64).

    They must be posted next, in this order and together; :func:`channel_can_post` has said that they may. `signal` asks for the completion
    even if it is not due.
    """
    state, tell = channel.state, channel.tell
    record = np.uint64(RECORD_BYTES)
    at, n = state[S_PUBLISHED] & (state[S_OUT] - _ONE), np.int64(0)
    count = state[S_STAGED] - state[S_PUBLISHED]
    first = min(count, state[S_OUT] - at)
    inbox = state[S_REMOTE] + np.uint64(LINE_BYTES)
    if first > _ZERO:
        n = _put_write(channel, n, state[S_LOCAL] + at * record, state[S_LOCAL_KEY], first * record, inbox + at * record, 0)
    if first < count:
        n = _put_write(channel, n, state[S_LOCAL], state[S_LOCAL_KEY], (count - first) * record, inbox, 0)
    state[S_PUBLISHED], state[S_CREDITED] = state[S_STAGED], state[S_CONSUMED]
    state[S_BEATS] += _ONE
    tell[T_PUBLISHED], tell[T_CONSUMED], tell[T_BEATS] = state[S_PUBLISHED], state[S_CONSUMED], state[S_BEATS]
    flags = F_INLINE | (F_IMMEDIATE if state[S_STRICT] != _ZERO else 0)
    posted = state[S_POSTED] + np.uint64(n + 1)
    due = posted - state[S_SIGNALLED_POSTED] >= state[S_DEPTH] >> np.uint64(2)
    if signal or due or state[S_PUBLISHED] - state[S_SIGNALLED] >= state[S_OUT] >> np.uint64(3):
        flags |= F_SIGNALED
        place = (state[S_FIRST_SIGNAL] + state[S_SIGNALS]) % np.uint64(DEPTH)
        channel.signals[place, 0], channel.signals[place, 1] = posted, state[S_PUBLISHED]
        state[S_SIGNALS] += _ONE
        state[S_SIGNALLED_POSTED], state[S_SIGNALLED] = posted, state[S_PUBLISHED]
    n = _put_write(channel, n, state[S_TELL], 0, np.uint64(24), state[S_REMOTE], flags)
    channel.writes[n - 1].id, channel.writes[n - 1].immediate = posted, np.uint32(state[S_PUBLISHED] & _LOW)
    state[S_POSTED] = posted
    return n


@inlined
def channel_completed(channel: Any, status: Any) -> None:
    """A completion of ours has come, of the oldest write that it was asked for."""
    state = channel.state
    if status != 0 or state[S_SIGNALS] == _ZERO:
        if state[S_FAILED] == _ZERO:
            state[S_FAILED] = np.uint64(status) if status != 0 else np.uint64(BAD_LINE)
        return
    place = state[S_FIRST_SIGNAL]
    state[S_REAPED], state[S_COMPLETED] = channel.signals[place, 0], channel.signals[place, 1]
    state[S_FIRST_SIGNAL] = (place + _ONE) % np.uint64(DEPTH)
    state[S_SIGNALS] -= _ONE


# ---------------------------------------------------------------- kernels: receiving


@inlined
def channel_received(channel: Any, immediate: Any) -> None:
    """Strict mode: a publication up to the record whose count ends in these 32 bits has come."""
    state = channel.state
    state[S_SEEN] += (np.uint64(immediate) - state[S_SEEN]) & _LOW


@inlined
def channel_available(channel: Any) -> Any:
    """Records (i64) in the inbox that are not consumed; 0 once the channel has failed."""
    state = channel.state
    if state[S_TOLD] == _ZERO:
        published = load_acquire(channel.told, T_PUBLISHED)
        if published > state[S_SEEN]:
            state[S_SEEN] = published
    available = state[S_SEEN] - state[S_CONSUMED]
    if available > state[S_IN]:
        state[S_FAILED] = np.uint64(BAD_LINE)
    return np.int64(0) if state[S_FAILED] != _ZERO else np.int64(available)


@inlined
def channel_inbox_slot(channel: Any, offset: Any) -> Any:
    """Index into ``channel.inbox`` of the `offset`-th record not consumed (u64)."""
    return (channel.state[S_CONSUMED] + np.uint64(offset)) & (channel.state[S_IN] - _ONE)


@inlined
def channel_consume(channel: Any, count: Any) -> None:
    """`count` records are not needed any more; the peer is told by the next publication, see :func:`channel_credit_due`."""
    channel.state[S_CONSUMED] += np.uint64(count)


@inlined
def channel_credit_due(channel: Any) -> Any:
    """Whether so much was consumed that the peer should be told at once."""
    state = channel.state
    return state[S_CONSUMED] - state[S_CREDITED] >= state[S_IN] >> np.uint64(2)


# ---------------------------------------------------------------- kernels: both, where compiled code can post


@outlined
def _reap(channel: Any, poster: Any) -> None:
    """Take what has completed; receives that were used are posted again."""
    count = poll_completions(poster, _POLLED)
    arrived = np.int64(0)
    for i in range(count):
        done = poster.completions[i]
        if done.status == np.uint32(0) and done.opcode == np.uint32(WC_RECEIVED_WRITE):
            channel_received(channel, byte_swapped(done.immediate))
            arrived += 1
        else:
            channel_completed(channel, np.int64(done.status))
    if count < 0 or (arrived > 0 and post_receives(poster, arrived) != 0):
        channel.state[S_FAILED] = np.uint64(REFUSED)


@outlined
def post_and_reap(channel: Any, poster: Any) -> None:
    """Take what has completed, and publish what is staged, or credit that is due, if the queue has room. One thread only."""
    _reap(channel, poster)
    state = channel.state
    wanted = state[S_STAGED] > state[S_PUBLISHED] or channel_credit_due(channel)
    if wanted and state[S_FAILED] == _ZERO and channel_can_post(channel):
        count = channel_plan(channel, False)
        if post_writes(poster, channel.writes, count) != 0:
            state[S_FAILED] = np.uint64(REFUSED)


# ---------------------------------------------------------------- compiled entry points of the Python face


@quick
def _plan_now(channel: Any, signal: Any) -> Any:
    return channel_plan(channel, signal) if channel_can_post(channel) else np.int64(0)


@quick
def _room_now(channel: Any) -> Any:
    return channel_room(channel)


@quick
def _available_now(channel: Any) -> Any:
    return channel_available(channel)


@quick
def _credit_due_now(channel: Any) -> Any:
    return channel_credit_due(channel)


@quick
def _completed_now(channel: Any, status: Any) -> None:
    channel_completed(channel, status)


@quick
def _received_now(channel: Any, immediate: Any) -> None:
    channel_received(channel, immediate)


@loop
def _wait_for_word(line: Any, word: Any, known: Any, mode: Any, limit_ns: Any) -> Any:
    """Wait until a word of our line is another one, or for so long; returns the word."""
    until, rounds = monotonic_ns() + limit_ns, 0
    while True:
        found = load_acquire(line, word)
        if found != known or (rounds & 7 == 7 and monotonic_ns() >= until):
            return found
        rounds = idle(mode, rounds)


def warm() -> None:
    """Compile what Python calls here (:func:`tickmesh.transports.codecache.load_compiled`)."""
    channel, poster = no_channel(), make_poster()
    post_writes_now(poster, channel.writes, 1)
    post_receives_now(poster, 1)
    poll_now(poster, 1)
    channel.state[S_DEPTH] = DEPTH
    channel.state[S_OUT] = channel.state[S_IN] = 1
    _plan_now(channel, False)
    _room_now(channel)
    _available_now(channel)
    _credit_due_now(channel)
    _completed_now(channel, 0)
    _received_now(channel, 0)
    _wait_for_word(channel.told, T_BEATS, np.uint64(1), 0, np.int64(0))


# ---------------------------------------------------------------- the Python face


class RdmaChannel:
    """One connection, and the memory of its two rings. Made on both sides; each gives its :meth:`offer` to the other's :meth:`connect`.

    One thread may send while another one receives. Where the two sides exchange their offers, and who may, is the caller's business.

    Args:
        device: whose it is; it must outlive the channel.
        records: length of the inbox, a power of two.
        strict: whether *we* are told of records by completions; each side chooses for itself.
        idle_mode: how waiting is done, ``toolbox.IDLE_*``.
        peer: what the other side is called in errors.

    Raises:
        VerbsError: the device gives no memory or no queue pair.
    """

    def __init__(self, device: Device, records: int, *, strict: bool = False, idle_mode: int = 2, peer: str = "") -> None:
        if not RECORDS_MIN <= records <= RECORDS_MAX or records & (records - 1):
            raise ValueError(f"records is {records}: a power of two from {RECORDS_MIN} to {RECORDS_MAX}")
        self.device, self.records, self.strict, self.idle_mode, self.peer = device, records, strict, idle_mode, peer
        self._memory = zeros_aligned(LINE_BYTES + records * RECORD_BYTES, np.uint8)
        self._told = self._memory[:LINE_BYTES].view(np.uint64)
        self._inbox_bytes = self._memory[LINE_BYTES:]
        self._inbox: Region = device.region(self._memory.ctypes.data, self._memory.size)
        self._outbox: Region | None = None
        self._arrays: ChannelArrays | None = None
        self._lock = threading.Lock()
        self._closed = False
        try:
            self.queue: Queue = device.queue(sends=DEPTH, receives=_RECEIVES, inline_bytes=LINE_BYTES)
        except BaseException:
            self._inbox.close()
            raise

    @property
    def poster(self) -> Poster | None:
        """For :func:`post_and_reap`; None: only :meth:`post_and_reap` of this class can."""
        return self.queue.poster

    @property
    def arrays(self) -> ChannelArrays:
        """For kernels; once it is connected."""
        assert self._arrays is not None
        return self._arrays

    def offer(self) -> dict[str, Any]:
        """What the other side needs, as plain data."""
        endpoint = self.queue.endpoint().to_dict()
        region = self._inbox
        return {"endpoint": endpoint, "address": region.address, "key": region.rkey, "records": self.records, "strict": self.strict}

    def connect(self, offer: Mapping[str, Any]) -> None:
        """Connect to the side that made `offer`. Whoever has connected last sends first (:meth:`beat`): the other one hears of it.

        Raises:
            ChannelError: the offer is damaged, or asks for more memory than there may be.
            VerbsError: the device refuses.
        """
        try:
            endpoint = Endpoint.from_dict(offer["endpoint"])
            address, key, records = int(offer["address"]), int(offer["key"]), int(offer["records"])
        except (KeyError, TypeError, ValueError) as error:
            raise ChannelError(f"what the other side offers is damaged ({error})", peer=self.peer) from error
        if not RECORDS_MIN <= records <= RECORDS_MAX or records & (records - 1):
            raise ChannelError(f"the other side offers {records} records: a power of two up to {RECORDS_MAX}", peer=self.peer)
        self._make_outbox(address, key, records, strict=bool(offer.get("strict")))
        self.queue.connect(endpoint)
        if self.strict:  # who writes before they are there is told to try again
            self.queue.receive(_RECEIVES)

    def _make_outbox(self, address: int, key: int, records: int, *, strict: bool) -> None:
        memory = zeros_aligned(records * RECORD_BYTES, np.uint8)
        self._outbox_bytes = memory
        self._outbox = self.device.region(memory.ctypes.data, memory.size)
        tell, state = zeros_aligned(8, np.uint64), zeros_aligned(32, np.uint64)
        constants = {
            S_OUT: records, S_IN: self.records, S_REMOTE: address, S_KEY: key, S_LOCAL: self._outbox.address,
            S_LOCAL_KEY: self._outbox.lkey, S_TELL: tell.ctypes.data, S_DEPTH: DEPTH, S_STRICT: strict, S_TOLD: self.strict,
        }  # fmt: skip
        for word, value in constants.items():
            state[word] = value
        inbox = self._inbox_bytes.view(RECORD)
        signals, writes = np.zeros((DEPTH, 2), np.uint64), zeros_aligned(4, WRITE)
        self._arrays = ChannelArrays(state, self._told, tell, inbox, memory.view(RECORD), signals, writes)

    # -- what both ways share

    def _failed(self) -> ChannelError:
        status = int(self.arrays.state[S_FAILED])
        if status == BAD_LINE:
            return ChannelError("the other side tells what cannot be", peer=self.peer)
        if status == REFUSED:
            return ChannelError("the device takes no more of our writes", peer=self.peer)
        return ChannelError(f"the connection is lost ({self.queue.status_text(status)})", peer=self.peer, status=status)

    def _reap(self) -> None:
        """Take what has completed; the lock is held.

        Raises:
            ChannelError: the connection is lost.
        """
        arrived = 0
        for done in self.queue.poll(64):
            if done.immediate is not None and done.status == 0:
                _received_now(self.arrays, done.immediate)
                arrived += 1
            else:
                _completed_now(self.arrays, done.status)
        if arrived:
            self.queue.receive(arrived)
        if self.arrays.state[S_FAILED]:
            raise self._failed()

    def _publish(self, *, signal: bool = False) -> bool:
        """Post what is in the outbox, credit and a beat; false if the queue of writes is full. The lock is held."""
        count = int(_plan_now(self.arrays, signal))
        if count == 0:
            return False
        self.queue.write([Write.of(write) for write in self.arrays.writes[:count]])
        return True

    def beat(self) -> None:
        """Tell the other side that we are there, and what we have consumed.

        Raises:
            ChannelError: the connection is lost.
        """
        with self._lock:
            self._reap()
            self._publish(signal=True)

    def post_and_reap(self) -> None:
        """Take what has completed, and publish what is staged or credit that is due.

        Raises:
            ChannelError: the connection is lost.
        """
        with self._lock:
            self._reap()
            state = self.arrays.state
            if state[S_STAGED] > state[S_PUBLISHED] or _credit_due_now(self.arrays):
                self._publish()

    @property
    def in_flight(self) -> int:
        """Records staged that the other side has not consumed yet, or not said so."""
        return int(self.arrays.state[S_STAGED]) - int(self._told[T_CONSUMED])

    def wait_for_credit(self, limit_s: float) -> None:
        """Wait until the other side has consumed something, or for so long."""
        _wait_for_word(self._told, T_CONSUMED, self._told[T_CONSUMED], self.idle_mode, np.int64(limit_s * 1e9))

    @property
    def beats_heard(self) -> int:
        """How often the other side has written its line: as long as it rises, that side lives."""
        return int(self._told[T_BEATS])

    @property
    def beats_written(self) -> int:
        """How often we have written the other side's line: with publications, credit, and :meth:`beat`."""
        return int(self.arrays.state[S_BEATS])

    def wait_for_beat(self, known: int, limit_s: float) -> int:
        """Wait until :attr:`beats_heard` is not `known` any more, or for so long; returns it."""
        return int(_wait_for_word(self._told, T_BEATS, np.uint64(known), self.idle_mode, np.int64(limit_s * 1e9)))

    # -- bytes, for those who do not bring their own loop

    def send(self, parts: Sequence[memoryview], limit_s: float) -> int:
        """Send bytes, in all a multiple of 64, as one publication or, where there is less room, several. Returns how many.

        Raises:
            ChannelError: the connection is lost.
            TimeoutError: nothing was taken for `limit_s`.
        """
        data = b"".join(parts) if len(parts) > 1 else parts[0]
        source, size, at = np.frombuffer(data, np.uint8), len(data), 0
        if size % RECORD_BYTES:
            raise ValueError(f"{size} bytes are no multiple of {RECORD_BYTES}")
        until = time.monotonic() + limit_s
        while at < size:
            credit = int(self._told[T_CONSUMED])
            with self._lock:
                self._reap()
                taken = self._stage(source[at:])
                if taken and not self._publish():
                    taken = self._unstage(taken)
            if taken:
                at += taken
                until = time.monotonic() + limit_s
            elif time.monotonic() > until:
                raise TimeoutError
            else:
                _wait_for_word(self._told, T_CONSUMED, np.uint64(credit), self.idle_mode, np.int64(200_000))
        return size

    def _stage(self, source: Any) -> int:
        """Copy as much as there is room for to the outbox; returns bytes."""
        state = self.arrays.state
        count = min(int(_room_now(self.arrays)), len(source) // RECORD_BYTES)
        size, ring = count * RECORD_BYTES, self._outbox_bytes
        at = int(state[S_STAGED] & (state[S_OUT] - np.uint64(1))) * RECORD_BYTES
        first = min(size, len(ring) - at)
        ring[at : at + first] = source[:first]
        ring[: size - first] = source[first:size]
        state[S_STAGED] += np.uint64(count)
        return size

    def _unstage(self, size: int) -> int:
        self.arrays.state[S_STAGED] -= np.uint64(size // RECORD_BYTES)
        return 0

    def receive_into(self, view: memoryview, limit_s: float) -> int:
        """Take what has come, as much as `view` has room for; returns bytes, 0 if nothing came within `limit_s`.

        Raises:
            ChannelError: the connection is lost.
        """
        until = time.monotonic() + limit_s
        while True:
            known = int(self._told[T_PUBLISHED])
            with self._lock:
                self._reap()
                taken = self._take(np.frombuffer(view, np.uint8))
                if _credit_due_now(self.arrays):
                    self._publish()
            left_s = until - time.monotonic()
            if taken or left_s <= 0:
                return taken
            step_s = min(left_s, 0.0002 if self.strict else 0.005)
            _wait_for_word(self._told, T_PUBLISHED, np.uint64(known), self.idle_mode, np.int64(step_s * 1e9))

    def _take(self, target: Any) -> int:
        state, ring = self.arrays.state, self._inbox_bytes
        count = min(int(_available_now(self.arrays)), len(target) // RECORD_BYTES)
        if state[S_FAILED]:
            raise self._failed()
        size = count * RECORD_BYTES
        at = int(state[S_CONSUMED] & (state[S_IN] - np.uint64(1))) * RECORD_BYTES
        first = min(size, len(ring) - at)
        target[:first] = ring[at : at + first]
        target[first:size] = ring[: size - first]
        state[S_CONSUMED] += np.uint64(count)
        return size

    def interrupt(self) -> None:
        """End the connection: both sides are told. From any thread."""
        with self._lock:
            if not self._closed:
                self.queue.fail()

    def close(self) -> None:
        """Free the queue pair and the memory. Nobody may be in it any more. More than once is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.queue.close()
        self._inbox.close()
        if self._outbox is not None:
            self._outbox.close()


class ChannelHeartbeats:
    """Both sides' signs of life: ours are written where nothing else is, the other side's are missed.

    Args:
        channel: connected.
        beat_s: we write something at least this often.
        silent_s: and the other side something in this time.
    """

    def __init__(self, channel: RdmaChannel, beat_s: float, silent_s: float) -> None:
        self._channel, self._beat_s, self._silent_s = channel, beat_s, silent_s
        self._heard, self._written = channel.beats_heard, channel.beats_written
        self._heard_s = self._written_s = time.monotonic()

    def look(self, now_s: float) -> None:
        """Write one if it is due, at `now_s` (monotonic). Call it several times in `beat_s`.

        Raises:
            ChannelSilent: the other side has written nothing for too long.
            ChannelError: the connection is lost.
        """
        channel = self._channel
        if (heard := channel.beats_heard) != self._heard:
            self._heard, self._heard_s = heard, now_s
        if now_s - self._heard_s > self._silent_s:
            raise ChannelSilent(f"the other side is silent for {self._silent_s:g} s", peer=channel.peer)
        if now_s - self._written_s >= self._beat_s and channel.beats_written == self._written:
            channel.beat()
        if (written := channel.beats_written) != self._written:
            self._written, self._written_s = written, now_s


_devices: dict[str | None, Device] = {}
_devices_lock = threading.Lock()


def shared_device(name: str | None = None) -> Device:
    """The device of a name, or the first one, opened once and for as long as this process lives.

    Raises:
        VerbsError: there is none, or it cannot be opened.
    """
    with _devices_lock:
        if name not in _devices:
            _devices[name] = open_device(name)
        return _devices[name]
