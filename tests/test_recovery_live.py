"""CME's snapshot and definition channels on real sockets: a node gets lines A, B and both loops; its books equal a feed without loss."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from nats_fixtures import nats_server  # noqa: F401
from nodes import cluster, node_config, running, until  # noqa: F401
from test_definitions import NAMES, SHOWN, turn_of
from test_recovery import DEFINITIONS, SECURITIES, Client, Market, definition, encoder, packet
from test_roles import command
from test_sbe import CME_XML, need_data

from tickmesh.control.config import Config
from tickmesh.node import book
from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, Flag, Kind
from tickmesh.node.journal import JournalReader
from tickmesh.node.process import Node
from tickmesh.node.telemetry import read_telemetry, telemetry_path
from tickmesh.ops.local_cluster import LocalCluster, LocalClusterOptions
from tickmesh.ops.servers import NatsServer
from tickmesh.transports.multicast import parse_endpoint

pytestmark = need_data
TICK = 10_000_000


@dataclass
class Venue:
    """Both lines, the snapshot and the definition channel of a market whose true books are known.

    Attributes:
        truth: a client that gets every packet.
        sent: the last packet's sequence.
        shown: each security's snapshot after the last packet, whatever was lost of it.
    """

    endpoints: tuple[str, str, str, str]
    send_to: socket.socket
    securities: tuple[int, ...] = SECURITIES
    truth: Client = field(default_factory=lambda: Client(recovers=False))
    sent: int = 0
    shown: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.market = Market(self.securities, np.random.default_rng(7), unit=TICK)

    def _send(self, line: int, payload: bytes) -> None:
        to = parse_endpoint(self.endpoints[line])
        self.send_to.sendto(payload, (to.address, to.port))

    def trade(self, packets: int, *, lost: Mapping[int, Iterable[int]] | None = None) -> None:
        """Send packets; `lost`: by line, which of them (from 0 on) do not arrive there."""
        gone = {line: set(which) for line, which in (lost or {}).items()}
        for number in range(packets):
            self.sent += 1
            raw = packet(self.sent, self.market.message(), self.market.message())
            self.truth.take(raw)
            for line in (0, 1):
                if number not in gone.get(line, ()):
                    self._send(line, raw)
        self.shown = [self.truth.snapshot(one, self.sent, len(self.securities)) for one in self.securities]

    def open_listed(self) -> None:
        """Every security has a name and shows few levels, of which the truth has heard before the session begins with empty books."""
        for raw in turn_of():
            self.truth.take(raw, DEFINITIONS)
        self.market.depths = SHOWN
        self.reset()

    def define(self) -> None:
        """A turn of the loop of definitions."""
        for raw in turn_of():
            self._send(3, raw)

    def reset(self) -> None:
        """Empty all books."""
        head = {"TransactTime": 10**18, "MatchEventIndicator": ["EndOfEvent"]}
        self.market.sides.clear()
        self.send(encoder().encode("ChannelReset4", {**head, "NoMDEntries": [{"ApplID": 310}]}))

    def send(self, *messages: bytes) -> None:
        """Send a packet on both lines."""
        self.sent += 1
        raw = packet(self.sent, *messages)
        self.truth.take(raw)
        self._send(0, raw)
        self._send(1, raw)

    def turn(self, *, of: int | None = None, cut_bytes: int = 0) -> None:
        """A turn of the loop of snapshots as of now: the first `of` of them, `cut_bytes` off the last one's datagram."""
        shown = self.shown[:of]
        for place, message in enumerate(shown, 1):
            raw = packet(place, message)
            self._send(2, raw[: len(raw) - (cut_bytes if place == len(shown) else 0)])


@pytest.fixture
def venue() -> Iterator[Venue]:
    group, port = f"239.{77 + secrets.randbelow(100)}.{1 + secrets.randbelow(250)}", 20_000 + secrets.randbelow(20_000)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        yield Venue(tuple(f"udp://{group}.{1 + i}:{port + i}" for i in range(4)), sender)  # type: ignore[arg-type]


