"""The journal: what goes in comes out, crashes cut cleanly, and no altered bit goes unseen."""

import contextlib
import errno
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from bounds import check_again
from hypothesis import given, settings
from hypothesis import strategies as st

from tickmesh.node import journal as journals
from tickmesh.node.event import EVENT, EventArray
from tickmesh.node.journal import Journal, JournalReader, recover, verify
from tickmesh.node.journal_tail import JournalTail
from tickmesh.transports.toolbox import IDLE_MODES, IDLE_YIELD, loop

SEGMENT = 512


def events(first: int, count: int) -> EventArray:
    """Events without a zero byte (a cut shows), each telling its sequence."""
    rng = np.random.default_rng(first)
    out = rng.integers(1, 256, count * 64, dtype=np.uint8).view(EVENT)
    out["seq"] = np.arange(first, first + count, dtype=np.uint64) + np.uint64(0x0101010101010101)
    return out


def sequences(folder: Path, start: int | None = None) -> list[int]:
    return [int(x) - 0x0101010101010101 for batch in JournalReader(folder).batches(start, 100) for x in batch["seq"]]


def until(condition: Callable[[], bool], what: str, limit_s: float = 30) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
        time.sleep(0.002)


def make(folder: Path, count: int, **options: object) -> Path:
    with Journal.create(folder, 3, segment_records=SEGMENT, **options) as journal:  # type: ignore[arg-type]
        assert journal.append(events(0, count)) == count
    return folder


@pytest.mark.parametrize("mode", ["sleep", "yield"])
def test_who_waits_for_events_is_woken_by_them(mode: str, tmp_path: Path) -> None:
    limit_s = 60.0
    with Journal.create(tmp_path / "journal", 3, segment_records=SEGMENT) as journal:
        stop, tail = np.zeros(1, np.int64), JournalTail(journal)
        assert not tail.wait(stop, IDLE_MODES[mode], 0.01)
        with ThreadPoolExecutor(1) as pool:
            for round_ in range(200):
                waiting = pool.submit(tail.wait, stop, IDLE_MODES[mode], limit_s)
                if round_ % 2:
                    time.sleep(0.001)
                journal.append(events(round_, 1))
                assert waiting.result(limit_s / 2)
                assert len(tail.read(10)[0]) == 1
            waiting = pool.submit(tail.wait, stop, IDLE_MODES[mode], limit_s)
            stop[0] = 1
            journal.wake_readers()
            assert not waiting.result(limit_s / 2)


# ---------------------------------------------------------------- the checksum

_ODD = (
    0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93,
    0xA0761D6478BD642F, 0xE7037ED1A0B428DB, 0x8EBC6AF09C88C6E3, 0x589965CC75374CC3,
)  # fmt: skip
_MASK = (1 << 64) - 1


def mix_twin(chain: int, words: list[int]) -> int:
    total = 0
    for word, k in zip(words, _ODD):
        product = ((word ^ (k >> 32)) * k) & _MASK
        total = (total + (product ^ (product >> 29))) & _MASK
    mixed = ((chain ^ total) * 0xFF51AFD7ED558CCD) & _MASK
    return mixed ^ (mixed >> 32)


@loop
def _mix(chain, words):  # type: ignore[no-untyped-def]
    return journals.mix_event(chain, words, np.uint64(0))


def mix(chain: int, words: list[int]) -> int:
    return int(_mix(np.uint64(chain), np.array(words, np.uint64)))


word = st.integers(0, _MASK)


@settings(deadline=None, max_examples=200)
@given(chain=word, words=st.lists(word, min_size=8, max_size=8), place=st.integers(0, 7), bit=st.integers(0, 63))
def test_checksum_as_its_twin_and_every_bit_counts(chain: int, words: list[int], place: int, bit: int) -> None:
    checksum = mix(chain, words)
    assert checksum == mix_twin(chain, words)
    assert mix(chain ^ (1 << bit), words) != checksum
    words[place] ^= 1 << bit
    assert mix(chain, words) != checksum


def test_flips_of_one_bit_change_half_the_checksum() -> None:
    rng = random.Random(1)
    changed = []
    for _ in range(300):
        words = [rng.getrandbits(64) for _ in range(8)]
        before = mix_twin(1, words)
        words[rng.randrange(8)] ^= 1 << rng.randrange(64)
        changed.append((before ^ mix_twin(1, words)).bit_count())
    assert 26 < sum(changed) / len(changed) < 38


