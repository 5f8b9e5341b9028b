"""Replay and its summary: the contract of every key, on feeds small enough to check by hand."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replays import config_of
from test_decoder import directory, framed, head

from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, EventArray, Kind
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.replay import of_shard, replay
from tickmesh.node.summary import quantity_text
from tickmesh.transports.capture import write_pcap


def order(id: int, side: bytes, qty: int, price: int, locate: int) -> bytes:
    return head(b"A", locate) + struct.pack(">QcI8sI", id, side, qty, b"", price)


def execute(id: int, qty: int, locate: int) -> bytes:
    return head(b"E", locate) + struct.pack(">QIQ", id, qty, 900 + id)


DAY = framed(
    directory(5, "QQ"), directory(6, "ZZ"), directory(7, "NONE"),
    order(1, b"B", 100, 500_000, 5), order(2, b"B", 50, 499_900, 5), order(3, b"B", 25, 500_000, 5), order(4, b"S", 70, 501_000, 5),
    execute(1, 40, 5), execute(4, 10, 5),
    order(10, b"S", 1, 12_345, 6),
)  # fmt: skip
QQ = {
    "trades": 2,
    "volume": "50",
    "vwap": pytest.approx((40 * 50 + 10 * 50.1) / 50, rel=1e-14),
    "first_bbo": ["50", "100", None, None],
    "last_bbo": ["50", "85", "50.1", "60"],
    "bids": [["50", "85", 2], ["49.99", "50", 1]],
    "asks": [["50.1", "60", 1]],
    "signals": {},
}
ZZ = {
    "trades": 0, "volume": "0", "vwap": None, "first_bbo": [None, None, "1.2345", "1"], "last_bbo": [None, None, "1.2345", "1"],
    "bids": [], "asks": [["1.2345", "1", 1]], "signals": {},
}  # fmt: skip


@pytest.fixture
def day(tmp_path: Path) -> Path:
    path = tmp_path / "day.itch"
    path.write_bytes(DAY)
    return path


def test_every_key_of_the_summary(day: Path) -> None:
    summary = replay(config_of("itch50"), [day])
    assert summary["source"].pop("seconds") >= 0
    assert summary == {
        "source": {"format": "itch50", "bytes": len(DAY), "messages_total": 10},
        "messages": {"stock_directory": 3, "add_order": 5, "order_executed": 2},
        "malformed": {},
        "refused": {},
        "gaps": [],
        "duplicates": 0,
        "events": {"add": 5, "execute": 2, "reference": 3, "bbo": 6},
        "instruments": {
            "QQ": QQ,
            "ZZ": ZZ,
            "NONE": {**ZZ, "first_bbo": None, "last_bbo": None, "asks": []},
        },
    }


def test_depth(day: Path) -> None:
    assert replay(config_of("itch50"), [day], depth=1)["instruments"]["QQ"]["bids"] == QQ["bids"][:1]
    assert replay(config_of("itch50"), [day], depth=0)["instruments"]["QQ"]["bids"] == []


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_and_observers_change_nothing(day: Path, shards: int) -> None:
    config = config_of("itch50", more=f"[cluster]\nshards = {shards}\n")
    seen: list[tuple[int, EventArray]] = []
    plain, observed = replay(config, [day]), replay(config, [day], observe=lambda shard, events: seen.append((shard, events.copy())))
    for summary in (plain, observed):
        assert (summary["instruments"]["QQ"], summary["instruments"]["ZZ"]) == (QQ, ZZ)
        assert summary["events"] == {"add": 5, "execute": 2, "reference": 3, "bbo": 6}
    for shard in range(shards):
        outputs = np.concatenate([np.zeros(0, EVENT), *(events for index, events in seen if index == shard)])
        assert np.array_equal(outputs["seq"], np.arange(1, len(outputs) + 1))


def test_packets_in_one_loop_or_in_batches(tmp_path: Path) -> None:
    """Lost, late and waiting packets, also at the end: the loop that decodes and steps makes what the two by themselves make."""
    messages = [directory(5, "QQ"), *(order(k, b"B", k, 500_000 - k * 100, 5) for k in range(1, 40))]
    datagrams = [
        (10**18 + k * 1000, "239.1.1.1", 5000, b"SESSION001" + struct.pack(">QH", 1 + k, 1) + framed(message))
        for k, message in enumerate(messages)
        if k not in (7, 30)
    ]
    datagrams[3], datagrams[4] = datagrams[4], datagrams[3]
    write_pcap(tmp_path / "day.pcap", datagrams)
    config = config_of("itch50", "pcap")
    together = replay(config, [tmp_path / "day.pcap"])
    apart = replay(config, [tmp_path / "day.pcap"], observe=lambda shard, events: None)
    for summary in (together, apart):
        summary["source"].pop("seconds")
    assert together == apart
    assert together["messages"] == {"stock_directory": 1, "add_order": 37}
    assert together["gaps"] == [{"first": 8, "last": 8}, {"first": 31, "last": 31}]


def test_files_in_a_row_are_one_feed(tmp_path: Path) -> None:
    parts = [tmp_path / "a", tmp_path / "b"]
    cut = len(framed(directory(5, "QQ"), directory(6, "ZZ")))
    for path, raw in zip(parts, (DAY[:cut], DAY[cut:])):
        path.write_bytes(raw)
    summary = replay(config_of("itch50"), parts)
    assert (summary["instruments"]["QQ"], summary["source"]["bytes"]) == (QQ, len(DAY))


@pytest.mark.parametrize(
    ("chosen", "there"), [('symbols = ["Q*"]', {"QQ"}), ('exclude = ["Q*", "NONE"]', {"ZZ"}), ('symbols = ["ABC"]', set())]
)
def test_symbols(day: Path, chosen: str, there: set[str]) -> None:
    summary = replay(config_of("itch50", source=chosen), [day])
    assert (set(summary["instruments"]), summary["malformed"], summary["refused"]) == (there, {}, {})


@pytest.mark.parametrize(
    ("qty", "exponent", "text"), [(212033150, 8, "2.1203315"), (5, 0, "5"), (5, -2, "500"), (0, 8, "0"), (10**18, 18, "1")]
)
def test_quantities_are_exact(qty: int, exponent: int, text: str) -> None:
    assert quantity_text(qty, exponent) == text


def test_events_of_a_shard() -> None:
    table = InstrumentTable(8, 3)
    for k in range(6):
        table.intern(f"S{k}", shard=k % 3)
    events = np.zeros(7, EVENT)
    events["instrument"] = [0, 1, 2, 3, 4, 5, ALL_INSTRUMENTS]
    events["kind"] = Kind.GAP
    found: list[list[Any]] = [of_shard(events, table, shard, 3)["instrument"].tolist() for shard in range(3)]
    assert found == [[0, 3, ALL_INSTRUMENTS], [1, 4, ALL_INSTRUMENTS], [2, 5, ALL_INSTRUMENTS]]
    assert of_shard(events, table, 0, 1) is events
