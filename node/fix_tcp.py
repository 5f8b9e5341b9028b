"""FIX sessions over TCP, with or without TLS: what carries the bytes of :class:`tickmesh.node.fix_session.Session`.

:class:`Link` runs a session on a connection. :class:`Acceptor` listens, finds the session that a Logon is for, and lets each have one
connection at a time; who has not logged on may hold few connections, for a short time, with little memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import structlog

from tickmesh.node.fix_session import LOGON_BYTES_MAX, Clock, Ended, Event, Fields, LoggedOn, Session, SessionOptions, parse_message
from tickmesh.node.fix_store import Store

READ_BYTES = 1 << 16
_TICK_S = 0.1
_CLOSE_S = 1.0
_WRITE_BYTES_MAX = 1 << 20
_log = structlog.get_logger("fix")

Handler = Callable[[Event], Awaitable[None]]


class Link:
    """A session on one connection.

    Args:
        handle: takes each event, in order. It may send.
        tick_s: how often what is due is looked for.

    Attributes:
        session: the session.
        bytes_in, bytes_out: how many have been handled, and handed to the socket.
    """

    def __init__(
        self, session: Session, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handle: Handler, tick_s: float = _TICK_S
    ) -> None:
        self.session = session
        self.bytes_in = self.bytes_out = 0
        self._reader, self._writer, self._handle, self._tick_s = reader, writer, handle, tick_s
        self._ended = Ended("the connection is lost")
        self._reading: asyncio.Future[bytes] | None = None
        self._let_go = False

    async def run(self, begun: bytes = b"") -> Ended:
        """Run the session until the connection ends; `begun`: bytes that have been read already. Says how it ended."""
        self.session.connect()
        ticks = asyncio.create_task(self._ticks())
        try:
            await self._flush()
            data = begun or await self._read()
            while data and not self.session.closing:
                await self._events(self.session.receive(data))
                self.bytes_in += len(data)
                await self._flush()
                if not self.session.closing:
                    data = await self._read()
        except OSError as error:
            self._ended = Ended(f"the connection is lost ({error.strerror or error})")
        finally:
            ticks.cancel()
            await asyncio.gather(ticks, return_exceptions=True)
            await self._close()
            await self._events(self.session.disconnected())
        return self._ended

    def send(self, msg_type: str, body: Fields, header: Fields = ()) -> int:
        """Send a message now, as :meth:`tickmesh.node.fix_session.Session.send`."""
        sequence = self.session.send(msg_type, body, header)
        self.push()
        return sequence

    def push(self) -> None:
        """Write what the session has to say, as far as the peer takes it."""
        transport = self._writer.transport
        while not transport.is_closing() and transport.get_write_buffer_size() < _WRITE_BYTES_MAX:
            data = self.session.take_output()
            if not data:
                return
            self.bytes_out += len(data)
            self._writer.write(data)

    def abort(self) -> None:
        """Drop the connection as it is; the session goes on with the next."""
        self._writer.transport.abort()

    async def logout(self, text: str = "") -> None:
        """Begin to end the session; :meth:`run` returns when it has ended."""
        self.session.logout(text)
        await self._flush()

    async def _events(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Ended):
                self._ended = event
            await self._handle(event)

    async def _flush(self) -> None:
        while data := self.session.take_output():
            self.bytes_out += len(data)
            self._writer.write(data)
            await self._writer.drain()

    async def _read(self) -> bytes:
        """What comes next; nothing once the session has closed for what was due."""
        if self._let_go:
            return b""
        self._reading = asyncio.ensure_future(self._reader.read(READ_BYTES))
        try:
            return await self._reading
        except asyncio.CancelledError:
            if self._let_go:
                return b""
            raise

    async def _ticks(self) -> None:
        """What is due, until the session closes; then nobody reads any more."""
        while True:
            await asyncio.sleep(self._tick_s)
            await self._events(self.session.tick())
            self.push()
            if self.session.closing:
                self._let_go = True
                if self._reading is not None:
                    self._reading.cancel()
                await asyncio.sleep(_CLOSE_S)  # a peer that takes nothing holds up whoever writes
                self._writer.transport.abort()
                return

    async def _close(self) -> None:
        """Close so that the peer still gets what was sent: an end of our side first, and what it says meanwhile is read."""
        with contextlib.suppress(OSError, RuntimeError, TimeoutError, ssl.SSLError):
            async with asyncio.timeout(_CLOSE_S):
                if self.session.closing:
                    await self._flush()
                    if self._writer.can_write_eof():
                        self._writer.write_eof()
                        while await self._reader.read(READ_BYTES):
                            pass
                self._writer.close()
                await self._writer.wait_closed()
        if not self._writer.transport.is_closing():
            self._writer.transport.abort()


# ---------------------------------------------------------------- acceptor


class Application(Protocol):
    """What an acceptor's session is for."""

    async def handle(self, link: Link, event: Event) -> None:
        """Take an event of the session, and send what it asks for."""


