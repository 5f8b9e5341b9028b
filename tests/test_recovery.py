"""Books that a gap has made stale come back from CME's snapshot channel, and equal those of a feed without loss."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoder import captured, image
from test_sbe import CME_AB, CME_XML, need_data, venue

from tickmesh.control.config import ConfigError, parse_config
from tickmesh.node import decoder as D
from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, NO_PRICE, Flag, Kind
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.reader import SourceError, open_reader
from tickmesh.node.recovery import ask_for_books, recovery_counters
from tickmesh.node.sbe_encoder import Encoder
from tickmesh.transports.capture import PACKET, write_pcap

pytestmark = need_data
SNAPSHOTS, DEFINITIONS, LEVELS = 2, 3, 10
Level = tuple[int, int, int]
_made: dict[str, Encoder] = {}


def encoder() -> Encoder:
    if "cme" not in _made:
        messages = ["SnapshotFullRefresh52", "MDIncrementalRefreshBook46", "ChannelReset4", "MDIncrementalRefreshTradeSummary48",
                    "MDInstrumentDefinitionFuture54"]  # fmt: skip
        _made["cme"] = Encoder(venue("cme_mdp3", CME_XML)[0].schema, messages)
    return _made["cme"]


def packet(seq: int, *messages: bytes) -> bytes:
    return struct.pack("<IQ", seq, 0) + b"".join(struct.pack("<H", len(message) + 2) + message for message in messages)


# ---------------------------------------------------------------- a client


@dataclass
class Client:
    """A decoder, and books by price made of its events as any subscriber would make them."""

    recovers: bool = True
    room: int = 258
    books: dict[tuple[str, int], dict[int, tuple[int, int]]] = field(default_factory=dict)
    stale: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    events: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        spec, framing, self.decoder = venue("cme_mdp3", CME_XML)
        self.table = InstrumentTable(512)
        line = SNAPSHOTS if self.recovers else -1
        self.feed = D.make_feed(spec, self.table, framing=framing, gap_wait_ns=1000, recovery_line=line, definition_line=DEFINITIONS)
        self.now = 0
        self.wrong_state = 0

    def take(self, raw: bytes, line: int = 0) -> None:
        """A packet arrives."""
        self.now += 10_000  # longer than a gap is waited for
        packets, out = np.zeros(1, PACKET), np.zeros(self.room, EVENT)
        packets["length"], packets["line"], packets["ts_recv"] = len(raw), line, self.now
        buf, at = image(raw), 0
        while True:
            at, n = self.decoder.decode_packets(buf, packets, at, 1, self.feed, out)
            for e in out[:n].copy():
                self.apply(e)
            if n == 0 and at == 1:
                break
        while n := self.decoder.decode_flush(self.now + 5_000, self.feed, out):
            for e in out[:n].copy():
                self.apply(e)

    def apply(self, e: Any) -> None:
        self.events.append(e)
        if e["instrument"] == ALL_INSTRUMENTS:
            if e["kind"] == Kind.GAP:
                self.stale = set(self.names) | {"*"}
            elif e["kind"] == Kind.CLEAR:
                self.books.clear()
                self.stale.clear()
            return
        name = self.table.symbol(int(e["instrument"]))
        if name not in self.names and "*" in self.stale:
            self.stale.add(name)
        self.names.add(name)
        if e["kind"] == Kind.GAP:
            self.stale.add(name)
        elif e["kind"] == Kind.CLEAR:
            for side in (0, 1):
                if e["side"] in (2, side):
                    self.books[name, side] = {}
            if e["side"] == 2:
                self.stale.discard(name)
        elif e["kind"] == Kind.LEVEL:
            side = self.books.setdefault((name, int(e["side"])), {})
            side.pop(int(e["price"]), None)
            if e["qty"]:
                side[int(e["price"])] = int(e["qty"]), int(e["aux"])

    def book(self, name: str) -> tuple[list[Any], list[Any]]:
        """Levels of both sides, best first."""
        bids, asks = (self.books.get((name, side), {}) for side in (0, 1))
        return sorted(bids.items(), reverse=True), sorted(asks.items())

    def snapshot(self, security: int, processed: int, reports: int = 4) -> bytes:
        """The message that a venue sends of a book as it is here now, one of `reports` in a turn: levels by their positions."""
        entries = []
        for code, kinds in ((security, ("Bid", "Offer")), (security | 1 << 62, ("ImpliedBid", "ImpliedOffer"))):
            known_as = [i for i in range(len(self.table)) if int(self.table.record(i)["code"]) == code]
            number = known_as[-1] if known_as else None
            name = self.table.symbol(number) if number is not None else ""
            for side, kind in enumerate(kinds if number is not None else ()):
                first = (int(number or 0) * 2 + side) * LEVELS
                for at, price in enumerate(self.feed.ladders[first : first + LEVELS]):
                    known = self.books.get((name, side), {}).get(int(price))
                    if price != NO_PRICE and known:
                        entries.append({"MDEntryPx": {"mantissa": int(price)}, "MDEntrySize": known[0], "NumberOfOrders": known[1] or None,
                                        "MDPriceLevel": at + 1, "MDEntryType": kind})  # fmt: skip
        return encoder().encode("SnapshotFullRefresh52", {
            "LastMsgSeqNumProcessed": processed, "TotNumReports": reports, "SecurityID": security, "RptSeq": 1, "TransactTime": 10**18,
            "LastUpdateTime": 1, "TradeDate": None, "MDSecurityTradingStatus": "ReadyToTrade", "NoMDEntries": entries,
        })  # fmt: skip

    @property
    def recovery(self) -> dict[str, int]:
        return {name: n for name, n in recovery_counters(self.feed.recovery).items() if n}


def check_equal(client: Client, truth: Client, names: Iterable[str]) -> None:
    for name in names:
        assert name not in client.stale
        assert client.book(name) == truth.book(name), name


# ---------------------------------------------------------------- a made feed


@dataclass
class Market:
    """Books by position that change at random, as a venue sees them; what it sends of each change."""

    securities: Sequence[int]
    rng: np.random.Generator
    unit: int = 1000
    depths: dict[str, int] = field(default_factory=dict)
    sides: dict[tuple[int, str], list[Level]] = field(default_factory=dict)

    def change(self) -> dict[str, Any]:
        security = int(self.rng.choice(self.securities))
        kind = str(self.rng.choice(["Bid", "Offer", "Bid", "Offer", "ImpliedBid", "ImpliedOffer"]))
        levels, depth = self.sides.setdefault((security, kind), []), self.depths.get(kind, LEVELS)
        action, at = int(self.rng.integers(4)), int(self.rng.integers(depth))
        qty, orders = int(self.rng.integers(1, 500)), int(self.rng.integers(1, 9))
        if action < 2 or not levels:
            at = min(at, len(levels))
            low = levels[at][0] if at < len(levels) else (levels[-1][0] if levels else 10**6) + 2_000_000
            high = levels[at - 1][0] if at else 0
            price, what = (low + high) // 2, "New"
            if price in (low, high):
                return self.change()
            levels.insert(at, (price, qty, orders))
            del levels[depth:]
        elif action == 2:
            at, what = min(at, len(levels) - 1), "Change"
            price = levels[at][0]
            levels[at] = (price, qty, orders)
        else:
            at, what = min(at, len(levels) - 1), "Delete"
            price = levels.pop(at)[0]
        sign = -1 if kind.endswith("Bid") else 1
        return {"MDEntryPx": {"mantissa": sign * price * self.unit}, "MDEntrySize": qty, "SecurityID": security, "RptSeq": 1,
                "NumberOfOrders": orders, "MDPriceLevel": at + 1, "MDUpdateAction": what, "MDEntryType": kind}  # fmt: skip

    def message(self, most: int = 6) -> bytes:
        entries = [self.change() for _ in range(int(self.rng.integers(1, most)))]
        head = {"TransactTime": 10**18, "MatchEventIndicator": []}
        return encoder().encode("MDIncrementalRefreshBook46", {**head, "NoMDEntries": entries})


SECURITIES = (11, 22, 33, 44)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1 << 32), st.lists(st.integers(2, 80), min_size=1, max_size=8, unique=True), st.integers(0, 40), st.integers(31, 258))
def test_any_loss_any_lag(seed: int, lost: list[int], lag: int, room: int) -> None:
    """Whatever is lost, and however old the snapshots are, every book comes back and is the true one."""
    market = Market(SECURITIES, np.random.default_rng(seed))
    truth, client = Client(recovers=False), Client(room=max(room, 64))
    snapshots: list[list[bytes]] = []
    for seq in range(1, 140):
        raw = packet(seq, market.message(), market.message())
        truth.take(raw)
        snapshots.append([truth.snapshot(security, seq) for security in SECURITIES])
        if seq not in lost:
            client.take(raw)
        turn, place = divmod(seq, len(SECURITIES))
        shown = snapshots[max(0, turn * len(SECURITIES) - 1 - lag)]
        client.take(packet(place + 1, shown[place]), SNAPSHOTS)
    check_equal(client, truth, truth.names)
    assert client.recovery["recovered"] >= len(SECURITIES)
    assert not D.malformed(client.feed)
    sequences = [int(e["seq"]) for e in client.events]
    assert sequences == sorted(sequences)
    told = [e for e in client.events if e["flags"] & Flag.SNAPSHOT]
    assert {int(e["kind"]) for e in told} >= {Kind.CLEAR, Kind.LEVEL, Kind.STATUS}


def feed_of(count: int, seed: int = 1) -> tuple[list[bytes], Client, list[dict[int, bytes]]]:
    """Packets from sequence 1 on, the truth after all of them, and the snapshots after each."""
    market, truth, shown = Market(SECURITIES, np.random.default_rng(seed)), Client(recovers=False), []
    packets = [packet(seq, market.message()) for seq in range(1, count + 1)]
    for seq, raw in enumerate(packets, 1):
        truth.take(raw)
        shown.append({security: truth.snapshot(security, seq) for security in SECURITIES})
    return packets, truth, shown


def test_a_snapshot_that_lacks_the_gap_is_of_no_use() -> None:
    packets, truth, shown = feed_of(60)
    client = Client()
    for seq, raw in enumerate(packets, 1):
        if seq != 30:
            client.take(raw)
    assert client.stale >= {f"#{security}" for security in SECURITIES}
    before = len(client.events)
    for number, security in enumerate(SECURITIES, 1):
        client.take(packet(number, shown[28][security]), SNAPSHOTS)
    assert (len(client.events), client.recovery) == (before, {"snapshots": 4, "too_old": 4, "turns": 1})
    for number, security in enumerate(SECURITIES, 1):
        client.take(packet(number, shown[29][security]), SNAPSHOTS)  # as of the lost packet
    check_equal(client, truth, truth.names)
    assert client.recovery["recovered"] == 4


def test_nothing_is_told_while_nothing_is_stale() -> None:
    packets, truth, shown = feed_of(20)
    client = Client()
    for raw in packets:
        client.take(raw)
        client.take(packet(1, shown[5][11]), SNAPSHOTS)
    assert [bytes(e)[24:] for e in client.events] == [bytes(e)[24:] for e in truth.events]
    assert client.recovery == {"turns": 20}


def test_a_turn_that_finds_nothing_stale_ends_the_search() -> None:
    packets, truth, shown = feed_of(30)
    client = Client()
    for seq, raw in enumerate(packets, 1):
        if seq != 10:
            client.take(raw)
    for turn in range(4):
        for number, security in enumerate(SECURITIES, 1):
            client.take(packet(number, shown[25][security]), SNAPSHOTS)
        assert client.recovery == {"snapshots": 4 * min(turn + 1, 2), "recovered": 4, "turns": turn + 1}
    check_equal(client, truth, truth.names)


def test_a_turn_that_lacks_something_does_not_end_the_search() -> None:
    """It found nothing stale in what it had; the sequences of its packets, or the number of its snapshots, say that this was not all."""
    packets, truth, shown = feed_of(30)
    client = Client()
    for seq, raw in enumerate(packets, 1):
        if seq != 10:
            client.take(raw)

    def turn(*places: int) -> None:
        for place in places:
            client.take(packet(place, shown[25][SECURITIES[place - 1]]), SNAPSHOTS)

    for _ in range(3):
        turn(1, 2)
    for _ in range(3):
        turn(1, 2, 4)
    assert client.stale >= {"#33"}
    assert client.recovery["broken_turns"] == 5  # the last one has not ended
    turn(1, 2, 3, 4)
    check_equal(client, truth, truth.names)
    for _ in range(2):
        turn(1, 2, 3, 4)
    assert client.recovery["broken_turns"] == 6
    looked_at = client.recovery["snapshots"]
    turn(1, 2, 3, 4)
    assert client.recovery["snapshots"] == looked_at, "nothing is looked for any more"


def entry(security: int, at: int, price: int, kind: str, what: str = "New") -> dict[str, Any]:
    return {"MDEntryPx": {"mantissa": price}, "MDEntrySize": 5, "SecurityID": security, "RptSeq": 1, "NumberOfOrders": 1,
            "MDPriceLevel": at, "MDUpdateAction": what, "MDEntryType": kind}  # fmt: skip


def changes(*entries: dict[str, Any]) -> bytes:
    head = {"TransactTime": 10**18, "MatchEventIndicator": []}
    return encoder().encode("MDIncrementalRefreshBook46", {**head, "NoMDEntries": list(entries)})


@pytest.mark.parametrize("recovered", [True, False])
def test_an_implied_book_heard_of_after_its_instrument_came_back_is_trusted(recovered: bool) -> None:
    """The snapshot that brought the instrument has said that there is nothing implied; without it nobody has."""
    truth, client = Client(recovers=False), Client()
    for seq in range(1, 6):
        raw = packet(seq, changes(entry(11, seq, 1000 * seq, "Offer")))
        truth.take(raw)
        if seq != 3:
            client.take(raw)
    if recovered:
        client.take(packet(1, truth.snapshot(11, 5, 1)), SNAPSHOTS)
    raw = packet(6, changes(entry(11, 1, 500, "ImpliedOffer"), entry(22, 1, 7, "Bid")))
    truth.take(raw)
    client.take(raw)
    assert client.stale == {"*", "#22"} | (set() if recovered else {"#11", "#11.I"})
    check_equal(client, truth, ["#11", "#11.I"] if recovered else [])
    for _ in range(2):
        for place, security in enumerate((11, 22), 1):
            client.take(packet(place, truth.snapshot(security, 6, 2)), SNAPSHOTS)
    check_equal(client, truth, truth.names)


def test_an_instrument_heard_of_after_the_search_has_ended_is_looked_for() -> None:
    truth, client = Client(recovers=False), Client()
    for seq in range(1, 6):
        raw = packet(seq, changes(entry(11, seq, 1000 * seq, "Offer")))
        truth.take(raw)
        if seq != 3:
            client.take(raw)
    for _ in range(3):
        client.take(packet(1, truth.snapshot(11, 5, 1)), SNAPSHOTS)
    assert client.feed.recovery.words[1] == 0, "nothing is looked for"
    for seq in (6, 7):
        raw = packet(seq, changes(entry(22, 1, 100 - seq, "Offer")))
        truth.take(raw)
        client.take(raw)
    assert client.stale == {"*", "#22"}
    client.take(packet(1, truth.snapshot(22, 7, 1)), SNAPSHOTS)
    check_equal(client, truth, truth.names)


def definition(security: int, symbol: str, depths: dict[str, int] | None = None) -> bytes:
    feeds = [{"MDFeedType": kind.encode(), "MarketDepth": depth} for kind, depth in (depths or {}).items()]
    values = {"Symbol": symbol, "SecurityID": security, "MatchEventIndicator": [], "SecurityUpdateAction": "Add", "LastUpdateTime": 1,
              "MDSecurityTradingStatus": None, "ApplID": 310, "MarketSegmentID": 1, "UnderlyingProduct": 1, "SecurityExchange": "XCME",
              "SecurityGroup": "ES", "Asset": "ES", "SecurityType": "FUT", "CFICode": "FFCX", "Currency": "USD", "SettlCurrency": "USD",
              "MatchAlgorithm": "F", "MinTradeVol": 1, "MaxTradeVol": 1, "MinPriceIncrement": {"mantissa": 250_000_000},
              "DisplayFactor": {"mantissa": 1}, "UserDefinedInstrument": "N",
              "NoMDFeedTypes": feeds}  # fmt: skip
    return encoder().encode("MDInstrumentDefinitionFuture54", values)


def test_a_book_that_gets_its_name_late_is_stale_until_a_snapshot_tells_what_rests_in_it() -> None:
    """What came before its definition stood under its code, in a book that ends with it; an empty one has nothing to lose."""
    truth, client = Client(recovers=False), Client()
    for feed_client in (truth, client):
        feed_client.take(packet(1, changes(entry(11, 1, 1000, "Offer"), entry(11, 1, 900, "ImpliedBid"))))
        feed_client.take(packet(2, definition(11, "ESZ6"), definition(22, "NQZ6")))
        feed_client.take(packet(3, changes(entry(11, 2, 2000, "Offer"), entry(11, 1, 950, "ImpliedBid"), entry(22, 1, 5, "Bid"))))
    assert client.book("#11") == client.book("#11.I") == ([], [])
    assert client.stale == {"ESZ6", "ESZ6.I"}
    rest = [{"MDEntryPx": {"mantissa": price}, "MDEntrySize": 5, "NumberOfOrders": 1, "MDPriceLevel": at, "MDEntryType": kind}
            for at, price, kind in ((1, 1000, "Offer"), (2, 2000, "Offer"), (1, 950, "ImpliedBid"), (2, 900, "ImpliedBid"))]  # fmt: skip
    client.take(packet(1, encoder().encode("SnapshotFullRefresh52", {
        "LastMsgSeqNumProcessed": 3, "TotNumReports": 1, "SecurityID": 11, "RptSeq": 1, "TransactTime": 10**18, "LastUpdateTime": 1,
        "TradeDate": None, "MDSecurityTradingStatus": "ReadyToTrade", "NoMDEntries": rest})), SNAPSHOTS)  # fmt: skip
    assert client.stale == set()
    assert client.book("ESZ6") == ([], [(1000, (5, 1)), (2000, (5, 1))])
    assert client.book("ESZ6.I") == ([(950, (5, 1)), (900, (5, 1))], [])
    assert client.book("NQZ6") == ([(5, (5, 1))], [])


def test_books_that_another_thread_asks_for_come_with_the_next_snapshots() -> None:
    """A new leader's journal calls a book stale that its own feed has all of."""
    packets, truth, shown = feed_of(30)
    client = Client()
    for raw in packets:
        client.take(raw)
    wanted = [i for i in range(len(client.table)) if client.table.symbol(i).startswith("#11")]
    client.stale |= {client.table.symbol(i) for i in wanted}
    assert ask_for_books(client.feed.recovery, wanted)
    assert not ask_for_books(truth.feed.recovery, wanted)
    for _ in range(3):
        for place, security in enumerate(SECURITIES, 1):
            client.take(packet(place, shown[29][security]), SNAPSHOTS)
    check_equal(client, truth, truth.names)
    assert client.recovery["recovered"] == 1


