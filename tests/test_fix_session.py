"""FIX sessions without sockets: two that talk over a transport that loses and spoils, what a restart keeps, what bad input does."""

from __future__ import annotations

import random
import resource
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fix_conversations import Time
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tickmesh.node.fix_frame import PARTIAL, WHOLE
from tickmesh.node.fix_scan import ALONE, scan_messages, who_of
from tickmesh.node.fix_session import (
    Ended,
    Event,
    LoggedOn,
    Received,
    SequenceReset,
    Session,
    SessionOptions,
    build_message,
    parse_message,
    timestamp_ns,
    utc_timestamp,
)
from tickmesh.node.fix_store import FileStore, MemoryStore, Store, StoreError
from tickmesh.transports.byte_masks import SLACK_BYTES

INITIATOR = SessionOptions(begin_string="FIX.4.4", sender="ONE", target="TWO", initiator=True, heartbeat_s=10)
ACCEPTOR = SessionOptions(begin_string="FIX.4.4", sender="TWO", target="ONE", initiator=False)


class End:
    """One side: a session over the connections of a test, what its application got, and a store that outlives the session."""

    def __init__(self, options: SessionOptions, store: Store, time: Time) -> None:
        self.options, self.store, self.time = options, store, time
        self.session = Session(options, store, time.clock)
        self.got: list[bytes] = []
        self.events: list[Event] = []
        self.sent = 0

    def take(self, events: list[Event]) -> None:
        self.events += events
        for event in events:
            if isinstance(event, Received) and not event.admin:
                self.got += [message.get(58) or b"" for message in event.messages()]

    def say(self) -> None:
        self.sent += 1
        self.session.send("B", [(148, b"News"), (58, b"%d of " % self.sent + self.options.sender.encode())])

    def restart(self) -> None:
        self.session = Session(self.options, self.store, self.time.clock)


class Wire:
    """A connection: bytes on their way in both directions."""

    def __init__(self, one: End, two: End, rng: random.Random, spoiled: float = 0.0) -> None:
        self.ends, self.rng, self.spoiled = (one, two), rng, spoiled
        self.under_way = [bytearray(), bytearray()]
        one.session.connect()
        two.session.connect()

    def step(self) -> None:
        """Each side says what it has to, and gets some of what is under way."""
        for k, end in enumerate(self.ends):
            data = bytearray(end.session.take_output(self.rng.choice((64, 1 << 18))))
            if data and self.rng.random() < self.spoiled:
                data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(7)
            self.under_way[k] += data
        for k, end in enumerate(self.ends):
            coming = self.under_way[1 - k]
            size = self.rng.randint(0, len(coming)) if self.rng.random() < 0.5 else len(coming)
            if size and not end.session.closing:
                end.take(end.session.receive(bytes(coming[:size])))
            del coming[:size]
            end.take(end.session.tick())

    @property
    def over(self) -> bool:
        return any(end.session.closing for end in self.ends)

    def cut(self) -> None:
        """Whatever is under way is lost."""
        for end in self.ends:
            end.take(end.session.disconnected())


def converse(one: End, two: End, rng: random.Random, *, connections: int, spoiled: float) -> None:
    """Some connections that end anywhere, then one that is left in peace until all is said."""
    time = one.time
    for _ in range(connections):
        wire = Wire(one, two, rng, spoiled)
        for _ in range(rng.randint(1, 40)):
            for end in (one, two):
                if rng.random() < 0.4:
                    end.say()
            wire.step()
            time.passed_ns += rng.choice((0, 1_000_000, 500_000_000))
            if wire.over:
                break
        wire.cut()
        for end in (one, two):
            if rng.random() < 0.3:
                end.say()
            if rng.random() < 0.3:
                end.restart()
    for _ in range(3):  # a connection may end for what the one before did
        wire = Wire(one, two, rng)
        for _ in range(400):
            wire.step()
            time.passed_ns += 200_000_000
            if wire.over:
                break
        if not wire.over:
            break
        wire.cut()


def spoken(end: End) -> list[bytes]:
    return [b"%d of " % (n + 1) + end.options.sender.encode() for n in range(end.sent)]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), connections=st.integers(0, 6), spoiled=st.sampled_from([0.0, 0.0, 0.1]))
