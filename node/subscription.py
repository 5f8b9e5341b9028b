"""Subscribing to a node's outputs: batches of events over JetStream, maps over core NATS, or the ring itself in shared memory.

::

    async with subscribe("nats://127.0.0.1:4222", cluster="demo", kinds=[Kind.BBO], from_sequence="all") as outputs:
        async for batch in outputs:
            print(batch.shard, batch.first, batch.events["price"])

Batches come in the order of each shard's output sequence, each output once, over reconnects and server restarts; what is missing is
reported as ``batch.missing``.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar, overload

import msgpack  # type: ignore[import-untyped]
import nats.errors
import nats.js.errors as js_errors
import numpy as np
import numpy.typing as npt

from tickmesh.control.store import end_task
from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, EventArray
from tickmesh.node.frames import (
    EVENT_SIZE,
    CalculationNames,
    FrameError,
    FrameHeader,
    InstrumentNames,
    NameHistory,
    calculations_subject,
    decode_frame,
    decode_names,
    names_at,
    reference_stream_name,
    sequence_runs,
    stream_name,
    stream_subject,
)
from tickmesh.transports.connection import backoff_s
from tickmesh.transports.nats import LinkError, Login, NatsLink, StreamMissing, connect
from tickmesh.transports.nats_reader import StreamReader, find_by_header, stream_bounds

if TYPE_CHECKING:
    from tickmesh.transports.ring import Ring

Start = int | Literal["now", "all"] | None
_Item = TypeVar("_Item", covariant=True)
_QUEUE_BATCHES = 64
_NAMES_TRIES = 4
_NAMES_S = 5.0
_POLL_MIN_S, _POLL_MAX_S = 0.0002, 0.005


@dataclass(frozen=True, slots=True)
class Batch:
    """Events of one shard whose output sequences follow each other (unless a filter took some out).

    Attributes:
        shard, epoch, config_version: where, and under which leadership and configuration they were made.
        first: output sequence of the first event before filtering; of the first missing one if `missing`.
        events: EVENT array of shape ``(n,)``, read-only; empty if `missing`.
        missing: outputs from `first` on that can no longer be had. Reported as a batch of its own.
        stream_sequence: of the message in the stream; 0 for a ring.
    """

    shard: int
    epoch: int
    config_version: int
    first: int
    events: EventArray
    missing: int = 0
    stream_sequence: int = 0


_NO_EVENTS: EventArray = np.zeros(0, EVENT)


class ExactlyOnce:
    """Makes each output of a shard appear once, and finds what is missing, by output sequence."""

    def __init__(self, expected: int | None) -> None:
        """`expected`: sequence of the first output wanted; ``None`` for whatever comes first."""
        self.expected = expected

    def take(self, header: FrameHeader, events: EventArray, stream_sequence: int = 0) -> list[Batch]:
        """The batches that a frame contributes: none if all of it was seen, one for a gap before it, one for its new events."""
        found: list[Batch] = []
        first = header.first
        if self.expected is None:
            self.expected = first
        if header.last < self.expected:
            return found
        batch = Batch(header.shard, header.epoch, header.config_version, first, events, 0, stream_sequence)
        missing = max(0, first - self.expected) + (header.missing - max(0, self.expected - first) if header.missing else 0)
        if missing:
            found.append(replace(batch, first=self.expected, events=_NO_EVENTS, missing=missing))
        if header.count:
            seen = max(0, self.expected - first)
            found.append(replace(batch, first=first + seen, events=events[seen:]))
        self.expected = header.last + 1
        return found


class _Filter:
    """Which events of a shard are wanted."""

    def __init__(self, kinds: Iterable[int] | None, symbols: Iterable[str] | None) -> None:
        self._kinds = None if kinds is None else np.fromiter({int(k) for k in kinds}, np.uint8)
        self._symbols = None if symbols is None else frozenset(symbols)
        self._ids: npt.NDArray[np.uint32] = np.zeros(0, np.uint32)
        self._nameless: set[int] = set()
        self.names = InstrumentNames()

    def learn(self, events: EventArray) -> None:
        """Take over symbols from REFERENCE events."""
        if len(self.names.learn(events)) and self._symbols is not None:
            self._ids = self.names.ids(self._symbols)

    def lacks_names(self, events: EventArray) -> bool:
        """Whether some are of an instrument without a name, and a name is what is asked for."""
        return self._symbols is not None and bool(self._unnamed(events))

    def do_without_names(self, events: EventArray) -> None:
        """Nobody tells the names of these instruments: they are none of those that are wanted."""
        self._nameless |= self._unnamed(events)

    def _unnamed(self, events: EventArray) -> set[int]:
        met = {int(number) for number in np.unique(events["instrument"])} - {ALL_INSTRUMENTS} - self._nameless
        return {number for number in met if number not in self.names}

    def chosen(self, batches: Iterable[Batch]) -> list[Batch]:
        """The batches with their wanted events; without those that have none and tell of no missing ones."""
        cut = [batch if batch.missing else replace(batch, events=self._wanted(batch.events)) for batch in batches]
        return [batch for batch in cut if batch.missing or len(batch.events)]

    def _wanted(self, events: EventArray) -> EventArray:
        if self._kinds is not None:
            events = events[np.isin(events["kind"], self._kinds)]
        if self._symbols is not None:
            events = events[np.isin(events["instrument"], self._ids)]
        return events


class _Opened(ABC, Generic[_Item]):
    """What every subscription is: an asynchronous iterator that opens on first use, and closes where its ``async with`` ends."""

    @abstractmethod
    async def open(self) -> Self:
        """Get ready; iterating does it too."""

    @abstractmethod
    async def close(self) -> None:
        """Stop and let go of everything."""

    @abstractmethod
    async def __anext__(self) -> _Item:
        """The next one; waits for it."""

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def _call(self, callback: Callable[[_Item], Awaitable[None] | None]) -> None:
        async for item in self:
            result = callback(item)
            if inspect.isawaitable(result):
                await result


class _Batches(_Opened[Batch]):
    async def run(self, callback: Callable[[Batch], Awaitable[None] | None]) -> None:
        """Call `callback` (a function or a coroutine function) with every batch, until cancelled."""
        await self._call(callback)


class Subscription(_Batches):
    """An asynchronous iterator of :class:`Batch`. Made by :func:`subscribe`.

    Attributes:
        bad_frames: messages in the streams that were no frames, skipped.
    """

    def __init__(
        self,
        target: str,
        cluster: str,
        shard: int | None,
        kinds: Iterable[int] | None,
        symbols: Iterable[str] | None,
        start: Start,
        login: Login | None,
    ) -> None:
        self._target, self._cluster, self._shard, self._start, self._login = target, cluster, shard, start, login
        self._kinds, self._symbols = (None if kinds is None else list(kinds)), (None if symbols is None else list(symbols))
        self._filters: dict[int, _Filter] = {}
        self._histories: dict[int, NameHistory] = {}
        self._reconnects_seen = 0
        self._link: NatsLink | None = None
        self._queue: asyncio.Queue[Batch | BaseException] = asyncio.Queue(_QUEUE_BATCHES)
        self._tasks: list[asyncio.Task[None]] = []
        self.bad_frames = 0

    def names(self, shard: int) -> InstrumentNames:
        """Symbols of a shard's instruments, as known so far."""
        return self._filter(shard).names

    def calculations(self, shard: int, sequence: int) -> CalculationNames:
        """Names of the calculations that made a shard's outputs from an output sequence on: (index, output) -> name.

        The lower half of a SIGNAL's `calculation` is the index, the upper half the output. Empty where the node has not told any.
        """
        return names_at(self._histories.get(shard, []), sequence)

    async def open(self) -> Self:
        """Connect and find the place to start at; iterating does it too.

        Raises:
            NatsUnreachable, NatsRefused: see :func:`tickmesh.transports.nats.connect`.
            StreamMissing: no such cluster or shard.
        """
        if self._link is None:
            self._link = await connect(self._target, name="tickmesh subscribe", login=self._login, wait_s=3.0)
            try:
                await self._start_shards(self._link)
            except BaseException:
                await self.close()
                raise
        return self

    async def close(self) -> None:
        """Stop and disconnect."""
        await asyncio.gather(*(end_task(task) for task in self._tasks))
        self._tasks.clear()
        if self._link is not None:
            await self._link.close()
            self._link = None

    async def __anext__(self) -> Batch:
        await self.open()
        found = await self._queue.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _filter(self, shard: int) -> _Filter:
        return self._filters.setdefault(shard, _Filter(self._kinds, self._symbols))

    async def _start_shards(self, link: NatsLink) -> None:
        shards = [self._shard] if self._shard is not None else await _shards(link, self._cluster)
        await link.client.subscribe(calculations_subject(self._cluster, "*"), cb=self._on_names)
        await self._learn_names(link)
        for shard in shards:
            reader, once = await self._place(link, shard)
            self._tasks.append(asyncio.create_task(self._follow(shard, reader, once)))

    async def _place(self, link: NatsLink, shard: int) -> tuple[StreamReader, ExactlyOnce]:
        name, subject = stream_name(self._cluster, shard), stream_subject(self._cluster, shard)
        if isinstance(self._start, int):
            at = await find_by_header(link, name, subject, "Out-Seq", self._start)
            return StreamReader(link, name, at), ExactlyOnce(self._start)
        first, last = await stream_bounds(link, name)
        at = first if self._start == "all" else last + 1
        return StreamReader(link, name, max(1, at)), ExactlyOnce(None)

    async def _follow(self, shard: int, reader: StreamReader, once: ExactlyOnce) -> None:
        wanted = self._filter(shard)
        try:
            while True:
                message = await reader.next()
                if self._link is not None and self._link.reconnects != self._reconnects_seen:
                    seen = self._link.reconnects
                    with contextlib.suppress(LinkError):  # JetStream is not back yet: with the next message once more
                        await self._learn_names(self._link)
                        self._reconnects_seen = seen
                if not message.data:
                    continue  # a fence
                try:
                    header, events = decode_frame(message.data)
                except FrameError:
                    self.bad_frames += 1
                    continue
                wanted.learn(events)
                if wanted.lacks_names(events):
                    await self._learn_again(wanted, events)
                for batch in wanted.chosen(once.take(header, events, message.sequence)):
                    await self._queue.put(batch)
        except Exception as error:
            await self._queue.put(error)
        finally:
            await reader.close()

    async def _learn_again(self, wanted: _Filter, events: EventArray) -> None:
        """An instrument came that is not known: its name is in the other stream, or about to be."""
        for attempt in range(_NAMES_TRIES):
            if self._link is not None:
                with contextlib.suppress(LinkError):
                    await self._learn_names(self._link)
            if not wanted.lacks_names(events):
                return
            await asyncio.sleep(backoff_s(attempt))
        wanted.do_without_names(events)

    async def _on_names(self, message: Any) -> None:
        self._learn_calculations(message.subject, message.data)

    def _learn_calculations(self, subject: str, payload: bytes) -> None:
        shard = subject.split(".")[3]
        with contextlib.suppress(FrameError):
            if shard.isdigit():
                self._histories[int(shard)] = decode_names(payload)

    @staticmethod
    async def _bounds_of_names(link: NatsLink, name: str) -> tuple[int, int]:
        """First and last message of the stream of names; that may be without a leader for a while, when servers were lost."""
        for attempt in range(_NAMES_TRIES):
            try:
                return await stream_bounds(link, name)
            except StreamMissing:
                raise
            except LinkError:
                if attempt == _NAMES_TRIES - 1:
                    raise
            await asyncio.sleep(backoff_s(attempt))
        return 1, 0

    async def _learn_names(self, link: NatsLink) -> None:
        """Read the kept REFERENCE events and names of calculations of all shards; a cluster without that stream has numbers only."""
        name = reference_stream_name(self._cluster)
        try:
            first, last = await self._bounds_of_names(link, name)
        except StreamMissing:
            return
        if first > last:
            return
        reader = StreamReader(link, name, first)
        try:
            while True:
                message = await asyncio.wait_for(reader.next(), _NAMES_S)
                shard = message.subject.split(".")[3]
                if message.subject.endswith(".calculations"):
                    self._learn_calculations(message.subject, message.data)
                elif len(message.data) == EVENT_SIZE and shard.isdigit():
                    self._filter(int(shard)).learn(np.frombuffer(message.data, EVENT))
                if message.sequence >= last:
                    return
        except TimeoutError:
            reason = f"the server at {link.url} does not hand out the names of cluster {self._cluster} within {_NAMES_S:g} s"
            raise LinkError(f"{reason}: try again, and look at its load") from None
        finally:
            await reader.close()


