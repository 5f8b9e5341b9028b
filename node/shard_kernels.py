"""The fixed steps of a shard loop that generated code calls: output records, statistics, instrument registration."""

from __future__ import annotations

from typing import Any

import numpy as np

from tickmesh.node.event import PEERS, Flag, Kind
from tickmesh.node.symbol_filter import symbol_passes
from tickmesh.transports.toolbox import bits_f64, f64_bits, inlined, outlined

_U = np.uint64
_SIGNAL, _TRADE, _EXECUTE = np.uint8(Kind.SIGNAL), np.uint8(Kind.TRADE), np.uint8(Kind.EXECUTE)
_NO_SIDE = np.uint8(2)
_GAP = np.int64(Kind.GAP)
_PEERS = np.int32(PEERS)
_PEER_REFERENCE = np.uint8(Kind.PEER_REFERENCE)
_HIDDEN_AND_AUCTION = np.uint16(Flag.HIDDEN | Flag.AUCTION)
_NO_PRICE = np.int64(-(1 << 63))


@inlined
def begin_output(slots: Any, w: Any, event: Any, kind: Any) -> Any:
    """The output record number `w` (from 0) with its header filled from the input `event`; the caller fills the body."""
    out = slots[w & _U(slots.size - 1)]
    out.seq = w + _U(1)
    out.ts_event = event.ts_event
    out.ts_recv = event.ts_recv
    out.instrument = event.instrument
    out.kind = np.uint8(kind)
    out.side = _NO_SIDE
    out.flags = np.uint16(0)
    return out


@inlined
def pass_through(slots: Any, w: Any, event: Any) -> Any:
    """Output number `w` is a copy of the input; returns the next number."""
    out = begin_output(slots, w, event, event.kind)
    out.side = event.side
    out.flags = event.flags
    out.price = event.price
    out.qty = event.qty
    out.id = event.id
    out.aux = event.aux
    return w + _U(1)


@inlined
def fill_trade(out: Any, event: Any) -> None:
    """The body of a TRADE output from a TRADE input, or from an EXECUTE that the book has completed (aggressor = other side)."""
    out.price = event.price
    out.qty = event.qty
    if event.kind == _EXECUTE:
        out.side = np.uint8(1) - event.side if event.side < 2 else _NO_SIDE
        out.id = _U(event.aux)
        out.aux = np.int64(event.id)
    else:
        out.side = event.side
        out.id = event.id
        out.aux = event.aux
    out.flags = event.flags & _HIDDEN_AND_AUCTION


@inlined
def begin_record(out: Any, i: Any, calculation: Any) -> None:
    """An empty body for an alert, bar or intent of instrument `i`, for its calculation to fill."""
    out.instrument = np.uint32(i)
    out.id = _U(calculation)
    out.price = np.int64(0)
    out.qty = np.int64(0)
    out.aux = np.int64(0)


@inlined
def fill_signal(out: Any, event: Any, i: Any, calculation: Any, value: Any) -> None:
    """The body of a SIGNAL output: which calculation, its value, and the price and quantity of the event it came from."""
    out.instrument = np.uint32(i)
    out.price = event.price
    out.qty = event.qty
    out.id = _U(calculation)
    out.aux = f64_bits(value)


@inlined
def signal_value(event: Any) -> Any:
    """The float64 that a SIGNAL or ALERT event carries."""
    return bits_f64(event.aux)


@inlined
def record_trade(statistics: Any, event: Any) -> None:
    """Add a printed trade to its instrument's statistics."""
    s = statistics[event.instrument]
    s.trades += 1
    s.volume += event.qty
    s.notional += np.float64(event.price) / 1e9 * np.float64(event.qty)


@outlined
def record_gap(gaps: Any, counts: Any, event: Any) -> None:
    """Keep the first and last missing sequence of a gap, as long as there is room."""
    n = counts[_GAP] - 1
    if 0 <= n < gaps.shape[0]:
        gaps[n, 0] = np.int64(event.id)
        gaps[n, 1] = event.aux


