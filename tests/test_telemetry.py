"""Counters of a node: layout, what a compiled loop writes, who is alive, names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node.telemetry import (
    DELIVERY_ABOUT,
    NODE_ABOUT,
    SHARD_ABOUT,
    SOURCE_ABOUT,
    DeliveryCounter,
    NodeCounter,
    NodeRunning,
    NodeState,
    ShardCounter,
    SourceCounter,
    Telemetry,
    find_nodes,
    read_telemetry,
    record_ages,
    telemetry_path,
)
from tickmesh.transports.counters import HISTOGRAM_WORDS, CounterFile, CountersNotFound, counter_add, counter_set, histogram_record_n
from tickmesh.transports.toolbox import inlined


@pytest.fixture
def cluster() -> Iterator[str]:
    name = f"t-{uuid.uuid4().hex[:10]}"
    yield name
    for node in find_nodes():
        if node.cluster == name:
            node.path.unlink(missing_ok=True)


@inlined
def _write(shard: Any, delivery: Any, n: Any) -> Any:
    """What a shard's loop and a delivery do."""
    counter_add(shard.values, shard.base + ShardCounter.EVENTS_IN, n)
    counter_set(shard.values, shard.base + ShardCounter.OUTPUT_LAG, n + 1)
    histogram_record_n(shard.receive_to_output, 1500, n)
    histogram_record_n(shard.batch_events, n, 1)
    counter_add(delivery.values, delivery.base + DeliveryCounter.FRAMES, 1)
    histogram_record_n(delivery.receive_to_stored, 2_000_000, 1)


@pytest.mark.parametrize(
    ("kind", "about"),
    [(NodeCounter, NODE_ABOUT), (SourceCounter, SOURCE_ABOUT), (ShardCounter, SHARD_ABOUT), (DeliveryCounter, DELIVERY_ABOUT)],
)
def test_every_counter_is_described_in_its_order(kind: type[IntEnum], about: dict[IntEnum, str]) -> None:
    assert list(about) == list(kind) == list(range(len(kind)))
    assert all(about.values())


def test_index_of_a_counter_is_base_plus_its_number(cluster: str) -> None:
    with Telemetry.create(cluster, "n", ["a", "b-2"], 3, ["out", "shm"]) as telemetry:
        for source in ("a", "b-2"):
            base = telemetry.source(source).base
            for counter in SourceCounter:
                assert base + counter == telemetry.file.index(f"source.{source}.{counter.name.lower()}")
        for shard in range(3):
            for counter in ShardCounter:
                assert telemetry.shard(shard).base + counter == telemetry.file.index(f"shard.{shard}.{counter.name.lower()}")
            for each in DeliveryCounter:
                assert telemetry.delivery("shm", shard).base + each == telemetry.file.index(f"delivery.shm.{shard}.{each.name.lower()}")


def test_sets_of_two_threads_lie_apart(cluster: str) -> None:
    with Telemetry.create(cluster, "n", ["a"], 2, ["out"]) as telemetry:
        groups: dict[str, set[int]] = {}
        for label, index in telemetry.file.about.index.items():
            groups.setdefault(telemetry.file.about.counters[label].group, set()).add(index * 8 // 64)
    lines = [line for group in groups.values() for line in group]
    assert len(groups) == 1 + 1 + 2 + 2
    assert len(lines) == len(set(lines))


def test_what_compiled_code_writes_is_read_from_outside(cluster: str) -> None:
    with Telemetry.create(cluster, "n", ["nasdaq"], 2, ["out"]) as telemetry:
        _write(telemetry.shard(1), telemetry.delivery("out", 1), 7)
        _write(telemetry.shard(1), telemetry.delivery("out", 1), 5)
        telemetry.set("source.nasdaq.messages", 99)
        reading = read_telemetry(telemetry_path(cluster, "n"))
    assert reading["shards"][0]["events_in"] == 0
    assert reading["shards"][1]["events_in"] == 12
    assert reading["shards"][1]["output_lag"] == 6
    assert reading["shards"][1]["receive_to_output"]["count"] == 12
    assert reading["shards"][1]["receive_to_output"]["p999"] == pytest.approx(1500, rel=0.016)
    assert reading["shards"][1]["batch_events"]["unit"] == "events"
    assert reading["shards"][1]["batch_events"]["max"] == 7
    assert reading["deliveries"]["out"][1]["frames"] == 2
    assert reading["deliveries"]["out"][1]["receive_to_stored"]["p50"] == pytest.approx(2_000_000, rel=0.016)
    assert reading["deliveries"]["out"][0]["receive_to_stored"]["p50"] is None
    assert reading["sources"]["nasdaq"]["messages"] == 99
    json.dumps(reading, allow_nan=False)


edges = st.builds(lambda exponent, below: 2**exponent - below, st.integers(0, 50), st.integers(0, 1))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.one_of(st.integers(-5, 5000), edges), max_size=40))
def test_ages_recorded_from_python_are_as_those_of_a_loop(ages: list[int]) -> None:
    """What is no latency of ours is left out: stamps of a recording, of a time before a restart, of the future."""
    histograms, now = np.zeros((2, HISTOGRAM_WORDS), np.int64), 10**18
    record_ages(histograms[0], now, now - np.array(ages, np.int64))
    for age in ages:
        if 0 <= age < 3_600_000_000_000:
            histogram_record_n(histograms[1], age, 1)
    assert np.array_equal(histograms[0], histograms[1])


