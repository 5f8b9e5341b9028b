"""A receiver of lines begins where the shard with least of the source ended: the re-request server gives the rest, or a gap tells of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nats
import numpy as np
import pytest
from nats.js.errors import NotFoundError
from nats_fixtures import nats_server  # noqa: F401
from nodes import assert_true, cluster, free_endpoints, multicast_source, node_config, running, until  # noqa: F401
from veth import Received, receiving, simulated

from tickmesh.node.adapters import session_number
from tickmesh.node.continuation import Place
from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, EventArray, Kind
from tickmesh.node.frames import stream_name
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.journal import JournalReader, truncate
from tickmesh.node.receivers import MulticastReceiver
from tickmesh.node.router import MARK_EVERY, S_MARKS, make_router, route_now
from tickmesh.ops.rerequest_server import RerequestServer
from tickmesh.ops.servers import NatsServer
from tickmesh.transports.multicast import parse_endpoint
from tickmesh.transports.ring import Ring
from tickmesh.transports.toolbox import IDLE_MODES, now_ns

MESSAGES = 600
TODAY = session_number("TICKMESH")


@pytest.fixture(scope="module")
def feed() -> list[tuple[int, bytes]]:
    """First sequence and bytes of every datagram of a session."""
    found = []
    for batch in simulated(MESSAGES, mtu_bytes=400).batches():
        found += [(int(entry["sequence"]), bytes(batch.payload(k))) for k, entry in enumerate(batch.datagrams) if entry["count"] > 0]
    return found


@pytest.fixture
def server() -> Iterator[RerequestServer]:
    with RerequestServer() as kept:
        for batch in simulated(MESSAGES, mtu_bytes=400).batches():
            kept.keep(batch)
        yield kept


@contextmanager
def line_to(endpoint: str) -> Iterator[Callable[[list[bytes]], None]]:
    """A way to send datagrams on a line."""
    to = parse_endpoint(endpoint)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        line.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))

        def send(payloads: list[bytes]) -> None:
            for payload in payloads:
                line.sendto(payload, (to.address, to.port))

        yield send


@contextmanager
def restarted(last: int, place: Place | None, **keys: object) -> Iterator[tuple[Received, Callable[[list[bytes]], None]]]:
    """A receiver after a restart in which the journals stand at `last`, and a way to send it datagrams on line A."""

    def know(receiver: MulticastReceiver) -> None:
        receiver.resume({}, last)
        if place is not None:
            assert receiver.go_on_at(place)

    endpoints = free_endpoints()
    ends = {"endpoint": endpoints[0], "endpoint_b": endpoints[1], "interface": "lo"}
    with line_to(endpoints[0]) as send, receiving("none", before=know, **{**ends, **keys}) as received:
        yield received, send


def header(sequence: int, count: int = 0, session: bytes = b"TICKMESH  ") -> bytes:
    return session + sequence.to_bytes(8, "big") + count.to_bytes(2, "big")


def wholes(events: EventArray) -> list[tuple[int, int, int]]:
    """Kind, id and aux of what the receiver says of the whole source."""
    whole = events[(events["instrument"] == ALL_INSTRUMENTS) & np.isin(events["kind"], (Kind.GAP, Kind.CLEAR, Kind.CODE))]
    return [(int(one["kind"]), int(one["id"]), int(one["aux"])) for one in whole]


def test_what_the_shard_with_least_lacks_comes_from_the_server(feed: list[tuple[int, bytes]], server: RerequestServer) -> None:
    """One shard's journal ends at 100, another's at 250; from some 400 on the lines bring it."""
    late = [payload for first, payload in feed if first >= 400]
    with restarted(250, Place(100, TODAY, is_one=True), rerequest=server.endpoint) as (received, send):
        send(late)
        until(lambda: received.receiver.expected > MESSAGES, "the end of the session", 20)
        events = received.events()
        counters = received.receiver.counters()
    assert wholes(events) == []
    market = events[events["kind"] != Kind.REFERENCE]
    assert sorted(set(market["seq"].tolist())) == list(range(100, MESSAGES + 1))
    assert (np.diff(market["seq"].astype(np.int64)) >= 0).all()
    assert (counters["gaps"], counters["given_up"]) == (0, 0)
    assert counters["recovered"] >= 300
    assert received.receiver.begun_at == 251


def test_without_a_server_the_gap_reaches_back_to_the_shard_with_least(feed: list[tuple[int, bytes]]) -> None:
    first, payload = next(one for one in feed if one[0] >= 400)
    with restarted(250, Place(100, TODAY, is_one=True), gap_wait_ms=10) as (received, send):
        send([payload])
        until(lambda: received.receiver.expected > first, "the datagram", 20)
        assert wholes(received.events()) == [(Kind.GAP, 100, first - 1)]


def test_a_line_that_lags_behind_the_journals_is_no_new_session(feed: list[tuple[int, bytes]]) -> None:
    """The session's name says so; the shard with least gets what it lacks of these."""
    with restarted(MESSAGES - 1, Place(100, TODAY, is_one=True)) as (received, send):
        send([payload for first, payload in feed if first >= 90])
        until(lambda: received.receiver.expected > MESSAGES, "the end of the session", 20)
        events = received.events()
    assert wholes(events) == []
    assert int(events["seq"].min()) == 100


