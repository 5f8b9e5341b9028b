"""Protocols and framings as data: reads a spec file (TOML) and checks it, reporting every fault with its file, line and reason.

A **protocol** says what the messages of a venue look like and which event each becomes; a **framing** says how messages lie in a
byte stream or in packets. ``docs/howto/add-a-protocol.md`` describes both formats; :mod:`tickmesh.node.decoder` compiles them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from tickmesh.node.event import NO_PRICE, PRICE_DECIMALS, Flag, Kind, TradingStatus

SHIPPED = Path(__file__).parent / "protocols"
SYMBOL_BYTES_MAX = 24
MESSAGE_BYTES_MAX = 65535
NAME = re.compile(r"[A-Za-z0-9_]{1,64}")
"""What a protocol, a framing, a message and the case of one may be called: it becomes a part of generated code."""

TYPES: dict[str, tuple[int, bool]] = {
    "u8": (1, False), "u16": (2, False), "u24": (3, False), "u32": (4, False), "u48": (6, False), "u64": (8, False),
    "i8": (1, True), "i16": (2, True), "i32": (4, True), "i64": (8, True), "char": (1, False),
}  # fmt: skip
"""Type name -> (bytes, signed). ``alpha:N`` is text of N bytes."""

EVENT_FIELDS = ("side", "price", "qty", "id", "aux", "tick_size", "seconds")
REQUIRED: dict[str, tuple[str, ...]] = {
    "add": ("id", "side", "price", "qty"), "execute": ("id", "qty"), "cancel": ("id", "qty"), "delete": ("id",),
    "replace": ("id", "aux", "price", "qty"), "modify": ("id", "price", "qty"), "clear": (), "level": ("side", "price", "qty"),
    "trade": ("price", "qty"), "quote": ("price", "qty", "id", "aux"), "status": ("aux",), "imbalance": ("qty",), "reference": (),
    "system": ("aux",), "break": ("id",), "time": ("seconds",), "nothing": (),
}  # fmt: skip
"""Event kind -> event fields that its mapping must give. ``time`` sets the base of time stamps, ``nothing`` is only counted."""
TICK_OF_REFERENCE = (
    "goes with kind 'reference' only: a definition tells the tick size, and no other event needs it, since prices are whole numbers of 1e-9"
)
OF_INSTRUMENT = ("add", "execute", "cancel", "delete", "replace", "modify", "level", "trade", "quote", "reference")
"""Kinds that make no sense without an instrument."""

OF_ORDER = ("execute", "cancel", "delete", "replace", "modify")
"""Kinds whose message may name an order and no instrument, where orders are followed (``follow_orders``)."""

UNITS_NS = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
NAMES: dict[str, int] = {"BID": 0, "ASK": 1, "NO_SIDE": 2, "NO_PRICE": NO_PRICE, **{s.name: int(s) for s in TradingStatus}}
"""Words a map may give instead of a number."""
ALLOWED: dict[str, Mapping[int, str]] = {
    "side": {0: "BID", 1: "ASK", 2: "NO_SIDE"},
    "status": {int(s): s.name for s in TradingStatus},
}
"""What an event's `side`, and the `aux` of a ``status``, can say: others would mean nothing to a book."""


@dataclass(frozen=True)
class Problem:
    """One fault of a spec file: where (file, line, dotted key) and what is wrong."""

    path: str
    line: int
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.key}: {self.reason}"


class SpecError(Exception):
    """A spec file is refused.

    Attributes:
        problems: every fault found, in the file's order.
    """

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


class MappingError(Exception):
    """A source's `fields` or `messages` do not fit its protocol.

    Attributes:
        problems: what does not fit, one line each.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


# ---------------------------------------------------------------- what a checked spec is


@dataclass(frozen=True)
class Field:
    """A field of a message. `decimals` >= 0 scales its value to 1e-9; `null` is the raw value that means "none"."""

    name: str
    offset: int
    type: str
    size: int
    signed: bool
    big: bool
    decimals: int = -1
    null: int | None = None
    map: Mapping[int, int] | None = None
    map_default: int | None = None

    @property
    def text(self) -> bool:
        return self.type.startswith("alpha:")


@dataclass(frozen=True)
class FlagRule:
    """Sets `flag` where ``(field & bits) == equals`` (negated if not `wanted`)."""

    flag: int
    field: str
    bits: int
    equals: int
    wanted: bool = True


@dataclass(frozen=True)
class Case:
    """One event mapping of a message. `when`: field -> raw values that select it; `values`: event field -> field name or constant.

    `by_order`: the message names no instrument, its order does; `silent`: it is taken note of, but makes no event.
    """

    name: str
    kind: str
    when: Mapping[str, tuple[int, ...]]
    values: Mapping[str, str | int]
    flags: int = 0
    flag_rules: tuple[FlagRule, ...] = ()
    all_instruments: bool = False
    by_order: bool = False
    silent: bool = False


@dataclass(frozen=True)
class Message:
    """A message type: `code` is its discriminator, `length` the bytes it has at least."""

    name: str
    code: int
    length: int
    fields: Mapping[str, Field]
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Spec:
    """A checked protocol. ``counters`` names what is counted: a message, or each case of a message with several."""

    name: str
    title: str
    path: str
    type_field: Field
    order_ids: str
    tick_size: int
    qty_exponent: int
    timestamp: str | None
    timestamp_unit_ns: int
    timestamp_since: str
    received: str | None
    code: str | None
    symbol: str | None
    messages: tuple[Message, ...]
    seconds_since: str = "midnight"
    follow_orders: bool = False

    @property
    def counters(self) -> list[str]:
        return [m.name if len(m.cases) == 1 else f"{m.name}.{c.name}" for m in self.messages for c in m.cases]

    @property
    def code_bytes(self) -> int:
        """Bytes of the numeric code that names an instrument; 0: there is none."""
        return next((m.fields[self.code].size for m in self.messages if self.code in m.fields), 0) if self.code else 0

    @property
    def rebinds(self) -> bool:
        """Whether a message other than a directory carries the symbol's text beside the code."""
        return bool(self.code) and any(self.symbol in m.fields and any(c.kind != "reference" for c in m.cases) for m in self.messages)

    @property
    def ladder_levels(self) -> int:
        """Levels of a ladder where the venue's books go by position, else 0."""
        return 0

    @property
    def remembers(self) -> bool:
        """Whether its decoder has to remember what a session has told so far: orders that it follows, or levels by position."""
        return self.follow_orders or self.ladder_levels > 0


