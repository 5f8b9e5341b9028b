"""Symbol globs in compiled code agree with the standard library's."""

from __future__ import annotations

from fnmatch import fnmatchcase

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node.symbol_filter import pattern_table, symbol_passes


def passes(patterns: list[str], symbol: str) -> bool:
    padded = np.zeros(24, np.uint8)
    padded[: len(symbol)] = np.frombuffer(symbol.encode(), np.uint8)
    return bool(symbol_passes(pattern_table([patterns]), 0, padded))


@settings(deadline=None, max_examples=300)
@given(st.lists(st.text("AB*?-", min_size=1, max_size=8), min_size=1, max_size=3), st.text("AB-", min_size=1, max_size=24))
def test_agrees_with_fnmatch(patterns: list[str], symbol: str) -> None:
    assert passes(patterns, symbol) == any(fnmatchcase(symbol, p) for p in patterns)


def test_an_empty_filter_lets_everything_through() -> None:
    assert passes([], "ANY")


def test_a_pattern_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than 31"):
        pattern_table([["A" * 40]])
