"""Batch frames and per-event maps: what goes in comes out, exactly."""

from __future__ import annotations

from decimal import Decimal

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node.event import (
    ALERT,
    ALL_INSTRUMENTS,
    BAR,
    EVENT,
    GAP,
    NO_PRICE,
    QUOTE,
    REFERENCE,
    RISK,
    SIGNAL,
    VIEWS,
    Flag,
    Kind,
    RiskReason,
)
from tickmesh.node.frames import (
    HEADER_SIZE,
    EventEncoder,
    FrameError,
    FrameHeader,
    InstrumentNames,
    decode_frame,
    encode_frame,
    event_maps,
    subject_token,
    token_symbol,
)

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)


def reference(instrument: int, symbol: str, exponent: int = 0, tick: int = 10_000_000) -> np.ndarray:
    event = np.zeros(1, REFERENCE)
    event["kind"], event["instrument"], event["symbol"] = Kind.REFERENCE, instrument, symbol.encode()
    event["side"], event["tick_size"] = exponent, tick
    return event.view(EVENT)


def names_of(*events: np.ndarray) -> InstrumentNames:
    names = InstrumentNames()
    names.learn(np.concatenate(events))
    return names


# ---------------------------------------------------------------- frames


@given(U32, U64, U64, st.integers(0, 2**63), st.binary(max_size=640).map(lambda b: b[: len(b) // 64 * 64]))
@settings(deadline=None)
def test_frame_round_trip(shard: int, epoch: int, config: int, first: int, body: bytes) -> None:
    header = FrameHeader(shard, epoch, config, first, len(body) // 64)
    payload = encode_frame(header, body)
    found, events = decode_frame(payload)
    assert found == header
    assert events.tobytes() == body
    assert events.dtype == EVENT


@given(U32, U64, U64, st.integers(0, 2**63), U32, U64)
@settings(deadline=None)
def test_header_is_what_a_messagepack_library_makes(shard: int, epoch: int, config: int, first: int, count: int, missing: int) -> None:
    """The fixed-width header is plain MessagePack for any other client."""
    header = encode_frame(FrameHeader(shard, epoch, config, first, count, missing))
    assert len(header) == HEADER_SIZE
    assert msgpack.unpackb(header) == [1, shard, epoch, config, first, count, missing, bytes(14)]


def test_events_are_not_copied() -> None:
    payload = encode_frame(FrameHeader(0, 1, 1, 1, 2), bytes(128))
    _, events = decode_frame(payload)
    start = np.frombuffer(payload, np.uint8).ctypes.data
    assert events.ctypes.data == start + HEADER_SIZE
    assert not events.flags.writeable


def test_gap_marker() -> None:
    header, events = decode_frame(encode_frame(FrameHeader(3, 1, 1, 100, 0, 50)))
    assert (header.first, header.last, len(events)) == (100, 149, 0)


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_other_bytes_are_refused(payload: bytes) -> None:
    with pytest.raises(FrameError):
        decode_frame(payload)


@given(st.data())
@settings(deadline=None)
def test_damaged_frames_never_read_past_the_end(data: st.DataObject) -> None:
    payload = bytearray(encode_frame(FrameHeader(0, 1, 1, 1, 3), bytes(192)))
    payload[data.draw(st.integers(0, HEADER_SIZE - 1))] ^= data.draw(st.integers(1, 255))
    try:
        header, events = decode_frame(bytes(payload[: data.draw(st.integers(0, 256))]))
    except FrameError:
        return
    assert header.count == len(events) == 3


def test_newer_schema_says_what_to_do() -> None:
    payload = bytearray(encode_frame(FrameHeader(0, 1, 1, 1, 0)))
    payload[1] = 9
    with pytest.raises(FrameError, match=r"version 9.*upgrade"):
        decode_frame(bytes(payload))


# ---------------------------------------------------------------- subjects


@given(st.text(max_size=24))
@settings(deadline=None)
def test_subject_tokens_are_reversible_and_valid(symbol: str) -> None:
    symbol = symbol.encode("utf-8", "replace").decode()
    token = subject_token(symbol)
    assert token_symbol(token) == symbol
    assert token
    assert not set(token) & set(".*> \t\r\n#")
    assert token.isascii()


@pytest.mark.parametrize(("symbol", "token"), [("AAPL", "AAPL"), ("BRK.B", "BRK%2EB"), ("BTC/USD", "BTC/USD"), ("ES H6", "ES%20H6")])
def test_subject_token_examples(symbol: str, token: str) -> None:
    assert subject_token(symbol) == token


# ---------------------------------------------------------------- maps


def event(view: np.dtype, kind: Kind, **fields: object) -> np.ndarray:
    one = np.zeros(1, view)
    one["kind"], one["instrument"] = kind, 7
    for name, value in fields.items():
        one[name] = value
    return one.view(EVENT)


def map_of(one: np.ndarray, names: InstrumentNames, **more: object) -> dict:
    (found,) = event_maps(one, names, **more)  # type: ignore[arg-type]
    return found


NAMES = names_of(reference(7, "BRK.B", exponent=3))


def test_bbo_map() -> None:
    bid = {"bid": 101_250_000_000, "bid_qty": 1500}
    one = event(QUOTE, Kind.BBO, seq=5, ts_event=11, ts_recv=12, **bid, ask=NO_PRICE, ask_qty=0, flags=Flag.STALE)
    assert map_of(one, NAMES) == {
        "kind": "bbo", "symbol": "BRK.B", "seq": 5, "ts_event": 11, "ts_recv": 12, "flags": ["stale"],
        "bid": "101.25", "bid_qty": "1.5", "ask": None, "ask_qty": "0",
    }  # fmt: skip


def test_signal_map_with_and_without_names() -> None:
    one = event(SIGNAL, Kind.SIGNAL, calculation=(1 << 32) | 4, value=2.5, price=10**9, qty=1)
    plain = map_of(one, NAMES)
    assert (plain["calculation"], plain["output"], plain["value"], plain["price"]) == (4, 1, 2.5, "1")
    assert map_of(one, NAMES, calculations={(4, 1): "trend.r2"})["calculation"] == "trend.r2"


def test_alert_map() -> None:
    bits = np.array([0.75]).view(np.int64)[0]
    assert map_of(event(ALERT, Kind.ALERT, threshold_bits=bits, value=1.0), NAMES)["threshold"] == 0.75


def test_bar_map() -> None:
    one = event(BAR, Kind.BAR, open=100 * 10**9, volume=2500, high_ticks=3, low_ticks=2, close_ticks=-1, trades=9)
    found = map_of(one, NAMES)
    assert [found[k] for k in ("open", "high", "low", "close", "volume", "trades")] == ["100", "100.03", "99.98", "99.99", "2.5", 9]


def test_risk_gap_and_reference_maps() -> None:
    refused = map_of(event(RISK, Kind.RISK, reason=RiskReason.MAX_QTY, flags=Flag.REFUSED, intent=8), NAMES)
    assert (refused["reason"], refused["flags"], refused["intent"]) == ("max_qty", ["refused"], 8)
    gap = map_of(event(GAP, Kind.GAP, instrument=ALL_INSTRUMENTS, first=5, last=9, missing=5), NAMES)
    assert (gap["symbol"], gap["first"], gap["last"], gap["missing"]) == (None, 5, 9, 5)
    assert map_of(reference(7, "BRK.B", exponent=3), NAMES)["qty_exponent"] == 3


def test_every_kind_has_a_map_that_messagepack_takes() -> None:
    rng = np.random.default_rng(1)
    for kind in [*Kind, 200]:
        events = np.frombuffer(rng.bytes(64 * 20), EVENT).copy()
        events["kind"] = kind
        for found in event_maps(events, NAMES):
            assert msgpack.unpackb(msgpack.packb(found)).keys() == found.keys()


@given(st.integers(-(2**62), 2**62), st.integers(0, 2**62), st.integers(0, 9))
@settings(deadline=None)
def test_prices_and_quantities_are_exact(price: int, qty: int, exponent: int) -> None:
    found = map_of(event(VIEWS[Kind.TRADE], Kind.TRADE, price=price, qty=qty), names_of(reference(7, "X", exponent)))
    assert Decimal(found["price"]) == Decimal(price).scaleb(-9)
    assert Decimal(found["qty"]) == Decimal(qty).scaleb(-exponent)


def test_encoder_subjects_keep_the_order_of_events() -> None:
    names = names_of(reference(7, "BRK.B"), reference(8, "AAPL"))
    events = np.concatenate([event(QUOTE, Kind.BBO), event(SIGNAL, Kind.SIGNAL), event(QUOTE, Kind.BBO)])
    events["instrument"] = [7, 8, 9]
    encoded = EventEncoder("demo", names).encode(events)
    assert [subject for subject, _ in encoded] == ["tm.demo.bbo.BRK%2EB", "tm.demo.signal.AAPL", "tm.demo.bbo.#9"]
    assert msgpack.unpackb(encoded[1][1])["symbol"] == "AAPL"


def test_learn_returns_what_is_new() -> None:
    names = InstrumentNames()
    assert len(names.learn(reference(1, "A"))) == 1
    assert len(names.learn(reference(1, "A"))) == 0
    assert len(names.learn(reference(1, "A", tick=5))) == 1
    assert names.ids(["A", "B"]).tolist() == [1]
    assert names[1].tick_size == 5
