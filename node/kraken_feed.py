"""Kraken Futures' websocket feed (v1): book (snapshot and changes, a sequence per product), trade, ticker.

Prices and quantities are JSON numbers here; they keep their text on the way. A sequence that is not the next one makes the book stale
until the feed is subscribed again.
"""

from __future__ import annotations

from typing import Any

from tickmesh.node.event import ASK, BID, PRICE_DECIMALS
from tickmesh.node.event_batch import EventBatch
from tickmesh.node.fixed_point import fixed_point
from tickmesh.node.json_feed import LEVELS_MAX, Level, Malformed, Update, VenueFeed, number_of, time_of, trade_number

_SIDES = {"buy": BID, "sell": ASK}


class KrakenFuturesFeed(VenueFeed):
    """Messages of ``wss://futures.kraken.com/ws/v1``. Trades before the subscription (`trade_snapshot`) are counted only."""

    venue = "kraken_futures"
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
            self.counters["updates_dropped"] += 1
            self.snapshots_wanted.add(listing.symbol)
        elif number <= listing.last_id:
            self.counters["updates_old"] += 1
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
