"""The journal: a shard's input log, in memory-mapped segment files, one chained checksum per event.

A journal is a folder with segments ``0000000000.journal``, ``0000000001.journal``, … of one size: a 4,096-byte header, then one u64
checksum per record, then the 64-byte events. Record `i` of segment `s` has the sequence ``first_sequence + s * segment_records + i``.

The checksum of a record mixes the checksum before it with the eight words of the event (:func:`mix_event`), across segments too, so that a
record that is altered, removed, inserted or moved is found, by file and record. It guards against accidents and careless edits, not against
somebody who recomputes it.

The compiled loop appends with :func:`journal_append_batch`: an event is copied, then its checksum is stored. It never faults a page and
never waits for a disk: a helper thread reserves, maps and touches segments ahead, at fixed addresses that make one big ring of slots; the
loop waits (counted) only when the helper fell behind. If the disk is full the helper says so in a state word, append returns short, and the
loop can stop accepting input; when there is room again, appending goes on.

After a crash the first record whose checksum does not hold ends the journal (a torn tail), and is cut. If whole records follow it, somebody
altered the journal: that is an error (:class:`JournalCorrupt`), not a tail, except where pages that were never synced were lost by power.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import mmap
import os
import secrets
import struct
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from tickmesh.node.event import EVENT, EventArray
from tickmesh.transports.toolbox import (
    copy_record,
    idle,
    inlined,
    load_acquire,
    loop,
    outlined,
    quick,
    ring_bell,
    store_release,
    zeros_aligned,
)

_log = logging.getLogger(__name__)

HEADER_BYTES = 4096
MAGIC = b"tmjournl"
VERSION = 1
SEGMENT_RECORDS = 1 << 18
_SUFFIX = ".journal"
_EVENT_BYTES, _CHECKSUM_BYTES = 64, 8
_IDENTITY = struct.Struct("<8sIIQQQQQQQ")
"""magic, version, shard, segment_records, index, first_sequence of the journal, config version, created ns, journal id, chain seed."""
_IDENTITY_BYTES = _IDENTITY.size + 4
_PROGRESS_AT = 256
_PROGRESS = struct.Struct("<QQQ")
"""last checksum of the segment before (0: not known yet), records known to be on disk, and the complement of that."""

Words = npt.NDArray[np.uint64]
Sync = Literal["none", "segment", "interval"]

# ---------------------------------------------------------------- kernels

W_NEXT, W_CHAIN, W_WAITS = 0, 1, 2
"""Written by the loop: records appended since segment 0, the last checksum, times it had to wait for the helper."""
W_BELL = 8
"""Rung when events have been appended; on a cache line of its own."""
W_LIMIT, W_STATE, W_SYNCED = 16, 17, 18
"""Written by the helper: records that there is room for, 0 or the errno that keeps it from making room, records on disk."""

_K = tuple(np.uint64(k) for k in (
    0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93,
    0xA0761D6478BD642F, 0xE7037ED1A0B428DB, 0x8EBC6AF09C88C6E3, 0x589965CC75374CC3,
))  # fmt: skip
_K0, _K1, _K2, _K3, _K4, _K5, _K6, _K7 = _K
_FINISH = np.uint64(0xFF51AFD7ED558CCD)
_SHIFT_LANE, _SHIFT_MIX = np.uint64(29), np.uint64(32)
_EIGHT = np.uint64(8)


class JournalArrays(NamedTuple):
    """What kernels take: state words, and the ring of mapped slots as checksums, events, and the same events as u64 words."""

    words: Any
    checksums: Any
    events: Any
    event_words: Any


@inlined
def _lane(word: Any, k: Any) -> Any:
    product = (word ^ (k >> _SHIFT_MIX)) * k
    return product ^ (product >> _SHIFT_LANE)


@inlined
def mix_event(chain: Any, words: Any, at: Any) -> Any:
    """The checksum (u64) of the event in ``words[at : at + 8]`` that follows a record with checksum `chain`.

    Each word goes through its own odd multiplier and an xor-shift, the eight results are added, and the sum is mixed with `chain` by one
    more multiplier and xor-shift (all modulo 2^64). Each step can be undone, so a change within one word, or of `chain` alone, always
    changes the checksum; any other change does but for one chance in about 2^64. The eight words do not wait for each other.
    """
    a = _lane(words[at], _K0) + _lane(words[at + np.uint64(1)], _K1)
    b = _lane(words[at + np.uint64(2)], _K2) + _lane(words[at + np.uint64(3)], _K3)
    c = _lane(words[at + np.uint64(4)], _K4) + _lane(words[at + np.uint64(5)], _K5)
    d = _lane(words[at + np.uint64(6)], _K6) + _lane(words[at + np.uint64(7)], _K7)
    mixed = (chain ^ ((a + b) + (c + d))) * _FINISH
    return mixed ^ (mixed >> _SHIFT_MIX)


@inlined
def journal_room(journal: Any) -> Any:
    """How many events (i64) can be appended now without waiting."""
    return np.int64(load_acquire(journal.words, W_LIMIT) - journal.words[W_NEXT])


@outlined
def _append_some(journal: Any, batch: Any, first: Any, count: Any) -> Any:
    """Append up to `count` events of `batch` from index `first`, as many as there is room for; returns how many."""
    words = journal.words
    taken = min(np.int64(count), journal_room(journal))
    mask = np.uint64(len(journal.events) - 1)
    position, chain = words[W_NEXT], words[W_CHAIN]
    for i in range(taken):
        slot = (position + np.uint64(i)) & mask
        copy_record(journal.events, slot, batch, first + i)
        chain = mix_event(chain, journal.event_words, slot * _EIGHT)
        store_release(journal.checksums, slot, chain)
    if taken > 0:
        words[W_CHAIN] = chain
        store_release(words, W_NEXT, position + np.uint64(taken))
        ring_bell(words, W_BELL)
    return taken


@inlined
def journal_append(journal: Any, batch: Any, index: Any) -> Any:
    """Append the event ``batch[index]``; false if there is no room for it now. Never waits."""
    return _append_some(journal, batch, np.int64(index), np.int64(1)) == 1


@outlined
def journal_wait(journal: Any, stop: Any, idle_mode: Any) -> Any:
    """Wait until the helper has made room (returns how much), has failed to (state word set: 0), or ``stop[0]`` is set (0)."""
    words = journal.words
    words[W_WAITS] += np.uint64(1)
    rounds = 0
    while True:
        room = journal_room(journal)
        if room > 0 or load_acquire(stop, 0) != 0 or load_acquire(words, W_STATE) != np.uint64(0):
            return room
        rounds = idle(idle_mode, rounds)


@inlined
def journal_append_batch(journal: Any, batch: Any, count: Any, stop: Any, idle_mode: Any) -> Any:
    """Append ``batch[:count]``; returns how many were appended (i64).

    Fewer than `count` only after ``stop[0]`` (an integer array) was set, or if :func:`journal_state` says why there is no room.
    """
    done = _append_some(journal, batch, np.int64(0), np.int64(count))
    while done < count:
        if journal_wait(journal, stop, idle_mode) == 0:
            break
        done += _append_some(journal, batch, done, np.int64(count) - done)
    return done


@inlined
def journal_state(journal: Any) -> Any:
    """0, or the errno (i64) that keeps the helper from making room, e.g. ENOSPC."""
    return np.int64(load_acquire(journal.words, W_STATE))


@quick
def _ring_now(words: Any) -> Any:
    ring_bell(words, W_BELL)


@loop
def _append_now(journal: Any, batch: Any, first: Any, count: Any) -> Any:
    return _append_some(journal, batch, first, count)


@loop
def _count_valid(event_words: Any, checksums: Any, first: Any, end: Any, chain: Any) -> Any:
    """First index in ``first .. end`` whose checksum does not hold (`end` if all do); the record before `first` has checksum `chain`."""
    for i in range(first, end):
        chain = mix_event(chain, event_words, np.uint64(i) * _EIGHT)
        if chain != checksums[i]:
            return i
    return end


@quick
def _chain_over(event_words: Any, count: Any, chain: Any) -> Any:
    for i in range(count):
        chain = mix_event(chain, event_words, np.uint64(i) * _EIGHT)
    return chain


def chain_over(events: EventArray, chain: int) -> int:
    """The checksum of the last of `events` (contiguous, shape ``(n,)``) if the record before the first has checksum `chain`."""
    return int(_chain_over(events.view(np.uint64), len(events), np.uint64(chain)))


@loop
def _next_valid(event_words: Any, checksums: Any, first: Any, end: Any) -> Any:
    """First index in ``first .. end`` whose checksum holds with the checksum stored before it; `end` if there is none. `first` > 0."""
    for i in range(first, end):
        if checksums[i] == mix_event(checksums[i - 1], event_words, np.uint64(i) * _EIGHT):
            return i
    return end


# ---------------------------------------------------------------- errors


class JournalError(Exception):
    """Something about a journal; `path` is the folder or the file."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


