"""Captures: the compiled scan against a slow reading of the same bytes, damaged files, TCP order, and real captures."""

from __future__ import annotations

import gzip
import ipaddress
import os
import random
import struct
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounds import with_bounds_checks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tickmesh.transports.capture import (
    PACKET,
    Capture,
    CaptureError,
    CaptureProblem,
    Datagram,
    PacketFlag,
    datagrams,
    read_capture,
    write_pcap,
)
from tickmesh.transports.recording import SLACK
from tickmesh.transports.tcp_stream import TcpStream

DATA = Path(os.environ.get("TICKMESH_DATA", Path(__file__).parents[2] / "shared" / "data"))
LINES = {("239.1.1.1", 26400): 0, ("239.1.1.2", 26400): 1, ("ff02::7", 5000): 2}
T0 = 1_700_000_000_123_456_789

# ---------------------------------------------------------------- making files


def udp_packet(target: str, port: int, payload: bytes) -> bytes:
    return struct.pack(">HHHH", 4000, port, 8 + len(payload), 0) + payload


def tcp_packet(seq: int, payload: bytes, flags: int = 0x10, ports: tuple[int, int] = (5001, 5002)) -> bytes:
    return struct.pack(">HHIIBBHHH", *ports, seq & 0xFFFFFFFF, 0, 0x50, flags, 1000, 0, 0) + payload


