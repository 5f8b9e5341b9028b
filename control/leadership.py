"""Leadership: which node leads a shard, under which epoch, and who takes over.

Each shard has a lease in the store; who holds it leads, and the lease's epoch is the fencing token that every output carries. A node tends
all shards that it has a replica of (:mod:`tickmesh.control.placement`). It campaigns for one whose lease is free, and for one whose leader
is suspected (:mod:`tickmesh.control.heartbeats`): it deposes the suspect, takes the lease, and tells the node to lead. The candidate whose
journal is longest goes first, the others wait, so that what was released on a standby's word is not lost.

Suspicion may be wrong: a deposed leader that still runs cannot write, since the output stream and the store refuse its epoch.

When the store cannot be asked, leaders go on for `grace_s` (the output stream still fences them) and nobody new is elected.

Keys, below the cluster's root:

    shards/<n>/lease    who leads: :class:`Holder`, as JSON
    shards/<n>/move     an operator's, or a leaving leader's wish: :class:`Move`, as JSON
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

import structlog

from tickmesh.control.heartbeats import Heartbeats
from tickmesh.control.placement import lighter, replicas_of
from tickmesh.control.store import Backoff, Delete, Lease, LeaseHeld, Put, Snapshot, Store, StoreError, Watch, end_task

_log = structlog.get_logger("leadership")
_LOOK_AGAIN_S = 0.02
LeaderState = Literal["standby", "campaigning", "leading", "leading_without_store", "draining"]


# ---------------------------------------------------------------- what is in the store


@dataclass(frozen=True)
class Holder:
    """The value of a lease: the leader.

    Attributes:
        node, incarnation: the process.
        address: where it offers its journals, ``host:port``.
    """

    node: str
    incarnation: str
    address: str = ""

    def encode(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True)
class Move:
    """A wish that another node leads a shard.

    Attributes:
        to: the node; as long as the wish stands it is also the first that takes the shard when its lease is free.
        by: who wishes it.
    """

    to: str
    by: str = ""

    def encode(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode()


def lease_key(root: str, shard: int) -> str:
    """Key of a shard's lease; `root` ends with ``/``."""
    return f"{root}shards/{shard}/lease"


def move_key(root: str, shard: int) -> str:
    """Key of the wish to move a shard's leadership."""
    return f"{root}shards/{shard}/move"


def _read(kind: type[Any], value: bytes) -> Any:
    """A Holder or Move from JSON; None if it is none (a person may have written it)."""
    try:
        found = json.loads(value)
        return kind(**{name: str(found[name]) for name in kind.__dataclass_fields__ if name in found})
    except (ValueError, TypeError, KeyError):
        return None


# ---------------------------------------------------------------- what the node does


class TakeoverRefused(Exception):
    """A node cannot lead a shard now.

    Attributes:
        shard: the shard.
        reason: why, e.g. its journal ends before what the output stream holds.
    """

    def __init__(self, shard: int, reason: str) -> None:
        super().__init__(f"shard {shard} cannot be led here: {reason}")
        self.shard, self.reason = shard, reason


class Replicas(Protocol):
    """The node's side: what leadership tells it. All calls of one shard come one after the other."""

    async def host(self, shards: frozenset[int]) -> None:
        """These are the shards that the node has replicas of from now on. What it has of others on its disk stays."""

    def kept(self) -> frozenset[int]:
        """The shards of which the node has something on its disk."""

    async def follow(self, shard: int, leader: Holder | None, epoch: int) -> None:
        """Be a standby of this leader (None: there is none yet). Called again when the leader changes."""

    async def lead(self, shard: int, epoch: int) -> None:
        """Take over: fence the output stream, go on with the feed. Called again with a higher epoch while leading: fence anew.

        Raises:
            TakeoverRefused: it cannot.
        """

    async def stop_leading(self, shard: int, reason: str) -> None:
        """Stop at once; somebody else may lead already."""

    async def hand_over(self, shard: int, to: str) -> bool:
        """See to it that the standby `to` can go on from whatever is put out from now on. It is led on until `to` takes over.

        Returns:
            False: `to` does not follow closely enough, and everything is as it was.
        """


