"""The slow twin of everything SBE: decodes a message of a schema to Python values, and makes the events of a mapping from them.

Written from the specification and the how-to, sharing with the compiled code only what the schema reader and the mapping reader say.
"""

from __future__ import annotations

import struct
from typing import Any

from tickmesh.node.event import ALL_INSTRUMENTS, NO_PRICE, NO_SIDE, Flag, Kind
from tickmesh.node.protocol import KINDS
from tickmesh.node.sbe_kernels import Change
from tickmesh.node.sbe_mapping import SbeCase, SbeSpec, Source
from tickmesh.node.sbe_schema import Composite, Encoding, Enum, Level, Schema, leaves

_STRUCT = {"char": "B", "int8": "b", "uint8": "B", "int16": "h", "uint16": "H", "int32": "i", "uint32": "I", "int64": "q", "uint64": "Q",
           "float": "f", "double": "d"}  # fmt: skip


class Malformed(Exception):
    """The message is refused; the argument is the reason."""


def header(schema: Schema, raw: bytes) -> dict[str, int]:
    """The message header's parts by name."""
    return {member.name: _member(schema, raw, 0, member) for member in schema.header.members
            if isinstance(member.type, Encoding) and member.type.size}  # fmt: skip


def _member(schema: Schema, raw: bytes, at: int, member: Any) -> int:
    form = (">" if schema.big else "<") + _STRUCT[member.type.primitive.name]
    if at + member.offset + struct.calcsize(form) > len(raw):
        raise Malformed("bad_group")
    return int(struct.unpack_from(form, raw, at + member.offset)[0])


def decode(schema: Schema, raw: bytes) -> tuple[Level, dict[str, Any]]:
    """A message, header included, as its level and a tree: leaves by dotted path (raw numbers or bytes), groups as lists, data as bytes.

    Raises:
        Malformed: it is not a message of the schema, or cut short.
    """
    if len(raw) < schema.header.size:
        raise Malformed("bad_length")
    head = header(schema, raw)
    if head["schemaId"] != schema.id:
        raise Malformed("other_schema")
    if schema.header.size + head["blockLength"] > len(raw):
        raise Malformed("bad_length")
    level = next((message for message in schema.messages if message.id == head["templateId"]), None)
    if level is None:
        raise Malformed("unknown_message")
    tree, _ = _level(schema, raw, schema.header.size, head["blockLength"], level, head["version"])
    return level, tree


def _level(schema: Schema, raw: bytes, at: int, block: int, level: Level, version: int) -> tuple[dict[str, Any], int]:
    tree: dict[str, Any] = {"#block": block}
    for leaf in leaves(level):
        if leaf.constant is not None:
            if version >= leaf.since or leaf.since <= level.since:
                tree[leaf.path] = leaf.constant
            continue
        size = leaf.primitive.size * leaf.length
        if (leaf.since > level.since and version < leaf.since) or leaf.offset + size > block:
            continue
        piece = raw[at + leaf.offset : at + leaf.offset + size]
        if leaf.length != 1:
            tree[leaf.path] = piece
        else:
            tree[leaf.path] = struct.unpack((">" if schema.big else "<") + _STRUCT[leaf.primitive.name], piece)[0]
    at += block
    for group in level.groups:
        if group.since > level.since and version < group.since:
            tree[group.name] = []
            continue
        inner, count = _member(schema, raw, at, group.dimension.block), _member(schema, raw, at, group.dimension.count)
        at += group.dimension.size
        if count > len(raw) - at:
            raise Malformed("bad_group")
        entries = []
        for _ in range(count):
            if at + inner > len(raw):
                raise Malformed("bad_group")
            entry, at = _level(schema, raw, at, inner, group, version)
            entries.append(entry)
        tree[group.name] = entries
    for data in level.data:
        if data.since > level.since and version < data.since:
            tree[data.name] = b""
            continue
        length = _member(schema, raw, at, data.length)
        if at + data.size + length > len(raw):
            raise Malformed("bad_group")
        tree[data.name] = raw[at + data.size : at + data.size + length]
        at += data.size + length
    return tree, at


# ---------------------------------------------------------------- events


