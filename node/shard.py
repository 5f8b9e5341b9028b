"""The shard: one compiled loop, generated from the configuration, that turns input events into outputs.

A shard is a function: the same events give the same outputs, bit for bit, live or replayed. :func:`generate` writes the loop as a
readable module with the configured calculations called directly, so that everything is inlined; :class:`Shard` owns the arrays it works on.

For every event, in order: count it, apply it to the book, publish a trade or the new best bid and offer, run the calculations that
listen, check order intents against the risk limits. Nothing in here reads a clock.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from tickmesh.node.book import FAR_AHEAD, NEAR_AHEAD
from tickmesh.node.calculation import SERIES, Instance
from tickmesh.node.event import DERIVED, EVENT, PEERS, EventArray, Kind
from tickmesh.node.joining import make_join
from tickmesh.node.loops import step_loop
from tickmesh.node.shard_state import make_arrays
from tickmesh.node.symbol_filter import pattern_table
from tickmesh.transports.codecache import import_generated, write_generated
from tickmesh.transports.ring import RingArrays

BATCH_EVENTS = 128
"""Events handed from the decoder to the loop at once: 8 KiB, a quarter of a first-level cache."""

_IMPORTS = """\
# Shard loop, generated from the configuration. Calculations: {names}
from collections import namedtuple

import numpy as np

from tickmesh.node.book import (
    bbo_defer, bbo_deferred, bbo_fill, bbo_update, book_apply, book_apply_planned, book_best, book_plan, book_prefetch, book_state,
)
from tickmesh.node.joining import join_meet, join_next, join_put, join_take, join_time
from tickmesh.node.risk import risk_check, risk_fill
from tickmesh.node.shard_kernels import (
    bbo_microprice, bbo_mid, bbo_spread, begin_output, begin_record, fill_signal, fill_trade, pass_through, reaches, record_bbo,
    record_config, record_gap, record_trade, register_instrument, trade_price, trade_qty,
)
from tickmesh.transports.ring import ring_claim, ring_free, ring_publish
from tickmesh.transports.toolbox import inlined, outlined

FIELDS = "books core info statistics counts gaps source_stale patterns masks last scratch out limits risk changes"
Shard = namedtuple("Shard", FIELDS + " {fields}")
BID, ASK = np.int64(0), np.int64(1)
TRADE, BBO, SIGNAL, ALERT, INTENT, RISK, BAR = (np.uint8(kind) for kind in (9, 64, 65, 66, 67, 68, 69))
FOR_BOOK, FOR_SOURCE, FOR_ALERT, FOR_BAR, FOR_INTENT, FOR_RISK = (np.uint64(place) for place in range(6))  # in shard.scratch
SLOTS = {slots}  # last values kept per instrument
DTYPES = [  # state and parameters of the calculations
{dtypes}
]
JOINS = {joins}  # name and legs of those over several instruments, by place"""

_DECISION = """\
@outlined
def decide(shard, intent, i, w):
    # whether an order that a calculation wants may go out
    limits = shard.limits[shard.core[0].parameters]
    bid, _ = book_best(shard.books, i, BID)
    ask, _ = book_best(shard.books, i, ASK)
    state = np.uint16(book_state(shard.books, i))
    total = shard.risk[shard.risk.size - 1]
    reason = risk_check(limits, shard.risk[i], total, intent, bid, ask, state, np.int64(shard.info[i].exponent))
    shard.counts[68] += 1
    o = begin_output(shard.out.slots, w, intent, RISK)  #? emit_risk
    w += np.uint64(1)  #? emit_risk
    o = begin_output(shard.scratch, FOR_RISK, intent, RISK)  #? no_risk
    risk_fill(o, intent, reason)
    return w

"""

