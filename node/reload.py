"""A running node takes another configuration: checked as a whole, prepared beside what runs, in force at one event of each shard.

What is prepared: the code (compiled in a helper process), the next loops, waiting for their turn inside compiled code, the receivers of
new and changed sources with their sockets open, the gateways of new and changed deliveries, holding the output rings. Until then
everything can be called off. Then, in this order: receivers of sources that change or go end, and the shards take what those have
brought; the documents are written; each shard gets its CONFIG event; books of what is no longer taken are emptied; new receivers
begin; old gateways deliver what they have and end, new ones begin.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import structlog

from tickmesh.control.changes import restart_needed
from tickmesh.control.config import Config, Problem
from tickmesh.control.turns import undisturbed, waiting
from tickmesh.node.beginning import goes_on
from tickmesh.node.book import numbering_of
from tickmesh.node.calculation import PlanError, compile_problems
from tickmesh.node.continuation import MADE_HERE
from tickmesh.node.delivery import Gateway
from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, NO_SIDE, EventArray, Kind
from tickmesh.node.fields import check_source
from tickmesh.node.fix_mapping import check_fix_source
from tickmesh.node.gateways import delivering, latency_of, nats_deliveries, signal_names
from tickmesh.node.journal import JournalReader
from tickmesh.node.journal_replay import config_event
from tickmesh.node.logs import set_log_level
from tickmesh.node.loops import live_loop
from tickmesh.node.pipeline import outputs_of, place_symbols, risk_limits
from tickmesh.node.rdma_delivery import RdmaPublisher, open_publisher, rdma_deliveries
from tickmesh.node.receivers import Receiver
from tickmesh.node.shard import BATCH_EVENTS, ShardPlan, generate
from tickmesh.node.shard_state import CHANGES_KEPT
from tickmesh.node.shard_thread import Input, Leg, ShardThread, inputs_room
from tickmesh.node.store_link import source_numbers
from tickmesh.node.succession import common_numbering, numbering_after, same_loop, set_parameters, succeed
from tickmesh.node.versions import Document, DocumentError, Documents
from tickmesh.transports.codecache import CompileError, CompileStopped, ReadyHelper, import_generated, watched_compiles, write_generated
from tickmesh.transports.ring import Ring
from tickmesh.transports.toolbox import zeros_aligned

if TYPE_CHECKING:
    from tickmesh.node.process import Node

_LOOK_S = 0.0002
_CATCH_UP_S = 1.0
_WRITERS = 8
_REASON_LINES = 3
_log = structlog.get_logger("node")


class ChangeRefused(Exception):
    """A running node does not take a configuration, and nothing has changed.

    Attributes:
        version: of the configuration; None for a trial.
        reasons: every one.
        passing: the only reason is that another change is under way.
    """

    def __init__(self, version: int | None, reasons: list[Problem], *, passing: bool = False) -> None:
        self.version, self.reasons, self.passing = version, reasons, passing
        what = "the configuration" if version is None else f"configuration {version}"
        super().__init__(f"{what} is refused:\n" + "\n".join(str(reason) for reason in reasons))


class ChangeUnderWay(Exception):
    """A change is accepted and not in force yet; it takes effect by itself.

    Attributes:
        version: of the configuration.
    """

    def __init__(self, version: int) -> None:
        super().__init__(
            f"configuration {version} is accepted and takes effect when the shards get on: look at their output rings and deliveries"
        )
        self.version = version


class Reload:
    """Changes the configuration of one node; the face is :meth:`Node.apply` and :meth:`Node.try_out`."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._lock = threading.Lock()
        self._steps: Iterator[None] | None = None
        self._version = 0
        self._held = ExitStack()
        self._change: _Change | None = None
        self._closed = threading.Event()
        self._helper: ReadyHelper | None = None
        self._numbered: dict[str, int] = {}
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="documents")

    @property
    def under_way(self) -> int | None:
        """Version of a change that is accepted and not in force yet."""
        return self._version if self._steps is not None else None

    def keep_helper_ready(self) -> None:
        """See :meth:`Node.expect_changes`."""
        with self._lock:
            if self._helper is None and self._node.plan is not None and not self._closed.is_set():
                self._helper = ReadyHelper(write_generated("shard_parts", generate(self._node.plan)))

    def _compiles(self) -> AbstractContextManager[None]:
        return watched_compiles(self._closed.is_set, self._helper)

    def try_out(self, config: Config) -> None:
        """See :meth:`Node.try_out`."""
        with self._lock, self._compiles():
            self._checked(config, None)

    def apply(self, config: Config, version: int, wait_s: float) -> None:
        """See :meth:`Node.apply`."""
        with self._lock, self._compiles():
            if not self._finish(wait_s):
                reason = f"configuration {self._version} is accepted and not in force yet: the shards wait"
                hint = "look at their output rings and deliveries, and apply it again then"
                raise ChangeRefused(version, [Problem("", None, None, reason, hint)], passing=True)
            writing = _Writing(self._writers)
            try:
                document, plan = self._checked(config, version, lambda made: writing.begin(made, self._node.shards))
            except BaseException:
                with self._node.changing.configuration():  # no shard comes or goes meanwhile
                    writing.call_off(self._node.shards)
                raise
            self._carry_out(document, plan, None, wait_s, writing)

    def _carry_out(
        self, document: Document, plan: ShardPlan, threads: Sequence[ShardThread] | None, wait_s: float, writing: _Writing
    ) -> None:
        """Change shards (None: all), with no role changing before it is in force, also if that takes longer than `wait_s`."""
        with ExitStack() as held:
            held.enter_context(self._node.changing.configuration())
            change = _Change(self._node, document, plan, self._node.shards if threads is None else threads, writing)
            with undisturbed():
                change.prepare()
            self._change, self._steps, self._version, self._held = change, change.carry_out(), document.version, held.pop_all()
        if not self._finish(wait_s):
            raise ChangeUnderWay(document.version)

    def catch_up(self) -> None:
        """Bring shards that were taken over under an older configuration to that of the node."""
        node = self._node
        if not any(thread.version < node.document.version for thread in node.shards) or not self._lock.acquire(blocking=False):
            return
        try:
            with self._compiles():
                behind = [thread for thread in node.shards if thread.version < node.document.version and thread.running]
                if behind and self._steps is None and node.plan is not None:
                    self._carry_out(node.document, node.plan, behind, _CATCH_UP_S, _Writing(self._writers))
        except (ChangeRefused, ChangeUnderWay) as error:
            _log.warning("a shard stays under an older configuration for now", reason=str(error))
        finally:
            self._lock.release()

    def go_on(self) -> None:
        """Finish a change that is under way, as far as it goes now."""
        if self._steps is not None and self._lock.acquire(blocking=False):
            try:
                self._finish(0)
            finally:
                self._lock.release()

    def close(self) -> None:
        """The node ends: nothing more is changed."""
        self._closed.set()
        with self._lock:
            if self._steps is not None and self._change is not None:
                self._change.abandon()
            self._end()
            if self._helper is not None:
                self._helper.close()
        self._writers.shutdown()

    def _end(self) -> None:
        self._steps = None
        self._held.close()

    def _finish(self, limit_s: float) -> bool:
        """Drive the change under way; false if it has not ended within the limit."""
        end = time.monotonic() + limit_s
        while self._steps is not None:
            try:
                next(self._steps)
            except StopIteration:
                self._end()
                break
            except BaseException:
                self._end()
                raise
            if time.monotonic() >= end or self._closed.is_set():
                return False
            time.sleep(_LOOK_S)
        return True

    # -- checks

    def _checked(
        self, config: Config, version: int | None, made: Callable[[Document], None] | None = None
    ) -> tuple[Document, ShardPlan]:
        """Everything that can be known beforehand; `made` is told of the document once nothing but the code is left to be checked."""
        node = self._node
        reasons = restart_needed(node.config, config)
        if version is not None and version <= node.version:
            reasons.append(Problem("", None, version, f"version {version} is not after {node.version}, which runs", "versions only rise"))
        if not config.data_sources:
            reasons.append(Problem("data_sources", None, None, "is empty", "add a [data_sources.NAME] table"))
        reasons += _source_problems(config)
        if goes_on(config) and not goes_on(node.config) and any(JournalReader(one.folder).first_sequence > 0 for one in node.journals):
            reason, hint = "a restart would go on from the journal, which has lost its beginning", "start the node anew with this source"
            reasons.append(Problem("data_sources", None, None, reason, hint))
        behind = max((gateway.changes_behind for gateway in node.gateways.values()), default=0)
        if behind > CHANGES_KEPT - 2:
            reasons.append(Problem("", None, None, f"outputs of {behind} changes are not delivered yet", "look at the deliveries"))
        document = plan = None
        try:
            known = node.document
            with undisturbed():
                document = Document.of(config, node.version if version is None else version, self._numbers(config), known.order_ids)
                risk_limits(config)
                if made and not reasons:
                    made(document)
                plan = document.plan()
            if not reasons:
                self._compile(plan, len(config.data_sources))
        except DocumentError as error:
            reasons.append(Problem("processing", None, None, str(error)))
        except PlanError as error:
            reasons += [Problem(p.path, config.line(*p.path.split(".")), None, p.reason, p.hint) for p in error.problems]
        except ValueError as error:
            reasons.append(Problem("risk", config.line("risk"), None, str(error)))
        except CompileError as error:
            reasons += _explained(config, plan, error)
        if reasons or document is None or plan is None:
            raise ChangeRefused(version, reasons)
        return document, plan

    def _numbers(self, config: Config) -> dict[str, int]:
        """Of all sources so far and of a configuration's; where shards are shared, those of the store, which is asked once for each."""
        known = self._node.document.sources
        if self._node.shared and not set(config.data_sources) <= set(self._numbered):
            self._numbered |= source_numbers(config, known)
        return {**known, **self._numbered}

    def _compile(self, plan: ShardPlan, sources: int) -> None:
        """Have the plan's loop compiled, in a helper process, unless it is the one that runs.

        Raises:
            PlanError: a calculation of the user does not compile; tried first and by itself, since the whole loop takes long.
            CompileError: the loop does not compile.
        """
        node, running = self._node, self._node.plan
        assert running is not None
        if same_loop(running, plan) and inputs_room(sources) == inputs_room(len(node.inputs)):
            return
        module = import_generated(write_generated("shard_parts", generate(plan)))
        room = inputs_room(sources)
        if module is not import_generated(write_generated("shard_parts", generate(running))) or room != inputs_room(len(node.inputs)):
            live_loop(module, room, BATCH_EVENTS, node.progress, lambda: _try_new_ones(running, plan))


