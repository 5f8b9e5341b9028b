"""Delivery over RDMA: a shard's outputs into the memory of subscribers on other hosts, `[delivery.NAME] method = "rdma"`.

A subscriber connects by TCP, shows that it knows the token, says which output it wants next, and is told the epoch, the instruments and
where the outputs begin for it. Then both have a channel (:mod:`tickmesh.transports.rdma`), and one thread per subscriber copies outputs
from the shard's output ring into frames and writes them, compiled and without the interpreter. TCP stays open beside it, to end with
the process.

What a subscriber missed while it was away is still in the output ring, or not: the ring waits for subscribers that are there, not for
others. Outputs go no further than the release gate lets them, so that what was seen here is never made otherwise by another leader.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import structlog

from tickmesh.control.config import Config, Delivery
from tickmesh.node.errors import NodeError
from tickmesh.node.event import EventArray, Kind
from tickmesh.node.link_sessions import Session, Sessions
from tickmesh.node.rdma_events import C_LIMIT, C_LOST, C_POSITION, publish_for, stage_now
from tickmesh.node.release import ReleaseGate
from tickmesh.node.replication_link import (
    EVENTS_MAX,
    NONCE_BYTES,
    Frame,
    FrameKind,
    Link,
    LinkOptions,
    Reason,
    Refused,
    proof,
    proves,
)
from tickmesh.transports.codecache import load_compiled
from tickmesh.transports.rdma import (
    RECORDS_MIN,
    ChannelHeartbeats,
    RdmaChannel,
    shared_device,
)
from tickmesh.transports.ring import RECORD, Reader, Ring
from tickmesh.transports.toolbox import IDLE_MODES
from tickmesh.transports.verbs import VerbsError

CONNECTIONS_MAX = 64
_TURN_NS, _GATED_NS = 5_000_000, 1_000_000
"""How long the compiled loop goes on before Python looks at the connection; behind a gate, which may open by itself, also at that."""
_SUBSCRIBERS_RECORDS = RECORDS_MIN
"""A subscriber says nothing after its greeting: its ring here is the smallest."""
HEARTBEAT_S, TIMEOUT_S = 0.1, 2.0
"""Both sides write something at least this often; a greeting, or a silence, may last so long."""
_EVERYTHING, _IDLE_S, _LOOK_S = (1 << 64) - 1, 0.0005, 0.002
_ORDER_KINDS = frozenset((Kind.ADD, Kind.EXECUTE, Kind.CANCEL, Kind.DELETE, Kind.REPLACE, Kind.MODIFY, Kind.LEVEL))
_log = structlog.get_logger("rdma")


class RdmaDeliveryError(NodeError):
    """The delivery cannot be as the configuration wants it; the message says what to do."""


@dataclass(frozen=True)
class Published:
    """A shard's outputs, as subscribers get them.

    Attributes:
        output: its ring; record `n` is output `n` + 1.
        epoch: of this node's leadership.
        session: what tells one run of output sequences from another: the journal's id.
        references: REFERENCE events of the instruments known by now, without times.
        kinds: that it puts out.
        gate: how far outputs may go; None: at once.
    """

    output: Ring
    epoch: int
    session: int
    references: Callable[[], EventArray]
    kinds: frozenset[Kind]
    gate: ReleaseGate | None = None


# ---------------------------------------------------------------- one subscriber


@dataclass
class SubscriberCounters:
    """What one subscriber's session has done."""

    outputs: int = 0
    overwritten: int = 0
    """Outputs that the ring's writer had overwritten before they were sent; the subscriber takes them for a gap."""


