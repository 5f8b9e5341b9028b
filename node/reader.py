"""Readers: recorded feeds, whatever their format, as batches of events.

:func:`open_reader` picks the reader of a source's `data_format`. A spec'd protocol is decoded by compiled code
(:class:`StreamReader`, :class:`PacketReader`), a venue's JSON and CSV by Python decoders (:class:`BatchReader`). All count what they
read the same way, so that a replay and a live node report the same numbers.
"""

from __future__ import annotations

import ipaddress
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tickmesh.control.config import Refusal, Source
from tickmesh.node.csv_feed import csv_events, lobster_events
from tickmesh.node.decoder import (
    arbitration,
    bind_symbol,
    configured,
    dbn_symbols,
    decoder_parts,
    definition_counters,
    end_of_stream,
    filtered,
    load_decoder,
    make_feed,
    malformed,
    message_counts,
    snapshot_counters,
)
from tickmesh.node.event import EventArray
from tickmesh.node.event_batch import EventBatch
from tickmesh.node.feed import STARTED, bind_code
from tickmesh.node.fix_decoder import FINAL, HELD, SKIPPED, STEP
from tickmesh.node.fix_dictionary import DictionaryError
from tickmesh.node.fix_feed import fix_counters, fix_malformed, fix_message_counts, fix_parts, load_fix_decoder, open_fix_feed
from tickmesh.node.fix_mapping import FixMappingError, is_fix
from tickmesh.node.instruments import FILTERED, InstrumentTable, InstrumentTableFull, SymbolFiltered
from tickmesh.node.json_compiled import RUN_MAX
from tickmesh.node.json_feed import VenueFeed
from tickmesh.node.protocol import Framing, MappingError, Spec, SpecError, is_sbe, load_framing, load_spec
from tickmesh.node.sbe_mapping import SbeSpec
from tickmesh.node.venues import VENUE_FEEDS, compiled_feed
from tickmesh.transports.capture import read_capture
from tickmesh.transports.recording import SLACK, Problem, read_bytes, read_lines

USUAL_FRAMING = {
    "itch50": ("binaryfile", "moldudp64"), "nasdaq_bbo": ("binaryfile", "moldudp64"), "jnx_itch": ("binaryfile", "moldudp64"),
    "iex_deep_plus": ("iex_tp", "iex_tp"), "iex_deep": ("iex_tp", "iex_tp"), "iex_tops": ("iex_tp", "iex_tp"),
    "cboe_pitch": ("", "cboe_unit"), "cboe_pitch_options": ("", "cboe_unit"), "cboe_pitch_complex": ("", "cboe_unit"),
    "cboe_cfe_pitch": ("", "cboe_unit"), "memx_memoir_depth": ("", "memx_udp"), "dbn_mbo": ("dbn", "dbn"),
    "miax_onyx_tom": ("", "miax_mach"),
}  # fmt: skip
"""Framing of a shipped protocol in a file and in packets, for a source that names none."""
CSV_FORMATS = ("lobster", "csv")

Progress = Callable[[str], None] | None


class SourceError(Exception):
    """A source cannot be read.

    Attributes:
        source: its name.
        reason: what is wrong, and what to do.
    """

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"data_sources.{source}: {reason}")
        self.source, self.reason = source, reason


class Reader(ABC):
    """A recorded feed as events.

    Attributes:
        format: the protocol's name.
        order_ids: how the venue numbers orders (see :func:`tickmesh.node.book.make_books`).
        bytes: size of what is read, decompressed.
    """

    format: str = ""
    order_ids: str = "random"
    bytes: int = 0

    @abstractmethod
    def read(self, out: EventArray) -> int:
        """Fill `out` from the start; returns how many events, 0 at the end."""

    @property
    @abstractmethod
    def messages(self) -> dict[str, int]:
        """Messages by type."""

    @property
    @abstractmethod
    def malformed(self) -> dict[str, int]:
        """Refused input by reason."""

    @property
    def duplicates(self) -> int:
        """Messages or packets that came again and were dropped."""
        return 0

    def counters(self) -> dict[str, int]:
        """Numbers for :class:`tickmesh.node.telemetry.SourceCounter`."""
        return {
            "messages": sum(self.messages.values()),
            "bytes": self.bytes,
            "malformed": sum(self.malformed.values()),
            "duplicates": self.duplicates,
        }


