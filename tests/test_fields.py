"""Field mappings: exact conversions, refusals at load, and recorded JSON of venues that have no decoder of their own."""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from dict_book import DictBook, books_of
from hypothesis import given
from hypothesis import strategies as st

from tickmesh.control.config import Checks, ConfigError, Source, parse_config
from tickmesh.node.event import ASK, BID, NO_PRICE, EventArray, Flag, Kind, TradingStatus, scaled
from tickmesh.node.event_batch import EventBatch
from tickmesh.node.fields import EACH, BadRecord, MappingError, check_source, compile_mappings, iso8601_ns, parse_path
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.json_feed import VenueFeed
from tickmesh.node.venues import venue_feed
from tickmesh.transports.recording import read_lines

DATA = Path(os.environ.get("TICKMESH_DATA", Path(__file__).parents[1] / "../shared/data")) / "cryptofeed_ws"
HOWTO = (Path(__file__).parents[1] / "docs/howto/add-a-source.md").read_text()


def options(body: str) -> Source:
    return parse_config(f'[data_sources.s]\ntype = "file"\npath = "x"\ndata_format = "json"\n{body}').data_sources["s"]


def make(body: str) -> VenueFeed:
    return venue_feed(options(body), InstrumentTable(64))


def send(feed: VenueFeed, *records: Any) -> EventArray:
    batch = EventBatch(1 << 17)
    for record in records:
        feed.feed(record if isinstance(record, bytes) else json.dumps(record).encode(), 9, batch)
    return batch.take()


def recorded(feed: VenueFeed, name: str) -> EventArray:
    if not (DATA / name).exists():
        pytest.skip(f"no recording {DATA / name}; set TICKMESH_DATA")
    batch = EventBatch(1 << 18)
    for recv_ns, payload in read_lines(DATA / name):
        feed.feed(payload, recv_ns, batch)
    return batch.take()


# ---------------------------------------------------------------- paths and conversions


def test_paths() -> None:
    assert parse_path("data.p") == ("data", "p")
    assert parse_path("b[].0") == ("b", EACH, 0)
    assert parse_path("k[3].c") == ("k", 3, "c")
    assert parse_path("[].x") == (EACH, "x")
    for bad in ("", ".", "a..b", "a[", "a]b", "a[x]", "a[][]", "a[].b[]"):
        with pytest.raises(ValueError, match=r"is not a path|more than one"):
            parse_path(bad)


