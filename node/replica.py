"""A shard that this node holds a replica of: as a standby, as its leader, and on the way between the two.

A standby follows the leader's journal (:mod:`tickmesh.node.standby`). Beside it, this node's own receivers bring the same feeds; what the
leader's journal has of them is let go, the rest waits in the input rings. A takeover steps over what the journal has, fences the
output streams under the new epoch, and goes on with the rings after the last event that the journal has
(:mod:`tickmesh.node.continuation`).

A takeover is refused where it would lose or change what has been published: if a stream holds more outputs than this node's journal makes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog

from tickmesh.control.heartbeats import Role, ShardBeat
from tickmesh.control.leadership import TakeoverRefused
from tickmesh.control.turns import undisturbed, waiting
from tickmesh.node.beginning import begin_at, begin_shard, journal_folder, make_journal, possible_starts
from tickmesh.node.changing import ChangeInTheWay
from tickmesh.node.continuation import UNSEEN, begin_resuming, trim
from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, NO_SIDE, REFERENCE, EventArray, Flag, Kind
from tickmesh.node.follower import read_agreed, write_agreed
from tickmesh.node.frames import outputs_digest
from tickmesh.node.gateways import StreamUnknown, signal_names, stream_ends
from tickmesh.node.instruments import PUBLISHED
from tickmesh.node.journal import Journal, JournalError, JournalReader
from tickmesh.node.release import ReleaseGate
from tickmesh.node.release_marks import make_marks, put_mark_now, take_marks
from tickmesh.node.replication import Leading, ReplicationServer, SnapshotFile, release_gate
from tickmesh.node.replication_link import LinkOptions
from tickmesh.node.restore import RestoredShard, not_by_name
from tickmesh.node.retention import Retention
from tickmesh.node.shard import BATCH_EVENTS
from tickmesh.node.shard_thread import Input, ShardThread
from tickmesh.node.snapshot import SnapshotError, read_facts, snapshots
from tickmesh.node.snapshotter import keep_snapshots, snapshot_folder, start_from
from tickmesh.node.standby import Built, Standby, StandbyError
from tickmesh.node.versions import Documents
from tickmesh.transports.counters import HISTOGRAM_WORDS
from tickmesh.transports.nats import OutputPublisher
from tickmesh.transports.ring import Reader, ReaderReleased, Ring, show_alive
from tickmesh.transports.toolbox import IDLE_MODES, zeros_aligned

if TYPE_CHECKING:
    from tickmesh.node.process import Node
    from tickmesh.node.receivers import Receiver

_FENCE_S = 10.0
"""How long a takeover waits for the output streams."""
_HAND_OVER_S = 3.0
_TAKE_OVER_S = 5.0
_TOLD_S = 0.5
"""A replica without a journal that has not been told of a leader for so long may be the first to lead."""
_ROLE_S = 1.0
"""How long a takeover waits for a change of the configuration."""
_LOOK_S = 0.0005
_TRIM_EVENTS = 1 << 14
_BEHIND_MAX = 20_000
"""A standby whose loop is further behind its journal does not offer to lead."""
_NEAR = 2_000
"""A successor that is further behind, in events, is not handed over to."""
_PAST = 4
"""Of a ring's capacity that part is taken of the past, at most."""
_log = structlog.get_logger("replica")


@dataclass
class _Buffer:
    """Events of one source that wait in this node's ring for a takeover.

    Attributes:
        begun: the first sequence that is surely in it; 0: whatever the receiver has begun with.
        begun_ns: the source's time then.
        session: the venue's session then; 0: not known.
        lost: the last sequence of those that had no room.
    """

    ring: Ring
    reader: Reader
    source: int
    begun: int = 0
    begun_ns: int = 0
    session: int = 0
    lost: int = 0

    def same_session(self, at: Any) -> bool:
        """Whether its beginning and a place in a journal (POSITION) are of one session of the venue, as far as is known."""
        return self.session == 0 or int(at["session"]) in (0, self.session)


