"""Benchmark: RDMA between two devices of this host (of Soft-RoCE: ``make test-rdma BENCH=1``), or one and itself.

Posting: what it costs the processor to describe and post one write of 64 bytes and an inline write behind it, as every publication of a
ring is, by each binding and from compiled code; completions are taken between the rounds and not counted. The ring: records of 64 bytes
through a channel, and outputs, one at a time, from the publisher's output ring until the subscriber's loop has an event of it. With
Soft-RoCE the kernel is the card, so that only comparisons between bindings say anything; the ring's numbers are there for context.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any

import numpy as np

from tickmesh.control.config import Config, parse_config
from tickmesh.node.event import EVENT, REFERENCE, EventArray, Kind
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.rdma_delivery import HEARTBEAT_S, Published, RdmaPublisher
from tickmesh.node.rdma_source import RdmaReceiver
from tickmesh.node.receivers import ReceiverContext
from tickmesh.node.replication_link import LinkOptions
from tickmesh.transports.rdma import RdmaChannel
from tickmesh.transports.ring import Ring
from tickmesh.transports.toolbox import IDLE_YIELD, loop, monotonic_ns, zeros_aligned
from tickmesh.transports.verbs import WRITE, Binding, Device, Poster, Queue, VerbsError, Write, devices, installed, open_device
from tickmesh.transports.verbs_post import C_POST_SEND, C_QUEUE, make_poster, post_writes

_BYTES, _SENDS = 1 << 16, 128
_LIMIT_S, _LOOK_S, _TIMES = 60.0, 0.0005, 30
_WARM_PART = 10
_TICK = 10_000_000


class NoRdma(Exception):
    """There is nothing to measure."""


@loop
def _post_many(poster: Any, writes: Any, times: Any) -> Any:
    """Post the same two writes so often; nanoseconds for one time."""
    begun = monotonic_ns()
    for _ in range(times):
        if post_writes(poster, writes, 2) != 0:
            return np.int64(-1)
    return (monotonic_ns() - begun) // times


class _Pair:
    """Two connected queues, and memory on both sides."""

    def __init__(self, binding: Binding) -> None:
        names = devices()
        self.ends: list[tuple[Device, Any, Any, Queue]] = []
        for name in (names[0], names[-1]):
            device, memory = open_device(name, binding=binding), zeros_aligned(_BYTES, np.uint8)
            region = device.region(memory.ctypes.data, _BYTES)
            self.ends.append((device, memory, region, device.queue(sends=_SENDS, receives=1, inline_bytes=64)))
        first, second = self.queue, self.ends[1][3]
        ours, theirs = first.endpoint(), second.endpoint()
        second.connect(ours)
        first.connect(theirs)

    @property
    def queue(self) -> Queue:
        return self.ends[0][3]

    def publication(self, *, signaled: bool) -> list[Write]:
        here, there = self.ends[0][2], self.ends[1][2]
        data = Write(here.address + 64, here.lkey, 64, there.address + 64, there.rkey)
        return [data, Write(here.address, here.lkey, 24, there.address, there.rkey, signaled=signaled, inline=True)]

    def settle(self) -> None:
        """Wait until everything posted has completed."""
        self.queue.write(self.publication(signaled=True))
        end = time.monotonic() + _LIMIT_S
        while not self.queue.poll(8):
            if time.monotonic() > end:
                raise NoRdma("writes do not complete")

    def close(self) -> None:
        for device, _, region, queue in self.ends:
            queue.close()
            region.close()
            device.close()


def bench_rdma(*, rounds: int = 30, records: int = 200_000, outputs: int = 2_000) -> dict[str, Any]:
    """Measure; returns plain data.

    Args:
        rounds: of each binding, in turn.
        records: through the ring.
        outputs: from a publisher to a subscriber, one at a time.

    Returns:
        ``{"device", "describe_ns": {way: median}, "post_ns": {way: median of a publication}, "ring_records_s", "to_subscriber_ns": {p50,
        p99}, "rows", "lines"}``; what needs a device is left out where there is none.

    Raises:
        NoRdma: this host has neither a device nor a binding for Python to compare with.
    """
    found = devices()
    described = _describing(rounds)
    if not found and len(described) == 1:
        raise NoRdma("no RDMA device and no binding to compare with: pip install 'tickmesh[rdma]', or make test-rdma BENCH=1")
    posted = _posting(rounds) if found else {}
    rows = [*_rows("describing a publication, without the device's part", described), *_rows("posting a publication", posted)]
    speed = _ring(records) if found else None
    ages = _to_subscriber(outputs) if found else None
    lines = [f"RDMA ring between {found[0]} and {found[-1]}: {speed:,.0f} records of 64 bytes a second"] if speed else []
    if ages:
        p50, p99 = ages["p50"] / 1e3, ages["p99"] / 1e3
        lines.append(f"RDMA, an output from the publisher's ring to the subscriber's: p50 {p50:,.0f} µs, p99 {p99:,.0f} µs")
    return {
        "device": found, "describe_ns": described, "post_ns": posted, "ring_records_s": speed, "to_subscriber_ns": ages, "rows": rows,
        "lines": lines,
    }  # fmt: skip


def _rows(name: str, costs: dict[str, float]) -> list[dict[str, Any]]:
    ours = costs.get("compiled", 0.0)
    return [
        {"name": f"RDMA: {name}", "unit": "ns", "ours": ours, "theirs": cost, "peer": way, "ratio": cost / ours, "target": 5.0}
        for way, cost in costs.items()
        if way != "compiled" and ours
    ]


def _describing(rounds: int) -> dict[str, float]:
    """Nanoseconds to describe a publication: work requests made by the bindings, or by our kernel, which hands them to a function of
    libc that does nothing."""
    ways: dict[str, Callable[[], float]] = {}
    data = Write(1 << 20, 1, 64, 1 << 21, 2)
    chain = [data, data._replace(length=24, inline=True)]
    if installed("pyverbs"):
        from tickmesh.transports.verbs_pyverbs import described as by_pyverbs

        ways["pyverbs"] = lambda: _timed(lambda: by_pyverbs(chain))
    if installed("ibverbs"):
        from tickmesh.transports.verbs_wheel import described as by_wheel

        ways["ibverbs"] = lambda: _timed(lambda: by_wheel(chain))
    poster, writes = make_poster(), zeros_aligned(2, WRITE)
    nothing = ctypes.cast(ctypes.CDLL(None).isalpha, ctypes.c_void_p).value or 0
    poster.calls[C_POST_SEND], poster.calls[C_QUEUE] = nothing, 1 << 32  # isalpha(0) is 0
    for i, write in enumerate(chain):
        writes[i] = write.planned()
    ways["compiled"] = lambda: float(_post_many(poster, writes, np.int64(100 * _TIMES)))
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, measure in ways.items():
            found[way].append(measure())
    return {way: median(costs) for way, costs in found.items()}


def _timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter_ns()
    for _ in range(10 * _TIMES):
        call()
    return (time.perf_counter_ns() - begun) / (10 * _TIMES)


def _posting(rounds: int) -> dict[str, float]:
    """Nanoseconds of a publication by each way there is, medians of alternating rounds."""
    ways: dict[str, tuple[_Pair, Callable[[_Pair], float]]] = {}
    for binding in ("pyverbs", "ibverbs"):
        if installed(binding):
            ways[binding] = (_Pair(binding), _by_binding)
    if installed("libibverbs"):
        ways["compiled"] = (_Pair("libibverbs"), _by_kernel)
    found: dict[str, list[float]] = {way: [] for way in ways}
    try:
        for _ in range(rounds):
            for way, (pair, measure) in ways.items():
                found[way].append(measure(pair))
                pair.settle()
    finally:
        for pair, _ in ways.values():
            pair.close()
    return {way: median(costs) for way, costs in found.items()}


def _by_binding(pair: _Pair) -> float:
    queue, begun = pair.queue, time.perf_counter_ns()
    for _ in range(_TIMES):
        queue.write(pair.publication(signaled=False))
    return (time.perf_counter_ns() - begun) / _TIMES


def _by_kernel(pair: _Pair) -> float:
    poster, writes = pair.queue.poster, zeros_aligned(2, WRITE)
    assert isinstance(poster, Poster)
    for i, write in enumerate(pair.publication(signaled=False)):
        writes[i] = write.planned()
    return float(_post_many(poster, writes, np.int64(_TIMES)))


def _ring(records: int) -> float:
    """Records per second through a channel, by threads of this process."""
    names = devices()
    ends = [open_device(names[0]), open_device(names[-1])]
    sender, taker = RdmaChannel(ends[0], 64, idle_mode=1), RdmaChannel(ends[1], 8192, idle_mode=1)
    try:
        sender.connect(taker.offer())
        taker.connect(sender.offer())
        taker.beat()
        if sender.wait_for_beat(0, _LIMIT_S) == 0:
            raise VerbsError("the two devices do not reach each other")
        taking = threading.Thread(target=_take, args=(taker, records), daemon=True)
        taking.start()
        begun, batch = time.perf_counter(), memoryview(bytes(64 * 1024))
        for _ in range(records // 1024):
            sender.send([batch], _LIMIT_S)
        taking.join(_LIMIT_S)
        return records // 1024 * 1024 / (time.perf_counter() - begun)
    finally:
        sender.close()
        taker.close()
        for device in ends:
            device.close()


def _take(channel: RdmaChannel, records: int) -> None:
    left, room = records // 1024 * 1024, memoryview(bytearray(64 * 4096))
    while left > 0:
        left -= channel.receive_into(room, 1.0) // 64


# ---------------------------------------------------------------- from a publisher to a subscriber


def _to_subscriber(outputs: int) -> dict[str, float]:
    """Age of an output when the subscriber's loop has made an event of it, percentiles in ns; both sides as in nodes, in this process."""
    names, output, events = devices(), Ring.create(None, 1024, EVENT, mode="lossy"), Ring.create(None, 1 << 16, EVENT)
    with ExitStack() as closing, output, events:
        options = LinkOptions("bench", "publisher", heartbeat_s=HEARTBEAT_S, timeout_s=_LIMIT_S, idle=IDLE_YIELD)
        publisher = RdmaPublisher(options, device=names[0]).start()
        closing.callback(publisher.stop)
        publisher.publish(0, Published(output, 1, 1, _references, frozenset({Kind.TRADE})))
        context = ReceiverContext(InstrumentTable(8), [events], 0, IDLE_YIELD)
        receiver = RdmaReceiver("publisher", _subscribing(names[-1], publisher.port), context)
        closing.callback(receiver.close)
        closing.callback(receiver.join, _LIMIT_S)
        closing.callback(receiver.ask_stop)
        reader = events.reader("bench")
        receiver.start()
        _wait_for(lambda: receiver.counters()["connected"], "the subscriber does not connect")
        reader.read()  # what it says of the beginning
        taken: list[EventArray] = []
        for seq in range(1, outputs + 1):
            output.writer.write(_trade(seq))
            _wait_for(lambda: reader.lag, "an output does not arrive")
            taken.append(reader.read())
    found = np.concatenate(taken)
    trades = found[found["kind"] == Kind.TRADE]
    if trades["seq"].tolist() != list(range(1, outputs + 1)):
        raise NoRdma("outputs were lost, or came twice")
    ages = (trades["ts_recv"] - trades["ts_event"])[outputs // _WARM_PART :]
    return {"p50": float(np.percentile(ages, 50)), "p99": float(np.percentile(ages, 99))}


def _subscribing(device: str, port: int) -> Config:
    return parse_config(
        f"""
        [cluster]
        node = "subscriber"
        rdma_device = "{device}"
        [data_sources.publisher]
        type = "rdma"
        endpoint = "rdma://127.0.0.1:{port}"
        """
    )


def _references() -> EventArray:
    reference = np.zeros(1, REFERENCE)
    reference["kind"], reference["tick_size"], reference["symbol"] = Kind.REFERENCE, _TICK, b"ALFA"
    return reference.view(EVENT)


def _trade(seq: int) -> EventArray:
    trade = np.zeros(1, EVENT)
    trade["kind"], trade["seq"], trade["price"], trade["qty"], trade["ts_event"] = Kind.TRADE, seq, _TICK, 1, time.time_ns()
    return trade


def _wait_for(condition: Callable[[], object], missing: str) -> None:
    end = time.monotonic() + _LIMIT_S
    while not condition():
        if time.monotonic() > end:
            raise NoRdma(missing)
        time.sleep(_LOOK_S)
