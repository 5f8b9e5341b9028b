"""AF_XDP: datagrams of wanted groups straight from an interface's receive queues into memory of this process, past the network stack.

::

    with open_xdp([Wanted("239.1.1.1", 26400, None, 0)], "eth0") as path:
        path.begin()          # from now on; in a compiled loop, for each queue q:
        ...                   # receive_batch(path.kernels[q], path.buffers[q], path.packets[q], q, now)

A short XDP program (:func:`filter_program`) looks every frame up in a map of wanted (address, port) pairs: what is wanted goes to the
socket of its queue, all else to the stack as ever. **What is taken so is seen by nobody else on the host.** PACKET records point into
the frames where the kernel put them (UMEM); a frame goes back to the kernel at the next call. Program and sockets end with the process,
however it ends: the program is held by a link. Source: Linux ``Documentation/networking/af_xdp.rst``, ``linux/if_xdp.h``.

Inside a process an interface is opened once per owner: a second :func:`open_xdp` of the same owner shares program, sockets, their sizes
and the place in the rings, so that one loop can follow another without losing what waits.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import socket
import struct
import threading
import time
from collections import Counter, namedtuple
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numba import types

from tickmesh.transports import bpf
from tickmesh.transports.bpf import BpfError, Counts, Link, Map, Program, jump, load_map, op
from tickmesh.transports.capture import PACKET, Packets
from tickmesh.transports.recording import SLACK, Bytes
from tickmesh.transports.toolbox import inlined, le64, load_acquire, loop, monotonic_ns, now_ns, outlined, store_release
from tickmesh.transports.udp_frames import CHECK, FRAME_COUNTS, FrameCounters, Wanted, make_groups, read_datagram

AF_XDP, _SOL_XDP = 44, 283
_MMAP_OFFSETS, _RX_RING, _UMEM_REG, _FILL_RING, _COMPLETION_RING, _STATISTICS, _OPTIONS = 1, 2, 4, 5, 6, 7, 8
_PGOFF_RX, _PGOFF_FILL = 0, 0x100000000
_USE_NEED_WAKEUP, _NEEDS_WAKEUP = 8, 1
_SKB_MODE, _DRIVER_MODE = 2, 4
_XDP_PASS = 2
_SO_PREFER_BUSY_POLL, _SO_BUSY_POLL = 69, 46
Mode = Literal["best", "driver", "generic"]
HEADROOM_BYTES = 256
"""Of a UMEM chunk, in front of the frame (XDP_PACKET_HEADROOM)."""
CHUNK_BYTES_MAX = 4096
_COMPLETIONS = 64
QUEUES_MAX = 16
_SIOCETHTOOL, _GET_DRIVER, _GET_CHANNELS = 0x8946, 0x3, 0x3C
_BIND_TRIES, _BIND_WAIT_S = 200, 0.005
"""A socket that was just closed holds its queue for some 20 ms more."""
_ETHERNET_BYTES, _STAMP_BYTES, _STAMP_AGE_MAX_NS = 14, 8, 60_000_000_000

# ---------------------------------------------------------------- the filter, in eBPF

TAGGED, FRAGMENTS, OPTIONS = range(3)
"""What the program counts of frames that have a wanted address and still go to the stack."""


def _half(value: int) -> int:
    """Two bytes of a frame as the program loads them."""
    return socket.htons(value)


def filter_program(wanted: Map, sockets: Map, counts: Counts, stamped: bool = False) -> bytes:
    """The XDP program: IPv4, UDP, no options, no fragment, no VLAN tag, and destination in `wanted`: to the socket of its queue.

    Keys of `wanted` are address (4 bytes) and port (2), both as on the wire, and two zeros; port 0 stands for "this address", by which
    fragments and packets with IP options are counted. With `stamped` the monotonic time is put into the 8 bytes before the frame.
    """
    bound = [op(bpf.MOVE, 4, 7), op(bpf.ADD, 4, value=42), jump(bpf.IF_GREATER_REG, "pass", 4, register=3)]
    return bpf.assemble(
        [
            op(bpf.MOVE, 6, 1),  # r6 context, r7 frame, r3 its end, r8 tagged?, r9 why it is not taken
            op(bpf.LOAD_U32, 7, 1, 0), op(bpf.LOAD_U32, 3, 1, 4), op(bpf.SET, 8), op(bpf.SET, 9, value=-1),
            *bound,
            op(bpf.LOAD_U16, 5, 7, 12),
            jump(bpf.IF_EQUAL, "ip", 5, value=_half(0x0800)),
            jump(bpf.IF_EQUAL, "tag", 5, value=_half(0x8100)),
            jump(bpf.IF_UNEQUAL, "pass", 5, value=_half(0x88A8)),
            "tag:",
            op(bpf.SET, 8, value=1), op(bpf.ADD, 7, value=4),
            *bound,
            op(bpf.LOAD_U16, 5, 7, 12), jump(bpf.IF_UNEQUAL, "pass", 5, value=_half(0x0800)),
            "ip:",
            op(bpf.LOAD_U8, 5, 7, 23), jump(bpf.IF_UNEQUAL, "pass", 5, value=socket.IPPROTO_UDP),
            op(bpf.LOAD_U32, 5, 7, 30), op(bpf.STORE_U32, bpf.FRAME, 5, -8),
            op(bpf.LOAD_U16, 5, 7, 36),
            op(bpf.LOAD_U8, 4, 7, 14), jump(bpf.IF_EQUAL, "plain", 4, value=0x45),
            op(bpf.SET, 9, value=OPTIONS), op(bpf.SET, 5),
            "plain:",
            op(bpf.LOAD_U16, 4, 7, 20), op(bpf.AND, 4, value=_half(0x3FFF)), jump(bpf.IF_EQUAL, "whole", 4),
            op(bpf.SET, 9, value=FRAGMENTS), op(bpf.SET, 5),
            "whole:",
            jump(bpf.IF_EQUAL, "look", 8), op(bpf.SET, 9, value=TAGGED),
            "look:",
            op(bpf.STORE_U16, bpf.FRAME, 5, -4), op(bpf.SET, 5), op(bpf.STORE_U16, bpf.FRAME, 5, -2),
            load_map(1, wanted), op(bpf.MOVE, 2, bpf.FRAME), op(bpf.ADD, 2, value=-8), op(bpf.CALL, value=bpf.MAP_LOOKUP),
            jump(bpf.IF_EQUAL, "pass"),
            jump(bpf.IF_EQUAL, "take", 9, value=-1),
            op(bpf.STORE_U32, bpf.FRAME, 9, -12),
            load_map(1, counts), op(bpf.MOVE, 2, bpf.FRAME), op(bpf.ADD, 2, value=-12), op(bpf.CALL, value=bpf.MAP_LOOKUP),
            jump(bpf.IF_EQUAL, "pass"),
            op(bpf.SET, 1, value=1), op(bpf.ADD_ATOMIC_U64, 0, 1),
            jump(bpf.JUMP, "pass"),
            "take:",
            *(_stamp() if stamped else ()),
            load_map(1, sockets), op(bpf.LOAD_U32, 2, 6, 16), op(bpf.SET, 3, value=_XDP_PASS),
            op(bpf.CALL, value=bpf.REDIRECT_MAP), op(bpf.EXIT),
            "pass:",
            op(bpf.SET, 0, value=_XDP_PASS), op(bpf.EXIT),
        ]
    )  # fmt: skip


def _stamp() -> list[bpf.Step]:
    """Put the monotonic clock in front of the frame, where the driver has room for it."""
    return [
        op(bpf.MOVE, 1, 6), op(bpf.SET, 2, value=-_STAMP_BYTES), op(bpf.CALL, value=bpf.ADJUST_META),
        jump(bpf.IF_UNEQUAL, "send"),
        op(bpf.CALL, value=bpf.KTIME_NS),
        op(bpf.LOAD_U32, 1, 6, 8), op(bpf.LOAD_U32, 3, 6, 0),
        op(bpf.MOVE, 2, 1), op(bpf.ADD, 2, value=_STAMP_BYTES), jump(bpf.IF_GREATER_REG, "send", 2, register=3),
        op(bpf.STORE_U64, 1, 0, 0),
        "send:",
    ]  # fmt: skip


# ---------------------------------------------------------------- receiving, compiled

_recvfrom = types.ExternalFunction(
    "recvfrom", types.int64(types.int32, types.uint64, types.uint64, types.int32, types.uint64, types.uint64)
)
_MSG_DONTWAIT = 0x40

_DESCRIPTOR = np.dtype([("address", "<u8"), ("length", "<u4"), ("options", "<u4")])
"""``struct xdp_desc``."""
XDP_STATE = np.dtype(
    [
        (name, "<i8")
        for name in (
            "socket", "produced_at", "consumed_at", "offered_at", "flags_at", "consumed", "offered", "taken", "chunk_mask", "stamped",
        )
    ]
)  # fmt: skip
"""A socket's place in its rings: indices of the words shared with the kernel, our own counts, and how many frames we still hold."""
XdpKernel = namedtuple("XdpKernel", "state counts groups rx_words rx fill_words fill")


