"""A venue that speaks FIX: serves the books of a simulated market to those who subscribe, and acknowledges orders.

A MarketDataRequest (35=V) is answered by a snapshot (35=W) of each symbol, then by changes (35=X); a wrong one is rejected (35=Y). A
NewOrderSingle (35=D) is acknowledged by an execution report (35=8), and nothing more happens to it. The market goes on while somebody is
subscribed. Books have ten levels.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tickmesh.node.fix_frame import Message
from tickmesh.node.fix_session import Clock, Ended, Event, LoggedOn, Received, SessionOptions, utc_timestamp
from tickmesh.node.fix_store import MemoryStore, Store
from tickmesh.node.fix_tcp import Accepted, Acceptor, Link
from tickmesh.ops.simulator import Simulator, SimulatorConfig

DEPTH = 10
_BLOCK_MESSAGES = 1000
_SUBSCRIPTIONS_MAX = 256
_PRICE_UNIT = 100_000
"""The simulator's prices are in units of 1e-4."""
_SIDES = (("bids", b"0"), ("asks", b"1"))
_NEW, _CHANGE, _DELETE = b"0", b"1", b"2"

Levels = dict[tuple[bytes, int], int]
"""Side (MDEntryType) and price (1e-9) -> quantity."""


class Market:
    """Books of a simulated market, in steps.

    Attributes:
        books: symbol -> its levels.
    """

    def __init__(self, config: SimulatorConfig) -> None:
        self._simulator = Simulator(config)
        self.books: dict[str, Levels] = {}
        while not all(self.books.values()) or not self.books:  # before the open there is nothing
            self.step(20 * _BLOCK_MESSAGES)

    def step(self, messages: int = _BLOCK_MESSAGES) -> None:
        """Let the market go on by so many messages."""
        self._simulator.next_block(messages)
        self.books = {symbol: _levels(truth) for symbol, truth in self._simulator.truth(DEPTH).items()}


def _levels(truth: Mapping[str, Any]) -> Levels:
    return {(kind, level[0] * _PRICE_UNIT): level[1] for side, kind in _SIDES for level in truth[side]}


@dataclass
class _Subscription:
    """What one request asks for: symbols, and the books as they were told last."""

    symbols: list[str]
    told: dict[str, Levels] = field(default_factory=dict)


