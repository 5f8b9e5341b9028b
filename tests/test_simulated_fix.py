"""The simulated market over FIX: `tickmesh simulate --fix` as a program that a source subscribes to; what it serves, whom it refuses."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from itch_reader import ItchReader, frames
from nodes import until
from sources import FAST, receiving
from test_fix_source import books
from test_simulator_cmd import invoke

from tickmesh.node.event import Kind
from tickmesh.node.fix_frame import Message
from tickmesh.node.fix_session import Event, Received, Session, SessionOptions
from tickmesh.node.fix_store import FileStore, MemoryStore
from tickmesh.node.fix_tcp import Link
from tickmesh.ops.fix_market_data import FixVenue, Market
from tickmesh.ops.fix_server import FixServerOptions, factor_of
from tickmesh.ops.simulated_trades import TradeTape
from tickmesh.ops.simulator import Simulator, SimulatorConfig, SimulatorConfigError, generate
from tickmesh.transports.pacing import PaceError

DAY = SimulatorConfig(seed=11, symbols=3, messages=20_000)
CLIENT = SessionOptions(begin_string="FIX.4.4", sender="CLIENT", target="TICKMESH", initiator=True)


# ---------------------------------------------------------------- trades


def test_the_tape_has_every_trade_of_a_day() -> None:
    """Held against a reader of its own: trades, volume and last price of each symbol, and the orders that are left."""
    config = SimulatorConfig(seed=5, symbols=4, messages=60_000, breaks_per_million=2000)
    image, tape, reader = generate(config), TradeTape(), ItchReader()
    cut = [0]
    for number, message in enumerate(frames(image.tobytes())):
        reader.read(message)
        if number % 777 == 0:
            cut.append(cut[-1])
        cut[-1] += 2 + len(message)
    prints = [found for first, last in zip([0, *cut], [*cut, len(image)]) for found in tape.read(image[first:last])]
    for locate in reader.stocks:
        trades = [found for found in prints if found.locate == locate and found.qty]
        assert (len(trades), sum(found.qty for found in trades)) == (reader.trades[locate], reader.volume[locate])
        assert trades[-1].price == reader.last[locate]
        broken = [found.match for found in prints if found.locate == locate and not found.qty]
        assert len(broken) == reader.broken[locate]
        assert set(broken) <= {found.match for found in trades}
    assert any(not found.qty for found in prints)
    assert tape.resting == len(reader.orders)


# ---------------------------------------------------------------- the program


@contextmanager
def program(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`tickmesh simulate --fix`, running; and its port."""
    command = [str(Path(sys.executable).parent / "tickmesh"), "simulate", "--fix", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = process.stderr.readline()
        assert said.startswith("serving at tcp://127.0.0.1:"), said + process.stderr.read()
        yield process, int(said.rpartition(":")[2])
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Ctrl-C, and the summary."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    return dict(json.loads(out))


def day_arguments(*more: str) -> list[str]:
    return ["--seed", str(DAY.seed), "--symbols", str(DAY.symbols), "--messages", str(DAY.messages), "--json", *more]


def source(port: int, more: str = "", fix: str = "") -> str:
    return (
        f'type = "fix"\nendpoint = "tcp://127.0.0.1:{port}"\ndata_format = "fix44"\nsymbols = ["ALFA", "BRVO", "CHRL"]\n'
        f'tick_size = 0.01\nquantity_exponent = 0\nfix = {{ sender = "CLIENT", target = "TICKMESH"{fix} }}\n{FAST}{more}\n'
    )


def the_day() -> tuple[dict[str, dict[tuple[bytes, int], int]], dict[str, list[tuple[int, int, int]]]]:
    """Books at the end of the day, and the trades since its opening: match, price, quantity."""
    market = Market(DAY)
    trades: dict[str, list[tuple[int, int, int]]] = {symbol: [] for symbol in market.simulator.symbols}
    while not market.finished:
        market.step()
        for symbol, prints in market.prints.items():
            trades[symbol] += [(found.match, found.price * 100_000, found.qty) for found in prints if found.qty]
    return {symbol: market.book(symbol) for symbol in trades}, trades


def test_a_source_has_the_simulators_books_and_trades() -> None:
    final, trades = the_day()
    assert all(len(book) > 20 for book in final.values())
    with program(*day_arguments("--speed", "20")) as (process, port):
        with receiving(source(port)) as feed:
            feed.wait_for(connected=1)
            names = []

            def same() -> bool:
                names[:] = [feed.table.symbol(i) for i in range(len(feed.table))]
                return books(feed.events, names) == final

            until(same, "the books of the day's end", 60)
            found = feed.kinds(Kind.TRADE)
            assert feed.counter("gaps") == feed.counter("malformed") == 0
        for symbol, expected in trades.items():
            own = found[found["instrument"] == names.index(symbol)]
            assert list(zip(own["id"].tolist(), own["price"].tolist(), own["qty"].tolist())) == expected
        summary = ended(process)
    simulator = Simulator(DAY)
    while not simulator.finished:
        simulator.next_block(1000)
    assert summary["symbols"] == simulator.truth()
    assert summary["complete"]
    assert summary["fix"]["logons"] == 1


def test_who_may_log_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TICKMESH_SIMULATE_PASSWORD", "secret")
    monkeypatch.setenv("WRONG", "guess")
    arguments = ["--user", "me", "--session", "MARKET", "--fix-client", "DESK1", "--fix-client", "DESK2"]
    with program(*day_arguments(*arguments)) as (process, port):
        for client, password, good in (("DESK1", "WRONG", False), ("CLIENT", "TICKMESH_SIMULATE_PASSWORD", False), ("DESK2", "", True)):
            login = f'user = "me"\npassword_env = "{password or "TICKMESH_SIMULATE_PASSWORD"}"\n'
            own = source(port, login).replace('TICKMESH"', 'MARKET"').replace("CLIENT", client)
            with receiving(own) as feed:
                feed.wait_for(**({"connected": 1} if good else {"connect_failures": 1}))
        fix = ended(process)["fix"]
        assert fix["logons"] == 1
        assert fix["refused"] >= 2


def test_sessions_that_are_kept_go_on_where_they_were(tmp_path: Path) -> None:
    """The program ends, and another goes on with its sequences: what the client has not had comes from the store."""
    arguments = day_arguments("--fix-store", str(tmp_path / "venue"))
    own = source(0, fix=f', reset = "never", store = "{tmp_path / "client"}"')
    for logons in (1, 2):
        with program(*arguments) as (process, port):
            with receiving(own.replace(':0"', f':{port}"')) as feed:
                feed.wait(50)
                assert feed.counter("gaps") == 0
            assert ended(process)["fix"]["logons"] == 1
        store = FileStore(tmp_path / "venue" / "CLIENT")
        assert store.next_out > 3 * logons
        store.close()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--fix", "70000"], 2, "a port from 0 to 65535"),
        (["--fix", "0", "--soupbintcp", "0"], 2, "one server at a time"),
        (["--fix", "0", "--speed", "max"], 2, "realtime or a factor"),
        (["--fix", "0", "--speed", "quick"], 2, "realtime"),
        (["--fix", "0", "--fix-client", "A", "--fix-client", "A"], 2, "different CompIDs"),
        (["--fix", "0", "--fix-client", "../A"], 2, "without a slash"),
        (["--fix", "0", "--fix-client", "Ä"], 2, "printable ASCII"),
        (["--fix-client", "A", "--file", "x"], 2, "--fix"),
        (["--fix", "0", "--user", "me"], 2, "TICKMESH_SIMULATE_PASSWORD"),
        (["--fix", "0", "--listen", "198.51.100.1"], 1, "choose another port or address"),
        (["--fix", "0", "--fix-store", "/proc/none"], 1, "choose another folder"),
    ],
)
def test_options_that_cannot_be(arguments: list[str], code: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TICKMESH_SIMULATE_PASSWORD", raising=False)
    exit_code, stdout, stderr = invoke(*arguments)
    assert (exit_code, stdout) == (code, "")
    assert says in stderr
    assert "Traceback" not in stderr


def test_speeds() -> None:
    assert (factor_of("realtime"), factor_of("12.5")) == (1.0, 12.5)
    with pytest.raises(PaceError):
        factor_of("-1")
    with pytest.raises(SimulatorConfigError, match="once"):
        factor_of("max")
    assert "hidden" not in repr(FixServerOptions(user="me", password="hidden"))


# ---------------------------------------------------------------- requests


class Told:
    """A client that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    async def handle(self, event: Event) -> None:
        if isinstance(event, Received) and not event.admin:
            self.messages += event.messages()

    def of(self, kind: str) -> list[Message]:
        return [message for message in self.messages if message.type == kind]


@asynccontextmanager
async def subscriber() -> AsyncIterator[tuple[FixVenue, Link, Told]]:
    """A venue whose market moves when it is told to, and a client that is logged on to it."""
    venue = FixVenue(DAY, FixServerOptions().sessions(), interval_s=3600)
    port, told = await venue.start(), Told()
    link = Link(Session(CLIENT, MemoryStore()), *await asyncio.open_connection("127.0.0.1", port), told.handle)
    running = asyncio.create_task(link.run())
    try:
        async with asyncio.timeout(30):
            while not link.session.logged_on:
                await asyncio.sleep(0.005)
            yield venue, link, told
            await link.logout()
            assert (await running).clean
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await venue.stop()


def request(kinds: bytes = b"01", symbol: bytes = b"ALFA", name: bytes = b"R", **tags: bytes) -> list[tuple[int, bytes]]:
    given = {262: name, 263: b"1", 264: b"0", 265: b"1"} | {int(tag[1:]): value for tag, value in tags.items()}
    types = [(269, bytes([kind])) for kind in kinds]
    return [*given.items(), (267, b"%d" % len(types)), *types, (146, b"1"), (55, symbol)]


@pytest.mark.parametrize("depth", [1, 5, 0])
def test_a_book_is_as_deep_as_it_is_asked_for(depth: int) -> None:
    async def scenario() -> None:
        async with subscriber() as (venue, link, told):
            link.send("V", request(t264=b"%d" % depth))
            while not told.of("W"):
                await asyncio.sleep(0.005)
            book: dict[tuple[bytes, bytes], bytes] = {
                (entry[269], entry[270]): entry[271] for entry in map(dict, told.of("W")[0].group(268, 269))
            }
            for _ in range(30):
                venue.market.step()
                venue.venues[0].publish()
            link.send("V", request(name=b"last", t263=b"0", t264=b"%d" % depth))
            while len(told.of("W")) < 2:
                await asyncio.sleep(0.005)
            for message in told.of("X"):
                for entry in map(dict, message.group(268, 279)):
                    key = entry[269], entry[270]
                    assert (entry[279] == b"0") == (key not in book)
                    if entry[279] == b"2":
                        del book[key]
                    else:
                        book[key] = entry[271]
            assert book == {(e[269], e[270]): e[271] for e in map(dict, told.of("W")[1].group(268, 269))}
            whole = venue.market.simulator.book("ALFA", depth or None)
            assert len(book) == len(whole["bids"]) + len(whole["asks"])
            assert {kind for kind, _ in book} == {b"0", b"1"}

    asyncio.run(scenario())


def test_only_trades_and_only_offers() -> None:
    async def scenario() -> None:
        async with subscriber() as (venue, link, told):
            link.send("V", request(b"2", name=b"trades"))
            link.send("V", request(b"1", name=b"offers"))
            while len(venue.venues[0].subscriptions) < 2:
                await asyncio.sleep(0.005)
            traded = 0
            for _ in range(30):
                venue.market.step()
                venue.venues[0].publish()
                traded += len(venue.market.prints.get("ALFA", ()))
            link.send("V", request(name=b"last", t263=b"0"))
            while not any(message.get(262) == b"last" for message in told.of("W")):
                await asyncio.sleep(0.005)
            entries = {
                name: [e for m in told.of("X") if m.get(262) == name for e in map(dict, m.group(268, 279))]
                for name in (b"trades", b"offers")
            }
            assert {entry[269] for entry in entries[b"trades"]} == {b"2"}
            assert len(entries[b"trades"]) == traded > 0
            assert {entry[269] for entry in entries[b"offers"]} == {b"1"}
            assert [message.get(262) for message in told.of("W")] == [b"offers", b"last"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (request(symbol=b"NOPE"), b"0"),
        (request(name=b"R0"), b"1"),
        (request(t263=b"7"), b"4"),
        (request(t264=b"-1"), b"5"),
        (request(t265=b"0"), b"6"),
        (request(t266=b"N"), b"7"),
        (request(b"05"), b"8"),
    ],
    ids=["symbol", "name", "kind of request", "depth", "kind of update", "by order", "kind of entry"],
)
def test_requests_that_are_rejected(body: list[tuple[int, bytes]], reason: bytes) -> None:
    async def scenario() -> None:
        async with subscriber() as (venue, link, told):
            link.send("V", request(name=b"R0"))
            link.send("V", body)
            while not told.of("Y"):
                await asyncio.sleep(0.005)
            (refusal,) = told.of("Y")
            assert refusal.get(281) == reason
            assert refusal.get(58)
            assert list(venue.venues[0].subscriptions) == [b"R0"]

    asyncio.run(scenario())


def test_a_list_of_symbols() -> None:
    async def scenario() -> None:
        async with subscriber() as (_, link, told):
            link.send("x", [(320, b"all"), (559, b"4")])
            while not told.of("y"):
                await asyncio.sleep(0.005)
            (answer,) = told.of("y")
            assert (answer.get(320), answer.get(560)) == (b"all", b"0")
            assert [dict(entry)[55] for entry in answer.group(146, 55)] == [b"ALFA", b"BRVO", b"CHRL"]

    asyncio.run(scenario())


def test_large_changes_come_in_several_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tickmesh.ops.fix_market_data._ENTRIES_MAX", 7)

    async def scenario() -> None:
        async with subscriber() as (venue, link, told):
            link.send("V", request())
            while not venue.venues[0].subscriptions:
                await asyncio.sleep(0.005)
            before = dict(venue.market.book("ALFA"))
            venue.market.step(5000)
            venue.venues[0].publish()
            after = venue.market.book("ALFA")
            changed = sum(before.get(key) != after.get(key) for key in {*before, *after})
            while sum(int(message.get(268) or 0) for message in told.of("X")) < changed:
                await asyncio.sleep(0.005)
            counts = [int(message.get(268) or 0) for message in told.of("X")]
            assert changed > 7
            assert counts == [7] * (changed // 7) + [changed % 7] * (changed % 7 > 0)

    asyncio.run(scenario())


def test_a_book_of_the_simulator_is_its_truth() -> None:
    simulator = Simulator(DAY)
    simulator.next_block(5000)
    truth = simulator.truth(4)
    for symbol in simulator.symbols:
        assert simulator.book(symbol, 4) == {side: truth[symbol][side] for side in ("bids", "asks")}
        whole = simulator.book(symbol)
        assert whole["bids"][:4] == truth[symbol]["bids"]
        assert np.all(np.diff([level[0] for level in whole["asks"]]) > 0)
