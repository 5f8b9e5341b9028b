"""Delivery: the gateway that carries a node's outputs from its output rings to NATS.

For each shard, runs of outputs become batch frames in the shard's JetStream stream ``TM_<cluster>_OUT_<shard>`` (subject
``tm.<cluster>.out.<shard>``), each output exactly once and in order. Beside that, each output is published as a MessagePack map on
``tm.<cluster>.<kind>.<symbol>``, at most once and within a rate limit: what exceeds it is skipped and counted.

The output ring is the queue. When NATS is slow or away, the ring fills, and the ring's mode says what happens: a *lossless* ring makes the
shard wait (``block``), a *lossy* one lets it go on and overwrites the oldest outputs (``drop_oldest``). The gateway notices those by their
output sequence, counts them, and publishes a gap marker in their place. A lossless ring keeps outputs until they are in the stream:
whoever goes on after a refusal, or under a later epoch, finds them there. After a restart, outputs that a replay of the journal makes again
are skipped by their sequence.

REFERENCE events are kept, one message per instrument, in the stream ``TM_<cluster>_REF``: a subscriber that starts now knows the symbols.
So are the names of the calculations, with the output sequence from which on they hold.
The rings themselves are open to any process of the host: ``subscribe(ring=...)``.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import nats.errors
import nats.js.errors as js_errors
import numpy as np
import numpy.typing as npt
import structlog
import uvloop
from nats.js.api import DiscardPolicy, StorageType, StreamConfig

from tickmesh.node.event import EVENT, EventArray
from tickmesh.node.frames import (
    EVENT_SIZE,
    HEADER_SIZE,
    CalculationNames,
    EventEncoder,
    FrameError,
    FrameHeader,
    InstrumentNames,
    NameHistory,
    calculations_subject,
    decode_names,
    encode_header,
    encode_names,
    names_from,
    reference_stream_name,
    reference_subject,
    sequence_runs,
    stream_name,
    stream_subject,
)
from tickmesh.node.release import ReleaseGate
from tickmesh.node.telemetry import record_ages
from tickmesh.transports.connection import backoff_s
from tickmesh.transports.counters import BUCKETS, HISTOGRAM_WORDS, Values, percentile
from tickmesh.transports.nats import (
    WINDOW_MAX,
    Fenced,
    LinkError,
    Login,
    NatsLink,
    OutputPublisher,
    OutputStream,
    connect,
)
from tickmesh.transports.ring import Reader, ReaderReleased, Ring, show_alive

State = Literal["connecting", "delivering", "waiting", "refused", "fenced", "stopped"]
_HEARTBEAT_S = 0.25
_HELD_MS = 2.0
"""Pause between looks at outputs that are held back: rarely, their inputs are acknowledged before the loop has said which those are."""
_RETRY_REFUSED_S = 5.0
_ENCODE_CHUNK = 128
_PENDING_BYTES_MAX = 4 << 20
"""Per-event messages are skipped while the connection has more than this to send."""
_MESSAGE_OVERHEAD_BYTES = 4096
_NAMES_KEPT = 1024
_ABANDON_S = 2.0
"""How long an abandoned delivery may take to end."""
_log = structlog.get_logger("delivery")


@dataclass(frozen=True)
class DeliveryOptions:
    """How to deliver.

    Attributes:
        cluster: first token of all subjects after ``tm``.
        target: NATS address(es); see :func:`tickmesh.transports.nats.connect`.
        epoch: fencing token of this node's leadership.
        batch_max_events: events in a frame at most; less if the server takes smaller messages only.
        batch_max_wait_ms: how long an output may wait for others to share its frame, while earlier frames are under way.
        window: frames under way at a time, at most 64.
        stream_max_bytes: the oldest frames go when a shard's stream is larger.
        stream_max_age_s: frames go when they are older; 0: never. Once all are gone, a restarted node publishes from its replay anew.
        replicas: of each stream; 3 in a NATS cluster.
        per_event: kinds to publish as maps too; ``None`` for all, empty for none.
        per_event_rate_max: maps per second and shard; a second's worth may come at once.
        poll_min_ms, poll_max_ms: pauses between looks at an empty ring, growing from the one to the other.
        drain_timeout_s: how long :meth:`Gateway.stop` tries to deliver what is left.
    """

    cluster: str
    target: str = "nats://127.0.0.1:4222"
    epoch: int = 1
    batch_max_events: int = 1024
    batch_max_wait_ms: float = 1.0
    window: int = 64
    stream_max_bytes: int = 512 << 20
    replicas: int = 1
    stream_max_age_s: float = 0.0
    per_event: frozenset[int] | None = None
    per_event_rate_max: int = 20_000
    poll_min_ms: float = 0.2
    poll_max_ms: float = 5.0
    drain_timeout_s: float = 5.0


@dataclass
class DeliveryCounters:
    """What one shard's delivery has done, beside its publisher's counters."""

    events_read: int = 0
    overwritten: int = 0
    """Outputs that the ring overwrote before they were read; each is covered by a gap marker."""
    released: int = 0
    """Times the ring's writer went on without us."""
    per_event_published: int = 0
    per_event_skipped: int = 0
    """Maps not published: over the rate, or no connection."""
    references: int = 0