def test_a_snapshot_ahead_of_the_feed_waits() -> None:
    packets, truth, shown = feed_of(30)
    client = Client()
    for seq, raw in enumerate(packets[:20], 1):
        if seq != 10:
            client.take(raw)
    client.take(packet(1, shown[24][11]), SNAPSHOTS)
    assert client.recovery == {"snapshots": 1, "ahead": 1, "turns": 1}
    for raw in packets[20:]:
        client.take(raw)
    client.take(packet(1, shown[24][11]), SNAPSHOTS)
    check_equal(client, truth, ["#11", "#11.I"])
    assert "#22" in client.stale


def test_joining_in_the_middle() -> None:
    """What began before us is a gap: no book is trusted before its snapshot."""
    packets, truth, shown = feed_of(50)
    client = Client()
    for raw in packets[30:]:
        client.take(raw)
    gaps = [e for e in client.events if e["kind"] == Kind.GAP]
    assert [(int(e["id"]), int(e["aux"])) for e in gaps if e["instrument"] == ALL_INSTRUMENTS] == [(1, 30)]
    assert {client.table.symbol(int(e["instrument"])) for e in gaps[1:]} == client.names, "each is told of when it is met"
    assert client.names == client.stale - {"*"}
    client.take(packet(1, *(shown[40][security] for security in SECURITIES)), SNAPSHOTS)
    check_equal(client, truth, truth.names)


