"""FIX messages in a stream of bytes: where one begins and ends, whether it is whole and unharmed, and its fields.

``8=FIX.4.4|9=<body length>|35=…|…|10=<checksum>|``. A message is taken only if its body length leads to the checksum field and the
checksum is right (FIX 4.4 volume 2, "Message format"). After a fault the search goes on at the next ``8=FIX``.

:class:`MessageStream` cuts byte chunks into messages with their fields, for sessions and tools. The decoder of market data uses the
kernels (:func:`frame_at`, :func:`next_begin`) directly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tickmesh.node.fix_text import eight_digits, first_equal, low_bytes, not_digits, whole_number
from tickmesh.transports.byte_masks import SLACK_BYTES, byte_sum, equal_mask64
from tickmesh.transports.toolbox import count_trailing_zeros, inlined, le16, le32, le64, outlined, quick

BODY_BYTES_MAX = 1 << 20
"""Longest body of a message; a longer body length counts as wrong."""
TRAILER_BYTES = 7
"""``10=ddd|``."""
FIELDS_MAX = 1 << 16
"""Most fields of a message that :class:`MessageStream` gives out."""
DATA_PAIRS = {
    90: 91, 93: 89, 95: 96, 212: 213, 348: 349, 350: 351, 352: 353, 354: 355, 356: 357, 358: 359, 360: 361, 362: 363, 364: 365, 445: 446,
    618: 619, 621: 622, 1184: 1185, 1277: 1278, 1280: 1281, 1282: 1283, 1397: 1398, 1401: 1402, 1403: 1404, 1468: 1469, 1525: 1527,
    1578: 1579, 1620: 1621, 1664: 1665, 1678: 1697, 1733: 1734, 1871: 1872, 1874: 1875,
}  # fmt: skip
"""Length field -> the data field that follows it, in which any byte may stand, SOH too. What a dictionary says is added to it."""

WHOLE, PARTIAL, NO_BEGIN, BAD_BEGIN_STRING, BAD_BODY_LENGTH, BAD_HEADER, BAD_CHECKSUM = range(7)
"""What :func:`frame_at` says."""
_FAULTS = ("", "", "garbage", "bad_begin_string", "bad_body_length", "bad_header", "bad_checksum")
SOH = 1

_U, _I = np.uint64, np.int64
_WORDS = {text: int.from_bytes(text, "little") for text in (b"8=FIX.4.", b"8=FIX.5.", b"8=FIXT.1", b"8=FI", b"9=", b"35=", b"10=")}
_FIX4, _FIX5, _FIXT1 = _U(_WORDS[b"8=FIX.4."]), _U(_WORDS[b"8=FIX.5."]), _U(_WORDS[b"8=FIXT.1"])
_BEGIN, _LENGTH, _TYPE, _TRAILER = _WORDS[b"8=FI"], _WORDS[b"9="], _WORDS[b"35="], _WORDS[b"10="]
_SOHS, _EQUALS = _U(0x0101010101010101), _U(0x3D3D3D3D3D3D3D3D)
_ZERO_DIGITS, _TRAILER_DIGITS = _U(0x3030303030303030), _U(0x303030)
_LOW3 = 0xFFFFFF
_HEADER_BYTES = 20
"""Enough for a header up to the body length's SOH."""


# ---------------------------------------------------------------- one message


@inlined
def frame_at(buf: Any, p: Any, end: Any) -> Any:
    """The message that begins at p, of ``buf[p:end]`` with 64 readable bytes behind.

    Returns:
        ``(what, body, stop)``: what it is (WHOLE, PARTIAL: `end` comes too soon, or a fault); where the body begins (``35=``); where the
        trailer begins (``10=``), which BAD_CHECKSUM has too.
    """
    word = le64(buf, p)
    at = p + 10
    if word == _FIXT1:
        at = p + 11
    elif word != _FIX4 and word != _FIX5:
        return _no_frame(buf, p, end)
    if end - p < _HEADER_BYTES:
        return PARTIAL, p, p
    digits = le64(buf, at + 2)
    size = first_equal(digits, _SOHS)
    if buf[at - 1] != SOH or le16(buf, at) != _LENGTH:
        return BAD_HEADER if buf[at - 1] == SOH else BAD_BEGIN_STRING, p, p
    nibbles = (digits ^ _ZERO_DIGITS) << (_U(64 - 8 * size) & _U(63))
    length = _I(eight_digits(nibbles))
    if size < 1 or size > 7 or not_digits(nibbles) != _U(0) or length > BODY_BYTES_MAX or length < 5:
        return BAD_BODY_LENGTH, p, p
    body = at + 3 + size
    stop = body + length
    if _I(le32(buf, body)) & _LOW3 != _TYPE and body + 3 <= end:
        return BAD_HEADER, p, p
    if stop + TRAILER_BYTES > end:
        return PARTIAL, p, p
    trailer = le64(buf, stop)
    if _I(trailer) & _LOW3 != _TRAILER or buf[stop - 1] != SOH:
        return BAD_BODY_LENGTH, p, p
    told = (trailer >> _U(24) & _U(_LOW3)) ^ _TRAILER_DIGITS
    value = (told & _U(0xFF)) * _U(100) + (told >> _U(8) & _U(0xFF)) * _U(10) + (told >> _U(16))
    if value != byte_sum(buf, p, stop - p) or not_digits(told) != _U(0) or buf[stop + 6] != SOH:
        return BAD_CHECKSUM, body, stop
    return WHOLE, body, stop


