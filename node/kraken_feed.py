"""Kraken's websocket feeds: Futures (v1) with a sequence per product, and spot (v2) with a checksum per book.

Prices and quantities are JSON numbers here; they keep their text on the way. A sequence that is not the next one, or a wrong checksum,
makes the book stale until it is subscribed to again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tickmesh.control.config import Source
from tickmesh.node.event import ASK, BID, PRICE_DECIMALS
from tickmesh.node.event_batch import EventBatch
from tickmesh.node.fixed_point import fixed_point
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.json_feed import (
    LEVELS_MAX,
    TRADES_MAX,
    Level,
    Listing,
    Malformed,
    Update,
    VenueFeed,
    iso_time_of,
    number_of,
    time_of,
    trade_number,
)
from tickmesh.node.json_kernels import BOOK_MESSAGES, KRAKEN_FUTURES, KRAKEN_SPOT, TRADES
from tickmesh.node.json_ladder import KRAKEN
from tickmesh.node.level_texts import LevelTexts

_SIDES = {"buy": BID, "sell": ASK}
_DEPTHS = (10, 25, 100, 500, 1000)
"""Levels of a side that a spot book can be subscribed to with."""


class KrakenFuturesFeed(VenueFeed):
    """Messages of ``wss://futures.kraken.com/ws/v1``. Trades before the subscription (`trade_snapshot`) are counted only."""

    venue = "kraken_futures"
    compiled = KRAKEN_FUTURES
    compiled_kinds = ((BOOK_MESSAGES, "book"),)
    _IGNORED = frozenset({"trade_snapshot", "ticker_lite", "heartbeat"})

    def _message(self, message: Any, recv_ns: int, out: EventBatch) -> None:
        if not isinstance(message, dict):
            raise Malformed("not_an_object")
        if "event" in message:
            self._count_message(f"event:{str(message['event'])[:32]}")
            return
        feed = message["feed"]
        handler = {"book": self._change, "book_snapshot": self._whole, "trade": self._trade, "ticker": self._ticker}.get(feed)
        if handler is None and feed not in self._IGNORED:
            raise Malformed("unknown_event")
        self._count_message(feed)
        if handler is not None:
            handler(message, recv_ns, out)

    def _whole(self, message: dict[str, Any], recv_ns: int, out: EventBatch) -> None:
        sides = [(BID, message["bids"]), (ASK, message["asks"])]
        if not all(isinstance(entries, list) for _, entries in sides):
            raise Malformed("wrong_type")
        if sum(len(entries) for _, entries in sides) > LEVELS_MAX:
            raise Malformed("too_many_levels")
        texts = [(side, _text(entry["price"]), _text(entry["qty"])) for side, entries in sides for entry in entries]
        time, number = time_of(message["timestamp"]), number_of(message["seq"])
        listing = self._listing(message["product_id"], recv_ns, out, [t[1] for t in texts], [t[2] for t in texts])
        levels = [_level(side, price, qty, listing.qty_exponent) for side, price, qty in texts]
        self._emit_snapshot(listing, Update(number, number, -1, time, recv_ns, levels), out)

    def _change(self, message: dict[str, Any], recv_ns: int, out: EventBatch) -> None:
        price, qty, time, number = _text(message["price"]), _text(message["qty"]), time_of(message["timestamp"]), number_of(message["seq"])
        side = _side(message["side"])
        listing = self._listing(message["product_id"], recv_ns, out, [price], [qty])
        update = Update(number, number, -1, time, recv_ns, [_level(side, price, qty, listing.qty_exponent)])
        if listing.last_id is None:
            self._counters["updates_dropped"] += 1
            self.snapshots_wanted.add(listing.symbol)
        elif number <= listing.last_id:
            self._left_behind(listing, update, out)
        elif number == listing.last_id + 1:
            self._apply(listing, update, out)
        else:
            self._emit_gap(listing, update, listing.last_id + 1, number - 1, out)

    def _trade(self, message: dict[str, Any], recv_ns: int, out: EventBatch) -> None:
        price, qty, side, time = _text(message["price"]), _text(message["qty"]), _side(message["side"]), time_of(message["time"])
        number = trade_number(message["uid"])
        listing = self._listing(message["product_id"], recv_ns, out, [price], [qty])
        self._emit_trade(listing, time, recv_ns, side == BID, price, qty, number, out)

    def _ticker(self, message: dict[str, Any], recv_ns: int, out: EventBatch) -> None:
        bid, ask = (_text(message["bid"]), _text(message["bid_size"])), (_text(message["ask"]), _text(message["ask_size"]))
        time = time_of(message["time"])
        listing = self._listing(message["product_id"], recv_ns, out, [bid[0], ask[0]], [bid[1], ask[1]])
        self._emit_quote(listing, time, recv_ns, bid, ask, 0, out)


