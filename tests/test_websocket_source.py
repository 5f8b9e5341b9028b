"""Websocket sources: venues' recordings from a local server, lost connections, snapshots by request, and servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import WSMsgType, web
from nats_logins import make_authority, make_certificate
from nodes import until
from replays import BINANCE, BYBIT, OKX, recording
from sources import FAST, RawServer, WebServer, assert_same_events, file_events, opened, receiving, source_config

from tickmesh.control.config import ConfigError
from tickmesh.node.event import Kind
from tickmesh.node.reader import SourceError
from tickmesh.transports.connection import SecretMissing
from tickmesh.transports.recording import read_lines

COINBASE, KRAKEN = "cryptofeed_ws/COINBASE.ws.28.0", "cryptofeed_ws/KRAKEN_FUTURES.ws.1.0"
Talk = Callable[[web.WebSocketResponse], Awaitable[None]]


def websocket(talk: Talk, *, compress: bool = True) -> Callable[[web.Request], Awaitable[web.WebSocketResponse]]:
    """A handler that talks over a websocket, then waits for the client to go."""

    async def handle(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(compress=compress, max_msg_size=0)
        await socket.prepare(request)
        with contextlib.suppress(ConnectionError):  # the client has gone
            await talk(socket)
        return socket

    return handle


async def stay(socket: web.WebSocketResponse) -> None:
    """Take what comes until the client goes."""
    async for _ in socket:
        pass


def body(server: WebServer, data_format: str, more: str = "", path: str = "/ws") -> str:
    return f'type = "websocket"\nendpoint = "{server.ws}{path}"\ndata_format = "{data_format}"\n{FAST}{more}\n'


# ---------------------------------------------------------------- venues


def payloads(path: Path) -> list[bytes]:
    return [payload for _, payload in read_lines(path)]


@pytest.mark.parametrize(
    ("data_format", "path", "symbols", "subscription"),
    [
        ("okx", OKX, ["BTC-USDT"],
         {"op": "subscribe", "args": [{"channel": "books", "instId": "BTC-USDT"}, {"channel": "trades", "instId": "BTC-USDT"}]}),
        ("bybit", BYBIT, ["XRPUSDT"], {"op": "subscribe", "args": ["orderbook.50.XRPUSDT", "publicTrade.XRPUSDT"]}),
        ("coinbase", COINBASE, ["SKL-GBP", "BAND-BTC"],
         {"type": "subscribe", "product_ids": ["SKL-GBP", "BAND-BTC"], "channels": ["level2_batch", "matches"]}),
        ("kraken_futures", KRAKEN, ["PI_XRPUSD"], {"event": "subscribe", "feed": "book", "product_ids": ["PI_XRPUSD"]}),
    ],
)  # fmt: skip
def test_a_venues_recording_comes_as_from_its_file(data_format: str, path: str, symbols: list[str], subscription: Any) -> None:
    messages, heard = payloads(recording(path)), []

    async def talk(socket: web.WebSocketResponse) -> None:
        heard.append(json.loads((await socket.receive()).data))
        for payload in messages:
            await socket.send_str(payload.decode())
        await stay(socket)

    chosen = f"symbols = {json.dumps(symbols)}\n"
    expected = file_events(data_format, recording(path), chosen)
    assert len(expected) > 40
    with WebServer({"/ws": websocket(talk)}) as server, receiving(body(server, data_format, chosen)) as received:
        found = received.wait(len(expected))
        assert heard == [subscription]
        assert (received.counter("malformed"), received.counter("gaps"), received.counter("reconnects")) == (0, 0, 0)
        assert received.counter("connected") == 1
    assert_same_events(found, expected)


def test_binance_joins_the_snapshot_that_it_asks_for(tmp_path: Path) -> None:
    """The stream waits where the recording has the snapshot until it has been asked for: the book is the recording's."""
    messages = payloads(recording(BINANCE))[:8000]  # the first minute
    (tmp_path / "first").write_bytes(b"\n".join(messages))
    at = next(i for i, payload in enumerate(messages) if payload.startswith(b'{"lastUpdateId"'))
    asked = asyncio.Event()

    async def talk(socket: web.WebSocketResponse) -> None:
        assert json.loads((await socket.receive()).data)["params"] == ["btcusdt@depth@100ms", "btcusdt@trade"]
        for payload in messages[:at]:
            await socket.send_str(payload.decode())
        await asked.wait()
        for payload in messages[at + 1 :]:
            await socket.send_str(payload.decode())
        await stay(socket)

    async def snapshot(request: web.Request) -> web.Response:
        asked.set()
        return web.Response(body=messages[at], content_type="application/json")

    expected = file_events("binance", tmp_path / "first", 'symbols = ["BTCUSDT"]\n')
    with WebServer({"/ws": websocket(talk), "/depth": snapshot}) as server:
        more = f'symbols = ["BTCUSDT"]\nsnapshot_endpoint = "{server.http}/depth?symbol={{symbol}}"\n'
        with receiving(body(server, "binance", more), capacity=1 << 18) as received:
            found = received.wait(len(expected))
            assert received.counter("gaps") == 0
        asked_for = [path for path, _ in server.requests if path.startswith("/depth")]
        assert asked_for == ["/depth?symbol=BTCUSDT"]
    of_books = (Kind.REFERENCE, Kind.CLEAR, Kind.LEVEL)
    for kinds in (of_books, (Kind.TRADE,), (Kind.QUOTE,)):
        assert_same_events(found[np.isin(found["kind"], kinds)], expected[np.isin(expected["kind"], kinds)])