class _Session(Session):
    """Serves one subscriber of one shard."""

    what = "subscriber"

    def __init__(self, publisher: RdmaPublisher, sessions: Sessions[_Session], connection: socket.socket, peer: str) -> None:
        super().__init__(sessions, connection, peer, publisher.options)
        self.publisher = publisher
        self.counters = SubscriberCounters()
        self._cursor = np.zeros(3, np.uint64)
        self._limit_lock = threading.Lock()
        self._channel: RdmaChannel | None = None
        self._served: Published | None = None
        self._gate: ReleaseGate | None = None
        self._reader: Reader | None = None

    def release(self) -> None:
        """See :class:`Session`."""
        if self._gate is not None:
            self._gate.listeners.discard(self._note_released)
        if self._channel is not None:
            self._channel.close()
        if self._reader is not None:
            self._reader.close()

    def serve(self, link: Link) -> None:
        """See :class:`Session`."""
        hello, served = self._greet(link)
        channel = self._channel = self._offered()
        self._welcome(link, served, hello, channel)
        ready = link.expect(FrameKind.READY, self.publisher.options.timeout_s)
        channel.connect(ready.json().get("rdma") or {})
        channel.beat()
        self._served = served
        self._publish(channel, served)

    @property
    def settled(self) -> bool:
        """Whether it has taken all that it may have now, or is not served yet."""
        channel, served = self._channel, self._served
        if channel is None or served is None:
            return True
        return int(self._cursor[C_POSITION]) >= _released(served) and channel.in_flight == 0

    def _offered(self) -> RdmaChannel:
        publisher = self.publisher
        try:
            device = shared_device(publisher.device)
            return RdmaChannel(device, _SUBSCRIBERS_RECORDS, idle_mode=publisher.options.idle, peer=self.node)
        except VerbsError as error:
            raise Refused(Reason.DEVICE, f"this node has no RDMA to offer: {error}") from error

    # -- who is it

    def _greet(self, link: Link) -> tuple[Frame, Published]:
        """Its greeting, and what it may have.

        Raises:
            Refused: nothing.
        """
        options, nonce = self.publisher.options, secrets.token_bytes(NONCE_BYTES)
        link.send(FrameKind.CHALLENGE, 0, 0, payload=nonce)
        hello = link.expect(FrameKind.HELLO, options.timeout_s)
        said = hello.json()
        self.node, self.shard = str(said.get("node", "")), hello.shard
        try:
            self._theirs = bytes.fromhex(str(said.get("nonce", "")))
        except ValueError:
            self._theirs = b""
        if not proves(said.get("proof"), options.token, "subscriber", nonce, self._theirs):
            raise Refused(Reason.TOKEN, "its token is not ours: give the source the delivery's token")
        if said.get("wants") != "outputs":
            raise Refused(Reason.CLUSTER, "this port is for subscribers to outputs over RDMA, not for standbys")
        served = self.publisher.published(self.shard)
        if served is None:
            raise Refused(Reason.SHARD, f"node {options.node} does not lead shard {self.shard}")
        if hello.epoch > served.epoch and hello.a == served.session:
            raise Refused(Reason.STALE_LEADER, f"epoch {served.epoch} has been followed by {hello.epoch}", served.epoch)
        return hello._replace(payload=memoryview(b"")), served

    def _welcome(self, link: Link, served: Published, hello: Frame, channel: RdmaChannel) -> None:
        """Tell it where outputs begin for it, and the instruments."""
        options, output = self.publisher.options, served.output
        self._reader = output.reader(f"rdma-{self.node}"[:60], start="newest")
        begin = self._place(output, hello, served)
        self._cursor[C_POSITION], self._cursor[C_LIMIT] = begin, begin
        references = served.references()
        said = {
            "node": options.node,
            "proof": proof(options.token, "publisher", self._theirs),
            "rdma": channel.offer(),
            "depth": bool(served.kinds & _ORDER_KINDS),
            "trades": Kind.TRADE in served.kinds,
            "instruments": int(references["instrument"].max(initial=0)) + 1,
        }
        more = {"first": begin + 1, "a": served.session, "count": len(references)}
        link.send(FrameKind.WELCOME, self.shard, served.epoch, payload=json.dumps(said).encode(), **more)
        for first in range(0, len(references), EVENTS_MAX):
            part = references[first : first + EVENTS_MAX]
            link.send(FrameKind.DATA, self.shard, served.epoch, count=len(part), payload=part.view(np.uint8).data)

    def _place(self, output: Ring, hello: Frame, served: Published) -> int:
        """Where in the ring it goes on: with the output that it wants, as far as that is still there; or with the next one that may go."""
        if hello.first == 0 or hello.a != served.session or hello.first - 1 > output.published:
            return _released(served)
        kept = output.published - output.capacity + (output.capacity >> 2)  # what the writer may be about to overwrite is given up
        return max(hello.first - 1, kept, 0)

    # -- outputs

    def _note_released(self) -> None:
        """The gate may let more go now. Called in the thread that has said so, and here."""
        assert self._gate is not None
        with self._limit_lock:  # or an older answer might be written after a newer one
            self._cursor[C_LIMIT] = self._gate.released()

    def _publish(self, channel: RdmaChannel, served: Published) -> None:
        options, arrays = self.publisher.options, served.output.arrays
        words, slots = arrays.words, arrays.slots.view(RECORD)
        ended = select.poll()
        ended.register(self._connection, select.POLLIN)
        heartbeats = ChannelHeartbeats(channel, options.heartbeat_s, options.timeout_s)
        shard, epoch, turn_ns = np.uint64(self.shard), np.uint64(served.epoch), np.int64(_TURN_NS if served.gate is None else _GATED_NS)
        if served.gate is None:
            self._cursor[C_LIMIT] = _EVERYTHING
        else:
            self._gate = served.gate
            self._gate.listeners.add(self._note_released)
        while not self.ended[0] and not ended.poll(0):
            if self._gate is not None:
                self._note_released()  # time releases too
            written = channel.beats_written
            if channel.poster is not None:
                publish_for(channel.arrays, channel.poster, words, slots, self._cursor, shard, epoch, self.ended, options.idle, turn_ns)
            else:
                stage_now(channel.arrays, words, slots, self._cursor, shard, epoch)
            channel.post_and_reap()
            heartbeats.look(time.monotonic())
            if channel.poster is None and channel.beats_written == written:
                channel.wait_for_credit(_IDLE_S)
            self._see_to(channel)

    def _see_to(self, channel: RdmaChannel) -> None:
        """Hold in the ring what is not known to have arrived; what is counted."""
        assert self._reader is not None
        position = int(self._cursor[C_POSITION])
        self._reader.hold_from(max(0, position - channel.in_flight))
        self.counters.overwritten = int(self._cursor[C_LOST])
        self.counters.outputs = position

    def status(self) -> dict[str, Any]:
        """Who, how far, and what was done, as plain data."""
        return {"shard": self.shard, "node": self.node, "peer": self.peer, **asdict(self.counters)}


