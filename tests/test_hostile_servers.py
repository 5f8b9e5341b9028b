"""Servers that harm whoever connects: each way in gives the connection up within its limits, says why, and tries again in bounds."""

# ruff: noqa: F811 (fixtures)

from __future__ import annotations

import asyncio
import json
import os
import ssl
import struct
from base64 import b64encode
from collections.abc import Awaitable, Callable
from hashlib import sha1
from pathlib import Path
from typing import Any

import pytest
from aiohttp import WSMsgType, web
from nats_fixtures import nats_server  # noqa: F401
from nats_logins import make_authority, make_certificate
from nodes import until
from sources import FAST, RawServer, Received, WebServer, receiving
from test_json_feed import make, send
from test_more_sources import TRADES, _publish, from_nats, ids, trade
from test_websocket_source import stay, websocket

from tickmesh.node.event import Flag, Kind
from tickmesh.ops.servers import NatsServer
from tickmesh.transports.connection import Backoff

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
LIMITS = f"{FAST}connect_timeout_ms = 250\nsilence_ms = 250\n"
WAYS = {
    "websocket": 'type = "websocket"\nendpoint = "ws://HOST/x"\n' + TRADES,
    "poll": 'type = "http"\nendpoint = "http://HOST/x"\n' + TRADES,
    "lines": 'type = "http"\nreading = "lines"\nendpoint = "http://HOST/x"\n' + TRADES,
    "sse": 'type = "http"\nreading = "sse"\nendpoint = "http://HOST/x"\n' + TRADES,
    "tcp": 'type = "tcp"\nendpoint = "tcp://HOST"\n' + TRADES,
    "soupbintcp": 'type = "tcp"\nendpoint = "tcp://HOST"\nframing = "soupbintcp"\ndata_format = "itch50"\n',
    "nats": 'type = "nats"\nendpoint = "nats://HOST"\nsubject = "x"\n' + TRADES,
    "nats_stream": 'type = "nats"\nendpoint = "nats://HOST"\nstream = "X"\n' + TRADES,
}
TLS = {
    "websocket": ("ws:", "wss:"), "poll": ("http:", "https:"), "tcp": ("tcp:", "tls:"), "soupbintcp": ("tcp:", "tls:"),
    "nats": ("nats:", "tls:"),
}  # fmt: skip


def failures(received: Received) -> int:
    return received.counter("connect_failures") + received.counter("reconnects")


def problem(received: Received) -> str:
    return received.receiver._warned[0]


# ---------------------------------------------------------------- servers that are none


async def closes_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    pass


async def says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


