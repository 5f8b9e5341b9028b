"""Documents of configuration versions: complete, on the disk, and kept as long as something needs them."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from replicas import until

from tickmesh.control.changes import changed_keys, restart_needed
from tickmesh.control.config import parse_config
from tickmesh.node.event import EVENT
from tickmesh.node.journal import Journal, JournalReader
from tickmesh.node.versions import Document, DocumentError, Documents
from tickmesh.ops.config_cmd import schema_rows
from tickmesh.transports.toolbox import zeros_aligned

TEXT = """
[cluster]
name = "c"
[data_sources.a]
type = "multicast"
endpoint = "udp://239.1.1.1:26400"
data_format = "json"
tick_size = 0.01
messages = [{ match = { e = "t" }, event = "trade", fields = { symbol = "s", price = { path = "p", scale = "0.001" } } }]
[processing.calculations.mine]
use = "sub/mine.py:one"
decay = 0.5
[processing.bars.second]
interval_ms = 1000
[risk]
max_notional = "1000000.01"
[delivery.events]
method = "nats"
per_event = true
"""
CODE = """from tickmesh.node.calculation import calculation


@calculation(inputs="trade")
def one(event, state, *, decay: float = 1.0):
    return decay
"""


@pytest.fixture
def document(tmp_path: Path) -> Document:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.py").write_text(CODE)
    return Document.of(parse_config(TEXT, file=tmp_path / "node.toml"), 7, {"gone": 0})


def test_a_document_read_again_is_the_same_configuration(document: Document, tmp_path: Path) -> None:
    again = Document.read(document.text())
    assert again.config.model_dump() == document.config.model_dump()
    assert (again.version, dict(again.code), dict(again.sources)) == (7, {"sub/mine.py": CODE}, {"gone": 0, "a": 1})
    assert again.same_market(document)
    (tmp_path / "sub" / "mine.py").write_text(CODE.replace("return decay", "return 2.0"))
    assert [i.module for i in again.plan().instances] == [i.module for i in document.plan().instances], "its code is its own"
    assert not Document.of(document.config, 8, document.sources).same_market(document)


@pytest.mark.parametrize("damage", ["{", "{}", '{"version": "x"}'])
def test_what_is_no_document_is_refused(document: Document, damage: str) -> None:
    with pytest.raises(DocumentError, match="no document"):
        Document.read(damage)
    parts = json.loads(document.text())
    parts["code"] = {"../evil.py": ""}
    with pytest.raises(DocumentError, match="outside"):
        Document.read(json.dumps(parts))


def test_code_must_lie_inside_and_be_there(tmp_path: Path) -> None:
    for use, reason in (("/x.py:f", "not inside"), ("../x.py:f", "not inside"), ("x.py:f", "cannot be read")):
        config = parse_config(TEXT.replace("sub/mine.py:one", use), file=tmp_path / "node.toml")
        with pytest.raises(DocumentError, match=reason):
            Document.of(config, 1, {})


def test_documents_go_when_no_segment_names_them(document: Document, tmp_path: Path) -> None:
    """Also of versions from before a restart or a takeover, and never one that a header names: a restart would give it another meaning."""
    segment, versions = 512, (7, 8, 9, 12, 13, 14)
    with closing(Journal.create(tmp_path, 0, segment_records=segment, config_version=7, segments_ahead=2)) as journal:
        for version in versions:
            Documents(tmp_path).write(replace(document, version=version))
            journal.config_version = version
            assert journal.append(zeros_aligned(segment, EVENT)) == segment
        documents = Documents(tmp_path)  # of a process that has seen no change
        assert documents.prune() == 0
        until(lambda: journal.drop_before(5 * segment) or JournalReader(tmp_path).first_sequence == 5 * segment, "five segments go")
        oldest = JournalReader(tmp_path).config_version
        assert 7 < oldest <= 14
        assert documents.prune() == sum(version < oldest for version in versions)
        assert documents.versions() == [version for version in versions if version >= oldest]
        assert documents.read(oldest).version == oldest
        assert documents.prune() == 0


ALL_RESTART = ("[cluster]", "[leadership]", "[replication]", "[store]")
LIVE_ALL_THE_SAME = {("[cluster]", "replicas")}
RESTART = {
    "[journal]": {"enabled", "segment_mb", "sync", "restore"},
    "[processing]": {"timer_interval_ms"},
    "[delivery.NAME]": {"method", "embedded", "port", "stream_max_mb", "stream_max_age_s", "replicas", "ring", "ring_capacity"},
}


def test_the_keys_that_need_a_restart() -> None:
    """What is declared live is what Node.apply takes (tests/test_live_config.py); a key that is added here is a decision."""
    rows = [row for row in schema_rows() if row.section not in ALL_RESTART]
    found = {section: {row.key for row in rows if row.section == section and row.change == "restart"} for section in RESTART}
    assert found == RESTART
    assert {row.section for row in rows if row.change == "restart"} == set(RESTART)
    live = {(row.section, row.key) for row in schema_rows() if row.section in ALL_RESTART and row.change != "restart"}
    assert live == LIVE_ALL_THE_SAME


def test_what_needs_a_restart(document: Document) -> None:
    old = document.config
    second = '\n[delivery.ring]\nmethod = "shm"\n[delivery.other]\nmethod = "nats"\ntarget = "nats://h:1"\n'
    text = (
        TEXT.replace('name = "c"', 'name = "d"').replace("decay = 0.5", "decay = 0.6").replace("interval_ms = 1000", "interval_ms = 5")
        + second
    )
    new = parse_config(text)
    assert {(c.path, c.live) for c in changed_keys(old, new)} == {
        ("cluster.name", False), ("processing.calculations.mine.decay", True), ("processing.bars.second.interval_ms", True),
        ("delivery.ring", False), ("delivery.other", True),
    }  # fmt: skip
    reasons = restart_needed(old, new)
    assert [(r.path, r.line) for r in reasons] == [("cluster.name", 3), ("delivery.ring", new.line("delivery", "ring"))]
    assert restart_needed(old, old) == []
