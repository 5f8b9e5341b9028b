"""TOML texts, edited as a person would: split into sections and joined again, one value set or removed, comments and layout kept.

Every edit is checked against what :mod:`tomllib` reads afterwards. A text that cannot be edited so (an inline table in place of a section,
say) is written anew by :func:`toml_of`, which keeps the values and loses the comments.
"""

from __future__ import annotations

import copy
import datetime
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from tickmesh.control.tomllines import Path, Statement, statements

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_KEY_PART = re.compile(r"""\s*(?:([A-Za-z0-9_-]+)|("(?:[^"\\]|\\.)*")|'([^']*)')\s*((?:\[\d+\])*)\s*(\.|$)""")


class BadKeyPath(ValueError):
    """A text is no dotted key.

    Attributes:
        text: as given.
    """

    def __init__(self, text: str) -> None:
        super().__init__(f'{text!r} is no key: write its dotted path, e.g. risk.max_qty, sources[0], or a."b.c" where a part has dots')
        self.text = text


class NotEditable(ValueError):
    """A value cannot be put where it is wanted: what stands above it is no table.

    Attributes:
        path: dotted.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(f"{key_text(path)} cannot be set: what stands above it is no table; look at it with: tickmesh config get")
        self.path = path


# ---------------------------------------------------------------- keys


def parse_key(text: str) -> Path:
    """``data_sources.x.messages[0].event`` as a path. Raises BadKeyPath."""
    path: list[str | int] = []
    at = 0
    while True:
        match = _KEY_PART.match(text, at)
        if match is None:
            raise BadKeyPath(text)
        bare, quoted, literal, indexes, more = match.groups()
        path.append(bare or (json.loads(quoted) if quoted else literal))
        path += [int(index) for index in re.findall(r"\d+", indexes)]
        at = match.end()
        if not more:
            return tuple(path)


def key_text(path: Sequence[str | int]) -> str:
    """A path as TOML writes it; indexes in brackets."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{_key(part)}" for part in path).removeprefix(".")


def value_at(document: Any, path: Sequence[str | int]) -> Any:
    """What a document has at a path. Raises KeyError."""
    for part in path:
        if not isinstance(document, dict | list):
            raise KeyError(part)
        try:
            document = document[part]  # type: ignore[index]
        except (TypeError, IndexError):
            raise KeyError(part) from None
    return document


# ---------------------------------------------------------------- writing


def toml_of(document: Mapping[str, Any], table: tuple[str, ...] = ()) -> str:
    """A document as TOML: plain keys first, then its tables. Values are what :mod:`tomllib` gives."""
    plain = {name: value for name, value in document.items() if not _is_tables(value)}
    parts = ["".join(f"{_key(name)} = {value_text(value)}\n" for name, value in plain.items())]
    for name, value in document.items():
        here = (*table, name)
        if isinstance(value, dict):
            inner = toml_of(value, here)
            needs_header = not value or not inner.startswith("[")
            parts.append(f"[{key_text(here)}]\n{inner}" if needs_header else inner)
        elif _is_tables(value):
            parts += [f"[[{key_text(here)}]]\n{toml_of(one, here)}" for one in value]
    return "\n".join(part for part in parts if part)


def value_text(value: Any) -> str:
    """One value as TOML, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, dict):
        inner = ", ".join(f"{_key(name)} = {value_text(one)}" for name, one in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    return str(value)


def _is_tables(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value))


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _quoted(name)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


# ---------------------------------------------------------------- sections


def split_sections(text: str) -> dict[str, str]:
    """The inside of each top-level table, by name: ``[risk]`` loses its header, ``[delivery.x]`` becomes ``[x]``.

    Raises:
        tomllib.TOMLDecodeError: it is no TOML.
    """
    document = tomllib.loads(text)
    blocks = _blocks(text)
    found = {}
    for section, inside in document.items():
        if not isinstance(inside, dict):
            continue
        # keys of the section itself come before its tables, wherever the document had them
        own = [block for block in blocks if block.section == section]
        halves = (_tidy("".join(block.text for block in own if block.is_table is tables)) for tables in (False, True))
        made = "\n".join(half for half in halves if half)
        found[section] = made if _reads_as(made, inside) else toml_of(inside)
    return found


def join_sections(sections: Mapping[str, str]) -> str:
    """One document from the insides of its sections.

    Raises:
        tomllib.TOMLDecodeError: one is no TOML.
    """
    parts = []
    for section, text in sections.items():
        inside = tomllib.loads(text)
        found, _ = statements(text)
        headers = [one for one in found if one.header]
        made = text
        for one in reversed(headers):
            made = made[: one.first_part[0]] + f"{_key(section)}." + made[one.first_part[0] :]
        if not found or not found[0].header:
            made = f"[{_key(section)}]\n{made}"
        made = _tidy(made)
        parts.append(made if _reads_as(made, {section: inside}) else toml_of({section: inside}))
    return "\n".join(parts)


class _Block:
    """Lines that belong together: a header with what follows it, or a key outside any table."""

    def __init__(self, section: str, is_table: bool, text: str) -> None:
        self.section, self.is_table, self.text = section, is_table, text


def _blocks(text: str) -> list[_Block]:
    lines = _lines(text)
    found, _ = statements(text)
    headers_from = next((one.first_line for one in found if one.header), len(lines))
    at = [number for number, one in enumerate(found) if one.header or one.first_line < headers_from]
    starts = [found[number] for number in at]
    firsts = [_first_line(lines, found, number) for number in at]
    if firsts:
        firsts[0] = 0
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line))
    blocks = []
    for one, first, end in zip(starts, firsts, [*firsts[1:], len(lines)]):
        before, rest = "".join(lines[first : one.first_line]), "".join(lines[one.first_line : end])
        blocks.append(_block(one, before, rest, offsets[one.first_line]))
    return blocks


def _block(one: Statement, before: str, rest: str, offset: int) -> _Block:
    start, end = one.first_part[0] - offset, one.first_part[1] - offset
    if one.header and len(one.path) == 1:
        line, newline, body = rest.partition("\n")
        comment = line[line.index("]", end - 1) + 1 :].strip()
        return _Block(str(one.path[0]), False, before + (f"{comment}\n" if comment else "") + (body if newline else ""))
    return _Block(str(one.path[0]), one.header, before + rest[:start] + rest[end:])


def _first_line(lines: Sequence[str], found: Sequence[Statement], number: int) -> int:
    """The line at which a statement begins with the comments right above it."""
    floor = found[number - 1].end_line if number else 0
    first = found[number].first_line
    while first > floor and lines[first - 1].strip().startswith("#"):
        first -= 1
    return first


def _lines(text: str) -> list[str]:
    """Lines as TOML counts them, each with its end."""
    return [f"{line}\n" for line in text.removesuffix("\n").split("\n")] if text else []


def _tidy(text: str) -> str:
    kept = re.sub(r"\n{3,}", "\n\n", text).strip("\n") if '"""' not in text and "'''" not in text else text.strip("\n")
    return f"{kept}\n" if kept.strip() else ""


