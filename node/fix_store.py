"""What a FIX session must not forget: the next sequences of both directions, and the messages sent, to send them again.

:class:`FileStore` keeps them in a folder of its own, in segments of a log that are read again at the next start; what is cut off at the
end by a crash is dropped. :meth:`FileStore.sync` forces everything to the disk: a session calls it before a message leaves, so that
no sequence is ever used twice. The log is bounded: the oldest segment goes when there are too many, and messages in it are
gap-filled when they are asked for. :class:`MemoryStore` forgets at the end of the process.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tickmesh.transports.durable import sync_folder

MESSAGE_BYTES_MAX = 1 << 24
"""Longest message that is kept."""
_HEAD = struct.Struct("<IIQ")
"""CRC-32 of what follows it, size of the payload with the kind in the upper four bits, number."""
_SENT, _SKIPPED, _NEXT_IN, _STATE, _RESET = range(1, 6)
_KIND_SHIFT = 28
_SIZE_MASK = (1 << _KIND_SHIFT) - 1
_STATE_WORDS = struct.Struct("<QQQ")
_OLD_STATE_WORDS = struct.Struct("<QQ")
"""Without `begun_ms`, as logs were first written."""
_NAME = re.compile(r"^(\d{12})\.log$")


class StoreError(Exception):
    """A store cannot be used.

    Attributes:
        path: the file or folder.
        reason: what is wrong, and what to do.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class Store(Protocol):
    """What a session needs.

    Attributes:
        next_out: sequence of the next message sent.
        next_in: sequence of the next message expected.
        begun_ms: when sequences began at 1, ms since 1970: tells one run of them from the next; 0: not known.
    """

    next_out: int
    next_in: int
    begun_ms: int

    @property
    def oldest(self) -> int:
        """Sequence of the oldest message that is still there; `next_out` if none is."""

    def append(self, message: bytes | None) -> None:
        """The message `next_out` is about to leave; None: an administrative one, which is never sent again."""

    def set_next_in(self, sequence: int) -> None:
        """All before `sequence` has been received and handled."""

    def set_next_out(self, sequence: int) -> None:
        """Sequences before `sequence` are used up."""

    def message(self, sequence: int) -> bytes | None:
        """A message that was sent, if it is still there."""

    def reset(self) -> None:
        """Both directions begin at 1, and nothing is kept."""

    def sync(self) -> None:
        """What was said before is safe when this returns."""

    def close(self) -> None:
        """No more calls come."""


class MemoryStore:
    """Keeps everything in memory, the newest `bytes_max` of messages."""

    def __init__(self, bytes_max: int = 64 << 20) -> None:
        self.next_out = self.next_in = 1
        self.begun_ms = _later(0)
        self._messages: dict[int, bytes] = {}
        self._bytes, self._bytes_max = 0, bytes_max

    def append(self, message: bytes | None) -> None:
        if message is not None:
            self._messages[self.next_out] = message
            self._bytes += len(message)
            while self._bytes > self._bytes_max:
                self._bytes -= len(self._messages.pop(next(iter(self._messages))))
        self.next_out += 1

    @property
    def oldest(self) -> int:
        return next(iter(self._messages), self.next_out)

    def set_next_in(self, sequence: int) -> None:
        self.next_in = sequence

    def set_next_out(self, sequence: int) -> None:
        self.next_out = sequence

    def message(self, sequence: int) -> bytes | None:
        return self._messages.get(sequence)

    def reset(self) -> None:
        self.next_out = self.next_in = 1
        self.begun_ms = _later(self.begun_ms)
        self._messages.clear()
        self._bytes = 0

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class _Place:
    """Where a message lies."""

    segment: int
    offset: int
    size: int


