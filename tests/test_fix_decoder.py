"""FIX messages to events: against a slow decoder, by example, in chunks, with damage, and inside a whole replay."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounds import with_bounds_checks
from fix_messages import CORPUS, EXPONENT, HEAD, TICK, feed_of, message, of_type, options_of, read_all, rows_of, streams
from fix_twin import FixTwin
from hypothesis import example, given, settings
from hypothesis import strategies as st
from replays import config_of

from tickmesh.node.event import ALL_INSTRUMENTS, ASK, BID, EVENT, NO_PRICE, NO_SIDE, Flag, Kind
from tickmesh.node.fix_decoder import ENTRIES_MAX
from tickmesh.node.fix_feed import BUFFER_BYTES
from tickmesh.node.replay import replay

EXAMPLES = int(os.environ.get("TICKMESH_FIX_EXAMPLES", "200"))
SNAPSHOT, MORE = int(Flag.SNAPSHOT), int(Flag.MORE)
BOOK = of_type("W", 1, "55=ABC|268=3|269=0|270=10.25|271=100|269=1|270=10.5|271=50.5|346=3|269=2|270=10.3|271=7|278=77")


def chosen(events: Any, *names: str) -> list[tuple[Any, ...]]:
    """Some fields of every event but the REFERENCEs."""
    return [tuple(row) for row in events[events["kind"] != Kind.REFERENCE][list(names)].tolist()]


def compare(data: bytes, chunks: list[bytes] | None = None, room: int = 4096) -> None:
    """Ours and the slow decoder's view of the same bytes."""
    feed, twin = feed_of(), FixTwin(TICK, EXPONENT).decode(data)
    assert rows_of(read_all(feed, chunks or [data], room)) == twin.events
    assert feed.malformed == dict(twin.malformed)
    assert feed.messages == dict(twin.messages)


# ---------------------------------------------------------------- against the twin


@settings(max_examples=EXAMPLES, deadline=None)
@given(streams(), st.sampled_from([24, 31, 4096]), st.lists(st.integers(1, 400), max_size=40))
@example(BOOK[:-1], 24, [])
@example(message("35=X|049=A|34=1"), 24, [])
def test_any_bytes_like_the_slow_decoder(data: bytes, room: int, cuts: list[int]) -> None:
    chunks, first = [], 0
    for size in cuts:
        chunks.append(data[first : first + size])
        first += size
    compare(data, [*chunks, data[first:]], room)


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.fix")), ids=lambda p: p.stem)
def test_corpus_like_the_slow_decoder(path: Path) -> None:
    data = path.read_bytes()
    compare(data)
    compare(data, [data[k : k + 1] for k in range(len(data))], 24)


