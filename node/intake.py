"""Intakes: what an adapter hands over, kept within a bound until it is decoded, and its events in batches.

A source's protocol chooses the intake: bytes of a stream and datagrams go to the compiled decoder, many messages at a call; JSON and CSV
are decoded message by message in Python. An intake never waits and never drops: whoever fills it looks at its room first.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from tickmesh.control.config import Source
from tickmesh.node.csv_feed import CsvFeed
from tickmesh.node.decoder import arbitration, end_of_stream, filtered, load_decoder, make_feed, malformed, message_counts
from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, NO_SIDE, EventArray, Kind
from tickmesh.node.event_batch import EventBatch
from tickmesh.node.feed import BAD_LENGTH, NEXT_SEQ, STARTED
from tickmesh.node.fix_mapping import is_fix
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.json_compiled import RUN_MAX
from tickmesh.node.json_feed import BinanceFeed, VenueFeed
from tickmesh.node.protocol import Framing, Spec
from tickmesh.node.reader import Progress, SourceError, protocol_fields, spec_and_framing
from tickmesh.node.venues import VENUE_FEEDS, compiled_feed
from tickmesh.transports.capture import PACKET
from tickmesh.transports.connection import BrokenProtocol
from tickmesh.transports.recording import SLACK, split_time
from tickmesh.transports.toolbox import zeros_aligned

Data = bytes | bytearray | memoryview
OUT_EVENTS = 256
_NOTHING: EventArray = np.zeros(0, EVENT)
_MESSAGE_BYTES = 128
"""What a message that waits takes besides its bytes: a million empty ones are not free."""
_PACKETS = 64
_PACKET_BYTES_MAX = 65_535


def whole_source(kind: Kind, now_ns: int, *, first: int = 0, last: int = 0, id: int = 0) -> EventArray:
    """A GAP of source sequences `first` to `last` (0: unknown which), or a CLEAR or CODE of session `id`, of a whole source."""
    event = zeros_aligned(1, EVENT)
    event["ts_event"], event["ts_recv"] = now_ns, now_ns
    event["instrument"], event["kind"], event["side"] = ALL_INSTRUMENTS, kind, NO_SIDE
    if kind == Kind.GAP:
        event["seq"], event["qty"] = first, last - first + 1 if last else 0
        event["id"], event["aux"] = first, last
    else:
        event["id"] = id
    return event


class Intake(ABC):
    """Takes what has come, gives events.

    Attributes:
        capacity_bytes: most bytes that wait.
        waiting_bytes: how many do, with what each message takes besides.
        bytes: all that came.
        drops: whether messages can be left out, with a gap in their place.
        follows: whether it knows the sequence of the message that comes next, for adapters that go on from there.
        duplicates: messages that had come before.
        snapshots_waiting: snapshots that were asked for, and are not decoded yet.
        order_ids: how the venue numbers orders.
        spec: the protocol, where a spec file describes it.
    """

    order_ids = "random"
    drops = follows = False
    spec: Spec | None = None
    feed: Any = None
    venue: VenueFeed | None = None
    snapshots_waiting = 0

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes, self.waiting_bytes, self.bytes, self.duplicates = capacity_bytes, 0, 0, 0

    def has_room(self, size: int) -> bool:
        """Whether so many bytes more may be put; an empty intake takes a message of any size."""
        return self.waiting_bytes == 0 or self.waiting_bytes + size + 2 * _MESSAGE_BYTES <= self.capacity_bytes  # a gap may go with it

    @abstractmethod
    def put(self, data: Data, recv_ns: int, sequence: int) -> int:
        """Take as much of `data` as there is room for; returns how many bytes (messages are taken whole)."""

    @abstractmethod
    def next(self) -> EventArray:
        """The next events, empty if nothing waits that could be decoded; valid until the next call."""

    def drop_oldest(self, size: int) -> int:
        """Make room for `size` bytes by dropping messages from the front; a gap stands in their place. Returns how many."""
        raise NotImplementedError

    def drop_newest(self) -> None:
        """A message is left out: a gap stands in its place."""
        raise NotImplementedError

    def cut(self) -> None:  # noqa: B027 (messages are whole)
        """The stream ends here, and another may begin: half a message is nothing any more."""

    def lost(self) -> None:
        """Something may be missing: besides :meth:`cut`, books that are kept in step by the venue's rules wait."""
        self.cut()

    def silent(self, now_ns: int) -> EventArray:
        """Events that are due because nothing has come."""
        return _NOTHING

    def put_snapshot(self, symbol: str, data: bytes, recv_ns: int) -> None:
        """Take a book's snapshot that was asked for."""
        raise NotImplementedError

    @property
    def next_sequence(self) -> int:
        """The source sequence of the next message; 0: not known."""
        return 0

    def expect(self, sequence: int) -> None:  # noqa: B027 (not all count)
        """The next message has this sequence."""

    @abstractmethod
    def counters(self) -> dict[str, int]:
        """Numbers for :class:`tickmesh.node.telemetry.SourceCounter`."""


