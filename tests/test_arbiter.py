"""A/B arbitration: the compiled path of a small protocol against a plain Python model, over random loss, repeats and disorder."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node.decoder import arbitration, load_decoder, make_feed, malformed
from tickmesh.node.event import EVENT, Kind
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.protocol import load_framing, load_spec
from tickmesh.transports.capture import PACKET

SPEC = """
[protocol]
name = "tiny"
byte_order = "big"
type_field = { offset = 0, type = "char" }
[instrument]
symbol = "symbol"
[messages.trade]
type = "T"
length = 17
[messages.trade.fields]
symbol = { offset = 1, type = "alpha:4" }
price = { offset = 5, type = "u32", decimals = 2 }
qty = { offset = 9, type = "u64" }
[messages.trade.event]
kind = "trade"
price = "price"
qty = "qty"
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    path = Path(tmp_path_factory.mktemp("spec")) / "tiny.toml"
    path.write_text(SPEC)
    spec, framing = load_spec(path), load_framing("moldudp64")
    return spec, framing, load_decoder(spec, framing)


def datagram(session: int, seq: int, count: int, sent: int | None = None) -> bytes:
    body = b"".join(struct.pack(">Hc4sIQ", 17, b"T", b"ABCD", 100, seq + i) for i in range(count if sent is None else sent))
    return session.to_bytes(10, "big") + struct.pack(">QH", seq, count) + body


