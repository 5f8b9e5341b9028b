"""Receive paths on a virtual link: from the wire to the event and to the output, and what a datagram costs the receiving core. AF_XDP,
packet ring, recvmmsg.

All feed the same compiled loop, so that they differ by ``receive_batch`` alone: it receives, decodes, steps a shard (book, BBO, four
calculations, a strategy and its risk decision, as in :mod:`tickmesh.ops.bench_loop`) and reads the output ring. A sender on one core sends
what :mod:`tickmesh.ops.stamped_orders` tells of; the loop, spinning on another, looks at the clock when an order is decoded, and again
when the reader has the BBO that comes of it. From the wire, both count from the time when the packet left the sender's interface. All of
it runs on the receiving core: a node has a thread for each of receiver and shard, and a ring between them (``tickmesh bench ring`` says
what that takes), which cannot be measured where there are two cores and the sender needs one.

Outputs are checked after every run: each order must have brought its BBO, with its prices and its time, each replaced buy order a risk
decision, and all of it must be the same by every way, bit for bit, but for times.

A run is short: where a thread does not leave a core, the kernel gives whoever waits for it 50 ms of every second, whatever the priority
(its fair server, Linux 6.12), and then all that came meanwhile is late.

The cost of a datagram is measured by sending a burst while nobody looks, and timing how long the loop takes to drain it. Ways alternate
within each repeat; ratios are medians of the repeats' own. AF_XDP runs in both of its modes. It takes root, iproute2 and two cores, and no
real card: what a card and its driver add or save is not in it.

Run it: ``tickmesh bench receive``.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tickmesh.node.decoder import decoder_parts, make_feed
from tickmesh.node.event import ANY_VIEW, EVENT, Kind
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.protocol import load_framing, load_spec
from tickmesh.node.risk import make_limits
from tickmesh.node.shard import Shard
from tickmesh.ops.bench_loop import STAGES, WHOLE
from tickmesh.ops.namespaces import INTERFACE, VethPair
from tickmesh.ops.stamped_orders import OPENING, ORDERS, STAMP_MASK, Ages, StampedOrders, WrongOutputs, checked_bbos, content, on_core
from tickmesh.transports.afxdp import Mode
from tickmesh.transports.codecache import load_generated
from tickmesh.transports.receive_path import AFXDP, MODULES, PACKET_RING, SOCKETS, OpenPath, Wish, open_way
from tickmesh.transports.ring import Ring
from tickmesh.transports.toolbox import zeros_aligned

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
_RING_EVENTS, _READER_MS = 1 << 16, 600_000
"""As large as a node's output ring; a busy host must not end a run."""
_OUTPUTS_EACH = 12
"""Room for an order's outputs: a BBO, five signals, an intent and a decision."""
_SETTLE_S, _LIMIT_S = 0.05, 3.0
_WARM_PART = 10
PERCENTILES = {"p50": 50.0, "p99": 99.0, "p999": 99.9}
HISTOGRAMS = {"wire": "wire to event", "output": "wire to output"}

