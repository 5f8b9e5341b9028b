"""The compiled JSON decoders against those in Python: the same messages, damaged or not, give the same events, counts and books."""

from __future__ import annotations

from random import Random
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_twins import TextBook, Venue, damaged, encoded, kraken_checksum, okx_checksum
from replays import BINANCE, BYBIT, OKX, recording
from sources import source_config

from tickmesh.node import json_ladder
from tickmesh.node.event import ASK, BID, EVENT, Kind
from tickmesh.node.event_batch import EventBatch
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.json_compiled import Message
from tickmesh.node.json_feed import VenueFeed
from tickmesh.node.json_text import ROW
from tickmesh.node.venues import compiled_feed
from tickmesh.transports.recording import SLACK, read_lines

VENUES = ["binance", "okx", "bybit", "coinbase", "kraken_futures", "kraken"]
BATCH = EventBatch(1 << 18)


def feed_of(venue: str, more: str = "") -> VenueFeed:
    options = source_config(f'type = "file"\npath = "x"\ndata_format = "{venue}"\n{more}').data_sources["feed"]
    return compiled_feed(options, InstrumentTable(32))


def one_by_one(feed: VenueFeed, messages: list[Message]) -> np.ndarray:
    for text, recv_ns, sequence in messages:
        mark = BATCH.count
        feed.feed(text, recv_ns, BATCH)
        if sequence:
            BATCH.events["seq"][mark : BATCH.count] = sequence
    return BATCH.take()


def all_at_once(feed: VenueFeed, messages: list[Message]) -> np.ndarray:
    done = 0
    while done < len(messages):
        done += feed.feed_many(messages[done:], BATCH)
    return BATCH.take()


def assert_same(venue: str, messages: list[Message], more: str = "") -> VenueFeed:
    """Both decoders come to the same end; returns the one that may compile."""
    slow, fast = feed_of(venue, more), feed_of(venue, more)
    expected, found = one_by_one(slow, messages), all_at_once(fast, messages)
    for name in EVENT.names or ():
        different = np.flatnonzero(expected[name][: len(found)] != found[name][: len(expected)])
        assert not len(different), f"{name} of event {different[0]}: {found[different[0]]} and not {expected[different[0]]}"
    assert len(found) == len(expected)
    assert dict(fast.messages) == dict(slow.messages)
    assert dict(fast.malformed) == dict(slow.malformed)
    assert {k: v for k, v in fast.counters.items() if v and k != "compiled"} == {k: v for k, v in slow.counters.items() if v}
    assert fast.snapshots_wanted == slow.snapshots_wanted
    for name in ("last_id", "has_book", "fresh", "listed", "exponent", "depth"):
        assert np.array_equal(fast._books[name], slow._books[name]), name
    return fast


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("venue", "path", "share"),
    [
        ("binance", BINANCE, 0.999), ("okx", OKX, 0.93), ("bybit", BYBIT, 0.97), ("coinbase", "cryptofeed_ws/COINBASE.ws.28.0", 0.98),
        ("kraken_futures", "cryptofeed_ws/KRAKEN_FUTURES.ws.1.0", 0.97), ("binance", "cryptofeed_ws/BINANCE.ws.1.0", 0.0),
    ],
)  # fmt: skip
def test_recordings(venue: str, path: str, share: float) -> None:
    messages = [(text, recv_ns, 0) for recv_ns, text in read_lines(recording(path))][:12_000]
    feed = assert_same(venue, messages)
    assert feed.counters["compiled"] >= share * len(messages), dict(feed.counters)


