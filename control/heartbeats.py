"""Heartbeats: every node says many times a second, over core NATS, that it is alive and how far its shards are. The silent are suspected.

Two detectors work together. A process that dies is told by the nats-server itself (``$SYS.ACCOUNT.*.DISCONNECT``, if a client of the system
account is given), within milliseconds. A node that hangs, or that a partition cuts off, is told by its silence. Suspicion is only a
reason to look: leadership moves by the store's lease, and a suspect that was alive all the time is fenced off by its epoch.

A node that does not hear itself either suspects nobody: it is the one that is cut off, or it has just stood still.

On a host that has too much to do, heartbeats come late. Taking each late one for a death would move leadership, which costs more than was
wanting: a storm. So silences that ended well make the next one be waited for longer (:class:`Patience`; after Chen, Toueg and Aguilera,
"On the quality of service of failure detectors", 2002, with the worst of a window instead of an estimate of the mean).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgpack  # type: ignore[import-untyped]
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from tickmesh.control.store import end_task

Role = Literal["leader", "standby"]
_NODES_MAX = 1024
_BEAT_BYTES_MAX = 64 << 10
_REMEMBERED_S = 30.0


@dataclass(frozen=True)
class ShardBeat:
    """What a node says of a shard that it has a replica of.

    Attributes:
        role: what it is for the shard.
        epoch: of the leadership that it leads or follows.
        position: events of the shard's journal that it has.
        ready: whether it could lead now.
        follows: a standby: whether the leader's journal comes to it. One that does not may lack what has been released meanwhile.
    """

    role: Role
    epoch: int
    position: int
    ready: bool = True
    follows: bool = True


@dataclass(frozen=True)
class Beat:
    """A heartbeat.

    Attributes:
        node: its name.
        incarnation: another one each time its process starts.
        address: where its journals are offered to standbys, ``host:port``; empty if they are not.
        shards: by number.
    """

    node: str
    incarnation: str
    address: str = ""
    shards: Mapping[int, ShardBeat] = field(default_factory=dict)


def beat_subject(cluster: str, node: str) -> str:
    """Subject of a node's heartbeats; ``*`` for all nodes."""
    return f"tm.{cluster}.beat.{node}"


def client_name(cluster: str, node: str, incarnation: str) -> str:
    """What a node calls the connection that its heartbeats go over: its end is the node's."""
    return f"tickmesh {cluster}/{node}/{incarnation}"


def encode_beat(beat: Beat) -> bytes:
    """A heartbeat as MessagePack."""
    shards = {number: (one.role, one.epoch, one.position, one.ready, one.follows) for number, one in beat.shards.items()}
    packed: bytes = msgpack.packb({"node": beat.node, "incarnation": beat.incarnation, "address": beat.address, "shards": shards})
    return packed


def decode_beat(data: bytes) -> Beat | None:
    """A heartbeat from MessagePack; None if it is none."""
    if len(data) > _BEAT_BYTES_MAX:
        return None
    try:
        found = msgpack.unpackb(data, strict_map_key=False)
        shards = {int(number): _shard_beat(*row) for number, row in found["shards"].items()}
        return Beat(str(found["node"]), str(found["incarnation"]), str(found["address"]), shards)
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException):
        return None


def _shard_beat(role: Role, epoch: int, position: int, ready: bool, follows: bool) -> ShardBeat:
    return ShardBeat(role, int(epoch), int(position), bool(ready), bool(follows))


@dataclass
class _Heard:
    """What was heard of a node last."""

    beat: Beat
    at_s: float
    suspected: str = ""
    told_dead_s: float = -1e9


class Patience:
    """How long one node may be silent: half as long again as its longest silence of the last while that was no death, between two bounds.

    Silences longer than the upper bound teach nothing: such a node was stopped, or cut off.

    Args:
        least_s, most_s: the bounds.
    """

    def __init__(self, least_s: float, most_s: float) -> None:
        self._least_s, self._most_s = least_s, max(least_s, most_s)
        self._longest_s, self._longest_before_s, self._since_s = 0.0, 0.0, float("-inf")

    def heard_after(self, silence_s: float, now_s: float) -> None:
        """It was silent for so long, and is there."""
        self._go_on(now_s)
        if self._longest_s < silence_s <= self._most_s:
            self._longest_s = silence_s

    def limit_s(self, now_s: float) -> float:
        """Silence after which to suspect it."""
        self._go_on(now_s)
        return min(self._most_s, max(self._least_s, 1.5 * max(self._longest_s, self._longest_before_s)))

    def _go_on(self, now_s: float) -> None:
        """What is remembered is of this and the last window."""
        if (passed_s := now_s - self._since_s) >= _REMEMBERED_S:
            self._longest_before_s = self._longest_s if passed_s < 2 * _REMEMBERED_S else 0.0
            self._longest_s, self._since_s = 0.0, now_s