async def _shards(link: NatsLink, cluster: str) -> list[int]:
    """Shards of a cluster that have a stream.

    Raises:
        StreamMissing: there is none.
    """
    prefix = stream_name(cluster, 0)[:-1]
    try:
        infos = await link.client.jetstream(timeout=3).streams_info()
    except js_errors.NotFoundError:
        infos = []
    names = [str(info.config.name) for info in infos]
    found = sorted(int(name.removeprefix(prefix)) for name in names if name.startswith(prefix) and name.removeprefix(prefix).isdigit())
    if not found:
        raise StreamMissing(prefix + "*")
    return found


class MapSubscription(_Opened[tuple[str, dict[str, Any]]]):
    """An asynchronous iterator of (subject, map), one per event, at most once. Made by :func:`subscribe` with a `pattern`."""

    def __init__(self, target: str, pattern: str, login: Login | None) -> None:
        self._target, self._pattern, self._login = target, pattern, login
        self._link: NatsLink | None = None
        self._subscription: Any = None

    async def open(self) -> Self:
        """Connect and subscribe; iterating does it too. Raises as :func:`tickmesh.transports.nats.connect` does."""
        if self._link is None:
            self._link = await connect(self._target, name="tickmesh subscribe", login=self._login, wait_s=3.0)
            self._subscription = await self._link.client.subscribe(self._pattern)
            await self._link.client.flush(2)
        return self

    async def close(self) -> None:
        """Stop and disconnect."""
        if self._link is not None:
            await self._link.close()
            self._link = None

    async def run(self, callback: Callable[[str, dict[str, Any]], Awaitable[None] | None]) -> None:
        """Call `callback` (a function or a coroutine function) with every subject and map, until cancelled."""
        await self._call(lambda found: callback(*found))

    async def __anext__(self) -> tuple[str, dict[str, Any]]:
        await self.open()
        while True:
            try:
                message = await self._subscription.next_msg(timeout=3600)
            except (TimeoutError, nats.errors.TimeoutError):
                continue
            with contextlib.suppress(ValueError, msgpack.UnpackException):
                fields = msgpack.unpackb(message.data)
                if isinstance(fields, dict):
                    return message.subject, fields


