"""Replication, the leader's side: one port at which standbys follow the journals of the shards that this node leads.

A standby connects once per shard. The two first find the last sequence that they have in common (the checksums chain, so that one equal
checksum means that everything before it is equal); then the journal is sent from there on, from memory or from older segments on disk,
which is the same mapping here. Each standby has a thread that sends and one that hears its acknowledgements. Neither ever touches what
the shard's loop waits for: a slow standby falls behind, and reads older segments later.

Blocking sockets and threads, not asyncio: what there is to wait for is a word in memory that the loop writes, which a compiled wait
without the GIL sees within microseconds; an event loop could only poll it by timers of a millisecond.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import structlog

from tickmesh.control.config import Config
from tickmesh.node.event import EventArray, Kind
from tickmesh.node.journal import Journal
from tickmesh.node.journal_tail import JournalTail, TooOld
from tickmesh.node.link_sessions import Session, Sessions
from tickmesh.node.rdma_link import LEADER_RECORDS, connected, go_over, offer_in, offered_channel
from tickmesh.node.release import ReleaseGate
from tickmesh.node.replication_link import (
    EVENTS_MAX,
    NONCE_BYTES,
    PAYLOAD_BYTES_MAX,
    FrameDamaged,
    FrameKind,
    Link,
    LinkError,
    LinkOptions,
    LinkSilent,
    Reason,
    Refused,
    TlsFiles,
    proof,
    proves,
    server_context,
)
from tickmesh.transports.counters import Values
from tickmesh.transports.rdma import RdmaChannel
from tickmesh.transports.toolbox import IDLE_MODES


class ReplicationError(Exception):
    """Replication cannot be as the configuration wants it; the message says what to do."""


def link_options(config: Config) -> LinkOptions:
    """What a node's links are like, from its `[replication]` table and the environment.

    Raises:
        ReplicationError: the environment variable that `token_env` names is not set.
    """
    settings = config.replication
    token = os.environ.get(settings.token_env, "") if settings.token_env else ""
    if settings.token_env and not token:
        raise ReplicationError(f"replication.token_env names {settings.token_env}, which is not set: put the cluster's token there")
    files = (settings.tls_certificate_file, settings.tls_key_file, settings.tls_ca_file)
    return LinkOptions(
        cluster=config.cluster.name,
        node=config.cluster.node,
        token=token,
        tls=TlsFiles(*(config.resolve(str(file)) for file in files)) if all(files) else None,
        heartbeat_s=settings.heartbeat_ms / 1000,
        timeout_s=settings.timeout_ms / 1000,
        rdma=settings.link == "rdma",
        rdma_device=config.cluster.rdma_device,
        idle=IDLE_MODES[config.cluster.idle],
    )


def release_gate(config: Config, journal: Journal, waits: Values | None = None, *, alone: bool = False) -> ReleaseGate:
    """A shard's gate as the `[replication]` table wants it; `waits` and `alone` as for :class:`ReleaseGate`."""
    settings = config.replication
    return ReleaseGate(
        journal,
        acks=settings.acks,
        solo=settings.solo,
        solo_after_s=settings.solo_after_ms / 1000,
        lag_s_max=settings.lag_ms_max / 1000,
        waits=waits,
        alone=alone,
    )


DOCUMENTS = "configs"
"""Folder beside the segments with the document of each configuration that a CONFIG event names, ``<version>.json``."""
CONNECTIONS_MAX = 256
_log = structlog.get_logger("replication")


@dataclass(frozen=True)
class SnapshotFile:
    """A snapshot of a shard's state: a file whose content is somebody else's business, made after the events below `sequence`."""

    path: Path
    sequence: int


class Acknowledged(Protocol):
    """Who is told how far the standbys are: a :class:`ReleaseGate`. Called in the sessions' threads."""

    def update(self, node: str, sequence: int, synced: int) -> None:
        """A standby has the events below `sequence` in its journal, and those below `synced` on its disk."""

    def leave(self, node: str) -> None:
        """A standby is gone."""


