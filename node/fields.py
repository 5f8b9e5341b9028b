"""Field mapping: which field of a JSON or CSV record feeds which field of an event, with renames, scales and units.

A mapping comes from the configuration (``fields`` and ``messages`` of a source), is checked once by :func:`compile_mappings`, and
then turns records (parsed JSON with numbers as text, or the cells of a CSV row) into rows of integers, exactly::

    fields = { symbol = "s", price = "data.p", qty = { path = "data.q", scale = "0.001" }, ts_event = { path = "T", unit = "ms" } }

A JSON path is names and indices joined by points: ``data.p``, ``k.0``, ``bids[].0``. ``[]`` makes one row per element; the fields of
a mapping that use it walk the same list. A CSV path is a column's name or its index from 0.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from tickmesh.control.config import FieldOptions, MessageOptions, Refusal, Source
from tickmesh.node.event import ASK, BID, NO_SIDE, PRICE_DECIMALS, Kind, TradingStatus
from tickmesh.node.fixed_point import BadNumber, fixed_point

PRICE_FIELDS = ("price", "bid", "ask")
QTY_FIELDS = ("qty", "bid_qty", "ask_qty")
ROWS_MAX = 20_000
"""Most rows of one record."""

KINDS = {
    "trade": Kind.TRADE, "quote": Kind.QUOTE, "level": Kind.LEVEL, "add": Kind.ADD, "execute": Kind.EXECUTE, "cancel": Kind.CANCEL,
    "delete": Kind.DELETE, "replace": Kind.REPLACE, "modify": Kind.MODIFY, "clear": Kind.CLEAR, "break": Kind.BREAK,
    "status": Kind.STATUS, "imbalance": Kind.IMBALANCE,
}  # fmt: skip
"""Kinds of event by their names in the configuration."""

_COMMON = {"symbol", "ts_event", "seq"}
_TEXT_MAX = 60
_NEEDED: dict[str, set[str]] = {
    "trade": {"price", "qty"}, "quote": {"bid", "ask"}, "level": {"side", "price", "qty"}, "add": {"side", "price", "qty", "id"},
    "execute": {"id", "qty"}, "cancel": {"id", "qty"}, "delete": {"id"}, "replace": {"id", "aux", "price", "qty"},
    "modify": {"id", "price", "qty"}, "clear": set(), "break": {"id"}, "status": {"aux"}, "imbalance": {"price", "qty"},
}  # fmt: skip
_POSSIBLE: dict[str, set[str]] = {
    "trade": {"price", "qty", "side", "id", "aux"}, "quote": {"bid", "bid_qty", "ask", "ask_qty"}, "level": {"side", "price", "qty", "aux"},
    "add": {"side", "price", "qty", "id"}, "execute": {"id", "qty", "price", "side", "aux"}, "cancel": {"id", "qty", "side"},
    "delete": {"id", "side"}, "replace": {"id", "aux", "price", "qty"}, "modify": {"id", "price", "qty", "side"}, "clear": {"side"},
    "break": {"id"}, "status": {"aux"}, "imbalance": {"price", "qty", "side", "id", "aux"},
}  # fmt: skip

_SIDES = {
    "bid": BID, "buy": BID, "b": BID, "buyer": BID, "1": BID, "ask": ASK, "sell": ASK, "s": ASK, "a": ASK, "offer": ASK, "seller": ASK,
    "-1": ASK, "2": ASK, "": NO_SIDE, "none": NO_SIDE,
}  # fmt: skip
"""Words for a side that are understood without `values`, in lower case; 1 and 2 as in FIX."""
_TIME_DECIMALS = {"ns": 0, "us": 3, "ms": 6, "s": 9}
_STATUS = {status.name.lower(): int(status) for status in TradingStatus}
_PART = re.compile(r"([^.\[\]]*)((?:\[\d*\])*)")


class _Each:
    """The step ``[]``: every element of a list."""


EACH = _Each()
Step = str | int | _Each


class MappingError(Exception):
    """A field mapping cannot work.

    Attributes:
        problems: each with the key (relative to the source's table), the reason and a hint.
    """

    def __init__(self, problems: list[Refusal]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{p.key}: {p.reason}" + (f" ({p.hint})" if p.hint else "") for p in problems))


class BadRecord(Exception):
    """A record cannot be mapped; it is counted under `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


# ---------------------------------------------------------------- paths


def parse_path(path: str) -> tuple[Step, ...]:
    """``"data.b[].0"`` -> ``("data", "b", EACH, 0)``.

    Raises:
        ValueError: the path is not well formed, or holds more than one ``[]``.
    """
    steps: list[Step] = []
    for part in path.split("."):
        match = _PART.fullmatch(part)
        if match is None or (not match[1] and not match[2]):
            raise ValueError("is not a path: names and indices joined by points, e.g. data.p or bids[].0")
        if match[1]:
            steps.append(int(match[1]) if match[1].isdigit() else match[1])
        steps += [int(index) if index else EACH for index in re.findall(r"\[(\d*)\]", match[2])]
    if steps.count(EACH) > 1:
        raise ValueError("has more than one []: rows come from one list")
    return tuple(steps)


_ABSENT = object()


def _walk(record: Any, steps: Sequence[Step]) -> Any:
    for step in steps:
        if isinstance(record, dict):
            record = record.get(step if isinstance(step, str) else str(step), _ABSENT)
        elif isinstance(record, list) and isinstance(step, int):
            record = record[step] if step < len(record) else _ABSENT
        else:
            return _ABSENT
    return record


def _text(value: Any) -> str | None:
    """A leaf as text; None if it is absent or null."""
    if value is _ABSENT or value is None:
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return str(value)
    raise BadRecord("wrong_type")


# ---------------------------------------------------------------- one field


@dataclass(frozen=True)
class Field:
    """One event field of a mapping.

    Attributes:
        name: the event field.
        steps: where it is in the record; empty for a constant.
        multiplier, shift: the number is ``fixed_point(text, decimals + shift) * multiplier``.
    """

    name: str
    options: FieldOptions
    steps: tuple[Step, ...]
    multiplier: int
    shift: int

    def number(self, text: str, decimals: int) -> int:
        """The text times the scale, with `decimals` decimals.

        Raises:
            BadNumber: it is not a number, or does not fit.
        """
        if decimals + self.shift < 0:
            raise BadNumber("too_precise")
        try:
            value = fixed_point(text, decimals + self.shift) * self.multiplier
        except BadNumber as error:
            value = self._exactly(text, decimals, error)
        if abs(value) >= 1 << 63:
            raise BadNumber("too_large")
        return value

    def _exactly(self, text: str, decimals: int, error: BadNumber) -> int:
        """A number with more decimals than fit, of which the scale may leave none."""
        if error.reason != "too_precise" or len(text) > _TEXT_MAX or "e" in text.lower():
            raise error
        value = Fraction(text) * 10 ** (decimals + self.shift) * self.multiplier
        if value.denominator != 1:
            raise error
        return int(value)

    def plain(self, text: str) -> str:
        """The text times the scale, as plain decimal text.

        Raises:
            BadNumber: it is not a number, or far out of range.
        """
        try:
            value = Decimal(text) * self.multiplier
        except InvalidOperation:
            raise BadNumber("not_a_number") from None
        if not value.is_finite() or abs(value.adjusted()) > 40:
            raise BadNumber("too_large")
        return format(value.scaleb(self.shift), "f")

    def side(self, text: str) -> int:
        """BID, ASK or NO_SIDE.

        Raises:
            BadRecord: an unknown word.
        """
        found = _SIDES.get(self.options.values.get(text, text).lower())
        if found is None:
            raise BadRecord("bad_side")
        return found

    def identity(self, text: str) -> int:
        """An id: an integer below 2**63, or the first 63 bits of a UUID.

        Raises:
            BadRecord: neither.
        """
        if text.isdigit() and text.isascii():
            value = int(text) if len(text) < 20 else 1 << 63
            if value >= 1 << 63:
                raise BadRecord("bad_id")
            return value
        try:
            return uuid.UUID(text).int >> 65
        except ValueError:
            raise BadRecord("bad_id") from None

    def status(self, text: str) -> int:
        """A trading status by name or number.

        Raises:
            BadRecord: an unknown one.
        """
        word = self.options.values.get(text, text).lower()
        found = _STATUS.get(word, int(word) if word.isdigit() and len(word) < 3 else -1)
        if found not in _STATUS.values():
            raise BadRecord("bad_status")
        return found

    def time_ns(self, text: str) -> int:
        """Nanoseconds, as the unit says.

        Raises:
            BadNumber: not a number, or finer than nanoseconds.
            BadRecord: not an ISO 8601 time.
        """
        if self.options.unit == "iso8601":
            return iso8601_ns(text)
        return fixed_point(text, _TIME_DECIMALS[self.options.unit])


_FRACTION = re.compile(r"(\d\d:\d\d:\d\d)[.,](\d+)")


def iso8601_ns(text: str) -> int:
    """``2021-04-17T16:43:30.244075123Z`` -> nanoseconds since 1970, exactly; without a zone it is UTC.

    Raises:
        BadRecord: not such a time.
    """
    match = _FRACTION.search(text)
    if match and len(match[2]) > 9:
        raise BadRecord("bad_time")
    fraction = int(match[2].ljust(9, "0")) if match else 0
    try:
        moment = datetime.fromisoformat(_FRACTION.sub(r"\1", text) if match else text)
    except ValueError:
        raise BadRecord("bad_time") from None
    zone = moment.utcoffset()
    day_s = (date(moment.year, moment.month, moment.day) - date(1970, 1, 1)).days * 86400
    seconds = day_s + moment.hour * 3600 + moment.minute * 60 + moment.second - (int(zone.total_seconds()) if zone else 0)
    return seconds * 1_000_000_000 + fraction


# ---------------------------------------------------------------- a mapping


@dataclass(frozen=True)
class RecordMapping:
    """A kind of record, and the events it makes.

    Attributes:
        event: name of the kind of event.
        kind: the kind.
        snapshot: a CLEAR goes ahead.
        match: (steps, text) pairs that the record must have.
        fields: event field -> where it comes from.
        each: steps to the list that rows come from; None: the record is one row.
    """

    event: str
    kind: Kind
    snapshot: bool
    match: tuple[tuple[tuple[Step, ...], str], ...]
    fields: Mapping[str, Field]
    each: tuple[Step, ...] | None

    def matches(self, record: Any) -> bool:
        """Whether the record has the values that this mapping asks for."""
        for steps, wanted in self.match:
            value = _walk(record, steps)
            if isinstance(value, dict | list) or _text(value) != wanted:
                return False
        return True

    def symbol_of(self, record: Any) -> str | None:
        """The symbol of a record's rows, if it is the same for all and can be read."""
        field = self.fields["symbol"]
        if field.options.constant is not None:
            return field.options.constant
        if EACH in field.steps:
            return None
        try:
            text = _text(_walk(record, field.steps))
        except BadRecord:
            return None
        return field.options.default if text is None else text

    def rows(self, record: Any) -> Iterator[dict[str, str]]:
        """Texts by event field, one dict per event.

        Raises:
            BadRecord: a field is absent or not a leaf, or there are too many rows.
        """
        if self.each is None:
            yield self._row(record, None)
            return
        elements = _walk(record, self.each)
        if not isinstance(elements, list):
            raise BadRecord("missing_field" if elements is _ABSENT else "wrong_type")
        if len(elements) > ROWS_MAX:
            raise BadRecord("too_many_rows")
        for element in elements:
            yield self._row(record, element)

    def _row(self, record: Any, element: Any) -> dict[str, str]:
        row = {}
        for name, field in self.fields.items():
            text = field.options.constant
            if text is None:
                if self.each is not None and EACH in field.steps:
                    text = _text(_walk(element, field.steps[len(self.each) + 1 :]))
                else:
                    text = _text(_walk(record, field.steps))
                text = field.options.default if text is None else text
            if text is None:
                raise BadRecord("missing_field")
            row[name] = text
        return row


# ---------------------------------------------------------------- checks at load


def compile_mappings(options: Source, columns: Sequence[str] | None = None) -> list[RecordMapping]:
    """The mappings of a source, checked.

    Args:
        options: a source whose data_format is json or csv.
        columns: csv: names of the columns, which paths are resolved against.

    Raises:
        MappingError: with every problem.
    """
    problems: list[Refusal] = []
    mappings = []
    messages = options.messages or [MessageOptions(event=options.event or "trade", fields=dict(options.fields))]
    for index, message in enumerate(messages):
        prefix = f"messages.{index}." if options.messages else ""
        builder = _Builder(options, message, prefix, columns, problems)
        mappings.append(builder.build())
    if problems:
        raise MappingError(problems)
    return mappings


def check_source(name: str, options: Source) -> list[Refusal]:
    """What is wrong with the field mapping of a json or csv source: a hook for :class:`tickmesh.control.config.Checks`."""
    if options.data_format not in ("json", "csv"):
        return []
    try:
        compile_mappings(options, options.columns or None)
    except MappingError as error:
        return error.problems
    return []


class _Builder:
    """Builds one mapping, collecting problems."""

    def __init__(
        self, options: Source, message: MessageOptions, prefix: str, columns: Sequence[str] | None, problems: list[Refusal]
    ) -> None:
        self.options, self.message, self.prefix, self.columns, self.problems = options, message, prefix, columns, problems
        self.is_csv = options.data_format == "csv"

    def _refuse(self, key: str, reason: str, hint: str = "") -> None:
        self.problems.append(Refusal(self.prefix + key, reason, hint))

    def build(self) -> RecordMapping:
        event = self.message.event
        fields: dict[str, Field] = {name: self._field(name, options) for name, options in self.message.fields.items()}
        self._check_names(event)
        match = tuple((self._steps("match", path), self._matched(value)) for path, value in self.message.match.items())
        if any(EACH in steps for steps, _ in match):
            self._refuse("match", "cannot use []", "match a field of the record itself")
        return RecordMapping(event, KINDS[event], self.message.snapshot, match, fields, self._each(fields))

    @staticmethod
    def _matched(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    def _check_names(self, event: str) -> None:
        given = set(self.message.fields)
        needed = set(_NEEDED[event])
        if len(self.options.symbols) != 1 or any(c in self.options.symbols[0] for c in "*?"):
            needed.add("symbol")
        for name in sorted(needed - given):
            hint = "map it, or name the only symbol in symbols" if name == "symbol" else f"map it, e.g. {name} = ..."
            self._refuse("fields", f"a {event} event needs {name}", hint)
        for name in sorted(given - _POSSIBLE[event] - _COMMON):
            self._refuse(f"fields.{name}", f"a {event} event has no such field", f"it has: {', '.join(sorted(_POSSIBLE[event] | _COMMON))}")

    def _field(self, name: str, options: FieldOptions) -> Field:
        key = f"fields.{name}"
        steps = self._steps(key, options.path) if options.path else ()
        given = options.model_fields_set
        is_number = name in PRICE_FIELDS or name in QTY_FIELDS
        is_word = name == "side" or (name == "aux" and self.message.event == "status")
        if "unit" in given and name != "ts_event":
            self._refuse(f"{key}.unit", f"{name} is not a time", "only ts_event has a unit")
        if "values" in given and not is_word:
            self._refuse(f"{key}.values", f"{name} is not a word", "only side and status have values")
        if "scale" in given and not is_number:
            self._refuse(f"{key}.scale", f"{name} has no scale", "only prices and quantities have one")
        if name == "side":
            for word in options.values.values():
                if word.lower() not in _SIDES:
                    self._refuse(f"{key}.values", f"{word!r} is not a side", "sides: bid, ask, none")
        multiplier, shift = self._scale(key, name, options.scale)
        field = Field(name, options, steps, multiplier, shift)
        self._check_given_texts(key, field)
        return field

    def _scale(self, key: str, name: str, scale: Decimal) -> tuple[int, int]:
        if name in PRICE_FIELDS and self.options.price_scale is not None:
            scale = scale * self.options.price_scale
        sign, digits, exponent = scale.normalize().as_tuple()
        assert not sign
        assert isinstance(exponent, int)
        exponent_max = 18 if self.options.quantity_exponent is None else self.options.quantity_exponent
        decimals = PRICE_DECIMALS if name in PRICE_FIELDS else exponent_max
        if decimals + exponent < 0:
            reason = f"{scale} is impossible: {name} is kept in steps of 1e-{decimals}"
            self._refuse(f"{key}.scale", reason, "choose a larger scale" + ("" if name in PRICE_FIELDS else ", or set quantity_exponent"))
        if exponent > 18 or len(digits) > 18:
            self._refuse(f"{key}.scale", f"{scale} is impossible: no {name} would fit into 64 bits")
        return int("".join(map(str, digits))), exponent

    def _check_given_texts(self, key: str, field: Field) -> None:
        """A constant or default must have the type of the field."""
        for name, text in (("constant", field.options.constant), ("default", field.options.default)):
            if text is None:
                continue
            try:
                convert(field, text, self.options.quantity_exponent or 0, self.message.event)
            except (BadNumber, BadRecord) as error:
                self._refuse(f"{key}.{name}", f"{text!r} is no {field.name}: {error.reason.replace('_', ' ')}")

    def _steps(self, key: str, path: str) -> tuple[Step, ...]:
        if self.is_csv:
            return self._column(key, path)
        try:
            return parse_path(path)
        except ValueError as error:
            self._refuse(key, f"{path!r} {error}")
            return ()

    def _column(self, key: str, path: str) -> tuple[Step, ...]:
        columns = self.columns
        if columns is None:
            return (int(path) if path.isdigit() else path,)
        if path in columns:
            return (columns.index(path),)
        if path.isdigit() and int(path) < len(columns):
            return (int(path),)
        self._refuse(key, f"there is no column {path!r}", f"columns: {', '.join(columns)}")
        return ()

    def _each(self, fields: Mapping[str, Field]) -> tuple[Step, ...] | None:
        lists = {field.steps[: field.steps.index(EACH)]: name for name, field in fields.items() if EACH in field.steps}
        if len(lists) > 1:
            for name in sorted(lists.values()):
                self._refuse(f"fields.{name}", "walks another list than the other fields", "use one list per entry of messages")
        return next(iter(lists), None)


def convert(field: Field, text: str, qty_exponent: int, event: str) -> int | str:
    """The text of a field as what goes into the event; a symbol stays text.

    Raises:
        BadNumber: a number that does not fit.
        BadRecord: any other text that the field cannot take.
    """
    name = field.name
    if name in PRICE_FIELDS:
        return field.number(text, PRICE_DECIMALS)
    if name in QTY_FIELDS:
        return field.number(text, qty_exponent)
    if name == "side":
        return field.side(text)
    if name == "ts_event":
        return field.time_ns(text)
    if name == "symbol":
        return text
    if name == "aux" and event == "status":
        return field.status(text)
    if name == "aux" and event in ("imbalance", "level"):
        return fixed_point(text, PRICE_DECIMALS if event == "imbalance" else 0)
    return field.identity(text)