def ip_packet(target: str, protocol: int, body: bytes, source: str = "10.0.0.9", options: bytes = b"", fragment: int = 0) -> bytes:
    to = ipaddress.ip_address(target)
    if to.version == 6:
        header = struct.pack(">IHBB", 0x60000000, len(options) + len(body), 0 if options else protocol, 9)
        return header + ipaddress.IPv6Address("fe80::1").packed + to.packed + options + body
    size = 20 + len(options)
    header = struct.pack(">BBHHHBBH", 0x40 | size // 4, 0, size + len(body), 7, fragment, 9, protocol, 0)
    return header + ipaddress.IPv4Address(source).packed + to.packed + options + body


def link_frame(link: int, packet: bytes, tags: int = 0, ethertype: int | None = None) -> bytes:
    kind = ethertype if ethertype is not None else 0x86DD if packet[:1] and packet[0] >> 4 == 6 else 0x0800
    tail = kind.to_bytes(2, "big")
    for depth in range(tags):  # 802.1Q inside, 802.1ad around it
        tail = (b"\x88\xa8" if depth else b"\x81\x00") + b"\x00\x05" + tail
    if link == 1:
        return bytes(12) + tail + packet
    if link == 113:
        return bytes(14) + tail + packet
    if link == 276:
        return tail[:2] + bytes(18) + tail[2:] + packet
    return (b"\x02\x00\x00\x00" if link in (0, 108) else b"") + packet


def pcap_file(frames: list[tuple[int, bytes]], link: int = 1, order: str = "<", magic: int = 0xA1B23C4D) -> bytes:
    out = struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 65535, link)
    unit = 1 if magic == 0xA1B23C4D else 1000
    extra = bytes(8) if magic == 0xA1B2CD34 else b""
    for ts_ns, frame in frames:
        out += struct.pack(order + "IIII", ts_ns // 10**9, ts_ns % 10**9 // unit, len(frame), len(frame)) + extra + frame
    return out


def block(order: str, kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    length = struct.pack(order + "I", 12 + len(body))
    return struct.pack(order + "I", kind) + length + body + length


def section(order: str) -> bytes:
    return block(order, 0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1))


def interface(order: str, link: int, resolution: int | None = None, offset_s: int | None = None) -> bytes:
    options = b""
    if resolution is not None:
        options += struct.pack(order + "HHB3x", 9, 1, resolution)
    if offset_s is not None:
        options += struct.pack(order + "HHq", 14, 8, offset_s)
    return block(order, 1, struct.pack(order + "HHI", link, 0, 0) + options + (bytes(4) if options else b""))


def enhanced(order: str, number: int, ticks: int, frame: bytes) -> bytes:
    return block(order, 6, struct.pack(order + "IIIII", number, ticks >> 32, ticks & 0xFFFFFFFF, len(frame), len(frame)) + frame)


def opened(data: bytes, slack: int = 0) -> Capture:
    return Capture(Path("made.pcap"), np.frombuffer(bytearray(data + bytes([slack]) * SLACK), np.uint8))


# ---------------------------------------------------------------- the slow twin


class Cut(Exception):
    """A frame that is not taken; the reason."""


Taken = list[tuple[int, int, int, str, int, int]]  # offset, length, ts, destination, port, line


def twin_frames(data: bytes, reasons: Counter[str]) -> Any:
    """(link, offset, frame, ts) of each frame; the generator returns the problem."""
    if data[:4] == b"\n\r\r\n":
        return (yield from twin_blocks(data, reasons))
    order = "<" if struct.unpack_from("<I", data)[0] in (0xA1B2C3D4, 0xA1B23C4D, 0xA1B2CD34) else ">"
    magic, link = struct.unpack_from(order + "I16xI", data)
    unit, header = (1 if magic == 0xA1B23C4D else 1000), (24 if magic == 0xA1B2CD34 else 16)
    at = 24
    while at < len(data):
        if len(data) - at < header:
            return "TRUNCATED", at
        seconds, fraction, captured = struct.unpack_from(order + "III", data, at)
        if captured > 1 << 18:
            return "BAD_LENGTH", at
        if captured > len(data) - at - header:
            return "TRUNCATED", at
        at += header
        yield link & 0xFFFF, at, data[at : at + captured], seconds * 10**9 + fraction * unit
        at += captured
    return "NONE", 0


def twin_options(order: str, body: bytes) -> tuple[int, int]:
    resolution, offset_s = 6, 0
    while len(body) >= 4:
        code, length = struct.unpack_from(order + "HH", body)
        if code == 0 or length > len(body) - 4:
            break
        if code == 9 and length == 1:
            resolution = body[4]
        elif code == 14 and length == 8:
            offset_s = struct.unpack_from(order + "q", body, 4)[0]
        body = body[4 + (length + 3) // 4 * 4 :]
    return resolution, offset_s


def twin_time(ticks: int, resolution: int, offset_s: int) -> int:
    exponent = resolution & 127
    if resolution & 128 and exponent < 64:
        seconds, fraction = ticks >> exponent, ticks & ((1 << exponent) - 1)
        if exponent > 32:
            fraction, exponent = fraction >> (exponent - 32), 32
        ns = seconds * 10**9 + (fraction * 10**9 >> exponent)
    elif resolution & 128 or exponent > 19:
        ns = ticks * 1000 & (1 << 64) - 1
    else:
        ns = (ticks * 10 ** max(0, 9 - exponent) & (1 << 64) - 1) // 10 ** max(0, exponent - 9)
    ns = (ns + offset_s * 10**9) & (1 << 64) - 1
    return ns - (1 << 64) if ns >> 63 else ns


def twin_blocks(data: bytes, reasons: Counter[str]) -> Any:
    at, order, interfaces, last = 0, "<", [], 0
    while at < len(data):
        if len(data) - at < 12:
            return "TRUNCATED", at
        kind = struct.unpack_from(order + "I", data, at)[0]
        if kind == 0x0A0D0D0A:
            mark = data[at + 8 : at + 12]
            if mark not in (b"\x4d\x3c\x2b\x1a", b"\x1a\x2b\x3c\x4d"):
                return "BAD_SECTION", at
            order, interfaces = "<" if mark[0] == 0x4D else ">", []
        length = struct.unpack_from(order + "I", data, at + 4)[0]
        if length < 12 or length % 4:
            return "BAD_LENGTH", at
        if length > len(data) - at:
            return "TRUNCATED", at
        if struct.unpack_from(order + "I", data, at + length - 4)[0] != length:
            return "BAD_LENGTH", at
        body, start = data[at + 8 : at + length - 4], at + 8
        at += length
        if kind == 1:
            if len(body) < 8 or len(interfaces) >= 256:
                reasons["bad_block"] += 1
                continue
            link, snaplen = struct.unpack_from(order + "H2xI", body)
            interfaces.append((link, snaplen, *twin_options(order, body[8:])))
        elif kind in (2, 3, 6):
            size = 4 if kind == 3 else 20
            if len(body) < size:
                reasons["bad_block"] += 1
                continue
            number = 0 if kind == 3 else struct.unpack_from(order + ("I" if kind == 6 else "H"), body)[0]
            if number >= len(interfaces):
                reasons["unknown_interface"] += 1
                continue
            link, snaplen, resolution, offset_s = interfaces[number]
            if kind == 3:
                captured = min(struct.unpack_from(order + "I", body)[0], len(body) - 4, snaplen or 1 << 40)
            else:
                high, low, captured = struct.unpack_from(order + "III", body, 4)
                last = twin_time(high << 32 | low, resolution, offset_s)
            if captured > len(body) - size:
                reasons["bad_block"] += 1
                continue
            yield link, start + size, body[size : size + captured], last
        elif kind != 0x0A0D0D0A:
            reasons["other_block"] += 1
    return "NONE", 0


def twin_network(link: int, frame: bytes) -> tuple[int, int]:
    """(start of the network header, ethertype)."""
    header = {1: 14, 113: 16, 276: 20, 0: 4, 108: 4, 101: 0, 12: 0, 14: 0, 228: 0, 229: 0}.get(link)
    if header is None:
        raise Cut("unknown_link")
    typed = link in (1, 113, 276)
    if len(frame) < header + (not typed):
        raise Cut("cut")
    if not typed:
        return header, {4: 0x0800, 6: 0x86DD}.get(frame[header] >> 4, 0)
    at = 0 if link == 276 else header - 2
    kind = int.from_bytes(frame[at : at + 2], "big")
    for _ in range(4):
        if kind not in (0x8100, 0x88A8, 0x9100):
            break
        if len(frame) - header < 4:
            raise Cut("cut")
        kind = int.from_bytes(frame[header + 2 : header + 4], "big")
        header += 4
    return header, kind


def twin_ip(frame: bytes, at: int, ethertype: int) -> tuple[int, int, int, str]:
    """(start of the payload, its end, protocol, destination)."""
    left = len(frame) - at
    if ethertype == 0x0800:
        if left < 20:
            raise Cut("cut")
        header, total = (frame[at] & 15) * 4, int.from_bytes(frame[at + 2 : at + 4], "big") or left
        if frame[at] >> 4 != 4 or header < 20 or total < header:
            raise Cut("malformed")
        if int.from_bytes(frame[at + 6 : at + 8], "big") & 0x3FFF:
            raise Cut("fragment")
        if total > left:
            raise Cut("cut")
        return at + header, at + total, frame[at + 9], str(ipaddress.IPv4Address(frame[at + 16 : at + 20]))
    if ethertype != 0x86DD:
        raise Cut("not_ip")
    if left < 40:
        raise Cut("cut")
    if frame[at] >> 4 != 6:
        raise Cut("malformed")
    payload, protocol = int.from_bytes(frame[at + 4 : at + 6], "big"), frame[at + 6]
    if payload > left - 40:
        raise Cut("cut")
    end, target = (at + 40 + payload if payload else len(frame)), str(ipaddress.IPv6Address(frame[at + 24 : at + 40]))
    at += 40
    for _ in range(8):
        if protocol not in (0, 43, 60):
            break
        if end - at < 8 or (frame[at + 1] + 1) * 8 > end - at:
            raise Cut("malformed")
        protocol, at = frame[at], at + (frame[at + 1] + 1) * 8
    if protocol == 44:
        raise Cut("fragment")
    return at, end, protocol, target


def twin_datagram(link: int, frame: bytes, lines: dict[tuple[str, int], int] | None) -> tuple[int, int, str, int, int] | None:
    """(start, length, destination, port, line); None for a TCP segment."""
    start, end, protocol, target = twin_ip(frame, *twin_network(link, frame))
    if protocol == 6:
        header = frame[start + 12] >> 4 if end - start >= 20 else 0
        if header < 5 or header * 4 > end - start:
            raise Cut("malformed")
        return None
    if protocol != 17:
        raise Cut("other_protocol")
    if end - start < 8:
        raise Cut("malformed")
    port, length = struct.unpack_from(">HH", frame, start + 2)
    length = length or end - start
    if length < 8 or length > end - start:
        raise Cut("malformed")
    if lines is None:
        return start + 8, length - 8, target, port, 0
    if (target, port) not in lines:
        raise Cut("other_destination")
    return start + 8, length - 8, target, port, lines[target, port]


def twin(data: bytes, lines: dict[tuple[str, int], int] | None) -> tuple[Taken, dict[str, int], tuple[str, int]]:
    reasons: Counter[str] = Counter()
    taken: Taken = []
    frames = twin_frames(data, reasons)
    while True:
        try:
            link, offset, frame, ts_ns = next(frames)
        except StopIteration as done:
            return taken, dict(reasons), done.value
        try:
            found = twin_datagram(link, frame, lines)
        except Cut as cut:
            reasons[str(cut)] += 1
            continue
        if found:
            start, length, target, port, line = found
            taken.append((offset + start, length, ts_ns, target, port, line))


def compiled(capture: Capture, lines: dict[tuple[str, int], int] | None) -> tuple[list[tuple[int, ...]], dict[str, int], tuple[str, int]]:
    _, packets = capture.packets(lines)
    s = capture.statistics
    names = ("offset", "length", "ts_recv", "address", "port", "line")
    return [tuple(int(p[n]) for n in names) for p in packets], s.skipped, (s.problem.name, s.problem_offset)


def last_four(address: str) -> int:
    return int(ipaddress.ip_address(address)) & 0xFFFFFFFF


def assert_same(data: bytes, lines: dict[tuple[str, int], int] | None = LINES) -> None:
    taken, reasons, problem = twin(data, lines)
    expected = [(offset, length, ts_ns, last_four(target), port, line) for offset, length, ts_ns, target, port, line in taken]
    for slack in (0, 0xFF):  # what lies behind the file must not matter
        assert compiled(opened(data, slack), lines) == (expected, reasons, problem)


# ---------------------------------------------------------------- properties

targets = st.sampled_from([("239.1.1.1", 26400), ("239.1.1.2", 26400), ("239.1.1.1", 26401), ("10.1.1.1", 26400), ("ff02::7", 5000)])


@st.composite
def network_packets(draw: st.DrawFn) -> bytes:
    (address, port), payload = draw(targets), draw(st.binary(max_size=40))
    protocol = draw(st.sampled_from([17, 17, 17, 6, 2]))
    body = udp_packet(address, port, payload) if protocol == 17 else tcp_packet(draw(st.integers(0, 2**32 - 1)), payload)
    options = draw(st.sampled_from([b"", b"\x01\x01\x01\x00", bytes(8)]))
    if ":" in address and options:
        options = bytes([protocol, 0]) + bytes(6)
    return ip_packet(address, protocol, body, options=options, fragment=draw(st.sampled_from([0, 0, 0x4000, 0x2000, 5])))


@st.composite
def frames_of(draw: st.DrawFn, link: int) -> bytes:
    frame = link_frame(link, draw(network_packets()), draw(st.integers(0, 5)), draw(st.sampled_from([None, None, None, 0x0806])))
    frame += bytes(draw(st.integers(0, 6)))  # Ethernet padding is not payload
    if draw(st.integers(0, 4)) == 0:
        frame = frame[: draw(st.integers(0, len(frame)))]
    return frame


LINKS = st.sampled_from([1, 1, 113, 276, 101, 0, 108, 228, 147])
TIMES = st.integers(0, 4_000_000_000 * 10**9)


@st.composite
def pcap_files(draw: st.DrawFn) -> bytes:
    link = draw(LINKS)
    frames = draw(st.lists(st.tuples(TIMES, frames_of(link)), max_size=5))
    return pcap_file(frames, link, draw(st.sampled_from("<>")), draw(st.sampled_from([0xA1B2C3D4, 0xA1B23C4D, 0xA1B2CD34])))


@st.composite
def pcapng_files(draw: st.DrawFn) -> bytes:
    out = b""
    for _ in range(draw(st.integers(1, 2))):
        order = draw(st.sampled_from("<>"))
        out += section(order)
        links = draw(st.lists(LINKS, max_size=3))
        for link in links:
            resolution = draw(st.sampled_from([None, 0, 3, 6, 9, 12, 19, 40, 0x80 | 10, 0x80 | 32, 0x80 | 40, 0xFF]))
            out += interface(order, link, resolution, draw(st.sampled_from([None, 0, 3600, -7])))
        for _ in range(draw(st.integers(0, 5))):
            number = draw(st.integers(0, 3))
            frame = draw(frames_of(links[number] if number < len(links) else 1))
            kind = draw(st.sampled_from([6, 6, 6, 3, 2, 5, 0xBAD]))
            ticks = draw(st.integers(0, 2**64 - 1))
            if kind == 6:
                out += enhanced(order, number, ticks, frame)
            elif kind == 2:
                head = struct.pack(order + "HHIIII", number, 0, ticks >> 32, ticks & 0xFFFFFFFF, len(frame), len(frame))
                out += block(order, 2, head + frame)
            elif kind == 3:
                out += block(order, 3, struct.pack(order + "I", len(frame)) + frame)
            else:
                out += block(order, kind, draw(st.binary(max_size=9)))
    return out


captures = st.one_of(pcap_files(), pcapng_files())
quick = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@quick
@given(captures, st.sampled_from([LINES, None]))
def test_the_scan_reads_what_the_slow_twin_reads(data: bytes, lines: dict[tuple[str, int], int] | None) -> None:
    assert_same(data, lines)


@quick
@given(captures, st.data())
def test_damaged_files_are_read_alike_and_to_the_same_byte(data: bytes, choose: st.DataObject) -> None:
    damaged = bytearray(data)
    start = 24 if data[:4] != b"\n\r\r\n" else 12
    for _ in range(choose.draw(st.integers(1, 4))):
        at = choose.draw(st.integers(start, max(start, len(damaged) - 1)))
        if at < len(damaged):
            damaged[at] = choose.draw(st.integers(0, 255))
    assert_same(bytes(damaged[: choose.draw(st.integers(start, len(damaged)))]))


def test_every_kind_of_header_leads_to_the_datagram() -> None:
    for link in (1, 113, 276, 101, 0, 108):
        for tags in (0, 1, 2) if link in (1, 113, 276) else (0,):
            for address, port in LINES:
                packet = ip_packet(address, 17, udp_packet(address, port, b"payload"))
                capture = opened(pcap_file([(T0, link_frame(link, packet, tags))], link))
                buffer, packets = capture.packets(LINES)
                assert packets.dtype == PACKET
                assert len(packets) == 1
                only = packets[0]
                assert buffer[int(only["offset"]) : int(only["offset"]) + int(only["length"])].tobytes() == b"payload"
                assert (only["ts_recv"], only["line"], only["port"]) == (T0, LINES[address, port], port)
                assert bool(only["flags"] & PacketFlag.IPV6) == (":" in address)


def test_a_simple_block_takes_the_time_of_the_packet_before() -> None:
    frame = link_frame(1, ip_packet("239.1.1.1", 17, udp_packet("239.1.1.1", 26400, b"x")))
    data = section("<") + interface("<", 1, 9) + enhanced("<", 0, T0, frame) + block("<", 3, struct.pack("<I", len(frame)) + frame)
    _, packets = opened(data).packets()
    assert packets["ts_recv"].tolist() == [T0, T0]
    assert packets["flags"].tolist() == [0, PacketFlag.UNTIMED]


def test_batches_are_the_packets_in_pieces() -> None:
    frames = [(T0 + i, link_frame(1, ip_packet("239.1.1.1", 17, udp_packet("239.1.1.1", 26400, bytes([i]))))) for i in range(10)]
    capture = opened(pcap_file(frames))
    pieces = list(capture.batches(LINES, size=4))
    assert [len(piece) for piece in pieces] == [4, 4, 2]
    assert np.concatenate(pieces).tobytes() == capture.packets(LINES)[1].tobytes()
    assert capture.destinations() == {("239.1.1.1", 26400): 10}


def test_statistics_scan_if_nothing_did() -> None:
    frames = [(T0 + i, link_frame(1, ip_packet("239.1.1.1", 17, udp_packet("239.1.1.1", 26400, b"abc")))) for i in range(3)]
    s = opened(pcap_file(frames)).statistics
    assert (s.frames, s.datagrams, s.datagram_bytes, s.segments, s.skipped) == (3, 3, 9, 0, {})
    assert (s.first_ns, s.last_ns, s.problem) == (T0, T0 + 2, CaptureProblem.NONE)


@pytest.mark.parametrize("content", [b"", b"PK", b"not a capture at all, just text", b"\xd4\xc3\xb2\xa1 short", b"\n\r\r\n" + bytes(20)])
def test_another_file_is_refused_with_where_and_what(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(CaptureError, match="no pcap or pcapng") as caught:
        read_capture(path)
    assert (caught.value.path, caught.value.offset, caught.value.found) == (path, 0, content[:12])


@pytest.mark.parametrize(("address", "port", "line"), [("239.1.1", 1, 0), ("239.1.1.1", 0, 0), ("10.0.0.1", 1 << 16, 0), ("::1", 1, 256)])
def test_lines_that_make_no_sense_are_refused(address: str, port: int, line: int) -> None:
    with pytest.raises(ValueError):
        opened(pcap_file([])).packets({(address, port): line})


def test_what_is_written_is_read_back_also_compressed(tmp_path: Path) -> None:
    sent = [Datagram(T0 + i * 1000, f"239.1.1.{1 + i % 2}", 26400, bytes([i]) * (i * 7)) for i in range(50)]
    plain, packed = tmp_path / "a.pcap", tmp_path / "a.pcap.gz"
    assert write_pcap(plain, sent) == 50
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for path in (plain, packed):
        buffer, packets = read_capture(path).packets(LINES)
        assert list(datagrams(buffer, packets)) == sent
        assert packets["line"].tolist() == [i % 2 for i in range(50)]
        assert buffer.size == plain.stat().st_size + SLACK


def test_an_oversize_payload_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="65508"):
        write_pcap(tmp_path / "x", [(T0, "239.1.1.1", 1, bytes(65508))])


# ---------------------------------------------------------------- TCP


def tcp_capture(segments: list[tuple[int, bytes, int]], first_ns: int = 0) -> Capture:
    frames = [(first_ns + i, link_frame(1, ip_packet("10.0.0.1", 6, tcp_packet(*segment)))) for i, segment in enumerate(segments)]
    return opened(pcap_file(frames))


def content(stream: TcpStream) -> bytes:
    return stream.data[: stream.length].tobytes()


def twin_order(segments: list[tuple[int, bytes, int]], base: int) -> tuple[bytes, int]:
    """Bytes and holes when every byte's first copy counts, holes closed up."""
    position: dict[int, int] = {}
    for seq, payload, _ in segments:
        for i, byte in enumerate(payload):
            distance = (seq + i - base) & 0xFFFFFFFF
            if distance < 1 << 31:
                position.setdefault(distance, byte)
    places = sorted(position)
    holes = sum(1 for before, after in zip([-1, *places], places) if after != before + 1)
    return bytes(position[p] for p in places), holes


@quick
@given(st.binary(min_size=1, max_size=200), st.integers(0, 2**32 - 1), st.data())
def test_segments_in_any_order_give_the_bytes(data: bytes, base: int, choose: st.DataObject) -> None:
    cuts = sorted({0, len(data), *choose.draw(st.lists(st.integers(0, len(data)), max_size=8))})
    pieces = [(base + a, data[a:b], 0x10) for a, b in pairwise(cuts)]
    again = choose.draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(1, 50)), max_size=4))
    pieces += [(base + a, data[a : a + n], 0x10) for a, n in again]  # retransmissions, cut differently
    pieces = choose.draw(st.permutations(pieces))
    lost = choose.draw(st.integers(0, 2))
    pieces = pieces[lost:]
    (stream,) = tcp_capture([(base - 1, b"", 0x02), *pieces]).tcp_streams()
    expected, holes = twin_order(pieces, base)
    assert (content(stream), stream.holes) == (expected, holes)
    assert stream.chunks["hole"].sum() == stream.missing_bytes
    assert int(stream.chunks["length"].sum()) == stream.length
    assert (np.diff(stream.chunks["ts_recv"]) >= 0).all()
    ends = np.cumsum(stream.chunks["length"])
    assert stream.chunks["offset"].tolist() == [0, *ends[:-1].tolist()][: len(ends)]


