"""Receivers in a node: multicast lines with faults, recordings, and routing to shards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from nats_fixtures import nats_server  # noqa: F401
from nodes import (  # noqa: F401
    SYMBOLS,
    assert_true,
    assert_whole,
    books,
    cluster,
    finish,
    free_endpoints,
    journal_outputs,
    multicast_source,
    node_config,
    outputs_made,
    running,
    simulator_source,
    stream,
    until,
)
from replays import BINANCE, ES, recording

from tickmesh.control.config import Config
from tickmesh.node.event import Flag, Kind
from tickmesh.node.process import Node
from tickmesh.node.replay import replay
from tickmesh.node.telemetry import read_telemetry, telemetry_path
from tickmesh.ops.servers import NatsServer
from tickmesh.ops.simulated_lines import FaultConfig, LineConfig, SimulatedLines, send_lines
from tickmesh.ops.simulator import Simulator, SimulatorConfig

# ---------------------------------------------------------------- multicast


def simulated_lines(*faults: FaultConfig, messages: int = 10_000, rate: int = 10_000) -> SimulatedLines:
    simulator = Simulator(SimulatorConfig(seed=3, symbols=len(SYMBOLS), rate=rate, messages=messages, names=SYMBOLS))
    return SimulatedLines(simulator, LineConfig(faults=faults, heartbeat_ns=20_000_000))


@contextmanager
def sending(lines: SimulatedLines, endpoints: tuple[str, ...]) -> Iterator[threading.Thread]:
    """Send lines beside; ended on leaving."""
    stop = threading.Event()
    thread = threading.Thread(target=send_lines, args=(lines, endpoints), kwargs={"stop": stop})
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join()


def settle(node: Node, least: int = 1) -> None:
    """Wait until nothing more comes in and everything is delivered."""
    last = -1

    def quiet() -> bool:
        nonlocal last
        node.check()
        now = outputs_made(node)
        delivered = all(s["ring_lag"] == 0 and not s["in_flight"] for s in node.gateways["events"].status())
        done = now == last and now >= least and node.drained() and delivered
        last = now
        threading.Event().wait(1.3)  # longer than a bar: the timer that ends it has come
        return done

    until(quiet, "quiet after the lines have ended")


def test_what_one_line_loses_the_other_brings(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    endpoints = free_endpoints()
    lines = simulated_lines(FaultConfig(loss=0.1, duplicate=0.1, reorder=0.1), FaultConfig(duplicate=0.1))
    with running(node_config(cluster, tmp_path, multicast_source(endpoints, gap_wait_ms=3000)), nats_server.url) as node:
        with sending(lines, endpoints) as thread:
            thread.join(60)
        settle(node)
        assert_true(node, dict(lines.simulator.truth(10_000)))
        made = outputs_made(node)
        outputs, missing = stream(nats_server.url, cluster, made)
        counters = node.receivers[0].counters()
    assert not missing
    assert_whole(outputs, made)
    assert (counters["gaps"], counters["missing"], counters["malformed"], counters["dropped_by_kernel"]) == (0, 0, 0, 0)
    assert counters["duplicates"] > 0
    assert not np.any(outputs[outputs["kind"] == Kind.BBO]["flags"] & Flag.STALE)


def test_what_both_lines_lose_is_a_gap(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    endpoints = free_endpoints()
    lossy = FaultConfig(loss=0.3)
    lines = simulated_lines(lossy, lossy, messages=4000)
    with running(node_config(cluster, tmp_path, multicast_source(endpoints, gap_wait_ms=20)), nats_server.url) as node:
        with sending(lines, endpoints) as thread:
            thread.join(60)
        settle(node)
        made = outputs_made(node)
        outputs, missing = stream(nats_server.url, cluster, made)
        node.mirror()
        source = read_telemetry(telemetry_path(cluster, "n1"))["sources"]["lines"]
    assert not missing
    assert_whole(outputs, made)
    gaps = outputs[outputs["kind"] == Kind.GAP]
    assert len(gaps) == source["gaps"] > 0
    assert int((gaps["aux"] - gaps["id"].astype(np.int64) + 1).sum()) == source["missing"] > 0
    first = int(np.flatnonzero(outputs["kind"] == Kind.GAP)[0])
    before, after = outputs[:first], outputs[first:]
    known = before["instrument"][before["kind"] == Kind.REFERENCE]
    quotes = after[(after["kind"] == Kind.BBO) & np.isin(after["instrument"], known)]
    assert len(quotes)
    assert np.all(quotes["flags"] & Flag.STALE)


# ---------------------------------------------------------------- shards


def test_two_shards_make_of_each_instrument_what_one_makes(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    placed = '\n[cluster.shard_overrides]\nALFA = 1\nBRVO = 0\n'
    found = []
    for shards, name in ((1, f"{cluster}a"), (2, f"{cluster}b")):
        extra = f"shards = {shards}" + (placed if shards == 2 else "")
        config = node_config(name, tmp_path / name, simulator_source(6000), cluster_extra=extra)
        with running(config, nats_server.url) as node:
            finish(node)
            found.append((books(node), by_symbol(node, nats_server.url, name)))
            if shards == 2:
                owners = {s.shard.symbol(i): number for number, s in enumerate(node.shards) for i in s.shard.seen_instruments()}
    assert found[0][0] == found[1][0]
    assert found[0][1].keys() == found[1][1].keys() == set(SYMBOLS)
    for symbol in SYMBOLS:
        assert found[0][1][symbol] == found[1][1][symbol], symbol
    assert (owners["ALFA"], owners["BRVO"]) == (1, 0)
    assert set(owners.values()) == {0, 1}


def by_symbol(node: Node, url: str, name: str) -> dict[str, list[tuple[int, ...]]]:
    """Trades and BBOs per symbol, without ids, receive times and output sequences."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for number, thread in enumerate(node.shards):
        made = outputs_made(node, number)
        outputs, missing = stream(url, name, made, number)
        assert_whole(outputs, made)
        assert not missing
        for event in outputs[np.isin(outputs["kind"], (Kind.BBO, Kind.TRADE, Kind.BAR))]:
            fields = ("kind", "side", "flags", "ts_event", "price", "qty", "id", "aux")
            found.setdefault(thread.shard.symbol(int(event["instrument"])), []).append(tuple(int(event[name]) for name in fields))
    return found


