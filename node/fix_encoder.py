"""FIX messages out: fields in a table of fixed memory, written in one go by compiled code, body length and checksum included.

>>> message = Encoder("FIX.4.4")
>>> message.begin("D")
>>> message.text(49, "ME")
>>> message.number(34, 7)
>>> message.time(52, now_ns, decimals=3)
>>> message.decimal(44, 10_250_000_000, 9)          # 44=10.25
>>> sock.send(message.finish())

Nothing is written beyond the buffer, no value can contain the separator or be empty, and the caller's order of fields is kept: header
first, a group's count before its entries. :func:`encode_fields` is the same for compiled loops.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from tickmesh.node.fix_frame import BODY_BYTES_MAX
from tickmesh.transports.byte_masks import SLACK_BYTES, byte_sum
from tickmesh.transports.toolbox import inlined, outlined, quick

FIELD = np.dtype(
    [("value", "<i8"), ("tag", "<u4"), ("first", "<u4"), ("size", "<u4"), ("kind", "u1"), ("decimals", "u1"), ("spare", "u1", 2)]
)
"""A field to write: NUMBER and DECIMAL (`value` * 10**-`decimals`), TIME (`value` ns since 1970 with 0, 3, 6 or 9 `decimals`), TEXT and
DATA (``text[first:first + size]``; before DATA stands its length, in the field whose tag is `value`)."""
NUMBER, DECIMAL, TIME, TEXT, DATA = range(5)
NO_ROOM, HAS_SOH, IS_EMPTY, BAD_TAG, OUT_OF_RANGE = -1, -2, -3, -4, -5
"""What :func:`encode_fields` returns in place of a place: why a field cannot be written."""
_REASONS = {
    NO_ROOM: "does not fit: make the encoder with more bytes or fields", HAS_SOH: "contains the separator (byte 1): send it as data",
    IS_EMPTY: "is empty: leave the field out", BAD_TAG: "is no tag for a body: 1 to 9999999, and not 8, 9 or 10",
    OUT_OF_RANGE: "is out of range: a time from 1970 to 2262 with 0, 3, 6 or 9 decimals, a number of 64 bits with up to 18",
}  # fmt: skip
HEAD_BYTES = 32
"""Before the body: BeginString and body length."""
_DIGITS_MAX = 20
_FIELD = struct.Struct("<qIIIBB2x")
assert _FIELD.size == FIELD.itemsize
_I, _U = np.int64, np.uint64
_SOH, _EQUALS, _POINT, _MINUS, _ZERO, _NINE = (np.uint8(c) for c in (1, 61, 46, 45, 48, 57))
_TIME_BYTES = 27
_DAY_S = 86_400
_TAG_MAX = 9_999_999
_TIME_NS_MAX = 9_223_372_036_000_000_000


class EncodeError(ValueError):
    """A field cannot be written.

    Attributes:
        tag: of the field.
        reason: what is wrong, and what to do.
    """

    def __init__(self, tag: int, reason: str) -> None:
        super().__init__(f"field {tag} {reason}")
        self.tag, self.reason = tag, reason


# ---------------------------------------------------------------- compiled


@inlined
def put_digits(out: Any, at: Any, value: Any, width: Any) -> Any:
    """The last `width` digits of a number, with zeros in front; returns where they end."""
    for k in range(width):
        out[at + width - 1 - k] = np.uint8(_ZERO + value % _U(10))
        value //= _U(10)
    return at + width


@inlined
def put_number(out: Any, at: Any, value: Any) -> Any:
    """A number (u64) without leading zeros; returns where it ends."""
    width, rest = _I(1), value
    while rest >= _U(10):
        rest //= _U(10)
        width += 1
    return put_digits(out, at, value, width)


@outlined
def _put_decimal(out: Any, at: Any, value: Any, decimals: Any) -> Any:
    """``value * 10**-decimals`` without zeros at the end."""
    if value < 0:
        out[at] = _MINUS
        at += 1
    size = _U(-(value + 1)) + _U(1) if value < 0 else _U(value)
    while decimals > 0 and size % _U(10) == _U(0):
        size //= _U(10)
        decimals -= 1
    unit = _U(1)
    for _ in range(decimals):
        unit *= _U(10)
    at = put_number(out, at, size // unit)
    if decimals == 0:
        return at
    out[at] = _POINT
    return put_digits(out, at + 1, size % unit, _I(decimals))


@outlined
def _put_time(out: Any, at: Any, ns: Any, decimals: Any) -> Any:
    """UTCTimestamp; the day by Howard Hinnant's "civil_from_days"."""
    seconds, fraction = ns // 1_000_000_000, _U(ns % 1_000_000_000)
    days, second = seconds // _DAY_S + 719_468, seconds % _DAY_S
    era, of_era = days // 146_097, days % 146_097
    year_of_era = (of_era - of_era // 1460 + of_era // 36_524 - of_era // 146_096) // 365
    of_year = of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    shifted = (5 * of_year + 2) // 153
    month = shifted + 3 if shifted < 10 else shifted - 9
    year = year_of_era + era * 400 + (1 if month <= 2 else 0)
    date = (year * 100 + month) * 100 + of_year - (153 * shifted + 2) // 5 + 1
    at = put_digits(out, at, _U(date), _I(8))
    out[at] = _MINUS
    at = put_digits(out, at + 1, _U(second // 3600), _I(2))
    out[at] = np.uint8(58)
    at = put_digits(out, at + 1, _U(second // 60 % 60), _I(2))
    out[at] = np.uint8(58)
    at = put_digits(out, at + 1, _U(second % 60), _I(2))
    if decimals == 0:
        return at
    for _ in range(9 - decimals):
        fraction //= _U(10)
    out[at] = _POINT
    return put_digits(out, at + 1, fraction, _I(decimals))


@inlined
def _copy(out: Any, at: Any, text: Any, first: Any, size: Any) -> Any:
    for k in range(size):
        out[at + k] = text[first + k]
    return at + size


@outlined
def _put_text(out: Any, at: Any, field: Any, text: Any) -> Any:
    first, size = _I(field.first), _I(field.size)
    if size == 0:
        return _I(IS_EMPTY)
    if first + size > text.size or at + size + 1 > out.size:
        return _I(NO_ROOM)
    if field.kind == TEXT:
        for k in range(first, first + size):
            if text[k] == _SOH:
                return _I(HAS_SOH)
    return _copy(out, at, text, first, size)


@outlined
def _put_value(out: Any, at: Any, field: Any, text: Any) -> Any:
    """The value of a field for which there is room if it is no text; returns where it ends, or why not."""
    if field.kind == TEXT or field.kind == DATA:
        return _put_text(out, at, field, text)
    if field.kind == TIME:
        good = field.value >= 0 and field.value <= _TIME_NS_MAX and field.decimals in (0, 3, 6, 9)
        return _put_time(out, at, field.value, _I(field.decimals)) if good else _I(OUT_OF_RANGE)
    if field.decimals > 18:
        return _I(OUT_OF_RANGE)
    return _put_decimal(out, at, field.value, _I(field.decimals) if field.kind == DECIMAL else _I(0))


@inlined
def _put_tag(out: Any, at: Any, tag: Any) -> Any:
    at = put_number(out, at, _U(tag))
    out[at] = _EQUALS
    return at + 1


@inlined
def _writable(tag: Any) -> Any:
    return tag >= 1 and tag <= _TAG_MAX and not (tag >= 8 and tag <= 10)


@outlined
def encode_fields(begin: Any, fields: Any, count: Any, text: Any, out: Any) -> Any:
    """Write a message of ``fields[:count]``, MsgType (35) the first, to `out`.

    Args:
        begin: u8: ``8=FIX.4.4|9=``.
        fields: FIELD array; text: u8, what their texts are cut from.
        out: u8, HEAD_BYTES and more; where the message begins in it depends on its length.

    Returns:
        ``(first, end, faulty)``: the message is ``out[first:end]``; or first is negative, one of NO_ROOM and so on, and faulty the field.
    """
    at = _I(HEAD_BYTES)
    room = _I(out.size) - SLACK_BYTES
    for k in range(count):
        field, own = fields[k], fields[k].tag
        if not _writable(own) or (field.kind == DATA and not _writable(field.value)):
            return _I(BAD_TAG), at, k
        if at + 2 * (_DIGITS_MAX + _TIME_BYTES) > room:
            return _I(NO_ROOM), at, k
        if field.kind == DATA:
            at = put_number(out, _put_tag(out, at, field.value), _U(field.size))
            out[at] = _SOH
            at += 1
        at = _put_tag(out, at, own)
        end = _put_value(out, at, field, text)
        if end < 0 or end >= room:
            return end if end < 0 else _I(NO_ROOM), at, k
        out[end] = _SOH
        at = end + 1
    return _finish(begin, out, at)


@inlined
def _finish(begin: Any, out: Any, end: Any) -> Any:
    """Header before the body that ends at `end`, trailer behind it."""
    length, width = _U(end - HEAD_BYTES), _I(1)
    rest = length
    while rest >= _U(10):
        rest //= _U(10)
        width += 1
    first = _I(HEAD_BYTES) - width - 1 - begin.size
    at = put_digits(out, _copy(out, first, begin, _I(0), begin.size), length, width)
    out[at] = _SOH
    total = byte_sum(out, first, end - first)
    out[end], out[end + 1], out[end + 2] = np.uint8(49), _ZERO, _EQUALS
    at = put_digits(out, end + 3, total, _I(3))
    out[at] = _SOH
    return first, at + 1, _I(-1)


@quick
def _encode(begin: Any, fields: Any, count: Any, text: Any, out: Any) -> Any:
    return encode_fields(begin, fields, count, text, out)


# ---------------------------------------------------------------- Python


class Encoder:
    """Messages of one session, one after the other, in the same memory.

    Args:
        begin_string: ``"FIX.4.4"``, ``"FIXT.1.1"``; up to 16 characters.
        size_bytes: most bytes of a message.
        fields_max: most fields of a message.
    """

    def __init__(self, begin_string: str, size_bytes: int = 65_536, fields_max: int = 4096) -> None:
        begin = f"8={begin_string}\x019=".encode("ascii")
        if not 0 < len(begin_string) <= 16 or b"\x01" in begin[:-3]:
            raise ValueError(f"{begin_string!r} is no BeginString: 1 to 16 ASCII characters")
        if not 256 <= size_bytes <= BODY_BYTES_MAX:
            raise ValueError(f"size_bytes {size_bytes}: 256 to {BODY_BYTES_MAX}")
        self._begin = np.frombuffer(begin, np.uint8)
        self._memory = np.zeros(fields_max * FIELD.itemsize, np.uint8)
        self._fields: npt.NDArray[np.void] = self._memory.view(FIELD)
        self._rows = self._memory.data
        self._text = bytearray(size_bytes)
        self._text_array = np.frombuffer(self._text, np.uint8)
        self._out = np.zeros(size_bytes + 2 * SLACK_BYTES, np.uint8)
        self._count = self._used = 0

    def begin(self, msg_type: str) -> None:
        """Start a message; what was not finished is forgotten."""
        self._count = self._used = 0
        self.text(35, msg_type)

    def _add(self, tag: int, kind: int, value: int, size: int = 0, decimals: int = 0) -> None:
        if self._count == len(self._fields) or self._used + size > len(self._text):
            raise EncodeError(tag, _REASONS[NO_ROOM])
        try:
            _FIELD.pack_into(self._rows, self._count * _FIELD.size, value, tag, self._used, size, kind, decimals)
        except struct.error:
            raise EncodeError(tag, _REASONS[OUT_OF_RANGE]) from None
        self._count += 1

    def text(self, tag: int, value: str | bytes) -> None:
        """A field of text; a str is written as Latin-1 (UTF-8 belongs into data fields).

        Raises:
            EncodeError: it cannot be written, or there is no room.
        """
        try:
            raw = value if isinstance(value, bytes) else value.encode("latin-1")
        except UnicodeEncodeError:
            raise EncodeError(tag, "has characters beyond Latin-1: send it as data, with MessageEncoding (347)") from None
        self._bytes(tag, TEXT, 0, raw)

    def _bytes(self, tag: int, kind: int, value: int, raw: bytes) -> None:
        self._add(tag, kind, value, len(raw))
        self._text[self._used : self._used + len(raw)] = raw
        self._used += len(raw)

    def number(self, tag: int, value: int) -> None:
        """An integer: a quantity, a sequence, the count of a group.

        Raises:
            EncodeError: as :meth:`text`.
        """
        self._add(tag, NUMBER, value)

    def decimal(self, tag: int, value: int, decimals: int) -> None:
        """``value * 10**-decimals``, without zeros at the end: an event's price is ``decimal(44, price, 9)``.

        Raises:
            EncodeError: as :meth:`text`.
        """
        self._add(tag, DECIMAL, value, 0, decimals)

    def time(self, tag: int, ns: int, decimals: int = 9) -> None:
        """A UTCTimestamp of ns since 1970, cut to 0, 3, 6 or 9 decimals.

        Raises:
            EncodeError: as :meth:`text`.
        """
        self._add(tag, TIME, ns, 0, decimals)

    def data(self, length_tag: int, tag: int, value: bytes) -> None:
        """A data field, in which any byte may stand, with its length field before it.

        Raises:
            EncodeError: as :meth:`text`.
        """
        self._bytes(tag, DATA, length_tag, value)

    def finish(self) -> memoryview:
        """The message, in the encoder's memory: valid until the next :meth:`finish`.

        Raises:
            EncodeError: a field cannot be written.
        """
        first, end, faulty = _encode(self._begin, self._fields, self._count, self._text_array, self._out)
        if first < 0:
            raise EncodeError(int(self._fields[int(faulty)]["tag"]), _REASONS[int(first)])
        return self._out.data[int(first) : int(end)]
