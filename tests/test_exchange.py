"""Calculations over instruments of several shards: the same signals as of one shard that has all, live, over restarts and changes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from nats_fixtures import nats_server, own_nats_server  # noqa: F401
from nodes import (  # noqa: F401
    PROCESSING,
    SYMBOLS,
    assert_whole,
    cluster,
    finish,
    free_endpoints,
    multicast_source,
    node_text,
    outputs_made,
    running,
    simulator_source,
    stream,
    until,
)
from test_delivery import SYMBOLS as SYMBOL_OF
from test_subscribe import deliver

from tickmesh.control.config import ConfigError, parse_config
from tickmesh.control.sharding import shard_of
from tickmesh.node.calculation import PlanError
from tickmesh.node.event import EVENT, EventArray, Kind
from tickmesh.node.exchange import Exchange, Streams
from tickmesh.node.frames import InstrumentNames, reference_stream_name
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.journal_replay import replay_journal
from tickmesh.node.peers import Wanted
from tickmesh.node.pipeline import make_plan
from tickmesh.node.process import Node
from tickmesh.node.replay import replay
from tickmesh.node.restore import RestoredShard
from tickmesh.ops.servers import NatsServer
from tickmesh.ops.simulated_lines import LineConfig, SimulatedLines, send_lines
from tickmesh.ops.simulator import Simulator, SimulatorConfig
from tickmesh.transports.nats import Login, connect
from tickmesh.transports.ring import Ring

MESSAGES = 20_000
JOINS = """
[processing.calculations.pair]
use = "spread"
inputs = ["bbo:ALFA", "bbo:BRVO"]
[processing.calculations.four]
use = "basket"
inputs = ["bbo:ALFA", "trade:CHRL", "bbo:DLTA", "bbo:FXTR"]
[processing.calculations.smooth]
use = "ema"
of = "pair"
"""
Signals = dict[str, list[tuple[int, ...]]]


def text_of(cluster_name: str, folder: Path, sources: str, shards: int, joins: str = JOINS) -> str:
    processing = PROCESSING.replace("[processing]\n", "[processing]\ntimer_interval_ms = 10\n", 1) + joins
    text = node_text(cluster_name, folder, sources, cluster_extra=f"shards = {shards}")
    assert PROCESSING in text
    return text.replace(PROCESSING, processing)


def signals_of(outputs: Mapping[int, EventArray], symbols: tuple[str, ...] = ("pair", "four")) -> Signals:
    """Signals by symbol, each as time, calculation and output, price, quantity and value; from each shard's outputs."""
    found: Signals = {}
    for events in outputs.values():
        names = InstrumentNames()
        names.learn(events)
        ids = {number: name.symbol for number, name in names.items()}
        for event in events[events["kind"] == Kind.SIGNAL]:
            symbol = ids[int(event["instrument"])]
            if symbol in symbols:
                row = tuple(int(event[field]) for field in ("ts_event", "id", "price", "qty", "aux"))
                found.setdefault(str(symbol), []).append(row)
    return found


def capture(folder: Path, messages: int, seed: int = 1, rate: int = 5000) -> Path:
    """The simulator's day as a file."""
    simulator = Simulator(SimulatorConfig(seed=seed, symbols=len(SYMBOLS), rate=rate, messages=messages, names=SYMBOLS))
    path = folder / "day.itch"
    with path.open("wb") as file:
        while not simulator.finished:
            image, end = simulator.next_block(4096)
            file.write(image[:end].tobytes())
    return path


def replayed(path: Path, shards: int = 1, joins: str = JOINS) -> Signals:
    """Signals of a replay of recordings in one process."""
    source = f'[data_sources.market]\ntype = "file"\npath = "{path}"\ndata_format = "itch50"\n'
    parts: dict[int, list[EventArray]] = {}
    config = parse_config(text_of("replayed", path.parent, source, shards, joins))
    replay(config, [path], observe=lambda shard, events: parts.setdefault(shard, []).append(events.copy()))
    return signals_of({shard: np.concatenate(events) for shard, events in parts.items()})


