"""Counters and histograms in mapped memory against plain Python, from inside and from outside."""

import ast
import contextlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.transports import counters
from tickmesh.transports.counters import Counter, CounterFile, Histogram
from tickmesh.transports.toolbox import loop


@loop
def _record(histogram, values):  # type: ignore[no-untyped-def]
    for value in values:
        counters.histogram_record(histogram, value)


@loop
def _count(values, index, n):  # type: ignore[no-untyped-def]
    counters.counter_add(values, index, n)


@loop
def _set(values, index, n):  # type: ignore[no-untyped-def]
    counters.counter_set(values, index, n)


@loop
def _bucket(value):  # type: ignore[no-untyped-def]
    return counters.bucket_of(value)


def bucket_twin(value: int) -> int:
    value = min(max(value, 0), (1 << 48) - 1)
    bucket = 0
    while not counters.bucket_bounds(bucket)[0] <= value < counters.bucket_bounds(bucket)[1]:
        bucket += 1
    return bucket


edges = st.builds(lambda exponent, below: 2**exponent - below, st.integers(0, 50), st.integers(0, 1))


@settings(deadline=None, max_examples=100)
@given(st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 5000), edges))
def test_bucket_as_the_bounds_say(value: int) -> None:
    assert int(_bucket(value)) == bucket_twin(value)


def test_buckets_leave_no_hole_and_are_narrow() -> None:
    for bucket in range(counters.BUCKETS - 1):
        low, above = counters.bucket_bounds(bucket)
        assert above == counters.bucket_bounds(bucket + 1)[0]
        assert above - low == 1 or (above - low) / low <= 1 / 32


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.integers(0, 10**12), min_size=1, max_size=300), percent=st.floats(0.1, 100))
def test_percentiles_within_two_percent(tmp_path_factory: pytest.TempPathFactory, values: list[int], percent: float) -> None:
    file = CounterFile.create(tmp_path_factory.mktemp("c") / "x.counters", histograms=["latency"])
    _record(file.histogram("latency"), np.array(values, np.int64))
    exact = sorted(values)[max(1, math.ceil(len(values) * percent / 100)) - 1]
    assert counters.percentile(file.counts("latency"), percent) == pytest.approx(exact, rel=0.016, abs=0.5)
    summary = file.snapshot()["histograms"]["latency"]
    assert (summary["count"], summary["max"], summary["unit"]) == (len(values), max(values), "ns")
    assert summary["mean"] == pytest.approx(sum(values) / len(values))
    assert summary["p50"] <= summary["p90"] <= summary["p99"] <= summary["p999"] <= summary["max"]


def test_counts_and_gauges(tmp_path: Path) -> None:
    spec = [Counter("events", "events", "events read", group="shard"), Counter("lag", kind="gauge", group="receiver"), "bytes"]
    with CounterFile.create(tmp_path / "node.counters", spec, [Histogram("step", "ns", "time of one batch")]) as file:
        _count(file.values, file.index("events"), 5)
        _count(file.values, file.index("events"), 7)
        _set(file.values, file.index("lag"), -3)
        assert file.snapshot()["counters"] == {"events": 12, "lag": -3, "bytes": 0}
        assert file.snapshot()["histograms"]["step"]["p99"] is None
        assert math.isnan(counters.percentile(file.counts("step"), 50))
        distance = {abs(file.index(a) - file.index(b)) * 8 for a, b in (("events", "lag"), ("lag", "bytes"))}
        assert min(distance) >= 128, "threads share no pair of cache lines"


def test_a_stranger_reads_it_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "node.counters"
    with CounterFile.create(path, [Counter("events", "events", "how many")], ["hop"]) as file:
        _count(file.values, file.index("events"), 41)
        _record(file.histogram("hop"), np.full(3, 1000, np.int64))
        code = f"from tickmesh.transports.counters import CounterFile; print(CounterFile.attach({str(path)!r}).snapshot())"
        seen = ast.literal_eval(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        assert seen == file.snapshot()
        assert b'"help": "how many"' in path.read_bytes(), "the description is readable text"
        outside = CounterFile.attach(path)
        assert outside.about.counters["events"] == Counter("events", "events", "how many")
        _count(file.values, file.index("events"), 1)
        assert outside.snapshot()["counters"]["events"] == 42
        with pytest.raises(ValueError, match="read-only"):
            outside.values[0] = 1


def test_a_new_file_replaces_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "node.counters"
    first = CounterFile.create(path, ["a"])
    _count(first.values, 0, 9)
    before = CounterFile.attach(path)
    CounterFile.create(path, ["a"])
    assert before.snapshot()["counters"]["a"] == 9
    assert CounterFile.attach(path).snapshot()["counters"]["a"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["node.counters"]


def test_typed_errors(tmp_path: Path) -> None:
    with pytest.raises(counters.CountersNotFound):
        CounterFile.attach(tmp_path / "none")
    foreign = tmp_path / "foreign"
    foreign.write_text("somebody's notes")
    with pytest.raises(counters.CountersLayoutMismatch):
        CounterFile.attach(foreign)
    with pytest.raises(counters.CountersLayoutMismatch):
        CounterFile.create(foreign, ["a"])
    assert foreign.read_text() == "somebody's notes"
    with pytest.raises(ValueError, match="same name"):
        CounterFile.create(tmp_path / "x", ["a", "a"])


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read_never_worse(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("c") / "x.counters"
    CounterFile.create(path, ["a", "b"], ["h"])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 900))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2, 40, 8, 0]))])
    with contextlib.suppress(counters.CountersLayoutMismatch):
        CounterFile.attach(path).snapshot()


def test_listed_by_name() -> None:
    name = f"test-{id(object())}-{__name__}"
    file = CounterFile.create(counters.counters_path(name), ["a"])
    try:
        assert name in counters.list_counters()
        assert file.about.name == name
    finally:
        file.unlink()
        file.unlink()
    assert name not in counters.list_counters()