def test_a_reset_of_the_channel_empties_what_was_stale() -> None:
    packets, _, shown = feed_of(20)
    client = Client()
    for seq, raw in enumerate(packets, 1):
        if seq != 10:
            client.take(raw)
    reset = encoder().encode("ChannelReset4", {"TransactTime": 1, "MatchEventIndicator": ["EndOfEvent"], "NoMDEntries": [{"ApplID": 310}]})
    client.take(packet(21, reset))
    assert (client.stale, client.books) == (set(), {})
    client.take(packet(1, shown[15][11]), SNAPSHOTS)  # from before the reset, and what came since is done again: nothing is left
    assert client.book("#11") == ([], [])
    assert client.stale == set()


def test_trades_are_told_once() -> None:
    trade = encoder().encode("MDIncrementalRefreshTradeSummary48", {
        "TransactTime": 1, "MatchEventIndicator": [], "NoMDEntries": [
            {"MDEntryPx": {"mantissa": 5}, "MDEntrySize": 1, "SecurityID": 11, "RptSeq": 1, "NumberOfOrders": 1, "AggressorSide": "Buy",
             "MDUpdateAction": "New", "MDTradeEntryID": 1}],
    })  # fmt: skip
    packets, _, shown = feed_of(20)
    client = Client()
    for seq, raw in enumerate(packets, 1):
        if seq != 10:
            client.take(packet(seq, trade) if seq == 15 else raw)
    client.take(packet(1, shown[13][11]), SNAPSHOTS)
    assert client.recovery["recovered"] == 1
    assert sum(1 for e in client.events if e["kind"] == Kind.TRADE) == 1


