"""Adapters: one small interface for every source that is received by asyncio, and the receiver that runs one.

An :class:`Adapter` knows how to connect and hands on what it receives: ``await self.sink(data)``. All else is done here, alike for all: a
thread with its event loop, connecting again with backoff and jitter, a bounded buffer while the shards have no room, decoding and routing,
books that go stale when a connection is lost, counters, the end in any state. Adapters of other packages are entry points of group
:data:`ENTRY_POINTS`; ``docs/howto/add-a-source.md`` shows one.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import inspect
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

import numpy as np
import structlog
import uvloop

from tickmesh.control.config import Config, Source
from tickmesh.node.calculation import CalculationError, load_source
from tickmesh.node.continuation import Place
from tickmesh.node.decoder import since_when
from tickmesh.node.event import EVENT, EventArray, Kind
from tickmesh.node.feed import SINCE
from tickmesh.node.intake import Data, Intake, codes_of, make_intake, whole_source
from tickmesh.node.json_feed import MappedFeed, VenueFeed
from tickmesh.node.reader import SourceError
from tickmesh.node.receivers import Receiver, ReceiverContext, bind_codes, take_memory
from tickmesh.node.recovery import NEVER
from tickmesh.node.router import ROUTE_EVENTS
from tickmesh.node.routing_loop import routing_loop
from tickmesh.node.telemetry import SourceCounter
from tickmesh.node.timers import go_on
from tickmesh.transports.connection import (
    Backoff,
    BrokenProtocol,
    ConnectionLost,
    ConnectionProblem,
    Refused,
    SecretMissing,
    client_tls,
    read_secret,
)

ENTRY_POINTS = "tickmesh.sources"
"""Group of entry points by which other packages offer adapters."""
_HOLD_NS = 250_000_000
"""How far the time of a silent source is held back: what is under way on a connection may be so late."""
_TICK_S, _RETRY_S = 0.05, 0.001
_INLINE_BYTES = 1 << 16
"""Bytes that may wait for the event loop's next turn before they are decoded at once."""
_END_S = 1.0
_SAME_WARNING_S = 60.0
_MASK = (1 << 64) - 1
_COUNTERS = frozenset(counter.name.lower() for counter in SourceCounter)
_log = structlog.get_logger("source")


class SourceEnded(Exception):
    """Raised by :meth:`Adapter.run`: there is no more, and nothing to connect to again."""


class Sink:
    """Where an adapter puts what it receives. Every method belongs to the adapter's own event loop.

    Attributes:
        counts: the adapter's own counters, by name. Those that are counters of a source (``tickmesh status``) show there under their
            names, the others together as `counted`.
    """

    def __init__(self, receiver: AdapterReceiver) -> None:
        self._receiver = receiver
        self.counts: dict[str, int] = {}

    async def __call__(self, data: Data, recv_ns: int = 0, sequence: int = 0) -> None:
        """Hand on a message, or a piece of the stream. Waits while there is no room for it, if the source is configured so.

        Args:
            data: the bytes; the caller may reuse the memory afterwards.
            recv_ns: when they came, nanoseconds since 1970; 0: now.
            sequence: the message's sequence at the source, rising; 0: it has none.

        Raises:
            BrokenProtocol: what came before does not hold together; let it through.
        """
        await self._receiver.take(data, recv_ns or time.time_ns(), sequence)

    def connected(self) -> None:
        """The connection stands. Without this, the first data says so."""
        self._receiver.connected()

    @property
    def next_sequence(self) -> int:
        """For an adapter that `resumes`: the sequence to go on with; 0: there is nothing to go on from."""
        return self._receiver.asked()

    @property
    def session(self) -> int:
        """For an adapter that `resumes`: :func:`session_number` of the session in which `next_sequence` counts; 0: not known."""
        return self._receiver.session

    async def begin(self, sequence: int, session: str = "") -> None:
        """For an adapter that `resumes`: the next message has this sequence. What is missing before it is a gap; another session than
        before, or a sequence that goes back, is the venue's new beginning.

        Raises:
            ConnectionLost: `next_sequence` is another one meanwhile; let it through.
        """
        await self._receiver.begin(sequence, session)

    async def gap(self) -> None:
        """Something was lost, and nobody knows what: every book of the source is stale until its next snapshot."""
        async with self._receiver.turn:
            await self._receiver.unknown_gap()

    @property
    def venue(self) -> VenueFeed | None:
        """The decoder, if the format is decoded in Python: `snapshots_wanted` says which books wait."""
        return self._receiver.intake.venue

    async def snapshot(self, symbol: str, data: bytes) -> None:
        """Hand on a book's snapshot that was asked for, where it does not name its symbol (Binance). Waits until it has been decoded: one
        at a time is all that may wait besides the messages, and nobody asks for it again meanwhile."""
        await self._receiver.take_snapshot(symbol, data)

    async def begin_anew(self, *, lost: bool) -> None:
        """The stream ends here, and another begins with the next piece; `lost`: what was between them is not known."""
        await self._receiver.flush()
        self._receiver.intake.cut()
        if lost:
            await self._receiver.unknown_gap()

    def count(self, name: str, number: int = 1) -> None:
        """Count something of the adapter's own."""
        self.counts[name] = self.counts.get(name, 0) + number


