"""Plain TCP, NATS, files that grow, and adapters of one's own: each through its receiver, and two of them in a node."""

# ruff: noqa: F811 (fixtures)

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import nats
import numpy as np
import pytest
from nats_fixtures import ConfiguredServer, nats_server, own_nats_server  # noqa: F401
from nodes import SYMBOLS, books, cluster, finish, node_config, node_text, running, until  # noqa: F401
from replays import OKX, recording
from sources import FAST, RawServer, WebServer, assert_same_events, file_events, opened, receiving, source_config
from test_websocket_source import payloads, stay, websocket

from tickmesh.control.config import ConfigError, parse_config
from tickmesh.node.continuation import Place
from tickmesh.node.event import EventArray, Flag, Kind
from tickmesh.node.process import Node
from tickmesh.node.reader import SourceError
from tickmesh.node.reload import ChangeRefused
from tickmesh.ops.servers import NatsServer
from tickmesh.ops.simulated_lines import LineConfig, SimulatedLines
from tickmesh.ops.simulator import Simulator, SimulatorConfig, generate
from tickmesh.transports.connection import Backoff, SecretMissing, client_tls, read_secret

TRADES = 'data_format = "json"\nevent = "trade"\nfields = { symbol = "s", price = "p", qty = "q", id = "i" }\n'
MESSAGES = 3000


def trade(number: int) -> bytes:
    return json.dumps({"s": "AAA", "p": "1.5", "q": "2", "i": number}).encode()


@pytest.fixture(scope="module")
def image() -> Any:
    return generate(SimulatorConfig(seed=3, symbols=len(SYMBOLS), rate=10_000, messages=MESSAGES, names=SYMBOLS))


@pytest.fixture(scope="module")
def from_file(image: Any, tmp_path_factory: pytest.TempPathFactory) -> EventArray:
    path = tmp_path_factory.mktemp("day") / "day.itch"
    path.write_bytes(image.tobytes())
    return file_events("itch50", path)


def ids(events: EventArray) -> list[int]:
    found: list[int] = events["id"][events["kind"] == Kind.TRADE].tolist()
    return found


# ---------------------------------------------------------------- plain TCP


def sends(*pieces: bytes, stays: bool = True) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if stays:
            await reader.read()
        else:
            writer.close()
            await writer.wait_closed()

    return answer


def tcp(port: int, format: str = 'data_format = "itch50"', more: str = "") -> str:
    return f'type = "tcp"\nendpoint = "tcp://127.0.0.1:{port}"\n{format}\n{FAST}{more}\n'


def test_length_prefixed_messages_in_pieces_of_any_size(image: Any, from_file: EventArray) -> None:
    data = image.tobytes()
    pieces = [data[at : at + 1 + at % 977] for at in _cuts(len(data))]
    with RawServer(sends(*pieces)) as server, receiving(tcp(server.port)) as received:
        found = received.wait(len(from_file))
        assert (received.counter("malformed"), received.counter("bytes")) == (0, len(data))
    assert_same_events(found, from_file)


def _cuts(size: int) -> list[int]:
    cuts, at = [], 0
    while at < size:
        cuts.append(at)
        at += 1 + at % 977
    return cuts


def test_a_connection_that_ends_within_a_message(image: Any) -> None:
    with RawServer(sends(image.tobytes()[:1001], stays=False)) as server, receiving(tcp(server.port)) as received:
        received.wait_for(reconnects=2, malformed=2, gaps=2)
        gaps = received.kinds(Kind.GAP)
    assert (gaps["id"] == 0).all()


def test_lines_over_tcp() -> None:
    text = b"".join(trade(n) + b"\n" for n in range(20))
    with RawServer(sends(text[:100], text[100:])) as server, receiving(tcp(server.port, TRADES)) as received:
        assert ids(received.wait(21)) == list(range(20))


TINY = """
[protocol]
name = "tiny"
byte_order = "big"
type_field = { offset = 0, type = "char" }
[instrument]
symbol = "symbol"
[messages.trade]
type = "T"
length = 13
fields.symbol = { offset = 1, type = "alpha:4" }
fields.price = { offset = 5, type = "u32", decimals = 4 }
fields.size = { offset = 9, type = "u32" }
event = { kind = "trade", price = "price", qty = "size" }
"""
LONG = """
[framing]
name = "long"
byte_order = "big"
carries = "stream"
[message]
length = { offset = 0, type = "u32" }
offset = 4
"""


