"""FIX as a feed: the compiled decoder as a module for loops, and :class:`FixFeed`, which takes byte chunks as they come from a socket.

>>> feed = FixFeed(options, table)
>>> feed.append(sock.recv(65536))
>>> while count := feed.read(events):
...     deliver(events[:count])
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tickmesh.control.config import Source
from tickmesh.node import fix_decoder as decoder
from tickmesh.node.event import EventArray
from tickmesh.node.feed import FILTERED_MESSAGES, TRUNCATED
from tickmesh.node.fix_decoder import REASONS, FixArrays, make_fix_arrays
from tickmesh.node.fix_frame import BODY_BYTES_MAX
from tickmesh.node.fix_mapping import dictionary_of, fix_tables
from tickmesh.node.fix_slots import COUNTERS
from tickmesh.node.instruments import InstrumentTable, InstrumentTableFull, SymbolFiltered
from tickmesh.transports.byte_masks import SLACK_BYTES
from tickmesh.transports.codecache import import_generated, load_generated, write_generated

BUFFER_BYTES = 4 * BODY_BYTES_MAX
"""Most bytes that a :class:`FixFeed` holds: what came at once, and a message whose end is awaited."""
_PREFIX = "decoder_fix"

_MODULE = '''\
"""Decoder of FIX messages: what a source's tables say becomes events. Generated; the work is in tickmesh/node/fix_decoder.py."""
import numpy as np

from tickmesh.node.event import EVENT
from tickmesh.node.fix_decoder import ROOM_MIN, fix_events, warm_fix_feed
from tickmesh.transports.toolbox import loop, outlined


@outlined
def stream_events(buf, pos, end, ts_recv, feed, out):
    return fix_events(buf, pos, end, ts_recv, feed, out)


@loop
def decode_stream(buf, pos, end, ts_recv, feed, out):
    """Decode messages of ``buf[pos:end]`` into `out`; returns (pos, n)."""
    return fix_events(buf, pos, end, ts_recv, feed, out)


def warm_feed():
    """A feed of the final types."""
    return warm_fix_feed()


def warm():
    """Compile the entry point."""
    feed = warm_feed()
    decode_stream(np.zeros(128, np.uint8), 0, 0, 0, feed, np.zeros(ROOM_MIN, EVENT))
    return feed
