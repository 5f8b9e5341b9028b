"""Benchmark: delivery of events over NATS, batch frames against one message per event with nats-py.

Four ways to get the same events into a real nats-server, each measured by the publishing process's own CPU time, so that the server's
work on another core does not count:

* ``frames``: this project's publisher, frames with acknowledgements, a window at a time, exactly once;
* ``frames_small``: the same with frames of 64 events, what a quiet market gives;
* ``jetstream_per_event``: nats-py, one JetStream message per event, acknowledgements awaited in groups;
* ``core_per_event``: nats-py, one core NATS message per event, no acknowledgement at all: nats-py at its best.
"""

from __future__ import annotations

import asyncio
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from tickmesh.node.event import EVENT, EventArray
from tickmesh.node.frames import EVENT_SIZE, FrameHeader, encode_header
from tickmesh.ops.servers import NatsServer, NatsServerOptions
from tickmesh.transports.nats import NatsLink, OutputPublisher, OutputStream, connect

_ACK_GROUP = 256


def bench_delivery(*, events: int = 1_000_000, per_event_events: int = 20_000, rounds: int = 3, batch: int = 1024) -> dict[str, Any]:
    """Measure delivery; returns plain data.

    Args:
        events: how many the frames carry, per round.
        per_event_events: how many are sent one by one, per round.
        rounds: the median of so many is reported.
        batch: events in a frame.

    Returns:
        ``{"events_per_core_s": {way: float}, "events_per_s": {way: float}, "ratio_to_core": float, "ratio_to_jetstream": float,
        "machine": str, ...}``: events per second of CPU time and of wall time, and how many times more the frames carry per core.
    """
    with tempfile.TemporaryDirectory(prefix="tickmesh-bench-") as folder, NatsServer(NatsServerOptions(Path(folder))) as server:
        results = uvloop.run(_measure(server.url, events, per_event_events, rounds, batch))
    per_core = {way: statistics.median(cpu for cpu, _ in runs) for way, runs in results.items()}
    per_second = {way: statistics.median(wall for _, wall in runs) for way, runs in results.items()}
    return {
        "events_per_core_s": per_core,
        "events_per_s": per_second,
        "ratio_to_core": per_core["frames"] / per_core["core_per_event"],
        "ratio_to_jetstream": per_core["frames"] / per_core["jetstream_per_event"],
        "batch": batch,
        "rounds": rounds,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
    }


async def _measure(url: str, events: int, single: int, rounds: int, batch: int) -> dict[str, list[tuple[float, float]]]:
    """(events per CPU second, events per second) of every way and round; the ways alternate, so that a disturbance meets all."""
    results: dict[str, list[tuple[float, float]]] = {}
    for turn in range(rounds):
        ways: list[tuple[str, int, Callable[[NatsLink], Awaitable[None]]]] = [
            ("frames", events, partial(_frames, name=f"big{turn}", count=events, batch=batch)),
            ("frames_small", events // 4, partial(_frames, name=f"small{turn}", count=events // 4, batch=64)),
            ("jetstream_per_event", single, partial(_jetstream, name=f"single{turn}", count=single)),
            ("core_per_event", single, partial(_core, count=single)),
        ]
        for way, count, send in ways:
            link = await connect(url)
            cpu, wall = time.process_time(), time.perf_counter()
            await send(link)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            results.setdefault(way, []).append((count / cpu, count / wall))
            await link.close()
    return results


def _some_events(count: int) -> EventArray:
    found = np.zeros(count, EVENT)
    found["seq"] = np.arange(1, count + 1)
    found["price"] = found["seq"] * 10**7
    return found


async def _frames(link: NatsLink, name: str, count: int, batch: int) -> None:
    def head(first: int, run: int, missing: int) -> bytes:
        return encode_header(FrameHeader(0, 1, 1, first, run, missing))

    stream = OutputStream(f"BENCH_{name}", f"bench.{name}", "0", bytes_max=1 << 30)
    publisher = OutputPublisher(link, stream, head, record_bytes=EVENT_SIZE, window=64)
    await publisher.open()
    run = _some_events(batch).view(np.uint8)
    for first in range(1, count + 1, batch):
        await publisher.publish(first, run.copy().data)  # a copy, as reading from the ring makes one
    if not await publisher.drain(60):
        raise RuntimeError(f"{publisher.in_flight} frames were not acknowledged within 60 s: {publisher.last_error}")
    await publisher.close()
    await link.client.jetstream().delete_stream(stream.name)


async def _jetstream(link: NatsLink, name: str, count: int) -> None:
    jetstream = link.client.jetstream(publish_async_max_pending=4 * _ACK_GROUP)
    await jetstream.add_stream(name=f"BENCH_{name}", subjects=[f"bench.{name}"])
    payloads = [one.tobytes() for one in _some_events(_ACK_GROUP)]
    for _ in range(count // _ACK_GROUP):
        acks = [await jetstream.publish_async(f"bench.{name}", payload) for payload in payloads]
        await asyncio.gather(*acks)
    await jetstream.delete_stream(f"BENCH_{name}")


async def _core(link: NatsLink, count: int) -> None:
    payloads = [one.tobytes() for one in _some_events(_ACK_GROUP)]
    publish = link.client.publish
    for _ in range(count // _ACK_GROUP):
        for payload in payloads:
            await publish("bench.core.event", payload)
    await link.client.flush(10)
