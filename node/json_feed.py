"""JSON feeds: Binance and Bybit messages, and any other JSON by a field mapping, to events; books kept in step by the venue's rules.

:func:`tickmesh.node.venues.venue_feed` makes the decoder of a venue; its :meth:`VenueFeed.feed` takes one websocket message or
HTTP response and appends events to a batch. It never raises on what the venue sends: a malformed message is counted by reason
and leaves neither half its events nor a changed state behind.

Books come by level. A snapshot is CLEAR + LEVELs (flag SNAPSHOT), an update is LEVELs; all but the last carry MORE. When the venue's
sequence or checksum shows that an update is missing, a GAP event marks the book stale, updates are held back, and the symbol is in
:attr:`VenueFeed.snapshots_wanted` until a new snapshot has come.

Prices and quantities go from the venue's decimal text to integers, exactly. Where neither the tick size nor the quantity exponent
is configured they are inferred from the first message of the symbol (the book refines a tick that proves too coarse).

:meth:`VenueFeed.feed_many` does the same for many messages, and leaves those that are as usual to compiled code
(:mod:`tickmesh.node.json_kernels`).
"""

from __future__ import annotations

import math
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
import numpy as np

from tickmesh.control.config import Source
from tickmesh.node.event import ASK, BID, NO_PRICE, NO_SIDE, PRICE_DECIMALS, Flag, Kind
from tickmesh.node.event_batch import EventBatch
from tickmesh.node.fields import PRICE_FIELDS, QTY_FIELDS, BadRecord, RecordMapping, compile_mappings, convert, iso8601_ns
from tickmesh.node.fixed_point import BadNumber, decimals_of, fixed_point
from tickmesh.node.instruments import InstrumentTable, InstrumentTableFull
from tickmesh.node.json_compiled import CompiledDecoder, Message
from tickmesh.node.json_kernels import BINANCE, BOOK, BOOK_MESSAGES, BYBIT, OTHER_TRADES, TICKERS, TRADES

LEVELS_MAX = 20_000
"""Most levels of one message; a message with more is malformed."""
_OLD_MAX, _OLD_AFTER_SNAPSHOT_MAX = 16, 1024
"""So many updates in a row that are older than a book mean that the venue counts anew. Behind a snapshot some are usual."""
HELD_LEVELS_MAX = 40_000
"""Most levels of updates held back until a snapshot comes; the oldest update goes first."""
TRADES_MAX = 10_000
MESSAGE_TYPES_MAX = 256
"""Most distinct message types that are counted by name."""

_JSON = msgspec.json.Decoder(float_hook=str)
"""Numbers with decimals stay text, so that no price passes through a float; as fast as orjson, which makes floats of them."""
_MS = 1_000_000
_DEFAULT_EXPONENT = 8
_SNAPSHOT, _MORE = int(Flag.SNAPSHOT), int(Flag.MORE)


class Malformed(Exception):
    """A message cannot be used; never leaves this module's `feed`.

    Attributes:
        reason: what it is counted under.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Filtered(Exception):
    """The symbol of a message is not wanted."""


class Level(NamedTuple):
    """One level of a message: `price` in 1e-9, `qty` in the instrument's exponent, `orders` resting there (0 = unknown)."""

    side: int
    price: int
    qty: int
    orders: int


class Update(NamedTuple):
    """A depth update: venue update ids `first`..`last`, `previous` = the id that it must follow (-1: `first` - 1)."""

    first: int
    last: int
    previous: int
    ts_event: int
    ts_recv: int
    levels: list[Level]


class Listing:
    """An instrument as one feed knows it. What compiled code needs too is in `book`, a :data:`~tickmesh.node.json_kernels.BOOK`.

    Attributes:
        held: updates that wait for a snapshot; `held_levels`: how many levels they have, and one for each.
        has_changes, stale: its book has had a change; one could not be used (feeds by a mapping).
    """

    __slots__ = ("_exponent", "book", "has_changes", "held", "held_levels", "instrument", "stale", "symbol")

    def __init__(self, symbol: str, instrument: int, qty_exponent: int, book: Any) -> None:
        self.symbol, self.instrument, self.book = symbol, instrument, book
        self.held: deque[Update] = deque()
        self.held_levels, self.has_changes, self.stale = 0, False, False
        self.qty_exponent = qty_exponent
        self.last_id, self.fresh_snapshot = None, False
        book["listed"] = 1

    @property
    def qty_exponent(self) -> int:
        """Decimals of its quantities."""
        return self._exponent

    @qty_exponent.setter
    def qty_exponent(self, exponent: int) -> None:
        self._exponent = exponent
        self.book["exponent"] = exponent

    @property
    def last_id(self) -> int | None:
        """Update id that the book is at; None while it waits for a snapshot."""
        return int(self.book["last_id"]) if self.book["has_book"] else None

    @last_id.setter
    def last_id(self, number: int | None) -> None:
        self.book["has_book"] = number is not None
        self.book["last_id"] = number or 0

    @property
    def fresh_snapshot(self) -> bool:
        """No update has been applied since the snapshot: the next may reach back before it."""
        return bool(self.book["fresh"])

    @fresh_snapshot.setter
    def fresh_snapshot(self, fresh: bool) -> None:
        self.book["fresh"] = fresh


