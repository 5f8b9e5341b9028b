"""A shard that this node holds a replica of: as a standby, as its leader, and on the way between the two.

A standby follows the leader's journal (:mod:`tickmesh.node.standby`). Beside it, this node's own receivers bring the same feeds; what the
leader's journal has of them is let go, the rest waits in the input rings. A takeover steps over what the journal has, fences the
output streams under the new epoch, and goes on with the rings after the last event that the journal has
(:mod:`tickmesh.node.continuation`).

A takeover is refused where it would lose or change what has been published: if a stream holds more outputs than this node's journal makes.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog

from tickmesh.control.heartbeats import ShardBeat
from tickmesh.control.leadership import TakeoverRefused
from tickmesh.node.beginning import begin_at, begin_shard, journal_folder, make_journal, possible_starts
from tickmesh.node.continuation import begin_following, begin_resuming, trim
from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, NO_SIDE, REFERENCE, EventArray, Kind
from tickmesh.node.gateways import StreamUnknown, signal_names, stream_ends
from tickmesh.node.instruments import PUBLISHED
from tickmesh.node.journal import Journal, JournalError
from tickmesh.node.release import ReleaseGate
from tickmesh.node.release_marks import make_marks, put_mark_now, take_marks
from tickmesh.node.replication import Leading, ReplicationServer, SnapshotFile, release_gate
from tickmesh.node.replication_link import LinkOptions
from tickmesh.node.restore import RestoredShard
from tickmesh.node.shard_thread import Input, ShardThread
from tickmesh.node.snapshot import SnapshotError, read_facts, snapshots
from tickmesh.node.snapshotter import snapshot_folder, start_from
from tickmesh.node.standby import Built, Standby, StandbyError
from tickmesh.node.versions import Documents
from tickmesh.transports.counters import HISTOGRAM_WORDS
from tickmesh.transports.ring import Reader, Ring, show_alive
from tickmesh.transports.toolbox import IDLE_MODES, zeros_aligned

if TYPE_CHECKING:
    from tickmesh.node.process import Node

_FENCE_S = 10.0
"""How long a takeover waits for the output streams."""
_HAND_OVER_S = 3.0
_TAKE_OVER_S = 5.0
_LOOK_S = 0.0005
_TRIM_EVENTS = 1 << 14
_BEHIND_MAX = 20_000
"""A standby whose loop is further behind its journal does not offer to lead."""
_EVERYTHING = 1 << 62
_log = structlog.get_logger("replica")


@dataclass
class _Buffer:
    """Events of one source that wait in this node's ring for a takeover.

    Attributes:
        begun: the first sequence that is surely in it; 0: whatever the receiver has begun with.
        lost: the last sequence of those that had no room.
    """

    ring: Ring
    reader: Reader
    source: int
    begun: int = 0
    lost: int = 0


class Replica:
    """One shard on this node. Its methods are called one after the other, from any thread, except :meth:`beat`, :meth:`trim`, `status`.

    Attributes:
        number: of the shard.
        epoch: of the leadership that it leads or follows.
        thread: the leader's loop, while it leads.
    """

    def __init__(self, node: Node, number: int, server: ReplicationServer, links: LinkOptions) -> None:
        self.node, self.number, self._server, self._links = node, number, server, links
        self.folder = journal_folder(node.config, number)
        self.epoch = 0
        self.thread: ShardThread | None = None
        self.error = ""
        self._leader_known = False
        self._events_ahead = 0
        self._journal: Journal | None = None
        self._buffers: dict[str, _Buffer] = {}
        self._trimming = threading.Lock()
        self._standby = self._new_standby()

    # -- as a standby

    def _new_standby(self) -> Standby:
        config = self.node.config
        with self._trimming:
            self._refresh_buffers()
        standby = Standby(
            self.number,
            self.folder,
            self._links,
            self._build,
            self.node.telemetry,
            idle=IDLE_MODES[config.cluster.idle],
            ring_capacity=config.cluster.ring_capacity,
            sync=config.journal.sync,
            progress=self.node.progress,
        )
        return standby.start()

    def _build(self, snapshot: Path | None) -> Built:
        """A shard where its journal begins, or at the latest snapshot of which everything has been delivered."""
        config, ring, delivered = self.node.config, self.node.make_output(self.number), self._delivered()
        if snapshot is not None:
            start, shard = begin_at(config, [start_from(self.folder, snapshot)], None, ring, self.node.progress)
        else:
            possible = possible_starts(self.node.document, self.folder)
            start, shard = begin_at(config, possible, delivered, ring, self.node.progress)
        begin_following(start.known.positions, np.zeros(len(start.known.positions), np.uint64))
        return Built(shard, ring, start.sequence, start.known, delivered or 0)

    def _delivered(self) -> int | None:
        try:
            return stream_ends(self.node.config, self.node.targets, min)[self.number]
        except StreamUnknown as error:
            _log.warning("snapshots are not used: it cannot be seen what was delivered", shard=self.number, reason=str(error))
            return None

    def follow(self, address: str | None, epoch: int) -> None:
        """Follow the leader at ``HOST:PORT``; None: there is none now."""
        self.epoch, self._leader_known = epoch, epoch > 0
        self._standby.follow(address, epoch)

    def _refresh_buffers(self) -> None:
        """One for each source that there is now."""
        inputs, numbers = self.node.inputs, self.node.document.sources
        for name in set(self._buffers) - set(inputs):
            self._buffers.pop(name).reader.close()
        for name, rings in inputs.items():
            ring, known = rings[self.number], self._buffers.get(name)
            if known is None or known.ring is not ring:
                if known is not None:
                    known.reader.close()
                reader = ring.reader(f"standby-{self.number}")
                self._buffers[name] = _Buffer(ring, reader, numbers[name], self.node.expected_sequence(name))

    def trim(self) -> int:
        """Let go of waiting events that the leader's journal has; and of the oldest where the ring is nearly full. Returns how many."""
        gone = 0
        with self._trimming:
            if self.thread is not None:
                return 0
            self._refresh_buffers()
            built = self._standby.built
            for buffer in self._buffers.values():
                if built is not None:
                    at = built.known.positions[buffer.source : buffer.source + 1]
                    gone += int(trim(at, buffer.ring.arrays, buffer.reader.slot, _TRIM_EVENTS))
                if buffer.reader.lag > buffer.ring.capacity * 3 // 4:
                    gone += self._give_up(buffer)
                show_alive(buffer.reader)
        return gone

    def _give_up(self, buffer: _Buffer) -> int:
        """There is no leader whose journal takes these, or it is far behind: a takeover will say that they are missing."""
        events = buffer.reader.read(buffer.ring.capacity // 4).view(EVENT)
        if len(events):
            buffer.lost = max(buffer.lost, int(events["seq"].max()))
        return len(events)

    # -- what others are told

    @property
    def leading(self) -> bool:
        """Whether its loop runs here."""
        return self.thread is not None

    def beat(self) -> ShardBeat:
        """What the node's heartbeat says of it."""
        thread, journal = self.thread, self._journal
        if thread is not None and journal is not None:
            return ShardBeat("leader", self.epoch, journal.next_sequence, thread.error is None)
        standby = self._standby
        journal = standby.follower.journal
        if journal is None:
            return ShardBeat("standby", self.epoch, 0, not self._leader_known)
        ready = standby.built is not None and standby.error is None and journal.next_sequence - standby.taken <= _BEHIND_MAX
        return ShardBeat("standby", self.epoch, journal.next_sequence, ready)

    def status(self) -> dict[str, Any]:
        """As plain data, for the node's status."""
        thread, journal = self.thread, self._journal
        if thread is not None and journal is not None:
            gate = thread.gate.status() if thread.gate else {}
            return {"role": "leader", "epoch": self.epoch, "sequence": journal.next_sequence, "release": gate}
        return {"role": "standby", **self._standby.status(), "error": self.error or self._standby.follower.error}

    # -- taking over

    def lead(self, epoch: int, *, alone: bool) -> None:
        """Take over under `epoch`; while leading already: fence anew under it.

        Args:
            alone: no standby is expected to follow soon.

        Raises:
            TakeoverRefused: it cannot; it is a standby as before.
        """
        with self.node.changing.role():
            if self.thread is not None:
                self._lead_again(self.thread, epoch)
                return
            begun_s = time.monotonic()
            try:
                journal, built = self._take_over()
            except (StandbyError, JournalError) as error:
                self.error = str(error)
                raise TakeoverRefused(self.number, str(error)) from error
            try:
                self._begin_leading(journal, built, epoch, alone)
            except BaseException as error:
                self._back_to_standby(journal, built.output)
                self.error = str(error)
                if isinstance(error, TakeoverRefused) or not isinstance(error, Exception):
                    raise
                raise TakeoverRefused(self.number, str(error)) from error
            self.error = ""
            facts = {"sequence": journal.next_sequence, "outputs": int(built.shard.arrays.core["out_seq"][0])}
            _log.info("leads", shard=self.number, epoch=epoch, took_ms=round((time.monotonic() - begun_s) * 1000, 1), **facts)

    def _take_over(self) -> tuple[Journal, Built]:
        """Journal and shard, which stand at the journal's end."""
        if self._standby.follower.journal is not None:
            return self._standby.take_over(_TAKE_OVER_S)
        if self._leader_known:
            raise StandbyError(f"standby of shard {self.number}: it has not got the journal yet")
        self._standby.stop()
        document = self.node.document
        journal = make_journal(self.node.config, self.folder, self.number, document.version)
        Documents(journal.folder).write(document)
        ring = self.node.make_output(self.number)
        return journal, Built(begin_shard(self.node.config, document, ring, self.node.progress), ring)

    def _begin_leading(self, journal: Journal, built: Built, epoch: int, alone: bool) -> None:
        node, outputs = self.node, int(built.shard.arrays.core["out_seq"][0])
        gate = release_gate(node.config, journal, alone=alone)
        gate.mark(journal.next_sequence, outputs)
        with self._trimming:
            self._refresh_buffers()
            thread = self._make_thread(journal, built, gate, epoch)
            self.epoch, self.thread, self._journal = epoch, thread, journal
        self._events_ahead = int(built.shard.arrays.core["events"][0]) - journal.next_sequence
        node.know({thread.version: signal_names(built.shard.plan)})
        node.add_shard(thread, journal)
        self._fence(outputs)
        # not before: standbys cut their journals to one that is served, and this one might lack what has been published
        self._server.lead(self.number, Leading(journal, epoch, gate, lambda: self._stored(), lambda: self._snapshot(journal)))
        thread.start()
        node.pin_shard(thread)

    def _lead_again(self, thread: ShardThread, epoch: int) -> None:
        assert self._journal is not None
        self.epoch = thread.epoch = epoch
        self._server.lead(self.number, Leading(self._journal, epoch, thread.gate, self._stored, lambda: self._snapshot(self._journal)))
        for gateway in self.node.gateways.values():
            self.node.deliver_shard(gateway, thread)
        self._fence(_EVERYTHING)

    def _fence(self, outputs: int) -> None:
        """Wait until the output streams are ours.

        Raises:
            TakeoverRefused: one is not, or holds more outputs than the journal makes.
        """
        end = time.monotonic() + _FENCE_S
        for name, gateway in self.node.gateways.items():
            delivery = gateway.shards[self.number]
            if not delivery.judged.wait(max(0.0, end - time.monotonic())):
                raise TakeoverRefused(self.number, f"delivery.{name}: the output stream did not answer within {_FENCE_S:g} s")
            if delivery.state != "delivering" or delivery.publisher is None:
                raise TakeoverRefused(self.number, f"delivery.{name}: {delivery.error or delivery.state}")
            held = delivery.publisher.last_out_seq
            if held > outputs:
                reason = f"the stream holds outputs up to {held}, our journal makes {outputs}: the node that has the rest must lead"
                raise TakeoverRefused(self.number, f"delivery.{name}: {reason}")

    def _make_thread(self, journal: Journal, built: Built, gate: ReleaseGate, epoch: int) -> ShardThread:
        """The loop that goes on with this node's rings where the journal ends."""
        node, known = self.node, built.known
        inputs = [Input(b.ring, b.source, b.reader) for b in (self._buffers[name] for name in node.inputs)]
        idle = IDLE_MODES[node.config.cluster.idle]
        thread = ShardThread(self.number, built.shard, inputs, built.output, journal, node.telemetry, idle, node.progress, gate, epoch)
        ids, _ = known.intern(node.table, self.number, skip_filtered=True)
        thread.know_ids(ids)
        unannounced = self._introduce(thread)
        thread.positions[:] = known.positions
        begin_resuming(thread.positions)
        for event in [*unannounced, *self._gaps(known)]:
            thread.send(event)
        self._buffers = {}  # the readers are the thread's
        return thread

    def _introduce(self, thread: ShardThread) -> list[EventArray]:
        """Definitions of instruments that our receivers have met, and the journal has not."""
        table, events = self.node.table, []
        for node_id in range(len(table)):
            record = table.arrays.records[node_id]
            if record["shard"] != self.number or not record["flags"] & PUBLISHED or not record["announced"]:
                continue
            if thread.id_of(node_id) is None:
                number = int(thread.given[0])
                thread.ids[node_id], thread.given[0] = number, number + 1
                events += _definition(table, node_id, number)
        return events

    def _gaps(self, known: RestoredShard) -> list[EventArray]:
        """What is missing between the journal's end and the first that our receivers have."""
        found = []
        for name, receiver in self.node.receivers_by_name().items():
            source = receiver.context.number
            buffer, last = self._buffers[name], int(known.positions["sequence"][source])
            begun = buffer.begun or receiver.begun_at
            if begun == 0 and last:
                receiver.go_on_from(last + 1)  # it has heard nothing yet: it will see the gap itself
            missing_to = max(buffer.lost, begun - 1 if last else 0)
            if last < missing_to:
                event = zeros_aligned(1, EVENT)
                event["ts_recv"], event["kind"], event["side"] = time.time_ns(), Kind.GAP, NO_SIDE
                event["instrument"], event["price"] = ALL_INSTRUMENTS, source
                event["seq"], event["id"], event["aux"] = last + 1, last + 1, missing_to
                found.append(event)
        return found

    def _stored(self) -> int:
        """The last output that every stream holds."""
        deliveries = [gateway.shards.get(self.number) for gateway in self.node.gateways.values()]
        found = [d.publisher.last_out_seq if d is not None and d.publisher is not None else 0 for d in deliveries]
        thread = self.thread
        return min(found, default=thread.output.published if thread else 0)

    def _snapshot(self, journal: Journal | None) -> SnapshotFile | None:
        """The newest one, for a standby that needs events which are not kept."""
        for path in reversed(snapshots(snapshot_folder(self.folder))):
            try:
                facts = read_facts(path)
            except SnapshotError:
                continue
            if journal is not None and facts.journal_id == journal.header.journal_id:
                return SnapshotFile(path, facts.sequence)
        return None

    # -- giving it up

    def stop_leading(self, reason: str) -> None:
        """Stop at once, and be a standby again, whose journal's tail the next leader may cut."""
        thread, journal = self.thread, self._journal
        if thread is None or journal is None:
            return
        thread.end()
        _log.info("leads no more", shard=self.number, epoch=self.epoch, reason=reason)
        with self.node.changing.role():
            self._back_to_standby(journal, thread.output)

    def _back_to_standby(self, journal: Journal, output: Ring) -> None:
        thread, self.thread, self._journal = self.thread, None, None
        self._server.resign(self.number)
        if thread is not None:
            self.node.remove_shard(thread)
        journal.close()
        output.close()
        output.unlink()
        self._leader_known = True  # whoever leads has the journal that counts
        self._standby = self._new_standby()

    def hand_over(self, to: str) -> bool:
        """Take no more input, until the standby `to` has everything and the streams hold every output. False: it goes on leading."""
        thread, journal = self.thread, self._journal
        if thread is None or journal is None or not self._follows(to, journal.next_sequence - _BEHIND_MAX):
            return False
        with self.node.changing.role():
            thread.end()
            end = time.monotonic() + _HAND_OVER_S
            while time.monotonic() < end:
                if self._follows(to, journal.next_sequence) and self._stored() >= int(thread.shard.arrays.core["out_seq"][0]):
                    return True
                time.sleep(_LOOK_S)
            self._go_on(thread, journal)
            return False

    def _follows(self, node: str, sequence: int) -> bool:
        """Whether a standby has the events below `sequence`."""
        return any(s["node"] == node and s["shard"] == self.number and s["sequence"] >= sequence for s in self._server.status())

    def _go_on(self, thread: ShardThread, journal: Journal) -> None:
        """Lead on after a hand-over that did not work out."""
        if int(thread.shard.arrays.core["events"][0]) - journal.next_sequence != self._events_ahead:
            raise StandbyError(f"shard {self.number} was stopped in the middle of a batch")
        thread.start_again(self.node.telemetry)
        self.node.pin_shard(thread)

    def close(self) -> None:
        """End it; a leader hands over before that."""
        self.stop_leading("the node stops")
        self._standby.stop()
        with self._trimming:
            for buffer in self._buffers.values():
                buffer.reader.close()
            self._buffers = {}


def warm_takeover(node: Node) -> None:
    """Load the compiled parts that a takeover calls from Python: later that would count."""
    known = RestoredShard()
    known.take(zeros_aligned(1, EVENT))
    with Ring.create(None, 256, EVENT) as ring:
        reader = ring.reader("warm")
        trim(known.positions[:1], ring.arrays, reader.slot, 1)
        reader.read(0)
        ring.writer.write(zeros_aligned(1, EVENT))
    node.table.find("-")
    node.table.lets_through("-")
    marks = make_marks()
    put_mark_now(marks, np.uint64(0), np.uint64(1))
    take_marks(marks, np.uint64(0), np.zeros(HISTOGRAM_WORDS, np.int64))


def _definition(table: Any, node_id: int, number: int) -> list[EventArray]:
    """REFERENCE, and CODE if the venue has one, of an instrument under its shard's id."""
    record = table.arrays.records[node_id]
    events = zeros_aligned(2, EVENT)
    events["ts_recv"], events["instrument"], events["flags"] = time.time_ns(), number, record["source"]
    events["kind"], events["side"] = (Kind.REFERENCE, Kind.CODE), (np.uint8(np.int8(record["qty_exponent"])), NO_SIDE)
    named = events[:1].view(REFERENCE)
    named["tick_size"], named["symbol"] = record["tick_size"], record["symbol"]
    events["id"][1] = record["code"]
    return [events[:1], events[1:]] if record["code"] else [events[:1]]
