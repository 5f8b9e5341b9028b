"""Kernels of the decoders that come from an SBE schema: events of one message, decimals, implied books, ladders of price levels.

A **ladder** is a side of a book as the venue counts it, by position: the price at each of its first levels. A venue such as CME says
"insert at level 3" and leaves it to the client that the last level falls off. Books here are kept by price, so a ladder turns such a
change into LEVEL events: what the change says, and the removal of the level that it pushes out.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

from tickmesh.node.event import NO_INSTRUMENT, NO_PRICE, NO_SIDE, Flag, Kind
from tickmesh.node.feed import BAD_FIELD, FILTERED_MESSAGES, RESOLVED_BELOW, SINCE, SOURCE, UNBOUND, bind_code, find_code, resolve_code
from tickmesh.node.instruments import FILTERED, code_words
from tickmesh.node.recovery import NEVER, known_since, want_books
from tickmesh.transports.toolbox import copy_record, count_leading_zeros, inlined, outlined

RESUME, HAS_HELD = 12, 13
"""Indices of ``Feed.state``: how many entries of the message at hand are done; whether ``Feed.held`` has its latest event."""
IMPLIED = np.uint64(1 << 62)
"""In a numeric code: the instrument's book of implied orders, which is an instrument of its own."""
IMPLIED_SUFFIX = ".I"
DEPTH_MAX = 32


class Change(IntEnum):
    """What happens to a ladder."""

    INSERT = 0
    """A new level; those from there on move down, the last one falls off."""
    SET = 1
    """The level has another quantity (or price)."""
    REMOVE = 2
    """The level is gone; those below move up."""
    REMOVE_ALL = 3
    """The side is empty."""
    REMOVE_TO = 4
    """The levels from the best one to this one are gone; those below move up."""


_INSERT, _SET, _REMOVE, _REMOVE_ALL, _REMOVE_TO = (np.int64(change) for change in Change)
_MORE, _SNAPSHOT = np.uint16(Flag.MORE), np.uint16(Flag.SNAPSHOT)
_LEVEL, _CLEAR, _GAP, _CODE = np.uint8(Kind.LEVEL), np.uint8(Kind.CLEAR), np.uint8(Kind.GAP), np.uint8(Kind.CODE)
_NO_SIDE = np.uint8(NO_SIDE)
_FILTERED, _NONE = np.uint32(FILTERED), np.uint32(NO_INSTRUMENT)
_HOLE = np.int64(NO_PRICE)
_ONE, _ZERO, _EIGHT = np.uint64(1), np.uint64(0), np.uint64(8)
_SUFFIX = np.uint64(int.from_bytes(IMPLIED_SUFFIX.encode(), "little"))
_LIMIT = np.int64((1 << 63) - 1)
_TENS = np.array([10**n for n in range(19)], np.int64)


# ---------------------------------------------------------------- events


@inlined
def put_event(
    out: Any, n: Any, first: Any, seq: Any, ts_event: Any, ts_recv: Any, instrument: Any, kind: Any, side: Any, flags: Any,
    price: Any, qty: Any, order: Any, aux: Any,
) -> Any:  # fmt: skip
    """Write an event at ``out[n]``; returns n + 1.

    Events of one message from `first` on belong together: a change of a book that another one of the same instrument follows gets MORE,
    so that no BBO is told between them.
    """
    e = out[np.uint64(n)]
    e.seq, e.ts_event, e.ts_recv, e.instrument = np.uint64(seq), np.int64(ts_event), np.int64(ts_recv), np.uint32(instrument)
    e.kind, e.side, e.flags = np.uint8(kind), np.uint8(side), np.uint16(flags)
    e.price, e.qty, e.id, e.aux = np.int64(price), np.int64(qty), np.uint64(order), np.int64(aux)
    return tie(out, n, n + 1, first)


@inlined
def tie(out: Any, n: Any, end: Any, first: Any) -> Any:
    """Give the event before ``out[n]`` MORE, if both change the book of one instrument and ``out[n:end]`` is not empty. Returns `end`."""
    if first < n < end:
        e, before = out[np.uint64(n)], out[np.uint64(n - 1)]
        if e.kind <= _LEVEL and before.instrument == e.instrument and before.kind <= _LEVEL:
            before.flags |= _MORE
    return end


@outlined
def hold_last(feed: Any, out: Any, n: Any, first: Any) -> Any:
    """In the middle of a message with `out` full: keep its last change of a book back, since it may get MORE; returns the new n."""
    if n > first and out[np.uint64(n - 1)].kind <= _LEVEL:
        copy_record(feed.held, 0, out, n - 1)
        feed.state[HAS_HELD] = 1
        return n - 1
    return n


