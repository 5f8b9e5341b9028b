"""Output streams of three replicas on a cluster of three servers: whichever dies, every output is in its stream exactly once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
from nats_fixtures import ConfiguredServer, nats_cluster  # noqa: F401
from nodes import assert_whole, cluster, journal_outputs, node_config, running, simulator_source, stream  # noqa: F401
from test_nats_link import linked, publishing, records, stored, until

from tickmesh.node.event import EventArray
from tickmesh.node.frames import stream_name
from tickmesh.node.process import Node
from tickmesh.node.subscription import Batch, subscribe
from tickmesh.transports.nats import NatsLink, OutputStream, connect

TO = OutputStream("S_R3", "s.r3", "0", bytes_max=64 << 20, replicas=3)


def all_of(servers: list[ConfiguredServer]) -> str:
    return ",".join(server.url for server in servers)


async def leader(link: NatsLink, servers: list[ConfiguredServer], name: str) -> ConfiguredServer:
    """The server that leads a stream now; waits while there is none."""
    async with asyncio.timeout(30):
        while True:
            try:
                info = await link.client.jetstream(timeout=2).stream_info(name)
            except Exception:  # an election is under way
                await asyncio.sleep(0.05)
                continue
            found = [server for server in servers if info.cluster and server.name == info.cluster.leader and server.running]
            if found:
                return found[0]
            await asyncio.sleep(0.05)


async def whole_again(link: NatsLink, name: str) -> None:
    """Wait until all replicas of a stream are up to date."""
    async with asyncio.timeout(30):
        while True:
            try:
                info = (await link.client.jetstream(timeout=2).stream_info(name)).cluster
                if info and info.leader and len(info.replicas or []) == 2 and all(r.current and not r.offline for r in info.replicas):
                    return
            except Exception:  # an election is under way
                pass
            await asyncio.sleep(0.05)


def test_each_leader_dies_while_a_publisher_sends(nats_cluster: list[ConfiguredServer]) -> None:  # noqa: F811
    async def run() -> None:
        link = await connect(all_of(nats_cluster))
        try:
            async with publishing(link, TO, window=64, ack_timeout_s=1.0) as publisher:
                sent = 0
                for _ in range(2):
                    while sent < publisher.last_out_seq + 600:
                        sent += await publisher.publish(sent + 1, records(sent + 1, 10))
                    dead = await leader(link, nats_cluster, TO.name)
                    dead.kill()
                    for _ in range(100):
                        sent += await publisher.publish(sent + 1, records(sent + 1, 10))
                    assert await publisher.drain(30)
                    dead.start()
                    await whole_again(link, TO.name)
                found, gaps = await stored(link, TO)
                assert found == list(range(1, sent + 1))
                assert gaps == []
                assert publisher.counters.lost_by_server == 0
                assert publisher.counters.recoveries >= 1
        finally:
            await link.close()

    asyncio.run(run())


def test_without_a_majority_it_waits(nats_cluster: list[ConfiguredServer]) -> None:  # noqa: F811
    """Two of three servers are gone: nothing is stored and nothing lost; it goes on as soon as one of them is back."""

    async def run() -> None:
        async with linked(nats_cluster[0]) as link, publishing(link, TO, window=8, ack_timeout_s=0.5) as publisher:
            await publisher.publish(1, records(1, 10))
            assert await publisher.drain(10)
            for server in nats_cluster[1:]:
                server.kill()

            async def publish_more() -> None:
                for first in range(11, 201, 10):
                    await publisher.publish(first, records(first, 10))

            more = asyncio.create_task(publish_more())
            await until(lambda: publisher.counters.recoveries >= 1)
            assert publisher.last_out_seq == 10
            assert not more.done()
            nats_cluster[1].start()
            await asyncio.wait_for(more, 100)  # on a busy host the two servers are a while at electing their leaders
            assert await publisher.drain(40)
            nats_cluster[2].start()
            await whole_again(link, TO.name)
            assert await stored(link, TO) == (list(range(1, 201)), [])

    asyncio.run(run())


async def follow(url: str, name: str, found: list[Batch]) -> None:
    async with subscribe(url, cluster=name, shard=0, from_sequence="all") as outputs:
        await outputs.run(found.append)


async def more(found: list[Batch], following: asyncio.Task[None]) -> None:
    """Wait until a good deal more has come."""
    seen = len(found)
    await until(lambda: following.done() or len(found) > seen + 20, 40)
    assert not following.done(), following.exception()


def events_of(batches: list[Batch]) -> EventArray:
    return np.concatenate([batch.events for batch in batches])


def test_a_node_loses_and_doubles_nothing(nats_cluster: list[ConfiguredServer], cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """The leader of its stream is killed twice under way; who subscribes sees each output once, and so does who comes later."""
    url, name = all_of(nats_cluster), stream_name(cluster, 0)
    config = node_config(cluster, tmp_path / "data", simulator_source(0, pace='"realtime"', rate=2000), delivery="replicas = 3")

    async def follow_and_kill(node: Node) -> list[Batch]:
        found: list[Batch] = []
        link = await connect(url)
        await leader(link, nats_cluster, name)
        following = asyncio.create_task(follow(url, cluster, found))
        try:
            for _ in range(2):
                await more(found, following)
                dead = await leader(link, nats_cluster, name)
                dead.kill()
                await more(found, following)
                dead.start()
                await whole_again(link, name)
            await asyncio.to_thread(node.stop)
            made = len(journal_outputs(config)[0])
            await until(lambda: following.done() or found[-1].first + len(found[-1].events) > made)
            assert not following.done(), following.exception()
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await link.close()
        return found

    with running(config, url) as node:
        live = asyncio.run(follow_and_kill(node))
        status = node.gateways["events"].status()[0]
    expected = journal_outputs(config)[0]
    later, missing = stream(url, cluster, len(expected))
    assert missing == [batch for batch in live if batch.missing] == []
    assert_whole(later, len(expected))
    assert events_of(live).tobytes() == later.tobytes() == expected.tobytes()
    assert status["recoveries"] >= 1
    assert status["lost_by_server"] == status["missing"] == 0
