"""Which FIX field means what to a source: the tags of :mod:`tickmesh.node.fix_slots`, what a dictionary adds, and the source's own.

:func:`fix_tables` makes the tables that the compiled decoder (:mod:`tickmesh.node.fix_decoder`) reads. What is mapped without a word of
configuration is :data:`CLASSES`; a dictionary adds data fields, the delimiters of groups and what counts as an unknown tag; `fields` of a
source replaces tags by others, the venue's own too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tickmesh.control.config import FieldOptions, Refusal, Source
from tickmesh.node.fix_dictionary import Dictionary, DictionaryError, load_dictionary
from tickmesh.node.fix_frame import DATA_PAIRS
from tickmesh.node.fix_slots import (
    ADMIN,
    ASK,
    ASK_QTY,
    AUX,
    CLASSES,
    CODES,
    COUNT,
    DATA_LENGTH,
    DEFINITION,
    DEFINITIONS,
    EXECUTION,
    FREE,
    HEADER,
    ID,
    INCREMENTAL,
    KNOWN,
    MEMBER,
    OWN_SEQ,
    PRICE,
    QTY,
    QUOTE,
    ROLES,
    SECURITY_STATUS,
    SIDE,
    SKIP,
    SLOT_MASK,
    SNAPSHOT,
    SPECIAL,
    SYMBOL,
    TIME,
    TRADE_REPORT,
    FixTables,
    MessageClass,
)  # fmt: skip

SHIPPED = ("fix42", "fix44", "fix50", "fix")
"""Formats that need no dictionary; they differ in name only: what is mapped has the same tags in all versions."""

_EVENT_SLOTS = {
    "symbol": SYMBOL, "price": PRICE, "qty": QTY, "side": SIDE, "id": ID, "aux": AUX, "ts_event": TIME, "seq": OWN_SEQ,
    "bid": PRICE, "bid_qty": QTY, "ask": ASK, "ask_qty": ASK_QTY,
}  # fmt: skip
"""Event field -> the slot that its tag fills."""
_WHERE = {
    "symbol": (SNAPSHOT, INCREMENTAL, EXECUTION, SECURITY_STATUS, DEFINITION, DEFINITIONS, QUOTE, TRADE_REPORT),
    "price": (SNAPSHOT, INCREMENTAL, EXECUTION, TRADE_REPORT), "qty": (SNAPSHOT, INCREMENTAL, EXECUTION, TRADE_REPORT),
    "side": (SNAPSHOT, INCREMENTAL, EXECUTION, TRADE_REPORT), "id": (SNAPSHOT, INCREMENTAL),
    "aux": (SNAPSHOT, INCREMENTAL, EXECUTION, TRADE_REPORT),
    "ts_event": (SNAPSHOT, INCREMENTAL, EXECUTION, SECURITY_STATUS, QUOTE, TRADE_REPORT),
    "seq": (SNAPSHOT, INCREMENTAL, EXECUTION, SECURITY_STATUS, QUOTE, TRADE_REPORT),
    "bid": (QUOTE,), "bid_qty": (QUOTE,), "ask": (QUOTE,), "ask_qty": (QUOTE,),
}  # fmt: skip
"""In which classes an event field may be mapped anew."""
_IN_ENTRY = frozenset({"price", "qty", "side", "id", "aux", "seq"})
"""Fields that a message with a group has in its entries."""
_GROUPS = (SNAPSHOT, INCREMENTAL)


class FixMappingError(Exception):
    """The `fields` of a FIX source cannot work.

    Attributes:
        problems: each with its key relative to the source's table, the reason and a hint.
    """

    def __init__(self, problems: list[Refusal]) -> None:
        super().__init__("; ".join(f"{p.key}: {p.reason}" + (f" ({p.hint})" if p.hint else "") for p in problems))
        self.problems = problems


# ---------------------------------------------------------------- formats


def is_fix(data_format: str | None) -> bool:
    """Whether a `data_format` names FIX: a shipped version, or ``fix:`` and the path of a dictionary."""
    return data_format is not None and (data_format in SHIPPED or data_format.startswith("fix:"))


def dictionary_of(data_format: str, folder: Path = Path()) -> Dictionary | None:
    """The dictionary that a `data_format` names, if it names one: ``fix:FIX44.xml``, or ``fix:FIX50SP2.xml+FIXT11.xml``.

    Args:
        folder: where relative paths start.

    Raises:
        DictionaryError: a file is wrong.
        OSError: a file cannot be read.
    """
    if not data_format.startswith("fix:"):
        return None
    names = data_format.removeprefix("fix:").split("+")
    if len(names) > 2 or not all(names):
        raise DictionaryError(Path(data_format), ["name one dictionary, or two joined by +: fix:FIX50SP2.xml+FIXT11.xml"])
    paths = [folder / Path(name).expanduser() for name in names]
    return load_dictionary(paths[0], *paths[1:])


def check_fix_source(name: str, options: Source, folder: Path = Path()) -> list[Refusal]:
    """What is wrong with the dictionary and the `fields` of a FIX source; nothing for other sources."""
    if not is_fix(options.data_format):
        return []
    bad = [
        Refusal(key, "has no meaning for FIX", "remove it") for key in ("framing", "price_scale") if getattr(options, key) is not None
    ]
    if options.type in ("pcap", "multicast"):
        bad.append(Refusal("type", f"a {options.type} source has packets, and FIX is a stream", 'use type = "file"'))
    if options.fix and options.fix.reset == "never" and options.fix.store is None:
        reason = 'is missing, which reset = "never" needs: after a restart the session would begin at 1, and the venue refuse it'
        bad.append(Refusal("fix.store", reason, 'name a folder: store = "sessions/venue"'))
    if bad:
        return bad
    try:
        fix_tables(options.fields, dictionary_of(options.data_format or "", folder))
    except FixMappingError as error:
        return error.problems
    except DictionaryError as error:
        return [Refusal("data_format", str(error), "correct the dictionary")]
    except OSError as error:
        return [Refusal("data_format", f"the dictionary {error.filename} cannot be read: {error.strerror}", "correct the path")]
    return []


# ---------------------------------------------------------------- tables


def tag_code(tag: int) -> int:
    """Index of a tag among a class's roles: up to four digits as nibbles, the last in the highest; otherwise 65536 + tag."""
    text = str(tag)
    if len(text) > 4:
        return CODES + tag
    return sum(int(digit) << 4 * (4 - len(text) + place) for place, digit in enumerate(text))


