"""The mapped counters of a node process: what `status` and `top` read from outside, at no cost to the loops that write them.

One file per node, ``/dev/shm/tickmesh-CLUSTER.NODE.counters`` (a dot, which no name contains, so that two nodes never share a file).
It is a counter file of :mod:`tickmesh.transports.counters` with these names:

* ``node.COUNTER``: :class:`NodeCounter`;
* ``source.NAME.COUNTER``: :class:`SourceCounter`, one set per configured source;
* ``shard.NUMBER.COUNTER``: :class:`ShardCounter`, and histograms ``shard.NUMBER.receive_to_output`` and ``….batch_events``;
* ``delivery.NAME.NUMBER.COUNTER``: :class:`DeliveryCounter`, one set per delivery and shard, and the histogram ``….receive_to_stored``.

A compiled loop writes its own set through the arrays of :meth:`Telemetry.shard`:
``counter_set(t.values, t.base + ShardCounter.OUTPUTS, n)``. Everything else is mirrored by Python now and then with
:meth:`Telemetry.set` or :meth:`Telemetry.update`.

The node holds a lock on the file while it lives, which the kernel lets go when the process ends: that is how a reader knows.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from tickmesh.transports.counters import (
    Counter,
    CounterFile,
    CountersNotFound,
    Histogram,
    Values,
    counters_path,
    histogram_record_n,
    list_counters,
)
from tickmesh.transports.toolbox import quick


class NodeState(IntEnum):
    """What a node is doing."""

    STARTING = 0
    RUNNING = 1
    STOPPING = 2
    STOPPED = 3
    FAILED = 4
    COMPILING = 5


class NodeCounter(IntEnum):
    """The node itself; times are wall clock, ns since the epoch."""

    STATE = 0
    PID = 1
    STARTED_NS = 2
    HEARTBEAT_NS = 3


class SourceCounter(IntEnum):
    """One source, as its receiver counts."""

    MESSAGES = 0
    EVENTS = 1
    BYTES = 2
    PACKETS = 3
    MALFORMED = 4
    GAPS = 5
    MISSING = 6
    DUPLICATES = 7
    FILTERED = 8
    RING_FULL = 9
    DROPPED_BY_KERNEL = 10
    CONNECTED = 11
    RECONNECTS = 12
    CONNECT_FAILURES = 13
    OVERFLOWED = 14
    WAY = 15
    WAY_BECAUSE = 16
    RX_DROPPED = 17
    RX_RING_FULL = 18
    TRUNCATED = 19
    FRAGMENTS = 20
    TAGGED = 21
    BAD_CHECKSUM = 22
    NOT_WANTED = 23
    REQUESTS = 24
    RECOVERED = 25
    GIVEN_UP = 26
    BOOKS_WAITING = 27
    SNAPSHOTS_ASKED = 28
    SNAPSHOTS_FAILED = 29
    CHECKSUMS_FAILED = 30
    RESTARTS = 31
    ERRORS = 32
    UNCHANGED = 33
    SKIPPED = 34
    EMPTY_MESSAGES = 35
    ROTATIONS = 36
    TRUNCATIONS = 37
    COUNTED = 38
    SNAPSHOTS = 39
    BOOKS_RECOVERED = 40
    SNAPSHOTS_TOO_OLD = 41
    SNAPSHOTS_AHEAD = 42
    SNAPSHOTS_NOT_KEPT = 43
    SNAPSHOTS_TOO_LARGE = 44
    SNAPSHOT_TURNS = 45
    SNAPSHOT_TURNS_BROKEN = 46
    DEFINITION_PACKETS = 47
    DEFINITION_TURNS = 48
    DEFINITIONS_NEW = 49


class ShardCounter(IntEnum):
    """One shard."""

    EVENTS_IN = 0
    REFUSED = 1
    OUTPUTS = 2
    BLOCKED = 3
    TRADES = 4
    BBO = 5
    SIGNALS = 6
    ALERTS = 7
    CROSSED = 8
    ORDERS = 9
    INSTRUMENTS = 10
    JOURNAL_RECORDS = 11
    CONFIG_VERSION = 12
    OUTPUT_LAG = 13
    JOURNAL_DROPPED = 14
    FROM_SHARDS = 15
    NOT_WAITED = 16


class DeliveryCounter(IntEnum):
    """One delivery of one shard's outputs."""

    FRAMES = 0
    EVENTS = 1
    ACKS = 2
    RETRIES = 3
    RECONNECTS = 4
    SKIPPED = 5
    LAG = 6


