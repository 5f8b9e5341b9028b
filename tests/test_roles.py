"""Nodes that share shards: what each test does to the cluster, the checker has to find nothing of it in the output streams."""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from nodes import until

from tickmesh.chaos.checker import Report, check_stream
from tickmesh.node.event import Kind
from tickmesh.node.subscription import subscribe
from tickmesh.ops.local_cluster import LocalCluster, LocalClusterOptions
from tickmesh.ops.shards_cmd import Shard
from tickmesh.transports.nats import Login, connect

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]
SHARDS = 2


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Three nodes and two shards of two replicas; in the end every output stream is what the journal of its last leader gives."""
    folder = tmp_path_factory.mktemp("roles")
    few = {"shards": SHARDS, "nats_servers": 1, "stream_replicas": 1, "rate": 300, "suspect_ms": 1000.0}
    options = LocalClusterOptions(folder, f"rl{secrets.token_hex(3)}", "nats", **few)  # type: ignore[arg-type]
    with LocalCluster(options) as made:
        yield made
        reports = asyncio.run(checked(made))
    for report in reports:
        assert report.good, str(report)
        assert report.outputs > 100


async def checked(cluster: LocalCluster) -> list[Report]:
    """What the checker says of every shard, by the journal of its leader, while the market goes on."""
    link = await connect(cluster.nats.url, login=Login())
    try:
        found = []
        for shard in await cluster.whole(60):
            journal = cluster.nodes[shard.leader].data_dir / "journal" / shard.leader / f"shard-{shard.shard}"
            found.append(await check_stream(link, cluster.options.name, shard.shard, journal, ended=False))
        return found
    finally:
        await link.close()


def shards(cluster: LocalCluster) -> list[Shard]:
    return asyncio.run(cluster.shards())


def last_output(cluster: LocalCluster, shard: int) -> tuple[int, int, int]:
    """Sequence, epoch and configuration of a shard's newest output."""

    async def read() -> tuple[int, int, int]:
        async with asyncio.timeout(30), subscribe(cluster.nats.url, cluster=cluster.options.name, shard=shard) as outputs:
            async for batch in outputs:
                return batch.first + len(batch.events) - 1, batch.epoch, batch.config_version
        raise AssertionError

    return asyncio.run(read())


def command(cluster: LocalCluster, *arguments: str, code: int = 0) -> Any:
    """An operator's command, as JSON."""
    more = ["--store", cluster.store_url, "--cluster", cluster.options.name, "--json"]
    done = subprocess.run([sys.executable, "-m", "tickmesh.ops.cli", *arguments, *more], capture_output=True, text=True, timeout=240)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return json.loads(done.stdout)


def goes_on(cluster: LocalCluster, shard: int, after: int) -> None:
    until(lambda: last_output(cluster, shard)[0] > after, f"shard {shard} goes on after output {after}", 60)


def test_a_killed_leader_is_followed_by_a_standby_that_goes_on_where_it_ended(cluster: LocalCluster) -> None:
    before, seen = shards(cluster)[0], last_output(cluster, 0)
    cluster.nodes[before.leader].kill()
    until(lambda: shards(cluster)[0].leader not in ("", before.leader), "another leads", 30)
    goes_on(cluster, 0, seen[0])
    assert last_output(cluster, 0)[1] > seen[1], "a later epoch"
    cluster.nodes[before.leader].start()
    asyncio.run(cluster.whole())


def test_a_leader_that_hangs_is_replaced_and_writes_nothing_when_it_wakes(cluster: LocalCluster) -> None:
    before, seen = shards(cluster)[1], last_output(cluster, 1)
    hanging = cluster.nodes[before.leader]
    hanging.pause()
    until(lambda: shards(cluster)[1].leader not in ("", before.leader), "another leads", 30)
    goes_on(cluster, 1, seen[0])
    hanging.resume()
    whole = asyncio.run(cluster.whole())
    assert whole[1].leader != before.leader
    assert last_output(cluster, 1)[1] > seen[1]