@outlined
def take_held(feed: Any, out: Any, n: Any) -> Any:
    """Go on in a message: what was kept back comes first; returns the new n."""
    copy_record(out, n, feed.held, 0)
    feed.state[HAS_HELD] = 0
    return n + 1


@outlined
def find_template(templates: Any, template: Any) -> Any:
    """Index of a template id in a sorted array, or -1."""
    low, high = np.int64(0), np.int64(templates.size)
    while low < high:
        middle = (low + high) >> 1
        if templates[np.uint64(middle)] < template:
            low = middle + 1
        else:
            high = middle
    if low < templates.size and templates[np.uint64(low)] == template:
        return low
    return np.int64(-1)


# ---------------------------------------------------------------- decimals


@outlined
def rescale(mantissa: Any, exponent: Any, digits: Any) -> Any:
    """``mantissa * 10**(exponent + digits)`` exactly: ``(value, whether it is a whole number of 64 bits)``."""
    mantissa, shift = np.int64(mantissa), np.int64(exponent) + np.int64(digits)
    if mantissa == 0:
        return np.int64(0), True
    if shift > 18 or shift < -18:
        return np.int64(0), False
    factor = _TENS[np.uint64(abs(shift))]
    if shift < 0:
        value = mantissa // factor
        return value, value * factor == mantissa
    limit = _LIMIT // factor
    return mantissa * factor, -limit <= mantissa <= limit


# ---------------------------------------------------------------- instruments


@outlined
def suffixed(w0: Any, w1: Any, w2: Any) -> Any:
    """A symbol's words with ``.I`` behind; of a symbol longer than 22 bytes the end is lost."""
    used = np.uint64(0)
    word = w2 if w2 != _ZERO else w1 if w1 != _ZERO else w0
    if word != _ZERO:
        used = _EIGHT - (count_leading_zeros(word) >> np.uint64(3))
    used += np.uint64(16) if w2 != _ZERO else np.uint64(8) if w1 != _ZERO else _ZERO
    used = min(used, np.uint64(22))
    for i in range(2):
        at = used + np.uint64(i)
        byte = (_SUFFIX >> np.uint64(8 * i)) & np.uint64(255)
        shift = (at & np.uint64(7)) << np.uint64(3)
        clear, put = ~(np.uint64(255) << shift), byte << shift
        if at < np.uint64(8):
            w0 = (w0 & clear) | put
        elif at < np.uint64(16):
            w1 = (w1 & clear) | put
        else:
            w2 = (w2 & clear) | put
    return w0, w1, w2


@outlined
def resolve_book(feed: Any, entry: Any, number: Any, tick: Any, seq: Any, ts_event: Any, ts_recv: Any, out: Any, n: Any) -> Any:
    """Instrument of a code whose map `entry` is not one, the implied book of another code included; see :func:`feed.resolve_code`."""
    if number & IMPLIED == _ZERO:
        return resolve_code(feed, entry, number, _ZERO, _ZERO, _ZERO, tick, seq, ts_event, ts_recv, out, n)
    real = number & ~IMPLIED
    found = find_code(feed, real)
    if found == _FILTERED:
        feed.state[FILTERED_MESSAGES] += 1
        return found, n
    if found < np.uint32(feed.instruments.records.size):
        record = feed.instruments.records[found]
        w0, w1, w2 = record.w0, record.w1, record.w2
        tick = record.tick_size
    else:
        w0, w1, w2 = code_words(real)
    w0, w1, w2 = suffixed(w0, w1, w2)
    return resolve_code(feed, entry, number, w0, w1, w2, tick, seq, ts_event, ts_recv, out, n)


@outlined
def define(
    feed: Any, number: Any, w0: Any, w1: Any, w2: Any, tick: Any, seq: Any, ts_event: Any, ts_recv: Any, out: Any, n: Any
) -> Any:  # fmt: skip
    """A directory message binds a code to a symbol; its implied book is named anew when it comes. Returns ``(instrument, n)``.

    A book by position that had another name so far has ended: what rests in it is not known under the new name, whose book is therefore
    stale until a snapshot brings it. So is one of which nothing has been let through as long as it had no name.
    """
    before, implied = find_code(feed, number), find_code(feed, number | IMPLIED)
    instrument, n = resolve_code(feed, UNBOUND, number, w0, w1, w2, tick, seq, ts_event, ts_recv, out, n)
    if before == instrument:
        return instrument, n
    if implied != UNBOUND:
        bind_code(feed, number | IMPLIED, UNBOUND)
    if instrument == _NONE or feed.known.size == 1:
        return instrument, n
    told = n
    if before < RESOLVED_BELOW:
        told = _end_book(feed, before, seq, ts_event, ts_recv, out, told)
    if implied < RESOLVED_BELOW:
        told = _end_book(feed, implied, seq, ts_event, ts_recv, out, told)
    if instrument == _FILTERED:
        return instrument, told
    if told > n or before == _FILTERED:
        feed.known[instrument] = NEVER
        told = put_event(out, told, told, seq, ts_event, ts_recv, instrument, _GAP, _NO_SIDE, 0, 0, 0, 0, 0)
    if known_since(feed.known, feed.state[SINCE], instrument) == NEVER:
        want_books(feed.recovery)
    return instrument, told


