"""The wire between a leader and a standby: frames, the connection that carries them, and who may open one.

A frame is a header of 64 bytes, little-endian, and a payload padded with zeros to a multiple of 64, so that events lie on whole cache
lines in the buffer that they are received into::

    magic 4s | version u8, kind u8, shard u16 | length u32 (without padding), count u32 | epoch u64 | first u64 | chain u64 | a u64 | b u64
    | CRC-32 of the payload u32 (0 for DATA, whose chain says more) | CRC-32 of the 60 bytes before u32

What each kind means is in docs/reference/replication.md.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import select
import socket
import ssl
import struct
import threading
import time
import zlib
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from tickmesh.transports.toolbox import zeros_aligned

_HEADER = struct.Struct("<4sBBHIIQQQQQII")
HEADER_BYTES = _HEADER.size
assert HEADER_BYTES == 64
_MAGIC, VERSION = b"TMRP", 1
PAYLOAD_BYTES_MAX = 1 << 20
EVENTS_MAX = PAYLOAD_BYTES_MAX // 64
INBOX_BYTES = 4 * PAYLOAD_BYTES_MAX
INBOX_BYTES_SMALL = 1 << 16
"""For the leader's side, to which a standby says little; also all the memory that a stranger can make it take."""
_PADDING = bytes(64)
NONCE_BYTES = 32


class FrameKind(IntEnum):
    """What a frame is."""

    CHALLENGE = 1
    HELLO = 2
    PROBE = 3
    CHAIN = 4
    WELCOME = 5
    READY = 6
    DATA = 7
    ACK = 8
    HEARTBEAT = 9
    DOCUMENT = 10
    SNAPSHOT = 11
    PART = 12
    SNAPSHOT_END = 13
    REFUSED = 14


class Reason(IntEnum):
    """Why a leader does not serve a standby."""

    TOKEN = 1
    CLUSTER = 2
    SHARD = 3
    """This node does not lead the shard."""
    STALE_LEADER = 4
    """The standby knows of a later epoch."""
    JOURNAL = 5
    """The standby holds another journal."""
    NO_SNAPSHOT = 6
    """What the standby needs is not kept any more, and there is no snapshot."""
    DOCUMENT = 7
    """The document of a configuration that the journal names is missing."""
    DEVICE = 8
    """There is no RDMA device here."""


class LinkError(Exception):
    """The connection has ended or cannot be used; another one may do."""


class LinkClosed(LinkError):
    """The other side has closed it."""


class LinkSilent(LinkError):
    """Nothing was heard from the other side, or nothing taken by it, for as long as `timeout_ms` allows."""


class FrameDamaged(LinkError):
    """What was received is not what was sent."""


class Refused(LinkError):
    """The other side does not serve us; `reason`, `epoch` (its own)."""

    def __init__(self, reason: int, text: str, epoch: int = 0) -> None:
        super().__init__(text)
        self.reason, self.epoch = reason, epoch


@dataclass(frozen=True)
class TlsFiles:
    """Both sides show a certificate, and each checks that the other's comes from the authority `ca`."""

    certificate: Path
    key: Path
    ca: Path


@dataclass(frozen=True)
class LinkOptions:
    """What both ends of a link agree on.

    Attributes:
        cluster, node: names; a standby of another cluster is refused.
        token: secret that both sides prove to know, without sending it; empty: none.
        tls: files for TLS; None: plain TCP.
        heartbeat_s: something is sent at least this often.
        timeout_s: a side that is silent, or takes nothing, for so long is given up.
        rdma: frames go over RDMA once both sides are known to each other, where both can.
        rdma_device: its name; None: the first one.
        idle: how a channel's memory is looked at, ``toolbox.IDLE_*``.
    """

    cluster: str
    node: str
    token: str = ""
    tls: TlsFiles | None = None
    heartbeat_s: float = 0.1
    timeout_s: float = 1.0
    rdma: bool = False
    rdma_device: str | None = None
    idle: int = 2


class Frame(NamedTuple):
    """A frame received. `payload` is valid until the next one is received; `events` is the header's count, the others are as there."""

    kind: int
    shard: int
    events: int
    epoch: int
    first: int
    chain: int
    a: int
    b: int
    payload: memoryview

    def json(self) -> dict[str, Any]:
        """The payload as an object.

        Raises:
            FrameDamaged: it is none.
        """
        try:
            found = json.loads(bytes(self.payload))
        except ValueError as error:
            raise FrameDamaged("a payload is not JSON") from error
        if not isinstance(found, dict):
            raise FrameDamaged("a payload is not a JSON object")
        return found


def proof(token: str, side: str, *nonces: bytes) -> str:
    """What shows that a side knows the token, without telling it."""
    return hmac.digest(token.encode(), side.encode() + b"".join(nonces), "sha256").hex() if token else ""


