"""The shared-memory ring: 64-byte records, one writer, up to 16 readers, each with its own cursor.

A named ring is the file ``/dev/shm/tickmesh-<name>``, which any process of the host can attach to; a ring without a name lives in this
process's memory. Cursors count records since the ring was made and never wrap; record `n` lies in slot ``n & (capacity - 1)``.

* **lossless**: the slowest active reader holds the writer. A reader whose heartbeat is older than ``reader_timeout_ms``, or whose process
  is gone, is released: the writer goes on, the release is counted, and the reader is told when it comes back.
* **lossy**: the writer never waits. A lapped reader is told how many records it missed and goes on with the oldest that is whole.

The writer first raises the *claimed* cursor, then fills the slots, then raises the *published* cursor. A writer that dies in between has
published nothing, and the next writer starts over at the published cursor. A reader that may be lapped copies a batch and then looks at
the claimed cursor: what the writer had claimed by then is thrown away, so a torn record is never handed out. This leans on x86-64, where
loads are performed in order and stores become visible in order.

Reading order: layout, kernels (for compiled loops, they take :class:`RingArrays`), then the Python face :class:`Ring`.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import re
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from tickmesh.transports.toolbox import (
    announce_sleep,
    choose_bell,
    compare_and_swap,
    copy_record,
    fetch_add,
    full_fence,
    idle,
    inlined,
    load_acquire,
    monotonic_ns,
    outlined,
    quick,
    ring_shared_bell,
    sleep_at_bells,
    store_release,
    zeros_aligned,
)

RECORD_BYTES = 64
RECORD = np.dtype([(f"word{i}", "<u8") for i in range(8)])
"""A plain 64-byte record, for rings whose contents are somebody else's business."""
READERS_MAX = 16
SHM_FOLDER = Path("/dev/shm")
_PREFIX = "tickmesh-"

# ---------------------------------------------------------------- layout: u64 words of the header; no two sides share a pair of cache lines

HEADER_BYTES = 8192
MAGIC = int.from_bytes(b"tmring\0\1", "little")
VERSION = 1
W_MAGIC, W_VERSION, W_CAPACITY, W_RECORD_BYTES, W_MODE, W_READER_TIMEOUT_NS, W_CREATED_NS = range(7)
W_PUBLISHED, W_CLAIMED = 16, 32
W_GATE, W_BLOCKED, W_RELEASED, W_JOINS_SEEN = 48, 49, 50, 51
"""Writer's own: the slowest reader it knows of, times it had to wait, readers it released, the joins it knows of."""
W_WRITER_PID, W_WRITER_HEARTBEAT_NS, W_WRITERS, W_READERS_USED, W_JOINS = 64, 65, 66, 80, 81
W_BELL = 96
"""Where sleeping readers wait, see :func:`ring_sleep`."""
_READERS_AT, _READER_WORDS = 128, 32
R_CURSOR, R_STATE, R_HEARTBEAT_NS, R_MISSED, R_RELEASES, R_CHECK_UNTIL, R_POLLS, R_PID, R_NAME = 0, 16, 17, 18, 19, 20, 21, 22, 24
_NAME_BYTES = (_READER_WORDS - R_NAME) * 8
assert (_READERS_AT + READERS_MAX * _READER_WORDS) * 8 <= HEADER_BYTES

LOSSLESS, LOSSY = 0, 1
_FREE, _JOINING, _ACTIVE, _RELEASED = (np.uint64(i) for i in range(4))
_STATE_NAMES = ("free", "joining", "active", "released")
_ZERO, _ONE, _TWO = np.uint64(0), np.uint64(1), np.uint64(2)
_POLLS_PER_HEARTBEAT_MASK = np.uint64(63)
_RECORDS_PER_HEARTBEAT_SHIFT = np.uint64(10)
_CHECKED_READ_ATTEMPTS = 8
_GRACE_NS = 10_000_000
"""A writer waits at least this long itself before it believes an old heartbeat: both may have been suspended together."""
_STOOD_STILL_NS = 100_000_000
"""A waiting writer that has not looked for so long was suspended itself."""


class RingArrays(NamedTuple):
    """What kernels take: the header as u64 words and the slots as records."""

    words: Any
    slots: Any


# ---------------------------------------------------------------- kernels: the writer's side


@inlined
def ring_published(ring: Any) -> Any:
    """Number of records published so far, u64 (acquire)."""
    return load_acquire(ring.words, W_PUBLISHED)


@outlined
def _slowest_reader(words: Any) -> Any:
    """The lowest cursor of an active reader, and not more than the published cursor."""
    slowest = words[W_PUBLISHED]
    for reader in range(np.int64(load_acquire(words, W_READERS_USED))):
        base = _READERS_AT + reader * _READER_WORDS
        if load_acquire(words, base + R_STATE) == _ACTIVE:
            cursor = load_acquire(words, base + R_CURSOR)
            if cursor < slowest:
                slowest = cursor
    words[W_GATE] = slowest
    return slowest


