"""What a source must not lose, double or hide when something goes wrong: overload, refused messages, rotated files, endless waits."""

# ruff: noqa: F811 (fixtures)

from __future__ import annotations

import asyncio
import gzip
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from aiohttp import web
from nats_fixtures import nats_server  # noqa: F401
from nodes import until
from sources import FAST, WebServer, opened, receiving, source_config
from test_coinbase_kraken import CHANGE, MATCH, SNAPSHOT, make, send
from test_more_sources import LONG, TINY, TRADES, _publish, append, custom, followed, from_nats, ids, trade
from test_websocket_source import body, stay, websocket

from tickmesh.node.adapters import AdapterReceiver
from tickmesh.node.connected_sources import FollowedFile
from tickmesh.node.event import EventArray, Kind
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.intake import Intake, make_intake
from tickmesh.node.logs import set_log_level
from tickmesh.node.reader import SourceError
from tickmesh.node.venues import book_again, venue_feed
from tickmesh.ops.servers import NatsServer
from tickmesh.transports.connection import BrokenProtocol
from tickmesh.transports.soupbintcp import Login
from tickmesh.transports.tail import Tail
from tickmesh.transports.web import EventStream, _Unpacked

# ---------------------------------------------------------------- intakes


def intake_of(text: str, **how: Any) -> Intake:
    options = source_config(f'type = "websocket"\nendpoint = "ws://127.0.0.1:1/"\n{text}').data_sources["feed"]
    return make_intake("feed", options, InstrumentTable(64), 0, stream=False, **how)


def all_of(intake: Intake) -> EventArray:
    found = []
    while len(events := intake.next()):
        found.append(events.copy())
    return np.concatenate(found)


def test_memory_that_the_caller_uses_again() -> None:
    intake, memory = intake_of(TRADES), bytearray(trade(1))
    intake.put(memory, 1, 0)
    memory[:] = trade(2)
    assert ids(all_of(intake)) == [1]


def test_many_messages_without_events() -> None:
    """Each is stepped over; how many there are does not matter."""
    intake = intake_of('data_format = "itch50"')
    for number in range(3000):
        intake.put(b"\x00\x01?", 1, number + 1)
    assert not len(intake.next())
    assert (intake.waiting_bytes, intake.next_sequence) == (0, 3001)


def test_a_datagram_that_is_too_long_to_be_one() -> None:
    """Its end is no other datagram."""
    intake, header = intake_of('data_format = "itch50"\nframing = "moldudp64"'), b"SESSION001" + (7).to_bytes(8, "big") + bytes(2)
    long = bytes(65_535) + header
    assert intake.put(long, 1, 0) == len(long)
    assert not len(intake.next())
    assert intake.counters()["malformed"] == 1


@pytest.mark.parametrize("overflow", ["drop_oldest", "gap"])
@pytest.mark.parametrize("source", ['"websocket"\nendpoint = "ws://127.0.0.1/"', '"nats"\nendpoint = "nats://127.0.0.1"\nsubject = "x"'])
def test_a_binary_stream_in_messages_cannot_lose_some(source: str, overflow: str) -> None:
    with pytest.raises(SourceError, match="leave overflow at block"):
        opened(source_config(f'type = {source}\ndata_format = "itch50"\noverflow = "{overflow}"'))


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ('type = "websocket"\nendpoint = "ws://127.0.0.1:1"\nsubscribe = ["{}"]\noverflow = "gap"', "leave overflow at block"),
        ('type = "nats"\nendpoint = "nats://127.0.0.1:1"\nstream = "FIX"', "sequences of their own"),
    ],
)
def test_fix_cannot_lose_some_nor_be_gone_on_with_by_another_count(keys: str, reason: str) -> None:
    with pytest.raises(SourceError, match=reason):
        opened(source_config(f'{keys}\ndata_format = "fix44"'))


# ---------------------------------------------------------------- NATS subjects


def assert_gaps_stand_where_something_is_missing(events: EventArray) -> None:
    last = -1
    for kind, number in zip(events["kind"].tolist(), events["id"].tolist()):
        if kind == Kind.GAP:
            last = -2
        elif kind == Kind.TRADE:
            assert last == -2 or number == last + 1, f"{number} follows {last}"
            last = number


