"""Frames of outputs over RDMA, without a card: what one side stages in its outbox lies in the other's inbox as the card would write it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node.book import apply_events, make_books, top
from tickmesh.node.event import ALL_INSTRUMENTS, ASK, BID, EVENT, NO_INSTRUMENT, NO_PRICE, NO_SIDE, Flag, Kind
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.rdma_events import (
    DAMAGED,
    FOREIGN,
    FRAME_EVENTS,
    NOTHING,
    TAKEN,
    X_DEPTH,
    X_DUPLICATES,
    X_EPOCH,
    X_EXPECTED,
    X_FILTERED,
    X_GAPS,
    X_MISSING,
    X_PRINTS,
    X_SHARD,
    X_SOURCE,
    X_SWEEP,
    X_UNKNOWN,
    Subscription,
    stage_outputs,
    take_frames,
)
from tickmesh.transports.rdma import (
    BAD_LINE,
    DEPTH,
    F_INLINE,
    F_SIGNALED,
    LINE_BYTES,
    S_COMPLETED,
    S_CONSUMED,
    S_DEPTH,
    S_FAILED,
    S_IN,
    S_KEY,
    S_LOCAL,
    S_LOCAL_KEY,
    S_OUT,
    S_POSTED,
    S_PUBLISHED,
    S_REAPED,
    S_REMOTE,
    S_STAGED,
    T_CONSUMED,
    T_PUBLISHED,
    WRITE,
    ChannelArrays,
    ChannelHeartbeats,
    ChannelSilent,
    channel_available,
    channel_can_post,
    channel_completed,
    channel_plan,
    channel_room,
)
from tickmesh.transports.ring import RECORD, Ring
from tickmesh.transports.toolbox import quick, zeros_aligned

RECORDS = 256
SOURCE, EPOCH, SHARD = 3, 7, 2


@quick
def stage(channel: Any, words: Any, slots: Any, position: Any, until: Any) -> Any:
    return stage_outputs(channel, words, slots, position, until, np.uint64(SHARD), np.uint64(EPOCH))


@quick
def take(channel: Any, events: Any, taking: Any, at: Any, out: Any) -> Any:
    return take_frames(channel, events, taking, at, out)


@quick
def plan(channel: Any, signal: Any) -> Any:
    return channel_plan(channel, signal) if channel_can_post(channel) else np.int64(0)


@quick
def room(channel: Any) -> Any:
    return channel_room(channel)


@quick
def available(channel: Any) -> Any:
    return channel_available(channel)


@quick
def complete(channel: Any, status: Any) -> None:
    channel_completed(channel, status)


class Wires:
    """Two channels whose rings are the same memory: a write is at once where it belongs."""

    def __init__(self, records: int = RECORDS) -> None:
        ring, self.line_of_sender, self.line_of_taker = (
            zeros_aligned(records, RECORD),
            zeros_aligned(8, np.uint64),
            zeros_aligned(8, np.uint64),
        )
        self.sender = self._channel(self.line_of_sender, zeros_aligned(64, RECORD), ring)
        self.taker = self._channel(self.line_of_taker, ring, zeros_aligned(64, RECORD))

    @staticmethod
    def _channel(told: Any, inbox: Any, outbox: Any) -> ChannelArrays:
        state = zeros_aligned(32, np.uint64)
        state[S_OUT], state[S_IN], state[S_DEPTH] = len(outbox), len(inbox), DEPTH
        state[S_REMOTE], state[S_KEY], state[S_LOCAL], state[S_LOCAL_KEY] = 1 << 40, 11, 1 << 30, 22
        signals, writes = np.zeros((DEPTH, 2), np.uint64), zeros_aligned(4, WRITE)
        return ChannelArrays(state, told, zeros_aligned(8, np.uint64), inbox, outbox, signals, writes)

    def publish(self) -> list[Any]:
        """The sender's writes: its line is told, and they have completed."""
        count = int(plan(self.sender, False))
        writes = self.sender.writes[:count].copy()
        if count:
            self.line_of_taker[T_PUBLISHED] = self.sender.state[S_PUBLISHED]
        if any(write["flags"] & F_SIGNALED for write in writes):
            complete(self.sender, 0)
        return list(writes)

    def give_credit(self) -> None:
        self.line_of_sender[T_CONSUMED] = self.taker.state[S_CONSUMED]


