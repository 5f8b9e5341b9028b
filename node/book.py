"""Order books by order (L3) and by level (L2): thousands of instruments in plain arrays, updated by compiled kernels.

What it offers: :func:`make_books`, the kernels :func:`book_apply`, :func:`book_prefetch_order`, :func:`book_prefetch_level`,
:func:`bbo_update`, :func:`bbo_fill`, :func:`book_best`, and for people :func:`top`, :func:`levels_count`, :func:`resting_orders`,
:func:`counts`.

How it works (docs/reference/books.md has the figures):

* A *side* is ``bs = instrument * 2 + side``. Its levels are addressed by a *key*: the price in ticks for bids, its complement ``~ticks``
  for asks, so that the best level is the greatest key on either side and both sides share code.
* Levels near the best lie in a circular window of 4,096 u64 words at ``key % 4096``; a two-level bitset finds the next best. The
  window slides without moving what stays in it. Levels below it lie in the *far store*, a pool with a hash by (bs, key) and a list per
  side. The best level of a side that is not empty is always in the window.
* A level word is ``orders << 40 | qty`` in a book by order, and the plain 63-bit quantity in a book by level.
* Resting orders are 16-byte records in a set-associative table: the slot is the low bits of the id, the record keeps the other bits.
  A set of four is one cache line; what does not fit spills into a bounded open-addressing table.
* Memory that reads zero is an empty book, so unused instruments and orders are never touched.
"""

from __future__ import annotations

import mmap
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tickmesh.node.event import ALL_INSTRUMENTS, NO_INSTRUMENT, NO_PRICE, NO_SIDE, Flag, Kind, TradingStatus
from tickmesh.transports.toolbox import (
    count_leading_zeros,
    count_trailing_zeros,
    f64_bits,
    inlined,
    loop,
    outlined,
    prefetch,
    zeros_aligned,
)

ORDER = np.dtype([("word", "<u8"), ("key", "<i4"), ("qty", "<u4")])
"""A resting order: `word` = rest of the id << 19 | mark << 18 | bs. Empty when `qty` is 0; the mark outlives the order: it says that
another order that prefers this slot may lie elsewhere."""
SIDE = np.dtype(
    [
        ("summary", "<u8"), ("best", "<i4"), ("base", "<i4"), ("tick", "<i8"), ("per_tick", "<f8"),
        ("far_head", "<i4"), ("flags", "<u4"), ("published_flags", "<u4"), ("_pad", "<u4"),
        ("published_price", "<i8"), ("published_qty", "<i8"),
    ]
)  # fmt: skip
"""One side of a book, one cache line. `flags`: STALE and HALTED of an instrument are kept in its bid side."""
FAR = np.dtype([("word", "<u8"), ("key", "<i4"), ("bs", "<u4"), ("next", "<i4"), ("previous", "<i4"), ("chain", "<i4"), ("_pad", "<i4")])
"""A level outside the window; node 0 is never used."""
PLAN = np.dtype([("word", "<u8"), ("slot", "<u4"), ("key", "<i4"), ("level", "<u4"), ("_pad", "<u4")])
"""What :func:`book_plan` found out ahead about one event: its order's slot, the word of that order, its price and its level's place."""
assert (ORDER.itemsize, SIDE.itemsize, FAR.itemsize, PLAN.itemsize) == (16, 64, 32, 24)
PLANS = 64
"""Events that may be planned ahead; one more place serves :func:`book_apply`, which plans and applies at once."""
FAR_AHEAD, NEAR_AHEAD = 24, 8
"""Events ahead at which a loop calls :func:`book_prefetch` and :func:`book_plan`."""


class Refusal(IntEnum):
    """Why an event was refused: :func:`book_apply` returns the negative of it and counts it in ``books.counters[refusal]``."""

    UNKNOWN_INSTRUMENT = 1
    UNKNOWN_ORDER = 2
    DUPLICATE_ORDER = 3
    BAD_SIDE = 4
    BAD_QTY = 5
    """Zero or negative."""
    QTY_EXCEEDS_ORDER = 6
    QTY_OVERFLOW = 7
    """An order above 2**32 - 1, a level above 2**40 - 1, or 2**23 orders at one level."""
    PRICE_RANGE = 8
    """No price, or more than 2**31 - 1 ticks."""
    ORDERS_FULL = 9
    LEVELS_FULL = 10
    """The far store has no room."""
    WRONG_BOOK = 11
    """An order for a book by level, or a level for a book by order."""
    OTHER_INSTRUMENT = 12
    """The order rests in another instrument than the event says."""


_RECENTRES, _REFINEMENTS, _CROSSED, _COUNTERS = 13, 14, 15, 16
COUNTER_NAMES = ("_", *(r.name.lower() for r in Refusal), "window_moves", "tick_refinements", "crossed_bbos")
"""Names of ``books.counters``, by position (position 0 is unused)."""


class Books(NamedTuple):
    """All books of a shard. A snapshot is a copy of the arrays; the integers are fixed by :func:`make_books`."""

    orders: npt.NDArray[np.void]
    spill_hashes: npt.NDArray[np.uint64]
    sides: npt.NDArray[np.void]
    words: npt.NDArray[np.uint64]
    levels: npt.NDArray[np.uint64]
    far: npt.NDArray[np.void]
    far_heads: npt.NDArray[np.int32]
    ticks: npt.NDArray[np.int64]
    state: npt.NDArray[np.int64]
    counters: npt.NDArray[np.int64]
    plans: npt.NDArray[np.void]
    slot_bits: int
    id_mode: int


_SEQUENTIAL, _RANDOM, _PER_INSTRUMENT = 0, 1, 2
_ID_MODES = {"sequential": _SEQUENTIAL, "random": _RANDOM, "per_instrument": _PER_INSTRUMENT}
_DISPLACED, _SPILLED, _FAR_FREE, _FAR_FRESH, _FAR_USED, _ORDERS, _STATES = 0, 1, 2, 3, 4, 5, 8
_BS_BITS = 18
_SLOT_BITS_MIN = 21
_QTY_BITS = 40
_HUGE = 1 << 21
_HUGE_LEVELS_MAX = 32 << 20
"""Windows up to this many bytes in all are worth huge pages; above it (512 instruments) only the touched 4 KiB pages become resident."""
_WINDOW_BITS = 12
_WINDOW = 1 << _WINDOW_BITS
"""Levels in a side's window: as many as a two-level bitset of 64-bit words covers."""
DEFAULT_TICK = 10_000_000


def _zeros(count: int, dtype: Any, huge: bool) -> npt.NDArray[Any]:
    """Zeroed private memory, resident only where touched; what is large is aligned to 2 MiB and in huge pages if asked for and granted."""
    size = count * np.dtype(dtype).itemsize
    if size < _HUGE:
        return zeros_aligned(count, dtype)
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    start = np.frombuffer(memory, np.uint8, 1).ctypes.data
    return np.frombuffer(memory, dtype, count, -start % _HUGE)


