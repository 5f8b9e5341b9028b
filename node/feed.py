"""A feed: the state of one source's decoder, as arrays. Counters, the instrument map, arbiter state; and the kernels that resolve
instruments and announce them (REFERENCE) the first time they appear.

:func:`tickmesh.node.decoder.make_feed` makes one. Only the source's receiver thread writes it; counters may be read from outside.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np

from tickmesh.node.arbiter import make_arbiter
from tickmesh.node.definitions import make_definitions
from tickmesh.node.event import EVENT, NO_INSTRUMENT, NO_PRICE, Kind
from tickmesh.node.instruments import FILTERED, code_words, intern
from tickmesh.node.recovery import make_recovery
from tickmesh.transports.toolbox import inlined, le64, outlined, quick

Feed = namedtuple(
    "Feed", "instruments codes code_keys state counts malformed arbiter ladders depths held orders recovery known definitions"
)  # fmt: skip
"""`instruments` see :class:`tickmesh.node.instruments.Instruments`; `codes` u32: numeric code -> instrument (direct, or by the hash of
`code_keys` u64); `state` i64; `counts` u64, one per name in ``spec.counters``; `malformed` u64, one per name in :data:`REASONS`;
`arbiter` see :mod:`tickmesh.node.arbiter`; `ladders` i64, `depths` i64 by instrument, `held` EVENT[1]: see
:mod:`tickmesh.node.sbe_kernels`; `orders` ORDER, see :mod:`tickmesh.node.order_map`; `recovery`, and `known` i64 by instrument, see
:mod:`tickmesh.node.recovery`: from which packet on the ladders of a book are known, 0: from ``state[SINCE]`` on; `definitions` i64, see
:mod:`tickmesh.node.definitions`."""

NEXT_SEQ, MIDNIGHT_NS, TIME_BASE_NS, SOURCE, TICK_SIZE, QTY_EXPONENT, FILTERED_MESSAGES, ENDS, MESSAGES, STARTED, CODES, REBIND = range(12)
"""Indices of ``Feed.state``. REBIND is 1 where a message's symbol text may later name an instrument known by its code only."""
SINCE = 14
"""Index of ``Feed.state``: the packet from which on ladders are known of which ``Feed.known`` says nothing else."""
ORDERS_KNOWN = 15
"""Index of ``Feed.state``: entries of ``Feed.orders``."""
NOT_TOLD = -1
"""In TIME_BASE_NS: no message has given the seconds yet; until one does, events have the time of receipt."""
STATE_WORDS = 16
ORDER = np.dtype([("id", "<u8"), ("instrument", "<u4"), ("qty", "<u4")])
"""A resting order in ``Feed.orders``; free where `qty` is 0."""

REASONS = (
    "unknown_order", "orders_full",
    "truncated", "zero_length", "length_past_end", "bad_length", "unknown_message", "bad_field", "price_overflow",
    "unknown_instrument", "symbol_table_full", "short_packet", "trailing_bytes", "bad_sequence", "bad_preamble", "bad_group",
    "other_schema", "bad_encoding",
)  # fmt: skip
(
    UNKNOWN_ORDER, ORDERS_FULL,
    TRUNCATED, ZERO_LENGTH, LENGTH_PAST_END, BAD_LENGTH, UNKNOWN_MESSAGE, BAD_FIELD, PRICE_OVERFLOW,
    UNKNOWN_INSTRUMENT, SYMBOL_TABLE_FULL, SHORT_PACKET, TRAILING_BYTES, BAD_SEQUENCE, BAD_PREAMBLE, BAD_GROUP, OTHER_SCHEMA, BAD_ENCODING,
) = range(len(REASONS))  # fmt: skip

RESOLVED_BELOW = np.uint32(1 << 31)
"""An entry of the code map below this is an instrument; from here on it is one of the following."""
_FALLBACK = np.uint32(1 << 31)
UNBOUND = np.uint32(0xFFFFFFFD)
_FALLBACK_FILTERED = np.uint32(0xFFFFFFFC)
_FILTERED, _NONE = np.uint32(FILTERED), np.uint32(NO_INSTRUMENT)
_ID_BITS = np.uint32((1 << 30) - 1)
_GOLDEN, _ONE, _ZERO, _S32 = np.uint64(0x9E3779B97F4A7C15), np.uint64(1), np.uint64(0), np.uint64(32)
_SPACES = np.uint64(0x2020202020202020)
_REFERENCE = np.uint8(Kind.REFERENCE)


