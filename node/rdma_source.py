"""A source over RDMA: the outputs of another node's shard, written into this one's memory, as inputs of ours; `type = "rdma"`.

See :mod:`tickmesh.node.rdma_delivery` for the other side, :mod:`tickmesh.node.rdma_events` for what becomes of an output. A compiled
loop looks at the inbox, checks frames, gives instruments our ids and routes: nothing passes through the interpreter. A lost connection
loses nothing as long as the publisher's ring has what was missed; what it has not is a gap. After a restart, or a takeover, the source
goes on with the output after the journals' last.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any
from urllib.parse import SplitResult, urlsplit

import numpy as np
import structlog

from tickmesh.control.config import Config
from tickmesh.node.continuation import Place
from tickmesh.node.event import EVENT, NO_INSTRUMENT, EventArray, Kind
from tickmesh.node.intake import whole_source
from tickmesh.node.rdma_delivery import HEARTBEAT_S, TIMEOUT_S
from tickmesh.node.rdma_events import (
    DAMAGED,
    FOREIGN,
    NOTHING,
    X_DEPTH,
    X_DUPLICATES,
    X_EPOCH,
    X_EVENTS,
    X_EXPECTED,
    X_FILTERED,
    X_FRAMES,
    X_FULL,
    X_GAPS,
    X_MISSING,
    X_PRINTS,
    X_SHARD,
    X_SOURCE,
    X_SWEEP,
    X_UNKNOWN,
    Subscription,
    learn_now,
)
from tickmesh.node.receivers import Receiver, ReceiverContext
from tickmesh.node.replication_link import (
    NONCE_BYTES,
    Frame,
    FrameDamaged,
    FrameKind,
    Link,
    LinkError,
    LinkOptions,
    LinkSilent,
    Reason,
    Refused,
    SocketWire,
    connect_link,
    proof,
    proves,
)
from tickmesh.node.router import ROUTE_EVENTS
from tickmesh.node.routing_loop import routing_loop
from tickmesh.node.timers import go_on
from tickmesh.transports.codecache import load_compiled, load_generated
from tickmesh.transports.connection import Backoff, SecretMissing, read_secret
from tickmesh.transports.rdma import RECORDS_MAX, RECORDS_MIN, ChannelError, ChannelHeartbeats, RdmaChannel, shared_device
from tickmesh.transports.ring import RECORD_BYTES
from tickmesh.transports.toolbox import zeros_aligned
from tickmesh.transports.verbs import VerbsError

_HOLD_NS = 250_000_000
_TURN_NS, _SHORT_TURN_NS = 5_000_000, 200_000
"""How long the compiled loop goes on before Python looks at the connection; where only Python can post, also at what is to be posted."""
_BELIEVED_S = 0.01
"""A frame that is not whole after so long is damaged."""
_EVENTS_MIN = 8
_SAME_WARNING_S = 60.0
_INSTRUMENTS_MAX = 1 << 20
_log = structlog.get_logger("source")


_RECEIVING = """\
# Outputs over RDMA, routed to {shards} shards. Generated.
import numpy as np

from tickmesh.node.event import EVENT
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.rdma_events import DAMAGED, FOREIGN, FULL, NOTHING, no_subscription, shards_have_room, take_frames
from tickmesh.node.router import make_router, route, route_silence
from tickmesh.transports.rdma import channel_credit_due, no_channel{imports}
from tickmesh.transports.ring import HEADER_BYTES, RingArrays
from tickmesh.transports.toolbox import idle, loop, monotonic_ns, zeros_aligned
from tickmesh.transports.verbs_post import make_poster


@loop
def receive_for(channel, poster, events, taking, at, out, router, room, mode, ns):
    until, rounds = monotonic_ns() + ns, 0
    while router.stop[0] == 0:
        n, found = np.int64(0), np.int64(FULL)
        if shards_have_room(router, room):
            n, found = take_frames(channel, events, taking, at, out)
        if n > 0 and not route(router, out, 0, n):
            return found
        if found == DAMAGED or found == FOREIGN:
            return found
        {credit}
        if n > 0:
            rounds = 0
        else:
            if found != FULL:
                route_silence(router)
            rounds = idle(mode, rounds)
        if monotonic_ns() >= until:
            return found
    return NOTHING


