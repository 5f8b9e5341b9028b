"""Real recordings, and shards to run them through: shared by the tests of the whole pipeline."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tickmesh.control.config import Config, parse_config
from tickmesh.node.event import ANY_VIEW, EVENT, EventArray
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.pipeline import make_shards, make_table
from tickmesh.node.reader import Reader, open_reader
from tickmesh.node.shard import BATCH_EVENTS, Shard
from tickmesh.transports.ring import Ring

DATA = Path(os.environ.get("TICKMESH_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))
ES = "dbn_esm4_mbo/orderbooks_mbo_2024-05-08T00-00-00_2024-05-08T00-00-02.dbn.zst"
BINANCE = "binance_spot_btcusdt/btcusdt_20240808.gz"
OKX = "cryptofeed_ws/OKX.ws.1.0"
BYBIT = "bybit_ob500/xrpusdt-ob500.data.zip"
LOBSTER = "lobster_aapl_998/AAPL_2012-06-21_34200000_57600000_message_10.csv"
LOBSTER_BOOKS = LOBSTER.replace("_message_", "_orderbook_")


def recording(path: str) -> Path:
    """A real recording; the test is skipped where there is none."""
    if not (DATA / path).exists():
        pytest.skip(f"no recording {DATA / path}; set TICKMESH_DATA")
    return DATA / path


def config_text(data_format: str, type: str = "file", more: str = "", source: str = "", path: str = "unused") -> str:
    """A configuration with one source, `feed`; `more` is put after it, `source` into it."""
    return f'[data_sources.feed]\ntype = "{type}"\npath = "{path}"\ndata_format = "{data_format}"\n{source}\n{more}'


def config_of(data_format: str, type: str = "file", more: str = "", source: str = "") -> Config:
    """That configuration, parsed."""
    return parse_config(config_text(data_format, type, more, source))


@dataclass
class Line:
    """A pipeline without threads: a reader, one shard per ring, and their readers."""

    reader: Reader
    table: InstrumentTable
    shards: list[Shard]
    rings: list[Ring]
    outputs: list[Any]

    def step(self, events: EventArray, shard: int = 0) -> EventArray:
        """Run events through a shard; returns its outputs. The events are completed in place."""
        parts = [
            self._step(events.view(ANY_VIEW), first, min(first + BATCH_EVENTS, len(events)), shard)
            for first in range(0, len(events), BATCH_EVENTS)
        ]
        return np.concatenate([np.zeros(0, EVENT), *parts])

    def _step(self, view: Any, first: int, end: int, shard: int) -> EventArray:
        assert self.shards[shard].step(view, first, end) == end - first
        taken: EventArray = self.outputs[shard].read(1 << 16).copy()
        return taken


def line_of(config: Config, path: Path, table: InstrumentTable | None = None) -> Line:
    """The parts of :func:`tickmesh.node.replay.replay`, to be stepped by hand."""
    table = table or make_table(config)
    reader = open_reader("feed", config.data_sources["feed"], [path], table)
    rings = [Ring.create(None, 1 << 16, EVENT, mode="lossy") for _ in range(config.cluster.shards)]
    outputs = [ring.reader("test") for ring in rings]
    return Line(reader, table, make_shards(config, rings, Path(), reader.order_ids), rings, outputs)


def batches(reader: Reader, size: int = 4096) -> Iterator[EventArray]:
    """A reader's events."""
    batch = np.zeros(size, EVENT)
    while count := reader.read(batch):
        yield batch[:count].copy()


def all_events(reader: Reader) -> EventArray:
    """A reader's events in one array."""
    return np.concatenate([np.zeros(0, EVENT), *batches(reader)])
