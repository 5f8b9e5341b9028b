"""How outputs look on the wire: batch frames (exact, replayable) and one MessagePack map per event (readable, any language).

A **batch frame** is a 64-byte header followed by the raw 64-byte events, so that a subscriber gets a numpy array without a copy. The
header is one MessagePack array of fixed-width elements::

    [schema version, shard u32, epoch u64, config version u64, first u64, count u32, missing u64, padding bin]

``first`` is the output sequence of the first event. A frame with ``missing`` > 0 has no events: it is a **gap marker**, which says that the
outputs ``first .. first + missing - 1`` were overwritten before they could be published.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import msgpack  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt

from tickmesh.node.event import (
    ALL_INSTRUMENTS,
    ASK,
    BID,
    EVENT,
    PRICE_DECIMALS,
    REFERENCE,
    VIEWS,
    EventArray,
    Flag,
    Kind,
    RiskReason,
    TradingStatus,
    decimal_text,
    price_text,
)
from tickmesh.transports.nats import digest_of
from tickmesh.transports.ring import Ring

SCHEMA_VERSION = 1
HEADER_SIZE = 64
EVENT_SIZE = EVENT.itemsize
_PADDING = 14
_HEADER = struct.Struct(f">BBBIBQBQBQBIBQBB{_PADDING}x")
_ARRAY8, _U32, _U64, _BIN8 = 0x98, 0xCE, 0xCF, 0xC4
_TYPES = (_ARRAY8, _U32, _U64, _U64, _U64, _U32, _U64, _BIN8, _PADDING)
assert _HEADER.size == HEADER_SIZE


# ---------------------------------------------------------------- where outputs are


def stream_name(cluster: str, shard: int) -> str:
    """Name of a shard's output stream."""
    return f"TM_{cluster}_OUT_{shard}"


def stream_subject(cluster: str, shard: int) -> str:
    """Subject of a shard's batch frames."""
    return f"tm.{cluster}.out.{shard}"


def reference_stream_name(cluster: str) -> str:
    """Name of the stream that keeps one REFERENCE event per instrument."""
    return f"TM_{cluster}_REF"


def reference_subject(cluster: str, shard: int | str, instrument: int | str) -> str:
    """Subject of an instrument's REFERENCE event (64 bytes, raw); ``*`` for any."""
    return f"tm.{cluster}.ref.{shard}.{instrument}"


def calculations_subject(cluster: str, shard: int | str) -> str:
    """Subject, in the same stream, of the names of a shard's calculations (:func:`encode_names`)."""
    return reference_subject(cluster, shard, "calculations")


COMPARED = 256
"""Outputs that a leader and a standby compare at a time."""


def outputs_digest(ring: Ring, last: int, count: int = COMPARED) -> int:
    """The :func:`digest_of` the last `count` outputs up to output `last`, or of as many as there are; 0: the ring has not got them all."""
    first = max(1, last - count + 1)
    records = ring.peek(first - 1, last - first + 1) if last > 0 else None
    if records is None or int.from_bytes(records[:8], "little") != first:
        return 0
    return digest_of(records)


# ---------------------------------------------------------------- batch frames


class FrameError(ValueError):
    """A message on an output stream is not a frame that this version can read."""


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """What a batch frame says about its events.

    Attributes:
        shard: whose outputs they are.
        epoch: leadership under which they were published.
        config_version: configuration under which they were made.
        first: output sequence of the first event (or of the first missing one).
        count: events in the frame.
        missing: outputs from `first` on that were overwritten before they could be published; then `count` is 0.
    """

    shard: int
    epoch: int
    config_version: int
    first: int
    count: int
    missing: int = 0

    @property
    def last(self) -> int:
        """Output sequence of the last event (or of the last missing one)."""
        return self.first + self.count + self.missing - 1


def encode_header(header: FrameHeader) -> bytes:
    """The 64 bytes that precede the events."""
    h = header
    made_under = (_U32, h.shard, _U64, h.epoch, _U64, h.config_version)
    return _HEADER.pack(_ARRAY8, SCHEMA_VERSION, *made_under, _U64, h.first, _U32, h.count, _U64, h.missing, _BIN8, _PADDING)


def encode_frame(header: FrameHeader, events: bytes | memoryview = b"") -> bytes:
    """A frame: header, then the events' bytes (``header.count * 64``)."""
    return b"".join((encode_header(header), events))