@example(seed=1, connections=6, spoiled=0.2)
def test_every_message_comes_once_and_in_order_whatever_the_transport_loses(seed: int, connections: int, spoiled: float) -> None:
    time = Time()
    one, two = End(INITIATOR, MemoryStore(), time), End(ACCEPTOR, MemoryStore(), time)
    converse(one, two, random.Random(seed), connections=connections, spoiled=spoiled)
    assert one.session.logged_on, one.events[-3:]
    assert two.session.logged_on, two.events[-3:]
    assert two.got == spoken(one)
    assert one.got == spoken(two)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_with_stores_on_disk_too_and_small_queues(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    time, folder = Time(), tmp_path_factory.mktemp("stores")
    stores = [FileStore(folder / name, force=False) for name in ("one", "two")]
    one, two = End(replace(INITIATOR, queue_bytes_max=300), stores[0], time), End(ACCEPTOR, stores[1], time)
    converse(one, two, random.Random(seed), connections=3, spoiled=0.05)
    for store in stores:
        store.close()
    again = [FileStore(folder / name, force=False) for name in ("one", "two")]
    assert two.got == spoken(one)
    assert one.got == spoken(two)
    assert [(s.next_out, s.next_in) for s in again] == [(s.next_out, s.next_in) for s in stores]
    for store in again:
        store.close()


def pair(
    one: SessionOptions = INITIATOR, two: SessionOptions = ACCEPTOR, stores: tuple[Store, Store] | None = None
) -> tuple[End, End, Wire, Time]:
    """Two sides, connected, and what they said first exchanged."""
    time, (a, b) = Time(), stores or (MemoryStore(), MemoryStore())
    ends = End(one, a, time), End(two, b, time)
    wire = Wire(*ends, random.Random(1))
    steps(wire)
    return *ends, wire, time


def steps(wire: Wire, count: int = 12) -> None:
    for _ in range(count):
        wire.step()


def ended(end: End) -> list[Ended]:
    return [event for event in end.events if isinstance(event, Ended)]


# ---------------------------------------------------------------- logging on


def test_both_sides_of_fixt_log_on_and_exchange_messages() -> None:
    one, two, wire, _ = pair(
        replace(INITIATOR, begin_string="FIXT.1.1", appl_version="9", username="me", password="secret"),
        replace(ACCEPTOR, begin_string="FIXT.1.1", appl_version="9", username="me", password="secret"),
    )
    one.say()
    two.say()
    steps(wire)
    assert (one.got, two.got) == ([b"1 of TWO"], [b"1 of ONE"])
    logon = next(event.message for event in two.events if isinstance(event, LoggedOn))
    assert (logon.get(1137), logon.get(554)) == (b"9", b"secret")


@pytest.mark.parametrize("version", ["FIX.4.2", "FIX.4.3", "FIX.5.0"])
def test_other_versions(version: str) -> None:
    one, two, wire, _ = pair(replace(INITIATOR, begin_string=version), replace(ACCEPTOR, begin_string=version))
    one.say()
    steps(wire)
    assert two.got == [b"1 of ONE"]


def test_a_wrong_password_is_refused_without_a_word() -> None:
    one, two, _, _ = pair(replace(INITIATOR, username="me", password="guess"), replace(ACCEPTOR, username="me", password="secret"))
    assert two.session.closing
    assert ended(two)[0].refused
    assert "password" in ended(two)[0].reason
    assert (two.store.next_out, two.store.next_in) == (1, 1)
    assert not one.got
    assert "guess" not in repr(one.options)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({98: b"1"}, "EncryptMethod"),
        ({108: b"-3"}, "HeartBtInt"),
        ({108: b"100000"}, "HeartBtInt"),
        ({108: None}, "HeartBtInt"),
        ({56: b"THREE"}, "CompID"),
        ({49: b"THREE"}, "CompID"),
        ({52: b"20010101-00:00:00"}, "SendingTime"),
        ({52: b"yesterday"}, "SendingTime"),
        ({34: b"x"}, "malformed"),
        ({35: b"0"}, "no Logon"),
        ({8: b"FIX.4.2"}, "speaks FIX.4.2"),
        ({141: b"Y", 34: b"7"}, "ResetSeqNumFlag"),
    ],
)
def test_logons_that_are_refused(fields: dict[int, bytes | None], reason: str) -> None:
    time = Time()
    two = End(ACCEPTOR, MemoryStore(), time)
    two.session.connect()
    two.take(two.session.receive(message(time, {35: b"A", 34: b"1", 98: b"0", 108: b"30"} | fields)))
    assert two.session.closing
    assert ended(two)[0].refused
    assert reason in ended(two)[0].reason


