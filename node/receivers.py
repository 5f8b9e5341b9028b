"""Receivers: one thread per source that turns its bytes into events and routes them to the shards' input rings.

Multicast is compiled end to end. Recordings and in-process generators (the market simulator) are paced by Python, block by block.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import structlog

from tickmesh.control.config import CONNECTED, Config, Source
from tickmesh.node.arbiter import (
    CLEAR_DUE,
    EXPECTED,
    FIRST_SEQUENCE,
    FORCE_TO,
    HAS_SESSION,
    JUMP_MAX,
    PREVIOUS_SESSION,
    SESSION,
    START_SEQUENCE,
)  # fmt: skip
from tickmesh.node.continuation import Place
from tickmesh.node.decoder import (
    arbitration,
    decoder_parts,
    definition_counters,
    filtered,
    load_decoder,
    make_feed,
    malformed,
    message_counts,
    since_when,
    snapshot_counters,
)
from tickmesh.node.event import EVENT, EventArray
from tickmesh.node.feed import (
    BAD_SEQUENCE,
    MIDNIGHT_NS,
    REBIND,
    RESOLVED_BELOW,
    SHORT_PACKET,
    SINCE,
    SOURCE,
    TIME_BASE_NS,
    UNBOUND,
    Feed,
    bind_unannounced,
)
from tickmesh.node.instruments import EXCLUDED, FILTERED, InstrumentTable
from tickmesh.node.loops import receive_loop
from tickmesh.node.order_map import take_orders
from tickmesh.node.protocol import Field, load_framing, load_spec
from tickmesh.node.reader import Reader, SourceError, definition_line, open_reader, protocol_fields, recovery_line, spec_and_framing
from tickmesh.node.recovery import LINE, NEVER, ask_for_books, want_books
from tickmesh.node.rerequest import FOREVER_NS, Rerequest, RerequestCounters, can_rerequest
from tickmesh.node.router import ROUTE_EVENTS, S_MARKS, Router, make_router, route_now
from tickmesh.node.timers import C_EVENT, NOT_LIVE, go_on
from tickmesh.transports.pacing import Pace
from tickmesh.transports.privileges import PrivilegeError, drop_capabilities
from tickmesh.transports.receive_path import (
    LACK_ABOUT,
    SOCKETS,
    WAY_NUMBERS,
    BypassRefused,
    Lack,
    OpenPath,
    Refusal,
    Wish,
    lacking,
    open_way,
    ways_of,
)
from tickmesh.transports.ring import Ring
from tickmesh.transports.toolbox import zeros_aligned

Progress = Callable[[str], None] | None
_log = structlog.get_logger("receiver")
_MASK = (1 << 64) - 1
_PACE_SLICE_S = 0.05
"""A paced receiver looks at its stop flag at least this often."""


class BlockSource(Protocol):
    """A generator of framed messages inside this process, e.g. the market simulator."""

    @property
    def finished(self) -> bool:
        """Whether the last message has been given out."""

    @property
    def next_ns(self) -> int:
        """Time of the next message on the generator's clock."""

    def next_block(self, max_messages: int, until_ns: int) -> tuple[Any, int]:
        """The next messages, up to that time of the generator's clock: BinaryFILE-framed in ``image[:end]``, 64 bytes of slack behind."""


BlockSourceMaker = Callable[[Source, Progress], BlockSource]
"""Makes the generator of a source, ready to run; it tells when something has to be compiled for it."""


@dataclass
class ReceiverContext:
    """What every receiver of a node gets.

    Attributes:
        table: the node's instruments.
        rings: this source's input ring of each shard.
        number: the source's number.
        idle_mode: how a polling loop waits.
        timer_ns: distance of the source's timers; 0: none.
    """

    table: InstrumentTable
    rings: Sequence[Ring]
    number: int
    idle_mode: int
    progress: Progress = None
    timer_ns: int = 0


