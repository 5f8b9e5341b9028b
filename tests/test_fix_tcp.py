"""FIX over TCP: the C++ engine `quickfix` against our venue, TLS, and connections that mean no good."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tickmesh.node.fix_dictionary import load_dictionary
from tickmesh.node.fix_frame import Message, MessageStream
from tickmesh.node.fix_session import Ended, Event, Received, Session, SessionOptions, build_message, utc_timestamp
from tickmesh.node.fix_store import FileStore, MemoryStore
from tickmesh.node.fix_tcp import Link
from tickmesh.ops.fix_market_data import FixVenue, Levels
from tickmesh.ops.simulator import SimulatorConfig

DATA = Path(os.environ.get("TICKMESH_DATA", Path(__file__).parents[1] / "../shared/data"))
VENUE = SessionOptions(begin_string="FIX.4.4", sender="VENUE", target="CLIENT", initiator=False, username="me", password="secret")
CLIENT = SessionOptions(begin_string="FIX.4.4", sender="CLIENT", target="VENUE", initiator=True, username="me", password="secret")
KEY = ("CLIENT", "VENUE")
MARKET = SimulatorConfig(seed=3, symbols=4)
LIMIT_S = 60.0

needs_quickfix = pytest.mark.skipif(
    importlib.util.find_spec("quickfix") is None, reason="quickfix is not installed: pip install quickfix (it compiles for minutes)"
)


async def until(wanted: Callable[[], object]) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(LIMIT_S):
        while not wanted():
            await asyncio.sleep(0.01)


def apply(books: dict[str, Levels], message: Message) -> None:
    """A snapshot or a change, into books."""
    if message.type == "W":
        symbol = (message.get(55) or b"").decode()
        books[symbol] = {}
        for entry in map(dict, message.group(268, 269)):
            books[symbol][entry[269], _price(entry[270])] = int(entry[271])
    elif message.type == "X":
        for entry in map(dict, message.group(268, 279)):
            book, key = books[entry[55].decode()], (entry[269], _price(entry[270]))
            if entry[279] == b"2":
                del book[key]
            else:
                book[key] = int(entry[271])


def _price(text: bytes) -> int:
    whole, _, fraction = text.decode().partition(".")
    return int(whole) * 1_000_000_000 + int(fraction.ljust(9, "0"))


class Quickfix:
    """The initiator's process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.lines.append(line.decode().rstrip("\n"))

    def tell(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")

    def messages(self, kind: str = "") -> list[Message]:
        stream = MessageStream()
        found = [m for line in self.lines if line.startswith("8=") for m in stream.feed(line.replace("|", "\x01").encode())]
        return [m for m in found if not kind or m.type == kind]


@asynccontextmanager
async def quickfix(port: int, folder: Path) -> AsyncIterator[Quickfix]:
    dictionary = DATA / "fix_dictionaries" / "FIX44.xml"
    checked = f"UseDataDictionary=Y\nDataDictionary={dictionary}" if dictionary.exists() else "UseDataDictionary=N"
    settings = folder / "quickfix.cfg"
    settings.write_text(
        f"[DEFAULT]\nConnectionType=initiator\nReconnectInterval=1\nHeartBtInt=5\nStartTime=00:00:00\nEndTime=00:00:00\n{checked}\n"
        f"[SESSION]\nBeginString=FIX.4.4\nSenderCompID=CLIENT\nTargetCompID=VENUE\nSocketConnectHost=127.0.0.1\nSocketConnectPort={port}\n"
    )
    program = Path(__file__).with_name("quickfix_initiator.py")
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, str(program), str(settings), "me", "secret", stdin=pipe, stdout=pipe)
    peer = Quickfix(process)
    try:
        yield peer
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await peer.reading


