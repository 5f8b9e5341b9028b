"""Nodes under test: configurations that share the demonstration's compiled loop, running them, and what their output streams hold."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from tickmesh.control.config import Config, parse_config
from tickmesh.node import book
from tickmesh.node.event import ANY_VIEW, EVENT, EventArray
from tickmesh.node.journal import JournalReader
from tickmesh.node.pipeline import make_shards
from tickmesh.node.process import Node
from tickmesh.node.subscription import Batch, subscribe
from tickmesh.ops.up import GENERATORS
from tickmesh.transports.ring import Ring

DEMO = (resources.files("tickmesh.ops") / "demo.toml").read_text()
PROCESSING = DEMO[DEMO.index("[processing]") : DEMO.index("[delivery.")]
SYMBOLS = ("ALFA", "BRVO", "CHRL", "DLTA", "ECHO", "FXTR")


@pytest.fixture
def cluster() -> Iterator[str]:
    """A cluster name nobody else uses; in the end nothing of it may be left in shared memory."""
    name = f"t{secrets.token_hex(4)}"
    yield name
    assert not list(Path("/dev/shm").glob(f"tickmesh-{name}*"))


def simulator_source(
    messages: int, *, pace: str = '"max"', rate: int = 5000, symbols: tuple[str, ...] = SYMBOLS, name: str = "market"
) -> str:
    names = ", ".join(f'"{symbol}"' for symbol in symbols)
    return f'[data_sources.{name}]\ntype = "simulator"\nsymbols = [{names}]\nrate = {rate}\npace = {pace}\nmessages_max = {messages}\n'


def node_text(cluster: str, data: Path, sources: str, *, extra: str = "", cluster_extra: str = "", delivery: str = "") -> str:
    return f"""
[cluster]
name = "{cluster}"
node = "n1"
idle = "sleep"
data_dir = "{data}"
instruments_max = 1024
orders_max = 65536
{cluster_extra}
[journal]
segment_mb = 1
{sources}
{PROCESSING}
[delivery.events]
method = "nats"
{delivery}
{extra}
"""


def node_config(cluster: str, data: Path, sources: str, **more: str) -> Config:
    return parse_config(node_text(cluster, data, sources, **more))


def until(condition: Callable[[], object], what: str, limit_s: float = 30.0) -> None:
    """Wait for a condition."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s:.0f} s: {what}"
        time.sleep(0.01)


@contextmanager
def running(config: Config, url: str) -> Iterator[Node]:
    """A node, started and in the end stopped."""
    node = Node(config, GENERATORS, {"events": url})
    try:
        node.start()
        yield node
    finally:
        node.stop()


def finish(node: Node, limit_s: float = 60.0) -> None:
    """Wait until every source has ended and everything has been delivered."""

    def done() -> bool:
        node.check()
        return node.finished and all(status["ring_lag"] == 0 and not status["in_flight"] for status in node.gateways["events"].status())

    until(done, "end of the sources and of delivery", limit_s)


def outputs_made(node: Node, shard: int = 0) -> int:
    return int(node.shards[shard].shard.arrays.core["out_seq"][0])


def stream(url: str, cluster: str, count: int, shard: int = 0) -> tuple[EventArray, list[Batch]]:
    """Outputs of a shard's stream, in order, until `count` of them have come; and the batches that say what is missing."""

    async def read() -> tuple[EventArray, list[Batch]]:
        found: list[EventArray] = []
        missing: list[Batch] = []
        have = 0
        async with asyncio.timeout(30), subscribe(url, cluster=cluster, shard=shard, from_sequence="all") as batches:
            async for batch in batches:
                (missing if batch.missing else found).append(batch if batch.missing else batch.events)  # type: ignore[arg-type]
                have += batch.missing or len(batch.events)
                if have >= count:
                    break
        return np.concatenate(found or [np.zeros(0, EVENT)]), missing

    return asyncio.run(read())


def assert_whole(outputs: EventArray, count: int, first: int = 1) -> None:
    """Each output from `first` on, once, in order."""
    assert len(outputs) == count
    assert np.array_equal(outputs["seq"], np.arange(first, first + count, dtype=np.uint64))


def multicast_source(endpoints: tuple[str, ...], *, gap_wait_ms: int = 300, name: str = "lines") -> str:
    second = f'endpoint_b = "{endpoints[1]}"\n' if len(endpoints) > 1 else ""
    return (
        f'[data_sources.{name}]\ntype = "multicast"\nendpoint = "{endpoints[0]}"\n{second}interface = "lo"\n'
        f'data_format = "itch50"\nframing = "moldudp64"\ngap_wait_ms = {gap_wait_ms}\n'
    )


def free_endpoints() -> tuple[str, str]:
    """Two multicast endpoints nobody else uses."""
    host = 1 + secrets.randbelow(250)
    group = f"239.{77 + secrets.randbelow(100)}.{host}"
    port = 20_000 + secrets.randbelow(20_000)
    return f"udp://{group}.1:{port}", f"udp://{group}.2:{port + 1}"


def journal_outputs(config: Config, order_ids: str = "sequential") -> list[EventArray]:
    """What each shard makes of its journal: the events through a fresh shard, without a node."""
    rings = [Ring.create(None, 1 << 16, EVENT, mode="lossy") for _ in range(config.cluster.shards)]
    readers = [ring.reader("test") for ring in rings]
    found = []
    for number, shard in enumerate(make_shards(config, rings, config.folder, order_ids)):
        parts = []
        for batch in JournalReader(config.cluster.data_path / "journal" / "n1" / f"shard-{number}").batches(size=256):
            shard.step(batch.copy().view(ANY_VIEW), 0, len(batch))
            parts.append(readers[number].read(1 << 16).view(EVENT).copy())
        found.append(np.concatenate(parts))
    return found


def books(node: Node) -> dict[str, dict[str, object]]:
    """Every instrument's book and trades, as the simulator's truth has them."""
    found = {}
    for thread in node.shards:
        shard = thread.shard
        for i in shard.seen_instruments():
            bids, asks = book.top(shard.arrays.books, i, 10_000)
            statistics = shard.arrays.statistics[i]
            found[shard.symbol(i)] = {
                "bids": [[price // 100_000, qty, orders] for price, qty, orders in bids],
                "asks": [[price // 100_000, qty, orders] for price, qty, orders in asks],
                "orders": book.resting_orders(shard.arrays.books, i),
                "trades": int(statistics["trades"]),
                "volume": int(statistics["volume"]),
            }
    return found


def assert_true(node: Node, truth: dict[str, object]) -> None:
    found = books(node)
    assert found.keys() == truth.keys()
    for symbol, expected in truth.items():
        assert found[symbol] == {key: expected[key] for key in found[symbol]}, symbol  # type: ignore[index]
