"""Instruments: symbols at sources, their dense u32 ids, their shards, and which symbols a source lets through.

:class:`InstrumentTable` owns the memory; the kernels below work on its arrays (:class:`Instruments`). An id is given in order of
first appearance and never changes. Several receiver threads may intern at once as long as each source belongs to one thread:
ids come from an atomic counter and an index slot is taken by compare-and-swap, after the record behind it is complete.

A symbol in compiled code is three little-endian u64 words: its bytes, zero padded to 24.
"""

from __future__ import annotations

import contextlib
from collections import namedtuple
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from tickmesh.node.event import NO_INSTRUMENT
from tickmesh.node.symbol_filter import GLOB_BYTES, SYMBOL_BYTES, encode_glob, glob_matches
from tickmesh.transports.toolbox import compare_and_swap, count_leading_zeros, fetch_add, inlined, load_acquire, outlined, quick

FILTERED = 0xFFFFFFFE
"""What :func:`intern` gives for a symbol that its source does not let through."""

INSTRUMENT = np.dtype(
    {
        "names": ["symbol", "w0", "w1", "w2", "tick_size", "source", "shard", "qty_exponent", "flags", "announced", "code", "depth"],
        "formats": ["S24", "<u8", "<u8", "<u8", "<i8", "<u4", "<u2", "i1", "u1", "<u4", "<u8", "<i8"],
        "offsets": [0, 0, 8, 16, 24, 32, 36, 38, 39, 40, 48, 56],
        "itemsize": 64,
    }
)
"""One instrument. ``w0..w2`` are the symbol's bytes again, as words; `tick_size` is in 1e-9; `announced` is 1 once a decoder has
emitted its REFERENCE event (set it to 0 to have that repeated); `code` is the venue's numeric code, where it has one; `depth` how many
levels of its book the venue shows, by position, 0 if no definition has told."""

RULE = np.dtype([("source", "<u4"), ("include", "<u4"), ("pattern", "u1", GLOB_BYTES)])
"""One line of a source's symbol filter: a glob (:mod:`tickmesh.node.symbol_filter`) to include or, with 0, to exclude."""
RULES_MAX = 4096
_NOBODY = 0xFFFFFFFF
"""Source of a rule that holds no more."""

COUNT, REFUSED_FULL, SHARDS, RULES, SEEN_FILTERED = range(5)
"""Indices of ``Instruments.state``."""

Instruments = namedtuple("Instruments", "records index filtered rules state")
"""`records` INSTRUMENT[capacity]; `index` u32 (id + 1, 0 = empty), open addressing; `filtered` u64, the same for the hashes of symbols
known to be filtered; `rules` RULE; `state` u64 (see the indices above)."""

PUBLISHED = 1
"""Flag of a record that is complete."""
EXCLUDED = 2
"""Flag of a record whose source does not let it through any more: a filter that changed while the node ran."""

_M1, _M2, _GOLDEN = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53), np.uint64(0x9E3779B97F4A7C15)
_S32, _S29, _ONE, _ZERO = np.uint64(32), np.uint64(29), np.uint64(1), np.uint64(0)
_MASK64 = (1 << 64) - 1
_NONE, _FILTERED = np.uint32(NO_INSTRUMENT), np.uint32(FILTERED)
_EXCLUDED = np.uint8(EXCLUDED)
_SPACES, _ALL_ONES = np.uint64(0x2020202020202020), np.uint64(_MASK64)


# ---------------------------------------------------------------- hashes


@inlined
def mix(x: Any) -> Any:
    """A 64-bit finaliser (MurmurHash3's): every input bit reaches every output bit."""
    x = (x ^ (x >> _S32)) * _M1
    x = (x ^ (x >> _S29)) * _M2
    return x ^ (x >> _S32)


@inlined
def symbol_hash(w0: Any, w1: Any, w2: Any) -> Any:
    """Hash of a symbol, u64; the same on every host and in every version (shards are placed by it)."""
    h = mix(w0)
    if w1 | w2:
        h = mix(mix(h ^ w1 ^ _GOLDEN) ^ w2 ^ _M2)
    return h


