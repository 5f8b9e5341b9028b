"""A book's levels with the venue's own texts, best first, compiled: what OKX's and Kraken's checksums are computed over.

Each side is a sorted array of prices, the best at its end, where most changes are, beside numbers of text slots: what moves when a level
comes or goes is ten bytes a level. The decoder in Python and the compiled one work on the same memory.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np

from tickmesh.node.event import BID
from tickmesh.node.json_text import ROW
from tickmesh.transports.toolbox import inlined, le64, outlined, put_le64, quick

LEVELS_MAX = 1024
"""Most levels of a side. OKX keeps 400, Kraken at most 1000."""
TEXT_MAX = 24
"""Most characters of a price or a quantity."""
OKX, KRAKEN = 0, 1
"""Whose checksum."""

LEVEL_TEXT = np.dtype([("price", "u1", TEXT_MAX), ("qty", "u1", TEXT_MAX), ("price_size", "<i8"), ("qty_size", "<i8")])
Ladders = namedtuple("Ladders", "counts ranks slots texts bytes scratch")
"""`counts` i64[books, 2]; `ranks` i64[books, 2, levels], prices (bids) or their negatives, rising; `slots` u16, the same, a permutation:
those past the count are free; `texts` LEVEL_TEXT[books, 2, levels], whose memory is `bytes` u8; `scratch` u8 for a checksum's text."""

_I, _U = np.int64, np.uint64
_STRIDE = _I(LEVEL_TEXT.itemsize)
_OKX_LEVELS, _KRAKEN_LEVELS = 25, 10
_COLON, _POINT, _ZERO = np.uint8(ord(":")), np.uint8(ord(".")), np.uint8(ord("0"))
_POLYNOMIAL = 0xEDB88320
_SCRATCH_BYTES = 2 * _OKX_LEVELS * 2 * (TEXT_MAX + 1) + 64


def _crc_tables() -> Any:
    """Tables of CRC-32 (ISO 3309) for eight bytes at a time ("slicing by 8")."""
    tables = np.zeros((8, 256), np.uint32)
    for byte in range(256):
        word = byte
        for _ in range(8):
            word = (word >> 1) ^ (_POLYNOMIAL if word & 1 else 0)
        tables[0, byte] = word
    for k in range(1, 8):
        before = tables[k - 1]
        tables[k] = (before >> np.uint32(8)) ^ tables[0][before & np.uint32(255)]
    return tables


_CRC = _crc_tables()


def make_ladders(books: int) -> Any:
    """Empty :data:`Ladders` for so many books; memory is touched as levels come."""
    slots = np.empty((books, 2, LEVELS_MAX), np.uint16)
    slots[:] = np.arange(LEVELS_MAX, dtype=np.uint16)
    texts = np.zeros((books, 2, LEVELS_MAX), LEVEL_TEXT)
    counts, ranks = np.zeros((books, 2), np.int64), np.zeros((books, 2, LEVELS_MAX), np.int64)
    return Ladders(counts, ranks, slots, texts, texts.reshape(-1).view(np.uint8), np.zeros(_SCRATCH_BYTES, np.uint8))


def more_ladders(before: Any, books: int) -> Any:
    """As `before`, for more books."""
    made = make_ladders(books)
    for old, new in zip(before[:4], made[:4], strict=True):
        new[: len(old)] = old
    return made


# ---------------------------------------------------------------- levels


@inlined
def _place(ranks: Any, count: Any, rank: Any) -> Any:
    """The first place whose rank is not below `rank`."""
    low, high = _I(0), _I(count)
    while low < high:
        middle = (low + high) >> 1
        if ranks[_U(middle)] < rank:
            low = middle + 1
        else:
            high = middle
    return low


@inlined
def _copy_text(buf: Any, p: Any, size: Any, target: Any, to: Any) -> Any:
    """Copy a text of at most 24 bytes; up to 7 more are read and written behind it."""
    put_le64(target, to, le64(buf, p))
    if size > 8:
        put_le64(target, to + 8, le64(buf, p + 8))
    if size > 16:
        put_le64(target, to + 16, le64(buf, p + 16))


