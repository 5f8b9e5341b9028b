"""Decoder and books on simulated feeds: what they make of the bytes is what the exchange itself knows."""

from __future__ import annotations

import numpy as np
import pytest

from tickmesh.node import book, decoder
from tickmesh.node.event import EVENT, Flag, Kind
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.protocol import load_framing, load_spec
from tickmesh.ops.simulated_lines import FaultConfig, LineConfig, SimulatedLines
from tickmesh.ops.simulator import Simulator, SimulatorConfig
from tickmesh.transports.capture import PACKET

CONFIG = SimulatorConfig(seed=21, symbols=5, messages=30_000, halts_per_million=300, breaks_per_million=300, halt_messages=2000)


class Pipeline:
    """One decoder, its books, and the trades it saw."""

    def __init__(self, framing_name: str, start_sequence: int = 0) -> None:
        self.spec, framing = load_spec("itch50"), load_framing(framing_name)
        self.decode = decoder.load_decoder(self.spec, framing)
        self.instruments = InstrumentTable(64)
        self.feed = decoder.make_feed(self.spec, self.instruments, framing=framing, start_sequence=start_sequence, gap_wait_ns=50_000_000)
        self.books = book.make_books(64, 1 << 14)
        self.out = np.zeros(512, EVENT)
        self.trades = np.zeros((64, 2), np.int64)
        self.gaps = 0

    def apply(self, n: int) -> None:
        events = self.out[:n]
        results = np.zeros(n, np.int64)
        book.apply_events(self.books, events, results, np.zeros(0, EVENT))
        assert not results.any(), (events[results != 0], results[results != 0])
        self.gaps += int(np.count_nonzero(events["kind"] == Kind.GAP))
        printed = (events["flags"] & Flag.NON_PRINTABLE) == 0
        traded = np.isin(events["kind"], (Kind.EXECUTE, Kind.TRADE)) & printed
        assert (events["qty"][traded] > 0).all(), "a cross that did not take place is no trade"
        np.add.at(self.trades[:, 0], events["instrument"][traded], 1)
        np.add.at(self.trades[:, 1], events["instrument"][traded], events["qty"][traded])

    def truth(self, symbol: str, depth: int = 10_000) -> dict[str, object]:
        instrument = self.instruments.find(symbol)
        assert instrument is not None
        bids, asks = book.top(self.books, instrument, depth)
        return {
            "bids": [[price // 100_000, qty, orders] for price, qty, orders in bids],
            "asks": [[price // 100_000, qty, orders] for price, qty, orders in asks],
            "orders": book.resting_orders(self.books, instrument),
            "trades": int(self.trades[instrument, 0]),
            "volume": int(self.trades[instrument, 1]),
        }


def agree(pipeline: Pipeline, simulator: Simulator) -> None:
    for symbol, expected in simulator.truth(10_000).items():
        found = pipeline.truth(symbol)
        assert found == {key: expected[key] for key in found}, symbol
    assert not any(count for name, count in book.counts(pipeline.books).items() if name in {r.name.lower() for r in book.Refusal})
    assert decoder.malformed(pipeline.feed) == {}


HALTED_AT_THE_CLOSE = SimulatorConfig(seed=11, symbols=6, rate=10_000, messages=6000)
"""One of its symbols is halted when the market closes: its closing cross has no shares and no price."""


@pytest.mark.parametrize("config", [CONFIG, HALTED_AT_THE_CLOSE], ids=["halts", "halted at the close"])
def test_stream_decoder_and_books_equal_the_exchange(config: SimulatorConfig) -> None:
    simulator, pipeline = Simulator(config), Pipeline("binaryfile")
    while not simulator.finished:
        image, end = simulator.next_block(3000)
        pos = 0
        while pos < end:
            pos, n = pipeline.decode.decode_stream(image, pos, end, 0, pipeline.feed, pipeline.out)
            pipeline.apply(n)
        if simulator.messages > 200:
            agree(pipeline, simulator)
    assert sum(decoder.message_counts(pipeline.feed, pipeline.spec).values()) == config.messages
    assert any(about["status"] != "T" for about in simulator.truth(1).values()) == (config is HALTED_AT_THE_CLOSE)


@pytest.mark.parametrize("faults", [FaultConfig(), FaultConfig(duplicate=0.1, reorder=0.1)])
def test_packet_decoder_and_books_equal_the_exchange(faults: FaultConfig) -> None:
    """Nothing is lost: line B is whole, line A loses a tenth."""
    lossy = FaultConfig(loss=0.1, duplicate=faults.duplicate, reorder=faults.reorder)
    lines = SimulatedLines(Simulator(CONFIG), LineConfig(faults=(lossy, faults)))
    pipeline = Pipeline("moldudp64", start_sequence=1)
    for batch in lines.batches():
        packets = batch.packets()
        assert packets.dtype == PACKET
        first = 0
        while True:
            first, n = pipeline.decode.decode_packets(batch.buffer, packets, first, len(packets), pipeline.feed, pipeline.out)
            pipeline.apply(n)
            if first == len(packets) and n == 0:
                break
    agree(pipeline, lines.simulator)
    assert pipeline.gaps == 0
    assert decoder.arbitration(pipeline.feed)["missing"] == 0