class Adapter(ABC):
    """A way in. A subclass says how to connect and receive, in :meth:`run`; it is made once, and :meth:`run` again for each connection.

    Attributes:
        name: of the source.
        options: its configuration; a custom source's own keys are ``options.options``.
        sink: takes what comes.
        carries: ``messages``: each call of the sink has a whole message; ``stream``: pieces of any size.
        timed: lines of a stream may begin with their time of receipt (recordings that grow).
        resumes: a lost connection loses nothing: the adapter goes on with ``sink.next_sequence``.
        counted: messages carry their sequences, and the decoder follows them by itself.
        renews: books come anew with each connection, so that they are stale until then, although no message is lost.
        endpoint: what the source is called in messages.
    """

    carries: Literal["messages", "stream"] = "messages"
    timed = False
    resumes = counted = renews = False

    def __init__(self, name: str, options: Source, sink: Sink, resolve: Callable[[str], Path] = Path) -> None:
        """Nothing is connected yet. A subclass may raise SourceError here: the configuration is then refused.

        Args:
            resolve: turns a path of the configuration into one of this host.
        """
        self.name, self.options, self.sink, self.resolve = name, options, sink, resolve
        self.endpoint = options.endpoint or options.use or name

    @abstractmethod
    async def run(self) -> None:
        """Connect, and hand on what comes, until the connection ends.

        Returning, and any :class:`ConnectionProblem` or OSError, end this connection; there will be another. It is cancelled to stop.

        Raises:
            SourceEnded: there is no more.
        """

    # -- what most need

    def secret(self, kind: Literal["password", "token"]) -> str | None:
        """The configured password or token, from where the configuration says.

        Raises:
            SecretMissing: it is named, and not there.
        """
        file = getattr(self.options, f"{kind}_file")
        return read_secret(getattr(self.options, f"{kind}_env"), self.resolve(file) if file else None)

    def tls(self) -> Any:
        """The configured TLS context.

        Raises:
            SecretMissing: a file is missing or holds something else.
        """
        files = (self.options.tls_ca_file, self.options.tls_certificate_file, self.options.tls_key_file)
        return client_tls(*(self.resolve(file) if file else None for file in files))


AdapterMaker = Callable[[str, Source, Sink, Callable[[str], Path]], Adapter]


# ---------------------------------------------------------------- the receiver


