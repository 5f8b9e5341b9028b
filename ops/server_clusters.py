"""Clusters of three servers on loopback: of nats-servers with a system account, of Consul servers. For `tickmesh cluster`, chaos and tests.

Each server is one of :mod:`tickmesh.ops.servers`, to kill and start again by itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

import nats.errors
import nats.js.errors as js_errors

from tickmesh.ops.servers import (
    ConsulServer,
    ConsulServerOptions,
    EmbeddedServer,
    NatsServer,
    NatsServerOptions,
    ServerFailed,
    SystemLogin,
    free_ports,
)
from tickmesh.transports.nats import LinkError, Login, connect

HOST = "127.0.0.1"
_READY_S = 30.0
_LOOK_S = 0.05
_Server = TypeVar("_Server", bound=EmbeddedServer)


class _Servers(Generic[_Server]):
    """Several servers that start and stop together. A context manager, or call :meth:`start` and :meth:`stop`.

    Attributes:
        servers: each of them.
    """

    servers: Sequence[_Server]

    def start(self) -> Self:
        """Start all of them and wait until the cluster can be used; after a failure none is left running.

        Raises:
            ServerError: see :meth:`EmbeddedServer.start`.
        """
        with ExitStack() as started:
            for server in self.servers:
                server.launch()
                started.callback(server.kill)
            for server in self.servers:
                server.wait_ready()
            self._wait_together()
            started.pop_all()
        return self

    def stop(self) -> None:
        """Stop all of them; an error of one does not keep the others."""
        with ExitStack() as stack:
            for server in self.servers:
                stack.callback(server.stop)

    def kill(self) -> None:
        """End all of them at once."""
        for server in self.servers:
            server.kill()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _wait_together(self) -> None:
        """Wait for what a single server cannot tell."""

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + _READY_S
        while not ready():
            if time.monotonic() > end:
                raise ServerFailed(self.servers[0].program, f"cluster: {what} within {_READY_S:.0f} s", self.servers[0].log, "")
            time.sleep(_LOOK_S)


@dataclass
class NatsCluster(_Servers[NatsServer]):
    """nats-servers that form one JetStream cluster, with one login of the system account for all.

    Args:
        folder: a folder per server is made in it.
        count: 3, or 1: a single server, without routes.
        system: the login; default: a new one.
        host: where they listen; another one than loopback only in a network of the caller's own.
    """

    folder: Path
    count: int = 3
    host: str = HOST
    system: SystemLogin = field(default_factory=SystemLogin)

    def __post_init__(self) -> None:
        ports = free_ports(self.host, 2 * self.count)
        routes = [f"{self.host}:{port}" for port in ports[self.count :]] if self.count > 1 else []
        self.servers = [
            NatsServer(
                NatsServerOptions(
                    self.folder / f"nats-{number + 1}",
                    port=ports[number],
                    host=self.host,
                    open=self.host != HOST,
                    name=f"nats-{number + 1}",
                    system=self.system,
                    route_port=ports[self.count + number] if routes else 0,
                    routes=routes,
                )
            )
            for number in range(self.count)
        ]

    @property
    def url(self) -> str:
        """All servers' addresses, separated by commas, as nodes and clients take them."""
        return ",".join(server.url for server in self.servers)

    def _wait_together(self) -> None:
        asyncio.run(self._places_replicas())

    async def _places_replicas(self) -> None:
        """Wait until a stream with a replica on each server can be made."""
        link = await connect(self.url, login=Login())
        end = time.monotonic() + _READY_S
        try:
            while True:
                try:
                    jetstream = link.client.jetstream(timeout=2)
                    await jetstream.add_stream(name="TM_READY", subjects=["tm-ready"], num_replicas=self.count)
                    await jetstream.delete_stream("TM_READY")
                    return
                except (nats.errors.Error, js_errors.Error, LinkError) as error:
                    if time.monotonic() > end:
                        reason = f"cluster places no stream within {_READY_S:.0f} s ({error})"
                        raise ServerFailed("nats-server", reason, self.servers[0].log, "") from error
                await asyncio.sleep(_LOOK_S)
        finally:
            await link.close()


@dataclass
class ConsulCluster(_Servers[ConsulServer]):
    """Consul servers that form one cluster, with the short timeouts of Raft.

    Args:
        folder: a folder per server is made in it.
        count: 3, or 1.
        host: where they listen; another one than loopback only in a network of the caller's own.
    """

    folder: Path
    count: int = 3
    host: str = HOST

    def __post_init__(self) -> None:
        ports = free_ports(self.host, 3 * self.count)
        https, gossips, rafts = (ports[n * self.count : (n + 1) * self.count] for n in range(3))
        peers = [f"{self.host}:{port}" for port in gossips] if self.count > 1 else []
        self.servers = [
            ConsulServer(
                ConsulServerOptions(
                    self.folder / f"consul-{number + 1}",
                    port=https[number],
                    host=self.host,
                    open=self.host != HOST,
                    name=f"consul-{number + 1}",
                    gossip_port=gossips[number],
                    raft_port=rafts[number],
                    peers=peers,
                )
            )
            for number in range(self.count)
        ]

    def address(self, number: int = 0) -> str:
        """``host:port`` of a server; counts on from the first after the last."""
        return f"{self.host}:{self.servers[number % self.count].port}"

    def _wait_together(self) -> None:
        self._wait(lambda: all(server.peers_known() == self.count for server in self.servers), "its servers did not find each other")