_EVENT = """\
@outlined
def publish_bbo(shard, event, i, w):
    if bbo_update(shard.books, i):
        o = begin_output(shard.out.slots, w, event, BBO)  #? emit_bbo
        w += np.uint64(1)  #? emit_bbo
        o = begin_output(shard.scratch, FOR_BOOK, event, BBO)  #? no_bbo
        bbo_fill(shard.books, i, o)
        shard.counts[64] += 1
        record_bbo(shard.statistics, o)
        w = on_bbo(shard, o, i, w)
        put_bbo(shard, o, i)  #? joins
    return w


@outlined
def publish_trade(shard, event, i, w):
    record_trade(shard.statistics, event)
    o = begin_output(shard.out.slots, w, event, TRADE)  #? emit_trade
    w += np.uint64(1)  #? emit_trade
    o = begin_output(shard.scratch, FOR_BOOK, event, TRADE)  #? no_trade
    fill_trade(o, event)
    put_trade(shard, o, i)  #? joins
    return on_trade(shard, o, i, w)


@outlined
def rare_apply(shard, event):
    return book_apply(shard.books, event)


@outlined
def apply_to_one(shard, event, kind, side, i, w):
    # what has happened to a whole source happens to its instrument i
    o = shard.scratch[FOR_SOURCE]
    o.seq = event.seq
    o.ts_event = event.ts_event
    o.ts_recv = event.ts_recv
    o.kind = np.uint8(kind)
    o.side = np.uint8(side)
    o.flags = np.uint16(0)
    o.instrument = np.uint32(i)
    rare_apply(shard, o)
    return publish_bbo(shard, o, i, w)


@outlined
def on_rare(shard, event, w):
    # instrument definitions, trading status, gaps, venue messages, configuration changes
    kind = event.kind
    i = np.int64(event.instrument)
    if kind == 13:
        is_new = register_instrument(shard.core, shard.info, shard.books.ticks, shard.patterns, shard.masks, event)
        meet(shard, i)  #? joins
        w = pass_through(shard.out.slots, w, event)  #? emit_reference
        if is_new and shard.source_stale[event.flags] != 0:
            w = apply_to_one(shard, event, 15, 2, i, w)  # its first orders may have been in the gap
    elif kind == 17:
        record_config(shard.core, shard.changes, event, w)
    elif kind == 32 and i < shard.info.size:  #? joins
        put_bbo(shard, event, i)  #? joins
    elif kind == 33 and i < shard.info.size:  #? joins
        put_trade(shard, event, i)  #? joins
    elif kind == 34:  #? joins
        tell_time(shard, event.price, event.aux, event.ts_event, event.flags)  #? joins
    elif kind == 35:
        register_instrument(shard.core, shard.info, shard.books.ticks, shard.patterns, shard.masks, event)
        meet(shard, i)  #? joins
    elif kind == 11:
        if rare_apply(shard, event) < 0:
            shard.core[0].refused += 1
            return w
        w = pass_through(shard.out.slots, w, event)  #? emit_status
        w = publish_bbo(shard, event, i, w)
    elif kind == 15:
        record_gap(shard.gaps, shard.counts, event)
        w = pass_through(shard.out.slots, w, event)  #? emit_gap
        if i < shard.info.size:
            rare_apply(shard, event)
            w = publish_bbo(shard, event, i, w)
    elif kind == 10:  #? emit_quote
        w = pass_through(shard.out.slots, w, event)  #? emit_quote
    elif kind == 12:  #? emit_imbalance
        w = pass_through(shard.out.slots, w, event)  #? emit_imbalance
    elif kind == 14:  #? emit_system
        w = pass_through(shard.out.slots, w, event)  #? emit_system
    elif kind == 18:  #? emit_break
        w = pass_through(shard.out.slots, w, event)  #? emit_break
    return w


@inlined
def on_event(shard, event, w, at):
    kind = event.kind
    shard.counts[kind & 127] += 1
    if np.uint64(kind - 1) < np.uint64(8):
        applied = book_apply_planned(shard.books, event, at)
        i = np.int64(event.instrument)
        if applied < 0:
            shard.core[0].refused += 1
            if i >= shard.info.size:
                return w
            applied = np.int64(bbo_deferred(shard.books, i))
        else:
            if kind == 2 and not event.flags & 4:
                w = publish_trade(shard, event, i, w)
            if kind <= 6:  #? emit_add
                w = pass_through(shard.out.slots, w, event)  #? emit_add
            if kind == 7:  #? emit_clear
                w = pass_through(shard.out.slots, w, event)  #? emit_clear
            if kind == 8:  #? emit_level
                w = pass_through(shard.out.slots, w, event)  #? emit_level
            w = on_order(shard, event, i, w)  #? orders
        if applied > 0:
            if event.flags & 1:
                bbo_defer(shard.books, i)
            else:
                w = publish_bbo(shard, event, i, w)
        return w
    if kind == 9:
        i = np.int64(event.instrument)
        if i >= shard.info.size:
            shard.core[0].refused += 1
            return w
        if event.flags & 4:
            return w
        return publish_trade(shard, event, i, w)
    return on_rare(shard, event, w)


@outlined
def over_instruments(shard, event, w, limit):
    # a timer, a gap or a new session of a whole source reaches its instruments; held up by outputs it goes on where it stopped
    core = shard.core[0]
    if core.cursor == 0:
        core.cursor = 1  # from here on the next instrument + 1
        shard.counts[event.kind] += 1
        if event.kind == 15:
            shard.source_stale[np.uint16(event.price)] = 1
            w = on_rare(shard, event, w)
        elif event.kind == 7:
            shard.source_stale[np.uint16(event.price)] = 0
            w = pass_through(shard.out.slots, w, event)  #? emit_clear
        else:
            w = pass_through(shard.out.slots, w, event)  #? joins
            tell_time(shard, event.price, event.price, event.ts_event, event.aux)  #? joins
            if event.aux == 2:  # time does not go back for those that listen
                core.cursor = core.instruments + 1
            core.cursor = core.instruments + 1  # nothing listens to timers  #? no_timers
    while core.cursor <= core.instruments:
        if w + np.uint64(ROOM) > limit:
            return w
        i = core.cursor - 1
        if reaches(shard.info, event, i):
            if event.kind == 16:
                w = on_timer(shard, event, i, w)
            else:
                w = apply_to_one(shard, event, event.kind, event.side, i, w)
        core.cursor += 1
    return w
"""