@pytest.mark.parametrize("venue", VENUES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_messages_that_are_as_usual_damaged_and_out_of_order(venue: str, seed: int) -> None:
    random = Random(seed)
    source, messages = Venue(venue, random), []
    damage = random.choice([0.0, 0.0, 0.1, 0.5])
    for number in range(random.randint(1, 80)):
        text = encoded(source.message())
        text = damaged(text, random) if random.random() < damage else text
        messages.append((text, 1_000 + number, random.choice([0, 0, 0, number + 1])))
    assert_same(venue, messages)


@pytest.mark.parametrize("venue", VENUES)
def test_most_messages_are_compiled(venue: str) -> None:
    """So that the comparison above compares something."""
    source = Venue(venue, Random(7))
    messages = [(encoded(source.message()), 1, 0) for _ in range(400)]
    feed = assert_same(venue, messages)
    assert feed.counters["compiled"] > 120, dict(feed.counters)
    if venue in ("okx", "kraken"):
        assert feed.counters["checksums_failed"] > 0


def test_a_feed_whose_messages_are_never_as_usual_is_left_to_python() -> None:
    """With a look now and then."""
    source = Venue("binance", Random(7))
    texts = [encoded(source.message()) for _ in range(600)]
    spaced = [(text.replace(b",", b", "), 1, 0) for text in texts]
    assert assert_same("binance", spaced).counters["compiled"] == 0


def test_a_batch_without_room_takes_no_more() -> None:
    source = Venue("binance", Random(3))
    messages: list[Message] = [(encoded(source.message()), 1, 0) for _ in range(50)]
    feed, small = feed_of("binance"), EventBatch(VenueFeed.events_max + 4)
    done, found = 0, []
    while done < len(messages):
        done += feed.feed_many(messages[done:], small)
        found.append(small.take())
    assert max(map(len, found)) < 40
    assert np.array_equal(np.concatenate(found), one_by_one(feed_of("binance"), messages))


def test_messages_that_are_too_large_for_the_buffer() -> None:
    source = Venue("binance", Random(3))
    texts = [encoded(source.message()) for _ in range(30)]
    texts[11] = texts[11][:-1] + b" " * (1 << 18) + b"}"
    assert_same("binance", [(text, 1, 0) for text in texts])


# ---------------------------------------------------------------- books with texts

Change = tuple[int, int, int]
CHANGES = st.lists(st.tuples(st.sampled_from([BID, ASK]), st.integers(1, 60), st.sampled_from([0, 1, 15, 1_000_000_000])), max_size=120)


def texts_of(price: int, qty: int) -> tuple[str, str]:
    return f"{price / 100:.2f}", f"0.{qty:010d}"


def ladder_rows(changes: list[Change]) -> tuple[np.ndarray, np.ndarray]:
    rows, text = [], bytearray()
    for side, price, qty in changes:
        a, b = texts_of(price, qty)
        rows.append((price, 0, qty, 0, 0, side, len(text), len(a), len(text) + len(a), len(b)))
        text += (a + b).encode()
    return np.array(rows, ROW), np.frombuffer(text + bytes(SLACK), np.uint8)


@settings(max_examples=60, deadline=None)
@given(changes=CHANGES, depth=st.integers(1, 40))
def test_a_ladder_is_its_slow_twin(changes: list[Change], depth: int) -> None:
    ladders, twin = json_ladder.make_ladders(2), TextBook()
    assert json_ladder.set_levels(ladders, 1, *ladder_rows(changes), True) == len(changes)
    for side, price, qty in changes:
        twin.set(side, price, qty, texts_of(price, qty))
    for whose, told in ((json_ladder.OKX, okx_checksum), (json_ladder.KRAKEN, kraken_checksum)):
        assert json_ladder.book_checksum(ladders, 1, whose) == told(twin.best(BID), twin.best(ASK))
    for side in (BID, ASK):
        fallen = []
        while price := int(json_ladder.beyond_depth(ladders, 1, side, depth)):
            fallen.append(price)
        assert fallen == twin.fall(side, depth)
        ranks = ladders.ranks[1, side, : ladders.counts[1, side]]
        assert sorted(np.abs(ranks).tolist(), reverse=side == ASK) == sorted(twin.sides[side], reverse=side == ASK)
        assert sorted(ladders.slots[1, side].tolist()) == list(range(json_ladder.LEVELS_MAX))
    assert json_ladder.book_checksum(ladders, 1, json_ladder.OKX) == okx_checksum(twin.best(BID), twin.best(ASK))
    assert json_ladder.book_checksum(ladders, 0, json_ladder.OKX) == okx_checksum([], [])


def test_a_ladder_is_full() -> None:
    ladders = json_ladder.make_ladders(1)
    rows, text = ladder_rows([(BID, price, 1) for price in range(1, json_ladder.LEVELS_MAX + 10)])
    assert json_ladder.set_levels(ladders, 0, rows, text, True) == json_ladder.LEVELS_MAX
    rows[0]["price_size"] = json_ladder.TEXT_MAX + 1
    assert json_ladder.set_levels(ladders, 0, rows, text, True) == 0


@settings(deadline=None)
@given(data=st.binary(max_size=200))
def test_the_checksum_is_zlibs(data: bytes) -> None:
    assert json_ladder.crc32_of(np.frombuffer(data + bytes(SLACK), np.uint8).copy(), len(data)) == crc32(data)


def test_a_book_that_is_deeper_than_its_ladder_is_stale() -> None:
    """Nobody's memory grows with what a venue sends."""
    levels = [[f"{price}", "1", "0", "1"] for price in range(1, json_ladder.LEVELS_MAX + 100)]
    entry = {"asks": levels, "bids": [], "ts": "1", "checksum": 0}
    message = {"arg": {"channel": "books", "instId": "A"}, "action": "snapshot", "data": [entry]}
    feed = feed_of("okx")
    events = one_by_one(feed, [(encoded(message), 1, 0)])
    assert events["kind"][-1] == Kind.GAP
    assert feed.counters["books_too_deep"] == 1
    assert feed.snapshots_wanted == {"A"}