def fix_tables(fields: Mapping[Any, FieldOptions], dictionary: Dictionary | None = None) -> FixTables:
    """The tables for a source.

    Args:
        fields: event field -> tag or, with a dictionary, the field's name.
        dictionary: adds data fields, delimiters, and which tags are known.

    Raises:
        FixMappingError: with every problem of `fields`.
    """
    tags = _own_tags(fields, dictionary)
    roles = np.full((len(CLASSES), ROLES), SKIP if dictionary else KNOWN, np.uint8)
    pairs = {**DATA_PAIRS, **(dictionary.data_pairs if dictionary else {})}
    for number, known in enumerate(CLASSES):
        for tag in _known_tags(known, dictionary):
            roles[number, tag_code(tag)] = KNOWN
        for length in pairs:
            if length < CODES:
                roles[number, tag_code(length)] = DATA_LENGTH | SPECIAL
        count, delimiter = _group(known, dictionary)
        for tag, slot in _header_roles(known, count).items():
            roles[number, tag_code(tag)] = slot
        entry = _replaced(known.entry or {}, number, tags, True)
        for tag, slot in _replaced(known.body, number, tags, False).items():
            roles[number, tag_code(tag)] = slot
        for tag, slot in entry.items():
            roles[number, tag_code(tag)] = slot | MEMBER | (FREE if slot == SYMBOL and tag != delimiter else 0)
        if delimiter:
            roles[number, tag_code(delimiter)] = entry.get(delimiter, KNOWN) | MEMBER | SPECIAL
    return FixTables(_types(), roles.reshape(-1), _data_tags(pairs), np.array([c.count > 0 for c in CLASSES], np.uint8), "id" in fields)


def _types() -> npt.NDArray[np.uint8]:
    types = np.zeros(CODES, np.uint8)
    for number, known in enumerate(CLASSES):
        if known.type:
            types[int.from_bytes(known.type.encode(), "little")] = number
    for kind, counter in ADMIN.items():
        types[ord(kind)] = counter
    return types


def _data_tags(pairs: Mapping[int, int]) -> npt.NDArray[np.int32]:
    table = np.zeros(CODES, np.int32)
    for length, data in pairs.items():
        if length < CODES:
            table[length] = data
    return table


