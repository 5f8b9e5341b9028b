"""MoldUDP64 lines of a simulated feed: packing, seeded faults, pcap and multicast on the loopback interface."""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from itch_reader import frames

from tickmesh.ops.simulated_lines import (
    DATAGRAM,
    LINE,
    FaultConfig,
    LineConfig,
    SimulatedLines,
    impair,
    send_lines,
    write_lines,
)
from tickmesh.ops.simulator import Simulator, SimulatorConfig, SimulatorConfigError, generate
from tickmesh.transports.capture import datagrams, read_capture
from tickmesh.transports.multicast import MulticastError, open_receiver

CONFIG = SimulatorConfig(seed=11, symbols=3, messages=4000)
ENDPOINTS = ("udp://239.77.1.1:26401", "udp://239.77.1.2:26402")


def carried(config: SimulatorConfig, lines: LineConfig) -> tuple[SimulatedLines, list[bytes], list[list[bytes]]]:
    """All datagrams in order, and what each line carries."""
    feed = SimulatedLines(Simulator(config), lines)
    every: list[bytes] = []
    by_line: list[list[bytes]] = [[] for _ in lines.faults]
    for batch in feed.batches():
        every += [bytes(batch.payload(k)) for k in range(len(batch.datagrams))]
        for number, order in enumerate(batch.lines):
            by_line[number] += [bytes(batch.payload(int(k))) for k in order]
    return feed, every, by_line


def header(datagram: bytes) -> tuple[bytes, int, int]:
    session, sequence, count = struct.unpack_from(">10sQH", datagram)
    return session, sequence, count


def blocks(datagram: bytes) -> list[bytes]:
    return list(frames(datagram[20:]))


@pytest.mark.parametrize("mtu", [128, 300, 1500, 9000])
def test_datagrams_carry_the_feed_in_sequence(mtu: int) -> None:
    feed, every, _ = carried(CONFIG, LineConfig(mtu_bytes=mtu, session="S1", flush_ns=5_000_000))
    expected, messages = 1, []
    for datagram in every[:-1]:
        session, sequence, count = header(datagram)
        assert (session, sequence) == (b"S1        ", expected)
        assert len(blocks(datagram)) == count
        assert len(datagram) <= mtu - 28
        messages += blocks(datagram)
        expected += count
    assert messages == list(frames(generate(CONFIG).tobytes()))
    assert header(every[-1]) == (b"S1        ", expected, 0xFFFF)
    assert feed.counts()[0].sent == len(every) - 1 + 3


def test_datagram_waits_no_longer_than_it_may() -> None:
    _, every, _ = carried(CONFIG, LineConfig(flush_ns=300_000))
    for datagram in every[:-1]:
        times = [int.from_bytes(message[5:11], "big") for message in blocks(datagram)]
        assert times[-1] - times[0] <= 300_000


def test_silence_is_filled_with_heartbeats() -> None:
    slow = SimulatorConfig(seed=1, symbols=1, messages=150, rate=2)
    _, every, _ = carried(slow, LineConfig(heartbeat_ns=100_000_000))
    beats = [header(d) for d in every if header(d)[2] == 0]
    assert len(beats) > 150
    _, dense, _ = carried(slow, LineConfig(heartbeat_ns=3_600_000_000_000))
    assert not [d for d in dense if header(d)[2] == 0]
    messages = [m for d in every[:-1] for m in blocks(d)]
    assert messages == [m for d in dense[:-1] for m in blocks(d)]


def test_many_heartbeats_leave_room_for_every_message() -> None:
    slow = SimulatorConfig(seed=1, symbols=1, messages=1500, rate=1)
    _, every, _ = carried(slow, LineConfig(heartbeat_ns=1_000_000))
    assert sum(header(d)[2] for d in every[:-1]) == 1500


def test_faults_are_seeded_and_independent() -> None:
    faults = FaultConfig(loss=0.1, duplicate=0.1, reorder=0.1)
    config = LineConfig(faults=(faults, faults))
    _, _, first = carried(CONFIG, config)
    feed, _, again = carried(CONFIG, config)
    assert first == again
    assert first[0] != first[1]
    for counts in feed.counts():
        assert min(counts.lost, counts.duplicated, counts.reordered) > 50
    other = carried(SimulatorConfig(seed=12, symbols=3, messages=4000), config)[2]
    assert other[0] != first[0]


def test_two_lossy_lines_together_lose_little() -> None:
    faults = FaultConfig(loss=0.05, duplicate=0.02, reorder=0.05)
    _, every, lines = carried(CONFIG, LineConfig(faults=(faults, faults)))
    either = {header(d)[1] for line in lines for d in line}
    missing = [d for d in every if header(d)[1] not in either]
    assert len(missing) < 0.01 * len(every) < min(len(every) - len(set(line)) for line in lines)


