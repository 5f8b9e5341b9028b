"""Replay of real recordings, against what the venues themselves and independent tools say about them."""

from __future__ import annotations

import json
import subprocess
import sys
from bisect import bisect_right
from decimal import Decimal
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from replays import BINANCE, BYBIT, DATA, ES, LOBSTER, LOBSTER_BOOKS, OKX, all_events, config_of, config_text, line_of, recording

from tickmesh.node.book import counts, levels_count, resting_orders, top
from tickmesh.node.csv_feed import LobsterFeed
from tickmesh.node.event import QUOTE, EventArray, Flag, Kind, scaled
from tickmesh.node.event_batch import EventBatch
from tickmesh.node.replay import replay
from tickmesh.node.venues import venue_feed
from tickmesh.transports.recording import read_lines

KEYS = {"source", "messages", "malformed", "refused", "gaps", "duplicates", "events", "instruments"}
INSTRUMENT_KEYS = {"trades", "volume", "vwap", "first_bbo", "last_bbo", "bids", "asks", "signals"}


def expected_of(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(recording(f"{folder}/expected.json").read_text())
    return found


def summary_of(data_format: str, *paths: Path, type: str = "file", **options: Any) -> dict[str, Any]:
    summary = replay(config_of(data_format, type), list(paths), **options)
    assert summary.keys() == KEYS
    assert json.loads(json.dumps(summary)) == summary
    assert summary["source"].keys() == {"format", "bytes", "messages_total", "seconds"}
    for about in summary["instruments"].values():
        assert about.keys() == INSTRUMENT_KEYS
    return summary


def observed(data_format: str, path: Path, type: str = "file") -> tuple[dict[str, Any], EventArray]:
    """A summary made by way of `observe`, and all outputs."""
    outputs: list[EventArray] = []
    summary = replay(config_of(data_format, type), [path], observe=lambda _, events: outputs.append(events.copy()))
    return summary, np.concatenate(outputs)


def without_seconds(summary: dict[str, Any]) -> dict[str, Any]:
    return {**summary, "source": {**summary["source"], "seconds": 0}}


# ---------------------------------------------------------------- CME, market by order


def es_levels(rows: list[list[Any]]) -> list[list[Any]]:
    """expected.json's [price, qty, orders] as the summary writes them."""
    return [[str(Decimal(str(price)).normalize()), str(qty), orders] for price, qty, orders in rows]


def test_es_summary() -> None:
    expected = expected_of("dbn_esm4_mbo")
    summary = summary_of("dbn_mbo", recording(ES))
    assert summary["source"]["format"] == "dbn_mbo"
    assert summary["source"]["messages_total"] == expected["records"]
    assert {name.removeprefix("mbo."): n for name, n in summary["messages"].items()} == expected["actions"]
    assert (summary["malformed"], summary["refused"], summary["gaps"], summary["duplicates"]) == ({}, {}, [], 0)
    es = summary["instruments"]["ESM4"]
    trades = expected["trades"]
    assert (es["trades"], es["volume"], es["vwap"]) == (trades["count"], str(trades["volume"]), trades["vwap"])
    assert es["bids"] == es_levels(expected["final_top10"]["bids"])
    assert es["asks"] == es_levels(expected["final_top10"]["asks"])
    assert es["last_bbo"] == [*es["bids"][0][:2], *es["asks"][0][:2]]


def test_es_checkpoints() -> None:
    expected = expected_of("dbn_esm4_mbo")
    line = line_of(config_of("dbn_mbo"), recording(ES))
    events, books = all_events(line.reader), line.shards[0].arrays.books
    done = 0
    for point in expected["checkpoints"]:
        end = point["record_index"] + 1  # the instrument's definition comes first
        line.step(events[done:end])
        done = end
        bids, asks = top(books, 0, 1)
        found = [[bids[0][0] / 1e9, bids[0][1]], [asks[0][0] / 1e9, asks[0][1]] if asks else None]
        assert (found, resting_orders(books)) == (point["bbo"], point["orders"]), point["record_index"]
    line.step(events[done:])
    assert resting_orders(books) == resting_orders(books, 0) == expected["resting_orders"]
    assert levels_count(books, 0) == (expected["bid_levels"], expected["ask_levels"])
    assert counts(books)["crossed_bbos"] == expected["crossed_or_locked_at_F_LAST"]


def test_es_best_bid_and_offer_after_the_first_update() -> None:
    summary, outputs = observed("dbn_mbo", recording(ES))
    assert without_seconds(summary) == without_seconds(summary_of("dbn_mbo", recording(ES)))
    bbos = outputs[outputs["kind"] == Kind.BBO].view(QUOTE)
    first = expected_of("dbn_esm4_mbo")["first_bbo_after_first_incremental_event"]
    at = int(np.flatnonzero(bbos["ts_event"] == first["ts_event"])[0])
    assert [bbos[at]["bid"] / 1e9, bbos[at]["bid_qty"]] == first["bid"]
    assert [bbos[at]["ask"] / 1e9, bbos[at]["ask_qty"]] == first["ask"]
    assert not np.any(bbos["flags"] & (Flag.CROSSED | Flag.LOCKED | Flag.STALE))
    assert np.array_equal(outputs["seq"], np.arange(1, len(outputs) + 1))


def test_es_twice_in_a_row_is_the_same_market_twice() -> None:
    once, twice = summary_of("dbn_mbo", recording(ES)), summary_of("dbn_mbo", recording(ES), recording(ES))
    assert twice["messages"] == {name: 2 * n for name, n in once["messages"].items()}
    assert (twice["malformed"], twice["refused"]) == ({}, {})
    a, b = once["instruments"]["ESM4"], twice["instruments"]["ESM4"]
    assert (b["bids"], b["asks"], b["last_bbo"], b["trades"]) == (a["bids"], a["asks"], a["last_bbo"], 2 * a["trades"])


@pytest.mark.parametrize("chosen", ['symbols = ["NQ*"]', 'exclude = ["ES*"]'])
def test_es_filtered_away(chosen: str) -> None:
    summary = replay(config_of("dbn_mbo", source=chosen), [recording(ES)])
    assert (summary["instruments"], summary["malformed"], summary["refused"]) == ({}, {}, {})
    assert summary["source"]["messages_total"] == expected_of("dbn_esm4_mbo")["records"]


# ---------------------------------------------------------------- Binance, by level


def normal(levels: list[list[str]]) -> list[list[Any]]:
    return [[format(Decimal(p).normalize(), "f"), format(Decimal(q).normalize(), "f"), 0] for p, q in levels]


def test_binance_summary() -> None:
    expected = expected_of("binance_spot_btcusdt")
    summary = summary_of("binance", recording(BINANCE))
    messages = expected["messages"]
    assert summary["messages"] == {name: messages[key] for name, key in
                                   (("depthUpdate", "depth"), ("bookTicker",) * 2, ("trade",) * 2, ("snapshot",) * 2)}  # fmt: skip
    assert (summary["malformed"], summary["refused"], summary["gaps"]) == ({}, {}, [])
    btc = summary["instruments"]["BTCUSDT"]
    trades = expected["trades"]
    assert (btc["trades"], Decimal(btc["volume"])) == (trades["count"], Decimal(trades["volume"]))
    assert btc["vwap"] == pytest.approx(float(trades["vwap"]), rel=1e-12)
    assert btc["bids"] == normal(expected["final_top10"]["bids"])
    assert btc["asks"] == normal(expected["final_top10"]["asks"])


def test_binance_best_bid_and_offer_is_the_venues() -> None:
    expected = expected_of("binance_spot_btcusdt")
    line = line_of(config_of("binance"), recording(BINANCE))
    events, books = all_events(line.reader), line.shards[0].arrays.books
    quotes = events[events["kind"] == Kind.QUOTE].view(QUOTE)
    ids = quotes["seq"].tolist()
    theirs = list(zip(*(quotes[name].tolist() for name in ("bid", "bid_qty", "ask", "ask_qty"))))
    flags = events["flags"]
    ends = np.flatnonzero((events["kind"] == Kind.LEVEL) & (flags & (Flag.MORE | Flag.SNAPSHOT) == 0)) + 1
    done = equal = 0
    for end in ends.tolist():
        line.step(events[done:end])
        done = end
        bids, asks = top(books, 0, 1)
        equal += theirs[bisect_right(ids, int(events[end - 1]["seq"])) - 1] == (*bids[0][:2], *asks[0][:2])
    assert len(ends) == expected["messages"]["applied"]
    assert equal >= 3448


# ---------------------------------------------------------------- OKX, by level with checksums


def test_okx_books_of_the_shard_have_the_venues_checksums() -> None:
    config = config_of("okx")
    line = line_of(config, recording(OKX))
    feed, batch, books = venue_feed(config.data_sources["feed"], line.table), EventBatch(), line.shards[0].arrays.books
    texts: dict[tuple[str, str, int], tuple[str, str]] = {}
    checked = 0
    for recv_ns, payload in read_lines(recording(OKX)):
        feed.feed(payload, recv_ns, batch)
        line.step(batch.take())
        message = json.loads(payload)
        if message.get("arg", {}).get("channel") != "books" or "data" not in message:
            continue
        symbol, (entry,) = message["arg"]["instId"], message["data"]
        for side in ("bids", "asks"):
            texts.update({(symbol, side, scaled(price, 9)): (price, qty) for price, qty, *_ in entry[side]})
        sides = dict(zip(("bids", "asks"), top(books, line.table.find(symbol) or 0, 25)))
        best = {side: [texts[symbol, side, price] for price, *_ in levels] for side, levels in sides.items()}
        words = [":".join(level) for k in range(25) for side in ("bids", "asks") for level in best[side][k : k + 1]]
        assert crc32(":".join(words).encode()) == entry["checksum"] & 0xFFFFFFFF
        checked += 1
    assert checked == 290


def test_okx_summary() -> None:
    summary = summary_of("okx", recording(OKX))
    assert (summary["malformed"], summary["refused"], summary["gaps"]) == ({}, {}, [])
    assert summary["messages"]["books"] == 290
    assert summary["instruments"].keys() == {"BTC-USD-220527", "UNI-USD-SWAP", "BTC-USDT"}
    for about in summary["instruments"].values():
        assert Decimal(about["bids"][0][0]) < Decimal(about["asks"][0][0])
        assert about["last_bbo"] == [*about["bids"][0][:2], *about["asks"][0][:2]]


# ---------------------------------------------------------------- Bybit, in a zip


def test_bybit_summary() -> None:
    summary = summary_of("bybit", recording(BYBIT), depth=1000)
    assert summary["messages"] == {"orderbook": 50}
    assert (summary["malformed"], summary["refused"], summary["gaps"]) == ({}, {}, [])
    sides: dict[str, dict[Decimal, Decimal]] = {"b": {}, "a": {}}
    for _, payload in read_lines(recording(BYBIT)):
        message = json.loads(payload)
        for side, levels in sides.items():
            if message["type"] == "snapshot":
                levels.clear()
            for price, qty in message["data"][side]:
                levels[Decimal(price)] = Decimal(qty)
    xrp = summary["instruments"]["XRPUSDT"]
    for name, side, downwards in (("bids", "b", True), ("asks", "a", False)):
        wanted = sorted(((p, q) for p, q in sides[side].items() if q), reverse=downwards)
        assert [(Decimal(p), Decimal(q)) for p, q, _ in xrp[name]] == wanted


# ---------------------------------------------------------------- LOBSTER, with the book after every message


def shown_sides(row: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Bids and asks of a row of the book file, price in 1e-9."""
    cells = [int(cell) for cell in row.split(",")]
    asks, bids = (([(cells[i] * 100_000, cells[i + 1]) for i in range(at, len(cells), 4)]) for at in (0, 2))
    return bids, asks


def test_lobster_summary() -> None:
    bids, asks = shown_sides(recording(LOBSTER_BOOKS).read_text().split()[-1])
    summary = summary_of("lobster", recording(LOBSTER))
    assert (summary["malformed"], summary["refused"], summary["gaps"]) == ({}, {}, [])
    aapl = summary["instruments"]["AAPL"]
    for name, wanted in (("bids", bids), ("asks", asks)):
        assert [(scaled(price, 9), int(qty)) for price, qty, _ in aapl[name]] == wanted
    assert aapl["trades"] == summary["messages"]["execute"] + summary["messages"]["execute_hidden"]


def test_lobster_book_after_every_message() -> None:
    config = config_of("lobster")
    line = line_of(config, recording(LOBSTER))
    feed, batch, books = LobsterFeed(config.data_sources["feed"], line.table, "AAPL"), EventBatch(), line.shards[0].arrays.books
    rows = list(zip(recording(LOBSTER).read_bytes().split(), recording(LOBSTER_BOOKS).read_text().split(), strict=True))
    for number, (message, row) in enumerate(rows):
        feed.feed(message, batch, row.encode())
        line.step(batch.take())
        assert tuple([level[:2] for level in side] for side in top(books, 0, 10)) == shown_sides(row), number
    assert len(rows) >= 998
    assert line.shards[0].arrays.core[0]["refused"] == 0


# ---------------------------------------------------------------- packets: NASDAQ ITCH over MoldUDP64, IEX DEEP+

PCAPS = DATA / "omi_pcaps"
ITCH = sorted(PCAPS.glob("Nasdaq/*TotalView*/*.pcap"))
IEX = sorted(PCAPS.glob("Iex/DeepPlus*/*.pcap"))


@pytest.mark.skipif(not ITCH, reason=f"no captures in {PCAPS}; set TICKMESH_DATA")
@pytest.mark.parametrize(("data_format", "paths"), [("itch50", ITCH), ("iex_deep_plus", IEX)])
def test_packet_captures(data_format: str, paths: list[Path]) -> None:
    seen: set[str] = set()
    for path in paths:
        summary = summary_of(data_format, path, type="pcap")
        assert summary["malformed"] == {}, path
        assert summary["source"]["messages_total"] == sum(summary["messages"].values()) > 0
        assert summary["source"]["bytes"] == path.stat().st_size
        seen |= summary["messages"].keys()
        ordinary, outputs = observed(data_format, path, type="pcap")
        assert without_seconds(ordinary) == without_seconds(summary)
        assert np.array_equal(outputs["seq"], np.arange(1, len(outputs) + 1))
    if data_format == "itch50":
        assert {"add_order", "add_order_mpid", "order_executed", "order_delete", "order_replace", "trade", "system_event"} <= seen
    else:
        assert {"add_order", "order_modify", "order_delete", "order_executed", "trade", "security_directory"} <= seen


@pytest.mark.skipif(not IEX, reason=f"no captures in {PCAPS}; set TICKMESH_DATA")
def test_several_captures_are_one_recording() -> None:
    together = summary_of("itch50", *ITCH[:4], type="pcap")
    apart = [summary_of("itch50", path, type="pcap") for path in ITCH[:4]]
    assert together["source"]["bytes"] == sum(s["source"]["bytes"] for s in apart)
    assert together["malformed"] == {}


# ---------------------------------------------------------------- the command


def test_the_command_gives_the_same_summary(tmp_path: Path) -> None:
    config = tmp_path / "es.toml"
    config.write_text(config_text("dbn_mbo"))
    command = [sys.executable, "-m", "tickmesh.ops.cli", "replay", str(recording(ES)), "--config", str(config), "--json", "--depth", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert without_seconds(json.loads(done.stdout)) == without_seconds(summary_of("dbn_mbo", recording(ES), depth=3))
