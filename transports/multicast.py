"""UDP multicast and unicast: receivers and senders whose hot half is compiled and never returns to Python.

::

    with open_receiver("udp://239.1.1.1:26400", interface="eth0") as a, open_receiver("udp://239.1.1.2:26400", interface="eth0") as b:
        ...  # in a compiled loop:  n = receive_batch(a.kernel, buffer, packets, 0, now_ns())

An endpoint is ``udp://ADDRESS:PORT``, for a multicast group with one allowed sender ``udp://SENDER@GROUP:PORT`` (RFC 4607).
The interface is a name (``eth0``) or one of this host's addresses. Receivers use ``recvmmsg(2)``, senders ``sendmmsg(2)``;
socket options as in Linux ``ip(7)`` and ``socket(7)``.
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import re
import socket
import struct
from collections import namedtuple
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from numba import types

from tickmesh.transports.capture import PACKET, Packets
from tickmesh.transports.pacing import Pace, due
from tickmesh.transports.recording import SLACK, Bytes
from tickmesh.transports.toolbox import (
    IDLE_MODES,
    address_of,
    idle,
    inlined,
    le32,
    le64,
    load_acquire,
    loop,
    monotonic_ns,
    now_ns,
    outlined,
)

# ---------------------------------------------------------------- what the kernel's calls take: <sys/socket.h>, 64-bit Linux

_MMSGHDR = np.dtype(
    [
        ("name", "<u8"),
        ("name_length", "<u4"),
        ("_pad1", "<u4"),
        ("iov", "<u8"),
        ("iov_count", "<u8"),
        ("control", "<u8"),
        ("control_length", "<u8"),
        ("flags", "<u4"),
        ("_pad2", "<u4"),
        ("length", "<u4"),
        ("_pad3", "<u4"),
    ]
)
assert _MMSGHDR.itemsize == 64
_IOVEC = np.dtype([("base", "<u8"), ("length", "<u8")])
_SOCKADDR = np.dtype([("family", "<u2"), ("port", "<u2"), ("address", "<u4"), ("zero", "<u8")])
"""``sockaddr_in``; port and address hold network byte order (compiled code knows no big-endian fields)."""

_recvmmsg = types.ExternalFunction("recvmmsg", types.int32(types.int32, types.uint64, types.uint32, types.int32, types.uint64))
_sendmmsg = types.ExternalFunction("sendmmsg", types.int32(types.int32, types.uint64, types.uint32, types.int32))
_epoll_wait = types.ExternalFunction("epoll_wait", types.int32(types.int32, types.uint64, types.int32, types.int32))
_errno_location = types.ExternalFunction("__errno_location", types.uint64())
_mempcpy = types.ExternalFunction("mempcpy", types.uint64(types.uint64, types.uint64, types.uint64))

_MSG_TRUNC, _MSG_DONTWAIT = 0x20, 0x40
_EINTR, _EAGAIN, _ENOBUFS = errno.EINTR, errno.EAGAIN, errno.ENOBUFS
_CONTROL_BYTES = 96
"""Room for the two control messages of a datagram: drop counter (24 bytes) and times (64)."""
_SO_RCVBUFFORCE, _SO_SNDBUFFORCE, _SO_TIMESTAMPING, _SO_RXQ_OVFL, _SO_BUSY_POLL, _SO_MEMINFO = 33, 32, 37, 40, 46, 55
_STAMP_BY_KERNEL = 1 << 3 | 1 << 4
"""SOF_TIMESTAMPING_RX_SOFTWARE, made when a datagram comes in, and SOF_TIMESTAMPING_SOFTWARE, told to us."""
_IP_ADD_SOURCE_MEMBERSHIP, _IP_MULTICAST_ALL = 39, 49
_SIOCGIFADDR = 0x8915
_MEMINFO_DROPS = 8

# ---------------------------------------------------------------- receiving, compiled

RECEIVER = np.dtype(
    [
        (name, "<i8")
        for name in (
            "socket", "slot_bytes", "address", "port", "aimed_at", "used",
            "datagrams", "bytes", "truncated", "kernel_drops", "errors", "last_errno", "drop_counter",
        )
    ]
)  # fmt: skip
"""A receiver's state and counters (array of one); the counters are those of :class:`ReceiverCounters`."""
ReceiverKernel = namedtuple("ReceiverKernel", "state headers iovecs controls errno")