class _TokenBucket:
    """At most `rate` per second, with a second's worth saved up."""

    def __init__(self, rate: int) -> None:
        self._rate = self._tokens = float(rate)
        self._at = time.monotonic()

    def take(self, wanted: int) -> int:
        """How many of `wanted` are granted."""
        now = time.monotonic()
        self._tokens = min(self._rate, self._tokens + (now - self._at) * self._rate)
        self._at = now
        granted = min(wanted, int(self._tokens))
        self._tokens -= granted
        return granted


class Changes:
    """Where among a shard's outputs its configuration changed, as its loop notes it."""

    def __init__(self, noted: npt.NDArray[np.uint64]) -> None:
        """`noted`: the shard's array `changes`, see :func:`tickmesh.node.shard_kernels.record_config`."""
        self._noted = noted

    @property
    def count(self) -> int:
        """Changes so far."""
        return int(self._noted[0, 0])

    def since(self, seen: int) -> list[tuple[int, int]]:
        """(first output made under it, version) of the changes from number `seen` on, as far as they are remembered."""
        count, kept = self.count, len(self._noted) - 1
        rows = (self._noted[1 + number % kept] for number in range(max(seen, count - kept), count))
        return [(int(before) + 1, int(version)) for before, version in rows]


class ShardDelivery:
    """Carries one shard's output ring to NATS. Part of a :class:`Gateway`.

    Attributes:
        state, error: how it stands, and why; see docs/reference/delivery.md.
        config_version: written into the frames; where the shard's changes are known, that of each output.
        names: the instruments seen so far.
        changes: of the shard's configuration.
        changes_seen: how many of them it has come to.
        epoch: of the leadership under which it publishes.
        judged: set once the stream has been taken over or has refused that; `state` says which.
        ended: set when there is nothing more to come of it.
        abandoned: it ends without delivering what is left.
    """

    def __init__(
        self,
        shard: int,
        reader: Reader,
        stored: Reader,
        options: DeliveryOptions,
        calculations: CalculationNames | None,
        latency: Values | None = None,
        changes: Changes | None = None,
        names_by_version: Mapping[int, CalculationNames] | None = None,
        gate: ReleaseGate | None = None,
        epoch: int | None = None,
    ) -> None:
        self.shard, self.options = shard, options
        self.epoch = options.epoch if epoch is None else epoch
        self.judged, self.ended = threading.Event(), threading.Event()
        self.abandoned = False
        self.stopping: asyncio.Event | None = None
        self.task: asyncio.Task[None] | None = None
        self.changes, self.changes_seen = changes, 0
        self._names_by_version = {} if names_by_version is None else names_by_version
        self._upcoming: deque[tuple[int, int]] = deque()
        self._versions: deque[tuple[int, int]] = deque(maxlen=2 * WINDOW_MAX)
        self.counters = DeliveryCounters()
        self.state: State = "connecting"
        self.error = ""
        self.config_version = 0
        self.publisher: OutputPublisher | None = None
        self.names = InstrumentNames()
        self._reader = reader
        self._stored = stored
        self._gate = gate
        self._held = np.zeros(0, EVENT)
        self._woken, self._released = False, asyncio.Event()
        self._encoder = EventEncoder(options.cluster, self.names, calculations)
        self._wanted = np.zeros(256, np.bool_)
        self._wanted[list(options.per_event or ())] = True
        self._bucket = _TokenBucket(options.per_event_rate_max)
        self._references: dict[int, bytes] = {}
        self._calculations: CalculationNames = calculations or {}
        self._history: NameHistory = []
        self._received: deque[tuple[int, npt.NDArray[np.int64]]] = deque()
        self._latency = np.zeros(HISTOGRAM_WORDS, np.int64) if latency is None else latency
        record_ages(self._latency, 0, np.zeros(0, np.int64))  # compiled or loaded now, not at the first acknowledgement
        self._link: NatsLink | None = None
        self._reconnects_seen = 0
        self._batch = options.batch_max_events

    # -- the life of a shard's delivery

    async def serve(self, link: NatsLink, stopping: asyncio.Event) -> None:
        """Deliver until stopped or fenced. What the server refuses is tried again every few seconds."""
        self._link = link
        self._batch = min(self.options.batch_max_events, (link.client.max_payload - _MESSAGE_OVERHEAD_BYTES - HEADER_SIZE) // EVENT_SIZE)
        self.publisher = self._make_publisher(link)
        try:
            while not await self._serve_once(stopping):
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(stopping.wait(), _RETRY_REFUSED_S)
                if stopping.is_set():
                    return
        finally:
            await self.publisher.close()
            if self.state != "fenced":
                self.state = "stopped"
            self.judged.set()

    async def _serve_once(self, stopping: asyncio.Event) -> bool:
        """True when there is nothing more to do."""
        assert self.publisher is not None
        kept = asyncio.ensure_future(self._kept_names())  # meanwhile
        try:
            self._go_on_after(await self.publisher.open())
            self.state, self.error = "delivering", ""
            self.judged.set()
            await self._publish_names(await kept)
            if self._references:
                self._again = asyncio.ensure_future(self._publish_all_references())
            with self._woken_by_gate():
                await self._pump(stopping)
        except Fenced as error:
            self.state, self.error = "fenced", str(error)
        except LinkError as error:
            self.state, self.error = "refused", str(error)
            self.judged.set()
            return False
        finally:
            kept.cancel()
        return True

    def _go_on_after(self, stored: int) -> None:
        """Read the ring from the first output on that the stream lacks; what was read before and refused is there still."""
        self._keep_from(stored)
        self._reader.go_back_to(self._stored.position)
        self._held = self._held[:0]
        self._received.clear()
        again = [turn for turn in self._versions if turn[0] > stored + 1]
        if again:
            known = [turn for turn in self._versions if turn[0] <= stored + 1]
            self._versions.clear()
            self._versions.extend(known)
            self._upcoming.extendleft(reversed(again))
            self.config_version = known[-1][1] if known else self.config_version

    def _keep_from(self, stored: int) -> None:
        """Outputs up to `stored` are in the stream; later ones are kept in a lossless ring."""
        if not self._stored.hold_from(stored) and self._stored.ring.mode == "lossless":
            self.counters.released += 1
            _log.error("outputs may have been overwritten: the ring's writer took the delivery for dead", shard=self.shard, stored=stored)

    def _make_publisher(self, link: NatsLink) -> OutputPublisher:
        o = self.options
        stream = OutputStream(
            name=stream_name(o.cluster, self.shard),
            subject=stream_subject(o.cluster, self.shard),
            writer=str(self.shard),
            bytes_max=o.stream_max_bytes,
            age_max_s=o.stream_max_age_s,
            replicas=o.replicas,
        )
        window = min(o.window, WINDOW_MAX)
        return OutputPublisher(link, stream, self._head, epoch=self.epoch, record_bytes=EVENT_SIZE, window=window, acked=self._on_acked)

    def _head(self, first: int, count: int, missing: int) -> bytes:
        version = next((version for since, version in reversed(self._versions) if since <= first), self.config_version)
        return encode_header(FrameHeader(self.shard, self.epoch, version, first, count, missing))

    # -- the ring's side

    async def _pump(self, stopping: asyncio.Event) -> None:
        assert self.publisher is not None
        o, pause_ms = self.options, self.options.poll_min_ms
        while not stopping.is_set():
            self._woken = False
            self._released.clear()
            lag = self._ready()
            if lag == 0:
                self.publisher.check()
                self._refresh_references()
                if self._gate is not None and self._gate.tells:
                    pause_ms = _HELD_MS if self._reader.lag else o.poll_max_ms
                woken = await self._woken_within(pause_ms)
                pause_ms = o.poll_min_ms if woken else min(o.poll_max_ms, pause_ms * 1.2)
                continue
            pause_ms = o.poll_min_ms
            if lag < self._batch and o.batch_max_wait_ms > 0 and self.publisher.in_flight:  # nothing under way: send at once
                await asyncio.sleep(o.batch_max_wait_ms / 1000)
            await self._deliver(self._read())
        await self._finish()

    async def _woken_within(self, pause_ms: float) -> bool:
        """Whether somebody has let more go within this time; waits for it."""
        over = asyncio.get_running_loop().call_later(pause_ms / 1000, self._released.set)  # a third of what asyncio.timeout costs
        try:
            await self._released.wait()
        finally:
            over.cancel()
        return self._woken

    @contextlib.contextmanager
    def _woken_by_gate(self) -> Iterator[None]:
        wake = partial(self._wake, asyncio.get_running_loop())
        listeners = self._gate.listeners if self._gate is not None else set()
        listeners.add(wake)
        try:
            yield
        finally:
            listeners.discard(wake)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """From the thread that has let more go."""
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._released.set)

    async def _finish(self) -> None:
        """Deliver what has been put out so far, within the limit; a shard may go on."""
        assert self.publisher is not None
        last = self._reader.ring.published
        end = time.monotonic() + self.options.drain_timeout_s
        try:
            async with asyncio.timeout(self.options.drain_timeout_s):
                while (self._reader.lag and self._reader.position < last) or len(self._held):
                    if self._ready() == 0:
                        await asyncio.sleep(self.options.poll_min_ms / 1000)
                    await self._deliver(self._read())
        except TimeoutError:
            pass
        if not await self.publisher.drain(max(0.1, end - time.monotonic())):
            self.error = f"{self.publisher.in_flight} frames were not acknowledged before the end: a replay of the journal delivers them"

    def _ready(self) -> int:
        """How many outputs may be read now: those in the ring, or as many of them as the gate lets go."""
        lag = self._reader.lag
        if self._gate is None:
            return lag
        released = self._gate.released()
        if len(self._held):
            return int(np.searchsorted(self._held["seq"], np.uint64(released), "right"))
        return max(0, min(lag, released - (self._reader.ring.published - lag)))

    def _read(self) -> EventArray:
        if self._gate is not None:
            return self._read_released(self._gate.released())
        return self._read_ring(self._batch)

    def _read_released(self, released: int) -> EventArray:
        """Outputs up to `released`. A lossy ring that has lapped us goes on with later ones: they are held here."""
        if len(self._held) == 0:
            self._held = self._read_ring(min(self._batch, self._ready()))
        go = int(np.searchsorted(self._held["seq"], np.uint64(released), "right"))
        events, self._held = self._held[:go], self._held[go:]
        return events

    def _read_ring(self, maximum: int) -> EventArray:
        try:
            events = self._reader.read(maximum)
        except ReaderReleased:
            self.counters.released += 1
            events = self._reader.read(maximum)
        return events.view(EVENT)

    async def _deliver(self, events: EventArray) -> None:
        if len(events) == 0:
            return
        self.counters.events_read += len(events)
        if self.changes is not None and self.changes.count != self.changes_seen:
            self._upcoming.extend(self.changes.since(self.changes_seen))
            self.changes_seen = self.changes.count
        for run in sequence_runs(events):
            rest = run
            while len(rest):
                first = int(rest["seq"][0])
                while self._upcoming and self._upcoming[0][0] <= first:
                    await self._turn_to(*self._upcoming.popleft())
                end = min(len(rest), self._upcoming[0][0] - first) if self._upcoming else len(rest)
                await self._deliver_run(rest[:end])
                rest = rest[end:]

    async def _turn_to(self, first: int, version: int) -> None:
        """From output `first` on, outputs are made under another version of the configuration."""
        self._versions.append((first, version))
        self.config_version = version
        names = self._names_by_version.get(version)
        if names is None or names == self._calculations:
            return
        self._calculations = names
        self._encoder = EventEncoder(self.options.cluster, self.names, names)
        self._history = names_from(self._history, first, names)
        await self._send_names()

    async def _deliver_run(self, events: EventArray) -> None:
        """Publish events whose output sequences follow each other."""
        assert self.publisher is not None
        first = int(events["seq"][0])
        expected = self.publisher.next_out_seq
        if first > expected:
            self.counters.overwritten += first - expected
            await self.publisher.publish_gap(expected, first - 1)
        news = self.names.learn(events)
        stamps = (int(events["seq"][-1]), events["ts_recv"].copy())
        self._received.append(stamps)
        fresh = await self.publisher.publish(first, events.view(np.uint8).data)
        self._keep_from(self.publisher.last_out_seq)  # a replay makes outputs again that have been acknowledged long ago
        if not fresh and self._received and self._received[-1] is stamps:
            self._received.pop()  # all of it was stored before a restart
        await self._publish_references(news)
        if fresh and self.options.per_event != frozenset():
            await self._publish_maps(events[len(events) - fresh :])

    def _on_acked(self, first: int, last: int, sent_ns: int) -> None:
        self._keep_from(last)
        now = time.time_ns()
        while self._received and self._received[0][0] <= last:
            record_ages(self._latency, now, self._received.popleft()[1])

    # -- one map per event

    async def _publish_maps(self, events: EventArray) -> None:
        assert self._link is not None
        wanted = events
        if self.options.per_event is not None:
            wanted = events[self._wanted[events["kind"]]]
        ready = self._link.connected and self._link.client.pending_data_size < _PENDING_BYTES_MAX
        granted = self._bucket.take(len(wanted)) if ready else 0
        self.counters.per_event_skipped += len(wanted) - granted
        newest = wanted[len(wanted) - granted :]
        for start in range(0, granted, _ENCODE_CHUNK):
            await self._publish_chunk(newest[start : start + _ENCODE_CHUNK])

    async def _publish_chunk(self, events: EventArray) -> None:
        assert self._link is not None
        publish = self._link.client.publish
        done = 0
        try:
            for subject, payload in self._encoder.encode(events):
                await publish(subject, payload)
                done += 1
        except (nats.errors.Error, OSError):
            self.counters.per_event_skipped += len(events) - done
        self.counters.per_event_published += done
        await asyncio.sleep(0)  # frames of other shards, and acknowledgements, in between

    # -- REFERENCE events for subscribers that start later

    def know_instruments(self, references: EventArray) -> None:
        """Before the start: REFERENCE events of instruments that the ring does not bring any more."""
        for one in self.names.learn(references):
            self._references[int(one["instrument"])] = one.tobytes()

    async def _publish_references(self, news: EventArray) -> None:
        for one in news:
            self._references[int(one["instrument"])] = one.tobytes()
            await self._publish_reference(int(one["instrument"]))

    def _refresh_references(self) -> None:
        """After a reconnect, publish them again: the server may have missed some."""
        assert self._link is not None
        assert self.publisher is not None
        if self.publisher.recovering:
            return  # it is not known yet whether the stream is still ours
        if self._link.reconnects != self._reconnects_seen and self._link.connected:
            self._reconnects_seen = self._link.reconnects
            self._again = asyncio.ensure_future(self._publish_all_references())

    async def _kept_names(self) -> NameHistory:
        """How the calculations were called up to now, as far as the server knows."""
        assert self._link is not None
        subject, jetstream = calculations_subject(self.options.cluster, self.shard), self._link.client.jetstream(timeout=2)
        with contextlib.suppress(nats.errors.Error, js_errors.Error, FrameError, OSError):  # then there is none to go on with
            return decode_names((await jetstream.get_last_msg(reference_stream_name(self.options.cluster), subject)).data or b"")
        return self._history

    async def _publish_names(self, kept: NameHistory) -> None:
        """Say how the calculations are called from the next output on."""
        assert self.publisher is not None
        self._history = names_from(kept, self.publisher.next_out_seq, self._calculations)
        await self._send_names()

    async def _send_names(self) -> None:
        assert self._link is not None
        if self._history:
            with contextlib.suppress(nats.errors.Error, OSError):
                await self._link.client.publish(calculations_subject(self.options.cluster, self.shard), encode_names(self._history))

    async def _publish_all_references(self) -> None:
        await self._send_names()
        for instrument in list(self._references):
            await self._publish_reference(instrument)

    async def _publish_reference(self, instrument: int) -> None:
        assert self._link is not None
        subject = reference_subject(self.options.cluster, self.shard, instrument)
        with contextlib.suppress(nats.errors.Error, OSError):
            await self._link.client.publish(subject, self._references[instrument])
            self.counters.references += 1

    # -- seen from outside

    def show_alive(self) -> None:
        """Keep a lossless ring's writer waiting for us while NATS is away."""
        show_alive(self._reader)
        show_alive(self._stored)

    def close(self) -> None:
        """Let go of the ring."""
        self._reader.close()
        self._stored.close()

    def status(self) -> dict[str, Any]:
        """State, counters and latency as plain data; see docs/reference/delivery.md."""
        publisher = self.publisher
        state: State = self.state
        if state == "delivering" and publisher is not None and (self._link is None or not self._link.connected or publisher.recovering):
            state = "waiting"
        latencies = self._latency[-BUCKETS:]
        return {
            "shard": self.shard,
            "state": state,
            "error": self.error or (publisher.last_error if publisher and state == "waiting" else ""),
            "ring_lag": self._stored.lag,
            "ring_missed": self._reader.missed,
            **({"release": self._gate.status()} if self._gate else {}),
            "last_out_seq": publisher.last_out_seq if publisher else 0,
            "in_flight": publisher.in_flight if publisher else 0,
            "reconnects": self._link.reconnects if self._link else 0,
            "received_to_stored_us": {f"p{p}": percentile(latencies, p) / 1000 if latencies.any() else None for p in (50, 99)},
            **asdict(self.counters),
            **(asdict(publisher.counters) if publisher else {}),
        }


