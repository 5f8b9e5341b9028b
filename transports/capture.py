"""Captures: pcap and pcapng files as datagrams (:data:`PACKET`) in one buffer, and as TCP byte streams.

Reads pcap (µs, ns and the patched Linux variant, both byte orders) and pcapng (several sections and interfaces, any time resolution)
over Ethernet with VLAN tags, Linux cooked (v1, v2), raw IP and loopback; IPv4 and IPv6; UDP and TCP. The whole file is mapped and
indexed by one compiled loop, nothing is copied: a PACKET points at its payload in the file. What is not taken is counted by
:class:`Reason`. UDP checksums are not verified: network cards fill them in after the capture point.

Sources: pcap and pcapng, IETF drafts ``draft-ietf-opsawg-pcap`` and ``draft-ietf-opsawg-pcapng``; link types, tcpdump.org/linktypes.
"""

from __future__ import annotations

import ipaddress
import os
import struct
from collections import namedtuple
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tickmesh.transports.recording import LIMIT_BYTES, SLACK, Bytes, Problem, read_bytes
from tickmesh.transports.tcp_stream import SEGMENT, Endpoints, TcpStream, order_streams
from tickmesh.transports.toolbox import be16, be32, be64, inlined, le16, le32, le64, loop, prefetch

PACKET = np.dtype(
    [
        ("offset", "<u8"),
        ("ts_recv", "<i8"),
        ("length", "<u4"),
        ("address", "<u4"),
        ("port", "<u2"),
        ("line", "u1"),
        ("flags", "u1"),
        ("_pad", "<u4"),
    ]
)
"""One datagram in a buffer: payload is ``buffer[offset : offset + length]``; `address` and `port` are the destination (IPv4 as a
number, the last four bytes of an IPv6 address); `line` is 0 for A, 1 for B, …; `flags` are :class:`PacketFlag` bits."""
assert PACKET.itemsize == 32


class PacketFlag(IntFlag):
    """Bits of a PACKET's `flags`."""

    IPV6 = 1
    UNTIMED = 2
    """The capture holds no time for it (simple packet block); `ts_recv` is that of the packet before."""


Packets = npt.NDArray[np.void]
Lines = Mapping[tuple[str, int], int]


class Reason(IntEnum):
    """What a capture's frames were, and why some were not taken: index into the counters of a scan."""

    FRAMES = 0
    DATAGRAMS = 1
    DATAGRAM_BYTES = 2
    SEGMENTS = 3
    NOT_IP = 4
    """ARP, LLDP, …"""
    FRAGMENT = 5
    """A fragment of an IP packet; venues do not fragment market data."""
    OTHER_PROTOCOL = 6
    """IP, but neither UDP nor TCP: IGMP, ICMP, …"""
    OTHER_DESTINATION = 7
    """UDP to an address and port that is not one of the lines asked for."""
    CUT = 8
    """The capture holds only the beginning of the packet."""
    MALFORMED = 9
    """A length in a header contradicts another."""
    UNKNOWN_LINK = 10
    """A link type other than those read."""
    OTHER_BLOCK = 11
    """A pcapng block that holds no packet: names, statistics, …"""
    BAD_BLOCK = 12
    """A pcapng block whose content does not fit in it."""
    UNKNOWN_INTERFACE = 13
    """A pcapng packet of an interface that the file does not describe (or one after the 256th)."""
    TOO_MANY_FLOWS = 14


_TAKEN = (Reason.FRAMES, Reason.DATAGRAMS, Reason.DATAGRAM_BYTES, Reason.SEGMENTS)


class CaptureProblem(IntEnum):
    """Why reading a capture stopped before the file's end."""

    NONE = 0
    TRUNCATED = 1
    """The file ends within a record or block."""
    BAD_LENGTH = 2
    """A record or block has an impossible length."""
    BAD_SECTION = 3
    """A pcapng section starts with an unknown byte-order mark."""


# ---------------------------------------------------------------- state of a scan