def warm():
    ring = RingArrays(np.zeros(HEADER_BYTES // 8, np.uint64), np.zeros(8, EVENT))
    table, nothing = InstrumentTable(1), zeros_aligned(8, EVENT)
    router = make_router((ring,) * {shards}, table.arrays.records, np.ones(1, np.int64), 0, 0)
    at = np.zeros(2, np.int64)
    receive_for(no_channel(), {poster}, nothing, no_subscription(table), at, nothing, router, np.int64(0), 0, np.int64(0))
"""


def receiving_loop(shards: int, compiled: bool, progress: Callable[[str], None] | None = None) -> ModuleType:
    """The module with ``receive_for``, for a node of `shards`; `compiled`: it gives credit itself, else it returns when that is due."""
    imports, poster, credit = "", "None", "if channel_credit_due(channel):\n            return found"
    if compiled:
        imports, poster, credit = ", post_and_reap", "make_poster()", "post_and_reap(channel, poster)"
    return load_generated("rdma_receiver", _RECEIVING.format(shards=shards, imports=imports, credit=credit, poster=poster), progress)


class RdmaReceiver(Receiver):
    """Takes a publisher's outputs; a thread of its own, which connects again by itself."""

    def __init__(self, name: str, config: Config, context: ReceiverContext) -> None:
        options = config.data_sources[name]
        super().__init__(name, options, context, restamp=False, hold_ns=_HOLD_NS)
        context.table.let_through(context.number, options.symbols, options.exclude)
        self._node, self._device, self._resolve = config.cluster.node, config.cluster.rdma_device, config.resolve
        self._secret()  # what is missing now is told now
        self._links = [urlsplit(endpoint) for endpoint in (options.endpoint, options.endpoint_b) if endpoint]
        wanted = max(RECORDS_MIN, (options.buffer_kb << 10) // RECORD_BYTES)
        self._records = min(RECORDS_MAX, 1 << (wanted.bit_length() - 1))
        self._backoff = Backoff(options.reconnect_min_ms / 1e3, options.reconnect_max_ms / 1e3)
        self._state = np.zeros(32, np.int64)
        self._state[X_SOURCE] = context.number
        self._expected = self._session = 0
        self._epochs: dict[int, int] = {}
        """The highest epoch heard of, by session."""
        self._begins_anew = False
        self._beginning = threading.Lock()
        self._numbers = dict.fromkeys(("connected", "reconnects", "connect_failures"), 0)
        self._malformed = self._more_gaps = self._more_missing = 0
        self._warned: tuple[str, float] = ("", -_SAME_WARNING_S)
        self._told = False
        self._routing = routing_loop(len(context.rings), context.progress)
        load_compiled("tickmesh.transports.rdma", "RDMA channel", context.progress)
        load_compiled("tickmesh.node.rdma_events", "RDMA source", context.progress)
        for compiled in (True, False):  # which of them is needed the device says, once it is there
            receiving_loop(len(context.rings), compiled, context.progress)

    def _secret(self) -> str:
        options = self.options
        return read_secret(options.token_env, self._resolve(options.token_file) if options.token_file else None) or ""

    # -- what a node asks of a receiver

    def resume(self, codes: Mapping[int, int], last_sequence: int) -> None:
        if last_sequence:
            self._expected = last_sequence + 1
            go_on(self.router.clock)

    def go_on_at(self, place: Place) -> bool:
        self._expected, self._session, self._begins_anew = place.sequence, place.session, not place.is_one
        return True

    @property
    def expected(self) -> int:
        return int(self._state[X_EXPECTED]) or self._expected

    @property
    def session(self) -> int:
        return self._session

    def go_on_from(self, sequence: int, session: int = 0) -> None:
        with self._beginning:
            if self.begun_at == 0:
                self._expected = min(self._expected, sequence) if self._expected else sequence
                self._session = self._session or session

    def take_over(self, before: Receiver) -> bool:
        if not isinstance(before, RdmaReceiver):
            return False
        self._expected, self._session, self._begins_anew = before.expected, before.session, before._begins_anew
        self._epochs = dict(before._epochs)
        if self._expected:
            go_on(self.router.clock)
        return True

    def counters(self) -> dict[str, int]:
        state = self._state
        return {
            **self.routed(),
            **self._numbers,
            "messages": int(state[X_EVENTS]),
            "packets": int(state[X_FRAMES]),
            "bytes": int(state[X_FRAMES] + state[X_EVENTS] + state[X_DUPLICATES]) * RECORD_BYTES,
            "malformed": self._malformed + int(state[X_UNKNOWN] + state[X_FULL]),
            "filtered": int(state[X_FILTERED]),
            "duplicates": int(state[X_DUPLICATES]),
            "gaps": int(state[X_GAPS]) + self._more_gaps,
            "missing": int(state[X_MISSING]) + self._more_missing,
        }

    # -- the thread

    def run(self) -> None:
        turn = 0
        while self.stop[0] == 0:
            endpoint = self._links[turn % len(self._links)]
            turn += 1
            begun_s, connected = time.monotonic(), False
            try:
                with self._connected(endpoint) as (link, channel):
                    connected = True
                    self._receive(link, channel)
            except (LinkError, ChannelError, VerbsError, SecretMissing, OSError) as error:
                self._lost(endpoint.geturl(), error, connected, time.monotonic() - begun_s)
            if self.stop[0] == 0:
                self._pause(self._backoff.next_s(permanent=False) if turn % len(self._links) == 0 else self._backoff.least_s)

    def _pause(self, wait_s: float) -> None:
        end_s = time.monotonic() + wait_s
        while self.stop[0] == 0 and (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(left_s, 0.05))
            self._routing.route_silence_now(self.router)

    def _lost(self, endpoint: str, error: Exception, connected: bool, lasted_s: float) -> None:
        self._numbers["connected"] = 0
        self._numbers["reconnects" if connected else "connect_failures"] += 1
        if connected:
            self._backoff.lasted(lasted_s)
        if isinstance(error, FrameDamaged):
            self._malformed += 1
        text, at = self._warned
        if self.stop[0] == 0 and (str(error) != text or time.monotonic() - at > _SAME_WARNING_S):
            _log.warning("a source is not connected", source=self.name, endpoint=endpoint, reason=str(error))
            self._warned, self._told = (str(error), time.monotonic()), True

    # -- greeting

    @contextlib.contextmanager
    def _connected(self, endpoint: SplitResult) -> Iterator[tuple[Link, RdmaChannel]]:
        """A connection to a publisher, and a channel from it, ready to receive."""
        timeout_s = min(self.options.connect_timeout_ms / 1e3, TIMEOUT_S)
        options = LinkOptions("", self._node, token=self._secret(), heartbeat_s=HEARTBEAT_S, timeout_s=timeout_s)
        link = connect_link(str(endpoint.hostname), endpoint.port or 0, options)
        channel: RdmaChannel | None = None
        try:
            welcome, said, mine = self._greet(link, options)
            if not proves(said.get("proof"), options.token, "publisher", mine):
                raise Refused(Reason.TOKEN, "the publisher does not know our token: give source and delivery the same one")
            mode, device = self.context.idle_mode, shared_device(self._device)
            channel = RdmaChannel(device, self._records, strict=self.options.strict, idle_mode=mode, peer=endpoint.geturl())
            self._subscribe(link, welcome, said)
            channel.connect(said.get("rdma") or {})
            self._begin(welcome.first, welcome.a)
            link.send(FrameKind.READY, welcome.shard, welcome.epoch, payload=json.dumps({"rdma": channel.offer()}).encode())
            self._hear_first_beat(channel, timeout_s)
            yield link, channel
        finally:
            if channel is not None:
                channel.close()
            link.close()

    def _greet(self, link: Link, options: LinkOptions) -> tuple[Frame, dict[str, Any], bytes]:
        theirs, mine = bytes(link.expect(FrameKind.CHALLENGE, TIMEOUT_S).payload), secrets.token_bytes(NONCE_BYTES)
        proved = proof(options.token, "subscriber", theirs, mine)
        said = {"node": self._node, "nonce": mine.hex(), "proof": proved, "wants": "outputs"}
        epoch = self._epochs.get(self._session, 0)
        wanted = 0 if self._begins_anew else self.expected
        link.send(FrameKind.HELLO, self.options.shard, epoch, first=wanted, a=self._session, payload=json.dumps(said).encode())
        welcome = link.expect(FrameKind.WELCOME, TIMEOUT_S)
        if welcome.shard != self.options.shard:
            raise FrameDamaged(f"outputs of shard {welcome.shard} were not asked for")
        known = self._epochs.get(welcome.a, 0)
        if welcome.epoch < known:
            raise Refused(Reason.STALE_LEADER, f"it publishes under epoch {welcome.epoch}, {known} is known", welcome.epoch)
        self._epochs = {welcome.a: welcome.epoch}
        return welcome, welcome.json(), mine

    def _subscribe(self, link: Link, welcome: Frame, said: dict[str, Any]) -> None:
        """Learn the publisher's instruments."""
        try:
            instruments, depth, trades = int(said["instruments"]), bool(said["depth"]), bool(said["trades"])
        except (KeyError, TypeError, ValueError) as error:
            raise FrameDamaged("a publisher does not say what it has") from error
        if not 0 < instruments <= _INSTRUMENTS_MAX:
            raise FrameDamaged(f"a publisher of {instruments} instruments: {_INSTRUMENTS_MAX} at most")
        most = min(_INSTRUMENTS_MAX, 2 * max(instruments, self.context.table.capacity))
        ids, sources = np.full(most, NO_INSTRUMENT, np.uint32), np.zeros(most, np.uint32)
        self._taking = Subscription(self._state, self.context.table.arrays, ids, sources)
        state = self._state
        state[X_EPOCH], state[X_SHARD], state[X_DEPTH], state[X_PRINTS], state[X_SWEEP] = welcome.epoch, welcome.shard, depth, trades, most
        left = welcome.events
        while left > 0:
            part = link.expect(FrameKind.DATA, TIMEOUT_S)
            references = np.frombuffer(part.payload, EVENT).copy()
            if part.events != len(references) or not 0 < len(references) <= left:
                raise FrameDamaged("a publisher's instruments are not whole")
            learn_now(self._taking, references)
            left -= len(references)

    def _hear_first_beat(self, channel: RdmaChannel, timeout_s: float) -> None:
        """The publisher connects after us, and says so there."""
        if channel.wait_for_beat(0, timeout_s) == 0:
            raise LinkSilent("the publisher does not come over RDMA")
        self._numbers["connected"] = 1
        if self._told:
            _log.info("a source is back", source=self.name, endpoint=channel.peer)
            self._told = False

    def _begin(self, start: int, session: int) -> None:
        """Outputs begin with `start`: what is missing before it is a gap, another session the publisher's new beginning."""
        now_ns = time.time_ns()
        with self._beginning:
            expected = self.expected
            another = self._session not in (0, session) or self._begins_anew
            anew, unnamed = expected != 0 and (another or start < expected), self._session == 0 != session
            expected, self._begins_anew = 1 if anew else expected, False
            self.begun_at = self.begun_at or expected or start
        if anew:
            self._emit(whole_source(Kind.CLEAR, now_ns, id=session))
        self._session = session
        if expected and start > expected:
            self._more_gaps += 1
            self._more_missing += start - expected
            self._emit(whole_source(Kind.GAP, now_ns, first=expected, last=start - 1))
        if not anew and (expected == 0 or unnamed):  # so that every journal knows where it begins
            named = whole_source(Kind.CODE, now_ns, id=session)
            named["seq"] = start
            self._emit(named)
        self._state[X_EXPECTED] = self._expected = start

    def _emit(self, event: EventArray) -> None:
        self._routing.route_now(self.router, event, 0, 1)

    # -- receiving

    def _receive(self, link: Link, channel: RdmaChannel) -> None:
        """Take outputs until the connection ends, or we are to stop."""
        module = receiving_loop(len(self.context.rings), channel.poster is not None, self.context.progress)
        events, at, taking = channel.arrays.inbox.view(EVENT), np.zeros(2, np.int64), self._taking
        most = max(_EVENTS_MIN, min(ROUTE_EVENTS, min(ring.capacity for ring in self.context.rings) // 8))
        out, room = zeros_aligned(most, EVENT), np.int64(4 * most)  # an event may bring a timer, a definition and its code
        assert isinstance(link.wire, SocketWire)
        ended = select.poll()
        ended.register(link.wire.socket, select.POLLIN)
        heartbeats, mode = ChannelHeartbeats(channel, HEARTBEAT_S, TIMEOUT_S), self.context.idle_mode
        ns = np.int64(_TURN_NS if channel.poster is not None else _SHORT_TURN_NS)
        damaged_since: float | None = None
        while self.stop[0] == 0:
            found = module.receive_for(channel.arrays, channel.poster, events, taking, at, out, self.router, room, mode, ns)
            channel.post_and_reap()
            now_s = time.monotonic()
            if found == FOREIGN:
                raise FrameDamaged("a frame of another epoch or shard has come")
            damaged_since = (damaged_since or now_s) if found == DAMAGED else None
            if damaged_since is not None and now_s - damaged_since > _BELIEVED_S:
                raise FrameDamaged("a frame is damaged")
            heartbeats.look(now_s)
            if found == NOTHING and ended.poll(0):
                raise LinkError("the publisher has ended the connection")