def source_of(venue: Venue, *, snapshots: bool = True, definitions: bool = False) -> str:
    channel = f'snapshot_endpoint = "{venue.endpoints[2]}"\n' if snapshots else ""
    channel += f'definition_endpoint = "{venue.endpoints[3]}"\n' if definitions else ""
    return (
        f'type = "multicast"\nendpoint = "{venue.endpoints[0]}"\nendpoint_b = "{venue.endpoints[1]}"\n{channel}'
        f'interface = "lo"\ndata_format = "cme_mdp3:{CME_XML}"\ngap_wait_ms = 20\n'
    )


def config_of(venue: Venue, name: str, data: Path, **channels: bool) -> Config:
    return node_config(name, data, f"[data_sources.cme]\n{source_of(venue, **channels)}")


Side = list[tuple[int, int]]
"""Prices and quantities, best first."""
State = tuple[bool, Side, Side]
"""Whether a book is stale, its bids and asks."""


def state_of(books: book.Books, instrument: int) -> State:
    bids, asks = ([(price, qty) for price, qty, _ in side] for side in book.top(books, instrument, 100))
    return bool(books.sides["flags"][2 * instrument] & Flag.STALE), bids, asks


def books_of(node: Node) -> dict[str, State]:
    """Every instrument's state."""
    found = {}
    for thread in node.shards:
        books = thread.shard.arrays.books
        for i in thread.shard.seen_instruments():
            found[thread.shard.symbol(i)] = state_of(books, i)
    return found


def true_books(venue: Venue) -> dict[str, tuple[Side, Side]]:
    found = {}
    for name in venue.truth.names:
        bids, asks = venue.truth.book(name)
        found[name] = [(price, qty) for price, (qty, _) in bids], [(price, qty) for price, (qty, _) in asks]
    return found


def is_caught_up(node: Node, venue: Venue) -> bool:
    """Whether all that was sent is in the books, or in a gap."""
    node.check()
    return node.receivers[0].expected == venue.sent + 1 and bool(node.drained())


def stale(node: Node) -> set[str]:
    return {name for name, (is_stale, _, _) in books_of(node).items() if is_stale}


def differs(node: Node, venue: Venue) -> set[str]:
    """Books that are not the true ones, or not trusted; and instruments that only one side has."""
    found, true = books_of(node), true_books(venue)
    wrong = {name for name in found.keys() & true.keys() if found[name] != (False, *true[name])}
    return wrong | (found.keys() ^ true.keys())


def until_equal(node: Node, venue: Venue) -> None:
    """Wait until all that was sent is in the books, and every book is the true one, and trusted."""
    until(lambda: is_caught_up(node, venue), "all that was sent", 20)
    with contextlib.suppress(AssertionError):
        until(lambda: not differs(node, venue), "true books", 20)
    wrong, found, true = differs(node, venue), books_of(node), true_books(venue)
    assert not wrong, {name: (found.get(name), true.get(name)) for name in wrong}


def until_stale(node: Node, names: set[str]) -> None:
    """Wait until these books are stale, and no other."""
    until(lambda: node.check() or stale(node) == names, f"stale: {names}", 20)


def assert_none_wrong(node: Node, venue: Venue) -> None:
    """A book that is trusted is the true one."""
    assert differs(node, venue) <= stale(node)


def recover(node: Node, venue: Venue, what: str) -> None:
    """Turns of the loop until no book is stale."""

    def recovered() -> bool:
        node.check()
        venue.turn()
        return not stale(node)

    until(recovered, what)


