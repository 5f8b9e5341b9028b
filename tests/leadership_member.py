"""A process that takes part in the leadership of shards and, while it leads one, publishes numbered records to its stream. For tests.

Usage: ``python tests/leadership_member.py '{"nats": URL, "store": ["kv", URL] | ["consul", PORT], "cluster": …, "node": …, "shards": N}'``

The records of a shard are its numbers from 1 on, so any process can go on where the stream ends. What happens is printed as JSON lines.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

import structlog

from tickmesh.control.consul_store import ConsulOptions, ConsulStore
from tickmesh.control.heartbeats import Beat, Heartbeats, ShardBeat, client_name
from tickmesh.control.kv_store import KvStore
from tickmesh.control.leadership import Holder, Leadership, LeadershipOptions, TakeoverRefused
from tickmesh.control.store import Service, Store
from tickmesh.transports.nats import Fenced, LinkError, Login, NatsLink, OutputPublisher, OutputStream, connect

PAUSE_S = 0.001


def stream_of(cluster: str, shard: int) -> OutputStream:
    """A shard's stream."""
    return OutputStream(f"LEAD_{cluster}_{shard}", f"lead.{cluster}.{shard}", str(shard), bytes_max=16 << 20)


def say(**facts: Any) -> None:
    """Print a line for the test."""
    print(json.dumps({"at_s": time.monotonic(), **facts}), flush=True)


class Member:
    """The node's side of leadership."""

    def __init__(self, link: NatsLink, cluster: str, node: str) -> None:
        self.cluster, self.node, self.incarnation = cluster, node, f"{os.getpid()}"
        self.leadership: Leadership | None = None
        self._link = link
        self._hosted: frozenset[int] = frozenset()
        self._epochs: dict[int, int] = {}
        self._writing: dict[int, asyncio.Task[None]] = {}
        self._publishers: dict[int, OutputPublisher] = {}

    def beat(self) -> Beat:
        """What we say of ourselves."""
        shards = {n: ShardBeat("leader" if n in self._writing else "standby", self._epochs.get(n, 0), 0) for n in self._hosted}
        return Beat(self.node, self.incarnation, "", shards)

    async def host(self, shards: frozenset[int]) -> None:
        self._hosted = shards
        say(what="hosts", shards=sorted(shards))

    def kept(self) -> frozenset[int]:
        return frozenset()

    async def follow(self, shard: int, leader: Holder | None, epoch: int) -> None:
        self._epochs[shard] = epoch
        say(what="follows", shard=shard, leader=leader.node if leader else None, epoch=epoch)

    async def lead(self, shard: int, epoch: int) -> None:
        await self._end(shard)
        publisher = OutputPublisher(self._link, stream_of(self.cluster, shard), lambda *_: b"", epoch=epoch, record_bytes=8)
        try:
            await publisher.open()
        except LinkError as error:
            await publisher.close()
            raise TakeoverRefused(shard, str(error)) from error
        self._epochs[shard], self._publishers[shard] = epoch, publisher
        self._writing[shard] = asyncio.create_task(self._write(shard, publisher))
        say(what="leads", shard=shard, epoch=epoch)

    async def stop_leading(self, shard: int, reason: str) -> None:
        await self._end(shard)
        say(what="stops", shard=shard, reason=reason)

    async def hand_over(self, shard: int, to: str) -> bool:
        say(what="hands over", shard=shard, to=to)
        return shard in self._writing

    async def _end(self, shard: int) -> None:
        task = self._writing.pop(shard, None)
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        publisher = self._publishers.pop(shard, None)
        if publisher is not None:
            await publisher.close()

    async def _write(self, shard: int, publisher: OutputPublisher) -> None:
        try:
            while True:
                number = publisher.next_out_seq
                await publisher.publish(number, number.to_bytes(8, "little"))
                await asyncio.sleep(PAUSE_S)
        except Fenced:
            say(what="fenced", shard=shard)
            assert self.leadership is not None
            self.leadership.fenced(shard)


async def open_store(kind: str, where: Any, link: NatsLink, bucket: str) -> Store:
    """The store of the cluster."""
    if kind == "kv":
        return await KvStore.open(link.client, bucket, confirm_s=0.5, timeout_s=1.0)
    return ConsulStore(ConsulOptions(port=int(where), confirm_s=0.5, timeout_s=1.0))


async def main(options: Mapping[str, Any]) -> None:
    """Take part until SIGTERM."""
    cluster, node = options["cluster"], options["node"]
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    output = await connect(options["nats"], login=Login())
    kept = await connect(options["store"][1] if options["store"][0] == "kv" else options["nats"], login=Login())
    system = await connect(options["nats"], login=Login(user="sys", password="sys")) if options.get("system") else None
    member = Member(output, cluster, node)
    beats_link = await connect(options["nats"], name=client_name(cluster, node, member.incarnation), login=Login())
    store = await open_store(*options["store"], kept, options.get("bucket", "leadership"))
    root = options.get("root", f"{cluster}/")
    registration = await store.register(Service(cluster, node), ttl_s=2.0)

    async def members() -> Mapping[str, float]:
        return {service.instance: 1.0 for service in await store.services(cluster)}

    changes: list[Leadership] = []
    beats = Heartbeats(
        beats_link.client, cluster, node, member.incarnation, member.beat,
        system=system.client if system else None, changed=lambda: [one.changed() for one in changes] and None,
    )  # fmt: skip
    await beats.start()
    settings = LeadershipOptions(
        root,
        options["shards"],
        options.get("replicas", 2),
        grace_s=options.get("grace_s", 60.0),
        lease_ttl_s=options["ttl_s"],
        balance_after_s=options.get("balance_after_s", 0.0),
    )
    leadership = Leadership(store, beats, member, members, settings)
    member.leadership = leadership
    changes.append(leadership)
    await leadership.start()
    say(what="started", node=node)
    while not stopped.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await stopped.wait()
        statuses = {n: leadership.status(n) for n in leadership.hosted}
        say(what="status", shards={n: (s.state, s.epoch, s.reason) for n, s in statuses.items() if s})
    await leadership.close()
    await beats.close()
    await registration.close()
    await store.close()
    for link in (output, kept, beats_link, *([system] if system else [])):
        await link.close()
    say(what="ended")


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # the test reads the other one
    asyncio.run(main(json.loads(sys.argv[1])))