_LOOPS = """
ROOM = np.int64({room})  # outputs that one input can cause
CLAIM = np.int64({claim})


@outlined
def step(batch, first, count, shard):
    # events [first, count) of the batch; returns how many were taken: fewer when the output ring is full
    core = shard.core[0]
    start = core.out_seq
    w = start
    free = ring_free(shard.out, ROOM)
    claimed = np.int64(0)
    i = np.int64(first)
    for ahead in range(i, min(i + {far}, count)):
        book_prefetch(shard.books, batch[np.uint64(ahead)])
    for ahead in range(i, min(i + {near}, count)):
        book_plan(shard.books, batch[np.uint64(ahead)], ahead)
    while i < count:
        if np.int64(w - start) + ROOM > claimed:
            if np.int64(w - start) + ROOM > free:
                ring_publish(shard.out, w - start)
                start = w
                free = ring_free(shard.out, ROOM)
                if ROOM > free:
                    core.blocked += 1
                    break
            claimed = min(free, np.int64(w - start) + CLAIM)
            ring_claim(shard.out, claimed)
        if i + {far} < count:
            book_prefetch(shard.books, batch[np.uint64(i + {far})])
        if i + {near} < count:
            book_plan(shard.books, batch[np.uint64(i + {near})], i + {near})
        event = batch[np.uint64(i)]
        {unless_done} event.kind == 16 or (event.instrument == np.uint32(0xFFFFFFFF) and (event.kind == 15 or event.kind == 7)):
            w = over_instruments(shard, event, w, start + np.uint64(claimed))
            if core.cursor <= core.instruments:
                claimed = np.int64(0)
                continue
            core.cursor = 0
        else:
            w = on_event(shard, event, w, i)
        {release}
        i += 1
    core.events += np.uint64(i - np.int64(first))
    core.out_seq = w
    ring_publish(shard.out, w - start)
    return i - np.int64(first)
"""

_UNLESS_DONE = """\
if core.releasing != 0 and core.cursor == 0:
            pass  # the event is done: goes on with what it has set free
        elif"""
_RELEASE = """\
if core.releasing != 0:
            w = release(shard, w, start + np.uint64(claimed))
            if core.releasing != 0:
                claimed = np.int64(0)
                continue"""

DEFAULT_OUTPUTS = frozenset(
    {Kind.BBO, Kind.TRADE, Kind.SIGNAL, Kind.ALERT, Kind.BAR, Kind.INTENT, Kind.RISK, Kind.STATUS, Kind.GAP, Kind.REFERENCE, Kind.IMBALANCE}
)


@dataclass(frozen=True)
class ShardPlan:
    """What one shard's loop is made of; equal plans generate equal source.

    Attributes:
        instances: calculations, alerts and bars in an order where a series comes before its readers.
        outputs: kinds of events that leave the shard.
        risk: whether intents are checked.
    """

    instances: tuple[Instance, ...] = ()
    outputs: frozenset[Kind] = DEFAULT_OUTPUTS
    risk: bool = True


