"""Replication between two processes over loopback: a whole journal to a late standby, and the delay of single batches.

The peer is what one would write first: Python sockets that send the same bytes out of the same memory in pieces of 256 KiB, and receive
them into one buffer; and for the delay, a batch and an answer of one frame's size. The peer keeps no journal, checks nothing, and cannot
go on after a cut, so a ratio below 1 is the price of that. CPU time is that of both processes together.

Run it: ``python -m tickmesh.ops.bench_replication``.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tickmesh.node.event import EVENT, EventArray, Kind
from tickmesh.node.follower import JournalFollower
from tickmesh.node.journal import Journal
from tickmesh.node.journal_tail import JournalTail
from tickmesh.node.replication import Leading, ReplicationServer
from tickmesh.node.replication_link import LinkOptions
from tickmesh.transports.toolbox import IDLE_MODES

_PIECE_BYTES = 1 << 18
_BATCH, _FRAME_BYTES = 8, 64
_WARM_EVENTS = 1000
_PAUSE_S = 0.001
_LIMIT_S = 120.0
_WHOLE, _WARM, _TRIPS = 0, 1, 2
"""Shards of the benchmark: the journal to send as a whole, a short one that loads everything, the one of the delays."""
Result = dict[str, Any]


def _events(count: int) -> EventArray:
    made = np.random.default_rng(1).integers(1, 256, count * 64, dtype=np.uint8).view(EVENT)
    made["kind"] = Kind.ADD
    return made


def _until(condition: Any, what: str) -> None:
    end = time.monotonic() + _LIMIT_S
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"{what}: not within {_LIMIT_S:g} s")
        time.sleep(0.0005)


# ---------------------------------------------------------------- the other process


def _follow(address: str, shard: int, folder: str, count: int) -> Result:
    """Follow a shard until it has `count` events; CPU and wall seconds from its first connection on."""
    follower = JournalFollower(shard, folder, LinkOptions("bench", "standby"), sync="none")
    begun, cpu = time.perf_counter(), time.process_time()
    follower.start().follow(address)
    _until(lambda: follower.next_sequence >= count, "events")
    result = {"wall_s": time.perf_counter() - begun, "cpu_s": time.process_time() - cpu}
    if shard != _WARM:
        sys.stdin.read()  # until the leader has the last acknowledgement
    follower.stop()
    return result


def _receive(address: str, size: int) -> Result:
    """The peer's receiver."""
    host, _, port = address.rpartition(":")
    buffer = memoryview(bytearray(_PIECE_BYTES))
    with socket.create_connection((host, int(port))) as link:
        begun, cpu, got = time.perf_counter(), time.process_time(), 0
        while got < size:
            count = link.recv_into(buffer)
            if count == 0:
                raise RuntimeError("the connection has ended")
            got += count
        link.sendall(b"!")
        return {"wall_s": time.perf_counter() - begun, "cpu_s": time.process_time() - cpu}


def _answer(address: str, size: int) -> Result:
    """The peer's echo: a frame for each batch."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer, frame = memoryview(bytearray(size)), bytes(_FRAME_BYTES)
        while True:
            got = 0
            while got < size:
                count = link.recv_into(buffer[got:])
                if count == 0:
                    return {}
                got += count
            link.sendall(frame)


def _child(role: str, *arguments: str) -> Result:
    if role == "receive":
        return _receive(arguments[0], int(arguments[1]))
    if role == "answer":
        return _answer(arguments[0], int(arguments[1]))
    address, folder, shard, count = arguments[0], arguments[1], int(arguments[2]), int(arguments[3])
    _follow(address, _WARM, f"{folder}/warm", _WARM_EVENTS)
    return _follow(address, shard, f"{folder}/shard", count)


@contextlib.contextmanager
def _process(role: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tickmesh.ops.bench_replication", role, *(str(argument) for argument in arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _said(process: subprocess.Popen[str]) -> Result:
    text = process.communicate(timeout=_LIMIT_S)[0]
    if process.returncode != 0:
        raise RuntimeError("the other process has failed")
    return dict(json.loads(text))


# ---------------------------------------------------------------- ours


class _Acks:
    """Remembers when each sequence was acknowledged."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.last = 0
        self.first_cpu_s = 0.0
        self.changed = threading.Event()

    def update(self, node: str, sequence: int, synced: int) -> None:
        """See :class:`tickmesh.node.replication.Acknowledged`."""
        if sequence > self.last:
            self.last = sequence
            self.seen.append((sequence, time.perf_counter_ns()))
        self.changed.set()

    def leave(self, node: str) -> None:
        """See :class:`tickmesh.node.replication.Acknowledged`."""


@contextlib.contextmanager
def _server(folder: Path, shard: int, events: EventArray, acks: _Acks) -> Iterator[tuple[Journal, ReplicationServer]]:
    with contextlib.ExitStack() as stack:
        server = ReplicationServer(LinkOptions("bench", "leader"), idle=IDLE_MODES["yield"])
        stack.callback(server.stop)
        for number, made in ((_WARM, _events(_WARM_EVENTS)), (shard, events)):
            journal = stack.enter_context(Journal.create(folder / f"shard-{number}", number, sync="none"))
            journal.append(made)
            server.lead(number, Leading(journal, 1, acks if number == shard else None))
        yield journal, server.start()


def _send_whole(events: EventArray) -> Result:
    """Wall and CPU seconds of a journal to a standby that starts late."""
    acks = _Acks()
    with (
        tempfile.TemporaryDirectory() as base,
        _server(Path(base), _WHOLE, events, acks) as (_, server),
        _process("follow", server.address, base, _WHOLE, len(events)) as other,
    ):
        _until(lambda: acks.changed.is_set(), "the standby")
        cpu = time.process_time()
        _until(lambda: acks.last >= len(events), "acknowledgements")
        cpu = time.process_time() - cpu
        said = _said(other)
    return {"wall_s": said["wall_s"], "cpu_s": said["cpu_s"] + cpu}