class KrakenSpotFeed(VenueFeed):
    """Messages of ``wss://ws.kraken.com/v2``: book, trade, ticker. Trades from before the subscription are counted only.

    A book is as deep as its subscription: a level that is pushed beyond is not removed by the venue, so it is removed here. Each message
    carries the CRC-32 of the best ten levels (docs.kraken.com, "Spot Websockets (v2) Book Checksum").
    """

    venue = "kraken"
    compiled = KRAKEN_SPOT
    compiled_kinds = ((BOOK_MESSAGES, "book"), (TRADES, "trade"))
    _IGNORED = frozenset({"heartbeat", "status", "ohlc", "instrument"})

    def __init__(self, options: Source, table: InstrumentTable, source: int = 0, shard: Callable[[str], int | None] | None = None) -> None:
        super().__init__(options, table, source, shard)
        assert self._decoder is not None
        self._texts, self._depths = LevelTexts(self._decoder), dict[str, int]()

    def _message(self, message: Any, recv_ns: int, out: EventBatch) -> None:
        if not isinstance(message, dict):
            raise Malformed("not_an_object")
        if "method" in message:
            self._answer(message)
            return
        channel = message["channel"]
        handler = {"book": self._book, "trade": self._trade, "ticker": self._ticker}.get(channel)
        if handler is None:
            if channel not in self._IGNORED:
                raise Malformed("unknown_event")
            self._count_message(channel)
            return
        kind, data = message["type"], message["data"]
        if not isinstance(data, list) or kind not in ("snapshot", "update"):
            raise Malformed("wrong_type")
        if len(data) > TRADES_MAX:
            raise Malformed("too_many_entries")
        self._count_message(channel)
        if channel == "trade" and kind == "snapshot":
            return
        for entry in data:
            self._guarded(out, partial(handler, kind, entry, recv_ns, out))

    def _answer(self, message: dict[str, Any]) -> None:
        """What a subscription has come to: how deep a book is."""
        self._count_message(f"answer:{str(message['method'])[:32]}")
        result = message.get("result")
        if isinstance(result, dict) and result.get("channel") == "book" and result.get("depth") in _DEPTHS:
            symbol = result.get("symbol")
            if isinstance(symbol, str) and (symbol in self._depths or len(self._depths) < 1 << 16):
                self._depths[symbol] = result["depth"]

    def _book(self, kind: str, entry: dict[str, Any], recv_ns: int, out: EventBatch) -> None:
        sides = [[(_text(level["price"]), _text(level["qty"])) for level in entry[name]] for name in ("bids", "asks")]
        bids, asks = sides
        if len(bids) + len(asks) > LEVELS_MAX:
            raise Malformed("too_many_levels")
        told, time = number_of(entry["checksum"]), iso_time_of(entry["timestamp"]) if "timestamp" in entry else recv_ns
        listing = self._listing(entry["symbol"], recv_ns, out, [p for p, _ in (*bids, *asks)], [q for _, q in (*bids, *asks)])
        pairs = [(side, level) for side, entries in ((BID, bids), (ASK, asks)) for level in entries]
        update = Update(0, 0, -1, time, recv_ns, [_level(side, price, qty, listing.qty_exponent) for side, (price, qty) in pairs])
        if kind == "snapshot":
            deepest = max(len(bids), len(asks))
            listing.book["depth"] = self._depths.get(listing.symbol) or next((depth for depth in _DEPTHS if depth >= deepest), deepest)
        elif listing.last_id is None:
            self._counters["updates_dropped"] += 1
            self.snapshots_wanted.add(listing.symbol)
            return
        self._take(listing, update, bids, asks, told, kind == "snapshot", out)

    def _take(self, listing: Listing, update: Update, bids: Any, asks: Any, told: int, anew: bool, out: EventBatch) -> None:
        fits = self._texts.set(listing, update, bids, asks, anew=anew)
        if anew:
            self._emit_snapshot(listing, update, out)
        else:
            fallen = self._texts.fallen(listing, int(listing.book["depth"]))
            self._apply(listing, update._replace(levels=update.levels + fallen), out)
        self._counters["checksums_checked"] += fits
        if not fits or self._texts.checksum(listing, KRAKEN) != told:
            self._counters["checksums_failed" if fits else "books_too_deep"] += 1
            self._emit_gap(listing, update, 0, 0, out)

    def _trade(self, kind: str, entry: dict[str, Any], recv_ns: int, out: EventBatch) -> None:
        price, qty, side = _text(entry["price"]), _text(entry["qty"]), _side(entry["side"])
        time, number = iso_time_of(entry["timestamp"]), number_of(entry["trade_id"])
        listing = self._listing(entry["symbol"], recv_ns, out, [price], [qty])
        self._emit_trade(listing, time, recv_ns, side == BID, price, qty, number, out)

    def _ticker(self, kind: str, entry: dict[str, Any], recv_ns: int, out: EventBatch) -> None:
        bid, ask = (_text(entry["bid"]), _text(entry["bid_qty"])), (_text(entry["ask"]), _text(entry["ask_qty"]))
        time = iso_time_of(entry["timestamp"]) if "timestamp" in entry else recv_ns
        listing = self._listing(entry["symbol"], recv_ns, out, [bid[0], ask[0]], [bid[1], ask[1]])
        self._emit_quote(listing, time, recv_ns, bid, ask, 0, out)


def _text(value: Any) -> str:
    """A JSON number as its text."""
    if isinstance(value, str):
        return value
    if type(value) is int:
        return str(value)
    raise Malformed("wrong_type")


def _side(word: Any) -> int:
    if word not in _SIDES:
        raise Malformed("bad_side")
    return _SIDES[word]


def _level(side: int, price: str, qty: str, exponent: int) -> Level:
    fixed, units = fixed_point(price, PRICE_DECIMALS), fixed_point(qty, exponent)
    if fixed <= 0 or units < 0:
        raise Malformed("number_negative")
    return Level(side, fixed, units, 0)
