"""FIX that comes live: bytes of a stream, or whole messages, to the compiled decoder."""

from __future__ import annotations

from pathlib import Path

from tickmesh.control.config import Source
from tickmesh.node.event import EVENT, EventArray
from tickmesh.node.fix_decoder import EXPECTED, SENDER_KEY
from tickmesh.node.fix_dictionary import DictionaryError
from tickmesh.node.fix_feed import BUFFER_BYTES, FixFeed
from tickmesh.node.fix_mapping import FixMappingError
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.intake import OUT_EVENTS, Data, Intake
from tickmesh.node.reader import Progress, SourceError
from tickmesh.transports.toolbox import zeros_aligned

_COUNTERS = ("messages", "bytes", "malformed", "gaps", "missing", "duplicates", "filtered")
"""What a node shows of it (:class:`tickmesh.node.telemetry.SourceCounter`)."""


class FixIntake(Intake):
    """Keeps what has come until it is decoded; no message passes through Python.

    Raises:
        SourceError: the dictionary or the mapping cannot be used.
    """

    def __init__(self, name: str, options: Source, table: InstrumentTable, number: int, folder: Path, progress: Progress = None) -> None:
        super().__init__(min(options.buffer_kb << 10, BUFFER_BYTES // 2))
        try:
            self._feed = FixFeed(options, table, number, folder, progress)
        except (DictionaryError, FixMappingError, OSError) as error:
            raise SourceError(name, f"data_format = {options.data_format!r}: {error}") from error
        self.feed = self._feed.arrays
        self._peer = options.fix.target if options.fix is not None else ""
        self._out = zeros_aligned(OUT_EVENTS, EVENT)
        self._recv_ns = 0

    def put(self, data: Data, recv_ns: int, sequence: int) -> int:
        taken = min(len(data), self._feed.room)
        self._feed.append(memoryview(data)[:taken])
        self._recv_ns = recv_ns
        self.bytes += taken
        self.waiting_bytes = BUFFER_BYTES - self._feed.room
        return taken

    @property
    def next_sequence(self) -> int:
        return int(self.feed.state[EXPECTED])

    def expect(self, sequence: int) -> None:
        self.feed.state[EXPECTED] = sequence
        if self._peer:
            self.feed.state[SENDER_KEY] = sender_key(self._peer)

    def next(self) -> EventArray:
        count = self._feed.read(self._out, self._recv_ns)
        self.waiting_bytes = BUFFER_BYTES - self._feed.room if count else 0
        return self._out[:count]

    def cut(self) -> None:
        self._feed.begin()
        self.waiting_bytes = 0

    def counters(self) -> dict[str, int]:
        found = self._feed.counters()
        return {name: found[name] for name in _COUNTERS}


def sender_key(name: str) -> int:
    """What the decoder's state calls a SenderCompID: its first and last eight bytes as an i64 that is not 0."""
    raw, mask = name.encode("latin-1"), (1 << 64) - 1
    key = int.from_bytes(raw[:8], "little")
    if len(raw) > 8:
        key ^= int.from_bytes(raw[-8:], "little") * 0x9E3779B97F4A7C15 & mask
    return (key | 1 << 63) - (1 << 64)
