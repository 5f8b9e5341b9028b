"""What a shard takes of other shards: which outputs, and how they look among its inputs.

A calculation over several instruments is at home on one shard, where its name belongs like a symbol's, and stands there as an instrument
of its own name. Outputs of its legs that live elsewhere become PEER events there: with the sequence of the output as their source
sequence, so that a journal says how far it has come in each of the other streams.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tickmesh.control.config import Config
from tickmesh.control.sharding import shard_of
from tickmesh.node.event import ALL_INSTRUMENTS, DERIVED, EVENT, PEERS, REFERENCE, EventArray, Kind
from tickmesh.node.frames import InstrumentName, InstrumentNames
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.shard import ShardPlan
from tickmesh.transports.codecache import load_compiled
from tickmesh.transports.toolbox import copy_record, inlined, quick, zeros_aligned

Leg = tuple[str, str]
"""``bbo`` or ``trade``, and the symbol."""
_NONE = np.int64(-1)
_BBO, _TRADE, _TIMER = np.uint8(Kind.BBO), np.uint8(Kind.TRADE), np.uint8(Kind.TIMER)
_PEER_BBO, _PEER_TRADE, _PEER_TIMER = np.uint8(Kind.PEER_BBO), np.uint8(Kind.PEER_TRADE), np.uint8(Kind.PEER_TIMER)
_interning = threading.Lock()
"""Instruments of another shard are entered by whichever thread meets them first."""


@quick
def _choose(events: Any, bbo: Any, trade: Any, named: Any, feeds: Any, source: Any) -> Any:
    """In place: of another shard's outputs those that are wanted, with the node's ids and PEER kinds, at the front; returns how many.

    A timer says whose it is, and what has told it. -1: some are of an instrument whose name is not known (`events` is spoilt then).
    """
    n = 0
    for i in range(events.size):
        kind, instrument, node = events[i].kind, np.int64(events[i].instrument), np.int64(ALL_INSTRUMENTS)
        if kind == _TIMER:
            wanted = _is_among(feeds, events[i].price)
        elif kind in (_BBO, _TRADE):
            if instrument >= named.size or not named[instrument]:
                return -1
            places = bbo if kind == _BBO else trade
            node = places[instrument] if instrument < places.size else _NONE
            wanted = node != _NONE
        else:
            wanted = False
        if not wanted:
            continue
        copy_record(events, n, events, i)
        event = events[n]
        event.instrument = np.uint32(node)
        event.kind = _PEER_BBO if kind == _BBO else _PEER_TRADE if kind == _TRADE else _PEER_TIMER
        if kind == _TIMER:
            event.price, event.aux, event.flags = source, event.price, np.uint16(event.aux)
        n += 1
    return n


def warm() -> None:
    """Compile what Python calls here (:func:`tickmesh.transports.codecache.load_compiled`)."""
    places = np.zeros(1, np.int64)
    _choose(zeros_aligned(0, EVENT), places, places, np.zeros(1, np.bool_), places, np.int64(0))


@inlined
def _is_among(values: Any, value: Any) -> Any:
    for one in values:
        if one == value:
            return True
    return False


@dataclass(frozen=True)
class Wanted:
    """What the calculations at home on a shard need.

    Attributes:
        homes: their names.
        legs: what they take of each other shard.
    """

    homes: tuple[str, ...] = ()
    legs: Mapping[int, frozenset[Leg]] | None = None

    @classmethod
    def of(cls, plan: ShardPlan, config: Config, shard: int) -> Wanted:
        """By the plan and the placements of a configuration."""
        placed = config.cluster.shards, config.cluster.shard_overrides
        mine = [instance for instance in plan.instances if instance.legs and shard_of(instance.name, *placed) == shard]
        legs: dict[int, set[Leg]] = {}
        for kind, symbol in (leg for instance in mine for leg in instance.legs):
            owner = shard_of(symbol, *placed)
            if owner != shard:
                legs.setdefault(owner, set()).add((kind, symbol))
        return cls(tuple(instance.name for instance in mine), {owner: frozenset(found) for owner, found in sorted(legs.items())})


class UnnamedInstrument(Exception):
    """Outputs of an instrument that nobody has told the name of yet: it may be one that is wanted.

    Attributes:
        origin: the shard.
        instruments: their numbers there.
    """

    def __init__(self, origin: int, instruments: list[int]) -> None:
        super().__init__(f"shard {origin} has not told the names of its instruments {', '.join(map(str, instruments[:8]))} yet")
        self.origin, self.instruments = origin, instruments


class PeerEvents:
    """Turns outputs of one shard into inputs of another one.

    Args:
        table: the node's instruments.
        origin: the shard whose outputs they are.
        legs: what is wanted of it.
    """

    def __init__(self, table: InstrumentTable, origin: int, legs: Iterable[Leg]) -> None:
        self._table, self._source, self._origin = table, PEERS + origin, origin
        self._kinds: dict[str, set[str]] = {}
        for kind, symbol in legs:
            self._kinds.setdefault(symbol, set()).add(kind)
        self._names = InstrumentNames()
        self._bbo, self._trade = np.full(16, _NONE), np.full(16, _NONE)
        self._feeds = np.zeros(0, np.int64)
        self._named = np.zeros(16, np.bool_)

    def know(self, names: InstrumentNames) -> EventArray:
        """Instruments of that shard that were announced before; returns the definitions (PEER_REFERENCE) of those that are wanted."""
        found = [self._meet(number, name) for number, name in names.items()]
        return np.concatenate([zeros_aligned(0, EVENT), *(event for event in found if event is not None)])

    def take(self, outputs: EventArray) -> EventArray:
        """What of some outputs is wanted, as PEER events with the node's ids; definitions of instruments before all others.

        Raises:
            UnnamedInstrument: some are of an instrument that is not known; nothing has been taken.
        """
        definitions = [self._meet(int(event["instrument"]), self._names[int(event["instrument"])]) for event in self._names.learn(outputs)]
        chosen = zeros_aligned(len(outputs), EVENT)
        chosen[:] = outputs
        count = int(_choose(chosen, self._bbo, self._trade, self._named, self._feeds, np.int64(self._source)))
        if count < 0:
            raise UnnamedInstrument(self._origin, self._unnamed(outputs))
        chosen = chosen[:count]
        wanted = [event for event in definitions if event is not None]
        return np.concatenate([*wanted, chosen]) if wanted else chosen

    def do_without_names(self, instruments: Iterable[int]) -> None:
        """These instruments have no names, and are not wanted."""
        for number in instruments:
            self._named = _with(self._named, number, True)

    def _unnamed(self, outputs: EventArray) -> list[int]:
        kinds = outputs["kind"]
        met = {int(number) for number in outputs["instrument"][(kinds == _BBO) | (kinds == _TRADE)]}
        return sorted(number for number in met if number >= len(self._named) or not self._named[number])

    def _meet(self, number: int, name: InstrumentName) -> EventArray | None:
        """An instrument of the other shard has been announced there."""
        self._named = _with(self._named, number, True)
        wanted = self._kinds.get(name.symbol or "")
        if wanted is None:
            return None
        assert name.symbol is not None
        exponent = int(np.int8(np.uint8(name.exponent)))
        with _interning:
            node = self._table.intern(name.symbol, self._source, name.tick_size, exponent, self._origin)
        if "bbo" in wanted:
            self._bbo = _with(self._bbo, number, node)
        if "trade" in wanted:
            self._trade = _with(self._trade, number, node)
        self._feeds = np.union1d(self._feeds, np.array([name.source]))
        event = reference(Kind.PEER_REFERENCE, node, self._source, name.symbol, name.tick_size, exponent)
        event["seq"] = name.source
        return event


def _with(places: np.ndarray, at: int, value: int) -> np.ndarray:
    """An array with a value in it, larger if it must be."""
    if at >= len(places):
        none = False if places.dtype == np.bool_ else _NONE
        places = np.concatenate([places, np.full(max(len(places), at + 1 - len(places)), none, places.dtype)])
    places[at] = value
    return places


def reference(kind: Kind, instrument: int, source: int, symbol: str, tick_size: int, exponent: int) -> EventArray:
    """The definition of an instrument, EVENT[1] without times."""
    event = zeros_aligned(1, EVENT)
    event["kind"], event["instrument"], event["flags"], event["side"] = kind, instrument, source, np.uint8(np.int8(exponent))
    named = event.view(REFERENCE)
    named["tick_size"], named["symbol"] = tick_size, symbol.encode("ascii")
    return event


def home_references(table: InstrumentTable, shard: int, homes: Iterable[str]) -> EventArray:
    """The definitions of the instruments that stand for calculations at home on a shard, with the node's ids."""
    events = [zeros_aligned(0, EVENT)]
    for name in homes:
        with _interning:
            node = table.intern(name, DERIVED, 1, 0, shard)
        events.append(reference(Kind.REFERENCE, node, DERIVED, name, 1, 0))
    return np.concatenate(events)


class LocalExchange:
    """Shards of one process that take of each other: a replay of recordings.

    Args:
        plan, config: what they run.
        table: their instruments.
    """

    def __init__(self, plan: ShardPlan, config: Config, table: InstrumentTable) -> None:
        self.first: dict[int, EventArray] = {}
        """What a shard begins with."""
        self._takers: dict[int, list[tuple[int, PeerEvents]]] = {}
        if config.cluster.shards > 1:
            load_compiled("tickmesh.node.peers", "exchange between shards")
        for shard in range(config.cluster.shards):
            wanted = Wanted.of(plan, config, shard)
            if wanted.homes:
                self.first[shard] = home_references(table, shard, wanted.homes)
            for origin, legs in (wanted.legs or {}).items():
                self._takers.setdefault(origin, []).append((shard, PeerEvents(table, origin, legs)))

    def __bool__(self) -> bool:
        return bool(self.first)

    def pass_on(self, origin: int, outputs: EventArray) -> list[tuple[int, EventArray]]:
        """What other shards take of a shard's outputs: (shard, events) each."""
        return [(shard, events) for shard, peer in self._takers.get(origin, ()) if len(events := peer.take(outputs))]
