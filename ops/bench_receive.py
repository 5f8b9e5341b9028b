"""Receive paths on a virtual link: from the wire to the event, and what a datagram costs the receiving core. AF_XDP, packet ring, recvmmsg.

All feed the same compiled loop, so that they differ by ``receive_batch`` alone. A sender on one core sends MoldUDP64 packets with two ITCH
orders; the receiver, spinning on another, looks at the clock when an event is decoded. The first order carries the time before the send,
the second the time when the packet leaves the sender's interface, which a BPF program there writes into it: what the sender's own stack
takes is in "send to event" only. The cost of a datagram is measured by sending a burst while nobody looks, and timing how long the loop
takes to drain it. Ways alternate within each repeat; ratios are medians of the repeats' own. AF_XDP runs in both of its modes. It takes
root, iproute2 and two cores, and no real card: what a card and its driver add or save is not in it.

Run it: ``tickmesh bench receive``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types

from tickmesh.node.decoder import decoder_parts, make_feed
from tickmesh.node.event import EVENT
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.protocol import load_framing, load_spec
from tickmesh.ops.namespaces import INTERFACE, VethPair
from tickmesh.transports import bpf
from tickmesh.transports.afxdp import Mode
from tickmesh.transports.bpf import jump, op
from tickmesh.transports.codecache import load_generated
from tickmesh.transports.multicast import parse_endpoint
from tickmesh.transports.receive_path import AFXDP, MODULES, PACKET_RING, SOCKETS, OpenPath, Wish, open_way
from tickmesh.transports.toolbox import address_of, cpu_pause, loop, monotonic_ns, put_be16, put_be32, put_be64, zeros_aligned

ENDPOINT = "udp://239.78.3.1:26400"
WAYS: dict[str, tuple[str, Mode]] = {
    "recvmmsg": (SOCKETS, "best"), "packet ring": (PACKET_RING, "best"), "AF_XDP, driver": (AFXDP, "driver"),
    "AF_XDP, generic": (AFXDP, "generic"),
}  # fmt: skip
"""What is measured: the way and AF_XDP's mode."""
_PEER = "recvmmsg"
P50_TARGET, COST_TARGET = 1 / 0.67, 4.0
_BURST, _BURSTS = 1500, 4
_BUFFER_BYTES = 16 << 20
_EVENTS_EACH = 2
_STAMP_AT, _ORDER_BYTES = 27, 38
"""Where the first order's time lies in the packet, and how far the second's is behind it."""
_FRAME_HEADERS_BYTES, _NEXT, _PROTOCOL_AT = 42, -1, 16
_SETTLE_S, _LIMIT_S = 0.05, 3.0
_PRIORITY = 10
_WARM_PART = 10