def streamed(node: Node, url: str, cluster_name: str) -> dict[int, EventArray]:
    """Every shard's outputs, each once; and the journals give the same."""
    found = {}
    for thread in node.shards:
        made = outputs_made(node, thread.number)
        found[thread.number], missing = stream(url, cluster_name, made, thread.number)
        assert not missing
        assert_whole(found[thread.number], made)
    return found


def assert_journals_give(node: Node, outputs: Mapping[int, EventArray]) -> None:
    for number, journal in enumerate(node.journals):
        parts: list[EventArray] = []
        replay_journal(journal.folder, observe=lambda events: parts.append(events.copy()))  # noqa: B023
        assert np.concatenate(parts).tobytes() == outputs[number].tobytes()


def test_the_symbols_of_these_tests_are_on_several_shards() -> None:
    homes = {name: shard_of(name, 3) for name in ("pair", "four", *SYMBOLS)}
    assert len({homes[name] for name in ("pair", "ALFA", "BRVO")}) > 1
    assert len({homes[name] for name in ("four", "ALFA", "CHRL", "DLTA", "FXTR")}) == 3


@pytest.mark.parametrize("shards", [2, 3, 5])
def test_a_replay_gives_the_same_signals_on_any_number_of_shards(tmp_path: Path, shards: int) -> None:
    path = capture(tmp_path, MESSAGES)
    signals = replayed(path)
    assert len(signals["pair"]) > 1000
    assert len(signals["four"]) > 1000
    assert replayed(path, shards) == signals


def test_spreads_are_of_the_mids_in_the_order_of_time(tmp_path: Path) -> None:
    """What the signals say, once more from the best bids and offers alone."""
    path, parts = capture(tmp_path, MESSAGES), []
    source = f'[data_sources.market]\ntype = "file"\npath = "{path}"\ndata_format = "itch50"\n'
    config = parse_config(text_of("replayed", tmp_path, source, 1))
    replay(config, [path], observe=lambda _, events: parts.append(events.copy()))
    outputs, names = np.concatenate(parts), InstrumentNames()
    names.learn(outputs)
    legs = {number: ("ALFA", "BRVO").index(name.symbol) for number, name in names.items() if name.symbol in ("ALFA", "BRVO")}
    bbos = [event for event in outputs[outputs["kind"] == Kind.BBO] if int(event["instrument"]) in legs]
    bbos.sort(key=lambda event: (int(event["ts_event"]), legs[int(event["instrument"])]))  # stable: of one leg in their order
    mids, wanted = [float("nan")] * 2, []
    for event in bbos:
        known = min(int(event["price"]), int(event["aux"])) != -(1 << 63)
        mids[legs[int(event["instrument"])]] = (int(event["price"]) + int(event["aux"])) / 2e9 if known else float("nan")
        if mids[0] == mids[0] and mids[1] == mids[1]:
            wanted.append((int(event["ts_event"]), mids[0] - mids[1]))
    found = signals_of({0: outputs})["pair"]
    first = min(row[1] for row in found)
    rows = [row for row in found if row[1] == first]
    found = [(row[0], float(np.int64(row[4]).view(np.float64))) for row in rows]
    assert len(found) > len(wanted) - 20, "only the last few wait for what comes after the end"
    assert found == wanted[: len(found)]


