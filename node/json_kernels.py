"""The hot messages of the venues that are built in, compiled: book updates, trades and quotes from their text to events.

What is done here is what the decoders in Python do (:mod:`tickmesh.node.json_feed` and its neighbours, which stay the measure: the tests
compare both on the same messages), for messages that are as usual: of a known instrument, the next update of a book that has its
snapshot. Everything else is left to them, message by message, with nothing changed: the first of a symbol, snapshots, gaps, whatever is
malformed. Both work on the same state (:data:`BOOK`, :mod:`tickmesh.node.json_ladder`).
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np

from tickmesh.node.event import ASK, BID, EVENT, NO_PRICE, NO_SIDE, PRICE_DECIMALS, Flag, Kind
from tickmesh.node.instruments import InstrumentTable, find_instrument
from tickmesh.node.json_ladder import KRAKEN, LEVELS_MAX, OKX, checksum, ladder_set, make_ladders, worst_beyond
from tickmesh.node.json_text import (
    ABSENT,
    FALSE,
    LIST,
    NUMBER,
    OBJECT,
    ORDERS,
    PRICE,
    QTY,
    ROWS,
    SIDE,
    SPAN,
    TEXT,
    TRUE,
    Under,
    fixed,
    iso_time_ns,
    make_found,
    make_shape,
    scaled,
    scan,
    span_of,
    uuid_number,
    whole,
    words_of,
)  # fmt: skip
from tickmesh.transports.toolbox import inlined, le64, loop, outlined

BINANCE, OKX_V5, BYBIT, COINBASE, KRAKEN_FUTURES, KRAKEN_SPOT = range(6)
"""Venues."""
BOOK = np.dtype([("last_id", "<i8"), ("exponent", "<i8"), ("ladder", "<i8"), ("depth", "<i8"), ("old", "<i8"),
                 ("listed", "u1"), ("has_book", "u1"), ("fresh", "u1"), ("_pad", "u1", 5)])  # fmt: skip
"""An instrument as a feed knows it: the update that its book is at (if `has_book`), decimals of quantities, its ladder (-1: none), whether
no update has come since the snapshot (`fresh`), how many older ones have come in a row. `depth`: most levels of a side; 0: the venue
removes them itself."""
BOOK_MESSAGES, TRADES, TICKERS, OTHER_TRADES, APPLIED, CHECKED, UNCHECKED, COMPILED, WRONG_BOOK, WRONG_TIME, _COUNTS = range(11)
"""Words of `Hot.counts`: messages of each kind; updates of books applied; checksums looked at, and absent; messages in all; the instrument,
and the message's time, of the last BAD_CHECKSUM."""
DONE, UNUSUAL, BAD_CHECKSUM = 1, 0, 2
"""What became of a message. BAD_CHECKSUM: its events are there, and its book is wrong."""

Hot = namedtuple("Hot", "books table shape found spare ladders counts out")
"""`books` BOOK by instrument; `table` Instruments; `out` EVENT, room for events."""