class Twin:
    """Events of messages by a mapping: rows of (kind, name of the instrument, side, flags, price, qty, id, aux)."""

    def __init__(self, spec: SbeSpec) -> None:
        self.spec = spec
        self.codes: dict[int, str] = {}
        self.announced: set[str] = set()
        self.ladders: dict[tuple[str, int], list[int | None]] = {}
        self.depths: dict[str, int] = {}
        self.malformed: dict[str, int] = {}
        self.ticks: dict[str, int] = {}
        self.numbers: dict[str, int] = {}
        """The code that was last bound to a name."""
        self.known: dict[str, bool] = {}
        """Of books that were named late: whether what rests in them has been told since."""

    def refuse(self, reason: str) -> None:
        self.malformed[reason] = self.malformed.get(reason, 0) + 1

    def events(self, raw: bytes) -> list[list[Any]]:
        """The events of one message."""
        self.rows: list[list[Any]] = []
        try:
            level, tree = decode(self.spec.schema, raw)
        except Malformed as error:
            self.refuse("bad_length" if str(error) == "bad_group" and self._is_short(raw) else str(error))
            return []
        template = next((one for one in self.spec.templates if one.message.id == level.id), None)
        if template is None or not template.cases:
            return []
        if tree["#block"] < self._least(template.cases, ()):
            self.refuse("bad_length")
            return []
        if not self._blocks_suffice(template.cases, level, tree, ()):
            self.refuse("bad_group")
            return []
        self._scope(level, [tree], (), template.cases, tree)
        return self.rows

    def _is_short(self, raw: bytes) -> bool:
        """Whether the message's root lacks what the mapping reads of it: that is found before its groups are looked at."""
        head = header(self.spec.schema, raw)
        cases = [template.cases for template in self.spec.templates if template.message.id == head["templateId"]]
        return bool(cases) and head["blockLength"] < self._least(cases[0], ())

    def _least(self, cases: tuple[SbeCase, ...], path: tuple[str, ...]) -> int:
        """Bytes that a block must have for what the cases read of it."""
        ends = [0]
        for case in cases:
            read = [value for value in case.values.values() if isinstance(value, Source)]
            read += [value.exponent for value in read if isinstance(value.exponent, Source)]
            read += [one.source for one in (*case.when, *case.tests)] + [one for one in (case.code, case.stamp) if one]
            read += [case.joined[1]] if case.joined else []
            for source in read:
                where = (case.joined[0],) if source.depth < 0 and case.joined else case.path[: source.depth]
                if where == path and not source.guarded and source.leaf.constant is None:
                    ends.append(source.field.offset + source.field.size)
            if case.symbol and case.symbol.field and not case.symbol.guarded and case.path[: case.symbol.depth] == path:
                ends.append(case.symbol.field.offset + case.symbol.field.size)
        return max(ends)

    def _blocks_suffice(self, cases: tuple[SbeCase, ...], level: Level, tree: dict[str, Any], path: tuple[str, ...]) -> bool:
        for group in level.groups:
            least = self._least(cases, (*path, group.name))
            for entry in tree[group.name]:
                if entry["#block"] < least or not self._blocks_suffice(cases, group, entry, (*path, group.name)):
                    return False
        return True

    def _scope(self, level: Level, chain: list[dict[str, Any]], path: tuple[str, ...], cases: tuple[SbeCase, ...], root: Any) -> None:
        mine = [case for case in cases if case.path == path]
        over, hit = not mine, not mine
        for case in mine:
            joined = self._joined(case, chain, root)
            if over or joined is False or not all(self._fits(condition, chain, joined) for condition in case.when):
                continue
            over, hit = not case.go_on, True
            self._case(case, chain, joined)
        if not hit:
            self.refuse("bad_field")
        for group in level.groups:
            if any(case.path[: len(path) + 1] == (*path, group.name) for case in cases):
                for entry in chain[-1][group.name]:
                    self._scope(group, [*chain, entry], (*path, group.name), cases, root)

    def _joined(self, case: SbeCase, chain: list[dict[str, Any]], root: Any) -> Any:
        if not case.joined:
            return None
        group, number = case.joined
        at = self._raw(number, chain, None)
        return root[group][at - 1] if at is not None and 0 < at <= len(root[group]) else False

    def _raw(self, source: Source, chain: list[dict[str, Any]], joined: Any) -> Any:
        """The raw number of a field; None if it is null or not there."""
        level = joined if source.depth < 0 else chain[source.depth]
        value = level.get(source.field.name)
        if isinstance(value, bytes):
            return int.from_bytes(value[:8], "little")
        if source.leaf.constant is not None:
            return value
        return None if value is None or value == source.field.null else value

    def _fits(self, condition: Any, chain: list[dict[str, Any]], joined: Any) -> bool:
        value = self._raw(condition.source, chain, joined)
        if condition.null is not None:
            return (value is None) == condition.null
        level, field = joined if condition.source.depth < 0 else chain[condition.source.depth], condition.source.field
        if value is None:
            value = level.get(condition.source.field.name)  # a null may be asked for by its number
            kind = condition.source.leaf.type
            if value is None and condition.source.guarded:
                value = kind.null if isinstance(kind, Enum) else condition.source.field.null
                return value is not None and value in condition.values
        return value is not None and (value & 0xFF if field.size == 1 and not field.signed else value) in condition.values

    def _value(self, target: str, source: Source | int, chain: list[dict[str, Any]], joined: Any) -> int:
        if isinstance(source, int):
            return source
        level = joined if source.depth < 0 else chain[source.depth]
        raw, field = self._raw(source, chain, joined), source.field
        if field.map is not None:
            there = level.get(field.name, source.leaf.constant)
            if there is None:  # as if it said null
                kind, leaf_null = source.leaf.type, source.leaf.null
                there = kind.null if isinstance(kind, Enum) else kind.primitive.null if leaf_null is None else int(leaf_null)
            found = field.map.get(there & 0xFF if field.size == 1 else there, field.map_default)
            if found is None:
                raise Malformed("bad_field")
            return found
        decimal = field.decimals >= 0 or source.exponent is not None
        if raw is None:
            return NO_PRICE if field.decimals >= 0 or (source.exponent is not None and target in ("price", "tick_size")) else 0
        if not decimal:
            if target in ("qty", "price") and field.size == 8 and not field.signed and not field.text and raw >= 1 << 63:
                raise Malformed("bad_field")
            return int(raw)
        if source.exponent is None:
            value = raw * 10 ** (9 - field.decimals)
        else:
            exponent = source.exponent if isinstance(source.exponent, int) else self._raw(source.exponent, chain, joined)
            if exponent is None:
                raise Malformed("bad_field")
            shift = exponent + source.digits
            if raw and not -18 <= shift <= 18:
                raise Malformed("price_overflow")
            if shift < 0 and raw % 10**-shift:
                raise Malformed("price_overflow")
            value = raw * 10**shift if shift >= 0 else raw // 10**-shift
        if not -(1 << 63) < value < 1 << 63:
            raise Malformed("price_overflow")
        return value

    def _case(self, case: SbeCase, chain: list[dict[str, Any]], joined: Any) -> None:
        if case.kind == "nothing":
            return
        if case.code is not None and not case.whole and self._raw(case.code, chain, joined) is None:
            self.refuse("unknown_instrument")
            return
        try:
            values = {target: self._value(target, source, chain, joined) for target, source in case.values.items()}
        except Malformed as error:
            self.refuse(str(error))
            return
        flags = case.flags
        for test in case.tests:
            raw = self._raw(test.source, chain, joined)
            if raw is not None and ((raw & test.bits) == test.equals) == test.wanted:
                flags |= test.flag
        if case.whole:
            if case.kind == "clear":
                self.ladders.clear()
                self.known = dict.fromkeys(self.known, True)
                values.setdefault("aux", 1)
            self.rows.append(self._row(KINDS[case.kind], ALL_INSTRUMENTS, flags, values))
            return
        name = self._instrument(case, chain, values, joined)
        if name is None or case.kind == "reference":
            return
        self._event(case, name, flags, values)

    def _row(self, kind: int, name: Any, flags: int, values: dict[str, int]) -> list[Any]:
        get = values.get
        return [int(kind), name, get("side", NO_SIDE), flags, get("price", 0), get("qty", 0), get("id", 0) & ((1 << 64) - 1), get("aux", 0)]

    def _text(self, case: SbeCase, chain: list[dict[str, Any]]) -> str:
        assert case.symbol is not None
        text = case.symbol.field.name if case.symbol.field else case.symbol.data.name  # type: ignore[union-attr]
        raw = chain[case.symbol.depth].get(text, b"")
        if case.symbol.data and len(raw) > 24:
            return ""
        raw = raw.ljust(24, b"\0")
        words = [raw[:8], raw[8:16], raw[16:24]]
        for at in (2, 1, 0):  # trailing spaces are no part of a symbol
            words[at] = words[at].rstrip(b" ").ljust(8, b"\0")
            if words[at].strip(b"\0"):
                break
        return b"".join(words).rstrip(b"\0").decode("latin-1")

    def _instrument(self, case: SbeCase, chain: list[dict[str, Any]], values: dict[str, int], joined: Any) -> str | None:
        tick = values.get("tick_size", self.spec.tick_size)
        tick = tick if tick > 0 else self.spec.tick_size
        if case.code is None:
            name = self._text(case, chain)
            if not name or name.startswith("\0" * 8):
                self.refuse("unknown_instrument")
                return None
            return self._announce(name, tick if case.kind == "reference" else self.spec.tick_size)
        level = joined if case.code.depth < 0 else chain[case.code.depth]
        number = level[case.code.field.name] & ((1 << (8 * case.code.field.size)) - 1)
        if case.kind == "reference":
            name = self._text(case, chain)
            name = f"#{number}" if not name or name.startswith("\0" * 8) else name
            before, implied = self.codes.get(number), self.codes.pop(number | 1 << 62, None)
            self.codes[number] = name
            self.numbers[name] = number
            self._announce(name, tick)
            if before != name:
                self._rename([one for one in (before, implied) if one is not None], name)
            return name
        if values.get("book") == 1:
            if case.kind == "clear" and number | 1 << 62 not in self.codes:
                return None
            base, is_new = self.codes.get(number), number | 1 << 62 not in self.codes
            name = self.codes.setdefault(number | 1 << 62, f"{base or f'#{number}'}.I")
            self._announce(name, self.ticks.get(base or "", self.spec.tick_size))
            if is_new:
                self.numbers[name] = number | 1 << 62
            if is_new and self.spec.levels and name not in self.known and self.known.get(base or "") is False:
                self._lose(name)
            return name
        if number not in self.codes:
            self.codes[number] = f"#{number}"
            self.numbers[f"#{number}"] = number
        return self._announce(self.codes[number], self.spec.tick_size)

    def _rename(self, ended: list[str], name: str) -> None:
        """Books by position end, and one under another name begins, of which nobody has told what rests in it."""
        if not self.spec.levels:
            return
        rows = len(self.rows)
        for one in ended:
            sides = [self.ladders.pop((one, side), []) for side in (0, 1)]
            if any(price is not None for side in sides for price in side) or self.known.get(one) is False:
                self.known[one] = True
                self.rows.append([int(Kind.CLEAR), one, NO_SIDE, 0, 0, 0, 0, 0])
        if len(self.rows) > rows:
            self._lose(name)

    def _lose(self, name: str) -> None:
        self.known[name] = False
        self.rows.append([int(Kind.GAP), name, NO_SIDE, 0, 0, 0, 0, 0])

    def _announce(self, name: str, tick: int) -> str:
        if name not in self.announced:
            self.announced.add(name)
            self.ticks[name] = tick
            self.rows.append([int(Kind.REFERENCE), name, 0, 0, tick, 0, 0, 0])
        return name

    def _event(self, case: SbeCase, name: str, flags: int, values: dict[str, int]) -> None:
        if case.kind == "depth":
            if 0 < values["qty"] <= self.spec.levels and self.depths.get(name) != values["qty"]:
                self.depths[name] = values["qty"]
                self.rows.append([int(Kind.CODE), name, NO_SIDE, 0, 0, 0, self.numbers.get(name, 0), values["qty"]])
            return
        kind = int(Kind.GAP) if case.kind == "stale" else int(KINDS[case.kind])
        row = self._row(kind, name, flags, values)
        if kind == Kind.CLEAR:
            for side in (0, 1) if row[2] == NO_SIDE else (row[2],):
                self.ladders.pop((name, side), None)
            if row[2] == NO_SIDE and name in self.known:
                self.known[name] = True
        rows = self._ladder(name, row, values) if "change" in values else [row]
        for one in rows:
            before = self.rows[-1] if self.rows else None
            if before and before[1] == name and before[0] <= Kind.LEVEL and one[0] <= Kind.LEVEL:
                before[3] |= int(Flag.MORE)
            self.rows.append(one)

    def _ladder(self, name: str, row: list[Any], values: dict[str, int]) -> list[list[Any]]:
        levels = self.depths.get(name, self.spec.levels)
        change, at, side, price = Change(values["change"]), values["position"] - 1, row[2], row[4]
        ladder = self.ladders.setdefault((name, side), [None] * self.spec.levels)
        if side > 1 or (change != Change.REMOVE_ALL and not 0 <= at < levels):
            self.refuse("bad_field")
            return []
        gone = lambda p: [row[0], name, side, row[3], p, 0, row[6], 0]  # noqa: E731
        if change == Change.SET:
            before, ladder[at] = ladder[at], price
            return [gone(before), row] if before is not None and before != price else [row]
        if change == Change.INSERT:
            last = ladder[levels - 1]
            ladder[:levels] = [*ladder[:at], price, *ladder[at : levels - 1]]
            return [gone(last), row] if last is not None and last != price else [row]
        if change == Change.REMOVE:
            known = ladder[at]
            ladder[:levels] = [*ladder[:at], *ladder[at + 1 : levels], None]
            return [gone(price if known is None else known)]
        if change == Change.REMOVE_TO:
            removed = [p for p in ladder[: at + 1] if p is not None]
            ladder[:levels] = [*ladder[at + 1 : levels], *[None] * (at + 1)]
            return [gone(p) for p in removed]
        self.ladders[name, side] = [None] * self.spec.levels
        return [[int(Kind.CLEAR), name, side, row[3], 0, 0, row[6], 0]]


__all__ = ["Composite", "Malformed", "Twin", "decode", "header"]