def test_a_subject_that_is_too_fast(nats_server: NatsServer) -> None:
    """What there was no room for is a gap, where it is missing."""
    total = 4000
    with receiving(from_nats(nats_server.url, 'subject = "fast"\nbuffer_kb = 8'), capacity=256) as received:
        received.wait_for(connected=1)
        asyncio.run(_publish(nats_server.url, "fast", [trade(n) for n in range(total)]))
        received.wait_for(ring_full=1, overflowed=1)
        until(lambda: int(np.count_nonzero(received.events["kind"] == Kind.TRADE)) + received.counter("overflowed") == total, "all")
        asyncio.run(_publish(nats_server.url, "fast", [trade(total + 10)]))
        until(lambda: ids(received.events)[-1:] == [total + 10], "the last")
        gaps = len(received.kinds(Kind.GAP))
        made = received.made()
    assert gaps == received.counter("gaps") > 0
    assert_gaps_stand_where_something_is_missing(made[made["id"] != total + 10])


def test_a_broken_message_of_a_subject_ends_the_connection(nats_server: NatsServer, tmp_path: Path) -> None:
    (tmp_path / "long.toml").write_text(LONG)
    (tmp_path / "tiny.toml").write_text(TINY)
    protocol = f'data_format = "{tmp_path}/tiny.toml"\nframing = "{tmp_path}/long.toml"\n'
    endless = (1 << 31).to_bytes(4, "big") + bytes(60_000)
    with receiving(from_nats(nats_server.url, 'subject = "broken"\nmessage_max_kb = 64\nbuffer_kb = 64', protocol), tmp_path) as received:
        received.wait_for(connected=1)
        asyncio.run(_publish(nats_server.url, "broken", [endless]))
        received.wait_for(bytes=len(endless))
        asyncio.run(_publish(nats_server.url, "broken", [endless]))
        received.wait_for(reconnects=1, gaps=1)
        assert "message_max_kb" in received.receiver._warned[0]


GAPS_BESIDE = '''
import asyncio

from tickmesh.node.adapters import Adapter


class Beside(Adapter):
    """Says that there are gaps while a message is half taken."""

    async def run(self) -> None:
        data = open(self.options.options["file"], "rb").read()
        sending = asyncio.create_task(self.sink(data))
        ring = self.sink._receiver.context.rings[0]
        while not self.sink._receiver._blocked:
            await asyncio.sleep(0)
        while not sending.done():  # whenever the shard has just made room
            await (asyncio.sleep(0) if ring.lag else self.sink.gap())
        await sending
        await self.sink.gap()
        self.sink.count("done")
        await asyncio.sleep(3600)
'''


def test_a_gap_beside_a_message_that_waits(tmp_path: Path) -> None:
    """It comes behind the whole message, not into its middle."""
    from tickmesh.ops.simulator import SimulatorConfig, generate

    (tmp_path / "beside.py").write_text(GAPS_BESIDE)
    image = generate(SimulatorConfig(seed=3, symbols=3, rate=10_000, messages=4000, names=["A", "B", "C"]))
    (tmp_path / "day").write_bytes(image.tobytes())
    text = custom("beside.py:Beside", f'options = {{ file = "{tmp_path}/day" }}\nbuffer_kb = 1\nmessage_max_kb = 1')
    with receiving(text.replace(TRADES, 'data_format = "itch50"\n'), tmp_path, capacity=256) as received:
        until(lambda: received.count() and received.receiver.sink.counts.get("done"), "the gap")
        assert (received.counter("messages"), received.counter("malformed")) == (4000, 0)
        kinds = received.made()["kind"].tolist()
        assert set(kinds[kinds.index(Kind.GAP) :]) == {Kind.GAP}


# ---------------------------------------------------------------- Coinbase


def test_a_change_that_cannot_be_used_makes_its_book_stale() -> None:
    feed = make("coinbase", "quantity_exponent = 2")
    send(feed, SNAPSHOT, {**SNAPSHOT, "product_id": "C-D"})
    events = send(feed, {**CHANGE, "changes": [["buy", "10.6", "4.125"]]})
    assert events["kind"].tolist() == [Kind.GAP]
    assert (feed.malformed.total(), feed.snapshots_wanted) == (1, {"A-B"})
    assert not len(send(feed, CHANGE))
    assert send(feed, SNAPSHOT)["kind"].tolist()[0] == Kind.CLEAR
    assert send(feed, {**CHANGE, "product_id": 5})["kind"].tolist() == [Kind.GAP] * 2  # whose it was is not known
    assert not len(send(feed, {**CHANGE, "product_id": "E-F", "time": 1}))


