"""The slow twin of a shard's loop: plain Python over a dict book, running each calculation's own Python function.

It shares no code with the generated loop: what is called when, in which order, and what leaves the shard are written again here.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from calculation_twins import Run, interpreted
from test_book import DictBook

from tickmesh.node.calculation import Instance, PlainRecord, new_event
from tickmesh.node.event import (
    ALL_INSTRUMENTS,
    ANY_VIEW,
    DERIVED,
    EVENT,
    NO_PRICE,
    NO_SIDE,
    PEERS,
    EventArray,
    Flag,
    Kind,
    RiskReason,
    Told,
)
from tickmesh.node.risk import RISK_STATE, risk_check

PLAN = """
[processing]
outputs = ["bbo", "trade", "signal", "alert", "bar", "intent", "risk", "status", "gap", "reference", "order", "level", "clear"]
[processing.calculations.average]
use = "ema"
of = "trade.price"
window = 5
[processing.calculations.slow]
use = "ema"
of = "average"
window = 20
silent = true
[processing.calculations.bands]
use = "bollinger"
of = "bbo.mid"
window = 8
[processing.calculations.imbalance]
use = "book_imbalance"
[processing.calculations.paid]
use = "vwap"
symbols = ["B*", "ES*"]
[processing.calculations.range]
use = "atr"
window = 2
[processing.calculations.strategy]
use = "cross_intent"
of = "average"
against = "slow"
[processing.calculations.pair]
use = "spread"
inputs = ["bbo:ESM4", "trade:FAR"]
[processing.calculations.several]
use = "basket"
inputs = ["trade:BTC", "bbo:XYZ", "bbo:FAR"]
[processing.calculations.trend]
use = "ema"
of = "pair"
window = 3
[processing.alerts.jump]
use = "threshold"
of = "bands.upper"
above = 100.05
hysteresis = 0.02
[processing.alerts.crossing]
use = "cross"
of = "bbo.microprice"
against = "trade.price"
[processing.bars.short]
interval_ms = 500
[risk]
enabled = true
max_qty = 5
price_collar_bps = 20
max_rate = 3
[delivery.events]
method = "nats"
"""
"""Calculations of every kind: of trades, of the best bid and offer, of each other, of bars, of several instruments; alerts,
intents and limits."""

CHECK = interpreted(risk_check.py_func)
TRADE_SERIES, BBO_SERIES = ("trade.price", "trade.qty"), ("bbo.mid", "bbo.spread", "bbo.microprice")


def series_of(name: str, event: PlainRecord, exponent: int) -> float:
    """Value of a series that an event gives, as a float64; NaN while a side is empty."""
    if name == "trade.price":
        return event.price / 1e9
    if name == "trade.qty":
        return event.qty / float(10**exponent)
    if event.bid == NO_PRICE or event.ask == NO_PRICE:
        return math.nan
    if name == "bbo.mid":
        return (event.bid + event.ask) / 2e9
    if name == "bbo.spread":
        return (event.ask - event.bid) / 1e9
    bid_qty, ask_qty = float(event.bid_qty), float(event.ask_qty)
    return (float(event.bid) * ask_qty + float(event.ask) * bid_qty) / (bid_qty + ask_qty) / 1e9


def glob(pattern: str, symbol: str) -> bool:
    """``*`` at the end only: all that the plan above needs."""
    return symbol.startswith(pattern[:-1]) if pattern.endswith("*") else symbol == pattern


class JoinTwin:
    """What waits for a calculation over several instruments."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.home: int | None = None
        self.met: dict[int, tuple[int, int, list[int]]] = {}
        self.reached = [0] * len(instance.legs)
        self.held: list[list[tuple[int, PlainRecord]]] = [[] for _ in instance.legs]

    def meet(self, instrument: int, symbol: str, source: int, feed: int) -> None:
        if source == DERIVED:
            self.home = instrument if symbol == self.instance.name else self.home
        elif any(symbol == leg for _, leg in self.instance.legs):
            legs = [j for j, (_, leg) in enumerate(self.instance.legs) if leg == symbol]
            self.met.pop(instrument, None)
            self.met[instrument] = source, feed, legs

    def put(self, kind: str, instrument: int, event: PlainRecord) -> None:
        for j in self.met.get(instrument, (0, 0, []))[2]:
            if self.instance.legs[j][0] == kind and self.home is not None:
                self.reached[j] = max(self.reached[j], event.ts_event)
                copy = PlainRecord(object.__getattribute__(event, "_row").copy())
                copy.kind, copy.instrument, copy.seq = Kind[kind.upper()], self.home, 0
                self.held[j].append((self.reached[j], copy))

    def tell(self, source: int, feed: int, time_ns: int, told: int) -> None:
        last = {j: (source, feed) for source, feed, legs in self.met.values() for j in legs}
        several = len({feed for _, feed, _ in self.met.values()}) > 1
        for j, of in last.items():
            if of == (source, feed) and self.home is not None and (told != Told.BY_CLOCK or several):
                self.reached[j] = max(self.reached[j], time_ns)

    def due(self) -> tuple[int, PlainRecord] | None:
        """The first event in the order of (time, leg), unless an earlier one may come."""
        times = [held[0][0] if held else reached for held, reached in zip(self.held, self.reached)]
        first = times.index(min(times))
        return (first, self.held[first].pop(0)[1]) if self.held[first] else None


