"""Finds the messages of a protocol that differ only in where their fields lie, and says in a table where each of them has what.

Real flows mix adds, deletes and executions so that no branch on the type can be predicted: every second message would cost the processor
a flush. So the generated decoder looks up the *layout* of the common messages by their type byte (or by the byte that chooses between
the cases of the first message) and runs the same instructions for all of them. Everything else, and every message that is not as it
should be, goes through the decoder's branches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from tickmesh.node.event import NO_SIDE
from tickmesh.node.protocol import KINDS, Case, Field, FlagRule, Message, Spec

NEVER = (1 << 31) - 1
"""A length that no message has: that of a byte which is not the type of a common message."""
TARGETS = ("side", "price", "qty", "id", "aux")
_SLACK = 64
"""Bytes that may be read after the last message: the key before the length is known to suffice, and fields that a message does not have."""


@dataclass(frozen=True)
class Column:
    """An event field of the common messages.

    Attributes:
        field: what all messages that have it hold there, but for the offset; None: they have constants only.
        offsets, present, constants: by message; a message without the field has the constant, and an offset that may be read.
    """

    field: Field | None
    offsets: tuple[int, ...]
    present: tuple[bool, ...]
    constants: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """A common message, or the case of one: the values of the key field that select it, and its counter."""

    codes: tuple[int, ...]
    message: Message
    case: Case
    counter: int


@dataclass(frozen=True)
class Layout:
    """The common messages of a protocol.

    Attributes:
        key: the field of one byte that selects a row.
        code: the type that a message must have besides, where the key chooses between the cases of one message.
        columns: by event field, one entry per row.
        rules: the flags that depend on a field, and for each the rows to which it applies.
    """

    key: Field
    code: int | None
    rows: tuple[Row, ...]
    columns: Mapping[str, Column]
    rules: Mapping[FlagRule, tuple[bool, ...]]


def common_layout(spec: Spec) -> Layout | None:
    """The layout of a protocol's common messages: those that look like the first one; None if there are fewer than two."""
    if not spec.messages:  # laid out by an SBE schema
        return None
    first = spec.messages[0]
    keys = {tuple(case.when) for case in first.cases}
    of_cases = len(first.cases) > 1 and len(keys) == 1 and len(first.cases[0].when) == 1
    key = first.fields[next(iter(first.cases[0].when))] if of_cases else spec.type_field
    reach = max(key.offset + key.size, spec.type_field.offset + spec.type_field.size)
    if key.size != 1 or key.signed or reach > _SLACK:
        return None
    rows, counter = [], 0
    for message in spec.messages:
        for case in message.cases:
            if of_cases and message is first:
                rows.append(Row(case.when[key.name], message, case, counter))
            elif not of_cases and len(message.cases) == 1 and not case.when:
                rows.append(Row((message.code,), message, case, counter))
            counter += 1
    chosen = _alike(spec, [row for row in rows if _of_one_instrument(spec, row)])
    if len(chosen) < 2:
        return None
    rules = {rule: tuple(rule in row.case.flag_rules for row in chosen) for rule in chosen[0].case.flag_rules}
    return Layout(key, first.code if of_cases else None, tuple(chosen), {t: _column(t, chosen) for t in TARGETS}, rules)


def _of_one_instrument(spec: Spec, row: Row) -> bool:
    """Whether the message makes one event, of an instrument that it names."""
    names = bool({spec.code, spec.symbol} & row.message.fields.keys())
    return row.case.kind in KINDS and row.case.kind != "reference" and not row.case.all_instruments and names


def _alike(spec: Spec, rows: list[Row]) -> list[Row]:
    """The rows that agree with those before them about what every event field holds, and with the first about everything shared."""
    chosen: list[Row] = []
    shapes: dict[str, Field] = {}
    for row in rows:
        mine = {target: _shape(row, target) for target in TARGETS}
        given = {target: shape for target, shape in mine.items() if shape}
        fits = all(shapes.get(target, shape) == shape for target, shape in given.items()) and "tick_size" not in row.case.values
        if chosen:
            fits = fits and _shared(spec, row) == _shared(spec, chosen[0])
            fits = fits and set(row.case.flag_rules) <= set(chosen[0].case.flag_rules) and _same_rule_fields(row, chosen[0])
        if fits:
            chosen.append(row)
            shapes |= given
    return chosen


def _shape(row: Row, target: str) -> Field | None:
    """The field that an event field comes from, without its name and place."""
    source = row.case.values.get(target)
    return dataclasses.replace(row.message.fields[source], name=target, offset=0) if isinstance(source, str) else None


def _shared(spec: Spec, row: Row) -> list[Field | None]:
    """The fields that must be the same, place included: time stamps and what names the instrument."""
    fields = row.message.fields
    return [fields.get(name or "") for name in (spec.timestamp, spec.received, spec.code, None if spec.code else spec.symbol)]


def _same_rule_fields(row: Row, other: Row) -> bool:
    return all(row.message.fields[rule.field] == other.message.fields[rule.field] for rule in row.case.flag_rules)


def _column(target: str, rows: list[Row]) -> Column:
    sources = [row.case.values.get(target, NO_SIDE if target == "side" else 0) for row in rows]
    fields = [row.message.fields[s] if isinstance(s, str) else None for row, s in zip(rows, sources)]
    usual = next((f.offset for f in fields if f), 0)
    return Column(
        next((shape for row in rows if (shape := _shape(row, target))), None),
        tuple(f.offset if f else usual if usual + 8 <= row.message.length + _SLACK else 0 for row, f in zip(rows, fields)),
        tuple(f is not None for f in fields),
        tuple(s if isinstance(s, int) else 0 for s in sources),
    )
