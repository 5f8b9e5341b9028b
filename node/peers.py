"""What a shard takes of other shards: which outputs, and how they look among its inputs.

A calculation over several instruments is at home on one shard, where its name belongs like a symbol's, and stands there as an instrument
of its own name. Outputs of its legs that live elsewhere become PEER events there: with the sequence of the output as their source
sequence, so that a journal says how far it has come in each of the other streams.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from tickmesh.control.config import Config
from tickmesh.control.sharding import shard_of
from tickmesh.node.event import ALL_INSTRUMENTS, DERIVED, EVENT, PEERS, REFERENCE, EventArray, Kind
from tickmesh.node.frames import InstrumentName, InstrumentNames
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.shard import ShardPlan
from tickmesh.transports.toolbox import zeros_aligned

Leg = tuple[str, str]
"""``bbo`` or ``trade``, and the symbol."""
_NONE = np.int64(-1)
_BBO, _TRADE, _TIMER = np.uint8(Kind.BBO), np.uint8(Kind.TRADE), np.uint8(Kind.TIMER)
_interning = threading.Lock()
"""Instruments of another shard are entered by whichever thread meets them first."""


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
        self._ids = {Kind.BBO: np.full(16, _NONE), Kind.TRADE: np.full(16, _NONE)}
        self._feeds: set[int] = set()
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
        met = [self._meet(int(event["instrument"]), self._names[int(event["instrument"])]) for event in self._names.learn(outputs)]
        self._check_named(outputs)
        kinds, instruments = outputs["kind"], outputs["instrument"]
        timers = kinds == _TIMER
        if timers.any():
            timers &= np.isin(outputs["price"], list(self._feeds))
        wanted, ids = timers.copy(), np.full(len(outputs), ALL_INSTRUMENTS, np.int64)
        for kind, places in self._ids.items():
            mine = (kinds == kind) & (instruments < len(places))
            found = places[np.where(mine, instruments, 0)]
            mine &= found != _NONE
            ids[mine], wanted = found[mine], wanted | mine
        chosen = zeros_aligned(int(np.count_nonzero(wanted)), EVENT)
        chosen[:] = outputs[wanted]
        self._translate(chosen, ids[wanted])
        definitions = [event for event in met if event is not None]
        return np.concatenate([*definitions, chosen]) if definitions else chosen

    def do_without_names(self, instruments: Iterable[int]) -> None:
        """These instruments have no names, and are not wanted."""
        for number in instruments:
            self._named = _with(self._named, number, True)

    def _check_named(self, outputs: EventArray) -> None:
        kinds = outputs["kind"]
        met = outputs["instrument"][(kinds == _BBO) | (kinds == _TRADE)]
        unnamed = met[(met >= len(self._named)) | ~self._named[np.minimum(met, len(self._named) - 1)]]
        if len(unnamed):
            raise UnnamedInstrument(self._origin, sorted({int(number) for number in unnamed}))

    def _translate(self, events: EventArray, ids: np.ndarray) -> None:
        """In place: kinds of the other shard's, the node's ids; a timer says whose it is, and what has told it."""
        kinds, timers = events["kind"].copy(), events["kind"] == Kind.TIMER
        events["kind"] = np.where(kinds == Kind.BBO, Kind.PEER_BBO, np.where(timers, Kind.PEER_TIMER, Kind.PEER_TRADE))
        events["instrument"] = ids
        feeds, told = events["price"][timers], events["aux"][timers]
        events["price"][timers], events["aux"][timers], events["flags"][timers] = self._source, feeds, told

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
        for kind, place in (("bbo", Kind.BBO), ("trade", Kind.TRADE)):
            if kind in wanted:
                self._ids[place] = _with(self._ids[place], number, node)
        self._feeds.add(name.source)
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
