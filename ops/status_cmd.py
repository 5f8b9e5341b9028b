"""``tickmesh status`` and ``tickmesh top``: the nodes of this host, from the counters and rings that they keep in mapped memory.

Reading registers nothing and costs a node nothing. A node that has ended without removing its file shows as dead, with its last numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tickmesh.node.telemetry import NodeName, Telemetry, configuration_path, find_nodes, read_telemetry
from tickmesh.transports.counters import CounterFile, CountersError, Values, percentile
from tickmesh.transports.receive_path import LACK_ABOUT, WAY_NAMES, Lack
from tickmesh.transports.ring import RingError, list_rings, ring_path, ring_stat

EXIT_OK, EXIT_FAILED = 0, 1
HEARTBEAT_LATE_S = 5.0
"""A living node whose main thread has been silent for longer is shown as hanging."""
NO_NODES = "no node has counters on this host: start one with `tickmesh up` or `tickmesh node run`"
_WIDTH = 160
_LATENCIES = ("p50", "p99", "p999", "max")
_TOLD_OF_WAYS = ("rx_dropped", "rx_ring_full", "truncated", "fragments", "tagged", "bad_checksum", "not_wanted", "requests", "recovered",
                 "given_up", "snapshot_turns", "snapshot_turns_broken", "snapshots", "books_recovered", "snapshots_too_old",
                 "snapshots_ahead", "snapshots_not_kept", "snapshots_too_large", "definition_turns", "definition_packets",
                 "definitions_new")  # fmt: skip


class NoSuchNode(Exception):
    """No node of these names has counters on this host."""

    def __init__(self, cluster: str | None, node: str | None, known: Sequence[NodeName]) -> None:
        wanted = ", ".join(f"{what} {name!r}" for what, name in (("cluster", cluster), ("node", node)) if name)
        there = ", ".join(f"{n.cluster}/{n.node}" for n in known) or "none"
        super().__init__(f"there is no {wanted} on this host; nodes here: {there}")
        self.cluster, self.node = cluster, node


# ---------------------------------------------------------------- reading


def choose_nodes(cluster: str | None, node: str | None) -> list[NodeName]:
    """The nodes of this host that match.

    Raises:
        NoSuchNode: names were given and none matches.
    """
    known = find_nodes()
    found = [n for n in known if cluster in (None, n.cluster) and node in (None, n.node)]
    if not found and (cluster or node):
        raise NoSuchNode(cluster, node, known)
    return found


def advice(reading: Mapping[str, Any]) -> str:
    """What to do about a node that is not well; empty if there is nothing."""
    if not reading["alive"]:
        return f"has ended; these are its last numbers. Start it again, or remove {reading['path']}"
    if reading["heartbeat_age_s"] > HEARTBEAT_LATE_S:
        return f"its main thread has been silent for {reading['heartbeat_age_s']:.0f} s: look at its log, or at pid {reading['pid']}"
    return ""


def node_statuses(cluster: str | None = None, node: str | None = None) -> list[dict[str, Any]]:
    """What :func:`tickmesh.node.telemetry.read_telemetry` gives for each node, with `advice`; a file that cannot be read gives `error`.

    Of a node that follows a store, `configuration` is what it says under ``status/<node>`` there: what it runs, and what it has refused.

    Raises:
        NoSuchNode: names were given and none matches.
    """
    found: list[dict[str, Any]] = []
    for name in choose_nodes(cluster, node):
        try:
            reading = read_telemetry(name.path)
        except (CountersError, OSError) as error:
            found.append({"cluster": name.cluster, "node": name.node, "path": str(name.path), "error": str(error)})
            continue
        found.append({**reading, "advice": advice(reading), "configuration": _configuration(name)})
    return found


def _configuration(name: NodeName) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads(configuration_path(name.cluster, name.node).read_text(encoding="utf-8"))
        return found
    return None


def ring_statuses(pids: set[int] | None = None) -> list[dict[str, Any]]:
    """The rings of this host, or those that these processes write or read."""
    found = []
    for name in list_rings():
        with contextlib.suppress(RingError, OSError):
            stat = ring_stat(name)
            if pids is None or pids & {stat.writer_pid, *(reader.pid for reader in stat.readers)}:
                found.append(asdict(stat))
    return found


def status_command(cluster: str | None = None, node: str | None = None, *, as_json: bool = False, out: TextIO | None = None) -> int:
    """Print the state of this host's nodes.

    Returns:
        Exit status: 0 if there is a living node, 1 if there is none.

    Raises:
        NoSuchNode: names were given and none matches.
    """
    nodes = node_statuses(cluster, node)
    rings = ring_statuses({n["pid"] for n in nodes if "pid" in n} if cluster or node else None)
    target = out or sys.stdout
    if as_json:
        print(json.dumps({"nodes": nodes, "rings": rings}, indent=2), file=target)
    else:
        Console(file=target, width=None if target.isatty() else _WIDTH, highlight=False).print(status_view(nodes, rings))
    return EXIT_OK if any(n.get("alive") for n in nodes) else EXIT_FAILED


# ---------------------------------------------------------------- showing


def duration_text(ns: float | None) -> str:
    """A duration with three digits and its unit: ``duration_text(1234) == "1.23 µs"``."""
    if ns is None:
        return "–"
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= size:
            return f"{ns / size:.3g} {unit}" if ns < 1000 * size else f"{ns / size:,.0f} {unit}"
    return f"{ns:.0f} ns"


def uptime_text(seconds: float) -> str:
    """``uptime_text(93784) == "1d 2h 3m"``; seconds while there are no hours."""
    left = int(seconds)
    days, hours, minutes = left // 86400, left // 3600 % 24, left // 60 % 60
    if days:
        return f"{days}d {hours}h {minutes}m"
    return f"{hours}h {minutes}m" if hours else f"{minutes}m {left % 60}s" if minutes else f"{left}s"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", style="" if i else "bold", no_wrap=True)
    return table


def _latency(summary: Mapping[str, Any]) -> list[str]:
    return [duration_text(summary[name]) for name in _LATENCIES]


def status_view(nodes: Sequence[Mapping[str, Any]], rings: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The whole answer of `status` for people."""
    if not nodes and not rings:
        return Text(NO_NODES)
    parts: list[RenderableType] = []
    for reading in nodes:
        parts += [*_node_view(reading), Text("")]
    if rings:
        parts.append(_ring_table(rings))
    left = [ring["name"] for ring in rings if not ring["writer_alive"] and not any(reader["alive"] for reader in ring["readers"])]
    if left:
        paths = " ".join(str(ring_path(name)) for name in left)
        parts.append(Text(f"nobody writes or reads {', '.join(left)}: if that node has ended for good, remove {paths}", style="yellow"))
    return Group(*parts)


