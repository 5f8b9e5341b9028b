"""A venue that speaks FIX: serves the books and trades of a simulated market to those who subscribe, and acknowledges orders.

A MarketDataRequest (35=V) is answered by a snapshot (35=W) of each symbol, then by changes (35=X), as deep as it asks (264) and of the
kinds that it asks for (269: bids, offers, trades); a wrong one is rejected (35=Y). A SecurityListRequest (35=x) is answered by all
symbols (35=y). A NewOrderSingle (35=D) is acknowledged by an execution report (35=8), and nothing more happens to it. The market goes on
while somebody is subscribed.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tickmesh.node.fix_frame import Message
from tickmesh.node.fix_session import Clock, Ended, Event, LoggedOn, Received, SessionOptions, utc_timestamp, whole_value
from tickmesh.node.fix_store import MemoryStore, Store
from tickmesh.node.fix_tcp import Accepted, Acceptor, Link
from tickmesh.ops.order_flow import FOREVER
from tickmesh.ops.simulated_trades import Print, TradeTape
from tickmesh.ops.simulator import OPEN_NS, Simulator, SimulatorConfig

_BLOCK_MESSAGES = 1000
_OPENING_MESSAGES = 256
_STEP_MESSAGES_MAX = 1 << 16
_SUBSCRIPTIONS_MAX = 256
_ENTRIES_MAX = 1000
"""Most entries of one message; more go into several."""
_PRICE_UNIT = 100_000
"""The simulator's prices are in units of 1e-4."""
_BID, _OFFER, _TRADE = b"0", b"1", b"2"
_SIDES = (("bids", _BID), ("asks", _OFFER))
_NEW, _CHANGE, _DELETE = b"0", b"1", b"2"

Levels = dict[tuple[bytes, int], int]
"""Side (MDEntryType) and price (1e-9) -> quantity."""
Pairs = list[tuple[int, bytes]]


class Market:
    """A simulated market, from its opening on, in steps.

    Attributes:
        simulator: the market itself.
        prints: trades of the last step, and those that were broken in it, by symbol.
    """

    def __init__(self, config: SimulatorConfig) -> None:
        self.simulator = Simulator(config)
        self.prints: dict[str, list[Print]] = {}
        self._tape, self._digest = TradeTape(), hashlib.sha256()
        self._books: dict[tuple[str, int], Levels] = {}
        while not self.finished and not self._open:
            self.step(_OPENING_MESSAGES)

    @property
    def _open(self) -> bool:
        """Whether every symbol has opened: before that there is nothing to tell."""
        return self.simulator.time_ns >= OPEN_NS and bool((self.simulator.engine.touches["live"] > 0).all())

    @property
    def finished(self) -> bool:
        """Whether the day is over."""
        return self.simulator.finished

    @property
    def sha256(self) -> str:
        """Of the messages so far, as a file of them has it."""
        return self._digest.hexdigest()

    def step(self, messages: int = _BLOCK_MESSAGES, until_ns: int = FOREVER) -> None:
        """Let the market go on by so many messages, at most to a simulated time."""
        image, end = self.simulator.next_block(messages, until_ns)
        self._digest.update(image[:end].data)
        self._books.clear()
        self.prints = {}
        for found in self._tape.read(image[:end]):
            self.prints.setdefault(self.simulator.symbols[found.locate - 1], []).append(found)

    def book(self, symbol: str, depth: int = 0) -> Levels:
        """A symbol's levels, best first, bids before offers; 0: all of them."""
        if (symbol, depth) not in self._books:
            sides = self.simulator.book(symbol, depth or None)
            self._books[symbol, depth] = {(kind, level[0] * _PRICE_UNIT): level[1] for side, kind in _SIDES for level in sides[side]}
        return self._books[symbol, depth]