class Replica:
    """One shard on this node. What changes its role is done one after the other, from whatever thread it is asked.

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
        self._leader_known = self._closed = self._handed_over = False
        self._turn = threading.RLock()
        self._retention: Retention | None = None
        self._documents = Documents(self.folder)
        self._snapshots: list[Path] = []
        self._lacking, self._unagreed, self._made_s = 0, 0, time.monotonic()
        self._made_again_for = 0
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
        with self._trimming:  # some of what the rings have let go may have been cut off the journal
            self._refresh_buffers(anew=True)
        config, ring, delivered = self.node.config, self.node.make_output(self.number), self._delivered()
        if snapshot is not None:
            start, shard = begin_at(config, [start_from(self.folder, snapshot)], None, ring, self.node.progress)
        else:
            possible = possible_starts(self.node.document, self.folder)
            start, shard = begin_at(config, possible, delivered, ring, self.node.progress)
        return Built(shard, ring, start.sequence, start.known, delivered or 0)

    def _delivered(self) -> int | None:
        try:
            return stream_ends(self.node.config, self.node.targets, min)[self.number]
        except StreamUnknown as error:
            _log.warning("snapshots are not used: it cannot be seen what was delivered", shard=self.number, reason=str(error))
            return None

    def follow(self, address: str | None, epoch: int) -> None:
        """Follow the leader at ``HOST:PORT``; None: there is none now."""
        with self._turn:
            if not self._closed:
                self.epoch, self._leader_known = epoch, self._leader_known or epoch > 0
                self._standby.follow(address, epoch)

    def _refresh_buffers(self, *, anew: bool = False) -> None:
        """One for each source that there is now; all of them `anew`, with what the rings still have of the past."""
        inputs, numbers = self.node.inputs, self.node.document.sources
        for name in set(self._buffers) if anew else set(self._buffers) - set(inputs):
            self._buffers.pop(name).reader.close()
        for name, rings in inputs.items():
            ring, known = rings[self.number], self._buffers.get(name)
            if name not in numbers or (known is not None and known.ring is ring):
                continue  # a source that a change is about to bring comes with the change
            if known is not None:
                known.reader.close()
            self._buffers[name] = self._new_buffer(name, ring, numbers[name])

    def _new_buffer(self, name: str, ring: Ring, source: int) -> _Buffer:
        """From what the ring still has of the past: one that leads no more may soon have to go on from before its journal's end."""
        reader, receiver = ring.reader(f"standby-{self.number}", start="oldest"), self.node.receivers_by_name().get(name)
        expected, source_ns, session = (receiver.expected, receiver.source_ns, receiver.session) if receiver else (0, 0, 0)
        if reader.lag > ring.capacity // _PAST:
            reader.skip_to(ring.published - ring.capacity // _PAST)
        past = ring.arrays.slots[np.arange(reader.position, ring.published) & (ring.capacity - 1)].view(EVENT)
        if ((past["kind"] == Kind.CLEAR) & (past["instrument"] == ALL_INSTRUMENTS)).any():  # some of it is of another session
            reader.skip_to(ring.published)
            expected, source_ns, session = (receiver.expected, receiver.source_ns, receiver.session) if receiver else (0, 0, 0)
            return _Buffer(ring, reader, source, expected, source_ns, session)
        if reader.position == 0:
            return _Buffer(ring, reader, source, session=session)
        known = past[(past["seq"] > 0) & (past["ts_event"] > 0) & (past["instrument"] != ALL_INSTRUMENTS)]
        if len(known):  # the message that it is of may have begun before it
            return _Buffer(ring, reader, source, int(known["seq"][0]) + 1, int(known["ts_event"][0]), session)
        return _Buffer(ring, reader, source, expected, source_ns, session)

    def trim(self) -> int:
        """Let go of waiting events that the leader's journal has; and of the oldest where the ring is nearly full. Returns how many."""
        gone = 0
        with self._trimming:
            if self.thread is not None or self._closed:
                return 0
            self._refresh_buffers()
            built = self._standby.built
            for buffer in self._buffers.values():
                if built is not None:
                    at = built.known.positions[buffer.source : buffer.source + 1]
                    self._see_session(buffer, at[0])
                    gone += int(trim(at, buffer.ring.arrays, buffer.reader.slot, _TRIM_EVENTS))
                if buffer.reader.lag > buffer.ring.capacity * 3 // 4:
                    gone += self._give_up(buffer)
                show_alive(buffer.reader)
        return gone

    def _see_session(self, buffer: _Buffer, at: Any) -> None:
        """The ring's first event is of the journal's session, unless it is known to be of another one."""
        if buffer.same_session(at):
            at["own_session"] = at["session"]
        elif int(at["own_session"]) == 0:
            at["own_session"] = buffer.session
        if int(at["own_session"]) != 0 and int(at["own_session"]) == int(at["session"]) != buffer.session:
            buffer.session, buffer.begun = int(at["session"]), 0  # trimmed up to the journal's session

    def _give_up(self, buffer: _Buffer) -> int:
        """There is no leader whose journal takes these, or it is far behind: a takeover will say that they are missing."""
        try:
            events = buffer.reader.read(buffer.ring.capacity // 4).view(EVENT)
        except ReaderReleased:  # the receiver has gone on without us
            events = buffer.reader.read(buffer.ring.capacity // 4).view(EVENT)
        if len(events):
            buffer.lost = max(buffer.lost, int(events["seq"].max()))
        return len(events)

    def trim_journal(self, keep_bytes: int, keep_s: float) -> None:
        """While it is a standby: delete segments and snapshots that nothing needs."""
        standby = self._standby
        journal, built = standby.follower.journal, standby.built
        if self.thread is not None or journal is None or built is None:
            return
        if self._retention is None or self._retention.journal is not journal:
            self._retention, self._snapshots = Retention(journal, keep_bytes=keep_bytes, keep_s=keep_s, needed_whole=True), []
        stored, found = standby.status()["stored"], snapshots(snapshot_folder(self.folder))
        self._retention.mark(standby.taken, int(built.shard.arrays.core["out_seq"][0]))
        try:
            if found != self._snapshots:
                self._retention.covered = keep_snapshots(self.folder, stored, built.shard.arrays)
                self._snapshots = snapshots(snapshot_folder(self.folder))
            if self._retention.trim(stored):
                self._documents.prune()
        except (JournalError, OSError, ValueError) as error:  # it is being cut or made anew
            _log.debug("a standby's journal is not trimmed now", shard=self.number, reason=str(error))

    # -- what others are told

    def beat(self) -> ShardBeat:
        """What the node's heartbeat says of it."""
        thread, journal = self.thread, self._journal
        if thread is not None and journal is not None:
            role: Role = "standby" if self._handed_over else "leader"
            return ShardBeat(role, self.epoch, journal.next_sequence, thread.error is None and not self._handed_over, not self._handed_over)
        standby = self._standby
        journal, built = standby.follower.journal, standby.built
        if journal is None:
            led_by_nobody = not self._leader_known and time.monotonic() - self._made_s > _TOLD_S
            return ShardBeat("standby", self.epoch, 0, standby.follower.looked and led_by_nobody)
        behind = journal.next_sequence - standby.taken
        ready = built is not None and standby.failure is None and 0 <= behind <= _BEHIND_MAX and not self._lacks(built)
        return ShardBeat("standby", self.epoch, journal.next_sequence, ready, standby.follower.follows_closely)

    def _lacks(self, built: Built) -> bool:
        """Whether a takeover was refused for want of outputs that our journal still does not make, or of the journal that made them."""
        agreed = self._standby.follower.agreed
        return int(built.shard.arrays.core["out_seq"][0]) < self._lacking or (agreed is not None and agreed < self._unagreed)

    def status(self) -> dict[str, Any]:
        """As plain data, for the node's status."""
        thread, journal = self.thread, self._journal
        if thread is not None and journal is not None:
            gate = thread.gate.status() if thread.gate else {}
            taken = {"exchange": thread.exchange.status()} if thread.exchange and thread.exchange.status() else {}
            return {"role": "leader", "epoch": self.epoch, "sequence": journal.next_sequence, "release": gate, **taken}
        return {"role": "standby", **self._standby.status(), "error": self._failure()}

    def _failure(self) -> str:
        return self.error or str(self._standby.failure or "") or self._standby.follower.error

    def expect(self, *, standbys: bool) -> None:
        """Whether a living node could follow this one: else its outputs wait for none."""
        thread = self.thread
        if thread is not None and thread.gate is not None:
            thread.gate.expect(standbys)

    def tick(self) -> None:
        """The process runs; told many times a second."""
        thread = self.thread
        if thread is not None and thread.gate is not None:
            thread.gate.tick()

    # -- taking over

    def lead(self, epoch: int) -> None:
        """Take over under `epoch`; while leading already: fence anew under it.

        Raises:
            TakeoverRefused: it cannot; it is a standby as before.
        """
        with self._turn, self._changing_role(), undisturbed():
            if self._closed:
                raise TakeoverRefused(self.number, "the node has no replica of it any more")
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
                self._begin_leading(journal, built, epoch)
            except BaseException as error:
                self._back_to_standby(journal, built.output)
                self.error = str(error)
                if isinstance(error, TakeoverRefused) or not isinstance(error, Exception):
                    raise
                raise TakeoverRefused(self.number, str(error)) from error
            self.error = ""
            facts = {"sequence": journal.next_sequence, "outputs": int(built.shard.arrays.core["out_seq"][0])}
            _log.info("leads", shard=self.number, epoch=epoch, took_ms=round((time.monotonic() - begun_s) * 1000, 1), **facts)

    @contextlib.contextmanager
    def _changing_role(self) -> Iterator[None]:
        """While no configuration is on its way; one that waits for another shard of this node is no reason not to let others lead."""
        try:
            with self.node.changing.role(_ROLE_S):
                yield
        except ChangeInTheWay as error:
            raise TakeoverRefused(self.number, str(error)) from error

    def _take_over(self) -> tuple[Journal, Built]:
        """Journal and shard, which stand at the journal's end."""
        follower = self._standby.follower
        if follower.journal is not None:
            return self._standby.take_over(_TAKE_OVER_S)
        if self._leader_known or not follower.looked:
            raise StandbyError(f"standby of shard {self.number}: it has not got the journal yet")
        self._standby.stop()
        try:
            return self._afresh()
        except BaseException:
            self._standby = self._new_standby()
            raise

    def _afresh(self) -> tuple[Journal, Built]:
        """There has never been a leader."""
        document, config = self.node.document, self.node.config
        ring = self.node.make_output(self.number)
        try:
            shard = begin_shard(config, document, ring, self.node.progress)
            journal = make_journal(config, self.folder, self.number, document.version)
        except BaseException:
            ring.close()
            ring.unlink()
            raise
        Documents(journal.folder).write(document)
        return journal, Built(shard, ring)

    def _begin_leading(self, journal: Journal, built: Built, epoch: int) -> None:
        node, outputs = self.node, int(built.shard.arrays.core["out_seq"][0])
        gate = release_gate(node.config, journal, alone=True)  # its first standby is not waited for: outputs stayed away long enough
        gate.mark(journal.next_sequence, outputs)
        gate.closed = True  # until no stream refuses us: nothing may go out before that
        node.know({int(built.shard.arrays.core["config_version"][0]): signal_names(built.shard.plan)})
        for gateway in node.gateways.values():
            node.deliver_shard(gateway, self.number, built.shard, built.output, epoch, gate, after=built.held_from)
        with self._trimming:
            self._refresh_buffers()
        thread = self._make_thread(journal, built, gate, epoch)  # while the streams are being taken
        try:
            self._fence(outputs, built)  # before the inputs are touched: what waits there waits on if this is refused
            with self._trimming:
                write_agreed(self.folder, epoch)  # before anything goes out under it
                gate.closed = False
                self._go_on(thread, journal, built.known)
                self.epoch, self.thread, self._journal = epoch, thread, journal
        except BaseException:
            thread.abandon()
            raise
        node.add_shard(thread, journal)
        node.exchange(thread, built.shard.plan, node.config)
        thread.start()
        # not before the fence: standbys cut their journals to one that is served, and this one might lack what has been published
        self._server.lead(self.number, self._leading(journal, thread, epoch))
        node.publish_shard(thread)
        node.pin_shard(thread)

    def _leading(self, journal: Journal, thread: ShardThread, epoch: int) -> Leading:
        """What standbys are served."""
        output = thread.output
        return Leading(journal, epoch, thread.gate, self._stored, lambda n: outputs_digest(output, n), lambda: self._snapshot(journal))

    def _lead_again(self, thread: ShardThread, epoch: int) -> None:
        journal, gate = self._journal, thread.gate
        assert journal is not None
        self.epoch = thread.epoch = epoch
        self._handed_over = False
        if gate is not None:
            gate.require(None)
        for gateway in self.node.gateways.values():
            self.node.deliver_shard(gateway, self.number, thread.shard, thread.output, epoch, gate)
        self._fence(0, None)
        self._server.lead(self.number, self._leading(journal, thread, epoch))
        self.node.publish_shard(thread)

    def _fence(self, outputs: int, built: Built | None) -> None:
        """Wait until the output streams are ours; `built`: what is to go on with them, if it is not the loop that runs.

        Raises:
            TakeoverRefused: one is not, or holds more outputs than the journal makes, or those of a leader that ours may differ from, or
                others than ours in the same place, or lacks some that are not in our ring any more.
        """
        end = time.monotonic() + _FENCE_S
        for name, gateway in self.node.gateways.items():
            delivery = gateway.shards[self.number]
            with waiting():  # a server may be away for seconds, and heartbeats must go on
                judged = delivery.judged.wait(max(0.0, end - time.monotonic()))
            if not judged:
                raise TakeoverRefused(self.number, f"delivery.{name}: the output stream did not answer within {_FENCE_S:g} s")
            if delivery.state != "delivering" or delivery.publisher is None:
                raise TakeoverRefused(self.number, f"delivery.{name}: {delivery.error or delivery.state}")
            if built is not None:
                self._check_stream(name, delivery.publisher, outputs, built)

    def _check_stream(self, name: str, publisher: OutputPublisher, outputs: int, built: Built) -> None:
        held, published, agreed = publisher.last_out_seq, publisher.records_epoch, read_agreed(self.folder)
        self._lacking = max(self._lacking, held if held > outputs else 0)
        if agreed is not None and published > agreed:  # our journal may end otherwise than the one that made those
            self._unagreed = published
        reason = unfit(publisher, outputs, built.output, agreed)
        if not reason and 0 < held < built.held_from and built.output.mode == "lossless" and self._made_again_for != held:
            self._made_again_for = held  # once: if they cannot be made again, it is better to say that they are missing
            reason = f"outputs {held + 1} to {built.held_from} are not in the stream, and were let go here: they are made again"
        if reason:
            raise TakeoverRefused(self.number, f"delivery.{name}: {reason}")

    def _make_thread(self, journal: Journal, built: Built, gate: ReleaseGate, epoch: int) -> ShardThread:
        """A loop for this node's rings, not started."""
        node, known = self.node, built.known
        inputs = [Input(b.ring, b.source, b.reader) for b in self._buffers.values()]
        idle = IDLE_MODES[node.config.cluster.idle]
        thread = ShardThread(self.number, built.shard, inputs, built.output, journal, node.telemetry, idle, node.progress, gate, epoch)
        thread.know_ids(known.intern(node.table, self.number, skip_filtered=True)[0])
        thread.given[0] = max(known.references, default=-1) + 1
        node.make_exchange(thread, known, {} if journal.next_sequence else dict.fromkeys(range(node.config.cluster.shards), 0))
        return thread

    def _go_on(self, thread: ShardThread, journal: Journal, known: RestoredShard) -> None:
        """Have a loop begin where the journal ends; what waits in the rings is its from now on.

        Raises:
            TakeoverRefused: the outputs of what comes first find no room, or the journal cannot be written.
        """
        self._put_first(thread, journal, known, [
            *self._breaks(known), *self._introduce(thread), *self._renamed(thread, known), *self._not_followed(thread, known)
        ])  # fmt: skip
        self._bring_back(thread)
        for source in (buffer.source for buffer in self._buffers.values()):
            thread.positions[source] = known.positions[source]
            begin_resuming(thread.positions[source : source + 1])
        self._buffers = {}

    def _put_first(self, thread: ShardThread, journal: Journal, known: RestoredShard, events: list[EventArray]) -> None:
        """Journal events before the loop begins, and step over them.

        Raises:
            TakeoverRefused: their outputs find no room.
        """
        if not events:
            return
        batch = zeros_aligned(sum(map(len, events)), EVENT)
        batch[:] = np.concatenate(events)
        known.take(batch)
        if journal.append(batch) < len(batch):
            raise TakeoverRefused(self.number, f"the journal in {journal.folder} cannot be written: free some space")
        first, end = 0, time.monotonic() + _TAKE_OVER_S
        while first < len(batch):
            first += thread.step_again(batch, first, min(len(batch), first + BATCH_EVENTS))
            if time.monotonic() > end:
                raise TakeoverRefused(self.number, "its outputs find no room: look at the deliveries")
        assert thread.gate is not None
        thread.gate.mark(journal.next_sequence, int(thread.shard.arrays.core["out_seq"][0]))

    def _introduce(self, thread: ShardThread) -> list[EventArray]:
        """Definitions of instruments that our receivers have met, and the journal has not."""
        table, events = self.node.table, []
        records = table.arrays.records[: len(table)]
        mine = (records["shard"] == self.number) & (records["flags"] == PUBLISHED) & (records["announced"] != 0)
        for node_id in np.flatnonzero(mine & (thread.ids[: len(records)] == UNSEEN)):
            number = int(thread.given[0])
            thread.ids[node_id], thread.given[0] = number, number + 1
            events += _definition(table, int(node_id), number)
        return events

    def _books(self, thread: ShardThread) -> Iterator[tuple[Receiver, int, Any]]:
        """The receivers whose rings a loop goes on with, the number of their source, and its instruments, by the node's ids."""
        records = self.node.table.arrays.records[: len(self.node.table)]
        met = (records["shard"] == self.number) & (thread.ids[: len(records)] != UNSEEN)
        for name, receiver in self.node.receivers_by_name().items():
            buffer = self._buffers.get(name)
            if buffer is not None:
                yield receiver, buffer.source, np.flatnonzero(met & (records["source"] == buffer.source))

    def _not_followed(self, thread: ShardThread, known: RestoredShard) -> list[EventArray]:
        """GAP of each book whose changes after the journal's end our decoder could not follow, since it had lost what came before.

        And of those whose snapshot the journal has half of: the other half is not at the same place in our rings.
        """
        events = []
        for receiver, source, mine in self._books(thread):
            last = int(known.positions[source]["sequence"])
            half = np.isin(thread.ids[mine], list(known.half_told)) & receiver.has_snapshots
            unknown = mine[(receiver.followed_since(mine) > last) | half]
            events.append(_of_books(Kind.GAP, thread.ids[unknown]))
        return [one for one in events if len(one)]

    def _renamed(self, thread: ShardThread, known: RestoredShard) -> list[EventArray]:
        """CLEAR and GAP of books that our receiver calls otherwise than the journal: only one of them had heard the definition."""
        events = []
        for receiver, source, _ in self._books(thread):
            if receiver.has_definitions:
                ended, stale = not_by_name(known, self.node.table, source, thread.ids)
                events += [_of_books(Kind.CLEAR, ended), _of_books(Kind.GAP, stale)]
        return [one for one in events if len(one)]

    def _bring_back(self, thread: ShardThread) -> None:
        """Books that the journal calls stale, and that our decoder may know all about: they come from the venue's next snapshots."""
        flags = thread.shard.arrays.books.sides["flags"][::2]
        for receiver, _, mine in self._books(thread):
            receiver.bring_back(mine[(flags[thread.ids[mine]] & Flag.STALE) != 0])

    def _breaks(self, known: RestoredShard) -> list[EventArray]:
        """What is missing between the journal's end and the first that our receivers have; and a session that is new to the journal."""
        found = []
        for name, receiver in self.node.receivers_by_name().items():
            buffer = self._buffers.get(name)
            if buffer is None:
                continue
            at, begun = known.positions[buffer.source], buffer.begun or receiver.begun_at
            last, placed = int(at["sequence"]), bool(at["sequence"] or at["session"])
            if not buffer.same_session(at) and int(at["own_session"]) != int(at["session"]):
                if receiver.session == int(at["session"]):
                    continue  # the ring begins before the journal's session
                found.append(_break(Kind.CLEAR, buffer.source, buffer.session))
                last = 0
            elif begun == 0 and placed:
                receiver.go_on_from(last + 1, int(at["session"]))  # it has heard nothing yet: it will see the gap itself
                continue
            known_to_its_beginning = 0 < buffer.begun_ns <= int(at["timer_ns"])
            begun_after = 0 if known_to_its_beginning or not (placed or found) else begun - 1
            missing_to = max(buffer.lost, begun_after)
            if last < missing_to:
                found.append(_break(Kind.GAP, buffer.source, last + 1, missing_to))
        return found

    def _stored(self) -> int:
        """The last output that every stream holds."""
        deliveries = [gateway.shards.get(self.number) for gateway in self.node.gateways.values()]
        found = [d.publisher.last_out_seq if d is not None and d.publisher is not None else 0 for d in deliveries]
        thread = self.thread
        return min(found, default=thread.output.published if thread else 0)

    def _snapshot(self, journal: Journal) -> SnapshotFile | None:
        """The newest one of this journal, for a standby that needs events which are not kept."""
        for path in reversed(snapshots(snapshot_folder(self.folder))):
            with contextlib.suppress(SnapshotError, JournalError):
                facts = read_facts(path)
                chain = JournalReader(self.folder).chain_before(facts.sequence)
                if facts.journal_id == journal.header.journal_id and chain == facts.chain:
                    return SnapshotFile(path, facts.sequence)
        return None

    # -- giving it up

    def stop_leading(self, reason: str) -> None:
        """Stop at once, and be a standby again, whose journal's tail the next leader may cut."""
        thread = self.thread
        if thread is not None:
            thread.end()  # without waiting for anybody
            thread.let_go_of_inputs()
        with self._turn, self.node.changing.role():
            if thread is None or self.thread is not thread or self._journal is None:
                return
            _log.info("leads no more", shard=self.number, epoch=self.epoch, reason=reason)
            self._back_to_standby(self._journal, thread.output)

    def _back_to_standby(self, journal: Journal, output: Ring) -> None:
        thread, self.thread, self._journal, self._handed_over = self.thread, None, None, False
        self._server.resign(self.number)
        for gateway in self.node.gateways.values():
            gateway.drop(self.number)
        self.node.withdraw_shard(self.number)
        if thread is not None:
            self.node.remove_shard(thread)
        journal.close()
        output.close()
        output.unlink()
        self._standby = self._new_standby()

    def hand_over(self, to: str) -> bool:
        """Let nothing out any more that the standby `to` could not go on from. The loop runs on, until `to` takes the streams.

        Returns:
            False: `to` does not follow closely enough; nothing has changed.
        """
        with self._turn, self.node.changing.role(), undisturbed():
            thread, journal = self.thread, self._journal
            if thread is None or journal is None or thread.gate is None or not self._follows(to, journal.next_sequence - _NEAR):
                return False
            thread.gate.require(to)
            end, sequence = time.monotonic() + _HAND_OVER_S, journal.next_sequence  # what has gone out comes of events before this
            while not self._follows(to, sequence):
                if time.monotonic() > end:
                    thread.gate.require(None)
                    return False
                with waiting():
                    time.sleep(_LOOK_S)
            self._handed_over = True
            return True

    def _follows(self, node: str, sequence: int) -> bool:
        """Whether a standby has the events below `sequence`."""
        return any(s["node"] == node and s["shard"] == self.number and s["sequence"] >= sequence for s in self._server.status())

    def close(self) -> None:
        """End it; a leader hands over before that."""
        self.stop_leading("the node stops")
        with self._turn:
            self._closed = True
            self._standby.stop()
            with self._trimming:
                for buffer in self._buffers.values():
                    buffer.reader.close()
                self._buffers = {}


def unfit(publisher: OutputPublisher, outputs: int, output: Ring, agreed: int | None) -> str:
    """Why a journal must not go on with the stream that a publisher has taken; empty: it may.

    Args:
        outputs: the last output that the journal makes.
        output: the ring with the last of them.
        agreed: the epoch of the last leader whose journal it is known to be a beginning of; None: not known.
    """
    held, published = publisher.last_out_seq, publisher.records_epoch
    if agreed is not None and published > agreed:
        reason = f"the stream holds outputs of epoch {published}, whose leader's journal ours was last compared with in {agreed}"
        return f"{reason}: that node, or one that followed it, must lead"
    if held > outputs:
        return f"the stream holds outputs up to {held}, our journal makes {outputs}: the node that has the rest must lead"
    count, theirs = publisher.taken
    mine = outputs_digest(output, held, count) if count else 0
    if mine not in (0, theirs):
        return f"the outputs up to {held} in the stream are not those that our journal makes: the shard is made anew from it"
    return ""


def _break(kind: Kind, source: int, first: int, last: int = 0) -> EventArray:
    """CLEAR of a source with a session, or GAP from `first` to `last`."""
    event = zeros_aligned(1, EVENT)
    event["ts_recv"], event["kind"], event["side"] = time.time_ns(), kind, NO_SIDE
    event["instrument"], event["price"], event["id"], event["aux"] = ALL_INSTRUMENTS, source, first, last
    event["seq"] = first if kind == Kind.GAP else 0
    return event


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


def _of_books(kind: Kind, instruments: Any) -> EventArray:
    """CLEAR or GAP of single books, by the shard's ids. They have no sequence: the source's place is counted by events that it has sent."""
    events = zeros_aligned(len(instruments), EVENT)
    events["ts_recv"], events["kind"], events["side"], events["instrument"] = time.time_ns(), kind, NO_SIDE, instruments
    return events


def _definition(table: Any, node_id: int, number: int) -> list[EventArray]:
    """REFERENCE, and CODE if the venue has one, of an instrument under its shard's id."""
    record = table.arrays.records[node_id]
    events = zeros_aligned(2, EVENT)
    events["ts_recv"], events["instrument"], events["flags"] = time.time_ns(), number, record["source"]
    events["kind"], events["side"] = (Kind.REFERENCE, Kind.CODE), (np.uint8(np.int8(record["qty_exponent"])), NO_SIDE)
    named = events[:1].view(REFERENCE)
    named["tick_size"], named["symbol"] = record["tick_size"], record["symbol"]
    events["id"][1], events["aux"][1] = record["code"], record["depth"]
    return [events[:1], events[1:]] if record["code"] else [events[:1]]
