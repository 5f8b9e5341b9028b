"""FIX messages of a chunk of bytes at once, for sessions: where each lies, its type, its sequence, and whether its header is plain.

A session looks at these rows in place of the messages. Runs of plain messages in sequence go on as one piece; what is left, it reads field
by field. A header is plain if each of MsgType, MsgSeqNum, SenderCompID, TargetCompID and SendingTime stands in it once and is well formed,
the begin string and both CompIDs are those of the session, and PossDupFlag (43) is not set.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tickmesh.node.fix_frame import SOH, TRAILER_BYTES, WHOLE, frame_at, soh_from, tag_at
from tickmesh.node.fix_text import low_bytes, timestamp, whole_number
from tickmesh.transports.byte_masks import SLACK_BYTES
from tickmesh.transports.toolbox import inlined, le64, loop, outlined

FIRST, STOP, TYPE, SEQ, SENDING_NS, PLAIN = range(6)
"""Columns of a row, i64: where the message begins and ends, MsgType (up to eight bytes, little-endian; 0: longer), MsgSeqNum, SendingTime
in ns since 1970, and 1 if the header is plain; only then do SEQ and SENDING_NS mean anything."""
COLUMNS = 6
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


@outlined
def _header(buf: Any, first: Any, body: Any, end: Any, who: Any, row: Any) -> Any:
    """Read the header of the message ``buf[first:end]`` whose body begins at `body`; fills TYPE, SEQ, SENDING_NS, PLAIN of `row`."""
    begin, sender, target, parts, date = who
    seen, problems, p = _I(0), _I(0), body
    row[TYPE], row[PLAIN] = 0, 0
    if not _same(buf, first, first + begin.size, begin):
        problems = _I(1)
    while p < end:
        tag, size = tag_at(buf, p)
        part = parts[tag] if tag < parts.size else _I(0)
        if part == 0:
            break
        p += size + 1
        e = soh_from(buf, p, end)
        if part != _OTHER:
            problems |= seen & part
            seen |= part
        if part == _TYPE:
            row[TYPE] = _I(low_bytes(le64(buf, p), e - p)) if e - p <= 8 else _I(0)
        elif part == _SEQ:
            row[SEQ], wrong = whole_number(buf, p, e)
            problems |= wrong
        elif part == _TIME:
            row[SENDING_NS], wrong = timestamp(buf, p, e, date)
            problems |= wrong
        elif part == _SENDER:
            problems |= _I(not _same(buf, p, e, sender))
        elif part == _TARGET:
            problems |= _I(not _same(buf, p, e, target))
        elif e == p:
            problems = _I(1)
        p = e + 1
    row[PLAIN] = _I(seen == _NEEDED and problems == 0)


@loop
def scan_messages(buf: Any, p: Any, end: Any, who: Any, out: Any) -> Any:
    """Rows of the whole messages that ``buf[p:end]`` begins with; 64 readable bytes lie behind.

    Args:
        who: ``(begin, sender, target, parts, date)``: u8 arrays of ``8=FIX.4.4|``, the peer's CompID and ours, :data:`HEADER_PARTS`, and
            a date cache, i64[2].
        out: i64[n, COLUMNS].

    Returns:
        ``(count, position, what)``: how many rows; where the next message should begin; what stands there, as
        :func:`tickmesh.node.fix_frame.frame_at` has it (WHOLE: nothing, or there were no rows left).
    """
    count, what = 0, _I(WHOLE)
    while p < end and count < out.shape[0]:
        what, body, stop = frame_at(buf, p, end)
        if what != WHOLE:
            return count, p, _I(what)
        row = out[count]
        row[FIRST], row[STOP] = p, stop + TRAILER_BYTES
        _header(buf, p, body, stop, who, row)
        count += 1
        p = stop + TRAILER_BYTES
    return count, p, _I(WHOLE)


def who_of(begin_string: str, sender: str, target: str) -> tuple[Any, ...]:
    """What :func:`scan_messages` holds headers against: `sender` is the peer's CompID."""
    begin = f"8={begin_string}".encode() + bytes([SOH])
    texts = (begin, sender.encode("latin-1"), target.encode("latin-1"))
    return (*(np.frombuffer(bytearray(text), np.uint8) for text in texts), HEADER_PARTS, np.zeros(2, np.int64))


def warm() -> None:
    """Compile the entry point."""
    scan_messages(np.zeros(2 * SLACK_BYTES, np.uint8), 0, 0, who_of("FIX.4.4", "A", "B"), np.zeros((1, COLUMNS), np.int64))