@outlined
def _no_frame(buf: Any, p: Any, end: Any) -> Any:
    """Why no known version begins at p."""
    if end - p < 8 and _begins(buf, p, end):
        return PARTIAL, p, p
    return BAD_BEGIN_STRING if end - p >= 5 and _begins(buf, p, p + 5) else NO_BEGIN, p, p


@outlined
def _begins(buf: Any, p: Any, end: Any) -> Any:
    """Whether ``buf[p:end]`` is the start of ``8=FIX`` and what may follow."""
    word, size = le64(buf, p), min(end - p, 8)
    kept = low_bytes(word, size)
    if size <= 5:
        return kept == low_bytes(_FIX4, size)
    return kept == low_bytes(_FIX4, size) or kept == low_bytes(_FIX5, size) or kept == low_bytes(_FIXT1, size)


@outlined
def next_begin(buf: Any, p: Any, end: Any) -> Any:
    """Where in ``buf[p:end]`` the next ``8=FIX`` begins, or might with more bytes; `end` if nowhere."""
    while p < end:
        mask = equal_mask64(buf, p, np.uint8(56))
        if end - p < 64:
            mask &= (_U(1) << _U(end - p)) - _U(1)
        while mask != _U(0):
            at = p + _I(count_trailing_zeros(mask))
            mask &= mask - _U(1)
            if _begins(buf, at, min(end, at + 5)):
                return at
        p += 64
    return end


# ---------------------------------------------------------------- fields


@inlined
def tag_at(buf: Any, p: Any) -> Any:
    """The tag at p: ``(tag, size)``; tag 0 if it is not 1 to 7 digits, the first not 0, and an equals sign."""
    word = le64(buf, p)
    size = first_equal(word, _EQUALS)
    nibbles = (word ^ _ZERO_DIGITS) << (_U(64 - 8 * size) & _U(63))
    good = size >= 1 and size <= 7 and not_digits(nibbles) == _U(0) and buf[p] != 48
    return _I(eight_digits(nibbles)) if good else _I(0), size


@inlined
def soh_from(buf: Any, p: Any, end: Any) -> Any:
    """Index of the first SOH of ``buf[p:end]``, or `end`."""
    while p < end:
        mask = equal_mask64(buf, p, np.uint8(SOH))
        if mask != _U(0):
            return min(p + _I(count_trailing_zeros(mask)), end)
        p += 64
    return end


@quick
def _next_message(buf: Any, p: Any, end: Any) -> Any:
    return frame_at(buf, p, end)


@quick
def _begin_after(buf: Any, p: Any, end: Any) -> Any:
    return next_begin(buf, p, end)


@quick
def split_fields(buf: Any, p: Any, end: Any, data_tags: Any, out: Any) -> Any:
    """Fields of ``buf[p:end]``, which ends with a SOH, as ``(tag, first, end)`` rows of `out`, i64[n, 3].

    `data_tags` i32[65536]: the data field that a length field announces, else 0. In that data field any byte may stand.

    Returns:
        How many fields; or, negative, minus one minus the index at which a field is malformed, or there is no room.
    """
    count, expected, length = 0, _I(0), _I(0)
    while p < end:
        tag, size = tag_at(buf, p)
        first = p + size + 1
        if tag == 0 or count == out.shape[0]:
            return -1 - p
        stop = soh_from(buf, first, end)
        if expected != 0 and tag == expected:
            stop = first + length
        if stop >= end or buf[stop] != SOH:
            return -1 - p
        out[count, 0], out[count, 1], out[count, 2] = tag, first, stop
        count += 1
        expected = _I(data_tags[_U(tag)]) if tag < data_tags.size else _I(0)
        if expected != 0:
            length, problem = whole_number(buf, first, stop)
            if problem != 0 or length > end - stop:
                return -1 - p
        p = stop + 1
    return count


def warm() -> None:
    """Call every entry point once."""
    buf = np.zeros(2 * SLACK_BYTES, np.uint8)
    _next_message(buf, 0, 0)
    _begin_after(buf, 0, 0)
    split_fields(buf, 0, 0, data_table({}), np.zeros((1, 3), np.int64))