@inlined
def _entry_hash(source: Any, w0: Any, w1: Any, w2: Any) -> Any:
    return symbol_hash(w0, w1, w2) + np.uint64(source) * _GOLDEN


@outlined
def shard_of_words(w0: Any, w1: Any, w2: Any, shards: Any) -> Any:
    """Rendezvous hash: the shard, of `shards`, with the highest score for this symbol."""
    h = symbol_hash(w0, w1, w2)
    best, best_score = np.uint64(0), np.uint64(0)
    for k in range(np.uint64(shards)):
        score = mix(h + (np.uint64(k) + _ONE) * _GOLDEN)
        if score > best_score:
            best, best_score = np.uint64(k), score
    return best


def _mix(x: int) -> int:
    x = ((x ^ (x >> 32)) * int(_M1)) & _MASK64
    x = ((x ^ (x >> 29)) * int(_M2)) & _MASK64
    return x ^ (x >> 32)


def shard_of(symbol: str, shards: int) -> int:
    """Rendezvous shard of a symbol: adding a shard moves only the symbols that the new shard wins. Agrees with the kernel."""
    w0, w1, w2 = (int(w) for w in symbol_words(symbol))
    h = _mix(w0)
    if w1 | w2:
        h = _mix(_mix(h ^ w1 ^ int(_GOLDEN)) ^ w2 ^ int(_M2))
    return max(range(shards), key=lambda k: (_mix((h + (k + 1) * int(_GOLDEN)) & _MASK64), -k))


# ---------------------------------------------------------------- symbols as words


def symbol_words(symbol: str) -> tuple[np.uint64, np.uint64, np.uint64]:
    """A symbol's three words.

    Raises:
        ValueError: empty, longer than 24 bytes, or not ASCII.
    """
    raw = symbol.encode("ascii", errors="strict")
    if not 0 < len(raw) <= SYMBOL_BYTES:
        raise ValueError(f"symbol {symbol!r} has {len(raw)} bytes; 1 to {SYMBOL_BYTES} fit")
    words = np.frombuffer(raw.ljust(SYMBOL_BYTES, b"\0"), "<u8")
    return words[0], words[1], words[2]


@inlined
def trim_spaces(word: Any) -> Any:
    """Turn the trailing spaces of eight text bytes (a little-endian load) into zeros."""
    x = word ^ _SPACES
    if x == _ZERO:
        return _ZERO
    return word & (_ALL_ONES >> (count_leading_zeros(x) & np.uint64(0x38)))


@inlined
def trim_words(w0: Any, w1: Any, w2: Any) -> Any:
    """A symbol's words from space-padded text: trailing spaces become zeros."""
    w2 = trim_spaces(w2)
    if w2 == _ZERO:
        w1 = trim_spaces(w1)
        if w1 == _ZERO:
            w0 = trim_spaces(w0)
    return w0, w1, w2


@outlined
def code_words(code: Any) -> Any:
    """The symbol ``#<code>`` of an instrument known by its numeric code only: ``(w0, w1, w2)``."""
    rest, digits = np.uint64(code), np.int64(1)
    while rest >= np.uint64(10):
        rest //= np.uint64(10)
        digits += 1
    w0, w1, w2 = np.uint64(0x23), _ZERO, _ZERO
    rest = np.uint64(code)
    for place in range(digits, 0, -1):
        byte = (np.uint64(0x30) + rest % np.uint64(10)) << np.uint64(8 * (place & 7))
        if place < 8:
            w0 |= byte
        elif place < 16:
            w1 |= byte
        else:
            w2 |= byte
        rest //= np.uint64(10)
    return w0, w1, w2


