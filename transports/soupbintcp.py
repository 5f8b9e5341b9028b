"""SoupBinTCP 3.00 and 4.00: the client's conversation.

A packet is a big-endian u16 length (of what follows it), a type byte and the payload. A session's sequenced messages count from 1; the
server says in its answer to the login which comes next, and after that each sequenced packet is the next one. Both sides send a heartbeat
after a second of silence, and give the other up after fifteen.
The packets themselves are read and written by compiled code (:mod:`tickmesh.transports.soupbintcp_packets`).
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tickmesh.transports.connection import BrokenProtocol, ConnectionLost, ConnectionSilent, LoginRefused, NotTrusted, Refused
from tickmesh.transports.soupbintcp_packets import EMPTY_COUNT, SKIP, SPLIT_AT, make_state, unframe

Bytes = npt.NDArray[np.uint8]

PACKET_BYTES_MAX = 2 + 65535
READ_BYTES = 1 << 18
_SLACK = 64
SEQUENCED, UNSEQUENCED, HEARTBEAT, ACCEPTED, REJECTED, END, DEBUG = b"S", b"U", b"H", b"A", b"J", b"Z", b"+"
LOGIN, CLIENT_HEARTBEAT, LOGOUT = b"L", b"R", b"O"


def packet(kind: bytes, payload: bytes = b"") -> bytes:
    """One packet."""
    return (1 + len(payload)).to_bytes(2, "big") + kind + payload


def login_packet(user: str, password: str, session: str, sequence: int) -> bytes:
    """A login request for message `sequence` of a session (empty: the current one); sequence 0: whatever comes next.

    Raises:
        ValueError: a text is too long for its field, or not ASCII.
    """
    fields = [("user", user, 6), ("password", password, 10), ("session", session, 10)]
    for name, text, size in fields:
        if len(text) > size or not text.isascii():
            raise ValueError(f"the {name} has at most {size} ASCII characters in SoupBinTCP")
    payload = user.ljust(6) + password.ljust(10) + session.rjust(10) + str(sequence).rjust(20)
    return packet(LOGIN, payload.encode("ascii"))


@dataclass(frozen=True)
class Login:
    """How to log in: ``endpoint`` is for messages, the session empty for the current one."""

    host: str
    port: int
    user: str = ""
    password: str = field(default="", repr=False)
    session: str = ""
    tls: ssl.SSLContext | None = None

    @property
    def endpoint(self) -> str:
        """The address."""
        return f"{'tls' if self.tls else 'tcp'}://{self.host}:{self.port}"


@dataclass(frozen=True)
class Limits:
    """How long to wait, in seconds: for the connection and the login's answer; between heartbeats; for anything from the server."""

    connect_s: float = 10.0
    heartbeat_s: float = 1.0
    silence_s: float = 15.0


class SessionRefused(Refused):
    """There is no such session any more; log in to the current one."""

    permanent = False