def _delays(trips: int) -> list[float]:
    """Microseconds from a batch's append to its acknowledgement, one batch a millisecond."""
    acks, batch = _Acks(), _events(_BATCH)
    begun: dict[int, int] = {}
    with (
        tempfile.TemporaryDirectory() as base,
        _server(Path(base), _TRIPS, _events(1), acks) as (journal, server),
        _process("follow", server.address, base, _TRIPS, 1 + trips * _BATCH) as other,
    ):
        _until(lambda: acks.last == 1, "the standby")
        for _ in range(trips):
            begun[journal.next_sequence + _BATCH] = time.perf_counter_ns()
            journal.append(batch)
            time.sleep(_PAUSE_S)
        _until(lambda: acks.last == journal.next_sequence, "acknowledgements")
        _said(other)
    return [(at - begun[sequence]) / 1000 for sequence, at in acks.seen if sequence in begun]


def _append_alone(events: EventArray) -> Result:
    """The same events into a journal, without a line: the part of a standby's work that is not replication's."""
    with tempfile.TemporaryDirectory() as base, Journal.create(Path(base) / "journal", 0, sync="none") as journal:
        begun, cpu = time.perf_counter(), time.process_time()
        journal.append(events)
        return {"wall_s": time.perf_counter() - begun, "cpu_s": time.process_time() - cpu}


# ---------------------------------------------------------------- the peer


@contextlib.contextmanager
def _served(role: str, *arguments: object) -> Iterator[tuple[socket.socket, subprocess.Popen[str]]]:
    """The other process in a role, and the connection that it has made."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(_LIMIT_S)
        with _process(role, f"127.0.0.1:{listener.getsockname()[1]}", *arguments) as other:
            link, _ = listener.accept()
            link.settimeout(_LIMIT_S)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with link:
                yield link, other


def _copy_whole(events: EventArray) -> Result:
    """The same bytes, out of a journal's files, by plain sockets."""
    with tempfile.TemporaryDirectory() as base, Journal.create(Path(base) / "journal", 0, sync="none") as journal:
        journal.append(events)
        tail = JournalTail(journal)
        tail.position = 0
        with _served("receive", events.nbytes) as (link, other):
            cpu = time.process_time()
            while len(piece := tail.read(_PIECE_BYTES // 64)[0]):
                link.sendall(piece.view(np.uint8).data)
            link.recv(1)
            cpu = time.process_time() - cpu
            said = _said(other)
    return {"wall_s": said["wall_s"], "cpu_s": said["cpu_s"] + cpu}


def _round_trips(trips: int) -> list[float]:
    """Microseconds from sending a batch to its answer, one batch a millisecond."""
    batch, found = bytes(_BATCH * 64), []
    with _served("answer", len(batch)) as (link, _):
        for _ in range(trips):
            begun = time.perf_counter_ns()
            link.sendall(batch)
            got = 0
            while got < _FRAME_BYTES:
                got += len(link.recv(_FRAME_BYTES - got))
            found.append((time.perf_counter_ns() - begun) / 1000)
            time.sleep(_PAUSE_S)
    return found


# ---------------------------------------------------------------- together


def bench_replication(events: int = 4_000_000, trips: int = 3_000, repeats: int = 5) -> Result:
    """Measure and compare; medians over `repeats`, ours and the peer alternating.

    Args:
        events: in the journal that a late standby gets.
        trips: batches of 8 events whose delay is measured.

    Returns:
        ``{"machine", "cores", "events", "events_per_s": {ours, peer, journal_alone}, "events_per_core_s": {…}, "delay_us": {ours: {p50,
        p99}, peer: {…}}, "rows": […]}``. A core second is one of either process; `journal_alone` is appending without a line.
    """
    made = _events(events)
    runs: dict[str, list[Result]] = {"ours": [], "peer": [], "journal_alone": []}
    delays: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(repeats):
        runs["ours"].append(_send_whole(made))
        runs["peer"].append(_copy_whole(made))
        runs["journal_alone"].append(_append_alone(made))
        delays["ours"] += _delays(trips)
        delays["peer"] += _round_trips(trips)
    per_s, per_core = (
        {who: events / statistics.median(run[key] for run in found) for who, found in runs.items()} for key in ("wall_s", "cpu_s")
    )
    delay = {who: {f"p{p}": float(np.percentile(found, p)) for p in (50, 99)} for who, found in delays.items()}
    return {
        "machine": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "events": events,
        "events_per_s": per_s,
        "events_per_core_s": per_core,
        "delay_us": delay,
        "rows": [
            _row("replication, a whole journal", "events per second", per_s),
            _row("replication, a whole journal", "events per CPU second", per_core),
            *(_delay_row(p, {who: of[p] for who, of in delay.items()}) for p in ("p50", "p99")),
        ],
    }


def _row(name: str, unit: str, values: dict[str, float]) -> Result:
    ours, theirs = values["ours"], values["peer"]
    return {"name": name, "unit": unit, "ours": ours, "theirs": theirs, "peer": "plain TCP copy by Python sockets", "ratio": ours / theirs}


def _delay_row(which: str, values: dict[str, float]) -> Result:
    ours, theirs = values["ours"], values["peer"]
    name = f"replication, 8 events from append to acknowledgement, {which}"
    return {"name": name, "unit": "µs", "ours": ours, "theirs": theirs, "peer": "plain TCP echo by Python sockets", "ratio": theirs / ours}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(_child(*sys.argv[1:])))
    else:
        print(json.dumps(bench_replication(), indent=2))
