"""Headers read by compiled code, against a slow twin that knows the RFCs only."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.transports.capture import PACKET
from tickmesh.transports.packet_ring import filter_code
from tickmesh.transports.toolbox import loop
from tickmesh.transports.udp_frames import CHECK, FRAME_COUNTS, Wanted, make_groups, read_datagram

WANTED = [
    Wanted("239.1.1.1", 5000, None, 0),
    Wanted("239.1.1.2", 5001, "10.0.0.9", 1),
    Wanted("239.1.1.1", 5002, None, 2),
    Wanted("239.1.1.2", 5001, "10.0.0.7", 3),  # the same group from another sender
]
GROUPS = make_groups(WANTED)
REASONS = ("truncated", "fragments", "bad_checksum", "not_wanted")


@loop
def _read(counts: Any, groups: Any, buffer: Any, ip: Any, size: Any, packet: Any) -> Any:
    return read_datagram(counts[0], groups, buffer, np.int64(ip), np.int64(size), CHECK, packet[0])


def compiled(frame: bytes, at: int) -> tuple[str, bytes, int]:
    """Verdict, payload and line."""
    buffer = np.frombuffer(bytes(at) + frame + bytes(64), np.uint8).copy()
    counts, packet = np.zeros(1, FRAME_COUNTS), np.zeros(1, PACKET)
    taken = _read(counts, GROUPS, buffer, at, len(frame), packet)
    verdicts = [name for name in REASONS if counts[0][name]] or ["taken"]
    assert len(verdicts) == 1
    assert bool(taken) == (verdicts == ["taken"])
    if not taken:
        return verdicts[0], b"", 0
    start = int(packet[0]["offset"])
    assert counts[0]["bytes"] == packet[0]["length"]
    return "taken", buffer[start : start + int(packet[0]["length"])].tobytes(), int(packet[0]["line"])


def folded(data: bytes) -> int:
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def twin(frame: bytes) -> tuple[str, bytes, int]:
    """The same in plain Python."""
    if len(frame) < 28:
        return "truncated", b"", 0
    header, total = (frame[0] & 15) * 4, int.from_bytes(frame[2:4], "big")
    if frame[0] >> 4 != 4 or header < 20 or frame[9] != 17:
        return "not_wanted", b"", 0
    if not header + 8 <= total <= len(frame):
        return "truncated", b"", 0
    if int.from_bytes(frame[6:8], "big") & 0x3FFF:
        return "fragments", b"", 0
    source, target = (".".join(map(str, frame[i : i + 4])) for i in (12, 16))
    udp = frame[header:]
    port, length, stored = (int.from_bytes(udp[i : i + 2], "big") for i in (2, 4, 6))
    found = next((w for w in WANTED if (w.address, w.port) == (target, port) and w.sender in (None, source)), None)
    if found is None:
        return "not_wanted", b"", 0
    if not 8 <= length <= total - header:
        return "truncated", b"", 0
    pseudo = frame[12:20] + struct.pack("!BBH", 0, 17, length)
    holds = stored == 0 or folded(pseudo) == stored or folded(pseudo + udp[:length]) == 0xFFFF
    if folded(frame[:header]) != 0xFFFF or not holds:
        return "bad_checksum", b"", 0
    return "taken", udp[8:length], found.line


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """IPv4 datagrams that are right in most things, so that every check is reached."""
    payload, options = draw(st.binary(max_size=90)), bytes(4 * draw(st.sampled_from((0, 0, 1, 10))))
    wanted = draw(st.sampled_from(WANTED))
    source = draw(st.sampled_from(("10.0.0.9", "10.0.0.8", "10.0.0.7")))
    port = wanted.port + draw(st.sampled_from((0, 0, 0, 1)))
    addresses = bytes(map(int, source.split("."))) + bytes(map(int, wanted.address.split(".")))
    udp = struct.pack("!4H", 1, port, 8 + len(payload), 0) + payload
    pseudo = addresses + struct.pack("!BBH", 0, 17, len(udp))
    style = draw(st.sampled_from(("whole", "whole", "none", "partial")))
    value = {"whole": (folded(pseudo + udp) ^ 0xFFFF) or 0xFFFF, "none": 0, "partial": folded(pseudo)}[style]
    udp = udp[:6] + struct.pack("!H", value) + payload
    header = 20 + len(options)
    ip = struct.pack("!BBHHHBBH", 0x40 | header // 4, 0, header + len(udp), 1, draw(st.sampled_from((0, 0, 0x4000, 0x2000))), 1, 17, 0)
    ip = ip + addresses + options
    ip = ip[:10] + struct.pack("!H", folded(ip) ^ 0xFFFF) + ip[12:]
    frame = bytearray(ip + udp + bytes(draw(st.sampled_from((0, 0, 12)))))
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2)))):
        frame[draw(st.integers(0, len(frame) - 1))] ^= draw(st.integers(1, 255))
    return bytes(frame[: draw(st.integers(0, len(frame)))] if draw(st.integers(0, 5)) == 0 else frame)


@settings(max_examples=400, deadline=None)
@given(frames(), st.integers(0, 9))
def test_a_frame_is_read_as_the_twin_reads_it(frame: bytes, at: int) -> None:
    assert compiled(frame, at) == twin(frame)


def test_lines_may_differ_by_their_sender_alone() -> None:
    for source, line in ((9, 1), (7, 3)):
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 29, 1, 0, 1, 17, 0) + bytes([10, 0, 0, source, 239, 1, 1, 2])
        ip = ip[:10] + struct.pack("!H", folded(ip) ^ 0xFFFF) + ip[12:]
        assert compiled(ip + struct.pack("!4H", 1, 5001, 9, 0) + b"x", 0) == ("taken", b"x", line)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=120))
def test_noise_is_read_as_the_twin_reads_it(frame: bytes) -> None:
    assert compiled(frame, 3) == twin(frame)


# ---------------------------------------------------------------- the packet ring's filter


def passes(code: bytes, packet: bytes) -> bool:
    """A slow classic BPF machine: only the instructions that the filter uses."""
    at, accumulator, index = 0, 0, 0
    while True:
        operation, yes, no, value = struct.unpack_from("<HBBI", code, 8 * at)
        at += 1
        sizes = {0x30: 1, 0x28: 2, 0x20: 4, 0x48: 2}
        if operation in sizes:
            start = value + (index if operation == 0x48 else 0)
            if start + sizes[operation] > len(packet):
                return False
            accumulator = int.from_bytes(packet[start : start + sizes[operation]], "big")
        elif operation == 0xB1:
            index = (packet[value] & 15) * 4
        elif operation == 0x15:
            at += yes if accumulator == value else no
        elif operation == 0x45:
            at += yes if accumulator & value else no
        else:
            assert operation == 0x06
            return value > 0


@settings(max_examples=300, deadline=None)
@given(frames())
def test_the_kernels_filter_lets_through_what_the_loop_may_take(frame: bytes) -> None:
    let_through = passes(filter_code(WANTED), frame)
    verdict = twin(frame)[0]
    if verdict == "taken" or (verdict == "fragments" and frame[16:20] in (b"\xef\x01\x01\x01", b"\xef\x01\x01\x02")):
        assert let_through
    if let_through:
        assert frame[9] == 17
        assert frame[16:20] in (b"\xef\x01\x01\x01", b"\xef\x01\x01\x02")
