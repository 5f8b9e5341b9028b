"""TCP byte streams from captured segments: put in order, overlaps and retransmissions removed, holes reported (RFC 9293, 3.4)."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tickmesh.transports.recording import SLACK, Bytes
from tickmesh.transports.toolbox import inlined, loop

SEGMENT = np.dtype(
    [("offset", "<u8"), ("ts_recv", "<i8"), ("seq", "<u4"), ("length", "<u4"), ("flow", "<u4"), ("flags", "<u2"), ("_pad", "<u2")]
)
"""One TCP segment in the buffer: `flow` is its direction's slot in the scan's table of flows, `flags` the TCP flags."""

CHUNK = np.dtype([("offset", "<u8"), ("ts_recv", "<i8"), ("hole", "<u8"), ("length", "<u4"), ("_pad", "<u4")])
"""A piece of a TCP stream's `data`: its offset and length there, when its last missing byte arrived, and how many bytes of the
stream are missing before it."""

Records = npt.NDArray[np.void]


@dataclass(frozen=True)
class TcpStream:
    """One direction of a TCP connection, in order.

    Attributes:
        source, target: ``(address, port)``.
        data: the bytes, followed by SLACK zeros; u8.
        length: how many bytes.
        chunks: CHUNK array: when each piece was complete, and where bytes are missing before it.
        syn_seen, fin_seen: whether the connection's start and end are in the capture.
        retransmitted, overlapping, out_of_order: segments that were.
        holes, missing_bytes: gaps that nothing filled.
    """

    source: tuple[str, int]
    target: tuple[str, int]
    data: Bytes
    length: int
    chunks: Records
    syn_seen: bool
    fin_seen: bool
    retransmitted: int
    overlapping: int
    out_of_order: int
    holes: int
    missing_bytes: int


Endpoints = tuple[tuple[str, int], tuple[str, int]]


def order_streams(buffer: Bytes, segments: Records, endpoints: Callable[[int], Endpoints]) -> list[TcpStream]:
    """Every direction of every connection among SEGMENT records, in the order of their first segments.

    `endpoints` gives source and target of a flow number.
    """
    order = np.argsort(segments["flow"], kind="stable")
    borders = np.flatnonzero(np.diff(segments["flow"][order])) + 1
    directions = [part for part in np.split(order, borders) if part.size]
    directions.sort(key=lambda part: int(part[0]))
    streams = []
    for members in directions:
        source, target = endpoints(int(segments["flow"][members[0]]))
        first = 0
        while first < members.size:
            ordering = _Ordering(
                np.zeros(1, _STREAM),
                np.zeros(_WAITING_MAX, np.int64),
                np.zeros(int(segments["length"][members[first:]].sum()) + SLACK, np.uint8),
                np.zeros(members.size - first, CHUNK),
            )
            first = int(order_segments(buffer, segments, members, first, ordering))
            streams.append(_stream(source, target, ordering))
    return [stream for stream in streams if stream.length or stream.syn_seen]


def _stream(source: tuple[str, int], target: tuple[str, int], ordering: _Ordering) -> TcpStream:
    t = {name: int(ordering.state[0][name]) for name in _STREAM.names or ()}
    return TcpStream(
        source=source,
        target=target,
        data=ordering.data[: t["length"] + SLACK],
        length=t["length"],
        chunks=ordering.chunks[: t["chunks"]],
        syn_seen=bool(t["syn_seen"]),
        fin_seen=bool(t["fin_seen"]),
        **{name: t[name] for name in ("retransmitted", "overlapping", "out_of_order", "holes", "missing_bytes")},
    )


# ---------------------------------------------------------------- compiled

_STREAM = np.dtype(
    [
        (name, "<i8")
        for name in (
            "started", "syn_seen", "fin_seen", "initial", "expected", "length", "chunks", "waiting",
            "retransmitted", "overlapping", "out_of_order", "holes", "missing_bytes",
        )
    ]
)  # fmt: skip
_WAITING_MAX = 1024
"""Segments kept while an earlier one is missing; when full, the gap is declared a hole."""
_FIN, _SYN = 1, 2
_Ordering = namedtuple("_Ordering", "state waiting data chunks")


@inlined
def _ahead(segment: Any, t: Any) -> Any:
    """How far a segment starts after the next expected byte (sequence numbers are modulo 2^32); negative if before."""
    start = np.int64(segment.seq) + (1 if segment.flags & _SYN else 0)
    return ((start - t.expected + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)


@inlined
def _append(buf: Any, segment: Any, ordering: Any, ts_ns: Any, hole: Any) -> Any:
    """Append what is new of a segment that starts at or before the expected byte."""
    t = ordering.state[0]
    skip = -_ahead(segment, t)
    if skip >= np.int64(segment.length):
        t.retransmitted += 1
        return
    t.overlapping += np.int64(skip > 0)
    size, start = np.int64(segment.length) - skip, np.int64(segment.offset) + skip
    for i in range(size):
        ordering.data[t.length + i] = buf[start + i]
    chunk = ordering.chunks[t.chunks]
    chunk.offset, chunk.length, chunk.ts_recv, chunk.hole = np.uint64(t.length), np.uint32(size), ts_ns, np.uint64(hole)
    t.chunks += 1
    t.length += size
    t.expected = (t.expected + size) & 0xFFFFFFFF


@inlined
def _drain(buf: Any, segments: Any, ordering: Any, ts_ns: Any) -> Any:
    """Append the waiting segments (kept latest first) that are now in order."""
    t = ordering.state[0]
    while t.waiting > 0:
        segment = segments[ordering.waiting[t.waiting - 1]]
        if _ahead(segment, t) > 0:
            break
        t.waiting -= 1
        _append(buf, segment, ordering, ts_ns, 0)


@inlined
def _skip_hole(buf: Any, segments: Any, ordering: Any, ts_ns: Any) -> Any:
    """Give up on the missing bytes before the first waiting segment."""
    t = ordering.state[0]
    segment = segments[ordering.waiting[t.waiting - 1]]
    hole = _ahead(segment, t)
    t.waiting -= 1
    t.holes += 1
    t.missing_bytes += hole
    t.expected = (t.expected + hole) & 0xFFFFFFFF
    _append(buf, segment, ordering, ts_ns, hole)
    _drain(buf, segments, ordering, ts_ns)


@inlined
def _keep_waiting(segments: Any, ordering: Any, index: Any) -> Any:
    t, waiting = ordering.state[0], ordering.waiting
    t.out_of_order += 1
    distance = _ahead(segments[index], t)
    slot = t.waiting
    while slot > 0 and _ahead(segments[waiting[slot - 1]], t) <= distance:
        waiting[slot] = waiting[slot - 1]
        slot -= 1
    waiting[slot] = index
    t.waiting += 1


@loop
def order_segments(buf: Any, segments: Any, members: Any, first: Any, ordering: Any) -> Any:
    """Put the segments ``members[first:]`` of one direction in order; returns where a new connection starts, or ``members.size``."""
    t = ordering.state[0]
    ts_ns, index = np.int64(0), np.int64(first)
    while index < members.size:
        segment = segments[members[index]]
        if segment.flags & _SYN:
            if t.started and not (t.syn_seen and t.initial == np.int64(segment.seq)):
                break
            t.syn_seen, t.initial = 1, np.int64(segment.seq)
        ts_ns = segment.ts_recv
        t.fin_seen |= np.int64(segment.flags & _FIN)
        if not t.started:
            t.started, t.expected = 1, (np.int64(segment.seq) + (1 if segment.flags & _SYN else 0)) & 0xFFFFFFFF
        if segment.length > 0:
            if _ahead(segment, t) > 0:
                _keep_waiting(segments, ordering, members[index])
                if t.waiting == ordering.waiting.size:
                    _skip_hole(buf, segments, ordering, ts_ns)
            else:
                _append(buf, segment, ordering, ts_ns, 0)
                _drain(buf, segments, ordering, ts_ns)
        index += 1
    while t.waiting > 0:
        _skip_hole(buf, segments, ordering, ts_ns)
    return index