@dataclass(frozen=True)
class Framing:
    """A checked framing: message length prefix, and the packet header where there is one.

    `messages_at`: where in a packet the first message begins, header of its own included. `count_to_end`: every whole message up to the
    packet's end takes a sequence, and the header counts none.
    """

    name: str
    title: str
    path: str
    packets: bool
    length: Field
    length_unit: int
    length_includes_itself: bool
    message_offset: int
    zero_length_is_end: bool
    preamble_magic: bytes = b""
    preamble_length: Field | None = None
    preamble_fixed: int = 0
    header_bytes: int = 0
    messages_at: int = 0
    count_to_end: bool = False
    sequence: Field | None = None
    count: Field | None = None
    session: tuple[Field, ...] = ()
    end_count: int | None = None
    unsequenced: int | None = None
    data_when: tuple[Field, tuple[int, ...]] | None = None
    heartbeat_when: tuple[Field, tuple[int, ...]] | None = None
    heartbeat_sequence: Field | None = None
    by_packet: bool = False
    encoding: tuple[Field, tuple[int, ...]] | None = None


# ---------------------------------------------------------------- where a key stands in the file

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""(?:^|[{,])\s*("[^"]*"|'[^']*'|[A-Za-z0-9_.-]+)\s*=""")


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """Line of every key of a TOML text, by its path (list items by their index). Inline tables count as the line they are on."""
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    seen: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        header = _HEADER.match(line)
        if header:
            table = tuple(part.strip().strip("\"'") for part in header[2].split("."))
            if header[1] == "[[":
                seen[table] = seen.get(table, -1) + 1
                table = (*table, str(seen[table]))
            lines.setdefault(table, number)
            continue
        outer: tuple[str, ...] = ()
        for match in _KEY.finditer(line):
            parts = tuple(match[1].strip("\"'").split(".")) if match[1][0] not in "\"'" else (match[1][1:-1],)
            if not outer:
                outer = parts
                lines.setdefault((*table, *parts), number)
            else:
                lines.setdefault((*table, *outer, *parts), number)
    return lines


