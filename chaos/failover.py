"""Failover: nodes of a cluster under a steady feed are killed, paused, moved away from and asked to end; what does it cost, and is
every output there exactly once?

    python -m tickmesh.chaos.failover --store consul --replicas 3 --kills 200 --seed 1
    python -m tickmesh.chaos.failover --kills 0 --moves 100 --sigterms 20
    python -m tickmesh.chaos.failover --kills 0 --changes 200 --codes 20
    python -m tickmesh.chaos.failover --kills 0 --cuts 20 --servers 10 --replicas 3 --store consul

Each time a shard is drawn by the seed, and its leader is the victim. Kills are ``kill -9`` and ``SIGSTOP`` for two seconds in turns. A cut
takes the network of the leader's host away for three seconds (with ``--cuts``, each node is in a network namespace of its own, which takes
root): it hears nothing and nobody hears it. A server is killed with ``kill -9``, and started again when every shard has put out something.
Measured is the time from the signal to the first output under a later epoch, in every shard that the victim led, and of planned changes
the pause between the last output of the old epoch and the first of the new one, and of a server the longest time in which a shard put
nothing out, all by one clock. A change gives a calculation's parameter another value in the store; a change of code is another text of a
user's own calculation, which every node compiles while the old code runs. Of both, the time until the last node says that it has applied
it is measured. Before the next victim is drawn, every shard has a leader and its standbys again.

In the end the checker reads every output stream and compares it with the replay of the leader's journal; and the signals of calculations
over several shards are compared with those of one process that replays the same feed (:mod:`tickmesh.chaos.one_process`). One JSON object
is printed; the exit code is 0 if every change came to its end, every output is there once, in order, and the right one, and so are the
signals.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import uvloop

from tickmesh.chaos.arrivals import Arrivals, percentiles
from tickmesh.chaos.checker import Report, check_stream
from tickmesh.chaos.one_process import JoinReport, compare
from tickmesh.control.config_store import Documents
from tickmesh.control.leadership import request_move
from tickmesh.control.toml_text import set_value
from tickmesh.ops import config_store_cmd
from tickmesh.ops.config_store_cmd import Wish, change, set_key
from tickmesh.ops.local_cluster import LocalCluster, LocalClusterOptions, NodeProcess, NotWhole
from tickmesh.ops.namespaces import lacking
from tickmesh.ops.servers import EmbeddedServer
from tickmesh.ops.shards_cmd import Cluster, Shard, opened
from tickmesh.transports.nats import Login, connect

Deed = Literal["kill", "pause", "cut", "server", "move", "sigterm", "change", "code"]
PAUSE_S, CUT_S = 2.0, 3.0
FAILOVER_MS, MOVE_MS, APPLIED_MS, COMPILED_S = 250.0, 50.0, 50.0, 10.0
"""The bars: p99 of a failover, of the pause of a planned change, of new parameters until every node has applied them; any new code."""
_CHANGED_KEY = "processing.calculations.fast.window"
_CODE = """\
from tickmesh.node.calculation import calculation


@calculation(inputs="trade", state=[("sum", "f8")])
def weighed(event, state):
    state.sum = state.sum * 0.9 + {weight} * event.qty
    return state.sum