def test_a_message_that_is_longer_than_allowed(tmp_path: Path) -> None:
    (tmp_path / "long.toml").write_text(LONG)
    endless = (1 << 31).to_bytes(4, "big") + bytes(200_000)
    (tmp_path / "tiny.toml").write_text(TINY)
    protocol = f'data_format = "{tmp_path}/tiny.toml"\nframing = "{tmp_path}/long.toml"'
    more = "message_max_kb = 64\nbuffer_kb = 64\n"
    with RawServer(sends(endless)) as server, receiving(tcp(server.port, protocol, more), tmp_path) as received:
        received.wait_for(reconnects=2)
        assert "message_max_kb" in received.receiver._warned[0]
        assert len(received.receiver.intake._buffer) <= (64 << 10) + 64  # type: ignore[attr-defined]


def test_a_shard_without_room_holds_the_sender_up(image: Any, from_file: EventArray) -> None:
    with (
        RawServer(sends(image.tobytes())) as server,
        receiving(tcp(server.port, more="buffer_kb = 16\nmessage_max_kb = 16"), capacity=512) as received,
    ):
        received.wait_for(ring_full=1)
        assert received.receiver.intake.waiting_bytes <= 16 << 10
        found = received.wait(len(from_file))
    assert_same_events(found, from_file)


# ---------------------------------------------------------------- NATS


async def _publish(url: str, subject: str, messages: list[bytes], stream: str = "") -> None:
    client = await nats.connect(url)
    try:
        if stream:
            await client.jetstream().add_stream(name=stream, subjects=[subject])
        for message in messages:
            await (client.jetstream().publish(subject, message) if stream else client.publish(subject, message))
        await client.flush()
    finally:
        await client.close()


async def _jetstream(url: str, what: Callable[[Any], Coroutine[Any, Any, Any]]) -> None:
    client = await nats.connect(url)
    try:
        await what(client.jetstream())
    finally:
        await client.close()


def from_nats(url: str, more: str, format: str = TRADES) -> str:
    return f'type = "nats"\nendpoint = "{url}"\n{format}{FAST}{more}\n'


def test_a_subject(nats_server: NatsServer) -> None:
    with receiving(from_nats(nats_server.url, 'subject = "prices.>"')) as received:
        received.wait_for(connected=1)
        asyncio.run(_publish(nats_server.url, "prices.a", [trade(n) for n in range(100)]))
        assert ids(received.wait(101)) == list(range(100))


def test_a_subject_over_a_restarted_server(own_nats_server: NatsServer) -> None:
    with receiving(from_nats(own_nats_server.url, 'subject = "prices"')) as received:
        received.wait_for(connected=1)
        asyncio.run(_publish(own_nats_server.url, "prices", [trade(1)]))
        received.wait(2)
        own_nats_server.kill()
        received.wait_for(reconnects=1)
        own_nats_server.start()
        received.wait_for(connected=1)
        asyncio.run(_publish(own_nats_server.url, "prices", [trade(2)]))
        events = received.wait(4)
    assert events["kind"].tolist() == [Kind.REFERENCE, Kind.TRADE, Kind.GAP, Kind.TRADE]


def test_a_stream_is_gone_on_with_at_any_sequence(own_nats_server: NatsServer) -> None:
    url = own_nats_server.url
    asyncio.run(_publish(url, "p", [trade(n) for n in range(50)], "PRICES"))
    with receiving(from_nats(url, 'stream = "PRICES"')) as received:
        events = received.wait(51)
        assert ids(events) == list(range(50))
        assert events["seq"][1:].tolist() == list(range(1, 51))
        assert (received.receiver.expected, received.receiver.begun_at) == (51, 1)
        own_nats_server.kill()
        own_nats_server.start()
        asyncio.run(_publish(url, "p", [trade(n) for n in range(50, 60)], "PRICES"))
        assert ids(received.wait(61)) == list(range(60))
        assert received.counter("gaps") == 0
    with receiving(from_nats(url, 'stream = "PRICES"'), before=lambda r: r.receiver.resume({0: 0}, 40)) as received:
        events = received.wait(21)
        assert ids(events) == list(range(40, 60))
        assert received.receiver.begun_at == 41
    with receiving(from_nats(url, 'stream = "PRICES"\nbegin = "next"')) as received:
        received.wait_for(connected=1)
        asyncio.run(_publish(url, "p", [trade(60)], "PRICES"))
        assert ids(received.wait(2)) == [60]


