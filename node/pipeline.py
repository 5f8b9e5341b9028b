"""From a configuration to the parts of a node's pipeline: instrument table, plan, shards, risk limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tickmesh.control.config import Config, Source
from tickmesh.node.calculation import Instance, PlanError, PlanProblem, plan
from tickmesh.node.event import Kind
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.risk import make_limits
from tickmesh.node.shard import Shard, ShardPlan
from tickmesh.transports.ring import Ring

_ORDER_KINDS = (Kind.ADD, Kind.EXECUTE, Kind.CANCEL, Kind.DELETE, Kind.REPLACE, Kind.MODIFY)


def make_table(config: Config, numbers: Mapping[str, int] | None = None) -> InstrumentTable:
    """The node's instrument table, with the configured placements registered; `numbers` of the sources: default in their order."""
    table = InstrumentTable(config.cluster.instruments_max, config.cluster.shards)
    for place, (name, options) in enumerate(config.data_sources.items()):
        place_symbols(table, config, numbers[name] if numbers else place, options)
    return table


def place_symbols(table: InstrumentTable, config: Config, number: int, options: Source) -> None:
    """Register the configured placements of a source's symbols."""
    for symbol, shard in config.cluster.shard_overrides.items():
        table.intern(symbol, number, options.tick_size_of(symbol) or 10_000_000, options.quantity_exponent_of(symbol) or 0, shard=shard)


def make_plan(config: Config, folder: Path) -> ShardPlan:
    """What the configured shard loop is made of.

    Raises:
        PlanError: a calculation, alert or bar is wrong.
    """
    processing = config.processing
    instances: list[Instance] = plan(
        {name: c.table() for name, c in processing.calculations.items()},
        {name: a.table() for name, a in processing.alerts.items()},
        {name: b.table() for name, b in processing.bars.items()},
        folder,
    )
    _check_joins(config, instances)
    return ShardPlan(tuple(instances), outputs_of(config), config.risk.enabled)


def _check_joins(config: Config, instances: Sequence[Instance]) -> None:
    """A calculation over several instruments takes what the shards put out."""
    joins = [instance for instance in instances if instance.legs]
    outputs, problems = outputs_of(config), []
    for kind in sorted({Kind.REFERENCE, *(Kind[kind.upper()] for join in joins for kind, _ in join.legs)} - outputs if joins else ()):
        reason = f"lacks {kind.name.lower()!r}, which {joins[0].name} needs from other shards"
        problems.append(PlanProblem("processing.outputs", reason, "add it"))
    if joins and config.processing.timer_interval_ms == 0:
        reason = f"is 0, but {joins[0].name} must know how far the instruments have come"
        problems.append(PlanProblem("processing.timer_interval_ms", reason, "set it to the longest that it may wait, e.g. 10"))
    if joins and config.cluster.shards > 1 and not any(delivery.method == "nats" for delivery in config.delivery.values()):
        problems.append(PlanProblem("delivery", f"has none over NATS, from which {joins[0].name} takes other shards' outputs", "add one"))
    if problems:
        raise PlanError(problems)


def outputs_of(config: Config) -> frozenset[Kind]:
    """The kinds that `processing.outputs` names."""
    kinds: set[Kind] = set()
    for name in config.processing.outputs:
        if name == "order":
            kinds.update(_ORDER_KINDS)
        else:
            kinds.add(Kind[name.upper()])
    return frozenset(kinds)


def risk_limits(config: Config) -> Any:
    """The configured limits as a LIMITS record array of one."""
    risk = config.risk
    return make_limits(**risk.model_dump(exclude={"enabled"}))


def make_shards(
    config: Config, outputs: Sequence[Ring], folder: Path, order_ids: str, progress: Callable[[str], None] | None = None
) -> list[Shard]:
    """One shard per output ring."""
    chosen = make_plan(config, folder)
    return [make_shard(config, chosen, ring, order_ids, progress) for ring in outputs]


def make_shard(
    config: Config, chosen: ShardPlan, output: Ring, order_ids: str, progress: Callable[[str], None] | None = None
) -> Shard:
    """A fresh shard of a plan, with the configured sizes and risk limits."""
    sizes = {"instruments_max": config.cluster.instruments_max, "orders_max": config.cluster.orders_max}
    shard = Shard(chosen, output.arrays, **sizes, order_ids=order_ids, progress=progress)
    shard.arrays.limits[:] = np.repeat(risk_limits(config), 2)
    return shard