@inlined
def ring_free(ring: Any, wanted: Any) -> Any:
    """How many records (i64) may be written now without waiting; looks at the readers only if it knows of fewer than `wanted`.

    A lossy ring offers a quarter of its capacity at a time, so that its readers always find most of it whole.
    """
    words = ring.words
    capacity = words[W_CAPACITY]
    if words[W_MODE] != _ZERO:
        return np.int64(capacity >> _TWO)
    held = words[W_PUBLISHED] - words[W_GATE]
    joins = load_acquire(words, W_JOINS)
    if held + np.uint64(wanted) > capacity or joins != words[W_JOINS_SEEN]:  # a reader may have joined behind the gate
        words[W_JOINS_SEEN] = joins
        held = words[W_PUBLISHED] - _slowest_reader(words)
    return np.int64(capacity) - np.int64(held) if held < capacity else np.int64(0)


@inlined
def ring_claim(ring: Any, count: Any) -> Any:
    """Announce that the next `count` slots are about to be written. At most :func:`ring_free`; before the first store into them."""
    words = ring.words
    end = words[W_PUBLISHED] + np.uint64(count)
    if end > words[W_CLAIMED]:  # a dead predecessor may have claimed further: never go back
        store_release(words, W_CLAIMED, end)


@inlined
def ring_slot(ring: Any, offset: Any) -> Any:
    """Index into ``ring.slots`` of the `offset`-th claimed, not yet published record (u64)."""
    return (ring.words[W_PUBLISHED] + np.uint64(offset)) & (ring.words[W_CAPACITY] - _ONE)


@inlined
def ring_publish(ring: Any, count: Any) -> Any:
    """Make the next `count` claimed and filled records visible to all readers."""
    words = ring.words
    before = words[W_PUBLISHED]
    after = before + np.uint64(count)
    store_release(words, W_PUBLISHED, after)
    ring_shared_bell(words, W_BELL)
    if (before ^ after) >> _RECORDS_PER_HEARTBEAT_SHIFT != _ZERO:
        words[W_WRITER_HEARTBEAT_NS] = np.uint64(monotonic_ns())


@inlined
def ring_writer_heartbeat(ring: Any) -> Any:
    """Show that the writer is alive; for a loop that has nothing to write (writing shows it every 1,024 records)."""
    ring.words[W_WRITER_HEARTBEAT_NS] = np.uint64(monotonic_ns())


@outlined
def ring_release_stale(ring: Any, now_ns: Any) -> Any:
    """Release every active reader that is full behind and whose heartbeat is older than the ring's timeout; returns how many."""
    words = ring.words
    timeout = np.int64(words[W_READER_TIMEOUT_NS])
    released = 0
    for reader in range(np.int64(load_acquire(words, W_READERS_USED))):
        base = _READERS_AT + reader * _READER_WORDS
        if load_acquire(words, base + R_STATE) != _ACTIVE:
            continue
        behind = words[W_PUBLISHED] - load_acquire(words, base + R_CURSOR)
        age = now_ns - np.int64(load_acquire(words, base + R_HEARTBEAT_NS))
        if behind >= words[W_CAPACITY] and age > timeout and compare_and_swap(words, base + R_STATE, _ACTIVE, _RELEASED):
            words[W_RELEASED] += _ONE
            released += 1
    return released


@outlined
def ring_wait(ring: Any, stop: Any, idle_mode: Any) -> Any:
    """Wait until at least one record may be written, releasing dead readers meanwhile; returns how many, or 0 once ``stop[0]`` is set."""
    words = ring.words
    free = ring_free(ring, 1)
    if free > 0:
        return free
    words[W_BLOCKED] += _ONE
    grace = min(np.int64(_GRACE_NS), np.int64(words[W_READER_TIMEOUT_NS]))
    since = monotonic_ns()
    looked = since
    rounds = 0
    while True:
        free = ring_free(ring, 1)
        if free > 0 or load_acquire(stop, 0) != 0:
            return free
        if rounds & 15 == 15:
            now = monotonic_ns()
            if now - looked > _STOOD_STILL_NS:  # we stood still, and perhaps the readers too: they get their time
                since = now
            looked = now
            words[W_WRITER_HEARTBEAT_NS] = np.uint64(now)
            if now - since > grace:
                ring_release_stale(ring, now)
        rounds = idle(idle_mode, rounds)


@outlined
def ring_write_some(ring: Any, batch: Any, first: Any, count: Any) -> Any:
    """Copy up to `count` records of `batch`, from index `first`, into the ring and publish them, without waiting; returns how many."""
    free = ring_free(ring, count)
    taken = min(np.int64(count), free)
    if taken <= 0:
        return np.int64(0)
    ring_claim(ring, taken)
    words, slots = ring.words, ring.slots
    mask = words[W_CAPACITY] - _ONE
    position = words[W_PUBLISHED]
    for i in range(taken):
        copy_record(slots, (position + np.uint64(i)) & mask, batch, first + i)
    ring_publish(ring, taken)
    return taken


@inlined
def ring_write_batch(ring: Any, batch: Any, count: Any, stop: Any, idle_mode: Any) -> Any:
    """Copy ``batch[:count]`` into the ring and publish it, waiting for slow readers of a lossless ring.

    `stop` is an integer array whose element 0 ends the wait; `idle_mode` one of ``toolbox.IDLE_*``. Returns the number written (i64),
    less than `count` only after a stop.
    """
    written = ring_write_some(ring, batch, np.int64(0), np.int64(count))
    while written < count:
        if ring_wait(ring, stop, idle_mode) == 0:
            break
        written += ring_write_some(ring, batch, written, np.int64(count) - written)
    return written


