"""CSV feeds: LOBSTER against its own book file, and any CSV by a field mapping."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from tickmesh.control.config import Source, parse_config
from tickmesh.node.csv_feed import UNNAMED_ORDER, CsvFeed, LobsterFeed, csv_events, lobster_events
from tickmesh.node.event import ASK, BID, REFERENCE, EventArray, Flag, Kind, TradingStatus
from tickmesh.node.event_batch import EventBatch
from tickmesh.node.fields import MappingError
from tickmesh.node.instruments import InstrumentTable

DATA = Path(os.environ.get("TICKMESH_DATA", Path(__file__).parents[1] / "../shared/data"))
MESSAGES = DATA / "lobster_aapl_998/AAPL_2012-06-21_34200000_57600000_message_10.csv"
BOOKS = DATA / "lobster_aapl_998/AAPL_2012-06-21_34200000_57600000_orderbook_10.csv"


def options(data_format: str, body: str = "") -> Source:
    text = f'[data_sources.s]\ntype = "file"\npath = "x"\ndata_format = "{data_format}"\n{body}'
    return parse_config(text).data_sources["s"]


def lobster(path: Path, capacity: int = 1 << 17) -> tuple[LobsterFeed, EventArray]:
    parts = [(feed, events.copy()) for feed, events in lobster_events(path, options("lobster"), InstrumentTable(4), EventBatch(capacity))]
    return parts[-1][0], np.concatenate([events for _, events in parts])


@pytest.fixture(scope="module")
def aapl() -> tuple[LobsterFeed, EventArray]:
    if not MESSAGES.exists():
        pytest.skip(f"no recording {MESSAGES}; set TICKMESH_DATA")
    return lobster(MESSAGES)


class OrderBook:
    """Orders by id, levels by side: strict, so that an event that does not fit fails the test."""

    def __init__(self) -> None:
        self.orders: dict[int, list[int]] = {}
        self.levels: tuple[dict[int, int], dict[int, int]] = ({}, {})

    def change(self, side: int, price: int, qty: int) -> None:
        left = self.levels[side].get(price, 0) + qty
        assert left >= 0
        if left:
            self.levels[side][price] = left
        else:
            del self.levels[side][price]

    def apply(self, kind: int, side: int, price: int, qty: int, order: int) -> None:
        if kind == Kind.CLEAR:
            assert not self.orders
        elif kind == Kind.ADD:
            assert order not in self.orders
            assert qty > 0
            self.orders[order] = [side, price, qty]
            self.change(side, price, qty)
        elif kind in (Kind.CANCEL, Kind.EXECUTE, Kind.DELETE):
            side, price, resting = self.orders[order]
            gone = resting if kind == Kind.DELETE else qty
            assert 0 < gone <= resting
            self.orders[order][2] -= gone
            if resting == gone:
                del self.orders[order]
            self.change(side, price, -gone)
        elif kind == Kind.MODIFY:
            self.change(side, price, qty - self.orders[order][2])
            self.orders[order][2] = qty

    def row(self, depth: int) -> list[tuple[int, int, int, int]]:
        asks, bids = sorted(self.levels[ASK])[:depth], sorted(self.levels[BID], reverse=True)[:depth]
        return [(a, self.levels[ASK][a], b, self.levels[BID][b]) for a, b in zip(asks, bids, strict=True)]


def expected_rows() -> list[list[tuple[int, int, int, int]]]:
    rows = []
    for line in BOOKS.read_text().splitlines():
        n = [int(cell) for cell in line.split(",")]
        rows.append([(n[i] * 100_000, n[i + 1], n[i + 2] * 100_000, n[i + 3]) for i in range(0, len(n), 4)])
    return rows


def test_lobster_book_equals_the_book_file_after_every_message(aapl: tuple[LobsterFeed, EventArray]) -> None:
    _, events = aapl
    book, row, expected = OrderBook(), 0, expected_rows()
    for event in events:
        kind, order = int(event["kind"]), int(event["id"])
        if kind == Kind.REFERENCE:
            continue
        book.apply(kind, int(event["side"]), int(event["price"]), int(event["qty"]), order)
        if not event["flags"] & Flag.MORE:
            assert book.row(10) == expected[row], f"after message {row}"
            row += 1
    assert row == len(expected) == 999


def test_lobster_messages_alone_explain_every_level_that_stays_in_view(aapl: tuple[LobsterFeed, EventArray]) -> None:
    feed, _ = aapl
    assert feed.messages == {"add": 471, "delete": 369, "execute": 98, "execute_hidden": 61}
    assert not feed.malformed
    assert feed.counters["levels_mismatched"] == 0
    assert feed.counters["unknown_orders"] == 0
    assert feed.counters["levels_revealed"] == 14


def test_lobster_first_events_and_exact_times(aapl: tuple[LobsterFeed, EventArray]) -> None:
    _, events = aapl
    reference = events[:1].view(REFERENCE)[0]
    assert (reference["symbol"], reference["tick_size"], reference["side"]) == (b"AAPL", 10_000_000, 0)
    assert events["kind"][1] == Kind.CLEAR
    first = events[~(events["flags"] & Flag.SNAPSHOT).astype(bool)][1]
    assert (first["kind"], first["id"], first["price"], first["qty"], first["side"]) == (Kind.ADD, 16113575, 585_330_000_000, 18, BID)
    assert first["ts_event"] == 1340285400_004241176  # 2012-06-21 09:30:00.004241176 in New York
    assert np.all(np.diff(events["ts_event"]) >= 0)


def test_lobster_trades(aapl: tuple[LobsterFeed, EventArray]) -> None:
    _, events = aapl
    rows = [line.split(",") for line in MESSAGES.read_text().splitlines()]
    visible = sum(int(r[3]) for r in rows if r[1] == "4")
    hidden = [(int(r[4]) * 100_000, int(r[3]), ASK if r[5] == "1" else BID) for r in rows if r[1] == "5"]
    assert events["qty"][events["kind"] == Kind.EXECUTE].sum() == visible
    trades = events[events["kind"] == Kind.TRADE]
    assert [(t["price"], t["qty"], t["side"]) for t in trades] == hidden
    assert np.all(trades["flags"] & Flag.HIDDEN)


def test_lobster_without_the_book_file(tmp_path: Path, aapl: tuple[LobsterFeed, EventArray]) -> None:
    path = tmp_path / (MESSAGES.name + ".gz")
    path.write_bytes(gzip.compress(MESSAGES.read_bytes()))
    feed, events = lobster(path)
    assert feed.counters["unknown_orders"] > 0
    known = {int(e["id"]) for e in events if e["kind"] == Kind.ADD}
    assert not any(order >= UNNAMED_ORDER for order in known)
    assert all(int(e["id"]) in known for e in events if e["kind"] in (Kind.CANCEL, Kind.DELETE, Kind.EXECUTE))


def test_lobster_batches_of_any_size_are_the_same(aapl: tuple[LobsterFeed, EventArray]) -> None:
    _, events = lobster(MESSAGES, LobsterFeed.events_max + 7)
    assert events.tobytes() == aapl[1].tobytes()


def rows(*lines: str, book: list[str] | None = None) -> tuple[LobsterFeed, EventArray]:
    feed, batch = LobsterFeed(options("lobster"), InstrumentTable(4), "X"), EventBatch(1 << 15)
    for i, line in enumerate(lines):
        feed.feed(line.encode(), batch, book[i].encode() if book else None)
    return feed, batch.take()


def test_lobster_halts_and_auctions() -> None:
    feed, events = rows("1.5,7,0,0,-1,-1", "2,7,0,0,0,-1", "3,7,0,0,1,-1", "4,6,-1,50,1000,1", "5,6,0,50,1000,-1")
    status = events[events["kind"] == Kind.STATUS]
    assert status["aux"].tolist() == [TradingStatus.HALTED, TradingStatus.QUOTE_ONLY, TradingStatus.TRADING]
    assert feed.malformed == {"out_of_range": 1}  # an order id below zero
    (cross,) = events[events["kind"] == Kind.TRADE]
    assert (cross["price"], cross["qty"], cross["flags"]) == (100_000_000, 50, Flag.AUCTION)


def test_lobster_files_that_do_not_belong_together_are_reported() -> None:
    shown = ["1010,5,1000,7", "1010,5,1000,9"]
    feed, events = rows("1,1,1,7,1000,1", "2,5,0,1,1000,1", book=shown)
    assert feed.counters["levels_mismatched"] == 1
    assert events["kind"].tolist()[-1] == Kind.ADD
    feed, events = rows("1,1,1,7,1000,1", "2,5,0,1,1000,1", book=[shown[0], "1010,5,990,9"])  # the known order is gone
    assert Kind.DELETE in events["kind"].tolist()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "wrong_number_of_cells"),
        ("1,2,3", "wrong_number_of_cells"),
        ("x,1,1,7,1000,1", "not_a_number"),
        ("1.0000000001,1,1,7,1000,1", "too_precise"),
        ("1,9,1,7,1000,1", "unknown_type"),
        ("1,1,1,7,1000,0", "bad_side"),
        ("1,1,1,-7,1000,1", "out_of_range"),
        ("1,1,1,0,1000,1", "out_of_range"),
        ("1,1,1,7,-1000,1", "out_of_range"),
        ("1,1,1,99999999999999999999,1000,1", "too_large"),
        ("1,1,4611686018427387904,7,1000,1", "out_of_range"),
        ("1,7,0,0,5,-1", "out_of_range"),
        ("\xff,1,1,7,1000,1", "not_a_number"),
    ],
)
def test_lobster_malformed_rows_are_counted(line: str, reason: str) -> None:
    feed, events = rows(line)
    assert feed.malformed == {reason: 1}
    assert not np.any(events["kind"] == Kind.ADD)
    feed, events = rows("1,1,1,7,1000,1", line, "2,1,1,7,1000,1")
    assert feed.malformed[reason] == 1
    assert feed.malformed["duplicate_order"] == 1


def test_lobster_needs_a_symbol(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,1,1,7,1000,1\n")
    with pytest.raises(MappingError, match="name it in symbols"):
        next(lobster_events(tmp_path / "x.csv", options("lobster"), InstrumentTable(4), EventBatch(1 << 15)))


# ---------------------------------------------------------------- by a mapping

TRADES = 'event = "trade"\nfields = { symbol = "sym", price = "px", qty = "size", side = "side", ts_event = { path = "t", unit = "s" } }\n'


def read(path: Path, body: str) -> tuple[CsvFeed, EventArray]:
    ((feed, events),) = csv_events(path, options("csv", body), InstrumentTable(8), EventBatch())
    return feed, events


def test_csv_with_a_header(tmp_path: Path) -> None:
    path = tmp_path / "trades.csv"
    path.write_text('\ufefft,sym,side,px,"size"\n1.5,AAPL,B,100.25,300\n2.000000001,"MSFT",sell,50,1.5\n\n3,AAPL,,99,1\n')
    feed, events = read(path, TRADES + "tick_size = 0.01\nquantity_exponent = 1\n")
    trades = events[events["kind"] == Kind.TRADE]
    assert trades["ts_event"].tolist() == [1_500_000_000, 2_000_000_001]
    assert trades["ts_recv"].tolist() == trades["ts_event"].tolist()
    assert trades["price"].tolist() == [100_250_000_000, 50_000_000_000]
    assert trades["qty"].tolist() == [3000, 15]
    assert trades["side"].tolist() == [BID, ASK]
    assert feed.malformed == {"missing_field": 1}
    references = events[events["kind"] == Kind.REFERENCE].view(REFERENCE)
    assert [(r["symbol"], r["tick_size"], r["side"]) for r in references] == [(b"AAPL", 10_000_000, 1), (b"MSFT", 10_000_000, 1)]


def test_csv_without_a_header_by_index_with_midnight(tmp_path: Path) -> None:
    path = tmp_path / "quotes.csv"
    path.write_text("34200;1.10;5;1.11;7\n34201;0;0;1.12;7\n")
    body = (
        'symbols = ["EURUSD"]\ndate = 2024-05-08\ntimezone = "America/New_York"\ndelimiter = ";"\nevent = "quote"\n'
        'columns = ["time", "bid", "bid_qty", "ask", "ask_qty"]\n'
        'fields = { ts_event = { path = "0", unit = "s" }, bid = "bid", bid_qty = "2", ask = "ask", ask_qty = "4" }\n'
    )
    feed, events = read(path, body)
    quotes = events[1:]
    assert quotes["ts_event"][0] == 1715175000 * 10**9  # 2024-05-08 09:30 in New York
    assert quotes["price"].tolist() == [1_100_000_000, -(1 << 63)]
    assert quotes["aux"].tolist() == [1_110_000_000, 1_120_000_000]
    assert quotes["qty"].tolist()[1] == 0
    assert not feed.malformed


def test_csv_plain_list_of_fields_is_by_column_name(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("price,volume,symbol\n1.5,2,X\n")
    _, events = read(path, 'event = "trade"\nfields = ["symbol", "price", "volume"]\n')
    assert (events["price"][1], events["qty"][1]) == (1_500_000_000, 200_000_000)


def test_csv_column_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("price,qty\n1,2\n")
    with pytest.raises(MappingError) as caught:
        read(path, TRADES)
    assert {p.key for p in caught.value.problems} == {"fields.symbol", "fields.price", "fields.qty", "fields.side", "fields.ts_event"}
    assert "columns: price, qty" in str(caught.value)
    path.write_text("")
    with pytest.raises(MappingError, match="no header row"):
        read(path, TRADES)


def test_csv_malformed_rows_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    cells = [b"X,B,1,1", b"X,B,1", b"X,B,x,1", b"X,B,1,-1", b"X,up,1,1", b"X,B,1e30,1", b"\xff,B,1,1", b'"X,B,1,1', b"Y" * 30 + b",B,1,1"]
    path.write_bytes(b"t,sym,side,px,size\n" + b"".join(b"1," + row + b"\n" for row in cells))
    feed, events = read(path, TRADES)
    assert events["kind"].tolist() == [Kind.REFERENCE, Kind.TRADE]
    assert feed.malformed == {
        "wrong_number_of_cells": 1, "number_not_a_number": 1, "number_negative": 1, "bad_side": 1, "number_too_large": 1, "bad_csv": 2,
        "bad_symbol": 1,
    }  # fmt: skip