# ---------------------------------------------------------------- compiled


class _SpecReader(Reader):
    """What the readers of spec'd protocols share."""

    def __init__(
        self, spec: Spec, framing: Framing, options: Source, table: InstrumentTable, source: int, progress: Progress, alone: bool,
        name: str = "",
    ) -> None:  # fmt: skip
        self.spec, self.framing, self.format, self.order_ids = spec, framing, spec.name, spec.order_ids
        fields = protocol_fields(options)
        self.decoder: Any = (
            load_decoder(spec, framing, fields=fields, progress=progress) if alone else decoder_parts(spec, framing, fields=fields)
        )
        table.let_through(source, options.symbols, options.exclude)
        self._table = table
        self.feed = make_feed(
            spec, table, source, framing=framing, midnight_ns=options.midnight_ns(), gap_wait_ns=int(options.gap_wait_ms * 1e6),
            recovery_line=recovery_line(name, options, spec, SNAPSHOT_LINE),
            definition_line=definition_line(name, options, spec, framing, DEFINITION_LINE),
        )  # fmt: skip
        self.problems: list[Problem] = []

    @property
    def messages(self) -> dict[str, int]:
        return message_counts(self.feed, self.spec)

    @property
    def malformed(self) -> dict[str, int]:
        damaged = Counter(f"recording_{problem.kind}" for problem in self.problems)
        return {**malformed(self.feed), **damaged}

    @property
    def duplicates(self) -> int:
        return arbitration(self.feed)["duplicates"]

    def counters(self) -> dict[str, int]:
        lines = arbitration(self.feed)
        more = {name: lines[name] for name in ("packets", "gaps", "missing")} | snapshot_counters(self.feed, self._table)
        return {**super().counters(), "filtered": filtered(self.feed), **more, **definition_counters(self.feed)}


class StreamReader(_SpecReader):
    """Files that hold a stream of messages, one after the other."""

    def __init__(self, files: Sequence[Path], spec: Spec, framing: Framing, options: Source, table: InstrumentTable, *more: Any) -> None:
        super().__init__(spec, framing, options, table, *more)
        self._files = list(files)
        self.buffer: Any = None
        self.position = self.end = 0
        self._spec_table = table
        self.next_file()

    def next_file(self) -> bool:
        """Go to the next file; false if there is none. What is left of the current one counts as a message cut short."""
        if self.buffer is not None:
            end_of_stream(self.feed, self.end - self.position)
        if not self._files:
            self.buffer = None
            return False
        self.buffer = read_bytes(self._files.pop(0), problems=self.problems)
        self.position, self.end = 0, len(self.buffer) - SLACK
        self.bytes += self.end
        self.feed.state[STARTED] = 0  # every file has its own preamble
        if self.framing.preamble_magic == b"DBN":
            self._bind_dbn_symbols()
        return True

    def _bind_dbn_symbols(self) -> None:
        try:
            symbols = dbn_symbols(memoryview(self.buffer)[: self.end])
        except ValueError:
            return  # the decoder counts a bad preamble
        for code, symbol in symbols.items():
            try:
                bind_symbol(self.feed, self.spec, self._spec_table, code, symbol)
            except SymbolFiltered:
                bind_code(self.feed, np.uint64(code), np.uint32(FILTERED))
            except (InstrumentTableFull, ValueError):
                continue  # the decoder counts the messages that name it

    def read(self, out: EventArray) -> int:
        while self.buffer is not None:
            before = self.position
            self.position, count = self.decoder.decode_stream(self.buffer, self.position, self.end, 0, self.feed, out)
            if count:
                return int(count)
            if (self.position >= self.end or self.position == before) and not self.next_file():
                return 0
        return 0


