"""Decoders: values checked by hand against the hex, a plain Python twin, real captures, cut and damaged input."""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounds import with_bounds_checks
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node import decoder as D
from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, REFERENCE, Flag, Kind, TradingStatus
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.protocol import MappingError, load_framing, load_spec
from tickmesh.transports.capture import PACKET

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("TICKMESH_DATA", ROOT.parent / "shared" / "data"))
CORPUS = Path(__file__).parent / "corpus"
PCAPS = DATA / "omi_pcaps"

_loaded: dict[tuple[str, str], Any] = {}


def load(spec_name: str, framing_name: str) -> tuple[Any, Any, Any]:
    key = (spec_name, framing_name)
    if key not in _loaded:
        spec, framing = load_spec(spec_name), load_framing(framing_name)
        _loaded[key] = (spec, framing, D.load_decoder(spec, framing))
    return _loaded[key]


def image(raw: bytes) -> np.ndarray:
    return np.frombuffer(raw + bytes(64), np.uint8).copy()


def stream(
    raw: bytes, spec_name: str = "itch50", framing_name: str = "binaryfile", room: int = 258, **options: Any
) -> tuple[list[Any], Any, Any, int]:
    """Events, feed, table and where it stopped, of a byte stream."""
    spec, framing, decoder = load(spec_name, framing_name)
    table = options.pop("table", None)
    if table is None:
        table = InstrumentTable(options.pop("capacity", 64))
    feed = options.pop("feed", None) or D.make_feed(spec, table, framing=framing, **options)
    buf, out, events, pos = image(raw), np.zeros(room, EVENT), [], 0
    while True:
        before = pos
        pos, n = decoder.decode_stream(buf, pos, len(raw), 5, feed, out)
        events += [out[i].copy() for i in range(n)]
        assert pos >= before
        if n == 0:
            return events, feed, table, pos


def framed(*messages: bytes) -> bytes:
    return b"".join(struct.pack(">H", len(m)) + m for m in messages)


def head(kind: bytes, locate: int = 1, ts: int = 0) -> bytes:
    return kind + struct.pack(">HH", locate, 0) + ts.to_bytes(6, "big")


ADD = bytes.fromhex("41020c00001f1aced02127000000000017aba5420000012c414d5a55202020200003b40c")
"""A real message: AMZU, buy 300 at 24.2700, order 0x17aba5."""


def test_itch_add_by_hand() -> None:
    events, feed, table, _ = stream(framed(ADD), midnight_ns=10**18)
    reference, add = events
    assert (reference["kind"], reference["instrument"], reference.view(REFERENCE)["symbol"], reference["price"]) == (
        Kind.REFERENCE,
        0,
        b"AMZU",
        10**7,
    )
    assert (add["kind"], add["side"], add["flags"], add["instrument"], add["seq"], add["ts_recv"]) == (Kind.ADD, 0, 0, 0, 1, 5)
    assert (add["price"], add["qty"], add["id"], add["aux"]) == (24_270_000_000, 300, 0x17ABA5, 0)
    assert add["ts_event"] == 10**18 + 0x1F1ACED02127
    assert int(table.record(0)["code"]) == 0x020C
    assert D.message_counts(feed, load_spec("itch50")) == {"add_order": 1}


