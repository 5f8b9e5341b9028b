"""Shipped protocols beyond ITCH 5.0: real captures against readers written without the spec files, a slow twin, two lines, bad input."""

from __future__ import annotations

import itertools
import os
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounds import with_bounds_checks
from hypothesis import given, settings
from hypothesis import strategies as st
from replays import config_of
from wire_readers import Told, datagrams, read, write_pcap

from tickmesh.control.config import Source
from tickmesh.node import decoder as D
from tickmesh.node.book import apply_events, make_books, top
from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, NO_PRICE, Flag, Kind
from tickmesh.node.feed import NOT_TOLD, ORDERS_KNOWN, TIME_BASE_NS
from tickmesh.node.instruments import EXCLUDED, FILTERED, InstrumentTable
from tickmesh.node.order_map import take_orders
from tickmesh.node.protocol import Field, Message, Spec, SpecError, load_framing, load_spec, shipped_names
from tickmesh.node.reader import USUAL_FRAMING, open_reader
from tickmesh.node.receivers import take_memory
from tickmesh.node.replay import replay
from tickmesh.transports.capture import PACKET

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("TICKMESH_DATA", ROOT.parent / "shared" / "data"))
PCAPS = DATA / "omi_pcaps"
FOLDERS = {
    "Cboe/Byx.Equities*": "cboe_pitch", "Cboe/Futures*": "cboe_cfe_pitch", "Cboe/Options.Depth*": "cboe_pitch_options",
    "Cboe/Options.Complex*": "cboe_pitch_complex", "Iex/Deep.*": "iex_deep", "Iex/Tops*": "iex_tops", "Memx/*": "memx_memoir_depth",
    "Jnx/*Itch*": "jnx_itch", "Nasdaq/*Bbo*": "nasdaq_bbo", "Miax/Onyx*ToM*": "miax_onyx_tom",
}  # fmt: skip
CAPTURES = [(name, path) for folder, name in FOLDERS.items() for path in sorted(PCAPS.glob(folder + "/*.pcap"))]
FOREIGN = "StockTradingActionMessage"
"""In the folder of MEMX lies one packet of NASDAQ ITCH 5.0 over MoldUDP64."""
CAPTURES = [(name, path) for name, path in CAPTURES if not (name == "memx_memoir_depth" and path.stem == FOREIGN)]
PROTOCOLS = tuple(dict.fromkeys(FOLDERS.values()))
FOLLOWING = tuple(name for name in PROTOCOLS if load_spec(name).follow_orders)
need_pcaps = pytest.mark.skipif(not CAPTURES, reason=f"no captures in {PCAPS} (set TICKMESH_DATA)")

_loaded: dict[str, tuple[Spec, Any, Any]] = {}


def load(name: str) -> tuple[Spec, Any, Any]:
    if name not in _loaded:
        spec, framing = load_spec(name), load_framing(USUAL_FRAMING[name][1])
        _loaded[name] = (spec, framing, D.load_decoder(spec, framing))
    return _loaded[name]


class Line:
    """A feed, and the packets that came to it."""

    def __init__(self, name: str, room: int = 258, **options: Any) -> None:
        self.spec, framing, self.decoder = load(name)
        table, capacity = options.pop("table", None), options.pop("capacity", 256)
        self.table = InstrumentTable(capacity) if table is None else table
        self.feed = D.make_feed(self.spec, self.table, framing=framing, **{"gap_wait_ns": 0, "order_slots": 64, **options})
        self.room = room

    def take(self, payloads: Sequence[bytes], lines: Sequence[int] | None = None) -> list[Any]:
        buf = np.frombuffer(b"".join(payloads) + bytes(64), np.uint8).copy()
        packets, out, events, at = np.zeros(len(payloads), PACKET), np.zeros(self.room, EVENT), [], 0
        starts = itertools.accumulate(map(len, payloads), initial=0)
        for packet, payload, start, line in zip(packets, payloads, starts, lines or [0] * len(payloads), strict=False):
            packet["offset"], packet["length"], packet["line"], packet["ts_recv"] = start, len(payload), line, 5
        while True:
            at, n = self.decoder.decode_packets(buf, packets, at, len(packets), self.feed, out)
            events += [out[i].copy() for i in range(n)]
            if n == 0 and at == len(packets):
                return events

    @property
    def counts(self) -> dict[str, int]:
        return D.message_counts(self.feed, self.spec)

    @property
    def malformed(self) -> dict[str, int]:
        return D.malformed(self.feed)


