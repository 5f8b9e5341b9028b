"""The shared-memory ring against a list-based model, across processes, with readers that stall and writers that die."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from bounds import check_again
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tickmesh.ops import bench_ring
from tickmesh.ops.cpp_peer import build_peer
from tickmesh.transports import ring as rings
from tickmesh.transports.ring import RECORD, Ring
from tickmesh.transports.toolbox import IDLE_YIELD, loop, make_sleepers


def records(first: int, count: int) -> np.ndarray:
    """Records whose eight words all hold the record's sequence: a torn one shows."""
    out = np.zeros(count, RECORD)
    words = out.view(np.uint64).reshape(-1, 8)
    words[:] = np.arange(first, first + count, dtype=np.uint64)[:, None]
    return out


def sequences(batch: np.ndarray) -> list[int]:
    words = batch.view(np.uint64).reshape(-1, 8)
    assert (words == words[:, :1]).all(), "torn record"
    return [int(x) for x in words[:, 0]]


def until(condition: Callable[[], bool], what: str, limit_s: float = 30) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
        time.sleep(0.002)


@pytest.fixture
def name() -> Iterator[str]:
    unique = f"test-{uuid.uuid4().hex[:12]}"
    yield unique
    rings.ring_path(unique).unlink(missing_ok=True)


# ---------------------------------------------------------------- the model


class ModelRing:
    """What a ring does, with everything ever written kept in a list."""

    def __init__(self, capacity: int, lossy: bool) -> None:
        self.capacity, self.lossy, self.count = capacity, lossy, 0
        self.cursors: dict[int, int] = {}
        self.missed: dict[int, int] = {}

    def write(self, count: int) -> int:
        if not self.lossy:
            slowest = min(self.cursors.values(), default=self.count)
            count = min(count, self.capacity - (self.count - slowest))
        self.count += count
        return count

    def read(self, reader: int, maximum: int) -> list[int]:
        oldest = max(0, self.count - self.capacity)
        if self.cursors[reader] < oldest:
            self.missed[reader] += oldest - self.cursors[reader]
            self.cursors[reader] = oldest
        first = self.cursors[reader]
        self.cursors[reader] = min(self.count, first + maximum)
        return list(range(first, self.cursors[reader]))

    def join(self, reader: int, oldest: bool) -> None:
        self.missed[reader] = 0
        self.cursors[reader] = max(0, self.count - self.capacity) if oldest else self.count


steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 40), st.just(0)),
        st.tuples(st.just("read"), st.integers(0, 3), st.integers(1, 20)),
        st.tuples(st.just("join"), st.integers(0, 3), st.integers(0, 1)),
        st.tuples(st.just("leave"), st.integers(0, 3), st.just(0)),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=150)
@given(lossy=st.booleans(), actions=steps)
@example(lossy=False, actions=[("write", 2, 0), ("write", 15, 0), ("join", 0, 1), ("write", 1, 0)])  # joined behind the gate
def test_same_as_the_model(lossy: bool, actions: list[tuple[str, int, int]]) -> None:
    model = ModelRing(16, lossy)
    readers: dict[int, rings.Reader] = {}
    with Ring.create(None, 16, mode="lossy" if lossy else "lossless") as ring:
        for action, a, b in actions:
            if action == "write":
                first = model.count
                assert ring.writer.write(records(first, a), timeout_ms=0) == model.write(a)
            elif action == "join" and a not in readers:
                readers[a] = ring.reader(str(a), start="oldest" if b else "newest")
                model.join(a, bool(b))
            elif action == "read" and a in readers:
                assert sequences(readers[a].read(b)) == model.read(a, b)
                assert readers[a].missed == model.missed[a]
            elif action == "leave" and a in readers:
                readers.pop(a).close()
                del model.cursors[a]
            for key, reader in readers.items():
                assert reader.lag == model.count - model.cursors[key]
        assert ring.published == model.count


# ---------------------------------------------------------------- names and layouts


def test_attach_by_name_and_unlink(name: str) -> None:
    event = np.dtype([("seq", "<u8"), ("rest", "S56")])
    with Ring.create(name, 64, event) as ring, Ring.attach(name, event) as other, other.reader("r") as reader:
        ring.writer.write(records(7, 3))
        assert reader.read()["seq"].tolist() == [7, 8, 9]
        assert name in rings.list_rings()
        ring.unlink()
        assert name not in rings.list_rings()
        ring.writer.write(records(10, 1))
        assert reader.read()["seq"].tolist() == [10]


