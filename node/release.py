"""The release gate: outputs may leave the node once the inputs that they come from are on standbys.

Standbys acknowledge sequences of the journal; the loop's marks (:mod:`tickmesh.node.release_marks`) say which outputs came from which
inputs. The gate puts the two together: :meth:`ReleaseGate.released` is the last output that may go, and the gateway reads the output ring
only that far. A standby counts while it is connected and keeps up; one that is still catching up, or has fallen behind, holds nobody up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tickmesh.node.journal import Journal
from tickmesh.node.release_marks import EVERYTHING, M_LAST, make_marks, put_mark_now, take_marks
from tickmesh.transports.counters import BUCKETS, HISTOGRAM_WORDS, Values, percentile

_STOOD_STILL_S = 0.25
"""A process that has not ticked for so long stood still, or its host did."""
Acks = Literal[0, 1, "all"]
Standing = Literal["open", "waiting", "held", "solo"]


@dataclass
class StandbyPosition:
    """How far a standby is. Sequences: the next one that it wants, and the next one that is not on its disk yet.

    `caught_up_s` is the time (monotonic) up to which it has everything; `target` what it needs for a later one, `target_s` that later one.
    """

    sequence: int
    synced: int
    target: int
    target_s: float
    caught_up_s: float = float("-inf")


class ReleaseGate:
    """Which outputs of one shard may leave. :meth:`update` and :meth:`leave` by replication, :meth:`released` by the gateway; any threads.

    Args:
        journal: the leader's.
        acks: on how many standbys inputs must be: 0, 1, or all that keep up.
        solo: whether to go on alone when there is no standby that keeps up; otherwise outputs are held until there is one.
        solo_after_s: how long to wait for one before going on alone.
        lag_s_max: a standby keeps up if it has what the journal had so long ago.
        waits: histogram of the time in ns from an output to its release, see :mod:`tickmesh.transports.counters`.
        alone: the first standby is not waited for, as after a takeover.
        clock: monotonic seconds.

    Attributes:
        listeners: called when more may leave, in the thread that has said so.
        closed: nothing leaves, whatever is acknowledged: a takeover that may still be refused is under way.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        acks: Acks = 1,
        solo: bool = True,
        solo_after_s: float = 1.0,
        lag_s_max: float = 5.0,
        waits: Values | None = None,
        alone: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.acks, self.solo = acks, solo
        self.marks = make_marks() if acks != 0 else make_marks(0)
        self._journal, self._solo_after_s, self._lag_s_max, self._clock = journal, solo_after_s, lag_s_max, clock
        self._waits = np.zeros(HISTOGRAM_WORDS, np.int64) if waits is None else waits
        self._standbys: dict[str, StandbyPosition] = {}
        self._lock = threading.Lock()
        self._seen_s = float("-inf") if alone else clock()
        self._alone = self._nobody = False
        self._ticked_s: float | None = None
        self._required: str | None = None
        self.closed = False
        self.listeners: set[Callable[[], None]] = set()
        self.times_alone = 0
        self._taken(np.uint64(0))  # compiled or loaded now, not at the first output

    # -- from replication

    def update(self, node: str, sequence: int, synced: int) -> None:
        """A standby has the events below `sequence` in its journal, and those below `synced` on its disk."""
        with self._lock:
            now = self._clock()
            at = self._standbys.get(node)
            if at is None:
                at = self._standbys[node] = StandbyPosition(sequence, synced, self._journal.next_sequence, now)
            at.sequence, at.synced = max(at.sequence, sequence), max(at.synced, synced)
            if at.sequence >= at.target:
                at.caught_up_s, at.target, at.target_s = at.target_s, self._journal.next_sequence, now
                if at.sequence >= at.target:
                    at.caught_up_s = now
        self._tell()

    def leave(self, node: str) -> None:
        """A standby is gone, and does not count any more; what one that is taking over has got stays good."""
        with self._lock:
            self._excuse(self._clock())
            if node != self._required:
                self._standbys.pop(node, None)
        self._tell()

    # -- from the node

    def expect(self, standbys: bool) -> None:
        """Whether there is a living node that could follow: where there is none, nobody is waited for (if `solo`)."""
        changed, self._nobody = self._nobody == standbys, not standbys
        if changed:
            self._tell()

    def tick(self) -> None:
        """We run: called many times a second. For as long as this process stood still, its standbys cannot be said to have been silent."""
        with self._lock:
            self._ticked_s = self._ticked_s or self._clock()
            self._excuse(self._clock())

    def _excuse(self, now: float) -> None:
        if self._ticked_s is None:
            return
        stood_s, self._ticked_s = now - self._ticked_s, now
        if stood_s > _STOOD_STILL_S:
            self._seen_s += stood_s
            for at in self._standbys.values():
                at.caught_up_s, at.target_s = at.caught_up_s + stood_s, at.target_s + stood_s

    def require(self, node: str | None) -> None:
        """From now on what leaves is on this standby, whoever else has it: it is about to take over. None: as it is configured again."""
        with self._lock:
            if node is None and self._required is not None:
                self._standbys.pop(self._required, None)  # it comes back with its next acknowledgement, if it is there
            self._required = node
        self._tell()

    def _tell(self) -> None:
        for listener in tuple(self.listeners):
            listener()

    def mark(self, sequence: int, outputs: int) -> None:
        """While the loop does not run (a restart's replay): the first `outputs` outputs come from events below `sequence`."""
        put_mark_now(self.marks, np.uint64(sequence - self._journal.first_sequence), np.uint64(outputs))

    def released(self) -> int:
        """The last output that may leave the node."""
        if self.closed:
            return 0
        if self.acks == 0:
            return int(EVERYTHING)
        with self._lock:
            limit = self._limit()
            return self._taken(EVERYTHING if limit is None else np.uint64(max(0, limit - self._journal.first_sequence)))

    @property
    def tells(self) -> bool:
        """Whether outputs wait for standbys, so that the listeners are told of each that may leave: nobody has to look in between."""
        return self.acks != 0 and not self._alone

    def _taken(self, limit: np.uint64) -> int:
        return int(take_marks(self.marks, limit, self._waits))

    def _limit(self) -> int | None:
        """The sequence below which inputs are safe; None: outputs go whatever is safe."""
        now = self._clock()
        self._excuse(now)
        if self._required is not None:
            required = self._standbys.get(self._required)
            return required.sequence if required is not None else 0
        counted = [at.sequence for at in self._standbys.values() if self._keeps_up(at, now)]
        if counted:
            self._seen_s, self._alone = now, False
            return min(counted) if self.acks == "all" else max(counted)
        if not self.solo or (now - self._seen_s < self._solo_after_s and not self._nobody):
            return 0
        self.times_alone += not self._alone
        self._alone = True
        return None

    def _keeps_up(self, at: StandbyPosition, now: float) -> bool:
        return now - at.caught_up_s <= self._lag_s_max or (at.caught_up_s > 0 and at.sequence >= self._journal.next_sequence)

    # -- seen from outside

    @property
    def standing(self) -> Standing:
        """``open`` (acks = 0), ``waiting`` for standbys' acknowledgements, ``held`` for want of a standby, or ``solo``: on without one."""
        if self.acks == 0:
            return "open"
        with self._lock:
            limit, now = self._limit(), self._clock()
            if any(self._keeps_up(at, now) for at in self._standbys.values()):
                return "waiting"
            return "solo" if limit is None else "held"

    def status(self) -> dict[str, Any]:
        """Standing, outputs held back, their wait in µs, and the standbys, as plain data."""
        standing, released = self.standing, self.released()
        counts = self._waits[-BUCKETS:]
        waits = {f"p{p}": percentile(counts, p) / 1000 if counts.any() else None for p in (50, 99)}
        with self._lock:
            now, end = self._clock(), self._journal.next_sequence
            standbys = {
                node: {"sequence": at.sequence, "synced": at.synced, "lag": end - at.sequence, "keeps_up": self._keeps_up(at, now)}
                for node, at in self._standbys.items()
            }
        held = 0 if self.acks == 0 else max(0, int(self.marks[M_LAST]) - released)
        return {
            "acks": self.acks,
            "standing": standing,
            "times_alone": self.times_alone,
            "outputs_held": held,
            "held_us": waits,
            "standbys": standbys,
        }