@contextmanager
def repeating(venue: Venue) -> Iterator[None]:
    """The loop of snapshots goes round and round beside whatever else is sent."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(0.001):
            venue.turn()

    thread = threading.Thread(target=run)
    with ExitStack() as closing:
        closing.callback(thread.join)
        closing.callback(stop.set)
        thread.start()
        yield


# ---------------------------------------------------------------- losses


def test_a_node_that_joins_late_trusts_no_book_before_its_snapshot(
    nats_server: NatsServer,  # noqa: F811
    cluster: str,  # noqa: F811
    tmp_path: Path,
    venue: Venue,
) -> None:
    venue.trade(60)
    with running(config_of(venue, cluster, tmp_path), nats_server.url) as node:
        venue.trade(10)
        until(lambda: is_caught_up(node, venue) and books_of(node), "what was sent")
        until_stale(node, set(books_of(node)))
        recover(node, venue, "books of before")
        until_equal(node, venue)
        venue.trade(40)
        until_equal(node, venue)
        counters = node.receivers[0].counters()
        assert (counters["gaps"], counters["missing"], counters["books_waiting"]) == (1, 60, 0)


def test_a_loss_in_the_middle_of_a_session(nats_server: NatsServer, cluster: str, tmp_path: Path, venue: Venue) -> None:  # noqa: F811
    """What only one line loses is no loss; what both lose makes every book stale until its snapshot."""
    with running(config_of(venue, cluster, tmp_path), nats_server.url) as node:
        venue.trade(50, lost={0: (3, 10, 11), 1: (4, 20)})
        until_equal(node, venue)
        assert node.receivers[0].counters()["gaps"] == 0
        venue.trade(20, lost={0: (5, 6, 9), 1: (5, 6, 8)})
        until(lambda: is_caught_up(node, venue), "what was sent")
        until_stale(node, set(books_of(node)))
        assert node.receivers[0].counters()["books_waiting"] == len(books_of(node))
        old = venue.shown
        venue.trade(5)
        until(lambda: is_caught_up(node, venue), "more")
        venue.shown = old
        recover(node, venue, "books of a snapshot that is older than what the feed has brought since")
        until_equal(node, venue)
        counters = node.receivers[0].counters()
        assert (counters["missing"], counters["books_waiting"], counters["books_recovered"]) == (2, 0, len(SECURITIES))


def test_a_turn_that_breaks_off_is_not_taken_for_a_whole_one(
    nats_server: NatsServer,  # noqa: F811
    cluster: str,  # noqa: F811
    tmp_path: Path,
    venue: Venue,
) -> None:
    """However often: what it did not bring is still looked for, and of a datagram that was cut nothing is taken."""
    with running(config_of(venue, cluster, tmp_path), nats_server.url) as node:
        venue.trade(40)
        venue.trade(20, lost={0: (5,), 1: (5,)})
        until(lambda: is_caught_up(node, venue), "what was sent")
        until_stale(node, set(books_of(node)))
        counters = node.receivers[0].counters

        def turns(count: int, **how: int) -> None:
            for _ in range(count):
                begun = counters()["snapshot_turns"]
                venue.turn(**how)
                until(lambda: counters()["snapshot_turns"] == begun + 1, "a turn")  # noqa: B023

        kept_stale = {name for name in books_of(node) if name.split(".")[0] in ("#33", "#44")}
        turns(6, of=2)
        until_stale(node, kept_stale)
        assert_none_wrong(node, venue)
        turns(6, of=3, cut_bytes=40)
        until(lambda: counters()["malformed"] >= 6, "the cut datagrams")
        assert stale(node) == kept_stale
        assert_none_wrong(node, venue)
        assert counters()["snapshot_turns_broken"] >= 10
        recover(node, venue, "a whole turn")
        until_equal(node, venue)
        node.mirror()
        shown = read_telemetry(telemetry_path(cluster, "n1"))["sources"]["cme"]
        assert {name: shown[name] for name in ("books_recovered", "books_waiting", "snapshots_too_old")} == {
            "books_recovered": len(SECURITIES), "books_waiting": 0, "snapshots_too_old": 0
        }  # fmt: skip


def test_losses_again_and_again_beside_a_loop_that_never_rests(
    nats_server: NatsServer,  # noqa: F811
    cluster: str,  # noqa: F811
    tmp_path: Path,
    venue: Venue,
) -> None:
    rng = np.random.default_rng(11)
    with running(config_of(venue, cluster, tmp_path), nats_server.url) as node:
        venue.trade(20)
        until(lambda: is_caught_up(node, venue), "the beginning")
        with repeating(venue):
            for _ in range(25):
                lost = rng.choice(11, 2, replace=False).tolist()
                venue.trade(12, lost={0: lost, 1: lost[:1]})
                until(lambda: is_caught_up(node, venue), "what was sent")
            until(lambda: not stale(node), "all books")
        until_equal(node, venue)
        counters = node.receivers[0].counters()
        assert counters["missing"] == 25
        assert counters["books_recovered"] >= len(SECURITIES)


def test_another_configuration_in_the_middle_of_a_recovery(
    nats_server: NatsServer,  # noqa: F811
    cluster: str,  # noqa: F811
    tmp_path: Path,
    venue: Venue,
) -> None:
    """The source's next receiver knows what the one before it knew, and looks for what that one looked for."""
    config = config_of(venue, cluster, tmp_path)
    with running(config, nats_server.url) as node:
        venue.trade(40)
        until_equal(node, venue)
        source = config.data_sources["cme"].model_copy(update={"gap_wait_ms": 30.0})
        node.apply(config.model_copy(update={"data_sources": {"cme": source}}), node.version + 1)
        venue.trade(20)
        until_equal(node, venue)
        venue.trade(20, lost={0: (5,), 1: (5,)})
        until(lambda: is_caught_up(node, venue), "what was sent")
        until_stale(node, set(books_of(node)))
        node.apply(config, node.version + 1)
        venue.trade(20)
        until(lambda: is_caught_up(node, venue), "what was sent")
        until_stale(node, set(books_of(node)))
        recover(node, venue, "all books")
        until_equal(node, venue)