ITCH_CASES = [
    (
        head(b"F") + struct.pack(">QcI8sI4s", 7, b"S", 10, b"ABC     ", 12345, b"MPID"),
        {"kind": Kind.ADD, "side": 1, "price": 1234500000, "qty": 10, "id": 7},
    ),
    (head(b"E") + struct.pack(">QIQ", 7, 3, 99), {"kind": Kind.EXECUTE, "id": 7, "qty": 3, "aux": 99, "flags": 0}),
    (
        head(b"C") + struct.pack(">QIQcI", 7, 3, 99, b"N", 10000),
        {"kind": Kind.EXECUTE, "price": 10**9, "flags": Flag.PRICED | Flag.NON_PRINTABLE},
    ),
    (head(b"C") + struct.pack(">QIQcI", 7, 3, 99, b"Y", 10000), {"kind": Kind.EXECUTE, "id": 7, "qty": 3, "aux": 99, "flags": Flag.PRICED}),
    (head(b"X") + struct.pack(">QI", 7, 3), {"kind": Kind.CANCEL, "id": 7, "qty": 3}),
    (head(b"D") + struct.pack(">Q", 7), {"kind": Kind.DELETE, "id": 7}),
    (head(b"U") + struct.pack(">QQII", 7, 8, 5, 20000), {"kind": Kind.REPLACE, "id": 8, "aux": 7, "qty": 5, "price": 2 * 10**9, "side": 2}),
    (
        head(b"P") + struct.pack(">QcI8sIQ", 0, b"B", 4, b"ABC     ", 10000, 55),
        {"kind": Kind.TRADE, "qty": 4, "id": 55, "side": 2, "flags": Flag.HIDDEN},
    ),
    (
        head(b"Q") + struct.pack(">Q8sIQc", 1 << 40, b"ABC     ", 10000, 56, b"O"),
        {"kind": Kind.TRADE, "qty": 1 << 40, "id": 56, "flags": Flag.AUCTION},
    ),
    (  # no cross took place: no trade, let alone one at 0
        head(b"Q") + struct.pack(">Q8sIQc", 0, b"ABC     ", 0, 56, b"C"),
        {"kind": Kind.SYSTEM, "aux": ord("Q"), "qty": 0, "id": 56, "flags": Flag.AUCTION},
    ),
    (head(b"B") + struct.pack(">Q", 56), {"kind": Kind.BREAK, "id": 56}),
    (
        head(b"I") + struct.pack(">QQc8sIIIcc", 10, 20, b"S", b"ABC     ", 1, 20000, 10000, b"O", b"L"),
        {"kind": Kind.IMBALANCE, "side": 1, "price": 10**9, "qty": 20, "id": 10, "aux": 2 * 10**9, "flags": Flag.AUCTION},
    ),
    (head(b"H") + b"ABC     H T1  ", {"kind": Kind.STATUS, "aux": TradingStatus.HALTED, "id": int.from_bytes(b"T1  ", "little")}),
    (head(b"H") + b"ABC     T     ", {"kind": Kind.STATUS, "aux": TradingStatus.TRADING}),
    (head(b"h") + b"ABC     QH", {"kind": Kind.STATUS, "aux": TradingStatus.HALTED, "id": ord("Q")}),
    (head(b"Y") + b"ABC     1", {"kind": Kind.SYSTEM, "aux": ord("Y"), "id": ord("1")}),
    (head(b"L") + b"MPIDABC     YNA", {"kind": Kind.SYSTEM, "aux": ord("L"), "id": int.from_bytes(b"MPID", "little"), "qty": ord("A")}),
    (head(b"N") + b"ABC     B", {"kind": Kind.SYSTEM, "aux": ord("N"), "id": ord("B")}),
    (
        head(b"J") + struct.pack(">8sIIII", b"ABC     ", 10000, 20000, 5000, 1),
        {"kind": Kind.SYSTEM, "aux": ord("J"), "price": 10**9, "qty": 2 * 10**9},
    ),
    (
        head(b"K") + struct.pack(">8sIcI", b"ABC     ", 34200, b"A", 10000),
        {"kind": Kind.SYSTEM, "aux": ord("K"), "price": 10**9, "id": 34200},
    ),
    (
        head(b"O") + struct.pack(">8scIIIQII", b"ABC     ", b"Y", 1, 2, 10000, 9, 3, 4),
        {"kind": Kind.SYSTEM, "aux": ord("O"), "price": 10**9},
    ),
    (
        head(b"V", 0) + struct.pack(">QQQ", 10**8, 2 * 10**8, 3 * 10**8),
        {"kind": Kind.SYSTEM, "price": 10**9, "id": 3 * 10**9, "instrument": ALL_INSTRUMENTS},
    ),
    (head(b"W", 0) + b"1", {"kind": Kind.SYSTEM, "aux": ord("W"), "id": ord("1"), "instrument": ALL_INSTRUMENTS}),
    (head(b"S", 0) + b"Q", {"kind": Kind.SYSTEM, "aux": ord("Q"), "instrument": ALL_INSTRUMENTS}),
]


@pytest.mark.parametrize(("message", "expected"), ITCH_CASES, ids=[chr(m[0]) + str(i) for i, (m, _) in enumerate(ITCH_CASES)])
def test_itch_messages(message: bytes, expected: dict[str, Any]) -> None:
    events, feed, _, _ = stream(framed(message))
    assert D.malformed(feed) == {}
    assert {k: int(events[-1][k]) for k in expected} == {k: int(v) for k, v in expected.items()}
    shorter, feed, _, _ = stream(framed(message[:-1]))
    assert (shorter, D.malformed(feed)) == ([], {"bad_length": 1})


