"""Venues that are built in: which decoder reads their JSON, how to subscribe, how to get a book's snapshot again, and how to say ping.

A subscription is what ``channels`` (book, trade, quote) and ``symbols`` of the source ask for, in the venue's words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tickmesh.control.config import Source
from tickmesh.node.coinbase_feed import CoinbaseFeed
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.json_feed import BinanceFeed, BybitFeed, MappedFeed, VenueFeed
from tickmesh.node.kraken_feed import KrakenFuturesFeed, KrakenSpotFeed
from tickmesh.node.okx_feed import OkxFeed
from tickmesh.transports.codecache import load_compiled

VENUE_FEEDS: dict[str, type[VenueFeed]] = {
    feed.venue: feed for feed in (BinanceFeed, BybitFeed, CoinbaseFeed, KrakenFuturesFeed, KrakenSpotFeed, MappedFeed, OkxFeed)
}
"""Decoders by the name that `data_format` gives them."""
_KRAKEN_DEPTH = 100
"""Levels of a side of a Kraken spot book that is subscribed to by the venue's own messages."""
BINANCE_SNAPSHOT = "https://api.binance.com/api/v3/depth?symbol={symbol}&limit=1000"


def venue_feed(
    options: Source, table: InstrumentTable, source: int = 0, shard: Callable[[str], int | None] | None = None
) -> VenueFeed:  # fmt: skip
    """The decoder of a source whose `data_format` is a venue's name or "json".

    Raises:
        KeyError: no venue has this name.
        MappingError: the field mapping of a "json" source cannot work.
    """
    return VENUE_FEEDS[options.data_format or ""](options, table, source, shard)


def compiled_feed(
    options: Source, table: InstrumentTable, source: int = 0, progress: Callable[[str], None] | None = None
) -> VenueFeed:  # fmt: skip
    """As :func:`venue_feed`; what is compiled of it is compiled first, in a helper process, if it is not in the cache.

    Raises:
        KeyError, MappingError: as there.
    """
    if VENUE_FEEDS[options.data_format or ""].compiled is not None:
        load_compiled("tickmesh.node.json_ladder", "books with checksums", progress)
        load_compiled("tickmesh.node.json_kernels", "JSON decoders", progress)
    return venue_feed(options, table, source)


# ---------------------------------------------------------------- subscribing

Channels = Sequence[str]
Symbols = Sequence[str]


@dataclass(frozen=True)
class Talk:
    """What a venue's websocket wants to hear.

    Attributes:
        subscribe, unsubscribe: the messages for channels and symbols.
        ping: a text to send as often as `heartbeat_ms` says, where the websocket's own ping is not enough.
        pong: its answer, where that is not JSON.
        snapshot: address of a book's snapshot, where it does not come with the subscription.
    """

    subscribe: Callable[[Channels, Symbols], list[str]]
    unsubscribe: Callable[[Channels, Symbols], list[str]]
    ping: str = ""
    pong: bytes = b""
    snapshot: str = ""


def _text(message: dict[str, Any]) -> str:
    return json.dumps(message, separators=(",", ":"))


def _binance(method: str) -> Callable[[Channels, Symbols], list[str]]:
    streams = {"book": "depth@100ms", "trade": "trade", "quote": "bookTicker"}

    def messages(channels: Channels, symbols: Symbols) -> list[str]:
        wanted = [f"{symbol.lower()}@{streams[channel]}" for symbol in symbols for channel in channels]
        pieces = [wanted[i : i + 200] for i in range(0, len(wanted), 200)]  # a message may hold so many
        return [_text({"method": method, "params": piece, "id": number + 1}) for number, piece in enumerate(pieces)]

    return messages


def _okx(op: str) -> Callable[[Channels, Symbols], list[str]]:
    names = {"book": "books", "trade": "trades", "quote": "tickers"}

    def messages(channels: Channels, symbols: Symbols) -> list[str]:
        args = [{"channel": names[channel], "instId": symbol} for symbol in symbols for channel in channels]
        return [_text({"op": op, "args": args[i : i + 100]}) for i in range(0, len(args), 100)]

    return messages


def _bybit(op: str) -> Callable[[Channels, Symbols], list[str]]:
    names = {"book": "orderbook.50.", "trade": "publicTrade.", "quote": "tickers."}

    def messages(channels: Channels, symbols: Symbols) -> list[str]:
        args = [names[channel] + symbol for symbol in symbols for channel in channels]
        return [_text({"op": op, "args": args[i : i + 10]}) for i in range(0, len(args), 10)]

    return messages