@outlined
def _end_book(feed: Any, instrument: Any, seq: Any, ts_event: Any, ts_recv: Any, out: Any, n: Any) -> Any:
    """CLEAR of a book that has another name from now on, if there is anything in it, or may be for those who have kept it over our restart;
    returns the new n."""
    levels = feed.ladders.size // feed.known.size
    base, some = np.int64(instrument) * levels, known_since(feed.known, feed.state[SINCE], instrument) == NEVER
    for i in range(levels):
        some = some or feed.ladders[base + i] != _HOLE
        feed.ladders[base + i] = _HOLE
    if some:
        learn_ladder(feed, instrument, seq)
        n = put_event(out, n, n, seq, ts_event, ts_recv, instrument, _CLEAR, _NO_SIDE, 0, 0, 0, 0, 0)
    return n


@outlined
def meet_book(feed: Any, instrument: Any, number: Any, seq: Any, ts_event: Any, ts_recv: Any, out: Any, n: Any) -> Any:
    """A code has been resolved for the first time: say what is known of its book, if that is not what is known of all; returns the new n.

    An implied book of which nothing was heard before is known since its instrument is: the snapshot that brought the one has said that
    there is nothing in the other. Any other one that was not heard of before a gap has to come from a snapshot.
    """
    since = feed.state[SINCE]
    if feed.known[instrument] != 0:
        return n
    real = since
    if number & IMPLIED != _ZERO:
        found = find_code(feed, number & ~IMPLIED)
        real = known_since(feed.known, since, found) if found < RESOLVED_BELOW else since
    if real != NEVER and since != NEVER:
        return n
    feed.known[instrument] = real
    if real == NEVER:
        want_books(feed.recovery)
        return put_event(out, n, n, seq, ts_event, ts_recv, instrument, _GAP, _NO_SIDE, 0, 0, 0, 0, 0)
    return put_event(out, n, n, seq, ts_event, ts_recv, instrument, _CLEAR, _NO_SIDE, _SNAPSHOT, 0, 0, 0, 0)


@inlined
def data_word(word: Any, left: Any) -> Any:
    """Of eight bytes those that belong to text with `left` bytes from here on."""
    if left <= 0:
        return _ZERO
    if left >= 8:
        return word
    return word & ((_ONE << np.uint64(8 * left)) - _ONE)


# ---------------------------------------------------------------- ladders


@outlined
def clear_ladders(feed: Any, seq: Any) -> None:
    """Forget all levels: the venue has emptied its books with packet `seq`, from which on all are known; 0: a new session has begun."""
    for i in range(feed.ladders.size):
        feed.ladders[i] = _HOLE
    if seq == 0 or feed.state[SINCE] == NEVER:
        feed.state[SINCE] = seq
        for i in range(feed.known.size):
            feed.known[i] = 0
    for i in range(feed.known.size):
        if feed.known[i] == NEVER:
            feed.known[i] = seq


@outlined
def lose_ladders(feed: Any) -> None:
    """After a gap no book by position is known any more."""
    feed.state[SINCE] = NEVER
    for i in range(feed.known.size):
        feed.known[i] = 0


@outlined
def learn_ladder(feed: Any, instrument: Any, seq: Any) -> None:
    """With packet `seq` the venue says all of a book."""
    if known_since(feed.known, feed.state[SINCE], instrument) == NEVER:
        feed.known[instrument] = max(np.int64(seq), np.int64(1))


@outlined
def clear_ladder(feed: Any, instrument: Any, side: Any, depth: Any) -> None:
    """Forget an instrument's levels on a side, or with NO_SIDE on both."""
    base = np.int64(instrument) * 2 * depth
    for i in range(2 * depth):
        if side == _NO_SIDE or (i >= depth) == (side != np.uint8(0)):
            feed.ladders[base + i] = _HOLE


@inlined
def _removal(e: Any, price: Any) -> None:
    e.price, e.qty, e.aux = price, np.int64(0), np.int64(0)


@outlined
def _remove_to(feed: Any, base: Any, levels: Any, count: Any, out: Any, n: Any) -> Any:
    """Remove the best `count` levels; ``out[n]`` is the event to write them after. Returns the new n."""
    given = n
    for i in range(count):
        price = feed.ladders[base + i]
        if price != _HOLE:
            if n != given:
                copy_record(out, n, out, given)
            _removal(out[np.uint64(n)], price)
            n += 1
    for i in range(levels):
        feed.ladders[base + i] = feed.ladders[base + i + count] if i + count < levels else _HOLE
    for i in range(given, n - 1):
        out[np.uint64(i)].flags |= _MORE
    return n