@needs_quickfix
def test_quickfix_trades_messages_with_our_venue(tmp_path: Path) -> None:
    """Logon, subscription, orders, a connection that is cut while both sides have something to say, resends, logout."""
    dictionary = DATA / "fix_dictionaries" / "FIX44.xml"

    async def scenario() -> None:
        options = VENUE if not dictionary.exists() else SessionOptions(**{**vars(VENUE), "dictionary": load_dictionary(dictionary)})
        venue = FixVenue(MARKET, [options], stores=lambda _: FileStore(tmp_path / "store", force=False), interval_s=0.02)
        port = await venue.start()
        try:
            async with quickfix(port, tmp_path) as peer:
                await until(lambda: len(peer.messages("X")) > 20)
                peer.tell("order A")
                await until(lambda: len(peer.messages("8")) == 1)
                await _cut_and_resend(venue, peer)
                await _same_books(venue, peer)
                peer.tell("stop")
                await until(lambda: "stopped" in peer.lines)
                await until(lambda: not venue.acceptor.links)
            assert not peer.messages("j")
            counters = venue.acceptor.session(*KEY).counters
            assert counters["rejects_received"] == counters["rejects_sent"] == counters["garbled"] == 0
        finally:
            await venue.stop()

    asyncio.run(scenario())


async def _cut_and_resend(venue: FixVenue, peer: Quickfix) -> None:
    session = venue.acceptor.session(*KEY)
    venue.acceptor.links[KEY].abort()
    await until(lambda: "logout" in peer.lines and not session.logged_on)
    peer.tell("order B")
    report = [(37, b"drop"), (150, b"0"), (39, b"0"), (55, b"ALFA"), (54, b"1"), (151, b"1"), (14, b"0"), (6, b"0")]
    for n in range(5):
        session.send("8", [(17, b"copy%d" % n), *report])
    await until(lambda: peer.lines.count("logon") == 2)
    await until(lambda: len(peer.messages("8")) == 7)
    got = [message.get(17) for message in peer.messages("8")]
    assert sorted(got, key=str) == sorted([b"1", b"2", *(b"copy%d" % n for n in range(5))], key=str)
    assert [name for name in got if name and name.startswith(b"copy")] == [b"copy%d" % n for n in range(5)]
    assert session.counters["resent"] >= 5
    copies = [message for message in peer.messages("8") if (message.get(17) or b"").startswith(b"copy")]
    assert all(message.get(43) == b"Y" and message.get(122) for message in copies)
    assert session.counters["resend_requests_received"] >= 1


async def _same_books(venue: FixVenue, peer: Quickfix) -> None:
    """The market stops, and the books that quickfix was told are the venue's."""
    await until(lambda: len([m for m in peer.messages() if m.get(262) == b"R2"]) > 20)
    subscription = venue.venues[0].subscriptions.pop(b"R2")

    def same() -> bool:
        books: dict[str, Levels] = {}
        for message in peer.messages():
            if message.get(262) == b"R2":
                apply(books, message)
        return books == {symbol: subscription.told[symbol] for symbol in ("ALFA", "BRVO")}

    await until(same)


# ---------------------------------------------------------------- our own initiator