class Receiver(ABC):
    """A source and its thread.

    Attributes:
        order_ids: how the venue numbers orders.
        finished: a recording has been read to its end.
        begun_at: the source's sequence that its first packet had; 0: none has come, or the source has none.
        error: what ended the thread early.
    """

    order_ids = "random"

    def __init__(self, name: str, options: Source, context: ReceiverContext, *, restamp: bool, hold_ns: int = NOT_LIVE) -> None:
        self.name, self.options, self.context = name, options, context
        self.stop = np.zeros(1, np.int64)
        self.router: Router = make_router(
            tuple(ring.arrays for ring in context.rings),
            context.table.arrays.records,
            self.stop,
            context.number,
            context.idle_mode,
            restamp,
            timer_ns=context.timer_ns,
            hold_ns=hold_ns,
        )
        self.finished = False
        self.begun_at = 0
        self.error: BaseException | None = None
        self.cpu: int | None = None
        self._thread = threading.Thread(target=self._guarded, name=f"receiver-{name}", daemon=True)

    def start(self) -> None:
        """Start receiving."""
        self._thread.start()

    def ask_stop(self) -> None:
        """Make the thread end; it may be waiting for a full ring."""
        self.stop[0] = 1

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread; false if it did not end."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def thread_id(self) -> int | None:
        """The kernel's id of the thread, for pinning."""
        return self._thread.native_id

    def pin(self, cpu: int | None) -> None:
        """Keep the thread on one processor; None: any.

        Raises:
            OSError: there is no such processor for us.
        """
        self.cpu = cpu
        if cpu is not None and self.thread_id is not None:
            os.sched_setaffinity(self.thread_id, {cpu})

    def _guarded(self) -> None:
        try:
            self.run()
        except Exception as error:
            self.error = error

    @abstractmethod
    def run(self) -> None:
        """Receive until the stop flag is set or the source ends."""

    def resume(self, codes: Mapping[int, int], last_sequence: int) -> None:  # noqa: B027 (a recording has nothing to go on with)
        """Before the start, after a restart: go on where the journal ends.

        Args:
            codes: the venue's numeric code by instrument.
            last_sequence: the last of the source's sequences that the journal has; 0: none.
        """

    def go_on_at(self, place: Place) -> bool:
        """After :meth:`resume`: begin where a shard may lack something; each leaves out what it has. False: it cannot be asked for."""
        return False

    @property
    def expected(self) -> int:
        """The source's sequence that comes next; 0: not known."""
        return 0

    @property
    def session(self) -> int:
        """The venue's session, as a CLEAR event says it; 0: not known."""
        return 0

    def followed_since(self, instruments: Any) -> Any:
        """From which of the source's sequences on the decoder knows what its session has told of each of these books so far, i64; NEVER.

        0 where it has to know nothing: the messages say all themselves.
        """
        return np.zeros(len(instruments), np.int64)

    @property
    def has_snapshots(self) -> bool:
        """Whether books come from a snapshot channel beside the feed."""
        return False

    @property
    def has_definitions(self) -> bool:
        """Whether instruments get their names from a channel beside the feed: not at the same place on every node."""
        return False

    def bring_back(self, instruments: Any) -> None:  # noqa: B027 (only some can)
        """From another thread, while it runs: bring these books from the venue's snapshots, known or not."""

    @property
    def source_ns(self) -> int:
        """Time of the source's last event, on its own clock; 0: none has come."""
        return int(self.router.clock[C_EVENT])

    def go_on_from(self, sequence: int, session: int = 0) -> None:  # noqa: B027 (a recording has nothing to go on with)
        """While nothing has come yet: what is missing from this sequence of the source on, in this session (0: not known), is a gap."""

    def take_over(self, before: Receiver) -> bool:
        """Before the start: go on where the source's receiver so far has ended; false if it begins anew (a recording)."""
        return False

    def pin_if_allowed(self, cpu: int | None) -> None:
        """:meth:`pin`, where the host lets us."""
        with contextlib.suppress(OSError):
            self.pin(cpu)

    @abstractmethod
    def counters(self) -> dict[str, int]:
        """Numbers for :class:`tickmesh.node.telemetry.SourceCounter`."""

    def routed(self) -> dict[str, int]:
        """What the router counted."""
        return {"events": int(self.router.counts[-2]), "ring_full": int(self.router.counts[-1])}

    def close(self) -> None:  # noqa: B027 (only some have any)
        """Free sockets and files; after the thread has ended."""


