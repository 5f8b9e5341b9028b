"""Coinbase's and Kraken's feeds against recordings: the venue's own best bid and offer must agree with the books; and bad messages."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from dict_book import DictBook, rows_of
from replays import recording
from sources import source_config

from tickmesh.node.event import ASK, BID, EventArray, Flag, Kind
from tickmesh.node.event_batch import EventBatch
from tickmesh.node.fixed_point import fixed_point
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.json_feed import VenueFeed
from tickmesh.node.venues import venue_feed
from tickmesh.transports.recording import read_lines

COINBASE, KRAKEN = "cryptofeed_ws/COINBASE.ws.28.0", "cryptofeed_ws/KRAKEN_FUTURES.ws.1.0"


def make(data_format: str, body: str = "") -> VenueFeed:
    config = source_config(f'type = "file"\npath = "x"\ndata_format = "{data_format}"\n{body}')
    return venue_feed(config.data_sources["feed"], InstrumentTable(64))


def send(feed: VenueFeed, *messages: Any) -> EventArray:
    batch = EventBatch()
    for message in messages:
        feed.feed(message if isinstance(message, bytes) else json.dumps(message).encode(), 1, batch)
    return batch.take()


Best = tuple[int, int]


def followed(data_format: str, path: str, told: Any) -> tuple[VenueFeed, list[list[Best]], list[tuple[int, Best, bool]]]:
    """Feed a recording: the feed, each instrument's best prices over time, and what the venue said of which, and whether it was so."""
    feed, batch, books = make(data_format), EventBatch(1 << 18), [DictBook() for _ in range(64)]
    states: list[list[Best]] = [[] for _ in books]
    said: list[tuple[int, Best, bool]] = []
    for recv_ns, payload in read_lines(recording(path)):
        batch.clear()
        feed.feed(payload, recv_ns, batch)
        for row in rows_of(batch.view()):
            if books[row[0]].apply(row) and row[1] == Kind.LEVEL:
                states[row[0]].append((books[row[0]].best(BID)[0], books[row[0]].best(ASK)[0]))
        found = told(json.loads(payload, parse_float=str))
        if found is not None and found[0] in feed._listings:
            number = feed._listings[found[0]].instrument
            best = (fixed_point(found[1], 9), fixed_point(found[2], 9))
            said.append((number, best, best in states[number][-1:]))
    return feed, states, said


def coinbase_says(message: dict[str, Any]) -> Any:
    return (message["product_id"], message["best_bid"], message["best_ask"]) if message["type"] == "ticker" else None


def kraken_says(message: dict[str, Any]) -> Any:
    if message.get("feed") != "ticker_lite" or "event" in message:
        return None
    return message["product_id"], str(message["bid"]), str(message["ask"])


def test_kraken_books_are_what_the_ticker_says() -> None:
    feed, states, said = followed("kraken_futures", KRAKEN, kraken_says)
    assert feed.messages["book"] == feed.counters["updates_applied"] == 7014
    assert (feed.counters["snapshots"], feed.counters["gaps"], dict(feed.malformed)) == (10, 0, {})
    assert len(said) == 107
    assert all(so for _, _, so in said)
    assert all(bid < ask for states_of in states for bid, ask in states_of)


def test_coinbase_books_are_what_the_ticker_says() -> None:
    """A product's first ticker is of its last trade before the subscription; each later one is the book at that moment."""
    feed, states, said = followed("coinbase", COINBASE, coinbase_says)
    assert feed.messages["l2update"] == feed.counters["updates_applied"] == 9719
    assert (feed.counters["snapshots"], dict(feed.malformed)) == (10, {})
    assert (feed.messages["match"], feed.messages["last_match"]) == (97, 10)
    first = {number: place for place, (number, _, _) in reversed(list(enumerate(said)))}
    later = [so for place, (_, _, so) in enumerate(said) if place not in first.values()]
    assert (len(first), len(later), sum(later)) == (10, 97, 97)
    assert all(bid < ask for states_of in states for bid, ask in states_of)


def test_coinbase_trades() -> None:
    feed, batch = make("coinbase"), EventBatch(1 << 18)
    expected = []
    for recv_ns, payload in read_lines(recording(COINBASE)):
        feed.feed(payload, recv_ns, batch)
        message = json.loads(payload)
        if message["type"] == "match":
            expected.append((message["trade_id"], fixed_point(message["price"], 9), BID if message["side"] == "sell" else ASK))
    events = batch.take()
    trades = events[events["kind"] == Kind.TRADE]
    assert list(zip(trades["id"].tolist(), trades["price"].tolist(), trades["side"].tolist())) == expected
    assert np.all(trades["ts_event"] > 1_600_000_000 * 10**9)


# ---------------------------------------------------------------- messages

