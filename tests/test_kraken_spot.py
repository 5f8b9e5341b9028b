"""Kraken's spot feed (websocket v2): the documentation's own checksum, depth, subscriptions, and the compiled decoder beside it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from json_twins import TextBook, kraken_checksum
from nodes import until
from sources import WebServer, receiving
from test_coinbase_kraken import make, send
from test_json_compiled import assert_same
from test_websocket_source import body, websocket

from tickmesh.node.event import ASK, BID, Flag, Kind
from tickmesh.node.json_ladder import KRAKEN
from tickmesh.node.venues import book_again

# docs.kraken.com, "Spot Websockets (v2) Book Checksum": the example, whose checksum is 3310070434
BIDS = (
    "45283.5 0.10000000 45283.4 1.54582015 45282.1 0.10000000 45281.0 0.10000000 45280.3 1.54592586 "
    "45279.0 0.07990000 45277.6 0.03310103 45277.5 0.30000000 45277.3 1.54602737 45276.6 0.15445238"
)
ASKS = (
    "45285.2 0.00100000 45286.4 1.54571953 45286.6 1.54571109 45289.6 1.54560911 45290.2 0.15890660 "
    "45291.8 1.54553491 45294.7 0.04454749 45296.1 0.35380000 45297.5 0.09945542 45299.5 0.18772827"
)
CHECKSUM = 3310070434
TIME = "2023-10-06T17:35:55.440295Z"


def levels(words: str) -> str:
    pairs = zip(words.split()[::2], words.split()[1::2])
    return "[" + ",".join(f'{{"price":{price},"qty":{qty}}}' for price, qty in pairs) + "]"


def book(kind: str, bids: str, asks: str, checksum: int, more: str = "") -> bytes:
    entry = f'{{"symbol":"BTC/USD","bids":{levels(bids)},"asks":{levels(asks)},"checksum":{checksum}{more}}}'
    return f'{{"channel":"book","type":"{kind}","data":[{entry}]}}'.encode()


SNAPSHOT = book("snapshot", BIDS, ASKS, CHECKSUM)


def twin() -> TextBook:
    made = TextBook()
    for side, words in ((BID, BIDS), (ASK, ASKS)):
        for price, qty in zip(words.split()[::2], words.split()[1::2]):
            made.set(side, int(price.replace(".", "")), int(qty.replace(".", "")), (price, qty))
    return made


def update(words: tuple[str, str], checksum: int) -> bytes:
    return book("update", *words, checksum, f',"timestamp":"{TIME}"')


def test_the_checksum_of_the_documentation() -> None:
    feed = make("kraken")
    events = send(feed, SNAPSHOT)
    assert events["kind"].tolist() == [Kind.REFERENCE, Kind.CLEAR, *[Kind.LEVEL] * 20]
    assert feed.counters["checksums_checked"] == 1
    assert feed.counters["checksums_failed"] == 0
    assert feed._texts.checksum(feed._listings["BTC/USD"], KRAKEN) == CHECKSUM  # type: ignore[attr-defined]
    assert kraken_checksum(twin().best(BID), twin().best(ASK)) == CHECKSUM


def test_a_wrong_checksum_makes_the_book_stale_until_a_snapshot() -> None:
    feed = make("kraken")
    assert send(feed, SNAPSHOT.replace(b"3310070434", b"3310070435"))["kind"][-1] == Kind.GAP
    assert (feed.snapshots_wanted, feed.counters["checksums_failed"]) == ({"BTC/USD"}, 1)
    assert not len(send(feed, update(("45283.5 0.2", ""), 1)))
    assert send(feed, SNAPSHOT)["kind"].tolist() == [Kind.CLEAR, *[Kind.LEVEL] * 20]
    assert feed.snapshots_wanted == set()


def changed() -> tuple[bytes, TextBook]:
    """A new best bid pushes the tenth out; the venue does not say so."""
    after = twin()
    after.set(BID, 452840, 50000000, ("45284.0", "0.50000000"))
    after.fall(BID, 10)
    return update(("45284.0 0.50000000", ""), kraken_checksum(after.best(BID), after.best(ASK))), after


def test_levels_beyond_the_depth_of_the_subscription_are_removed() -> None:
    feed = make("kraken")
    send(feed, SNAPSHOT)
    message, after = changed()
    new, gone = send(feed, message)
    assert (new["price"], new["qty"], new["flags"] & Flag.MORE) == (45_284_000_000_000, 50_000_000, Flag.MORE)
    assert (gone["price"], gone["qty"], gone["side"], gone["flags"]) == (45_276_600_000_000, 0, BID, 0)
    assert feed.counters["checksums_failed"] == 0
    assert len(after.best(BID)) == 10
    assert new["ts_event"] == 1_696_613_755_440_295_000


def test_the_depth_is_what_the_venue_answers() -> None:
    feed = make("kraken")
    answer = {"method": "subscribe", "result": {"channel": "book", "depth": 25, "symbol": "BTC/USD"}, "success": True}
    send(feed, answer, SNAPSHOT)
    after = twin()
    after.set(BID, 452840, 50000000, ("45284.0", "0.50000000"))
    assert len(send(feed, update(("45284.0 0.50000000", ""), kraken_checksum(after.best(BID), after.best(ASK))))) == 1
    assert feed.counters["checksums_failed"] == 0


def test_compiled_code_does_the_same() -> None:
    message, _ = changed()
    feed = assert_same("kraken", [(SNAPSHOT, 1, 0), (message, 2, 0), (message.replace(b"45284.0", b"45284.1"), 3, 0), (message, 4, 0)])
    assert feed.counters["compiled"] == 2
    assert feed.counters["checksums_failed"] == 1


def test_trades_tickers_and_others() -> None:
    feed = make("kraken")
    entry = {"symbol": "BTC/USD", "side": "sell", "price": 45.5, "qty": 0.25, "ord_type": "market", "trade_id": 7, "timestamp": TIME}
    quote = {"symbol": "BTC/USD", "bid": 45.4, "bid_qty": 1.5, "ask": 45.6, "ask_qty": 2.0}
    events = send(
        feed, {"channel": "trade", "type": "snapshot", "data": [entry]}, {"channel": "heartbeat"}, {"method": "pong"},
        {"channel": "trade", "type": "update", "data": [entry, {**entry, "side": "up"}]},
        {"channel": "ticker", "type": "update", "data": [quote]}, {"channel": "odd", "type": "update", "data": []},
    )  # fmt: skip
    assert events["kind"].tolist() == [Kind.REFERENCE, Kind.TRADE, Kind.QUOTE]
    assert (events[1]["side"], events[1]["price"], events[1]["id"]) == (ASK, 45_500_000_000, 7)
    assert dict(feed.malformed) == {"bad_side": 1, "unknown_event": 1}
    assert feed.messages["heartbeat"] == 1


@pytest.mark.parametrize("channel", ["book", "trade"])
def test_a_book_is_subscribed_to_again(channel: str) -> None:
    mine = {"method": "subscribe", "params": {"channel": channel, "symbol": ["BTC/USD", "ETH/USD"], "depth": 10}}
    found = [json.loads(text) for text in book_again([json.dumps(mine)], "BTC/USD")]
    again = {"channel": "book", "symbol": ["BTC/USD"], "depth": 10}
    expected = [{"method": verb, "params": again} for verb in ("unsubscribe", "subscribe")]
    assert found == (expected if channel == "book" else [])


def test_over_a_websocket() -> None:
    """It subscribes, and asks again for a book whose checksum is wrong."""
    heard: list[Any] = []
    message, _ = changed()

    async def talk(socket: web.WebSocketResponse) -> None:
        heard.extend([json.loads((await socket.receive()).data) for _ in range(2)])
        for text in (SNAPSHOT, message, message.replace(b"45284.0", b"45284.1")):
            await socket.send_str(text.decode())
        while len(heard) < 4:
            found = json.loads((await socket.receive()).data)
            heard.extend([found] if found["method"] != "ping" else [])
        await socket.send_str(SNAPSHOT.decode())
        async for _ in socket:
            pass

    with WebServer({"/ws": websocket(talk)}) as server, receiving(body(server, "kraken", 'symbols = ["BTC/USD"]')) as received:
        until(lambda: len(received.kinds(Kind.CLEAR)) == 2, "another snapshot")
        received.wait_for(snapshots_asked=1, checksums_failed=1)
        until(lambda: received.counter("books_waiting") == 0, "no book waits")
        kinds = received.made()["kind"]
    assert [one["params"]["channel"] for one in heard] == ["book", "trade", "book", "book"]
    assert [one["method"] for one in heard] == ["subscribe", "subscribe", "unsubscribe", "subscribe"]
    assert np.count_nonzero(kinds == Kind.GAP) == 1