def make_books(
    instruments_max: int, orders_max: int = 1 << 20, order_ids: str = "sequential", far_max: int = 1 << 18
) -> Books:
    """Empty books.

    Args:
        instruments_max: instrument ids are below this; at most 2**17.
        orders_max: resting orders to expect at once over all instruments; the table is at most half full with as many.
        order_ids: ``"sequential"`` (dense, rising), ``"random"`` (any pattern) or ``"per_instrument"`` (any pattern, unique only
            within an instrument; every event must then carry its instrument).
        far_max: levels outside the windows over all instruments.

    Set ``books.ticks[instrument]`` (i64, 1e-9) before an instrument's first event; 0 means :data:`DEFAULT_TICK`. A price off the tick
    refines the tick of its book to the greatest common divisor.

    Raises:
        ValueError: an argument is out of bounds.
    """
    if not 1 <= instruments_max <= 1 << (_BS_BITS - 1):
        raise ValueError(f"instruments_max={instruments_max}: choose 1 to {1 << (_BS_BITS - 1)}")
    if order_ids not in _ID_MODES:
        raise ValueError(f"order_ids={order_ids!r}: choose one of {', '.join(_ID_MODES)}")
    if not (1 <= far_max < 1 << 30 and 1 <= orders_max <= 1 << 31):
        raise ValueError(f"far_max={far_max} must be 1 to 2**30 - 1, orders_max={orders_max} 1 to 2**31")
    slot_bits = max(_SLOT_BITS_MIN, (2 * orders_max - 1).bit_length())
    spill = 1 << (slot_bits - 4)
    sides = 2 * instruments_max
    return Books(
        orders=_zeros((1 << slot_bits) + spill, ORDER, True),
        spill_hashes=_zeros(spill, np.uint64, False),
        sides=_zeros(sides, SIDE, True),
        words=_zeros(sides * _WINDOW // 64, np.uint64, True),
        levels=_zeros(sides * _WINDOW, np.uint64, sides * _WINDOW * 8 <= _HUGE_LEVELS_MAX),
        far=_zeros(far_max + 1, FAR, False),
        far_heads=_zeros(1 << (2 * far_max - 1).bit_length(), np.int32, False),
        ticks=np.zeros(instruments_max, np.int64),
        state=np.zeros(_STATES, np.int64),
        counters=np.zeros(_COUNTERS, np.int64),
        plans=zeros_aligned(PLANS + 1, PLAN),
        slot_bits=slot_bits,
        id_mode=_ID_MODES[order_ids],
    )


def numbering_of(books: Books) -> str:
    """How the orders of books are numbered: see :func:`make_books`."""
    return next(name for name, mode in _ID_MODES.items() if mode == books.id_mode)


def renumbered(books: Books, order_ids: str) -> Books:
    """The same books with empty tables for orders that are numbered otherwise; :func:`renumber_orders` fills them.

    Raises:
        ValueError: the orders are numbered per instrument, from which there is no way back.
    """
    if books.id_mode == _PER_INSTRUMENT:
        raise ValueError("orders that are numbered per instrument cannot be numbered otherwise")
    spill = len(books.spill_hashes)
    return books._replace(
        orders=_zeros(len(books.orders), ORDER, True),
        spill_hashes=_zeros(spill, np.uint64, False),
        state=np.zeros(_STATES, np.int64),
        id_mode=_ID_MODES[order_ids],
    )


# ---------------------------------------------------------------- constants of the kernels

_ADD, _EXECUTE, _CANCEL, _DELETE, _REPLACE, _MODIFY = (
    int(k) for k in (Kind.ADD, Kind.EXECUTE, Kind.CANCEL, Kind.DELETE, Kind.REPLACE, Kind.MODIFY)
)
_CLEAR, _LEVEL, _STATUS, _GAP, _BBO = (int(k) for k in (Kind.CLEAR, Kind.LEVEL, Kind.STATUS, Kind.GAP, Kind.BBO))
_STALE, _HALTED, _CROSSED_FLAG, _LOCKED, _PRICED = (int(f) for f in (Flag.STALE, Flag.HALTED, Flag.CROSSED, Flag.LOCKED, Flag.PRICED))
_BY_LEVEL = 1 << 16
"""In ``side.flags``, above the event flags: the level words are plain quantities."""
_TOUCHED = 1 << 17
"""In ``side.flags`` of both sides: the BBO may differ from what was published, though the next event may not touch it."""
_PUBLISHED = 1 << 16
"""In ``side.published_flags``: something has been published."""
_STATUS_UNKNOWN = int(TradingStatus.UNKNOWN)
_STATUS_HALTED, _STATUS_PAUSED, _STATUS_QUOTE_ONLY = int(TradingStatus.HALTED), int(TradingStatus.PAUSED), int(TradingStatus.QUOTE_ONLY)

_UNKNOWN_INSTRUMENT, _UNKNOWN_ORDER, _DUPLICATE_ORDER, _BAD_SIDE, _BAD_QTY, _QTY_EXCEEDS_ORDER = range(-1, -7, -1)
_QTY_OVERFLOW, _PRICE_RANGE, _ORDERS_FULL, _LEVELS_FULL, _WRONG_BOOK, _OTHER_INSTRUMENT = range(-7, -13, -1)

_U = np.uint64
_I = np.int64
_ZERO, _ONE, _TWO, _THREE, _SIX, _LOW6 = _U(0), _U(1), _U(2), _U(3), _U(6), _U(63)
_TAG_SHIFT = _U(_BS_BITS + 1)
_TAG_MASK = _U((1 << 64) - (2 << _BS_BITS))
_MARK = _U(1 << _BS_BITS)
_WINDOW_SHIFT = _U(_WINDOW_BITS)
_BS_MASK = _U((1 << _BS_BITS) - 1)
_QTY_SHIFT = _U(_QTY_BITS)
_QTY_MASK = _U((1 << _QTY_BITS) - 1)
_ONE_ORDER = _U(1 << _QTY_BITS)
_ORDER_QTY_MAX = _U(0xFFFFFFFF)
_NEARLY_FULL = _U(1 << 63 | 1 << (_QTY_BITS - 1))
"""Bits of a level word from which on another order could overflow it."""
_MIX_1, _MIX_2 = _U(0xBF58476D1CE4E5B9), _U(0x94D049BB133111EB)
_UNMIX_1, _UNMIX_2 = (_U(pow(int(mix), -1, 1 << 64)) for mix in (_MIX_1, _MIX_2))
_SHIFT_30, _SHIFT_27, _SHIFT_32, _SHIFT_54, _SHIFT_60 = _U(30), _U(27), _U(32), _U(54), _U(60)
_LEVEL_ON_WIRE = np.zeros(256, np.uint64)
_LEVEL_ON_WIRE[[_ADD, _LEVEL]] = ~_ZERO
"""By kind, all ones where the event itself says which level it changes; a table, because the compiler turns a comparison into a branch."""
_ROUND = 6755399441055744.0
"""1.5 * 2**52: adding it to a float below 2**51 leaves the rounded integer in the low bits."""
_KEY_MIN, _KEY_MAX = -(1 << 31), (1 << 31) - 1


# ---------------------------------------------------------------- orders


@inlined
def _mix(word: Any) -> Any:
    """A bijection of u64 that spreads every bit (the finaliser of splitmix64)."""
    word = (word ^ (word >> _SHIFT_30)) * _MIX_1
    return (word ^ (word >> _SHIFT_27)) * _MIX_2


@inlined
def _hash(books: Any, id: Any, instrument: Any) -> Any:
    """What the order table is addressed by: the id itself, or a bijection of it."""
    if books.id_mode == _SEQUENTIAL:
        return id
    if books.id_mode == _RANDOM:
        spread = _mix(id)
    else:
        spread = _mix(id ^ _mix(_U(instrument) + _ONE))
    return spread ^ (spread >> _SHIFT_32)


@inlined
def _id_of(books: Any, hash: Any) -> Any:
    """The id that :func:`_hash` made a hash of; not for orders that are numbered per instrument."""
    if books.id_mode == _SEQUENTIAL:
        return hash
    word = (hash ^ (hash >> _SHIFT_32)) * _UNMIX_2
    word = (word ^ (word >> _SHIFT_27) ^ (word >> _SHIFT_54)) * _UNMIX_1
    return word ^ (word >> _SHIFT_30) ^ (word >> _SHIFT_60)


@inlined
def _preferred(books: Any, hash: Any) -> Any:
    return hash & ((_ONE << _U(books.slot_bits)) - _ONE)


@inlined
def _tag(books: Any, hash: Any) -> Any:
    """What tells this id from the others that may lie in its set: the bits above the slot, and the preferred place in the set."""
    return ((hash >> _U(books.slot_bits)) << _U(2)) | (hash & _THREE)


@inlined
def _spill_home(books: Any, hash: Any) -> Any:
    return (_mix(hash) >> _SHIFT_32) & _U(books.spill_hashes.size - 1)


@outlined
def _find_displaced(books: Any, hash: Any) -> Any:
    """Index of an order that is not in its preferred slot, or -1."""
    tag = _tag(books, hash)
    first = _preferred(books, hash) & ~_THREE
    for way in range(4):
        index = first + _U(way)
        if books.orders[index].qty != 0 and books.orders[index].word >> _TAG_SHIFT == tag:
            return _I(index)
    if books.state[_SPILLED] == 0:
        return _I(-1)
    slots = _ONE << _U(books.slot_bits)
    mask = _U(books.spill_hashes.size - 1)
    place = _spill_home(books, hash)
    while books.orders[slots + place].qty != 0:
        if books.spill_hashes[place] == hash:
            return _I(slots + place)
        place = (place + _ONE) & mask
    return _I(-1)


@inlined
def _find(books: Any, hash: Any) -> Any:
    """Index of the order in ``books.orders``, or -1."""
    index = _preferred(books, hash)
    order = books.orders[index]
    if order.word >> _TAG_SHIFT == _tag(books, hash) and order.qty != 0:
        return _I(index)
    return _find_displaced(books, hash) if order.word & _MARK != _ZERO else _I(-1)


@outlined
def _place_displaced(books: Any, hash: Any) -> Any:
    """Where an order goes whose preferred slot is taken, or that may be a duplicate: an index or a refusal."""
    if _find(books, hash) >= 0:
        return _I(_DUPLICATE_ORDER)
    preferred = _preferred(books, hash)
    first = preferred & ~_THREE
    if books.orders[preferred].qty == 0:
        guests = books.state[_SPILLED]
        for way in range(4):
            other = books.orders[first + _U(way)]
            guests += other.qty != 0 and (other.word >> _TAG_SHIFT) & _THREE == preferred & _THREE
        if guests == 0:
            books.orders[preferred].word = _ZERO
        return _I(preferred)
    for way in range(4):
        if books.orders[first + _U(way)].qty == 0:
            return _I(first + _U(way))
    if books.state[_SPILLED] * 2 >= books.spill_hashes.size:
        return _I(_ORDERS_FULL)
    slots = _ONE << _U(books.slot_bits)
    mask = _U(books.spill_hashes.size - 1)
    place = _spill_home(books, hash)
    while books.orders[slots + place].qty != 0:
        place = (place + _ONE) & mask
    return _I(slots + place)


@inlined
def _place(books: Any, hash: Any) -> Any:
    """Index where a new order goes (nothing is written yet), or a refusal."""
    index = _preferred(books, hash)
    if books.orders[index].qty == 0 and books.orders[index].word & _MARK == _ZERO:
        return _I(index)
    return _place_displaced(books, hash)


@outlined
def _note_displaced(books: Any, index: Any, hash: Any) -> Any:
    """Count a new order that is not in its preferred slot, and mark that."""
    books.state[_DISPLACED] += 1
    books.orders[_preferred(books, hash)].word |= _MARK
    spill = _I(index) - (_I(1) << books.slot_bits)
    if spill >= 0:
        books.state[_SPILLED] += 1
        books.spill_hashes[spill] = hash


@outlined
def _erase_displaced(books: Any, index: Any) -> Any:
    """Uncount an order (already emptied) that was not in its preferred slot; keep the probe chains of the spill table unbroken."""
    books.state[_DISPLACED] -= 1
    slots = _ONE << _U(books.slot_bits)
    if _U(index) < slots:
        return
    books.state[_SPILLED] -= 1
    mask = _U(books.spill_hashes.size - 1)
    hole = _U(index) - slots
    place = (hole + _ONE) & mask
    while books.orders[slots + place].qty != 0:
        home = _spill_home(books, books.spill_hashes[place])
        if ((place - home) & mask) >= ((place - hole) & mask):
            order = books.orders[slots + place]
            target = books.orders[slots + hole]
            target.word = order.word
            target.key = order.key
            target.qty = order.qty
            order.qty = 0
            books.spill_hashes[hole] = books.spill_hashes[place]
            hole = place
        place = (place + _ONE) & mask


# ---------------------------------------------------------------- levels outside the window


@inlined
def _far_head(books: Any, bs: Any, key: Any) -> Any:
    """Index into ``far_heads`` of the chain of a level."""
    mixed = _mix((_U(bs) << _SHIFT_32) | (_U(key) & _U(0xFFFFFFFF)))
    return (mixed >> _SHIFT_32) & _U(books.far_heads.size - 1)


@outlined
def _far_find(books: Any, bs: Any, key: Any) -> Any:
    """Node of a far level, or 0."""
    node = _I(books.far_heads[_far_head(books, bs, key)])
    while node != 0 and (books.far[node].key != key or books.far[node].bs != bs):
        node = _I(books.far[node].chain)
    return node


@inlined
def _far_room(books: Any) -> Any:
    return _I(books.far.size) - 1 - books.state[_FAR_USED]


@inlined
def _far_link(books: Any, node: Any) -> Any:
    """Put a node at the head of its hash chain."""
    level = books.far[node]
    head = _far_head(books, _I(level.bs), _I(level.key))
    level.chain = books.far_heads[head]
    books.far_heads[head] = node


@inlined
def _far_unlink(books: Any, node: Any) -> Any:
    """Take a node out of its hash chain."""
    level = books.far[node]
    head = _far_head(books, _I(level.bs), _I(level.key))
    at = _I(books.far_heads[head])
    if at == node:
        books.far_heads[head] = level.chain
        return
    while _I(books.far[at].chain) != node:
        at = _I(books.far[at].chain)
    books.far[at].chain = level.chain


@outlined
def _far_insert(books: Any, bs: Any, key: Any, word: Any) -> Any:
    """Add a level that is not there yet; the caller has made sure of room."""
    node = books.state[_FAR_FREE]
    if node != 0:
        books.state[_FAR_FREE] = _I(books.far[node].next)
    else:
        books.state[_FAR_FRESH] += 1
        node = books.state[_FAR_FRESH]
    books.state[_FAR_USED] += 1
    level = books.far[node]
    side = books.sides[bs]
    level.word = word
    level.key = key
    level.bs = bs
    level.previous = 0
    level.next = side.far_head
    if side.far_head != 0:
        books.far[_I(side.far_head)].previous = node
    side.far_head = node
    _far_link(books, node)


@outlined
def _far_remove(books: Any, node: Any) -> Any:
    _far_unlink(books, node)
    level = books.far[node]
    following, before = _I(level.next), _I(level.previous)
    if before != 0:
        books.far[before].next = following
    else:
        books.sides[_I(level.bs)].far_head = following
    if following != 0:
        books.far[following].previous = before
    level.next = books.state[_FAR_FREE]
    books.state[_FAR_FREE] = node
    books.state[_FAR_USED] -= 1


# ---------------------------------------------------------------- the window


@inlined
def _level_index(bs: Any, key: Any) -> Any:
    """Place of a level word; valid only if the key is inside the window.

    Bids and asks alternate every 64 ticks, so that the levels around the touch share a page of memory.
    """
    ask = _U(bs) & _ONE
    ticks = _U(key) ^ (_ZERO - ask)
    place = ((ticks & _U(_WINDOW - 64)) << _ONE) | (ticks & _LOW6) | (ask << _SIX)
    return ((_U(bs) >> _ONE) << (_WINDOW_SHIFT + _ONE)) | place


@inlined
def _word_index(bs: Any, block: Any) -> Any:
    return (_U(bs) << _SIX) | block


@inlined
def _block(key: Any) -> Any:
    """Which 64-level block of the window a key falls into."""
    return (_U(key) >> _SIX) & _LOW6


@inlined
def _in_window(side: Any, key: Any) -> Any:
    return _U(key - _I(side.base)) < _U(_WINDOW)


@inlined
def _top_bit(word: Any) -> Any:
    return _U(63) - count_leading_zeros(word)


@inlined
def _toggle(books: Any, side: Any, bs: Any, key: Any) -> Any:
    """A level inside the window came into being, or is gone: find the best, without a branch, as the first one below the window's top."""
    block = _block(key)
    first = _word_index(bs, _ZERO)
    word = books.words[first + block] ^ (_ONE << (_U(key) & _LOW6))
    books.words[first + block] = word
    summary = (side.summary & ~(_ONE << block)) | (_U(word != _ZERO) << block)
    side.summary = summary
    if summary == _ZERO:
        if side.far_head != 0:
            _move_down(books, bs, _far_best(books, bs))
        return
    base = _I(side.base)
    lowest = _block(base)
    up = _top_bit((summary >> lowest) | (summary << ((_U(64) - lowest) & _LOW6)))
    side.best = base + _I((up << _SIX) + _top_bit(books.words[first + ((lowest + up) & _LOW6)]))


@outlined
def _far_best(books: Any, bs: Any) -> Any:
    """Greatest key of a side's far levels (there is one)."""
    node = _I(books.sides[bs].far_head)
    best = _I(books.far[node].key)
    while node != 0:
        best = max(best, _I(books.far[node].key))
        node = _I(books.far[node].next)
    return best


@inlined
def _base_for(key: Any) -> Any:
    """Base of a window in which `key` is three quarters up: a multiple of 64 within the range of keys."""
    base = (key - (_WINDOW - _WINDOW // 4)) & ~63
    return min(max(base, _I(_KEY_MIN)), _I(_KEY_MAX) + 1 - _WINDOW)


@outlined
def _move_down(books: Any, bs: Any, best: Any) -> Any:
    """Slide the window down so that `best`, the side's greatest key, is three quarters up; fetch the far levels that it now covers."""
    side = books.sides[bs]
    side.base = _base_for(best)
    books.counters[_RECENTRES] += 1
    node = _I(side.far_head)
    while node != 0:
        following = _I(books.far[node].next)
        key = _I(books.far[node].key)
        if key >= _I(side.base):
            books.levels[_level_index(bs, key)] = books.far[node].word
            _far_remove(books, node)
            block = _block(key)
            books.words[_word_index(bs, block)] |= _ONE << (_U(key) & _LOW6)
            side.summary |= _ONE << block
        node = following
    side.best = best


@outlined
def _window_count(books: Any, bs: Any, first: Any, end: Any) -> Any:
    """Number of levels in the window with first <= key < end (multiples of 64)."""
    count = _I(0)
    for key in range(first, end, 64):
        word = books.words[_word_index(bs, _block(key))]
        while word != _ZERO:
            word &= word - _ONE
            count += 1
    return count


@outlined
def _evict(books: Any, bs: Any, first: Any, end: Any) -> Any:
    """Move the window's levels with first <= key < end (multiples of 64) to the far store, which has room."""
    side = books.sides[bs]
    for start in range(first, end, 64):
        block = _block(start)
        index = _word_index(bs, block)
        word = books.words[index]
        books.words[index] = _ZERO
        side.summary &= ~(_ONE << block)
        while word != _ZERO:
            key = _I(start) + _I(count_trailing_zeros(word))
            word &= word - _ONE
            place = _level_index(bs, key)
            _far_insert(books, bs, key, books.levels[place])
            books.levels[place] = _ZERO


@outlined
def _move_up(books: Any, bs: Any, best: Any) -> Any:
    """Slide the window up for a new best key; returns 0, or a refusal if the far store has no room for what falls out."""
    side = books.sides[bs]
    base = _base_for(best)
    if side.summary != _ZERO:
        end = min(base, _I(side.base) + _WINDOW)
        if _window_count(books, bs, _I(side.base), end) > _far_room(books):
            return _I(_LEVELS_FULL)
        _evict(books, bs, _I(side.base), end)
        books.counters[_RECENTRES] += 1
    side.base = base
    return _I(0)


@outlined
def _cover(books: Any, bs: Any, key: Any) -> Any:
    """Make room for a new level outside the window: 1 = the window covers it now, 0 = it belongs into the far store, or a refusal."""
    side = books.sides[bs]
    if side.summary == _ZERO:
        side.base = _base_for(key)
        return _I(1)
    if key >= _I(side.base) + _WINDOW:
        refusal = _move_up(books, bs, key)
        return refusal if refusal < 0 else _I(1)
    best = _I(side.best)
    if best - _I(side.base) < _WINDOW // 4 and key >= _base_for(best):
        _move_down(books, bs, best)
        return _I(1)
    return _I(0) if _far_room(books) > 0 else _I(_LEVELS_FULL)


# ---------------------------------------------------------------- levels of a book by order


@inlined
def _overflows(word: Any, qty: Any) -> Any:
    """Whether one more order of `qty` is too much for a level: 40 bits of quantity, 23 of orders."""
    return (((word & _QTY_MASK) + qty) >> _QTY_SHIFT) | (word >> _U(63)) != _ZERO


@outlined
def _level_outside(books: Any, bs: Any, key: Any, word: Any, adds: Any) -> Any:
    """Put `word` on a level that is not in the window: added to what is there, or instead of it (0 removes); returns 0 or a refusal."""
    node = _far_find(books, bs, key)
    if node != 0:
        if adds:
            if _overflows(books.far[node].word, word & _QTY_MASK):
                return _I(_QTY_OVERFLOW)
            books.far[node].word += word
        elif word != _ZERO:
            books.far[node].word = word
        else:
            _far_remove(books, node)
        return _I(0)
    if word == _ZERO:
        return _I(0)
    covered = _cover(books, bs, key)
    if covered == 0:
        _far_insert(books, bs, key, word)
    elif covered == 1:
        books.levels[_level_index(bs, key)] = word
        _toggle(books, books.sides[_U(bs)], bs, key)
        return _I(0)
    return covered


@inlined
def _level_add(books: Any, bs: Any, key: Any, qty: Any) -> Any:
    """Add an order of `qty` (u64) to a level; returns 0 or a refusal."""
    if not _in_window(books.sides[bs], key):
        return _level_outside(books, bs, key, _ONE_ORDER + qty, True)
    index = _level_index(bs, key)
    before = books.levels[index]
    if _overflows(before, qty):
        return _I(_QTY_OVERFLOW)
    books.levels[index] = before + (_ONE_ORDER + qty)
    if before == _ZERO:
        _toggle(books, books.sides[_U(bs)], bs, key)
    return _I(0)


@outlined
def _level_take_outside(books: Any, bs: Any, key: Any, take: Any) -> Any:
    node = _far_find(books, bs, key)
    books.far[node].word -= take
    if books.far[node].word == _ZERO:
        _far_remove(books, node)


@inlined
def _level_take(books: Any, bs: Any, key: Any, take: Any) -> Any:
    """Take quantity, and an order if it is gone (`take` = orders << 40 | qty), off a level that has it."""
    if not _in_window(books.sides[bs], key):
        _level_take_outside(books, bs, key, take)
        return
    index = _level_index(bs, key)
    after = books.levels[index] - take
    books.levels[index] = after
    if after == _ZERO:
        _toggle(books, books.sides[_U(bs)], bs, key)


# ---------------------------------------------------------------- prices


@inlined
def _ticks_of(side: Any, price: Any) -> Any:
    """The price in ticks, rounded; exact if and only if ``_ticks_of(side, price) * side.tick == price`` (modulo 2**64 is enough)."""
    return _I(np.int32(f64_bits(np.float64(price) * side.per_tick + _ROUND)))


@inlined
def _price_of(side: Any, bs: Any, key: Any) -> Any:
    return (key ^ -_I(_U(bs) & _ONE)) * side.tick


@inlined
def _key_of_ticks(bs: Any, ticks: Any) -> Any:
    return ticks ^ -_I(_U(bs) & _ONE)


@inlined
def _scales(bs: Any, key: Any, factor: Any) -> Any:
    ticks = _key_of_ticks(bs, key) * factor
    return -_KEY_MAX <= ticks <= _KEY_MAX


@outlined
def _side_scales(books: Any, bs: Any, factor: Any) -> Any:
    """Whether every level of a side stays in the range of keys when its ticks are multiplied by `factor`."""
    side = books.sides[bs]
    if side.summary == _ZERO:
        return True
    lowest = _I(side.best)
    for block in range(_WINDOW // 64):
        start = _I(side.base) + block * 64
        word = books.words[_word_index(bs, _block(start))]
        if word != _ZERO:
            lowest = min(lowest, start + _I(count_trailing_zeros(word)))
    node = _I(side.far_head)
    while node != 0:
        lowest = min(lowest, _I(books.far[node].key))
        node = _I(books.far[node].next)
    return factor <= _KEY_MAX and _scales(bs, _I(side.best), factor) and _scales(bs, lowest, factor)


@outlined
def _scale_side(books: Any, bs: Any, factor: Any) -> Any:
    """Multiply the ticks of every level of a side; the far store has room for the whole window."""
    side = books.sides[bs]
    if side.summary == _ZERO:
        return
    _evict(books, bs, _I(side.base), _I(side.base) + _WINDOW)
    node = _I(side.far_head)
    while node != 0:
        _far_unlink(books, node)
        books.far[node].key = _key_of_ticks(bs, _key_of_ticks(bs, _I(books.far[node].key)) * factor)
        _far_link(books, node)
        node = _I(books.far[node].next)
    _move_down(books, bs, _far_best(books, bs))


@outlined
def _refine(books: Any, instrument: Any, price: Any) -> Any:
    """Give a book a tick that divides `price`: 0, or a refusal. The configured tick comes back once the book is empty."""
    if price == NO_PRICE:
        return _I(_PRICE_RANGE)
    bid, ask = books.sides[2 * instrument], books.sides[2 * instrument + 1]
    empty = bid.summary == _ZERO and ask.summary == _ZERO
    before = _I(bid.tick)
    configured = books.ticks[instrument] if books.ticks[instrument] > 0 else _I(DEFAULT_TICK)
    tick, rest = configured if empty or before == 0 else before, abs(price)
    while rest != 0:
        tick, rest = rest, tick - (tick // rest) * rest
    if abs(price) // tick > _KEY_MAX:
        return _I(_PRICE_RANGE)
    if not empty and before != 0:
        factor = before // tick
        if not (_side_scales(books, 2 * instrument, factor) and _side_scales(books, 2 * instrument + 1, factor)):
            return _I(_PRICE_RANGE)
        if _far_room(books) < 2 * _WINDOW:
            return _I(_LEVELS_FULL)
        _scale_side(books, 2 * instrument, factor)
        _scale_side(books, 2 * instrument + 1, factor)
        for index in range(books.orders.size):
            order = books.orders[index]
            bs = _I(order.word & _BS_MASK)
            if order.qty != 0 and bs >> 1 == instrument:
                order.key = _key_of_ticks(bs, _key_of_ticks(bs, _I(order.key)) * factor)
        books.counters[_REFINEMENTS] += 1
    bid.tick = tick
    ask.tick = tick
    bid.per_tick = 1.0 / np.float64(tick)
    ask.per_tick = bid.per_tick
    for at in range(books.plans.size):  # made with the tick before
        books.plans[_U(at)].word = ~_ZERO
    return _I(0)


@inlined
def _exact(books: Any, bs: Any, price: Any) -> Any:
    """Make sure that the price is a whole number of ticks in range; 0 or a refusal."""
    side = books.sides[bs]
    if _ticks_of(side, price) * side.tick == price:
        return _I(0)
    return _refine(books, bs >> 1, price)


# ---------------------------------------------------------------- events


@inlined
def _rest(books: Any, event: Any, bs: Any) -> Any:
    """Put an order's quantity on its level of side `bs`; returns 0, or a refusal: then nothing has changed but perhaps the tick."""
    if _U(event.qty - 1) >= _ORDER_QTY_MAX:
        return _I(_BAD_QTY) if event.qty <= 0 else _I(_QTY_OVERFLOW)
    side = books.sides[bs]
    if side.flags & _BY_LEVEL:
        if side.summary != _ZERO:
            return _I(_WRONG_BOOK)
        side.flags &= np.uint32(~np.uint32(_BY_LEVEL))
    refusal = _exact(books, bs, event.price)
    if refusal < 0:
        return refusal
    return _level_add(books, bs, _key_of_ticks(bs, _ticks_of(side, event.price)), _U(event.qty))


@inlined
def _touches(side: Any, key: Any) -> Any:
    """1 if a change at `key` may have changed the BBO, else 0: it is below what is the best after it."""
    return _I(key >= _I(side.best)) | _I((side.flags & np.uint32(_TOUCHED)) != 0)


@inlined
def _new_order(books: Any, event: Any, bs: Any) -> Any:
    """ADD, and the new half of REPLACE."""
    hashed = _hash(books, event.id, bs >> 1)
    index = _place(books, hashed)
    if index < 0:
        return index
    refusal = _rest(books, event, bs)
    if refusal == 0:
        order = books.orders[_U(index)]
        order.word = (_tag(books, hashed) << _TAG_SHIFT) | (order.word & _MARK) | _U(bs)
        order.key = _key_of_ticks(bs, _ticks_of(books.sides[bs], event.price))
        order.qty = event.qty
        books.state[_ORDERS] += 1
        if _U(index) != _preferred(books, hashed):
            _note_displaced(books, index, hashed)
    return refusal


@inlined
def _old_order(books: Any, event: Any, kind: Any, hash: Any, index: Any) -> Any:
    """EXECUTE, CANCEL, DELETE, and the old half of REPLACE: take quantity off an order, and complete the event."""
    order = books.orders[_U(index)]
    bs, key, resting = _I(order.word & _BS_MASK), _I(order.key), _I(order.qty)
    qty = event.qty if kind in (_EXECUTE, _CANCEL) else resting
    if _U(qty - 1) >= _U(resting):
        return _I(_BAD_QTY) if qty <= 0 else _I(_QTY_EXCEEDS_ORDER)
    event.instrument = bs >> 1
    event.side = bs & 1
    if kind != _REPLACE:
        event.qty = qty
        if (event.flags & _PRICED) == 0:
            event.price = _price_of(books.sides[bs], bs, key)
    order.qty = resting - qty
    books.state[_ORDERS] -= qty == resting
    if qty == resting and _U(index) != _preferred(books, hash):
        _erase_displaced(books, index)
    _level_take(books, bs, key, _U(qty) + (_ONE_ORDER if qty == resting else _ZERO))
    return _I(0)


@outlined
def _modify(books: Any, event: Any, index: Any) -> Any:
    """MODIFY: the order rests at its new level before it leaves the old one."""
    if event.side > NO_SIDE:
        return _I(_BAD_SIDE)
    order = books.orders[_U(index)]
    bs = _I(order.word & _BS_MASK)
    to = bs if event.side == NO_SIDE else (bs & ~1) | _I(event.side)
    refusal = _rest(books, event, to)
    if refusal < 0:
        return refusal
    _level_take(books, bs, _I(order.key), _ONE_ORDER + _U(order.qty))
    order.word = (order.word & ~_ONE) | _U(to & 1)
    order.key = _key_of_ticks(to, _ticks_of(books.sides[to], event.price))
    order.qty = event.qty
    event.instrument = to >> 1
    event.side = to & 1
    return _I(0)


@outlined
def _apply_order(books: Any, event: Any, kind: Any) -> Any:
    """ADD, EXECUTE, CANCEL, DELETE, REPLACE, MODIFY in every case. All or nothing: what is new rests before what is old leaves."""
    old, index = _ZERO, _I(-1)
    if kind == _ADD:
        bs = _I(event.instrument) * 2 + _I(event.side)
        if _I(event.instrument) >= books.ticks.size or event.side > 1:
            return _I(_BAD_SIDE) if event.side > 1 else _I(_UNKNOWN_INSTRUMENT)
    else:
        old = _hash(books, _U(event.aux) if kind == _REPLACE else event.id, event.instrument)
        index = _find(books, old)
        if index < 0:
            return _I(_UNKNOWN_ORDER)
        bs = _I(books.orders[_U(index)].word & _BS_MASK)
        if _I(event.instrument) != bs >> 1 and event.instrument != NO_INSTRUMENT:
            return _I(_OTHER_INSTRUMENT)
        if kind == _MODIFY:
            return _modify(books, event, index)
    if kind in (_ADD, _REPLACE):
        refusal = _new_order(books, event, bs)
        if refusal < 0 or kind == _ADD:
            return refusal
    return _old_order(books, event, kind, old, index)


@inlined
def _apply_level(books: Any, event: Any) -> Any:
    """LEVEL: set the quantity at a price; removing a level that is not there is no fault. Returns as :func:`book_apply` does."""
    if _I(event.instrument) >= books.ticks.size or event.side > 1:
        return _I(_BAD_SIDE) if event.side > 1 else _I(_UNKNOWN_INSTRUMENT)
    if event.qty < 0:
        return _I(_BAD_QTY)
    bs = _I(event.instrument) * 2 + _I(event.side)
    side = books.sides[bs]
    if (side.flags & _BY_LEVEL) == 0:
        if side.summary != _ZERO:
            return _I(_WRONG_BOOK)
        side.flags |= np.uint32(_BY_LEVEL)
    refusal = _exact(books, bs, event.price)
    if refusal < 0:
        return refusal
    key = _key_of_ticks(bs, _ticks_of(side, event.price))
    if not _in_window(side, key):
        refusal = _level_outside(books, bs, key, _U(event.qty), False)
        return refusal if refusal < 0 else _I(1)
    index = _level_index(bs, key)
    before = books.levels[index]
    books.levels[index] = _U(event.qty)
    if (before == _ZERO) != (event.qty == 0):
        _toggle(books, side, bs, key)
    return _touches(side, key)


@outlined
def _clear_levels(books: Any, bs: Any) -> Any:
    """Empty the levels of a side; its published BBO stays as the last word to subscribers."""
    side = books.sides[bs]
    for block in range(_WINDOW // 64):
        index = _word_index(bs, _U(block))
        if books.words[index] != _ZERO:
            books.words[index] = _ZERO
            for slot in range(block * 64, block * 64 + 64):
                books.levels[_level_index(bs, slot)] = _ZERO
    while side.far_head != 0:
        _far_remove(books, _I(side.far_head))
    side.summary = _ZERO
    side.flags &= np.uint32(~np.uint32(_BY_LEVEL))


@outlined
def _clear_orders(books: Any, first: Any, end: Any, side: Any) -> Any:
    """Forget the orders of the sides first <= bs < end (`side` only, unless that is NO_SIDE): one pass over the table."""
    slots = _ONE << _U(books.slot_bits)
    for at in range(books.orders.size):
        order = books.orders[at]
        bs = _I(order.word & _BS_MASK)
        # a spilled order that is erased may be replaced by a later one: look at the place again
        while order.qty != 0 and first <= bs < end and (side == NO_SIDE or bs & 1 == side):
            order.qty = 0
            books.state[_ORDERS] -= 1
            if _U(at) >= slots or ((order.word >> _TAG_SHIFT) ^ _U(at)) & _THREE != _ZERO:
                _erase_displaced(books, at)
            bs = _I(order.word & _BS_MASK)


@outlined
def _clear(books: Any, event: Any) -> Any:
    """CLEAR: empty one side or both, of one instrument or of all; both sides: no longer stale."""
    if event.side > NO_SIDE:
        return _I(_BAD_SIDE)
    every = event.instrument == ALL_INSTRUMENTS
    first = _I(0) if every else _I(event.instrument) * 2
    end = _I(books.sides.size) if every else first + 2
    orders = False
    for bs in range(first, end):
        if event.side == NO_SIDE or bs & 1 == event.side:
            if books.sides[bs].summary != _ZERO:
                orders = orders or (books.sides[bs].flags & _BY_LEVEL) == 0
                _clear_levels(books, bs)
            if event.side == NO_SIDE:
                books.sides[bs].flags &= np.uint32(~np.uint32(_STALE))
            books.sides[bs].flags |= np.uint32(_TOUCHED)
            books.sides[bs ^ 1].flags |= np.uint32(_TOUCHED)
    if orders:
        _clear_orders(books, first, end, _I(event.side))
    return _I(0)


@outlined
def _apply_state(books: Any, event: Any, kind: Any) -> Any:
    """CLEAR, STATUS (an unknown status changes nothing), GAP (all books, those not seen yet too, or one)."""
    every = event.instrument == ALL_INSTRUMENTS
    if kind == _GAP and every:
        for bs in range(books.sides.size):
            books.sides[_U(bs)].flags |= np.uint32(_TOUCHED | (_STALE if bs & 1 == 0 else 0))
        return _I(0)
    if _I(event.instrument) >= books.ticks.size and not (kind == _CLEAR and every):
        return _I(_UNKNOWN_INSTRUMENT)
    if kind == _CLEAR:
        return _clear(books, event)
    bid = books.sides[_I(event.instrument) * 2]
    if kind == _GAP:
        bid.flags |= np.uint32(_STALE)
    elif event.aux == _STATUS_HALTED or event.aux == _STATUS_PAUSED or event.aux == _STATUS_QUOTE_ONLY:
        bid.flags |= np.uint32(_HALTED)
    elif event.aux != _STATUS_UNKNOWN:
        bid.flags &= np.uint32(~np.uint32(_HALTED))
    return _I(1)


@outlined
def _apply_any(books: Any, event: Any, kind: Any) -> Any:
    """Any event, by the complete rules; counts a refusal. Whatever was applied may have touched the BBO: 1."""
    if kind <= _MODIFY:
        result = _apply_order(books, event, kind)
    elif kind == _LEVEL:
        result = _apply_level(books, event)
    else:
        result = _apply_state(books, event, kind)
    if result < 0:
        books.counters[-result] += 1
        return result
    return _I(1)


@inlined
def _choose(mask: Any, yes: Any, no: Any) -> Any:
    """`yes` where the mask is all ones, `no` where it is zero: a choice that stays out of the branch predictor."""
    return (yes & mask) | (no & ~mask)


@inlined
def _order_named(books: Any, event: Any) -> Any:
    """Hash of the order that an event needs first: the old one of a REPLACE."""
    return _hash(books, _U(event.aux) if event.kind == _REPLACE else event.id, event.instrument)


@inlined
def _side_named(books: Any, event: Any) -> Any:
    """Index of the side that the wire names; some side of the shard if it names none."""
    return min(_U(event.instrument) * _TWO + _U(event.side & 1), _U(books.sides.size - 1))


@inlined
def book_prefetch(books: Any, event: Any) -> Any:
    """Hint, to be given `FAR_AHEAD` events ahead: the order and the side that an event names will be looked up."""
    prefetch(books.orders, _I(_preferred(books, _order_named(books, event))))
    prefetch(books.sides, _I(_side_named(books, event)))


@inlined
def _plan(books: Any, event: Any, plan: Any) -> Any:
    """Look up what an event is about: its order, or the level it names. Only a guess until :func:`_apply_usual` has looked."""
    hashed = _order_named(books, event)
    slot = _preferred(books, hashed)
    order = books.orders[slot]
    wire = _LEVEL_ON_WIRE[event.kind]
    named = _U(event.instrument) * _TWO + _U(event.side)
    side = books.sides[_side_named(books, event)]
    bs = _choose(wire, named, order.word) & _BS_MASK
    key = _I(_choose(wire, _U(_key_of_ticks(bs, _ticks_of(side, event.price))), _U(order.key)))
    plan.word = (_tag(books, hashed) << _TAG_SHIFT) | bs
    plan.slot = slot
    plan.key = key
    level = _level_index(bs, key)
    plan.level = level
    return bs, key, level


@inlined
def book_plan(books: Any, event: Any, at: Any) -> Any:
    """Look up `NEAR_AHEAD` events ahead what event number `at` is about, for :func:`book_apply_planned`, and ask for its level.

    To be called after :func:`book_prefetch`. What happens in between does no harm: a plan that no longer holds is dropped.
    """
    bs, key, level = _plan(books, event, books.plans[_U(at) & _U(PLANS - 1)])
    prefetch(books.sides, _I(bs))
    prefetch(books.levels, _I(level))
    prefetch(books.words, _I(_word_index(bs, _block(key))))


@inlined
def _apply_usual(books: Any, event: Any, kind: Any, plan: Any) -> Any:
    """ADD, EXECUTE, CANCEL, DELETE as they nearly always are; -1, and nothing done, if this one is not; else as :func:`book_apply`.

    Usual is: the order in its preferred slot, the level in the window, every field in bounds. Which of the four kinds comes next cannot be
    predicted, so there is no branch on it; the only doubtful branch is whether a level comes or goes.
    """
    adds = _ZERO - _U(kind == _ADD)
    order = books.orders[_U(plan.slot)]
    planned, word, resting, instrument = plan.word, order.word, _U(order.qty), _U(event.instrument)
    key = _I(plan.key)
    bs = planned & _BS_MASK
    misplaced = _choose(adds, resting | (word & _MARK), ((word ^ planned) & ~_MARK) | _U(order.key ^ plan.key))
    misnamed = (instrument ^ (bs >> _ONE)) & (adds | (_ZERO - _U(event.instrument != NO_INSTRUMENT)))
    if (misplaced | misnamed != _ZERO) | (bs >= _U(books.sides.size)):
        return _I(-1)
    side = books.sides[bs]
    price = _price_of(side, bs, key)
    qty = _choose(_ZERO - _U(kind == _DELETE), resting, _U(event.qty))
    index = _U(plan.level)
    before = books.levels[index]
    unusual = adds & (_U(price ^ event.price) | _U(side.flags & _BY_LEVEL) | (before & _NEARLY_FULL))
    unusual |= (_U(key - _I(side.base)) >> _WINDOW_SHIFT) | _U(event.flags & _PRICED)
    if (unusual != _ZERO) | (qty - _ONE >= resting | (adds & _ORDER_QTY_MAX)):  # an empty slot has no quantity: refused here
        return _I(-1)
    signed = (qty ^ ~adds) - ~adds
    left = resting + signed
    more = (adds & _ONE) - _U(left == _ZERO)
    after = before + signed + (more << _QTY_SHIFT)
    books.state[_ORDERS] += _I(more)
    order.word = planned | (word & _MARK)
    order.key = key
    order.qty = left
    books.levels[index] = after
    event.instrument = bs >> _ONE
    event.side = bs & _ONE
    event.qty = qty
    event.price = price
    if (before == _ZERO) | (after == _ZERO):
        _toggle(books, side, bs, key)
    return _touches(side, key)


@inlined
def _replace_usual(books: Any, event: Any, plan: Any) -> Any:
    """REPLACE as it nearly always is (see :func:`_apply_usual`); -1, and nothing done, if this one is not."""
    hashed = _hash(books, event.id, event.instrument)
    old, new = books.orders[_U(plan.slot)], books.orders[_preferred(books, hashed)]
    word, resting, qty, instrument = old.word, _U(old.qty), _U(event.qty), _U(event.instrument)
    bs = plan.word & _BS_MASK
    misplaced = ((word ^ plan.word) & ~_MARK) | _U(old.key ^ plan.key) | _U(new.qty) | (new.word & _MARK)
    misnamed = (instrument ^ (bs >> _ONE)) & (_ZERO - _U(event.instrument != NO_INSTRUMENT))
    if (misplaced | misnamed != _ZERO) | (bs >= _U(books.sides.size)) | (resting == _ZERO):
        return _I(-1)
    side = books.sides[bs]
    before_key, key = _I(plan.key), _key_of_ticks(bs, _ticks_of(side, event.price))
    from_index, to_index = _U(plan.level), _level_index(bs, key)
    before = books.levels[to_index]
    outside = _U(key - _I(side.base)) | _U(before_key - _I(side.base))
    unusual = _U(_price_of(side, bs, key) ^ event.price) | _U(side.flags & _BY_LEVEL) | (before & _NEARLY_FULL) | (outside >> _WINDOW_SHIFT)
    if (unusual != _ZERO) | (qty - _ONE >= _ORDER_QTY_MAX):
        return _I(-1)
    new.word = (_tag(books, hashed) << _TAG_SHIFT) | bs
    new.key = key
    new.qty = qty
    old.qty = 0
    books.levels[to_index] = before + (_ONE_ORDER + qty)
    if before == _ZERO:
        _toggle(books, side, bs, key)
    left = books.levels[from_index] - (_ONE_ORDER + resting)
    books.levels[from_index] = left
    if left == _ZERO:
        _toggle(books, side, bs, before_key)
    event.instrument = bs >> _ONE
    event.side = bs & _ONE
    return _touches(side, max(key, before_key))


@inlined
def _apply_plan(books: Any, event: Any, kind: Any, plan: Any) -> Any:
    """An order event with its plan; returns as :func:`book_apply` does."""
    done = _I(-1)
    if kind == _REPLACE:
        done = _replace_usual(books, event, plan)
    elif kind != _MODIFY:
        done = _apply_usual(books, event, kind, plan)
    return done if done >= 0 else _apply_any(books, event, kind)


@inlined
def book_apply_planned(books: Any, event: Any, at: Any) -> Any:
    """Apply one event for which :func:`book_plan` has been called with the same `at`, at most ``PLANS - 1`` events ago.

    Same arguments and result as :func:`book_apply`; the outcome does not depend on the plan.
    """
    kind = event.kind
    if _U(kind - _ADD) <= _U(_MODIFY - _ADD):
        return _apply_plan(books, event, kind, books.plans[_U(at) & _U(PLANS - 1)])
    return _apply_other(books, event, kind)


@inlined
def _apply_other(books: Any, event: Any, kind: Any) -> Any:
    """Every kind but the orders'."""
    if kind == _LEVEL:
        result = _apply_level(books, event)
        if result < 0:
            books.counters[-result] += 1
        return result
    if kind not in (_CLEAR, _STATUS, _GAP):
        return _I(0)
    return _apply_any(books, event, kind)


@inlined
def book_apply(books: Any, event: Any) -> Any:
    """Apply one event to its book and complete in place what the wire leaves out.

    Args:
        books: the :class:`Books`.
        event: an ``EVENT`` record. EXECUTE, CANCEL, DELETE get instrument, side, price (unless PRICED) and, DELETE, the quantity
            of their order; REPLACE and MODIFY get instrument and side.

    Returns:
        int64: the negative of a :class:`Refusal`, which is counted; a refused event changes no order and no level. Else 1 if the
        BBO may have changed (ask :func:`bbo_update`), 0 if it has not. Kinds that do not concern books (TRADE, QUOTE, TIMER, ...)
        return 0. A GAP of all instruments returns 1 and concerns the BBO of every one.
    """
    kind = event.kind
    if _U(kind - _ADD) <= _U(_MODIFY - _ADD):
        plan = books.plans[_U(PLANS)]
        _plan(books, event, plan)
        return _apply_plan(books, event, kind, plan)
    return _apply_other(books, event, kind)


# ---------------------------------------------------------------- the best bid and offer


@inlined
def _level_qty(books: Any, bs: Any, word: Any) -> Any:
    return _I(word) if books.sides[bs].flags & _BY_LEVEL else _I(word & _QTY_MASK)


@outlined
def renumber_orders(old: Any, new: Any) -> None:
    """Put the resting orders of `old` into the tables that :func:`renumbered` has made for `new`: at a change of the configuration."""
    for k in range(new.state.size):
        new.state[k] = old.state[k]
    new.state[_DISPLACED] = 0
    new.state[_SPILLED] = 0
    slots = _ONE << _U(old.slot_bits)
    for at in range(old.orders.size):
        order = old.orders[_U(at)]
        if order.qty == 0:
            continue
        tag = order.word >> _TAG_SHIFT
        hashed = ((tag >> _TWO) << _U(old.slot_bits)) | (_U(at) & ~_THREE) | (tag & _THREE)
        if _U(at) >= slots:
            hashed = old.spill_hashes[_U(at) - slots]
        bs = order.word & _BS_MASK
        fresh = _hash(new, _id_of(old, hashed), bs >> _ONE)
        index = _place(new, fresh)
        if index < 0:  # its set and the spill are full: no more than one in many millions
            new.counters[_U(-index)] += 1
            new.state[_ORDERS] -= 1
            continue
        there = new.orders[_U(index)]
        there.word = (_tag(new, fresh) << _TAG_SHIFT) | (there.word & _MARK) | bs
        there.key = order.key
        there.qty = order.qty
        if _U(index) != _preferred(new, fresh):
            _note_displaced(new, index, fresh)
    for at in range(new.plans.size):
        new.plans[_U(at)].word = ~_ZERO


@inlined
def book_best(books: Any, instrument: Any, side: Any) -> Any:
    """Best price (i64, 1e-9) and quantity (i64) of a side; (NO_PRICE, 0) where there is none."""
    bs = _I(instrument) * 2 + _I(side)
    record = books.sides[bs]
    if record.summary == _ZERO:
        return _I(NO_PRICE), _I(0)
    key = _I(record.best)
    return _price_of(record, bs, key), _level_qty(books, bs, books.levels[_level_index(bs, key)])


@inlined
def book_state(books: Any, instrument: Any) -> Any:
    """State flags of an instrument, u32: ``Flag.STALE``, ``Flag.HALTED``."""
    return books.sides[_I(instrument) * 2].flags & np.uint32(_STALE | _HALTED)


@inlined
def bbo_defer(books: Any, instrument: Any) -> Any:
    """Instead of :func:`bbo_update`, where more changes of the same moment follow: the next event that is applied returns 1."""
    books.sides[_I(instrument) * 2].flags |= np.uint32(_TOUCHED)
    books.sides[_I(instrument) * 2 + 1].flags |= np.uint32(_TOUCHED)


@inlined
def bbo_deferred(books: Any, instrument: Any) -> Any:
    """Whether the BBO may differ from what was published though nothing has happened since."""
    return books.sides[_I(instrument) * 2].flags & np.uint32(_TOUCHED) != 0


@inlined
def bbo_update(books: Any, instrument: Any) -> Any:
    """Whether the BBO (prices, quantities, STALE, HALTED) differs from the last time this was asked; remembers it.

    The first call for an instrument returns true unless its book is empty and in no special state.
    """
    bid, ask = books.sides[_I(instrument) * 2], books.sides[_I(instrument) * 2 + 1]
    bid_price, bid_qty = book_best(books, instrument, 0)
    ask_price, ask_qty = book_best(books, instrument, 1)
    state = book_state(books, instrument)
    bid.flags &= np.uint32(~np.uint32(_TOUCHED))
    ask.flags &= np.uint32(~np.uint32(_TOUCHED))
    if bid.published_flags == 0 and bid_qty | ask_qty == 0 and state == 0:
        return False
    state |= np.uint32(_PUBLISHED)
    changed = (bid_price ^ bid.published_price) | (bid_qty ^ bid.published_qty) | _I(state ^ bid.published_flags)
    changed |= (ask_price ^ ask.published_price) | (ask_qty ^ ask.published_qty)
    if changed == 0:
        return False
    bid.published_price = bid_price
    bid.published_qty = bid_qty
    ask.published_price = ask_price
    ask.published_qty = ask_qty
    bid.published_flags = state
    return True


@inlined
def bbo_fill(books: Any, instrument: Any, out: Any) -> Any:
    """Write the BBO that :func:`bbo_update` found into `out` (an ``EVENT`` record, read as ``QUOTE``).

    Kind, instrument, side, flags, prices and quantities; an absent side has price NO_PRICE and quantity 0. Flags: CROSSED (counted),
    LOCKED, STALE, HALTED. `seq` and times are the caller's.
    """
    bid, ask = books.sides[_I(instrument) * 2], books.sides[_I(instrument) * 2 + 1]
    bid_price, ask_price = bid.published_price, ask.published_price
    flags = bid.published_flags & np.uint32(_STALE | _HALTED)
    if bid_price >= ask_price and ask_price != NO_PRICE:
        flags |= np.uint32(_CROSSED_FLAG if bid_price > ask_price else _LOCKED)
        books.counters[_CROSSED] += bid_price > ask_price
    out.instrument = instrument
    out.kind = _BBO
    out.side = NO_SIDE
    out.flags = flags
    out.price = bid_price
    out.qty = bid.published_qty
    out.aux = ask_price
    out.id = ask.published_qty


# ---------------------------------------------------------------- for people: whole books from Python


def book_tick(books: Books, instrument: int) -> int:
    """The tick (1e-9) that the book counts in now: the configured one, or a finer one that all its prices are multiples of."""
    return int(books.sides[2 * instrument]["tick"]) or int(books.ticks[instrument]) or DEFAULT_TICK


def _side_levels(books: Books, bs: int) -> list[tuple[int, int, int]]:
    """(price, qty, orders) of every level of a side, best first."""
    side = books.sides[bs]
    keys = int(side["base"]) + np.arange(_WINDOW)
    ticks = ~keys if bs & 1 else keys
    places = ((ticks & (_WINDOW - 64)) << 1) | (ticks & 63) | (bs & 1) << 6 | (bs >> 1) * 2 * _WINDOW
    words = books.levels[places]
    found = [(int(keys[at]), int(words[at])) for at in np.flatnonzero(words)]
    node = int(side["far_head"])
    while node:
        found.append((int(books.far[node]["key"]), int(books.far[node]["word"])))
        node = int(books.far[node]["next"])
    tick, by_level = int(side["tick"]), bool(side["flags"] & _BY_LEVEL)
    return [
        ((~key if bs & 1 else key) * tick, word if by_level else word & int(_QTY_MASK), 0 if by_level else word >> _QTY_BITS)
        for key, word in sorted(found, reverse=True)
    ]


def top(books: Books, instrument: int, depth: int) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """The best `depth` levels of each side, best first, as (price in 1e-9, quantity, orders); orders is 0 in a book by level."""
    return _side_levels(books, 2 * instrument)[:depth], _side_levels(books, 2 * instrument + 1)[:depth]


def levels_count(books: Books, instrument: int) -> tuple[int, int]:
    """Number of bid and ask levels."""
    return len(_side_levels(books, 2 * instrument)), len(_side_levels(books, 2 * instrument + 1))


def resting_orders(books: Books, instrument: int | None = None) -> int:
    """Number of resting orders of an instrument, or of all."""
    if instrument is None:
        return int(books.state[_ORDERS])
    return sum(level[2] for bs in (2 * instrument, 2 * instrument + 1) for level in _side_levels(books, bs))


def counts(books: Books) -> dict[str, int]:
    """The counters by name: refusals by reason, window moves, tick refinements, crossed BBOs."""
    return {name: int(value) for name, value in zip(COUNTER_NAMES[1:], books.counters[1:], strict=True)}


@loop
def apply_events(books: Any, events: Any, results: Any, quotes: Any) -> Any:
    """Apply a whole ``EVENT`` array, from Python or a test, planned ahead as the shard loop does it.

    Args:
        events: completed in place.
        results: int64, one per event: 0, or the negative of a :class:`Refusal`.
        quotes: ``EVENT`` array for the BBO after each event that changed one, with that event's times and `seq`; stops growing when full.

    Returns:
        Number of quotes written.
    """
    written = _I(0)
    for i in range(min(events.size, NEAR_AHEAD)):
        book_plan(books, events[_U(i)], i)
    for i in range(events.size):
        if i + NEAR_AHEAD < events.size:
            book_plan(books, events[_U(i + NEAR_AHEAD)], i + NEAR_AHEAD)
        event = events[_U(i)]
        result = book_apply_planned(books, event, i)
        results[_U(i)] = min(result, _I(0))
        if result > 0 and written < quotes.size and event.instrument < books.ticks.size and bbo_update(books, event.instrument):
            quote = quotes[_U(written)]
            bbo_fill(books, event.instrument, quote)
            quote.seq = event.seq
            quote.ts_event = event.ts_event
            quote.ts_recv = event.ts_recv
            written += 1
    return written