def _try_new_ones(running: ShardPlan, plan: ShardPlan) -> None:
    """Raises PlanError: a calculation of the plan that does not run yet does not compile."""
    known = {(i.module, i.function) for i in running.instances}
    problems = compile_problems(i for i in plan.instances if (i.module, i.function) not in known)
    if problems:
        raise PlanError(problems)


def _source_problems(config: Config) -> list[Problem]:
    """What is wrong with the field mappings and dictionaries of the sources."""
    found = []
    for name, options in config.data_sources.items():
        for refusal in [*check_source(name, options), *check_fix_source(name, options, config.folder)]:
            path = f"data_sources.{name}.{refusal.key}"
            found.append(Problem(path, config.line(*path.split(".")), None, refusal.reason, refusal.hint))
    return found


def _explained(config: Config, plan: ShardPlan | None, error: CompileError) -> list[Problem]:
    """The reasons for which a plan does not compile, short."""
    found = compile_problems(plan.instances) if plan else []
    if found:
        return [Problem(p.path, config.line(*p.path.split(".")), None, p.reason, p.hint) for p in found]
    lines = [line.strip() for line in error.output.splitlines() if line.strip()]
    return [Problem("processing", config.line("processing"), None, "does not compile: " + " ".join(lines[-_REASON_LINES:]))]