class RingSubscription(_Batches):
    """An asynchronous iterator of :class:`Batch` from an output ring of this host. Made by :func:`subscribe` with a `ring`.

    A reader of a lossless ring holds its writer back when it is slow: a shard configured to ``block`` waits for its slowest reader.

    Attributes:
        released: times the ring's writer went on without us.
    """

    def __init__(self, ring: str, kinds: Iterable[int] | None, symbols: Iterable[str] | None, start: Start) -> None:
        self._ring_name, self._start = ring, start
        self._filter = _Filter(kinds, symbols)
        self._once = ExactlyOnce(start if isinstance(start, int) else None)
        self._ring: Ring | None = None
        self._reader: Any = None
        self._ready: list[Batch] = []
        self.released = 0

    @property
    def names(self) -> InstrumentNames:
        """Symbols of the instruments, as known so far."""
        return self._filter.names

    async def open(self) -> Self:
        """Attach to the ring; iterating does it too.

        Raises:
            RingNotFound, RingLayoutMismatch, TooManyReaders: see :class:`tickmesh.transports.ring.Ring`.
        """
        if self._ring is None:
            from tickmesh.transports.ring import Ring  # brings the compiler: seconds that a NATS subscriber need not wait

            self._ring = Ring.attach(self._ring_name, EVENT)
            start: Literal["newest", "oldest"] = "newest" if self._start in ("now", None) else "oldest"
            self._reader = self._ring.reader(f"subscribe {os.getpid()}", start=start)
        return self

    async def close(self) -> None:
        """Let the ring go."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    async def __anext__(self) -> Batch:
        await self.open()
        pause_s = _POLL_MIN_S
        while not self._ready:
            events = self._read()
            if len(events):
                self._take(events)
            else:
                await asyncio.sleep(pause_s)
                pause_s = min(_POLL_MAX_S, pause_s * 1.2)
        return self._ready.pop(0)

    def _read(self) -> EventArray:
        from tickmesh.transports.ring import ReaderReleased

        try:
            events: EventArray = self._reader.read()
        except ReaderReleased:
            self.released += 1
            events = self._reader.read()
        return events

    def _take(self, events: EventArray) -> None:
        self._filter.learn(events)
        for run in sequence_runs(events):
            header = FrameHeader(0, 0, 0, int(run["seq"][0]), len(run))
            self._ready += self._filter.chosen(self._once.take(header, run))


@overload
def subscribe(
    target: str = ...,
    *,
    cluster: str = ...,
    shard: int | None = ...,
    kinds: Iterable[int] | None = ...,
    symbols: Iterable[str] | None = ...,
    from_sequence: Start = ...,
    login: Login | None = ...,
) -> Subscription: ...
@overload
def subscribe(target: str = ..., *, pattern: str, login: Login | None = ...) -> MapSubscription: ...
@overload
def subscribe(
    *, ring: str, kinds: Iterable[int] | None = ..., symbols: Iterable[str] | None = ..., from_sequence: Start = ...
) -> RingSubscription: ...
def subscribe(
    target: str = "nats://127.0.0.1:4222",
    *,
    cluster: str = "demo",
    shard: int | None = None,
    kinds: Iterable[int] | None = None,
    symbols: Iterable[str] | None = None,
    from_sequence: Start = None,
    pattern: str | None = None,
    ring: str | None = None,
    login: Login | None = None,
) -> Subscription | MapSubscription | RingSubscription:
    """Subscribe to outputs: an asynchronous iterator and context manager; ``await subscribe(...).run(callback)`` is the callback form.

    Args:
        target: NATS address.
        cluster: as in the configuration.
        shard: one shard, or ``None`` for all that exist now.
        kinds, symbols: only these events; ``None`` for all.
        from_sequence: ``"now"`` (or ``None``), ``"all"``, or the output sequence to start at.
        pattern: instead of batches, maps of the subjects that match, e.g. ``"tm.demo.bbo.*"``.
        ring: instead of NATS, the output ring of this name on this host, e.g. ``"demo-out-0"``.
        login: default: from the environment.

    Returns:
        A :class:`Subscription`, a :class:`MapSubscription` (with `pattern`) or a :class:`RingSubscription` (with `ring`).

    Raises:
        ValueError: both `pattern` and `ring`, or a start that is none.
    """
    if pattern is not None and ring is not None:
        raise ValueError("give either a pattern or a ring, not both")
    if isinstance(from_sequence, str) and from_sequence not in ("now", "all"):
        raise ValueError(f"from_sequence is a number, 'now' or 'all', not {from_sequence!r}")
    if pattern is not None:
        return MapSubscription(target, pattern, login)
    if ring is not None:
        return RingSubscription(ring, kinds, symbols, from_sequence)
    return Subscription(target, cluster, shard, kinds, symbols, from_sequence, login)
