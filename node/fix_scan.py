"""FIX messages of a chunk of bytes at once, for sessions: how many from the beginning on may go on as they are.

A run of plain messages in sequence goes on as one piece, and nobody looks at them one by one; what is not plain, a session reads field by
field. A message is plain if each of MsgType, MsgSeqNum, SenderCompID, TargetCompID and SendingTime stands in its header once and is well
formed, the begin string and both CompIDs are those of the session, SendingTime is near the clock, PossDupFlag (43) is not set, and
it is none of the session level.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tickmesh.node.fix_frame import SOH, TRAILER_BYTES, WHOLE, frame_at, soh_from, tag_at
from tickmesh.node.fix_text import timestamp, whole_number
from tickmesh.transports.byte_masks import SLACK_BYTES
from tickmesh.transports.toolbox import inlined, outlined, quick

ALONE = 7
"""Beside what :func:`tickmesh.node.fix_frame.frame_at` says: a whole message that is not the next of a run, to be read by itself."""
_HEADER_TAGS = (34, 35, 43, 49, 50, 52, 56, 57, 97, 115, 116, 122, 128, 129, 142, 143, 144, 145, 369, 627, 1128)
_TYPE, _SEQ, _SENDER, _TARGET, _TIME, _DUPLICATE = (1 << n for n in range(6))
_NEEDED = _TYPE | _SEQ | _SENDER | _TARGET | _TIME
_PARTS = {35: _TYPE, 34: _SEQ, 49: _SENDER, 56: _TARGET, 52: _TIME, 43: _DUPLICATE}
_OTHER = 64
_TAGS_MAX = 2048
_I, _U = np.int64, np.uint64

HEADER_PARTS = np.zeros(_TAGS_MAX, np.int64)
"""Tag -> which part of the header it is (0: none: the body has begun)."""
HEADER_PARTS[list(_HEADER_TAGS)] = _OTHER
for _tag, _part in _PARTS.items():
    HEADER_PARTS[_tag] = _part


@inlined
def _same(buf: Any, p: Any, e: Any, text: Any) -> Any:
    """Whether ``buf[p:e]`` is `text`."""
    if e - p != text.size:
        return False
    for k in range(text.size):
        if buf[p + k] != text[k]:
            return False
    return True


@inlined
def _is_admin(buf: Any, p: Any, e: Any) -> Any:
    """Whether MsgType is one of the session level: 0 to 5, A."""
    return e - p == 1 and ((buf[p] >= 48 and buf[p] <= 53) or buf[p] == 65)


@outlined
def _is_next(buf: Any, first: Any, body: Any, end: Any, who: Any, expected: Any, earliest_ns: Any, latest_ns: Any) -> Any:
    """Whether the message ``buf[first:end]`` whose body begins at `body` is plain, and has sequence `expected`."""
    begin, sender, target, parts, date = who
    seen, p = _I(0), body
    if not _same(buf, first, first + begin.size, begin):
        return False
    while p < end:
        tag, size = tag_at(buf, p)
        part = parts[_U(tag)] if tag < parts.size else _I(0)
        if part == 0:
            break
        p += size + 1
        e = soh_from(buf, p, end)
        if e == p or seen & part & ~_I(_OTHER):
            return False
        seen |= part
        if part == _TYPE and _is_admin(buf, p, e):
            return False
        if part == _SEQ:
            sequence, wrong = whole_number(buf, p, e)
            if wrong != 0 or sequence != expected:
                return False
        elif part == _TIME:
            sent_ns, wrong = timestamp(buf, p, e, date)
            if wrong != 0 or sent_ns < earliest_ns or sent_ns > latest_ns:
                return False
        elif (part == _SENDER and not _same(buf, p, e, sender)) or (part == _TARGET and not _same(buf, p, e, target)):
            return False
        p = e + 1
    return seen & ~_I(_OTHER) == _NEEDED


@quick
def scan_messages(buf: Any, p: Any, end: Any, who: Any, expected: Any, earliest_ns: Any, latest_ns: Any, stops: Any) -> Any:
    """The run of plain messages, the first of them with sequence `expected`, that ``buf[p:end]`` begins with; 64 readable bytes lie behind.

    Args:
        who: ``(begin, sender, target, parts, date)``: u8 arrays of ``8=FIX.4.4|``, the peer's CompID and ours, :data:`HEADER_PARTS`, and
            a date cache, i64[2].
        expected: MsgSeqNum; -1: no message is to go on unread.
        earliest_ns, latest_ns: what SendingTime may be, ns since 1970.
        stops: i64[n]: filled with the ends of the run's messages.

    Returns:
        ``(count, position, what, stop)``: how many messages; where the run ends; what stands there: ALONE (its end is `stop`), or as
        :func:`tickmesh.node.fix_frame.frame_at` has it (WHOLE: nothing, or `stops` is full).
    """
    count = _I(0)
    while p < end and count < stops.size:
        what, body, stop = frame_at(buf, p, end)
        if what != WHOLE:
            return count, _I(p), _I(what), _I(p)
        stop += TRAILER_BYTES
        if expected < 0 or not _is_next(buf, p, body, stop - TRAILER_BYTES, who, expected + count, earliest_ns, latest_ns):
            return count, _I(p), _I(ALONE), _I(stop)
        stops[_U(count)] = stop
        count += 1
        p = stop
    return count, _I(p), _I(WHOLE), _I(p)


def who_of(begin_string: str, sender: str, target: str) -> tuple[Any, ...]:
    """What :func:`scan_messages` holds headers against: `sender` is the peer's CompID."""
    begin = f"8={begin_string}".encode() + bytes([SOH])
    texts = (begin, sender.encode("latin-1"), target.encode("latin-1"))
    return (*(np.frombuffer(bytearray(text), np.uint8) for text in texts), HEADER_PARTS, np.zeros(2, np.int64))


def warm() -> None:
    """Compile the entry point."""
    scan_messages(np.zeros(2 * SLACK_BYTES, np.uint8), 0, 0, who_of("FIX.4.4", "A", "B"), -1, 0, 0, np.zeros(1, np.int64))
