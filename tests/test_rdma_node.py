"""Deliveries, sources and journals over RDMA, between parts of nodes in this process, on real (or Soft-RoCE) devices."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rdma_support import LIMIT_S, losing, pair_of_devices, wait_until
from replicas import events, new_journal, pair, same_journals
from test_rdma_events import bodies, book_of_one_level, output, reference

from tickmesh.control.config import Config, parse_config
from tickmesh.node import follower as follower_module
from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, Kind
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.rdma_delivery import Published, RdmaPublisher
from tickmesh.node.rdma_link import RdmaWire
from tickmesh.node.rdma_source import RdmaReceiver
from tickmesh.node.receivers import ReceiverContext
from tickmesh.node.release import ReleaseGate
from tickmesh.node.replication_link import LinkOptions
from tickmesh.ops.bench_rdma import bench_rdma
from tickmesh.transports import rdma
from tickmesh.transports.ring import Reader, Ring

pytestmark = [pytest.mark.rdma, pytest.mark.slow]
SESSION = 0x5E55


class Publishing:
    """A shard's output ring and a delivery over RDMA."""

    def __init__(
        self,
        device: str,
        *,
        token: str = "",
        capacity: int = 1024,
        epoch: int = 7,
        mode: Any = "lossy",
        gate: ReleaseGate | None = None,
        timeout_s: float = 5.0,
    ) -> None:
        self.options = LinkOptions("upstream", "feed1", token=token, heartbeat_s=0.1, timeout_s=timeout_s, idle=1)
        self.output = Ring.create(None, capacity, EVENT, mode=mode)
        self.published = Published(self.output, epoch, SESSION, self.references, frozenset({Kind.BBO, Kind.TRADE}), gate)
        self.publisher = RdmaPublisher(self.options, device=device).start()
        self.publisher.publish(0, self.published)
        self.next = 1
        self.put(reference(1, 0, "ABC"), reference(2, 1, "DEF"))

    @staticmethod
    def references() -> Any:
        return np.concatenate([reference(0, 0, "ABC"), reference(0, 1, "DEF")])

    def put(self, *events: Any) -> None:
        batch = np.concatenate(events)
        batch["seq"] = np.arange(self.next, self.next + len(batch))
        self.next += len(batch)
        self.output.writer.write(batch)

    def trades(self, count: int) -> None:
        for first in range(0, count, 100):
            self.put(*(output(0, Kind.TRADE, i & 1, qty=self.next + i) for i in range(min(100, count - first))))


class Subscribing:
    """A node's receiver, and what its shard gets."""

    def __init__(self, device: str, endpoint: str, *, resume: tuple[int, int] | None = None, more: str = "", capacity: int = 65536) -> None:
        self.table, self.ring = InstrumentTable(64), Ring.create(None, capacity, EVENT)
        self.reader: Reader = self.ring.reader("shard")
        context = ReceiverContext(self.table, [self.ring], 0, 1)
        self.receiver = RdmaReceiver("up", configuration(device, endpoint, more), context)
        if resume is not None:
            self.receiver.resume({}, resume[0])
            self.receiver.go_on_from(resume[0] + 1, resume[1])
        self.receiver.start()
        self.events: list[Any] = []

    def take(self) -> list[Any]:
        self.events += list(self.reader.read().copy())
        return self.events

    def sequences(self, kind: Kind = Kind.TRADE) -> list[int]:
        return [int(event["seq"]) for event in self.take() if event["kind"] == kind]

    def close(self) -> None:
        self.receiver.ask_stop()
        assert self.receiver.join(LIMIT_S)
        assert self.receiver.error is None
        self.receiver.close()


def configuration(device: str, endpoint: str, more: str = "") -> Config:
    return parse_config(
        f"""
        [cluster]
        node = "strategy1"
        rdma_device = "{device}"
        [data_sources.up]
        type = "rdma"
        endpoint = "{endpoint}"
        reconnect_min_ms = 10
        {more}
        """,
        "test",
    )


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def publishing(stack: ExitStack, **more: Any) -> Publishing:
    made = Publishing(pair_of_devices()[0], **more)
    stack.callback(made.output.close)
    stack.callback(made.publisher.stop)
    return made


