"""Seeded order flow against the matching engine, written as ITCH 5.0: the compiled heart of the market simulator.

Every random number comes from one splitmix64 state and every quantity is an integer, so that a seed gives the same bytes on every host.
Each instrument has a fair value (a random walk with calm, burst and trend regimes, pulled by its sector and the market); quotes gather
around it, stale quotes are swept, and orders arrive as a clustered Poisson process in simulated time. :func:`run` is the entry point; one
step of it is one **transaction**: its messages share a timestamp and a tracking number.

The day: start of messages, directory, pre-open orders, imbalances, opening crosses at 09:30, trading (with halts), closing crosses, end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tickmesh.node import event
from tickmesh.ops.itch_writer import (
    FRAME_BYTES_MAX,
    code_word,
    put_add,
    put_add_attributed,
    put_auction_collar,
    put_broken,
    put_cancelled,
    put_cross,
    put_decline_levels,
    put_deleted,
    put_directory,
    put_executed,
    put_executed_priced,
    put_imbalance,
    put_participant,
    put_replaced,
    put_retail_interest,
    put_short_sale,
    put_system,
    put_trade,
    put_trading_action,
)
from tickmesh.ops.matching_engine import IOC, LIMIT, MARKET, POST_ONLY, Engine, crosses, reduce, replace, submit
from tickmesh.transports.toolbox import count_trailing_zeros, inlined, loop, outlined

FLOW = np.dtype([
    ("stock", "<u8"), ("base", "<i8"), ("fair", "<i8"), ("home", "<i8"), ("low", "<i8"), ("high", "<i8"), ("volatility", "<i8"),
    ("half_spread", "<i8"), ("depth", "<i8"), ("beta", "<i8"), ("sector", "<i8"), ("sector_seen", "<i8"), ("moved_ns", "<i8"),
    ("regime", "<i8"), ("regime_ns", "<i8"), ("drift", "<i8"), ("target", "<i8"), ("trades", "<i8"), ("volume", "<i8"),
    ("last_price", "<i8"), ("broken", "<i8"), ("category", "u1"), ("tier", "u1"), ("status", "u1"), ("short_sale", "u1"), ("_pad", "<u4"),
])  # fmt: skip
"""One instrument's flow. ``fair``, ``home``, ``low``, ``high``, ``half_spread``, ``volatility`` (per step), ``drift`` (per step) are in
1/65536 of a tick, the first four from the ladder's bottom; ``base`` is the bottom's price in ticks; ``last_price`` is in 1e-4;
``status`` is the letter of the last H message; ``trades`` and ``volume`` count E, printable C, P and Q."""
CLOCK = np.dtype([
    ("random", "<u8"), ("now_ns", "<i8"), ("next_ns", "<i8"), ("gap_q8", "<i8"), ("fraction", "<i8"), ("open_ns", "<i8"),
    ("limit_ns", "<i8"), ("limit_messages", "<i8"), ("messages", "<i8"), ("position", "<i8"), ("phase", "<i8"), ("cursor", "<i8"),
    ("tracking", "<i8"), ("factor_ns", "<i8"), ("market_drift", "<i8"), ("last", "<i8"), ("halted", "<i8"), ("halt_ns", "<i8"),
    ("halt_stage", "<i8"), ("halt_messages", "<i8"), ("halt_odds", "<i8"), ("break_odds", "<i8"), ("last_match", "<i8"),
    ("last_match_of", "<i8"),
])  # fmt: skip
"""Global state. ``gap_q8`` = mean nanoseconds between messages times 256; odds are per 2**30
transactions; ``halted`` = instrument or -1."""


class Market(NamedTuple):
    """Everything that the flow reads and writes."""

    engine: Engine
    flows: Any
    """FLOW[instruments]."""
    sectors: Any
    """i64[sectors]: cumulative level of each sector, in 1/65536 of a tick of a 100 dollar stock."""
    clock: Any
    """CLOCK[1]."""
    counts: Any
    """i64[256]: messages written by type."""
    activity: Any
    """i32[2**k]: instruments in proportion to their activity."""
    waits: Any
    """i64[1024]: quantiles of the exponential distribution of mean 1, times 65536."""
    roots: Any
    """i64[1025]: square roots times 256."""
    mpids: Any
    """u32[n]: the market participants."""
    out: Any
    """u8[]: where :func:`run` writes, from 0."""


STARTING, DIRECTORY, PREOPEN, IMBALANCES, OPENING, CROSSING, TRADING, CLOSING, CLOSING_CROSSES, ENDING, LAST, DONE = range(12)
PREOPEN_ORDERS, DIRECTORY_MESSAGES = 12, 5
STEP_NS = 10_000_000
LATEST_NS = (1 << 48) - 1_000_000_000
"""Simulated time never passes what 48 bits hold: an endless market closes after 78 hours."""
FOREVER = (1 << 63) - 1
TRANSACTION_SLACK = 16
"""A transaction writes at most ``fills_max`` plus this many messages."""
_CALM, _BURST, _TREND = 0, 1, 2
_TICK = 65536
_GOLDEN, _MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_LOW_16 = np.uint64(0xFFFF)
BID, ASK = np.int64(event.BID), np.int64(event.ASK)
_REASON_NONE, _REASON_NEWS, _REASON_PAUSE, _REASON_RESUME = (np.int64(code_word(text)) for text in ("", "T1", "LUDP", "T3"))
_lowest_bit: Any = count_trailing_zeros


def messages_before_open(instruments: int) -> int:
    """Messages from the start of the day up to the opening at 09:30, which is where the clock's start is set from."""
    return 3 + instruments * (DIRECTORY_MESSAGES + PREOPEN_ORDERS + 1)


