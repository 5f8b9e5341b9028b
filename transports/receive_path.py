"""The ways by which a source's datagrams can reach its loop, and which of them this host allows.

============  ============================================================  =====================================
way           what it is                                                    needs
============  ============================================================  =====================================
``afxdp``     :mod:`.afxdp`: frames past the network stack, taken away      CAP_NET_RAW, CAP_BPF, CAP_NET_ADMIN
              from every other program on the host
``packet``    :mod:`.packet_ring`: copies in shared memory                  CAP_NET_RAW
``sockets``   :mod:`.multicast`: ``recvmmsg(2)``                            nothing
============  ============================================================  =====================================

All have one face for a compiled loop, ``receive_batch(kernel, buffer, packets, line, now_ns)``, and one for Python, :class:`OpenPath`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol

from tickmesh.transports import afxdp, bpf, multicast, packet_ring
from tickmesh.transports.afxdp import InterfaceHeld, Mode, XdpError, chunk_bytes_for, driver_of, open_xdp, queue_count
from tickmesh.transports.bpf import BpfError
from tickmesh.transports.capture import Packets
from tickmesh.transports.multicast import MulticastError, Receiver, interface_of, join_group, open_receiver, parse_endpoint
from tickmesh.transports.packet_ring import PacketRingError, open_packet_ring
from tickmesh.transports.udp_frames import FrameCounters, Wanted

AFXDP, PACKET_RING, SOCKETS = "afxdp", "packet", "sockets"
MODULES = {AFXDP: afxdp, PACKET_RING: packet_ring, SOCKETS: multicast}
"""Where ``receive_batch`` and ``warm_line`` of each way are, best first."""
WAY_NUMBERS = {SOCKETS: 0, PACKET_RING: 1, AFXDP: 2}
WAY_NAMES = ("sockets", "packet ring", "AF_XDP")
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_IPC_LOCK": 14, "CAP_SYS_ADMIN": 21, "CAP_BPF": 39}
_LOOPBACK, _SIOCGIFFLAGS, _SIOCGIFMTU = 0x8, 0x8913, 0x8921


class Lack(IntEnum):
    """Why a way is not taken."""

    NOTHING = 0
    CONFIGURED = 1
    LOOPBACK = 2
    NO_INTERFACE = 3
    NO_NET_RAW = 4
    NO_BPF = 5
    LOCKED_MEMORY = 6
    FRAME_SIZE = 7
    QUEUES = 8
    HELD = 9
    KERNEL = 10
    REFUSED = 11
    INTERFACES = 12
    FOREIGN_PROGRAM = 13


LACK_ABOUT = {
    Lack.NOTHING: "it is the best there is",
    Lack.CONFIGURED: "the configuration says so",
    Lack.LOOPBACK: "AF_XDP would take the loopback's packets away from every other program; bypass = \"afxdp\" insists",
    Lack.NO_INTERFACE: "it is not known which interface they come by: name it with the key interface",
    Lack.NO_NET_RAW: "CAP_NET_RAW is missing: setcap cap_net_raw,cap_net_admin,cap_bpf+ep on the interpreter, or AmbientCapabilities",
    Lack.NO_BPF: "CAP_BPF or CAP_NET_ADMIN is missing: setcap cap_net_raw,cap_net_admin,cap_bpf+ep on the interpreter",
    Lack.LOCKED_MEMORY: "too little memory may be locked: raise memlock (LimitMEMLOCK=infinity), or lower recv_buffer_kb",
    Lack.FRAME_SIZE: "the interface's MTU is larger than an AF_XDP frame (3822): lower it, or use bypass = \"packet\"",
    Lack.QUEUES: f"the interface has more than {afxdp.QUEUES_MAX} receive queues: ethtool -L eth0 combined 4",
    Lack.HELD: "another source of this node has the interface: give the feed its own",
    Lack.KERNEL: "this kernel cannot do it: AF_XDP takes Linux 5.9 with CONFIG_XDP_SOCKETS",
    Lack.REFUSED: "the kernel refused it",
    Lack.FOREIGN_PROGRAM: "another process has an XDP program on the interface (`ip link` shows it). If it takes these groups nothing "
    "comes: end it, use bypass = \"packet\" there too, or give the feed its own interface",
    Lack.INTERFACES: "the lines come by different interfaces, and only sockets read several: name the one of both with the key interface",
}  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """A way that is not taken. `detail` is the kernel's word, may be empty."""

    way: str
    lack: Lack
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.way}: {LACK_ABOUT[self.lack]}" + (f" ({self.detail})" if self.detail else "")


