"""FIX market data and drop copies to events: the compiled decoder, and its state.

A message is taken in two passes. The first cuts it into fields, whose ends are found 64 bytes at a time: a table gives
each tag its slot, and the field's place is stored in that slot of the body or of the current group entry. The second turns the body and
the entries, whose fields are then in known places, into events. What is wrong is counted by reason; a book whose entry cannot be used
gets a GAP.

Messages of a class with as many fields mostly have the same ones in the same order. So the order is kept (a shape), and the first pass
holds a message's tags against it, all at once and without a branch; only what differs is cut field by field.

:func:`fix_events` is for loops that contain the decoder; :mod:`tickmesh.node.fix_feed` has what Python calls.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np

from tickmesh.node import fix_slots as M
from tickmesh.node.event import ALL_INSTRUMENTS, ASK, BID, EVENT, NO_INSTRUMENT, NO_PRICE, NO_SIDE, Flag, Kind, TradingStatus
from tickmesh.node.feed import (
    FILTERED_MESSAGES,
    QTY_EXPONENT,
    RESOLVED_BELOW,
    SOURCE,
    SYMBOL_TABLE_FULL,
    TICK_SIZE,
    TRUNCATED,
    UNKNOWN_INSTRUMENT,
    announce,
)
from tickmesh.node.feed import REASONS as COMMON_REASONS
from tickmesh.node.feed import STATE_WORDS as COMMON_WORDS
from tickmesh.node.fix_frame import BODY_BYTES_MAX, NO_BEGIN, PARTIAL, TRAILER_BYTES, WHOLE, frame_at, next_begin, tag_at
from tickmesh.node.fix_text import (
    NOT_A_NUMBER,
    TOO_PRECISE,
    date,
    decimals_seen,
    identity,
    low_bytes,
    name_words,
    price,
    quantity,
    time_of_day,
    timestamp,
    whole_number,
)  # fmt: skip
from tickmesh.node.instruments import EXCLUDED, FILTERED, InstrumentTable, find_instrument, intern_unseen
from tickmesh.transports.byte_masks import PLACES_SLACK, find_all
from tickmesh.transports.toolbox import copy_record, inlined, le16, le64, outlined, zeros_aligned

FixArrays = namedtuple(
    "FixArrays",
    "instruments state counts malformed types roles data_tags groups cells masks tags places ends walk shapes held",
)
"""`instruments` see :class:`tickmesh.node.instruments.Instruments`; `state` i64; `counts` u64 per name of COUNTERS; `malformed` u64 per
name of :data:`REASONS`; `types`, `roles`, `data_tags`, `groups` see :class:`tickmesh.node.fix_slots.FixTables`; `cells`
u64[entries * SLOTS]: where a field's value begins << 32 and ends, from the message's start, entry 0 being the body; `masks` u64 per entry:
its slots; `tags` TAG, TAGS_MAX per class: those met so far, and `places` u8: index among the roles -> place there; `ends` i32 and `walk`
u64: scratch; `shapes` u64, SHAPE_WORDS per class and number of fields; `held` EVENT[HELD_MAX]."""

TAG = np.dtype([("word", "<u8"), ("mask", "<u8"), ("next", "<u4"), ("tag", "<u4"), ("role", "u1"), ("size", "u1"), ("spare", "u1", 6)])
"""A tag as it stands in a message: ``(word ^ bytes) & mask == 0``, its `size` with the equals sign, its role, and the place of the tag that
came behind it last time. Of a class's tags the first is the list's head (`next`: the first free place), the second stands for the start."""
TAGS_MAX = 256

SHAPE_FIELDS = 64
"""Messages with fewer fields are held against shapes."""
_TAGS_AT, _CELLS_AT, _MASKS_AT = 1, 1 + 2 * SHAPE_FIELDS, 1 + 3 * SHAPE_FIELDS
SHAPE_WORDS = 2 + 4 * SHAPE_FIELDS
"""A shape: how many fields are mapped, how many entries and unknown tags there are, and how often it may fail before it is replaced, a byte
each; then of every field its tag and the tag's mask; of every mapped one its number, the bytes from the field before to its value, and
the cell that it belongs in; the slots of the body and of each entry. The first word is zero where there is none yet."""
_CREDIT, _CREDIT_SHIFT = 4, 24
_NOWHERE = np.uint64(0xFFFFFFFF)

HELD_MAX = 64
ENTRIES_MAX = 16384
"""Most entries of a message's group; a message with more is refused."""
RESERVE = 4
"""Events that one step may make: decoding stops while there is room for that many."""
ROOM_MIN = 2 * RESERVE
"""Least size of an event array to decode into."""

(
    EXPECTED, SENDER_KEY, FINAL, IN_GARBAGE, STEP, M_STOP, M_CLASS, M_SEQ, M_TIME, M_RECV, M_ROWS, M_INSTRUMENT, DATE_TEXT, DATE_NS,
    BY_ORDER, GAPS, MISSING, DUPLICATES, RESTARTS, UNKNOWN_TAGS, ENTRIES_IGNORED, SKIPPED, HELD,
) = range(COMMON_WORDS, COMMON_WORDS + 23)  # fmt: skip
"""Indices of ``FixArrays.state``, behind those of :mod:`tickmesh.node.feed`. FINAL: no bytes come behind `end`. STEP to M_INSTRUMENT: the
message that `out` had no room for; HELD: how many of its events are in `held`. SKIPPED: bytes before a message that are no fault so far."""

_OWN_REASONS = (
    "garbage", "bad_begin_string", "bad_body_length", "bad_header", "bad_checksum", "bad_tag", "repeated_tag", "bad_group_count",
    "group_order", "too_many_entries", "bad_data_length", "missing_field", "bad_number", "too_precise", "number_too_large", "bad_time",
    "bad_symbol", "unsupported_action", "unknown_type", "bad_status",
)  # fmt: skip
REASONS = (*COMMON_REASONS, *_OWN_REASONS)
(
    GARBAGE, BAD_BEGIN_STRING, BAD_BODY_LENGTH, BAD_HEADER, BAD_CHECKSUM, BAD_TAG, REPEATED_TAG, BAD_GROUP_COUNT, GROUP_ORDER,
    TOO_MANY_ENTRIES, BAD_DATA_LENGTH, MISSING_FIELD, BAD_NUMBER, TOO_PRECISE_NUMBER, NUMBER_TOO_LARGE, BAD_TIME, BAD_SYMBOL,
    UNSUPPORTED_ACTION, UNKNOWN_TYPE, BAD_STATUS,
) = range(len(COMMON_REASONS), len(REASONS))  # fmt: skip