NODE_ABOUT = {
    NodeCounter.STATE: "0 starting, 1 running, 2 stopping, 3 stopped, 4 failed, 5 compiling its loops",
    NodeCounter.PID: "process id",
    NodeCounter.STARTED_NS: "when the process made this file",
    NodeCounter.HEARTBEAT_NS: "when the main thread last mirrored its numbers",
}
SOURCE_ABOUT = {
    SourceCounter.MESSAGES: "protocol messages decoded",
    SourceCounter.EVENTS: "events handed to shards",
    SourceCounter.BYTES: "bytes received",
    SourceCounter.PACKETS: "datagrams or records received",
    SourceCounter.MALFORMED: "messages and packets that break the protocol",
    SourceCounter.GAPS: "runs of source sequences that never came",
    SourceCounter.MISSING: "source sequences in those gaps",
    SourceCounter.DUPLICATES: "messages that had come before, on this or the other line",
    SourceCounter.FILTERED: "messages of symbols that the configuration leaves out",
    SourceCounter.RING_FULL: "waits for a shard's input ring",
    SourceCounter.DROPPED_BY_KERNEL: "datagrams that there was no room for in the socket's buffer, the packet ring or AF_XDP's frames",
    SourceCounter.CONNECTED: "1 while a source that connects is connected",
    SourceCounter.RECONNECTS: "connections that were lost",
    SourceCounter.CONNECT_FAILURES: "tries to connect, or to log in, that failed",
    SourceCounter.OVERFLOWED: "messages left out because the buffer was full",
    SourceCounter.WAY: "how datagrams come in: 0 sockets, 1 packet ring, 2 AF_XDP",
    SourceCounter.WAY_BECAUSE: "why not by a better way: 0 there is none, 1 configured, else what is missing (`tickmesh doctor` lists it)",
    SourceCounter.RX_DROPPED: "of dropped_by_kernel: frames larger than AF_XDP's",
    SourceCounter.RX_RING_FULL: "of dropped_by_kernel: no room, since the loop was too slow",
    SourceCounter.TRUNCATED: "datagrams shorter than their headers say, or longer than a socket's slot",
    SourceCounter.FRAGMENTS: "fragments of datagrams, which AF_XDP and packet rings do not put together",
    SourceCounter.TAGGED: "datagrams of a VLAN, which AF_XDP and packet rings leave to its own interface",
    SourceCounter.BAD_CHECKSUM: "datagrams whose IP or UDP checksum does not hold (sockets: the kernel counts them)",
    SourceCounter.NOT_WANTED: "datagrams of other groups, ports or senders that came through the filter",
    SourceCounter.REQUESTS: "requests to the re-request server",
    SourceCounter.RECOVERED: "missing source sequences that its answers brought",
    SourceCounter.GIVEN_UP: "missing source sequences that it did not bring: they are in gaps",
    SourceCounter.BOOKS_WAITING: "books that wait for a snapshot now: of a venue's JSON, or of a feed with a snapshot channel",
    SourceCounter.SNAPSHOTS_ASKED: "snapshots that were asked for, by request or by subscribing again",
    SourceCounter.SNAPSHOTS_FAILED: "of those, requests that failed, and books that no subscription names",
    SourceCounter.CHECKSUMS_FAILED: "books whose checksum was not the venue's",
    SourceCounter.RESTARTS: "books whose updates the venue counts anew, so that all are older than the book",
    SourceCounter.ERRORS: "answers of a venue that are errors; looks at a followed file that failed",
    SourceCounter.UNCHANGED: "HTTP polls answered with nothing new",
    SourceCounter.SKIPPED: "SoupBinTCP messages left out since they had come before",
    SourceCounter.EMPTY_MESSAGES: "SoupBinTCP messages that are empty",
    SourceCounter.ROTATIONS: "times that a followed file was replaced",
    SourceCounter.TRUNCATIONS: "times that a followed file was shortened",
    SourceCounter.COUNTED: "what the adapter counts besides (`self.sink.count`; a FIX session), all together",
    SourceCounter.SNAPSHOTS: "snapshots of a snapshot channel that were looked at, since books were waiting",
    SourceCounter.BOOKS_RECOVERED: "books that snapshots have brought back",
    SourceCounter.SNAPSHOTS_TOO_OLD: "of the snapshots, those from before the gap: the loop's next turn may do",
    SourceCounter.SNAPSHOTS_AHEAD: "of the snapshots, those that contain what the lines have not brought yet",
    SourceCounter.SNAPSHOTS_NOT_KEPT: "of the snapshots, those older than the packets that are kept",
    SourceCounter.SNAPSHOTS_TOO_LARGE: "of the snapshots, books with more levels than there is room for",
    SourceCounter.SNAPSHOT_TURNS: "turns of the snapshot channel's loop that have begun",
    SourceCounter.SNAPSHOT_TURNS_BROKEN: "of those, turns while books were waiting that lacked a packet or a snapshot",
    SourceCounter.DEFINITION_PACKETS: "of the packets, those of the definition channel",
    SourceCounter.DEFINITION_TURNS: "turns of the definition channel's loop that have begun",
    SourceCounter.DEFINITIONS_NEW: "instruments that its definitions have made known",
}
SHARD_ABOUT = {
    ShardCounter.EVENTS_IN: "input events taken",
    ShardCounter.REFUSED: "input events the book refused",
    ShardCounter.OUTPUTS: "output events published in the ring",
    ShardCounter.BLOCKED: "waits for room in the output ring",
    ShardCounter.TRADES: "printed trades",
    ShardCounter.BBO: "BBO events",
    ShardCounter.SIGNALS: "SIGNAL events",
    ShardCounter.ALERTS: "ALERT events",
    ShardCounter.CROSSED: "instruments whose book is crossed or locked",
    ShardCounter.ORDERS: "resting orders",
    ShardCounter.INSTRUMENTS: "instruments seen",
    ShardCounter.JOURNAL_RECORDS: "events in the journal",
    ShardCounter.CONFIG_VERSION: "version of the configuration in use",
    ShardCounter.OUTPUT_LAG: "outputs the slowest reader of the output ring has not read",
    ShardCounter.JOURNAL_DROPPED: "journal segments deleted because of journal.keep_mb or keep_hours",
    ShardCounter.FROM_SHARDS: "best bids and offers and trades taken of other shards",
    ShardCounter.NOT_WAITED: "of those and our own, events of full legs that did not wait for the other legs",
}
DELIVERY_ABOUT = {
    DeliveryCounter.FRAMES: "frames sent",
    DeliveryCounter.EVENTS: "events in them",
    DeliveryCounter.ACKS: "frames acknowledged",
    DeliveryCounter.RETRIES: "frames sent again",
    DeliveryCounter.RECONNECTS: "connections made after the first",
    DeliveryCounter.SKIPPED: "outputs not sent as a message of their own: over the rate, or no connection",
    DeliveryCounter.LAG: "outputs in the ring, not read yet",
}
_GAUGES: frozenset[IntEnum] = frozenset(
    [*NodeCounter, SourceCounter.CONNECTED, SourceCounter.WAY, SourceCounter.WAY_BECAUSE,
     SourceCounter.BOOKS_WAITING, ShardCounter.CROSSED, ShardCounter.ORDERS, ShardCounter.INSTRUMENTS,
     ShardCounter.CONFIG_VERSION, ShardCounter.OUTPUT_LAG, DeliveryCounter.LAG]
)  # fmt: skip
_LOCK = struct.Struct("hhqqi4x")
"""``struct flock``: type, whence, start, length, pid."""

