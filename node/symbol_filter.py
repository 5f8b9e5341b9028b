"""Globs over symbols: which symbols a source lets through and a calculation listens to. The only matcher, in compiled code.

A glob is 1 to 24 ASCII characters that match a whole symbol: ``*`` stands for any run of characters (none too), ``?`` for exactly one,
every other character, ``[`` included, for itself; upper and lower case differ.

A symbol comes as three little-endian u64 words: its bytes, zero padded to 24.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tickmesh.transports.toolbox import inlined, outlined

SYMBOL_BYTES = 24
GLOB_BYTES = 32
"""Bytes of an encoded glob: at most 24 characters, so that there is always a zero behind the last."""
_STAR, _ANY, _END = np.uint8(ord("*")), np.uint8(ord("?")), np.uint8(0)


def encode_glob(pattern: str) -> np.ndarray[Any, Any]:
    """A glob as the kernels take it: u8[32], zero padded.

    Raises:
        ValueError: it is empty, longer than 24 characters, or not printable ASCII.
    """
    if not pattern.isascii() or not pattern.isprintable():
        raise ValueError(f"symbol pattern {pattern!r} is not printable ASCII: symbols have no other characters")
    if not 0 < len(pattern) <= SYMBOL_BYTES:
        raise ValueError(f"symbol pattern {pattern!r} has {len(pattern)} characters: 1 to {SYMBOL_BYTES} fit")
    return np.frombuffer(pattern.encode("ascii").ljust(GLOB_BYTES, b"\0"), np.uint8)


def pattern_table(filters: Sequence[Sequence[str]]) -> np.ndarray[Any, Any]:
    """Globs of several filters as one array, u8 ``(len(filters), longest filter, 32)``; an empty filter becomes ``*``.

    Raises:
        ValueError: see :func:`encode_glob`.
    """
    longest = max([1, *(len(patterns) for patterns in filters)])
    table = np.zeros((max(1, len(filters)), longest, GLOB_BYTES), np.uint8)
    for row, patterns in zip(table, filters):
        for cell, pattern in zip(row, patterns or ["*"]):
            cell[:] = encode_glob(pattern)
    return table


@inlined
def symbol_word(symbol: Any, first: Any) -> Any:
    """Eight bytes of a symbol, u8[24], from `first` on, as a little-endian word."""
    word = np.uint64(0)
    for k in range(8):
        word |= np.uint64(symbol[first + k]) << np.uint64(8 * k)
    return word


@inlined
def _symbol_byte(w0: Any, w1: Any, w2: Any, i: Any) -> Any:
    word = w0 if i < 8 else (w1 if i < 16 else w2)
    return np.uint8((word >> np.uint64(8 * (i & 7))) & np.uint64(0xFF)) if i < SYMBOL_BYTES else _END


@outlined
def glob_matches(pattern: Any, w0: Any, w1: Any, w2: Any) -> Any:
    """Whether the glob `pattern` (see :func:`encode_glob`) matches the symbol; no recursion, one backtracking point: the last ``*``."""
    p, i, star, resume = np.int64(0), np.int64(0), np.int64(-1), np.int64(0)
    byte = _symbol_byte(w0, w1, w2, i)
    while byte != _END:
        if pattern[p] == _STAR:
            star, resume = p, i
            p += 1
        elif pattern[p] == byte or pattern[p] == _ANY:
            p += 1
            i += 1
        elif star >= 0:
            resume += 1
            p, i = star + 1, resume
        else:
            return False
        byte = _symbol_byte(w0, w1, w2, i)
    while pattern[p] == _STAR:
        p += 1
    return pattern[p] == _END


@outlined
def symbol_passes(table: Any, row: Any, w0: Any, w1: Any, w2: Any) -> Any:
    """Whether the symbol matches one of the globs in `row` of a :func:`pattern_table`."""
    for j in range(table.shape[1]):
        if table[row, j, 0] != _END and glob_matches(table[row, j], w0, w1, w2):
            return True
    return False