def tick_of(prices: Iterable[int]) -> int:
    """A tick size (1e-9) inferred from some prices: the largest power of ten that divides all of them, at most the fifth digit."""
    seen = [abs(p) for p in prices if p]
    if not seen:
        return 1
    divisor, tick = math.gcd(*seen), 1
    while divisor % (tick * 10) == 0 and tick * 100_000 <= min(seen):
        tick *= 10
    return tick


def exponent_of(quantities: Iterable[str], by_order: bool = False) -> int:
    """A quantity exponent inferred from some quantity texts: at most 8, at least the decimals seen.

    A level of a book holds less than 2**40, so the exponent leaves room for levels a hundred times as large as the largest seen. An
    order holds less than 2**32: a feed `by_order` keeps only the decimals seen.
    """
    seen = list(quantities)
    decimals = max((decimals_of(q) for q in seen), default=0)
    if by_order:
        return min(18, decimals)
    digits = max((len(q.partition(".")[0].lstrip("0")) for q in seen), default=0)
    return min(18, max(decimals, min(_DEFAULT_EXPONENT, 10 - digits)))


# ---------------------------------------------------------------- the common part


class VenueFeed:
    """One source's decoder of a venue's JSON.

    Args:
        options: the source's configuration (symbols, tick sizes, exponents).
        table: where instruments are interned.
        source: the source's index, part of an instrument's identity.
        shard: placement by hand: symbol -> shard, or None for the usual placement.

    Attributes:
        messages: how many of each type came, ignored ones included.
        malformed: refused messages by reason.
        counters: what happened to books: `gaps`, `checksums_checked`, `checksums_failed`, `updates_applied`, `updates_old`,
            `updates_held`, `updates_dropped`, `snapshots`, `snapshots_old`, `filtered`, `refused_instruments`, `restarts` (the venue has
            counted anew), …; `compiled`: messages that
            compiled code has decoded.
        snapshots_wanted: symbols whose book waits for a snapshot (Binance: request one; OKX and Bybit: subscribe again).
        events_max: most events that one :meth:`feed` appends; flush the batch when it has less room.
    """

    venue = ""
    by_order = False
    """Whether books are kept by order, not by level."""
    events_max = 2 * LEVELS_MAX + 2 * HELD_LEVELS_MAX
    compiled: int | None = None
    """The venue's number in :mod:`tickmesh.node.json_kernels`."""
    compiled_kinds: Sequence[tuple[int, str]] = ()
    """What messages of each kind that is counted there are called."""

    def __init__(self, options: Source, table: InstrumentTable, source: int = 0, shard: Callable[[str], int | None] | None = None) -> None:
        self.options, self.table, self.source = options, table, source
        self._messages: Counter[str] = Counter()
        self.malformed: Counter[str] = Counter()
        self._counters: Counter[str] = Counter()
        self._books = np.zeros(table.capacity, BOOK)
        self._books["ladder"] = -1
        kinds = self.compiled_kinds
        self._decoder = None if self.compiled is None else CompiledDecoder(self.compiled, kinds, table, source, self._books)
        self.snapshots_wanted: set[str] = set()
        self._listings: dict[str, Listing] = {}
        self._new: list[Listing] = []
        self._unwanted: set[str] = set()
        self._shard = shard
        table.let_through(source, options.symbols, options.exclude)

    @property
    def messages(self) -> Counter[str]:
        """How many messages of each kind came; from any thread."""
        found = self._messages.copy()
        if self._decoder is not None:
            self._decoder.add_messages(found)
        return found

    @property
    def counters(self) -> Counter[str]:
        """What happened to books; from any thread."""
        found = self._counters.copy()
        if self._decoder is not None:
            self._decoder.add_counters(found)
        return found

    def feed_many(self, messages: Sequence[Message], out: EventBatch, enough: int = 1 << 30) -> int:
        """As :meth:`feed` for one after the other, until `enough` events are in `out` or it has no room for a message of any size.

        Args:
            messages: text, time of receipt, and sequence for its events (0: the venue's own).

        Returns:
            How many messages it has taken.
        """
        done, enough = 0, min(enough, out.capacity - self.events_max)
        if self._decoder is not None:
            self._decoder.load(messages)
        while done < len(messages) and out.count <= enough:
            if self._decoder is not None and (taken := self._decoder.run(done, out, enough)):
                done += taken
                if self._decoder.has_bad_checksum:
                    self._bad_checksum(messages[done - 1], out)
                continue
            if out.count > enough:
                break
            payload, recv_ns, sequence = messages[done]
            mark = out.count
            self.feed(payload, recv_ns, out)
            if sequence:
                out.events["seq"][mark : out.count] = sequence
            done += 1
        return done

    def _bad_checksum(self, message: Message, out: EventBatch) -> None:
        """Compiled code has found a book to be wrong, after the events of this message."""
        assert self._decoder is not None
        instrument, time = self._decoder.wrong_book()
        listing = next(found for found in self._listings.values() if found.instrument == instrument)
        self._counters["checksums_failed"] += 1
        mark = out.count
        self._emit_gap(listing, Update(0, listing.last_id or 0, -1, time, message[1], []), 0, 0, out)
        if message[2]:
            out.events["seq"][mark : out.count] = message[2]

    def feed(self, payload: bytes, recv_ns: int, out: EventBatch) -> None:
        """Append the events of one message.

        Args:
            payload: the message, UTF-8 JSON.
            recv_ns: when it was received, nanoseconds since 1970.
            out: with room for :attr:`events_max`.
        """
        self._guarded(out, lambda: self._message(self._parse(payload), recv_ns, out))

    def lost(self) -> None:
        """The connection is lost, or messages were left out: every book waits for a snapshot. The caller says so to the shards."""
        for listing in self._listings.values():
            if listing.last_id is not None or listing.held:
                self.snapshots_wanted.add(listing.symbol)
            listing.last_id, listing.fresh_snapshot = None, False
            listing.held.clear()
            listing.held_levels = 0

    def _guarded(self, out: EventBatch, work: Callable[[], None]) -> None:
        """Run `work`; whatever is wrong with the input is counted, and its events and new instruments are taken back."""
        mark = out.count
        self._new.clear()
        try:
            work()
            return
        except Filtered:
            self._counters["filtered"] += 1
        except Malformed as error:
            self.malformed[error.reason] += 1
        except BadNumber as error:
            self.malformed[f"number_{error.reason}"] += 1
        except KeyError:
            self.malformed["missing_field"] += 1
        except (TypeError, ValueError, IndexError, AttributeError, OverflowError):
            self.malformed["wrong_type"] += 1
        out.count = mark
        for listing in self._new:
            del self._listings[listing.symbol]
            listing.book["listed"] = 0
            self.table.record(listing.instrument)["announced"] = 0

    def _parse(self, payload: bytes) -> Any:
        try:
            return _JSON.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise Malformed("bad_json") from None

    def _message(self, message: Any, recv_ns: int, out: EventBatch) -> None:
        raise NotImplementedError

    def _count_message(self, kind: str) -> None:
        known = kind in self._messages or len(self._messages) < MESSAGE_TYPES_MAX
        self._messages[kind if known else "other"] += 1

    # ---- instruments

    def _listing(self, symbol: Any, recv_ns: int, out: EventBatch, prices: list[str], quantities: list[str]) -> Listing:
        """The instrument of a symbol; the first time it is interned and its REFERENCE event goes ahead."""
        found = self._listings.get(symbol) if isinstance(symbol, str) else None
        return found or self._new_listing(symbol, recv_ns, out, prices, quantities)

    def _book_listing(self, symbol: Any, recv_ns: int, out: EventBatch, bids: Any, asks: Any) -> Listing:
        """:meth:`_listing` of a message with a book's levels, which are looked at only if the symbol is new."""
        found = self._listings.get(symbol) if isinstance(symbol, str) else None
        return found or self._new_listing(symbol, recv_ns, out, texts_of(bids, asks, 0), texts_of(bids, asks, 1))

    def _new_listing(self, symbol: Any, recv_ns: int, out: EventBatch, prices: list[str], quantities: list[str]) -> Listing:
        if not isinstance(symbol, str) or not 0 < len(symbol) <= 24 or not symbol.isascii() or not symbol.isprintable():
            raise Malformed("bad_symbol")
        if not self._wanted(symbol):
            raise Filtered
        fixed = [fixed_point(p, PRICE_DECIMALS) for p in prices]
        tick = self.options.tick_size_of(symbol)
        exponent = self.options.quantity_exponent_of(symbol)
        tick = tick_of(fixed) if tick is None else tick
        exponent = exponent_of(quantities, self.by_order) if exponent is None else exponent
        for quantity in quantities:
            fixed_point(quantity, exponent)  # refuse the message before the instrument is known
        number = self._intern(symbol, tick, exponent)
        listing = Listing(symbol, number, exponent, self._books[number])
        record = self.table.record(listing.instrument)
        if not record["announced"]:
            record["announced"] = 1
            out.append_reference(listing.instrument, recv_ns, symbol.encode(), int(record["tick_size"]), int(record["qty_exponent"]))
        listing.qty_exponent = int(record["qty_exponent"])
        self._listings[symbol] = listing
        self._new.append(listing)
        return listing

    def _wanted(self, symbol: str) -> bool:
        if symbol in self._unwanted:
            return False
        if self.table.lets_through(symbol, self.source):
            return True
        if len(self._unwanted) < 1 << 16:
            self._unwanted.add(symbol)
        return False

    def _intern(self, symbol: str, tick: int, exponent: int) -> int:
        placed = self._shard(symbol) if self._shard else None
        try:
            return self.table.intern(symbol, self.source, tick, exponent, placed)
        except InstrumentTableFull:
            self._counters["refused_instruments"] += 1
            raise Filtered from None

    # ---- books

    def _emit_levels(self, listing: Listing, update: Update, out: EventBatch, flags: int) -> None:
        out.append_levels(listing.instrument, update.ts_event, update.ts_recv, update.levels, flags, _MORE, update.last)

    def _emit_snapshot(self, listing: Listing, snapshot: Update, out: EventBatch) -> None:
        flags = _SNAPSHOT | (_MORE if snapshot.levels else 0)
        out.append(Kind.CLEAR, listing.instrument, snapshot.ts_event, snapshot.ts_recv, NO_SIDE, 0, 0, 0, 0, flags, snapshot.last)
        self._emit_levels(listing, snapshot, out, _SNAPSHOT)
        listing.last_id, listing.fresh_snapshot = snapshot.last, True
        listing.book["old"] = 0
        self._counters["snapshots"] += 1
        self.snapshots_wanted.discard(listing.symbol)

    def _emit_gap(self, listing: Listing, update: Update, first: int, last: int, out: EventBatch) -> None:
        """Updates `first`..`last` are missing (0..0: unknown which): the book is stale until a snapshot comes."""
        if last < first or not last:
            first, last = 0, 0
        missing = last - first + 1 if last else 0
        out.append(Kind.GAP, listing.instrument, update.ts_event, update.ts_recv, NO_SIDE, 0, missing, first, last, 0, update.last)
        listing.last_id = None
        self._counters["gaps"] += 1
        self.snapshots_wanted.add(listing.symbol)

    def _apply(self, listing: Listing, update: Update, out: EventBatch) -> None:
        self._emit_levels(listing, update, out, 0)
        listing.last_id, listing.fresh_snapshot = update.last, False
        listing.book["old"] = 0
        self._counters["updates_applied"] += 1

    def _left_behind(self, listing: Listing, update: Update, out: EventBatch) -> bool:
        """An update that is older than the book; whether there are so many that the venue counts anew, and the book is stale now."""
        self._counters["updates_old"] += 1
        listing.book["old"] += 1
        if listing.book["old"] <= (_OLD_AFTER_SNAPSHOT_MAX if listing.fresh_snapshot else _OLD_MAX):
            return False
        self._counters["restarts"] += 1
        self._emit_gap(listing, update, 0, 0, out)
        return True

    def _emit_trade(
        self, listing: Listing, ts_event: int, recv_ns: int, buyer_is_aggressor: bool, price: str, qty: str, trade_id: int, out: EventBatch
    ) -> None:
        fixed, units = fixed_point(price, PRICE_DECIMALS), fixed_point(qty, listing.qty_exponent)
        if fixed <= 0 or units < 0:
            raise Malformed("number_negative")
        if trade_id < 0 or trade_id >= 1 << 64:
            raise Malformed("bad_id")
        out.append(Kind.TRADE, listing.instrument, ts_event, recv_ns, BID if buyer_is_aggressor else ASK, fixed, units, trade_id)

    def _emit_quote(
        self, listing: Listing, ts_event: int, recv_ns: int, bid: tuple[str, str], ask: tuple[str, str], seq: int, out: EventBatch
    ) -> None:
        """A QUOTE of the venue; an empty text is an absent side."""
        bid_price, bid_qty = _quote_side(bid, listing.qty_exponent)
        ask_price, ask_qty = _quote_side(ask, listing.qty_exponent)
        out.append(Kind.QUOTE, listing.instrument, ts_event, recv_ns, NO_SIDE, bid_price, bid_qty, ask_qty, ask_price, 0, seq)