# ---------------------------------------------------------------- errors


class TelemetryError(Exception):
    """Something about a node's counters; `path` is their file."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


class NodeRunning(TelemetryError):
    """A node of this name runs on this host already; `pid`."""

    def __init__(self, path: Path, cluster: str, node: str, pid: int) -> None:
        super().__init__(
            path, f"node {node!r} of cluster {cluster!r} runs on this host already (pid {pid}); stop it, or choose another [cluster] node"
        )
        self.cluster, self.node, self.pid = cluster, node, pid


# ---------------------------------------------------------------- names and places


class NodeName(NamedTuple):
    """Which node a file of counters belongs to."""

    cluster: str
    node: str
    path: Path


def telemetry_path(cluster: str, node: str) -> Path:
    """Where the counters of a node lie: ``/dev/shm/tickmesh-CLUSTER.NODE.counters``."""
    return counters_path(f"{cluster}.{node}")


def configuration_path(cluster: str, node: str) -> Path:
    """Where a node that follows a store says what it runs and what it has refused, as JSON, for `tickmesh status`."""
    return telemetry_path(cluster, node).with_suffix(".config")


def find_nodes() -> list[NodeName]:
    """The nodes that have, or had, counters on this host, sorted."""
    found = [name.split(".") for name in list_counters()]
    return [NodeName(parts[0], parts[1], telemetry_path(*parts)) for parts in found if len(parts) == 2]


def counter_name(prefix: str, counter: IntEnum) -> str:
    """Label of a counter in the file: ``counter_name("shard.0", ShardCounter.EVENTS_IN) == "shard.0.events_in"``."""
    return f"{prefix}.{counter.name.lower()}"


def _counters(prefix: str, about: Mapping[Any, str]) -> list[Counter]:
    """A set of counters in the order of its enumeration: the file keeps a group's order, so that `base + counter` is its index."""
    return [
        Counter(counter_name(prefix, c), "ns" if c.name.endswith("_NS") else "", text, "gauge" if c in _GAUGES else "counter", prefix)
        for c, text in about.items()
    ]