# ---------------------------------------------------------------- recordings


class RecordedReceiver(Receiver):
    """A recording, at its own pace, faster, or as fast as it goes."""

    def __init__(self, name: str, options: Source, files: Sequence[Any], context: ReceiverContext, folder: Path = Path()) -> None:
        super().__init__(name, options, context, restamp=True)
        self.reader: Reader = open_reader(name, options, files, context.table, context.number, context.progress, folder=folder)
        self.order_ids = self.reader.order_ids
        self._pace = Pace(options.pace) if options.pace != "max" else None

    def run(self) -> None:
        batch = zeros_aligned(ROUTE_EVENTS, EVENT)
        while self.stop[0] == 0:
            count = self.reader.read(batch)
            if count == 0:
                self.finished = True
                return
            if not self._deliver(batch, count):
                return

    def _deliver(self, batch: EventArray, count: int) -> bool:
        """Route the events of a batch as they become due."""
        if self._pace is None:
            return bool(route_now(self.router, batch, 0, count))
        events = batch[:count]  # a recording without times of receipt is paced by the venue's own
        times = np.maximum.accumulate(np.where(events["ts_recv"] > 0, events["ts_recv"], events["ts_event"]))
        first = 0
        while first < count:
            wait_ns = self._pace.wait_ns(int(times[first]))
            while wait_ns > 0:
                if self.stop[0]:
                    return False
                time.sleep(min(wait_ns / 1e9, _PACE_SLICE_S))
                wait_ns = self._pace.wait_ns(int(times[first]))
            end = int(np.searchsorted(times, times[first], side="right"))
            if not route_now(self.router, batch, first, end):
                return False
            first = end
        return True

    def counters(self) -> dict[str, int]:
        return {**self.routed(), **self.reader.counters()}


# ---------------------------------------------------------------- generators in this process


class GeneratedReceiver(Receiver):
    """A generator in this process, paced by its own clock against ours."""

    order_ids = "sequential"
    _SLICE_NS = 2_000_000
    _MESSAGES = 4096

    def __init__(self, name: str, options: Source, source: BlockSource, context: ReceiverContext) -> None:
        super().__init__(name, options, context, restamp=True)
        self._source = source
        self.spec, framing = load_spec("itch50"), load_framing("binaryfile")
        self._decoder: Any = load_decoder(self.spec, framing, progress=context.progress)
        self.feed = make_feed(self.spec, context.table, context.number, framing=framing, midnight_ns=options.midnight_ns())
        self._speed = 0.0 if options.pace == "max" else 1.0 if options.pace == "realtime" else float(options.pace)
        self._bytes = 0

    def run(self) -> None:
        batch = zeros_aligned(ROUTE_EVENTS, EVENT)
        started, start_ns = time.monotonic_ns(), self._source.next_ns
        while self.stop[0] == 0 and not self._source.finished:
            now_ns = start_ns + int((time.monotonic_ns() - started) * self._speed) if self._speed else 1 << 62
            image, end = self._source.next_block(self._MESSAGES, now_ns)
            if end:
                self._decode(image, end, batch)
            elif not self._source.finished:
                due = (self._source.next_ns - now_ns) / max(self._speed, 1e-9) / 1e9
                time.sleep(min(max(due, self._SLICE_NS / 1e9), _PACE_SLICE_S))
        self.finished = self._source.finished

    def _decode(self, image: Any, end: int, batch: EventArray) -> None:
        position = 0
        self._bytes += end
        while position < end and self.stop[0] == 0:
            position, count = self._decoder.decode_stream(image, position, end, 0, self.feed, batch)
            route_now(self.router, batch, 0, count)

    def counters(self) -> dict[str, int]:
        messages = sum(message_counts(self.feed, self.spec).values())
        return {**self.routed(), "messages": messages, "bytes": self._bytes, "malformed": sum(malformed(self.feed).values())}


