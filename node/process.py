"""The node process: sources, shards, journals and delivery of one configuration, started, watched and stopped together.

Threads: one per source, one per shard (both compiled, both pinned where `cluster.cpus` says so), the gateway's, the journals' helpers, and
the main thread, which only mirrors counters and waits for a signal.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import nats.errors
import nats.js.errors as js_errors
import numpy as np
import structlog

from tickmesh.control.config import Config, Delivery
from tickmesh.node.book import resting_orders
from tickmesh.node.delivery import DeliveryOptions, Gateway
from tickmesh.node.event import ANY_VIEW, EVENT, NO_PRICE, EventArray, Kind
from tickmesh.node.frames import stream_name, stream_subject
from tickmesh.node.journal import Journal, JournalArrays, JournalReader
from tickmesh.node.loops import live_loop
from tickmesh.node.pipeline import make_shards, make_table
from tickmesh.node.receivers import BlockSourceMaker, MulticastReceiver, Receiver, ReceiverContext, make_receiver
from tickmesh.node.release import ReleaseGate
from tickmesh.node.release_marks import make_marks
from tickmesh.node.restore import read_restored
from tickmesh.node.retention import Retention
from tickmesh.node.shard import BATCH_EVENTS, Shard
from tickmesh.node.telemetry import NodeState, ShardCounter, Telemetry
from tickmesh.transports.codecache import CompileStopped, watched_compiles
from tickmesh.transports.nats import LinkError, Login, connect
from tickmesh.transports.ring import W_CLAIMED, W_GATE, W_PUBLISHED, Ring, ring_path
from tickmesh.transports.toolbox import IDLE_MODES, zeros_aligned

Progress = Callable[[str], None] | None
_MIRROR_S = 0.1
_TRIM_S = 1.0
_STOP_S = 5.0
_WAIT_S = 0.001
_RECORD_BYTES = 72
_log = structlog.get_logger("node")


class NodeError(Exception):
    """The node cannot start, or had to stop; the message says what to do."""


class ShardThread:
    """A shard, its input rings, journal, output ring and thread."""

    def __init__(
        self,
        number: int,
        shard: Shard,
        inputs: Sequence[Ring],
        output: Ring,
        journal: Journal | None,
        telemetry: Telemetry,
        idle: int,
        progress: Progress,
        gate: ReleaseGate | None = None,
    ) -> None:
        self.number, self.shard, self.inputs, self.output, self.journal = number, shard, list(inputs), output, journal
        self.stop = np.zeros(3, np.int64)
        self.error: BaseException | None = None
        self.readers = [ring.reader(f"shard-{number}") for ring in inputs]
        self._idle = idle
        self.gate = gate
        self.retention: Retention | None = None
        self._latency, self._batch_events = telemetry.shard(number)[2:]
        self._module = live_loop(shard.module, len(inputs), BATCH_EVENTS, progress)
        self._thread = threading.Thread(target=self._run, name=f"shard-{number}", daemon=True)
        self.writer = output.writer

    def start(self) -> None:
        """Start the loop."""
        self._thread.start()

    @property
    def thread_id(self) -> int | None:
        """The kernel's id of the thread, for pinning."""
        return self._thread.native_id

    @property
    def running(self) -> bool:
        """Whether the loop runs."""
        return self._thread.is_alive()

    def idle_rounds(self) -> int:
        """Rounds without input so far."""
        return int(self.stop[1])

    def end(self) -> None:
        """Stop the loop after the batch in hand."""
        self.stop[0] = 1
        if self._thread.ident is not None:
            self._thread.join(_STOP_S)

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:
            self.error = error

    def _loop(self) -> None:
        failure = self._call(zeros_aligned(BATCH_EVENTS, EVENT), 0, 0)
        if failure and self.journal is not None:
            raise NodeError(f"its journal in {self.journal.folder} cannot be written ({os.strerror(failure)}): free space and start again")

    def step_again(self, batch: EventArray, first: int, end: int) -> int:
        """Before the start: step over events ``[first, end)`` of the journal; returns how many, fewer if the output ring is full."""
        return self._call(batch, first, end)

    def _call(self, batch: EventArray, first: int, end: int) -> int:
        """The loop, whose one entry point does both: two would be compiled twice."""
        words = np.zeros(1, np.uint64)
        journal = self.journal.arrays if self.journal else JournalArrays(words, words, np.zeros(1, EVENT), words)
        result = self._module.run(
            np.array([first, end], np.int64),
            self.stop,
            tuple(ring.arrays for ring in self.inputs),
            np.array([reader.slot for reader in self.readers], np.int64),
            journal,
            int(self.journal is not None),
            batch,
            batch.view(ANY_VIEW),
            self.shard.arrays,
            self._latency,
            self._batch_events,
            self._idle,
            self.gate.marks if self.gate else make_marks(0),
        )
        return int(result)


