"""Snapshots: a shard goes on from one exactly as if it had never stopped, and a damaged or foreign one is refused."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node.snapshot import (
    SnapshotDamaged,
    SnapshotError,
    SnapshotFacts,
    SnapshotUnfit,
    fits,
    load_into,
    named_arrays,
    read_facts,
    snapshots,
    write_snapshot,
)  # fmt: skip

RECORD = np.dtype([("a", "<i8"), ("b", "<f4", (3,)), ("c", "u1")])
Inner = namedtuple("Inner", "table plans bits")
Outer = namedtuple("Outer", "books values flags")
FACTS = SnapshotFacts(3, 1000, (1 << 64) - 1, 7, 12, 500, 1, {"0": {"sequence": 55, "codes": {"1": 9}}})


def make(big: int = 300_000, bits: int = 21) -> Any:
    return Outer(Inner(np.zeros(big, RECORD), np.zeros(8), bits), np.full((3, 1000), np.nan), np.zeros(0, np.uint8))


def fill(arrays: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for at in rng.integers(0, len(arrays.books.table), 50):
        arrays.books.table[at] = (rng.integers(1 << 62), rng.random(3), 7)
    arrays.values[1, :] = rng.random(1000)


def same(one: Any, other: Any) -> bool:
    return all(
        np.array_equal(a.view(np.uint8), b.view(np.uint8)) if isinstance(a, np.ndarray) else a == b
        for (_, a), (_, b) in zip(named_arrays(one), named_arrays(other), strict=True)
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(0, 1 << 32))
def test_arrays_come_back_whatever_was_there_before(tmp_path_factory: pytest.TempPathFactory, seed: int, other: int) -> None:
    folder = tmp_path_factory.mktemp("s")
    arrays, later = make(), make()
    fill(arrays, seed)
    fill(later, other)
    path = write_snapshot(folder, arrays, FACTS)
    assert load_into(path, later) == FACTS == read_facts(path)
    assert same(arrays, later)


def test_what_is_zero_takes_no_room(tmp_path: Path) -> None:
    arrays = make(3_000_000)
    arrays.books.table["a"][1_500_000] = 5
    assert write_snapshot(tmp_path, arrays, FACTS).stat().st_size < 200_000


def test_snapshots_are_found_in_the_order_of_their_sequences(tmp_path: Path) -> None:
    for sequence in (30, 100, 9, 2000):
        write_snapshot(tmp_path, make(10), dataclasses.replace(FACTS, sequence=sequence))
    assert [read_facts(path).sequence for path in snapshots(tmp_path)] == [9, 30, 100, 2000]


def test_a_snapshot_fits_arrays_of_its_kind_only(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path, make(1000), FACTS)
    assert fits(path, make(1000))
    assert not fits(path, make(1001))
    path.write_bytes(path.read_bytes()[:-1])
    assert not fits(path, make(1000))


def test_every_altered_byte_is_noticed(tmp_path: Path) -> None:
    arrays = make(1000)
    fill(arrays, 1)
    path = write_snapshot(tmp_path, arrays, FACTS)
    whole = bytearray(path.read_bytes())
    rng = np.random.default_rng(5)
    for at in [*rng.integers(16, len(whole) - 8, 60), len(whole) - 1, 0]:
        bad = bytearray(whole)
        bad[at] ^= 1 + int(rng.integers(255))
        path.write_bytes(bad)
        if bad[-12:-8] != whole[-12:-8]:
            continue  # the four bytes that mean nothing
        with pytest.raises(SnapshotError):
            load_into(path, make(1000))


@pytest.mark.parametrize("kept", [0, 10, 100, 5000, -1])
def test_one_that_is_cut_short_is_noticed(tmp_path: Path, kept: int) -> None:
    path = write_snapshot(tmp_path, make(1000), FACTS)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SnapshotDamaged):
        load_into(path, make(1000))


def test_one_of_another_shard_changes_nothing(tmp_path: Path) -> None:
    arrays = make(1000)
    fill(arrays, 1)
    path = write_snapshot(tmp_path, arrays, FACTS)
    other = make(1001)
    with pytest.raises(SnapshotUnfit, match=r"books\.table"):
        load_into(path, other)
    assert same(other, make(1001))
    with pytest.raises(SnapshotUnfit, match=r"books\.bits"):
        load_into(path, make(1000, bits=20))


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SnapshotError, match="cannot be written"):
        write_snapshot(tmp_path / "file" / "snapshots", make(10), FACTS)


def test_what_was_not_finished_is_no_snapshot(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path, make(10), FACTS)
    path.rename(path.with_suffix(".new"))
    assert snapshots(tmp_path) == []
