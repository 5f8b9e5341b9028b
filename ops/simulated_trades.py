"""The trades of a simulated market, read from its ITCH 5.0 messages: what a feed has to tell that keeps no orders, such as FIX.

An execution (E) has no price of its own but its order's, so the resting orders are followed. That is done in Python, message by message:
some hundred thousand a second. Layouts: NQTVITCHSpecification 5.0, chapter 4, behind the two bytes of the BinaryFILE frame.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from tickmesh.ops.simulator import Bytes

_FRAME_BYTES = 2
_ORDER = struct.Struct(">QcI8sI").unpack_from
_EXECUTED = struct.Struct(">QIQ").unpack_from
_PRICED = struct.Struct(">QIQcI").unpack_from
_REPLACED = struct.Struct(">QQII").unpack_from
_REDUCED = struct.Struct(">QI").unpack_from
_TRADE = struct.Struct(">QcI8sIQ").unpack_from
_CROSS = struct.Struct(">Q8sIQ").unpack_from
_NUMBER = struct.Struct(">Q").unpack_from
_BODY = 11
"""Where a message's own fields begin."""


class Print(NamedTuple):
    """A trade, or the end of one.

    Attributes:
        locate: the instrument's number, from 1.
        match: the trade's number.
        price: in 1e-4; 0 of a broken one.
        qty: in shares; 0: trade `match` is broken, and never happened.
    """

    locate: int
    match: int
    price: int
    qty: int


class TradeTape:
    """Follows a market's messages from their first on."""

    def __init__(self) -> None:
        self._orders: dict[int, list[int]] = {}
        """Reference of a resting order -> price, shares."""
        self._prints: list[Print] = []
        self._readers: dict[int, Callable[[bytes, int], None]] = {
            ord(kind): reader
            for kinds, reader in (
                ("AF", self._add), ("E", self._executed), ("C", self._priced), ("X", self._reduced), ("D", self._deleted),
                ("U", self._replaced), ("P", self._trade), ("Q", self._cross), ("B", self._broken),
            )
            for kind in kinds
        }  # fmt: skip

    @property
    def resting(self) -> int:
        """How many orders are followed."""
        return len(self._orders)

    def read(self, image: Bytes) -> list[Print]:
        """What the next messages print, in order; `image` holds them in whole BinaryFILE frames."""
        self._prints = []
        data, at = image.tobytes(), 0
        while at < len(data):
            reader = self._readers.get(data[at + _FRAME_BYTES])
            if reader is not None:
                reader(data, at + _FRAME_BYTES)
            at += _FRAME_BYTES + int.from_bytes(data[at : at + _FRAME_BYTES], "big")
        return self._prints

    def _print(self, data: bytes, at: int, match: int, price: int, qty: int) -> None:
        self._prints.append(Print(int.from_bytes(data[at + 1 : at + 3], "big"), match, price, qty))

    def _cut(self, ref: int, shares: int) -> int:
        """Take shares off an order; returns its price."""
        order = self._orders[ref]
        order[1] -= shares
        if order[1] <= 0:
            del self._orders[ref]
        return order[0]

    def _add(self, data: bytes, at: int) -> None:
        ref, _, shares, _, price = _ORDER(data, at + _BODY)
        self._orders[ref] = [price, shares]

    def _executed(self, data: bytes, at: int) -> None:
        ref, shares, match = _EXECUTED(data, at + _BODY)
        self._print(data, at, match, self._cut(ref, shares), shares)

    def _priced(self, data: bytes, at: int) -> None:
        ref, shares, match, printable, price = _PRICED(data, at + _BODY)
        self._cut(ref, shares)
        if printable == b"Y":
            self._print(data, at, match, price, shares)

    def _reduced(self, data: bytes, at: int) -> None:
        self._cut(*_REDUCED(data, at + _BODY))

    def _deleted(self, data: bytes, at: int) -> None:
        del self._orders[_NUMBER(data, at + _BODY)[0]]

    def _replaced(self, data: bytes, at: int) -> None:
        previous, ref, shares, price = _REPLACED(data, at + _BODY)
        del self._orders[previous]
        self._orders[ref] = [price, shares]

    def _trade(self, data: bytes, at: int) -> None:
        _, _, shares, _, price, match = _TRADE(data, at + _BODY)
        self._print(data, at, match, price, shares)

    def _cross(self, data: bytes, at: int) -> None:
        shares, _, price, match = _CROSS(data, at + _BODY)
        if shares:
            self._print(data, at, match, price, shares)

    def _broken(self, data: bytes, at: int) -> None:
        self._print(data, at, _NUMBER(data, at + _BODY)[0], 0, 0)