_RECEIVE = """\
# Receive by {way}, decode, and look at the clock. Generated.
import numpy as np

from tickmesh.node.event import EVENT
from tickmesh.transports.{module} import receive_batch, warm_line
from tickmesh.transports.toolbox import cpu_pause, le64, loop, monotonic_ns, now_ns
import tickmesh_generated.{decoder} as decoder_module
from tickmesh_generated.{decoder} import packet_events

FIRST = np.int64(0)
ADD = 1


@loop
def follow(lines, buffers, packets, feed, batch, latencies, until_ns):
    # the age of every event when it is decoded, until so many have come or the clock says until_ns; how many
    got, rounds = 0, 0
    while got < latencies.size:
        rounds += 1
        if rounds & 4095 == 0 and monotonic_ns() > until_ns:
            break
        for line in range({lines}):
            count = receive_batch(lines[line], buffers[line], packets[line], line, now_ns())
            if count == 0:
                cpu_pause()
            first = FIRST
            while count > 0:
                first, events = packet_events(buffers[line], packets[line], first, count, feed, batch)
                now = monotonic_ns()
                for i in range(events):
                    if batch[i].kind == ADD and got < latencies.size:
                        latencies[got] = now - batch[i].ts_event
                        got += 1
                if first >= count and events == 0:
                    break
    return got


@loop
def drain(lines, buffers, packets, feed, batch, decoding, wanted, sums):
    # take what waits; ns that it took and how many datagrams there were
    got, empty, begun = 0, 0, monotonic_ns()
    last = begun
    while got < wanted and empty < 100000:
        empty += 1
        for line in range({lines}):
            count = receive_batch(lines[line], buffers[line], packets[line], line, begun)
            if count > 0:
                empty = 0
                got += count
                if decoding != 0:
                    first = FIRST
                    while True:
                        first, events = packet_events(buffers[line], packets[line], first, count, feed, batch)
                        if first >= count and events == 0:
                            break
                else:
                    for i in range(count):
                        for k in range(np.int64(packets[line][i].length) >> 3):
                            sums[0] += le64(buffers[line], np.int64(packets[line][i].offset) + 8 * k)
                last = monotonic_ns()
    return last - begun, got


def warm():
    kernel, buffer, packets = warm_line()
    feed, batch = decoder_module.warm_feed(), np.zeros(8, EVENT)
    lines, buffers, several = (kernel,) * {lines}, (buffer,) * {lines}, (packets,) * {lines}
    follow(lines, buffers, several, feed, batch, np.zeros(0, np.int64), 0)
    drain(lines, buffers, several, feed, batch, 0, 0, np.zeros(1, np.uint64))
"""

# ---------------------------------------------------------------- the sender

_send = types.ExternalFunction("send", types.int64(types.int32, types.uint64, types.uint64, types.int32))


@loop
def _send_stamped(sock: Any, datagram: Any, size: Any, sequence: Any, count: Any, gap_ns: Any) -> Any:
    """Send `count` datagrams, one every `gap_ns` (0: as fast as it goes), the first order stamped; returns how many were refused."""
    begun, refused = monotonic_ns(), 0
    for i in range(count):
        while monotonic_ns() < begun + i * gap_ns:
            cpu_pause()
        put_be64(datagram, 10, np.uint64(sequence + _EVENTS_EACH * i))
        stamp = monotonic_ns()
        put_be16(datagram, _STAMP_AT, np.uint16(stamp >> 32 & 0xFFFF))
        put_be32(datagram, _STAMP_AT + 2, np.uint32(stamp & 0xFFFFFFFF))
        sent = np.int64(_send(np.int32(sock), address_of(datagram, 0), np.uint64(size), np.int32(0)))
        refused += sent != size
    return refused


@contextmanager
def _stamping(interface: str) -> Iterator[None]:
    """Have the second order of every packet that leaves an interface say when that was (monotonic clock, 48 bits)."""
    code = bpf.assemble(
        [
            op(bpf.MOVE, 6, 1),
            op(bpf.LOAD_U32, 2, 1, _PROTOCOL_AT),
            jump(bpf.IF_UNEQUAL, "end", 2, value=socket.htons(0x0800)),
            op(bpf.CALL, value=bpf.KTIME_NS),
            op(bpf.SHIFT_LEFT, 0, value=16), op(bpf.BIG_ENDIAN, 0, value=64), op(bpf.STORE_U64, bpf.FRAME, 0, -8),
            op(bpf.MOVE, 1, 6), op(bpf.SET, 2, value=_FRAME_HEADERS_BYTES + _STAMP_AT + _ORDER_BYTES),
            op(bpf.MOVE, 3, bpf.FRAME), op(bpf.ADD, 3, value=-8), op(bpf.SET, 4, value=6), op(bpf.SET, 5),
            op(bpf.CALL, value=bpf.STORE_BYTES),
            "end:",
            op(bpf.SET, 0, value=_NEXT), op(bpf.EXIT),
        ]
    )  # fmt: skip
    program = bpf.Program(code, bpf.TRAFFIC_PROGRAM, bpf.AT_EGRESS, "tickmesh_stamp")
    with program, program.attach(socket.if_nametoindex(interface)):
        yield