def test_what_a_stream_does_not_keep_is_a_gap(nats_server: NatsServer) -> None:
    url = nats_server.url
    asyncio.run(_publish(url, "kept", [trade(n) for n in range(10)], "KEPT"))
    asyncio.run(_jetstream(url, lambda js: js.purge_stream("KEPT", seq=8)))
    with receiving(from_nats(url, 'stream = "KEPT"'), before=lambda r: r.receiver.resume({}, 3)) as received:
        events = received.wait(5)
        assert (received.counter("gaps"), received.counter("missing")) == (1, 4)
    assert events["kind"].tolist() == [Kind.GAP, Kind.REFERENCE, Kind.TRADE, Kind.TRADE, Kind.TRADE]
    assert (events[0]["id"], events[0]["aux"]) == (4, 7)
    assert events["seq"][1:].tolist() == [8, 8, 9, 10]


def test_a_stream_that_was_made_anew(nats_server: NatsServer) -> None:
    url = nats_server.url
    asyncio.run(_publish(url, "anew", [trade(n) for n in range(5)], "ANEW"))
    with receiving(from_nats(url, 'stream = "ANEW"'), before=lambda r: r.receiver.resume({}, 90)) as received:
        events = received.wait(7)
    assert events["kind"].tolist()[0] == Kind.CLEAR
    assert ids(events) == list(range(5))


def test_a_stream_that_was_made_anew_and_is_longer_now(nats_server: NatsServer) -> None:
    """A sequence says nothing in another stream of the same name: while the node was away, and while it reads."""
    url = nats_server.url
    asyncio.run(_publish(url, "again", [trade(n) for n in range(5)], "AGAIN"))
    with receiving(from_nats(url, 'stream = "AGAIN"')) as received:
        received.wait(6)
        before = Place(5, received.receiver.session, is_one=True)
        asyncio.run(_jetstream(url, lambda js: js.delete_stream("AGAIN")))
        asyncio.run(_publish(url, "again", [trade(n) for n in range(100, 120)], "AGAIN"))
        assert ids(received.wait(27)) == [*range(5), *range(100, 120)]
        assert (len(received.kinds(Kind.CLEAR)), received.counter("gaps")) == (1, 0)
        assert received.receiver.session not in (0, before.session)
        now = Place(5, received.receiver.session, is_one=True)
    for place, expected in ((before, [*range(100, 120)]), (now, [*range(104, 120)])):
        with receiving(from_nats(url, 'stream = "AGAIN"'), before=lambda r, place=place: r.receiver.go_on_at(place)) as received:  # type: ignore[misc]
            assert ids(received.wait(1 + int(place is before) + len(expected))) == expected
            assert (len(received.kinds(Kind.CLEAR)), received.counter("gaps")) == (int(place is before), 0)


def test_what_a_stream_deletes_before_it_is_read_is_a_gap_with_a_subject_too(nats_server: NatsServer) -> None:
    """Messages of other subjects are left out without a gap; those of ours that are purged while the shard has no room are one."""

    async def publish() -> None:
        client = await nats.connect(nats_server.url)
        try:
            await client.jetstream().add_stream(name="MIXED", subjects=["mixed.*"])
            for number in range(1, 2001):
                await client.publish("mixed.ours" if number % 2 else "mixed.theirs", trade(number))
            await client.flush()
        finally:
            await client.close()

    asyncio.run(publish())
    with receiving(
        from_nats(nats_server.url, 'stream = "MIXED"\nsubject = "mixed.ours"\nbuffer_kb = 16\nmessage_max_kb = 16\n'), capacity=256
    ) as received:
        received.wait_for(ring_full=1)
        assert received.counter("gaps") == 0
        asyncio.run(_jetstream(nats_server.url, lambda js: js.purge_stream("MIXED", seq=1900)))
        until(lambda: received.count() and 1999 in received.events["seq"], "the end")
        until(lambda: _gap_behind(received.made(), 1900), "the gap of what was purged")
        events = received.made()
    found = ids(events)
    before = [number for number in found if number < 1900]
    assert len(before) < 950
    assert found == [*range(1, 2 * len(before), 2), *range(1901, 2000, 2)]
    known = events[(events["kind"] == Kind.GAP) & (events["aux"] != 0)]
    assert (known["aux"] < 1900).all()