@outlined
def _aim(receiver: Any, buffer: Any) -> Any:
    """Point every message header at its slot of the buffer, ready to be received into."""
    s, size = receiver.state[0], receiver.headers.size
    s.aimed_at = np.int64(address_of(buffer, 0))
    for i in range(size):
        receiver.iovecs[i].base = address_of(buffer, 0) + np.uint64(i) * np.uint64(s.slot_bytes)
        receiver.iovecs[i].length = np.uint64(s.slot_bytes)
        receiver.headers[i].iov, receiver.headers[i].iov_count = address_of(receiver.iovecs, i), np.uint64(1)
        receiver.headers[i].control = address_of(receiver.controls, i * _CONTROL_BYTES)
        receiver.headers[i].control_length = np.uint64(_CONTROL_BYTES)


@outlined
def _take_controls(receiver: Any, index: Any, packet: Any) -> Any:
    """Read a datagram's control messages (cmsg(3)): the socket's drop counter, the time at which the kernel had it."""
    s, at = receiver.state[0], index * _CONTROL_BYTES
    end = at + min(np.int64(receiver.headers[index].control_length), _CONTROL_BYTES)
    while end - at >= 16:
        length = np.int64(le64(receiver.controls, at))
        if length < 16 or length > end - at:
            break
        kind = le32(receiver.controls, at + 12)
        if kind == _SO_RXQ_OVFL and length >= 20:
            counter = np.int64(le32(receiver.controls, at + 16))
            s.kernel_drops += (counter - s.drop_counter) & 0xFFFFFFFF
            s.drop_counter = counter
        elif kind == _SO_TIMESTAMPING and length >= 64:  # three times: the kernel's, none, the card's
            seconds, nanos = np.int64(le64(receiver.controls, at + 16)), np.int64(le64(receiver.controls, at + 24))
            if seconds != 0:
                packet.ts_recv = seconds * 1_000_000_000 + nanos
        at += (length + 7) & ~7


@outlined
def _count_error(state: Any, cell: Any) -> Any:
    """Count the last call's error unless it only means "nothing now"; returns the error number."""
    _mempcpy(address_of(cell, 0), _errno_location(), np.uint64(4))
    number = np.int64(cell[0])
    if number not in (_EAGAIN, _EINTR, _ENOBUFS):
        state[0].errors += 1
        state[0].last_errno = number
    return number


