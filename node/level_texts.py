"""A book's levels with the venue's own texts, as decoders in Python set them (:mod:`tickmesh.node.json_ladder` has the memory)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tickmesh.node.event import BID
from tickmesh.node.json_compiled import CompiledDecoder
from tickmesh.node.json_feed import Level, Listing, Update
from tickmesh.node.json_ladder import beyond_depth, book_checksum, set_levels
from tickmesh.node.json_text import ROW
from tickmesh.transports.recording import SLACK


class LevelTexts:
    """The books of one feed."""

    def __init__(self, decoder: CompiledDecoder) -> None:
        self._decoder = decoder

    def set(self, listing: Listing, update: Update, bids: Sequence[Any], asks: Sequence[Any], *, anew: bool = False) -> bool:
        """Change the levels of a book as an update says, or make it `anew`.

        Args:
            bids, asks: the venue's entries, price and quantity as text first; `update.levels` in the same order.

        Returns:
            False: a side has more levels than there is room for, or a text is too long; the book is of no use any more.
        """
        book = listing.book
        if book["ladder"] < 0:
            book["ladder"] = self._decoder.new_ladder()
        rows, text = [], bytearray()
        for level, (price, qty, *_) in zip(update.levels, (*bids, *asks), strict=True):
            at = len(text)
            text += f"{price}{qty}".encode()
            rows.append((level.price, 0, level.qty, 0, level.orders, level.side, at, len(price), at + len(price), len(qty)))
        buffer = np.frombuffer(text + bytes(SLACK), np.uint8)
        found = set_levels(self._decoder.ladders, int(book["ladder"]), np.array(rows, ROW), buffer, anew)
        return int(found) == len(rows)

    def checksum(self, listing: Listing, whose: int) -> int:
        """The venue's checksum of a book."""
        return int(book_checksum(self._decoder.ladders, int(listing.book["ladder"]), whose))

    def fallen(self, listing: Listing, depth: int) -> list[Level]:
        """Take out what lies beyond `depth` levels of a side: removals, worst first."""
        found = []
        for side in (BID, 1 - BID):
            while price := int(beyond_depth(self._decoder.ladders, int(listing.book["ladder"]), side, depth)):
                found.append(Level(side, price, 0, 0))
        return found
