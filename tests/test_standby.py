"""A standby beside a leader, in two processes: the same state and outputs at the same sequence, held back until the leader's are stored."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from nodes import PROCESSING, cluster, simulator_source, until  # noqa: F401
from replicas import options, shard_digest

from tickmesh.control.config import Config, parse_config
from tickmesh.node.beginning import begin_shard
from tickmesh.node.event import ANY_VIEW, EVENT
from tickmesh.node.frames import outputs_digest
from tickmesh.node.journal import Journal, JournalReader, truncate, verify
from tickmesh.node.journal_replay import config_event, replay_journal
from tickmesh.node.process import Node
from tickmesh.node.replication import Leading, ReplicationServer, SnapshotFile
from tickmesh.node.standby import Built, Standby, StandbyError
from tickmesh.node.telemetry import Telemetry
from tickmesh.node.versions import Document, Documents
from tickmesh.ops.up import GENERATORS
from tickmesh.transports.ring import R_STATE, Reader, Ring

MESSAGES = 20_000

LEADER = """
import hashlib, json, sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from replicas import options, shard_digest
from tickmesh.control.config import parse_config
from tickmesh.node.process import Node
from tickmesh.node.release import ReleaseGate
from tickmesh.node.process import Node
from tickmesh.node.replication import Leading, ReplicationServer
from tickmesh.ops.up import GENERATORS

node = Node(parse_config(sys.argv[1]), GENERATORS)
gate = ReleaseGate(node.journals[0], acks=1, solo=False)
node.shards[0].gate = gate
reader = node.outputs[0].reader("test")
stored, digest = 0, hashlib.sha256()
server = ReplicationServer(options("leader")).start()
server.lead(0, Leading(node.journals[0], 1, gate, stored=lambda: stored))
print(server.address, flush=True)
node.start()
try:
    while not (node.finished and stored == int(node.shards[0].shard.arrays.core["out_seq"][0])):
        node.check()
        events = reader.read(max(0, min(reader.lag, gate.released() - stored)))
        digest.update(events)
        stored += len(events)
        if len(events) == 0:
            time.sleep(0.0005)
    shard = node.shards[0].shard
    said = {"end": node.journals[0].next_sequence, "outputs": stored, "digest": digest.hexdigest(), "state": shard_digest(shard)}
    print(json.dumps({**said, "gate": gate.status()}), flush=True)
    sys.stdin.read()
finally:
    server.stop()
    node.stop()
"""


def node_text(cluster: str, node: str, folder: Path, messages: int, capacity: int = 1024) -> str:  # noqa: F811
    return f"""