@outlined
def receive_batch(receiver: Any, buffer: Any, packets: Any, line: Any, now_ns: Any) -> Any:
    """Take what has arrived, without waiting; returns the number of datagrams.

    Args:
        receiver: ``Receiver.kernel``.
        buffer: u8, at least ``slot_bytes + SLACK``; datagram slots of ``slot_bytes`` each. Its earlier content is overwritten.
        packets: PACKET array to fill from 0.
        line: line number to stamp on them.
        now_ns: wall clock; their `ts_recv` unless the receiver asked for the kernel's.

    Truncated datagrams are counted and left out; drops and errors are counted.
    """
    s = receiver.state[0]
    if s.aimed_at != np.int64(address_of(buffer, 0)):
        _aim(receiver, buffer)
    for i in range(s.used):
        receiver.headers[i].control_length = np.uint64(_CONTROL_BYTES)
    s.used = 0
    limit = min(packets.size, receiver.headers.size, (buffer.size - SLACK) // s.slot_bytes)
    if limit <= 0:
        return np.int64(0)
    got = np.int64(_recvmmsg(np.int32(s.socket), address_of(receiver.headers, 0), np.uint32(limit), np.int32(_MSG_DONTWAIT), np.uint64(0)))
    if got < 0:
        _count_error(receiver.state, receiver.errno)
        return np.int64(0)
    s.used = got
    count = np.int64(0)
    for i in range(got):
        header, packet = receiver.headers[i], packets[count]
        packet.offset, packet.length, packet.ts_recv = np.uint64(i * s.slot_bytes), header.length, np.int64(now_ns)
        packet.address, packet.port, packet.line, packet.flags = np.uint32(s.address), np.uint16(s.port), np.uint8(line), np.uint8(0)
        if header.control_length > 0:
            _take_controls(receiver, i, packet)
        s.bytes += np.int64(header.length)
        truncated = np.int64(header.flags & _MSG_TRUNC != 0)
        s.truncated += truncated
        count += 1 - truncated
    s.datagrams += count
    return count


@inlined
def wait_readable(readable: Any, limit_ms: Any) -> Any:
    """Sleep until a socket of an epoll object has something to read, or for `limit_ms`.

    `readable` is i32[6]: the object's descriptor, then room for what epoll_wait(2) says.
    """
    _epoll_wait(readable[0], address_of(readable, 2), np.int32(1), np.int32(limit_ms))


@loop
def _receive(receiver: Any, buffer: Any, packets: Any, line: Any) -> Any:
    return receive_batch(receiver, buffer, packets, line, now_ns())


# ---------------------------------------------------------------- sending, compiled

SENDER = np.dtype([(name, "<i8") for name in ("socket", "datagrams", "bytes", "errors", "last_errno", "busy")])
"""A sender's state and counters (array of one); the counters are those of :class:`SenderCounters`."""
SenderKernel = namedtuple("SenderKernel", "state headers iovecs destinations errno")


@outlined
def _fill_headers(sender: Any, buffer: Any, packets: Any, first: Any, count: Any) -> Any:
    """Headers for as many of the packets as fit, up to one that cannot be sent; returns how many."""
    count = min(count, sender.headers.size)
    for i in range(count):
        packet, header = packets[first + i], sender.headers[i]
        end = np.int64(packet.offset) + np.int64(packet.length)
        if np.int64(packet.line) >= sender.destinations.size or np.int64(packet.offset) < 0 or end > buffer.size:
            return np.int64(i)
        sender.iovecs[i].base = address_of(buffer, np.int64(packet.offset))
        sender.iovecs[i].length = np.uint64(packet.length)
        header.name, header.name_length = address_of(sender.destinations, np.int64(packet.line)), np.uint32(16)
        header.iov, header.iov_count, header.control_length = address_of(sender.iovecs, i), np.uint64(1), np.uint64(0)
    return np.int64(count)


@outlined
def send_batch(sender: Any, buffer: Any, packets: Any, first: Any, count: Any) -> Any:
    """Send ``packets[first : first + count]``, each to the endpoint of its line, without waiting.

    Returns the index of the first packet not dealt with: less than ``first + count`` if the socket's buffer is full (counted as
    `busy`). A packet that is refused (too long, unknown line, no route) is counted in `errors` and passed over.
    """
    s, at, end = sender.state[0], np.int64(first), min(np.int64(first) + np.int64(count), packets.size)
    while at < end:
        ready = _fill_headers(sender, buffer, packets, at, end - at)
        if ready == 0:
            s.errors += 1
            s.last_errno = errno.EINVAL
            at += 1
            continue
        sent = np.int64(_sendmmsg(np.int32(s.socket), address_of(sender.headers, 0), np.uint32(ready), np.int32(_MSG_DONTWAIT)))
        if sent < 0:
            number = _count_error(sender.state, sender.errno)
            if number in (_EAGAIN, _ENOBUFS, _EINTR):
                s.busy += 1
                break
            at += 1
            continue
        for i in range(at, at + sent):
            s.bytes += np.int64(packets[i].length)
        s.datagrams += sent
        at += sent
    return at


@loop
def send_paced(sender: Any, buffer: Any, packets: Any, first: Any, pace: Any, stop: Any, idle_mode: Any) -> Any:
    """Send ``packets[first:]``, each when its `ts_recv` is due by `pace`, until ``stop[0]``; returns the index of the first not sent.

    Args:
        sender: ``Sender.kernel``.
        buffer, packets: payloads and PACKET records in the order of their times.
        pace: ``Pace.state``.
        stop: i8 array of one, set from outside to end early.
        idle_mode: one of ``IDLE_MODES``.
    """
    at, rounds = np.int64(first), np.int64(0)
    while at < packets.size and load_acquire(stop, 0) == 0:
        now, end = monotonic_ns(), at
        while end < packets.size and end - at < sender.headers.size and due(pace, packets[end].ts_recv, now) == 0:
            end += 1
        done = send_batch(sender, buffer, packets, at, end - at) if end > at else at
        rounds = idle(idle_mode, rounds) if done == at else np.int64(0)
        at = done
    return at


# ---------------------------------------------------------------- endpoints and what can be wrong with them


class MulticastError(Exception):
    """A socket cannot be opened. `endpoint` says for what, the message what to do."""

    def __init__(self, endpoint: str, message: str) -> None:
        super().__init__(f"{endpoint}: {message}")
        self.endpoint = endpoint


class BadEndpoint(MulticastError):
    """The endpoint's text is not one."""

    def __init__(self, endpoint: str, reason: str) -> None:
        super().__init__(endpoint, f"{reason}; write udp://ADDRESS:PORT, such as udp://239.1.1.1:26400")


class NoSuchInterface(MulticastError):
    """This host has no interface of that name or address. `interface` was asked for, `known` are there."""

    def __init__(self, endpoint: str, interface: str, known: list[str]) -> None:
        super().__init__(endpoint, f"no interface {interface!r} here; use one of {', '.join(known)}, or an address of one")
        self.interface, self.known = interface, known


class PortBusy(MulticastError):
    """Another program holds the port for itself."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint, "the port is held by another program; stop it (`ss -ulpn` shows it) or use another port")


class SocketRefused(MulticastError):
    """The system refused a step of the setup. `errno` and `step` say which."""

    def __init__(self, endpoint: str, step: str, error: OSError) -> None:
        advice = {
            errno.EPERM: "run with the right to do so",
            errno.EADDRNOTAVAIL: "the address is not one of this host's",
            errno.ENODEV: "no route for it; name the interface to use",
            errno.ENOBUFS: "too many groups on one host; raise net.ipv4.igmp_max_memberships",
        }.get(error.errno or 0, "see `ip addr` and `ip route`")
        super().__init__(endpoint, f"{step} failed: {error.strerror}; {advice}")
        self.errno, self.step = error.errno or 0, step


class Endpoint(NamedTuple):
    """Where to: `address`, `port`, and the one allowed sender, if the endpoint names it."""

    address: str
    port: int
    sender: str | None

    @property
    def is_multicast(self) -> bool:
        """Whether the address is a group's."""
        return ipaddress.IPv4Address(self.address).is_multicast


_ENDPOINT = re.compile(r"udp://(?:([\d.]+)@)?([^:/@]+):(\d{1,5})/?")


def parse_endpoint(text: str) -> Endpoint:
    """``udp://[SENDER@]ADDRESS:PORT`` (IPv4).

    Raises:
        BadEndpoint: it is not that.
    """
    match = _ENDPOINT.fullmatch(text.strip())
    if match is None:
        raise BadEndpoint(text, "this is not an endpoint")
    sender, address, port = match[1], match[2], int(match[3])
    for part in filter(None, (sender, address)):
        try:
            ipaddress.IPv4Address(part)
        except ValueError:
            raise BadEndpoint(text, f"{part!r} is not an IPv4 address") from None
    if not 0 < port < 65536:
        raise BadEndpoint(text, f"port {port} is not between 1 and 65535")
    endpoint = Endpoint(address, port, sender)
    if sender and not endpoint.is_multicast:
        raise BadEndpoint(text, "only a multicast group has an allowed sender")
    return endpoint


class _Interface(NamedTuple):
    """An interface by number, or by address where the number is not known (0)."""

    number: int
    address: str


def _interface_address(name: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def _find_interface(endpoint: str, interface: str | None) -> _Interface:
    """The interface of a name or address; the system's choice (index 0, any address) for None."""
    if interface is None:
        return _Interface(0, "0.0.0.0")
    names = {name: index for index, name in socket.if_nameindex()}
    if interface in names:
        return _Interface(names[interface], _interface_address(interface) or "0.0.0.0")
    for name, index in names.items():
        if _interface_address(name) == interface:
            return _Interface(index, interface)
    try:
        ipaddress.IPv4Address(interface)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((interface, 0))  # an additional address of an interface
        return _Interface(0, interface)
    except (ValueError, OSError):
        raise NoSuchInterface(endpoint, interface, sorted(names)) from None


def _set_buffer(sock: socket.socket, force: int, option: int, size: int) -> int:
    """Ask for a socket buffer, past the system's limit if allowed; returns what was granted (without the kernel's doubling)."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, force, size)
    except OSError:
        sock.setsockopt(socket.SOL_SOCKET, option, size)
    return sock.getsockopt(socket.SOL_SOCKET, option) // 2


# ---------------------------------------------------------------- the Python face


class ReceiverCounters(NamedTuple):
    """What a receiver counted.

    `datagrams` were delivered. `bytes` counts all that arrived. `truncated` did not fit in a slot. `kernel_drops` were lost for want
    of buffer, as far as reported with datagrams received since. `errors` of the socket, the last with number `last_errno`.
    """

    datagrams: int
    bytes: int
    truncated: int
    kernel_drops: int
    errors: int
    last_errno: int


class _Socket:
    """Owns a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def fileno(self) -> int:
        """The socket's descriptor, for selectors."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket. No compiled loop may be using it."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Receiver(_Socket):
    """A bound socket; made by :func:`open_receiver`.

    Attributes:
        endpoint: where it listens.
        kernel: for :func:`receive_batch`.
        buffer, packets: enough for one batch, for a loop that needs no more.
        receive_buffer_bytes: what the system granted.
        warnings: what a person should know, such as a smaller receive buffer than asked for.
    """

    def __init__(self, sock: socket.socket, endpoint: Endpoint, batch: int, slot_bytes: int, granted_bytes: int) -> None:
        super().__init__(sock)
        self.endpoint, self.receive_buffer_bytes = endpoint, granted_bytes
        self.warnings: list[str] = []
        self.buffer: Bytes = np.zeros(batch * slot_bytes + SLACK, np.uint8)
        self.packets: Packets = np.zeros(batch, PACKET)
        state = np.zeros(1, RECEIVER)
        state["socket"], state["slot_bytes"] = sock.fileno(), slot_bytes
        state["address"], state["port"] = int(ipaddress.IPv4Address(endpoint.address)), endpoint.port
        controls = np.zeros(batch * _CONTROL_BYTES, np.uint8)
        self.kernel = ReceiverKernel(state, np.zeros(batch, _MMSGHDR), np.zeros(batch, _IOVEC), controls, np.zeros(1, np.int32))

    def receive(self, line: int = 0) -> Packets:
        """What has arrived, as PACKET records into ``self.buffer``, valid until the next call; empty if nothing has."""
        return self.packets[: int(_receive(self.kernel, self.buffer, self.packets, line))]

    def counters(self) -> ReceiverCounters:
        """Counters so far."""
        return ReceiverCounters(*(int(self.kernel.state[0][name]) for name in ReceiverCounters._fields))

    def dropped_by_kernel(self) -> int:
        """Datagrams lost for want of buffer since the socket was opened, asked of the kernel now (modulo 2^32)."""
        words = np.frombuffer(self._sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36), np.uint32)
        return int(words[_MEMINFO_DROPS])


def open_receiver(
    endpoint: str,
    *,
    interface: str | None = None,
    receive_buffer_bytes: int = 8 << 20,
    batch: int = 64,
    slot_bytes: int = 2048,
    kernel_timestamps: bool = False,
    busy_poll_us: int = 0,
) -> Receiver:
    """Open a socket for a multicast group (joining it) or for a unicast address of this host.

    Args:
        endpoint: ``udp://[SENDER@]ADDRESS:PORT``.
        interface: name or address of the interface to join on; None leaves it to the routing table.
        receive_buffer_bytes: how much the kernel may keep while the loop is busy.
        batch: datagrams taken at once.
        slot_bytes: longest datagram (9216 for jumbo frames).
        kernel_timestamps: stamp with the kernel's time of arrival (SO_TIMESTAMPING) instead of the loop's clock.
        busy_poll_us: have a read that finds nothing poll the card for so long (SO_BUSY_POLL), past its interrupt; 0: not.

    Raises:
        BadEndpoint, NoSuchInterface, PortBusy, SocketRefused: with what to do.
        ValueError: a size that makes no sense.
    """
    if not (0 < batch <= 1024 and 64 <= slot_bytes <= 65536 and receive_buffer_bytes > 0):
        sizes = f"batch={batch} (1..1024), slot_bytes={slot_bytes} (64..65536), receive_buffer_bytes={receive_buffer_bytes} (>0)"
        raise ValueError(f"a size is out of range: {sizes}")
    parsed = parse_endpoint(endpoint)
    chosen = _find_interface(endpoint, interface)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        granted = _set_buffer(sock, _SO_RCVBUFFORCE, socket.SO_RCVBUF, receive_buffer_bytes)
        sock.setsockopt(socket.SOL_SOCKET, _SO_RXQ_OVFL, 1)
        if kernel_timestamps:
            sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPING, _STAMP_BY_KERNEL)
        _poll_busily(sock, endpoint, busy_poll_us)
        _bind(sock, endpoint, parsed)
        if parsed.is_multicast:
            _join(sock, endpoint, parsed, chosen)
    except BaseException:
        sock.close()
        raise
    receiver = Receiver(sock, parsed, batch, slot_bytes, granted)
    if granted < receive_buffer_bytes:
        receiver.warnings.append(
            f"{endpoint}: receive buffer of {granted} bytes instead of {receive_buffer_bytes}; "
            "raise net.core.rmem_max or grant CAP_NET_ADMIN"
        )
    return receiver


def _poll_busily(sock: socket.socket, endpoint: str, busy_poll_us: int) -> None:
    if busy_poll_us:
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_BUSY_POLL, busy_poll_us)
        except OSError as error:
            raise SocketRefused(endpoint, "busy polling (it takes CAP_NET_ADMIN)", error) from error


class Membership(_Socket):
    """Holds this host's membership of a group, for a path that takes the datagrams elsewhere; made by :func:`join_group`."""


def join_group(endpoint: str, interface: str | None = None) -> Membership:
    """Join an endpoint's group without receiving anything here; for a unicast address there is nothing to join.

    Raises:
        BadEndpoint, NoSuchInterface, SocketRefused: with what to do.
    """
    parsed = parse_endpoint(endpoint)
    chosen = _find_interface(endpoint, interface)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)  # not bound: no datagram finds it
    try:
        if parsed.is_multicast:
            _join(sock, endpoint, parsed, chosen)
    except BaseException:
        sock.close()
        raise
    return Membership(sock)


def interface_of(endpoint: str, interface: str | None = None) -> str | None:
    """Name of the interface that an endpoint's datagrams come in by; for None the one that the routing table names, None if it names none.

    Raises:
        BadEndpoint, NoSuchInterface: with what to do.
    """
    address, chosen = parse_endpoint(endpoint).address, _find_interface(endpoint, interface)
    if chosen.number:
        return socket.if_indextoname(chosen.number)
    if interface is None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, 1))
            except OSError:
                return None
            chosen = _Interface(0, probe.getsockname()[0])
    return next((name for _, name in socket.if_nameindex() if _interface_address(name) == chosen.address), None)