def subscribing(stack: ExitStack, source: Publishing, **more: Any) -> Subscribing:
    made = Subscribing(pair_of_devices()[1], f"rdma://127.0.0.1:{source.publisher.port}", **more)
    stack.callback(made.close)
    return made


@pytest.mark.parametrize("more", ["", "strict = true"], ids=["looking", "told"])
def test_a_source_gets_what_a_delivery_puts_out(stack: ExitStack, more: str) -> None:
    source = publishing(stack)
    target = subscribing(stack, source, more=more)
    wait_until(lambda: target.receiver.counters()["connected"])
    source.trades(500)
    source.put(output(0, Kind.BBO, 1, price=5, qty=6, aux=7, id=8), output(0, Kind.SIGNAL, 1))
    source.trades(1)
    wait_until(lambda: 504 in target.sequences() or 505 in target.sequences())
    assert target.sequences() == [*range(3, 503), 505]
    book = [event for event in target.events if event["seq"] == 503]
    assert [bodies(event) for event in book] == book_of_one_level(5, 6, 7, 8)
    begun = target.events[0]
    assert (begun["kind"], begun["seq"], begun["id"], begun["instrument"]) == (Kind.CODE, 3, SESSION, ALL_INSTRUMENTS)
    symbols = {target.table.symbol(int(event["instrument"])) for event in target.events if event["kind"] == Kind.TRADE}
    assert symbols == {"ABC", "DEF"}
    counters = target.receiver.counters()
    assert (counters["messages"], counters["filtered"], counters["gaps"], counters["malformed"]) == (503, 1, 0, 0)
    assert source.publisher.status()[0]["node"] == "strategy1"


def test_lost_connections_lose_nothing_that_the_ring_still_has(stack: ExitStack) -> None:
    source = publishing(stack, capacity=4096)
    target = subscribing(stack, source)
    wait_until(lambda: target.receiver.counters()["connected"])
    for _ in range(5):
        source.trades(300)
        wait_until(lambda: target.sequences())
        source.publisher.publish(0, source.published)  # ends the session, as a node does that is asked to lead anew
        source.trades(200)
        last = source.next - 1
        wait_until(lambda: target.sequences()[-1] == last)  # noqa: B023
    assert target.sequences() == list(range(3, source.next))
    assert target.sequences(Kind.GAP) == []
    assert target.receiver.counters()["reconnects"] == 5


def test_what_the_ring_has_not_got_any_more_is_a_gap(stack: ExitStack) -> None:
    source = publishing(stack, capacity=256)
    target = subscribing(stack, source)
    wait_until(lambda: target.receiver.counters()["connected"])
    source.trades(10)
    wait_until(lambda: len(target.sequences()) == 10)
    source.publisher.withdraw(0)
    source.trades(2000)
    source.publisher.publish(0, source.published)
    wait_until(lambda: target.sequences()[-1] == source.next - 1)
    gap = next(event for event in target.events if event["kind"] == Kind.GAP)
    trades = target.sequences()
    first_after = next(seq for seq in trades if seq > 12)
    assert (gap["id"], gap["aux"], gap["instrument"]) == (13, first_after - 1, ALL_INSTRUMENTS)
    assert trades == [*range(3, 13), *range(first_after, source.next)]


def test_a_restarted_source_goes_on_where_its_journal_ends(stack: ExitStack) -> None:
    source = publishing(stack)
    source.trades(100)
    target = subscribing(stack, source, resume=(40, SESSION))
    wait_until(lambda: target.sequences() and target.sequences()[-1] == 102)
    assert target.sequences() == list(range(41, 103))
    assert target.sequences(Kind.GAP) == target.sequences(Kind.CLEAR) == []


def test_another_run_of_the_publisher_begins_anew(stack: ExitStack) -> None:
    source = publishing(stack)
    source.trades(20)
    target = subscribing(stack, source, resume=(900, SESSION + 1))
    wait_until(lambda: target.sequences(Kind.CLEAR))
    source.trades(5)
    wait_until(lambda: target.sequences() and target.sequences()[-1] == 27)
    clear = target.events[0]
    assert (clear["kind"], clear["id"]) == (Kind.CLEAR, SESSION)
    assert target.sequences(Kind.GAP)