def test_quantities_are_not_inferred_from_a_trade_that_comes_first() -> None:
    text = 'type = "websocket"\nendpoint = "wss://x.example"\ndata_format = "coinbase"\nsymbols = ["A-B"]'
    options = source_config(text).data_sources["feed"]
    feed = venue_feed(options, InstrumentTable(64))
    early = {**MATCH, "size": "12345678901"}
    events = send(feed, early, {**SNAPSHOT, "bids": [["10.5", "1.12345678"]]}, MATCH)
    assert events["kind"].tolist() == [Kind.REFERENCE, Kind.CLEAR, *[Kind.LEVEL] * 3, Kind.TRADE]
    assert (feed.counters["before_the_book"], feed.malformed.total()) == (1, 0)
    trades_only = options.model_copy(update={"channels": ["trade"]})
    assert send(venue_feed(trades_only, InstrumentTable(64)), MATCH)["kind"].tolist() == [Kind.REFERENCE, Kind.TRADE]


# ---------------------------------------------------------------- books that wait for snapshots


@pytest.mark.parametrize(
    ("message", "again"),
    [
        ({"op": "subscribe", "args": ["orderbook.200.A", "publicTrade.A", "orderbook.200.BA"]}, {"args": ["orderbook.200.A"]}),
        (
            {"op": "subscribe", "args": [{"channel": "books50-l2-tbt", "instId": "A"}, {"channel": "trades", "instId": "A"}]},
            {"args": [{"channel": "books50-l2-tbt", "instId": "A"}]},
        ),
        (
            {"type": "subscribe", "product_ids": ["A", "B"], "channels": ["level2", "matches"]},
            {"product_ids": ["A"], "channels": ["level2"]},
        ),
        (
            {"type": "subscribe", "channels": [{"name": "level2", "product_ids": ["A", "B"]}, {"name": "level2_50", "product_ids": ["B"]}]},
            {"product_ids": ["A"], "channels": ["level2"]},
        ),
        ({"event": "subscribe", "feed": "book", "product_ids": ["A", "B"]}, {"product_ids": ["A"]}),
        ({"event": "subscribe", "feed": "trade", "product_ids": ["A"]}, None),
        ({"op": "login", "args": ["orderbook.200.A"]}, None),
    ],
)
def test_a_book_is_subscribed_to_again_as_the_user_has_it(message: dict[str, Any], again: dict[str, Any] | None) -> None:
    found = [json.loads(text) for text in book_again(["hello", "[1]", json.dumps(message)], "A")]
    if again is None:
        assert found == []
        return
    verb = next(key for key, value in message.items() if value == "subscribe")
    assert found == [{**message, **again, verb: word} for word in ("unsubscribe", "subscribe")]


def test_a_gap_of_a_book_with_another_depth() -> None:
    heard: list[Any] = []

    def message(kind: str, number: int) -> str:
        data = {"s": "AAA", "b": [["1", "1"]], "a": [], "u": number}
        return json.dumps({"topic": "orderbook.200.AAA", "type": kind, "ts": 1, "data": data})

    async def talk(socket: web.WebSocketResponse) -> None:
        await socket.send_str(message("snapshot", 10))
        await socket.send_str(message("delta", 13))
        while True:
            heard.append(json.loads((await socket.receive()).data))

    mine = {"op": "subscribe", "args": ["orderbook.200.AAA"]}
    with WebServer({"/ws": websocket(talk)}) as server, receiving(body(server, "bybit", f"subscribe = ['{json.dumps(mine)}']")):
        until(lambda: len(heard) >= 3, "three messages")
    assert heard == [mine, {**mine, "op": "unsubscribe"}, mine]


