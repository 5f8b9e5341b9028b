"""Benchmark: sources that are received by asyncio, per second of the receiving thread's CPU time, against what one would write by hand.

* SoupBinTCP: a simulated day from a server on loopback to events in a shard's ring; the peer reads the same packets with asyncio, one at a
  time, and decodes nothing.
* Websocket: a venue's depth updates and trades (made from a seed) to events in a ring; the peer takes the same messages with aiohttp and
  `json`, prices as Decimal, and keeps no book.
* JSON decoded: the same messages, and changes of books, trades and quotes recorded at venues (below ``$TICKMESH_DATA``, where that is
  set), to events in memory, on one core. Peers take them with `json` or `orjson`, prices as Decimal or float, and keep no book. What the
  decoder in Python takes is there too.
* JSON alone: the parser that Python decoders use, against others on the same messages.

The servers run in threads of their own, whose time is not counted. Ways alternate; medians.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import uvloop
from aiohttp import web

from tickmesh.control.config import parse_config
from tickmesh.node.adapters import AdapterReceiver, open_adapter
from tickmesh.node.event import EVENT
from tickmesh.node.event_batch import EventBatch
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.json_compiled import RUN_MAX, Message
from tickmesh.node.json_feed import VenueFeed
from tickmesh.node.pipeline import make_table
from tickmesh.node.receivers import ReceiverContext
from tickmesh.node.venues import compiled_feed
from tickmesh.ops.simulator import SimulatorConfig, generate
from tickmesh.ops.soupbintcp_server import ServerOptions, SoupBinTcpServer, fill_log
from tickmesh.transports.recording import read_lines
from tickmesh.transports.ring import Ring
from tickmesh.transports.soupbintcp import login_packet
from tickmesh.transports.toolbox import IDLE_SLEEP

_LIMIT_S = 300.0
_BASE = 6_000_000


def bench_sources(*, messages: int = 1_000_000, json_messages: int = 40_000, repeats: int = 5, seed: int = 1) -> dict[str, Any]:
    """Measure; ``{"rows": […], "messages_per_core_s": {way: median}, "bytes_per_json_message": float}``.

    Args:
        messages: of the SoupBinTCP session.
        json_messages: of the websocket.
        repeats: the median of so many is reported.
        seed: of what is sent.
    """
    image, texts = generate(SimulatorConfig(seed=seed, symbols=20, rate=100_000, messages=messages)), venue_messages(json_messages, seed)
    found: dict[str, list[float]] = {}
    with SoupBinTcpServer(ServerOptions(), fill_log(image)) as soup, _WebsocketServer(texts) as socket:
        peer_soup, peer_socket = (lambda: _soup_peer(soup.port, messages)), (lambda: _websocket_peer(socket.port, len(texts)))
        ways: list[tuple[str, Callable[[], float]]] = [
            ("soupbintcp", lambda: messages / _ours(_SOUP.format(port=soup.port), messages)),
            ("soupbintcp_asyncio", lambda: messages / _timed(peer_soup)),
            ("websocket", lambda: len(texts) / _ours(_WEBSOCKET.format(port=socket.port), len(texts))),
            ("websocket_aiohttp", lambda: len(texts) / _timed(peer_socket)),
            *_decoders(texts, "bybit", "made"),
            *_parsers(texts),
        ]
        recorded = list(_recordings())
        for venue, its_texts in recorded:
            ways += _decoders(its_texts, venue, venue)
        for turn in range(repeats + 1):
            for way, measure in ways:
                speed = measure()
                if turn:  # the first warms up
                    found.setdefault(way, []).append(speed)
    return _report({way: statistics.median(speeds) for way, speeds in found.items()}, texts, [venue for venue, _ in recorded])


def _report(medians: dict[str, float], texts: Sequence[bytes], recorded: Sequence[str]) -> dict[str, Any]:
    unit = "messages per CPU second"
    decoded = [
        (f"JSON to events: book changes, trades and quotes {name}", f"decode_{of}", f"decode_{of}_{peer}", about)
        for of, name in [("made", "made from a seed"), *((venue, f"recorded at {venue}") for venue in recorded)]
        for peer, about in (
            ("json", "json, Decimal prices, no events"), ("orjson", "orjson, float prices, no events"), ("python", "our decoder in Python"),
        )
    ]  # fmt: skip
    rows = [
        ("SoupBinTCP to events in a ring", "soupbintcp", "soupbintcp_asyncio", "asyncio, a packet at a time, not decoded"),
        ("JSON over a websocket to events in a ring", "websocket", "websocket_aiohttp", "aiohttp, json, Decimal prices, no events"),
        *decoded,
        ("JSON parsed, numbers as text", "parse_msgspec", "parse_json", "json of the standard library"),
        ("JSON parsed, numbers as text", "parse_msgspec", "parse_orjson", "orjson, which makes floats"),
    ]
    made = [
        {"name": name, "unit": unit, "ours": ours, "theirs": theirs, "peer": peer, "ratio": ours / theirs, "target": None}
        for name, ours, theirs, peer in ((name, medians[ours], medians.get(theirs), peer) for name, ours, theirs, peer in rows)
        if theirs is not None
    ]
    skipped = {} if "parse_orjson" in medians else {"orjson": "the package orjson is not installed: pip install orjson"}
    if not recorded:
        skipped["recordings"] = "no recordings: name their folder in TICKMESH_DATA"
    return {"rows": made, "messages_per_core_s": medians, "bytes_per_json_message": sum(map(len, texts)) / len(texts), "skipped": skipped}


# ---------------------------------------------------------------- ours

_SOUP = 'type = "tcp"\nendpoint = "tcp://127.0.0.1:{port}"\nframing = "soupbintcp"\ndata_format = "itch50"\n'
_WEBSOCKET = 'type = "websocket"\nendpoint = "ws://127.0.0.1:{port}/ws"\ndata_format = "bybit"\nsymbols = ["AAAUSDT"]\n'


def _ours(source: str, messages: int) -> float:
    """CPU seconds of a receiver's thread for so many messages; the ring has no reader, so that it is never full."""
    config = parse_config(f"[data_sources.feed]\n{source}")
    with Ring.create(None, 1 << 16, EVENT) as ring:
        receiver = open_adapter("feed", config, ReceiverContext(make_table(config), [ring], 0, IDLE_SLEEP))
        receiver.start()
        try:
            return _cpu_until(receiver, messages)
        finally:
            receiver.ask_stop()
            receiver.join(5)
            receiver.close()