class JournalExists(JournalError):
    """The folder has a journal already."""


class JournalNotFound(JournalError):
    """The folder has no journal."""


class JournalReadOnly(JournalError):
    """The folder cannot be written to."""


class JournalBusy(JournalError):
    """Another process writes this journal."""


class JournalForeignFile(JournalError):
    """A file is no segment of this journal; `reason`."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, f"is no segment of this journal ({reason}); move it away or choose another folder")
        self.reason = reason


class JournalNoSpace(JournalError):
    """There is no room for the first segments; `needed_bytes`."""

    def __init__(self, path: Path, needed_bytes: int, reason: str) -> None:
        super().__init__(path, f"cannot reserve {needed_bytes} bytes ({reason}); free some space or lower segment_records")
        self.needed_bytes = needed_bytes


class JournalCorrupt(JournalError):
    """A record in the middle is altered or missing; `record` counts within the file, `sequence` within the journal."""

    def __init__(self, path: Path, record: int, sequence: int) -> None:
        super().__init__(path, f"record {record} (sequence {sequence}) is altered or missing; take the journal of a standby, or a copy")
        self.record, self.sequence = record, sequence


# ---------------------------------------------------------------- segment files


@dataclass(frozen=True)
class SegmentHeader:
    """What a segment says about itself. `first_sequence` is the segment's own; `seed` the chain's start at segment 0."""

    shard: int
    segment_records: int
    index: int
    journal_first_sequence: int
    config_version: int
    created_ns: int
    journal_id: int
    seed: int

    @property
    def first_sequence(self) -> int:
        """Sequence of the segment's record 0."""
        return self.journal_first_sequence + self.index * self.segment_records

    def at(self, index: int) -> SegmentHeader:
        """The header of another segment of this journal."""
        return replace(self, index=index)

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return HEADER_BYTES + self.segment_records * (_CHECKSUM_BYTES + _EVENT_BYTES)

    @property
    def events_at(self) -> int:
        """Offset of the events in the file; the checksums lie before them."""
        return HEADER_BYTES + self.segment_records * _CHECKSUM_BYTES


def segment_path(folder: Path, index: int) -> Path:
    """The file of a journal's segment."""
    return folder / f"{index:010d}{_SUFFIX}"


def _encode_header(header: SegmentHeader) -> bytes:
    identity = _IDENTITY.pack(
        MAGIC, VERSION, header.shard, header.segment_records, header.index, header.journal_first_sequence,
        header.config_version, header.created_ns, header.journal_id, header.seed,
    )  # fmt: skip
    page = bytearray(HEADER_BYTES)
    page[: _IDENTITY.size] = identity
    page[_IDENTITY.size : _IDENTITY_BYTES] = zlib.crc32(identity).to_bytes(4, "little")
    page[_PROGRESS_AT : _PROGRESS_AT + _PROGRESS.size] = _PROGRESS.pack(0, 0, (1 << 64) - 1)
    return bytes(page)