def proves(given: object, token: str, side: str, *nonces: bytes) -> bool:
    """Whether a proof is right; always, if there is no token."""
    return not token or (isinstance(given, str) and hmac.compare_digest(given.encode(), proof(token, side, *nonces).encode()))


# ---------------------------------------------------------------- the connection


class Wire(Protocol):
    """What carries a link's bytes. One thread may send while another one receives."""

    name: str

    def send(self, parts: list[memoryview], limit_s: float) -> int:
        """Send some of the bytes, at least one; returns how many.

        Raises:
            TimeoutError: the other side takes nothing.
            OSError: it is gone.
        """

    def receive_into(self, room: memoryview, limit_s: float) -> int | None:
        """Take what comes; returns how many bytes, 0 once the other side has closed, None if nothing came within `limit_s`.

        Raises:
            OSError: the connection is lost.
        """

    def interrupt(self) -> None:
        """End the connection. From any thread."""

    def close(self) -> None:
        """Free what it has. No other thread may be in it any more."""


class SocketWire:
    """TCP, with or without TLS.

    TLS state is not for two threads at once, so a TLS socket never blocks: its calls are made under a lock and waits happen outside.
    """

    name = "tcp"

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self.socket = connection
        self._tls = threading.Lock() if isinstance(connection, ssl.SSLSocket) else None
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(0 if self._tls else timeout_s)
        self._readable = select.poll()
        self._readable.register(connection, select.POLLIN)

    def send(self, parts: list[memoryview], limit_s: float) -> int:
        """See :class:`Wire`."""
        if self._tls is None:
            return self.socket.sendmsg(parts)
        return self._through_tls(lambda: self.socket.send(parts[0]), limit_s)

    def _through_tls(self, call: Any, limit_s: float) -> int:
        assert self._tls is not None
        end = time.monotonic() + limit_s
        while True:
            try:
                with self._tls:
                    return int(call())
            except ssl.SSLWantReadError:
                wanted = select.POLLIN
            except ssl.SSLWantWriteError:
                wanted = select.POLLOUT
            self._wait_for(wanted, end - time.monotonic())

    def _wait_for(self, wanted: int, limit_s: float) -> None:
        poll = select.poll()
        poll.register(self.socket, wanted)
        if limit_s <= 0 or not poll.poll(limit_s * 1000):
            raise TimeoutError

    def receive_into(self, room: memoryview, limit_s: float) -> int | None:
        """See :class:`Wire`."""
        try:
            if self._tls is not None:
                return self._through_tls(lambda: self.socket.recv_into(room), limit_s)
            if not self._readable.poll(max(limit_s, 0) * 1000):
                return None
            return self.socket.recv_into(room, flags=socket.MSG_DONTWAIT)
        except (TimeoutError, BlockingIOError):
            return None

    def interrupt(self) -> None:
        """See :class:`Wire`."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """See :class:`Wire`. More than once is fine."""
        self.interrupt()
        self.socket.close()


class Link:
    """A connection that carries frames. One thread may send while another one receives.

    Attributes:
        heard_s: when bytes last came.
        heard: whether any have come over the wire that it has now.
        bytes_sent: over all of its wires.
    """

    def __init__(self, wire: Wire, timeout_s: float, inbox_bytes: int = INBOX_BYTES) -> None:
        self.wire, self._timeout_s = wire, timeout_s
        self._inbox = zeros_aligned(inbox_bytes, np.uint8)
        self._view = self._inbox.data
        self._start = self._end = 0
        self.bytes_sent = 0
        self.heard_s, self.heard = time.monotonic(), False

    def go_over_to(self, wire: Wire) -> None:
        """Carry frames over another wire from now on, between two frames, and while no other thread is in it."""
        self.wire, self.heard = wire, False

    # -- sending

    def send(
        self,
        kind: FrameKind,
        shard: int,
        epoch: int,
        *,
        payload: bytes | memoryview = b"",
        count: int = 0,
        first: int = 0,
        chain: int = 0,
        a: int = 0,
        b: int = 0,
    ) -> None:
        """Send a frame.

        Raises:
            LinkSilent: the other side takes nothing.
            LinkClosed: it is gone.
        """
        body = memoryview(payload)
        crc = 0 if kind == FrameKind.DATA else zlib.crc32(body)
        head = _HEADER.pack(_MAGIC, VERSION, kind, shard, len(body), count, epoch, first, chain, a, b, crc, 0)[:-4]
        parts = [memoryview(head + zlib.crc32(head).to_bytes(4, "little")), body, memoryview(_PADDING)[: -len(body) % 64]]
        self._send_all([part for part in parts if len(part)])

    def _send_all(self, parts: list[memoryview]) -> None:
        while parts:
            sent = self._send_some(parts)
            self.bytes_sent += sent
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][sent:]

    def _send_some(self, parts: list[memoryview]) -> int:
        try:
            return self.wire.send(parts, self._timeout_s)
        except TimeoutError:
            raise LinkSilent("the other side takes nothing any more") from None
        except OSError as error:
            raise LinkClosed(error.strerror or str(error)) from error

    # -- receiving

    def receive(self, limit_s: float) -> Frame | None:
        """The next frame, or None if none was complete within `limit_s`; then the rest is waited for next time.

        Raises:
            LinkClosed: the other side has closed the connection.
            FrameDamaged: the bytes are not those of a frame.
        """
        end = time.monotonic() + limit_s
        while True:
            have = self._end - self._start
            needed = HEADER_BYTES
            if have >= HEADER_BYTES:
                fields = self._decode_header()
                needed += fields[3] + -fields[3] % 64
                if have >= needed:
                    return self._take(fields, needed)
            if not self._receive_some(needed, end - time.monotonic()):
                return None

    def expect(self, kind: FrameKind, limit_s: float) -> Frame:
        """The next frame, which has to be one of a kind.

        Raises:
            LinkSilent: there was none within `limit_s`.
            Refused: the other side does not serve us.
            FrameDamaged: it is another one.
            LinkClosed: the other side has closed the connection.
        """
        frame = self.receive(limit_s)
        if frame is None:
            raise LinkSilent(f"no {kind.name} within {limit_s:g} s")
        if frame.kind == FrameKind.REFUSED:
            raise Refused(frame.events, bytes(frame.payload).decode(errors="replace"), frame.epoch)
        if frame.kind != kind:
            raise FrameDamaged(f"frame {frame.kind} where {kind.name} was due")
        return frame

    def _decode_header(self) -> tuple[Any, ...]:
        head = self._view[self._start : self._start + HEADER_BYTES]
        magic, version, kind, shard, length, count, epoch, first, chain, a, b, crc, check = _HEADER.unpack(head)
        if magic != _MAGIC or check != zlib.crc32(head[:-4]):
            raise FrameDamaged("a header is damaged")
        if version != VERSION:
            raise FrameDamaged(f"the other side speaks version {version}, this one {VERSION}: use the same release")
        if length > min(PAYLOAD_BYTES_MAX, len(self._inbox) - HEADER_BYTES):
            raise FrameDamaged(f"a frame of {length} bytes is longer than the longest")
        return kind, shard, count, length, epoch, first, chain, a, b, crc

    def _take(self, fields: tuple[Any, ...], size: int) -> Frame:
        kind, shard, count, length, epoch, first, chain, a, b, crc = fields
        payload = self._view[self._start + HEADER_BYTES : self._start + HEADER_BYTES + length]
        self._start += size
        if kind != FrameKind.DATA and zlib.crc32(payload) != crc:
            raise FrameDamaged("a payload is damaged")
        return Frame(kind, shard, count, epoch, first, chain, a, b, payload)

    def _receive_some(self, needed: int, limit_s: float) -> bool:
        """Append what comes to the inbox, which then has room for a frame of `needed` bytes; false: nothing came."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start + needed > len(self._inbox):
            kept = self._end - self._start
            self._inbox[:kept] = self._inbox[self._start : self._end]
            self._start, self._end = 0, kept
        try:
            count = self.wire.receive_into(self._view[self._end :], limit_s)
        except OSError as error:
            raise LinkClosed(error.strerror or str(error)) from error
        if count is None:
            return False
        if count == 0:
            raise LinkClosed("the other side has closed the connection")
        self._end += count
        self.heard_s, self.heard = time.monotonic(), True
        return True

    def interrupt(self) -> None:
        """End the connection: whoever waits in it is woken by :class:`LinkClosed`. From any thread; closing is for the owner."""
        self.wire.interrupt()

    def close(self) -> None:
        """Close it. No other thread may be in it any more. More than once is fine."""
        self.wire.close()


def server_context(tls: TlsFiles) -> ssl.SSLContext:
    """TLS for the side that accepts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(tls.certificate, tls.key)
    context.load_verify_locations(tls.ca)
    return context


def client_context(tls: TlsFiles) -> ssl.SSLContext:
    """TLS for the side that connects; the server's certificate must name the host."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(tls.certificate, tls.key)
    context.load_verify_locations(tls.ca)
    return context


def connect_link(host: str, port: int, options: LinkOptions) -> Link:
    """Connect.

    Raises:
        OSError (and so ssl.SSLError): it cannot be.
    """
    connection: socket.socket = socket.create_connection((host, port), timeout=options.timeout_s)
    try:
        if options.tls:
            connection = client_context(options.tls).wrap_socket(connection, server_hostname=host)
        return Link(SocketWire(connection, options.timeout_s), options.timeout_s)
    except BaseException:
        connection.close()
        raise


def parse_address(address: str) -> tuple[str, int]:
    """``"127.0.0.1:4230"`` -> host and port; an IPv6 address stands in brackets.

    Raises:
        ValueError: it is none.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 <= int(port) < 65536:
        raise ValueError(f"{address!r}: use HOST:PORT")
    return host.strip("[]"), int(port)
