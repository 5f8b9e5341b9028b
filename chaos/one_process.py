"""Signals of calculations over several shards, after whatever has happened to a cluster, against one process that replays the same feed.

The feed of a local cluster is simulated from a seed, so its recording can be made again. It is replayed with a single shard, where nothing
travels and nobody fails over. Every signal that the legs have come far enough for must be in its output stream, once, with the same time,
cause and value.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tickmesh.control.config import Config, parse_config
from tickmesh.control.sharding import shard_of
from tickmesh.node.event import EVENT, EventArray, Kind, Told
from tickmesh.node.exchange import Streams, last_output
from tickmesh.node.frames import InstrumentNames
from tickmesh.node.pipeline import make_plan
from tickmesh.node.replay import replay
from tickmesh.node.subscription import subscribe
from tickmesh.ops.local_cluster import LocalCluster
from tickmesh.ops.simulator import Simulator, SimulatorConfig
from tickmesh.transports.nats import Login

_BLOCK_MESSAGES = 4096
_READ_S = 600.0
_SHOWN = 5
_KEPT = [int(kind) for kind in (Kind.SIGNAL, Kind.BBO, Kind.TRADE, Kind.TIMER, Kind.REFERENCE, Kind.GAP)]
Row = tuple[int, ...]
"""A signal: time, calculation and output, price, quantity and value."""


@dataclass
class JoinReport:
    """What the comparison found.

    Attributes:
        signals: by calculation, how many are in the streams.
        gaps: GAP events in the streams: what the feed has lost cannot be made again; nothing is compared from the first one on.
        compared: by calculation, how many of the signals have been compared.
        faults: by calculation, what differs, for people.
    """

    signals: dict[str, int] = field(default_factory=dict)
    gaps: int = 0
    compared: dict[str, int] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether there are signals, and all that can be compared are the right ones."""
        return not self.faults and all(self.signals.values())


async def compare(cluster: LocalCluster) -> JoinReport:
    """Compare, after the feed has ended and everything is out."""
    config = parse_config(cluster.configuration())
    outputs = {shard: await _outputs(cluster, shard) for shard in range(config.cluster.shards)}
    report = JoinReport(gaps=sum(int(np.count_nonzero(events["kind"] == Kind.GAP)) for events in outputs.values()))
    last_ns = max(_last_ns(events) for events in outputs.values())
    found = _signals(outputs)
    wanted = await asyncio.to_thread(_replayed, cluster, config, last_ns)
    until_ns = min(_before_gap(events) for events in outputs.values())
    for instance in make_plan(config, Path()).instances:
        if instance.legs:
            due_ns = min(_reached(outputs, config, kind, symbol) for kind, symbol in instance.legs)
            report.signals[instance.name] = len(found.get(instance.name, []))
            mine, its = ([row for row in rows.get(instance.name, []) if row[0] < until_ns] for rows in (found, wanted))
            report.compared[instance.name] = len(mine)
            faults = _differences(mine, its, min(due_ns, until_ns))
            if faults:
                report.faults[instance.name] = faults
    return report


def _differences(found: list[Row], wanted: list[Row], due_ns: float) -> list[str]:
    """`found` must be the beginning of `wanted`, and have all before `due_ns`."""
    for place, (mine, its) in enumerate(zip(found, wanted)):
        if mine != its:
            return [f"signal {place} of {len(found)} is {mine}, in one process it is {its}"]
    if len(found) > len(wanted):
        return [f"{len(found) - len(wanted)} signals more than in one process, from {found[len(wanted)]} on"]
    lacking = [row for row in wanted[len(found) :] if row[0] < due_ns]
    return [f"{len(lacking)} signals are not there, the first is {lacking[0]}", *(str(row) for row in lacking[1:_SHOWN])] if lacking else []


