"""Exchange between shards: a shard reads what its calculations take of others from their output streams, into an input ring of its own.

The sequence of an output is the source sequence of what becomes of it here, so that the journal says from where on each stream is to be
read: after a restart and after a takeover, each output is taken once. Who leads the other shard, and where, does not matter: its
stream is one. What a stream has lost (its oldest messages were deleted) becomes a GAP event.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import nats.js.errors as js_errors
import numpy as np
import structlog
import uvloop

from tickmesh.control.store import end_task
from tickmesh.node.event import ALL_INSTRUMENTS, DERIVED, EVENT, NO_SIDE, PEERS, EventArray, Kind
from tickmesh.node.frames import stream_name, stream_subject
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.peers import Leg, PeerEvents, UnnamedInstrument, Wanted, home_references
from tickmesh.node.restore import RestoredShard
from tickmesh.node.subscription import Subscription
from tickmesh.transports.connection import backoff_s
from tickmesh.transports.nats import Login, connect
from tickmesh.transports.ring import Ring
from tickmesh.transports.toolbox import zeros_aligned

_FULL_S = 0.001
_NO_FEED = -1
_CLOSE_S = 2.0
_STOP_S = 5.0
_UNNAMED_MAX = 12
"""Times that names are asked for, with pauses of up to two seconds."""
_log = structlog.get_logger("exchange")


@dataclass(frozen=True)
class Streams:
    """Where the output streams are.

    Attributes:
        cluster: its name.
        target: address of NATS; None: there is no delivery over NATS.
        login: how to log in.
    """

    cluster: str
    target: str | None
    login: Login


class Exchange:
    """Brings one shard what it takes of others. :meth:`take` begins, and changes what is taken; :meth:`ask_stop` ends.

    Args:
        number: of the shard.
        ring: of the shard's inputs; this object is its only writer.
        table: the node's instruments.
        known: what the shard's journal says.
        begins: by shard, the output after which one that the journal does not know is read; absent: from now on.

    Attributes:
        seen: by shard, the last output that was looked at.
        missing: by shard, outputs that its stream has lost.
        errors: by shard, why its stream cannot be read now.
    """

    def __init__(self, number: int, ring: Ring, table: InstrumentTable, known: RestoredShard, begins: Mapping[int, int]) -> None:
        self.number, self._ring, self._table = number, ring, table
        self.seen: dict[int, int] = {}
        self.missing: dict[int, int] = {}
        self.errors: dict[int, str] = {}
        self._wanted = Wanted()
        self._streams: Streams | None = None
        self._begins = dict(begins)
        positions = known.positions[PEERS:DERIVED]
        places = np.flatnonzero((positions["sequence"] > 0) | (positions["same"] > 0))
        self._positions = {int(place): int(positions["sequence"][place]) for place in places}
        self._announced = {known.symbol(i)[1] for i, event in known.references.items() if event["flags"] == DERIVED}
        self._stop = threading.Event()
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._thread: threading.Thread | None = None

    # -- from outside

    def take(self, wanted: Wanted, streams: Streams) -> None:
        """Take this from now on. From one thread, not while the ring is full of what the shard does not read."""
        if wanted == self._wanted and streams == self._streams:
            return
        self._end()
        self._wanted, self._streams = wanted, streams
        homes = [name for name in wanted.homes if name not in self._announced]
        if homes:
            self._announced.update(homes)
            self._ring.writer.write(home_references(self._table, self.number, homes), timeout_ms=_STOP_S * 1000)
        self._stop.clear()
        if wanted.legs and streams.target is not None:
            self._thread = threading.Thread(target=self._run, args=(streams, wanted.legs), name=f"exchange-{self.number}", daemon=True)
            self._thread.start()

    def ask_stop(self) -> None:
        """Take no more, soon."""
        self._stop.set()
        running = self._running
        if running is not None:
            with suppress(RuntimeError):  # it ends this moment
                running[0].call_soon_threadsafe(running[1].set)

    def close(self) -> None:
        """Take no more; the ring can go then."""
        self._end()

    def caught_up(self, outputs: Callable[[int], int]) -> bool:
        """Whether everything that other shards have put out so far, `outputs` of each, has been looked at."""
        legs = self._wanted.legs or {}
        return all(self.seen.get(origin, 0) >= outputs(origin) for origin in legs)

    def status(self) -> dict[str, Any]:
        """As plain data: by shard that something is taken of."""
        rows = {}
        for origin, legs in (self._wanted.legs or {}).items():
            facts = {"takes": sorted(f"{kind}:{symbol}" for kind, symbol in legs), "position": self._positions.get(origin, 0)}
            rows[str(origin)] = {**facts, "missing": self.missing.get(origin, 0), "error": self.errors.get(origin, "")}
        return rows

    # -- its thread

    def _end(self) -> None:
        self.ask_stop()
        if self._thread is not None:
            self._thread.join(_STOP_S)
            self._thread = None

    def _run(self, streams: Streams, legs: Mapping[int, frozenset[Leg]]) -> None:
        uvloop.run(self._follow_all(streams, legs))

    async def _follow_all(self, streams: Streams, legs: Mapping[int, frozenset[Leg]]) -> None:
        asked = asyncio.Event()
        self._running = asyncio.get_running_loop(), asked
        tasks = [asyncio.create_task(self._follow(streams, origin, wanted)) for origin, wanted in legs.items()]
        if not self._stop.is_set():
            await asked.wait()
        self._running = None
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=_CLOSE_S)  # each closes its connection; cancelled again it would not
        await asyncio.gather(*(end_task(task) for task in tasks))

    async def _follow(self, streams: Streams, origin: int, legs: frozenset[Leg]) -> None:
        """Read a stream for as long as it takes."""
        attempt, unnamed, peer = 0, 0, PeerEvents(self._table, origin, legs)
        while True:
            before = self.seen.get(origin)
            try:
                await self._read(streams, origin, peer)
            except UnnamedInstrument as error:  # its name is about to come, by another stream; what it has put out is not to be missed
                unnamed += 1
                self.errors[origin] = str(error)
                if unnamed > _UNNAMED_MAX:
                    _log.warning("instruments without a name are left out", shard=self.number, of=origin, instruments=error.instruments)
                    peer.do_without_names(error.instruments)
                    unnamed = 0
            except Exception as error:  # of NATS, of the table of instruments: whatever it is, it is tried again
                reason = str(error) or type(error).__name__
                if self.errors.get(origin) != reason:
                    _log.warning("another shard's outputs cannot be read now", shard=self.number, of=origin, reason=reason)
                self.errors[origin] = reason
            attempt = 0 if self.seen.get(origin) != before else attempt + 1
            await asyncio.sleep(backoff_s(attempt))

    async def _read(self, streams: Streams, origin: int, peer: PeerEvents) -> None:
        assert streams.target is not None
        after = await self._place(streams, origin)
        reading = Subscription(streams.target, streams.cluster, origin, None, None, after + 1, streams.login)
        async with reading:
            self.errors.pop(origin, None)
            await self._write(origin, peer.know(reading.names(origin)))
            async for batch in reading:
                last = batch.first + (batch.missing or len(batch.events)) - 1
                if batch.missing:
                    self.missing[origin] = self.missing.get(origin, 0) + batch.missing
                    _log.warning("outputs of another shard are missing", shard=self.number, of=origin, first=batch.first, last=last)
                await self._write(origin, _gap(origin, batch.first, last) if batch.missing else peer.take(batch.events))
                self._positions[origin] = self.seen[origin] = last

    async def _place(self, streams: Streams, origin: int) -> int:
        """The output after which to read on; where the journal does not say, it is told."""
        if origin in self._positions:
            return self._positions[origin]
        after = self._begins[origin] if origin in self._begins else await last_output(streams, origin)
        event = _of_origin(Kind.PEER_TIMER, origin)
        event["seq"], event["aux"] = after, _NO_FEED
        await self._write(origin, event)
        self._positions[origin] = after
        return after

    async def _write(self, origin: int, events: EventArray) -> None:
        """Into the ring, as it has room; what is in it counts as taken, however this ends."""
        done = 0
        while done < len(events):
            written = self._ring.writer.write(events[done:], timeout_ms=0)
            if written:
                taken = events[done : done + written]
                taken = taken[taken["kind"] != Kind.PEER_REFERENCE]
                if len(taken):
                    last = taken[-1]
                    self._positions[origin] = int(last["aux"] if last["kind"] == Kind.GAP else last["seq"])
                done += written
            if done < len(events):
                await asyncio.sleep(_FULL_S)


def _of_origin(kind: Kind, origin: int) -> EventArray:
    event = zeros_aligned(1, EVENT)
    event["kind"], event["instrument"], event["side"], event["price"] = kind, ALL_INSTRUMENTS, NO_SIDE, PEERS + origin
    return event


def _gap(origin: int, first: int, last: int) -> EventArray:
    """GAP: outputs `first` to `last` of a shard."""
    event = _of_origin(Kind.GAP, origin)
    event["seq"], event["qty"], event["id"], event["aux"] = first, last - first + 1, first, last
    return event


async def last_output(streams: Streams, origin: int) -> int:
    """The last output in a shard's stream; 0: there is none. Raises as :func:`tickmesh.transports.nats.connect` does."""
    assert streams.target is not None
    link = await connect(streams.target, name=f"tickmesh {streams.cluster}", login=streams.login, wait_s=3.0)
    try:
        name = stream_name(streams.cluster, origin), stream_subject(streams.cluster, origin)
        message = await link.client.jetstream(timeout=2).get_last_msg(*name)
        return int((message.headers or {}).get("Out-Seq", "0"))
    except js_errors.NotFoundError:
        return 0
    finally:
        await link.close()
