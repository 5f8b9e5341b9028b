"""Leadership on real servers: members are processes, killed and stopped for real; every record appears once, whoever wrote it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from leadership_member import stream_of
from nats_fixtures import ConfiguredServer
from store_servers import KINDS, StoreServer, start

from tickmesh.control.consul_store import ConsulOptions, ConsulStore
from tickmesh.control.heartbeats import Beat, Heartbeats, ShardBeat
from tickmesh.control.kv_store import KvStore
from tickmesh.control.leadership import Holder, Leadership, LeadershipOptions, TakeoverRefused, lease_key, request_move
from tickmesh.control.store import LeaseHeld
from tickmesh.transports.nats import Login, connect
from tickmesh.transports.nats_reader import StreamReader

LIMIT_S = 40.0
_SYSTEM = """
accounts { SYS { users: [{user: sys, password: sys}] }, APP { jetstream: enabled, users: [{user: app, password: app}] } }
system_account: SYS
no_auth_user: app
"""


class Process:
    """A member's process, and the lines it has printed."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.node: str = options["node"]
        command = [sys.executable, str(Path(__file__).with_name("leadership_member.py")), json.dumps(options)]
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.lines: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self.lines.append(json.loads(line))

    def said(self, what: str, **facts: Any) -> list[dict[str, Any]]:
        """The lines of a kind."""
        wanted = {"what": what, **facts}
        return [line for line in list(self.lines) if all(line.get(key) == value for key, value in wanted.items())]

    def state(self, shard: int) -> str:
        """What it said last of a shard."""
        rows = self.said("status")
        return str(rows[-1]["shards"].get(str(shard), [""])[0]) if rows else ""

    def hosted(self) -> int:
        """Of how many shards it has a replica."""
        rows = self.said("hosts")
        return len(rows[-1]["shards"]) if rows else 0

    def signal(self, number: int) -> None:
        self.child.send_signal(number)

    def end(self) -> None:
        """By force."""
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGCONT)
            self.child.kill()
        self.child.wait()
        self._reader.join(5)


class Team:
    """Members of one cluster, and their servers."""

    def __init__(self, nats: ConfiguredServer, store: Any, kind: str, cluster: str) -> None:
        self.nats, self.store_server, self.kind, self.cluster = nats, store, kind, cluster
        self.store_url = nats.url if store is None or kind != "kv" else store.process.url
        self.members: dict[str, Process] = {}

    def join(self, node: str, **more: Any) -> Process:
        """Start a member."""
        where = ["kv", self.store_url] if self.kind == "kv" else ["consul", self.store_server.process.port]
        ttl_s = 2.0 if self.kind == "kv" else 10.0
        options = {"nats": self.nats.url, "store": where, "ttl_s": ttl_s, "cluster": self.cluster, "node": node, "shards": 1}
        self.members[node] = Process({"system": True} | options | more)
        return self.members[node]

    def leader(self, shard: int = 0) -> str:
        """Who said last that it leads."""
        takes = [(line["epoch"], node) for node, one in self.members.items() for line in one.said("leads", shard=shard)]
        return max(takes)[1] if takes else ""

    def epochs(self, shard: int = 0) -> list[int]:
        return sorted(line["epoch"] for one in self.members.values() for line in one.said("leads", shard=shard))

    def end(self) -> None:
        for one in self.members.values():
            one.end()

    def records(self, shard: int = 0) -> list[tuple[int, int]]:
        """(number, epoch) of every record in the stream."""
        return asyncio.run(self._records(shard))

    async def _records(self, shard: int) -> list[tuple[int, int]]:
        link = await connect(self.nats.url, login=Login())
        try:
            jetstream = link.client.jetstream(timeout=5)
            last = (await jetstream.stream_info(stream_of(self.cluster, shard).name)).state.last_seq
            reader, found, done = StreamReader(link, stream_of(self.cluster, shard).name, 1), [], 0
            while done < last:
                message = await reader.next()
                done = message.sequence
                if message.headers.get("Kind") != "fence":
                    found.append((int.from_bytes(message.data, "little"), int(message.headers["Epoch"])))
            await reader.close()
            return found
        finally:
            await link.close()

    def stored(self, shard: int = 0) -> int:
        """Number of the last record in the stream."""
        return asyncio.run(self._stored(shard))

    async def _stored(self, shard: int) -> int:
        link = await connect(self.nats.url, login=Login())
        try:
            stream = stream_of(self.cluster, shard)
            last = await link.client.jetstream(timeout=5).get_last_msg(stream.name, stream.subject)
            return int((last.headers or {})["Out-Seq"])
        finally:
            await link.close()

    def check(self, shard: int = 0) -> int:
        """Every record once, in order, under rising epochs; returns how many."""
        found = self.records(shard)
        assert [number for number, _ in found] == list(range(1, len(found) + 1))
        assert [epoch for _, epoch in found] == sorted(epoch for _, epoch in found)
        return len(found)


