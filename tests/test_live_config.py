"""A running node takes other configurations: real nodes, real servers; what comes out is what the journal says, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from nats_fixtures import nats_server, own_nats_server  # noqa: F401
from nodes import (  # noqa: F401
    SYMBOLS,
    assert_whole,
    cluster,
    node_text,
    outputs_made,
    running,
    simulator_source,
    stream,
    until,
)

from tickmesh.control.config import Config, parse_config
from tickmesh.node.event import EventArray, Kind
from tickmesh.node.journal_replay import replay_journal
from tickmesh.node.process import Node
from tickmesh.node.reload import ChangeRefused
from tickmesh.ops.servers import NatsServer

FLOW = simulator_source(0, pace='"realtime"', rate=20_000)


class Live:
    """A node under load and its configuration's text, of which parts are replaced."""

    def __init__(self, node: Node, text: str, folder: Path, url: str) -> None:
        self.node, self.text, self.folder, self.url, self.version = node, text, folder, url, 0

    def apply(self, *replacements: tuple[str, str]) -> None:
        """Replace parts of the text and apply it as the next version, after some more outputs."""
        text = self.text
        for old, new in replacements:
            assert old in text, old
            text = text.replace(old, new)
        self.more()
        self.node.apply(parse_config(text, file=self.folder / "node.toml"), self.version + 1)
        self.text, self.version = text, self.version + 1

    def more(self, count: int = 300) -> None:
        """Wait until the node has put out some more."""
        before = outputs_made(self.node)

        def done() -> bool:
            self.node.check()
            return outputs_made(self.node) > before + count

        until(done, "more outputs")

    @property
    def journal(self) -> Path:
        return self.node.journals[0].folder


@contextmanager
def live(url: str, name: str, folder: Path, sources: str = FLOW, **more: str) -> Iterator[Live]:
    text = node_text(name, folder / "data", sources, **more)
    with running(parse_config(text, file=folder / "node.toml"), url) as node:
        yield Live(node, text, folder, url)


def assert_replays(one: Live, name: str) -> EventArray:
    """After the end: the stream holds every output once, and the journal gives the very same ones. Returns them."""
    made = outputs_made(one.node)
    outputs, missing = stream(one.url, name, made)
    assert not missing
    assert_whole(outputs, made)
    parts: list[EventArray] = []
    result = replay_journal(one.journal, observe=lambda events: parts.append(events.copy()))
    assert np.concatenate(parts).tobytes() == outputs.tobytes()
    assert result["outputs_total"] == made
    assert [v["version"] for v in result["versions"]][-1] == one.version
    return outputs


def names_of(outputs: EventArray) -> set[int]:
    return {int(c) & 0xFFFFFFFF for c in outputs["id"][outputs["kind"] == Kind.SIGNAL]}


def test_parameters_change_at_one_event(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    with live(nats_server.url, cluster, tmp_path) as one:
        arrays = one.node.shards[0].shard.arrays
        one.apply(("window = 10\n", "window = 20\n"))
        assert one.node.shards[0].shard.arrays is arrays, "no other code"
        one.apply(("window = 20\n", "window = 30\n"))
        one.more()
        assert int(one.node.shards[0].shard.arrays.core["config_version"][0]) == 2
    assert_replays(one, cluster)


def test_a_filter_changes_at_one_event_and_state_goes_on(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    with live(nats_server.url, cluster, tmp_path) as one:
        state = one.node.shards[0].shard.arrays.s0
        one.apply(('use = "book_imbalance"', 'use = "book_imbalance"\nsymbols = ["ALFA"]'))
        assert one.node.shards[0].shard.arrays.s0 is state
        one.more(2000)
        pause = one.node.shards[0].pause_ns
    assert 0 < pause < 1_000_000_000
    outputs = assert_replays(one, cluster)
    plan = one.node.shards[0].shard.plan
    index = next(i.index for i in plan.instances if i.name == "imbalance")
    after = replay_journal(one.journal)["versions"][1]["outputs_before"]
    signals = outputs[(outputs["kind"] == Kind.SIGNAL) & (outputs["id"] == index)]
    before, later = signals[signals["seq"] <= after], signals[signals["seq"] > after]
    assert len(np.unique(before["instrument"])) == len(SYMBOLS)
    assert len(np.unique(later["instrument"])) == 1
