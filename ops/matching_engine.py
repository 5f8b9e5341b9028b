"""Price-time priority matching engine, compiled: the exchange inside the market simulator.

Each instrument has a ladder of ``ticks`` price levels (its static price band; orders outside are refused) and a pool of ``orders`` slots.
A level is a FIFO queue of orders, linked through the slots; since a book is never crossed, one ladder serves both sides. Everything is
allocated once by :func:`make_engine`. A kernel answers with a slot (> 0), :data:`NOTHING_RESTS` or a negative refusal, and leaves what
traded in ``engine.fills[:engine.state[0].fills]``.

Prices are ladder ticks (``0 <= tick < ticks``): the caller maps them to money. Quantities are shares. Sides are ``BID`` and ``ASK``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tickmesh.node import event
from tickmesh.transports.toolbox import count_leading_zeros, count_trailing_zeros, inlined, loop, outlined

ORDER_SLOT = np.dtype([
    ("ref", "<i8"), ("qty", "<i4"), ("tick", "<i4"), ("previous", "<i4"), ("next", "<i4"),
    ("instrument", "<i4"), ("side", "u1"), ("mpid", "u1"), ("_pad", "<u2"),
])  # fmt: skip
"""One resting order; ``ref`` 0 = a free slot, chained through ``next``. Slot 0 is never used and stands for "none"."""
LADDER_LEVEL = np.dtype([("qty", "<i8"), ("head", "<i4"), ("tail", "<i4"), ("orders", "<i4"), ("_pad", "<i4")])
TOUCH = np.dtype([("best_bid", "<i4"), ("best_ask", "<i4"), ("free", "<i4"), ("live", "<i4"), ("halted", "<i4"), ("_pad", "<i4")])
"""One instrument's state: best ticks (-1 and ``ticks`` where a side is empty), head of its free slots, resting orders."""
FILL = np.dtype([("ref", "<i8"), ("match", "<i8"), ("qty", "<i4"), ("tick", "<i4"), ("left", "<i4"), ("side", "<i4")])
"""A trade against resting order ``ref`` (whose side is ``side``) at its own price; ``left`` = what remains of it."""
ENGINE_STATE = np.dtype([
    ("next_ref", "<i8"), ("next_match", "<i8"), ("ticks", "<i8"), ("capacity", "<i8"),
    ("fills", "<i8"), ("remaining", "<i8"), ("refused", "<i8"), ("dropped", "<i8"),
])  # fmt: skip
"""``remaining`` = what is left of the last submitted order; ``refused`` counts refusals, ``dropped`` orders cut at the fills limit."""

_lowest_bit: Any = count_trailing_zeros
_zeros_above: Any = count_leading_zeros

# np.int64, because numba compiles a version of a kernel for every plain constant that it is called with
BID, ASK = np.int64(event.BID), np.int64(event.ASK)
LIMIT, IOC, MARKET, POST_ONLY = (np.int64(kind) for kind in range(4))
NOTHING_RESTS = np.int64(0)
REFUSED_BAND, REFUSED_QTY, REFUSED_FULL, REFUSED_WOULD_CROSS, REFUSED_HALTED, REFUSED_UNKNOWN = (np.int64(-code) for code in range(1, 7))
REFUSALS = {
    REFUSED_BAND: "price outside the band",
    REFUSED_QTY: "quantity is not positive",
    REFUSED_FULL: "no free order slot for this instrument",
    REFUSED_WOULD_CROSS: "a post-only order would trade",
    REFUSED_HALTED: "the instrument is halted and the order would trade",
    REFUSED_UNKNOWN: "no such resting order",
}


class Engine(NamedTuple):
    """The whole exchange: arrays only."""

    orders: Any
    """ORDER_SLOT[1 + instruments * capacity]: instrument i owns slots ``1 + i * capacity`` and up."""
    levels: Any
    """LADDER_LEVEL[instruments * ticks]."""
    occupied: Any
    """u64[instruments * ticks / 64]: bit set where a level has orders."""
    touches: Any
    """TOUCH[instruments]."""
    fills: Any
    """FILL[fills_max] of the last submit or replace."""
    state: Any
    """ENGINE_STATE[1]."""