# ---------------------------------------------------------------- kernels: a reader's side


@inlined
def _reader_base(reader: Any) -> Any:
    return _READERS_AT + np.int64(reader) * _READER_WORDS


@inlined
def _show_life(words: Any, base: Any, available: Any) -> Any:
    """Count a poll. The clock costs as much as copying ten records: read once per 64 polls, and always when half a ring behind."""
    polls = words[base + R_POLLS] + _ONE
    store_release(words, base + R_POLLS, polls)
    if polls & _POLLS_PER_HEARTBEAT_MASK == _ZERO or np.uint64(available) > words[W_CAPACITY] >> _ONE:
        words[base + R_HEARTBEAT_NS] = np.uint64(monotonic_ns())


@inlined
def ring_available(ring: Any, reader: Any) -> Any:
    """How many published records this reader has not consumed yet (i64)."""
    return np.int64(load_acquire(ring.words, W_PUBLISHED) - ring.words[_reader_base(reader) + R_CURSOR])


@outlined
def ring_sleep(rings: Any, readers: Any, sleepers: Any, limit_ns: Any) -> Any:
    """Sleep until one of the rings (a tuple, as many as there are `readers`) has something to read, or for `limit_ns`; may wake early.

    `sleepers` is of :func:`tickmesh.transports.toolbox.make_sleepers`. Writers do not wait to see who sleeps: in one case of very many
    nobody wakes us, and we sleep until the limit.
    """
    for s in range(readers.size):
        announce_sleep(rings[s].words, W_BELL)
        choose_bell(sleepers, s, rings[s].words, W_BELL)
    for s in range(readers.size):
        if ring_available(rings[s], readers[s]) > 0:
            return
    sleep_at_bells(sleepers, readers.size, limit_ns)


@inlined
def ring_reader_heartbeat(ring: Any, reader: Any) -> Any:
    """Show that the reader is alive; for a loop that does long work between two reads."""
    ring.words[_reader_base(reader) + R_HEARTBEAT_NS] = np.uint64(monotonic_ns())


@inlined
def ring_read_slot(ring: Any, reader: Any, offset: Any) -> Any:
    """Index into ``ring.slots`` of the `offset`-th available record (u64), to read in place: lossless rings only."""
    return (ring.words[_reader_base(reader) + R_CURSOR] + np.uint64(offset)) & (ring.words[W_CAPACITY] - _ONE)


@inlined
def ring_release(ring: Any, reader: Any, count: Any) -> Any:
    """Give `count` records read in place back to the writer. False: this reader was released meanwhile, what it read may be torn."""
    words = ring.words
    base = _reader_base(reader)
    _show_life(words, base, ring_available(ring, reader))
    if load_acquire(words, base + R_STATE) != _ACTIVE:
        return False
    store_release(words, base + R_CURSOR, words[base + R_CURSOR] + np.uint64(count))
    return True


@outlined
def _rejoin(ring: Any, base: Any) -> Any:
    """Make a reader active. Records below R_CHECK_UNTIL may be overwritten until the writer has seen it, so they are read with a check."""
    words = ring.words
    words[base + R_HEARTBEAT_NS] = np.uint64(monotonic_ns())
    store_release(words, base + R_STATE, _ACTIVE)
    full_fence()
    fetch_add(words, W_JOINS, _ONE)
    words[base + R_CHECK_UNTIL] = load_acquire(words, W_PUBLISHED)


@outlined
def _read_checked(ring: Any, base: Any, out: Any, maximum: Any) -> Any:
    """Read where the writer may lap us: copy, then drop what it had claimed by then."""
    words, slots = ring.words, ring.slots
    capacity = words[W_CAPACITY]
    for _ in range(_CHECKED_READ_ATTEMPTS):
        cursor = words[base + R_CURSOR]
        count = min(np.int64(load_acquire(words, W_PUBLISHED) - cursor), np.int64(maximum))
        claimed = load_acquire(words, W_CLAIMED)
        if claimed <= cursor + capacity:  # else lapped already: copying would be wasted
            for i in range(count):
                copy_record(out, i, slots, (cursor + np.uint64(i)) & (capacity - _ONE))
            _show_life(words, base, count)  # its store keeps the copy before the second look
            claimed = load_acquire(words, W_CLAIMED)
        else:
            count = np.int64(0)
        lost = np.int64(claimed - cursor - capacity) if claimed > cursor + capacity else np.int64(0)
        whole = max(np.int64(0), count - lost)
        if lost > 0:
            words[base + R_MISSED] += np.uint64(lost)
            for i in range(whole):
                copy_record(out, i, out, lost + i)
        store_release(words, base + R_CURSOR, cursor + np.uint64(max(lost, count)))
        if whole > 0 or lost == 0:
            return whole
    return np.int64(0)


