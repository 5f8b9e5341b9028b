"""SoupBinTCP: the compiled way between packets and messages, and the client against our own server, with everything that can go wrong."""

# ruff: noqa: F811 (fixtures)

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nats
import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.js.errors import NotFoundError
from nats_fixtures import nats_server  # noqa: F401
from nodes import SYMBOLS, assert_true, assert_whole, books, cluster, node_config, outputs_made, running, stream, until  # noqa: F401
from sources import FAST, RawServer, Received, assert_same_events, file_events, opened, receiving, source_config
from typer.testing import CliRunner

from tickmesh.control.config import ConfigError
from tickmesh.node.adapters import session_number
from tickmesh.node.continuation import Place
from tickmesh.node.event import EventArray, Kind
from tickmesh.node.frames import stream_name
from tickmesh.node.journal import JournalReader, truncate
from tickmesh.node.process import Node
from tickmesh.node.reader import SourceError
from tickmesh.ops.servers import NatsServer
from tickmesh.ops.simulate_cmd import Outputs, run_simulation, simulate
from tickmesh.ops.simulator import Simulator, SimulatorConfig, generate
from tickmesh.ops.soupbintcp_server import ServerOptions, SoupBinTcpServer, feed_log, fill_log
from tickmesh.transports.connection import SecretMissing
from tickmesh.transports.soupbintcp import login_packet, packet
from tickmesh.transports.soupbintcp_packets import IGNORED_COUNT, SEQUENCED_COUNT, SKIP, SPLIT_AT, enframe, make_state, unframe

MESSAGES = 6000


@pytest.fixture(scope="module")
def day() -> SimulatorConfig:
    return SimulatorConfig(seed=3, symbols=len(SYMBOLS), rate=10_000, messages=MESSAGES, names=SYMBOLS)


@pytest.fixture(scope="module")
def image(day: SimulatorConfig) -> Any:
    return generate(day)


@pytest.fixture(scope="module")
def from_file(image: Any, tmp_path_factory: pytest.TempPathFactory) -> EventArray:
    """The events of the same day read from a file."""
    path = tmp_path_factory.mktemp("day") / "day.itch"
    path.write_bytes(image.tobytes())
    return file_events("itch50", path)


def body(port: int, more: str = "") -> str:
    return f'type = "tcp"\nendpoint = "tcp://127.0.0.1:{port}"\nframing = "soupbintcp"\ndata_format = "itch50"\n{FAST}{more}\n'


# ---------------------------------------------------------------- packets


def slow_unframe(data: bytes, skip: int = 0) -> tuple[bytes, int, int, int]:
    """The twin: messages behind their lengths, where it stopped, sequenced packets, others stepped over."""
    at, out, sequenced, ignored = 0, b"", 0, 0
    while at + 3 <= len(data):
        length = int.from_bytes(data[at : at + 2], "big")
        if length == 0 or at + 2 + length > len(data):
            break
        kind, payload = data[at + 2 : at + 3], data[at + 3 : at + 2 + length]
        if kind == b"S":
            sequenced += 1
            if sequenced > skip:
                payload = payload or b"\0"
                out += len(payload).to_bytes(2, "big") + payload
        elif kind in (b"H", b"+"):
            ignored += 1
        else:
            break
        at += 2 + length
    return out, at, sequenced, ignored


packets = st.lists(
    st.tuples(st.sampled_from([b"S", b"S", b"S", b"S", b"H", b"+", b"U", b"Z", b"A", b"?"]), st.binary(max_size=40)).map(
        lambda p: packet(*p)
    ),
    max_size=20,
)


@settings(max_examples=150, deadline=None)
@given(packets, st.binary(max_size=30), st.integers(0, 5))
def test_unframing_is_its_slow_twin(parts: list[bytes], noise: bytes, skip: int) -> None:
    data = b"".join(parts) + noise
    buffer, state = np.frombuffer(data + bytes(64), np.uint8).copy(), make_state()
    state[SKIP] = skip
    written = int(unframe(buffer, 0, len(data), state))
    out, at, sequenced, ignored = slow_unframe(data, skip)
    assert buffer[:written].tobytes() == out
    assert (state[SPLIT_AT], state[SEQUENCED_COUNT], state[IGNORED_COUNT]) == (at, sequenced, ignored)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=200), max_size=30), st.integers(4, 2000))