@given(st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1)), st.integers(0, 999_999_999), st.integers(-14 * 60, 14 * 60))
def test_iso_times_are_exact(moment: datetime, nanoseconds: int, zone_minutes: int) -> None:
    moment = moment.replace(microsecond=0)
    seconds = int((moment.replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds())
    text = f"{moment:%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}"
    zone = f"{'-' if zone_minutes < 0 else '+'}{abs(zone_minutes) // 60:02d}:{abs(zone_minutes) % 60:02d}"
    assert iso8601_ns(text + "Z") == iso8601_ns(text) == seconds * 10**9 + nanoseconds
    assert iso8601_ns(text + zone) == (seconds - zone_minutes * 60) * 10**9 + nanoseconds


@pytest.mark.parametrize("text", ["", "yesterday", "2024-13-01T00:00:00Z", "2024-01-01T00:00:00.1234567890Z"])
def test_iso_times_refused(text: str) -> None:
    with pytest.raises(BadRecord, match="bad_time"):
        iso8601_ns(text)


@given(st.integers(-(10**9), 10**9), st.integers(0, 6), st.integers(1, 999), st.integers(-6, 3))
def test_scales_are_exact(digits: int, decimals: int, coefficient: int, exponent: int) -> None:
    text = format(Fraction(digits, 10**decimals).limit_denominator(10**9), "") if decimals == 0 else f"{digits / 10**decimals:.{decimals}f}"
    scale = f"{coefficient}e{exponent}"
    price = f'{{ path = "p", scale = "{scale}" }}'
    field = compile_mappings(options(f'event = "trade"\nfields = {{ symbol = "s", qty = "q", price = {price} }}'))[0]
    expected = Fraction(text) * coefficient * Fraction(10) ** exponent * 10**9
    try:
        found = field.fields["price"].number(text, 9)
    except ValueError:
        assert expected.denominator != 1 or abs(expected) >= 1 << 63 or len(text) > 9
    else:
        assert found == expected


# ---------------------------------------------------------------- mapping records

TRADE = """event = "trade"
[data_sources.s.fields]
symbol = "s"
price = { path = "data.p", scale = "0.01" }
qty = "data.q"
side = { path = "data.side", values = { long = "buy" }, default = "none" }
id = { path = "id", default = "0" }
ts_event = { path = "T", unit = "ms" }
"""


def test_trade() -> None:
    feed = make(TRADE)
    events = send(
        feed,
        b'{"s": "X", "data": {"p": 12345, "q": 0.1, "side": "long"}, "T": 5, "id": 7}',
        b'{"s": "X", "data": {"p": "12345.5", "q": "0.10", "side": "SELL"}, "T": "5.000001"}',
        b'{"s": "X", "data": {"p": 1e2, "q": 1E-3, "side": null}, "T": 5}',
    )
    trades = events[events["kind"] == Kind.TRADE]
    assert trades["price"].tolist() == [123_450_000_000, 123_455_000_000, 1_000_000_000]
    assert trades["qty"].tolist() == [10_000_000, 10_000_000, 100_000]
    assert trades["side"].tolist() == [BID, ASK, 2]
    assert trades["ts_event"].tolist() == [5_000_000, 5_000_001, 5_000_000]
    assert trades["id"].tolist() == [7, 0, 0]
    assert not feed.malformed


def test_numbers_never_pass_through_a_float() -> None:
    feed = make('event = "trade"\nsymbols = ["X"]\nquantity_exponent = 9\nfields = ["price", "volume"]\n')
    (_, event) = send(feed, b'{"price": 9007199254.740993001, "volume": 0.000000001}')
    assert (event["price"], event["qty"]) == (9007199254740993001, 1)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"{", "bad_json"),
        (b"\xff", "bad_json"),
        (b'{"s": NaN}', "bad_json"),
        (b"[" * 200_000, "bad_json"),
        (b"1" * 100_000, "bad_json"),
        (b"null", "missing_field"),
        ({"s": "X"}, "missing_field"),
        ({"s": "X", "data": 3, "T": 1}, "missing_field"),
        ({"s": "X", "data": {"p": None, "q": 1}, "T": 1}, "missing_field"),
        ({"s": "X", "data": {"p": [1], "q": 1}, "T": 1}, "wrong_type"),
        ({"s": "X", "data": {"p": "x", "q": 1}, "T": 1}, "number_not_a_number"),
        ({"s": "X", "data": {"p": True, "q": 1}, "T": 1}, "number_not_a_number"),
        ({"s": "X", "data": {"p": "NaN", "q": 1}, "T": 1}, "number_too_large"),
        ({"s": "X", "data": {"p": "1e999999", "q": 1}, "T": 1}, "number_too_large"),
        ({"s": "X", "data": {"p": "0.00000001", "q": 1}, "T": 1}, "number_too_precise"),
        ({"s": "X", "data": {"p": 1, "q": -1}, "T": 1}, "number_negative"),
        ({"s": "X", "data": {"p": 1, "q": 1, "side": "up"}, "T": 1}, "bad_side"),
        ({"s": "X", "data": {"p": 1, "q": 1}, "T": 1, "id": "abc"}, "bad_id"),
        ({"s": "X", "data": {"p": 1, "q": 1}, "T": 1, "id": 1 << 63}, "bad_id"),
        ({"s": "X", "data": {"p": 1, "q": 1}, "T": "noon"}, "number_not_a_number"),
        ({"s": "", "data": {"p": 1, "q": 1}, "T": 1}, "bad_symbol"),
    ],
)
def test_malformed_records_are_counted_by_reason(record: Any, reason: str) -> None:
    feed = make(TRADE)
    assert send(feed, record).size == 0
    assert feed.malformed == {reason: 1}