@dataclass(frozen=True)
class LeadershipOptions:
    """How to lead.

    Attributes:
        root: prefix of the cluster's keys, ending with ``/``.
        shards: how many there are.
        replicas: wanted per shard.
        lease_ttl_s: of a lease; Consul takes 10 s and more. Not what failover waits for, but what ends a leader that nobody watches.
        stagger_ms: how long each further candidate waits for those before it.
        settle_ms: how long the first campaign after the start waits for others to be heard.
        grace_s: how long leaders go on without the store.
        pick_timeout_s: how long the named successor of a move has, before others may take the shard; also how long a node that stops
            waits for a standby to be ready.
        orphaned_s: how long nobody leads a shard before nodes that only have an old journal of it try.
        balance_after_s: how long a node leads more shards than its share before it passes one to a standby that leads less; 0: for ever.
    """

    root: str
    shards: int
    replicas: int = 2
    lease_ttl_s: float = 10.0
    stagger_ms: float = 60.0
    settle_ms: float = 500.0
    grace_s: float = 60.0
    pick_timeout_s: float = 2.0
    orphaned_s: float = 10.0
    balance_after_s: float = 0.0


@dataclass
class ShardLeadership:
    """How a shard stands on this node.

    Attributes:
        state: see :data:`LeaderState`.
        epoch: of the leadership that it leads or follows; 0: none yet.
        leader: as the store says.
        reason: what happened last, for people.
        takeovers: times that this node took the shard over.
    """

    state: LeaderState = "standby"
    epoch: int = 0
    leader: Holder | None = None
    reason: str = ""
    takeovers: int = 0


@dataclass
class _Tended:
    """A shard that we tend."""

    number: int
    status: ShardLeadership = field(default_factory=ShardLeadership)
    lease: Lease | None = None
    storeless_s: float | None = None
    ended_epoch: int = 0
    fenced: bool = False
    free_since_s: float | None = None
    suspect_since_s: float | None = None
    misplaced_since_s: float | None = None
    uneven_since_s: float | None = None
    asked_for: bool = False
    followed: tuple[Holder | None, int] | None = None
    refused_until_s: float = 0.0
    refusals: Backoff = field(default_factory=lambda: Backoff(first_s=0.25, last_s=5.0))
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    backoff: Backoff = field(default_factory=lambda: Backoff(first_s=0.02, last_s=1.0))
    task: asyncio.Task[None] | None = None

    @property
    def leading(self) -> bool:
        return self.status.state in ("leading", "leading_without_store", "draining")