def decode_frame(payload: bytes | memoryview) -> tuple[FrameHeader, EventArray]:
    """Header and events of a frame.

    Returns:
        The header and an EVENT array of shape ``(count,)``, a read-only view of `payload`.

    Raises:
        FrameError: not a frame, cut short, or of a newer schema version.
    """
    if len(payload) < HEADER_SIZE:
        raise FrameError(f"a frame has at least {HEADER_SIZE} bytes, this message has {len(payload)}")
    a, version, b, shard, c, epoch, d, config, e, first, f, count, g, missing, p, padding = _HEADER.unpack_from(payload)
    if a == _ARRAY8 and version > SCHEMA_VERSION:
        raise FrameError(f"frame of schema version {version}, but this tickmesh reads up to {SCHEMA_VERSION}: upgrade it")
    if (a, b, c, d, e, f, g, p, padding) != _TYPES:
        raise FrameError("not a batch frame: the header's elements have other types")
    if len(payload) != HEADER_SIZE + count * EVENT_SIZE or (missing and count):
        raise FrameError(f"frame of {count} events and {missing} missing has {len(payload)} bytes")
    header = FrameHeader(shard, epoch, config, first, count, missing)
    return header, np.frombuffer(payload, EVENT, count, HEADER_SIZE)


def sequence_runs(events: EventArray) -> list[EventArray]:
    """Cut a batch wherever its output sequences do not follow each other: what one frame may hold."""
    seq = events["seq"]
    if len(events) == 0 or int(seq[-1]) - int(seq[0]) == len(events) - 1:
        return [events] if len(events) else []
    cuts = np.flatnonzero(seq[1:] != seq[:-1] + np.uint64(1)) + 1
    return list(np.split(events, cuts))


# ---------------------------------------------------------------- instruments by id


class InstrumentName(NamedTuple):
    """What an instrument's REFERENCE event says.

    Attributes:
        symbol: as the venue writes it; ``None`` as long as no REFERENCE event was seen.
        tick_size: in units of 1e-9.
        exponent: quantities are ``qty * 10**-exponent``.
        token: the symbol as one token of a NATS subject.
        source: number of the source that it comes from.
    """

    symbol: str | None
    tick_size: int
    exponent: int
    token: str
    source: int = 0


class InstrumentNames:
    """Symbols by instrument id, learnt from the REFERENCE events among the outputs."""

    def __init__(self) -> None:
        self._known: dict[int, InstrumentName] = {}

    def learn(self, events: EventArray) -> EventArray:
        """Take over the REFERENCE events of a batch; returns those that were new or changed (a copy)."""
        found = events[events["kind"] == _REFERENCE].view(REFERENCE)
        changed = np.zeros(len(found), np.bool_)
        for position, row in enumerate(found):
            symbol = bytes(row["symbol"]).decode("utf-8", "replace")
            name = InstrumentName(symbol, int(row["tick_size"]), int(row["side"]), subject_token(symbol), int(row["flags"]))
            changed[position] = self._known.get(int(row["instrument"])) != name
            self._known[int(row["instrument"])] = name
        news: EventArray = found[changed].view(EVENT)
        return news

    def __getitem__(self, instrument: int) -> InstrumentName:
        return self._known.get(instrument) or unnamed(instrument)

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, instrument: int) -> bool:
        return int(instrument) in self._known

    def items(self) -> list[tuple[int, InstrumentName]]:
        """Everything that is known, by id."""
        return list(self._known.items())

    def ids(self, symbols: Iterable[str]) -> npt.NDArray[np.uint32]:
        """Ids of the instruments that have one of these symbols."""
        wanted = set(symbols)
        return np.array([i for i, name in self._known.items() if name.symbol in wanted], np.uint32)


@lru_cache(1 << 16)
def unnamed(instrument: int) -> InstrumentName:
    """Stands for an instrument without a REFERENCE event; its token cannot be any symbol's."""
    return InstrumentName(None, 1, 0, "#all" if instrument == ALL_INSTRUMENTS else f"#{instrument}")


def subject_token(symbol: str) -> str:
    """A symbol as one token of a NATS subject: dots, wildcards, spaces, ``#``, ``%`` and what is not ASCII are written ``%XX``."""
    return quote(symbol, safe="/:=+@$&!,;^|()[]").replace(".", "%2E") or "%"


def token_symbol(token: str) -> str:
    """The symbol of a token that :func:`subject_token` made."""
    return "" if token == "%" else unquote(token)


# ---------------------------------------------------------------- one map per event

CalculationNames = Mapping[tuple[int, int], str]
"""Names of signals by (calculation index, output index)."""

NameHistory = list[tuple[int, CalculationNames]]
"""From which output sequence on which names hold, rising."""
_HISTORY_MAX = 64


def names_at(history: NameHistory, sequence: int) -> CalculationNames:
    """The names that hold at an output sequence."""
    found: CalculationNames = {}
    for first, names in history:
        if first > sequence:
            break
        found = names
    return found


def names_from(history: NameHistory, sequence: int, names: CalculationNames) -> NameHistory:
    """A history in which `names` hold from an output sequence on, at most 64 entries; the same one if they held before."""
    before = [entry for entry in history if entry[0] < sequence]
    if history == before and dict(names_at(before, sequence)) == dict(names):
        return history
    return [*before, (sequence, names)][-_HISTORY_MAX:]


