"""Benchmark: RDMA between two devices of this host (of Soft-RoCE: ``make test-rdma BENCH=1``), or one and itself.

Posting: what it costs the processor to describe and post one write of 64 bytes and an inline write behind it, as every publication of a
ring is, by each binding and from compiled code; completions are taken between the rounds and not counted. The ring: records of 64 bytes
through a channel, many at once, and alone, from the publisher's call until the subscriber has it. With Soft-RoCE the kernel is the card, so
that only comparisons between bindings say anything; the ring's numbers are there for context.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from tickmesh.transports.rdma import RdmaChannel
from tickmesh.transports.toolbox import loop, monotonic_ns, zeros_aligned
from tickmesh.transports.verbs import WRITE, Binding, Device, Poster, Queue, VerbsError, Write, devices, installed, open_device
from tickmesh.transports.verbs_post import C_POST_SEND, C_QUEUE, make_poster, post_writes

_BYTES, _SENDS = 1 << 16, 128
_LIMIT_S, _LOOK_S, _TIMES, _BATCH = 60.0, 0.0005, 30, 1024


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


def bench_rdma(*, rounds: int = 30, records: int = 200_000, trips: int = 1_000) -> dict[str, Any]:
    """Measure; returns plain data.

    Args:
        rounds: of each binding, in turn.
        records: through the ring.
        trips: records that go through it one by one.

    Returns:
        ``{"device", "describe_ns": {way: median}, "post_ns": {way: median of a publication}, "ring": {"records_s", "p50_ns", "p99_ns"},
        "rows", "lines"}``; what needs a device is left out where there is none.

    Raises:
        NoRdma: this host has neither a device nor a binding for Python to compare with.
    """
    found = devices()
    described = _describing(rounds)
    if not found and len(described) == 1:
        raise NoRdma("no RDMA device and no binding to compare with: pip install 'tickmesh[rdma]', or make test-rdma BENCH=1")
    posted = _posting(rounds) if found else {}
    rows = [*_rows("describing a publication, without the device's part", described), *_rows("posting a publication", posted)]
    ring = _ring(records, trips) if found else {}
    lines = [
        f"RDMA ring of 64-byte records between {found[0]} and {found[-1]}: {ring['records_s']:,.0f} records a second; one record, from the",
        f"publisher's call until the subscriber has it: p50 {ring['p50_ns'] / 1e3:,.0f} µs, p99 {ring['p99_ns'] / 1e3:,.0f} µs",
    ] if ring else []  # fmt: skip
    return {"device": found, "describe_ns": described, "post_ns": posted, "ring": ring, "rows": rows, "lines": lines}


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


def _ring(records: int, trips: int) -> dict[str, float]:
    """Records per second through a channel, and the age of one that goes alone when it is taken, by threads of this process."""
    names = devices()
    ends = [open_device(names[0]), open_device(names[-1])]
    sender, taker = RdmaChannel(ends[0], 64, idle_mode=1), RdmaChannel(ends[1], 8192, idle_mode=1)
    try:
        sender.connect(taker.offer())
        taker.connect(sender.offer())
        taker.beat()
        if sender.wait_for_beat(0, _LIMIT_S) == 0:
            raise VerbsError("the two devices do not reach each other")
        speed = _many(sender, taker, records // _BATCH * _BATCH)
        ages = _one_by_one(sender, taker, trips)
        return {"records_s": speed, "p50_ns": float(np.percentile(ages, 50)), "p99_ns": float(np.percentile(ages, 99))}
    finally:
        sender.close()
        taker.close()
        for device in ends:
            device.close()


def _many(sender: RdmaChannel, taker: RdmaChannel, records: int) -> float:
    taken = _Taking(taker, records)
    begun, batch = time.perf_counter(), memoryview(bytes(64 * _BATCH))
    for _ in range(records // _BATCH):
        sender.send([batch], _LIMIT_S)
    taken.wait_for(records)
    return records / (time.perf_counter() - begun)


def _one_by_one(sender: RdmaChannel, taker: RdmaChannel, trips: int) -> list[int]:
    taken, record = _Taking(taker, trips), np.zeros(8, np.int64)
    for trip in range(trips):
        record[0] = time.monotonic_ns()
        sender.send([record.data.cast("B")], _LIMIT_S)
        taken.wait_for(trip + 1)
    return taken.ages


class _Taking:
    """A thread that takes so many records from a channel.

    Attributes:
        ages: of the first record of each part that it took, whose first word says when it was sent.
    """

    def __init__(self, channel: RdmaChannel, records: int) -> None:
        self.ages: list[int] = []
        self._channel, self._left, self._records = channel, records, records
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        room = np.zeros(8 * 4096, np.int64)
        view = room.data.cast("B")
        while self._left > 0:
            if taken := self._channel.receive_into(view, 1.0) // 64:
                self.ages.append(time.monotonic_ns() - int(room[0]))
                self._left -= taken

    def wait_for(self, records: int) -> None:
        """Wait until so many have come. Raises NoRdma."""
        end = time.monotonic() + _LIMIT_S
        while self._records - self._left < records:
            if time.monotonic() > end:
                raise NoRdma("records do not arrive")
            time.sleep(_LOOK_S)