def _decode_header(path: Path, page: bytes) -> SegmentHeader:
    if page[: len(MAGIC)] != MAGIC:
        raise JournalForeignFile(path, "it starts otherwise")
    identity = page[: _IDENTITY.size]
    if len(page) < HEADER_BYTES or int.from_bytes(page[_IDENTITY.size : _IDENTITY_BYTES], "little") != zlib.crc32(identity):
        raise JournalForeignFile(path, "its header is damaged")
    _, version, *rest = _IDENTITY.unpack(identity)
    if version != VERSION:
        raise JournalForeignFile(path, f"version {version}, this program writes {VERSION}")
    header = SegmentHeader(*rest)
    if header.index != int(path.stem):
        raise JournalForeignFile(path, f"it is segment {header.index}")
    return header


def read_header(path: Path, fd: int) -> tuple[SegmentHeader, int]:
    """Header of an open segment file, and the checksum of the record before it (0: not known yet).

    Raises:
        JournalForeignFile: it is none.
    """
    page = os.pread(fd, HEADER_BYTES, 0)
    return _decode_header(path, page), int(_PROGRESS.unpack_from(page, _PROGRESS_AT)[0])


class _Segment:
    """One segment file, mapped to read (and to cut); what the file lacks at its end reads as zero."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            page = file.read(HEADER_BYTES)
            self.header = _decode_header(path, page)
            self.page = page
            self.file_bytes = os.fstat(file.fileno()).st_size
            self.previous, self.synced, self.synced_check = _PROGRESS.unpack_from(page, _PROGRESS_AT)
            self._read(file.fileno())

    def _read(self, fd: int) -> None:
        count = self.header.segment_records
        if self.file_bytes >= self.header.file_bytes:
            memory = mmap.mmap(fd, self.header.file_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
            buffer = np.frombuffer(memory, np.uint8)
        else:
            buffer = np.zeros(self.header.file_bytes, np.uint8)
            found = np.frombuffer(os.pread(fd, self.header.file_bytes, 0), np.uint8)
            buffer[: len(found)] = found
            buffer.flags.writeable = False
        self.checksums: Words = buffer[HEADER_BYTES : self.header.events_at].view(np.uint64)
        self.event_words: Words = buffer[self.header.events_at :].view(np.uint64)
        self.events: EventArray = buffer[self.header.events_at :].view(EVENT)
        assert len(self.events) == len(self.checksums) == count

    def valid(self, first: int, end: int, chain: int) -> int:
        return int(_count_valid(self.event_words, self.checksums, first, end, np.uint64(chain)))

    def whole_after(self, bad: int) -> bool:
        """Whether a record whose checksum holds with the one before it follows record `bad`."""
        end = len(self.checksums)
        return int(_next_valid(self.event_words, self.checksums, bad + 1, end)) < end

    def is_hole(self, record: int) -> bool:
        """Whether the record, or its checksum, was never written."""
        return int(self.checksums[record]) == 0 or not self.event_words[record * 8 : record * 8 + 8].any()

    def first_data_after(self, record: int) -> int | None:
        """First record from `record` on that is not all zero."""
        marks = np.flatnonzero(self.checksums[record:].copy())  # a copy: a live journal grows meanwhile
        words = np.flatnonzero(self.event_words[record * 8 :].copy())
        found = [int(marks[0])] if len(marks) else []
        found += [int(words[0]) // 8] if len(words) else []
        return record + min(found) if found else None


def _segments(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{_SUFFIX}") if path.stem.isdigit())


def _is_blank(path: Path) -> bool:
    """A file that a crash left before it had a header, or one that its writer has removed since it was listed."""
    try:
        with path.open("rb") as file:
            return not any(file.read(HEADER_BYTES))
    except FileNotFoundError:
        return True


def _begun_segments(folder: Path) -> list[Path]:
    paths = _segments(folder) if folder.is_dir() else []
    while paths and _is_blank(paths[-1]):
        paths.pop()
    if not paths:
        raise JournalNotFound(folder, "there is no journal here")
    return paths


def _first_header(folder: Path) -> SegmentHeader:
    """Of the oldest segment; its events are not looked at. Raises as :func:`_open_segments` does."""
    for path in _begun_segments(folder):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # a live node may let it go just now
            return _decode_header(path, file.read(HEADER_BYTES))
    raise JournalNotFound(folder, "there is no journal here")


def _open_segments(folder: Path) -> Iterator[_Segment]:
    """The folder's segments in order.

    Raises:
        JournalNotFound: there are none.
        JournalForeignFile: one is missing in between, or belongs to another journal.
    """
    paths = _begun_segments(folder)
    before: SegmentHeader | None = None
    for path in paths:
        try:
            segment = _Segment(path)
        except FileNotFoundError:
            if before is None and path is not paths[-1]:
                continue  # the oldest, which a live node has just let go
            if before is not None and not any(later.exists() for later in paths[paths.index(path) :]):
                return  # made ahead, not begun, and removed by the writer that ended
            raise JournalNotFound(path, "was removed while the journal was read; read it again") from None
        header = segment.header
        if before and header.journal_id != before.journal_id:
            raise JournalForeignFile(path, "it belongs to another journal")
        if before and header.index != before.index + 1:
            raise JournalForeignFile(path, f"segment {before.index + 1} is missing before it")
        before = header
        yield segment


# ---------------------------------------------------------------- recovery


@dataclass(frozen=True)
class Recovery:
    """Where a journal ends: the last segment with its record count, the chain there, and what a crash left behind it."""

    header: SegmentHeader
    records: int
    chain: int
    torn: bool
    surplus: list[Path]

    @property
    def next_sequence(self) -> int:
        """Sequence of the next event."""
        return self.header.first_sequence + self.records


def _check_tear(segments: list[_Segment], bad: int) -> None:
    """Raise unless record `bad` of the first of these segments, the last valid one, can be the torn end of the journal."""
    segment = segments[0]
    never_synced = segment.is_hole(bad) and bad >= segment.synced
    later = segment.whole_after(bad) or any(s.whole_after(0) for s in segments[1:])
    if later and not never_synced:
        raise JournalCorrupt(segment.path, bad, segment.header.first_sequence + bad)


def find_end(folder: Path) -> Recovery:
    """Find the last valid record, checking every checksum of the journal; changes nothing.

    Raises:
        JournalNotFound, JournalForeignFile: see there.
        JournalCorrupt: a record in the middle does not hold.
    """
    segments = list(_open_segments(folder))
    first = segments[0]
    chain = first.previous if first.header.index else first.header.seed
    for i, segment in enumerate(segments):
        total = segment.header.segment_records
        if segment.previous not in (0, chain) and segment.header.index:
            raise JournalCorrupt(segment.path, 0, segment.header.first_sequence)
        count = segment.valid(0, total, chain)
        chain = int(segment.checksums[count - 1]) if count else chain
        if count < total or i == len(segments) - 1:
            if count < total:
                _check_tear(segments[i:], count)
            torn = count < total and segment.first_data_after(count) is not None
            torn = torn or any(s.first_data_after(0) is not None for s in segments[i + 1 :])
            return Recovery(segment.header, count, chain, torn, [s.path for s in segments[i + 1 :]])
    raise AssertionError("unreachable: the last segment returns")


def recover(folder: Path) -> Recovery:
    """Find the end and cut what a crash left behind it: the rest of the last segment becomes zero again, segments after it are removed.

    Raises:
        as :func:`find_end`.
    """
    folder = Path(folder)
    found = find_end(folder)
    header = found.header
    _clear_from(segment_path(folder, header.index), header, found.records)
    _complete_headers(folder)
    for surplus in reversed([path for path in _segments(folder) if int(path.stem) > header.index]):  # a crash in between leaves no hole
        surplus.unlink()
    return found


def _clear_from(path: Path, header: SegmentHeader, records: int) -> None:
    """Make a segment zero from its record `records` on.

    Its header first says that no more than those are on disk, so that a crash in between leaves a torn tail, not an altered journal.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, header.file_bytes)
        _, synced, _ = _PROGRESS.unpack(os.pread(fd, _PROGRESS.size, _PROGRESS_AT))
        if synced > records:
            _put_synced(fd, records)
            os.fdatasync(fd)
        with mmap.mmap(fd, header.file_bytes) as memory:
            buffer = np.frombuffer(memory, np.uint8)
            for start, size in ((HEADER_BYTES, _CHECKSUM_BYTES), (header.events_at, _EVENT_BYTES)):
                rest = buffer[start + records * size : start + header.segment_records * size]
                if rest.any():
                    rest[:] = 0
            del buffer, rest
        _put_synced(fd, min(synced, records))
        os.fsync(fd)
    finally:
        os.close(fd)