def encode_names(history: NameHistory) -> bytes:
    """A history as MessagePack: ``[[first output sequence, [[calculation, output, name], …]], …]``."""
    plain = [[first, [[index, output, name] for (index, output), name in sorted(names.items())]] for first, names in history]
    return bytes(msgpack.packb(plain))


def decode_names(payload: bytes) -> NameHistory:
    """What :func:`encode_names` made.

    Raises:
        FrameError: it is something else.
    """
    try:
        plain = msgpack.unpackb(payload)
        return [(int(first), {(int(index), int(output)): str(name) for index, output, name in names}) for first, names in plain]
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise FrameError(f"no names of calculations: {error}") from error


_Row = tuple[Any, ...]
_Fields = Callable[[_Row, InstrumentName, CalculationNames], dict[str, Any]]
_SIDES = {BID: "bid", ASK: "ask"}
_KIND_NAMES: dict[int, str] = {int(kind): kind.name.lower() for kind in Kind}
_price = lru_cache(1 << 16)(price_text)
_decimal = lru_cache(1 << 16)(decimal_text)


def kind_name(kind: int) -> str:
    """Name of an event kind in subjects and maps: ``bbo``, ``trade``, ``signal`` …"""
    return _KIND_NAMES.get(kind, f"kind{kind}")


@lru_cache(1 << 12)
def _flag_names(flags: int) -> list[str]:
    return [flag.name.lower() for flag in Flag if flags & flag and flag.name]


def _status_name(code: int) -> str:
    return TradingStatus(code).name.lower() if code in TradingStatus._value2member_map_ else str(code)


def _risk_name(code: int) -> str:
    return RiskReason(code).name.lower() if code in RiskReason._value2member_map_ else str(code)


def _calculation(number: int, names: CalculationNames) -> dict[str, Any]:
    index, output = number & 0xFFFFFFFF, number >> 32
    name = names.get((index, output))
    return {"calculation": index, "output": output} if name is None else {"calculation": name}


# The last four elements of a row are the body, named by the kind's view; rows have 11 elements.
def _order(r: _Row, n: InstrumentName, c: CalculationNames) -> dict[str, Any]:
    return {"price": _price(r[7]), "qty": _decimal(r[8], n.exponent), "order_id": r[9], "previous_id": r[10]}


def _trade(r: _Row, n: InstrumentName, c: CalculationNames) -> dict[str, Any]:
    return {"price": _price(r[7]), "qty": _decimal(r[8], n.exponent), "match_id": r[9], "order_id": r[10]}


def _level(r: _Row, n: InstrumentName, c: CalculationNames) -> dict[str, Any]:
    return {"price": _price(r[7]), "qty": _decimal(r[8], n.exponent), "orders": r[10]}


def _quote(r: _Row, n: InstrumentName, c: CalculationNames) -> dict[str, Any]:
    bid_qty, ask_qty = _decimal(r[8], n.exponent), _decimal(r[9], n.exponent)
    return {"bid": _price(r[7]), "bid_qty": bid_qty, "ask": _price(r[10]), "ask_qty": ask_qty}


def _signal(r: _Row, n: InstrumentName, c: CalculationNames) -> dict[str, Any]:
    return {**_calculation(r[9], c), "value": r[10], "price": _price(r[7]), "qty": _decimal(r[8], n.exponent)}


def _alert(r: _Row, n: InstrumentName, c: CalculationNames) -> dict[str, Any]:
    threshold = struct.unpack("<d", struct.pack("<q", r[8]))[0]
    return {**_calculation(r[9], c), "value": r[10], "threshold": threshold, "price": _price(r[7])}


def _gap(r: _Row, n: InstrumentName, c: CalculationNames) -> dict[str, Any]:
    return {"missing": r[8], "first": r[9], "last": r[10]}


def _status(r: _Row, n: InstrumentName, c: CalculationNames) -> dict[str, Any]:
    return {"status": _status_name(r[10])}


def _risk(r: _Row, n: InstrumentName, c: CalculationNames) -> dict[str, Any]:
    return {"price": _price(r[7]), "qty": _decimal(r[8], n.exponent), "intent": r[9], "reason": _risk_name(r[10])}


def _intent(r: _Row, n: InstrumentName, c: CalculationNames) -> dict[str, Any]:
    return {"price": _price(r[7]), "qty": _decimal(r[8], n.exponent), **_calculation(r[9], c)}


def _imbalance(r: _Row, n: InstrumentName, c: CalculationNames) -> dict[str, Any]:
    paired, indicative = _decimal(r[9], n.exponent), _price(r[10])
    return {"price": _price(r[7]), "imbalance": _decimal(r[8], n.exponent), "paired": paired, "indicative": indicative}