def _released(served: Published) -> int:
    """How far outputs may go, as a place in the ring."""
    published = served.output.published
    return min(published, served.gate.released()) if served.gate is not None else published


# ---------------------------------------------------------------- the delivery


class RdmaPublisher:
    """A delivery over RDMA: one port for the subscribers of all shards. :meth:`start`, :meth:`publish`, :meth:`withdraw`, :meth:`stop`.

    Args:
        options: node, token and times; see :func:`publisher_options`.
        device: RDMA device; None: the first one.
        host, port: where to listen; port 0: any free one.

    Raises:
        OSError: the port cannot be listened on.
    """

    def __init__(self, options: LinkOptions, *, device: str | None = None, host: str = "127.0.0.1", port: int = 0) -> None:
        self.options, self.device = options, device
        self._shards: dict[int, Published] = {}
        self._lock = threading.Lock()
        self._sessions = Sessions("rdma-delivery", self._session, host, port, most=CONNECTIONS_MAX, shares_port=True)
        self.port = self._sessions.port

    def _session(self, connection: socket.socket, peer: str) -> _Session:
        return _Session(self, self._sessions, connection, peer)

    @property
    def refused(self) -> int:
        """How many subscribers were not served."""
        return self._sessions.refused

    def start(self) -> RdmaPublisher:
        """Accept subscribers from now on."""
        self._sessions.start()
        return self

    def publish(self, shard: int, published: Published) -> None:
        """Serve a shard's outputs; again under a later epoch: subscribers have to connect anew."""
        with self._lock:
            self._shards[shard] = published
        self._sessions.end(shard)

    def withdraw(self, shard: int) -> None:
        """Serve them no more: when this returns, nothing is written to anybody any more, and the ring may be closed."""
        with self._lock:
            self._shards.pop(shard, None)
        for session in self._sessions.end(shard):
            session.join()

    def published(self, shard: int) -> Published | None:
        """What is served of a shard."""
        with self._lock:
            return self._shards.get(shard)

    def stop(self, drain_s: float = 1.0) -> None:
        """Close the port, and end all sessions once they have taken all that they may have, or after `drain_s`. More than once is fine."""
        self._sessions.close_port()
        end_s = time.monotonic() + drain_s
        while not all(session.settled for session in self._sessions.all()) and time.monotonic() < end_s:
            time.sleep(_LOOK_S)
        self._sessions.stop()

    def status(self) -> list[dict[str, Any]]:
        """One map per subscriber."""
        return [session.status() for session in self._sessions.all() if session.node]

    def numbers(self) -> dict[int, dict[str, int]]:
        """By shard, numbers for :class:`tickmesh.node.telemetry.DeliveryCounter`; the lag is that of the last of its subscribers."""
        with self._lock:
            ends = {shard: published.output.published for shard, published in self._shards.items()}
        at: dict[int, list[int]] = {}
        for one in self.status():
            at.setdefault(one["shard"], []).append(one["outputs"])
        return {shard: {"events": max(at.get(shard, [0])), "lag": max(0, end - min(at.get(shard, [end])))} for shard, end in ends.items()}