class _Document:
    """A parsed TOML file that collects problems while it is read."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.problems = path, list[Problem]()
        self._lines = key_lines(text)
        self.root: dict[str, Any] = {}
        try:
            self.root = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            found = re.search(r"line (\d+)", str(error))
            self.problems.append(Problem(str(path), int(found[1]) if found else 1, "TOML", str(error)))

    def fault(self, key: tuple[str, ...], reason: str) -> None:
        prefix = key
        while prefix and prefix not in self._lines:
            prefix = prefix[:-1]
        self.problems.append(Problem(str(self.path), self._lines.get(prefix, 1), ".".join(key), reason))

    def table(
        self, parent: Mapping[str, Any], key: tuple[str, ...], allowed: tuple[str, ...] | None = None, required: bool = False
    ) -> dict[str, Any]:
        """The table ``parent[key[-1]]``; unknown keys are faults."""
        value = parent.get(key[-1])
        if value is None:
            if required:
                self.fault(key, "is missing")
            return {}
        if not isinstance(value, dict):
            self.fault(key, "must be a table")
            return {}
        if allowed is not None:
            self.only(value, key, allowed)
        return value

    def only(self, table: Mapping[str, Any], key: tuple[str, ...], allowed: tuple[str, ...]) -> None:
        for name in table:
            if name not in allowed:
                self.fault((*key, name), f"is not known here; known: {', '.join(allowed)}")

    def name(self, table: Mapping[str, Any], key: tuple[str, ...], default: str | None = None) -> str:
        """A text that may stand in the name of a generated module: letters, digits and underscores."""
        value = self.text(table, key, default=default)
        if value and not NAME.fullmatch(value):
            self.fault(key, f"{value!r} is no name: 1 to 64 letters, digits and underscores")
        return value

    def title(self, table: Mapping[str, Any], key: tuple[str, ...], default: str) -> str:
        """A text on one line, which stands in the first line of a generated module."""
        value = self.text(table, key, default=default)
        if not value.isprintable() or any(one in value for one in '"\\'):
            self.fault(key, "must be printable text on one line, without quotation marks and backslashes")
            return ""
        return value

    def text(self, table: Mapping[str, Any], key: tuple[str, ...], choices: tuple[str, ...] = (), default: str | None = None) -> str:
        value = table.get(key[-1], default)
        if not isinstance(value, str):
            self.fault(key, "is missing" if value is None else "must be text")
            return choices[0] if choices else ""
        if choices and value not in choices:
            self.fault(key, f"{value!r} is not one of {', '.join(choices)}")
            return choices[0]
        return value

    def number(self, table: Mapping[str, Any], key: tuple[str, ...], low: int, high: int, default: int | None = None) -> int:
        value = table.get(key[-1], default)
        if not isinstance(value, int) or isinstance(value, bool):
            self.fault(key, "is missing" if value is None else "must be a whole number")
            return low
        if not low <= value <= high:
            self.fault(key, f"{value} is not within {low} to {high}")
            return low
        return value

    def truth(self, table: Mapping[str, Any], key: tuple[str, ...], default: bool) -> bool:
        value = table.get(key[-1], default)
        if not isinstance(value, bool):
            self.fault(key, "must be true or false")
            return default
        return value

    def done(self) -> None:
        if self.problems:
            raise SpecError(sorted(self.problems, key=lambda p: p.line))


def _document(name: str | Path, prefix: str) -> _Document:
    path = Path(name)
    if path.suffix != ".toml":
        path = SHIPPED / f"{prefix}{name}.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        shipped = ", ".join(shipped_names(prefix))
        reason = f"cannot be read ({error.__class__.__name__}); name a .toml file or one of: {shipped}"
        raise SpecError([Problem(str(path), 0, str(name), reason)]) from error
    return _Document(path, text)


def mapped_names() -> list[str]:
    """Names of the shipped mappings, each of which takes a venue's SBE schema."""
    return [name for name in shipped_names() if is_sbe(SHIPPED / f"{name}.toml")]


def shipped_names(prefix: str = "") -> list[str]:
    """Names of the shipped protocols, or with ``prefix="framing_"`` of the shipped framings."""
    found = sorted(p.stem for p in SHIPPED.glob("*.toml"))
    return [n.removeprefix(prefix) for n in found if n.startswith("framing_") == bool(prefix)]


# ---------------------------------------------------------------- fields

_FIELD_KEYS = ("offset", "type", "byte_order", "decimals", "null", "map")


def _field(doc: _Document, key: tuple[str, ...], raw: Any, order: str, maps: Mapping[str, Any]) -> Field | None:
    if not isinstance(raw, dict):
        doc.fault(key, "must be a table such as { offset = 0, type = 'u16' }")
        return None
    doc.only(raw, key, _FIELD_KEYS)
    kind = doc.text(raw, (*key, "type"))
    if re.fullmatch(r"alpha:[0-9]{1,5}", kind) and 0 < int(kind[6:]) <= MESSAGE_BYTES_MAX:
        size, signed = int(kind[6:]), False
    elif kind in TYPES:
        size, signed = TYPES[kind]
    else:
        doc.fault((*key, "type"), f"{kind!r} is not a type; types: {', '.join(TYPES)}, alpha:N")
        return None
    offset = doc.number(raw, (*key, "offset"), 0, MESSAGE_BYTES_MAX)
    order = doc.text(raw, (*key, "byte_order"), ("big", "little"), order)
    decimals, null = -1, None
    if "decimals" in raw:
        decimals = doc.number(raw, (*key, "decimals"), 0, PRICE_DECIMALS)
        if size < 2 or kind.startswith("alpha:"):
            doc.fault((*key, "decimals"), f"a field of type {kind} cannot carry a price")
    if "null" in raw:
        null = doc.number(raw, (*key, "null"), -(1 << (8 * min(size, 8) - 1)) if signed else 0, (1 << (8 * min(size, 8) - int(signed))) - 1)
    found, default = _map(doc, (*key, "map"), raw.get("map"), maps, size, signed) if "map" in raw else (None, None)
    return Field(key[-1], offset, kind, size, signed, order == "big", decimals, null, found, default)


def _map(
    doc: _Document, key: tuple[str, ...], raw: Any, maps: Mapping[str, Any], size: int, signed: bool
) -> tuple[dict[int, int] | None, int | None]:
    """Raw value -> event value, and the value for everything else (key ``*``), if any."""
    if isinstance(raw, str):
        if raw not in maps:
            doc.fault(key, f"there is no [maps.{raw}]")
            return None, None
        key, raw = ("maps", raw), maps[raw]
    if not isinstance(raw, dict) or not raw:
        doc.fault(key, "must be the name of a map, or a table of raw value = value")
        return None, None
    result, default = dict[int, int](), None
    for name, value in raw.items():
        number = NAMES.get(value) if isinstance(value, str) else value
        if not isinstance(number, int) or isinstance(number, bool):
            doc.fault((*key, name), f"{value!r} is neither a whole number nor one of {', '.join(NAMES)}")
            continue
        if name == "*":
            default = number
            continue
        code = raw_value(name, size, signed)
        if code is None:
            doc.fault((*key, name), f"{name!r} does not fit a field of {size} bytes")
        else:
            result[code] = number
    return result, default