_I, _U = np.int64, np.uint64
_LEVEL, _TRADE, _QUOTE = np.uint8(Kind.LEVEL), np.uint8(Kind.TRADE), np.uint8(Kind.QUOTE)
_MORE = np.uint16(Flag.MORE)
_MS = _I(1_000_000)
_MS_MAX = _I(((1 << 63) - 1) // 1_000_000)
_NONE = np.uint32(0xFFFFFFFF)


def _word(text: str) -> Any:
    """A text's first eight bytes as :func:`words_of` reads them."""
    return _U(int.from_bytes(text.encode()[:8].ljust(8, b"\0"), "little"))


# ---------------------------------------------------------------- what all need


@inlined
def _put(out: Any, n: Any, seq: Any, ts_event: Any, ts_recv: Any, instrument: Any, kind: Any, side: Any, flags: Any, price: Any, qty: Any,
         order: Any, aux: Any) -> Any:  # fmt: skip
    e = out[_U(n)]
    e.seq, e.ts_event, e.ts_recv, e.instrument = _U(seq), _I(ts_event), _I(ts_recv), np.uint32(instrument)
    e.kind, e.side, e.flags, e.price = np.uint8(kind), np.uint8(side), np.uint16(flags), _I(price)
    e.qty, e.id, e.aux = _I(qty), _U(order), _I(aux)
    return n + 1


@inlined
def _is(buf: Any, span: Any, w0: Any, size: Any) -> Any:
    """Whether a value is a text of at most eight bytes."""
    return span.type == TEXT and span.size == size and words_of(buf, span)[0] == w0


@inlined
def _milliseconds(buf: Any, span: Any, kind: Any) -> Any:
    """Milliseconds since 1970 in ns; -1: it is none."""
    value = whole(buf, span, kind)
    return value * _MS if 0 <= value < _MS_MAX else _I(-1)


@outlined
def _instrument(buf: Any, span: Any, hot: Any, source: Any) -> Any:
    """The instrument of a symbol that the feed knows, i64; -1: it does not."""
    if span.type != TEXT or span.size < 1 or span.size > 24:
        return _I(-1)
    w0, w1, w2 = words_of(buf, span)
    found = find_instrument(hot.table, source, w0, w1, w2)
    if found == _NONE or hot.books[_U(found)].listed == 0:
        return _I(-1)
    return _I(found)


@outlined
def _scale_rows(hot: Any, span: Any, side: Any, exponent: Any) -> Any:
    """Price and quantity of a list's rows as an event has them; false: one does not fit. `side` 0 or 1: of all; else each has its own."""
    if span.type != ROWS:
        return False
    for k in range(span.at, span.at + span.size):
        row = hot.found.rows[_U(k)]
        row.price, row.qty = scaled(row.price, row.price_decimals, _I(PRICE_DECIMALS)), scaled(row.qty, row.qty_decimals, exponent)
        if row.price <= 0 or row.qty < 0:
            return False
        if side < NO_SIDE:
            row.side = side
    return True


@outlined
def _put_rows(hot: Any, n: Any, first: Any, second: Any, seq: Any, time: Any, recv: Any, instrument: Any) -> Any:
    """LEVEL events of the rows of two lists, all but the last with MORE; returns the new n, or -1: there is no room."""
    left = first.size + second.size
    if n + left > hot.out.size:
        return _I(-1)
    for turn in range(2):
        begin, size = (second.at, second.size) if turn else (first.at, first.size)
        for k in range(begin, begin + size):
            row = hot.found.rows[_U(k)]
            left -= 1
            flags = _MORE if left else np.uint16(0)
            n = _put(hot.out, n, seq, time, recv, instrument, _LEVEL, row.side, flags, row.price, row.qty, _U(0), row.orders)
    return n


@outlined
def _put_trade(buf: Any, hot: Any, n: Any, entry: Any, source: Any, slots: Any, number: Any, time: Any, recv: Any, side: Any,
               kind: Any) -> Any:  # fmt: skip
    """A TRADE; `slots`: of symbol, price and quantity, which are of type `kind`. Returns the new n, or -1."""
    found = hot.found
    instrument = _instrument(buf, span_of(found, entry, slots[0]), hot, source)
    if instrument < 0 or number < 0 or time < 0:
        return _I(-1)
    price = fixed(buf, span_of(found, entry, slots[1]), kind, _I(PRICE_DECIMALS))
    qty = fixed(buf, span_of(found, entry, slots[2]), kind, hot.books[_U(instrument)].exponent)
    if price <= 0 or qty < 0 or n == hot.out.size:
        return _I(-1)
    return _put(hot.out, n, _U(0), time, recv, instrument, _TRADE, side, np.uint16(0), price, qty, number, _I(0))


@inlined
def _quote_side(buf: Any, found: Any, entry: Any, price_slot: Any, qty_slot: Any, exponent: Any) -> Any:
    """``(price, quantity, whether they are such)`` of a side of a quote; an empty text is an absent side."""
    price_span, qty_span = span_of(found, entry, price_slot), span_of(found, entry, qty_slot)
    if price_span.type == TEXT and price_span.size == 0 and qty_span.type == TEXT:
        return _I(NO_PRICE), _I(0), True
    price, qty = fixed(buf, price_span, TEXT, _I(PRICE_DECIMALS)), fixed(buf, qty_span, TEXT, exponent)
    if qty == 0:
        return _I(NO_PRICE), _I(0), price >= 0
    return price, qty, price >= 0 and qty >= 0


@outlined
def _put_quote(buf: Any, hot: Any, n: Any, entry: Any, source: Any, slots: Any, seq: Any, time: Any, recv: Any) -> Any:
    """A QUOTE; `slots`: of symbol, bid, its quantity, ask, its quantity. Returns the new n, or -1."""
    instrument = _instrument(buf, span_of(hot.found, entry, slots[0]), hot, source)
    if instrument < 0 or seq < 0 or time < 0 or n == hot.out.size:
        return _I(-1)
    exponent = hot.books[_U(instrument)].exponent
    bid, bid_qty, bid_ok = _quote_side(buf, hot.found, entry, slots[1], slots[2], exponent)
    ask, ask_qty, ask_ok = _quote_side(buf, hot.found, entry, slots[3], slots[4], exponent)
    if not (bid_ok and ask_ok):
        return _I(-1)
    return _put(hot.out, n, seq, time, recv, instrument, _QUOTE, _I(NO_SIDE), np.uint16(0), bid, bid_qty, ask_qty, ask)


@inlined
def _apply(hot: Any, book: Any, last_id: Any) -> Any:
    book.last_id, book.fresh, book.old = last_id, np.uint8(0), 0
    hot.counts[APPLIED] += 1


@inlined
def _result(hot: Any, n: Any, made: Any, kind: Any) -> Any:
    """The result of a message of which `made` is the new n, or -1."""
    if made < 0:
        return n, UNUSUAL
    hot.counts[kind] += 1
    return made, DONE


@inlined
def _checked(hot: Any, instrument: Any, time: Any, holds: Any) -> Any:
    """The result of a message whose checksum holds or not."""
    hot.counts[CHECKED] += 1
    if holds:
        return DONE
    hot.counts[WRONG_BOOK], hot.counts[WRONG_TIME] = instrument, time
    return BAD_CHECKSUM


# ---------------------------------------------------------------- Binance

_B_STREAM, _B_DATA, _B_EVENT, _B_TIME, _B_SYMBOL, _B_FIRST, _B_LAST, _B_BIDS, _B_ASKS, _B_PREVIOUS = range(10)
_B_BID_QTY, _B_ASK_QTY, _B_PRICE, _B_QTY, _B_NUMBER, _B_TRADED, _B_MAKER, _B_SNAPSHOT = range(10, 18)
_BINANCE_KEYS = {
    "e": _B_EVENT, "E": _B_TIME, "s": _B_SYMBOL, "U": _B_FIRST, "u": _B_LAST, "b": Under(_B_BIDS, columns=(PRICE, QTY)),
    "a": Under(_B_ASKS, columns=(PRICE, QTY)), "pu": _B_PREVIOUS, "B": _B_BID_QTY, "A": _B_ASK_QTY, "p": _B_PRICE, "q": _B_QTY,
    "t": _B_NUMBER, "T": _B_TRADED, "m": _B_MAKER, "M": -1, "lastUpdateId": _B_SNAPSHOT,
}  # fmt: skip
_BINANCE_SHAPE = [{**_BINANCE_KEYS, "stream": _B_STREAM, "data": Under(_B_DATA, target=1)}, _BINANCE_KEYS]
_BINANCE_TRADE, _BINANCE_QUOTE = (_B_SYMBOL, _B_PRICE, _B_QTY), (_B_SYMBOL, _B_BIDS, _B_BID_QTY, _B_ASKS, _B_ASK_QTY)
_DEPTH, _UPDATE, _TRADE_WORD, _AGG, _BOOK_TICKER = (_word(w) for w in ("depthUpd", "ate", "trade", "aggTrade", "bookTick"))
_TICKER_REST = _word("er")
_IN_STREAM = _U(1 << _B_STREAM | 1 << _B_DATA)


@outlined
def _binance(buf: Any, hot: Any, n: Any, recv: Any, source: Any, entries: Any) -> Any:
    found, entry = hot.found, _I(entries - 1)
    if entries == 2 and (found.seen[0] != _IN_STREAM or span_of(found, _I(0), _B_DATA).type != OBJECT):
        return n, UNUSUAL
    if entries > 2 or (entries == 1 and found.seen[0] & _IN_STREAM != _U(0)) or span_of(found, entry, _B_SNAPSHOT).type != ABSENT:
        return n, UNUSUAL
    event = span_of(found, entry, _B_EVENT)
    if event.type == ABSENT:
        return _binance_quote(buf, hot, n, recv, source, entry)
    if event.type != TEXT or event.size > 16:
        return n, UNUSUAL
    w0, w1, _ = words_of(buf, event)
    if w0 == _DEPTH and w1 == _UPDATE:
        return _binance_depth(buf, hot, n, recv, source, entry)
    if w0 == _BOOK_TICKER and w1 == _TICKER_REST:
        return _binance_quote(buf, hot, n, recv, source, entry)
    if w1 != _U(0) or (w0 != _TRADE_WORD and w0 != _AGG):
        return n, UNUSUAL
    maker = span_of(found, entry, _B_MAKER).type
    if maker != TRUE and maker != FALSE:
        return n, UNUSUAL
    number = whole(buf, span_of(found, entry, _B_NUMBER if w0 == _TRADE_WORD else _B_ASKS), NUMBER)
    time, side = _milliseconds(buf, span_of(found, entry, _B_TRADED), NUMBER), _I(ASK if maker == TRUE else BID)
    made = _put_trade(buf, hot, n, entry, source, _BINANCE_TRADE, number, time, recv, side, TEXT)
    return _result(hot, n, made, TRADES if w0 == _TRADE_WORD else OTHER_TRADES)


@inlined
def _binance_quote(buf: Any, hot: Any, n: Any, recv: Any, source: Any, entry: Any) -> Any:
    traded, told = span_of(hot.found, entry, _B_TRADED), span_of(hot.found, entry, _B_TIME)
    given = told if traded.type == ABSENT else traded
    time = recv if given.type == ABSENT else _milliseconds(buf, given, NUMBER)
    seq = whole(buf, span_of(hot.found, entry, _B_LAST), NUMBER)
    return _result(hot, n, _put_quote(buf, hot, n, entry, source, _BINANCE_QUOTE, seq, time, recv), TICKERS)


@outlined
def _binance_depth(buf: Any, hot: Any, n: Any, recv: Any, source: Any, entry: Any) -> Any:
    found = hot.found
    first, last = whole(buf, span_of(found, entry, _B_FIRST), NUMBER), whole(buf, span_of(found, entry, _B_LAST), NUMBER)
    time, pu = _milliseconds(buf, span_of(found, entry, _B_TIME), NUMBER), span_of(found, entry, _B_PREVIOUS)
    previous = _I(-1) if pu.type == ABSENT else whole(buf, pu, NUMBER)
    instrument = _instrument(buf, span_of(found, entry, _B_SYMBOL), hot, source)
    if first < 0 or last < first or time < 0 or (previous < 0 and pu.type != ABSENT) or instrument < 0:
        return n, UNUSUAL
    book, bids, asks = hot.books[_U(instrument)], span_of(found, entry, _B_BIDS), span_of(found, entry, _B_ASKS)
    if book.has_book == 0 or not (_scale_rows(hot, bids, _I(BID), book.exponent) and _scale_rows(hot, asks, _I(ASK), book.exponent)):
        return n, UNUSUAL
    due = book.last_id + 1
    if last < due:
        return n, UNUSUAL
    if book.fresh:
        begins = min(first, previous + 1) if previous >= 0 else first
        is_next = begins <= due
    else:
        is_next = first == due if previous < 0 else previous + 1 == due
    made = _put_rows(hot, n, bids, asks, last, time, recv, instrument) if is_next else _I(-1)
    if made >= 0:
        _apply(hot, book, last)
    return _result(hot, n, made, BOOK_MESSAGES)


# ---------------------------------------------------------------- OKX

_O_EVENT, _O_ARG, _O_ACTION, _O_DATA, _O_CHANNEL, _O_SYMBOL, _O_BIDS, _O_ASKS, _O_TIME, _O_SUM, _O_PREVIOUS, _O_LAST = range(12)
_O_NUMBER, _O_PRICE, _O_QTY, _O_SIDE, _O_BID, _O_BID_QTY, _O_ASK, _O_ASK_QTY = range(12, 20)
_OKX_ROWS = (PRICE, QTY, 0, ORDERS)
_OKX_SHAPE: list[dict[str, int | Under]] = [
    {"event": _O_EVENT, "arg": Under(_O_ARG, target=1), "action": _O_ACTION, "data": Under(_O_DATA, target=2)},
    {"channel": _O_CHANNEL, "instId": _O_SYMBOL},
    {
        "asks": Under(_O_ASKS, columns=_OKX_ROWS), "bids": Under(_O_BIDS, columns=_OKX_ROWS), "ts": _O_TIME, "checksum": _O_SUM,
        "prevSeqId": _O_PREVIOUS, "seqId": _O_LAST, "instId": _O_SYMBOL, "tradeId": _O_NUMBER, "px": _O_PRICE, "sz": _O_QTY,
        "side": _O_SIDE, "bidPx": _O_BID, "bidSz": _O_BID_QTY, "askPx": _O_ASK, "askSz": _O_ASK_QTY,
    },
]  # fmt: skip
_OKX_TRADE, _OKX_QUOTE = (_O_SYMBOL, _O_PRICE, _O_QTY), (_O_SYMBOL, _O_BID, _O_BID_QTY, _O_ASK, _O_ASK_QTY)
_BOOKS, _TRADES_WORD, _TICKERS_WORD, _UPDATE_WORD, _BUY, _SELL = (_word(w) for w in ("books", "trades", "tickers", "update", "buy", "sell"))


@outlined
def _okx(buf: Any, hot: Any, n: Any, recv: Any, source: Any, entries: Any) -> Any:
    found = hot.found
    arg, data = span_of(found, _I(0), _O_ARG), span_of(found, _I(0), _O_DATA)
    if span_of(found, _I(0), _O_EVENT).type != ABSENT or arg.type != OBJECT or data.type != LIST:
        return n, UNUSUAL
    channel, made = span_of(found, arg.at, _O_CHANNEL), n
    if _is(buf, channel, _BOOKS, 5):
        if data.size != 1 or not _is(buf, span_of(found, _I(0), _O_ACTION), _UPDATE_WORD, 6):
            return n, UNUSUAL
        return _okx_book(buf, hot, n, recv, source, data.at, span_of(found, arg.at, _O_SYMBOL))
    is_trades = _is(buf, channel, _TRADES_WORD, 6)
    if not is_trades and not _is(buf, channel, _TICKERS_WORD, 7):
        return n, UNUSUAL
    for entry in range(data.at, data.at + data.size):
        time = _milliseconds(buf, span_of(found, entry, _O_TIME), TEXT)
        if is_trades:
            side, number = span_of(found, entry, _O_SIDE), whole(buf, span_of(found, entry, _O_NUMBER), TEXT)
            is_buy = _is(buf, side, _BUY, 3)
            if not is_buy and not _is(buf, side, _SELL, 4):
                return n, UNUSUAL
            made = _put_trade(buf, hot, made, entry, source, _OKX_TRADE, number, time, recv, _I(BID if is_buy else ASK), TEXT)
        else:
            made = _put_quote(buf, hot, made, entry, source, _OKX_QUOTE, _I(0), time, recv)
        if made < 0:
            return n, UNUSUAL
    return _result(hot, n, made, TRADES if is_trades else TICKERS)


@outlined
def _okx_book(buf: Any, hot: Any, n: Any, recv: Any, source: Any, entry: Any, symbol: Any) -> Any:
    found = hot.found
    told, before, after = span_of(found, entry, _O_SUM), span_of(found, entry, _O_PREVIOUS), span_of(found, entry, _O_LAST)
    instrument, time = _instrument(buf, symbol, hot, source), _milliseconds(buf, span_of(found, entry, _O_TIME), TEXT)
    last = _I(0) if after.type == ABSENT else whole(buf, after, NUMBER)
    numbers = (told.type == ABSENT or told.decimals == 0) and (before.type == ABSENT or before.decimals == 0)
    kinds = (told.type == ABSENT or told.type == NUMBER) and (before.type == ABSENT or before.type == NUMBER)
    if instrument < 0 or time < 0 or last < 0 or not kinds or not numbers:
        return n, UNUSUAL
    book, bids, asks = hot.books[_U(instrument)], span_of(found, entry, _O_BIDS), span_of(found, entry, _O_ASKS)
    if book.has_book == 0 or book.ladder < 0:
        return n, UNUSUAL
    if after.type != ABSENT and before.type != ABSENT and before.value >= 0 and before.value != book.last_id:
        return n, UNUSUAL
    if not (_scale_rows(hot, bids, _I(BID), book.exponent) and _scale_rows(hot, asks, _I(ASK), book.exponent)):
        return n, UNUSUAL
    made = _put_rows(hot, n, bids, asks, last, time, recv, instrument) if _fits(hot, book, bids, asks) else _I(-1)
    if made < 0:
        return n, UNUSUAL
    _set_rows(buf, hot, book, bids, asks)
    _apply(hot, book, last)
    hot.counts[BOOK_MESSAGES] += 1
    if told.type == ABSENT:
        hot.counts[UNCHECKED] += 1
        return made, DONE
    return made, _checked(hot, instrument, time, checksum(hot.ladders, book.ladder, OKX) == told.value)


@outlined
def _fits(hot: Any, book: Any, bids: Any, asks: Any) -> Any:
    """Whether the ladder has room for all rows of a message, and their texts are not too long."""
    counts = hot.ladders.counts[_U(book.ladder)]
    if counts[0] + bids.size > LEVELS_MAX or counts[1] + asks.size > LEVELS_MAX:
        return False
    for turn in range(2):
        begin, size = (asks.at, asks.size) if turn else (bids.at, bids.size)
        for k in range(begin, begin + size):
            row = hot.found.rows[_U(k)]
            if row.price_size > 24 or row.qty_size > 24:
                return False
    return True


@outlined
def _set_rows(buf: Any, hot: Any, book: Any, bids: Any, asks: Any) -> Any:
    for turn in range(2):
        begin, size = (asks.at, asks.size) if turn else (bids.at, bids.size)
        for k in range(begin, begin + size):
            ladder_set(hot.ladders, book.ladder, hot.found.rows[_U(k)], buf)


# ---------------------------------------------------------------- Bybit

_Y_TOPIC, _Y_TYPE, _Y_TIME, _Y_DATA, _Y_SYMBOL, _Y_BIDS, _Y_ASKS, _Y_LAST, _Y_TRADED, _Y_SIDE, _Y_QTY, _Y_PRICE, _Y_NUMBER = range(13)
_BYBIT_SHAPE: list[dict[str, int | Under]] = [
    {"topic": _Y_TOPIC, "type": _Y_TYPE, "ts": _Y_TIME, "data": Under(_Y_DATA, target=1), "cts": -1},
    {
        "s": _Y_SYMBOL, "b": Under(_Y_BIDS, columns=(PRICE, QTY)), "a": Under(_Y_ASKS, columns=(PRICE, QTY)), "u": _Y_LAST, "seq": -1,
        "T": _Y_TRADED, "S": _Y_SIDE, "v": _Y_QTY, "p": _Y_PRICE, "i": _Y_NUMBER, "L": -1, "BT": -1,
    },
]  # fmt: skip
_BYBIT_TRADE = (_Y_SYMBOL, _Y_PRICE, _Y_QTY)
_ORDERBOOK, _PUBLIC, _DELTA, _BUY_UP, _SELL_UP = (_word(w) for w in ("orderboo", "publicTr", "delta", "Buy", "Sell"))
_K_POINT, _ADE_POINT = np.uint64(0x2E6B), np.uint64(0x2E656461)
_LOW16, _LOW32 = np.uint64(0xFFFF), np.uint64(0xFFFFFFFF)


@outlined
def _bybit(buf: Any, hot: Any, n: Any, recv: Any, source: Any, entries: Any) -> Any:
    found = hot.found
    topic, data = span_of(found, _I(0), _Y_TOPIC), span_of(found, _I(0), _Y_DATA)
    if topic.type != TEXT or topic.size < 12:
        return n, UNUSUAL
    w0, w1 = le64(buf, topic.at), le64(buf, topic.at + 8)
    if w0 == _ORDERBOOK and w1 & _LOW16 == _K_POINT and data.type == OBJECT:
        return _bybit_book(buf, hot, n, recv, source, data.at)
    if w0 != _PUBLIC or w1 & _LOW32 != _ADE_POINT or data.type != LIST:
        return n, UNUSUAL
    made = n
    for entry in range(data.at, data.at + data.size):
        side, number = span_of(found, entry, _Y_SIDE), span_of(found, entry, _Y_NUMBER)
        is_buy = _is(buf, side, _BUY_UP, 3)
        if not is_buy and not _is(buf, side, _SELL_UP, 4):
            return n, UNUSUAL
        trade = uuid_number(buf, number) if number.size == 36 else whole(buf, number, TEXT)
        time = _milliseconds(buf, span_of(found, entry, _Y_TRADED), NUMBER)
        made = _put_trade(buf, hot, made, entry, source, _BYBIT_TRADE, trade, time, recv, _I(BID if is_buy else ASK), TEXT)
        if made < 0:
            return n, UNUSUAL
    return _result(hot, n, made, TRADES)


@outlined
def _bybit_book(buf: Any, hot: Any, n: Any, recv: Any, source: Any, entry: Any) -> Any:
    found = hot.found
    last, time = whole(buf, span_of(found, entry, _Y_LAST), NUMBER), _milliseconds(buf, span_of(found, _I(0), _Y_TIME), NUMBER)
    instrument = _instrument(buf, span_of(found, entry, _Y_SYMBOL), hot, source)
    if instrument < 0 or last <= 1 or time < 0 or not _is(buf, span_of(found, _I(0), _Y_TYPE), _DELTA, 5):
        return n, UNUSUAL
    book, bids, asks = hot.books[_U(instrument)], span_of(found, entry, _Y_BIDS), span_of(found, entry, _Y_ASKS)
    if book.has_book == 0 or last != book.last_id + 1:
        return n, UNUSUAL
    if not (_scale_rows(hot, bids, _I(BID), book.exponent) and _scale_rows(hot, asks, _I(ASK), book.exponent)):
        return n, UNUSUAL
    made = _put_rows(hot, n, bids, asks, last, time, recv, instrument)
    if made >= 0:
        _apply(hot, book, last)
    return _result(hot, n, made, BOOK_MESSAGES)


# ---------------------------------------------------------------- Coinbase

_C_TYPE, _C_SYMBOL, _C_CHANGES, _C_TIME, _C_NUMBER, _C_SIDE, _C_PRICE, _C_QTY, _C_SEQUENCE = range(9)
_C_BID, _C_BID_QTY, _C_ASK, _C_ASK_QTY = range(9, 13)
_COINBASE_SHAPE: list[dict[str, int | Under]] = [
    {
        "type": _C_TYPE, "product_id": _C_SYMBOL, "changes": Under(_C_CHANGES, columns=(SIDE, PRICE, QTY)), "trade_id": _C_NUMBER,
        "maker_order_id": -1, "taker_order_id": -1, "side": _C_SIDE, "size": _C_QTY, "price": _C_PRICE, "sequence": _C_SEQUENCE,
        "best_bid": _C_BID, "best_bid_size": _C_BID_QTY, "best_ask": _C_ASK, "best_ask_size": _C_ASK_QTY, "time": _C_TIME,
    }
]  # fmt: skip
_COINBASE_TRADE, _COINBASE_QUOTE = (_C_SYMBOL, _C_PRICE, _C_QTY), (_C_SYMBOL, _C_BID, _C_BID_QTY, _C_ASK, _C_ASK_QTY)
_L2UPDATE, _MATCH, _TICKER = (_word(w) for w in ("l2update", "match", "ticker"))


@outlined
def _coinbase(buf: Any, hot: Any, n: Any, recv: Any, source: Any, entries: Any) -> Any:
    found, entry = hot.found, _I(0)
    kind, time = span_of(found, entry, _C_TYPE), iso_time_ns(buf, span_of(found, entry, _C_TIME))
    if time < 0:
        return n, UNUSUAL
    if _is(buf, kind, _MATCH, 5):
        side, number = span_of(found, entry, _C_SIDE), whole(buf, span_of(found, entry, _C_NUMBER), NUMBER)
        is_buy = _is(buf, side, _SELL, 4)  # the maker's
        if not is_buy and not _is(buf, side, _BUY, 3):
            return n, UNUSUAL
        made = _put_trade(buf, hot, n, entry, source, _COINBASE_TRADE, number, time, recv, _I(BID if is_buy else ASK), TEXT)
        return _result(hot, n, made, TRADES)
    if _is(buf, kind, _TICKER, 6):
        number = whole(buf, span_of(found, entry, _C_SEQUENCE), NUMBER)
        return _result(hot, n, _put_quote(buf, hot, n, entry, source, _COINBASE_QUOTE, number, time, recv), TICKERS)
    instrument, changes = _instrument(buf, span_of(found, entry, _C_SYMBOL), hot, source), span_of(found, entry, _C_CHANGES)
    if not _is(buf, kind, _L2UPDATE, 8) or instrument < 0:
        return n, UNUSUAL
    book, nothing = hot.books[_U(instrument)], hot.spare[0]
    if book.has_book == 0 or not _scale_rows(hot, changes, _I(NO_SIDE), book.exponent):
        return n, UNUSUAL
    nothing.at, nothing.size = 0, 0
    made = _put_rows(hot, n, changes, nothing, _I(0), time, recv, instrument)
    if made >= 0:
        _apply(hot, book, _I(0))
    return _result(hot, n, made, BOOK_MESSAGES)


# ---------------------------------------------------------------- Kraken Futures

_F_EVENT, _F_FEED, _F_SYMBOL, _F_SIDE, _F_LAST, _F_PRICE, _F_QTY, _F_TIME = range(8)
_FUTURES_SHAPE: list[dict[str, int | Under]] = [
    {
        "feed": _F_FEED, "product_id": _F_SYMBOL, "side": _F_SIDE, "seq": _F_LAST, "price": _F_PRICE, "qty": _F_QTY, "timestamp": _F_TIME,
        "event": _F_EVENT,
    }
]  # fmt: skip
_BOOK_WORD = _word("book")


@outlined
def _kraken_futures(buf: Any, hot: Any, n: Any, recv: Any, source: Any, entries: Any) -> Any:
    found, entry = hot.found, _I(0)
    last, time = whole(buf, span_of(found, entry, _F_LAST), NUMBER), _milliseconds(buf, span_of(found, entry, _F_TIME), NUMBER)
    instrument, side = _instrument(buf, span_of(found, entry, _F_SYMBOL), hot, source), span_of(found, entry, _F_SIDE)
    is_buy = _is(buf, side, _BUY, 3)
    if not _is(buf, span_of(found, entry, _F_FEED), _BOOK_WORD, 4) or span_of(found, entry, _F_EVENT).type != ABSENT:
        return n, UNUSUAL
    if instrument < 0 or time < 0 or last < 0 or (not is_buy and not _is(buf, side, _SELL, 4)) or n == hot.out.size:
        return n, UNUSUAL
    book = hot.books[_U(instrument)]
    price = fixed(buf, span_of(found, entry, _F_PRICE), NUMBER, _I(PRICE_DECIMALS))
    qty = fixed(buf, span_of(found, entry, _F_QTY), NUMBER, book.exponent)
    if book.has_book == 0 or last != book.last_id + 1 or price <= 0 or qty < 0:
        return n, UNUSUAL
    _apply(hot, book, last)
    side_number = _I(BID if is_buy else ASK)
    made = _put(hot.out, n, last, time, recv, instrument, _LEVEL, side_number, np.uint16(0), price, qty, _U(0), _I(0))
    return _result(hot, n, made, BOOK_MESSAGES)


# ---------------------------------------------------------------- Kraken, spot

_S_CHANNEL, _S_TYPE, _S_DATA, _S_SYMBOL, _S_BIDS, _S_ASKS, _S_SUM, _S_TIME, _S_SIDE, _S_PRICE, _S_QTY, _S_NUMBER, _S_METHOD = range(13)
_SPOT_SHAPE: list[dict[str, int | Under]] = [
    {"channel": _S_CHANNEL, "type": _S_TYPE, "data": Under(_S_DATA, target=1), "method": _S_METHOD},
    {
        "symbol": _S_SYMBOL, "bids": Under(_S_BIDS, columns=()), "asks": Under(_S_ASKS, columns=()), "checksum": _S_SUM,
        "timestamp": _S_TIME, "side": _S_SIDE, "price": _S_PRICE, "qty": _S_QTY, "ord_type": -1, "trade_id": _S_NUMBER,
    },
]  # fmt: skip
_SPOT_TRADE = (_S_SYMBOL, _S_PRICE, _S_QTY)


@outlined
def _kraken_spot(buf: Any, hot: Any, n: Any, recv: Any, source: Any, entries: Any) -> Any:
    found = hot.found
    channel, data = span_of(found, _I(0), _S_CHANNEL), span_of(found, _I(0), _S_DATA)
    is_update = _is(buf, span_of(found, _I(0), _S_TYPE), _UPDATE_WORD, 6)
    if not is_update or data.type != LIST or span_of(found, _I(0), _S_METHOD).type != ABSENT:
        return n, UNUSUAL
    if _is(buf, channel, _BOOK_WORD, 4) and data.size == 1:
        return _kraken_book(buf, hot, n, recv, source, data.at)
    if not _is(buf, channel, _TRADE_WORD, 5):
        return n, UNUSUAL
    made = n
    for entry in range(data.at, data.at + data.size):
        side, number = span_of(found, entry, _S_SIDE), whole(buf, span_of(found, entry, _S_NUMBER), NUMBER)
        is_buy, time = _is(buf, side, _BUY, 3), iso_time_ns(buf, span_of(found, entry, _S_TIME))
        if not is_buy and not _is(buf, side, _SELL, 4):
            return n, UNUSUAL
        made = _put_trade(buf, hot, made, entry, source, _SPOT_TRADE, number, time, recv, _I(BID if is_buy else ASK), NUMBER)
        if made < 0:
            return n, UNUSUAL
    return _result(hot, n, made, TRADES)


@outlined
def _kraken_book(buf: Any, hot: Any, n: Any, recv: Any, source: Any, entry: Any) -> Any:
    found = hot.found
    told, time = whole(buf, span_of(found, entry, _S_SUM), NUMBER), iso_time_ns(buf, span_of(found, entry, _S_TIME))
    instrument = _instrument(buf, span_of(found, entry, _S_SYMBOL), hot, source)
    if instrument < 0 or time < 0 or told < 0:
        return n, UNUSUAL
    book, bids, asks = hot.books[_U(instrument)], span_of(found, entry, _S_BIDS), span_of(found, entry, _S_ASKS)
    if book.has_book == 0 or book.ladder < 0:
        return n, UNUSUAL
    if not (_scale_rows(hot, bids, _I(BID), book.exponent) and _scale_rows(hot, asks, _I(ASK), book.exponent)):
        return n, UNUSUAL
    room = n + 2 * (bids.size + asks.size) <= hot.out.size and bids.size + asks.size > 0  # each may push another one out
    made = _put_rows(hot, n, bids, asks, _I(0), time, recv, instrument) if room and _fits(hot, book, bids, asks) else _I(-1)
    if made < 0:
        return n, UNUSUAL
    _set_rows(buf, hot, book, bids, asks)
    made = _put_fallen(hot, made, book, _I(BID), time, recv, instrument)
    made = _put_fallen(hot, made, book, _I(ASK), time, recv, instrument)
    _apply(hot, book, _I(0))
    hot.counts[BOOK_MESSAGES] += 1
    return made, _checked(hot, instrument, time, checksum(hot.ladders, book.ladder, KRAKEN) == told)


@outlined
def _put_fallen(hot: Any, n: Any, book: Any, side: Any, time: Any, recv: Any, instrument: Any) -> Any:
    """Remove the levels that a book has not room for any more, by a LEVEL event each (behind those of the message); returns the new n."""
    while n < hot.out.size:
        price = worst_beyond(hot.ladders, book.ladder, side, book.depth)
        if price == 0:
            break
        hot.out[_U(n - 1)].flags |= _MORE
        n = _put(hot.out, n, _U(0), time, recv, instrument, _LEVEL, side, np.uint16(0), price, _I(0), _U(0), _I(0))
    return n


# ---------------------------------------------------------------- messages in a row

SHAPES = [make_shape(objects) for objects in (_BINANCE_SHAPE, _OKX_SHAPE, _BYBIT_SHAPE, _COINBASE_SHAPE, _FUTURES_SHAPE, _SPOT_SHAPE)]  # type: ignore[arg-type]
"""The :data:`~tickmesh.node.json_text.Shape` of each venue."""


@inlined
def _message(buf: Any, p: Any, end: Any, recv: Any, venue: Any, source: Any, hot: Any, n: Any) -> Any:
    entries = scan(buf, p, end, hot.shape, hot.found, hot.spare)
    if entries == 0:
        return n, UNUSUAL
    if venue == BINANCE:
        return _binance(buf, hot, n, recv, source, entries)
    if venue == OKX_V5:
        return _okx(buf, hot, n, recv, source, entries)
    if venue == BYBIT:
        return _bybit(buf, hot, n, recv, source, entries)
    if venue == COINBASE:
        return _coinbase(buf, hot, n, recv, source, entries)
    if venue == KRAKEN_FUTURES:
        return _kraken_futures(buf, hot, n, recv, source, entries)
    return _kraken_spot(buf, hot, n, recv, source, entries)


@loop
def decode_messages(
    buf: Any, ends: Any, times: Any, sequences: Any, first: Any, venue: Any, source: Any, hot: Any, n: Any, enough: Any
) -> Any:  # fmt: skip
    """Decode messages that lie behind each other with one byte (below 32) between them, from number `first` on.

    Args:
        buf: u8, with 64 readable bytes behind.
        ends: i64, where each ends.
        times: i64, of their receipt, ns.
        sequences: u64, for the events of each; 0: the venue's own.
        enough: stop once so many events are in ``hot.out``.

    Returns:
        ``(number of messages done, new n, what stopped it)``: UNUSUAL: the next is for Python; BAD_CHECKSUM: the last of those done has
        one; DONE: neither.
    """
    for k in range(first, ends.size):
        if n >= enough:
            return k, n, DONE
        begin, before = ends[_U(k - 1)] + 1 if k else _I(0), n
        n, found = _message(buf, begin, ends[_U(k)], times[_U(k)], venue, source, hot, n)
        if found == UNUSUAL:
            return k, n, found
        hot.counts[COMPILED] += 1
        if sequences[_U(k)] != _U(0):
            for event in range(before, n):
                hot.out[_U(event)].seq = sequences[_U(k)]
        if found == BAD_CHECKSUM:
            return k + 1, n, found
    return _I(ends.size), n, DONE


def make_hot(table: InstrumentTable, venue: int, books: Any, ladders: Any, out: Any) -> Any:
    """State for :func:`decode_messages`; `books` BOOK[capacity of the table]."""
    return Hot(books, table.arrays, SHAPES[venue], make_found(), np.zeros(1, SPAN), ladders, np.zeros(_COUNTS, np.int64), out)


def warm() -> None:
    """Call the entry point once, so that it is compiled."""
    hot, nothing = make_hot(InstrumentTable(1), BINANCE, np.zeros(1, BOOK), make_ladders(1), np.zeros(1, EVENT)), np.zeros(0, np.int64)
    decode_messages(np.zeros(64, np.uint8), nothing, nothing, np.zeros(0, np.uint64), 0, BINANCE, np.uint32(0), hot, 0, 1)