def test_binance_of_several_symbols_at_once() -> None:
    """Four books wait, and each gets its own snapshot."""
    messages, snapshots = payloads(recording("cryptofeed_ws/BINANCE.ws.1.0")), dict[str, bytes]()
    lines = read_lines(recording("cryptofeed_ws/BINANCE.http.0.0"))
    list(lines)
    for note in lines.notes:
        if match := re.search(r"symbol=(\w+)", note.url):
            snapshots[match[1]] = note.payload

    async def talk(socket: web.WebSocketResponse) -> None:
        for payload in messages:
            await socket.send_str(payload.decode())
        await stay(socket)

    async def snapshot(request: web.Request) -> web.Response:
        return web.Response(body=snapshots[request.query["symbol"]])

    with WebServer({"/stream": websocket(talk), "/depth": snapshot}) as server:
        more = f'snapshot_endpoint = "{server.http}/depth?symbol={{symbol}}"\nsnapshot_interval_ms = 1\n'
        with receiving(body(server, "binance", more, "/stream?streams=nknusdt@depth")) as received:
            until(lambda: len(received.kinds(Kind.CLEAR)) == 4, "four snapshots")
            assert received.counter("malformed") == 0
            venue = received.receiver.intake.venue
            assert venue is not None
            until(lambda: not venue.snapshots_wanted, "nothing is wanted any more")


# ---------------------------------------------------------------- connections


TRADES = 'data_format = "json"\nevent = "trade"\nfields = { symbol = "s", price = "p", qty = "q", id = "i" }\n'


def trade(number: int) -> str:
    return json.dumps({"s": "AAA", "p": "1.5", "q": "2", "i": number})


def trades(server: WebServer, more: str = "") -> str:
    return f'type = "websocket"\nendpoint = "{server.ws}/ws"\n{TRADES}{FAST}{more}\n'


def test_after_a_lost_connection_it_subscribes_again_and_says_that_something_is_missing() -> None:
    subscribed: list[str] = []

    async def talk(socket: web.WebSocketResponse) -> None:
        subscribed.append((await socket.receive()).data)
        first = 10 * len(subscribed)
        for number in range(first, first + 3):
            await socket.send_str(trade(number))
        if len(subscribed) < 3:
            await socket.close()
        await stay(socket)

    with WebServer({"/ws": websocket(talk)}) as server, receiving(trades(server, "subscribe = ['hello']")) as received:
        events = received.wait(12)
        assert (received.counter("reconnects"), received.counter("gaps")) == (2, 2)
    assert subscribed == ["hello"] * 3
    three = [Kind.TRADE] * 3
    assert events["kind"].tolist() == [Kind.REFERENCE, *three, Kind.GAP, *three, Kind.GAP, *three]
    assert events["id"][events["kind"] == Kind.TRADE].tolist() == [10, 11, 12, 20, 21, 22, 30, 31, 32]


