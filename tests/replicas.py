"""Leaders and standbys under test: journals, servers and followers that are closed whatever happens, and a relay that does harm."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from test_journal import SEGMENT
from test_journal import events as any_events

from tickmesh.node.event import EventArray, Kind
from tickmesh.node.follower import JournalFollower
from tickmesh.node.journal import Journal, JournalReader, verify
from tickmesh.node.replication import Leading, ReplicationServer
from tickmesh.node.replication_link import LinkOptions
from tickmesh.node.shard import Shard

SHARD = 3
FAST = {"heartbeat_s": 0.02, "timeout_s": 1.0}


def events(first: int, count: int) -> EventArray:
    """Events without a zero byte, of no kind that names a document."""
    made = any_events(first, count)
    made["kind"] = Kind.ADD
    return made


def until(condition: Callable[[], object], what: str, limit_s: float = 20.0) -> None:
    """Wait for a condition."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s:.0f} s: {what}"
        time.sleep(0.002)


def options(node: str = "n1", **more: Any) -> LinkOptions:
    return LinkOptions("test", node, **{**FAST, **more})


def new_journal(folder: Path, count: int = 0, **more: Any) -> Journal:
    journal = Journal.create(folder, SHARD, segment_records=SEGMENT, sync="none", **more)
    if count:
        assert journal.append(events(0, count)) == count
    return journal


def content(folder: Path) -> bytes:
    """Every record of a journal, events and checksums checked."""
    return b"".join(batch.tobytes() for batch in JournalReader(folder).batches())


def same_journals(one: Path, other: Path) -> None:
    """Both hold, and every record and checksum of the one is that of the other."""
    reports = [verify(folder) for folder in (one, other)]
    assert all(report.ok for report in reports), reports
    assert reports[0].next_sequence == reports[1].next_sequence
    assert reports[0].first_sequence == reports[1].first_sequence
    assert content(one) == content(other)
    assert chains(one) == chains(other)


def chains(folder: Path) -> list[bytes]:
    """The checksums of each segment."""
    return [file.read_bytes()[4096 : 4096 + 8 * SEGMENT] for file in sorted(folder.glob("*.journal")) if any_event(file)]


def any_event(file: Path) -> bool:
    return any(file.read_bytes()[4096 + 8 * SEGMENT :])


class Pair:
    """A leader's journal and server, and one follower of it."""

    def __init__(self, folder: Path, stack: ExitStack, count: int, epoch: int, more: dict[str, Any]) -> None:
        self.leader, self.standby = folder / "leader", folder / "standby"
        self.more, self._stack = more, stack
        self.journal = new_journal(self.leader, count)
        stack.callback(lambda: self.journal.close())
        self.server = ReplicationServer(options("n1", **more), idle=2).start()
        stack.callback(self.server.stop)
        self.server.lead(SHARD, Leading(self.journal, epoch))
        self.follower = self.new_follower()

    def new_follower(self, replica: Any = None, **more: Any) -> JournalFollower:
        self.follower = JournalFollower(SHARD, self.standby, options("n2", **self.more), replica, sync="none", **more)
        self._stack.callback(self.follower.stop)
        return self.follower

    def follow(self, address: str | None = None) -> JournalFollower:
        if not self.follower._thread.is_alive():
            self.follower.start()
        self.follower.follow(address or self.server.address)
        return self.follower

    def append(self, count: int) -> None:
        assert self.journal.append(events(self.journal.next_sequence, count)) == count

    def caught_up(self, limit_s: float = 20.0) -> None:
        until(lambda: self.follower.next_sequence == self.journal.next_sequence, f"the standby: {self.follower.status()}", limit_s)

    def finish(self) -> None:
        """Catch up, close both, and compare."""
        self.caught_up()
        self.follower.stop()
        self.server.stop()
        self.journal.close()
        same_journals(self.leader, self.standby)


@contextmanager
def pair(folder: Path, count: int = 0, epoch: int = 1, **more: Any) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(folder, stack, count, epoch, more)


class Relay:
    """A TCP relay in this process; `harm` sees each connection's number and what goes to the follower, and gives back what to send.

    What it gives back is shorter to cut the connection there. What it is given is each byte once, in pieces as they come.
    """

    def __init__(self, port: int, harm: Callable[[int, int, bytes], bytes]) -> None:
        self._port, self._harm = port, harm
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._stopping = False
        self._run(self._accept)

    def _run(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stopping:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._port), timeout=5)
            except OSError:
                near.close()
                continue
            for one in (near, far):
                one.settimeout(None)
            self._open += [near, far]
            number = self.connections
            self.connections += 1
            self._run(self._pump, far, near, number)
            self._run(self._pump, near, far, None)

    def _pump(self, source: socket.socket, target: socket.socket, number: int | None) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                given = data if number is None else self._harm(number, passed, data)
                passed += len(data)
                target.sendall(given)
                if len(given) < len(data):
                    break
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._stopping = True
        for one in [self._listener, *self._open]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
        for one in [self._listener, *self._open]:
            one.close()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def threads_of_replication() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("replication", "follower", "feeder"))]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def shard_digest(shard: Shard) -> str:
    """One hash of all that a shard knows; not of what says how its events fell into batches (plans, times it was held up, scratch)."""
    digest = hashlib.sha256()
    core = shard.arrays.core.copy()
    core["blocked"] = 0
    digest.update(core.tobytes())
    for name, value in shard.arrays._asdict().items():
        if name == "books":
            for inner, array in value._asdict().items():
                if isinstance(array, np.ndarray) and inner != "plans":
                    digest.update(np.ascontiguousarray(array))
        elif name not in ("core", "scratch", "out"):
            digest.update(np.ascontiguousarray(value))
    return digest.hexdigest()