_U, _I = np.uint64, np.int64
_ONE, _ZERO = _U(1), _U(0)
_NONE = np.uint32(NO_INSTRUMENT)
_ALL, _FILTERED = np.uint32(ALL_INSTRUMENTS), np.uint32(FILTERED)
_EXCLUDED = np.uint8(EXCLUDED)
_LOW32 = _U(0xFFFFFFFF)
_SLOT_BITS = 5
_REQUIRED = _U((1 << M.SEQ) | (1 << M.SENDER) | (1 << M.SENDING_TIME))
_CHUNK_BYTES = 4096
"""Bytes of which the fields' ends are found at once."""
_ALL_BITS = _U(0xFFFFFFFFFFFFFFFF)
_DEFAULT_TICK = _I(10_000_000)
_DEFAULT_EXPONENT = 8
_NO_PRICE = _I(NO_PRICE)
_SNAPSHOT, _MORE = np.uint16(Flag.SNAPSHOT), np.uint16(Flag.MORE)
_ADD, _DELETE, _REPLACE, _MODIFY, _CLEAR, _LEVEL, _TRADE, _QUOTE, _STATUS, _GAP, _BREAK = (
    np.uint8(kind)
    for kind in (
        Kind.ADD, Kind.DELETE, Kind.REPLACE, Kind.MODIFY, Kind.CLEAR, Kind.LEVEL, Kind.TRADE, Kind.QUOTE, Kind.STATUS, Kind.GAP, Kind.BREAK,
    )
)  # fmt: skip
_BOTH = np.uint8(NO_SIDE)
_SYMBOL_BYTES = 24
_PREFIX_BYTES = 128
_CLASSES, _SEQUENCE_RESET = len(M.CLASSES), M.COUNTERS.index("sequence_reset")
_NEW, _CHANGE, _REMOVE = 48, 49, 50
_TYPE_TRADE, _TYPE_EMPTY = 50, 74

_STATUS_OF = np.zeros(32, np.int64)
"""SecurityTradingStatus (326) -> TradingStatus."""
for _meaning, _codes in {
    TradingStatus.TRADING: (3, 17, 23), TradingStatus.HALTED: (2, 4), TradingStatus.PAUSED: (1, 5), TradingStatus.QUOTE_ONLY: (15, 16),
    TradingStatus.PRE_OPEN: (21, 27), TradingStatus.CLOSED: (18, 19, 26), TradingStatus.AUCTION: (22, 24, 25),
}.items():  # fmt: skip
    _STATUS_OF[list(_codes)] = int(_meaning)


def make_fix_arrays(instruments: Any, tables: M.FixTables, *, source: int, tick_size: int, qty_exponent: int) -> FixArrays:
    """State of a decoder; a tick size of 0 and an exponent of -1 are inferred from a symbol's first message."""
    state = np.zeros(COMMON_WORDS + 32, np.int64)
    state[SOURCE], state[TICK_SIZE], state[QTY_EXPONENT], state[BY_ORDER] = source, tick_size, qty_exponent, tables.by_order
    rows = ENTRIES_MAX + 2  # the body, and the one that is too many
    tags = zeros_aligned(len(M.CLASSES) * TAGS_MAX + 1, TAG)
    tags["next"][::TAGS_MAX] = 2
    tags["mask"] = tags["word"] = np.uint64(0xFFFFFFFFFFFFFFFF)  # matches nothing: no tag has 0xFF
    return FixArrays(
        instruments, state, np.zeros(len(M.COUNTERS), np.uint64), np.zeros(len(REASONS), np.uint64), tables.types, tables.roles,
        tables.data_tags, tables.groups, np.zeros(rows << _SLOT_BITS, np.uint64), np.zeros(rows, np.uint64),
        tags, np.zeros(len(tables.roles), np.uint8), np.zeros(_CHUNK_BYTES + PLACES_SLACK, np.int32), np.zeros(SHAPE_FIELDS, np.uint64),
        np.zeros(len(M.CLASSES) * SHAPE_FIELDS * SHAPE_WORDS, np.uint64), zeros_aligned(HELD_MAX, EVENT),
    )  # fmt: skip


# ---------------------------------------------------------------- the first pass: fields into slots


@outlined
def _learn_tag(buf: Any, p: Any, before: Any, number: Any, feed: Any) -> Any:
    """The tag at p, which is not what used to follow tag `before`: its place among the tags of the class, or -1 if it is malformed."""
    tag, size = tag_at(buf, p)
    if tag == 0:
        return _I(-1)
    index = number * _U(M.ROLES) + _role_index(tag)
    tags, first = feed.tags, number * _U(TAGS_MAX)
    place = _U(feed.places[index]) if tag < M.CODES else _ZERO
    if place == _ZERO:
        place = _U(tags[first].next)  # of the first, the next that is free; the last is used again and again
        tags[first].next = np.uint32(min(place + _ONE, _U(TAGS_MAX - 1)))
        if place < _U(TAGS_MAX - 1) and tag < M.CODES:
            feed.places[index] = np.uint8(place)
        place += first
        tags[place].word, tags[place].mask = low_bytes(le64(buf, p), size + 1), low_bytes(_ALL_BITS, size + 1)
        tags[place].size, tags[place].tag = np.uint8(size + 1), np.uint32(tag)
        tags[place].role = feed.roles[index] if tag < M.CODES else feed.roles[number * _U(M.ROLES) + _U(M.CODES)]
        tags[place].next = np.uint32(place)
    else:
        place += first
    tags[before].next = np.uint32(place)
    return _I(place)


@inlined
def _role_index(tag: Any) -> Any:
    """:func:`tickmesh.node.fix_mapping.tag_code`, of a tag below CODES."""
    if tag > 9999:
        return _U(M.CODES) + _U(min(tag, _I(M.CODES - 1)))
    digits = tag // 1000 | tag // 100 % 10 << 4 | tag // 10 % 10 << 8 | tag % 10 << 12
    return _U(digits)


@outlined
def _data_field(buf: Any, p: Any, e: Any, stop: Any, length_tag: Any, data_tags: Any) -> Any:
    """Where the data field at e + 1 ends (its SOH), given its length at ``buf[p:e]``; -1 if it does not; e if there is no data field."""
    tag, size = tag_at(buf, e + 1)
    if tag == 0 or length_tag >= data_tags.size or data_tags[_U(length_tag)] != tag:
        return e
    length, problem = whole_number(buf, p, e)
    end = e + 2 + size + length
    if problem != 0 or length > BODY_BYTES_MAX or end >= stop or buf[end] != 1:
        return _I(-1)
    return end


@inlined
def _tag_place(buf: Any, f: Any, before: Any, number: Any, feed: Any) -> Any:
    """Place among the class's tags of the one at f, or -1 if it is malformed.

    Tags are kept in the order in which they were met: the one behind tag `before` is compared first, then the one that came behind it
    last time; only what neither is gets looked up.
    """
    word, tags = le64(buf, f), feed.tags
    if (word ^ tags[before + _ONE].word) & tags[before + _ONE].mask == _ZERO:
        return _I(before) + 1
    following = _U(tags[before].next)
    if (word ^ tags[following].word) & tags[following].mask == _ZERO:
        return _I(following)
    return _learn_tag(buf, f, before, number, feed)


