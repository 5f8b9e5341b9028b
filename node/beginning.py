"""How a node's shards begin: afresh, or where their journals end, through the configurations that those name."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import structlog

from tickmesh.control.config import CONNECTED, Config
from tickmesh.node.errors import NodeError
from tickmesh.node.frames import CalculationNames
from tickmesh.node.gateways import signal_names
from tickmesh.node.journal import Journal, JournalReader
from tickmesh.node.journal_replay import JournalStepper
from tickmesh.node.pipeline import make_shard, risk_limits
from tickmesh.node.restore import RestoredShard
from tickmesh.node.shard import Shard
from tickmesh.node.shard_thread import ShardThread
from tickmesh.node.snapshot import SnapshotError
from tickmesh.node.snapshotter import Start, load_start, starts
from tickmesh.node.store_link import source_numbers
from tickmesh.node.versions import Document, Documents
from tickmesh.transports.ring import Ring

Progress = Callable[[str], None] | None
_RECORD_BYTES = 72
_WAIT_S = 0.001
_PAGE_BYTES = 4096
_log = structlog.get_logger("node")


class BeginningError(NodeError):
    """The journals and the configuration do not fit; the message says what to do."""


def goes_on(config: Config) -> bool:
    """Whether a node of this configuration goes on from its journals; a recording or a simulation starts anew."""
    settings = config.journal
    live = ("multicast", "rdma", *CONNECTED)
    return settings.enabled and settings.restore and all(options.type in live for options in config.data_sources.values())


def journal_folder(config: Config, shard: int) -> Path:
    """The folder of a shard's journal."""
    return config.cluster.data_path / "journal" / config.cluster.node / f"shard-{shard}"


def journal_folders(config: Config) -> list[Path]:
    """The folder of each shard's journal."""
    return [journal_folder(config, number) for number in range(config.cluster.shards)]


def choose_document(config: Config, version: int | None) -> Document:
    """The document that the node is to run, with its version and the numbers of its sources.

    Args:
        version: of the configuration; None: the journals' last one, or the next after it if it is another configuration.

    Raises:
        BeginningError: the journals say otherwise of this version.
        DocumentError: a file of it cannot be read.
    """
    newest = _newest(config) if goes_on(config) else None
    if newest is None:
        return Document.of(config, version or 0, {})
    document = Document.of(config, newest.version, newest.sources, newest.order_ids)
    same = document.same_market(newest)
    if version is None:
        version = newest.version if same else newest.version + 1
    elif version < newest.version or (version == newest.version and not same):
        reason = "is older than" if version < newest.version else "is another one than the configuration of that number in"
        raise BeginningError(f"configuration {version} {reason} the journal ({newest.version}): apply it anew, or move the journal away")
    return Document.of(config, version, newest.sources, newest.order_ids)


def shared_document(config: Config, version: int | None) -> Document:
    """The document of a node that shares its shards with others; what a shard begins under, its journal says.

    Sources have the numbers that the store gives, or, while it is away, those of this node's journals. Orders are numbered per instrument,
    which never has to change.

    Raises:
        DocumentError: a file of it cannot be read.
    """
    newest = _newest(config)
    known = dict(newest.sources) if newest else {}
    return Document.of(config, version or (newest.version if newest else 0), known | source_numbers(config, known), "per_instrument")


def _newest(config: Config) -> Document | None:
    found = [Documents(folder) for folder in journal_folders(config)]
    versions = [(max(documents.versions()), documents) for documents in found if documents.versions()]
    if not versions:
        return None
    version, documents = max(versions, key=lambda pair: pair[0])
    return documents.read(version)


def open_journals(config: Config, document: Document, journals: list[Journal]) -> None:
    """Open or make each shard's journal, into `journals`; one of a run that does not go on is put aside."""
    settings = config.journal
    for number, folder in enumerate(journal_folders(config)):
        if folder.exists() and any(folder.iterdir()):
            if goes_on(config):
                journals.append(Journal.open(folder, number, config_version=document.version, sync=settings.sync))
                continue
            previous = folder.with_name(folder.name + ".previous")
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
        journals.append(make_journal(config, folder, number, document.version))