def open_publisher(config: Config, name: str, progress: Callable[[str], None] | None = None) -> RdmaPublisher:
    """The publisher of a configured delivery, listening and not started.

    Raises:
        RdmaDeliveryError: the token is missing, or the port cannot be listened on.
    """
    delivery = config.delivery[name]
    options = publisher_options(config, name, delivery)
    load_compiled("tickmesh.transports.rdma", "RDMA channel", progress)
    load_compiled("tickmesh.node.rdma_events", "RDMA delivery", progress)
    try:
        return RdmaPublisher(
            options, device=config.cluster.rdma_device, host=config.cluster.listens_at.strip("[]"), port=delivery.rdma_port
        )
    except OSError as error:
        where = f"{config.cluster.listens_at}:{delivery.rdma_port}"
        raise RdmaDeliveryError(f"delivery.{name}: cannot listen at {where} ({error.strerror}); choose another rdma_port") from error


def rdma_deliveries(config: Config) -> dict[str, Delivery]:
    """The deliveries over RDMA, by name."""
    return {name: delivery for name, delivery in config.delivery.items() if delivery.method == "rdma"}


def publisher_options(config: Config, name: str, delivery: Delivery) -> LinkOptions:
    """What a delivery's subscribers have to agree with.

    Raises:
        RdmaDeliveryError: the environment variable that `token_env` names is not set.
    """
    token = os.environ.get(delivery.token_env, "") if delivery.token_env else ""
    if delivery.token_env and not token:
        raise RdmaDeliveryError(f"delivery.{name}: token_env names {delivery.token_env}, which is not set: put the token there")
    return LinkOptions(
        cluster=config.cluster.name,
        node=config.cluster.node,
        token=token,
        heartbeat_s=HEARTBEAT_S,
        timeout_s=TIMEOUT_S,
        idle=IDLE_MODES[config.cluster.idle],
    )
