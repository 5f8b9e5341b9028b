"""Venue feeds against recordings: the venue's own best bid and offer, checksums and sequence numbers must agree with the books."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from dict_book import DictBook, books_of, rows_of
from json_twins import okx_checksum

from tickmesh.control.config import Source, parse_config
from tickmesh.node.event import ASK, BID, EVENT, QUOTE, REFERENCE, EventArray, Flag, Kind, scaled
from tickmesh.node.event_batch import BatchFull, EventBatch
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.json_feed import VenueFeed, exponent_of, tick_of
from tickmesh.node.venues import VENUE_FEEDS, venue_feed
from tickmesh.transports.recording import read_lines

DATA = Path(os.environ.get("TICKMESH_DATA", Path(__file__).parents[1] / "../shared/data"))


def recording(path: str) -> Path:
    if not (DATA / path).exists():
        pytest.skip(f"no recording {DATA / path}; set TICKMESH_DATA")
    return DATA / path


def options(data_format: str, body: str = "") -> Source:
    text = f'[data_sources.s]\ntype = "file"\npath = "x"\ndata_format = "{data_format}"\n{body}'
    return parse_config(text).data_sources["s"]


def make(data_format: str, body: str = "", capacity: int = 64) -> VenueFeed:
    return venue_feed(options(data_format, body), InstrumentTable(capacity))


def replay(feed: VenueFeed, lines: Iterator[tuple[int, bytes]]) -> EventArray:
    batch, parts = EventBatch(), []
    for recv_ns, payload in lines:
        if batch.room < feed.events_max:
            parts.append(batch.take())
        feed.feed(payload, recv_ns, batch)
    return np.concatenate([*parts, batch.take()])


def send(feed: VenueFeed, *messages: Any) -> EventArray:
    return replay(feed, iter([(1, json.dumps(m).encode() if not isinstance(m, bytes) else m) for m in messages]))


# ---------------------------------------------------------------- Binance


@pytest.fixture(scope="module")
def binance() -> tuple[VenueFeed, EventArray, dict[str, Any]]:
    feed = make("binance", 'symbols = ["BTCUSDT"]')
    lines = read_lines(recording("binance_spot_btcusdt/btcusdt_20240808.gz"))
    expected = json.loads(recording("binance_spot_btcusdt/expected.json").read_text())
    return feed, replay(feed, iter(lines)), expected


def test_binance_counts(binance: tuple[VenueFeed, EventArray, dict[str, Any]]) -> None:
    feed, events, expected = binance
    counts = expected["messages"]
    assert feed.messages == {"depthUpdate": counts["depth"], "bookTicker": counts["bookTicker"], "trade": counts["trade"], "snapshot": 1}
    assert feed.counters["updates_applied"] == counts["applied"]
    assert feed.counters["updates_old"] == counts["stale"]
    assert not feed.malformed
    assert feed.counters["gaps"] == 0
    assert not feed.snapshots_wanted
    assert np.count_nonzero((events["kind"] == Kind.LEVEL) & (events["flags"] & Flag.SNAPSHOT != 0)) == counts["snap_levels"]


def test_binance_book_equals_the_venues_best_bid_and_offer(binance: tuple[VenueFeed, EventArray, dict[str, Any]]) -> None:
    _, events, expected = binance
    quotes = events[events["kind"] == Kind.QUOTE].view(QUOTE)
    ids = quotes["seq"].tolist()
    assert ids == sorted(ids)
    book, compared, equal, last = DictBook(), 0, 0, 0
    theirs = list(zip(*(quotes[name].tolist() for name in ("bid", "bid_qty", "ask", "ask_qty"))))
    for row in rows_of(events):
        _, kind, _, flags, _, _, seq = row
        if book.apply(row) and kind == Kind.LEVEL and not flags & Flag.SNAPSHOT:
            last = seq
            compared += 1
            equal += theirs[bisect_right(ids, last) - 1] == (*book.best(BID), *book.best(ASK))
    assert last == expected["final_update_id"]
    assert compared == expected["messages"]["applied"]
    assert equal >= 3448
    for side, name in ((BID, "bids"), (ASK, "asks")):
        assert book.top(side, 10) == [(scaled(p, 9), scaled(q, 8)) for p, q in expected["final_top10"][name]]


def test_binance_trades(binance: tuple[VenueFeed, EventArray, dict[str, Any]]) -> None:
    _, events, expected = binance
    trades = events[events["kind"] == Kind.TRADE]
    assert len(trades) == expected["trades"]["count"]
    assert trades["qty"].sum() == scaled(expected["trades"]["volume"], 8)
    notional = sum(int(p) * int(q) for p, q in zip(trades["price"], trades["qty"]))
    vwap = Decimal(notional) / Decimal(int(trades["qty"].sum())) / 10**9
    assert abs(vwap - Decimal(expected["trades"]["vwap"])) < Decimal("1e-15")
    assert np.all(np.diff(trades["id"].astype(np.int64)) > 0)


def test_binance_reference_comes_first(binance: tuple[VenueFeed, EventArray, dict[str, Any]]) -> None:
    _, events, _ = binance
    first = events[:1].view(REFERENCE)[0]
    assert (first["kind"], first["symbol"], first["tick_size"], first["side"]) == (Kind.REFERENCE, b"BTCUSDT", 10_000_000, 8)
    assert np.count_nonzero(events["kind"] == Kind.REFERENCE) == 1


def test_binance_several_symbols_with_snapshots_by_request() -> None:
    feed = make("binance")
    batch = EventBatch()
    for recv_ns, payload in read_lines(recording("cryptofeed_ws/BINANCE.ws.1.0")):
        feed.feed(payload, recv_ns, batch)
    assert feed.snapshots_wanted == {"NKNUSDT", "BLZETH", "LRCBTC", "RUNEEUR"}
    for line in recording("cryptofeed_ws/BINANCE.http.0.0").read_bytes().splitlines():
        if b"symbol=" in line:
            symbol = line.split(b"symbol=")[1].split(b"&")[0].decode()
            feed.snapshot(symbol, line[line.index(b": {") + 2 :], 0, batch)
    assert not feed.snapshots_wanted
    assert feed.counters["snapshots"] == 4
    assert feed.counters["gaps"] == 0
    assert not feed.malformed
    quotes = {int(q["instrument"]): q for q in batch.view()[batch.view()["kind"] == Kind.QUOTE].view(QUOTE)}
    for instrument, book in books_of(batch.take()).items():
        assert book.best(BID)[0] < book.best(ASK)[0]
        if instrument in quotes:  # the last quote may be a few updates older or newer: the same price region
            assert abs(book.best(BID)[0] / int(quotes[instrument]["bid"]) - 1) < 0.01


def depth(first: int, last: int, bids: list[list[str]] | None = None, **more: Any) -> dict[str, Any]:
    return {"e": "depthUpdate", "E": 5, "s": "X", "U": first, "u": last, "b": bids or [["1.00", "2.0"]], "a": [], **more}


def snapshot(at: int) -> dict[str, Any]:
    return {"lastUpdateId": at, "bids": [["0.99", "1.0"]], "asks": [["1.01", "1.0"]]}


def test_binance_rules_of_joining() -> None:
    feed = make("binance", "tick_size = 0.01\nquantity_exponent = 1\n")
    events = send(feed, depth(1, 3), depth(4, 8), depth(9, 10), snapshot(5))
    assert events["kind"].tolist() == [Kind.REFERENCE, Kind.CLEAR, Kind.LEVEL, Kind.LEVEL, Kind.LEVEL, Kind.LEVEL]
    assert events["seq"].tolist() == [0, 5, 5, 5, 8, 10]
    more = [bool(f & Flag.MORE) for f in events["flags"]]
    assert more == [False, True, True, False, False, False]
    assert feed.counters["updates_old"] == 1
    assert send(feed, depth(9, 10)).size == 0  # seen
    gap, *rest = send(feed, depth(13, 14), depth(15, 16))
    assert (gap["kind"], gap["id"], gap["aux"], gap["qty"], rest) == (Kind.GAP, 11, 12, 2, [])
    assert feed.snapshots_wanted == {"X"}
    assert send(feed, snapshot(11)).size == 0  # older than the first update held
    assert feed.counters["snapshots_old"] == 1
    assert feed.snapshots_wanted == {"X"}
    assert send(feed, snapshot(13))["seq"].tolist() == [13, 13, 13, 14, 16]
    batch = EventBatch()
    feed.snapshot("X", json.dumps(snapshot(12)).encode(), 1, batch)  # the book is ahead of it
    assert batch.count == 0
    assert feed.counters["snapshots_old"] == 2
    assert not feed.malformed


def test_binance_futures_follow_the_previous_id() -> None:
    feed = make("binance")
    send(feed, depth(5, 9, pu=3), snapshot(7))
    assert feed.counters["updates_applied"] == 1
    send(feed, depth(12, 15, pu=9))
    assert feed.counters["gaps"] == 0
    send(feed, depth(16, 20, pu=14))
    assert feed.counters["gaps"] == 1


def test_binance_held_updates_are_bounded() -> None:
    feed = make("binance")
    levels = [[f"1.{i:04d}", "1"] for i in range(9000)]
    send(feed, *[depth(i, i, levels) for i in range(1, 8)])
    assert feed.counters["updates_dropped"] == 3
    assert send(feed, snapshot(3))["kind"].tolist().count(Kind.LEVEL) == 2 + 4 * 9000


def test_binance_snapshot_of_unknown_symbol() -> None:
    feed = make("binance")
    assert send(feed, snapshot(3)).size == 0
    assert feed.malformed == {"snapshot_without_symbol": 1}


def test_symbols_are_filtered_and_the_table_may_be_full() -> None:
    feed = make("binance", 'exclude = ["X"]')
    assert send(feed, depth(1, 1)).size == 0
    assert feed.counters["filtered"] == 1
    chosen = make("binance", 'symbols = ["X*", "A?"]\nexclude = ["*Y"]')
    for symbol in ("XY", "AB", "X", "ABC", "XY"):
        send(chosen, {**TRADE, "s": symbol})
    assert [chosen.table.symbol(i) for i in range(len(chosen.table))] == ["AB", "X"]
    assert chosen.counters["filtered"] == 3
    full = make("binance", capacity=1)
    full.table.intern("OTHER", 0)
    assert send(full, depth(1, 1)).size == 0
    assert full.counters["refused_instruments"] == 1


def test_a_malformed_first_message_takes_its_reference_back() -> None:
    feed = make("binance")
    assert send(feed, depth(1, 1, [["1.0", "-2"]])).size == 0
    assert send(feed, depth(2, 2)).view(REFERENCE)["kind"].tolist() == [Kind.REFERENCE]


TRADE = {"e": "trade", "E": 5, "s": "X", "t": 7, "p": "1.5", "q": "2", "T": 4, "m": True, "M": True}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"{", "bad_json"),
        (b"\xff\xfe", "bad_json"),
        (b"", "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b"3", "not_an_object"),
        ({"x": 1}, "unknown_event"),
        ({"e": "nonsense"}, "unknown_event"),
        ({**TRADE, "e": 3}, "unknown_event"),
        ({**TRADE, "e": {}}, "wrong_type"),
        ({k: v for k, v in TRADE.items() if k != "p"}, "missing_field"),
        ({**TRADE, "p": "abc"}, "number_not_a_number"),
        ({**TRADE, "p": "1e99"}, "number_too_large"),
        ({**TRADE, "p": "0.0000000001"}, "number_too_precise"),
        ({**TRADE, "p": 15}, "wrong_type"),
        ({**TRADE, "p": None}, "wrong_type"),
        ({**TRADE, "p": ["1"]}, "wrong_type"),
        ({**TRADE, "p": "-1"}, "number_negative"),
        ({**TRADE, "t": -1}, "bad_id"),
        ({**TRADE, "t": 1.5}, "bad_id"),
        ({**TRADE, "T": 1 << 62}, "bad_time"),
        ({**TRADE, "m": "true"}, "wrong_type"),
        ({**TRADE, "s": 3}, "bad_symbol"),
        ({**TRADE, "s": "X" * 25}, "bad_symbol"),
        ({**TRADE, "s": "Ä"}, "bad_symbol"),
        ({**TRADE, "s": ""}, "bad_symbol"),
        (depth(5, 4), "bad_id"),
        (depth(5, 6, [["1"]]), "wrong_type"),
        (depth(5, 6, ["12"]), "wrong_type"),  # type: ignore[list-item]
        (depth(5, 6, [["1", "1"]] * 20_001), "too_many_levels"),
        ({**depth(5, 6), "b": {}}, "wrong_type"),
        ({"stream": "x@trade", "data": None}, "not_an_object"),
    ],
)
def test_binance_malformed_messages_are_counted_by_reason(message: Any, reason: str) -> None:
    feed = make("binance")
    assert send(feed, message).size == 0
    assert feed.malformed == {reason: 1}
    assert send(feed, TRADE)["kind"].tolist() == [Kind.REFERENCE, Kind.TRADE]


def test_ignored_messages_are_counted() -> None:
    feed = make("binance")
    events = send(feed, {"e": "kline"}, {"result": None, "id": 1}, {"stream": "x@depth5", "data": snapshot(1)}, [{"e": "24hrTicker"}])
    assert events.size == 0
    assert feed.messages == {"kline": 1, "answer": 1, "partialDepth": 1, "array": 1}


def test_inferred_sizes_leave_room() -> None:
    assert exponent_of(["0.02000000", "3.78826000"]) == 8
    assert exponent_of(["70269", "2409"]) == 5
    assert exponent_of(["15356000000.00"]) == 0
    assert exponent_of(["15356000000.123"]) == 3
    assert exponent_of(["300", "1.50"], by_order=True) == 1
    assert exponent_of([]) == 8
    assert tick_of([61837_630_000_000, 61837_640_000_000]) == 10_000_000
    assert tick_of([30_000_000_000_000]) == 1_000_000_000  # a round price says little: five digits are kept
    assert tick_of([65_470]) == 1
    assert tick_of([]) == 1


def test_trade_fields() -> None:
    events = send(make("binance"), TRADE, {**TRADE, "e": "aggTrade", "a": 9, "m": False})
    assert events["side"][1:].tolist() == [ASK, BID]  # the buyer was the maker: the seller took
    assert events["id"][1:].tolist() == [7, 9]
    assert events["ts_event"][1:].tolist() == [4_000_000] * 2
    assert events["price"][1:].tolist() == [1_500_000_000] * 2
    assert events["qty"][1:].tolist() == [200_000_000] * 2


# ---------------------------------------------------------------- OKX


OKX_TRADE = {"instId": "X", "px": "1", "sz": "1", "side": "buy", "ts": "1", "tradeId": "1"}


def okx_book(action: str, bids: Any, asks: Any, **more: Any) -> dict[str, Any]:
    entry = {"bids": bids, "asks": asks, "ts": "5", **more}
    return {"arg": {"channel": "books", "instId": "X"}, "action": action, "data": [entry]}


def test_okx_every_checksum_matches() -> None:
    feed = make("okx")
    events = replay(feed, iter(read_lines(recording("cryptofeed_ws/OKX.ws.1.0"))))
    assert feed.counters["checksums_checked"] == 290
    assert feed.counters["checksums_failed"] == 0
    assert not feed.malformed
    assert feed.messages["books"] == 290
    assert np.count_nonzero(events["kind"] == Kind.TRADE) == feed.messages["trades"]
    assert np.count_nonzero(events["kind"] == Kind.QUOTE) == feed.messages["tickers"]
    for book in books_of(events).values():
        assert book.best(BID)[0] < book.best(ASK)[0]
        assert not book.stale


def test_okx_wrong_checksum_makes_the_book_stale_until_a_snapshot() -> None:
    feed = make("okx")
    right = okx_checksum([("1.0", "2")], [("1.1", "3")])
    first = send(feed, okx_book("snapshot", [["1.0", "2", "0", "4"]], [["1.1", "3", "0", "1"]], checksum=right))
    assert first["kind"].tolist() == [Kind.REFERENCE, Kind.CLEAR, Kind.LEVEL, Kind.LEVEL]
    assert first["aux"].tolist()[2:] == [4, 1]
    wrong = send(feed, okx_book("update", [["1.0", "0", "0", "0"]], [], checksum=right))
    assert wrong["kind"].tolist() == [Kind.LEVEL, Kind.GAP]
    assert feed.snapshots_wanted == {"X"}
    assert send(feed, okx_book("update", [["1.0", "1", "0", "1"]], [], checksum=right)).size == 0
    assert feed.counters["updates_dropped"] == 1
    again = send(feed, okx_book("snapshot", [["1.0", "2", "0", "4"]], [["1.1", "3", "0", "1"]], checksum=right))
    assert again["kind"].tolist() == [Kind.CLEAR, Kind.LEVEL, Kind.LEVEL]
    assert not feed.snapshots_wanted


def test_okx_sequence_gap() -> None:
    feed = make("okx")
    send(feed, okx_book("snapshot", [["1.0", "2", "0", "4"]], [], seqId=10, prevSeqId=-1))
    assert send(feed, okx_book("update", [["1.0", "3", "0", "4"]], [], seqId=15, prevSeqId=10)).size == 1
    gap = send(feed, okx_book("update", [["1.0", "3", "0", "4"]], [], seqId=25, prevSeqId=20))
    assert (gap["kind"].tolist(), gap["id"].tolist(), gap["aux"].tolist()) == ([Kind.GAP], [16], [20])
    assert feed.counters["checksums_absent"] == 2


def test_okx_checksum_goes_from_bid_to_ask_and_is_signed() -> None:
    bids = [("3366.1", "7"), ("3366", "6")]
    asks = [("3366.8", "9"), ("3368", "8"), ("3372", "8")]
    text = b"3366.1:7:3366.8:9:3366:6:3368:8:3372:8"  # the documentation's example
    assert okx_checksum(bids, asks) & 0xFFFFFFFF == crc32(text)
    assert -(1 << 31) <= okx_checksum(bids, asks) < 1 << 31


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({}, "missing_field"),
        ({"arg": {"channel": "books"}, "data": {}}, "wrong_type"),
        (okx_book("remove", [], []), "bad_action"),
        (okx_book("snapshot", [["1", "x"]], []), "number_not_a_number"),
        ({"arg": {"channel": "trades"}, "data": [{**OKX_TRADE, "side": "up"}]}, "bad_side"),
        ({"arg": {"channel": "trades"}, "data": [None]}, "wrong_type"),
        ({"arg": 3, "data": []}, "wrong_type"),
    ],
)
def test_okx_malformed(message: Any, reason: str) -> None:
    feed = make("okx")
    assert send(feed, message).size == 0
    assert feed.malformed == {reason: 1}


def test_one_malformed_entry_spares_its_neighbours() -> None:
    good = OKX_TRADE
    feed = make("okx")
    events = send(feed, {"arg": {"channel": "trades"}, "data": [good, {**good, "px": "?"}, {**good, "tradeId": "2"}]})
    assert events["kind"].tolist() == [Kind.REFERENCE, Kind.TRADE, Kind.TRADE]
    assert feed.malformed == {"number_not_a_number": 1}


# ---------------------------------------------------------------- Bybit


def test_bybit_book_without_a_gap() -> None:
    feed = make("bybit")
    lines = list(read_lines(recording("bybit_ob500/xrpusdt-ob500.data.zip")))
    events = replay(feed, iter(lines))
    assert feed.counters == {"snapshots": 1, "updates_applied": 49}
    assert not feed.malformed
    book = books_of(events)[0]
    assert book.best(BID)[0] < book.best(ASK)[0]
    exponent = int(feed.table.record(0)["qty_exponent"])
    assert max(events["qty"][events["kind"] == Kind.LEVEL]) < 1 << 40  # what a level of a book holds
    slow: dict[str, dict[str, str]] = {"b": {}, "a": {}}
    for _, payload in lines:
        for name in "ba":
            for price, qty in json.loads(payload)["data"][name]:
                slow[name][price] = qty
    for side, name in ((BID, "b"), (ASK, "a")):
        assert book.sides[side] == {scaled(p, 9): scaled(q, exponent) for p, q in slow[name].items() if Decimal(q)}


def test_bybit_gap_restart_and_trades() -> None:
    def message(kind: str, u: int) -> dict[str, Any]:
        return {"topic": "orderbook.50.X", "type": kind, "ts": 5, "data": {"s": "X", "b": [["1", "1"]], "a": [], "u": u}}

    feed = make("bybit")
    kinds = [("delta", 4), ("snapshot", 5), ("delta", 6), ("delta", 9), ("delta", 10), ("delta", 1)]
    events = send(feed, *(message(kind, u) for kind, u in kinds))
    assert events["kind"].tolist() == [Kind.REFERENCE, Kind.CLEAR, Kind.LEVEL, Kind.LEVEL, Kind.GAP, Kind.CLEAR, Kind.LEVEL]
    assert feed.counters["updates_dropped"] == 2
    entry = {"T": 1, "s": "X", "S": "Sell", "v": "3", "p": "2.5", "i": "20f43950-d8dd-5b31-9112-a178eb6023af"}
    (trade,) = send(feed, {"topic": "publicTrade.X", "type": "snapshot", "ts": 5, "data": [entry]})
    assert (trade["side"], trade["price"], trade["id"]) == (ASK, 2_500_000_000, 0x20F43950D8DD5B31 >> 1)


# ---------------------------------------------------------------- any input


def test_no_input_raises_or_tears_a_book() -> None:
    """Recorded messages with bytes flipped, cut and doubled: counted, and every update is emitted whole or not at all."""
    random = np.random.default_rng(7)
    sources = {
        "binance": ["binance_spot_btcusdt/btcusdt_20240808.gz"],
        "okx": ["cryptofeed_ws/OKX.ws.1.0"],
        "bybit": ["bybit_ob500/xrpusdt-ob500.data.zip"],
    }
    for name, paths in sources.items():
        feed = make(name)
        lines = [payload for path in paths for _, payload in read_lines(recording(path))][:300]
        batch = EventBatch()
        for payload in lines:
            damaged = bytearray(payload)
            for _ in range(int(random.integers(1, 4))):
                damaged[int(random.integers(len(damaged)))] = int(random.integers(32, 127))
            for text in (bytes(damaged), payload[: int(random.integers(len(payload)))]):
                feed.feed(text, 1, batch)
                assert batch.count == 0 or not batch.events[batch.count - 1]["flags"] & Flag.MORE
                batch.clear()
        assert sum(feed.malformed.values()) >= len(lines)
        assert name in VENUE_FEEDS


def test_a_full_batch_is_the_callers_error() -> None:
    batch = EventBatch(1)
    with pytest.raises(BatchFull, match="take"):
        make("binance").feed(json.dumps(TRADE).encode(), 1, batch)
    assert batch.events.dtype == EVENT
