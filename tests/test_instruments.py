"""Instrument ids, shards and symbol filters: the kernels against plain Python."""

from __future__ import annotations

import fnmatch
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node import instruments as I
from tickmesh.transports.toolbox import loop

SYMBOLS = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=24)


@loop
def _shard(w0: Any, w1: Any, w2: Any, shards: Any) -> Any:
    return I.shard_of_words(w0, w1, w2, shards)


@loop
def _code(code: Any, out: Any) -> Any:
    out[0], out[1], out[2] = I.code_words(code)


@loop
def _trim(word: Any) -> Any:
    return I.trim_spaces(word)


def test_ids_are_dense_and_stable() -> None:
    table = I.InstrumentTable(4, shards=3)
    assert [table.intern(s) for s in ("AAPL", "MSFT", "AAPL")] == [0, 1, 0]
    assert table.intern("AAPL", source=1) == 2
    assert (table.symbol(2), table.find("AAPL", 1), table.find("AAPL", 2), len(table)) == ("AAPL", 2, None, 3)
    assert table.intern("X" * 24, tick_size=5, qty_exponent=-2) == 3
    assert (int(table.record(3)["tick_size"]), int(table.record(3)["qty_exponent"])) == (5, -2)
    with pytest.raises(I.InstrumentTableFull):
        table.intern("late")
    assert table.refused == 1
    assert len(table) == 4
    with pytest.raises(IndexError):
        table.symbol(4)
    for bad in ("", "x" * 25):
        with pytest.raises(ValueError, match="bytes"):
            table.intern(bad)


def test_shard_can_be_chosen() -> None:
    table = I.InstrumentTable(8, shards=4)
    for shard in range(4):
        assert int(table.record(table.intern(f"S{shard}", shard=shard))["shard"]) == shard
    with pytest.raises(ValueError, match="shard"):
        table.intern("T", shard=4)


@settings(deadline=None, max_examples=100)
@given(SYMBOLS, st.integers(1, 40))
def test_shard_kernel_agrees(symbol: str, shards: int) -> None:
    assert int(_shard(*I.symbol_words(symbol), np.uint64(shards))) == I.shard_of(symbol, shards)


def test_a_new_shard_only_takes() -> None:
    symbols = [f"SYM{i}" for i in range(2000)]
    before, after = ([I.shard_of(s, k) for s in symbols] for k in (7, 8))
    assert all(b == a or a == 7 for b, a in zip(before, after))
    assert 170 < after.count(7) < 340


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(SYMBOLS, st.integers(0, 3)), max_size=60))
def test_intern_is_a_dict(keys: list[tuple[str, int]]) -> None:
    table, model = I.InstrumentTable(64), {}
    for symbol, source in keys:
        assert table.intern(symbol, source) == model.setdefault((symbol, source), len(model))


@settings(deadline=None, max_examples=150)
@given(st.text("AB*?", min_size=1, max_size=8), st.text("AB", min_size=1, max_size=10), st.booleans())
def test_filter_is_fnmatch(pattern: str, symbol: str, include: bool) -> None:
    table = I.InstrumentTable(4)
    table.let_through(1, **{"include" if include else "exclude": [pattern]})
    allowed = fnmatch.fnmatchcase(symbol, pattern) == include
    assert table.intern(symbol, source=0) == 0
    for _ in range(2):
        if allowed:
            assert table.intern(symbol, source=1) == 1
        else:
            with pytest.raises(I.SymbolFiltered):
                table.intern(symbol, source=1)


def test_include_and_exclude() -> None:
    table = I.InstrumentTable(8)
    table.let_through(0, include=["A*", "MSFT"], exclude=["AB*"])
    seen = []
    for symbol in ("AAPL", "ABC", "MSFT", "IBM"):
        try:
            seen.append(table.symbol(table.intern(symbol)))
        except I.SymbolFiltered:
            continue
    assert seen == ["AAPL", "MSFT"]
    assert [table.lets_through(symbol) for symbol in ("AXE", "ABE", "MSFT", "MSFTX")] == [True, False, True, False]
    assert table.lets_through("ABE", source=1)
    with pytest.raises(ValueError, match="25 characters"):
        table.let_through(0, include=["x" * 25])
    with pytest.raises(ValueError, match="more than 4096"):
        table.let_through(0, exclude=["X"] * (I.RULES_MAX + 1))


def test_another_filter_takes_the_place_of_the_one_before() -> None:
    table = I.InstrumentTable(8)
    table.let_through(0, include=["A*"])
    table.let_through(1, include=["Z"])
    first = table.intern("AAPL")
    with pytest.raises(I.SymbolFiltered):
        table.intern("MSFT")
    with table.filters_held_back() as later:
        table.let_through(0, include=["M*"])
    assert table.lets_through("AAPL")
    for rules in later:
        table.let_through(*rules)
    assert table.refilter(0) == [first]
    with pytest.raises(I.SymbolFiltered):
        table.intern("AAPL")
    assert table.symbol(table.intern("MSFT")) == "MSFT"
    assert [table.lets_through(symbol, 1) for symbol in "AZ"] == [False, True]
    table.let_through(0)
    assert table.refilter(0) == []
    assert table.intern("AAPL") == first


def test_a_filter_reaches_the_last_character_of_the_longest_symbol() -> None:
    table = I.InstrumentTable(8)
    table.let_through(0, include=["S" * 23 + "?", "*Z"], exclude=["?" * 22 + "SA"])
    assert [table.lets_through("S" * 23 + last) for last in "AB"] == [False, True]
    assert [table.lets_through("Y" * 23 + last) for last in "YZ"] == [False, True]


def test_many_threads_of_different_sources() -> None:
    table = I.InstrumentTable(4096)
    ids: dict[int, list[int]] = {}

    def receive(source: int) -> None:
        ids[source] = [table.intern(f"S{i}", source) for i in range(500)]

    threads = [threading.Thread(target=receive, args=(s,)) for s in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(i for per in ids.values() for i in per) == list(range(2000))
    assert all(table.symbol(i) == f"S{k}" for per in ids.values() for k, i in enumerate(per))
    assert all(table.find(f"S{k}", s) == i for s, per in ids.items() for k, i in enumerate(per))


@settings(deadline=None, max_examples=60)
@given(st.one_of(st.integers(0, 100_000), st.integers(0, (1 << 64) - 1)))
def test_code_symbol(code: int) -> None:
    out = np.zeros(3, np.uint64)
    _code(np.uint64(code), out)
    assert out.tobytes().rstrip(b"\0") == f"#{code}".encode()


@settings(deadline=None, max_examples=60)
@given(st.binary(min_size=8, max_size=8) | st.text("A ", min_size=8, max_size=8).map(str.encode))
def test_trim(raw: bytes) -> None:
    word = _trim(np.frombuffer(raw, "<u8")[0])
    assert np.uint64(word).tobytes() == raw.rstrip(b" ").ljust(8, b"\0")
