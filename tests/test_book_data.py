"""Order books on a real recording: CME ES futures, market by order, with checkpoints made by an independent book."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from tickmesh.node.book import apply_events, counts, levels_count, make_books, resting_orders, top
from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, NO_SIDE, Kind

FOLDER = Path(os.environ.get("TICKMESH_DATA", Path(__file__).parents[1] / ".." / "shared" / "data")) / "dbn_esm4_mbo"
MBO = np.dtype(
    [
        ("length", "u1"), ("rtype", "u1"), ("publisher", "<u2"), ("instrument", "<u4"), ("ts_event", "<u8"), ("order_id", "<u8"),
        ("price", "<i8"), ("size", "<u4"), ("flags", "u1"), ("channel", "u1"), ("action", "S1"), ("side", "S1"),
        ("ts_recv", "<u8"), ("ts_in_delta", "<i4"), ("sequence", "<u4"),
    ]
)  # fmt: skip
"""Databento DBN version 1, ``MboMsg`` (rtype 0xA0)."""
ACTIONS = {b"A": Kind.ADD, b"C": Kind.CANCEL, b"M": Kind.MODIFY, b"R": Kind.CLEAR, b"T": Kind.TRADE, b"F": Kind.TRADE}
SIDES = {b"B": 0, b"A": 1, b"N": NO_SIDE}

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason=f"no recording at {FOLDER}: set TICKMESH_DATA")


def recorded_events() -> np.ndarray:
    """The recording as events; a fill changes no book, the cancel that follows it does."""
    with next(FOLDER.glob("*mbo*.dbn.zst")).open("rb") as file:
        data = zstandard.ZstdDecompressor().stream_reader(file).read()
    records = np.frombuffer(data, MBO, offset=8 + int.from_bytes(data[4:8], "little"))
    events = np.zeros(records.size, EVENT)
    events["kind"] = [ACTIONS[action] for action in records["action"]]
    events["side"] = [SIDES[side] for side in records["side"]]
    for field, source in {"id": "order_id", "price": "price", "qty": "size", "ts_event": "ts_event", "ts_recv": "ts_recv"}.items():
        events[field] = records[source]
    return events


def prices(levels: list[tuple[int, int, int]]) -> list[list[float]]:
    return [[price / 1e9, qty, orders] for price, qty, orders in levels]


@pytest.mark.parametrize(("order_ids", "tick"), [("random", 250_000_000), ("sequential", 0), ("per_instrument", 1_000_000_000)])
def test_the_recording_gives_the_checkpoints(order_ids: str, tick: int) -> None:
    expected: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
    books = make_books(1, 1 << 16, order_ids)
    books.ticks[0] = tick
    events, at = recorded_events(), 0
    ends = [checkpoint["record_index"] for checkpoint in expected["checkpoints"]] + [len(events)]
    for end, checkpoint in zip(ends, [*expected["checkpoints"], None], strict=True):
        results = np.zeros(end - at, np.int64)
        apply_events(books, events[at:end], results, events[:0].copy())
        assert not results.any()
        at = end
        if checkpoint:
            best = [side[0][:2] if side else None for side in map(prices, top(books, 0, 1))]
            assert (best, resting_orders(books)) == (checkpoint["bbo"], checkpoint["orders"])
    assert dict(zip(("bids", "asks"), map(prices, top(books, 0, 10)), strict=True)) == expected["final_top10"]
    assert levels_count(books, 0) == (expected["bid_levels"], expected["ask_levels"])
    assert resting_orders(books) == expected["resting_orders"]
    assert not any(counts(books)[name] for name in ("unknown_order", "duplicate_order", "crossed_bbos"))
    assert events["instrument"].tolist().count(ALL_INSTRUMENTS) == 0
