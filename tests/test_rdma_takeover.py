"""A leader that is killed under a subscriber over RDMA: the standby, whose journal came over RDMA too, goes on where it ended.

Three processes: a whole node that leads; a standby with its loop, which takes over when it is told so (who tells it in a cluster, a store,
is tested without RDMA in test_roles.py); and, here, a source that knows the endpoints of both.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nodes import PROCESSING, cluster, simulator_source  # noqa: F401
from rdma_support import LIMIT_S, pair_of_devices, wait_until
from replicas import options, verify
from test_rdma_node import Subscribing

from tickmesh.control.config import parse_config
from tickmesh.node.beginning import begin_shard
from tickmesh.node.event import ALL_INSTRUMENTS, ANY_VIEW, ASK, BID, EVENT, NO_PRICE, Kind
from tickmesh.node.journal import Journal
from tickmesh.node.process import Node
from tickmesh.node.rdma_delivery import Published, RdmaPublisher
from tickmesh.node.rdma_link import _told
from tickmesh.node.release import ReleaseGate
from tickmesh.node.replication import Leading, ReplicationServer
from tickmesh.node.replication_link import LinkOptions
from tickmesh.node.standby import Built, Standby
from tickmesh.node.telemetry import Telemetry
from tickmesh.node.versions import Document
from tickmesh.ops.up import GENERATORS
from tickmesh.transports import rdma
from tickmesh.transports.ring import Ring

SHARD, CAPACITY = 0, 1 << 18
MORE_EVENTS = 500
"""Inputs of the new leader."""


def node_text(name: str, node: str, folder: Path, device: str) -> str:
    return f"""
[cluster]
name = "{name}"
node = "{node}"
idle = "sleep"
data_dir = "{folder}"
instruments_max = 1024
orders_max = 65536
ring_capacity = {CAPACITY}
rdma_device = "{device}"
[journal]
segment_mb = 1
{simulator_source(1_000_000, pace="1.0", rate=100)}
{PROCESSING}
[delivery.up]
method = "rdma"
rdma_port = 0
"""


def link(node: str, device: str) -> LinkOptions:
    return options(node, rdma=True, rdma_device=device, heartbeat_s=0.1, timeout_s=10.0)


def leading(name: str, folder: Path, device: str) -> tuple[Node, ReplicationServer]:
    """A node that leads: what it puts out leaves when the standby has what it comes from."""
    node = Node(parse_config(node_text(name, "leader", folder, device)), GENERATORS)
    gate = ReleaseGate(node.journals[SHARD], acks=1, solo=False)
    node.shards[SHARD].gate = gate
    server = ReplicationServer(link("leader", device)).start()
    server.lead(SHARD, Leading(node.journals[SHARD], 1, gate, stored=lambda: node.outputs[SHARD].published))
    node.start()
    return node, server


def standing_by(name: str, folder: Path, device: str, address: str, stack: ExitStack) -> Standby:
    """A standby of it, with its loop."""
    telemetry = Telemetry.create(name, "standby", ["market"], 1)
    stack.callback(telemetry.close)
    config = parse_config(node_text(name, "standby", folder, device))

    def build(snapshot: Path | None) -> Built:
        ring = Ring.create(None, CAPACITY, EVENT)
        return Built(begin_shard(config, Document.of(config, 0, {}, "sequential"), ring, None), ring)

    standby = Standby(SHARD, folder / "journal", link("standby", device), build, telemetry).start()
    stack.callback(standby.stop)
    standby.follow(address)
    return standby


def lead(name: str, folder: Path, device: str, pipe: Any) -> None:
    """Lead until it is killed."""
    rdma._devices.clear()  # what the parent has opened is of no use here
    node, server = leading(name, folder, device)
    pipe.send((server.address, node.publishers["up"].port))
    while True:
        node.check()
        time.sleep(0.01)


def stand_by(name: str, folder: Path, device: str, address: str, pipe: Any) -> None:
    """Stand by, take over when it is told so, and have some inputs more; at the end it tells all that it has put out."""
    rdma._devices.clear()
    with ExitStack() as stack:
        publisher = RdmaPublisher(link("standby", device), device=device).start()
        pipe.send(publisher.port)
        standby = standing_by(name, folder, device, address, stack)
        wait_until(lambda: standby.follower.state == "following", LIMIT_S * 6)
        pipe.send(standby.follower.status()["link"])
        first = pipe.recv()
        journal, built = standby.take_over(LIMIT_S)
        stack.callback(built.output.close)
        stack.callback(publisher.stop)
        stack.callback(journal.close)
        shard = built.shard
        publisher.publish(SHARD, Published(built.output, 2, journal.header.journal_id, shard.references, shard.plan.outputs))
        go_on(journal, built)
        pipe.send(outputs_from(built, first))
        pipe.recv()


def outputs_from(built: Built, first: int) -> Any:
    """What has been put out, from an output on; the ring holds all of it."""
    with built.output.reader("test", start="oldest") as reader:
        outputs = reader.read(CAPACITY).copy()
    return outputs[outputs["seq"] >= first]


def go_on(journal: Journal, built: Built) -> None:
    """Inputs that no leader before had: trades of the first instrument."""
    more = np.zeros(MORE_EVENTS, EVENT)
    more["kind"], more["side"], more["price"] = Kind.TRADE, 2, 100_000_000_000
    more["seq"], more["qty"] = (1 << 40) + np.arange(MORE_EVENTS), 1 + np.arange(MORE_EVENTS)
    more["ts_event"] = more["ts_recv"] = time.time_ns()
    for first in range(0, MORE_EVENTS, 50):
        batch = more[first : first + 50].copy()
        assert journal.append(batch) == len(batch)
        assert built.shard.step(batch.view(ANY_VIEW), 0, len(batch)) == len(batch)


def started(stack: ExitStack, target: Callable[..., None], *arguments: Any) -> tuple[Any, Any]:
    """A process of its own, which is ended whatever happens, and a pipe to it."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=target, args=(*arguments, theirs), daemon=True)
    _told.clear()  # what was said once in the tests before this one is said again
    process.start()
    theirs.close()  # so that its end is seen
    stack.callback(process.join)
    stack.callback(process.kill)
    return process, ours