def _reads_as(text: str, document: Any) -> bool:
    try:
        return bool(tomllib.loads(text) == document)
    except tomllib.TOMLDecodeError:
        return False


# ---------------------------------------------------------------- one value


def set_value(text: str, path: Path, value: Any) -> str:
    """The text with another value at a path; tables above it are made if they are absent.

    Raises:
        NotEditable: something above it is no table.
        tomllib.TOMLDecodeError: the text is no TOML.
    """
    wanted = _with_value(tomllib.loads(text), path, value)
    made = _edited(text, path, value_text(value))
    return made if made is not None and _reads_as(made, wanted) else toml_of(wanted)


def remove_value(text: str, path: Path) -> str:
    """The text without a key or table.

    Raises:
        KeyError: there is none.
        tomllib.TOMLDecodeError: the text is no TOML.
    """
    wanted = tomllib.loads(text)
    value_at(wanted, path)
    parent = value_at(wanted, path[:-1])
    del parent[path[-1]]
    lines = _lines(text)
    for first, end in reversed(_lines_below(text, path)):
        del lines[first:end]
    made = _tidy("".join(lines))
    return made if _reads_as(made, wanted) or _reads_as(made, _without_empty(wanted)) else toml_of(wanted)


def _without_empty(document: dict[str, Any]) -> dict[str, Any]:
    """The document without its empty tables."""
    inner = {name: _without_empty(value) if isinstance(value, dict) else value for name, value in document.items()}
    return {name: value for name, value in inner.items() if value != {}}


def _lines_below(text: str, path: Path) -> list[tuple[int, int]]:
    """Lines of the statements at or below a path, tables with everything up to the next header."""
    found, _ = statements(text)
    lines = _lines(text)
    ranges: list[tuple[int, int]] = []
    for number, one in enumerate(found):
        if one.path[: len(path)] == path:
            last = number + 1 == len(found)
            end = one.end_line if not one.header else len(lines) if last else _first_line(lines, found, number + 1)
            ranges.append((_first_line(lines, found, number), end))
    return ranges


def _with_value(document: dict[str, Any], path: Path, value: Any) -> dict[str, Any]:
    made = copy.deepcopy(document)
    current: Any = made
    for position, part in enumerate(path):
        last = position + 1 == len(path)
        inside = isinstance(current, list) and isinstance(part, int) and part < len(current)
        if not inside and not (isinstance(current, dict) and isinstance(part, str)):
            raise NotEditable(path)
        if last:
            current[part] = value
        else:
            current = current.setdefault(part, {}) if isinstance(current, dict) else current[part]
    return made


def _edited(text: str, path: Path, raw: str) -> str | None:
    """The text with a value replaced or added in place; None if that is not possible."""
    found, values = statements(text)
    if path in values:
        start, end = values[path]
        return text[:start] + raw + text[end:]
    for length in range(len(path) - 1, 0, -1):
        if path[:length] in values:
            return _into_inline_table(text, values[path[:length]], path[length:], raw)
    if any(isinstance(part, int) for part in path):
        return None
    return _into_table(text, found, path, raw)


def _into_inline_table(text: str, span: tuple[int, int], rest: Path, raw: str) -> str | None:
    start, end = span
    inside = text[start + 1 : end - 1].rstrip()
    if text[start] != "{" or any(isinstance(part, int) for part in rest):
        return None
    comma = "," if inside.strip() else ""
    return f"{text[:start]}{{{inside}{comma} {key_text(rest)} = {raw} {text[end - 1 :]}"


def _into_table(text: str, found: Sequence[Statement], path: Path, raw: str) -> str:
    """A line at the end of its table, or of a new table at the end of the text."""
    lines = _lines(text)
    table = path[:-1]
    headers = [one for one in found if one.header]
    if table and not any(one.path == table for one in headers):
        above = [*lines, "\n"] if lines else []
        return "".join([*above, f"[{key_text(table)}]\n", f"{key_text(path[-1:])} = {raw}\n"])
    begun = not table
    place = 0
    for one in found:
        if one.header:
            begun = one.path == table
        if begun:
            place = one.end_line
    return "".join([*lines[:place], f"{key_text(path[-1:])} = {raw}\n", *lines[place:]])