def test_every_itch_message_type_is_there() -> None:
    spec = load_spec("itch50")
    assert sorted(chr(m.code) for m in spec.messages) == sorted("SRHYLVWKJhAFECXDUPQBINO")


def directory(locate: int, symbol: str) -> bytes:
    return (
        head(b"R", locate)
        + symbol.ljust(8).encode()
        + b"QN"
        + struct.pack(">I", 100)
        + b"NC"
        + b"Z "
        + b"PN"
        + b" 1N"
        + struct.pack(">I", 0)
        + b"N"
    )


def test_directory_binds_and_an_unknown_code_gets_a_name() -> None:
    raw = framed(
        directory(3, "XYZ"),
        head(b"D", 3) + bytes(8),
        head(b"D", 9) + bytes(8),
        directory(9, "LATE"),
        head(b"D", 9) + bytes(8),
        directory(3, "XYZ"),
    )
    events, feed, table, _ = stream(raw)
    assert [(Kind(e["kind"]).name, table.symbol(e["instrument"])) for e in events] == [
        ("REFERENCE", "XYZ"), ("DELETE", "XYZ"), ("REFERENCE", "#9"), ("DELETE", "#9"), ("REFERENCE", "LATE"), ("DELETE", "LATE"),
    ]  # fmt: skip
    assert D.message_counts(feed, load_spec("itch50")) == {"stock_directory": 3, "order_delete": 3}


def test_symbol_text_names_a_code_without_directory() -> None:
    events, _, table, _ = stream(framed(head(b"D", 0x20C) + bytes(8), ADD))
    assert [table.symbol(e["instrument"]) for e in events] == ["#524", "#524", "AMZU", "AMZU"]


def test_filtered_symbols_are_counted() -> None:
    table = InstrumentTable(8)
    table.let_through(0, include=["A*"])
    delete = head(b"D", 4) + bytes(8)
    events, feed, _, _ = stream(framed(directory(4, "ZZZ"), delete, delete, ADD, head(b"D", 77) + bytes(8)), table=table)
    assert [Kind(e["kind"]).name for e in events] == ["REFERENCE", "ADD"]
    assert (D.filtered(feed), len(table)) == (4, 1)


TICKS = """
[protocol]
name = "ticks"
byte_order = "little"
type_field = { offset = 0, type = "u8" }
tick_size = "0.05"
[instrument]
symbol = "symbol"
%s
[messages.add]
type = 1
length = 30
fields.symbol = { offset = 1, type = "alpha:8" }
fields.code = { offset = 9, type = "u32" }
fields.order = { offset = 13, type = "u64" }
fields.qty = { offset = 21, type = "u8" }
fields.price = { offset = 22, type = "i64", decimals = 4 }
event = { kind = "add", id = "order", side = 0, price = "price", qty = "qty" }
[messages.definition]
type = 2
length = 21
fields.symbol = { offset = 1, type = "alpha:8" }
fields.code = { offset = 9, type = "u32" }
fields.tick = { offset = 13, type = "i64", decimals = 4 }
event = { kind = "reference", tick_size = "tick" }
"""


@pytest.mark.parametrize("more", ["", 'code = "code"', "follow_orders = true"], ids=("text", "code", "orders"))
def test_a_definition_tells_the_tick_size_of_its_instrument(tmp_path: Path, more: str) -> None:
    """Zero, or none at all, is the protocol's."""
    (tmp_path / "ticks.toml").write_text(TICKS % more)

    def add(symbol: bytes, code: int) -> bytes:
        return struct.pack("<B8sIQBq", 1, symbol, code, code, 5, 1_0000)

    def definition(symbol: bytes, code: int, tick: int) -> bytes:
        return struct.pack("<B8sIq", 2, symbol, code, tick)

    raw = framed(definition(b"QUARTER ", 1, 2500), definition(b"DIME    ", 2, 1000), definition(b"NONE    ", 3, 0), add(b"LATE    ", 4),
                 add(b"QUARTER ", 1), definition(b"LATE    ", 4, 100), definition(b"QUARTER ", 1, 100))  # fmt: skip
    events, feed, table, _ = stream(raw, str(tmp_path / "ticks.toml"))
    ticks = {table.symbol(int(e["instrument"])): int(e["price"]) for e in events if e["kind"] == Kind.REFERENCE}
    assert ticks == {"QUARTER": 250_000_000, "DIME": 100_000_000, "NONE": 50_000_000, "LATE": 50_000_000}
    assert len([e for e in events if e["kind"] == Kind.REFERENCE]) == 4
    assert D.malformed(feed) == {}


