"""AF_PACKET rings (TPACKET_V2): copies of wanted datagrams in memory shared with the kernel, read without a system call.

Takes CAP_NET_RAW alone and any interface. It copies: other programs on the host still get the datagrams. A classic BPF filter in the
kernel lets the wanted groups through. PACKET records point into the ring; a slot goes back at the next call. Source: Linux
``Documentation/networking/packet_mmap.rst``.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import mmap
import os
import socket
import struct
from collections import namedtuple
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from tickmesh.transports.capture import PACKET, Packets
from tickmesh.transports.recording import SLACK, Bytes
from tickmesh.transports.toolbox import inlined, le16, le32, load_acquire, loop, now_ns, outlined, store_release
from tickmesh.transports.udp_frames import CHECK, CHECKED, FRAME_COUNTS, FrameCounters, Wanted, make_groups, read_datagram

_SOL_PACKET, _RX_RING, _GET_STATISTICS, _VERSION, _IGNORE_OUTGOING = 263, 5, 6, 10, 23
_TPACKET_V2, _SO_ATTACH_FILTER, _SO_BUSY_POLL = 1, 26, 46
_ETH_P_IP = 0x0800
_BLOCK_BYTES = 1 << 16
_HEADER_BYTES = 80
"""Room for ``tpacket2_hdr`` and what the kernel aligns behind it."""
_USER, _CHECKSUM_NOT_READY, _TAG_VALID, _CHECKSUM_VALID = 1, 8, 16, 128
_LENGTH_AT, _CAPTURED_AT, _NET_AT, _SECONDS_AT, _NANOS_AT = 4, 8, 14, 16, 20
"""Offsets in ``struct tpacket2_hdr``."""
_KIND_AT, _OTHER_HOST = 32 + 10, 3
"""Where ``sll_pkttype`` of the ``sockaddr_ll`` behind it lies, and its PACKET_OTHERHOST."""

# ---------------------------------------------------------------- receiving, compiled

RING_STATE = np.dtype([(name, "<i8") for name in ("slot_bytes", "slots", "next", "taken", "stamped")])
"""A ring's shape, our place in it, and how many slots we still hold."""
PacketRingKernel = namedtuple("PacketRingKernel", "state counts groups words")


