"""The adapters that are built in: websocket, HTTP, SoupBinTCP and plain TCP, NATS, and a file that grows."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import structlog

from tickmesh.control.config import Source
from tickmesh.node.adapters import Adapter, AdapterMaker, Sink, SourceEnded, session_number
from tickmesh.node.json_feed import BinanceFeed
from tickmesh.node.reader import SourceError
from tickmesh.node.venues import TALKS, Talk, book_again, unsubscribable
from tickmesh.transports import nats, nats_reader, soupbintcp
from tickmesh.transports.codecache import load_compiled
from tickmesh.transports.connection import (
    Backoff,
    BrokenProtocol,
    ConnectionLost,
    ConnectionProblem,
    ConnectionSilent,
    LoginRefused,
    NotTrusted,
    Refused,
)
from tickmesh.transports.recording import compression_of
from tickmesh.transports.tail import Piece, Tail
from tickmesh.transports.web import EventStream, HttpClient, WebOptions, Websocket, open_websocket

_WANTED_LOOK_S = 0.05
_WANTED_AGAIN_S = 5.0
"""A snapshot that was asked for may take so long before it is asked for again."""
_READ_BYTES = 1 << 18
_LOOK_S, _PENDING_MAX, _STRETCH = 0.25, 65_536, 64
_ANSWERS, _ANSWER_BYTES_MAX = 64, 1024
_DELETED_LOOK_S = 0.02
_log = structlog.get_logger("source")
_SYMBOL = "{symbol}"
_Read = TypeVar("_Read")


def _seconds(milliseconds: float | None, usual_s: float) -> float:
    return usual_s if milliseconds is None else milliseconds / 1e3


def web_options(adapter: Adapter) -> WebOptions:
    """How an adapter's requests are made: limits, headers, login, TLS.

    Raises:
        SecretMissing: a secret that the configuration names is not there.
    """
    options, headers = adapter.options, dict(adapter.options.headers)
    token, password = adapter.secret("token"), adapter.secret("password")
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    elif options.user is not None:
        pair = base64.b64encode(f"{options.user}:{password or ''}".encode()).decode()
        headers["Authorization"] = f"Basic {pair}"
    return WebOptions(
        connect_s=options.connect_timeout_ms / 1e3,
        silence_s=_seconds(options.silence_ms, 60.0),
        heartbeat_s=_seconds(options.heartbeat_ms, 15.0),
        message_bytes_max=options.message_max_kb << 10,
        headers=headers,
        tls=adapter.tls() if urlsplit(options.endpoint or "").scheme in ("wss", "https") else None,
    )


# ---------------------------------------------------------------- websocket


class WebsocketSource(Adapter):
    """A websocket client: subscribes, answers pings, and asks again for books that wait for a snapshot."""

    def __init__(self, name: str, options: Source, sink: Sink, resolve: Callable[[str], Path] = Path) -> None:
        super().__init__(name, options, sink, resolve)
        self._talk: Talk | None = TALKS.get(options.data_format or "")
        self._web = web_options(self)
        self._subscribe = list(options.subscribe)
        subscribed_by_address = "@" in (options.endpoint or "")
        if not self._subscribe and self._talk is not None and not subscribed_by_address:
            if not options.symbols or unsubscribable(options.symbols):
                wrong = ", ".join(unsubscribable(options.symbols)) or "none are given"
                raise SourceError(name, f"symbols must be names, to subscribe to them ({wrong}); or give the messages in subscribe")
            self._subscribe = self._talk.subscribe(options.channels, options.symbols)

    async def run(self) -> None:
        assert self.options.endpoint is not None
        async with open_websocket(self.options.endpoint, self._web) as socket:
            for text in self._subscribe:
                await socket.send(text)
            self.sink.connected()
            beside = [asyncio.create_task(self._pings(socket)), asyncio.create_task(self._snapshots(socket))]
            try:
                await self._receive(socket)
            finally:
                for task in beside:
                    task.cancel()
                await asyncio.gather(*beside, return_exceptions=True)  # what they could not send, receiving has noticed too

    async def _receive(self, socket: Websocket) -> None:
        pong, sink, first = self._talk.pong if self._talk else b"", self.sink, 0
        while True:
            data = await socket.receive()
            if first < _ANSWERS:
                first += 1
                self._look_at(data)
            if data != pong or not pong:
                await sink(data)

    def _look_at(self, data: bytes) -> None:
        """Among the first messages may be a venue's word that it does not like the subscription."""
        if len(data) < _ANSWER_BYTES_MAX and (b'"error"' in data or b'"success":false' in data.replace(b" ", b"")):
            self.sink.count("errors")
            _log.warning("the venue answers with an error", source=self.name, answer=data.decode("utf-8", "replace"))

    async def _pings(self, socket: Websocket) -> None:
        """The venue's own, where it has one."""
        while self._talk is not None and self._talk.ping:
            await asyncio.sleep(self._web.heartbeat_s or 15.0)
            await socket.send(self._talk.ping)

    # -- snapshots

    async def _snapshots(self, socket: Websocket) -> None:
        """Books that wait for a snapshot get one: by request, or by subscribing again."""
        feed, asked = self.sink.venue, dict[str, float]()
        if feed is None or self._talk is None:
            return
        async with HttpClient(replace(self._web, headers={})) as http:  # another host: it gets no token
            while True:
                await asyncio.sleep(_WANTED_LOOK_S)
                for symbol in sorted(feed.snapshots_wanted):
                    if time.monotonic() - asked.get(symbol, -_WANTED_AGAIN_S) < _WANTED_AGAIN_S:
                        continue
                    asked[symbol] = time.monotonic()
                    if await self._snapshot(http, socket, symbol):
                        del asked[symbol]  # it is in the book: should the next gap follow at once, ask at once
                    await asyncio.sleep(self.options.snapshot_interval_ms / 1e3)

    async def _snapshot(self, http: HttpClient, socket: Websocket, symbol: str) -> bool:
        feed, talk = self.sink.venue, self._talk
        assert talk is not None
        self.sink.count("snapshots_asked")
        if not isinstance(feed, BinanceFeed):
            again = talk.unsubscribe(["book"], [symbol]) + talk.subscribe(["book"], [symbol])
            if self.options.subscribe:
                again = book_again(self.options.subscribe, symbol)
            if not again:
                self.sink.count("snapshots_failed")
                _log.warning("a book waits for a snapshot, and subscribe has no subscription of it", source=self.name, symbol=symbol)
            for text in again:
                await socket.send(text)
            return False
        url = (self.options.snapshot_endpoint or talk.snapshot).replace(_SYMBOL, symbol)
        try:
            async with http.get(url) as answer:
                body = await answer.body()
        except Refused as error:
            asked_s = error.retry_after_s or self.options.reconnect_max_ms / 1e3
            await asyncio.sleep(min(asked_s, self.options.retry_after_max_ms / 1e3))  # and the others wait too
            return False
        except ConnectionProblem:
            self.sink.count("snapshots_failed")
            return False
        await self.sink.snapshot(symbol, body)
        return True