# ---------------------------------------------------------------- recordings


@pytest.mark.parametrize(
    ("data_format", "path", "pace"), [("dbn_mbo", ES, '"max"'), pytest.param("binance", BINANCE, "100000", marks=pytest.mark.slow)]
)
def test_a_recording_live_is_its_replay(
    nats_server: NatsServer, cluster: str, tmp_path: Path, data_format: str, path: str, pace: str  # noqa: F811
) -> None:
    file = recording(path)
    source = f'[data_sources.feed]\ntype = "file"\npath = "{file}"\ndata_format = "{data_format}"\npace = {pace}\n'
    config = node_config(cluster, tmp_path, source)
    replayed: list[np.ndarray] = []
    summary = replay(config, [file], observe=lambda _, events: replayed.append(events.copy()))
    with running(config, nats_server.url) as node:
        finish(node)
        made = outputs_made(node)
        outputs, missing = stream(nats_server.url, cluster, made)
        assert_same_books(node, summary, config)
    assert not missing
    expected = np.concatenate(replayed)
    assert_whole(outputs, len(expected))
    outputs, expected = outputs.copy(), expected.view(outputs.dtype).copy()
    outputs["ts_recv"] = expected["ts_recv"] = 0  # the live node stamps what it plays as received now
    different = np.flatnonzero(outputs.view("V64") != expected.view("V64"))
    assert len(different) == 0, (outputs[different[:3]], expected[different[:3]])


def assert_same_books(node: Node, summary: dict[str, object], config: Config) -> None:
    from tickmesh.node.summary import summarise

    receiver = node.receivers[0]
    mine = summarise(
        source={"format": "", "bytes": 0, "messages_total": 0, "seconds": 0}, messages={}, malformed={}, gaps=[], duplicates=0,
        shards=[thread.shard for thread in node.shards], instruments=node.table, depth=10,
    )  # fmt: skip
    assert mine["instruments"] == summary["instruments"]
    assert mine["refused"] == summary["refused"]
    assert receiver.counters()["malformed"] == 0