def truncate(folder: str | Path, sequence: int) -> Recovery:
    """Cut a closed journal: it ends with the event before `sequence`, and the next one appended gets that sequence.

    Segments behind it go first, the last one before the others; then the rest of the one it lies in becomes zero. Whenever a crash comes,
    what is left is a journal that holds, and is longer than wanted at most.

    Raises:
        JournalBusy, JournalReadOnly, and as :func:`find_end`.
        ValueError: `sequence` is not in the journal.
    """
    folder = Path(folder)
    lock = _take_folder(folder)
    try:
        found = recover(folder)
        oldest = _first_header(folder)
        if not oldest.first_sequence <= sequence <= found.next_sequence:
            raise ValueError(f"{folder} holds sequences {oldest.first_sequence} to {found.next_sequence}, so it cannot end at {sequence}")
        index = max(oldest.index, (sequence - oldest.journal_first_sequence - 1) // oldest.segment_records)
        for path in reversed(_segments(folder)):
            if int(path.stem) > index:
                path.unlink()
                _sync_folder(folder)
        header = _Segment(segment_path(folder, index)).header
        _clear_from(segment_path(folder, index), header, sequence - header.first_sequence)
        return recover(folder)
    finally:
        os.close(lock)


def _sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _complete_headers(folder: Path) -> None:
    """Note in each header how the file before it ended, where a crash came before the helper did."""
    before: int | None = None
    for segment in _open_segments(folder):
        if before is not None and not segment.previous:
            with segment.path.open("r+b") as file:
                _put_previous(file.fileno(), before)
        before = int(segment.checksums[-1])


def _put_previous(fd: int, checksum: int) -> None:
    """Note in a segment's header how the segment before it ended."""
    os.pwrite(fd, checksum.to_bytes(8, "little"), _PROGRESS_AT)


def _put_synced(fd: int, records: int) -> None:
    """Note in a segment's header how many of its records are on disk."""
    os.pwrite(fd, struct.pack("<QQ", records, records ^ ((1 << 64) - 1)), _PROGRESS_AT + 8)


# ---------------------------------------------------------------- fixed addresses

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE, _MAP_FAILED, _MADV_POPULATE_WRITE = 0, 0x10, 0x4000, ctypes.c_void_p(-1).value, 23


class _AddressRange:
    """Reserved addresses into whose slots segments are mapped. Freed with the last array on it."""

    def __init__(self, slot_bytes: int, slots: int) -> None:
        self.slot_bytes, self.size = slot_bytes, slot_bytes * slots
        self.address = self._map(None, self.size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
        buffer = (ctypes.c_ubyte * self.size).from_address(self.address)
        self.array = np.frombuffer(memoryview(buffer), np.uint8)
        weakref.finalize(buffer, _libc.munmap, self.address, self.size)

    @staticmethod
    def _map(address: int | None, size: int, prot: int, flags: int, fd: int, offset: int) -> int:
        result = _libc.mmap(address, size, prot, flags, fd, offset)
        if result == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return int(result)

    def place(self, slot: int, fd: int, offset: int) -> None:
        """Map a part of a file into a slot and make its pages present and writable."""
        address = self.address + slot * self.slot_bytes
        self._map(address, self.slot_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd, offset)
        if _libc.madvise(address, self.slot_bytes, _MADV_POPULATE_WRITE):  # Linux before 5.14: touch them one by one
            pages = self.array[slot * self.slot_bytes : (slot + 1) * self.slot_bytes : mmap.PAGESIZE]
            pages |= 0

    def detach(self) -> None:
        """Put plain memory under all addresses: an array that outlives the journal is harmless."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        self._map(self.address, self.size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)


# ---------------------------------------------------------------- the writer


@dataclass
class _Helper:
    """What the helper threads share."""

    wake: threading.Event = field(default_factory=threading.Event)
    stopping: bool = False
    unsynced: deque[tuple[int, int]] = field(default_factory=deque)
    """Finished segments to be synced: (index, file descriptor)."""
    open_files: dict[int, int] = field(default_factory=dict)


_POLL_S_MIN, _POLL_S_MAX, _RETRY_S = 0.0005, 0.02, 0.1


@dataclass(frozen=True)
class FinishedSegment:
    """A full segment of a journal: its file, the sequence after its last event, its size in bytes, when it was last written (s, 1970)."""

    path: Path
    next_sequence: int
    size: int
    written_s: float


class Journal:
    """A journal open for appending, by one process at a time. `arrays` is what kernels take.

    Attributes:
        config_version: goes into the headers of segments made from now on.
        recovery: what was found at opening (None for a new journal).
    """

    def __init__(
        self,
        folder: Path,
        lock: int,
        start: Recovery | SegmentHeader,
        config_version: int,
        segments_ahead: int,
        sync: Sync,
        interval_ms: int,
    ) -> None:
        self.folder, self._lock, self.config_version = folder, lock, config_version
        self.recovery = start if isinstance(start, Recovery) else None
        self._header = start.header if isinstance(start, Recovery) else start
        self._slots, self._sync, self._interval_s = segments_ahead, sync, interval_ms / 1000
        count = self._header.segment_records
        try:
            self._checksum_range = _AddressRange(count * _CHECKSUM_BYTES, segments_ahead)
            self._event_range = _AddressRange(count * _EVENT_BYTES, segments_ahead)
        except OSError as error:
            raise JournalNoSpace(folder, segments_ahead * self._header.file_bytes, error.strerror or "") from error
        events = self._event_range.array
        words = zeros_aligned(32, np.uint64)
        self.arrays = JournalArrays(words, self._checksum_range.array.view(np.uint64), events.view(EVENT), events.view(np.uint64))
        index = self._header.index
        words[W_CHAIN] = start.chain if isinstance(start, Recovery) else start.seed
        words[W_NEXT] = words[W_SYNCED] = index * count + (start.records if isinstance(start, Recovery) else 0)
        self._oldest, self._prepared = index, index
        self._helper = _Helper()
        self._threads: list[threading.Thread] = []
        self._closed = False

    # -- opening

    @classmethod
    def create(
        cls,
        folder: str | Path,
        shard: int,
        *,
        segment_records: int = SEGMENT_RECORDS,
        first_sequence: int = 0,
        config_version: int = 0,
        segments_ahead: int = 4,
        sync: Sync = "segment",
        sync_interval_ms: int = 100,
    ) -> Journal:
        """Start a journal in an empty or new folder.

        Args:
            segment_records: events per file, a power of two, at least 512.
            first_sequence: sequence of the first event.
            segments_ahead: files mapped at a time, a power of two, at least 2.
            sync: when data is forced to disk: never, when a segment is finished, or every `sync_interval_ms`. Never in the loop's thread.

        Raises:
            JournalExists, JournalReadOnly, JournalBusy, JournalNoSpace: see there.
        """
        _check_power_of_two("segment_records", segment_records, 512)
        _check_power_of_two("segments_ahead", segments_ahead, 2)
        folder = Path(folder)
        lock = _take_folder(folder)
        try:
            if _segments(folder):
                raise JournalExists(folder, "there is a journal here; open it, or choose an empty folder")
            identity, seed = secrets.randbits(64), secrets.randbits(64) | 1
            header = SegmentHeader(shard, segment_records, 0, first_sequence, config_version, time.time_ns(), identity, seed)
            return cls(folder, lock, header, config_version, segments_ahead, sync, sync_interval_ms)._start()
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def copy_of(cls, folder: str | Path, header: SegmentHeader, previous: int = 0, **options: Any) -> Journal:
        """Start a journal that will hold the same records as another one, from the beginning of one of its segments on.

        Args:
            folder: empty or new.
            header: of that segment (:attr:`header` and :meth:`SegmentHeader.at` of the other one).
            previous: checksum of the record before it, if there is one.
            options: as for :meth:`open`.

        Raises:
            JournalExists, JournalReadOnly, JournalBusy, JournalNoSpace: see there.
        """
        folder = Path(folder)
        lock = _take_folder(folder)
        try:
            if _segments(folder):
                raise JournalExists(folder, "there is a journal here; choose an empty folder")
            try:
                _make_segment(segment_path(folder, header.index), header, previous)
            except OSError as error:
                raise JournalNoSpace(folder, header.file_bytes, error.strerror or "") from error
        finally:
            os.close(lock)
        return cls.open(folder, header.shard, **options)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        shard: int,
        *,
        config_version: int = 0,
        segments_ahead: int = 4,
        sync: Sync = "segment",
        sync_interval_ms: int = 100,
    ) -> Journal:
        """Open an existing journal after :func:`recover`, and append where it ends.

        Raises:
            JournalNotFound, JournalReadOnly, JournalBusy, JournalForeignFile, JournalCorrupt, JournalNoSpace: see there.
        """
        _check_power_of_two("segments_ahead", segments_ahead, 2)
        folder = Path(folder)
        if not folder.is_dir():
            raise JournalNotFound(folder, "there is no such folder")
        lock = _take_folder(folder)
        try:
            found = recover(folder)
            if found.header.shard != shard:
                path = segment_path(folder, found.header.index)
                raise JournalForeignFile(path, f"it is of shard {found.header.shard}, not {shard}")
            return cls(folder, lock, found, config_version, segments_ahead, sync, sync_interval_ms)._start()
        except BaseException:
            os.close(lock)
            raise

    def _start(self) -> Self:
        needed = 2 * self._header.file_bytes
        try:
            self._prepare()
            self._prepare()
        except OSError as error:
            self._release_files()
            raise JournalNoSpace(self.folder, needed, error.strerror or "") from error
        targets = [self._keep_ahead] if self._sync == "none" else [self._keep_ahead, self._keep_synced]
        self._threads = [threading.Thread(target=t, name=f"journal-{t.__name__[1:]}", daemon=True) for t in targets]
        for thread in self._threads:
            thread.start()
        self.wake_readers()  # compiled or loaded now, not in a takeover
        return self

    # -- appending and looking

    def append(self, events: EventArray) -> int:
        """Append a batch from Python, waiting for room; returns how many were appended (fewer if the disk is full, see `state`)."""
        batch = np.ascontiguousarray(events).view(EVENT)
        done = 0
        while (done := done + int(_append_now(self.arrays, batch, done, len(batch) - done))) < len(batch):
            if self._closed or self.state:
                break
            self.arrays.words[W_WAITS] += np.uint64(1)
            self._helper.wake.set()
            time.sleep(_POLL_S_MIN)
        return done

    @property
    def header(self) -> SegmentHeader:
        """Header of the segment at which this was opened: what identifies the journal."""
        return self._header

    @property
    def shard(self) -> int:
        """The shard whose journal this is."""
        return self._header.shard

    def wake_readers(self) -> None:
        """Have those who wait for events look up. From any thread."""
        _ring_now(self.arrays.words)

    @property
    def segment_records(self) -> int:
        """Events per file."""
        return self._header.segment_records

    @property
    def next_sequence(self) -> int:
        """Sequence that the next event appended will have."""
        return self._header.journal_first_sequence + int(self.arrays.words[W_NEXT])

    @property
    def syncs(self) -> bool:
        """Whether it forces anything to the disk at all."""
        return self._sync != "none"

    @property
    def synced_sequence(self) -> int:
        """Events below this sequence are known to be on disk."""
        return self._header.journal_first_sequence + int(self.arrays.words[W_SYNCED])

    @property
    def state(self) -> int:
        """0, or the errno that keeps new segments from being made (``errno.ENOSPC``: the disk is full)."""
        return int(self.arrays.words[W_STATE])

    @property
    def waits(self) -> int:
        """Times that appending had to wait for the helper."""
        return int(self.arrays.words[W_WAITS])

    @property
    def first_sequence(self) -> int:
        """Sequence of the first event there ever was; :class:`JournalReader` says which is the oldest one kept."""
        return self._header.journal_first_sequence

    def oldest_kept(self) -> int:
        """Index of the oldest segment that is kept."""
        return min((int(path.stem) for path in _segments(self.folder)), default=0)

    def disk_bytes(self) -> int:
        """What the journal takes on the disk, segments made ahead included."""
        return len(_segments(self.folder)) * self._header.file_bytes

    def finished(self) -> list[FinishedSegment]:
        """The segments that are full, oldest first."""
        found = []
        for path in _segments(self.folder):
            if int(path.stem) >= self._oldest:
                break
            end = self.first_sequence + (int(path.stem) + 1) * self.segment_records
            about = path.stat()
            found.append(FinishedSegment(path, end, about.st_size, about.st_mtime))
        return found

    def drop_before(self, sequence: int) -> int:
        """Remove the finished segments that hold only events below `sequence`; returns how many files."""
        dropped = [segment for segment in self.finished() if segment.next_sequence <= sequence]
        for segment in dropped:
            segment.path.unlink()
        return len(dropped)

    def close(self) -> None:
        """Sync (unless ``sync="none"``) and let go; segments made ahead and not begun are removed. The loop must have stopped appending."""
        if self._closed:
            return
        self._closed = True
        self._helper.stopping = True
        self._helper.wake.set()
        for thread in self._threads:
            thread.join()
        self._retire()
        if self._sync != "none":
            self._sync_files()
        self._release_files()
        for index in reversed(range(self._oldest + 1, self._prepared)):  # a crash in between leaves no hole
            segment_path(self.folder, index).unlink()
        self.arrays.words[W_LIMIT] = self.arrays.words[W_NEXT]
        self._checksum_range.detach()
        self._event_range.detach()
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # -- the helper: segments ahead

    def _keep_ahead(self) -> None:
        pause = _POLL_S_MIN
        while not self._helper.stopping:
            worked = False
            try:
                worked = self._retire()
                while self._prepared - self._oldest < self._slots and not self._helper.stopping:
                    self._prepare()
                    worked = True
                self.arrays.words[W_STATE] = 0
            except OSError as error:
                if not self.state:
                    _log.error("journal %s: no new segment: %s", self.folder, error.strerror)
                self.arrays.words[W_STATE] = error.errno or errno.EIO
                pause = _RETRY_S
            pause = _POLL_S_MIN if worked else min(pause * 2, _RETRY_S if self.state else _POLL_S_MAX)
            self._helper.wake.wait(pause)
            self._helper.wake.clear()

    def _prepare(self) -> None:
        """Make, map and touch the next segment, then let the loop have it."""
        index, header = self._prepared, self._header
        path = segment_path(self.folder, index)
        if index > header.index or self.recovery is None:
            _make_segment(path, SegmentHeader(
                header.shard, header.segment_records, index, header.journal_first_sequence,
                self.config_version, time.time_ns(), header.journal_id, header.seed,
            ))  # fmt: skip
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._helper.open_files[index] = fd
        slot = index % self._slots
        self._checksum_range.place(slot, fd, HEADER_BYTES)
        self._event_range.place(slot, fd, header.events_at)
        self._prepared = index + 1
        _release(self.arrays.words, W_LIMIT, self._prepared * header.segment_records)

    def _retire(self) -> bool:
        """Hand finished segments to be synced, and write into their successors how they ended."""
        count = self._header.segment_records
        finished = min(int(self.arrays.words[W_NEXT]) // count, self._prepared - 1)
        worked = self._oldest < finished
        while self._oldest < finished:
            last = int(self.arrays.checksums[(self._oldest % self._slots) * count + count - 1])
            _put_previous(self._helper.open_files[self._oldest + 1], last)
            fd = self._helper.open_files.pop(self._oldest)
            if self._sync == "none":
                os.close(fd)
            else:
                self._helper.unsynced.append((self._oldest, fd))
            self._oldest += 1
        return worked

    # -- the helper: to disk

    def _keep_synced(self) -> None:
        while not self._helper.stopping:
            try:
                self._sync_files(active=self._sync == "interval")
            except OSError as error:
                _log.error("journal %s: sync failed: %s", self.folder, error.strerror)
                self.arrays.words[W_STATE] = error.errno or errno.EIO
            deadline = time.monotonic() + self._interval_s
            while not self._helper.stopping and time.monotonic() < deadline:
                time.sleep(min(0.05, self._interval_s))

    def _sync_files(self, active: bool = True) -> None:
        """Force finished segments, and the active one, to disk; then note in their headers how far that was."""
        count = self._header.segment_records
        oldest = self._oldest  # before looking how much there is: a segment that ends meanwhile has its turn later
        appended = int(self.arrays.words[W_NEXT])
        while self._helper.unsynced:
            index, fd = self._helper.unsynced[0]
            self._sync_one(index, fd, count)
            self._helper.unsynced.popleft()
            os.close(fd)
        if active:
            fd = self._helper.open_files.get(oldest, -1)
            if fd >= 0 and appended > max(int(self.arrays.words[W_SYNCED]), oldest * count):
                self._sync_one(oldest, os.dup(fd), min(appended - oldest * count, count), close=True)

    def _sync_one(self, index: int, fd: int, records: int, close: bool = False) -> None:
        try:
            os.fdatasync(fd)
            _put_synced(fd, records)
        finally:
            if close:
                os.close(fd)
        self.arrays.words[W_SYNCED] = max(int(self.arrays.words[W_SYNCED]), index * self._header.segment_records + records)

    def _release_files(self) -> None:
        for fd in [*self._helper.open_files.values(), *(fd for _, fd in self._helper.unsynced)]:
            os.close(fd)
        self._helper.open_files.clear()
        self._helper.unsynced.clear()


@quick
def _release(words: Any, index: Any, value: Any) -> Any:
    store_release(words, index, np.uint64(value))


def _check_power_of_two(name: str, value: int, least: int) -> None:
    if value < least or value & (value - 1):
        raise ValueError(f"{name} = {value}: use a power of two, at least {least}")


def _take_folder(folder: Path) -> int:
    """Make the folder if needed and lock it for writing; returns the lock's file descriptor."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise JournalReadOnly(folder, f"cannot be written to ({error.strerror}); choose a folder that can") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise JournalBusy(folder, "another process writes this journal; stop it first") from None
    return fd


def _has_writer(folder: Path) -> bool:
    try:
        fd = os.open(folder / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def _make_segment(path: Path, header: SegmentHeader, previous: int = 0) -> None:
    """A segment of reserved, zero space; it gets its name when its header is complete."""
    temporary = path.with_suffix(".new")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, header.file_bytes)
        os.pwrite(fd, _encode_header(header), 0)
        if previous:
            _put_previous(fd, previous)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


# ---------------------------------------------------------------- reading


class JournalReader:
    """Reads a journal's events in order, checking every checksum. Works beside a live writer: it ends where the writer is."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._first = _first_header(self.folder)
        self.shard = self._first.shard

    @property
    def first_sequence(self) -> int:
        """Sequence of the oldest event kept."""
        return self._first.first_sequence

    @property
    def config_version(self) -> int:
        """Configuration under which its first segment was made: the one that a whole journal begins under."""
        return self._first.config_version

    @property
    def journal_id(self) -> int:
        """Which journal it is."""
        return self._first.journal_id

    def chain_before(self, sequence: int) -> int | None:
        """Checksum of the record before `sequence`, of which that one's depends; None if it is not kept, or not written yet."""
        first = self._first
        at = sequence - first.journal_first_sequence
        index, record = divmod(at, first.segment_records)
        if sequence < self.first_sequence or at < 0:
            return None
        if record == 0 and index > first.index:  # the segment may not have been made yet
            index, record = index - 1, first.segment_records
        try:
            segment = _Segment(segment_path(self.folder, index))
        except (FileNotFoundError, JournalForeignFile):
            return None
        if record == 0:
            return segment.header.seed if index == 0 else segment.previous or None
        return int(segment.checksums[record - 1]) or None

    def batches(self, start: int | None = None, size: int = 4096) -> Iterator[EventArray]:
        """Batches of up to `size` events from sequence `start` on (default: the oldest), as read-only arrays that need no copy.

        Raises:
            JournalCorrupt: a record does not hold and others follow it.
            ValueError: `start` is older than the oldest event kept.
        """
        start = self.first_sequence if start is None else start
        if start < self.first_sequence:
            raise ValueError(f"sequence {start} is not kept any more; the oldest is {self.first_sequence}")
        chain: int | None = None
        for segment in _open_segments(self.folder):
            header = segment.header
            total = header.segment_records
            at = max(0, start - header.first_sequence)
            if at >= total:
                chain = int(segment.checksums[-1])
                continue
            if at:
                chain = int(segment.checksums[at - 1])
            elif chain is None:
                chain = segment.previous if header.index else header.seed
            while at < total:
                end = segment.valid(at, min(at + size, total), chain)
                if end > at:
                    yield segment.events[at:end]
                    chain = int(segment.checksums[end - 1])
                if end < min(at + size, total):
                    self._check_end(segment, end, chain)
                    return
                at = end

    def _check_end(self, segment: _Segment, bad: int, chain: int) -> None:
        """Raise if whole records follow record `bad`, and it does not hold even now: a live writer may just have come past it."""
        later = segment.whole_after(bad) or _segment_has_data(segment_path(self.folder, segment.header.index + 1))
        if later and segment.valid(bad, bad + 1, chain) == bad:
            raise JournalCorrupt(segment.path, bad, segment.header.first_sequence + bad)


def _segment_has_data(path: Path) -> bool:
    try:
        return not _is_blank(path) and _Segment(path).first_data_after(0) is not None
    except FileNotFoundError:  # see _is_blank
        return False


@dataclass(frozen=True)
class Problem:
    """A defect found by :func:`verify`. `record` counts within the file (-1: its header)."""

    file: str
    record: int
    sequence: int
    kind: Literal["altered", "torn", "chain", "header", "size", "foreign"]
    detail: str


@dataclass(frozen=True)
class JournalReport:
    """What :func:`verify` found; `records` of `files` files hold."""

    shard: int
    files: int
    records: int
    first_sequence: int
    next_sequence: int
    problems: list[Problem]

    @property
    def ok(self) -> bool:
        """Nothing is altered, missing or torn."""
        return not self.problems


def verify(folder: str | Path) -> JournalReport:
    """Check every bit of a journal: each record's checksum, the chain across files, headers, and that nothing lies behind the end.

    A journal with a live writer may be checked too; its moving end is then not reported as torn.

    Raises:
        JournalNotFound: there is none.
    """
    folder = Path(folder)
    segments: list[_Segment] = []
    problems: list[Problem] = []
    try:
        for segment in _open_segments(folder):
            segments.append(segment)  # noqa: PERF402  (keeps what came before a foreign file)
    except JournalForeignFile as error:
        problems.append(Problem(error.path.name, -1, -1, "foreign", error.reason))
    records, chain, live = 0, 0, _has_writer(folder)
    for i, segment in enumerate(segments):
        last = not any(s.first_data_after(0) is not None for s in segments[i + 1 :])
        if i == 0:
            chain = segment.previous if segment.header.index else segment.header.seed
        problems += _check_header(segment, chain if i else None, last or live)
        found, count = _check_records(segment, chain, last, live)
        problems += found
        records += count
        chain = int(segment.checksums[-1])
        if last:
            break
    start = segments[0].header.first_sequence if segments else 0
    return JournalReport(segments[0].header.shard if segments else -1, len(segments), records, start, start + records, problems)


def _check_header(segment: _Segment, chain: int | None, may_be_unknown: bool) -> list[Problem]:
    header, name = segment.header, segment.path.name
    found = []
    gaps = segment.page[_IDENTITY_BYTES:_PROGRESS_AT] + segment.page[_PROGRESS_AT + _PROGRESS.size :]
    if any(gaps) or segment.synced ^ segment.synced_check != (1 << 64) - 1 or segment.synced > header.segment_records:
        found.append(Problem(name, -1, header.first_sequence, "header", "its header is damaged"))
    if chain is not None and segment.previous != chain and not (may_be_unknown and segment.previous == 0):
        found.append(Problem(name, -1, header.first_sequence, "chain", "it does not continue the file before it"))
    if header.index == 0 and segment.previous:
        found.append(Problem(name, -1, header.first_sequence, "header", "its header is damaged"))
    if segment.file_bytes != header.file_bytes:
        detail = f"{segment.file_bytes} bytes instead of {header.file_bytes}"
        found.append(Problem(name, -1, header.first_sequence, "size", detail))
    return found


def _check_records(segment: _Segment, chain: int, last: bool, live: bool) -> tuple[list[Problem], int]:
    """Every record that does not hold, the first of each run; and how many do hold."""
    header, total = segment.header, segment.header.segment_records
    found: list[Problem] = []
    held, at = 0, 0
    while at < total:
        bad = segment.valid(at, total, chain)
        held += bad - at
        if bad == total:
            break
        chain, at = int(segment.checksums[bad - 1]) if bad > at else chain, bad
        after = int(_next_valid(segment.event_words, segment.checksums, bad + 1, total))
        behind = segment.first_data_after(bad)
        if segment.valid(bad, bad + 1, chain) > bad:  # a live writer has just come past it
            continue
        if after == total and last:
            if behind is not None and not live:
                found.append(Problem(segment.path.name, behind, header.first_sequence + behind, "torn", "the end is not whole"))
            break
        found.append(Problem(segment.path.name, bad, header.first_sequence + bad, "altered", "the checksum does not hold"))
        chain, at = int(segment.checksums[after - 1]), after
    return found, held