@dataclass
class Leading:
    """A shard that this node leads.

    Attributes:
        epoch: of the leadership.
        gate: told how far the standbys are.
        stored: the shard's last output that every output stream holds.
        digest: the :func:`tickmesh.node.frames.outputs_digest` up to an output, by which standbys see that theirs are the same.
        snapshot: the newest snapshot, if there is one.
    """

    journal: Journal
    epoch: int
    gate: Acknowledged | None = None
    stored: Callable[[], int] = lambda: 0
    digest: Callable[[int], int] = lambda output: 0
    snapshot: Callable[[], SnapshotFile | None] = lambda: None


@dataclass
class SessionCounters:
    """What one standby's session has done."""

    events: int = 0
    frames: int = 0
    documents: int = 0
    snapshots: int = 0
    probes: int = 0


@dataclass
class Standing:
    """How far a standby is, as it said last."""

    sequence: int = 0
    synced: int = 0
    outputs: int = 0
    """Outputs that its own loop has made."""
    heard_s: float = field(default_factory=time.monotonic)


class ReplicationServer:
    """Serves standbys. :meth:`start`, then :meth:`lead` and :meth:`resign` as leadership changes, then :meth:`stop`.

    Args:
        options: what both ends agree on.
        host, port: where to listen; port 0: any free one.
        idle: how a sender waits for new events, see ``toolbox.IDLE_MODES``.
        superseded: told (shard, epoch) when a standby knows of a later epoch than ours: we do not lead any more.

    Raises:
        OSError: the port cannot be listened on.
        ssl.SSLError: the TLS files do not fit.
    """

    def __init__(
        self,
        options: LinkOptions,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        idle: int = 2,
        superseded: Callable[[int, int], None] | None = None,
    ) -> None:
        self.options, self.idle = options, idle
        self._superseded = superseded
        self._context: ssl.SSLContext | None = server_context(options.tls) if options.tls else None
        self._shards: dict[int, Leading] = {}
        self._lock = threading.Lock()
        self._sessions = Sessions("replication", self._session, host, port, most=CONNECTIONS_MAX)
        self.host, self.port = host, self._sessions.port

    def _session(self, connection: socket.socket, peer: str) -> _Session:
        return _Session(self, self._sessions, connection, peer)

    @property
    def refused(self) -> int:
        """How many standbys were not served."""
        return self._sessions.refused

    @property
    def address(self) -> str:
        """``HOST:PORT`` at which it listens."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def start(self) -> ReplicationServer:
        """Accept standbys from now on."""
        self._sessions.start()
        return self

    def lead(self, shard: int, leading: Leading) -> None:
        """Serve a shard; again with a later epoch or another journal: standbys have to connect anew."""
        with self._lock:
            self._shards[shard] = leading
        self._sessions.end(shard)

    def resign(self, shard: int) -> None:
        """Serve it no more."""
        with self._lock:
            self._shards.pop(shard, None)
        self._sessions.end(shard)

    def leading(self, shard: int) -> Leading | None:
        """What is served of a shard."""
        with self._lock:
            return self._shards.get(shard)

    def stop(self) -> None:
        """End all sessions and close the port. More than once is fine."""
        self._sessions.stop()

    def status(self) -> list[dict[str, Any]]:
        """One map per standby that is served."""
        return [session.status() for session in self._sessions.all() if session.node]

    # -- sessions

    def replace(self, newer: _Session) -> None:
        """A standby that connects again is the one that counts: its older session ends."""
        for session in self._sessions.all(newer.shard):
            if session is not newer and session.node == newer.node:
                session.end()

    def secure(self, connection: socket.socket) -> socket.socket:
        """The connection, through TLS if that is wanted."""
        return self._context.wrap_socket(connection, server_side=True) if self._context else connection

    def heard_of(self, shard: int, epoch: int) -> None:
        """A standby knows of a later epoch."""
        if self._superseded:
            self._superseded(shard, epoch)


class _Session(Session):
    """One standby of one shard: this thread sends; another one hears acknowledgements."""

    what, lost = "standby", (*Session.lost, TooOld)

    def __init__(self, server: ReplicationServer, sessions: Sessions[_Session], connection: socket.socket, peer: str) -> None:
        super().__init__(sessions, connection, peer, server.options)
        self.server, self.epoch = server, 0
        self.counters, self.at = SessionCounters(), Standing()
        self.position = 0
        self._channel: RdmaChannel | None = None
        self._journal: Journal | None = None

    def secure(self, connection: socket.socket) -> socket.socket:
        """See :class:`Session`."""
        return self.server.secure(connection)

    def note_end(self) -> None:
        """See :class:`Session`."""
        super().note_end()
        if self._journal is not None:
            self._journal.wake_readers()

    def release(self) -> None:
        """See :class:`Session`."""
        if self._channel is not None:
            self._channel.close()

    def serve(self, link: Link) -> None:
        """See :class:`Session`."""
        hello, nonce = self._greet(link)
        leading = self._admit(hello, nonce)
        self.server.replace(self)
        if self.server.leading(self.shard) is not leading:
            return  # it changed before this session could be found and ended
        self._journal = leading.journal
        tail = JournalTail(leading.journal)
        self._agree(link, leading, tail, hello)
        hearer = threading.Thread(target=self._hear, args=(link, leading), name="replication-acks", daemon=True)
        hearer.start()
        try:
            self._stream(link, leading, tail)
        except Refused as refused:
            self.say_refused(refused)
            hearer.join(self.server.options.timeout_s)
        finally:
            link.interrupt()
            hearer.join()
            if leading.gate:
                leading.gate.leave(self.node)

    # -- who is it

    def _greet(self, link: Link) -> tuple[_Hello, bytes]:
        nonce = secrets.token_bytes(NONCE_BYTES)
        link.send(FrameKind.CHALLENGE, 0, 0, payload=nonce)
        frame = link.expect(FrameKind.HELLO, self.server.options.timeout_s)
        said = frame.json()
        hello = _Hello(frame.shard, frame.epoch, frame.first, frame.chain, frame.a, frame.b, bool(frame.events), said)
        self.node, self.shard = str(said.get("node", "")), frame.shard
        return hello, nonce

    def _admit(self, hello: _Hello, nonce: bytes) -> Leading:
        """What it may follow.

        Raises:
            Refused: nothing.
        """
        options = self.server.options
        if not proves(hello.said.get("proof"), options.token, "standby", nonce, hello.nonce):
            raise Refused(Reason.TOKEN, "its token is not ours: give all nodes of a cluster the same one")
        if hello.said.get("cluster") != options.cluster:
            raise Refused(Reason.CLUSTER, f"this is cluster {options.cluster}, not {hello.said.get('cluster')}")
        leading = self.server.leading(hello.shard)
        if leading is None:
            raise Refused(Reason.SHARD, f"node {options.node} does not lead shard {hello.shard}")
        self.epoch = leading.epoch
        if hello.epoch > leading.epoch:
            self.server.heard_of(hello.shard, hello.epoch)
            raise Refused(Reason.STALE_LEADER, f"epoch {leading.epoch} has been followed by {hello.epoch}", leading.epoch)
        return leading

    # -- what both have

    def _agree(self, link: Link, leading: Leading, tail: JournalTail, hello: _Hello) -> None:
        """Find where it goes on, tell it, and wait until it is there."""
        journal = leading.journal
        if hello.has_journal and hello.journal_id != journal.header.journal_id:
            raise Refused(Reason.JOURNAL, "it holds another journal: move that away, and it gets this one", leading.epoch)
        oldest = tail.oldest()
        start, snapshot = None, None
        if not hello.has_journal:
            start = oldest if oldest == journal.first_sequence else None
        elif hello.next_sequence >= oldest:
            start = self._common(link, tail, hello, oldest)
        if start is None:
            snapshot = leading.snapshot()
            if snapshot is None or not oldest <= snapshot.sequence <= tail.end:
                raise Refused(Reason.NO_SNAPSHOT, f"it needs events before {oldest}, which are not kept, and there is no snapshot")
            start = snapshot.sequence - (snapshot.sequence - journal.first_sequence) % journal.segment_records
        first = journal.folder / DOCUMENTS / f"{journal.header.config_version}.json"
        if not hello.has_journal and snapshot is None and first.exists():
            self._send_document(link, first)
        self._welcome(link, leading, tail, hello, start, snapshot)
        if snapshot:
            self._send_all_documents(link, journal)
            self._send_snapshot(link, snapshot)
        ready = link.expect(FrameKind.READY, max(60.0, self.server.options.timeout_s))
        if ready.first != start or ready.chain != tail.chain_at(start):
            raise FrameDamaged(f"the standby is at sequence {ready.first}, not at {start}")
        tail.position = self.position = start
        self._go_over(link, offer_in(ready))

    def _go_over(self, link: Link, offer: Any) -> None:
        """Go over to RDMA, if the standby has done so: it waits for our first word there."""
        if self._channel is None or offer is None:
            return
        if not connected(self._channel, offer):
            raise LinkError("the standby waits on RDMA, which does not come about")
        go_over(link, self._channel)

    def _welcome(self, link: Link, leading: Leading, tail: JournalTail, hello: _Hello, start: int, snapshot: SnapshotFile | None) -> None:
        options, journal, chain = self.server.options, leading.journal, tail.chain_at(start)
        index, within = divmod(start - journal.first_sequence, journal.segment_records)
        said = {
            "node": options.node,
            "proof": proof(options.token, "leader", hello.nonce),
            "header": asdict(journal.header.at(index)),
            "previous": chain if index and not within else 0,
        }
        if hello.said.get("rdma") is True and (channel := offered_channel(options, LEADER_RECORDS, self.peer)) is not None:
            self._channel, said["rdma"] = channel, channel.offer()
        more = {"first": start, "chain": chain, "a": tail.end, "count": int(snapshot is not None)}
        link.send(FrameKind.WELCOME, self.shard, leading.epoch, payload=json.dumps(said).encode(), **more)

    def _common(self, link: Link, tail: JournalTail, hello: _Hello, oldest: int) -> int | None:
        """The last sequence up to which both journals are the same; None: they differ in all that both keep."""
        low, high = max(oldest, hello.oldest_sequence), min(hello.next_sequence, tail.end)
        if high == hello.next_sequence and tail.chain_at(high) == hello.chain:
            return high
        if high < low:
            return None

        def equal(sequence: int) -> bool:
            self.counters.probes += 1
            link.send(FrameKind.PROBE, self.shard, self.epoch, first=sequence)
            answer = link.expect(FrameKind.CHAIN, self.server.options.timeout_s)
            return answer.first == sequence and answer.chain == tail.chain_at(sequence)

        return last_common(low, high, equal)

    # -- sending

    def _stream(self, link: Link, leading: Leading, tail: JournalTail) -> None:
        options = self.server.options
        due = 0.0
        while not self.ended[0]:
            events, chain = tail.read(EVENTS_MAX)
            now = time.monotonic()
            if len(events):
                self._send_documents(link, leading.journal, events)
                self._send_events(link, leading, tail, events, chain)
            if now >= due:
                stored = leading.stored()
                link.send(FrameKind.HEARTBEAT, self.shard, leading.epoch, first=tail.end, chain=leading.digest(stored), a=stored)
                due = now + options.heartbeat_s
            elif not len(events):
                tail.wait(self.ended, self.server.idle, due - now)

    def _send_events(self, link: Link, leading: Leading, tail: JournalTail, events: EventArray, chain: int) -> None:
        link.send(
            FrameKind.DATA,
            self.shard,
            leading.epoch,
            payload=events.view(np.uint8).data,
            count=len(events),
            first=tail.position - len(events),
            chain=chain,
            a=leading.stored(),
            b=tail.end,
        )
        self.position = tail.position
        self.counters.frames += 1
        self.counters.events += len(events)

    def _send_documents(self, link: Link, journal: Journal, events: EventArray) -> None:
        """Before a CONFIG event, the document of the configuration that it names."""
        named = events["kind"] == int(Kind.CONFIG)
        if not named.any():
            return
        for version in np.unique(events["id"][named]):
            path = journal.folder / DOCUMENTS / f"{version}.json"
            try:
                self._send_document(link, path)
            except FileNotFoundError:
                raise Refused(Reason.DOCUMENT, f"{path} is missing, which the journal names: put it back", self.epoch) from None

    def _send_all_documents(self, link: Link, journal: Journal) -> None:
        for path in sorted((journal.folder / DOCUMENTS).glob("*.json")):
            self._send_document(link, path)

    def _send_document(self, link: Link, path: Path) -> None:
        content = path.read_bytes()
        for start in range(0, max(1, len(content)), PAYLOAD_BYTES_MAX):
            part = content[start : start + PAYLOAD_BYTES_MAX]
            link.send(FrameKind.DOCUMENT, self.shard, self.epoch, first=int(path.stem), a=start, b=len(content), payload=part)
        self.counters.documents += 1

    def _send_snapshot(self, link: Link, snapshot: SnapshotFile) -> None:
        digest, at = hashlib.sha256(), 0
        with snapshot.path.open("rb") as file:
            name = snapshot.path.name.encode()
            link.send(FrameKind.SNAPSHOT, self.shard, self.epoch, first=snapshot.sequence, payload=name)
            while part := file.read(PAYLOAD_BYTES_MAX):
                digest.update(part)
                link.send(FrameKind.PART, self.shard, self.epoch, a=at, payload=part)
                at += len(part)
                if self.ended[0]:
                    raise LinkError("stopped")
        link.send(FrameKind.SNAPSHOT_END, self.shard, self.epoch, first=snapshot.sequence, a=at, payload=digest.digest())
        self.counters.snapshots += 1

    # -- hearing

    def _hear(self, link: Link, leading: Leading) -> None:
        """Take acknowledgements until the connection ends; a silent standby is given up."""
        try:
            while True:
                frame = link.receive(self.server.options.timeout_s)
                if frame is None:
                    raise LinkSilent(f"silent for {self.server.options.timeout_s:g} s")
                if frame.epoch > leading.epoch:
                    self.server.heard_of(self.shard, frame.epoch)
                    raise LinkError(f"it knows epoch {frame.epoch}")
                if frame.kind == FrameKind.ACK:
                    self.at = Standing(frame.first, frame.a, frame.b)
                    if leading.gate:
                        leading.gate.update(self.node, frame.first, frame.a)
        except LinkError as error:
            if not self.ended[0]:
                _log.info("standby silent or gone", shard=self.shard, node=self.node, reason=str(error))
        finally:
            self.note_end()
            link.interrupt()

    def status(self) -> dict[str, Any]:
        """Who, how far, and what was done, as plain data."""
        leading = self.server.leading(self.shard)
        end = leading.journal.next_sequence if leading else self.at.sequence
        return {
            "shard": self.shard,
            "node": self.node,
            "peer": self.peer,
            "epoch": self.epoch,
            "link": self.link.wire.name if self.link is not None else "",
            "sequence": self.at.sequence,
            "synced": self.at.synced,
            "outputs": self.at.outputs,
            "lag": max(0, end - self.at.sequence),
            "silent_ms": (time.monotonic() - self.at.heard_s) * 1000,
            **asdict(self.counters),
        }


@dataclass(frozen=True)
class _Hello:
    """What a standby says of itself."""

    shard: int
    epoch: int
    next_sequence: int
    chain: int
    journal_id: int
    oldest_sequence: int
    has_journal: bool
    said: dict[str, Any]

    @property
    def nonce(self) -> bytes:
        """Its own random bytes."""
        try:
            return bytes.fromhex(str(self.said.get("nonce", "")))
        except ValueError:
            return b""


def last_common(low: int, high: int, equal: Callable[[int], bool]) -> int | None:
    """The largest sequence in ``low .. high`` for which `equal` holds, if it holds up to some point and not after it; None: nowhere.

    Looks near `high` first: a deposed leader's tail is short.
    """
    step, wrong = 1, high + 1
    at = high
    while not equal(at):
        wrong = at
        if at == low:
            return None
        at = max(low, high - step)
        step *= 2
    while wrong - at > 1:
        middle = (at + wrong) // 2
        if equal(middle):
            at = middle
        else:
            wrong = middle
    return at
