"""Orders on a virtual link that say when they were sent and when they left: the sender of ``tickmesh bench receive``.

A book is opened by packets of two new orders, a sell and a buy, from the farthest to the best; then every packet replaces the best order of
each side, in MoldUDP64 with ITCH 5.0. The middle goes up and down in turns, so that each order, new or replaced, changes the best bid and
offer, and the book stays small. The first order of a packet carries the time before the send, the second the time when the packet leaves
the sender's interface, which a BPF program there writes into it: what the sender's own stack takes is in the first only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types

from tickmesh.node.event import EventArray, Kind
from tickmesh.ops.namespaces import INTERFACE, VethPair
from tickmesh.transports import bpf
from tickmesh.transports.bpf import jump, op
from tickmesh.transports.multicast import parse_endpoint
from tickmesh.transports.toolbox import address_of, cpu_pause, loop, monotonic_ns, put_be16, put_be32, put_be64

ORDERS = 2
"""In every packet."""
OPENING = 8
"""Packets that open the book, the last of them with the orders that are replaced from then on."""
QTY = 100
"""Of every order."""
STAMP_MASK = (1 << 48) - 1
"""ITCH has 48 bits for a time; of the monotonic clock they are 78 hours."""
_PRICE_UNIT = 100_000
_MIDDLE, _UP, _HALF_SPREAD, _DEPTH, _TICK = 500_000, 800, 500, 2_000, 100
"""Prices with four decimals. A side that moves alone does not reach the other one."""
_ORDERS_AT, _ORDER_BYTES, _STAMP_AT, _REPLACED_AT, _ID_AT, _PRICE_AT = 20, 37, 7, 13, 21, 33
"""Where the orders lie in a packet, length of the message included, and fields in an order that replaces another."""
_PACKET_BYTES = _ORDERS_AT + ORDERS * _ORDER_BYTES
_FRAME_HEADERS_BYTES, _NEXT, _LENGTH_AT, _PROTOCOL_AT = 42, -1, 0, 16
"""Of a UDP datagram; what a program that leaves a packet to the next one returns; fields of ``struct __sk_buff``."""
_PRIORITY = 10

Ages = npt.NDArray[np.int64]
"""Or times, ns."""

# ---------------------------------------------------------------- the orders

_send = types.ExternalFunction("send", types.int64(types.int32, types.uint64, types.uint64, types.int32))


@loop
def _send_replaced(sock: Any, packet: Any, first: Any, gap_ns: Any, times: Any) -> Any:
    """Send packets `first`, … (from 0, the opening included), one every `gap_ns` (0: as fast as it goes), as many as there are `times`:
    i64[packets, 2], when each was about to be sent, and when it had been. Returns how many were refused."""
    begun, refused = monotonic_ns(), 0
    for i in range(times.shape[0]):
        number = np.uint64(ORDERS * (first + i) + 1)
        middle = _MIDDLE + _UP * ((first + i) & 1)
        put_be64(packet, 10, number)
        for side in range(ORDERS):
            at = _ORDERS_AT + side * _ORDER_BYTES
            put_be64(packet, at + _REPLACED_AT, number + np.uint64(side) - np.uint64(ORDERS))
            put_be64(packet, at + _ID_AT, number + np.uint64(side))
            put_be32(packet, at + _PRICE_AT, np.uint32(middle + _HALF_SPREAD - 2 * side * _HALF_SPREAD))
        while monotonic_ns() < begun + i * gap_ns:
            cpu_pause()
        stamp = monotonic_ns()
        put_be16(packet, _ORDERS_AT + _STAMP_AT, np.uint16(stamp >> 32 & 0xFFFF))
        put_be32(packet, _ORDERS_AT + _STAMP_AT + 2, np.uint32(stamp & 0xFFFFFFFF))
        sent = np.int64(_send(np.int32(sock), address_of(packet, 0), np.uint64(_PACKET_BYTES), np.int32(0)))
        times[i, 0], times[i, 1] = stamp, monotonic_ns()
        refused += sent != _PACKET_BYTES
    return refused


def _packet(sequence: int, orders: list[bytes]) -> bytes:
    return b"TICKMESH  " + struct.pack("!QH", sequence, len(orders)) + b"".join(struct.pack("!H", len(one)) + one for one in orders)


def _header(kind: bytes) -> bytes:
    return kind + struct.pack("!HH", 7, 0) + bytes(6)


def _opening() -> Iterator[bytes]:
    """Packets of new orders whose numbers are their sequences."""
    for number in range(OPENING):
        off = _DEPTH + _TICK * (OPENING - number)
        middle = _MIDDLE
        if number == OPENING - 1:
            off, middle = _HALF_SPREAD, _MIDDLE + _UP * (number & 1)
        first = ORDERS * number + 1
        sides = ((first, b"S", middle + off), (first + 1, b"B", middle - off))
        yield _packet(first, [_header(b"A") + struct.pack("!QcI8sI", one, side, QTY, b"ALFA    ", price) for one, side, price in sides])


def _replacing() -> npt.NDArray[np.uint8]:
    """A packet of two orders that replace others, to be filled in."""
    packet = _packet(0, [_header(b"U") + struct.pack("!QQII", 0, 0, QTY, 0)] * ORDERS)
    assert len(packet) == _PACKET_BYTES
    return np.frombuffer(bytearray(packet + bytes(64)), np.uint8)


def best_prices(packets: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Best bid and ask (1e-9) after each order of that many packets after the opening; of a packet the sell comes first."""
    middles = _MIDDLE + _UP * (np.arange(OPENING - 1, OPENING + packets) & 1)
    bids, asks = (middles - _HALF_SPREAD) * _PRICE_UNIT, (middles + _HALF_SPREAD) * _PRICE_UNIT
    return np.stack([bids[:-1], bids[1:]], axis=1).ravel(), np.repeat(asks[1:], ORDERS)