def raw_value(value: Any, size: int, signed: bool = False) -> int | None:
    """A raw field value as written in a spec: a number, text of digits after ``#`` or ``0x``, or one character; None if it does not fit.

    Of a `signed` field the value is what the field then says: both -1 and 0xFF are -1 in an ``i8``.
    """
    bits = 8 * min(size, 8)
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        if re.fullmatch(r"#-?[0-9]{1,20}", value):
            value = int(value[1:])
        elif re.fullmatch(r"0x[0-9A-Fa-f]{1,16}", value):
            value = int(value, 16)
        elif len(value) == 1 and value.isascii():
            value = ord(value)
        else:
            return None
    if not isinstance(value, int) or not (-(1 << bits - 1) if signed else 0) <= value < 1 << bits:
        return None
    return value - (1 << bits) if signed and value >= 1 << bits - 1 else value


# ---------------------------------------------------------------- protocol

_TOP = ("protocol", "timestamp", "instrument", "maps", "fields", "messages")


def is_sbe(name: str | Path) -> bool:
    """Whether a protocol's messages are laid out by an SBE schema: ``MAPPING:FILE.xml``, or a spec file that names a ``schema``."""
    if ":" in str(name) and str(name).endswith(".xml"):
        return True
    if Path(name).suffix != ".toml":
        return False
    try:
        head = tomllib.loads(Path(name).read_text(encoding="utf-8")).get("protocol")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False  # said better by whoever reads it as a spec
    return isinstance(head, dict) and ("schema" in head or "package" in head)


def load_spec(name: str | Path) -> Spec:
    """Read and check a protocol: a shipped one by name (``"itch50"``) or a ``.toml`` file by path.

    Raises:
        SpecError: with every fault of the file.
    """
    if is_sbe(name):
        from tickmesh.node.sbe_mapping import load_sbe  # which reads its mapping with what this module has

        return load_sbe(name)
    doc = _document(name, "")
    root = doc.root
    if name in mapped_names():
        reason = f'lays out the messages of an SBE schema, which is the venue\'s: name it too, e.g. data_format = "{name}:FILE.xml"'
        raise SpecError([Problem(str(doc.path), 0, "protocol.package", reason)])
    doc.only(root, (), _TOP)
    head_keys = ("name", "title", "byte_order", "order_ids", "type_field", "tick_size", "qty_exponent")
    head = doc.table(root, ("protocol",), head_keys, required=True)
    order = doc.text(head, ("protocol", "byte_order"), ("big", "little"))
    maps = doc.table(root, ("maps",))
    type_field = _type_field(doc, head, order)
    time = _with_names(doc, "timestamp", ("field", "received"), ("field", "unit", "since", "received", "seconds_since"))
    instrument = _with_names(doc, "instrument", ("code", "symbol"), ("code", "symbol", "follow_orders"))
    common = {k: f for k, raw in doc.table(root, ("fields",)).items() if (f := _field(doc, ("fields", k), raw, order, maps))}
    tables = doc.table(root, ("messages",), required=True)
    messages = [m for k in tables if (m := _message(doc, ("messages", k), tables, order, maps, common, instrument, time, type_field))]
    _check_codes(doc, messages)
    _check_names(doc, messages, instrument, time)
    _check_uses(doc, messages, instrument)
    spec = Spec(
        name=doc.name(head, ("protocol", "name")),
        title=doc.title(head, ("protocol", "title"), str(head.get("name", ""))),
        path=str(doc.path),
        type_field=type_field,
        order_ids=doc.text(head, ("protocol", "order_ids"), ("random", "sequential"), "random"),
        tick_size=_tick_size(doc, head),
        qty_exponent=doc.number(head, ("protocol", "qty_exponent"), -9, 18, 0),
        timestamp=time.get("field"),
        timestamp_unit_ns=UNITS_NS[doc.text(time, ("timestamp", "unit"), tuple(UNITS_NS), "ns")],
        timestamp_since=doc.text(time, ("timestamp", "since"), ("epoch", "midnight", "time_message"), "epoch"),
        received=time.get("received"),
        code=instrument.get("code"),
        symbol=instrument.get("symbol"),
        messages=tuple(messages),
        seconds_since=doc.text(time, ("timestamp", "seconds_since"), ("midnight", "epoch"), "midnight"),
        follow_orders=doc.truth(instrument, ("instrument", "follow_orders"), False),
    )
    if spec.follow_orders and not any(c.kind == "add" for m in messages for c in m.cases):
        doc.fault(("instrument", "follow_orders"), "no message has an event of kind 'add' that says of which instrument an order is")
    doc.done()
    return spec