@inlined
def _give_back(ring: Any) -> Any:
    s = ring.state[0]
    while s.taken > 0:
        store_release(ring.words, s.next * s.slot_bytes // 4, np.uint32(0))
        s.next = s.next + 1 if s.next + 1 < s.slots else 0
        s.taken -= 1


@outlined
def _read_slot(ring: Any, buffer: Any, at: Any, status: Any, packet: Any) -> Any:
    """Read the datagram of one slot; 1 if it is one to take."""
    counts, ip = ring.counts[0], at + np.int64(le16(buffer, at + _NET_AT))
    if status & np.uint32(_TAG_VALID) != 0 or buffer[np.uint64(at + _KIND_AT)] == _OTHER_HOST:
        counts.tagged += 1  # the kernel takes the tag of a VLAN that it has no interface for off, and says "of another host"
        return 0
    if ring.state[0].stamped != 0:
        packet.ts_recv = np.int64(le32(buffer, at + _SECONDS_AT)) * 1_000_000_000 + np.int64(le32(buffer, at + _NANOS_AT))
    checked = CHECKED if status & np.uint32(_CHECKSUM_NOT_READY | _CHECKSUM_VALID) != 0 else CHECK
    return read_datagram(counts, ring.groups, buffer, ip, np.int64(le32(buffer, at + _CAPTURED_AT)), checked, packet)


@outlined
def receive_batch(ring: Any, buffer: Any, packets: Any, line: Any, now_ns: Any) -> Any:
    """Take what has arrived, without waiting; returns the number of datagrams, valid until the next call.

    Args:
        ring: ``PacketRing.kernels[0]``.
        buffer: the ring's memory.
        packets: PACKET array to fill from 0.
        line: not used: the datagram's group says it.
        now_ns: wall clock; their `ts_recv` unless the kernel's is asked for.
    """
    _give_back(ring)
    s, count, slot = ring.state[0], np.int64(0), ring.state[0].next
    while s.taken < packets.size and s.taken < s.slots:
        at = slot * s.slot_bytes
        status = load_acquire(ring.words, at // 4)
        if status & np.uint32(_USER) == 0:
            break
        packets[count].ts_recv = np.int64(now_ns)
        count += _read_slot(ring, buffer, at, status, packets[count])
        slot = slot + 1 if slot + 1 < s.slots else np.int64(0)
        s.taken += 1
    return count


@loop
def _receive(ring: Any, buffer: Any, packets: Any) -> Any:
    return receive_batch(ring, buffer, packets, 0, now_ns())


# ---------------------------------------------------------------- the filter, in classic BPF

_LOAD_U8, _LOAD_U16, _LOAD_U32, _IF_EQUAL, _IF_BITS, _HEADER_LENGTH, _LOAD_U16_X, _RETURN = 0x30, 0x28, 0x20, 0x15, 0x45, 0xB1, 0x48, 0x06
_EVERYTHING = 0xFFFF


def filter_code(wanted: Sequence[Wanted]) -> bytes:
    """Classic BPF over the IP header: UDP to one of the groups, or a fragment to one of their addresses (the loop counts those)."""
    steps = [(_LOAD_U8, 0, 0, 9), (_IF_EQUAL, 1, 0, socket.IPPROTO_UDP), (_RETURN, 0, 0, 0)]
    for address in sorted({one.address for one in wanted}):
        ports = sorted({one.port for one in wanted if one.address == address})
        tests = [(_IF_EQUAL, len(ports) - i, 0, port) for i, port in enumerate(ports)]
        tests = [*tests, (_RETURN, 0, 0, 0), (_RETURN, 0, 0, _EVERYTHING)]
        inner = [(_LOAD_U16, 0, 0, 6), (_IF_BITS, len(tests) + 1, 0, 0x3FFF), (_HEADER_LENGTH, 0, 0, 0), (_LOAD_U16_X, 0, 0, 2), *tests]
        steps += [(_LOAD_U32, 0, 0, 16), (_IF_EQUAL, 0, len(inner), int(ipaddress.IPv4Address(address))), *inner]
    return b"".join(struct.pack("<HBBI", *step) for step in [*steps, (_RETURN, 0, 0, 0)])


# ---------------------------------------------------------------- the face


class PacketRingError(Exception):
    """A ring cannot be made. `interface`, `step` and `errno` say for what, where and how."""

    def __init__(self, interface: str, step: str, number: int) -> None:
        super().__init__(f"a packet ring on {interface}: {step}: {os.strerror(number)}")
        self.interface, self.step, self.errno = interface, step, number


class PacketRing:
    """A ring of one interface; made by :func:`open_packet_ring`.

    Attributes:
        kernels, buffers, packets: for :func:`receive_batch`, one of each.
    """

    def __init__(self, sock: socket.socket, memory: mmap.mmap, wanted: Sequence[Wanted], slots: int, slot_bytes: int, batch: int) -> None:
        self._sock, self._memory, self._dropped = sock, memory, 0
        buffer: Bytes = np.frombuffer(memory, np.uint8)
        self._counts = np.zeros(1, FRAME_COUNTS)
        state = np.zeros(1, RING_STATE)
        state["slots"], state["slot_bytes"] = slots, slot_bytes
        self.kernels: tuple[PacketRingKernel, ...] = (
            PacketRingKernel(state, self._counts, make_groups(wanted), np.frombuffer(memory, np.uint32)),
        )
        self.buffers: tuple[Bytes, ...] = (buffer,)
        self.packets: tuple[Packets, ...] = (np.zeros(batch, PACKET),)

    def begin(self) -> None:
        """Nothing to do: it takes the groups since it was opened."""

    def descriptors(self) -> list[int]:
        """For epoll: readable while something waits."""
        return [self._sock.fileno()]

    def receive(self, queue: int = 0) -> Packets:
        """What has arrived, as PACKET records into ``buffers[0]``, valid until the next call."""
        return self.packets[queue][: int(_receive(self.kernels[queue], self.buffers[queue], self.packets[queue]))]

    def peek(self, queue: int, drop: bool) -> bytes | None:
        """The first datagram, which stays unless `drop`; None if there is none."""
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
        return FrameCounters(*(int(self._counts[0][name]) for name in FrameCounters._fields))

    def statistics(self) -> dict[str, int]:
        """``rx_ring_full``: datagrams for which there was no slot."""
        _, dropped = struct.unpack("<II", self._sock.getsockopt(_SOL_PACKET, _GET_STATISTICS, 8))  # reading sets it to 0
        self._dropped += dropped
        return {"rx_dropped": 0, "rx_ring_full": self._dropped, "rx_fill_ring_empty": 0}

    def close(self) -> None:
        """Close socket and memory. No compiled loop may be using it."""
        self.kernels = self.buffers = ()
        self._sock.close()
        try:
            self._memory.close()
        except BufferError:  # somebody still holds the arrays: it goes with them
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_packet_ring(
    wanted: Sequence[Wanted],
    interface: str,
    *,
    ring_bytes: int = 8 << 20,
    datagram_bytes: int = 1500,
    batch: int = 64,
    stamped: bool = False,
    busy_poll_us: int = 0,
) -> PacketRing:
    """Open a ring for the datagrams of some groups. Joining them is the caller's.

    Args:
        wanted: the groups and their lines.
        interface: its name.
        ring_bytes: how much the kernel may keep while the loop is busy.
        datagram_bytes: longest IP packet (the interface's MTU).
        batch: datagrams taken at once.
        stamped: `ts_recv` is when the kernel had the datagram.
        busy_poll_us: have the driver polled from our side for so long (SO_BUSY_POLL); 0: not.

    Raises:
        PacketRingError: e.g. without CAP_NET_RAW.
        ValueError: a size that makes no sense.
    """
    slot_bytes = 1 << (datagram_bytes + _HEADER_BYTES + SLACK - 1).bit_length()
    if not wanted or slot_bytes > _BLOCK_BYTES or not 0 < batch <= 1024:
        raise ValueError(f"{len(wanted)} groups (at least 1), datagram_bytes={datagram_bytes} (to 65392), batch={batch} (1..1024)")
    _receive(*warm_line())  # compiled or loaded now, not when packets wait
    blocks = max(1, ring_bytes // _BLOCK_BYTES)
    slots = blocks * _BLOCK_BYTES // slot_bytes
    try:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0)  # protocol 0: nothing yet
    except OSError as error:
        raise PacketRingError(interface, "the socket", error.errno or 0) from error
    try:
        _prepare(sock, filter_code(wanted), struct.pack("<4I", _BLOCK_BYTES, blocks, slot_bytes, slots), busy_poll_us)
        memory = mmap.mmap(sock.fileno(), blocks * _BLOCK_BYTES, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        ring = PacketRing(sock, memory, wanted, slots, slot_bytes, batch)
        ring.kernels[0].state["stamped"] = stamped
        sock.bind((interface, _ETH_P_IP))
    except OSError as error:
        sock.close()
        raise PacketRingError(interface, "setting it up", error.errno or errno.EIO) from error
    return ring


def _prepare(sock: socket.socket, code: bytes, shape: bytes, busy_poll_us: int) -> None:
    program = ctypes.create_string_buffer(code, len(code))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("<H6xQ", len(code) // 8, ctypes.addressof(program)))
    sock.setsockopt(_SOL_PACKET, _VERSION, _TPACKET_V2)
    sock.setsockopt(_SOL_PACKET, _IGNORE_OUTGOING, 1)
    if busy_poll_us:
        sock.setsockopt(socket.SOL_SOCKET, _SO_BUSY_POLL, busy_poll_us)
    sock.setsockopt(_SOL_PACKET, _RX_RING, shape)


def warm_line() -> tuple[PacketRingKernel, Bytes, Packets]:
    """Kernel, buffer and packets of the types that a loop over a packet ring is compiled for; nothing is open."""
    groups = make_groups([Wanted("127.0.0.1", 1, None, 0)])
    kernel = PacketRingKernel(np.zeros(1, RING_STATE), np.zeros(1, FRAME_COUNTS), groups, np.zeros(64, np.uint32))
    return kernel, np.zeros(64, np.uint8), np.zeros(1, PACKET)
