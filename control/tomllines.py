"""Where a key stands in a TOML text: dotted path -> line number, so that an error can point at the line to edit; and where its value is,
so that an edit can leave the rest as it is.

`tomllib` gives values without positions. This scanner follows table headers, keys, arrays and strings just far enough to number
the keys; it expects a text that `tomllib` has already accepted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Path = tuple[str | int, ...]

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SPACE = " \t"


@dataclass(frozen=True)
class Statement:
    """A table's header, or a key with its value.

    Attributes:
        path: of the table or key, with the index after each array of tables.
        header: whether it is a table's.
        first_line, end_line: the lines it takes, from 0, the end excluded.
        first_part: offsets of the first part of its dotted key as written, with the dot behind it, if there is one.
    """

    path: Path
    header: bool
    first_line: int
    end_line: int
    first_part: tuple[int, int]


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text, self.at, self.line = text, 0, 1
        self.statements: list[Statement] = []
        self.values: dict[Path, tuple[int, int]] = {}
        self._first_part = (0, 0)
        self.lines: dict[Path, int] = {}
        self.table: Path = ()
        self.repeats: dict[Path, int] = {}

    def scan(self) -> dict[Path, int]:
        while self.at < len(self.text):
            start = self.at
            character = self.text[self.at]
            if character in "\n \t\r":
                self._advance(1)
            elif character == "#":
                self._comment()
            else:
                self._statement(header=character == "[")
            if self.at == start:
                self._advance(1)  # not TOML: go on rather than hang
        return self.lines

    def _advance(self, count: int) -> None:
        self.line += self.text.count("\n", self.at, self.at + count)
        self.at += count

    def _peek(self, token: str) -> bool:
        return self.text.startswith(token, self.at)

    def _comment(self) -> None:
        end = self.text.find("\n", self.at)
        self.at = len(self.text) if end < 0 else end

    def _skip_space(self, newlines: bool = False) -> None:
        while self.at < len(self.text):
            character = self.text[self.at]
            if character in _SPACE or (newlines and character in "\r\n"):
                self._advance(1)
            elif newlines and character == "#":
                self._comment()
            else:
                return

    def _statement(self, header: bool) -> None:
        line = self.line
        if header:
            self._header()
            path = self.table
        else:
            path = self._key_value(self.table)
        self.statements.append(Statement(path, header, line - 1, self.line, self._first_part))

    def _header(self) -> None:
        array = self._peek("[[")
        self._advance(2 if array else 1)
        path = self._resolved(self._dotted_key(), last_is_table=not array)
        if array:
            index = self.repeats.get(path, -1) + 1
            self.repeats[path] = index
            self.lines.setdefault(path, self.line)
            path = (*path, index)
        self.table = path
        self.lines[path] = self.line
        self._advance(2 if array else 1)

    def _resolved(self, key: Path, last_is_table: bool) -> Path:
        """The path with the index of the current element after each array of tables."""
        path: Path = ()
        for position, part in enumerate(key):
            path = (*path, part)
            if path in self.repeats and (position + 1 < len(key) or last_is_table):
                path = (*path, self.repeats[path])
        return path

    def _dotted_key(self) -> Path:
        parts: list[str] = []
        while True:
            self._skip_space()
            start = self.at
            parts.append(self._simple_key())
            self._skip_space()
            more = self._peek(".")
            if len(parts) == 1:
                self._first_part = (start, self.at + more)
            if not more:
                return tuple(parts)
            self._advance(1)

    def _simple_key(self) -> str:
        if self._peek('"') or self._peek("'"):
            return self._string()
        match = _BARE.match(self.text, self.at)
        if match is None:
            return ""
        self._advance(len(match[0]))
        return match[0]

    def _string(self) -> str:
        quote = self.text[self.at] * 3
        if not self._peek(quote):
            quote = quote[0]
        start = self.at + len(quote)
        end = start
        while end < len(self.text) and not self.text.startswith(quote, end):
            end += 2 if quote[0] == '"' and self.text[end] == "\\" else 1
        self._advance(end + len(quote) - self.at)
        return self.text[start:end]

    def _key_value(self, table: Path) -> Path:
        line = self.line
        path = (*table, *self._dotted_key())
        first_part = self._first_part
        for length in range(len(table) + 1, len(path) + 1):
            self.lines.setdefault(path[:length], line)
        self._skip_space()
        if self._peek("="):
            self._advance(1)
            self._skip_space()
            self._value(path)
        self._first_part = first_part
        return path

    def _value(self, path: Path) -> None:
        start = self.at
        self._skip_value(path)
        self.values[path] = (start, start + len(self.text[start : self.at].rstrip()))

    def _skip_value(self, path: Path) -> None:
        if self._peek('"') or self._peek("'"):
            self._string()
        elif self._peek("["):
            self._array(path)
        elif self._peek("{"):
            self._inline_table(path)
        else:
            match = re.compile(r"[^,\]}#\n]*").match(self.text, self.at)
            self._advance(len(match[0]) if match else 0)

    def _array(self, path: Path) -> None:
        self._advance(1)
        index = 0
        while self.at < len(self.text):
            self._skip_space(newlines=True)
            if self._peek("]") or self.at >= len(self.text):
                break
            start = self.at
            self.lines[(*path, index)] = self.line
            self._value((*path, index))
            self._skip_space(newlines=True)
            if self._peek(","):
                self._advance(1)
                index += 1
            elif self.at == start:
                self._advance(1)
        self._advance(1)

    def _inline_table(self, path: Path) -> None:
        self._advance(1)
        while self.at < len(self.text):
            self._skip_space(newlines=True)
            if self._peek("}") or self.at >= len(self.text):
                break
            start = self.at
            if self._peek(","):
                self._advance(1)
            else:
                self._key_value(path)
            if self.at == start:
                self._advance(1)
        self._advance(1)


def key_lines(text: str) -> dict[Path, int]:
    """Line number (from 1) of every key, table header and array element of a TOML text, by path.

    A path holds the table names, the key, and the index inside an array: ``("data_sources", "nasdaq", "symbols", 0)``.
    """
    return _Scanner(text).scan()


def statements(text: str) -> tuple[list[Statement], dict[Path, tuple[int, int]]]:
    """The statements of a TOML text in order, and the offsets of every value, also of those inside arrays and inline tables."""
    scanner = _Scanner(text)
    scanner.scan()
    return scanner.statements, scanner.values


def line_of(lines: dict[Path, int], path: Path) -> int | None:
    """Line of the key at `path`, or of the nearest enclosing key or table that the text holds."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return None