def _with_names(doc: _Document, section: str, names: tuple[str, ...], allowed: tuple[str, ...]) -> dict[str, Any]:
    """A table some of whose keys name fields; a value that is no text is a fault, and left out."""
    table = dict(doc.table(doc.root, (section,), allowed))
    for key in names:
        if key in table and not isinstance(table[key], str):
            doc.fault((section, key), "must be the name of a field")
            del table[key]
    return table


def _check_uses(doc: _Document, messages: list[Message], instrument: Mapping[str, Any]) -> None:
    """There is an instrument to speak of, and an event that does."""
    if not {"code", "symbol"} & instrument.keys():
        reason = "is missing: say in `code`, `symbol` or both which fields name the instrument of a message"
        doc.fault(("instrument",), reason)
    elif not any(case.kind in KINDS and not case.all_instruments for message in messages for case in message.cases):
        doc.fault(("messages",), "no message makes an event of an instrument: give one an event, such as { kind = 'trade', … }")


def _type_field(doc: _Document, head: Mapping[str, Any], order: str) -> Field:
    found = None
    if "type_field" in head:
        found = _field(doc, ("protocol", "type_field"), head["type_field"], order, {})
        if found and (found.text or found.signed or found.size not in (1, 2, 4)):
            doc.fault(("protocol", "type_field", "type"), "must be char, u8, u16 or u32")
    else:
        doc.fault(("protocol", "type_field"), "is missing: the field that tells one message type from another")
    return found or Field("type_field", 0, "char", 1, False, True)


def _tick_size(doc: _Document, head: Mapping[str, Any]) -> int:
    raw = head.get("tick_size", "0.01")
    try:
        value = Decimal(raw) if isinstance(raw, str) else None
    except InvalidOperation:
        value = None
    bounded = value is not None and value.is_finite() and 0 < value < 1 << 33
    scaled = value.scaleb(PRICE_DECIMALS) if value is not None and bounded else Decimal(0)
    if scaled <= 0 or scaled != int(scaled) or scaled >= 1 << 62:
        doc.fault(("protocol", "tick_size"), f'{raw!r} is not a decimal text between "0.000000001" and "4000000000"')
        return 1
    return int(scaled)


def _message(
    doc: _Document, key: tuple[str, ...], tables: Mapping[str, Any], order: str, maps: Mapping[str, Any], common: Mapping[str, Field],
    instrument: Mapping[str, Any], time: Mapping[str, Any], type_field: Field,
) -> Message | None:  # fmt: skip
    table = doc.table(tables, key, ("type", "length", "fields", "event", "title"))
    if not table:
        doc.fault(key, "is empty: it needs type, length, fields and event")
        return None
    code = raw_value(table.get("type"), type_field.size)
    if code is None:
        doc.fault((*key, "type"), f"{table.get('type')!r} is not a value of the type field ({type_field.type}): one character or a number")
    length = doc.number(table, (*key, "length"), 1, MESSAGE_BYTES_MAX)
    if not NAME.fullmatch(key[-1]):
        doc.fault(key, f"{key[-1]!r} is no name of a message: 1 to 64 letters, digits and underscores")
    own = {k: f for k, raw in doc.table(table, (*key, "fields")).items() if (f := _field(doc, (*key, "fields", k), raw, order, maps))}
    fields = {**{k: f for k, f in common.items() if f.offset + f.size <= length}, **own}
    _check_layout(doc, (*key, "fields"), fields, own, length, type_field)
    events = table.get("event", {"kind": "nothing"})
    listed = events if isinstance(events, list) else [events]
    cases = []
    for number, raw in enumerate(listed):
        where = (*key, "event", str(number)) if isinstance(events, list) else (*key, "event")
        case = _case(doc, where, raw, fields, instrument, time)
        if case:
            cases.append(case)
    if len({c.name for c in cases}) != len(cases):
        doc.fault((*key, "event"), "two cases have one name; give each a `name`")
    for number, case in enumerate(cases[:-1]):
        if not case.when:
            doc.fault((*key, "event", str(number)), "has no `when`, so that it takes all messages: the cases behind it never come")
    return Message(key[-1], code or 0, length, fields, tuple(cases))


def _check_layout(
    doc: _Document, key: tuple[str, ...], fields: Mapping[str, Field], own: Mapping[str, Field], length: int, type_field: Field
) -> None:  # fmt: skip
    if type_field.offset + type_field.size > length:
        doc.fault(key[:-1], f"length {length} does not reach the type field, which ends at {type_field.offset + type_field.size}")
    ordered = sorted([*fields.items(), ("the type field", type_field)], key=lambda item: (item[1].offset, item[1].size))
    last_name, last_end = "", 0
    for name, f in ordered:
        end = f.offset + f.size
        at = (*key, name) if name in own else key[:-1]
        if end > length:
            doc.fault(at, f"ends at byte {end}, beyond the message's length {length}")
        if f.offset < last_end:
            doc.fault(at, f"{name} (bytes {f.offset} to {end - 1}) overlaps {last_name}, which ends at byte {last_end - 1}")
        last_name, last_end = (name, end) if end > last_end else (last_name, last_end)