_STATE = np.dtype(
    [
        (name, "<i8")
        for name in (
            "position", "end", "big_endian", "is_pcapng", "fraction_ns", "record_header", "interfaces",
            "frame", "frame_end", "frame_link", "frame_flags", "ts_ns", "first_ns", "problem", "problem_offset",
            "packets", "segments", "flows",
        )
    ]
)  # fmt: skip
_INTERFACE = np.dtype(
    [("multiply", "<u8"), ("divide", "<u8"), ("offset_ns", "<i8"), ("binary_bits", "<i8"), ("snaplen", "<i8"), ("link", "<i8")]
)
_LINE = np.dtype([("high", "<u8"), ("low", "<u8"), ("port", "<u2"), ("line", "u1"), ("used", "u1"), ("_pad", "<u4")])
_FLOW = np.dtype(
    [
        ("source_high", "<u8"),
        ("source_low", "<u8"),
        ("target_high", "<u8"),
        ("target_low", "<u8"),
        ("source_port", "<u2"),
        ("target_port", "<u2"),
        ("used", "<u4"),
    ]
)
_Scan = namedtuple("_Scan", "state interfaces lines flows counters")  # arrays; the compiled loop's whole memory

_INTERFACES_MAX = 256
_FLOW_SLOTS = 1 << 16
_FLOWS_MAX = _FLOW_SLOTS // 2
_FRAME_BYTES_MAX = 1 << 18
"""The largest snapshot length of libpcap; a longer record means that the file is damaged."""
_AHEAD_BYTES, _AHEAD_LINES = 2048, 4
"""The memory asked for while a frame is looked into: where the next record is stands in the one before, so waiting for it would be
the cost of a frame. A hint past the end of the file does nothing."""
_TAGS_MAX = 4
_EXTENSIONS_MAX = 8
_MAPPED_IPV4 = 0xFFFF << 32
_HASH = 0x9E3779B97F4A7C15

_NULL, _ETHERNET, _LOOP, _SLL, _SLL2 = 0, 1, 108, 113, 276
_LINKS = (_ETHERNET, _SLL, _SLL2, _NULL, _LOOP, 101, 228, 229, 12, 14)
"""The link types that are read; from the sixth on raw IP, under several numbers."""
_IPV4, _IPV6, _SHORT, _OTHER = 0x0800, 0x86DD, -1, 0
_TCP, _UDP, _FRAGMENT, _TOO_SHORT = 6, 17, 44, -1
_R_FRAMES, _R_DATAGRAMS, _R_BYTES, _R_SEGMENTS = (int(r) for r in _TAKEN)
_R_NOT_IP, _R_FRAGMENT, _R_PROTOCOL, _R_DESTINATION = 4, 5, 6, 7
_R_CUT, _R_MALFORMED, _R_LINK, _R_OTHER_BLOCK, _R_BAD_BLOCK, _R_INTERFACE, _R_FLOWS = 8, 9, 10, 11, 12, 13, 14


# ---------------------------------------------------------------- frames of a file


@inlined
def _word(buf: Any, at: Any, big: Any) -> Any:
    return np.int64(be32(buf, at)) if big else np.int64(le32(buf, at))


@inlined
def _half(buf: Any, at: Any, big: Any) -> Any:
    return np.int64(be16(buf, at)) if big else np.int64(le16(buf, at))


@inlined
def _stop(s: Any, problem: Any, offset: Any) -> Any:
    s.problem, s.problem_offset, s.position = problem, offset, s.end
    return False


@inlined
def _next_record(buf: Any, s: Any) -> Any:
    """The next record of a pcap file becomes the frame; false at the end."""
    at, left, big = s.position, s.end - s.position, s.big_endian
    if left <= 0:
        return False
    if left < s.record_header:
        return _stop(s, 1, at)
    captured = _word(buf, at + 8, big)
    if captured > _FRAME_BYTES_MAX:
        return _stop(s, 2, at)
    if captured > left - s.record_header:
        return _stop(s, 1, at)
    s.frame = at + s.record_header
    s.frame_end = s.position = s.frame + captured
    s.ts_ns = _word(buf, at, big) * 1_000_000_000 + _word(buf, at + 4, big) * s.fraction_ns
    return True


@inlined
def _interface_time(interface: Any, resolution: Any) -> Any:
    """Set how an interface's clock ticks convert to ns (option if_tsresol; an impossible one counts as µs)."""
    exponent = resolution & 0x7F
    interface.multiply, interface.divide, interface.binary_bits = np.uint64(1), np.uint64(1), -1
    if resolution & 0x80 and exponent < 64:
        interface.binary_bits = exponent
    elif exponent > 19 or resolution & 0x80:
        interface.multiply = np.uint64(1000)
    else:
        for _ in range(exponent, 9):
            interface.multiply *= np.uint64(10)
        for _ in range(9, exponent):
            interface.divide *= np.uint64(10)


