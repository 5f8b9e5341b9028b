"""The summary of a replay: what was read, what came out, and the final state of every instrument, as exact JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tickmesh.node.book import top
from tickmesh.node.event import NO_PRICE, decimal_text, price_text
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.shard import Shard


def summarise(
    *,
    source: Mapping[str, Any],
    messages: Mapping[str, int],
    malformed: Mapping[str, int],
    gaps: Iterable[tuple[int, int]],
    duplicates: int,
    shards: Iterable[Shard],
    instruments: InstrumentTable,
    depth: int = 10,
) -> dict[str, Any]:
    """The replay contract: a JSON-ready dictionary.

    Prices and quantities are exact decimal strings, an absent side is null, a symbol that two sources share is written
    ``symbol@source`` for the second one.
    """
    shards = list(shards)
    events: dict[str, int] = {}
    described: dict[str, Any] = {}
    for shard in shards:
        for kind, count in shard.event_counts().items():
            events[kind] = events.get(kind, 0) + count
        for instrument in shard.seen_instruments():
            name = instruments.symbol(instrument)
            if name in described:
                name = f"{name}@{int(shard.arrays.info[instrument]['source'])}"
            described[name] = describe_instrument(shard, instrument, depth)
    return {
        "source": dict(source),
        "messages": dict(messages),
        "malformed": {reason: count for reason, count in malformed.items() if count},
        "gaps": [{"first": int(first), "last": int(last)} for first, last in gaps],
        "duplicates": int(duplicates),
        "events": events,
        "instruments": described,
    }


def describe_instrument(shard: Shard, instrument: int, depth: int) -> dict[str, Any]:
    """Trades, best prices, depth and signals of one instrument."""
    statistics = shard.arrays.statistics[instrument]
    exponent = int(shard.arrays.info[instrument]["exponent"])
    volume = int(statistics["volume"])
    bids, asks = top(shard.arrays.books, instrument, depth)
    return {
        "trades": int(statistics["trades"]),
        "volume": quantity_text(volume, exponent),
        "vwap": float(statistics["notional"]) / volume if volume else None,
        "first_bbo": _bbo(statistics["first_bbo"], exponent) if statistics["bbo_updates"] else None,
        "last_bbo": _bbo(statistics["last_bbo"], exponent) if statistics["bbo_updates"] else None,
        "bids": [[price_text(price), quantity_text(qty, exponent), orders] for price, qty, orders in bids],
        "asks": [[price_text(price), quantity_text(qty, exponent), orders] for price, qty, orders in asks],
        "signals": shard.last_signals(instrument),
    }


def quantity_text(qty: int, exponent: int) -> str:
    """A quantity in an instrument's exponent as exact decimal text; a negative exponent means lots of ten, hundred, …"""
    return decimal_text(int(qty), exponent) if exponent >= 0 else str(int(qty) * 10**-exponent)


def _bbo(row: Any, exponent: int) -> list[str | None]:
    bid, bid_qty, ask, ask_qty = (int(value) for value in row)
    return [
        price_text(bid),
        None if bid == NO_PRICE else quantity_text(bid_qty, exponent),
        price_text(ask),
        None if ask == NO_PRICE else quantity_text(ask_qty, exponent),
    ]