class BypassRefused(MulticastError):
    """The way that the configuration insists on is not possible; `refusal` says why."""

    def __init__(self, endpoint: str, refusal: Refusal) -> None:
        super().__init__(endpoint, f"bypass = \"{refusal.way}\" is not possible: {str(refusal).partition(': ')[2]}")
        self.refusal = refusal


class GroupTaken(MulticastError):
    """Another source of this node, `owner`, takes the group off the `interface` by AF_XDP: nothing would ever come."""

    def __init__(self, endpoint: str, interface: str, owner: str) -> None:
        super().__init__(endpoint, f"the source {owner!r} takes this group off {interface} by AF_XDP; give that source bypass = \"packet\"")
        self.interface, self.owner = interface, owner


class Face(Protocol):
    """What every way gives to Python. `kernels`, `buffers`, `packets` belong to the compiled loop: one of each per place it polls."""

    kernels: tuple[Any, ...]
    buffers: tuple[Any, ...]
    packets: tuple[Any, ...]

    def begin(self) -> None:
        """Take datagrams from now on."""

    def descriptors(self) -> list[int]:
        """For epoll."""

    def receive(self, queue: int = 0) -> Packets:
        """What has arrived at a place, as PACKET records into its buffer, valid until the next call."""

    def peek(self, queue: int, drop: bool) -> bytes | None:
        """The beginning of the first datagram of a place, which stays unless `drop`."""

    def counters(self) -> FrameCounters:
        """What was taken and what was not."""

    def statistics(self) -> dict[str, int]:
        """``rx_dropped``, ``rx_ring_full``, ``rx_fill_ring_empty``."""

    def close(self) -> None:
        """Free everything."""


class _Sockets:
    """Sockets behind the common face."""

    _HEAD_BYTES = 64

    def __init__(self, receivers: Sequence[Receiver]) -> None:
        self._receivers = receivers
        self.kernels = tuple(one.kernel for one in receivers)
        self.buffers = tuple(one.buffer for one in receivers)
        self.packets = tuple(one.packets for one in receivers)

    def begin(self) -> None:
        pass

    def descriptors(self) -> list[int]:
        return [one.fileno() for one in self._receivers]

    def receive(self, queue: int = 0) -> Packets:
        return self._receivers[queue].receive(queue)

    def peek(self, queue: int, drop: bool) -> bytes | None:
        flags = socket.MSG_DONTWAIT if drop else socket.MSG_DONTWAIT | socket.MSG_PEEK
        with socket.socket(fileno=os.dup(self._receivers[queue].fileno())) as shared:
            try:
                return shared.recv(self._HEAD_BYTES, flags)
            except BlockingIOError:
                return None

    def counters(self) -> FrameCounters:
        each = [one.counters() for one in self._receivers]
        return FrameCounters(sum(c.datagrams for c in each), sum(c.bytes for c in each), sum(c.truncated for c in each), 0, 0, 0, 0)

    def statistics(self) -> dict[str, int]:
        return {"rx_dropped": 0, "rx_ring_full": sum(one.dropped_by_kernel() for one in self._receivers), "rx_fill_ring_empty": 0}

    def close(self) -> None:
        for one in self._receivers:
            one.close()


