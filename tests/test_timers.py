"""Timers: where they fall in a source's events, and what they end in a real node, in a replay, and in the replay of a journal."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats_fixtures import nats_server  # noqa: F401
from nodes import (  # noqa: F401
    assert_whole,
    cluster,
    finish,
    free_endpoints,
    journal_outputs,
    multicast_source,
    node_config,
    outputs_made,
    running,
    stream,
    until,
)
from replays import config_of
from test_decoder import directory, framed
from test_replay import execute, order

from tickmesh.control.config import Config
from tickmesh.node import replay as replays
from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, EventArray, Kind, Told
from tickmesh.node.journal import JournalReader
from tickmesh.node.timers import REWIND_NS, fill_timer, make_clock, timer_in_silence, timer_seen, with_timers
from tickmesh.ops.servers import NatsServer
from tickmesh.transports.toolbox import loop

SECOND = 1_000_000_000
MORNING = 34_200 * SECOND
BARS = "[processing.bars.second]\ninterval_ms = 1000\n"


# ---------------------------------------------------------------- where they fall


def events_at(times: list[int], everywhere: set[int] = frozenset()) -> EventArray:  # type: ignore[assignment]
    events = np.zeros(len(times), EVENT)
    events["ts_event"], events["ts_recv"], events["kind"] = times, np.arange(len(times)), Kind.TRADE
    events["instrument"][list(everywhere)] = ALL_INSTRUMENTS
    return events


def timed(events: EventArray, interval: int, sizes: list[int], source: int = 3) -> EventArray:
    """The events with their timers, batch by batch."""
    clock, parts, first = make_clock(interval), [], 0
    for size in [*sizes, len(events)]:
        batch = events[first : first + size]
        parts.append(with_timers(clock, batch, source, np.zeros(2 * len(batch), EVENT)).copy())
        first += len(batch)
    return np.concatenate(parts)


def timed_twin(times: list[int], everywhere: set[int], interval: int) -> list[tuple[bool, int]]:
    """(is a timer, time) of every event and timer."""
    found, due = [], None
    for number, time in enumerate(times):
        if time > 0 and number not in everywhere and interval:
            if due is not None and time >= due:
                found.append((True, time // interval * interval))
            if due is None or time >= due or time < due - interval - REWIND_NS:
                due = (time // interval + 1) * interval
        found.append((False, time))
    return found


moments = st.one_of(st.integers(0, 10**4), st.integers(0, 3 * REWIND_NS), st.sampled_from([-5, 0, REWIND_NS, 10**18]))


@settings(deadline=None, max_examples=150)
@given(
    st.lists(moments, max_size=40), st.sampled_from([0, 1, 7, 1000, 10**9]), st.lists(st.integers(0, 9), max_size=12),
    st.sets(st.integers(0, 39), max_size=4),
)  # fmt: skip
def test_timers_as_their_twin_for_any_batches(times: list[int], interval: int, sizes: list[int], everywhere: set[int]) -> None:
    everywhere = {number for number in everywhere if number < len(times)}
    found = timed(events_at(times, everywhere), interval, sizes)
    assert [(bool(e["kind"] == Kind.TIMER), int(e["ts_event"])) for e in found] == timed_twin(times, everywhere, interval)
    timers = found[found["kind"] == Kind.TIMER]
    assert np.all(timers["instrument"] == ALL_INSTRUMENTS)
    assert np.all(timers["price"] == 3)


@loop
def _seen(clock, batch, now):  # type: ignore[no-untyped-def]
    timer_seen(clock, batch[0], now)


@loop
def _silence(clock, now):  # type: ignore[no-untyped-def]
    return timer_in_silence(clock, now)


@loop
def _fill(clock, out):  # type: ignore[no-untyped-def]
    fill_timer(clock, np.int64(0), np.int64(0), np.int64(Told.BY_CLOCK), out[0])


def silent_timer(clock: Any) -> int:
    """The time of the TIMER of a silence, which says that the clock told it."""
    out = np.zeros(1, EVENT)
    _fill(clock, out)
    assert (out[0]["kind"], out[0]["aux"]) == (Kind.TIMER, Told.BY_CLOCK)
    return int(out[0]["ts_event"])


def test_a_silent_live_source_goes_on_with_the_hosts_clock() -> None:
    clock, hold = make_clock(SECOND, hold_ns=5_000_000), 5_000_000
    assert not _silence(clock, 10**15), "no event yet: nothing is known of its time"
    event = events_at([MORNING + SECOND // 2])
    with_timers(clock, event, 0, np.zeros(2, EVENT))
    _seen(clock, event, 77 * SECOND)
    assert not _silence(clock, 77 * SECOND + SECOND // 2 + hold - 1)
    assert _silence(clock, 77 * SECOND + SECOND // 2 + hold)
    assert silent_timer(clock) == MORNING + SECOND
    assert not _silence(clock, 77 * SECOND + SECOND // 2 + hold + 1)
    assert _silence(clock, 80 * SECOND)
    assert silent_timer(clock) == MORNING + 3 * SECOND


# ---------------------------------------------------------------- what they end


def at(second: float, message: bytes) -> bytes:
    """An ITCH message so many seconds after the morning's start."""
    return message[:5] + (MORNING + round(second * SECOND)).to_bytes(6, "big") + message[11:]