# ---------------------------------------------------------------- one change


class _Writing:
    """A change's documents on their way to the disk, beside every journal at once, while the rest of it is checked and prepared.

    Args:
        pool: whose threads wait for the disk.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._begun: list[tuple[Documents, Document, Future[None]]] = []

    def begin(self, document: Document, threads: Iterable[ShardThread]) -> None:
        """Write a document beside the journals of these shards, with the versions that it gets there."""
        for thread in threads:
            if thread.documents is not None:
                mine = replace(document, version=version_for(thread, document))
                self._begun.append((thread.documents, mine, self._pool.submit(thread.documents.write, mine)))

    def finish(self, document: Document, threads: Iterable[ShardThread]) -> None:
        """Wait until that is done: for these shards and this document, whatever was begun.

        Raises:
            DocumentError: the disk does not take one.
        """
        with waiting():
            wait(future for _, _, future in self._begun)  # before another text may go to the same place
            self.begin(document, [thread for thread in threads if not self._has(thread, document)])
            wait(future for _, _, future in self._begun)
        for _, _, future in self._begun:
            future.result()

    def _has(self, thread: ShardThread, document: Document) -> bool:
        mine = replace(document, version=version_for(thread, document))
        return any(documents is thread.documents and begun == mine for documents, begun, _ in self._begun)

    def call_off(self, threads: Iterable[ShardThread]) -> None:
        """Remove what was written; not where a shard is run no more, whose new leader may have sent a document of that number."""
        wait(future for _, _, future in self._begun)
        ours = [thread.documents for thread in threads]
        for documents, mine, _ in self._begun:
            if any(documents is one for one in ours):
                documents.remove(mine.version)


def version_for(thread: ShardThread, document: Document) -> int:
    """The number that a configuration gets in a shard's journal, where numbers only rise."""
    return max(document.version, thread.version + 1)