def subscription(table: InstrumentTable, *, depth: bool = False, expected: int = 1, trades: bool = True) -> Subscription:
    state = np.zeros(32, np.int64)
    ids, sources = np.full(64, NO_INSTRUMENT, np.uint32), np.zeros(64, np.uint32)
    state[X_SOURCE], state[X_EPOCH], state[X_SHARD], state[X_DEPTH] = SOURCE, EPOCH, SHARD, depth
    state[X_EXPECTED], state[X_PRINTS], state[X_SWEEP] = expected, trades, len(ids)
    return Subscription(state, table.arrays, ids, sources)


def output(seq: int, kind: Kind, instrument: int = 0, **fields: Any) -> Any:
    event = np.zeros(1, EVENT)
    event["seq"], event["kind"], event["instrument"], event["side"] = seq, kind, instrument, NO_SIDE
    event["ts_event"] = 1000 + seq
    for name, value in fields.items():
        event[name] = value
    return event


def reference(seq: int, instrument: int, symbol: str, source: int = 0) -> Any:
    words = np.frombuffer(symbol.encode().ljust(24, b"\0"), "<u8")
    aux = int(words[2].astype(np.int64))
    return output(seq, Kind.REFERENCE, instrument, price=10_000_000, qty=int(words[0]), id=int(words[1]), aux=aux, side=2, flags=source)


class Line:
    """Outputs from a ring through frames to a subscriber."""

    def __init__(self, *, depth: bool = False, expected: int = 1, mode: Any = "lossless", room: int = 256, trades: bool = True) -> None:
        self.ring = Ring.create(None, 512, EVENT, mode=mode)
        self.writer, self.wires, self.table = self.ring.writer, Wires(), InstrumentTable(64)
        self.taking = subscription(self.table, depth=depth, expected=expected, trades=trades)
        self.position, self.lost, self.at = np.uint64(0), 0, np.zeros(2, np.int64)
        self.out = zeros_aligned(room, EVENT)
        self.found: list[int] = []

    def send(self, outputs: Sequence[Any]) -> None:
        for first in range(0, len(outputs), 128):
            self.writer.write(np.concatenate(outputs[first : first + 128]))
            self.stage_all()

    def stage_all(self) -> None:
        arrays = self.ring.arrays
        before = -1
        while before != self.position:
            before = self.position
            position, lost = stage(
                self.wires.sender, arrays.words, arrays.slots.view(RECORD), self.position, np.uint64(self.ring.published)
            )
            self.position, self.lost = np.uint64(position), self.lost + int(lost)
            self.wires.publish()
            self.kept = [*getattr(self, "kept", []), *self.take()]

    def take(self) -> list[Any]:
        events, taken = self.wires.taker.inbox.view(EVENT), []
        while True:
            count, found = take(self.wires.taker, events, self.taking, self.at, self.out)
            self.found.append(int(found))
            taken += [event.copy() for event in self.out[: int(count)]]
            self.wires.give_credit()
            if found != TAKEN or count == 0:
                return taken


def bodies(event: Any) -> tuple[int, ...]:
    return tuple(int(event[name]) for name in ("kind", "flags", "side", "price", "qty"))


def book_of_one_level(bid: int, bid_qty: int, ask: int, ask_qty: int, *, stale: bool = False) -> list[tuple[int, ...]]:
    """The slow twin of what becomes of a BBO."""
    made = [[Kind.CLEAR, 0, NO_SIDE, 0, 0]]
    made += [[Kind.LEVEL, 0, side, price, qty] for side, price, qty in ((BID, bid, bid_qty), (ASK, ask, ask_qty)) if price != NO_PRICE]
    made += [[Kind.GAP, 0, NO_SIDE, 0, 0]] if stale else []
    for event in made[:-1]:
        event[1] = Flag.MORE
    return [tuple(map(int, event)) for event in made]


def kinds(events: Sequence[Any]) -> list[tuple[int, int]]:
    return [(int(event["seq"]), int(event["kind"])) for event in events]


