"""The ring between two processes, in numba and in C++: throughput in batches, and round trip of one record.

Both sides take the same steps on the same memory layout (``ring_peer.cpp`` beside this file is compiled here, with whatever of g++ and
clang++ this host has). Runs alternate, each repeat measures every implementation once, and ratios are medians of the ratios within a
repeat. Throughput is the median over windows of 65,536 records, so that a moment when other work held the core does not count.

Run it: ``python -m tickmesh.ops.bench_ring``.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tickmesh.ops.cpp_peer import built_peers
from tickmesh.transports.ring import RECORD, Ring, ring_read_batch, ring_write_batch
from tickmesh.transports.toolbox import IDLE_SPIN, cpu_pause, cycle_counter, loop, monotonic_ns, zeros_aligned

CAPACITY = 1 << 14
BATCH = 64
_READ_MAX = 256
_WINDOW = 1 << 16
_WARM_PART = 10
_LIMIT_S = 120

Result = dict[str, Any]

# ---------------------------------------------------------------- roles, compiled (the same as in ring_peer.cpp)


@loop
def _produce(ring: Any, buffer: Any, count: Any, batch: Any, stop: Any) -> Any:
    sent = 0
    while sent < count:
        size = min(batch, count - sent)
        for i in range(size):
            buffer[i].word0 = np.uint64(sent + i)
        ring_write_batch(ring, buffer, size, stop, IDLE_SPIN)
        sent += size


@loop
def _consume(ring: Any, reader: Any, buffer: Any, count: Any, marks: Any) -> Any:
    """Read `count` records; ``marks[i]`` becomes the time when window `i` began. Returns the sum of what was read."""
    got, window, total = 0, 0, np.uint64(0)
    while got < count:
        size = ring_read_batch(ring, reader, buffer, _READ_MAX)
        if size == 0:
            cpu_pause()
            continue
        if got >= window * _WINDOW:
            marks[window] = monotonic_ns()
            window += 1
        for i in range(size):
            total += buffer[i].word0
        got += size
    return total


@loop
def _ping(out: Any, back: Any, reader: Any, buffer: Any, count: Any, times: Any, stop: Any) -> Any:
    begun, first = monotonic_ns(), cycle_counter()
    for i in range(count):
        sent = cycle_counter()
        buffer[0].word0 = np.uint64(i)
        ring_write_batch(out, buffer, 1, stop, IDLE_SPIN)
        while ring_read_batch(back, reader, buffer, 1) == 0:
            cpu_pause()
        times[i] = cycle_counter() - sent
    return monotonic_ns() - begun, cycle_counter() - first


@loop
def _pong(back: Any, reader: Any, out: Any, buffer: Any, count: Any, stop: Any) -> Any:
    for _ in range(count):
        while ring_read_batch(back, reader, buffer, 1) == 0:
            cpu_pause()
        ring_write_batch(out, buffer, 1, stop, IDLE_SPIN)


def _peer(role: str, *arguments: str) -> Result:
    """Take a role in this process, as ring_peer does in its own."""
    buffer, stop = zeros_aligned(_READ_MAX, RECORD), np.zeros(1, np.int64)
    if role == "write":
        ring, count, batch = Ring.attach(arguments[0]).arrays, int(arguments[1]), int(arguments[2])
        return _run(_produce, (ring, buffer, 0, batch, stop), (ring, buffer, count, batch, stop)) or {}
    if role == "read":
        ring, slot, count = Ring.attach(arguments[0]).arrays, int(arguments[1]), int(arguments[2])
        marks = np.zeros(-(-count // _WINDOW), np.int64)
        total = _run(_consume, (ring, slot, buffer, 0, marks), (ring, slot, buffer, count, marks))
        return {"ns_per_record": float(np.median(np.diff(marks)) / _WINDOW), "sum": int(total)}
    if role == "ping":
        out, back = Ring.attach(arguments[0]).arrays, Ring.attach(arguments[1]).arrays
        slot, count = int(arguments[2]), int(arguments[3])
        times = np.zeros(count, np.int64)
        elapsed, ticks = _run(_ping, (out, back, slot, buffer, 0, times, stop), (out, back, slot, buffer, count, times, stop))
        kept = np.sort(times[count // _WARM_PART :]) * (elapsed / ticks)
        return {"p50_ns": float(kept[int((len(kept) - 1) * 0.50)]), "p99_ns": float(kept[int((len(kept) - 1) * 0.99)])}
    back, slot, out, count = Ring.attach(arguments[0]).arrays, int(arguments[1]), Ring.attach(arguments[2]).arrays, int(arguments[3])
    return _run(_pong, (back, slot, out, buffer, 0, stop), (back, slot, out, buffer, count, stop)) or {}


def _run(kernel: Any, warm: Sequence[Any], real: Sequence[Any]) -> Any:
    """Compile (or load) with a call that does nothing, say so, and go."""
    kernel(*warm)
    print("ready", flush=True)
    return kernel(*real)


# ---------------------------------------------------------------- the harness


NUMBA = [sys.executable, "-m", "tickmesh.ops.bench_ring", "peer"]


@contextlib.contextmanager
def _rings(count: int) -> Iterator[list[Ring]]:
    names = [f"bench-{uuid.uuid4().hex[:12]}" for _ in range(count)]
    with contextlib.ExitStack() as stack:
        rings = []
        for name in names:
            ring = stack.enter_context(Ring.create(name, CAPACITY, reader_timeout_ms=600_000))  # a busy host must not end a run
            stack.callback(ring.unlink)
            rings.append(ring)
        yield rings


def _start(command: Sequence[str], core: int) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0)  # unbuffered: the rest is for communicate()
    with contextlib.suppress(OSError):
        os.sched_setaffinity(child.pid, {core})
    assert child.stdout is not None
    line = child.stdout.readline()
    if line != b"ready\n":
        child.kill()
        child.wait()
        raise RuntimeError(f"{' '.join(command)} did not start: {line!r}")
    return child


def _together(first: Sequence[str], second: Sequence[str]) -> tuple[Result, Result]:
    """Run two peers, each on its own core; `first` is ready before `second` starts."""
    cores = sorted(os.sched_getaffinity(0))
    children: list[subprocess.Popen[bytes]] = []
    try:
        children.append(_start(first, cores[0]))
        children.append(_start(second, cores[-1]))
        outputs = [child.communicate(timeout=_LIMIT_S)[0] for child in reversed(children)]
    finally:
        for child in children:
            child.kill()
            child.wait()
    return json.loads(outputs[1]), json.loads(outputs[0])


def measure_throughput(writer: Sequence[str], reader: Sequence[str], count: int) -> float:
    """Nanoseconds per record from one process to another, in batches of 64: the median of the reader's windows. At least three windows."""
    with _rings(1) as [ring]:
        slot = ring.reader("bench").slot
        assert ring.name
        result, _ = _together([*reader, "read", ring.name, str(slot), str(count)], [*writer, "write", ring.name, str(count), str(BATCH)])
    if result["sum"] != count * (count - 1) // 2:
        raise RuntimeError(f"records were lost or changed: sum {result['sum']}")
    return float(result["ns_per_record"])