@inlined
def _give_back(xdp: Any) -> Any:
    """Return the frames of the call before: their addresses lie in the fill ring already."""
    s = xdp.state[0]
    if s.taken > 0:
        s.offered = (s.offered + s.taken) & 0xFFFFFFFF
        s.consumed = (s.consumed + s.taken) & 0xFFFFFFFF
        s.taken = 0
        store_release(xdp.fill_words, s.offered_at, np.uint32(s.offered))
        store_release(xdp.rx_words, s.consumed_at, np.uint32(s.consumed))


@outlined
def _wake(xdp: Any) -> Any:
    """A zero-copy driver that has run out of frames asks to be called."""
    xdp.counts[0].wakeups += 1
    _recvfrom(np.int32(xdp.state[0].socket), np.uint64(0), np.uint64(0), np.int32(_MSG_DONTWAIT), np.uint64(0), np.uint64(0))


@inlined
def _arrived_ns(buffer: Any, at: Any, now_ns: Any, clock_ns: Any) -> Any:
    """The wall clock when the XDP program saw a frame, from the monotonic stamp before it, if there is a believable one."""
    age = clock_ns - np.int64(le64(buffer, at - _STAMP_BYTES))
    return now_ns - age if 0 <= age < _STAMP_AGE_MAX_NS else now_ns