# ---------------------------------------------------------------- decoded in Python

_GAP_HERE: tuple[bytes, int, int] = (b"", 0, -1)
"""A message that stands for those left out."""
_ENOUGH_EVENTS = 4 * OUT_EVENTS


def _is_plain(entry: tuple[bytes, int, int | str]) -> bool:
    """Whether it is a message of the venue as it came."""
    sequence = entry[2]
    return type(sequence) is int and sequence >= 0


class MessageIntake(Intake):
    """Whole messages for a decoder in Python. A message's `sequence`, if it has one, becomes that of its events."""

    drops = follows = True

    def __init__(self, venue: VenueFeed, options: Source) -> None:
        super().__init__(options.buffer_kb << 10)
        self.venue, self.feed = venue, venue
        self._queue: deque[tuple[bytes, int, int | str]] = deque()
        """Messages, their times, and their sequences (or of a snapshot by request, its symbol; -1: some are missing here)."""
        self._batch = EventBatch(max(1 << 13, 2 * venue.events_max))
        self._sequence = 0

    def put(self, data: Data, recv_ns: int, sequence: int) -> int:
        self._append(data if isinstance(data, bytes) else bytes(data), recv_ns, sequence)
        self.bytes += len(data)
        return len(data)

    def _append(self, data: bytes, recv_ns: int, sequence: int) -> None:
        self._queue.append((data, recv_ns, sequence))
        self.waiting_bytes += len(data) + _MESSAGE_BYTES

    def put_snapshot(self, symbol: str, data: bytes, recv_ns: int) -> None:
        self._queue.append((bytes(data), recv_ns, symbol))
        self.snapshots_waiting += 1
        self.waiting_bytes += len(data) + _MESSAGE_BYTES
        self.bytes += len(data)

    def next(self) -> EventArray:
        batch, queue = self._batch, self._queue
        batch.clear()
        while queue and batch.count < _ENOUGH_EVENTS:
            run = list(takewhile(_is_plain, islice(queue, RUN_MAX)))
            if run:
                self._decode(run)
            else:
                self._special(*self._taken())
        return batch.view()

    def _decode(self, run: list[Any]) -> None:
        """Messages of the venue, as many of a run as make enough events."""
        assert self.venue is not None
        for _ in range(self.venue.feed_many(run, self._batch, _ENOUGH_EVENTS)):
            sequence = self._taken()[2]
            if sequence:
                self._sequence = int(sequence) + 1

    def _taken(self) -> tuple[bytes, int, int | str]:
        found = self._queue.popleft()
        self.waiting_bytes -= len(found[0]) + _MESSAGE_BYTES
        return found

    def _special(self, data: bytes, recv_ns: int, symbol: int | str) -> None:
        """A snapshot that was asked for, or a gap."""
        if isinstance(symbol, int):
            self._gap()
            return
        assert isinstance(self.venue, BinanceFeed)
        self.snapshots_waiting -= 1
        self.venue.snapshot(symbol, data, recv_ns, self._batch)

    def _gap(self) -> None:
        assert self.venue is not None
        self.venue.lost()
        now_ns = time.time_ns()
        self._batch.append(Kind.GAP, ALL_INSTRUMENTS, now_ns, now_ns, NO_SIDE, 0, 0)

    def drop_oldest(self, size: int) -> int:
        dropped = 0
        while self._queue and not self.has_room(size):
            sequence = self._taken()[2]
            dropped += sequence != -1
            self.snapshots_waiting -= isinstance(sequence, str)
        self._queue.appendleft(_GAP_HERE)
        self.waiting_bytes += _MESSAGE_BYTES
        return dropped

    def drop_newest(self) -> None:
        if not self._queue or self._queue[-1] is not _GAP_HERE:
            self._queue.append(_GAP_HERE)
            self.waiting_bytes += _MESSAGE_BYTES

    def lost(self) -> None:
        assert self.venue is not None
        self.cut()
        self.venue.lost()

    @property
    def next_sequence(self) -> int:
        return self._sequence

    def expect(self, sequence: int) -> None:
        self._sequence = sequence

    def counters(self) -> dict[str, int]:
        assert self.venue is not None
        of_books = self.venue.counters
        return {
            "messages": self.venue.messages.total(),
            "bytes": self.bytes,
            "malformed": sum(self.venue.malformed.values()),
            "duplicates": self.duplicates,
            "gaps": of_books["gaps"],
            "filtered": of_books["filtered"],
            "books_waiting": len(self.venue.snapshots_wanted),
            "checksums_failed": of_books["checksums_failed"],
            "restarts": of_books["restarts"],
        }


