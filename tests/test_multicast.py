"""UDP receivers and senders on the loopback interface, for real: groups, errors, lost and truncated datagrams, A and B in one loop."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tickmesh.transports.capture import PACKET, Packets
from tickmesh.transports.multicast import (
    BadEndpoint,
    Endpoint,
    NoSuchInterface,
    PortBusy,
    Receiver,
    SocketRefused,
    open_receiver,
    open_sender,
    parse_endpoint,
    receive_batch,
)
from tickmesh.transports.pacing import Pace
from tickmesh.transports.recording import SLACK, Bytes
from tickmesh.transports.toolbox import load_acquire, now_ns, outlined, store_release

_groups = itertools.count(os.getpid() % 200 * 256)
WAIT_S = 10.0


@pytest.fixture
def endpoint() -> str:
    """A group of this test's own, on a port that is free now."""
    number = next(_groups)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return f"udp://239.192.{number >> 8 & 255}.{number & 255}:{port}"


def of(payloads: list[bytes], lines: list[int] | None = None, every_ns: int = 0) -> tuple[Bytes, Packets]:
    """Payloads as a buffer and PACKET records."""
    packets = np.zeros(len(payloads), PACKET)
    packets["length"] = [len(p) for p in payloads]
    packets["offset"][1:] = np.cumsum(packets["length"])[:-1]
    packets["line"] = lines or 0
    packets["ts_recv"] = np.arange(len(payloads)) * every_ns
    return np.frombuffer(bytearray(b"".join(payloads) + bytes(SLACK)), np.uint8), packets


def taken(receiver: Receiver, count: int, line: int = 0) -> list[bytes]:
    """The next `count` datagrams; fewer if they do not come in time."""
    found: list[bytes] = []
    end = time.monotonic() + WAIT_S
    while len(found) < count and time.monotonic() < end:
        for packet in receiver.receive(line):
            start = int(packet["offset"])
            found.append(receiver.buffer[start : start + int(packet["length"])].tobytes())
    return found


# ---------------------------------------------------------------- endpoints


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("udp://239.1.1.1:26400", Endpoint("239.1.1.1", 26400, None)),
        (" udp://127.0.0.1:1/ ", Endpoint("127.0.0.1", 1, None)),
        ("udp://10.0.0.1@232.1.1.1:9", Endpoint("232.1.1.1", 9, "10.0.0.1")),
    ],
)
def test_endpoints(text: str, expected: Endpoint) -> None:
    assert parse_endpoint(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "239.1.1.1:26400", "tcp://239.1.1.1:1", "udp://239.1.1.1", "udp://239.1.1.1:0", "udp://239.1.1.1:70000", "udp://239.1.1.256:1",
     "udp://host:1", "udp://10.0.0.1@10.0.0.2:1", "udp://239.1.1.1:26400:1"],
)  # fmt: skip
def test_what_is_no_endpoint_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadEndpoint, match="write udp://") as caught:
        open_receiver(text, interface="lo")
    assert caught.value.endpoint == text
    with pytest.raises(BadEndpoint):
        open_sender(["udp://127.0.0.1:5", text])


@pytest.mark.parametrize("interface", ["nosuch0", "192.0.2.250", "300.1.1.1"])
def test_an_unknown_interface_is_refused_with_the_known_ones(endpoint: str, interface: str) -> None:
    for call in (open_receiver, open_sender):
        with pytest.raises(NoSuchInterface, match="lo") as caught:
            call(endpoint, interface=interface)  # type: ignore[operator]
        assert caught.value.interface == interface
        assert "lo" in caught.value.known


def test_a_busy_port_is_said_to_be_busy(endpoint: str) -> None:
    parsed = parse_endpoint(endpoint)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("0.0.0.0", parsed.port))
        with pytest.raises(PortBusy, match="ss -ulpn"):
            open_receiver(endpoint, interface="lo")
    unicast = f"udp://127.0.0.1:{parsed.port}"
    with open_receiver(unicast), pytest.raises(PortBusy):
        open_receiver(unicast)