def data_table(pairs: dict[int, int]) -> Any:
    """`data_tags` for :func:`split_fields`, of the standard's pairs and `pairs`."""
    table = np.zeros(1 << 16, np.int32)
    for length, data in {**DATA_PAIRS, **pairs}.items():
        if length < len(table):
            table[length] = data
    return table


# ---------------------------------------------------------------- streams


@dataclass(frozen=True)
class Message:
    """One message that is whole, with its checksum right.

    Attributes:
        raw: all of its bytes.
        fields: tag and value of every field in order, from BeginString (8) to CheckSum (10).
    """

    raw: bytes
    fields: tuple[tuple[int, bytes], ...]

    @property
    def type(self) -> str:
        """MsgType (35)."""
        return self.fields[2][1].decode("latin-1")

    def get(self, tag: int) -> bytes | None:
        """Value of the first field with this tag, if there is one."""
        return next((value for found, value in self.fields if found == tag), None)

    def group(self, count_tag: int, first_tag: int) -> list[list[tuple[int, bytes]]]:
        """Entries of a repeating group, split at its delimiter; what is nested stays in its entry, what follows in the last one."""
        at = next((k for k, (tag, _) in enumerate(self.fields) if tag == count_tag), None)
        entries: list[list[tuple[int, bytes]]] = []
        for pair in self.fields[at + 1 : -1] if at is not None else ():
            if pair[0] == first_tag:
                entries.append([])
            if entries:
                entries[-1].append(pair)
        return entries


class MessageStream:
    """Messages out of byte chunks that end anywhere.

    Args:
        data_pairs: length field -> data field, beside the standard's (a dictionary's :attr:`data_pairs`).
        buffer_bytes: most bytes that wait for the end of their message.

    Attributes:
        malformed: what was dropped, by reason: `garbage`, `bad_begin_string`, `bad_body_length`, `bad_header`, `bad_checksum`,
            `bad_field`, `truncated`.
    """

    def __init__(self, data_pairs: dict[int, int] | None = None, buffer_bytes: int = 2 * BODY_BYTES_MAX) -> None:
        self.malformed: Counter[str] = Counter()
        self._buffer = np.zeros(buffer_bytes + SLACK_BYTES, np.uint8)
        self._first = self._end = 0
        self._data_tags = data_table(data_pairs or {})
        self._fields = np.zeros((FIELDS_MAX, 3), np.int64)
        self._in_garbage = False

    def feed(self, chunk: bytes | memoryview) -> Iterator[Message]:
        """Take bytes; gives the messages that are complete with them. Go through all of them before the next chunk."""
        view = memoryview(chunk).cast("B")
        room = len(self._buffer) - SLACK_BYTES
        while len(view):
            if self._first:
                kept = self._end - self._first
                self._buffer[:kept] = self._buffer[self._first : self._end].copy()
                self._first, self._end = 0, kept
            taken = min(len(view), room - self._end)
            self._buffer[self._end : self._end + taken] = np.frombuffer(view[:taken], np.uint8)
            self._end += taken
            view = view[taken:]
            yield from self._messages(final=False)

    def end(self) -> Iterator[Message]:
        """No more bytes come: what is left is cut short, but whole messages may lie behind a wrong body length."""
        yield from self._messages(final=True)

    def _messages(self, final: bool) -> Iterator[Message]:
        buf = self._buffer
        while self._first < self._end:
            what, _, stop = _next_message(buf, self._first, self._end)
            if what == PARTIAL and not final and self._end - self._first < len(buf) - SLACK_BYTES:
                return
            if what != WHOLE:
                self._skip(int(what), int(stop))
                continue
            first, self._first, self._in_garbage = self._first, int(stop) + TRAILER_BYTES, False
            message = self._message(first)
            if message is not None:
                yield message

    def _skip(self, what: int, stop: int) -> None:
        """Go to the next begin after a fault; a run of garbage counts once, line ends between messages do not."""
        start = self._first
        self._first = int(_begin_after(self._buffer, max(stop, start + (what != NO_BEGIN)), self._end))
        if what != NO_BEGIN:
            self.malformed["truncated" if what == PARTIAL else _FAULTS[what]] += 1
            self._in_garbage = True
        elif not self._in_garbage and self._buffer[start : self._first].tobytes().strip(b"\r\n"):
            self.malformed["garbage"] += 1
            self._in_garbage = True

    def _message(self, first: int) -> Message | None:
        raw = self._buffer[first : self._first].tobytes()
        count = int(split_fields(self._buffer, first, self._first, self._data_tags, self._fields))
        if count < 0:
            self.malformed["bad_field"] += 1
            return None
        fields = self._fields[:count].tolist()
        return Message(raw, tuple((tag, raw[start - first : stop - first]) for tag, start, stop in fields))