def _bar(r: _Row, n: InstrumentName, c: CalculationNames) -> dict[str, Any]:
    first, tick = r[7], n.tick_size
    high, low, close = first + r[9] * tick, first - r[10] * tick, first + r[11] * tick
    prices = {"open": _price(first), "high": _price(high), "low": _price(low), "close": _price(close)}
    return {**prices, "volume": _decimal(r[8], n.exponent), "trades": r[12]}


def _reference(r: _Row, n: InstrumentName, c: CalculationNames) -> dict[str, Any]:
    return {"tick_size": decimal_text(r[7], PRICE_DECIMALS), "qty_exponent": r[5]}


def _plain(r: _Row, n: InstrumentName, c: CalculationNames) -> dict[str, Any]:
    return {"price": _price(r[7]), "qty": _decimal(r[8], n.exponent), "id": r[9], "aux": r[10]}


_FIELDS: dict[int, _Fields] = {
    Kind.ADD: _order, Kind.EXECUTE: _order, Kind.CANCEL: _order, Kind.DELETE: _order, Kind.REPLACE: _order, Kind.MODIFY: _order,
    Kind.TRADE: _trade, Kind.LEVEL: _level, Kind.QUOTE: _quote, Kind.BBO: _quote, Kind.SIGNAL: _signal, Kind.ALERT: _alert,
    Kind.GAP: _gap, Kind.STATUS: _status, Kind.RISK: _risk, Kind.INTENT: _intent, Kind.IMBALANCE: _imbalance, Kind.BAR: _bar,
    Kind.REFERENCE: _reference, Kind.PEER_BBO: _quote, Kind.PEER_TRADE: _trade, Kind.PEER_REFERENCE: _reference,
}  # fmt: skip
_REFERENCE = np.uint8(Kind.REFERENCE)
_SIDELESS = {
    Kind.REFERENCE, Kind.PEER_REFERENCE, Kind.QUOTE, Kind.BBO, Kind.PEER_BBO,
    Kind.SIGNAL, Kind.ALERT, Kind.GAP, Kind.STATUS, Kind.BAR,
}  # fmt: skip


def event_maps(events: EventArray, instruments: InstrumentNames, calculations: CalculationNames | None = None) -> list[dict[str, Any]]:
    """One map per event with the field names of its kind; prices and quantities are exact decimal text, times are ns.

    Args:
        events: EVENT array of shape ``(n,)``.
        instruments: symbols, tick sizes and quantity exponents.
        calculations: names of signals; without them a signal has the numbers ``calculation`` and ``output``.
    """
    names = calculations or {}
    maps: list[dict[str, Any]] = [{}] * len(events)
    for kind in set(events["kind"].tolist()):
        positions = np.flatnonzero(events["kind"] == kind)
        view = VIEWS.get(Kind(kind), EVENT) if kind in _KIND_NAMES else EVENT
        name, fields, sided = kind_name(kind), _FIELDS.get(kind, _plain), kind not in _SIDELESS
        for position, row in zip(positions.tolist(), events[positions].view(view).tolist()):
            instrument = instruments[row[3]]
            # header elements: seq, ts_event, ts_recv, instrument, kind, side, flags
            head = {"kind": name, "symbol": instrument.symbol, "seq": row[0], "ts_event": row[1], "ts_recv": row[2]}
            if instrument.symbol is None:
                head["instrument"] = row[3]
            if sided and row[5] in _SIDES:
                head["side"] = _SIDES[row[5]]
            if row[6]:
                head["flags"] = _flag_names(row[6])
            body = fields(row, instrument, names)
            maps[position] = {**head, **body}
    return maps


class EventEncoder:
    """Subjects ``tm.<cluster>.<kind>.<symbol>`` and MessagePack maps for per-event delivery. Keeps subjects once made."""

    def __init__(self, cluster: str, instruments: InstrumentNames, calculations: CalculationNames | None = None) -> None:
        self._prefix = f"tm.{cluster}."
        self._instruments = instruments
        self._calculations = calculations
        self._packer = msgpack.Packer()
        self._subjects: dict[tuple[int, str], str] = {}

    def encode(self, events: EventArray) -> list[tuple[str, bytes]]:
        """(subject, payload) of each event."""
        maps = event_maps(events, self._instruments, self._calculations)
        pack, subject = self._packer.pack, self._subject
        keys = zip(events["kind"].tolist(), events["instrument"].tolist())
        return [(subject(kind, instrument), pack(one)) for (kind, instrument), one in zip(keys, maps)]

    def _subject(self, kind: int, instrument: int) -> str:
        key = (kind, self._instruments[instrument].token)
        found = self._subjects.get(key)
        if found is None:
            found = self._subjects[key] = f"{self._prefix}{kind_name(kind)}.{key[1]}"
        return found