def test_an_address_of_another_host_is_refused() -> None:
    with pytest.raises(SocketRefused, match="not one of this host's") as caught:
        open_receiver("udp://192.0.2.251:5000")
    assert (caught.value.errno, caught.value.step) == (errno.EADDRNOTAVAIL, "bind")


def test_numbers_that_make_no_sense_are_refused(endpoint: str) -> None:
    for wrong in ({"batch": 0}, {"slot_bytes": 10}, {"receive_buffer_bytes": 0}):
        with pytest.raises(ValueError, match="out of range"):
            open_receiver(endpoint, interface="lo", **wrong)  # type: ignore[arg-type]
    for wrong in ({"ttl": 256}, {"batch": 0}):
        with pytest.raises(ValueError, match="out of range"):
            open_sender(endpoint, interface="lo", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        open_sender([])


# ---------------------------------------------------------------- what is sent arrives


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payloads=st.lists(st.tuples(st.integers(0, 1), st.binary(max_size=300)), max_size=150))
def test_both_lines_get_what_is_theirs_in_order(endpoint: str, payloads: list[tuple[int, bytes]]) -> None:
    other = endpoint.replace("239.192", "239.193")
    with (
        open_receiver(endpoint, interface="lo", batch=7) as a,
        open_receiver(other, interface="127.0.0.1") as b,
        open_sender([endpoint, other], interface="lo", batch=16) as sender,
    ):
        buffer, packets = of([p for _, p in payloads], [line for line, _ in payloads])
        assert sender.send(buffer, packets) == len(payloads)
        for line, receiver in ((0, a), (1, b)):
            expected = [p for to, p in payloads if to == line]
            assert taken(receiver, len(expected), line) == expected
            assert len(receiver.receive(line)) == 0
            assert receiver.counters()._replace(bytes=0) == (len(expected), 0, 0, 0, 0, 0)
        assert sender.counters()._replace(busy=0) == (len(payloads), sum(len(p) for _, p in payloads), 0, 0, 0)


@pytest.mark.parametrize("kernel_timestamps", [False, True])
def test_a_packet_says_when_where_and_which_line(endpoint: str, kernel_timestamps: bool) -> None:
    with (
        open_receiver(endpoint, interface="lo", kernel_timestamps=kernel_timestamps) as receiver,
        open_sender(endpoint, interface="lo") as sender,
    ):
        before = time.time_ns()
        sender.send(*of([b"one", b"two"]))
        between = time.time_ns()
        end = time.monotonic() + WAIT_S
        while not len(packets := receiver.receive(line=5)) and time.monotonic() < end:
            pass
        after = time.time_ns()
    parsed = parse_endpoint(endpoint)
    assert (packets["port"] == parsed.port).all()
    assert (packets["line"] == 5).all()
    assert socket.inet_ntoa(int(packets["address"][0]).to_bytes(4, "big")) == parsed.address
    stamps = packets["ts_recv"].astype(np.int64)
    low, high = (before, between) if kernel_timestamps else (between, after)
    assert (low - 1_000_000 <= stamps).all()
    assert (stamps <= high + 1_000_000).all()


def test_another_group_on_the_same_port_is_not_received(endpoint: str) -> None:
    other = endpoint.replace("239.192", "239.193")
    with (
        open_receiver(endpoint, interface="lo") as receiver,
        open_receiver(other, interface="lo") as second,
        open_sender([endpoint, other], interface="lo") as sender,
    ):
        sender.send(*of([b"other", b"mine"], [1, 0]))
        assert taken(receiver, 1) == [b"mine"]
        assert taken(second, 1) == [b"other"]
        assert len(receiver.receive()) == 0


def test_two_receivers_of_one_group_get_a_copy_each(endpoint: str) -> None:
    with (
        open_receiver(endpoint, interface="lo") as one,
        open_receiver(endpoint, interface="lo") as two,
        open_sender(endpoint, interface="lo") as sender,
    ):
        sender.send(*of([b"copy"]))
        assert taken(one, 1) == taken(two, 1) == [b"copy"]