def packet(name: str, messages: Sequence[bytes], sequence: int, heartbeat: bool = False) -> bytes:
    """A packet of a protocol's usual framing."""
    count, framing = len(messages), USUAL_FRAMING[name][1]
    if framing == "cboe_unit":
        body = b"".join(messages)
        return struct.pack("<HBBI", 8 + len(body), count, 1, sequence) + body
    if framing == "iex_tp":
        body = b"".join(struct.pack("<H", len(m)) + m for m in messages)
        return struct.pack("<BBHIIHHqQq", 1, 0, 0x8004, 1, 7, len(body), count, 0, sequence, 0) + body
    if framing == "miax_mach":
        return b"".join(struct.pack("<QHBB", sequence + n, 12 + len(m), 3, 1) + m for n, m in enumerate(messages)) or bytes(12)
    body = b"".join(struct.pack(">H", len(m)) + m for m in messages)
    if framing == "moldudp64":
        return b"0000000001" + struct.pack(">QH", sequence, count) + body
    head = struct.pack(">BBQQ", 0 if heartbeat else 2, 18, 99, sequence)
    return head if heartbeat else head + struct.pack(">H", count) + body


def body_of(spec: Spec, name: str, **values: Any) -> bytes:
    """A message of zeros, but for some fields."""
    message = next(m for m in spec.messages if m.name == name)
    raw = bytearray(message.length)
    put(raw, spec.type_field, message.code)
    if spec.name.startswith("cboe"):
        raw[0] = len(raw)
    for key, value in values.items():
        put(raw, message.fields[key], value)
    return bytes(raw)


def put(raw: bytearray, field: Field, value: Any) -> None:
    if isinstance(value, str):
        value = value.encode()
    if isinstance(value, bytes):
        raw[field.offset : field.offset + field.size] = value.ljust(field.size)[: field.size]
    else:
        order: Any = "big" if field.big else "little"
        raw[field.offset : field.offset + field.size] = int(value).to_bytes(field.size, order, signed=field.signed)


# ---------------------------------------------------------------- real captures


def by_destination(path: Path) -> list[list[bytes]]:
    """Payloads by address and port: every channel has its own sequence, as every source has its own endpoint."""
    found: dict[tuple[str, int], list[bytes]] = {}
    for destination, payload in datagrams(path):
        found.setdefault(destination, []).append(payload)
    return list(found.values())


def told_of(event: Any, table: InstrumentTable, wanted: Told) -> Told:
    """What an event says about everything that the reader told."""
    whole = event["instrument"] == ALL_INSTRUMENTS
    about = {"symbol": None if whole else table.symbol(event["instrument"]), "at": int(event["ts_event"])}
    about |= {key: int(event[key]) for key in ("side", "price", "qty", "id", "aux", "flags")}
    return {"kind": Kind(event["kind"]).name, **{key: about[key] for key in wanted if key != "kind"}}


def resting(name: str, told: list[Told]) -> list[bytes]:
    """Adds of the orders that a capture speaks of without having added them."""
    spec, added = load(name)[0], {said["id"] for said in told if said["kind"] == "ADD"}
    if not spec.follow_orders:
        return []
    first = next(m for m in spec.messages if any(c.kind == "add" for c in m.cases))
    names = [said["aux"] if said["kind"] == "REPLACE" else said["id"] for said in told if "symbol" not in said and said["kind"] in OF_ORDER]
    id_field, qty_field = first.cases[0].values["id"], first.cases[0].values["qty"]
    symbol = {spec.symbol: "SEEN"} if spec.symbol in first.fields else {spec.code: 77}
    return [
        body_of(spec, first.name, **{id_field: order, qty_field: 10**4, "side": "S", **symbol}) for order in names if order not in added
    ]


OF_ORDER = ("EXECUTE", "CANCEL", "DELETE", "REPLACE", "MODIFY")


@need_pcaps
@pytest.mark.parametrize(("name", "path"), CAPTURES, ids=lambda value: value if isinstance(value, str) else value.stem)
def test_capture(name: str, path: Path) -> None:
    """Every message is decoded: counts by type and every field as the other reader says. Orders of before are made known first."""
    messages = 0
    for payloads in by_destination(path):
        counts, told = read(name, payloads)
        line, added = Line(name), resting(name, told)
        known = line.take([packet(name, [message], 0) for message in added])
        events = line.take(payloads)
        assert line.malformed == {}
        assert Counter(line.counts) - Counter(e["kind"] == Kind.ADD and added_name(name) for e in known) == counts
        defined = [said for said in told if said["kind"] == "REFERENCE"]
        others = [said for said in told if said["kind"] != "REFERENCE"]
        assert [told_of(e, line.table, w) for e, w in zip(references(events), defined, strict=False)] == expected(defined)
        assert [told_of(e, line.table, w) for e, w in zip(plain(events), others, strict=True)] == expected(others)
        messages += sum(counts.values())
    assert messages or path.stem == "Heartbeat"


def added_name(name: str) -> str:
    return next(m.name for m in load(name)[0].messages if any(c.kind == "add" for c in m.cases))


def expected(told: list[Told]) -> list[Told]:
    """Before the first message that tells the seconds, an event has the time of receipt."""
    return [{**said, "at": 5} if "at" in said and said["at"] is None else said for said in told]


def plain(events: list[Any]) -> list[Any]:
    return [e for e in events if e["kind"] != Kind.REFERENCE]


def references(events: list[Any]) -> list[Any]:
    return [e for e in events if e["kind"] == Kind.REFERENCE]