def test_outputs_wait_for_the_gate_and_a_subscriber_that_has_more_than_it_lets_go_is_no_stranger(stack: ExitStack, tmp_path: Path) -> None:
    journal = new_journal(tmp_path)
    stack.callback(journal.close)
    gate = ReleaseGate(journal, acks=1, solo=False)
    source = publishing(stack, gate=gate)

    def release(outputs: int) -> None:
        journal.append(events(journal.next_sequence, 10))
        gate.mark(journal.next_sequence, outputs)
        gate.update("standby", journal.next_sequence, 0)

    source.trades(100)
    release(20)
    target = subscribing(stack, source, resume=(40, SESSION))
    wait_until(lambda: target.receiver.counters()["connected"])
    release(30)
    assert target.take() == []
    for outputs in (41, 60, 102):
        release(outputs)
        wait_until(lambda: target.sequences() and target.sequences()[-1] == outputs)  # noqa: B023
    assert target.sequences() == list(range(41, 103))
    assert target.sequences(Kind.GAP) == target.sequences(Kind.CLEAR) == []
    source.publisher.withdraw(0)
    assert not gate.listeners


def test_the_end_of_a_delivery_drains_it(stack: ExitStack) -> None:
    """Most of what is put out is still in the publisher's ring when it is stopped: the subscriber's shard has taken nothing by then."""
    source = publishing(stack, capacity=4096)
    target = subscribing(stack, source, capacity=256, more="buffer_kb = 64")
    wait_until(lambda: target.receiver.counters()["connected"])
    source.trades(2500)
    wait_until(lambda: target.ring.published >= 128)
    stopping = threading.Thread(target=source.publisher.stop, args=(LIMIT_S * 3,), daemon=True)
    stopping.start()
    wait_until(lambda: source.publisher._sessions._closed)
    wait_until(lambda: target.take()[-1]["seq"] == 2502, LIMIT_S * 3)
    stopping.join(LIMIT_S)
    assert not stopping.is_alive()
    assert target.sequences() == list(range(3, 2503))
    assert source.publisher.status() == []


def _subscribe(device: str, pipe: Any) -> None:
    rdma._devices.clear()  # what the parent has opened is of no use here
    target = Subscribing(device, pipe.recv())
    wait_until(lambda: target.receiver.counters()["connected"])
    pipe.send("connected")
    while True:
        wait_until(lambda: len(target.take()) > 1 << 30, LIMIT_S * 10)


def test_a_subscriber_that_stands_still_is_given_up_and_the_ring_goes_on(stack: ExitStack) -> None:
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_subscribe, args=(pair_of_devices()[1], theirs), daemon=True)
    child.start()
    stack.callback(child.join)
    stack.callback(child.kill)
    assert child.pid is not None
    source = publishing(stack, capacity=256, mode="lossless")
    ours.send(f"rdma://127.0.0.1:{source.publisher.port}")
    assert ours.recv() == "connected"
    os.kill(child.pid, signal.SIGSTOP)
    writing = threading.Thread(target=source.trades, args=(1000,), daemon=True)
    writing.start()
    wait_until(lambda: source.publisher.numbers()[0]["events"] > 0)
    assert len(source.publisher.status()) == 1
    writing.join(LIMIT_S)
    assert not writing.is_alive()
    assert source.publisher.status() == []
    target = subscribing(stack, source)
    wait_until(lambda: target.receiver.counters()["connected"])
    source.trades(10)
    wait_until(lambda: len(target.sequences()) == 10)


def test_a_subscriber_whose_shard_is_slow_lives_and_is_waited_for(stack: ExitStack) -> None:
    source = publishing(stack, capacity=256, mode="lossless", timeout_s=2.0)
    target = subscribing(stack, source, capacity=256, more="buffer_kb = 64")
    wait_until(lambda: target.receiver.counters()["connected"])
    [session] = source.publisher._sessions.all(0)
    channel = session._channel
    assert channel is not None
    writing = threading.Thread(target=source.trades, args=(2500,), daemon=True)
    writing.start()
    wait_until(lambda: target.ring.published >= 128)
    heard = channel.beats_heard
    wait_until(lambda: channel.beats_heard > heard + 40)  # for twice the time in which a silent one is given up
    assert target.ring.published <= 256
    assert writing.is_alive()
    wait_until(lambda: target.take()[-1]["seq"] == 2502, LIMIT_S * 3)
    writing.join(LIMIT_S)
    assert target.sequences() == list(range(3, 2503))
    assert target.receiver.counters()["reconnects"] == 0