@outlined
def _read_after_doubt(ring: Any, base: Any, out: Any, maximum: Any) -> Any:
    """The reader of a lossy ring, or one that was released or has just joined."""
    words = ring.words
    if load_acquire(words, base + R_STATE) != _ACTIVE:
        words[base + R_RELEASES] += _ONE
        _rejoin(ring, base)
    return _read_checked(ring, base, out, maximum)


@outlined
def _read_copy(ring: Any, base: Any, out: Any, maximum: Any, available: Any) -> Any:
    """Read where the writer waits for us; an own state that is no longer active after the copy means that it stopped waiting."""
    words, slots = ring.words, ring.slots
    mask = words[W_CAPACITY] - _ONE
    cursor = words[base + R_CURSOR]
    count = min(np.int64(available), np.int64(maximum))
    for i in range(count):
        copy_record(out, i, slots, (cursor + np.uint64(i)) & mask)
    _show_life(words, base, available)  # its store keeps the copy before the look at the state
    if load_acquire(words, base + R_STATE) != _ACTIVE:
        return _read_after_doubt(ring, base, out, maximum)
    store_release(words, base + R_CURSOR, cursor + np.uint64(count))
    return count


@inlined
def ring_read_batch(ring: Any, reader: Any, out: Any, maximum: Any) -> Any:
    """Copy up to `maximum` unread records to ``out[0:]`` and consume them; returns how many (i64), 0 if there is nothing new.

    Never waits. Records missed (lapped, or released and lapped) are counted in the reader's slot, see :func:`ring_missed`.
    """
    words = ring.words
    base = _reader_base(reader)
    cursor = words[base + R_CURSOR]
    available = np.int64(load_acquire(words, W_PUBLISHED) - cursor)
    if available == 0:
        _show_life(words, base, available)
        return np.int64(0)
    if words[W_MODE] != _ZERO or cursor < words[base + R_CHECK_UNTIL] or load_acquire(words, base + R_STATE) != _ACTIVE:
        return _read_after_doubt(ring, base, out, maximum)
    return _read_copy(ring, base, out, maximum, available)


@inlined
def ring_missed(ring: Any, reader: Any) -> Any:
    """Records (u64) that were overwritten before this reader came to them."""
    return ring.words[_reader_base(reader) + R_MISSED]


# ---------------------------------------------------------------- compiled entry points of the Python face


@quick
def _write_now(ring: Any, batch: Any, first: Any, count: Any) -> Any:
    return ring_write_some(ring, batch, first, count)


@quick
def _read_now(ring: Any, reader: Any, out: Any, maximum: Any) -> Any:
    ring_reader_heartbeat(ring, reader)
    return ring_read_batch(ring, reader, out, maximum)


@quick
def _release_stale_now(ring: Any) -> Any:
    return ring_release_stale(ring, monotonic_ns())


@quick
def _take_slot(ring: Any, reader: Any, state: Any) -> Any:
    return compare_and_swap(ring.words, _reader_base(reader) + R_STATE, np.uint64(state), _JOINING)


@quick
def _release_one(ring: Any, reader: Any) -> Any:
    return compare_and_swap(ring.words, _reader_base(reader) + R_STATE, _ACTIVE, _RELEASED)


@quick
def _join(ring: Any, reader: Any, from_oldest: Any) -> Any:
    """Activate a slot whose words are set; start at the published cursor, or at the oldest record that is whole."""
    words = ring.words
    base = _reader_base(reader)
    words[base + R_CURSOR] = load_acquire(words, W_PUBLISHED)
    _rejoin(ring, base)
    start = words[base + R_CHECK_UNTIL]
    if from_oldest:
        claimed, capacity = load_acquire(words, W_CLAIMED), words[W_CAPACITY]
        start = claimed - capacity if claimed > capacity else _ZERO
    store_release(words, base + R_CURSOR, start)
    fetch_add(words, W_JOINS, _ONE)  # once more: the writer may have looked before the cursor was there


# ---------------------------------------------------------------- errors


class RingError(Exception):
    """Something about a ring; `name` says which (None: a ring of this process)."""

    def __init__(self, name: str | None, message: str) -> None:
        super().__init__(f"ring {name or '(anonymous)'}: {message}")
        self.name = name


class RingExists(RingError):
    """A ring of this name is there already."""


class RingNotFound(RingError):
    """There is no ring of this name."""


class RingLayoutMismatch(RingError):
    """The ring was made with another layout; `field`, `expected`, `found` say where they differ."""

    def __init__(self, name: str | None, field: str, expected: object, found: object) -> None:
        super().__init__(name, f"{field} is {found}, expected {expected}; remove the ring or use what made it")
        self.field, self.expected, self.found = field, expected, found


class RingNoSpace(RingError):
    """The memory for the ring cannot be reserved; `needed_bytes`."""

    def __init__(self, name: str | None, needed_bytes: int, reason: str) -> None:
        super().__init__(name, f"cannot reserve {needed_bytes} bytes ({reason}); enlarge {SHM_FOLDER} or lower the capacity")
        self.needed_bytes = needed_bytes


class WriterExists(RingError):
    """Another live writer holds the ring; `pid`."""

    def __init__(self, name: str | None, pid: int) -> None:
        super().__init__(name, f"has a live writer already (pid {pid}); a ring has one")
        self.pid = pid