QUIET = [
    at(0, directory(5, "QQ")), at(0, directory(6, "ZZ")), at(0.1, order(1, b"B", 100, 500_000, 5)), at(0.2, execute(1, 40, 5)),
    at(0.3, order(2, b"B", 90, 600_000, 6)),
]  # fmt: skip
"""QQ trades once; after that only ZZ has events."""
BUSY = [at(0.3 + 0.25 * k, order(10 + k, b"B", 1, 500_000, 6)) for k in range(1, 20)]


@pytest.fixture
def day(tmp_path: Path) -> Path:
    path = tmp_path / "day.itch"
    path.write_bytes(framed(*QUIET, *BUSY))
    return path


def outputs_of_replay(config: Config, path: Path) -> EventArray:
    parts: list[EventArray] = []
    replays.replay(config, [path], observe=lambda _, events: parts.append(events.copy()))
    return np.concatenate(parts).view(EVENT)


def test_a_replay_closes_the_bar_of_a_quiet_instrument_for_any_batches(day: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("itch50", more=BARS)
    found = []
    for size in (12, 17, 4096):
        monkeypatch.setattr(replays, "_BATCH_EVENTS_PYTHON", size)
        found.append(outputs_of_replay(config, day))
    bars = found[0][found[0]["kind"] == Kind.BAR]
    assert [(int(b["ts_event"]), int(b["instrument"])) for b in bars] == [(MORNING, 0)]
    assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()
    summary = replays.replay(config, [day])
    assert (summary["events"]["timer"], summary["events"]["bar"]) == (5, 1), "compiled end to end, the same"
    summary.pop("source")
    three = replays.replay(config_of("itch50", more=BARS + "[cluster]\nshards = 3\n"), [day])
    three.pop("source")
    assert three == summary


def test_without_timers_it_waits_for_the_next_trade(day: Path) -> None:
    summary = replays.replay(config_of("itch50", more="[processing]\ntimer_interval_ms = 0\n" + BARS), [day])
    assert "timer" not in summary["events"]
    assert "bar" not in summary["events"]


def test_a_recording_in_a_node_is_its_replay(nats_server: NatsServer, cluster: str, tmp_path: Path, day: Path) -> None:  # noqa: F811
    config = node_config(cluster, tmp_path / "data", f'[data_sources.feed]\ntype = "file"\npath = "{day}"\ndata_format = "itch50"\n')
    with running(config, nats_server.url) as node:
        finish(node)
        made = outputs_made(node)
    outputs, missing = stream(nats_server.url, cluster, made)
    assert not missing
    assert outputs.tobytes() == journal_outputs(config)[0].tobytes()
    expected = outputs_of_replay(config, day)
    outputs = outputs.copy()
    outputs["ts_recv"] = expected["ts_recv"] = 0  # the node stamps what it plays as received now
    assert outputs.tobytes() == expected.tobytes()
    assert np.count_nonzero(outputs["kind"] == Kind.BAR) == 1


def test_a_quiet_line_closes_a_bar_without_a_clock_in_the_journal(
    nats_server: NatsServer, cluster: str, tmp_path: Path  # noqa: F811
) -> None:
    """The line falls silent after one trade; the host's clock goes on, on the venue's scale, as events in the journal."""
    endpoint = free_endpoints()[0]
    address, port = endpoint.removeprefix("udp://").split(":")
    config = node_config(cluster, tmp_path, multicast_source((endpoint,), gap_wait_ms=20))
    packet = b"SESSION001" + struct.pack(">QH", 1, len(QUIET)) + framed(*QUIET)
    with running(config, nats_server.url) as node, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        sender.sendto(packet, (address, int(port)))
        counts = node.shards[0].shard.arrays.counts
        until(lambda: counts[Kind.BAR] == 1, "the bar of an instrument that trades no more")
        until(lambda: counts[Kind.TIMER] >= 2, "timers while nothing comes")
    expected = journal_outputs(config)[0]
    outputs, missing = stream(nats_server.url, cluster, len(expected))
    assert not missing
    assert_whole(outputs, len(expected))
    assert outputs.tobytes() == expected.tobytes()
    bar = outputs[outputs["kind"] == Kind.BAR][0]
    assert (int(bar["ts_event"]), int(bar["instrument"]), int(bar["qty"])) == (MORNING, 0, 40)
    journal = np.concatenate(list(JournalReader(tmp_path / "journal" / "n1" / "shard-0").batches()))
    timers = journal[journal["kind"] == Kind.TIMER]
    assert timers["ts_event"][:2].tolist() == [MORNING + SECOND, MORNING + 2 * SECOND]