# ---------------------------------------------------------------- multicast


class MulticastReceiver(Receiver):
    """One or two multicast lines, compiled from the socket, packet ring or AF_XDP queue to the shards' rings."""

    def __init__(self, name: str, options: Source, context: ReceiverContext) -> None:
        gap_wait_ns = int(options.gap_wait_ms * 1e6)
        timeout_ns, tries = int(options.rerequest_timeout_ms * 1e6), options.rerequest_tries
        hold_ns = gap_wait_ns + (timeout_ns * tries if options.rerequest else 0)
        super().__init__(name, options, context, restamp=False, hold_ns=hold_ns)
        self.spec, self._framing = spec_and_framing(name, options)
        framing = self._framing
        self.router.settings[S_MARKS] = framing.sequence is not None and not options.snapshot_endpoint
        self._expected = 0
        self._place: Place | None = None
        self._goes_on_for_another = False
        """What the decoder of the source's receiver so far remembers is known here."""
        self.order_ids = self.spec.order_ids
        if options.rerequest and not can_rerequest(framing):
            raise SourceError(name, f"rerequest asks for MoldUDP64 packets, and the framing is {framing.name!r}; remove the key rerequest")
        decoder = decoder_parts(self.spec, framing, fields=protocol_fields(options))
        context.table.let_through(context.number, options.symbols, options.exclude)
        midnight_ns, wait_ns = options.midnight_ns(), FOREVER_NS if options.rerequest else gap_wait_ns
        beside = len(_lines(options))
        self.feed = make_feed(
            self.spec, context.table, context.number, framing=framing, midnight_ns=midnight_ns, gap_wait_ns=wait_ns,
            recovery_line=recovery_line(name, options, self.spec, beside),
            definition_line=definition_line(name, options, self.spec, framing, beside + bool(options.snapshot_endpoint)),
        )  # fmt: skip
        self.path, self._module = self._open(decoder)
        self.request: Rerequest | None = None
        try:
            if options.rerequest:
                self.request = Rerequest(options.rerequest, gap_wait_ns, timeout_ns, tries)
        except BaseException:
            self.close()
            raise

    def _open(self, decoder: Any) -> tuple[OpenPath, Any]:
        """The best way to receive that the configuration allows and that this host can; says so, and why not a better one.

        Raises:
            MulticastError: none is possible.
        """
        options = self.options
        wish = Wish(
            endpoints=(*_lines(options), *_beside(options)),
            interface=options.interface,
            owner=self.name,
            buffer_bytes=options.recv_buffer_kb * 1024,
            kernel_stamps=options.receive_stamps == "kernel",
            busy_poll_us=options.busy_poll_us,
        )
        ways, self.refusals = ways_of("none" if _beside(options) else options.bypass), list[Refusal]()
        for way in ways:
            insisted = len(ways) == 1
            refusal = None if way == SOCKETS else lacking(way, wish.interface_name(), wish.buffer_bytes, insisted=insisted)
            if refusal is None:
                rerequests, shards = bool(options.rerequest), len(self.context.rings)
                module = receive_loop(decoder, wish.places(way), shards, self.context.progress, way=way, rerequests=rerequests)
                try:
                    path = open_way(way, wish)
                except BypassRefused as error:
                    refusal = error.refusal
                else:
                    self._tell(path, insisted)
                    return path, module
            if insisted:
                raise BypassRefused(wish.endpoints[0], refusal)
            self.refusals.append(refusal)
        raise AssertionError("sockets are always possible")

    def _tell(self, path: OpenPath, configured: bool) -> None:
        self.why = Lack.CONFIGURED if configured else self.refusals[0].lack if self.refusals else Lack.NOTHING
        because = "; ".join(map(str, self.refusals)) or LACK_ABOUT[self.why]
        if self.options.bypass != "none":
            _log.info("receives", source=self.name, way=path.way, because=because)
        foreign = [str(one) for one in self.refusals if one.lack == Lack.FOREIGN_PROGRAM]
        for warning in path.warnings + foreign:
            _log.warning("receives, but", source=self.name, warning=warning)

    def resume(self, codes: Mapping[int, int], last_sequence: int) -> None:
        bind_codes(self.feed, self.context.table, codes)
        self._expected = last_sequence + 1 if last_sequence else 0
        if last_sequence:
            go_on(self.router.clock)

    def go_on_at(self, place: Place) -> bool:
        """Begin where the shard with least ended: it gets what it lacks from the re-request server, or is told of it by a gap.

        What a decoder remembers of a session, orders that it follows or levels by position, is not known any more, so that no book can go
        on and each shard is told so in full.
        """
        if self.spec.remembers or self._framing.sequence is None:
            return False
        self._place = place
        return True

    @property
    def expected(self) -> int:
        return int(self.feed.arbiter.state[EXPECTED])

    @property
    def session(self) -> int:
        return int(self.feed.arbiter.state[SESSION].view(np.uint64))

    def followed_since(self, instruments: Any) -> Any:
        if not self.spec.remembers:
            return super().followed_since(instruments)
        if self.begun_at == 0:
            return np.full(len(instruments), NEVER)
        return since_when(self.feed, instruments)

    @property
    def has_snapshots(self) -> bool:
        return bool(self.feed.recovery.words[LINE] >= 0)

    @property
    def has_definitions(self) -> bool:
        return self.options.definition_endpoint is not None

    def bring_back(self, instruments: Any) -> None:
        if len(instruments):
            ask_for_books(self.feed.recovery, instruments)

    def go_on_from(self, sequence: int, session: int = 0) -> None:
        if self.begun_at == 0:
            self._expected = min(self._expected, sequence) if self._expected else sequence

    def take_over(self, before: Receiver) -> bool:
        if not isinstance(before, MulticastReceiver) or before.spec.name != self.spec.name:
            return False
        records, number = self.context.table.arrays.records[: len(self.context.table)], self.context.number
        mine = np.flatnonzero((records["source"] == number) & (records["code"] != 0))
        bind_codes(self.feed, self.context.table, {int(i): int(records["code"][i]) for i in mine})
        expected = int(before.feed.arbiter.state[EXPECTED])
        self.feed.arbiter.state[START_SEQUENCE] = expected
        self._goes_on_for_another = expected > 0 and before.feed.ladders.size == self.feed.ladders.size
        if not self._goes_on_for_another:
            self._expected = expected
        take_memory(self.feed, before.feed, self.context.table)
        if before.feed.arbiter.state[EXPECTED]:
            go_on(self.router.clock)
        return True

    def run(self) -> None:
        self.path.face.begin()
        try:
            drop_capabilities()  # what comes from outside is handled without any
        except PrivilegeError as error:
            _log.warning("receives, but", source=self.name, warning=str(error))
        if not self._find_place():
            return
        with select.epoll() as readable:
            for descriptor in self.path.face.descriptors():
                readable.register(descriptor, select.EPOLLIN)
            if self.request is not None:
                readable.register(self.request, select.EPOLLIN)
            self._receive(readable.fileno())

    def _receive(self, readable: int) -> None:
        face, asking = self.path.face, (self.request.kernel,) if self.request is not None else ()
        self._module.receive(
            self.stop,
            face.kernels,
            face.buffers,
            face.packets,
            self.feed,
            zeros_aligned(ROUTE_EVENTS, EVENT),
            self.router,
            self.context.idle_mode,
            np.array([readable, 0, 0, 0, 0, 0], np.int32),
            *asking,
        )

    def _find_place(self) -> bool:
        """Look at the first packet: a journal's session goes on, with a GAP for what was missed, or a new one has begun.

        Returns:
            False if it was stopped before a packet came.
        """
        sequence = self._framing.sequence
        if sequence is None:
            return True
        descriptors = self.path.face.descriptors()
        if _beside(self.options):  # whose sequences are other ones
            descriptors = descriptors[: len(_lines(self.options))]
        while self.stop[0] == 0:
            for ready in select.select(descriptors, [], [], _PACE_SLICE_S)[0]:
                seen = self._peek(descriptors.index(ready), sequence)
                if seen is not None:
                    self._begin(*seen)
                    return True
        return False

    def _peek(self, place: int, sequence: Field) -> tuple[int, int] | None:
        """Sequence and session of the packet that is next, which stays; a packet without them is dropped."""
        face = self.path.face
        head = face.peek(place, drop=False)
        if head is None:  # what came there is nothing for us
            return None
        if len(head) >= self._framing.header_bytes:
            session, seen = 0, _number(head, sequence)
            for number, field in enumerate(self._framing.session):  # as the decoder has it
                session ^= _number(head, field) << 17 * number
            if seen - self._expected <= JUMP_MAX:
                return seen, session & _MASK
        face.peek(place, drop=True)
        self.feed.malformed[BAD_SEQUENCE if len(head) >= self._framing.header_bytes else SHORT_PACKET] += np.uint64(1)
        return None

    def _begin(self, seen: int, session: int) -> None:
        """Set the arbiter's place, now that the first packet is seen."""
        state, place = self.feed.arbiter.state, self._place
        unsequenced = seen == self._framing.unsequenced
        if not unsequenced and not self._goes_on(seen, session):
            self._enter(session, FIRST_SEQUENCE, place.session if place is not None else 0)
            state[CLEAR_DUE] = 1
        elif self.spec.remembers and not self._goes_on_for_another:
            self._begin_without_memory(0 if unsequenced else seen, session)
        else:
            first = place.sequence if place is not None else self._expected or int(self.options.begin == "first")
            state[START_SEQUENCE] = max(first, int(state[START_SEQUENCE]))
        self.begun_at = self._expected or (0 if unsequenced else seen)

    def _goes_on(self, seen: int, session: int) -> bool:
        """Whether the first packet is of the session that the journals stand in; without a session's name its sequence tells."""
        place = self._place
        if place is not None and not place.is_one:
            return False
        if place is not None and place.session and session:
            return place.session == session
        return seen >= self._expected

    def _begin_without_memory(self, seen: int, session: int) -> None:
        """In the middle of a session the decoder does not know what rests: a gap says so to the books, at once, if the place is known."""
        if seen != FIRST_SEQUENCE:
            self.feed.state[SINCE] = NEVER  # before anybody can see that we have begun
        state, first = self.feed.arbiter.state, max(FIRST_SEQUENCE, self._expected - 1)
        if seen == 0:
            state[START_SEQUENCE] = first
            return
        self._enter(session, first)
        state[FORCE_TO] = self._expected or seen

    def _enter(self, session: int, sequence: int, before: int = 0) -> None:
        """Stand in a session, as after its first packet; packets of the one before are old."""
        state = self.feed.arbiter.state
        state[HAS_SESSION], state[EXPECTED] = 1, sequence
        state[SESSION] = np.uint64(session).view(np.int64)
        state[PREVIOUS_SESSION] = np.uint64(before or session).view(np.int64)

    def counters(self) -> dict[str, int]:
        lines, frames, lost = arbitration(self.feed), self.path.face.counters(), self.path.face.statistics()
        asked = self.request.counters() if self.request is not None else RerequestCounters(0, 0, 0, 0)
        return {
            **self.routed(),
            "messages": sum(message_counts(self.feed, self.spec).values()),
            "packets": lines["packets"],
            "bytes": frames.bytes,
            "malformed": sum(malformed(self.feed).values()),
            "gaps": lines["gaps"],
            "missing": lines["missing"],
            "duplicates": lines["duplicates"],
            "filtered": filtered(self.feed),
            "dropped_by_kernel": sum(lost.values()),
            "way": WAY_NUMBERS[self.path.way],
            "way_because": int(self.why),
            "rx_dropped": lost["rx_dropped"],
            "rx_ring_full": lost["rx_ring_full"],
            "truncated": frames.truncated,
            "fragments": frames.fragments,
            "tagged": frames.tagged,
            "bad_checksum": frames.bad_checksum,
            "not_wanted": frames.not_wanted,
            "requests": asked.requests,
            "recovered": asked.recovered,
            "given_up": asked.given_up,
            **snapshot_counters(self.feed, self.context.table),
            **definition_counters(self.feed),
        }

    def close(self) -> None:
        self.path.close()
        if self.request is not None:
            self.request.close()