class Client:
    """One connection to a SoupBinTCP server. :meth:`open`, then :meth:`read` until it raises, then :meth:`close`.

    Attributes:
        session: the session's name, as the server accepted it.
        sequence: of the first message that comes.
        ended: the server has said that the session is over.
        empty: sequenced packets without a message so far.
    """

    def __init__(self, login: Login, limits: Limits) -> None:
        self.login, self.limits = login, limits
        self.session, self.sequence, self.ended = "", 0, False
        self._buffer: Bytes = np.zeros(READ_BYTES + PACKET_BYTES_MAX + _SLACK, np.uint8)
        self._state = make_state()
        self._at = self._end = 0
        self._heartbeats: asyncio.Task[None] | None = None

    @property
    def empty(self) -> int:
        """Sequenced packets without a message so far."""
        return int(self._state[EMPTY_COUNT])

    def skip(self, messages: int) -> None:
        """Leave out the next messages: they had come before."""
        self._state[SKIP] = messages

    async def open(self, session: str, sequence: int) -> None:
        """Connect and log in, for message `sequence` of `session`.

        Raises:
            ConnectionLost, NotTrusted, LoginRefused, SessionRefused, BrokenProtocol: it did not work.
        """
        where = self.login.endpoint
        try:
            async with asyncio.timeout(self.limits.connect_s):
                self._reader, self._writer = await asyncio.open_connection(
                    self.login.host, self.login.port, ssl=self.login.tls, limit=READ_BYTES
                )
                self._writer.write(login_packet(self.login.user, self.login.password, session, sequence))
                kind, payload = await self._answer()
        except ssl.SSLError as error:
            raise NotTrusted(where, f"no trusted TLS ({error.reason or error})") from error
        except TimeoutError:
            raise ConnectionLost(where, f"no answer to the login within {self.limits.connect_s:g} s") from None
        except OSError as error:
            raise ConnectionLost(where, f"cannot connect ({error.strerror or error})") from error
        if kind == REJECTED:
            self._refuse(payload)
        self._accept(kind, payload)
        self._heartbeats = asyncio.create_task(self._beat())

    def _refuse(self, payload: bytes) -> None:
        if payload[:1] == b"S":
            raise SessionRefused(self.login.endpoint, "the session that was asked for is not there")
        raise LoginRefused(self.login.endpoint, "the login is refused")

    def _accept(self, kind: bytes, payload: bytes) -> None:
        session, sequence = payload[:10].decode("ascii", "replace").strip(), payload[10:30].strip()
        if kind != ACCEPTED or len(payload) < 30 or not sequence.isdigit() or not 0 < int(sequence) < 1 << 62:
            raise BrokenProtocol(self.login.endpoint, f"the answer to the login is no answer ({kind!r}): is this a SoupBinTCP server?")
        self.session, self.sequence = session, int(sequence)

    async def _answer(self) -> tuple[bytes, bytes]:
        """The first packet that is no heartbeat and no debug text; what comes behind it stays with the reader."""
        for _ in range(16):
            head = await self._exactly(3)
            kind, length = head[2:], int.from_bytes(head[:2], "big")
            if kind not in (HEARTBEAT, DEBUG, ACCEPTED, REJECTED) or not 0 < length <= 1024:
                break
            payload = await self._exactly(length - 1)
            if kind in (ACCEPTED, REJECTED):
                return kind, payload
        return b"", b""

    async def _exactly(self, count: int) -> bytes:
        try:
            return await self._reader.readexactly(count)
        except asyncio.IncompleteReadError:
            raise ConnectionLost(self.login.endpoint, "the server has closed the connection before it answered the login") from None

    async def _beat(self) -> None:
        """A heartbeat a second; sending one more than needed does no harm, and there is nothing else to send."""
        while True:
            await asyncio.sleep(self.limits.heartbeat_s)
            self._writer.write(packet(CLIENT_HEARTBEAT))

    async def read(self) -> memoryview:
        """The next messages, each behind its u16 length; empty if only heartbeats have come. Valid until the next call.

        Raises:
            ConnectionLost, ConnectionSilent, BrokenProtocol: there is no more on this connection. With `ended` set, the session is over.
        """
        left = self._end - self._at
        self._buffer[:left] = self._buffer[self._at : self._end].copy()
        self._at, self._end = 0, left
        written = self._messages()
        if written == 0:
            data = await self._more()
            self._buffer[self._end : self._end + len(data)] = np.frombuffer(data, np.uint8)
            self._end += len(data)
            written = self._messages()
        return memoryview(self._buffer)[:written]  # type: ignore[arg-type]

    def _messages(self) -> int:
        """Unframe what is there; returns the end of the messages at the buffer's beginning."""
        while True:
            written = int(unframe(self._buffer, self._at, self._end, self._state))
            begun, self._at = self._at, int(self._state[SPLIT_AT])
            if written > begun:
                if begun:
                    self._buffer[: written - begun] = self._buffer[begun:written].copy()
                return written - begun
            if self._at == begun and not self._skipped():
                return 0

    async def _more(self) -> bytes:
        where = self.login.endpoint
        try:
            async with asyncio.timeout(self.limits.silence_s):
                data = await self._reader.read(READ_BYTES)
        except TimeoutError:
            raise ConnectionSilent(where, f"nothing has come for {self.limits.silence_s:g} s, not even a heartbeat") from None
        except OSError as error:
            raise ConnectionLost(where, f"the connection is lost ({error.strerror or error})") from error
        if not data:
            raise ConnectionLost(where, "the server has closed the connection")
        return data

    def _skipped(self) -> bool:
        """Whether a whole packet that is no data was there, and is stepped over; the session's end raises."""
        left = self._end - self._at
        if left < 3:
            return False
        length = int.from_bytes(self._buffer[self._at : self._at + 2].tobytes(), "big")
        kind = self._buffer[self._at + 2 : self._at + 3].tobytes()
        if kind == END and length == 1:
            self.ended = True
            raise ConnectionLost(self.login.endpoint, "the session has ended")
        if length == 0 or kind not in (SEQUENCED, UNSEQUENCED, HEARTBEAT, DEBUG):
            raise BrokenProtocol(self.login.endpoint, f"a packet of type {kind!r} where only data may be")
        if kind != UNSEQUENCED or left < 2 + length:
            return False
        self._at += 2 + length  # not part of the session's messages
        return True

    async def close(self) -> None:
        """Log out and close; waits for nothing."""
        if self._heartbeats is not None:
            self._heartbeats.cancel()
        writer = getattr(self, "_writer", None)
        if writer is not None:
            if not writer.is_closing():
                writer.write(packet(LOGOUT))
            writer.close()