@dataclass
class OpenPath:
    """An open way.

    Attributes:
        way: its name.
        face: what the loop and the node use of it.
        warnings: what a person should know.
    """

    way: str
    face: Face
    warnings: list[str] = field(default_factory=list)
    memberships: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        """Free everything. No compiled loop may be using it."""
        self.face.close()
        self.memberships.close()


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be received, and how.

    Args:
        endpoints: ``udp://…`` of each line, A first.
        interface: name or address; None: the routing table's.
        owner: who asks; see :func:`tickmesh.transports.afxdp.open_xdp`.
        buffer_bytes: how much may wait while the loop is busy.
        kernel_stamps: `ts_recv` is when the kernel had a datagram, not when the loop took it.
        busy_poll_us: SO_BUSY_POLL; 0: not.
        mode: of AF_XDP, see :func:`tickmesh.transports.afxdp.open_xdp`.
    """

    endpoints: tuple[str, ...]
    interface: str | None = None
    owner: str = ""
    buffer_bytes: int = 4 << 20
    kernel_stamps: bool = False
    busy_poll_us: int = 0
    mode: Mode = "best"

    def places(self, way: str) -> int:
        """How many places the loop has to poll."""
        if way == AFXDP:
            return queue_count(self.interface_name() or "")
        return len(self.endpoints) if way == SOCKETS else 1

    def interface_name(self) -> str | None:
        """The interface that the first line comes by. Raises MulticastError."""
        return interface_of(self.endpoints[0], self.interface)

    def wanted(self) -> list[Wanted]:
        """The lines as groups. Raises BadEndpoint."""
        return [Wanted(*parse_endpoint(text), line) for line, text in enumerate(self.endpoints)]


def ways_of(bypass: str) -> list[str]:
    """Ways to try, best first: ``auto`` all, ``none`` sockets, else the one named."""
    return {"auto": list(MODULES), "none": [SOCKETS]}.get(bypass, [bypass])


# ---------------------------------------------------------------- what keeps from it


def lacking(way: str, interface: str | None, buffer_bytes: int = 4 << 20, *, insisted: bool = False) -> Refusal | None:
    """What keeps this host from a way, as far as can be said without touching the interface; None: nothing."""
    if way == SOCKETS:
        return None
    if interface is None:
        return Refusal(way, Lack.NO_INTERFACE)
    if not _has("CAP_NET_RAW"):
        return Refusal(way, Lack.NO_NET_RAW)
    if way == PACKET_RING:
        return None
    lack = _lacking_on(interface, buffer_bytes, insisted)
    return Refusal(way, lack) if lack else lacking_for_programs()


def _lacking_on(interface: str, buffer_bytes: int, insisted: bool) -> Lack:
    mtu = mtu_of(interface)
    if _of_interface(interface, _SIOCGIFFLAGS) & _LOOPBACK:
        return Lack.NOTHING if insisted else Lack.LOOPBACK
    if queue_count(interface) > afxdp.QUEUES_MAX:
        return Lack.QUEUES
    if chunk_bytes_for(mtu) == 0 and not insisted:
        return Lack.FRAME_SIZE
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    need = _frames(buffer_bytes) * (chunk_bytes_for(mtu) or afxdp.CHUNK_BYTES_MAX) * queue_count(interface)
    unlimited = limit == resource.RLIM_INFINITY or _has("CAP_IPC_LOCK")
    return Lack.NOTHING if unlimited or need <= limit else Lack.LOCKED_MEMORY


def lacking_for_programs() -> Refusal | None:
    """Whether this process may load AF_XDP's program; it is loaded, not attached."""
    opened: list[Any] = []
    try:
        maps = afxdp.make_maps(1, opened)
        opened.append(bpf.Program(afxdp.filter_program(*maps), bpf.XDP_PROGRAM, bpf.AT_XDP, "tickmesh_probe"))
        socket.socket(afxdp.AF_XDP, socket.SOCK_RAW, 0).close()
    except BpfError as error:
        if error.errno == errno.EPERM or not (_has("CAP_BPF") and _has("CAP_NET_ADMIN")):
            return Refusal(AFXDP, Lack.NO_BPF)
        return Refusal(AFXDP, Lack.KERNEL, str(error).splitlines()[0])
    except OSError as error:
        return Refusal(AFXDP, Lack.KERNEL, str(error))
    finally:
        for one in opened:
            one.close()
    return None


def _has(capability: str) -> bool:
    for line in _text("/proc/thread-self/status").splitlines():
        if line.startswith("CapEff:"):
            held = int(line.split()[1], 16)
            return bool(held >> _CAPABILITIES[capability] & 1) or (capability == "CAP_BPF" and bool(held >> 21 & 1))
    return False