@outlined
def record_config(core: Any, changes: Any, event: Any, w: Any) -> None:
    """Take in a CONFIG event: the version, the slot of its parameters, and that outputs after number `w` are made under it.

    Row 0 of `changes` counts; the others are a ring of (outputs before the change, version).
    """
    core[0].parameters = event.aux & 1
    core[0].config_version = event.id
    count = changes[0, 0]
    row = _U(1) + count % _U(changes.shape[0] - 1)
    changes[row, 0] = w
    changes[row, 1] = event.id
    changes[0, 0] = count + _U(1)


@inlined
def record_bbo(statistics: Any, bbo: Any) -> None:
    """Keep the first and the last BBO of an instrument."""
    s = statistics[bbo.instrument]
    if s.bbo_updates == 0:
        s.first_bbo[0] = bbo.price
        s.first_bbo[1] = bbo.qty
        s.first_bbo[2] = bbo.aux
        s.first_bbo[3] = np.int64(bbo.id)
    s.bbo_updates += 1
    s.last_bbo[0] = bbo.price
    s.last_bbo[1] = bbo.qty
    s.last_bbo[2] = bbo.aux
    s.last_bbo[3] = np.int64(bbo.id)


@outlined
def register_instrument(core: Any, info: Any, ticks: Any, patterns: Any, masks: Any, event: Any) -> Any:
    """Take in a REFERENCE event: tick size, exponent, symbol; decide which calculations listen to the instrument.

    Returns:
        Whether it is the instrument's first one.
    """
    i = np.int64(event.instrument)
    if i >= info.size:
        core[0].refused += 1
        return False
    r = info[i]
    is_new = r.tick_size == 0
    r.exponent = np.int32(np.int8(event.side))
    scale = 1.0
    for _ in range(r.exponent):
        scale *= 10.0
    for _ in range(-r.exponent):
        scale /= 10.0
    r.quantity_scale = scale
    r.source = np.int32(event.flags)
    r.feed = np.int32(event.seq) if event.kind == _PEER_REFERENCE else r.source
    w0, w1, w2 = _U(event.qty), event.id, _U(event.aux)
    for k in range(8):
        shift = _U(8 * k)
        r.symbol[k] = np.uint8((w0 >> shift) & _U(255))
        r.symbol[8 + k] = np.uint8((w1 >> shift) & _U(255))
        r.symbol[16 + k] = np.uint8((w2 >> shift) & _U(255))
    if is_new:
        r.tick_size = event.price
        ticks[i] = event.price
    for k in range(masks.shape[0]):
        masks[k, i] = np.uint8(symbol_passes(patterns, k, w0, w1, w2))
    if i + 1 > core[0].instruments:
        core[0].instruments = i + 1
    return is_new


@inlined
def reaches(info: Any, event: Any, i: Any) -> Any:
    """Whether a whole-source event (its `price` is the source's number) concerns instrument `i`, which has its book here."""
    return info[i].tick_size != 0 and np.int64(info[i].source) == event.price and info[i].source < _PEERS


@inlined
def trade_price(info: Any, event: Any) -> Any:
    """Series ``trade.price``: float64, in currency."""
    return np.float64(event.price) / 1e9


@inlined
def trade_qty(info: Any, event: Any) -> Any:
    """Series ``trade.qty``: float64, in whole units."""
    return np.float64(event.qty) / info[event.instrument].quantity_scale


@inlined
def bbo_mid(info: Any, event: Any) -> Any:
    """Series ``bbo.mid``; NaN while a side is empty."""
    if event.price == _NO_PRICE or event.aux == _NO_PRICE:
        return np.nan
    return np.float64(event.price + event.aux) / 2e9


@inlined
def bbo_spread(info: Any, event: Any) -> Any:
    """Series ``bbo.spread``; NaN while a side is empty."""
    if event.price == _NO_PRICE or event.aux == _NO_PRICE:
        return np.nan
    return np.float64(event.aux - event.price) / 1e9


@inlined
def bbo_microprice(info: Any, event: Any) -> Any:
    """Series ``bbo.microprice``: the mid weighted by the other side's quantity; NaN while a side is empty."""
    if event.price == _NO_PRICE or event.aux == _NO_PRICE:
        return np.nan
    bid_qty = np.float64(event.qty)
    ask_qty = np.float64(event.id)
    return (np.float64(event.price) * ask_qty + np.float64(event.aux) * bid_qty) / (bid_qty + ask_qty) / 1e9
