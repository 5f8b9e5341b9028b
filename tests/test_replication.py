"""Replication: a standby's journal becomes and stays the leader's, byte by byte, whatever happens to the line and to either side."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replicas import SHARD, Pair, Relay, events, new_journal, options, pair, same_journals, threads_of_replication, until
from test_journal import SEGMENT
from toxiproxy import Toxiproxy, toxiproxy

from tickmesh.node.event import EVENT, EventArray, Kind
from tickmesh.node.follower import Alone, JournalFollower
from tickmesh.node.journal import Journal, JournalBusy, JournalError, JournalReader, find_end, truncate, verify
from tickmesh.node.replication import Leading, ReplicationServer, SnapshotFile, last_common
from tickmesh.node.replication_link import TlsFiles

__all__ = ["toxiproxy"]

# ---------------------------------------------------------------- truncating


@pytest.mark.parametrize("end", [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT, 2 * SEGMENT + 7, 3 * SEGMENT])
def test_a_journal_is_cut_at_a_sequence(tmp_path: Path, end: int) -> None:
    total = 3 * SEGMENT
    new_journal(tmp_path, total).close()
    found = truncate(tmp_path, end)
    assert found.next_sequence == end
    report = verify(tmp_path)
    assert report.ok, report
    assert report.next_sequence == end
    with Journal.open(tmp_path, SHARD) as journal:
        assert journal.next_sequence == end
        journal.append(events(end, total - end))
    assert verify(tmp_path).ok
    assert b"".join(b.tobytes() for b in JournalReader(tmp_path).batches()) == events_twin(total, end)


def events_twin(total: int, cut: int) -> bytes:
    return events(0, total)[:cut].tobytes() + events(cut, total - cut).tobytes()


def test_a_journal_is_not_cut_where_it_is_not(tmp_path: Path) -> None:
    with new_journal(tmp_path, 100), pytest.raises(JournalBusy):
        truncate(tmp_path, 10)
    with pytest.raises(ValueError, match="cannot end at 101"):
        truncate(tmp_path, 101)


class Crash(Exception):
    """The process ends here."""


@pytest.mark.parametrize("end", [SEGMENT + 100, 2 * SEGMENT, 0])
def test_a_crash_while_it_is_cut_leaves_a_journal_that_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: int) -> None:
    """Ended before each of its steps in turn."""
    total = 3 * SEGMENT + 50
    for step in itertools.count():
        folder = tmp_path / str(step)
        with Journal.create(folder, SHARD, segment_records=SEGMENT) as journal:
            journal.append(events(0, total))
        left = [step]
        with monkeypatch.context() as patched:
            for module, name in ((os, "fsync"), (os, "fdatasync"), (os, "pwrite"), (Path, "unlink")):
                patched.setattr(module, name, crashing(getattr(module, name), left))
            try:
                truncate(folder, end)
                break
            except Crash:
                pass
        reached = find_end(folder).next_sequence
        assert end <= reached <= total
        with Journal.open(folder, SHARD) as journal:
            assert journal.next_sequence == reached
        assert verify(folder).ok
        assert truncate(folder, end).next_sequence == end
    assert step > 3


def crashing(step: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        if left[0] == 0:
            raise Crash
        left[0] -= 1
        return step(*arguments, **named)

    return call


@settings(deadline=None, max_examples=60)
@given(end=st.integers(0, SEGMENT - 1), pages=st.sets(st.integers(0, 8)))
def test_a_power_cut_while_it_is_cut(tmp_path_factory: pytest.TempPathFactory, end: int, pages: set[int]) -> None:
    """Of the pages that were cleared only some are on disk; what was said in the header before is."""
    folder = tmp_path_factory.mktemp("power")
    with Journal.create(folder, SHARD, segment_records=SEGMENT) as journal:
        journal.append(events(0, SEGMENT))
    file = folder / "0000000000.journal"
    before = file.read_bytes()
    truncate(folder, end)
    after = bytearray(file.read_bytes())
    for page in pages:
        place = slice(4096 * (1 + page), 4096 * (2 + page))
        after[place] = before[place]
    file.write_bytes(after)
    reached = find_end(folder).next_sequence
    assert end <= reached <= SEGMENT
    assert truncate(folder, end).next_sequence == end
    assert verify(folder).ok


@settings(deadline=None, max_examples=200)
@given(low=st.integers(0, 1000), length=st.integers(0, 2000), data=st.data())
def test_the_last_common_sequence_is_found_in_few_questions(low: int, length: int, data: st.DataObject) -> None:
    high = low + length
    common = data.draw(st.integers(low - 1, high))
    asked: list[int] = []

    def equal(sequence: int) -> bool:
        assert low <= sequence <= high
        asked.append(sequence)
        return sequence <= common

    assert last_common(low, high, equal) == (common if common >= low else None)
    assert len(asked) <= 26
    assert len(asked) <= 2 * max(1, high - common).bit_length() + 3 or common < low


# ---------------------------------------------------------------- following


def test_a_standby_gets_what_there_is_and_what_comes(tmp_path: Path) -> None:
    with pair(tmp_path, 3 * SEGMENT + 17) as both:
        both.follow()
        both.caught_up()
        for count in (1, 2, 500, 3000):
            both.append(count)
            both.caught_up()
        until(lambda: both.server.status()[0]["sequence"] == both.journal.next_sequence, "acknowledgement")
        status = both.server.status()[0]
        assert (status["node"], status["lag"], status["epoch"]) == ("n2", 0, 1)
        both.finish()
    assert not threads_of_replication()


def test_an_empty_journal_is_followed_from_its_first_event(tmp_path: Path) -> None:
    with pair(tmp_path) as both:
        both.follow()
        until(lambda: both.follower.state == "following", "connection")
        both.append(10)
        both.finish()


def test_a_standby_goes_on_where_it_was(tmp_path: Path) -> None:
    with pair(tmp_path, 700) as both:
        both.follow()
        both.caught_up()
        both.follower.stop()
        both.append(2 * SEGMENT)
        both.new_follower()
        both.follow()
        both.caught_up()
        assert both.follower.counters.events == 2 * SEGMENT
        both.finish()


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(0, 120_000), min_size=1, max_size=4), count=st.integers(1, 1500), more=st.integers(0, 600))
def test_it_goes_on_after_a_cut_at_any_byte(tmp_path_factory: pytest.TempPathFactory, cuts: list[int], count: int, more: int) -> None:
    folder = tmp_path_factory.mktemp("cut")

    def harm(number: int, passed: int, data: bytes) -> bytes:
        if number >= len(cuts) or passed + len(data) <= cuts[number]:
            return data
        return data[: max(0, cuts[number] - passed)]

    with pair(folder, count) as both, Relay(both.server.port, harm) as relay:
        both.follow(relay.address)
        both.append(more)
        both.finish()


@settings(deadline=None, max_examples=25)
@given(places=st.lists(st.integers(0, 60_000), min_size=1, max_size=3), bit=st.integers(0, 7), count=st.integers(900, 1500))
def test_a_damaged_byte_is_found_and_asked_for_again(
    tmp_path_factory: pytest.TempPathFactory, places: list[int], bit: int, count: int
) -> None:
    folder = tmp_path_factory.mktemp("damage")
    done: set[int] = set()

    def harm(number: int, passed: int, data: bytes) -> bytes:
        if number >= len(places) or not passed <= places[number] < passed + len(data):
            return data
        changed = bytearray(data)
        changed[places[number] - passed] ^= 1 << bit
        done.add(number)
        return bytes(changed)

    with pair(folder, count) as both, Relay(both.server.port, harm) as relay:
        both.follow(relay.address)
        both.caught_up()
        assert not done or both.follower.counters.connects > 1 or both.follower.counters.damaged == 0
        both.finish()


# ---------------------------------------------------------------- late, slow, killed


def test_a_late_standby_reads_old_segments_from_disk(tmp_path: Path) -> None:
    with pair(tmp_path, 40 * SEGMENT + 3) as both:
        until(lambda: len(both.journal.finished()) == 40, "the helper")
        both.follow()
        both.append(SEGMENT)
        both.caught_up()
        assert len(both.server.status()) == 1
        both.finish()


def test_a_standby_that_takes_nothing_is_given_up_and_catches_up_later(tmp_path: Path) -> None:
    """Meanwhile the leader appends as ever: its journal is all that a sender reads."""
    frozen = threading.Event()

    def harm(number: int, passed: int, data: bytes) -> bytes:
        if number == 0 and passed > 200_000:
            frozen.wait(30)
            return b""
        return data

    total = 400_000
    with pair(tmp_path, timeout_s=0.3) as both, Relay(both.server.port, harm) as relay:
        both.follow(relay.address)
        until(lambda: both.follower.state == "following", "connection")
        for _ in range(total // 4000):
            both.append(4000)
        assert both.journal.next_sequence == total
        until(lambda: both.follower.counters.connects > 1, "another connection")
        frozen.set()
        both.finish()


FOLLOWER = """
import sys
from pathlib import Path
from tickmesh.node.follower import JournalFollower
from tickmesh.node.replication_link import LinkOptions
follower = JournalFollower(3, Path(sys.argv[1]), LinkOptions("test", "n2", heartbeat_s=0.02, timeout_s=1.0), sync="none").start()
follower.follow(sys.argv[2])
sys.stdin.read()
"""
LEADER = """
import sys
from pathlib import Path
from tickmesh.node.journal import Journal
from tickmesh.node.replication import Leading, ReplicationServer
from tickmesh.node.replication_link import LinkOptions
sys.path.insert(0, sys.argv[3])
from replicas import SEGMENT, SHARD, events, new_journal
folder = Path(sys.argv[1])
journal = Journal.open(folder, SHARD, sync="none") if any(folder.glob("*.journal")) else new_journal(folder)
server = ReplicationServer(LinkOptions("test", "n1", heartbeat_s=0.02, timeout_s=1.0)).start()
server.lead(SHARD, Leading(journal, int(sys.argv[2])))
print(server.address, flush=True)
while True:
    journal.append(events(journal.next_sequence, 100))