def test_both_directions_and_a_second_connection_on_the_same_ports() -> None:
    def frame(source: str, target: str, ports: tuple[int, int], seq: int, payload: bytes, flags: int) -> tuple[int, bytes]:
        return T0, link_frame(1, ip_packet(target, 6, tcp_packet(seq, payload, flags, ports), source))

    a, b = ("10.0.0.1", "10.0.0.2")
    frames = [
        frame(a, b, (1, 2), 100, b"", 0x02),
        frame(b, a, (2, 1), 900, b"", 0x12),
        frame(a, b, (1, 2), 101, b"hello", 0x10),
        frame(b, a, (2, 1), 901, b"world", 0x10),
        frame(a, b, (1, 2), 106, b"", 0x11),
        frame(a, b, (1, 2), 5000, b"", 0x02),
        frame(a, b, (1, 2), 5000, b"", 0x02),  # the SYN again: not another connection
        frame(a, b, (1, 2), 5001, b"again", 0x10),
    ]
    streams = opened(pcap_file(frames)).tcp_streams()
    assert [(s.source, s.target, content(s), s.syn_seen, s.fin_seen) for s in streams] == [
        ((a, 1), (b, 2), b"hello", True, True),
        ((a, 1), (b, 2), b"again", True, False),
        ((b, 2), (a, 1), b"world", True, False),
    ]