# ---------------------------------------------------------------- definitions


def named_books(node: Node, venue: Venue) -> dict[str, State]:
    """Books under the names that the truth has, and any other one that holds something."""
    names = true_books(venue).keys()
    return {name: state for name, state in books_of(node).items() if name in names or state[1] or state[2]}


def until_named(node: Node, venue: Venue) -> None:
    """Wait until every book is the true one under its name, and trusted."""
    true = {name: (False, *sides) for name, sides in true_books(venue).items()}
    until(lambda: is_caught_up(node, venue) and named_books(node, venue) == true, "true books under their names", 20)


def test_names_and_depths_come_from_a_group_of_their_own(
    nats_server: NatsServer,  # noqa: F811
    cluster: str,  # noqa: F811
    tmp_path: Path,
    venue: Venue,
) -> None:
    """Books of three levels from the first one on; over a loss of the feed, and over a restart, which knows all names."""
    config = config_of(venue, cluster, tmp_path, definitions=True)
    with running(config, nats_server.url) as node:
        counters = node.receivers[0].counters
        venue.open_listed()
        venue.define()
        until(lambda: counters().get("definitions_new") == len(NAMES), "all names")
        venue.trade(60)
        until_equal(node, venue)
        assert set(books_of(node)) >= set(NAMES.values())
        assert all(len(side) <= 3 for _, *sides in books_of(node).values() for side in sides)
        events = counters()["events"]
        for _ in range(3):
            venue.define()
        until(lambda: counters()["definition_turns"] == 4, "more turns")
        assert (counters()["events"], counters()["definition_packets"], counters()["gaps"]) == (events, 8, 0)
        venue.trade(20, lost={0: (5,), 1: (5,)})
        venue.define()
        until(lambda: is_caught_up(node, venue), "what was sent")
        until_stale(node, set(books_of(node)))
        recover(node, venue, "all books")
        until_equal(node, venue)
        node.mirror()
        shown = read_telemetry(telemetry_path(cluster, "n1"))["sources"]["cme"]
        assert (shown["definition_turns"], shown["definitions_new"], shown["malformed"]) == (5, 4, 0)
    with running(config, nats_server.url) as node:
        venue.trade(10)
        venue.define()
        until(lambda: is_caught_up(node, venue), "what was sent")
        recover(node, venue, "all books")
        venue.trade(40)
        until_equal(node, venue)
        assert (node.receivers[0].counters()["definition_turns"], node.receivers[0].counters()["definitions_new"]) == (1, 0)