@inlined
def _put_cell(feed: Any, role: Any, entry: Any, seen: Any, cell: Any) -> Any:
    """A field into the slot of its role: ``(entry, seen, target, fault)``: the current entry's first cell (0: the body), its slots so far,
    the cell it went to, and -1 or why the message is refused."""
    slot = role & _U(M.SLOT_MASK)
    bit, member = _ONE << slot, role & _U(M.MEMBER) != _ZERO
    if role & _U(M.SPECIAL):  # begins an entry
        feed.masks[entry >> _U(_SLOT_BITS)] = seen
        entry += _U(M.SLOTS)
        if entry > _U(ENTRIES_MAX << _SLOT_BITS):
            return entry, _ZERO, entry, _I(TOO_MANY_ENTRIES)
        seen = _ZERO
    elif entry != _ZERO and not member:  # of the body, behind the group
        repeated = feed.masks[0] & bit != _ZERO
        feed.masks[0] |= bit
        feed.cells[slot] = cell
        return entry, seen, slot, _I(REPEATED_TAG) if repeated else _I(-1)
    elif entry == _ZERO and member and not role & _U(M.FREE):
        return entry, seen, slot, _I(GROUP_ORDER)
    feed.cells[entry | slot] = cell
    return entry, seen | bit, entry | slot, _I(REPEATED_TAG) if seen & bit else _I(-1)


@outlined
def _cut(buf: Any, at: Any, body: Any, stop: Any, number: Any, feed: Any) -> Any:
    """:func:`_fields`, field by field; the message's shape is learnt."""
    entry, seen, place = _ZERO, _ZERO, number * _U(TAGS_MAX) + _ONE
    f, base, fault, fields, unknown = _I(body), _I(body), _I(-1), _ZERO, _ZERO
    while base < stop and fault < 0:
        limit = min(stop, base + _CHUNK_BYTES)
        count = find_all(buf, base, limit, np.uint8(1), feed.ends, at)
        base = limit
        for k in range(count):
            e = at + _I(feed.ends[_U(k)])
            found = _tag_place(buf, f, place, number, feed)
            if found < 0:
                fault = _I(BAD_TAG)
                break
            place, target = _U(found), _NOWHERE
            role, v = _U(feed.tags[place].role), f + _I(feed.tags[place].size)
            f = e + 1
            if role & _U(M.SPECIAL | M.MEMBER) == _U(M.SPECIAL):
                end = _data_field(buf, v, e, stop, _I(feed.tags[place].tag), feed.data_tags)
                if end != e:  # any byte may stand in it: look for the next SOH behind it
                    fault = _I(BAD_DATA_LENGTH) if end < 0 else fault
                    f = base = end + 1
                    fields = _U(SHAPE_FIELDS)  # no shape
                    break
            elif role > _U(M.KNOWN):
                entry, seen, target, fault = _put_cell(feed, role, entry, seen, (_U(v - at) << _U(32)) | _U(e - at))
                if fault >= 0:
                    break
            unknown += _U(role == _ZERO)
            if fields < _U(SHAPE_FIELDS):
                feed.walk[fields] = (place << _U(32)) | target
                fields += _ONE
    feed.masks[entry >> _U(_SLOT_BITS)] = seen
    feed.state[UNKNOWN_TAGS] += _I(unknown)
    if fault < 0 and fields < _U(SHAPE_FIELDS):
        _learn_shape(number, fields, entry >> _U(_SLOT_BITS), unknown, feed)
    return _I(entry >> _U(_SLOT_BITS)), fault


@outlined
def _learn_shape(number: Any, fields: Any, rows: Any, unknown: Any, feed: Any) -> Any:
    """Keep the fields of the message that was cut last, unless those kept have been right lately."""
    words, shape = feed.shapes, (number * _U(SHAPE_FIELDS) + fields) * _U(SHAPE_WORDS)
    if words[shape] >> _U(_CREDIT_SHIFT) > _ONE:
        words[shape] -= _ONE << _U(_CREDIT_SHIFT)
        return
    mapped, k = _ZERO, _ZERO
    while k < fields:
        place, target = feed.walk[k] >> _U(32), feed.walk[k] & _NOWHERE
        words[shape + _U(_TAGS_AT) + _U(2) * k] = feed.tags[place].word
        words[shape + _U(_TAGS_AT + 1) + _U(2) * k] = feed.tags[place].mask
        if target != _NOWHERE:
            cell = k | (_U(feed.tags[place].size) + _ONE) << _U(8) | target << _U(16)
            words[shape + _U(_CELLS_AT) + mapped] = cell
            mapped += _ONE
        k += _ONE
    row = _ZERO
    while row <= rows:
        words[shape + _U(_MASKS_AT) + row] = feed.masks[row]
        row += _ONE
    words[shape] = mapped | rows << _U(8) | unknown << _U(16) | _U(_CREDIT) << _U(_CREDIT_SHIFT)


@inlined
def _has_shape(buf: Any, at: Any, body: Any, count: Any, shape: Any, feed: Any) -> Any:
    """Whether the `count` fields that end at ``feed.ends`` have the shape's tags."""
    words, wrong, f = feed.shapes, _ZERO, _I(body)
    t = shape + _U(_TAGS_AT)
    for k in range(count):
        wrong |= (le64(buf, f) ^ words[t]) & words[t + _ONE]
        t += _U(2)
        f = at + _I(feed.ends[_U(k)]) + 1
    return wrong == _ZERO and words[shape] != _ZERO


@inlined
def _take_shape(shape: Any, feed: Any) -> Any:
    """Put the fields of a message that has this shape into their cells; returns how many entries its group has."""
    words, ends = feed.shapes, feed.ends
    head = words[shape]
    words[shape] = head & _U((1 << _CREDIT_SHIFT) - 1) | _U(_CREDIT << _CREDIT_SHIFT)
    c = shape + _U(_CELLS_AT)
    for _ in range(_I(head & _U(0xFF))):
        k, behind, target = words[c] & _U(0xFF), words[c] >> _U(8) & _U(0xFF), words[c] >> _U(16)
        feed.cells[target] = (_U(ends[k - _ONE]) + behind) << _U(32) | _U(ends[k])
        c += _ONE
    rows = head >> _U(8) & _U(0xFF)
    m = shape + _U(_MASKS_AT)
    for row in range(_I(rows) + 1):
        feed.masks[_U(row)] = words[m + _U(row)]
    feed.state[UNKNOWN_TAGS] += _I(head >> _U(16) & _U(0xFF))
    return _I(rows)