def test_outputs_come_as_inputs_of_our_own_instruments() -> None:
    line = Line()
    line.table.intern("OTHER", SOURCE)  # so that ids differ
    line.send([
        reference(1, 5, "ABC"), output(2, Kind.BBO, 5, price=100, qty=3, aux=101, id=4),
        output(3, Kind.TRADE, 5, price=101, qty=2, id=77), output(4, Kind.SIGNAL, 5), output(5, Kind.TRADE, 6),
    ])  # fmt: skip
    assert kinds(line.kept) == [(1, Kind.REFERENCE), (2, Kind.CLEAR), (2, Kind.LEVEL), (2, Kind.LEVEL), (3, Kind.TRADE)]
    assert {int(event["instrument"]) for event in line.kept} == {line.table.find("ABC", SOURCE)} == {1}
    assert [bodies(event) for event in line.kept[1:4]] == book_of_one_level(100, 3, 101, 4)
    assert {int(event["ts_event"]) for event in line.kept[1:4]} == {1002}
    assert line.taking.state[X_FILTERED] == 1
    assert line.taking.state[X_UNKNOWN] == 1
    record = line.table.record(1)
    assert (record["tick_size"], record["qty_exponent"], record["announced"]) == (10_000_000, 2, 1)


def test_what_is_missing_is_a_gap_and_what_comes_again_is_left_out() -> None:
    line = Line()
    line.send([reference(1, 0, "A"), output(2, Kind.TRADE), output(7, Kind.TRADE), output(6, Kind.TRADE), output(8, Kind.TRADE)])
    assert kinds(line.kept) == [(1, Kind.REFERENCE), (2, Kind.TRADE), (3, Kind.GAP), (7, Kind.TRADE), (8, Kind.TRADE)]
    gap = line.kept[2]
    assert (gap["instrument"], gap["id"], gap["aux"], gap["qty"]) == (ALL_INSTRUMENTS, 3, 6, 4)
    assert [line.taking.state[x] for x in (X_GAPS, X_MISSING, X_DUPLICATES)] == [1, 4, 1]


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("ask", [NO_PRICE, 3])
@pytest.mark.parametrize("bid", [NO_PRICE, 2])
def test_a_bbo_sets_the_subscriber_s_book_whatever_that_was_before(bid: int, ask: int, stale: bool) -> None:
    line, cent = Line(), 10_000_000
    sides = [price if price == NO_PRICE else price * cent for price in (bid, ask)]
    quantities = [0 if price == NO_PRICE else 7 + i for i, price in enumerate((bid, ask))]
    line.send([
        reference(1, 5, "ABC"), output(2, Kind.BBO, 5, price=5 * cent, qty=1, aux=6 * cent, id=2, flags=Flag.STALE),
        output(3, Kind.BBO, 5, price=sides[0], qty=quantities[0], aux=sides[1], id=quantities[1], flags=Flag.STALE if stale else 0),
    ])  # fmt: skip
    assert [bodies(event) for event in line.kept if event["seq"] == 3] == book_of_one_level(
        sides[0], quantities[0], sides[1], quantities[1], stale=stale
    )
    books, events = make_books(4, 16), np.array(line.kept, EVENT)
    results = np.zeros(len(events), np.int64)
    apply_events(books, events, results, np.zeros(0, EVENT))
    assert not results.any()
    assert [[level[:2] for level in side] for side in top(books, 0, 5)] == [
        [(price, qty)] if price != NO_PRICE else [] for price, qty in zip(sides, quantities)
    ]
    assert bool(books.sides["flags"][0] & Flag.STALE) == stale


def test_a_whole_source_s_gap_is_one_of_each_of_its_instruments() -> None:
    line = Line(room=6)  # a sweep that does not fit at once
    line.send([reference(i + 1, i, f"S{i}", source=i % 2) for i in range(19)])
    line.kept.clear()
    line.send([output(20, Kind.GAP, ALL_INSTRUMENTS, price=1), output(21, Kind.CLEAR, ALL_INSTRUMENTS, price=0), output(22, Kind.TRADE, 2)])
    symbols = [(int(e["seq"]), int(e["kind"]), line.table.symbol(int(e["instrument"]))) for e in line.kept]
    assert symbols == [
        *((20, Kind.GAP, f"S{i}") for i in range(1, 19, 2)), *((21, Kind.CLEAR, f"S{i}") for i in range(0, 19, 2)), (22, Kind.TRADE, "S2"),
    ]  # fmt: skip