class LineIntake(MessageIntake):
    """A stream of lines, each a message, ``<time> <message>`` or a CSV row; for a decoder in Python."""

    def __init__(self, venue: VenueFeed, options: Source, *, timed: bool) -> None:
        super().__init__(venue, options)
        self._line_bytes_max, self._timed = options.message_max_kb << 10, timed
        self._rest, self._skipping = bytearray(), False

    def put(self, data: Data, recv_ns: int, sequence: int) -> int:
        head, *lines = bytes(data).split(b"\n")
        self._rest += head  # in place: a line that trickles costs what it is long, and not its square
        for line in lines:
            self._line(bytes(self._rest), recv_ns)
            self._rest = bytearray(line)
        if len(self._rest) > self._line_bytes_max:
            self._too_long()
            self._rest, self._skipping = bytearray(), True
        self.bytes += len(data)
        return len(data)

    def _too_long(self) -> None:
        assert self.venue is not None
        self.venue.malformed["too_long"] += not self._skipping

    def _line(self, line: bytes, recv_ns: int) -> None:
        if self._skipping:
            self._skipping = False
            return
        line = line.strip()
        if not line:
            return
        found = split_time(line) if self._timed else (0, line)
        if found is not None:
            self._append(found[1], found[0] or recv_ns, 0)
            return
        assert self.venue is not None
        self.venue.malformed["bad_line"] += 1

    def cut(self) -> None:
        assert self.venue is not None
        if self._rest:
            self.venue.malformed["truncated"] += 1
        self._rest, self._skipping = bytearray(), False


# ---------------------------------------------------------------- decoded by compiled code


class _SpecIntake(Intake):
    """What the intakes of spec'd protocols share."""

    def __init__(
        self, spec: Spec, framing: Framing, options: Source, table: InstrumentTable, number: int, progress: Progress, size: int
    ) -> None:
        super().__init__(size)
        self.spec, self.order_ids = spec, spec.order_ids
        self.decoder: Any = load_decoder(spec, framing, fields=protocol_fields(options), progress=progress)
        table.let_through(number, options.symbols, options.exclude)
        wait_ns = int(options.gap_wait_ms * 1e6)
        self.feed = make_feed(spec, table, number, framing=framing, midnight_ns=options.midnight_ns(), gap_wait_ns=wait_ns)
        self._out = zeros_aligned(OUT_EVENTS, EVENT)

    def counters(self) -> dict[str, int]:
        assert self.spec is not None
        return {
            "messages": sum(message_counts(self.feed, self.spec).values()),
            "bytes": self.bytes,
            "malformed": sum(malformed(self.feed).values()),
            "duplicates": self.duplicates,
            "filtered": filtered(self.feed),
        }