def test_full_symbol_table_is_counted() -> None:
    events, feed, _, _ = stream(framed(directory(1, "A"), directory(2, "B"), head(b"D", 2) + bytes(8)), capacity=1)
    assert (len(events), D.malformed(feed)) == (1, {"symbol_table_full": 2})


def test_refusals_are_counted_by_reason() -> None:
    bad_side = bytearray(ADD)
    bad_side[19] = ord("Z")
    raw = framed(bytes(bad_side), b"?" + bytes(10), head(b"A")) + b"\0\0" + framed(ADD) + b"\0\x24A"
    events, feed, _, pos = stream(raw)
    assert [Kind(e["kind"]).name for e in events] == ["REFERENCE", "ADD"]
    assert int(events[-1]["seq"]) == 4, "refused messages have a number too; the end marker has none"
    assert pos == len(raw) - 3
    D.end_of_stream(feed, len(raw) - pos)
    assert D.malformed(feed) == {"bad_field": 1, "unknown_message": 1, "bad_length": 1, "truncated": 1}


def test_small_room_gives_the_same_events() -> None:
    raw = framed(*(m for m, _ in ITCH_CASES), directory(5, "Q"), ADD)
    many, few = (stream(raw, room=r)[0] for r in (258, 3))
    assert [e.tobytes() for e in many] == [e.tobytes() for e in few]


def test_a_source_may_scale_prices_and_say_ticks_and_quantities() -> None:
    """The other decimals are those of the spec that is compiled, so that everything about exactness and overflow holds."""
    spec = load_spec("itch50")
    tenth = D.configured(spec, Decimal("0.1"), None, None)
    fields = [(new, old.fields[name]) for old, made in zip(spec.messages, tenth.messages) for name, new in made.fields.items()]
    assert all(new.decimals == (old.decimals + 1 if old.decimals >= 0 else -1) for new, old in fields)
    assert (tenth.tick_size, D.configured(spec, None, 50_000_000, 3).tick_size) == (1_000_000, 50_000_000)
    assert D.configured(spec, None, None, 3).qty_exponent == 3
    assert D.configured(spec, Decimal(1), None, None) == D.configured(spec, None, None, None) == spec
    with pytest.raises(MappingError) as refused:
        D.configured(spec, Decimal("1E-9"), None, None)
    assert all(problem.startswith("price_scale: ") for problem in refused.value.problems)


def test_own_mapping_and_messages() -> None:
    spec = load_spec("itch50")
    chosen = D.select(spec, {"attribution": "aux"}, ["add_order_mpid"])
    assert next(m for m in chosen.messages if m.name == "add_order_mpid").cases[0].values["aux"] == "attribution"
    assert {c.kind for m in chosen.messages for c in m.cases} == {"add", "reference", "nothing"}
    assert D.select(spec, ["symbol", "price", "volume"], []) == spec
    with pytest.raises(D.MappingError) as error:
        D.select(spec, {"nope": "price", "stock": "colour"}, ["gone"])
    assert len(error.value.problems) == 3
    with pytest.raises(D.MappingError, match="colour"):
        D.select(spec, ["colour"], [])


# ---------------------------------------------------------------- a plain twin


def twin(raw: bytes, spec: Any) -> list[tuple[int, ...]]:
    """(kind, side, flags, price, qty, id, aux) of each event, from the spec, byte by byte (BinaryFILE, no REFERENCE)."""
    pos, found = 0, []
    while pos + 2 <= len(raw):
        length = int.from_bytes(raw[pos : pos + 2], "big")
        body, pos = raw[pos + 2 : pos + 2 + length], pos + 2 + length
        message = next((m for m in spec.messages if body and m.code == body[0]), None)
        if message is None or len(body) < message.length or message.cases[0].kind == "reference":
            continue
        case = next((c for c in message.cases if matches(body, message, c)), None)
        if case is None:
            continue
        values = {k: plain(body, message.fields[v], k) if isinstance(v, str) else v for k, v in case.values.items()}
        if None in values.values():
            continue
        flags = case.flags
        for rule in case.flag_rules:
            value = int.from_bytes(body[message.fields[rule.field].offset :][:1], "big")
            flags |= rule.flag if ((value & rule.bits) == rule.equals) == rule.wanted else 0
        number = int(D.KINDS[case.kind])
        found.append((number, values.get("side", 2), flags, *(values.get(k, 0) for k in ("price", "qty", "id", "aux"))))
    return found