def make_arrays(
    instruments: Any, *, source: int, counters: int, direct_codes: int, hashed_codes: int, header_bytes: int = 0, midnight_ns: int = 0,
    tick_size: int = 10_000_000, qty_exponent: int = 0, rebind: bool = False, gap_wait_ns: int = 0, hold_packets: int = 0,
    hold_bytes: int = 0, start_sequence: int = 0, restart_distance: int = 0, ladder_levels: int = 0, order_slots: int = 1,
    time_told: bool = True, recovery_line: int = -1, definition_line: int = -1,
) -> Feed:  # fmt: skip
    """A feed's arrays; `direct_codes` entries by code, or `hashed_codes` (a power of two) entries by hash, or neither.

    `ladder_levels` > 0: ladders of so many levels for every instrument.
    `order_slots` (a power of two): room for orders, where messages name nothing else. `time_told`: no message has to give the time base.
    `recovery_line`, `definition_line`: the lines that bring snapshots and definitions; -1: none does.
    """
    state = np.zeros(STATE_WORDS, np.int64)
    state[NEXT_SEQ], state[MIDNIGHT_NS], state[TIME_BASE_NS], state[SOURCE] = 1, midnight_ns, midnight_ns, source
    state[TICK_SIZE], state[QTY_EXPONENT], state[REBIND] = tick_size, qty_exponent, rebind
    if not time_told:
        state[TIME_BASE_NS] = NOT_TOLD
    arbiter = make_arbiter(
        header_bytes=header_bytes, gap_wait_ns=gap_wait_ns, hold_packets=hold_packets, hold_bytes=hold_bytes,
        start_sequence=start_sequence, restart_distance=restart_distance,
    )  # fmt: skip
    codes = np.full(max(1, direct_codes, hashed_codes), UNBOUND, np.uint32)
    keys = np.zeros(max(1, hashed_codes), np.uint64)
    with_ladder = instruments.records.size if ladder_levels else 1
    ladders = np.full(2 * with_ladder * max(1, ladder_levels), NO_PRICE, np.int64)
    depths, held, orders = np.zeros(with_ladder, np.int64), np.zeros(1, EVENT), np.zeros(order_slots, ORDER)
    counts, refused = np.zeros(max(1, counters), np.uint64), np.zeros(len(REASONS), np.uint64)
    recovery = make_recovery(recovery_line, with_ladder, ladders.size, counts.size, refused.size)
    known = np.zeros(with_ladder, np.int64)
    definitions = make_definitions(definition_line)
    return Feed(instruments, codes, keys, state, counts, refused, arbiter, ladders, depths, held, orders, recovery, known, definitions)


@inlined
def find_code(feed: Any, code: Any) -> Any:
    """Entry of a numeric code in a hashed code map."""
    mask = np.uint64(feed.code_keys.size - 1)
    key = np.uint64(code) + _ONE
    slot = ((key * _GOLDEN) >> _S32) & mask
    while True:
        found = feed.code_keys[slot]
        if found == key:
            return feed.codes[slot]
        if found == _ZERO:
            return UNBOUND
        slot = (slot + _ONE) & mask


@outlined
def bind_code(feed: Any, code: Any, entry: Any) -> Any:
    """Make a code's entry; a full map leaves it unbound (its messages then resolve by the slow path)."""
    if feed.code_keys.size == 1:
        feed.codes[np.uint64(code)] = entry
        return
    mask = np.uint64(feed.code_keys.size - 1)
    key = np.uint64(code) + _ONE
    slot = ((key * _GOLDEN) >> _S32) & mask
    while feed.code_keys[slot] != _ZERO and feed.code_keys[slot] != key:
        slot = (slot + _ONE) & mask
    if feed.code_keys[slot] == _ZERO:
        if 2 * feed.state[CODES] >= feed.code_keys.size or key == _ZERO:
            return
        feed.state[CODES] += 1
        feed.code_keys[slot] = key
    feed.codes[slot] = entry


@quick
def bind_unannounced(feed: Any, code: Any, instrument: Any) -> Any:
    """Bind a code from outside; its first message takes the slow path, which announces the instrument."""
    feed.instruments.records[instrument].code = np.uint64(code)
    bind_code(feed, np.uint64(code), np.uint32(instrument) | _FALLBACK)