_RECEIVE = """\
# Receive by {way}, decode, step a shard, read its outputs, and look at the clock. Generated.
import numpy as np

from tickmesh.node.event import ANY_VIEW, EVENT
from tickmesh.node.shard_state import warm_arrays
from tickmesh.transports.{module} import receive_batch, warm_line
from tickmesh.transports.references import refer
from tickmesh.transports.ring import ring_read_batch
from tickmesh.transports.toolbox import cpu_pause, le64, loop, monotonic_ns, now_ns
import tickmesh_generated.{decoder} as decoder_module
import tickmesh_generated.{shard} as shard_module
from tickmesh_generated.{decoder} import packet_events
from tickmesh_generated.{shard} import step

FIRST = np.int64(0)
REPLACE, BBO = {replace}, {bbo}


@loop
def follow(lines, buffers, packets, feed, batch, batch_any, shard, reader, wanted, event_ages, outputs, output_ns, until_ns):
    # until so many BBOs have come or the clock says until_ns: how old replaced orders were when they had been decoded, the outputs, and
    # when a reader had each; how many of both
    referred = refer(shard)
    decoded, got, told, rounds = 0, 0, 0, 0
    while told < wanted:
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
                event_ns = monotonic_ns()
                if events > 0:
                    step(batch_any, FIRST, events, referred)
                    taken = ring_read_batch(shard.out, reader, outputs[got:], outputs.size - got)
                    read_ns = monotonic_ns()
                    for i in range(events):
                        if batch[i].kind == REPLACE and decoded < event_ages.size:
                            event_ages[decoded] = (event_ns - batch[i].ts_event) & {mask}
                            decoded += 1
                    for i in range(got, got + taken):
                        output_ns[i] = read_ns
                        told += outputs[i].kind == BBO
                    got += taken
                elif first >= count:
                    break
    return decoded, got


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
    feed, batch, numbers = decoder_module.warm_feed(), np.zeros(8, EVENT), np.zeros(0, np.int64)
    lines, buffers, several = (kernel,) * {lines}, (buffer,) * {lines}, (packets,) * {lines}
    follow(lines, buffers, several, feed, batch, batch.view(ANY_VIEW), warm_arrays(shard_module), 0, 0, numbers, np.zeros(0, ANY_VIEW),
           numbers, 0)
    drain(lines, buffers, several, feed, batch, 0, 0, np.zeros(1, np.uint64))
"""


# ---------------------------------------------------------------- a run


class _Run:
    """A shard that has seen nothing, and what one run leaves."""

    def __init__(self, ring: Ring, packets: int) -> None:
        self.shard = Shard(STAGES[WHOLE], ring.arrays, instruments_max=8, orders_max=1 << 16)
        limits = make_limits(max_qty="1000", max_notional="1000000", price_collar_bps=50, max_rate=10_000_000)
        self.shard.arrays.limits[:] = np.repeat(limits, 2)
        self.reader = ring.reader("bench")
        self.wanted = ORDERS * (OPENING + packets)
        self.event_ages = np.zeros(ORDERS * packets, np.int64)
        self.outputs = zeros_aligned(_OUTPUTS_EACH * self.wanted, EVENT)
        self.output_ns = np.zeros(len(self.outputs), np.int64)
        for array in (self.event_ages, self.outputs, self.output_ns, *self.shard.arrays.books):
            if isinstance(array, np.ndarray):
                _touch(array)

    def ages(self, way: str, decoded: int, got: int, times: Ages) -> dict[str, Ages]:
        """By metric, without the first part of the run. Raises WrongOutputs."""
        outputs = self.outputs[:got]
        places = checked_bbos(way, outputs, times)
        warm = len(times) // _WARM_PART
        left = outputs["ts_event"][places[1::2]][warm:]
        decided = outputs["ts_event"][outputs["kind"] == Kind.RISK]
        refused = int(self.shard.arrays.core["refused"][0])
        if decoded != len(self.event_ages) or refused or not np.isin(left, decided).all() or self.reader.lag:
            raise WrongOutputs(way, "an order was not decoded, was refused by the book, or led to no risk decision")
        event_ages = self.event_ages[ORDERS * warm :]
        output_ages = (self.output_ns[places[1::2]][warm:] - left) & STAMP_MASK
        return {"send": event_ages[0::2], "wire": event_ages[1::2], "output": output_ages}


def _touch(array: npt.NDArray[Any]) -> None:
    """Have the pages of an array in memory before the clock runs; it keeps its content."""
    array.reshape(-1).view(np.uint8)[::4096] |= 0


# ---------------------------------------------------------------- the receiver