def _head(reading: Mapping[str, Any]) -> Text:
    name = f"{reading['cluster']}/{reading['node']}"
    if "error" in reading:
        return Text(f"{name}  unreadable: {reading['error']}", style="red")
    life = reading["state"] if reading["alive"] else f"DEAD (was {reading['state']})"
    style = "red" if not reading["alive"] else "yellow" if reading["advice"] else "green"
    head = Text(f"{name}  ", style="bold").append(life, style=style)
    head.append(f"  pid {reading['pid']}  up {uptime_text(reading['uptime_s'])}", style="not bold")
    return head.append(f"\n  {reading['advice']}", style="yellow") if reading["advice"] else head


def _configuration_text(status: Mapping[str, Any]) -> Text:
    """What a node runs of its cluster's store, and what it has refused and why."""
    text = Text(f"  configuration {status['version']} of the store ({status['source'] or 'none yet'}), {status['state']}")
    if status["store"]["stale"]:
        text.append(f"\n  the store cannot be read: {status['store']['reason']}; the last good configuration holds", style="yellow")
    if status["refused"]:
        text.append(f"\n  configuration {status['refused']['version']} is REFUSED, the one before runs on:", style="red")
        for reason in status["refused"]["reasons"]:
            text.append(f"\n    {reason}", style="red")
    return text