@pytest.mark.parametrize("live", [False, True])
def test_names_that_come_late(
    nats_server: NatsServer,  # noqa: F811
    cluster: str,  # noqa: F811
    tmp_path: Path,
    venue: Venue,
    live: bool,
) -> None:
    """Books under codes end, those under names come with the next snapshots; also where the configuration gets the key while we run."""
    config = config_of(venue, cluster, tmp_path, definitions=True)
    without = config_of(venue, cluster, tmp_path)
    with running(without if live else config, nats_server.url) as node:
        venue.open_listed()
        venue.trade(40)
        until(lambda: is_caught_up(node, venue), "what was sent")
        assert all(name.startswith("#") for name in books_of(node))
        assert not stale(node)
        if live:
            node.apply(config, node.version + 1)
            venue.trade(20)
            until(lambda: is_caught_up(node, venue), "what was sent")
            assert not stale(node)
        venue.define()
        until(lambda: true_books(venue).keys() <= books_of(node).keys(), "all names")
        venue.trade(20)
        until(lambda: is_caught_up(node, venue), "what was sent")
        assert stale(node) >= set(NAMES.values())
        recover(node, venue, "all books")
        until_named(node, venue)
        assert node.receivers[0].counters()["books_waiting"] == 0
        venue.trade(40)
        until_named(node, venue)
    with running(config, nats_server.url) as node:
        venue.trade(20)
        until(lambda: is_caught_up(node, venue), "what was sent")
        for _ in range(2):
            venue.turn()
        until(lambda: node.receivers[0].counters()["books_waiting"] == 0, "all books that are still anybody's")
        until_named(node, venue)


# ---------------------------------------------------------------- restarts


@pytest.mark.parametrize("missed", [0, 7])
def test_a_restarted_node_trusts_no_book_whose_positions_it_does_not_know(
    nats_server: NatsServer,  # noqa: F811
    cluster: str,  # noqa: F811
    tmp_path: Path,
    venue: Venue,
    missed: int,
) -> None:
    """Also where it has missed nothing: the next change says only at which position. The loop of snapshots brings all of them back."""
    config = config_of(venue, cluster, tmp_path)
    with running(config, nats_server.url) as node:
        venue.trade(60)
        until_equal(node, venue)
    venue.trade(missed)
    with running(config, nats_server.url) as node:
        if not missed:
            assert differs(node, venue) == set(), "nothing has come yet"
        venue.trade(30)
        until(lambda: is_caught_up(node, venue), "what was sent")
        until_stale(node, set(books_of(node)))
        recover(node, venue, "all books")
        until_equal(node, venue)
        venue.trade(30)
        until_equal(node, venue)


def test_a_restarted_node_knows_how_many_levels_of_a_book_are_shown(
    nats_server: NatsServer,  # noqa: F811
    cluster: str,  # noqa: F811
    tmp_path: Path,
    venue: Venue,
) -> None:
    """A definition has told, days ago perhaps; a level that is pushed out is told by nobody."""
    config = config_of(venue, cluster, tmp_path)
    with running(config, nats_server.url) as node:
        for security, symbol in zip(SECURITIES, ("ESZ6", "NQZ6", "CLZ6", "GCZ6")):
            venue.send(definition(security, symbol, depths={"GBX": 3, "GBI": 2}))
        venue.market.depths = {"Bid": 3, "Offer": 3, "ImpliedBid": 2, "ImpliedOffer": 2}
        venue.trade(40)
        until_equal(node, venue)
        assert all(len(side) <= 3 for _, *sides in books_of(node).values() for side in sides)
    for _ in range(2):
        with running(config, nats_server.url) as node:
            venue.trade(10)
            until(lambda: is_caught_up(node, venue), "what was sent")
            recover(node, venue, "all books")
            venue.trade(40)
            until_equal(node, venue)


def test_without_a_snapshot_channel_books_stay_stale_until_the_venue_empties_them(
    nats_server: NatsServer,  # noqa: F811
    cluster: str,  # noqa: F811
    tmp_path: Path,
    venue: Venue,
) -> None:
    config = config_of(venue, cluster, tmp_path, snapshots=False)
    with running(config, nats_server.url) as node:
        venue.trade(40)
        until_equal(node, venue)
    with running(config, nats_server.url) as node:
        venue.trade(20)
        until(lambda: is_caught_up(node, venue), "what was sent")
        until_stale(node, set(books_of(node)))
        venue.reset()
        venue.trade(30)
        until_equal(node, venue)


# ---------------------------------------------------------------- takeovers