@inlined
def _fields(buf: Any, at: Any, body: Any, stop: Any, number: Any, feed: Any) -> Any:
    """Cut ``buf[body:stop]`` into fields; offsets are counted from `at`.

    Returns:
        ``(rows, fault)``: entries of the group, and -1 or the reason of the refusal.
    """
    if stop - body <= _CHUNK_BYTES:
        count = find_all(buf, body, stop, np.uint8(1), feed.ends, at)
        if count < SHAPE_FIELDS:
            shape = (number * _U(SHAPE_FIELDS) + _U(count)) * _U(SHAPE_WORDS)
            if _has_shape(buf, at, body, count, shape, feed):
                return _take_shape(shape, feed), _I(-1)
    return _cut(buf, at, body, stop, number, feed)


# ---------------------------------------------------------------- what a message says about itself


@inlined
def _cell(feed: Any, at: Any, row: Any, slot: Any) -> Any:
    """``(begin, end)`` of the value in a slot of an entry (0: the body)."""
    cell = feed.cells[(_U(row) << _U(_SLOT_BITS)) | _U(slot)]
    return at + _I(cell >> _U(32)), at + _I(cell & _LOW32)


@inlined
def _has(mask: Any, slot: Any) -> Any:
    return (mask >> _U(slot)) & _ONE != _ZERO


@inlined
def _refuse(feed: Any, reason: Any) -> Any:
    feed.malformed[_U(reason)] += _ONE


@inlined
def _number_reason(problem: Any) -> Any:
    return BAD_NUMBER if problem == NOT_A_NUMBER else TOO_PRECISE_NUMBER if problem == TOO_PRECISE else NUMBER_TOO_LARGE


@inlined
def _is_yes(buf: Any, feed: Any, at: Any, mask: Any, slot: Any) -> Any:
    p, _ = _cell(feed, at, 0, slot)
    return _has(mask, slot) and buf[p] == 89


@outlined
def _sequence(buf: Any, at: Any, counter: Any, seq: Any, sender: Any, ts: Any, recv: Any, feed: Any, out: Any, n: Any) -> Any:
    """A message that is not simply the next of the sender we watch: ``(wanted, n)``, a GAP perhaps, and whether to use the message.

    Watched is the sender of the first message that can become events: a log may hold both directions of a session.
    """
    s, mask = feed.state, feed.masks[0]
    if s[SENDER_KEY] == 0:
        if counter == 0 or counter >= _CLASSES:
            return True, n
        s[SENDER_KEY] = sender
    elif s[SENDER_KEY] != sender:
        return True, n
    expected = s[EXPECTED]
    if expected != 0 and seq < expected and _is_yes(buf, feed, at, mask, M.POSS_DUP):
        s[DUPLICATES] += 1
        return False, n
    number, following = seq, seq + 1
    if counter == _SEQUENCE_RESET and _has(mask, M.NEW_SEQ):
        p, e = _cell(feed, at, 0, M.NEW_SEQ)
        new, problem = whole_number(buf, p, e)
        if problem != 0:
            return True, n
        following = new
        if not _is_yes(buf, feed, at, mask, M.GAP_FILL):
            number = new  # its own sequence means nothing, and what is before the new one is lost
    s[EXPECTED] = following
    if expected == 0 or number == expected:
        return True, n
    if number > expected:  # messages are missing; otherwise the session begins anew, and what came before is unknown
        s[GAPS] += 1
        s[MISSING] += number - expected
    else:
        s[RESTARTS] += 1
    first, last = (expected, number - 1) if number > expected else (_I(0), _I(0))
    _put_gap(feed, _ALL, seq, ts, recv, first, last, out, n)
    return True, n + 1


@inlined
def _put_gap(feed: Any, instrument: Any, seq: Any, ts: Any, recv: Any, first: Any, last: Any, out: Any, n: Any) -> Any:
    e = out[n]
    e.seq, e.ts_event, e.ts_recv = _U(seq), ts, recv
    e.instrument, e.kind, e.side, e.flags = instrument, _GAP, _BOTH, np.uint16(0)
    e.price, e.qty, e.id, e.aux = _I(0), last - first + 1 if last > 0 else _I(0), _U(first), last


@inlined
def _sender_key(buf: Any, p: Any, e: Any) -> Any:
    """SenderCompID as a number that is not 0: its first and last eight bytes."""
    size = e - p
    key = low_bytes(le64(buf, p), min(size, 8))
    if size > 8:
        key ^= le64(buf, e - 8) * _U(0x9E3779B97F4A7C15)
    return _I(key | (_ONE << _U(63)))


@inlined
def _header(buf: Any, at: Any, counter: Any, ts_recv: Any, feed: Any, out: Any, n: Any) -> Any:
    """Header of a message whose fields are in their slots: ``(wanted, seq, ts, recv, n)``. A GAP may come of it."""
    s, mask = feed.state, feed.masks[0]
    if mask & _REQUIRED != _REQUIRED:
        _refuse(feed, MISSING_FIELD)
        return False, _I(0), _I(0), _I(0), n
    p, e = _cell(feed, at, 0, M.SENDER)
    sender = _sender_key(buf, p, e)
    p, e = _cell(feed, at, 0, M.SEQ)
    seq, problem = whole_number(buf, p, e)
    next_one = seq == s[EXPECTED] and sender == s[SENDER_KEY] and problem == 0
    if next_one and counter == M.OTHER:
        s[EXPECTED] = seq + 1
        return False, seq, _I(0), _I(0), n
    p, e = _cell(feed, at, 0, M.SENDING_TIME)
    sent, wrong = timestamp(buf, p, e, s[DATE_TEXT : DATE_NS + 1])
    if problem != 0 or wrong != 0:
        _refuse(feed, BAD_TIME if wrong != 0 else BAD_NUMBER)
        return False, _I(0), _I(0), _I(0), n
    ts, recv = sent, ts_recv if ts_recv > 0 else sent
    if _has(mask, M.TIME):
        p, e = _cell(feed, at, 0, M.TIME)
        ts, wrong = timestamp(buf, p, e, s[DATE_TEXT : DATE_NS + 1])
        if wrong != 0:
            _refuse(feed, BAD_TIME)
            ts = sent
    elif _has(mask, M.ORIGINAL_TIME) and _is_yes(buf, feed, at, mask, M.POSS_DUP):  # sent again: when it was sent first
        p, e = _cell(feed, at, 0, M.ORIGINAL_TIME)
        ts, wrong = timestamp(buf, p, e, s[DATE_TEXT : DATE_NS + 1])
        if wrong != 0:
            _refuse(feed, BAD_TIME)
            ts = sent
    wanted = True
    if next_one and counter < _CLASSES:
        s[EXPECTED] = seq + 1
    else:
        wanted, n = _sequence(buf, at, counter, seq, sender, ts, recv, feed, out, n)
    return wanted, seq, ts, recv, n


@inlined
def _group_count(buf: Any, at: Any, feed: Any, rows: Any) -> Any:
    """Whether the message's group has as many entries as it says."""
    if not _has(feed.masks[0], M.COUNT):
        return rows == 0
    p, e = _cell(feed, at, 0, M.COUNT)
    count, problem = whole_number(buf, p, e)
    return problem == 0 and count == rows


# ---------------------------------------------------------------- instruments