'''


class FixDecoder(Protocol):
    """What the module offers."""

    decode_stream: Callable[..., tuple[int, int]]


def load_fix_decoder(progress: Callable[[str], None] | None = None) -> Any:
    """The compiled decoder's module; it is one for all sources, whose tables are data.

    Raises:
        CompileError: it does not compile.
    """
    return load_generated(_PREFIX, _MODULE, progress)


def fix_parts() -> Any:
    """The decoder's module, not compiled: for a loop that contains it."""
    return import_generated(write_generated(_PREFIX, _MODULE))


def open_fix_feed(options: Source, table: InstrumentTable, source: int = 0, folder: Path = Path()) -> FixArrays:
    """State of a FIX source's decoder; instruments with settings of their own are given their ids.

    Args:
        folder: where a relative path of a dictionary starts.

    Raises:
        DictionaryError, OSError: the dictionary cannot be used.
        FixMappingError: `fields` cannot work.
    """
    tables = fix_tables(options.fields, dictionary_of(options.data_format or "", folder))
    table.let_through(source, options.symbols, options.exclude)
    tick = options.tick_size_of("")
    exponent = -1 if options.quantity_exponent is None else options.quantity_exponent
    feed = make_fix_arrays(table.arrays, tables, source=source, tick_size=tick or 0, qty_exponent=exponent)
    for symbol in options.instruments:
        _intern(options, table, source, symbol)
    return feed


def _intern(options: Source, table: InstrumentTable, source: int, symbol: str) -> None:
    """A symbol whose tick size and exponent are configured; one that has only one of them gets the usual other."""
    tick, exponent = options.tick_size_of(symbol), options.quantity_exponent_of(symbol)
    try:
        table.intern(symbol, source, 10_000_000 if tick is None else tick, 0 if exponent is None else exponent)
    except (InstrumentTableFull, SymbolFiltered):
        return  # the decoder counts its messages


def fix_message_counts(feed: FixArrays) -> dict[str, int]:
    """Messages by kind, those that came only."""
    return {name: int(n) for name, n in zip(COUNTERS, feed.counts) if n}


def fix_malformed(feed: FixArrays) -> dict[str, int]:
    """Refused messages, entries and runs of bytes by reason, those that occurred only."""
    return {name: int(n) for name, n in zip(REASONS, feed.malformed) if n}


def fix_counters(feed: FixArrays) -> dict[str, int]:
    """What else was counted: `gaps`, `missing`, `duplicates`, `filtered`, `restarts` (the sequence began anew), `unknown_tags` (with a
    dictionary), `entries_ignored` (statistics, order states: no event stands for them)."""
    words = {
        "gaps": decoder.GAPS, "missing": decoder.MISSING, "duplicates": decoder.DUPLICATES, "filtered": FILTERED_MESSAGES,
        "restarts": decoder.RESTARTS, "unknown_tags": decoder.UNKNOWN_TAGS, "entries_ignored": decoder.ENTRIES_IGNORED,
    }  # fmt: skip
    return {name: int(feed.state[word]) for name, word in words.items()}


class FixFeed:
    """A FIX source's bytes, in chunks that end anywhere, to events.

    Args:
        options: the source's configuration: `data_format` (``"fix44"``, ``"fix:FIX44.xml"``), `fields`, symbols, tick sizes, exponents.
        table: where its instruments are interned.
        source: the source's number.
        folder: where a relative path of a dictionary starts.
        progress: told when the decoder has to be compiled.

    Attributes:
        arrays: the decoder's state.
        bytes: how many have come.

    Raises:
        DictionaryError, OSError, FixMappingError: see :func:`open_fix_feed`.
    """

    def __init__(
        self, options: Source, table: InstrumentTable, source: int = 0, folder: Path = Path(), progress: Callable[[str], None] | None = None
    ) -> None:
        self.arrays = open_fix_feed(options, table, source, folder)
        self.bytes = 0
        self._decode = load_fix_decoder(progress).decode_stream
        self._buffer = np.zeros(BUFFER_BYTES + SLACK_BYTES, np.uint8)
        self._first = self._end = 0

    @property
    def room(self) -> int:
        """How many bytes :meth:`append` can take now: once :meth:`read` returned 0, all of BUFFER_BYTES but a message's beginning."""
        return BUFFER_BYTES - (self._end - self._first)

    def append(self, chunk: bytes | memoryview) -> None:
        """Take bytes.

        Raises:
            ValueError: there are more than :attr:`room`.
        """
        data = np.frombuffer(chunk, np.uint8)
        if len(data) > self.room:
            raise ValueError(f"{len(data)} bytes, but there is room for {self.room}: read() until it returns 0 first")
        if self._end + len(data) > BUFFER_BYTES:
            kept = self._end - self._first
            self._buffer[:kept] = self._buffer[self._first : self._end].copy()
            self._first, self._end = 0, kept
        self._buffer[self._end : self._end + len(data)] = data
        self._end += len(data)
        self.bytes += len(data)

    def read(self, out: EventArray, recv_ns: int = 0) -> int:
        """Fill `out`, of at least 8 events, from its start; returns how many, 0 when more bytes are needed.

        Args:
            recv_ns: when the bytes were received, ns since 1970; 0: the messages' SendingTime stands for it.
        """
        while self._first < self._end:
            before = self._first
            position, count = self._decode(self._buffer, self._first, self._end, recv_ns, self.arrays, out)
            self._first = int(position)
            if count:
                return int(count)
            if self._first == before:
                break
        if self._first == self._end:
            self._first = self._end = 0
        return 0

    def end(self) -> None:
        """The stream has ended: what is left is cut short; :meth:`read` may still find whole messages behind it. A new stream may begin."""
        self.arrays.state[decoder.FINAL] = 1

    def begin(self) -> None:
        """A new stream begins (a connection anew): forget the beginning of a message that never ended."""
        if self._end > self._first:
            self.arrays.malformed[TRUNCATED] += np.uint64(1)
        self._first = self._end = 0
        self.arrays.state[[decoder.FINAL, decoder.IN_GARBAGE, decoder.STEP, decoder.HELD, decoder.SKIPPED]] = 0

    @property
    def messages(self) -> dict[str, int]:
        """Messages by kind."""
        return fix_message_counts(self.arrays)

    @property
    def malformed(self) -> dict[str, int]:
        """Refused messages, entries and runs of bytes by reason."""
        return fix_malformed(self.arrays)

    def counters(self) -> dict[str, int]:
        """Numbers for :class:`tickmesh.node.telemetry.SourceCounter`, and more (:func:`fix_counters`)."""
        totals = {"messages": sum(self.messages.values()), "bytes": self.bytes, "malformed": sum(self.malformed.values())}
        return {**totals, **fix_counters(self.arrays)}