@dataclass
class _Subscription:
    """What one request asks for: symbols, how deep, which kinds of entries; and the books as they were told last."""

    symbols: list[str]
    depth: int
    kinds: frozenset[bytes]
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
        self._symbols = frozenset(market.simulator.symbols)
        self._link: Link | None = None

    async def handle(self, link: Link, event: Event) -> None:
        self._link = link
        if isinstance(event, LoggedOn | Ended):
            self.subscriptions.clear()
        elif isinstance(event, Received) and not event.admin:
            for message in event.messages():
                self._take(link, message)

    def _take(self, link: Link, message: Message) -> None:
        takers = {"V": self._request, "D": self._order, "x": self._list}
        if message.type in takers:
            takers[message.type](link, message)
        else:
            link.session.business_reject(message, 3, "Unsupported Message Type")

    def _request(self, link: Link, message: Message) -> None:
        name, kind = message.get(262) or b"", message.get(263)
        if kind == b"2":
            if self.subscriptions.pop(name, None) is None:
                self._refuse(link, name, b"8", "there is no such subscription")
            return
        symbols = [value.decode("latin-1") for value in _values(message, 146, 55)]
        kinds = frozenset(_values(message, 267, 269)) or frozenset((_BID, _OFFER))
        depth = whole_value(message.get(264) or b"0")
        wrong = self._wrong(message, name, symbols, kinds, depth)
        if wrong is not None:
            self._refuse(link, name, *wrong)
            return
        subscription = _Subscription(symbols, depth or 0, kinds)
        for symbol in symbols:
            self._snapshot(link, name, symbol, subscription)
        if kind == b"1":
            self.subscriptions[name] = subscription

    def _wrong(
        self, message: Message, name: bytes, symbols: list[str], kinds: frozenset[bytes], depth: int | None
    ) -> tuple[bytes, str] | None:
        """Why a request is rejected: MDReqRejReason (281) and in words."""
        unknown = [symbol for symbol in symbols if symbol not in self._symbols]
        strange = sorted(kinds - {_BID, _OFFER, _TRADE})
        if not name or message.get(263) not in (b"0", b"1"):
            return b"4", "SubscriptionRequestType (263) must be 0, 1 or 2, and MDReqID (262) given"
        if unknown or not symbols:
            return b"0", f"unknown symbol {unknown[0]}" if unknown else "no symbols"
        if name in self.subscriptions or len(self.subscriptions) >= _SUBSCRIPTIONS_MAX:
            return b"1", "this MDReqID is in use, or there are too many"
        if depth is None:
            return b"5", "MarketDepth (264) must be 0 (all levels) or their number"
        if message.get(263) == b"1" and message.get(265) not in (None, b"1"):
            return b"6", "MDUpdateType (265) must be 1: changes"
        if message.get(266) == b"N":
            return b"7", "books are aggregated by price (266=Y)"
        return (b"8", f"MDEntryType (269) {strange[0].decode('latin-1')}: bids (0), offers (1), trades (2) are there") if strange else None

    def _refuse(self, link: Link, name: bytes, reason: bytes, text: str) -> None:
        link.session.send("Y", [(262, name or b"?"), (281, reason), (58, text.encode("latin-1", "replace"))])

    def _list(self, link: Link, message: Message) -> None:
        """SecurityList of all symbols, whatever was asked for."""
        symbols = [(55, symbol.encode()) for symbol in self.market.simulator.symbols]
        name = message.get(320) or b"?"
        link.session.send("y", [(320, name), (322, name), (560, b"0"), (146, b"%d" % len(symbols)), *symbols])

    def _book(self, symbol: str, subscription: _Subscription) -> Levels:
        book = self.market.book(symbol, subscription.depth)
        return {key: qty for key, qty in book.items() if key[0] in subscription.kinds}

    def _snapshot(self, link: Link, name: bytes, symbol: str, subscription: _Subscription) -> None:
        if not subscription.kinds & {_BID, _OFFER}:
            return
        book = subscription.told[symbol] = self._book(symbol, subscription)
        entries = [pair for (kind, price), qty in book.items() for pair in ((269, kind), (270, _decimal(price)), (271, b"%d" % qty))]
        link.session.send("W", [(262, name), (55, symbol.encode()), (268, b"%d" % len(book)), *entries])

    def publish(self) -> None:
        """Tell everybody what has changed since they were told last, and what has traded in the market's last step."""
        link = self._link
        if link is None or not link.session.logged_on:
            return
        for name, subscription in self.subscriptions.items():
            for symbol in subscription.symbols:
                entries = self._traded(symbol, subscription) + self._changes(symbol, subscription)
                for at in range(0, len(entries), _ENTRIES_MAX):
                    some = entries[at : at + _ENTRIES_MAX]
                    link.session.send("X", [(262, name), (268, b"%d" % len(some)), *(pair for entry in some for pair in entry)])
        link.push()

    def _traded(self, symbol: str, subscription: _Subscription) -> list[Pairs]:
        """Trades as new entries, broken ones as deleted; their numbers in MDEntryID (278)."""
        if _TRADE not in subscription.kinds:
            return []
        entries = []
        for found in self.market.prints.get(symbol, ()):
            action = _NEW if found.qty else _DELETE
            entry = [(279, action), (269, _TRADE), (278, b"%d" % found.match), (55, symbol.encode())]
            sizes = [(270, _decimal(found.price * _PRICE_UNIT)), (271, b"%d" % found.qty)] if found.qty else []
            entries.append([*entry, *sizes])
        return entries

    def _changes(self, symbol: str, subscription: _Subscription) -> list[Pairs]:
        if symbol not in subscription.told:
            return []
        old, new = subscription.told[symbol], self._book(symbol, subscription)
        entries = []
        for key in (*(k for k in old if k not in new), *(k for k in new if old.get(k) != new[k])):
            action = _DELETE if key not in new else _CHANGE if key in old else _NEW
            entry = [(279, action), (269, key[0]), (55, symbol.encode()), (270, _decimal(key[1]))]
            entries.append([*entry, (271, b"%d" % new[key])] if key in new else entry)
        subscription.told[symbol] = new
        return entries

    def _order(self, link: Link, message: Message) -> None:
        self.orders += 1
        number = b"%d" % self.orders
        given = {tag: message.get(tag) for tag in (11, 55, 54)}
        kept = [(tag, value) for tag, value in given.items() if value is not None]
        qty = message.get(38) or b"0"
        body = [(37, number), (17, number), (150, b"0"), (39, b"0"), *kept, (151, qty), (14, b"0"), (6, b"0")]
        link.session.send("8", [*body, (60, utc_timestamp(link.session.clock.wall()))])


