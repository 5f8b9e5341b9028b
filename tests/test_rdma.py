"""Channels over RDMA on real (or Soft-RoCE) devices: a million records, connections that break, peers that die, packets that are lost."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from rdma_support import BINDINGS, LIMIT_S, losing, need_binding, pair_of_devices, wait_until

from tickmesh.transports.rdma import ChannelError, RdmaChannel
from tickmesh.transports.verbs import Binding, open_device

pytestmark = [pytest.mark.rdma, pytest.mark.slow]
RECORD_BYTES = 64


def records(first: int, count: int) -> memoryview:
    """Records that say which they are, in every word."""
    numbers = np.arange(first, first + count, dtype=np.uint64)
    return memoryview((numbers[:, None] * np.arange(1, 16, 2, dtype=np.uint64)).tobytes())


class Ends:
    """Two ends of a channel, connected."""

    def __init__(self, binding: Binding = "auto", *, records: int = 1024, strict: bool = False) -> None:
        first, second = pair_of_devices()
        self.devices = [open_device(first, binding=binding), open_device(second, binding=binding)]
        self.capacity, self.strict = records, strict
        self.takings: list[Taking] = []
        self.sender, self.taker = self.connect()

    def connect(self) -> tuple[RdmaChannel, RdmaChannel]:
        """New channels, as after a lost connection."""
        sender = RdmaChannel(self.devices[0], 64, idle_mode=1, peer="taker")
        taker = RdmaChannel(self.devices[1], self.capacity, strict=self.strict, idle_mode=1, peer="sender")
        sender.connect(taker.offer())
        taker.connect(sender.offer())
        taker.beat()
        assert sender.wait_for_beat(0, LIMIT_S) == 1
        return sender, taker

    def take(self, first: int, total: int, room: int = 4096) -> Taking:
        self.takings.append(Taking(self.taker, first, total, room))
        return self.takings[-1]

    def close(self) -> None:
        for taking in self.takings:
            taking.stopped = True
            taking.join()
        self.sender.close()
        self.taker.close()
        for device in self.devices:
            device.close()


class Taking(threading.Thread):
    """Takes records until so many have come in order, or the connection ends."""

    def __init__(self, channel: RdmaChannel, first: int, total: int, room: int) -> None:
        super().__init__(daemon=True)
        self.channel, self.next, self.total, self.room = channel, first, total, room
        self.error: Exception | None = None
        self.wrong, self.stopped = 0, False
        self.start()

    def run(self) -> None:
        buffer, end = bytearray(self.room * RECORD_BYTES), time.monotonic() + 4 * LIMIT_S
        try:
            while self.next < self.total and time.monotonic() < end and not self.stopped:
                size = self.channel.receive_into(memoryview(buffer), 0.05)
                count = size // RECORD_BYTES
                self.wrong += bytes(buffer[:size]) != bytes(records(self.next, count))
                self.next += count
        except ChannelError as error:
            self.error = error


@pytest.fixture(params=BINDINGS)
def binding(request: pytest.FixtureRequest) -> Binding:
    need_binding(request.param)
    chosen: Binding = request.param
    return chosen


@pytest.fixture
def ends() -> Iterator[Callable[..., Ends]]:
    made: list[Ends] = []

    def make(*args: Any, **more: Any) -> Ends:
        made.append(Ends(*args, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


def send_all(channel: RdmaChannel, first: int, total: int, randoms: random.Random, largest: int = 2000) -> None:
    while first < total:
        count = min(total - first, randoms.randint(1, largest))
        channel.send([records(first, count)], LIMIT_S)
        first += count


@pytest.mark.parametrize("strict", [False, True], ids=["looking", "told"])
def test_records_come_once_and_in_order_round_and_round_the_ring(binding: Binding, strict: bool, ends: Callable[..., Ends]) -> None:
    pair = ends(binding, records=1024, strict=strict)
    total = 20_000
    taking = pair.take(0, total, room=700)
    send_all(pair.sender, 0, total, random.Random(5), largest=300)
    taking.join(2 * LIMIT_S)
    assert (taking.next, taking.wrong, taking.error) == (total, 0, None)


def test_a_million_records_in_batches_of_any_size(ends: Callable[..., Ends]) -> None:
    pair = ends(records=8192)
    taking = pair.take(0, 1_000_000)
    send_all(pair.sender, 0, 1_000_000, random.Random(7), largest=6000)
    taking.join(4 * LIMIT_S)
    assert (taking.next, taking.wrong, taking.error) == (1_000_000, 0, None)


def test_five_broken_connections_lose_and_double_nothing(ends: Callable[..., Ends]) -> None:
    """Whoever sends asks the taker what it has: that is what a protocol over a channel does."""
    pair, randoms, total, at = ends(records=512), random.Random(11), 30_000, 0
    for cut in [randoms.randrange(k * total // 6, (k + 1) * total // 6) for k in range(5)] + [total]:
        taking = pair.take(at, total)
        if cut < total:
            breaking = threading.Thread(target=break_at, args=(pair, taking, cut, randoms.random() < 0.5), daemon=True)
            breaking.start()
        try:
            send_all(pair.sender, at, total, randoms, largest=200)
            taking.join(LIMIT_S)
        except ChannelError:  # the taker of a one-sided ring does not see that its sender is gone
            taking.stopped = True
        taking.join(2 * LIMIT_S)
        assert taking.wrong == 0
        at = taking.next
        if at < total:
            pair.sender.close()
            pair.taker.close()
            pair.sender, pair.taker = pair.connect()
    assert at == total


def break_at(pair: Ends, taking: Taking, cut: int, by_taker: bool) -> None:
    wait_until(lambda: taking.next >= cut)
    (pair.taker if by_taker else pair.sender).interrupt()


def test_a_full_ring_waits_for_its_taker_and_says_so(ends: Callable[..., Ends]) -> None:
    pair = ends(records=256)
    with pytest.raises(TimeoutError):
        pair.sender.send([records(0, 300)], 0.3)
    buffer = bytearray(256 * RECORD_BYTES)
    assert pair.taker.receive_into(memoryview(buffer), LIMIT_S) == len(buffer)
    assert bytes(buffer) == bytes(records(0, 256))


def test_heartbeats_are_heard_while_nothing_else_is_said(ends: Callable[..., Ends]) -> None:
    pair = ends()
    for known in range(3):
        assert pair.taker.beats_heard == known
        pair.sender.beat()
        assert pair.taker.wait_for_beat(known, LIMIT_S) == known + 1


def test_old_keys_open_nothing_once_another_channel_is_made(ends: Callable[..., Ends]) -> None:
    """A deposed publisher still knows where the memory was."""
    pair = ends()
    old, _ = pair.sender, pair.taker.close()
    pair.sender, pair.taker = pair.connect()
    with pytest.raises(ChannelError):
        send_all(old, 99, 1 << 40, random.Random(2), largest=4)
    old.close()
    pair.sender.send([records(0, 4)], LIMIT_S)
    buffer = bytearray(4 * RECORD_BYTES)
    assert pair.taker.receive_into(memoryview(buffer), LIMIT_S) == len(buffer)
    assert bytes(buffer) == bytes(records(0, 4))


def _take_until_killed(device: str, pipe: Any) -> None:
    channel = RdmaChannel(open_device(device), 256, idle_mode=1)
    pipe.send(channel.offer())
    channel.connect(pipe.recv())
    channel.beat()
    pipe.send("ready")
    while True:
        channel.receive_into(memoryview(bytearray(64 * RECORD_BYTES)), 1.0)


def test_a_peer_that_is_killed_is_noticed_by_the_sender() -> None:
    first, second = pair_of_devices()
    ours, theirs = multiprocessing.Pipe()
    peer = multiprocessing.get_context("fork").Process(target=_take_until_killed, args=(second, theirs), daemon=True)
    peer.start()
    device = open_device(first)
    channel = RdmaChannel(device, 64, idle_mode=1, peer="the victim")
    try:
        channel.connect(ours.recv())
        ours.send(channel.offer())
        assert ours.recv() == "ready"
        channel.send([records(0, 200)], LIMIT_S)
        assert peer.pid is not None
        os.kill(peer.pid, signal.SIGKILL)
        peer.join(LIMIT_S)
        with pytest.raises((ChannelError, TimeoutError), match=r"does not answer|flushed|^$"):
            send_all(channel, 200, 1 << 40, random.Random(1))
    finally:
        channel.close()
        device.close()
        peer.kill()


def test_lost_packets_cost_time_and_nothing_else(ends: Callable[..., Ends]) -> None:
    with losing(2, "rdma0"):
        pair = ends(records=1024)
        taking = pair.take(0, 5000)
        send_all(pair.sender, 0, 5000, random.Random(3), largest=100)
        taking.join(3 * LIMIT_S)
        assert (taking.next, taking.wrong, taking.error) == (5000, 0, None)


@pytest.mark.parametrize(
    "change",
    [{"records": 1000}, {"records": 1 << 30}, {"endpoint": {}}, {"address": "here"}, {"key": None}],
    ids=lambda c: str(next(iter(c.items()))),
)
def test_a_damaged_offer_is_refused(change: dict[str, Any], ends: Callable[..., Ends]) -> None:
    pair = ends()
    channel = RdmaChannel(pair.devices[0], 64, peer="a liar")
    try:
        with pytest.raises(ChannelError) as caught:
            channel.connect(pair.taker.offer() | change)
        assert caught.value.peer == "a liar"
    finally:
        channel.close()