@outlined
def _new_symbol(buf: Any, at: Any, row: Any, feed: Any, p: Any, e: Any, w0: Any, w1: Any, w2: Any) -> Any:
    """Give a symbol an id; its tick size and exponent are configured, told by the message, or inferred from its price and quantity."""
    for k in range(p, e):
        if buf[k] < 33 or buf[k] > 126:
            _refuse(feed, BAD_SYMBOL)
            return _NONE
    mask, s = feed.masks[_U(row)], feed.state
    tick, exponent = s[TICK_SIZE], s[QTY_EXPONENT]
    if tick == 0 and _has(mask, M.TICK_SIZE):
        first, end = _cell(feed, at, row, M.TICK_SIZE)
        tick, problem = price(buf, first, end)
        tick = _I(0) if problem != 0 or tick < 0 else tick
    if tick == 0:
        tick = _inferred_tick(buf, at, row, feed)
    if exponent < 0:
        before, after = _I(0), _I(0)
        if _has(mask, M.QTY):
            first, end = _cell(feed, at, row, M.QTY)
            before, after = decimals_seen(buf, first, end)
        exponent = min(_I(18), after)
        if s[BY_ORDER] == 0:  # a level holds more than its first quantity, an order hardly
            exponent = min(_I(18), max(after, min(_I(_DEFAULT_EXPONENT), 10 - before)))
    found = intern_unseen(feed.instruments, np.uint32(s[SOURCE]), w0, w1, w2, tick, np.int8(exponent))
    if found == _NONE:
        _refuse(feed, SYMBOL_TABLE_FULL)
    return found


@outlined
def _inferred_tick(buf: Any, at: Any, row: Any, feed: Any) -> Any:
    value = _I(0)
    if _has(feed.masks[_U(row)], M.PRICE):
        p, e = _cell(feed, at, row, M.PRICE)
        value, problem = price(buf, p, e)
        value = _I(0) if problem != 0 else abs(value)
    if value == 0:
        return _DEFAULT_TICK
    tick = _I(1)
    while value % (tick * 10) == 0 and tick * 100_000 <= value:
        tick *= 10
    return tick


@inlined
def _instrument(buf: Any, at: Any, row: Any, row_of_symbol: Any, feed: Any, seq: Any, ts: Any, recv: Any, out: Any, n: Any) -> Any:
    """Instrument of the symbol in an entry (0: the body), announced if it is new: ``(instrument, n)``; from RESOLVED_BELOW on: none.

    `row` is where a new one's price and quantity are.
    """
    p, e = _cell(feed, at, row_of_symbol, M.SYMBOL)
    w0, w1, w2 = name_words(buf, p, e)
    if w0 == _ZERO or e - p > _SYMBOL_BYTES:
        _refuse(feed, BAD_SYMBOL)
        return _NONE, n
    found = find_instrument(feed.instruments, np.uint32(feed.state[SOURCE]), w0, w1, w2)
    if found == _NONE:
        found = _new_symbol(buf, at, row, feed, p, e, w0, w1, w2)
    elif feed.instruments.records[found].flags & _EXCLUDED:
        found = _FILTERED
    if found < RESOLVED_BELOW:
        if feed.instruments.records[found].announced == np.uint32(0):
            n = announce(feed, found, _U(seq), ts, recv, out, n)
    elif found == _FILTERED:
        feed.state[FILTERED_MESSAGES] += 1
    return found, n


# ---------------------------------------------------------------- the second pass: entries of market data


@inlined
def _put(
    e: Any, kind: Any, instrument: Any, side: Any, flags: Any, seq: Any, ts: Any, recv: Any, price: Any, qty: Any, id: Any, aux: Any
) -> Any:
    e.seq, e.ts_event, e.ts_recv = _U(seq), ts, recv
    e.instrument, e.kind, e.side, e.flags = instrument, kind, np.uint8(side), flags
    e.price, e.qty, e.id, e.aux = price, qty, id, aux


@inlined
def _character(buf: Any, feed: Any, at: Any, row: Any, mask: Any, slot: Any, absent: Any) -> Any:
    """The one character in a slot; `absent` if the slot is empty, -1 if it holds more."""
    p, e = _cell(feed, at, row, slot)
    if not _has(mask, slot):
        return _I(absent)
    return _I(buf[p]) if e - p == 1 else _I(-1)


@inlined
def _price_in(buf: Any, feed: Any, at: Any, row: Any, mask: Any, slot: Any) -> Any:
    """``(price, reason)`` of a slot; the reason is -1 if there is one."""
    if not _has(mask, slot):
        return _I(0), _I(MISSING_FIELD)
    p, e = _cell(feed, at, row, slot)
    value, problem = price(buf, p, e)
    return value, _I(-1) if problem == 0 else _I(_number_reason(problem))


@inlined
def _qty_in(buf: Any, feed: Any, at: Any, row: Any, mask: Any, slot: Any, instrument: Any) -> Any:
    """``(quantity, reason)`` of a slot, in the instrument's exponent."""
    if not _has(mask, slot):
        return _I(0), _I(MISSING_FIELD)
    p, e = _cell(feed, at, row, slot)
    value, problem = quantity(buf, p, e, _I(feed.instruments.records[instrument].qty_exponent))
    if problem != 0:
        return value, _I(_number_reason(problem))
    return value, _I(BAD_NUMBER) if value < 0 else _I(-1)


@inlined
def _id_in(buf: Any, feed: Any, at: Any, row: Any, mask: Any, slot: Any) -> Any:
    """Id in a slot, u64; 0 if the slot is empty."""
    p, e = _cell(feed, at, row, slot)
    return identity(buf, p, e) if _has(mask, slot) else _ZERO


@inlined
def _side_in(buf: Any, feed: Any, at: Any, row: Any, mask: Any) -> Any:
    """BID or ASK of Side or an aggressor's side (1, 2; short sales count as sales), else NO_SIDE."""
    c = _character(buf, feed, at, row, mask, M.SIDE, 48)
    return _I(BID) if c == 49 else _I(ASK) if c == 50 or c == 53 or c == 54 else _I(NO_SIDE)


@inlined
def _entry_time(buf: Any, feed: Any, at: Any, row: Any, mask: Any, ts: Any) -> Any:
    """Time of an entry that has a date and a time of its own, otherwise its message's."""
    if not (_has(mask, M.ENTRY_DATE) and _has(mask, M.ENTRY_TIME)):
        return ts
    p, e = _cell(feed, at, row, M.ENTRY_DATE)
    day, wrong = date(buf, p, feed.state[DATE_TEXT : DATE_NS + 1])
    wrong = wrong if e - p == 8 else 1
    p, e = _cell(feed, at, row, M.ENTRY_TIME)
    ns, problem = time_of_day(buf, p, e)
    if wrong != 0 or problem != 0 or e - p < 8:
        _refuse(feed, BAD_TIME)
        return ts
    return day + ns


