"""Nodes that follow a configuration in a store, without the rest of a node: real followers, real checks; and edits made by hand."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats
from store_servers import KvServer, StoreServer

from tickmesh.control.config import Config
from tickmesh.control.config_store import ConfigStore, Documents, Keys, documents_of, own_of
from tickmesh.control.config_store import Stored as Stored
from tickmesh.control.follower import ConfigFollower, FollowerOptions
from tickmesh.control.store import Store, end_task
from tickmesh.node.config_checks import config_checks

TEXT = """# of the whole cluster
[cluster]
shards = 2

[data_sources.sim]
type = "simulator"
symbols = ["A", "B"]

[processing.calculations.fast]   # the fast one
use = "ema"
window = 10

[risk]
max_qty = 5   # for now

[delivery.ring]
method = "shm"
"""
CODE = '''"""A user's calculation."""
from tickmesh.node.calculation import calculation

@calculation(inputs="trade", state=[("total", "f8")])
def flow(event, state, *, scale: float = 1.0):
    """Sum of traded quantities."""
    state["total"] += event["qty"] * scale
    return state["total"]
'''


def documents(text: str = TEXT, cluster: str = "c", folder: Path | None = None) -> Documents:
    """The documents of a configuration file."""
    from tickmesh.control.config import parse_config

    file = None if folder is None else folder / "mesh.toml"
    return documents_of(text, parse_config(text, file=file))


class Node:
    """A node that does nothing but follow: it notes what it is told to apply, and refuses what its `refuses` names."""

    def __init__(self, cluster: str, name: str, folder: Path, running: tuple[int, Documents] | None = None) -> None:
        options = FollowerOptions(own_of(cluster, name), folder / name, config_checks, heartbeat_s=0.3)
        self.name, self.applied, self.tried = name, list[tuple[int, Config]](), list[Config]()
        self.refuses: Callable[[Config], Sequence[str]] = lambda config: ()
        self.gate = asyncio.Event()
        self.gate.set()
        self.follower = ConfigFollower(options, self._apply, self._try_out, running=running, facts=lambda: {"leads": [0]})

    async def _apply(self, config: Config, version: int, texts: Documents) -> Sequence[str]:
        await self.gate.wait()
        reasons = self.refuses(config)
        if not reasons:
            self.applied.append((version, config))
        return reasons

    async def _try_out(self, config: Config, version: int, texts: Documents) -> Sequence[str]:
        self.tried.append(config)
        return self.refuses(config)

    @property
    def status(self) -> Mapping[str, Any]:
        """What it says of itself."""
        return self.follower.status

    async def until(self, condition: Callable[[Mapping[str, Any]], bool]) -> Mapping[str, Any]:
        """Its status once it fits."""
        async with asyncio.timeout(30):
            while not condition(self.status):
                await asyncio.sleep(0.01)
        return self.status

    async def runs(self, version: int) -> Mapping[str, Any]:
        """Its status once it runs a version."""
        return await self.until(lambda status: status["version"] == version)

    async def refused(self) -> list[str]:
        """Why it refuses, once it does."""
        return list((await self.until(lambda status: status["refused"] is not None))["refused"]["reasons"])


@asynccontextmanager
async def following(store: Store, *nodes: Node) -> AsyncIterator[None]:
    """The nodes follow as long as the context lasts."""
    tasks = [asyncio.create_task(node.follower.run(store)) for node in nodes]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            await end_task(task)


async def registered(store: Store, cluster: str, count: int) -> None:
    """Wait until so many nodes are."""
    async with asyncio.timeout(30):
        while len(await store.services(Keys(cluster).service)) < count:
            await asyncio.sleep(0.01)


async def edit(server: StoreServer, key: str, value: bytes | None) -> None:
    """What a person does in Consul's UI, or with ``nats kv put``; None removes the key."""
    if isinstance(server, KvServer):
        client = await nats.connect(server.process.url)
        bucket = await client.jetstream().key_value("contract")
        name = key.replace(".", "=2E").replace("/", ".")
        await (bucket.delete(name) if value is None else bucket.put(name, value))
        await client.close()
        return
    url = f"http://127.0.0.1:{server.process.port}/v1/kv/{key}"
    request = urllib.request.Request(url, data=value, method="DELETE" if value is None else "PUT")
    await asyncio.to_thread(lambda: urllib.request.urlopen(request, timeout=5).close())


async def applied(config: ConfigStore, text: str = TEXT, comment: str = "") -> int:
    """The version under which a configuration lies in the store now."""
    return await config.apply(documents(text), await config.read(), comment)
