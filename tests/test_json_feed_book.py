"""Events of the Python decoders on the compiled book: nothing is refused, and the book is the venue's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tickmesh.control.config import parse_config
from tickmesh.node.book import Books, apply_events, make_books, top
from tickmesh.node.csv_feed import lobster_events
from tickmesh.node.event import ASK, BID, EVENT, EventArray, scaled
from tickmesh.node.event_batch import EventBatch
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.venues import venue_feed
from tickmesh.transports.recording import read_lines

DATA = Path(os.environ.get("TICKMESH_DATA", Path(__file__).parents[1] / "../shared/data"))
pytestmark = pytest.mark.skipif(not DATA.exists(), reason=f"no recordings at {DATA}; set TICKMESH_DATA")


def applied(events: EventArray, table: InstrumentTable) -> Books:
    books, results = make_books(8, 1 << 14), np.zeros(len(events), np.int64)
    for instrument in range(len(table)):
        books.ticks[instrument] = table.record(instrument)["tick_size"]
    apply_events(books, events, results, np.zeros(0, EVENT))
    assert not np.any(results < 0)
    return books


@pytest.mark.parametrize(
    ("data_format", "path"),
    [
        ("binance", "binance_spot_btcusdt/btcusdt_20240808.gz"),
        ("okx", "cryptofeed_ws/OKX.ws.1.0"),
        ("bybit", "bybit_ob500/xrpusdt-ob500.data.zip"),
    ],
)
def test_venue_feeds(data_format: str, path: str) -> None:
    text = f'[data_sources.s]\ntype = "file"\npath = "x"\ndata_format = "{data_format}"\n'
    table, batch = InstrumentTable(8), EventBatch(1 << 18)
    feed = venue_feed(parse_config(text).data_sources["s"], table)
    for recv_ns, payload in read_lines(DATA / path):
        feed.feed(payload, recv_ns, batch)
    books = applied(batch.take(), table)
    for instrument in range(len(table)):
        bids, asks = top(books, instrument, 1)
        assert bids[0][0] < asks[0][0]
    if data_format == "binance":
        expected = json.loads((DATA / "binance_spot_btcusdt/expected.json").read_text())["final_top10"]
        sides = top(books, 0, 10)
        for side, name in ((BID, "bids"), (ASK, "asks")):
            assert [level[:2] for level in sides[side]] == [(scaled(p, 9), scaled(q, 8)) for p, q in expected[name]]


def test_lobster() -> None:
    folder = DATA / "lobster_aapl_998"
    options = parse_config('[data_sources.s]\ntype = "file"\npath = "x"\ndata_format = "lobster"\n').data_sources["s"]
    table = InstrumentTable(2)
    path = next(folder.glob("*_message_10.csv"))
    ((_, events),) = [(feed, e.copy()) for feed, e in lobster_events(path, options, table, EventBatch())]
    bids, asks = top(applied(events, table), 0, 10)
    last = [int(cell) for cell in next(folder.glob("*_orderbook_10.csv")).read_text().split()[-1].split(",")]
    assert [level[:2] for level in asks] == [(last[i] * 100_000, last[i + 1]) for i in range(0, 40, 4)]
    assert [level[:2] for level in bids] == [(last[i] * 100_000, last[i + 1]) for i in range(2, 40, 4)]