def test_a_hole_is_given_up_when_too_much_waits_behind_it() -> None:
    segments = [(0, b"ab", 0x10)] + [(10 + i, bytes([i % 251]), 0x10) for i in range(1500)]
    (stream,) = tcp_capture(segments).tcp_streams()
    assert (stream.holes, stream.missing_bytes, stream.length) == (1, 8, 1502)
    assert stream.chunks["hole"].tolist()[:2] == [0, 8]
    assert int(stream.chunks["ts_recv"][1]) == 1024  # when the bound was reached, not at the end


# ---------------------------------------------------------------- real captures

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real captures in {DATA}; set TICKMESH_DATA")


@needs_data
def test_every_real_capture_is_read_completely_and_like_the_twin() -> None:
    paths = sorted((DATA / "omi_pcaps").rglob("*.pcap")) + sorted((DATA / "cme_mdp3_v8_AB_small").glob("*.pcap"))
    assert len(paths) > 200
    for path in paths:
        capture = read_capture(path)
        taken, reasons, problem = twin(path.read_bytes(), None)
        found = compiled(capture, None)
        assert found == ([(o, n, t, last_four(a), p, line) for o, n, t, a, p, line in taken], reasons, problem), path
        assert (problem[0], reasons) == ("NONE", {}), path
        streams = capture.tcp_streams()
        assert sum(s.length > 0 for s in streams) or capture.statistics.datagrams, path


