"""A FIX session without a socket: bytes in, events and bytes out, for the initiator and the acceptor.

:class:`Session` keeps the rules of the session level: logon, heartbeats and test requests, sequences in both directions with resend
requests, gap fills and resets, possible duplicates, rejects, logout. It reads no clock and opens nothing: a :class:`Clock` and a store
(:mod:`tickmesh.node.fix_store`) are handed in, and :mod:`tickmesh.node.fix_tcp` carries the bytes.

Every message comes once and in order, as :class:`Received`. Plain application messages in sequence are not looked at one by one: they go
on as the bytes that came, in one piece, for the compiled decoder. What comes too early waits, within a bound, until the gap is filled.

Source: FIX 4.4 volume 2, "Session protocol"; FIXT 1.1; the session test cases of the FIX Trading Community (volume 2, appendix).
"""

from __future__ import annotations

import hmac
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from enum import Enum
from typing import Literal

import numpy as np
import numpy.typing as npt

from tickmesh.node.fix_dictionary import Dictionary, Rejection, RejectReason
from tickmesh.node.fix_frame import BODY_BYTES_MAX, DATA_PAIRS, PARTIAL, TRAILER_BYTES, WHOLE, Message
from tickmesh.node.fix_scan import ALONE, scan_messages, who_of
from tickmesh.node.fix_store import Store
from tickmesh.transports.byte_masks import SLACK_BYTES

Fields = Sequence[tuple[int, bytes]]

LOGON_BYTES_MAX = 8192
"""Most bytes before a logon."""
HEARTBEAT_S_MAX = 86_400
_FRAME_BYTES_MAX = BODY_BYTES_MAX + 64
_ROWS = 256
_OUTPUT_BYTES = 1 << 18
_RESENDS_MAX = 16
_ASKS_MAX = 3
_ASK_AGAIN_S = 5.0
_TEST_AFTER, _GIVE_UP_AFTER = 1.2, 2.4
"""Heartbeat intervals of silence after which a test request is sent, and after which the peer counts as gone."""
_SOH = b"\x01"
_S = 1_000_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_HEADER = frozenset({8, 9, 35, 34, 43, 49, 50, 52, 56, 57, 90, 91, 97, 115, 116, 122, 128, 129, 142, 143, 144, 145, 212, 213, 347, 369, 627,
                     628, 629, 630, 1128, 1129, 1156})  # fmt: skip
_ADMIN = frozenset("012345A")
_GARBLED_MAX = 256
"""Most garbled messages one after the other: a peer that sends more is let go."""
_TIMESTAMP = re.compile(rb"(\d{4})(\d\d)(\d\d)-([01]\d|2[0-3]):([0-5]\d):([0-5]\d|60)(?:\.(\d{1,12}))?")
_REVERSED = {115: 128, 116: 129, 144: 145, 128: 115, 129: 116, 145: 144}
_TEST_ID = b"TEST"
_COMP_ID, _SENDING_TIME = 9, 10
_TEXTS = {
    0: "Invalid tag number", 1: "Required tag missing", 2: "Tag not defined for this message type", 4: "Tag specified without a value",
    5: "Value is incorrect (out of range) for this tag", 6: "Incorrect data format for value", _COMP_ID: "CompID problem",
    _SENDING_TIME: "SendingTime accuracy problem", 11: "Invalid MsgType", 13: "Tag appears more than once",
    14: "Tag specified out of required order", 15: "Repeating group fields out of order",
    16: "Incorrect NumInGroup count for repeating group",
}  # fmt: skip
"""SessionRejectReason (373) in words, as the acceptance tests have them."""


@dataclass(frozen=True)
class Clock:
    """What time it is, in ns: `wall` since 1970, for SendingTime; `steady`, which never jumps, for everything that is due."""

    wall: Callable[[], int] = time.time_ns
    steady: Callable[[], int] = time.monotonic_ns


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """How a session is run.

    Attributes:
        begin_string: ``"FIX.4.2"``, ``"FIX.4.4"``, ``"FIXT.1.1"``.
        sender, target: our CompID and the peer's.
        initiator: whether we log on, or wait for a logon.
        appl_version: DefaultApplVerID (1137), FIXT only: ``"9"`` is FIX 5.0 SP2.
        heartbeat_s: HeartBtInt (108); the acceptor takes the initiator's. 0: none.
        reset: when both sequences begin at 1 again: never (but when the peer asks for it), with each logon, or with each lost connection.
        username, password: Username (553) and Password (554): an initiator sends them, an acceptor wants them.
        logon_fields: further fields of our Logon.
        next_expected: Logons carry NextExpectedMsgSeqNum (789, since FIX 4.4), by agreement with the peer: what one side lacks the other
            sends without being asked.
        sending_time_s: how far SendingTime (52) may be from our clock.
        logon_s, logout_s: how long the peer's Logon or Logout may take.
        dictionary: application messages are held against it, one by one; without it, only what the session level needs is checked.
        queue_bytes_max: most bytes of messages that wait for a gap to be filled; what has no room is asked for again.
        output_bytes_max: most bytes that wait to be sent; a peer that is slower is disconnected, and asks for the rest when it is back.
        decimals: of SendingTime: 0, 3, 6 or 9.
    """

    begin_string: str
    sender: str
    target: str
    initiator: bool
    appl_version: str = ""
    heartbeat_s: int = 30
    reset: Literal["never", "logon", "disconnect"] = "never"
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    logon_fields: Fields = ()
    next_expected: bool = False
    sending_time_s: float = 120.0
    logon_s: float = 10.0
    logout_s: float = 2.0
    dictionary: Dictionary | None = None
    queue_bytes_max: int = 4 << 20
    output_bytes_max: int = 16 << 20
    decimals: Literal[0, 3, 6, 9] = 3

    def __post_init__(self) -> None:
        for name, value in (("begin_string", self.begin_string), ("sender", self.sender), ("target", self.target)):
            if not value or not value.isascii() or not value.isprintable() or len(value) > 64:
                raise ValueError(f"{name} {value!r}: 1 to 64 printable ASCII characters")
        if not self.begin_string.startswith(("FIX.4.", "FIX.5.", "FIXT.1")):
            raise ValueError(f"begin_string {self.begin_string!r}: one of FIX.4.0 to FIX.4.4, FIXT.1.1")
        if not 0 <= self.heartbeat_s <= HEARTBEAT_S_MAX:
            raise ValueError(f"heartbeat_s {self.heartbeat_s}: 0 to {HEARTBEAT_S_MAX}")
        if self.begin_string.startswith("FIXT") != bool(self.appl_version):
            raise ValueError("appl_version: FIXT.1.1 needs one (9 is FIX 5.0 SP2), the others have none")