_CASE_KEYS = ("kind", "name", "when", "flags", "flag_if", "instrument", *EVENT_FIELDS)


def _case(
    doc: _Document, key: tuple[str, ...], raw: Any, fields: Mapping[str, Field], instrument: Mapping[str, Any], time: Mapping[str, Any]
) -> Case | None:  # fmt: skip
    if not isinstance(raw, dict):
        doc.fault(key, "must be a table with a `kind`")
        return None
    doc.only(raw, key, _CASE_KEYS)
    kind = doc.text(raw, (*key, "kind"), tuple(REQUIRED))
    given = {name: _event_value(doc, (*key, name), raw[name], fields, kind) for name in EVENT_FIELDS if name in raw}
    values = {name: value for name, value in given.items() if value is not None}
    if "tick_size" in raw and kind != "reference":
        doc.fault((*key, "tick_size"), TICK_OF_REFERENCE)
    for name in REQUIRED[kind]:
        if name not in raw:
            doc.fault((*key, name), f"is missing: an event of kind {kind!r} needs {', '.join(REQUIRED[kind])}")
    everything = doc.text(raw, (*key, "instrument"), ("own", "all"), "own") == "all"
    has_instrument = instrument.get("code", instrument.get("symbol")) in fields
    by_order = instrument.get("follow_orders") is True and kind in OF_ORDER and not has_instrument and not everything
    if kind in OF_INSTRUMENT and (everything or not has_instrument) and not by_order:
        doc.fault(key, f"an event of kind {kind!r} needs an instrument: the field that [instrument] names is not in this message")
    elif kind not in ("time", "nothing") and not (has_instrument or everything or by_order):
        doc.fault(key, "names no instrument: add the field that [instrument] names, or instrument = 'all' if it is about the whole venue")
    if kind == "reference" and "symbol" in instrument and instrument["symbol"] not in fields:
        doc.fault(key, "an event of kind 'reference' needs the symbol field of [instrument] in its message")
    when = _when(doc, (*key, "when"), doc.table(raw, (*key, "when")), fields)
    flags, rules = _flags(doc, key, raw, fields)
    name = doc.name(raw, (*key, "name"), kind)
    if kind == "execute" and "price" in values:
        flags |= int(Flag.PRICED)
    return Case(name, kind, when, values, flags, rules, not by_order and (everything or not has_instrument), by_order)


def not_allowed(kind: str, target: str, said: Iterable[int | None], allowed: Mapping[str, Mapping[int, str]]) -> str:
    """Why an event of a kind cannot say this in an event field; empty if it can.

    Args:
        target: the event field.
        said: a constant, or what a map gives (None: a map that refuses all other values gives nothing for them).
        allowed: values and their words by target; by "status" that of the `aux` of a status.
    """
    known = allowed.get("status" if (kind, target) == ("status", "aux") else target)
    wrong = sorted({value for value in said if value is not None and known is not None and value not in known})
    if not wrong or known is None:
        return ""
    what = "a status" if target == "aux" else f"a {target}"
    words = [word if word == str(value) else f"{word} ({value})" for value, word in known.items()]
    return f"{', '.join(map(str, wrong))} is not {what}: allowed are {', '.join(words)}"


def _event_value(doc: _Document, key: tuple[str, ...], raw: Any, fields: Mapping[str, Field], kind: str) -> str | int | None:
    if isinstance(raw, dict) and set(raw) == {"constant"}:
        given = raw["constant"]
        raw = NAMES[given] if isinstance(given, str) and given in NAMES else raw_value(given, 8)
    if isinstance(raw, str):
        found = fields.get(raw)
        if not found:
            doc.fault(key, f"this message has no field {raw!r}; fields: {', '.join(fields)}; a constant is written {{ constant = ... }}")
            return None
        if found.text and found.size > 8:
            doc.fault(key, f"text of {found.size} bytes does not fit an event field of 8")
            return None
        if key[-1] == "side" and not found.map:
            doc.fault(key, f"field {raw!r} needs a map to BID, ASK and NO_SIDE")
        if found.map and (reason := not_allowed(kind, key[-1], (*found.map.values(), found.map_default), ALLOWED)):
            doc.fault(key, f"the map of field {raw!r}: {reason}")
        if key[-1] == "tick_size" and found.decimals < 0:
            doc.fault(key, f"field {raw!r} needs `decimals`")
        if key[-1] == "price" and found.decimals < 0 and not found.map:
            doc.fault(key, f"field {raw!r} needs `decimals`: a price is scaled to 1e-9")
        return raw
    if isinstance(raw, int) and not isinstance(raw, bool) and -(1 << 63) <= raw < 1 << 63:
        if reason := not_allowed(kind, key[-1], (raw,), ALLOWED):
            doc.fault(key, reason)
        return raw
    doc.fault(key, "must be a field's name, a whole number or { constant = ... }")
    return None


def _when(doc: _Document, key: tuple[str, ...], raw: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, tuple[int, ...]]:
    result = {}
    for name, wanted in raw.items():
        if name not in fields or fields[name].text:
            doc.fault((*key, name), f"this message has no number or character field {name!r}")
            continue
        codes = [raw_value(v, fields[name].size, fields[name].signed) for v in (wanted if isinstance(wanted, list) else [wanted])]
        if not codes or None in codes:
            doc.fault((*key, name), f"{wanted!r} is not a value of {name} ({fields[name].type})")
            continue
        result[name] = tuple(c for c in codes if c is not None)
    return result