# ---------------------------------------------------------------- what a loop gets


class SourceTelemetry(NamedTuple):
    """What a receiver writes: counter `c` of :class:`SourceCounter` is ``values[base + c]``."""

    values: Values
    base: np.int64


class ShardTelemetry(NamedTuple):
    """What a shard's loop writes: counter `c` of :class:`ShardCounter` is ``values[base + c]``; histograms take ``histogram_record``."""

    values: Values
    base: np.int64
    receive_to_output: Values
    """ns from an event's `ts_recv` to the moment when its outputs are in the ring."""
    batch_events: Values
    """Events taken from the input ring at once."""


class DeliveryTelemetry(NamedTuple):
    """What a delivery writes for one shard: counter `c` of :class:`DeliveryCounter` is ``values[base + c]``."""

    values: Values
    base: np.int64
    receive_to_stored: Values
    """ns from the `ts_recv` of the event that an output came from to the server's acknowledgement; every output delivered counts once."""


@dataclass(frozen=True)
class _Sets:
    """Prefixes of the sets in a file, in order."""

    sources: list[str]
    shards: list[int]
    deliveries: list[tuple[str, int]]


AGE_MAX_NS = 3_600_000_000_000
"""Older stamps are those of a recording, or of a time before a restart: they are no latency of ours."""


@quick
def record_ages(histogram: Any, now_ns: Any, stamps: Any) -> Any:
    """Record how long ago many stamps are, from Python, for a histogram that no loop writes; those beyond :data:`AGE_MAX_NS` are left out.

    Args:
        histogram: e.g. `receive_to_stored` of :meth:`Telemetry.delivery`.
        now_ns: the time now, i64.
        stamps: i64 ns, shape ``(n,)``.
    """
    first = 0
    while first < stamps.size:
        end = first + 1
        while end < stamps.size and stamps[end] == stamps[first]:  # outputs of one packet
            end += 1
        age = now_ns - stamps[first]
        if 0 <= age < AGE_MAX_NS:
            histogram_record_n(histogram, age, end - first)
        first = end


# ---------------------------------------------------------------- the file