class _Receiver:
    """One way's loops on an open path."""

    def __init__(self, name: str, module: ModuleType) -> None:
        way, mode = WAYS[name]
        self.name, self._module = name, module
        wish = Wish(endpoints=(ENDPOINT,), interface=INTERFACE, owner="bench", buffer_bytes=_BUFFER_BYTES, mode=mode)
        self._batch = zeros_aligned(256, EVENT)
        self._feed: Any = None
        self.start_anew()
        self._path: OpenPath = open_way(way, wish)

    def __enter__(self) -> _Receiver:
        self._path.face.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._path.close()

    def start_anew(self) -> None:
        """A feed that has seen nothing."""
        self._feed = make_feed(load_spec("itch50"), InstrumentTable(8), framing=load_framing("moldudp64"), gap_wait_ns=0)

    def follow(self, run: _Run, limit_s: float) -> tuple[int, int]:
        """Replaced orders and outputs that came."""
        face, until_ns = self._path.face, time.monotonic_ns() + int(limit_s * 1e9)
        decoded, got = self._module.follow(
            face.kernels, face.buffers, face.packets, self._feed, self._batch, self._batch.view(ANY_VIEW), run.shard.arrays,
            run.reader.slot, run.wanted, run.event_ages, run.outputs.view(ANY_VIEW), run.output_ns, until_ns,
        )  # fmt: skip
        return int(decoded), int(got)

    def drain(self, decoding: bool) -> tuple[int, int]:
        """Take what waits: ns, datagrams."""
        face = self._path.face
        took, got = self._module.drain(
            face.kernels, face.buffers, face.packets, self._feed, self._batch, int(decoding), _BURST, np.zeros(1, np.uint64)
        )
        return int(took), int(got)


def _modules() -> dict[str, ModuleType]:
    decoder = decoder_parts(load_spec("itch50"), load_framing("moldudp64"))
    with Ring.create(None, 8, EVENT) as ring:
        shard = Shard(STAGES[WHOLE], ring.arrays, instruments_max=1, orders_max=16).module
    known = {"decoder": _stem(decoder), "shard": _stem(shard), "lines": 1, "mask": STAMP_MASK}
    kinds = {"replace": int(Kind.REPLACE), "bbo": int(Kind.BBO)}
    loops = {
        way: load_generated("bench_receive", _RECEIVE.format(way=way, module=_stem(MODULES[way]), **known, **kinds))
        for way in {way for way, _ in WAYS.values()}
    }
    return {name: loops[way] for name, (way, _) in WAYS.items()}


