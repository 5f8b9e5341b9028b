"""The failover scenario: what it draws and measures, and a short run of it on real clusters."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from nats_fixtures import nats_server
from programs import require

from tickmesh.chaos.arrivals import Arrivals, ShardArrivals, percentiles
from tickmesh.chaos.failover import deeds_of
from tickmesh.node.event import EVENT
from tickmesh.node.frames import FrameHeader, encode_frame, stream_name, stream_subject
from tickmesh.ops.namespaces import lacking
from tickmesh.ops.servers import NatsServer
from tickmesh.transports.nats import Login, connect
from tickmesh.transports.toolbox import zeros_aligned

__all__ = ["nats_server"]


def test_kills_and_pauses_take_turns() -> None:
    assert deeds_of(3, 1, 1, 1) == ["kill", "pause", "kill", "move", "sigterm", "change"]
    assert deeds_of(1, 1, 0, 0, 2, 1) == ["kill", "cut", "cut", "server", "move"]
    assert deeds_of(0, 0, 0, codes=2, changes=1) == ["change", "code", "code"]
    assert deeds_of(0, 0, 0) == []


def test_percentiles_are_of_values_that_were_measured() -> None:
    assert percentiles([]) == {"count": 0}
    assert percentiles([5.0, 1.0]) == {"count": 2, "p50": 5.0, "p99": 5.0, "max": 5.0}
    assert percentiles([float(n) for n in range(1, 201)])["p99"] == 199.0


def test_arrivals_are_kept_by_epoch() -> None:
    shard = ShardArrivals()
    for epoch, at_s in [(3, 1.0), (3, 1.5), (7, 2.0), (9, 4.0), (7, 2.5)]:
        shard.take(epoch, at_s)
    first = shard.after(3)
    assert first is not None
    assert (first.first_s, first.last_s, first.frames) == (2.0, 2.5, 2)
    assert shard.longest_s == 2.0
    assert shard.after(9) is None
    assert shard.epoch == 9
    assert shard.gaps_s == [0.5, 0.5]


def test_frames_are_seen_as_they_are_stored_and_fences_are_not(nats_server: NatsServer) -> None:
    async def run() -> None:
        link = await connect(nats_server.url, login=Login())
        try:
            jetstream = link.client.jetstream()
            await jetstream.add_stream(name=stream_name("arr", 0), subjects=[stream_subject("arr", 0)])
            arrivals = Arrivals(link, "arr", 1)
            await arrivals.start()

            async def store(epoch: int, first: int, fence: bool = False) -> None:
                frame = encode_frame(FrameHeader(0, epoch, 1, first, 1), zeros_aligned(1, EVENT).tobytes())
                headers = {"Epoch": str(epoch), **({"Kind": "fence"} if fence else {})}
                await jetstream.publish(stream_subject("arr", 0), b"" if fence else frame, headers=headers)

            await store(5, 1)
            assert await arrivals.first_after(0, 4, 5.0) is not None
            await store(8, 2, fence=True)
            assert await arrivals.first_after(0, 5, 0.2) is None
            before = time.monotonic()
            await store(8, 2)
            seen = await arrivals.first_after(0, 5, 5.0)
            assert seen is not None
            assert before <= seen.first_s <= time.monotonic()
            assert await arrivals.quiet(0.1, 5.0)
            await arrivals.close()
        finally:
            await link.close()

    asyncio.run(run())


@pytest.fixture(params=["nats", "consul"])
def store(request: pytest.FixtureRequest) -> str:
    if request.param == "consul":
        require("consul")
    return str(request.param)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(1200)
def test_leaders_that_are_killed_paused_moved_and_ended_lose_and_double_nothing(store: str, tmp_path: Path) -> None:
    deeds = ("--kills", "2", "--moves", "1", "--sigterms", "1", "--changes", "2", "--codes", "1")
    found = scenario(tmp_path, "--store", store, *deeds, "--rate", "500")
    assert found["done"] == {"kill": 1, "pause": 1, "move": 1, "sigterm": 1}
    changes = found["changes"]
    assert (changes["applied_ms"]["count"], changes["compiled_s"]["count"], changes["refused"]) == (2, 1, [])
    assert found["failover_ms"]["all"]["count"] >= 2


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(1200)
@pytest.mark.skipif(bool(lacking()), reason=lacking())
def test_hosts_that_are_cut_off_and_servers_that_die_lose_and_double_nothing(tmp_path: Path) -> None:
    found = scenario(tmp_path, "--kills", "0", "--cuts", "2", "--servers", "2", "--replicas", "3", "--rate", "300")
    assert found["done"] == {"cut": 2}
    assert found["cut_ms"]["count"] >= 2
    assert (found["server_outage_ms"]["count"], found["stuck"]) == (2, [])


def scenario(folder: Path, *options: str) -> dict[str, Any]:
    """A run of the scenario that came to its end without a fault, and left nothing."""
    command = [sys.executable, "-m", "tickmesh.chaos.failover", *options, "--shards", "2", "--seed", "3", "--keep", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1100, check=False)
    assert done.stdout, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == 0, json.dumps(found, indent=1)
    assert found["never"] == []
    assert not any(found["faults"].values())
    assert found["across_shards"]["faults"] == {}
    assert set(found["across_shards"]["signals"]) == {"pair", "all"}
    assert min(found["across_shards"]["signals"].values()) > 10
    assert found["outputs"] > 0
    assert not list(Path("/dev/shm").glob(f"tickmesh-{found['cluster']}*"))
    return found
