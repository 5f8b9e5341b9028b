"""`tickmesh shards` and `tickmesh shards move`: what is shown, and moves on real stores by members that are processes."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from nats_fixtures import nats_server
from programs import require
from store_servers import KINDS, start
from test_leadership import Process, Team, until
from typer.testing import CliRunner

from tickmesh.control.config_store import Keys
from tickmesh.control.heartbeats import Beat, ShardBeat
from tickmesh.control.leadership import Holder, Move, lease_key, move_key
from tickmesh.control.store import Entry
from tickmesh.node.store_link import open_store
from tickmesh.ops import cli
from tickmesh.ops.config_store_cmd import settings_of
from tickmesh.ops.shards_cmd import Standby, shards_of

__all__ = ["nats_server"]


def entries(**values: tuple[bytes, int]) -> dict[str, Entry]:
    """Keys of shard 0."""
    names = {"lease": lease_key("r/", 0), "move": move_key("r/", 0)}
    return {names[name]: Entry(names[name], value, version, version) for name, (value, version) in values.items()}


def beat(node: str, role: Any, position: int, ready: bool = True) -> Beat:
    return Beat(node, "1", "", {0: ShardBeat(role, 7, position, ready)})


LEASE = (Holder("a", "1").encode(), 7)


def test_a_shard_that_is_led() -> None:
    beats = {"a": beat("a", "leader", 100), "b": beat("b", "standby", 90), "c": beat("c", "standby", 0, False)}
    (shard,) = shards_of("r/", entries(lease=LEASE), beats)
    assert (shard.state, shard.leader, shard.epoch, shard.position) == ("led", "a", 7, 100)
    assert shard.standbys == (Standby("b", True, 10), Standby("c", False, 100))


def test_every_state() -> None:
    leads, follows = {"a": beat("a", "leader", 5)}, {"a": beat("a", "standby", 5)}
    wish = (Move("b", "me").encode(), 9)
    cases = [
        ("no leader", {}, leads), ("leader silent", {"lease": LEASE}, {}), ("taking over", {"lease": LEASE}, follows),
        ("moving", {"lease": LEASE, "move": wish}, leads), ("no leader", {"lease": (b"by hand", 3)}, leads),
    ]  # fmt: skip
    for state, keys, beats in cases:
        (shard,) = shards_of("r/", entries(**keys), beats, 1)
        assert shard.state == state
    assert shards_of("r/", entries(lease=LEASE, move=wish), leads)[0].move_to == "b"
    assert [shard.shard for shard in shards_of("r/", {}, {}, 3)] == [0, 1, 2]


# ---------------------------------------------------------------- real


@pytest.fixture(scope="module", params=list(KINDS))
def team(request: pytest.FixtureRequest, nats_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Two members, that lead or follow two shards."""
    server = None
    if request.param == "consul":
        require("consul")
        server = start("consul", tmp_path_factory.mktemp("store"))
    made = Team(nats_server, server, request.param, f"sh{request.param}")
    try:
        for node in ("a", "b"):
            made.join(node, shards=2, system=False, root=Keys(made.cluster).root, bucket="tickmesh")
        until(lambda: all(made.leader(shard) for shard in (0, 1)), "both shards are led")
        yield made
    finally:
        made.end()
        if server is not None:
            server.close()


def place(team: Team) -> list[str]:
    url = team.nats.url if team.kind == "kv" else f"consul://127.0.0.1:{team.store_server.process.port}"
    return ["--store", url, "--cluster", team.cluster, "--server", team.nats.url]


def shown(team: Team) -> list[dict[str, Any]]:
    done = CliRunner().invoke(cli.app, ["shards", *place(team), "--json"])
    assert done.exit_code == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def moved(team: Team, *arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, ["shards", "move", *place(team), *arguments])
    return done.exit_code, done.stdout, done.stderr


def other(team: Team, shard: int) -> Process:
    return team.members["b" if shown(team)[shard]["leader"] == "a" else "a"]


def wishes(team: Team) -> list[str]:
    return [one["move_to"] for one in shown(team) if one["move_to"]]


def test_shows_leaders_and_standbys(team: Team) -> None:
    def well() -> bool:
        return all(one["state"] == "led" and [s["ready"] for s in one["standbys"]] == [True] for one in shown(team))

    until(well, "both are led, with a ready standby")
    for one in shown(team):
        assert one["leader"] == team.leader(one["shard"])
        assert one["epoch"] == max(team.epochs(one["shard"]))
        assert one["standbys"][0]["node"] != one["leader"]
    done = CliRunner().invoke(cli.app, ["shards", *place(team)])
    assert "ready" in done.stdout
    assert "led" in done.stdout


def test_moves_a_shard_there_and_back(team: Team) -> None:
    for _ in range(2):
        to, before = other(team, 1).node, shown(team)[1]
        code, out, err = moved(team, "1", "--to", to, "--json")
        assert code == 0, err
        done = json.loads(out)
        assert (done["did"], done["leader"], done["before"]) == ("moved", to, before["leader"])
        assert done["epoch"] > done["epoch_before"] == before["epoch"]
        until(lambda to=to: shown(team)[1]["leader"] == to and not wishes(team), "it leads, and nothing is wished any more")
    assert moved(team, "1", "--to", to)[1].startswith(f"shard 1 is led by {to} already")


def test_says_what_is_wrong(team: Team) -> None:
    code, _, err = moved(team, "9", "--to", "a")
    assert (code, "no shard 9" in err) == (2, True)
    code, _, err = moved(team, "0", "--to", "nobody")
    assert (code, "a, b" in err) == (2, True)
    code, _, err = moved(team, "0", "--to", "a", "--store", "consul://127.0.0.1:1")
    assert code == 1
    assert wishes(team) == []


def test_does_not_move_to_a_node_that_is_silent(team: Team) -> None:
    to = other(team, 0)
    to.signal(signal.SIGSTOP)
    try:
        code, _, err = moved(team, "0", "--to", to.node)
        assert (code, "sends heartbeats" in err) == (2, True)
    finally:
        to.signal(signal.SIGCONT)
    until(lambda: all(one["state"] == "led" for one in shown(team)), "all is well again")


@contextmanager
def moving(team: Team, shard: int, to: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command that waits."""
    command = [sys.executable, "-m", "tickmesh.ops.cli", "shards", "move", str(shard), "--to", to, *place(team)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


@contextmanager
def held(team: Team, shard: int) -> Iterator[None]:
    """A lease that nobody hands over, since no member tends the shard."""
    begun, done = threading.Event(), threading.Event()

    async def hold() -> None:
        async with open_store(settings_of(place(team)[1])) as store:
            lease = await store.acquire(lease_key(Keys(team.cluster).root, shard), Holder("a", "x").encode(), 10.0)
            begun.set()
            await asyncio.to_thread(done.wait, 60)
            await lease.release()

    thread = threading.Thread(target=asyncio.run, args=(hold(),))
    thread.start()
    try:
        assert begun.wait(20)
        yield
    finally:
        done.set()
        thread.join(20)


def test_withdraws_the_wish_when_its_time_is_over_and_on_ctrl_c(team: Team) -> None:
    with held(team, 7):
        assert moved(team, "7", "--to", "b", "--wait-s", "0.3")[0] == 5
        assert wishes(team) == []
        with moving(team, 7, "b") as child:
            until(lambda: wishes(team) == ["b"], "the wish is there")
            child.send_signal(signal.SIGINT)
            assert child.wait(20) == 130
        assert wishes(team) == []