def _flags(doc: _Document, key: tuple[str, ...], raw: Mapping[str, Any], fields: Mapping[str, Field]) -> tuple[int, tuple[FlagRule, ...]]:
    names = tuple(f.name for f in Flag if f.name)
    constant, rules = 0, []
    listed = raw.get("flags", [])
    for name in listed if isinstance(listed, list) else [listed]:
        if name in names:
            constant |= int(Flag[name])
        else:
            doc.fault((*key, "flags"), f"{name!r} is not one of {', '.join(names)}")
    where, conditions = (*key, "flag_if"), raw.get("flag_if", [])
    if not isinstance(conditions, list):
        doc.fault(where, "must be a list of tables")
        conditions = []
    for rule in conditions:
        if not isinstance(rule, dict):
            doc.fault(where, "must be a list of tables")
            continue
        doc.only(rule, where, ("flag", "field", "equals", "bits", "set"))
        found = fields.get(str(rule.get("field")))
        if rule.get("flag") not in names or not found or found.text or found.size > 4 or ("equals" in rule) == ("bits" in rule):
            doc.fault(where, "needs a flag, a number or character field, and either `equals` or `bits` (with `set`)")
            continue
        value = raw_value(rule.get("equals", rule.get("bits")), found.size)
        if value is None:
            doc.fault(where, f"{rule.get('equals', rule.get('bits'))!r} is not a value of {found.name} ({found.type})")
            continue
        full = (1 << (8 * found.size)) - 1
        bits, wanted = (full, True) if "equals" in rule else (value, doc.truth(rule, (*where, "set"), True))
        rules.append(FlagRule(int(Flag[rule["flag"]]), found.name, bits, value, wanted))
    return constant, tuple(rules)


def _check_codes(doc: _Document, messages: list[Message]) -> None:
    seen: dict[int, str] = {}
    for message in messages:
        if message.code in seen:
            doc.fault(("messages", message.name, "type"), f"is also the type of {seen[message.code]}")
        seen[message.code] = message.name


def _check_names(doc: _Document, messages: list[Message], instrument: Mapping[str, Any], time: Mapping[str, Any]) -> None:
    """The fields that [instrument] and [timestamp] name exist and have fitting types."""
    for section, key, table in (("instrument", "code", instrument), ("instrument", "symbol", instrument),
                                ("timestamp", "field", time), ("timestamp", "received", time)):  # fmt: skip
        name = table.get(key)
        if name is None:
            continue
        users = [m.fields[name] for m in messages if name in m.fields]
        if not users:
            doc.fault((section, key), f"no message has a field {name!r}")
        if key == "code" and len({f.size for f in users}) > 1:
            doc.fault((section, key), f"field {name!r} must have one type in every message")
        for found in users:
            if key == "symbol" and not (found.text and found.size <= SYMBOL_BYTES_MAX):
                doc.fault((section, key), f"field {name!r} must be alpha:1 to alpha:{SYMBOL_BYTES_MAX}")
                break
            if key != "symbol" and (found.text or (found.signed and key == "code")):
                doc.fault((section, key), f"field {name!r} must be a number")
                break
    if time.get("since") == "time_message" and not any(c.kind == "time" for m in messages for c in m.cases):
        doc.fault(("timestamp", "since"), "no message has an event of kind 'time' that gives the seconds")


# ---------------------------------------------------------------- framing


def load_framing(name: str | Path) -> Framing:
    """Read and check a framing: a shipped one by name (``"moldudp64"``) or a ``.toml`` file by path.

    Raises:
        SpecError: with every fault of the file.
    """
    doc = _document(name, "framing_")
    doc.only(doc.root, (), ("framing", "message", "packet", "preamble"))
    head = doc.table(doc.root, ("framing",), ("name", "title", "byte_order", "carries"), required=True)
    order = doc.text(head, ("framing", "byte_order"), ("big", "little"))
    packets = doc.text(head, ("framing", "carries"), ("packets", "stream")) == "packets"
    keys = ("length", "length_unit", "length_includes_itself", "offset", "zero_length", "encoding")
    body = doc.table(doc.root, ("message",), keys, required=True)
    length = _number_field(doc, ("message", "length"), body.get("length"), order)
    framing = Framing(
        name=doc.name(head, ("framing", "name")),
        title=doc.title(head, ("framing", "title"), str(head.get("name", ""))),
        path=str(doc.path),
        packets=packets,
        length=length or Field("length", 0, "u16", 2, False, True),
        length_unit=doc.number(body, ("message", "length_unit"), 1, 64, 1),
        length_includes_itself=doc.truth(body, ("message", "length_includes_itself"), False),
        message_offset=doc.number(body, ("message", "offset"), 0, 64),
        zero_length_is_end=doc.text(body, ("message", "zero_length"), ("malformed", "end"), "malformed") == "end",
        encoding=_packet_rule(doc, ("message", "encoding"), body, order, 64) if "encoding" in body else None,
        **_preamble(doc, order),
        **(_packet(doc, order) if packets else {}),
    )
    doc.done()
    return framing


