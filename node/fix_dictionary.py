"""FIX dictionaries: which fields, messages, components and repeating groups a version has, read from QuickFIX's XML format.

:func:`load_dictionary` reads a file (FIX 4.0 to 4.4; FIX 5.0 and later with the session's own FIXT 1.1 beside it) and checks it as a whole.
Components are put in where they are used, so that a message is fields and groups only. :meth:`Dictionary.check` judges a received
message as a session does (SessionRejectReason, tag 373).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

FILE_BYTES_MAX = 64 << 20
DEPTH_MAX = 64
"""Most components and groups inside each other; FIX 5.0 SP2 has 20."""
TAG_MAX = 9_999_999

_INTEGERS = frozenset({"INT", "LENGTH", "SEQNUM", "NUMINGROUP", "TAGNUM", "DAYOFMONTH"})
_DECIMALS = frozenset({"FLOAT", "QTY", "PRICE", "PRICEOFFSET", "AMT", "PERCENTAGE", "QUANTITY"})
_DATA = frozenset({"DATA", "XMLDATA"})
_SHAPES = {
    **dict.fromkeys(_INTEGERS, re.compile(r"-?\d+")), **dict.fromkeys(_DECIMALS, re.compile(r"-?(\d+\.?\d*|\.\d+)")),
    "CHAR": re.compile(r"[^\x01]"), "BOOLEAN": re.compile(r"[YN]"),
    "UTCTIMESTAMP": re.compile(r"\d{8}-([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d{1,12})?"),
    "UTCTIMEONLY": re.compile(r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d{1,12})?"),
    "UTCDATEONLY": re.compile(r"\d{4}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])"), "UTCDATE": re.compile(r"\d{8}"),
    "LOCALMKTDATE": re.compile(r"\d{4}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])"), "MONTHYEAR": re.compile(r"\d{6}(\d\d|w[1-5])?"),
}  # fmt: skip
"""What a value of a type looks like; types that are not here are text."""
_LISTS = frozenset({"MULTIPLEVALUESTRING", "MULTIPLESTRINGVALUE", "MULTIPLECHARVALUE"})


class DictionaryError(Exception):
    """A dictionary cannot be used.

    Attributes:
        path: the file.
        problems: everything that is wrong with it, one line each.
    """

    def __init__(self, path: Path, problems: Sequence[str]) -> None:
        super().__init__("\n".join(f"{path}: {problem}" for problem in problems))
        self.path, self.problems = path, list(problems)


class RejectReason(IntEnum):
    """SessionRejectReason (373)."""

    INVALID_TAG = 0
    REQUIRED_TAG_MISSING = 1
    TAG_NOT_DEFINED_FOR_MESSAGE = 2
    UNDEFINED_TAG = 3
    TAG_WITHOUT_VALUE = 4
    VALUE_INCORRECT = 5
    BAD_FORMAT = 6
    INVALID_MSG_TYPE = 11
    TAG_REPEATED = 13
    TAG_OUT_OF_ORDER = 14
    GROUP_OUT_OF_ORDER = 15
    GROUP_COUNT = 16


@dataclass(frozen=True)
class Rejection:
    """Why a message does not fit: `reason`, and the `tag` it is about (0: none)."""

    reason: RejectReason
    tag: int = 0


@dataclass(frozen=True)
class FieldDef:
    """A field: `type` in capitals as the file has it, `values` its enumeration (value -> description), empty if any value may stand."""

    tag: int
    name: str
    type: str
    values: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_data(self) -> bool:
        """Whether any byte may stand in it."""
        return self.type in _DATA

    def problem(self, value: bytes) -> RejectReason | None:
        """What is wrong with a value, if something is."""
        if not value:
            return RejectReason.TAG_WITHOUT_VALUE
        if self.is_data:
            return None
        text = value.decode("latin-1")
        shape = _SHAPES.get(self.type)
        if shape and not shape.fullmatch(text):
            return RejectReason.BAD_FORMAT
        words = text.split(" ") if self.type in _LISTS else [text]
        if self.values and self.type != "NUMINGROUP" and any(word not in self.values for word in words):
            return RejectReason.VALUE_INCORRECT
        return None


@dataclass(frozen=True)
class Use:
    """A field in a message, or, with `members`, a repeating group that this field counts.

    Attributes:
        members: fields and groups of an entry, in order; the first delimits entries.
    """

    field: FieldDef
    required: bool
    members: tuple[Use, ...] = ()

    @property
    def tag(self) -> int:
        """Tag of the field."""
        return self.field.tag

    @property
    def delimiter(self) -> int:
        """Tag that begins each entry of a group; 0: no group."""
        return self.members[0].tag if self.members else 0

    def tags(self) -> Iterator[int]:
        """Its own tag and, of a group, those inside, however deep."""
        yield self.tag
        for member in self.members:
            yield from member.tags()


@dataclass(frozen=True)
class MessageDef:
    """A message: its MsgType, and its body's fields and groups in order."""

    type: str
    name: str
    admin: bool
    members: tuple[Use, ...]

    def group(self, count_tag: int) -> Use | None:
        """The repeating group that a field counts, however deep."""
        return next((use for use in _walk(self.members) if use.tag == count_tag and use.members), None)


