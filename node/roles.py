"""The roles of a node that shares the shards with others: for each shard that it has a replica of, standby or leader.

One thread with an asyncio loop looks after leadership: heartbeats over NATS, the leases in the store, who is suspected, whose turn it is
(:mod:`tickmesh.control.leadership`). What it decides is carried out by a :class:`tickmesh.node.replica.Replica` per shard, in threads
beside the loop, so that heartbeats go on. Another thread lets go of what waits in the standbys' input rings.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import nats.errors
import structlog
import uvloop
from nats.aio.msg import Msg

from tickmesh.control.config_store import Keys
from tickmesh.control.heartbeats import Beat, Heartbeats, client_name
from tickmesh.control.leadership import Holder, Leadership, LeadershipOptions
from tickmesh.control.store import Store
from tickmesh.node.beginning import journal_folders
from tickmesh.node.gateways import login_of, nats_deliveries
from tickmesh.node.known_instruments import Rows, rows_in, rows_of
from tickmesh.node.replica import Replica, warm_takeover
from tickmesh.node.replication import ReplicationServer, link_options
from tickmesh.node.store_link import open_store
from tickmesh.transports.connection import backoff_s
from tickmesh.transports.nats import LinkError, Login, NatsLink, connect
from tickmesh.transports.toolbox import IDLE_MODES

if TYPE_CHECKING:
    from tickmesh.node.process import Node

SYSTEM_USER, SYSTEM_PASSWORD = "TICKMESH_NATS_SYSTEM_USER", "TICKMESH_NATS_SYSTEM_PASSWORD"
"""Environment variables of a login to the servers' system account: deaths of nodes are told at once."""
_TRIM_S = 0.02
_STOP_S = 20.0
_ASK_S = 0.5
_Made = TypeVar("_Made")
_log = structlog.get_logger("roles")


def instruments_subject(cluster: str) -> str:
    """Where nodes answer which instruments they know."""
    return f"tm.{cluster}.instruments"


