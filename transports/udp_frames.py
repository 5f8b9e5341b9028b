"""IPv4 and UDP headers, checked in compiled code, for receive paths that hand out frames as they came: AF_XDP and packet rings.

What the kernel does for a socket is done here: lengths, fragments, checksums, which group and sender a datagram belongs to. A frame
that is not taken is counted by reason. Sources: RFC 791, RFC 768, RFC 1071.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tickmesh.transports.toolbox import be16, be32, inlined, le64, outlined

GROUP = np.dtype([("address", "<u4"), ("sender", "<u4"), ("port", "<u2"), ("line", "u1"), ("_pad", "u1")])
"""One wanted destination; `sender` 0: any."""
FRAME_COUNTS = np.dtype(
    [
        (name, "<i8")
        for name in ("datagrams", "bytes", "truncated", "fragments", "tagged", "bad_checksum", "not_wanted", "wakeups")
    ]
)  # fmt: skip
"""What a path counts (array of one); the fields are those of :class:`FrameCounters`, and `wakeups` of the kernel."""
HEADERS_BYTES = 28
"""IPv4 without options, and UDP."""
_UDP, _MORE_OR_OFFSET = 17, 0x3FFF
_LOW32, _S32, _S16, _FFFF = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(16), np.uint64(0xFFFF)

CHECK, CHECKED = 0, 1
"""Whether a datagram's checksum is still to be verified."""


class FrameCounters(NamedTuple):
    """What a path took and what it did not.

    `datagrams` were delivered, with `bytes` of payload. Not delivered: `truncated` (shorter than its headers say), `fragments` of larger
    datagrams, `tagged` (of a VLAN), `bad_checksum` of IP header or datagram, `not_wanted` (another group, port, sender or protocol).
    """

    datagrams: int
    bytes: int
    truncated: int
    fragments: int
    tagged: int
    bad_checksum: int
    not_wanted: int


class Wanted(NamedTuple):
    """A group that a line receives: `address`, `port`, the one allowed `sender` or None."""

    address: str
    port: int
    sender: str | None
    line: int


def make_groups(wanted: Sequence[Wanted]) -> npt.NDArray[np.void]:
    """GROUP array."""
    groups = np.zeros(len(wanted), GROUP)
    for group, one in zip(groups, wanted):
        group["address"], group["port"], group["line"] = int(ipaddress.IPv4Address(one.address)), one.port, one.line
        group["sender"] = int(ipaddress.IPv4Address(one.sender)) if one.sender else 0
    return groups


# ---------------------------------------------------------------- checksums


@inlined
def _folded(total: Any) -> Any:
    """A sum of little-endian words as 16 bits, by end-around carry; u64."""
    total = (total & _LOW32) + (total >> _S32)
    total = (total & _LOW32) + (total >> _S32)
    total = (total & _FFFF) + (total >> _S16)
    total = (total & _FFFF) + (total >> _S16)
    return (total & _FFFF) + (total >> _S16)


@inlined
def _sum(buffer: Any, at: Any, length: Any) -> Any:
    """Ones' complement sum of bytes as little-endian 16-bit words (byte order does not matter to it, RFC 1071), not folded; u64."""
    total, words = np.uint64(0), length >> 3
    for i in range(words):
        word = le64(buffer, at + 8 * i)
        total += (word & _LOW32) + (word >> _S32)
    rest = length & 7
    if rest != 0:
        word = np.uint64(0)
        for i in range(rest):
            word |= np.uint64(buffer[np.uint64(at + 8 * words + i)]) << np.uint64(8 * i)
        total += (word & _LOW32) + (word >> _S32)
    return total


@inlined
def _swapped(value: Any) -> Any:
    return np.uint64((value & 0xFF) << 8 | value >> 8 & 0xFF)


@outlined
def datagram_checksum_holds(buffer: Any, ip: Any, udp: Any, length: Any) -> Any:
    """Whether a UDP checksum holds, is not used (0), or is left to hardware that has not seen it.

    The last is a datagram of this host over a virtual link: its checksum is the pseudo header's sum alone (Linux CHECKSUM_PARTIAL).
    """
    stored = np.uint64(be16(buffer, udp + 6))
    if stored == np.uint64(0):
        return True
    pseudo = _sum(buffer, ip + 12, np.int64(8)) + _swapped(np.int64(_UDP)) + _swapped(np.int64(length))
    if _folded(pseudo) == _swapped(np.int64(stored)):
        return True
    return _folded(pseudo + _sum(buffer, udp, np.int64(length))) == _FFFF


# ---------------------------------------------------------------- frames


@inlined
def find_group(groups: Any, address: Any, port: Any, sender: Any) -> Any:
    """Index of the group of a destination that this sender may send to, -1 if it is not wanted. Lines may differ by sender alone."""
    for i in range(groups.size):
        if groups[i].address == address and groups[i].port == port and (groups[i].sender == 0 or groups[i].sender == sender):
            return np.int64(i)
    return np.int64(-1)


@inlined
def read_datagram(counts: Any, groups: Any, buffer: Any, ip: Any, size: Any, checked: Any, packet: Any) -> Any:
    """Read the datagram whose IPv4 header is at ``buffer[ip]`` into a PACKET; 1 if it is one to take, else 0, counted by reason.

    Args:
        counts: FRAME_COUNTS record.
        groups: GROUP array, what is wanted.
        buffer: u8; `size` bytes from `ip` on were captured.
        checked: CHECKED if somebody has verified the checksum.
        packet: PACKET record; `ts_recv` is left to the caller.
    """
    if size < HEADERS_BYTES:
        counts.truncated += 1
        return 0
    header, total = (np.int64(buffer[np.uint64(ip)]) & 15) * 4, np.int64(be16(buffer, ip + 2))
    if np.int64(buffer[np.uint64(ip)]) >> 4 != 4 or header < 20 or buffer[np.uint64(ip + 9)] != _UDP:
        counts.not_wanted += 1
        return 0
    if total > size or total < header + 8:
        counts.truncated += 1
        return 0
    if be16(buffer, ip + 6) & _MORE_OR_OFFSET != 0:
        counts.fragments += 1
        return 0
    udp, address = ip + header, be32(buffer, ip + 16)
    port, length = be16(buffer, udp + 2), np.int64(be16(buffer, udp + 4))
    found = find_group(groups, address, port, be32(buffer, ip + 12))
    if found < 0:
        counts.not_wanted += 1
        return 0
    if length < 8 or length > total - header:
        counts.truncated += 1
        return 0
    if _folded(_sum(buffer, ip, header)) != _FFFF or (checked == CHECK and not datagram_checksum_holds(buffer, ip, udp, length)):
        counts.bad_checksum += 1
        return 0
    packet.offset, packet.length = np.uint64(udp + 8), np.uint32(length - 8)
    packet.address, packet.port, packet.line, packet.flags = address, port, groups[found].line, np.uint8(0)
    counts.datagrams += 1
    counts.bytes += length - 8
    return 1
