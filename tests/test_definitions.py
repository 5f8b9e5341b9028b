"""Definitions from a channel of their own: a loop beside the feed that tells names, tick sizes and depths, wherever it comes in between."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounds import with_bounds_checks
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoder import captured, image
from test_recovery import DEFINITIONS, SECURITIES, SNAPSHOTS, Client, Market, changes, check_equal, definition, entry, packet
from test_sbe import B3, B3_XML, CME, CME_XML, HERE, level_of, need_data, rows_of, trial, venue

from tickmesh.control.config import ConfigError, parse_config
from tickmesh.node import decoder as D
from tickmesh.node.continuation import make_ids
from tickmesh.node.event import EVENT, REFERENCE, Kind
from tickmesh.node.feed import SINCE
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.protocol import load_framing, load_spec
from tickmesh.node.reader import SourceError, open_reader
from tickmesh.node.receivers import bind_codes
from tickmesh.node.recovery import NEVER
from tickmesh.node.replay import replay
from tickmesh.node.restore import RestoredShard, not_by_name
from tickmesh.node.sbe_mapping import SbeSpec
from tickmesh.transports.capture import PACKET, write_pcap

ROOM = 258
_decoders: dict[str, Any] = {}


# ---------------------------------------------------------------- a made-up venue, whose schema is here


def made_up(spec: SbeSpec | None = None) -> tuple[SbeSpec, Any, Any]:
    """The venue in packets: its mapping, framing and decoder."""
    spec = spec or trial()[0]
    framing = load_framing("cme_mdp3")
    if spec.path not in _decoders:
        _decoders[spec.path] = D.load_decoder(spec, framing)
    return spec, framing, _decoders[spec.path]


def listing(instrument: int, symbol: str, *, depth: int = 3, tick: int = 25 * 10**5) -> bytes:
    return trial()[2].encode("Listing", {"instrument": instrument, "symbol": symbol, "tick": {"mantissa": tick}, "depth": depth})


def book(instrument: int, *levels: dict[str, Any]) -> bytes:
    return trial()[2].encode("Book", {"at": {"time": 9}, "instrument": instrument, "levels": list(levels)})


class Decoded:
    """A feed of the made-up venue that is given packets one by one."""

    def __init__(self, room: int = ROOM, spec: SbeSpec | None = None, **options: Any) -> None:
        self.spec, framing, self.decoder = made_up(spec)
        self.table = InstrumentTable(64)
        self.feed = D.make_feed(self.spec, self.table, framing=framing, gap_wait_ns=1000, definition_line=DEFINITIONS, **options)
        self.out, self.events, self.now = np.zeros(room, EVENT), list[Any](), 0

    def take(self, raw: bytes, line: int = 0) -> None:
        """A packet arrives, in a buffer that ends with it."""
        self.now += 10_000
        packets = np.zeros(1, PACKET)
        packets["length"], packets["line"], packets["ts_recv"] = len(raw), line, self.now
        buf, at = image(raw), 0
        while True:
            at, n = self.decoder.decode_packets(buf, packets, at, 1, self.feed, self.out)
            self.events += [e.copy() for e in self.out[:n]]
            if n == 0 and at == 1:
                return

    @property
    def rows(self) -> list[tuple[str, str]]:
        return [(row[1], Kind(row[0]).name) for row in rows_of(self.events, self.table)]

    @property
    def counters(self) -> tuple[int, ...]:
        return tuple(D.definition_counters(self.feed).values())


def test_what_definitions_tell_and_what_they_leave_alone() -> None:
    """They have a sequence of their own, and the one of the feed's last packet in their events; their time is nobody's."""
    client = Decoded()
    client.take(packet(1, listing(5, "WIDGET")), DEFINITIONS)
    client.take(packet(70, book(5, level_of("insert", 1, 100)), book(6, level_of("insert", 1, 7))))
    client.take(packet(2, listing(7, "GADGET", depth=2)), DEFINITIONS)
    client.take(packet(71, book(7, level_of("insert", 1, 50))))
    assert client.rows == [
        ("WIDGET", "REFERENCE"), ("WIDGET", "CODE"), ("WIDGET", "LEVEL"), ("#6", "REFERENCE"), ("#6", "LEVEL"),
        ("GADGET", "REFERENCE"), ("GADGET", "CODE"), ("GADGET", "LEVEL"),
    ]  # fmt: skip
    assert [int(e["seq"]) for e in client.events] == [0, 0, 70, 70, 70, 70, 70, 71]
    assert [int(e["ts_event"]) for e in client.events if e["kind"] in (Kind.REFERENCE, Kind.CODE)][:2] == [0, 0]
    assert int(client.events[0].view(REFERENCE)["tick_size"]) == 25 * 10**7
    assert [int(e["aux"]) for e in client.events if e["kind"] == Kind.CODE] == [3, 2]
    arbitrated = D.arbitration(client.feed)
    assert (arbitrated["gaps"], arbitrated["duplicates"], arbitrated["expected"]) == (0, 0, 72)
    assert client.counters == (2, 1, 2)
    assert not D.malformed(client.feed)


def test_a_definition_that_is_heard_again_makes_no_event() -> None:
    client = Decoded()
    loop = [packet(1, listing(5, "WIDGET"), listing(6, "GADGET")), packet(2, listing(7, "GIZMO"))]
    for turn in range(3):
        for raw in loop:
            client.take(raw, DEFINITIONS)
        client.take(packet(turn + 1, book(5, level_of("set", 1, 100 + turn))))
    assert [row for row in client.rows if row[1] != "LEVEL"] == [
        (name, kind) for name in ("WIDGET", "GADGET", "GIZMO") for kind in ("REFERENCE", "CODE")
    ]  # fmt: skip
    assert client.counters == (6, 3, 3)


def test_books_and_trades_of_the_definition_channel_are_not_used(tmp_path: Path) -> None:
    """Neither messages of other kinds, nor other events of a message that defines."""
    text = (HERE / "sbe_trial.toml").read_text().replace("sbe_trial.xml", str(HERE / "sbe_trial.xml"))
    depth = '[[messages.Listing.event]]\nkind = "depth"'
    trade = '[[messages.Listing.event]]\nkind = "trade"\nprice = "tick"\nqty = "depth"\ngo_on = true\n'
    mapping = tmp_path / "mixed.toml"
    mapping.write_text(text.replace(depth, trade + depth))
    spec = load_spec(mapping)
    assert isinstance(spec, SbeSpec)
    client = Decoded(spec=spec)
    client.take(packet(1, book(5, level_of("insert", 1, 100)), listing(5, "WIDGET"), trial()[2].encode("Reset", {})), DEFINITIONS)
    assert client.rows == [("WIDGET", "REFERENCE"), ("WIDGET", "CODE")]
    client.take(packet(1, listing(6, "GADGET")))
    assert client.rows[2:] == [("GADGET", "REFERENCE"), ("GADGET", "TRADE"), ("GADGET", "CODE")]
    assert not D.malformed(client.feed)


@pytest.mark.parametrize("room", [17, 18, 23, 40])
def test_the_room_does_not_matter(room: int) -> None:
    """Also not to a packet of the feed that waits for a missing one: its gap comes behind the definitions that were there before it."""
    found = []
    for one in (ROOM, room):
        client = Decoded(one)
        client.take(packet(1, *(book(5 + k, level_of("insert", 1, 100)) for k in range(3))))
        client.take(packet(3, book(5, level_of("insert", 1, 200))))
        client.take(packet(1, *(listing(k, f"SYM{k}") for k in range(5, 40))), DEFINITIONS)
        client.take(packet(4, book(5, level_of("insert", 1, 200))))
        found.append([bytes(e) for e in client.events])
        assert (client.counters, D.malformed(client.feed)) == ((1, 1, 35), {})
        assert [row[1] for row in client.rows].count("CLEAR") == 3
    assert found[0] == found[1]


def test_a_level_that_is_pushed_out_goes() -> None:
    """Of a book that shows three nobody tells of it; without its definition four are taken, as the mapping says."""
    shown = {}
    for depth in (3, 4):
        client = Decoded()
        client.take(packet(1, listing(5, "WIDGET", depth=depth)), DEFINITIONS)
        for number in range(1, 5):
            client.take(packet(number, book(5, level_of("insert", 1, 100 + number))))
        prices: set[int] = set()
        for e in client.events:
            if e["kind"] == Kind.LEVEL:
                (prices.add if e["qty"] else prices.discard)(int(e["price"]) // 10**9)
        shown[depth] = prices
    assert shown == {3: {104, 103, 102}, 4: {104, 103, 102, 101}}


def test_what_a_filter_does_until_there_is_a_name() -> None:
    """Names that are wanted: without one nothing is let through, and the book is not known. Names that are not: the book of a code ends."""
    implied = level_of("insert", 1, 9, side=None)
    for filters in ({"include": ["WID*"]}, {"exclude": ["GAD*"]}):
        client = Decoded()
        client.table.let_through(0, **filters)
        client.take(packet(1, book(5, level_of("insert", 1, 100)), book(6, level_of("insert", 1, 100), implied)))
        client.take(packet(1, listing(5, "WIDGET"), listing(6, "GADGET")), DEFINITIONS)
        client.take(packet(2, book(5, level_of("insert", 1, 101)), book(6, level_of("insert", 1, 101), implied)))
        named = [("WIDGET", "REFERENCE"), ("WIDGET", "GAP"), ("WIDGET", "CODE"), ("WIDGET", "LEVEL")]
        if "exclude" in filters:
            named[1:1] = [("#5", "CLEAR")]
            named[4:4] = [("#6", "CLEAR"), ("#6.I", "CLEAR")]
            assert client.rows[:6:2] == [("#5", "REFERENCE"), ("#6", "REFERENCE"), ("#6.I", "REFERENCE")]
            assert client.rows[1:6:2] == [("#5", "LEVEL"), ("#6", "LEVEL"), ("#6.I", "LEVEL")]
        assert client.rows[-len(named) :] == named
        assert len(client.rows) == len(named) + (6 if "exclude" in filters else 0)


def test_a_definition_channel_waits_for_nobody() -> None:
    """Losses there are none of the feed's, a turn that begins anew either; a feed that has not begun yet goes on being that."""
    client = Decoded()
    for seq in (9, 1, 2, 7, 1, 1):
        client.take(packet(seq, listing(seq, f"SYM{seq}")), DEFINITIONS)
    client.take(packet(50, book(1, level_of("insert", 1, 100))))
    assert {kind for _, kind in client.rows} == {"REFERENCE", "CODE", "LEVEL"}
    assert client.counters == (6, 3, 4)
    assert D.arbitration(client.feed)["gaps"] == 0