# ---------------------------------------------------------------- what comes of them


class WrongOutputs(Exception):
    """What came out of the shard is not what had to; by which `way`, and `what`."""

    def __init__(self, way: str, what: str) -> None:
        super().__init__(f"{way}: {what}")
        self.way, self.what = way, what


def checked_bbos(way: str, outputs: EventArray, times: Ages) -> npt.NDArray[np.intp]:
    """Where among a run's outputs the BBOs of replaced orders are, after a look at whether all is as the orders say.

    Args:
        outputs: all of them.
        times: of the packets, see :class:`Sending`.

    Raises:
        WrongOutputs: it is not.
    """
    places = np.flatnonzero(outputs["kind"] == Kind.BBO)
    wanted = ORDERS * (OPENING + len(times))
    if len(places) != wanted:
        raise WrongOutputs(way, f"{len(places)} of {wanted} BBOs came; is the host busy?")
    places = places[ORDERS * OPENING :]
    bbos, (bids, asks) = outputs[places], best_prices(len(times))
    until_sent, until_left = bbos["ts_event"].reshape(-1, ORDERS).T - (times[:, 0] & STAMP_MASK)
    of_order = np.repeat(bbos["ts_event"], np.diff(places, append=len(outputs)))
    checks = {
        "an output is missing or doubled": np.array_equal(outputs["seq"], np.arange(1, len(outputs) + 1)),
        "a BBO has other prices": np.array_equal(bbos["price"], bids) and np.array_equal(bbos["aux"], asks),
        "a BBO has other quantities": bool(np.all(bbos["qty"] == QTY) and np.all(bbos["id"] == QTY)),
        "an order has another time than it was sent with": not until_sent.any(),
        "a packet did not leave while it was sent": bool(np.all((until_left & STAMP_MASK) <= times[:, 1] - times[:, 0])),
        "an output has another time than its order": np.array_equal(of_order, outputs["ts_event"][places[0] :]),
    }
    for what, right in checks.items():
        if not right:
            raise WrongOutputs(way, what)
    return places