def test_a_stale_epoch_is_refused(stack: ExitStack) -> None:
    """A leader that was deposed comes back under its old epoch: nobody takes anything from it."""
    source = publishing(stack, epoch=9)
    target = subscribing(stack, source)
    wait_until(lambda: target.receiver.counters()["connected"])
    source.publisher.publish(0, replace(source.published, epoch=8))
    wait_until(lambda: source.publisher.refused >= 2)
    source.trades(10)
    assert target.sequences() == []
    source.publisher.publish(0, replace(source.published, epoch=10))
    wait_until(lambda: len(target.sequences()) == 10)


def test_whoever_does_not_know_the_token_gets_nothing(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RDMA_TOKEN", "wrong")
    source = publishing(stack, token="right")
    target = subscribing(stack, source, more='token_env = "RDMA_TOKEN"')
    wait_until(lambda: source.publisher.refused)
    assert target.receiver.counters()["connected"] == 0
    monkeypatch.setenv("RDMA_TOKEN", "right")
    wait_until(lambda: target.receiver.counters()["connected"])


# ---------------------------------------------------------------- journals


def over_rdma() -> dict[str, Any]:
    return {"rdma": True, "rdma_device": pair_of_devices()[0], "idle": 1, "heartbeat_s": 0.1, "timeout_s": 10.0}


def test_a_journal_goes_to_a_standby_over_rdma(tmp_path: Path) -> None:
    with pair(tmp_path, 5000, **over_rdma()) as both:
        follower = both.follow()
        both.caught_up(LIMIT_S * 2)
        assert follower.status()["link"] == "rdma"
        assert both.server.status()[0]["link"] == "rdma"
        for count in (1, 700, 64, 3000):
            both.append(count)
        both.finish()


def test_a_standby_whose_connection_breaks_connects_again_and_has_the_same_journal(tmp_path: Path) -> None:
    with pair(tmp_path, 100, **over_rdma()) as both:
        follower = both.follow()
        for cut in range(5):
            both.append(1000)
            wait_until(lambda: follower.status()["link"] == "rdma")
            link = follower._link
            assert link is not None
            assert isinstance(link.wire, RdmaWire)
            link.wire.channel.interrupt()  # the queue pair fails under it
            both.append(100 + cut)
            both.caught_up(LIMIT_S * 2)
        assert follower.counters.connects >= 5
        both.finish()


def test_where_nothing_passes_but_tcp_a_link_falls_back_to_it_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where UDP port 4791 is filtered between two hosts: both have devices, and say so, and nothing comes."""
    monkeypatch.setattr(follower_module, "_WITHOUT_RDMA_S", 3.0)
    with pair(tmp_path, 500, **over_rdma()) as both:
        both.more = both.more | {"rdma_device": pair_of_devices()[1]}
        follower = both.new_follower()
        with losing(100, "rdma0", "rdma1"):
            both.follow()
            both.caught_up(LIMIT_S * 2)
            assert follower.status()["link"] == "tcp"
            assert follower.counters.connects >= 2
        both.append(100)
        both.caught_up()

        def over_rdma_again() -> bool:
            both.server._sessions.end()  # the link is lost for another reason
            wait_until(lambda: follower.state == "following")
            return bool(follower.status()["link"] == "rdma")

        wait_until(over_rdma_again, LIMIT_S * 2)
        both.append(100)
        both.finish()


def test_without_a_device_a_link_stays_on_tcp(tmp_path: Path) -> None:
    with pair(tmp_path, 200, **over_rdma() | {"rdma_device": "mlx5_99"}) as both:
        follower = both.follow()
        both.caught_up()
        assert follower.status()["link"] == "tcp"
        begun = time.monotonic()
        both.append(50)
        both.caught_up()
        assert time.monotonic() - begun < LIMIT_S
        both.finish()
    assert same_journals


def test_the_benchmark_takes_every_output_once() -> None:
    pair_of_devices()
    result = bench_rdma(rounds=1, records=2048, outputs=50)
    assert result["ring_records_s"] > 0
    assert 0 < result["to_subscriber_ns"]["p50"] <= result["to_subscriber_ns"]["p99"]
    assert [line.partition(" ")[0] for line in result["lines"]] == ["RDMA", "RDMA,"]