SNAPSHOT = {"type": "snapshot", "product_id": "A-B", "bids": [["10.5", "1"]], "asks": [["11", "2"], ["12", "3"]]}
CHANGE = {"type": "l2update", "product_id": "A-B", "changes": [["buy", "10.6", "4"]], "time": "2024-01-01T00:00:00.000001Z"}
MATCH = {
    "type": "match", "product_id": "A-B", "trade_id": 7, "side": "sell", "size": "1", "price": "11", "time": "2024-01-01T00:00:00Z",
}  # fmt: skip
BOOK = {
    "feed": "book_snapshot", "product_id": "PI_X", "timestamp": 1, "seq": 10,
    "bids": [{"price": 10.5, "qty": 1.0}], "asks": [{"price": 11, "qty": 2}],
}  # fmt: skip
LEVEL = {"feed": "book", "product_id": "PI_X", "side": "buy", "seq": 11, "price": 10.6, "qty": 4.0, "timestamp": 2}


def test_a_coinbase_book_waits_for_its_snapshot() -> None:
    feed = make("coinbase")
    assert send(feed, CHANGE)["kind"].tolist() == [Kind.REFERENCE]
    assert feed.snapshots_wanted == {"A-B"}
    events = send(feed, SNAPSHOT, CHANGE)
    assert events["kind"].tolist() == [Kind.CLEAR, Kind.LEVEL, Kind.LEVEL, Kind.LEVEL, Kind.LEVEL]
    assert (events["flags"][1:] & Flag.MORE != 0).tolist() == [True, True, False, False]
    assert not feed.snapshots_wanted
    feed.lost()
    assert feed.snapshots_wanted == {"A-B"}
    assert not len(send(feed, CHANGE))


def test_a_kraken_gap() -> None:
    feed = make("kraken_futures")
    events = send(feed, BOOK, LEVEL, {**LEVEL, "seq": 11}, {**LEVEL, "seq": 14}, {**LEVEL, "seq": 15})
    assert events["kind"].tolist() == [Kind.REFERENCE, Kind.CLEAR, Kind.LEVEL, Kind.LEVEL, Kind.LEVEL, Kind.GAP]
    assert (events[-1]["id"], events[-1]["aux"], events[-1]["qty"]) == (12, 13, 2)
    assert feed.snapshots_wanted == {"PI_X"}
    assert (feed.counters["updates_old"], feed.counters["updates_dropped"]) == (1, 1)
    assert events[4]["price"] == 10_600_000_000


@pytest.mark.parametrize(
    ("data_format", "message", "reason"),
    [
        ("coinbase", {"type": "candles"}, "unknown_event"),
        ("coinbase", [], "not_an_object"),
        ("coinbase", {}, "missing_field"),
        ("coinbase", {**SNAPSHOT, "bids": [["x", "1"]]}, "number_not_a_number"),
        ("coinbase", {**SNAPSHOT, "bids": {}}, "wrong_type"),
        ("coinbase", {**SNAPSHOT, "product_id": 3}, "bad_symbol"),
        ("coinbase", {**CHANGE, "changes": [["up", "1", "1"]]}, "bad_side"),
        ("coinbase", {**CHANGE, "changes": [["buy", "-1", "1"]]}, "number_negative"),
        ("coinbase", {**CHANGE, "changes": [["buy", "1"]]}, "wrong_type"),
        ("coinbase", {**CHANGE, "changes": [["buy", "1", "1"]] * 20_001}, "too_many_levels"),
        ("coinbase", {**CHANGE, "time": "noon"}, "bad_time"),
        ("coinbase", {**CHANGE, "time": 5}, "bad_time"),
        ("coinbase", {**MATCH, "side": "both"}, "bad_side"),
        ("coinbase", {**MATCH, "trade_id": "7"}, "bad_id"),
        ("kraken_futures", {"feed": "candles"}, "unknown_event"),
        ("kraken_futures", [], "not_an_object"),
        ("kraken_futures", {**BOOK, "bids": {}}, "wrong_type"),
        ("kraken_futures", {**BOOK, "bids": [{"price": 1}]}, "missing_field"),
        ("kraken_futures", {**BOOK, "bids": [{"price": True, "qty": 1}]}, "wrong_type"),
        ("kraken_futures", {**BOOK, "bids": [{"price": 1, "qty": -1}]}, "number_negative"),
        ("kraken_futures", {**BOOK, "bids": [{"price": 1, "qty": 1}] * 20_001}, "too_many_levels"),
        ("kraken_futures", {**BOOK, "seq": -1}, "bad_id"),
        ("kraken_futures", {**LEVEL, "side": "up"}, "bad_side"),
        ("kraken_futures", {**LEVEL, "timestamp": "x"}, "number_not_a_number"),
        ("kraken_futures", {**LEVEL, "feed": "trade", "uid": "x", "time": 1}, "wrong_type"),
    ],
)
def test_malformed_messages_are_counted_by_reason(data_format: str, message: Any, reason: str) -> None:
    feed = make(data_format)
    assert send(feed, message).size == 0
    assert feed.malformed == {reason: 1}
    good = send(feed, SNAPSHOT if data_format == "coinbase" else BOOK)
    assert good["kind"].tolist()[:2] == [Kind.REFERENCE, Kind.CLEAR]