# ---------------------------------------------------------------- HTTP


class HttpSource(Adapter):
    """GET, again and again, or once for a body that does not end: lines, or server-sent events."""

    def __init__(self, name: str, options: Source, sink: Sink, resolve: Callable[[str], Path] = Path) -> None:
        super().__init__(name, options, sink, resolve)
        self._web = web_options(self)
        self.carries = "stream" if options.reading == "lines" else "messages"
        self._seen: dict[str, str] = {}
        """The conditions of the next poll."""
        self._events = EventStream(self._web.message_bytes_max)

    async def run(self) -> None:
        async with HttpClient(self._web) as http:
            if self.options.reading == "poll":
                await self._poll(http)
            else:
                await self._read(http)

    async def _poll(self, http: HttpClient) -> None:
        assert self.options.endpoint is not None
        interval_s = self.options.poll_interval_ms / 1e3
        due = asyncio.get_running_loop().time()
        self._seen = {}  # the books are stale after a lost connection: they need the body even if nothing has changed
        while True:
            async with http.get(self.options.endpoint, self._seen) as answer:
                self.sink.connected()
                if answer.status == 304:
                    self.sink.count("unchanged")
                else:
                    await self.sink(await answer.body())
                    self._seen = _conditions(answer.headers)
            due = max(due + interval_s, asyncio.get_running_loop().time())
            await asyncio.sleep(due - asyncio.get_running_loop().time())

    async def _read(self, http: HttpClient) -> None:
        assert self.options.endpoint is not None
        sse, events = self.options.reading == "sse", self._events
        asked = {"Accept": "text/event-stream", "Cache-Control": "no-cache"} if sse else {}
        if events.last_id:
            asked["Last-Event-ID"] = events.last_id
        async with http.get(self.options.endpoint, asked) as answer:
            self.sink.connected()
            events.begin()
            async for piece in answer.pieces():
                if not sse:
                    await self.sink(piece)
                    continue
                try:
                    found = events.feed(piece)
                except ValueError as error:
                    raise BrokenProtocol(self.endpoint, str(error), "raise message_max_kb if the server can be trusted") from None
                for data in found:
                    await self.sink(data)
        raise (
            Refused(self.endpoint, "the body has ended", retry_after_s=events.retry_s)
            if sse and events.retry_s is not None
            else ConnectionLost(self.endpoint, "the body has ended")
        )