def test_only_the_allowed_sender_is_heard(endpoint: str) -> None:
    group = endpoint.removeprefix("udp://").replace("239.192", "232.192")
    with (
        open_receiver(f"udp://127.0.0.1@{group}", interface="lo") as wanted,
        open_receiver(f"udp://127.0.0.9@{group}", interface="lo") as unwanted,
        open_sender(f"udp://{group}", interface="lo") as sender,
    ):
        sender.send(*of([b"hello"]))
        assert taken(wanted, 1) == [b"hello"]
        assert len(unwanted.receive()) == 0


def test_unicast(endpoint: str) -> None:
    here = f"udp://127.0.0.1:{parse_endpoint(endpoint).port}"
    with open_receiver(here) as receiver, open_sender(here) as sender:
        sender.send(*of([b"a", b"", b"b"]))
        assert taken(receiver, 3) == [b"a", b"", b"b"]


def test_how_far_and_whether_back_to_this_host(endpoint: str) -> None:
    with open_sender(endpoint, interface="lo", ttl=9, loopback=False) as sender, socket.socket(fileno=os.dup(sender.fileno())) as same:
        assert same.getsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL) == 9
        assert same.getsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP) == 0


# ---------------------------------------------------------------- what is counted


def test_a_datagram_longer_than_a_slot_is_left_out_and_counted(endpoint: str) -> None:
    with (
        open_receiver(endpoint, interface="lo", slot_bytes=256) as receiver,
        open_sender(endpoint, interface="lo") as sender,
    ):
        sender.send(*of([b"a" * 256, b"b" * 257, b"c" * 5000, b"d"]))
        assert taken(receiver, 2) == [b"a" * 256, b"d"]
        assert (receiver.counters().truncated, receiver.counters().datagrams) == (2, 2)


def test_jumbo_datagrams_fit_in_jumbo_slots(endpoint: str) -> None:
    with open_receiver(endpoint, interface="lo", slot_bytes=9216) as receiver, open_sender(endpoint, interface="lo") as sender:
        sender.send(*of([b"j" * 9000]))
        assert taken(receiver, 1) == [b"j" * 9000]


@pytest.mark.parametrize("kernel_timestamps", [False, True])
def test_what_the_kernel_drops_is_counted(endpoint: str, kernel_timestamps: bool) -> None:
    with (
        open_receiver(endpoint, interface="lo", receive_buffer_bytes=8192, kernel_timestamps=kernel_timestamps) as receiver,
        open_sender(endpoint, interface="lo") as sender,
    ):
        sender.send(*of([bytes(1000)] * 200))
        received, end = 0, time.monotonic() + WAIT_S
        while received + receiver.dropped_by_kernel() < 200 and time.monotonic() < end:
            received += len(receiver.receive())
        received += len(receiver.receive())
        sender.send(*of([b"after"]))
        assert taken(receiver, 1) == [b"after"]
        counters = receiver.counters()
        assert received < 200
        assert counters.kernel_drops == receiver.dropped_by_kernel() == 200 - received
        assert counters.datagrams == received + 1


def test_a_smaller_buffer_than_asked_for_is_reported(endpoint: str) -> None:
    with open_receiver(endpoint, interface="lo", receive_buffer_bytes=1 << 20) as receiver:
        assert receiver.receive_buffer_bytes > 0
        assert bool(receiver.warnings) == (receiver.receive_buffer_bytes < 1 << 20)


def test_a_socket_error_is_counted_and_not_fatal(endpoint: str) -> None:
    receiver = open_receiver(endpoint, interface="lo")
    receiver.kernel.state["socket"] = os.open(os.devnull, os.O_RDONLY)
    try:
        assert len(receiver.receive()) == 0
        assert (receiver.counters().errors, receiver.counters().last_errno) == (1, errno.ENOTSOCK)
    finally:
        os.close(int(receiver.kernel.state["socket"][0]))
        receiver.close()


def test_what_cannot_be_sent_is_counted_and_passed_over(endpoint: str) -> None:
    with open_receiver(endpoint, interface="lo") as receiver, open_sender(endpoint, interface="lo") as sender:
        buffer, packets = of([b"first", b"x" * 65600, b"unknown line", b"outside", b"last"], [0, 0, 1, 0, 0])
        packets["offset"][3] = 1 << 62
        assert sender.send(buffer, packets) == 5
        assert taken(receiver, 2) == [b"first", b"last"]
        assert sender.counters()[:3] == (2, 9, 3)