class Telemetry:
    """A node's counters: :meth:`create` by the node, :meth:`attach` by anybody else (read-only)."""

    def __init__(self, file: CounterFile, lock: int | None = None) -> None:
        self.file = file
        self._lock = lock
        self._sets = _sets(file.about.index)

    @classmethod
    def create(cls, cluster: str, node: str, sources: Sequence[str], shards: int, deliveries: Sequence[str] = ()) -> Telemetry:
        """Make the file, in place of the one that an earlier run left.

        Raises:
            NodeRunning: a node of this name runs.
            CountersNoSpace: no memory for it.
            CountersLayoutMismatch: something else lies there.
        """
        path = telemetry_path(cluster, node)
        if is_alive(path):
            raise NodeRunning(path, cluster, node, _pid(path))
        counters, histograms = _layout(sources, shards, deliveries)
        file = CounterFile.create(path, counters, histograms)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
            ours = CounterFile.attach(path).about == file.about  # not one that another node has just put in its place
        except OSError:
            ours = False
        if not ours:
            os.close(fd)
            raise NodeRunning(path, cluster, node, _pid(path))
        telemetry = cls(file, fd)
        telemetry.update("node", {"pid": os.getpid(), "started_ns": time.time_ns(), "heartbeat_ns": time.time_ns()})
        return telemetry

    def relabel(self, sources: Sequence[str], shards: int, deliveries: Sequence[str]) -> None:
        """Make another file in place of this one, for other sources and deliveries; numbers of what stays go along.

        Arrays taken before still lie in the old file: take them anew.
        """
        old, lock = self.file, self._lock
        file = CounterFile.create(old.path, *_layout(sources, shards, deliveries))
        fd = os.open(old.path, os.O_RDWR | os.O_CLOEXEC)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
        for name, index in file.about.index.items():
            if name in old.about.index:
                file.values[index] = old.values[old.about.index[name]]
        for name in file.about.histograms:
            if name in old.about.histograms:
                file.histogram(name)[:] = old.histogram(name)
        self.file, self._lock, self._sets = file, fd, _sets(file.about.index)
        if lock is not None:
            os.close(lock)

    @classmethod
    def attach(cls, cluster: str, node: str) -> Telemetry:
        """Read a node's counters.

        Raises:
            CountersNotFound: there are none.
            CountersLayoutMismatch: they are of another version.
        """
        return cls(CounterFile.attach(telemetry_path(cluster, node)))

    # -- writing

    def set(self, name: str, value: int) -> None:
        """Set a counter by its label, e.g. ``set("source.nasdaq.messages", 12)``. For numbers that no loop writes itself.

        Raises:
            KeyError: there is no such counter.
        """
        self.file.values[self.file.about.index[name]] = value

    def has(self, prefix: str) -> bool:
        """Whether there are counters of this set."""
        return any(name.startswith(f"{prefix}.") for name in self.file.about.index)

    def update(self, prefix: str, numbers: Mapping[str, int]) -> None:
        """Set several counters of one set, e.g. ``update("delivery.events.0", {"frames": 7, "acks": 7})``.

        Raises:
            KeyError: there is no such counter.
        """
        for name, value in numbers.items():
            self.set(f"{prefix}.{name}", value)

    def set_state(self, state: NodeState) -> None:
        """Say what the node is doing."""
        self.set("node.state", state)
        self.beat()

    def beat(self) -> None:
        """Say that the main thread is alive; once per second or more often."""
        self.set("node.heartbeat_ns", time.time_ns())

    def source(self, name: str) -> SourceTelemetry:
        """The arrays that the receiver of source `name` writes."""
        return SourceTelemetry(self.file.values, self._base(f"source.{name}", SourceCounter.MESSAGES))

    def shard(self, number: int) -> ShardTelemetry:
        """The arrays that the loop of a shard writes."""
        prefix = f"shard.{number}"
        histograms = (self.file.histogram(f"{prefix}.{name}") for name in ("receive_to_output", "batch_events"))
        return ShardTelemetry(self.file.values, self._base(prefix, ShardCounter.EVENTS_IN), *histograms)

    def delivery(self, name: str, shard: int) -> DeliveryTelemetry:
        """The arrays that delivery `name` writes for a shard."""
        prefix = f"delivery.{name}.{shard}"
        base = self._base(prefix, DeliveryCounter.FRAMES)
        return DeliveryTelemetry(self.file.values, base, self.file.histogram(f"{prefix}.receive_to_stored"))

    def _base(self, prefix: str, first: IntEnum) -> np.int64:
        return np.int64(self.file.index(counter_name(prefix, first)))

    # -- reading

    def reading(self) -> dict[str, Any]:
        """All numbers now; see :func:`read_telemetry`."""
        taken = self.file.snapshot()
        counters, histograms, now_ns = taken["counters"], taken["histograms"], time.time_ns()
        node = _numbers(counters, "node", NodeCounter)
        cluster, _, name = self.file.about.name.partition(".")
        deliveries: dict[str, list[dict[str, Any]]] = {}
        for delivery, shard in self._sets.deliveries:
            prefix = f"delivery.{delivery}.{shard}"
            numbers = _numbers(counters, prefix, DeliveryCounter)
            latency = histograms[f"{prefix}.receive_to_stored"]
            deliveries.setdefault(delivery, []).append({"shard": shard, **numbers, "receive_to_stored": latency})
        alive = is_alive(self.file.path)
        return {
            "cluster": cluster,
            "node": name,
            "path": str(self.file.path),
            "pid": node["pid"],
            "alive": alive,
            "state": _state_name(node["state"]),
            "started_ns": node["started_ns"],
            "uptime_s": max(0, (now_ns if alive else node["heartbeat_ns"]) - node["started_ns"]) / 1e9,
            "heartbeat_age_s": max(0, now_ns - node["heartbeat_ns"]) / 1e9,
            "sources": {source: _numbers(counters, f"source.{source}", SourceCounter) for source in self._sets.sources},
            "shards": [{"shard": k, **_shard_numbers(counters, histograms, f"shard.{k}")} for k in self._sets.shards],
            "deliveries": deliveries,
        }

    # -- the end

    def close(self, *, keep: bool = False) -> None:
        """Let go: the node shows as ended, and its file goes unless `keep` (for a look at the last numbers)."""
        if self._lock is not None:
            if not keep:
                self.file.unlink()
            os.close(self._lock)
            self._lock = None
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(keep=error is not None)