def message(time: Time, fields: dict[int, bytes | None], sender: bytes = b"ONE", target: bytes = b"TWO") -> bytes:
    """A message of the initiator; None leaves a field out."""
    every = {35: b"0", 34: b"2", 49: sender, 52: time.stamp().encode(), 56: target} | fields
    begin = every.pop(8, None) or b"FIX.4.4"
    return build_message(begin.decode(), [(tag, value) for tag, value in every.items() if value is not None])


def test_a_low_sequence_in_a_logon_is_told_and_refused() -> None:
    store = MemoryStore()
    store.set_next_in(10)
    one, two, _, _ = pair(stores=(MemoryStore(), store))
    assert "expecting 10 but received 1" in ended(two)[0].reason
    assert ended(one)[0].refused
    assert "expecting 10 but received 1" in ended(one)[0].reason


def test_a_reset_at_logon_begins_both_sequences_anew() -> None:
    stores = MemoryStore(), MemoryStore()
    stores[0].set_next_out(40)
    stores[1].set_next_in(12)
    one, two, wire, _ = pair(replace(INITIATOR, reset="logon"), stores=stores)
    one.say()
    steps(wire)
    assert two.got == [b"1 of ONE"]
    assert [event.reset for event in two.events if isinstance(event, LoggedOn)] == [True]
    assert (one.store.next_out, two.session.expected) == (3, 3)


def test_a_second_logon_ends_the_session() -> None:
    _, two, _, time = pair()
    two.take(two.session.receive(message(time, {35: b"A", 34: b"2", 98: b"0", 108: b"30"})))
    assert "logged on" in ended(two)[0].reason


def test_nobody_logs_on_in_time() -> None:
    time = Time()
    two = End(ACCEPTOR, MemoryStore(), time)
    two.session.connect()
    time.passed_ns += 9_000_000_000
    assert not two.session.tick()
    time.passed_ns += 1_000_000_000
    two.take(two.session.tick())
    assert "no Logon within 10 s" in ended(two)[0].reason


# ---------------------------------------------------------------- a session that stands


def test_a_silent_peer_is_asked_and_then_given_up() -> None:
    one, two, _, time = pair()
    two.session.take_output()
    for _ in range(130):
        time.passed_ns += 200_000_000
        two.take(two.session.tick())
    said = two.session.take_output()
    assert said.count(b"\x0135=1\x01") == 1
    assert said.count(b"\x0135=0\x01") == 1
    assert "nothing has come for 24 s" in ended(two)[0].reason
    assert one.session.logged_on


def test_logging_out_is_answered() -> None:
    one, two, wire, _ = pair()
    one.session.logout("the day is over")
    steps(wire)
    assert ended(one) == [Ended("the peer has logged out", clean=True)]
    assert ended(two) == [Ended("the day is over", clean=True)]


def test_a_logout_without_an_answer_ends_too() -> None:
    one, _, _, time = pair()
    one.session.logout()
    time.passed_ns += 2_000_000_000
    one.take(one.session.tick())
    assert one.session.closing
    assert not ended(one)[0].clean


def test_plain_messages_go_on_in_one_piece() -> None:
    one, two, wire, _ = pair()
    for _ in range(50):
        one.say()
    two.events.clear()
    two.take(two.session.receive(one.session.take_output()))
    (event,) = two.events
    assert isinstance(event, Received)
    assert (event.first, event.count) == (2, 50)
    assert len(two.got) == 50
    assert two.store.next_in == 2
    two.session.take_output()
    assert two.store.next_in == 52
    wire.cut()


def test_a_sequence_reset_says_what_may_be_lost() -> None:
    _, two, _, time = pair()
    two.take(two.session.receive(message(time, {35: b"4", 34: b"1", 36: b"9"})))
    assert SequenceReset(2, 8) in two.events
    assert two.session.expected == 9