def test_a_reading_says_who_and_since_when(cluster: str) -> None:
    with Telemetry.create(cluster, "host-1", [], 1) as telemetry:
        starting = telemetry.reading()
        telemetry.set_state(NodeState.RUNNING)
        running = read_telemetry(telemetry.file.path)
    assert (starting["state"], running["state"]) == ("starting", "running")
    assert (running["cluster"], running["node"], running["pid"], running["alive"]) == (cluster, "host-1", os.getpid(), True)
    assert 0 <= running["heartbeat_age_s"] <= running["uptime_s"] + 1
    assert running["sources"] == running["deliveries"] == {}


def test_an_unknown_counter_is_a_key_error(cluster: str) -> None:
    with Telemetry.create(cluster, "n", ["a"], 1) as telemetry:
        with pytest.raises(KeyError):
            telemetry.set("source.a.mesages", 1)
        with pytest.raises(KeyError):
            telemetry.update("shard.1", {"trades": 1})


def test_a_second_node_of_the_same_name_is_refused(cluster: str) -> None:
    with Telemetry.create(cluster, "n", [], 1) as telemetry:
        telemetry.set("shard.0.trades", 3)
        with pytest.raises(NodeRunning, match=r"choose another \[cluster\] node") as refused:
            Telemetry.create(cluster, "n", [], 1)
        assert (refused.value.cluster, refused.value.node, refused.value.pid) == (cluster, "n", os.getpid())
        assert read_telemetry(telemetry.file.path)["shards"][0]["trades"] == 3


def test_file_goes_when_the_node_ends_well_and_stays_when_it_failed(cluster: str) -> None:
    with Telemetry.create(cluster, "n", [], 1):
        pass
    assert not telemetry_path(cluster, "n").exists()

    def fail() -> None:
        with Telemetry.create(cluster, "n", [], 1) as telemetry:
            telemetry.set("shard.0.trades", 5)
            raise RuntimeError("as a node might")

    with pytest.raises(RuntimeError):
        fail()
    reading = read_telemetry(telemetry_path(cluster, "n"))
    assert not reading["alive"]
    assert reading["shards"][0]["trades"] == 5
    with Telemetry.create(cluster, "n", [], 1) as again:
        assert again.reading()["shards"][0]["trades"] == 0


def test_a_killed_node_shows_as_dead(cluster: str) -> None:
    code = (
        "import os, signal; from tickmesh.node.telemetry import Telemetry\n"
        f"t = Telemetry.create({cluster!r}, 'n', [], 1); t.set('shard.0.orders', 8); print(t.reading()['alive'], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (-9, "True\n")
    reading = read_telemetry(telemetry_path(cluster, "n"))
    assert not reading["alive"]
    assert reading["shards"][0]["orders"] == 8
    assert reading["uptime_s"] >= 0


def test_names_with_dashes_do_not_meet(cluster: str) -> None:
    with Telemetry.create(cluster, "a-b", [], 1) as one, Telemetry.create(f"{cluster}-a", "b", [], 1) as other:
        assert one.file.path != other.file.path
        found = {(n.cluster, n.node) for n in find_nodes()}
        assert {(cluster, "a-b"), (f"{cluster}-a", "b")} <= found
        assert one.reading()["node"] == "a-b"


def test_reading_what_is_not_there(cluster: str) -> None:
    with pytest.raises(CountersNotFound, match="is its node running"):
        Telemetry.attach(cluster, "n")


def test_a_reader_cannot_write(cluster: str) -> None:
    with Telemetry.create(cluster, "n", [], 1) as telemetry:
        reader = Telemetry.attach(cluster, "n")
        with pytest.raises(ValueError, match="read-only"):
            reader.set("shard.0.trades", 1)
        reader.close()
        assert telemetry.file.path.exists()


def test_counter_files_of_others_are_no_nodes(cluster: str) -> None:
    path = telemetry_path(cluster, "n").with_name(f"tickmesh-{cluster}.counters")
    with CounterFile.create(path, ["a"]) as file:
        assert cluster not in {node.cluster for node in find_nodes()}
        file.unlink()