@pytest.mark.parametrize("seen", [40, 4000])
def test_another_session_is_begun_with_anew_wherever_it_stands(seen: int) -> None:
    """Before, one that had come further than the journals was taken for theirs."""
    with restarted(250, Place(100, TODAY, is_one=True), gap_wait_ms=10) as (received, send):
        send([header(seen, session=b"TOMORROW  "), header(300)])
        until(lambda: received.receiver.expected == seen, "its heartbeat", 20)
        send([header(300), header(seen, session=b"TOMORROW  ")])
        until(lambda: received.receiver.counters()["packets"] == 4, "all packets", 20)
        assert wholes(received.events()) == [(Kind.CLEAR, session_number("TOMORROW"), 0), (Kind.GAP, 1, seen - 1)]


def test_journals_of_two_sessions_begin_the_present_one_anew() -> None:
    with restarted(250, Place(1, 0, is_one=False), gap_wait_ms=10) as (received, send):
        send([header(300)])
        until(lambda: received.receiver.expected == 300, "the heartbeat", 20)
        assert wholes(received.events()) == [(Kind.CLEAR, TODAY, 0), (Kind.GAP, 1, 299)]


@pytest.mark.parametrize("begin", ["first", "next", None])
def test_what_both_lines_lost_before_the_first_packet_seen(begin: str | None) -> None:
    """A session's sequences begin with 1, so that the loss can be told; who means to join in the middle is not told of it."""
    keys = {"begin": begin} if begin else {}
    with restarted(0, None, **keys, gap_wait_ms=10) as (received, send):
        send([header(50), header(52)])
        until(lambda: received.receiver.expected == 52, "the heartbeats", 20)
        told = wholes(received.events())
        missing = [sequence for _, first, last in told for sequence in range(first, last + 1)]
    assert {kind for kind, _, _ in told} == {Kind.GAP}
    assert missing == list(range(1 if begin == "first" else 50, 52))


def test_the_first_packets_of_a_session_come_from_the_server(feed: list[tuple[int, bytes]], server: RerequestServer) -> None:
    with restarted(0, None, begin="first", rerequest=server.endpoint) as (received, send):
        send([payload for first, payload in feed if first >= 40])
        until(lambda: received.receiver.expected > MESSAGES, "the end of the session", 20)
        events = received.events()
        counters = received.receiver.counters()
    assert wholes(events) == []
    assert sorted(set(events["seq"].tolist())) == list(range(1, MESSAGES + 1))
    assert (counters["gaps"], counters["given_up"]) == (0, 0)


def test_a_session_joined_with_its_first_packet_has_no_gap(feed: list[tuple[int, bytes]]) -> None:
    with restarted(0, None, begin="first") as (received, send):
        send([payload for _, payload in feed])
        until(lambda: received.receiver.expected > MESSAGES, "the end of the session", 20)
        assert wholes(received.events()) == []


def test_a_damaged_first_packet_is_dropped_and_counted() -> None:
    """It would make everything that comes after it old."""
    with restarted(0, None) as (received, send):
        send([header((1 << 63) + 5), header(1 << 50), header(7)])
        until(lambda: received.receiver.expected == 7, "the good one", 20)
        assert received.receiver.counters()["malformed"] == 2


# ---------------------------------------------------------------- protocols whose orders are followed


ORDERS = {"data_format": "jnx_itch", "framing": "moldudp64"}


def test_who_joins_in_the_middle_of_a_session_and_does_not_know_the_orders_is_told_so() -> None:
    """At once, whether or not anybody could be asked."""
    with restarted(0, None, **ORDERS, rerequest="udp://127.0.0.1:9", gap_wait_ms=60_000) as (received, send):
        send([header(50)])
        until(lambda: received.receiver.expected == 50, "the heartbeat", 20)
        assert wholes(received.events()) == [(Kind.GAP, 1, 49)]
        assert received.receiver.counters()["requests"] == 0


def test_who_begins_with_a_session_knows_its_orders() -> None:
    with restarted(0, None, **ORDERS) as (received, send):
        send([header(1)])
        until(lambda: received.receiver.expected == 1, "the heartbeat", 20)
        assert wholes(received.events()) == []


