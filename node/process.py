"""The node process: sources, shards, journals and delivery of one configuration, started, watched and stopped together.

Threads: one per source, one per shard (both compiled, both pinned where `cluster.cpus` says so), the gateway's, the journals' helpers, and
the main thread, which only mirrors counters and waits for a signal.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import structlog

from tickmesh.control.config import Config
from tickmesh.node.beginning import (
    begin_at,
    begin_shard,
    choose_document,
    goes_on,
    open_journals,
    possible_starts,
    replay,
    shared_document,
)
from tickmesh.node.changing import Changing
from tickmesh.node.delivery import Changes, Gateway
from tickmesh.node.errors import NodeError
from tickmesh.node.event import EVENT, EventArray
from tickmesh.node.exchange import Exchange, Streams
from tickmesh.node.frames import CalculationNames
from tickmesh.node.gateways import (
    StreamUnknown,
    delivering,
    delivery_numbers,
    latency_of,
    login_of,
    make_gateway,
    nats_deliveries,
    signal_names,
    stream_ends,
)
from tickmesh.node.journal import Journal, JournalError
from tickmesh.node.known_instruments import KnownInstruments
from tickmesh.node.logs import set_log_level
from tickmesh.node.loops import live_loop
from tickmesh.node.peers import Wanted
from tickmesh.node.pipeline import make_table
from tickmesh.node.rdma_delivery import Published, RdmaPublisher, open_publisher, rdma_deliveries
from tickmesh.node.receivers import BlockSourceMaker, Receiver, ReceiverContext, make_receiver
from tickmesh.node.release import ReleaseGate
from tickmesh.node.reload import Reload
from tickmesh.node.restore import RestoredShard, read_restored
from tickmesh.node.retention import Retention
from tickmesh.node.roles import Roles
from tickmesh.node.shard import BATCH_EVENTS, Shard, ShardPlan, generate
from tickmesh.node.shard_state import CHANGES_KEPT
from tickmesh.node.shard_thread import READER_MS, Input, ShardThread, inputs_room, shard_numbers
from tickmesh.node.snapshotter import Snapshotter, Start, keep_snapshots
from tickmesh.node.succession import common_numbering, numbering_after
from tickmesh.node.telemetry import NodeState, Telemetry
from tickmesh.node.versions import Documents
from tickmesh.transports.codecache import import_generated, load_compiled, watched_compiles, write_generated
from tickmesh.transports.nats import Login
from tickmesh.transports.ring import Ring, ring_path
from tickmesh.transports.toolbox import IDLE_MODES

Progress = Callable[[str], None] | None
_LOOK_S = 0.1
_MIRROR_S = 0.5
_TRIM_S = 1.0
_STOP_S = 5.0
_EVERYTHING = 1 << 62
_log = structlog.get_logger("node")


class Node:
    """A node of one configuration. :meth:`start`, then :meth:`watch` until something ends it, then :meth:`stop`.

    Args:
        config: the configuration.
        generators: makers of in-process sources by source type, e.g. ``{"simulator": …}``.
        targets: address of the NATS server by delivery name, in place of the configured one (an embedded server's).
        progress: told when something has to be compiled.
        stop: ends a compile early.
        version: of the configuration; None: 0, or what the journals that it goes on from say.

    Attributes:
        config: the configuration; another one after :meth:`apply`.
        document: the same with its version, its code, and the numbers of the sources.
        shards: those that this node runs as their leader: all, or with `[leadership]` those that it leads.
        swap: held while what is read by :meth:`mirror` is exchanged.
        changing: held while a change of the configuration, or of a shard's role, is carried out.

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
        version: int | None = None,
    ) -> None:
        if not config.data_sources:
            raise NodeError("the configuration has no data source: add a [data_sources.NAME] table")
        self.config, self.progress = config, progress
        self.targets, self.generators = dict(targets or {}), dict(generators or {})
        cluster = config.cluster
        deliveries = delivering(config)
        self.telemetry = Telemetry.create(cluster.name, cluster.node, list(config.data_sources), cluster.shards, deliveries)
        self.names: dict[int, CalculationNames] = {}
        self.receivers: list[Receiver] = []
        self.inputs: dict[str, list[Ring]] = {}
        self.shards: list[ShardThread] = []
        self.outputs: list[Ring] = []
        self.gateways: dict[str, Gateway] = {}
        self.publishers: dict[str, RdmaPublisher] = {}
        self._run = secrets.randbits(63)
        self.journals: list[Journal] = []
        self.swap, self.changing = threading.RLock(), Changing()
        self.roles: Roles | None = None
        self.plan: ShardPlan | None = None
        self._reload = Reload(self)
        self._ids: list[dict[int, int]] = []
        self._known: list[RestoredShard] = []
        self._gone_on: list[int] = []
        """Sources that begin again before the end of some journal."""
        self._replays = False
        self._snapshotter: Snapshotter | None = None
        self._stopped = False
        try:
            self.document = shared_document(config, version) if self.shared else choose_document(config, version)
            self.plan = self.document.plan()
            with watched_compiles(lambda: self._compiles(stop)):
                self._build()
        except BaseException:
            self.stop()
            raise

    @property
    def shared(self) -> bool:
        """Whether the nodes of a store share the shards."""
        return self.config.leadership.enabled

    def _compiles(self, stop: threading.Event | None) -> bool:
        """Tell the world that a compile is under way; returns whether it is to end."""
        self.telemetry.set_state(NodeState.COMPILING)
        return stop is not None and stop.is_set()

    # ---- building

    def _build(self) -> None:
        config, cluster = self.config, self.config.cluster
        idle = IDLE_MODES[cluster.idle]
        set_log_level(config.logging.level)
        if cluster.shards > 1:
            load_compiled("tickmesh.node.peers", "exchange between shards", self.progress)
        self.publishers = {name: open_publisher(config, name, self.progress) for name in rdma_deliveries(config)}
        self.table = make_table(config, self.document.sources)
        with self.table.filters_held_back() as self._filters:
            for name in config.data_sources:
                self.inputs[name] = self.make_inputs()
                self.receivers.append(self.make_receiver(config, name, self.inputs[name]))
        needed = common_numbering([receiver.order_ids for receiver in self.receivers])
        self.document = replace(self.document, order_ids=numbering_after(self.document.order_ids, needed))
        self.telemetry.set_state(NodeState.STARTING)
        if self.shared:
            self._build_shared()
            return
        self.outputs = [self.make_output(number) for number in range(cluster.shards)]
        self._replays = goes_on(config)
        begun = self._begin_shards()
        if self._replays:  # before the filters: what was let through once is known
            self._remember_instruments([start for start, _ in begun])
        for rules in self._filters:
            self.table.let_through(*rules)
        for number, ((_, shard), output) in enumerate(zip(begun, self.outputs)):
            journal = self.journals[number] if self.journals else None
            mine = [Input(rings[number], self.document.sources[name]) for name, rings in self.inputs.items()]
            thread = ShardThread(number, shard, mine, output, journal, self.telemetry, idle, self.progress)
            if self._ids:
                thread.know_ids(self._ids[number])
            for source in self._gone_on:
                thread.positions[source] = self._known[number].resuming(source)[0]
            fresh = journal is None or journal.next_sequence == 0
            begins = {other: begun[other][0].document.outputs for other in range(cluster.shards)} if fresh else {}
            self.make_exchange(thread, self._known[number] if self._known else RestoredShard(), begins)
            self.shards.append(thread)
            if journal and thread.documents:
                thread.retention = self._retention(journal)
        self._starts = [start for start, _ in begun]
        if self._replays:
            sizes = cluster.instruments_max, cluster.orders_max
            self._snapshotter = Snapshotter([journal.folder for journal in self.journals], config.journal.snapshot_interval_s, sizes)
        self.telemetry.set_state(NodeState.STARTING)
        self.names = {start.document.version: signal_names(shard.plan) for start, shard in begun}
        for name in nats_deliveries(config):
            self.gateways[name] = self.make_gateway(config, name, "newest")

    def _build_shared(self) -> None:
        """Nothing is led yet: roles bring the shards."""
        for rules in self._filters:
            self.table.let_through(*rules)
        self.known = KnownInstruments(self.config.cluster.data_path / "journal" / self.config.cluster.node)
        if self.config.replication.link == "rdma":
            load_compiled("tickmesh.transports.rdma", "RDMA channel", self.progress)
        self.roles = Roles(self)
        codes = self.known.learn(self.table, self.known.read() + self.roles.ask_instruments())
        for receiver in self.receivers:
            self.table.refilter(receiver.context.number)
            receiver.resume(codes.get(receiver.context.number, {}), 0)
        assert self.plan is not None
        parts = import_generated(write_generated("shard_parts", generate(self.plan)))
        live_loop(parts, inputs_room(len(self.inputs)), BATCH_EVENTS, self.progress)
        self.names = {self.document.version: signal_names(self.plan)}
        sizes = self.config.cluster.instruments_max, self.config.cluster.orders_max
        self._snapshotter = Snapshotter([], self.config.journal.snapshot_interval_s, sizes)
        for name in nats_deliveries(self.config):
            self.gateways[name] = self.make_gateway(self.config, name)

    def make_inputs(self) -> list[Ring]:
        """Input rings of a source, one per shard."""
        cluster = self.config.cluster
        return [Ring.create(None, cluster.ring_capacity, EVENT, reader_timeout_ms=READER_MS) for _ in range(cluster.shards)]

    def make_receiver(self, config: Config, name: str, rings: list[Ring], number: int | None = None) -> Receiver:
        """The receiver of a configured source, opened and not started; `number`: if it is not one of the document's yet."""
        chosen = self.document.sources[name] if number is None else number
        idle, timer_ns = IDLE_MODES[config.cluster.idle], config.processing.timer_interval_ms * 1_000_000
        context = ReceiverContext(self.table, rings, chosen, idle, self.progress, timer_ns)
        return make_receiver(name, config, context, self.generators)

    def make_gateway(self, config: Config, name: str, start: Literal["oldest", "newest"] = "oldest") -> Gateway:
        """The gateway of a configured delivery, which holds the output rings from now on, and is not started."""
        gateway = make_gateway(config, name, self.targets.get(name), self.names)
        gateway.fenced = self._fenced
        for thread in self.shards:
            self.deliver_shard(gateway, thread.number, thread.shard, thread.output, thread.epoch, thread.gate, start=start, name=name)
        return gateway

    def deliver_shard(
        self,
        gateway: Gateway,
        number: int,
        shard: Shard,
        output: Ring,
        epoch: int,
        gate: ReleaseGate | None,
        *,
        start: Literal["oldest", "newest"] = "oldest",
        after: int = 0,
        name: str | None = None,
    ) -> None:
        """Have a gateway deliver a shard's outputs, those after output `after`, under the epoch of its leadership."""
        name = name or next(name for name, known in self.gateways.items() if known is gateway)
        gateway.take(
            number,
            output,
            epoch=epoch,
            latency=latency_of(self.telemetry, name, number) if self.telemetry.has(f"delivery.{name}.0") else None,
            changes=Changes(shard.arrays.changes),
            gate=gate,
            references=shard.references(),
            start=start,
            after=after,
        )

    def publish_shard(self, thread: ShardThread, publishers: Iterable[RdmaPublisher] | None = None) -> None:
        """Have the deliveries over RDMA, or those given, serve a shard's outputs; subscribers they have of it connect anew."""
        session = thread.journal.header.journal_id if thread.journal is not None else self._run
        for publisher in self.publishers.values() if publishers is None else publishers:
            kinds, references = thread.shard.plan.outputs, partial(_references, thread)
            publisher.publish(thread.number, Published(thread.output, thread.epoch, session, references, kinds, thread.gate))

    def withdraw_shard(self, number: int) -> None:
        """Have no delivery over RDMA serve a shard any more: its output ring is about to go."""
        for publisher in self.publishers.values():
            publisher.withdraw(number)

    def _fenced(self, shard: int) -> None:
        """A later epoch has an output stream."""
        if self.roles is not None:
            self.roles.fenced(shard)

    def know(self, names: Mapping[int, CalculationNames]) -> None:
        """Tell the deliveries how the calculations of a version are called, before a shard turns to it."""
        self.names = dict(sorted({**self.names, **names}.items())[-CHANGES_KEPT:])
        for gateway in self.gateways.values():
            for version, calculations in names.items():
                gateway.know(version, calculations)

    def exchange(self, thread: ShardThread, plan: ShardPlan, config: Config) -> None:
        """Have a shard take of others what its calculations under a plan need."""
        if thread.exchange is not None:
            name, delivery = next(iter(nats_deliveries(config).items()), ("", None))
            target = self.targets.get(name, delivery.target) if delivery else None
            login = login_of(delivery) if delivery else Login.from_environment()
            thread.exchange.take(Wanted.of(plan, config, thread.number), Streams(config.cluster.name, target, login))

    def make_exchange(self, thread: ShardThread, known: RestoredShard, begins: Mapping[int, int]) -> None:
        """Give a shard its exchange with others; `begins`: after which outputs of each it begins, where its journal does not say."""
        thread.exchange = Exchange(thread.number, thread.peers, self.table, known, begins)

    def make_output(self, number: int) -> Ring:
        """The output ring of a shard."""
        cluster = self.config.cluster
        shm = next((delivery for delivery in self.config.delivery.values() if delivery.method == "shm"), None)
        base = (shm.ring if shm else None) or f"{cluster.name}-{cluster.node}-out"
        mode: Any = "lossless" if cluster.output_overflow == "block" else "lossy"
        capacity = shm.ring_capacity if shm else cluster.ring_capacity
        name = f"{base}-{number}"
        ring_path(name).unlink(missing_ok=True)  # left by a node that was killed: the counters' lock says that none runs
        return Ring.create(name, capacity, EVENT, mode=mode)

    # ---- shards that come and go

    def add_shard(self, thread: ShardThread, journal: Journal) -> None:
        """Run a shard, as its leader; its loop and its deliveries are started by the caller."""
        thread.retention = self._retention(journal, whole=True)
        with self.swap:
            self.shards = [*self.shards, thread]

    def remove_shard(self, thread: ShardThread) -> None:
        """Run a shard no more; its loop has ended."""
        thread.end()
        with self.swap:
            self.shards = [other for other in self.shards if other is not thread]
        thread.close()

    def pin_shard(self, thread: ShardThread) -> None:
        """Keep its loop on the processor that is configured for it."""
        place = len(self.receivers) + thread.number
        if place < len(self.config.cluster.cpus):
            with contextlib.suppress(OSError):
                thread.pin(self.config.cluster.cpus[place])

    def receivers_by_name(self) -> dict[str, Receiver]:
        """The receivers, by source."""
        return {receiver.name: receiver for receiver in self.receivers}

    # ---- the journal

    def _begin_shards(self) -> list[tuple[Start, Shard]]:
        """Open the journals, and make each shard as it is where it begins: at its journal's beginning, at a snapshot, or afresh."""
        config = self.config
        ends = [] if self._replays else stream_ends(config, self.targets)
        if config.journal.enabled:
            open_journals(config, self.document, self.journals)
        if self._replays:
            possible = [possible_starts(self.document, journal.folder) for journal in self.journals]
            delivered = self._delivered() if any(len(starts) > 1 for starts in possible) else None
            limits: Sequence[int | None] = delivered or [None] * len(possible)
            chosen = zip(possible, limits, self.outputs)
            return [begin_at(config, starts, last, output, self.progress) for starts, last, output in chosen]
        begun = []
        for number, (last, output) in enumerate(zip(ends, self.outputs)):
            document = replace(self.document, outputs=last)
            if self.journals:
                Documents(self.journals[number].folder).write(document)
            begun.append((Start(document, 0, RestoredShard()), begin_shard(config, document, output, self.progress)))
        return begun

    def _delivered(self) -> list[int] | None:
        """By shard, the last output that every stream holds; None: a server is not there."""
        if not nats_deliveries(self.config):
            return [_EVERYTHING] * self.config.cluster.shards
        try:
            return stream_ends(self.config, self.targets, min)
        except StreamUnknown as error:
            _log.warning("snapshots are not used: it cannot be seen what was delivered", reason=str(error))
            return None

    def _retention(self, journal: Journal, *, whole: bool | None = None) -> Retention:
        settings = self.config.journal
        needed = self._replays if whole is None else whole
        return Retention(journal, keep_bytes=settings.keep_mb << 20, keep_s=settings.keep_hours * 3600.0, needed_whole=needed)

    def _remember_instruments(self, starts: Sequence[Start]) -> None:
        """Make the instruments of the journals known again, and tell the receivers how far their sources had come."""
        begun = [(start.sequence, start.known) for start in starts]
        restored = read_restored([journal.folder for journal in self.journals], begun)
        self._known = restored.shards
        self._ids, codes = restored.intern(self.table)
        for rules in self._filters:
            self.table.let_through(*rules)
            self.table.refilter(rules[0])
        for receiver in self.receivers:
            number = receiver.context.number
            receiver.resume(codes.get(number, {}), restored.sequences.get(number, 0))
            place = restored.place(number)
            if place is not None and receiver.go_on_at(place):
                self._gone_on.append(number)

    # ---- running

    def start(self, stop: threading.Event | None = None) -> None:
        """Start everything, consumers first, and replay the journals before anything new comes in.

        Args:
            stop: ends a replay early; nothing is started then.
        """
        stop = stop or threading.Event()
        for gateway in self.gateways.values():
            gateway.start()
        for thread, begun in zip(self.shards, self._starts) if self._replays else ():
            replay(thread, begun, self.document, self.know, stop, self.progress)
        if stop.is_set():
            return
        for shard in self.shards:
            self.exchange(shard, shard.shard.plan, self.config)
            shard.start()
            self.publish_shard(shard)
        for publisher in self.publishers.values():
            publisher.start()
        for receiver in self.receivers:
            receiver.start()
        self._pin()
        if self.roles is not None:
            self.roles.start()
        self.telemetry.set_state(NodeState.RUNNING)

    def _pin(self) -> None:
        threads: list[Receiver | ShardThread] = [*self.receivers, *self.shards]
        for thread, cpu in zip(threads, self.config.cluster.cpus):
            try:
                thread.pin(cpu)
            except OSError as error:
                _log.warning("cannot pin a thread", cpu=cpu, reason=str(error))

    def watch(self, stop: threading.Event, each: Callable[[Node], None] | None = None) -> None:
        """Mirror counters and trim journals until `stop` is set.

        Raises:
            NodeError: a source or a shard has failed.
        """
        mirror_due = trim_due = time.monotonic()
        while not stop.wait(_LOOK_S):
            self.check()
            if time.monotonic() >= mirror_due:
                self.mirror()
                mirror_due = time.monotonic() + _MIRROR_S
            if time.monotonic() >= trim_due:
                self.trim_journals()
                trim_due = time.monotonic() + _TRIM_S
            self._reload.go_on()
            if self.roles is not None:
                self._reload.catch_up()
            if each:
                each(self)

    # ---- other configurations

    @property
    def version(self) -> int:
        """Version of the configuration that was applied last, and no less than any that a shard runs."""
        return max([self.document.version, *(thread.version for thread in self.shards)] if self.shared else [self.document.version])

    def apply(self, config: Config, version: int, wait_s: float = 30.0) -> None:
        """Go on under another configuration: it takes effect at one event of each shard, which goes into the journal.

        What runs now runs on meanwhile, also while new code is compiled. From any thread, one change at a time.

        Args:
            config: the other one.
            version: of it, above :attr:`version`.
            wait_s: how long to wait for the shards to take it.

        Raises:
            ChangeRefused: nothing has changed; with every reason.
            ChangeUnderWay: it is accepted, and takes effect when the shards get on: outputs wait for NATS, say.
        """
        self._reload.apply(config, version, wait_s)

    def expect_changes(self) -> None:
        """Keep a compiler ready beside the node, until it stops: other code is then there some seconds sooner. It takes some 150 MiB."""
        self._reload.keep_helper_ready()

    @property
    def change_under_way(self) -> int | None:
        """Version of a change that is accepted and not in force yet."""
        return self._reload.under_way

    def try_out(self, config: Config) -> None:
        """Check a configuration, and compile what it needs, without applying it.

        Raises:
            ChangeRefused: with every reason.
        """
        self._reload.try_out(config)

    @property
    def finished(self) -> bool:
        """Whether every source has come to its end and everything it brought has been processed."""
        if not all(receiver.finished for receiver in self.receivers) or not self.drained():
            return False
        made = {shard.number: int(shard.shard.arrays.core["out_seq"][0]) for shard in self.shards}
        caught_up = all(shard.exchange is None or shard.exchange.caught_up(lambda other: made.get(other, 0)) for shard in self.shards)
        return caught_up and self.drained()

    def drained(self) -> bool:
        """Whether the shards have taken everything from their input rings."""
        return all(shard.drained for shard in self.shards)

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
        self._see_to_snapshots()
        for thread in self.shards:
            if thread.retention is not None:
                core = thread.shard.arrays.core[0]
                thread.retention.mark(int(core["events"]), int(core["out_seq"]))
                if thread.retention.trim(self.delivered(thread.number)) and thread.documents is not None:
                    thread.documents.prune()
        if self.roles is not None:
            self.roles.trim_journals(self.config.journal.keep_mb << 20, self.config.journal.keep_hours * 3600.0)

    def delivered(self, shard: int) -> int | None:
        """The last output of a shard that every stream holds; None: there is no stream."""
        found = [gateway.shards[shard] for gateway in self.gateways.values() if shard in gateway.shards]
        return min((one.publisher.last_out_seq if one.publisher else 0 for one in found), default=None)

    def _see_to_snapshots(self) -> None:
        """Have snapshots taken when they are due, and tell the journals what need not be kept any more."""
        if self._snapshotter is None:
            return
        taken = self._snapshotter.taken
        if self.roles is not None:
            self._snapshotter.set_journals(self.roles.journals())
        self._snapshotter.set_interval(self.config.journal.snapshot_interval_s)
        self._snapshotter.tick()
        if self._snapshotter.taken != taken:
            for thread in self.shards:
                if thread.retention is not None and thread.journal is not None:
                    delivered = self.delivered(thread.number)
                    try:
                        thread.retention.covered = keep_snapshots(thread.journal.folder, delivered, thread.shard.arrays)
                    except JournalError as error:
                        _log.warning("the journal cannot be read beside its writer", reason=str(error))

    def mirror(self) -> None:
        """Write the numbers that no loop writes itself into the counters, and look after the rings."""
        for shard in self.shards:
            shard.output.release_dead_readers()
        if self.shared:
            self.known.keep(self.table)
        with self.swap:
            known = self.telemetry  # while the configuration changes, not everything that runs has counters
            for receiver in self.receivers:
                if known.has(f"source.{receiver.name}"):
                    known.update(f"source.{receiver.name}", receiver.counters())
            for shard in self.shards:
                self.telemetry.update(f"shard.{shard.number}", shard_numbers(shard))
            for name, gateway in self.gateways.items():
                for status in gateway.status() if known.has(f"delivery.{name}.0") else []:
                    self.telemetry.update(f"delivery.{name}.{status['shard']}", delivery_numbers(status))
            for name, publisher in self.publishers.items():
                for number, numbers in publisher.numbers().items() if known.has(f"delivery.{name}.0") else ():
                    self.telemetry.update(f"delivery.{name}.{number}", numbers)
            self.telemetry.beat()

    def stop(self) -> None:
        """Stop sources, let the shards finish what has come in, deliver it, close everything. Can be called at any stage, and again.

        Raises:
            The first error of closing; everything else has been closed nevertheless.
        """
        if self._stopped:
            return
        self._stopped = True
        self._reload.close()
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
            if len(self.shards) == len(self.outputs) and not self.shared:
                closing.callback(self.mirror)
            for gateway in self.gateways.values():
                closing.callback(gateway.stop)
            for publisher in self.publishers.values():
                closing.callback(publisher.stop)
            for shard in self.shards:
                closing.callback(shard.end)
            if self._snapshotter is not None:
                closing.callback(self._snapshotter.close)
            closing.callback(self._finish)
            if self.roles is not None:  # while the receivers run: what is handed over goes on from them
                closing.callback(self.known.keep, self.table)
                closing.callback(self.roles.stop)

    def _finish(self) -> None:
        """End the sources and let the shards take what has come in, within the limit."""
        self.telemetry.set_state(NodeState.STOPPING)
        for receiver in self.receivers:
            receiver.ask_stop()
        exchanges = [shard.exchange for shard in self.shards if shard.exchange is not None]
        for exchange in exchanges:
            exchange.ask_stop()
        for receiver in self.receivers:
            receiver.join(_STOP_S)
        for exchange in exchanges:
            exchange.close()
        limit = time.monotonic() + _STOP_S
        while self.shards and not self.drained() and time.monotonic() < limit and all(s.running for s in self.shards):
            time.sleep(0.002)


# ---------------------------------------------------------------- from configuration


def _references(thread: ShardThread) -> EventArray:
    """Of the shard that runs now: a change of the configuration may have put another in its place."""
    return thread.shard.references()


def _tell(progress: Progress, text: str) -> None:
    if progress:
        progress(text)
