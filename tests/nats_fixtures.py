"""Fixtures with real nats-servers on free loopback ports. Import them by name into a test module."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import nats.errors
import nats.js.errors as js_errors
import pytest

from tickmesh.ops.servers import NatsServer, NatsServerOptions
from tickmesh.transports.nats import Login, connect


@pytest.fixture(scope="module")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """One server for a module's tests; each test uses its own cluster name."""
    with NatsServer(NatsServerOptions(tmp_path_factory.mktemp("nats"))) as server:
        yield server


@pytest.fixture
def own_nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A server of the test's own, to kill and restart."""
    with NatsServer(NatsServerOptions(tmp_path / "nats")) as server:
        yield server


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> str:
    """A cluster name nobody else uses on the module's server."""
    return "".join(c for c in request.node.name if c.isalnum())[-40:]


class ConfiguredServer(NatsServer):
    """A server with more in its configuration than an embedded one has.

    Args:
        folder: its data folder.
        extra: text for the configuration file.
        name: its name among the servers of a cluster.
    """

    def __init__(self, folder: Path, extra: str, name: str = "tickmesh", port: int = 0) -> None:
        super().__init__(NatsServerOptions(folder, port=port))
        self._extra, self.name = extra, name

    def _config(self) -> str:
        return super()._config().replace("server_name: tickmesh", f"server_name: {self.name}") + self._extra


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def nats_cluster(tmp_path: Path) -> Iterator[list[ConfiguredServer]]:
    """Three servers that form one JetStream cluster, ready to make streams of three replicas."""
    ports = _free_ports(6)
    routes = ", ".join(f"nats://127.0.0.1:{port}" for port in ports[3:])
    with ExitStack() as stack:
        servers = []
        for number in range(3):
            text = f'cluster {{ name: C, host: "127.0.0.1", port: {ports[3 + number]}, routes: [{routes}] }}\n'
            servers.append(ConfiguredServer(tmp_path / f"nats{number}", text, f"n{number}", ports[number]))
            stack.enter_context(servers[-1])
        asyncio.run(_cluster_ready(servers[0].url))
        yield servers


async def _cluster_ready(url: str, limit_s: float = 30.0) -> None:
    """Wait until three servers have a leader that places a stream of three replicas."""
    link = await connect(url, login=Login())
    try:
        async with asyncio.timeout(limit_s):
            while True:
                try:
                    await link.client.jetstream(timeout=2).add_stream(name="READY", subjects=["ready"], num_replicas=3)
                    await link.client.jetstream(timeout=2).delete_stream("READY")
                    return
                except (nats.errors.Error, js_errors.Error):
                    await asyncio.sleep(0.1)
    finally:
        await link.close()