def _text(path: Path | str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


# ---------------------------------------------------------------- opening


def _frames(buffer_bytes: int) -> int:
    """A power of two of frames for a buffer: like the kernel's, which takes twice what it is asked for."""
    return min(1 << max(6, (buffer_bytes // 1024 - 1).bit_length()), 1 << 20)


def open_way(way: str, wish: Wish) -> OpenPath:
    """Open a way.

    Raises:
        MulticastError: an endpoint or interface is wrong.
        GroupTaken: another source of this node takes a group away.
        BypassRefused: this way is not possible here.
    """
    if way != AFXDP:
        _check_not_taken(wish)
    if way == SOCKETS:
        return _open_sockets(wish)
    interface = wish.interface_name()
    if interface is None:
        raise BypassRefused(wish.endpoints[0], Refusal(way, Lack.NO_INTERFACE))
    others = {interface_of(endpoint, wish.interface) for endpoint in wish.endpoints[1:]} - {interface}
    if others:
        detail = ", ".join([interface, *sorted(other or "no route" for other in others)])
        raise BypassRefused(wish.endpoints[0], Refusal(way, Lack.INTERFACES, detail))
    with ExitStack() as opened:
        for endpoint in wish.endpoints:
            opened.enter_context(join_group(endpoint, wish.interface or interface))
        try:
            face = _open_xdp(wish, interface) if way == AFXDP else _open_ring(wish, interface)
        except (BpfError, XdpError, PacketRingError) as error:
            raise BypassRefused(wish.endpoints[0], _judged(way, error)) from error
        return OpenPath(way, face, _warnings(wish, way, face), opened.pop_all())


def _check_not_taken(wish: Wish) -> None:
    for endpoint, wanted in zip(wish.endpoints, wish.wanted()):
        interface = interface_of(endpoint, wish.interface)
        owner = afxdp.taker_of(wanted, interface, wish.owner) if interface else None
        if interface and owner is not None:
            raise GroupTaken(endpoint, interface, owner)


def _open_sockets(wish: Wish) -> OpenPath:
    with ExitStack() as opened:
        receivers = [
            opened.enter_context(
                open_receiver(
                    endpoint,
                    interface=wish.interface,
                    receive_buffer_bytes=wish.buffer_bytes,
                    kernel_timestamps=wish.kernel_stamps,
                    busy_poll_us=wish.busy_poll_us,
                )
            )
            for endpoint in wish.endpoints
        ]
        opened.pop_all()
    return OpenPath(SOCKETS, _Sockets(receivers), [text for one in receivers for text in one.warnings])


def mtu_of(interface: str) -> int:
    """Largest IP packet of an interface, bytes; 0 if there is none of that name."""
    return _of_interface(interface, _SIOCGIFMTU)


def _of_interface(interface: str, request: int) -> int:
    """A number that the kernel tells of an interface in this thread's namespace (sysfs shows those of another)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, request, struct.pack("16s24x", interface.encode()[:15]))
        except OSError:
            return 0
    return int(struct.unpack_from("<I", answer, 16)[0]) & (0xFFFF if request == _SIOCGIFFLAGS else 0xFFFFFFFF)


def _open_xdp(wish: Wish, interface: str) -> Face:
    return open_xdp(
        wish.wanted(),
        interface,
        owner=wish.owner,
        frames=_frames(wish.buffer_bytes),
        chunk_bytes=chunk_bytes_for(mtu_of(interface)) or afxdp.CHUNK_BYTES_MAX,
        stamped=wish.kernel_stamps,
        busy_poll_us=wish.busy_poll_us,
        mode=wish.mode,
    )


def _open_ring(wish: Wish, interface: str) -> Face:
    return open_packet_ring(
        wish.wanted(),
        interface,
        ring_bytes=2 * wish.buffer_bytes,
        datagram_bytes=min(mtu_of(interface), 65_392),
        stamped=wish.kernel_stamps,
        busy_poll_us=wish.busy_poll_us,
    )


def _judged(way: str, error: BpfError | XdpError | PacketRingError) -> Refusal:
    text, number = str(error).splitlines()[0], error.errno
    if isinstance(error, InterfaceHeld):
        return Refusal(way, Lack.HELD, text)
    if number == errno.EBUSY:
        return Refusal(way, Lack.FOREIGN_PROGRAM, text)
    if number in (errno.EPERM, errno.EACCES):
        return Refusal(way, Lack.NO_BPF if way == AFXDP else Lack.NO_NET_RAW, text)
    if number in (errno.ENOBUFS, errno.ENOMEM):
        return Refusal(way, Lack.LOCKED_MEMORY, text)
    if number in (errno.ENOSYS, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT):
        return Refusal(way, Lack.KERNEL, text)
    return Refusal(way, Lack.REFUSED, text)


def _warnings(wish: Wish, way: str, face: Face) -> list[str]:
    interface = wish.interface_name()
    if way == AFXDP and getattr(face, "mode", "") == "generic" and interface and driver_of(interface) != "veth":
        return [f"{wish.endpoints[0]}: the driver has no XDP of its own, the kernel's generic one is used: a packet costs somewhat more"]
    return []
