"""The way from Python to the compiled JSON decoders: messages side by side in one buffer, many at a call, and their counts back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tickmesh.node.event_batch import EventBatch
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.json_kernels import (
    APPLIED,
    BAD_CHECKSUM,
    CHECKED,
    COMPILED,
    UNCHECKED,
    WRONG_BOOK,
    WRONG_TIME,
    decode_messages,
    make_hot,
)
from tickmesh.node.json_ladder import make_ladders, more_ladders
from tickmesh.transports.recording import SLACK

Message = tuple[bytes, int, int]
"""A message's text, time of receipt (ns), and sequence for its events (0: the venue's own)."""
RUN_MAX = 64
"""Messages of one call: more gain nothing."""
_BUFFER_BYTES = 1 << 18
_NAMES = (
    (APPLIED, "updates_applied"), (CHECKED, "checksums_checked"), (UNCHECKED, "checksums_absent"),
    (COMPILED, "compiled"),
)  # fmt: skip
_UNUSUAL_MAX, _PAUSE = 32, 32
"""After so many messages in a row that compiled code leaves to Python, it is not asked for so many more."""


class CompiledDecoder:
    """The compiled decoder of one feed.

    Attributes:
        has_bad_checksum: the last message that :meth:`run` has taken has shown a book to be wrong.
    """

    def __init__(self, venue: int, kinds: Sequence[tuple[int, str]], table: InstrumentTable, source: int, books: Any) -> None:
        self._venue, self._kinds, self._source = venue, kinds, np.uint32(source)
        self._hot = make_hot(table, venue, books, make_ladders(1), None)
        self._ladders_used = 0
        self._buffer = np.zeros(_BUFFER_BYTES + SLACK, np.uint8)
        self._ends = self._times = np.zeros(0, np.int64)
        self._sequences = np.zeros(0, np.uint64)
        self._first = 0
        """The message that is at the buffer's beginning."""
        self._messages: Sequence[Message] = ()
        self._unusual = self._pause = 0
        self.has_bad_checksum = False

    # -- ladders

    @property
    def ladders(self) -> Any:
        """The books with texts (:mod:`tickmesh.node.json_ladder`)."""
        return self._hot.ladders

    def new_ladder(self) -> int:
        """The number of a new book with texts."""
        if self._ladders_used == len(self._hot.ladders.counts):
            self._hot = self._hot._replace(ladders=more_ladders(self._hot.ladders, 2 * self._ladders_used))
        self._ladders_used += 1
        return self._ladders_used - 1

    # -- messages

    def load(self, messages: Sequence[Message]) -> None:
        """What :meth:`run` is to take from."""
        self._messages, self._first, self._ends = messages, 0, self._ends[:0]

    def _pack(self, first: int) -> None:
        """Put messages from number `first` on into the buffer, as many as fit."""
        run = self._messages[first : first + RUN_MAX]
        ends, texts = [-1], []
        for text, _, _ in run:
            end = ends[-1] + 1 + len(text)
            if end >= _BUFFER_BYTES:
                break
            ends.append(end)
            texts.append(text)
        packed = b"\n".join([*texts, b""])
        self._buffer[: len(packed)] = np.frombuffer(packed, np.uint8)
        self._first, self._ends = first, np.array(ends[1:], np.int64)
        self._times = np.array([time for _, time, _ in run[: len(texts)]], np.int64)
        self._sequences = np.array([sequence for _, _, sequence in run[: len(texts)]], np.uint64)

    def run(self, first: int, out: EventBatch, enough: int) -> int:
        """Decode messages from number `first` on, until more than `enough` events are in `out`, or one is for Python; returns how many."""
        self.has_bad_checksum = False
        if self._pause:
            self._pause -= 1
            return 0
        if not self._first <= first < self._first + len(self._ends):
            self._pack(first)
        if self._hot.out is not out.events:
            self._hot = self._hot._replace(out=out.events)
        begin = first - self._first
        done, out.count, why = decode_messages(
            self._buffer, self._ends, self._times, self._sequences, begin, self._venue, self._source, self._hot, out.count, enough + 1
        )
        self.has_bad_checksum = why == BAD_CHECKSUM
        taken = int(done) - begin
        self._unusual = 0 if taken else self._unusual + 1
        if self._unusual == _UNUSUAL_MAX:
            self._unusual, self._pause = 0, _PAUSE
        return taken

    # -- what came of them

    def add_messages(self, found: Counter[str]) -> None:
        """Add how many messages of each kind were compiled code's."""
        self._add(found, self._kinds)

    def add_counters(self, found: Counter[str]) -> None:
        """Add what it did with books."""
        self._add(found, _NAMES)

    def _add(self, found: Counter[str], names: Sequence[tuple[int, str]]) -> None:
        for index, name in names:
            if self._hot.counts[index]:
                found[name] += int(self._hot.counts[index])

    def wrong_book(self) -> tuple[int, int]:
        """Instrument of the book with the wrong checksum, and the message's time, ns."""
        return int(self._hot.counts[WRONG_BOOK]), int(self._hot.counts[WRONG_TIME])