def test_a_buffer_too_small_for_a_slot_takes_nothing(endpoint: str) -> None:
    with open_receiver(endpoint, interface="lo") as receiver, open_sender(endpoint, interface="lo") as sender:
        sender.send(*of([b"x"]))
        assert run_receive(receiver.kernel, np.zeros(2048, np.uint8), receiver.packets) == 0
        assert taken(receiver, 1) == [b"x"]


# ---------------------------------------------------------------- compiled loops


@outlined
def run_receive(receiver: Any, buffer: Any, packets: Any) -> Any:
    return receive_batch(receiver, buffer, packets, 0, now_ns())


@outlined
def gather(receivers: Any, buffer: Any, packets: Any, stop: Any, sums: Any, ready: Any) -> Any:
    """Until told to stop: take both lines into one buffer, count and add up their bytes."""
    store_release(ready, 0, np.int64(1))
    rounds = np.int64(0)
    while load_acquire(stop, 0) == 0:
        rounds += 1
        for line in range(len(receivers)):
            count = receive_batch(receivers[line], buffer, packets, line, now_ns())
            for i in range(count):
                packet = packets[i]
                sums[packet.line, 0] += 1
                for k in range(np.int64(packet.offset), np.int64(packet.offset) + np.int64(packet.length)):
                    sums[packet.line, 1] += np.int64(buffer[k])
            if count:
                store_release(ready, 0, np.int64(1) + sums[0, 0] + sums[1, 0])
    return rounds


def test_a_and_b_in_one_compiled_loop_until_stopped(endpoint: str) -> None:
    other = endpoint.replace("239.192", "239.193")
    payloads = [bytes([i % 256]) * (i % 50) for i in range(600)]
    stop, ready = np.zeros(1, np.int64), np.zeros(1, np.int64)
    sums: npt.NDArray[np.int64] = np.zeros((2, 2), np.int64)
    with (
        open_receiver(endpoint, interface="lo") as a,
        open_receiver(other, interface="lo") as b,
        open_sender([endpoint, other], interface="lo") as sender,
    ):
        thread = threading.Thread(target=gather, args=((a.kernel, b.kernel), a.buffer, a.packets, stop, sums, ready))
        thread.start()
        try:
            wait_for(lambda: ready[0] > 0, 60.0)  # compiled
            buffer, packets = of(payloads, [i % 2 for i in range(600)], every_ns=10_000)
            assert sender.send(buffer, packets, Pace("realtime"), idle_mode="yield") == 600
            wait_for(lambda: ready[0] == 601)
        finally:
            stop[0] = 1
            thread.join(WAIT_S)
        assert not thread.is_alive()
        assert a.counters().datagrams == b.counters().datagrams == 300
    assert sums.tolist() == [[300, sum(sum(p) for p in payloads[line::2])] for line in (0, 1)]


def wait_for(condition: Any, limit_s: float = WAIT_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.001)


def test_a_paced_sender_keeps_the_schedule_and_stops_when_told(endpoint: str) -> None:
    with open_receiver(endpoint, interface="lo") as receiver, open_sender(endpoint, interface="lo") as sender:
        start = time.monotonic()
        assert sender.send(*of([b"x"] * 6, every_ns=10_000_000), Pace(2.0)) == 6
        assert time.monotonic() - start >= 0.025  # five gaps of 10 ms at twice the speed
        assert len(taken(receiver, 6)) == 6

        stop, done = np.zeros(1, np.int64), []
        slow = of([b"y"] * 3, every_ns=3_600 * 10**9)
        thread = threading.Thread(target=lambda: done.append(sender.send(*slow, Pace("realtime", max_wait_ms=10**7), stop=stop)))
        thread.start()
        assert taken(receiver, 1) == [b"y"]
        stop[0] = 1
        thread.join(WAIT_S)
        assert done == [1]