@need_pcaps
@pytest.mark.parametrize("name", FOLLOWING)
def test_an_order_that_nobody_added_is_counted(name: str) -> None:
    for path in [path for found, path in CAPTURES if found == name]:
        for payloads in by_destination(path):
            line = Line(name)
            line.take(payloads)
            assert set(line.malformed) <= {"unknown_order"}
            assert line.malformed.get("unknown_order", 0) == len(resting(name, read(name, payloads)[1]))


@need_pcaps
def test_captured_adds_by_hand() -> None:
    """Values read from the hex by eye."""
    path = next(path for name, path in CAPTURES if name == "cboe_pitch" and path.stem == "MultipleMessages")
    line = Line("cboe_pitch", midnight_ns=10**18)
    _, yang, _, xsvn = line.take([payload for _, payload in datagrams(path)])  # messages 2 and 3; the first tells the time
    assert (line.table.symbol(yang["instrument"]), yang["side"], yang["qty"], yang["price"]) == ("YANG", 0, 8200, 11_330_000_000)
    assert (yang["id"], yang["seq"], yang["ts_event"]) == (0x3904B28AC1CDC2D9, 0x8B9F, 10**18 + 34200 * 10**9 + 754_000)
    assert xsvn["seq"] == 0x8BA0
    assert (line.table.symbol(xsvn["instrument"]), xsvn["side"], xsvn["qty"], xsvn["price"]) == ("XSVN", 0, 100, 46_670_000_000)
    path = next(path for name, path in CAPTURES if name == "memx_memoir_depth" and path.stem == "OrderAddedMessage")
    line = Line("memx_memoir_depth")
    add = line.take([payload for _, payload in datagrams(path)])[-1]
    assert (add["kind"], add["side"], add["qty"], add["price"], add["id"]) == (Kind.ADD, 1, 900, 104_760_000_000, 0x13EA06A)
    assert (line.table.symbol(add["instrument"]), add["seq"], add["ts_event"]) == ("#7996", 0x14EEAB, 0x177DB7AFA6673A40)


@need_pcaps
def test_the_packet_of_another_venue_is_itch() -> None:
    from test_decoder import packets_of

    _, feed, _ = packets_of(next(PCAPS.glob(f"Memx/*/{FOREIGN}.pcap")), "itch50", "moldudp64")
    assert (D.message_counts(feed, load_spec("itch50")), D.malformed(feed)) == ({"stock_trading_action": 1}, {})


@need_pcaps
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_source_needs_no_framing(name: str) -> None:
    path = next(path for found, path in CAPTURES if found == name and path.stem != "Heartbeat")
    reader = open_reader("feed", Source(type="pcap", data_format=name, path=str(path)), [path], InstrumentTable(64))
    out = np.zeros(258, EVENT)
    while reader.read(out):
        pass
    assert sum(reader.messages.values()) > 0


def test_a_replay_follows_orders_to_their_books(tmp_path: Path) -> None:
    """The whole way from a capture to books, through the loop that contains the decoder."""
    line = Line("cboe_pitch")
    time = body_of(line.spec, "time", seconds=34_200)
    executed = body_of(line.spec, "order_executed", order_id=1, executed_quantity=2, execution_id=9)
    first = [time, *adds(line, (1, "ABC"), (2, "ABC"), (3, "XYZ")), executed]
    path = tmp_path / "day.pcap"
    write_pcap(path, [packet("cboe_pitch", first, 1), packet("cboe_pitch", deletes(line, 2, 3), 6)])
    summary = replay(config_of("cboe_pitch", "pcap", source='date = "2023-08-22"\ntimezone = "America/New_York"'), [path])
    assert (summary["malformed"], summary["refused"]) == ({}, {})
    assert summary["messages"] == {"add_order_short": 3, "order_executed": 1, "delete_order": 2, "time": 1}
    about = summary["instruments"]
    assert (about["ABC"]["bids"], about["ABC"]["volume"], about["XYZ"]["bids"]) == ([["10", "3", 1]], "2", [])


def test_usual_framings_are_shipped() -> None:
    assert {*PROTOCOLS, "itch50", "iex_deep_plus", "dbn_mbo"} <= set(USUAL_FRAMING) <= set(shipped_names())
    assert {framing for pair in USUAL_FRAMING.values() for framing in pair if framing} <= set(shipped_names("framing_"))


def test_the_how_to_names_every_shipped_protocol() -> None:
    page = (ROOT / "docs" / "howto" / "add-a-protocol.md").read_text()
    assert [name for name in USUAL_FRAMING if f"`{name}`" not in page] == []


# ---------------------------------------------------------------- books


def test_a_book_of_prices_without_orders() -> None:
    line = Line("iex_deep")
    level = lambda side, price, size, flags=1: body_of(line.spec, f"level_{side}", symbol="ABC", price=price, size=size, event_flags=flags)  # noqa: E731
    messages = [
        level("buy", 100_000, 5, 0),
        level("buy", 99_900, 7),
        level("sell", 100_100, 3),
        level("buy", 100_000, 0),
        level("buy", 99_900, 2),
    ]
    events = line.take([packet("iex_deep", messages, 1)])
    assert [int(e["flags"]) for e in plain(events)] == [Flag.MORE, 0, 0, 0, 0]
    assert top(book_after(events), 0, 9) == ([(9_990_000_000, 2, 0)], [(10_010_000_000, 3, 0)])


