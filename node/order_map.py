"""Which instrument an order is of, for protocols whose messages name an order and nothing else (Cboe PITCH, JNX ITCH).

A feed keeps a table of the orders that rest: an ``add`` enters one with its instrument and quantity, what executes or takes off quantity
counts it down, what deletes it or leaves nothing takes it out. Open addressing with linear probing; taking out moves the entries
behind up, so that the table never fills with what has gone. It holds at most three quarters of its slots; an order that finds no room is
refused with its event (``orders_full``), and a message about an order that is not there is refused as ``unknown_order``.

Orders of filtered symbols are kept too: what is said about them later is filtered, not unknown.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tickmesh.node.event import NO_INSTRUMENT, Kind
from tickmesh.node.feed import FILTERED_MESSAGES, ORDERS_FULL, ORDERS_KNOWN, RESOLVED_BELOW, UNKNOWN_ORDER, Feed
from tickmesh.node.instruments import FILTERED
from tickmesh.transports.toolbox import inlined, outlined

_ADD, _EXECUTE, _CANCEL, _DELETE, _REPLACE, _MODIFY = (
    int(kind) for kind in (Kind.ADD, Kind.EXECUTE, Kind.CANCEL, Kind.DELETE, Kind.REPLACE, Kind.MODIFY)
)
_GOLDEN, _ONE, _S32 = np.uint64(0x9E3779B97F4A7C15), np.uint64(1), np.uint64(32)
_QTY_MAX = (1 << 32) - 1
"""Kept of a quantity as great or greater; such an order leaves the table only by being deleted or modified."""
_FILTERED, _NONE = np.uint32(FILTERED), np.uint32(NO_INSTRUMENT)


@inlined
def _home(orders: Any, id: Any) -> Any:
    return ((np.uint64(id) * _GOLDEN) >> _S32) & np.uint64(orders.size - 1)


@inlined
def _find(orders: Any, id: Any) -> Any:
    """Slot of an order, or the free slot where it would be."""
    mask = np.uint64(orders.size - 1)
    slot = _home(orders, id)
    while orders[slot].qty != 0 and orders[slot].id != id:
        slot = (slot + _ONE) & mask
    return slot


@outlined
def _take_out(feed: Any, slot: Any) -> None:
    """Free a slot; an entry behind it that was pushed past it moves up."""
    orders = feed.orders
    mask = np.uint64(orders.size - 1)
    hole, place = slot, (slot + _ONE) & mask
    while orders[place].qty != 0:
        if (place - _home(orders, orders[place].id)) & mask >= (place - hole) & mask:
            orders[hole].id, orders[hole].instrument, orders[hole].qty = orders[place].id, orders[place].instrument, orders[place].qty
            hole = place
        place = (place + _ONE) & mask
    orders[hole].qty = np.uint32(0)
    feed.state[ORDERS_KNOWN] -= 1


@outlined
def _enter(feed: Any, id: Any, instrument: Any, qty: Any) -> Any:
    """Remember an order, anew if it is known; false if there is no room. One without quantity does not rest."""
    slot = _find(feed.orders, id)
    if feed.orders[slot].qty == 0:
        if qty <= 0:
            return True
        if 4 * (feed.state[ORDERS_KNOWN] + 1) > 3 * feed.orders.size:
            feed.malformed[ORDERS_FULL] += _ONE
            return False
        feed.state[ORDERS_KNOWN] += 1
    elif qty <= 0:
        _take_out(feed, slot)
        return True
    order = feed.orders[slot]
    order.id, order.instrument, order.qty = id, instrument, np.uint32(min(qty, np.int64(_QTY_MAX)))
    return True


@inlined
def _change(feed: Any, kind: Any, slot: Any, qty: Any) -> None:
    """What an event other than an add leaves of an order that is known."""
    order = feed.orders[slot]
    if kind == _MODIFY and qty > 0:
        order.qty = np.uint32(min(qty, np.int64(_QTY_MAX)))
    elif kind in (_EXECUTE, _CANCEL):
        if order.qty != np.uint32(_QTY_MAX):
            if qty >= np.int64(order.qty):
                _take_out(feed, slot)
            elif qty > 0:
                order.qty = np.uint32(np.int64(order.qty) - qty)
    else:
        _take_out(feed, slot)


@outlined
def follow_order(feed: Any, kind: Any, out: Any, n: Any, instrument: Any) -> Any:
    """Take note of what an event, ``out[n]``, says about its order.

    Args:
        kind: of the event: ADD, EXECUTE, CANCEL, DELETE, REPLACE or MODIFY.
        instrument: that the message names, FILTERED, or NO_INSTRUMENT if it names none.

    Returns:
        The order's instrument; the event is dropped (and counted) if it is not below RESOLVED_BELOW.
    """
    event = out[np.uint64(n)]
    order, qty = event.id, event.qty
    if kind == _ADD:
        if instrument == _NONE or _enter(feed, order, instrument, qty):
            return instrument
        return _NONE
    named = instrument < RESOLVED_BELOW or instrument == _FILTERED
    slot = _find(feed.orders, np.uint64(event.aux) if kind == _REPLACE else order)
    known = feed.orders[slot].qty != 0
    if not known and not named:
        feed.malformed[UNKNOWN_ORDER] += _ONE
        return instrument
    if not named:
        instrument = feed.orders[slot].instrument
        if instrument == _FILTERED:
            feed.state[FILTERED_MESSAGES] += 1
    if known:
        _change(feed, kind, slot, qty)
    if kind == _REPLACE and not _enter(feed, order, instrument, qty):
        return _NONE
    return instrument


@outlined
def forget_orders(feed: Any) -> None:
    """The venue begins anew: no order rests."""
    if feed.state[ORDERS_KNOWN] > 0:
        for slot in range(feed.orders.size):
            feed.orders[slot].qty = np.uint32(0)
    feed.state[ORDERS_KNOWN] = 0


def take_orders(feed: Feed, before: Feed, left_out: npt.ArrayLike) -> None:
    """Go on with the orders of another feed of the same source; those of the instruments `left_out` are filtered from now on."""
    if feed.orders.size != before.orders.size:
        return
    feed.orders[:] = before.orders
    feed.orders["instrument"][np.isin(feed.orders["instrument"], left_out)] = FILTERED
    feed.state[ORDERS_KNOWN] = before.state[ORDERS_KNOWN]