def test_enframing_and_unframing_give_the_messages_back(messages: list[bytes], room: int) -> None:
    image = b"".join(len(m).to_bytes(2, "big") + m for m in messages)
    source, out, state = np.frombuffer(image + bytes(64), np.uint8), np.zeros(room, np.uint8), make_state()
    count, written = enframe(source, 0, len(image), out)
    assert out[:written].tobytes() == b"".join(packet(b"S", m) for m in messages[:count])
    assert count == len(messages) or written + 3 + len(messages[count]) > room
    back = np.concatenate([out[:written], np.zeros(64, np.uint8)])
    end = int(unframe(back, 0, written, state))
    assert back[:end].tobytes() == image[:end]


# ---------------------------------------------------------------- the session


def test_the_session_is_the_file(image: Any, from_file: EventArray) -> None:
    with (
        SoupBinTcpServer(ServerOptions(user="me", password="secret"), fill_log(image)) as server,
        receiving(body(server.port, 'user = "me"\npassword_env = "SOUP_PASSWORD"')) as received,
    ):
        found = received.wait(len(from_file))
        assert (received.counter("messages"), received.counter("malformed"), received.counter("gaps")) == (MESSAGES, 0, 0)
        assert received.receiver.expected == MESSAGES + 1
        assert (received.receiver.begun_at, received.receiver.session) == (1, session_number("TICKMESH"))
    assert_same_events(found, from_file)
    assert np.all(found["ts_recv"] > 0)


@pytest.fixture(autouse=True)
def password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOUP_PASSWORD", "secret")


@pytest.mark.parametrize("seed", [1, 2])
def test_forced_disconnects_lose_and_double_nothing(image: Any, from_file: EventArray, seed: int) -> None:
    with (
        SoupBinTcpServer(ServerOptions(disconnect_every=150, seed=seed), fill_log(image)) as server,
        receiving(body(server.port)) as received,
    ):
        found = received.wait(len(from_file))
        assert server.disconnects > MESSAGES // 400, f"seed {seed}"
        assert received.counter("reconnects") == server.disconnects
        assert (received.counter("gaps"), received.counter("malformed")) == (0, 0)
    assert_same_events(found, from_file)


def test_it_goes_on_after_a_restart_where_the_journal_ends(image: Any, from_file: EventArray) -> None:
    cut = 2000
    with (
        SoupBinTcpServer(ServerOptions(), fill_log(image)) as server,
        receiving(body(server.port), before=lambda r: r.receiver.resume({}, cut)) as received,
    ):
        until(lambda: received.receiver.expected == MESSAGES + 1, "the end")
        events = received.made()
        assert (received.receiver.begun_at, received.counter("gaps")) == (cut + 1, 0)
    later = from_file[from_file["seq"] > cut]
    found = events[events["kind"] != Kind.REFERENCE]
    assert found["seq"].tolist() == later["seq"][later["kind"] != Kind.REFERENCE].tolist()


def test_what_the_roles_ask_of_a_receiver(image: Any) -> None:
    """go_on_from moves the beginning as long as nothing has come; take_over goes on where the other has ended."""
    with SoupBinTcpServer(ServerOptions(), fill_log(image)) as server:

        def earlier(received: Received) -> None:
            received.receiver.resume({}, 500)
            received.receiver.go_on_from(301)

        with receiving(body(server.port), before=earlier) as first:
            until(lambda: first.receiver.expected == MESSAGES + 1, "the end")
            assert first.receiver.begun_at == 301
            first.receiver.go_on_from(7)
            assert first.receiver.expected == MESSAGES + 1
            second = opened(source_config(body(server.port, 'exclude = ["ALFA"]')))
            assert second.receiver.take_over(first.receiver)
            assert (second.receiver.expected, second.receiver.session) == (MESSAGES + 1, session_number("TICKMESH"))
            second.ring.close()


