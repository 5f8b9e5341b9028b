"""What is Consul's own: tokens, TLS, a cluster that loses its leader."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from nats_logins import make_authority, make_certificate
from programs import require
from store_servers import contract, until

from tickmesh.control.consul_store import ConsulOptions, ConsulStore
from tickmesh.control.store import Put, Service, StoreRefused, StoreUnavailable
from tickmesh.ops.servers import ConsulServer, ConsulServerOptions, free_ports


def started(server: ConsulServer, stack: ExitStack) -> ConsulServer:
    """The server, running."""
    require("consul")
    return stack.enter_context(server)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Ends servers after the test."""
    with ExitStack() as held:
        yield held


@contract
async def test_the_token_goes_with_every_request(stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    master = "6a1253d2-1785-24fd-91c2-f8e78c745511"
    acl = {"enabled": True, "default_policy": "deny", "tokens": {"master": master, "agent": master}}
    server = started(ConsulServer(ConsulServerOptions(tmp_path, settings={"acl": acl})), stack)
    await asyncio.to_thread(_bootstrapped, server, master)
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "00000000-0000-0000-0000-00000000dead")
    store = ConsulStore(ConsulOptions(port=server.port, token=master, confirm_s=0.5))
    try:
        lease = await store.acquire("lease", b"me", 10)
        await store.transaction([Put("c/a", b"1")], lease=lease)
        async with store.watch("c/") as watch:
            await until(watch, lambda s: "c/a" in s.entries)
        registration = await store.register(Service("node", "a"), 5)
        assert [one.instance for one in await store.services("node")] == ["a"]
        await registration.close()
        await lease.release()
        assert master not in repr(store.options)
    finally:
        await store.close()
    stranger = ConsulStore(ConsulOptions(port=server.port))
    try:
        with pytest.raises(StoreRefused, match="denied"):
            await stranger.put("c/a", b"2")
        with pytest.raises(StoreRefused):
            await stranger.acquire("other", b"", 10)
    finally:
        await stranger.close()


def _bootstrapped(server: ConsulServer, token: str) -> None:
    """Wait until the server knows the token, and itself."""
    request = urllib.request.Request(f"{server.url}/v1/catalog/nodes", headers={"X-Consul-Token": token})
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(request, timeout=2) as answer:
                if json.load(answer):
                    return
        except urllib.error.HTTPError:
            pass
    raise AssertionError("the token does not work")


@contract
async def test_tls_with_our_own_certificate(stack: ExitStack, tmp_path: Path) -> None:
    make_authority(tmp_path, "ca")
    make_authority(tmp_path, "stranger")
    for name in ("server", "client"):
        make_certificate(tmp_path, "ca", name)
    (https,) = free_ports("127.0.0.1", 1)
    files = {"ca_file": "ca.pem", "cert_file": "server.pem", "key_file": "server.key"}
    settings = {name: str(tmp_path / file) for name, file in files.items()} | {"verify_incoming_https": True}
    server = ConsulServer(ConsulServerOptions(tmp_path / "consul"))
    server._config()
    serf, inner = server._inner_ports
    ports = {"http": server.port, "https": https, "dns": -1, "grpc": -1, "serf_wan": -1, "serf_lan": serf, "server": inner}
    server.options = dataclasses.replace(server.options, settings={**settings, "ports": ports})
    started(server, stack)
    good = ConsulOptions(port=https, ca=tmp_path / "ca.pem", certificate=tmp_path / "client.pem", key=tmp_path / "client.key")
    store = ConsulStore(good)
    try:
        assert await store.put("a", b"1") > 0
    finally:
        await store.close()
    for bad in (dataclasses.replace(good, ca=tmp_path / "stranger.pem"), dataclasses.replace(good, certificate=None, key=None)):
        store = ConsulStore(bad)
        try:
            with pytest.raises(StoreUnavailable):
                await store.get("a")
        finally:
            await store.close()
    with pytest.raises(StoreUnavailable, match="TLS"):
        ConsulStore(dataclasses.replace(good, ca=tmp_path / "absent.pem"))


class _Member(ConsulServer):
    """One of three servers; that the cluster has a leader is waited for elsewhere."""

    def _ready(self) -> bool:
        return True


@pytest.mark.slow
@contract
async def test_a_watch_and_a_lease_outlive_the_clusters_leader(stack: ExitStack, tmp_path: Path) -> None:
    numbers = free_ports("127.0.0.1", 9)
    members = []
    for k in range(3):
        http, serf, server = numbers[k * 3 : k * 3 + 3]
        ports = {"http": http, "dns": -1, "grpc": -1, "serf_wan": -1, "serf_lan": serf, "server": server}
        join = [f"127.0.0.1:{numbers[j * 3 + 1]}" for j in range(3) if j != k]
        settings = {"ports": ports, "bootstrap_expect": 3, "retry_join": join, "retry_interval": "1s", "node_name": f"n{k}"}
        members.append(started(_Member(ConsulServerOptions(tmp_path / f"{k}", port=http, settings=settings)), stack))
    leader = await _leader(members, numbers)
    follower = members[(leader + 1) % 3]
    store = ConsulStore(ConsulOptions(port=follower.port, confirm_s=0.5))
    try:
        async with store.watch("c/") as watch:
            await _again(store, "1")
            await until(watch, lambda s: [e.value for e in s.entries.values()] == [b"1"])
            lease = await store.acquire("lease", b"me", 15)
            members[leader].kill()
            await _again(store, "2")
            fresh = await until(watch, lambda s: [e.value for e in s.entries.values()] == [b"2"] and not s.stale)
            assert fresh.version > 0
            await lease.renew()
            await store.transaction([Put("c/a", b"3")], lease=lease)
            await until(watch, lambda s: [e.value for e in s.entries.values()] == [b"3"])
            await lease.release()
    finally:
        await store.close()


async def _leader(members: list[_Member], numbers: list[int]) -> int:
    """Which member leads, once all agree."""
    async with asyncio.timeout(40):
        while True:
            said = {await asyncio.to_thread(_said, member) for member in members}
            for k in range(3):
                if said == {f"127.0.0.1:{numbers[k * 3 + 2]}"}:
                    return k
            await asyncio.sleep(0.05)


def _said(member: _Member) -> str:
    try:
        with urllib.request.urlopen(f"{member.url}/v1/status/leader", timeout=1) as answer:
            return str(json.load(answer))
    except OSError:
        return ""


async def _again(store: ConsulStore, value: str) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                await store.put("c/a", value.encode())
                return
            except StoreUnavailable:
                await asyncio.sleep(0.05)