@outlined
def receive_batch(xdp: Any, buffer: Any, packets: Any, line: Any, now_ns: Any) -> Any:
    """Take what has arrived on a queue, without waiting; returns the number of datagrams, valid until the next call.

    Args:
        xdp: one of ``XdpPath.kernels``.
        buffer: the UMEM of that socket.
        packets: PACKET array to fill from 0.
        line: not used: the datagram's group says it.
        now_ns: wall clock; their `ts_recv` unless frames are stamped.
    """
    _give_back(xdp)
    s, counts = xdp.state[0], xdp.counts[0]
    ready = (np.int64(load_acquire(xdp.rx_words, s.produced_at)) - s.consumed) & 0xFFFFFFFF
    if ready == 0:
        if load_acquire(xdp.fill_words, s.flags_at) & np.uint32(_NEEDS_WAKEUP) != 0:
            _wake(xdp)
        return np.int64(0)
    ready = min(ready, packets.size)
    rx_mask, fill_mask, count = np.uint64(xdp.rx.size - 1), np.uint64(xdp.fill.size - 1), np.int64(0)
    clock_ns = monotonic_ns() if s.stamped != 0 else np.int64(0)
    for i in range(ready):
        descriptor = xdp.rx[np.uint64(s.consumed + i) & rx_mask]
        at, length = np.int64(descriptor.address), np.int64(descriptor.length)
        xdp.fill[np.uint64(s.offered + i) & fill_mask] = np.uint64(at & s.chunk_mask)
        packet = packets[count]
        packet.ts_recv = np.int64(now_ns)
        if s.stamped != 0:
            packet.ts_recv = _arrived_ns(buffer, at, np.int64(now_ns), clock_ns)
        count += read_datagram(counts, xdp.groups, buffer, at + _ETHERNET_BYTES, length - _ETHERNET_BYTES, CHECK, packet)
    s.taken = ready
    return count


