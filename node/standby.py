"""A standby of one shard: the leader's journal is followed, stepped over, and what comes of it is held back.

A change of the configuration takes effect where the journal has it: the feeder waits until the loop has come to that event, gets the new
parameters or the new code ready from the version's document, and then lets it happen. A standby that has to compile falls behind meanwhile.

The follower writes the journal; a feeder reads it from there, from the beginning or from a snapshot on, and hands the events to the
shard's loop through a ring. So the start, a restart and following are one thing, acknowledgements never wait for the loop, and a loop
that is held up has the journal, not memory, as its queue. The loop is the one that a leader runs, without a journal of its own.

Outputs stay in the output ring, held by a reader that only goes as far as the leader has stored them in its output streams. When the ring
is full the loop waits for that; a standby that takes over publishes what is in it, and the streams refuse what they have.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from tickmesh.node.event import EVENT, EventArray, Flag, Kind
from tickmesh.node.follower import JournalFollower
from tickmesh.node.frames import outputs_digest
from tickmesh.node.journal import Journal, Sync
from tickmesh.node.journal_tail import JournalTail
from tickmesh.node.pipeline import risk_limits
from tickmesh.node.replication_link import LinkOptions
from tickmesh.node.restore import RestoredShard
from tickmesh.node.shard import Shard
from tickmesh.node.shard_thread import Input, ShardThread
from tickmesh.node.succession import set_parameters, succeed
from tickmesh.node.telemetry import Telemetry
from tickmesh.node.versions import Documents
from tickmesh.transports.ring import Reader, Ring

Progress = Callable[[str], None] | None
_FEED_EVENTS = 4096
_WAIT_S = 0.05
_MANY_EVENTS, _GATHER_S = 256, 0.01
"""Fewer events than that are handed over together with those of the next moment: a standby is in no hurry until it takes over."""
_TURN_S = 0.0002
_LAST_TURN_S = 0.5
_CONFIG = np.uint8(Kind.CONFIG)
_LACKING_MAX = 3
"""Heartbeats in a row: the loop counts what it has taken a moment before what it has put out."""
_INPUT_TIMEOUT_MS = 60_000
_log = structlog.get_logger("replication")


class StandbyError(Exception):
    """A standby cannot do what was asked; the message says why."""


class Diverged(StandbyError):
    """What a standby has made of the journal is not what its leader has published: that must never be.

    Attributes:
        output: it or one shortly before it differs.
    """

    def __init__(self, shard: int, output: int) -> None:
        what = f"standby of shard {shard}: outputs up to {output} are not the leader's, though both are made of the same journal"
        super().__init__(f"{what}: it starts over; please report this, with both journals")
        self.output = output


@dataclass
class Built:
    """A shard as it was after the events below `sequence`, the ring that takes its outputs from there on, and what its journal says so far.

    The ring's cursors stand at the shard's ``out_seq``. Outputs up to `stored` are in the output streams already, and need not be held;
    `held_from` is the last output that is not in the ring any more.
    """

    shard: Shard
    output: Ring
    sequence: int = 0
    known: RestoredShard = field(default_factory=RestoredShard)
    stored: int = 0
    held_from: int = 0


Build = Callable[[Path | None], Built]
"""Makes a shard: a fresh one, or from a snapshot's file. Called in the follower's thread; the ring of the one before is closed then."""


class _Stepping:
    """A shard being fed from the journal. `void`: it was stopped in the middle of a change, and nobody knows on which side of it; `lost`:
    outputs that it held have been overwritten."""

    def __init__(self, built: Built, number: int, capacity: int, telemetry: Telemetry, idle: int, progress: Progress) -> None:
        self.built = built
        self.input = Ring.create(None, capacity, EVENT, reader_timeout_ms=_INPUT_TIMEOUT_MS)
        self._telemetry = telemetry
        self.thread = ShardThread(number, built.shard, [Input(self.input, -1)], built.output, None, telemetry, idle, progress)
        self.held: Reader = built.output.reader("standby")
        self.fed, self.void, self.lost = built.sequence, False, False
        self._before = built.sequence - int(built.shard.arrays.core[0]["events"])
        self.thread.start()

    @property
    def taken(self) -> int:
        """Sequence after the last event that the loop has stepped over, completely."""
        return self._before + int(self.built.shard.arrays.core[0]["events"])

    def turn(self, event: EventArray, documents: Documents, going_on: Callable[[], bool]) -> bool:
        """Let a CONFIG event of the journal (EVENT[1]) take effect; everything before it has been taken. False if it was stopped before.

        Raises:
            DocumentError: the version's document is missing.
            PlanError, CompileError, ShardError: its code cannot be run here.
        """
        thread, version = self.thread, int(event["id"][0])
        document = documents.read(version)
        plan, limits = document.plan(), risk_limits(document.config)
        if not int(event["flags"][0]) & Flag.NEW_CODE:
            set_parameters(thread.shard, plan, limits, int(event["aux"][0]) & 1)
            self.void = True  # until it is seen to be in force
            thread.send(event)
            self.void = not _in_force(lambda: thread.version == version, going_on)
            thread.shard.plan = plan
            return not self.void
        shard, carry = succeed(thread.shard, plan, limits, document.order_ids)
        leg = thread.park(shard, [Input(self.input, -1)], carry, self._telemetry)
        if not going_on():
            thread.call_off(leg)
            return False
        self.void = True  # until it is seen to be in force
        thread.wake(leg)
        thread.send(event)
        if not _in_force(lambda: thread.handed_over(leg), going_on):
            return False
        thread.complete(leg)
        self.built.shard, self.void = shard, False
        return True

    @property
    def useless(self) -> bool:
        """Whether nobody can go on with it."""
        return self.void or self.lost or self.thread.error is not None

    def let_go(self, outputs: int) -> bool:
        """Give room for outputs up to this one. False: the ring has not kept all of those after it."""
        self.lost = not self.held.hold_from(outputs) or self.lost
        return not self.lost

    def close(self) -> None:
        """Stop the loop; the shard and its output ring stay as they are."""
        self.thread.end()
        self.held.close()
        self.input.close()


def _in_force(condition: Callable[[], bool], going_on: Callable[[], bool]) -> bool:
    """Whether a change that was sent has come into force: after a stop it is waited for a little longer, since else all is void."""
    end = None
    while not condition():
        if not going_on():
            end = end or time.monotonic() + _LAST_TURN_S
            if time.monotonic() > end:
                return condition()
        time.sleep(_TURN_S)
    return True


class Standby:
    """A shard's standby. :meth:`start`, :meth:`follow` a leader, then :meth:`stop`, or :meth:`take_over`.

    Args:
        number: of the shard.
        folder: of the journal.
        options: of the link to the leader.
        build: makes the shard.
        telemetry: the node's; the loop's counters go there as a leader's do.
        idle: what the loop and the feeder do with nothing to do.
        ring_capacity: events between feeder and loop.
        sync: how the journal is forced to disk.
        epoch: the highest epoch known.
        progress: told when something has to be compiled.

    Attributes:
        compared, diverged: how often outputs were compared with the leader's, and how often they were others, so that it started over.
    """

    def __init__(
        self,
        number: int,
        folder: str | Path,
        options: LinkOptions,
        build: Build,
        telemetry: Telemetry,
        *,
        idle: int = 2,
        ring_capacity: int = 65536,
        sync: Sync = "segment",
        epoch: int = 0,
        progress: Progress = None,
    ) -> None:
        self.number = number
        self._build, self._telemetry, self._idle, self._capacity, self._progress = build, telemetry, idle, ring_capacity, progress
        self.follower = JournalFollower(number, folder, options, self, sync=sync, epoch=epoch)
        self.error: Exception | None = None
        self.compared = self.diverged = self._lacking = 0
        self._stepping: _Stepping | None = None
        self._stored = 0
        self._stop = np.zeros(1, np.int64)
        self._hurry = threading.Event()
        self._feeder: threading.Thread | None = None
        self._fed_from: Journal | None = None
        self._lock = threading.Lock()

    # -- from outside

    def start(self) -> Standby:
        """Open the journal, if there is one, and step over it."""
        self.follower.start()
        return self

    def follow(self, address: str | None, epoch: int = 0) -> None:
        """Follow the leader at ``HOST:PORT``; see :meth:`JournalFollower.follow`."""
        if address is not None:
            self._hurry.clear()
        self.follower.follow(address, epoch)

    @property
    def fed(self) -> int:
        """Sequence after the last event handed to the loop."""
        return self._stepping.fed if self._stepping else 0

    @property
    def taken(self) -> int:
        """Sequence after the last event stepped over."""
        return self._stepping.taken if self._stepping else 0

    @property
    def built(self) -> Built | None:
        """What it works on, once there is something."""
        return self._stepping.built if self._stepping else None

    @property
    def shard(self) -> Shard | None:
        """The shard, once there is one."""
        return self._stepping.built.shard if self._stepping else None

    @property
    def output(self) -> Ring | None:
        """The ring with the outputs that are held back."""
        return self._stepping.built.output if self._stepping else None

    @property
    def failure(self) -> BaseException | None:
        """What has ended the loop or the feeder."""
        stepping = self._stepping
        return self.error or (stepping.thread.error if stepping else None)

    def check(self) -> None:
        """Raise what has ended the loop or the feeder.

        Raises:
            StandbyError: with the reason.
        """
        error = self.failure
        if error is not None:
            raise StandbyError(f"standby of shard {self.number}: {error}") from error

    def take_over(self, limit_s: float = 5.0) -> tuple[Journal, Built]:
        """Stop following, step over what is in the journal, and hand out journal, shard and held outputs, which are the caller's then.

        Outputs that the streams lack are in the ring. When more of them are to come than it holds, the caller's gateway has to publish
        them meanwhile, and :meth:`stored` has to be told.

        Raises:
            StandbyError: there is no journal yet, or the loop does not come to the journal's end within the limit, since nobody takes
                what it puts out; it goes on being a standby, without a leader.
        """
        self._hurry.set()
        self.follower.follow(None)
        if self.follower.journal is None and not self.follower.connected:
            raise StandbyError(f"standby of shard {self.number}: it has no journal yet, so it cannot lead")
        end = time.monotonic() + limit_s
        while not self._at_the_end():
            self.check()
            if time.monotonic() > end:
                left = self.follower.next_sequence - self.taken
                raise StandbyError(f"standby of shard {self.number}: {left} events are not stepped over within {limit_s:g} s")
            time.sleep(0.0005)
        journal, stepping = self.follower.stop(close=False), self._stepping
        assert journal is not None
        assert stepping is not None
        self._end_feeder()
        stepping.built.held_from = stepping.held.position
        stepping.close()
        self._stepping = None
        return journal, stepping.built

    def _at_the_end(self) -> bool:
        """Whether all of the journal has been stepped over, and none is added or cut any more; until then both may be made anew."""
        if self.follower.connected:
            return False
        journal, stepping = self.follower.journal, self._stepping
        return journal is not None and stepping is not None and not stepping.void and stepping.taken == journal.next_sequence

    def stop(self) -> None:
        """End everything; the output ring is closed too. More than once is fine."""
        self.follower.stop()
        self._end_feeder()
        stepping, self._stepping = self._stepping, None
        if stepping:
            stepping.close()
            stepping.built.output.close()
            stepping.built.output.unlink()

    def status(self) -> dict[str, Any]:
        """How far it is, as plain data; see docs/reference/replication.md."""
        stepping = self._stepping
        output = stepping.built.output if stepping else None
        return {
            **self.follower.status(),
            "taken": self.taken,
            "outputs": output.published if output else 0,
            "outputs_held": output.lag if output else 0,
            "stored": self._stored,
            "compared": self.compared,
            "diverged": self.diverged,
        }

    # -- from the follower

    def opened(self, journal: Journal, valid: int, snapshot: Path | None) -> None:
        """See :class:`tickmesh.node.follower.Replica`."""
        stepping = self._stepping
        oldest = JournalTail(journal).oldest()
        if stepping is None or stepping.useless or stepping.fed > valid or stepping.fed < oldest:
            self._rebuild(snapshot)
        self.error = None
        if self.fed < oldest:  # a snapshot may be ahead of a journal that has just begun
            self.error = StandbyError(f"its state is as of sequence {self.fed}, but the journal begins at {oldest}: a snapshot is needed")
            return
        self._stop[0], self._fed_from = 0, journal
        self._hurry.clear()
        self._feeder = threading.Thread(target=self._feed, args=(journal,), name=f"feeder-{self.number}", daemon=True)
        self._feeder.start()

    def closing(self) -> None:
        """See :class:`tickmesh.node.follower.Replica`."""
        self._end_feeder()

    def stored(self, outputs: int, digest: int = 0) -> None:
        """See :class:`tickmesh.node.follower.Replica`. Raises Diverged."""
        if digest and self._differs(outputs, digest):
            self.diverged += 1
            _log.error("a standby's outputs are not the leader's", shard=self.number, output=outputs, taken=self.taken)
            raise Diverged(self.number, outputs)
        self._stored = max(self._stored, outputs)
        self._let_go()

    def _differs(self, outputs: int, digest: int) -> bool:
        """Whether our outputs up to this one are others than the leader's, or fewer come of all of its journal."""
        stepping = self._stepping
        if stepping is None:
            return False
        lacking = self.taken >= self.follower.leader_end and stepping.built.output.published < outputs
        self._lacking = self._lacking + 1 if lacking else 0
        mine = outputs_digest(stepping.built.output, outputs)
        self.compared += mine != 0
        return mine not in (0, digest) or self._lacking > _LACKING_MAX

    # -- inside

    def _rebuild(self, snapshot: Path | None) -> None:
        """A shard from scratch, or from a snapshot: what it had stepped over is void."""
        old, self._stepping = self._stepping, None
        if old:
            _log.info("standby starts over", shard=self.number, taken=old.taken, snapshot=str(snapshot or ""))
            old.close()
            old.built.output.close()
            old.built.output.unlink()
        built, self._lacking = self._build(snapshot), 0
        self._stored = max(self._stored, built.stored)
        self._stepping = _Stepping(built, self.number, self._capacity, self._telemetry, self._idle, self._progress)

    def _end_feeder(self) -> None:
        self._stop[0] = 1
        self._hurry.set()
        if self._feeder is not None and self._fed_from is not None:
            self._fed_from.wake_readers()
            self._feeder.join()
            self._feeder = None

    def _feed(self, journal: Journal) -> None:
        """Hand events of the journal to the loop, as it has room."""
        stepping = self._stepping
        assert stepping is not None
        tail, documents = JournalTail(journal), Documents(journal.folder)
        tail.position = stepping.fed
        try:
            while not self._stop[0]:
                events, _ = tail.read(_FEED_EVENTS)
                if len(events):
                    self._step_over(stepping, events, documents)
                else:
                    tail.wait(self._stop, self._idle, _WAIT_S)
                self._let_go()
                if 0 < len(events) < _MANY_EVENTS and not self._stop[0]:
                    self._hurry.wait(_GATHER_S)
                if stepping.thread.error is not None:
                    raise stepping.thread.error
        except Exception as error:  # of the disk, of a user's code: whatever it is, it may pass
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """What has been made of the journal is of no use: it will be made anew, after a pause."""
        if self.error is None:
            self.error = error
            _log.error("a standby cannot go on", shard=self.number, reason=str(error) or type(error).__name__)
            self.follower.start_over(str(error) or type(error).__name__)

    def _step_over(self, stepping: _Stepping, events: EventArray, documents: Documents) -> None:
        """Hand events to the loop, and change the configuration where they say so."""
        first = 0
        for at in np.flatnonzero(events["kind"] == _CONFIG):
            if not self._hand_over(stepping, events[first:at]) or not self._taken_all(stepping):
                return  # stopped: what was not handed over comes before the change, when it goes on
            if not stepping.turn(events[at : at + 1], documents, self._going_on(stepping)):
                return
            stepping.fed += 1
            first = int(at) + 1
        self._hand_over(stepping, events[first:])

    def _taken_all(self, stepping: _Stepping) -> bool:
        going_on = self._going_on(stepping)
        while stepping.taken < stepping.fed and going_on():
            time.sleep(_TURN_S)
        return stepping.taken >= stepping.fed

    def _going_on(self, stepping: _Stepping) -> Callable[[], bool]:
        """Whether to wait on: neither stopped nor failed; lets go of outputs meanwhile."""

        def ask() -> bool:
            self._let_go()
            return not self._stop[0] and stepping.thread.error is None

        return ask

    def _hand_over(self, stepping: _Stepping, events: EventArray) -> bool:
        """Whether all of them are in the loop's ring; false if it was stopped before."""
        done = 0
        while done < len(events) and not self._stop[0]:
            written = stepping.input.writer.write(events[done:], timeout_ms=0)
            stepping.built.known.take(events[done : done + written])
            done += written
            stepping.fed += written
            if written == 0:  # the loop has enough to do, or waits for the leader's outputs to be stored
                self._let_go()
                time.sleep(0.0005)
        return done == len(events)

    def _let_go(self) -> None:
        stepping = self._stepping
        if stepping is None:
            return
        with self._lock:
            kept = stepping.let_go(self._stored)
        if not kept:
            self._fail(StandbyError(f"standby of shard {self.number}: outputs that it holds have been overwritten"))
        self.follower.outputs = stepping.built.output.published