@inlined
def _own_seq(buf: Any, feed: Any, at: Any, row: Any, mask: Any, seq: Any) -> Any:
    """The sequence of an event: the message's, or that of the source's own mapping."""
    if not _has(mask, M.OWN_SEQ):
        return seq
    p, e = _cell(feed, at, row, M.OWN_SEQ)
    value, problem = whole_number(buf, p, e)
    return value if problem == 0 else seq


@inlined
def _level(buf: Any, at: Any, row: Any, mask: Any, feed: Any, action: Any, instrument: Any, e: Any) -> Any:
    """Fill LEVEL's price, quantity and orders; -1 or why not."""
    px, reason = _price_in(buf, feed, at, row, mask, M.PRICE)
    qty = _I(0)
    if action != _REMOVE:
        qty, wrong = _qty_in(buf, feed, at, row, mask, M.QTY, instrument)
        reason = reason if reason >= 0 else wrong
    if action < _NEW or action > _REMOVE:
        reason = _I(UNSUPPORTED_ACTION)
    orders = _I(0)
    if _has(mask, M.ORDERS) or _has(mask, M.AUX):
        p, end = _cell(feed, at, row, M.AUX if _has(mask, M.AUX) else M.ORDERS)
        orders, problem = whole_number(buf, p, end)
        orders = orders if problem == 0 else _I(0)
    e.kind, e.price, e.qty, e.id, e.aux = _LEVEL, px, qty, _ZERO, orders
    return reason


@outlined
def _order(buf: Any, at: Any, row: Any, feed: Any, action: Any, instrument: Any, e: Any) -> Any:
    """Fill an order's kind, price, quantity and ids; -1 or why not."""
    mask = feed.masks[_U(row)]
    number = _id_in(buf, feed, at, row, mask, M.ID)
    if not _has(mask, M.ID):
        return _I(MISSING_FIELD)
    e.kind, e.price, e.qty, e.id, e.aux = _DELETE, _I(0), _I(0), number, _I(0)
    if action == _REMOVE:
        return _I(-1)
    px, reason = _price_in(buf, feed, at, row, mask, M.PRICE)
    qty, wrong = _qty_in(buf, feed, at, row, mask, M.QTY, instrument)
    e.kind, e.price, e.qty = _ADD if action == _NEW else _MODIFY, px, qty
    if action == _CHANGE and _has(mask, M.REF_ID):
        before = _id_in(buf, feed, at, row, mask, M.REF_ID)
        if before != number:
            e.kind, e.aux = _REPLACE, _I(before)
    if action < _NEW or action > _REMOVE:
        return _I(UNSUPPORTED_ACTION)
    return reason if reason >= 0 else wrong


@outlined
def _trade(
    buf: Any, at: Any, row: Any, feed: Any, action: Any, instrument: Any, seq: Any, ts: Any, recv: Any, flags: Any, out: Any, n: Any
) -> Any:
    """A TRADE, or the BREAK of one; returns n."""
    mask = feed.masks[_U(row)]
    number = _id_in(buf, feed, at, row, mask, M.TRADE_ID if _has(mask, M.TRADE_ID) else M.ID)
    if action == _REMOVE:
        _put(out[n], _BREAK, instrument, NO_SIDE, flags, seq, ts, recv, _I(0), _I(0), number, _I(0))
        return n + 1
    px, reason = _price_in(buf, feed, at, row, mask, M.PRICE)
    qty, wrong = _qty_in(buf, feed, at, row, mask, M.QTY, instrument)
    reason = reason if reason >= 0 else wrong
    if action != _NEW:
        reason = _I(UNSUPPORTED_ACTION)
    if reason >= 0:
        _refuse(feed, reason)
        return n
    side = _side_in(buf, feed, at, row, mask)
    _put(out[n], _TRADE, instrument, side, flags, seq, ts, recv, px, qty, number, _I(_id_in(buf, feed, at, row, mask, M.AUX)))
    return n + 1


@outlined
def _holds_book(buf: Any, at: Any, feed: Any, rows: Any) -> Any:
    """Whether a snapshot is one of the book, an empty one too, and not of trades or statistics alone."""
    for row in range(1, rows + 1):
        c = _character(buf, feed, at, row, feed.masks[_U(row)], M.TYPE, 0)
        if c in (_NEW, _CHANGE, _TYPE_EMPTY):
            return True
    return rows == 0


@inlined
def _opening(buf: Any, at: Any, number: Any, rows: Any, feed: Any, seq: Any, ts: Any, recv: Any, out: Any, n: Any) -> Any:
    """Before the entries: the body's instrument, and the CLEAR of a snapshot: ``(instrument, cleared, n)``."""
    instrument = _NONE
    if _has(feed.masks[0], M.SYMBOL):
        instrument, n = _instrument(buf, at, min(rows, 1), 0, feed, seq, ts, recv, out, n)
    elif number == M.SNAPSHOT:
        _refuse(feed, MISSING_FIELD)
    if number == M.SNAPSHOT and instrument < RESOLVED_BELOW and _holds_book(buf, at, feed, rows):
        _put(out[n], _CLEAR, instrument, NO_SIDE, _SNAPSHOT, seq, ts, recv, _I(0), _I(0), _ZERO, _I(0))
        return instrument, True, n + 1
    return instrument, False, n


@outlined
def _take_held(feed: Any, out: Any, n: Any) -> Any:
    """Events that were held back, the last of a transaction first: ``(last, n)``; -1 if there are none."""
    held = feed.state[HELD]
    for k in range(held):
        copy_record(out, n + k, feed.held, k)
    feed.state[HELD] = 0
    return _I(n) if held > 0 else _I(-1), n + held


@outlined
def _hold_back(feed: Any, out: Any, n: Any, last: Any) -> Any:
    """Keep the last event of a transaction, and those behind it, for the next call; returns n without them."""
    if last <= 0 or n - last > HELD_MAX:
        return n
    for k in range(n - last):
        copy_record(feed.held, k, out, last + k)
    feed.state[HELD] = n - last
    return last


