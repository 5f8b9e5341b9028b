"""The node process with a real nats-server: what goes in comes out, once, in order, over restarts and failures."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from nats_fixtures import nats_server, own_nats_server  # noqa: F401
from nodes import (  # noqa: F401
    SYMBOLS,
    assert_true,
    assert_whole,
    cluster,
    finish,
    free_endpoints,
    journal_outputs,
    multicast_source,
    node_config,
    node_text,
    outputs_made,
    running,
    simulator_source,
    stream,
    until,
)
from processes import resume, suspend
from test_decoder import directory, framed
from test_replay import execute, order

from tickmesh.control.config import parse_config
from tickmesh.node.errors import NodeError
from tickmesh.node.event import EventArray, Kind
from tickmesh.node.journal import JournalReadOnly
from tickmesh.node.process import Node
from tickmesh.node.telemetry import NodeRunning, read_telemetry, telemetry_path
from tickmesh.ops.servers import NatsServer
from tickmesh.ops.simulated_lines import LineConfig, SimulatedLines, send_lines
from tickmesh.ops.simulator import Simulator, SimulatorConfig
from tickmesh.ops.up import GENERATORS

MESSAGES = 20_000


def simulator_truth(messages: int = MESSAGES, symbols: tuple[str, ...] = SYMBOLS, rate: int = 5000) -> dict[str, object]:
    simulator = Simulator(SimulatorConfig(seed=1, symbols=len(symbols), rate=rate, messages=messages, names=symbols))
    while not simulator.finished:
        simulator.next_block(4096)
    return dict(simulator.truth(10_000))


def test_a_simulated_market_comes_out_whole(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    config = node_config(cluster, tmp_path, simulator_source(MESSAGES))
    with running(config, nats_server.url) as node:
        finish(node)
        assert_true(node, simulator_truth())
        made = outputs_made(node)
        outputs, missing = stream(nats_server.url, cluster, made)
        node.mirror()
        reading = read_telemetry(telemetry_path(cluster, "n1"))
    assert not missing
    assert_whole(outputs, made)
    assert {Kind.BBO, Kind.TRADE, Kind.SIGNAL, Kind.REFERENCE} <= {Kind(int(k)) for k in set(outputs["kind"])}
    assert reading["sources"]["market"]["messages"] == MESSAGES
    assert reading["shards"][0]["outputs"] == made
    assert not telemetry_path(cluster, "n1").exists()
    assert same(outputs, journal_outputs(config)[0])


STILL = {
    "source": {
        "connected", "reconnects", "connect_failures", "overflowed",
        "packets", "malformed", "gaps", "missing", "duplicates", "filtered", "ring_full", "dropped_by_kernel", "way", "way_because",
        "rx_dropped", "rx_ring_full", "truncated", "fragments", "tagged", "bad_checksum", "not_wanted", "requests", "recovered", "given_up",
        "books_waiting", "snapshots_asked", "snapshots_failed", "checksums_failed", "restarts", "errors", "unchanged", "skipped",
        "empty_messages", "rotations", "truncations", "counted", "snapshots", "books_recovered", "snapshots_too_old", "snapshots_ahead",
        "snapshots_not_kept", "snapshots_too_large", "snapshot_turns", "snapshot_turns_broken",
        "definition_packets", "definition_turns", "definitions_new",
    },
    "shard": {"refused", "blocked", "alerts", "crossed", "config_version", "output_lag", "journal_dropped", "from_shards", "not_waited"},
    "delivery": {"retries", "reconnects", "skipped", "lag"},
}
"""Counters that may stay at 0 while a simulated market, which has no packets or connections and makes no mistakes, goes to a server that
is well."""


def test_every_counter_that_should_move_moves(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    with running(node_config(cluster, tmp_path, simulator_source(MESSAGES, pace="20.0")), nats_server.url) as node:
        finish(node)
        made = outputs_made(node)
        node.mirror()
        reading = read_telemetry(telemetry_path(cluster, "n1"))
    sets = {"source": reading["sources"]["market"], "shard": reading["shards"][0], "delivery": reading["deliveries"]["events"][0]}
    for kind, numbers in sets.items():
        still = {name for name, value in numbers.items() if value == 0 and name != "shard"}
        assert still <= STILL[kind], kind
    orders = sum(about["orders"] for about in simulator_truth().values())  # type: ignore[index]
    assert sets["shard"]["orders"] == orders
    latencies = [sets["shard"]["receive_to_output"], sets["shard"]["batch_events"], sets["delivery"]["receive_to_stored"]]
    assert all(latency["count"] > 0 and latency["max"] > 0 for latency in latencies)
    assert round(latencies[1]["mean"] * latencies[1]["count"]) == sets["shard"]["events_in"], "every batch counts"
    assert latencies[2]["count"] == made, "every output counts once"


def test_crossed_books_and_refusals_are_counted(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    day = tmp_path / "day.itch"
    asks = [order(3, b"S", 5, 499_900, 5), order(4, b"S", 5, 500_100, 6)]
    day.write_bytes(framed(
        directory(5, "XX"), directory(6, "OK"), order(1, b"B", 100, 500_000, 5), order(2, b"B", 5, 500_000, 6), *asks, execute(77, 1, 5)
    ))  # fmt: skip
    config = node_config(cluster, tmp_path / "data", f'[data_sources.feed]\ntype = "file"\npath = "{day}"\ndata_format = "itch50"\n')
    with running(config, nats_server.url) as node:
        finish(node)
        node.mirror()
        shard = read_telemetry(telemetry_path(cluster, "n1"))["shards"][0]
    assert (shard["crossed"], shard["refused"], shard["orders"], shard["instruments"]) == (1, 1, 4, 2)


def same(one: EventArray, other: EventArray) -> bool:
    return one.tobytes() == other.tobytes()


# ---------------------------------------------------------------- restarts


def test_a_simulation_started_again_numbers_on(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    config = node_config(cluster, tmp_path, simulator_source(3000))
    made = []
    for _ in range(2):
        with running(config, nats_server.url) as node:
            finish(node)
            made.append(outputs_made(node))
    outputs, missing = stream(nats_server.url, cluster, made[-1])
    assert not missing
    assert_whole(outputs, made[1])
    assert made[1] == 2 * made[0]
    assert {path.name for path in (tmp_path / "journal" / "n1").iterdir()} == {"shard-0", "shard-0.previous"}


@contextmanager
def node_process(folder: Path, text: str) -> Iterator[subprocess.Popen[str]]:
    """``tickmesh node run`` of a configuration, killed in the end if it still runs."""
    file = folder / "node.toml"
    file.write_text(text)
    command = [sys.executable, "-m", "tickmesh.ops.cli", "node", "run", "--config", str(file)]
    with (folder / "node.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def outputs_seen(cluster: str) -> int:  # noqa: F811
    try:
        return int(read_telemetry(telemetry_path(cluster, "n1"))["shards"][0]["outputs"])
    except (OSError, ValueError, RuntimeError):
        return 0


@pytest.mark.slow
def test_a_killed_node_goes_on_from_its_journal(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """Multicast goes on while the node is dead: the time without it is a gap, everything else is there once."""
    endpoints = free_endpoints()
    text = node_text(cluster, tmp_path / "data", multicast_source(endpoints, gap_wait_ms=20), delivery=f'target = "{nats_server.url}"')
    simulator = Simulator(SimulatorConfig(seed=5, symbols=len(SYMBOLS), rate=1000, messages=1_000_000, names=SYMBOLS))
    lines = SimulatedLines(simulator, LineConfig(heartbeat_ns=50_000_000))
    stop = threading.Event()
    sender = threading.Thread(target=send_lines, args=(lines, endpoints[:1]), kwargs={"stop": stop})
    try:
        with node_process(tmp_path, text) as process:
            until(lambda: process.poll() is not None or "ready" in log(tmp_path), "a node", 120)
            sender.start()
            until(lambda: outputs_seen(cluster) > 1000, "outputs")
            process.kill()
            process.wait()
        before = int(stream_end(nats_server.url, cluster))
        assert before > 0
        with node_process(tmp_path, text) as process:
            until(lambda: process.poll() is not None or outputs_seen(cluster) > before + 2000, "outputs of the second life", 120)
            assert process.poll() is None, log(tmp_path)
            stop.set()
            sender.join()
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0, log(tmp_path)
    finally:
        stop.set()
    expected = journal_outputs(parse_config(text))[0]
    outputs, missing = stream(nats_server.url, cluster, len(expected))
    assert not missing
    assert_whole(outputs, len(expected))
    assert same(outputs, expected)
    gaps = outputs[outputs["kind"] == Kind.GAP]
    assert len(gaps) == 1
    references = outputs[outputs["kind"] == Kind.REFERENCE]
    assert sorted(event.tobytes()[40:64].rstrip(b"\0").decode() for event in references) == sorted(SYMBOLS)
    assert len(np.unique(outputs["instrument"][outputs["kind"] == Kind.BBO])) == len(SYMBOLS)


def log(folder: Path) -> str:
    return (folder / "node.log").read_text()


def stream_end(url: str, cluster: str) -> int:  # noqa: F811
    outputs, _ = stream(url, cluster, 1)
    return int(outputs["seq"][-1])


# ---------------------------------------------------------------- NATS slow or away


SMALL = "ring_capacity = 1024\n"


def test_a_blocking_node_waits_for_nats_and_loses_nothing(own_nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """Stopped, resumed, killed and started again while the market goes on: the source waits, nothing is lost or doubled."""
    source = simulator_source(30_000, pace="1.0", rate=5000)
    config = node_config(cluster, tmp_path, source, cluster_extra=SMALL + 'output_overflow = "block"')
    with running(config, own_nats_server.url) as node:
        shard = node.shards[0]
        until(lambda: outputs_made(node) > 500, "outputs")
        suspend(own_nats_server.pid)
        until(lambda: shard.shard.arrays.core["blocked"][0] > 0, "a full ring")
        until(lambda: node.receivers[0].counters()["ring_full"] > 0, "a source that waits")
        node.mirror()
        reading = read_telemetry(telemetry_path(cluster, "n1"))
        assert reading["shards"][0]["blocked"] > 0
        assert reading["shards"][0]["output_lag"] > 0
        assert reading["deliveries"]["events"][0]["lag"] > 0
        resume(own_nats_server.pid)
        now = outputs_made(node)
        until(lambda: outputs_made(node) > now + 2000, "outputs again")
        own_nats_server.kill()
        own_nats_server.start()
        finish(node)
        assert_true(node, simulator_truth(30_000))
        made = outputs_made(node)
        outputs, missing = stream(own_nats_server.url, cluster, made)
    assert not missing
    assert_whole(outputs, made)
    assert same(outputs, journal_outputs(config)[0])


def test_a_dropping_node_goes_on_and_says_what_is_missing(own_nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    source = simulator_source(MESSAGES, pace="1.0", rate=5000)
    cluster_extra = SMALL + 'output_overflow = "drop_oldest"'
    config = node_config(cluster, tmp_path, source, cluster_extra=cluster_extra, delivery="batch_max_events = 64\nwindow = 4")
    with running(config, own_nats_server.url) as node:
        until(lambda: outputs_made(node) > 500, "outputs")
        suspend(own_nats_server.pid)
        now = outputs_made(node)
        until(lambda: outputs_made(node) > now + 8000, "outputs while NATS stands still")
        resume(own_nats_server.pid)
        finish(node)
        assert_true(node, simulator_truth())
        made = outputs_made(node)
        status = node.gateways["events"].status()[0]
        outputs, missing = stream(own_nats_server.url, cluster, made)
    lost = sum(batch.missing for batch in missing)
    assert lost > 0
    assert lost == status["overwritten"]
    assert len(outputs) + lost == made
    assert np.all(np.diff(outputs["seq"].astype(np.int64)) > 0)
    expected = journal_outputs(config)[0]
    assert same(outputs, expected[outputs["seq"].astype(np.int64) - 1])


# ---------------------------------------------------------------- failures


def test_two_nodes_of_one_name(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    config = node_config(cluster, tmp_path, simulator_source(3000))
    with running(config, nats_server.url) as node:
        with pytest.raises(NodeRunning):
            Node(config, GENERATORS, {"events": nats_server.url})
        finish(node)
        made = outputs_made(node)
        assert_whole(stream(nats_server.url, cluster, made)[0], made)


def test_no_source(cluster: str, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(NodeError, match="no data source"):
        Node(node_config(cluster, tmp_path, ""))


def test_no_nats_where_the_end_of_the_stream_must_be_known(cluster: str, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(NodeError, match=r"delivery\.events: NATS must be there"):
        Node(node_config(cluster, tmp_path, simulator_source(500)), GENERATORS, {"events": "nats://127.0.0.1:9"})


def test_a_folder_that_cannot_be_written(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalReadOnly, match="Not a directory"):
        Node(node_config(cluster, tmp_path / "file", simulator_source(500)), GENERATORS, {"events": nats_server.url})


def test_a_full_disk_ends_the_node_with_its_reason(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """What cannot be journalled is not processed: outputs are those of the journal, and the node says why it stops."""
    config = node_config(cluster, tmp_path, simulator_source(200_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    node = Node(config, GENERATORS, {"events": nats_server.url})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        node.start()
        with pytest.raises(NodeError, match=r"shard 0: its journal in .* cannot be written \(File too large\): free space"):
            node.watch(never_within(60))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        node.stop()
    expected = journal_outputs(config)[0]
    outputs, missing = stream(nats_server.url, cluster, len(expected))
    assert not missing
    assert same(outputs, expected)


def never_within(limit_s: float) -> threading.Event:
    """An event that is set after the limit only."""
    stop = threading.Event()
    timer = threading.Timer(limit_s, stop.set)
    timer.daemon = True
    timer.start()
    return stop


class _Broken:
    finished = False
    next_ns = 0

    def next_block(self, max_messages: int, until_ns: int) -> object:
        raise RuntimeError("the generator is out of order")


def test_a_source_that_fails_ends_the_node(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    config = node_config(cluster, tmp_path, simulator_source(500))
    node = Node(config, {"simulator": lambda *_: _Broken()}, {"events": nats_server.url})  # type: ignore[dict-item, return-value]
    try:
        node.start()
        with pytest.raises(NodeError, match=r"data_sources\.market: the generator is out of order"):
            node.watch(never_within(30))
    finally:
        node.stop()


def test_a_processor_that_is_not_there_is_a_warning(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    config = node_config(cluster, tmp_path, simulator_source(500), cluster_extra="cpus = [4000, 4001]")
    with running(config, nats_server.url) as node:
        finish(node)
        assert outputs_made(node) > 0