class TooManyReaders(RingError):
    """All reader slots are taken by live readers."""

    def __init__(self, name: str | None) -> None:
        super().__init__(name, f"all {READERS_MAX} reader slots are taken; close a reader")


class ReaderReleased(RingError):
    """This reader of a lossless ring was too slow or silent and the writer went on without it. The next read continues.

    Attributes:
        reader: its name.
        missed: records lost so far.
    """

    def __init__(self, name: str | None, reader: str, missed: int) -> None:
        super().__init__(name, f"reader {reader!r} was silent longer than the timeout and was released; {missed} records missed so far")
        self.reader, self.missed = reader, missed


# ---------------------------------------------------------------- the Python face

Mode = Literal["lossless", "lossy"]
_MODES: dict[Mode, int] = {"lossless": LOSSLESS, "lossy": LOSSY}
Records = npt.NDArray[np.void]
_WRITER_LOCK = READERS_MAX
"""Byte of the file that a live writer keeps locked; a reader locks the byte of its slot. The kernel unlocks them when a process dies."""


def ring_path(name: str) -> Path:
    """The file of the ring `name`.

    Raises:
        ValueError: the name has other characters than letters, digits, ``.``, ``_`` and ``-``.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,200}", name):
        raise ValueError(f"ring name {name!r}: use letters, digits, '.', '_' and '-'")
    return SHM_FOLDER / (_PREFIX + name)


def _flock(kind: int, byte: int) -> bytes:
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)


def _lock(fd: int, byte: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, byte))
    except OSError:
        return False
    return True


def _unlock(fd: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, byte))


def _locked_by_other(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    return int(struct.unpack("hhqqi4x", answer)[0]) != fcntl.F_UNLCK


def _map(fd: int, size: int, writable: bool = True) -> mmap.mmap:
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    flags = mmap.MAP_SHARED | (mmap.MAP_ANONYMOUS if fd < 0 else 0) | (mmap.MAP_POPULATE if writable else 0)
    return mmap.mmap(fd, size, flags=flags, prot=access)


def _check_layout(name: str, words: npt.NDArray[np.uint64], size: int) -> None:
    fixed = {"magic": (W_MAGIC, MAGIC), "version": (W_VERSION, VERSION), "record size": (W_RECORD_BYTES, RECORD_BYTES)}
    for field, (index, expected) in fixed.items():
        if int(words[index]) != expected:
            raise RingLayoutMismatch(name, field, expected, int(words[index]))
    expected_size = HEADER_BYTES + int(words[W_CAPACITY]) * RECORD_BYTES
    if size != expected_size:
        raise RingLayoutMismatch(name, "file size", expected_size, size)


def _write_header(words: npt.NDArray[np.uint64], capacity: int, mode: Mode, reader_timeout_ms: int) -> None:
    words[W_VERSION], words[W_CAPACITY], words[W_RECORD_BYTES] = VERSION, capacity, RECORD_BYTES
    words[W_MODE], words[W_READER_TIMEOUT_NS] = _MODES[mode], reader_timeout_ms * 1_000_000
    words[W_CREATED_NS], words[W_MAGIC] = time.time_ns(), MAGIC


def _new_file(name: str, size: int, permissions: int) -> tuple[int, Path]:
    """A file of reserved memory under a temporary name; it gets its own name when its header is complete."""
    path = ring_path(name)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, permissions)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        os.close(fd)
        temporary.unlink()
        raise RingNoSpace(name, size, error.strerror or "") from error
    return fd, temporary


class Ring:
    """A ring in memory. Make one with :meth:`create` or :meth:`attach`; then take its :attr:`writer` or a :meth:`reader`.

    `arrays` is what compiled kernels take, with slots of the ring's dtype. The memory lives as long as an array of it does.
    """

    def __init__(self, name: str | None, fd: int, memory: mmap.mmap, dtype: np.dtype[Any]) -> None:
        if dtype.itemsize != RECORD_BYTES:
            raise ValueError(f"a ring holds {RECORD_BYTES}-byte records, not {dtype.itemsize}")
        self.name, self._fd = name, fd
        words = np.frombuffer(memory, np.uint64, HEADER_BYTES // 8)
        self.arrays = RingArrays(words, np.frombuffer(memory, dtype, offset=HEADER_BYTES))
        self._plain = RingArrays(words, np.frombuffer(memory, RECORD, offset=HEADER_BYTES))
        self._writer: Writer | None = None
        self._readers: dict[int, Reader] = {}

    # -- making and finding

    @classmethod
    def create(
        cls,
        name: str | None,
        capacity: int,
        dtype: np.dtype[Any] = RECORD,
        *,
        mode: Mode = "lossless",
        reader_timeout_ms: int = 5_000,
        permissions: int = 0o600,
        reuse: bool = False,
    ) -> Ring:
        """Make a ring of `capacity` records (a power of two, at least 8); ``name=None`` makes it in this process's memory.

        Args:
            reader_timeout_ms: how long a silent reader may hold the writer of a lossless ring.
            reuse: continue with a ring of this name if it exists with the same capacity and mode (after a crash, say).

        Raises:
            RingExists: and `reuse` is false.
            RingLayoutMismatch: it exists, with another layout.
            RingNoSpace: the memory cannot be reserved.
        """
        if capacity < 8 or capacity & (capacity - 1):
            raise ValueError(f"ring capacity {capacity}: use a power of two, at least 8")
        size = HEADER_BYTES + capacity * RECORD_BYTES
        if name is None:
            ring = cls(None, -1, _map(-1, size), dtype)
            _write_header(ring.arrays.words, capacity, mode, reader_timeout_ms)
            return ring
        if reuse and ring_path(name).exists():
            return cls.attach(name, dtype, expect_capacity=capacity, expect_mode=mode)
        fd, temporary = _new_file(name, size, permissions)
        try:
            ring = cls(name, fd, _map(fd, size), dtype)
            _write_header(ring.arrays.words, capacity, mode, reader_timeout_ms)
            os.link(temporary, ring_path(name))
        except FileExistsError:
            os.close(fd)
            raise RingExists(name, "exists already; attach to it, or unlink it first") from None
        finally:
            temporary.unlink()
        return ring

    @classmethod
    def attach(
        cls, name: str, dtype: np.dtype[Any] = RECORD, *, expect_capacity: int | None = None, expect_mode: Mode | None = None
    ) -> Ring:
        """Attach to the ring `name` of this host.

        Raises:
            RingNotFound: there is none.
            RingLayoutMismatch: it is no ring of this version, or not as expected.
        """
        try:
            fd = os.open(ring_path(name), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise RingNotFound(name, f"there is no {ring_path(name)}; is its writer running?") from None
        try:
            size = os.fstat(fd).st_size
            if size < HEADER_BYTES or (size - HEADER_BYTES) % RECORD_BYTES:
                raise RingLayoutMismatch(name, "file size", f"{HEADER_BYTES} + capacity * {RECORD_BYTES}", size)
            ring = cls(name, fd, _map(fd, size), dtype)
            _check_layout(name, ring.arrays.words, size)
            if expect_capacity is not None and ring.capacity != expect_capacity:
                raise RingLayoutMismatch(name, "capacity", expect_capacity, ring.capacity)
            if expect_mode is not None and ring.mode != expect_mode:
                raise RingLayoutMismatch(name, "mode", expect_mode, ring.mode)
        except BaseException:
            os.close(fd)
            raise
        return ring

    def close(self) -> None:
        """Give up the writer and all readers taken here. Arrays of the ring stay usable; the memory goes with the last of them."""
        for reader in list(self._readers.values()):
            reader.close()
        if self._writer:
            self._writer.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def unlink(self) -> None:
        """Remove the ring's name; who is attached keeps the memory. Not an error if it is gone already."""
        if self.name is not None:
            ring_path(self.name).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # -- what it is

    @property
    def capacity(self) -> int:
        """Records it holds."""
        return int(self.arrays.words[W_CAPACITY])

    @property
    def mode(self) -> Mode:
        """``lossless`` or ``lossy``."""
        return "lossy" if int(self.arrays.words[W_MODE]) else "lossless"

    @property
    def published(self) -> int:
        """Records published since the ring was made."""
        return int(self.arrays.words[W_PUBLISHED])

    @property
    def lag(self) -> int:
        """Published records that the slowest active reader has not read; 0 without a reader."""
        words, published = self.arrays.words, self.published
        bases = (_READERS_AT + slot * _READER_WORDS for slot in range(int(words[W_READERS_USED])))
        return max((published - int(words[base + R_CURSOR]) for base in bases if words[base + R_STATE] == _ACTIVE), default=0)

    def peek(self, first: int, count: int) -> bytes | None:
        """The bytes of `count` records from position `first` on; None: they are not all there, not published yet or overwritten.

        What was never written, in a ring that has been made to begin later, is there all the same: whoever asks has to know the records.
        """
        if not max(0, self.published - self.capacity) <= first <= first + count <= self.published:
            return None
        records = self._plain.slots[np.arange(first, first + count) & (self.capacity - 1)].tobytes()
        return records if first >= int(self.arrays.words[W_CLAIMED]) - self.capacity else None  # else some went meanwhile

    # -- taking part

    @property
    def writer(self) -> Writer:
        """The ring's one writer, taken by this process on first use.

        Raises:
            WriterExists: another live writer holds it.
        """
        if self._writer is None:
            self._writer = Writer(self)
        return self._writer

    def reader(self, name: str = "", *, start: Literal["newest", "oldest"] = "newest") -> Reader:
        """Register a reader, from the next record on or from the oldest one still in the ring.

        Raises:
            TooManyReaders: 16 live readers are registered.
        """
        self.release_dead_readers()
        words = self.arrays.words
        for slot in range(READERS_MAX):
            base = _READERS_AT + slot * _READER_WORDS
            state = int(words[base + R_STATE])
            if slot in self._readers or state not in (_FREE, _RELEASED, _JOINING):
                continue
            if self._fd >= 0:
                if not _lock(self._fd, slot):
                    continue
            elif state != _FREE:
                continue
            if not _take_slot(self._plain, slot, state):
                continue
            return self._start_reader(slot, name, start == "oldest")
        raise TooManyReaders(self.name)

    def _start_reader(self, slot: int, name: str, from_oldest: bool) -> Reader:
        words = self.arrays.words
        base = _READERS_AT + slot * _READER_WORDS
        encoded = name.encode()[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0")
        words[base + R_NAME : base + _READER_WORDS] = np.frombuffer(encoded, np.uint64)
        words[base + R_MISSED] = words[base + R_RELEASES] = words[base + R_POLLS] = 0
        words[base + R_PID] = os.getpid()
        words[W_READERS_USED] = max(int(words[W_READERS_USED]), slot + 1)
        _join(self._plain, slot, from_oldest)
        reader = self._readers[slot] = Reader(self, slot, name)
        return reader

    def release_dead_readers(self) -> int:
        """Release active readers whose process is gone; returns how many.

        A compiled writer goes by heartbeats alone: whoever runs it calls this now and then beside it.
        """
        words = self.arrays.words
        released = 0
        if self._fd < 0:
            return 0
        for slot in range(int(words[W_READERS_USED])):
            base = _READERS_AT + slot * _READER_WORDS
            if int(words[base + R_STATE]) != _ACTIVE or slot in self._readers or _locked_by_other(self._fd, slot):
                continue
            if _release_one(self._plain, slot):
                words[W_RELEASED] += _ONE
                released += 1
        return released


class Writer:
    """The writing end of a ring, for Python; compiled loops use the kernels on ``ring.arrays`` while this object holds the ring."""

    def __init__(self, ring: Ring) -> None:
        words = ring.arrays.words
        if ring._fd >= 0 and not _lock(ring._fd, _WRITER_LOCK):
            raise WriterExists(ring.name, int(words[W_WRITER_PID]))
        self._ring = ring
        words[W_GATE] = max(0, int(words[W_PUBLISHED]) - ring.capacity)  # makes the first write look at the readers
        words[W_WRITER_PID], words[W_WRITER_HEARTBEAT_NS] = os.getpid(), time.monotonic_ns()
        words[W_WRITERS] += _ONE

    def write(self, records: Records, timeout_ms: float | None = None) -> int:
        """Write records (any 64-byte dtype, contiguous), waiting for slow readers of a lossless ring; returns how many were written.

        Fewer than given only if `timeout_ms` ran out. What is written is visible at once.
        """
        ring, batch = self._ring, np.ascontiguousarray(records).view(RECORD)
        words = ring.arrays.words
        deadline = None if timeout_ms is None else time.monotonic() + timeout_ms / 1000
        written, waits = 0, 0
        while (written := written + int(_write_now(ring._plain, batch, written, len(batch) - written))) < len(batch):
            if ring.mode == "lossy":
                continue
            if waits == 0:
                words[W_BLOCKED] += _ONE
            waits += 1
            words[W_WRITER_HEARTBEAT_NS] = time.monotonic_ns()
            if not ring.release_dead_readers() and waits * 1_000_000 > min(_GRACE_NS, int(words[W_READER_TIMEOUT_NS])):
                _release_stale_now(ring._plain)
            if deadline is not None and time.monotonic() >= deadline:
                break
            time.sleep(min(0.001, 0.00002 * waits))
        return written

    @property
    def blocked(self) -> int:
        """Times the writer had to wait for a reader."""
        return int(self._ring.arrays.words[W_BLOCKED])

    @property
    def released(self) -> int:
        """Readers released because they were silent or gone."""
        return int(self._ring.arrays.words[W_RELEASED])

    def close(self) -> None:
        """Give the ring up, so that another writer can take it."""
        ring = self._ring
        if ring._writer is self and ring._fd >= 0:
            _unlock(ring._fd, _WRITER_LOCK)
        ring._writer = None


class Reader:
    """A registered reader. `slot` is what the kernels take."""

    def __init__(self, ring: Ring, slot: int, name: str) -> None:
        self.ring, self.slot, self.name = ring, slot, name
        self._base = _READERS_AT + slot * _READER_WORDS
        self._releases = 0
        self._out = np.zeros(0, RECORD)

    def _word(self, index: int) -> int:
        return int(self.ring.arrays.words[self._base + index])

    def read(self, maximum: int = 4096) -> Records:
        """Up to `maximum` unread records as a new array of the ring's dtype (empty if there are none). Never waits.

        Raises:
            ReaderReleased: once, after the writer of a lossless ring went on without this reader; the next call returns what was read.
        """
        if len(self._out) == 0:
            out = zeros_aligned(maximum, RECORD)
            count = int(_read_now(self.ring._plain, self.slot, out, maximum))
            self._out = out[:count]
        if self._word(R_RELEASES) != self._releases:
            self._releases = self._word(R_RELEASES)
            raise ReaderReleased(self.ring.name, self.name, self.missed)
        out, self._out = self._out[:maximum], self._out[maximum:]
        return out.view(self.ring.arrays.slots.dtype)

    @property
    def missed(self) -> int:
        """Records that were overwritten before this reader came to them."""
        return self._word(R_MISSED)

    @property
    def position(self) -> int:
        """Records of the ring that lie behind this reader."""
        return self._word(R_CURSOR)

    @property
    def lag(self) -> int:
        """Published records not read yet."""
        return self.ring.published - self._word(R_CURSOR)

    def skip_to(self, position: int) -> None:
        """Leave out records before `position`, as far as they are published; before the first :meth:`read`."""
        end = min(position, self.ring.published)
        if end > self.position:
            self.ring.arrays.words[self._base + R_CURSOR] = end

    def go_back_to(self, position: int) -> None:
        """Read again from `position` on, which another reader must have held (:meth:`hold_from`)."""
        self._out = self._out[:0]
        self.ring.arrays.words[self._base + R_CURSOR] = min(position, self.position)

    def hold_from(self, position: int) -> bool:
        """For a reader that reads nothing: keep what is from `position` on from being overwritten, and let go of what is before.

        Shows that the reader is alive. False: the writer had gone on without it (a lossless ring whose reader was taken for dead), so that
        some of it may be gone; it holds what is left.
        """
        words = self.ring.arrays.words
        held = self._word(R_STATE) == _ACTIVE
        if not held:
            _join(self.ring._plain, self.slot, True)
        self.skip_to(position)
        words[self._base + R_HEARTBEAT_NS] = time.monotonic_ns()
        return held

    def close(self) -> None:
        """Free the slot. Closing twice is fine, also when another reader has the slot by then."""
        ring = self.ring
        if ring._readers.get(self.slot) is self:
            del ring._readers[self.slot]
            ring.arrays.words[self._base + R_STATE] = _FREE
            if ring._fd >= 0:
                _unlock(ring._fd, self.slot)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def show_alive(reader: Reader) -> None:
    """Keep a lossless ring's writer waiting for a reader that reads nothing now."""
    reader.ring.arrays.words[reader._base + R_HEARTBEAT_NS] = time.monotonic_ns()


# ---------------------------------------------------------------- looking from outside


@dataclass(frozen=True)
class ReaderStat:
    """One reader as seen from outside. `lag` and `missed` in records."""

    slot: int
    name: str
    pid: int
    state: str
    alive: bool
    cursor: int
    lag: int
    missed: int
    releases: int
    heartbeat_age_ms: float


@dataclass(frozen=True)
class RingStat:
    """A live ring as seen from outside. `rate_per_s` is None unless a sampling time was given."""

    name: str
    capacity: int
    mode: Mode
    published: int
    rate_per_s: float | None
    writer_pid: int
    writer_alive: bool
    writers: int
    blocked: int
    released: int
    readers: list[ReaderStat]


def ring_stat(name: str, sample_ms: float = 0) -> RingStat:
    """Read a live ring from outside, without registering and without a cost to it.

    Args:
        sample_ms: measure the rate over this time.

    Raises:
        RingNotFound: there is none.
        RingLayoutMismatch: the file is no ring of this version.
    """
    try:
        fd = os.open(ring_path(name), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise RingNotFound(name, f"there is no {ring_path(name)}; is its writer running?") from None
    try:
        size = os.fstat(fd).st_size
        if size < HEADER_BYTES:
            raise RingLayoutMismatch(name, "file size", f"at least {HEADER_BYTES}", size)
        words = np.frombuffer(_map(fd, HEADER_BYTES, writable=False), np.uint64)
        _check_layout(name, words, size)
        before, begun = int(words[W_PUBLISHED]), time.monotonic()
        if sample_ms:
            time.sleep(sample_ms / 1000)
        published, elapsed = int(words[W_PUBLISHED]), time.monotonic() - begun
        return RingStat(
            name=name,
            capacity=int(words[W_CAPACITY]),
            mode="lossy" if int(words[W_MODE]) else "lossless",
            published=published,
            rate_per_s=(published - before) / elapsed if sample_ms else None,
            writer_pid=int(words[W_WRITER_PID]),
            writer_alive=_locked_by_other(fd, _WRITER_LOCK),
            writers=int(words[W_WRITERS]),
            blocked=int(words[W_BLOCKED]),
            released=int(words[W_RELEASED]),
            readers=_reader_stats(words, fd, published),
        )
    finally:
        os.close(fd)


def _reader_stats(words: npt.NDArray[np.uint64], fd: int, published: int) -> list[ReaderStat]:
    found = []
    now_ns = time.monotonic_ns()
    for slot in range(int(words[W_READERS_USED])):
        line = words[_READERS_AT + slot * _READER_WORDS :][:_READER_WORDS].copy()
        state = int(line[R_STATE])
        if state == _FREE:
            continue
        cursor = int(line[R_CURSOR])
        found.append(
            ReaderStat(
                slot=slot,
                name=line[R_NAME:].tobytes().rstrip(b"\0").decode(errors="replace"),
                pid=int(line[R_PID]),
                state=_STATE_NAMES[state],
                alive=_locked_by_other(fd, slot),
                cursor=cursor,
                lag=max(0, published - cursor),
                missed=int(line[R_MISSED]),
                releases=int(line[R_RELEASES]),
                heartbeat_age_ms=max(0, now_ns - int(line[R_HEARTBEAT_NS])) / 1e6,
            )
        )
    return found


def list_rings() -> list[str]:
    """Names of the rings of this host, sorted."""
    found = []
    for path in SHM_FOLDER.glob(_PREFIX + "*"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            if file.read(8) == MAGIC.to_bytes(8, "little"):
                found.append(path.name.removeprefix(_PREFIX))
    return sorted(found)
