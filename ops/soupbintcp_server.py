"""A SoupBinTCP server: serves a session's messages to any number of clients, each from the sequence that it asks for.

It keeps the whole session, as exchanges do, so that a client that comes late, or back, gets everything. For tests of clients it can do what
happens to real ones: close connections at seeded places (in the middle of a packet too), refuse logins, begin another session, fall silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import uvloop

from tickmesh.ops.simulator import Simulator
from tickmesh.transports.pacing import Pace
from tickmesh.transports.soupbintcp import (
    ACCEPTED,
    END,
    HEARTBEAT,
    LOGIN,
    LOGOUT,
    PACKET_BYTES_MAX,
    REJECTED,
    packet,
)
from tickmesh.transports.soupbintcp_packets import enframe
from tickmesh.transports.toolbox import be16, loop

Bytes = npt.NDArray[np.uint8]
_LOGIN_BYTES = 46
_OUT_BYTES = 1 << 16
_LOGIN_S, _HEARTBEAT_S, _SILENCE_S, _LOOK_S = 10.0, 1.0, 15.0, 0.002
_CLIENTS_MAX = 64
_SLICE_NS = 2_000_000
_BLOCK_MESSAGES = 4096


@loop
def index_messages(image: Any, end: Any, base: Any, out: Any) -> Any:
    """Offsets, plus `base`, of the length-prefixed messages in ``image[:end]``; returns how many, at most as `out` has room for."""
    pos, n = np.int64(0), np.int64(0)
    while pos + 2 <= end and n < np.int64(out.size):
        out[n] = base + pos
        n += 1
        pos += np.int64(be16(image, pos)) + 2
    return n


class SessionLog:
    """The messages of a session, in order, in memory; written by one thread, read by the server's."""

    def __init__(self) -> None:
        self._image: Bytes = np.zeros(1 << 20, np.uint8)
        self._offsets = np.zeros(1 << 16, np.int64)
        self._digest = hashlib.sha256()
        self._state = (0, 0)
        """Messages and bytes: read and replaced as one."""

    @property
    def messages(self) -> int:
        """How many there are."""
        return self._state[0]

    @property
    def bytes(self) -> int:
        """How many bytes."""
        return self._state[1]

    @property
    def sha256(self) -> str:
        """Of the messages behind their lengths, as a file of them has it."""
        return self._digest.hexdigest()

    def append(self, image: Bytes, end: int) -> int:
        """Add the length-prefixed messages of ``image[:end]``; returns how many."""
        messages, size = self._state
        if size + end > len(self._image):
            grown = np.zeros(max(2 * len(self._image), size + end), np.uint8)
            grown[:size] = self._image[:size]
            self._image = grown
        self._image[size : size + end] = image[:end]
        self._digest.update(image[:end].data)
        room = end // 2 + 1
        if messages + room > len(self._offsets):
            more = np.zeros(2 * len(self._offsets) + room, np.int64)
            more[:messages] = self._offsets[:messages]
            self._offsets = more
        added = int(index_messages(image, np.int64(end), np.int64(size), self._offsets[messages:]))
        self._state = (messages + added, size + end)
        return added

    def offset(self, sequence: int) -> int:
        """Where message `sequence` begins in the image; the end for the one that comes next."""
        messages, size = self._state
        return int(self._offsets[sequence - 1]) if sequence <= messages else size

    def frames(self, offset: int, out: Bytes, messages_max: int) -> tuple[int, int, int]:
        """Sequenced packets from an offset on, into `out`; returns (messages, bytes in `out`, next offset)."""
        messages, size = self._state
        end = size
        if messages_max < messages:  # cut at a message, for those who count
            first = int(np.searchsorted(self._offsets[:messages], offset))
            if first + messages_max < messages:
                end = int(self._offsets[first + messages_max])
        count, written = enframe(self._image, np.int64(offset), np.int64(end), out)
        return int(count), int(written), offset + int(written) - int(count)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How a server behaves.

    Attributes:
        host, port: where it listens; port 0: any free one.
        session: its name, up to 10 characters.
        user, password: what a login must say; None: anything.
        disconnect_every: a connection is closed after so many messages in the mean, drawn anew for each; 0: never.
        seed: of those draws.
        heartbeat_s: silence after which a heartbeat is sent.
        tls: for connections by TLS.
    """

    host: str = "127.0.0.1"
    port: int = 0
    session: str = "TICKMESH"
    user: str | None = None
    password: str | None = None
    disconnect_every: int = 0
    seed: int = 1
    heartbeat_s: float = _HEARTBEAT_S
    tls: ssl.SSLContext | None = None


@dataclass
class _Client:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    left: int = 1 << 62
    """Messages until it is closed."""
    out: Bytes = field(default_factory=lambda: np.zeros(_OUT_BYTES + PACKET_BYTES_MAX, np.uint8))
    sent_s: float = 0.0


class SoupBinTcpServer:
    """Serves a log; a context manager, with a thread of its own.

    Attributes:
        port: where it listens.
        log: the session's messages; append to it from one thread.
        session: its name.
        logins, refused, disconnects, clients: how many so far; connections now.
        silent: while it is true, nothing is sent: a server that hangs.
    """

    def __init__(self, options: ServerOptions, log: SessionLog | None = None) -> None:
        self.options, self.log, self.session = options, log or SessionLog(), options.session
        self.port = self.logins = self.refused = self.disconnects = self.clients = 0
        self.silent = self.ended = False
        self._random = random.Random(options.seed)
        self._loop = uvloop.new_event_loop()
        self._started = threading.Event()
        self._stop = asyncio.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="soupbintcp-server", daemon=True)

    def __enter__(self) -> SoupBinTcpServer:
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5)

    def restart(self, session: str, log: SessionLog | None = None) -> None:
        """Begin another session; whoever is connected is cut off."""
        self.session, self.log, self.ended = session, log or SessionLog(), False
        self.cut()

    def end(self) -> None:
        """Say that the session is over, once everything has been sent."""
        self.ended = True

    def cut(self) -> None:
        """Close every connection, in the middle of whatever."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._cut)

    # -- the thread

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except OSError as error:
            self._failure = error
        finally:
            self._started.set()
            self._loop.close()

    async def _serve(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        server = await asyncio.start_server(self._client, self.options.host, self.options.port, ssl=self.options.tls)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        server.close()
        self._cut()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2)

    def _cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.clients += 1
        try:
            if self.clients <= _CLIENTS_MAX:
                await self._conversation(_Client(reader, writer))
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass  # a client that goes is nothing special
        finally:
            self.clients -= 1
            self._writers.discard(writer)
            self._tasks.discard(task)
            writer.transport.abort() if self.options.tls else writer.close()

    async def _conversation(self, client: _Client) -> None:
        sequence = await self._login(client)
        if sequence is None:
            return
        self.logins += 1
        every = self.options.disconnect_every
        client.left = self._random.randint(1, 2 * every) if every else client.left
        listening = asyncio.create_task(self._listen(client))
        try:
            await self._send(client, sequence, listening)
        finally:
            listening.cancel()

    async def _login(self, client: _Client) -> int | None:
        """Answer the login; the sequence that comes next, None if it is refused."""
        async with asyncio.timeout(_LOGIN_S):
            head = await client.reader.readexactly(3)
            if head[2:] != LOGIN or int.from_bytes(head[:2], "big") != 1 + _LOGIN_BYTES:
                return None
            text = (await client.reader.readexactly(_LOGIN_BYTES)).decode("ascii", "replace")
        user, password, session, wanted = text[:6].strip(), text[6:16].strip(), text[16:26].strip(), text[26:46].strip()
        reason = b""
        if self.options.user not in (None, user) or self.options.password not in (None, password):
            reason = b"A"
        elif session not in ("", self.session):
            reason = b"S"
        if reason or not wanted.isdigit():
            self.refused += 1
            client.writer.write(packet(REJECTED, reason or b"A"))
            await client.writer.drain()
            return None
        next_one = self.log.messages + 1
        sequence = min(int(wanted) or next_one, next_one)
        client.writer.write(packet(ACCEPTED, self.session.rjust(10).encode() + str(sequence).rjust(20).encode()))
        return sequence

    async def _listen(self, client: _Client) -> None:
        """Until the client logs out, or has been silent for too long."""
        while True:
            async with asyncio.timeout(_SILENCE_S):
                head = await client.reader.readexactly(3)
                await client.reader.readexactly(max(0, int.from_bytes(head[:2], "big") - 1))
            if head[2:] == LOGOUT:
                return

    async def _send(self, client: _Client, sequence: int, listening: asyncio.Task[None]) -> None:
        log, offset = self.log, self.log.offset(sequence)
        client.sent_s = time.monotonic()
        while not listening.done() and log is self.log:
            if self.silent:
                await asyncio.sleep(_LOOK_S)
                continue
            count, size, offset = log.frames(offset, client.out, client.left)
            if count:
                client.left -= count
                if client.left <= 0:
                    await self._break_off(client, size)
                    return
                client.writer.write(client.out[:size].tobytes())
                client.sent_s = time.monotonic()
                await client.writer.drain()
                continue
            if self.ended and offset >= log.bytes:
                client.writer.write(packet(END))
                await client.writer.drain()
                return
            if time.monotonic() - client.sent_s >= self.options.heartbeat_s:
                client.writer.write(packet(HEARTBEAT))
                client.sent_s = time.monotonic()
            await asyncio.sleep(_LOOK_S)

    async def _break_off(self, client: _Client, size: int) -> None:
        """Send what is left, up to somewhere in the last packet, and be gone."""
        client.writer.write(client.out[: size - self._random.randint(0, min(8, size - 1))].tobytes())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await client.writer.drain()
        self.disconnects += 1
        client.writer.transport.close()


# ---------------------------------------------------------------- a simulated market on it


def feed_log(simulator: Simulator, log: SessionLog, speed: str | float, stop: threading.Event) -> Iterator[int]:
    """Append a simulated day to a log at its own pace; yields the number of messages so far, until the day or `stop` ends it."""
    pace = Pace(speed)
    while not simulator.finished and not stop.is_set():
        factor = float(pace.state["factor"][0])
        wait_ns = pace.wait_ns(simulator.next_ns)
        if wait_ns:
            stop.wait(min(wait_ns / 1e9, 0.05))
            continue
        until_ns = simulator.next_ns + int(_SLICE_NS * factor) if factor else 1 << 62
        image, end = simulator.next_block(_BLOCK_MESSAGES, until_ns)
        log.append(image, end)
        yield simulator.messages


def fill_log(image: Bytes | Sequence[int]) -> SessionLog:
    """A log of the messages of a BinaryFILE image."""
    log = SessionLog()
    whole = np.asarray(image, np.uint8)
    log.append(whole, len(whole))
    return log