def _bind(sock: socket.socket, endpoint: str, parsed: Endpoint) -> None:
    """Bind to the address itself, so that another group on the same port is not received."""
    if parsed.is_multicast:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
    try:
        sock.bind((parsed.address, parsed.port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortBusy(endpoint) from error
        raise SocketRefused(endpoint, "bind", error) from error


def _join(sock: socket.socket, endpoint: str, parsed: Endpoint, interface: _Interface) -> None:
    group = socket.inet_aton(parsed.address)
    try:
        if parsed.sender:
            request = group + socket.inet_aton(interface.address) + socket.inet_aton(parsed.sender)
            sock.setsockopt(socket.IPPROTO_IP, _IP_ADD_SOURCE_MEMBERSHIP, request)
        else:
            request = group + socket.inet_aton(interface.address) + struct.pack("@i", interface.number)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
    except OSError as error:
        raise SocketRefused(endpoint, "joining the group", error) from error


def open_answers(endpoint: str, *, batch: int = 16, slot_bytes: int = 9216) -> Receiver:
    """A socket connected to one server: :meth:`Receiver.fileno` to send requests by, and only its answers are received.

    Raises:
        BadEndpoint, SocketRefused: with what to do.
    """
    parsed = parse_endpoint(endpoint)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.connect((parsed.address, parsed.port))
    except OSError as error:
        sock.close()
        raise SocketRefused(endpoint, "connecting", error) from error
    return Receiver(sock, parsed, batch, slot_bytes, 0)


def warm_line() -> tuple[ReceiverKernel, Bytes, Packets]:
    """Kernel, buffer and packets of the types that a loop over sockets is compiled for; nothing is open."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as closed:
        one = Receiver(closed, Endpoint("127.0.0.1", 1, None), 1, 64, 0)
    return one.kernel, one.buffer, one.packets


class SenderCounters(NamedTuple):
    """What a sender counted: `datagrams` and `bytes` sent, `errors` (refused, the last with `last_errno`), times it was `busy`."""

    datagrams: int
    bytes: int
    errors: int
    last_errno: int
    busy: int


class Sender(_Socket):
    """A socket that sends each PACKET to the endpoint of its line; made by :func:`open_sender`. `kernel` is for :func:`send_batch`."""

    def __init__(self, sock: socket.socket, endpoints: Sequence[Endpoint], batch: int) -> None:
        super().__init__(sock)
        self.endpoints = tuple(endpoints)
        destinations = np.zeros(len(endpoints), _SOCKADDR)
        for entry, endpoint in zip(destinations, endpoints):
            entry["family"], entry["port"] = socket.AF_INET, socket.htons(endpoint.port)
            entry["address"] = socket.htonl(int(ipaddress.IPv4Address(endpoint.address)))
        state = np.zeros(1, SENDER)
        state["socket"] = sock.fileno()
        self.kernel = SenderKernel(state, np.zeros(batch, _MMSGHDR), np.zeros(batch, _IOVEC), destinations, np.zeros(1, np.int32))

    def send(
        self,
        buffer: Bytes,
        packets: Packets,
        pace: Pace | None = None,
        *,
        stop: npt.NDArray[np.int64] | None = None,
        idle_mode: str = "sleep",
    ) -> int:
        """Send PACKET records, each at its `ts_recv` as `pace` maps it (None: as fast as the socket takes them).

        Blocks without holding the GIL. Setting ``stop[0] = 1`` ends it early. Returns how many were dealt with.
        """
        state = (pace or Pace("max")).state
        stop = np.zeros(1, np.int64) if stop is None else stop
        return int(send_paced(self.kernel, buffer, packets, 0, state, stop, IDLE_MODES[idle_mode]))

    def counters(self) -> SenderCounters:
        """Counters so far."""
        return SenderCounters(*(int(self.kernel.state[0][name]) for name in SenderCounters._fields))


def open_sender(
    endpoints: str | Sequence[str],
    *,
    interface: str | None = None,
    ttl: int = 1,
    loopback: bool = True,
    send_buffer_bytes: int = 4 << 20,
    batch: int = 64,
) -> Sender:
    """Open a socket that sends to one endpoint, or to several by line (``[A, B]``: line 0 goes to A, 1 to B).

    Args:
        endpoints: ``udp://ADDRESS:PORT`` each.
        interface: which interface multicast leaves by; None leaves it to the routing table.
        ttl: how many routers a datagram may pass, plus one.
        loopback: whether receivers on this host get them too.
        send_buffer_bytes: how much the kernel may queue.
        batch: datagrams handed over at once.

    Raises:
        BadEndpoint, NoSuchInterface, SocketRefused: with what to do.
        ValueError: a number that makes no sense.
    """
    texts = [endpoints] if isinstance(endpoints, str) else list(endpoints)
    if not (texts and 0 < batch <= 1024 and 0 <= ttl <= 255):
        raise ValueError(f"out of range: {len(texts)} endpoints (at least 1), batch={batch} (1..1024), ttl={ttl} (0..255)")
    parsed = [parse_endpoint(text) for text in texts]
    chosen = _find_interface(texts[0], interface)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        _set_buffer(sock, _SO_SNDBUFFORCE, socket.SO_SNDBUF, send_buffer_bytes)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, ttl)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, loopback)
        if interface is not None:
            request = bytes(4) + socket.inet_aton(chosen.address) + struct.pack("@i", chosen.number)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, request)
    except OSError as error:
        sock.close()
        raise SocketRefused(texts[0], "choosing the interface", error) from error
    return Sender(sock, parsed, batch)