# ---------------------------------------------------------------- generation


@dataclass
class _Source:
    """Generated lines with an indentation."""

    lines: list[str] = field(default_factory=list)

    def add(self, depth: int, *lines: str) -> None:
        self.lines.extend("    " * depth + line if line else "" for line in lines)

    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


class _Generator:
    """Writes the module of one plan."""

    def __init__(self, plan: ShardPlan) -> None:
        self.plan = plan
        self.out = _Source()
        self.slots = series_slots(plan)

    @property
    def joined(self) -> list[int]:
        """Places of the calculations over several instruments."""
        return [k for k, instance in enumerate(self.plan.instances) if instance.legs]

    @property
    def room(self) -> int:
        """The most outputs that one input event can cause: an execution is an order event, a trade and a new BBO at once."""
        calls = max((len(self._triggers(i) - {"timer"}) for i in self.plan.instances), default=1)
        return 4 + max(1, calls) * sum(2 if i.emits == "intent" else max(1, len(i.outputs)) for i in self.plan.instances)

    def generate(self) -> str:
        self._imports()
        emits = {"emit_risk": Kind.RISK in self.plan.outputs}
        self.out.lines.append(_select(_DECISION, {**emits, "no_risk": not emits["emit_risk"]}))
        for trigger in ("trade", "bbo", "order", "timer"):
            self._listeners(trigger)
        if self.joined:
            self._joins()
        self._event()
        release, unless_done = (_RELEASE, _UNLESS_DONE) if self.joined else ("# no calculation is over several instruments", "if")
        sizes = {"room": self.room, "claim": 64 * self.room, "far": FAR_AHEAD, "near": NEAR_AHEAD}
        self.out.lines.append(_LOOPS.format(**sizes, release=release, unless_done=unless_done))
        return self.out.text()

    def _imports(self) -> None:
        names = ", ".join(f"{i.name} = {i.use}" for i in self.plan.instances) or "none"
        fields = " ".join(f"s{k} p{k}" + (f" q{k}" if i.legs else "") for k, i in enumerate(self.plan.instances))
        joins = {k: (i.name, i.legs) for k, i in enumerate(self.plan.instances) if i.legs}
        pairs = ((i.state, i.calculation.params_dtype) for i in self.plan.instances)
        dtypes = "\n".join(f"    (np.{state!r}, np.{params!r})," for state, params in pairs)
        self.out.lines.append(_IMPORTS.format(names=names, fields=fields, slots=max(1, len(self.slots)), dtypes=dtypes, joins=joins))
        for k, instance in enumerate(self.plan.instances):
            self.out.add(0, f"from {instance.module} import {instance.function} as c{k}", f"k{k} = c{k}.kernel")
        self.out.add(0, "", "")

    # ---- calculations

    def _listeners(self, trigger: str) -> None:
        roots = [k for k, i in enumerate(self.plan.instances) if trigger in self._triggers(i)]
        remembered = [name for name in self.slots if SERIES.get(name) == trigger]
        self.out.add(0, "@inlined", f"def on_{trigger}(shard, event, i, w):")
        for name in remembered:
            self.out.add(1, f"shard.last[{self.slots[name]}, i] = {_series(name, 'event')}")
        if roots:
            self.out.add(1, "v = shard.core[0].parameters")
        for k in roots:
            self._call(1, k, "event")
        self.out.add(1, "return w", "", "")

    def _joins(self) -> None:
        """What feeds the joins, and what runs on the events that come out of them."""
        out = self.out
        for row, name in enumerate(("bbo", "trade")):
            places = [k for k in self.joined if any(kind == name for kind, _ in self.plan.instances[k].legs)]
            out.add(0, "@inlined", f"def put_{name}(shard, event, i):")
            out.add(1, *(f"join_put(shard.q{k}, shard.core, shard.info, {row}, i, event)" for k in places), "return", "", "")
        out.add(0, "@outlined", "def meet(shard, i):", "    if i >= shard.info.size:", "        return")
        out.add(1, *(f"join_meet(shard.q{k}, shard.info, i)" for k in self.joined), "", "")
        out.add(0, "@outlined", "def tell_time(shard, source, feed, time_ns, told):")
        out.add(1, *(f"join_time(shard.q{k}, shard.core, shard.info, source, feed, time_ns, told)" for k in self.joined), "", "")
        for k in self.joined:
            out.add(0, "@outlined", f"def release_{k}(shard, w, limit):")
            out.add(1, f"join = shard.q{k}", "while w + np.uint64(ROOM) <= limit:")
            out.add(2, "leg = join_next(join)", "if leg < 0:", "    return w", "event = join.slots[join_take(join, leg)]")
            out.add(2, "i = join.state[0].home - 1", "v = shard.core[0].parameters")
            self._call(2, k, "event")
            out.add(1, "shard.core[0].releasing = 1  # the rest when there is room", "return w", "", "")
        out.add(0, "@outlined", "def release(shard, w, limit):", "    # what waits for nothing any more", "    shard.core[0].releasing = 0")
        out.add(1, *(f"w = release_{k}(shard, w, limit)" for k in self.joined), "return w", "", "")

    def _triggers(self, instance: Instance) -> set[str]:
        if instance.legs:
            return set()
        timer = {"timer"} if instance.timer else set()
        if instance.of is not None:
            return ({SERIES[instance.of]} if instance.of in SERIES else set()) | timer
        return (set(instance.inputs) - {"bar"}) | timer

    def _call(self, depth: int, k: int, event: str, series: str | None = None) -> None:
        """One calculation, and inside it those that read its outputs."""
        instance = self.plan.instances[k]
        out = self.out
        arguments = []
        condition = f"shard.masks[{k}, i] != 0"
        out.add(depth, f"# {instance.name}: {instance.use}")
        if instance.of is not None:
            out.add(depth, f"x{k} = {series or _series(instance.of, event)}")
            condition += f" and x{k} == x{k}"
            arguments.append(f"x{k}")
            if instance.against is not None:
                out.add(depth, f"y{k} = shard.last[{self.slots[instance.against]}, i]")
                condition += f" and y{k} == y{k}"
                arguments.append(f"y{k}")
        if instance.of is None or instance.takes_event:
            arguments.append(event)
        if instance.legs:
            arguments.append("leg")
        out.add(depth, f"if {condition}:")
        arguments.append(f"shard.s{k}[{'0' if instance.legs or instance.calculation.scope == 'shard' else 'i'}]")
        parameters = [_parameter(k, name, len(instance.legs)) for name in instance.parameter_names]
        if instance.emits == "signal":
            self._signal(depth + 1, k, event, [*arguments, *parameters])
        else:
            self._record(depth + 1, k, event, [*arguments, "o", *parameters])

    def _signal(self, depth: int, k: int, event: str, arguments: list[str]) -> None:
        instance = self.plan.instances[k]
        out = self.out
        out.add(depth, f"r{k} = k{k}({', '.join(arguments)})")
        for j, name in enumerate(instance.outputs):
            value = f"r{k}[{j}]" if len(instance.outputs) > 1 else f"r{k}"
            out.add(depth, f"if {value} == {value}:")
            out.add(depth + 1, f"shard.last[{self.slots[f'{instance.name}.{name}']}, i] = {value}")
            if Kind.SIGNAL in self.plan.outputs and not instance.silent:
                out.add(depth + 1, f"o = begin_output(shard.out.slots, w, {event}, SIGNAL)")
                out.add(depth + 1, f"fill_signal(o, {event}, i, np.uint64({instance.index | j << 32}), {value})")
                out.add(depth + 1, f"shard.counts[{int(Kind.SIGNAL)}] += 1", "w += np.uint64(1)")
            for reader, other in enumerate(self.plan.instances):
                if other.of == f"{instance.name}.{name}":
                    self._call(depth + 1, reader, event, series=value)

    def _record(self, depth: int, k: int, event: str, arguments: list[str]) -> None:
        instance = self.plan.instances[k]
        kind = {"alert": Kind.ALERT, "bar": Kind.BAR, "intent": Kind.INTENT}[instance.emits]
        out = self.out
        place = "shard.out.slots, w" if kind in self.plan.outputs else f"shard.scratch, FOR_{kind.name}"
        out.add(depth, f"o = begin_output({place}, {event}, {kind.name})", f"begin_record(o, i, np.uint64({instance.index}))")
        out.add(depth, f"if k{k}({', '.join(arguments)}):", f"    shard.counts[{int(kind)}] += 1")
        if kind == Kind.BAR:
            out.add(depth + 1, f"o.side = np.uint8({instance.index})")
        if kind in self.plan.outputs:
            out.add(depth + 1, "w += np.uint64(1)")
        if kind == Kind.INTENT and self.plan.risk:
            out.add(depth + 1, "w = decide(shard, o, i, w)")
        for reader, other in enumerate(self.plan.instances):
            if other.bars == instance.name:
                out.add(depth + 1, f"bar{k} = o")
                self._call(depth + 1, reader, f"bar{k}")

    # ---- events

    def _event(self) -> None:
        outputs = self.plan.outputs
        flags = {f"emit_{kind.name.lower()}": kind in outputs for kind in Kind}
        flags |= {"no_bbo": not flags["emit_bbo"], "no_trade": not flags["emit_trade"]}
        triggers = set().union(*(self._triggers(i) for i in self.plan.instances))
        flags |= {"orders": "order" in triggers, "no_timers": "timer" not in triggers, "joins": bool(self.joined)}
        self.out.lines.append(_select(_EVENT, flags))