class MarketDataVenue:
    """An acceptor's application: one per session.

    Args:
        market: whose books are served.
    """

    def __init__(self, market: Market) -> None:
        self.market = market
        self.subscriptions: dict[bytes, _Subscription] = {}
        self.orders = 0
        self._link: Link | None = None

    async def handle(self, link: Link, event: Event) -> None:
        self._link = link
        if isinstance(event, LoggedOn | Ended):
            self.subscriptions.clear()
        elif isinstance(event, Received) and not event.admin:
            for message in event.messages():
                self._take(link, message)

    def _take(self, link: Link, message: Message) -> None:
        if message.type == "V":
            self._request(link, message)
        elif message.type == "D":
            self._order(link, message)
        else:
            link.session.business_reject(message, 3, "Unsupported Message Type")

    def _request(self, link: Link, message: Message) -> None:
        name, kind = message.get(262) or b"", message.get(263)
        symbols = [value.decode("latin-1") for entry in message.group(146, 55) for tag, value in entry if tag == 55]
        if kind == b"2":
            if self.subscriptions.pop(name, None) is None:
                self._refuse(link, name, b"8", "there is no such subscription")
            return
        unknown = [symbol for symbol in symbols if symbol not in self.market.books]
        if not name or kind not in (b"0", b"1"):
            self._refuse(link, name, b"4", "SubscriptionRequestType (263) must be 0, 1 or 2, and MDReqID (262) given")
        elif unknown or not symbols:
            self._refuse(link, name, b"0", f"unknown symbol {unknown[0]}" if unknown else "no symbols")
        elif name in self.subscriptions or len(self.subscriptions) >= _SUBSCRIPTIONS_MAX:
            self._refuse(link, name, b"1", "this MDReqID is in use, or there are too many")
        else:
            subscription = _Subscription(symbols)
            for symbol in symbols:
                self._snapshot(link, name, symbol, subscription)
            if kind == b"1":
                self.subscriptions[name] = subscription

    def _refuse(self, link: Link, name: bytes, reason: bytes, text: str) -> None:
        link.session.send("Y", [(262, name or b"?"), (281, reason), (58, text.encode("latin-1", "replace"))])

    def _snapshot(self, link: Link, name: bytes, symbol: str, subscription: _Subscription) -> None:
        book = subscription.told[symbol] = self.market.books[symbol]
        entries = [pair for (kind, price), qty in book.items() for pair in ((269, kind), (270, _decimal(price)), (271, b"%d" % qty))]
        link.session.send("W", [(262, name), (55, symbol.encode()), (268, b"%d" % len(book)), *entries])

    def publish(self) -> None:
        """Tell everybody what has changed since they were told last."""
        link = self._link
        if link is None or not link.session.logged_on:
            return
        for name, subscription in self.subscriptions.items():
            for symbol in subscription.symbols:
                self._changes(link, name, symbol, subscription)
        link.push()

    def _changes(self, link: Link, name: bytes, symbol: str, subscription: _Subscription) -> None:
        old, new = subscription.told[symbol], self.market.books[symbol]
        entries: list[tuple[int, bytes]] = []
        count = 0
        for key in (*(k for k in old if k not in new), *(k for k in new if old.get(k) != new[k])):
            action = _DELETE if key not in new else _CHANGE if key in old else _NEW
            entries += [(279, action), (269, key[0]), (55, symbol.encode()), (270, _decimal(key[1]))]
            entries += [(271, b"%d" % new[key])] if key in new else []
            count += 1
        if count:
            link.session.send("X", [(262, name), (268, b"%d" % count), *entries])
        subscription.told[symbol] = new

    def _order(self, link: Link, message: Message) -> None:
        self.orders += 1
        number = b"%d" % self.orders
        given = {tag: message.get(tag) for tag in (11, 55, 54)}
        kept = [(tag, value) for tag, value in given.items() if value is not None]
        qty = message.get(38) or b"0"
        body = [(37, number), (17, number), (150, b"0"), (39, b"0"), *kept, (151, qty), (14, b"0"), (6, b"0")]
        link.session.send("8", [*body, (60, utc_timestamp(link.session.clock.wall()))])


def _decimal(price: int) -> bytes:
    """A price in units of 1e-9 as FIX has it."""
    whole, rest = divmod(price, 1_000_000_000)
    return f"{whole}.{rest:09d}".rstrip("0").rstrip(".").encode()


class FixVenue:
    """The whole venue: an acceptor and a market that goes on.

    Args:
        config: of the market.
        sessions: who may log on.
        stores: makes the store of a session; in memory by default.
        interval_s: between two steps of the market.
        tls: context of a server, for TLS.
    """

    def __init__(
        self,
        config: SimulatorConfig,
        sessions: list[SessionOptions],
        *,
        stores: Callable[[SessionOptions], Store] | None = None,
        interval_s: float = 0.05,
        step_messages: int = _BLOCK_MESSAGES,
        tls: ssl.SSLContext | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.market = Market(config)
        self.venues = [MarketDataVenue(self.market) for _ in sessions]
        make = stores or (lambda _: MemoryStore())
        accepted = [Accepted(replace(o, initiator=False), make(o), venue) for o, venue in zip(sessions, self.venues)]
        self.acceptor = Acceptor(accepted, tls=tls, clock=clock)
        self._interval_s, self._step_messages = interval_s, step_messages
        self._task: asyncio.Task[None] | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Listen, and begin; returns the port."""
        found = await self.acceptor.start(host, port)
        self._task = asyncio.create_task(self._go_on())
        return found

    async def _go_on(self) -> None:
        due = time.monotonic()
        while True:
            due = max(due + self._interval_s, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            if any(venue.subscriptions for venue in self.venues):
                self.market.step(self._step_messages)
                for venue in self.venues:
                    venue.publish()

    async def stop(self) -> None:
        """Log everybody out, and end."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self.acceptor.stop()