@outlined
def _rare_change(feed: Any, change: Any, at: Any, levels: Any, depth: Any, out: Any, n: Any) -> Any:
    """The changes of many levels at once, and what is none; as :func:`put_level`, whose event is at ``out[n - 1]``."""
    e = out[np.uint64(n - 1)]
    if e.side > np.uint8(1) or change > _REMOVE_TO or change < 0 or (change != _REMOVE_ALL and np.uint64(at) >= np.uint64(levels)):
        feed.malformed[BAD_FIELD] += _ONE
        return n - 1
    if change == _REMOVE_TO:
        base = (np.int64(e.instrument) * 2 + np.int64(e.side)) * depth
        return _remove_to(feed, base, levels, np.int64(at) + 1, out, n - 1)
    clear_ladder(feed, e.instrument, e.side, depth)
    e.kind, e.price, e.qty, e.aux = _CLEAR, np.int64(0), np.int64(0), np.int64(0)
    return n


@inlined
def _close_up(prices: Any, base: Any, at: Any, last: Any, room: Any) -> None:
    """The levels behind `at` move up. All are looked at, whichever it is: a count that varies costs a misprediction."""
    for i in range(room - _ONE):
        moves = (i >= at) & (i < last)
        prices[base + i] = prices[base + i + _ONE] if moves else prices[base + i]
    prices[base + last] = _HOLE


@inlined
def _make_way(prices: Any, base: Any, at: Any, last: Any, room: Any) -> None:
    """The levels from `at` on move down."""
    for k in range(room - _ONE):
        below = room - _ONE - k
        moves = (below > at) & (below <= last)
        prices[base + below] = prices[base + below - _ONE] if moves else prices[base + below]


@inlined
def put_level(
    feed: Any, change: Any, position: Any, levels: Any, depth: Any, out: Any, n: Any, first: Any, seq: Any, ts_event: Any, ts_recv: Any,
    instrument: Any, side: Any, flags: Any, price: Any, qty: Any, order: Any, aux: Any,
) -> Any:  # fmt: skip
    """Apply a change to a ladder and write what it means for a book by price; see :func:`put_event` for the rest.

    Args:
        change: :class:`Change`.
        position: of the level, from 1.
        levels: that the venue shows of the instrument.
        depth: levels that a ladder has room for.

    Returns:
        The new n: of one change may come several events (at most `depth`), or none if it says nothing or is not possible.
    """
    prices, at = feed.ladders, np.uint64(position) - _ONE
    if side > np.uint8(1) or change > _REMOVE or change < 0 or at >= np.uint64(levels):
        end = put_event(out, n, n, seq, ts_event, ts_recv, instrument, _LEVEL, side, flags, price, qty, order, aux)
        return tie(out, n, _rare_change(feed, change, at, levels, depth, out, end), first)
    base = (np.uint64(instrument) * np.uint64(2) + np.uint64(side)) * np.uint64(depth)
    last, room, zero = np.uint64(levels) - _ONE, np.uint64(depth), np.int64(0)
    gone = prices[base + (last if change == _INSERT else at)]
    if change == _REMOVE:
        _close_up(prices, base, at, last, room)
        price, qty, aux = gone if gone != _HOLE else price, zero, zero
    else:
        if change == _INSERT:
            _make_way(prices, base, at, last, room)
        prices[base + at] = price
        if gone != _HOLE and gone != price:  # written at once: to copy the event and change the copy would wait for the event's stores
            n = put_event(out, n, first, seq, ts_event, ts_recv, instrument, _LEVEL, side, flags, gone, zero, order, zero)
    return put_event(out, n, first, seq, ts_event, ts_recv, instrument, _LEVEL, side, flags, price, qty, order, aux)


@outlined
def set_depth(feed: Any, instrument: Any, levels: Any, depth: Any, seq: Any, ts_event: Any, ts_recv: Any, out: Any, n: Any) -> Any:
    """A directory message says how many levels the venue shows of an instrument: told once, for who goes on later. Returns the new n."""
    record = feed.instruments.records[instrument]
    if not 0 < levels <= depth:
        return n
    feed.depths[instrument] = np.int64(levels)  # which may be new to the decoder, where a leader's journal has told the node
    if record.depth == levels:
        return n
    record.depth = np.int64(levels)
    source, code = np.uint16(feed.state[SOURCE]), record.code
    return put_event(out, n, n, seq, ts_event, ts_recv, instrument, _CODE, _NO_SIDE, source, 0, 0, code, levels)