def told(pipe: Any) -> Any:
    assert pipe.poll(LIMIT_S * 6), "a process says nothing"
    return pipe.recv()


@pytest.mark.rdma
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_subscriber_goes_on_at_the_standby_of_a_leader_that_is_killed(cluster: str, tmp_path: Path) -> None:  # noqa: F811
    first, second = pair_of_devices()
    with ExitStack() as stack:
        stack.callback(lambda: [path.unlink() for path in Path("/dev/shm").glob(f"tickmesh-{cluster}?leader*")])  # it cannot itself
        leader, from_leader = started(stack, lead, cluster, tmp_path / "leader", first)
        address, port = told(from_leader)
        standby, from_standby = started(stack, stand_by, cluster, tmp_path / "standby", second, address)
        ports = port, told(from_standby)
        assert told(from_standby) == "rdma"
        endpoints = [f"rdma://127.0.0.1:{port}" for port in ports]
        target = Subscribing(second, endpoints[0], more=f'endpoint_b = "{endpoints[1]}"')
        stack.callback(target.close)
        batches: list[Any] = []

        def messages() -> int:
            while len(batch := target.reader.read()):
                batches.append(batch.copy())
            return target.receiver.counters()["messages"]

        wait_until(lambda: messages() > 1000, LIMIT_S * 3)
        os.kill(leader.pid, signal.SIGKILL)
        leader.join()
        messages()
        begun, seen = np.concatenate(batches)[[0, -1]]
        assert (begun["kind"], begun["instrument"]) == (Kind.CODE, ALL_INSTRUMENTS)
        from_standby.send(int(begun["seq"]))
        outputs = told(from_standby)
        first, last = int(begun["seq"]), int(outputs["seq"][-1])
        assert np.array_equal(outputs["seq"], np.arange(first, last + 1))
        assert last >= seen["seq"] + MORE_EVENTS
        last_taken = outputs["seq"][np.isin(outputs["kind"], (Kind.TRADE, Kind.BBO))][-1]
        wait_until(lambda: messages() == len(outputs) and batches[-1]["seq"][-1] == last_taken, LIMIT_S * 3)
        check_taken(np.concatenate(batches)[1:], outputs)
        counters = target.receiver.counters()
        assert (counters["gaps"], counters["missing"], counters["duplicates"]) == (0, 0, 0)
        assert counters["reconnects"] >= 1
        from_standby.send("end")
        standby.join(LIMIT_S)
        assert standby.exitcode == 0
    assert verify(tmp_path / "standby" / "journal").ok


def check_taken(taken: Any, outputs: Any) -> None:
    """The subscriber's shard has had each trade and each BBO once, as the standby, which has the leader's too, has put it out."""
    whole = taken[taken["instrument"] == ALL_INSTRUMENTS]
    assert not np.isin(whole["kind"], (Kind.GAP, Kind.CLEAR)).any()
    trades, theirs = taken[taken["kind"] == Kind.TRADE], outputs[outputs["kind"] == Kind.TRADE]
    assert len(theirs) > MORE_EVENTS
    for name in ("seq", "ts_event", "price", "qty", "id", "side", "flags"):
        assert np.array_equal(trades[name], theirs[name]), name
    bbos = outputs[outputs["kind"] == Kind.BBO]
    assert len(bbos)
    assert np.array_equal(taken["seq"][taken["kind"] == Kind.CLEAR], bbos["seq"])
    for side, price, qty in ((BID, "price", "qty"), (ASK, "aux", "id")):
        levels = taken[(taken["kind"] == Kind.LEVEL) & (taken["side"] == side)]
        there = bbos[bbos[price] != NO_PRICE]
        assert np.array_equal(levels["seq"], there["seq"])
        assert np.array_equal(levels["price"], there[price])
        assert np.array_equal(levels["qty"], there[qty].astype(np.int64))