@outlined
def announce(feed: Any, instrument: Any, seq: Any, ts_event: Any, ts_recv: Any, out: Any, n: Any) -> Any:
    """Write the REFERENCE event of an instrument that has not been announced yet; returns the new `n`."""
    record = feed.instruments.records[instrument]
    if record.announced != np.uint32(0):
        return n
    record.announced = np.uint32(1)
    e = out[n]
    e.seq, e.ts_event, e.ts_recv = np.uint64(seq), ts_event, ts_recv
    e.instrument, e.kind, e.side, e.flags = instrument, _REFERENCE, np.uint8(record.qty_exponent), np.uint16(0)
    e.price, e.qty, e.id, e.aux = record.tick_size, np.int64(record.w0), record.w1, np.int64(record.w2)
    return n + 1


@outlined
def resolve_symbol(feed: Any, w0: Any, w1: Any, w2: Any, tick: Any, seq: Any, ts_event: Any, ts_recv: Any, out: Any, n: Any) -> Any:
    """Instrument of a symbol that is new, or not announced; ``(instrument, n)``, instrument >= RESOLVED_BELOW if the message is dropped."""
    if w0 == _ZERO:
        feed.malformed[UNKNOWN_INSTRUMENT] += _ONE
        return _NONE, n
    found = intern(feed.instruments, np.uint32(feed.state[SOURCE]), w0, w1, w2, tick, np.int8(feed.state[QTY_EXPONENT]))
    if found == _NONE:
        feed.malformed[SYMBOL_TABLE_FULL] += _ONE
    elif found == _FILTERED:
        feed.state[FILTERED_MESSAGES] += 1
    else:
        n = announce(feed, found, seq, ts_event, ts_recv, out, n)
    return found, n


@inlined
def _filled_up(word: Any, size: Any) -> Any:
    """The first `size` bytes of a word, 0 to 7, then spaces; zero if there are none."""
    kept = (_ONE << np.uint64(8 * size)) - _ONE
    return (word & kept) | (_SPACES & ~kept) if size > 0 else _ZERO


@inlined
def text_words(buf: Any, at: Any, size: Any) -> Any:
    """The first `size` bytes of a text, at most 24, as three words; one that they fill in part is filled up with spaces."""
    w0, w1, w2 = le64(buf, at), le64(buf, at + 8), le64(buf, at + 16)
    if size < 24:
        w2 = _filled_up(w2, size - 16)
    if size < 16:
        w1 = _filled_up(w1, size - 8)
    if size < 8:
        w0 = _filled_up(w0, size)
    return w0, w1, w2


@outlined
def resolve_code(
    feed: Any, entry: Any, code: Any, w0: Any, w1: Any, w2: Any, tick: Any, seq: Any, ts_event: Any, ts_recv: Any, out: Any, n: Any
) -> Any:
    """Instrument of a code whose map `entry` is not an instrument (a directory message passes UNBOUND to bind anew).

    The symbol is the message's text, else ``#<code>`` until a message with text comes.

    Returns:
        ``(instrument, n)``; the message is dropped if instrument >= RESOLVED_BELOW.
    """
    has_text = w0 != _ZERO
    if entry == _FILTERED or (entry == _FALLBACK_FILTERED and not has_text):
        feed.state[FILTERED_MESSAGES] += 1
        return _FILTERED, n
    if entry < _FALLBACK_FILTERED and not has_text:
        found = entry & _ID_BITS
        if feed.state[REBIND] == 0:
            bind_code(feed, code, found)
        return found, announce(feed, found, seq, ts_event, ts_recv, out, n)
    if not has_text:
        w0, w1, w2 = code_words(np.uint64(code))
    found, n = resolve_symbol(feed, w0, w1, w2, tick, seq, ts_event, ts_recv, out, n)
    if found == _FILTERED:
        bind_code(feed, code, _FILTERED if has_text or feed.state[REBIND] == 0 else _FALLBACK_FILTERED)
    elif found != _NONE:
        feed.instruments.records[found].code = np.uint64(code)
        bind_code(feed, code, found if has_text or feed.state[REBIND] == 0 else found | _FALLBACK)
    return found, n
