"""Replication, the standby's side: one shard's journal, kept equal to the leader's.

A :class:`JournalFollower` connects to the leader, agrees with it where to go on, and appends what comes to its own journal: the same
records with the same checksums. Every frame is checked against the chain before anything of it is appended, so that a damaged byte
costs a new connection and nothing else. Acknowledged is what is in the journal's memory, which survives the process; what is on disk is
told beside it.

**A tail that the leader lacks is cut.** A leader that died or was deposed may have journalled events that reached no standby. When it
comes back as a standby, the new leader has gone on without them. They are cut off here, and nothing is lost by it: an output leaves a
node only after its inputs have been acknowledged (``acks`` of 1 or all), so that nobody has seen what came of them. With ``acks = 0`` or
after going on alone (``solo``), somebody may have.

**Epochs.** The highest epoch heard of is kept in the file ``epoch`` beside the journal. A leader of an earlier one is refused, and frames
of it are dropped, unacknowledged.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import secrets
import shutil
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import structlog

from tickmesh.node.event import EVENT
from tickmesh.node.journal import W_CHAIN, Journal, JournalError, JournalNotFound, SegmentHeader, Sync, chain_over, truncate
from tickmesh.node.journal_tail import JournalTail, TooOld
from tickmesh.node.rdma_link import STANDBY_RECORDS, answered_channel, go_over, payload_of
from tickmesh.node.replication import DOCUMENTS
from tickmesh.node.replication_link import (
    NONCE_BYTES,
    Frame,
    FrameDamaged,
    FrameKind,
    Link,
    LinkError,
    LinkOptions,
    LinkSilent,
    Reason,
    Refused,
    connect_link,
    parse_address,
    proof,
    proves,
)
from tickmesh.transports.durable import sync_folder, write_durably

SNAPSHOTS = "snapshots"
"""Folder beside the segments for the snapshots that a leader sends."""
_EPOCH_FILE, _AGREED_FILE = "epoch", "agreed"
_BACKOFF_S_MIN, _BACKOFF_S_MAX = 0.02, 1.0
_SNAPSHOT_NAME_MAX = 200
_CLOSE_EVENTS = 256
_WITHOUT_RDMA_S = 30.0
"""A link stays on TCP for so long after one over RDMA over which nothing came."""
FollowerState = Literal["idle", "connecting", "following", "refused", "failed", "stopped"]
_log = structlog.get_logger("replication")


class StaleLeader(LinkError):
    """A frame of an epoch that has passed."""


class JournalStuck(LinkError):
    """Our own journal takes nothing more; the message says why."""


class _Again(Exception):
    """Who uses the journal has asked for it once more."""


class Replica(Protocol):
    """Who uses the journal that a follower writes. Called in the follower's thread."""

    def opened(self, journal: Journal, valid: int, snapshot: Path | None) -> None:
        """The journal is there, or is there again. What was read of it at or beyond `valid` is void.

        With `snapshot`, it has no beginning: a state can only be made from that file, and the events from its sequence on.
        """

    def closing(self) -> None:
        """The journal is about to be closed: nobody may use it until it is opened again."""

    def stored(self, outputs: int, digest: int = 0) -> None:
        """Every output up to this one is in the leader's output streams; `digest` is that of the last of them, 0: not told.

        Whatever is raised voids what was made of the journal: it is opened anew.
        """


class Alone:
    """Nobody uses the journal."""

    def opened(self, journal: Journal, valid: int, snapshot: Path | None) -> None:
        """See :class:`Replica`."""

    def closing(self) -> None:
        """See :class:`Replica`."""

    def stored(self, outputs: int, digest: int = 0) -> None:
        """See :class:`Replica`."""


@dataclass
class FollowerCounters:
    """What a follower has done."""

    frames: int = 0
    events: int = 0
    connects: int = 0
    damaged: int = 0
    """Frames whose bytes were not those that were sent; each was asked for again."""
    stale: int = 0
    """Frames and greetings of an epoch that has passed; dropped."""
    cut: int = 0
    """Events of our own that the leader does not have; cut off."""
    documents: int = 0
    snapshots: int = 0


