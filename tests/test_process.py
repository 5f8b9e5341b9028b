"""The node process with a real nats-server: what goes in comes out, once, in order, over restarts and failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from nats_fixtures import nats_server, own_nats_server  # noqa: F401
from nodes import SYMBOLS, assert_whole, cluster, finish, node_config, outputs_made, running, simulator_source, stream  # noqa: F401
from tickmesh.node import book
from tickmesh.node.event import Kind
from tickmesh.node.process import Node
from tickmesh.node.telemetry import read_telemetry, telemetry_path
from tickmesh.ops.servers import NatsServer
from tickmesh.ops.simulator import Simulator, SimulatorConfig

MESSAGES = 20_000


def simulator_truth(messages: int = MESSAGES, symbols: tuple[str, ...] = SYMBOLS, rate: int = 5000) -> dict[str, object]:
    simulator = Simulator(SimulatorConfig(seed=1, symbols=len(symbols), rate=rate, messages=messages, names=symbols))
    while not simulator.finished:
        simulator.next_block(4096)
    return dict(simulator.truth(10_000))


def books(node: Node) -> dict[str, dict[str, object]]:
    """Every instrument's book and trades, as the simulator's truth has them."""
    found = {}
    for thread in node.shards:
        shard = thread.shard
        for i in shard.seen_instruments():
            bids, asks = book.top(shard.arrays.books, i, 10_000)
            statistics = shard.arrays.statistics[i]
            found[node.table.symbol(i)] = {
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


def test_a_simulated_market_comes_out_whole(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    config = node_config(cluster, tmp_path, simulator_source(MESSAGES))
    with running(config, nats_server.url) as node:
        finish(node)
        assert_true(node, simulator_truth())
        made = outputs_made(node)
        outputs, missing = stream(nats_server.url, cluster, made)
        node.mirror()
        reading = read_telemetry(telemetry_path(cluster, "n1"))
    assert not missing
    assert_whole(outputs, made)
    assert {Kind.BBO, Kind.TRADE, Kind.SIGNAL, Kind.REFERENCE} <= {Kind(int(k)) for k in set(outputs["kind"])}
    assert reading["sources"]["market"]["messages"] == MESSAGES
    assert reading["shards"][0]["outputs"] == made
    assert not telemetry_path(cluster, "n1").exists()