class FixReader(StreamReader):
    """Files of FIX messages: a session's bytes, or a log with one message per line."""

    def __init__(
        self,
        name: str,
        files: Sequence[Path],
        options: Source,
        table: InstrumentTable,
        source: int,
        progress: Progress,
        alone: bool,
        folder: Path,
    ) -> None:
        self.format = options.data_format or ""
        self.order_ids = "per_instrument"
        self.decoder = load_fix_decoder(progress) if alone else fix_parts()
        try:
            self.arrays = open_fix_feed(options, table, source, folder)
        except (FixMappingError, DictionaryError, OSError) as error:
            raise SourceError(name, str(error)) from error
        self.feed: Any = self.arrays  # by the name that loops know it under
        self.arrays.state[FINAL] = 1  # a file is read as a whole: what is not there does not come
        self.problems = []
        self._files = list(files)
        self.buffer = None
        self.position = self.end = 0
        self.next_file()

    def next_file(self) -> bool:
        """Go to the next file; false if there is none."""
        self.arrays.state[[STEP, HELD, SKIPPED]] = 0
        self.buffer = read_bytes(self._files.pop(0), problems=self.problems) if self._files else None
        if self.buffer is None:
            return False
        self.position, self.end = 0, len(self.buffer) - SLACK
        self.bytes += self.end
        return True

    @property
    def messages(self) -> dict[str, int]:
        return fix_message_counts(self.arrays)

    @property
    def malformed(self) -> dict[str, int]:
        return {**fix_malformed(self.arrays), **Counter(f"recording_{problem.kind}" for problem in self.problems)}

    @property
    def duplicates(self) -> int:
        return fix_counters(self.arrays)["duplicates"]

    def counters(self) -> dict[str, int]:
        more = fix_counters(self.arrays)
        return {**Reader.counters(self), **{name: more[name] for name in ("filtered", "gaps", "missing")}}


class PacketReader(_SpecReader):
    """Packet captures; the datagrams of lines A and B are arbitrated."""

    def __init__(self, files: Sequence[Path], spec: Spec, framing: Framing, options: Source, table: InstrumentTable, *more: Any) -> None:
        super().__init__(spec, framing, options, table, *more)
        lines = capture_lines(options)
        self._beside = _lines_beside(options)
        self._batches = (batch for path in files for batch in self._file(path, lines))
        self.buffer: Any = None
        self.packets: Any = None
        self.position = self.count = 0
        self._flushed = False
        self._last_ns = 0

    def _file(self, path: Path, lines: Mapping[tuple[str, int], int] | None) -> Iterator[tuple[Any, Any]]:
        capture = read_capture(path, problems=self.problems)
        self.bytes += path.stat().st_size
        for packets in capture.batches(lines):
            for (address, port), line in self._beside.items():
                packets["line"][(packets["address"] == int(ipaddress.IPv4Address(address))) & (packets["port"] == port)] = line
            yield capture.buffer, packets

    def next_batch(self) -> bool:
        """Go to the next run of datagrams; false if there is none."""
        following = next(self._batches, None)
        if following is None:
            self.buffer = None
            return False
        self.buffer, self.packets = following
        self.position, self.count = 0, len(self.packets)
        if self.count:
            self._last_ns = int(self.packets[-1]["ts_recv"])
        return True

    def read(self, out: EventArray) -> int:
        while True:
            if self.buffer is None and not self.next_batch():
                return self._flush(out)
            self.position, count = self.decoder.decode_packets(self.buffer, self.packets, self.position, self.count, self.feed, out)
            if count:
                return int(count)
            if self.position >= self.count:
                self.buffer = None

    @property
    def flush_ns(self) -> int:
        """A time at which nothing missing can come any more."""
        return self._last_ns + (1 << 60)

    def _flush(self, out: EventArray) -> int:
        return int(self.decoder.decode_flush(self.flush_ns, self.feed, out))