def make_journal(config: Config, folder: Path, shard: int, version: int) -> Journal:
    """A new journal of a shard, that begins under a version of the configuration.

    Raises:
        JournalError: there is one already, or it cannot be made.
    """
    records = 1 << max(9, (config.journal.segment_mb * (1 << 20) // _RECORD_BYTES).bit_length() - 1)
    return Journal.create(folder, shard, segment_records=records, config_version=version, sync=config.journal.sync)


def possible_starts(document: Document, journal: Path) -> list[Start]:
    """Where a shard can begin, the earliest first: with its journal, and at its snapshots.

    Args:
        document: what a journal that knows no configuration yet begins under; it is then written beside it.
        journal: the shard's folder of it.
    """
    documents = Documents(journal)
    version = JournalReader(journal).config_version
    if version not in documents.versions():
        documents.write(replace(document, version=version))
    return starts(journal)


def begin_at(config: Config, possible: Sequence[Start], delivered: int | None, output: Ring, progress: Progress) -> tuple[Start, Shard]:
    """A shard at the latest start that is good.

    What a snapshot contains is not made again, so all its outputs must have been delivered. The earliest start is always good, since
    nothing was deleted that it needs.

    Args:
        config: with the sizes that are configured now.
        possible: starts, the earliest first.
        delivered: the last output that every output stream holds; None: that is not known now.
        output: takes the shard's outputs.

    Raises:
        BeginningError: there is no start, or none that can be loaded.
    """
    reason = "it has lost its oldest segments, and no snapshot fits it"
    good = [start for start in possible[1:] if delivered is not None and start.document.outputs <= delivered]
    for start in reversed([*possible[:1], *good]):
        try:
            return start, shard_at(config, start, output, progress)
        except SnapshotError as error:
            _log.warning("a snapshot cannot be used", reason=str(error))
            reason = str(error)
    raise BeginningError(f"a shard cannot go on from its journal ({reason}): move it away, or set journal.restore = false")


def begin_shard(config: Config, document: Document, output: Ring, progress: Progress) -> Shard:
    """A fresh shard under its first configuration, of the sizes that are configured now."""
    return shard_at(config, Start(document, 0, RestoredShard()), output, progress)


def shard_at(config: Config, start: Start, output: Ring, progress: Progress) -> Shard:
    """A shard as it was at a start, of the sizes that are configured now.

    Raises:
        SnapshotError: the snapshot is damaged, or the sizes are others now.
    """
    document = start.document
    shard = make_shard(config, document.plan(), output, document.order_ids, progress)
    shard.arrays.limits[:] = np.repeat(risk_limits(document.config), 2)
    shard.arrays.books.orders.view(np.uint8)[::_PAGE_BYTES] = 0  # spread all over: not a page fault for each of the first orders
    load_start(start, shard)
    return shard


def replay(
    thread: ShardThread, start: Start, target: Document, know: Callable[[Mapping[int, CalculationNames]], None],
    stop: threading.Event, progress: Progress,
) -> None:  # fmt: skip
    """Bring a shard that does not run yet to where its journal ends, and then to the configuration that the node is to run.

    Args:
        start: where the shard is.
        target: what the node is to run.
        know: told how the calculations of a version are called.
        stop: ends it early.
    """
    journal, documents = thread.journal, thread.documents
    assert journal is not None
    assert documents is not None
    stepper = JournalStepper(thread.shard, start.document, documents)
    left = journal.next_sequence - start.sequence
    if left and progress:
        snapshot = f" after the snapshot at {start.sequence:,}" if start.path else ""
        progress(f"shard {thread.number}: replaying {left:,} events of the journal{snapshot}")
    for batch in JournalReader(journal.folder).batches(start.sequence) if left else ():
        mine = batch.copy()  # a shard completes events in place
        for begin, end in stepper.pieces(mine):
            _adopt(thread, stepper, know)
            if not _step(thread, mine, begin, end, stop, progress):
                return
        _adopt(thread, stepper, know)
    if thread.version == target.version:
        return
    documents.write(target)
    event, then = stepper.change_to(target, time.time_ns())
    journal.append(event)
    if _step(thread, event, 0, 1, stop, progress):
        then()
        _adopt(thread, stepper, know)


def _adopt(thread: ShardThread, stepper: JournalStepper, know: Callable[[Mapping[int, CalculationNames]], None]) -> None:
    know({stepper.document.version: signal_names(stepper.shard.plan)})
    if thread.shard is not stepper.shard:
        thread.adopt(stepper.shard)


def _step(thread: ShardThread, batch: np.ndarray, first: int, end: int, stop: threading.Event, progress: Progress) -> bool:
    """Step over events of the journal; where the output ring is full, the gateway has to deliver first. False if it was stopped."""
    told = False
    while first < end and not stop.is_set():
        done = thread.step_again(batch, first, end)
        first += done
        if done == 0:
            if not told and progress:
                progress("more outputs than the ring holds are undelivered: waiting for NATS to take them")
            told = True
            stop.wait(_WAIT_S)
    return first >= end