def test_a_book_of_orders_that_name_no_instrument() -> None:
    line = Line("cboe_pitch")
    of = lambda name, **values: body_of(line.spec, name, **values)  # noqa: E731
    messages = [
        of("add_order_short", order_id=1, side="B", quantity=100, symbol="ABC", price=1000),
        of("add_order_long", order_id=2, side="B", quantity=70_000, symbol="ABC", price=100_000),
        of("add_order_expanded", order_id=3, side="S", quantity=9, symbol="ABC", price=101_000),
        of("add_order_short", order_id=4, side="S", quantity=9, symbol="XYZ", price=1000),
        of("reduce_size_short", order_id=1, canceled_quantity=10),
        of("order_executed", order_id=1, executed_quantity=20, execution_id=9),
        of("modify_order_short", order_id=2, quantity=50, price=999),
        of("modify_order_long", order_id=3, quantity=4, price=100_500),
        of("delete_order", order_id=4),
        of("order_executed_at_price", order_id=3, executed_quantity=1, remaining_quantity=3, execution_id=10, price=100_400),
    ]
    events = line.take([packet("cboe_pitch", messages, 1)])
    assert line.malformed == {}
    assert [line.table.symbol(e["instrument"]) for e in plain(events)] == [
        "ABC",
        "ABC",
        "ABC",
        "XYZ",
        "ABC",
        "ABC",
        "ABC",
        "ABC",
        "XYZ",
        "ABC",
    ]
    books = book_after(events)
    assert top(books, 0, 9) == ([(10_000_000_000, 70, 1), (9_990_000_000, 50, 1)], [(10_050_000_000, 3, 1)])
    assert top(books, 1, 9) == ([], [])
    assert int(line.feed.state[ORDERS_KNOWN]) == 3


def book_after(events: list[Any]) -> Any:
    books = make_books(8, order_ids="random")
    batch = np.array(plain(events), EVENT)
    results = np.zeros(len(batch), np.int64)
    apply_events(books, batch, results, np.zeros(64, EVENT))
    assert not results.any()
    return books


# ---------------------------------------------------------------- orders that are followed


def adds(line: Line, *orders: tuple[int, str]) -> list[bytes]:
    return [body_of(line.spec, "add_order_short", order_id=o, side="B", quantity=5, symbol=s, price=1000) for o, s in orders]


def deletes(line: Line, *orders: int) -> list[bytes]:
    return [body_of(line.spec, "delete_order", order_id=order) for order in orders]


def test_what_is_filtered_stays_filtered() -> None:
    table = InstrumentTable(8)
    table.let_through(0, include=["A*"])
    line = Line("cboe_pitch", table=table)
    events = line.take([packet("cboe_pitch", [*adds(line, (1, "ABC"), (2, "ZZZ")), *deletes(line, 1, 2, 2)], 1)])
    assert [(Kind(e["kind"]).name, line.table.symbol(e["instrument"])) for e in plain(events)] == [("ADD", "ABC"), ("DELETE", "ABC")]
    assert (D.filtered(line.feed), line.malformed) == (2, {"unknown_order": 1})


def test_an_order_table_that_is_full_refuses_and_recovers() -> None:
    line = Line("cboe_pitch", order_slots=8)
    line.take([packet("cboe_pitch", adds(line, *((n, "ABC") for n in range(1, 9))), 1)])
    assert line.malformed == {"orders_full": 2}
    events = line.take([packet("cboe_pitch", [*deletes(line, 1, 2, 7), *adds(line, (7, "ABC"), (8, "ABC"))], 9)])
    assert [Kind(e["kind"]).name for e in events] == ["DELETE", "DELETE", "ADD", "ADD"]
    assert line.malformed == {"orders_full": 2, "unknown_order": 1}


def test_a_unit_clear_and_a_restart_forget_the_orders() -> None:
    line = Line("cboe_pitch", restart_distance=10)
    clear = body_of(line.spec, "unit_clear")
    events = line.take([packet("cboe_pitch", [*adds(line, (1, "ABC")), clear, *deletes(line, 1), *adds(line, (2, "ABC"))], 100)])
    assert [Kind(e["kind"]).name for e in plain(events)] == ["ADD", "CLEAR", "ADD"]
    assert (events[2]["instrument"], events[2]["aux"]) == (ALL_INSTRUMENTS, 1), "no new session of the venue"
    events = line.take([packet("cboe_pitch", deletes(line, 2), 1)])
    assert [Kind(e["kind"]).name for e in events] == ["CLEAR"]
    assert line.malformed == {"unknown_order": 2}