# ---------------------------------------------------------------- bad input


def refused(raw: bytes, line: int = DEFINITIONS) -> tuple[dict[str, int], list[tuple[str, str]]]:
    client = Decoded()
    client.take(raw, line)
    client.take(packet(1, book(5, level_of("insert", 1, 100))))
    assert client.rows[-1][1] == "LEVEL", "the feed goes on"
    return D.malformed(client.feed), client.rows[:-1]


def test_what_is_no_definition_is_counted() -> None:
    good, named = listing(5, "WIDGET"), [("WIDGET", "REFERENCE"), ("WIDGET", "CODE")]
    unnamed = [("#5", "REFERENCE")]
    size = trial()[0].schema.header.size
    assert refused(b"") == ({"short_packet": 1}, unnamed)
    assert refused(packet(1)[:-1]) == ({"short_packet": 1}, unnamed)
    assert refused(packet(1)) == ({}, unnamed)
    assert refused(packet(1, good) + b"\1") == ({"truncated": 1}, named)
    assert refused(packet(1, good)[:-1]) == ({"length_past_end": 1}, unnamed)
    assert refused(packet(1, good, good[: size - 1])) == ({"bad_length": 1}, named)
    assert refused(packet(1, good, b"")) == ({"zero_length": 1}, named)
    for place, value, reason in (("templateId", 999, "unknown_message"), ("schemaId", 9, "other_schema"), ("blockLength", 3, "bad_length"),
                                 ("blockLength", 60_000, "bad_length")):  # fmt: skip
        member = trial()[0].schema.header.member(place)
        assert member is not None
        wrong = bytearray(good)
        struct.pack_into("<H", wrong, member.offset, value)
        assert refused(packet(1, bytes(wrong), good)) == ({reason: 1}, named), (place, value)