class FileStore:
    """Keeps everything in `folder`, which is made; at most about `bytes_max` bytes in it.

    Args:
        force: whether :meth:`sync` forces data to the disk (fdatasync). Without it, what was sent survives a crash of the process, but
            not one of the host.

    Attributes:
        dropped_bytes: what was cut off at the end of the log when it was opened.

    Raises:
        StoreError: the folder cannot be used, another process uses it, or the log is damaged before its end.
    """

    SEGMENTS = 8

    def __init__(self, folder: Path, bytes_max: int = 64 << 20, *, force: bool = True) -> None:
        self.next_out = self.next_in = 1
        self.begun_ms = self.dropped_bytes = 0
        self._folder, self._force = folder, force
        self._segment_bytes = max(bytes_max // self.SEGMENTS, 4096)
        self._places: dict[int, _Place] = {}
        self._files: dict[int, int] = {}
        self._dirty = False
        self._end = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(folder, f"cannot be used ({error.strerror}): choose another folder or make it writable") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise StoreError(folder, "another process uses it: stop that one, or give each session a folder of its own") from None
        try:
            self._open()
        except OSError as error:
            self.close()
            raise StoreError(folder, f"cannot be read ({error.strerror})") from None
        except StoreError:
            self.close()
            raise

    # -- what a session calls

    @property
    def oldest(self) -> int:
        return next(iter(self._places), self.next_out)

    def append(self, message: bytes | None) -> None:
        if message is None:
            self._write(_SKIPPED, self.next_out, b"")
        elif len(message) > MESSAGE_BYTES_MAX:
            raise ValueError(f"a message of {len(message)} bytes: at most {MESSAGE_BYTES_MAX} are kept")
        else:
            offset = self._write(_SENT, self.next_out, message)
            self._places[self.next_out] = _Place(self._segment, offset, len(message))
        self.next_out += 1

    def set_next_in(self, sequence: int) -> None:
        if sequence != self.next_in:
            self.next_in = sequence
            self._write(_NEXT_IN, sequence, b"")

    def set_next_out(self, sequence: int) -> None:
        self.next_out = sequence
        self._write(_SKIPPED, sequence - 1, b"")

    def message(self, sequence: int) -> bytes | None:
        place = self._places.get(sequence)
        return None if place is None else os.pread(self._files[place.segment], place.size, place.offset)

    def reset(self) -> None:
        self.next_out = self.next_in = 1
        self.begun_ms = _later(self.begun_ms)
        self._places.clear()
        self._write(_RESET, self.begun_ms, b"")

    def sync(self) -> None:
        if self._dirty and self._force:
            try:
                os.fdatasync(self._files[self._segment])
            except OSError as error:
                raise StoreError(self._folder, f"cannot be forced to the disk ({error.strerror}): look at the disk") from error
        self._dirty = False

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # -- the log

    def _write(self, kind: int, number: int, payload: bytes) -> int:
        """Append a record; returns where its payload begins."""
        if self._end + len(payload) > self._segment_bytes and self._end > _HEAD.size + _STATE_WORDS.size:
            self._next_segment()
        record = _record(kind, number, payload)
        try:
            written = os.pwrite(self._files[self._segment], record, self._end)
        except OSError as error:
            raise StoreError(self._folder, f"cannot be written ({error.strerror}): make room on the disk") from error
        if written != len(record):
            raise StoreError(self._folder, "the disk is full: make room")  # what was written lies behind the end
        offset = self._end + _HEAD.size
        self._end += len(record)
        self._dirty = True
        return offset

    def _next_segment(self) -> None:
        """Go on in a new file, which begins with where we are; forget the oldest."""
        self.sync()
        self._create(self._segment + 1)
        while len(self._files) > self.SEGMENTS:
            oldest = min(self._files)
            os.close(self._files.pop(oldest))
            self._path(oldest).unlink(missing_ok=True)
            self._places = {sequence: place for sequence, place in self._places.items() if place.segment != oldest}

    def _create(self, segment: int) -> None:
        file = os.open(self._path(segment), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._files[segment], self._segment, self._end = file, segment, 0
        record = _record(_STATE, 0, _STATE_WORDS.pack(self.next_out, self.next_in, self.begun_ms))
        os.pwrite(file, record, 0)
        self._end, self._dirty = len(record), True
        if self._force:
            os.fdatasync(file)
            sync_folder(self._folder)

    def _path(self, segment: int) -> Path:
        return self._folder / f"{segment:012}.log"

    def _open(self) -> None:
        found = sorted(int(match[1]) for path in self._folder.iterdir() if (match := _NAME.match(path.name)))
        for segment in found:
            self._files[segment] = os.open(self._path(segment), os.O_RDWR | os.O_CLOEXEC)
            self._segment = segment
            size, self._end = os.fstat(self._files[segment]).st_size, 0
            self._read(segment)
            if self._end == size:
                continue
            if segment != found[-1]:
                advice = "restore it, or remove the folder and reset both sides"
                raise StoreError(self._path(segment), f"is damaged at byte {self._end}: {advice}")
            self.dropped_bytes = size - self._end
            os.ftruncate(self._files[segment], self._end)
        if self._end == 0:  # there is none, or the newest was being made
            self.begun_ms = self.begun_ms if len(found) > 1 else _later(0)
            self._create(self._segment if found else 1)

    def _read(self, segment: int) -> None:
        """Take the records of a segment up to the first that is not whole."""
        file = self._files[segment]
        while True:
            head = os.pread(file, _HEAD.size, self._end)
            if len(head) < _HEAD.size:
                return
            check, packed, number = _HEAD.unpack(head)
            size = packed & _SIZE_MASK
            payload = os.pread(file, size, self._end + _HEAD.size) if size <= MESSAGE_BYTES_MAX else b""
            if len(payload) != size or check != zlib.crc32(payload, zlib.crc32(head[4:])):
                return
            self._take(packed >> _KIND_SHIFT, number, payload, segment)
            self._end += _HEAD.size + size

    def _take(self, kind: int, number: int, payload: bytes, segment: int) -> None:
        if kind in (_SENT, _SKIPPED):
            self.next_out = number + 1
        if kind == _SENT:
            self._places[number] = _Place(segment, self._end + _HEAD.size, len(payload))
        elif kind == _NEXT_IN:
            self.next_in = number
        elif kind == _STATE:
            words = _STATE_WORDS if len(payload) == _STATE_WORDS.size else _OLD_STATE_WORDS
            self.next_out, self.next_in, *begun = words.unpack(payload)
            self.begun_ms = begun[0] if begun else 0
        elif kind == _RESET:
            self.next_out = self.next_in = 1
            self.begun_ms = number
            self._places.clear()


def _later(before_ms: int) -> int:
    """Now, ms since 1970, or just after `before_ms`."""
    return max(before_ms + 1, time.time_ns() // 1_000_000)


def _record(kind: int, number: int, payload: bytes) -> bytes:
    packed = len(payload) | kind << _KIND_SHIFT
    check = zlib.crc32(payload, zlib.crc32(struct.pack("<IQ", packed, number)))
    return _HEAD.pack(check, packed, number) + payload