def _conditions(headers: Mapping[str, str]) -> dict[str, str]:
    """What makes the next poll cheap: the server answers 304 if nothing has changed (RFC 9110, 13.1)."""
    if "ETag" in headers:
        return {"If-None-Match": headers["ETag"]}
    return {"If-Modified-Since": headers["Last-Modified"]} if "Last-Modified" in headers else {}


# ---------------------------------------------------------------- TCP


class SoupBinTcpSource(Adapter):
    """A SoupBinTCP client: goes on after a lost connection where it was, and in the venue's next session from its beginning."""

    carries = "stream"
    resumes = True

    def __init__(self, name: str, options: Source, sink: Sink, resolve: Callable[[str], Path] = Path) -> None:
        super().__init__(name, options, sink, resolve)
        parts = urlsplit(options.endpoint or "")
        tls = self.tls() if parts.scheme == "tls" else None
        host, port, password = parts.hostname or "", parts.port or 0, self.secret("password") or ""
        self._login = soupbintcp.Login(host, port, options.user or "", password, options.session, tls)
        try:
            soupbintcp.login_packet(self._login.user, password, options.session, 1)
        except ValueError as error:
            raise SourceError(name, str(error)) from None
        heartbeat_s, silence_s = _seconds(options.heartbeat_ms, 1.0), _seconds(options.silence_ms, 15.0)
        self._limits = soupbintcp.Limits(options.connect_timeout_ms / 1e3, heartbeat_s, silence_s)
        load_compiled("tickmesh.transports.soupbintcp_packets", "SoupBinTCP packets")
        self._session = options.session
        """The session to ask for."""

    async def run(self) -> None:
        for _ in range(2):
            client = soupbintcp.Client(self._login, self._limits)
            try:
                if await self._logged_in(client):
                    await self._receive(client)
            finally:
                self.sink.count("empty_messages", client.empty)
                await client.close()

    async def _logged_in(self, client: soupbintcp.Client) -> bool:
        """Log in where we were; false: a new session has begun without us, whose beginning is to be asked for."""
        expected, before, begin_first = self.sink.next_sequence, self.sink.session, self.options.begin != "next"
        try:
            await client.open(self._session, expected or int(begin_first))
        except soupbintcp.SessionRefused:
            self._session = self.options.session  # the one that we were in is over
            raise
        same, at = session_number(client.session) == before, client.sequence
        self._session = client.session
        if same and 1 < at < expected:  # a server that is behind the one that we were at
            client.skip(expected - at)
            self.sink.count("skipped", expected - at)
            at = expected
        began_anew = expected and (at < expected or (not same and at != 1 and before != 0))
        if began_anew and at != 1 and begin_first:
            await self.sink.begin(1, client.session)
            return False
        await self.sink.begin(at, client.session)
        return True

    async def _receive(self, client: soupbintcp.Client) -> None:
        try:
            while True:
                data = await client.read()
                if len(data):
                    await self.sink(data)
        except ConnectionLost:
            if client.ended:
                self._session = self.options.session  # the venue's next one
            raise


