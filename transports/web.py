"""HTTP and websockets as ways in, over aiohttp: one library for both, the best kept of its field, with limits on everything that a
server sends (line, field and number of headers, message, and what a message unpacks to).

Bodies are unpacked here and not by aiohttp, piece by piece, so that a small body that unpacks to a huge one is given up at its limit.
"""

from __future__ import annotations

import asyncio
import email.utils
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tickmesh.transports.connection import BrokenProtocol, ConnectionLost, ConnectionSilent, LoginRefused, NotTrusted, Refused

_HEADERS_MAX, _FIELD_BYTES_MAX = 128, 8190
_PIECE_BYTES = 1 << 16
_CLOSE_S = 0.5
_GZIP_OR_ZLIB = 47
"""For zlib: whichever the first bytes say."""
_RETRY_AFTER_MAX_S = 86_400.0


@dataclass(frozen=True)
class WebOptions:
    """How to talk to a server.

    Attributes:
        connect_s: for the connection, the handshake and an answer's headers together.
        silence_s: for the next piece of anything; 0: no limit.
        heartbeat_s: a ping is sent so often, and its answer must come within half of it; 0: none.
        message_bytes_max: longest message or body, unpacked.
        headers: sent with every request.
        tls: for https and wss.
    """

    connect_s: float = 10.0
    silence_s: float = 60.0
    heartbeat_s: float = 15.0
    message_bytes_max: int = 4 << 20
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    tls: ssl.SSLContext | None = None


def retry_after_s(value: str | None, now_s: float) -> float | None:
    """Seconds of a Retry-After field (RFC 9110, 10.2.3): a number of seconds, or a date; None if it is neither. A day at most."""
    if value is None:
        return None
    if value.strip().isdigit():
        return min(_RETRY_AFTER_MAX_S, float(value))
    try:
        moment = email.utils.parsedate_to_datetime(value).timestamp()
    except ValueError:
        return None
    return min(_RETRY_AFTER_MAX_S, max(0.0, moment - now_s))


def _session(options: WebOptions) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        headers=dict(options.headers),
        connector=aiohttp.TCPConnector(ssl=options.tls if options.tls is not None else True, limit=8),
        timeout=aiohttp.ClientTimeout(total=None, connect=options.connect_s, sock_connect=options.connect_s),
        auto_decompress=False,
        max_headers=_HEADERS_MAX,
        max_line_size=_FIELD_BYTES_MAX,
        max_field_size=_FIELD_BYTES_MAX,
    )


def _problem(url: str, error: Exception) -> Exception:
    """What an error of aiohttp means to a user."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError | ssl.SSLError):
        return NotTrusted(url, f"no trusted TLS ({getattr(error, 'certificate_error', None) or error})")
    if isinstance(error, aiohttp.WSServerHandshakeError):
        return status_problem(url, error.status, error.headers or {})
    if isinstance(error, aiohttp.TooManyRedirects):
        return Refused(url, "the server redirects without end", "check the endpoint")
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.http_exceptions.HttpProcessingError | aiohttp.ClientResponseError):
        return BrokenProtocol(url, f"the answer is no proper HTTP ({error})")
    if isinstance(error, TimeoutError):
        return ConnectionLost(url, "no answer in time")
    return ConnectionLost(url, f"cannot be reached ({error or type(error).__name__})")


def status_problem(url: str, status: int, headers: Mapping[str, str]) -> Exception:
    """The error of an HTTP status that is no success."""
    wait_s = retry_after_s(headers.get("Retry-After"), time.time())
    if status in (401, 403, 407):
        return LoginRefused(url, f"the server refuses us (HTTP {status})")
    if status in (418, 429):
        return Refused(url, f"too many requests (HTTP {status})", "ask less often", retry_after_s=wait_s)
    if status >= 500:
        return (
            ConnectionLost(url, f"the server fails (HTTP {status})")
            if wait_s is None
            else Refused(url, f"the server wants us to wait (HTTP {status})", retry_after_s=wait_s)
        )
    return Refused(url, f"the server answers HTTP {status}", "check the endpoint", retry_after_s=wait_s)


# ---------------------------------------------------------------- bodies


class _Unpacked:
    """A body's content coding undone, piece by piece, within a limit."""

    def __init__(self, url: str, coding: str, limit_bytes: int) -> None:
        self.url, self._limit, self.bytes = url, limit_bytes, 0
        self._decoder: Any = None
        if coding in ("gzip", "x-gzip", "deflate"):
            self._decoder = zlib.decompressobj(_GZIP_OR_ZLIB)
        elif coding not in ("", "identity"):
            raise BrokenProtocol(url, f"the body is coded as {coding!r}, which was not asked for")

    def __call__(self, piece: bytes) -> list[bytes]:
        """What a piece unpacks to."""
        if self._decoder is None:
            return [piece]
        found, size = [], 0
        try:
            while piece:
                if self._decoder.eof:  # of a member of several (RFC 1952, 2.2)
                    self._decoder = zlib.decompressobj(_GZIP_OR_ZLIB)
                part = self._decoder.decompress(piece, _PIECE_BYTES)
                piece = self._decoder.unused_data or self._decoder.unconsumed_tail
                size += len(part)
                if part:
                    found.append(part)
                if size > self._limit + _PIECE_BYTES:
                    raise self.too_large()
        except zlib.error as error:
            raise BrokenProtocol(self.url, f"the compressed body is damaged ({error})") from None
        return found

    def too_large(self) -> Exception:
        """The error."""
        return BrokenProtocol(
            self.url, f"more than {self._limit} bytes in one message", "raise message_max_kb if the server can be trusted"
        )