def pack(datagrams: list[tuple[bytes, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """(payload, line, ts_recv) -> buffer, packets."""
    packets = np.zeros(len(datagrams), PACKET)
    at = 0
    for packet, (payload, line, ts_recv) in zip(packets, datagrams):
        packet["offset"], packet["length"], packet["line"], packet["ts_recv"] = at, len(payload), line, ts_recv
        at += len(payload)
    return np.frombuffer(b"".join(d for d, _, _ in datagrams) + bytes(64), np.uint8).copy(), packets


def decoded(
    decoder: Any, feed: Any, datagrams: list[tuple[bytes, int, int]], room: int = 258, flush_at: int | None = None
) -> list[tuple[int, ...]]:
    """What came out: (seq,) of a message, (first, last) of a gap, () of a clear."""
    buf, packets = pack(datagrams)
    out, events, at = np.zeros(room, EVENT), [], 0
    while True:
        at, n = decoder.decode_packets(buf, packets, at, len(packets), feed, out)
        events += [tuple(e) for e in out[:n]]
        if n == 0 and at == len(packets):
            break
    while flush_at is not None and (n := decoder.decode_flush(flush_at, feed, out)):
        events += [tuple(e) for e in out[:n]]
    found: list[tuple[int, ...]] = []
    for event in events:
        e = dict(zip(EVENT.names or (), event))
        if e["kind"] == Kind.TRADE:
            assert e["qty"] == e["seq"]
            found.append((int(e["seq"]),))
        elif e["kind"] == Kind.GAP:
            assert e["qty"] == e["aux"] - int(e["id"]) + 1
            found.append((int(e["id"]), int(e["aux"])))
        elif e["kind"] == Kind.CLEAR:
            found.append(())
    return found


class Model:
    """The rules of node/arbiter.py, slowly."""

    def __init__(self, gap_wait: int, hold: int, start: int = 0) -> None:
        self.gap_wait, self.capacity, self.start = gap_wait, hold, start
        self.session: int | None = None
        self.previous: int | None = None
        self.expected, self.known, self.known_since, self.now = 0, 0, 0, 0
        self.held: list[tuple[int, int, int]] = []  # seq, count, arrival
        self.out: list[tuple[int, ...]] = []
        self.duplicates = 0

    def use(self, seq: int, count: int) -> None:
        self.out += [(s,) for s in range(max(seq, self.expected), seq + count)]
        self.expected = max(self.expected, seq + count)

    def gap(self, end: int) -> None:
        self.out.append((self.expected, end - 1))
        self.expected = end

    def drain(self, force: int = 0) -> None:
        while True:
            due = sorted(h for h in self.held if h[0] <= self.expected)
            if due:
                self.held.remove(due[0])
                if due[0][0] + due[0][1] > self.expected:
                    self.use(due[0][0], due[0][1])
                else:
                    self.duplicates += 1
            elif force > self.expected:
                self.gap(min([force, *(h[0] for h in self.held)]))
            elif self.held and self.now - min(h[2] for h in self.held) >= self.gap_wait:
                self.gap(min(h[0] for h in self.held))
            elif not self.held and self.known > self.expected > 0 and self.now - self.known_since >= self.gap_wait:
                self.gap(self.known)
            else:
                return

    def packet(self, session: int, seq: int, count: int, ts: int) -> None:
        self.drain()
        self.now = max(self.now, ts)
        if self.session is None:
            self.session = self.previous = session
            self.expected = self.start
        elif session != self.session:
            if session == self.previous:
                self.duplicates += 1
                return self.drain()
            while self.held:
                self.drain(min(h[0] for h in self.held))
            if self.known > self.expected:
                self.drain(self.known)
            self.previous, self.session, self.expected, self.known = self.session, session, 1, 0
            self.out.append(())
        self.expected = self.expected or seq
        if count == 0:
            if seq > self.expected and seq > self.known:
                if self.known <= self.expected:
                    self.known_since = self.now
                self.known = seq
        elif seq + count <= self.expected:
            self.duplicates += 1
        elif seq <= self.expected:
            self.use(seq, count)
        elif any(h[0] == seq and h[1] >= count for h in self.held):
            self.duplicates += 1
        else:
            while seq > self.expected and len(self.held) >= self.capacity:
                self.drain(seq)
            if seq + count <= self.expected:
                self.duplicates += 1
            elif seq <= self.expected:
                self.use(seq, count)
            else:
                self.held.append((seq, count, self.now))
        return self.drain()


def line_of(data: st.DataObject, packets: list[tuple[int, int]], label: str) -> list[tuple[int, int]]:
    """One line's copy: some packets lost, some repeated, some moved."""
    result = [p for p in packets if data.draw(st.integers(0, 9), label) > 2]
    for _ in range(data.draw(st.integers(0, 3))):
        if len(result) > 1:
            item = result[data.draw(st.integers(0, len(result) - 1))]
            result.insert(data.draw(st.integers(0, len(result))), item)
    return result


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_against_model(tiny: Any, data: st.DataObject) -> None:
    spec, framing, decoder = tiny
    sizes = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=25))
    starts = np.cumsum([1, *sizes])
    packets = [(int(s), n) for s, n in zip(starts, sizes)]
    lines = [line_of(data, packets, "A"), line_of(data, packets, "B")]
    order = data.draw(st.lists(st.integers(0, 1), min_size=60, max_size=60))
    sent, ts = [], 0
    for line in order:
        ts += data.draw(st.integers(0, 5))
        if lines[line]:
            seq, count = lines[line].pop(0)
            sent.append((seq, count, line, ts))
    wait, hold, start, room = (data.draw(st.integers(*r)) for r in ((0, 30), (1, 5), (0, 1), (3, 20)))
    feed = make_feed(spec, InstrumentTable(4), framing=framing, gap_wait_ns=wait, hold_packets=hold, hold_bytes=128, start_sequence=start)
    model = Model(wait, hold, start)
    for seq, count, _, when in sent:
        model.packet(7, seq, count, when)
    model.now = max(model.now, ts + 100)
    model.drain()
    found = decoded(decoder, feed, [(datagram(7, s, c), line, when) for s, c, line, when in sent], room, flush_at=ts + 100)
    assert found == model.out
    counts = arbitration(feed)
    assert counts["duplicates"] == model.duplicates
    assert counts["gaps"] == sum(len(e) == 2 for e in model.out)
    assert counts["packets"] == len(sent)
    assert malformed(feed) == {}


def make(tiny: Any, **options: Any) -> tuple[Any, Any]:
    spec, framing, decoder = tiny
    return decoder, make_feed(spec, InstrumentTable(4), framing=framing, **{"gap_wait_ns": 1000, "hold_bytes": 256, **options})


def test_other_line_fills_the_gap(tiny: Any) -> None:
    decoder, feed = make(tiny)
    sent = [
        (datagram(7, 1, 2), 0, 0),
        (datagram(7, 5, 2), 0, 1),
        (datagram(7, 1, 2), 1, 2),
        (datagram(7, 3, 2), 1, 3),
        (datagram(7, 5, 2), 1, 4),
    ]
    assert decoded(decoder, feed, sent) == [(i,) for i in range(1, 7)]
    counts = arbitration(feed)
    assert (counts["gaps"], counts["duplicates"], counts["duplicates_1"], counts["held_0"], counts["messages_1"]) == (0, 2, 2, 1, 2)


def test_overlap_uses_only_what_is_new(tiny: Any) -> None:
    decoder, feed = make(tiny)
    assert decoded(decoder, feed, [(datagram(7, 1, 3), 0, 0), (datagram(7, 2, 4), 1, 1)]) == [(i,) for i in range(1, 6)]
    assert arbitration(feed)["overlaps"] == 1


def test_heartbeat_reveals_a_gap(tiny: Any) -> None:
    decoder, feed = make(tiny)
    assert decoded(decoder, feed, [(datagram(7, 1, 1), 0, 0), (datagram(7, 4, 0), 0, 10)]) == [(1,)]
    assert decoded(decoder, feed, [(datagram(7, 4, 0), 0, 500)]) == [], "it waits since the first heartbeat"
    assert decoded(decoder, feed, [], flush_at=1009) == []
    assert decoded(decoder, feed, [], flush_at=1010) == [(2, 3)]
    assert arbitration(feed)["missing"] == 2


def test_end_of_session(tiny: Any) -> None:
    decoder, feed = make(tiny)
    assert decoded(decoder, feed, [(datagram(7, 1, 1), 0, 0), (datagram(7, 2, 0xFFFF, 0), 0, 1)]) == [(1,)]
    assert (arbitration(feed)["ends"], arbitration(feed)["heartbeats"]) == (1, 1)


def test_new_session_settles_the_old_one(tiny: Any) -> None:
    decoder, feed = make(tiny)
    sent = [
        (datagram(7, 1, 1), 0, 0),
        (datagram(7, 3, 1), 0, 1),
        (datagram(8, 2, 1), 0, 2),
        (datagram(7, 4, 1), 1, 3),
        (datagram(8, 1, 1), 1, 4),
    ]
    assert decoded(decoder, feed, sent) == [(1,), (2, 2), (3,), (), (1,), (2,)]
    counts = arbitration(feed)
    assert (counts["sessions"], counts["stale_session"], counts["gaps"]) == (1, 1, 1)


def test_packet_too_long_to_hold(tiny: Any) -> None:
    decoder, feed = make(tiny)
    assert decoded(decoder, feed, [(datagram(7, 1, 1), 0, 0), (datagram(7, 9, 20), 0, 1)]) == [(1,), (2, 8), *((i,) for i in range(9, 29))]
    assert arbitration(feed)["hold_overflows"] == 1


def test_cut_packet_is_completed_by_the_other_line(tiny: Any) -> None:
    decoder, feed = make(tiny)
    sent = [(datagram(7, 1, 3)[:-5], 0, 0), (datagram(7, 1, 3), 1, 1), (datagram(7, 4, 1) + b"xx", 0, 2), (b"short", 0, 3)]
    assert decoded(decoder, feed, sent) == [(1,), (2,), (3,), (4,)]
    assert malformed(feed) == {"length_past_end": 1, "trailing_bytes": 1, "short_packet": 1}


def test_sequence_zero_is_not_arbitrated(tiny: Any) -> None:
    decoder, feed = make(tiny)
    buf, packets = pack([(datagram(0, 0, 1), 0, 0), (datagram(0, 0, 1), 0, 1)])
    out = np.zeros(16, EVENT)
    assert decoder.decode_packets(buf, packets, 0, 2, feed, out) == (2, 3)
    assert out["seq"][:3].tolist() == [1, 1, 2]
    assert arbitration(feed)["unsequenced"] == 2


def test_absurd_sequence_is_refused(tiny: Any) -> None:
    decoder, feed = make(tiny)
    assert decoded(decoder, feed, [(datagram(7, 1, 1), 0, 0), (datagram(7, 1 << 60, 1), 0, 0), (datagram(7, (1 << 64) - 1, 0), 0, 0)]) == [
        (1,)
    ]
    assert malformed(feed) == {"bad_sequence": 2}
