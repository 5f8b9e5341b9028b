"""Whoever serves others over links: a port, a thread for each that connects, and their end.

Standbys (:mod:`tickmesh.node.replication`) and subscribers over RDMA (:mod:`tickmesh.node.rdma_delivery`) are served by it; what a
session does is a subclass's :meth:`Session.serve`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import structlog

from tickmesh.node.replication_link import INBOX_BYTES_SMALL, FrameKind, Link, LinkError, LinkOptions, Refused, SocketWire
from tickmesh.transports.rdma import ChannelError
from tickmesh.transports.verbs import VerbsError

_WAIT_S = 0.02
_log = structlog.get_logger("replication")


class Session(threading.Thread):
    """One that is served, in a thread of its own.

    Args:
        sessions: those that it belongs to.
        connection: its TCP connection; closed at the end.
        peer: the address that it comes from.
        options: of its link.

    Attributes:
        node, shard: who it is and what it wants, once it has said so.
        link: None until there is one.
        ended: i64[1], not 0 once it is to end; for loops that wait.
    """

    what: ClassVar[str] = "session"
    """What is served, in names of threads and in the log."""
    lost: ClassVar[tuple[type[Exception], ...]] = (LinkError, ChannelError, VerbsError, OSError)
    """What ends a session and nothing else."""

    def __init__(self, sessions: Served, connection: socket.socket, peer: str, options: LinkOptions) -> None:
        super().__init__(name=f"{sessions.name}-{self.what}", daemon=True)
        self._sessions, self._connection, self._options, self.peer = sessions, connection, options, peer
        self.node, self.shard = "", -1
        self.link: Link | None = None
        self.ended = np.zeros(1, np.int64)

    # -- a subclass's

    def secure(self, connection: socket.socket) -> socket.socket:
        """The connection, through TLS if that is wanted."""
        return connection

    def serve(self, link: Link) -> None:
        """Greet it, and serve it until the connection ends or :attr:`ended` says so.

        Raises:
            Refused: it is not served; it is told.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Free what :meth:`serve` has made, however that has ended."""

    def note_end(self) -> None:
        """It is to end: wake what waits in :meth:`serve`. From any thread."""
        self.ended[0] = 1

    # -- its life

    def end(self) -> None:
        """Have it end soon. From any thread."""
        self.note_end()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._connection, socket.SHUT_RDWR)

    def run(self) -> None:
        """Serve until it goes, is refused, or :meth:`end`."""
        try:
            self._connection.settimeout(self._options.timeout_s)
            self._connection = self.secure(self._connection)
            wire = SocketWire(self._connection, self._options.timeout_s)
            self.link = Link(wire, self._options.timeout_s, INBOX_BYTES_SMALL)
            try:
                self.serve(self.link)
            except Refused as refused:
                self.say_refused(refused)
                with contextlib.suppress(LinkError):
                    self.link.receive(self._options.timeout_s)  # it closes first: a reset would overtake the reason
        except self.lost as error:
            if not self.ended[0]:
                _log.info(f"{self.what} gone", shard=self.shard, node=self.node, peer=self.peer, reason=str(error))
        finally:
            self.release()
            self._connection.close()
            self._sessions.gone(self)

    def say_refused(self, refused: Refused) -> None:
        """Tell it why it is not served."""
        self._sessions.count_refused(self, str(refused))
        assert self.link is not None
        with contextlib.suppress(LinkError):
            self.link.send(FrameKind.REFUSED, max(0, self.shard), refused.epoch, count=refused.reason, payload=str(refused).encode())


class Served(Protocol):
    """What a session knows of :class:`Sessions`."""

    name: str

    def gone(self, session: Any) -> None:
        """A session has ended."""

    def count_refused(self, session: Session, reason: str) -> None:
        """Count one that is not served, and log it once."""


S = TypeVar("S", bound=Session)


class Sessions(Generic[S]):
    """A port, and a session for each that connects to it. :meth:`start`, then :meth:`stop`.

    Args:
        name: of its thread.
        make: a session, of a connection and the address that it comes from.
        host, port: where to listen; port 0: any free one.
        most: how many there may be at once; the next is closed.
        shares_port: a successor may listen before this one ends.

    Attributes:
        refused: how many were not served.

    Raises:
        OSError: the port cannot be listened on.
    """

    def __init__(
        self, name: str, make: Callable[[socket.socket, str], S], host: str, port: int, *, most: int, shares_port: bool = False
    ) -> None:
        self.name, self._make, self._most = name, make, most
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, reuse_port=shares_port)
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, name=name, daemon=True)
        self._lock = threading.Lock()
        self._all: set[S] = set()
        self._closed = False
        self.refused = 0
        self._told: tuple[str, int, str] | None = None

    def start(self) -> None:
        """Accept from now on."""
        self._thread.start()

    def close_port(self) -> None:
        """Accept nobody more. More than once is fine."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self._thread.ident is not None:
            self._thread.join()

    def stop(self) -> None:
        """Close the port and end all sessions. More than once is fine."""
        self.close_port()
        for session in self.end():
            session.join()

    def all(self, shard: int | None = None) -> list[S]:
        """Those of a shard, or all."""
        with self._lock:
            return [session for session in self._all if shard is None or session.shard == shard]

    def end(self, shard: int | None = None) -> list[S]:
        """Have those of a shard, or all, end soon. Nobody waits for them here: who asks may be one of their threads."""
        ended = self.all(shard)
        for session in ended:
            session.end()
        return ended

    def gone(self, session: S) -> None:
        """A session has ended."""
        with self._lock:
            self._all.discard(session)

    def count_refused(self, session: Session, reason: str) -> None:
        """Count one that is not served, and log it once."""
        self.refused += 1
        if self._told != (session.node, session.shard, reason):
            self._told = (session.node, session.shard, reason)
            _log.warning(f"{session.what} refused", shard=session.shard, node=session.node, peer=session.peer, reason=reason)

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, peer = self._listener.accept()
            except OSError:
                if not self._closed:
                    time.sleep(_WAIT_S)  # out of descriptors, say
                continue
            if not self._begin(connection, str(peer[0])):
                self.refused += 1
                connection.close()

    def _begin(self, connection: socket.socket, peer: str) -> bool:
        """Serve one more, if there may be."""
        with self._lock:
            if len(self._all) >= self._most:
                return False
            session = self._make(connection, peer)
            self._all.add(session)
            session.start()  # before anybody can find it: only what has begun can be waited for
        return True