class TcpSource(Adapter):
    """A plain stream over TCP: length-prefixed messages of a spec'd protocol, or lines."""

    carries = "stream"

    def __init__(self, name: str, options: Source, sink: Sink, resolve: Callable[[str], Path] = Path) -> None:
        super().__init__(name, options, sink, resolve)
        if urlsplit(options.endpoint or "").scheme == "tls":
            self.tls()  # what is missing is said now

    async def run(self) -> None:
        parts, options = urlsplit(self.options.endpoint or ""), self.options
        silence_s = None if options.silence_ms is None else options.silence_ms / 1e3
        reader, writer = await connect(self, parts.hostname or "", parts.port or 0, tls=parts.scheme == "tls")
        try:
            self.sink.connected()
            while True:
                try:
                    async with asyncio.timeout(silence_s):
                        data = await reader.read(_READ_BYTES)
                except TimeoutError:
                    raise ConnectionSilent(self.endpoint, f"nothing has come for {silence_s:g} s") from None
                if not data:
                    raise ConnectionLost(self.endpoint, "the server has closed the connection")
                await self.sink(data)
        finally:
            writer.close()


async def connect(adapter: Adapter, host: str, port: int, *, tls: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A TCP connection within the configured time.

    Raises:
        ConnectionLost, NotTrusted, OSError: there is none.
    """
    limit_s = adapter.options.connect_timeout_ms / 1e3
    try:
        async with asyncio.timeout(limit_s):
            return await asyncio.open_connection(host, port, ssl=adapter.tls() if tls else None, limit=_READ_BYTES)
    except ssl.SSLError as error:
        raise NotTrusted(adapter.endpoint, f"no trusted TLS ({error.reason or error})") from error
    except TimeoutError:
        raise ConnectionLost(adapter.endpoint, f"no connection within {limit_s:g} s") from None


# ---------------------------------------------------------------- NATS


class NatsSource(Adapter):
    """A subject, or a JetStream stream, which can be gone on with at any of its sequences."""

    def __init__(self, name: str, options: Source, sink: Sink, resolve: Callable[[str], Path] = Path) -> None:
        super().__init__(name, options, sink, resolve)
        self.resumes = options.stream is not None
        files = (options.credentials_file, options.tls_ca_file, options.tls_certificate_file, options.tls_key_file)
        credentials, ca, certificate, key = (resolve(file) if file else None for file in files)
        self._login = nats.Login(
            token=self.secret("token"), user=options.user, password=self.secret("password"), credentials=credentials, ca=ca,
            certificate=certificate, key=key,
        )  # fmt: skip

    async def run(self) -> None:
        assert self.options.endpoint is not None
        wait_s = self.options.connect_timeout_ms / 1e3
        try:
            link = await nats.connect(self.options.endpoint, login=self._login, wait_s=wait_s)
        except nats.NatsRefused as error:
            raise LoginRefused(error.url, f"the login is refused ({error.reason})") from error
        except nats.NatsInsecure as error:
            raise NotTrusted(error.url, f"no trusted TLS ({error.reason})") from error
        except nats.LinkError as error:
            raise ConnectionLost(self.endpoint, str(error)) from error
        try:
            await (self._stream(link) if self.options.stream else self._subject(link))
        finally:
            await link.close()

    async def _stream(self, link: nats.NatsLink) -> None:
        stream, subject = self.options.stream, self.options.subject
        assert stream is not None
        found, expected, before = await self._state(link), self.sink.next_sequence, self.sink.session
        begin = expected or (found.last + 1 if self.options.begin == "next" else found.first)
        if begin > found.last + 1 or before not in (0, session_number(found.session)):
            begin = found.first  # the stream was made anew
        next_one = max(begin, found.first)
        await self.sink.begin(next_one, found.session)
        reader = nats_reader.StreamReader(link, stream, next_one, subject=subject, created=found.created)
        try:
            await self._read(link, reader, found, next_one)
        except nats.LinkError as error:
            raise ConnectionLost(self.endpoint, str(error)) from error
        finally:
            await reader.close()

    async def _read(self, link: nats.NatsLink, reader: nats_reader.StreamReader, found: nats_reader.StreamState, next_one: int) -> None:
        """Hand on what the stream brings, and say what it does not keep any more.

        With a subject, what is left out may be of other subjects, or deleted before we read it. Where the stream begins tells, which is
        looked at after a jump, :data:`_DELETED_LOOK_S` apart at least.
        """
        low, due_s = 0, 0.0
        """The lowest sequence of the jumps that have not been looked into."""
        pending: asyncio.Future[nats_reader.StoredMessage] | None = None
        try:
            while True:
                if low:
                    pending = pending or asyncio.ensure_future(reader.next())
                    await asyncio.wait({pending}, timeout=max(0.0, due_s - time.monotonic()))
                message = await (pending or reader.next()) if not low or (pending and pending.done()) else None
                pending = pending if message is None else None
                if message is not None and (message.sequence < next_one or reader.created != found.created):
                    found, low = await self._state(link), 0  # made anew
                    next_one = min(found.first, message.sequence)
                    await self.sink.begin(next_one, found.session)
                elif message is not None and message.sequence > next_one:
                    low = low or next_one
                if low and (self.options.subject is None or time.monotonic() >= due_s):
                    await self._see_deleted(link, found, low, next_one, message)
                    low, due_s = 0, time.monotonic() + _DELETED_LOOK_S
                if message is not None:
                    next_one = message.sequence + 1
                    await self.sink(message.data, 0, message.sequence)
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)

    async def _see_deleted(
        self, link: nats.NatsLink, found: nats_reader.StreamState, low: int, next_one: int, message: nats_reader.StoredMessage | None
    ) -> None:
        """Say what the stream has deleted of its sequences from `low` on; `message`, where there is one, has not been handed on."""
        if self.options.subject is None:
            assert message is not None
            await self.sink.begin(message.sequence, found.session)
            return
        first = (await self._state(link)).first
        if first > next_one:
            await self.sink.begin(min(first, message.sequence) if message else first, found.session)
        elif first > low:  # we are behind it: what was handed on meanwhile may have been without it
            await self.sink.gap()

    async def _state(self, link: nats.NatsLink) -> nats_reader.StreamState:
        assert self.options.stream is not None
        try:
            return await nats_reader.stream_state(link, self.options.stream)
        except nats.StreamMissing as error:
            raise Refused(self.endpoint, f"there is no stream {self.options.stream}", "check its name") from error
        except nats.LinkError as error:
            raise ConnectionLost(self.endpoint, str(error)) from error

    async def _subject(self, link: nats.NatsLink) -> None:
        """Messages of a plain subscription; what comes while the connection is away is lost, so a lost connection ends this one."""
        waiting = _Waiting(self.options.buffer_kb << 10, self.sink)
        silence_s = _seconds(self.options.silence_ms, float("inf"))
        link.on_disconnect(waiting.end)
        await link.client.subscribe(self.options.subject, cb=waiting.put, pending_msgs_limit=0, pending_bytes_limit=0)
        self.sink.connected()
        while True:
            for _ in range(min(_STRETCH, len(waiting.queue))):
                data = waiting.take()
                await (self.sink.gap() if data is None else self.sink(data))
            await asyncio.sleep(0)  # others have something to do too
            if waiting.ended and not waiting.queue:
                raise ConnectionLost(self.endpoint, link.last_error or "the connection is lost")
            if time.monotonic() - waiting.heard_s > silence_s:
                raise ConnectionSilent(self.endpoint, f"nothing has come for {silence_s:g} s")
            await waiting.more(min(_LOOK_S, silence_s))


class _Waiting:
    """Messages of a subject that wait to be handed on, in order and within a bound; None stands where some had to be dropped.

    nats-py's own bound drops from the end of its queue and says so at once, when what came before has not been handed on yet; and it
    swallows what a callback raises.

    Attributes:
        queue: the messages.
        heard_s: when the last one came, monotonic.
        ended: the connection was lost; what comes afterwards does not belong to it.
    """

    def __init__(self, bytes_max: int, sink: Sink) -> None:
        self.queue: deque[bytes | None] = deque()
        self.heard_s, self.ended, self._sink = time.monotonic(), False, sink
        self._bytes, self._bytes_max, self._news = 0, bytes_max, asyncio.Event()

    async def put(self, message: Any) -> None:
        """Called by nats-py for each message."""
        self.heard_s = time.monotonic()
        data: bytes = message.data
        if self.ended:
            return
        if self.queue and (self._bytes + len(data) > self._bytes_max or len(self.queue) >= _PENDING_MAX):
            self._sink.count("overflowed")
            if self.queue[-1] is not None:
                self.queue.append(None)
        else:
            self.queue.append(data)
            self._bytes += len(data)
        self._news.set()

    def take(self) -> bytes | None:
        """The first; None: some are missing here."""
        data = self.queue.popleft()
        self._bytes -= len(data or b"")
        return data

    def end(self) -> None:
        """The connection is lost."""
        self.ended = True
        self._news.set()

    async def more(self, limit_s: float) -> None:
        """Wait until there is something, not longer than `limit_s`."""
        self._news.clear()
        if not self.queue and not self.ended:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await self._news.wait()


# ---------------------------------------------------------------- a file that grows


class FollowedFile(Adapter):
    """A file that somebody appends to; of several, the last. One that is shortened has lost something; one that is replaced has not."""

    carries = "stream"
    timed = True

    def __init__(self, name: str, options: Source, sink: Sink, resolve: Callable[[str], Path] = Path) -> None:
        super().__init__(name, options, sink, resolve)
        self._paths = [resolve(path) for path in options.path]
        self.endpoint = str(self._paths[-1])
        for path in self._paths:
            if path.is_file() and compression_of(path) != "plain" and path.stat().st_size:
                raise SourceError(name, f"{path} is compressed, and cannot be followed as it grows: unpack it, or leave follow out")
        self._before, self._before_at = self._paths[:-1], 0
        self._tail = Tail(self._paths[-1])

    async def run(self) -> None:
        try:
            while self._before:
                await self._whole(self._before[0])
                del self._before[0]
                self._before_at = 0
            while True:
                await self._hand_on(await self._readable(self._tail.next))
        except BrokenProtocol as error:  # where its next message begins is not known, and will not be
            _log.error("a followed file is read no further", source=self.name, reason=str(error))
            await self.sink.gap()
            raise SourceEnded from error
        finally:
            self._tail.close()

    async def _hand_on(self, piece: Piece) -> None:
        self.sink.counts["rotations"], self.sink.counts["truncations"] = self._tail.rotations, self._tail.truncations
        if piece.fresh:
            await self.sink.begin_anew(lost=piece.lost)
        else:
            await self.sink(piece.data)
        await asyncio.sleep(0)  # a long file leaves room for timers, and can be stopped

    async def _whole(self, path: Path) -> None:
        """A file that does not grow any more."""

        async def read() -> bytes:
            with path.open("rb") as file:
                file.seek(self._before_at)
                return file.read(_READ_BYTES)

        while data := await self._readable(read):
            self._before_at += len(data)
            await self._hand_on(Piece(data))
        await self.sink.begin_anew(lost=False)

    async def _readable(self, read: Callable[[], Awaitable[_Read]]) -> _Read:
        """What `read` gives. A file that cannot be read is tried again where it was, so that nothing of it comes twice or is cut."""
        waits = Backoff(_LOOK_S / 5, 4 * _LOOK_S)
        while True:
            try:
                return await read()
            except OSError as error:
                self._tail.close()
                self.sink.count("errors")
                if waits.attempt == 0:
                    _log.warning("a followed file cannot be read", source=self.name, reason=str(error))
                await asyncio.sleep(waits.next_s())


# ---------------------------------------------------------------- by type


def _tcp(options: Source) -> AdapterMaker:
    return SoupBinTcpSource if options.soupbintcp else TcpSource


def _fix(_: Source) -> AdapterMaker:
    from tickmesh.node.fix_source import FixSource  # it is made of what is above

    return FixSource


ADAPTERS: dict[str, Callable[[Source], AdapterMaker]] = {
    "websocket": lambda _: WebsocketSource,
    "http": lambda _: HttpSource,
    "tcp": _tcp,
    "nats": lambda _: NatsSource,
    "fix": _fix,
    "file": lambda _: FollowedFile,
}
"""The adapter of each type of source."""
