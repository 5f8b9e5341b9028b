"""Marks that a shard's loop leaves behind: after these inputs of the journal, so many outputs had been made.

A small ring of marks in one u64 array, written by the loop and taken by :class:`tickmesh.node.release.ReleaseGate`. When it is full the
loop leaves a mark out and puts a later one, which says more; a mark that would let nothing new go is not put. So every mark that waits
frees an output when it is taken, and a loop that waits for room in its output ring can always put the next.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tickmesh.transports.counters import histogram_record
from tickmesh.transports.toolbox import inlined, load_acquire, now_ns, quick, store_release

MARKS = 1024
"""Marks that wait at most, a power of two."""
M_CAPACITY, M_PUT, M_LAST, M_TAKEN, M_OUT = 0, 16, 17, 32, 33
"""0 if nobody wants marks; the loop's own: marks put, outputs of the last one; the gate's own: marks taken, outputs of the last one."""
_AT, _MARK_WORDS = 48, 4
_ZERO, _ONE = np.uint64(0), np.uint64(1)
EVERYTHING = np.uint64((1 << 64) - 1)

Marks = npt.NDArray[np.uint64]


def make_marks(capacity: int = MARKS) -> Marks:
    """An empty ring of marks; of capacity 0 for a loop that need not put any."""
    marks = np.zeros(_AT + max(1, capacity) * _MARK_WORDS, np.uint64)
    marks[M_CAPACITY] = capacity
    return marks


@inlined
def put_mark(marks: Any, appended: Any, outputs: Any, now: Any) -> Any:
    """Say that the first `outputs` outputs (u64) come from the first `appended` records of the journal (u64), at time `now` (i64 ns).

    False: there is no room, and a later mark has to be put.
    """
    if marks[M_CAPACITY] == _ZERO or marks[M_LAST] == outputs:
        return True
    put = marks[M_PUT]
    if put - load_acquire(marks, M_TAKEN) >= marks[M_CAPACITY]:
        return False
    at = _AT + np.int64(put & (marks[M_CAPACITY] - _ONE)) * _MARK_WORDS
    marks[at], marks[at + 1], marks[at + 2] = appended, outputs, np.uint64(now)
    marks[M_LAST] = outputs
    store_release(marks, M_PUT, put + _ONE)
    return True


@quick
def put_mark_now(marks: Any, appended: Any, outputs: Any) -> Any:
    """:func:`put_mark` from Python, while the loop does not run."""
    return put_mark(marks, appended, outputs, now_ns())


@quick
def take_marks(marks: Any, limit: Any, waits: Any) -> Any:
    """Take the marks of the first `limit` records (u64) of the journal.

    The time since each was put goes into the histogram `waits`. Returns the outputs (u64) that the last mark taken so far lets go.
    """
    put, taken = load_acquire(marks, M_PUT), marks[M_TAKEN]
    now = now_ns()
    while taken < put:
        at = _AT + np.int64(taken & (marks[M_CAPACITY] - _ONE)) * _MARK_WORDS
        if marks[at] > limit:
            break
        marks[M_OUT] = marks[at + 1]
        histogram_record(waits, max(np.int64(0), now - np.int64(marks[at + 2])))
        taken += _ONE
    store_release(marks, M_TAKEN, taken)
    return marks[M_OUT]
