"""Nodes that share shards and each log in to a SoupBinTCP server, which breaks connections off: a takeover loses and doubles nothing."""

from __future__ import annotations

import asyncio
import re
import secrets
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from nodes import until
from test_roles import checked, goes_on, last_output, shards

from tickmesh.control.config import ConfigError, parse_config
from tickmesh.node.event import Kind
from tickmesh.node.subscription import subscribe
from tickmesh.ops.local_cluster import LocalCluster, LocalClusterOptions, _child, environment


class SoupCluster(LocalCluster):
    """A local cluster whose market comes over SoupBinTCP."""

    @property
    def port(self) -> int:
        """Where the market is served."""
        if not hasattr(self, "_port"):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._port: int = probe.getsockname()[1]
        return self._port

    def start_feed(self) -> None:
        o = self.options
        command = [
            *(sys.executable, "-m", "tickmesh.ops.cli", "simulate", "--json", "--soupbintcp", str(self.port), "--disconnects", "400"),
            *("--rate", str(o.rate), "--symbols", str(o.symbols), "--seed", str(o.seed)),
        ]
        self._feed = _child(command, o.folder / "feed.log", environment())
        self._stack.callback(self.stop_feed)

    def configuration(self) -> str:
        source = (
            f'[data_sources.market]\ntype = "tcp"\nendpoint = "tcp://127.0.0.1:{self.port}"\nframing = "soupbintcp"\n'
            'data_format = "itch50"\nreconnect_min_ms = 5\nreconnect_max_ms = 50\n\n'
        )
        return re.sub(r"\[data_sources\.market\]\n.*?\n\n", source, super().configuration(), flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_killed_leader_is_followed_by_one_that_goes_on_in_its_own_session(tmp_path: Path) -> None:
    few = {"shards": 2, "nodes": 2, "nats_servers": 1, "stream_replicas": 1, "rate": 300, "suspect_ms": 1000.0}
    with SoupCluster(LocalClusterOptions(tmp_path, f"sb{secrets.token_hex(3)}", "nats", **few)) as cluster:  # type: ignore[arg-type]
        asyncio.run(cluster.whole())
        for _ in range(2):
            before, seen = shards(cluster)[0], last_output(cluster, 0)
            cluster.nodes[before.leader].kill()
            until(lambda before=before: shards(cluster)[0].leader not in ("", before.leader), "another leads", 30)  # type: ignore[misc]
            goes_on(cluster, 0, seen[0])
            cluster.nodes[before.leader].start()
            asyncio.run(cluster.whole())
        reports, gaps = asyncio.run(checked(cluster)), asyncio.run(source_gaps(cluster))
    for report in reports:
        assert report.good, str(report)
        assert report.outputs > 100
    assert gaps == 0, "each node asked for what it had missed"


async def source_gaps(cluster: LocalCluster) -> int:
    """GAP events that the output streams have so far."""
    found = 0
    for shard in range(cluster.options.shards):
        end = (await asyncio.to_thread(last_output, cluster, shard))[0]
        url, name = cluster.nats.url, cluster.options.name
        async with asyncio.timeout(60), subscribe(url, cluster=name, shard=shard, from_sequence="all") as outputs:
            async for batch in outputs:
                found += int(np.count_nonzero(batch.events["kind"] == Kind.GAP))
                if batch.first + len(batch.events) > end:
                    break
    return found


SHARED = """
[store]
kind = "nats"
[leadership]
enabled = true
[delivery.events]
method = "nats"
[data_sources.feed]
data_format = "itch50"
"""


@pytest.mark.parametrize(
    "source",
    [
        'type = "tcp"\nendpoint = "tcp://10.0.0.1:1"\nframing = "soupbintcp"',
        'type = "nats"\nendpoint = "nats://10.0.0.1:1"\nstream = "ITCH"',
        'type = "multicast"\nendpoint = "udp://239.1.1.1:1"',
    ],
)
def test_sources_that_nodes_can_share(source: str) -> None:
    assert parse_config(SHARED + source).data_sources["feed"].continues


@pytest.mark.parametrize(
    "source",
    [
        'type = "tcp"\nendpoint = "tcp://10.0.0.1:1"',
        'type = "nats"\nendpoint = "nats://10.0.0.1:1"\nsubject = "x"',
        'type = "websocket"\nendpoint = "wss://x.example"',
        'type = "http"\nendpoint = "https://x.example"',
    ],
)
def test_sources_that_cannot_go_on_at_another_node(source: str) -> None:
    with pytest.raises(ConfigError, match="cannot go on at another node"):
        parse_config(SHARED + source)
