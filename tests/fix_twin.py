"""FIX decoding once more, slow and plain: what :mod:`tickmesh.node.fix_decoder` must say of any bytes, without `fields` of a source."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from tickmesh.node.event import ALL_INSTRUMENTS, ASK, BID, NO_PRICE, NO_SIDE, Flag, Kind
from tickmesh.node.fix_frame import DATA_PAIRS as DATA

BODY_MAX = 1 << 20
TYPES = {"W": "snapshot", "X": "incremental", "8": "execution_report", "f": "security_status", "d": "security_definition",
         "y": "security_list", "S": "quote", "AE": "trade_report", "0": "heartbeat", "1": "test_request", "2": "resend_request",
         "3": "reject", "4": "sequence_reset", "5": "logout", "A": "logon"}  # fmt: skip
CLASSES = ("W", "X", "8", "f", "d", "y", "S", "AE")
HEADER = {34, 49, 52, 43, 122}
MEMBERS = {"W": {269, 270, 271, 272, 273, 346, 54, 278}, "X": {269, 270, 271, 272, 273, 346, 54, 278, 279, 55, 280}, "y": {55, 969}}
DELIMITER = {"W": 269, "X": 279, "y": 55}
COUNT = {"W": 268, "X": 268, "y": 146}
BODY = {"": {36, 123}, "W": {55, 60}, "X": {60}, "8": {55, 54, 31, 32, 17, 37, 60, 150, 20, 19}, "f": {55, 326, 60}, "d": {55, 969, 60},
        "y": {60}, "S": {55, 132, 133, 134, 135, 60}, "AE": {55, 31, 32, 571, 487, 572, 60}}  # fmt: skip
STATUS = {3: 1, 17: 1, 23: 1, 2: 2, 4: 2, 1: 3, 5: 3, 15: 4, 16: 4, 21: 5, 27: 5, 18: 6, 19: 6, 26: 6, 22: 7, 24: 7, 25: 7}
DATE_YEARS = range(1970, 2201)


class Bad(Exception):
    """A message, an entry or a value that is refused, by its reason."""


def decimal(text: bytes, decimals: int) -> int:
    if not re.fullmatch(rb"-?(\d+\.?\d*|\.\d+)", text):
        raise Bad("bad_number")
    scaled = Decimal(text.decode()).scaleb(decimals)
    if abs(scaled.to_integral_value(rounding="ROUND_DOWN")) >= 1 << 63:
        raise Bad("number_too_large")
    if scaled != scaled.to_integral_value():
        raise Bad("too_precise")
    return int(scaled)


def whole(text: bytes) -> int:
    if not re.fullmatch(rb"\d+", text) or int(text) >= 1 << 63:
        raise Bad("bad_number" if not re.fullmatch(rb"\d+", text) else "number_too_large")
    return int(text)


def day_ns(text: bytes) -> int:
    try:
        day = datetime.date(int(text[:4]), int(text[4:6]), int(text[6:8])) if re.fullmatch(rb"\d{8}", text) else None
    except ValueError:
        day = None
    if day is None or day.year not in DATE_YEARS:
        raise Bad("bad_time")
    return (day - datetime.date(1970, 1, 1)).days * 86_400 * 10**9


def clock_ns(text: bytes) -> int:
    found = re.fullmatch(rb"(\d\d):(\d\d):(\d\d)(?:\.(\d{1,12}))?", text)
    if not found or int(found[1]) > 23 or int(found[2]) > 59 or int(found[3]) > 60:
        raise Bad("bad_time")
    seconds = (int(found[1]) * 60 + int(found[2])) * 60 + int(found[3])
    return seconds * 10**9 + int((found[4] or b"")[:9].ljust(9, b"0"))


def timestamp(text: bytes) -> int:
    if len(text) < 17 or text[8:9] != b"-":
        raise Bad("bad_time")
    return day_ns(text[:8]) + clock_ns(text[9:])


def _mix(x: int) -> int:
    full = (1 << 64) - 1
    x = ((x ^ (x >> 32)) * 0xFF51AFD7ED558CCD) & full
    x = ((x ^ (x >> 29)) * 0xC4CEB9FE1A85EC53) & full
    return x ^ (x >> 32)


def identity(text: bytes) -> int:
    if re.fullmatch(rb"\d{1,18}", text):
        return int(text)
    h = len(text)
    for at in range(0, len(text), 8):
        h = _mix(h ^ int.from_bytes(text[at : at + 8], "little"))
    return h & ((1 << 62) - 1) | 1 << 62


# ---------------------------------------------------------------- framing


def frame(data: bytes, p: int) -> tuple[str, int]:
    """``("", end)`` of a whole message at p; ``("partial", p)``; or a reason, and from where to look for the next begin."""
    head = re.compile(rb"8=FIX(?:\.[45]\.|T\.1)").match(data, p)
    if not head:
        begins = data[p : p + 5] == b"8=FIX"
        whole_starts = (b"8=FIX.4.", b"8=FIX.5.", b"8=FIXT.1")
        if len(data) - p < 8 and any(s.startswith(data[p:]) for s in whole_starts):
            return "partial", p
        return ("bad_begin_string" if begins else "garbage"), p + begins
    at = p + (11 if data[p + 5 : p + 6] == b"T" else 10)
    if len(data) - p < 20:
        return "partial", p
    if data[at - 1] != 1 or data[at : at + 2] != b"9=":
        return ("bad_header" if data[at - 1] == 1 else "bad_begin_string"), p + 1
    found = re.compile(rb"(\d{1,7})\x01").match(data, at + 2)
    if not found or not 5 <= int(found[1]) <= BODY_MAX:
        return "bad_body_length", p + 1
    body, stop = found.end(), found.end() + int(found[1])
    if data[body : body + 3] != b"35=" and body + 3 <= len(data):
        return "bad_header", p + 1
    if stop + 7 > len(data):
        return "partial", p
    if data[stop : stop + 3] != b"10=" or data[stop - 1] != 1:
        return "bad_body_length", p + 1
    if data[stop + 3 : stop + 7] != b"%03d\x01" % (sum(data[p:stop]) % 256):
        return "bad_checksum", stop
    return "", stop + 7


def fields_of(body: bytes) -> Iterator[tuple[int, bytes]]:
    """Fields of a body; data fields are honoured behind their length field only."""
    p = 0
    while p < len(body):
        found = re.compile(rb"([1-9]\d{0,6})=([^\x01]*)\x01").match(body, p)
        if not found:
            raise Bad("bad_tag")
        tag, p = int(found[1]), found.end()
        if tag in DATA:
            follows = re.compile(rb"([1-9]\d{0,6})=").match(body, p)
            if follows and int(follows[1]) == DATA[tag]:
                size = int(found[2]) if re.fullmatch(rb"\d+", found[2]) else -1
                end = follows.end() + size
                if size < 0 or size > BODY_MAX or end >= len(body) or body[end] != 1:
                    raise Bad("bad_data_length")
                p = end + 1
                continue
        yield tag, found[2]


def parts_of(kind: str, fields: Iterator[tuple[int, bytes]]) -> tuple[dict[int, bytes], list[dict[int, bytes]]]:
    """The mapped fields of the body, and of the group's entries."""
    known = kind if kind in CLASSES else ""
    members = MEMBERS.get(known, set())
    of_body = HEADER | BODY[known] | ({COUNT[known]} if known in COUNT else set())
    body: dict[int, bytes] = {}
    rows: list[dict[int, bytes]] = []
    for tag, value in fields:
        if tag in members:
            if tag == DELIMITER[known]:
                rows.append({})
            elif not rows and tag != 55:
                raise Bad("group_order")
        elif tag not in of_body:
            continue
        place = rows[-1] if tag in members and rows else body
        if tag in place:
            raise Bad("repeated_tag")
        place[tag] = value
    if known in COUNT:
        told = body.get(COUNT[known])
        if (told is None and rows) or (told is not None and not (re.fullmatch(rb"\d+", told) and int(told) == len(rows))):
            raise Bad("bad_group_count")
    return body, rows