@outlined
def ladder_set(ladders: Any, book: Any, row: Any, buf: Any) -> Any:
    """Set a level to what a row of :mod:`tickmesh.node.json_text` says (`price` and `qty` scaled), or take it out.

    Returns:
        False: there is no room, or a text is too long, and nothing has changed.
    """
    side = _I(row.side)
    ranks, slots = ladders.ranks[_U(book), _U(side)], ladders.slots[_U(book), _U(side)]
    count = ladders.counts[_U(book), _U(side)]
    rank = row.price if side == BID else -row.price
    place = _place(ranks, count, rank)
    there = place < count and ranks[_U(place)] == rank
    if row.qty == 0:
        if there:
            freed = slots[_U(place)]
            for k in range(place, count - 1):
                ranks[_U(k)], slots[_U(k)] = ranks[_U(k + 1)], slots[_U(k + 1)]
            slots[_U(count - 1)] = freed
            ladders.counts[_U(book), _U(side)] = count - 1
        return True
    if row.price_size > TEXT_MAX or row.qty_size > TEXT_MAX or (not there and count == LEVELS_MAX):
        return False
    if not there:
        taken = slots[_U(count)]
        for k in range(count, place, -1):
            ranks[_U(k)], slots[_U(k)] = ranks[_U(k - 1)], slots[_U(k - 1)]
        ranks[_U(place)], slots[_U(place)] = rank, taken
        ladders.counts[_U(book), _U(side)] = count + 1
    slot = _I(slots[_U(place)])
    text = ladders.texts[_U(book), _U(side), _U(slot)]
    text.price_size, text.qty_size = row.price_size, row.qty_size
    begin = ((_I(book) * 2 + side) * LEVELS_MAX + slot) * _STRIDE
    _copy_text(buf, row.price_at, row.price_size, ladders.bytes, begin)
    _copy_text(buf, row.qty_at, row.qty_size, ladders.bytes, begin + TEXT_MAX)
    return True


@inlined
def ladder_clear(ladders: Any, book: Any) -> Any:
    """Empty a book."""
    ladders.counts[_U(book), _U(0)] = 0
    ladders.counts[_U(book), _U(1)] = 0


@inlined
def worst_beyond(ladders: Any, book: Any, side: Any, depth: Any) -> Any:
    """Take the worst level out if there are more than `depth`: its price, or 0."""
    count = ladders.counts[_U(book), _U(side)]
    if count <= depth:
        return _I(0)
    ranks, slots = ladders.ranks[_U(book), _U(side)], ladders.slots[_U(book), _U(side)]
    rank, freed = ranks[_U(0)], slots[_U(0)]
    for k in range(count - 1):
        ranks[_U(k)], slots[_U(k)] = ranks[_U(k + 1)], slots[_U(k + 1)]
    slots[_U(count - 1)] = freed
    ladders.counts[_U(book), _U(side)] = count - 1
    return rank if side == BID else -rank


# ---------------------------------------------------------------- checksums


@outlined
def crc32_of(buf: Any, size: Any) -> Any:
    """CRC-32 (ISO 3309, as zlib's) of ``buf[:size]``, as i64; eight readable bytes lie behind."""
    crc, p, low = np.uint32(0xFFFFFFFF), _I(0), _U(0xFF)
    while p + 8 <= size:
        word = le64(buf, p) ^ _U(crc)
        crc = (
            _CRC[7, word & low] ^ _CRC[6, (word >> _U(8)) & low] ^ _CRC[5, (word >> _U(16)) & low] ^ _CRC[4, (word >> _U(24)) & low]
            ^ _CRC[3, (word >> _U(32)) & low] ^ _CRC[2, (word >> _U(40)) & low] ^ _CRC[1, (word >> _U(48)) & low] ^ _CRC[0, word >> _U(56)]
        )  # fmt: skip
        p += 8
    while p < size:
        crc = np.uint32(crc >> np.uint32(8)) ^ _CRC[0, (_U(crc) ^ _U(buf[_U(p)])) & low]
        p += 1
    return _I(crc ^ np.uint32(0xFFFFFFFF))