def until(condition: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> None:
    """Wait until something holds."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"not within {limit_s} s: {what}")
        time.sleep(0.005)


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConfiguredServer]:
    with ConfiguredServer(tmp_path_factory.mktemp("nats"), _SYSTEM) as server:
        yield server


@pytest.fixture(scope="module", params=list(KINDS))
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, StoreServer | None]]:
    if request.param == "kv":  # the bucket is on the same server as the streams
        yield "kv", None
        return
    server = start(request.param, tmp_path_factory.mktemp("store"))
    yield request.param, server
    server.close()


@pytest.fixture
def team(nats: ConfiguredServer, store: tuple[str, Any], request: pytest.FixtureRequest) -> Iterator[Team]:
    kind, server = store
    made = Team(nats, server, kind, "".join(c for c in request.node.name if c.isalnum())[-40:])
    yield made
    made.end()
    for node, one in made.members.items():  # shown when the test fails
        print(node, *(line for line in one.lines if line["what"] != "status"), *one.said("status")[-1:], sep="\n  ")


def two(team: Team) -> tuple[Process, Process]:
    """A leader and a ready standby."""
    for node in ("a", "b"):
        team.join(node)
    until(lambda: team.leader(), "somebody leads")
    leader = team.members[team.leader()]
    standby = team.members["b" if leader.node == "a" else "a"]
    until(lambda: standby.said("follows", leader=leader.node), "the other follows")
    return leader, standby


def grows(team: Team, by: int = 50) -> None:
    """Outputs go on."""
    held = team.stored()
    until(lambda: team.stored() > held + by, "outputs go on")


def test_one_of_two_leads_and_a_killed_one_is_replaced(team: Team) -> None:
    leader, standby = two(team)
    grows(team)
    killed_s = time.monotonic()
    leader.signal(signal.SIGKILL)
    until(lambda: standby.said("leads"), "the standby leads")
    assert standby.said("leads")[0]["at_s"] > killed_s
    grows(team)
    assert team.epochs() == sorted(set(team.epochs()))
    team.check()


def test_a_leader_that_hangs_is_replaced_and_can_write_nothing_when_it_wakes(team: Team) -> None:
    leader, standby = two(team)
    grows(team)
    leader.signal(signal.SIGSTOP)
    until(lambda: standby.said("leads"), "the standby leads")
    grows(team)
    leader.signal(signal.SIGCONT)
    until(lambda: leader.said("stops"), "the old one has noticed")
    until(lambda: leader.state(0) == "standby", "it stands by")
    grows(team)
    assert team.leader() == standby.node
    team.check()


def test_leadership_goes_back_and_forth_and_every_record_appears_once(team: Team) -> None:
    two(team)
    for turn in range(6):
        leader = team.members[team.leader()]
        takes = len(team.epochs())
        if turn % 2:
            leader.signal(signal.SIGSTOP)
        else:
            leader.signal(signal.SIGKILL)
            leader.end()
        until(lambda takes=takes, old=leader.node: len(team.epochs()) > takes and team.leader() != old, "another leads")
        grows(team, 20)
        if turn % 2:
            leader.signal(signal.SIGCONT)
            until(lambda leader=leader: leader.state(0) == "standby", "the old one stands by")
        else:
            kept = leader.said("leads")
            again = team.join(leader.node)
            again.lines.extend(kept)
            other = team.leader()
            until(lambda again=again, other=other: again.said("follows", leader=other), "the new process follows")
    team.check()


def test_a_process_that_is_told_to_stop_hands_over_without_a_lease_running_out(team: Team) -> None:
    leader, standby = two(team)
    grows(team)
    leader.signal(signal.SIGTERM)
    until(lambda: standby.said("leads"), "the standby leads")
    until(lambda: leader.said("hands over", to=standby.node), "the old one has handed over")
    until(lambda: leader.child.poll() is not None, "the process ends")
    grows(team)
    team.check()


def test_a_process_that_is_told_to_stop_waits_for_a_standby_that_has_just_come(team: Team) -> None:
    leader = team.join("a")
    until(lambda: leader.said("leads"), "it leads")
    standby = team.join("b")
    until(lambda: standby.said("hosts"), "another node has come")
    leader.signal(signal.SIGTERM)
    until(lambda: leader.said("hands over", to="b"), "the old one has handed over")
    until(lambda: standby.said("leads"), "the standby leads")
    grows(team)
    team.check()


def test_an_operator_moves_a_shard(team: Team) -> None:
    leader, standby = two(team)
    grows(team)
    asyncio.run(_with_store(team, lambda store: request_move(store, f"{team.cluster}/", 0, standby.node, "a test")))
    until(lambda: standby.said("leads"), "the standby leads")
    until(lambda: leader.state(0) == "standby", "the old one stands by")
    until(lambda: leader.said("hands over", to=standby.node), "the old one has handed over")
    grows(team)
    assert team.leader() == standby.node
    team.check()


async def _with_store(team: Team, do: Callable[[Any], Any]) -> Any:
    link = await connect(team.nats.url, login=Login())
    if team.kind == "kv":
        store: Any = await KvStore.open(link.client, "leadership", timeout_s=2.0)
    else:
        store = ConsulStore(ConsulOptions(port=team.store_server.process.port))
    try:
        return await do(store)
    finally:
        await store.close()
        await link.close()


def test_a_lease_that_vanishes_is_taken_up_again_under_a_higher_epoch(team: Team) -> None:
    leader, _ = two(team)
    first = team.epochs()[-1]

    async def depose(store: Any) -> bool:
        entry = await store.get(lease_key(f"{team.cluster}/", 0))
        return bool(await store.depose(entry.key, entry.epoch))

    assert asyncio.run(_with_store(team, depose))
    until(lambda: team.epochs()[-1] > first, "somebody leads under a higher epoch")
    grows(team)
    del leader
    team.check()


def test_shards_are_spread_and_a_third_node_takes_the_place_of_a_dead_one(team: Team) -> None:
    for node in ("a", "b", "c"):
        team.join(node, shards=4)
    until(lambda: all(team.leader(shard) for shard in range(4)), "every shard is led")
    until(lambda: sum(one.hosted() for one in team.members.values()) == 8, "two replicas each")
    victim = team.members[team.leader(0)]
    victim.signal(signal.SIGKILL)
    victim.end()
    survivors = [one for one in team.members.values() if one is not victim]
    until(lambda: all(any(s.state(n).startswith("leading") for s in survivors) for n in range(4)), "every shard is led by a survivor")
    until(lambda: sum(one.hosted() for one in survivors) == 8, "two replicas each again")
    for shard in range(4):
        team.check(shard)


def _evenly(team: Team) -> bool:
    """Whether three nodes lead two of six shards each."""
    leaders = Counter(team.leader(shard) for shard in range(6))
    return sorted(leaders.values()) == [2, 2, 2]


def test_who_leads_more_than_its_share_passes_shards_on_until_it_does_not(team: Team) -> None:
    options = {"shards": 6, "replicas": 3, "balance_after_s": 0.3}
    alone = team.join("a", **options)
    until(lambda: len({line["shard"] for line in alone.said("leads")}) == 6, "it leads all")
    for node in ("b", "c"):
        team.join(node, **options)
    until(lambda: _evenly(team), "each leads two")
    assert len(alone.said("hands over")) == 4
    wished = next(shard for shard in range(6) if team.leader(shard) == "b")
    asyncio.run(_with_store(team, lambda store: request_move(store, f"{team.cluster}/", wished, "a", "somebody")))
    until(lambda: team.leader(wished) == "a", "it is moved by hand")
    until(lambda: _evenly(team), "another goes in its place")
    assert team.leader(wished) == "a"
    for shard in range(6):
        team.check(shard)


class Reluctant:
    """A node that can lead none of its shards while it refuses; its replicas take their time to go."""

    def __init__(self, kept: int = 0) -> None:
        self.hosted: frozenset[int] = frozenset()
        self.refuses, self.refused, self.led, self.wrongly_led = True, set[int](), set[int](), list[int]()
        self._kept = frozenset(range(kept))

    def beat(self) -> Beat:
        roles = {number: "leader" if number in self.led else "standby" for number in range(4)}
        return Beat("a", "1", "", {number: ShardBeat(role, 0, 0, True, True) for number, role in roles.items()})  # type: ignore[arg-type]

    async def host(self, shards: frozenset[int]) -> None:
        if self.hosted - shards:
            self.refuses = False
            await asyncio.sleep(1.0)  # they take so long to go: time enough to campaign for them
        self.hosted = shards

    def kept(self) -> frozenset[int]:
        return self._kept

    async def follow(self, shard: int, leader: Holder | None, epoch: int) -> None: ...

    async def lead(self, shard: int, epoch: int) -> None:
        if self.refuses:
            self.refused.add(shard)
            raise TakeoverRefused(shard, "not yet")
        (self.led.add if shard in self.hosted else self.wrongly_led.append)(shard)

    async def stop_leading(self, shard: int, reason: str) -> None: ...

    async def hand_over(self, shard: int, to: str) -> bool:
        return False


@asynccontextmanager
async def going(nats: ConfiguredServer, node: Reluctant, places: dict[str, float], name: str) -> AsyncIterator[tuple[Leadership, Any, Any]]:
    """A node's leadership of four shards in a cluster of its own, where `places` are the members, with the store and the client."""
    link = await connect(nats.url, login=Login())
    store = await KvStore.open(link.client, name, confirm_s=0.5)
    beats = Heartbeats(link.client, name, "a", "1", node.beat)

    async def members() -> dict[str, float]:
        return places

    options = LeadershipOptions(f"{name}/", 4, replicas=1, settle_ms=0.0, orphaned_s=0.5)
    leadership = Leadership(store, beats, node, members, options)
    await beats.start()
    await leadership.start()
    try:
        async with asyncio.timeout(LIMIT_S):
            yield leadership, store, link.client
    finally:
        await leadership.close(hand_over=False)
        await beats.close()
        await store.close()
        await link.close()


async def so(condition: Callable[[], bool]) -> None:
    """Wait for it; the caller has a limit."""
    while not condition():
        await asyncio.sleep(0.01)


async def _take(store: Any, shard: int) -> int:
    """Get a lease as the node `b`, from a node that takes it again and again."""
    while True:
        with contextlib.suppress(LeaseHeld):
            return int((await store.acquire(lease_key("goes/", shard), Holder("b", "1").encode(), 30.0)).epoch)
        await asyncio.sleep(0.001)


def test_a_replica_goes_when_another_node_leads_and_is_not_led_meanwhile(nats: ConfiguredServer) -> None:
    async def run() -> None:
        node, places, theirs = Reluctant(), {"a": 1.0}, dict[int, ShardBeat]()
        async with going(nats, node, places, "goes") as (leadership, store, client):
            other = Heartbeats(client, "goes", "b", "1", lambda: Beat("b", "1", "", dict(theirs)))
            await other.start()
            await so(lambda: node.refused == {0, 1, 2, 3})
            places |= dict.fromkeys("bcdefgh", 1.0)
            for shard in (0, 1, 2):
                theirs[shard] = ShardBeat("leader", await _take(store, shard), 0, True, True)
            await so(lambda: not node.refuses and leadership.hosted == node.hosted)
            await other.close()
        assert node.wrongly_led == [], "none that was about to go"

    asyncio.run(run())


def test_a_node_keeps_a_shard_that_is_placed_elsewhere_until_somebody_leads_it(nats: ConfiguredServer) -> None:
    """The others may lack what has been published: then its journal is the only one to go on from."""

    async def run() -> None:
        node, places = Reluctant(), {"a": 1.0}
        async with going(nats, node, places, "keeps") as (leadership, _, _):
            await so(lambda: node.refused == {0, 1, 2, 3})
            places |= dict.fromkeys("bcdefgh", 1.0)
            del places["a"]
            await so(lambda: all(leadership._placed.get(shard, ("a",)) != ("a",) for shard in range(4)))
            node.refuses = False
            await so(lambda: node.led == {0, 1, 2, 3})

    asyncio.run(run())


def test_a_node_takes_up_an_old_journal_of_a_shard_that_nobody_leads(nats: ConfiguredServer) -> None:
    async def run() -> None:
        node = Reluctant(kept=3)
        node.refuses = False
        async with going(nats, node, {"b": 1.0}, "takes"):
            await so(lambda: node.led == {0, 1, 2})
        assert node.hosted == {0, 1, 2}

    asyncio.run(run())


@pytest.fixture
def apart(nats: ConfiguredServer, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Team]:
    """A team whose store is on a server of its own, which can be away."""
    server = start("kv", tmp_path / "store")
    made = Team(nats, server, "kv", "".join(c for c in request.node.name if c.isalnum())[-40:])
    yield made
    made.end()
    server.close()


def test_without_the_store_the_leader_goes_on_and_nobody_is_elected(apart: Team) -> None:
    leader, standby = two(apart)
    epochs = apart.epochs()
    apart.store_server.pause()
    until(lambda: leader.state(0) == "leading_without_store", "the leader says that the store is away")
    grows(apart)
    assert apart.epochs() == epochs
    apart.store_server.resume()
    until(lambda: leader.state(0) == "leading" or standby.state(0) == "leading", "a lease is held again")
    grows(apart)
    apart.check()


def test_a_leader_without_the_store_stops_when_its_grace_is_over(apart: Team) -> None:
    only = apart.join("a", grace_s=1.0)
    until(lambda: apart.leader() == "a", "it leads")
    apart.store_server.pause()
    until(lambda: only.said("stops"), "it stops leading")
    assert "store" in only.said("stops")[0]["reason"]
    apart.store_server.resume()
    until(lambda: len(apart.epochs()) > 1, "it leads again")
    apart.check()


def test_the_members_end_with_the_test(team: Team) -> None:
    leader, standby = two(team)
    team.end()
    assert leader.child.poll() is not None
    assert standby.child.poll() is not None
    with pytest.raises(ProcessLookupError):
        os.kill(leader.child.pid, 0)