def _datagram() -> tuple[npt.NDArray[np.uint8], int]:
    """A MoldUDP64 packet with two ITCH 5.0 orders, to be stamped."""
    order = b"A" + struct.pack("!HH", 7, 0) + bytes(6) + struct.pack("!QcI8sI", 1, b"B", 100, b"ALFA    ", 500_000)
    packet = b"TICKMESH  " + struct.pack("!QH", 1, _EVENTS_EACH) + (struct.pack("!H", len(order)) + order) * _EVENTS_EACH
    return np.frombuffer(bytearray(packet + bytes(64)), np.uint8), len(packet)


class _Sender:
    """Sends from the near end of the link on a core of its own."""

    def __init__(self, pair: VethPair, core: int) -> None:
        self._core = core
        self._datagram, self._size = _datagram()
        to = parse_endpoint(ENDPOINT)
        with pair.inside("left"):
            self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(pair.left_address))
            self.sock.connect((to.address, to.port))
        _send_stamped(self.sock.fileno(), self._datagram, self._size, 1, 0, 0)

    def send(self, sequence: int, count: int, gap_ns: int) -> threading.Thread:
        """Start sending beside."""

        def run() -> None:
            with _on_core(self._core):
                _send_stamped(self.sock.fileno(), self._datagram, self._size, sequence, count, gap_ns)

        thread = threading.Thread(target=run)
        thread.start()
        return thread


@contextmanager
def _on_core(core: int) -> Iterator[None]:
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


# ---------------------------------------------------------------- the receiver


class _Receiver:
    """One way's loops on an open path."""

    def __init__(self, name: str, module: ModuleType) -> None:
        way, mode = WAYS[name]
        self.name, self._module = name, module
        wish = Wish(endpoints=(ENDPOINT,), interface=INTERFACE, owner="bench", buffer_bytes=_BUFFER_BYTES, mode=mode)
        self.path: OpenPath = open_way(way, wish)
        self.path.face.begin()
        self._batch = zeros_aligned(256, EVENT)
        self._feed: Any = None
        self.start_anew()

    def start_anew(self) -> None:
        """A feed that has seen nothing."""
        self._feed = make_feed(load_spec("itch50"), InstrumentTable(8), framing=load_framing("moldudp64"), gap_wait_ns=0)

    def follow(self, events: int, limit_s: float) -> npt.NDArray[np.int64]:
        """Ages of the next events."""
        face, latencies = self.path.face, np.zeros(events, np.int64)
        until_ns = time.monotonic_ns() + int(limit_s * 1e9)
        got = self._module.follow(face.kernels, face.buffers, face.packets, self._feed, self._batch, latencies, until_ns)
        return latencies[: int(got)]

    def drain(self, decoding: bool) -> tuple[int, int]:
        """Take what waits: ns, datagrams."""
        face = self.path.face
        took, got = self._module.drain(
            face.kernels, face.buffers, face.packets, self._feed, self._batch, int(decoding), _BURST, np.zeros(1, np.uint64)
        )
        return int(took), int(got)


def _modules() -> dict[str, ModuleType]:
    decoder = decoder_parts(load_spec("itch50"), load_framing("moldudp64")).__name__.rpartition(".")[2]
    places = {way: MODULES[way].__name__.rpartition(".")[2] for way, _ in WAYS.values()}
    loops = {
        way: load_generated("bench_receive", _RECEIVE.format(way=way, module=module, decoder=decoder, lines=1))
        for way, module in places.items()
    }
    return {name: loops[way] for name, (way, _) in WAYS.items()}