def _walk(members: Iterable[Use]) -> Iterator[Use]:
    for use in members:
        yield use
        yield from _walk(use.members)


@dataclass(frozen=True)
class Dictionary:
    """All of a version.

    Attributes:
        version: BeginString's value ("FIX.4.4", "FIXT.1.1").
        fields: by tag.
        messages: by MsgType.
        header, trailer: fields around every body.
        data_pairs: length field -> the data field that it announces.
    """

    version: str
    fields: Mapping[int, FieldDef]
    messages: Mapping[str, MessageDef]
    header: tuple[Use, ...]
    trailer: tuple[Use, ...]
    data_pairs: Mapping[int, int]

    def tag(self, name: str | int) -> int:
        """Tag of a field's name; a number or digits stand for themselves.

        Raises:
            KeyError: there is no such name.
        """
        if isinstance(name, int) or name.isdigit():
            return int(name)
        found = next((f.tag for f in self.fields.values() if f.name == name), None)
        if found is None:
            raise KeyError(name)
        return found

    def with_fields(self, custom: Iterable[FieldDef], messages: Iterable[str] = ()) -> Dictionary:
        """The dictionary with fields of the user's own, optional in the named messages (none: in all)."""
        added = tuple(custom)
        uses, wanted = tuple(Use(f, False) for f in added), set(messages)
        changed = {
            kind: replace(m, members=(*m.members, *uses)) if not wanted or kind in wanted else m for kind, m in self.messages.items()
        }
        return replace(self, fields={**self.fields, **{f.tag: f for f in added}}, messages=changed)

    def check(self, fields: Sequence[tuple[int, bytes]]) -> Rejection | None:
        """What a session would reject of a received message (all fields from 8 to 10), if anything."""
        return _Check(self, fields).run()


# ---------------------------------------------------------------- judging a message


