"""Slow independent readers of the venues' packets for tests: pcap, framings and messages with struct, written from the venues' layouts,
sharing nothing with the spec files or the decoder."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tickmesh.node.event import TradingStatus

Payload = tuple[tuple[str, int], bytes]
"""Destination (address, port) and bytes of a datagram."""


def datagrams(path: Path) -> list[Payload]:
    """UDP payloads of a classic little-endian pcap (Ethernet, maybe VLAN, IPv4)."""
    data, at, found = path.read_bytes(), 24, []
    while at < len(data):
        size = struct.unpack_from("<I", data, at + 8)[0]
        frame, at = data[at + 16 : at + 16 + size], at + 16 + size
        ip = 18 if frame[12:14] == b"\x81\x00" else 14
        udp = ip + (frame[ip] & 15) * 4
        port, length = struct.unpack_from(">HH", frame, udp + 2)
        found.append(((".".join(map(str, frame[ip + 16 : ip + 20])), port), frame[udp + 8 : udp + length]))
    return found


# ---------------------------------------------------------------- framings: messages of a payload


def cboe_unit(payload: bytes) -> Iterator[bytes]:
    length, count, _, _ = struct.unpack_from("<HBBI", payload)
    assert length == len(payload)
    at = 8
    for _ in range(count):
        yield payload[at : at + payload[at]]
        at += payload[at]
    assert at == length


def _prefixed(payload: bytes, at: int, count: int, order: str) -> Iterator[bytes]:
    for _ in range(count):
        size = struct.unpack_from(order + "H", payload, at)[0]
        yield payload[at + 2 : at + 2 + size]
        at += 2 + size
    assert at == len(payload)


def iex_tp(payload: bytes) -> Iterator[bytes]:
    yield from _prefixed(payload, 40, struct.unpack_from("<H", payload, 14)[0], "<")


def moldudp64(payload: bytes) -> Iterator[bytes]:
    yield from _prefixed(payload, 20, struct.unpack_from(">H", payload, 18)[0], ">")


def memx_udp(payload: bytes) -> Iterator[bytes]:
    if payload[0] == 2:
        yield from _prefixed(payload, 20, struct.unpack_from(">H", payload, 18)[0], ">")


def miax_mach(payload: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(payload):
        _, length, kind, _ = struct.unpack_from("<QHBB", payload, at)
        if kind == 3:
            yield payload[at + 12 : at + length]
        at += length
    assert at == len(payload)


# ---------------------------------------------------------------- messages: name, then what the event must say

Told = dict[str, Any]
_BUY = {b"B": 0, b"S": 1, b"N": 2, b" ": 2}


def _order(kind: str, ns: int, order: int, side: int, qty: int, price: int, **more: Any) -> Told:
    return {"kind": kind, "ns": ns, "id": order, "side": side, "qty": qty, "price": price, **more}


def _text(raw: bytes) -> str:
    return raw.decode().rstrip()


def _packed(raw: bytes) -> int:
    return int.from_bytes(raw, "little")


def pitch(message: bytes, *, signed: bool, mapped: bool = False) -> tuple[str, Told]:
    """Cboe PITCH. `signed`: prices are; `mapped`: the symbol of six characters is a number."""
    kind, short, long = message[1], "h" if signed else "H", "q" if signed else "Q"
    body = message[2:]
    name = (lambda raw: "#" + str(_packed(raw[:6]))) if mapped else _text
    if kind == 0x22:
        time, order, side, qty, symbol, price = struct.unpack_from("<IQcH6s" + short, body)
        return "add_order_short", {
            "kind": "ADD",
            "ns": time,
            "id": order,
            "side": _BUY[side],
            "qty": qty,
            "price": price * 10**7,
            "symbol": name(symbol),
        }
    if kind == 0x21:
        time, order, side, qty, symbol, price = struct.unpack_from("<IQcI6s" + long, body)
        return "add_order_long", {
            "kind": "ADD",
            "ns": time,
            "id": order,
            "side": _BUY[side],
            "qty": qty,
            "price": price * 10**5,
            "symbol": name(symbol),
        }
    if kind in (0x27, 0x28):
        time, order, qty, price = struct.unpack_from("<IQ" + ("I" + long if kind == 0x27 else "H" + short), body)
        told = {"kind": "MODIFY", "ns": time, "id": order, "side": 2, "qty": qty, "price": price * (10**5 if kind == 0x27 else 10**7)}
        return ("modify_order_long" if kind == 0x27 else "modify_order_short"), told
    if kind == 0x29:
        time, order = struct.unpack_from("<IQ", body)
        return "delete_order", {"kind": "DELETE", "ns": time, "id": order}
    if kind == 0x23:
        time, order, qty, execution = struct.unpack_from("<IQIQ", body)
        return "order_executed", {"kind": "EXECUTE", "ns": time, "id": order, "qty": qty, "aux": execution}
    if kind == 0x31:
        time, symbol, status = struct.unpack_from("<I8sc", body)
        return "trading_status", {"kind": "STATUS", "ns": time, "symbol": _text(symbol), "aux": {b"T": 1, b"H": 2, b"Q": 4}[status]}
    return _pitch_rest(kind, body)


def _pitch_rest(kind: int, body: bytes) -> tuple[str, Told]:
    if kind == 0x20:
        return "time", {"kind": "time", "seconds": struct.unpack_from("<I", body, 4 if len(body) > 4 else 0)[0]}
    if kind == 0xBB:
        time, symbol = struct.unpack_from("<I6s", body)
        tick = struct.unpack_from("<Q", body, 28)[0] * 10**5
        return "instrument_definition", {"kind": "REFERENCE", "ns": time, "symbol": _text(symbol), "price": tick}
    if kind == 0x9A:
        return "instrument_definition", {"kind": "REFERENCE", "symbol": _text(body[4:10]), "price": 10**7}
    if kind == 0x2E:
        return "symbol_mapping", {"kind": "none"}
    if kind == 0xAE:
        time, auction = struct.unpack_from("<IQ", body)
        return "auction_cancel", {"kind": "SYSTEM", "ns": time, "id": auction, "aux": 0xAE}
    if kind == 0xAD:
        time, symbol, auction, _, side, price, qty = struct.unpack_from("<I6sQccqI", body)
        told = {
            "kind": "SYSTEM",
            "ns": time,
            "symbol": _text(symbol),
            "id": auction,
            "side": _BUY[side],
            "price": price * 10**5,
            "qty": qty,
            "aux": 0xAD,
        }
        return "auction_notification", told
    assert kind == 0xD1
    time, symbol, _, _, buy, sell, price = struct.unpack_from("<I8scqIIq", body)
    return "auction_update", _order("SYSTEM", time, sell, 2, buy, price * 10**5, symbol=_text(symbol), aux=0xD1)


def iex(message: bytes) -> tuple[str, Told]:
    kind, one, at = chr(message[0]), message[1:2], struct.unpack_from("<q", message, 2)[0]
    body = message[18:]
    told: Told = {"at": at, "symbol": _text(message[10:18])}
    if kind in "85":
        size, price = struct.unpack_from("<Iq", body)
        more = 0 if one[0] & 1 else 1
        return ("level_buy" if kind == "8" else "level_sell"), dict(
            told, kind="LEVEL", side="85".index(kind), qty=size, price=price * 10**5, flags=more
        )
    if kind == "Q":
        bid_size, bid, ask, ask_size = struct.unpack_from("<IqqI", body)
        none = -(1 << 63)
        prices = [price * 10**5 if price else none for price in (bid, ask)]
        return "quote_update", dict(told, kind="QUOTE", price=prices[0], qty=bid_size, id=ask_size, aux=prices[1])
    if kind == "T":
        size, price, trade = struct.unpack_from("<Iqq", body)
        return "trade_report", dict(told, kind="TRADE", qty=size, price=price * 10**5, id=trade)
    if kind == "X":
        return "official_price", dict(told, kind="SYSTEM", price=struct.unpack_from("<q", body)[0] * 10**5, id=one[0], aux=ord("X"))
    if kind == "A":
        paired, reference, indicative, qty, side = struct.unpack_from("<IqqIc", body)
        told = dict(told, id=paired, price=reference * 10**5, aux=indicative * 10**5, qty=qty, side=_BUY[side])
        return "auction_information", dict(told, kind="IMBALANCE")
    if kind == "S":
        return "system_event", {"kind": "SYSTEM", "at": at, "aux": one[0]}
    return _iex_status(kind, one, body, told)


def _iex_status(kind: str, one: bytes, body: bytes, told: Told) -> tuple[str, Told]:
    if kind == "H":
        return "trading_status", dict(told, kind="STATUS", aux={b"T": 1, b"H": 2, b"P": 3, b"O": 5}[one], id=_packed(body))
    if kind == "O":
        return "operational_halt", dict(told, kind="STATUS", aux={b"N": 1, b"O": 2}[one])
    if kind == "P":
        return "short_sale_test", dict(told, kind="SYSTEM", aux=ord("P"), id=one[0], qty=body[0])
    assert kind == "D"
    return "security_directory", {"kind": "none"}


def memx(message: bytes) -> tuple[str, Told]:
    size, template, schema, version, at = struct.unpack_from(">HBBHQ", message)
    assert (size + 6, schema, version) == (len(message), 2, 0x103)
    if template == 5:
        return "trading_session_status", {"kind": "SYSTEM", "at": at, "aux": message[14]}
    told: Told = {"at": at, "symbol": f"#{struct.unpack_from('>H', message, 14)[0]}"}
    body = message[16:]
    if template == 10:
        order, side, qty, price = struct.unpack_from(">QcIq", body)
        return "order_added", dict(told, kind="ADD", id=order, side=_BUY[side], qty=qty, price=price * 1000)
    if template == 11:
        return "order_deleted", dict(told, kind="DELETE", id=struct.unpack_from(">Q", body)[0])
    if template == 12:
        order, qty = struct.unpack_from(">QI", body)
        return "order_reduced", dict(told, kind="CANCEL", id=order, qty=qty)
    if template == 13:
        order, trade, qty, price = struct.unpack_from(">QQIq", body)
        return "order_executed", dict(told, kind="EXECUTE", id=order, qty=qty, price=price * 1000, aux=trade, flags=512)
    if template == 3:
        status = {b"H": 2, b"P": 3, b"Q": 4, b"T": 1}[body[:1]]
        return "security_trading_status", dict(told, kind="STATUS", aux=status, id=body[1])
    assert template == 2
    return "reg_sho_restriction", dict(told, kind="SYSTEM", aux=2, id=body[0])


def jnx(message: bytes) -> tuple[str, Told]:
    kind, body = chr(message[0]), message[1:]
    first = struct.unpack_from(">I", body)[0]
    if kind == "T":
        return "seconds", {"kind": "time", "seconds": first}
    if kind == "S":
        return "system_event", {"kind": "SYSTEM", "ns": first, "aux": body[8]}
    if kind == "Y":
        return "short_selling_restriction", {
            "kind": "SYSTEM",
            "ns": first,
            "symbol": f"#{struct.unpack_from('>I', body, 4)[0]}",
            "aux": ord("Y"),
            "id": body[12],
        }
    if kind == "D":
        return "order_deleted", {"kind": "DELETE", "ns": first, "id": struct.unpack_from(">Q", body, 4)[0]}
    if kind == "E":
        order, qty, match = struct.unpack_from(">QIQ", body, 4)
        return "order_executed", {"kind": "EXECUTE", "ns": first, "id": order, "qty": qty, "aux": match}
    assert kind == "U"
    old, order, qty, price = struct.unpack_from(">QQII", body, 4)
    return "order_replaced", {"kind": "REPLACE", "ns": first, "id": order, "aux": old, "qty": qty, "price": price * 10**8, "side": 2}


def nasdaq_bbo(message: bytes) -> tuple[str, Told]:
    kind, at = chr(message[0]), int.from_bytes(message[3:9], "big")
    told: Told = {"at": at, "symbol": _text(message[9:17])}
    if kind == "Q":
        bid, bid_size, ask, ask_size = struct.unpack_from(">IIII", message, 18)
        return "quotation", dict(told, kind="QUOTE", price=bid * 10**5, qty=bid_size, aux=ask * 10**5, id=ask_size)
    if kind == "H":
        status = {"T": 1, "H": 2, "P": 3, "Q": 4}[chr(message[18])]
        return "trading_action", dict(told, kind="STATUS", aux=status, id=_packed(message[19:23]))
    if kind == "Y":
        return "reg_sho_restriction", dict(told, kind="SYSTEM", aux=ord("Y"), id=message[17])
    assert kind == "S"
    return "system_event", {"kind": "SYSTEM", "at": at, "aux": message[9]}


def miax_onyx_tom(message: bytes) -> tuple[str, Told]:
    at = struct.unpack_from("<Q", message, 1)[0]
    if message[0] == 15:
        number, bid, bid_size, ask, ask_size = struct.unpack_from("<IqIqI", message, 9)
        assert bid_size
        assert ask_size
        said = {"kind": "QUOTE", "price": bid, "qty": bid_size, "aux": ask, "id": ask_size}
        return "best_bid_and_offer.both", {"at": at, "symbol": f"#{number}", **said}
    if message[0] == 4:
        number, status, state = struct.unpack_from("<IBB", message, 9)
        status = {1: TradingStatus.PRE_OPEN, 2: TradingStatus.AUCTION, 3: TradingStatus.TRADING, 6: TradingStatus.CLOSED}.get(
            status, TradingStatus.HALTED
        )
        return "trading_status", {"kind": "STATUS", "at": at, "symbol": f"#{number}", "aux": status, "id": state}
    assert message[0] == 3
    return "system_state", {"kind": "SYSTEM", "at": at, "aux": message[18], "id": message[17]}


Reader = Callable[[bytes], tuple[str, Told]]
READERS: dict[str, tuple[Callable[[bytes], Iterator[bytes]], Reader]] = {
    "cboe_pitch": (cboe_unit, lambda m: pitch(m, signed=False)),
    "cboe_pitch_options": (cboe_unit, lambda m: pitch(m, signed=False, mapped=True)),
    "cboe_pitch_complex": (cboe_unit, lambda m: pitch(m, signed=True)),
    "cboe_cfe_pitch": (cboe_unit, lambda m: pitch(m, signed=True)),
    "iex_deep": (iex_tp, iex),
    "iex_tops": (iex_tp, iex),
    "memx_memoir_depth": (memx_udp, memx),
    "jnx_itch": (moldudp64, jnx),
    "nasdaq_bbo": (moldudp64, nasdaq_bbo),
    "miax_onyx_tom": (miax_mach, miax_onyx_tom),
}


def read(protocol: str, payloads: list[bytes]) -> tuple[Counter[str], list[Told]]:
    """Messages by name, and what each tells; ``at`` is made of the seconds and nanoseconds where a message has only the latter."""
    framing, reader = READERS[protocol]
    counts: Counter[str] = Counter()
    told: list[Told] = []
    base: int | None = None
    for payload in payloads:
        for message in framing(payload):
            name, said = reader(message)
            counts[name] += 1
            if said["kind"] == "time":
                base = said["seconds"] * 10**9
            elif said["kind"] != "none":
                if "ns" in said:
                    ns = said.pop("ns")
                    said["at"] = None if base is None else base + ns
                told.append(said)
    return counts, told


def write_pcap(path: Path, payloads: list[bytes], port: int = 30501) -> None:
    """A classic pcap with one datagram per payload, a second apart."""
    found = [struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)]
    for second, payload in enumerate(payloads):
        udp = struct.pack(">HHHH", 4000, port, 8 + len(payload), 0) + payload
        ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, bytes([10, 0, 0, 1]), bytes([233, 209, 92, 1])) + udp
        frame = bytes(12) + b"\x08\x00" + ip
        found += [struct.pack("<IIII", 1_692_711_000 + second, 0, len(frame), len(frame)), frame]
    path.write_bytes(b"".join(found))