@inlined
def _ticks_to_ns(interface: Any, ticks: Any) -> Any:
    bits = interface.binary_bits
    if bits < 0:
        return np.int64(ticks * interface.multiply // interface.divide) + interface.offset_ns
    seconds = ticks >> np.uint64(bits)
    fraction = ticks & ((np.uint64(1) << np.uint64(bits)) - np.uint64(1))
    if bits > 32:
        fraction >>= np.uint64(bits - 32)
        bits = 32
    return np.int64(seconds * np.uint64(1_000_000_000) + ((fraction * np.uint64(1_000_000_000)) >> np.uint64(bits))) + interface.offset_ns


@inlined
def _add_interface(buf: Any, scan: Any, at: Any, end: Any) -> Any:
    """Interface description block: link type, snapshot length, options if_tsresol (9) and if_tsoffset (14)."""
    s, big = scan.state[0], scan.state[0].big_endian
    if end - at < 16 or s.interfaces >= _INTERFACES_MAX:
        scan.counters[_R_BAD_BLOCK] += 1
        return
    interface = scan.interfaces[s.interfaces]
    s.interfaces += 1
    interface.link, interface.snaplen, interface.offset_ns = _half(buf, at + 8, big), _word(buf, at + 12, big), 0
    _interface_time(interface, 6)
    at += 16
    while end - at >= 4:
        code, length = _half(buf, at, big), _half(buf, at + 2, big)
        if code == 0 or length > end - at - 4:
            break
        if code == 9 and length == 1:
            _interface_time(interface, np.int64(buf[at + 4]))
        elif code == 14 and length == 8:
            seconds = np.int64(be64(buf, at + 4)) if big else np.int64(le64(buf, at + 4))
            interface.offset_ns = seconds * 1_000_000_000
        at += 4 + ((length + 3) & ~3)


@inlined
def _block_frame(buf: Any, scan: Any, kind: Any, at: Any, end: Any) -> Any:
    """The packet in an enhanced (6), simple (3) or old (2) packet block becomes the frame; false if it cannot be used."""
    s, big = scan.state[0], scan.state[0].big_endian
    data = at + 12 if kind == 3 else at + 28
    if end < data:
        scan.counters[_R_BAD_BLOCK] += 1
        return False
    index = np.int64(0)
    if kind == 6:
        index = _word(buf, at + 8, big)
    elif kind == 2:
        index = _half(buf, at + 8, big)
    if index >= s.interfaces:
        scan.counters[_R_INTERFACE] += 1
        return False
    interface = scan.interfaces[index]
    if kind == 3:
        captured = min(_word(buf, at + 8, big), end - data)
        captured = min(captured, interface.snaplen) if interface.snaplen > 0 else captured
        s.frame_flags = 2
    else:
        captured = _word(buf, at + 20, big)
        ticks = np.uint64(_word(buf, at + 12, big)) << np.uint64(32) | np.uint64(_word(buf, at + 16, big))
        s.ts_ns, s.frame_flags = _ticks_to_ns(interface, ticks), 0
    if captured > end - data:
        scan.counters[_R_BAD_BLOCK] += 1
        return False
    s.frame, s.frame_end, s.frame_link = data, data + captured, interface.link
    return True


@inlined
def _next_block(buf: Any, scan: Any) -> Any:
    """The next packet of a pcapng file becomes the frame, blocks before it are taken in; false at the end."""
    s = scan.state[0]
    while s.position < s.end:
        at, left = s.position, s.end - s.position
        if left < 12:
            return _stop(s, 1, at)
        kind = _word(buf, at, s.big_endian)
        if kind == 0x0A0D0D0A:
            mark = le32(buf, at + 8)
            if mark != 0x1A2B3C4D and mark != 0x4D3C2B1A:
                return _stop(s, 3, at)
            s.big_endian, s.interfaces = np.int64(mark == 0x4D3C2B1A), 0
        length = _word(buf, at + 4, s.big_endian)
        if length < 12 or length & 3:
            return _stop(s, 2, at)
        if length > left:
            return _stop(s, 1, at)
        if _word(buf, at + length - 4, s.big_endian) != length:
            return _stop(s, 2, at)
        s.position += length
        if kind == 6 or kind == 3 or kind == 2:
            if _block_frame(buf, scan, kind, at, at + length - 4):
                return True
        elif kind == 1:
            _add_interface(buf, scan, at, at + length - 4)
        elif kind != 0x0A0D0D0A:
            scan.counters[_R_OTHER_BLOCK] += 1
    return False


# ---------------------------------------------------------------- headers of a frame


@inlined
def _link_header(buf: Any, at: Any, end: Any, link: Any) -> Any:
    """``(start of the network header, ethertype)``; the type is _SHORT if the frame ends before, _OTHER if unknown."""
    if link in (_ETHERNET, _SLL):
        size = 14 if link == _ETHERNET else 16
        if end - at < size:
            return at, np.int64(_SHORT)
        return at + size, np.int64(be16(buf, at + size - 2))
    if link == _SLL2:
        return (at + 20, np.int64(be16(buf, at))) if end - at >= 20 else (at, np.int64(_SHORT))
    size = 4 if link in (_NULL, _LOOP) else 0
    if end - at <= size:
        return at, np.int64(_SHORT)
    version = buf[at + size] >> 4  # the address family of a loopback header differs by system; the IP version says the same
    return at + size, np.int64(_IPV4 if version == 4 else _IPV6 if version == 6 else _OTHER)


@inlined
def _skip_tags(buf: Any, at: Any, end: Any, ethertype: Any) -> Any:
    """Skip VLAN tags (802.1Q, 802.1ad, the older 0x9100)."""
    for _ in range(_TAGS_MAX):
        if ethertype != 0x8100 and ethertype != 0x88A8 and ethertype != 0x9100:
            break
        if end - at < 4:
            return at, np.int64(_SHORT)
        ethertype = np.int64(be16(buf, at + 2))
        at += 4
    return at, ethertype


@inlined
def _ipv4_header(buf: Any, at: Any, end: Any) -> Any:
    """``(payload, its end, protocol or reason)``: a negative protocol is minus the reason for not taking the packet."""
    if end - at < 20:
        return at, end, np.int64(-_R_CUT)
    header, total = np.int64(buf[at] & 15) * 4, np.int64(be16(buf, at + 2))
    if total == 0:
        total = end - at  # captured before the card split it (segmentation offload)
    if buf[at] >> 4 != 4 or header < 20 or total < header:
        return at, end, np.int64(-_R_MALFORMED)
    if be16(buf, at + 6) & 0x3FFF:
        return at, end, np.int64(-_R_FRAGMENT)
    if total > end - at:
        return at, end, np.int64(-_R_CUT)
    return at + header, at + total, np.int64(buf[at + 9])


@inlined
def _ipv6_header(buf: Any, at: Any, end: Any) -> Any:
    """As :func:`_ipv4_header`; extension headers are skipped (RFC 8200, section 4)."""
    if end - at < 40:
        return at, end, np.int64(-_R_CUT)
    if buf[at] >> 4 != 6:
        return at, end, np.int64(-_R_MALFORMED)
    payload, protocol = np.int64(be16(buf, at + 4)), np.int64(buf[at + 6])
    if payload > end - at - 40:
        return at, end, np.int64(-_R_CUT)
    if payload > 0:
        end = at + 40 + payload
    at += 40
    for _ in range(_EXTENSIONS_MAX):
        if protocol != 0 and protocol != 43 and protocol != 60:
            break
        if end - at < 8:
            return at, end, np.int64(-_R_MALFORMED)
        protocol, size = np.int64(buf[at]), (np.int64(buf[at + 1]) + 1) * 8
        if size > end - at:
            return at, end, np.int64(-_R_MALFORMED)
        at += size
    return at, end, np.int64(-_R_FRAGMENT) if protocol == _FRAGMENT else protocol


@inlined
def _line_of(lines: Any, high: Any, low: Any, port: Any) -> Any:
    """The line of a destination, -1 if it is not one; without a table everything is line 0."""
    if lines.size == 0:
        return np.int64(0)
    mask = np.uint64(lines.size - 1)
    slot = _slot(low ^ high, np.uint64(port)) & mask
    for _ in range(lines.size):
        entry = lines[slot]
        if entry.used == 0:
            break
        if entry.low == low and entry.high == high and entry.port == port:
            return np.int64(entry.line)
        slot = (slot + np.uint64(1)) & mask
    return np.int64(-1)


@inlined
def _slot(address: Any, ports: Any) -> Any:
    return ((address ^ (ports << np.uint64(40))) * np.uint64(_HASH)) >> np.uint64(32)


@inlined
def _take_datagram(buf: Any, scan: Any, at: Any, end: Any, high: Any, low: Any, packets: Any) -> Any:
    s, left = scan.state[0], end - at
    if left < 8:
        scan.counters[_R_MALFORMED] += 1
        return
    length, port = np.int64(be16(buf, at + 4)), be16(buf, at + 2)
    if length == 0:
        length = left
    if length < 8 or length > left:
        scan.counters[_R_MALFORMED] += 1
        return
    line = _line_of(scan.lines, high, low, port)
    if line < 0:
        scan.counters[_R_DESTINATION] += 1
        return
    scan.counters[_R_DATAGRAMS] += 1
    scan.counters[_R_BYTES] += length - 8
    if packets.size:
        packet = packets[s.packets]
        s.packets += 1
        packet.offset, packet.length, packet.ts_recv = np.uint64(at + 8), np.uint32(length - 8), s.ts_ns
        packet.address, packet.port, packet.line = np.uint32(low & np.uint64(0xFFFFFFFF)), port, np.uint8(line)
        packet.flags = np.uint8(s.frame_flags | (low >> np.uint64(32) != np.uint64(0xFFFF) or high != np.uint64(0)))


@inlined
def _flow_of(scan: Any, source_high: Any, source_low: Any, target_high: Any, target_low: Any, source_port: Any, target_port: Any) -> Any:
    """The slot of a TCP direction, a new one if need be; -1 if there are too many."""
    flows, mask = scan.flows, np.uint64(scan.flows.size - 1)
    ports = np.uint64(source_port) << np.uint64(16) | np.uint64(target_port)
    slot = _slot(source_low ^ source_high ^ ((target_low ^ target_high) << np.uint64(7)), ports) & mask
    for _ in range(flows.size):
        flow = flows[slot]
        if flow.used == 0:
            if scan.state[0].flows >= flows.size // 2:
                return np.int64(-1)
            scan.state[0].flows += 1
            flow.source_high, flow.source_low, flow.target_high, flow.target_low = source_high, source_low, target_high, target_low
            flow.source_port, flow.target_port, flow.used = source_port, target_port, np.uint32(1)
            return np.int64(slot)
        same = flow.source_low == source_low and flow.target_low == target_low and flow.source_high == source_high
        if same and flow.target_high == target_high and flow.source_port == source_port and flow.target_port == target_port:
            return np.int64(slot)
        slot = (slot + np.uint64(1)) & mask
    return np.int64(-1)


@inlined
def _take_segment(buf: Any, scan: Any, at: Any, end: Any, addresses: Any, segments: Any) -> Any:
    s, left = scan.state[0], end - at
    header = np.int64(buf[at + 12] >> 4) * 4 if left >= 20 else np.int64(0)
    if header < 20 or header > left:
        scan.counters[_R_MALFORMED] += 1
        return
    scan.counters[_R_SEGMENTS] += 1
    if segments.size:
        source_high, source_low, target_high, target_low = addresses
        flow = _flow_of(scan, source_high, source_low, target_high, target_low, be16(buf, at), be16(buf, at + 2))
        if flow < 0:
            scan.counters[_R_FLOWS] += 1
            return
        segment = segments[s.segments]
        s.segments += 1
        segment.offset, segment.length, segment.ts_recv = np.uint64(at + header), np.uint32(left - header), s.ts_ns
        segment.seq, segment.flow, segment.flags = be32(buf, at + 4), np.uint32(flow), np.uint16(buf[at + 13])


@inlined
def _take_frame(buf: Any, scan: Any, packets: Any, segments: Any) -> Any:
    """Look into the current frame: one datagram or segment is taken, or the reason why not is counted."""
    s = scan.state[0]
    link = s.frame_link
    if link not in _LINKS:
        scan.counters[_R_LINK] += 1
        return
    at, ethertype = _link_header(buf, s.frame, s.frame_end, link)
    at, ethertype = _skip_tags(buf, at, s.frame_end, ethertype)
    if ethertype == _IPV4:
        start, end, protocol = _ipv4_header(buf, at, s.frame_end)
        mapped = np.uint64(_MAPPED_IPV4)
        addresses = np.uint64(0), mapped | np.uint64(be32(buf, at + 12)), np.uint64(0), mapped | np.uint64(be32(buf, at + 16))
    elif ethertype == _IPV6:
        start, end, protocol = _ipv6_header(buf, at, s.frame_end)
        addresses = be64(buf, at + 8), be64(buf, at + 16), be64(buf, at + 24), be64(buf, at + 32)
    else:
        scan.counters[_R_CUT if ethertype == _SHORT else _R_NOT_IP] += 1
        return
    if protocol == _UDP:
        _take_datagram(buf, scan, start, end, addresses[2], addresses[3], packets)
    elif protocol == _TCP:
        _take_segment(buf, scan, start, end, addresses, segments)
    else:
        scan.counters[-protocol if protocol < 0 else np.int64(_R_PROTOCOL)] += 1


@loop
def index_frames(buf: Any, scan: Any, packets: Any, segments: Any) -> Any:
    """Index a mapped capture from where the scan stands; stops at the end, or when `packets` or `segments` is full.

    An empty array takes nothing (its datagrams or segments are only counted). Returns the number of packets and segments taken.
    """
    s = scan.state[0]
    s.packets = s.segments = 0
    while (packets.size == 0 or s.packets < packets.size) and (segments.size == 0 or s.segments < segments.size):
        found = _next_block(buf, scan) if s.is_pcapng else _next_record(buf, s)
        if not found:
            break
        if scan.counters[_R_FRAMES] == 0:
            s.first_ns = s.ts_ns
        scan.counters[_R_FRAMES] += 1
        for i in range(_AHEAD_LINES):
            prefetch(buf, s.frame_end + _AHEAD_BYTES + 64 * i)
        _take_frame(buf, scan, packets, segments)
    return s.packets + s.segments


# ---------------------------------------------------------------- the Python face


class CaptureError(Exception):
    """A file is not a capture that can be read.

    Attributes:
        path: the file.
        offset: where in it.
        found: the bytes there.
    """

    def __init__(self, path: Path, offset: int, found: bytes) -> None:
        super().__init__(
            f"{path}: no pcap or pcapng capture: found {found.hex(' ') or 'nothing'} at byte {offset}; "
            "convert it with `editcap -F pcap IN OUT`, or check that it was fetched completely"
        )
        self.path, self.offset, self.found = path, offset, found


@dataclass(frozen=True)
class CaptureStatistics:
    """What a scan met.

    Attributes:
        frames: frames in the file.
        datagrams, datagram_bytes: UDP datagrams taken and their payload.
        segments: TCP segments.
        skipped: frames or blocks not taken, by reason (lower-case names of :class:`Reason`), without zeros.
        first_ns, last_ns: times of the first and last frame.
        problem: why the scan stopped early, else NONE; `problem_offset` says where.
    """

    frames: int
    datagrams: int
    datagram_bytes: int
    segments: int
    skipped: dict[str, int]
    first_ns: int
    last_ns: int
    problem: CaptureProblem
    problem_offset: int


class Capture:
    """A capture in memory; made by :func:`read_capture`. `buffer` is the whole file and SLACK bytes more."""

    def __init__(self, path: Path, buffer: Bytes) -> None:
        self.path, self.buffer = path, buffer
        self._first_state = _read_header(path, buffer)
        self._statistics: CaptureStatistics | None = None

    def packets(self, lines: Lines | None = None) -> tuple[Bytes, Packets]:
        """All datagrams: ``(buffer, PACKET array)`` in file order.

        Args:
            lines: destination ``(address, port)`` → line number (0 = A, 1 = B, …); others are counted and left out.
                Without it all datagrams are taken, as line 0.

        Raises:
            ValueError: an address is not one, or a port or line is out of range.
        """
        batches = list(self.batches(lines))
        return self.buffer, np.concatenate(batches) if batches else np.zeros(0, PACKET)

    def batches(self, lines: Lines | None = None, size: int = 1 << 16) -> Iterator[Packets]:
        """The same in PACKET arrays of at most `size`, so that a capture larger than memory can be replayed."""
        scan = self._scan(lines)
        none = np.zeros(0, SEGMENT)
        while True:
            packets = np.zeros(size, PACKET)
            count = int(index_frames(self.buffer, scan, packets, none))
            if count:
                yield packets[:count]
            if count < size:
                break
        self._statistics = _statistics(scan)

    def destinations(self) -> dict[tuple[str, int], int]:
        """How many datagrams went to each IPv4 ``(address, port)``: shows which lines a capture holds."""
        found: dict[tuple[str, int], int] = {}
        for packets in self.batches():
            packets = packets[packets["flags"] & PacketFlag.IPV6 == 0]
            keys, counts = np.unique(packets["address"].astype(np.uint64) << np.uint64(16) | packets["port"], return_counts=True)
            for key, count in zip(keys.tolist(), counts.tolist()):
                destination = str(ipaddress.IPv4Address(key >> 16)), key & 0xFFFF
                found[destination] = found.get(destination, 0) + count
        return found

    def tcp_streams(self) -> list[TcpStream]:
        """Every direction of every TCP connection, by the order of their first segments."""
        scan, none = self._scan(None), np.zeros(0, PACKET)
        size = 1 << 16
        pieces = []
        while True:
            segments = np.zeros(size, SEGMENT)
            count = int(index_frames(self.buffer, scan, none, segments))
            pieces.append(segments[:count])
            if count < size:
                break
        self._statistics = _statistics(scan)
        return order_streams(self.buffer, np.concatenate(pieces), lambda flow: _flow_ends(scan.flows[flow]))

    @property
    def statistics(self) -> CaptureStatistics:
        """What the last scan met (by :meth:`packets`, :meth:`batches` run to its end, or :meth:`tcp_streams`); scans if there was none."""
        if self._statistics is None:
            scan = self._scan(None)
            index_frames(self.buffer, scan, np.zeros(0, PACKET), np.zeros(0, SEGMENT))
            self._statistics = _statistics(scan)
        return self._statistics

    def _scan(self, lines: Lines | None) -> _Scan:
        flows = np.zeros(_FLOW_SLOTS, _FLOW)
        counters = np.zeros(len(Reason), np.int64)
        return _Scan(self._first_state.copy(), np.zeros(_INTERFACES_MAX, _INTERFACE), line_table(lines), flows, counters)


def read_capture(path: str | os.PathLike[str], *, limit_bytes: int = LIMIT_BYTES, problems: list[Problem] | None = None) -> Capture:
    """Open a pcap or pcapng file, which may be compressed (see :func:`tickmesh.transports.recording.read_bytes`).

    Raises:
        CaptureError: it is neither.
        RecordingError: the archive it is in cannot be read.
        OSError: it cannot be opened.
    """
    return Capture(Path(path), read_bytes(path, limit_bytes=limit_bytes, problems=problems))


_PCAP_MAGIC = {0xA1B2C3D4: (1000, 16), 0xA1B23C4D: (1, 16), 0xA1B2CD34: (1000, 24)}


def _read_header(path: Path, buffer: Bytes) -> Packets:
    """State of a scan that starts at the first frame."""
    state = np.zeros(1, _STATE)
    start, size = buffer[:24].tobytes(), buffer.size - SLACK
    state["end"] = size
    if size >= 12 and start[:4] == b"\x0a\x0d\x0d\x0a" and start[8:12] in (b"\x1a\x2b\x3c\x4d", b"\x4d\x3c\x2b\x1a"):
        state["is_pcapng"] = 1
        return state
    for order in "<>":
        (magic,) = struct.unpack_from(order + "I", start)
        if magic in _PCAP_MAGIC and size >= 24:
            state["big_endian"], state["position"] = order == ">", 24
            state["fraction_ns"], state["record_header"] = _PCAP_MAGIC[magic]
            state["frame_link"] = struct.unpack_from(order + "I", start, 20)[0] & 0xFFFF
            return state
    raise CaptureError(path, 0, start[: min(size, 12)])


def line_table(lines: Lines | None) -> Packets:
    """The compiled loop's table of destinations: open addressing, at most a quarter full; empty for None.

    Raises:
        ValueError: an address is not one, or a port or line is out of range.
    """
    if lines is None:
        return np.zeros(0, _LINE)
    table = np.zeros(1 << max(2, (4 * len(lines) - 1).bit_length()), _LINE)
    for (address, port), line in lines.items():
        if not 0 < port < 65536 or not 0 <= line < 256:
            raise ValueError(f"{address}:{port} as line {line}: a port is 1 to 65535, a line 0 to 255")
        high, low = _address_words(address)
        slot = (((high ^ low ^ port << 40) * _HASH & (1 << 64) - 1) >> 32) & table.size - 1
        while table[slot]["used"]:
            slot = (slot + 1) % table.size
        table[slot] = (high, low, port, line, 1, 0)
    return table


def _address_words(address: str) -> tuple[int, int]:
    parsed = ipaddress.ip_address(address)
    value = int(parsed) if parsed.version == 6 else _MAPPED_IPV4 | int(parsed)
    return value >> 64, value & (1 << 64) - 1


def _flow_ends(flow: Any) -> Endpoints:
    return tuple(  # type: ignore[return-value]
        (_address_text(int(flow[f"{end}_high"]), int(flow[f"{end}_low"])), int(flow[f"{end}_port"])) for end in ("source", "target")
    )


def _address_text(high: int, low: int) -> str:
    mapped = high == 0 and low >> 32 == 0xFFFF
    return str(ipaddress.IPv4Address(low & 0xFFFFFFFF) if mapped else ipaddress.IPv6Address(high << 64 | low))


def _statistics(scan: _Scan) -> CaptureStatistics:
    state, counters = scan.state[0], scan.counters
    return CaptureStatistics(
        frames=int(counters[Reason.FRAMES]),
        datagrams=int(counters[Reason.DATAGRAMS]),
        datagram_bytes=int(counters[Reason.DATAGRAM_BYTES]),
        segments=int(counters[Reason.SEGMENTS]),
        skipped={r.name.lower(): int(counters[r]) for r in Reason if r not in _TAKEN and counters[r]},
        first_ns=int(state["first_ns"]),
        last_ns=int(state["ts_ns"]),
        problem=CaptureProblem(int(state["problem"])),
        problem_offset=int(state["problem_offset"]),
    )


# ---------------------------------------------------------------- writing


class Datagram(NamedTuple):
    """One UDP datagram to write: time in ns, destination, payload."""

    ts_ns: int
    address: str
    port: int
    payload: bytes


def datagrams(buffer: Bytes, packets: Packets) -> Iterator[Datagram]:
    """The datagrams of PACKET records (IPv4 destinations) in a buffer."""
    for packet in packets:
        start = int(packet["offset"])
        payload = buffer[start : start + int(packet["length"])].tobytes()
        yield Datagram(int(packet["ts_recv"]), str(ipaddress.IPv4Address(int(packet["address"]))), int(packet["port"]), payload)


_DATAGRAM_BYTES_MAX = 65507


def write_pcap(
    path: str | os.PathLike[str], datagrams: Iterable[tuple[int, str, int, bytes]], *, source: tuple[str, int] = ("192.0.2.1", 30001)
) -> int:
    """Write UDP datagrams (IPv4) as a pcap file with nanosecond times, Ethernet framed, checksums set; returns how many.

    Args:
        path: file to write.
        datagrams: :class:`Datagram`, or plain ``(ts_ns, address, port, payload)``.
        source: sender's address and port.

    Raises:
        ValueError: a payload over 65,507 bytes, or an address that is not IPv4.
    """
    count = 0
    source_bytes = ipaddress.IPv4Address(source[0]).packed
    with open(path, "wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, _FRAME_BYTES_MAX, _ETHERNET))
        for ts_ns, address, port, payload in datagrams:
            frame = _ethernet_frame(source_bytes, source[1], ipaddress.IPv4Address(address), port, payload)
            file.write(struct.pack("<IIII", *divmod(ts_ns, 1_000_000_000), len(frame), len(frame)) + frame)
            count += 1
    return count


def _ethernet_frame(source: bytes, source_port: int, target: ipaddress.IPv4Address, port: int, payload: bytes) -> bytes:
    if len(payload) > _DATAGRAM_BYTES_MAX:
        raise ValueError(f"a payload of {len(payload)} bytes does not fit in a UDP datagram (at most {_DATAGRAM_BYTES_MAX})")
    group = target.packed
    mac = bytes((0x01, 0x00, 0x5E, group[1] & 0x7F, group[2], group[3])) if target.is_multicast else b"\x02\x00" + group
    length = 8 + len(payload)
    udp = struct.pack(">HHHH", source_port, port, length, 0) + payload
    checksum = _checksum(source + group + struct.pack(">HH", _UDP, length) + udp) or 0xFFFF
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + length, 0, 0x4000, 16, _UDP, 0, source, group)
    ip = ip[:10] + struct.pack(">H", _checksum(ip)) + ip[12:]
    return mac + b"\x02\x00" + source + b"\x08\x00" + ip + udp[:6] + struct.pack(">H", checksum) + payload


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    total = int(np.frombuffer(data + b"\0" * (len(data) & 1), ">u2").sum(dtype=np.uint64))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
