"""Coinbase Exchange's websocket feed: level2 (snapshot and changes), matches, tickers.

The level2 channel has no sequence numbers: the venue promises that a connection loses nothing, so that a book is stale only from a lost
connection, or a change that could not be used, to the next snapshot. A match names the maker's side; ours is the taker's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from tickmesh.control.config import Source
from tickmesh.node.event import ASK, BID, PRICE_DECIMALS
from tickmesh.node.event_batch import EventBatch
from tickmesh.node.fixed_point import fixed_point
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.json_feed import LEVELS_MAX, Level, Listing, Malformed, Update, VenueFeed, iso_time_of, levels_of, number_of
from tickmesh.node.json_kernels import BOOK_MESSAGES, COINBASE, TICKERS, TRADES

_SIDES = {"buy": BID, "sell": ASK}
_EARLY_MAX = 1000
"""Trades and tickers of a product that are left out while its book is waited for; then there is none, it seems."""


class CoinbaseFeed(VenueFeed):
    """Messages of ``wss://ws-feed.exchange.coinbase.com``; a ticker becomes a quote where it has sizes."""

    venue = "coinbase"
    compiled = COINBASE
    compiled_kinds = ((BOOK_MESSAGES, "l2update"), (TRADES, "match"), (TICKERS, "ticker"))
    _IGNORED = frozenset({"last_match", "heartbeat", "status", "received", "open", "done", "change", "activate"})

    def __init__(self, options: Source, table: InstrumentTable, source: int = 0, shard: Callable[[str], int | None] | None = None) -> None:
        super().__init__(options, table, source, shard)
        books = any("level2" in text for text in options.subscribe) if options.subscribe else "book" in options.channels
        self._books_come = books and options.type == "websocket"
        self._early: Counter[str] = Counter()
        self._touched: list[Listing] = []
        """Books that the message changes."""

    def feed(self, payload: bytes, recv_ns: int, out: EventBatch) -> None:
        refused = self.malformed.total()
        self._touched.clear()
        super().feed(payload, recv_ns, out)
        if self.malformed.total() != refused:  # no sequence will show that the change is missing
            for listing in self._touched:
                if listing.last_id is not None:
                    self._emit_gap(listing, Update(0, 0, -1, recv_ns, recv_ns, []), 0, 0, out)

    def _message(self, message: Any, recv_ns: int, out: EventBatch) -> None:
        if not isinstance(message, dict):
            raise Malformed("not_an_object")
        kind = message["type"]
        if kind == "l2update":
            self._count_message(kind)
            self._changes(message, recv_ns, out)
        elif kind == "snapshot":
            self._count_message(kind)
            self._whole(message, recv_ns, out)
        elif kind == "match":
            self._count_message(kind)
            self._match(message, recv_ns, out)
        elif kind == "ticker":
            self._count_message(kind)
            self._ticker(message, recv_ns, out)
        elif kind in ("subscriptions", "error"):
            self._count_message(f"answer:{kind}")
        elif kind in self._IGNORED:
            self._count_message(kind)
        else:
            raise Malformed("unknown_event")

    def _whole(self, message: dict[str, Any], recv_ns: int, out: EventBatch) -> None:
        bids, asks = message["bids"], message["asks"]
        listing = self._book_listing(message["product_id"], recv_ns, out, bids, asks)
        time = iso_time_of(message["time"]) if "time" in message else recv_ns
        self._emit_snapshot(listing, Update(0, 0, -1, time, recv_ns, levels_of(bids, asks, listing.qty_exponent)), out)

    def _changes(self, message: dict[str, Any], recv_ns: int, out: EventBatch) -> None:
        symbol = message.get("product_id")
        known = self._listings.get(symbol) if isinstance(symbol, str) else None
        self._touched += ([] if known is None else [known]) if isinstance(symbol, str) else self._listings.values()
        changes, time = message["changes"], iso_time_of(message["time"])
        if not isinstance(changes, list) or len(changes) > LEVELS_MAX:
            raise Malformed("too_many_levels")
        listing = self._listing(message["product_id"], recv_ns, out, [c[1] for c in changes], [c[2] for c in changes])
        levels = [_level(listing, change) for change in changes]
        if listing.last_id is None:
            self._counters["updates_dropped"] += 1
            self.snapshots_wanted.add(listing.symbol)
            return
        self._apply(listing, Update(0, 0, -1, time, recv_ns, levels), out)

    def _is_early(self, symbol: Any) -> bool:
        """Whether the quantity exponent is not known yet, and is better inferred from the book than from one trade."""
        if not self._books_come or not isinstance(symbol, str) or symbol in self._listings or len(self._early) > 1 << 16:
            return False
        if not 0 < len(symbol) <= 24 or not symbol.isascii() or self.table.find(symbol, self.source) is not None:
            return False
        if self.options.quantity_exponent_of(symbol) is not None or not self._wanted(symbol) or self._early[symbol] >= _EARLY_MAX:
            return False
        self._early[symbol] += 1
        self._counters["before_the_book"] += 1
        return True

    def _match(self, message: dict[str, Any], recv_ns: int, out: EventBatch) -> None:
        price, qty, maker = message["price"], message["size"], message["side"]
        if maker not in _SIDES:
            raise Malformed("bad_side")
        time, number = iso_time_of(message["time"]), number_of(message["trade_id"])
        if self._is_early(message["product_id"]):
            return
        listing = self._listing(message["product_id"], recv_ns, out, [price], [qty])
        self._emit_trade(listing, time, recv_ns, maker == "sell", price, qty, number, out)

    def _ticker(self, message: dict[str, Any], recv_ns: int, out: EventBatch) -> None:
        if "best_bid_size" not in message or "best_ask_size" not in message:
            return
        bid, ask = (message["best_bid"], message["best_bid_size"]), (message["best_ask"], message["best_ask_size"])
        time, sequence = iso_time_of(message["time"]), number_of(message["sequence"])
        if self._is_early(message["product_id"]):
            return
        given = [side for side in (bid, ask) if side[0]]
        listing = self._listing(message["product_id"], recv_ns, out, [s[0] for s in given], [s[1] for s in given])
        self._emit_quote(listing, time, recv_ns, bid, ask, sequence, out)


def _level(listing: Listing, change: Any) -> Level:
    if type(change) is not list or change[0] not in _SIDES:
        raise Malformed("bad_side")
    price, qty = fixed_point(change[1], PRICE_DECIMALS), fixed_point(change[2], listing.qty_exponent)
    if price <= 0 or qty < 0:
        raise Malformed("number_negative")
    return Level(_SIDES[change[0]], price, qty, 0)