def test_typed_errors(name: str) -> None:
    with pytest.raises(rings.RingNotFound):
        Ring.attach(name)
    with pytest.raises(rings.RingNotFound):
        rings.ring_stat(name)
    with Ring.create(name, 64):
        with pytest.raises(rings.RingExists) as exists:
            Ring.create(name, 64)
        assert exists.value.name == name
        with pytest.raises(rings.RingLayoutMismatch) as mismatch:
            Ring.create(name, 128, reuse=True)
        assert (mismatch.value.expected, mismatch.value.found) == (128, 64)
        with pytest.raises(rings.RingLayoutMismatch):
            Ring.create(name, 64, mode="lossy", reuse=True)
    with pytest.raises(ValueError, match="power of two"):
        Ring.create(None, 24)
    with pytest.raises(ValueError, match="64-byte"):
        Ring.create(None, 8, np.dtype([("x", "<u8")]))
    with pytest.raises(ValueError, match="letters"):
        Ring.attach("../../etc/passwd")


@pytest.mark.parametrize("content", [b"", b"hello", bytes(8192), bytes(8192 + 64), b"x" * 20000])
def test_a_foreign_file_is_refused(name: str, content: bytes) -> None:
    rings.ring_path(name).write_bytes(content)
    with pytest.raises(rings.RingLayoutMismatch):
        Ring.attach(name)
    with pytest.raises(rings.RingLayoutMismatch):
        rings.ring_stat(name)
    assert name not in rings.list_rings()


def test_a_truncated_ring_is_refused(name: str) -> None:
    Ring.create(name, 64).close()
    os.truncate(rings.ring_path(name), rings.HEADER_BYTES + 32 * 64)
    with pytest.raises(rings.RingLayoutMismatch):
        Ring.attach(name)


def test_too_large_a_ring_is_refused_and_leaves_nothing(name: str) -> None:
    with pytest.raises(rings.RingNoSpace) as error:
        Ring.create(name, 1 << 40)
    assert error.value.needed_bytes > 1 << 46
    assert not list(rings.SHM_FOLDER.glob(f"*{name}*"))


def test_one_writer_and_sixteen_readers(name: str) -> None:
    with Ring.create(name, 64) as ring, Ring.attach(name) as other:
        ring.writer.write(records(0, 1))
        with pytest.raises(rings.WriterExists) as error:
            _ = other.writer
        assert error.value.pid == os.getpid()
        ring.writer.close()
        assert other.writer.write(records(1, 1)) == 1
        readers = [ring.reader(str(i)) for i in range(rings.READERS_MAX)]
        with pytest.raises(rings.TooManyReaders):
            other.reader()
        readers[3].close()
        readers[3].close()
        assert other.reader("late").slot == 3


# ---------------------------------------------------------------- slow, silent and dead readers


def test_a_record_can_be_looked_at_as_long_as_it_is_there() -> None:
    with Ring.create(None, 8, mode="lossy") as ring:
        assert ring.peek(0, 1) is None
        ring.writer.write(records(0, 5))
        assert ring.peek(0, 5) == records(0, 5).tobytes()
        assert (ring.peek(4, 2), ring.peek(-1, 1)) == (None, None)
        ring.writer.write(records(5, 7))
        assert [ring.peek(k, 1) is not None for k in range(13)] == [False] * 4 + [True] * 8 + [False]
        assert ring.peek(4, 8) == records(4, 8).tobytes()


def test_a_reader_that_only_holds_keeps_what_another_reads_again() -> None:
    with Ring.create(None, 8, mode="lossless", reader_timeout_ms=60_000) as ring:
        held, reader = ring.reader("held"), ring.reader("reader")
        ring.writer.write(records(0, 8))
        assert sequences(reader.read(8)) == list(range(8))
        assert ring.writer.write(records(8, 4), timeout_ms=0) == 0, "nothing has been let go"
        assert held.hold_from(3)
        assert ring.writer.write(records(8, 4), timeout_ms=0) == 3
        reader.go_back_to(held.position)
        assert sequences(reader.read(8)) == list(range(3, 11))
        assert held.hold_from(100), "not more than there is"
        assert held.position == 11


def test_a_holding_reader_that_was_given_up_is_told_once() -> None:
    with Ring.create(None, 8, mode="lossless", reader_timeout_ms=20) as ring:
        held = ring.reader("held")
        until(lambda: ring.writer.write(records(0, 16), timeout_ms=1000) >= 8 and ring.published > 8, "the writer to go on")
        assert not held.hold_from(0)
        assert held.position >= ring.published - 8
        assert held.hold_from(0)