def test_damaged_snapshots_do_no_harm() -> None:
    packets, _, shown = feed_of(40)
    client, rng = Client(), np.random.default_rng(3)
    for seq, raw in enumerate(packets, 1):
        if seq != 10:
            client.take(raw)
    for _ in range(300):
        raw = bytearray(packet(1, *(shown[30][security] for security in SECURITIES)))
        for _ in range(int(rng.integers(1, 4))):
            raw[int(rng.integers(12, len(raw)))] = int(rng.integers(256))
        client.take(bytes(raw[: int(rng.integers(0, len(raw) + 1))]), SNAPSHOTS)
    for raw in packets[:1]:
        client.take(raw)  # a duplicate: the feed itself goes on
    assert client.feed.arbiter.state[0] == 41


def test_what_is_not_kept_any_more() -> None:
    packets, truth, shown = feed_of(30)
    client = Client()
    for seq, raw in enumerate(packets, 1):
        if seq != 10:
            client.take(raw)
    client.feed.recovery.kept["seq"][25] = 25 + client.feed.recovery.kept.size  # as if newer ones had taken its place
    client.take(packet(1, shown[20][11]), SNAPSHOTS)
    assert client.recovery == {"snapshots": 1, "not_kept": 1, "turns": 1}
    client.take(packet(1, shown[26][11]), SNAPSHOTS)
    check_equal(client, truth, ["#11", "#11.I"])