@needs_data
def test_the_two_lines_of_a_real_feed_carry_the_same_packets() -> None:
    capture = read_capture(DATA / "cme_mdp3_v8_AB_small" / "MdIncrementalRefreshVolume.pcap")
    groups = sorted(capture.destinations())
    buffer, packets = capture.packets({group: line for line, group in enumerate(groups)})
    assert len(groups) >= 2
    sequences = [
        {buffer[int(p["offset"]) : int(p["offset"]) + 4].tobytes() for p in packets if p["line"] == line} for line in range(len(groups))
    ]
    assert any(a & b for i, a in enumerate(sequences) for b in sequences[i + 1 :])


# ---------------------------------------------------------------- nothing is read out of bounds

_FUZZ = """
import ctypes, mmap, random, sys
import numpy as np
from pathlib import Path
from tickmesh.transports.capture import Capture, CaptureError
seeds, rounds, seed = [bytes.fromhex(x) for x in sys.stdin.read().split()], int(sys.argv[1]), int(sys.argv[2])
rng, size = random.Random(seed), 1 << 16
libc = ctypes.CDLL(None)
memory = mmap.mmap(-1, size + mmap.PAGESIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert libc.mprotect(ctypes.c_void_p(start + size), mmap.PAGESIZE, 0) == 0
for turn in range(rounds):
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((0, 1, 1, 2, 5, 20))):
        data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    data = data[: rng.choice((len(data), rng.randrange(len(data) + 1)))]
    buffer = np.frombuffer(memory, np.uint8, len(data) + 64, size - len(data) - 64)
    buffer[:] = np.frombuffer(bytes(data) + bytes(rng.randrange(256) for _ in range(64)), np.uint8)
    try:
        capture = Capture(Path("fuzz"), buffer)
        for packet in capture.packets(rng.choice((None, {("239.1.1.1", 26400): 0})))[1]:
            assert int(packet["offset"]) + int(packet["length"]) <= len(data), (seed, turn)
        capture.tcp_streams()
    except CaptureError:
        pass
print("survived", rounds)
"""


@pytest.mark.slow
def test_damaged_files_are_never_read_out_of_bounds() -> None:
    """Array bounds are checked, and the page behind the slack cannot be touched: a read past it kills the process."""
    rng = random.Random(7)
    udp = [ip_packet(a, 17, udp_packet(a, p, rng.randbytes(30))) for a, p in LINES]
    tcp = [ip_packet("10.0.0.1", 6, tcp_packet(100 + i * 5, bytes(9))) for i in rng.sample(range(12), 12)]
    seeds = [pcap_file([(T0, link_frame(link, p, 1)) for p in udp + tcp], link) for link in (1, 113, 276, 101, 0)]
    for order in "<>":
        blocks = b"".join(enhanced(order, 0, T0, link_frame(1, p)) + block(order, 3, struct.pack(order + "I", 60) + p) for p in udp + tcp)
        seeds.append(section(order) + interface(order, 1, 9, 5) + blocks)
    done = with_bounds_checks("-c", _FUZZ, "1500", "20240817", stdin=" ".join(data.hex() for data in seeds))
    assert done.stdout.strip() == "survived 1500", f"exit {done.returncode}: {done.stderr[-2000:]}"