def test_a_resend_that_does_not_come_is_asked_for_again_and_then_given_up() -> None:
    _, two, _, time = pair()
    two.session.take_output()
    two.take(two.session.receive(message(time, {34: b"5"})))
    number = 5
    for _ in range(100):
        time.passed_ns += 1_000_000_000
        number += 1
        two.take(two.session.receive(message(time, {34: b"%d" % number})))
        two.take(two.session.tick())
        if two.session.closing:
            break
    assert two.session.take_output().count(b"\x0135=2\x01") == 3
    assert "did not come" in ended(two)[0].reason


def test_what_waits_for_a_gap_is_bounded() -> None:
    _, two, _, time = pair(two=replace(ACCEPTOR, queue_bytes_max=2000))
    for number in range(5, 400):
        two.take(two.session.receive(message(time, {34: b"%d" % number, 35: b"B", 148: b"x"})))
    assert 0 < two.session.queued_bytes <= 2000
    assert not two.session.closing


def test_a_peer_that_reads_too_slowly_is_let_go() -> None:
    one, two, wire, _ = pair(replace(INITIATOR, output_bytes_max=5000))
    for _ in range(200):
        one.say()
    one.take(one.session.tick())
    assert "too slowly" in ended(one)[0].reason
    wire.cut()
    steps(again := Wire(one, two, random.Random(2)), 40)
    assert not again.over
    assert two.got == spoken(one)


def test_many_resend_requests_do_not_fill_memory() -> None:
    one, two, _, time = pair()
    for _ in range(100):
        two.say()
    two.session.take_output()
    asked = b"".join(message(time, {35: b"2", 34: b"%d" % (2 + k), 7: b"1", 16: b"0"}) for k in range(200))
    two.take(two.session.receive(asked))
    assert "too many resend requests" in ended(two)[0].reason
    assert one.session.logged_on


@pytest.mark.parametrize(
    "fields", [{7: b"0", 16: b"0"}, {7: b"x", 16: b"0"}, {7: b"1"}, {16: b"0"}, {7: b"99999999999999999999", 16: b"0"}]
)
def test_senseless_resend_requests_are_rejected(fields: dict[int, bytes | None]) -> None:
    _, two, _, time = pair()
    two.take(two.session.receive(message(time, {35: b"2", **fields})))
    assert b"\x0135=3\x01" in two.session.take_output()
    assert two.session.expected == 3


def test_data_fields_may_hold_separators() -> None:
    _, two, _, time = pair()
    text = b"a\x0110=000\x018=FIX.4.4\x01z"
    two.take(two.session.receive(message(time, {35: b"B", 148: b"x", 95: b"%d" % len(text), 96: text, 58: b"behind"})))
    assert two.got == [b"behind"]


@settings(max_examples=60, deadline=None)
@given(garbage=st.one_of(st.binary(max_size=300), st.lists(st.sampled_from(
    [b"8=FIX.4.4\x01", b"9=5\x01", b"9=999999\x01", b"9=12\x01", b"35=0\x01", b"34=2\x01", b"10=000\x01", b"8=", b"8=FIX", b"\x01", b"="]
), max_size=12).map(b"".join)), logged_on=st.booleans())  # fmt: skip
def test_no_bytes_upset_a_session(garbage: bytes, logged_on: bool) -> None:
    time = Time()
    two = End(ACCEPTOR, MemoryStore(), time)
    two.session.connect()
    if logged_on:
        two.take(two.session.receive(message(time, {35: b"A", 34: b"1", 98: b"0", 108: b"30"})))
    two.take(two.session.receive(garbage))
    two.take(two.session.tick())
    two.session.take_output()
    if logged_on and not two.session.closing:
        for n in range(2, 22):  # more bytes than any body length covers
            two.take(two.session.receive(message(time, {35: b"B", 34: b"%d" % n, 58: b"x" * 60_000})))
        assert two.session.closing or two.session.expected > 2 or b"\x0135=2\x01" in two.session.take_output()