@dataclass
class HeartbeatCounters:
    """What the detectors have seen."""

    sent: int = 0
    heard: int = 0
    malformed: int = 0
    suspicions: int = 0
    """Times that a node fell silent or its process was reported dead."""
    false_alarms: int = 0
    """Of these, how often it was silent and then there again, in less than `suspect_ms_max`."""
    own_pauses: int = 0
    """Times that this process stood still for so long that it could suspect nobody."""


class Heartbeats:
    """Sends this node's heartbeats and listens to everybody's.

    Args:
        client: connected to the cluster's NATS, with `pending_size=0`: a late heartbeat is worse than none.
        cluster, node, incarnation: who we are.
        state: gives the heartbeat to send; called every `every_ms`.
        every_ms: time between two.
        suspect_ms: silence after which a node is suspected; at least three times `every_ms`.
        suspect_ms_max: the same while heartbeats come late again and again (:class:`Patience`).
        system: a client of the servers' system account, for deaths to be told at once.
        changed: told whenever a node is new, is suspected, is back, or says something else of its shards' roles.

    Raises:
        ValueError: `suspect_ms` is too short.
    """

    def __init__(
        self,
        client: Client,
        cluster: str,
        node: str,
        incarnation: str,
        state: Callable[[], Beat],
        *,
        every_ms: float = 20.0,
        suspect_ms: float = 100.0,
        suspect_ms_max: float = 500.0,
        system: Client | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        if suspect_ms < 3 * every_ms:
            raise ValueError(f"suspect_ms is {suspect_ms}, with a heartbeat every {every_ms} ms it must be at least {3 * every_ms}")
        self.cluster, self.node, self.incarnation = cluster, node, incarnation
        self.counters = HeartbeatCounters()
        self._client, self._system, self._state, self._changed = client, system, state, changed
        self._every_s, self._suspect_s, self._suspect_s_max = every_ms / 1000, suspect_ms / 1000, suspect_ms_max / 1000
        self._heard: dict[str, _Heard] = {}
        self._patience: dict[str, Patience] = {}
        self._own_s = self._ticked_s = self._excused_s = 0.0
        self._subscriptions: list[Any] = []
        self._task: asyncio.Task[None] | None = None
        self._soon = asyncio.Event()

    async def start(self) -> None:
        """Begin to send and to listen."""
        self._ticked_s = time.monotonic()
        self._excused_s = self._ticked_s + self._suspect_s
        self._subscriptions.append(await self._client.subscribe(beat_subject(self.cluster, "*"), cb=self._on_beat))
        if self._system is not None:
            self._subscriptions.append(await self._system.subscribe("$SYS.ACCOUNT.*.DISCONNECT", cb=self._on_death))
            await self._system.flush()
        await self._client.flush()
        self._task = asyncio.create_task(self._run(), name="heartbeats")

    async def close(self) -> None:
        """End both; the clients stay open."""
        if self._task is not None:
            await end_task(self._task)
        for subscription in self._subscriptions:
            with contextlib.suppress(nats.errors.Error, OSError):
                await subscription.unsubscribe()
        self._subscriptions.clear()

    # -- what is known

    def beat(self, node: str) -> Beat | None:
        """A node's last heartbeat; None if it was never heard of."""
        heard = self._heard.get(node)
        return heard.beat if heard else None

    def suspected(self, node: str) -> str:
        """Why a node is thought dead; empty if it is not. One that was never heard of is not alive: the reason says so."""
        heard = self._heard.get(node)
        return heard.suspected if heard else "it was never heard of"

    @property
    def cut_off(self) -> bool:
        """Whether we do not hear ourselves: what others say, or do not say, means nothing now."""
        now = time.monotonic()
        return now - self._own_s > self._suspect_s / 2 or now < self._excused_s  # half: before others' silence counts

    def alive(self) -> list[str]:
        """The nodes that are heard and not suspected, ourselves included."""
        return sorted(node for node, heard in self._heard.items() if not heard.suspected)

    def say_now(self) -> None:
        """Do not wait for the next heartbeat: something has changed."""
        self._soon.set()

    def report_dead(self, node: str, incarnation: str, reason: str) -> None:
        """Somebody else knows that this process is gone, e.g. its replication port refuses connections."""
        heard = self._heard.get(node)
        if heard is not None and heard.beat.incarnation == incarnation:
            self._suspect(heard, reason)

    # -- how

    async def _run(self) -> None:
        due_s = time.monotonic()
        while True:
            await self._send()
            self._look()
            due_s = max(due_s + self._every_s, time.monotonic())
            while not self._soon.is_set() and (left_s := due_s - time.monotonic()) > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left_s):
                        await self._soon.wait()
            self._soon.clear()

    async def _send(self) -> None:
        if not self._client.is_connected:
            return
        with contextlib.suppress(nats.errors.Error, OSError):
            await self._client.publish(beat_subject(self.cluster, self.node), encode_beat(self._state()))
            self.counters.sent += 1

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._ticked_s > self._suspect_s / 2:  # we stood still; others' heartbeats may lie unread
            self.counters.own_pauses += 1
            self._excused_s = now + self._suspect_s
        self._ticked_s = now
        if self.cut_off:
            return
        for node, heard in self._heard.items():
            silence_s = now - heard.at_s
            if silence_s > self._suspect_s and node != self.node and silence_s > (limit_s := self._patience[node].limit_s(now)):
                self._suspect(heard, f"it has been silent for {limit_s * 1000:.0f} ms")

    def _suspect(self, heard: _Heard, reason: str) -> None:
        if not heard.suspected:
            heard.suspected = reason
            self.counters.suspicions += 1
            self._changed()

    async def _on_beat(self, message: Msg) -> None:
        beat = decode_beat(message.data)
        if beat is None or message.subject != beat_subject(self.cluster, beat.node):
            self.counters.malformed += 1
            return
        now = time.monotonic()
        self.counters.heard += 1
        if beat.node == self.node:
            if beat.incarnation != self.incarnation:
                self.counters.malformed += 1  # another process has our name; its lease will tell
                return
            if now - self._own_s > self._suspect_s / 2:
                self._excused_s = now + self._suspect_s  # the others may need a moment longer to come back
            self._own_s = now
        before = self._heard.get(beat.node)
        if before and before.beat.incarnation == beat.incarnation and now - before.told_dead_s < self._suspect_s:
            return  # was under way when its process died
        if before is None and len(self._heard) >= _NODES_MAX:
            return
        self._heard[beat.node] = _Heard(beat, now)
        self._learn(before, beat, now)
        if before is None or before.suspected or _roles(before.beat) != _roles(beat):
            self._changed()

    def _learn(self, before: _Heard | None, beat: Beat, now: float) -> None:
        """What the silence before this heartbeat says of the next one."""
        patience = self._patience.setdefault(beat.node, Patience(self._suspect_s, self._suspect_s_max))
        if before is None or before.beat.incarnation != beat.incarnation or before.told_dead_s > before.at_s or self.cut_off:
            return  # it was away, or we were
        silence_s = now - before.at_s
        patience.heard_after(silence_s, now)
        self.counters.false_alarms += bool(before.suspected) and silence_s <= self._suspect_s_max

    async def _on_death(self, message: Msg) -> None:
        try:
            name = str(json.loads(message.data)["client"].get("name", ""))
        except (ValueError, KeyError, AttributeError):
            return
        for heard in self._heard.values():
            if name == client_name(self.cluster, heard.beat.node, heard.beat.incarnation):
                heard.told_dead_s = time.monotonic()
                self._suspect(heard, "its connection to NATS has ended")


def _roles(beat: Beat) -> dict[int, tuple[str, int, bool, bool]]:
    return {number: (one.role, one.epoch, one.ready, one.follows) for number, one in beat.shards.items()}
