"""The checker finds what is wrong with an output stream, and nothing where nothing is."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats_fixtures import nats_server  # noqa: F401
from nodes import cluster, node_text, running, simulator_source, until  # noqa: F401

from tickmesh.chaos.checker import Report, check_messages, check_stream
from tickmesh.control.config import parse_config
from tickmesh.node.event import EVENT
from tickmesh.node.frames import FrameHeader, encode_frame
from tickmesh.ops.servers import NatsServer
from tickmesh.transports.nats import Login, connect
from tickmesh.transports.nats_reader import StoredMessage


def frame(number: int, first: int, count: int, epoch: int = 1, *, missing: int = 0, shard: int = 0) -> StoredMessage:
    """A message with outputs as a gateway writes it."""
    events = np.zeros(count, EVENT)
    events["seq"] = np.arange(first, first + count)
    data = encode_frame(FrameHeader(shard, epoch, 1, first, count, missing), events.tobytes())
    return StoredMessage(number, "s", {"Epoch": str(epoch), "Out-Seq": str(first + count + missing - 1)}, data)


def fence(number: int, epoch: int) -> StoredMessage:
    return StoredMessage(number, "s", {"Kind": "fence", "Epoch": str(epoch), "Out-Seq": "0"}, b"")


def check(*messages: StoredMessage) -> Report:
    return check_messages(0, messages)


@given(st.lists(st.tuples(st.integers(1, 20), st.booleans()), max_size=20))
def test_a_whole_stream_is_good(runs: list[tuple[int, bool]]) -> None:
    messages, first, epoch = [fence(1, 1)], 1, 1
    for count, takeover in runs:
        if takeover:
            epoch += 1
            messages.append(fence(len(messages) + 1, epoch))
        messages.append(frame(len(messages) + 1, first, count, epoch))
        first += count
    report = check(*messages)
    assert report.good
    assert report.outputs == first - 1
    assert sum(report.epochs.values()) == report.outputs
    assert "none lost" in str(report)


def test_outputs_that_no_message_holds() -> None:
    report = check(frame(1, 1, 10), frame(2, 15, 3))
    assert [(one.fault, one.first, one.last) for one in report.findings] == [("lost", 11, 14)]


def test_outputs_that_are_there_twice() -> None:
    report = check(frame(1, 1, 10), frame(2, 8, 5), frame(3, 1, 2))
    assert [(one.fault, one.first, one.last) for one in report.findings] == [("duplicated", 8, 10), ("duplicated", 1, 2)]
    assert report.outputs == 12


def test_a_message_that_comes_too_late() -> None:
    report = check(frame(1, 1, 10), frame(2, 16, 5), frame(3, 11, 5))
    assert report.counts == {"lost": 1, "out_of_order": 1}


def test_numbers_that_do_not_rise_within_a_message() -> None:
    events = np.zeros(3, EVENT)
    events["seq"] = (1, 3, 2)
    data = encode_frame(FrameHeader(0, 1, 1, 1, 3), events.tobytes())
    assert check(StoredMessage(1, "s", {"Epoch": "1"}, data)).counts == {"out_of_order": 1}


def test_a_deposed_leader_that_writes_all_the_same() -> None:
    report = check(frame(1, 1, 10, 4), fence(2, 5), frame(3, 11, 2, 4), frame(4, 13, 2, 5))
    assert [(one.fault, one.stream_sequence) for one in report.findings] == [("stale_epoch", 3)]


def test_what_the_node_itself_reported_missing_is_no_fault() -> None:
    report = check(frame(1, 1, 10), frame(2, 11, 0, missing=90), frame(3, 101, 5))
    assert report.good
    assert (report.gaps_declared, report.outputs) == (90, 15)


def test_rubbish_and_frames_of_another_shard() -> None:
    report = check(StoredMessage(1, "s", {"Epoch": "1"}, b"hello"), frame(2, 1, 2, shard=7))
    assert report.counts == {"malformed": 2}


@pytest.mark.slow
def test_a_nodes_stream_is_what_its_journal_gives(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    config = parse_config(node_text(cluster, tmp_path, simulator_source(20_000)))
    with running(config, nats_server.url) as node:
        until(lambda: node.finished, "the simulation's end", 120)
        journal = node.journals[0].folder
    report = asyncio.run(_checked(nats_server.url, cluster, journal))
    assert report.good, report
    assert report.compared == report.replayed == report.outputs > 1000

    messages = asyncio.run(_messages(nats_server.url, cluster))
    last = max(number for number, one in enumerate(messages) if len(one.data) > 64)
    altered = bytearray(messages[last].data)
    altered[-1] ^= 1
    forged = StoredMessage(messages[last].sequence, "s", messages[last].headers, bytes(altered))
    found = check_messages(0, [*messages[:last], forged], journal)
    assert found.counts["differing"] == 1
    assert found.findings[0].first == report.last
    short = check_messages(0, messages[:last], journal)
    assert short.counts == {"not_delivered": 1}
    assert short.findings[0].last == report.last


async def _checked(url: str, cluster: str, journal: Path) -> Report:  # noqa: F811
    link = await connect(url, login=Login())
    try:
        return await check_stream(link, cluster, 0, journal, expected=1)
    finally:
        await link.close()


async def _messages(url: str, cluster: str) -> list[StoredMessage]:  # noqa: F811
    from tickmesh.node.frames import stream_name
    from tickmesh.transports.nats_reader import StreamReader, stream_bounds

    link = await connect(url, login=Login())
    try:
        first, last = await stream_bounds(link, stream_name(cluster, 0))
        reader = StreamReader(link, stream_name(cluster, 0), first)
        found = [await reader.next() for _ in range(last - first + 1)]
        await reader.close()
        return found
    finally:
        await link.close()
