"""``tickmesh config show`` and ``tickmesh config schema``: the effective configuration with its origins, and the table of all keys.

``docs/reference/configuration.md`` is what :func:`schema_markdown` gives (``python -m tickmesh.ops.config_cmd`` writes it); a test
compares them.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.table import Table as RichTable

from tickmesh.control.changes import changed_keys
from tickmesh.control.config import NOT_BUILT_YET, Config, FieldOptions, InstrumentOptions, PreciseNumber, dotted, key_extra

_HEADS = {InstrumentOptions: "[data_sources.NAME.instruments.SYMBOL]", FieldOptions: "fields.FIELD = { … }"}
"""Tables whose place is said otherwise than by their path."""


def _sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The tables that a model holds, each before those in it."""
    for name, field in model.model_fields.items():
        inner = _table_of(field.annotation)
        if inner is None:
            continue
        origins = _origins(field.annotation)
        here = f"{path}{name}" + (".NAME" if dict in origins else "")
        yield _HEADS.get(inner, f"[[{here}]]" if list in origins else f"[{here}]"), inner
        yield from _sections(inner, f"{here}.")


def _table_of(annotation: Any) -> type[BaseModel] | None:
    """The table that a key holds: one, one if it is given, a list, or one per name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for item in typing.get_args(annotation) if (found := _table_of(item)) is not None), None)


def _origins(annotation: Any) -> set[Any]:
    """What an annotation is made of: list, dict, …"""
    return {typing.get_origin(annotation)}.union(*(_origins(item) for item in typing.get_args(annotation)))


SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = tuple({model: (head, model) for head, model in _sections(Config)}.values())
"""Tables of the document, each once, in the order in which they are shown."""


# ---------------------------------------------------------------- schema


@dataclass(frozen=True)
class KeyRow:
    """One line of the table of keys: texts, ready to print; `default` is empty where the key must be given."""

    section: str
    key: str
    type: str
    default: str
    unit: str
    bounds: str
    change: str
    only: str
    per_node: bool
    meaning: str


def schema_rows() -> list[KeyRow]:
    """Every key of the configuration, in order."""
    rows = []
    for section, model in SECTIONS:
        for name, field in model.model_fields.items():
            if name == "fields" or _table_of(field.annotation) is None:
                rows.append(_key_row(section, name, field, model))
    return rows


def _key_row(section: str, name: str, field: FieldInfo, model: type[BaseModel]) -> KeyRow:
    extra = key_extra(model, name)
    return KeyRow(
        section,
        name,
        type_text(field.annotation),
        "" if field.is_required() else value_text(field.get_default(call_default_factory=True)),
        extra["unit"],
        ", ".join(_bounds(field)),
        extra["change"],
        ", ".join(extra["only"]),
        extra["per_node"],
        field.description or "",
    )


def type_text(annotation: Any) -> str:
    """A type as a reader of TOML would name it."""
    if annotation == PreciseNumber or annotation is Decimal:
        return "number"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return "max, realtime or number" if arguments[0] is Any else type_text(arguments[0])
    if origin is Literal:
        return " \\| ".join(map(str, arguments)) if len(arguments) <= 6 else "name"
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_text(item) for item in arguments if item is not type(None))
    if origin is list:
        inner = type_text(arguments[0])
        return f"list of {inner}" if "|" in inner else f"list of {inner}s"
    if origin is dict:
        return "table"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "max, realtime or number"}
    return names.get(annotation, "table")


def _bounds(field: FieldInfo) -> Iterator[str]:
    names = _names(field.annotation)
    if len(names) > 6:
        yield f"names: {', '.join(names)}"
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    for item in field.metadata:
        for name, sign in signs.items():
            if hasattr(item, name):
                yield f"{sign} {_number_text(getattr(item, name))}"
        pattern = getattr(item, "pattern", None)
        if pattern:
            yield f"`{pattern}`".replace("|", "\\|")


def _names(annotation: Any) -> tuple[str, ...]:
    """What a key may name: the choices of a Literal, directly or inside a list, a table's keys or an optional."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    return next((names for item in typing.get_args(annotation) if (names := _names(item))), ())


