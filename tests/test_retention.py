"""What is kept of a journal: limits by size and age, and what no limit takes away."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from nats_fixtures import nats_server  # noqa: F401
from nodes import cluster, finish, multicast_source, node_config, outputs_made, running, simulator_source, stream, until  # noqa: F401
from test_journal import SEGMENT, events, make, sequences

from tickmesh.node.errors import NodeError
from tickmesh.node.journal import Journal, JournalReader, verify
from tickmesh.node.process import Node
from tickmesh.node.retention import Retention
from tickmesh.node.telemetry import read_telemetry, telemetry_path
from tickmesh.ops.servers import NatsServer
from tickmesh.ops.up import GENERATORS


def filled(folder: Path, segments: int) -> Journal:
    """A journal with so many full segments and one event in the next."""
    journal = Journal.create(folder, int(folder.name[-1]), segment_records=SEGMENT, sync="none")
    journal.append(events(0, segments * SEGMENT + 1))
    until(lambda: len(journal.finished()) == segments, "the helper")
    return journal


def all_taken(retention: Retention, outputs: int = 0) -> None:
    """The shard has taken everything and put out so much."""
    for _ in range(2):
        retention.mark(retention.journal.next_sequence, outputs)


def test_the_oldest_segments_go_beyond_the_size(tmp_path: Path) -> None:
    with filled(tmp_path / "shard-3", 6) as journal:
        until(lambda: len(list(journal.folder.glob("*.journal"))) == 10, "the segments ahead")
        retention = Retention(journal, keep_bytes=7 * journal.disk_bytes() // 10)
        all_taken(retention)
        assert (retention.trim(None), retention.dropped) == (3, 3)
        assert retention.trim(None) == 0
        assert not retention.short
    assert JournalReader(journal.folder).first_sequence == 3 * SEGMENT
    assert sequences(journal.folder) == list(range(3 * SEGMENT, 6 * SEGMENT + 1))
    assert verify(journal.folder).ok
    with Journal.open(journal.folder, 3) as journal:
        assert journal.next_sequence == 6 * SEGMENT + 1


def test_no_limit_keeps_everything(tmp_path: Path) -> None:
    with filled(tmp_path / "shard-3", 3) as journal:
        retention = Retention(journal)
        all_taken(retention)
        assert retention.trim(None, now_s=time.time() + 10**9) == 0


def test_old_segments_go_by_age(tmp_path: Path) -> None:
    with filled(tmp_path / "shard-3", 4) as journal:
        retention = Retention(journal, keep_s=3600)
        all_taken(retention)
        assert retention.trim(None) == 0
        for segment in journal.finished()[:2]:
            os.utime(segment.path, (time.time() - 4000,) * 2)
        assert retention.trim(None) == 2
    assert sequences(journal.folder)[0] == 2 * SEGMENT


def test_what_is_not_delivered_stays(tmp_path: Path) -> None:
    """Outputs 1 to 100 come from the first two segments; the stream has 99 of them."""
    with filled(tmp_path / "shard-3", 5) as journal:
        retention = Retention(journal, keep_bytes=1)
        retention.mark(2 * SEGMENT, 40)
        retention.mark(4 * SEGMENT, 100)
        retention.mark(5 * SEGMENT, 180)
        assert retention.trim(99) == 0
        assert retention.short
        assert retention.trim(100) == 2
        assert retention.trim(180) == 2
        assert sequences(journal.folder)[0] == 4 * SEGMENT


def test_what_a_restart_needs_stays_and_the_run_before_goes_first(tmp_path: Path) -> None:
    make(tmp_path / "shard-3.previous", 2 * SEGMENT - 1)
    with filled(tmp_path / "shard-3", 3) as journal:
        retention = Retention(journal, keep_bytes=1, needed_whole=True)
        all_taken(retention)
        assert retention.trim(None) == 2
        assert retention.short
    assert not (tmp_path / "shard-3.previous").exists()
    assert sequences(journal.folder) == list(range(3 * SEGMENT + 1))


def test_what_lies_before_two_snapshots_goes_once_it_is_delivered(tmp_path: Path) -> None:
    with filled(tmp_path / "shard-3", 3) as journal:
        retention = Retention(journal, keep_bytes=1, needed_whole=True)
        all_taken(retention)
        retention.covered = (2 * SEGMENT + 5, 70)
        assert retention.trim(69) == 0
        assert retention.trim(70) == 2
        assert sequences(journal.folder)[0] == 2 * SEGMENT


def test_a_running_node_trims_its_journal(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """Segments of 1 MiB, of which a long simulation fills many; what the stream holds is whole nevertheless."""
    config = node_config(cluster, tmp_path, simulator_source(60_000), extra="", cluster_extra="")
    config = config.model_copy(update={"journal": config.journal.model_copy(update={"keep_mb": 6})})
    with running(config, nats_server.url) as node:
        finish(node)
        folder = tmp_path / "journal" / "n1" / "shard-0"
        before = len(list(folder.glob("*.journal")))

        def trimmed() -> bool:
            node.trim_journals()
            return sum(path.stat().st_size for path in folder.glob("*.journal")) <= 6 << 20

        until(trimmed, "a journal within its limit")
        node.mirror()
        shard = read_telemetry(telemetry_path(cluster, "n1"))["shards"][0]
        made = outputs_made(node)
        outputs, missing = stream(nats_server.url, cluster, made)
    assert (len(outputs), missing) == (made, [])
    assert 0 < shard["journal_dropped"] < before
    assert JournalReader(folder).first_sequence > 0
    assert verify(folder).ok


def test_a_journal_without_its_beginning_is_not_restored(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    folder = tmp_path / "journal" / "n1" / "shard-0"
    with filled(folder, 3) as journal:
        assert journal.drop_before(SEGMENT) == 1
    config = node_config(cluster, tmp_path, multicast_source(("udp://239.77.1.1:23456",)))
    with pytest.raises(NodeError, match=r"oldest segments, and no snapshot fits it\): .* journal\.restore = false"):
        Node(config, GENERATORS, {"events": nats_server.url})
    afresh = config.model_copy(update={"journal": config.journal.model_copy(update={"restore": False})})
    with running(afresh, nats_server.url) as node:
        assert node.journals[0].next_sequence == 0
    assert (tmp_path / "journal" / "n1" / "shard-0.previous").exists()