@pytest.mark.parametrize("trades", [False, True])
def test_with_orders_a_bbo_says_nothing_new_and_an_execution_is_counted_once(trades: bool) -> None:
    line = Line(depth=True, trades=trades)
    line.send(
        [
            reference(1, 0, "A"),
            output(2, Kind.ADD, side=BID, id=9, price=5, qty=4),
            output(3, Kind.BBO),
            output(4, Kind.EXECUTE, id=9, qty=1, flags=Flag.PRICED),
        ]
    )
    assert kinds(line.kept) == [(1, Kind.REFERENCE), (2, Kind.ADD), (4, Kind.EXECUTE)]
    assert line.kept[2]["flags"] == Flag.PRICED | (Flag.NON_PRINTABLE if trades else 0)


def test_a_filtered_symbol_is_left_out() -> None:
    line = Line()
    line.table.let_through(SOURCE, ["A*"])
    line.send([reference(1, 0, "A"), reference(2, 1, "B"), output(3, Kind.TRADE, 1), output(4, Kind.TRADE, 0)])
    assert kinds(line.kept) == [(1, Kind.REFERENCE), (4, Kind.TRADE)]


@pytest.mark.parametrize("byte", [0, 5, 8, 24, 40, 64, 100, 191])
def test_a_frame_of_which_a_bit_is_wrong_is_not_taken_until_it_is_right(byte: int) -> None:
    line = Line()
    line.writer.write(np.concatenate([reference(1, 0, "A"), output(2, Kind.TRADE)]))
    arrays = line.ring.arrays
    stage(line.wires.sender, arrays.words, arrays.slots.view(RECORD), np.uint64(0), np.uint64(2))
    memory = line.wires.taker.inbox.view(np.uint8)
    memory[byte] ^= 16
    line.wires.publish()
    assert line.take() == []
    assert line.found[-1] == DAMAGED
    memory[byte] ^= 16
    assert kinds(line.take()) == [(1, Kind.REFERENCE), (2, Kind.TRADE)]
    assert line.found[-1] == NOTHING


def test_frames_of_another_epoch_are_refused() -> None:
    line = Line()
    line.taking.state[X_EPOCH] = EPOCH + 1
    line.writer.write(output(1, Kind.TRADE))
    arrays = line.ring.arrays
    stage(line.wires.sender, arrays.words, arrays.slots.view(RECORD), np.uint64(0), np.uint64(1))
    line.wires.publish()
    assert line.take() == []
    assert line.found == [FOREIGN]


