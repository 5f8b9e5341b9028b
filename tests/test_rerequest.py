"""What both lines lose comes from the re-request server, or becomes a gap after a bounded number of requests."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import free_endpoints, until
from veth import WAYS, Received, assert_books_are_true, cable, needs_namespaces, receiving, send, send_payloads, simulated

from tickmesh.control.config import ConfigError, parse_config
from tickmesh.node.event import Kind
from tickmesh.node.reader import SourceError
from tickmesh.ops.egress_loss import EgressLoss
from tickmesh.ops.namespaces import INTERFACE
from tickmesh.ops.rerequest_server import RerequestServer
from tickmesh.ops.simulated_lines import FaultConfig, SimulatedLines, send_lines
from tickmesh.transports.multicast import parse_endpoint

LOSSY = FaultConfig(loss=0.2)

# ---------------------------------------------------------------- the server


@pytest.fixture(scope="module")
def kept() -> Iterator[tuple[RerequestServer, dict[int, bytes]]]:
    """A server that keeps a feed, and its messages by sequence; not started."""
    server, messages = RerequestServer(), {}
    for batch in simulated(500).batches():
        server.keep(batch)
        for k, entry in enumerate(batch.datagrams):
            payload, at = bytes(batch.payload(k)), 20
            for sequence in range(int(entry["sequence"]), int(entry["sequence"]) + int(entry["count"])):
                size = int.from_bytes(payload[at : at + 2], "big")
                messages[sequence] = payload[at + 2 : at + 2 + size]
                at += 2 + size
    assert sorted(messages) == list(range(1, 501))
    with server:
        yield server, messages


def request(first: int, count: int, session: bytes = b"TICKMESH  ") -> bytes:
    return session + first.to_bytes(8, "big") + count.to_bytes(2, "big")


@settings(max_examples=50)
@given(first=st.integers(1, 500), count=st.integers(1, 600))
def test_an_answer_is_what_was_sent_from_there_on_as_much_as_fits(
    kept: tuple[RerequestServer, dict[int, bytes]], first: int, count: int
) -> None:
    server, messages = kept
    packet = server.answer(request(first, count))
    assert packet is not None
    assert len(packet) <= 1472
    assert packet[:18] == request(first, count)[:18]
    found, at = [], 20
    while at < len(packet):
        size = int.from_bytes(packet[at : at + 2], "big")
        found.append(packet[at + 2 : at + 2 + size])
        at += 2 + size
    assert len(found) == int.from_bytes(packet[18:20], "big") <= count
    assert found == [messages[first + i] for i in range(len(found))]
    if len(found) < min(count, 501 - first):
        assert len(packet) + 2 + len(messages[first + len(found)]) > 1472, "what did not fit was left out, nothing else"


@pytest.mark.parametrize("bad", [b"", request(1, 5)[:19], request(0, 5), request(501, 1), request(1, 0), request(1, 5, b"OTHER     ")])
def test_what_cannot_be_answered_is_not(kept: tuple[RerequestServer, dict[int, bytes]], bad: bytes) -> None:
    assert kept[0].answer(bad) is None


def test_what_is_too_old_is_forgotten() -> None:
    server = RerequestServer(keep_bytes=10_000)
    with server:
        for batch in simulated(3000).batches():
            server.keep(batch)
        assert server.answer(request(1, 1)) is None
        assert server.answer(request(3000, 1)) is not None


# ---------------------------------------------------------------- on the loopback


@contextmanager
def on_loopback(lines: SimulatedLines, server: RerequestServer | None, **keys: object) -> Iterator[Received]:
    """A receiver of lossy lines on the loopback, after they have been sent."""
    endpoints = free_endpoints()
    ends = {"endpoint": endpoints[0], "endpoint_b": endpoints[1], "interface": "lo"}
    with receiving("none", **ends, **keys) as received:
        send_lines(lines, endpoints, speed="realtime", keep=server.keep if server else None)
        received.ended()
        yield received


def test_what_both_lines_lose_is_recovered() -> None:
    lines = simulated(3000, LOSSY, LOSSY)
    with RerequestServer() as server, on_loopback(lines, server, rerequest=server.endpoint) as received:
        assert_books_are_true(received, lines)
        counters = received.receiver.counters()
        assert counters["gaps"] == counters["missing"] == counters["given_up"] == 0
        assert counters["recovered"] > 0
        assert server.answered == counters["requests"] > 0
        assert not np.any(received.events()["kind"] == Kind.GAP)


def test_a_silent_server_is_asked_a_few_times_then_it_is_a_gap() -> None:
    lines = simulated(2000, LOSSY, LOSSY)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.setblocking(False)
        keys = {"rerequest": f"udp://127.0.0.1:{silent.getsockname()[1]}", "rerequest_timeout_ms": 2.0, "rerequest_tries": 3}
        with on_loopback(lines, None, **keys) as received:
            until(lambda: received.receiver.counters()["missing"] == received.receiver.counters()["given_up"] > 0, "gaps", 20)
            counters, events = received.receiver.counters(), received.events()
        asked: dict[bytes, int] = {}
        while True:
            try:
                packet = silent.recv(100)
            except BlockingIOError:
                break
            asked[packet] = asked.get(packet, 0) + 1
    gaps = events[events["kind"] == Kind.GAP]
    assert len(gaps) == counters["gaps"] > 0
    assert set(asked.values()) == {3}
    wanted = {(int.from_bytes(p[10:18], "big"), int.from_bytes(p[18:20], "big")) for p in asked}
    assert wanted == {(int(gap["id"]), int(gap["qty"])) for gap in gaps}


def test_heartbeats_that_go_on_do_not_put_the_gap_off() -> None:
    """Each heartbeat makes the hole longer; that is no progress, and the venue may send them for hours."""
    endpoints, sequence = free_endpoints(), 1
    address = parse_endpoint(endpoints[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        silent.bind(("127.0.0.1", 0))
        line.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        ends = {"endpoint": endpoints[0], "endpoint_b": endpoints[1], "interface": "lo"}
        asks = {"rerequest": f"udp://127.0.0.1:{silent.getsockname()[1]}", "rerequest_timeout_ms": 50.0, "rerequest_tries": 2}
        with receiving("none", **ends, **asks, gap_wait_ms=50.0) as received:

            def beaten() -> bool:
                nonlocal sequence
                line.sendto(request(sequence, 0), (address.address, address.port))
                sequence += 1
                return received.receiver.counters()["given_up"] > 0

            until(beaten, "a gap", 10)
            until(lambda: received.receiver.counters()["gaps"] > 0, "its event", 10)
            assert received.receiver.counters()["requests"] >= 2


def test_a_server_that_is_not_there_is_a_gap_too() -> None:
    """The kernel answers for it that nobody listens; that ends nothing."""
    lines = simulated(1000, LOSSY, LOSSY)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"udp://127.0.0.1:{probe.getsockname()[1]}"
    with on_loopback(lines, None, rerequest=nobody, rerequest_timeout_ms=1.0, rerequest_tries=2) as received:
        until(lambda: received.receiver.counters()["given_up"] > 0, "gaps", 20)
        assert received.receiver.error is None
        until(lambda: not select.select([received.receiver.request], [], [], 0)[0], "no error on the socket", 5)


def test_an_answer_that_comes_too_late_is_taken_off_the_socket() -> None:
    """What stayed there would keep an idle loop from sleeping ever again."""
    lines = simulated(200)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as late:
        late.bind(("127.0.0.1", 0))
        with on_loopback(lines, None, rerequest=f"udp://127.0.0.1:{late.getsockname()[1]}") as received:
            asked = received.receiver.request
            assert asked is not None
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, fileno=os.dup(asked.fileno())) as shared:
                late.sendto(request(1, 1) + b"\x00\x01S", shared.getsockname())
            until(lambda: asked.counters().foreign == 1, "an empty socket", 5)
            assert not select.select([asked], [], [], 0)[0]
            assert received.receiver.counters()["requests"] == 0


def test_requests_name_the_new_session_while_a_line_lags_in_the_old_one() -> None:
    endpoints = free_endpoints()
    addresses = [(to.address, to.port) for to in map(parse_endpoint, endpoints)]
    message, new = b"\x00\x01S", b"TOMORROW  "
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        server.bind(("127.0.0.1", 0))
        server.settimeout(10)
        line.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        ends = {"endpoint": endpoints[0], "endpoint_b": endpoints[1], "interface": "lo"}
        with receiving("none", **ends, rerequest=f"udp://127.0.0.1:{server.getsockname()[1]}", gap_wait_ms=100.0) as received:
            packets = iter(range(1, 9))

            def by(to: tuple[str, int], payload: bytes) -> None:
                """Send one packet, and wait until it is decoded: packets of a batch are not what this is about."""
                line.sendto(payload, to)
                wanted = next(packets)
                until(lambda: received.receiver.counters()["packets"] >= wanted, "a packet", 10)

            by(addresses[0], request(1, 1) + message)
            by(addresses[0], request(1, 1, new) + message)
            by(addresses[0], request(5, 1, new) + message)
            by(addresses[1], request(2, 1) + message)
            assert server.recv(100) == request(2, 3, new)


def test_answers_that_are_none_change_nothing() -> None:
    """Another session, sequences far ahead, heartbeats, ends of session, noise."""
    lines = simulated(1000, LOSSY, LOSSY)
    bad = [request(1, 1, b"OTHER     ") + b"\x00\x01S", request(900_000, 1) + b"\x00\x01S", request(1, 0), request(1, 0xFFFF), b"noise"]
    stop = threading.Event()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as liar:
        liar.bind(("127.0.0.1", 0))
        liar.settimeout(0.05)

        def lie() -> None:
            while not stop.is_set():
                try:
                    _, asker = liar.recvfrom(100)
                except TimeoutError:
                    continue
                for packet in bad:
                    liar.sendto(packet, asker)

        thread = threading.Thread(target=lie)
        thread.start()
        try:
            server = f"udp://127.0.0.1:{liar.getsockname()[1]}"
            with on_loopback(lines, None, rerequest=server, rerequest_timeout_ms=2.0, rerequest_tries=2) as received:
                until(lambda: received.receiver.counters()["missing"] == received.receiver.counters()["given_up"] > 0, "gaps", 20)
                assert received.receiver.request is not None
                assert received.receiver.request.counters().foreign > 0
                assert received.receiver.counters()["recovered"] == 0
                assert not np.any(received.events()["kind"] == Kind.CLEAR), "no new session"
        finally:
            stop.set()
            thread.join()


# ---------------------------------------------------------------- over a link that loses


@needs_namespaces
@pytest.mark.parametrize("bypass", WAYS)
def test_books_are_whole_though_the_link_loses_five_percent(bypass: str) -> None:
    """Of both lines, of requests' answers, of everything that leaves the sender."""
    lines = simulated(20_000, rate=40_000, mtu_bytes=256)  # in so many packets, some are lost on both lines
    with cable() as pair:
        with pair.inside("left"):
            server = RerequestServer(address=pair.left_address)
        with server, receiving(bypass, rerequest=server.endpoint, rerequest_tries=100, rerequest_timeout_ms=20.0) as received:
            send_payloads(pair, [request(1, 0)] * 3)  # a heartbeat: the feed begins at 1, also if the first packet is lost
            until(lambda: received.receiver.expected == 1, "the beginning", 10)
            with pair.inside("left"), EgressLoss(INTERFACE, 0.05) as loss:
                send(pair, lines, keep=server.keep)
                received.ended()
            share = loss.lost / (loss.lost + loss.passed)
            assert_books_are_true(received, lines)
            counters = received.receiver.counters()
        assert 0.03 < share < 0.07
        assert counters["gaps"] == counters["given_up"] == counters["dropped_by_kernel"] == 0
        assert counters["recovered"] > 0
        assert counters["duplicates"] > 0


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize("server", ["10.0.0.5:26500", "udp://239.1.1.1:26500", "udp://10.0.0.5:0", "udp://10.0.0.500:1"])
def test_what_is_no_server_is_refused(server: str) -> None:
    from veth import source_text

    with pytest.raises(ConfigError) as caught:
        parse_config(source_text("none", rerequest=server))
    assert [problem.path for problem in caught.value.errors] == ["data_sources.lines.rerequest"]


def test_a_framing_without_requests_is_refused() -> None:
    ends = {"endpoint": free_endpoints()[0], "interface": "lo"}
    with pytest.raises(SourceError, match="remove the key rerequest"), receiving(
        "none", **ends, framing="iex_tp", data_format="iex_deep_plus", rerequest="udp://127.0.0.1:5"
    ):
        pass