def test_a_silent_reader_is_released_and_told() -> None:
    with Ring.create(None, 16, reader_timeout_ms=20) as ring, ring.reader("quick") as quick, ring.reader("stuck") as stuck:
        assert ring.writer.write(records(0, 16)) == 16
        assert sequences(quick.read()) == list(range(16))
        assert ring.writer.write(records(16, 4)) == 4  # waits, then releases `stuck`
        assert (ring.writer.released, ring.writer.blocked) == (1, 1)
        assert sequences(quick.read()) == list(range(16, 20))
        with pytest.raises(rings.ReaderReleased) as told:
            stuck.read()
        assert (told.value.reader, told.value.missed) == ("stuck", 4)
        assert sequences(stuck.read()) == list(range(4, 20))
        assert ring.writer.write(records(20, 16), timeout_ms=0) == 16
        assert ring.writer.write(records(36, 1), timeout_ms=0) == 0, "it holds the writer again"


def test_a_reader_that_shows_life_is_not_released() -> None:
    with Ring.create(None, 16, reader_timeout_ms=60_000) as ring, ring.reader("slow") as slow:
        ring.writer.write(records(0, 16))
        assert ring.writer.write(records(16, 1), timeout_ms=30) == 0
        assert ring.writer.released == 0
        assert sequences(slow.read(1)) == [0]
        assert ring.writer.write(records(16, 1), timeout_ms=30) == 1


def test_the_oldest_whole_record_of_a_lossless_ring() -> None:
    with Ring.create(None, 16) as ring:
        ring.writer.write(records(0, 40), timeout_ms=100)
        with ring.reader("late", start="oldest") as late:
            assert sequences(late.read()) == list(range(24, 40))
            assert late.missed == 0


def test_a_dead_process_is_released_at_once(name: str) -> None:
    with Ring.create(name, 16, reader_timeout_ms=3_600_000) as ring:
        code = f"from tickmesh.transports.ring import Ring; r = Ring.attach({name!r}).reader('doomed'); print('in', flush=True); input()"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "in\n"
            (reader,) = rings.ring_stat(name).readers
            assert (reader.name, reader.pid, reader.alive, reader.state) == ("doomed", child.pid, True, "active")
            assert ring.writer.write(records(0, 17), timeout_ms=20) == 16
            child.send_signal(signal.SIGKILL)
            child.wait()
        assert ring.writer.write(records(16, 16)) == 16
        stat = rings.ring_stat(name)
        assert (stat.released, stat.readers[0].state, stat.readers[0].alive) == (1, "released", False)
        assert ring.reader("next").slot == 0, "a dead reader's slot is free again"


def test_stat_from_outside(name: str) -> None:
    with Ring.create(name, 16, mode="lossy") as ring, ring.reader("gateway") as reader:
        assert not rings.ring_stat(name).writer_alive
        ring.writer.write(records(0, 20))
        stat = rings.ring_stat(name, sample_ms=5)
        assert (stat.capacity, stat.mode, stat.published, stat.rate_per_s) == (16, "lossy", 20, 0)
        assert (stat.writer_alive, stat.writer_pid, stat.readers[0].lag) == (True, os.getpid(), 20)
        reader.read()
        (seen,) = rings.ring_stat(name).readers
        assert (seen.name, seen.lag, seen.missed, seen.alive) == ("gateway", 0, 4, True)


# ---------------------------------------------------------------- two processes


@loop
def _write_forever(ring, batch, size, stop):  # type: ignore[no-untyped-def]
    """Write whole batches of `size` records stamped with their sequence until stopped."""
    total = np.uint64(0)
    while rings.load_acquire(stop, 0) == 0:
        for i in range(size):
            for word in range(8):
                batch[i * 8 + word] = total + np.uint64(i)
        free = rings.ring_free(ring, size)
        if free < size:
            if rings.ring_wait(ring, stop, IDLE_YIELD) == 0:
                break
            continue
        rings.ring_claim(ring, size)
        for i in range(size):
            slot = rings.ring_slot(ring, i)
            for word in range(8):
                ring.slots[slot * np.uint64(8) + np.uint64(word)] = batch[i * 8 + word]
        rings.ring_publish(ring, size)
        total += np.uint64(size)


_CHILD = """
import sys, time, numpy as np
sys.path.insert(0, {here!r})
import test_ring
from tickmesh.ops import bench_ring
from tickmesh.transports import ring as rings
ring = rings.Ring.attach({name!r})
ring.writer
words = rings.RingArrays(ring.arrays.words, ring.arrays.slots.view(np.uint64))
print("ready", flush=True)
test_ring._write_forever(words, np.zeros({size} * 8, np.uint64), {size}, np.zeros(1, np.int64))
"""