def outlived(records: Any) -> Any:
    """Which of a source's instruments stand under their code, ``#123``, that a definition has named by now: nothing more comes of them."""
    by_code = records["w0"] & np.uint64(255) == np.uint64(ord("#"))
    return by_code & np.isin(records["code"], records["code"][~by_code & (records["code"] != 0)])


# ---------------------------------------------------------------- look-up and intern


@inlined
def find_instrument(table: Any, source: Any, w0: Any, w1: Any, w2: Any) -> Any:
    """Id of (source, symbol), u32, or NO_INSTRUMENT."""
    mask = np.uint64(table.index.size - 1)
    slot = _entry_hash(source, w0, w1, w2) & mask
    while True:
        entry = load_acquire(table.index, slot)
        if entry == np.uint32(0):
            return _NONE
        record = table.records[entry - np.uint32(1)]
        if record.w0 == w0 and record.w1 == w1 and record.w2 == w2 and record.source == np.uint32(source):
            return np.uint32(entry - np.uint32(1))
        slot = (slot + _ONE) & mask


@outlined
def _allowed(table: Any, source: Any, w0: Any, w1: Any, w2: Any) -> Any:
    """Whether the source's rules let the symbol through: some include matches (or there is none), and no exclude does."""
    has_include, included = False, False
    for i in range(np.int64(table.state[RULES])):
        rule = table.rules[i]
        if rule.source == np.uint32(source):
            matches = glob_matches(rule.pattern, w0, w1, w2)
            if rule.include == np.uint32(1):
                has_include = True
                included = included or matches
            elif matches:
                return False
    return included or not has_include