def _latency(receiver: _Receiver, sender: _Sender, core: int, datagrams: int, gap_ns: int) -> dict[str, float]:
    receiver.start_anew()
    with _on_core(core):
        thread = sender.send(1, datagrams, gap_ns)
        ages = receiver.follow(_EVENTS_EACH * datagrams, datagrams * gap_ns / 1e9 + _LIMIT_S)
    thread.join()
    if len(ages) < _EVENTS_EACH * datagrams:
        raise RuntimeError(f"{receiver.name}: {len(ages)} of {_EVENTS_EACH * datagrams} events came; is the host busy?")
    kept = ages[2 * (len(ages) // 2 // _WARM_PART) :]
    found: dict[str, float] = {}
    for metric, stamps in (("send", kept[0::2]), ("wire", kept[1::2])):
        found |= {f"{metric}_{name}": float(np.percentile(stamps, at)) for name, at in (("p50", 50), ("p99", 99), ("p999", 99.9))}
    return found


def _cost(receiver: _Receiver, sender: _Sender, core: int, decoding: bool) -> float:
    """ns of the receiving core for a datagram, median of some bursts."""
    costs = []
    for _ in range(_BURSTS):
        receiver.start_anew()
        sender.send(1, _BURST, 0).join()
        time.sleep(_SETTLE_S)
        with _on_core(core):
            took, got = receiver.drain(decoding)
        if got == _BURST:
            costs.append(took / got)
    if not costs:
        raise RuntimeError(f"{receiver.name}: no burst came whole")
    return statistics.median(costs)


# ---------------------------------------------------------------- the benchmark


def bench_receive(datagrams: int = 20_000, rate: int = 20_000, repeats: int = 5) -> dict[str, Any]:
    """Measure every way in turn.

    Args:
        datagrams: of each latency run.
        rate: datagrams per second of it.
        repeats: alternations.

    Returns:
        ``{"rows": […], "measured": {way: {wire_p50, …, send_p50, …, cost, cost_to_event: [per repeat]}}}``, ns.

    Raises:
        NamespaceError: not root, or no iproute2.
        BypassRefused: a way is not possible here; the message says why.
    """
    modules, cores = _modules(), sorted(os.sched_getaffinity(0))
    measured: dict[str, dict[str, list[float]]] = {name: {} for name in WAYS}
    with VethPair("bench") as pair:
        sender = _Sender(pair, cores[0])
        with contextlib.closing(sender.sock), ExitStack() as stamping:
            with pair.inside("left"):
                stamping.enter_context(_stamping(INTERFACE))
            for repeat in range(repeats + 1):  # the first one warms
                for name in WAYS if repeat % 2 else reversed(WAYS):
                    found = _measure(_Receiver(name, modules[name]), sender, cores[-1], datagrams, rate)
                    for metric, value in found.items() if repeat else ():
                        measured[name].setdefault(metric, []).append(value)
    return {"rows": list(_rows(measured)), "measured": measured}


def _measure(receiver: _Receiver, sender: _Sender, core: int, datagrams: int, rate: int) -> dict[str, float]:
    try:
        found = _latency(receiver, sender, core, datagrams, int(1e9 / rate))
        return found | {"cost": _cost(receiver, sender, core, False), "cost_to_event": _cost(receiver, sender, core, True)}
    finally:
        receiver.path.close()


def _rows(measured: dict[str, dict[str, list[float]]]) -> Iterator[dict[str, Any]]:
    metrics = (
        ("wire_p50", "wire to event, p50", P50_TARGET), ("wire_p99", "wire to event, p99", None),
        ("wire_p999", "wire to event, p99.9", None), ("send_p50", "send to event, p50", None),
        ("cost", "core cost, datagram taken and read", COST_TARGET), ("cost_to_event", "core cost, datagram to events", None),
    )  # fmt: skip
    for metric, title, target in metrics:
        theirs = measured[_PEER][metric]
        for name in (name for name in WAYS if name != _PEER):
            ours = measured[name][metric]
            yield {
                "name": f"{title}: {name}",
                "unit": "ns",
                "ours": statistics.median(ours),
                "theirs": statistics.median(theirs),
                "peer": "recvmmsg in the same loop",
                "ratio": statistics.median(b / a for a, b in zip(ours, theirs)),
                "target": target if WAYS[name][0] == AFXDP else None,
            }
