"""The checker: reads a shard's output stream, and its journal, and says whether every output is there, once, in order, and the right one.

It believes nobody: not the numbers that the publisher counted, not the stream's own. Of the stream it looks at every message; of the
journal at every checksum; and then it makes the outputs again, by the deterministic replay of the journal, and compares each of them
bit for bit.

    report = await check_stream(link, "demo", 0)                # the stream by itself
    report = await check_stream(link, "demo", 0, journal=Path("…/journal/n1/shard-0"))
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from tickmesh.node.event import EVENT, EventArray, Kind
from tickmesh.node.frames import FrameError, FrameHeader, decode_frame, stream_name, stream_subject
from tickmesh.node.journal import JournalError, verify
from tickmesh.node.journal_replay import JournalIncomplete, replay_journal
from tickmesh.node.versions import DocumentError
from tickmesh.transports.nats import NatsLink
from tickmesh.transports.nats_reader import StoredMessage, StreamReader, stream_bounds

Fault = Literal[
    "lost", "duplicated", "out_of_order", "stale_epoch", "differing", "not_in_replay", "not_delivered", "malformed", "journal"
]  # fmt: skip
FAULTS_KEPT = 100
"""Findings that are kept with their details; all are counted."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        fault: ``lost``: outputs that no message holds; ``duplicated``: outputs that an earlier message held; ``out_of_order``: a message
            that begins before the one before it; ``stale_epoch``: written under an epoch after a higher one had been seen; ``differing``:
            not what the journal gives; ``not_in_replay``: beyond what the journal gives; ``not_delivered``: the journal gives it, the
            stream ends before it; ``malformed``: no frame; ``journal``: it cannot be replayed.
        first, last: output sequences.
        stream_sequence: of the message; 0 if it is about no message.
        detail: for people.
    """

    fault: Fault
    first: int
    last: int
    stream_sequence: int
    detail: str


@dataclass
class Report:
    """What the checker found.

    Attributes:
        shard: the shard.
        messages, fences, outputs: what the stream holds.
        first, last: output sequences of the first and the last output in it; 0 if there is none.
        gaps_declared: outputs that the node itself reported missing (``drop_oldest``): no fault, but said here.
        epochs: under which frames were written, with how many outputs each.
        config_versions: the same for configurations.
        replayed: outputs that the replay of the journal made; -1: there was no replay.
        compared: of those in the stream, how many were compared with it.
        counts: findings by fault.
        findings: the first of them.
    """

    shard: int
    messages: int = 0
    fences: int = 0
    outputs: int = 0
    first: int = 0
    last: int = 0
    gaps_declared: int = 0
    epochs: dict[int, int] = field(default_factory=dict)
    config_versions: dict[int, int] = field(default_factory=dict)
    replayed: int = -1
    compared: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether nothing was found."""
        return not self.counts

    def add(self, fault: Fault, first: int, last: int, stream_sequence: int, detail: str) -> None:
        """Note a finding."""
        self.counts[fault] = self.counts.get(fault, 0) + 1
        if len(self.findings) < FAULTS_KEPT:
            self.findings.append(Finding(fault, first, last, stream_sequence, detail))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"good": self.good, **asdict(self)}

    def __str__(self) -> str:
        what = f"shard {self.shard}: {self.outputs:,} outputs in {self.messages:,} messages, {len(self.epochs)} epochs"
        replay = "" if self.replayed < 0 else f", {self.compared:,} compared with the replay"
        if self.good:
            return f"{what}{replay}: none lost, none twice, all in order"
        faults = ", ".join(f"{count} {fault}" for fault, count in sorted(self.counts.items()))
        return "\n".join([f"{what}{replay}: {faults}", *(f"  {one.fault}: {one.detail}" for one in self.findings[:10])])