def twin_of_impair(n: int, draws: list[tuple[int, int, int, int]], loss: int, duplicate: int, reorder: int) -> list[int]:
    order: list[int] = []
    held = [[0, 0] for _ in range(4)]
    for k in range(n):
        free = [h for h in held if h[1] == 0]
        lost, late, twice, delay = draws[k]
        if lost < loss:
            continue
        if late < reorder and free:
            free[-1][:] = [k, 2 + delay % 3]
        else:
            order += [k, k] if twice < duplicate else [k]
        for h in held:
            if h[1]:
                h[1] -= 1
                if not h[1]:
                    order.append(h[0])
    return order + [h[0] for h in held if h[1]]


def splitmix(state: int, count: int) -> list[int]:
    words = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        word = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        words.append((word ^ word >> 31) >> 32)
    return words


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**64 - 1), n=st.integers(0, 80), chances=st.tuples(*[st.sampled_from([0, 2**28, 2**30, 3 * 2**30])] * 3))
def test_impair_equals_its_twin(seed: int, n: int, chances: tuple[int, int, int]) -> None:
    line = np.zeros(1, LINE)
    line["random"] = np.uint64(seed)
    line["loss"], line["duplicate"], line["reorder"] = chances
    order = np.zeros(200, np.int32)
    sent = int(impair(np.zeros(n, DATAGRAM), np.int64(n), line, np.zeros((4, 2), np.int64), order))
    words = splitmix(seed, 4 * n)
    draws = [tuple(words[4 * k : 4 * k + 4]) for k in range(n)]
    assert order[:sent].tolist() == twin_of_impair(n, draws, *chances)  # type: ignore[arg-type]
    assert int(line["sent"][0]) == sent


def test_pcap_holds_both_lines(tmp_path: Path) -> None:
    config = LineConfig(faults=(FaultConfig(loss=0.02), FaultConfig()))
    feed = SimulatedLines(Simulator(CONFIG), config)
    count = write_lines(tmp_path / "ab.pcap", feed, ENDPOINTS)
    _, _, lines = carried(CONFIG, config)
    buffer, packets = read_capture(tmp_path / "ab.pcap").packets()
    found = list(datagrams(buffer, packets))
    assert len(found) == count == sum(map(len, lines))
    for number, port in enumerate((26401, 26402)):
        assert [bytes(d.payload) for d in found if d.port == port] == lines[number]
    times = packets["ts_recv"].astype(np.int64)
    assert np.all(np.diff(times) >= 0)
    assert times[0] % 86_400_000_000_000 > 34_000_000_000_000


def test_multicast_brings_what_was_packed() -> None:
    config = LineConfig(faults=(FaultConfig(loss=0.05), FaultConfig(reorder=0.05)))
    _, _, expected = carried(CONFIG, config)
    feed, received = SimulatedLines(Simulator(CONFIG), config), [[], []]  # type: ignore[var-annotated]
    with contextlib.ExitStack() as stack:
        receivers = [stack.enter_context(open_receiver(endpoint, interface="lo")) for endpoint in ENDPOINTS]
        thread = threading.Thread(target=send_lines, args=(feed, ENDPOINTS), kwargs={"speed": 4})
        thread.start()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and any(len(got) < len(sent) for got, sent in zip(received, expected)):
            for number, receiver in enumerate(receivers):
                packets = receiver.receive(number)
                for packet in packets:
                    at = int(packet["offset"])
                    received[number].append(receiver.buffer[at : at + int(packet["length"])].tobytes())
        thread.join(30)
    assert received == expected
    assert feed.datagrams_sent == sum(map(len, expected))


def test_stop_ends_an_endless_market() -> None:
    stop, feed = threading.Event(), SimulatedLines(Simulator(SimulatorConfig(rate=2000)), LineConfig())
    thread = threading.Thread(target=send_lines, args=(feed, ENDPOINTS[:1]), kwargs={"stop": stop})
    thread.start()
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    assert not feed.simulator.finished


def test_unknown_interface_is_refused() -> None:
    with pytest.raises(MulticastError, match="no interface 'nic9'"):
        send_lines(SimulatedLines(Simulator(CONFIG), LineConfig()), ENDPOINTS[:1], interface="nic9")


def test_endpoints_must_match_the_lines(tmp_path: Path) -> None:
    with pytest.raises(SimulatorConfigError, match="one for each of the 1 lines"):
        send_lines(SimulatedLines(Simulator(CONFIG), LineConfig()), ENDPOINTS)
    with pytest.raises(SimulatorConfigError, match="messages or seconds"):
        write_lines(tmp_path / "x", SimulatedLines(Simulator(SimulatorConfig()), LineConfig()), ENDPOINTS[:1])


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (LineConfig, {"session": ""}), (LineConfig, {"session": "ELEVENCHARS"}), (LineConfig, {"mtu_bytes": 60}),
        (LineConfig, {"flush_ns": -1}), (LineConfig, {"heartbeat_ns": 5}), (LineConfig, {"faults": ()}),
        (FaultConfig, {"loss": 1.0}), (FaultConfig, {"reorder": -0.1}),
        (FaultConfig, {"duplicate": float("nan")}),
    ],
)  # fmt: skip
def test_wrong_line_settings_are_refused_by_name(kind: type, wrong: dict[str, object]) -> None:
    with pytest.raises(SimulatorConfigError) as error:
        kind(**wrong)
    assert error.value.field in wrong
