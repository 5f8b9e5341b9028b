"""FIX sessions over TCP, with or without TLS: what carries the bytes of :class:`tickmesh.node.fix_session.Session`.

:class:`Link` runs a session on a connection. :class:`Acceptor` listens, finds the session that a Logon is for, and lets each have one
connection at a time; who has not logged on may hold few connections, for a short time, with little memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from tickmesh.node.fix_frame import TRAILER_BYTES, Message
from tickmesh.node.fix_session import (
    LOGON_BYTES_MAX,
    Clock,
    Ended,
    Event,
    Fields,
    LoggedOn,
    Received,
    Session,
    SessionOptions,
    parse_message,
)
from tickmesh.node.fix_store import Store, StoreError

READ_BYTES = 1 << 16
_TICK_S = 0.1
_CLOSE_S = 1.0
_GOODBYE_S = 0.5
"""How long a link that is stopped waits for the peer's Logout; what is left of it is for closing."""
_WRITE_BYTES_MAX = 1 << 20
_HEAD = re.compile(rb"8=FIX[^\x01]{1,8}\x019=(\d{1,5})\x01")
_HEAD_BYTES_MAX = 24
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
        self._parting: list[Event] = []
        """What a stopped link has heard last."""
        self._reading: asyncio.Future[bytes] | None = None
        self._let_go = False

    async def run(self, begun: bytes = b"") -> Ended:
        """Run the session until the connection ends; `begun`: bytes that have been read already. Says how it ended.

        Whoever cancels it has it log out first, and wait for the peer's answer for a moment.
        """
        self.session.connect()
        ticks = asyncio.create_task(self._ticks())
        try:
            await self._talk(begun)
        except (OSError, StoreError) as error:
            self._ended = Ended(f"the connection is lost ({getattr(error, 'strerror', None) or error})")
        except asyncio.CancelledError:
            ticks.cancel()
            await _to_its_end(self._say_goodbye())
            raise
        finally:
            ticks.cancel()
            (failed,) = await asyncio.gather(ticks, return_exceptions=True)
            await self._close()
            await self._events([*self._parting, *self.session.disconnected()])
        if isinstance(failed, Exception):
            raise failed
        return self._ended

    async def _talk(self, begun: bytes) -> None:
        await self._flush()
        data = begun or await self._read()
        while data and not self.session.closing:
            await self._events(self.session.receive(data))
            self.bytes_in += len(data)
            await self._flush()
            if not self.session.closing:
                data = await self._read()

    async def _say_goodbye(self) -> None:
        """Log out, and wait for the answer. Messages that come meanwhile are not handled any more: the next logon asks for them."""
        with contextlib.suppress(OSError, StoreError, TimeoutError):
            async with asyncio.timeout(_GOODBYE_S):
                await self.logout("we are stopping")
                while not self.session.closing and (data := await self._reader.read(READ_BYTES)):
                    events = self.session.receive(data)
                    self._parting += (event for event in events if isinstance(event, Ended))
                    self.session.handling += any(isinstance(event, Received) and not event.admin for event in events)
                    await self._flush()
        if not self.session.closing:
            self._writer.transport.abort()

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
        self.session.handling += 1
        for event in events:
            if isinstance(event, Ended):
                self._ended = event
            await self._handle(event)
        self.session.handling -= 1  # not if it fails or is cancelled: who knows what of it has been handled

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
        try:
            while not self.session.closing:
                await asyncio.sleep(self._tick_s)
                await self._events(self.session.tick())
                self.push()
            self._let_go = True
            if self._reading is not None:
                self._reading.cancel()
            await asyncio.sleep(_CLOSE_S)  # a peer that takes nothing holds up whoever writes
        except Exception:
            self._writer.transport.abort()
            raise
        self._writer.transport.abort()

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


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await what ends by itself to its end, also if we are cancelled once more."""
    task = asyncio.create_task(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    task.result()


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
            `refused_crowded`, `refused_insecure`, `refused_logon`.
        links: the sessions that are connected, by the peer's CompID and ours.
        ended: how the last connection of each session ended.
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
        self.ended: dict[tuple[str, str], Ended] = {}
        self.counters: Counter[str] = Counter()
        self._tls, self._waiting_max, self._logon_s, self._tick_s = tls, waiting_max, logon_s, tick_s
        self._waiting = 0
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Listen; returns the port (0: any that is free).

        Raises:
            OSError: the address cannot be used.
        """
        loop = asyncio.get_running_loop()
        ((family, _, _, _, address), *_) = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        self._listener = socket.create_server(address[:2], family=family, backlog=self._waiting_max)
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept(self._listener))
        return int(self._listener.getsockname()[1])

    async def stop(self) -> None:
        """Log everybody out, and close."""
        if self._accepting is not None and self._listener is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
            self._listener.close()
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

    async def _accept(self, listener: socket.socket) -> None:
        """Connections, each in a task of its own. TLS is begun there too: who does not get through with it is one that waits."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                taken, _ = await loop.sock_accept(listener)
            except OSError as error:  # no descriptors are left, or the peer has gone already
                _log.warning("a FIX connection cannot be accepted", reason=error.strerror)
                await asyncio.sleep(self._tick_s)
                continue
            self.counters["connections"] += 1
            task = asyncio.create_task(self._connected(taken))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connected(self, taken: socket.socket) -> None:
        if self._waiting >= self._waiting_max:
            taken.close()
            self._refuse("crowded", "too many connections without a logon")
            return
        try:
            begun = await self._begun(taken)
            if begun is not None:
                try:
                    await self._admit(*begun)
                finally:
                    begun[1].close()
        except StoreError as error:
            _log.error("a FIX session cannot go on", reason=str(error))
        except (OSError, asyncio.IncompleteReadError):
            pass  # the peer has gone

    async def _begun(self, taken: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes, Message | None] | None:
        """A connection's streams and its first message, if they come in time."""
        writer: asyncio.StreamWriter | None = None
        self._waiting += 1
        try:
            async with asyncio.timeout(self._logon_s):
                reader, writer = await self._streams(taken)
                return reader, writer, *await _first_message(reader)
        except BaseException as error:
            (taken.close if writer is None else writer.transport.abort)()
            if isinstance(error, TimeoutError):
                self._refuse("silent", f"no Logon within {self._logon_s:g} s")
            elif isinstance(error, ssl.SSLError):
                self._refuse("insecure", f"no trusted TLS ({error.reason or error})")
            else:
                raise
            return None
        finally:
            self._waiting -= 1

    async def _streams(self, taken: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=READ_BYTES, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        handshake = {"ssl_handshake_timeout": 2 * self._logon_s} if self._tls else {}  # ours comes first
        taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, taken, ssl=self._tls, **handshake)
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, begun: bytes, first: Message | None) -> None:
        """Run the session that a first message is for. Before it is a Logon with the right password, it touches no session."""
        if first is None:
            self._refuse("garbled", "what came is no Logon")
            return
        key = (first.get(49) or b"").decode("latin-1"), (first.get(56) or b"").decode("latin-1")
        if key not in self._sessions:
            self._refuse("unknown", "no session has these CompIDs")
        elif key in self.links:
            self._refuse("taken", "the session is connected already")
        elif problem := self._sessions[key].logon_problem(first):
            self._refuse("logon", problem)
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
                self.ended[key] = event
                _log.info("a FIX session has ended", peer=key[0], reason=event.reason)
            await application.handle(link, event)

        link = self.links[key] = Link(self._sessions[key], reader, writer, handle, self._tick_s)
        try:
            await link.run(begun)
        finally:
            del self.links[key]


async def _first_message(reader: asyncio.StreamReader) -> tuple[bytes, Message | None]:
    """Bytes up to the first message's end and perhaps further, and that message; None if that is not what comes."""
    begun = b""
    while len(begun) < LOGON_BYTES_MAX:
        piece = await reader.read(LOGON_BYTES_MAX - len(begun))
        begun += piece
        head = _HEAD.match(begun)
        size = head.end() + int(head[1]) + TRAILER_BYTES if head else 0
        strange = head is None and (len(begun) > _HEAD_BYTES_MAX or not begun.startswith(b"8=FIX"[: len(begun)]))
        if not piece or strange or size > LOGON_BYTES_MAX:
            break
        if head and len(begun) >= size:
            right = begun[size - TRAILER_BYTES : size] == b"10=%03d\x01" % (sum(begun[: size - TRAILER_BYTES]) & 0xFF)
            return begun, parse_message(begun[:size]) if right else None
    return begun, None