class CmeCluster(LocalCluster):
    """A local cluster whose market comes from a :class:`Venue` of the test."""

    venue: Venue
    definitions = False

    def start_feed(self) -> None:
        """The test sends."""

    def configuration(self) -> str:
        source = f"[data_sources.cme]\n{source_of(self.venue, definitions=self.definitions)}\n"
        text = re.sub(r"\[data_sources\.market\]\n.*?\n\n", source, super().configuration(), flags=re.DOTALL)
        text = re.sub(r"\[processing\.calculations\.(pair|all)\][^\n]*\n(?:[^\[\n][^\n]*\n)+", "", text)
        return re.sub(r"shard_overrides = [^\n]*\n", "", text)


_OF_BOOKS = (Kind.REFERENCE, Kind.LEVEL, Kind.CLEAR, Kind.GAP)


def books_in(journal: Path) -> dict[str, State]:
    """As :func:`books_of`, of what a journal has now."""
    books, out = book.make_books(1024, 1 << 12), np.zeros(0, EVENT)
    names: dict[int, str] = {}
    source_stale = False
    events = np.concatenate([batch[np.isin(batch["kind"], _OF_BOOKS)] for batch in JournalReader(journal).batches()])
    for event in events:
        one = np.array([event], EVENT)
        book.apply_events(books, one, np.zeros(1, np.int64), out)
        if event["instrument"] == ALL_INSTRUMENTS:
            source_stale = bool(event["kind"] == Kind.GAP)
        elif event["kind"] == Kind.REFERENCE:
            names[int(event["instrument"])] = event.tobytes()[40:64].rstrip(b"\0").decode()
            if source_stale:  # as a shard has it
                one["kind"], one["side"] = Kind.GAP, 2
                book.apply_events(books, one, np.zeros(1, np.int64), out)
    found = {}
    for number, name in names.items():
        found[name] = state_of(books, number)
    return found


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.parametrize("definitions", [False, True])
def test_a_standby_that_has_not_followed_a_book_says_so_when_it_takes_over(tmp_path: Path, venue: Venue, definitions: bool) -> None:
    """Two nodes lead in turn: one that has heard all, and one that has joined late, which tells of each book.

    Whose books the journal calls stale, though its own receiver has followed all of them, has them brought by the snapshots too. With
    `definitions` books have names and few levels, and the one that joins late has heard of them from the other.
    """
    few = {"shards": 1, "nodes": 2, "nats_servers": 1, "stream_replicas": 1, "suspect_ms": 1000.0}
    mesh = CmeCluster(LocalClusterOptions(tmp_path, f"cm{secrets.token_hex(3)}", "nats", **few))  # type: ignore[arg-type]
    mesh.venue, mesh.definitions = venue, definitions

    def leader() -> str:
        return asyncio.run(mesh.shards())[0].leader

    def state() -> dict[str, State]:
        now = leader()
        return books_in(mesh.nodes[now].data_dir / "journal" / now / "shard-0") if now else {}

    def equal() -> bool:
        true = true_books(venue)
        return state() == {name: (False, *sides) for name, sides in true.items()}

    def all_stale() -> bool:
        found = state()
        return found.keys() == true_books(venue).keys() and all(is_stale for is_stale, _, _ in found.values())

    def move(to: str) -> None:
        command(mesh, "shards", "move", "0", "--to", to)
        until(lambda: leader() == to, f"{to} leads", 60)

    def recovered() -> bool:
        venue.turn()
        return equal()

    with mesh:
        asyncio.run(mesh.whole())
        first = leader()
        second = next(name for name in mesh.nodes if name != first)
        if definitions:
            venue.open_listed()
            until(lambda: venue.define() or len(state()) == 2 * len(NAMES), "all names", 60)
        venue.trade(60)
        until(equal, "the beginning", 60)
        mesh.nodes[second].kill()
        mesh.nodes[second].start()
        asyncio.run(mesh.whole())
        venue.trade(20)
        until(equal, "the leader has heard all", 60)
        move(second)
        venue.trade(20)
        until(all_stale, "the one that has joined late trusts no book", 60)
        move(first)
        venue.trade(20)
        until(all_stale, "what the journal calls stale stays so", 60)
        until(recovered, "the snapshots bring all books", 60)
        mesh.nodes[first].kill()
        until(lambda: leader() == second, "the other leads", 60)
        venue.trade(20)
        until(equal, "it has heard the snapshots too", 60)
