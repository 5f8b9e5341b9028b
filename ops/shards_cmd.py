"""``tickmesh shards`` and ``tickmesh shards move``: who leads each shard of a cluster, who could, and leadership that moves by wish.

What is shown comes from two places: the store says who holds a shard's lease and which moves are wished; a moment of the nodes' heartbeats
says who is alive, and how far each replica is. Where they differ, the state says so.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table

from tickmesh.control.config import ConfigError
from tickmesh.control.config_store import ConfigStore, Keys, who_text
from tickmesh.control.heartbeats import Beat, ShardBeat, beat_subject, decode_beat
from tickmesh.control.leadership import lease_key, move_key, request_move
from tickmesh.control.store import Delete, Entry, Store, VersionMismatch
from tickmesh.ops.config_store_cmd import Place
from tickmesh.transports.nats import connect

EXIT_OK, EXIT_REFUSED, EXIT_UNANSWERED = 0, 4, 5
LISTEN_S = 0.2
"""How long heartbeats are listened to: ten of each node."""
State = Literal["led", "moving", "taking over", "leader silent", "no leader"]


class NoSuchShard(Exception):
    """The cluster has no such shard.

    Attributes:
        shard: as given.
        known: those that it has.
    """

    def __init__(self, shard: int, known: Sequence[int]) -> None:
        there = f"its shards are 0 to {known[-1]}" if known else "it has none yet: apply a configuration, and start its nodes"
        super().__init__(f"the cluster has no shard {shard}: {there}")
        self.shard, self.known = shard, known


class NoSuchNode(Exception):
    """No such node is heard of.

    Attributes:
        node: as given.
        known: those that are.
    """

    def __init__(self, node: str, known: Sequence[str]) -> None:
        super().__init__(f"no node {node} sends heartbeats; those that do: {', '.join(known) or 'none'}")
        self.node, self.known = node, known


# ---------------------------------------------------------------- what there is to see


@dataclass(frozen=True)
class Standby:
    """A replica that does not lead.

    Attributes:
        node: where it is.
        ready: whether it could lead now, and follows the leader, if there is one.
        lag: events that the leader's journal has and this one's has not; None: the leader is not heard.
    """

    node: str
    ready: bool
    lag: int | None


@dataclass(frozen=True)
class Shard:
    """A shard of the cluster.

    Attributes:
        shard: its number.
        state: ``led``; ``moving``: a move is wished; ``taking over``: who holds the lease does not lead yet; ``leader silent``: its
            heartbeats are not heard; ``no leader``: nobody holds the lease.
        leader: who holds the lease; empty: nobody.
        epoch: of the lease; 0: nobody holds it.
        position: events in the leader's journal; None: it is not heard.
        standbys: the other replicas that are heard.
        move_to, move_by: the wish, if there is one.
    """

    shard: int
    state: State
    leader: str
    epoch: int
    position: int | None
    standbys: tuple[Standby, ...]
    move_to: str = ""
    move_by: str = ""

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def shards_of(root: str, entries: Mapping[str, Entry], beats: Mapping[str, Beat], count: int = 0) -> list[Shard]:
    """Every shard, from what the store and the heartbeats say.

    Args:
        root: prefix of the cluster's keys, ending with ``/``.
        entries: of the store, below ``ROOTshards/``.
        beats: the last of each node that is heard.
        count: how many shards are configured; more that are seen are shown too.
    """
    prefix = f"{root}shards/"
    named = {key.removeprefix(prefix).partition("/")[0] for key in entries}
    numbers = {*range(count), *(int(name) for name in named if name.isdigit()), *(n for beat in beats.values() for n in beat.shards)}
    return [_shard(number, root, entries, beats) for number in sorted(numbers)]


def _is_ready(beat: ShardBeat, leader: str) -> bool:
    """Whether a replica could take over from the leader, or from nobody."""
    return beat.ready and (not leader or (beat.role == "standby" and beat.follows))


def _shard(number: int, root: str, entries: Mapping[str, Entry], beats: Mapping[str, Beat]) -> Shard:
    lease, move = entries.get(lease_key(root, number)), _facts(entries.get(move_key(root, number)))
    leader, epoch = _facts(lease).get("node", ""), (lease.epoch or lease.version) if lease else 0
    leads = beats[leader].shards.get(number) if leader in beats else None
    position = leads.position if leads else None
    standbys = tuple(
        Standby(node, _is_ready(one, leader), None if position is None else max(0, position - one.position))
        for node, beat in sorted(beats.items())
        if (one := beat.shards.get(number)) is not None and node != leader
    )
    state: State = "led"
    if not leader:
        state = "no leader"
    elif leader not in beats:
        state = "leader silent"
    elif leads is None or leads.role != "leader":
        state = "taking over"
    elif move:
        state = "moving"
    return Shard(number, state, leader, epoch, position, standbys, move.get("to", ""), move.get("by", ""))


def _facts(entry: Entry | None) -> dict[str, str]:
    """What a lease or a wish says; empty if there is none, or a person has written something else."""
    try:
        found = json.loads(entry.value) if entry else {}
    except ValueError:
        return {}
    return {name: str(value) for name, value in found.items()} if isinstance(found, dict) else {}


# ---------------------------------------------------------------- looking


@dataclass
class Cluster:
    """A cluster to look at: its store, and its heartbeats.

    Attributes:
        store: open.
        root: prefix of its keys.
        cluster: its name.
        server: NATS servers that its heartbeats go over.
        count: shards that its configuration names; 0: it cannot be read.
    """

    store: Store
    root: str
    cluster: str
    server: str
    count: int

    async def beats(self, listen_s: float = LISTEN_S) -> dict[str, Beat]:
        """The last heartbeat of each node that is heard in so many seconds. Raises as :func:`tickmesh.transports.nats.connect`."""
        found: dict[str, Beat] = {}

        async def heard(message: Any) -> None:
            beat = decode_beat(message.data)
            if beat is not None:
                found[beat.node] = beat

        link = await connect(self.server, name="tickmesh shards")
        try:
            await link.client.subscribe(beat_subject(self.cluster, "*"), cb=heard)
            await link.client.flush()
            await asyncio.sleep(listen_s)  # what comes in this time is what is asked for
        finally:
            await link.close()
        return found

    async def shards(self, listen_s: float = LISTEN_S) -> list[Shard]:
        """Every shard. Raises StoreError, LinkError."""
        beats = await self.beats(listen_s)
        return shards_of(self.root, await self.store.list(f"{self.root}shards/"), beats, self.count)


@asynccontextmanager
async def opened(place: Place, server: str | None = None) -> AsyncIterator[Cluster]:
    """A cluster, for as long as the context lasts.

    Args:
        place: its store and its name.
        server: NATS servers; None: those that its configuration delivers to, else the store's, if that is NATS.
    """
    async with place.open() as config:
        count, target = await _configured(config, place)
        stored = place.settings.server if place.settings.kind == "nats" else ""
        address = server or target or stored or "nats://127.0.0.1:4222"
        yield Cluster(config.store, Keys(place.cluster).root, place.cluster, address, count)


async def _configured(config: ConfigStore, place: Place) -> tuple[int, str]:
    """Number of shards, and NATS servers of the first delivery to NATS; (0, "") if there is no good configuration."""
    stored = await config.read()
    if not stored.version:
        return 0, ""
    try:
        parsed = stored.documents.parse(place.own)
    except ConfigError:
        return 0, ""
    targets = [one.target for one in parsed.delivery.values() if one.method == "nats" and not one.embedded]
    return parsed.cluster.shards, next(iter(targets), "")


async def look(place: Place, server: str | None = None) -> list[Shard]:
    """Every shard of a cluster. Raises StoreError, LinkError."""
    async with opened(place, server) as cluster:
        return await cluster.shards()


def table(shards: Sequence[Shard]) -> Table:
    """For people."""
    made = Table(expand=False)
    for name in ("shard", "leader", "epoch", "events", "standbys", "state"):
        made.add_column(name, justify="right" if name in ("shard", "epoch", "events") else "left")
    for one in shards:
        state = one.state if not one.move_to else f"{one.state}: {one.move_to} is wished" + (f" by {one.move_by}" if one.move_by else "")
        position = "-" if one.position is None else f"{one.position:,}"
        made.add_row(str(one.shard), one.leader or "-", str(one.epoch or "-"), position, _standbys_text(one.standbys), state)
    return made


def _standbys_text(standbys: Sequence[Standby]) -> str:
    def said(one: Standby) -> str:
        lag = "" if not one.lag else f" {one.lag:,} behind"
        return f"{one.node} {'ready' if one.ready else 'not ready'}{lag}"

    return ", ".join(said(one) for one in standbys) or "none"


# ---------------------------------------------------------------- moving


@dataclass(frozen=True)
class Moved:
    """What became of a wish.

    Attributes:
        shard, to: what was wished.
        leader, epoch: who leads now, under which epoch.
        before, epoch_before: who led before.
        after_s: seconds from the wish until the node held the lease, or until it was given up.
        did: ``moved``, ``unchanged`` (it led already), ``refused`` (the leader has withdrawn the wish), ``unanswered``.
        reason: why it was not moved.
    """

    shard: int
    to: str
    leader: str
    epoch: int
    before: str
    epoch_before: int
    after_s: float
    did: Literal["moved", "unchanged", "refused", "unanswered"]
    reason: str = ""

    @property
    def exit_code(self) -> int:
        """What it comes to."""
        return {"refused": EXIT_REFUSED, "unanswered": EXIT_UNANSWERED}.get(self.did, EXIT_OK)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def __str__(self) -> str:
        if self.did == "unchanged":
            return f"shard {self.shard} is led by {self.to} already, under epoch {self.epoch}"
        if self.did == "moved":
            before = f"{self.before} (epoch {self.epoch_before})" if self.before else "nobody"
            return f"shard {self.shard}: {before} -> {self.leader} (epoch {self.epoch}) after {self.after_s:.3f} s"
        return f"shard {self.shard} stays with {self.leader or 'nobody'}: {self.reason}"


async def move(place: Place, shard: int, to: str, wait_s: float, server: str | None = None) -> Moved:
    """Ask that a node leads a shard, and wait until it does; otherwise the wish is withdrawn, also when this is cancelled.

    Args:
        place: the cluster.
        shard: number of the shard.
        to: name of the node.
        wait_s: how long to wait.
        server: NATS servers; None: see :func:`opened`.

    Raises:
        NoSuchShard, NoSuchNode, StoreError, LinkError.
    """
    async with opened(place, server) as cluster:
        beats = await cluster.beats()
        entries = await cluster.store.list(f"{cluster.root}shards/")
        shards = {one.shard: one for one in shards_of(cluster.root, entries, beats, cluster.count)}
        if shard not in shards:
            raise NoSuchShard(shard, list(shards))
        if to not in beats:
            raise NoSuchNode(to, sorted(beats))
        now = shards[shard]
        if now.leader == to and not now.move_to:
            return Moved(shard, to, to, now.epoch, to, now.epoch, 0.0, "unchanged")
        return await _wish(cluster, now, to, wait_s)


async def _wish(cluster: Cluster, before: Shard, to: str, wait_s: float) -> Moved:
    by, began, held = f"{who_text()} {secrets.token_hex(4)}", time.monotonic(), (before.leader, before.epoch)
    did: Literal["moved", "refused", "unanswered"] = "unanswered"
    reason = f"it was not moved to {to} within {wait_s:g} s; the wish is withdrawn"
    async with cluster.store.watch(f"{cluster.root}shards/{before.shard}/") as watch:
        try:
            async with asyncio.timeout(wait_s):
                await request_move(cluster.store, cluster.root, before.shard, to, by)
                wished = False
                async for snapshot in watch:
                    now = _shard(before.shard, cluster.root, snapshot.entries, {})
                    held, wished = (now.leader, now.epoch), wished or now.move_by == by
                    if now.leader == to:
                        did, reason = "moved", ""
                        break
                    if wished and now.leader and now.move_by != by:  # the leader, or another operator
                        did, reason = "refused", _why(now, to)
                        break
        except TimeoutError:
            pass
        finally:
            if did != "moved":
                await _withdraw(cluster, before.shard, by)
    return Moved(before.shard, to, *held, before.leader, before.epoch, time.monotonic() - began, did, reason)


def _why(now: Shard, to: str) -> str:
    if now.move_to:
        return f"{now.move_by or 'somebody'} wishes {now.move_to} now"
    return f"{now.leader} has withdrawn the wish, since {to} is not a standby that has everything; see `tickmesh shards`, and try again"


async def _withdraw(cluster: Cluster, shard: int, by: str) -> None:
    """Take our wish back; another's stays."""
    key = move_key(cluster.root, shard)
    entry = await cluster.store.get(key)
    if entry is None or _facts(entry).get("by") != by:
        return
    try:
        await cluster.store.transaction([Delete(key, entry.version)])
    except VersionMismatch:
        return