@dataclass
class Answer:
    """An HTTP answer whose headers have come.

    Attributes:
        status: 200, or 304 if the server says that nothing has changed.
        headers: as the server sent them.
    """

    url: str
    status: int
    headers: Mapping[str, str]
    _response: aiohttp.ClientResponse
    _options: WebOptions

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes, unpacked; without a limit on its whole length.

        Raises:
            ConnectionLost, ConnectionSilent, BrokenProtocol: it goes no further.
        """
        unpacked = _Unpacked(self.url, self.headers.get("Content-Encoding", "").lower(), self._options.message_bytes_max)
        while True:
            try:
                async with asyncio.timeout(self._options.silence_s or None):
                    piece = await self._response.content.readany()
            except TimeoutError:
                raise ConnectionSilent(self.url, f"nothing has come for {self._options.silence_s:g} s") from None
            except (aiohttp.ClientError, OSError) as error:
                raise _problem(self.url, error) from error
            if not piece:
                return
            for part in unpacked(piece):
                yield part

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            ConnectionLost, ConnectionSilent, BrokenProtocol: it is not whole in time, or larger than allowed.
        """
        found, limit = bytearray(), self._options.message_bytes_max
        try:
            async with asyncio.timeout(self._options.silence_s or None):
                async for part in self.pieces():
                    found += part
                    if len(found) > limit:
                        raise BrokenProtocol(self.url, f"more than {limit} bytes in one message", "raise message_max_kb")
        except TimeoutError:
            raise ConnectionSilent(self.url, f"the body is not whole after {self._options.silence_s:g} s") from None
        return bytes(found)


class HttpClient:
    """Requests to one or several servers over kept connections; use it as an async context manager."""

    def __init__(self, options: WebOptions) -> None:
        self.options = options

    async def __aenter__(self) -> HttpClient:
        self._session = _session(self.options)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    @asynccontextmanager
    async def get(self, url: str, headers: Mapping[str, str] | None = None) -> AsyncIterator[Answer]:
        """A GET whose answer is a success, or says that nothing has changed.

        Raises:
            ConnectionLost, NotTrusted, LoginRefused, Refused, BrokenProtocol: it is not.
        """
        asked = {"Accept-Encoding": "gzip, deflate", **(headers or {})}
        try:
            async with asyncio.timeout(self.options.connect_s):
                response = await self._session.get(url, headers=asked, allow_redirects=False)
        except (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError) as error:
            raise _problem(url, error) from error
        try:
            if response.status not in (200, 304):
                raise status_problem(url, response.status, response.headers)
            yield Answer(url, response.status, response.headers, response, self.options)
        finally:
            if not response.content.at_eof():
                response.close()
            else:
                response.release()


# ---------------------------------------------------------------- server-sent events