class ShardTwin:
    """Feed it events with :meth:`step`; it returns the outputs that the compiled loop must give.

    Args:
        instances: the plan's instances.
        outputs: kinds that leave the shard.
        limits: LIMITS record array of one; None: intents go out unchecked.
        instruments: highest instrument id + 1; all have the book's default tick.
    """

    def __init__(self, instances: tuple[Instance, ...], outputs: frozenset[Kind], limits: Any, instruments: int) -> None:
        self.instances, self.outputs, self.limits, self.instruments = instances, outputs, limits, instruments
        self.book = DictBook(instruments)
        self.known: dict[int, tuple[int, int, str, int]] = {}
        self.stale_sources: set[int] = set()
        self.highest = 0
        self.runs: dict[tuple[int, int], Run] = {}
        self.last: dict[tuple[str, int], float] = {}
        self.risk_states: dict[int, Any] = {}
        self.joins = [JoinTwin(instance) for instance in instances if instance.legs]
        self.refused = 0
        self.out: list[PlainRecord] = []
        self.seq = 0

    # ---- output records

    def _record(self, kind: Kind, cause: PlainRecord, instrument: int) -> PlainRecord:
        """A record with its header filled; :meth:`_emit` gives it its number."""
        times = {"ts_event": cause.ts_event, "ts_recv": cause.ts_recv}
        return new_event(seq=self.seq + 1, kind=kind, instrument=instrument, side=NO_SIDE, **times)

    def _emit(self, record: PlainRecord, kind: Kind) -> None:
        if kind in self.outputs:
            self.seq += 1
            self.out.append(record)

    def _pass(self, event: PlainRecord) -> None:
        copy = PlainRecord(object.__getattribute__(event, "_row").copy())
        copy.seq = self.seq + 1
        self._emit(copy, Kind(event.kind))

    # ---- events

    def step(self, events: EventArray) -> EventArray:
        """Outputs of some events, which are not changed."""
        self.out = []
        for row in events:
            self._one(PlainRecord(np.array([row], EVENT).view(ANY_VIEW)[0]))
            for join in self.joins:
                while (due := join.due()) is not None and join.home is not None:
                    self._call(join.instance, due[1], join.home, leg=due[0])
        rows = [object.__getattribute__(record, "_row") for record in self.out]
        return np.array([row.tobytes() for row in rows], "V64").view(EVENT) if rows else np.zeros(0, EVENT)

    def _one(self, event: PlainRecord) -> None:
        everyone = event.instrument == ALL_INSTRUMENTS
        if event.kind == Kind.TIMER or (everyone and event.kind in (Kind.GAP, Kind.CLEAR)):
            self._everyone(event)
        elif event.kind <= Kind.LEVEL:
            self._book_event(event)
        elif event.kind == Kind.TRADE:
            if event.instrument >= self.instruments:
                self.refused += 1
            elif not event.flags & Flag.NON_PRINTABLE:
                self._trade(event)
        elif event.kind in (Kind.REFERENCE, Kind.PEER_REFERENCE):
            self._reference(event)
        elif event.kind in (Kind.PEER_BBO, Kind.PEER_TRADE):
            for join in self.joins:
                join.put("bbo" if event.kind == Kind.PEER_BBO else "trade", event.instrument, event)
        elif event.kind == Kind.PEER_TIMER:
            for join in self.joins:
                join.tell(event.price, event.aux, event.ts_event, event.flags)
        elif event.kind == Kind.STATUS:
            if self._apply(event):
                self._pass(event)
                self._bbo(event, event.instrument)
        elif event.kind == Kind.GAP:
            self._pass(event)
            if event.instrument < self.instruments:
                self._apply(event)
                self._bbo(event, event.instrument)
        elif event.kind in self.outputs and event.kind not in (Kind.CONFIG,):
            self._pass(event)

    def _everyone(self, event: PlainRecord) -> None:
        if event.kind == Kind.TIMER:
            for join in self.joins:
                join.tell(event.price, event.price, event.ts_event, event.aux)
            if self.joins:
                copy = PlainRecord(object.__getattribute__(event, "_row").copy())
                self.seq += 1
                copy.seq = self.seq
                self.out.append(copy)
            if event.aux == Told.LATE:
                return
        if event.kind in (Kind.GAP, Kind.CLEAR):
            self._pass(event)
            (self.stale_sources.add if event.kind == Kind.GAP else self.stale_sources.discard)(event.price)
        for instrument in range(self.highest):
            if instrument not in self.known or self.known[instrument][3] != event.price or event.price >= PEERS:
                continue
            if event.kind == Kind.TIMER:
                self._listeners("timer", event, instrument)
            else:
                self._one_of_all(Kind(event.kind), event, instrument, event.side)

    def _one_of_all(self, kind: Kind, event: PlainRecord, instrument: int, side: int) -> None:
        one = self._record(kind, event, instrument)
        one.side = side
        self._apply(one)
        self._bbo(one, instrument)

    def _apply(self, event: PlainRecord) -> bool:
        """Apply to the book, complete the event; false if it is refused."""
        names = EVENT.names or ()
        row = object.__getattribute__(event, "_row").view(EVENT)
        result, completed = self.book.apply(tuple(int(row[name]) for name in names))
        for name, value in zip(names, completed):
            row[name] = value
        self.refused += result < 0
        return result == 0

    def _book_event(self, event: PlainRecord) -> None:
        if self._apply(event):
            if event.kind == Kind.EXECUTE and not event.flags & Flag.NON_PRINTABLE:
                self._trade(event)
            self._pass(event)
        elif event.instrument >= self.instruments:
            return
        if not event.flags & Flag.MORE:
            self._bbo(event, event.instrument)

    def _reference(self, event: PlainRecord) -> None:
        if event.instrument >= self.instruments:
            self.refused += 1
            return
        row = object.__getattribute__(event, "_row")
        symbol = row.tobytes()[40:64].rstrip(b"\0").decode()
        old = self.known.get(event.instrument)
        tick = old[0] if old else event.price
        self.known[event.instrument] = (tick, int(np.int8(event.side)), symbol, int(event.flags))
        self.highest = max(self.highest, event.instrument + 1)
        for join in self.joins:
            join.meet(event.instrument, symbol, int(event.flags), int(event.seq if event.kind == Kind.PEER_REFERENCE else event.flags))
        if event.kind == Kind.PEER_REFERENCE:
            return
        self._pass(event)
        if old is None and int(event.flags) in self.stale_sources:
            self._one_of_all(Kind.GAP, event, event.instrument, NO_SIDE)

    def _trade(self, event: PlainRecord) -> None:
        trade = self._record(Kind.TRADE, event, event.instrument)
        trade.price, trade.qty, trade.flags = event.price, event.qty, event.flags & (Flag.HIDDEN | Flag.AUCTION)
        trade.side, trade.id, trade.aux = event.side, event.id, event.aux
        if event.kind == Kind.EXECUTE:
            trade.side = 1 - event.side if event.side < 2 else NO_SIDE
            trade.id, trade.aux = int(event.aux) % (1 << 64), (int(event.id) + (1 << 63)) % (1 << 64) - (1 << 63)
        self._emit(trade, Kind.TRADE)
        for join in self.joins:
            join.put("trade", event.instrument, trade)
        self._listeners("trade", trade, event.instrument)

    def _bbo(self, event: PlainRecord, instrument: int) -> None:
        if not self.book.bbo_changed(instrument):
            return
        bbo = self._record(Kind.BBO, event, instrument)
        bbo.bid, bbo.bid_qty, bbo.ask, bbo.ask_qty, bbo.flags = self.book.bbo(instrument)
        self._emit(bbo, Kind.BBO)
        self._listeners("bbo", bbo, instrument)
        for join in self.joins:
            join.put("bbo", instrument, bbo)

    # ---- calculations

    def _listeners(self, trigger: str, event: PlainRecord, instrument: int) -> None:
        exponent = self.known[instrument][1] if instrument in self.known else 0
        for name in {"trade": TRADE_SERIES, "bbo": BBO_SERIES}.get(trigger, ()):
            self.last[name, instrument] = series_of(name, event, exponent)
        for instance in self.instances:
            if instance.of in TRADE_SERIES or instance.of in BBO_SERIES:
                if str(instance.of).partition(".")[0] == trigger:
                    self._call(instance, event, instrument, self.last[str(instance.of), instrument])
            elif instance.of is None and (trigger in instance.inputs or (trigger == "timer" and instance.timer)):
                self._call(instance, event, instrument)

    def _call(self, instance: Instance, event: PlainRecord, instrument: int, x: float = math.nan, leg: int = -1) -> None:
        if instrument not in self.known:
            return
        tick, exponent, symbol, _ = self.known[instrument]
        if instance.symbols and not any(glob(pattern, symbol) for pattern in instance.symbols):
            return
        y = self.last.get((str(instance.against), instrument), math.nan)
        if (instance.of is not None and math.isnan(x)) or (instance.against is not None and math.isnan(y)):
            return
        run = self.runs.setdefault((instance.index, instrument), self._run(instance))
        kinds = {"signal": Kind.SIGNAL, "alert": Kind.ALERT, "bar": Kind.BAR, "intent": Kind.INTENT}
        kind = kinds[instance.emits]
        returned, filled = run(event, x, y, leg, tick=tick, exponent=exponent, legs=len(instance.legs))
        if kind == Kind.SIGNAL:
            self._signals(instance, event, instrument, returned if isinstance(returned, tuple) else (returned,))
        elif returned:
            self._filled(instance, event, instrument, kind, filled)

    @staticmethod
    def _run(instance: Instance) -> Run:
        given = {p.name: instance.params[p.name].item() for p in instance.calculation.parameters}
        return Run(instance.calculation, False, **given, legs=len(instance.legs))

    def _signals(self, instance: Instance, event: PlainRecord, instrument: int, values: tuple[float, ...]) -> None:
        for j, (name, value) in enumerate(zip(instance.outputs, values, strict=True)):
            if math.isnan(value):
                continue
            self.last[f"{instance.name}.{name}", instrument] = value
            if not instance.silent:
                signal = self._record(Kind.SIGNAL, event, instrument)
                signal.price, signal.qty, signal.calculation, signal.value = event.price, event.qty, instance.index | j << 32, value
                self._emit(signal, Kind.SIGNAL)
            for reader in self.instances:
                if reader.of == f"{instance.name}.{name}":
                    self._call(reader, event, instrument, value)

    def _filled(self, instance: Instance, event: PlainRecord, instrument: int, kind: Kind, filled: PlainRecord) -> None:
        """Put the header under the body that a calculation has filled; what it did not set keeps the header's value."""
        record = self._record(kind, event, instrument)
        record.price, record.qty, record.id, record.aux = filled.price, filled.qty, filled.id, filled.aux
        if kind == Kind.BAR:
            record.ts_event, record.side = filled.ts_event, instance.index
        else:
            record.side, record.calculation = filled.side, instance.index
        if kind == Kind.ALERT:
            record.threshold = filled.threshold
        record.flags = filled.flags
        self._emit(record, kind)
        if kind == Kind.INTENT and self.limits is not None:
            self._decide(record, instrument)
        for reader in self.instances:
            if reader.bars == instance.name:
                self._call(reader, record, instrument)

    def _decide(self, intent: PlainRecord, instrument: int) -> None:
        for place in (instrument, -1):
            self.risk_states.setdefault(place, np.zeros(1, RISK_STATE))
        states = [PlainRecord(self.risk_states[place][0]) for place in (instrument, -1)]
        bid, _, ask, _, flags = self.book.bbo(instrument)
        state = np.uint16(flags & (Flag.STALE | Flag.HALTED))
        numbers = (np.int64(bid), np.int64(ask), state, np.int64(self.known[instrument][1]))
        with np.errstate(all="ignore"):
            reason = int(CHECK(PlainRecord(self.limits[0]), *states, intent, *numbers))
        decision = self._record(Kind.RISK, intent, instrument)
        decision.side, decision.price, decision.qty, decision.id, decision.aux = intent.side, intent.price, intent.qty, intent.seq, reason
        decision.flags = 0 if reason == RiskReason.ACCEPTED else Flag.REFUSED
        self._emit(decision, Kind.RISK)
