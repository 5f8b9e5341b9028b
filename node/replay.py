"""Replay: recordings through the same compiled pipeline as live, at full speed and without NATS, to a summary."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tickmesh.control.config import Config
from tickmesh.node.event import ALL_INSTRUMENTS, ANY_VIEW, EVENT, EventArray
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.loops import replay_loop
from tickmesh.node.peers import LocalExchange
from tickmesh.node.pipeline import make_shards, make_table
from tickmesh.node.reader import PacketReader, Reader, SourceError, StreamReader, open_reader
from tickmesh.node.shard import BATCH_EVENTS, Shard
from tickmesh.node.summary import summarise
from tickmesh.node.timers import make_clock, with_timers
from tickmesh.transports.recording import SLACK
from tickmesh.transports.ring import Ring
from tickmesh.transports.toolbox import zeros_aligned

_BATCH_EVENTS_PYTHON = 4096
_RING_EVENTS = 1 << 12


def replay(
    config: Config,
    files: Sequence[Path],
    source: str | None = None,
    depth: int = 10,
    progress: Callable[[str], None] | None = None,
    *,
    folder: Path = Path(),
    observe: Callable[[int, EventArray], None] | None = None,
) -> dict[str, Any]:
    """Run recordings through a source's configuration; returns the summary (see :func:`tickmesh.node.summary.summarise`).

    Args:
        config: which source settings, calculations and limits to use.
        files: recordings, read in this order.
        source: name of the source; none: the only one that reads recordings.
        depth: levels of each book in the summary.
        progress: told when something has to be compiled.
        folder: where user calculations are.
        observe: called with (shard, outputs) after every batch; slower, for tests and tools.

    Raises:
        SourceError: the source or a file is not there.
    """
    name = choose_source(config, source)
    options = config.data_sources[name]
    table = make_table(config)
    in_one_loop = observe is None and config.cluster.shards == 1
    reader = open_reader(name, options, files, table, 0, progress, alone=not in_one_loop, folder=config.folder)
    in_parts = observe is not None or config.cluster.shards > 1
    rings = [Ring.create(None, 1 << 16 if in_parts else _RING_EVENTS, EVENT, mode="lossy") for _ in range(config.cluster.shards)]
    shards = make_shards(config, rings, folder, reader.order_ids, progress)
    exchange = LocalExchange(shards[0].plan, config, table)
    clock = make_clock(config.processing.timer_interval_ms * 1_000_000)
    if in_one_loop and isinstance(reader, (StreamReader, PacketReader)):
        module = replay_loop(reader.decoder, shards[0].module, progress, timers=True)
        if exchange:
            shards[0].step(exchange.first[0].view(ANY_VIEW), 0, len(exchange.first[0]))
        started = time.perf_counter()
        _replay_compiled(module, reader, shards[0], clock)
    else:
        for shard in shards:
            shard.prepare_step()
        started = time.perf_counter()
        _Batches(shards, table, rings, exchange, observe).run(reader, clock)
    seconds = time.perf_counter() - started
    messages = reader.messages
    return summarise(
        source={"format": reader.format, "bytes": reader.bytes, "messages_total": sum(messages.values()), "seconds": seconds},
        messages=messages,
        malformed=reader.malformed,
        gaps=shards[0].gaps(),
        duplicates=reader.duplicates,
        shards=shards,
        instruments=table,
        depth=depth,
    )


def choose_source(config: Config, name: str | None) -> str:
    """The named source, or the only one there is.

    Raises:
        SourceError: there is none of that name, or several to choose from.
    """
    if name is not None:
        if name not in config.data_sources:
            raise SourceError(name, f"is not configured; there are: {', '.join(config.data_sources) or 'none'}")
        return name
    names = [n for n, options in config.data_sources.items() if options.type in ("file", "pcap")] or list(config.data_sources)
    if len(names) != 1:
        raise SourceError("*", f"name one with --source: {', '.join(names)}" if names else "the configuration has no source")
    return names[0]


def _replay_compiled(module: Any, reader: Reader, shard: Shard, clock: Any) -> None:
    batch, timer = zeros_aligned(BATCH_EVENTS, EVENT), np.zeros(1, EVENT)
    timed = (batch, batch.view(ANY_VIEW), shard.arrays, clock, timer, timer.view(ANY_VIEW))
    if isinstance(reader, StreamReader):
        while reader.buffer is not None:
            reader.position = module.replay(reader.buffer, reader.position, reader.end, 0, reader.feed, *timed)
            reader.next_file()
    elif isinstance(reader, PacketReader):
        while reader.next_batch():
            module.replay(reader.buffer, reader.packets, 0, reader.count, 0, reader.feed, *timed)
        nothing = np.zeros(SLACK, np.uint8), reader.feed.arbiter.no_packets
        module.replay(*nothing, 0, 0, reader.flush_ns, reader.feed, *timed)


class _Batches:
    """Shards stepped from Python, batch by batch, with what they take of each other."""

    def __init__(
        self,
        shards: list[Shard],
        table: InstrumentTable,
        rings: list[Ring],
        exchange: LocalExchange,
        observe: Callable[[int, EventArray], None] | None,
    ) -> None:
        self._shards, self._table, self._exchange, self._observe = shards, table, exchange, observe
        self._readers = [ring.reader("replay") for ring in rings] if observe or exchange else []

    def run(self, reader: Reader, clock: Any) -> None:
        for shard, events in self._exchange.first.items():
            self._step(shard, events)
        batch, wide = zeros_aligned(_BATCH_EVENTS_PYTHON, EVENT), zeros_aligned(2 * _BATCH_EVENTS_PYTHON, EVENT)
        while count := reader.read(batch):
            timed = with_timers(clock, batch[:count], 0, wide)
            for index in range(len(self._shards)):
                self._step(index, of_shard(timed, self._table, index, len(self._shards)))

    def _step(self, index: int, events: EventArray) -> None:
        for first in range(0, len(events), BATCH_EVENTS):
            self._shards[index].step(events.view(ANY_VIEW), first, min(first + BATCH_EVENTS, len(events)))
            outputs = self._readers[index].read(1 << 16).view(EVENT) if self._readers else events[:0]
            if self._observe:
                self._observe(index, outputs)
            for taker, taken in self._exchange.pass_on(index, outputs):
                self._step(taker, taken)


def of_shard(events: EventArray, table: InstrumentTable, shard: int, shards: int) -> EventArray:
    """Those events of a batch that concern a shard's instruments, or all instruments."""
    if shards == 1:
        return events
    everywhere = events["instrument"] == ALL_INSTRUMENTS
    places = table.arrays.records["shard"][np.where(everywhere, 0, events["instrument"])]
    chosen: EventArray = events[everywhere | (places == shard)]
    return chosen
