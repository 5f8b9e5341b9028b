"""Which event a message of an SBE schema becomes: reads a mapping (TOML) together with the venue's schema (XML) and checks both.

A mapping is a spec file without layouts: fields are named as the schema names them, a part of a composite by a dotted path, and an
event may be made of every entry of a group. ``docs/howto/read-sbe.md`` describes it; :mod:`tickmesh.node.sbe_decoder` compiles it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tickmesh.node.event import PRICE_DECIMALS, Flag
from tickmesh.node.protocol import (
    ALLOWED,
    EVENT_FIELDS,
    NAMES,
    OF_INSTRUMENT,
    REQUIRED,
    SHIPPED,
    SYMBOL_BYTES_MAX,
    TICK_OF_REFERENCE,
    UNITS_NS,
    Field,
    MappingError,
    Problem,
    Spec,
    SpecError,
    _Document,
    _tick_size,
    not_allowed,
    raw_value,
)  # fmt: skip
from tickmesh.node.sbe_kernels import DEPTH_MAX, IMPLIED_SUFFIX, Change
from tickmesh.node.sbe_schema import Composite, Data, Encoding, Enum, Leaf, Level, Message, Schema, Set, leaves, load_schema
from tickmesh.node.sbe_schema import Field as SchemaField

WORDS: dict[str, int] = {**NAMES, **{change.name: int(change) for change in Change}, "OWN": 0, "IMPLIED": 1}
"""Words a map may give instead of a number: those of every spec file, changes of a ladder, and which book of an instrument."""
MORE_KINDS: dict[str, tuple[str, ...]] = {"stale": (), "depth": ("qty",)}
"""Kinds that only a mapping has: the book is stale until a snapshot comes; the venue shows so many levels."""
_ALLOWED: dict[str, Mapping[int, str]] = {
    **ALLOWED, "change": {int(change): change.name for change in Change}, "book": {0: "OWN", 1: "IMPLIED"},
    "position": {number: str(number) for number in range(1, DEPTH_MAX + 1)},
}  # fmt: skip
OF_DEFINITIONS = ("reference", "depth")
"""Kinds of what defines instruments."""
_TARGETS = (*EVENT_FIELDS, "position", "change", "book")
_JOINED = -1


@dataclass(frozen=True)
class Source:
    """Where a value comes from: a field of a level (`depth` 0 is the message's root, -1 the entry of another group that is referred to).

    Attributes:
        field: as the decoder's generator takes it: offset in the block, type, null, map, decimals.
        leaf: what the schema says of it.
        guarded: an older version of the message may lack it: then it is null.
        exponent: of a decimal: a number, or another field.
        digits: of a decimal: decimals of the result.
    """

    depth: int
    field: Field
    leaf: Leaf
    guarded: bool
    exponent: int | Source | None = None
    digits: int = 0


@dataclass(frozen=True)
class Text:
    """A symbol: a character field, or variable-length data of a level.

    Attributes:
        since: the version of the message from which on the level has the field, which is `guarded` then: before it there is no symbol.
    """

    depth: int
    field: Field | None
    data: Data | None
    since: int = 0
    guarded: bool = False


@dataclass(frozen=True)
class Condition:
    """A field has one of the values, or (`null` set) is null or is not."""

    source: Source
    values: tuple[int, ...] = ()
    null: bool | None = None


@dataclass(frozen=True)
class FlagTest:
    """Sets `flag` where ``(source & bits) == equals`` (negated if not `wanted`)."""

    flag: int
    source: Source
    bits: int
    equals: int
    wanted: bool


@dataclass(frozen=True)
class SbeCase:
    """An event made of a message's root, or of every entry of the group at `path`."""

    name: str
    kind: str
    path: tuple[str, ...]
    when: tuple[Condition, ...]
    values: Mapping[str, Source | int]
    flags: int
    tests: tuple[FlagTest, ...]
    whole: bool
    go_on: bool
    code: Source | None
    symbol: Text | None
    stamp: Source | None
    joined: tuple[str, Source] | None


@dataclass(frozen=True)
class Template:
    """A message of the schema and its events."""

    message: Message
    cases: tuple[SbeCase, ...]


@dataclass(frozen=True, kw_only=True)
class SbeSpec(Spec):
    """A checked mapping of a schema.

    Attributes:
        levels: of a ladder; 0: no mapping goes by position.
        processed: by template id, the root's field that says up to which packet of the feed a snapshot goes; empty: there is no recovery.
        reports: by template id, the root's field that says how many snapshots a turn of their loop has.
    """

    schema: Schema
    templates: tuple[Template, ...]
    levels: int
    framing: str | None
    processed: Mapping[int, Field]
    reports: Mapping[int, Field]

    @property
    def counters(self) -> list[str]:
        return [message.name for message in self.ordered]

    @property
    def ordered(self) -> list[Message]:
        """All messages of the schema, those with events first."""
        mapped = [template.message for template in self.templates]
        return mapped + [message for message in self.schema.messages if message not in mapped]

    @property
    def code_bytes(self) -> int:
        return 8 if self.code else 0

    @property
    def ladder_levels(self) -> int:
        """Levels that a ladder has room for."""
        return self.levels

    @property
    def defines(self) -> bool:
        """Whether some message defines instruments."""
        return any(case.kind == "reference" for template in self.templates for case in template.cases)


# ---------------------------------------------------------------- which mapping, which schema


def load_sbe(name: str | Path) -> SbeSpec:
    """Read and check a mapping and its schema.

    Args:
        name: a mapping file (.toml) that names its schema; ``MAPPING:FILE.xml``, a shipped mapping for the venue's schema; or
            ``sbe:FILE.xml``, the shipped mapping made for schemas of that package.

    Raises:
        SpecError: with every fault of the mapping.
        SchemaError: with every fault of the schema.
    """
    text = str(name)
    if text.endswith(".xml") and ":" in text:
        mapping, _, file = text.partition(":")
        schema = load_schema(file)
        chosen = _made_for(schema) if mapping == "sbe" else SHIPPED / f"{mapping}.toml"
        return _read(chosen, schema)
    return _read(Path(name), None)


def _shipped() -> dict[str, str]:
    """Shipped mappings and the package that each is made for; the usual one of a package first."""
    found = {}
    for path in sorted(SHIPPED.glob("*.toml"), key=lambda p: (len(p.stem), p.stem)):
        head = tomllib.loads(path.read_text(encoding="utf-8")).get("protocol", {})
        if "package" in head:
            found[path.stem] = head["package"]
    return found


def _made_for(schema: Schema) -> Path:
    for name, package in _shipped().items():
        if package == schema.package:
            return SHIPPED / f"{name}.toml"
    known = ", ".join(f"{name} ({package})" for name, package in _shipped().items())
    reason = f"no shipped mapping is for package {schema.package!r}; there are: {known}. Write one: docs/howto/read-sbe.md"
    raise SpecError([Problem(schema.path, 1, "package", reason)])


def _read(path: Path, schema: Schema | None) -> SbeSpec:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(_shipped())
        what = f"name a mapping file (.toml), or sbe:FILE.xml, or one of {known} with :FILE.xml"
        reason = f"cannot be read ({error.__class__.__name__}); {what}"
        raise SpecError([Problem(str(path), 0, "mapping", reason)]) from error
    doc = _Document(path, text)
    if schema is None:
        given = doc.root.get("protocol", {}).get("schema")
        if not isinstance(given, str):
            doc.fault(("protocol", "schema"), "is missing: the path of the venue's SBE schema; or use this mapping as NAME:FILE.xml")
            doc.done()
        schema = load_schema(path.parent / str(given))
    return _MappingReader(doc, schema).spec()


_TOP = ("protocol", "timestamp", "instrument", "recovery", "maps", "fields", "messages")
_HEAD = ("name", "title", "schema", "package", "framing", "order_ids", "tick_size", "qty_exponent", "levels")
_EVENT_KEYS = ("kind", "name", "group", "when", "flags", "flag_if", "instrument", "go_on", "of", *_TARGETS)


class _MappingReader:
    """Checks a mapping against its schema."""

    def __init__(self, doc: _Document, schema: Schema) -> None:
        self.doc, self.schema = doc, schema
        root = doc.root
        doc.only(root, (), _TOP)
        self.head = doc.table(root, ("protocol",), _HEAD, required=True)
        self.time = doc.table(root, ("timestamp",), ("field", "unit", "since"))
        self.instrument = doc.table(root, ("instrument",), ("code", "symbol"))
        self.recovery = doc.table(root, ("recovery",), ("processed", "reports"))
        self.maps = doc.table(root, ("maps",))
        self.extras = doc.table(root, ("fields",))
        for name, table in self.extras.items():
            doc.only(table if isinstance(table, dict) else {}, ("fields", name), ("map", "decimals", "null"))
        self.qty_exponent = doc.number(self.head, ("protocol", "qty_exponent"), -9, 18, 0)
        self.levels = doc.number(self.head, ("protocol", "levels"), 1, DEPTH_MAX, 10)

    def spec(self) -> SbeSpec:
        doc, head = self.doc, self.head
        package = head.get("package")
        if package is not None and package != self.schema.package:
            other = f"{self.schema.path} is {self.schema.package!r}"
            doc.fault(("protocol", "package"), f"this mapping is for schemas of package {package!r}; {other}")
        templates = self._templates()
        cases = [case for template in templates for case in template.cases]
        laddered = any("change" in case.values or case.kind == "depth" for case in cases)
        spec = SbeSpec(
            name=doc.name(head, ("protocol", "name")),
            title=doc.title(head, ("protocol", "title"), str(head.get("name", ""))),
            path=str(doc.path),
            type_field=Field("templateId", 0, "u16", 2, False, self.schema.big),
            order_ids=doc.text(head, ("protocol", "order_ids"), ("random", "sequential"), "random"),
            tick_size=_tick_size(doc, head),
            qty_exponent=self.qty_exponent,
            timestamp="time" if any(case.stamp for case in cases) else None,
            timestamp_unit_ns=UNITS_NS[doc.text(self.time, ("timestamp", "unit"), tuple(UNITS_NS), "ns")],
            timestamp_since=doc.text(self.time, ("timestamp", "since"), ("epoch", "midnight"), "epoch"),
            received=None,
            code="code" if any(case.code for case in cases) else None,
            symbol="symbol" if any(case.symbol for case in cases) else None,
            messages=(),
            schema=self.schema,
            templates=tuple(templates),
            levels=self.levels if laddered else 0,
            framing=head.get("framing"),
            processed=self._of_snapshots(templates, "processed") if self.recovery else {},
            reports=self._of_snapshots(templates, "reports") if "reports" in self.recovery else {},
        )
        doc.done()
        return spec

    def _of_snapshots(self, templates: Sequence[Template], key: str) -> dict[int, Field]:
        """Where the snapshots among the messages say what a key of ``[recovery]`` is about."""
        name, found = self.doc.text(self.recovery, ("recovery", key)), {}
        for template in templates:
            leaf = next((one for one in leaves(template.message) if one.path == name), None)
            field = leaf_field(leaf, self.schema.big) if leaf and template.cases and leaf.constant is None else None
            if field is not None and not field.text and not field.signed:
                found[template.message.id] = field
        if not found:
            self.doc.fault(("recovery", key), f"no message that is mapped has an unsigned field {name!r} in its root")
        return found

    def _templates(self) -> list[Template]:
        tables = self.doc.table(self.doc.root, ("messages",), required=True)
        found: list[Template] = []
        for key in tables:
            where = ("messages", key)
            table = self.doc.table(tables, where, ("template", "optional", "event"))
            for message in self._named(where, table, key):
                if any(template.message is message for template in found):
                    self.doc.fault(where, f"{message.name} is mapped already")
                    continue
                found.append(Template(message, self._cases(where, table, message)))
        if not found and not self.doc.problems:
            self.doc.fault(("messages",), f"the schema {self.schema.path} has none of these messages")
        return found

    def _named(self, where: tuple[str, ...], table: Mapping[str, Any], key: str) -> list[Message]:
        """The schema's messages that a mapping is for: by their names, or by patterns with ``*``."""
        raw = table.get("template", key)
        found: list[Message] = []
        for pattern in raw if isinstance(raw, list) else [raw]:
            matching = [message for message in self.schema.messages if fnmatch.fnmatchcase(message.name, str(pattern))]
            if not matching and not self.doc.truth(table, (*where, "optional"), False):
                names = ", ".join(message.name for message in self.schema.messages[:40])
                reason = f"the schema has no message {pattern!r} (say optional = true if it may lack it); it has {names}"
                self.doc.fault((*where, "template"), reason)
            found += [message for message in matching if message not in found]
        return found

    def _cases(self, where: tuple[str, ...], table: Mapping[str, Any], message: Message) -> tuple[SbeCase, ...]:
        listed = table.get("event", [])
        numbered = isinstance(listed, list)
        cases: list[SbeCase] = []
        for number, raw in enumerate(listed if numbered else [listed]):
            at = (*where, "event", str(number)) if numbered else (*where, "event")
            if not isinstance(raw, dict):
                self.doc.fault(at, "must be a table with a `kind`")
                continue
            case = _CaseReader(self, at, raw, message).case()
            if case:
                others = [one.joined for one in cases if one.path == case.path and one.joined]
                if case.joined and others and case.joined != others[0]:
                    self.doc.fault((*at, "of"), f"{message.name}: events of one group refer to one other group, by one number")
                cases.append(case)
        return tuple(cases)


def _level_at(message: Message, path: Sequence[str]) -> list[Level] | None:
    """The message and the groups down a path; None if there is no such group."""
    chain: list[Level] = [message]
    for name in path:
        found = next((group for group in chain[-1].groups if group.name == name), None)
        if found is None:
            return None
        chain.append(found)
    return chain


class _CaseReader:
    """Checks one event of a mapping."""

    def __init__(self, reader: _MappingReader, key: tuple[str, ...], raw: Mapping[str, Any], message: Message) -> None:
        self.reader, self.doc, self.key, self.raw, self.message = reader, reader.doc, key, raw, message
        self.big = reader.schema.big
        self.chain: list[Level] = [message]
        self.other: Level | None = None

    def fault(self, key: str, reason: str) -> None:
        self.doc.fault((*self.key, key), f"{self.message.name}: {reason}")

    def case(self) -> SbeCase | None:
        raw, doc = self.raw, self.doc
        doc.only(raw, self.key, _EVENT_KEYS)
        path = tuple(str(raw.get("group", "")).split(".")) if raw.get("group") else ()
        chain = _level_at(self.message, path)
        if chain is None:
            known = ", ".join(group.name for group in self.message.groups) or "none"
            self.fault("group", f"has no group {raw.get('group')!r}; groups: {known}")
            return None
        self.chain = chain
        needs = {**REQUIRED, **MORE_KINDS}
        kind = doc.text(raw, (*self.key, "kind"), tuple(k for k in needs if k != "time"))
        joined = self._joined()
        values = {name: value for name in _TARGETS if name in raw and (value := self._value(name, raw[name])) is not None}
        for name in needs[kind]:
            if name not in raw:
                self.fault(name, f"is missing: an event of kind {kind!r} needs {', '.join(needs[kind])}")
        if "tick_size" in raw and kind != "reference":
            self.fault("tick_size", TICK_OF_REFERENCE)
        if ("change" in raw) != ("position" in raw) or ("change" in raw and kind != "level"):
            self.fault("change", "goes with `position`, in an event of kind 'level'")
        return self._complete(kind, path, values, joined)

    def _complete(self, kind: str, path: tuple[str, ...], values: dict[str, Source | int], joined: tuple[str, Source] | None) -> SbeCase:
        code, symbol = self._first(self.reader.instrument.get("code")), self._symbol()
        whole = self.doc.text(self.raw, (*self.key, "instrument"), ("own", "all"), "own") == "all"
        known = code is not None or symbol is not None
        if (kind in OF_INSTRUMENT or kind in MORE_KINDS) and (whole or not known):
            self.fault("kind", f"an event of kind {kind!r} needs an instrument: nothing that [instrument] names is in reach")
        if kind == "reference" and symbol is None:
            self.fault("kind", "an event of kind 'reference' needs the symbol of [instrument] in reach")
        if "book" in values and code is None:
            self.fault("book", "needs instruments by `code`")
        flags, tests = self._flags()
        if kind == "execute" and "price" in values:
            flags |= int(Flag.PRICED)
        return SbeCase(
            str(self.raw.get("name", kind)), kind, path, self._when(), values, flags, tests, whole or not known,
            self.doc.truth(self.raw, (*self.key, "go_on"), False), code, symbol, self._first(self.reader.time.get("field")), joined,
        )  # fmt: skip

    # ---- names

    def place(self, name: str) -> tuple[int, Level, Leaf | Composite, int, int] | None:
        """Where a name is found, innermost level first: ``(depth, level, leaf or composite, offset, since)``."""
        levels = list(enumerate(self.chain))[::-1]
        if self.other is not None:
            levels.insert(1, (_JOINED, self.other))
        for depth, level in levels:
            found = _part(level, name)
            if found is not None:
                return (depth, level, *found)
        return None

    def source(self, key: str, name: str, options: Mapping[str, Any] | None = None) -> Source | None:
        """The source of that name, with what ``[fields]`` and `options` add to it; a fault if there is none."""
        found = self.place(name)
        if found is None:
            known = ", ".join(leaf.path for level in reversed(self.chain) for leaf in leaves(level))
            self.fault(key, f"there is no field {name!r} here; fields: {known}")
            return None
        depth, level, part, offset, since = found
        extra = {**self.reader.extras.get(name, {}), **(options or {})}
        if isinstance(part, Leaf):
            return self._plain(key, name, depth, level, part, extra)
        return self._decimal(key, name, depth, level, part, offset, since, extra)

    def _plain(self, key: str, name: str, depth: int, level: Level, leaf: Leaf, extra: Mapping[str, Any]) -> Source | None:
        if leaf.primitive.is_float:
            self.fault(key, f"field {name!r} is a {leaf.primitive.name}: prices and quantities must be exact, so floats are not taken")
            return None
        field = leaf_field(leaf, self.big)
        if field is None:
            self.fault(key, f"field {name!r} is an array of {leaf.primitive.name}, which no event field holds")
            return None
        if "decimals" in extra:
            field = dataclasses.replace(field, decimals=self.doc.number(extra, (*self.key, key, "decimals"), 0, PRICE_DECIMALS))
        if "null" in extra:
            null = self.raw_of(leaf, extra["null"])
            if null is None:
                self.fault(key, f"null: {extra['null']!r} is not a value of {leaf.path}")
            field = dataclasses.replace(field, null=null)
        if "map" in extra:
            mapped, default = self._map(key, extra["map"], leaf)
            field = dataclasses.replace(field, map=mapped, map_default=default)
            if field.size == 1:  # a table is looked up by the byte
                field = dataclasses.replace(field, type="u8", signed=False)
        return Source(depth, field, leaf, leaf.since > level.since)

    def _decimal(
        self, key: str, name: str, depth: int, level: Level, part: Composite, offset: int, since: int, extra: Mapping[str, Any]
    ) -> Source | None:  # fmt: skip
        """A composite stands for its only value, or for the decimal that its mantissa and exponent make."""
        every = {leaf.path: leaf for leaf in leaves(_alone(name, part, offset, since))}
        inside = [leaf for leaf in every.values() if leaf.constant is None]
        mantissa, exponent = every.get(f"{name}.mantissa"), every.get(f"{name}.exponent")
        optional = self._is_optional(level, name)
        if mantissa is None or exponent is None:
            if len(inside) == 1:
                return self._plain(key, name, depth, level, _nullable(inside[0], optional), extra)
            parts = ", ".join(leaf.path for leaf in inside)
            self.fault(key, f"{name!r} is a composite: name one of its parts, {parts}")
            return None
        found = self._plain(key, name, depth, level, _nullable(mantissa, optional), {})
        if found is None or exponent.constant is not None:
            fixed = exponent.constant
            return found and dataclasses.replace(found, exponent=fixed if isinstance(fixed, int) else 0)
        return dataclasses.replace(found, exponent=self._plain(key, name, depth, level, exponent, {}))

    def _is_optional(self, level: Level, name: str) -> bool:
        outer = level.field(name.partition(".")[0])
        return outer is not None and outer.presence == "optional"

    def _first(self, names: Any) -> Source | None:
        """The first of some names that is in reach, as a number."""
        for name in names if isinstance(names, list) else [names] if names else []:
            if self.place(str(name)):
                return self.source("instrument", str(name))
        return None

    def _symbol(self) -> Text | None:
        names = self.reader.instrument.get("symbol")
        for name in names if isinstance(names, list) else [names] if names else []:
            for depth, level in list(enumerate(self.chain))[::-1]:
                data = next((one for one in level.data if one.name == name), None)
                if data:
                    return Text(depth, None, data)
                leaf = next((one for one in leaves(level) if one.path == name), None)
                if leaf:
                    return self._symbol_field(depth, str(name), leaf, level)
        return None

    def _symbol_field(self, depth: int, name: str, leaf: Leaf, level: Level) -> Text | None:
        field = leaf_field(leaf, self.big)
        uses_books = any("book" in one for one in _tables(self.doc.root.get("messages")))
        longest = SYMBOL_BYTES_MAX - (len(IMPLIED_SUFFIX) if uses_books else 0)
        if field is None or leaf.primitive.name not in ("char", "uint8") or field.size > longest or leaf.constant is not None:
            self.doc.fault(("instrument", "symbol"), f"{name!r} of {self.message.name} is not text of 1 to {longest} characters")
            return None
        return Text(depth, dataclasses.replace(field, type=f"alpha:{field.size}"), None, leaf.since, leaf.since > level.since)

    # ---- values

    def _value(self, target: str, raw: Any) -> Source | int | None:
        if isinstance(raw, bool):
            self.fault(target, "must be a field's name, a whole number or a table")
            return None
        if isinstance(raw, int):
            return self._allowed(target, raw)
        if isinstance(raw, dict) and set(raw) == {"constant"}:
            given = raw["constant"]
            value = WORDS[given] if isinstance(given, str) and given in WORDS else raw_value(given, 8)
            if value is None:
                self.fault(target, f"{raw['constant']!r} is not a value: a number, one character, or one of {', '.join(WORDS)}")
            return self._allowed(target, value)
        found: Source | None
        if isinstance(raw, str):
            found = self.source(target, raw)
        elif isinstance(raw, dict) and "mantissa" in raw:
            found = self._mantissa(target, raw)
        elif isinstance(raw, dict) and isinstance(raw.get("field"), str):
            self.doc.only(raw, (*self.key, target), ("field", "map", "decimals", "null"))
            found = self.source(target, raw["field"], {k: v for k, v in raw.items() if k != "field"})
        else:
            forms = "{ field = ..., map = ... }, { mantissa = ..., exponent = ... } or { constant = ... }"
            self.fault(target, f"must be a field's name, a number, {forms}")
            return None
        return self._fitting(target, found) if found else None

    def _allowed(self, target: str, value: int | None) -> int | None:
        if reason := not_allowed(str(self.raw.get("kind")), target, (value,), _ALLOWED):
            self.fault(target, reason)
        return value

    def _mantissa(self, target: str, raw: Mapping[str, Any]) -> Source | None:
        self.doc.only(raw, (*self.key, target), ("mantissa", "exponent"))
        mantissa = self.source(target, str(raw["mantissa"]))
        given = raw.get("exponent")
        exponent = given if isinstance(given, int) else self.source(target, str(given))
        return dataclasses.replace(mantissa, exponent=exponent) if mantissa and exponent is not None else None

    def _fitting(self, target: str, found: Source) -> Source | None:
        """The source as the event field needs it; a fault if it cannot be."""
        field = found.field
        if field.text and field.size > 8:
            self.fault(target, f"text of {field.size} bytes does not fit an event field of 8")
            return None
        if target in ("side", "change", "book") and field.map is None:
            self.fault(target, f"field {found.leaf.path!r} needs a map: {{ field = ..., map = ... }}")
        said = (*field.map.values(), field.map_default) if field.map else ()
        if reason := not_allowed(str(self.raw.get("kind")), target, said, _ALLOWED):
            self.fault(target, f"the map of field {found.leaf.path!r}: {reason}")
        if target in ("price", "tick_size") and found.exponent is None and field.decimals < 0 and field.map is None:
            self.fault(target, f"field {found.leaf.path!r} needs `decimals` or an exponent: a price is scaled to 1e-9")
        if found.exponent is None:
            return found
        is_price = target in ("price", "tick_size") or (target == "aux" and self.raw.get("kind") in ("quote", "imbalance"))
        digits = PRICE_DECIMALS if is_price else self.reader.qty_exponent
        if isinstance(found.exponent, int) and digits == PRICE_DECIMALS and -PRICE_DECIMALS <= found.exponent <= 0 and field.size > 1:
            return dataclasses.replace(found, field=dataclasses.replace(field, decimals=-found.exponent), exponent=None)
        return dataclasses.replace(found, digits=digits)

    def _map(self, key: str, raw: Any, leaf: Leaf) -> tuple[dict[int, int] | None, int | None]:
        table = self.reader.maps.get(raw) if isinstance(raw, str) else raw
        if not isinstance(table, dict) or not table:
            self.fault(key, f"there is no [maps.{raw}]" if isinstance(raw, str) else "map must be the name of a map, or a table")
            return None, None
        result, default = dict[int, int](), None
        for name, value in table.items():
            number = WORDS.get(value) if isinstance(value, str) else value
            if not isinstance(number, int) or isinstance(number, bool):
                self.fault(key, f"map: {value!r} is neither a whole number nor one of {', '.join(WORDS)}")
            elif name == "*":
                default = number
            elif (code := self.raw_of(leaf, name)) is not None:
                result[code & 0xFF if leaf.primitive.size == 1 and leaf.length == 1 else code] = number  # as the byte is looked up
            elif not isinstance(leaf.type, Enum):  # names of other enums may share a map
                self.fault(key, f"map: {name!r} is not a value of {leaf.path}")
        if not result:
            self.fault(key, f"map: none of {', '.join(table)} is a value of {leaf.path}")
            return None, None
        return result, default

    def raw_of(self, leaf: Leaf, value: Any) -> int | None:
        """A value as a mapping writes it: a name of the enum, ``null``, a character or a number."""
        if isinstance(leaf.type, Enum) and value in leaf.type.values:
            return leaf.type.values[value]
        if leaf.length != 1 and isinstance(value, str):
            longest = leaf.length if leaf.length <= 8 else 7  # of a longer text the first eight characters are compared
            return int.from_bytes(value.encode(), "little") if 0 < len(value) <= longest and value.isascii() else None
        if value == "null":
            null = leaf.type.null if isinstance(leaf.type, Enum) else leaf.null
            return int(null) if null is not None else None
        if leaf.primitive.signed and isinstance(value, int) and not isinstance(value, bool):
            return value if -(1 << (8 * leaf.primitive.size - 1)) <= value < 1 << (8 * leaf.primitive.size - 1) else None
        return raw_value(value, leaf.primitive.size)

    def _when(self) -> tuple[Condition, ...]:
        result = []
        for name, wanted in self.doc.table(self.raw, (*self.key, "when")).items():
            found = self.source("when", name)
            if found is None:
                continue
            if isinstance(wanted, dict):
                if set(wanted) != {"null"} or not isinstance(wanted["null"], bool):
                    self.fault("when", f"{name}: a table says {{ null = true }} or {{ null = false }}")
                    continue
                result.append(Condition(found, (), wanted["null"]))
                continue
            codes = [self.raw_of(found.leaf, value) for value in (wanted if isinstance(wanted, list) else [wanted])]
            if not codes or None in codes:
                self.fault("when", f"{wanted!r} is not a value of {name}{_enum_names(found.leaf)}")
                continue
            result.append(Condition(found, tuple(code for code in codes if code is not None)))
        return tuple(result)

    def _joined(self) -> tuple[str, Source] | None:
        """``of``: the entry of another group that this one refers to by its number, from 1."""
        raw = self.raw.get("of")
        if raw is None:
            return None
        if not isinstance(raw, dict) or set(raw) != {"group", "number"} or len(self.chain) != 2:
            self.fault("of", "must be { group = ..., number = ... }, in an event of a group of the message itself")
            return None
        groups = [group.name for group in self.message.groups]
        group = next((one for one in self.message.groups if one.name == raw["group"]), None)
        if group is None or not group.flat or groups.index(group.name) >= groups.index(self.chain[1].name):
            self.fault("of", f"{raw['group']!r} is not a group before {self.chain[1].name} that has neither groups nor data")
            return None
        number = self.source("of", str(raw["number"]))
        self.other = group
        return (group.name, number) if number else None

    def _flags(self) -> tuple[int, tuple[FlagTest, ...]]:
        names = tuple(flag.name for flag in Flag if flag.name)
        constant, tests = 0, []
        listed = self.raw.get("flags", [])
        for name in listed if isinstance(listed, list) else [listed]:
            if name in names:
                constant |= int(Flag[name])
            else:
                self.fault("flags", f"{name!r} is not one of {', '.join(names)}")
        for rule in self.raw.get("flag_if", []):
            found = self.source("flag_if", str(rule.get("field"))) if isinstance(rule, dict) else None
            if found is None or rule.get("flag") not in names or ("equals" in rule) == ("bits" in rule) or found.field.size > 4:
                self.fault("flag_if", "needs a flag, a field of at most 4 bytes, and either `equals` or `bits` (with `set`)")
                continue
            value = self._bits(found.leaf, rule["bits"]) if "bits" in rule else self.raw_of(found.leaf, rule["equals"])
            value = None if value is None else value & ((1 << (8 * found.field.size)) - 1)
            if value is None:
                self.fault("flag_if", f"{rule.get('bits', rule.get('equals'))!r} is not a value of {found.leaf.path}")
                continue
            full = (1 << (8 * found.field.size)) - 1
            bits, wanted = (value, bool(rule.get("set", True))) if "bits" in rule else (full, True)
            tests.append(FlagTest(int(Flag[rule["flag"]]), found, bits, value, wanted))
        return constant, tuple(tests)

    def _bits(self, leaf: Leaf, raw: Any) -> int | None:
        if isinstance(leaf.type, Set) and raw in leaf.type.choices:
            return 1 << leaf.type.choices[raw]
        return raw_value(raw, leaf.primitive.size)


def _tables(tables: Any) -> Iterable[Mapping[str, Any]]:
    """All event tables of a mapping."""
    for table in tables.values() if isinstance(tables, dict) else ():
        listed = table.get("event", []) if isinstance(table, dict) else []
        yield from (one for one in (listed if isinstance(listed, list) else [listed]) if isinstance(one, dict))


def _enum_names(leaf: Leaf) -> str:
    return f": {', '.join(leaf.type.values)}" if isinstance(leaf.type, Enum) else ""


def _part(level: Level, name: str) -> tuple[Leaf | Composite, int, int] | None:
    """A field of a block by its dotted path: a leaf, or a composite with its offset and version."""
    leaf = next((one for one in leaves(level) if one.path == name), None)
    if leaf:
        return leaf, leaf.offset, leaf.since
    first, *rest = name.split(".")
    field = level.field(first)
    if field is None or not isinstance(field.type, Composite):
        return None
    part, offset, since = field.type, field.offset, field.since
    for step in rest:
        member = part.member(step)
        if member is None or not isinstance(member.type, Composite):
            return None
        part, offset, since = member.type, offset + member.offset, max(since, member.since)
    return part, offset, since


def _alone(name: str, part: Composite, offset: int, since: int) -> Level:
    """A block of one composite, at its place."""
    field = SchemaField(name, 0, part, offset, "required", since)
    return Level("", 0, 0, (field,), (), (), 0, None, 0)


def _nullable(leaf: Leaf, optional: bool) -> Leaf:
    """The leaf, with its type's own null if the field around it is optional."""
    if not optional or leaf.null is not None or leaf.constant is not None or not isinstance(leaf.type, Encoding):
        return leaf
    null = leaf.type.primitive.null if leaf.type.null is None else leaf.type.null
    return dataclasses.replace(leaf, null=null)


_CODES = {"char": "char", **{f"uint{8 * n}": f"u{8 * n}" for n in (1, 2, 4, 8)}, **{f"int{8 * n}": f"i{8 * n}" for n in (1, 2, 4, 8)}}


def leaf_field(leaf: Leaf, big: bool) -> Field | None:
    """A value of a block as the decoder's generator takes it; None for arrays that are not text."""
    primitive = leaf.primitive
    null = int(leaf.null) if isinstance(leaf.null, int) else None
    if leaf.length != 1:
        if primitive.name not in ("char", "uint8") or not leaf.length:
            return None
        return Field(leaf.path, leaf.offset, f"alpha:{leaf.length}", leaf.length, False, False)
    return Field(leaf.path, leaf.offset, _CODES.get(primitive.name, "u8"), primitive.size, primitive.signed, big, -1, null)


# ---------------------------------------------------------------- a source's own mapping


def select_sbe(spec: SbeSpec, fields: Mapping[str, str] | Sequence[str], messages: Iterable[str]) -> SbeSpec:
    """The mapping as a source wants it: see :func:`tickmesh.node.decoder.load_decoder`.

    Raises:
        MappingError: it names a message or an event field that the mapping does not give.
    """
    wanted = set(messages)
    known = [message.name for message in spec.schema.messages]
    problems = [f"messages: {spec.name} has no message {name!r}; it has {', '.join(known)}" for name in sorted(wanted - set(known))]
    if isinstance(fields, Mapping):
        problems += [f"fields.{name}: fields of {spec.name} are mapped in {spec.path}; change the event there" for name in fields]
    else:
        given = {name for template in spec.templates for case in template.cases for name in case.values}
        always = {"symbol", "instrument", "timestamp", "ts_event", "ts_recv", "seq", "kind", "flags", "volume", "size", "quantity"}
        problems += [f"fields: {spec.name} gives no {name!r}; it gives {', '.join(sorted(given | always))}" for name in fields
                     if name not in given | always]  # fmt: skip
    if problems:
        raise MappingError(problems)
    kept = tuple(
        template if not wanted or template.message.name in wanted else _counted_only(template) for template in spec.templates
    )  # fmt: skip
    return dataclasses.replace(spec, templates=kept)


def _counted_only(template: Template) -> Template:
    """The message without events, but for what others need: directories and depths."""
    return dataclasses.replace(template, cases=tuple(case for case in template.cases if case.kind in OF_DEFINITIONS))


def definition_part(template: Template) -> Template:
    """The message with what defines instruments only, if anything does: other events are nothing, in the same places of their groups."""
    if not any(case.kind in OF_DEFINITIONS for case in template.cases):
        return dataclasses.replace(template, cases=())
    cases = [
        case if case.kind in (*OF_DEFINITIONS, "nothing") else dataclasses.replace(case, kind="nothing", values={}, tests=())
        for case in template.cases
    ]
    return dataclasses.replace(template, cases=tuple(cases))
