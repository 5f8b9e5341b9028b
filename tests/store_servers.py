"""Real servers of both kinds behind the store, to kill, pause and restart; and what a contract test needs to run on each."""

from __future__ import annotations

import asyncio
import functools
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import resume, suspend
from programs import require

from tickmesh.control.consul_store import ConsulOptions, ConsulStore
from tickmesh.control.kv_store import KvStore
from tickmesh.control.store import Snapshot, Store, Watch
from tickmesh.ops.servers import ConsulServer, ConsulServerOptions, NatsServer, NatsServerOptions
from tickmesh.transports.nats import Login, connect

CONFIRM_S = 0.5
LIMIT_S = 60.0


class StoreServer(ABC):
    """A server of a store.

    Attributes:
        process: the server itself.
        keeps_data: whether a restart finds what was stored.
    """

    process: Any
    keeps_data: bool

    @abstractmethod
    def store(self) -> Any:
        """A store on it, as an asynchronous context manager."""

    def pause(self) -> None:
        """Nobody hears from it, as in a partition."""
        suspend(self.process.pid)

    def resume(self) -> None:
        """It is heard again."""
        if self.process.pid is not None:
            resume(self.process.pid)

    def close(self) -> None:
        """End it, whatever state it is in."""
        self.resume()
        self.process.kill()


class KvServer(StoreServer):
    """A nats-server with a bucket."""

    keeps_data = True

    def __init__(self, folder: Path) -> None:
        self.process = NatsServer(NatsServerOptions(folder)).start()

    @asynccontextmanager
    async def store(self) -> AsyncIterator[Store]:
        link = await connect(self.process.url, login=Login())
        try:
            store = await KvStore.open(link.client, "contract", confirm_s=CONFIRM_S, timeout_s=1.0)
            yield store
            await store.close()
        finally:
            await link.close()


class ConsulDevServer(StoreServer):
    """A Consul agent that forgets everything at a restart, and then counts from the beginning."""

    keeps_data = False

    def __init__(self, folder: Path) -> None:
        self.process = ConsulServer(ConsulServerOptions(folder, keep_data=self.keeps_data)).start()

    @asynccontextmanager
    async def store(self) -> AsyncIterator[Store]:
        store = ConsulStore(ConsulOptions(port=self.process.port, confirm_s=CONFIRM_S, timeout_s=2.0))
        try:
            yield store
        finally:
            await store.close()


class ConsulKeepingServer(ConsulDevServer):
    """A Consul agent that keeps its data."""

    keeps_data = True


KINDS: dict[str, Callable[[Path], StoreServer]] = {"kv": KvServer, "consul": ConsulDevServer}
OWN_KINDS = KINDS | {"consul-on-disk": ConsulKeepingServer}


def start(kind: str, folder: Path) -> StoreServer:
    """A running server."""
    if kind.startswith("consul"):
        require("consul")
    return OWN_KINDS[kind](folder)


@pytest.fixture(scope="module", params=list(KINDS))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    """One server for a module's tests; each test uses keys of its own."""
    made = start(request.param, tmp_path_factory.mktemp("store"))
    yield made
    made.close()


@pytest.fixture(params=list(OWN_KINDS))
def own_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreServer]:
    """A server of the test's own, to kill and pause."""
    made = start(request.param, tmp_path / "store")
    yield made
    made.close()


@pytest.fixture
def root(request: pytest.FixtureRequest) -> str:
    """A prefix that nobody else uses."""
    return "".join(c for c in request.node.name if c.isalnum())[-60:] + "/"


def contract(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a coroutine as a test, with a limit."""

    @functools.wraps(test)
    def run(*args: Any, **named: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **named), LIMIT_S))

    return run


async def until(watch: Watch, condition: Callable[[Snapshot], bool]) -> Snapshot:
    """The first snapshot that fits."""
    async with asyncio.timeout(LIMIT_S / 2):
        async for snapshot in watch:
            if condition(snapshot):
                return snapshot
    raise AssertionError("the watch ended")