def test_an_old_frame_in_the_same_place_is_not_taken_for_new() -> None:
    line = Line()
    for first in range(1, RECORDS // 2):  # frames of one output: head and event, once around
        line.send([output(first, Kind.TIMER)])
    line.wires.line_of_taker[T_PUBLISHED] += np.uint64(2)  # as if the line had overtaken the records
    assert line.take() == []
    assert line.found[-1] == DAMAGED


def test_a_lossy_ring_that_has_come_round_says_how_many_are_lost() -> None:
    line = Line(mode="lossy")
    line.send([reference(1, 0, "A")])
    for first in range(2, 2002, 100):
        line.writer.write(np.concatenate([output(seq, Kind.TRADE) for seq in range(first, first + 100)]))
    line.stage_all()
    assert line.lost > 1000
    seqs = [seq for seq, kind in kinds(line.kept) if kind == Kind.TRADE]
    assert seqs == list(range(2 + line.lost, 2002))
    assert line.taking.state[X_MISSING] == line.lost


prices = st.sampled_from([NO_PRICE, 1, 2])
kinds_put_out = st.sampled_from([Kind.TRADE, Kind.BBO, Kind.SIGNAL, Kind.STATUS])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 3), kinds_put_out, st.integers(0, 5), prices, prices, st.booleans()), max_size=300),
    st.integers(6, 256),
)
def test_frames_equal_their_slow_twin(steps: list[tuple[int, Kind, int, int, int, bool]], room_events: int) -> None:
    line, outputs, seq = Line(room=room_events), [reference(i + 1, i, f"S{i}") for i in range(5)], 5
    expected: list[tuple[int, ...]] = [(i + 1, Kind.REFERENCE) for i in range(5)]
    for step, kind, instrument, bid, ask, stale in steps:
        if step > 1:
            expected.append((seq + 1, Kind.GAP))
        seq += step
        outputs.append(output(seq, kind, instrument, price=bid, qty=3, aux=ask, id=4, flags=Flag.STALE if stale else 0))
        if kind == Kind.BBO and instrument < 5:
            expected += [(seq, *one) for one in book_of_one_level(bid, 3, ask, 4, stale=stale)]
        elif kind != Kind.SIGNAL and instrument < 5:
            expected.append((seq, kind))
    line.send(outputs)
    whole = (Kind.CLEAR, Kind.LEVEL, Kind.GAP)
    assert [
        (int(e["seq"]), *(bodies(e) if e["kind"] in whole and e["instrument"] != ALL_INSTRUMENTS else [int(e["kind"])])) for e in line.kept
    ] == expected
    assert line.lost == 0


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200), st.booleans()), max_size=60))
def test_writes_cover_what_is_staged_once_and_in_order(steps: list[tuple[int, int, bool]]) -> None:
    """Whatever is staged, consumed and completed when, the writes are of the right slots, no slot is used before it is free, and one
    completion at least is always under way where room is wanting."""
    wires, published, pending = Wires(), 0, 0
    state = wires.sender.state
    for wanted, consumed, completes in steps:
        free = int(room(wires.sender))
        assert 0 <= free == RECORDS - (int(state[S_STAGED]) - min(int(state[S_COMPLETED]), int(wires.line_of_sender[T_CONSUMED])))
        state[S_STAGED] += np.uint64(min(wanted, free))
        count = int(plan(wires.sender, False))
        if count:
            published = _check_writes(wires, wires.sender.writes[:count], published)
            pending += bool(wires.sender.writes[count - 1]["flags"] & F_SIGNALED)
        wires.line_of_sender[T_CONSUMED] = min(published, int(wires.line_of_sender[T_CONSUMED]) + consumed)
        if completes and pending:
            complete(wires.sender, 0)
            pending -= 1
        if not count:
            assert pending
        assert int(state[S_POSTED]) - int(state[S_REAPED]) <= DEPTH
    assert state[S_FAILED] == 0


def _check_writes(wires: Wires, writes: Any, published: int) -> int:
    data, line = writes[:-1], writes[-1]
    for write in data:
        slot, size = published % RECORDS, int(write["length"]) // 64
        assert (write["local"], write["remote"]) == ((1 << 30) + slot * 64, (1 << 40) + LINE_BYTES + slot * 64)
        assert slot + size <= RECORDS
        published += size
    assert line["remote"] == 1 << 40
    assert line["flags"] & F_INLINE
    assert published == wires.sender.state[S_PUBLISHED] == wires.sender.tell[T_PUBLISHED]
    return published


def test_a_line_that_cannot_be_ends_the_channel() -> None:
    wires = Wires()
    wires.line_of_sender[T_CONSUMED] = 1
    assert room(wires.sender) == 0
    wires.line_of_taker[T_PUBLISHED] = RECORDS + 1
    assert available(wires.taker) == 0
    assert wires.sender.state[S_FAILED] == wires.taker.state[S_FAILED] == BAD_LINE
    assert FRAME_EVENTS < RECORDS


class Lines:
    """What :class:`ChannelHeartbeats` looks at."""

    peer, beats_heard, beats_written = "far", 0, 0

    def beat(self) -> None:
        self.beats_written += 1


def test_heartbeats_are_written_where_nothing_else_is_and_those_of_the_other_side_are_missed() -> None:
    lines: Any = Lines()
    heartbeats = ChannelHeartbeats(lines, 0.1, 2.0)
    begun_s = heartbeats._heard_s
    for step in range(1, 101):  # 10 s, in which each side writes
        lines.beats_heard += 1
        heartbeats.look(begun_s + step * 0.1001)
    assert lines.beats_written == 100
    for step in range(101, 111):
        lines.beats_written += 1  # of a publication
        heartbeats.look(begun_s + step * 0.1001)
    assert lines.beats_written == 110
    heartbeats.look(begun_s + 100 * 0.1001 + 1.9)
    with pytest.raises(ChannelSilent, match="silent for 2 s") as caught:
        heartbeats.look(begun_s + 100 * 0.1001 + 2.1)
    assert caught.value.peer == "far"
