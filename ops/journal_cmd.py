"""``tickmesh journal show`` and ``tickmesh journal verify``: what a shard's journal holds, and whether every bit of it still does."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from tickmesh.node.frames import InstrumentNames, event_maps
from tickmesh.node.journal import JournalReader, JournalReport, verify
from tickmesh.ops.subscribe_cmd import map_line

EXIT_OK, EXIT_DAMAGED = 0, 3


class BadRange(Exception):
    """The wanted events are not in the journal.

    Attributes:
        start: the sequence asked for.
        first, end: the oldest sequence kept, and the one after the newest.
    """

    def __init__(self, start: int, first: int, end: int) -> None:
        kept = f"it holds {first} to {end - 1}" if end > first else "it is empty"
        super().__init__(f"sequence {start} is not in this journal, {kept}; choose another --from")
        self.start, self.first, self.end = start, first, end


def journal_events(folder: Path, start: int | None = None, count: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Sequence and fields of a journal's events, with the symbols that its REFERENCE events give.

    Args:
        folder: the journal.
        start: first sequence; the ones before are read too, for the symbols. None: the oldest kept.
        count: at most so many; None: all.

    Raises:
        BadRange: `start` is not in the journal.
        JournalNotFound, JournalForeignFile: the folder holds no journal, or something else.
        JournalCorrupt: a record does not hold; every event before it has been given.
    """
    reader = JournalReader(folder)
    at = reader.first_sequence
    begin = at if start is None else start
    end = None if count is None else begin + count
    if begin < at:
        raise BadRange(begin, at, verify(folder).next_sequence)
    names = InstrumentNames()
    for batch in reader.batches():
        names.learn(batch)
        first, last = max(begin, at), at + len(batch) if end is None else min(end, at + len(batch))
        if first < last:
            yield from enumerate(event_maps(batch[first - at : last - at], names), first)
        at += len(batch)
        if end is not None and at >= end:
            return
    if start is not None and start >= at:
        raise BadRange(start, reader.first_sequence, at)


def show_command(
    folder: Path, *, start: int | None = None, count: int | None = None, as_json: bool = False, out: TextIO | None = None
) -> int:
    """Print events: their place in the journal, then what they say.

    Returns:
        Exit status 0.

    Raises:
        As :func:`journal_events`.
    """
    target = out or sys.stdout
    for sequence, fields in journal_events(folder, start, count):
        print(json.dumps({"journal": sequence, **fields}) if as_json else f"{sequence:>12}  {map_line(fields)}", file=target)
    return EXIT_OK


def verify_command(folder: Path, *, as_json: bool = False, out: TextIO | None = None) -> int:
    """Check a journal and print what was found.

    Returns:
        Exit status: 0, or 3 if it is damaged.

    Raises:
        JournalNotFound: there is none.
    """
    report = verify(folder)
    text = json.dumps({"folder": str(folder), "ok": report.ok, **asdict(report)}, indent=2) if as_json else report_text(folder, report)
    print(text, file=out or sys.stdout)
    return EXIT_OK if report.ok else EXIT_DAMAGED


def report_text(folder: Path, report: JournalReport) -> str:
    """What :func:`tickmesh.node.journal.verify` found, for people."""
    span = f"sequences {report.first_sequence} to {report.next_sequence - 1}" if report.records else "no events"
    rows = [f"{folder}: shard {report.shard}, {report.records:,} events that hold in {report.files} files, {span}"]
    for problem in report.problems:
        place = "header" if problem.record < 0 else f"record {problem.record} (sequence {problem.sequence})"
        rows.append(f"  {problem.file}: {place}: {problem.kind}, {problem.detail}")
    if report.ok:
        rows.append("whole")
    elif all(problem.kind == "torn" for problem in report.problems):
        rows.append("TORN: a write was cut short at the end; the node that opens it next cuts that off")
    else:
        rows.append("DAMAGED: take the journal of a standby, or a copy")
    return "\n".join(rows)