def test_a_takeover_while_a_login_is_under_way_doubles_nothing() -> None:
    """What the login asked for is not what the journal lacks any more: it is asked for again."""
    asked: list[int] = []
    may_answer = threading.Event()

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readexactly(49)
        asked.append(int(head[-20:].decode()))
        while not may_answer.is_set():
            await asyncio.sleep(0.005)
        count = max(0, 60 - asked[-1] + 1)
        writer.write(accept(asked[-1]) + packet(b"S", b"S" + bytes(11)) * count)
        await reader.read()

    with RawServer(answers) as server, receiving(body(server.port)) as received:
        until(lambda: asked, "a login")
        received.receiver.go_on_from(50)
        may_answer.set()
        until(lambda: received.receiver.expected == 61, "the end")
        events = received.made()
        assert (asked, received.receiver.begun_at, received.counter("gaps")) == ([1, 50], 50, 0)
    assert events["seq"].tolist() == list(range(50, 61))


def test_a_server_that_begins_later_leaves_a_gap(image: Any) -> None:
    """A server that has nothing as old as what we need says so by its answer."""

    async def begins_at_100(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(49)
        writer.write(packet(b"A", b"S1".rjust(10) + b"100".rjust(20)) + packet(b"S", b"S" + bytes(11)))
        await reader.read()

    with RawServer(begins_at_100) as server, receiving(body(server.port), before=lambda r: r.receiver.resume({}, 49)) as received:
        events = received.wait(2)
        assert (received.counter("gaps"), received.counter("missing")) == (1, 50)
    assert events["kind"].tolist() == [Kind.GAP, Kind.SYSTEM]
    assert (events[0]["id"], events[0]["aux"], events[0]["qty"], events[1]["seq"]) == (50, 99, 50, 100)


def test_a_new_session_is_read_from_its_beginning(image: Any, from_file: EventArray) -> None:
    half = int(fill_log(image).offset(MESSAGES // 2))
    with SoupBinTcpServer(ServerOptions(session="MONDAY"), fill_log(image[:half])) as server, receiving(body(server.port)) as received:
        until(lambda: received.receiver.expected == MESSAGES // 2, "half of it")
        server.restart("TUESDAY", fill_log(image))
        until(lambda: received.receiver.expected == MESSAGES + 1, "the other session")
        events = received.made()
        assert received.counter("gaps") == 0
        assert received.receiver.session == session_number("TUESDAY")
    (at,) = np.flatnonzero(events["kind"] == Kind.CLEAR)
    assert events[at]["id"] == session_number("TUESDAY")
    after = events[at + 1 :]
    assert after["seq"].tolist() == from_file["seq"][from_file["kind"] != Kind.REFERENCE].tolist()


def test_a_restart_in_a_longer_session_is_read_from_its_beginning(image: Any, from_file: EventArray) -> None:
    """Yesterday's sequence is a place in today's session too: only the session's name tells them apart."""
    yesterday = Place(1000, session_number("MONDAY"), is_one=True)
    with (
        SoupBinTcpServer(ServerOptions(session="TUESDAY"), fill_log(image)) as server,
        receiving(body(server.port), before=lambda r: r.receiver.go_on_at(yesterday)) as received,
    ):
        until(lambda: received.receiver.expected == MESSAGES + 1, "all of it")
        events = received.made()
        assert (received.counter("gaps"), received.receiver.session) == (0, session_number("TUESDAY"))
    assert (events[0]["kind"], events[0]["id"]) == (Kind.CLEAR, session_number("TUESDAY"))
    assert_same_events(events[1:], from_file)


def test_journals_that_end_in_different_sessions_begin_anew(image: Any, from_file: EventArray) -> None:
    with (
        SoupBinTcpServer(ServerOptions(), fill_log(image)) as server,
        receiving(body(server.port), before=lambda r: r.receiver.go_on_at(Place(1, 0, is_one=False))) as received,
    ):
        events = received.wait(1 + len(from_file))
    assert events[0]["kind"] == Kind.CLEAR
    assert_same_events(events[1:], from_file)


def test_a_sequence_that_starts_again_is_a_new_beginning(image: Any) -> None:
    quarter = int(fill_log(image).offset(MESSAGES // 4))
    with SoupBinTcpServer(ServerOptions(), fill_log(image)) as server, receiving(body(server.port)) as received:
        until(lambda: received.receiver.expected == MESSAGES + 1, "all of it")
        server.restart("TICKMESH")  # the same name, and nothing in it yet
        until(lambda: received.counter("reconnects") >= 1 and received.receiver.expected == 1, "the beginning")
        server.log.append(image, quarter)
        until(lambda: received.receiver.expected == MESSAGES // 4, "a quarter")
        assert len(received.kinds(Kind.CLEAR)) == 1


def test_a_server_that_is_behind_doubles_nothing(image: Any, from_file: EventArray) -> None:
    """Another server of the same session, which has not got all of it yet."""
    half = int(fill_log(image).offset(MESSAGES // 2))
    with SoupBinTcpServer(ServerOptions(), fill_log(image)) as server, receiving(body(server.port)) as received:
        until(lambda: received.receiver.expected == MESSAGES + 1, "all of it")
        server.restart("TICKMESH", fill_log(image[:half]))
        until(lambda: server.logins == 2, "another login")
        server.log.append(image[half:], len(image) - half)
        server.log.append(np.frombuffer(packet(b"S")[:2] + b"S" + bytes(0), np.uint8), 3)
        until(lambda: received.receiver.expected == MESSAGES + 2, "the one message after it")
        events = received.made()
    assert len(events) == len(from_file)
    assert_same_events(events, from_file)


def test_the_end_of_a_session_is_waited_out(image: Any) -> None:
    with SoupBinTcpServer(ServerOptions(), fill_log(image)) as server, receiving(body(server.port)) as received:
        until(lambda: received.receiver.expected == MESSAGES + 1, "all of it")
        server.end()
        received.wait_for(reconnects=2)
        assert (received.counter("gaps"), received.receiver.finished) == (0, False)


def test_only_what_comes_from_now_on(image: Any) -> None:
    with SoupBinTcpServer(ServerOptions(), fill_log(image)) as server, receiving(body(server.port, 'begin = "next"')) as received:
        received.wait_for(connected=1)
        assert received.receiver.expected == MESSAGES + 1
        assert not len(received.made())


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(("more", "words"), [('user = "me"\npassword_env = "WRONG"', "password"), ("", "user")])
def test_a_refused_login_is_said_and_not_hammered(image: Any, more: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WRONG", "wrong")
    with SoupBinTcpServer(ServerOptions(user="me", password="secret"), fill_log(image)) as server:
        slow = body(server.port, more).replace("reconnect_max_ms = 20", "reconnect_max_ms = 60000")
        with receiving(slow) as received:
            received.wait_for(connect_failures=1)
            reason = received.receiver._warned[0]
            assert "refused" in reason
            assert words in reason
            assert "wrong" not in reason
        assert server.refused == 1  # the next try is half a minute away


def test_secrets_and_texts_are_checked_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(SecretMissing, match="NOT_THERE is not set: export it"):
        opened(source_config(body(1, 'user = "me"\npassword_env = "NOT_THERE"')))
    (tmp_path / "password").write_text("far too long for SoupBinTCP\n")
    with pytest.raises(SourceError, match="at most 10 ASCII characters") as caught:
        opened(source_config(body(1, 'user = "me"\npassword_file = "password"'), tmp_path))
    assert "far too long" not in str(caught.value)
    with pytest.raises(SecretMissing, match="cannot be read"):
        opened(source_config(body(1, 'user = "me"\npassword_file = "absent"'), tmp_path))
    for wrong, words in (('overflow = "gap"', "must be block"), ('session = "elevenchars"', "must match")):
        with pytest.raises(ConfigError, match=words):
            source_config(body(1, wrong))
    assert len(login_packet("me", "secret", "", 1)) == 49


def accept(sequence: int = 1) -> bytes:
    return packet(b"A", b"S1".rjust(10) + str(sequence).rjust(20).encode())


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        packet(b"S", b"data before the login's answer"),
        packet(b"A", b"short"),
        packet(b"A", b"S1".rjust(10) + b"-5".rjust(20)),
        packet(b"A", b"S1".rjust(10) + b"9" * 20),
        b"\x00\x00\x00\x00",
        b"\xff\xff+" + bytes(100),
        b"",
        accept()[:20],
        packet(b"H") * 20,
    ],
)
def test_an_answer_that_is_none(answer: bytes) -> None:
    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(49)
        writer.write(answer)
        await writer.drain()
        await reader.read(1) if answer and not answer.startswith(packet(b"A")[:1]) else None

    with RawServer(answers) as server, receiving(body(server.port, "connect_timeout_ms = 200")) as received:
        received.wait_for(connect_failures=2)
        assert not len(received.made())


@pytest.mark.parametrize("noise", [b"\x00\x00\x00\x00", packet(b"A", b"again"), packet(b"?", b"x"), b"\xff\xff\x00"])
def test_packets_that_make_no_sense_end_the_connection(noise: bytes) -> None:
    sent = 0

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        head = await reader.readexactly(49)
        sequence = int(head[-20:].decode())
        sent = max(sent, sequence)
        writer.write(accept(sequence) + packet(b"S", b"S" + bytes(11)) + noise)
        await reader.read(1)

    with RawServer(answers) as server, receiving(body(server.port)) as received:
        received.wait_for(reconnects=3)
        events = received.made()
        assert received.counter("gaps") == 0
    assert events["seq"].tolist() == list(range(1, len(events) + 1))
    assert sent >= 3


def test_unsequenced_empty_and_debug_packets_in_between() -> None:
    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(49)
        message = packet(b"S", b"S" + bytes(11))
        between = packet(b"+", b"debug") + packet(b"H") + packet(b"U", b"private") + packet(b"U", b"again")
        for piece in (accept() + message + between + message, packet(b"S"), between + message):
            for at in range(0, len(piece), 5):  # in small pieces
                writer.write(piece[at : at + 5])
                await writer.drain()
        await reader.read()

    with RawServer(answers) as server, receiving(body(server.port)) as received:
        events = received.wait(3)
        assert (received.counter("malformed"), received.counter("reconnects")) == (1, 0)
        assert received.receiver.expected == 5
    assert events["seq"].tolist() == [1, 2, 4]  # the empty one was the third


def test_a_server_that_hangs_is_given_up(image: Any, from_file: EventArray) -> None:
    with (
        SoupBinTcpServer(ServerOptions(heartbeat_s=0.02), fill_log(image[: len(image) // 2])) as server,
        receiving(body(server.port, "silence_ms = 150\nheartbeat_ms = 20")) as received,
    ):
        received.wait_for(messages=1000)
        threading.Event().wait(0.3)  # heartbeats alone keep it
        assert received.counter("reconnects") == 0
        server.silent = True
        received.wait_for(reconnects=2)
        server.silent = False
        rest = image[server.log.bytes :]
        server.log.append(rest, len(rest))
        found = received.wait(len(from_file))
    assert_same_events(found, from_file)


def test_random_bytes_after_the_login_never_end_the_source() -> None:
    draw = random.Random(9)

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readexactly(49)
        noise = b"".join(packet(b"S", draw.randbytes(draw.randint(0, 60))) for _ in range(50))
        writer.write(accept(int(head[-20:].decode())) + noise + draw.randbytes(2000))
        await writer.drain()

    with RawServer(answers) as server, receiving(body(server.port)) as received:
        received.wait_for(reconnects=10)
        assert received.counter("malformed") > 100


# ---------------------------------------------------------------- the simulator, and a node


@pytest.fixture
def fed(day: SimulatorConfig) -> Iterator[tuple[SoupBinTcpServer, Simulator]]:
    """A server to which a simulated day comes beside, and which breaks connections off."""
    with SoupBinTcpServer(ServerOptions(disconnect_every=700, seed=4)) as server:
        simulator, stop = Simulator(day), threading.Event()
        feeding = threading.Thread(target=lambda: list(feed_log(simulator, server.log, 4.0, stop)))
        feeding.start()
        try:
            yield server, simulator
        finally:
            stop.set()
            feeding.join()


def until_true(node: Node, simulator: Simulator) -> None:
    """Wait until the whole day has come, and its books are the market's."""
    until(lambda: node.receivers[0].expected == MESSAGES + 1, "the whole day", 60)
    truth: Any = dict(simulator.truth(10_000))
    orders = sum(about["orders"] for about in truth.values())
    until(lambda: node.drained() and sum(about["orders"] for about in books(node).values()) == orders, "its last events")  # type: ignore[misc]
    assert_true(node, truth)


def test_a_node_has_the_books_of_the_market(
    nats_server: NatsServer,
    cluster: str,
    tmp_path: Path,
    fed: tuple[SoupBinTcpServer, Simulator],
) -> None:
    server, simulator = fed
    with running(node_config(cluster, tmp_path, source_named(server.port)), nats_server.url) as node:
        until_true(node, simulator)
        node.check()
        assert server.disconnects > 3

        def delivered() -> bool:
            return all(s["ring_lag"] == 0 and not s["in_flight"] for s in node.gateways["events"].status())

        until(delivered, "delivery")
        made = outputs_made(node)
        outputs, missing = stream(nats_server.url, cluster, made)
    assert not missing
    assert_whole(outputs[:made], made)


def source_named(port: int) -> str:
    return f"[data_sources.feed]\n{body(port)}"


def test_a_restarted_node_goes_on_from_its_journal(
    nats_server: NatsServer,
    cluster: str,
    tmp_path: Path,
    image: Any,
    day: SimulatorConfig,
) -> None:
    """Stopped in the middle of the session: what is missing is asked for, and the books are the market's."""
    half = int(fill_log(image).offset(MESSAGES // 2))
    simulator = Simulator(day)
    while not simulator.finished:
        simulator.next_block(4096)
    with SoupBinTcpServer(ServerOptions(), fill_log(image[:half])) as server:
        config = node_config(cluster, tmp_path, source_named(server.port))
        with running(config, nats_server.url) as node:
            until(lambda: node.receivers[0].expected == MESSAGES // 2 and node.drained(), "half of it")
        server.log.append(image[half:], len(image) - half)
        with running(config, nats_server.url) as node:
            until_true(node, simulator)
            assert node.receivers[0].begun_at in range(MESSAGES // 2 - 200, MESSAGES // 2)  # where the quietest shard ended
            assert node.receivers[0].counters()["gaps"] == 0


def test_what_a_crash_cut_off_one_shards_journal_comes_again(
    nats_server: NatsServer,
    cluster: str,
    tmp_path: Path,
    image: Any,
    day: SimulatorConfig,
) -> None:
    """The journals of two shards end at different messages, and within one: each gets what it lacks, and nothing twice."""
    half = int(fill_log(image).offset(MESSAGES // 2))
    simulator = Simulator(day)
    while not simulator.finished:
        simulator.next_block(4096)
    with SoupBinTcpServer(ServerOptions(), fill_log(image[:half])) as server:
        config = node_config(cluster, tmp_path, source_named(server.port), cluster_extra="shards = 2")
        with running(config, nats_server.url) as node:
            until(lambda: node.receivers[0].expected == MESSAGES // 2 and node.drained(), "half of it")
            folders = [journal.folder for journal in node.journals]
            ends = [journal.next_sequence for journal in node.journals]
        asyncio.run(_forget(nats_server.url, cluster))
        for folder, end, cut in zip(folders, ends, (3, 400)):
            truncate(folder, end - cut)
        server.log.append(image[half:], len(image) - half)
        with running(config, nats_server.url) as node:
            until_true(node, simulator)
            assert node.receivers[0].counters()["gaps"] == 0
            assert node.receivers[0].begun_at < MESSAGES // 2 - 200
        whole = [np.concatenate(list(JournalReader(folder).batches())) for folder in folders]
    for events in whole:
        messages = events[(events["seq"] > 0) & (events["kind"] != Kind.CODE)]
        assert (np.diff(messages["seq"].astype(np.int64)) >= 0).all()


async def _forget(url: str, cluster: str) -> None:
    """The streams know less than the journals: they hold what had been delivered when the node crashed."""
    client = await nats.connect(url)
    try:
        for shard in range(2):
            with contextlib.suppress(NotFoundError):  # nothing had been delivered
                await client.jetstream().delete_stream(stream_name(cluster, shard))
    finally:
        await client.close()


def test_a_restarted_node_knows_its_session(
    nats_server: NatsServer,
    cluster: str,
    tmp_path: Path,
    image: Any,
    day: SimulatorConfig,
) -> None:
    """While it was away the venue began another session, which is longer than the one that it knows."""
    quarter = int(fill_log(image).offset(MESSAGES // 4))
    simulator = Simulator(replace(day, seed=11))
    while not simulator.finished:
        simulator.next_block(4096)
    with SoupBinTcpServer(ServerOptions(session="MONDAY"), fill_log(image[:quarter])) as server:
        config = node_config(cluster, tmp_path, source_named(server.port))
        with running(config, nats_server.url) as node:
            until(lambda: node.receivers[0].expected == MESSAGES // 4 and node.drained(), "a quarter of it")
        server.restart("TUESDAY", fill_log(generate(replace(day, seed=11))))
        with running(config, nats_server.url) as node:
            until(lambda: node.receivers[0].expected == MESSAGES + 1 and node.drained(), "the other day")
            assert node.receivers[0].counters()["messages"] == MESSAGES
            truth: Any = dict(simulator.truth(10_000))
            found = books(node)
    for symbol, about in truth.items():
        assert (found[symbol]["bids"], found[symbol]["asks"]) == (about["bids"], about["asks"]), symbol


def test_a_source_is_added_changed_and_removed_live(
    nats_server: NatsServer,
    cluster: str,
    tmp_path: Path,
    image: Any,
) -> None:
    with SoupBinTcpServer(ServerOptions(), fill_log(image)) as one, SoupBinTcpServer(ServerOptions(), fill_log(image)) as two:

        def text(*ports: int, more: str = "") -> Any:
            sources = "".join(f"[data_sources.feed{n}]\n{body(port, more)}" for n, port in enumerate(ports))
            return node_config(cluster, tmp_path, sources)

        with running(text(one.port), nats_server.url) as node:
            until(lambda: node.receivers[0].expected == MESSAGES + 1, "one source")
            node.apply(text(one.port, two.port), 1)
            until(lambda: len(node.receivers) == 2 and node.receivers[1].expected == MESSAGES + 1 and node.drained(), "both")
            before = node.receivers[0]
            node.apply(text(one.port, two.port, more="silence_ms = 9000"), 2)
            until(lambda: node.receivers[0] is not before and node.receivers[0].expected == MESSAGES + 1, "taken over")
            assert node.receivers[0].counters()["messages"] == 0  # it had everything
            node.apply(text(two.port), 3)
            until(lambda: len(node.receivers) == 1, "one again")
            node.check()


def test_the_simulator_serves_its_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tickmesh simulate --soupbintcp`: a client gets every message of the summary."""
    monkeypatch.setenv("TICKMESH_SIMULATE_PASSWORD", "secret")
    stop, found, addresses = threading.Event(), dict[str, Any](), list[str]()
    outputs = Outputs(soupbintcp=ServerOptions(user="me", password="secret", disconnect_every=300), speed="max")
    config = SimulatorConfig(seed=8, symbols=3, messages=2000)
    thread = threading.Thread(target=lambda: found.update(run_simulation(config, outputs, stop=stop, listening=addresses.append)))
    thread.start()
    try:
        until(lambda: addresses, "the server")
        port = int(addresses[0].rpartition(":")[2])
        with receiving(body(port, 'user = "me"\npassword_env = "SOUP_PASSWORD"')) as received:
            until(lambda: received.receiver.expected == 2001, "the day")
    finally:
        stop.set()
        thread.join()
    assert (found["messages"], found["complete"], found["soupbintcp"]["refused"]) == (2000, True, 0)
    assert found["soupbintcp"]["disconnects"] >= 2
    assert len(found["sha256"]) == 64


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--soupbintcp", "70000"], "a port from 0 to 65535"),
        (["--soupbintcp", "0", "--user", "me"], "TICKMESH_SIMULATE_PASSWORD"),
        (["--soupbintcp", "0", "--disconnects", "-1"], "0 or more messages"),
        (["--soupbintcp", "0", "--listen", "192.0.2.1"], "cannot listen at 192.0.2.1"),
    ],
)
def test_options_of_the_simulators_server(arguments: list[str], words: str) -> None:
    app = typer.Typer()
    app.command()(simulate)
    result = CliRunner().invoke(app, ["--symbols", "3", "--messages", "2000", *arguments])
    assert result.exit_code in (1, 2)
    assert words in result.stderr