@dataclass
class EventStream:
    """Server-sent events (WHATWG HTML, 9.2) out of pieces of a body.

    Attributes:
        last_id: of the last event that had one: what to ask for after a lost connection.
        retry_s: how long the server wants clients to wait before they come back; None: it has not said.
    """

    limit_bytes: int
    last_id: str = ""
    retry_s: float | None = None
    _rest: bytearray = field(default_factory=bytearray)
    _data: list[bytes] = field(default_factory=list)
    _data_bytes: int = 0
    _begun: bool = False

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that a piece completes.

        Raises:
            ValueError: one is longer than the limit.
        """
        if self._begun and b"\n" not in piece and b"\r" not in piece and not self._rest.endswith(b"\r"):
            self._rest += piece  # in place: an event that trickles costs what it is long, and not its square
            self._check_size()
            return []
        text = bytes(self._rest) + piece
        if not self._begun and len(text) >= 3:
            text, self._begun = text.removeprefix(b"\xef\xbb\xbf"), True
        if text.endswith(b"\r"):  # it may be half of a line's end
            text, held = text[:-1], b"\r"
        else:
            held = b""
        *lines, rest = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = bytearray(rest + held)
        found = []
        for line in lines:
            if not line:
                if self._data:
                    found.append(b"\n".join(self._data))
                self._data, self._data_bytes = [], 0
            else:
                self._line(line)
        self._check_size()
        return found

    def _check_size(self) -> None:
        if len(self._rest) + self._data_bytes > self.limit_bytes:
            raise ValueError(f"an event of more than {self.limit_bytes} bytes")

    def begin(self) -> None:
        """A new connection: what was half there is gone."""
        self._rest, self._data, self._data_bytes, self._begun = bytearray(), [], 0, False

    def _line(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
            self._data_bytes += len(value) + 1
        elif name == b"id" and b"\0" not in value and len(value) <= 1024:
            self.last_id = value.decode("utf-8", "replace")
        elif name == b"retry" and value.isdigit() and len(value) < 10:
            self.retry_s = int(value) / 1000


# ---------------------------------------------------------------- websockets


class Websocket:
    """One websocket connection. :func:`open_websocket` makes it."""

    def __init__(self, url: str, socket: aiohttp.ClientWebSocketResponse[bool], options: WebOptions) -> None:
        self.url, self._socket, self._options = url, socket, options
        self._heard_s, self._silent, self._clock = 0.0, False, asyncio.get_running_loop().time

    async def watch(self) -> None:
        """Close the connection once nothing has come for too long. A look now and then costs less than a timer for each message."""
        silence_s = self._options.silence_s
        self._heard_s = self._clock()
        while silence_s:
            await asyncio.sleep(silence_s / 4)
            if self._clock() - self._heard_s >= silence_s:
                self._silent = True
                await self._socket.close()
                return

    async def send(self, text: str) -> None:
        """Send a text message.

        Raises:
            ConnectionLost: it cannot be.
        """
        try:
            await self._socket.send_str(text)
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            raise ConnectionLost(self.url, f"cannot send ({error})") from error

    async def receive(self) -> bytes:
        """The next message, text or binary; pings are answered meanwhile.

        Raises:
            ConnectionLost, ConnectionSilent, BrokenProtocol: there is none any more.
        """
        message = await self._socket.receive()
        self._heard_s = self._clock()
        if message.type is aiohttp.WSMsgType.TEXT or message.type is aiohttp.WSMsgType.BINARY:
            data: bytes = message.data
            return data
        if message.type is aiohttp.WSMsgType.ERROR:
            raise self._broken(message.data)
        if self._silent:
            raise ConnectionSilent(self.url, f"nothing has come for {self._options.silence_s:g} s")
        code = self._socket.close_code
        raise ConnectionLost(self.url, f"the server has closed the connection (code {code if code is not None else 'none'})")

    def _broken(self, error: Any) -> Exception:
        if isinstance(error, aiohttp.WebSocketError):
            if error.code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG:
                most = self._options.message_bytes_max
                return BrokenProtocol(
                    self.url, f"more than {most} bytes in one message", "raise message_max_kb if the server can be trusted"
                )
            return BrokenProtocol(self.url, f"the frames are damaged ({error})")
        return ConnectionLost(self.url, f"the connection is lost ({error or type(error).__name__})")


@asynccontextmanager
async def open_websocket(url: str, options: WebOptions) -> AsyncIterator[Websocket]:
    """Connect; closed on leaving, within half a second.

    Raises:
        ConnectionLost, NotTrusted, LoginRefused, Refused, BrokenProtocol: it does not work.
    """
    session = _session(options)
    try:
        try:
            async with asyncio.timeout(options.connect_s):
                socket = await session.ws_connect(
                    url,
                    heartbeat=options.heartbeat_s or None,
                    max_msg_size=options.message_bytes_max,
                    decode_text=False,
                    compress=15,
                    timeout=aiohttp.ClientWSTimeout(ws_close=_CLOSE_S),
                )
        except (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError) as error:
            raise _problem(url, error) from error
        made = Websocket(url, socket, options)
        watching = asyncio.create_task(made.watch())
        try:
            yield made
        finally:
            watching.cancel()
            await socket.close()
    finally:
        await session.close()
