"""Servers with a system account, alone and as clusters of three: notices of ended connections, replicas, a server that dies."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nodes import until
from programs import require

from tickmesh.control.consul_store import ConsulOptions, ConsulStore
from tickmesh.ops.server_clusters import ConsulCluster, NatsCluster
from tickmesh.ops.servers import SYSTEM_VARIABLES, TOKEN_VARIABLE, NatsServer, NatsServerOptions, ServerError, SystemLogin
from tickmesh.transports.nats import Login, NatsRefused, connect


@pytest.fixture(scope="module", params=[1, 3])
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsCluster]:
    with NatsCluster(tmp_path_factory.mktemp("nats"), request.param) as cluster:
        yield cluster


@asynccontextmanager
async def link_to(url: str, name: str = "tickmesh", login: Login | None = None):
    link = await connect(url, name=name, login=login or Login())
    try:
        yield link
    finally:
        await link.close()


def test_the_system_account_is_told_when_a_connection_ends(servers: NatsCluster) -> None:
    """On whatever server of the cluster the connection was."""

    async def run() -> None:
        names: asyncio.Queue[str] = asyncio.Queue()

        async def told(message) -> None:
            await names.put(json.loads(message.data)["client"].get("name", ""))

        login = Login(user=servers.system.user, password=servers.system.password)
        async with link_to(servers.servers[0].url, login=login) as system:
            await system.client.subscribe("$SYS.ACCOUNT.*.DISCONNECT", cb=told)
            await system.client.flush()
            for number, server in enumerate(servers.servers):
                async with link_to(server.url, f"node {number}"):
                    pass
                async with asyncio.timeout(5):
                    while await names.get() != f"node {number}":
                        pass

    asyncio.run(run())


def test_anybody_has_jetstream_and_nobody_else_the_system_account(servers: NatsCluster) -> None:
    async def run() -> None:
        async with link_to(servers.url) as link:
            await link.client.jetstream().add_stream(name="S", subjects=["s"], num_replicas=servers.count)
            assert (await link.client.jetstream().publish("s", b"1")).seq == 1
            await link.client.jetstream().delete_stream("S")
        with pytest.raises(NatsRefused):
            await connect(servers.url, login=Login(user=servers.system.user, password="guess"))

    asyncio.run(run())


def test_the_password_is_in_no_file(servers: NatsCluster) -> None:
    written = [path for path in servers.folder.rglob("*") if path.is_file() and servers.system.password.encode() in path.read_bytes()]
    assert written == []
    assert servers.system.password not in repr(servers.system)
    assert servers.system.environment == dict(zip(SYSTEM_VARIABLES, (servers.system.user, servers.system.password)))
    assert SystemLogin() != SystemLogin()


def test_a_token_and_a_system_account_do_not_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    with pytest.raises(ServerError, match=TOKEN_VARIABLE):
        NatsServer(NatsServerOptions(tmp_path, system=SystemLogin())).start()


def test_three_nats_servers_do_without_one(tmp_path: Path) -> None:
    async def stored(url: str) -> None:
        async with link_to(url) as link, asyncio.timeout(30):
            jetstream = link.client.jetstream(timeout=2)
            while True:
                try:
                    await jetstream.publish("r.x", b"1")
                    return
                except Exception:  # a leader is being elected
                    await asyncio.sleep(0.1)

    async def make(url: str) -> None:
        async with link_to(url) as link:
            await link.client.jetstream().add_stream(name="R", subjects=["r.*"], num_replicas=3)

    with NatsCluster(tmp_path) as cluster:
        asyncio.run(make(cluster.url))
        cluster.servers[0].kill()
        asyncio.run(stored(cluster.url))
        port = cluster.servers[0].port
        assert cluster.servers[0].start().port == port
        pids = [server.pid for server in cluster.servers]
    assert all(pid and not Path(f"/proc/{pid}").exists() for pid in pids)


def test_three_consul_servers_do_without_one(tmp_path: Path) -> None:
    require("consul")

    async def put(address: str, value: bytes) -> None:
        host, _, port = address.rpartition(":")
        store = ConsulStore(ConsulOptions(host, int(port)))
        try:
            async with asyncio.timeout(30):
                while True:
                    try:
                        await store.put("k", value)
                        return
                    except Exception:  # a leader is being elected
                        await asyncio.sleep(0.1)
        finally:
            await store.close()

    async def get(address: str) -> bytes:
        host, _, port = address.rpartition(":")
        store = ConsulStore(ConsulOptions(host, int(port)))
        try:
            entry = await store.get("k")
            return entry.value if entry else b""
        finally:
            await store.close()

    began = time.monotonic()
    with ConsulCluster(tmp_path) as cluster:
        assert time.monotonic() - began < 25
        asyncio.run(put(cluster.address(0), b"1"))
        cluster.servers[0].kill()
        asyncio.run(put(cluster.address(1), b"2"))
        assert asyncio.run(get(cluster.address(2))) == b"2"
        cluster.servers[0].start()
        until(lambda: cluster.servers[0].peers_known() == 3, "it is back")
        assert asyncio.run(get(cluster.address(3))) == b"2"