@pytest.mark.parametrize("seen", [50, 60])
def test_after_a_restart_the_orders_are_not_known(seen: int) -> None:
    """Also where nothing else was missed; nobody is asked for the last message, which the journal has."""
    with restarted(49, None, **ORDERS, rerequest="udp://127.0.0.1:9", rerequest_tries=1) as (received, send):
        assert not received.receiver.go_on_at(Place(20, TODAY, is_one=True))
        send([header(seen)])
        until(lambda: received.receiver.expected == seen, "the heartbeat", 20)
        expected = [(Kind.GAP, 49, 49)] + ([(Kind.GAP, 50, seen - 1)] if seen > 50 else [])
        assert wholes(received.events()) == expected


# ---------------------------------------------------------------- shards that get nothing


def test_a_shard_that_gets_nothing_is_told_how_far_the_source_has_come() -> None:
    """Else a restart would ask for everything since its last event."""
    table = InstrumentTable(8, 2)
    for symbol in "ABCDEFGH":
        table.intern(symbol, 0, 1, 0)
    mine = int(np.flatnonzero(table.arrays.records["shard"][: len(table)] == 1)[0])
    with Ring.create(None, 1 << 15, EVENT) as idle, Ring.create(None, 1 << 15, EVENT) as busy:
        readers = [ring.reader("test") for ring in (idle, busy)]
        router = make_router((idle.arrays, busy.arrays), table.arrays.records, np.zeros(1, np.int64), 3, IDLE_MODES["yield"])
        router.settings[S_MARKS] = 1
        for first in range(1, 3 * MARK_EVERY, 128):
            batch = np.zeros(128, EVENT)
            batch["seq"], batch["kind"], batch["instrument"] = np.arange(first, first + 128), Kind.ADD, mine
            batch["ts_recv"] = now_ns()
            assert route_now(router, batch, 0, 128)
        told, taken = (reader.read(1 << 15).view(EVENT) for reader in readers)
    assert set(told["kind"].tolist()) == {Kind.CODE}
    assert (told["instrument"] == ALL_INSTRUMENTS).all()
    assert told["price"].tolist() == [3] * len(told)
    assert told["id"].tolist() == [0] * len(told)
    assert (np.diff(told["seq"].astype(np.int64)) == MARK_EVERY).all()
    assert len(told) == 3
    assert not (taken["kind"] == Kind.CODE).any()


# ---------------------------------------------------------------- a whole node


async def _forget(url: str, name: str) -> None:
    """The streams hold nothing: what was made of the events that a crash took had not been delivered."""
    client = await nats.connect(url)
    try:
        for shard in range(2):
            with contextlib.suppress(NotFoundError):
                await client.jetstream().delete_stream(stream_name(name, shard))
    finally:
        await client.close()


def test_a_crash_that_cut_two_journals_at_different_places_loses_nothing_that_the_server_has(
    nats_server: NatsServer,  # noqa: F811
    cluster: str,  # noqa: F811
    tmp_path: Path,
    feed: list[tuple[int, bytes]],
    server: RerequestServer,
) -> None:
    """And gives no shard twice what its journal has; the quieter shard's journal lacks most."""
    lines = simulated(MESSAGES, mtu_bytes=400)
    for _ in lines.batches():
        pass
    endpoints = free_endpoints()
    source = multicast_source(endpoints) + f'rerequest = "{server.endpoint}"\n'
    config = node_config(cluster, tmp_path, source, cluster_extra="shards = 2")
    half = next(first for first, _ in feed if first >= MESSAGES // 2)
    with line_to(endpoints[0]) as send:
        with running(config, nats_server.url) as node:
            send([payload for first, payload in feed if first < half])
            until(lambda: node.receivers[0].expected == half and node.drained(), "half of it")
            folders = [journal.folder for journal in node.journals]
            ends = [journal.next_sequence for journal in node.journals]
        asyncio.run(_forget(nats_server.url, cluster))
        for folder, end, cut in zip(folders, ends, (3, 15)):
            truncate(folder, end - cut)
        with running(config, nats_server.url) as node:
            send([payload for first, payload in feed if first >= half + 40])
            until(lambda: node.receivers[0].expected > MESSAGES and node.drained(), "the end of the session")
            assert_true(node, dict(lines.simulator.truth(10_000)))
            counters = node.receivers[0].counters()
    assert (counters["gaps"], counters["given_up"]) == (0, 0)
    assert counters["recovered"] > 40
    whole = [np.concatenate(list(JournalReader(folder).batches())) for folder in folders]
    for events in whole:
        messages = events[(events["seq"] > 0) & ~np.isin(events["kind"], (Kind.CODE, Kind.REFERENCE))]
        assert (np.diff(messages["seq"].astype(np.int64)) >= 0).all()
        assert len(np.unique(messages[["seq", "kind", "instrument", "id"]])) == len(messages)
