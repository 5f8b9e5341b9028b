"""Stepping over a journal: a shard that changes with the configuration where its journal says so, in a restart and in a replay alike."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tickmesh.node.book import numbering_of
from tickmesh.node.event import ALL_INSTRUMENTS, ANY_VIEW, EVENT, NO_SIDE, EventArray, Flag, Kind
from tickmesh.node.handover import Carry, carry_now
from tickmesh.node.journal import JournalReader
from tickmesh.node.pipeline import make_shard, risk_limits
from tickmesh.node.restore import read_restored
from tickmesh.node.shard import BATCH_EVENTS, Shard
from tickmesh.node.succession import same_loop, set_parameters, succeed
from tickmesh.node.summary import count_events, describe_instrument
from tickmesh.node.versions import Document, Documents
from tickmesh.transports.ring import W_CLAIMED, W_GATE, W_PUBLISHED, Ring
from tickmesh.transports.toolbox import zeros_aligned

NO_SOURCE = 0xFFFF
"""In the `price` of a CONFIG event, which is of no source."""
_RING_EVENTS = 1 << 18


class JournalIncomplete(Exception):
    """A journal does not begin at its beginning; the message says what to do."""


def config_event(version: int, slot: int, new_code: bool, now_ns: int) -> EventArray:
    """The CONFIG event of a version, EVENT[1]."""
    event = zeros_aligned(1, EVENT)
    event["ts_recv"], event["instrument"], event["kind"], event["side"] = now_ns, ALL_INSTRUMENTS, Kind.CONFIG, NO_SIDE
    event["flags"] = Flag.NEW_CODE if new_code else 0
    event["price"], event["id"], event["aux"] = NO_SOURCE, version, slot
    return event


def begin_version(shard: Shard, version: int, outputs: int) -> None:
    """Before a shard's first event: the version that it begins under, and the outputs made before."""
    arrays = shard.arrays
    arrays.core["config_version"], arrays.core["out_seq"] = version, outputs
    arrays.changes[0, 0], arrays.changes[1] = 1, (outputs, version)
    arrays.out.words[[W_PUBLISHED, W_CLAIMED, W_GATE]] = outputs


def carry_into(shard: Shard, carry: Carry) -> None:
    """Do what a loop does when it takes over, for a shard that no loop runs."""
    a = shard.arrays
    carry_now(carry, a.books, a.core, a.info, a.patterns, a.masks, a.last)


class JournalStepper:
    """A shard on its way through a journal.

    Attributes:
        shard: as it is now; another object after a change of code.
        document: the configuration in force.
    """

    def __init__(self, shard: Shard, document: Document, documents: Documents) -> None:
        self.shard, self.document, self._documents = shard, document, documents

    def pieces(self, batch: EventArray) -> Iterator[tuple[int, int]]:
        """Ranges of a batch to step over, one after the other; the configuration changes in between."""
        first = 0
        for at in np.flatnonzero(batch["kind"] == Kind.CONFIG):
            yield from _cut(first, int(at))
            event = batch[at]
            document = self._documents.read(int(event["id"]))
            new_code = bool(event["flags"] & Flag.NEW_CODE)
            if not new_code:
                self._set(document, int(event["aux"]) & 1)
            yield int(at), int(at) + 1
            if new_code:
                self.turn_to(document)
            first = int(at) + 1
        yield from _cut(first, len(batch))

    def _set(self, document: Document, slot: int) -> None:
        plan = document.plan()
        set_parameters(self.shard, plan, risk_limits(document.config), slot)
        self.shard.plan, self.document = plan, document

    def turn_to(self, document: Document) -> None:
        """Go on under other code."""
        self.shard, carry = succeed(self.shard, document.plan(), risk_limits(document.config), document.order_ids)
        carry_into(self.shard, carry)
        self.document = document

    def change_to(self, document: Document, now_ns: int) -> tuple[EventArray, Callable[[], None]]:
        """Change between two events, with no loop running: the CONFIG event to journal and step over, and what to do after it."""
        plan, slot = document.plan(), 1 - int(self.shard.arrays.core["parameters"][0])
        if same_loop(self.shard.plan, plan) and document.order_ids in ("", numbering_of(self.shard.arrays.books)):
            self._set(document, slot)
            return config_event(document.version, slot, False, now_ns), lambda: None
        return config_event(document.version, slot, True, now_ns), lambda: self.turn_to(document)


def _cut(first: int, end: int) -> Iterator[tuple[int, int]]:
    while first < end:
        yield first, min(first + BATCH_EVENTS, end)
        first += BATCH_EVENTS


# ---------------------------------------------------------------- a replay of a journal by itself


def replay_journal(
    folder: Path,
    depth: int = 10,
    progress: Callable[[str], None] | None = None,
    observe: Callable[[EventArray], None] | None = None,
) -> dict[str, Any]:
    """Run one shard's journal through the configurations that it names; the outputs are those of the node, bit for bit.

    Args:
        folder: the journal's.
        depth: levels of each book in the summary.
        progress: told when something has to be compiled.
        observe: gets the outputs, batch by batch.

    Returns:
        ``{"shard", "events_total", "outputs_total", "digest": SHA-256 of all outputs, "versions": [{"version", "outputs_before"}],
        "events": by kind, "instruments": as in :func:`tickmesh.node.summary.summarise`}``.

    Raises:
        JournalIncomplete: its oldest segments were deleted.
        DocumentError: the configuration of a version is missing.
        JournalError: see :mod:`tickmesh.node.journal`.
    """
    reader, documents = JournalReader(folder), Documents(folder)
    if reader.first_sequence:
        raise JournalIncomplete(f"the journal in {folder} begins at sequence {reader.first_sequence}: its older segments were deleted")
    document = documents.read(reader.config_version)
    ring = Ring.create(None, _RING_EVENTS, EVENT, mode="lossy")
    shard = make_shard(document.config, document.plan(), ring, document.order_ids, progress)
    begin_version(shard, document.version, document.outputs)
    stepper, outputs, digest, total = JournalStepper(shard, document, documents), ring.reader("replay"), hashlib.sha256(), 0
    versions = [{"version": document.version, "outputs_before": document.outputs}]
    for batch in reader.batches():
        mine = zeros_aligned(len(batch), EVENT)
        mine[:] = batch
        total += len(mine)
        for first, end in stepper.pieces(mine):
            stepper.shard.step(mine.view(ANY_VIEW), first, end)
            if mine["kind"][first] == Kind.CONFIG:
                made = int(stepper.shard.arrays.core["out_seq"][0])
                versions.append({"version": int(mine["id"][first]), "outputs_before": made})
            made_now = outputs.read(_RING_EVENTS).view(EVENT)
            digest.update(made_now.tobytes())
            if observe:
                observe(made_now)
    return {
        "shard": reader.shard,
        "events_total": total,
        "outputs_total": int(stepper.shard.arrays.core["out_seq"][0]) - document.outputs,
        "digest": digest.hexdigest(),
        "versions": versions,
        "events": count_events([stepper.shard]),
        "instruments": _instruments(folder, stepper.shard, depth),
    }


def _instruments(folder: Path, shard: Shard, depth: int) -> dict[str, Any]:
    [journal] = read_restored([folder]).shards
    return {journal.symbol(number)[1]: describe_instrument(shard, number, depth) for number in shard.seen_instruments()}