def test_an_endless_header_is_cut_off_before_the_logon_and_after() -> None:
    time = Time()
    two = End(ACCEPTOR, MemoryStore(), time)
    two.session.connect()
    begun = b"8=FIX.4.4\x019=900000\x0135=A\x01" + b"58=x\x01" * 4000
    two.take(two.session.receive(begun))
    assert "garbled" in ended(two)[0].reason
    _, two, _, time = pair()
    two.take(two.session.receive(b"8=FIX.4.4\x019=900000\x0135=0\x01" + b"58=x\x01" * 300_000))
    assert two.session.counters["garbled"] > 0
    two.take(two.session.receive(message(time, {})))
    assert two.session.expected == 3


# ---------------------------------------------------------------- stores


def test_a_store_remembers(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "s")
    store.append(None)
    store.append(b"second")
    store.set_next_in(7)
    store.sync()
    store.close()
    again = FileStore(tmp_path / "s")
    assert (again.next_out, again.next_in, again.message(1), again.message(2)) == (3, 7, None, b"second")
    again.reset()
    again.close()
    third = FileStore(tmp_path / "s")
    assert (third.next_out, third.next_in, third.message(2)) == (1, 1, None)
    third.close()


@given(cut=st.integers(1, 400))
@settings(max_examples=30, deadline=None)
def test_a_log_cut_off_anywhere_at_its_end_is_read_up_to_there(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("store") / "s"
    store = FileStore(folder, force=False)
    for n in range(1, 11):
        store.append(b"message %d" % n)
    store.close()
    (log,) = folder.glob("*.log")
    whole = log.read_bytes()
    log.write_bytes(whole[: max(0, len(whole) - cut)])
    again = FileStore(folder, force=False)
    assert 1 <= again.next_out <= 10
    assert all(again.message(n) == b"message %d" % n for n in range(1, again.next_out))
    again.append(b"new")
    assert again.message(again.next_out - 1) == b"new"
    again.close()


def test_a_store_is_bounded_and_its_newest_messages_are_kept(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "s", 64_000, force=False)
    for n in range(1, 3001):
        store.append(b"%0100d" % n)
        store.set_next_in(n)
    assert sum(path.stat().st_size for path in (tmp_path / "s").iterdir()) < 80_000
    kept = [n for n in range(1, 3001) if store.message(n)]
    assert kept == list(range(kept[0], 3001))
    assert len(kept) > 200
    store.close()
    again = FileStore(tmp_path / "s", 64_000, force=False)
    assert (again.next_out, again.next_in) == (3001, 3000)
    assert [n for n in range(1, 3001) if again.message(n)] == kept
    again.close()


def test_stores_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "s", 4096, force=False)
    with pytest.raises(StoreError, match="another process uses it"):
        FileStore(tmp_path / "s")
    for n in range(200):
        store.append(b"%0100d" % n)
    store.close()
    first = min((tmp_path / "s").glob("*.log"))
    spoiled = bytearray(first.read_bytes())
    spoiled[100] ^= 1
    first.write_bytes(spoiled)
    with pytest.raises(StoreError, match="damaged at byte"):
        FileStore(tmp_path / "s")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be used"):
        FileStore(tmp_path / "file")


def test_a_session_goes_on_from_its_store(tmp_path: Path) -> None:
    """A process that is killed: what it sent is sent again, and what it got does not come again."""
    one, two, wire, _ = pair(stores=(FileStore(tmp_path / "one"), FileStore(tmp_path / "two")))
    for _ in range(5):
        one.say()
        two.say()
    wire.ends[0].session.take_output()  # it left, and was lost
    steps(wire, 2)
    for end in (one, two):
        end.store.close()
    stores = FileStore(tmp_path / "one"), FileStore(tmp_path / "two")
    again = End(INITIATOR, stores[0], one.time), End(ACCEPTOR, stores[1], one.time)
    steps(Wire(*again, random.Random(3)), 30)
    assert two.got + again[1].got == spoken(one)
    assert one.got + again[0].got == spoken(two)
    for store in stores:
        store.close()


# ---------------------------------------------------------------- the scan


HEADER = {34, 35, 43, 49, 50, 52, 56, 57, 97, 115, 116, 122, 128, 129, 142, 143, 144, 145, 369, 627, 1128}
NOON_NS = 1_714_564_800_000_000_000


