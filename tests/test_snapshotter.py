"""Snapshots of running nodes: what is written down is what the running shard is, and a restart goes on from there."""

from __future__ import annotations

import asyncio
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from nats_fixtures import nats_server  # noqa: F401
from nodes import SYMBOLS, cluster, free_endpoints, multicast_source, node_text, running, simulator_source, until  # noqa: F401
from test_process import log, node_process, outputs_seen

from tickmesh.chaos.checker import check_stream
from tickmesh.control.config import parse_config
from tickmesh.node.beginning import shard_at
from tickmesh.node.event import EVENT
from tickmesh.node.journal import JournalReader
from tickmesh.node.snapshot import named_arrays, read_facts, snapshots
from tickmesh.node.snapshotter import snapshot_folder, starts, take_snapshot
from tickmesh.ops.servers import NatsServer
from tickmesh.ops.simulated_lines import LineConfig, SimulatedLines, send_lines
from tickmesh.ops.simulator import Simulator, SimulatorConfig
from tickmesh.transports.nats import Login, connect
from tickmesh.transports.ring import Ring

pytestmark = pytest.mark.slow


def test_a_snapshot_is_what_the_running_shard_is(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """Taken half way and at the end; the second one goes on from the first."""
    config = parse_config(node_text(cluster, tmp_path, simulator_source(30_000, pace='"realtime"', rate=10_000)))
    with running(config, nats_server.url) as node:
        journal = node.journals[0]
        until(lambda: journal.next_sequence > 10_000, "events", 60)
        half = take_snapshot(journal.folder)
        assert half is not None
        until(lambda: node.finished, "the end of the simulation", 60)
        end = take_snapshot(journal.folder)
        assert end is not None
        assert half.sequence < end.sequence == journal.next_sequence
        live = node.shards[0].shard.arrays
        assert end.outputs == int(live.core["out_seq"][0])
        begun = starts(journal.folder)[-1]
        assert begun.path is not None
        assert begun.sequence == end.sequence
        assert len(begun.known.references) == len(SYMBOLS)
        restored = shard_at(config, begun, Ring.create(None, 1024, EVENT), None)
        kept = dict(named_arrays(restored.arrays))
        for name, array in named_arrays(live):
            if name == "core":
                names = [field for field in array.dtype.names if field != "blocked"]
                assert array[names].tolist() == kept[name][names].tolist()
            elif isinstance(array, np.ndarray):
                assert np.array_equal(array.view(np.uint8), kept[name].view(np.uint8)), name
        assert take_snapshot(journal.folder) is None  # nothing has come since


def test_a_killed_node_goes_on_from_its_snapshot_with_a_trimmed_journal(
    nats_server: NatsServer, cluster: str, tmp_path: Path  # noqa: F811
) -> None:
    endpoints = free_endpoints()
    text = node_text(cluster, tmp_path / "data", multicast_source(endpoints, gap_wait_ms=20), delivery=f'target = "{nats_server.url}"')
    text = text.replace("[journal]", "[journal]\nkeep_mb = 1\nsnapshot_interval_s = 2.0")
    simulator = Simulator(SimulatorConfig(seed=5, symbols=len(SYMBOLS), rate=8000, messages=10_000_000, names=SYMBOLS))
    lines = SimulatedLines(simulator, LineConfig(heartbeat_ns=50_000_000))
    stop = threading.Event()
    sender = threading.Thread(target=send_lines, args=(lines, endpoints[:1]), kwargs={"stop": stop})
    folder = tmp_path / "data" / "journal" / "n1" / "shard-0"
    try:
        with node_process(tmp_path, text) as process:
            until(lambda: process.poll() is not None or "ready" in log(tmp_path), "a node", 120)
            sender.start()
            until(lambda: process.poll() is not None or JournalReader(folder).first_sequence > 0, "a trimmed journal", 120)
            assert process.poll() is None, log(tmp_path)
            process.kill()
            process.wait()
        kept = snapshots(snapshot_folder(folder))
        assert 2 <= len(kept) <= 5
        assert read_facts(kept[0]).sequence >= JournalReader(folder).first_sequence
        before = outputs_seen(cluster)
        with node_process(tmp_path, text) as process:
            until(lambda: process.poll() is not None or "after the snapshot at" in log(tmp_path), "a restart from a snapshot", 120)
            until(lambda: process.poll() is not None or outputs_seen(cluster) > before + 2000, "outputs of the second life", 120)
            assert process.poll() is None, log(tmp_path)
            stop.set()
            sender.join()
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0, log(tmp_path)
    finally:
        stop.set()
    report = asyncio.run(_checked(nats_server.url, cluster))
    assert report.good, report
    assert report.outputs == report.last > before


async def _checked(url: str, cluster: str):  # type: ignore[no-untyped-def]  # noqa: F811
    link = await connect(url, login=Login())
    try:
        return await check_stream(link, cluster, 0, expected=1)
    finally:
        await link.close()