class AdapterReceiver(Receiver):
    """Runs an adapter: its thread, its connections, its buffer. One event loop does it all; nothing is handed between threads."""

    def __init__(self, name: str, options: Source, make: AdapterMaker, resolve: Callable[[str], Path], context: ReceiverContext) -> None:
        super().__init__(name, options, context, restamp=False, hold_ns=_HOLD_NS)
        self.sink = Sink(self)
        self.adapter = make(name, options, self.sink, resolve)
        shown = options.model_copy(update={"framing": "binaryfile"}) if options.soupbintcp else options
        self.intake: Intake = make_intake(
            name, shown, context.table, context.number,
            stream=self.adapter.carries == "stream", timed=self.adapter.timed, progress=context.progress,
            folder=resolve("."),
        )  # fmt: skip
        self._check(self.intake)
        self.order_ids = self.intake.order_ids
        self._backoff = Backoff(options.reconnect_min_ms / 1e3, options.reconnect_max_ms / 1e3)
        self._events: EventArray = np.zeros(0, EVENT)
        self._first = self._free = 0
        self._expected = self._session = 0
        self._asked: int | None = None
        """What the adapter was told to go on with."""
        self._beginning = threading.Lock()
        self._begins_anew = False
        """The shards' journals do not end in one session."""
        self._stale = False
        """The journal has had something of this source, or we have; the books are not known to be right any more."""
        self._had_data = self._is_connected = self._scheduled = self._blocked = False
        self._connected_s = 0.0
        self._numbers = dict.fromkeys(("connected", "reconnects", "connect_failures", "overflowed"), 0)
        self._more_gaps = self._more_missing = self._waits = 0
        self._broken: BrokenProtocol | None = None
        self._crashed: Exception | None = None
        self._space: asyncio.Event | None = None
        self._snapshots = asyncio.Lock()
        self.turn = asyncio.Lock()
        """Data and gaps that an adapter's tasks hand over go one after the other: a gap never into the middle of a message."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work: asyncio.Task[None] | None = None
        self._warned: tuple[str, float] = ("", -_SAME_WARNING_S)
        self._told = False
        """A warning is open: it is said too when the source is back."""
        self._routing = routing_loop(len(context.rings), context.progress)

    def _check(self, intake: Intake) -> None:
        """What only the adapter and the protocol together can say."""
        if (self.adapter.carries == "stream" or not intake.drops) and self.options.overflow != "block":
            raise SourceError(self.name, "a stream of bytes cannot lose some of its middle: leave overflow at block")
        if self.adapter.resumes and not (intake.follows or self.adapter.counted):
            reason = "datagrams have sequences of their own, and so has FIX: take them from a subject, not from a stream"
            raise SourceError(self.name, reason)

    # -- what a node asks of a receiver

    def ask_stop(self) -> None:
        super().ask_stop()
        loop, work = self._loop, self._work
        if loop is not None and work is not None:
            with contextlib.suppress(RuntimeError):  # it has just ended
                loop.call_soon_threadsafe(work.cancel)

    def resume(self, codes: Mapping[int, int], last_sequence: int) -> None:
        if self.intake.spec is not None:
            bind_codes(self.intake.feed, self.context.table, codes)
        if last_sequence and self.adapter.resumes:
            self._expected = last_sequence + 1
        known = self.context.table.arrays.records[: len(self.context.table)]
        journalled = bool(np.any((known["source"] == self.context.number) & (known["announced"] != 0)))
        self._stale = journalled and (self._forgets or self._remembers)
        if last_sequence:
            go_on(self.router.clock)

    def go_on_at(self, place: Place) -> bool:
        if self.adapter.resumes:
            self._expected, self._session, self._begins_anew = place.sequence, place.session, not place.is_one
        return self.adapter.resumes

    @property
    def _forgets(self) -> bool:
        """Whether books are not known to be right after a lost connection or a restart: messages may be missing, or books begin with
        their snapshots, since the venue has stopped telling them, or since the decoder keeps them in step by its rules."""
        venue = self.intake.venue
        return not self.adapter.resumes or self.adapter.renews or (venue is not None and not isinstance(venue, MappedFeed))

    @property
    def _remembers(self) -> bool:
        """Whether the decoder has to know what rests; it does not in the middle of a session, nor after a restart."""
        return self.intake.spec is not None and self.intake.spec.remembers

    def followed_since(self, instruments: Any) -> Any:
        if not self._remembers or not self.adapter.resumes:
            return super().followed_since(instruments)
        if not self._had_begun:
            return np.full(len(instruments), NEVER)
        return since_when(self.intake.feed, instruments)

    @property
    def expected(self) -> int:
        if not self.adapter.resumes:
            return 0
        return (self.intake.next_sequence if self._had_begun else 0) or self._expected

    @property
    def session(self) -> int:
        return self._session

    def go_on_from(self, sequence: int, session: int = 0) -> None:
        with self._beginning:
            if self.begun_at == 0 and self.adapter.resumes:
                self._expected = min(self._expected, sequence) if self._expected else sequence
                self._session = self._session or session

    def asked(self) -> int:
        """What :attr:`Sink.next_sequence` says."""
        self._asked = self.expected
        return self._asked

    def take_over(self, before: Receiver) -> bool:
        if not isinstance(before, AdapterReceiver) or not (self.adapter.resumes and before.adapter.resumes):
            return False
        if self.intake.spec is None or before.intake.spec is None or self.intake.spec.name != before.intake.spec.name:
            return False
        bind_codes(self.intake.feed, self.context.table, codes_of(self.context.table, self.context.number))
        take_memory(self.intake.feed, before.intake.feed, self.context.table)
        self._expected, self._session, self._begins_anew = before.expected, before.session, before._begins_anew
        if self._expected:
            go_on(self.router.clock)
        return True

    def counters(self) -> dict[str, int]:
        found = {**self.routed(), **self.intake.counters(), **self._numbers}
        found["ring_full"] += self._waits
        for name, number in list(self.sink.counts.items()):
            known = name if name in _COUNTERS else "counted"
            found[known] = found.get(known, 0) + number
        found["gaps"] = found.get("gaps", 0) + self._more_gaps
        found["missing"] = found.get("missing", 0) + self._more_missing
        return found

    # -- the thread

    def run(self) -> None:
        loop = uvloop.new_event_loop()
        try:
            loop.run_until_complete(self._main())
        finally:
            with contextlib.suppress(Exception):
                loop.run_until_complete(_end_tasks(loop))
                loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    async def _main(self) -> None:
        self._space = asyncio.Event()
        self._work = asyncio.create_task(self._supervise())
        self._loop = asyncio.get_running_loop()
        ticks = asyncio.create_task(self._ticks())
        try:
            await asyncio.wait({self._work, ticks}, return_when=asyncio.FIRST_COMPLETED)
            for task in (ticks, self._work):
                if task.done() and not task.cancelled() and task.exception() is not None:
                    raise task.exception()  # type: ignore[misc]
        finally:
            await _cancelled(ticks)
            await _cancelled(self._work)
            self._numbers["connected"] = 0
        if self._crashed is not None:
            raise self._crashed
        self._pump()  # what is decoded and has room

    async def _ticks(self) -> None:
        """Now and then: the stop flag, timers of a silent source, packets that have waited too long."""
        while self.stop[0] == 0:
            await asyncio.sleep(_TICK_S)
            if self._blocked:
                for ring in self.context.rings:
                    ring.release_dead_readers()
            elif self._first == len(self._events) and self._room() > 0:
                due = self.intake.silent(time.time_ns())
                if len(due):
                    self._events, self._first = due, 0
                    self._pump()
                self._routing.route_silence_now(self.router)
                self._free -= 1  # it may have made a timer

    async def _supervise(self) -> None:
        if self._stale:
            await self.unknown_gap()
        while self.stop[0] == 0:
            try:
                problem = await self._connection()
            except SourceEnded:
                await self.flush()
                self.finished = True
                return
            await self._lost(problem)
            await asyncio.sleep(self._wait_s(problem))

    async def _connection(self) -> ConnectionProblem:
        """One connection, from its beginning to its end; says why it ended."""
        self._is_connected, self._broken = False, None
        try:
            await self.adapter.run()
        except (ConnectionProblem, SourceEnded) as error:
            if isinstance(error, SourceEnded):
                raise
            return error
        except SecretMissing as error:  # it was there when the node started
            return Refused(self.adapter.endpoint, str(error))
        except (OSError, asyncio.IncompleteReadError) as error:
            return ConnectionLost(self.adapter.endpoint, f"the connection is lost ({error or type(error).__name__})")
        except Exception as error:  # an adapter's own mistake ends its connection, not the node
            if self._crashed is not None:
                raise
            _log.exception("an adapter has failed", source=self.name)
            return ConnectionLost(self.adapter.endpoint, f"the adapter has failed ({type(error).__name__}: {error})")
        return ConnectionLost(self.adapter.endpoint, "the connection has ended")

    def connected(self) -> None:
        """The adapter says, or its data do, that the connection stands."""
        if not self._is_connected:
            self._is_connected, self._connected_s = True, time.monotonic()
            self._numbers["connected"] = 1
            if self._told:
                _log.info("a source is back", source=self.name, endpoint=self.adapter.endpoint)
                self._told = False

    async def _lost(self, problem: ConnectionProblem) -> None:
        """After a connection: events that are whole go on, books go stale unless nothing can be missing."""
        was_connected, self._is_connected = self._is_connected, False
        if was_connected:
            self._backoff.lasted(time.monotonic() - self._connected_s)
        self._warn(problem)
        self._numbers["connected"] = 0
        self._numbers["reconnects" if was_connected else "connect_failures"] += 1
        await self.flush()
        self.intake.lost()
        if self._had_data and self._forgets:
            await self.unknown_gap()
        self._had_data = False

    def _warn(self, problem: ConnectionProblem) -> None:
        text, at = self._warned
        if str(problem) != text or time.monotonic() - at > _SAME_WARNING_S:
            _log.warning("a source is not connected", source=self.name, reason=str(problem), failures=self._backoff.attempt)
            self._warned, self._told = (str(problem), time.monotonic()), True

    def _wait_s(self, problem: ConnectionProblem) -> float:
        wait_s = self._backoff.next_s(permanent=problem.permanent)
        asked_s = problem.retry_after_s if isinstance(problem, Refused) else None
        return wait_s if asked_s is None else max(min(asked_s, self.options.retry_after_max_ms / 1e3), self._backoff.least_s)

    # -- data

    async def take(self, data: Data, recv_ns: int, sequence: int) -> None:
        """Put data into the intake, by the configured overflow."""
        async with self.turn:
            await self._take(data, recv_ns, sequence)

    async def _take(self, data: Data, recv_ns: int, sequence: int) -> None:
        if not self._is_connected:
            self.connected()
        if self._broken is not None:
            raise self._broken
        self._had_data = True
        if self.begun_at == 0:
            self.begun_at = sequence or self._expected
        rest: Data = data
        while True:
            if self.intake.has_room(len(rest)) or not await self._overflows(len(rest)):
                taken = self.intake.put(rest, recv_ns, sequence)
                if taken == len(rest):
                    break
                rest = memoryview(rest)[taken:]
                self._pump_checked()
            elif self.options.overflow == "gap":
                return
        if self.intake.waiting_bytes > _INLINE_BYTES:
            self._pump_checked()
        else:
            self.schedule()

    async def take_snapshot(self, symbol: str, data: bytes) -> None:
        """What :meth:`Sink.snapshot` does."""
        async with self._snapshots:
            self.intake.put_snapshot(symbol, data, time.time_ns())
            self.schedule()
            while self.intake.snapshots_waiting:
                await asyncio.sleep(_RETRY_S)

    async def _overflows(self, size: int) -> bool:
        """There is no room: wait until there is, or drop; whether the data still find none."""
        self._pump_checked()
        if self.intake.has_room(size):
            return False
        if self.options.overflow == "drop_oldest":
            self._numbers["overflowed"] += self.intake.drop_oldest(size)
            return False
        if self.options.overflow == "gap":
            self._numbers["overflowed"] += 1
            self.intake.drop_newest()
            return True
        await self._wait_for_space()
        return not self.intake.has_room(size)

    async def _wait_for_space(self) -> None:
        assert self._space is not None
        self._space.clear()
        self._blocked = True
        self._retry()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TICK_S):
                await self._space.wait()
        if self._broken is not None:
            raise self._broken

    def schedule(self) -> None:
        """Decode and route at the event loop's next turn: what has come by then goes as one batch."""
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._scheduled_pump)

    def _scheduled_pump(self) -> None:
        self._scheduled = False
        try:
            self._pump()
        except BrokenProtocol as error:
            self._broken = error
        except Exception as error:  # a mistake of ours ends the source, and is told
            self._crashed = error
            if self._work is not None:
                self._work.cancel()

    def _pump_checked(self) -> None:
        try:
            self._pump()
        except BrokenProtocol as error:
            self._broken = error
            raise
        except Exception as error:
            self._crashed = error
            raise

    def _room(self) -> int:
        """Events that every ring has room for, each with a timer before it and a code behind it; looks again only if it knows of none."""
        if self._free <= 0:
            self._free = int(min(ring.capacity - ring.lag for ring in self.context.rings) // 3)
        return self._free

    def _pump(self) -> bool:
        """Decode and route what waits, as far as there is room; true if nothing waits any more."""
        assert self._space is not None
        while True:
            if self._first == len(self._events):
                self._events, self._first = self.intake.next(), 0
                if not len(self._events):
                    self._blocked = False
                    self._space.set()
                    return True
            count = min(self._room(), len(self._events) - self._first, ROUTE_EVENTS)
            if count <= 0:
                self._waits += not self._blocked
                self._blocked = True
                self._retry()
                return False
            if not self._routing.route_now(self.router, self._events, self._first, self._first + count):
                return False  # stopped
            self._first += count
            self._free -= count
            if self._blocked:
                self._space.set()

    def _retry(self) -> None:
        if not self._scheduled and self.stop[0] == 0:
            self._scheduled = True
            asyncio.get_running_loop().call_later(_RETRY_S, self._scheduled_pump)

    async def flush(self) -> None:
        """Wait until everything that came has been routed, or we are to stop."""
        with contextlib.suppress(BrokenProtocol):
            while self.stop[0] == 0 and not self._pump():
                await asyncio.sleep(_RETRY_S)

    async def _emit(self, event: EventArray) -> None:
        """Route an event of the whole source, behind everything that came before it."""
        await self.flush()
        if self._remembers and event["kind"][0] in (Kind.GAP, Kind.CLEAR):
            self.intake.feed.state[SINCE] = NEVER if event["kind"][0] == Kind.GAP else 0
            self.intake.feed.known[:] = 0
        self._events, self._first = event, 0
        await self.flush()

    # -- sequences

    _had_begun = False

    async def begin(self, sequence: int, session: str) -> None:
        """What :meth:`Sink.begin` does."""
        await self.flush()
        now_ns, number = time.time_ns(), session_number(session)
        with self._beginning:
            expected = self.expected
            if self.begun_at == 0 and self._asked not in (None, expected):  # a takeover, while the login was under way
                raise ConnectionLost(self.adapter.endpoint, f"the place to go on with is {expected} now: asks again")
            another = self._session not in (0, number) or self._begins_anew
            anew, unnamed = expected != 0 and (another or sequence < expected), self._session == 0 != number
            expected, self._begins_anew = 1 if anew else expected, False
            self.begun_at = self.begun_at or expected or sequence
        fresh, expected = expected == 0, expected or int(self._remembers)
        if anew:
            await self._emit(whole_source(Kind.CLEAR, now_ns, id=number))
        self._session = number
        if expected and sequence > expected:
            self._more_gaps += 1
            self._more_missing += sequence - expected
            await self._emit(whole_source(Kind.GAP, now_ns, first=expected, last=sequence - 1))
        if not anew and (fresh or unnamed):  # so that every journal knows where it begins
            named = whole_source(Kind.CODE, now_ns, id=number)
            named["seq"] = sequence
            await self._emit(named)
        self._had_begun = True
        self.intake.expect(sequence)
        self._expected = sequence
        self.connected()

    async def unknown_gap(self) -> None:
        """Every book of the source is stale."""
        await self.flush()
        self.intake.lost()
        self._more_gaps += 1
        await self._emit(whole_source(Kind.GAP, time.time_ns()))


def session_number(session: str) -> int:
    """A session's name, as MoldUDP64 and SoupBinTCP have it, as the number by which CLEAR events call it; 0: none."""
    if not session:
        return 0
    name = session.encode("ascii", "replace").ljust(10)[:10]
    return (int.from_bytes(name[:8], "big") ^ (int.from_bytes(name[8:], "big") << 17)) & _MASK


async def _cancelled(task: asyncio.Task[None]) -> None:
    """End a task, whatever it does; one that does not end in time is left to the loop's end."""
    task.cancel()
    await asyncio.wait({task}, timeout=_END_S)


async def _end_tasks(loop: asyncio.AbstractEventLoop) -> None:
    tasks = {task for task in asyncio.all_tasks(loop) if task is not asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_END_S)


# ---------------------------------------------------------------- finding one


def _custom(name: str, use: str, folder: Path) -> AdapterMaker:
    """The adapter that a custom source names."""
    if ".py:" in use:
        file, _, wanted = use.rpartition(":")
        root, path = folder.resolve(), (folder / file).resolve()
        if not path.is_relative_to(root) or not path.is_file():
            raise SourceError(name, f"use = {use!r}: there is no file {file} below {root}; only files there are loaded")
        try:
            found = getattr(load_source(path, use), wanted, None)
        except CalculationError as error:
            raise SourceError(name, f"use = {use!r}: {error}") from error
    else:
        points = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
        if use not in points:
            near = difflib.get_close_matches(use, points, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"installed: {', '.join(sorted(points)) or 'none'}"
            raise SourceError(name, f"use = {use!r} is no adapter of an installed package ({hint}); your own: file.py:Class")
        try:
            found = points[use].load()
        except Exception as error:  # the package ran: whatever it raised is the user's to see
            raise SourceError(name, f"use = {use!r} cannot be imported ({type(error).__name__}: {error}): reinstall its package") from error
    if not (inspect.isclass(found) and issubclass(found, Adapter)):
        raise SourceError(name, f"use = {use!r} is no subclass of tickmesh.node.adapters.Adapter")
    return found


def open_adapter(name: str, config: Config, context: ReceiverContext) -> AdapterReceiver:
    """The receiver of a source that is received by asyncio; nothing is connected before it starts.

    Raises:
        SourceError: the adapter or the format cannot be used; the message says what to do.
        SecretMissing: a secret that the configuration names is not there.
        SpecError, MappingError: the protocol or the field mapping is wrong.
    """
    from tickmesh.node.connected_sources import ADAPTERS  # they are made of what is above

    options = config.data_sources[name]
    make = _custom(name, options.use or "", config.code_folder) if options.type == "custom" else ADAPTERS[options.type](options)
    return AdapterReceiver(name, options, make, config.resolve, context)