def test_a_books_gap_makes_it_subscribe_again() -> None:
    def message(kind: str, number: int) -> str:
        return json.dumps(
            {"topic": "orderbook.50.AAA", "type": kind, "ts": 1, "data": {"s": "AAA", "b": [["1", "1"]], "a": [], "u": number}}
        )

    heard: list[Any] = []

    async def talk(socket: web.WebSocketResponse) -> None:
        await socket.send_str(message("snapshot", 10))
        await socket.send_str(message("delta", 13))  # 11 and 12 are missing
        async for found in socket:
            heard.append(json.loads(found.data)["op"])
            if heard[-2:] == ["unsubscribe", "subscribe"]:
                await socket.send_str(message("snapshot", 20))
                await socket.send_str(message("delta", 21))

    with WebServer({"/ws": websocket(talk)}) as server, receiving(body(server, "bybit", 'symbols = ["AAA"]')) as received:
        events = received.wait(7)
    kinds = [Kind.REFERENCE, Kind.CLEAR, Kind.LEVEL, Kind.GAP, Kind.CLEAR, Kind.LEVEL, Kind.LEVEL]
    assert events["kind"].tolist() == kinds
    assert heard == ["subscribe", "unsubscribe", "subscribe"]


def test_the_venues_own_ping_and_its_answer() -> None:
    pings = 0

    async def talk(socket: web.WebSocketResponse) -> None:
        nonlocal pings
        async for found in socket:
            if found.type is WSMsgType.TEXT and found.data == "ping":
                pings += 1
                await socket.send_str("pong")

    more = 'symbols = ["BTC-USDT"]\nheartbeat_ms = 20'
    with WebServer({"/ws": websocket(talk)}) as server, receiving(body(server, "okx", more)) as received:
        until(lambda: pings >= 3, "three pings")
        assert (received.counter("malformed"), received.counter("reconnects")) == (0, 0)


def test_a_server_that_is_not_there_is_tried_again() -> None:
    async def talk(socket: web.WebSocketResponse) -> None:
        await socket.send_str(trade(1))
        await stay(socket)

    with RawServer(lambda reader, writer: asyncio.sleep(0)) as nobody:
        text = f'type = "websocket"\nendpoint = "ws://127.0.0.1:{nobody.port}/ws"\n{TRADES}{FAST}'
        with receiving(text) as received:
            received.wait_for(connect_failures=3)
            assert received.counter("connected") == 0
            assert not len(received.made())  # nothing was known, so nothing is missing


def test_silence_ends_a_connection() -> None:
    async def talk(socket: web.WebSocketResponse) -> None:
        await socket.send_str(trade(1))
        await stay(socket)

    with WebServer({"/ws": websocket(talk)}) as server, receiving(trades(server, "silence_ms = 30")) as received:
        received.wait_for(reconnects=2)


