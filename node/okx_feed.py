"""OKX API v5's public channels: books (snapshot and update, checksum verified), trades, tickers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tickmesh.control.config import Source
from tickmesh.node.event_batch import EventBatch
from tickmesh.node.fixed_point import fixed_point
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.json_feed import TRADES_MAX, Listing, Malformed, Update, VenueFeed, levels_of, number_of, time_of
from tickmesh.node.json_kernels import BOOK_MESSAGES, OKX_V5, TICKERS, TRADES
from tickmesh.node.json_ladder import OKX
from tickmesh.node.level_texts import LevelTexts


class OkxFeed(VenueFeed):
    """OKX API v5 public channels: books (snapshot and update, checksum verified), trades, tickers.

    Every book message that carries a checksum is verified over the best 25 levels; a wrong one, or an update whose `prevSeqId` is
    not the last `seqId`, makes the book stale until the channel is subscribed again.
    """

    venue = "okx"
    compiled = OKX_V5
    compiled_kinds = ((BOOK_MESSAGES, "books"), (TRADES, "trades"), (TICKERS, "tickers"))
    _BOOKS = frozenset({"books", "books-l2-tbt", "books50-l2-tbt"})
    _WHOLE_BOOKS = frozenset({"books5", "bbo-tbt"})

    def __init__(self, options: Source, table: InstrumentTable, source: int = 0, shard: Callable[[str], int | None] | None = None) -> None:
        super().__init__(options, table, source, shard)
        assert self._decoder is not None
        self._texts = LevelTexts(self._decoder)

    def _message(self, message: Any, recv_ns: int, out: EventBatch) -> None:
        if not isinstance(message, dict):
            raise Malformed("not_an_object")
        if "event" in message:
            self._count_message(f"event:{str(message['event'])[:32]}")
            return
        arg, data = message["arg"], message["data"]
        channel, symbol = arg["channel"], arg.get("instId")
        if not isinstance(channel, str) or not isinstance(data, list):
            raise Malformed("wrong_type")
        if len(data) > TRADES_MAX:
            raise Malformed("too_many_entries")
        self._count_message(channel)
        for entry in data:
            if channel in self._BOOKS:
                self._guarded(out, partial(self._book, symbol, message.get("action"), entry, recv_ns, out))
            elif channel in self._WHOLE_BOOKS:
                self._guarded(out, partial(self._book, symbol, "snapshot", entry, recv_ns, out))
            elif channel in ("trades", "trades-all"):
                self._guarded(out, partial(self._trade, entry, recv_ns, out))
            elif channel == "tickers":
                self._guarded(out, partial(self._ticker, entry, recv_ns, out))

    def _trade(self, entry: dict[str, Any], recv_ns: int, out: EventBatch) -> None:
        price, qty, side, time = entry["px"], entry["sz"], entry["side"], time_of(entry["ts"])
        if side not in ("buy", "sell"):
            raise Malformed("bad_side")
        number = fixed_point(entry["tradeId"], 0)
        listing = self._listing(entry["instId"], recv_ns, out, [price], [qty])
        self._emit_trade(listing, time, recv_ns, side == "buy", price, qty, number, out)

    def _ticker(self, entry: dict[str, Any], recv_ns: int, out: EventBatch) -> None:
        bid, ask = (entry["bidPx"], entry["bidSz"]), (entry["askPx"], entry["askSz"])
        time = time_of(entry["ts"])
        given = [side for side in (bid, ask) if side[0]]
        listing = self._listing(entry["instId"], recv_ns, out, [s[0] for s in given], [s[1] for s in given])
        self._emit_quote(listing, time, recv_ns, bid, ask, 0, out)

    def _book(self, symbol: Any, action: Any, entry: dict[str, Any], recv_ns: int, out: EventBatch) -> None:
        bids, asks, time = entry["bids"], entry["asks"], time_of(entry["ts"])
        sequence = entry.get("seqId")
        previous = entry.get("prevSeqId")
        checksum = entry.get("checksum")
        if action not in ("snapshot", "update"):
            raise Malformed("bad_action")
        listing = self._book_listing(symbol, recv_ns, out, bids, asks)
        levels = levels_of(bids, asks, listing.qty_exponent, 3)
        number = number_of(sequence) if sequence is not None else 0
        update = Update(number, number, previous if type(previous) is int else -1, time, recv_ns, levels)
        if action == "snapshot":
            fits = self._texts.set(listing, update, bids, asks, anew=True)
            self._emit_snapshot(listing, update, out)
        elif listing.last_id is None:
            self._counters["updates_dropped"] += 1
            self.snapshots_wanted.add(listing.symbol)
            return
        elif update.previous >= 0 and sequence is not None and update.previous != listing.last_id:
            self._emit_gap(listing, update, listing.last_id + 1, update.previous, out)
            return
        else:
            fits = self._texts.set(listing, update, bids, asks)
            self._apply(listing, update, out)
        if not fits:
            self._counters["books_too_deep"] += 1
            self._emit_gap(listing, update, 0, 0, out)
            return
        self._verify(listing, update, checksum, out)

    def _verify(self, listing: Listing, update: Update, checksum: Any, out: EventBatch) -> None:
        if type(checksum) is not int:
            self._counters["checksums_absent"] += 1
            return
        self._counters["checksums_checked"] += 1
        if self._texts.checksum(listing, OKX) != checksum:
            self._counters["checksums_failed"] += 1
            self._emit_gap(listing, update, 0, 0, out)