class _Check:
    """One message against the dictionary; the first fault counts."""

    def __init__(self, dictionary: Dictionary, fields: Sequence[tuple[int, bytes]]) -> None:
        self.dictionary, self.fields, self.at = dictionary, fields, 0

    def run(self) -> Rejection | None:
        kind = next((value.decode("latin-1") for tag, value in self.fields[:3] if tag == 35), "")
        message = self.dictionary.messages.get(kind)
        if message is None:
            return Rejection(RejectReason.INVALID_MSG_TYPE, 35)
        seen: set[int] = set()
        for uses in (self.dictionary.header, message.members, self.dictionary.trailer):
            fault = self._part({use.tag: use for use in uses}, seen)
            if fault:
                return fault
        if self.at < len(self.fields):
            return self._misplaced(message, seen)
        for use in (*self.dictionary.header, *message.members, *self.dictionary.trailer):
            if use.required and use.tag not in seen:
                return Rejection(RejectReason.REQUIRED_TAG_MISSING, use.tag)
        return None

    def _part(self, uses: Mapping[int, Use], seen: set[int]) -> Rejection | None:
        """Take fields as long as they belong to this part."""
        while self.at < len(self.fields) and self.fields[self.at][0] in uses:
            tag, value = self.fields[self.at]
            if tag in seen:
                return Rejection(RejectReason.TAG_REPEATED, tag)
            seen.add(tag)
            fault = self._field(uses[tag], value)
            if fault:
                return fault
        return None

    def _field(self, use: Use, value: bytes) -> Rejection | None:
        wrong = use.field.problem(value)
        if wrong is not None:
            return Rejection(wrong, use.tag)
        self.at += 1
        return self._group(use, int(value)) if use.members else None

    def _group(self, use: Use, count: int) -> Rejection | None:
        entries = 0
        uses = {member.tag: member for member in use.members}
        while self.at < len(self.fields) and self.fields[self.at][0] == use.delimiter and entries <= count:
            entries += 1
            seen: set[int] = set()
            while self.at < len(self.fields):
                tag, value = self.fields[self.at]
                if tag not in uses or (tag == use.delimiter and seen):
                    break
                if tag in seen:
                    return Rejection(RejectReason.TAG_REPEATED, tag)
                seen.add(tag)
                fault = self._field(uses[tag], value)
                if fault:
                    return fault
            for member in use.members:
                if member.required and member.tag not in seen:
                    return Rejection(RejectReason.REQUIRED_TAG_MISSING, member.tag)
        if entries != count:
            inside = entries == 0 and self.at < len(self.fields) and self.fields[self.at][0] in uses
            return Rejection(RejectReason.GROUP_OUT_OF_ORDER if inside else RejectReason.GROUP_COUNT, use.tag)
        return None

    def _misplaced(self, message: MessageDef, seen: set[int]) -> Rejection:
        """Why the field at which the parts ended belongs to none of them."""
        tag, value = self.fields[self.at]
        known = self.dictionary.fields.get(tag)
        around = {use.tag for use in (*self.dictionary.header, *self.dictionary.trailer)}
        own = {t for use in message.members for t in use.tags()}
        if known is None:
            return Rejection(RejectReason.INVALID_TAG if tag < 1 or tag > TAG_MAX else RejectReason.UNDEFINED_TAG, tag)
        if tag in seen:
            return Rejection(RejectReason.TAG_REPEATED, tag)
        if not value:
            return Rejection(RejectReason.TAG_WITHOUT_VALUE, tag)
        return Rejection(RejectReason.TAG_OUT_OF_ORDER if tag in around | own else RejectReason.TAG_NOT_DEFINED_FOR_MESSAGE, tag)


# ---------------------------------------------------------------- reading


def load_dictionary(path: str | Path, session: str | Path | None = None) -> Dictionary:
    """Read a dictionary.

    Args:
        path: the file of the version ("FIX44.xml").
        session: for FIX 5.0 and later, the file of FIXT 1.1, which has the header, the trailer and the session's own messages.

    Raises:
        DictionaryError: with everything that is wrong with a file.
        OSError: a file cannot be read.
    """
    read = _Reader(Path(path)).read()
    if session is not None:
        base = _Reader(Path(session)).read()
        fields = {**base.fields, **read.fields}
        pairs = {**base.data_pairs, **read.data_pairs}
        return Dictionary(base.version, fields, {**base.messages, **read.messages}, base.header, base.trailer, pairs)
    if not any(use.tag == 35 for use in read.header):
        reason = "has no header of its own: FIX 5.0 and later need the session's file too, e.g. fix:FIX50SP2.xml+FIXT11.xml"
        raise DictionaryError(Path(path), [reason])
    return read