def test_levels_of_a_list_are_one_transaction() -> None:
    body = """[[data_sources.s.messages]]
match = { e = "book", "data.full" = true }
event = "level"
snapshot = true
fields = { symbol = "s", side = { constant = "bid" }, price = "data.b[].0", qty = "data.b[].1" }
[[data_sources.s.messages]]
match = { e = "book" }
event = "level"
fields = { symbol = "s", side = { constant = "ask" }, price = "data.a[].0", qty = "data.a[].1", seq = "n" }
"""
    feed = make(body)
    record = {"e": "book", "s": "X", "n": 3, "data": {"full": True, "b": [["1.5", 2], ["1.4", 3]], "a": [["1.6", 1]]}}
    events = send(feed, record, {"e": "other"})[1:]
    assert events["kind"].tolist() == [Kind.CLEAR, Kind.LEVEL, Kind.LEVEL, Kind.LEVEL]
    assert [bool(f & Flag.MORE) for f in events["flags"]] == [True, True, True, False]
    assert [bool(f & Flag.SNAPSHOT) for f in events["flags"]] == [True, True, True, False]
    assert events["seq"].tolist()[3] == 3
    record["data"]["a"] = [["1.6", "x"]]  # type: ignore[index]
    assert send(feed, record)["kind"].tolist() == [Kind.GAP], "nothing of it, and the book is stale"
    assert feed.messages == {"level": 4, "unmatched": 1}


def test_orders_quotes_status() -> None:
    body = """symbols = ["X"]
[[data_sources.s.messages]]
match = { t = "A" }
event = "add"
fields = { id = "o", side = "s", price = "p", qty = "q" }
[[data_sources.s.messages]]
match = { t = "E" }
event = "execute"
fields = { id = "o", qty = "q", price = "p" }
[[data_sources.s.messages]]
match = { t = "U" }
event = "replace"
fields = { id = "new", aux = "o", qty = "q", price = "p" }
[[data_sources.s.messages]]
match = { t = 5 }
event = "quote"
fields = { bid = "b", bid_qty = "B", ask = "a", ask_qty = "A" }
[[data_sources.s.messages]]
match = { t = "S" }
event = "status"
fields = { aux = { path = "state", values = { H = "halted" } } }
"""
    events = send(
        make(body),
        {"t": "A", "o": "20f43950-d8dd-5b31-9112-a178eb6023af", "s": "sell", "p": 2, "q": 1},
        {"t": "E", "o": 5, "p": 2, "q": 1},
        {"t": "U", "o": 5, "new": 6, "p": 2, "q": 1},
        {"t": 5, "b": 0, "B": 0, "a": "2.5", "A": 4},
        {"t": "S", "state": "H"},
        {"t": "S", "state": "trading"},
    )[1:]
    assert events["kind"].tolist() == [Kind.ADD, Kind.EXECUTE, Kind.REPLACE, Kind.QUOTE, Kind.STATUS, Kind.STATUS]
    assert events["id"][0] == 0x20F43950D8DD5B31 >> 1
    assert events["flags"][1] == Flag.PRICED
    assert (events["id"][2], events["aux"][2]) == (6, 5)
    assert (events["price"][3], events["qty"][3], events["aux"][3], events["id"][3]) == (NO_PRICE, 0, 2_500_000_000, 4)
    assert events["aux"][4:].tolist() == [TradingStatus.HALTED, TradingStatus.TRADING]


# ---------------------------------------------------------------- refusals at load


@pytest.mark.parametrize(
    ("fields", "key", "words"),
    [
        ('price = "p", qty = "q"', "fields", "needs symbol"),
        ('symbol = "s", qty = "q"', "fields", "needs price"),
        ('symbol = "s", price = "p", qty = "q", bid = "b"', "fields.bid", "no such field"),
        ('symbol = "s", price = "a..b", qty = "q"', "fields.price", "is not a path"),
        ('symbol = "s", price = "a[].p", qty = "b[].q"', "fields.price", "another list"),
        ('symbol = "s", price = { path = "p", scale = "1e-10" }, qty = "q"', "fields.price.scale", "steps of 1e-9"),
        ('symbol = "s", price = { path = "p", scale = "1e30" }, qty = "q"', "fields.price.scale", "64 bits"),
        ('symbol = "s", price = "p", qty = { path = "q", scale = "0.001" }', "fields.qty.scale", "steps of 1e-2"),
        ('symbol = { path = "s", scale = 2 }, price = "p", qty = "q"', "fields.symbol.scale", "has no scale"),
        ('symbol = "s", price = { path = "p", unit = "ms" }, qty = "q"', "fields.price.unit", "is not a time"),
        ('symbol = "s", price = { path = "p", values = { a = "b" } }, qty = "q"', "fields.price.values", "not a word"),
        ('symbol = "s", price = "p", qty = "q", side = { path = "x", values = { a = "up" } }', "fields.side.values", "not a side"),
        ('symbol = "s", price = { constant = "cheap" }, qty = "q"', "fields.price.constant", "no price"),
        ('symbol = "s", price = "p", qty = { path = "q", default = "0.001" }', "fields.qty.default", "too precise"),
        ('symbol = "s", price = "p", qty = "q", id = { constant = "x" }', "fields.id.constant", "bad id"),
    ],
)
def test_mappings_that_cannot_work_are_refused_with_their_line(fields: str, key: str, words: str) -> None:
    text = '[data_sources.s]\ntype = "file"\npath = "x"\ndata_format = "json"\nevent = "trade"\nquantity_exponent = 2\n'
    text += f"fields = {{ {fields} }}\n"
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "mesh.toml", Checks(source=check_source))
    problem = caught.value.errors[0]
    assert (problem.path, problem.line) == (f"data_sources.s.{key}", 7)
    assert words in problem.reason
    with pytest.raises(MappingError):
        venue_feed(parse_config(text).data_sources["s"], InstrumentTable(1))