async def noise(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(os.urandom(4096).replace(b"\n", b""))
        await writer.drain()


async def trickles(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"H")
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("server", [closes_at_once, says_nothing, noise, trickles], ids=lambda f: f.__name__)
@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_is_none(way: str, server: Serve) -> None:
    """The connection is given up; there are as many connections as failures; what came is bounded, and nothing of it is an event."""
    more = "message_max_kb = 16\nbuffer_kb = 16\n"
    with RawServer(server) as running, receiving(WAYS[way].replace("HOST", f"127.0.0.1:{running.port}") + LIMITS + more) as received:
        if way == "tcp" and server in (noise, trickles):  # bytes that come are no silence; a line of them is bounded
            until(lambda: received.counter("bytes") > 20, "some bytes")
            return
        until(lambda: failures(received) >= 3, "three failures")
        assert problem(received), "a reason"
        assert not len(received.kinds(Kind.TRADE, Kind.ADD))
        connections, tries = running.connections, failures(received) + 1
    if not way.startswith("nats"):  # its client looks for a server by itself, within the same limit
        assert connections <= 2 * tries  # aiohttp asks a second time itself, if a connection ends before the answer


def test_waits_do_not_shrink_while_a_server_closes_at_once() -> None:
    """A connection that lasts no longer than the wait before it is no success."""
    waits, longest = Backoff(0.1, 3.0), 0.0
    for _ in range(50):
        longest = max(longest, waits.next_s())
        waits.lasted(1.0)
    assert waits.attempt == 50
    assert longest > 1.5
    waits.lasted(20.0)
    assert waits.attempt == 0


def opened_and_closed(server: WebServer) -> str:
    return WAYS["websocket"].replace("HOST/x", f"127.0.0.1:{server.port}/ws") + "reconnect_min_ms = 2\nreconnect_max_ms = 60000\n"


def test_a_websocket_that_is_opened_and_closed_in_a_loop_is_left_alone_more_and_more() -> None:
    async def talk(socket: web.WebSocketResponse) -> None:
        await socket.close()

    with WebServer({"/ws": websocket(talk)}) as server, receiving(opened_and_closed(server)) as received:
        received.wait_for(reconnects=5)
        assert received.receiver._backoff.attempt >= 5
        assert "closed the connection" in problem(received)


@pytest.mark.parametrize("way", WAYS)
def test_a_name_that_nobody_knows(way: str) -> None:
    with receiving(WAYS[way].replace("HOST", "nobody.invalid:1") + LIMITS.replace("250", "2000")) as received:
        received.wait_for(connect_failures=1)
        assert "nobody.invalid" in problem(received)


# ---------------------------------------------------------------- whom to trust


@pytest.mark.parametrize("way", TLS)
def test_a_certificate_of_somebody_else(way: str, tmp_path: Path) -> None:
    """Nothing is said to it: no login, no request, no subscription."""
    for name in ("ours", "theirs"):
        make_authority(tmp_path, name)
    make_certificate(tmp_path, "theirs", "server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    heard = bytearray()

    async def listens(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if way == "nats":  # its server speaks first, and then begins with TLS
            info = {"server_id": "X", "version": "2.10.0", "max_payload": 1 << 20, "tls_required": True, "proto": 1}
            writer.write(b"INFO " + json.dumps(info).encode() + b"\r\n")
        await writer.start_tls(context)
        heard.extend(await reader.read(1))

    plain, secure = TLS[way]
    with RawServer(listens) as server:
        text = WAYS[way].replace(plain, secure).replace("HOST", f"127.0.0.1:{server.port}") + LIMITS.replace("250", "2000")
        with receiving(text + 'tls_ca_file = "ours.pem"\n', tmp_path) as received:
            received.wait_for(connect_failures=1)
            assert "no trusted TLS" in problem(received)
    assert not heard


# ---------------------------------------------------------------- HTTP


@pytest.mark.parametrize("way", ["websocket", "poll"])
def test_redirects_without_end(way: str) -> None:
    async def again(request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": "/x"})

    with WebServer({"/x": again}) as server, receiving(WAYS[way].replace("HOST", f"127.0.0.1:{server.port}") + FAST) as received:
        received.wait_for(connect_failures=2)
        assert "check the endpoint" in problem(received)
        assert len(server.requests) <= 11 * (failures(received) + 1)


def test_a_websocket_that_wants_to_be_left_alone() -> None:
    """The venue's word counts at the handshake too."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=429, headers={"Retry-After": "3600"})

    with WebServer({"/x": answer}) as server, receiving(WAYS["websocket"].replace("HOST", f"127.0.0.1:{server.port}") + LIMITS) as received:
        received.wait_for(connect_failures=1)
        assert "too many requests" in problem(received)
        assert (received.counter("connect_failures"), len(server.requests)) == (1, 1)


# ---------------------------------------------------------------- websockets


def frame(kind: int, payload: bytes, *, final: bool = True) -> bytes:
    """A frame of a server (RFC 6455, 5.2)."""
    size = bytes([len(payload)]) if len(payload) < 126 else b"\x7e" + struct.pack(">H", len(payload))
    return bytes([kind | (128 if final else 0)]) + size + payload


def talks(*frames: bytes) -> Serve:
    """A websocket server that opens properly, sends frames, and never reads again."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        key = next(line.split(b": ")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key"))
        accept = b64encode(sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: " + accept)
        writer.write(b"\r\n\r\n" + b"".join(frames))
        await writer.drain()
        await asyncio.sleep(3600)

    return serve


GOOD = frame(1, trade(1))


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([GOOD, frame(3, b"x")], "damaged"),  # an opcode that is none
        ([GOOD, b"\xf1\x01x"], "damaged"),  # reserved bits
        ([GOOD, frame(9, b"x" * 126)], "damaged"),  # a ping that is too long
        ([GOOD, frame(0, b"x")], "damaged"),  # the rest of nothing
        ([GOOD, b"\x81\x7f" + b"\x7f" + b"\xff" * 7], "more than"),  # a frame of 2**63 bytes
        ([GOOD, *[frame(0 if k else 1, b"y" * 1000, final=False) for k in range(40)]], "more than"),  # a message that never ends
        ([GOOD, frame(8, b"\x03")], ""),  # a close without a code
    ],
)
def test_frames_that_are_none(frames: list[bytes], words: str) -> None:
    with RawServer(talks(*frames)) as server:
        text = WAYS["websocket"].replace("HOST", f"127.0.0.1:{server.port}") + FAST + "message_max_kb = 16\n"
        with receiving(text) as received:
            received.wait_for(reconnects=2)
            assert words in problem(received)
            until(lambda: len(received.kinds(Kind.GAP)) >= 1, "a gap: what was lost is not known")


def test_a_peer_that_is_gone_without_a_word() -> None:
    """Half-open: bytes may still be sent, and nobody answers pings."""
    with RawServer(talks(GOOD)) as server:
        text = WAYS["websocket"].replace("HOST", f"127.0.0.1:{server.port}") + FAST + "heartbeat_ms = 60\nsilence_ms = 60000\n"
        with receiving(text) as received:
            received.wait_for(reconnects=2)


def test_text_that_is_no_utf8() -> None:
    """Of a message or of a symbol: counted; the next message is read."""
    texts = [b'{"s": "A\xff\xfe", "p": "1", "q": "1"}', "{“s”: 1}".encode("utf-16"), b'{"s": "\\ud800", "p": "1", "q": "1"}', b"\xc0\x80"]

    async def talk(socket: web.WebSocketResponse) -> None:
        for text in texts:
            await socket._writer.send_frame(text, WSMsgType.TEXT)  # type: ignore[union-attr]
        await socket.send_bytes(trade(1))
        await stay(socket)

    text = f'type = "websocket"\nendpoint = "HOST/ws"\n{TRADES}{FAST}'
    with WebServer({"/ws": websocket(talk, compress=False)}) as server, receiving(text.replace("HOST", server.ws)) as received:
        received.wait_for(malformed=len(texts))
        until(lambda: ids(received.events) == [1], "the good one")
        assert received.counter("reconnects") == 0


# ---------------------------------------------------------------- NATS


def test_messages_of_a_subject_that_make_no_sense(nats_server: NatsServer) -> None:
    junk = [b"", b"\xff" * 100, b"[" * 5000, b'{"s": "AAA"}', os.urandom(1000)]
    with receiving(from_nats(nats_server.url, 'subject = "junk"')) as received:
        received.wait_for(connected=1)
        asyncio.run(_publish(nats_server.url, "junk", [*junk, trade(1)]))
        received.wait_for(malformed=len(junk))
        until(lambda: ids(received.events) == [1], "the good one")
        assert received.counter("reconnects") == 0


# ---------------------------------------------------------------- venues that begin anew, and changes that cannot be used


def depth(first: int, last: int) -> dict[str, Any]:
    return {"e": "depthUpdate", "E": 1, "s": "AAA", "U": first, "u": last, "b": [["1", str(last)]], "a": []}


def test_binance_that_counts_from_one_again() -> None:
    """Its updates are all older than the book: that is no book of today."""
    feed = make("binance")
    send(feed, depth(1000, 1001), {"lastUpdateId": 1000, "bids": [["1", "1"]], "asks": [["2", "1"]]})
    events = send(feed, *(depth(n, n) for n in range(1, 40)))
    assert events["kind"].tolist() == [Kind.GAP]
    assert (feed.counters["restarts"], feed.snapshots_wanted) == (1, {"AAA"})
    events = send(feed, {"lastUpdateId": 38, "bids": [["1", "5"]], "asks": []})
    assert events["kind"].tolist() == [Kind.CLEAR, Kind.LEVEL, Kind.LEVEL]


def test_a_few_old_updates_are_no_new_beginning() -> None:
    feed = make("binance")
    send(feed, depth(1000, 1001), {"lastUpdateId": 1000, "bids": [["1", "1"]], "asks": [["2", "1"]]})
    for _ in range(5):
        assert not len(send(feed, *(depth(n, n) for n in range(900, 910))))
        at = feed._listings["AAA"].last_id or 0
        assert len(send(feed, depth(at + 1, at + 1))) == 1
    assert feed.counters["restarts"] == 0


@pytest.mark.parametrize("venue", ["bybit", "kraken_futures"])
def test_other_venues_that_count_from_one_again(venue: str) -> None:
    def bybit(kind: str, number: int) -> dict[str, Any]:
        data = {"s": "X", "b": [["1", "1"]], "a": [], "u": number}
        return {"topic": "orderbook.50.X", "type": kind, "ts": 5, "data": data}

    def kraken(kind: str, number: int) -> dict[str, Any]:
        if kind == "snapshot":
            return {"feed": "book_snapshot", "product_id": "X", "timestamp": 5, "seq": number, "bids": [], "asks": []}
        return {"feed": "book", "product_id": "X", "side": "buy", "seq": number, "price": 1, "qty": 1, "timestamp": 5}

    message = bybit if venue == "bybit" else kraken
    feed = make(venue)
    send(feed, message("snapshot", 1000), message("delta", 1001))
    assert send(feed, *(message("delta", n) for n in range(2, 30)))["kind"].tolist() == [Kind.GAP]
    assert feed.snapshots_wanted == {"X"}


BOOKS = """
[[data_sources.s.messages]]
match = { type = "trade" }
event = "trade"
fields = { symbol = "s", price = "p", qty = "q" }
[[data_sources.s.messages]]
match = { type = "snapshot" }
event = "level"
snapshot = true
fields = { symbol = "s", side = { constant = "bid" }, price = "bids[].0", qty = "bids[].1" }
[[data_sources.s.messages]]
match = { type = "change" }
event = "level"
fields = { symbol = "s", side = "side", price = "p", qty = "q" }
"""


def snapshot(symbol: str) -> dict[str, Any]:
    return {"type": "snapshot", "s": symbol, "bids": [["1", "1"], ["2", "2"]]}


def change(symbol: str, price: Any = "1") -> dict[str, Any]:
    return {"type": "change", "s": symbol, "side": "buy", "p": price, "q": "3"}


@pytest.mark.parametrize(
    ("bad", "stale"),
    [
        (change("A", "x"), ["A"]),
        (change("A", None), ["A"]),
        ({**change("A"), "side": "both"}, ["A"]),
        ({"type": "snapshot", "s": "A", "bids": [["1", "1"], ["x", "2"]]}, ["A"]),
        ({"type": "change", "side": "buy", "p": "1", "q": "3"}, ["A", "B"]),  # whose it is, nobody knows
        (b'{"type": "cha', ["A", "B"]),
        ({"type": "trade", "s": "A", "p": "x", "q": "1"}, []),  # no book's
        ({"type": "other", "s": "A"}, []),
    ],
)
def test_a_record_of_a_mapping_that_is_refused_makes_its_book_stale(bad: Any, stale: list[str]) -> None:
    """Until its next snapshot, and it is said once."""
    feed = make("json", BOOKS)
    send(feed, snapshot("A"), snapshot("B"), {"type": "trade", "s": "C", "p": "1", "q": "1"})
    events = send(feed, bad)
    numbers = {listing.instrument: symbol for symbol, listing in feed._listings.items()}
    assert [numbers[int(number)] for number in events["instrument"]] == stale
    assert set(events["kind"].tolist()) <= {Kind.GAP}
    assert not len(send(feed, bad)), "said twice"
    assert feed.snapshots_wanted == set(stale)
    (level,) = send(feed, change("A"))
    assert level["kind"] == Kind.LEVEL
    again = send(feed, snapshot("A"))
    assert again["kind"].tolist() == [Kind.CLEAR, Kind.LEVEL, Kind.LEVEL]
    assert again["flags"][0] & Flag.SNAPSHOT
    assert "A" not in feed.snapshots_wanted
    assert len(send(feed, change("A", "x"))) == 1, "and stale again"


def test_a_mapping_of_trades_alone_has_no_book_to_be_stale() -> None:
    feed = make("json", 'event = "trade"\nfields = { symbol = "s", price = "p", qty = "q" }\n')
    assert not len(send(feed, b"nonsense", {"s": "A", "p": "x", "q": "1"}))
    assert feed.counters["gaps"] == 0