def test_shards_of_a_node_take_of_each_other(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    config = parse_config(text_of(cluster, tmp_path / "data", simulator_source(MESSAGES), 3))
    with running(config, nats_server.url) as node:
        finish(node)
        outputs = streamed(node, nats_server.url, cluster)
        taken = [thread.exchange.status() for thread in node.shards if thread.exchange is not None]
        assert sum(map(len, taken)) >= 2
        assert not any(row["error"] or row["missing"] for rows in taken for row in rows.values())
    assert signals_of(outputs) == replayed(capture(tmp_path, MESSAGES))
    assert_journals_give(node, outputs)


@contextmanager
def sent(endpoints: tuple[str, str], seed: int, messages: int, rate: int) -> Iterator[threading.Thread]:
    """A simulated market on multicast, at its own pace; to be started."""
    stop = threading.Event()
    simulator = Simulator(SimulatorConfig(seed=seed, symbols=len(SYMBOLS), rate=rate, messages=messages, names=SYMBOLS))
    lines = SimulatedLines(simulator, LineConfig(heartbeat_ns=50_000_000))
    sender = threading.Thread(target=send_lines, args=(lines, endpoints[:1]), kwargs={"stop": stop})
    try:
        yield sender
    finally:
        stop.set()
        if sender.ident is not None:
            sender.join()


def test_a_node_that_is_stopped_and_started_goes_on_where_it_was(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """Its shards read on in each other's streams: no signal twice, none left out (but those of what the node has not received)."""
    endpoints = free_endpoints()
    text = text_of(cluster, tmp_path / "data", multicast_source(endpoints, gap_wait_ms=20), 3)
    with sent(endpoints, 5, 1_000_000, 4000) as sender:
        with running(parse_config(text), nats_server.url) as node:
            sender.start()
            until(lambda: all(outputs_made(node, number) > 2000 for number in range(3)), "outputs of every shard")
        with running(parse_config(text), nats_server.url) as node:
            made = [outputs_made(node, number) for number in range(3)]
            until(lambda: all(outputs_made(node, number) > made[number] + 2000 for number in range(3)), "more of them")
        outputs = streamed(node, nats_server.url, cluster)
    assert_journals_give(node, outputs)
    home = shard_of("pair", 3)
    taken = replay_journal(node.journals[home].folder)["events"]
    assert taken["peer_timer"] > 0
    merged = merged_by_one(outputs)
    signals = [row for row in signals_of(outputs)["pair"] if row[1] == min(r[1] for r in signals_of(outputs)["pair"])]
    assert [row[0] for row in signals] == merged[: len(signals)]
    assert len(signals) > len(merged) - 200


def merged_by_one(outputs: Mapping[int, EventArray]) -> list[int]:
    """Times of the BBOs of ALFA and BRVO in the order of time, from the first on that both are known at."""
    keyed = []
    for events in outputs.values():
        names = InstrumentNames()
        names.learn(events)
        for number, name in names.items():
            if name.symbol in ("ALFA", "BRVO"):
                leg, bbos = ("ALFA", "BRVO").index(name.symbol), events[(events["kind"] == Kind.BBO) & (events["instrument"] == number)]
                keyed += [(int(bbo["ts_event"]), leg, int(bbo["seq"]), _two_sided(bbo)) for bbo in bbos]
    known, found = [False, False], []
    for time_ns, leg, _, whole in sorted(keyed):
        known[leg] = whole
        if all(known):
            found.append(time_ns)
    return found


def _two_sided(bbo: np.void) -> bool:
    return min(int(bbo["price"]), int(bbo["aux"])) != -(1 << 63) and not int(bbo["flags"]) & 16


@pytest.mark.slow
def test_one_is_added_and_changed_while_the_node_runs(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    flow = simulator_source(0, pace='"realtime"', rate=20_000)
    text = text_of(cluster, tmp_path / "data", flow, 3, joins="")
    with running(parse_config(text), nats_server.url) as node:
        until(lambda: outputs_made(node) > 1000, "outputs")
        more = text_of(cluster, tmp_path / "data", flow, 3)
        node.apply(parse_config(more), 1)
        home = node.shards[shard_of("pair", 3)]
        until(lambda: home.shard.arrays.q1 is not None and outputs_made(node) > 5000, "more outputs")
        joins = {name: getattr(home.shard.arrays, name) for name in home.shard.arrays._fields if name[0] == "q"}
        until(lambda: any(int(join.lanes["head"].sum()) > 1000 for join in joins.values()), "events that came out of the joins")
        node.apply(parse_config(more.replace('of = "pair"', 'of = "pair"\nwindow = 20')), 2)
        node.apply(parse_config(more.replace('"bbo:BRVO"]', '"bbo:CHRL"]')), 3)
        until(lambda: outputs_made(node) > 20_000, "more outputs")
        node.apply(parse_config(text), 4)
        until(lambda: not any(thread.exchange.status() for thread in node.shards if thread.exchange), "nothing is taken any more")
    outputs = streamed(node, nats_server.url, cluster)
    assert_journals_give(node, outputs)
    assert len(signals_of(outputs)["pair"]) > 1000


def test_outputs_of_instruments_without_a_name_are_waited_with(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    """The stream of names may be behind the outputs: then nothing is taken until the names are there, and then everything."""
    deliver(nats_server, cluster, 100)
    asyncio.run(forget_names(nats_server.url, cluster))
    ring, table = Ring.create(None, 1024, EVENT, reader_timeout_ms=60_000), InstrumentTable(64)
    reader = ring.reader("test")
    exchange = Exchange(1, ring, table, RestoredShard(), {0: 50})
    exchange.take(Wanted((), {0: frozenset({("bbo", "AAPL")})}), Streams(cluster, nats_server.url, Login()))
    try:
        until(lambda: "has not told the names of its instruments" in exchange.errors.get(0, ""), "the reason to be said")
        taken = reader.read(100).view(EVENT)
        assert taken["kind"].tolist() == [Kind.PEER_TIMER], "only where it begins"
        deliver(nats_server, cluster, 200)
        until(lambda: exchange.seen.get(0) == 200, "all outputs to be looked at")
        taken = reader.read(1024).view(EVENT)
        assert taken["kind"][0] == Kind.PEER_REFERENCE
        assert taken["seq"][1:].tolist() == [s for s in range(51, 201) if SYMBOL_OF[s % 3] == "AAPL"]
        assert exchange.errors == {}
    finally:
        exchange.close()


async def forget_names(url: str, cluster_name: str) -> None:
    link = await connect(url)
    try:
        await link.client.jetstream().purge_stream(reference_stream_name(cluster_name))
    finally:
        await link.close()


def test_what_is_wrong_with_the_legs_is_said(tmp_path: Path) -> None:
    def reasons(joins: str, more: str = "", shards: int = 2) -> str:
        text = text_of("wrong", tmp_path, simulator_source(1), shards, joins) + more
        try:
            make_plan(parse_config(text), tmp_path)
        except (PlanError, ConfigError) as error:
            return str(error)
        return ""

    join = '[processing.calculations.pair]\nuse = "spread"\ninputs = {}\n'
    assert "names 1, spread takes 2" in reasons(join.format('["bbo:A"]'))
    assert "there already" in reasons(join.format('["bbo:A", "bbo:A"]'))
    assert "bbo or trade, a colon and a symbol" in reasons(join.format('["bbo:A", "mid:B"]'))
    assert "bbo or trade, a colon and a symbol" in reasons(join.format('["bbo:A", "bbo:"]'))
    assert "name what it takes" in reasons('[processing.calculations.pair]\nuse = "spread"\n')
    assert "symbols" in reasons(join.format('["bbo:A", "bbo:B"]') + 'symbols = ["A"]\n')
    assert "runs for each instrument by itself" in reasons('[processing.calculations.x]\nuse = "ema"\ninputs = ["bbo:A"]\n')
    assert "more than 24 characters" in reasons(join.replace("pair", "a_name_that_is_far_too_long").format('["bbo:A", "bbo:B"]'))
    assert reasons(join.format('["bbo:A", "trade:B"]')) == ""
