"""The gateways of a node: made from `[delivery.NAME]` tables, and where the streams that they go on with end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nats.errors
import nats.js.errors as js_errors

from tickmesh.control.config import Config, Delivery
from tickmesh.node.delivery import DeliveryOptions, Gateway
from tickmesh.node.errors import NodeError
from tickmesh.node.event import Kind
from tickmesh.node.frames import CalculationNames, stream_name, stream_subject
from tickmesh.node.shard import ShardPlan
from tickmesh.node.telemetry import Telemetry
from tickmesh.transports.counters import Values
from tickmesh.transports.nats import LinkError, Login, connect


class StreamUnknown(NodeError):
    """Where an output stream ends cannot be seen; the message says what to do."""


def nats_deliveries(config: Config) -> dict[str, Delivery]:
    """The deliveries that have a gateway, by name."""
    return {name: delivery for name, delivery in config.delivery.items() if delivery.method == "nats"}


def delivering(config: Config) -> list[str]:
    """Names of the deliveries that have counters."""
    return [name for name, delivery in config.delivery.items() if delivery.method in ("nats", "rdma")]


def make_gateway(config: Config, name: str, target: str | None, names: Mapping[int, CalculationNames]) -> Gateway:
    """The gateway of a delivery, without shards yet.

    Args:
        target: address in place of the configured one.
        names: of the calculations, by version.
    """
    delivery = config.delivery[name]
    gateway = Gateway(delivery_options(config, delivery, target or delivery.target), {}, login=login_of(delivery))
    for version, calculations in names.items():
        gateway.know(version, calculations)
    return gateway


def latency_of(telemetry: Telemetry, name: str, shard: int) -> Values:
    """A shard's histogram of a delivery."""
    return telemetry.delivery(name, shard).receive_to_stored


def stream_ends(config: Config, targets: Mapping[str, str], which: Callable[[Sequence[int]], int] = max) -> list[int]:
    """By shard, the last output that a stream of the node's deliveries holds; 0 if there is none.

    Args:
        targets: addresses in place of configured ones, by delivery.
        which: of several deliveries' last outputs; `min`: what all of them hold.

    Raises:
        StreamUnknown: a server is not there.
    """
    found: list[list[int]] = []
    for name, delivery in nats_deliveries(config).items():
        try:
            found.append(asyncio.run(_last_outputs(config, targets.get(name, delivery.target), delivery)))
        except (LinkError, nats.errors.Error, OSError) as error:
            reason = "NATS must be there when a node without a journal to replay starts, to know where its output stream ends"
            raise StreamUnknown(f"delivery.{name}: {reason} ({error})") from error
    return [which(ends) for ends in zip(*found)] if found else [0] * config.cluster.shards


async def _last_outputs(config: Config, target: str, delivery: Delivery) -> list[int]:
    cluster = config.cluster
    link = await connect(target, name=f"tickmesh {cluster.name}", login=login_of(delivery), wait_s=5.0)
    try:
        found = []
        jetstream = link.client.jetstream(timeout=2)
        for shard in range(cluster.shards):
            try:
                message = await jetstream.get_last_msg(stream_name(cluster.name, shard), stream_subject(cluster.name, shard))
                found.append(int((message.headers or {}).get("Out-Seq", "0")))
            except js_errors.NotFoundError:
                found.append(0)
        return found
    finally:
        await link.close()


def signal_names(plan: ShardPlan) -> dict[tuple[int, int], str]:
    """Names of signals, alerts and intents by (calculation, output)."""
    names = {}
    for instance in plan.instances:
        for output, label in enumerate(instance.outputs):
            single = len(instance.outputs) == 1
            names[instance.index, output] = instance.name if single else f"{instance.name}.{label}"
        names.setdefault((instance.index, 0), instance.name)
    return names


def login_of(delivery: Delivery) -> Login:
    """How to log in: secrets come from the environment and from files only."""
    token = os.environ.get(delivery.token_env) if delivery.token_env else None
    login = Login.from_environment()
    if token:
        login = replace(login, token=token)
    if delivery.credentials_file:
        login = replace(login, credentials=Path(delivery.credentials_file).expanduser())
    if delivery.tls_ca_file:
        login = replace(login, ca=Path(delivery.tls_ca_file).expanduser())
    return login


def delivery_options(config: Config, delivery: Delivery, target: str) -> DeliveryOptions:
    """The gateway's options from a `[delivery.NAME]` table."""
    kinds = frozenset(int(Kind[name.upper()]) for name in delivery.per_event if name.upper() in Kind.__members__)
    return DeliveryOptions(
        cluster=config.cluster.name,
        target=target,
        batch_max_events=delivery.batch_max_events,
        batch_max_wait_ms=delivery.batch_max_wait_ms,
        window=delivery.window,
        stream_max_bytes=delivery.stream_max_mb << 20,
        stream_max_age_s=delivery.stream_max_age_s,
        replicas=delivery.replicas,
        per_event=kinds,
        poll_min_ms=2.0 if config.cluster.idle == "sleep" else 0.2,
    )


def delivery_numbers(status: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of a gateway's shard for :class:`DeliveryCounter`."""
    same = {name: name for name in ("frames", "acks", "reconnects")}
    names = {**same, "retries": "resent", "skipped": "per_event_skipped", "lag": "ring_lag", "events": "events_read"}
    return {counter: int(status[key]) for counter, key in names.items() if key in status}
