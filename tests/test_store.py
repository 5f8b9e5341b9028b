"""The contract of the store, held by both backends on real servers."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack

import pytest
from store_servers import StoreServer, contract, own_server, root, server, until

from tickmesh.control.store import (
    VALUE_BYTES_MAX,
    BadKey,
    BadTtl,
    Delete,
    LeaseHeld,
    LeaseLost,
    Put,
    Service,
    Snapshot,
    Store,
    StoreUnavailable,
    TransactionRefused,
    Unchanged,
    ValueTooLarge,
    VersionMismatch,
)

__all__ = ["own_server", "root", "server"]


def values(snapshot: Snapshot) -> dict[str, bytes]:
    return {key.rpartition("/")[2]: entry.value for key, entry in snapshot.entries.items()}


# ---------------------------------------------------------------- keys


@contract
async def test_what_was_put_is_there_with_a_rising_version(server: StoreServer, root: str) -> None:
    async with server.store() as store:
        assert await store.get(root + "a") is None
        first = await store.put(root + "a", b"one")
        second = await store.put(root + "a", b"\x00\xff two")
        assert second > first > 0
        entry = await store.get(root + "a")
        assert entry is not None
        assert (entry.key, entry.value, entry.version, entry.epoch) == (root + "a", b"\x00\xff two", second, 0)


@contract
async def test_list_gives_what_lies_under_a_prefix(server: StoreServer, root: str) -> None:
    async with server.store() as store:
        for key in ("b/x", "b/y.z=1", "b/deep/er", "bx/no", "b"):
            await store.put(root + key, key.encode())
        found = await store.list(root + "b/")
        assert [(key, entry.value) for key, entry in found.items()] == [
            (root + "b/deep/er", b"b/deep/er"),
            (root + "b/x", b"b/x"),
            (root + "b/y.z=1", b"b/y.z=1"),
        ]
        assert found[root + "b/x"] == await store.get(root + "b/x")
        assert await store.list(root + "none/") == {}
        assert await store.keys(root + "b/") == sorted(found)
        assert await store.keys(root + "none/") == []


@contract
async def test_cas_takes_the_expected_version_only(server: StoreServer, root: str) -> None:
    key = root + "a"
    async with server.store() as store:
        first = await store.put(key, b"1", expected=0)
        with pytest.raises(VersionMismatch) as caught:
            await store.put(key, b"2", expected=0)
        assert (caught.value.key, caught.value.expected, caught.value.found) == (key, 0, first)
        second = await store.put(key, b"2", expected=first)
        with pytest.raises(VersionMismatch):
            await store.put(key, b"3", expected=first)
        with pytest.raises(VersionMismatch):
            await store.delete(key, expected=first)
        await store.delete(key, expected=second)
        assert await store.get(key) is None
        with pytest.raises(VersionMismatch):
            await store.put(key, b"3", expected=second)
        assert await store.put(key, b"3", expected=0) > second
        await store.delete(key)
        await store.delete(key)
        assert await store.list(root) == {}


@contract
async def test_of_two_writers_of_one_version_one_wins(server: StoreServer, root: str) -> None:
    async with server.store() as one, server.store() as other:
        version = await one.put(root + "n", b"0")
        for number in range(10):
            tries = [store.put(root + "n", f"{name} {number}".encode(), expected=version) for name, store in (("a", one), ("b", other))]
            results = await asyncio.gather(*tries, return_exceptions=True)
            won = [result for result in results if isinstance(result, int)]
            assert len(won) == 1
            assert sum(isinstance(result, VersionMismatch) for result in results) == 1
            version = won[0]


@contract
async def test_a_transaction_is_all_or_nothing(server: StoreServer, root: str) -> None:
    a, b, c = root + "a", root + "b", root + "c"
    async with server.store() as store:
        versions = await store.transaction([Put(a, b"1", 0), Put(b, b"1")])
        assert versions.keys() == {a, b}
        with pytest.raises(VersionMismatch) as caught:
            await store.transaction([Put(a, b"2"), Put(c, b"2", 0), Delete(b, versions[b] + 1000)])
        assert caught.value.key == b
        assert {key: entry.value for key, entry in (await store.list(root)).items()} == {a: b"1", b: b"1"}
        await store.transaction([Put(c, b"2", 0), Delete(b, versions[b]), Put(a, b"2", versions[a])])
        assert {key: entry.value for key, entry in (await store.list(root)).items()} == {a: b"2", c: b"2"}


@contract
async def test_a_transaction_while_a_prefix_is_unchanged(server: StoreServer, root: str) -> None:
    a, b, c, prefix = root + "in/a", root + "in/b", root + "in/c", root + "in/"

    async def versions() -> Unchanged:
        return Unchanged(prefix, {key: entry.version for key, entry in (await store.list(prefix)).items()})

    async with server.store() as store:
        nothing = Unchanged(prefix, {})
        await store.transaction([Put(a, b"1", 0), Put(b, b"1", 0)], unchanged=nothing)
        await store.transaction([Put(c, b"1", 0)], unchanged=await versions())
        before = await versions()
        await store.put(root + "beside", b"1")
        made = await store.transaction([Put(a, b"2", before.versions[a])], unchanged=before)
        assert made.keys() == {a}
        with pytest.raises(VersionMismatch) as caught:  # a is not as it was
            await store.transaction([Put(b, b"2"), Put(c, b"2")], unchanged=before)
        assert (caught.value.key, caught.value.expected, caught.value.found) == (a, before.versions[a], made[a])
        before = await versions()
        await store.delete(c)
        with pytest.raises(VersionMismatch) as caught:
            await store.transaction([Put(b, b"2")], unchanged=before)
        assert (caught.value.key, caught.value.found) == (c, 0)
        await store.transaction([Put(b, b"3"), Put(root + "beside", b"2")], unchanged=await versions())
        assert {key: entry.value for key, entry in (await store.list(root)).items()} == {a: b"2", b: b"3", root + "beside": b"2"}
        with pytest.raises(TransactionRefused):
            await store.transaction([Put(a, b"")], unchanged=Unchanged(prefix, {f"{prefix}{n}": 1 for n in range(64)}))


@contract
async def test_what_no_store_takes_is_refused_before_it_is_sent(server: StoreServer, root: str) -> None:
    async with server.store() as store:
        for bad in ("", "/a", "a/", "a//b", "a b", "a*", "ä", "a" * 300):
            with pytest.raises(BadKey):
                await store.put(bad, b"")
        for bad in ("a", "/", "a*/"):
            with pytest.raises(BadKey):
                store.watch(bad)
        with pytest.raises(ValueTooLarge) as caught:
            await store.transaction([Put(root + "a", bytes(VALUE_BYTES_MAX)), Put(root + "b", b"1")])
        assert (caught.value.key, caught.value.size) == (root + "b", VALUE_BYTES_MAX + 1)
        for wrong in ([], [Put(root + "a", b""), Delete(root + "a")], [Put(f"{root}{n}", b"") for n in range(65)]):
            with pytest.raises(TransactionRefused):
                await store.transaction(wrong)
        with pytest.raises(BadTtl):
            await store.acquire(root + "a", b"", 0.5)
        assert await store.list(root) == {}


@contract
async def test_the_largest_of_everything_is_taken(server: StoreServer, root: str) -> None:
    async with server.store() as store:
        await store.put(root + "large", bytes(VALUE_BYTES_MAX))
        entry = await store.get(root + "large")
        assert entry is not None
        assert entry.value == bytes(VALUE_BYTES_MAX)
        await store.transaction([Put(f"{root}{n}/{'k' * 90}", bytes(VALUE_BYTES_MAX // 64)) for n in range(64)])
        assert len(await store.list(root)) == 65


# ---------------------------------------------------------------- watches


@contract
async def test_a_watch_sees_every_kind_of_change(server: StoreServer, root: str) -> None:
    async with server.store() as store, store.watch(root) as watch:
        first = await until(watch, lambda s: True)
        assert (first.entries, first.version, first.stale) == ({}, 0, False)
        version = await store.put(root + "a", b"1")
        seen = await until(watch, lambda s: values(s) == {"a": b"1"})
        assert seen.version == version
        assert seen.entries[root + "a"].version == version
        await store.transaction([Put(root + "b", b"2"), Delete(root + "a")])
        await until(watch, lambda s: values(s) == {"b": b"2"})
        await store.delete(root + "b")
        await until(watch, lambda s: values(s) == {})
        assert watch.restarts == 0
        assert watch.last_error == ""


@contract
async def test_an_unchanged_watch_is_confirmed_again_and_again(server: StoreServer, root: str) -> None:
    async with server.store() as store, store.watch(root) as watch:
        assert watch.age_s == float("inf")
        await until(watch, lambda s: True)
        oldest, end = 0.0, asyncio.get_running_loop().time() + 4 * store.confirm_s
        while asyncio.get_running_loop().time() < end:
            oldest = max(oldest, watch.age_s)
            await asyncio.sleep(0.01)
        assert oldest < 3 * store.confirm_s
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(watch), store.confirm_s)


@contract
async def test_a_watch_never_sees_half_a_transaction(server: StoreServer, root: str) -> None:
    torn: list[dict[str, bytes]] = []
    seen = 0

    async def follow(store: Store) -> None:
        nonlocal seen
        async with store.watch(root) as watch:
            async for snapshot in watch:
                found = values(snapshot)
                seen += 1
                if len(set(found.values())) > 1 or len(found) not in (0, 8):
                    torn.append(found)
                if found.get("0") == b"200":
                    return

    async with server.store() as writer, server.store() as reader:
        followers = asyncio.gather(*(follow(reader) for _ in range(3)))
        for number in range(201):
            keys, before = [str(k) for k in range(8)], seen
            await writer.transaction([Put(root + key, str(number).encode()) for key in (keys if number % 2 else reversed(keys))])
            async with asyncio.timeout(10):  # a fast writer must not leave the watches only its last state
                while number % 20 == 0 and seen == before:
                    await asyncio.sleep(0.001)
        await followers
    assert not torn
    assert seen > 10


@contract
async def test_a_watch_ends_where_a_fresh_reading_does(server: StoreServer, root: str) -> None:
    """Puts, deletions, transactions over two prefixes, leases that come and go, drawn by a seed: watched from different moments on."""
    rng, keys = random.Random(11), [root + part for part in ("a/1", "a/2", "a/3", "b/1", "b/2")]
    async with server.store() as store, server.store() as other, AsyncExitStack() as stack:
        watches = []
        for number in range(60):
            if number % 20 == 0:
                watches += [await stack.enter_async_context(other.watch(prefix)) for prefix in (root, root + "a/", root + "b/")]
            if number % 15 == 7:
                lease = await store.acquire(root + "a/lease", b"me", store.ttl_least_s, keep=False)
                await lease.renew()
                await lease.release()
            chosen = rng.sample(keys, rng.randint(1, len(keys)))
            value = str(number).encode()
            await store.transaction([Put(key, value) if rng.random() < 0.7 else Delete(key) for key in chosen])
        for watch in watches:
            wanted = await store.list(watch.prefix)
            async with asyncio.timeout(10):
                while watch.snapshot is None or watch.snapshot.entries != wanted:
                    await asyncio.sleep(0.005)
            assert watch.restarts == 0


@contract
async def test_a_watch_ends_when_it_is_closed(server: StoreServer, root: str) -> None:
    async with server.store() as store:
        watch = store.watch(root)
        await until(watch, lambda s: True)
        waiting = asyncio.create_task(anext(watch))
        await asyncio.sleep(0)
        await watch.close()
        with pytest.raises(StopAsyncIteration):
            await waiting


@contract
async def test_a_watch_survives_a_restart_of_the_server(own_server: StoreServer, root: str) -> None:
    async with own_server.store() as store, store.watch(root) as watch:
        for number in range(20):
            await store.put(root + "a", str(number).encode())
        good = await until(watch, lambda s: values(s) == {"a": b"19"})
        own_server.process.kill()
        stale = await until(watch, lambda s: s.stale)
        assert stale.entries == good.entries
        assert stale.reason
        with pytest.raises(StoreUnavailable):
            await store.get(root + "a")
        own_server.process.start()
        if own_server.keeps_data:
            fresh = await until(watch, lambda s: not s.stale)
            assert fresh.entries == good.entries
        else:
            await _wait(lambda: "lost its data" in watch.last_error)
            assert watch.snapshot is not None
            assert watch.snapshot.entries == good.entries
            assert watch.snapshot.stale
        await _again(lambda: store.put(root + "a", b"after"))
        fresh = await until(watch, lambda s: values(s) == {"a": b"after"})
        assert not fresh.stale
        assert watch.restarts > 0


@contract
async def test_a_watch_survives_a_partition(own_server: StoreServer, root: str) -> None:
    async with own_server.store() as store, store.watch(root) as watch:
        await store.put(root + "a", b"1")
        good = await until(watch, lambda s: values(s) == {"a": b"1"})
        own_server.pause()
        stale = await until(watch, lambda s: s.stale)
        assert stale.entries == good.entries
        assert watch.age_s > store.confirm_s / 2
        with pytest.raises(StoreUnavailable) as caught:
            await store.put(root + "b", b"2", expected=0)
        own_server.resume()
        await until(watch, lambda s: not s.stale)
        if not caught.value.maybe_done:
            assert await store.get(root + "b") is None
        await _again(lambda: store.put(root + "a", b"2"))
        await until(watch, lambda s: values(s).get("a") == b"2" and not s.stale)


@contract
async def test_a_watch_may_start_before_the_server(own_server: StoreServer, root: str) -> None:
    async with own_server.store() as store:
        own_server.process.kill()
        async with store.watch(root) as watch:
            await _wait(lambda: watch.last_error != "")
            assert watch.snapshot is None
            own_server.process.start()
            await until(watch, lambda s: not s.stale)


# ---------------------------------------------------------------- leases


@contract
async def test_one_holder_at_a_time_with_a_rising_epoch(server: StoreServer, root: str) -> None:
    key, epochs = root + "lease", []
    async with server.store() as one, server.store() as other:
        for holder in (b"one", b"other", b"one"):
            store, rival = (one, other) if holder == b"one" else (other, one)
            lease = await store.acquire(key, holder, one.ttl_least_s)
            epochs.append(lease.epoch)
            assert lease.held
            with pytest.raises(LeaseHeld) as caught:
                await rival.acquire(key, b"rival", one.ttl_least_s)
            assert (caught.value.holder, caught.value.epoch) == (holder, lease.epoch)
            await lease.renew()
            entry = await rival.get(key)
            assert entry is not None
            assert (entry.value, entry.epoch) == (holder, lease.epoch)
            await lease.release()
            assert not lease.held
            assert await rival.get(key) is None
    assert epochs == sorted(set(epochs))


@contract
async def test_of_many_contenders_one_gets_the_lease(server: StoreServer, root: str) -> None:
    async with server.store() as one, server.store() as other:
        tries = [store.acquire(root + "lease", str(n).encode(), 10) for n, store in enumerate((one, other) * 5)]
        results = await asyncio.gather(*tries, return_exceptions=True)
        won = [result for result in results if not isinstance(result, BaseException)]
        assert len(won) == 1
        assert sum(isinstance(result, LeaseHeld) for result in results) == 9
        await won[0].release()


@pytest.mark.slow
@contract
async def test_a_lease_that_is_not_renewed_goes_to_the_next(server: StoreServer, root: str) -> None:
    key = root + "lease"
    async with server.store() as one, server.store() as other, other.watch(root) as watch:
        dead = await one.acquire(key, b"dead", one.ttl_least_s, keep=False)
        await until(watch, lambda s: key in s.entries)
        await until(watch, lambda s: key not in s.entries)
        assert not dead.held
        heir = await other.acquire(key, b"heir", one.ttl_least_s)
        assert heir.epoch > dead.epoch
        with pytest.raises(LeaseLost):
            await dead.renew()
        with pytest.raises(LeaseLost):
            await one.transaction([Put(root + "a", b"late")], lease=dead)
        await heir.release()


@contract
async def test_a_kept_lease_outlives_its_ttl(server: StoreServer, root: str) -> None:
    async with server.store() as store:
        lease = await store.acquire(root + "lease", b"me", store.ttl_least_s)
        if store.ttl_least_s <= 1:
            await asyncio.sleep(2.5 * lease.ttl_s)
        lease.check()
        await lease.release()
        assert (await lease.wait_lost()).reason == "it was released"


@contract
async def test_a_deposed_holder_learns_it_and_can_write_nothing(server: StoreServer, root: str) -> None:
    key = root + "lease"
    async with server.store() as one, server.store() as other:
        old = await one.acquire(key, b"old", one.ttl_least_s, keep=False)
        await one.transaction([Put(root + "a", b"1")], lease=old)
        assert not await other.depose(key, old.epoch + 1)
        assert await other.depose(key, old.epoch)
        new = await other.acquire(key, b"new", one.ttl_least_s)
        assert new.epoch > old.epoch
        assert old.held, "it has not heard of it yet, so the store must refuse it"
        with pytest.raises(LeaseLost):
            await one.transaction([Put(root + "a", b"2")], lease=old)
        with pytest.raises(LeaseLost):
            await old.renew()
        assert (await old.wait_lost()).epoch == old.epoch
        await other.transaction([Put(root + "a", b"3")], lease=new)
        entry = await one.get(root + "a")
        assert entry is not None
        assert entry.value == b"3"
        await new.release()


@contract
async def test_a_holder_that_cannot_reach_the_store_counts_itself_out(own_server: StoreServer, root: str) -> None:
    async with own_server.store() as store:
        lease = await store.acquire(root + "lease", b"me", store.ttl_least_s)
        began = asyncio.get_running_loop().time()
        own_server.pause()
        loss = await lease.wait_lost()
        assert asyncio.get_running_loop().time() - began <= lease.ttl_s + 0.5
        assert "in time" in loss.reason
        own_server.resume()


# ---------------------------------------------------------------- services


@contract
async def test_a_service_is_found_until_it_is_withdrawn_or_dies(server: StoreServer, root: str) -> None:
    name = root[:-1]
    async with server.store() as store, server.store() as other:
        a = await store.register(Service(name, "a", "127.0.0.1", 4000, {"shard": "1"}), 1.0)
        b = await store.register(Service(name, "b"), 1.0)
        found = await other.services(name)
        assert [(s.instance, s.port, dict(s.meta)) for s in found] == [("a", 4000, {"shard": "1"}), ("b", 0, {})]
        await asyncio.sleep(2.0)
        assert [s.instance for s in await other.services(name)] == ["a", "b"]
        await a.close()
        assert [s.instance for s in await other.services(name)] == ["b"]
        await b.stop()
        async with asyncio.timeout(10):
            while await other.services(name):
                await asyncio.sleep(0.05)
        with pytest.raises(BadKey):
            await store.register(Service("a/b", "c"), 1.0)


# ---------------------------------------------------------------- waiting


async def _wait(condition, limit_s: float = 30.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.01)


async def _again(attempt, limit_s: float = 30.0) -> None:
    async with asyncio.timeout(limit_s):
        while True:
            try:
                await attempt()
                return
            except StoreUnavailable:
                await asyncio.sleep(0.05)