def test_it_stops_while_it_connects_waits_or_is_blocked(tmp_path: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    async def flood(socket: web.WebSocketResponse) -> None:
        for number in range(5000):
            await socket.send_str(trade(number))
        await stay(socket)

    with RawServer(silent) as server, receiving(f'type = "websocket"\nendpoint = "ws://127.0.0.1:{server.port}/"\n{TRADES}'):
        until(lambda: server.connections == 1, "a connection")
    gone = f'type = "websocket"\nendpoint = "ws://127.0.0.1:{server.port}/"\n{TRADES}reconnect_min_ms = 60000\nreconnect_max_ms = 60000\n'
    with receiving(gone) as received:
        received.wait_for(connect_failures=1)
    with WebServer({"/ws": websocket(flood)}) as web_server, receiving(trades(web_server), capacity=256) as received:
        received.wait_for(ring_full=1)


# ---------------------------------------------------------------- shards without room


@pytest.mark.parametrize("overflow", ["block", "drop_oldest", "gap"])
def test_a_full_ring(overflow: str) -> None:
    """Whatever is configured, memory is bounded, and what is dropped is counted and is a gap."""
    total = 3000

    async def flood(socket: web.WebSocketResponse) -> None:
        for number in range(total):
            await socket.send_str(trade(number))
        await stay(socket)

    with WebServer({"/ws": websocket(flood)}) as server:
        more = f'overflow = "{overflow}"\nbuffer_kb = 8\n'
        with receiving(trades(server, more), capacity=256) as received:
            received.wait_for(ring_full=1)
            if overflow != "block":
                received.wait_for(overflowed=total // 2)
            assert received.receiver.intake.waiting_bytes <= 8 << 10
            dropped = 0

            def everything() -> bool:
                nonlocal dropped
                dropped = received.counter("overflowed")
                return int(np.count_nonzero(received.events["kind"] == Kind.TRADE)) + dropped == total

            until(everything, "all messages, come or dropped")
            events = received.made()
    numbers = events["id"][events["kind"] == Kind.TRADE]
    assert np.all(np.diff(numbers.astype(np.int64)) > 0)
    gaps = int(np.count_nonzero(events["kind"] == Kind.GAP))
    if overflow == "block":
        assert (dropped, gaps) == (0, 0)
        return
    assert dropped > 0
    kinds = events["kind"].tolist()
    jumps = 0
    last = -1
    for kind, number in zip(kinds, events["id"].tolist()):
        if kind == Kind.GAP:
            last = -2
        elif kind == Kind.TRADE:
            jumps += last not in (-2, number - 1) and last >= 0
            last = number
    assert jumps == 0, "messages are missing where there is no gap"


# ---------------------------------------------------------------- servers that misbehave


def test_a_small_frame_that_unpacks_to_a_huge_message() -> None:
    async def talk(socket: web.WebSocketResponse) -> None:
        await socket.send_str(trade(1))
        await socket.send_str("[" + "0," * (8 << 20) + "0]")  # a few KiB on the wire
        await stay(socket)

    with WebServer({"/ws": websocket(talk)}) as server, receiving(trades(server, "message_max_kb = 64")) as received:
        received.wait_for(reconnects=2)
        assert "message_max_kb" in received.receiver._warned[0]


def test_messages_that_are_none_are_counted() -> None:
    async def talk(socket: web.WebSocketResponse) -> None:
        for text in ("", "{", "[" * 5000, '{"s": "AAA"}', '{"s": "AAA", "p": NaN, "q": 1}', "\x00", trade(7)):
            await socket.send_str(text)
        await socket.send_bytes(b"\xff\xfe{}")
        await stay(socket)

    with WebServer({"/ws": websocket(talk)}) as server, receiving(trades(server)) as received:
        received.wait_for(malformed=7)
        events = received.wait(2)
        assert received.counter("reconnects") == 0
    assert events["kind"].tolist() == [Kind.REFERENCE, Kind.TRADE]


HTTP_HEAD = b"HTTP/1.1 101 Switching Protocols\r\n"


async def _request(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


async def endless_headers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await _request(reader)
    writer.write(HTTP_HEAD)
    while True:
        writer.write(b"X-More: " + b"x" * 1000 + b"\r\n")
        await writer.drain()


async def one_endless_header(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await _request(reader)
    writer.write(HTTP_HEAD + b"X-More: ")
    while True:
        writer.write(b"x" * 4096)
        await writer.drain()


async def slow_headers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await _request(reader)
    while True:
        writer.write(b"H")
        await asyncio.sleep(0.01)


async def no_websocket(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await _request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")


async def binary_noise(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(os.urandom(4096))
    await reader.read()


@pytest.mark.parametrize(
    "server", [endless_headers, one_endless_header, slow_headers, no_websocket, binary_noise], ids=lambda f: f.__name__
)
def test_a_server_that_is_none(server: Any) -> None:
    """Every connection is given up within its limit, and counted; nothing piles up."""
    with RawServer(server) as running:
        text = f'type = "websocket"\nendpoint = "ws://127.0.0.1:{running.port}/"\n{TRADES}{FAST}connect_timeout_ms = 300\n'
        with receiving(text) as received:
            received.wait_for(connect_failures=2)
            assert received.counter("reconnects") == 0


# ---------------------------------------------------------------- TLS and logins


def test_tls_and_whom_it_trusts(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        make_authority(tmp_path, name)
    make_certificate(tmp_path, "ours", "server")
    make_certificate(tmp_path, "ours", "elsewhere", "IP:127.0.0.9")

    async def talk(socket: web.WebSocketResponse) -> None:
        await socket.send_str(trade(1))
        await stay(socket)

    def context(name: str) -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.load_cert_chain(tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
        return made

    with WebServer({"/ws": websocket(talk)}, context("server")) as server:
        with receiving(trades(server, 'tls_ca_file = "ours.pem"'), tmp_path) as received:
            received.wait(2)
        for more in ('tls_ca_file = "theirs.pem"', ""):
            with receiving(trades(server, more), tmp_path) as received:
                received.wait_for(connect_failures=1)
                assert "tls_ca_file" in received.receiver._warned[0]
    elsewhere = WebServer({"/ws": websocket(talk)}, context("elsewhere"))
    with elsewhere as server, receiving(trades(server, 'tls_ca_file = "ours.pem"'), tmp_path) as received:
        received.wait_for(connect_failures=1)
        assert "TLS" in received.receiver._warned[0]


def test_a_token_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEED_TOKEN", "s3cret")

    async def guarded(request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != "Bearer s3cret":
            raise web.HTTPUnauthorized
        return await websocket(stay)(request)

    with WebServer({"/ws": guarded}) as server:
        with receiving(trades(server, 'token_env = "FEED_TOKEN"')) as received:
            received.wait_for(connected=1)
        with receiving(trades(server)) as received:
            received.wait_for(connect_failures=1)
            reason = received.receiver._warned[0]
        assert "401" in reason
        assert "token" in reason
    monkeypatch.delenv("FEED_TOKEN")
    with pytest.raises(SecretMissing, match="FEED_TOKEN is not set"):
        opened(source_config(trades(server, 'token_env = "FEED_TOKEN"')))


def test_symbols_that_cannot_be_subscribed_to() -> None:
    with pytest.raises(SourceError, match="symbols must be names"):
        opened(source_config('type = "websocket"\nendpoint = "wss://x.example/ws"\ndata_format = "okx"\nsymbols = ["BTC-*"]'))


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("", "endpoint", "is missing"),
        ('endpoint = "http://x.example"', "endpoint", "must be ws://HOST or wss://HOST"),
        ('endpoint = "wss://user:pass@x.example"', "endpoint", "holds a secret"),
        ('endpoint = "wss://x.example/?token=abc"', "endpoint", "holds a secret"),
        ('endpoint = "wss://x.example"\nheaders = { Authorization = "Bearer abc" }', "headers.Authorization", "holds a secret"),
        ('endpoint = "wss://x.example"\npassword_env = "P"', "user", "is missing"),
        ('endpoint = "wss://x.example"\ntoken_env = "P"\ntoken_file = "x"', "token_file", "alternatives"),
        ('endpoint = "wss://x.example"\nreconnect_max_ms = 1', "reconnect_max_ms", "is less than"),
        ('endpoint = "wss://x.example"\nsubject = "a"', "subject", "has no meaning"),
        ('endpoint = "wss://x.example"\nsnapshot_endpoint = "https://x.example/depth"', "snapshot_endpoint", "{symbol}"),
    ],
)
def test_configurations_that_are_refused(text: str, path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        source_config(f'type = "websocket"\ndata_format = "okx"\nsymbols = ["A"]\n{text}')
    found = {problem.path: problem for problem in caught.value.errors}
    assert words in found[f"data_sources.feed.{path}"].reason
    assert "abc" not in str(caught.value)