def test_what_expects_a_message_too_many_tells_a_gap() -> None:
    """So goes on a node that was restarted: it does not know the orders that rest, which makes its books stale."""
    line = Line("cboe_pitch", start_sequence=8)
    gap, *events = line.take([packet("cboe_pitch", [*deletes(line, 1), *adds(line, (2, "ABC"))], 9)])
    assert (gap["kind"], gap["instrument"], gap["id"], gap["aux"]) == (Kind.GAP, ALL_INSTRUMENTS, 8, 8)
    assert [Kind(e["kind"]).name for e in plain(events)] == ["ADD"]
    assert line.malformed == {"unknown_order": 1}


def test_a_feed_goes_on_with_the_orders_of_another() -> None:
    before, line = Line("cboe_pitch"), Line("cboe_pitch")
    before.take([packet("cboe_pitch", adds(before, (1, "ABC"), (2, "XYZ")), 1)])
    take_orders(line.feed, before.feed, [1])
    line.take([packet("cboe_pitch", adds(line, (3, "ABC"), (4, "XYZ")), 1)])
    events = line.take([packet("cboe_pitch", deletes(line, 1, 2, 3, 4), 3)])
    assert [(Kind(e["kind"]).name, int(e["id"])) for e in events] == [("DELETE", 1), ("DELETE", 3), ("DELETE", 4)]
    assert (D.filtered(line.feed), int(line.feed.state[ORDERS_KNOWN]), line.malformed) == (1, 0, {})


@pytest.mark.parametrize("same_day", [True, False])
def test_a_receiver_goes_on_with_what_the_decoder_before_it_remembers(same_day: bool) -> None:
    """A source that is changed while the node runs, over lines or over a connection."""
    spec, table = load_spec("cboe_pitch"), InstrumentTable(4)
    known, left_out = (table.intern(symbol, 0, 1, 0) for symbol in ("ABC", "XYZ"))
    table.arrays.records["flags"][left_out] |= EXCLUDED
    later = 0 if same_day else 86_400 * 10**9
    before, feed = (D.make_feed(spec, table, midnight_ns=10**18 + ns, order_slots=16) for ns in (0, later))
    assert int(feed.state[TIME_BASE_NS]) == NOT_TOLD
    before.orders[3], before.orders[4] = (11, known, 5), (12, left_out, 6)
    before.state[ORDERS_KNOWN], before.state[TIME_BASE_NS] = 2, 10**18 + 7
    take_memory(feed, before, table)
    assert feed.orders[[3, 4]].tolist() == [(11, known, 5), (12, FILTERED, 6)]
    assert int(feed.state[ORDERS_KNOWN]) == 2
    assert int(feed.state[TIME_BASE_NS]) == (10**18 + 7 if same_day else NOT_TOLD)


def test_messages_that_are_not_wanted_still_tell_of_which_instrument_an_order_is() -> None:
    spec, framing, _ = load("cboe_pitch")
    chosen = D.select(spec, (), ["delete_order"])
    decoder = D.load_decoder(spec, framing, messages=["delete_order"])
    line = Line("cboe_pitch")
    line.decoder = decoder
    events = line.take([packet("cboe_pitch", [*adds(line, (1, "ABC")), *deletes(line, 1)], 1)])
    assert {c.kind for m in chosen.messages for c in m.cases if not c.silent} == {"delete", "reference", "time", "nothing"} - {"reference"}
    assert [(Kind(e["kind"]).name, line.table.symbol(e["instrument"])) for e in events] == [("REFERENCE", "ABC"), ("DELETE", "ABC")]


def test_an_osi_symbol_names_what_came_before_it() -> None:
    line = Line("cboe_pitch_options")
    feed_symbol = int.from_bytes(b"027wUE", "little")
    add = body_of(line.spec, "add_order_long", order_id=1, side="S", quantity=5, price=29, feed_symbol=feed_symbol)
    mapping = body_of(line.spec, "symbol_mapping", feed_symbol=feed_symbol, osi_symbol="SPX   200619P05000000")
    events = line.take(
        [packet("cboe_pitch_options", [add], 1), packet("cboe_pitch_options", [mapping], 0), packet("cboe_pitch_options", [add], 2)]
    )
    assert [line.table.symbol(e["instrument"]) for e in plain(events)] == [f"#{feed_symbol}", "SPX   200619P05000000"]


# ---------------------------------------------------------------- a slow twin