PROGRAM = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import numpy as np
import test_definitions as t
rng = np.random.default_rng(7)
for _ in range(400):
    client = t.Decoded(int(rng.integers(17, 40)))
    raw = bytearray(t.packet(1, *(t.listing(k, f"SYM{{k}}") for k in range(12)), t.book(3, t.level_of("insert", 1, 9))))
    for _ in range(int(rng.integers(1, 9))):
        raw[int(rng.integers(4, len(raw)))] = int(rng.integers(256))
    client.take(bytes(raw[: int(rng.integers(0, len(raw) + 1))]), t.DEFINITIONS)
    client.take(t.packet(1, t.book(3, t.level_of("insert", 1, 9))))
    assert client.rows[-1][1] == "LEVEL"
print("fine")
"""


def test_damaged_definitions_stay_in_bounds() -> None:
    done = with_bounds_checks("-c", PROGRAM)
    assert "fine" in done.stdout, done.stderr[-3000:]


# ---------------------------------------------------------------- CME


NAMES = dict(zip(SECURITIES, ("ESZ6", "NQZ6", "CLZ6", "GCZ6")))
SHOWN = {"Bid": 3, "Offer": 3, "ImpliedBid": 2, "ImpliedOffer": 2}


def turn_of(names: dict[int, str] = NAMES) -> list[bytes]:
    """The packets of a turn, two definitions each."""
    told = [definition(security, symbol, depths={"GBX": 3, "GBI": 2, "XXX": 7}) for security, symbol in names.items()]
    return [packet(place, *told[2 * place - 2 : 2 * place]) for place in range(1, len(told) // 2 + 1)]


@need_data
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1 << 32), st.lists(st.integers(1, 60), min_size=2, max_size=8), st.lists(st.integers(2, 50), max_size=3, unique=True),
       st.integers(64, 258))  # fmt: skip
def test_wherever_definitions_come_the_books_are_those_of_definitions_that_came_first(
    seed: int, when: list[int], lost: list[int], room: int
) -> None:
    market = Market(SECURITIES, np.random.default_rng(seed), depths=SHOWN)
    loop = turn_of()
    truth, client, blind = Client(recovers=False), Client(room=room), Client(recovers=False, room=room)
    for raw in loop:
        truth.take(raw, DEFINITIONS)
    told = {seq: [loop[k % 2] for k, one in enumerate(when) if one == seq] for seq in when}
    for seq in range(1, 61):
        raw = packet(seq, market.message(), market.message())
        truth.take(raw)
        for one in (client, blind):
            if seq not in lost:
                one.take(raw)
            for definitions in told.get(seq, ()):
                one.take(definitions, DEFINITIONS)
    shown = [truth.snapshot(security, 60) for security in SECURITIES]
    for _ in range(2):
        for place, message in enumerate(shown, 1):
            client.take(packet(place, message), SNAPSHOTS)
    check_equal(client, truth, truth.names)
    check_equal(blind, truth, truth.names - blind.stale)
    for one in (truth, client, blind):
        assert not D.malformed(one.feed)
        assert [name for name in one.names if name.startswith("#") and any(one.book(name))] == []
        sequences = [int(e["seq"]) for e in one.events]
        assert sequences == sorted(sequences)
    assert D.definition_counters(client.feed)["definitions_new"] == len(SECURITIES)


@need_data
def test_a_book_that_gets_its_name_late_is_the_true_one_after_its_snapshot() -> None:
    truth, client = Client(recovers=False), Client()
    truth.take(turn_of()[0], DEFINITIONS)
    for seq in range(1, 6):
        raw = packet(seq, changes(entry(11, 1, 1000 - seq, "Offer"), entry(22, 1, 5 + seq, "Bid")))
        truth.take(raw)
        client.take(raw)
    assert len(client.book("#11")[1]) == 5, "ten levels are taken of a book of which nobody has told"
    client.take(turn_of()[0], DEFINITIONS)
    assert (client.book("#11"), client.stale) == (([], []), {"ESZ6", "ESZ6.I", "NQZ6", "NQZ6.I"})
    for place, security in enumerate((11, 22), 1):
        client.take(packet(place, truth.snapshot(security, 5, 2)), SNAPSHOTS)
    check_equal(client, truth, truth.names)
    assert len(client.book("ESZ6")[1]) == 3
    raw = packet(6, changes(entry(11, 1, 900, "Offer")))
    for one in (truth, client):
        one.take(raw)
    check_equal(client, truth, truth.names)
    assert [price for price, _ in client.book("ESZ6")[1]] == [900, 995, 996], "997 was pushed out"


@need_data
def test_a_restarted_node_ends_books_under_a_code_that_its_journal_has() -> None:
    """The decoder begins anew and has nothing of them; whoever has kept them over the restart must not keep them for ever."""
    client = Client()
    number = client.table.intern("#11", 0, 10_000_000)
    client.table.arrays.records["announced"][number] = 1
    bind_codes(client.feed, client.table, {number: 11})
    client.feed.state[SINCE] = NEVER
    client.take(packet(1, changes(entry(11, 1, 1000, "Offer", "Delete"))))
    client.take(turn_of()[0], DEFINITIONS)
    told = [(client.table.symbol(int(e["instrument"])), Kind(int(e["kind"]))) for e in client.events if e["kind"] in (Kind.CLEAR, Kind.GAP)]
    assert told == [("#11", Kind.CLEAR), ("ESZ6", Kind.GAP), ("ESZ6.I", Kind.GAP), ("NQZ6.I", Kind.GAP)]
    assert client.stale == {"ESZ6", "ESZ6.I", "NQZ6.I"}


@need_data
def test_a_depth_that_the_journal_has_told_the_node_is_the_decoders_too() -> None:
    client = Client()
    client.take(packet(1, changes(entry(11, 1, 1000, "Offer"))))
    number = client.table.intern("ESZ6", 0, 10_000_000)
    client.table.arrays.records["announced"][number], client.table.arrays.records["depth"][number] = 1, 3
    client.take(turn_of()[0], DEFINITIONS)
    assert client.feed.depths[number] == 3


@need_data
def test_market_by_order_and_other_venues() -> None:
    spec, framing, decoder = venue("cme_mdp3_mbo", CME_XML)
    table = InstrumentTable(16)
    feed, out = D.make_feed(spec, table, framing=framing, definition_line=1), np.zeros(64, EVENT)
    packets = np.zeros(1, PACKET)
    raw = turn_of()[0]
    packets["length"], packets["line"] = len(raw), 1
    assert decoder.decode_packets(image(raw), packets, 0, 1, feed, out) == (1, 2)
    assert [table.symbol(i) for i in range(2)] == ["ESZ6", "NQZ6"]
    spec, framing, decoder = venue("b3_umdf", B3_XML)
    feed = D.make_feed(spec, table, 1, framing=framing, definition_line=1)
    buf, packets = captured(next(path for path in B3 if path.stem == "SecurityDefinitionMessage"))
    packets["line"] = 1
    assert decoder.decode_packets(buf, packets, 0, len(packets), feed, out) == (1, 0)
    assert D.malformed(feed) == {"unknown_message": 1}, "its schema is newer than ours"
    assert D.arbitration(feed)["expected"] == 0


@need_data
def test_damaged_definitions_of_cme_do_no_harm() -> None:
    """Groups whose counts go beyond the packet among them."""
    rng, counted = np.random.default_rng(3), {}
    good = turn_of()[0]
    entries = len(good) - 2 * 6 - 8  # somewhere in the last message's group of feed types
    for trial_number in range(300):
        client = Client(room=int(rng.integers(64, 258)))
        raw = bytearray(good)
        if trial_number < 100:
            raw[int(rng.integers(entries - 40, len(raw)))] = 255
        else:
            for _ in range(int(rng.integers(1, 5))):
                raw[int(rng.integers(4, len(raw)))] = int(rng.integers(256))
            raw = raw[: int(rng.integers(0, len(raw) + 1))]
        client.take(bytes(raw), DEFINITIONS)
        client.take(packet(1, changes(entry(11, 1, 1000, "Offer"))))
        assert D.arbitration(client.feed)["expected"] == 2
        for reason, count in D.malformed(client.feed).items():
            counted[reason] = counted.get(reason, 0) + count
    assert counted.keys() >= {"bad_group", "short_packet", "length_past_end", "unknown_message", "other_schema"}, counted


# ---------------------------------------------------------------- recordings


def config_of(*lines: str) -> str:
    return "\n".join(['[cluster]\nname = "t"\n[data_sources.x]\ntype = "pcap"', f'data_format = "cme_mdp3:{CME_XML}"', *lines]) + "\n"


def read_all(text: str, paths: Iterable[Path]) -> tuple[Client, Any]:
    """What a client makes of a recording, and the reader's counters."""
    table, client = InstrumentTable(512), Client()
    reader = open_reader("x", parse_config(text).data_sources["x"], list(paths), table, alone=True)
    client.table = table
    out = np.zeros(256, EVENT)
    while n := reader.read(out):
        for e in out[:n].copy():
            client.apply(e)
    return client, reader.counters()


