"""``tickmesh bench``: every benchmark against its peer, in one run on one machine, with that machine named above the numbers.

A benchmark alternates between us and the peer and reports medians; here they become one table. What cannot run here (no compiler, a
package that is missing) is left out, with the reason. A ratio says how many times faster we are.
"""

from __future__ import annotations

import importlib
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

Result = dict[str, Any]
_EQUAL = 0.95
"""A target of equality is met within this: what is left is the noise of a run."""


class UnknownBench(Exception):
    """There is no benchmark of this name; `name`."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no benchmark {name!r}; there are: {', '.join(b.name for b in BENCHES)}")
        self.name = name


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: what was measured.
        unit: of `ours` and `theirs`.
        ours, theirs: medians.
        peer: what we are compared with.
        ratio: how many times faster we are.
        target: the least ratio we want; None: no target.
    """

    name: str
    unit: str
    ours: float
    theirs: float
    peer: str
    ratio: float
    target: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached."""
        return None if self.target is None else self.ratio >= self.target


@dataclass(frozen=True)
class Bench:
    """A benchmark: which function to call, and how to read its answer.

    Attributes:
        name: what a person calls it.
        about: one line.
        module, function: where it is; imported only when it runs.
        rows: from the function's answer to rows.
        quick: arguments for a short look.
    """

    name: str
    about: str
    module: str
    function: str
    rows: Callable[[Result], Iterable[Row]]
    quick: dict[str, Any]


def _ring_rows(result: Result) -> Iterator[Row]:
    titles = {
        "throughput_ns": ("ring, batches of 64, one process to another", "ns per record", _EQUAL),
        "round_trip_p50_ns": ("ring, one record there and back, p50", "ns", _EQUAL),
        "round_trip_p99_ns": ("ring, one record there and back, p99", "ns", None),
    }
    for metric, (title, unit, target) in titles.items():
        for peer, ratio in result[metric]["ratio"].items():
            yield Row(title, unit, result[metric]["tickmesh"], result[metric][peer], f"the same ring in C++ ({peer})", 1 / ratio, target)


def _delivery_rows(result: Result) -> Iterator[Row]:
    speeds = result["events_per_core_s"]
    title, unit = "delivery over NATS, frames", "events per CPU second"
    for way, peer in (("jetstream", "nats-py, JetStream per event"), ("core", "nats-py, core NATS per event, no acknowledgement")):
        yield Row(title, unit, speeds["frames"], speeds[f"{way}_per_event"], peer, result[f"ratio_to_{way}"], 20)


def _config_rows(result: Result) -> Iterator[Row]:
    wanted = "what we want of it (no rival does it)"
    for title, unit, ours, bar in (
        ("new parameters, applied on a node, p99", "ms", result["parameters_ms"]["p99"], 50.0),
        ("new code, compile included", "s", result["new_code_s"], 10.0),
    ):
        yield Row(title, unit, ours, bar, wanted, bar / ours, 1.0)


def _given_rows(result: Result) -> Iterator[Row]:
    """A benchmark that says itself what its rows are: ``{"rows": [{name, unit, ours, theirs, peer, ratio, target}, …]}``."""
    for row in result["rows"]:
        yield Row(**row)


BENCHES = (
    Bench(
        "decode", "ITCH to 64-byte events, against C++", "tickmesh.ops.bench_decode", "bench_decode", _given_rows,
        {"messages": 300_000, "repeats": 3},
    ),
    Bench(
        "book", "ITCH decode and full-depth book, against C++ and Python packages", "tickmesh.ops.bench_book", "bench_book", _given_rows,
        {"messages": 1_000_000, "symbols": (400,), "repeats": 3},
    ),
    Bench(
        "loop", "feed to books, calculations, risk and the output ring, against a C++ book alone", "tickmesh.ops.bench_loop", "bench_loop",
        _given_rows, {"messages": 1_000_000, "repeats": 3},
    ),
    Bench(
        "fix", "FIX to 64-byte events, checksum verified, against C++ and Python packages", "tickmesh.ops.bench_fix", "bench_fix",
        _given_rows, {"messages": 30_000, "repeats": 3},
    ),
    Bench(
        "ring", "one process to another through shared memory, against C++", "tickmesh.ops.bench_ring", "bench_ring", _ring_rows,
        {"repeats": 3, "records": 400_000, "trips": 5_000},
    ),
    Bench(
        "delivery", "events over NATS JetStream, against nats-py", "tickmesh.ops.bench_delivery", "bench_delivery", _delivery_rows,
        {"events": 100_000, "per_event_events": 8_192, "rounds": 1},
    ),
    Bench(
        "config", "changes of a running node's configuration: parameters, new code, the hand-over", "tickmesh.ops.bench_config",
        "bench_config", _config_rows, {"parameters": 30, "filters": 10},
    ),
    Bench(
        "replication", "a journal to a standby over TCP, against a plain copy of the same bytes", "tickmesh.ops.bench_replication",
        "bench_replication", _given_rows, {"events": 300_000, "trips": 300, "repeats": 1},
    ),
    Bench(
        "sources", "SoupBinTCP and websockets to events, against asyncio by hand", "tickmesh.ops.bench_sources",
        "bench_sources", _given_rows,
        {"messages": 200_000, "json_messages": 10_000, "repeats": 1},
    ),
    Bench(
        "receive", "AF_XDP and packet rings on a virtual link, against recvmmsg in the same loop", "tickmesh.ops.bench_receive",
        "bench_receive", _given_rows, {"datagrams": 5_000, "repeats": 2},
    ),
    Bench(
        "sbe", "messages of an SBE schema to 64-byte events, against C++ by hand", "tickmesh.ops.bench_sbe", "bench_sbe", _given_rows,
        {"messages": 50_000, "repeats": 3},
    ),
    Bench(
        "rdma", "posting writes from compiled code, against bindings for Python", "tickmesh.ops.bench_rdma", "bench_rdma", _given_rows,
        {"rounds": 5, "records": 20_000},
    ),
)  # fmt: skip


# ---------------------------------------------------------------- running


def machine() -> dict[str, str]:
    """What the numbers were made on."""
    usable = len(os.sched_getaffinity(0))
    return {
        "processor": _processor(),
        "cores": f"{usable} usable of {os.cpu_count()}",
        "load": " ".join(f"{value:.2f}" for value in os.getloadavg()) + " (1, 5, 15 min, at the start)",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "numba": _version("numba"),
        "numpy": _version("numpy"),
        "tickmesh": _version("tickmesh"),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def choose(names: Sequence[str]) -> list[Bench]:
    """The benchmarks of these names; all if there are none.

    Raises:
        UnknownBench: one is not there.
    """
    known = {bench.name: bench for bench in BENCHES}
    for name in names:
        if name not in known:
            raise UnknownBench(name)
    return [known[name] for name in names] if names else list(BENCHES)


def run_benches(names: Sequence[str] = (), *, quick: bool = False, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Run benchmarks, one after the other.

    Returns:
        ``{"machine": {…}, "quick": bool, "rows": [{name, unit, ours, theirs, peer, ratio, target, met}], "skipped": {what: reason},
        "results": {name: what the benchmark itself says}}``; `met` is None after a quick look.

    Raises:
        UnknownBench: a name is wrong.
    """
    chosen = choose(names)
    report: dict[str, Any] = {"machine": machine(), "quick": quick, "rows": [], "skipped": {}, "results": {}}
    for bench in chosen:
        if progress:
            progress(f"bench {bench.name}: {bench.about}")
        started = time.perf_counter()
        try:
            result = getattr(importlib.import_module(bench.module), bench.function)(**(bench.quick if quick else {}))
        except Exception as error:
            if os.environ.get("TICKMESH_DEBUG") == "1":
                raise
            report["skipped"][bench.name] = _reason(error)
            continue
        report["results"][bench.name] = {**result, "wall_s": round(time.perf_counter() - started, 1)}
        report["rows"] += [{**asdict(row), "met": None if quick else row.met} for row in bench.rows(result)]
        report["skipped"] |= {f"{bench.name}, {what}": why for what, why in result.get("skipped", {}).items()}
    return report


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is not installed: pip install 'tickmesh[bench]'"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