def _coinbase(kind: str) -> Callable[[Channels, Symbols], list[str]]:
    names = {"book": "level2_batch", "trade": "matches", "quote": "ticker"}
    return lambda channels, symbols: [
        _text({"type": kind, "product_ids": list(symbols), "channels": [names[channel] for channel in channels]})
    ]


def _kraken_futures(event: str) -> Callable[[Channels, Symbols], list[str]]:
    names = {"book": "book", "trade": "trade", "quote": "ticker"}
    return lambda channels, symbols: [_text({"event": event, "feed": names[channel], "product_ids": list(symbols)}) for channel in channels]


def _kraken(method: str) -> Callable[[Channels, Symbols], list[str]]:
    books = {"channel": "book", "depth": _KRAKEN_DEPTH}
    params: dict[str, dict[str, Any]] = {
        "book": books,
        "trade": {"channel": "trade", "snapshot": False},
        "quote": {"channel": "ticker", "event_trigger": "bbo"},
    }
    return lambda channels, symbols: [
        _text({"method": method, "params": {**params[channel], "symbol": list(symbols)}}) for channel in channels
    ]


TALKS: dict[str, Talk] = {
    "binance": Talk(_binance("SUBSCRIBE"), _binance("UNSUBSCRIBE"), snapshot=BINANCE_SNAPSHOT),
    "okx": Talk(_okx("subscribe"), _okx("unsubscribe"), ping="ping", pong=b"pong"),
    "bybit": Talk(_bybit("subscribe"), _bybit("unsubscribe"), ping='{"op":"ping"}'),
    "coinbase": Talk(_coinbase("subscribe"), _coinbase("unsubscribe")),
    "kraken": Talk(_kraken("subscribe"), _kraken("unsubscribe"), ping='{"method":"ping"}'),
    "kraken_futures": Talk(_kraken_futures("subscribe"), _kraken_futures("unsubscribe")),
}
"""Venues that a websocket source can subscribe at by itself."""


def unsubscribable(symbols: Symbols) -> list[str]:
    """Those of `symbols` that are globs, and no names to subscribe to."""
    return [symbol for symbol in symbols if "*" in symbol or "?" in symbol]


def book_again(messages: Sequence[str], symbol: str) -> list[str]:
    """Messages that leave a symbol's book and subscribe to it again, in the words of a user's own subscriptions: with the same depth."""
    leave, join = [], []
    for text in messages:
        try:
            message = json.loads(text)
        except ValueError:
            continue  # the venue's to understand
        verbs = ("op", "type", "event", "method") if isinstance(message, dict) else ()
        verb = next((key for key in verbs if message.get(key) == "subscribe"), None)
        found = _of_book(message, symbol) if verb is not None else None
        if verb is not None and found is not None:
            leave.append(_text({**found, verb: "unsubscribe"}))
            join.append(_text(found))
    return leave + join


def _of_book(message: dict[str, Any], symbol: str) -> dict[str, Any] | None:
    """A subscription narrowed to a symbol's book; None: it has none."""
    params = message.get("params")
    if isinstance(params, dict) and params.get("channel") == "book":  # Kraken, spot
        symbols = params.get("symbol")
        return {**message, "params": {**params, "symbol": [symbol]}} if isinstance(symbols, list) and symbol in symbols else None
    if isinstance(args := message.get("args"), list):  # OKX, Bybit
        kept = [arg for arg in args if _is_book(arg, symbol)]
        return {**message, "args": kept} if kept else None
    products, channels = message.get("product_ids"), message.get("channels")
    if isinstance(channels, list):  # Coinbase: a channel may have products of its own
        books = [channel for channel in channels if str(channel["name"] if isinstance(channel, dict) else channel).startswith("level2")]
        books = [c for c in books if symbol in (c.get("product_ids", products or []) if isinstance(c, dict) else products or [])]
        names = [c["name"] if isinstance(c, dict) else c for c in books]
        return {**message, "product_ids": [symbol], "channels": names} if names else None
    if message.get("feed") == "book" and isinstance(products, list) and symbol in products:  # Kraken
        return {**message, "product_ids": [symbol]}
    return None


def _is_book(arg: Any, symbol: str) -> bool:
    if isinstance(arg, dict):
        return arg.get("instId") == symbol and str(arg.get("channel")).startswith("books")
    return isinstance(arg, str) and arg.startswith("orderbook.") and arg.endswith(f".{symbol}")