@inlined
def _level_at(ladders: Any, book: Any, side: Any, place: Any) -> Any:
    """Where the texts of the level `place` steps from the best begin: ``(offset, size of the price, size of the quantity)``."""
    count = ladders.counts[_U(book), _U(side)]
    slot = _I(ladders.slots[_U(book), _U(side), _U(count - 1 - place)])
    text = ladders.texts[_U(book), _U(side), _U(slot)]
    return ((_I(book) * 2 + _I(side)) * LEVELS_MAX + slot) * _STRIDE, text.price_size, text.qty_size


@inlined
def _put_digits(bytes_: Any, p: Any, size: Any, out: Any, n: Any) -> Any:
    """A number's digits without its point and the zeros in front; returns the new n."""
    begun = False
    for k in range(size):
        c = bytes_[_U(p + k)]
        begun = begun or (c != _ZERO and c != _POINT)
        if begun and c != _POINT:
            out[_U(n)] = c
            n += 1
    return n


@outlined
def okx_text(ladders: Any, book: Any) -> Any:
    """``bid:size:ask:size:…`` over the best 25 levels in the scratch; returns its length (OKX API v5, "Checksum")."""
    n = _I(0)
    for place in range(_OKX_LEVELS):
        for side in range(2):
            if place < ladders.counts[_U(book), _U(side)]:
                begin, price_size, qty_size = _level_at(ladders, book, side, place)
                _copy_text(ladders.bytes, begin, price_size, ladders.scratch, n)
                n += price_size
                ladders.scratch[_U(n)] = _COLON
                _copy_text(ladders.bytes, begin + TEXT_MAX, qty_size, ladders.scratch, n + 1)
                n += 1 + qty_size
                ladders.scratch[_U(n)] = _COLON
                n += 1
    return max(n - 1, _I(0))


@outlined
def kraken_text(ladders: Any, book: Any) -> Any:
    """Digits of price and quantity of the best ten asks, then bids, in the scratch; returns its length (docs.kraken.com, "Spot Websockets
    (v2) Book Checksum")."""
    n = _I(0)
    for turn in range(2):
        side = _I(1 - turn)
        for place in range(min(_I(_KRAKEN_LEVELS), ladders.counts[_U(book), _U(side)])):
            begin, price_size, qty_size = _level_at(ladders, book, side, place)
            n = _put_digits(ladders.bytes, begin, price_size, ladders.scratch, n)
            n = _put_digits(ladders.bytes, begin + TEXT_MAX, qty_size, ladders.scratch, n)
    return n


@inlined
def checksum(ladders: Any, book: Any, whose: Any) -> Any:
    """The venue's checksum of a book: signed (OKX) or unsigned (Kraken)."""
    if whose == OKX:
        crc = crc32_of(ladders.scratch, okx_text(ladders, book))
        return crc - (_I(1) << 32) if crc >= (_I(1) << 31) else crc
    return crc32_of(ladders.scratch, kraken_text(ladders, book))


# ---------------------------------------------------------------- from Python


@quick
def set_levels(ladders: Any, book: Any, rows: Any, buf: Any, clear: Any) -> Any:
    """:func:`ladder_set` for each row, of an empty book if `clear`; returns how many there was room for, up to the first for which not."""
    if clear:
        ladder_clear(ladders, book)
    done = _I(0)
    while done < rows.size and ladder_set(ladders, book, rows[_U(done)], buf):
        done += 1
    return done


@quick
def book_checksum(ladders: Any, book: Any, whose: Any) -> Any:
    """:func:`checksum`."""
    return checksum(ladders, book, whose)


@quick
def beyond_depth(ladders: Any, book: Any, side: Any, depth: Any) -> Any:
    """:func:`worst_beyond`."""
    return worst_beyond(ladders, book, side, depth)


def warm() -> None:
    """Call each entry point once, so that it is compiled."""
    ladders = make_ladders(1)
    set_levels(ladders, 0, np.zeros(0, ROW), np.zeros(64, np.uint8), True)
    book_checksum(ladders, 0, OKX)
    beyond_depth(ladders, 0, 0, 1)
