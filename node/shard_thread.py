"""A shard's thread: the compiled loop between its input rings, journal and output ring, and its hand-over to the next one."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tickmesh.node.book import resting_orders
from tickmesh.node.continuation import UNSEEN, make_ids, make_positions
from tickmesh.node.errors import NodeError
from tickmesh.node.event import ANY_VIEW, DERIVED, EVENT, NO_PRICE, EventArray, Kind
from tickmesh.node.exchange import Exchange
from tickmesh.node.handover import AWAKE, CANCELLED, NEAR, PARKED, PASSED_NS, TAKEN_NS, TURN, Carry, make_baton, no_carry
from tickmesh.node.joining import forced
from tickmesh.node.journal import Journal, JournalArrays
from tickmesh.node.loops import live_loop
from tickmesh.node.release import ReleaseGate
from tickmesh.node.release_marks import make_marks
from tickmesh.node.retention import Retention
from tickmesh.node.shard import BATCH_EVENTS, Shard
from tickmesh.node.shard_state import SOURCES
from tickmesh.node.telemetry import ShardCounter, Telemetry
from tickmesh.node.versions import Documents
from tickmesh.transports.ring import Reader, Ring
from tickmesh.transports.toolbox import make_sleepers, zeros_aligned

Progress = Callable[[str], None] | None
CONTROL_EVENTS = 1024
PEER_EVENTS = 1 << 14
_OWN_INPUTS = 2
_STOP_S = 5.0
_PARK_S = 30.0
_AWAKE_S = 0.1
READER_MS = 1_000_000_000
"""Timeout of readers of a shard's inputs: a shard that waits for NATS is not dead, and lives as long as the writer does."""


class ShardError(NodeError):
    """A shard had to stop; the message says what to do."""


def inputs_room(sources: int) -> int:
    """How many rings a loop of so many sources is compiled for: some to spare, so that a source that is added needs no other code."""
    return max(4, 1 << (sources + _OWN_INPUTS - 1).bit_length())


class Input(NamedTuple):
    """A ring that a shard takes events from.

    Attributes:
        ring: its writer numbers instruments as the node does.
        source: number of the source; -1: the events have the shard's own ids already.
        reader: registered at the ring already, as a standby's; None: one is made, from the next event on.
    """

    ring: Ring
    source: int
    reader: Reader | None = None


@dataclass
class Leg:
    """A part of a shard's way: one loop from one hand-over to the next.

    Attributes:
        shard: its arrays.
        module: the compiled loop.
        inputs: the control ring, the ring of what other shards put out, and the sources' rings.
        readers: of each of them.
        turn: how many hand-overs came before.
        carry: what it copies when it begins.
        histograms: latency and batch sizes.
    """

    shard: Shard
    module: Any
    inputs: list[Input]
    readers: list[Reader]
    turn: int
    carry: Carry
    histograms: tuple[Any, Any]
    thread: threading.Thread | None = None


