"""Taking snapshots of a running node's shards, without stopping them for an instant.

A shard is a function of its journal. So a snapshot is not taken of the shard that runs: a process of its own, of low priority, makes the
shard of the last snapshot, steps it over what the journal has got since then, and writes that down. The running loop takes no part in it
and pauses for 0 ms per 100 MB; the price is the processor time of going over the events a second time, on another core, and the memory of
one shard while it lasts. What is written has come out of the journal and nothing else, so it also shows, each time, that the journal
is enough.

A restart begins from the newest snapshot that fits: of this journal (its chain of checksums says so), with arrays of the same shape, and
with no output in it that an output stream still lacks. What comes after it is in the journal. Segments that lie wholly before the older of
the two snapshots that are kept may go.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from tickmesh.node.event import ANY_VIEW, EVENT
from tickmesh.node.journal import JournalReader
from tickmesh.node.journal_replay import JournalStepper, begin_version
from tickmesh.node.pipeline import make_shard
from tickmesh.node.restore import RestoredShard
from tickmesh.node.shard import Shard
from tickmesh.node.snapshot import SnapshotError, SnapshotFacts, fits, load_into, read_facts, snapshots, write_snapshot
from tickmesh.node.versions import Document, Documents
from tickmesh.transports.ring import W_CLAIMED, W_GATE, W_PUBLISHED, Ring
from tickmesh.transports.toolbox import zeros_aligned

_RING_EVENTS = 1 << 14
_BATCH_EVENTS = 1 << 14
_NICE = 10
_PR_SET_PDEATHSIG = 1
_END_S = 5.0
_TAKES_S = 3600.0
_log = structlog.get_logger("node")


def snapshot_folder(journal: Path) -> Path:
    """Where the snapshots of a journal's shard lie."""
    return journal / "snapshots"


@dataclass(frozen=True)
class Start:
    """Where a shard can begin.

    Attributes:
        document: configuration in force there.
        sequence: of the first event to step over.
        known: what the journal says before it.
        path: of the snapshot; None: it begins with the journal.
    """

    document: Document
    sequence: int
    known: RestoredShard
    path: Path | None = None


def starts(journal: Path) -> list[Start]:
    """Where the shard of a journal can begin, the earliest first: the journal's own beginning, if it is whole, and snapshots of it.

    Raises:
        JournalError, DocumentError: the journal, or the configuration that it begins under, cannot be read.
    """
    reader, documents = JournalReader(journal), Documents(journal)
    found = []
    if reader.first_sequence == 0:
        found.append(Start(documents.read(reader.config_version), 0, RestoredShard()))
    for path in snapshots(snapshot_folder(journal)):
        with contextlib.suppress(SnapshotError):  # damaged, or of another version: it is as if it were not there
            facts = read_facts(path)
            if facts.journal_id == reader.journal_id and reader.chain_before(facts.sequence) == facts.chain:
                document = _under(documents, facts)
                found.append(Start(document, facts.sequence, RestoredShard.from_json(facts.sources), path))
    return found


def start_from(journal: Path, path: Path) -> Start:
    """The start that a snapshot is which has come before the events that it was made of.

    Raises:
        SnapshotError, DocumentError: it, or the configuration in force there, cannot be read.
    """
    facts = read_facts(path)
    return Start(_under(Documents(journal), facts), facts.sequence, RestoredShard.from_json(facts.sources), path)


def _under(documents: Documents, facts: SnapshotFacts) -> Document:
    document = documents.read(facts.config_version)
    return Document(document.version, document.config, document.code, document.sources, document.order_ids, facts.outputs)


def load_start(start: Start, shard: Shard) -> None:
    """Bring a fresh shard of a start's configuration to the start.

    Raises:
        SnapshotError: the snapshot is damaged, or of other arrays.
    """
    if start.path is None:
        begin_version(shard, start.document.version, start.document.outputs)
        return
    load_into(start.path, shard.arrays)
    shard.arrays.out.words[[W_PUBLISHED, W_CLAIMED, W_GATE]] = int(shard.arrays.core["out_seq"][0])


# ---------------------------------------------------------------- the process that takes one


def take_snapshot(journal: Path, sizes: tuple[int, int] | None = None) -> SnapshotFacts | None:
    """Make the shard of a journal as it is at the journal's present end, and write it down; None if nothing has come since the last one.

    Args:
        journal: its folder.
        sizes: `instruments_max` and `orders_max`; None: those of the configuration that it begins under.

    Raises:
        JournalError, DocumentError, SnapshotError, PlanError, CompileError: it cannot be done.
    """
    ring = Ring.create(None, _RING_EVENTS, EVENT, mode="lossy")
    start, shard = _begin(journal, ring, sizes)
    reader, stepper, sequence = JournalReader(journal), JournalStepper(shard, start.document, Documents(journal)), start.sequence
    for batch in reader.batches(sequence, _BATCH_EVENTS):
        mine = zeros_aligned(len(batch), EVENT)
        mine[:] = batch
        start.known.take(mine)
        for first, end in stepper.pieces(mine):
            stepper.shard.step(mine.view(ANY_VIEW), first, end)
        sequence += len(mine)
    if sequence == start.sequence:
        return None
    chain = reader.chain_before(sequence)
    if chain is None:
        return None  # what was read has been cut off meanwhile
    core, identity = stepper.shard.arrays.core[0], (chain, reader.journal_id)
    facts = SnapshotFacts(
        reader.shard, sequence, *identity, int(core["config_version"]), int(core["out_seq"]), time.time_ns(), start.known.as_json()
    )
    write_snapshot(snapshot_folder(journal), stepper.shard.arrays, facts)
    return facts


