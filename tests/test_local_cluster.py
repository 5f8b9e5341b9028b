"""A whole cluster on this host: it comes up, a killed node's shards go on elsewhere, it ends and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import until
from programs import require

from tickmesh.control.config import parse_config
from tickmesh.node.frames import stream_name
from tickmesh.ops.cluster_cmd import hints, line
from tickmesh.ops.local_cluster import LocalCluster, LocalClusterOptions, NodeEnded, NodeProcess, NotWhole, environment
from tickmesh.transports.nats import Login, connect
from tickmesh.transports.nats_reader import stream_bounds

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


@pytest.fixture(params=["nats", "consul"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalCluster]:
    if request.param == "consul":
        require("consul")
    name = f"lc{secrets.token_hex(3)}"
    options = LocalClusterOptions(tmp_path, name, request.param, shards=2, nats_servers=1, stream_replicas=1)
    with LocalCluster(options) as made:
        pids = [node.pid for node in made.nodes.values()]
        yield made
    assert not list(Path("/dev/shm").glob(f"tickmesh-{name}*"))
    assert not [pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists() and b"own.toml" in Path(f"/proc/{pid}/cmdline").read_bytes()]


async def stored(cluster: LocalCluster, shard: int) -> int:
    """Messages in a shard's output stream."""
    link = await connect(cluster.nats.url, login=Login())
    try:
        return (await stream_bounds(link, stream_name(cluster.options.name, shard)))[1]
    finally:
        await link.close()


def grows(cluster: LocalCluster, shard: int = 0) -> None:
    before = asyncio.run(stored(cluster, shard))
    until(lambda: asyncio.run(stored(cluster, shard)) > before + 5, f"shard {shard} goes on", 60)


@pytest.mark.timeout(900)
def test_a_killed_node_is_replaced_and_comes_back(cluster: LocalCluster) -> None:
    grows(cluster)
    shards = asyncio.run(cluster.shards())
    victim = cluster.nodes[shards[0].leader]
    victim.kill()
    assert (victim.running, victim.pid, victim.exit_code) == (False, 0, -signal.SIGKILL)
    until(lambda: asyncio.run(cluster.shards())[0].leader not in ("", victim.name), "another leads", 30)
    grows(cluster)
    victim.start()
    asyncio.run(cluster.whole(60))
    text = "\n".join(hints(cluster))
    assert f"--store {cluster.store_url} --cluster {cluster.options.name}" in text
    assert f"kill -9 {cluster.nodes['n1'].pid}" in text
    assert line(cluster, asyncio.run(cluster.shards())).startswith("3 nodes   0: n")


def test_its_configuration_is_valid(tmp_path: Path) -> None:
    made = LocalCluster(LocalClusterOptions(tmp_path, shards=3, replicas=2, nats_servers=3))
    config = parse_config(made.configuration())
    assert (config.cluster.shards, config.leadership.enabled) == (3, True)
    assert config.delivery["events"].target == made.nats.url


def test_nodes_get_no_login_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TICKMESH_NATS_TOKEN", "x")
    monkeypatch.setenv("TICKMESH_CACHE_DIR", "/somewhere")
    assert "TICKMESH_NATS_TOKEN" not in environment()
    assert environment()["TICKMESH_CACHE_DIR"] == "/somewhere"


def test_says_why_it_does_not_come_up(tmp_path: Path) -> None:
    """A node whose file is wrong ends; nothing is left running."""
    node = NodeProcess("n1", tmp_path, "[cluster]\nnam = 1\n", environment())
    node.start()
    until(lambda: not node.running, "it ends")
    assert node.exit_code == 2
    assert "nam" in str(NodeEnded("n1", 2, node.log))
    assert "shard 0" in str(NotWhole(1.0, "shard 0: no leader", "look"))


@pytest.mark.timeout(900)
def test_the_command_runs_until_ctrl_c(tmp_path: Path) -> None:
    log = tmp_path / "said"
    command = [sys.executable, "-m", "tickmesh.ops.cli", "cluster", "--nodes", "2", "--shards", "1", "--nats-servers", "1"]
    with log.open("w") as file:
        child = subprocess.Popen([*command, "--data-dir", str(tmp_path / "data")], stdout=file, stderr=file)
    try:
        until(lambda: child.poll() is not None or re.search(r"0: n\d \(led\)", log.read_text()), "it runs", 600)
        assert child.poll() is None, log.read_text()
        found = re.search(r"kill -9 (\d+)", log.read_text())
        assert found
        os.kill(int(found[1]), signal.SIGKILL)
        until(lambda: len(re.findall(r"\(led\)", log.read_text())) > 1, "it goes on", 60)
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 0, log.read_text()
    finally:
        child.kill()
        child.wait()
    assert not list(Path("/dev/shm").glob("tickmesh-mesh*"))