class Twin:
    """The spec read byte by byte, with a dict of orders: (kind, symbol, side, flags, price, qty, id, aux, ts_event) of each event."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.orders: dict[int, list[Any]] = {}
        self.base: int | None = None
        self.symbols: dict[int, str] = {}

    def take(self, raw: bytes) -> tuple[Any, ...] | None:
        spec, tf = self.spec, self.spec.type_field
        message = next((m for m in spec.messages if len(raw) >= tf.offset + tf.size and m.code == number(raw, tf)), None)
        if message is None or len(raw) < message.length:
            return None
        fields = message.fields
        case = next((c for c in message.cases if all(number(raw, fields[k]) in codes for k, codes in c.when.items())), None)
        if case is None:
            return None
        values = {k: value(raw, fields[v], k) if isinstance(v, str) else v for k, v in case.values.items()}
        if None in values.values():
            return None
        if case.kind == "time":
            self.base = values["seconds"] * 10**9
        if case.kind in ("time", "nothing"):
            return None
        symbol = self._symbol(raw, fields, case.kind)
        if symbol == "" and not case.all_instruments and not case.by_order:
            return None
        if case.kind == "reference":
            return None
        flags = case.flags
        for rule in case.flag_rules:
            flags |= rule.flag if ((number(raw, fields[rule.field]) & rule.bits) == rule.equals) == rule.wanted else 0
        if spec.follow_orders and not self._follow(case.kind, values):
            return None
        if case.by_order:
            symbol = self.found
        elif spec.follow_orders and case.kind == "add":
            self._rest(values["id"], values["qty"], symbol)
        if case.kind == "clear" and case.all_instruments:
            self.orders.clear()
        told = tuple(values.get(k, 0) for k in ("price", "qty", "id", "aux"))
        name = None if case.all_instruments else symbol
        return (int(D.KINDS[case.kind]), name, values.get("side", 2), flags, *told, self._time(raw, fields))

    def _symbol(self, raw: bytes, fields: Any, kind: str) -> str:
        text = fields.get(self.spec.symbol)
        written = raw[text.offset : text.offset + text.size].rstrip(b" \0").decode("latin-1") if text else ""
        code = fields.get(self.spec.code)
        if code is None:
            return written
        key = number(raw, code)
        if kind == "reference" and written:
            self.symbols[key] = written
        return self.symbols.setdefault(key, f"#{key}")

    def _rest(self, order: int, qty: int, symbol: str) -> None:
        if qty > 0:
            self.orders[order] = [symbol, min(qty, (1 << 32) - 1)]
        else:
            self.orders.pop(order, None)

    def _follow(self, kind: str, values: dict[str, Any]) -> bool:
        if kind not in ("execute", "cancel", "delete", "replace", "modify"):
            return True
        name = values["aux"] % (1 << 64) if kind == "replace" else values["id"]
        if name not in self.orders:
            return False
        order = self.orders[name]
        self.found = order[0]
        if kind in ("delete", "replace"):
            del self.orders[name]
        elif kind == "modify":
            self._rest(name, values["qty"], order[0]) if values["qty"] > 0 else self.orders.pop(name)
        elif order[1] <= values["qty"]:
            del self.orders[name]
        else:
            order[1] -= values["qty"]
        if kind == "replace":
            self._rest(values["id"], values["qty"], order[0])
        return True

    def _time(self, raw: bytes, fields: Any) -> int:
        stamp = fields.get(self.spec.timestamp)
        if stamp is None or (self.spec.timestamp_since == "time_message" and self.base is None):
            return 5
        return wrapped(number(raw, stamp) * self.spec.timestamp_unit_ns + (self.base or 0))


def number(raw: bytes, field: Field) -> int:
    part = raw[field.offset : field.offset + field.size]
    return int.from_bytes(part, "little" if field.text or not field.big else "big", signed=field.signed)


def wrapped(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def value(raw: bytes, field: Field, target: str) -> int | None:
    found = number(raw, field)
    if field.map is not None:
        return field.map.get(found, field.map_default)
    if field.null is not None and found == field.null:
        return -(1 << 63) if field.decimals >= 0 else 0
    if field.decimals >= 0:
        found *= 10 ** (9 - field.decimals)
    if (field.decimals >= 0 or target in ("qty", "price")) and not -(1 << 63) < found < 1 << 63:
        return None
    return found % (1 << 64) if target == "id" else wrapped(found)


def a_message(data: st.DataObject, spec: Spec, message: Message) -> bytes:
    """Random bytes, mostly as the spec allows them, of few instruments and few orders."""
    size = max(1, message.length + data.draw(st.sampled_from([0, 0, 0, 0, 2, -1])))
    body = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
    for name, field in message.fields.items():
        if field.offset + field.size > size:
            continue
        if field.map and data.draw(st.integers(0, 9)):
            body[field.offset] = data.draw(st.sampled_from(sorted(field.map)))
        elif name == spec.symbol:
            put(body, field, data.draw(st.sampled_from(["ABC", "XYZ", "LONGER"])))
        elif name == spec.code:
            put(body, field, data.draw(st.integers(1, 3)))
        elif "order" in name and field.size == 8:
            put(body, field, data.draw(st.integers(1, 6)))
        elif field.decimals >= 0 and data.draw(st.integers(0, 9)):
            put(body, field, data.draw(st.integers(-(10**4) if field.signed else 0, 10**4)))
        elif "quantity" in name or "seconds" in name or "size" in name:
            put(body, field, data.draw(st.integers(0, 20)))
    if spec.type_field.offset < size:
        body[spec.type_field.offset] = message.code
    if spec.name.startswith("cboe"):
        body[0] = size
    return bytes(body)


@pytest.mark.parametrize("name", PROTOCOLS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_twin(name: str, data: st.DataObject) -> None:
    line = Line(name, order_slots=64)
    messages = [a_message(data, line.spec, data.draw(st.sampled_from(line.spec.messages))) for _ in range(data.draw(st.integers(1, 20)))]
    twin = Twin(line.spec)
    wanted = [event for event in map(twin.take, messages) if event is not None]
    events = line.take([packet(name, messages[:7], 1), packet(name, messages[7:], 1 + len(messages[:7]))])
    got = [
        (*(int(e[k]) for k in ("kind", "side", "flags", "price", "qty", "id", "aux", "ts_event")), e["instrument"]) for e in plain(events)
    ]
    shown = [(kind, None if where == ALL_INSTRUMENTS else line.table.symbol(where), *rest) for kind, *rest, where in got]
    assert shown == wanted
    assert sum(line.counts.values()) + sum(line.malformed.values()) >= len(messages)
    assert int(line.feed.state[ORDERS_KNOWN]) == len(twin.orders)
    assert int(np.count_nonzero(line.feed.orders["qty"])) == len(twin.orders)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(["add_order_short", "delete_order"]), st.integers(0, 11)), min_size=1, max_size=80))
def test_orders_that_share_their_places(steps: list[tuple[str, int]]) -> None:
    """A table as full as it gets: taking an order out leaves every other one where it is found."""
    line, twin = Line("cboe_pitch", order_slots=16), Twin(load("cboe_pitch")[0])
    messages = []
    for name, order in steps:
        more = {"side": "B", "quantity": 1, "symbol": f"S{order}", "price": 1} if name == "add_order_short" else {}
        messages.append(body_of(line.spec, name, order_id=order * 0x1F351F351F351F35 % (1 << 64), **more))
    wanted = [event for event in map(twin.take, messages) if event]
    events = plain(line.take([packet("cboe_pitch", messages, 1)]))
    assert [(e["kind"], line.table.symbol(e["instrument"])) for e in events] == [(kind, symbol) for kind, symbol, *_ in wanted]
    assert line.malformed.get("unknown_order", 0) == len(messages) - len(wanted)
    assert int(line.feed.state[ORDERS_KNOWN]) == np.count_nonzero(line.feed.orders["qty"]) == len(twin.orders)


# ---------------------------------------------------------------- lines A and B


@pytest.mark.parametrize("name", ["cboe_pitch", "memx_memoir_depth", "iex_deep", "jnx_itch"])
def test_two_lines_are_arbitrated(name: str) -> None:
    line = Line(name, gap_wait_ns=10)
    first = next(m for m in line.spec.messages if any(c.kind in ("add", "level") for c in m.cases))
    symbol = {line.spec.symbol: "ABC"} if line.spec.symbol in first.fields else {line.spec.code: 3}
    order = {first.cases[0].values["id"]: 0} if "id" in first.cases[0].values else {}
    messages = []
    for n in range(8):
        order = dict.fromkeys(order, n + 1)
        side = {"side": "B"} if "side" in first.fields else {}
        messages.append(body_of(line.spec, first.name, **symbol, **order, **side, price=100))
    one, two, three = (packet(name, messages[a:b], 1 + a) for a, b in ((0, 3), (3, 5), (5, 8)))
    events = line.take([one, one, three, two, two, three], lines=[0, 1, 0, 1, 0, 1])
    assert [int(e["seq"]) for e in plain(events)] == list(range(1, 9))
    arbitrated = D.arbitration(line.feed)
    assert (arbitrated["duplicates"], arbitrated["gaps"]) == (3, 0)
    line.take([packet(name, [], 12, heartbeat=True)])
    out = np.zeros(8, EVENT)
    assert line.decoder.decode_flush(10**6, line.feed, out) == 1
    assert (out[0]["kind"], out[0]["id"], out[0]["aux"]) == (Kind.GAP, 9, 11), "a heartbeat tells which sequence comes next"


# ---------------------------------------------------------------- messages with headers of their own


def quote(line: Line, **values: int) -> bytes:
    return body_of(line.spec, "best_bid_and_offer", instrument_id=7, **{"bid_size": 1, "ask_size": 2, "ask_price": 5, **values})


def test_a_datagram_of_messages_with_headers_of_their_own() -> None:
    """Each takes a sequence, the last one on line B only; what comes twice counts once."""
    line = Line("miax_onyx_tom", gap_wait_ns=10)
    one, two, three = (quote(line, bid_price=price) for price in (-3, 0, 4))
    whole = packet("miax_onyx_tom", [one, two, three], 5)
    events = plain(line.take([packet("miax_onyx_tom", [one, two], 5), whole], lines=[0, 1]))
    assert [(int(e["seq"]), int(e["price"])) for e in events] == [(5, -3), (6, 0), (7, 4)]
    assert (D.arbitration(line.feed)["overlaps"], line.malformed) == (1, {})
    line.take([packet("miax_onyx_tom", [one], 10)])
    (gap,) = plain(line.take([packet("miax_onyx_tom", [two], 8), packet("miax_onyx_tom", [one, two], 9)]))[:1]
    assert int(gap["seq"]) == 8
    assert D.arbitration(line.feed)["expected"] == 11


def test_a_datagram_cut_in_the_middle_of_a_message() -> None:
    line = Line("miax_onyx_tom")
    whole = packet("miax_onyx_tom", [quote(line), quote(line)], 1)
    assert len(plain(line.take([whole[:-1]]))) == 1
    assert line.malformed == {"trailing_bytes": 1}
    assert line.take([packet("miax_onyx_tom", [quote(line)], 2)[:-1]]) == []
    assert line.malformed == {"trailing_bytes": 1, "truncated": 1}
    assert D.arbitration(line.feed)["expected"] == 2, "the message that was cut is missing until it comes"


@pytest.mark.parametrize(("bid", "ask"), [(0, 0), (0, 3), (3, 0), (3, 4)])
def test_a_side_without_size_is_absent(bid: int, ask: int) -> None:
    line = Line("miax_onyx_tom")
    (told,) = plain(line.take([packet("miax_onyx_tom", [quote(line, bid_size=bid, ask_size=ask, bid_price=8, ask_price=9)], 1)]))
    assert (told["qty"], told["id"]) == (bid, ask)
    assert (told["price"], told["aux"]) == (8 if bid else NO_PRICE, 9 if ask else NO_PRICE)


def test_a_definition_without_a_symbol_gives_the_tick() -> None:
    line = Line("miax_onyx_tom")
    for number, name in enumerate(("instrument_definition", "strategy_definition"), 1):
        line.take([packet("miax_onyx_tom", [body_of(line.spec, name, instrument_id=number, tick=250_000 * number)], number)])
        assert int(line.table.record(line.table.find(f"#{number}"))["tick_size"]) == 250_000 * number
    assert line.malformed == {}


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", PROTOCOLS)
@settings(deadline=None, max_examples=60)
@given(raw=st.binary(max_size=120), sequence=st.integers(0, 3), count=st.integers(0, 5))
def test_any_bytes(name: str, raw: bytes, sequence: int, count: int) -> None:
    line = Line(name, room=4, capacity=2, order_slots=8)
    whole = bytearray(packet(name, [], sequence) + raw)
    framing = load(name)[1]
    if framing.count:
        put(whole, framing.count, count)
    line.take([bytes(whole), raw])
    assert sum(line.counts.values()) <= 2 * (len(whole) + len(raw))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_message_cut_short_is_refused(name: str) -> None:
    line = Line(name)
    for sequence, message in enumerate(line.spec.messages, 1):
        whole = body_of(line.spec, message.name)
        cut = bytearray(whole[:-1])
        if name.startswith("cboe"):
            cut[0] = len(cut)
        line.take([packet(name, [bytes(cut)], sequence)])
        assert line.malformed == {"bad_length": sequence}
    assert line.counts == {}


_FUZZ = """
import random, sys
sys.path.insert(0, {tests!r})
import test_protocol_files as t
from tickmesh.transports.toolbox import BOUNDSCHECK
assert BOUNDSCHECK
rng = random.Random({seed})
for name in ("cboe_pitch", "cboe_pitch_options"):
    for _ in range(300):
        line = t.Line(name, room=rng.choice([3, 7, 258]), capacity=3, order_slots=8)
        payloads = []
        for sequence in range(6):
            messages = [t.body_of(line.spec, m.name, **{{k: rng.randrange(1, 9) for k in m.fields if "order_id" in k or "quantity" in k}})
                        for m in rng.choices(line.spec.messages, k=rng.randint(0, 6))]
            raw = bytearray(t.packet(name, messages, rng.randrange(12)))
            for _ in range(rng.choice([0, 0, 3])):
                raw[rng.randrange(len(raw))] = rng.randrange(256)
            payloads.append(bytes(raw[: rng.randrange(len(raw) + 1)] if rng.random() < 0.2 else raw))
        line.take(payloads, [rng.randrange(2) for _ in payloads])
print("fine")
"""


@pytest.mark.slow
def test_damaged_input_with_bounds_checks() -> None:
    seed = int(os.environ.get("TICKMESH_SEED", "20230822"))
    done = with_bounds_checks("-c", _FUZZ.format(tests=str(Path(__file__).parent), seed=seed))
    assert done.stdout.strip() == "fine", f"TICKMESH_SEED={seed}\n{done.stderr[-3000:]}"


# ---------------------------------------------------------------- the language


def test_following_orders_needs_an_add(tmp_path: Path) -> None:
    text = (ROOT / "node" / "protocols" / "jnx_itch.toml").read_text()
    without = tmp_path / "without.toml"
    without.write_text(text.replace('kind = "add"', 'kind = "nothing"'))
    with pytest.raises(SpecError, match="follow_orders: no message has an event of kind 'add'"):
        load_spec(without)
    without.write_text(text.replace("follow_orders = true", ""))
    with pytest.raises(SpecError, match="an event of kind 'execute' needs an instrument"):
        load_spec(without)
    without.write_text(text.replace('since = "time_message"', 'since = "time_message"\nseconds_since = "noon"'))
    with pytest.raises(SpecError, match="seconds_since: 'noon' is not one of midnight, epoch"):
        load_spec(without)