"""
_CODE_S, _CHANGE_S = 120.0, 20.0
"""Code, and a change of leadership, that takes longer has failed."""
_WHOLE_S = 90.0
_HEARD_S = 0.1
_SILENT_S = 1.5
_FAULTS = ("lost", "duplicated", "out_of_order", "stale_epoch", "differing", "not_in_replay", "not_delivered", "malformed", "journal")


@dataclass(frozen=True)
class Change:
    """Leadership of one shard that has changed, or should have.

    Attributes:
        deed: what was done.
        round: which one, from 0.
        shard, victim: of what, to whom.
        took_ms: from the deed to the first output of the later epoch; None: there was none in time.
        pause_ms: from the last output of the epoch before to that one.
        to: the node that leads now; empty: unknown.
    """

    deed: Deed
    round: int
    shard: int
    victim: str
    took_ms: float | None
    pause_ms: float | None = None
    to: str = ""


@dataclass
class Scenario:
    """What is done to a cluster, and what came of it.

    Attributes:
        cluster: it runs.
        rng: draws shards and targets.
        changes: what was measured.
        whole_s: seconds from each deed until every shard had a leader and its standbys again.
        applied_ms: of each change of a parameter, until the last node had applied it.
        compiled_s: the same of each change of code.
        outage_ms: of each server that was killed, the longest time without outputs of a shard.
        refused: what nodes said instead.
        stuck: what did not go on at all.
    """

    cluster: LocalCluster
    rng: random.Random
    changes: list[Change] = field(default_factory=list)
    whole_s: list[float] = field(default_factory=list)
    applied_ms: list[float] = field(default_factory=list)
    compiled_s: list[float] = field(default_factory=list)
    outage_ms: list[float] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    quiet: bool = False

    async def run(self, deeds: Sequence[Deed]) -> dict[str, Any]:
        """Do all of it, and check."""
        link = await connect(self.cluster.nats.url, name="failover", login=Login())
        arrivals = Arrivals(link, self.cluster.options.name, self.cluster.options.shards)
        try:
            await arrivals.start()
            async with opened(self.cluster.place, self.cluster.nats.url) as at:
                await self._flowing(arrivals)
                gc.disable()  # what is measured is not to wait for us; nothing here makes many cycles
                for number, deed in enumerate(deeds):
                    await self._one(number, deed, arrivals, at)
            gaps = arrivals.gaps_ms()
            leaders = await self._settled(arrivals)
            await arrivals.close()
            for node in self.cluster.nodes.values():
                node.pause()  # all at once: none is to take over from another
            for node in self.cluster.nodes.values():
                node.kill()
            reports = [await self._check(link, number, leaders[number]) for number in range(self.cluster.options.shards)]
            joins = await compare(self.cluster)
        finally:
            await link.close()
        return self._result(gaps, reports, joins)

    # -- one change

    async def _one(self, number: int, deed: Deed, arrivals: Arrivals, at: Cluster) -> None:
        shards = await self.cluster.whole(_WHOLE_S)
        began = time.monotonic()
        if deed in ("change", "code"):
            await self._everybody(at)
            await (self._set(number) if deed == "change" else self._set_code(number))
            return
        if deed == "server":
            await self._kill_server(number, arrivals)
            return
        if deed == "move":
            made = [await self._move(number, shards, arrivals, at)]
        else:
            made = await self._strike(number, deed, shards, arrivals)
        self.changes += made
        await self.cluster.whole(_WHOLE_S)
        self.whole_s.append(time.monotonic() - began)
        if not self.quiet:
            times = ", ".join(f"{one.shard}: {'never' if one.took_ms is None else f'{one.took_ms:.0f} ms'}" for one in made)
            print(f"{number + 1} {deed} {made[0].victim}  {times}  whole after {self.whole_s[-1]:.1f} s", file=sys.stderr, flush=True)

    async def _everybody(self, at: Cluster) -> None:
        """Wait until every node is there: one that is still starting after a kill would be what a change is waited for."""
        end = time.monotonic() + _WHOLE_S
        while missing := set(self.cluster.nodes) - set(await at.beats(_HEARD_S)):
            if time.monotonic() > end:
                logs = f"see the logs in {self.cluster.options.folder}"
                raise NotWhole(_WHOLE_S, f"nothing is heard of {', '.join(sorted(missing))}", logs)

    async def _strike(self, number: int, deed: Deed, shards: list[Shard], arrivals: Arrivals) -> list[Change]:
        """Kill, pause, cut off or terminate the leader of a shard."""
        name = self.rng.choice(shards).leader
        victim, led = self.cluster.nodes[name], [one for one in shards if one.leader == name]
        began, network = time.monotonic(), self.cluster.network
        if deed == "cut":
            assert network is not None
            network.cut(name)
        else:
            {"kill": victim.kill, "pause": victim.pause, "sigterm": victim.terminate}[deed]()
        waiting = asyncio.gather(*(arrivals.first_after(one.shard, one.epoch, _CHANGE_S) for one in led))
        if deed == "pause":
            await asyncio.sleep(max(0.0, began + PAUSE_S - time.monotonic()))  # it hangs for so long: that is the fault
            victim.resume()
        seen = await waiting
        if network is not None and deed == "cut":
            await asyncio.sleep(max(0.0, began + CUT_S - time.monotonic()))  # likewise
            network.join(name)
        else:
            await self._restart(victim)
        found = []
        for one, after in zip(led, seen):
            before = arrivals.shards[one.shard].epochs.get(one.epoch)
            took = (after.first_s - began) * 1000 if after else None
            pause = (after.first_s - before.last_s) * 1000 if after and before else None
            found.append(Change(deed, number, one.shard, name, took, pause))
        return found

    async def _restart(self, victim: NodeProcess) -> None:
        """Start one that has ended, or is about to; a paused one still runs."""
        end = time.monotonic() + _WHOLE_S
        while victim.ending and time.monotonic() < end:
            await asyncio.sleep(0.01)
        victim.start()

    async def _move(self, number: int, shards: list[Shard], arrivals: Arrivals, at: Cluster) -> Change:
        """Move a shard to one of its standbys."""
        shard = self.rng.choice([one for one in shards if one.standbys])
        to = self.rng.choice([one.node for one in shard.standbys if one.ready])
        began = time.monotonic()
        await request_move(at.store, at.root, shard.shard, to, "failover")
        after = await arrivals.first_after(shard.shard, shard.epoch, _CHANGE_S)
        before = arrivals.shards[shard.shard].epochs.get(shard.epoch)
        if after is None:
            return Change("move", number, shard.shard, shard.leader, None)
        pause = (after.first_s - before.last_s) * 1000 if before else None
        leader = {one.shard: one.leader for one in await at.shards()}.get(shard.shard, "")
        return Change("move", number, shard.shard, shard.leader, (after.first_s - began) * 1000, pause, leader)

    async def _kill_server(self, number: int, arrivals: Arrivals) -> None:
        """Kill a server of the store or of NATS, and start it again once all goes on without it."""
        consul = self.cluster.consul.servers if self.cluster.consul is not None else []
        server: EmbeddedServer = self.rng.choice([*self.cluster.nats.servers, *consul])
        for shard in arrivals.shards:
            shard.longest_s = 0.0
        began = time.monotonic()
        server.kill()
        while not all(shard.last_s > began + _SILENT_S for shard in arrivals.shards):
            if time.monotonic() > began + _CHANGE_S:
                self.stuck.append(f"round {number}: {server.program} was killed, and a shard puts out nothing")
                break
            await asyncio.sleep(0.02)
        self.outage_ms.append(max(shard.longest_s for shard in arrivals.shards) * 1000)
        server.launch()
        await asyncio.to_thread(server.wait_ready)
        await self.cluster.whole(_WHOLE_S)
        if not self.quiet:
            what = f"{number + 1} server {server.program} port {server.port}  {self.outage_ms[-1]:.0f} ms without outputs"
            print(f"{what}  whole after {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)

    async def _set(self, number: int) -> None:
        """Change a parameter, while everything runs."""
        value = str(10 + number % 40)
        report = await set_key(_CHANGED_KEY, value, self.cluster.place, Wish("failover"), lambda _: None)
        self.applied_ms.append(self._answered(report) * 1000)
        if not self.quiet:
            print(f"{number + 1} change  {self.applied_ms[-1]:.0f} ms", file=sys.stderr, flush=True)

    async def _set_code(self, number: int) -> None:
        """Bring another text of a calculation to the nodes, while everything runs."""
        place, code = self.cluster.place, {"weighed.py": _CODE.format(weight=f"{time.time_ns()}.0e-18")}  # in no cache yet
        async with place.open() as config:
            stored = await config.read()
            text = set_value(stored.documents.sections["processing"], ("calculations", "weighed", "use"), "weighed.py:weighed")
            documents = Documents({**stored.documents.sections, "processing": text}, {**stored.documents.code, **code})
            report = await change(config, place, documents, stored, Wish("failover", timeout_s=_CODE_S), lambda _: None)
        self.compiled_s.append(self._answered(report))
        if not self.quiet:
            print(f"{number + 1} code  {self.compiled_s[-1]:.1f} s", file=sys.stderr, flush=True)

    def _answered(self, report: config_store_cmd.Report) -> float:
        """Seconds until the last node had applied it; those that have not are noted."""
        assert report.outcome is not None
        states = [answer for answer in report.outcome.answers if answer.state != "applied"]
        self.refused += [f"{answer.node}: {answer.state}, {'; '.join(answer.reasons)}" for answer in states]
        return max((answer.after_s for answer in report.outcome.answers), default=0.0)

    # -- before and after

    async def _flowing(self, arrivals: Arrivals) -> None:
        """Wait until outputs come from every shard."""
        end = time.monotonic() + _WHOLE_S
        while not all(sum(epoch.frames for epoch in one.epochs.values()) > 20 for one in arrivals.shards):
            if time.monotonic() > end:
                raise NotWhole(_WHOLE_S, "outputs do not come from every shard", f"see the logs in {self.cluster.options.folder}")
            await asyncio.sleep(0.05)

    async def _settled(self, arrivals: Arrivals) -> dict[int, str]:
        """End the feed, wait until everything is out; who leads each shard."""
        await self.cluster.whole(_WHOLE_S)
        self.cluster.stop_feed()
        await arrivals.quiet(_SILENT_S, _WHOLE_S)
        shards = await self.cluster.whole(_WHOLE_S)  # not before: a shard may have gone to where it is placed
        return {one.shard: one.leader for one in shards}

    async def _check(self, link: Any, shard: int, leader: str) -> Report:
        journal = self.cluster.nodes[leader].data_dir / "journal" / leader / f"shard-{shard}"
        return await check_stream(link, self.cluster.options.name, shard, journal, expected=1)

    # -- the result

    def _result(self, gaps: dict[str, float], reports: Sequence[Report], joins: JoinReport) -> dict[str, Any]:
        faults = {fault: sum(report.counts.get(fault, 0) for report in reports) for fault in _FAULTS}
        never = [asdict(one) for one in self.changes if one.took_ms is None]
        planned = [one for one in self.changes if one.deed in ("move", "sigterm")]
        failovers = self._times("kill", "pause")
        pauses = percentiles([one.pause_ms for one in planned if one.pause_ms is not None])
        o = self.cluster.options
        return {
            "cluster": o.name,
            "store": o.store, "nats_servers": o.nats_servers, "stream_replicas": o.stream_replicas, "nodes": o.nodes, "shards": o.shards,
            "replicas": o.replicas, "rate": o.rate, "seed": o.seed, "host": {"cores": os.cpu_count(), "load_1_5_15_min": os.getloadavg()},
            "done": dict(Counter(deed for deed, _ in self._rounds())),
            "failover_ms": {"all": failovers, "kill": self._times("kill"), "pause": self._times("pause")},
            "planned": {"pause_ms": pauses, "request_ms": self._times("move"), "sigterm_ms": self._times("sigterm")},
            "cut_ms": self._times("cut"), "server_outage_ms": percentiles(self.outage_ms), "stuck": self.stuck,
            "changes": {"applied_ms": percentiles(self.applied_ms), "compiled_s": percentiles(self.compiled_s), "refused": self.refused},
            "whole_again_ms": percentiles([s * 1000 for s in self.whole_s]), "frame_gap_ms": gaps, "never": never,
            "checker": [str(report) for report in reports], "faults": faults, "outputs": sum(report.outputs for report in reports),
            "across_shards": asdict(joins),
            "within_bars": failovers.get("p99", 0.0) <= FAILOVER_MS and pauses.get("p99", 0.0) <= MOVE_MS
            and percentiles(self.applied_ms).get("p99", 0.0) <= APPLIED_MS and max(self.compiled_s, default=0.0) <= COMPILED_S,
            "good": not never and not self.stuck and not self.refused and all(report.good for report in reports) and joins.good,
        }  # fmt: skip

    def _rounds(self) -> set[tuple[Deed, int]]:
        return {(one.deed, one.round) for one in self.changes}

    def _times(self, *deeds: Deed) -> dict[str, float]:
        return percentiles([one.took_ms for one in self.changes if one.deed in deeds and one.took_ms is not None])


def deeds_of(kills: int, moves: int, sigterms: int, changes: int = 0, cuts: int = 0, servers: int = 0, codes: int = 0) -> list[Deed]:
    """Kills and pauses in turns, then cuts, servers, moves, hand-overs, and changes of the configuration, parameters before code."""
    found: list[Deed] = ["pause" if number % 2 else "kill" for number in range(kills)]
    rest: dict[Deed, int] = {
        "cut": cuts, "server": servers, "move": moves, "sigterm": sigterms, "change": changes, "code": codes,
    }  # fmt: skip
    return found + [deed for deed, count in rest.items() for _ in range(count)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 if every change came to its end and every output is there exactly once, in order, and the right one."""
    parser = argparse.ArgumentParser(description="Kill, pause and move the leaders of a cluster under a steady feed.")
    parser.add_argument("--store", choices=("consul", "nats"), default="nats")
    parser.add_argument("--replicas", type=int, choices=(1, 3), default=1, help="nats-servers, each with every output stream")
    parser.add_argument("--kills", type=int, default=20, help="kill -9 and SIGSTOP in turns")
    parser.add_argument("--cuts", type=int, default=0, help="leaders whose network is cut, in network namespaces; takes root")
    parser.add_argument("--servers", type=int, default=0, help="servers of NATS and of the store that are killed; with three of each")
    parser.add_argument("--moves", type=int, default=0, help="planned moves, after the kills")
    parser.add_argument("--sigterms", type=int, default=0, help="nodes asked to end, after the moves")
    parser.add_argument("--changes", type=int, default=0, help="new values of a parameter, after all that")
    parser.add_argument("--codes", type=int, default=0, help="new texts of a calculation, last of all")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rate", type=int, default=1000, help="messages per second of the feed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep data and logs here")
    parser.add_argument("--quiet", action="store_true", help="no lines on standard error")
    options = parser.parse_args(arguments)
    if options.servers and options.replicas == 1:
        parser.error("--servers needs --replicas 3: nothing goes on without the only server")
    if options.cuts and (reason := lacking()):
        parser.error(f"--cuts: {reason}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: nothing is left running
    temporary = tempfile.TemporaryDirectory(prefix="tickmesh-failover-", ignore_cleanup_errors=True)
    with temporary as folder:
        try:
            result = _run(options, (options.keep or Path(folder)).absolute())
        except KeyboardInterrupt:
            return 130
    print(json.dumps(result, indent=1))
    return 0 if result["good"] else 1


def _run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    def say(text: str) -> None:
        if not options.quiet:
            print(text, file=sys.stderr, flush=True)

    settings = LocalClusterOptions(
        folder,
        name=f"failover-{os.getpid()}",  # several may run at a time
        store=options.store,
        nodes=options.nodes,
        shards=options.shards,
        nats_servers=options.replicas,
        stream_replicas=options.replicas,
        rate=options.rate,
        seed=options.seed,
        per_event=(),  # only the streams are looked at
        namespaces=options.cuts > 0,
        balance_after_s=0,  # who leads is changed by what is measured, and by nothing else
    )
    say(f"seed {options.seed}, data in {folder}")
    with LocalCluster(settings, say) as cluster:
        scenario = Scenario(cluster, random.Random(options.seed), quiet=options.quiet)
        return uvloop.run(scenario.run(_deeds(options)))


def _deeds(options: argparse.Namespace) -> list[Deed]:
    return deeds_of(options.kills, options.moves, options.sigterms, options.changes, options.cuts, options.servers, options.codes)


if __name__ == "__main__":
    sys.exit(main())