# ---------------------------------------------------------------- showing


def list_text() -> str:
    """Names of the benchmarks and what they measure."""
    width = max(len(bench.name) for bench in BENCHES)
    return "\n".join(f"{bench.name:<{width}}  {bench.about}" for bench in BENCHES)


def number_text(value: float) -> str:
    """Three digits or thousands: ``number_text(7.1234) == "7.12"``, ``number_text(1234567.0) == "1,234,567"``."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def report_text(report: dict[str, Any]) -> str:
    """A report for people: the machine, the comparisons, what a benchmark has to say in `lines` of its own, what was left out."""
    rows = [f"{name:<10} {value}" for name, value in report["machine"].items()]
    if report["quick"]:
        rows.append("a quick look: too short to judge a target by, or to publish")
    rows.append("")
    head = ("what", "unit", "tickmesh", "peer", "ratio", "target", "met", "peer is")
    lines = [head, *(_line(row) for row in report["rows"])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        left = (f"{text:<{width}}" if i in (0, 1, 7) else f"{text:>{width}}" for i, (text, width) in enumerate(zip(line, widths)))
        rows.append("  ".join(left).rstrip())
    rows += [line for result in report["results"].values() for line in result.get("lines", ())]
    rows += [f"left out: {what}: {why}" for what, why in report["skipped"].items()]
    return "\n".join(rows)


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    target = "–" if row["target"] is None else f"≥ {row['target']:g}"
    met = {True: "yes", False: "NO", None: "–"}[row["met"]]
    ours, theirs = number_text(row["ours"]), number_text(row["theirs"])
    return (row["name"], row["unit"], ours, theirs, f"{row['ratio']:.2f}x", target, met, row["peer"])