# ---------------------------------------------------------------- events


@dataclass
class FixTwin:
    """State and results of a decoding; `tick` in 1e-9 and `exponent` are those of every instrument."""

    tick: int
    exponent: int
    events: list[tuple[Any, ...]] = field(default_factory=list)
    malformed: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    symbols: dict[bytes, int] = field(default_factory=dict)
    expected: int = 0
    sender: bytes | None = None
    in_garbage: bool = False

    def decode(self, data: bytes) -> FixTwin:
        """All of a recording."""
        p = 0
        while p < len(data):
            why, end = frame(data, p)
            if why:
                p = self._skip(data, p, why, end)
                continue
            self.in_garbage = False
            try:
                self._message(data[p:end])
            except Bad as error:
                self.malformed[str(error)] += 1
            p = end
        return self

    def _skip(self, data: bytes, p: int, why: str, begin: int) -> int:
        begin = max(begin, p + (why != "garbage"))
        found = re.compile(rb"8=FIX|8=FI\Z|8=F\Z|8=\Z|8\Z").search(data, begin)
        after = found.start() if found else len(data)
        between = data[p:after].lstrip(b"\r\n")
        if why == "garbage":
            plain = len(between) <= 128 and re.fullmatch(rb"[ -~]*", between)
            if not self.in_garbage and not plain:
                self.malformed["garbage"] += 1
                self.in_garbage = True
            return after
        self.malformed["truncated" if why == "partial" else why] += 1
        self.in_garbage = True
        return after

    def _message(self, raw: bytes) -> None:
        body = raw[raw.index(b"\x01", raw.index(b"\x019=") + 1) + 1 : -7]
        kind = body[3 : body.index(b"\x01")].decode("latin-1")
        parts, rows = parts_of(kind, fields_of(body))
        self.messages[TYPES.get(kind, "other")] += 1
        self._header(kind, parts, rows)

    def _header(self, kind: str, body: dict[int, bytes], rows: list[dict[int, bytes]]) -> None:
        if not {34, 49, 52} <= set(body):
            raise Bad("missing_field")
        sender = body[49][:8] + b"|" + body[49][-8:] if len(body[49]) > 8 else body[49]
        numeric = re.fullmatch(rb"\d+", body[34]) and int(body[34]) < 1 << 63
        if numeric and kind not in TYPES and sender == self.sender and int(body[34]) == self.expected:
            self.expected += 1
            return
        self.sent = timestamp(body[52])
        if not numeric:
            raise Bad("bad_number")
        self.seq, self.ts = int(body[34]), self.sent
        if 60 in body and kind in CLASSES:
            try:
                self.ts = timestamp(body[60])
            except Bad as error:
                self.malformed[str(error)] += 1
        elif 122 in body and body.get(43, b"")[:1] == b"Y":
            try:
                self.ts = timestamp(body[122])
            except Bad as error:
                self.malformed[str(error)] += 1
        if self._sequence(kind, sender, body) and kind in CLASSES:
            self._use(kind, body, rows)

    def _sequence(self, kind: str, sender: bytes, body: dict[int, bytes]) -> bool:
        if self.sender is None:
            if kind not in CLASSES:
                return True
            self.sender = sender
        elif sender != self.sender:
            return True
        if self.expected and self.seq < self.expected and body.get(43, b"")[:1] == b"Y":
            return False
        seq, following = self.seq, self.seq + 1
        if kind == "4" and 36 in body:
            if not re.fullmatch(rb"\d+", body[36]) or int(body[36]) >= 1 << 63:
                return True
            following = int(body[36])
            seq = seq if body.get(123, b"")[:1] == b"Y" else following
        before, self.expected = self.expected, following
        if before and seq != before:
            first, last = (before, seq - 1) if seq > before else (0, 0)
            self._gap(ALL_INSTRUMENTS, seq, self.ts, first, last)
        return True

    def _put(
        self, kind: Kind, instrument: int, side: int, flags: int, ts: int, price: int = 0, qty: int = 0, id: int = 0, aux: int = 0
    ) -> None:
        self.events.append((self.seq, ts, self.sent, instrument, int(kind), side, flags, price, qty, id, aux))

    def _gap(self, instrument: int, seq: int, ts: int, first: int = 0, last: int = 0) -> None:
        self._put(Kind.GAP, instrument, NO_SIDE, 0, ts, 0, last - first + 1 if last else 0, first, last)

    def _instrument(self, symbol: bytes) -> int | None:
        if not symbol or len(symbol) > 24 or symbol[:8].strip(b"\0") == b"":
            self.malformed["bad_symbol"] += 1
            return None
        padded = symbol.ljust(24, b"\0")
        key = padded.rstrip(b"\0")
        if key not in self.symbols:
            if not re.fullmatch(rb"[!-~]+", symbol):
                self.malformed["bad_symbol"] += 1
                return None
            self.symbols[key] = len(self.symbols)
            words = [int.from_bytes(padded[k : k + 8], "little") for k in (0, 8, 16)]
            qty, aux = (w - (1 << 64) if w >> 63 else w for w in (words[0], words[2]))
            number = self.symbols[key]
            self._put(Kind.REFERENCE, number, self.exponent, 0, self.ts, self.tick, qty, words[1], aux)
        return self.symbols[key]

    def _use(self, kind: str, body: dict[int, bytes], rows: list[dict[int, bytes]]) -> None:
        if kind in ("W", "X"):
            self._market_data(kind, body, rows)
        elif kind == "y":
            for row in rows:
                if 55 in row:
                    self._instrument(row[55])
                else:
                    self.malformed["missing_field"] += 1
        elif 55 not in body:
            raise Bad("missing_field")
        else:
            instrument = self._instrument(body[55])
            if instrument is not None:
                uses = {"8": self._execution, "AE": self._report, "f": self._status, "S": self._quote}
                uses.get(kind, lambda *_: None)(instrument, body)

    # ---- market data

    def _market_data(self, kind: str, body: dict[int, bytes], rows: list[dict[int, bytes]]) -> None:
        instrument = self._instrument(body[55]) if 55 in body else None
        snapshot = int(Flag.SNAPSHOT) if kind == "W" else 0
        last: tuple[int, int] | None = None
        if kind == "W":
            if 55 not in body:
                raise Bad("missing_field")
            if instrument is None:
                return
            if not rows or any(row[269] in (b"0", b"1", b"J") for row in rows):
                self._put(Kind.CLEAR, instrument, NO_SIDE, snapshot, self.ts)
                last = (len(self.events) - 1, instrument)
        text = b""
        for row in rows:
            if kind == "X" and 55 in row and (row[55] != text or instrument is None):
                instrument, text = self._instrument(row[55]), row[55]
            if instrument is None:
                if 55 not in row and kind == "X":
                    self.malformed["unknown_instrument"] += 1
                continue
            made = self._entry(kind, instrument, row, snapshot)
            if made:
                if last and last[1] == instrument:
                    event = self.events[last[0]]
                    self.events[last[0]] = (*event[:6], event[6] | int(Flag.MORE), *event[7:])
                last = (len(self.events) - 1, instrument)

    def _entry(self, kind: str, instrument: int, row: dict[int, bytes], flags: int) -> bool:
        """Whether it made an event of the book."""
        what = chr(row[269][0]) if len(row.get(269, b"")) == 1 else "" if 269 in row else None
        action = "0" if kind == "W" else row[279].decode("latin-1") if len(row[279]) == 1 else ""
        ts = self.ts
        if 272 in row and 273 in row and not (kind == "W" and what != "2"):
            try:
                ts = day_ns(row[272]) + clock_ns(row[273])
            except Bad as error:
                self.malformed[str(error)] += 1
        if what == "2":
            self._trade(instrument, row, action, ts, flags, 270, 271, 278, None)
            return False
        if what in ("0", "1"):
            try:
                price, qty = self._level(instrument, row, action)
            except Bad as error:
                self.malformed[str(error)] += 1
                self._gap(instrument, self.seq, ts)
                return False
            orders = 0
            if re.fullmatch(rb"\d+", row.get(346, b"")) and int(row[346]) < 1 << 63:
                orders = int(row[346])
            self._put(Kind.LEVEL, instrument, int(what), flags, ts, price, qty, 0, orders)
            return True
        if what == "J":
            if kind == "X":
                self._put(Kind.CLEAR, instrument, NO_SIDE, flags, ts)
            return kind == "X"
        if what is None or what in ("", "\0"):
            self.malformed["unknown_type" if what == "" else "missing_field"] += 1
            self._gap(instrument, self.seq, ts)
        return False

    def _level(self, instrument: int, row: dict[int, bytes], action: str) -> tuple[int, int]:
        if action not in ("0", "1", "2"):
            raise Bad("unsupported_action")
        if 270 not in row:
            raise Bad("missing_field")
        price = decimal(row[270], 9)
        return price, 0 if action == "2" else self._qty(row, 271)

    def _qty(self, row: dict[int, bytes], tag: int) -> int:
        if tag not in row:
            raise Bad("missing_field")
        value = decimal(row[tag], self.exponent)
        if value < 0:
            raise Bad("bad_number")
        return value

    def _trade(
        self, instrument: int, row: dict[int, bytes], action: str, ts: int, flags: int,
        price_tag: int, qty_tag: int, id_tag: int, aux_tag: int | None,
    ) -> None:  # fmt: skip
        number = identity(row[id_tag]) if id_tag in row else 0
        if action == "2":
            self._put(Kind.BREAK, instrument, NO_SIDE, flags, ts, id=number)
            return
        try:
            if action != "0":
                raise Bad("unsupported_action")
            if price_tag not in row:
                raise Bad("missing_field")
            price, qty = decimal(row[price_tag], 9), self._qty(row, qty_tag)
        except Bad as error:
            self.malformed[str(error)] += 1
            return
        side = {b"1": BID, b"2": ASK, b"5": ASK, b"6": ASK}.get(row.get(54, b""), NO_SIDE)
        self._put(Kind.TRADE, instrument, side, flags, ts, price, qty, number, identity(row[aux_tag]) if aux_tag and aux_tag in row else 0)

    # ---- other messages

    def _execution(self, instrument: int, body: dict[int, bytes]) -> None:
        kind, change = body.get(150, b"F"), body.get(20, b"0")
        fill = kind == b"F" or (kind in (b"1", b"2") and 20 in body)
        if kind == b"H" or (fill and change == b"1"):
            self._put(Kind.BREAK, instrument, NO_SIDE, 0, self.ts, id=identity(body[19]) if 19 in body else 0)
        elif fill and change == b"0":
            self._trade(instrument, body, "0", self.ts, 0, 31, 32, 17, 37)

    def _report(self, instrument: int, body: dict[int, bytes]) -> None:
        change = body.get(487, b"0")
        if change == b"1":
            self._put(Kind.BREAK, instrument, NO_SIDE, 0, self.ts, id=identity(body[572]) if 572 in body else 0)
        elif change == b"0":
            self._trade(instrument, body, "0", self.ts, 0, 31, 32, 571, None)

    def _status(self, instrument: int, body: dict[int, bytes]) -> None:
        code = body.get(326)
        if code is None or not re.fullmatch(rb"\d+", code) or int(code) >= 1 << 63:
            raise Bad("missing_field" if code is None else "bad_status")
        self._put(Kind.STATUS, instrument, NO_SIDE, 0, self.ts, aux=STATUS.get(int(code), 0))

    def _quote(self, instrument: int, body: dict[int, bytes]) -> None:
        sides = []
        for price_tag, qty_tag in ((132, 134), (133, 135)):
            price = decimal(body[price_tag], 9) if price_tag in body else NO_PRICE
            qty = self._qty(body, qty_tag) if qty_tag in body else 0
            sides.append((NO_PRICE, 0) if price == NO_PRICE or (qty_tag in body and qty == 0) else (price, qty))
        (bid, bid_qty), (ask, ask_qty) = sides
        self._put(Kind.QUOTE, instrument, NO_SIDE, 0, self.ts, bid, bid_qty, ask_qty, ask)