class StreamCheck:
    """Looks at the messages of one shard's stream, in the order of the stream, and keeps their outputs for a comparison.

    Args:
        shard: the shard.
        expected: output sequence that should come first; None: whatever comes first (the oldest messages may have been let go).
        keep: file for the outputs, EVENT records in the order of the stream; None: they are not kept.
    """

    def __init__(self, shard: int, expected: int | None = None, keep: BinaryIO | None = None) -> None:
        self.report = Report(shard)
        self._next, self._keep, self._epoch = expected, keep, 0
        self._lost: list[tuple[int, int]] = []

    def take(self, message: StoredMessage) -> None:
        """The next message."""
        report = self.report
        report.messages += 1
        epoch = int(message.headers.get("Epoch", "0"))
        if message.headers.get("Kind") == "fence":
            report.fences += 1
            self._see_epoch(epoch, 0, 0, message.sequence)
            return
        try:
            header, events = decode_frame(message.data)
        except FrameError as error:
            report.add("malformed", 0, 0, message.sequence, f"message {message.sequence}: {error}")
            return
        if header.epoch != epoch or header.shard != report.shard:
            what = f"message {message.sequence} is of shard {header.shard}, epoch {header.epoch}; its headers and its stream say otherwise"
            report.add("malformed", header.first, header.last, message.sequence, what)
        self._see_epoch(header.epoch, header.first, header.last, message.sequence)
        self._see_frame(header, events, message.sequence)

    def _see_epoch(self, epoch: int, first: int, last: int, sequence: int) -> None:
        if epoch < self._epoch:
            what = f"message {sequence} (outputs {first} to {last}) was written under epoch {epoch} after {self._epoch}"
            self.report.add("stale_epoch", first, last, sequence, what)
        self._epoch = max(self._epoch, epoch)

    def _see_frame(self, header: FrameHeader, events: EventArray, sequence: int) -> None:
        report = self.report
        expected = header.first if self._next is None else self._next
        if header.first > expected:
            what = f"outputs {expected} to {header.first - 1} are in no message; message {sequence} begins at {header.first}"
            report.add("lost", expected, header.first - 1, sequence, what)
            self._lost.append((expected, header.first - 1))
        elif header.last < expected:
            what = f"message {sequence} holds outputs {header.first} to {header.last} after {expected - 1}"
            late = any(first <= header.last and header.first <= last for first, last in self._lost)
            report.add("out_of_order" if late else "duplicated", header.first, header.last, sequence, what)
        elif header.first < expected:
            what = f"outputs {header.first} to {expected - 1} are in message {sequence} again"
            report.add("duplicated", header.first, expected - 1, sequence, what)
        if header.count and not np.array_equal(events["seq"], np.arange(header.first, header.last + 1, dtype=np.uint64)):
            what = f"the outputs of message {sequence} are not numbered {header.first} to {header.last}"
            report.add("out_of_order", header.first, header.last, sequence, what)
        fresh = events[max(0, expected - header.first) :]
        report.outputs += len(fresh)
        report.gaps_declared += header.missing
        report.epochs[header.epoch] = report.epochs.get(header.epoch, 0) + len(fresh)
        report.config_versions[header.config_version] = report.config_versions.get(header.config_version, 0) + len(fresh)
        if len(fresh):
            report.first = report.first or int(fresh["seq"][0])
            report.last = int(fresh["seq"][-1])
            if self._keep is not None:
                self._keep.write(fresh.tobytes())
        self._next = max(expected, header.last + 1)