class ShardThread:
    """A shard, its input rings, journal, output ring and thread.

    Attributes:
        documents: the versions of the configuration beside its journal.
        ids: u32 by the node's id of an instrument, the shard's; `given`: i64[1], how many there are. See :mod:`tickmesh.node.continuation`.
        positions: where the journal stood in each source when a takeover began.
        epoch: of the leadership under which its outputs are delivered.
        peers: the input ring of what other shards put out; `exchange` writes it.
        pause_ns: how long the last hand-over took, from the end of one loop to the next one's first look at its inputs.
    """

    def __init__(
        self,
        number: int,
        shard: Shard,
        inputs: Sequence[Input],
        output: Ring,
        journal: Journal | None,
        telemetry: Telemetry,
        idle: int,
        progress: Progress,
        gate: ReleaseGate | None = None,
        epoch: int = 1,
    ) -> None:
        self.gate, self.epoch = gate, epoch
        self.number, self.output, self.journal = number, output, journal
        self.stop = np.zeros(3, np.int64)
        self.error: BaseException | None = None
        self.retention: Retention | None = None
        self.documents = Documents(journal.folder) if journal else None
        self.pause_ns = 0
        self._cpu: int | None = None
        self._taken_before = 0
        self._parked: Leg | None = None
        self._idle, self._progress = idle, progress
        self._baton = make_baton()
        self.ids, self.given = make_ids(len(shard.arrays.info))
        self.positions = make_positions(SOURCES)
        self._control = Ring.create(None, CONTROL_EVENTS, EVENT, reader_timeout_ms=READER_MS)
        self.peers = Ring.create(None, PEER_EVENTS, EVENT, reader_timeout_ms=READER_MS)
        self.exchange: Exchange | None = None
        self._leg = self._make_leg(shard, inputs, 0, no_carry(shard.arrays.books), telemetry)
        self._taken_before = -sum(reader.position for reader in self._leg.readers)
        self.writer = output.writer

    def _make_leg(
        self, shard: Shard, sources: Sequence[Input], turn: int, carry: Carry, telemetry: Telemetry, before: Leg | None = None
    ) -> Leg:
        inputs = [Input(self._control, -1), Input(self.peers, DERIVED), *sources]
        module = live_loop(shard.module, inputs_room(len(sources)), BATCH_EVENTS, self._progress)
        known = {id(reader.ring): reader for reader in before.readers} if before else {}
        readers = [known.get(id(one.ring)) or one.reader or one.ring.reader(f"shard-{self.number}") for one in inputs]
        numbers = telemetry.shard(self.number)
        leg = Leg(shard, module, inputs, readers, turn, carry, (numbers.receive_to_output, numbers.batch_events))
        leg.thread = threading.Thread(target=self._run, args=(leg,), name=f"shard-{self.number}", daemon=True)
        return leg

    def know_ids(self, ids: Mapping[int, int]) -> None:
        """Before the start: the shard's ids of instruments, by the node's."""
        for node, number in ids.items():
            self.ids[node] = number
        self.given[0] = max(ids.values(), default=-1) + 1

    def id_of(self, instrument: int) -> int | None:
        """The shard's id of an instrument of the node; None if its journal has not met it."""
        number = int(self.ids[instrument])
        return None if number == UNSEEN else number

    # -- seen from outside

    @property
    def shard(self) -> Shard:
        """The arrays it works on, and their plan; another object after a hand-over."""
        return self._leg.shard

    @property
    def readers(self) -> list[Reader]:
        """Of its input rings."""
        return self._leg.readers

    @property
    def thread_id(self) -> int | None:
        """The kernel's id of the thread, for pinning."""
        return self._leg.thread.native_id if self._leg.thread else None

    @property
    def running(self) -> bool:
        """Whether the loop runs."""
        return self.error is None and not self.stop[0] and self._leg.thread is not None and self._leg.thread.ident is not None

    @property
    def drained(self) -> bool:
        """Whether everything in the input rings has been processed."""
        readers = self._leg.readers
        return all(reader.lag == 0 for reader in readers) and int(self.stop[2]) == self._taken_before + sum(r.position for r in readers)

    def idle_rounds(self) -> int:
        """Rounds without input so far."""
        return int(self.stop[1])

    # -- its life

    def start(self) -> None:
        """Start the loop."""
        assert self._leg.thread
        self._leg.thread.start()

    def end(self) -> None:
        """Stop the loop after the batch in hand."""
        self.stop[0] = 1
        if self.exchange is not None:
            self.exchange.ask_stop()
        for leg in (self._leg, self._parked):
            if leg and leg.thread and leg.thread.ident is not None:
                leg.thread.join(_STOP_S)

    def let_go_of_inputs(self) -> None:
        """After :meth:`end`: the sources' rings wait no more for this shard."""
        for leg in (self._leg, self._parked):
            for reader in leg.readers if leg else ():
                reader.close()

    def abandon(self) -> None:
        """In place of a start: let go of its own rings; its readers of the sources' rings are the caller's again."""
        if self.exchange is not None:
            self.exchange.close()
        self._control.close()
        self.peers.close()

    def close(self) -> None:
        """Let go of its rings, after :meth:`end`."""
        self.let_go_of_inputs()
        if self.exchange is not None:
            self.exchange.close()
        self._control.close()
        self.peers.close()

    def _run(self, leg: Leg) -> None:
        try:
            failure = self._call(leg, zeros_aligned(BATCH_EVENTS, EVENT), 0, 0)
            if failure > 0 and self.journal is not None:
                reason = f"its journal in {self.journal.folder} cannot be written ({os.strerror(failure)}): free space and start again"
                raise ShardError(reason)
        except Exception as error:
            self.error = error

    def step_again(self, batch: EventArray, first: int, end: int) -> int:
        """Before the start: step over events ``[first, end)`` of the journal; returns how many, fewer if the output ring is full."""
        return self._call(self._leg, batch, first, end)

    def adopt(self, shard: Shard) -> None:
        """Before the start: go on with another shard, which has taken over from the one so far."""
        if shard.module is not self._leg.shard.module:
            self._leg.module = live_loop(shard.module, self._room(self._leg), BATCH_EVENTS, self._progress)
        self._leg.shard = shard

    @staticmethod
    def _room(leg: Leg) -> int:
        return inputs_room(len(leg.inputs) - _OWN_INPUTS)

    def _call(self, leg: Leg, batch: EventArray, first: int, end: int) -> int:
        """The loop, whose one entry point does both: two would be compiled twice."""
        words = np.zeros(1, np.uint64)
        journal = self.journal.arrays if self.journal else JournalArrays(words, words, np.zeros(1, EVENT), words)
        room = self._room(leg)
        rings = tuple(one.ring.arrays for one in leg.inputs)
        result = leg.module.run(
            np.array([first, end], np.int64),
            self.stop,
            self._baton,
            leg.turn,
            leg.carry,
            rings + rings[:1] * (room - len(rings)),  # a loop looks at as many as there are readers
            np.array([reader.slot for reader in leg.readers], np.int64),
            journal,
            int(self.journal is not None),
            batch,
            batch.view(ANY_VIEW),
            leg.shard.arrays,
            *leg.histograms,
            self._idle,
            self.gate.marks if self.gate else make_marks(0),
            self.ids,
            self.given,
            self.positions,
            np.array([one.source for one in leg.inputs], np.int64),
            make_sleepers(len(leg.readers)),
        )
        return int(result)

    # -- hand-over

    def park(self, shard: Shard, inputs: Sequence[Input], carry: Carry, telemetry: Telemetry) -> Leg:
        """Let the next loop wait for its turn, inside compiled code; compiles it if it has to.

        Raises:
            CompileError: it does not compile.
            ShardError: its thread does not start.
        """
        leg = self._make_leg(shard, inputs, self._leg.turn + 1, carry, telemetry, self._leg)
        assert leg.thread
        self._parked = leg
        leg.thread.start()
        if not _wait(lambda: self._baton[PARKED] >= leg.turn, _PARK_S):
            self.call_off(leg)
            raise ShardError(f"the next loop of shard {self.number} did not start within {_PARK_S:.0f} s: this host is too busy")
        return leg

    def call_off(self, leg: Leg) -> None:
        """End a loop that waits for a turn that does not come."""
        self._baton[CANCELLED] = leg.turn
        if leg.thread and leg.thread.ident is not None:
            leg.thread.join(_STOP_S)
        for reader in leg.readers:
            if not any(reader is kept for kept in self._leg.readers):
                reader.close()
        self._baton[[NEAR, CANCELLED, PARKED, AWAKE]] = leg.turn - 1
        self._parked = None

    def wake(self, leg: Leg) -> None:
        """Shortly before its turn: a waiting loop stops sleeping."""
        self._baton[NEAR] = leg.turn
        _wait(lambda: self._baton[AWAKE] >= leg.turn, _AWAKE_S)

    def send(self, event: EventArray) -> bool:
        """Put an event into the shard's input, by the one thread that changes the configuration; false if there is no room now."""
        return self._control.writer.write(event, timeout_ms=0) == 1

    @property
    def heard(self) -> bool:
        """Whether the loop has come to everything that was sent: it processes that before it looks at another input."""
        return self._leg.readers[0].lag == 0

    @property
    def version(self) -> int:
        """The configuration in force: that of the last CONFIG event that was processed."""
        return int(self._leg.shard.arrays.core["config_version"][0])

    def handed_over(self, leg: Leg) -> bool:
        """Whether the next loop has begun."""
        return bool(self._baton[TURN] >= leg.turn and self._baton[TAKEN_NS] >= self._baton[PASSED_NS])

    def complete(self, leg: Leg) -> None:
        """After :meth:`handed_over`: let go of the loop before."""
        before, self._leg, self._parked = self._leg, leg, None
        self.pause_ns = int(self._baton[TAKEN_NS] - self._baton[PASSED_NS])
        assert before.thread
        before.thread.join(_STOP_S)
        for reader in before.readers:
            if not any(reader is kept for kept in leg.readers):
                self._taken_before += reader.position
                reader.close()
        self.pin(self._cpu)

    def pin(self, cpu: int | None) -> None:
        """Keep the thread, and those of later loops, on one processor; None: any.

        Raises:
            OSError: there is no such processor for us.
        """
        self._cpu = cpu
        if cpu is not None and self.thread_id is not None:
            os.sched_setaffinity(self.thread_id, {cpu})


def _wait(condition: Callable[[], object], limit_s: float) -> bool:
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.0002)
    return True


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
        ShardCounter.FROM_SHARDS: counts[Kind.PEER_BBO] + counts[Kind.PEER_TRADE],
        ShardCounter.NOT_WAITED: forced(arrays),
    }
    return {counter.name.lower(): int(value) for counter, value in numbers.items()}