def _cpu_until(receiver: AdapterReceiver, messages: int) -> float:
    clock = time.pthread_getcpuclockid(receiver._thread.ident or 0)
    limit = time.monotonic() + _LIMIT_S
    while receiver.counters()["messages"] < messages:
        if receiver.error is not None:
            raise receiver.error
        if time.monotonic() > limit:
            raise TimeoutError(f"only {receiver.counters()['messages']} of {messages} messages have come")
        time.sleep(0.002)
    return time.clock_gettime(clock)


# ---------------------------------------------------------------- peers


def _timed(work: Callable[[], Any]) -> float:
    """CPU seconds that a coroutine takes in a thread of its own."""
    spent: list[float] = []

    def run() -> None:
        uvloop.run(work())
        spent.append(time.thread_time())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return spent[0]


async def _soup_peer(port: int, messages: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(login_packet("", "", "", 1))
    count = 0
    while count < messages:
        length = int.from_bytes(await reader.readexactly(2), "big")
        payload = await reader.readexactly(length)
        count += payload[:1] == b"S"
    writer.close()


async def _websocket_peer(port: int, messages: int) -> None:
    async with aiohttp.ClientSession() as session, session.ws_connect(f"http://127.0.0.1:{port}/ws") as socket:
        await socket.send_str("{}")
        for _ in range(messages):
            message = json.loads(await socket.receive_str())
            for number in _of_bybit(message):
                Decimal(number)


def _parsers(texts: Sequence[bytes]) -> list[tuple[str, Callable[[], float]]]:
    known: dict[str, Callable[[bytes], Any]] = {"msgspec": msgspec.json.Decoder(float_hook=str).decode, "json": json.loads}
    try:
        import orjson

        known["orjson"] = orjson.loads
    except ImportError:
        pass

    def measure(parse: Callable[[bytes], Any]) -> float:
        begun = time.thread_time()
        for text in texts:
            parse(text)
        return len(texts) / (time.thread_time() - begun)

    return [(f"parse_{name}", lambda parse=parse: measure(parse)) for name, parse in known.items()]  # type: ignore[misc]


# ---------------------------------------------------------------- decoding alone

_RECORDINGS = {
    "binance": "binance_spot_btcusdt/btcusdt_20240808.gz",
    "bybit": "bybit_ob500/xrpusdt-ob500.data.zip",
    "coinbase": "cryptofeed_ws/COINBASE.ws.28.0",
    "kraken_futures": "cryptofeed_ws/KRAKEN_FUTURES.ws.1.0",
    "okx": "cryptofeed_ws/OKX.ws.1.0",
}
_HOT = {
    "binance": (b'"depthUpdate"', b'"trade"', b'bookTicker"'), "bybit": (b'"delta"', b"publicTrade"),
    "coinbase": (b'"l2update"', b'"match"'), "kraken_futures": (b'{"feed":"book",',), "okx": (b'"update"', b'"trades"'),
}  # fmt: skip
"""What changes of books, trades and quotes have in them; the rest is snapshots, answers and what came before."""


def _recordings() -> Iterator[tuple[str, list[bytes]]]:
    """What was recorded at venues, by name; files that are not there are left out."""
    folder = os.environ.get("TICKMESH_DATA")
    for venue, name in _RECORDINGS.items():
        if folder and (path := Path(folder, name)).is_file():
            yield venue, [text for _, text in read_lines(path)]


def _runs(texts: Sequence[bytes], venue: str) -> list[tuple[bool, list[Message]]]:
    """Runs of at most 64 messages, and whether they are such as are measured."""
    marked = [(any(word in text for word in _HOT[venue]), (text, 1, 0)) for text in texts]
    grouped = [(hot, [message for _, message in group]) for hot, group in groupby(marked, key=lambda one: one[0])]
    return [(hot, run[k : k + RUN_MAX]) for hot, run in grouped for k in range(0, len(run), RUN_MAX)]


def _decoders(texts: Sequence[bytes], venue: str, name: str) -> list[tuple[str, Callable[[], float]]]:
    """Ways to take a venue's changes of books, trades and quotes, by name; snapshots are taken too, without the clock."""
    options = parse_config(f'[data_sources.feed]\ntype = "file"\npath = "x"\ndata_format = "{venue}"\n').data_sources["feed"]
    runs, batch = _runs(texts, venue), EventBatch()
    hot = [message[0] for is_hot, run in runs if is_hot for message in run]

    def ours(take: Callable[[VenueFeed, list[Message], EventBatch], None]) -> float:
        feed, spent = compiled_feed(options, InstrumentTable(1024)), 0.0
        for is_hot, run in runs:
            batch.clear()
            begun = time.thread_time()
            take(feed, run, batch)
            spent += (time.thread_time() - begun) * is_hot
        return len(hot) / spent

    def theirs(parse: Callable[[bytes], Any], number: Callable[[Any], Any]) -> float:
        numbers, begun = _NUMBERS[venue], time.thread_time()
        for text in hot:
            for found in numbers(parse(text)):
                number(found)
        return len(hot) / (time.thread_time() - begun)

    ways: list[tuple[str, Callable[[], float]]] = [
        (f"decode_{name}", lambda: ours(_many)), (f"decode_{name}_python", lambda: ours(_one_by_one)),
        (f"decode_{name}_json", lambda: theirs(json.loads, Decimal)),
    ]  # fmt: skip
    with contextlib.suppress(ImportError):
        import orjson

        ways.append((f"decode_{name}_orjson", lambda: theirs(orjson.loads, float)))
    return ways


def _many(feed: VenueFeed, run: list[Message], batch: EventBatch) -> None:
    while run:
        run = run[feed.feed_many(run, batch) :]


def _one_by_one(feed: VenueFeed, run: list[Message], batch: EventBatch) -> None:
    for text, recv_ns, _ in run:
        feed.feed(text, recv_ns, batch)


def _of_levels(*sides: Sequence[Sequence[str]], first: int = 0) -> list[str]:
    return [number for side in sides for level in side for number in level[first : first + 2]]


def _of_binance(message: Any) -> list[str]:
    data = message.get("data", message)
    if "B" in data:
        return [data["b"], data["B"], data["a"], data["A"]]
    return [data["p"], data["q"]] if "p" in data else _of_levels(data["b"], data["a"])


def _of_bybit(message: Any) -> list[str]:
    data = message["data"]
    return _of_levels(data["b"], data["a"]) if isinstance(data, dict) else [n for one in data for n in (one["p"], one["v"])]


def _of_coinbase(message: Any) -> list[str]:
    return _of_levels(message["changes"], first=1) if "changes" in message else [message["price"], message["size"]]


def _of_okx(message: Any) -> list[str]:
    found = message.get("data", ())
    return [n for one in found for n in (_of_levels(one["bids"], one["asks"]) if "bids" in one else (one["px"], one["sz"]))]


_NUMBERS: dict[str, Callable[[Any], Sequence[Any]]] = {
    "binance": _of_binance, "bybit": _of_bybit, "coinbase": _of_coinbase, "okx": _of_okx,
    "kraken_futures": lambda message: (message["price"], message["qty"]),
}  # fmt: skip
"""Prices and quantities of a message that has been parsed, for peers."""


# ---------------------------------------------------------------- what is sent


def venue_messages(count: int, seed: int) -> list[bytes]:
    """A book's snapshot, then depth updates of one to eight levels, every fifth message a trade, in Bybit's words."""
    draw, made = random.Random(seed), list[bytes]()

    def levels(side: int, many: int) -> list[list[str]]:
        return [[f"{(_BASE + side * draw.randint(1, 500)) / 100:.2f}", f"{draw.randint(0, 400) / 1000:.3f}"] for _ in range(many)]

    def message(kind: str, number: int, many: int) -> bytes:
        data = {"s": "AAAUSDT", "b": levels(-1, many), "a": levels(1, many), "u": number, "seq": number}
        book = {"topic": "orderbook.50.AAAUSDT", "ts": 1_700_000_000_000 + number, "type": kind, "data": data, "cts": 1_700_000_000_000}
        return json.dumps(book, separators=(",", ":")).encode()

    made.append(message("snapshot", 10, 50))
    update = 10
    while len(made) < count:
        if len(made) % 5 == 0:
            trade = {"T": 1_700_000_000_000 + len(made), "s": "AAAUSDT", "S": draw.choice(["Buy", "Sell"]), "v": "0.010",
                     "p": f"{(_BASE + draw.randint(-9, 9)) / 100:.2f}", "i": str(len(made)), "L": "PlusTick", "BT": False}  # fmt: skip
            topic = {"topic": "publicTrade.AAAUSDT", "type": "snapshot", "ts": trade["T"], "data": [trade]}
            made.append(json.dumps(topic, separators=(",", ":")).encode())
            continue
        update += 1
        made.append(message("delta", update, draw.randint(1, 4)))
    return made


class _WebsocketServer:
    """Sends the same messages to every client that has said something."""

    def __init__(self, texts: Sequence[bytes]) -> None:
        self._texts, self.port = [text.decode() for text in texts], 0
        self._loop = uvloop.new_event_loop()
        self._started, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()), daemon=True)

    def __enter__(self) -> _WebsocketServer:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(5)
        self._loop.close()

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_get("/ws", self._client)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        self._started.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _client(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(compress=False)
        await socket.prepare(request)
        await socket.receive()
        try:
            for text in self._texts:
                await socket.send_str(text)
            async for _ in socket:
                pass
        except ConnectionError:
            pass
        return socket