def matches(body: bytes, message: Any, case: Any) -> bool:
    """Whether a case is for this message, by the bytes of the fields that it looks at."""
    fields = {name: message.fields[name] for name in case.when}
    given = {name: int.from_bytes(body[f.offset : f.offset + f.size], "big", signed=f.signed) for name, f in fields.items()}
    return all(given[name] in wanted for name, wanted in case.when.items())


def plain(body: bytes, field: Any, target: str) -> int | None:
    raw = body[field.offset : field.offset + field.size]
    value = int.from_bytes(raw, "little" if field.text or not field.big else "big", signed=field.signed)
    if field.map is not None:
        return field.map.get(value)
    if field.decimals >= 0:
        value *= 10 ** (9 - field.decimals)
    if not -(1 << 63) <= value < 1 << 63 and (field.decimals >= 0 or target == "qty"):
        return None
    return value if target == "id" else (value + (1 << 63)) % (1 << 64) - (1 << 63)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_twin(data: st.DataObject) -> None:
    spec = load_spec("itch50")
    messages = []
    for _ in range(data.draw(st.integers(1, 12))):
        message = data.draw(st.sampled_from(spec.messages))
        size = message.length + data.draw(st.sampled_from([0, 0, 0, 3, -1]))
        body = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
        body[0] = message.code
        for field in message.fields.values():
            if field.map and field.offset < size and data.draw(st.integers(0, 9)):
                body[field.offset] = data.draw(st.sampled_from(sorted(field.map)))
        messages.append(bytes(body))
    raw = framed(*messages)
    events, _, _, pos = stream(raw)
    got = [tuple(int(e[k]) for k in ("kind", "side", "flags", "price", "qty", "id", "aux")) for e in events if e["kind"] != Kind.REFERENCE]
    assert got == twin(raw, spec)
    assert pos == len(raw)


# ---------------------------------------------------------------- real recordings


