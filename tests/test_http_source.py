"""HTTP sources: polls that ask only for what is new, limits that servers set, lines and server-sent events, and bodies that are no good."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from nodes import until
from replays import recording
from sources import FAST, Handler, RawServer, WebServer, receiving

from tickmesh.node.event import Kind
from tickmesh.transports.recording import read_lines
from tickmesh.transports.web import EventStream, retry_after_s

TRADES = 'data_format = "json"\nevent = "trade"\nfields = { symbol = "s", price = "p", qty = "q", id = "i" }\n'


def trade(number: int) -> str:
    return json.dumps({"s": "AAA", "p": "1.5", "q": "2", "i": number})


def body(server: Any, more: str = "") -> str:
    return f'type = "http"\nendpoint = "http://127.0.0.1:{server.port}/x"\n{TRADES}{FAST}poll_interval_ms = 5\n{more}\n'


# ---------------------------------------------------------------- polls


def test_a_poll_asks_only_for_what_is_new() -> None:
    version = 0

    async def answer(request: web.Request) -> web.Response:
        nonlocal version
        if request.headers.get("If-None-Match") == f'"{version}"':
            if len(server.requests) % 5 == 0:
                version += 1
            return web.Response(status=304)
        return web.Response(text=trade(version), headers={"ETag": f'"{version}"'})

    with WebServer({"/x": answer}) as server, receiving(body(server)) as received:
        events = received.wait(4)
        assert received.receiver.sink.counts["unchanged"] >= 2
        assert (received.counter("reconnects"), received.counter("gaps")) == (0, 0)
    assert events["id"][1:4].tolist() == [0, 1, 2]


def test_last_modified_where_there_is_no_etag() -> None:
    async def answer(request: web.Request) -> web.Response:
        since = request.headers.get("If-Modified-Since")
        moment = "Mon, 01 Jan 2024 00:00:00 GMT"
        return web.Response(status=304) if since == moment else web.Response(text=trade(1), headers={"Last-Modified": moment})

    with WebServer({"/x": answer}) as server, receiving(body(server)) as received:
        until(lambda: received.receiver.sink.counts.get("unchanged", 0) >= 3, "three polls without news")
        assert len(received.made()) == 2


def test_snapshots_of_a_venue() -> None:
    """A book that is polled is replaced by every answer."""
    lines = read_lines(recording("cryptofeed_ws/BINANCE.http.0.0"))
    list(lines)
    payload = next(note.payload for note in lines.notes if "NKNUSDT" in note.url)

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=payload)

    text = f'type = "http"\ndata_format = "binance"\nsymbols = ["NKNUSDT"]\npoll_interval_ms = 5\n{FAST}'
    with WebServer({"/x": answer}) as server, receiving(f'{text}endpoint = "{server.http}/x"') as received:
        until(lambda: len(received.kinds(Kind.CLEAR)) >= 2, "two snapshots")


@pytest.mark.parametrize("status", [429, 418, 503])
def test_a_server_that_asks_us_to_wait_is_left_alone_for_so_long(status: int) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Retry-After": "3600"})

    with WebServer({"/x": answer}) as server, receiving(body(server)) as received:
        received.wait_for(connect_failures=1)
        asyncio.run(asyncio.sleep(0.1))
        assert len(server.requests) == 1
        assert str(status) in received.receiver._warned[0]


def test_retry_after() -> None:
    assert retry_after_s("120", 0) == 120
    assert retry_after_s("Thu, 01 Jan 1970 00:01:00 GMT", 0) == 60
    assert retry_after_s("Thu, 01 Jan 1970 00:01:00 GMT", 500) == 0
    assert retry_after_s("9" * 30, 0) == 86_400
    assert retry_after_s("soon", 0) is None
    assert retry_after_s(None, 0) is None


@pytest.mark.parametrize(("status", "words"), [(401, "token"), (404, "check the endpoint"), (500, "the server fails"), (302, "302")])
def test_other_answers_say_what_to_do(status: int, words: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Location": "http://127.0.0.1:1/"} if status == 302 else {})

    with WebServer({"/x": answer}) as server, receiving(body(server)) as received:
        received.wait_for(connect_failures=1)
        assert words in received.receiver._warned[0]


def test_a_failed_poll_makes_the_books_stale_once() -> None:
    async def answer(request: web.Request) -> web.Response:
        number = len(server.requests)
        return web.Response(status=500) if 3 <= number <= 6 else web.Response(text=trade(number))

    with WebServer({"/x": answer}) as server, receiving(body(server)) as received:
        events = received.wait(6)
    kinds = events["kind"].tolist()
    assert kinds[:5] == [Kind.REFERENCE, Kind.TRADE, Kind.TRADE, Kind.GAP, Kind.TRADE]
    assert kinds.count(Kind.GAP) == 1


# ---------------------------------------------------------------- bodies that do not end


def streamed(pieces: Callable[[web.Request], list[bytes]], kind: str) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": kind})
        await response.prepare(request)
        for piece in pieces(request):
            await response.write(piece)
            await asyncio.sleep(0)
        return response

    return answer


def test_lines_in_chunks_cut_anywhere() -> None:
    text = "".join(trade(number) + "\r\n" for number in range(50)).encode() + b"\n\n" + trade(50).encode()[:20]
    pieces = [text[at : at + 7] for at in range(0, len(text), 7)]
    with (
        WebServer({"/x": streamed(lambda _: pieces, "application/x-ndjson")}) as server,
        receiving(body(server, 'reading = "lines"\nreconnect_min_ms = 60000\nreconnect_max_ms = 60000').replace(FAST, "")) as received,
    ):
        received.wait_for(reconnects=1)
        events = received.wait(52)
        assert received.counter("malformed") == 1  # the line that was cut off
    assert events["kind"].tolist() == [Kind.REFERENCE, *[Kind.TRADE] * 50, Kind.GAP]
    assert events["id"][1:51].tolist() == list(range(50))


def test_events_go_on_after_the_last_id() -> None:
    def pieces(request: web.Request) -> list[bytes]:
        first = int(request.headers.get("Last-Event-ID", "-1")) + 1
        lines = [f"id: {n}\ndata: {trade(n)}\n\n".encode() for n in range(first, first + 3)]
        return [b"retry: 10\n: a comment\n\n", *lines]

    with WebServer({"/x": streamed(pieces, "text/event-stream")}) as server, receiving(body(server, 'reading = "sse"')) as received:
        events = received.wait(12)
    trades = events["id"][events["kind"] == Kind.TRADE]
    assert trades.tolist() == list(range(len(trades)))
    assert [headers.get("Last-Event-ID") for _, headers in server.requests][:3] == [None, "2", "5"]


def slow_events(data: bytes) -> list[bytes]:
    """The twin: the whole text at once, as the specification reads."""
    found, parts = [], []
    lines = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    for line in lines[:-1]:
        if not line:
            if parts:
                found.append(b"\n".join(parts))
            parts = []
        else:
            name, _, value = line.partition(b":")
            if name == b"data":
                parts.append(value[1:] if value[:1] == b" " else value)
    return found


fields = st.sampled_from([b"data: a", b"data:b", b"data", b"data:  c", b": x", b"id: 5", b"retry: 7", b"event: e", b"", b"\xef\xbb\xbf"])
ends = st.sampled_from([b"\n", b"\r\n", b"\r"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(fields, ends), max_size=30), st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_events_are_the_same_however_they_are_cut(lines: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    data = b"".join(line + end for line, end in lines) + b"\n"
    stream, found, at, k = EventStream(1 << 16), [], 0, 0
    while at < len(data):
        found += stream.feed(data[at : at + cuts[k % len(cuts)]])
        at += cuts[k % len(cuts)]
        k += 1
    expected = slow_events(data)
    assert found == expected[: len(found)]
    assert len(found) >= len(expected) - 1  # a line's end at the very end may be half of one


def test_an_endless_event_or_line_is_given_up() -> None:
    pieces = [b"data: " + b"x" * 1000 + b"\n"] * 200
    with (
        WebServer({"/x": streamed(lambda _: pieces, "text/event-stream")}) as server,
        receiving(body(server, 'reading = "sse"\nmessage_max_kb = 16')) as received,
    ):
        received.wait_for(reconnects=2)
        assert "message_max_kb" in received.receiver._warned[0]
    long = [b"x" * 1000] * 200 + [b"\n", trade(1).encode() + b"\n"]
    with (
        WebServer({"/x": streamed(lambda _: long, "text/plain")}) as server,
        receiving(body(server, 'reading = "lines"\nmessage_max_kb = 16')) as received,
    ):
        events = received.wait(2)
        assert received.receiver.intake.feed.malformed["too_long"] >= 1
    assert events["kind"].tolist()[:2] == [Kind.REFERENCE, Kind.TRADE]


# ---------------------------------------------------------------- compression, and its abuse


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_bodies(coding: str, pack: Callable[[bytes], bytes]) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=pack(trade(1).encode()), headers={"Content-Encoding": coding})

    with WebServer({"/x": answer}) as server, receiving(body(server)) as received:
        received.wait(2)
        assert received.counter("malformed") == 0


@pytest.mark.parametrize("reading", ["poll", "lines"])
def test_a_zip_bomb_is_given_up_at_its_limit(reading: str) -> None:
    bomb = gzip.compress(bytes(64 << 20))

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=bomb, headers={"Content-Encoding": "gzip"})

    with (
        WebServer({"/x": answer}) as server,
        receiving(body(server, f'reading = "{reading}"\nmessage_max_kb = 64\nbuffer_kb = 64')) as received,
    ):
        received.wait_for(reconnects=2)
        assert "message_max_kb" in received.receiver._warned[0]
        assert received.counter("bytes") <= 2 * (64 << 10) + (128 << 10)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 4\r\n\r\nnope",
        b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\ntoo short",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n" + b"x" * 200_000,
        b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 1000,
        b"",
    ],
)
def test_an_answer_that_is_broken(answer: bytes) -> None:
    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()

    with RawServer(answers) as server, receiving(body(server, "connect_timeout_ms = 500\nmessage_max_kb = 64")) as received:
        until(lambda: received.counter("connect_failures") + received.counter("reconnects") >= 2, "two failures")
        assert not len(received.kinds(Kind.TRADE))


def test_a_body_that_trickles_is_given_up() -> None:
    """Slow-loris: each byte in time, but never the whole."""

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    with RawServer(answers) as server, receiving(body(server, "silence_ms = 200")) as received:
        received.wait_for(reconnects=1)
        assert "not whole" in received.receiver._warned[0]


def test_a_user_and_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEED_PASSWORD", "s3cret")

    async def answer(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Basic bWU6czNjcmV0"
        assert request.headers["X-Client"] == "tickmesh"
        return web.Response(text=trade(1))

    more = 'user = "me"\npassword_env = "FEED_PASSWORD"\nheaders = { X-Client = "tickmesh" }'
    with WebServer({"/x": answer}) as server, receiving(body(server, more)) as received:
        received.wait(2)