class Gateway:
    """Delivers the outputs of a node's shards. Run it in an event loop (:meth:`run`) or in a thread of its own (:meth:`start`).

    Shards come and go while it runs (:meth:`take`, :meth:`drop`), as leadership does; the connection stays.

    Attributes:
        shards: one :class:`ShardDelivery` per shard, by shard number.
        fenced: told of a shard whose stream has been taken by a later epoch, in the gateway's thread.
    """

    def __init__(
        self,
        options: DeliveryOptions,
        rings: Mapping[int, Ring],
        *,
        calculations: CalculationNames | None = None,
        login: Login | None = None,
        latencies: Mapping[int, Values] | None = None,
        changes: Mapping[int, Changes] | None = None,
        gates: Mapping[int, ReleaseGate] | None = None,
        start: Literal["oldest", "newest"] = "oldest",
    ) -> None:
        """Registers a reader at each ring, which from then on holds a lossless ring's writer.

        Args:
            options: how to deliver.
            rings: output ring by shard number; the events' `seq` is the shard's output sequence, from 1, without holes.
            calculations: names of signals for the maps.
            login: default: from the environment.
            latencies: by shard number, the histogram of times from receipt to the stream (:meth:`Telemetry.delivery`).
            changes: by shard number, where its configuration changed; :meth:`know` says how calculations are called then.
            gates: by shard number, what holds outputs back until their inputs are on standbys; without one they go at once.
            start: from where on the rings are read; `newest` for rings that hold nothing yet, whatever number they begin at.
        """
        self.options = options
        self.error = ""
        self.fenced: Callable[[int], None] = lambda _: None
        self._login, self._calculations = login, calculations
        known, changed, held = latencies or {}, changes or {}, gates or {}
        self._names: dict[int, CalculationNames] = {}
        self.shards: dict[int, ShardDelivery] = {}
        self._link: NatsLink | None = None
        self._stopping: asyncio.Event | None = None
        self._stop_asked = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._listing = threading.Lock()
        for shard, ring in rings.items():
            self.take(shard, ring, latency=known.get(shard), changes=changed.get(shard), gate=held.get(shard), start=start)

    def take(
        self,
        shard: int,
        ring: Ring,
        *,
        epoch: int | None = None,
        latency: Values | None = None,
        changes: Changes | None = None,
        gate: ReleaseGate | None = None,
        references: EventArray | None = None,
        start: Literal["oldest", "newest"] = "oldest",
        after: int = 0,
    ) -> ShardDelivery:
        """Deliver a shard's outputs from now on, under `epoch`; in place of the delivery that there was. From any thread.

        The stream is taken over under that epoch, which fences earlier ones; `ShardDelivery.judged` says when that is known.
        Outputs up to `after` are not looked at.
        """
        # before the one so far goes: what that has read, and the stream has not, is held without a pause
        stored, reader = ring.reader("gateway-stored", start=start), ring.reader("gateway", start=start)
        for one in (stored, reader):
            one.skip_to(after)
        self.drop(shard)
        made = ShardDelivery(shard, reader, stored, self.options, self._calculations, latency, changes, self._names, gate, epoch)
        if references is not None:
            made.know_instruments(references)
        reader.read(0)  # compiles or loads the ring's kernels now: later it could take longer than a lossless ring waits for us
        made.show_alive()
        with self._listing:
            self.shards = {**self.shards, shard: made}
        self._in_loop(self._begin_all)
        return made

    def drop(self, shard: int, *, deliver_s: float = 0.0) -> bool:
        """Deliver a shard's outputs no more; what is in its ring goes first, within `deliver_s`. False: not all of it did.

        From any thread but the gateway's own.
        """
        delivery = self.shards.get(shard)
        if delivery is None:
            return True
        delivery.abandoned = deliver_s <= 0
        if delivery.task is not None:
            self._in_loop(partial(self._end, delivery))
            if not delivery.ended.wait(deliver_s or _ABANDON_S):
                delivery.abandoned = True
                self._in_loop(partial(self._end, delivery))
                delivery.ended.wait(_ABANDON_S)
        with self._listing:
            self.shards = {number: other for number, other in self.shards.items() if number != shard}
        done = delivery._reader.lag == 0 and (delivery.publisher is None or not delivery.publisher.in_flight)
        delivery.close()
        return done

    def _in_loop(self, call: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):  # it ends this moment
                self._loop.call_soon_threadsafe(call)

    def _end(self, delivery: ShardDelivery) -> None:
        if delivery.stopping is not None:
            delivery.stopping.set()
        if delivery.abandoned and delivery.task is not None:
            delivery.task.cancel()

    def _begin_all(self) -> None:
        """Begin to deliver the shards that came lately, once there is a connection."""
        if self._link is None or self._stop_asked.is_set():
            return
        for delivery in self.shards.values():
            if delivery.task is None:
                delivery.stopping = asyncio.Event()
                delivery.task = asyncio.ensure_future(self._deliver_shard(delivery, self._link, delivery.stopping))

    async def _deliver_shard(self, delivery: ShardDelivery, link: NatsLink, stopping: asyncio.Event) -> None:
        if self.shards.get(delivery.shard) is not delivery:
            return  # dropped before it began
        failed = True
        try:
            await delivery.serve(link, stopping)
            failed = delivery.state == "fenced"
        except asyncio.CancelledError:
            failed = False
        finally:
            delivery.close()
            delivery.judged.set()
            delivery.ended.set()
            if failed:  # nothing of this shard is delivered here any more
                self.fenced(delivery.shard)

    async def run(self) -> None:
        """Deliver until :meth:`ask_stop`. Waits for NATS as long as it takes; never raises for want of it."""
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        if self._stop_asked.is_set():
            self._stopping.set()
        alive = asyncio.create_task(self._show_alive())
        try:
            self._link = await self._connect()
            if self._link is not None:
                await self._serve(self._stopping)
        finally:
            alive.cancel()
            for delivery in self.shards.values():
                delivery.close()
            if self._link is not None:
                await self._link.close()

    async def _serve(self, stopping: asyncio.Event) -> None:
        self._begin_all()
        await stopping.wait()
        serving = [delivery.task for delivery in self.shards.values() if delivery.task is not None]
        for delivery in self.shards.values():
            self._end(delivery)
        if not serving:
            return
        _, late = await asyncio.wait(serving, timeout=self.options.drain_timeout_s + 1)
        for task in late:  # NATS is away: what is undelivered can be made again from the journal
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=2)

    def ask_stop(self) -> None:
        """End :meth:`run` after delivering what is in the rings, within `drain_timeout_s`. From any thread."""
        self._stop_asked.set()
        if self._stopping is not None:
            self._in_loop(self._stopping.set)

    def start(self) -> Gateway:
        """Run in a thread of its own."""
        self._thread = threading.Thread(target=partial(uvloop.run, self.run()), name="gateway", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End the thread; what is left in the rings is delivered first, within `drain_timeout_s`."""
        self.ask_stop()
        if self._thread is not None:
            self._thread.join(self.options.drain_timeout_s + 10)
            self._thread = None

    def know(self, version: int, calculations: CalculationNames) -> None:
        """Say how the calculations of a version are called, before a shard turns to it."""
        self._names[version] = calculations
        while len(self._names) > _NAMES_KEPT:
            del self._names[min(self._names)]

    @property
    def changes_behind(self) -> int:
        """Changes of the configuration that a shard has made and its delivery has not come to."""
        return max((s.changes.count - s.changes_seen for s in self.shards.values() if s.changes is not None), default=0)

    def take_latencies(self, latencies: Mapping[int, Values]) -> None:
        """Count into other histograms from now on, by shard number."""
        for shard, delivery in self.shards.items():
            if shard in latencies:
                delivery._latency = latencies[shard]

    def release(self) -> None:
        """Let go of the rings of a gateway that has not been started."""
        for delivery in self.shards.values():
            delivery.close()

    def show_alive(self) -> None:
        """Keep lossless rings waiting for a gateway that does not run yet."""
        for shard in self.shards.values():
            shard.show_alive()

    def set_config_version(self, version: int) -> None:
        """Frames made from now on say that their events were made under this configuration."""
        for shard in self.shards.values():
            shard.config_version = version

    def status(self) -> list[dict[str, Any]]:
        """One map per shard; from any thread."""
        return [{**shard.status(), **({"error": self.error} if self.error else {})} for shard in self.shards.values()]

    async def _connect(self) -> NatsLink | None:
        assert self._stopping is not None
        attempt = 0
        while not self._stopping.is_set():
            try:
                link = await connect(self.options.target, name=f"tickmesh {self.options.cluster}", login=self._login, wait_s=2.0)
                try:
                    await _make_reference_stream(link, self.options)
                except BaseException:
                    await link.close()
                    raise
                self.error = ""
                return link
            except (LinkError, nats.errors.Error, js_errors.Error, OSError) as error:
                self.error = str(error) or type(error).__name__
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff_s(attempt))
            attempt += 1
        return None

    async def _show_alive(self) -> None:
        while True:
            for shard in self.shards.values():
                shard.show_alive()
            await asyncio.sleep(_HEARTBEAT_S)


async def _make_reference_stream(link: NatsLink, options: DeliveryOptions) -> None:
    jetstream, name = link.client.jetstream(timeout=2), reference_stream_name(options.cluster)
    try:
        await jetstream.stream_info(name)
    except js_errors.NotFoundError:
        await jetstream.add_stream(
            StreamConfig(
                name=name,
                subjects=[reference_subject(options.cluster, "*", "*")],
                storage=StorageType.FILE,
                discard=DiscardPolicy.OLD,
                max_msgs_per_subject=1,
                num_replicas=options.replicas,
            )
        )