def _stem(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


class _Place(NamedTuple):
    """What runs have in common: the sender, the receiver's core, packets of a run and ns between them."""

    sender: StampedOrders
    core: int
    packets: int
    gap_ns: int


def _latency(receiver: _Receiver, place: _Place, known: set[str]) -> dict[str, Ages]:
    """Ages of one run; `known` holds the content of the outputs of all, which is one."""
    receiver.start_anew()
    with Ring.create(None, _RING_EVENTS, EVENT, reader_timeout_ms=_READER_MS) as ring:
        run = _Run(ring, place.packets)
        place.sender.open_book()
        with on_core(place.core):
            sending = place.sender.send(place.packets, place.gap_ns)
            decoded, got = receiver.follow(run, place.packets * place.gap_ns / 1e9 + _LIMIT_S)
        sending.join()
        ages = run.ages(receiver.name, decoded, got, sending.times)
        known.add(content(run.outputs[:got]))
    if len(known) > 1:
        raise WrongOutputs(receiver.name, "outputs are not those of the run before")
    return ages


def _cost(receiver: _Receiver, place: _Place, decoding: bool) -> float:
    """ns of the receiving core for a datagram, median of some bursts."""
    costs = []
    for _ in range(_BURSTS):
        receiver.start_anew()
        place.sender.send(_BURST, 0).join()
        time.sleep(_SETTLE_S)
        with on_core(place.core):
            took, got = receiver.drain(decoding)
        if got == _BURST:
            costs.append(took / got)
    if not costs:
        raise RuntimeError(f"{receiver.name}: no burst came whole")
    return statistics.median(costs)


# ---------------------------------------------------------------- the benchmark


def bench_receive(datagrams: int = 8_000, rate: int = 20_000, repeats: int = 9) -> dict[str, Any]:
    """Measure every way in turn.

    Args:
        datagrams: of each latency run.
        rate: datagrams per second of it; together not half a second.
        repeats: alternations.

    Returns:
        ``{"rows": […], "measured": {way: {wire_p50, …, output_p50, …, send_p50, …, cost, cost_to_event: [per repeat]}}, "histograms":
        {"wire to event", "wire to output": {way: {least ns of a bucket: datagrams of all repeats}}}, "lines": these as text}``, ns.

    Raises:
        NamespaceError: not root, or no iproute2.
        BypassRefused: a way is not possible here; the message says why.
        WrongOutputs: something was lost, or came out as it should not.
    """
    modules, cores = _modules(), sorted(os.sched_getaffinity(0))
    measured: dict[str, dict[str, list[float]]] = {name: {} for name in WAYS}
    ages: dict[str, dict[str, list[Ages]]] = {metric: {name: [] for name in WAYS} for metric in HISTOGRAMS}
    known: set[str] = set()
    with VethPair("bench") as pair, StampedOrders(pair, ENDPOINT, cores[0]) as sender:
        place = _Place(sender, cores[-1], datagrams, int(1e9 / rate))
        for repeat in range(repeats + 1):  # the first one warms
            for name in WAYS if repeat % 2 else reversed(WAYS):
                with _Receiver(name, modules[name]) as receiver:
                    run = _latency(receiver, place, known)
                    costs = {"cost": _cost(receiver, place, False), "cost_to_event": _cost(receiver, place, True)}
                for metric, value in {**_percentiles(run), **costs}.items() if repeat else ():
                    measured[name].setdefault(metric, []).append(value)
                for metric in ages if repeat else ():
                    ages[metric][name].append(run[metric])
    histograms = {
        title: {name: histogram(np.concatenate(parts)) for name, parts in ages[metric].items()} for metric, title in HISTOGRAMS.items()
    }
    lines = [line for title, by_way in histograms.items() for line in histogram_lines(title, by_way)]
    return {"rows": list(_rows(measured)), "measured": measured, "histograms": histograms, "lines": lines}


def _percentiles(run: Mapping[str, Ages]) -> dict[str, float]:
    return {f"{metric}_{name}": float(np.percentile(ages, at)) for metric, ages in run.items() for name, at in PERCENTILES.items()}


def histogram(ages: Ages) -> dict[int, int]:
    """How many ages there are by power of two: ``{1024: 3}`` are three from 1024 to 2047 ns. Below 1 counts as 1."""
    powers, counts = np.unique(np.frexp(np.maximum(ages, 1))[1] - 1, return_counts=True)
    return {1 << int(power): int(count) for power, count in zip(powers, counts)}


def histogram_lines(title: str, by_way: Mapping[str, Mapping[int, int]]) -> Iterator[str]:
    """Histograms side by side, as a table for people."""
    yield ""
    yield f"{title}, datagrams of all repeats by time"
    buckets = sorted({least for counts in by_way.values() for least in counts})
    table = [(f"{least:,}", f"{2 * least:,}", *(f"{counts.get(least, 0):,}" for counts in by_way.values())) for least in buckets]
    table.insert(0, ("from ns", "below", *by_way))
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        yield "  ".join(f"{text:>{width}}" for text, width in zip(row, widths))


def _rows(measured: dict[str, dict[str, list[float]]]) -> Iterator[dict[str, Any]]:
    metrics = (
        ("wire_p50", "wire to event, p50", P50_TARGET), ("wire_p99", "wire to event, p99", None),
        ("wire_p999", "wire to event, p99.9", None), ("output_p50", "wire to output, p50", None),
        ("output_p99", "wire to output, p99", None), ("output_p999", "wire to output, p99.9", None),
        ("send_p50", "send to event, p50", None),
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