def measure_round_trip(one: Sequence[str], other: Sequence[str], count: int) -> Result:
    """Percentiles in ns of one record there and back."""
    with _rings(2) as [out, back]:
        there, here = out.reader("pong").slot, back.reader("ping").slot
        assert out.name
        assert back.name
        pong = [*other, "pong", out.name, str(there), back.name, str(count)]
        _, result = _together(pong, [*one, "ping", out.name, back.name, str(here), str(count)])
    return result


def _compilers() -> tuple[dict[str, list[str]], dict[str, str]]:
    """Commands of the C++ peers that could be built, and why others could not."""
    built, skipped = built_peers("ring_peer.cpp", shared=False)
    return {compiler: [str(path)] for compiler, path in built.items()}, skipped


def bench_ring(repeats: int = 21, records: int = 500_000, trips: int = 20_000) -> Result:
    """Measure and compare; medians over `repeats`. Ratios are tickmesh / C++: below 1 means that tickmesh is faster.

    Many short repeats rather than few long ones: a host that moves our processors from core to core changes everything threefold meanwhile.

    Returns:
        ``{"machine", "cores", "repeats", "skipped": {compiler: reason}, "throughput_ns": {...}, "round_trip_p50_ns": {...},
        "round_trip_p99_ns": {...}}``; each of the last three maps ``tickmesh`` and each compiler to its median, and ``ratio`` to the
        paired ratios by compiler.
    """
    commands, skipped = _compilers()
    contestants = {"tickmesh": NUMBA, **commands}
    samples: dict[str, dict[str, list[float]]] = {}
    order = list(contestants)
    for repeat in range(repeats):
        for name in order if repeat % 2 == 0 else reversed(order):
            command = contestants[name]
            trip = measure_round_trip(command, command, trips)
            values = {
                "throughput_ns": measure_throughput(command, command, records),
                "round_trip_p50_ns": trip["p50_ns"],
                "round_trip_p99_ns": trip["p99_ns"],
            }
            for metric, value in values.items():
                samples.setdefault(metric, {}).setdefault(name, []).append(value)
    return {
        "machine": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "repeats": repeats,
        "skipped": skipped,
        **{metric: _summary(by_name) for metric, by_name in samples.items()},
    }


def _summary(by_name: dict[str, list[float]]) -> Result:
    ours = by_name["tickmesh"]
    ratios = {name: statistics.median(a / b for a, b in zip(ours, theirs)) for name, theirs in by_name.items() if name != "tickmesh"}
    return {name: round(statistics.median(values), 2) for name, values in by_name.items()} | {
        "ratio": {name: round(ratio, 3) for name, ratio in ratios.items()}
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["peer"]:
        print(json.dumps(_peer(*sys.argv[2:])))
    else:
        print(json.dumps(bench_ring(), indent=2))