def slow_run(messages: list[bytes], expected: int, earliest_ns: int, latest_ns: int) -> int:
    """How many of the messages may go on unread, by Python."""
    for count, raw in enumerate(messages):
        found = parse_message(raw)
        assert found is not None
        head: list[tuple[int, bytes]] = []
        for tag, value in found.fields[2:-1]:
            if tag not in HEADER:
                break
            head.append((tag, value))
        tags, values = [tag for tag, _ in head if tag in (34, 35, 43, 49, 52, 56)], dict(head)
        sent_ns = timestamp_ns(values.get(52))
        plain = sorted(tags) == [34, 35, 49, 52, 56] and all(value for _, value in head) and found.type not in list("012345A")
        plain = plain and (values[49], values[56], found.fields[0][1]) == (b"ONE", b"TWO", b"FIX.4.4")
        plain = plain and values[34].isdigit() and int(values[34]) == expected + count
        if not plain or sent_ns is None or not earliest_ns <= sent_ns <= latest_ns:
            return count
    return len(messages)


_VALUES = {
    34: [b"1", b"77", b"12345678901", b"x", b""], 49: [b"ONE", b"ONES", b"ON", b""], 56: [b"TWO", b"THREE"], 43: [b"Y", b"N"],
    52: [b"20240501-12:00:00", b"20240501-12:00:00.123456789", b"20240501-12:00:00.123456789012", b"20240501", b"20240501-25:00:00"],
    57: [b"DESK", b""], 97: [b"Y"], 58: [b"text"], 55: [b"MSFT"],
}  # fmt: skip
_TIMES = ["20240501-12:00:00.5"] * 6 + ["20240501-12:02:01", "20240501-11:57:59", "20240501-12:01:60", "20240501-12:00:00.5000000000001"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(
    st.sampled_from(["W", "X", "X", "AE", "8", "0", "A", "TOOLONGTYPE"]),
    st.lists(st.sampled_from([34, 49, 56, 52, 43, 57, 97, 58, 55]), max_size=3), st.integers(0, 12), st.randoms(use_true_random=False),
), max_size=6), st.integers(0, 20))  # fmt: skip
def test_the_scan_says_what_its_twin_says(parts: list[tuple[str, list[int], int, random.Random]], cut: int) -> None:
    messages = []
    for number, (kind, tags, whim, rng) in enumerate(parts):
        sequence = 5 + number + (whim == 1)
        usual = [(34, b"%d" % sequence), (49, b"ONE"), (52, rng.choice(_TIMES).encode()), (56, b"TWO")] if whim else []
        fields = [(35, kind.encode()), *usual, *((tag, rng.choice(_VALUES[tag])) for tag in tags if whim < 4)]
        messages.append(build_message("FIX.4.4" if whim != 2 else "FIX.4.2", fields))
    data = b"".join(messages)
    data = data[: len(data) - cut]
    whole = [raw for k, raw in enumerate(messages) if sum(map(len, messages[: k + 1])) <= len(data)]
    buffer, stops = np.zeros(len(data) + SLACK_BYTES, np.uint8), np.zeros(8, np.int64)
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    near = 120_000_000_000
    count, at, what, stop = scan_messages(buffer, 0, len(data), who_of("FIX.4.4", "ONE", "TWO"), 5, NOON_NS - near, NOON_NS + near, stops)
    assert count == slow_run(whole, 5, NOON_NS - near, NOON_NS + near)
    ends = np.cumsum([len(raw) for raw in whole]).tolist()
    assert stops[:count].tolist() == ends[:count]
    assert at == (ends[count - 1] if count else 0)
    assert what == (ALONE if count < len(whole) else PARTIAL if at < len(data) else WHOLE)
    assert stop == (ends[count] if count < len(whole) else at)


@given(st.integers(0, 4_000_000_000_000_000_000), st.sampled_from([0, 3, 6, 9]))
def test_times_come_back(ns: int, decimals: int) -> None:
    assert timestamp_ns(utc_timestamp(ns, decimals)) == ns // 10 ** (9 - decimals) * 10 ** (9 - decimals)


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        (b"20240501-12:00:00.123456789012", 123_456_789),
        (b"20240501-11:59:60", 0),
        (b"20240501-11:60:00", None), (b"20240501-12:00:00.", None), (b"20240501-12:00:00.1_2", None), (b"20240501-12:00:0 ", None),
        (b"20240230-12:00:00", None), (b"20240501-24:00:00", None), (b"20240501-12:00:00.1234567890123", None), (b"", None), (None, None),
    ],
)  # fmt: skip
def test_times_that_are_none_and_times_finer_than_ours(text: bytes | None, ns: int | None) -> None:
    assert timestamp_ns(text) == (None if ns is None else NOON_NS + ns)