@loop
def _receive(xdp: Any, buffer: Any, packets: Any) -> Any:
    return receive_batch(xdp, buffer, packets, 0, now_ns())


# ---------------------------------------------------------------- sockets


class XdpError(Exception):
    """An interface cannot be opened. `step` and `errno` say where it failed, `interface` for what."""

    def __init__(self, interface: str, step: str, number: int) -> None:
        super().__init__(f"AF_XDP on {interface}: {step}: {os.strerror(number)}")
        self.interface, self.step, self.errno = interface, step, number


class InterfaceHeld(XdpError):
    """Another source of this process has the interface; `owner`."""

    def __init__(self, interface: str, owner: str) -> None:
        super().__init__(interface, f"the source {owner!r} of this node has it", errno.EBUSY)
        self.owner = owner


class _SocketAddress(ctypes.Structure):
    """``struct sockaddr_xdp``, which Python's bind does not know."""

    _fields_: ClassVar = [
        ("family", ctypes.c_uint16), ("flags", ctypes.c_uint16), ("interface", ctypes.c_uint32), ("queue", ctypes.c_uint32),
        ("shared", ctypes.c_uint32),
    ]  # fmt: skip


class _QueueSocket:
    """An AF_XDP socket of one receive queue, with its frames and rings, all frames handed to the kernel."""

    def __init__(self, interface: str, queue: int, frames: int, chunk_bytes: int, stamped: bool, busy_poll_us: int) -> None:
        self._maps: list[mmap.mmap] = []
        self.sock = socket.socket(AF_XDP, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        try:
            self._register(frames, chunk_bytes)
            self._map_rings(frames, chunk_bytes, stamped)
            if busy_poll_us:
                self.sock.setsockopt(socket.SOL_SOCKET, _SO_PREFER_BUSY_POLL, 1)
                self.sock.setsockopt(socket.SOL_SOCKET, _SO_BUSY_POLL, busy_poll_us)
            self._bind(interface, queue)
        except BaseException:
            self.close()
            raise
        self.zero_copy = bool(struct.unpack("<I", self.sock.getsockopt(_SOL_XDP, _OPTIONS, 4))[0] & 1)

    def _register(self, frames: int, chunk_bytes: int) -> None:
        memory = mmap.mmap(-1, frames * chunk_bytes + mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        self._maps.append(memory)
        self.buffer: Bytes = np.frombuffer(memory, np.uint8, frames * chunk_bytes + SLACK)
        area = struct.pack("<QQIIII", self.buffer.ctypes.data, frames * chunk_bytes, chunk_bytes, 0, 0, 0)
        self.sock.setsockopt(_SOL_XDP, _UMEM_REG, area)
        # fewer descriptors than frames: what has no room is counted as such, and the loop holds some frames meanwhile
        for option, size in ((_FILL_RING, frames), (_COMPLETION_RING, _COMPLETIONS), (_RX_RING, frames // 2)):
            self.sock.setsockopt(_SOL_XDP, option, size)

    def _map_rings(self, frames: int, chunk_bytes: int, stamped: bool) -> None:
        offsets = struct.unpack("<16Q", self.sock.getsockopt(_SOL_XDP, _MMAP_OFFSETS, 128))
        rx, fill = offsets[0:4], offsets[8:12]  # each: producer, consumer, descriptors, flags
        rx_map, fill_map = self._map(rx[2] + frames * 8, _PGOFF_RX), self._map(fill[2] + frames * 8, _PGOFF_FILL)
        self.rx_words, self.rx = np.frombuffer(rx_map, np.uint32), np.frombuffer(rx_map, _DESCRIPTOR, frames // 2, rx[2])
        self.fill_words, self.fill = np.frombuffer(fill_map, np.uint32), np.frombuffer(fill_map, np.uint64, frames, fill[2])
        self.fill[:] = np.arange(frames, dtype=np.uint64) * np.uint64(chunk_bytes)
        self.fill_words[fill[0] // 4] = frames
        self.state = np.zeros(1, XDP_STATE)
        places = {"produced_at": rx[0] // 4, "consumed_at": rx[1] // 4, "offered_at": fill[0] // 4, "flags_at": fill[3] // 4}
        known = {"socket": self.sock.fileno(), "offered": frames, "chunk_mask": ~(chunk_bytes - 1), "stamped": stamped}
        for name, value in (places | known).items():
            self.state[name] = value

    def _map(self, size: int, offset: int) -> mmap.mmap:
        size += -size % 8
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._maps.append(mmap.mmap(self.sock.fileno(), size, flags, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset))
        return self._maps[-1]

    def _bind(self, interface: str, queue: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        address = _SocketAddress(AF_XDP, _USE_NEED_WAKEUP, socket.if_nametoindex(interface), queue, 0)
        for tried in range(_BIND_TRIES):
            if libc.bind(self.sock.fileno(), ctypes.byref(address), ctypes.sizeof(address)) == 0:
                return
            number = ctypes.get_errno()
            if number != errno.EBUSY or tried == _BIND_TRIES - 1:
                raise OSError(number, f"binding queue {queue}")
            time.sleep(_BIND_WAIT_S)

    def statistics(self) -> Counter[str]:
        """What the kernel could not hand over: ``rx_dropped`` (did not fit a frame), ``rx_ring_full``, ``rx_fill_ring_empty``."""
        values = struct.unpack("<6Q", self.sock.getsockopt(_SOL_XDP, _STATISTICS, 48))
        return Counter(rx_dropped=values[0] + values[1], rx_ring_full=values[3], rx_fill_ring_empty=values[4])

    def close(self) -> None:
        """Close socket and memory. Python's mmap holds a descriptor of its own, so the maps must go too."""
        for name in ("buffer", "rx_words", "rx", "fill_words", "fill"):
            self.__dict__.pop(name, None)
        self.sock.close()
        for memory in self._maps:
            try:
                memory.close()
            except BufferError:  # somebody still holds the arrays: it goes with them
                continue


class _Interface:
    """Program, maps, link and sockets of an interface."""

    def __init__(self, name: str, owner: str, frames: int, chunk_bytes: int, stamped: bool, busy_poll_us: int, mode: Mode) -> None:
        self.name, self.owner, self.stamped, self.users, self._wished = name, owner, stamped, 0, mode
        self.sockets: list[_QueueSocket] = []
        self._groups: Counter[bytes] = Counter()
        self.promised: Counter[tuple[str, int]] = Counter()  # to whoever has it open, begun or not
        self._opened: list[Map | Program | Link] = []
        try:
            self._open(frames, chunk_bytes, busy_poll_us)
        except BaseException:
            self.close()
            raise

    def _open(self, frames: int, chunk_bytes: int, busy_poll_us: int) -> None:
        queues = queue_count(self.name)
        self._wanted, self._by_queue, self.passed = make_maps(queues, self._opened)
        code = filter_program(self._wanted, self._by_queue, self.passed, self.stamped)
        self._opened.append(program := Program(code, bpf.XDP_PROGRAM, bpf.AT_XDP, "tickmesh_rx"))
        self._opened.append(link := self._attach(program))
        self._link = link
        for queue in range(queues):
            try:
                self.sockets.append(_QueueSocket(self.name, queue, frames, chunk_bytes, self.stamped, busy_poll_us))
            except OSError as error:
                raise XdpError(self.name, f"a socket for queue {queue}", error.errno or 0) from error
            self._by_queue.put(struct.pack("<I", queue), struct.pack("<I", self.sockets[-1].sock.fileno()))

    def _attach(self, program: Program) -> Link:
        """In the driver if it can do that, else in front of the stack; on a virtual link too, where the driver copies once more."""
        number = socket.if_nametoindex(self.name)
        if self._wished == "driver" or (self._wished == "best" and driver_of(self.name) != "veth"):
            try:
                self.mode, link = "driver", program.attach(number, _DRIVER_MODE)
                return link
            except BpfError as error:
                if self._wished == "driver" or error.errno in (errno.EBUSY, errno.EPERM):
                    raise
        self.mode, link = "generic", program.attach(number, _SKB_MODE)
        return link

    def restamp(self, stamped: bool) -> None:
        """Have frames stamped or not from now on: another program in the place of the one that runs. Raises BpfError."""
        if stamped == self.stamped:
            return
        code = filter_program(self._wanted, self._by_queue, self.passed, stamped)
        program = Program(code, bpf.XDP_PROGRAM, bpf.AT_XDP, "tickmesh_rx")
        try:
            self._link.replace(program)
        finally:
            program.close()  # the link holds it
        self.stamped = stamped
        for one in self.sockets:
            one.state["stamped"] = stamped

    def want(self, groups: Sequence[Wanted]) -> None:
        """Have these groups delivered from now on."""
        for key in (key for one in groups for key in _keys(one)):
            if self._groups[key] == 0:
                self._wanted.put(key, struct.pack("<I", 1))
            self._groups[key] += 1

    def want_no_more(self, groups: Sequence[Wanted]) -> None:
        """Leave them to the stack again, unless somebody else wants them."""
        for key in (key for one in groups for key in _keys(one)):
            self._groups[key] -= 1
            if self._groups[key] == 0:
                self._wanted.remove(key)

    def close(self) -> None:
        """The link first: from then on everything goes to the stack."""
        for opened in reversed(self._opened):
            opened.close()
        for one in self.sockets:
            one.close()


def _keys(wanted: Wanted) -> tuple[bytes, bytes]:
    address = socket.inet_aton(wanted.address)
    return address + struct.pack("!HH", wanted.port, 0), address + bytes(4)


def make_maps(queues: int, opened: list[Any]) -> tuple[Map, Map, Counts]:
    """The maps of a filter program, each put into `opened` as it is made. Raises BpfError."""
    wanted = Map(bpf.HASH, 8, 4, 1024, "tickmesh_want")
    opened.append(wanted)
    sockets = Map(bpf.XSKMAP, 4, 4, max(queues, 1), "tickmesh_xsks")
    opened.append(sockets)
    passed = Counts(3, "tickmesh_passed")
    opened.append(passed)
    return wanted, sockets, passed


def queue_count(interface: str) -> int:
    """Receive queues of an interface, as ``ethtool -l`` shows them; 1 where the driver does not say."""
    channels = _ethtool(interface, _GET_CHANNELS, 36)
    if channels is None:
        return 1
    words = struct.unpack("9I", channels)
    return words[5] + words[8] or 1  # those of their own, and those that send too


def driver_of(interface: str) -> str:
    """Name of an interface's driver, as ``ethtool -i`` shows it; empty where there is none."""
    about = _ethtool(interface, _GET_DRIVER, 196)
    return about[4:36].rstrip(b"\0").decode(errors="replace") if about else ""


def _ethtool(interface: str, command: int, size: int) -> bytes | None:
    """What a driver answers to ethtool(8), None if it does not."""
    answer = ctypes.create_string_buffer(struct.pack("I", command), size)
    request = struct.pack("16sQ16x", interface.encode()[:15], ctypes.addressof(answer))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            fcntl.ioctl(probe, _SIOCETHTOOL, request)
        except OSError:
            return None
    return answer.raw


def chunk_bytes_for(mtu_bytes: int) -> int:
    """Size of a UMEM chunk that holds a frame of that MTU; 0: none does."""
    need = mtu_bytes + _ETHERNET_BYTES + 4 + HEADROOM_BYTES
    return next((size for size in (2048, CHUNK_BYTES_MAX) if size >= need), 0)


_opened: dict[tuple[int, int], _Interface] = {}
_opened_lock = threading.Lock()


def _place(interface: str) -> tuple[int, int]:
    """An interface's number, which holds in its network namespace only, and that namespace."""
    return os.stat("/proc/thread-self/ns/net").st_ino, socket.if_nametoindex(interface)


# ---------------------------------------------------------------- the face


class XdpPath:
    """The receive queues of one interface; made by :func:`open_xdp`.

    Attributes:
        kernels, buffers, packets: for :func:`receive_batch`, one per queue.
        mode: ``driver`` or ``generic``.
        zero_copy: whether the card writes into our memory.
        begun: whether it takes the groups.
    """

    def __init__(self, place: tuple[int, int], shared: _Interface, wanted: Sequence[Wanted], batch: int, stamped: bool) -> None:
        self._key, self._shared, self._wanted, self.begun = place, shared, list(wanted), False
        self._stamped, self._takes = stamped, False
        shared.promised.update((one.address, one.port) for one in wanted)
        self.mode, self.zero_copy = shared.mode, all(one.zero_copy for one in shared.sockets)
        self._counts = np.zeros(1, FRAME_COUNTS)
        groups = make_groups(wanted)
        self.kernels = tuple(
            XdpKernel(one.state, self._counts, groups, one.rx_words, one.rx, one.fill_words, one.fill) for one in shared.sockets
        )
        self.buffers: tuple[Bytes, ...] = tuple(one.buffer for one in shared.sockets)
        self.packets: tuple[Packets, ...] = tuple(np.zeros(batch, PACKET) for _ in shared.sockets)

    def begin(self) -> None:
        """Take the groups from now on, stamped or not; before, the stack has them. Raises BpfError."""
        with _opened_lock:
            self.take_groups()
            self._shared.restamp(self._stamped)
        self.begun = True

    def take_groups(self) -> None:
        """Have the groups put into the rings, though somebody else still reads those. Raises BpfError."""
        if not self._takes:
            self._shared.want(self._wanted)
        self._takes = True

    def descriptors(self) -> list[int]:
        """For epoll: readable while something waits."""
        return [one.sock.fileno() for one in self._shared.sockets]

    def receive(self, queue: int = 0) -> Packets:
        """What has arrived, as PACKET records into ``buffers[queue]``, valid until the next call."""
        return self.packets[queue][: int(_receive(self.kernels[queue], self.buffers[queue], self.packets[queue]))]

    def peek(self, queue: int, drop: bool) -> bytes | None:
        """The first datagram of a queue, which stays unless `drop`; None if there is none."""
        kernel, first = self.kernels[queue], self.packets[queue][:1]
        counts = self._counts.copy()
        if int(_receive(kernel, self.buffers[queue], first)) == 0:
            return None
        at, length = int(first[0]["offset"]), int(first[0]["length"])
        payload = self.buffers[queue][at : at + length].tobytes()
        if not drop:
            kernel.state["taken"] = 0
            self._counts[:] = counts
        return payload

    def counters(self) -> FrameCounters:
        """What was taken and what was not."""
        found = FrameCounters(*(int(self._counts[0][name]) for name in FrameCounters._fields))
        passed = self._shared.passed.values
        return found._replace(
            tagged=found.tagged + int(passed[TAGGED]),
            fragments=found.fragments + int(passed[FRAGMENTS]),
            not_wanted=found.not_wanted + int(passed[OPTIONS]),
        )

    def statistics(self) -> dict[str, int]:
        """Over all queues: ``rx_dropped`` (larger than a frame), ``rx_ring_full``, ``rx_fill_ring_empty``."""
        total: Counter[str] = Counter(rx_dropped=0, rx_ring_full=0, rx_fill_ring_empty=0)
        for one in self._shared.sockets:
            total.update(one.statistics())
        return dict(total)

    def close(self) -> None:
        """Leave the groups to the stack; the last user of an interface takes the program off. No compiled loop may be using it."""
        with _opened_lock:
            if self._takes:
                self._shared.want_no_more(self._wanted)
            self.begun = self._takes = False
            self._shared.promised.subtract((one.address, one.port) for one in self._wanted)
            self.kernels = self.buffers = ()
            self._shared.users -= 1
            if self._shared.users == 0:
                _opened.pop(self._key, None)
                self._shared.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_xdp(
    wanted: Sequence[Wanted],
    interface: str,
    *,
    owner: str = "",
    frames: int = 4096,
    chunk_bytes: int = 2048,
    batch: int = 64,
    stamped: bool = False,
    busy_poll_us: int = 0,
    mode: Mode = "best",
) -> XdpPath:
    """Open all receive queues of an interface for the datagrams of some groups. Joining them is the caller's.

    Args:
        wanted: the groups and their lines.
        interface: its name.
        owner: who opens it; the same owner may open it again before the first is closed.
        frames: per queue, a power of two.
        chunk_bytes: of a frame and 256 bytes more: 2048 or 4096.
        batch: datagrams taken at once.
        stamped: `ts_recv` is when the XDP program saw the frame.
        busy_poll_us: have the driver polled from our side for so long (SO_BUSY_POLL); 0: not.
        mode: where the program runs: in the driver, in front of the stack, or in the driver if it can.

    Raises:
        XdpError, BpfError: the host does not allow or cannot do it.
        InterfaceHeld: another owner in this process has the interface.
        ValueError: a size that makes no sense.
    """
    if frames & (frames - 1) or not 64 <= frames <= 1 << 20 or chunk_bytes not in (2048, 4096) or not 0 < batch <= 1024:
        sizes = f"frames={frames} (a power of two from 64), chunk_bytes={chunk_bytes} (2048 or 4096), batch={batch} (1..1024)"
        raise ValueError(f"a size is out of range: {sizes}")
    if not wanted:
        raise ValueError("no group is wanted")
    _receive(*warm_line())  # compiled or loaded now, not when packets wait
    with _opened_lock:
        place = _place(interface)
        shared = _opened.get(place)
        if shared is None:
            shared = _opened[place] = _Interface(interface, owner, frames, chunk_bytes, stamped, busy_poll_us, mode)
        elif shared.owner != owner:
            raise InterfaceHeld(interface, shared.owner)
        shared.users += 1
        path = XdpPath(place, shared, wanted, batch, stamped)
        if shared.users > 1:
            path.take_groups()  # the rings are in use: what both want must not go to the stack when the other one closes
    return path


def taker_of(wanted: Wanted, interface: str, owner: str) -> str | None:
    """The other owner in this process whose program takes a group away from every other way to receive it; None: nobody does."""
    with _opened_lock:
        shared = _opened.get(_place(interface))
        taken = shared is not None and shared.owner != owner and shared.promised[wanted.address, wanted.port] > 0
        return shared.owner if shared is not None and taken else None


def warm_line() -> tuple[XdpKernel, Bytes, Packets]:
    """Kernel, buffer and packets of the types that a loop over AF_XDP is compiled for; nothing is open."""
    words, groups = np.zeros(8, np.uint32), make_groups([Wanted("127.0.0.1", 1, None, 0)])
    rings = words, np.zeros(8, _DESCRIPTOR), words, np.zeros(8, np.uint64)
    return XdpKernel(np.zeros(1, XDP_STATE), np.zeros(1, FRAME_COUNTS), groups, *rings), np.zeros(64, np.uint8), np.zeros(1, PACKET)
