"""Reading a journal while it is written: the records as they become whole, from any sequence, without a copy.

Each segment file is mapped once more for reading. The kernel keeps one page for all mappings of a file, so that a record is here as soon as
the loop has stored it, and it stays here when the writer reuses its own addresses or retention removes the file. Where the journal ends
is what its loop says (``W_NEXT``, read by acquire), so nothing has to be checked while following it.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

import numpy as np

from tickmesh.node.event import EVENT, EventArray
from tickmesh.node.journal import HEADER_BYTES, W_BELL, W_NEXT, Journal, SegmentHeader, Words, read_header, segment_path
from tickmesh.transports.toolbox import IDLE_SLEEP, announce_sleep, idle, load_acquire, loop, monotonic_ns, sleep_at_bell


class TooOld(Exception):
    """A sequence is not kept any more; `oldest` is the oldest one that is."""

    def __init__(self, sequence: int, oldest: int) -> None:
        super().__init__(f"sequence {sequence} is not kept any more, the oldest is {oldest}")
        self.sequence, self.oldest = sequence, oldest


@loop
def _wait_beyond(words: Any, position: Any, stop: Any, idle_mode: Any, limit_ns: Any) -> Any:
    end = monotonic_ns() + limit_ns
    rounds = 0
    while True:
        appended = load_acquire(words, W_NEXT)
        if appended > position or load_acquire(stop, 0) != 0:
            return appended
        if idle_mode == IDLE_SLEEP:
            left_ns = end - monotonic_ns()
            if left_ns <= 0:
                return appended
            announce_sleep(words, W_BELL)
            if load_acquire(words, W_NEXT) == appended and load_acquire(stop, 0) == 0:
                sleep_at_bell(words, W_BELL, left_ns)
        else:
            rounds = idle(idle_mode, rounds)
            if rounds & 15 == 0 and monotonic_ns() > end:
                return appended


class _Mapped:
    """One segment file, mapped to read."""

    def __init__(self, journal: Journal, index: int) -> None:
        path = segment_path(journal.folder, index)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            page, self.previous = read_header(path, fd)
            self.header = page
            memory = mmap.mmap(fd, page.file_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        buffer = np.frombuffer(memory, np.uint8)
        self.checksums: Words = buffer[HEADER_BYTES : page.events_at].view(np.uint64)
        self.events: EventArray = buffer[page.events_at :].view(EVENT)


class JournalTail:
    """A reader of a live journal, for one thread.

    Args:
        journal: open for appending in this process.

    Attributes:
        position: sequence of the next event to read; starts at the journal's end.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.position = journal.next_sequence
        self._base = journal.first_sequence
        self._count = journal.segment_records
        self._mapped: _Mapped | None = None

    @property
    def end(self) -> int:
        """Sequence of the next event that will be appended."""
        return self.journal.next_sequence

    def oldest(self) -> int:
        """Sequence of the oldest event kept."""
        return self._base + self.oldest_index() * self._count

    def oldest_index(self) -> int:
        """Index of the oldest segment kept."""
        return self.journal.oldest_kept()

    def header_at(self, index: int) -> tuple[SegmentHeader, int]:
        """Header of a segment, and the checksum of the record before it.

        Raises:
            TooOld: it is not kept any more.
        """
        mapped = self._map(index)
        return mapped.header, self.chain_at(self._base + index * self._count)

    def chain_at(self, sequence: int) -> int:
        """Checksum (u64) of the event before `sequence`, which is at most :attr:`end`.

        Raises:
            TooOld: it is not kept any more.
        """
        record = sequence - self._base
        if record % self._count == 0 and (record == 0 or record // self._count <= self.oldest_index()):
            mapped = self._map(record // self._count)
            return mapped.previous if record else mapped.header.seed
        return int(self._map((record - 1) // self._count).checksums[(record - 1) % self._count])

    def read(self, maximum: int) -> tuple[EventArray, int]:
        """Up to `maximum` of the next events, as a read-only array over the file, and the checksum of the last; none if there are none.

        An array does not reach over the end of a segment.

        Raises:
            TooOld: the next event is not kept any more.
        """
        record = self.position - self._base
        first = record % self._count
        count = min(maximum, self.end - self.position, self._count - first)
        if count <= 0:
            return np.zeros(0, EVENT), 0
        mapped = self._map(record // self._count)
        self.position += count
        return mapped.events[first : first + count], int(mapped.checksums[first + count - 1])

    def wait(self, stop: Any, idle_mode: int, limit_s: float) -> bool:
        """Wait, without the GIL, until there is more to read (true), ``stop[0]`` (an i64 array) is set, or the limit has passed.

        Mode ``sleep`` sleeps until something is appended; whoever sets `stop` then calls :meth:`Journal.wake_readers`.
        """
        position = self.position - self._base
        return int(_wait_beyond(self.journal.arrays.words, np.uint64(position), stop, idle_mode, int(limit_s * 1e9))) > position

    def _map(self, index: int) -> _Mapped:
        if self._mapped is None or self._mapped.header.index != index:
            try:
                self._mapped = _Mapped(self.journal, index)
            except FileNotFoundError:
                raise TooOld(self._base + index * self._count, self.oldest()) from None
        return self._mapped