def _start_writer(name: str, size: int) -> subprocess.Popen[str]:
    code = _CHILD.format(here=os.path.dirname(__file__), name=name, size=size)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def _kill(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


@pytest.mark.parametrize("mode", ["lossless", "lossy"])
def test_a_killed_writer_leaves_whole_batches_and_the_next_one_continues(name: str, mode: rings.Mode) -> None:
    size = 16
    with Ring.create(name, 64, mode=mode) as ring, ring.reader("r") as reader:
        for seed in range(2):
            before = ring.published
            child = _start_writer(name, size)
            expected, limit = 0, 200 * (seed + 1)
            try:
                while expected < limit:
                    missed = reader.missed
                    batch = sequences(reader.read(37))
                    expected += reader.missed - missed
                    assert batch == list(range(expected, expected + len(batch)))
                    expected += len(batch)
            finally:
                _kill(child)
            assert (ring.published - before) % size == 0, "a part of a batch is visible"
            while reader.lag:
                batch = sequences(reader.read())
            with Ring.attach(name) as successor:
                claimed = int(ring.arrays.words[rings.W_CLAIMED])
                assert successor.writer.write(records(10**9, 5)) == 5
                assert int(ring.arrays.words[rings.W_CLAIMED]) >= claimed
            assert sequences(reader.read()) == list(range(10**9, 10**9 + 5))
            ring.writer.write(records(0, 11))  # back to a multiple of the batch size, so that the next check holds
            ring.writer.close()
            reader.read()


def test_a_paused_reader_of_a_lossy_ring_is_told_exactly(name: str) -> None:
    with Ring.create(name, 64, mode="lossy") as ring, ring.reader("r", start="oldest") as reader:
        child = _start_writer(name, 8)
        try:
            got = 0
            for _ in range(20):
                target = ring.published + 100
                until(lambda target=target: ring.published >= target, "the writer")
                got += len(sequences(reader.read()))
        finally:
            _kill(child)
        while reader.lag:
            got += len(sequences(reader.read()))
        assert got + reader.missed == ring.published
        assert reader.missed > 0


@loop
def _sleep(sources: Any, readers: Any, sleepers: Any, limit_ns: Any) -> None:
    rings.ring_sleep(sources, readers, sleepers, limit_ns)


def test_a_sleeping_reader_is_woken_by_any_of_its_rings(name: str) -> None:
    sleepers = make_sleepers(2)
    if len(sleepers) == 0:
        pytest.skip("this kernel has no futex_waitv: Linux 5.16 or later has")
    with Ring.create(name, 64) as shared, Ring.create(None, 64) as private, Ring.attach(name) as writing, ThreadPoolExecutor(1) as pool:
        readers = [shared.reader(), private.reader()]
        slots = np.array([reader.slot for reader in readers], np.int64)
        _sleep((shared.arrays, private.arrays), slots, sleepers, 1)
        for round_ in range(100):
            sleeping = pool.submit(_sleep, (shared.arrays, private.arrays), slots, sleepers, 20_000_000_000)
            if round_ & 1:
                time.sleep(0.001)
            (writing if round_ & 2 else private).writer.write(np.zeros(1, RECORD))
            sleeping.result(10)
            assert sum(len(reader.read()) for reader in readers) == 1
        shared.unlink()


def test_a_stopped_writer_of_a_full_ring_returns() -> None:
    with Ring.create(None, 8, reader_timeout_ms=3_600_000) as ring, ring.reader("r"):
        assert ring.writer.write(records(0, 8)) == 8
        assert int(_write_until_stopped(ring.arrays, records(8, 3), np.ones(1, np.int64))) == 0
        assert ring.writer.blocked == 1


@loop
def _write_until_stopped(ring, batch, stop):  # type: ignore[no-untyped-def]
    return rings.ring_write_batch(ring, batch, len(batch), stop, IDLE_YIELD)


# ---------------------------------------------------------------- the same ring in C++


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ for the C++ peer")
def test_a_peer_in_cpp_speaks_the_same_ring() -> None:
    """The benchmark's other side reads what we write and the other way round: every record arrives (the sum is checked)."""
    cpp = [str(build_peer("ring_peer.cpp", "g++", shared=False))]
    count = 3 * 65536
    assert bench_ring.measure_throughput(bench_ring.NUMBA, cpp, count) > 0
    assert bench_ring.measure_throughput(cpp, bench_ring.NUMBA, count) > 0
    assert bench_ring.measure_round_trip(cpp, bench_ring.NUMBA, 200)["p50_ns"] > 0


@pytest.mark.slow
def test_with_bounds_checks() -> None:
    """The model test once more, with every index checked."""
    check_again(__file__, "model or silent or oldest")


def test_a_reader_closed_twice_leaves_the_next_one_in_its_slot_alone() -> None:
    with Ring.create(None, 256, RECORD) as ring:
        one = ring.reader("one")
        one.close()
        two = ring.reader("two")
        one.close()
        assert two.slot == one.slot
        ring.writer.write(np.zeros(3, RECORD))
        assert len(two.read(8)) == 3
