"""What is the bucket's own: made anew, read by other clients, many keys, a cluster that loses its leader."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import nats
import pytest
from nats_fixtures import ConfiguredServer, cluster, nats_cluster, nats_server
from store_servers import contract, until

from tickmesh.control.kv_store import KvStore, _KvFeed, _Message
from tickmesh.control.store import Put, StoreUnavailable, TooManyKeys, Unchanged
from tickmesh.ops.servers import NatsServer
from tickmesh.transports.nats import Login, connect

__all__ = ["cluster", "nats_cluster", "nats_server"]


def part(seq: int, key: str, number: int = 1, count: int = 1) -> _Message:
    return _Message(seq, f"$KV.b.{key}", str(seq).encode(), {"Tm-Batch": f"{number}/{count}"} if count > 1 else {})


@pytest.mark.parametrize(
    ("pushed", "whole"),
    [
        ([], 0),
        ([part(101, "a"), part(102, "b")], 2),
        ([part(99, "a"), part(101, "a", 1, 3), part(102, "b", 2, 3), part(103, "c", 3, 3), part(104, "d")], 4),
        ([part(101, "a"), part(102, "a", 1, 2)], 1),
        ([part(101, "a", 1, 3), part(102, "b", 2, 3)], 0),
        ([part(101, "a", 1, 3), part(103, "c", 3, 3), part(110, "b")], None),  # b was written again before its part was brought
        ([part(101, "a", 1, 3), part(104, "a", 1, 3), part(105, "b", 2, 3), part(106, "c", 3, 3)], None),
        ([part(102, "b", 2, 3), part(103, "c", 3, 3)], None),  # the first part has another prefix
        ([part(101, "a"), part(103, "b", 2, 2)], None),
    ],
)
def test_only_whole_batches_are_taken_from_what_is_brought(pushed: list[_Message], whole: int | None) -> None:
    feed = _KvFeed.__new__(_KvFeed)
    feed._pushed, feed._last_seq = deque(pushed), 100
    assert feed._whole() == whole


@contract
async def test_a_watch_takes_a_change_under_a_condition_as_it_is_pushed(nats_server: NatsServer, cluster: str) -> None:
    """It waits for no part of it that has another prefix, and does not read everything again each time."""
    link = await connect(nats_server.url, login=Login())
    store = await KvStore.open(link.client, cluster, confirm_s=30)
    try:
        made = await store.transaction([Put("c/a", b"1"), Put("c/b", b"1")])
        reads, read_to = [], store._read_to

        async def counted(prefix: str) -> Any:
            reads.append(prefix)
            return await read_to(prefix)

        store._read_to = counted  # type: ignore[method-assign]
        async with store.watch("c/") as watch:
            await until(watch, lambda s: len(s.entries) == 2)
            for number in range(5):
                puts = [Put("c/a", str(number).encode(), made["c/a"]), Put("c/b", str(number).encode(), made["c/b"])]
                made = await store.transaction(puts, unchanged=Unchanged("c/", made))
                await until(watch, lambda s, number=number: {e.value for e in s.entries.values()} == {str(number).encode()})
        assert len(reads) < 4  # the first one, and one or two where a busy host brought half a change late
    finally:
        await link.close()


@contract
async def test_a_bucket_made_anew_does_not_take_the_last_good_keys_away(nats_server: NatsServer, cluster: str) -> None:
    link = await connect(nats_server.url, login=Login())
    store = await KvStore.open(link.client, cluster, confirm_s=0.2)
    try:
        async with store.watch("c/") as watch:
            await store.put("c/a", b"1")
            good = await until(watch, lambda s: len(s.entries) == 1)
            await link.client.jetstream().delete_stream(f"KV_{cluster}")
            stale = await until(watch, lambda s: s.stale)
            assert stale.entries == good.entries
            with pytest.raises(StoreUnavailable):
                await store.get("c/a")
            again = await KvStore.open(link.client, cluster)
            for number in range(5):
                await again.put("other", str(number).encode())
            async with asyncio.timeout(20):
                while "lost its data" not in watch.last_error:
                    await asyncio.sleep(0.01)
            assert watch.snapshot is not None
            assert watch.snapshot.entries == good.entries
            await again.put("c/a", b"2")
            await until(watch, lambda s: not s.stale and s.entries["c/a"].value == b"2")
    finally:
        await store.close()
        await link.close()


@contract
async def test_a_client_that_writes_late_is_not_taken(nats_server: NatsServer, cluster: str) -> None:
    client = await nats.connect(nats_server.url)
    try:
        with pytest.raises(ValueError, match="pending_size"):
            await KvStore.open(client, cluster)
    finally:
        await client.close()


@contract
async def test_other_clients_read_the_bucket(nats_server: NatsServer, cluster: str) -> None:
    link = await connect(nats_server.url, login=Login())
    store = await KvStore.open(link.client, cluster)
    try:
        version = await store.put("config/a.b", b"1")
        entry = await (await link.client.jetstream().key_value(cluster)).get("config.a=2Eb")
        assert (entry.value, entry.revision) == (b"1", version)
    finally:
        await store.close()
        await link.close()


@contract
async def test_a_thousand_keys_are_read_and_more_are_refused(nats_server: NatsServer, cluster: str) -> None:
    link = await connect(nats_server.url, login=Login())
    store = await KvStore.open(link.client, cluster)
    try:
        for first in range(0, 1000, 50):
            await store.transaction([Put(f"many/{number}", b"x") for number in range(first, first + 50)])
        assert len(await store.list("many/")) == 1000
        await store.transaction([Put(f"many/{number}", b"x") for number in range(1000, 1050)])
        with pytest.raises(TooManyKeys):
            await store.list("many/")
    finally:
        await store.close()
        await link.close()


@pytest.mark.slow
@contract
async def test_a_watch_and_a_lease_outlive_the_streams_leader(nats_cluster: list[ConfiguredServer]) -> None:
    link = await connect(",".join(one.url for one in nats_cluster), login=Login())
    store = await KvStore.open(link.client, "r3", replicas=3, confirm_s=0.5)
    try:
        async with store.watch("c/") as watch:
            await store.put("c/a", b"1")
            await until(watch, lambda s: len(s.entries) == 1)
            lease = await store.acquire("lease", b"me", 30)
            leader = (await link.client.jetstream().stream_info("KV_r3")).cluster.leader
            next(one for one in nats_cluster if one.name == leader).kill()
            async with asyncio.timeout(40):
                while True:
                    try:
                        await store.transaction([Put("c/a", b"2"), Put("c/b", b"2")], lease=lease)
                        break
                    except StoreUnavailable:
                        await asyncio.sleep(0.1)
            seen = await until(watch, lambda s: not s.stale and len(s.entries) == 2)
            assert {entry.value for entry in seen.entries.values()} == {b"2"}
            await lease.renew()
            await lease.release()
    finally:
        await store.close()
        await link.close()