def _values(message: Message, count_tag: int, tag: int) -> list[bytes]:
    """A group's values of the tag that its entries begin with."""
    return [value for entry in message.group(count_tag, tag) for found, value in entry if found == tag]


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
        step_messages: how many messages a step is.
        speed: simulated seconds per second, in place of `step_messages`.
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
        speed: float | None = None,
        tls: ssl.SSLContext | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.market = Market(config)
        self.venues = [MarketDataVenue(self.market) for _ in sessions]
        make = stores or (lambda _: MemoryStore())
        accepted = [Accepted(replace(o, initiator=False), make(o), venue) for o, venue in zip(sessions, self.venues)]
        self.acceptor = Acceptor(accepted, tls=tls, clock=clock)
        self._interval_s, self._step_messages, self._speed = interval_s, step_messages, speed
        self._due_ns = self.market.simulator.time_ns
        self._task: asyncio.Task[None] | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Listen, and begin; returns the port.

        Raises:
            OSError: the address cannot be used.
        """
        found = await self.acceptor.start(host, port)
        self._task = asyncio.create_task(self._go_on())
        return found

    def check(self) -> None:
        """Raise what has ended the market before its time."""
        if self._task is not None and self._task.done() and not self._task.cancelled():
            self._task.result()

    async def _go_on(self) -> None:
        last_s = due_s = time.monotonic()
        while True:
            due_s = max(due_s + self._interval_s, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())
            now_s = time.monotonic()
            elapsed_s, last_s = now_s - last_s, now_s
            if not self.market.finished and any(venue.subscriptions for venue in self.venues):
                self._step(elapsed_s)
                for venue in self.venues:
                    venue.publish()

    def _step(self, elapsed_s: float) -> None:
        if self._speed is None:
            self.market.step(self._step_messages)
            return
        self._due_ns += int(elapsed_s * self._speed * 1e9)
        self.market.step(_STEP_MESSAGES_MAX, self._due_ns)
        self._due_ns = min(self._due_ns, self.market.simulator.next_ns)  # a market that is too fast for this host falls behind

    async def stop(self) -> None:
        """Log everybody out, and end."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        await self.acceptor.stop()