@dataclass
class _Sources:
    """What happens to sources: new receivers by name, their rings, and who ends."""

    made: dict[str, Receiver] = field(default_factory=dict)
    rings: dict[str, list[Ring]] = field(default_factory=dict)
    ending: list[Receiver] = field(default_factory=list)
    filters: list[tuple[int, tuple[str, ...], tuple[str, ...]]] = field(default_factory=list)


class _Change:
    """One change on its way."""

    def __init__(
        self, node: Node, document: Document, plan: ShardPlan, threads: Sequence[ShardThread], writing: _Writing
    ) -> None:
        self.node, self.document, self.plan, self.threads, self.writing = node, document, plan, list(threads), writing
        self.versions = {thread.number: version_for(thread, document) for thread in self.threads}
        self.config, self.old = document.config, node.config
        self.limits = risk_limits(self.config)
        self.sources = _Sources()
        self.gateways: dict[str, Gateway] = {}
        self.publishers: dict[str, RdmaPublisher] = {}
        self.legs: dict[int, Leg] = {}
        self.relabelled = False

    # -- what can be called off

    def prepare(self) -> None:
        """Open and compile what the new configuration needs, beside what runs.

        Raises:
            ChangeRefused: something cannot be opened; everything is as it was.
        """
        where = ""
        try:
            for name in self.config.data_sources:
                where = f"data_sources.{name}"
                self._prepare_source(name)
            self._choose_numbering()
            where = "delivery"
            self._prepare_gateways()
            where = "processing"
            self._prepare_legs()
            where = "journal"
            self.writing.finish(self.document, self.threads)
        except CompileStopped:
            self.call_off()
            raise
        except Exception as error:  # whatever a source, a server or the compiler says is the reason
            self.call_off()
            reason = Problem(where, self.config.line(*where.split(".")), None, str(error) or type(error).__name__)
            raise ChangeRefused(self.document.version, [reason]) from error
        kept = set(self.config.data_sources) - set(self.sources.made)
        self.sources.ending = [receiver for receiver in self.node.receivers if receiver.name not in kept]

    def _prepare_source(self, name: str) -> None:
        old = self.old.data_sources.get(name)
        new = self.config.data_sources[name]
        if old is not None and old.model_dump() == new.model_dump() and self._same_adapter(new.use):
            return
        rings = self.node.inputs.get(name) or self.node.make_inputs()
        number = self.document.sources[name]
        if old is None:
            place_symbols(self.node.table, self.config, number, self.config.data_sources[name])
        with self.node.table.filters_held_back() as filters:
            receiver = self.node.make_receiver(self.config, name, rings, number)
        self.sources.filters += filters or [(number, (), ())]
        self.sources.made[name], self.sources.rings[name] = receiver, rings

    def _same_adapter(self, use: str | None) -> bool:
        """Whether a custom source's own file, if it has one, is as it was."""
        file = (use or "").rpartition(":")[0]
        return self.node.document.code.get(file) == self.document.code.get(file)

    def _choose_numbering(self) -> None:
        """Orders of several sources are numbered per instrument, since two may use the same numbers."""
        now = {receiver.name: receiver for receiver in self.node.receivers} | self.sources.made
        if self.node.shared:
            return  # per instrument from the beginning
        needed = common_numbering([now[name].order_ids for name in self.config.data_sources])
        self.document = replace(self.document, order_ids=numbering_after(self.document.order_ids, needed))

    def _prepare_gateways(self) -> None:
        names = signal_names(self.plan)
        self.node.know(dict.fromkeys({self.document.version, *self.versions.values()}, names))
        old, new = nats_deliveries(self.old), nats_deliveries(self.config)
        for name, delivery in new.items():
            if name not in old or old[name].model_dump() != delivery.model_dump():
                self.gateways[name] = self.node.make_gateway(self.config, name)
        ours, theirs = rdma_deliveries(self.old), rdma_deliveries(self.config)
        for name, delivery in theirs.items():
            if name not in ours or ours[name].model_dump() != delivery.model_dump():
                self.publishers[name] = open_publisher(self.config, name)

    def _prepare_legs(self) -> None:
        node = self.node
        relabelled = set(self.old.data_sources) != set(self.config.data_sources) or set(delivering(self.old)) != set(
            delivering(self.config)
        )
        if relabelled:
            self._relabel(self.config)
            self.relabelled = True
        inputs = {**node.inputs, **self.sources.rings}
        for thread in self.threads:
            renumbered = self.document.order_ids not in ("", numbering_of(thread.shard.arrays.books))
            if not relabelled and not renumbered and same_loop(thread.shard.plan, self.plan):
                continue
            shard, carry = succeed(thread.shard, self.plan, self.limits, self.document.order_ids)
            mine = [Input(inputs[name][thread.number], self.document.sources[name]) for name in self.config.data_sources]
            self.legs[thread.number] = thread.park(shard, mine, carry, node.telemetry)

    def _relabel(self, config: Config) -> None:
        """Counters of the sources and deliveries of a configuration, in place of what there are."""
        node = self.node
        with node.swap:
            node.telemetry.relabel(list(config.data_sources), config.cluster.shards, delivering(config))
            for name, gateway in node.gateways.items():
                if name in config.delivery:
                    self._count_latencies(name, gateway)

    def _count_latencies(self, name: str, gateway: Gateway) -> None:
        gateway.take_latencies({shard: latency_of(self.node.telemetry, name, shard) for shard in gateway.shards})

    def call_off(self) -> None:
        """Let go of everything that was prepared."""
        if self.relabelled:
            self._relabel(self.old)
        self.writing.call_off(self.node.shards)
        for thread in self.threads:
            if thread.number in self.legs:
                thread.call_off(self.legs[thread.number])
        for receiver in self.sources.made.values():
            receiver.close()
        for gateway in self.gateways.values():
            gateway.release()
        for publisher in self.publishers.values():
            publisher.stop()

    def abandon(self) -> None:
        """The node ends before the change is in force: let go of what it has not taken over."""
        for receiver in self.sources.made.values():
            if receiver not in self.node.receivers:
                receiver.close()
        for name, gateway in self.gateways.items():
            if self.node.gateways.get(name) is not gateway:
                gateway.release()
        for name, publisher in self.publishers.items():
            if self.node.publishers.get(name) is not publisher:
                publisher.stop()

    # -- what happens

    def carry_out(self) -> Iterator[None]:
        """Do it; yields where it has to wait for the shards."""
        node = self.node
        yield from self._end_receivers()
        quick = [thread for thread in self.threads if thread.number not in self.legs]
        for thread in quick:
            yield from self._tell(thread)
        for thread in quick:
            yield from self._heeded(thread)
        for thread in self.threads:
            if thread.number in self.legs:
                yield from self._hand_over(thread, self.legs[thread.number])
        for thread in self.threads:
            node.exchange(thread, self.plan, self.config)
        yield from self._begin_receivers()
        self._begin_gateways()
        with node.swap:
            node.config, node.document, node.plan = self.config, self.document, self.plan
        self._settle()

    def _end_receivers(self) -> Iterator[None]:
        """End the sources that change or go, with nothing lost between them and the shards."""
        rings = [(name, rings[thread.number]) for name, rings in self.node.inputs.items() for thread in self.threads]
        names = {receiver.name for receiver in self.sources.ending}
        mine = [ring for name, ring in rings if name in names]
        while any(ring.lag > ring.capacity // 2 for ring in mine) and any(self._runs(thread) for thread in self.threads):
            yield  # what has no room is lost when its receiver ends
        for receiver in self.sources.ending:
            receiver.ask_stop()
        while not all(receiver.join(0) for receiver in self.sources.ending):
            yield
        while any(ring.lag for ring in mine) and any(self._runs(thread) for thread in self.threads):
            yield

    def _runs(self, thread: ShardThread) -> bool:
        """Whether the shard is still run here: leadership may have gone."""
        self.node.check()
        return not thread.stop[0]

    def _tell(self, thread: ShardThread) -> Iterator[None]:
        """The CONFIG event of a shard whose loop stays."""
        version = self.versions[thread.number]
        if thread.journal is not None:
            thread.journal.config_version = version
        slot = 1 - int(thread.shard.arrays.core["parameters"][0])
        set_parameters(thread.shard, self.plan, self.limits, slot)
        yield from self._send(thread, config_event(version, slot, False, time.time_ns()))

    def _heeded(self, thread: ShardThread) -> Iterator[None]:
        while thread.version != self.versions[thread.number]:
            if not self._runs(thread):
                return
            yield
        thread.shard.plan = self.plan

    def _hand_over(self, thread: ShardThread, leg: Leg) -> Iterator[None]:
        """The CONFIG event of a shard that gets its next loop."""
        version = self.versions[thread.number]
        if thread.journal is not None:
            thread.journal.config_version = version
        thread.wake(leg)
        slot = int(thread.shard.arrays.core["parameters"][0])
        yield from self._send(thread, config_event(version, slot, True, time.time_ns()))
        while not thread.handed_over(leg):
            if not self._runs(thread):
                return
            yield
        with self.node.swap:
            thread.complete(leg)

    # -- sources

    def _begin_receivers(self) -> Iterator[None]:
        node = self.node
        before = {receiver.name: receiver for receiver in self.sources.ending}
        for receiver in self.sources.ending:
            if receiver.name not in self.config.data_sources:
                yield from self._empty_source(receiver.context.number)
            receiver.close()
        for source, include, exclude in self.sources.filters:
            node.table.let_through(source, include, exclude)
            yield from self._empty_books(node.table.refilter(source))
        for name, receiver in self.sources.made.items():
            number, old = receiver.context.number, before.get(name)
            if old is not None and not receiver.take_over(old):
                yield from self._empty_source(number)  # a recording begins anew
        while not all(thread.heard or not self._runs(thread) for thread in self.threads):
            yield
        kept = [receiver for receiver in node.receivers if receiver not in self.sources.ending]
        by_name = {receiver.name: receiver for receiver in [*kept, *self.sources.made.values()]}
        with node.swap:
            node.receivers = [by_name[name] for name in self.config.data_sources]
            node.inputs = {name: self.sources.rings.get(name) or node.inputs[name] for name in self.config.data_sources}
        for name, receiver in self.sources.made.items():
            receiver.start()
            if name in before:
                receiver.pin_if_allowed(before[name].cpu)

    def _send(self, thread: ShardThread, event: EventArray) -> Iterator[None]:
        while not thread.send(event) and self._runs(thread):
            yield

    def _empty_source(self, number: int) -> Iterator[None]:
        """Empty the books of a whole source, of which a journal has nothing of what comes next."""
        event = _clear()
        event["instrument"], event["price"] = ALL_INSTRUMENTS, number
        for thread in self.threads:
            thread.positions["resuming"][number] = 0
            yield from self._send(thread, event)

    def _empty_books(self, instruments: list[int]) -> Iterator[None]:
        places = self.node.table.arrays.records["shard"]
        threads = {thread.number: thread for thread in self.threads}
        for instrument in instruments:
            thread, event = threads.get(int(places[instrument])), _clear()
            number = thread.id_of(instrument) if thread else None
            if thread is not None and number is not None:
                event["instrument"] = number
                yield from self._send(thread, event)

    # -- deliveries

    def _begin_gateways(self) -> None:
        node = self.node
        wanted = nats_deliveries(self.config)
        ending = [gateway for name, gateway in node.gateways.items() if name not in wanted or name in self.gateways]
        stops = [threading.Thread(target=gateway.stop, name="gateway-stop", daemon=True) for gateway in ending]
        for stop in stops:
            stop.start()
        while any(stop.is_alive() for stop in stops):
            for gateway in self.gateways.values():
                gateway.show_alive()  # it holds the rings meanwhile
            stops[0].join(0.1)
            stops = [stop for stop in stops if stop.is_alive()]
        with node.swap:
            kept = {name: gateway for name, gateway in node.gateways.items() if name in wanted}
            node.gateways = {**kept, **self.gateways}
            for name, gateway in self.gateways.items():
                self._count_latencies(name, gateway)
        for gateway in self.gateways.values():
            gateway.start()
        self._begin_publishers()

    def _begin_publishers(self) -> None:
        node, wanted = self.node, rdma_deliveries(self.config)
        for name, publisher in node.publishers.items():
            if name not in wanted or name in self.publishers:
                publisher.stop(drain_s=0)  # whoever comes back asks for what it has not got
        kept = {name: publisher for name, publisher in node.publishers.items() if name in wanted}
        node.publishers = {**kept, **self.publishers}
        renewed = kept.values() if outputs_of(self.old) != outputs_of(self.config) else ()  # subscribers ask once what they get
        for thread in node.shards:
            node.publish_shard(thread, [*self.publishers.values(), *renewed])
        for publisher in self.publishers.values():
            publisher.start()

    def _settle(self) -> None:
        set_log_level(self.config.logging.level)
        settings = self.config.journal
        if self.node.roles is not None:
            self.node.roles.set_replicas(self.config.cluster.replicas)
        for thread in self.node.shards:
            if thread.retention is not None:
                thread.retention.set_limits(settings.keep_mb << 20, settings.keep_hours * 3600.0)


def _clear() -> EventArray:
    event = zeros_aligned(1, EVENT)
    event["ts_recv"], event["kind"], event["side"], event["aux"] = time.time_ns(), Kind.CLEAR, NO_SIDE, MADE_HERE
    return event