# ---------------------------------------------------------------- events


@dataclass(frozen=True)
class LoggedOn:
    """The session stands. `reset`: sequences begin anew, so what was subscribed to is forgotten."""

    message: Message
    reset: bool


@dataclass(frozen=True)
class Received:
    """Messages in sequence, each once.

    Attributes:
        data: their bytes, one after the other.
        first: MsgSeqNum of the first; `bounds` i64: where each ends in `data`.
        admin: a message of the session level (there is only one then), for who follows the sequence.
    """

    data: bytes
    first: int
    bounds: npt.NDArray[np.int64]
    admin: bool = False

    @property
    def count(self) -> int:
        """How many messages."""
        return len(self.bounds)

    def messages(self) -> Iterator[Message]:
        """Each with its fields."""
        start = 0
        for stop in self.bounds.tolist():
            message = parse_message(self.data[start:stop])
            assert message is not None, "a message that came through is well formed"
            yield message
            start = stop


@dataclass(frozen=True)
class SequenceReset:
    """The peer went on at a later sequence without a gap fill: messages `first` to `last` may have been lost."""

    first: int
    last: int


@dataclass(frozen=True)
class Ended:
    """The session is over until the next connection.

    Attributes:
        reason: why, in words.
        clean: both sides have logged out.
        refused: the peer did not let us in, or we it.
    """

    reason: str
    clean: bool = False
    refused: bool = False


Event = LoggedOn | Received | SequenceReset | Ended


# ---------------------------------------------------------------- messages as bytes


def parse_message(raw: bytes, data_pairs: dict[int, int] = DATA_PAIRS) -> Message | None:
    """A message's fields, tags that no version has among them (to be rejected by number); None if it is garbled.

    `data_pairs`: length field -> data field, in which any byte may stand.
    """
    pieces = raw.split(_SOH)
    if pieces.pop():
        return None
    fields: list[tuple[int, bytes]] = []
    at = 0
    while at < len(pieces):
        name, equals, value = pieces[at].partition(b"=")
        at += 1
        if not equals or not name.removeprefix(b"-").isdigit() or len(name) > 9:
            return None
        tag = int(name)
        announced = fields[-1] if fields else (0, b"")
        if data_pairs.get(announced[0]) == tag and announced[1].isdigit() and len(announced[1]) < 8:
            length = int(announced[1])
            while len(value) < length and at < len(pieces):
                value += _SOH + pieces[at]
                at += 1
            if len(value) != length:
                return None
        fields.append((tag, value))
    return Message(raw, tuple(fields)) if len(fields) >= 4 and fields[2][0] == 35 else None


def build_message(begin_string: str, fields: Iterable[tuple[int, bytes]]) -> bytes:
    """The bytes of a message: `fields` begin with MsgType (35); what is around them is added."""
    body = b"".join(b"%d=%b\x01" % pair for pair in fields)
    whole = b"8=%b\x019=%d\x01%b" % (begin_string.encode(), len(body), body)
    return whole + b"10=%03d\x01" % (sum(whole) & 0xFF)


def utc_timestamp(ns: int, decimals: int = 3) -> bytes:
    """A UTCTimestamp of ns since 1970."""
    seconds, rest = divmod(ns, _S)
    text = f"{_EPOCH + timedelta(seconds=seconds):%Y%m%d-%H:%M:%S}"
    return (f"{text}.{rest:09d}"[: 18 + decimals] if decimals else text).encode()


def timestamp_ns(text: bytes | None) -> int | None:
    """A UTCTimestamp as ns since 1970, picoseconds cut off; None if it is none. A leap second is the next minute's first."""
    found = _TIMESTAMP.fullmatch(text or b"")
    if found is None:
        return None
    year, month, day, hour, minute, second = (int(part) for part in found.groups()[:6])
    try:
        days = (date(year, month, day) - _EPOCH.date()).days
    except ValueError:
        return None
    return ((days * 24 + hour) * 3600 + minute * 60 + second) * _S + int((found[7] or b"")[:9].ljust(9, b"0"))


