"""A node's FIX source against our venue over TCP: books, a lost connection, refused logons, configurations that cannot work."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from nodes import until
from sources import FAST, receiving, source_config

from tickmesh.control.config import ConfigError
from tickmesh.node.event import ASK, EventArray, Kind
from tickmesh.node.fix_session import SessionOptions
from tickmesh.node.reader import SourceError
from tickmesh.ops.fix_market_data import FixVenue
from tickmesh.ops.simulator import SimulatorConfig

VENUE = SessionOptions(begin_string="FIX.4.4", sender="VENUE", target="CLIENT", initiator=False, username="me", password="secret")
KEY = ("CLIENT", "VENUE")
Book = dict[tuple[bytes, int], int]


class Running:
    """A venue in a thread of its own."""

    def __init__(self, venue: FixVenue, loop: asyncio.AbstractEventLoop, port: int) -> None:
        self.venue, self.port, self._loop = venue, port, loop

    def call(self, function: object) -> object:
        async def inside() -> object:
            return function()  # type: ignore[operator]

        return asyncio.run_coroutine_threadsafe(inside(), self._loop).result(10)

    def freeze(self) -> dict[str, Book]:
        """The market stands still; what has been told is told."""
        task = self.venue._task
        assert task is not None
        self.call(task.cancel)
        return {symbol: dict(book) for s in self.venue.venues[0].subscriptions.values() for symbol, book in s.told.items()}


@contextmanager
def running_venue(options: SessionOptions = VENUE) -> Iterator[Running]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def begin() -> tuple[FixVenue, int]:
        venue = FixVenue(SimulatorConfig(seed=3, symbols=4), [options], interval_s=0.01)
        return venue, await venue.start()

    venue, port = asyncio.run_coroutine_threadsafe(begin(), loop).result(60)
    try:
        yield Running(venue, loop, port)
    finally:
        asyncio.run_coroutine_threadsafe(venue.stop(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def body(port: int, more: str = 'user = "me"\npassword_env = "VENUE_PASSWORD"', fix: str = "") -> str:
    own = f'fix = {{ sender = "CLIENT", target = "VENUE"{fix} }}'
    return (
        f'type = "fix"\nendpoint = "tcp://127.0.0.1:{port}"\ndata_format = "fix44"\nsymbols = ["ALFA", "BRVO"]\n'
        f"tick_size = 0.01\nquantity_exponent = 0\n{own}\n{FAST}{more}\n"
    )


@pytest.fixture(autouse=True)
def password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENUE_PASSWORD", "secret")


def books(events: EventArray, names: list[str]) -> dict[str, Book]:
    """What the levels since the last CLEAR of each instrument make of its book."""
    found: dict[str, Book] = {}
    for event in events:
        if event["instrument"] >= len(names):
            continue
        book = found.setdefault(names[event["instrument"]], {})
        key = (b"1" if event["side"] == ASK else b"0", int(event["price"]))
        if event["kind"] == Kind.CLEAR:
            book.clear()
        elif event["kind"] == Kind.LEVEL and event["qty"]:
            book[key] = int(event["qty"])
        elif event["kind"] == Kind.LEVEL:
            book.pop(key, None)
    return found


def test_a_source_logs_on_and_has_the_venues_books() -> None:
    with running_venue() as venue, receiving(body(venue.port)) as feed:
        feed.wait(200)
        told = venue.freeze()
        names = [feed.table.symbol(i) for i in range(len(feed.table))]
        until(lambda: books(feed.events, names) == told, "the venue's books")
        assert feed.counter("malformed") == feed.counter("gaps") == 0
        assert feed.counter("connected") == 1


def test_after_a_lost_connection_books_are_stale_until_their_next_snapshots() -> None:
    with running_venue() as venue, receiving(body(venue.port)) as feed:
        feed.wait(100)
        venue.call(lambda: venue.venue.acceptor.links[KEY].abort())
        feed.wait_for(reconnects=1)
        before = feed.count()
        feed.wait(before + 100)
        assert len(feed.kinds(Kind.GAP)) >= 1
        told = venue.freeze()
        names = [feed.table.symbol(i) for i in range(len(feed.table))]
        until(lambda: books(feed.events, names) == told, "the venue's books")
        assert venue.venue.acceptor.session(*KEY).counters["logons"] == 2


def test_a_refused_logon_is_counted_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENUE_PASSWORD", "guess")
    with running_venue() as venue, receiving(body(venue.port)) as feed:
        feed.wait_for(connect_failures=3)
        assert feed.count() == 0


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('fix = { sender = "CLIENT", target = "VENUE" }', "", "fix"),
        ('"fix44"', '"itch50"', "is no FIX"),
        ("tcp://127.0.0.1:1", "http://127.0.0.1:1", "must be tcp://HOST:PORT or tls://HOST:PORT"),
        ('"CLIENT"', '"WITH SPACE"', "sender"),
    ],
)
def test_configurations_that_are_refused(old: str, new: str, reason: str) -> None:
    assert old in body(1)
    with pytest.raises(ConfigError, match=reason):
        source_config(body(1).replace(old, new))


def test_symbols_to_subscribe_to_must_be_names() -> None:
    with pytest.raises(SourceError, match="symbols must be names"), receiving(body(1).replace('"ALFA"', '"A*"')):
        pass