def _gap_behind(events: EventArray, sequence: int) -> bool:
    """Whether there is a gap behind the last event before this sequence."""
    (trades,) = np.nonzero((events["kind"] == Kind.TRADE) & (events["seq"] < sequence))
    return bool((events["kind"][trades[-1] :] == Kind.GAP).any())


def test_binary_messages_of_a_stream(nats_server: NatsServer, image: Any, from_file: EventArray) -> None:
    """Several protocol messages in each of the broker's: they have its sequence."""
    data, pieces, at = image.tobytes(), [], 0
    for _ in range(40):
        end = at
        for _ in range(7):
            end += 2 + int.from_bytes(data[end : end + 2], "big")
        pieces.append(data[at:end])
        at = end
    asyncio.run(_publish(nats_server.url, "itch", pieces, "ITCH"))
    with receiving(from_nats(nats_server.url, 'stream = "ITCH"', 'data_format = "itch50"\n')) as received:
        expected = from_file[: int(np.searchsorted(from_file["seq"], 280, "right"))]
        found = received.wait(len(expected))
        assert received.receiver.expected == 41
    assert found["seq"].tolist() == [(seq + 6) // 7 for seq in expected["seq"].tolist()]
    found["seq"] = expected["seq"]
    assert_same_events(found, expected)


def test_a_message_of_a_stream_that_finds_room_for_a_part(nats_server: NatsServer, image: Any, from_file: EventArray) -> None:
    """Its events have its sequence nevertheless: they are what a restart goes on with."""
    data, pieces, ends, at, number = image.tobytes(), [], [], 0, 0
    while len(pieces) < 12:
        end = at
        while end - at < 10_000:
            end += 2 + int.from_bytes(data[end : end + 2], "big")
            number += 1
        pieces.append(data[at:end])
        ends.append(number)
        at = end
    asyncio.run(_publish(nats_server.url, "large", pieces, "LARGE"))
    text = from_nats(nats_server.url, 'stream = "LARGE"', 'data_format = "itch50"\nbuffer_kb = 16\nmessage_max_kb = 16\n')
    with receiving(text, capacity=512) as received:
        received.wait_for(ring_full=1)
        expected = from_file[: int(np.searchsorted(from_file["seq"], number, "right"))]
        found = received.wait(len(expected))
        assert (received.counter("malformed"), received.receiver.expected) == (0, len(pieces) + 1)
    assert found["seq"].tolist() == (1 + np.searchsorted(ends, expected["seq"])).tolist()


def test_datagrams_over_a_subject(nats_server: NatsServer) -> None:
    """MoldUDP64 in a broker's messages: arbitrated by its own sequence; what is left out is a gap."""
    lines = SimulatedLines(Simulator(SimulatorConfig(seed=3, symbols=3, messages=2000)), LineConfig())
    sent = [bytes(batch.payload(k)) for batch in lines.batches() for k in batch.lines[0]]
    missing = len(sent) // 2
    first, count = (int.from_bytes(sent[missing][a:b], "big") for a, b in ((10, 18), (18, 20)))
    with receiving(from_nats(nats_server.url, 'subject = "mold"', 'data_format = "itch50"\nframing = "moldudp64"\n')) as received:
        received.wait_for(connected=1)
        asyncio.run(_publish(nats_server.url, "mold", [*sent[:missing], *sent[missing + 1 :], *sent[:10]]))
        received.wait_for(packets=len(sent) + 9, gaps=1, duplicates=10)
        (gap,) = received.kinds(Kind.GAP)
        assert (gap["id"], gap["aux"]) == (first, first + count - 1)
    with pytest.raises(SourceError, match="datagrams have sequences of their own"):
        opened(source_config(from_nats(nats_server.url, 'stream = "MOLD"', 'data_format = "itch50"\nframing = "moldudp64"\n')))


def test_a_stream_that_is_not_there_and_a_login_that_is_refused(
    nats_server: NatsServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with receiving(from_nats(nats_server.url, 'stream = "NOWHERE"')) as received:
        received.wait_for(connect_failures=1)
        assert "there is no stream NOWHERE" in received.receiver._warned[0]
    monkeypatch.setenv("FEED_TOKEN", "wrong-one")
    with (
        ConfiguredServer(tmp_path, 'authorization { token: "right" }\n') as guarded,
        receiving(from_nats(guarded.url, 'subject = "x"\ntoken_env = "FEED_TOKEN"')) as received,
    ):
        received.wait_for(connect_failures=1)
        assert "refused" in received.receiver._warned[0]
        assert "wrong-one" not in received.receiver._warned[0]


# ---------------------------------------------------------------- files that grow


def followed(path: Path, format: str = TRADES) -> str:
    return f'type = "file"\npath = "{path}"\nfollow = true\n{format}\n'


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_a_file_that_grows_is_rotated_and_shortened(tmp_path: Path) -> None:
    path = tmp_path / "trades.jsonl"
    with receiving(followed(path)) as received:  # it is not there yet
        append(path, trade(1) + b"\n" + trade(2)[:9])
        received.wait(2)
        append(path, trade(2)[9:] + b"\n")
        assert ids(received.wait(3)) == [1, 2]
        path.rename(tmp_path / "trades.jsonl.1")
        append(tmp_path / "trades.jsonl.1", trade(3) + b"\n")  # its writer has not noticed yet
        append(path, trade(4) + b"\n")
        assert ids(received.wait(5)) == [1, 2, 3, 4]
        assert not len(received.kinds(Kind.GAP))
        os.truncate(path, 0)
        until(lambda: received.receiver.sink.counts["truncations"] == 1, "it is seen")
        append(path, trade(5) + b"\n")
        events = received.wait(7)
        assert (received.counter("malformed"), received.receiver.sink.counts["rotations"]) == (0, 1)
    assert ids(events) == [1, 2, 3, 4, 5]
    assert events["kind"].tolist()[-2:] == [Kind.GAP, Kind.TRADE]


def test_recorded_times_and_earlier_files(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"1700000000000000001 " + trade(1) + b"\n")
    second.write_bytes(b"1700000000000000002: " + trade(2) + b"\nnonsense\n")
    text = followed(second).replace(f'"{second}"', f'["{first}", "{second}"]')
    with receiving(text) as received:
        events = received.wait(3)
        received.wait_for(malformed=1)
    assert events["ts_recv"][1:].tolist() == [1700000000000000001, 1700000000000000002]


def test_a_binary_file_that_grows(tmp_path: Path, image: Any, from_file: EventArray) -> None:
    path, data = tmp_path / "day.itch", image.tobytes()
    path.write_bytes(data[: len(data) // 3])
    with receiving(followed(path, 'data_format = "itch50"')) as received:
        received.wait(100)
        append(path, data[len(data) // 3 :])
        found = received.wait(len(from_file))
    assert_same_events(found, from_file)


def test_files_that_cannot_be_followed(tmp_path: Path) -> None:
    packed = tmp_path / "x.gz"
    packed.write_bytes(b"\x1f\x8b\x08\x00rest")
    with pytest.raises(SourceError, match="compressed"):
        opened(source_config(followed(packed)))
    with pytest.raises(SourceError, match="name its columns"):
        opened(
            source_config(
                followed(tmp_path / "x.csv", 'data_format = "csv"\nevent = "trade"\nfields = { symbol = "s", price = "p", qty = "q" }')
            )
        )
    with pytest.raises(SourceError, match="whole files"):
        opened(source_config(followed(tmp_path / "x", 'data_format = "lobster"')))


def test_csv_that_grows(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("AAA,1.5,2\n")
    text = 'data_format = "csv"\ncolumns = ["s", "p", "q"]\nevent = "trade"\nfields = { symbol = "s", price = "p", qty = "q" }'
    with receiving(followed(path, text)) as received:
        received.wait(2)
        append(path, b"AAA,1.6,3\nbroken\n")
        events = received.wait(3)
        received.wait_for(malformed=1)
    assert events["price"][1:].tolist() == [1_500_000_000, 1_600_000_000]


# ---------------------------------------------------------------- adapters of one's own

OWN = '''
import asyncio

from tickmesh.node.adapters import Adapter, SourceEnded


class Countdown(Adapter):
    """Trades of its own making."""

    async def run(self) -> None:
        for number in range(self.options.options["count"], 0, -1):
            await self.sink(b'{"s": "AAA", "p": "1.5", "q": "2", "i": %d}' % number)
        raise SourceEnded


class Failing(Adapter):
    async def run(self) -> None:
        await self.sink(b'{"s": "AAA", "p": "1.5", "q": "2", "i": 1}')
        raise RuntimeError("a mistake")


class Stubborn(Adapter):
    async def run(self) -> None:
        self.sink.connected()
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                self.sink.count("cancelled")


def function() -> None:
    pass
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def custom(use: str, more: str = "") -> str:
    return f'type = "custom"\nuse = "{use}"\n{TRADES}{FAST}{more}\n'


def test_an_adapter_from_a_file(own: Path) -> None:
    with receiving(custom("own.py:Countdown", "options = { count = 5 }"), own) as received:
        assert ids(received.wait(6)) == [5, 4, 3, 2, 1]
        until(lambda: received.receiver.finished, "its end")


def test_an_adapter_of_an_installed_package(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = own / "site"
    (site / "countdown-1.dist-info").mkdir(parents=True)
    (site / "countdown.py").write_text(OWN)
    (site / "countdown-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: countdown\nVersion: 1\n")
    (site / "countdown-1.dist-info" / "entry_points.txt").write_text("[tickmesh.sources]\ncountdown = countdown:Countdown\n")
    monkeypatch.syspath_prepend(str(site))
    try:
        with receiving(custom("countdown", "options = { count = 3 }"), own) as received:
            assert ids(received.wait(4)) == [3, 2, 1]
        with pytest.raises(SourceError, match="did you mean 'countdown'"):
            opened(source_config(custom("countdwn"), own))
    finally:
        sys.modules.pop("countdown", None)


def test_a_mistake_in_an_adapter_ends_its_connection_only(own: Path) -> None:
    with receiving(custom("own.py:Failing"), own) as received:
        received.wait_for(reconnects=2)
        assert "the adapter has failed (RuntimeError: a mistake)" in received.receiver._warned[0]


def test_an_adapter_that_does_not_want_to_end(own: Path) -> None:
    with receiving(custom("own.py:Stubborn"), own) as received:
        received.wait_for(connected=1)


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("nothing", "no adapter of an installed package"),
        ("absent.py:X", "there is no file absent.py"),
        ("../own.py:Countdown", "only files there are loaded"),
        ("own.py:Nothing", "is no subclass"),
        ("own.py:function", "is no subclass"),
        ("wrong.py:X", "not valid Python"),
    ],
)
def test_adapters_that_cannot_be_used(own: Path, use: str, words: str) -> None:
    (own / "wrong.py").write_text("def (")
    with pytest.raises(SourceError, match=words):
        opened(source_config(custom(use), own))


# ---------------------------------------------------------------- backoff and secrets


def test_waits_double_with_jitter_up_to_the_longest() -> None:
    waits = Backoff(0.1, 2.0)
    found = [waits.next_s() for _ in range(8)]
    for number, wait_s in enumerate(found):
        longest = min(2.0, 0.1 * 2**number)
        assert longest / 2 <= wait_s <= longest
    waits.lasted(0.01)
    assert waits.attempt == 8  # it was gone at once
    waits.lasted(5.0)
    assert waits.next_s() <= 0.1
    assert waits.next_s(permanent=True) >= 1.0
    assert all(0 < Backoff(0.1, 30.0, attempt=n).next_s() <= 30.0 for n in range(0, 5000, 500))


def test_secrets(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("s3cret\nsecond line\n")
    assert read_secret(None, file) == "s3cret"
    assert read_secret("X", None, {"X": "y"}) == "y"
    assert read_secret(None, None) is None
    for variable, path, words in (("X", None, "is not set"), (None, tmp_path / "absent", "cannot be read")):
        with pytest.raises(SecretMissing, match=words):
            read_secret(variable, path, {})
    file.write_text("\n")
    with pytest.raises(SecretMissing, match="is empty"):
        read_secret(None, file)
    for files in ((file,), (None, file), (tmp_path / "absent",)):
        with pytest.raises(SecretMissing):
            client_tls(*files)


# ---------------------------------------------------------------- in a node


def test_a_venue_over_a_websocket_makes_the_books_of_its_recording(
    nats_server: NatsServer,
    cluster: str,
    tmp_path: Path,
) -> None:
    messages = payloads(recording(OKX))

    async def talk(socket: Any) -> None:
        await socket.receive()
        for payload in messages:
            await socket.send_str(payload.decode())
        await stay(socket)

    text = f'[data_sources.feed]\ntype = "file"\npath = "{recording(OKX)}"\ndata_format = "okx"\n'
    with running(node_config(f"{cluster}a", tmp_path / "a", text), nats_server.url) as node:
        finish(node)
        expected, events = books(node), node.receivers[0].routed()["events"]
    with WebServer({"/ws": websocket(talk)}) as server:
        text = f'[data_sources.feed]\ntype = "websocket"\nendpoint = "{server.ws}/ws"\ndata_format = "okx"\nsubscribe = ["x"]\n'
        with running(node_config(cluster, tmp_path / "b", text), nats_server.url) as node:
            until(lambda: node.receivers[0].routed()["events"] >= events and node.drained(), "the recording")
            until(lambda: books(node) == expected, "its books")


def okx(action: str, number: int) -> bytes:
    """A message of the venue's book."""
    data = {"bids": [["100", "1", "0", "1"]], "asks": [], "ts": "1", "seqId": number, "prevSeqId": number - 1}
    return json.dumps({"arg": {"channel": "books", "instId": "AAA"}, "action": action, "data": [data]}).encode()


def test_a_venues_books_over_a_stream_wait_for_their_snapshots(own_nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:
    """After a restart no message is missing, but the decoder knows no book: until a snapshot the book is stale, not silently behind."""
    url = own_nats_server.url
    asyncio.run(_publish(url, "okx", [okx("snapshot", 1), okx("update", 2)], "OKX"))
    source = from_nats(url, 'stream = "OKX"', 'data_format = "okx"\n')
    text = f"[data_sources.feed]\n{source}"
    config = node_config(cluster, tmp_path, text)
    with running(config, url) as node:
        until(lambda: node.receivers[0].expected == 3 and books(node).get("AAA", {}).get("bids"), "its book")
        assert not is_stale(node)
    asyncio.run(_publish(url, "okx", [okx("update", 3)]))
    with running(config, url) as node:
        until(lambda: node.receivers[0].expected == 4 and is_stale(node), "a stale book")
        asyncio.run(_publish(url, "okx", [okx("snapshot", 4)]))
        until(lambda: not is_stale(node), "its snapshot")


RESUMING = """
from tickmesh.node.adapters import Adapter
from tickmesh.transports.connection import ConnectionLost

class Resuming(Adapter):
    resumes = True

    async def run(self):
        number = self.sink.next_sequence or 1
        await self.sink.begin(number)
        if number <= 3:
            await self.sink(MESSAGES[number - 1], 0, number)
            raise ConnectionLost("here", "over")
        await __import__("asyncio").sleep(60)

MESSAGES = """


def test_a_venues_books_are_stale_after_a_connection_that_loses_nothing(tmp_path: Path) -> None:
    messages = [okx("snapshot", 1), okx("update", 2), okx("snapshot", 3)]
    (tmp_path / "resuming.py").write_text(f"{RESUMING}{messages!r}\n")
    text = f'type = "custom"\nuse = "resuming.py:Resuming"\ndata_format = "okx"\n{FAST}'
    with receiving(text, tmp_path) as received:
        received.wait_for(reconnects=3, gaps=3)
        kinds = received.made()["kind"].tolist()
    assert kinds == [Kind.REFERENCE, Kind.CLEAR, Kind.LEVEL, Kind.GAP, Kind.GAP, Kind.CLEAR, Kind.LEVEL, Kind.GAP]


def test_a_node_restarts_with_a_source_that_cannot_go_on(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:
    """What came in between is not known: the books are stale until their snapshots, which come with the connection."""
    snapshot = json.dumps({"type": "snapshot", "product_id": "AAA", "bids": [["1", "1"]], "asks": [["2", "1"]]})
    may_send = threading.Event()

    async def talk(socket: Any) -> None:
        while not may_send.is_set():
            await asyncio.sleep(0.005)
        await socket.send_str(snapshot)
        await stay(socket)

    with WebServer({"/ws": websocket(talk)}) as server:
        text = f'[data_sources.feed]\ntype = "websocket"\nendpoint = "{server.ws}/ws"\ndata_format = "coinbase"\nsymbols = ["AAA"]\n'
        config = node_config(cluster, tmp_path, text)
        may_send.set()
        with running(config, nats_server.url) as node:
            until(lambda: books(node).get("AAA", {}).get("asks"), "its snapshot")
            assert not is_stale(node)
        may_send.clear()
        with running(config, nats_server.url) as node:
            until(lambda: is_stale(node), "a stale book")
            assert books(node)["AAA"]["bids"]
            may_send.set()
            until(lambda: not is_stale(node), "its snapshot")


def is_stale(node: Node) -> bool:
    """Whether the book of the node's first instrument is."""
    return bool(node.shards[0].shard.arrays.books.sides["flags"][0] & Flag.STALE)


def test_changes_of_a_websocket_and_of_an_adapters_code_in_a_running_node(
    nats_server: NatsServer, cluster: str, tmp_path: Path, own: Path
) -> None:
    """A change begins the source anew; other code of the same adapter is a change too, and a secret that is missing none at all."""

    def config(more: str) -> Any:
        return parse_config(
            node_text(cluster, tmp_path, f"[data_sources.feed]\n{custom('own.py:Countdown', more)}"), file=own / "mesh.toml"
        )

    with running(config("options = { count = 3 }"), nats_server.url) as node:
        until(lambda: node.receivers[0].finished, "three trades")
        node.apply(config("options = { count = 5 }"), 1)
        until(lambda: node.receivers[0].finished and node.receivers[0].counters()["messages"] == 5, "five trades")
        (own / "own.py").write_text(OWN.replace('self.options.options["count"]', "7"))
        node.apply(config("options = { count = 5 }"), 2)
        until(lambda: node.receivers[0].finished and node.receivers[0].counters()["messages"] == 7, "seven trades")
        with pytest.raises(ChangeRefused, match="NOT_THERE is not set"):
            node.apply(parse_config(node_text(cluster, tmp_path, GUARDED)), 3)
        with pytest.raises(ChangeRefused, match=r"absent\.py cannot be read"):
            node.apply(_absent(cluster, tmp_path, own), 4)
        node.check()


GUARDED = '[data_sources.feed]\ntype = "websocket"\nendpoint = "ws://127.0.0.1:1/"\ntoken_env = "NOT_THERE"\n' + TRADES


def _absent(cluster: str, folder: Path, own: Path) -> Any:
    return parse_config(node_text(cluster, folder, f"[data_sources.feed]\n{custom('absent.py:X')}"), file=own / "mesh.toml")


def test_a_configuration_with_a_source_of_ones_own_takes_its_file_along(own: Path) -> None:
    from tickmesh.control.config_store import code_files

    config = source_config(custom("own.py:Countdown"), own)
    assert code_files(config) == {"own.py": ("data_sources", "feed", "use")}
    with pytest.raises(ConfigError, match=r"use.*is missing"):
        parse_config('[data_sources.feed]\ntype = "custom"\ndata_format = "json"\n')


# ---------------------------------------------------------------- the page that shows it


def test_the_adapter_of_the_documentation(tmp_path: Path) -> None:
    """The how-to's file and configuration, as they stand there, against a server that speaks the vendor's protocol."""
    page = (Path(__file__).parents[1] / "docs/howto/add-a-source.md").read_text()
    found = dict(re.findall(r"^```(python|toml)\n(.*?)^```", page[page.index("## A source of your own") :], re.MULTILINE | re.DOTALL)[:2])
    (tmp_path / "vendor.py").write_text(found["python"])
    keys: list[bytes] = []

    async def vendor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        keys.append(await reader.readline())
        writer.write(b"OK\n" if keys[-1] == b"KEY public\n" else b"NO\n")
        writer.write(b"AAA|1.5|100\nBBB|2.25|")
        await writer.drain()
        writer.write(b"7\nnonsense\n")
        await reader.read()

    with RawServer(vendor) as server:
        text = found["toml"].replace("[data_sources.vendor]", "").replace("7000", str(server.port))
        with receiving(text, tmp_path) as received:
            events = received.wait(4)
            received.wait_for(malformed=1)
        with receiving(text.replace('"public"', '"other"'), tmp_path) as received:
            received.wait_for(connect_failures=1)
            assert "the vendor does not know this key" in received.receiver._warned[0]
    assert events["kind"].tolist() == [Kind.REFERENCE, Kind.TRADE, Kind.REFERENCE, Kind.TRADE]
    assert events["price"][[1, 3]].tolist() == [1_500_000_000, 2_250_000_000]
    assert keys == [b"KEY public\n", b"KEY other\n"]
