"""Nasdaq TotalView-ITCH 5.0 encoder, compiled: one kernel per message type.

Every kernel writes one BinaryFILE frame (u16 length, then the message; the same block that MoldUDP64 carries) at ``buf[pos:]`` and returns
the position after it. Layouts: NQTVITCHSpecification 5.0, chapter 4. All integers big-endian; prices are u32 in 1e-4 (u64 in 1e-8 for V);
``when`` is nanoseconds since midnight, 48 bits; ``stock`` is the 8 space-padded ASCII bytes read as a little-endian u64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tickmesh.transports.toolbox import inlined, outlined, put_be16, put_be32, put_be64, put_le32, put_le64

MESSAGE_BYTES: dict[str, int] = {
    "S": 12, "R": 39, "H": 25, "Y": 20, "L": 26, "V": 35, "J": 35, "A": 36, "F": 40, "E": 31, "C": 36, "X": 23, "D": 19, "U": 35,
    "P": 44, "Q": 40, "B": 19, "I": 50, "N": 20,
}  # fmt: skip
"""Length of each message type that is written here, without the two bytes of the frame."""
FRAME_BYTES_MAX = 52
_LENGTHS = np.array([MESSAGE_BYTES.get(chr(code), 0) for code in range(128)], np.uint16)


@inlined
def _frame(buf: Any, pos: Any, kind: Any, locate: Any, tracking: Any, when: Any) -> Any:
    """The frame's length and the eleven bytes every message starts with; returns where the message's own fields begin."""
    put_be16(buf, pos, _LENGTHS[kind])
    buf[pos + 2] = kind
    put_be16(buf, pos + 3, locate)
    put_be16(buf, pos + 5, tracking)
    put_be16(buf, pos + 7, when >> 32)
    put_be32(buf, pos + 9, when & 0xFFFFFFFF)
    return pos + 13


@outlined
def put_system(buf: Any, pos: Any, tracking: Any, when: Any, code: Any) -> Any:
    """S: `code` is one of O, S, Q, M, E, C."""
    at = _frame(buf, pos, ord("S"), np.int64(0), tracking, when)
    buf[at] = code
    return at + 1


@outlined
def put_directory(buf: Any, pos: Any, locate: Any, tracking: Any, when: Any, stock: Any, category: Any, tier: Any) -> Any:
    """R: a common stock, production, round lot 100; `category` is the market (Q, G, S), `tier` the limit-up/limit-down tier."""
    at = _frame(buf, pos, ord("R"), locate, tracking, when)
    put_le64(buf, at, stock)
    buf[at + 8], buf[at + 9] = category, ord("N")
    put_be32(buf, at + 10, 100)
    buf[at + 14], buf[at + 15], buf[at + 16], buf[at + 17] = ord("N"), ord("C"), ord("Z"), ord(" ")
    buf[at + 18], buf[at + 19], buf[at + 20], buf[at + 21], buf[at + 22] = ord("P"), ord("N"), ord("N"), tier, ord("N")
    put_be32(buf, at + 23, 0)
    buf[at + 27] = ord("N")
    return at + 28


@outlined
def put_trading_action(buf: Any, pos: Any, locate: Any, tracking: Any, when: Any, stock: Any, state: Any, reason: Any) -> Any:
    """H: `state` is H, P, Q or T; `reason` is four ASCII bytes read as a little-endian u32."""
    at = _frame(buf, pos, ord("H"), locate, tracking, when)
    put_le64(buf, at, stock)
    buf[at + 8], buf[at + 9] = state, ord(" ")
    put_le32(buf, at + 10, reason)
    return at + 14


@outlined
def put_short_sale(buf: Any, pos: Any, locate: Any, tracking: Any, when: Any, stock: Any, action: Any) -> Any:
    """Y: Reg SHO restriction, `action` is 0, 1 or 2."""
    at = _frame(buf, pos, ord("Y"), locate, tracking, when)
    put_le64(buf, at, stock)
    buf[at + 8] = action
    return at + 9


@outlined
def put_participant(buf: Any, pos: Any, locate: Any, tracking: Any, when: Any, mpid: Any, stock: Any, primary: Any) -> Any:
    """L: an active market maker in normal mode; `primary` is Y or N."""
    at = _frame(buf, pos, ord("L"), locate, tracking, when)
    put_le32(buf, at, mpid)
    put_le64(buf, at + 4, stock)
    buf[at + 12], buf[at + 13], buf[at + 14] = primary, ord("N"), ord("A")
    return at + 15


@outlined
def put_decline_levels(buf: Any, pos: Any, tracking: Any, when: Any, first: Any, second: Any, third: Any) -> Any:
    """V: market-wide circuit breaker levels, in 1e-8."""
    at = _frame(buf, pos, ord("V"), np.int64(0), tracking, when)
    put_be64(buf, at, first)
    put_be64(buf, at + 8, second)
    put_be64(buf, at + 16, third)
    return at + 24


@outlined
def put_auction_collar(
    buf: Any, pos: Any, locate: Any, tracking: Any, when: Any, stock: Any, reference: Any, upper: Any, lower: Any
) -> Any:
    """J: the collar of a reopening auction, not extended."""
    at = _frame(buf, pos, ord("J"), locate, tracking, when)
    put_le64(buf, at, stock)
    put_be32(buf, at + 8, reference)
    put_be32(buf, at + 12, upper)
    put_be32(buf, at + 16, lower)
    put_be32(buf, at + 20, 0)
    return at + 24


@inlined
def _put_order(buf: Any, at: Any, ref: Any, side: Any, shares: Any, stock: Any, price: Any) -> Any:
    put_be64(buf, at, ref)
    buf[at + 8] = ord("S") if side else ord("B")
    put_be32(buf, at + 9, shares)
    put_le64(buf, at + 13, stock)
    put_be32(buf, at + 21, price)
    return at + 25


@outlined
def put_add(buf: Any, pos: Any, locate: Any, tracking: Any, when: Any, ref: Any, side: Any, shares: Any, stock: Any, price: Any) -> Any:
    """A: a new displayed order without attribution."""
    at = _frame(buf, pos, ord("A"), locate, tracking, when)
    return _put_order(buf, at, ref, side, shares, stock, price)


@outlined
def put_add_attributed(
    buf: Any, pos: Any, locate: Any, tracking: Any, when: Any, ref: Any, side: Any, shares: Any, stock: Any, price: Any, mpid: Any
) -> Any:
    """F: a new displayed order of participant `mpid` (four ASCII bytes as a little-endian u32)."""
    at = _frame(buf, pos, ord("F"), locate, tracking, when)
    at = _put_order(buf, at, ref, side, shares, stock, price)
    put_le32(buf, at, mpid)
    return at + 4


@inlined
def _put_reduction(buf: Any, at: Any, ref: Any, shares: Any) -> Any:
    put_be64(buf, at, ref)
    put_be32(buf, at + 8, shares)
    return at + 12


@inlined
def _put_execution(buf: Any, at: Any, ref: Any, shares: Any, match: Any) -> Any:
    at = _put_reduction(buf, at, ref, shares)
    put_be64(buf, at, match)
    return at + 8


@outlined
def put_executed(buf: Any, pos: Any, locate: Any, tracking: Any, when: Any, ref: Any, shares: Any, match: Any) -> Any:
    """E: a displayed order traded at its own price."""
    at = _frame(buf, pos, ord("E"), locate, tracking, when)
    return _put_execution(buf, at, ref, shares, match)


@outlined
def put_executed_priced(
    buf: Any, pos: Any, locate: Any, tracking: Any, when: Any, ref: Any, shares: Any, match: Any, printable: Any, price: Any
) -> Any:
    """C: a displayed order traded at `price`; `printable` is Y, or N where a cross message prints the volume."""
    at = _frame(buf, pos, ord("C"), locate, tracking, when)
    at = _put_execution(buf, at, ref, shares, match)
    buf[at] = printable
    put_be32(buf, at + 1, price)
    return at + 5


@outlined
def put_cancelled(buf: Any, pos: Any, locate: Any, tracking: Any, when: Any, ref: Any, shares: Any) -> Any:
    """X: `shares` taken off a displayed order."""
    at = _frame(buf, pos, ord("X"), locate, tracking, when)
    return _put_reduction(buf, at, ref, shares)


@outlined
def put_deleted(buf: Any, pos: Any, locate: Any, tracking: Any, when: Any, ref: Any) -> Any:
    """D: a displayed order is gone."""
    at = _frame(buf, pos, ord("D"), locate, tracking, when)
    put_be64(buf, at, ref)
    return at + 8


@outlined
def put_replaced(buf: Any, pos: Any, locate: Any, tracking: Any, when: Any, previous: Any, ref: Any, shares: Any, price: Any) -> Any:
    """U: order `previous` becomes order `ref`."""
    at = _frame(buf, pos, ord("U"), locate, tracking, when)
    put_be64(buf, at, previous)
    put_be64(buf, at + 8, ref)
    put_be32(buf, at + 16, shares)
    put_be32(buf, at + 20, price)
    return at + 24


@outlined
def put_trade(buf: Any, pos: Any, locate: Any, tracking: Any, when: Any, shares: Any, stock: Any, price: Any, match: Any) -> Any:
    """P: a trade against a hidden order; reference 0 and side B, as the venue sends it."""
    at = _frame(buf, pos, ord("P"), locate, tracking, when)
    at = _put_order(buf, at, np.int64(0), np.int64(0), shares, stock, price)
    put_be64(buf, at, match)
    return at + 8


@outlined
def put_cross(
    buf: Any, pos: Any, locate: Any, tracking: Any, when: Any, shares: Any, stock: Any, price: Any, match: Any, cross: Any
) -> Any:
    """Q: the bulk print of an auction; `cross` is O, C or H."""
    at = _frame(buf, pos, ord("Q"), locate, tracking, when)
    put_be64(buf, at, shares)
    put_le64(buf, at + 8, stock)
    put_be32(buf, at + 16, price)
    put_be64(buf, at + 20, match)
    buf[at + 28] = cross
    return at + 29


@outlined
def put_broken(buf: Any, pos: Any, locate: Any, tracking: Any, when: Any, match: Any) -> Any:
    """B: trade `match` never happened."""
    at = _frame(buf, pos, ord("B"), locate, tracking, when)
    put_be64(buf, at, match)
    return at + 8


@outlined
def put_imbalance(
    buf: Any, pos: Any, locate: Any, tracking: Any, when: Any, paired: Any, imbalance: Any, direction: Any, stock: Any,
    far: Any, near: Any, reference: Any, cross: Any,
) -> Any:  # fmt: skip
    """I: net order imbalance before an auction; `direction` is B, S or N; the near price is within 1 % of the reference."""
    at = _frame(buf, pos, ord("I"), locate, tracking, when)
    put_be64(buf, at, paired)
    put_be64(buf, at + 8, imbalance)
    buf[at + 16] = direction
    put_le64(buf, at + 17, stock)
    put_be32(buf, at + 25, far)
    put_be32(buf, at + 29, near)
    put_be32(buf, at + 33, reference)
    buf[at + 37], buf[at + 38] = cross, ord("L")
    return at + 39


@outlined
def put_retail_interest(buf: Any, pos: Any, locate: Any, tracking: Any, when: Any, stock: Any, flag: Any) -> Any:
    """N: retail price improvement interest on side B, S, A (both) or N (none)."""
    at = _frame(buf, pos, ord("N"), locate, tracking, when)
    put_le64(buf, at, stock)
    buf[at + 8] = flag
    return at + 9


def stock_word(symbol: str) -> np.uint64:
    """A symbol of up to 8 ASCII characters as the `stock` argument of the kernels.

    Raises:
        ValueError: the symbol is empty, longer than 8, or not ASCII.
    """
    if not 1 <= len(symbol) <= 8 or not symbol.isascii():
        raise ValueError(f"a stock symbol has 1 to 8 ASCII characters, {symbol!r} has not")
    return np.uint64(int.from_bytes(symbol.encode().ljust(8), "little"))


def code_word(text: str) -> np.uint32:
    """A four-character field (participant, halt reason) as a kernel argument, space-padded."""
    return np.uint32(int.from_bytes(text.encode("ascii").ljust(4)[:4], "little"))