def captured(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Buffer and packets of a pcap's UDP payloads (Ethernet, maybe VLAN, IPv4)."""
    data, at, payloads = path.read_bytes(), 24, []
    while at < len(data):
        seconds, micros, size, _ = struct.unpack_from("<IIII", data, at)
        frame, at = data[at + 16 : at + 16 + size], at + 16 + size
        ip = 18 if frame[12:14] == b"\x81\x00" else 14
        udp = ip + (frame[ip] & 15) * 4
        payloads.append((frame[udp + 8 : udp + struct.unpack_from(">H", frame, udp + 4)[0]], seconds * 10**9 + micros * 1000))
    packets, start = np.zeros(len(payloads), PACKET), 0
    for packet, (payload, ts) in zip(packets, payloads):
        packet["offset"], packet["length"], packet["ts_recv"] = start, len(payload), ts
        start += len(payload)
    return image(b"".join(p for p, _ in payloads)), packets


def packets_of(path: Path, spec_name: str, framing_name: str) -> tuple[list[Any], Any, InstrumentTable]:
    spec, framing, decoder = load(spec_name, framing_name)
    buf, packets = captured(path)
    table = InstrumentTable(256)
    feed = D.make_feed(spec, table, framing=framing, gap_wait_ns=0)
    out, events, at = np.zeros(258, EVENT), [], 0
    while True:
        at, n = decoder.decode_packets(buf, packets, at, len(packets), feed, out)
        events += [out[i].copy() for i in range(n)]
        if n == 0 and at == len(packets):
            return events, feed, table


need_pcaps = pytest.mark.skipif(not PCAPS.is_dir(), reason=f"no captures in {PCAPS} (set TICKMESH_DATA)")
TOTALVIEW = sorted(PCAPS.glob("Nasdaq/*TotalView*/*.pcap"))
EXPECTED_TYPE = {
    "addordermpid": "add_order_mpid", "addorderwithmpid": "add_order_mpid", "addorderno": "add_order", "crosstrade": "cross_trade",
    "luldauction": "luld_auction_collar", "marketparticipant": "market_participant_position", "netorderimbalance": "net_order_imbalance",
    "noncrosstrade": "trade", "trademessagenon": "trade", "ordercancel": "order_cancel", "orderdelete": "order_delete",
    "orderexecutedwithprice": "order_executed_with_price", "orderexecuted": "order_executed", "orderreplace": "order_replace",
    "regsho": "reg_sho_restriction", "stocktradingaction": "stock_trading_action", "systemevent": "system_event",
    "retailinterest": "retail_interest", "multiple": "",
}  # fmt: skip


@need_pcaps
@pytest.mark.parametrize("path", TOTALVIEW, ids=lambda p: f"{p.parent.name.split('.')[0]}-{p.stem}")
def test_totalview_captures(path: Path) -> None:
    events, feed, _ = packets_of(path, "itch50", "moldudp64")
    stem = path.stem.lower().replace(".", "").replace("-", "")
    expected = next(name for prefix, name in EXPECTED_TYPE.items() if stem.startswith(prefix))
    counts = D.message_counts(feed, load_spec("itch50"))
    assert D.malformed(feed) == {}
    assert counts
    if expected:
        assert {name.partition(".")[0] for name in counts} == {expected}
    assert len([e for e in events if e["kind"] not in (Kind.REFERENCE, Kind.GAP)]) == sum(counts.values())


IEX = sorted(PCAPS.glob("Iex/DeepPlus*/*.pcap"))
IEX_TYPES = {
    "B": "trade_break", "D": "security_directory", "E": "security_event", "H": "trading_status", "I": "retail_liquidity",
    "L": "order_executed", "M": "order_modify",
    "O": "operational_halt", "P": "short_sale_test", "R": "order_delete", "S": "system_event", "T": "trade", "a": "add_order",
}  # fmt: skip


@need_pcaps
@pytest.mark.parametrize("path", IEX, ids=lambda p: p.stem)
def test_iex_captures(path: Path) -> None:
    _, feed, _ = packets_of(path, "iex_deep_plus", "iex_tp")
    assert D.malformed(feed) == {}
    counts = D.message_counts(feed, load_spec("iex_deep_plus"))
    if path.stem != "all_message_types":
        assert IEX_TYPES[path.stem[0]] in counts


@need_pcaps
def test_iex_add_and_modify_by_hand() -> None:
    events, _, table = packets_of(next(p for p in IEX if p.stem == "a_AddOrder"), "iex_deep_plus", "iex_tp")
    add = events[-1]
    assert table.symbol(add["instrument"]) == "IBKR"
    assert (add["kind"], add["side"], add["qty"], add["price"], add["id"]) == (Kind.ADD, 1, 100, 136_500_000_000, 0x63_0000_0000_000A)
    assert (add["ts_event"], add["seq"]) == (int.from_bytes(bytes.fromhex("1e7711156155fa17"), "little"), 0xB82E)
    events, _, _ = packets_of(next(p for p in IEX if p.stem == "M_OrderModify"), "iex_deep_plus", "iex_tp")
    modify = events[-1]
    assert (modify["kind"], modify["side"], modify["qty"], modify["price"]) == (Kind.MODIFY, 2, 200, 0x151B84 * 100_000)


DBN = DATA / "dbn_esm4_mbo"


@pytest.mark.skipif(not DBN.is_dir(), reason=f"no DBN recording in {DBN} (set TICKMESH_DATA)")
def test_dbn_recording() -> None:
    import zstandard

    raw, definition = (
        zstandard.ZstdDecompressor().stream_reader(next(DBN.glob(g)).read_bytes()).read() for g in ("*_mbo_*.zst", "*_definition*.zst")
    )
    spec, framing, _ = load("dbn_mbo", "dbn")
    assert D.dbn_symbols(raw) == {5602: "ESM4"}
    table = InstrumentTable(16)
    feed = D.make_feed(spec, table, framing=framing)
    for code, symbol in D.dbn_symbols(raw).items():
        D.bind_symbol(feed, spec, table, code, symbol)
    events, _, _, pos = stream(raw, "dbn_mbo", "dbn", feed=feed, table=table)
    assert pos == len(raw)
    expected = json.loads((DBN / "expected.json").read_text())["actions"]
    assert {name.removeprefix("mbo."): n for name, n in D.message_counts(feed, spec).items()} == expected
    assert D.malformed(feed) == {}
    kinds = Counter(Kind(e["kind"]).name for e in events)
    assert kinds == {"REFERENCE": 1, "ADD": 13678, "CANCEL": 80, "MODIFY": 27, "TRADE": 5, "CLEAR": 1}
    add = events[2]
    assert (events[0].view(REFERENCE)["symbol"], add["instrument"], add["side"], add["qty"]) == (b"ESM4", 0, 0, 5)
    assert (add["price"], add["id"], add["flags"]) == (5155_500_000_000, 0x5D532D28EEA, Flag.MORE | Flag.SNAPSHOT)
    assert add["ts_recv"] == 1715126400000000000
    events, _, table, _ = stream(definition, "dbn_mbo", "dbn")
    assert (table.symbol(0), int(table.record(0)["tick_size"])) == ("ESM4", 250_000_000)


def test_dbn_metadata_that_is_none() -> None:
    for bad in (b"", b"DBN\1", b"XXX\1\0\0\0\0", b"DBN\1\xff\0\0\0"):
        with pytest.raises(ValueError, match="DBN"):
            D.dbn_symbols(bad)


# ---------------------------------------------------------------- damaged input, with bounds checks

_FUZZ = """
import random, sys
sys.path.insert(0, {tests!r})
import numpy as np
import test_decoder as t
from tickmesh.node import decoder as D
from tickmesh.node.event import EVENT
from tickmesh.node.instruments import InstrumentTable
from tickmesh.transports.toolbox import BOUNDSCHECK
assert BOUNDSCHECK
seed = {seed}
rng = random.Random(seed)
base = t.framed(*(m for m, _ in t.ITCH_CASES), t.directory(5, "QQ"), t.ADD)
inputs = [p.read_bytes() for p in sorted(t.CORPUS.glob("*.bin"))]
for _ in range(400):
    raw = bytearray(base)
    for _ in range(rng.randint(1, 12)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    inputs.append(bytes(raw[: rng.randrange(len(raw) + 1)]))
for raw in inputs:
    t.stream(raw, room=rng.choice([3, 7, 258]), capacity=3)
spec, framing, decoder = t.load("itch50", "moldudp64")
out = np.zeros(7, EVENT)
for number in range(300):
    feed = D.make_feed(spec, InstrumentTable(3), framing=framing, hold_packets=3, hold_bytes=256, gap_wait_ns=10)
    blobs = []
    for k in range(12):
        messages = t.framed(*(rng.choice(t.ITCH_CASES)[0] for _ in range(rng.randint(0, 5))))
        sequence, count = k + rng.randint(0, 4), rng.randint(0, 5)
        raw = bytearray(bytes(9) + bytes([rng.choice([1, 1, 1, 2])]) + sequence.to_bytes(8, "big") + count.to_bytes(2, "big") + messages)
        for _ in range(rng.choice([0, 0, 2])):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        blobs.append(bytes(raw[: rng.randrange(len(raw) + 1)] if rng.random() < 0.2 else raw))
    packets = np.zeros(len(blobs), t.PACKET)
    at = 0
    for packet, blob in zip(packets, blobs):
        packet["offset"], packet["length"], packet["line"], packet["ts_recv"] = at, len(blob), rng.randrange(2), at
        at += len(blob)
    buf, first = t.image(b"".join(blobs)), 0
    for calls in range(10_000):
        first, n = decoder.decode_packets(buf, packets, first, len(packets), feed, out)
        if n == 0 and first == len(packets):
            break
    else:
        raise SystemExit(f"no end: seed {{seed}} input {{number}}")
    while decoder.decode_flush(10**9, feed, out):
        pass
print("fine")
"""


@pytest.mark.slow
def test_damaged_input_with_bounds_checks() -> None:
    seed = int(os.environ.get("TICKMESH_SEED", "20240508"))
    script = _FUZZ.format(tests=str(Path(__file__).parent), seed=seed)
    done = with_bounds_checks("-c", script)
    assert done.stdout.strip() == "fine", f"TICKMESH_SEED={seed}\n{done.stderr[-3000:]}"


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=200))
def test_any_bytes(raw: bytes) -> None:
    _, feed, _, pos = stream(raw, room=4, capacity=2)
    assert 0 <= pos <= len(raw)
    assert sum(D.message_counts(feed, load_spec("itch50")).values()) <= len(raw) // 2