# ---------------------------------------------------------------- decoders in Python


class BatchReader(Reader):
    """Formats whose decoder is Python: an iterator of filled batches."""

    def __init__(self, format: str, batches: Iterator[tuple[Any, EventArray]], size: int) -> None:
        self.format, self._batches, self.bytes = format, batches, size
        self._feed: Any = None
        self._left: EventArray | None = None
        self._messages: Counter[str] = Counter()
        self._malformed: Counter[str] = Counter()

    def read(self, out: EventArray) -> int:
        while self._left is None or not len(self._left):
            following = next(self._batches, None)
            if following is None:
                return 0
            if self._feed is not None and following[0] is not self._feed:
                self._messages += self._feed.messages
                self._malformed += self._feed.malformed
            self._feed, self._left = following
        count = min(len(out), len(self._left))
        out[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    @property
    def messages(self) -> dict[str, int]:
        return dict(self._messages + self._feed.messages) if self._feed is not None else {}

    @property
    def malformed(self) -> dict[str, int]:
        return dict(self._malformed + self._feed.malformed) if self._feed is not None else {}


def _venue_batches(files: Sequence[Path], feed: VenueFeed, batch: EventBatch, at_once: int) -> Iterator[tuple[VenueFeed, EventArray]]:
    """Batches end with every `at_once`-th recorded line: with each, a reader can pace them."""
    for path in files:
        problems: list[Problem] = []
        lines = ((payload, recv_ns, 0) for recv_ns, payload in read_lines(path, problems=problems))
        while run := list(islice(lines, at_once)):
            while run:
                run = run[feed.feed_many(run, batch) :]
                if batch.count:
                    yield feed, batch.view()
                    batch.clear()
        feed.malformed.update(f"recording_{problem.kind}" for problem in problems)
    yield feed, batch.view()


# ---------------------------------------------------------------- choosing


def protocol_fields(options: Source) -> dict[str, str] | list[str]:
    """The `fields` of a spec'd source as the decoder takes them: protocol field -> event field."""
    return {wanted.path: event for event, wanted in options.fields.items()}


SNAPSHOT_LINE, DEFINITION_LINE = 2, 3
"""The lines of a capture's snapshots and definitions; what is on no line of its own is A."""


def _destination(endpoint: str) -> tuple[str, int]:
    """Address and port of ``udp://ADDRESS:PORT``."""
    address, port = endpoint.removeprefix("udp://").rsplit(":", 1)
    return address, int(port)


def _lines_beside(options: Source) -> dict[tuple[str, int], int]:
    """Destination -> line of what a capture holds beside the feed."""
    beside = ((options.snapshot_endpoint, SNAPSHOT_LINE), (options.definition_endpoint, DEFINITION_LINE))
    return {_destination(endpoint): line for endpoint, line in beside if endpoint}


def capture_lines(options: Source) -> dict[tuple[str, int], int] | None:
    """Destination -> line (0 = A, 1 = B, and what is beside the feed) of a packet capture; None takes every datagram as line A."""
    lines = {_destination(endpoint): line for line, endpoint in enumerate((options.endpoint, options.endpoint_b)) if endpoint}
    return {**lines, **_lines_beside(options)} if lines else None


def recovery_line(name: str, options: Source, spec: Spec, line: int) -> int:
    """`line`, the one of the snapshots, if the source has a snapshot channel; else -1.

    Raises:
        SourceError: the protocol does not know what a snapshot contains.
    """
    if not options.snapshot_endpoint:
        return -1
    if not isinstance(spec, SbeSpec) or not spec.processed:
        reason = f"snapshot_endpoint needs a mapping with [recovery], such as cme_mdp3, and {spec.name!r} has none; remove the key"
        raise SourceError(name, reason)
    return line


def definition_line(name: str, options: Source, spec: Spec, framing: Framing, line: int) -> int:
    """`line`, the one of the definitions, if the source has a definition channel; else -1.

    Raises:
        SourceError: the protocol does not define instruments in messages of their own, or the packets have no sequence.
    """
    if not options.definition_endpoint:
        return -1
    if not isinstance(spec, SbeSpec) or not spec.defines or not framing.packets or framing.sequence is None:
        reason = f"definition_endpoint needs an SBE mapping with events of kind \"reference\", in packets, and {spec.name!r} in"
        raise SourceError(name, f"{reason} {framing.name!r} is none; remove the key")
    return line


def spec_and_framing(name: str, options: Source) -> tuple[Spec, Framing]:
    """Protocol and framing of a source that a spec file describes.

    Raises:
        SourceError: there is no such protocol, or it needs a framing.
        SpecError: a spec file is wrong.
        MappingError: its prices cannot have the source's `price_scale`.
    """
    chosen = options.data_format or ""
    packets = options.type in ("pcap", "multicast")
    spec = load_spec(chosen) if is_sbe(chosen) else None
    usual = spec.framing if isinstance(spec, SbeSpec) else None
    framing = options.framing or usual or USUAL_FRAMING.get(chosen, ("", ""))[packets]
    if not framing:
        raise SourceError(name, f'name the framing of {chosen}: framing = "moldudp64"')
    found = spec or load_spec(chosen)
    return configured(found, options.price_scale, options.tick_size_of(""), options.quantity_exponent), load_framing(framing)


def check_price_scale(options: Source) -> list[Refusal]:
    """What is wrong with the `price_scale` of a source; what is wrong with its protocol is said when that is opened."""
    chosen, scale = options.data_format or "", options.price_scale
    if scale is None or chosen in ("json", "csv") or is_fix(chosen):
        return []
    if chosen in VENUE_FEEDS or chosen in CSV_FORMATS:
        return [Refusal("price_scale", f"has no meaning for {chosen}, whose prices are read as they stand", "remove it")]
    try:
        configured(load_spec(chosen), scale, None, None)
    except MappingError as error:
        return [Refusal("price_scale", "; ".join(one.removeprefix("price_scale: ") for one in error.problems), "change or remove it")]
    except SpecError:
        return []
    return []


def open_reader(
    name: str,
    options: Source,
    files: Sequence[Path],
    table: InstrumentTable,
    source: int = 0,
    progress: Progress = None,
    *,
    alone: bool = True,
    folder: Path = Path(),
) -> Reader:
    """The reader of a recorded source.

    Args:
        name: of the source, for messages.
        options: its configuration.
        files: what to read, in order.
        table: where its instruments are interned.
        source: the source's number.
        progress: told when a decoder has to be compiled.
        alone: whether it will be read from; otherwise its decoder is for a loop that contains it, and not compiled by itself.
        folder: where the relative path of a dictionary (FIX) starts.

    Raises:
        SourceError: a file is missing, or the format is not known.
        SpecError, MappingError: the protocol or the field mapping is wrong.
        RecordingError: a file cannot be read.
    """
    for path in files:
        if not path.is_file():
            raise SourceError(name, f"there is no file {path}")
    chosen = options.data_format or ""
    batch = EventBatch()
    size = sum(path.stat().st_size for path in files)
    if chosen in VENUE_FEEDS:
        feed, at_once = compiled_feed(options, table, source, progress), RUN_MAX if options.pace == "max" else 1
        return BatchReader(chosen, _venue_batches(files, feed, batch, at_once), size)
    if chosen in CSV_FORMATS:
        events = lobster_events if chosen == "lobster" else csv_events
        pairs: Iterator[tuple[Any, EventArray]] = (pair for path in files for pair in events(path, options, table, batch, source))
        return BatchReader(chosen, pairs, size)
    if is_fix(chosen):
        return FixReader(name, files, options, table, source, progress, alone, folder)
    spec, framing = spec_and_framing(name, options)
    if framing.packets:
        return PacketReader(files, spec, framing, options, table, source, progress, alone, name)
    return StreamReader(files, spec, framing, options, table, source, progress, alone)