def _node_view(reading: Mapping[str, Any]) -> Iterator[RenderableType]:
    yield _head(reading)
    if "error" in reading:
        return
    if reading["configuration"]:
        yield _configuration_text(reading["configuration"])
    if ways := _ways_text(reading):
        yield ways
    yield from (table for table in (_source_table(reading), _shard_table(reading), _delivery_table(reading)) if table.row_count)


def _source_table(reading: Mapping[str, Any]) -> Table:
    names: tuple[str, ...] = ("messages", "events", "bytes", "malformed", "gaps", "missing", "duplicates", "filtered", "ring_full")
    names = (*names, "dropped_by_kernel")
    connected = ("connected", "reconnects", "connect_failures", "overflowed")  # of sources that connect
    if any(numbers[name] for numbers in reading["sources"].values() for name in connected):
        names = (*names, *connected)
    of_books = ("books_waiting", "snapshots_asked", "checksums_failed", "restarts")
    names += tuple(name for name in of_books if any(numbers.get(name) for numbers in reading["sources"].values()))
    table = _table("", "source", *(n.replace("_", " ") for n in names))
    for source, numbers in reading["sources"].items():
        table.add_row(source, *(f"{numbers[n]:,}" for n in names))
    return table


def _ways_text(reading: Mapping[str, Any]) -> Text:
    """By which way each line of datagrams comes in and why, what that way refused, and what was asked for again."""
    text = Text()
    for source, numbers in reading["sources"].items():
        why = Lack(numbers["way_because"])
        if numbers["way"] == 0 and why == Lack.NOTHING:
            continue  # a recording
        text.append(f"  {source} comes by {WAY_NAMES[numbers['way']]}: {LACK_ABOUT[why]}")
        told = [f"{name.replace('_', ' ')} {numbers[name]:,}" for name in _TOLD_OF_WAYS if numbers.get(name)]
        text.append(f"; {', '.join(told)}\n" if told else "\n")
    return text


def _shard_table(reading: Mapping[str, Any]) -> Table:
    same = ("refused", "outputs", "blocked", "trades", "instruments", "orders")
    table = _table("", "shard", "in", *same, "journalled", "lag", "config", "recv→output p50", "p99", "p99.9", "max")
    for shard in reading["shards"]:
        numbers = [f"{shard[n]:,}" for n in ("events_in", *same, "journal_records", "output_lag", "config_version")]
        table.add_row(str(shard["shard"]), *numbers, *_latency(shard["receive_to_output"]))
    return table


def _delivery_table(reading: Mapping[str, Any]) -> Table:
    names = ("frames", "events", "acks", "retries", "reconnects", "skipped", "lag")
    table = _table("", "delivery", "shard", *names, "recv→stored p50", "p99", "p99.9", "max")
    for delivery, shards in reading["deliveries"].items():
        for one in shards:
            table.add_row(delivery, str(one["shard"]), *(f"{one[n]:,}" for n in names), *_latency(one["receive_to_stored"]))
    return table


def _ring_table(rings: Sequence[Mapping[str, Any]]) -> Table:
    table = _table("rings", "name", "capacity", "mode", "published", "writer", "blocked", "released", "reader", "lag", "missed")
    for ring in rings:
        writer = f"pid {ring['writer_pid']}" if ring["writer_alive"] else "none"
        head = [ring["name"], f"{ring['capacity']:,}", ring["mode"], f"{ring['published']:,}", writer]
        head += [f"{ring['blocked']:,}", f"{ring['released']:,}"]
        for k, reader in enumerate(ring["readers"] or [None]):
            tail = ["–", "", ""] if reader is None else [_reader_name(reader), f"{reader['lag']:,}", f"{reader['missed']:,}"]
            table.add_row(*(head if k == 0 else [""] * len(head)), *tail)
    return table