def make_engine(instruments: int, *, ticks: int = 8192, capacity: int = 512, fills_max: int = 32) -> Engine:
    """Empty books for `instruments`.

    Args:
        instruments: how many, at least 1.
        ticks: price levels per instrument, a multiple of 64.
        capacity: resting orders per instrument.
        fills_max: most fills of one aggressive order; what is left of it then is dropped.

    Raises:
        ValueError: an argument is out of range.
    """
    if instruments < 1 or capacity < 1 or fills_max < 1:
        raise ValueError("instruments, capacity and fills_max must be at least 1")
    if ticks < 64 or ticks % 64:
        raise ValueError(f"ticks must be a multiple of 64, not {ticks}")
    orders = np.zeros(1 + instruments * capacity, ORDER_SLOT)
    touches = np.zeros(instruments, TOUCH)
    first = 1 + np.arange(instruments, dtype=np.int32) * np.int32(capacity)
    orders["next"][1:] = np.arange(2, 2 + instruments * capacity)
    orders["next"][first + capacity - 1] = 0
    touches["free"], touches["best_bid"], touches["best_ask"] = first, -1, ticks
    state = np.zeros(1, ENGINE_STATE)
    state["next_ref"] = state["next_match"] = 1
    state["ticks"], state["capacity"] = ticks, capacity
    levels = np.zeros(instruments * ticks, LADDER_LEVEL)
    occupied = np.zeros(instruments * ticks // 64, np.uint64)
    return Engine(orders, levels, occupied, touches, np.zeros(fills_max, FILL), state)


# ---------------------------------------------------------------- the ladder


@inlined
def _mark(engine: Any, index: Any) -> Any:
    engine.occupied[index >> 6] |= np.uint64(1) << np.uint64(index & 63)


@inlined
def _clear(engine: Any, index: Any) -> Any:
    engine.occupied[index >> 6] &= ~(np.uint64(1) << np.uint64(index & 63))


@inlined
def _occupied_from(engine: Any, instrument: Any, tick: Any) -> Any:
    """First tick >= `tick` with orders; ``ticks`` if there is none."""
    ticks = engine.state[0].ticks
    if tick >= ticks:
        return ticks
    first = instrument * ticks
    word = (first + tick) >> 6
    bits = engine.occupied[word] >> np.uint64(tick & 63) << np.uint64(tick & 63)
    last = (first + ticks - 1) >> 6
    while bits == np.uint64(0) and word < last:
        word += 1
        bits = engine.occupied[word]
    if bits == np.uint64(0):
        return ticks
    return (word << 6) + np.int64(_lowest_bit(bits)) - first


@inlined
def _occupied_to(engine: Any, instrument: Any, tick: Any) -> Any:
    """Last tick <= `tick` with orders; -1 if there is none."""
    if tick < 0:
        return np.int64(-1)
    first = instrument * engine.state[0].ticks
    word = (first + tick) >> 6
    bits = engine.occupied[word] << np.uint64(63 - (tick & 63)) >> np.uint64(63 - (tick & 63))
    while bits == np.uint64(0) and word > first >> 6:
        word -= 1
        bits = engine.occupied[word]
    if bits == np.uint64(0):
        return np.int64(-1)
    return (word << 6) + np.int64(63) - np.int64(_zeros_above(bits)) - first


@outlined
def rest(engine: Any, instrument: Any, side: Any, qty: Any, tick: Any, mpid: Any) -> Any:
    """Append an order to its level's queue under the next reference number; returns its slot. The pool must have a free one."""
    touch, state = engine.touches[instrument], engine.state[0]
    slot = np.int64(touch.free)
    order = engine.orders[slot]
    touch.free = order.next
    touch.live += 1
    index = instrument * state.ticks + tick
    level = engine.levels[index]
    order.ref, order.qty, order.tick, order.side = state.next_ref, qty, tick, side
    order.instrument, order.mpid, order.previous, order.next = instrument, mpid, level.tail, 0
    state.next_ref += 1
    if level.tail == 0:
        level.head = slot
        _mark(engine, index)
        if side == BID:
            touch.best_bid = max(touch.best_bid, tick)
        else:
            touch.best_ask = min(touch.best_ask, tick)
    else:
        engine.orders[level.tail].next = slot
    level.tail = slot
    level.qty += qty
    level.orders += 1
    return slot


@outlined
def unlink(engine: Any, slot: Any) -> Any:
    """Take a resting order out of its queue and free its slot."""
    order = engine.orders[slot]
    instrument, tick, before, after = np.int64(order.instrument), np.int64(order.tick), np.int64(order.previous), np.int64(order.next)
    touch = engine.touches[instrument]
    index = instrument * engine.state[0].ticks + tick
    level = engine.levels[index]
    if before:
        engine.orders[before].next = after
    else:
        level.head = after
    if after:
        engine.orders[after].previous = before
    else:
        level.tail = before
    level.qty -= order.qty
    level.orders -= 1
    if level.head == 0:
        _clear(engine, index)
        if tick == touch.best_bid:
            touch.best_bid = _occupied_to(engine, instrument, tick - 1)
        elif tick == touch.best_ask:
            touch.best_ask = _occupied_from(engine, instrument, tick + 1)
    order.ref, order.qty = 0, 0
    order.next = touch.free
    touch.free = slot
    touch.live -= 1


# ---------------------------------------------------------------- orders


@inlined
def crosses(engine: Any, instrument: Any, side: Any, tick: Any) -> Any:
    """Whether an order at `tick` would trade."""
    touch = engine.touches[instrument]
    return tick >= touch.best_ask if side == BID else tick <= touch.best_bid


@inlined
def _match(engine: Any, instrument: Any, side: Any, qty: Any, tick: Any) -> Any:
    """Trade against the other side, best price first, oldest order first; returns what is left."""
    touch, state = engine.touches[instrument], engine.state[0]
    while qty > 0 and crosses(engine, instrument, side, tick) and state.fills < len(engine.fills):
        best = np.int64(touch.best_ask) if side == BID else np.int64(touch.best_bid)
        index = instrument * state.ticks + best
        level = engine.levels[index]
        slot = np.int64(level.head)
        order = engine.orders[slot]
        traded = min(qty, np.int64(order.qty))
        fill = engine.fills[state.fills]
        fill.ref, fill.match, fill.qty, fill.tick = order.ref, state.next_match, traded, best
        fill.left, fill.side = order.qty - traded, 1 - side
        state.next_match += 1
        state.fills += 1
        qty -= traded
        if traded == order.qty:
            unlink(engine, slot)
        else:
            order.qty -= traded
            level.qty -= traded
    return qty


@inlined
def _refuse(engine: Any, code: Any) -> Any:
    engine.state[0].refused += 1
    return code


@outlined
def submit(engine: Any, instrument: Any, side: Any, qty: Any, tick: Any, kind: Any, mpid: Any) -> Any:
    """A new order: ``LIMIT`` rests what does not trade, ``IOC`` drops it, ``MARKET`` ignores `tick`, ``POST_ONLY`` never trades.

    Returns the slot where the remainder rests, NOTHING_RESTS, or a refusal; fills and the remainder are in ``engine.state``.
    """
    state, touch = engine.state[0], engine.touches[instrument]
    state.fills, state.remaining = 0, qty
    if kind == MARKET:
        tick = state.ticks - 1 if side == BID else np.int64(0)
    if tick < 0 or tick >= state.ticks:
        return _refuse(engine, REFUSED_BAND)
    if qty <= 0:
        return _refuse(engine, REFUSED_QTY)
    if kind in (LIMIT, POST_ONLY) and touch.free == 0:
        return _refuse(engine, REFUSED_FULL)
    if crosses(engine, instrument, side, tick):
        if kind == POST_ONLY:
            return _refuse(engine, REFUSED_WOULD_CROSS)
        if touch.halted:
            return _refuse(engine, REFUSED_HALTED)
        state.remaining = _match(engine, instrument, side, qty, tick)
    if state.remaining == 0 or kind in (IOC, MARKET):
        return NOTHING_RESTS
    if crosses(engine, instrument, side, tick):
        state.dropped += 1
        return NOTHING_RESTS
    return rest(engine, instrument, side, state.remaining, tick, mpid)


@outlined
def reduce(engine: Any, slot: Any, qty: Any) -> Any:
    """Take `qty` off a resting order, keeping its place; at or above its quantity it is removed. Returns what remains, or a refusal."""
    order = engine.orders[slot]
    if slot <= 0 or order.ref == 0:
        return _refuse(engine, REFUSED_UNKNOWN)
    if qty <= 0:
        return _refuse(engine, REFUSED_QTY)
    if qty >= order.qty:
        unlink(engine, slot)
        return np.int64(0)
    order.qty -= qty
    engine.levels[order.instrument * engine.state[0].ticks + order.tick].qty -= qty
    return np.int64(order.qty)


@outlined
def replace(engine: Any, slot: Any, qty: Any, tick: Any) -> Any:
    """A resting order takes a new quantity, price and reference number and goes to the end of the queue, or trades if it now crosses.

    Returns as :func:`submit` does. A refused replace leaves the order as it was.
    """
    order, state = engine.orders[slot], engine.state[0]
    state.fills, state.remaining = 0, qty
    if slot <= 0 or order.ref == 0:
        return _refuse(engine, REFUSED_UNKNOWN)
    if tick < 0 or tick >= state.ticks:
        return _refuse(engine, REFUSED_BAND)
    if qty <= 0:
        return _refuse(engine, REFUSED_QTY)
    instrument, side, mpid = np.int64(order.instrument), np.int64(order.side), np.int64(order.mpid)
    if engine.touches[instrument].halted and crosses(engine, instrument, side, tick):
        return _refuse(engine, REFUSED_HALTED)
    unlink(engine, slot)
    return submit(engine, instrument, side, qty, tick, LIMIT, mpid)


@loop
def engine_submit(engine: Any, instrument: Any, side: Any, qty: Any, tick: Any, kind: Any, mpid: Any) -> Any:
    """:func:`submit`, callable from Python (int64 arguments)."""
    return submit(engine, instrument, side, qty, tick, kind, mpid)


@loop
def engine_reduce(engine: Any, slot: Any, qty: Any) -> Any:
    """:func:`reduce`, callable from Python."""
    return reduce(engine, slot, qty)


@loop
def engine_replace(engine: Any, slot: Any, qty: Any, tick: Any) -> Any:
    """:func:`replace`, callable from Python."""
    return replace(engine, slot, qty, tick)


# ---------------------------------------------------------------- reading it from Python


def book_levels(engine: Engine, instrument: int, side: int, depth: int | None = None) -> list[tuple[int, int, int]]:
    """``(tick, quantity, orders)`` of one side, best first, at most `depth` of them."""
    ticks = int(engine.state["ticks"][0])
    ladder = engine.levels[instrument * ticks : (instrument + 1) * ticks]
    best = int(engine.touches["best_bid" if side == BID else "best_ask"][instrument])
    held = np.nonzero(ladder["orders"][: best + 1])[0][::-1] if side == BID else best + np.nonzero(ladder["orders"][best:])[0]
    return [(int(t), int(ladder["qty"][t]), int(ladder["orders"][t])) for t in held[:depth]]


def queue(engine: Engine, instrument: int, tick: int) -> list[tuple[int, int]]:
    """``(reference, quantity)`` of the orders at one tick, oldest first."""
    slot = int(engine.levels["head"][instrument * int(engine.state["ticks"][0]) + tick])
    found: list[tuple[int, int]] = []
    while slot:
        found.append((int(engine.orders["ref"][slot]), int(engine.orders["qty"][slot])))
        slot = int(engine.orders["next"][slot])
    return found


def live_slots(engine: Engine, instrument: int) -> npt.NDArray[np.int64]:
    """Slots of one instrument's resting orders."""
    capacity = int(engine.state["capacity"][0])
    first = 1 + instrument * capacity
    return first + np.nonzero(engine.orders["ref"][first : first + capacity])[0]


__all__ = [
    "ASK", "BID", "IOC", "LIMIT", "MARKET", "NOTHING_RESTS", "POST_ONLY", "REFUSALS", "Engine",
    "book_levels", "engine_reduce", "engine_replace", "engine_submit", "live_slots", "make_engine", "queue",
]  # fmt: skip