def _quote_side(side: tuple[str, str], exponent: int) -> tuple[int, int]:
    if not side[0]:
        return NO_PRICE, 0
    price, qty = fixed_point(side[0], PRICE_DECIMALS), fixed_point(side[1], exponent)
    return (price, qty) if qty > 0 else (NO_PRICE, 0)


def number_of(value: Any) -> int:
    """An update id or sequence number: an integer in the range of an event's `seq`."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise Malformed("bad_id")
    return value


def time_of(milliseconds: Any) -> int:
    """Milliseconds since 1970, as a number or text, in nanoseconds."""
    value = fixed_point(milliseconds, 0) if isinstance(milliseconds, str) else milliseconds
    if type(value) is not int or not 0 <= value < (1 << 63) // _MS:
        raise Malformed("bad_time")
    return value * _MS


def iso_time_of(text: Any) -> int:
    """An ISO 8601 time, in nanoseconds since 1970."""
    if not isinstance(text, str):
        raise Malformed("bad_time")
    try:
        return iso8601_ns(text)
    except BadRecord as error:
        raise Malformed(error.reason) from None


def levels_of(bids: Any, asks: Any, exponent: int, orders_at: int | None = None) -> list[Level]:
    """Levels of a message, bids first, prices and quantities as integers."""
    if not isinstance(bids, list) or not isinstance(asks, list):
        raise Malformed("wrong_type")
    if len(bids) + len(asks) > LEVELS_MAX:
        raise Malformed("too_many_levels")
    levels = []
    for side, entries in ((BID, bids), (ASK, asks)):
        for entry in entries:
            if type(entry) is not list:
                raise Malformed("wrong_type")
            price, qty = fixed_point(entry[0], PRICE_DECIMALS), fixed_point(entry[1], exponent)
            if price <= 0 or qty < 0:
                raise Malformed("number_negative")
            orders = fixed_point(entry[orders_at], 0) if orders_at is not None and len(entry) > orders_at else 0
            levels.append(Level(side, price, qty, orders))
    return levels


def texts_of(bids: Any, asks: Any, column: int) -> list[str]:
    """One column of the levels of a message, as text."""
    if not isinstance(bids, list) or not isinstance(asks, list):
        raise Malformed("wrong_type")
    return [entry[column] for entry in (*bids, *asks)]


# ---------------------------------------------------------------- Binance


class BinanceFeed(VenueFeed):
    """Binance spot (and USD-M futures) market streams, raw or combined.

    Depth updates are joined to a REST snapshot as the venue prescribes ("How to manage a local order book correctly"): updates are
    held until a snapshot comes, those with ``u <= lastUpdateId`` are dropped, the first applied must have
    ``U <= lastUpdateId + 1 <= u``, each later one ``U == previous u + 1`` (futures: ``pu == previous u``).

    A REST snapshot does not name its symbol: give it to :meth:`snapshot`. One that comes through :meth:`feed` (a recording) is taken
    for the only symbol that waits for one.
    """

    venue = "binance"
    compiled = BINANCE
    compiled_kinds = ((BOOK_MESSAGES, "depthUpdate"), (TRADES, "trade"), (OTHER_TRADES, "aggTrade"), (TICKERS, "bookTicker"))
    _IGNORED = frozenset(
        {"kline", "continuous_kline", "24hrTicker", "24hrMiniTicker", "1hTicker", "4hTicker", "1dTicker", "avgPrice", "markPriceUpdate",
         "forceOrder", "indexPriceUpdate", "compositeIndex", "contractInfo", "outboundAccountPosition", "serverShutdown"}
    )  # fmt: skip

    def _message(self, message: Any, recv_ns: int, out: EventBatch) -> None:
        stream = ""
        if isinstance(message, dict) and "data" in message and "stream" in message:
            stream, message = message["stream"], message["data"]
        if isinstance(message, list):
            self._count_message("array")
            return
        if not isinstance(message, dict):
            raise Malformed("not_an_object")
        kind = message.get("e")
        if kind is None:
            self._nameless(message, stream, recv_ns, out)
        elif kind == "depthUpdate":
            self._count_message("depthUpdate")
            self._depth(message, recv_ns, out)
        elif kind in ("trade", "aggTrade"):
            self._count_message(kind)
            self._trade(message, message["t" if kind == "trade" else "a"], recv_ns, out)
        elif kind == "bookTicker":
            self._count_message("bookTicker")
            self._book_ticker(message, recv_ns, out)
        elif kind in self._IGNORED:
            self._count_message(kind)
        else:
            raise Malformed("unknown_event")

    def _nameless(self, message: dict[str, Any], stream: Any, recv_ns: int, out: EventBatch) -> None:
        """Messages without an event name: spot bookTicker, snapshots, partial books, answers to requests."""
        if "lastUpdateId" in message:
            if stream:
                self._count_message("partialDepth")
                return
            self._count_message("snapshot")
            self._snapshot(self._waiting_symbol(), message, recv_ns, out)
        elif "u" in message and "B" in message and "A" in message:
            self._count_message("bookTicker")
            self._book_ticker(message, recv_ns, out)
        elif "result" in message or "id" in message:
            self._count_message("answer")
        else:
            raise Malformed("unknown_event")

    def snapshot(self, symbol: str, payload: bytes, recv_ns: int, out: EventBatch) -> None:
        """Take the answer of ``GET /api/v3/depth`` for a symbol; as :meth:`feed` otherwise."""
        self._count_message("snapshot")
        self._guarded(out, lambda: self._snapshot(symbol, self._parse(payload), recv_ns, out))

    def _waiting_symbol(self) -> str:
        waiting = sorted(self.snapshots_wanted) or self.options.symbols
        if len(waiting) != 1:
            raise Malformed("snapshot_without_symbol")
        return waiting[0]

    def _book_ticker(self, message: dict[str, Any], recv_ns: int, out: EventBatch) -> None:
        bid, ask = (message["b"], message["B"]), (message["a"], message["A"])
        listing = self._listing(message["s"], recv_ns, out, [bid[0], ask[0]], [bid[1], ask[1]])
        time = message.get("T", message.get("E"))
        self._emit_quote(listing, recv_ns if time is None else time_of(time), recv_ns, bid, ask, number_of(message["u"]), out)

    def _trade(self, message: dict[str, Any], trade_id: Any, recv_ns: int, out: EventBatch) -> None:
        price, qty, buyer_is_maker = message["p"], message["q"], message["m"]
        if type(buyer_is_maker) is not bool:
            raise Malformed("wrong_type")
        time, number = time_of(message["T"]), number_of(trade_id)
        listing = self._listing(message["s"], recv_ns, out, [price], [qty])
        self._emit_trade(listing, time, recv_ns, not buyer_is_maker, price, qty, number, out)

    def _depth(self, message: dict[str, Any], recv_ns: int, out: EventBatch) -> None:
        bids, asks = message["b"], message["a"]
        first, last, time = number_of(message["U"]), number_of(message["u"]), time_of(message["E"])
        previous = number_of(message["pu"]) if "pu" in message else -1
        if first > last:
            raise Malformed("bad_id")
        listing = self._book_listing(message["s"], recv_ns, out, bids, asks)
        update = Update(first, last, previous, time, recv_ns, levels_of(bids, asks, listing.qty_exponent))
        if listing.last_id is None:
            self._hold(listing, update)
        else:
            self._follow(listing, update, out)

    def _hold(self, listing: Listing, update: Update) -> None:
        listing.held.append(update)
        listing.held_levels += len(update.levels) + 1
        self._counters["updates_held"] += 1
        self.snapshots_wanted.add(listing.symbol)
        while listing.held_levels > HELD_LEVELS_MAX:
            listing.held_levels -= len(listing.held.popleft().levels) + 1
            self._counters["updates_dropped"] += 1

    def _follow(self, listing: Listing, update: Update, out: EventBatch) -> None:
        """Apply an update to a book that has its snapshot, if it is the next one."""
        at = listing.last_id
        assert at is not None
        if update.last <= at:
            if self._left_behind(listing, update, out):
                self._hold(listing, update)
        elif self._is_next(listing, update, at):
            self._apply(listing, update, out)
        else:
            self._emit_gap(listing, update, at + 1, max(update.first - 1, at + 1), out)
            self._hold(listing, update)

    @staticmethod
    def _is_next(listing: Listing, update: Update, at: int) -> bool:
        if listing.fresh_snapshot:
            return min(update.first, update.previous + 1 if update.previous >= 0 else update.first) <= at + 1 <= update.last
        return update.first == at + 1 if update.previous < 0 else update.previous == at

    def _snapshot(self, symbol: str, message: Any, recv_ns: int, out: EventBatch) -> None:
        bids, asks, at = message["bids"], message["asks"], number_of(message["lastUpdateId"])
        time = time_of(message["E"]) if "E" in message else recv_ns
        listing = self._book_listing(symbol, recv_ns, out, bids, asks)
        snapshot = Update(at, at, -1, time, recv_ns, levels_of(bids, asks, listing.qty_exponent))
        held = [update for update in listing.held if update.last > at]
        behind = listing.last_id is not None and at < listing.last_id
        if behind or (held and held[0].first > at + 1):
            self._counters["snapshots_old"] += 1  # older than the first update held: another one is needed
            return
        self._counters["updates_old"] += len(listing.held) - len(held)
        listing.held.clear()
        listing.held_levels = 0
        self._emit_snapshot(listing, snapshot, out)
        for update in held:
            if listing.last_id is None:
                self._hold(listing, update)
            else:
                self._follow(listing, update, out)


# ---------------------------------------------------------------- Bybit


class BybitFeed(VenueFeed):
    """Bybit API v5 public topics: orderbook (snapshot and delta, update ids without a gap), publicTrade; tickers are counted only."""

    venue = "bybit"
    compiled = BYBIT
    compiled_kinds = ((BOOK_MESSAGES, "orderbook"), (TRADES, "publicTrade"))

    def _message(self, message: Any, recv_ns: int, out: EventBatch) -> None:
        if not isinstance(message, dict):
            raise Malformed("not_an_object")
        if "topic" not in message:
            self._count_message(f"answer:{str(message['op'])[:32]}")
            return
        topic = message["topic"].split(".")[0]
        if topic == "orderbook":
            self._count_message("orderbook")
            self._book(message, recv_ns, out)
        elif topic == "publicTrade":
            self._count_message("publicTrade")
            self._trades(message["data"], recv_ns, out)
        elif topic in ("tickers", "kline", "liquidation", "allLiquidation", "kline_lt", "tickers_lt", "lt"):
            self._count_message(topic)
        else:
            raise Malformed("unknown_event")

    def _trades(self, entries: Any, recv_ns: int, out: EventBatch) -> None:
        if not isinstance(entries, list) or len(entries) > TRADES_MAX:
            raise Malformed("too_many_entries")
        for entry in entries:
            self._guarded(out, partial(self._trade, entry, recv_ns, out))

    def _trade(self, entry: dict[str, Any], recv_ns: int, out: EventBatch) -> None:
        price, qty, side, time = entry["p"], entry["v"], entry["S"], time_of(entry["T"])
        if side not in ("Buy", "Sell"):
            raise Malformed("bad_side")
        listing = self._listing(entry["s"], recv_ns, out, [price], [qty])
        self._emit_trade(listing, time, recv_ns, side == "Buy", price, qty, trade_number(entry["i"]), out)

    def _book(self, message: dict[str, Any], recv_ns: int, out: EventBatch) -> None:
        data, kind, time = message["data"], message["type"], time_of(message["ts"])
        bids, asks, number = data["b"], data["a"], number_of(data["u"])
        if kind not in ("snapshot", "delta"):
            raise Malformed("bad_action")
        listing = self._book_listing(data["s"], recv_ns, out, bids, asks)
        update = Update(number, number, -1, time, recv_ns, levels_of(bids, asks, listing.qty_exponent))
        if kind == "snapshot" or number == 1:  # u = 1: the venue's service has restarted, the message is a whole book
            self._emit_snapshot(listing, update, out)
        elif listing.last_id is None:
            self._counters["updates_dropped"] += 1
            self.snapshots_wanted.add(listing.symbol)
        elif number <= listing.last_id:
            self._left_behind(listing, update, out)
        elif number == listing.last_id + 1:
            self._apply(listing, update, out)
        else:
            self._emit_gap(listing, update, listing.last_id + 1, number - 1, out)


def trade_number(text: Any) -> int:
    """A trade id as a number: its digits, or for a UUID its first 63 bits."""
    if not isinstance(text, str):
        raise Malformed("bad_id")
    return fixed_point(text, 0) if text.isdigit() else uuid.UUID(text).int >> 65


# ---------------------------------------------------------------- any record, by a field mapping

_QUOTE_SLOTS = {"bid": "price", "bid_qty": "qty", "ask_qty": "id", "ask": "aux"}
_EMPTY_EVENT = {"price": 0, "qty": 0, "side": NO_SIDE, "id": 0, "aux": 0, "ts_event": 0, "seq": 0}
_ORDER_EVENTS = frozenset({"add", "execute", "cancel", "delete", "replace", "modify"})
_BOOK_EVENTS = _ORDER_EVENTS | {"level", "clear"}


class MappedFeed(VenueFeed):
    """Records to events by the field mapping of the configuration (:mod:`tickmesh.node.fields`); JSON here, CSV in its own module.

    Every entry of `messages` that matches a record makes events of it. Book events of one record are one transaction: all but the
    last carry MORE. A record that is refused, and may have been a change of a book, makes that book stale until its next snapshot (a
    `clear` event, or an entry with `snapshot`); if its symbol cannot be told, every book of the source.
    """

    venue = "json"

    def __init__(
        self,
        options: Source,
        table: InstrumentTable,
        source: int = 0,
        shard: Callable[[str], int | None] | None = None,
        columns: list[str] | None = None,
    ) -> None:
        super().__init__(options, table, source, shard)
        self.mappings = compile_mappings(options, columns)
        self.by_order = any(mapping.event in _ORDER_EVENTS for mapping in self.mappings)
        self._midnight_ns = options.midnight_ns()
        self._has_books = any(mapping.event in _BOOK_EVENTS for mapping in self.mappings)
        self._in_doubt: set[str] | None = None
        """Symbols of the books that the record at hand may change; None: any."""
        self._recovered: list[Listing] = []
        """Stale books that it gives a snapshot of."""

    def feed(self, payload: bytes, recv_ns: int, out: EventBatch) -> None:
        refused, self._in_doubt = self.malformed.total(), None
        self._recovered.clear()
        super().feed(payload, recv_ns, out)
        if self._has_books and self.malformed.total() != refused:
            for listing in self._recovered:  # not quite
                listing.stale = True
                self.snapshots_wanted.add(listing.symbol)
            for listing in self._listings.values():
                if listing.has_changes and not listing.stale and (self._in_doubt is None or listing.symbol in self._in_doubt):
                    listing.stale = True
                    self._emit_gap(listing, Update(0, 0, -1, recv_ns, recv_ns, []), 0, 0, out)

    def lost(self) -> None:
        for listing in self._listings.values():
            listing.stale = listing.has_changes
        super().lost()

    def _message(self, message: Any, recv_ns: int, out: EventBatch) -> None:
        try:
            self._record(message, recv_ns, out)
        except BadRecord as error:
            raise Malformed(error.reason) from None

    def _record(self, record: Any, recv_ns: int, out: EventBatch) -> None:
        last_book_event, matching = -1, [mapping for mapping in self.mappings if mapping.matches(record)]
        self._in_doubt = self._books_of(matching, record) if self._has_books else None
        for mapping in matching:
            self._count_message(mapping.event)
            for i, row in enumerate(mapping.rows(record)):
                self._row(mapping, row, mapping.snapshot and i == 0, recv_ns, out)
                if mapping.event in _BOOK_EVENTS:
                    if last_book_event >= 0:
                        out.set_flags(last_book_event, int(out.events[last_book_event]["flags"]) | _MORE)
                    last_book_event = out.count - 1
        if not matching:
            self._count_message("unmatched")

    def _books_of(self, matching: list[RecordMapping], record: Any) -> set[str] | None:
        """Symbols of the books that a record changes by some mappings; None: it cannot be told."""
        found = set[str]()
        for mapping in matching:
            if mapping.event in _BOOK_EVENTS:
                symbol = mapping.symbol_of(record) if "symbol" in mapping.fields else self.options.symbols[0]
                if symbol is None:
                    return None
                found.add(symbol)
        return found

    def _row(self, mapping: RecordMapping, row: dict[str, str], clear_first: bool, recv_ns: int, out: EventBatch) -> None:
        symbol = row["symbol"] if "symbol" in row else self.options.symbols[0]
        listing = self._listings.get(symbol) or self._mapped_listing(mapping, symbol, row, recv_ns, out)
        event = {**_EMPTY_EVENT, "ts_event": recv_ns}
        for name, text in row.items():
            if name != "symbol":
                value = convert(mapping.fields[name], text, listing.qty_exponent, mapping.event)
                assert isinstance(value, int)
                event[_QUOTE_SLOTS.get(name, name)] = value
        self._check_row(mapping, event)
        if "ts_event" in row and self._midnight_ns:
            event["ts_event"] += self._midnight_ns
        flags = _SNAPSHOT if mapping.snapshot else 0
        recv_ns = recv_ns or event["ts_event"]
        if clear_first:
            out.append(Kind.CLEAR, listing.instrument, event["ts_event"], recv_ns, NO_SIDE, 0, 0, 0, 0, _SNAPSHOT | _MORE, event["seq"])
        if mapping.event in _BOOK_EVENTS:
            self._follow_book(listing, clear_first or mapping.kind == Kind.CLEAR)
        out.append(
            mapping.kind, listing.instrument, event["ts_event"], recv_ns, event["side"], event["price"], event["qty"], event["id"],
            event["aux"], flags | self._flags_of(mapping), event["seq"],
        )  # fmt: skip

    def _follow_book(self, listing: Listing, is_clear: bool) -> None:
        """Note that a book has had an event, and whether it is right again."""
        listing.has_changes = True
        if is_clear and listing.stale:
            listing.stale = False
            self._recovered.append(listing)
            self.snapshots_wanted.discard(listing.symbol)

    @staticmethod
    def _flags_of(mapping: RecordMapping) -> int:
        return int(Flag.PRICED) if mapping.event == "execute" and "price" in mapping.fields else 0

    @staticmethod
    def _check_row(mapping: RecordMapping, event: dict[str, int]) -> None:
        if event["qty"] < 0 or event["id"] < 0 or event["seq"] < 0:
            raise Malformed("number_negative")
        if mapping.event in ("level", "add") and event["side"] == NO_SIDE:
            raise Malformed("bad_side")
        if mapping.event == "quote":
            for price, qty in (("price", "qty"), ("aux", "id")):
                if event[price] == 0:
                    event[price], event[qty] = NO_PRICE, 0

    def _mapped_listing(self, mapping: RecordMapping, symbol: str, row: dict[str, str], recv_ns: int, out: EventBatch) -> Listing:
        """A new symbol: its tick size and exponent are configured, or inferred from this row."""
        prices, quantities = [], []
        for name, text in row.items():
            if name in PRICE_FIELDS:
                prices.append(mapping.fields[name].plain(text))
            elif name in QTY_FIELDS:
                quantities.append(mapping.fields[name].plain(text))
        return self._listing(symbol, recv_ns, out, prices, quantities)