# ---------------------------------------------------------------- in and out


@settings(deadline=None, max_examples=15)
@given(counts=st.lists(st.integers(1, 900), min_size=1, max_size=6), start=st.integers(0, 3000), data=st.data())
def test_what_goes_in_comes_out(tmp_path_factory: pytest.TempPathFactory, counts: list[int], start: int, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("journal")
    total = 0
    for i, count in enumerate(counts):
        opened = Journal.open(folder, 3) if i else Journal.create(folder, 3, segment_records=SEGMENT)
        with opened as journal:
            assert journal.next_sequence == total
            journal.append(events(total, count))
            total += count
        assert journal.synced_sequence == total
    first = min(start, total)
    assert sequences(folder, first) == list(range(first, total))
    report = verify(folder)
    assert (report.ok, report.records, report.next_sequence, report.shard) == (True, total, total, 3)
    expected = np.concatenate([events(sum(counts[:i]), n) for i, n in enumerate(counts)])
    assert b"".join(batch.tobytes() for batch in JournalReader(folder).batches()) == expected.tobytes()


def test_read_while_it_is_written(tmp_path: Path) -> None:
    with Journal.create(tmp_path, 3, segment_records=SEGMENT) as journal:
        for total in range(300, 3000, 300):
            journal.append(events(total - 300, 300))
            assert sequences(tmp_path) == list(range(total))
            assert verify(tmp_path).ok
            assert JournalReader(tmp_path).first_sequence == 0


def test_read_while_its_writer_comes_and_goes(tmp_path: Path) -> None:
    """Segments made ahead come with it and go with it: what is read ends where it ends, and nobody fails."""
    make(tmp_path, 10)

    def come_and_go() -> None:
        for _ in range(100):
            with Journal.open(tmp_path, 3):
                pass

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(come_and_go)
        while not writer.done():
            assert sequences(tmp_path) == list(range(10))
        writer.result()


def test_segments_that_go_while_they_are_read_end_the_reading(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, 3, segment_records=SEGMENT)
    journal.append(events(0, 10))
    until(lambda: len(list(tmp_path.glob("*.journal"))) == 4, "segments made ahead")
    segments = journals._open_segments(tmp_path)
    found = [next(segments).header.index]
    journal.close()
    assert found + [segment.header.index for segment in segments] == [0]


def test_a_writer_that_is_killed_while_it_removes_segments_leaves_a_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the removals it comes to: what is left has no hole."""
    for removed in range(1, 4):
        folder, left = tmp_path / str(removed), iter(range(removed))

        def unlink(path: Path, missing_ok: bool = False, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            os.unlink(path)

        journal = Journal.create(folder, 3, segment_records=SEGMENT)
        journal.append(events(0, 10))
        until(lambda: len(list(folder.glob("*.journal"))) == 4, "segments made ahead")  # noqa: B023
        shutil.copytree(folder, tmp_path / "crashed", dirs_exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink)
            with contextlib.suppress(KeyboardInterrupt):
                recover(tmp_path / "crashed")
        assert sequences(tmp_path / "crashed") == list(range(10))
        with Journal.open(tmp_path / "crashed", 3) as again:
            assert again.next_sequence == 10
        shutil.rmtree(tmp_path / "crashed")
        journal.close()


def test_first_sequence_and_config_version(tmp_path: Path) -> None:
    with Journal.create(tmp_path, 7, segment_records=SEGMENT, first_sequence=10**12, config_version=4, segments_ahead=2) as journal:
        journal.append(events(0, 100))
        journal.config_version = 5
        journal.append(events(100, 2000))
        assert journal.next_sequence == 10**12 + 2100
    headers = [segment.header for segment in journals._open_segments(tmp_path)]
    assert headers[0].config_version == 4
    assert headers[-1].config_version == 5
    assert sequences(tmp_path, 10**12 + 2000) == list(range(2000, 2100))


def test_old_segments_are_dropped(tmp_path: Path) -> None:
    with Journal.create(tmp_path, 3, segment_records=SEGMENT) as journal:
        journal.append(events(0, 4 * SEGMENT + 1))
        until(lambda: journal._oldest == 4, "the helper")
        assert journal.drop_before(2 * SEGMENT + 5) == 2
        assert journal.drop_before(2 * SEGMENT + 5) == 0
    assert JournalReader(tmp_path).first_sequence == 2 * SEGMENT
    assert sequences(tmp_path) == list(range(2 * SEGMENT, 4 * SEGMENT + 1))
    assert verify(tmp_path).ok
    with pytest.raises(ValueError, match="oldest"):
        sequences(tmp_path, 5)
    with Journal.open(tmp_path, 3) as journal:
        assert journal.next_sequence == 4 * SEGMENT + 1


@pytest.mark.parametrize("sync", ["none", "segment", "interval"])
def test_sync(tmp_path: Path, sync: journals.Sync) -> None:
    with Journal.create(tmp_path, 3, segment_records=SEGMENT, sync=sync, sync_interval_ms=5) as journal:
        journal.append(events(0, SEGMENT + 10))
        if sync == "interval":
            until(lambda: journal.synced_sequence == SEGMENT + 10, "the disk")
        elif sync == "segment":
            until(lambda: journal.synced_sequence == SEGMENT, "the disk")
    assert journal.synced_sequence == (0 if sync == "none" else SEGMENT + 10)
    assert verify(tmp_path).ok
    assert journal.append(events(0, 1)) == 0, "closed"


@loop
def _append(journal, batch, stop):  # type: ignore[no-untyped-def]
    return journals.journal_append_batch(journal, batch, len(batch), stop, IDLE_YIELD)


@loop
def _append_singly(journal, batch):  # type: ignore[no-untyped-def]
    done = 0
    while done < len(batch) and journals.journal_append(journal, batch, done):
        done += 1
    return done


def test_a_compiled_loop_appends_and_stops(tmp_path: Path) -> None:
    with Journal.create(tmp_path, 3, segment_records=SEGMENT) as journal:
        stop = np.zeros(1, np.int64)
        assert int(_append(journal.arrays, events(0, 20_000), stop)) == 20_000
        assert int(_append_singly(journal.arrays, events(20_000, 50))) == 50
        stop[0] = 1
        assert int(_append(journal.arrays, events(20_050, 100_000), stop)) < 100_000
        held = journal.next_sequence
        assert sequences(tmp_path) == list(range(held))


# ---------------------------------------------------------------- crashes

_WRITER = """
import sys, time, numpy as np
sys.path.insert(0, {here!r})
import test_journal
from tickmesh.node.journal import Journal
journal = Journal.open({folder!r}, 3, sync={sync!r}, sync_interval_ms=1)
print("ready", flush=True)
first = journal.next_sequence
while True:
    first += journal.append(test_journal.events(first, {batch}))
"""


@pytest.mark.parametrize("sync", ["none", "interval"])
def test_killed_at_random_points(tmp_path: Path, sync: str) -> None:
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    total = make(tmp_path, 100) and 100
    for _ in range(3):
        code = _WRITER.format(here=os.path.dirname(__file__), folder=str(tmp_path), sync=sync, batch=rng.randrange(1, 700))
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == b"ready\n", f"seed {seed}"
            target = total + rng.randrange(1, 2500)
            until(lambda target=target: len(sequences(tmp_path)) >= target, f"the writer, seed {seed}")
            time.sleep(rng.random() / 200)
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        seen = len(sequences(tmp_path))
        found = recover(tmp_path)
        total = found.next_sequence
        assert total >= seen, f"seed {seed}"
        assert sequences(tmp_path) == list(range(total)), f"seed {seed}"
        assert verify(tmp_path).ok, f"seed {seed}: {verify(tmp_path)}"
        with Journal.open(tmp_path, 3) as journal:
            assert journal.recovery is not None
            assert not journal.recovery.torn
            total += journal.append(events(total, 3))


def test_cut_at_every_byte_of_the_last_records(tmp_path: Path) -> None:
    count = SEGMENT + 40
    original = make(tmp_path / "original", count)
    path = sorted(original.glob("*.journal"))[-1]
    content = path.read_bytes()
    first = journals.HEADER_BYTES + SEGMENT * 8 + 37 * 64
    for cut in range(first, first + 3 * 64 + 1):
        path.write_bytes(content[:cut])
        whole = SEGMENT + 37 + (cut - first) // 64
        assert not verify(original).ok
        assert sequences(original) == list(range(whole))
        found = recover(original)
        assert (found.next_sequence, found.torn) == (whole, whole < count)
        assert verify(original).ok
        assert sequences(original) == list(range(whole))


def test_torn_at_every_byte_of_the_last_record(tmp_path: Path) -> None:
    """As a writer leaves it: the event half copied, or copied with its checksum not yet stored."""
    folder = make(tmp_path / "original", 20)
    path = folder / "0000000000.journal"
    content = path.read_bytes()
    event, checksum = journals.HEADER_BYTES + SEGMENT * 8 + 19 * 64, journals.HEADER_BYTES + 19 * 8
    for kept in range(65):
        torn = bytearray(content)
        torn[event + kept : event + 64] = bytes(64 - kept)
        torn[checksum : checksum + 8] = bytes(8)
        path.write_bytes(torn)
        assert verify(folder).ok == (kept == 0)
        with Journal.open(folder, 3) as journal:
            assert journal.next_sequence == 19
            journal.append(events(19, 1))
        assert sequences(folder) == list(range(20))
        assert verify(folder).ok


def test_pages_lost_by_power_are_a_tear_unless_they_were_synced(tmp_path: Path) -> None:
    folder = make(tmp_path / "unsynced", 300, sync="none")
    path = folder / "0000000000.journal"
    content = bytearray(path.read_bytes())
    content[journals.HEADER_BYTES + SEGMENT * 8 + 100 * 64 :][: 50 * 64] = bytes(50 * 64)
    lost = slice(journals.HEADER_BYTES + SEGMENT * 8 + 100 * 64, journals.HEADER_BYTES + SEGMENT * 8 + 150 * 64)
    content[lost] = bytes(50 * 64)
    path.write_bytes(content)
    assert recover(folder).next_sequence == 100
    assert verify(folder).ok
    folder = make(tmp_path / "synced", 300, sync="segment")
    path = folder / "0000000000.journal"
    content = bytearray(path.read_bytes())
    content[lost] = bytes(50 * 64)
    path.write_bytes(content)
    with pytest.raises(journals.JournalCorrupt) as error:
        recover(folder)
    assert (error.value.record, error.value.sequence, error.value.path) == (100, 100, path)


# ---------------------------------------------------------------- tampering


@pytest.fixture(scope="module")
def three_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = make(tmp_path_factory.mktemp("journal") / "original", 2 * SEGMENT + 77)
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.journal"))}


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_no_flipped_bit_goes_unseen(tmp_path_factory: pytest.TempPathFactory, three_files: dict[str, bytes], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(three_files)))
    content = bytearray(three_files[name])
    areas = [(0, 300), (0, journals.HEADER_BYTES), (journals.HEADER_BYTES, len(content))]
    low, high = data.draw(st.sampled_from(areas))
    at, bit = data.draw(st.integers(low, high - 1)), data.draw(st.integers(0, 7))
    content[at] ^= 1 << bit
    folder = write_files(tmp_path_factory.mktemp("flip"), {**three_files, name: bytes(content)})
    report = verify(folder)
    assert not report.ok
    assert name in [p.file for p in report.problems] or report.problems[0].kind == "chain"
    if at >= journals.HEADER_BYTES:
        start = journals.HEADER_BYTES + SEGMENT * 8
        record = (at - start) // 64 if at >= start else (at - journals.HEADER_BYTES) // 8
        assert any(p.file == name and p.record == record for p in report.problems)
    shutil.rmtree(folder)


@pytest.mark.parametrize("damage", ["altered", "swapped", "removed", "repeated"])
@pytest.mark.parametrize("file", [0, 1, 2])
def test_a_changed_middle_stops_recovery_and_reading(tmp_path: Path, three_files: dict[str, bytes], damage: str, file: int) -> None:
    name = sorted(three_files)[file]
    content = bytearray(three_files[name])
    start = journals.HEADER_BYTES + SEGMENT * 8
    records = [bytes(content[start + i * 64 : start + i * 64 + 64]) for i in range(SEGMENT)]
    if damage == "altered":
        records[30] = records[30][:40] + b"\0" + records[30][41:]
    elif damage == "swapped":
        records[30], records[31] = records[31], records[30]
    elif damage == "removed":
        del records[30]
        records.append(bytes(64))
    else:
        records.insert(30, records[29])
        records.pop()
    content[start:] = b"".join(records)
    folder = write_files(tmp_path, {**three_files, name: bytes(content)})
    (problem, *_) = verify(folder).problems
    assert (problem.file, problem.record, problem.sequence) == (name, 30, file * SEGMENT + 30)
    if damage in ("altered", "swapped"):
        for use in (lambda: recover(folder), lambda: sequences(folder), lambda: Journal.open(folder, 3)):
            with pytest.raises(journals.JournalCorrupt) as error:
                use()
            assert (error.value.path.name, error.value.record, error.value.sequence) == (name, 30, file * SEGMENT + 30)


def test_a_missing_or_exchanged_file_is_named(tmp_path: Path, three_files: dict[str, bytes]) -> None:
    first, second, third = sorted(three_files)
    folder = write_files(tmp_path, {first: three_files[first], third: three_files[third]})
    with pytest.raises(journals.JournalForeignFile, match="segment 1 is missing"):
        recover(folder)
    write_files(folder, {second: three_files[third]})
    with pytest.raises(journals.JournalForeignFile, match="it is segment 2"):
        recover(folder)
    assert verify(folder).problems[0].kind == "foreign"
    other = make(tmp_path / "other", 2 * SEGMENT + 77)
    write_files(folder, {second: (other / second).read_bytes()})
    with pytest.raises(journals.JournalForeignFile, match="another journal"):
        recover(folder)
    (folder / second).write_bytes(b"notes of somebody")
    with pytest.raises(journals.JournalForeignFile):
        recover(folder)


# ---------------------------------------------------------------- refusals


def test_typed_refusals(tmp_path: Path) -> None:
    with pytest.raises(journals.JournalNotFound):
        Journal.open(tmp_path / "none", 3)
    with pytest.raises(journals.JournalNotFound):
        JournalReader(tmp_path)
    folder = make(tmp_path / "journal", 5)
    with pytest.raises(journals.JournalExists):
        Journal.create(folder, 3)
    with pytest.raises(journals.JournalForeignFile, match="of shard 3, not 4"):
        Journal.open(folder, 4)
    with Journal.open(folder, 3), pytest.raises(journals.JournalBusy):
        Journal.open(folder, 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(journals.JournalReadOnly):
        Journal.create(tmp_path / "file" / "journal", 3)
    with pytest.raises(ValueError, match="power of two"):
        Journal.create(tmp_path / "x", 3, segment_records=1000)
    with pytest.raises(journals.JournalNoSpace) as error:
        Journal.create(tmp_path / "huge", 3, segment_records=1 << 40)
    assert error.value.needed_bytes > 1 << 46
    assert [p.name for p in (tmp_path / "huge").iterdir()] == ["lock"]


_FULL = """
import errno, resource, sys
sys.path.insert(0, {here!r})
import test_journal, numpy as np
from tickmesh.node.journal import Journal
with Journal.create({folder!r}, 3, segment_records=512, sync="none") as journal:
    test_journal.until(lambda: journal._prepared == 4, "the helper")
    nothing = test_journal.events(0, 0)
    assert test_journal._append(journal.arrays, nothing, np.zeros(1, np.int64)) == journal.append(nothing) == 0  # the cache is a file too
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    done = int(test_journal._append(journal.arrays, test_journal.events(0, 5000), np.zeros(1, np.int64)))
    assert done == 2048, done
    assert journal.state == errno.EFBIG, journal.state
    assert journal.append(test_journal.events(0, 1)) == 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    test_journal.until(lambda: journal.state == 0, "room")
    assert journal.append(test_journal.events(2048, 3000)) == 3000
"""


def test_no_more_room_is_a_state_and_passes(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: reserving the next segment fails in the same call."""
    code = _FULL.format(here=os.path.dirname(__file__), folder=str(tmp_path / "journal"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert os.strerror(errno.EFBIG) in done.stderr, "it is logged"
    assert sequences(tmp_path / "journal") == list(range(5048))
    assert verify(tmp_path / "journal").ok


@pytest.mark.slow
def test_with_bounds_checks() -> None:
    """Appending, reading and recovering once more, with every index checked."""
    check_again(__file__, "comes_out or compiled or every_byte")