def _number_text(value: Any) -> str:
    power = value.bit_length() - 1 if isinstance(value, int) and value > 1 << 15 else 0
    if power and value == 1 << power:
        return f"2^{power}"
    return f"2^{power + 1} - 1" if power and value == (1 << (power + 1)) - 1 else f"{value:g}" if isinstance(value, float) else str(value)


def value_text(value: Any) -> str:
    """A value as TOML would write it; "none" where there is none."""
    if value is None or value is PydanticUndefined:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Decimal):
        return format(value.normalize(), "f")
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(value_text(item) for item in value)}]"
    if isinstance(value, BaseModel):
        return value_text({name: getattr(value, name) for name in sorted(value.model_fields_set)})
    if isinstance(value, dict):
        inner = ", ".join(f"{_key_text(name)} = {value_text(item)}" for name, item in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    return str(value)


def _key_text(name: Any) -> str:
    text = str(name)
    return text if text.replace("_", "").replace("-", "").isalnum() and text.isascii() else json.dumps(text, ensure_ascii=False)


def schema_markdown() -> str:
    """The reference page of the configuration."""
    parts = [_MARKDOWN_HEAD]
    models = dict(SECTIONS)
    for section in models:
        summary = (models[section].__doc__ or "").strip().split("\n")[0].split(": ", 1)[-1]
        parts.append(f"\n## `{section}`\n\n{summary[:1].upper()}{summary[1:]}\n\n{_MARKDOWN_COLUMNS}")
        parts += [_markdown_row(row) for row in schema_rows() if row.section == section]
    kinds = {"type": "source types", "method": "delivery methods"}
    parts.append(_MARKDOWN_TAIL.format(what="; ".join(f"{kinds[key]} {', '.join(names)}" for key, names in NOT_BUILT_YET.items() if names)))
    return "\n".join(parts) + "\n"


def _markdown_row(row: KeyRow) -> str:
    default = f"`{row.default}`" if row.default else "must be given"
    bounds = "; ".join(item for item in (row.bounds, f"only {row.only}" if row.only else "", _OWN if row.per_node else "") if item)
    return f"| `{row.key}` | {row.type} | {default} | {row.unit} | {bounds} | {row.change} | {row.meaning} |"


_OWN = "each node's own"
_MARKDOWN_COLUMNS = """| key | type | default | unit | bounds | change | meaning |
|---|---|---|---|---|---|---|"""

_MARKDOWN_HEAD = """# Configuration reference

<!-- Written by `python -m tickmesh.ops.config_cmd`; a test compares it with the model. -->

A node reads one TOML file. `tickmesh config schema` prints this table, `tickmesh config show FILE` the values in effect and where each
comes from. Every problem of a file is reported at once, with its line. An unknown key is an error.

*change* says what happens to a running node when the value changes: `live` takes effect, `restart` needs a restart. Keys that are *each
node's own* stay in the node's file where the rest of the configuration is in a [store](store.md).
Prices and quantities are exact: `0.01` and `"0.01"` are the same number, and neither becomes a float."""

_MARKDOWN_TAIL = """
## Not built yet

Refused with that reason: {what}."""


def schema_table() -> RichTable:
    """The table of keys for a terminal."""
    table = RichTable("key", "type", "default", "unit", "change", "meaning", show_lines=False, highlight=False)
    section = ""
    for row in schema_rows():
        if row.section != section:
            section = row.section
            table.add_section()
            table.add_row(_escaped(section), style="bold")
        texts = (row.key, row.type.replace("\\|", "|"), row.default or "must be given", row.unit, row.change, row.meaning)
        table.add_row(*(_escaped(text) for text in texts))
    return table


def _escaped(text: str) -> str:
    return text.replace("[", "\\[")


def json_schema() -> dict[str, Any]:
    """JSON Schema of the document, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema(mode="validation")}


# ---------------------------------------------------------------- show


@dataclass(frozen=True)
class ShownKey:
    """One value in effect.

    Attributes:
        path: dotted path of the key.
        value: the value, as the configuration holds it.
        origin: `default`, or `FILE:LINE`.
        change: `live` or `restart`.
    """

    path: str
    value: Any
    origin: str
    change: str


def effective(config: Config) -> list[ShownKey]:
    """Every key in effect: those of the fixed tables, and of each named table that the document has. Keys that a source's type or a
    delivery's method has no use for are left out."""
    return list(_effective(config, config, ()))


def _effective(config: Config, table: BaseModel, path: tuple[str | int, ...]) -> Iterator[ShownKey]:
    kind = getattr(table, "type", None) or getattr(table, "method", None) or getattr(table, "kind", None)
    for name in type(table).model_fields:
        value, here = getattr(table, name), (*path, name)
        extra = key_extra(type(table), name)
        if isinstance(value, BaseModel):
            yield from _effective(config, value, here)
        elif isinstance(value, dict) and _holds_tables(type(table).model_fields[name].annotation):
            for item, inner in value.items():
                yield from _effective(config, inner, (*here, item))
        elif kind is None or not extra["only"] or kind in extra["only"]:
            yield ShownKey(dotted(here), value, _origin(config, table, name, here), extra["change"])
    for name, value in (table.model_extra or {}).items():
        yield ShownKey(dotted((*path, name)), value, _origin(config, table, name, (*path, name)), "live")


def _holds_tables(annotation: Any) -> bool:
    arguments = typing.get_args(annotation)
    return bool(arguments) and isinstance(arguments[-1], type) and issubclass(arguments[-1], BaseModel)


def _origin(config: Config, table: BaseModel, name: str, path: tuple[str | int, ...]) -> str:
    if name not in table.model_fields_set:
        return "default"
    line = config.line(*path)
    return f"{config.file.name if config.file else 'text'}:{line}"


def show_table(config: Config) -> RichTable:
    """The effective configuration for a terminal."""
    table = RichTable("key", "value", "origin", "change", highlight=False)
    for row in effective(config):
        style = "dim" if row.origin == "default" else ""
        table.add_row(_escaped(row.path), _escaped(value_text(row.value)), row.origin, row.change, style=style)
    return table


def show_json(config: Config) -> list[dict[str, Any]]:
    """The effective configuration for programs: path, value, origin and change of every key."""
    return [{"path": r.path, "value": plain(r.value), "origin": r.origin, "change": r.change} for r in effective(config)]


def plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return value_text(value)
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- changes


@dataclass(frozen=True)
class Change:
    """One key that differs between two configurations; `old` or `new` is None where the table is absent."""

    path: str
    old: Any
    new: Any
    change: str


def changes(old: Config, new: Config) -> list[Change]:
    """What differs, key by key, and whether a running node can take it (`live`) or has to restart. Of a table that comes or goes, the
    keys that the document gives."""
    before = {row.path: row for row in effective(old)}
    after = {row.path: row for row in effective(new)}
    restart = [change.path for change in changed_keys(old, new) if not change.live]
    found = []
    for path in [*before, *(p for p in after if p not in before)]:
        a, b = before.get(path), after.get(path)
        only = a or b
        if only is not None and (a is None or b is None) and only.origin == "default":
            continue
        if a is None or b is None:  # with its table, as the table does
            needs = any(path == table or path.startswith(f"{table}.") for table in restart)
            found.append(Change(path, a and a.value, b and b.value, "restart" if needs else "live"))
        elif a.value != b.value:
            found.append(Change(path, a.value, b.value, a.change))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the reference page."""
    parser = argparse.ArgumentParser(description="Write the reference page of the configuration.")
    parser.add_argument("file", nargs="?", type=Path, default=Path("docs/reference/configuration.md"), help="default: %(default)s")
    parser.parse_args(arguments).file.write_text(schema_markdown(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
