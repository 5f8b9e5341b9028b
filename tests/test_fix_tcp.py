"""FIX over TCP: the C++ engine `quickfix` against our venue, TLS, and connections that mean no good."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nats_logins import make_authority, make_certificate

from tickmesh.node.fix_dictionary import load_dictionary
from tickmesh.node.fix_frame import Message, MessageStream
from tickmesh.node.fix_session import Ended, Event, Received, Session, SessionOptions, build_message, utc_timestamp
from tickmesh.node.fix_store import FileStore, MemoryStore
from tickmesh.node.fix_tcp import Link
from tickmesh.ops.fix_market_data import FixVenue, Levels
from tickmesh.ops.simulator import SimulatorConfig
from tickmesh.transports.connection import client_tls

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
        assert client.books == {"ALFA": venue.market.book("ALFA", 10)}
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
            assert venue.acceptor.counters["refused_logon"] == 1
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


# ---------------------------------------------------------------- who may log on, and when


def test_a_wrong_password_does_not_hold_the_session() -> None:
    """Whoever knows the CompIDs alone keeps nobody out, and changes nothing."""

    async def scenario() -> None:
        venue, port = await venue_of()
        strangers = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5)]
        try:
            for _, writer in strangers:  # and they do not close their side
                writer.write(logon(t553=b"me", t554=b"guess"))
            await until(lambda: venue.acceptor.counters["refused_logon"] == 5)
            assert venue.acceptor.session(*KEY).store.next_in == 1
            client = Client()
            link = Link(Session(CLIENT, MemoryStore()), *await asyncio.open_connection("127.0.0.1", port), client.handle)
            running = asyncio.create_task(link.run())
            await until(lambda: link.session.logged_on)
            await link.logout()
            assert (await running).clean
        finally:
            for _, writer in strangers:
                writer.close()
            await venue.stop()

    asyncio.run(scenario())


def test_of_two_logons_at_the_same_time_one_gets_the_session() -> None:
    async def scenario() -> None:
        venue, port = await venue_of()
        streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        try:
            await until(lambda: venue.acceptor.counters["connections"] == 2)
            for _, writer in streams:
                writer.write(logon(t553=b"me", t554=b"secret"))
            await until(lambda: venue.acceptor.counters["refused_taken"] == 1)
            await until(lambda: venue.acceptor.session(*KEY).logged_on)
            first = {task: k for k, (reader, _) in enumerate(streams) for task in [asyncio.create_task(reader.read(1))]}
            async with asyncio.timeout(LIMIT_S):
                found = dict(zip(first.values(), await asyncio.gather(*first)))
            assert sorted(found.values()) == [b"", b"8"]
        finally:
            for _, writer in streams:
                writer.close()
            await venue.stop()

    asyncio.run(scenario())


def test_a_logon_may_hold_data_with_separators() -> None:
    raw = b"a\x0110=000\x018=FIX.4.4\x01"

    async def scenario() -> None:
        venue, port = await venue_of()
        options = SessionOptions(**{**vars(CLIENT), "logon_fields": [(95, b"%d" % len(raw)), (96, raw)]})
        link = Link(Session(options, MemoryStore()), *await asyncio.open_connection("127.0.0.1", port), Client().handle)
        running = asyncio.create_task(link.run())
        try:
            await until(lambda: link.session.logged_on or running.done())
            await link.logout()
            assert (await running).clean
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await venue.stop()

    asyncio.run(scenario())


# ---------------------------------------------------------------- a link that is stopped


def test_a_link_that_is_stopped_logs_out() -> None:
    async def scenario() -> None:
        venue, port = await venue_of()
        link = Link(Session(CLIENT, MemoryStore()), *await asyncio.open_connection("127.0.0.1", port), Client().handle)
        running = asyncio.create_task(link.run())
        try:
            await until(lambda: link.session.logged_on)
            running.cancel()
            await asyncio.sleep(0)
            running.cancel()  # as impatient as a receiver that stops
            await asyncio.gather(running, return_exceptions=True)
            assert running.cancelled()
            await until(lambda: KEY in venue.acceptor.ended)
            assert venue.acceptor.ended[KEY] == Ended("we are stopping", clean=True)
            ours, theirs = link.session.store, venue.acceptor.session(*KEY).store
            assert (ours.next_in, ours.next_out) == (theirs.next_out, theirs.next_in)
        finally:
            await venue.stop()

    asyncio.run(scenario())


def test_what_comes_while_a_link_is_stopped_comes_again() -> None:
    """A handler that is cut off in the middle, and messages behind our Logout: neither counts as handled."""
    stuck = asyncio.Event()

    async def handle(event: Event) -> None:
        if isinstance(event, Received) and not event.admin:
            stuck.set()
            await asyncio.Event().wait()

    async def scenario() -> None:
        venue, port = await venue_of()
        session, client = Session(CLIENT, MemoryStore()), Client()
        link = Link(session, *await asyncio.open_connection("127.0.0.1", port), handle)
        running = asyncio.create_task(link.run())
        try:
            await until(lambda: session.logged_on)
            for n in range(3):
                venue.acceptor.links[KEY].send("B", [(148, b"%d" % n)])
            await asyncio.wait_for(stuck.wait(), LIMIT_S)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            assert session.store.next_in == 2
            again = Link(session, *await asyncio.open_connection("127.0.0.1", port), client.handle)
            running = asyncio.create_task(again.run())
            await until(lambda: len(client.messages) == 3)
            assert [message.get(148) for message in client.messages] == [b"0", b"1", b"2"]
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await venue.stop()

    asyncio.run(scenario())


def test_a_peer_that_does_not_answer_our_logout_holds_nobody_up() -> None:
    async def scenario() -> None:
        heard = bytearray()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(logon(t49=b"VENUE", t56=b"CLIENT"))
            while data := await reader.read(4096):
                heard.extend(data)
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        link = Link(Session(CLIENT, MemoryStore()), *await asyncio.open_connection("127.0.0.1", port), Client().handle)
        running = asyncio.create_task(link.run())
        try:
            await until(lambda: link.session.logged_on)
            running.cancel()
            async with asyncio.timeout(LIMIT_S):
                await asyncio.gather(running, return_exceptions=True)
            await until(lambda: b"\x0135=5\x01" in heard)
        finally:
            running.cancel()
            server.close()
            await server.wait_closed()

    asyncio.run(scenario())


# ---------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities, and what they signed."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("ours", "theirs"):
        make_authority(folder, name)
    for authority, name, address in (
        ("ours", "server", "IP:127.0.0.1"), ("ours", "elsewhere", "IP:127.0.0.9"), ("ours", "client", "DNS:client"),
        ("theirs", "stranger", "DNS:client"),
    ):  # fmt: skip
        make_certificate(folder, authority, name, address)
    return folder


def server_context(folder: Path, name: str = "server", *, clients: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    if clients:
        context.load_verify_locations(folder / "ours.pem")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@asynccontextmanager
async def tls_venue(context: ssl.SSLContext) -> AsyncIterator[tuple[FixVenue, int]]:
    venue = FixVenue(MARKET, [VENUE], interval_s=0.01, tls=context)
    port = await venue.start()
    try:
        yield venue, port
    finally:
        await venue.stop()


async def tls_client(port: int, context: ssl.SSLContext) -> Ended:
    """Log on, have the book, log out."""
    client = Client()
    link = Link(Session(CLIENT, MemoryStore()), *await asyncio.open_connection("127.0.0.1", port, ssl=context), client.handle)
    running = asyncio.create_task(link.run())
    await until(lambda: link.session.logged_on or running.done())
    if not running.done():
        link.send("V", SUBSCRIBE)
        await until(lambda: len(client.messages) > 5)
        await link.logout()
    return await running


def test_a_session_over_tls_with_certificates_on_both_sides(certificates: Path) -> None:
    async def scenario() -> None:
        async with tls_venue(server_context(certificates, clients=True)) as (venue, port):
            good = client_tls(certificates / "ours.pem", certificates / "client.pem", certificates / "client.key")
            assert (await tls_client(port, good)).clean
            assert venue.acceptor.session(*KEY).counters["logons"] == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("name", [None, "stranger"], ids=["none", "of another authority"])
def test_a_client_without_the_right_certificate_is_refused(certificates: Path, name: str | None) -> None:
    async def scenario() -> None:
        async with tls_venue(server_context(certificates, clients=True)) as (venue, port):
            own = (certificates / f"{name}.pem", certificates / f"{name}.key") if name else (None, None)
            with contextlib.suppress(OSError):
                ended = await tls_client(port, client_tls(certificates / "ours.pem", *own))
                assert not ended.clean
            await until(lambda: venue.acceptor.counters["refused_insecure"] == 1)
            assert venue.acceptor.session(*KEY).counters["logons"] == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(("served", "trusted"), [("server", "theirs"), ("elsewhere", "ours")], ids=["authority", "address"])
def test_a_server_with_a_wrong_certificate_is_not_talked_to(certificates: Path, served: str, trusted: str) -> None:
    async def scenario() -> None:
        async with tls_venue(server_context(certificates, served)) as (venue, port):
            with pytest.raises(ssl.SSLCertVerificationError):
                await tls_client(port, client_tls(certificates / f"{trusted}.pem"))
            assert not venue.acceptor.links

    asyncio.run(scenario())


def test_plain_text_and_silence_where_tls_is_spoken(certificates: Path) -> None:
    """Who never gets through the handshake counts as one who waits: there are few of them, and not for long."""

    async def scenario() -> None:
        async with tls_venue(server_context(certificates)) as (venue, port):
            assert await answer_to(port, logon(t553=b"me", t554=b"secret")) in (b"", b"\x15\x03\x01\x00\x02\x02\x46")
            await until(lambda: venue.acceptor.counters["refused_insecure"] == 1)
            venue.acceptor._waiting_max, venue.acceptor._logon_s = 3, 0.5
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            try:
                await until(lambda: venue.acceptor.counters["connections"] == 4)
                assert await answer_to(port, b"") == b""
                assert venue.acceptor.counters["refused_crowded"] == 1
                await until(lambda: venue.acceptor.counters["refused_silent"] == 3)
                assert (await tls_client(port, client_tls(certificates / "ours.pem"))).clean
            finally:
                for _, writer in silent:
                    writer.close()

    asyncio.run(scenario())