# ---------------------------------------------------------------- hostile and odd peers


def test_what_is_not_handled_is_not_noted() -> None:
    """A tick, and what is sent, while somebody is still busy with events, must not say that they have been handled."""
    one, two, _, _ = pair()
    two.session.take_output()
    assert two.store.next_in == 2
    one.say()
    events = two.session.receive(one.session.take_output())
    two.session.handling += 1
    two.session.tick()
    two.say()
    two.session.take_output()
    assert two.store.next_in == 2
    two.take(events)
    two.session.handling -= 1
    two.session.tick()
    assert two.store.next_in == 3


def test_a_connection_that_ends_in_the_middle_of_handling_has_it_sent_again() -> None:
    one, two, wire, _ = pair()
    one.say()
    lost = two.session.receive(one.session.take_output())
    assert any(isinstance(event, Received) for event in lost)
    two.session.handling += 1
    wire.cut()
    assert two.store.next_in == 2
    steps(Wire(one, two, random.Random(4)), 30)
    assert two.got == spoken(one)


def test_a_stranger_resets_nothing_by_being_cut_off() -> None:
    time, store = Time(), MemoryStore()
    store.set_next_in(40)
    store.set_next_out(30)
    two = End(replace(ACCEPTOR, reset="disconnect", username="me", password="secret"), store, time)
    two.session.connect()
    two.take(two.session.receive(message(time, {35: b"A", 34: b"1", 98: b"0", 108: b"30"})))
    two.take(two.session.disconnected())
    assert ended(two)[0].refused
    assert (store.next_in, store.next_out) == (40, 30)


@pytest.mark.parametrize("kind", [b"0", b"1", b"3", b"4", b"8"])
def test_a_sequence_that_is_too_low_ends_the_session_whatever_the_message(kind: bytes) -> None:
    _, two, _, time = pair()
    two.take(two.session.receive(message(time, {35: kind, 34: b"1", 112: b"x", 7: b"1", 16: b"0", 45: b"1", 36: b"5", 123: b"Y"})))
    assert "expecting 2 but received 1" in ended(two)[0].reason


def test_a_resend_of_a_long_history_is_one_gap_fill_at_once() -> None:
    one, two, _, time = pair()
    two.store.set_next_out(3_000_000_000)
    two.say()
    two.session.take_output()
    two.take(two.session.receive(message(time, {35: b"2", 34: b"2", 7: b"1", 16: b"0"})))
    out = two.session.take_output()
    assert (out.count(b"\x0135=4\x01"), out.count(b"\x0135=B\x01"), out.count(b"\x0136=3000000000\x01")) == (1, 1, 1)
    assert one.session.logged_on


def test_messages_go_on_while_others_are_sent_again() -> None:
    """A range is asked for while live messages come in both directions: all come once, in order."""
    one, two, wire, time = pair()
    for n in range(300):
        one.say()
        two.say()
        if n % 100 == 50:
            one.session.take_output(1)  # some of it is lost
            two.session.take_output(1)
        wire.step()
    for _ in range(200):
        wire.step()
        time.passed_ns += 100_000_000
    assert (two.got, one.got) == (spoken(one), spoken(two))
    assert one.session.counters["resent"] > 0


def test_garbled_messages_are_ignored_up_to_a_bound() -> None:
    _, two, _, time = pair()
    garbled = b"8=FIX.4.4\x019=5\x0135=0\x0110=000\x01"
    two.take(two.session.receive(garbled * 256))
    two.take(two.session.receive(message(time, {35: b"B", 34: b"2", 58: b"good"})))
    assert (two.got, two.session.counters["garbled"]) == ([b"good"], 256)
    two.take(two.session.receive(garbled * 300))
    assert two.session.counters["garbled"] == 513
    assert "garbled" in ended(two)[0].reason