# ---------------------------------------------------------------- captures


@pytest.mark.parametrize("path", CME_AB, ids=lambda path: path.stem)
@pytest.mark.parametrize("first", [2, 11, 30])
def test_captures_with_lost_packets(path: Path, first: int) -> None:
    """The captures hold some packets of a day only: numbered anew, they are a feed of which nothing but our packets is missing."""
    buf, packets = captured(path)
    whole = [(int(p["line"]), bytes(buf[p["offset"] : p["offset"] + p["length"]])) for p in packets]
    numbers = {seq: i for i, seq in enumerate(sorted({raw[:4][::-1] for _, raw in whole}), 1)}
    raws = [(line, struct.pack("<I", numbers[raw[:4][::-1]]) + raw[4:]) for line, raw in whole]
    lost = range(first, first + 3)
    truth, client, shown = Client(recovers=False), Client(), {}
    for line, raw in raws:
        truth.take(raw, line)
        seq = struct.unpack_from("<I", raw)[0]
        codes = [int(truth.table.record(i)["code"]) for i in range(len(truth.table)) if not truth.table.symbol(i).endswith(".I")]
        shown[seq] = [truth.snapshot(code, seq) for code in codes]
        if seq not in lost:
            client.take(raw, line)
    assert client.stale >= truth.names
    for number, message in enumerate(shown[first + 5], 1):
        client.take(packet(number, message), SNAPSHOTS)
    recovered = [name for name in truth.names if name not in client.stale]
    assert len(recovered) >= len(shown[first + 5]) > 0
    check_equal(client, truth, recovered)