class _Reader:
    """Reads one file, collecting problems."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        self.fields: dict[str, FieldDef] = {}
        self.components: dict[str, Any] = {}
        self._flat: dict[str, tuple[Use, ...]] = {}
        self._too_deep = False

    def read(self) -> Dictionary:
        root = self._root()
        version = f"{root.get('type', 'FIX')}.{root.get('major')}.{root.get('minor')}"
        for element in root.findall("fields/field"):
            self._field(element)
        self._unique_tags()
        self.components = {element.get("name", ""): element for element in root.findall("components/component")}
        header, trailer = (self._members(root.find(name), name, 0) for name in ("header", "trailer"))
        messages = [self._message(element) for element in root.findall("messages/message")]
        if not messages:
            self.problems.append("has no messages")
        types = [message.type for message in messages]
        self.problems += [f"message {m.name}: its msgtype {m.type!r} is used twice" for m in messages if types.count(m.type) > 1]
        if self.problems:
            raise DictionaryError(self.path, self.problems)
        by_tag = {f.tag: f for f in self.fields.values()}
        pairs = dict(_data_pairs([header, trailer, *(m.members for m in messages)]))
        return Dictionary(version, by_tag, {m.type: m for m in messages}, header, trailer, pairs)

    def _root(self) -> Any:
        if self.path.stat().st_size > FILE_BYTES_MAX:
            raise DictionaryError(self.path, [f"is larger than {FILE_BYTES_MAX >> 20} MiB"])
        try:
            root = ElementTree.fromstring(self.path.read_bytes())
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise DictionaryError(self.path, [f"is not XML: {error}"]) from None
        if root.tag != "fix" or not (root.get("major") or "").isdigit() or not (root.get("minor") or "").isdigit():
            raise DictionaryError(self.path, ["is no QuickFIX dictionary: its root must be <fix type='FIX' major='4' minor='4'>"])
        return root

    def _field(self, element: Any) -> None:
        name, number = element.get("name") or "", element.get("number") or ""
        if not name or not number.isdigit() or not 0 < int(number) <= TAG_MAX:
            self.problems.append(f"field {name or '?'}: number {number!r} is no tag (1 to {TAG_MAX})")
            return
        if name in self.fields:
            self.problems.append(f"field {name}: is defined twice")
        values = {v.get("enum", ""): v.get("description", "") for v in element.findall("value") if v.get("group") != "true"}
        self.fields[name] = FieldDef(int(number), name, (element.get("type") or "STRING").upper(), values)

    def _unique_tags(self) -> None:
        seen: dict[int, str] = {}
        for f in self.fields.values():
            if f.tag in seen:
                self.problems.append(f"field {f.name}: has the tag {f.tag} of {seen[f.tag]}")
            seen[f.tag] = f.name

    def _message(self, element: Any) -> MessageDef:
        name, kind = element.get("name") or "?", element.get("msgtype") or ""
        if not kind:
            self.problems.append(f"message {name}: has no msgtype")
        return MessageDef(kind, name, element.get("msgcat") == "admin", self._members(element, f"message {name}", 0))

    def _members(self, element: Any, where: str, depth: int) -> tuple[Use, ...]:
        if depth > DEPTH_MAX:
            if not self._too_deep:
                shown = ", ".join(where.split(", ")[-4:])
                self.problems.append(f"… {shown}: components or groups lie more than {DEPTH_MAX} deep inside each other (a circle?)")
            self._too_deep = True
            return ()
        found: list[Use] = []
        for child in element if element is not None else ():
            name, required = child.get("name") or "?", child.get("required") == "Y"
            if child.tag == "component":
                inner = self._component(name, where, depth)
                found += inner if required else [replace(use, required=False) for use in inner]
            elif child.tag in ("field", "group"):
                use = self._use(child, name, required, where, depth)
                found += [use] if use else []
        once: dict[int, Use] = {}
        for use in found:
            once.setdefault(use.tag, use)
        return tuple(once.values())

    def _component(self, name: str, where: str, depth: int) -> tuple[Use, ...]:
        if name not in self.components:
            self.problems.append(f"{where}: there is no component {name!r}")
            return ()
        if name not in self._flat:
            problems = len(self.problems)
            found = self._members(self.components[name], f"{where}, component {name}", depth + 1)
            if len(self.problems) > problems:
                return found
            self._flat[name] = found
        return self._flat[name]

    def _use(self, child: Any, name: str, required: bool, where: str, depth: int) -> Use | None:
        known = self.fields.get(name)
        if known is None:
            self.problems.append(f"{where}: there is no field {name!r}")
            return None
        if child.tag == "field":
            return Use(known, required)
        members = self._members(child, f"{where}, group {name}", depth + 1)
        if not members and not self._too_deep:
            self.problems.append(f"{where}: group {name} has no field to begin an entry with")
        return Use(known, required, members)


def _data_pairs(bodies: Iterable[Sequence[Use]]) -> Iterator[tuple[int, int]]:
    """A data field belongs to the length field right before it."""
    todo, seen = list(bodies), set[int]()
    while todo:
        members = todo.pop()
        if id(members) in seen:  # components are shared by all that use them
            continue
        seen.add(id(members))
        todo += [use.members for use in members if use.members]
        for before, use in pairwise(members):
            if use.field.is_data and before.field.type in _INTEGERS:
                yield before.tag, use.tag
