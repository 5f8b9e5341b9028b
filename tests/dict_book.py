"""The simplest book by level there is: what the tests of Python decoders compare against the venue's own word."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from tickmesh.node.event import ASK, BID, EventArray, Flag, Kind

Row = tuple[int, int, int, int, int, int, int]
"""instrument, kind, side, flags, price, qty, seq of an event, as plain integers."""


def rows_of(events: EventArray) -> Iterator[Row]:
    """The fields of events that books need, fast to loop over."""
    return zip(*(events[name].tolist() for name in ("instrument", "kind", "side", "flags", "price", "qty", "seq")))


class DictBook:
    """Levels of one instrument: ``sides[side][price] = qty``; stale after a GAP, until a CLEAR."""

    def __init__(self) -> None:
        self.sides: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self._prices: tuple[list[int], list[int]] = ([], [])
        self.stale = False

    def apply(self, row: Row) -> bool:
        """Apply an event; true if the book is complete afterwards (no MORE)."""
        _, kind, side, flags, price, qty, _ = row
        if kind == Kind.CLEAR:
            for cleared in (BID, ASK):
                if side in (cleared, 2):
                    self.sides[cleared].clear()
                    self._prices[cleared].clear()
            self.stale = False
        elif kind == Kind.GAP:
            self.stale = True
        elif kind == Kind.LEVEL:
            self._set(side, price, qty)
        return not flags & Flag.MORE

    def _set(self, side: int, price: int, qty: int) -> None:
        levels, prices = self.sides[side], self._prices[side]
        at = bisect_left(prices, price)
        if qty:
            if price not in levels:
                prices.insert(at, price)
            levels[price] = qty
        elif price in levels:
            del levels[price], prices[at]

    def best(self, side: int) -> tuple[int, int]:
        """Best price and quantity."""
        price = self._prices[side][-1 if side == BID else 0]
        return price, self.sides[side][price]

    def top(self, side: int, count: int) -> list[tuple[int, int]]:
        """Best levels, best first."""
        prices = self._prices[side][::-1] if side == BID else self._prices[side]
        return [(price, self.sides[side][price]) for price in prices[:count]]


def books_of(events: EventArray) -> dict[int, DictBook]:
    """Books by instrument after some events."""
    books: dict[int, DictBook] = {}
    for row in rows_of(events):
        books.setdefault(row[0], DictBook()).apply(row)
    return books
