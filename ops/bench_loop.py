"""The whole shard loop from ITCH bytes in memory: decode, an event per message, books, BBO, calculations, risk, output ring.

Against the conventional C++ book of :mod:`tickmesh.ops.bench_book`, which does decode and books alone. Runs alternate; numbers are medians
of thread CPU time per message, ratios medians of the ratios within a repeat. The steps between are measured too, so that one sees what
each part costs; the journal is added as a last step.

Run it: ``tickmesh bench loop``, or ``python -m tickmesh.ops.bench_loop``.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tickmesh.node.calculation import plan
from tickmesh.node.decoder import load_decoder, make_feed
from tickmesh.node.event import ANY_VIEW, EVENT, Kind
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.journal import Journal
from tickmesh.node.loops import replay_loop
from tickmesh.node.protocol import load_framing, load_spec
from tickmesh.node.risk import make_limits
from tickmesh.node.shard import BATCH_EVENTS, Shard, ShardPlan
from tickmesh.ops.bench_book import Image, Peer, write_image
from tickmesh.ops.cpp_peer import build_peer
from tickmesh.transports.ring import W_CLAIMED, W_PUBLISHED, Ring
from tickmesh.transports.toolbox import zeros_aligned

Result = dict[str, Any]
_TARGET = 1.3
_RING_EVENTS = 1 << 14
_CALCULATIONS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"use": "ema", "of": "bbo.mid", "window": 10},
    "vwap": {"use": "vwap"},
    "trend": {"use": "linear_regression", "of": "bbo.mid", "window": 32},
    "imbalance": {"use": "book_imbalance"},
}
_STRATEGY: Mapping[str, Mapping[str, Any]] = {
    "strategy": {"use": "cross_intent", "of": "bbo.microprice", "against": "fast", "qty": 100, "band": 0.02}
}
_QUIET = frozenset({Kind.REFERENCE, Kind.GAP, Kind.STATUS})
_FULL = frozenset({Kind.REFERENCE, Kind.GAP, Kind.STATUS, Kind.BBO, Kind.TRADE, Kind.SIGNAL, Kind.INTENT, Kind.RISK})

STAGES: Mapping[str, ShardPlan] = {
    "decode + book": ShardPlan((), _QUIET, False),
    "+ BBO and trades to the output ring": ShardPlan((), _QUIET | {Kind.BBO, Kind.TRADE}, False),
    "+ 4 calculations + risk": ShardPlan(tuple(plan({**_CALCULATIONS, **_STRATEGY})), _FULL, True),
}
"""Plans that are measured, each with what the one before has."""
WHOLE = list(STAGES)[-1]


class Contestant:
    """A shard of one plan, rebuilt from nothing for every run."""

    def __init__(self, shard_plan: ShardPlan, symbols: int) -> None:
        self._plan, self._symbols = shard_plan, symbols
        self._spec, self._framing = load_spec("itch50"), load_framing("binaryfile")
        decoder: Any = load_decoder(self._spec, self._framing)
        self._batch = zeros_aligned(BATCH_EVENTS, EVENT)
        self.shard = self._fresh()
        self._loop: Any = replay_loop(decoder, self.shard.module)

    def _fresh(self) -> Shard:
        ring = Ring.create(None, _RING_EVENTS, EVENT, mode="lossy")
        shard = Shard(self._plan, ring.arrays, instruments_max=self._symbols + 1)
        shard.arrays.limits[:] = np.repeat(make_limits(max_qty="1000", max_notional="1000000", price_collar_bps=50, max_rate=1000), 2)
        return shard

    def run_ns(self, image: Image, end: int) -> float:
        """Thread CPU time of one pass from empty books, in memory that has been touched by a pass before it."""
        arrays = self.shard.arrays
        states = [array for name, array in zip(arrays._fields, arrays) if name[0] == "s" and name[1:].isdigit()]
        for part in (*arrays.books, arrays.core, arrays.info, arrays.statistics, *states):
            if isinstance(part, np.ndarray):
                part.view(np.uint8)[:] = 0
        arrays.counts[:] = 0
        arrays.out.words[[W_PUBLISHED, W_CLAIMED]] = 0
        feed = make_feed(self._spec, InstrumentTable(self._symbols + 1), framing=self._framing)
        begun = time.thread_time_ns()
        self._loop.replay(image, 0, end, 0, feed, self._batch, self._batch.view(ANY_VIEW), arrays)
        return time.thread_time_ns() - begun


def journal_ns(events: int = 1_000_000) -> float:
    """Thread CPU time per event of appending to a journal on disk, as the shard's thread does it."""
    batch = zeros_aligned(BATCH_EVENTS, EVENT)
    batch["id"] = np.arange(BATCH_EVENTS)
    with tempfile.TemporaryDirectory() as folder, Journal.create(Path(folder) / "journal", 0, sync="none") as journal:
        journal.append(batch)
        begun = time.thread_time_ns()
        for _ in range(events // BATCH_EVENTS):
            journal.append(batch)
        return (time.thread_time_ns() - begun) / events


def bench_loop(messages: int = 4_000_000, symbols: int = 400, repeats: int = 7) -> Result:
    """Measure and compare.

    Returns:
        ``{"messages", "symbols", "repeats", "rows", "ns_per_message": {stage: median}, "outputs": per pass, "journal_ns_per_event"}``.

    Raises:
        FileNotFoundError: there is no g++ for the peer.
    """
    image, end = write_image(messages, symbols)
    contestants = {name: Contestant(stage, symbols) for name, stage in STAGES.items()}
    peer = Peer(build_peer("book_peer.cpp", "g++"), "conventional", symbols, messages)
    runs: dict[str, Callable[[Image, int], float]] = {"C++": peer.book_ns, **{name: c.run_ns for name, c in contestants.items()}}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(image, end)
    for repeat in range(repeats):
        for name in runs if repeat % 2 == 0 else reversed(runs):
            samples[name].append(runs[name](image, end) / messages)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    ratio = statistics.median(theirs / ours for theirs, ours in zip(samples["C++"], samples[WHOLE]))
    row = {
        "name": "ITCH to signals and risk decisions in the output ring", "unit": "ns per message", "ours": medians[WHOLE],
        "theirs": medians["C++"], "peer": "conventional C++ book, decode and book alone (g++)", "ratio": ratio, "target": _TARGET,
    }  # fmt: skip
    counts = contestants[WHOLE].shard.event_counts()
    return {
        "messages": messages, "symbols": symbols, "repeats": repeats, "rows": [row], "ns_per_message": medians, "events_of_a_pass": counts,
        "journal_ns_per_event": journal_ns(), "skipped": {},
    }  # fmt: skip


if __name__ == "__main__":
    json.dump(bench_loop(*(int(word) for word in sys.argv[1:])), sys.stdout, indent=2)