def test_the_corpus_is_there() -> None:
    assert len(list(CORPUS.glob("*.fix"))) >= 10


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_index_leaves_its_array() -> None:
    """The same once more, compiled with bounds checks."""
    done = with_bounds_checks("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "slow_decoder")
    assert done.returncode == 0, done.stdout[-3000:]


# ---------------------------------------------------------------- by example


def test_a_snapshot_is_a_book_and_its_trade() -> None:
    events = read_all(feed_of(), [BOOK])
    assert chosen(events, "kind", "side", "flags", "price", "qty", "id", "aux") == [
        (Kind.CLEAR, NO_SIDE, SNAPSHOT | MORE, 0, 0, 0, 0),
        (Kind.LEVEL, BID, SNAPSHOT | MORE, 10_250_000_000, 10_000, 0, 0),
        (Kind.LEVEL, ASK, SNAPSHOT, 10_500_000_000, 5_050, 0, 3),
        (Kind.TRADE, NO_SIDE, SNAPSHOT, 10_300_000_000, 700, 77, 0),
    ]
    assert set(events["ts_event"].tolist()) == {1_767_348_000_123_456_000}


def test_a_snapshot_of_statistics_leaves_the_book_alone() -> None:
    events = read_all(feed_of(), [BOOK, of_type("W", 2, "55=ABC|268=1|269=4|270=10"), of_type("W", 3, "55=ABC|268=0")])
    assert [int(k) for k in events["kind"]].count(Kind.CLEAR) == 2  # the book and the empty book


def test_increments_of_several_instruments() -> None:
    body = "268=3|279=0|269=0|55=ABC|270=1|271=2|279=2|269=1|270=3|279=1|269=1|55=XY|270=4|271=5"
    events = read_all(feed_of(), [of_type("X", 1, body)])
    assert chosen(events, "kind", "instrument", "side", "flags", "price", "qty") == [
        (Kind.LEVEL, 0, BID, MORE, 10**9, 200),
        (Kind.LEVEL, 0, ASK, 0, 3 * 10**9, 0),
        (Kind.LEVEL, 1, ASK, 0, 4 * 10**9, 500),
    ]


def test_books_by_order_where_ids_are_mapped() -> None:
    options = options_of(body='quantity_exponent = 0\nfields = { id = "278" }\n')
    body = "55=ABC|268=4|279=0|269=0|278=a1|270=1|271=2|279=1|269=0|278=a1|270=1|271=3|279=1|269=0|278=b2|280=a1|270=2|271=3|279=2|278=b2"
    events = read_all(feed_of(options), [of_type("X", 1, body)])
    kinds = [int(kind) for kind in events["kind"]]
    assert kinds == [Kind.REFERENCE, Kind.ADD, Kind.MODIFY, Kind.REPLACE, Kind.DELETE]
    ids = events["id"].tolist()[1:]
    assert ids[0] == ids[1] == events["aux"][3] != ids[2] == ids[3]


def test_tags_of_the_venue_by_configuration() -> None:
    options = options_of(body='quantity_exponent = 0\nfields = { symbol = "48", aux = 5001, side = 5797, seq = 83 }\n')
    body = "268=1|279=0|269=2|48=1234|55=IGNORED|270=1|271=2|5797=2|5001=42|83=9"
    events = read_all(feed_of(options), [of_type("X", 1, body)])
    assert chosen(events, "kind", "side", "aux", "seq") == [(Kind.TRADE, ASK, 42, 9)]
    assert bytes(events[0:1].view(np.uint8)[40:44]) == b"1234"


def test_drop_copy_status_definition_quote() -> None:
    feed = feed_of()
    events = read_all(feed, [
        of_type("d", 1, "55=ABC|969=0.01"),
        of_type("8", 2, "37=9|17=31|150=F|55=ABC|54=2|32=5|31=1.5|60=20260102-09:00:00"),
        of_type("8", 3, "37=9|17=32|150=0|55=ABC|54=2"),
        of_type("8", 4, "37=9|17=33|19=31|150=H|55=ABC|54=2"),
        of_type("f", 5, "55=ABC|326=2"),
        of_type("S", 6, "55=ABC|132=1|134=3"),
        of_type("AE", 7, "571=8|55=ABC|32=1|31=2"),
    ])  # fmt: skip
    assert chosen(events, "kind", "side", "price", "qty", "id", "aux") == [
        (Kind.TRADE, ASK, 1_500_000_000, 500, 31, 9),
        (Kind.BREAK, NO_SIDE, 0, 0, 31, 0),
        (Kind.STATUS, NO_SIDE, 0, 0, 0, 2),
        (Kind.QUOTE, NO_SIDE, 10**9, 300, 0, NO_PRICE),
        (Kind.TRADE, NO_SIDE, 2 * 10**9, 100, 8, 0),
    ]
    assert feed.counters()["entries_ignored"] == 1


def test_tick_and_exponent_are_inferred() -> None:
    feed = feed_of(options_of(body=""))
    events = read_all(feed, [of_type("X", 1, "268=1|279=0|269=0|55=ABC|270=10.250|271=0.5")])
    assert events[0]["price"] == 1_000_000  # 0.001: at most the fifth digit of the price
    assert (events[0]["side"], events[1]["qty"]) == (8, 50_000_000)


def test_missing_messages_are_a_gap_and_a_new_session_too() -> None:
    feed = feed_of()
    level = "268=1|279=0|269=0|55=ABC|270=1|271=2"
    events = read_all(feed, [of_type("X", 1, level), of_type("X", 5, level), of_type("X", 3, f"43=Y|{level}"), of_type("X", 1, level)])
    assert chosen(events, "kind", "instrument", "id", "aux") == [
        (Kind.LEVEL, 0, 0, 0),
        (Kind.GAP, ALL_INSTRUMENTS, 2, 4),
        (Kind.LEVEL, 0, 0, 0),
        (Kind.GAP, ALL_INSTRUMENTS, 0, 0),
        (Kind.LEVEL, 0, 0, 0),
    ]
    counters = feed.counters()
    assert (counters["gaps"], counters["missing"], counters["duplicates"], counters["restarts"]) == (1, 3, 1, 1)


def test_what_is_sent_again_has_the_time_at_which_it_was_sent_first() -> None:
    entry, first = "268=1|279=0|269=0|55=ABC|270=1|271=2", "20260102-09:59:58.5"
    feed = feed_of()
    events = read_all(feed, [
        of_type("X", 1, entry),
        of_type("X", 2, f"43=Y|122={first}|{entry}"),
        of_type("X", 3, f"43=N|122={first}|{entry}"),  # it says itself that it was not sent before
        of_type("X", 4, f"43=Y|122={first}|60=20260102-09:59:59|{entry}"),
        of_type("X", 5, f"43=Y|122=yesterday|{entry}"),
    ])  # fmt: skip
    levels = events[events["kind"] == Kind.LEVEL]
    sent, original, transact = 123_456_000, -1_500_000_000, -1_000_000_000
    begun = int(levels["ts_event"][0]) - sent
    assert [int(ts) - begun for ts in levels["ts_event"]] == [sent, original, sent, transact, sent]
    assert feed.malformed == {"bad_time": 1}


def test_sequence_resets_hide_nothing() -> None:
    """A gap fill that is sent again does not turn the sequence back; one that comes late, and a reset that jumps, are gaps."""
    level = "268=1|279=0|269=0|55=ABC|270=1|271=2"
    feed = feed_of()
    events = read_all(feed, [
        of_type("X", 5, level),
        of_type("4", 3, "43=Y|123=Y|36=5"),
        of_type("X", 6, level),
        of_type("4", 7, "123=Y|36=10"),
        of_type("X", 10, level),
        of_type("4", 13, "123=Y|36=15"),
        of_type("X", 15, level),
        of_type("4", 1, "36=20"),
        of_type("X", 20, level),
        of_type("4", 1, "123=N|36=2"),
        of_type("X", 2, level),
    ])  # fmt: skip
    gaps = events[events["kind"] == Kind.GAP]
    assert chosen(gaps, "instrument", "id", "aux") == [(ALL_INSTRUMENTS, 11, 12), (ALL_INSTRUMENTS, 16, 19), (ALL_INSTRUMENTS, 0, 0)]
    counters = feed.counters()
    assert (counters["gaps"], counters["missing"], counters["duplicates"], counters["restarts"]) == (2, 6, 1, 1)


def test_shapes_are_learnt_and_forgotten() -> None:
    """Messages of two orders of fields, and with as many but other tags, mixed: none is taken for another."""
    one, two = "268=1|279=0|269=0|55=ABC|270=1|271=2", "268=1|279=0|269=1|55=ABC|271=3|270=4"
    third, wrong = "268=1|279=2|269=0|55=XY|270=1|346=2", "268=1|279=0|269=0|55=ABC|270=1|270=2"
    bodies = [one] * 3 + [two, one, third, wrong] * 4 + [two] * 8 + [one, wrong, two] * 3
    compare(b"".join(of_type("X", 1 + k, body) for k, body in enumerate(bodies)))


@pytest.mark.parametrize("digits", [0, 1, 8, 9, 10, 11, 12, 13])
def test_times_down_to_picoseconds(digits: int) -> None:
    fraction = "123456789876"[:digits] + "5" * (digits - 12)
    data = message(f"35=f|34=1|49=V|56=M|52=20260102-10:00:00.{fraction}|55=ABC|326=17")
    compare(data)
    feed = feed_of()
    events = read_all(feed, [data])
    assert [int(ts) % 10**9 for ts in events["ts_event"][-1:]] == ([int(fraction[:9].ljust(9, "0"))] if 1 <= digits <= 12 else [])
    assert feed.malformed == ({} if 1 <= digits <= 12 else {"bad_time": 1})


def test_the_other_direction_of_a_log_is_no_gap() -> None:
    request = message("35=V|34=900|49=ME|56=VENUE|52=20260102-10:00:00|262=r")
    feed = feed_of()
    read_all(feed, [request, BOOK, request, of_type("X", 2, "268=1|279=0|269=0|55=ABC|270=1|271=2")])
    assert feed.counters()["gaps"] == 0


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (of_type("X", 2, "268=4000000000|279=0|269=0|55=ABC|270=1|271=2"), "bad_group_count"),
        (of_type("X", 2, "268=-1|279=0|269=0|55=ABC|270=1|271=2"), "bad_group_count"),
        (of_type("X", 2, "268=1|269=0|279=0|55=ABC|270=1|271=2"), "group_order"),
        (of_type("W", 2, f"55=ABC|268={ENTRIES_MAX + 1}|" + "269=4|" * (ENTRIES_MAX + 1)), "too_many_entries"),
        (of_type("X", 2, "268=1|279=0|269=0|269=1|55=ABC|270=1|271=2"), "repeated_tag"),
        (of_type("X", 2, "268=1|279=0|26X=0|55=ABC|270=1|271=2"), "bad_tag"),
        (of_type("X", 2, "95=9999|96=abc|268=0"), "bad_data_length"),
        (message("35=X|49=VENUE|52=20260102-10:00:00|268=0"), "missing_field"),
        (of_type("X", 2, "268=1|279=0|269=0|55=ABC|270=1.0000000001|271=2"), "too_precise"),
        (of_type("X", 2, "268=1|279=0|269=0|55=ABC|270=99999999999|271=2"), "number_too_large"),
        (of_type("X", 2, "268=1|279=3|269=0|55=ABC|270=1|271=2"), "unsupported_action"),
        (BOOK[:-2] + b"9\x01", "bad_checksum"),
        (BOOK.replace(b"9=", b"9=9", 1), "truncated"),
        (BOOK.replace(b"9=", b"9=99999", 1), "bad_body_length"),
        (BOOK.replace(b"FIX.4.4", b"FIX.9.4"), "bad_begin_string"),
        (BOOK.replace(b"\x0135=", b"\x0136=", 1), "bad_header"),
        (b"\x01garbage\x01", "garbage"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_counted_and_the_rest_is_read(raw: bytes, reason: str) -> None:
    feed = feed_of()
    events = read_all(feed, [of_type("W", 1, "55=ABC|268=0"), raw, of_type("f", 3, "55=ABC|326=17")])
    assert feed.malformed == {reason: 1}
    assert events[-1]["kind"] == Kind.STATUS


def test_a_bad_entry_makes_its_book_stale() -> None:
    events = read_all(feed_of(), [of_type("X", 1, "268=2|279=0|269=0|55=ABC|270=x|271=2|279=0|269=1|270=3|271=4")])
    assert chosen(events, "kind", "instrument", "flags") == [(Kind.GAP, 0, 0), (Kind.LEVEL, 0, 0)]


def test_symbols_beyond_the_table_and_filtered_ones() -> None:
    feed = feed_of(options_of(body='exclude = ["Z*"]\n'), capacity=1)
    read_all(feed, [of_type("X", 1, "268=3|279=0|269=0|55=A|270=1|271=2|279=0|269=0|55=B|270=1|271=2|279=0|269=0|55=ZZ|270=1|271=2")])
    assert feed.malformed == {"symbol_table_full": 1}
    assert feed.counters()["filtered"] == 1


def test_memory_is_bounded() -> None:
    feed = feed_of()
    feed.append(bytes(BUFFER_BYTES))
    with pytest.raises(ValueError, match="room for 0"):
        feed.append(b"x")
    assert feed.read(np.zeros(8, EVENT)) == 0
    feed.append(BOOK)
    assert feed.read(np.zeros(64, EVENT)) == 5


def test_a_connection_that_broke_off_inside_a_message() -> None:
    feed = feed_of()
    read_all(feed, [BOOK, BOOK[:60]], end=False)
    feed.begin()
    events = read_all(feed, [of_type("f", 2, "55=ABC|326=17")], end=False)
    assert (len(events), feed.malformed) == (1, {"truncated": 1})


# ---------------------------------------------------------------- the whole way


def test_replay_of_a_log(tmp_path: Path) -> None:
    lines = [
        b"20260102-10:00:00.000 : " + BOOK,
        of_type("X", 2, "268=2|279=1|269=0|55=ABC|270=10.25|271=90|279=2|269=1|270=10.5"),
        of_type("0", 3),
    ]
    path = tmp_path / "session.log"
    path.write_bytes(b"\n".join(lines) + b"\n")
    summary = replay(config_of("fix44"), [path])
    assert (summary["malformed"], summary["messages"]) == ({}, {"snapshot": 1, "incremental": 1, "heartbeat": 1})
    about = summary["instruments"]["ABC"]
    assert (about["bids"], about["asks"], about["trades"]) == ([["10.25", "90", 0]], [], 1)
    observed: list[Any] = []
    again = replay(config_of("fix44"), [path], observe=lambda _, events: observed.append(events.copy()))
    assert again["instruments"] == summary["instruments"]
    assert int(Kind.BBO) in np.concatenate(observed)["kind"]


def test_head_is_what_the_tests_say() -> None:
    assert message(f"35=0|34=1|{HEAD}").count(b"\x01") == 8