# ---------------------------------------------------------------- recordings


def test_coinbase_by_the_mapping_of_the_howto() -> None:
    (text,) = [block for block in re.findall(r"```toml\n(.*?)```", HOWTO, re.DOTALL) if "coinbase" in block]
    feed = venue_feed(parse_config(text).data_sources["coinbase"], InstrumentTable(64))
    events = recorded(feed, "COINBASE.ws.28.0")
    assert not feed.malformed
    messages = [json.loads(payload) for _, payload in read_lines(DATA / "COINBASE.ws.28.0")]
    matches = [m for m in messages if m["type"] == "match"]
    trades = events[events["kind"] == Kind.TRADE]
    assert [(t["price"], t["id"]) for t in trades] == [(scaled(m["price"], 9), m["trade_id"]) for m in matches]
    books: dict[str, dict[str, dict[str, str]]] = {}
    for message in messages:
        if message["type"] == "snapshot":
            books[message["product_id"]] = {"buy": dict(message["bids"]), "sell": dict(message["asks"])}
        elif message["type"] == "l2update":
            for side, price, qty in message["changes"]:
                books[message["product_id"]][side][price] = qty
    found = {feed.table.symbol(instrument): book for instrument, book in books_of(events).items()}
    assert set(found) >= set(books)
    for symbol, sides in books.items():
        assert_same_levels(found[symbol], sides, int(feed.table.record(feed.table.find(symbol))["qty_exponent"]))  # type: ignore[arg-type]


def assert_same_levels(book: DictBook, sides: dict[str, dict[str, str]], exponent: int) -> None:
    for side, name in ((BID, "buy"), (ASK, "sell")):
        expected = {scaled(p, 9): scaled(q, exponent) for p, q in sides[name].items()}
        assert book.sides[side] == {p: q for p, q in expected.items() if q}
    assert book.best(BID)[0] < book.best(ASK)[0]


@pytest.mark.parametrize(
    ("name", "body", "count"),
    [
        (
            "BITSTAMP.ws.1.0",
            """[[data_sources.s.messages]]
match = { event = "trade" }
event = "trade"
fields = { symbol = "channel", price = "data.price_str", qty = "data.amount_str", id = "data.id" }
""",
            lambda m: m.get("event") == "trade",
        ),
        (
            "KRAKEN_FUTURES.ws.1.0",
            """[[data_sources.s.messages]]
match = { feed = "trade" }
event = "trade"
fields = { symbol = "product_id", price = "price", qty = "qty", side = "side", seq = "seq", ts_event = { path = "time", unit = "ms" } }
""",
            lambda m: m.get("feed") == "trade" and "price" in m,
        ),
        (
            "DERIBIT.ws.1.0",
            """[[data_sources.s.messages]]
match = { method = "subscription" }
event = "quote"
[data_sources.s.messages.fields]
symbol = "params.data.instrument_name"
bid = "params.data.best_bid_price"
bid_qty = "params.data.best_bid_amount"
ask = "params.data.best_ask_price"
ask_qty = "params.data.best_ask_amount"
ts_event = { path = "params.data.timestamp", unit = "ms" }
""",
            lambda m: "best_bid_price" in m.get("params", {}).get("data", {}),
        ),
    ],
)
def test_other_venues_by_mapping(name: str, body: str, count: Any) -> None:
    feed = make(body)
    events = recorded(feed, name)
    wanted = [m for _, payload in read_lines(DATA / name) if isinstance(m := json.loads(payload), dict) and count(m)]
    assert wanted
    assert sum(1 for e in events if e["kind"] in (Kind.TRADE, Kind.QUOTE)) == len(wanted)