def content(outputs: EventArray) -> str:
    """A hash of outputs without their times."""
    same = outputs.copy()
    same["ts_event"] = same["ts_recv"] = 0
    return hashlib.sha256(same.tobytes()).hexdigest()


# ---------------------------------------------------------------- the link's end


def _stamping() -> bytes:
    """The program that has the second order that a packet replaces say when it leaves the interface (monotonic clock, 48 bits)."""
    at = _FRAME_HEADERS_BYTES + _ORDERS_AT + _ORDER_BYTES + _STAMP_AT
    return bpf.assemble(
        [
            op(bpf.MOVE, 6, 1),
            op(bpf.LOAD_U32, 2, 1, _PROTOCOL_AT), jump(bpf.IF_UNEQUAL, "end", 2, value=socket.htons(0x0800)),
            op(bpf.LOAD_U32, 2, 1, _LENGTH_AT), jump(bpf.IF_UNEQUAL, "end", 2, value=_FRAME_HEADERS_BYTES + _PACKET_BYTES),
            op(bpf.CALL, value=bpf.KTIME_NS),
            op(bpf.SHIFT_LEFT, 0, value=16), op(bpf.BIG_ENDIAN, 0, value=64), op(bpf.STORE_U64, bpf.FRAME, 0, -8),
            op(bpf.MOVE, 1, 6), op(bpf.SET, 2, value=at),
            op(bpf.MOVE, 3, bpf.FRAME), op(bpf.ADD, 3, value=-8), op(bpf.SET, 4, value=6), op(bpf.SET, 5),
            op(bpf.CALL, value=bpf.STORE_BYTES),
            "end:",
            op(bpf.SET, 0, value=_NEXT), op(bpf.EXIT),
        ]
    )  # fmt: skip


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Keep this thread on a core, before others of it where that is allowed."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_PRIORITY))
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(0, before)


class Sending:
    """Packets that a thread on a core of its own sends beside.

    Attributes:
        times: i64[packets, 2], when each was about to be sent and when it had been (monotonic clock); whole after :meth:`join`.
    """

    def __init__(self, sock: socket.socket, core: int, packets: int, gap_ns: int) -> None:
        self.times = np.zeros((packets, 2), np.int64)
        self._sock, self._core, self._gap_ns = sock, core, gap_ns
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with on_core(self._core):
            _send_replaced(self._sock.fileno(), _replacing(), OPENING, self._gap_ns, self.times)

    def join(self) -> None:
        """Wait until all are sent."""
        self._thread.join()


class StampedOrders:
    """The sender, at the near end of a link; a context manager.

    Args:
        pair: the link.
        endpoint: where to, ``udp://…``.
        core: of the threads that send.
    """

    def __init__(self, pair: VethPair, endpoint: str, core: int) -> None:
        self._pair, self._to, self._core = pair, parse_endpoint(endpoint), core
        self._opened = ExitStack()

    def open_book(self) -> None:
        """Send the packets before the first that replaces orders."""
        for packet in _opening():
            self._sock.send(packet)

    def send(self, packets: int, gap_ns: int) -> Sending:
        """Start sending packets that replace orders, one every `gap_ns`; 0: as fast as it goes."""
        return Sending(self._sock, self._core, packets, gap_ns)

    def __enter__(self) -> StampedOrders:
        with self._pair.inside("left"), ExitStack() as opened:
            self._sock = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            self._sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(self._pair.left_address))
            self._sock.connect((self._to.address, self._to.port))
            program = opened.enter_context(bpf.Program(_stamping(), bpf.TRAFFIC_PROGRAM, bpf.AT_EGRESS, "tickmesh_stamp"))
            opened.enter_context(program.attach(socket.if_nametoindex(INTERFACE)))
            _send_replaced(self._sock.fileno(), _replacing(), OPENING, 0, np.zeros((0, 2), np.int64))  # compiles it
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()