def test_a_move_is_made_and_nothing_is_missing(cluster: LocalCluster) -> None:
    [before, _] = asyncio.run(cluster.whole())
    to = next(one.node for one in before.standbys if one.ready)
    seen = last_output(cluster, 0)
    command(cluster, "shards", "move", "0", "--to", to)
    assert shards(cluster)[0].leader == to
    goes_on(cluster, 0, seen[0])


def test_a_change_of_the_configuration_is_in_force_on_every_shard_and_survives_its_leader(cluster: LocalCluster) -> None:
    asyncio.run(cluster.whole())
    said = command(cluster, "config", "set", "processing.calculations.fast.window", "7")
    version = said["version"]
    until(lambda: all(last_output(cluster, shard)[2] >= version for shard in range(SHARDS)), "the version in the outputs", 60)
    leader = shards(cluster)[0].leader
    seen = last_output(cluster, 0)
    cluster.nodes[leader].kill()
    until(lambda: shards(cluster)[0].leader not in ("", leader), "another leads", 30)
    goes_on(cluster, 0, seen[0])
    assert last_output(cluster, 0)[2] == version, "the journal has it: it is not changed again"
    cluster.nodes[leader].start()
    asyncio.run(cluster.whole())


def test_a_node_without_data_joins_in_the_middle_of_the_session_and_leads(cluster: LocalCluster) -> None:
    """It gets the journals from the leaders, and the venue's codes from the other nodes."""
    before = asyncio.run(cluster.whole())[0]
    standby = before.standbys[0].node
    fresh = cluster.nodes[standby]
    fresh.kill()
    shutil.rmtree(fresh.data_dir)
    fresh.start()
    asyncio.run(cluster.whole(120))
    seen = last_output(cluster, 0)
    command(cluster, "shards", "move", "0", "--to", standby)
    goes_on(cluster, 0, seen[0])
    names = asyncio.run(symbols(cluster))
    assert len(names - {"pair", "all"}) == cluster.options.symbols, "and what is over several of them"
    assert {"pair", "all"} <= names
    assert not [name for name in names if name.startswith("#")]


async def symbols(cluster: LocalCluster) -> set[str]:
    """Of every instrument that an output stream has named so far."""
    found: set[str] = set()
    for shard in range(SHARDS):
        end = (await asyncio.to_thread(last_output, cluster, shard))[0]
        url, name = cluster.nats.url, cluster.options.name
        async with asyncio.timeout(60), subscribe(url, cluster=name, shard=shard, from_sequence="all") as outputs:
            async for batch in outputs:
                named = batch.events[batch.events["kind"] == Kind.REFERENCE]
                found.update(event.tobytes()[40:64].rstrip(b"\0").decode() for event in named)
                if batch.first + len(batch.events) > end:
                    break
    return found


def test_all_nodes_killed_at_once_go_on_where_they_were(cluster: LocalCluster) -> None:
    asyncio.run(cluster.whole())
    seen = [last_output(cluster, shard) for shard in range(SHARDS)]
    for node in cluster.nodes.values():
        node.kill()
    for node in cluster.nodes.values():
        node.start()
    asyncio.run(cluster.whole(120))
    for shard in range(SHARDS):
        goes_on(cluster, shard, seen[shard][0])
        assert last_output(cluster, shard)[1] > seen[shard][1]


def test_nodes_say_in_the_store_what_they_are_for_each_shard(cluster: LocalCluster) -> None:
    asyncio.run(cluster.whole())

    def said() -> bool:
        nodes = command(cluster, "config", "status")
        rows = nodes["nodes"] if isinstance(nodes, dict) else nodes
        roles = [one["role"] for row in (rows.values() if isinstance(rows, dict) else rows) for one in row.get("shards", {}).values()]
        return sorted(roles) == ["leader"] * SHARDS + ["standby"] * SHARDS

    until(said, "a leader and a standby of each shard", 30)


