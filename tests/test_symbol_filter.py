"""Symbol globs in compiled code: the syntax, against the standard library's and against a regular expression."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node.instruments import symbol_words
from tickmesh.node.symbol_filter import encode_glob, glob_matches, pattern_table, symbol_passes


def matches(pattern: str, symbol: str) -> bool:
    return bool(glob_matches(encode_glob(pattern), *symbol_words(symbol)))


def passes(patterns: list[str], symbol: str) -> bool:
    return bool(symbol_passes(pattern_table([["NOT"], patterns]), 1, *symbol_words(symbol)))


def by_expression(pattern: str, symbol: str) -> bool:
    """The documented syntax, another way."""
    return re.fullmatch("".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in pattern), symbol) is not None


@settings(deadline=None, max_examples=300)
@given(st.lists(st.text("AB*?-", min_size=1, max_size=8), min_size=1, max_size=3), st.text("AB-", min_size=1, max_size=24))
def test_agrees_with_fnmatch(patterns: list[str], symbol: str) -> None:
    assert passes(patterns, symbol) == any(fnmatchcase(symbol, p) for p in patterns)


PRINTABLE = st.characters(min_codepoint=33, max_codepoint=126)


@settings(deadline=None, max_examples=300)
@given(st.text(st.sampled_from("Aa[]!*?") | PRINTABLE, min_size=1, max_size=24), st.data())
def test_only_the_star_and_the_question_mark_are_special(pattern: str, data: st.DataObject) -> None:
    """Symbols near the pattern: its wildcards filled with anything, one character changed at times."""
    filled = "".join(data.draw(st.text(PRINTABLE, max_size=3)) if c == "*" else data.draw(PRINTABLE) if c == "?" else c for c in pattern)
    place = data.draw(st.integers(0, 2 * len(filled)))
    symbol = (filled[:place] + data.draw(PRINTABLE) * (place < len(filled)) + filled[place + 1 :])[:24] or "A"
    assert matches(pattern, symbol) == by_expression(pattern, symbol)


@pytest.mark.parametrize(
    ("pattern", "symbol", "wanted"),
    [
        ("ES*", "ES", True), ("ES*", "ESM4", True), ("ES?", "ES", False), ("ES??", "ESM4", True), ("*", "A", True), ("**", "A", True),
        ("AAPL", "AAP", False), ("AAP", "AAPL", False), ("aapl", "AAPL", False), ("[AB]", "A", False), ("[AB]", "[AB]", True),
        ("*" * 24, "X" * 24, True), ("X" * 24, "X" * 24, True), ("?" * 24, "X" * 23, False), ("*XY", "XXY", True),
        ("X*" + "Y" * 22, "X" + "Y" * 23, True),
    ],
)  # fmt: skip
def test_syntax(pattern: str, symbol: str, wanted: bool) -> None:
    assert matches(pattern, symbol) is wanted


def test_an_empty_filter_lets_everything_through() -> None:
    assert passes([], "ANY")


@pytest.mark.parametrize(("pattern", "reason"), [("A" * 25, "25 characters"), ("", "0 characters"), ("ÄG", "ASCII"), ("A\0B", "ASCII")])
def test_what_is_no_glob_is_refused(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        pattern_table([[pattern]])
