"""Placement of symbols on shards: stable, even, and moved as little as possible."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.control.sharding import NoSuchShard, SymbolTooLong, shard_of
from tickmesh.node.instruments import InstrumentTable

symbols = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=24)
MANY = [f"SYM{i}" for i in range(2000)] + [f"BTC-USD-{i:06d}-C-LONG" for i in range(1000)]


def test_placement_is_fixed_for_ever() -> None:
    """A journal written by an older version must be found on the same shard: these values may never change."""
    names = ["AAPL", "MSFT", "BTCUSDT", "BTC-USD-220527", "ESM4", "A", "XBTUSD_PERPETUAL_FUTURE"]
    assert [shard_of(name, 8) for name in names] == [2, 3, 1, 1, 2, 4, 1]


@settings(deadline=None, max_examples=300)
@given(symbols, st.integers(1, 64))
def test_compiled_and_python_placement_agree(symbol: str, shards: int) -> None:
    table = InstrumentTable(4, shards)
    assert table.record(table.intern(symbol))["shard"] == shard_of(symbol, shards)


@given(symbols, st.integers(1, 40))
def test_a_new_shard_takes_symbols_only_for_itself(symbol: str, shards: int) -> None:
    assert shard_of(symbol, shards + 1) in (shard_of(symbol, shards), shards)


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 15])
def test_a_new_shard_moves_about_one_in_k(shards: int) -> None:
    moved = sum(shard_of(s, shards) != shard_of(s, shards + 1) for s in MANY)
    expected = len(MANY) / (shards + 1)
    assert abs(moved - expected) < 4 * np.sqrt(expected)


@pytest.mark.parametrize("shards", [2, 5, 16])
def test_symbols_are_spread_evenly(shards: int) -> None:
    counts = np.bincount([shard_of(s, shards) for s in MANY], minlength=shards)
    mean = len(MANY) / shards
    assert np.all(np.abs(counts - mean) < 4.5 * np.sqrt(mean))


@given(symbols)
def test_padding_does_not_count(symbol: str) -> None:
    assert shard_of(symbol, 7) == shard_of(symbol.encode().ljust(24, b"\0"), 7) == shard_of(symbol + "  ", 7)


def test_overrides_win() -> None:
    assert shard_of("AAPL", 4, {"AAPL": 3}) == 3
    assert shard_of("AAPL    ", 4, {"AAPL": 3}) == 3
    assert shard_of("MSFT", 4, {"AAPL": 3}) == shard_of("MSFT", 4)
    with pytest.raises(NoSuchShard, match="shards are 0 to 3") as caught:
        shard_of("AAPL", 4, {"AAPL": 4})
    assert (caught.value.symbol, caught.value.shard, caught.value.shards) == ("AAPL", 4, 4)


def test_what_cannot_be_placed() -> None:
    with pytest.raises(SymbolTooLong, match="more than 24 bytes"):
        shard_of("X" * 25, 2)
    with pytest.raises(ValueError, match="at least 1"):
        shard_of("X", 0)