class Roles:
    """Brings a node its shards, and takes them away. :meth:`start` when the node's receivers run, :meth:`stop` while they still do.

    Raises:
        ReplicationError, OSError: the port for standbys cannot be opened as configured.
    """

    def __init__(self, node: Node) -> None:
        config = node.config
        self.node, self.incarnation = node, secrets.token_hex(6)
        self._links = link_options(config)
        self.server = ReplicationServer(
            self._links,
            host=config.cluster.listens_at.strip("[]"),
            port=config.replication.port,
            idle=IDLE_MODES[config.cluster.idle],
            superseded=self._superseded,
        )
        self._address = f"{config.cluster.address}:{self.server.port}"
        self._replicas: dict[int, Replica] = {}
        self._leadership: Leadership | None = None
        self._beats: Heartbeats | None = None
        self._wanted = config.cluster.replicas
        self._calls = concurrent.futures.ThreadPoolExecutor(2 * config.cluster.shards + 2, thread_name_prefix="roles")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = threading.Event()
        self._asked_to_stop: asyncio.Event | None = None
        warm_takeover(node)
        self._thread = threading.Thread(target=self._run, name="roles", daemon=True)
        self._trimmer = threading.Thread(target=self._trim, name="roles-trim", daemon=True)
        self.error = ""

    # -- from the node

    def ask_instruments(self) -> Rows:
        """What a node that runs knows of the venue's instruments; nothing if none answers at once."""
        try:
            return asyncio.run(self._ask_instruments())
        except (LinkError, nats.errors.Error, OSError, TimeoutError):
            return []

    async def _ask_instruments(self) -> Rows:
        cluster = self.node.config.cluster
        link = await self._connect(f"tickmesh {cluster.node} starts", None)
        try:
            return rows_of((await link.client.request(instruments_subject(cluster.name), b"", timeout=_ASK_S)).data)
        finally:
            await link.close()

    def start(self) -> None:
        """Take part from now on."""
        self.server.start()
        self._thread.start()
        self._trimmer.start()

    def stop(self) -> None:
        """Hand over what is led, where a standby is ready, and end. More than once is fine."""
        self._stopping.set()
        loop, asked = self._loop, self._asked_to_stop
        if loop is not None and asked is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(asked.set)
        for thread in (self._thread, self._trimmer):
            if thread.ident is not None:
                thread.join(_STOP_S)
        for replica in self._replicas.values():
            replica.close()
        self.server.stop()
        self._calls.shutdown(wait=False)

    def fenced(self, shard: int) -> None:
        """An output stream has been taken by a later epoch; from any thread."""
        self._tell(lambda leadership: leadership.fenced(shard))

    def _superseded(self, shard: int, epoch: int) -> None:
        replica = self._replicas.get(shard)
        if replica is not None and replica.epoch < epoch:
            self.fenced(shard)

    def _tell(self, call: Callable[[Leadership], None]) -> None:
        leadership, loop = self._leadership, self._loop
        if leadership is not None and loop is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(call, leadership)

    def set_replicas(self, count: int) -> None:
        """Another number of replicas for each shard."""
        self._wanted = count
        self._tell(lambda leadership: leadership.set_replicas(count))

    def journals(self) -> list[Path]:
        """Folders of the journals that are here."""
        return [replica.folder for replica in self._replicas.values() if replica.beat().position]

    def status(self) -> dict[str, Any]:
        """How each shard stands here, for the node's status."""
        found = {}
        for number, replica in sorted(self._replicas.items()):
            said = self._leadership.status(number) if self._leadership else None
            leader = {"state": said.state, "leader": said.leader.node if said.leader else None, "reason": said.reason} if said else {}
            found[str(number)] = {**leader, **replica.status()}
        return found

    # -- the loop

    def _run(self) -> None:
        uvloop.run(self._forever())

    async def _forever(self) -> None:
        self._loop, self._asked_to_stop = asyncio.get_running_loop(), asyncio.Event()
        attempt = 0
        while not self._stopping.is_set():
            try:
                async with self._taking_part():
                    attempt, self.error = 0, ""
                    await self._asked_to_stop.wait()
            except Exception as error:  # of the store, of NATS: whatever it is, the node goes on trying
                self.error = str(error) or type(error).__name__
                _log.warning("the node takes part in no leadership yet", reason=self.error)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._asked_to_stop.wait(), backoff_s(attempt))
                attempt += 1

    @asynccontextmanager
    async def _taking_part(self) -> AsyncIterator[None]:
        config = self.node.config
        async with contextlib.AsyncExitStack() as stack:
            store = await stack.enter_async_context(open_store(config.store, config.resolve, name=f"tickmesh {config.cluster.node} roles"))
            link = await self._connect(client_name(config.cluster.name, config.cluster.node, self.incarnation), None)
            stack.push_async_callback(link.close)
            system = await self._system(stack)
            beats = self._heartbeats(link, system)
            await link.client.subscribe(instruments_subject(config.cluster.name), cb=self._tell_instruments)
            await beats.start()
            stack.push_async_callback(beats.close)
            leadership = self._make_leadership(store, beats)
            self._beats, self._leadership = beats, leadership
            await leadership.start()
            try:
                yield
            finally:
                await leadership.close()

    async def _connect(self, name: str, login: Login | None) -> NatsLink:
        delivery_name, delivery = next(iter(nats_deliveries(self.node.config).items()))
        target = self.node.targets.get(delivery_name, delivery.target)
        return await connect(target, name=name, login=login or login_of(delivery), wait_s=2.0)

    async def _system(self, stack: contextlib.AsyncExitStack) -> NatsLink | None:
        user, password = os.environ.get(SYSTEM_USER), os.environ.get(SYSTEM_PASSWORD)
        if not user:
            return None
        cluster = self.node.config.cluster
        system = await self._connect(f"tickmesh {cluster.node} system", Login(user=user, password=password))
        stack.push_async_callback(system.close)
        return system

    async def _tell_instruments(self, message: Msg) -> None:
        """A node that starts asks what there is."""
        said = await self._apart(lambda: json.dumps(rows_in(self.node.table)).encode())
        if len(said) < message._client.max_payload:
            with contextlib.suppress(nats.errors.Error, OSError):
                await message.respond(said)

    def _heartbeats(self, link: NatsLink, system: NatsLink | None) -> Heartbeats:
        config = self.node.config
        return Heartbeats(
            link.client,
            config.cluster.name,
            config.cluster.node,
            self.incarnation,
            self._beat,
            every_ms=config.leadership.heartbeat_ms,
            suspect_ms=config.leadership.suspect_ms,
            suspect_ms_max=config.leadership.suspect_ms_max,
            system=system.client if system else None,
            changed=self._heard,
        )

    def _heard(self) -> None:
        """A node is new, is suspected or back, or says something else of its shards."""
        if self._leadership is not None:
            self._leadership.changed()
        for number, replica in self._replicas.items():
            replica.expect(standbys=bool(self._others(number)))

    def _beat(self) -> Beat:
        shards = {number: replica.beat() for number, replica in self._replicas.items()}
        return Beat(self.node.config.cluster.node, self.incarnation, self._address, shards)

    def _make_leadership(self, store: Store, beats: Heartbeats) -> Leadership:
        config, keys = self.node.config, Keys(self.node.config.cluster.name)

        async def members() -> Mapping[str, float]:
            return {service.instance: 1.0 for service in await store.services(keys.service)}

        options = LeadershipOptions(
            keys.root,
            config.cluster.shards,
            self._wanted,
            lease_ttl_s=max(10.0, config.leadership.lease_ttl_s) if config.store.kind == "consul" else config.leadership.lease_ttl_s,
            grace_s=config.leadership.grace_s,
            balance_after_s=config.leadership.balance_after_s,
        )
        return Leadership(store, beats, self, members, options, self._address)

    # -- what leadership tells

    async def _apart(self, call: Callable[[], _Made]) -> _Made:
        """Run something that takes time beside the loop. It is waited for even by one who is cancelled: roles change in order."""
        called = asyncio.get_running_loop().run_in_executor(self._calls, call)
        try:
            return await asyncio.shield(called)
        except asyncio.CancelledError:
            await asyncio.wait([called])
            raise

    async def host(self, shards: frozenset[int]) -> None:
        """See :class:`tickmesh.control.leadership.Replicas`."""
        for number in sorted(shards - set(self._replicas)):
            replica = await self._apart(partial(Replica, self.node, number, self.server, self._links))
            self._replicas = {**self._replicas, number: replica}
        for number in sorted(set(self._replicas) - shards):
            replica = self._replicas[number]
            self._replicas = {other: one for other, one in self._replicas.items() if other != number}
            await self._apart(replica.close)

    def kept(self) -> frozenset[int]:
        """See :class:`tickmesh.control.leadership.Replicas`."""
        config = self.node.config
        return frozenset(number for number, folder in enumerate(journal_folders(config)) if any(folder.glob("*.journal")))

    async def follow(self, shard: int, leader: Holder | None, epoch: int) -> None:
        """See :class:`tickmesh.control.leadership.Replicas`."""
        replica = self._replicas[shard]
        await self._apart(lambda: replica.follow(leader.address if leader and leader.address else None, epoch))

    async def lead(self, shard: int, epoch: int) -> None:
        """See :class:`tickmesh.control.leadership.Replicas`."""
        replica = self._replicas[shard]
        await self._apart(lambda: replica.lead(epoch))

    def _others(self, shard: int) -> list[str]:
        """Living nodes that have the shard too, and will follow."""
        beats, me = self._beats, self.node.config.cluster.node
        if beats is None:
            return []
        seen = {node: beats.beat(node) for node in beats.alive() if node != me}
        return [node for node, beat in seen.items() if beat is not None and shard in beat.shards]

    async def stop_leading(self, shard: int, reason: str) -> None:
        """See :class:`tickmesh.control.leadership.Replicas`."""
        replica = self._replicas[shard]
        await self._apart(lambda: replica.stop_leading(reason))

    async def hand_over(self, shard: int, to: str) -> bool:
        """See :class:`tickmesh.control.leadership.Replicas`."""
        replica = self._replicas[shard]
        return await self._apart(lambda: replica.hand_over(to))

    # -- standbys' input rings

    def _trim(self) -> None:
        while not self._stopping.wait(_TRIM_S):
            for replica in self._replicas.values():
                replica.tick()
                try:
                    while replica.trim() > 0 and not self._stopping.is_set():
                        pass
                except Exception as error:  # a standby that is being made anew; the others must not wait for it
                    _log.warning("waiting events were not looked at", shard=replica.number, reason=repr(error))

    def trim_journals(self, keep_bytes: int, keep_s: float) -> None:
        """Delete what the standbys' journals need not keep."""
        for replica in self._replicas.values():
            replica.trim_journal(keep_bytes, keep_s)