def _lines(options: Source) -> list[str]:
    """The endpoints of the lines that are arbitrated, A first."""
    return [endpoint for endpoint in (options.endpoint, options.endpoint_b) if endpoint]


def _beside(options: Source) -> list[str]:
    """The endpoints of what comes beside them, snapshots first; by sockets only, where each has a place of its own."""
    return [endpoint for endpoint in (options.snapshot_endpoint, options.definition_endpoint) if endpoint]


def _number(head: bytes, field: Field) -> int:
    return int.from_bytes(head[field.offset : field.offset + field.size], "big" if field.big else "little")


def bind_codes(feed: Feed, table: InstrumentTable, codes: Mapping[int, int]) -> None:
    """Tell a feed the numeric codes of instruments (code by instrument) that have been announced already, and the depths of their books."""
    if feed.depths.size > 1:
        mine = np.flatnonzero(table.arrays.records["source"][: len(table)] == feed.state[SOURCE])
        feed.depths[mine] = table.arrays.records["depth"][mine]
    known, left_out = [], []
    no_text = feed.state[REBIND] == 0
    for instrument, code in codes.items():
        bind_unannounced(feed, np.uint64(code), np.uint32(instrument))
        if table.arrays.records["flags"][instrument] & EXCLUDED:
            left_out.append(instrument)
        elif not table.symbol(instrument).startswith("#") or (no_text and table.arrays.records["announced"][instrument]):
            known.append(instrument)  # others are known by their code only: text may still name them
    resolved = feed.codes & ~RESOLVED_BELOW
    bound = feed.codes != UNBOUND
    feed.codes[:] = np.where(bound & np.isin(resolved, known), resolved, feed.codes)
    feed.codes[:] = np.where(bound & np.isin(resolved, left_out), FILTERED, feed.codes)