class Client:
    """Our initiator on a connection."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.books: dict[str, Levels] = {}
        self.messages: list[Message] = []

    async def handle(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Received) and not event.admin:
            for message in event.messages():
                self.messages.append(message)
                apply(self.books, message)


SUBSCRIBE = [(262, b"R"), (263, b"1"), (264, b"10"), (265, b"1"), (267, b"2"), (269, b"0"), (269, b"1"), (146, b"1"), (55, b"ALFA")]


def test_our_initiator_keeps_the_venues_book() -> None:
    async def scenario() -> None:
        venue = FixVenue(MARKET, [VENUE], interval_s=0.01)
        port = await venue.start()
        client = Client()
        link = Link(Session(CLIENT, MemoryStore()), *await asyncio.open_connection("127.0.0.1", port), client.handle)
        running = asyncio.create_task(link.run())
        try:
            await until(lambda: link.session.logged_on)
            link.send("V", SUBSCRIBE)
            link.send("V", [(262, b"wrong"), (263, b"1"), (146, b"1"), (55, b"NOPE")])
            await until(lambda: len(client.messages) > 30)
            link.send("V", [(262, b"R"), (263, b"2")])
            await until(lambda: not venue.venues[0].subscriptions)
            await link.logout()
            ended = await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await venue.stop()
        assert ended.clean
        assert client.books == {"ALFA": venue.market.books["ALFA"]}
        (refusal,) = [message for message in client.messages if message.type == "Y"]
        assert refusal.get(58) == b"unknown symbol NOPE"

    asyncio.run(scenario())


# ---------------------------------------------------------------- bad input


def logon(**changed: bytes) -> bytes:
    fields = {35: b"A", 34: b"1", 49: b"CLIENT", 52: utc_timestamp(time.time_ns()), 56: b"VENUE", 98: b"0", 108: b"30"}
    fields |= {int(tag[1:]): value for tag, value in changed.items()}
    return build_message("FIX.4.4", fields.items())


async def venue_of(**options: object) -> tuple[FixVenue, int]:
    venue = FixVenue(MARKET, [VENUE])
    for name, value in options.items():
        setattr(venue.acceptor, name, value)
    return venue, await venue.start()


async def answer_to(port: int, data: bytes) -> bytes:
    """What comes back until the venue closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        async with asyncio.timeout(LIMIT_S):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "garbled"),
        (b"8=FIX.4.4\x019=500\x01" + b"58=x\x01" * 5000, "garbled"),
        (b"\x00" * 100, "garbled"),
        (logon(t49=b"NOBODY"), "unknown"),
        (logon(t56=b"NOBODY"), "unknown"),
    ],
    ids=["another protocol", "an endless header", "zeros", "unknown sender", "unknown target"],
)
def test_connections_that_are_refused(data: bytes, why: str) -> None:
    async def scenario() -> None:
        venue, port = await venue_of()
        try:
            assert await answer_to(port, data) == b""
            assert venue.acceptor.counters[f"refused_{why}"] == 1
            assert venue.acceptor.session(*KEY).store.next_out == 1
        finally:
            await venue.stop()

    asyncio.run(scenario())


def test_a_wrong_password_gets_no_answer() -> None:
    async def scenario() -> None:
        venue, port = await venue_of()
        try:
            assert await answer_to(port, logon(t553=b"me", t554=b"guess")) == b""
            assert venue.acceptor.session(*KEY).counters["logons_refused"] == 1
        finally:
            await venue.stop()

    asyncio.run(scenario())


def test_who_says_nothing_or_too_little_is_let_go_and_cannot_crowd_out_others() -> None:
    async def scenario() -> None:
        venue, port = await venue_of(_waiting_max=3, _logon_s=0.5)
        slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        try:
            await until(lambda: venue.acceptor.counters["connections"] == 3)
            slow[0][1].write(b"8=FIX.4.4\x01")
            assert await answer_to(port, b"") == b""
            assert venue.acceptor.counters["refused_crowded"] == 1
            await until(lambda: venue.acceptor.counters["refused_silent"] == 3)
            for reader, _ in slow:
                assert await reader.read() == b""
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(logon(t553=b"me", t554=b"secret"))
            async with asyncio.timeout(LIMIT_S):
                assert b"\x0135=A\x01" in await reader.readuntil(b"\x0110=")
            writer.close()
        finally:
            for _, writer in slow:
                writer.close()
            await venue.stop()

    asyncio.run(scenario())


def test_a_session_has_one_connection() -> None:
    async def scenario() -> None:
        venue, port = await venue_of()
        good = logon(t553=b"me", t554=b"secret")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(good)
            await reader.readuntil(b"\x0110=")
            assert await answer_to(port, good) == b""
            assert venue.acceptor.counters["refused_taken"] == 1
            assert venue.acceptor.session(*KEY).logged_on
        finally:
            writer.close()
            await venue.stop()

    asyncio.run(scenario())


def test_ended_events_tell_a_refused_logon() -> None:
    async def scenario() -> Ended:
        venue = FixVenue(MARKET, [SessionOptions(**{**vars(VENUE), "username": None, "password": None})])
        port = await venue.start()
        try:
            store = MemoryStore()
            venue.acceptor.session(*KEY).store.set_next_in(50)
            link = Link(Session(CLIENT, store), *await asyncio.open_connection("127.0.0.1", port), Client().handle)
            return await link.run()
        finally:
            await venue.stop()

    ended = asyncio.run(scenario())
    assert ended.refused
    assert "expecting 50 but received 1" in ended.reason