async def _outputs(cluster: LocalCluster, shard: int) -> EventArray:
    """A shard's outputs of the kinds that matter here, from the first to the last that is stored now."""
    found, url = [np.zeros(0, EVENT)], cluster.nats.url
    async with asyncio.timeout(_READ_S):
        last = await _last(cluster, shard)
        async with subscribe(url, cluster=cluster.options.name, shard=shard, from_sequence="all") as batches:
            async for batch in batches:
                found.append(batch.events[np.isin(batch.events["kind"], _KEPT)])
                if batch.first + max(batch.missing, len(batch.events)) - 1 >= last:
                    break
    return np.concatenate(found)


async def _last(cluster: LocalCluster, shard: int) -> int:
    return await last_output(Streams(cluster.options.name, cluster.nats.url, Login()), shard)


def _names(events: EventArray) -> dict[int, str]:
    names = InstrumentNames()
    names.learn(events)
    return {number: str(name.symbol) for number, name in names.items()}


def _signals(outputs: Mapping[int, EventArray]) -> dict[str, list[Row]]:
    """By the symbol that they are of."""
    found: dict[str, list[Row]] = {}
    for events in outputs.values():
        symbols, signals = _names(events), events[events["kind"] == Kind.SIGNAL]
        for number, symbol in symbols.items():
            mine = signals[signals["instrument"] == number]
            found[symbol] = [tuple(int(event[name]) for name in ("ts_event", "id", "price", "qty", "aux")) for event in mine]
    return found


def _last_ns(events: EventArray) -> int:
    """The feed's time of the last of a shard's outputs; what our own clock has told, or a gap at a takeover, is not of that time."""
    ours = (events["kind"] == Kind.GAP) | ((events["kind"] == Kind.TIMER) & (events["aux"] == Told.BY_CLOCK))
    return int(events["ts_event"][~ours].max(initial=0))


def _before_gap(events: EventArray) -> float:
    """The time up to which nothing of the feed is missing."""
    gaps = np.flatnonzero(events["kind"] == Kind.GAP)
    before = events["ts_event"][: gaps[0]] if len(gaps) else events["ts_event"][:0]
    return int(before.max(initial=0)) if len(gaps) else math.inf


def _reached(outputs: Mapping[int, EventArray], config: Config, kind: str, symbol: str) -> float:
    """How far a leg is known to have come: by its own last event, or by a timer of its shard."""
    events = outputs[shard_of(symbol, config.cluster.shards, config.cluster.shard_overrides)]
    numbers = [number for number, name in _names(events).items() if name == symbol]
    mine = np.isin(events["instrument"], numbers) & (events["kind"] == Kind[kind.upper()])
    timers = (events["kind"] == Kind.TIMER) & (events["aux"] != Told.BY_CLOCK)
    times = events["ts_event"][mine | timers]
    return int(times.max()) if len(times) else -math.inf


def _replayed(cluster: LocalCluster, config: Config, last_ns: int) -> dict[str, list[Row]]:
    """The feed up to a time, once more, through one shard."""
    path, options = cluster.options.folder / "feed.itch", cluster.options
    simulator = Simulator(SimulatorConfig(seed=options.seed, symbols=options.symbols, rate=options.rate))
    with path.open("wb") as file:
        while not simulator.finished and simulator.time_ns <= last_ns:
            image, end = simulator.next_block(_BLOCK_MESSAGES)
            file.write(image[:end].tobytes())
    market = config.data_sources["market"].model_dump(exclude_unset=True)
    recorded = {name: value for name, value in market.items() if name not in ("endpoint", "interface", "framing")}
    document = config.model_dump(exclude_unset=True)
    document["data_sources"]["market"] = recorded | {"type": "file", "path": [str(path)]}
    document["cluster"] = {name: value for name, value in document["cluster"].items() if name not in ("shards", "shard_overrides")}
    document.pop("leadership", None)
    document.pop("replication", None)
    parts: list[EventArray] = []
    replay(Config.model_validate(document), [path], observe=lambda _, events: parts.append(events[np.isin(events["kind"], _KEPT)].copy()))
    return _signals({0: np.concatenate(parts)})