class _Comparison:
    """Compares outputs that a replay makes with those of the stream."""

    def __init__(self, stored: EventArray, report: Report) -> None:
        self._stored, self._report, self._at = stored, report, 0

    def take(self, made: EventArray) -> None:
        """The replay's next outputs."""
        report = self._report
        report.replayed = max(report.replayed, 0) + len(made)
        made = made[np.searchsorted(made["seq"], report.first) :]  # the stream may have let older ones go
        while len(made):
            stored = self._stored[self._at : self._at + len(made)]
            if not len(stored):
                return
            both = min(len(stored), len(made))
            here, there = stored[:both], made[:both]
            if int(here["seq"][0]) > int(there["seq"][0]):  # one that the stream lacks: reported as lost, or declared
                made = made[np.searchsorted(made["seq"], here["seq"][0]) :]
                continue
            same = int(np.argmin(np.append(here["seq"] == there["seq"], False)))
            self._compare(here[:same], there[:same])
            self._at += same
            made = made[same:]
            if same == 0:
                return  # beyond the replay; counted at the end

    def _compare(self, stored: EventArray, made: EventArray) -> None:
        self._report.compared += len(stored)
        words, others = stored.view(np.uint64).reshape(-1, 8), made.view(np.uint64).reshape(-1, 8)
        for at in np.flatnonzero((words != others).any(axis=1)):
            fields = [name for name in EVENT.names or () if stored[name][at] != made[name][at]]
            sequence = int(stored["seq"][at])
            what = ", ".join(f"{name} {stored[name][at]} instead of {made[name][at]}" for name in fields)
            self._report.add("differing", sequence, sequence, 0, f"output {sequence}: {what}")

    def finish(self, last_made: int, last_due: int) -> None:
        """After the last output of the replay, of which those up to `last_due` have to be in the stream."""
        report = self._report
        if report.last > last_made:
            what = f"outputs {last_made + 1} to {report.last} are in the stream, but the journal does not give them"
            report.add("not_in_replay", last_made + 1, report.last, 0, what)
        elif last_due > report.last:
            what = f"the journal gives outputs up to {last_due}, the stream ends at {report.last}"
            report.add("not_delivered", report.last + 1, last_due, 0, what)


def check_messages(
    shard: int, messages: Iterable[StoredMessage], journal: Path | None = None, *, expected: int | None = None, ended: bool = True
) -> Report:
    """Check messages that are at hand; see :func:`check_stream`."""
    with tempfile.TemporaryFile() as kept:
        check = StreamCheck(shard, expected, kept if journal else None)
        for message in messages:
            check.take(message)
        if journal is not None:
            _compare_with_journal(check.report, journal, kept, ended)
        return check.report


def _compare_with_journal(report: Report, journal: Path, kept: BinaryIO, ended: bool) -> None:
    kept.flush()
    stored = np.memmap(kept, EVENT, "r") if report.outputs else np.zeros(0, EVENT)
    comparison, last_made, last_due = _Comparison(stored, report), 0, 0

    def observe(made: EventArray) -> None:
        nonlocal last_made, last_due
        if len(made):
            told = made[made["kind"] != Kind.TIMER]  # a silence makes these for ever: one may be under way at any end
            last_made, last_due = int(made["seq"][-1]), int(told["seq"][-1]) if len(told) else last_due
            comparison.take(made)

    try:
        for problem in verify(journal).problems:
            if problem.kind != "torn":  # what a crash has left half written was never processed
                report.add("journal", 0, 0, 0, f"{problem.file}, record {problem.record}: {problem.kind} ({problem.detail})")
        replay_journal(journal, observe=observe)
    except (JournalError, JournalIncomplete, DocumentError) as error:
        report.add("journal", 0, 0, 0, str(error))
        return
    report.replayed = max(report.replayed, 0)
    if ended or report.last > last_made:
        comparison.finish(last_made, last_due)


async def check_stream(
    link: NatsLink, cluster: str, shard: int, journal: Path | None = None, *, expected: int | None = None, ended: bool = True
) -> Report:
    """Check a shard's output stream up to its present end.

    Args:
        link: a connection.
        cluster, shard: whose outputs.
        journal: folder of the journal of whoever leads, or led last; None: the stream by itself.
        expected: output sequence that should come first; None: whatever comes first.
        ended: nothing more is being delivered, so that what the journal gives has to be in the stream.

    Raises:
        StreamMissing: there is no such stream.
    """
    name = stream_name(cluster, shard)
    first, last = await stream_bounds(link, name)
    with tempfile.TemporaryFile() as kept:
        check = StreamCheck(shard, expected, kept if journal else None)
        reader = StreamReader(link, name, first, subject=stream_subject(cluster, shard))
        try:
            done = first - 1
            while done < last:
                message = await reader.next()
                check.take(message)
                done = message.sequence
        finally:
            await reader.close()
        if journal is not None:
            await asyncio.to_thread(_compare_with_journal, check.report, journal, kept, ended)
        return check.report