def messages_of_close(instruments: int) -> int:
    """Messages from the end of trading to the end of messages."""
    return 3 + 2 * instruments


def messages_least(instruments: int, fills_max: int) -> int:
    """The shortest day that can be asked for."""
    return messages_before_open(instruments) + 1 + 4 * instruments + messages_of_close(instruments) + fills_max + TRANSACTION_SLACK


# ---------------------------------------------------------------- random numbers


@inlined
def random_word(states: Any) -> Any:
    """64 random bits from the field `random` of ``states[0]`` (splitmix64: Steele, Lea, Flood 2014)."""
    state = states[0]
    state.random += _GOLDEN
    word = np.uint64(state.random)
    word = (word ^ (word >> np.uint64(30))) * _MIX_1
    word = (word ^ (word >> np.uint64(27))) * _MIX_2
    return word ^ (word >> np.uint64(31))


@inlined
def draw(m: Any) -> Any:
    """64 random bits of the market."""
    return random_word(m.clock)


@inlined
def below(m: Any, bound: Any) -> Any:
    """A random integer in ``[0, bound)``, bound < 2**31 (an np.int64: a plain constant would compile a version of its own)."""
    return np.int64(((draw(m) >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))


@inlined
def bell(m: Any) -> Any:
    """A bell-shaped random integer: mean 0, standard deviation 37,837 (four uniform 16-bit numbers summed)."""
    word = draw(m)
    total = (word & _LOW_16) + (word >> np.uint64(16) & _LOW_16) + (word >> np.uint64(32) & _LOW_16) + (word >> np.uint64(48))
    return np.int64(total) - 131070


# ---------------------------------------------------------------- messages


@inlined
def _sent(m: Any, kind: Any, position: Any) -> Any:
    clock = m.clock[0]
    clock.position = position
    clock.messages += 1
    m.counts[kind] += 1


@inlined
def _price(m: Any, i: Any, tick: Any) -> Any:
    """A ladder tick as a price in 1e-4."""
    return (m.flows[i].base + tick) * 100


@inlined
def _printed(m: Any, i: Any, match: Any, shares: Any, price: Any) -> Any:
    flow, clock = m.flows[i], m.clock[0]
    flow.trades += 1
    flow.volume += shares
    flow.last_price = price
    clock.last_match, clock.last_match_of = match, i


@inlined
def _take_match(m: Any) -> Any:
    state = m.engine.state[0]
    match = np.int64(state.next_match)
    state.next_match += 1
    return match


@outlined
def emit_system(m: Any, code: Any) -> Any:
    """S."""
    clock = m.clock[0]
    _sent(m, ord("S"), put_system(m.out, clock.position, clock.tracking, clock.now_ns, code))


@outlined
def emit_add(m: Any, i: Any, slot: Any) -> Any:
    """A or F for the order in `slot`."""
    clock, order, stock = m.clock[0], m.engine.orders[slot], m.flows[i].stock
    price, mpid = _price(m, i, np.int64(order.tick)), np.int64(order.mpid)
    at, tracking, now = clock.position, clock.tracking, clock.now_ns
    if mpid:
        end = put_add_attributed(m.out, at, i + 1, tracking, now, order.ref, order.side, order.qty, stock, price, m.mpids[mpid - 1])
        _sent(m, ord("F"), end)
    else:
        _sent(m, ord("A"), put_add(m.out, at, i + 1, tracking, now, order.ref, order.side, order.qty, stock, price))


@outlined
def emit_fills(m: Any, i: Any) -> Any:
    """E for each fill of the engine's last order."""
    clock, fills = m.clock[0], m.engine.fills
    for k in range(m.engine.state[0].fills):
        fill = fills[k]
        _sent(m, ord("E"), put_executed(m.out, clock.position, i + 1, clock.tracking, clock.now_ns, fill.ref, fill.qty, fill.match))
        _printed(m, i, np.int64(fill.match), np.int64(fill.qty), _price(m, i, np.int64(fill.tick)))


@outlined
def emit_deleted(m: Any, i: Any, ref: Any) -> Any:
    """D."""
    clock = m.clock[0]
    _sent(m, ord("D"), put_deleted(m.out, clock.position, i + 1, clock.tracking, clock.now_ns, ref))


@outlined
def emit_trading_action(m: Any, i: Any, status: Any, reason: Any) -> Any:
    """H, and the instrument takes that status."""
    clock, flow = m.clock[0], m.flows[i]
    flow.status = status
    m.engine.touches[i].halted = np.int64(status != ord("T"))
    _sent(m, ord("H"), put_trading_action(m.out, clock.position, i + 1, clock.tracking, clock.now_ns, flow.stock, status, reason))


@outlined
def emit_imbalance(m: Any, i: Any, cross: Any) -> Any:
    """I around the fair value."""
    clock, flow = m.clock[0], m.flows[i]
    price = _price(m, i, flow.fair // _TICK)
    paired, imbalance = 100 * below(m, np.int64(400)), 100 * below(m, np.int64(60))
    direction = ord("N") if imbalance == 0 else ord("B") if below(m, np.int64(2)) else ord("S")
    near, far = price + 100 * (below(m, np.int64(5)) - 2), price + 100 * (below(m, np.int64(9)) - 4)
    end = put_imbalance(
        m.out, clock.position, i + 1, clock.tracking, clock.now_ns, paired, imbalance, direction, flow.stock, far, near, price, cross
    )
    _sent(m, ord("I"), end)


@outlined
def emit_cross(m: Any, i: Any, shares: Any, price: Any, cross: Any) -> Any:
    """Q; zero shares say that no cross took place."""
    clock = m.clock[0]
    match = _take_match(m)
    end = put_cross(m.out, clock.position, i + 1, clock.tracking, clock.now_ns, shares, m.flows[i].stock, price, match, cross)
    _sent(m, ord("Q"), end)
    if shares:
        _printed(m, i, match, shares, price)


@outlined
def emit_priced_execution(m: Any, i: Any, slot: Any, qty: Any, price: Any, printable: Any) -> Any:
    """C: `qty` of a resting order trades at `price`; `printable` is Y or N."""
    clock, ref, match = m.clock[0], np.int64(m.engine.orders[slot].ref), _take_match(m)
    reduce(m.engine, slot, qty)
    end = put_executed_priced(m.out, clock.position, i + 1, clock.tracking, clock.now_ns, ref, qty, match, printable, price)
    _sent(m, ord("C"), end)
    if printable == ord("Y"):
        _printed(m, i, match, qty, price)


# ---------------------------------------------------------------- fair value


@outlined
def _move_sectors(m: Any) -> Any:
    """Market and sector factors, one step per 10 ms of simulated time (at most 16 at once)."""
    clock = m.clock[0]
    for _ in range(16):
        if clock.factor_ns > clock.now_ns:
            return
        clock.factor_ns += STEP_NS
        clock.market_drift += (bell(m) >> 8) - (clock.market_drift >> 8)
        market = clock.market_drift + (bell(m) >> 1)
        for s in range(len(m.sectors)):
            m.sectors[s] += market + (bell(m) >> 1)
    clock.factor_ns = clock.now_ns + STEP_NS


@outlined
def _change_regime(m: Any, i: Any) -> Any:
    clock, flow = m.clock[0], m.flows[i]
    dice = below(m, np.int64(100))
    flow.drift = 0
    if dice < 68:
        flow.regime, seconds = _CALM, 3 + below(m, np.int64(12))
    elif dice < 86:
        flow.regime, seconds = _BURST, 1 + below(m, np.int64(3))
    else:
        flow.regime, seconds = _TREND, 2 + below(m, np.int64(8))
        drift = flow.volatility * (4 + below(m, np.int64(8))) >> 6
        flow.drift = drift if below(m, np.int64(2)) else -drift
    flow.regime_ns = clock.now_ns + seconds * 1_000_000_000


@inlined
def _move_fair(m: Any, i: Any) -> Any:
    """Let an instrument's fair value catch up with simulated time."""
    clock, flow = m.clock[0], m.flows[i]
    steps = (clock.now_ns - flow.moved_ns) // STEP_NS
    if steps > 0:
        flow.moved_ns += steps * STEP_NS
        if clock.now_ns >= flow.regime_ns:
            _change_regime(m, i)
        steps = min(steps, np.int64(1024))
        noise = (bell(m) * flow.volatility >> 16) * m.roots[steps] >> 8
        noise = noise * 4 if flow.regime == _BURST else noise
        level = m.sectors[flow.sector]
        pulled = (level - flow.sector_seen) * flow.beta >> 8
        flow.sector_seen = level
        home = (flow.home - flow.fair) * steps >> 16
        flow.fair = min(max(flow.fair + noise + flow.drift * steps + pulled + home, flow.low), flow.high)


# ---------------------------------------------------------------- choices


@inlined
def _choose_instrument(m: Any) -> Any:
    """By activity, and often the last one again: orders come in clusters."""
    word = draw(m)
    if word & np.uint64(3) == np.uint64(0):
        return np.int64(m.clock[0].last)
    return np.int64(m.activity[np.int64(word >> np.uint64(8)) & (len(m.activity) - 1)])


@inlined
def _choose_qty(m: Any) -> Any:
    """Round lots mostly; one in five is an odd lot."""
    word = draw(m)
    if word % np.uint64(5) == np.uint64(0):
        return 1 + below(m, np.int64(99))
    return 100 * (1 + min(np.int64(_lowest_bit(word >> np.uint64(3))), np.int64(9)))


@inlined
def _choose_order(m: Any, i: Any) -> Any:
    """A resting order's slot, 0 if there is none."""
    capacity = m.engine.state[0].capacity
    if m.engine.touches[i].live == 0:
        return np.int64(0)
    k = below(m, capacity)
    first = 1 + i * capacity
    for _ in range(capacity):
        if m.engine.orders[first + k].ref:
            return first + k
        k = k + 1 if k + 1 < capacity else np.int64(0)
    return np.int64(0)


@inlined
def _eagerness(m: Any, i: Any, slot: Any) -> Any:
    """How far an order is on the wrong side of the fair value, in ticks (negative: behind it)."""
    order = m.engine.orders[slot]
    ahead = np.int64(order.tick) - m.flows[i].fair // _TICK
    return ahead if order.side == BID else -ahead


@inlined
def _choose_cancel(m: Any, i: Any) -> Any:
    """An order to cancel: of two, mostly the one nearer to trading, since quotes near the touch live shortest."""
    one = _choose_order(m, i)
    other = _choose_order(m, i)
    if one and below(m, np.int64(4)) and _eagerness(m, i, other) > _eagerness(m, i, one):
        return other
    return one


@inlined
def _choose_tick(m: Any, i: Any, side: Any) -> Any:
    """Where a quote goes: behind the fair value by the half spread and a geometric depth; far ones gather at round prices."""
    flow = m.flows[i]
    word = draw(m)
    depth = np.int64(_lowest_bit(word | np.uint64(1 << 12))) * flow.depth + below(m, flow.depth)
    if depth == 0 and word >> np.uint64(61) == np.uint64(0):
        depth = np.int64(-1)
    if side == BID:
        tick = (flow.fair - flow.half_spread) // _TICK - depth
    else:
        tick = (flow.fair + flow.half_spread) // _TICK + 1 + depth
    if depth > 3 * flow.depth and word >> np.uint64(62) == np.uint64(1):
        tick -= (flow.base + tick) % 5
    return tick


# ---------------------------------------------------------------- transactions of trading


@inlined
def _send(m: Any, i: Any, side: Any, qty: Any, tick: Any, kind: Any, mpid: Any) -> Any:
    slot = submit(m.engine, i, side, qty, tick, kind, mpid)
    if slot >= 0:
        emit_fills(m, i)
        if slot:
            emit_add(m, i, slot)


@outlined
def quote(m: Any, i: Any, passive: Any) -> Any:
    """A new limit order; if `passive` (not 0), behind the other side's best."""
    touch, ticks = m.engine.touches[i], m.engine.state[0].ticks
    side = below(m, np.int64(2))
    tick = _choose_tick(m, i, side)
    if passive:
        tick = min(tick, np.int64(touch.best_ask) - 1) if side == BID else max(tick, np.int64(touch.best_bid) + 1)
    tick = min(max(tick, np.int64(0)), ticks - 1)
    mpid = 1 + below(m, len(m.mpids)) if below(m, np.int64(16)) == 0 else np.int64(0)
    _send(m, i, side, _choose_qty(m), tick, POST_ONLY if passive else LIMIT, mpid)


@outlined
def withdraw(m: Any, i: Any) -> Any:
    """Delete an order."""
    slot = _choose_cancel(m, i)
    if slot:
        ref = np.int64(m.engine.orders[slot].ref)
        reduce(m.engine, slot, np.int64(m.engine.orders[slot].qty))
        emit_deleted(m, i, ref)


@outlined
def shrink(m: Any, i: Any) -> Any:
    """Cancel a part of an order."""
    clock, slot = m.clock[0], _choose_order(m, i)
    if slot and m.engine.orders[slot].qty > 1:
        order = m.engine.orders[slot]
        qty = 100 if order.qty > 100 else 1 + below(m, np.int64(order.qty) - 1)
        reduce(m.engine, slot, qty)
        _sent(m, ord("X"), put_cancelled(m.out, clock.position, i + 1, clock.tracking, clock.now_ns, order.ref, qty))


@outlined
def requote(m: Any, i: Any) -> Any:
    """Replace an order at a fresh price; one that would trade is a delete and an aggressive order."""
    engine, slot = m.engine, _choose_cancel(m, i)
    if slot == 0:
        return
    old = np.int64(engine.orders[slot].ref)
    side = np.int64(engine.orders[slot].side)
    tick, qty = _choose_tick(m, i, side), _choose_qty(m)
    trades = crosses(engine, i, side, tick)
    placed = replace(engine, slot, qty, tick)
    if placed < 0:
        return
    if trades:
        emit_deleted(m, i, old)
        emit_fills(m, i)
        if placed:
            emit_add(m, i, placed)
    else:
        clock, ref = m.clock[0], engine.orders[placed].ref
        end = put_replaced(m.out, clock.position, i + 1, clock.tracking, clock.now_ns, old, ref, qty, _price(m, i, tick))
        _sent(m, ord("U"), end)


@outlined
def aggress(m: Any, i: Any, sweep: Any) -> Any:
    """Take liquidity: a small order at the touch, or a sweep through several levels; now and then at any price."""
    touch, flow = m.engine.touches[i], m.flows[i]
    middle = (np.int64(touch.best_bid) + np.int64(touch.best_ask)) * (_TICK // 2)
    side = BID if below(m, np.int64(1024)) < 512 + min(max((flow.fair - middle) >> 8, np.int64(-400)), np.int64(400)) else ASK
    best, qty, through = np.int64(touch.best_ask if side == BID else touch.best_bid), _choose_qty(m), np.int64(0)
    if sweep:
        qty, through = qty + 100 * (5 + below(m, np.int64(20))), flow.depth * (2 + below(m, np.int64(4)))
    tick = best + through if side == BID else best - through
    tick = min(max(tick, np.int64(0)), m.engine.state[0].ticks - 1)
    kind = MARKET if sweep and below(m, np.int64(8)) == 0 else IOC if below(m, np.int64(4)) else LIMIT
    _send(m, i, side, qty, tick, kind, np.int64(0))


@outlined
def pick_off(m: Any, i: Any) -> Any:
    """Somebody fast takes quotes that the fair value has passed; returns whether there were any."""
    touch, fair = m.engine.touches[i], m.flows[i].fair // _TICK
    if touch.best_ask < fair:
        _send(m, i, BID, _choose_qty(m) + 400, fair, IOC, np.int64(0))
    elif touch.best_bid > fair:
        _send(m, i, ASK, _choose_qty(m) + 400, fair, IOC, np.int64(0))
    else:
        return False
    return True


@outlined
def trade_hidden(m: Any, i: Any) -> Any:
    """P: a trade against a hidden order at the middle of the book."""
    clock, touch, flow = m.clock[0], m.engine.touches[i], m.flows[i]
    if touch.best_bid >= 0 and touch.best_ask < m.engine.state[0].ticks:
        price = (2 * flow.base + np.int64(touch.best_bid) + np.int64(touch.best_ask)) * 50
        qty, match = _choose_qty(m), _take_match(m)
        end = put_trade(m.out, clock.position, i + 1, clock.tracking, clock.now_ns, qty, flow.stock, price, match)
        _sent(m, ord("P"), end)
        _printed(m, i, match, qty, price)


@outlined
def improve_price(m: Any, i: Any) -> Any:
    """C: the oldest order at the touch trades one tick better for it than it asked."""
    touch, engine = m.engine.touches[i], m.engine
    side = below(m, np.int64(2))
    best = np.int64(touch.best_bid if side == BID else touch.best_ask)
    if 0 < best < engine.state[0].ticks:
        slot = np.int64(engine.levels[i * engine.state[0].ticks + best].head)
        qty = min(_choose_qty(m), np.int64(engine.orders[slot].qty))
        emit_priced_execution(m, i, slot, qty, _price(m, i, best - 1 if side == BID else best + 1), ord("Y"))


@outlined
def announce(m: Any, i: Any) -> Any:
    """N or, rarely, a change of the short sale restriction (Y)."""
    clock, flow = m.clock[0], m.flows[i]
    at, tracking, now = clock.position, clock.tracking, clock.now_ns
    dice = below(m, np.int64(32))
    if dice == 0:
        flow.short_sale = ord("1") if flow.short_sale == ord("0") else ord("0")
        _sent(m, ord("Y"), put_short_sale(m.out, at, i + 1, tracking, now, flow.stock, flow.short_sale))
    else:
        flag = ord("N") if dice < 12 else ord("A") if dice < 16 else ord("B") if dice < 24 else ord("S")
        _sent(m, ord("N"), put_retail_interest(m.out, at, i + 1, tracking, now, flow.stock, flag))


@outlined
def break_trade(m: Any) -> Any:
    """B: the last printed trade is undone."""
    clock = m.clock[0]
    if clock.last_match:
        i = np.int64(clock.last_match_of)
        m.flows[i].broken += 1
        _sent(m, ord("B"), put_broken(m.out, clock.position, i + 1, clock.tracking, clock.now_ns, clock.last_match))
        clock.last_match = 0


# ---------------------------------------------------------------- halts and auctions


@inlined
def _halt_span_ns(m: Any) -> Any:
    """Half of a halt's length: it is given in messages, so that it shows at any rate."""
    clock = m.clock[0]
    return (clock.gap_q8 * clock.halt_messages >> 9) + 1


@outlined
def halt(m: Any, i: Any) -> Any:
    """A news halt (H) or a volatility pause (P with an auction collar J)."""
    clock, flow = m.clock[0], m.flows[i]
    if below(m, np.int64(2)):
        emit_trading_action(m, i, ord("H"), _REASON_NEWS)
    else:
        emit_trading_action(m, i, ord("P"), _REASON_PAUSE)
        price = _price(m, i, flow.fair // _TICK)
        at, span = clock.position, price // 2000 * 100
        end = put_auction_collar(m.out, at, i + 1, clock.tracking, clock.now_ns, flow.stock, price, price + span, price - span)
        _sent(m, ord("J"), end)
    clock.halted, clock.halt_stage, clock.halt_ns = i, 1, clock.now_ns + _halt_span_ns(m)


@outlined
def resume(m: Any) -> Any:
    """The halted instrument goes on: first quotation only, then an auction and trading."""
    clock, i = m.clock[0], np.int64(m.clock[0].halted)
    if clock.halt_stage == 1:
        emit_trading_action(m, i, ord("Q"), _REASON_RESUME)
        emit_imbalance(m, i, ord("H"))
        clock.halt_stage, clock.halt_ns = 2, clock.now_ns + _halt_span_ns(m)
    else:
        auction(m, i, ord("H"))
        emit_trading_action(m, i, ord("T"), _REASON_RESUME)
        clock.halted = -1


@outlined
def auction(m: Any, i: Any, cross: Any) -> Any:
    """A cross: hidden auction orders against each other and up to three displayed ones of one side (C, not printable), then Q."""
    engine, touch, ticks = m.engine, m.engine.touches[i], m.engine.state[0].ticks
    side = below(m, np.int64(2))
    tick = np.int64(touch.best_bid if side == BID else touch.best_ask)
    if tick < 0 or tick >= ticks:
        tick = min(max(m.flows[i].fair // _TICK, np.int64(touch.best_bid) + 1), np.int64(touch.best_ask) - 1)
    price, shares = _price(m, i, tick), 100 * (10 + below(m, np.int64(300)))
    for _ in range(below(m, np.int64(4))):
        slot = np.int64(engine.levels[i * ticks + tick].head)
        if slot:
            qty = np.int64(engine.orders[slot].qty)
            shares += qty
            emit_priced_execution(m, i, slot, qty, price, ord("N"))
    emit_cross(m, i, shares, price, cross)


@outlined
def close_instrument(m: Any, i: Any) -> Any:
    """The last imbalance and the closing cross, which is empty if the instrument is halted. Two messages, always."""
    touch = m.engine.touches[i]
    emit_imbalance(m, i, ord("C"))
    if touch.halted:
        emit_cross(m, i, np.int64(0), np.int64(0), ord("C"))
        return
    tick = min(max(m.flows[i].fair // _TICK, np.int64(touch.best_bid)), np.int64(touch.best_ask))
    emit_cross(m, i, 100 * (20 + below(m, np.int64(800))), _price(m, i, tick), ord("C"))


# ---------------------------------------------------------------- the day


@outlined
def introduce(m: Any, i: Any) -> Any:
    """Directory, two market makers, status and short sale restriction of one instrument: five messages."""
    clock, flow = m.clock[0], m.flows[i]
    tracking, now = clock.tracking, clock.now_ns
    _sent(m, ord("R"), put_directory(m.out, clock.position, i + 1, tracking, now, flow.stock, flow.category, flow.tier))
    for k in range(2):
        mpid = m.mpids[(i + k) % len(m.mpids)]
        primary = ord("Y") if k == 0 else ord("N")
        _sent(m, ord("L"), put_participant(m.out, clock.position, i + 1, tracking, now, mpid, flow.stock, primary))
    emit_trading_action(m, i, ord("T"), _REASON_NONE)
    _sent(m, ord("Y"), put_short_sale(m.out, clock.position, i + 1, tracking, now, flow.stock, flow.short_sale))


@outlined
def _start(m: Any) -> Any:
    clock = m.clock[0]
    emit_system(m, ord("O"))
    level = 4_800_00000000
    end = put_decline_levels(m.out, clock.position, clock.tracking, clock.now_ns, level * 93 // 100, level * 87 // 100, level * 80 // 100)
    _sent(m, ord("V"), end)


@inlined
def _next_phase(m: Any) -> Any:
    clock = m.clock[0]
    clock.phase += 1
    clock.cursor = 0


@outlined
def _ceremony(m: Any) -> Any:
    """One step of the day outside trading."""
    clock, instruments = m.clock[0], len(m.flows)
    phase, cursor = np.int64(clock.phase), np.int64(clock.cursor)
    clock.cursor += 1
    length = 1
    if phase == STARTING:
        _start(m)
    elif phase == DIRECTORY:
        length = instruments + 1
        if cursor < instruments:
            introduce(m, cursor)
        else:
            emit_system(m, ord("S"))
    elif phase == PREOPEN:
        length = instruments * PREOPEN_ORDERS
        quote(m, cursor % instruments, np.int64(1))
    elif phase == IMBALANCES:
        length = instruments
        emit_imbalance(m, cursor, ord("O"))
    elif phase == OPENING:
        emit_system(m, ord("Q"))
    elif phase == CROSSING:
        length = instruments
        auction(m, cursor, ord("O"))
    elif phase == CLOSING_CROSSES:
        length = instruments
        close_instrument(m, cursor)
    else:
        emit_system(m, ord("M") if phase == CLOSING else ord("E") if phase == ENDING else ord("C"))
    if cursor + 1 >= length:
        _next_phase(m)


@inlined
def _act(m: Any, i: Any, dice: Any) -> Any:
    """One transaction of a trading instrument, in about the proportions of a venue's day."""
    if dice >= 1000 and pick_off(m, i):
        return
    dice = below(m, np.int64(1024))
    if dice < 28:
        aggress(m, i, np.int64(0))
    elif dice < 31:
        aggress(m, i, np.int64(1))
    elif dice < 52:
        trade_hidden(m, i)
    elif dice < 55:
        improve_price(m, i)
    elif dice < 72:
        shrink(m, i)
    elif dice < 154:
        requote(m, i)
    elif dice < 155:
        announce(m, i)
    else:
        _balance(m, i, below(m, np.int64(8)))


@inlined
def _balance(m: Any, i: Any, passive: Any) -> Any:
    """Quote or withdraw, so that the book keeps about its size."""
    live = np.int64(m.engine.touches[i].live)
    wanted = min(max(520 + (m.flows[i].target - live) * 4, np.int64(128)), np.int64(960))
    full = live >= m.engine.state[0].capacity
    if live == 0 or (not full and below(m, np.int64(1024)) < wanted):
        quote(m, i, passive if live else np.int64(1))
    else:
        withdraw(m, i)


@outlined
def _trade_step(m: Any) -> Any:
    """One transaction of the trading day, or its end."""
    clock, instruments = m.clock[0], len(m.flows)
    budget = clock.limit_messages - clock.messages - (3 + 2 * instruments)
    if budget <= 0 or clock.now_ns >= clock.limit_ns:
        _next_phase(m)
        _ceremony(m)
        return
    if clock.now_ns >= clock.factor_ns:
        _move_sectors(m)
    i = _choose_instrument(m)
    clock.last = i
    _move_fair(m, i)
    if budget < len(m.engine.fills) + TRANSACTION_SLACK:
        _balance(m, i, np.int64(1))
        return
    rare = np.int64(draw(m) >> np.uint64(34))
    if rare < clock.break_odds:
        break_trade(m)
    elif clock.halted < 0 and rare < clock.break_odds + clock.halt_odds:
        halt(m, i)
    elif clock.halted >= 0 and clock.now_ns >= clock.halt_ns:
        resume(m)
    elif m.engine.touches[i].halted:
        _balance(m, i, np.int64(1))
    else:
        _act(m, i, rare & 1023)


@inlined
def _schedule(m: Any, emitted: Any) -> Any:
    """Set the time of the next transaction: regular outside trading; in trading a clustered Poisson process with the same mean rate."""
    clock = m.clock[0]
    wait_q8 = np.int64(clock.gap_q8)
    if clock.phase == TRADING:
        word = draw(m)
        wait_q8 = wait_q8 * m.waits[np.int64(word >> np.uint64(54))] >> 16
        wait_q8 = wait_q8 >> 4 if word & np.uint64(3) == np.uint64(0) else wait_q8 * 21 >> 4
    total = clock.fraction + wait_q8 * emitted
    clock.fraction = total & 255
    clock.next_ns = min(clock.next_ns + (total >> 8), LATEST_NS)


@loop
def run(m: Any, messages_max: Any, until_ns: Any) -> Any:
    """Write transactions into ``m.out`` until at least `messages_max` messages are there, the next one would be later than `until_ns`
    (simulated), the buffer might not hold another transaction, or the day is over; returns the bytes written."""
    clock = m.clock[0]
    clock.position = 0
    room = len(m.out) - 64 - (len(m.engine.fills) + TRANSACTION_SLACK) * FRAME_BYTES_MAX
    stop = clock.messages + messages_max
    while clock.messages < stop and clock.position <= room and clock.phase < DONE and clock.next_ns <= until_ns:
        if clock.phase == OPENING:
            clock.next_ns = max(clock.next_ns, clock.open_ns)
        clock.now_ns = clock.next_ns
        clock.tracking = (clock.tracking + 1) & 0xFFFF
        before = np.int64(clock.messages)
        if clock.phase == TRADING:
            _trade_step(m)
        else:
            _ceremony(m)
        _schedule(m, np.int64(clock.messages) - before)
    return np.int64(clock.position)