@outlined
def _is_filtered(table: Any, source: Any, w0: Any, w1: Any, w2: Any) -> Any:
    """The filter's verdict, remembered by hash, so that a filtered symbol's next message costs one probe."""
    h = _entry_hash(source, w0, w1, w2) | _ONE
    mask = np.uint64(table.filtered.size - 1)
    slot = mix(h) & mask
    while table.filtered[slot] != _ZERO and table.filtered[slot] != h:
        slot = (slot + _ONE) & mask
    if table.filtered[slot] == h:
        return True
    if _allowed(table, source, w0, w1, w2):
        return False
    if table.state[SEEN_FILTERED] < np.uint64(table.filtered.size // 2):
        while not compare_and_swap(table.filtered, slot, _ZERO, h):
            slot = (slot + _ONE) & mask
        fetch_add(table.state, SEEN_FILTERED, _ONE)
    return True


@outlined
def intern_new(table: Any, source: Any, w0: Any, w1: Any, w2: Any, tick_size: Any, exponent: Any, shard: Any) -> Any:
    """Give a symbol that is not in the table an id; `shard` < 0 places it by rendezvous hash."""
    if load_acquire(table.state, COUNT) >= np.uint64(table.records.size):
        fetch_add(table.state, REFUSED_FULL, _ONE)
        return _NONE
    new = fetch_add(table.state, COUNT, _ONE)
    if new >= np.uint64(table.records.size):
        fetch_add(table.state, REFUSED_FULL, _ONE)
        return _NONE
    record = table.records[new]
    record.w0, record.w1, record.w2 = w0, w1, w2
    record.tick_size, record.qty_exponent, record.source = tick_size, exponent, source
    record.shard = np.uint16(shard) if shard >= 0 else np.uint16(shard_of_words(w0, w1, w2, table.state[SHARDS]))
    record.flags = PUBLISHED
    mask = np.uint64(table.index.size - 1)
    slot = _entry_hash(source, w0, w1, w2) & mask
    while not compare_and_swap(table.index, slot, np.uint32(0), np.uint32(new) + np.uint32(1)):
        slot = (slot + _ONE) & mask
    return np.uint32(new)


@outlined
def intern_unseen(table: Any, source: Any, w0: Any, w1: Any, w2: Any, tick_size: Any, exponent: Any) -> Any:
    """:func:`intern` for a symbol that :func:`find_instrument` does not know."""
    if table.state[RULES] != _ZERO and _is_filtered(table, source, w0, w1, w2):
        return _FILTERED
    return intern_new(table, source, w0, w1, w2, tick_size, exponent, np.int64(-1))


@inlined
def intern(table: Any, source: Any, w0: Any, w1: Any, w2: Any, tick_size: Any, exponent: Any) -> Any:
    """Id of (source, symbol), given now if it is new.

    Returns:
        u32: the id; NO_INSTRUMENT when the table is full (counted); FILTERED when the source's filter refuses the symbol.
    """
    found = find_instrument(table, source, w0, w1, w2)
    if found != _NONE:
        return _FILTERED if table.records[found].flags & _EXCLUDED else found
    return intern_unseen(table, source, w0, w1, w2, tick_size, exponent)


@quick
def _find(table: Any, source: Any, w0: Any, w1: Any, w2: Any) -> Any:
    return find_instrument(table, source, w0, w1, w2)


@quick
def _intern(table: Any, source: Any, w0: Any, w1: Any, w2: Any, tick_size: Any, exponent: Any, shard: Any) -> Any:
    found = find_instrument(table, source, w0, w1, w2)
    if found != _NONE:
        return _FILTERED if table.records[found].flags & _EXCLUDED else found
    if shard >= np.int64(0):
        return intern_new(table, source, w0, w1, w2, tick_size, exponent, shard)
    return intern_unseen(table, source, w0, w1, w2, tick_size, exponent)


@quick
def _lets_through(table: Any, source: Any, w0: Any, w1: Any, w2: Any) -> Any:
    return _allowed(table, source, w0, w1, w2)


# ---------------------------------------------------------------- the table


class InstrumentTableFull(Exception):
    """No id is left.

    Attributes:
        capacity: how many instruments fit.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(f"the instrument table is full: {capacity} instruments; raise the configured number of instruments")
        self.capacity = capacity


class SymbolFiltered(Exception):
    """The source's filter does not let the symbol through."""

    def __init__(self, symbol: str, source: int) -> None:
        super().__init__(f"symbol {symbol!r} is filtered on source {source}; add it to the source's symbols")
        self.symbol, self.source = symbol, source


class InstrumentTable:
    """Every instrument of a node, in memory of fixed size."""

    def __init__(self, capacity: int, shards: int = 1) -> None:
        if not 0 < capacity < 1 << 30:
            raise ValueError(f"capacity {capacity}: 1 to {(1 << 30) - 1}")
        if not 0 < shards < 1 << 16:
            raise ValueError(f"shards {shards}: 1 to 65535")
        slots = 1 << (4 * capacity - 1).bit_length()
        self.capacity, self.shards = capacity, shards
        records, rules, state = np.zeros(capacity, INSTRUMENT), np.zeros(RULES_MAX, RULE), np.zeros(8, np.uint64)
        self.arrays = Instruments(records, np.zeros(slots, np.uint32), np.zeros(slots, np.uint64), rules, state)
        self.arrays.state[SHARDS] = shards
        self._held_back: list[tuple[int, tuple[str, ...], tuple[str, ...]]] | None = None

    def __len__(self) -> int:
        return min(int(self.arrays.state[COUNT]), self.capacity)

    @property
    def refused(self) -> int:
        """How often a new symbol found the table full."""
        return int(self.arrays.state[REFUSED_FULL])

    def intern(self, symbol: str, source: int = 0, tick_size: int = 10_000_000, qty_exponent: int = 0, shard: int | None = None) -> int:
        """Id of a symbol, given now if it is new; `shard` overrides the rendezvous placement of a new one.

        Args:
            tick_size: in 1e-9.
            qty_exponent: real quantity = quantity * 10**-exponent.

        Raises:
            ValueError: the symbol does not fit, or the shard does not exist.
            InstrumentTableFull: no id is left.
            SymbolFiltered: the source's filter refuses the symbol.
        """
        if shard is not None and not 0 <= shard < self.shards:
            raise ValueError(f"shard {shard} of {symbol!r}: 0 to {self.shards - 1}")
        place = np.int64(-1 if shard is None else shard)
        words = symbol_words(symbol)
        found = int(_intern(self.arrays, np.uint32(source), *words, np.int64(tick_size), np.int8(qty_exponent), place))
        if found == NO_INSTRUMENT:
            raise InstrumentTableFull(self.capacity)
        if found == FILTERED:
            raise SymbolFiltered(symbol, source)
        return found

    def find(self, symbol: str, source: int = 0) -> int | None:
        """Id of a symbol, or None."""
        found = int(_find(self.arrays, np.uint32(source), *symbol_words(symbol)))
        return None if found == NO_INSTRUMENT else found

    def symbol(self, instrument: int) -> str:
        """Symbol of an id.

        Raises:
            IndexError: no instrument has this id.
        """
        return bytes(self.record(instrument)["symbol"]).decode("ascii", errors="replace")

    def record(self, instrument: int) -> Any:
        """The INSTRUMENT record of an id (a view).

        Raises:
            IndexError: no instrument has this id.
        """
        if not 0 <= instrument < len(self) or not self.arrays.records[instrument]["flags"] & PUBLISHED:
            raise IndexError(f"no instrument {instrument}: there are {len(self)}")
        return self.arrays.records[instrument]

    def let_through(self, source: int, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> None:
        """Filter a source's symbols by globs, in place of what held before: any include (none = all), no exclude.

        Its receiver must not run meanwhile. Inside :meth:`filters_held_back` nothing happens yet.

        Raises:
            ValueError: a pattern is no glob (:func:`tickmesh.node.symbol_filter.encode_glob`), or there are more than 4096 rules.
        """
        rules = [(encode_glob(pattern), included) for patterns, included in ((include, 1), (exclude, 0)) for pattern in patterns]
        arrays, count = self.arrays, int(self.arrays.state[RULES])
        mine = [k for k in range(count) if arrays.rules[k]["source"] in (source, _NOBODY)]
        if len(rules) > RULES_MAX - count + len(mine):
            raise ValueError(f"more than {RULES_MAX} symbol patterns")
        if self._held_back is not None:
            self._held_back.append((source, tuple(include), tuple(exclude)))
            return
        for k in mine:  # other sources' receivers read the rules meanwhile
            arrays.rules["source"][k] = _NOBODY
        for (encoded, included), k in zip(rules, [*mine, *range(count, RULES_MAX)]):
            arrays.rules["pattern"][k], arrays.rules["include"][k] = encoded, included
            arrays.rules["source"][k] = source
            arrays.state[RULES] = max(int(arrays.state[RULES]), k + 1)
        arrays.filtered[:] = 0  # verdicts only: they are found again
        arrays.state[SEEN_FILTERED] = 0

    @contextlib.contextmanager
    def filters_held_back(self) -> Iterator[list[tuple[int, tuple[str, ...], tuple[str, ...]]]]:
        """Collect what :meth:`let_through` is asked for, to be done later: receivers are being made while others run."""
        self._held_back = []
        try:
            yield self._held_back
        finally:
            self._held_back = None

    def refilter(self, source: int) -> list[int]:
        """After another :meth:`let_through`: mark the source's instruments by it; returns those that are newly left out."""
        left_out = []
        for number in range(len(self)):
            record = self.arrays.records[number]
            if not record["flags"] & PUBLISHED or record["source"] != source:
                continue
            excluded = not self.lets_through(self.symbol(number), source)
            if excluded and not record["flags"] & EXCLUDED:
                left_out.append(number)
            self.arrays.records["flags"][number] = PUBLISHED | (EXCLUDED if excluded else 0)
        return left_out

    def lets_through(self, symbol: str, source: int = 0) -> bool:
        """Whether the source's filter lets a symbol through.

        Raises:
            ValueError: the symbol does not fit.
        """
        return bool(_lets_through(self.arrays, np.uint32(source), *symbol_words(symbol)))