def _number_field(doc: _Document, key: tuple[str, ...], raw: Any, order: str) -> Field | None:
    if raw is None:
        doc.fault(key, "is missing")
        return None
    found = _field(doc, key, raw, order, {})
    if found and (found.text or found.signed):
        doc.fault((*key, "type"), "must be an unsigned number")
    if found and key == ("message", "length") and found.size > 4:
        doc.fault((*key, "type"), "is wider than u32: no message is so long")
    return found


def _preamble(doc: _Document, order: str) -> dict[str, Any]:
    if "preamble" not in doc.root:
        return {}
    table = doc.table(doc.root, ("preamble",), ("magic", "length", "length_excludes"))
    magic = doc.text(table, ("preamble", "magic")).encode("ascii", errors="replace")
    if not 0 < len(magic) <= 8:
        doc.fault(("preamble", "magic"), "must be 1 to 8 ASCII characters")
    length = _number_field(doc, ("preamble", "length"), table.get("length"), order)
    fixed = doc.number(table, ("preamble", "length_excludes"), 0, 1024, 0)
    return {"preamble_magic": magic, "preamble_length": length, "preamble_fixed": fixed}


def _packet(doc: _Document, order: str) -> dict[str, Any]:
    keys = (
        "header_bytes", "messages_at", "sequence", "sequence_of", "count", "session", "end_count", "unsequenced", "data_when",
        "heartbeat_when", "heartbeat_sequence",
    )  # fmt: skip
    table = doc.table(doc.root, ("packet",), keys, required=True)
    by_packet = doc.text(table, ("packet", "sequence_of"), ("messages", "packets"), "messages") == "packets"
    header = doc.number(table, ("packet", "header_bytes"), 1, 1024)
    sequence = _number_field(doc, ("packet", "sequence"), table.get("sequence"), order)
    to_end = table.get("count") == "to_end" and not by_packet
    count = None if by_packet or to_end else _number_field(doc, ("packet", "count"), table.get("count"), order)
    if to_end and "end_count" in table:
        doc.fault(("packet", "end_count"), "has no meaning where messages are counted to the packet's end")
    if by_packet and {"count", "end_count"} & table.keys():
        doc.fault(("packet", "count"), "has no meaning where packets are counted (sequence_of): a packet's messages go on to its end")
    session: list[Field] = []
    listed = table.get("session", [])
    for number, raw in enumerate(listed if isinstance(listed, list) else [listed]):
        found = _number_field(doc, ("packet", "session"), raw, order)
        if found:
            session.append(found)
        if number > 3:
            doc.fault(("packet", "session"), "has more than 4 fields")
    for name, found in [("sequence", sequence), ("count", count), *(("session", s) for s in session)]:
        if found and found.offset + found.size > header:
            doc.fault(("packet", name), f"ends at byte {found.offset + found.size}, beyond the header's {header}")
    result: dict[str, Any] = {"header_bytes": header, "sequence": sequence, "count": count, "session": tuple(session)}
    result |= {"by_packet": by_packet, "count_to_end": to_end}
    result["messages_at"] = doc.number(table, ("packet", "messages_at"), 0, header, header)
    if "heartbeat_sequence" in table:
        result["heartbeat_sequence"] = _number_field(doc, ("packet", "heartbeat_sequence"), table["heartbeat_sequence"], order)
    for name in ("end_count", "unsequenced"):
        if name in table:
            result[name] = doc.number(table, ("packet", name), 0, (1 << 63) - 1)
    for name in ("data_when", "heartbeat_when"):
        if name in table:
            result[name] = _packet_rule(doc, ("packet", name), table, order, 1024 if name == "heartbeat_when" else header)
    return result


def _packet_rule(
    doc: _Document, key: tuple[str, ...], parent: Mapping[str, Any], order: str, header: int
) -> tuple[Field, tuple[int, ...]] | None:
    table = dict(doc.table(parent, key))
    raw = table.pop("equals", None)
    found = _number_field(doc, key, table, order)
    values = [raw_value(v, found.size) for v in (raw if isinstance(raw, list) else [raw])] if found else []
    if not found or not values or None in values or found.offset + found.size > header:
        doc.fault(key, f"needs a field within {header} bytes (offset, type) and `equals` (a value or a list)")
        return None
    return found, tuple(v for v in values if v is not None)


def fields_of(case: Case) -> Iterator[str]:
    """Names of the message fields that a case reads."""
    yield from case.when
    yield from (v for v in case.values.values() if isinstance(v, str))
    yield from (r.field for r in case.flag_rules)


KINDS: dict[str, Kind] = {k: Kind[k.upper()] for k in REQUIRED if k not in ("time", "nothing")}
__all__ = [
    "KINDS",
    "Case",
    "Field",
    "FlagRule",
    "Framing",
    "MappingError",
    "Message",
    "Problem",
    "Spec",
    "SpecError",
    "load_framing",
    "load_spec",
    "shipped_names",
]
