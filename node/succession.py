"""The shard that goes on under another configuration: what it keeps of the one before, and what a hand-over copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tickmesh.node.book import numbering_of, renumbered
from tickmesh.node.calculation import SERIES, Instance
from tickmesh.node.handover import ALL, MATCHING, NOTHING, Carry
from tickmesh.node.shard import Shard, ShardPlan, series_slots


def keeps_state(old: Instance, new: Instance) -> bool:
    """Whether a calculation goes on where it is: the same name, code, inputs and layout of its state."""
    mine, its = ((i.name, i.module, i.function, i.of, i.against, i.bars, i.legs, i.state) for i in (old, new))
    return mine == its


def same_loop(old: ShardPlan, new: ShardPlan) -> bool:
    """Whether two plans differ at most in values of parameters, which the running loop takes as they are."""
    return (
        (old.outputs, old.risk, len(old.instances)) == (new.outputs, new.risk, len(new.instances))
        and all(a.same_code(b) and a.use == b.use for a, b in zip(old.instances, new.instances))
    )  # fmt: skip


def succeed(shard: Shard, plan: ShardPlan, limits: Any, order_ids: str) -> tuple[Shard, Carry]:
    """The shard that goes on under another plan, and what is carried over to it when it begins.

    Args:
        shard: the one before; it runs on until the hand-over.
        plan: what the next loop is made of.
        limits: LIMITS record array of one.
        order_ids: how orders are numbered from then on: as before (also if it is empty), or per instrument.
    """
    order_ids = order_ids or numbering_of(shard.arrays.books)
    before = {instance.name: instance for instance in shard.plan.instances}
    kept = [before[i.name].index if i.name in before and keeps_state(before[i.name], i) else None for i in plan.instances]
    states = {k: getattr(shard.arrays, f"s{place}") for k, place in enumerate(kept) if place is not None}
    joins = {k: getattr(shard.arrays, f"q{place}") for k, place in enumerate(kept) if place is not None and plan.instances[k].legs}
    was, now = series_slots(shard.plan), series_slots(plan)
    surviving = {i.name for i, place in zip(plan.instances, kept) if place is not None}
    last_rows = [was.get(name, NOTHING) if name in SERIES or name.split(".")[0] in surviving else NOTHING for name in now]
    mask_rows = [_mask_row(shard.plan, instance, place) for instance, place in zip(plan.instances, kept)]
    old, renumber = shard.arrays.books, numbering_of(shard.arrays.books) != order_ids
    rows = np.array(mask_rows, np.int64), np.array(last_rows, np.int64)
    carry = Carry(shard.arrays.masks, shard.arrays.last, *rows, old, np.array([renumber], np.int64))
    return Shard.following(shard, plan, limits, states, joins, renumbered(old, order_ids) if renumber else old), carry


def common_numbering(sources: Sequence[str]) -> str:
    """How the orders of several sources are numbered together, from how each numbers its own."""
    return sources[0] if len(sources) == 1 else "per_instrument"


def numbering_after(running: str, needed: str) -> str:
    """How orders are numbered when sources need `needed`: as they are if that will do, else per instrument, which always does."""
    return needed if not running else running if running in (needed, "per_instrument") else "per_instrument"


def _mask_row(before: ShardPlan, instance: Instance, place: int | None) -> int:
    if place is not None and before.instances[place].symbols == instance.symbols:
        return place
    return MATCHING if instance.symbols else ALL


def set_parameters(shard: Shard, plan: ShardPlan, limits: Any, slot: int) -> None:
    """Write the values of a plan of the :func:`same_loop` into a slot that is not in use."""
    for k, instance in enumerate(plan.instances):
        getattr(shard.arrays, f"p{k}")[slot] = instance.params
    shard.arrays.limits[slot] = limits[0]