class Leadership:
    """Tends this node's shards. :meth:`start`, then :meth:`changed` whenever heartbeats or members change, then :meth:`close`.

    Args:
        store: the cluster's; this object's own watches are made on it.
        heartbeats: started, of the same node.
        replicas: the node.
        members: gives the names of the nodes that may hold replicas, with their weights.
        address: where this node offers its journals.
    """

    def __init__(
        self,
        store: Store,
        heartbeats: Heartbeats,
        replicas: Replicas,
        members: Callable[[], Awaitable[Mapping[str, float]]],
        options: LeadershipOptions,
        address: str = "",
    ) -> None:
        self.options, self._store, self._beats, self._replicas, self._members = options, store, heartbeats, replicas, members
        self._holder = Holder(heartbeats.node, heartbeats.incarnation, address)
        self._tended: dict[int, _Tended] = {}
        self._placed: dict[int, tuple[str, ...]] = {}
        self._weights: Mapping[str, float] = {}
        self._balancing = False
        self._led_s: dict[int, float] = {}
        self._watch: Watch | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._started_s = 0.0
        self._closing = False

    async def start(self) -> None:
        """Begin: everything else happens by itself."""
        self._started_s = time.monotonic()
        self._watch = self._store.watch(f"{self.options.root}shards/")
        self._tasks = [
            asyncio.create_task(self._follow_store(), name="leadership store"),
            asyncio.create_task(self._follow_members(), name="leadership members"),
        ]

    async def close(self, *, hand_over: bool = True) -> None:
        """Stop. Shards that are led are handed over to a standby first, if one is ready, or will be soon; leases are released."""
        self._closing = True
        if hand_over:
            await self._wait_for_successors()
        for task in self._tasks:
            await end_task(task)
        for one in self._tended.values():
            if one.task is not None:
                await end_task(one.task)
        leaving = [self._leave(one, hand_over) for one in self._tended.values() if one.leading]
        await asyncio.gather(*leaving, return_exceptions=True)
        if self._watch is not None:
            await self._watch.close()

    def changed(self) -> None:
        """Heartbeats or members have changed: look at every shard now."""
        for one in self._tended.values():
            one.wake.set()

    def set_replicas(self, count: int) -> None:
        """Another number of replicas is wanted per shard."""
        self.options = replace(self.options, replicas=count)

    def status(self, shard: int) -> ShardLeadership | None:
        """How a shard stands here; None if this node has no replica of it."""
        one = self._tended.get(shard)
        return one.status if one else None

    @property
    def hosted(self) -> frozenset[int]:
        """The shards that this node has replicas of."""
        return frozenset(self._tended)

    def fenced(self, shard: int) -> None:
        """The output stream has refused this node's epoch: somebody else leads, whatever the store says so far."""
        one = self._tended.get(shard)
        if one is not None and one.leading:
            one.status.reason = "the output stream has been fenced by another leader"
            one.fenced = True
            one.wake.set()

    # -- what is read

    async def _follow_store(self) -> None:
        assert self._watch is not None
        async for _ in self._watch:
            self.changed()

    @property
    def _snapshot(self) -> Snapshot | None:
        return self._watch.snapshot if self._watch else None

    async def _follow_members(self) -> None:
        """Place the shards again whenever the members change."""
        pause = Backoff(first_s=0.1, last_s=1.0)
        while True:
            try:
                await self._place(await self._members())
            except Exception as error:  # of the store or of the node: it stays as it was until the next look
                _log.warning("shards cannot be placed now", reason=str(error) or type(error).__name__)
            await pause.wait()

    async def _place(self, members: Mapping[str, float]) -> None:
        if not members:
            return
        self._weights = members
        wished = {shard: move.to for shard in range(self.options.shards) if (move := self._move(shard)) is not None}
        placed = {s: replicas_of(s, members, self.options.replicas, wished.get(s)) for s in range(self.options.shards)}
        mine = {shard for shard, nodes in placed.items() if self._beats.node in nodes}
        mine |= self._orphans(mine)
        if placed == self._placed and set(self._tended) == mine:
            return
        for shard in set(self._tended) - mine:  # before their replicas go: none may begin to lead while that happens
            await self._tend_no_more(self._tended[shard])
        await self._replicas.host(frozenset(mine | set(self._tended)))
        self._placed = placed
        for shard in mine - set(self._tended):
            self._begin_to_tend(_Tended(shard))
        self.changed()

    def _orphans(self, mine: set[int]) -> set[int]:
        """Shards of other nodes that nobody leads, and that we have a journal of: maybe the only one that makes what was published.

        One that we tend is kept until another leads it. One that lies on the disk is taken up when nobody has led it for a while.
        """
        if self._snapshot is None or self._snapshot.stale:
            return set(self._tended) - mine
        now = time.monotonic()
        for shard in range(self.options.shards):
            if self._is_led(shard) or (shard in self._tended and self._tended[shard].leading):
                self._led_s[shard] = now
        unled = {shard for shard in range(self.options.shards) if self._led_s.get(shard) != now}
        forgotten = {shard for shard in unled if now - self._led_s.get(shard, self._started_s) > self.options.orphaned_s}
        kept = forgotten & self._replicas.kept() if forgotten else set()
        return (unled & set(self._tended) | kept) - mine

    def _is_led(self, shard: int) -> bool:
        """Whether the holder of a shard's lease says itself that it leads, and is not us."""
        leader, epoch = self._entry(shard)
        beat = self._beats.beat(leader.node) if leader is not None and leader.node != self._holder.node else None
        said = beat.shards.get(shard) if beat is not None and leader is not None and beat.incarnation == leader.incarnation else None
        return said is not None and said.role == "leader" and said.epoch >= epoch

    def _begin_to_tend(self, one: _Tended) -> None:
        self._tended[one.number] = one
        one.task = asyncio.create_task(self._tend(one), name=f"leadership of shard {one.number}")

    async def _tend_no_more(self, one: _Tended) -> None:
        """Unless it is led here, or about to be: a leader leaves by handing over, not by arithmetic."""
        if one.leading or one.status.state == "campaigning":
            return
        del self._tended[one.number]
        if one.task is not None:
            await end_task(one.task)
        if one.leading:  # it came to that in the moment in which it ended
            self._begin_to_tend(one)

    def _entry(self, shard: int) -> tuple[Holder | None, int]:
        """Leader and epoch as the store says; (None, 0) if the lease is free."""
        found = self._snapshot.entries.get(lease_key(self.options.root, shard)) if self._snapshot else None
        if found is None:
            return None, 0
        return _read(Holder, found.value) or Holder("?", ""), found.epoch or found.version

    def _move(self, shard: int) -> Move | None:
        found = self._snapshot.entries.get(move_key(self.options.root, shard)) if self._snapshot else None
        return _read(Move, found.value) if found is not None else None

    # -- one shard

    async def _tend(self, one: _Tended) -> None:
        while True:
            one.wake.clear()
            wait_s: float | None = 1.0
            try:
                wait_s = await (self._lead_on(one) if one.leading else self._stand_by(one))
                if wait_s is None:
                    one.backoff.reset()
            except Exception as error:  # of the store or of the node: whatever it is, a shard stays tended
                one.status.reason = str(error) or type(error).__name__
                await one.backoff.wait()
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5 if wait_s is None else wait_s):
                    await one.wake.wait()

    async def _stand_by(self, one: _Tended) -> float | None:
        """Follow the leader, or campaign if it is our turn; returns how long to wait for our turn."""
        snapshot = self._snapshot
        if snapshot is None or snapshot.stale:
            return None  # nobody is elected without the store
        leader, epoch = self._entry(one.number)
        if epoch and epoch <= one.ended_epoch:
            return None  # our own lease, given up; the store's news of that are under way
        one.status.leader, one.status.epoch = leader, epoch
        if leader is not None and leader.node == self._holder.node:
            beat, left_s = self._beats.beat(self._holder.node), one.refused_until_s - time.monotonic()
            mine = beat.shards.get(one.number) if beat else None
            if mine is None or not mine.ready or left_s > 0:
                return max(0.02, left_s)
            return await self._campaign(one, "it was led by this node before", epoch)
        if leader is not None and self._called(one.number, leader, epoch):
            return await self._campaign(one, f"{leader.node} has handed it over", 0)
        if leader is not None:
            one.free_since_s = None
            if one.followed != (leader, epoch):
                await self._replicas.follow(one.number, leader, epoch)
                one.followed = (leader, epoch)
            reason = self._dead(leader)
            if not reason:
                one.suspect_since_s = None
                return _LOOK_AGAIN_S if self._beats.cut_off else None
            one.suspect_since_s = one.suspect_since_s or time.monotonic()
            return await self._in_turn(one, one.suspect_since_s, f"{leader.node}: {reason}", epoch)
        one.suspect_since_s = None
        one.free_since_s = one.free_since_s or time.monotonic()
        return await self._in_turn(one, one.free_since_s, "nobody led it", 0)

    def _called(self, shard: int, leader: Holder, epoch: int) -> bool:
        """Whether the leader, that has been asked to hand over to us, says itself that it leads no more."""
        move, beat = self._move(shard), self._beats.beat(leader.node)
        said = beat.shards.get(shard) if beat is not None and beat.incarnation == leader.incarnation else None
        over = said is not None and said.role == "standby" and said.epoch == epoch
        return over and move is not None and move.to == self._holder.node and self._ready(shard, move.to)

    def _dead(self, leader: Holder) -> str:
        """Why the leader is thought dead; empty if it is not."""
        if self._beats.cut_off:
            return ""
        beat = self._beats.beat(leader.node)
        if beat is not None and beat.incarnation != leader.incarnation:
            return "its process has been restarted"
        if beat is None and time.monotonic() - self._started_s < self.options.settle_ms / 1000:
            return ""
        return self._beats.suspected(leader.node)

    async def _in_turn(self, one: _Tended, since_s: float, reason: str, epoch: int) -> float | None:
        """Campaign if the candidates before us have had their time."""
        move = self._move(one.number)
        called = epoch == 0 and move is not None and move.to == self._holder.node  # whether we hear anybody does not matter then
        if self._beats.cut_off and not called:
            return _LOOK_AGAIN_S
        beat = self._beats.beat(self._holder.node)
        mine = beat.shards.get(one.number) if beat else None
        if mine is None or not mine.ready:
            return _LOOK_AGAIN_S
        now = time.monotonic()
        if now < one.refused_until_s:
            return one.refused_until_s - now
        delay_s = self._rank(one.number) * self.options.stagger_ms / 1000
        if move is not None and epoch == 0:
            delay_s = 0.0 if move.to == self._holder.node else delay_s + self.options.pick_timeout_s
        elif epoch == 0:
            settled_s = self._started_s + self.options.settle_ms / 1000
            delay_s = max(delay_s, settled_s - since_s if len(self._placed[one.number]) > 1 else 0.0)
        if now < since_s + delay_s:
            return since_s + delay_s - now
        return await self._campaign(one, reason, epoch)

    def _ready(self, shard: int, node: str) -> bool:
        """Whether a node says that it could lead the shard."""
        beat = self._beats.beat(node)
        known = beat.shards.get(shard) if beat and not self._beats.suspected(node) else None
        return known is not None and known.ready

    def _follows(self, shard: int, node: str) -> bool:
        """Whether a node could lead, and has the leader's journal as it grows."""
        beat = self._beats.beat(node)
        return self._ready(shard, node) and beat is not None and beat.shards[shard].follows

    def _position(self, shard: int, node: str) -> int:
        beat = self._beats.beat(node)
        return beat.shards[shard].position if beat and shard in beat.shards else 0

    def _rank(self, shard: int) -> int:
        """How many living candidates go before us: those with longer journals, then by placement."""
        places = self._placed.get(shard, ())
        ranked = []
        for place, node in enumerate(places):
            if self._ready(shard, node):
                ranked.append((-self._position(shard, node), place, node))
        order = [node for _, _, node in sorted(ranked)]
        return order.index(self._holder.node) if self._holder.node in order else len(places)

    async def _campaign(self, one: _Tended, reason: str, epoch: int) -> float | None:
        """Take the lease, deposing who has it, and lead."""
        key = lease_key(self.options.root, one.number)
        one.status.state = "campaigning"
        lease: Lease | None = None
        try:
            if epoch:
                await self._store.depose(key, epoch)
            lease = await self._store.acquire(key, self._holder.encode(), self.options.lease_ttl_s)
            await self._begin(one, lease, reason)
        except LeaseHeld as held:
            one.status.state, one.status.reason = "standby", str(held)
            return 0.05 if epoch else 0.01  # free, as it seemed: it is about to be
        except TakeoverRefused as refused:
            if one.status.reason != refused.reason:
                _log.warning("a shard is not taken over", shard=one.number, reason=refused.reason)
            one.status.state, one.status.reason = "standby", refused.reason
            one.refused_until_s = time.monotonic() + one.refusals.next_s()  # others first
            if lease is not None:
                one.ended_epoch = lease.epoch
                await lease.release()
            return 0.2
        except BaseException:
            if not one.leading:
                one.status.state = "standby"
            if lease is not None and one.lease is not lease:
                one.ended_epoch = lease.epoch
                with contextlib.suppress(StoreError):
                    await lease.release()
            raise
        return None

    async def _begin(self, one: _Tended, lease: Lease, reason: str) -> None:
        led_before = one.leading
        await self._replicas.lead(one.number, lease.epoch)
        one.lease, one.followed, one.free_since_s, one.suspect_since_s, one.storeless_s, one.fenced = lease, None, None, None, None, False
        one.refusals.reset()
        one.status = ShardLeadership("leading", lease.epoch, self._holder, reason, one.status.takeovers + 1)
        move = self._move(one.number)
        one.uneven_since_s, one.asked_for = None, one.asked_for and led_before
        if move is not None and move.to == self._holder.node:
            one.asked_for = move.by not in self._weights  # by an operator, not by a node
            with contextlib.suppress(StoreError):
                await self._store.delete(move_key(self.options.root, one.number))

    async def _lead_on(self, one: _Tended) -> float | None:
        """Look whether we still lead; hand over if somebody wishes that."""
        if one.lease is None:
            return await self._step_down(one, "its hand-over was cut short")
        leader, epoch = self._entry(one.number)
        snapshot = self._snapshot
        fresh = snapshot is not None and not snapshot.stale
        if fresh and leader is not None and epoch > one.lease.epoch:
            return await self._step_down(one, f"{leader.node} leads under epoch {epoch}")
        if one.fenced:
            return await self._step_down(one, one.status.reason)
        if not one.lease.held:
            return await self._without_lease(one)
        one.storeless_s = None
        one.status.state = "leading"
        move = self._move(one.number)
        if fresh and move is not None and move.to != self._holder.node:
            if not self._follows(one.number, move.to):
                one.status.reason = f"is to be handed over to {move.to}, which is not ready"
                return 0.05
            await self._hand_over(one, move.to)
            return 0.0
        if fresh and move is None:
            return await self._go_where_it_is_placed(one)
        return None

    async def _go_where_it_is_placed(self, one: _Tended) -> float | None:
        """A shard that is placed on other nodes, since those have come, goes to one of them when it is ready."""
        places, now = self._placed.get(one.number, ()), time.monotonic()
        to = self._successor(one.number) if places and self._holder.node not in places else None
        if to is None:
            one.misplaced_since_s = None
            return await self._balance(one)
        one.misplaced_since_s = one.misplaced_since_s or now
        if now - one.misplaced_since_s < self.options.settle_ms / 1000:  # more nodes may be coming, and move it again
            return 0.05
        await self._pass_to(one, to)
        return 0.0

    async def _balance(self, one: _Tended) -> float | None:
        """After failovers one node may lead what others could: it passes one shard after the other to a standby that leads less.

        A shard that an operator has moved here stays.
        """
        to = self._lighter_standby(one) if self.options.balance_after_s > 0 and not self._balancing else None
        if to is None:
            one.uneven_since_s = None
            return None
        now = time.monotonic()
        one.uneven_since_s = one.uneven_since_s or now
        left_s = one.uneven_since_s + self.options.balance_after_s - now
        if left_s > 0:
            return min(left_s, 0.5)
        one.uneven_since_s, self._balancing = None, True
        try:
            _log.info("a shard is passed on: this node leads more than its share", shard=one.number, to=to)
            await self._pass_to(one, to)
        finally:
            self._balancing = False
        return 0.0

    def _lighter_standby(self, one: _Tended) -> str | None:
        """Who should lead a shard in our place; None if nobody should, or if another of our shards goes before it."""
        led = dict.fromkeys(self._weights, 0)
        for shard in range(self.options.shards):
            leader, _ = self._entry(shard)
            if leader is not None and leader.node in led:
                led[leader.node] += 1
        movable = {}
        for other in self._tended.values():
            if other.leading and not other.asked_for:
                standbys = [node for node in self._placed.get(other.number, ()) if self._follows(other.number, node)]
                movable[other.number] = lighter(self._holder.node, standbys, led, self._weights)
        able = [shard for shard, to in movable.items() if to is not None]
        first = min(able, key=lambda shard: (self._placed[shard][0] == self._holder.node, shard), default=None)
        return movable[one.number] if one.number == first else None

    async def _without_lease(self, one: _Tended) -> float | None:
        """The lease has run out. Take it again if it is free; go on for the grace if the store cannot be asked; else step down."""
        now = time.monotonic()
        if one.storeless_s is None:
            one.storeless_s = now
            one.status.state, one.status.reason = "leading_without_store", "the lease has run out; looking whether the store can be asked"
        try:
            lease = await self._store.acquire(lease_key(self.options.root, one.number), self._holder.encode(), self.options.lease_ttl_s)
        except LeaseHeld as held:
            if held.epoch != (one.lease.epoch if one.lease else 0):
                return await self._step_down(one, str(held))
            return 0.2  # our own, that the store has not ended yet
        except StoreError as error:
            one.status.reason = f"goes on without the store: {error}"
            if now - one.storeless_s > self.options.grace_s:
                return await self._step_down(one, f"the store has been away for more than {self.options.grace_s} s")
            return 0.2
        try:
            await self._begin(one, lease, "took the lease again after the store was away")
        except TakeoverRefused as refused:
            one.ended_epoch = lease.epoch
            await lease.release()
            return await self._step_down(one, refused.reason)
        return None

    async def _step_down(self, one: _Tended, reason: str) -> float | None:
        await self._replicas.stop_leading(one.number, reason)
        await self._give_up_lease(one)
        one.status.state, one.status.reason = "standby", reason
        return 0.0

    async def _give_up_lease(self, one: _Tended) -> None:
        if one.lease is not None:
            one.ended_epoch = max(one.ended_epoch, one.lease.epoch)
            with contextlib.suppress(StoreError):
                await one.lease.release()
        one.lease, one.followed, one.storeless_s, one.fenced = None, None, None, False

    # -- handing over

    def _successor(self, shard: int) -> str | None:
        """The readiest standby."""
        standbys = [node for node in self._placed.get(shard, ()) if node != self._holder.node and self._follows(shard, node)]
        return max(standbys, key=lambda node: self._position(shard, node), default=None)

    async def _wait_for_successors(self) -> None:
        """Lead on for a moment if a node that has just come is about to be ready: better than a shard that nobody leads."""
        end_s = time.monotonic() + self.options.pick_timeout_s
        led = [one.number for one in self._tended.values() if one.leading]
        while time.monotonic() < end_s and any(self._successor(shard) is None for shard in led):
            if self.options.replicas < 2 or not set(self._beats.alive()) - {self._holder.node}:
                return
            await asyncio.sleep(0.02)

    async def _hand_over(self, one: _Tended, to: str) -> bool:
        """Planned. The lease is given up while we lead on: the successor, whom the wish names, takes it, and then the output stream."""
        assert one.lease is not None
        one.status.state, epoch = "draining", one.lease.epoch
        if not await self._replicas.hand_over(one.number, to):
            one.status.state, one.status.reason = "leading", f"{to} could not take over: it is not a standby that follows closely"
            with contextlib.suppress(StoreError):
                await self._store.delete(move_key(self.options.root, one.number))
            return False
        await self._give_up_lease(one)
        self._beats.say_now()  # the successor need not wait for the store's news
        if not await self._taken(one, to, epoch) and not self._closing:
            return await self._take_back(one, to)
        await self._replicas.stop_leading(one.number, f"handed over to {to}")
        one.free_since_s, one.fenced = time.monotonic(), False
        one.status.state, one.status.reason = "standby", f"handed over to {to}"
        return True

    async def _taken(self, one: _Tended, to: str, epoch: int) -> bool:
        """Wait until the successor has the output stream; false if it does not take it in time."""
        end_s = time.monotonic() + self.options.pick_timeout_s
        while not one.fenced and time.monotonic() < end_s:
            beat = self._beats.beat(to)
            said = beat.shards.get(one.number) if beat is not None else None
            if said is not None and said.role == "leader" and said.epoch > epoch:
                return True
            one.wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN_S):
                    await one.wake.wait()
        return one.fenced or self._entry(one.number)[1] > epoch

    async def _take_back(self, one: _Tended, to: str) -> bool:
        """The successor has not come: lead on under another epoch, unless somebody else is about to."""
        with contextlib.suppress(StoreError):
            await self._store.delete(move_key(self.options.root, one.number))
        lease: Lease | None = None
        try:
            lease = await self._store.acquire(lease_key(self.options.root, one.number), self._holder.encode(), self.options.lease_ttl_s)
            await self._begin(one, lease, f"{to} did not take over")
        except (LeaseHeld, StoreError, TakeoverRefused) as error:
            one.lease = lease  # to be given up
            await self._step_down(one, str(error))
        return False

    async def _pass_to(self, one: _Tended, to: str) -> bool:
        """Hand over by our own wish, which is written down first: nobody else is to take the shard."""
        if one.lease is None or not one.lease.held:
            return False
        wish = Put(move_key(self.options.root, one.number), Move(to, self._holder.node).encode())
        await self._store.transaction([wish], lease=one.lease)
        return await self._hand_over(one, to)

    async def _leave(self, one: _Tended, hand_over: bool) -> None:
        """Before the node stops."""
        to = self._successor(one.number) if hand_over else None
        try:
            if to is not None and await self._pass_to(one, to):
                return
        except Exception as error:  # of the store or of the node: then without a successor
            _log.warning("a shard could not be handed over", shard=one.number, to=to, reason=str(error) or type(error).__name__)
        try:
            await self._replicas.stop_leading(one.number, "the node stops")
        finally:
            await self._give_up_lease(one)


async def request_move(store: Store, root: str, shard: int, to: str, by: str) -> None:
    """Ask that a shard's leadership moves to a node. Raises as :meth:`Store.put`."""
    await store.put(move_key(root, shard), Move(to, by).encode())


async def withdraw_move(store: Store, root: str, shard: int) -> None:
    """Take the wish back."""
    await store.transaction([Delete(move_key(root, shard))])