[cluster]
name = "{cluster}"
node = "{node}"
data_dir = "{folder}"
instruments_max = 1024
orders_max = 65536
ring_capacity = {capacity}
[journal]
segment_mb = 1
{simulator_source(messages)}
{PROCESSING}
[delivery.events]
method = "shm"
ring_capacity = {capacity}
"""


class Replica:
    """A standby under test that remembers the outputs of each shard it builds."""

    def __init__(self, text: str, folder: Path, stack: ExitStack, **more: object) -> None:
        self.config: Config = parse_config(text)
        self.telemetry = Telemetry.create(self.config.cluster.name, self.config.cluster.node, ["market"], 1)
        stack.callback(self.telemetry.close)
        self.readers: list[Reader] = []
        self.snapshots: list[Path | None] = []
        self.standby = Standby(0, folder, options("standby"), self.build, self.telemetry, ring_capacity=512, **more)  # type: ignore[arg-type]
        stack.callback(self.standby.stop)

    def build(self, snapshot: Path | None) -> Built:
        ring = Ring.create(None, self.config.cluster.ring_capacity, EVENT, reader_timeout_ms=60_000)
        shard = begin_shard(self.config, Document.of(self.config, 0, {}, "sequential"), ring, None)
        self.readers.append(ring.reader("test"))
        self.snapshots.append(snapshot)
        if snapshot is None:
            return Built(shard, ring)
        events = np.fromfile(snapshot, EVENT)  # a snapshot of this test: the events that led to the state
        assert shard.step(events.view(ANY_VIEW), 0, len(events)) == len(events)
        return Built(shard, ring, len(events))


@contextmanager
def leader(text: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A leading node in a process of its own, and where it can be followed."""
    command = [sys.executable, "-c", LEADER, text, str(Path(__file__).parent)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.communicate(timeout=30)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_standby_is_the_leader_again(cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """Rings of 1,024 outputs on both sides: the leader runs on only as the standby acknowledges, the standby only as the leader stores."""
    with ExitStack() as stack:
        text = node_text(cluster, "leader", tmp_path / "leader", MESSAGES)
        replica = Replica(node_text(cluster, "standby", tmp_path / "s", 1), tmp_path / "standby", stack)
        process, address = stack.enter_context(leader(text))
        standby = replica.standby.start()
        standby.follow(address)
        until(lambda: replica.readers, "the standby's shard", 60)
        digest, got = hashlib.sha256(), 0
        while not (standby.follower.leader_end == standby.taken > MESSAGES and replica.readers[0].lag == 0):
            standby.check()
            assert process.poll() is None
            held = replica.readers[0].ring.lag
            assert held <= 1024
            until(lambda: replica.readers[0].lag or standby.follower.leader_end == standby.taken > MESSAGES, "outputs", 60)
            events = replica.readers[0].read(512)
            digest.update(events)
            got += len(events)
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert standby.taken == said["end"]
        assert got == said["outputs"] > MESSAGES
        assert digest.hexdigest() == said["digest"]
        assert standby.shard is not None
        assert shard_digest(standby.shard) == said["state"]
        assert said["gate"]["outputs_held"] == 0
        until(lambda: standby.status()["outputs_held"] == 0, "outputs to be let go")
        assert standby.status()["stored"] == said["outputs"]
    folders = (tmp_path / "leader" / "journal" / "leader" / "shard-0", tmp_path / "standby")
    contents = [b"".join(batch.tobytes() for batch in JournalReader(folder).batches()) for folder in folders]
    assert contents[0] == contents[1]
    assert all(verify(folder).ok for folder in folders)


@pytest.mark.slow
def test_outputs_are_held_until_the_leader_has_stored_them_and_then_taken_over(cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """A leader that stores nothing: the standby's loop fills its ring and waits, its journal goes on; then it takes over."""
    with ExitStack() as stack:
        journal = stack.enter_context(journal_of_a_run(cluster, tmp_path))
        stored = [0]
        server = ReplicationServer(options("leader")).start()
        stack.callback(server.stop)
        server.lead(0, Leading(journal, 1, stored=lambda: stored[0]))
        replica = Replica(node_text(cluster, "standby", tmp_path / "s", 1, capacity=256), tmp_path / "standby", stack)
        standby = replica.standby.start()
        standby.follow(server.address)
        until(lambda: standby.follower.next_sequence == journal.next_sequence, "the journal", 60)
        replica.readers[0].close()
        until(lambda: standby.status()["outputs_held"] > 200, "held outputs")
        held = standby.status()
        assert held["outputs_held"] <= 256
        assert held["taken"] < journal.next_sequence
        stored[0] = 150
        until(lambda: standby.status()["outputs"] > held["outputs"], "outputs after some were let go")
        assert standby.status()["outputs_held"] <= 256
        assert standby.status()["outputs"] <= 150 + 256
        with pytest.raises(StandbyError, match="not stepped over"):
            standby.take_over(limit_s=0.2)
        standby.stored(1 << 40)
        mine, built = standby.take_over()
        stack.callback(built.output.close)
        with mine:
            assert mine.next_sequence == journal.next_sequence == int(built.shard.arrays.core["events"][0])
            assert int(built.shard.arrays.core["out_seq"][0]) == built.output.published


@pytest.mark.slow
def test_a_standby_starts_over_when_its_tail_is_cut_and_after_a_restart(cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """It has stepped over events that the new leader does not have: its state is made again from what both have."""
    with ExitStack() as stack:
        journal = stack.enter_context(journal_of_a_run(cluster, tmp_path))
        end, cut = journal.next_sequence, 700
        whole = server_of(stack, journal, 1)
        replica = Replica(node_text(cluster, "standby", tmp_path / "s", 1, capacity=65536), tmp_path / "standby", stack)
        standby = replica.standby.start()
        standby.follow(whole.address)
        until(lambda: standby.taken == end, "all events", 60)
        whole.stop()
        journal.close()
        truncate(journal.folder, end - cut)
        shorter = stack.enter_context(Journal.open(journal.folder, 0, sync="none"))
        new = server_of(stack, shorter, 2)
        standby.follow(new.address)
        until(lambda: standby.follower.counters.cut == cut and standby.taken == end - cut, "the tail to be cut", 60)
        assert len(replica.readers) == 2
        state = shard_digest(standby.shard)  # type: ignore[arg-type]
        standby.stop()
        again = Replica(node_text(cluster, "standby2", tmp_path / "s", 1, capacity=65536), tmp_path / "standby", stack)
        again.standby.start()
        until(lambda: again.standby.taken == end - cut, "its own journal, without a leader", 60)
        assert shard_digest(again.standby.shard) == state  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_standby_begins_from_a_snapshot(cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """The leader's oldest segment is gone: what it has in place of it is a file, from which the shard is made; after a restart again."""
    with ExitStack() as stack:
        folder = tmp_path / "leader"
        with journal_of_a_run(cluster, tmp_path) as run:
            batch = np.concatenate([part.copy() for part in JournalReader(run.folder).batches()])
        journal = stack.enter_context(Journal.create(folder, 0, segment_records=512, sync="none"))
        journal.append(batch)
        until(lambda: len(journal.finished()) >= 4, "the helper")
        at = 3 * 512 + 100
        file = tmp_path / f"{at}.events"
        file.write_bytes(batch[:at].tobytes())
        assert journal.drop_before(2 * 512) == 2
        server = ReplicationServer(options("leader")).start()
        stack.callback(server.stop)
        server.lead(0, Leading(journal, 1, snapshot=lambda: SnapshotFile(file, at)))
        states = []
        for node in ("standby", "standby2"):
            replica = Replica(node_text(cluster, node, tmp_path / "s", 1, capacity=65536), tmp_path / "standby", stack)
            replica.standby.start()
            if node == "standby":
                replica.standby.follow(server.address)
            until(lambda: replica.standby.taken == journal.next_sequence, "all events", 60)  # noqa: B023
            replica.standby.check()
            assert replica.snapshots == [tmp_path / "standby" / "snapshots" / file.name]
            assert JournalReader(tmp_path / "standby").first_sequence == 3 * 512
            states.append(shard_digest(replica.standby.shard))  # type: ignore[arg-type]
            replica.standby.stop()
        whole = Replica(node_text(cluster, "whole", tmp_path / "s", 1, capacity=65536), tmp_path / "none", stack).build(None)
        whole.shard.step(batch.view(ANY_VIEW), 0, len(batch))
        assert states == [shard_digest(whole.shard)] * 2


@pytest.mark.slow
def test_a_standby_that_is_stopped_again_and_again_takes_each_event_in_its_place(cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """A journal full of changes of parameters, and a feeder that ends and begins anew at moments drawn by a seed: as the replay of it."""
    with ExitStack() as stack:
        journal = stack.enter_context(changing_journal(cluster, tmp_path, every=20))
        folder = tmp_path / "standby"
        shutil.copytree(journal.folder, folder)
        replica = Replica(node_text(cluster, "standby", tmp_path / "s", 1, capacity=65536), folder, stack)
        standby, rng = replica.standby.start(), random.Random(5)
        until(lambda: standby.follower.journal is not None and standby.built is not None, "its journal", 60)
        own = standby.follower.journal
        assert own is not None
        stops, end = 0, time.monotonic() + 60
        while standby.taken < own.next_sequence:
            standby.check()
            assert time.monotonic() < end, f"at {standby.taken} of {own.next_sequence} after {stops} stops"
            time.sleep(rng.uniform(0, 0.002))  # how far it is: that is drawn
            standby.closing()
            standby.opened(own, own.next_sequence, None)
            stops += 1
        assert stops > 20
        made = np.concatenate([reader.read(1 << 16).view(EVENT) for reader in replica.readers[-1:]])
        replayed: list[np.ndarray] = []
        replay_journal(folder, observe=lambda outputs: replayed.append(outputs.copy()))
        assert made.tobytes() == np.concatenate(replayed).tobytes()


@pytest.mark.slow
def test_a_standby_whose_outputs_are_not_the_leaders_starts_over(cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """Its state is changed behind its back: the next heartbeat tells, and it is made anew from the journal."""
    with ExitStack() as stack:
        journal = stack.enter_context(journal_of_a_run(cluster, tmp_path))
        replica = Replica(node_text(cluster, "standby", tmp_path / "s", 1, capacity=65536), tmp_path / "standby", stack)
        batch = np.concatenate([part.copy() for part in JournalReader(journal.folder).batches()])
        half = len(batch) // 2
        first = stack.enter_context(Journal.create(tmp_path / "leader", 0, segment_records=1 << 14, sync="none"))
        shutil.copytree(journal.folder / "configs", first.folder / "configs")
        first.append(batch[:half])
        truth = replica.build(None)
        truth.shard.step(batch.view(ANY_VIEW), 0, half)
        server = ReplicationServer(options("leader")).start()
        stack.callback(server.stop)
        leading = Leading(first, 1, stored=lambda: truth.output.published, digest=lambda n: outputs_digest(truth.output, n))
        server.lead(0, leading)
        standby = replica.standby.start()
        standby.follow(server.address)
        until(lambda: standby.taken == half and standby.compared > 2, "half of it, compared", 60)
        assert standby.diverged == 0
        assert standby.shard is not None
        for name in standby.shard.arrays._fields:
            if name[0] == "s" and name[1:].isdigit():
                getattr(standby.shard.arrays, name).view(np.uint8)[:] = 0  # nobody can see this yet
        for at in range(half, len(batch), 50):
            seen = standby.compared
            truth.shard.step(batch.view(ANY_VIEW), at, min(at + 50, len(batch)))
            first.append(batch[at : at + 50])
            until(lambda: standby.compared > seen + 2 or standby.diverged, "a comparison", 60)  # noqa: B023
        assert standby.diverged == 1
        until(lambda: standby.taken == len(batch) and standby.follower.state == "following", "a new beginning", 60)
        seen = standby.compared
        until(lambda: standby.compared > seen + 2, "outputs that are compared again")
        assert standby.diverged == 1
        assert shard_digest(standby.shard) == shard_digest(truth.shard)
        assert standby.status()["diverged"] == 1


@pytest.mark.slow
def test_a_standby_that_cannot_go_on_says_so_and_tries_again(cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """A document of its journal cannot be read; it is put back; and outputs that it held are overwritten."""
    with ExitStack() as stack:
        journal = stack.enter_context(changing_journal(cluster, tmp_path, every=500))
        folder = tmp_path / "standby"
        shutil.copytree(journal.folder, folder)
        missing = folder / "configs" / "3.json"
        away = missing.rename(folder / "away")
        replica = Replica(node_text(cluster, "standby", tmp_path / "s", 1, capacity=65536), folder, stack)
        standby = replica.standby.start()
        until(lambda: standby.failure is not None, "the reason", 60)
        assert "the journal needs configuration 3" in str(standby.failure)
        with pytest.raises(StandbyError, match="the journal needs configuration 3"):
            standby.check()
        away.rename(missing)
        until(lambda: standby.failure is None and standby.taken == journal.next_sequence, "it to go on", 60)
        state = shard_digest(standby.shard)  # type: ignore[arg-type]
        held = standby.built.output.arrays.words  # type: ignore[union-attr]
        built = len(replica.readers)
        held[standby._stepping.held._base + R_STATE] = 3  # type: ignore[union-attr]
        standby.stored(10)
        until(lambda: len(replica.readers) > built and standby.taken == journal.next_sequence, "a new beginning", 60)
        assert standby.failure is None
        assert shard_digest(standby.shard) == state  # type: ignore[arg-type]


@contextmanager
def changing_journal(cluster: str, folder: Path, every: int) -> Iterator[Journal]:  # noqa: F811
    """A journal in which the configuration changes after so many events each."""
    with journal_of_a_run(cluster, folder) as run:
        events = np.concatenate([part.copy() for part in JournalReader(run.folder).batches()])
    documents_folder = folder / "changing"
    with Journal.create(documents_folder, 0, segment_records=1 << 14, sync="none") as journal:
        documents = Documents(documents_folder)
        text = node_text(cluster, "standby", folder / "s", 1, capacity=65536)
        for version, first in enumerate(range(0, len(events), every)):
            window = f"window = {2 + version % 50}"
            documents.write(Document.of(parse_config(text.replace("window = 10", window)), version, {}, "sequential"))
            if version:
                journal.append(config_event(version, version % 2, False, 0))
            journal.append(events[first : first + every])
        yield journal


def server_of(stack: ExitStack, journal: Journal, epoch: int) -> ReplicationServer:
    server = ReplicationServer(options("leader")).start()
    stack.callback(server.stop)
    server.lead(0, Leading(journal, epoch))
    return server


@contextmanager
def journal_of_a_run(cluster: str, folder: Path) -> Iterator[Journal]:  # noqa: F811
    """The journal that a node has written of a simulated market."""
    config = parse_config(node_text(cluster, "source", folder / "source", 3000, capacity=65536))
    node = Node(config, GENERATORS)
    try:
        node.start()
        until(lambda: node.finished, "the end of the market", 60)
    finally:
        node.stop()
    with Journal.open(folder / "source" / "journal" / "source" / "shard-0", 0, sync="none") as journal:
        yield journal