class Node:
    """A node of one configuration. :meth:`start`, then :meth:`watch` until something ends it, then :meth:`stop`.

    Args:
        config: the configuration.
        generators: makers of in-process sources by source type, e.g. ``{"simulator": …}``.
        targets: address of the NATS server by delivery name, in place of the configured one (an embedded server's).
        progress: told when something has to be compiled.
        stop: ends a compile early.

    Raises:
        CompileStopped: `stop` was set during a compile.
        NodeError and the typed errors of its parts: it cannot start.
    """

    def __init__(
        self,
        config: Config,
        generators: Mapping[str, BlockSourceMaker] | None = None,
        targets: Mapping[str, str] | None = None,
        progress: Progress = None,
        stop: threading.Event | None = None,
    ) -> None:
        if not config.data_sources:
            raise NodeError("the configuration has no data source: add a [data_sources.NAME] table")
        self.config, self._progress = config, progress
        self._targets = dict(targets or {})
        cluster = config.cluster
        self.telemetry = Telemetry.create(cluster.name, cluster.node, list(config.data_sources), cluster.shards, self._delivery_names())
        self.receivers: list[Receiver] = []
        self.shards: list[ShardThread] = []
        self.outputs: list[Ring] = []
        self.gateways: dict[str, Gateway] = {}
        self.journals: list[Journal] = []
        self._replays = False
        self._stopped = False
        try:
            with watched_compiles(lambda: self._compiles(stop)):
                self._build(dict(generators or {}))
        except BaseException:
            self.stop()
            raise

    def _compiles(self, stop: threading.Event | None) -> bool:
        """Tell the world that a compile is under way; returns whether it is to end."""
        self.telemetry.set_state(NodeState.COMPILING)
        return stop is not None and stop.is_set()

    def _delivery_names(self) -> list[str]:
        return [name for name, delivery in self.config.delivery.items() if delivery.method == "nats"]

    # ---- building

    def _build(self, generators: dict[str, BlockSourceMaker]) -> None:
        config, cluster = self.config, self.config.cluster
        idle = IDLE_MODES[cluster.idle]
        self.table = make_table(config)
        inputs: list[list[Ring]] = []
        for number, name in enumerate(config.data_sources):
            rings = [Ring.create(None, cluster.ring_capacity, EVENT, reader_timeout_ms=60_000) for _ in range(cluster.shards)]
            inputs.append(rings)
            context = ReceiverContext(self.table, rings, number, idle, self._progress, config.processing.timer_interval_ms * 1_000_000)
            self.receivers.append(make_receiver(name, config, context, generators))
        self.telemetry.set_state(NodeState.STARTING)
        self._create_outputs()
        shards = make_shards(config, self.outputs, config.folder, self._order_ids(), self._progress)
        self._open_journals()
        if self.journals and self._replays:
            self._remember_instruments()
        else:
            self._continue_numbering(shards)
        for number, shard in enumerate(shards):
            journal = self.journals[number] if self.journals else None
            mine = [rings[number] for rings in inputs]
            self.shards.append(ShardThread(number, shard, mine, self.outputs[number], journal, self.telemetry, idle, self._progress))
            if journal:
                self.shards[-1].retention = self._retention(journal)
        self.telemetry.set_state(NodeState.STARTING)
        self._create_gateways()

    def _order_ids(self) -> str:
        kinds = {receiver.order_ids for receiver in self.receivers}
        return kinds.pop() if len(kinds) == 1 else "per_instrument"

    def _create_outputs(self) -> None:
        cluster = self.config.cluster
        shm = next((delivery for delivery in self.config.delivery.values() if delivery.method == "shm"), None)
        base = (shm.ring if shm else None) or f"{cluster.name}-{cluster.node}-out"
        mode: Any = "lossless" if cluster.output_overflow == "block" else "lossy"
        capacity = shm.ring_capacity if shm else cluster.ring_capacity
        for number in range(cluster.shards):
            name = f"{base}-{number}"
            ring_path(name).unlink(missing_ok=True)  # left by a node that was killed: the counters' lock says that none runs
            self.outputs.append(Ring.create(name, capacity, EVENT, mode=mode))

    # ---- the journal

    def _open_journals(self) -> None:
        """Open the journals. A live feed goes on where its journal ends, if it may; a recording or a simulation starts anew."""
        settings = self.config.journal
        if not settings.enabled:
            return
        self._replays = settings.restore and all(isinstance(receiver, MulticastReceiver) for receiver in self.receivers)
        records = 1 << max(9, (settings.segment_mb * (1 << 20) // _RECORD_BYTES).bit_length() - 1)
        base = self.config.cluster.data_path / "journal" / self.config.cluster.node
        for number in range(self.config.cluster.shards):
            folder = base / f"shard-{number}"
            if folder.exists() and any(folder.iterdir()):
                if self._replays:
                    _check_whole(folder)
                    self.journals.append(Journal.open(folder, number, sync=settings.sync))
                    continue
                previous = folder.with_name(folder.name + ".previous")
                shutil.rmtree(previous, ignore_errors=True)
                folder.rename(previous)
            self.journals.append(Journal.create(folder, number, segment_records=records, sync=settings.sync))

    def _retention(self, journal: Journal) -> Retention:
        settings = self.config.journal
        return Retention(journal, keep_bytes=settings.keep_mb << 20, keep_s=settings.keep_hours * 3600.0, needed_whole=self._replays)

    def _remember_instruments(self) -> None:
        """Give the instruments of the journals the ids they had, and tell the receivers how far their sources had come."""
        restored = read_restored(journal.folder for journal in self.journals)
        restored.intern(self.table)
        for receiver in self.receivers:
            number = receiver.context.number
            receiver.resume(restored.codes.get(number, {}), restored.sequences.get(number, 0))

    def _replay_journals(self, stop: threading.Event) -> None:
        """Bring each shard to where its journal ends. What was put out then is numbered again, and delivered where it was not."""
        for thread, journal in zip(self.shards, self.journals):
            if journal.next_sequence == 0:
                continue
            _tell(self._progress, f"shard {thread.number}: replaying {journal.next_sequence:,} events of the journal")
            for batch in JournalReader(journal.folder).batches():
                mine = batch.copy()  # a shard completes events in place
                for first in range(0, len(mine), BATCH_EVENTS):
                    self._step_again(thread, mine, first, min(first + BATCH_EVENTS, len(mine)), stop)
                if stop.is_set():
                    return

    def _step_again(self, thread: ShardThread, batch: EventArray, first: int, end: int, stop: threading.Event) -> None:
        """Step over events of the journal; where the output ring is full, the gateway has to deliver first."""
        told = False
        while first < end and not stop.is_set():
            done = thread.step_again(batch, first, end)
            first += done
            if done == 0:
                if not told:
                    _tell(self._progress, "more outputs than the ring holds are undelivered: waiting for NATS to take them")
                told = True
                stop.wait(_WAIT_S)

    def _continue_numbering(self, shards: list[Shard]) -> None:
        """Without a journal to replay, outputs are numbered after the last one in the output stream."""
        ends = [0] * len(shards)
        for name in self._delivery_names():
            delivery = self.config.delivery[name]
            try:
                last = asyncio.run(self._last_outputs(self._targets.get(name, delivery.target), delivery))
            except (LinkError, nats.errors.Error, OSError) as error:
                reason = "NATS must be there when a node without a journal to replay starts, to know where its output stream ends"
                raise NodeError(f"delivery.{name}: {reason} ({error})") from error
            ends = [max(pair) for pair in zip(ends, last)]
        for shard, ring, sequence in zip(shards, self.outputs, ends):
            shard.arrays.core["out_seq"] = sequence
            ring.arrays.words[[W_PUBLISHED, W_CLAIMED, W_GATE]] = sequence

    async def _last_outputs(self, target: str, delivery: Delivery) -> list[int]:
        cluster = self.config.cluster
        link = await connect(target, name=f"tickmesh {cluster.name}", login=login_of(delivery), wait_s=5.0)
        try:
            found = []
            jetstream = link.client.jetstream(timeout=2)
            for shard in range(cluster.shards):
                try:
                    message = await jetstream.get_last_msg(stream_name(cluster.name, shard), stream_subject(cluster.name, shard))
                    found.append(int((message.headers or {}).get("Out-Seq", "0")))
                except js_errors.NotFoundError:
                    found.append(0)
            return found
        finally:
            await link.close()

    # ---- delivery

    def _create_gateways(self) -> None:
        rings = dict(enumerate(self.outputs))
        names = signal_names(self.shards[0].shard)
        for name, delivery in self.config.delivery.items():
            if delivery.method == "nats":
                options = delivery_options(self.config, delivery, self._targets.get(name, delivery.target))
                latencies = {number: self.telemetry.delivery(name, number).receive_to_stored for number in rings}
                self.gateways[name] = Gateway(options, rings, calculations=names, login=login_of(delivery), latencies=latencies)

    # ---- running

    def start(self, stop: threading.Event | None = None) -> None:
        """Start everything, consumers first, and replay the journals before anything new comes in.

        Args:
            stop: ends a replay early; nothing is started then.
        """
        stop = stop or threading.Event()
        for gateway in self.gateways.values():
            gateway.start()
        if self._replays:
            self._replay_journals(stop)
        if stop.is_set():
            return
        for shard in self.shards:
            shard.start()
        for receiver in self.receivers:
            receiver.start()
        self._pin()
        self.telemetry.set_state(NodeState.RUNNING)

    def _pin(self) -> None:
        threads: list[Receiver | ShardThread] = [*self.receivers, *self.shards]
        for thread, cpu in zip(threads, self.config.cluster.cpus):
            try:
                if thread.thread_id is not None:
                    os.sched_setaffinity(thread.thread_id, {cpu})
            except OSError as error:
                _log.warning("cannot pin a thread", cpu=cpu, reason=str(error))

    def watch(self, stop: threading.Event, each: Callable[[Node], None] | None = None) -> None:
        """Mirror counters and trim journals until `stop` is set.

        Raises:
            NodeError: a source or a shard has failed.
        """
        trim_due = time.monotonic()
        while not stop.wait(_MIRROR_S):
            self.mirror()
            self.check()
            if time.monotonic() >= trim_due:
                self.trim_journals()
                trim_due = time.monotonic() + _TRIM_S
            if each:
                each(self)

    @property
    def finished(self) -> bool:
        """Whether every source has come to its end and everything it brought has been processed."""
        return all(receiver.finished for receiver in self.receivers) and self.drained()

    def drained(self) -> bool:
        """Whether the shards have taken everything from their input rings."""
        return all(reader.lag == 0 for shard in self.shards for reader in shard.readers)

    def check(self) -> None:
        """Raise what has ended a source or a shard.

        Raises:
            NodeError: with the reason.
        """
        for receiver in self.receivers:
            if receiver.error is not None:
                raise NodeError(f"data_sources.{receiver.name}: {receiver.error}") from receiver.error
        for shard in self.shards:
            if shard.error is not None:
                raise NodeError(f"shard {shard.number}: {shard.error}") from shard.error

    def trim_journals(self) -> None:
        """Delete what `journal.keep_mb` and `keep_hours` do not want kept and nothing needs."""
        statuses = [gateway.status() for gateway in self.gateways.values()]
        for thread in self.shards:
            if thread.retention is not None:
                core = thread.shard.arrays.core[0]
                thread.retention.mark(int(core["events"]), int(core["out_seq"]))
                thread.retention.trim(min((status[thread.number]["last_out_seq"] for status in statuses), default=None))

    def mirror(self) -> None:
        """Write the numbers that no loop writes itself into the counters, and look after the rings."""
        for ring in self.outputs:
            ring.release_dead_readers()
        for receiver in self.receivers:
            self.telemetry.update(f"source.{receiver.name}", receiver.counters())
        for shard in self.shards:
            self.telemetry.update(f"shard.{shard.number}", shard_numbers(shard))
        for name, gateway in self.gateways.items():
            for number, status in enumerate(gateway.status()):
                self.telemetry.update(f"delivery.{name}.{number}", delivery_numbers(status))
        self.telemetry.beat()

    def stop(self) -> None:
        """Stop sources, let the shards finish what has come in, deliver it, close everything. Can be called at any stage, and again.

        Raises:
            The first error of closing; everything else has been closed nevertheless.
        """
        if self._stopped:
            return
        self._stopped = True
        with ExitStack() as closing:  # runs backwards
            closing.callback(self.telemetry.close)
            closing.callback(self.telemetry.set_state, NodeState.STOPPED)
            for ring in self.outputs:
                closing.callback(ring.unlink)
                closing.callback(ring.close)
            for receiver in self.receivers:
                closing.callback(receiver.close)
            for journal in self.journals:
                closing.callback(journal.close)
            if len(self.shards) == len(self.outputs):
                closing.callback(self.mirror)
            for gateway in self.gateways.values():
                closing.callback(gateway.stop)
            for shard in self.shards:
                closing.callback(shard.end)
            closing.callback(self._finish)

    def _finish(self) -> None:
        """End the sources and let the shards take what has come in, within the limit."""
        self.telemetry.set_state(NodeState.STOPPING)
        for receiver in self.receivers:
            receiver.ask_stop()
        for receiver in self.receivers:
            receiver.join(_STOP_S)
        limit = time.monotonic() + _STOP_S
        while self.shards and not self.drained() and time.monotonic() < limit and all(s.running for s in self.shards):
            time.sleep(0.002)


# ---------------------------------------------------------------- from configuration


def _tell(progress: Progress, text: str) -> None:
    if progress:
        progress(text)


def _check_whole(folder: Path) -> None:
    """Raise unless a journal has its beginning, which a restart needs."""
    first = JournalReader(folder).first_sequence
    if first > 0:
        advice = "move it away, or set journal.restore = false"
        raise NodeError(f"the journal in {folder} begins at sequence {first}, its older segments were deleted: {advice}")


def signal_names(shard: Shard) -> dict[tuple[int, int], str]:
    """Names of signals, alerts and intents by (calculation, output)."""
    names = {}
    for instance in shard.plan.instances:
        for output, label in enumerate(instance.outputs):
            single = len(instance.outputs) == 1
            names[instance.index, output] = instance.name if single else f"{instance.name}.{label}"
        names.setdefault((instance.index, 0), instance.name)
    return names


def login_of(delivery: Delivery) -> Login:
    """How to log in: secrets come from the environment and from files only."""
    token = os.environ.get(delivery.token_env) if delivery.token_env else None
    login = Login.from_environment()
    if token:
        login = replace(login, token=token)
    if delivery.credentials_file:
        login = replace(login, credentials=Path(delivery.credentials_file).expanduser())
    if delivery.tls_ca_file:
        login = replace(login, ca=Path(delivery.tls_ca_file).expanduser())
    return login


def delivery_options(config: Config, delivery: Delivery, target: str) -> DeliveryOptions:
    """The gateway's options from a `[delivery.NAME]` table."""
    kinds = frozenset(int(Kind[name.upper()]) for name in delivery.per_event if name.upper() in Kind.__members__)
    return DeliveryOptions(
        cluster=config.cluster.name,
        target=target,
        batch_max_events=delivery.batch_max_events,
        batch_max_wait_ms=delivery.batch_max_wait_ms,
        window=min(256, delivery.window),
        stream_max_bytes=delivery.stream_max_mb << 20,
        stream_max_age_s=delivery.stream_max_age_s,
        replicas=delivery.replicas,
        per_event=kinds,
        poll_min_ms=2.0 if config.cluster.idle == "sleep" else 0.2,
    )


def shard_numbers(shard: ShardThread) -> dict[str, int]:
    """Numbers of a shard for :class:`ShardCounter`."""
    arrays = shard.shard.arrays
    core, counts = arrays.core[0], arrays.counts
    statistics = arrays.statistics[: int(core["instruments"])]
    bids, asks = statistics["last_bbo"][:, 0], statistics["last_bbo"][:, 2]
    both = (statistics["bbo_updates"] > 0) & (bids != NO_PRICE) & (asks != NO_PRICE)
    numbers = {
        ShardCounter.EVENTS_IN: core["events"],
        ShardCounter.REFUSED: core["refused"],
        ShardCounter.OUTPUTS: core["out_seq"],
        ShardCounter.BLOCKED: core["blocked"],
        ShardCounter.TRADES: statistics["trades"].sum(),
        ShardCounter.BBO: counts[Kind.BBO],
        ShardCounter.SIGNALS: counts[Kind.SIGNAL],
        ShardCounter.ALERTS: counts[Kind.ALERT],
        ShardCounter.INSTRUMENTS: np.count_nonzero(arrays.info["tick_size"][: int(core["instruments"])]),
        ShardCounter.CONFIG_VERSION: core["config_version"],
        ShardCounter.JOURNAL_RECORDS: shard.journal.next_sequence if shard.journal else 0,
        ShardCounter.JOURNAL_DROPPED: shard.retention.dropped if shard.retention else 0,
        ShardCounter.CROSSED: np.count_nonzero(both & (bids >= asks)),
        ShardCounter.ORDERS: resting_orders(arrays.books),
        ShardCounter.OUTPUT_LAG: shard.output.lag,
    }
    return {counter.name.lower(): int(value) for counter, value in numbers.items()}


def delivery_numbers(status: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of a gateway's shard for :class:`DeliveryCounter`."""
    same = {name: name for name in ("frames", "acks", "reconnects")}
    names = {**same, "retries": "resent", "skipped": "per_event_skipped", "lag": "ring_lag", "events": "events_read"}
    return {counter: int(status[key]) for counter, key in names.items() if key in status}


def run_node(
    config: Config,
    config_path: Path | None = None,
    *,
    progress: Progress = None,
    ready: Callable[[], None] | None = None,
    generators: Mapping[str, BlockSourceMaker] | None = None,
    targets: Mapping[str, str] | None = None,
    each: Callable[[Node], None] | None = None,
) -> int:
    """Run a node until SIGINT or SIGTERM; returns 0.

    Raises:
        NodeError and the typed errors of the node's parts.
    """
    stop = threading.Event()
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        node = Node(config, generators, targets, progress, stop)
        try:
            node.start(stop)
            if ready:
                ready()
            node.watch(stop, each)
        finally:
            node.stop()
    except CompileStopped:
        _tell(progress, "stopped before the loops were compiled")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0