def _series(name: str, event: str) -> str:
    return f"{name.replace('.', '_')}(shard.info, {event})"


def _parameter(k: int, name: str, legs: int) -> str:
    facts = {"tick": "shard.info[i].tick_size", "exponent": "np.int64(shard.info[i].exponent)", "legs": f"np.int64({legs})"}
    return facts.get(name, f"shard.p{k}[v].{name}")


def _select(template: str, flags: dict[str, bool]) -> str:
    """Keep the lines of a template whose ``#? flag`` marks hold, without the marks."""
    kept = []
    for line in template.splitlines():
        code, mark, condition = line.partition("  #? ")
        if not mark or all(flags[name] for name in condition.split()):
            kept.append(code)
    return "\n".join(kept)


def series_slots(plan: ShardPlan) -> dict[str, int]:
    """Place of every series in the table of last values: ``calculation.output`` of all signals, then series that others read second."""
    slots: dict[str, int] = {}
    for instance in plan.instances:
        if instance.emits == "signal":
            for output in instance.outputs:
                slots[f"{instance.name}.{output}"] = len(slots)
    for instance in plan.instances:  # a second series is read at its last value, which needs a place too
        if instance.against in SERIES:
            slots.setdefault(str(instance.against), len(slots))
    return slots


def generate(plan: ShardPlan) -> str:
    """The source of the loop of one plan: a readable module that defines ``Shard`` and ``step``, a part of the loops that drive it."""
    return _Generator(plan).generate()


