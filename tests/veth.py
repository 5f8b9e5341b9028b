"""Two namespaces joined by a cable, and a source's receiver at its far end, without a node around it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from nodes import until

from tickmesh.control.config import parse_config
from tickmesh.node import book
from tickmesh.node.arbiter import ENDS, EXPECTED, HELD_COUNT, KNOWN_NEXT
from tickmesh.node.event import EVENT, EventArray, Kind
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.receivers import MulticastReceiver, ReceiverContext
from tickmesh.ops.namespaces import INTERFACE, VethPair, lacking
from tickmesh.ops.simulated_lines import FaultConfig, LineConfig, SimulatedLines, send_lines
from tickmesh.ops.simulator import Simulator, SimulatorConfig
from tickmesh.transports.multicast import parse_endpoint
from tickmesh.transports.ring import Ring
from tickmesh.transports.toolbox import IDLE_MODES

ENDPOINTS = ("udp://239.78.1.1:26400", "udp://239.78.1.2:26401")
WAYS = {"none": "sockets", "packet": "packet", "afxdp": "afxdp"}
"""Values of the key `bypass`, and the ways that they are."""
needs_namespaces = pytest.mark.skipif(bool(lacking()), reason=lacking())


@contextmanager
def cable(queues: int = 1) -> Iterator[VethPair]:
    """A pair that nothing is left of afterwards."""
    name = f"c{os.getpid()}"
    with VethPair(name, queues) as pair:
        yield pair
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"-{name}-" not in left


def simulated(messages: int, *faults: FaultConfig, seed: int = 3, rate: int = 20_000, mtu_bytes: int = 1500) -> SimulatedLines:
    simulator = Simulator(SimulatorConfig(seed=seed, symbols=6, rate=rate, messages=messages))
    config = LineConfig(faults=faults or (FaultConfig(), FaultConfig()), heartbeat_ns=20_000_000, mtu_bytes=mtu_bytes)
    return SimulatedLines(simulator, config)


class Received:
    """A receiver that runs, and the events that it has made."""

    def __init__(self, receiver: MulticastReceiver, ring: Ring) -> None:
        self.receiver, self._reader = receiver, ring.reader("test", start="oldest")
        self._parts: list[EventArray] = []

    def events(self) -> EventArray:
        """All so far."""
        while len(part := self._reader.read(1 << 16)):
            self._parts.append(part.view(EVENT).copy())
        return np.concatenate(self._parts) if self._parts else np.zeros(0, EVENT)

    def ended(self) -> None:
        """Wait until the feed's end has come, and nothing is missing any more or waited for."""
        state = self.receiver.feed.arbiter.state

        def done() -> bool:
            return bool(state[ENDS] > 0 and state[HELD_COUNT] == 0 and state[EXPECTED] >= state[KNOWN_NEXT])

        until(lambda: done() or self.receiver.error, "the end of the session", 20)
        assert self.receiver.error is None, self.receiver.error


def source_text(bypass: str, **keys: object) -> str:
    keys = {"endpoint": ENDPOINTS[0], "interface": INTERFACE, "data_format": "itch50", "framing": "moldudp64", "bypass": bypass} | keys
    rest = "".join(f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}\n" for key, value in keys.items())
    return (
        f'[cluster]\nname = "t"\n[data_sources.lines]\ntype = "multicast"\n{rest}'
    )


def make(bypass: str, ring: Ring, name: str = "lines", **keys: object) -> MulticastReceiver:
    keys = {"endpoint_b": ENDPOINTS[1]} | keys
    options = parse_config(source_text(bypass, **keys)).data_sources["lines"]
    return MulticastReceiver(name, options, ReceiverContext(InstrumentTable(64), [ring], 0, IDLE_MODES["sleep"]))


@contextmanager
def receiving(bypass: str, *, before: Callable[[MulticastReceiver], object] | None = None, **keys: object) -> Iterator[Received]:
    """A receiver on the calling thread's interface, started (after `before` has had it); ended and closed on leaving."""
    ring = Ring.create(None, 1 << 17, EVENT)
    with ExitStack() as closing:
        closing.callback(ring.close)
        receiver = make(bypass, ring, **keys)
        closing.callback(receiver.close)
        closing.callback(lambda: receiver.join(10) or pytest.fail("the receiver does not end"))
        closing.callback(receiver.ask_stop)
        if before is not None:
            before(receiver)
        receiver.start()
        until(lambda: getattr(receiver.path.face, "begun", True), "the beginning")
        yield Received(receiver, ring)


def send(pair: VethPair, lines: SimulatedLines, speed: str = "realtime", keep: Callable[..., None] | None = None) -> None:
    """Send lines from the near end, from this thread."""
    with pair.inside("left"):
        send_lines(lines, ENDPOINTS[: len(lines.config.faults)], interface=INTERFACE, speed=speed, keep=keep)


def send_payloads(pair: VethPair, payloads: list[bytes]) -> None:
    """Send datagrams to line A from the near end."""
    to = parse_endpoint(ENDPOINTS[0])
    with pair.inside("left"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(pair.left_address))
        for payload in payloads:
            sender.sendto(payload, (to.address, to.port))


def same_but_times(one: EventArray, other: EventArray) -> bool:
    """Equal events, whenever they were received."""
    if len(one) != len(other):
        return False
    a, b = one.copy(), other.copy()
    a["ts_recv"] = b["ts_recv"] = 0
    return bool(np.array_equal(a.view("V64"), b.view("V64")))


def market(events: EventArray) -> EventArray:
    """Without what depends on the clock: gaps and timers."""
    return events[~np.isin(events["kind"], (Kind.TIMER,))]


def books_of(events: EventArray, symbols: dict[int, str]) -> dict[str, dict[str, object]]:
    """Final books by symbol, as the simulator's truth has them."""
    books = book.make_books(64, 1 << 14)
    taken, results = events.copy(), np.zeros(len(events), np.int64)
    book.apply_events(books, taken, results, np.zeros(0, EVENT))
    assert not results.any()
    found = {}
    for instrument, symbol in symbols.items():
        bids, asks = book.top(books, instrument, 10_000)
        found[symbol] = {
            "bids": [[price // 100_000, qty, orders] for price, qty, orders in bids],
            "asks": [[price // 100_000, qty, orders] for price, qty, orders in asks],
            "orders": book.resting_orders(books, instrument),
        }
    return found


def assert_books_are_true(received: Received, lines: SimulatedLines) -> None:
    table = received.receiver.context.table
    found = books_of(received.events(), {i: table.symbol(i) for i in range(len(table))})
    truth = lines.simulator.truth(10_000)
    assert found.keys() == truth.keys()
    for symbol, expected in truth.items():
        assert found[symbol] == {key: expected[key] for key in ("bids", "asks", "orders")}, symbol




def programs_on(interface: str) -> list[str]:
    """Names of the XDP programs on an interface."""
    shown = subprocess.run(["ip", "-details", "link", "show", interface], capture_output=True, text=True, check=True).stdout
    return re.findall(r"prog/xdp id \d+ name (\S+)", shown)