def _header_roles(known: MessageClass, count: int) -> dict[int, int]:
    return {**HEADER, **({count: COUNT} if count else {})}


def _group(known: MessageClass, dictionary: Dictionary | None) -> tuple[int, int]:
    """Tags of a class's group: its count, and what begins an entry, which a dictionary may say otherwise."""
    message = dictionary.messages.get(known.type) if dictionary and known.count else None
    group = message.group(known.count) if message else None
    return known.count, group.delimiter if group else known.delimiter


def _known_tags(known: MessageClass, dictionary: Dictionary | None) -> set[int]:
    """Tags that a dictionary has for the messages of a class: all it has, for those of other types."""
    if dictionary is None:
        return set()
    message = dictionary.messages.get(known.type)
    if message is None:
        return {tag for tag in dictionary.fields if tag < CODES}
    uses = (*dictionary.header, *message.members, *dictionary.trailer)
    return {tag for use in uses for tag in use.tags() if tag < CODES}


def _own_tags(fields: Mapping[Any, FieldOptions], dictionary: Dictionary | None) -> dict[str, int]:
    """Tag of each event field that a source maps anew."""
    problems: list[Refusal] = []
    tags: dict[str, int] = {}
    for name, wanted in fields.items():
        key = f"fields.{name}"
        extra = sorted(wanted.model_fields_set - {"path"})
        if extra:
            problems.append(Refusal(f"{key}.{extra[0]}", "has no meaning for FIX, whose fields have one form", "give the tag alone"))
        elif wanted.path == name:
            continue  # a plain list of fields asks for nothing new
        else:
            tag = _tag(wanted.path, dictionary)
            if tag is None:
                names = ", or a field's name in the dictionary" if dictionary else "; names need a dictionary, fix:FILE.xml"
                hint = f"a tag's number{names}"
                problems.append(Refusal(key, f"{wanted.path!r} is no field", hint))
            else:
                tags[name] = tag
    taken: dict[int, str] = {}
    for name, tag in tags.items():
        if tag in taken and not set(_WHERE[name]).isdisjoint(_WHERE[taken[tag]]):
            problems.append(Refusal(f"fields.{name}", f"tag {tag} feeds {taken[tag]} already", "one tag feeds one field"))
        taken[tag] = name
        if tag in (8, 9, 10, 35, *HEADER, 268, 269, 279, 146) and not (name == "ts_event" and tag in (52, 122)):
            problems.append(Refusal(f"fields.{name}", f"tag {tag} has a meaning of its own", "choose another tag"))
        if tag >= CODES:
            problems.append(Refusal(f"fields.{name}", f"tag {tag} is too large", f"tags below {CODES} can be mapped"))
    if problems:
        raise FixMappingError(problems)
    return tags


def _tag(path: str, dictionary: Dictionary | None) -> int | None:
    if path.isascii() and path.isdigit():
        return int(path) or None
    try:
        return dictionary.tag(path) if dictionary else None
    except KeyError:
        return None


def _replaced(roles: Mapping[int, int], number: int, tags: Mapping[str, int], entry: bool) -> dict[int, int]:
    """The roles of a class's body or entries with a source's own tags in place of ours."""
    result = dict(roles)
    for name, tag in tags.items():
        if number not in _WHERE[name] or (name == "ts_event" and tag == 52):
            continue
        slot = _EVENT_SLOTS[name]
        here = _belongs_to_entry(name, number, roles)
        if here != entry:
            result.pop(tag, None)
            continue
        for old in [t for t, s in result.items() if s == slot]:
            del result[old]
        result[tag] = slot
    return result


def _belongs_to_entry(name: str, number: int, roles: Mapping[int, int]) -> bool:
    if name == "symbol":
        return number in (INCREMENTAL, DEFINITIONS)
    return number in _GROUPS and name in _IN_ENTRY


def slots_used(tables: FixTables, number: int) -> dict[int, int]:
    """Slot -> tag of the fields up to four digits that a class reads; for tests and tools."""
    roles: Any = tables.roles.reshape(len(CLASSES), ROLES)[number]
    return {int(roles[tag_code(tag)]) & SLOT_MASK: tag for tag in range(1, 10000) if roles[tag_code(tag)] & SLOT_MASK > KNOWN}