def take_memory(feed: Feed, before: Feed, table: InstrumentTable) -> None:
    """Go on with what the decoder of the source's receiver so far remembers of the session: ladders, orders, the seconds last told."""
    if before.ladders.size == feed.ladders.size:  # a book by position goes on where it stands
        feed.ladders[:], feed.depths[:], feed.known[:] = before.ladders, before.depths, before.known
        feed.state[SINCE] = before.state[SINCE]
        if feed.state[SINCE] == NEVER or np.any(feed.known == NEVER):
            want_books(feed.recovery)
    take_orders(feed, before, np.flatnonzero(table.arrays.records["flags"][: len(table)] & EXCLUDED))
    if before.state[MIDNIGHT_NS] == feed.state[MIDNIGHT_NS]:
        feed.state[TIME_BASE_NS] = before.state[TIME_BASE_NS]


def make_receiver(
    name: str, config: Config, context: ReceiverContext, generators: dict[str, BlockSourceMaker], files: Sequence[Any] | None = None
) -> Receiver:
    """The receiver of a configured source.

    Raises:
        SourceError, MulticastError, RecordingError, SpecError, MappingError: the source cannot be opened; the message says what to do.
    """
    options = config.data_sources[name]
    if options.type == "multicast":
        return MulticastReceiver(name, options, context)
    if options.type == "rdma":
        from tickmesh.node.rdma_source import RdmaReceiver  # which is a receiver itself

        return RdmaReceiver(name, config, context)
    if options.type in CONNECTED or options.follow:
        from tickmesh.node.adapters import open_adapter  # which are receivers themselves

        return open_adapter(name, config, context)
    if options.type in generators:
        return GeneratedReceiver(name, options, generators[options.type](options, context.progress), context)
    return RecordedReceiver(name, options, files or [config.resolve(path) for path in options.path], context, config.folder)
