"""Turns a protocol spec and a framing into a compiled decoder: generates a readable module, specialised for both, and loads it.

The module offers (see :data:`Decoder`)::

    decode_stream(buf, pos, end, ts_recv, feed, out) -> (pos, n)            framings that carry a stream
    decode_packets(buf, packets, first, count, feed, out) -> (next, n)      framings that carry packets
    decode_flush(now_ns, feed, out) -> n                                    the same; time passes without packets

`buf` is a writable, contiguous uint8 array with 64 bytes of slack after `end`; `out` an EVENT array of at least 3. Malformed input is
counted by reason and skipped; nothing outside ``[pos, end)`` and the slack is read; every call that can make progress does.

Loops that contain a decoder call its parts, ``stream_events``, ``packet_events`` and ``flush_events``: the same without being entry points.

* ``decode_stream`` returns where it stopped: `out` is nearly full, or the rest is not a whole message. Called again with more bytes (or
  more room) it goes on; at the end of a recording tell :func:`end_of_stream` how many bytes are left over.
* ``decode_packets`` decodes ``packets[first:count]`` and returns the index of the first packet that it has not finished. Until it
  returns ``(count, 0)`` call it again with `first` = that index and the same buffer: held packets may still be waiting for room.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from tickmesh.node import arbiter, definitions, feed, recovery
from tickmesh.node.event import NO_PRICE, NO_SIDE, PRICE_DECIMALS
from tickmesh.node.feed import REASONS, Feed
from tickmesh.node.instruments import FILTERED, InstrumentTable, outlived
from tickmesh.node.layout import NEVER, Column, Layout, common_layout
from tickmesh.node.protocol import KINDS, OF_ORDER, Case, Field, FlagRule, Framing, MappingError, Message, Spec, fields_of
from tickmesh.node.sbe_mapping import SbeSpec, select_sbe
from tickmesh.transports.codecache import import_generated, load_generated, write_generated

RESERVE = 2
"""Events one message may make (REFERENCE and its own): decoding stops while there is room for that many."""
_I64_MAX = (1 << 63) - 1


class Decoder(Protocol):
    """What a generated module offers; the functions of the other kind of framing are absent."""

    decode_stream: Callable[..., tuple[int, int]]
    decode_packets: Callable[..., tuple[int, int]]
    decode_flush: Callable[..., int]


def load_decoder(
    spec: Spec,
    framing: Framing,
    *,
    fields: Mapping[str, str] | Sequence[str] = (),
    messages: Iterable[str] = (),
    progress: Callable[[str], None] | None = None,
) -> Decoder:
    """The compiled decoder of a protocol in a framing, compiled in a helper process if it is not in the cache.

    Args:
        fields: a table of protocol field -> event field (``{"attribution": "aux"}``) that replaces the spec's mapping in every message
            that has the field; or a list of event fields (or symbol, volume, size, timestamp) that the protocol must provide.
        messages: names of the messages to turn into events; others are counted only. Empty: all.
        progress: see :func:`tickmesh.transports.codecache.load_generated`.

    Raises:
        MappingError: `fields` or `messages` name something the protocol does not have.
        CompileError: the generated module does not compile.
    """
    chosen = select(spec, fields, messages)
    return load_generated(f"decoder_{spec.name}_{framing.name}", decoder_source(chosen, framing), progress)


def decoder_parts(
    spec: Spec, framing: Framing, *, fields: Mapping[str, str] | Sequence[str] = (), messages: Iterable[str] = ()
) -> ModuleType:
    """The decoder's module, not compiled: for a loop that contains it (:mod:`tickmesh.node.loops`). Arguments as for :func:`load_decoder`.

    Raises:
        MappingError: `fields` or `messages` name something the protocol does not have.
    """
    source = decoder_source(select(spec, fields, messages), framing)
    return import_generated(write_generated(f"decoder_{spec.name}_{framing.name}", source))


# ---------------------------------------------------------------- a source's own mapping

_EVENT_NAMES = {"volume": "qty", "size": "qty", "quantity": "qty", "order_id": "id"}
_ALWAYS = ("symbol", "instrument", "timestamp", "ts_event", "ts_recv", "seq", "kind", "flags")


def select(spec: Spec, fields: Mapping[str, str] | Sequence[str], messages: Iterable[str]) -> Spec:
    """The spec as a source wants it: see :func:`load_decoder`."""
    if isinstance(spec, SbeSpec):
        return select_sbe(spec, fields, messages)
    problems: list[str] = []
    wanted = set(messages)
    known = ", ".join(m.name for m in spec.messages)
    problems += [
        f"messages: {spec.name} has no message {name!r}; it has {known}" for name in sorted(wanted - {m.name for m in spec.messages})
    ]
    changes = {k: _EVENT_NAMES.get(v, v) for k, v in fields.items()} if isinstance(fields, Mapping) else {}
    every = {name for m in spec.messages for name in m.fields}
    for source, target in changes.items():
        if source not in every:
            problems.append(f"fields.{source}: {spec.name} has no such field; it has {', '.join(sorted(every))}")
        if target not in ("side", "price", "qty", "id", "aux"):
            problems.append(f"fields.{source}: {target!r} is not an event field: side, price, qty, id, aux")
    if not isinstance(fields, Mapping):
        given = {k for m in spec.messages for c in m.cases for k in c.values}
        known = ", ".join(sorted({*given, *_ALWAYS}))
        missing = [name for name in fields if name not in _ALWAYS and _EVENT_NAMES.get(name, name) not in given]
        problems += [f"fields: {spec.name} gives no {name!r}; it gives {known}" for name in missing]
    if not problems:
        chosen = tuple(_remap(m, changes, problems) if not wanted or m.name in wanted else _silent(m, spec) for m in spec.messages)
    if problems:
        raise MappingError(problems)
    return dataclasses.replace(spec, messages=chosen)


def configured(spec: Spec, price_scale: Decimal | None, tick_size: int | None, qty_exponent: int | None) -> Spec:
    """The spec with what a source says of its numbers; None leaves the protocol's own.

    Args:
        price_scale: real price = the protocol's price times this, exactly, which takes a power of ten.
        tick_size: of instruments whose definition gives none, in 1e-9.
        qty_exponent: decimals of a quantity.

    Raises:
        MappingError: prices cannot be scaled so.
    """
    own_tick = spec.tick_size
    if price_scale is not None and price_scale != 1:
        spec, own_tick = _rescaled(spec, price_scale), int(spec.tick_size * price_scale)
    return dataclasses.replace(
        spec, tick_size=tick_size or own_tick, qty_exponent=spec.qty_exponent if qty_exponent is None else qty_exponent
    )


def _rescaled(spec: Spec, scale: Decimal) -> Spec:
    """Prices times `scale`: their fields have other decimals."""
    if isinstance(spec, SbeSpec):
        raise MappingError(["price_scale: the exponents of prices are in the SBE schema: correct them there, and remove the key"])
    _, digits, places = scale.normalize().as_tuple()
    assert isinstance(places, int)
    fields = {f"{m.name}.{f.name}": f.decimals - places for m in spec.messages for f in m.fields.values() if f.decimals >= 0}
    problems = [f"price_scale: {scale} is no power of ten, and {spec.name} counts prices in those"] if digits != (1,) else []
    if not problems:
        problems = [
            f"price_scale: {scale} would give {name} {decimals} decimals, and 0 to {PRICE_DECIMALS} are possible"
            for name, decimals in fields.items()
            if not 0 <= decimals <= PRICE_DECIMALS
        ]
        if not 0 < spec.tick_size * scale == int(spec.tick_size * scale):
            problems.append(f"price_scale: {scale} would make the tick size {spec.tick_size * scale}e-9: write a spec file of your own")
    if problems:
        raise MappingError(problems)

    def scaled(one: Field) -> Field:
        return dataclasses.replace(one, decimals=one.decimals - places) if one.decimals >= 0 else one

    messages = tuple(dataclasses.replace(m, fields={name: scaled(f) for name, f in m.fields.items()}) for m in spec.messages)
    return dataclasses.replace(spec, messages=messages)


def _silent(message: Message, spec: Spec) -> Message:
    """The message, counted only; directory and time messages keep working, and the orders that are followed, since others need them."""
    return dataclasses.replace(message, cases=tuple(_silent_case(case, spec) for case in message.cases))


def _silent_case(case: Case, spec: Spec) -> Case:
    if case.kind in ("reference", "time"):
        return case
    if spec.follow_orders and case.kind in ("add", *OF_ORDER):
        return dataclasses.replace(case, silent=True)
    return dataclasses.replace(case, kind="nothing", values={}, flag_rules=())


def _remap(message: Message, changes: Mapping[str, str], problems: list[str]) -> Message:
    cases = []
    for case in message.cases:
        values = dict(case.values)
        for source, target in changes.items():
            field = message.fields.get(source)
            if field is None or case.kind not in KINDS or case.kind == "reference":
                continue
            if field.text and field.size > 8:
                problems.append(f"fields.{source}: text of {field.size} bytes does not fit an event field of 8")
            elif target == "side" and not field.map:
                problems.append(f"fields.{source}: has no map to a side")
            elif target == "price" and field.decimals < 0:
                problems.append(f"fields.{source}: has no decimals, so it is not a price")
            values[target] = source
        cases.append(dataclasses.replace(case, values=values))
    return dataclasses.replace(message, cases=tuple(cases))


# ---------------------------------------------------------------- feeds


def make_feed(
    spec: Spec,
    instruments: InstrumentTable,
    source_id: int = 0,
    *,
    framing: Framing | None = None,
    midnight_ns: int = 0,
    gap_wait_ns: int = 50_000_000,
    hold_packets: int = 1024,
    hold_bytes: int = 2048,
    start_sequence: int = 0,
    restart_distance: int = 65536,
    order_slots: int = 1 << 22,
    recovery_line: int = -1,
    definition_line: int = -1,
) -> Feed:
    """State of one source's decoder.

    Args:
        framing: needed for packet framings.
        midnight_ns: midnight (venue's time zone) of the session as nanoseconds since the epoch, for protocols that count from midnight.
        gap_wait_ns: how long a missing packet may take to come on the other line.
        hold_packets, hold_bytes: how many packets wait for a missing one, and the longest that can.
        start_sequence: first sequence expected; 0 takes the first that comes.
        restart_distance: see :mod:`tickmesh.node.arbiter`; only for framings without a session id.
        recovery_line: the line by which snapshots come, for mappings with ``[recovery]``: then a feed that does not begin with sequence 1
            begins with a gap. -1: there are none.
        definition_line: the line by which definitions come, for SBE mappings that have any. -1: there is none.
        order_slots: for protocols that follow orders, a power of two: three quarters of it may rest at once.
    """
    size = spec.code_bytes
    packets = framing is not None and framing.packets
    return feed.make_arrays(
        instruments.arrays,
        source=source_id,
        counters=len(spec.counters),
        direct_codes=1 << (8 * size) if size in (1, 2) else 0,
        hashed_codes=instruments.arrays.index.size if size > 2 else 0,
        header_bytes=framing.messages_at if framing else 0,
        midnight_ns=midnight_ns,
        tick_size=spec.tick_size,
        qty_exponent=spec.qty_exponent,
        rebind=spec.rebinds,
        ladder_levels=spec.ladder_levels,
        gap_wait_ns=gap_wait_ns,
        hold_packets=hold_packets if packets else 0,
        hold_bytes=hold_bytes if packets else 0,
        start_sequence=max(start_sequence, arbiter.FIRST_SEQUENCE) if recovery_line >= 0 else start_sequence,
        recovery_line=recovery_line,
        definition_line=definition_line,
        restart_distance=0 if framing is None or framing.session else restart_distance,
        order_slots=order_slots if spec.follow_orders else 1,
        time_told=spec.timestamp_since != "time_message",
    )


def message_counts(state: Feed, spec: Spec) -> dict[str, int]:
    """How many of each message (each case, where a message has several) came: ``{"add_order": 12, …}``, those that came only."""
    return {name: int(n) for name, n in zip(spec.counters, state.counts) if n}


def malformed(state: Feed) -> dict[str, int]:
    """How many messages or packets were refused, by reason; those that occurred only."""
    return {name: int(n) for name, n in zip(REASONS, state.malformed) if n}


def filtered(state: Feed) -> int:
    """How many messages belonged to symbols that the source's filter does not let through."""
    return int(state.state[feed.FILTERED_MESSAGES])


def since_when(state: Feed, instruments: Any) -> Any:
    """From which sequence of the source on the decoder has followed each of these books by position, or NEVER; i64."""
    own = state.known[instruments] if state.known.size > 1 else np.zeros(len(instruments), np.int64)
    return np.where(own != 0, own, state.state[feed.SINCE])


def snapshot_counters(state: Feed, instruments: InstrumentTable) -> dict[str, int]:
    """What a snapshot channel has brought, by the names of :class:`tickmesh.node.telemetry.SourceCounter`; nothing if there is none."""
    if state.recovery.words[recovery.LINE] < 0:
        return {}
    found = recovery.recovery_counters(state.recovery)
    records = instruments.arrays.records[: len(instruments)]
    mine = np.flatnonzero(records["source"] == state.state[feed.SOURCE])
    mine = mine[~outlived(records[mine])]
    return {
        "books_waiting": int(np.count_nonzero(since_when(state, mine) == recovery.NEVER)),
        "snapshots": found["snapshots"],
        "books_recovered": found["recovered"],
        "snapshots_too_old": found["too_old"],
        "snapshots_ahead": found["ahead"],
        "snapshots_not_kept": found["not_kept"],
        "snapshots_too_large": found["overflows"],
        "snapshot_turns": found["turns"],
        "snapshot_turns_broken": found["broken_turns"],
    }


def definition_counters(state: Feed) -> dict[str, int]:
    """What a definition channel has brought, by the names of :class:`tickmesh.node.telemetry.SourceCounter`; nothing if there is none."""
    words = state.definitions
    if words[definitions.LINE] < 0:
        return {}
    return {
        "definition_packets": int(state.arbiter.lines[words[definitions.LINE], arbiter.LINE_PACKETS]),
        "definition_turns": int(words[definitions.TURNS]),
        "definitions_new": int(words[definitions.NEW]),
    }


def arbitration(state: Feed) -> dict[str, int]:
    """Counters of the A/B arbitration: gaps, missing, duplicates (total, and ``duplicates_0`` … by line), held packets and so on."""
    result = {name: int(state.arbiter.state[index]) for name, index in arbiter.COUNTERS.items()}
    result["expected"] = int(state.arbiter.state[arbiter.EXPECTED])
    result["held_now"] = int(state.arbiter.state[arbiter.HELD_COUNT])
    names = (
        ("packets", arbiter.LINE_PACKETS),
        ("duplicates", arbiter.LINE_DUPLICATES),
        ("held", arbiter.LINE_HELD),
        ("messages", arbiter.LINE_MESSAGES),
    )
    for name, column in names:
        result[name] = int(state.arbiter.lines[:, column].sum())
        result.update({f"{name}_{line}": int(n) for line, n in enumerate(state.arbiter.lines[:, column]) if n})
    return result


def end_of_stream(state: Feed, left_over: int) -> None:
    """Count what ``decode_stream`` left at the end of a recording: a message cut short."""
    if left_over:
        state.malformed[feed.TRUNCATED] += np.uint64(1)


def bind_symbol(state: Feed, spec: Spec, instruments: InstrumentTable, code: int, symbol: str) -> int:
    """Tell a feed the symbol of a numeric code from outside (a definition file, a recording's metadata); returns the instrument.

    Raises:
        ValueError: the protocol has no numeric codes, or the code does not fit.
        SymbolFiltered, InstrumentTableFull: see :meth:`InstrumentTable.intern`.
    """
    if not spec.code or (state.code_keys.size == 1 and not 0 <= code < state.codes.size):
        raise ValueError(f"{spec.name} knows no instrument code {code}")
    found = instruments.intern(symbol, int(state.state[feed.SOURCE]), spec.tick_size, spec.qty_exponent)
    feed.bind_unannounced(state, np.uint64(code), np.uint32(found))
    return found


def dbn_symbols(data: bytes | memoryview) -> dict[int, str]:
    """Instrument id -> raw symbol, from the metadata of a DBN file (versions 1 to 3; the last mapping of an id counts).

    Raises:
        ValueError: not a DBN file, or its metadata is cut short.
    """
    raw = bytes(data[:8])
    if raw[:3] != b"DBN" or len(raw) < 8:
        raise ValueError("not a DBN file: it does not start with 'DBN' and a length")
    version, size = raw[3], int.from_bytes(raw[4:8], "little")
    meta = bytes(data[8 : 8 + size])
    if len(meta) < size or size < 104:
        raise ValueError(f"the DBN metadata is cut short: {len(meta)} of {size} bytes")
    width = 22 if version == 1 else 71
    at = 104 + int.from_bytes(meta[100:104], "little")  # the fixed part, then the length and bytes of a schema definition
    for _ in range(3):  # symbols, partial, not found: lists of fixed-width text
        at += 4 + width * int.from_bytes(meta[at : at + 4], "little")
    found: dict[int, str] = {}
    mappings = int.from_bytes(meta[at : at + 4], "little")
    at += 4
    for _ in range(min(mappings, size // width)):
        symbol = meta[at : at + width].split(b"\0")[0].decode("ascii", errors="replace")
        intervals = int.from_bytes(meta[at + width : at + width + 4], "little")
        at += width + 4
        for _ in range(min(intervals, size // width)):
            code = meta[at + 8 : at + 8 + width].split(b"\0")[0]
            at += 8 + width
            if code.isdigit():
                found[int(code)] = symbol
    return found


# ---------------------------------------------------------------- generating: source text


class _Source:
    """Lines of Python with an indentation level."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 0

    def __call__(self, text: str = "") -> None:
        self.lines.extend("    " * self.depth + line if line else "" for line in text.split("\n"))

    def indent(self, by: int = 1) -> None:
        self.depth += by


_IMPORTS = """
import numpy as np

from tickmesh.node import arbiter as A
from tickmesh.node.arbiter import emit_clear, emit_gap, hold, next_step, offer, release
from tickmesh.node.event import EVENT
from tickmesh.node.feed import (
    BAD_FIELD, BAD_LENGTH, BAD_PREAMBLE, BAD_SEQUENCE, ENDS, LENGTH_PAST_END, MIDNIGHT_NS, NEXT_SEQ, PRICE_OVERFLOW, RESOLVED_BELOW,
    SHORT_PACKET, SOURCE, STARTED, TIME_BASE_NS, TRAILING_BYTES, TRUNCATED, UNBOUND, UNKNOWN_MESSAGE, ZERO_LENGTH, FILTERED_MESSAGES,
    find_code, make_arrays, resolve_code, resolve_symbol,
)
from tickmesh.node.instruments import InstrumentTable, find_instrument, trim_words
from tickmesh.transports.toolbox import be16, be32, be64, copy_record, inlined, le16, le32, le64, loop, outlined

_ONE, _ZERO = np.uint64(1), np.uint64(0)
_NO_PRICE = np.int64({no_price})
_BAD = np.int64({bad})
_ALL = np.uint32(0xFFFFFFFF)
"""
_BAD = -(1 << 62) - 1
"""In a map's table: no such raw value."""


def decoder_source(spec: Spec, framing: Framing) -> str:
    """Source of the decoder module."""
    out = _Source()
    out(f'"""Decoder of {spec.title} in {framing.title}: generated from {spec.name}.toml and {framing.name}."""')
    out(_IMPORTS.strip("\n").format(no_price=NO_PRICE, bad=_BAD))
    writer = _writer(spec, framing, out)
    writer.more_imports()
    writer.tables()
    writer.total()
    writer.messages()
    if framing.packets:
        writer.packets()
    else:
        writer.stream()
    writer.warm()
    return "\n".join(out.lines) + "\n"


def _writer(spec: Spec, framing: Framing, out: _Source) -> _DecoderWriter:
    if isinstance(spec, SbeSpec):
        from tickmesh.node.sbe_decoder import SbeDecoderWriter  # the part of this generator that schemas need, which needs the rest

        return SbeDecoderWriter(spec, framing, out)
    return _DecoderWriter(spec, framing, out)


def _load(field: Field, base: str) -> str:
    """Expression for a field's raw value: an unsigned numpy type of its size, or signed if the field is."""
    at = f"{base} + {field.offset}" if field.offset else base
    order = "be" if field.big else "le"
    if field.size == 1:
        raw = f"buf[np.uint64({at})]"
    elif field.size == 3:
        raw = (
            f"(np.uint32(be16(buf, {at})) << np.uint32(8) | np.uint32(buf[np.uint64({at} + 2)]))"
            if field.big
            else (f"(np.uint32(le16(buf, {at})) | np.uint32(buf[np.uint64({at} + 2)]) << np.uint32(16))")
        )
    elif field.size == 6:
        raw = f"(be64(buf, {at}) >> np.uint64(16))" if field.big else f"(le64(buf, {at}) & np.uint64(0xFFFFFFFFFFFF))"
    elif field.text:
        raw = _text_word(field, base, 0)
    else:
        raw = f"{order}{8 * field.size}(buf, {at})"
    return f"np.int{8 * field.size}({raw})" if field.signed else raw


def _text_word(field: Field, base: str, word: int) -> str:
    """Expression for eight bytes of a text field as a little-endian u64; bytes beyond the field are zero."""
    left = field.size - 8 * word
    if left <= 0:
        return "_ZERO"
    load = f"le64(buf, {base} + {field.offset + 8 * word})"
    return load if left >= 8 else f"({load} & np.uint64({hex((1 << (8 * left)) - 1)}))"


def _words(field: Field, base: str) -> str:
    """Expression for a symbol's words; a word that the field fills in part is filled up with spaces, which are trimmed."""
    words = [_text_word(field, base, w) for w in range(3)]
    if field.size % 8:
        padding = sum(0x20 << 8 * at for at in range(field.size % 8, 8))
        words[field.size // 8] += f" | np.uint64({hex(padding)})"
    return f"trim_words({', '.join(words)})"


def _equals(raw: str, field: Field, values: Sequence[int]) -> str:
    kind = "np.uint64" if field.size > 4 and not field.signed else ""
    return " or ".join(f"{raw} == {kind}({v})" if kind else f"{raw} == {v}" for v in values)


_VARYING = {
    "stamp": "np.int64(0)", "stamped": "False", "received": "ts_recv", "number": "_ZERO", "tick": "np.int64({tick})", "symbol_bytes": "0",
}  # fmt: skip
"""Locals that a branch sets where their field has no common place, and what they are before."""


_MOVE = "    copy_record(out, n + 1, out, n)  # a REFERENCE may come before it"


def _cells(layout: Layout) -> dict[str, list[int]]:
    """What the common messages have in every respect, one entry per row; masks are -1 where the message has the field."""
    rows = layout.rows
    cells = {
        "length": [row.message.length for row in rows],
        "counter": [row.counter for row in rows],
        "kind": [int(KINDS[row.case.kind]) for row in rows],
        "flags": [row.case.flags for row in rows],
    }
    cells |= {f"rule_{i}": [rule.flag * has for has in present] for i, (rule, present) in enumerate(layout.rules.items())}
    for target, column in layout.columns.items():
        cells[f"{target}_at"] = list(column.offsets)
        cells[f"{target}_mask"] = [-int(has) for has in column.present]
        cells[f"{target}_constant"] = list(column.constants)
    return cells


class _DecoderWriter:
    """Writes the functions of one decoder module. `reserve`: the events that a decoder must have room for to go on."""

    reserve = RESERVE

    def __init__(self, spec: Spec, framing: Framing, out: _Source) -> None:
        self.spec, self.framing, self.out = spec, framing, out
        self.layout = None if spec.follow_orders else common_layout(spec)
        self.cells = _cells(self.layout) if self.layout else {}
        self.columns = {name: column for name, column in self.cells.items() if name == "length" or len(set(column)) > 1}
        self.maps: dict[tuple[tuple[tuple[int, int], ...], int | None], str] = {}
        for message in spec.messages:
            for case in message.cases:
                for name in fields_of(case):
                    f = message.fields[name]
                    if f.map is not None and f.size == 1:
                        self.maps.setdefault((tuple(f.map.items()), f.map_default), f"_MAP_{len(self.maps)}")

    def more_imports(self) -> None:
        if self.spec.follow_orders:
            self.out("from tickmesh.node.feed import SINCE")
            self.out("from tickmesh.node.order_map import follow_order, forget_orders")
            self.out("from tickmesh.node.recovery import NEVER")
        if len(self._symbol_sizes()) > 1:
            self.out("from tickmesh.node.feed import text_words")
        if self.spec.timestamp_since == "time_message":
            self.out("from tickmesh.node.feed import NOT_TOLD")

    def tables(self) -> None:
        for (items, default), name in self.maps.items():
            table = [_BAD if default is None else default] * 256
            for raw, value in items:
                table[raw] = value
            self.out(f"{name} = np.array({table}, np.int64)")
        if self.layout:
            self._layout_table(self.layout)
        self.out()

    def _layout_table(self, layout: Layout) -> None:
        """``_LAYOUT``: a row per value of the key field, a column for everything in which the common messages differ."""
        out = self.out
        out(f'_LAYOUT = np.zeros(256, np.dtype([(name, np.int64) for name in {tuple(self.columns)}]))')
        out('"""Where the common messages have their fields, by their type byte; no message is as long as the others demand."""')
        out(f'_LAYOUT["length"] = {NEVER}')
        for number, row in enumerate(layout.rows):
            cells = ", ".join(str(column[number]) for column in self.columns.values())
            for code in row.codes:
                out(f"_LAYOUT[{code}] = ({cells})  # {row.message.name}" + (f", {row.case.name}" if layout.code is not None else ""))

    # ---- framing

    def total(self) -> None:
        """``_total``: bytes from a message's length field to the next one, at least 1."""
        fr, out = self.framing, self.out
        add = 0 if fr.length_includes_itself else fr.message_offset
        unit = f" * {fr.length_unit}" if fr.length_unit != 1 else ""
        out("\n@inlined\ndef _total(buf, pos):")
        out(
            f'    """Bytes from one message\'s start to the next."""\n    return np.int64({_load(fr.length, "pos")}){unit}'
            + (f" + {add}" if add else "")
        )
        out()

    def messages(self) -> None:
        """``_decode``: the loop over messages. Each branch fills locals; what all messages share is done once behind the branches."""
        fr, out = self.framing, self.out
        prefix = fr.length.offset + fr.length.size
        out("\n@inlined\ndef _decode(buf, pos, end, left, seq, ts_recv, feed, out, n):")
        out.indent()
        out('"""Decode up to `left` messages; returns (pos, left, seq, n) where it stopped."""')
        out(f"room = np.int64(out.size) - {self.reserve}\ncodes, counts, malformed = feed.codes, feed.counts, feed.malformed")
        if not self.spec.code:
            out("source = np.uint32(feed.state[SOURCE])")
        if self.spec.timestamp_since != "epoch":
            out(f"base = feed.state[{'MIDNIGHT_NS' if self.spec.timestamp_since == 'midnight' else 'TIME_BASE_NS'}]")
        out(f"while left > 0 and n <= room:\n    if pos + {prefix} > end:\n        break\n    total = _total(buf, pos)")
        out.indent()
        out(f"if total <= {fr.message_offset}:")
        out.indent()
        if fr.zero_length_is_end:
            out(f"feed.state[ENDS] += 1\npos += {max(fr.message_offset, prefix)}\ncontinue")
        else:
            out(f"malformed[ZERO_LENGTH] += _ONE\npos += max(total, {max(fr.length_unit, prefix)})\nseq += 1\nleft -= 1\ncontinue")
        out.indent(-1)
        out("if pos + total > end:\n    break")
        minus = f" - {fr.message_offset}" if fr.message_offset else ""
        out(f"m = pos{minus.replace('-', '+')}\nlength = total{minus}\npos += total")
        out("e = out[np.uint64(n)]")
        if self.layout:
            self._common(self.layout)
        self._dispatch()
        self._tail()
        out("seq += 1\nleft -= 1")
        out.indent(-1)
        out("return pos, left, seq, n")
        out.indent(-1)
        out()

    def _common(self, layout: Layout) -> None:
        """A common message of a known instrument, without a branch on its type; anything else falls through to the branches."""
        out, key = self.out, layout.key
        out(f"row = _LAYOUT[{_load(key, 'm')}]")
        guard = f"{_load(self.spec.type_field, 'm')} == {layout.code} and " if layout.code is not None else ""
        out(f"if {guard}length >= {self._cell('length')}:  # a common message: no branch depends on its type")
        out.indent()
        tests = self._known(layout)
        values: dict[str, str] = {}
        for target, column in layout.columns.items():
            values[target], refusals = self._column(target, column)
            if refusals:
                out(f"{target} = {values[target]}")
                values[target] = target
            tests += refusals
        out(f"if {' and '.join(tests)}:")
        out.indent()
        first = layout.rows[0].message
        stamp, received = first.fields.get(self.spec.timestamp or ""), first.fields.get(self.spec.received or "")
        out(f"e.seq, e.ts_event = np.uint64(seq), {self._stamp(_load(stamp, 'm')) if stamp else 'ts_recv'}")
        out(f"e.ts_recv, e.instrument = {f'np.int64({_load(received, chr(109))})' if received else 'ts_recv'}, instrument")
        flags = [f"({self._cell(f'rule_{i}')} if {self._flag_test(first, rule)} else 0)" for i, rule in enumerate(layout.rules)]
        out(f"e.kind, e.side = np.uint8({self._cell('kind')}), np.uint8({values['side']})")
        out(f"e.flags = np.uint16({' | '.join([self._cell('flags'), *flags])})")
        for name in ("price", "qty", "id", "aux"):
            out(f"e.{name} = {values[name]}")
        out(f"counts[np.uint64({self._cell('counter')})] += _ONE\nn += 1\nseq += 1\nleft -= 1\ncontinue")
        out.indent(-2)

    def _cell(self, name: str) -> str:
        """What the layout says: a column of the row, or the number that all rows have."""
        return f"row.{name}" if name in self.columns else str(self.cells[name][0])

    def _known(self, layout: Layout) -> list[str]:
        """Look the instrument of a common message up; returns the tests that it must pass."""
        spec, out, fields = self.spec, self.out, layout.rows[0].message.fields
        if spec.code:
            raw = _load(fields[spec.code], "m")
            out(f"instrument = codes[{raw}]" if fields[spec.code].size <= 2 else f"instrument = find_code(feed, {raw})")
            return ["instrument < RESOLVED_BELOW"]
        out(f"w0, w1, w2 = {_words(fields[spec.symbol or ''], 'm')}\ninstrument = find_instrument(feed.instruments, source, w0, w1, w2)")
        return ["instrument < RESOLVED_BELOW", "feed.instruments.records[instrument].announced != np.uint32(0)"]

    def _column(self, target: str, column: Column) -> tuple[str, list[str]]:
        """Expression for an event field of a common message, and the tests that it must pass."""
        cast = "np.uint64" if target == "id" else "np.int64"
        if column.field is None:
            return f"{cast}({self._cell(f'{target}_constant')})", []
        at = self._cell(f"{target}_at")
        value, refusals = self._field_value(column.field, target, "m" if at == "0" else f"m + {at}")
        mask, constant = self._cell(f"{target}_mask"), self._cell(f"{target}_constant")
        if target == "id":
            value, mask = f"np.uint64({value})", mask if mask == "-1" else f"np.uint64({mask})"
        value = value if mask == "-1" else f"{value} & {mask}"
        value = value if constant == "0" else f"{value} | {cast}({constant})"
        if column.field.map is not None and column.field.size == 1:
            return value, [f"{target} != _BAD"] if refusals else []
        given = f"{mask} == 0 or " if mask != "-1" else ""
        return value, [f"({given}not ({test}))" for test, _ in refusals]

    def _dispatch(self) -> None:
        """One branch per message type: counter, kind and event fields, or the reason of a refusal."""
        out, tf = self.out, self.spec.type_field
        out("kind, counter, reason, symbol_at, whole = -1, 0, UNKNOWN_MESSAGE, -1, False")
        if self.spec.follow_orders:
            out("named, order, silent = False, 0, False")
        for name in self._varying():
            out(f"{name} = {_VARYING[name].format(tick=self.spec.tick_size)}")
        reach = tf.offset + tf.size
        word = "if"
        if reach > 1:
            out(f"if length < {reach}:\n    reason = BAD_LENGTH")
            word = "elif"
        code = _load(tf, "m")
        if reach == 1:
            out(f"code = {code}")
            code = "code"
        counter = 0
        for message in self.spec.messages:
            out(f"{word} {code} == {message.code}:  # {message.name}")
            out.indent()
            self._message(message, counter)
            out.indent(-1)
            counter += len(message.cases)
            word = "elif"

    def _message(self, message: Message, counter: int) -> None:
        out = self.out
        out(f"if length < {message.length}:\n    reason = BAD_LENGTH")
        if len(message.cases) == 1 and not message.cases[0].when:
            self._case(message, message.cases[0], counter)
            return
        word = "elif"
        for number, case in enumerate(message.cases):
            test = " and ".join(f"({_equals(_load(message.fields[k], 'm'), message.fields[k], v)})" for k, v in case.when.items())
            out(f"{word} {test}:" if test else "else:")
            out.indent()
            out("if False:\n    pass")
            self._case(message, case, counter + number)
            out.indent(-1)
            if not test:
                return
        out("else:\n    reason = BAD_FIELD")

    def _case(self, message: Message, case: Case, counter: int) -> None:
        """The rest of an if-chain: refusals of bad values, then the event's fields."""
        out = self.out
        values: dict[str, str] = {}
        for name, source in case.values.items():
            values[name], refusals = self._value(message, name, source)
            for test, reason in refusals:
                out(f"elif {test}:\n    reason = {reason}")
        kind = int(KINDS[case.kind]) if case.kind in KINDS else 0
        out("else:")
        out.indent()
        out(f"kind, counter = {kind}, {counter}" + (f"  # {case.kind}" if kind else ""))
        if case.kind == "time":
            since = "feed.state[MIDNIGHT_NS] + " if self.spec.seconds_since == "midnight" else ""
            out(f"base = {since}({values['seconds']}) * 1000000000\nfeed.state[TIME_BASE_NS] = base")
        if kind:
            self._assign(message, case, values, kind)
        out.indent(-1)

    def _assign(self, message: Message, case: Case, values: Mapping[str, str], kind: int) -> None:
        """Write the event's own fields, and set the locals by which the tail finds the shared ones."""
        spec, out = self.spec, self.out
        if case.kind != "reference":
            flags = " | ".join([str(case.flags), *(self._flag(message, rule) for rule in case.flag_rules)])
            out(f"e.kind, e.side, e.flags = np.uint8({kind}), np.uint8({values.get('side', NO_SIDE)}), np.uint16({flags})")
            for name in ("price", "qty", "id", "aux"):
                cast = "np.uint64" if name == "id" else "np.int64"
                out(f"e.{name} = {cast}({values.get(name, '0')})")
        if "tick_size" in values:
            out(f"tick = {values['tick_size']} if {values['tick_size']} > 0 else {spec.tick_size}")
        symbol, varying = message.fields.get(spec.symbol or ""), self._varying()
        if case.all_instruments:
            out("whole = True")
        elif symbol:
            out(f"symbol_at = {symbol.offset}" + (f"\nsymbol_bytes = {symbol.size}" if "symbol_bytes" in varying else ""))
        if spec.follow_orders:
            self._follow(case, kind)
        for variable, source in (("stamp", spec.timestamp), ("received", spec.received), ("number", spec.code)):
            found = message.fields.get(source or "")
            if variable in varying and found and not (variable == "number" and case.all_instruments):
                cast = "np.uint64" if variable == "number" else "np.int64"
                out(f"{variable} = {cast}({_load(found, 'm')})")
                if variable == "stamp":
                    out("stamped = True")

    def _follow(self, case: Case, kind: int) -> None:
        """Set the locals by which the tail finds the instrument of an order."""
        given = {"named": not case.by_order and not case.all_instruments, "silent": case.silent}
        names = [name for name, value in given.items() if value]
        if case.kind in ("add", *OF_ORDER):
            self.out(f"order = {kind}")
        if names:
            self.out("\n".join(f"{name} = True" for name in names))
        if case.kind == "clear" and case.all_instruments:
            self.out("forget_orders(feed)")

    # ---- what messages share

    def _shared(self, name: str | None, whole: bool) -> Field | None:
        """The field, if it lies at one place in every message that makes an event (`whole`: also in those of all instruments)."""
        found = [
            m.fields.get(name or "") for m in self.spec.messages for c in m.cases if c.kind in KINDS and (whole or not c.all_instruments)
        ]
        return found[0] if found and all(f == found[0] for f in found) else None

    def _varying(self) -> list[str]:
        """Locals that branches must set because their field lies at different places."""
        spec = self.spec
        names = []
        if spec.timestamp and not self._shared(spec.timestamp, True):
            names += ["stamp", "stamped"]
        if spec.received and not self._shared(spec.received, True):
            names.append("received")
        if spec.code and not self._shared(spec.code, False):
            names.append("number")
        if any("tick_size" in c.values for m in spec.messages for c in m.cases):
            names.append("tick")
        if len(self._symbol_sizes()) > 1:
            names.append("symbol_bytes")
        return names

    def _symbol_sizes(self) -> set[int]:
        return {m.fields[self.spec.symbol].size for m in self.spec.messages if self.spec.symbol in m.fields} if self.spec.symbol else set()

    def _tail(self) -> None:
        """Count; then instrument and event."""
        spec, out = self.spec, self.out
        varying = self._varying()
        out("if kind < 0:\n    malformed[reason] += _ONE\nelse:\n    counts[np.uint64(counter)] += _ONE\nif kind > 0:")
        out.indent()
        stamp, received = self._shared(spec.timestamp, True), self._shared(spec.received, True)
        if stamp:
            out(f"ts_event = {self._stamp(_load(stamp, 'm'))}")
        else:
            out(f"ts_event = {self._stamp('stamp')} if stamped else ts_recv" if spec.timestamp else "ts_event = ts_recv")
        if "received" not in varying:
            out(f"received = np.int64({_load(received, 'm')})" if received else "received = ts_recv")
        out(f"instrument = _ALL\nif {'named' if spec.follow_orders else 'not whole'}:")
        out.indent()
        tick = "tick" if "tick" in varying else str(spec.tick_size)
        self._resolve(f"np.int64({tick}), seq, ts_event, received, out, n")
        out.indent(-1)
        if spec.follow_orders:
            out("if order > 0:\n    instrument = follow_order(feed, order, out, n, instrument)")
            out("    if silent or instrument >= RESOLVED_BELOW:\n        kind = 0")
        out("if kind > 0:")
        out.indent()
        out("e = out[np.uint64(n)]\ne.seq = np.uint64(seq)\ne.ts_event = ts_event\ne.ts_recv = received\ne.instrument = instrument\nn += 1")
        out.indent(-2)

    def _stamp(self, raw: str) -> str:
        """Expression for the time of a raw time stamp, in nanoseconds since the epoch."""
        unit = f" * {self.spec.timestamp_unit_ns}" if self.spec.timestamp_unit_ns != 1 else ""
        if self.spec.timestamp_since == "time_message":
            return f"(base + np.int64({raw}){unit} if base != NOT_TOLD else ts_recv)"
        return f"{'' if self.spec.timestamp_since == 'epoch' else 'base + '}np.int64({raw}){unit}"

    def _resolve(self, rest: str) -> None:
        """Set `instrument`, with a REFERENCE event before the message's own if it is new; `kind` 0 drops the message."""
        spec, out = self.spec, self.out
        symbol = next((m.fields[spec.symbol] for m in spec.messages if spec.symbol in m.fields), None) if spec.symbol else None
        code = self._shared(spec.code, False)
        words = _words(dataclasses.replace(symbol, offset=0), "m + symbol_at") if symbol else ""
        if "symbol_bytes" in self._varying():
            words = "trim_words(*text_words(buf, m + symbol_at, symbol_bytes))"
        if not spec.code:
            if symbol is None:
                return
            out(f"w0, w1, w2 = {words}\ninstrument = find_instrument(feed.instruments, source, w0, w1, w2)")
            out("if instrument >= RESOLVED_BELOW or feed.instruments.records[instrument].announced == np.uint32(0):")
            out(_MOVE)
            out(f"    instrument, n = resolve_symbol(feed, w0, w1, w2, {rest})")
            out("    if instrument >= RESOLVED_BELOW:\n        kind = 0")
            out(f"if kind == {int(KINDS['reference'])}:\n    kind = 0")
            return
        any_code = next(m.fields[spec.code] for m in spec.messages if spec.code in m.fields)
        if code:
            out(f"number = {_load(code, 'm')}")
        lookup = "codes[number]" if any_code.size <= 2 else "find_code(feed, number)"
        out(f"instrument = {lookup} if kind != {int(KINDS['reference'])} else UNBOUND\nif instrument >= RESOLVED_BELOW:")
        out.indent()
        out(_MOVE[4:])
        out("w0, w1, w2 = _ZERO, _ZERO, _ZERO")
        if symbol:
            out(f"if symbol_at >= 0:\n    w0, w1, w2 = {words}")
        out(f"instrument, n = resolve_code(feed, instrument, np.uint64(number), w0, w1, w2, {rest})")
        out(f"if instrument >= RESOLVED_BELOW or kind == {int(KINDS['reference'])}:\n    kind = 0")
        out.indent(-1)

    def _flag(self, message: Message, rule: FlagRule) -> str:
        return f"({rule.flag} if {self._flag_test(message, rule)} else 0)"

    def _flag_test(self, message: Message, rule: FlagRule) -> str:
        return f"({_load(message.fields[rule.field], 'm')} & {rule.bits}) {'==' if rule.wanted else '!='} {rule.equals}"

    def _value(self, message: Message, target: str, source: str | int) -> tuple[str, list[tuple[str, str]]]:
        """Expression for an event field, and when to refuse: (test, reason)."""
        if isinstance(source, int):
            return (str(source if target != "id" else source & ((1 << 64) - 1)), [])
        return self._field_value(message.fields[source], target, "m")

    def _field_value(self, field: Field, target: str, base: str) -> tuple[str, list[tuple[str, str]]]:
        raw = _load(field, base)
        if field.map is not None:
            return self._mapped(field, raw)
        if field.decimals >= 0:
            return self._scaled(field, raw)
        refusals = []
        if target in ("qty", "price", "seconds", "tick_size") and field.size == 8 and not field.signed and not field.text:
            guard = f"{raw} != np.uint64({field.null}) and " if field.null is not None else ""
            refusals.append((f"{guard}{raw} > np.uint64({_I64_MAX})", "BAD_FIELD"))
        if field.null is not None:
            cast = "np.uint64" if target == "id" else "np.int64"
            return f"({cast}(0) if {_equals(raw, field, [field.null])} else {cast}({raw}))", refusals
        return (raw if target == "id" or (field.signed and field.size == 8) else f"np.int64({raw})"), refusals

    def _mapped(self, field: Field, raw: str) -> tuple[str, list[tuple[str, str]]]:
        assert field.map is not None
        items = list(field.map.items())
        if field.size == 1:
            table = self.maps[(tuple(items), field.map_default)]
            lookup = f"{table}[{raw}]"
            return lookup, ([] if field.map_default is not None else [(f"{lookup} == _BAD", "BAD_FIELD")])
        last = str(items[-1][1] if field.map_default is None else field.map_default)
        chain = items if field.map_default is not None else items[:-1]
        for code, value in reversed(chain):
            last = f"({value} if {_equals(raw, field, [code])} else {last})"
        refuse = f"not ({_equals(raw, field, [c for c, _ in items])})"
        return last, ([] if field.map_default is not None else [(refuse, "BAD_FIELD")])

    def _scaled(self, field: Field, raw: str) -> tuple[str, list[tuple[str, str]]]:
        """A decimal field in 1e-9: exact, or refused where it does not fit 64 bits."""
        factor = 10 ** (9 - field.decimals)
        limit = _I64_MAX // factor
        value = raw if field.signed and field.size == 8 else f"np.int64({raw})"
        value = f"{value} * {factor}" if factor > 1 else value
        test = ""
        if field.signed and field.size == 8 and factor > 1:
            test = f"({raw} > {limit} or {raw} < {-limit})"
        elif not field.signed and (1 << (8 * field.size)) - 1 > limit:
            test = f"{raw} > np.uint64({limit})"
        if field.null is None:
            return value, [(test, "PRICE_OVERFLOW")] if test else []
        null = _equals(raw, field, [field.null])
        return f"(_NO_PRICE if {null} else {value})", [(f"{test} and not ({null})", "PRICE_OVERFLOW")] if test else []

    # ---- entry points

    def stream(self) -> None:
        out, fr = self.out, self.framing
        out("\n@outlined\ndef stream_events(buf, pos, end, ts_recv, feed, out):")
        out.indent()
        out("pos, end = np.int64(pos), min(np.int64(end), np.int64(buf.size))")
        if fr.preamble_length is not None:
            need = max(len(fr.preamble_magic), fr.preamble_length.offset + fr.preamble_length.size)
            test = " and ".join(f"buf[np.uint64(pos + {i})] == {b}" for i, b in enumerate(fr.preamble_magic))
            out(f"if feed.state[STARTED] == 0:\n    if pos + {need} > end:\n        return pos, np.int64(0)\n    if {test}:")
            out(f"        skip = {fr.preamble_fixed} + np.int64({_load(fr.preamble_length, 'pos')})")
            out(
                "        if pos + skip > end:\n            return pos, np.int64(0)\n        pos += skip\n"
                "    else:\n        feed.malformed[BAD_PREAMBLE] += _ONE"
            )
            out("    feed.state[STARTED] = 1")
        out(
            "pos, left, seq, n = _decode(buf, pos, end, np.int64(1 << 62), feed.state[NEXT_SEQ], np.int64(ts_recv), feed, out, np.int64(0))"
        )
        out("feed.state[NEXT_SEQ] = seq\nreturn pos, n")
        out.indent(-1)
        out(_STREAM)

    def packets(self) -> None:
        fr, prefix = self.framing, self.framing.length.offset + self.framing.length.size
        least = max(fr.length_unit, prefix)
        current = _CURRENT_PACKET if fr.by_packet else _CURRENT
        self.out(current.format(prefix=prefix, least=least, reserve=self.reserve, offset=fr.message_offset))
        if fr.count_to_end:
            self.out(_MESSAGES_IN.format(prefix=prefix, least=least, offset=fr.message_offset))
        self._accept()
        self.out(_PACKETS.format(reserve=self.reserve, cleared=self.on_clear(), **self.recovering()))

    def on_clear(self) -> str:
        """What else is to be forgotten when the venue begins a new session: a statement, or nothing."""
        return "\n            forget_orders(feed)\n            feed.state[SINCE] = 0" if self.spec.follow_orders else ""

    def recovering(self) -> dict[str, str]:
        """What a decoder with channels beside the feed does between packets: statements by their place in the loop, or nothing."""
        lost = "\n            feed.state[SINCE] = NEVER" if self.spec.follow_orders else ""
        return {"told": "", "gapped": lost, "beside": ""}

    def keeping(self) -> str:
        """What is done with a packet's sequence before it is arbitrated: a statement, or nothing."""
        return ""

    def _accept(self) -> None:
        """``_accept``: read one packet's header and act on the arbiter's verdict; returns whether the packet is done with."""
        fr, out = self.framing, self.out
        assert fr.sequence is not None
        out("\n@inlined\ndef _accept(buf, packet, feed):")
        out.indent()
        out('"""Read a packet\'s header and act on the arbiter\'s verdict; true if the packet is done with."""')
        out(
            "arb = feed.arbiter\ns = arb.state\np, size, line = np.int64(packet.offset), np.int64(packet.length), np.int64(packet.line) & 3"
        )
        out("s[A.NOW] = max(s[A.NOW], packet.ts_recv)")
        short = "feed.malformed[SHORT_PACKET] += _ONE\n    return True"
        heart, later = fr.heartbeat_when, fr.heartbeat_sequence
        least = fr.header_bytes
        if heart and not fr.by_packet:
            least = max(f.offset + f.size for f in (heart[0], fr.sequence, *fr.session))
        out(f"if size < {least} or p + size > np.int64(buf.size):\n    {short}")
        out("count = np.int64(0)")
        if heart:
            reach = max(f.offset + f.size for f in (heart[0], later or heart[0]))
            whole = f"size >= {reach} and " if reach > least else ""
            out(f"beats = {whole}({_equals(_load(heart[0], 'p'), heart[0], heart[1])})\nif not beats:")
            out.indent()
        if fr.data_when:
            out(f"if not ({_equals(_load(fr.data_when[0], 'p'), fr.data_when[0], fr.data_when[1])}):\n    return True")
        if heart:
            out(f"if size < {fr.header_bytes}:\n    {short}")
        if fr.count_to_end:
            out(f"count = _messages_in(buf, p + {fr.messages_at}, p + size)")
            out("if count == 0:\n    feed.malformed[TRUNCATED] += _ONE\n    return True")
        else:
            out(f"count = np.int64({_load(fr.count, 'p')})" if fr.count else "count = np.int64(1)  # the sequence counts packets")
        if heart:
            out.indent(-1)
        out(f"seq = np.int64({_load(fr.sequence, 'p')})")
        if later:
            out(f"if beats:\n    seq = np.int64({_load(later, 'p')})")
        if self.keeping():
            out(self.keeping())
        if fr.end_count is not None:
            out(f"ended = count == {fr.end_count}\nif ended:\n    count = np.int64(0)")
        if fr.unsequenced is not None:
            out(
                f"if seq == {fr.unsequenced}:\n    s[A.UNSEQUENCED] += 1\n"
                "    s[A.CURRENT], s[A.CURRENT_SEQ] = A.FROM_UNSEQUENCED, feed.state[NEXT_SEQ]"
            )
            out(
                f"    s[A.CURRENT_POS], s[A.CURRENT_END] = p + {fr.messages_at}, p + size\n"
                "    s[A.CURRENT_LEFT], s[A.CURRENT_SKIP] = count, 0\n    return False"
            )
        session = (
            " ^ ".join(f"np.int64({_load(f, 'p')}) << {17 * i}" if i else f"np.int64({_load(f, 'p')})" for i, f in enumerate(fr.session))
            or "np.int64(0)"
        )
        out(f"session = {session}\nverdict = offer(arb, seq, count, session, line)")
        if fr.end_count is not None:
            out("if ended and verdict == A.CONSUMED:\n    s[A.ENDS] += 1")
        out("if verdict == A.DECODE:")
        out(f"    s[A.CURRENT], s[A.CURRENT_POS], s[A.CURRENT_END] = A.FROM_PACKET, p + {fr.messages_at}, p + size")
        out("    s[A.CURRENT_LEFT], s[A.CURRENT_SEQ], s[A.CURRENT_SKIP] = count, seq, s[A.EXPECTED] - seq")
        out("    s[A.OVERLAPS] += s[A.CURRENT_SKIP] > 0\n    return False")
        out("if verdict == A.HOLD:\n    return hold(arb, buf, p, size, seq, count, line, packet.ts_recv)")
        out("if verdict == A.BAD:\n    feed.malformed[BAD_SEQUENCE] += _ONE\n    return True\nreturn verdict == A.CONSUMED")
        out.indent(-1)
        out()

    def warm(self) -> None:
        out, size = self.out, 0
        if self.spec.code:
            size = next((m.fields[self.spec.code].size for m in self.spec.messages if self.spec.code in m.fields), 0)
        out("\ndef warm_feed():")
        out.indent()
        out('"""A feed of the final types."""')
        direct, hashed = (1 << 8 * size if size in (1, 2) else 0), (4 if size > 2 else 0)
        out(
            f"return make_arrays(InstrumentTable(1).arrays, source=0, counters={len(self.spec.counters)}, "
            f"direct_codes={direct}, hashed_codes={hashed})"
        )
        out.indent(-1)
        out("\n\ndef warm():")
        out.indent()
        out('"""Call each entry point once, so that it is compiled; returns a feed of the final types."""')
        out("feed, buf, out = warm_feed(), np.zeros(64, np.uint8), np.zeros(4, EVENT)")
        if self.framing.packets:
            out("decode_packets(buf, feed.arbiter.no_packets, 0, 0, feed, out)\ndecode_flush(0, feed, out)")
        else:
            out("decode_stream(buf, 0, 0, 0, feed, out)")
        out("return feed")
        out.indent(-1)


_STREAM = '''

@loop
def decode_stream(buf, pos, end, ts_recv, feed, out):
    """Decode length-prefixed messages of ``buf[pos:end]`` into `out`; returns (pos, n)."""
    return stream_events(buf, pos, end, ts_recv, feed, out)
'''

_CURRENT = '''

@outlined
def _skip(buf, s):
    """Step over the messages of the current packet that the other line has brought already."""
    pos, end = s[A.CURRENT_POS], s[A.CURRENT_END]
    while s[A.CURRENT_SKIP] > 0 and pos + {prefix} <= end:
        total = _total(buf, pos)
        step = total if total > {offset} else max(total, {least})
        if pos + step > end:
            break
        pos += step
        s[A.CURRENT_SKIP] -= 1
        s[A.CURRENT_LEFT] -= 1
        s[A.CURRENT_SEQ] += 1
    s[A.CURRENT_POS], s[A.CURRENT_SKIP] = pos, 0


@inlined
def _go_on(buf, ts_recv, line, feed, out, n):
    """Decode on in the current packet; returns n. Nothing is current afterwards, unless `out` was full."""
    s = feed.arbiter.state
    if s[A.CURRENT_SKIP] > 0:
        _skip(buf, s)
    first, end = s[A.CURRENT_SEQ], s[A.CURRENT_END]
    pos, left, seq, n = _decode(buf, s[A.CURRENT_POS], end, s[A.CURRENT_LEFT], first, ts_recv, feed, out, n)
    feed.arbiter.lines[line, A.LINE_MESSAGES] += np.uint64(seq - first)
    if s[A.CURRENT] == A.FROM_UNSEQUENCED:
        feed.state[NEXT_SEQ] = seq
    elif seq > s[A.EXPECTED]:
        s[A.EXPECTED] = seq
    if left > 0 and n > np.int64(out.size) - {reserve}:
        s[A.CURRENT_POS], s[A.CURRENT_LEFT], s[A.CURRENT_SEQ] = pos, left, seq
        return n
    if left > 0:
        feed.malformed[LENGTH_PAST_END if pos + {prefix} <= end else TRUNCATED] += _ONE
    elif pos < end:
        feed.malformed[TRAILING_BYTES] += _ONE
    s[A.CURRENT] = A.NOTHING_CURRENT
    return n
'''

_MESSAGES_IN = '''

@outlined
def _messages_in(buf, pos, end):
    """How many messages there are up to the packet's end; one that is cut short is none."""
    count = np.int64(0)
    while pos + {prefix} <= end:
        total = _total(buf, pos)
        pos += total if total > {offset} else max(total, {least})
        count += pos <= end
    return count
'''

_CURRENT_PACKET = '''

@inlined
def _go_on(buf, ts_recv, line, feed, out, n):
    """Decode on in the current packet, which has one sequence; returns n. Nothing is current afterwards, unless `out` was full."""
    s = feed.arbiter.state
    seq, end, most = s[A.CURRENT_SEQ], s[A.CURRENT_END], np.int64(1 << 62)
    pos, left, last, n = _decode(buf, s[A.CURRENT_POS], end, most, seq, ts_recv, feed, out, n)
    feed.arbiter.lines[line, A.LINE_MESSAGES] += np.uint64(most - left)
    if n > np.int64(out.size) - {reserve} and pos < end:
        s[A.CURRENT_POS] = pos
        return n
    if s[A.CURRENT] == A.FROM_UNSEQUENCED:
        feed.state[NEXT_SEQ] = seq + 1
    elif seq + 1 > s[A.EXPECTED]:
        s[A.EXPECTED] = seq + 1
    if pos < end:
        feed.malformed[LENGTH_PAST_END if pos + {prefix} <= end else TRUNCATED] += _ONE
    s[A.CURRENT] = A.NOTHING_CURRENT
    return n
'''

_PACKETS = '''

@outlined
def packet_events(buf, packets, first, count, feed, out):
    arb = feed.arbiter
    s = arb.state
    i, n, room = np.int64(first), np.int64(0), np.int64(out.size) - {reserve}
    while n <= room:{told}
        step = next_step(arb)
        if step == A.CONTINUE:
            held, index = s[A.CURRENT] == A.FROM_HELD, s[A.CURRENT_INDEX]
            if held:
                source, ts_recv, line = arb.bytes, arb.held[index].ts_recv, np.int64(arb.held[index].line)
            else:
                source, ts_recv, line = buf, packets[np.uint64(i)].ts_recv, np.int64(packets[np.uint64(i)].line) & 3
            n = _go_on(source, ts_recv, line, feed, out, n)  # one place only: the decoder is inlined here
            if s[A.CURRENT] == A.NOTHING_CURRENT:
                if held:
                    release(arb, index)
                else:
                    arb.lines[line, A.LINE_PACKETS] += _ONE
                    i += 1
        elif step == A.EMIT_GAP:
            n = emit_gap(arb, out, n){gapped}
        elif step == A.EMIT_CLEAR:
            n = emit_clear(arb, out, n){cleared}
        elif i >= count:
            break
        else:
            line = np.int64(packets[np.uint64(i)].line) & 3{beside}
            if _accept(buf, packets[np.uint64(i)], feed):
                arb.lines[line, A.LINE_PACKETS] += _ONE
                i += 1
    return i, n


@loop
def decode_packets(buf, packets, first, count, feed, out):
    """Decode ``packets[first:count]`` into `out`; returns (next, n)."""
    return packet_events(buf, packets, np.int64(first), np.int64(count), feed, out)


@outlined
def flush_events(now_ns, feed, out):
    s = feed.arbiter.state
    if s[A.CURRENT] == A.FROM_PACKET or s[A.CURRENT] == A.FROM_UNSEQUENCED:
        return np.int64(0)
    s[A.NOW] = max(s[A.NOW], np.int64(now_ns))
    i, n = packet_events(feed.arbiter.bytes, feed.arbiter.no_packets, np.int64(0), np.int64(0), feed, out)
    return n


@loop
def decode_flush(now_ns, feed, out):
    """Time passes without packets: give up what has waited too long; returns n. Call again while it returns more than 0."""
    return flush_events(now_ns, feed, out)
'''
__all__ = ["FILTERED", "Decoder", "MappingError", "arbitration", "bind_symbol", "configured", "dbn_symbols", "decoder_parts",
           "decoder_source", "definition_counters", "end_of_stream", "filtered", "load_decoder", "make_feed", "malformed", "message_counts",
           "select", "since_when", "snapshot_counters"]  # fmt: skip