@inlined
def _entry(
    buf: Any, at: Any, number: Any, row: Any, instrument: Any, feed: Any, seq: Any, ts: Any, recv: Any, flags: Any, out: Any, n: Any
) -> Any:
    """What an entry becomes: ``(n, of_book)``: whether the last event is one of the book. An entry that cannot be used is a GAP."""
    mask, by_order = feed.masks[_U(row)], feed.state[BY_ORDER] != 0
    kind = _character(buf, feed, at, row, mask, M.TYPE, _TYPE_EMPTY if by_order else 0)
    action = _NEW if number == M.SNAPSHOT else _character(buf, feed, at, row, mask, M.ACTION, _NEW)
    moment = ts if number == M.SNAPSHOT and kind != _TYPE_TRADE else _entry_time(buf, feed, at, row, mask, ts)
    seq = _own_seq(buf, feed, at, row, mask, seq)
    if kind == _TYPE_TRADE:
        return _trade(buf, at, row, feed, action, instrument, seq, moment, recv, flags, out, n), False
    e, reason = out[_U(n)], _I(-1)
    if kind in (_NEW, _CHANGE) or (by_order and kind == _TYPE_EMPTY and action == _REMOVE and _has(mask, M.ID)):
        e.seq, e.ts_event, e.ts_recv = _U(seq), moment, recv
        e.instrument, e.side, e.flags = instrument, np.uint8(kind - 48) if kind != _TYPE_EMPTY else _BOTH, flags
        if by_order:
            reason = _order(buf, at, row, feed, action, instrument, e)
        else:
            reason = _level(buf, at, row, mask, feed, action, instrument, e)
    elif kind == _TYPE_EMPTY and _has(mask, M.TYPE):
        if number == M.SNAPSHOT:
            return n, False  # it began with a CLEAR
        _put(e, _CLEAR, instrument, NO_SIDE, flags, seq, moment, recv, _I(0), _I(0), _ZERO, _I(0))
    elif kind <= 0:
        reason = _I(MISSING_FIELD) if kind == 0 else _I(UNKNOWN_TYPE)
    else:
        feed.state[ENTRIES_IGNORED] += 1
        return n, False
    if reason >= 0:  # the book lacks this entry: it is stale until the next snapshot
        _refuse(feed, reason)
        _put_gap(feed, instrument, seq, moment, recv, _I(0), _I(0), out, n)
    return n + 1, reason < 0


@inlined
def _entries(
    buf: Any, at: Any, number: Any, rows: Any, row: Any, instrument: Any, feed: Any, seq: Any, ts: Any, recv: Any, out: Any, n: Any
) -> Any:
    """Events of a snapshot's or an increment's entries from `row` (0: what comes before them) on.

    Book events of one instrument are one transaction: each gets MORE once the next is there. So where `out` has no room left the last of
    them, and what came after it, are held back for the next call.

    Returns:
        ``(row, instrument, n)``; row is beyond `rows` when all is done.
    """
    room, flags = _I(out.size) - RESERVE, _SNAPSHOT if number == M.SNAPSHOT else np.uint16(0)
    last = _I(-1)
    if feed.state[HELD] > 0:
        last, n = _take_held(feed, out, n)
    w0 = w1 = w2 = _ZERO
    if row == 0:
        instrument, cleared, n = _opening(buf, at, number, rows, feed, seq, ts, recv, out, n)
        last = n - 1 if cleared else last
        row = _I(1) if number != M.SNAPSHOT or instrument < RESOLVED_BELOW else rows + 1
    while row <= rows:
        if n > room:
            n = _hold_back(feed, out, n, last)
            break
        if number != M.SNAPSHOT and _has(feed.masks[_U(row)], M.SYMBOL):
            p, end = _cell(feed, at, row, M.SYMBOL)
            v0, v1, v2 = name_words(buf, p, end)
            if v0 != w0 or v1 != w1 or v2 != w2 or instrument >= RESOLVED_BELOW or end - p > _SYMBOL_BYTES:
                instrument, n = _instrument(buf, at, row, row, feed, seq, ts, recv, out, n)
                w0, w1, w2 = v0, v1, v2
        elif instrument == _NONE:
            _refuse(feed, UNKNOWN_INSTRUMENT)
        if instrument < RESOLVED_BELOW:
            n, of_book = _entry(buf, at, number, row, instrument, feed, seq, ts, recv, flags, out, n)
            if of_book:
                if last >= 0 and out[_U(last)].instrument == instrument:
                    out[_U(last)].flags |= _MORE
                last = n - 1
        row += 1
    return row, instrument, n


# ---------------------------------------------------------------- the second pass: other messages


@outlined
def _execution(buf: Any, at: Any, number: Any, instrument: Any, feed: Any, seq: Any, ts: Any, recv: Any, out: Any, n: Any) -> Any:
    """A fill of an execution report, a trade report, or their cancellation; other reports make no event."""
    mask = feed.masks[0]
    kind = _character(buf, feed, at, 0, mask, M.EXEC_TYPE, 70)
    change = _character(buf, feed, at, 0, mask, M.EXEC_TRANS, 48)
    fill = number == M.TRADE_REPORT or kind == 70 or ((kind == 49 or kind == 50) and _has(mask, M.EXEC_TRANS))
    if kind == 72 or (fill and change == 49):  # H, or ExecTransType / TradeReportTransType cancel
        number = _id_in(buf, feed, at, 0, mask, M.REF_ID)
        _put(out[n], _BREAK, instrument, NO_SIDE, np.uint16(0), seq, ts, recv, _I(0), _I(0), number, _I(0))
        return n + 1
    if not fill or change != 48:
        feed.state[ENTRIES_IGNORED] += 1
        return n
    return _trade(buf, at, 0, feed, _NEW, instrument, seq, ts, recv, np.uint16(0), out, n)


@outlined
def _status(buf: Any, at: Any, instrument: Any, feed: Any, seq: Any, ts: Any, recv: Any, out: Any, n: Any) -> Any:
    if not _has(feed.masks[0], M.STATUS):
        _refuse(feed, MISSING_FIELD)
        return n
    p, e = _cell(feed, at, 0, M.STATUS)
    code, problem = whole_number(buf, p, e)
    if problem != 0:
        _refuse(feed, BAD_STATUS)
        return n
    status = _STATUS_OF[_U(code)] if code < _STATUS_OF.size else _I(0)
    _put(out[n], _STATUS, instrument, NO_SIDE, np.uint16(0), seq, ts, recv, _I(0), _I(0), _ZERO, status)
    return n + 1


@outlined
def _quote(buf: Any, at: Any, instrument: Any, feed: Any, seq: Any, ts: Any, recv: Any, out: Any, n: Any) -> Any:
    """A QUOTE; a side without a price, or with a quantity of 0, is absent."""
    mask = feed.masks[0]
    bid, reason = _price_in(buf, feed, at, 0, mask, M.PRICE) if _has(mask, M.PRICE) else (_NO_PRICE, _I(-1))
    ask, wrong = _price_in(buf, feed, at, 0, mask, M.ASK) if _has(mask, M.ASK) else (_NO_PRICE, _I(-1))
    bid_qty, wrong_bid = _qty_in(buf, feed, at, 0, mask, M.QTY, instrument) if _has(mask, M.QTY) else (_I(0), _I(-1))
    ask_qty, wrong_ask = _qty_in(buf, feed, at, 0, mask, M.ASK_QTY, instrument) if _has(mask, M.ASK_QTY) else (_I(0), _I(-1))
    reason = reason if reason >= 0 else wrong_bid if wrong_bid >= 0 else wrong if wrong >= 0 else wrong_ask
    if reason >= 0:
        _refuse(feed, reason)
        return n
    if bid == _NO_PRICE or (_has(mask, M.QTY) and bid_qty == 0):
        bid, bid_qty = _NO_PRICE, _I(0)
    if ask == _NO_PRICE or (_has(mask, M.ASK_QTY) and ask_qty == 0):
        ask, ask_qty = _NO_PRICE, _I(0)
    _put(out[n], _QUOTE, instrument, NO_SIDE, np.uint16(0), seq, ts, recv, bid, bid_qty, _U(ask_qty), ask)
    return n + 1