class StreamIntake(_SpecIntake):
    """Bytes of length-prefixed messages, in pieces of any size; no message passes through Python.

    With a `sequence` for each piece (a message of a broker, say) the events of the piece have that, and not one each.
    """

    follows = True

    def __init__(self, spec: Spec, framing: Framing, options: Source, table: InstrumentTable, number: int, progress: Progress) -> None:
        size = max(options.buffer_kb, options.message_max_kb) << 10
        super().__init__(spec, framing, options, table, number, progress, size)
        self._message_bytes_max = options.message_max_kb << 10
        self._buffer = np.zeros(size + SLACK, np.uint8)
        self._at = self._end = 0
        self._recv_ns = 0
        self._marks: deque[tuple[int, int]] = deque()
        """Ends of pieces that have a sequence, and that."""
        self._is_open = False
        """The last of them found room for a part only; the rest follows."""

    def has_room(self, size: int) -> bool:
        return self._end - self._at < self.capacity_bytes and (not self._marks or len(self._marks) < 4096)

    def put(self, data: Data, recv_ns: int, sequence: int) -> int:
        if self._end + len(data) > self.capacity_bytes and self._at:
            left = self._end - self._at
            self._buffer[:left] = self._buffer[self._at : self._end].copy()
            self._marks = deque((end - self._at, number) for end, number in self._marks)
            self._at, self._end = 0, left
        taken = min(len(data), self.capacity_bytes - self._end)
        self._buffer[self._end : self._end + taken] = np.frombuffer(data, np.uint8, taken)
        self._end += taken
        self._recv_ns = recv_ns
        self.bytes += taken
        self.waiting_bytes = self._end - self._at
        if sequence:
            if self._is_open:
                self._marks.pop()
            self._marks.append((self._end, sequence))
            self._is_open = taken < len(data)
        return taken

    def next(self) -> EventArray:
        while (found := self._next()) is None:
            pass
        return found

    def _next(self) -> EventArray | None:
        """What :meth:`next` gives; None: a piece has been stepped over, and there may be more."""
        end, sequence = self._marks[0] if self._marks else (self._end, 0)
        is_open = self._is_open and len(self._marks) == 1
        while self._at < end:
            before = self._at
            self._at, count = self.decoder.decode_stream(self._buffer, self._at, end, self._recv_ns, self.feed, self._out)
            self.waiting_bytes = self._end - self._at
            if count:
                if sequence:
                    self._out["seq"][:count] = sequence
                return self._out[:count]
            if self._at == before:
                if not sequence or is_open:
                    self._check_length()
                    return _NOTHING
                end_of_stream(self.feed, end - self._at)  # a message of the broker ends in the middle of one of the protocol
                self._at = end
        if sequence and not is_open:
            self._marks.popleft()
            self.feed.state[NEXT_SEQ] = sequence + 1
            return None
        return _NOTHING

    def _check_length(self) -> None:
        if self._end - self._at >= min(self._message_bytes_max, self.capacity_bytes):
            raise BrokenProtocol("the stream", f"a message of more than {self._message_bytes_max} bytes", "raise message_max_kb")

    def cut(self) -> None:
        end_of_stream(self.feed, self._end - self._at)
        self._at = self._end = self.waiting_bytes = 0
        self._marks.clear()
        self._is_open = False
        self.feed.state[STARTED] = 0

    @property
    def next_sequence(self) -> int:
        return int(self.feed.state[NEXT_SEQ])

    def expect(self, sequence: int) -> None:
        self.feed.state[NEXT_SEQ] = sequence