@need_data
@pytest.mark.parametrize("snapshots", [False, True])
def test_a_recording_with_definitions_on_a_group_of_their_own(tmp_path: Path, snapshots: bool) -> None:
    """Both lines, the loop of definitions, and maybe snapshots, with which names may come late: the books are the true ones."""
    market, truth, datagrams, loop = Market(SECURITIES, np.random.default_rng(5), depths=SHOWN), Client(recovers=False), [], turn_of()
    for raw in loop:
        truth.take(raw, DEFINITIONS)
    for seq in range(1, 121):
        raw = packet(seq, market.message())
        truth.take(raw)
        now = seq * 10**7
        datagrams += [(now, f"239.1.1.{line}", 26400, raw) for line in (1, 2)]
        if not snapshots and seq == 1:
            datagrams = [(k, "239.1.1.4", 26400, one) for k, one in enumerate(loop)] + datagrams
        if seq % 10 == 0:
            datagrams.append((now + 1000, "239.1.1.4", 26400, loop[(seq // 10) % 2]))
    for place, security in enumerate(SECURITIES, 1) if snapshots else ():
        datagrams.append((10**10 + place, "239.1.1.3", 26400, packet(place, truth.snapshot(security, 120))))
    path = tmp_path / "x.pcap"
    write_pcap(path, datagrams)
    keys = [f'path = ["{path}"]', 'definition_endpoint = "udp://239.1.1.4:26400"']
    text = config_of(*keys, *(['snapshot_endpoint = "udp://239.1.1.3:26400"'] if snapshots else []))
    client, counters = read_all(text, [path])
    check_equal(client, truth, truth.names)
    assert all(len(side) <= 3 for name in truth.names for side in client.book(name))
    assert (counters["gaps"], counters["malformed"], counters["definitions_new"]) == (0, 0, 4)
    assert (counters["definition_packets"], counters["definition_turns"]) == ((12, 6) if snapshots else (14, 7))
    summary = replay(parse_config(text), [path])
    shown = summary["instruments"]["ESZ6"]
    assert [(round(float(level[0]) * 10**9), int(level[1])) for level in shown["asks"]] == [
        (price, qty) for price, (qty, _) in truth.book("ESZ6")[1]
    ]  # fmt: skip
    live = text.replace('type = "pcap"', 'type = "multicast"\nendpoint = "udp://239.1.1.1:26400"\nendpoint_b = "udp://239.1.1.2:26400"')
    same, counters = read_all(live.replace(keys[0], ""), [path])
    check_equal(same, truth, truth.names)
    assert counters["duplicates"] == 120, "each line is its own, where the configuration names them"


@need_data
def test_captures_of_cme_whose_definitions_come_on_a_group_of_their_own(tmp_path: Path) -> None:
    """Channel 310 of 2016: the definition of a spread was sent to 224.0.31.43, everything else to 224.0.31.1."""
    paths = [path for path in CME if path.parent.name.endswith("v1.5")]
    paths.sort(key=lambda path: "Definition" not in path.stem)
    listed = ", ".join(f'"{path}"' for path in paths)
    before, counters = read_all(config_of(f"path = [{listed}]"), paths)
    assert counters["gaps"] > 0, "without the key its sequence, 2, is taken for the feed's"
    client, counters = read_all(config_of(f"path = [{listed}]", 'definition_endpoint = "udp://224.0.31.43:14310"'), paths)
    assert "ESM6-ESU6" in client.names
    assert (counters["definition_packets"], counters["definition_turns"], counters["malformed"]) == (1, 0, 0)
    assert counters["definitions_new"] >= 1
    assert {"ESM6-ESU6"} <= before.names
    depth = [int(e["aux"]) for e in client.events if e["kind"] == Kind.CODE]
    assert depth
    assert set(depth) <= {2, 10}
    assert all(e["seq"] == 0 for e in client.events if e["kind"] == Kind.CODE), "none of the feed had come"


# ---------------------------------------------------------------- configuration


def test_which_sources_may_have_definitions(tmp_path: Path) -> None:
    def source(more: str) -> Any:
        return parse_config(f'[cluster]\nname = "t"\n[data_sources.x]\n{more}\n')

    live = f'type = "multicast"\nendpoint = "udp://239.1.1.1:26400"\ndata_format = "{HERE / "sbe_trial.toml"}"\n'
    channel = 'definition_endpoint = "udp://239.1.1.4:26400"\n'
    wrong = {
        'definition_endpoint = "tcp://239.1.1.4:1"': "must be udp://",
        'definition_endpoint = "udp://239.1.1.1:26400"': "is the group of another line",
        channel + 'snapshot_endpoint = "udp://239.1.1.4:26400"': "is the group of another line",
        channel + 'bypass = "afxdp"': "definitions are received by sockets",
        channel + 'rerequest = "udp://127.0.0.1:9"': "goes without definition_endpoint",
    }
    for more, reason in wrong.items():
        with pytest.raises(ConfigError, match=reason):
            source(live + more)
    path = tmp_path / "x.pcap"
    path.write_bytes(b"")
    for text, reason in (('data_format = "itch50"', "needs an SBE mapping"),
                         (f'data_format = "{HERE / "sbe_trial.toml"}"', "in packets")):  # fmt: skip
        options = source(f'type = "pcap"\npath = ["{path}"]\n{text}\n{channel}')
        with pytest.raises(SourceError, match=reason):
            open_reader("x", options.data_sources["x"], [path], InstrumentTable(4), alone=False)


# ---------------------------------------------------------------- takeovers


def test_books_that_a_new_leader_calls_otherwise_than_the_journal() -> None:
    """By codes 1 to 7: both by name, both by code, the name to us only, to the journal only, twice, to another shard, and a new one."""
    table, known = InstrumentTable(64), RestoredShard()
    ids, numbers, events = make_ids(64)[0], iter(range(64)), []

    def ours(symbol: str, code: int, *, met: bool = True) -> int:
        node = table.intern(symbol, 0)
        table.arrays.records["code"][node], table.arrays.records["announced"][node] = code, 1
        if met and ids[node] == np.iinfo(np.uint32).max:
            ids[node] = next(numbers)
        return node

    def theirs(symbol: str, code: int) -> int:
        node = table.intern(symbol, 0)
        ids[node] = number = next(numbers)
        both = np.zeros(2, EVENT)
        both["instrument"], both["kind"], both["id"] = number, (Kind.REFERENCE, Kind.CODE), (0, code)
        both[:1].view(REFERENCE)["symbol"] = symbol.encode()
        events.append(both)
        return number

    for symbol, code in (("ONE", 1), ("#2", 2), ("#3", 3), ("FOUR", 4), ("#5", 5), ("FIVE", 5), ("#6", 6)):
        theirs(symbol, code)
    known.take(np.concatenate(events))
    for symbol, code in (("ONE", 1), ("#2", 2), ("THREE", 3), ("#4", 4), ("#5", 5), ("FIVE", 5), ("SEVEN", 7)):
        ours(symbol, code)
    ours("SIX", 6, met=False)
    names = {int(ids[node]): table.symbol(node) for node in range(len(table))}
    ended, stale = not_by_name(known, table, 0, ids)
    assert {names[int(n)] for n in ended} == {"#3", "#5", "#6"}
    assert {names[int(n)] for n in stale} == {"#2", "THREE", "FOUR", "#4", "SEVEN"}
    assert [list(map(int, found)) for found in not_by_name(known, table, 1, ids)] == [[], []]