def test_a_recording_of_lines_and_snapshots(tmp_path: Path) -> None:
    """Packets of venues' captures, numbered anew, on two lines that lose the same one, and the loop of snapshots on a third group."""
    raws, seen = [], set()
    for path in CME_AB:
        buf, packets = captured(path)
        for p in packets:
            raw = bytes(buf[p["offset"] : p["offset"] + p["length"]])
            if raw not in seen:
                seen.add(raw)
                raws.append(struct.pack("<I", len(raws) + 1) + raw[4:])
    truth, datagrams = Client(recovers=False), []
    for seq, raw in enumerate(raws, 1):
        truth.take(raw)
        datagrams += [(seq * 10**7, f"239.1.1.{line}", 26400, raw) for line in (1, 2) if seq not in (len(raws) // 3, 5 + line)]
    codes = sorted({int(truth.table.record(i)["code"]) & ~(1 << 62) for i in range(len(truth.table))})
    for turn in range(2):
        for place, code in enumerate(codes, 1):
            when = (len(raws) + 1000 * (turn + 1) + place) * 10**7
            datagrams.append((when, "239.1.1.3", 26400, packet(place, truth.snapshot(code, len(raws), len(codes)))))
    write_pcap(tmp_path / "x.pcap", datagrams)
    source = f'type = "pcap"\npath = ["{tmp_path / "x.pcap"}"]\ndata_format = "cme_mdp3:{CME_XML}"\n'
    source += 'snapshot_endpoint = "udp://239.1.1.3:26400"'
    text = f'[cluster]\nname = "t"\n[data_sources.x]\n{source}\n'
    table, client = InstrumentTable(512), Client()
    reader = open_reader("x", parse_config(text).data_sources["x"], [tmp_path / "x.pcap"], table, alone=True)
    client.table = table
    out = np.zeros(256, EVENT)
    while n := reader.read(out):
        for e in out[:n].copy():
            client.apply(e)
    check_equal(client, truth, truth.names)
    counters = reader.counters()
    assert (counters["gaps"], counters["missing"], counters["books_waiting"]) == (1, 1, 0)
    assert counters["books_recovered"] == len(codes) > 1
    assert (counters["snapshot_turns"], counters["malformed"]) == (2, 0)


# ---------------------------------------------------------------- configuration


def test_which_sources_may_have_snapshots(tmp_path: Path) -> None:
    def source(more: str) -> Any:
        return parse_config(f'[cluster]\nname = "t"\n[data_sources.x]\n{more}\n')

    live = 'type = "multicast"\nendpoint = "udp://239.1.1.1:26400"\ndata_format = "itch50"\n'
    wrong = {'snapshot_endpoint = "http://x/{symbol}"': "must be udp://",
             'snapshot_endpoint = "udp://239.1.1.3:26400"\nbypass = "afxdp"': "snapshots are received by sockets"}  # fmt: skip
    for more, reason in wrong.items():
        with pytest.raises(ConfigError, match=reason):
            source(live + more)
    path = tmp_path / "x.pcap"
    path.write_bytes(b"")
    options = source(f'type = "pcap"\npath = ["{path}"]\ndata_format = "itch50"\nsnapshot_endpoint = "udp://239.1.1.3:26400"\n')
    with pytest.raises(SourceError, match=r"needs a mapping with \[recovery\]"):
        open_reader("x", options.data_sources["x"], [path], InstrumentTable(4), alone=False)
