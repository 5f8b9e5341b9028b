"""JSON text, compiled: one pass over a message notes where the values of known keys are; exact decimals, times and ids out of text.

A :data:`Shape` says which keys each object of a venue's messages may have, and what is under them (:func:`make_shape`). :func:`scan` reads
a message along it and is strict: valid JSON of printable ASCII without spaces and escapes, each key once. What is not that, and numbers of
more than 18 digits, it leaves to the decoder in Python (:mod:`tickmesh.node.json_feed`): it says no, and nothing has changed.

A message ends with a byte below 32 behind it, and 64 more bytes can be read there.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import numpy as np

from tickmesh.node.event import ASK, BID
from tickmesh.node.fix_text import low_bytes, midnight_ns
from tickmesh.transports.toolbox import inlined, le32, le64, outlined

ABSENT, TEXT, NUMBER, TRUE, FALSE, NULL, ROWS, OBJECT, LIST = range(9)
"""Types of a value. ROWS: a list of price levels; LIST: of objects."""
NOTHING, PRICE, QTY, SIDE, ORDERS = range(5)
"""What a column of a price level is."""
ENTRIES_MAX, SLOTS_MAX, ROWS_MAX, _DEPTH_MAX = 64, 32, 4096, 4
"""Objects of a message (the outermost is entry 0); values of one; price levels of a message."""

KEY = np.dtype([(name, "<u8") for name in ("w0", "w1")] + [(name, "<i8") for name in ("size", "slot", "target", "columns", "roles")])
"""A key of at most 16 bytes (`w0`, `w1`, zero padded); `slot` -1: of no interest; `target`: the object under it, or -1; `columns` of the
price levels under it, each a role of four bits (0 columns: levels are objects of price and qty)."""
SPAN = np.dtype([("at", "<i8"), ("size", "<i8"), ("value", "<i8"), ("decimals", "<i8"), ("type", "<i8")])
"""A value: text is ``buf[at:at + size]``; a number `value` / 10**`decimals`; rows `at` to `at` + `size`; entries likewise."""
ROW = np.dtype([(name, "<i8") for name in ("price", "price_decimals", "qty", "qty_decimals", "orders", "side")]
               + [(name, "<i8") for name in ("price_at", "price_size", "qty_at", "qty_size")])  # fmt: skip
"""A price level: numbers as in :data:`SPAN`, and where their texts are."""

Shape = namedtuple("Shape", "keys firsts")
"""`keys` KEY, those of object k from ``firsts[k]`` to ``firsts[k + 1]``."""
Found = namedtuple("Found", "spans seen rows stack words")
"""What :func:`scan` fills: `spans` SPAN[entries, slots]; `seen` u64[entries], which of them hold; `rows` ROW; `stack` and `words` are its
own: objects that are open, and where it is."""
_STATE, _HINT, _ENTRY, _ENTRIES, _DEPTH, _ROWS = range(6)
"""Words: kind of the object at hand, the key to look for first, its entry; how many entries, open objects and rows there are."""

_I, _U = np.int64, np.uint64
_QUOTE, _COMMA, _COLON, _OPEN, _CLOSE, _FIRST, _LAST = (np.uint8(ord(c)) for c in '",:{}[]')
_BACKSLASH, _SPACE, _TILDE, _MINUS, _ZERO, _POINT, _DASH = (np.uint8(ord(c)) for c in "\\ ~-0.-")
_DIGITS_MAX = 18
POWERS = np.array([10**n for n in range(19)], np.int64)
LIMITS = np.array([((1 << 63) - 1) // 10**n for n in range(19)], np.int64)
_LETTER_E = np.uint8(ord("e"))
_WORDS = (b"true", b"null", b"fals", b"sell", b"buy")
_WORD_TRUE, _WORD_NULL, _WORD_FALS, _WORD_SELL, _WORD_BUY = (_U(int.from_bytes(word, "little")) for word in _WORDS)
_LOW24 = _U(0xFFFFFF)
_PRICE_KEY, _QTY_KEY = (_U(int.from_bytes(w, "little")) for w in (b'{"price"', b',"qty":'))
_LOW56 = _U((1 << 56) - 1)


# ---------------------------------------------------------------- shapes


class Under:
    """What may be under a key: an object or a list of objects (`target`), price levels (`columns`), a plain value."""

    def __init__(self, slot: int, target: int = -1, columns: tuple[int, ...] | None = None) -> None:
        self.slot, self.target, self.columns = slot, target, columns


def make_shape(objects: list[Mapping[str, int | Under]]) -> Any:
    """A :data:`Shape`: for each kind of object its keys and the slots of their values (-1: of no interest). The first is the message."""
    keys, firsts = [], [0]
    for names in objects:
        for name, given in names.items():
            under = given if isinstance(given, Under) else Under(given)
            raw = name.encode()
            assert len(raw) <= 16
            assert under.slot < SLOTS_MAX
            words = np.frombuffer(raw.ljust(16, b"\0"), "<u8")
            roles = sum(role << (4 * column) for column, role in enumerate(under.columns or ()))
            columns = -1 if under.columns is None else len(under.columns)
            keys.append((words[0], words[1], len(raw), under.slot, under.target, columns, roles))
        firsts.append(len(keys))
    return Shape(np.array(keys, KEY), np.array(firsts, np.int64))


def make_found() -> Any:
    """An empty :data:`Found`."""
    spans, seen = np.zeros((ENTRIES_MAX, SLOTS_MAX), SPAN), np.zeros(ENTRIES_MAX, np.uint64)
    return Found(spans, seen, np.zeros(ROWS_MAX, ROW), np.zeros((_DEPTH_MAX, 5), np.int64), np.zeros(6, np.int64))


# ---------------------------------------------------------------- pieces of text


@inlined
def at(buf: Any, p: Any) -> Any:
    """``buf[p]`` without a check for an index below zero."""
    return buf[_U(p)]


@inlined
def end_of_text(buf: Any, p: Any) -> Any:
    """Where the text that begins at p ends, its closing quote; -1: it holds what only Python understands."""
    while True:
        c = at(buf, p)
        if c == _QUOTE:
            return p
        if c < _SPACE or c > _TILDE or c == _BACKSLASH:
            return _I(-1)
        p += 1


@inlined
def decimal(buf: Any, p: Any) -> Any:
    """An unsigned decimal at p: ``(value, decimals, where it ends)``, or an end of -1; a point has digits on both sides."""
    begun, value, decimals = p, _I(0), _I(0)
    while True:
        digit = _I(at(buf, p)) - 48
        if digit < 0 or digit > 9:
            break
        value = value * 10 + digit
        p += 1
    whole = p - begun
    if at(buf, p) == _POINT:
        p += 1
        while True:
            digit = _I(at(buf, p)) - 48
            if digit < 0 or digit > 9:
                break
            value = value * 10 + digit
            decimals += 1
            p += 1
        if decimals == 0:
            return value, decimals, _I(-1)
    if whole == 0 or whole + decimals > _DIGITS_MAX:
        return value, decimals, _I(-1)
    return value, decimals, p


@inlined
def scaled(value: Any, decimals: Any, wanted: Any) -> Any:
    """``value / 10**decimals`` in units of ``10**-wanted``, or -1: it is not whole, or too large. `wanted` is 0 to 18."""
    shift = wanted - decimals
    if shift >= 0:
        return value * POWERS[_U(shift)] if value <= LIMITS[_U(shift)] else _I(-1)
    divisor = POWERS[_U(-shift)]
    whole = value // divisor
    return whole if whole * divisor == value else _I(-1)


@inlined
def words_of(buf: Any, span: Any) -> Any:
    """A text of at most 24 bytes as three words, zero padded."""
    size, p = span.size, span.at
    w0 = low_bytes(le64(buf, p), min(size, _I(8)))
    w1 = low_bytes(le64(buf, p + 8), max(min(size - 8, _I(8)), _I(0)))
    w2 = low_bytes(le64(buf, p + 16), max(min(size - 16, _I(8)), _I(0)))
    return w0, w1, w2


@inlined
def fixed(buf: Any, span: Any, kind: Any, wanted: Any) -> Any:
    """A decimal, given as TEXT or NUMBER as `kind` says, in units of ``10**-wanted``; -1: it is not that."""
    if span.type != kind:
        return _I(-1)
    if kind == NUMBER:
        return scaled(span.value, span.decimals, wanted) if span.value >= 0 else _I(-1)
    value, decimals, end = decimal(buf, span.at)
    return scaled(value, decimals, wanted) if end == span.at + span.size else _I(-1)


@inlined
def whole(buf: Any, span: Any, kind: Any) -> Any:
    """As :func:`fixed`, for a number that has no point."""
    if span.type == NUMBER and span.decimals > 0:
        return _I(-1)
    return fixed(buf, span, kind, _I(0))


@inlined
def _two_digits(buf: Any, p: Any) -> Any:
    """Two digits; far below zero if they are none."""
    high, low = _I(at(buf, p)) - 48, _I(at(buf, p + 1)) - 48
    return high * 10 + low if 0 <= high <= 9 and 0 <= low <= 9 else _I(-100_000)


@outlined
def iso_time_ns(buf: Any, span: Any) -> Any:
    """``2021-04-17T16:43:30.244075Z`` (RFC 3339, in UTC, at most nine decimals) in ns since 1970; -1: it is none after 1970."""
    p, size = span.at, span.size
    if span.type != TEXT or size < 20 or size > 30 or at(buf, p + size - 1) != np.uint8(ord("Z")):
        return _I(-1)
    if at(buf, p + 4) != _DASH or at(buf, p + 7) != _DASH or at(buf, p + 10) != np.uint8(ord("T")):
        return _I(-1)
    if at(buf, p + 13) != _COLON or at(buf, p + 16) != _COLON:
        return _I(-1)
    date = (_two_digits(buf, p) * 100 + _two_digits(buf, p + 2)) * 10_000 + _two_digits(buf, p + 5) * 100 + _two_digits(buf, p + 8)
    hour, minute, second = _two_digits(buf, p + 11), _two_digits(buf, p + 14), _two_digits(buf, p + 17)
    if date < 19_700_101 or hour < 0 or hour > 23 or minute < 0 or minute > 59 or second < 0 or second > 59:
        return _I(-1)
    begun, problem = midnight_ns(date)
    if problem != 0:
        return _I(-1)
    found = begun + (hour * 3600 + minute * 60 + second) * 1_000_000_000
    if size == 20:
        return found
    decimals = size - 21
    if at(buf, p + 19) != _POINT or decimals < 1 or decimals > 9:
        return _I(-1)
    fraction, _, end = decimal(buf, p + 20)
    return found + fraction * POWERS[_U(9 - decimals)] if end == p + size - 1 else _I(-1)


@outlined
def uuid_number(buf: Any, span: Any) -> Any:
    """The first 63 bits of a UUID (RFC 9562, 4) as a number; -1: it is none."""
    if span.type != TEXT or span.size != 36:
        return _I(-1)
    bits = _U(0)
    for k in range(36):
        c = at(buf, span.at + k)
        if k == 8 or k == 13 or k == 18 or k == 23:
            if c != _DASH:
                return _I(-1)
            continue
        lower = _I(c) | 32
        nibble = _I(c) - 48 if 48 <= c <= 57 else lower - 87 if 97 <= lower <= 102 else _I(-1)
        if nibble < 0:
            return _I(-1)
        if k < 19:
            bits = (bits << _U(4)) | _U(nibble)
    return _I(bits >> _U(1))


# ---------------------------------------------------------------- the scan


@inlined
def _number_token(buf: Any, p: Any, span: Any) -> Any:
    """A JSON number at p; returns where it ends, or -1: it has an exponent, zeros in front, or too many digits."""
    negative = at(buf, p) == _MINUS
    if negative:
        p += 1
    if at(buf, p) == _ZERO and 48 <= at(buf, p + 1) <= 57:
        return _I(-1)
    value, decimals, end = decimal(buf, p)
    span.value, span.decimals, span.type = -value if negative else value, decimals, NUMBER
    return end


@inlined
def _scalar(buf: Any, p: Any, span: Any) -> Any:
    """A text, number, true, false or null at p; returns where it ends, or -1."""
    c = at(buf, p)
    if c == _QUOTE:
        end = end_of_text(buf, p + 1)
        span.at, span.size, span.type = p + 1, end - p - 1, TEXT
        return end + 1 if end >= 0 else end
    if c == _MINUS or 48 <= c <= 57:
        return _number_token(buf, p, span)
    word = _U(le32(buf, p))
    if word == _WORD_TRUE or word == _WORD_NULL:  # noqa: SIM109 (compiled)
        span.type = TRUE if word == _WORD_TRUE else NULL
        return p + 4
    if word == _WORD_FALS and at(buf, p + 4) == _LETTER_E:
        span.type = FALSE
        return p + 5
    return _I(-1)


@inlined
def _object_row(buf: Any, p: Any, row: Any) -> Any:
    """A price level ``{"price":1.5,"qty":2}`` at p; returns where it ends, or -1."""
    if le64(buf, p) != _PRICE_KEY or at(buf, p + 8) != _COLON:
        return _I(-1)
    row.price_at = p + 9
    if at(buf, p + 9) == _ZERO and 48 <= at(buf, p + 10) <= 57:
        return _I(-1)
    row.price, row.price_decimals, end = decimal(buf, p + 9)
    row.price_size, p = end - row.price_at, end
    if p < 0 or le64(buf, p) & _LOW56 != _QTY_KEY:
        return _I(-1)
    row.qty_at = p + 7
    if at(buf, p + 7) == _ZERO and 48 <= at(buf, p + 8) <= 57:
        return _I(-1)
    row.qty, row.qty_decimals, end = decimal(buf, p + 7)
    row.qty_size, row.orders = end - row.qty_at, 0
    return end + 1 if end >= 0 and at(buf, end) == _CLOSE else _I(-1)


@inlined
def _side_column(buf: Any, p: Any, end: Any, row: Any) -> Any:
    """"buy" or "sell"; false: neither."""
    if end - p == 3 and _U(le32(buf, p)) & _LOW24 == _WORD_BUY:
        row.side = BID
        return True
    row.side = ASK
    return end - p == 4 and _U(le32(buf, p)) == _WORD_SELL


@inlined
def _list_row(buf: Any, p: Any, key: Any, row: Any) -> Any:
    """A price level ``["1.5","2"]`` at p, its columns as the key says; returns where it ends, or -1."""
    row.orders, roles = 0, key.roles
    for column in range(key.columns):
        if at(buf, p) != (_COMMA if column else _FIRST) or at(buf, p + 1) != _QUOTE:
            return _I(-1)
        p += 2
        role = roles & 15
        roles >>= 4
        if role == PRICE:
            row.price, row.price_decimals, end = decimal(buf, p)
            row.price_at, row.price_size = p, end - p
        elif role == QTY:
            row.qty, row.qty_decimals, end = decimal(buf, p)
            row.qty_at, row.qty_size = p, end - p
        elif role == ORDERS:
            row.orders, decimals, end = decimal(buf, p)
            end = end if decimals == 0 else _I(-1)
        else:
            end = end_of_text(buf, p)
            if role == SIDE and not _side_column(buf, p, end, row):
                return _I(-1)
        if end < 0 or at(buf, end) != _QUOTE:
            return _I(-1)
        p = end + 1
    return p + 1 if at(buf, p) == _LAST else _I(-1)


@outlined
def _rows(buf: Any, p: Any, key: Any, found: Any, span: Any) -> Any:
    """Price levels from the ``[`` at p on; returns where they end, or -1."""
    count = found.words[_ROWS]
    span.at, span.type = count, ROWS
    p += 1
    if at(buf, p) == _LAST:
        span.size = 0
        return p + 1
    while count < ROWS_MAX:
        row = found.rows[_U(count)]
        p = _object_row(buf, p, row) if key.columns == 0 else _list_row(buf, p, key, row)
        if p < 0:
            return p
        count += 1
        c = at(buf, p)
        p += 1
        if c == _LAST:
            span.size, found.words[_ROWS] = count - span.at, count
            return p
        if c != _COMMA:
            break
    return _I(-1)


@inlined
def _find_key(buf: Any, p: Any, end: Any, shape: Any, state: Any, hint: Any) -> Any:
    """The key ``buf[p:end]`` of an object, looked for from `hint` on, since keys come in the same order again and again; -1: not known."""
    size = end - p
    first, last = shape.firsts[_U(state)], shape.firsts[_U(state + 1)]
    w0 = low_bytes(le64(buf, p), min(size, _I(8)))
    w1 = low_bytes(le64(buf, p + 8), min(max(size - 8, _I(0)), _I(8)))
    k = hint
    for _ in range(last - first):
        if k >= last:
            k = first
        key = shape.keys[_U(k)]
        if key.w0 == w0 and key.w1 == w1 and key.size == size:
            return k
        k += 1
    return _I(-1)


@inlined
def _key(buf: Any, p: Any, shape: Any, found: Any) -> Any:
    """The key whose quote is at p: ``(where its value begins, its number)``; -1: there is none, or it was there before; it is not known."""
    words = found.words
    closing = end_of_text(buf, p + 1)
    if closing < 0 or at(buf, closing + 1) != _COLON:
        return _I(-1), _I(-1)
    k = _find_key(buf, p + 1, closing, shape, words[_STATE], words[_HINT])
    if k >= 0:
        words[_HINT] = k + 1
        slot = shape.keys[_U(k)].slot
        if slot >= 0:
            entry, bit = _U(words[_ENTRY]), _U(1) << _U(slot)
            if found.seen[entry] & bit != _U(0):
                return _I(-1), k
            found.seen[entry] |= bit
    return closing + 2, k


@inlined
def _begin_entry(shape: Any, found: Any, state: Any) -> Any:
    words = found.words
    entry = words[_ENTRIES]
    words[_STATE], words[_HINT], words[_ENTRY], words[_ENTRIES] = state, shape.firsts[_U(state)], entry, entry + 1
    found.seen[_U(entry)] = _U(0)


@inlined
def _enter(buf: Any, p: Any, key: Any, shape: Any, found: Any, span: Any) -> Any:
    """An object, or a list of objects, begins at p; returns where its first key begins, or -1."""
    words, is_list = found.words, at(buf, p) == _FIRST
    p += is_list
    depth, entries = words[_DEPTH], words[_ENTRIES]
    if at(buf, p) != _OPEN or at(buf, p + 1) != _QUOTE or depth == _DEPTH_MAX or entries == ENTRIES_MAX:
        return _I(-1)
    span.type, span.at, span.size = LIST if is_list else OBJECT, entries, 1
    frame = found.stack[_U(depth)]
    frame[0], frame[1], frame[2], frame[3], frame[4] = words[_STATE], words[_HINT], words[_ENTRY], is_list, key.slot
    words[_DEPTH] = depth + 1
    _begin_entry(shape, found, key.target)
    return p + 1


@inlined
def _value(buf: Any, p: Any, k: Any, shape: Any, found: Any, spare: Any) -> Any:
    """The value of key k at p: ``(where it ends or -1, False)``, or of an object ``(where its first key begins or -1, True)``."""
    key = shape.keys[_U(max(k, _I(0)))]
    if k < 0 or key.slot < 0:
        return _scalar(buf, p, spare[0]), False
    span, c = found.spans[_U(found.words[_ENTRY]), _U(key.slot)], at(buf, p)
    if c == _FIRST and key.columns >= 0:
        return _rows(buf, p, key, found, span), False
    if key.target >= 0:
        return _enter(buf, p, key, shape, found, span), True
    return _scalar(buf, p, span), False


@inlined
def _after_value(buf: Any, p: Any, shape: Any, found: Any) -> Any:
    """What follows a value that has ended at p: ``(where the next key begins, False)``; ``(the message's end, or -1, True)``."""
    words = found.words
    while at(buf, p) == _CLOSE:
        p += 1
        depth = words[_DEPTH]
        if depth == 0:
            return p, True
        frame = found.stack[_U(depth - 1)]
        if frame[3] and at(buf, p) == _COMMA:  # the list goes on
            if at(buf, p + 1) != _OPEN or at(buf, p + 2) != _QUOTE or words[_ENTRIES] == ENTRIES_MAX:
                return _I(-1), True
            found.spans[_U(frame[2]), _U(frame[4])].size += 1
            _begin_entry(shape, found, words[_STATE])
            return p + 2, False
        if frame[3] and at(buf, p) != _LAST:
            return _I(-1), True
        p += frame[3]
        words[_DEPTH], words[_STATE], words[_HINT], words[_ENTRY] = depth - 1, frame[0], frame[1], frame[2]
    if at(buf, p) != _COMMA or at(buf, p + 1) != _QUOTE:
        return _I(-1), True
    return p + 1, False


@outlined
def scan(buf: Any, p: Any, end: Any, shape: Any, found: Any, spare: Any) -> Any:
    """Read the message ``buf[p:end]`` along its shape.

    Args:
        spare: SPAN[1], for values of no interest.

    Returns:
        How many entries there are; 0: it is not as the shape says, and `found` holds nothing.
    """
    words = found.words
    words[_DEPTH], words[_ENTRIES], words[_ROWS] = 0, 0, 0
    _begin_entry(shape, found, _I(0))
    if at(buf, p) != _OPEN or at(buf, p + 1) != _QUOTE:
        return _I(0)
    p, is_over = p + 1, False
    while not is_over:
        p, k = _key(buf, p, shape, found)
        if p < 0:
            return _I(0)
        p, has_entered = _value(buf, p, k, shape, found, spare)
        if p < 0:
            return _I(0)
        if not has_entered:
            p, is_over = _after_value(buf, p, shape, found)
    return words[_ENTRIES] if p == end else _I(0)


@inlined
def span_of(found: Any, entry: Any, slot: Any) -> Any:
    """A value of an entry; of type ABSENT if it has none."""
    span = found.spans[_U(entry), _U(slot)]
    if found.seen[_U(entry)] & (_U(1) << _U(slot)) == _U(0):
        span.type = ABSENT
    return span
