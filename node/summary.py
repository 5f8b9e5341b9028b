"""The summary of a replay: what was read, what came out, and the final state of every instrument, as exact JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tickmesh.node.book import Refusal, top
from tickmesh.node.event import NO_PRICE, Kind, decimal_text, price_text
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
    ``symbol@source`` for the second one. `malformed` counts what the decoder could not read, `refused` the events that it could read
    but that no book takes: an order that was never added, a quantity above the order's, a price without a place. `events` counts by kind
    what went in, refused ones too (an execution is an `execute`, a `trade` is one that the venue reported as such), and what was made of
    it (`bbo`, `signal`, ...), also kinds that `processing.outputs` keeps back, but no silent signal.
    """
    shards = list(shards)
    described: dict[str, Any] = {}
    for shard in shards:
        for instrument in shard.seen_instruments():
            name = instruments.symbol(instrument)
            if name in described:
                name = f"{name}@{int(shard.arrays.info[instrument]['source'])}"
            described[name] = describe_instrument(shard, instrument, depth)
    return {
        "source": dict(source),
        "messages": dict(messages),
        "malformed": {reason: count for reason, count in malformed.items() if count},
        "refused": refused_events(shards),
        "gaps": [{"first": int(first), "last": int(last)} for first, last in gaps],
        "duplicates": int(duplicates),
        "events": count_events(shards),
        "instruments": described,
    }


def count_events(shards: Iterable[Shard]) -> dict[str, int]:
    """Counts by kind over all shards."""
    found: dict[str, int] = {}
    for number, shard in enumerate(shards):
        for kind, count in shard.event_counts().items():
            if Kind[kind.upper()] != Kind.TIMER or number == 0:  # each of them goes to every shard
                found[kind] = found.get(kind, 0) + count
    return found


def refused_events(shards: Iterable[Shard]) -> dict[str, int]:
    """Events that the books refused, by reason."""
    found: dict[str, int] = {}
    for shard in shards:
        by_reason = {reason.name.lower(): int(shard.arrays.books.counters[reason]) for reason in Refusal}
        elsewhere = int(shard.arrays.core[0]["refused"]) - sum(by_reason.values())
        by_reason["unknown_instrument"] += max(0, elsewhere)  # trades and definitions do not go through a book
        for reason, count in by_reason.items():
            if count:
                found[reason] = found.get(reason, 0) + count
    return found


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
