"""A simulated feed as MoldUDP64 datagrams on two lines, with seeded loss, duplication and reordering on each.

What the datagrams hold and when they are due follows simulated time only (a datagram closes when it is full or :attr:`LineConfig.flush_ns`
old), and every line has its own random numbers: same configuration, same datagrams in the same order. Sending them in real time is the
only part that reads a clock. MoldUDP64 1.00: session (10 ASCII), sequence u64, count u16, then blocks of u16 length + message;
count 0 is a heartbeat, count 0xFFFF ends the session.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tickmesh.ops.order_flow import LATEST_NS, random_word
from tickmesh.ops.simulator import Bytes, Simulator, SimulatorConfig, SimulatorConfigError
from tickmesh.transports.capture import PACKET, write_pcap
from tickmesh.transports.multicast import Sender, open_sender, parse_endpoint
from tickmesh.transports.pacing import Pace
from tickmesh.transports.toolbox import be16, be32, inlined, loop, put_be16, put_be64

DATAGRAM = np.dtype([("due_ns", "<i8"), ("sequence", "<i8"), ("offset", "<i8"), ("length", "<i4"), ("count", "<i4")])
"""One datagram in a buffer; ``due_ns`` is simulated time, nanoseconds since midnight."""
_PACKING = np.dtype(
    [("sequence", "<i8"), ("last_ns", "<i8"), ("flush_ns", "<i8"), ("heartbeat_ns", "<i8"), ("payload_max", "<i8"), ("used", "<i8")]
)
LINE = np.dtype([
    ("random", "<u8"), ("loss", "<i8"), ("duplicate", "<i8"), ("reorder", "<i8"),
    ("lost", "<i8"), ("duplicated", "<i8"), ("reordered", "<i8"), ("sent", "<i8"),
])  # fmt: skip
"""Faults of a line: chances are per 2**32; then what happened so far, in datagrams."""
HEADER_BYTES = 20
UDP_OVERHEAD_BYTES = 28
END_OF_SESSION = 0xFFFF
_END_REPEATS = 3
_HEARTBEATS_MAX = 64
_HELD_MAX = 4
_BLOCK_MESSAGES = 1024
"""Fixed, so that the datagrams do not depend on how they are pulled."""
_DATAGRAMS_MAX = 2 * _BLOCK_MESSAGES + 4096


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """What one line does to datagrams, each a probability from 0 to 0.9."""

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    """A reordered datagram comes after the next one, two or three."""

    def __post_init__(self) -> None:
        for field in ("loss", "duplicate", "reorder"):
            value = getattr(self, field)
            if not 0 <= value <= 0.9:
                raise SimulatorConfigError(field, value, "a probability from 0 to 0.9")


@dataclass(frozen=True, kw_only=True)
class LineConfig:
    """How a feed is put into datagrams.

    Args:
        session: up to 10 ASCII characters, padded with spaces.
        mtu_bytes: largest IP packet (the datagram's payload is 28 bytes less).
        flush_ns: a datagram holds messages of at most this much simulated time.
        heartbeat_ns: simulated silence after which a heartbeat is sent.
        faults: one per line, A first.

    Raises:
        SimulatorConfigError: a value is out of range.
    """

    session: str = "TICKMESH"
    mtu_bytes: int = 1500
    flush_ns: int = 200_000
    heartbeat_ns: int = 1_000_000_000
    faults: tuple[FaultConfig, ...] = (FaultConfig(),)

    def __post_init__(self) -> None:
        if not self.session or len(self.session) > 10 or not self.session.isascii():
            raise SimulatorConfigError("session", self.session, "1 to 10 ASCII characters")
        if not 128 <= self.mtu_bytes <= 65_535:
            raise SimulatorConfigError("mtu_bytes", self.mtu_bytes, "128 to 65535")
        if self.flush_ns < 0:
            raise SimulatorConfigError("flush_ns", self.flush_ns, "0 or more")
        if self.heartbeat_ns < 1_000_000:
            raise SimulatorConfigError("heartbeat_ns", self.heartbeat_ns, "at least 1000000 (1 ms)")
        if not 1 <= len(self.faults) <= 8:
            raise SimulatorConfigError("faults", len(self.faults), "1 to 8 lines")


# ---------------------------------------------------------------- kernels


@inlined
def _open_datagram(out: Any, datagrams: Any, n: Any, session: Any, sequence: Any, count: Any, due_ns: Any, at: Any) -> Any:
    """Write a header at `at` and its DATAGRAM; returns where blocks go."""
    for k in range(10):
        out[at + k] = session[k]
    put_be64(out, at + 10, sequence)
    put_be16(out, at + 18, count)
    entry = datagrams[n]
    entry.due_ns, entry.sequence, entry.offset, entry.length, entry.count = due_ns, sequence, at, 20, count
    return at + 20


@inlined
def _heartbeats(packing: Any, session: Any, out: Any, datagrams: Any, n: Any, at: Any, now_ns: Any) -> Any:
    """Heartbeats for the silence before `now_ns`, within bounds that leave room for the messages; returns how many."""
    state, beats = packing[0], 0
    while state.last_ns and now_ns - state.last_ns > state.heartbeat_ns and beats < _HEARTBEATS_MAX and n + beats < len(datagrams) // 2:
        state.last_ns += state.heartbeat_ns
        at = _open_datagram(out, datagrams, n + beats, session, np.int64(state.sequence), 0, np.int64(state.last_ns), at)
        beats += 1
    return beats


@loop
def pack(image: Any, end: Any, packing: Any, session: Any, out: Any, datagrams: Any) -> Any:
    """Put ``image[:end]`` (BinaryFILE frames) into MoldUDP64 datagrams; returns how many. `out` must hold the image and a header for each
    entry of `datagrams`, of which there must be more than twice the messages."""
    state, n, at, pos = packing[0], 0, 0, 0
    while pos < end and n < len(datagrams) - 1:
        first_ns = (np.int64(be16(image, pos + 7)) << 32) + np.int64(be32(image, pos + 9))
        beats = _heartbeats(packing, session, out, datagrams, n, at, first_ns)
        n, at = n + beats, at + 20 * beats
        start, count = at, 0
        due_ns: Any = first_ns
        at = _open_datagram(out, datagrams, n, session, np.int64(state.sequence), 0, first_ns, at)
        while pos < end:
            size: Any = np.int64(be16(image, pos)) + 2
            now_ns = (np.int64(be16(image, pos + 7)) << 32) + np.int64(be32(image, pos + 9))
            if count and (at - start + size > state.payload_max or now_ns - first_ns > state.flush_ns):
                break
            for k in range(size):
                out[at + k] = image[pos + k]
            at, pos, count, due_ns = at + size, pos + size, count + 1, now_ns
        put_be16(out, start + 18, count)
        entry = datagrams[n]
        entry.due_ns, entry.length, entry.count = due_ns, at - start, count
        state.last_ns = due_ns
        state.sequence += count
        n += 1
    state.used = at
    return n


@inlined
def _chance(line: Any) -> Any:
    """32 random bits of a line."""
    return np.int64(random_word(line) >> np.uint64(32))


@inlined
def _release(held: Any, order: Any, sent: Any, everything: Any) -> Any:
    """Count down the held-back datagrams and send those whose turn it is; returns how many were sent in all."""
    for k in range(len(held)):
        if held[k, 1] > 0:
            held[k, 1] -= 1
            if held[k, 1] == 0 or everything:
                order[sent] = held[k, 0]
                held[k, 1] = 0
                sent += 1
    return sent


@loop
def impair(datagrams: Any, n: Any, line: Any, held: Any, order: Any) -> Any:
    """What a line makes of datagrams 0..n: their indices in the order in which they arrive, in `order` (room for 2 n); returns how many.

    `held` is i64[k, 2], zeroed; nothing stays in it.
    """
    state, sent = line[0], 0
    for k in range(n):
        free = -1
        for h in range(len(held)):
            if held[h, 1] == 0:
                free = h
        lost, late, twice, delay = _chance(line), _chance(line), _chance(line), _chance(line)
        if lost < state.loss:
            state.lost += 1
            continue
        if late < state.reorder and free >= 0:
            held[free, 0], held[free, 1] = k, 2 + delay % 3
            state.reordered += 1
        else:
            order[sent] = k
            sent += 1
            if twice < state.duplicate:
                order[sent] = k
                sent += 1
                state.duplicated += 1
        sent = _release(held, order, sent, False)
    sent = _release(held, order, sent, True)
    state.sent += sent
    return sent


# ---------------------------------------------------------------- the face


class Batch(NamedTuple):
    """Datagrams of one stretch of the feed: payload k is ``buffer[offset : offset + length]``; ``lines[l]`` are the indices that line l
    carries, in order. The memory is reused by the next batch."""

    buffer: Bytes
    datagrams: npt.NDArray[np.void]
    lines: tuple[npt.NDArray[np.int32], ...]

    def payload(self, k: int) -> memoryview:
        """Datagram k."""
        entry = self.datagrams[k]
        return self.buffer[int(entry["offset"]) : int(entry["offset"]) + int(entry["length"])].data

    def packets(self) -> npt.NDArray[np.void]:
        """What all lines carry as PACKET records in the order of their times; ``ts_recv`` is simulated time since midnight. A datagram
        that was held back has the time of the one before it."""
        parts = []
        for number, order in enumerate(self.lines):
            part, chosen = np.zeros(len(order), PACKET), self.datagrams[order]
            part["offset"], part["length"], part["line"] = chosen["offset"], chosen["length"], number
            part["ts_recv"] = np.maximum.accumulate(chosen["due_ns"]) if len(order) else 0
            parts.append(part)
        merged = np.concatenate(parts)
        return merged[np.argsort(merged["ts_recv"], kind="stable")]


@dataclass(frozen=True)
class LineCounts:
    """What happened to the datagrams of a line so far."""

    sent: int
    lost: int
    duplicated: int
    reordered: int


class SimulatedLines:
    """The datagrams of one simulated day, batch by batch."""

    def __init__(self, simulator: Simulator, config: LineConfig) -> None:
        self.simulator, self.config = simulator, config
        self._packing = np.zeros(1, _PACKING)
        self._packing["sequence"], self._packing["flush_ns"] = 1, config.flush_ns
        self._packing["heartbeat_ns"], self._packing["payload_max"] = config.heartbeat_ns, config.mtu_bytes - UDP_OVERHEAD_BYTES
        self._session = np.frombuffer(config.session.encode().ljust(10), np.uint8).copy()
        self._datagrams = np.zeros(_DATAGRAMS_MAX, DATAGRAM)
        self._out = np.zeros(_BLOCK_MESSAGES * 64 + _DATAGRAMS_MAX * HEADER_BYTES + 8192, np.uint8)
        self._lines = [_line_state(simulator.config, k, faults) for k, faults in enumerate(config.faults)]
        self._orders = [np.zeros(2 * _DATAGRAMS_MAX, np.int32) for _ in config.faults]
        self._digest = hashlib.sha256()
        self.datagrams_sent = 0
        """By :func:`send_lines`, on all lines together."""

    def batches(self) -> Iterator[Batch]:
        """All batches, the last with the end of session (sent three times on every line, without faults)."""
        while not self.simulator.finished:
            image, end = self.simulator.next_block(_BLOCK_MESSAGES)
            self._digest.update(image[:end].data)
            n = int(pack(image, np.int64(end), self._packing, self._session, self._out, self._datagrams))
            yield self._batch(n)
        yield self._end()

    def _batch(self, n: int) -> Batch:
        arrived = []
        for line, order in zip(self._lines, self._orders, strict=True):
            held = np.zeros((_HELD_MAX, 2), np.int64)
            arrived.append(order[: int(impair(self._datagrams, np.int64(n), line, held, order))])
        return Batch(self._out, self._datagrams[:n], tuple(arrived))

    def _end(self) -> Batch:
        state = self._packing[0]
        header = bytes(self._session) + int(state["sequence"]).to_bytes(8, "big") + END_OF_SESSION.to_bytes(2, "big")
        self._out[:HEADER_BYTES] = np.frombuffer(header, np.uint8)
        self._datagrams[0] = (int(state["last_ns"]), int(state["sequence"]), 0, HEADER_BYTES, 0)
        for line in self._lines:
            line["sent"] += _END_REPEATS
        return Batch(self._out, self._datagrams[:1], tuple(np.zeros(_END_REPEATS, np.int32) for _ in self._lines))

    @property
    def sha256(self) -> str:
        """Of the feed so far, as a BinaryFILE image before any fault."""
        return self._digest.hexdigest()

    def counts(self) -> list[LineCounts]:
        """What happened on each line so far."""
        return [LineCounts(*(int(line[f][0]) for f in ("sent", "lost", "duplicated", "reordered"))) for line in self._lines]


def _line_state(config: SimulatorConfig, number: int, faults: FaultConfig) -> npt.NDArray[np.void]:
    line = np.zeros(1, LINE)
    line["random"] = np.uint64((config.seed ^ (0xA5A5_0001 * (number + 1) << 17)) & ((1 << 64) - 1))
    for field in ("loss", "duplicate", "reorder"):
        line[field] = int(getattr(faults, field) * (1 << 32))
    return line


# ---------------------------------------------------------------- where they go

_SLICE_NS = 1_000_000
"""Datagrams due within 1 ms go out together: waking up for each would cost half a core at 5,000 messages a second."""
_STOP_CHECK_S = 0.1
DAY = date(2026, 1, 5)
"""The day that pcap files are dated: simulated midnight is midnight UTC of it."""


def write_lines(
    path: str | os.PathLike[str], lines: SimulatedLines, endpoints: Sequence[str], progress: Callable[[int], None] | None = None
) -> int:
    """Write every line's datagrams to one pcap file with simulated times; returns how many.

    Args:
        path: the file.
        lines: a fresh one.
        endpoints: ``udp://ADDRESS:PORT`` of each line, written into the packets.
        progress: told the number of messages so far.

    Raises:
        BadEndpoint: an endpoint is not one.
        SimulatorConfigError: the day has no end, or there are not as many endpoints as lines.
        OSError: the path cannot be written.
    """
    _require_endpoints(lines, endpoints)
    config = lines.simulator.config
    if config.messages is None and config.seconds is None:
        raise SimulatorConfigError("messages", None, "messages or seconds, so that the day ends")
    midnight_ns = int(datetime(DAY.year, DAY.month, DAY.day, tzinfo=UTC).timestamp()) * 1_000_000_000
    return write_pcap(path, _frames(lines, endpoints, midnight_ns, progress))


def _frames(
    lines: SimulatedLines, endpoints: Sequence[str], midnight_ns: int, progress: Callable[[int], None] | None
) -> Iterator[tuple[int, str, int, bytes]]:
    targets = [parse_endpoint(text) for text in endpoints]
    for batch in lines.batches():
        for packet in batch.packets():
            at, target = int(packet["offset"]), targets[packet["line"]]
            payload = batch.buffer[at : at + int(packet["length"])].tobytes()
            yield midnight_ns + int(packet["ts_recv"]), target.address, target.port, payload
        if progress:
            progress(lines.simulator.messages)


def _require_endpoints(lines: SimulatedLines, endpoints: Sequence[str]) -> None:
    if len(endpoints) != len(lines.config.faults):
        raise SimulatorConfigError("endpoints", list(endpoints), f"one for each of the {len(lines.config.faults)} lines")


def send_lines(
    lines: SimulatedLines,
    endpoints: Sequence[str],
    *,
    interface: str | None = "lo",
    ttl: int = 1,
    speed: str | float = "realtime",
    stop: threading.Event | None = None,
    progress: Callable[[int], None] | None = None,
    keep: Callable[[Batch], None] | None = None,
) -> int:
    """Send every line's datagrams at their simulated times, to a millisecond, until the day or `stop` ends it; returns how many.

    Args:
        lines: a fresh one.
        endpoints: ``udp://ADDRESS:PORT`` of each line.
        interface: which one multicast leaves by; loopback unless another is named, None leaves it to the routing table.
        ttl: how many routers a datagram may pass, plus one.
        speed: ``"realtime"``, a factor of it, or ``"max"``.
        stop: set from outside to end early; obeyed within 0.2 s.
        progress: told the number of messages generated so far.
        keep: gets every batch before it is sent, e.g. :meth:`tickmesh.ops.rerequest_server.RerequestServer.keep`.

    Raises:
        MulticastError: an endpoint or interface cannot be used; says what to do.
        PaceError: the speed is not one.
        SimulatorConfigError: not as many endpoints as lines.
    """
    _require_endpoints(lines, endpoints)
    stop, pace = stop or threading.Event(), Pace(speed)
    with open_sender(list(endpoints), interface=interface, ttl=ttl) as sender:
        try:
            for batch in lines.batches():
                if keep:
                    keep(batch)
                if not _send_batch(sender, batch, pace, stop):
                    break
                if progress:
                    progress(lines.simulator.messages)
        finally:
            lines.datagrams_sent = sender.counters().datagrams
    return lines.datagrams_sent


def _send_batch(sender: Sender, batch: Batch, pace: Pace, stop: threading.Event) -> bool:
    """Send one batch, what is due within a millisecond at once; returns whether all of it was sent."""
    packets, first = batch.packets(), 0
    times, factor = packets["ts_recv"], float(pace.state["factor"][0])
    slice_ns = int(_SLICE_NS * factor) if factor else LATEST_NS
    while first < len(packets):
        while (wait_ns := pace.wait_ns(int(times[first]))) and not stop.is_set():
            stop.wait(min(wait_ns / 1e9, _STOP_CHECK_S))
        if stop.is_set():
            return False
        last = int(np.searchsorted(times, times[first] + slice_ns, "right"))
        sender.send(batch.buffer, packets[first:last])
        first = last
    return True