def whole_value(value: bytes | None) -> int | None:
    """A number without sign, or None."""
    return int(value) if value is not None and value.isdigit() and len(value) < 19 else None


@dataclass
class _Resend:
    """Messages to be sent again, `at` to `last`."""

    at: int
    last: int


class _State(Enum):
    IDLE = 0
    LOGGING_ON = 1
    ACTIVE = 2
    LOGGING_OUT = 3
    CLOSED = 4


class Session:
    """One session, over as many connections as it takes.

    :meth:`connect` begins a connection; then :meth:`receive` and :meth:`tick` give events, and :meth:`take_output` the bytes to be sent,
    until :attr:`closing`; :meth:`disconnected` ends it. Each call takes it that the events given out before have been handled, and notes
    so, unless :attr:`handling` says otherwise.

    Attributes:
        counters: what happened, by name: `received`, `sent`, `garbled`, `duplicates`, `early`, `rejects_sent`, `rejects_received`,
            `resend_requests_sent`, `resend_requests_received`, `resent`, `test_requests_sent`, `logons`, `logons_refused`, `timeouts`.
        closing: the connection is to be closed when all output has been sent.
        handling: how many lots of events somebody is still busy with; what is above 0 when the connection ends is asked for again.
    """

    def __init__(self, options: SessionOptions, store: Store, clock: Clock | None = None) -> None:
        self.options, self.store, self.clock = options, store, clock or Clock()
        self.counters: Counter[str] = Counter()
        self.closing = False
        self.handling = 0
        self._state = _State.IDLE
        self._who = who_of(options.begin_string, options.target, options.sender)
        self._pairs = {**DATA_PAIRS, **(options.dictionary.data_pairs if options.dictionary else {})}
        self._stops = np.zeros(_ROWS, np.int64)
        self._buffer = np.zeros(LOGON_BYTES_MAX + SLACK_BYTES, np.uint8)
        self._events: list[Event] = []
        self._output: deque[bytes | _Resend] = deque()
        self._queue: dict[int, tuple[bytes, bool]] = {}
        """Messages that came too early, and whether they have been handled, but for their sequence."""
        self._expected = store.next_in
        self._stood = False
        """The connection has had a logon."""
        self._heartbeat_ns = options.heartbeat_s * _S
        self._forget()

    def _forget(self) -> None:
        """Nothing of a connection is left."""
        self._first = self._end = 0
        self._output.clear()
        self._output_bytes = 0
        self._drop_queue()
        self._asked_until: int | None = None
        self._asks = self._garbled = 0
        self._ignoring = self._testing = False
        self._held_from: int | None = None
        self._heard_ns = self._said_ns = self._state_ns = self._asked_ns = self.clock.steady()

    # -- what is asked of it

    @property
    def logged_on(self) -> bool:
        """Whether messages go out at once."""
        return self._state is _State.ACTIVE

    @property
    def expected(self) -> int:
        """MsgSeqNum of the next message to be handled."""
        return self._expected

    @property
    def queued_bytes(self) -> int:
        """Bytes of messages that wait for a gap to be filled."""
        return self._queue_bytes

    # -- connections

    def connect(self) -> None:
        """A connection stands: an initiator logs on."""
        self._forget()
        self._expected = self.store.next_in
        self.closing = self._stood = False
        self.handling = 0
        self._set(_State.LOGGING_ON)
        if self.options.initiator:
            if self.options.reset == "logon":
                self._reset_sequences()
            self._send_logon(self.options.heartbeat_s, reset=self.options.reset == "logon", expected=self._expected)

    def disconnected(self) -> list[Event]:
        """The connection is gone."""
        if self._state not in (_State.IDLE, _State.CLOSED):
            self._end_with("the connection is lost")
        self._settle()
        self._set(_State.IDLE)
        self._forget()
        if self.options.reset == "disconnect" and (self.options.initiator or self._stood):
            self._reset_sequences()
        self._expected = self.store.next_in
        self.store.sync()
        return self._taken()

    def receive(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """Take bytes that came; give what they mean."""
        self._settle()
        rest = memoryview(data)
        while len(rest) and not self.closing:
            taken = self._fill(rest)
            rest = rest[taken:]
            self._scan()
        return self._taken()

    def tick(self) -> list[Event]:
        """Do what is due by now: call it several times a second."""
        self._settle()
        now = self.clock.steady()
        if self._state is _State.LOGGING_ON and now - self._state_ns >= self.options.logon_s * _S:
            self.counters["timeouts"] += 1
            self._close(f"no Logon within {self.options.logon_s:g} s", refused=True)
        elif self._state is _State.LOGGING_OUT and now - self._state_ns >= self.options.logout_s * _S:
            self._close("the peer does not answer our Logout")
        elif self._state in (_State.ACTIVE, _State.LOGGING_OUT) and self._heartbeat_ns:
            self._beat(now)
        if self._state is _State.ACTIVE and self._asked_until is not None:
            self._ask_again(now)
        return self._taken()

    def take_output(self, limit_bytes: int = _OUTPUT_BYTES) -> bytes:
        """Bytes to be sent, about `limit_bytes` of them; call it until it gives none. Sequences are on the disk when it returns."""
        self._settle()
        parts: list[bytes] = []
        size = 0
        while self._output and size < limit_bytes:
            head = self._output[0]
            if isinstance(head, _Resend):
                part = self._resend_step(head)
                if head.at > head.last:
                    self._output.popleft()
            else:
                part = head
                self._output.popleft()
                self._output_bytes -= len(part)
            parts.append(part)
            size += len(part)
        self.store.sync()
        return b"".join(parts)

    # -- sending

    def send(self, msg_type: str, body: Fields, header: Fields = ()) -> int:
        """Send an application message; while there is no logon it is kept, and sent when the peer asks for it.

        Args:
            body: fields in order, without a SOH in their values unless they are data behind their length.
            header: further fields of the header.

        Returns:
            Its MsgSeqNum.

        Raises:
            ValueError: a SOH in a value would end the field.
        """
        now = self.clock.wall()
        sequence = self.store.next_out
        raw = self._message(msg_type, sequence, body, now, header)
        self.store.append(raw)
        self.counters["sent"] += 1
        if self._state is _State.ACTIVE:
            self._put(raw)
        elif self._state is _State.LOGGING_ON and self._held_from is None:
            self._held_from = sequence
        return sequence

    def logout(self, text: str = "") -> None:
        """Begin to end the session; :class:`Ended` follows."""
        if self._state is _State.ACTIVE:
            self._send_logout(text)
            self._set(_State.LOGGING_OUT)
        elif self._state is _State.LOGGING_ON:
            self._close("we have logged out before the logon was answered")

    def reject(self, message: Message, reason: int, tag: int = 0, text: str = "") -> None:
        """Reject (35=3) a message for SessionRejectReason `reason`, about a tag (0: none)."""
        words = text or _TEXTS.get(reason, "Rejected")
        body = [(45, b"%d" % (whole_value(message.get(34)) or 0)), (58, words.encode("latin-1", "replace"))]
        if tag:
            body.append((371, b"%d" % tag))
        elif reason == RejectReason.INVALID_TAG:
            body.append((371, b"0"))
        body.append((372, message.fields[2][1] or b"?"))
        if reason <= 11 or self.options.begin_string != "FIX.4.2":
            body.append((373, b"%d" % reason))
        self.counters["rejects_sent"] += 1
        self._send_admin("3", body, _reverse_route(message))

    def business_reject(self, message: Message, reason: int, text: str) -> None:
        """BusinessMessageReject (35=j); reason 3: an unsupported message type."""
        sequence = message.get(34) or b"0"
        body = [(45, sequence), (58, text.encode("latin-1", "replace")), (372, message.fields[2][1]), (380, b"%d" % reason)]
        self.send("j", body, _reverse_route(message))

    def _message(self, kind: str, sequence: int, body: Fields, now_ns: int, header: Fields = ()) -> bytes:
        o = self.options
        for before, (tag, value) in zip(((0, b""), *body), body):
            if _SOH in value and self._pairs.get(before[0]) != tag:
                raise ValueError(f"field {tag}: {value!r} holds a separator, which only a data field behind its length may")
        head = [(34, b"%d" % sequence), (49, o.sender.encode()), (52, utc_timestamp(now_ns, o.decimals)), (56, o.target.encode()), *header]
        return build_message(o.begin_string, [(35, kind.encode()), *sorted(head, key=lambda pair: pair[0]), *body])

    def _send_admin(self, kind: str, body: Fields, header: Fields = ()) -> None:
        raw = self._message(kind, self.store.next_out, body, self.clock.wall(), header)
        self.store.append(None)
        self._put(raw)

    def _put(self, raw: bytes) -> None:
        self._said_ns = self.clock.steady()
        if self._output_bytes + len(raw) > self.options.output_bytes_max:
            self.counters["slow_peer"] += 1
            self._output.clear()
            self._output_bytes = 0
            self._close("the peer reads too slowly")
            return
        self._output.append(raw)
        self._output_bytes += len(raw)

    def _send_logon(self, heartbeat_s: int, *, reset: bool, expected: int) -> None:
        o = self.options
        body = [(98, b"0"), (108, b"%d" % heartbeat_s)]
        if reset:
            body.append((141, b"Y"))
        if o.next_expected:
            body.append((789, b"%d" % expected))
        if o.initiator and o.username is not None:
            body.append((553, o.username.encode("latin-1")))
        if o.initiator and o.password is not None:
            body.append((554, o.password.encode("latin-1")))
        if o.appl_version:
            body.append((1137, o.appl_version.encode()))
        self._send_admin("A", [*body, *o.logon_fields])

    def _send_logout(self, text: str) -> None:
        self._send_admin("5", [(58, text.encode("latin-1", "replace"))] if text else [])

    def _resend_step(self, job: _Resend) -> bytes:
        """The next message of a resend, or a gap fill for those that are not sent again."""
        first, store, now = job.at, self.store, self.clock.wall()
        raw = store.message(first)
        if raw is not None:
            job.at += 1
            self.counters["resent"] += 1
            return self._again(raw, now)
        job.at = max(job.at, min(store.oldest, job.last + 1))  # what is long gone is not looked for one by one
        while job.at <= job.last and store.message(job.at) is None:
            job.at += 1
        duplicate = [(43, b"Y"), (122, utc_timestamp(now, self.options.decimals))]
        return self._message("4", first, [(36, b"%d" % job.at), (123, b"Y")], now, duplicate)

    def _again(self, raw: bytes, now_ns: int) -> bytes:
        """A message that was sent before, as a possible duplicate."""
        message = parse_message(raw, self._pairs)
        assert message is not None, "we have built it"
        cut = next(k for k, (tag, _) in enumerate(message.fields) if tag not in _HEADER)
        head = dict(message.fields[3:cut])
        head |= {43: b"Y", 122: head[52], 52: utc_timestamp(now_ns, self.options.decimals)}
        return build_message(self.options.begin_string, [message.fields[2], *sorted(head.items()), *message.fields[cut:-1]])

    # -- the end

    def _set(self, state: _State) -> None:
        self._state, self._state_ns = state, self.clock.steady()

    def _end_with(self, reason: str, *, clean: bool = False, refused: bool = False) -> None:
        self._events.append(Ended(reason, clean, refused))
        self.closing = True
        self._set(_State.CLOSED)

    def _close(self, reason: str, *, clean: bool = False, refused: bool = False) -> None:
        """Close the connection when what is to be sent has been."""
        if self._state is not _State.CLOSED:
            self.counters["logons_refused"] += refused
            self._end_with(reason, clean=clean, refused=refused)

    def _fatal(self, text: str, *, refused: bool = False) -> None:
        """Say why in a Logout, and go."""
        self._send_logout(text)
        self._close(text, refused=refused)

    def _give_up(self, text: str = "") -> None:
        """Log out for a fault of the peer's: nothing but its Logout is looked at any more."""
        self._send_logout(text)
        self._ignoring = True
        self._set(_State.LOGGING_OUT)

    def _reset_sequences(self) -> None:
        self.store.reset()
        self._expected = 1
        self._drop_queue()
        self._asked_until = None
        self._output.clear()
        self._output_bytes = 0

    def _drop_queue(self) -> None:
        self._queue.clear()
        self._queue_bytes = 0

    # -- time

    def _beat(self, now: int) -> None:
        silent = now - self._heard_ns
        if silent >= _GIVE_UP_AFTER * self._heartbeat_ns:
            self.counters["timeouts"] += 1
            self._close(f"nothing has come for {silent / _S:.0f} s")
        elif silent >= _TEST_AFTER * self._heartbeat_ns:
            if not self._testing:
                self._testing = True
                self.counters["test_requests_sent"] += 1
                self._send_admin("1", [(112, _TEST_ID)])
        elif now - self._said_ns >= self._heartbeat_ns:
            self._send_admin("0", [])

    def _ask_again(self, now: int) -> None:
        """A resend request that leads nowhere is sent again, a few times."""
        if now - self._asked_ns < max(_ASK_AGAIN_S * _S, self._heartbeat_ns):
            return
        if self._asks >= _ASKS_MAX:
            self._fatal(f"messages from {self._expected} on were asked for {self._asks} times and did not come")
            return
        self._request_resend()

    # -- bytes in

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _settle(self) -> None:
        """What was given out before has been handled by now, if nobody is still at it."""
        if self.handling == 0 and self.store.next_in != self._expected:
            self.store.set_next_in(self._expected)

    def _fill(self, data: memoryview) -> int:
        """Copy bytes into the buffer; returns how many."""
        size = self._end - self._first
        if self._end + len(data) > len(self._buffer) - SLACK_BYTES:
            kept = self._buffer[self._first : self._end].copy()
            wanted = min(self._limit, 2 * (size + len(data))) + SLACK_BYTES
            if wanted > len(self._buffer):
                self._buffer = np.zeros(wanted, np.uint8)
            self._buffer[:size] = kept
            self._first, self._end = 0, size
        taken = min(len(data), len(self._buffer) - SLACK_BYTES - self._end)
        self._buffer[self._end : self._end + taken] = np.frombuffer(data[:taken], np.uint8)
        self._end += taken
        return taken

    def _scan(self) -> None:
        """Take every whole message of the buffer."""
        now, near = self.clock.wall(), int(self.options.sending_time_s * _S)
        while not self.closing:
            expected = self._expected if self._takes_runs else -1
            count, at, what, stop = scan_messages(
                self._buffer, self._first, self._end, self._who, expected, now - near, now + near, self._stops
            )
            if count:
                self._take_run(count, at)
            self._first = stop
            if what == ALONE:
                self._take(self._buffer[at:stop].tobytes())
            elif self._first == self._end:
                self._first = self._end = 0
                return
            elif what == PARTIAL and self._end - self._first < self._limit:
                return
            elif what != WHOLE:
                self._skip_garbled()

    @property
    def _takes_runs(self) -> bool:
        """Whether plain messages in sequence may go on unread."""
        return self._state is _State.ACTIVE and not self.options.dictionary and not self._queue and self._asked_until is None

    def _take_run(self, count: int, end: int) -> None:
        bounds = self._stops[:count] - self._first
        self._events.append(Received(self._buffer[self._first : end].tobytes(), self._expected, bounds))
        self._expected += count
        self.counters["received"] += count
        self._heard()

    @property
    def _limit(self) -> int:
        """Most bytes that a message may have now."""
        return LOGON_BYTES_MAX if self._state is _State.LOGGING_ON else _FRAME_BYTES_MAX

    def _skip_garbled(self) -> None:
        """What stands here is no message. A body length covers what it covers, up to the next checksum; else the search goes on."""
        if self._state is _State.LOGGING_ON:
            self._close("what came in place of a Logon is garbled", refused=True)
            return
        rest = self._buffer[self._first : self._end].tobytes()
        if rest[:2].strip(b"\r\n"):
            self._count_garbled()
        self._first += _garbled_size(rest)

    def _count_garbled(self) -> None:
        """One more is ignored, as FIX asks for; a peer that sends nothing else is let go."""
        self.counters["garbled"] += 1
        self._garbled += 1
        if self._garbled > _GARBLED_MAX:
            self._fatal(f"more than {_GARBLED_MAX} garbled messages one after the other")

    def _heard(self) -> None:
        self._heard_ns, self._testing, self._garbled = self.clock.steady(), False, 0

    # -- one message

    def _take(self, raw: bytes) -> None:
        message = parse_message(raw, self._pairs)
        if message is None:
            self._count_garbled()
            if self._state is _State.LOGGING_ON:
                self._close("what came in place of a Logon is garbled", refused=True)
            return
        self._heard()
        if self._state is _State.LOGGING_ON:
            self._first_message(message)
        elif message.fields[0][1].decode("latin-1") != self.options.begin_string:
            if not self._ignoring:
                self._give_up("Incorrect BeginString")
        elif not self._ignoring or message.type == "5":
            self._sequenced(message)

    def _sequenced(self, message: Message) -> None:
        sequence, kind = whole_value(message.get(34)), message.type
        if sequence is None:
            self._fatal("Required tag missing: MsgSeqNum (34)")
        elif kind == "5":
            self._logged_out(message, sequence)
        elif kind == "A" and message.get(141) == b"Y" and sequence == 1 and message.get(43) != b"Y":
            self._logon_again(message)
        elif kind == "4" and message.get(123) != b"Y":
            self._sequence_reset(message)
        elif sequence < self._expected and not (kind == "2" and message.get(43) != b"Y"):  # an old request is answered too
            self._late(message, sequence)
        elif kind == "2":
            self._resend_request(message, sequence)
            self._drain()
        elif sequence > self._expected:
            self._early(message.raw, sequence)
        else:
            self._in_sequence(message)
            self._drain()

    def _in_sequence(self, message: Message) -> None:
        """The message that was expected."""
        if not self._valid(message):
            self._advance(self._expected + 1)
            return
        kind = message.type
        if kind == "A":
            self._fatal("Logon, but the session is logged on")
            return
        if kind == "4":
            self._gap_fill(message)
            return
        if kind == "1":
            self._test_request(message)
        self.counters["rejects_received"] += kind == "3"
        self._give(message, admin=kind in _ADMIN)
        self._advance(self._expected + 1)

    def _give(self, message: Message, *, admin: bool) -> None:
        self.counters["received"] += not admin
        self._events.append(Received(message.raw, self._expected, np.array([len(message.raw)], np.int64), admin))

    def _advance(self, expected: int) -> None:
        self._expected = expected
        if self._asked_until is not None:
            self._asked_ns, self._asks = self.clock.steady(), 0
            if expected > self._asked_until:
                self._asked_until = None

    def _drain(self) -> None:
        """Handle what came too early, as far as it is in sequence now."""
        while self._expected in self._queue and not self.closing and not self._ignoring:
            raw, handled = self._queue.pop(self._expected)
            self._queue_bytes -= len(raw)
            message = parse_message(raw, self._pairs)
            assert message is not None, "it was read before"
            if handled:
                self._give(message, admin=True)
                self._advance(self._expected + 1)
            else:
                self._in_sequence(message)
        for sequence in [k for k in self._queue if k < self._expected]:
            self._queue_bytes -= len(self._queue.pop(sequence)[0])

    # -- checks

    def _valid(self, message: Message) -> bool:
        """Whether a message may be handled; else it has been rejected."""
        fault = self._fault(message)
        if fault is not None:
            reason = RejectReason.INVALID_TAG if fault.reason == RejectReason.UNDEFINED_TAG else fault.reason
            self.reject(message, reason, 0 if reason == RejectReason.INVALID_MSG_TYPE else fault.tag)
            return False
        problem = self._header_problem(message)
        if problem:
            self.reject(message, problem)
            self._give_up()
        return not problem

    def _fault(self, message: Message) -> Rejection | None:
        if self.options.dictionary is not None:
            return self.options.dictionary.check(message.fields)
        for tag, value in message.fields:
            if not value and (message.type in _ADMIN or tag in _HEADER):
                return Rejection(RejectReason.TAG_WITHOUT_VALUE, tag)
        for tag in (49, 56, 52):
            if message.get(tag) is None:
                return Rejection(RejectReason.REQUIRED_TAG_MISSING, tag)
        return None

    def _header_problem(self, message: Message) -> int:
        """What is wrong with CompIDs or SendingTime; 0: nothing."""
        o = self.options
        if message.get(49) != o.target.encode() or message.get(56) != o.sender.encode():
            return _COMP_ID
        sent = timestamp_ns(message.get(52))
        return _SENDING_TIME if sent is None or abs(sent - self.clock.wall()) > o.sending_time_s * _S else 0

    # -- sequences

    def _early(self, raw: bytes, sequence: int, *, handled: bool = False, ask: bool = True) -> None:
        """A message whose turn has not come yet waits, and those before it are asked for; not `ask`: they come of themselves."""
        self.counters["early"] += 1
        if sequence not in self._queue and self._queue_bytes + len(raw) <= self.options.queue_bytes_max:
            self._queue[sequence] = raw, handled
            self._queue_bytes += len(raw)
        if self._asked_until is None:
            self._asked_until = sequence - 1
            if ask:
                self._request_resend()
            else:
                self._asked_ns = self.clock.steady()

    def _request_resend(self) -> None:
        self._asks += 1
        self._asked_ns = self.clock.steady()
        self.counters["resend_requests_sent"] += 1
        last = b"999999" if self.options.begin_string in ("FIX.4.0", "FIX.4.1") else b"0"
        self._send_admin("2", [(7, b"%d" % self._expected), (16, last)])

    def _late(self, message: Message, sequence: int) -> None:
        """A message whose turn is over: a duplicate, or the end of the session."""
        if message.get(43) != b"Y":
            self._fatal(f"MsgSeqNum too low, expecting {self._expected} but received {sequence}")
            return
        original, sent = timestamp_ns(message.get(122)), timestamp_ns(message.get(52))
        if message.type == "4":
            self.counters["duplicates"] += 1
        elif original is None:
            self.reject(message, RejectReason.REQUIRED_TAG_MISSING, 122)
        elif sent is None or original > sent:
            self.reject(message, _SENDING_TIME)
            self._give_up()
        else:
            self.counters["duplicates"] += 1

    def _resend_request(self, message: Message, sequence: int) -> None:
        """Answered at once, whatever its sequence: two sides that wait for each other's resend would wait for ever."""
        valid = self._valid(message)
        first, last = whole_value(message.get(7)), whole_value(message.get(16))
        if valid and (first is None or first < 1 or last is None):
            self.reject(message, RejectReason.VALUE_INCORRECT, 7 if not first else 16)
        elif valid and first is not None:
            self._queue_resend(first, last or 0)
        if sequence == self._expected:
            if valid:
                self._give(message, admin=True)
            self._advance(sequence + 1)
        elif sequence > self._expected:
            self._early(message.raw, sequence, handled=True)

    def _queue_resend(self, first: int, last: int) -> None:
        newest = self.store.next_out - 1
        end = newest if last in (0, 999_999) or last > newest else last
        self.counters["resend_requests_received"] += 1
        if sum(isinstance(item, _Resend) for item in self._output) >= _RESENDS_MAX:
            self._fatal("too many resend requests at once")
        elif first <= end:
            self._said_ns = self.clock.steady()
            self._output.append(_Resend(first, end))

    def _gap_fill(self, message: Message) -> None:
        new = whole_value(message.get(36))
        if new is None or new <= self._expected:
            self.reject(message, RejectReason.VALUE_INCORRECT, 36)
            self._advance(self._expected + 1)
            return
        self._give(message, admin=True)
        self._advance(new)

    def _sequence_reset(self, message: Message) -> None:
        """SequenceReset that is no gap fill: for recovery from disasters, whatever its own sequence."""
        if not self._valid(message):
            return
        new, old = whole_value(message.get(36)), self._expected
        if new is None or new < old:
            self.reject(message, RejectReason.VALUE_INCORRECT)
            return
        self._give(message, admin=True)
        if new > old:
            self._events.append(SequenceReset(old, new - 1))
        self._advance(new)
        self._drain()

    # -- administrative messages

    def _test_request(self, message: Message) -> None:
        token = message.get(112)
        if token is None:
            self.reject(message, RejectReason.REQUIRED_TAG_MISSING, 112)
        else:
            self._send_admin("0", [(112, token)])

    def _logged_out(self, message: Message, sequence: int) -> None:
        text = (message.get(58) or b"").decode("latin-1")
        if not self._ignoring and not self._valid(message):
            self._advance(self._expected + (sequence == self._expected))
            return
        if sequence == self._expected:
            self._give(message, admin=True)
            self._advance(sequence + 1)
        if self._state is not _State.LOGGING_OUT:
            self._send_logout("")
        self._close(text or "the peer has logged out", clean=not self._ignoring)

    def _first_message(self, message: Message) -> None:
        """Has to be a Logon, and one that we can take."""
        if message.type == "5" and self.options.initiator:
            text = (message.get(58) or b"no reason is given").decode("latin-1")
            self._close(f"the peer has refused the logon ({text})", refused=True)
            return
        problem = self.logon_problem(message)
        if problem:
            self._close(problem, refused=True)  # who it is we do not know: nothing is said
            return
        wrong = self._logon_terms(message)
        if wrong:
            self._fatal(wrong, refused=True)
            return
        asked = message.get(141) == b"Y"
        sequence = whole_value(message.get(34)) or 0
        first_of_ours = self.store.next_out == 1 + self.options.initiator
        if asked and (sequence != 1 or (self.options.initiator and not first_of_ours)):
            self._fatal("ResetSeqNumFlag, but the sequences do not begin at 1", refused=True)
            return
        if self.options.initiator:
            self._expected = 1 if asked else self._expected
        elif asked or self.options.reset == "logon":
            self._reset_sequences()
        if sequence < self._expected:
            self._fatal(f"MsgSeqNum too low, expecting {self._expected} but received {sequence}", refused=True)
            return
        if self._lacking(message) > self.store.next_out:
            self._fatal(f"NextExpectedMsgSeqNum (789) too high, the next is {self.store.next_out}", refused=True)
            return
        self._log_on(message, sequence, asked or self.options.reset == "logon")

    def _lacking(self, message: Message) -> int:
        """First sequence of ours that the peer has not had: what its Logon says, or our next."""
        told = whole_value(message.get(789)) if self.options.next_expected else None
        return self.store.next_out if told is None else max(told, 1)

    def _log_on(self, message: Message, sequence: int, reset: bool) -> None:
        heartbeat_s, lacking, newest = whole_value(message.get(108)) or 0, self._lacking(message), self.store.next_out - 1
        self._heartbeat_ns = heartbeat_s * _S
        if not self.options.initiator:
            expected = self._expected + (sequence == self._expected)
            self._send_logon(heartbeat_s, reset=message.get(141) == b"Y", expected=expected)
        self._set(_State.ACTIVE)
        self._stood = True
        self.counters["logons"] += 1
        self._events.append(LoggedOn(message, reset))
        if self._held_from is not None and self.options.initiator:  # an acceptor's come before its Logon: they will be asked for
            lacking = min(lacking, self._held_from)
        self._held_from = None
        if lacking <= newest:
            self._output.append(_Resend(lacking, newest))
        if sequence == self._expected:
            self._give(message, admin=True)
            self._advance(sequence + 1)
        else:
            told = self.options.next_expected and message.get(789) is not None
            self._early(message.raw, sequence, handled=True, ask=not told)

    def logon_problem(self, message: Message) -> str:
        """Why a first message is not even answered; empty: it is. Changes nothing."""
        o = self.options
        if message.type != "A":
            return "the first message is no Logon"
        if message.fields[0][1] != o.begin_string.encode():
            return f"the peer speaks {message.fields[0][1].decode('latin-1')[:16]}, not {o.begin_string}"
        if self._fault(message) is not None or whole_value(message.get(34)) is None:
            return "the Logon is malformed"
        problem = self._header_problem(message)
        if problem:
            return f"the Logon has a {_TEXTS[problem]}"
        return "" if o.initiator or self._knows(message) else "the Logon has a wrong user or password"

    def _knows(self, message: Message) -> bool:
        """Whether user and password are those that an acceptor wants; takes the same time for all wrong ones."""
        o = self.options
        good = True
        for tag, wanted in ((553, o.username), (554, o.password)):
            if wanted is not None:
                good &= hmac.compare_digest(message.get(tag) or b"", wanted.encode("latin-1"))
        return good

    def _logon_terms(self, message: Message) -> str:
        """What of a logon we cannot agree to."""
        heartbeat = whole_value(message.get(108))
        if message.get(98) != b"0":
            return "EncryptMethod (98) must be 0"
        if heartbeat is None or heartbeat > HEARTBEAT_S_MAX:
            return f"HeartBtInt (108) must be 0 to {HEARTBEAT_S_MAX}"
        if self.options.appl_version and message.get(1137) != self.options.appl_version.encode():
            return f"DefaultApplVerID (1137) must be {self.options.appl_version}"
        return ""

    def _logon_again(self, message: Message) -> None:
        """A Logon with ResetSeqNumFlag in a session that stands: both sequences begin anew."""
        if not self._valid(message):
            return
        wrong = self._logon_terms(message)
        if wrong:
            self._fatal(wrong)
            return
        heartbeat_s = whole_value(message.get(108)) or 0
        self._reset_sequences()
        self._heartbeat_ns = heartbeat_s * _S
        self._send_logon(heartbeat_s, reset=True, expected=2)
        self._events.append(LoggedOn(message, True))
        self._give(message, admin=True)
        self._advance(2)


def _reverse_route(message: Message) -> list[tuple[int, bytes]]:
    """Header fields that lead an answer back to where a message came from."""
    return [(_REVERSED[tag], value) for tag, value in message.fields if tag in _REVERSED and value]


def _garbled_size(rest: bytes) -> int:
    """How many bytes of `rest` belong to the garbled message, or the garbage, that it begins with."""
    at = 0
    if rest.startswith(b"8=FIX"):
        head = rest[:32].split(_SOH)
        length = head[1].removeprefix(b"9=") if len(head) > 2 and head[1].startswith(b"9=") else b""
        if length.isdigit() and len(length) < 8:
            covered = len(head[0]) + len(head[1]) + 1 + int(length)
            trailer = rest.find(b"\x0110=", covered)
            end = rest.find(_SOH, trailer + 4) if trailer >= 0 else -1
            if 0 <= end < trailer + 4 + TRAILER_BYTES:
                return end + 1
        at = 1
    found = rest.find(b"8=FIX", at)
    if found >= 0:
        return found
    kept = next((k for k in range(min(4, len(rest)), 0, -1) if b"8=FIX".startswith(rest[-k:])), 0)
    return max(len(rest) - kept, at)


def warm() -> None:
    """Compile what a session runs."""
    from tickmesh.node.fix_scan import warm as warm_scan

    warm_scan()