@pytest.mark.parametrize("body", [[(58, b"a\x0110=000\x018=FIX.4.4")], [(95, b"3"), (58, b"a\x01b"), (96, b"x")]])
def test_a_separator_in_a_value_is_refused(body: list[tuple[int, bytes]]) -> None:
    one, _, _, _ = pair()
    before = one.store.next_out
    with pytest.raises(ValueError, match="holds a separator"):
        one.session.send("B", body)
    assert one.store.next_out == before
    one.session.send("B", [(95, b"3"), (96, b"a\x01b"), (58, b"text")])


# ---------------------------------------------------------------- NextExpectedMsgSeqNum


def expecting(stores: tuple[Store, Store]) -> tuple[End, End, Wire, Time]:
    return pair(replace(INITIATOR, next_expected=True), replace(ACCEPTOR, next_expected=True), stores)


def test_what_each_side_lacks_comes_without_being_asked_for() -> None:
    stores = MemoryStore(), MemoryStore()
    one, two, wire, _ = expecting(stores)
    wire.cut()
    for _ in range(4):
        one.say()
        two.say()
    again = Wire(one, two, random.Random(5))
    steps(again, 30)
    assert (two.got, one.got) == (spoken(one), spoken(two))
    for end in (one, two):
        assert end.session.counters["resend_requests_sent"] == 0
    one.say()
    steps(again)
    assert two.got == spoken(one)


def test_a_peer_that_expects_more_than_was_sent_is_refused() -> None:
    time = Time()
    two = End(replace(ACCEPTOR, next_expected=True), MemoryStore(), time)
    two.session.connect()
    two.take(two.session.receive(message(time, {35: b"A", 34: b"1", 98: b"0", 108: b"30", 789: b"5"})))
    assert "789" in ended(two)[0].reason
    assert ended(two)[0].refused


def test_a_peer_that_says_what_it_expects_and_then_sends_nothing_is_asked() -> None:
    time = Time()
    two = End(replace(ACCEPTOR, next_expected=True), MemoryStore(), time)
    two.session.connect()
    two.take(two.session.receive(message(time, {35: b"A", 34: b"4", 98: b"0", 108: b"3", 789: b"1"})))
    out = two.session.take_output()
    assert b"\x01789=1\x01" in out
    assert b"\x0135=2\x01" not in out
    time.passed_ns += 5_000_000_000
    two.take(two.session.tick())
    assert b"\x017=1\x01" in two.session.take_output()


# ---------------------------------------------------------------- a store that is cut off anywhere


def test_a_log_that_a_crash_cuts_off_at_any_byte_is_a_beginning_of_what_was_written(tmp_path: Path) -> None:
    """Every kind of record, over several segments: whatever the last bytes are, what is read is a state that once was."""
    folder = tmp_path / "s"
    store = FileStore(folder, 8 * 4096, force=False)
    states: list[tuple[int, int, int]] = [(1, 1, 1)]

    def note() -> None:
        states.append((store.next_out, store.next_in, store.oldest))

    for n in range(60):
        store.append(None if n % 5 == 0 else b"%0200d" % n)
        note()
        if n % 3 == 0:
            store.set_next_in(n + 2)
            note()
        if n == 20:
            store.reset()
            note()
        if n == 30:
            store.set_next_out(1000)
            note()
    store.close()
    newest = max(folder.glob("*.log"))
    assert len(list(folder.glob("*.log"))) > 2
    whole = newest.read_bytes()
    for cut in range(len(whole)):
        for tail in (b"", bytes(24)):
            newest.write_bytes(whole[:cut] + tail)
            again = FileStore(folder, 8 * 4096, force=False)
            assert (again.next_out, again.next_in, again.oldest) in states
            assert again.dropped_bytes <= len(whole) + len(tail)
            again.append(b"new")
            assert again.message(again.next_out - 1) == b"new"
            again.close()


def test_a_full_disk_is_said_and_uses_up_no_sequence(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "s", force=False)
    store.append(b"first")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = max((tmp_path / "s").glob("*.log")).stat().st_size
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, limit[1]))
        with pytest.raises(StoreError, match="make room"):
            store.append(b"x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert store.next_out == 2
    store.append(b"second")
    store.close()
    again = FileStore(tmp_path / "s", force=False)
    assert (again.next_out, again.message(2)) == (3, b"second")
    again.close()
