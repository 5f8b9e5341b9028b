"""How much of a shard's journal is kept: the oldest segments go when there are too many or they are too old, but none that is needed.

A journal that a restart goes on from is needed from the older of two snapshots on (:attr:`Retention.covered`), once what that contains has
been delivered; before there are two it is needed whole, and the node says so if that is too much. Otherwise (recordings, simulations,
``journal.restore = false``) a segment may go once what its events have put out is in every output stream.
The journal of the run before, which a fresh start has put aside, goes first, as a whole.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import structlog

from tickmesh.node.journal import FinishedSegment, Journal

_MARKS = 256
_log = structlog.get_logger("node")


class Retention:
    """Trims one shard's journal. :meth:`mark` and :meth:`trim` now and then, from one thread.

    Attributes:
        covered: sequence and outputs of the older of two snapshots; None: there are none.
        dropped: segments deleted so far.
        short: whether the limits cannot be kept because what is too much is needed.
    """

    def __init__(self, journal: Journal, *, keep_bytes: int = 0, keep_s: float = 0.0, needed_whole: bool = False) -> None:
        """`keep_bytes`, `keep_s`: limits, 0 for none. `needed_whole`: a restart replays the journal."""
        self.journal, self._keep_bytes, self._keep_s, self._needed_whole = journal, keep_bytes, keep_s, needed_whole
        self._marks: deque[tuple[int, int]] = deque()
        self._taken = 0
        self._safe = 0
        self.covered: tuple[int, int] | None = None
        self.dropped = 0
        self.short = False

    def set_limits(self, keep_bytes: int, keep_s: float) -> None:
        """Other limits from now on."""
        if (keep_bytes, keep_s) != (self._keep_bytes, self._keep_s):
            self._keep_bytes, self._keep_s, self.short = keep_bytes, keep_s, False

    @property
    def previous(self) -> Path:
        """Where a fresh start puts the journal of the run before."""
        return self.journal.folder.with_name(self.journal.folder.name + ".previous")

    def mark(self, taken: int, outputs: int) -> None:
        """Remember how far the shard is: it has taken so many events of the journal, and put out so much.

        The two are written one after the other by the shard's loop, so it is the earlier reading of the first that goes with the second.
        """
        if self._taken and len(self._marks) < _MARKS:
            self._marks.append((self._taken, outputs))
        self._taken = taken

    def trim(self, delivered: int | None, now_s: float | None = None) -> int:
        """Delete what is too much.

        Args:
            delivered: the last output that every stream holds; None: there is no stream.
            now_s: for tests; default: the time now.

        Returns:
            Segments deleted.
        """
        while self._marks and (delivered is None or self._marks[0][1] <= delivered):
            self._safe = self._marks.popleft()[0]
        dropped = self._drop_previous(now_s or time.time())
        until = None
        for segment in self._excess(now_s or time.time()):
            if segment.next_sequence > self._needed_from(delivered):
                self._say_short()
                break
            until = segment.next_sequence
        if until is not None:
            dropped += self.journal.drop_before(until)
        if dropped:
            self.dropped += dropped
            _log.info("journal trimmed", shard=self.journal.shard, segments=dropped, oldest=until)
        return dropped

    def _needed_from(self, delivered: int | None) -> int:
        if not self._needed_whole:
            return self.journal.first_sequence + self._safe
        if self.covered is None or (delivered is not None and self.covered[1] > delivered):
            return 0
        if self.journal.syncs and self.journal.synced_sequence < self.covered[0]:
            return 0  # a power cut could take events that the snapshots are after
        return self.covered[0]

    def _excess(self, now_s: float) -> Iterator[FinishedSegment]:
        """Finished segments beyond a limit, oldest first."""
        size = self.journal.disk_bytes()
        for segment in self.journal.finished():
            too_old = self._keep_s > 0 and now_s - segment.written_s > self._keep_s
            if not too_old and not (self._keep_bytes and size > self._keep_bytes):
                return
            size -= segment.size
            yield segment

    def _drop_previous(self, now_s: float) -> int:
        files = [file.stat() for file in self.previous.glob("*.journal")]
        if not files:
            return 0
        size = self.journal.disk_bytes() + sum(file.st_size for file in files)
        too_old = self._keep_s > 0 and now_s - max(file.st_mtime for file in files) > self._keep_s
        if not too_old and not (self._keep_bytes and size > self._keep_bytes):
            return 0
        shutil.rmtree(self.previous)
        return len(files)

    def _say_short(self) -> None:
        if self.short:
            return
        self.short = True
        advice = (
            "a restart needs it, since there are no two snapshots after it yet: lower journal.snapshot_interval_s, or raise keep_mb"
            if self._needed_whole
            else "its outputs are not delivered yet: look at the delivery"
        )
        _log.warning("journal beyond its limit", shard=self.journal.shard, bytes=self.journal.disk_bytes(), reason=advice)