@outlined
def _single(buf: Any, at: Any, number: Any, feed: Any, seq: Any, ts: Any, recv: Any, out: Any, n: Any) -> Any:
    """Events of a message without a group; returns n."""
    mask = feed.masks[0]
    if not _has(mask, M.SYMBOL):
        _refuse(feed, MISSING_FIELD)
        return n
    instrument, n = _instrument(buf, at, 0, 0, feed, seq, ts, recv, out, n)
    if instrument >= RESOLVED_BELOW:
        return n
    seq = _own_seq(buf, feed, at, 0, mask, seq)
    if number == M.EXECUTION or number == M.TRADE_REPORT:
        return _execution(buf, at, number, instrument, feed, seq, ts, recv, out, n)
    if number == M.SECURITY_STATUS:
        return _status(buf, at, instrument, feed, seq, ts, recv, out, n)
    if number == M.QUOTE:
        return _quote(buf, at, instrument, feed, seq, ts, recv, out, n)
    return n  # a definition: the instrument is announced


@outlined
def _definitions(buf: Any, at: Any, rows: Any, row: Any, feed: Any, seq: Any, ts: Any, recv: Any, out: Any, n: Any) -> Any:
    """REFERENCE of each new instrument of a list: ``(row, n)``."""
    row = max(row, _I(1))
    while row <= rows and n <= out.size - RESERVE:
        if _has(feed.masks[_U(row)], M.SYMBOL):
            _, n = _instrument(buf, at, row, row, feed, seq, ts, recv, out, n)
        else:
            _refuse(feed, MISSING_FIELD)
        row += 1
    return row, n


# ---------------------------------------------------------------- the loop


@outlined
def _skip(buf: Any, p: Any, end: Any, what: Any, stop: Any, feed: Any) -> Any:
    """After a fault at p: count it once, and return where to go on.

    Line ends between messages are no fault, nor is what a log writes before a message of its line, if that is short and has no SOH.
    """
    s = feed.state
    after = next_begin(buf, max(stop, p + _I(what != NO_BEGIN)), end)
    if what != NO_BEGIN:
        feed.malformed[_U(TRUNCATED if what == PARTIAL else GARBAGE + what - NO_BEGIN)] += _ONE
        s[IN_GARBAGE], s[SKIPPED] = 1, 0
        return after
    if s[IN_GARBAGE] == 0 and not _is_prefix(buf, p, after, s):
        feed.malformed[_U(GARBAGE)] += _ONE
        s[IN_GARBAGE] = 1
    return after


@outlined
def _is_prefix(buf: Any, p: Any, end: Any, s: Any) -> Any:
    while p < end and s[SKIPPED] == 0 and (buf[p] == 10 or buf[p] == 13):
        p += 1
    s[SKIPPED] += end - p
    if s[SKIPPED] > _PREFIX_BYTES:
        return False
    for k in range(p, end):
        if buf[k] < 32 or buf[k] > 126:
            return False
    return True


@inlined
def _begin_message(buf: Any, pos: Any, body: Any, stop: Any, ts_recv: Any, feed: Any, out: Any, n: Any) -> Any:
    """First pass and header of a whole message: ``(class, rows, seq, ts, recv, n)``; class OTHER: nothing more is to be done."""
    kind = _U(le16(buf, body + 3))
    kind = kind & _U(0xFF) if buf[body + 4] == 1 else kind if buf[body + 5] == 1 else _ZERO
    counter = _I(feed.types[kind])
    number = counter if counter < _CLASSES else _I(0)
    rows, fault = _fields(buf, pos, body, stop, _U(number), feed)
    if fault < 0 and feed.groups[_U(number)] != 0 and not _group_count(buf, pos, feed, rows):
        fault = _I(BAD_GROUP_COUNT)
    if fault >= 0:
        _refuse(feed, fault)
        return _I(0), rows, _I(0), _I(0), _I(0), n
    feed.counts[_U(counter)] += _ONE
    wanted, seq, ts, recv, n = _header(buf, pos, counter, ts_recv, feed, out, n)
    return number if wanted else _I(0), rows, seq, ts, recv, n


@inlined
def fix_events(buf: Any, pos: Any, end: Any, ts_recv: Any, feed: Any, out: Any) -> Any:
    """Decode messages of ``buf[pos:end]`` into `out`; 64 bytes behind `end` are readable.

    Args:
        ts_recv: when the bytes came, ns since 1970; 0: a message's SendingTime stands for it.
        out: EVENT array of at least ROOM_MIN.

    Returns:
        ``(pos, n)``: where it stopped: `out` is nearly full, or what is left is no whole message.
    """
    s = feed.state
    n, room, pos = _I(0), _I(out.size) - RESERVE, _I(pos)
    while n <= room and pos < end:
        if s[STEP] == 0:
            what, body, stop = frame_at(buf, pos, end)
            if what != WHOLE:
                if what == PARTIAL and s[FINAL] == 0:
                    break
                pos = _skip(buf, pos, end, what, stop, feed)
                continue
            s[IN_GARBAGE], s[SKIPPED] = 0, 0
            number, rows, seq, ts, recv, n = _begin_message(buf, pos, body, stop, ts_recv, feed, out, n)
            row, instrument = _I(0), _NONE
        else:
            number, rows, seq, ts, recv = s[M_CLASS], s[M_ROWS], s[M_SEQ], s[M_TIME], s[M_RECV]
            row, instrument, stop = s[STEP] - 1, np.uint32(s[M_INSTRUMENT]), pos + s[M_STOP]
            s[STEP] = 0
        if number == M.SNAPSHOT or number == M.INCREMENTAL:
            row, instrument, n = _entries(buf, pos, number, rows, row, instrument, feed, seq, ts, recv, out, n)
        elif number == M.DEFINITIONS:
            row, n = _definitions(buf, pos, rows, row, feed, seq, ts, recv, out, n)
        else:
            if number != M.OTHER:
                n = _single(buf, pos, number, feed, seq, ts, recv, out, n)
            row = rows + 1
        if row <= rows:
            s[M_CLASS], s[M_ROWS], s[M_SEQ], s[M_TIME], s[M_RECV] = number, rows, seq, ts, recv
            s[STEP], s[M_INSTRUMENT], s[M_STOP] = row + 1, _I(instrument), stop - pos
            break
        pos = stop + TRAILER_BYTES
    return pos, n


def warm_fix_feed() -> FixArrays:
    """Arrays of the final types, for compiling."""
    return make_fix_arrays(InstrumentTable(1).arrays, M.empty_tables(), source=0, tick_size=0, qty_exponent=-1)