@dataclass(frozen=True)
class Accepted:
    """A session that an acceptor has: how it is run, what it remembers, what it is for."""

    options: SessionOptions
    store: Store
    application: Application


class Acceptor:
    """Listens for initiators.

    Args:
        sessions: all that may log on; the CompIDs tell them apart.
        tls: context of a server, for TLS.
        waiting_max: most connections without a logon.
        logon_s: how long a connection may be without one.

    Attributes:
        counters: `connections`, `refused` by reason: `refused_unknown`, `refused_taken`, `refused_garbled`, `refused_silent`,
            `refused_crowded`.
        links: the sessions that are connected, by the peer's CompID and ours.
    """

    def __init__(
        self,
        sessions: Iterable[Accepted],
        *,
        tls: ssl.SSLContext | None = None,
        clock: Clock | None = None,
        waiting_max: int = 64,
        logon_s: float = 10.0,
        tick_s: float = _TICK_S,
    ) -> None:
        self._accepted = {(a.options.target, a.options.sender): a for a in sessions}
        self._sessions = {key: Session(a.options, a.store, clock) for key, a in self._accepted.items()}
        self.links: dict[tuple[str, str], Link] = {}
        self.counters: Counter[str] = Counter()
        self._tls, self._waiting_max, self._logon_s, self._tick_s = tls, waiting_max, logon_s, tick_s
        self._waiting = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Listen; returns the port (0: any that is free).

        Raises:
            OSError: the address cannot be used.
        """
        self._server = await asyncio.start_server(
            self._connected, host, port, ssl=self._tls, limit=READ_BYTES,
            **({"ssl_handshake_timeout": self._logon_s} if self._tls else {}),
        )  # fmt: skip
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Log everybody out, and close."""
        if self._server is not None:
            self._server.close()
        for link in list(self.links.values()):
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await link.logout("the acceptor stops")
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2 * _CLOSE_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for accepted in self._accepted.values():
            accepted.store.close()

    def session(self, peer: str, ours: str) -> Session:
        """The session of a peer, connected or not: what is sent while it is not comes when it asks for it.

        Raises:
            KeyError: there is none.
        """
        return self._sessions[peer, ours]

    @property
    def session_counters(self) -> Mapping[tuple[str, str], Counter[str]]:
        """What each session counted."""
        return {key: session.counters for key, session in self._sessions.items()}

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.counters["connections"] += 1
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the peer has gone
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._waiting >= self._waiting_max:
            self._refuse("crowded", "too many connections without a logon")
            return
        self._waiting += 1
        try:
            async with asyncio.timeout(self._logon_s):
                begun = await _first_message(reader)
        except TimeoutError:
            self._refuse("silent", f"no Logon within {self._logon_s:g} s")
            return
        finally:
            self._waiting -= 1
        if not begun:
            self._refuse("garbled", "what came is no Logon")
            return
        key = _identity(begun)
        if key not in self._sessions:
            self._refuse("unknown", "no session has these CompIDs")
        elif key in self.links:
            self._refuse("taken", "the session is connected already")
        else:
            await self._run(key, reader, writer, begun)

    def _refuse(self, why: str, reason: str) -> None:
        self.counters["refused"] += 1
        self.counters[f"refused_{why}"] += 1
        _log.warning("a FIX connection is refused", reason=reason)

    async def _run(self, key: tuple[str, str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter, begun: bytes) -> None:
        application = self._accepted[key].application

        async def handle(event: Event) -> None:
            if isinstance(event, LoggedOn):
                _log.info("a FIX session is logged on", peer=key[0], reset=event.reset)
            elif isinstance(event, Ended):
                _log.info("a FIX session has ended", peer=key[0], reason=event.reason)
            await application.handle(link, event)

        link = self.links[key] = Link(self._sessions[key], reader, writer, handle, self._tick_s)
        try:
            await link.run(begun)
        finally:
            del self.links[key]


async def _first_message(reader: asyncio.StreamReader) -> bytes:
    """Bytes up to the first message's end and perhaps further; empty if that is not what comes."""
    begun = b""
    while len(begun) < LOGON_BYTES_MAX:
        piece = await reader.read(LOGON_BYTES_MAX - len(begun))
        begun += piece
        if not piece or not (begun.startswith(b"8=FIX") or b"8=FIX".startswith(begun[:5])):
            return b""
        trailer = begun.find(b"\x0110=")
        if trailer >= 0 and begun.find(b"\x01", trailer + 4) >= 0:
            return begun
    return b""


def _identity(begun: bytes) -> tuple[str, str]:
    """SenderCompID and TargetCompID of the first message; the session itself looks at the rest."""
    end = begun.find(b"\x01", begun.find(b"\x0110=") + 4) + 1
    message = parse_message(begun[:end])
    if message is None:
        return "", ""
    sender, target = message.get(49) or b"", message.get(56) or b""
    return sender.decode("latin-1"), target.decode("latin-1")