"""


@contextmanager
def child(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code, *(str(argument) for argument in arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def records(folder: Path) -> int:
    """Events in a journal that somebody else may be writing."""
    try:
        return find_end(folder).next_sequence
    except JournalError:
        return 0


def test_a_killed_follower_goes_on_where_its_journal_ends(tmp_path: Path) -> None:
    with pair(tmp_path, 1000) as both:
        for _ in range(3):
            with child(FOLLOWER, both.standby, both.server.address) as process:
                sessions = both.server.status
                before = records(both.standby)
                until(lambda: sessions() and sessions()[0]["sequence"] > before, "events", 120)  # noqa: B023
                both.append(20_000)
                process.kill()
                process.wait()
        both.follow()
        both.finish()
        assert not both.follower.counters.cut


def test_a_killed_leader_comes_back_and_is_followed_on(tmp_path: Path) -> None:
    leader, standby = tmp_path / "leader", tmp_path / "standby"
    follower = JournalFollower(SHARD, standby, options("n2"), sync="none").start()
    try:
        for epoch in (1, 2):
            with child(LEADER, leader, epoch, Path(__file__).parent) as process:
                assert process.stdout is not None
                follower.follow(process.stdout.readline().strip())
                before = follower.next_sequence
                until(lambda: follower.next_sequence > before + 5000, "events", 60)  # noqa: B023
                process.kill()
                process.wait()
        assert follower.epoch == 2
        with ExitStack() as stack:
            journal = stack.enter_context(Journal.open(leader, SHARD, sync="none"))
            server = ReplicationServer(options()).start()
            stack.callback(server.stop)
            server.lead(SHARD, Leading(journal, 3))
            follower.follow(server.address)
            until(lambda: follower.next_sequence == journal.next_sequence, "the rest")
    finally:
        follower.stop()
    same_journals(leader, standby)


# ---------------------------------------------------------------- who leads


@settings(deadline=None, max_examples=12)
@given(common=st.integers(0, 1200), tail=st.integers(1, 1200), more=st.integers(0, 1200))
def test_a_deposed_leaders_tail_is_cut(tmp_path_factory: pytest.TempPathFactory, common: int, tail: int, more: int) -> None:
    """The old leader journalled events that reached nobody; the new one went on from what it had, in its own way."""
    folder = tmp_path_factory.mktemp("tail")
    with pair(folder, common) as both:
        both.follow()
        until(lambda: both.follower.state == "following", "connection")
        both.caught_up()
        both.follower.stop()
        new = Journal.open(both.standby, SHARD, sync="none")
        both.server.resign(SHARD)
        both.append(tail)
        both.journal.close()
        with ExitStack() as stack:
            stack.callback(new.close)
            new.append(events(10**6, more))
            server = ReplicationServer(options("n2")).start()
            stack.callback(server.stop)
            server.lead(SHARD, Leading(new, 2))
            deposed = JournalFollower(SHARD, both.leader, options("n1"), sync="none").start()
            stack.callback(deposed.stop)
            deposed.follow(server.address)
            until(lambda: deposed.counters.cut and deposed.next_sequence == new.next_sequence, "the tail to be cut")
            assert (deposed.counters.cut, deposed.epoch) == (tail, 2)
            new.append(events(2 * 10**6, 100))
            until(lambda: deposed.next_sequence == new.next_sequence, "what comes then")
        same_journals(both.standby, both.leader)


def test_a_leader_of_an_earlier_epoch_is_refused_and_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with pair(tmp_path, 100, epoch=4) as both:
        both.server._superseded = lambda shard, epoch: told.append((shard, epoch))
        both.follow()
        both.caught_up()
        assert both.follower.epoch == 4
        both.follower.follow(both.server.address, epoch=5)
        until(lambda: both.follower.state == "refused", "refusal")
        assert "followed by 5" in both.follower.error
        assert told[0] == (SHARD, 5)
        both.append(10)
        both.follower.stop()
        again = both.new_follower()  # it remembers
        assert again.epoch == 5
        both.follow()
        until(lambda: again.state == "refused", "refusal")
        assert again.next_sequence == 100
        both.server.lead(SHARD, Leading(both.journal, 6))
        both.finish()


def test_frames_of_an_earlier_epoch_are_dropped(tmp_path: Path) -> None:
    """The standby learns of a later epoch while it is connected: what the old leader still sends is not taken."""
    with pair(tmp_path, 100, epoch=1) as both:
        both.follow()
        both.caught_up()
        both.follower._raise_epoch(2)
        both.append(50)
        until(lambda: both.follower.counters.stale or both.follower.state == "refused", "a dropped frame")
        assert both.follower.next_sequence == 100
        both.server.lead(SHARD, Leading(both.journal, 2))
        both.finish()


def test_another_journal_is_not_mixed_in(tmp_path: Path) -> None:
    with pair(tmp_path, 100) as both:
        new_journal(both.standby, 50).close()
        both.follow()
        until(lambda: both.follower.state == "refused", "refusal")
        assert "another journal" in both.follower.error
        assert records(both.standby) == 50


@pytest.mark.parametrize(("theirs", "reason"), [({"cluster": "other"}, "cluster test"), ({"token": "wrong"}, "token")])
def test_strangers_are_refused(tmp_path: Path, theirs: dict[str, str], reason: str) -> None:
    with pair(tmp_path, 100, token="secret") as both:
        stranger = replace(options("n3", token="secret"), **theirs)
        both.follower = JournalFollower(SHARD, both.standby, stranger, sync="none")
        try:
            both.follow()
            until(lambda: both.follower.state == "refused", "refusal")
            assert reason in both.follower.error
            assert both.follower.journal is None
        finally:
            both.follower.stop()


def test_a_leader_that_does_not_know_the_token_is_refused(tmp_path: Path) -> None:
    with pair(tmp_path, 100) as both:
        careful = JournalFollower(SHARD, both.standby, options("n2", token="secret"), sync="none")
        try:
            careful.start().follow(both.server.address)
            until(lambda: careful.state == "refused", "refusal")
            assert "does not know our token" in careful.error
        finally:
            careful.stop()


def test_the_token_is_not_sent(tmp_path: Path) -> None:
    seen = bytearray()

    def harm(number: int, passed: int, data: bytes) -> bytes:
        seen.extend(data)
        return data

    with pair(tmp_path, 10, token="secret-token") as both, Relay(both.server.port, harm) as relay:
        both.follow(relay.address)
        both.finish()
    assert b"WELCOME" not in seen
    assert seen
    assert b"secret-token" not in seen


@pytest.fixture(scope="module")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    """A certificate authority and a certificate for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("tls")
    names = {name: folder / name for name in ("ca.key", "ca.pem", "node.key", "node.csr", "node.pem", "san")}
    names["san"].write_text("subjectAltName=IP:127.0.0.1\n")
    run = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    sign = ["openssl", "x509", "-req", "-in", "node.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-extfile", "san", "-out", "node.pem"]
    for command in (
        [*run, "-x509", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem"],
        [*run, "-subj", "/CN=node", "-keyout", "node.key", "-out", "node.csr"],
        sign,
    ):
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return TlsFiles(names["node.pem"], names["node.key"], names["ca.pem"])


def test_tls_both_ways(tmp_path: Path, tls_files: TlsFiles) -> None:
    seen = bytearray()

    def harm(number: int, passed: int, data: bytes) -> bytes:
        seen.extend(data)
        return data

    with pair(tmp_path, 20_000, tls=tls_files, token="t") as both, Relay(both.server.port, harm) as relay:
        both.follow(relay.address)
        for _ in range(20):
            both.append(1000)
        both.finish()
    assert events(0, 20_000)[:1].tobytes() not in seen


def test_without_our_certificate_nobody_gets_in(tmp_path: Path, tls_files: TlsFiles) -> None:
    with pair(tmp_path, 100, tls=tls_files) as both:
        plain = JournalFollower(SHARD, both.standby, options("n2"), sync="none")
        try:
            plain.start().follow(both.server.address)
            until(lambda: plain.counters.connects > 1, "attempts")
            assert plain.journal is None
        finally:
            plain.stop()


# ---------------------------------------------------------------- documents and snapshots


def config_event(version: int) -> EventArray:
    event = np.zeros(1, EVENT)
    event["kind"], event["id"] = Kind.CONFIG, version
    return event


def document(folder: Path, version: int, text: str) -> None:
    (folder / "configs").mkdir(exist_ok=True)
    (folder / "configs" / f"{version}.json").write_text(text)


class Watching(Alone):
    """Sees which documents are there when events come."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen, self.snapshots = folder, set[str](), list[Path]()

    def stored(self, outputs: int, digest: int = 0) -> None:
        kinds = {int(k) for batch in JournalReader(self.folder).batches() for k in batch["kind"]}
        if Kind.CONFIG in kinds:
            assert (self.folder / "configs" / "7.json").exists()
            self.seen.add("7")

    def opened(self, journal: Journal, valid: int, snapshot: Path | None) -> None:
        if snapshot:
            self.snapshots.append(snapshot)


def test_the_document_comes_before_the_event_that_names_it(tmp_path: Path) -> None:
    with pair(tmp_path, 10) as both:
        big = "x" * 3_000_000
        both.new_follower(Watching(both.standby))
        document(both.leader, 7, big)
        both.journal.append(config_event(7))
        both.append(5)
        both.follow()
        both.finish()
        assert (both.standby / "configs" / "7.json").read_text() == big
        assert both.follower._replica.seen == {"7"}  # type: ignore[attr-defined]


def test_a_missing_document_stops_the_standby_and_says_so(tmp_path: Path) -> None:
    with pair(tmp_path, 10) as both:
        both.follow()
        both.caught_up()
        both.journal.append(config_event(7))
        until(lambda: both.follower.state == "refused", "refusal")
        assert "7.json is missing" in both.follower.error
        assert both.follower.next_sequence == 10
        document(both.leader, 7, "{}")
        both.finish()


def dropped(both: Pair, segments: int) -> None:
    """The leader's oldest segments are deleted."""
    until(lambda: len(both.journal.finished()) >= segments, "the helper")
    assert both.journal.drop_before(segments * SEGMENT) == segments


def test_what_is_not_kept_needs_a_snapshot(tmp_path: Path) -> None:
    with pair(tmp_path, 5 * SEGMENT) as both:
        dropped(both, 2)
        both.follow()
        until(lambda: both.follower.state == "refused", "refusal")
        assert "there is no snapshot" in both.follower.error


@pytest.mark.parametrize("had", [0, 100])
def test_snapshot_and_tail(tmp_path: Path, had: int) -> None:
    """A standby with nothing, or with events that are not kept any more, gets the snapshot's file and the journal from its segment on."""
    with pair(tmp_path, had) as both:
        watching = Watching(both.standby)
        if had:
            both.follow()
            both.caught_up()
            both.follower.stop()
        both.append(5 * SEGMENT + 40)
        dropped(both, 2)
        file = tmp_path / "snapshot-1900.bin"
        file.write_bytes(np.random.default_rng(1).bytes(3_900_001))
        document(both.leader, 3, "{}")
        at = 3 * SEGMENT + 364
        both.server.lead(SHARD, Leading(both.journal, 1, snapshot=lambda: SnapshotFile(file, at)))
        both.new_follower(watching)
        both.follow()
        both.caught_up()
        both.append(100)
        both.caught_up()
        assert watching.snapshots == [both.standby / "snapshots" / file.name]
        assert watching.snapshots[0].read_bytes() == file.read_bytes()
        assert (both.standby / "configs" / "3.json").exists()
        assert JournalReader(both.standby).first_sequence == 3 * SEGMENT
        both.follower.stop()
        both.server.stop()
        both.journal.drop_before(3 * SEGMENT)
        both.journal.close()
        same_journals(both.leader, both.standby)


# ---------------------------------------------------------------- the line, by Toxiproxy


def test_a_bad_line(tmp_path: Path, toxiproxy: Toxiproxy) -> None:
    """Latency, slices, a slow line, resets and a time without any line, by Toxiproxy."""
    with pair(tmp_path, 2000) as both:
        proxy = toxiproxy.proxy(both.server.port)
        both.follow(proxy.address)
        both.caught_up()
        for toxic in (
            {"type": "latency", "attributes": {"latency": 30, "jitter": 20}},
            {"type": "slicer", "attributes": {"average_size": 50, "size_variation": 40, "delay": 10}},
            {"type": "bandwidth", "attributes": {"rate": 500}},
            {"type": "reset_peer", "attributes": {"timeout": 20}},
            {"type": "timeout", "attributes": {"timeout": 0}},
        ):
            with proxy.toxic(toxic):
                both.append(30_000 if toxic["type"] == "bandwidth" else 500)  # a frame that takes longer than the timeout
                if toxic["type"] in ("latency", "slicer", "bandwidth"):
                    both.caught_up()
                else:
                    connects = both.follower.counters.connects
                    until(lambda: both.follower.counters.connects > connects, "another connection")  # noqa: B023
        both.finish()