def _begin(journal: Path, ring: Ring, sizes: tuple[int, int] | None) -> tuple[Start, Shard]:
    """The latest start whose snapshot can be loaded, and its shard."""
    failure: SnapshotError | None = None
    for start in reversed(starts(journal)):
        config = start.document.config
        if sizes is not None:
            chosen = {"instruments_max": sizes[0], "orders_max": sizes[1]}
            config = config.model_copy(update={"cluster": config.cluster.model_copy(update=chosen)})
        shard = make_shard(config, start.document.plan(), ring, start.document.order_ids)
        try:
            load_start(start, shard)
            return start, shard
        except SnapshotError as error:
            failure = error
    raise failure or SnapshotError(snapshot_folder(journal), "the journal has lost its beginning, and there is none: move the journal away")


def main() -> int:
    """Take one snapshot of the journal that the first argument names, while the process that the second one names lives."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != int(sys.argv[2]):
        return 1
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    with contextlib.suppress(OSError):  # where the kernel shares out time by session (sched(7)), that alone says nothing to others
        Path("/proc/self/autogroup").write_text(str(_NICE))
    take_snapshot(Path(sys.argv[1]), (int(sys.argv[3]), int(sys.argv[4])))
    return 0


# ---------------------------------------------------------------- the node's side


class Snapshotter:
    """Has snapshots taken of a node's journals, one at a time. :meth:`tick` now and then, from one thread; :meth:`close` in the end.

    Attributes:
        taken: snapshots so far.
        error: why the last one could not be taken; empty if it was.
    """

    def __init__(self, journals: list[Path], interval_s: float, sizes: tuple[int, int]) -> None:
        """`sizes`: `instruments_max` and `orders_max` of the shards that run."""
        self.taken, self.error = 0, ""
        self._sizes, self._limit_s = sizes, 0.0
        self._journals, self._interval_s = journals, interval_s
        self._due_s = time.monotonic() + interval_s
        self._waiting: list[Path] = []
        self._process: subprocess.Popen[str] | None = None

    def tick(self) -> None:
        """Start one if it is time, and see to the one that runs."""
        now = time.monotonic()
        if self._process is not None and self._process.poll() is not None:
            self._finish(self._process)
            self._process = None
        if self._process is not None and now > self._limit_s:
            self._process.kill()
        if self._interval_s > 0 and now >= self._due_s and not self._waiting:
            self._waiting, self._due_s = list(self._journals), now + self._interval_s
        if self._process is None and self._waiting:
            self._start(self._waiting.pop(0))

    def set_interval(self, interval_s: float) -> None:
        """Another interval from now on; 0: none are taken."""
        if interval_s != self._interval_s:
            self._interval_s, self._due_s = interval_s, time.monotonic() + interval_s

    def set_journals(self, journals: list[Path]) -> None:
        """The journals that there are from now on."""
        self._journals = journals

    def close(self) -> None:
        """End the process that takes one, if there is any."""
        self._waiting.clear()
        if self._process is not None:
            self._process.kill()
            self._process.communicate(timeout=_END_S)
            self._process = None

    def _start(self, journal: Path) -> None:
        self._limit_s = time.monotonic() + _TAKES_S
        code = "import sys; from tickmesh.node.snapshotter import main; sys.exit(main())"
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", code, str(journal), str(os.getpid()), *map(str, self._sizes)]
        try:
            self._process = subprocess.Popen(command, start_new_session=True, **pipes)
        except OSError as error:
            self._fail(f"its process cannot be started ({error.strerror})")

    def _finish(self, process: subprocess.Popen[str]) -> None:
        try:
            _, said = process.communicate(timeout=_END_S)
        except subprocess.TimeoutExpired:
            said = "its process has ended, and somebody holds its output"
        if process.returncode == 0:
            self.taken, self.error = self.taken + 1, ""
            return
        self._fail((said.strip().splitlines() or [f"its process ended with {process.returncode}"])[-1])

    def _fail(self, reason: str) -> None:
        self.error = reason
        _log.warning("no snapshot", reason=reason)


def keep_snapshots(journal: Path, delivered: int | None, arrays: Any) -> tuple[int, int] | None:
    """Delete snapshots that no restart needs, and say from where on the journal is needed.

    Kept are the newest two of which every output has been delivered, since only from such a one may a restart begin, and the newest two of
    those that are newer. What is not of this journal, or of a shard with other arrays, is no snapshot of it.

    Args:
        journal: its folder.
        delivered: the last output that every output stream holds; None: there is no stream.
        arrays: of the shard that runs.

    Returns:
        Sequence and outputs of the older of two delivered ones; None: the journal is needed as far back as it goes.

    Raises:
        JournalError: the journal cannot be read.
    """
    reader = JournalReader(journal)
    safe: list[tuple[int, int]] = []
    keep: dict[bool, list[Path]] = {True: [], False: []}
    for path in snapshots(snapshot_folder(journal)):
        with contextlib.suppress(SnapshotError):
            facts = read_facts(path)
            mine = facts.journal_id == reader.journal_id and reader.chain_before(facts.sequence) == facts.chain
            if mine and fits(path, arrays):
                good = delivered is None or facts.outputs <= delivered
                keep[good].append(path)
                if good:
                    safe.append((facts.sequence, facts.outputs))
    wanted = {*keep[True][-2:], *keep[False][-2:]}
    for path in snapshots(snapshot_folder(journal)):
        if path not in wanted and wanted:
            path.unlink(missing_ok=True)
    return safe[-2] if len(safe) > 1 else None
