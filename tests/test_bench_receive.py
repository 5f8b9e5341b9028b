"""The benchmark of receive paths: what it times is what had to come, it says so when it is not, and it leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from veth import needs_namespaces

from tickmesh.node.event import EVENT, EventArray, Kind
from tickmesh.ops import bench_receive as bench
from tickmesh.ops.namespaces import _spaces
from tickmesh.ops.stamped_orders import OPENING, ORDERS, QTY, STAMP_MASK, Ages, WrongOutputs, best_prices, checked_bbos, content

PACKETS = 20
SENT_NS = (1 << 48) + 5_000
"""More than 78 hours after the start of the host: ITCH's times have begun anew."""


def run_of_outputs() -> tuple[EventArray, Ages]:
    """Outputs as a shard makes them, a signal after every BBO, and when the packets were sent."""
    orders = ORDERS * (OPENING + PACKETS)
    outputs, times = np.zeros(2 * orders, EVENT), np.zeros((PACKETS, 2), np.int64)
    times[:, 0] = SENT_NS + 1000 * np.arange(PACKETS)
    times[:, 1] = times[:, 0] + 100
    outputs["seq"] = np.arange(1, len(outputs) + 1)
    outputs["kind"] = np.tile([Kind.BBO, Kind.SIGNAL], orders)
    replaced = outputs[2 * ORDERS * OPENING :]
    bids, asks = best_prices(PACKETS)
    replaced["price"], replaced["aux"] = np.repeat(bids, 2), np.repeat(asks, 2)
    replaced["qty"] = replaced["id"] = QTY
    sent = np.stack([times[:, 0], times[:, 0] + 40], axis=1).ravel() & STAMP_MASK
    replaced["ts_event"] = np.repeat(sent, 2)
    return outputs, times


def test_outputs_that_are_as_the_orders_say() -> None:
    outputs, times = run_of_outputs()
    places = checked_bbos("a way", outputs, times)
    assert places.tolist() == list(range(2 * ORDERS * OPENING, len(outputs), 2))
    again = outputs.copy()
    again["ts_event"] += 7
    assert content(again) == content(outputs)
    again["qty"][-1] += 1
    assert content(again) != content(outputs)


def _without_the_last_bbo(outputs: EventArray) -> EventArray:
    return outputs[:-2]


def _changed(field: str, place: int, by: int) -> Callable[[EventArray], EventArray]:
    def change(outputs: EventArray) -> EventArray:
        outputs[field][place] += by
        return outputs

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_without_the_last_bbo, "55 of 56 BBOs"),
        (_changed("seq", 3, 1), "missing or doubled"),
        (_changed("price", -2, 1), "other prices"),
        (_changed("aux", -4, 1), "other prices"),
        (_changed("id", -2, 1), "other quantities"),
        (_changed("ts_event", -4, 1), "another time than it was sent with"),
        (_changed("ts_event", -2, 61), "did not leave while it was sent"),
        (_changed("ts_event", -2, -41), "did not leave while it was sent"),
        (_changed("ts_event", -1, 1), "another time than its order"),
    ],
)
def test_outputs_that_are_not(change: Callable[[EventArray], EventArray], what: str) -> None:
    outputs, times = run_of_outputs()
    with pytest.raises(WrongOutputs, match=what) as raised:
        checked_bbos("a way", change(outputs), times)
    assert raised.value.way == "a way"


def test_histograms() -> None:
    ages = np.array([0, 1, 2, 3, 1023, 1024, 2047, 2048, (1 << 40) + 1])
    assert bench.histogram(ages) == {1: 2, 2: 2, 512: 1, 1024: 2, 2048: 1, 1 << 40: 1}
    assert list(bench.histogram_lines("wire to event", {"one": {1024: 12_345}, "another": {512: 1, 1024: 2}})) == [
        "",
        "wire to event, datagrams of all repeats by time",
        "from ns  below     one  another",
        "    512  1,024       0        1",
        "  1,024  2,048  12,345        2",
    ]


@pytest.mark.slow
@needs_namespaces
def test_a_run() -> None:
    """All ways; every output is checked in the run itself."""
    packets, before = 200, _spaces()
    result = bench.bench_receive(packets, 4_000, 1)
    assert result["measured"].keys() == bench.WAYS.keys()
    kept = packets - packets // 10
    for title in ("wire to event", "wire to output"):
        assert {name: sum(counts.values()) for name, counts in result["histograms"][title].items()} == dict.fromkeys(bench.WAYS, kept)
    for found in result["measured"].values():
        assert 0 < found["wire_p50"][0] < found["output_p50"][0] <= found["output_p99"][0] <= found["output_p999"][0]
        assert found["wire_p50"][0] < found["send_p50"][0]
    assert {row["name"] for row in result["rows"]} >= {"wire to output, p99.9: AF_XDP, generic", "wire to event, p50: packet ring"}
    assert "wire to output, datagrams of all repeats by time" in result["lines"]
    assert _spaces() == before


@pytest.mark.slow
@needs_namespaces
def test_wrong_outputs_end_it_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _spaces()
    monkeypatch.setattr(bench, "WAYS", {"recvmmsg": bench.WAYS["recvmmsg"]})
    monkeypatch.setattr("tickmesh.ops.stamped_orders.best_prices", lambda packets: [prices + 1 for prices in best_prices(packets)])
    with pytest.raises(WrongOutputs, match="recvmmsg: a BBO has other prices"):
        bench.bench_receive(50, 4_000, 1)
    assert _spaces() == before