def _layout(sources: Iterable[str], shards: int, deliveries: Sequence[str]) -> tuple[list[Counter], list[Histogram]]:
    counters = _counters("node", NODE_ABOUT)
    histograms = []
    for source in sources:
        counters += _counters(f"source.{source}", SOURCE_ABOUT)
    for shard in range(shards):
        counters += _counters(f"shard.{shard}", SHARD_ABOUT)
        histograms.append(Histogram(f"shard.{shard}.receive_to_output", "ns", "from receipt of an event to its outputs in the ring"))
        histograms.append(Histogram(f"shard.{shard}.batch_events", "events", "events taken from an input ring at once"))
        for delivery in deliveries:
            counters += _counters(f"delivery.{delivery}.{shard}", DELIVERY_ABOUT)
            name = f"delivery.{delivery}.{shard}.receive_to_stored"
            histograms.append(Histogram(name, "ns", "from receipt of an event to the server's acknowledgement of its outputs"))
    return counters, histograms


def _sets(labels: Iterable[str]) -> _Sets:
    """What a file is about, from the labels in it."""
    sources: dict[str, None] = {}
    shards: dict[int, None] = {}
    deliveries: dict[tuple[str, int], None] = {}
    for label in labels:
        parts = label.split(".")
        if parts[0] == "source" and len(parts) == 3:
            sources[parts[1]] = None
        elif parts[0] == "shard" and len(parts) == 3:
            shards[int(parts[1])] = None
        elif parts[0] == "delivery" and len(parts) == 4:
            deliveries[parts[1], int(parts[2])] = None
    return _Sets(list(sources), sorted(shards), list(deliveries))


def _numbers(counters: Mapping[str, int], prefix: str, kind: type[IntEnum]) -> dict[str, int]:
    return {c.name.lower(): counters[counter_name(prefix, c)] for c in kind}


def _shard_numbers(counters: Mapping[str, int], histograms: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    latency = {name: histograms[f"{prefix}.{name}"] for name in ("receive_to_output", "batch_events")}
    return {**_numbers(counters, prefix, ShardCounter), **latency}


def _state_name(value: int) -> str:
    return NodeState(value).name.lower() if value in NodeState._value2member_map_ else f"unknown ({value})"


def _pid(path: Path) -> int:
    with contextlib.suppress(CountersNotFound), CounterFile.attach(path) as file:
        return file.about.pid
    return 0


def is_alive(path: Path) -> bool:
    """Whether the process that made this file still runs: it holds a lock, which is looked at and not taken."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
        return int(_LOCK.unpack(answer)[0]) != fcntl.F_UNLCK
    finally:
        os.close(fd)


def read_telemetry(path: str | Path) -> dict[str, Any]:
    """A node's numbers, as plain data; nothing is registered with the node.

    Returns:
        ``{"cluster", "node", "path", "pid", "alive", "state", "started_ns", "uptime_s", "heartbeat_age_s", "sources": {name: {…}},
        "shards": [{"shard", …, "receive_to_output": {"p50", "p90", "p99", "p999", "max", "mean", "count", "unit"}, "batch_events"}],
        "deliveries": {name: [{"shard", …, "receive_to_stored"}]}}``; counters under the lower-case names of the enumerations.

    Raises:
        CountersNotFound: there is no such file.
        CountersLayoutMismatch: it is no file of this version.
    """
    with CounterFile.attach(path) as file:
        return Telemetry(file).reading()