class PacketIntake(_SpecIntake):
    """Datagrams that come as messages: arbitrated by their sequences, like those of one multicast line."""

    drops = True

    def __init__(self, spec: Spec, framing: Framing, options: Source, table: InstrumentTable, number: int, progress: Progress) -> None:
        super().__init__(spec, framing, options, table, number, progress, options.buffer_kb << 10)
        self._queue: deque[tuple[Data, int]] = deque()
        self._buffer = np.zeros(_PACKETS * 2048 + _PACKET_BYTES_MAX + SLACK, np.uint8)
        self._packets = np.zeros(_PACKETS, PACKET)
        self._first = self._count = 0

    def put(self, data: Data, recv_ns: int, sequence: int) -> int:
        if len(data) > _PACKET_BYTES_MAX:  # no datagram is so long
            self.feed.malformed[BAD_LENGTH] += np.uint64(1)
            return len(data)
        self._queue.append((bytes(data), recv_ns))
        self.waiting_bytes += len(data) + _MESSAGE_BYTES
        self.bytes += len(data)
        return len(data)

    def next(self) -> EventArray:
        while True:
            self._first, count = self.decoder.decode_packets(self._buffer, self._packets, self._first, self._count, self.feed, self._out)
            if count:
                return self._out[:count]
            if self._first >= self._count and not self._load():
                return _NOTHING

    def _load(self) -> bool:
        """The next packets into the buffer."""
        at = self._first = self._count = 0
        while self._queue and self._count < _PACKETS and at + len(self._queue[0][0]) <= len(self._buffer) - SLACK:
            data, recv_ns = self._queue.popleft()
            self.waiting_bytes -= len(data) + _MESSAGE_BYTES
            self._buffer[at : at + len(data)] = np.frombuffer(data, np.uint8)
            packet = self._packets[self._count]
            packet["offset"], packet["length"], packet["line"], packet["ts_recv"] = at, len(data), 0, recv_ns
            at += len(data)
            self._count += 1
        return self._count > 0

    def silent(self, now_ns: int) -> EventArray:
        if self._first < self._count or self._queue:
            return _NOTHING
        return self._out[: int(self.decoder.decode_flush(now_ns, self.feed, self._out))]

    def drop_oldest(self, size: int) -> int:
        dropped = 0
        while self._queue and not self.has_room(size):
            self.waiting_bytes -= len(self._queue.popleft()[0]) + _MESSAGE_BYTES
            dropped += 1
        return dropped  # the arbiter sees what is missing

    def drop_newest(self) -> None:
        return

    def counters(self) -> dict[str, int]:
        lines = arbitration(self.feed)
        return {**super().counters(), **{name: lines[name] for name in ("packets", "gaps", "missing", "duplicates")}}


# ---------------------------------------------------------------- choosing


def make_intake(
    name: str,
    options: Source,
    table: InstrumentTable,
    number: int,
    *,
    stream: bool,
    timed: bool = False,
    progress: Progress = None,
    folder: Path = Path(),
) -> Intake:
    """The intake for a source's protocol.

    Args:
        stream: whether the adapter gives pieces of a stream, not messages.
        timed: whether lines of a stream may begin with their time of receipt.
        folder: where relative paths in a FIX `data_format` start.

    Raises:
        SourceError: the protocol cannot come this way.
        SpecError, MappingError: the protocol or the field mapping is wrong.
    """
    chosen = options.data_format or ""
    if chosen == "csv":
        if not options.columns:
            raise SourceError(name, "csv that comes live has no header row: name its columns")
        rows = CsvFeed(options, table, options.columns, number)
        return LineIntake(rows, options, timed=False) if stream else MessageIntake(rows, options)
    if chosen in ("lobster", "dbn_mbo"):
        raise SourceError(name, f'{chosen} is read from whole files: take type = "file" without follow')
    if chosen in VENUE_FEEDS:
        feed = compiled_feed(options, table, number, progress)
        return LineIntake(feed, options, timed=timed) if stream else MessageIntake(feed, options)
    if is_fix(chosen):
        from tickmesh.node.fix_intake import FixIntake  # it is made of what is above

        return FixIntake(name, options, table, number, folder, progress)
    spec, framing = spec_and_framing(name, options)
    kind = PacketIntake if framing.packets else StreamIntake
    if framing.packets and stream:
        raise SourceError(name, f"{framing.name} frames datagrams, and this is a stream: name another framing")
    return kind(spec, framing, options, table, number, progress)


def codes_of(table: InstrumentTable, number: int) -> Mapping[int, int]:
    """The venue's numeric codes of a source's instruments, by instrument."""
    records = table.arrays.records[: len(table)]
    mine = np.flatnonzero((records["source"] == number) & (records["code"] != 0))
    return {int(i): int(records["code"][i]) for i in mine}