# ---------------------------------------------------------------- the object around the loop

_KEPT_ARRAYS = ("books", "core", "info", "statistics", "counts", "gaps", "source_stale", "scratch", "out", "risk", "changes")
"""What a shard keeps, as the very same arrays, under any plan."""


class Shard:
    """One shard's state and its compiled loop.

    Args:
        plan: what the loop is made of.
        output: the ring that takes the outputs; this shard is its only writer.
        instruments_max: highest instrument id + 1.
        orders_max: resting orders of all instruments together.
        order_ids: how the venue numbers orders (:func:`tickmesh.node.book.make_books`).
        progress: told when a loop has to be compiled.

    Attributes:
        arrays: the namedtuple of arrays that the loop works on.
        module: the generated module, from which :mod:`tickmesh.node.loops` makes what is compiled.
    """

    def __init__(
        self,
        plan: ShardPlan,
        output: RingArrays,
        *,
        instruments_max: int = 4096,
        orders_max: int = 1 << 20,
        order_ids: str = "sequential",
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self._take(plan, progress)
        self.arrays = make_arrays(self.module, output, self._patterns(), instruments_max, orders_max, order_ids)
        for k, instance in enumerate(plan.instances):
            getattr(self.arrays, f"p{k}")[:] = instance.params

    def _take(self, plan: ShardPlan, progress: Callable[[str], None] | None) -> None:
        self.plan = plan
        self.module: ModuleType = import_generated(write_generated("shard_parts", generate(plan)))
        self._progress = progress
        self.signal_names = [
            i.name if len(i.outputs) == 1 else f"{i.name}.{output}" for i in plan.instances if i.emits == "signal" for output in i.outputs
        ]

    def _patterns(self) -> Any:
        return pattern_table([instance.symbols for instance in self.plan.instances])

    @classmethod
    def following(
        cls, before: Shard, plan: ShardPlan, limits: Any, states: Mapping[int, Any], joins: Mapping[int, Any], books: Any
    ) -> Shard:
        """A shard that goes on with another's books and instruments under another plan; what it listens to is for a hand-over to fill in.

        Args:
            before: the other one.
            plan: of the new one.
            limits: LIMITS record array of one.
            states: arrays of the calculations that go on where they are, by place in the plan.
            joins: the same for what waits in their joins.
            books: the other one's, or what becomes of them.
        """
        shard = cls.__new__(cls)
        shard._take(plan, before._progress)
        instruments = len(before.arrays.info)
        calculations: list[Any] = []
        for k, ((state, parameters), instance) in enumerate(zip(shard.module.DTYPES, plan.instances)):
            values = np.zeros(2, parameters)
            values[:] = instance.params
            calculations += [states[k] if k in states else np.zeros(instruments, state), values]
            if instance.legs:
                calculations.append(joins[k] if k in joins else make_join(instance.name, instance.legs, instruments))
        masks, last = np.zeros((max(1, len(plan.instances)), instruments), np.uint8), np.full((shard.module.SLOTS, instruments), np.nan)
        masks.fill(0)  # its pages are there before the hand-over
        same = {name: getattr(before.arrays, name) for name in _KEPT_ARRAYS} | {"books": books}
        own = dict(zip(shard.module.Shard._fields[-len(calculations) :] if calculations else (), calculations))
        tables = {"patterns": shard._patterns(), "masks": masks, "last": last, "limits": np.repeat(limits, 2)}
        shard.arrays = shard.module.Shard(**same, **tables, **own)
        return shard

    @functools.cached_property
    def _step_loop(self) -> ModuleType:
        return step_loop(self.module, self._progress)

    def prepare_step(self) -> None:
        """Load what :meth:`step` runs, compiling it if needed; otherwise the first step does. A node's loop does without it."""
        assert self._step_loop

    def step(self, batch: Any, first: int, count: int) -> int:
        """Take events ``[first, count)`` of `batch` (ANY_VIEW array); returns how many, fewer if the output ring is full."""
        return int(self._step_loop.step(batch, first, count, self.arrays))

    def event_counts(self) -> dict[str, int]:
        """Events so far by kind, inputs and outputs."""
        return {Kind(k).name.lower(): int(n) for k, n in enumerate(self.arrays.counts) if n and k in Kind._value2member_map_}

    def symbol(self, instrument: int) -> str:
        """Symbol of one of the shard's instruments."""
        return bytes(self.arrays.info["symbol"][instrument]).rstrip(b"\0").decode("ascii")

    def references(self) -> EventArray:
        """A REFERENCE event, without times, of every instrument that this shard has been told of and that is its own."""
        seen = self.seen_instruments()
        events, info = np.zeros(len(seen), EVENT), self.arrays.info[seen]
        events["instrument"], events["kind"] = seen, Kind.REFERENCE
        events["price"], events["flags"] = info["tick_size"], info["source"]
        events["side"] = info["exponent"].astype(np.int8).view(np.uint8)
        words = np.ascontiguousarray(info["symbol"]).view(np.uint64).reshape(-1, 3)
        events["qty"], events["id"], events["aux"] = words[:, 0].view(np.int64), words[:, 1], words[:, 2].view(np.int64)
        return events

    def seen_instruments(self) -> list[int]:
        """Ids of the instruments that this shard has been told of and that are its own, those of calculations included."""
        info = self.arrays.info
        return [int(i) for i in np.flatnonzero(info["tick_size"]) if info["source"][i] < PEERS or info["source"][i] == DERIVED]

    def gaps(self) -> list[tuple[int, int]]:
        """First and last missing source sequence of the gaps so far, the first 4096 of them."""
        known = min(int(self.arrays.counts[Kind.GAP]), len(self.arrays.gaps))
        return [(int(first), int(last)) for first, last in self.arrays.gaps[:known]]

    def last_signals(self, instrument: int) -> dict[str, float]:
        """Last value of every signal that an instrument has emitted."""
        values = self.arrays.last[: len(self.signal_names), instrument]
        return {name: float(value) for name, value in zip(self.signal_names, values) if not np.isnan(value)}
