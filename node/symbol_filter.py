"""Symbol filters inside compiled code: which symbols a list of globs (``*`` any run, ``?`` one byte) lets through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tickmesh.transports.toolbox import outlined

SYMBOL_BYTES = 24
_PATTERN_BYTES = 32


def pattern_table(filters: Sequence[Sequence[str]]) -> np.ndarray[Any, Any]:
    """Patterns as one array, u8 ``(len(filters), longest filter, 32)``, zero padded; an empty filter becomes ``*``.

    Raises:
        ValueError: a pattern is longer than 31 bytes or not ASCII.
    """
    longest = max([1, *(len(patterns) for patterns in filters)])
    table = np.zeros((max(1, len(filters)), longest, _PATTERN_BYTES), np.uint8)
    for row, patterns in zip(table, filters):
        for cell, pattern in zip(row, patterns or ["*"]):
            text = pattern.encode("ascii")
            if len(text) >= _PATTERN_BYTES:
                raise ValueError(f"symbol pattern {pattern!r} is longer than {_PATTERN_BYTES - 1} characters")
            cell[: len(text)] = np.frombuffer(text, np.uint8)
    return table


@outlined
def _glob(pattern: Any, symbol: Any) -> Any:
    """Whether the zero-padded `symbol` matches the zero-padded `pattern`; the greedy two-pointer method, no recursion."""
    p = np.int64(0)
    s = np.int64(0)
    star = np.int64(-1)
    mark = np.int64(0)
    while s < SYMBOL_BYTES and symbol[s] != 0:
        if pattern[p] == 42:
            star = p
            mark = s
            p += 1
        elif pattern[p] != 0 and (pattern[p] == 63 or pattern[p] == symbol[s]):
            p += 1
            s += 1
        elif star >= 0:
            p = star + 1
            mark += 1
            s = mark
        else:
            return False
    while pattern[p] == 42:
        p += 1
    return pattern[p] == 0


@outlined
def symbol_passes(table: Any, row: Any, symbol: Any) -> Any:
    """Whether `symbol` (u8[24], zero padded) matches one of the patterns in `row` of a :func:`pattern_table`."""
    for j in range(table.shape[1]):
        if table[row, j, 0] != 0 and _glob(table[row, j], symbol):
            return True
    return False