class JournalFollower:
    """Keeps one shard's journal equal to the leader's, in a thread of its own.

    Args:
        shard: its number.
        folder: of the journal; made if needed.
        options: what both ends agree on.
        replica: who uses the journal.
        sync: how the journal is forced to disk.
        epoch: the highest epoch known so far; the file's, if that is higher.

    Attributes:
        journal: None until the leader has said what journal it is.
        looked: whether it is known if there is a journal of its own.
        agreed: the epoch of the last leader whose journal ours is the beginning of; None: it is not known.
        leader_end: the leader's next sequence, as it said last.
        outputs: told to the leader with each acknowledgement (outputs made here); set by `replica`.
    """

    def __init__(
        self,
        shard: int,
        folder: str | Path,
        options: LinkOptions,
        replica: Replica | None = None,
        *,
        sync: Sync = "segment",
        epoch: int = 0,
    ) -> None:
        self.shard, self.folder, self.options = shard, Path(folder), options
        self._replica: Replica = replica or Alone()
        self._sync = sync
        self.journal: Journal | None = None
        self.looked = False
        self.counters = FollowerCounters()
        self.state: FollowerState = "idle"
        self.error = ""
        self.leader_end = self.outputs = 0
        self.leader_node = ""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.epoch, self.agreed = max(epoch, _read_epoch(self.folder)), read_agreed(self.folder)
        self._epoch_lock = threading.Lock()
        self._address: str | None = None
        self._changed = threading.Event()
        self._stopping = False
        self._link: Link | None = None
        self._heard_s = 0.0
        self._rdma_from_s = 0.0
        self._told = self._again = ""
        self._thread = threading.Thread(target=self._run, name=f"follower-{shard}", daemon=True)

    # -- from outside

    def start(self) -> JournalFollower:
        """Open the journal, if there is one, and begin to follow."""
        self._thread.start()
        return self

    def follow(self, address: str | None, epoch: int = 0) -> None:
        """Follow the leader at ``HOST:PORT`` from now on (None: nobody); `epoch` is the least that it must have.

        Raises:
            ValueError: that is no address.
        """
        if address is not None:
            parse_address(address)
        self._raise_epoch(epoch)
        self._address = address
        self._changed.set()
        link = self._link
        if link is not None:
            link.interrupt()

    def start_over(self, reason: str) -> None:
        """Open the journal anew, since what was made of it is of no use. From any thread, also from one that is ended by that."""
        self._again = reason
        self._changed.set()
        if (link := self._link) is not None:
            link.interrupt()

    def stop(self, *, close: bool = True) -> Journal | None:
        """End the thread. The journal is closed, unless `close` is false: then it is the caller's."""
        self._stopping = True
        self._changed.set()
        if (link := self._link) is not None:
            link.interrupt()
        if self._thread.ident is not None:
            self._thread.join()
        self.state = "stopped"
        journal, self.journal = self.journal, None
        if journal is not None and close:
            self._replica.closing()
            journal.close()
        return journal

    @property
    def connected(self) -> bool:
        """Whether there is a connection; after ``follow(None)`` none comes any more."""
        return self._link is not None

    @property
    def next_sequence(self) -> int:
        """Sequence of the next event that is wanted."""
        return self.journal.next_sequence if self.journal else 0

    def status(self) -> dict[str, Any]:
        """State and counters as plain data."""
        journal = self.journal
        return {
            "shard": self.shard,
            "state": self.state,
            "error": self.error,
            "leader": self.leader_node,
            "link": link.wire.name if (link := self._link) is not None else "",
            "epoch": self.epoch,
            "sequence": self.next_sequence,
            "synced": journal.synced_sequence if journal else 0,
            "lag": max(0, self.leader_end - self.next_sequence),
            "silent_ms": (time.monotonic() - self._heard_s) * 1000 if self._heard_s else None,
            **asdict(self.counters),
        }

    @property
    def follows_closely(self) -> bool:
        """Whether the leader's journal comes here, and hardly any of it is still to come."""
        journal = self.journal
        return self.state == "following" and journal is not None and self.leader_end - journal.next_sequence <= _CLOSE_EVENTS

    # -- the thread

    def _run(self) -> None:
        attempt = 0
        while not self._stopping:
            self._changed.clear()
            frames = self.counters.frames
            try:
                if self._again:
                    raise _Again
                if self.journal is None:
                    self._open(0)
                if self._address is not None and not self._stopping:
                    self.state = "connecting"
                    self._follow_once(self._address)
            except _Again:
                self.state, self.error, self._again = "failed", self._again, ""
                self._close()
                frames = self.counters.frames  # a pause, however much has come
            except JournalError as error:
                self._failed("failed", error)
            except Refused as error:
                self._failed("refused", error)
            except (LinkError, OSError, TooOld) as error:
                self._failed("connecting", error)
            except Exception as error:  # of who uses the journal: tried again, since what is wrong may be put right
                self._failed("failed", error)
                if self.journal is not None:
                    self._close()
            attempt = 0 if self.counters.frames > frames else attempt + 1
            if not self._stopping:
                pause = min(_BACKOFF_S_MAX, _BACKOFF_S_MIN * 2 ** min(attempt, 10))
                self._changed.wait(None if self._address is None and self.journal else pause * random.uniform(0.5, 1))

    def _failed(self, state: FollowerState, error: Exception) -> None:
        if isinstance(error, FrameDamaged):
            self.counters.damaged += 1
        if isinstance(error, StaleLeader):
            self.counters.stale += 1
        if not self._stopping and self._told != str(error):
            self._told = str(error)
            _log.info("not following", shard=self.shard, address=self._address, state=state, reason=str(error))
        self.state, self.error = state, str(error) or type(error).__name__

    def _follow_once(self, address: str) -> None:
        host, port = parse_address(address)
        self._link = link = connect_link(host, port, self.options)
        try:
            self.counters.connects += 1
            if self._address != address or self._stopping:
                return
            epoch = self._greet(link)
            write_agreed(self.folder, epoch)
            self.agreed = epoch
            self.state, self.error, self._told = "following", "", ""
            self._take(link)
        finally:
            self._link = None
            self._judge_rdma(link)
            link.close()

    def _judge_rdma(self, link: Link) -> None:
        """Where TCP passes and RDMA does not, which no device tells when it connects, the next links stay on TCP for a while."""
        if link.wire.name == "rdma" and not link.heard and not self._stopping and not self._changed.is_set():
            self._rdma_from_s = time.monotonic() + _WITHOUT_RDMA_S
            _log.warning("nothing comes over RDMA: links stay on TCP for a while", shard=self.shard, leader=self.leader_node)

    # -- agreeing where to go on

    def _greet(self, link: Link) -> int:
        """Agree; returns the leader's epoch."""
        challenge = self._receive(link, FrameKind.CHALLENGE)
        theirs, mine = bytes(challenge.payload), secrets.token_bytes(NONCE_BYTES)
        said = {
            "cluster": self.options.cluster,
            "node": self.options.node,
            "nonce": mine.hex(),
            "proof": proof(self.options.token, "standby", theirs, mine),
            "rdma": self.options.rdma and time.monotonic() >= self._rdma_from_s,
        }
        journal = self.journal
        tail = JournalTail(journal) if journal else None
        link.send(
            FrameKind.HELLO,
            self.shard,
            self.epoch,
            first=self.next_sequence,
            count=int(journal is not None and journal.next_sequence > journal.first_sequence),
            chain=int(journal.arrays.words[W_CHAIN]) if journal else 0,
            a=journal.header.journal_id if journal else 0,
            b=tail.oldest() if tail else 0,
            payload=json.dumps(said).encode(),
        )
        while (frame := self._receive(link)).kind in (FrameKind.PROBE, FrameKind.DOCUMENT):
            if frame.kind == FrameKind.DOCUMENT:  # the configuration that the journal begins under
                self._take_document(link, frame)
                continue
            assert tail is not None
            link.send(FrameKind.CHAIN, self.shard, self.epoch, first=frame.first, chain=tail.chain_at(frame.first))
        if frame.kind != FrameKind.WELCOME:
            raise FrameDamaged(f"frame {frame.kind} in place of a welcome")
        self._arrive(link, frame, mine)
        return frame.epoch

    def _arrive(self, link: Link, frame: Frame, nonce: bytes) -> None:
        """Bring the journal to where the leader goes on, and say so."""
        said, start, chain = frame.json(), frame.first, frame.chain
        if not proves(said.get("proof"), self.options.token, "leader", nonce):
            raise Refused(Reason.TOKEN, "the leader does not know our token: give all nodes of a cluster the same one")
        self._check_epoch(frame.epoch)
        self.leader_node, self.leader_end = str(said.get("node", "")), frame.a
        header, previous = _header_of(said)
        if frame.events:
            self._begin_from_snapshot(link, header, previous)
        elif self.journal is None or self.next_sequence == self.journal.first_sequence:  # one without an event is as good as none
            self._put_aside()
            self._begin(header, previous, None)
        elif start < self.next_sequence:
            self._cut(start)
        assert self.journal is not None
        if self.next_sequence != start or int(self.journal.arrays.words[W_CHAIN]) != chain:
            raise FrameDamaged(f"we are at sequence {self.next_sequence}, the leader goes on at {start}")
        channel = answered_channel(self.options, said.get("rdma"), STANDBY_RECORDS, self.leader_node)
        link.send(FrameKind.READY, self.shard, self.epoch, first=start, chain=chain, payload=payload_of(channel))
        if channel is not None:
            go_over(link, channel)

    def _open(self, valid: int) -> None:
        """Open the journal, if there is one."""
        try:
            journal = Journal.open(self.folder, self.shard, sync=self._sync)
        except JournalNotFound:
            self.looked = True
            return
        whole = JournalTail(journal).oldest() == journal.first_sequence
        try:
            self._replica.opened(journal, valid, None if whole else newest_snapshot(self.folder))
        except BaseException:
            journal.close()
            raise
        self.journal, self.looked = journal, True

    def _close(self) -> None:
        if self.journal is not None:
            self._replica.closing()
            self.journal.close()
            self.journal = None

    def _begin(self, header: SegmentHeader, previous: int, snapshot: Path | None) -> None:
        journal = Journal.copy_of(self.folder, header, previous, sync=self._sync)
        try:
            self._replica.opened(journal, journal.next_sequence, snapshot)
        except BaseException:
            journal.close()
            raise
        self.journal = journal

    def _cut(self, sequence: int) -> None:
        """Cut off the tail that the leader does not have."""
        cut = self.next_sequence - sequence
        _log.warning("events that the leader does not have are cut off", shard=self.shard, sequence=sequence, events=cut)
        self._close()
        truncate(self.folder, sequence)
        self.counters.cut += cut
        self._open(sequence)

    def _begin_from_snapshot(self, link: Link, header: SegmentHeader, previous: int) -> None:
        """Take a snapshot; then the journal begins anew at the segment that goes on from it, and what there was is put aside."""
        snapshot = self._take_snapshot(link)
        self._put_aside()
        self._begin(header, previous, snapshot)
        self.counters.snapshots += 1

    def _put_aside(self) -> None:
        """Close the journal, and make room for another one."""
        self._close()
        aside = self.folder.with_name(self.folder.name + ".previous")
        old = sorted(self.folder.glob("*.journal"))
        if old:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            for path in reversed(old):
                path.rename(aside / path.name)

    def _take_snapshot(self, link: Link) -> Path:
        """Receive documents and the snapshot's file, which gets its name once it is whole and on disk."""
        while (frame := self._receive(link)).kind == FrameKind.DOCUMENT:
            self._take_document(link, frame)
        if frame.kind != FrameKind.SNAPSHOT:
            raise FrameDamaged(f"frame {frame.kind} in place of a snapshot")
        name = bytes(frame.payload).decode(errors="replace")
        if not name or len(name) > _SNAPSHOT_NAME_MAX or Path(name).name != name or name.startswith("."):
            raise FrameDamaged("a snapshot has an impossible name")
        path = self.folder / SNAPSHOTS / name
        path.parent.mkdir(exist_ok=True)
        temporary, digest, size = path.with_name(path.name + ".part"), hashlib.sha256(), 0
        with temporary.open("wb") as file:
            while (frame := self._receive(link)).kind == FrameKind.PART and frame.a == size:
                digest.update(frame.payload)
                size += file.write(frame.payload)
            file.flush()
            os.fsync(file.fileno())
        if frame.kind != FrameKind.SNAPSHOT_END or frame.a != size or bytes(frame.payload) != digest.digest():
            temporary.unlink()
            raise FrameDamaged("a snapshot is not whole")
        temporary.replace(path)
        sync_folder(path.parent)
        return path

    # -- following

    def _take(self, link: Link) -> None:
        """Take events until the connection ends. Something is said at least every heartbeat."""
        options, due = self.options, 0.0
        while not self._stopping:
            now = time.monotonic()
            if now >= due:
                self._acknowledge(link)
                due = now + options.heartbeat_s
            frame = link.receive(due - now)
            if frame is None:
                self._check_silence(link)
                continue
            self._check(frame)
            if frame.kind == FrameKind.DATA:
                self._append(frame)
                self._acknowledge(link)
                due = time.monotonic() + options.heartbeat_s
            elif frame.kind == FrameKind.HEARTBEAT:
                self.leader_end = frame.first
                self._replica.stored(frame.a, frame.chain)
            elif frame.kind == FrameKind.DOCUMENT:
                self._take_document(link, frame)
            else:
                raise FrameDamaged(f"frame {frame.kind} among events")

    def _append(self, frame: Frame) -> None:
        journal = self.journal
        assert journal is not None
        events = np.frombuffer(frame.payload, EVENT)
        if frame.first != journal.next_sequence or len(events) != frame.events:
            raise FrameDamaged(f"{frame.events} events from {frame.first} on, where {journal.next_sequence} was due")
        if chain_over(events, int(journal.arrays.words[W_CHAIN])) != frame.chain:
            raise FrameDamaged(f"the events from {frame.first} on are damaged")
        if journal.append(events) < len(events):
            raise JournalStuck(f"the journal in {self.folder} cannot be written ({os.strerror(journal.state)}): free some space")
        self.leader_end = frame.b
        self.counters.frames += 1
        self.counters.events += len(events)
        self._replica.stored(frame.a)

    def _acknowledge(self, link: Link) -> None:
        journal = self.journal
        assert journal is not None
        link.send(FrameKind.ACK, self.shard, self.epoch, first=journal.next_sequence, a=journal.synced_sequence, b=self.outputs)

    def _take_document(self, link: Link, frame: Frame) -> None:
        """Store the document of a configuration before the event that names it can come."""
        version, size, content = frame.first, frame.b, bytes(frame.payload)
        while len(content) < size:
            more = self._receive(link, FrameKind.DOCUMENT)
            if more.first != version or more.a != len(content):
                raise FrameDamaged("a document is not whole")
            content += bytes(more.payload)
        folder = self.folder / DOCUMENTS
        folder.mkdir(exist_ok=True)
        write_durably(folder / f"{version}.json", content)
        self.counters.documents += 1

    # -- frames and epochs

    def _receive(self, link: Link, kind: FrameKind | None = None) -> Frame:
        """The next frame, which may take its time as long as something comes."""
        while (frame := link.receive(self.options.timeout_s)) is None:
            self._check_silence(link)
        if frame.kind != FrameKind.CHALLENGE:
            self._check(frame)
        if kind is not None and frame.kind != kind:
            raise FrameDamaged(f"frame {frame.kind} where {kind.name} was due")
        return frame

    def _check_silence(self, link: Link) -> None:
        if time.monotonic() - link.heard_s > self.options.timeout_s:
            raise LinkSilent(f"the leader is silent for {self.options.timeout_s:g} s")

    def _check(self, frame: Frame) -> None:
        self._heard_s = time.monotonic()
        if frame.kind == FrameKind.REFUSED:
            raise Refused(frame.events, bytes(frame.payload).decode(errors="replace"), frame.epoch)
        if frame.shard != self.shard:
            raise FrameDamaged(f"a frame of shard {frame.shard}")
        self._check_epoch(frame.epoch)

    def _check_epoch(self, epoch: int) -> None:
        if epoch < self.epoch:
            raise StaleLeader(f"the leader's epoch is {epoch}, {self.epoch} is known")
        self._raise_epoch(epoch)

    def _raise_epoch(self, epoch: int) -> None:
        """Remember a later epoch, over restarts too."""
        with self._epoch_lock:
            if epoch <= self.epoch:
                return
            write_durably(self.folder / _EPOCH_FILE, f"{epoch}\n".encode())
            self.epoch = epoch


def newest_snapshot(folder: Path) -> Path | None:
    """The snapshot that came last to a journal's folder."""
    found = [path for path in (folder / SNAPSHOTS).glob("*") if path.suffix != ".part"]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def _read_epoch(folder: Path) -> int:
    try:
        return int((folder / _EPOCH_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return 0


def read_agreed(folder: Path) -> int | None:
    """The last epoch in which the journal in a folder was the leader's, or the beginning of the leader's; None: that is not known."""
    try:
        return int((folder / _AGREED_FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None


def write_agreed(folder: Path, epoch: int) -> None:
    """Note that the journal in a folder is that of the leader of an epoch, or its beginning. Losing the note costs a takeover at most."""
    temporary = folder / f".{_AGREED_FILE}.part"
    temporary.write_text(f"{epoch}\n")
    temporary.replace(folder / _AGREED_FILE)


def _header_of(said: dict[str, Any]) -> tuple[SegmentHeader, int]:
    try:
        return SegmentHeader(**{name: int(value) for name, value in said["header"].items()}), int(said["previous"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FrameDamaged("the leader's journal is not described") from error