def test_snapshots_that_wait_are_not_asked_for_again() -> None:
    depth = {"e": "depthUpdate", "E": 1, "s": "AAA", "U": 5, "u": 6, "b": [["1", "1"]], "a": []}
    snapshot = json.dumps({"lastUpdateId": 5, "bids": [["1", "1"]], "asks": [["2", "1"]]})
    asked = 0

    async def talk(socket: web.WebSocketResponse) -> None:
        await socket.send_str(json.dumps(depth))
        for number in range(400):  # they fill the ring
            await socket.send_str(json.dumps({"e": "trade", "E": 1, "T": 1, "s": "AAA", "p": "1", "q": "1", "t": number, "m": True}))
        await stay(socket)

    async def answer(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.Response(text=snapshot)

    with WebServer({"/x": websocket(talk), "/depth": answer}) as server:
        more = f'subscribe = ["x"]\nsnapshot_endpoint = "{server.http}/depth?symbol={{symbol}}"\nsnapshot_interval_ms = 1\n'
        with receiving(body(server, "binance", more, "/x"), capacity=256) as received:
            received.wait_for(ring_full=1)
            until(lambda: asked == 1, "the snapshot")
            looks = 0

            def looked() -> bool:
                nonlocal looks
                looks += 1
                return looks > 60

            until(looked, "some looks of 50 ms each", 10)
            assert asked == 1
            until(lambda: len(received.kinds(Kind.CLEAR)) == 1, "the book")
            assert received.receiver.intake.snapshots_waiting == 0


# ---------------------------------------------------------------- HTTP


def test_a_poll_after_a_lost_connection_asks_for_everything() -> None:
    async def answer(request: web.Request) -> web.Response:
        if len(server.requests) == 3:
            return web.Response(status=500)
        if "If-None-Match" in request.headers:
            return web.Response(status=304)
        return web.Response(text=trade(1).decode(), headers={"ETag": '"1"'})

    with WebServer({"/x": answer}) as server:
        text = f'type = "http"\nendpoint = "{server.http}/x"\n{TRADES}{FAST}poll_interval_ms = 5\n'
        with receiving(text) as received:
            events = received.wait(4)
    assert events["kind"].tolist()[:4] == [Kind.REFERENCE, Kind.TRADE, Kind.GAP, Kind.TRADE]


def test_a_gzip_body_of_several_members() -> None:
    parts = [b"a" * 100_000, b"", b"bc", b"d" * 70_000]
    packed = b"".join(gzip.compress(part) for part in parts)
    for size in (1, 7, len(packed)):
        unpacked = _Unpacked("x", "gzip", 1 << 20)
        assert b"".join(b"".join(unpacked(packed[at : at + size])) for at in range(0, len(packed), size)) == b"".join(parts)
    with pytest.raises(BrokenProtocol, match="more than"):
        _Unpacked("x", "gzip", 1 << 17)(gzip.compress(bytes(1 << 17)) * 3)
    with pytest.raises(BrokenProtocol, match="damaged"):
        _Unpacked("x", "deflate", 1 << 20)(zlib.compress(b"a") + b"more")


def waits(more: str = "") -> Callable[[float], float]:
    """How long a source waits if a server asks for so many seconds."""
    from tickmesh.transports.connection import Refused

    receiver: AdapterReceiver = opened(source_config(f'type = "http"\nendpoint = "http://x.example"\n{TRADES}{more}')).receiver
    return lambda asked_s: receiver._wait_s(Refused("x", "later", retry_after_s=asked_s))


def test_a_server_may_not_ask_for_any_wait() -> None:
    stream = EventStream(1 << 16)
    stream.feed(b"retry: 999999999\n\n")
    assert stream.retry_s is not None
    assert waits()(stream.retry_s) == 3600
    limited = waits("retry_after_max_ms = 5000")
    assert (limited(stream.retry_s), limited(2.0)) == (5.0, 2.0)


# ---------------------------------------------------------------- files that grow


def test_a_writer_that_has_not_noticed_the_rotation(tmp_path: Path) -> None:
    """logrotate's `create`: an empty new file, while the writer still has the old one."""
    path = tmp_path / "trades"
    with receiving(followed(path)) as received:
        append(path, trade(1) + b"\n")
        received.wait(2)
        path.rename(tmp_path / "trades.1")
        path.touch()
        tail = received.receiver.adapter._tail  # type: ignore[attr-defined]
        turns = 0

        def looked() -> bool:
            nonlocal turns
            turns += 1
            return turns > 20

        until(looked, "some looks")
        asyncio.run(asyncio.sleep(3 * tail._look_s))
        append(tmp_path / "trades.1", trade(2) + b"\n")
        append(path, trade(3) + b"\n")
        assert ids(received.wait(4)) == [1, 2, 3]
        assert not len(received.kinds(Kind.GAP))


def test_a_followed_file_that_cannot_be_read_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on where it was: nothing twice, nothing cut."""
    first, path, failing = tmp_path / "first", tmp_path / "trades", 0
    first.write_bytes(b"".join(trade(n) + b"\n" for n in range(3)))
    real = os.fstat

    def stale(descriptor: int) -> os.stat_result:
        nonlocal failing
        if failing:
            failing -= 1
            raise OSError(116, "Stale file handle")
        return real(descriptor)

    text = followed(path).replace(f'"{path}"', f'["{first}", "{path}"]')
    monkeypatch.setattr("tickmesh.transports.tail.os.fstat", stale)
    with receiving(text) as received:
        append(path, trade(3) + b"\n" + trade(4)[:5])
        received.wait(5)
        failing = 2
        until(lambda: not failing, "two failures")
        append(path, trade(4)[5:] + b"\n")
        assert ids(received.wait(6)) == [0, 1, 2, 3, 4]
        assert (received.counter("malformed"), received.counter("gaps"), received.counter("reconnects")) == (0, 0, 0)
        assert received.receiver.sink.counts["errors"] == 2


def test_a_file_that_was_replaced_while_it_could_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"one")

    async def check() -> None:
        tail = Tail(path)
        assert (await tail.next()).data == b"one"
        tail.close()
        append(path, b"two")
        assert (await tail.next()).data == b"two"
        tail.close()
        path.rename(tmp_path / "y")
        path.write_bytes(b"three")
        piece = await tail.next()
        assert (piece.fresh, piece.lost, tail.rotations) == (True, True, 1)
        assert (await tail.next()).data == b"three"
        tail.close()

    asyncio.run(check())


def test_a_followed_file_that_makes_no_sense_any_more(tmp_path: Path) -> None:
    """It ends, with a gap; it is not read again from its beginning."""
    (tmp_path / "long.toml").write_text(LONG)
    (tmp_path / "tiny.toml").write_text(TINY)
    path = tmp_path / "day"
    message = b"T" + b"AAAA" + (15_000).to_bytes(4, "big") + (2).to_bytes(4, "big")
    path.write_bytes(len(message).to_bytes(4, "big") + message + (1 << 31).to_bytes(4, "big") + bytes(200_000))
    protocol = f'data_format = "{tmp_path}/tiny.toml"\nframing = "{tmp_path}/long.toml"\nmessage_max_kb = 64\nbuffer_kb = 64'
    with receiving(followed(path, protocol), tmp_path) as received:
        until(lambda: received.receiver.finished, "its end")
        assert received.made()["kind"].tolist() == [Kind.REFERENCE, Kind.TRADE, Kind.GAP]


class _Counting:
    """Takes what an adapter hands on, as a sink whose shards always have room."""

    def __init__(self) -> None:
        self.pieces, self.counts = 0, dict[str, int]()

    async def __call__(self, data: bytes, recv_ns: int = 0, sequence: int = 0) -> None:
        self.pieces += 1

    async def begin_anew(self, *, lost: bool) -> None:
        pass


def test_a_long_file_leaves_room_for_others(tmp_path: Path) -> None:
    path, sink = tmp_path / "long", _Counting()
    path.touch()
    os.truncate(path, 64 << 20)
    options = source_config(followed(path)).data_sources["feed"]

    async def check() -> None:
        reading = asyncio.create_task(FollowedFile("feed", options, sink).run())  # type: ignore[arg-type]
        while sink.pieces == 0:
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait({reading})

    asyncio.run(check())
    assert sink.pieces < 64


# ---------------------------------------------------------------- secrets


def test_no_log_shows_a_secret(capsys: pytest.CaptureFixture[str]) -> None:
    before = structlog.get_config()
    try:
        structlog.reset_defaults()
        set_log_level("info")
        headers = {"Authorization": "Bearer s3cret"}
        try:
            raise RuntimeError(f"with {len(headers)} header")
        except RuntimeError:
            structlog.get_logger("x").exception("an adapter has failed")
    finally:
        structlog.configure(**before)
    shown = capsys.readouterr().err
    assert "RuntimeError: with 1 header" in shown
    assert "s3cret" not in shown
    assert "s3cret" not in repr(Login("h", 1, "me", "s3cret"))