def _reader_name(reader: Mapping[str, Any]) -> str:
    name = reader["name"] or f"slot {reader['slot']}"
    return name if reader["alive"] else f"{name} (dead)"


# ---------------------------------------------------------------- rates


class Rates:
    """Differences between two looks at the nodes: rates per second, and the latencies of that interval alone."""

    def __init__(self, cluster: str | None = None, node: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._wanted = (cluster, node)
        self._clock = clock
        self._before: dict[tuple[str, int], tuple[float, dict[str, Any], dict[str, Values]]] = {}

    def look(self) -> list[dict[str, Any]]:
        """One map per readable node.

        Each has `cluster`, `node`, `pid`, `alive`, `state`, `uptime_s`, `advice`, `interval_s` (None at the first look), and the lists
        `sources`, `shards` and `deliveries`: counters, their rates as ``NAME_per_s``, and `latency_ns` (p50, p99, p999 of the interval).

        Raises:
            NoSuchNode: names were given and none matches.
        """
        looks = []
        for name in choose_nodes(*self._wanted):
            with contextlib.suppress(CountersError, OSError), CounterFile.attach(name.path) as file:
                telemetry = Telemetry(file)
                looks.append(self._difference(telemetry.reading(), {label: file.counts(label) for label in file.about.histograms}))
        return looks

    def _difference(self, now: dict[str, Any], counts: dict[str, Values]) -> dict[str, Any]:
        key, at = (now["path"], now["started_ns"]), self._clock()
        earlier = self._before.get(key)
        self._before[key] = (at, now, counts)
        seconds, before, counts_before = (at - earlier[0], earlier[1], earlier[2]) if earlier else (None, now, counts)
        head = {k: now[k] for k in ("cluster", "node", "pid", "alive", "state", "uptime_s")}

        def latency(label: str) -> dict[str, float | None]:
            return interval_latency(counts[label], counts_before[label] if earlier else None)

        sources = [{"source": n, **rates(one, before["sources"][n], seconds)} for n, one in now["sources"].items()]
        shards = [
            {"shard": s["shard"], **rates(s, old, seconds), "latency_ns": latency(f"shard.{s['shard']}.receive_to_output")}
            for s, old in zip(now["shards"], before["shards"])
        ]
        deliveries = [
            {"delivery": n, "shard": d["shard"], **rates(d, old, seconds),
             "latency_ns": latency(f"delivery.{n}.{d['shard']}.receive_to_stored")}
            for n, each in now["deliveries"].items()
            for d, old in zip(each, before["deliveries"][n])
        ]  # fmt: skip
        return {**head, "advice": advice(now), "interval_s": seconds, "sources": sources, "shards": shards, "deliveries": deliveries}


def rates(now: Mapping[str, Any], before: Mapping[str, Any], seconds: float | None) -> dict[str, Any]:
    """A set's counters, and how fast each changes: ``{"events": 10, "events_per_s": 5.0}``; rates are None without an interval."""
    numbers = {name: value for name, value in now.items() if isinstance(value, int) and name != "shard"}
    return numbers | {f"{name}_per_s": (value - before[name]) / seconds if seconds else None for name, value in numbers.items()}


def interval_latency(now: Values, before: Values | None) -> dict[str, float | None]:
    """Percentiles of what was recorded since `before`; all of it if None."""
    counts = now if before is None else now - before
    total = int(counts.sum())
    return {label: percentile(counts, p) if total > 0 else None for label, p in (("p50", 50), ("p99", 99), ("p999", 99.9))}


# ---------------------------------------------------------------- top


def _rates_of(one: Mapping[str, Any], *names: str) -> list[str]:
    values = (one[f"{name}_per_s"] for name in names)
    return ["–" if value is None else f"{value:,.0f}" for value in values]


def top_view(looks: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What `top` shows."""
    if not looks:
        return Text(NO_NODES)
    parts: list[RenderableType] = []
    for look in looks:
        tables = (_source_rates(look), _shard_rates(look), _delivery_rates(look))
        parts += [_head(look), *(table for table in tables if table.row_count), Text("")]
    return Group(*parts)


def _source_rates(look: Mapping[str, Any]) -> Table:
    table = _table("", "source", "messages/s", "events/s", "bytes/s", "gaps", "missing", "malformed", "duplicates/s", "ring full/s")
    for one in look["sources"]:
        flow = _rates_of(one, "messages", "events", "bytes")
        faults = [f"{one[name]:,}" for name in ("gaps", "missing", "malformed")]
        table.add_row(one["source"], *flow, *faults, *_rates_of(one, "duplicates", "ring_full"))
    return table


def _shard_rates(look: Mapping[str, Any]) -> Table:
    flow = ("in/s", "outputs/s", "trades/s", "BBO/s", "signals/s", "blocked/s")
    table = _table("", "shard", *flow, "lag", "recv→output p50", "p99", "p99.9")
    for one in look["shards"]:
        rates_text = _rates_of(one, "events_in", "outputs", "trades", "bbo", "signals", "blocked")
        table.add_row(str(one["shard"]), *rates_text, f"{one['output_lag']:,}", *map(duration_text, one["latency_ns"].values()))
    return table


def _delivery_rates(look: Mapping[str, Any]) -> Table:
    table = _table("", "delivery", "shard", "frames/s", "events/s", "acks/s", "retries", "lag", "recv→stored p50", "p99", "p99.9")
    for one in look["deliveries"]:
        counts = [f"{one[name]:,}" for name in ("retries", "lag")]
        latency = map(duration_text, one["latency_ns"].values())
        table.add_row(one["delivery"], str(one["shard"]), *_rates_of(one, "frames", "events", "acks"), *counts, *latency)
    return table


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Gives a wait of so many seconds that says whether q was pressed; a plain wait where no keyboard is."""
    if not sys.stdin.isatty():
        yield _wait_without_keys
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    saved = termios.tcgetattr(fd)
    tty.setcbreak(fd)
    try:
        yield lambda seconds: _pressed(fd, seconds)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, saved)


def _wait_without_keys(seconds: float) -> bool:
    time.sleep(seconds)
    return False


def _pressed(fd: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if select.select([fd], [], [], left)[0] and os.read(fd, 1) in (b"q", b"Q"):
            return True
    return False


def top_command(
    cluster: str | None = None, node: str | None = None, *, interval_s: float = 1.0, once: bool = False, as_json: bool = False,
    out: TextIO | None = None,
) -> int:  # fmt: skip
    """Show rates until q or Ctrl-C; with `once` after one interval. Where nobody watches (a pipe), each look is printed below the last.

    Returns:
        Exit status: 0; 1 with `once` if no node lives.

    Raises:
        NoSuchNode: names were given and none matches.
    """
    target = out or sys.stdout
    source = Rates(cluster, node)
    looks = source.look()
    console = Console(file=target, width=None if target.isatty() else _WIDTH, highlight=False)
    live = Live(top_view(looks), console=console, screen=True, auto_refresh=False) if target.isatty() and not (once or as_json) else None
    with live or contextlib.nullcontext(), _keys() as wait:
        while not wait(interval_s):
            looks = source.look()
            if as_json:
                print(json.dumps({"nodes": looks}), file=target, flush=True)
            elif live:
                live.update(top_view(looks), refresh=True)
            else:
                console.print(top_view(looks))
            if once:
                break
    return EXIT_FAILED if once and not any(look["alive"] for look in looks) else EXIT_OK
