"""The command line: help, exit codes, what it says about ten kinds of bad input, and that the reference page is the commands."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tickmesh.node.event import EVENT, REFERENCE, EventArray, Kind
from tickmesh.node.journal import Journal
from tickmesh.node.telemetry import NodeState, Telemetry, find_nodes
from tickmesh.ops import cli
from tickmesh.ops.bench import BENCHES, Row, machine, number_text, report_text
from tickmesh.ops.status_cmd import Rates, duration_text, interval_latency, rates, uptime_text
from tickmesh.transports.counters import BUCKETS
from tickmesh.transports.ring import Ring

ROOT = Path(__file__).parent.parent
_LIMIT_S = 120


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    return done.exit_code, done.stdout, done.stderr


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tickmesh.ops.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False, **options)


@pytest.fixture
def cluster() -> Iterator[str]:
    name = f"t{uuid.uuid4().hex[:10]}"
    yield name
    for node in find_nodes():
        if node.cluster == name:
            node.path.unlink(missing_ok=True)


def some_events(count: int) -> EventArray:
    """An instrument's definition, then trades."""
    events = np.zeros(count, EVENT)
    events["seq"], events["kind"] = np.arange(count), Kind.TRADE
    events["ts_event"], events["price"], events["qty"] = np.arange(count), 100_250_000_000, np.arange(count)
    definition = events[:1].view(REFERENCE)
    definition["kind"], definition["symbol"], definition["tick_size"], definition["side"] = Kind.REFERENCE, b"AAPL", 10_000_000, 0
    return events


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    folder = tmp_path / "journal"
    with Journal.create(folder, shard=3, segment_records=1024) as made:
        made.append(some_events(1500))
    return folder


# ---------------------------------------------------------------- help


def test_help_needs_no_compiler() -> None:
    code = (
        "import sys, contextlib, io\n"
        "from tickmesh.ops.cli import app\n"
        "for arguments in (['--help'], ['replay', '--help'], ['journal', '--help'], ['--version']):\n"
        "    with contextlib.redirect_stdout(io.StringIO()):\n"
        "        try: app(arguments)\n"
        "        except SystemExit as end: assert not end.code, end.code\n"
        "print(*sorted({'numba', 'numpy', 'rich.live', 'nats', 'uvloop'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_every_command_and_option_has_help() -> None:
    names = []
    for name, command in cli.commands():
        names.append(name)
        assert command.help, name
        for param in command.params:
            assert param.help or param.name == "help", f"{name} {param.name}"
    assert {"tickmesh up", "tickmesh node run", "tickmesh journal verify", "tickmesh simulate"} <= set(names)


def test_reference_page_is_what_the_commands_say() -> None:
    assert (ROOT / "docs/reference/cli.md").read_text() == cli.reference_markdown(), "tickmesh reference > docs/reference/cli.md"


def test_installed_command() -> None:
    command = [Path(sys.executable).with_name("tickmesh"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=True)
    assert done.stdout.startswith("tickmesh 0.")


def test_simulate_shows_its_own_options() -> None:
    code, out, _ = run("simulate", "--help")
    assert code == 0
    assert "--seed" in out
    assert "--loss-a" in out


# ---------------------------------------------------------------- bad input


def test_refusals_exist() -> None:
    for name in cli.REFUSALS:
        module, _, kind = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), kind), Exception), name


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["repla"], 2, "Did you mean 'replay'"),
        (["replay"], 2, "Missing argument 'FILE...'"),
        (["replay", "a.itch"], 2, "--config"),
        (["replay", "{tmp}/absent.itch", "-c", "{tmp}/good.toml"], 1, "absent.itch: No such file or directory"),
        (["replay", "{tmp}/feed.itch", "-c", "{tmp}/absent.toml"], 2, "absent.toml"),
        (["replay", "{tmp}/feed.itch", "-c", "{tmp}/broken.toml"], 2, "broken.toml:2"),
        (["replay", "{tmp}/feed.itch", "-c", "{tmp}/good.toml", "--summary", "{tmp}"], 1, "is a folder"),
        (["replay", "{tmp}/feed.itch", "-c", "{tmp}/good.toml", "--summary", "{tmp}/no/such/x.json"], 1, "there is no such folder"),
        (["replay", "{tmp}/feed.itch", "-c", "{tmp}/good.toml", "--depth", "-1"], 2, "--depth"),
        (["replay", "{tmp}/feed.itch", "-c", "{tmp}/good.toml", "--source", "nope"], 2, "there are: feed"),
        (["node", "run", "-c", "{tmp}/wrong.toml"], 2, "wrong.toml:4"),
        (["up", "--capture", "{tmp}/absent.pcap"], 1, "absent.pcap: No such file or directory"),
        (["up", "--capture", "{tmp}/feed.itch", "--config", "{tmp}/good.toml"], 2, "names its own sources"),
        (["up", "--config", "{tmp}/wrong.toml"], 2, "wrong.toml:2"),
        (["config", "show", "{tmp}/wrong.toml"], 2, "wrong.toml:2"),
        (["subscribe", "bbo", "--from", "all"], 2, "tm.CLUSTER.KIND.SYMBOL"),
        (["subscribe", "tm.demo.>", "--from", "yesterday"], 2, "neither a sequence number nor now nor all"),
        (["subscribe", "tm.demo.bbo.*", "--server", "nats://127.0.0.1:1"], 1, "127.0.0.1:1"),
        (["status", "--node", "no-such-node"], 1, "there is no node 'no-such-node' on this host"),
        (["top", "--once", "--cluster", "no-such-cluster"], 1, "no-such-cluster"),
        (["journal", "show", "{tmp}"], 1, "there is no journal here"),
        (["journal", "verify", "{tmp}/absent"], 1, "there is no journal here"),
        (["bench", "speed"], 2, "there is no benchmark 'speed'; there are: decode, book, loop, fix, ring"),
        (["simulate", "--symbols", "0", "--file", "{tmp}/x"], 2, "symbols"),
        (["simulate", "--no-such-option"], 2, "--no-such-option"),
        (["simulate", "--messages", "1000", "--file", "{tmp}/no/such/x"], 1, "no/such/x"),
    ],
)  # fmt: skip
def test_bad_input_gives_a_code_and_a_line(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    (tmp_path / "feed.itch").write_bytes(b"\0\0")
    (tmp_path / "good.toml").write_text('[data_sources.feed]\ntype = "file"\npath = "feed.itch"\ndata_format = "itch50"\n')
    (tmp_path / "broken.toml").write_text("[cluster]\nshards = = 2\n")
    (tmp_path / "wrong.toml").write_text('[cluster]\nshards = 0\n[data_sources.a]\ntype = "fiel"\n')
    found, out, err = run(*(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert found == code, err
    assert said in err
    assert "Traceback" not in err
    assert out == ""


def test_every_problem_of_a_configuration_is_told(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text('[cluster]\nshards = 0\nnode = "a b"\n[nonsense]\n')
    code, _, err = run("config", "show", path)
    assert code == 2
    assert all(line.startswith(f"tickmesh: {path}:") for line in err.splitlines())
    assert len(err.splitlines()) == 3


def test_a_defect_says_how_to_report_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: bool) -> int:
        raise ZeroDivisionError("half of\nnothing")

    monkeypatch.setattr("tickmesh.ops.doctor.run", broken)
    monkeypatch.delenv("TICKMESH_DEBUG", raising=False)
    code, _, err = run("doctor")
    assert code == 1
    assert err.startswith("tickmesh: a defect in tickmesh: ZeroDivisionError: half of; run it again with TICKMESH_DEBUG=1")
    assert len(err.splitlines()) == 1
    monkeypatch.setenv("TICKMESH_DEBUG", "1")
    assert isinstance(CliRunner().invoke(cli.app, ["doctor"]).exception, ZeroDivisionError)


def test_debug_option_shows_the_traceback(tmp_path: Path) -> None:
    done = process("--debug", "config", "show", str(tmp_path / "absent.toml"))
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ConfigError" in done.stderr


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError(), PermissionError(13, "Permission denied", "/x")])
def test_errors_of_the_system_are_told_in_a_line(error: Exception) -> None:
    code, text = cli.explained(error)
    assert code == 1
    assert len(text.splitlines()) == 1
    assert "defect" not in text


def test_ctrl_c_ends_with_130(cluster: str) -> None:
    command = [sys.executable, "-m", "tickmesh.ops.cli", "top", "--json", "--interval", "0.1", "--cluster", cluster]
    with Telemetry.create(cluster, "n", [], 1):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
        try:
            assert child.stdout is not None
            assert json.loads(child.stdout.readline())["nodes"][0]["cluster"] == cluster
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=_LIMIT_S)
        finally:
            child.kill()
            child.wait()
    assert (child.returncode, err) == (130, "")


def test_a_reader_that_goes_away_is_no_error(journal: Path) -> None:
    command = [sys.executable, "-m", "tickmesh.ops.cli", "journal", "show", str(journal)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == ""
        assert child.wait(_LIMIT_S) == 0


# ---------------------------------------------------------------- replay


_SUMMARY = {
    "source": {"format": "itch50", "bytes": 1234, "messages_total": 10, "seconds": 0.5},
    "messages": {"A": 10}, "malformed": {"bad_field": 2}, "gaps": [{"first": 5, "last": 7}], "duplicates": 1,
    "events": {"add": 3, "bbo": 2}, "refused": {"unknown_order": 4},
    "instruments": {
        "AAPL": {"trades": 2, "volume": "300", "vwap": 100.5, "first_bbo": None, "last_bbo": ["100.1", "5", None, None],
                 "bids": [["100.1", "5", 1]], "asks": [], "signals": {}},
    },
}  # fmt: skip


@pytest.fixture
def replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, dict[str, Any]]:
    """A configuration, a recording, and the arguments that the replay was called with."""
    seen: dict[str, Any] = {}

    def fake(config: Any, files: list[Path], source: str | None, depth: int, progress: Any, *, folder: Path) -> dict[str, Any]:
        seen.update(cluster=config.cluster.name, files=files, source=source, depth=depth, folder=folder)
        if progress:
            progress("compiling shard loop, first run only")
        return _SUMMARY

    monkeypatch.setattr("tickmesh.node.replay.replay", fake)
    config, recording = tmp_path / "c.toml", tmp_path / "day.itch"
    config.write_text('[cluster]\nname = "demo"\n[data_sources.feed]\ntype = "file"\npath = "x"\ndata_format = "itch50"\n')
    recording.write_bytes(b"")
    return config, recording, seen


def test_replay_writes_the_summary_as_it_is(replayed: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    config, recording, seen = replayed
    target = tmp_path / "out.json"
    target.write_text("older")
    code, out, err = run("replay", recording, "-c", config, "--source", "feed", "--depth", "3", "--summary", target)
    assert code == 0, err
    assert json.loads(target.read_text()) == _SUMMARY
    assert seen == {"cluster": "demo", "files": [recording], "source": "feed", "depth": 3, "folder": tmp_path}
    assert "10 messages" in out
    assert "1 (3 missing)" in out
    assert "tickmesh: compiling shard loop" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.toml", "day.itch", "out.json"]


@pytest.mark.parametrize("how", [["--summary", "-"], ["--json"]])
def test_replay_to_standard_output_is_json_alone(replayed: tuple[Path, Path, dict[str, Any]], how: list[str]) -> None:
    config, recording, _ = replayed
    code, out, err = run("replay", recording, "-c", config, "-q", *how)
    assert (code, err) == (0, "")
    assert json.loads(out) == _SUMMARY


def test_replay_summary_may_be_a_device(replayed: tuple[Path, Path, dict[str, Any]]) -> None:
    config, recording, _ = replayed
    assert run("replay", recording, "-c", config, "--summary", os.devnull)[0] == 0
    assert not Path(os.devnull).is_file()


# ---------------------------------------------------------------- status and top


def test_status_of_a_living_and_a_dead_node(cluster: str) -> None:
    with Telemetry.create(cluster, "alive", ["nasdaq"], 2, ["out"]) as node, Ring.create(f"{cluster}-ring", 64) as ring:
        node.set_state(NodeState.RUNNING)
        node.update("source.nasdaq", {"messages": 1234567})
        writer = ring.writer
        code, out, _ = run("status", "--cluster", cluster)
        assert code == 0
        assert f"{cluster}/alive  running" in out
        assert "1,234,567" in out
        assert f"{cluster}-ring" in out
        code, out, _ = run("status", "--cluster", cluster, "--json")
        found = json.loads(out)
        assert (code, found["nodes"][0]["advice"], found["nodes"][0]["alive"]) == (0, "", True)
        assert found["nodes"][0]["shards"][1]["receive_to_output"]["p999"] is None
        assert [r["name"] for r in found["rings"] if r["name"].startswith(cluster)] == [f"{cluster}-ring"]
        writer.close()
        ring.unlink()
        node.close(keep=True)
    code, out, _ = run("status", "--cluster", cluster)
    assert code == 1
    assert "DEAD (was running)" in out
    assert "or remove" in out


def test_status_tells_a_file_that_is_no_counter_file(cluster: str) -> None:
    path = Path(f"/dev/shm/tickmesh-{cluster}.n.counters")
    path.write_bytes(b"something else")
    code, out, _ = run("status", "--cluster", cluster)
    path.unlink()
    assert code == 1
    assert "unreadable" in out


def test_status_takes_no_place_among_a_rings_readers(cluster: str) -> None:
    with Ring.create(f"{cluster}-ring", 64) as ring, ring.reader("mine"):
        before = ring.arrays.words.copy()
        assert run("status")[0] in (0, 1)
        assert np.array_equal(ring.arrays.words, before)
        ring.unlink()


def test_a_silent_node_is_told(cluster: str) -> None:
    with Telemetry.create(cluster, "n", [], 1) as node:
        node.set("node.heartbeat_ns", time.time_ns() - 60 * 10**9)
        code, out, _ = run("status", "--cluster", cluster)
    assert code == 0
    assert re.search(r"silent for 6[0-9] s", out), "a minute, and however long the command took to start"


def test_top_once(cluster: str) -> None:
    with Telemetry.create(cluster, "n", ["nasdaq"], 1, ["out"]):
        code, out, _ = run("top", "--once", "--interval", "0.1", "--cluster", cluster)
        assert code == 0
        assert "messages/s" in out
        code, out, _ = run("top", "--once", "--interval", "0.1", "--cluster", cluster, "--json")
        assert json.loads(out)["nodes"][0]["sources"][0]["messages_per_s"] == 0
    assert run("top", "--once", "--interval", "0.1", "--cluster", cluster)[0] == 1


def test_rates_and_latencies_are_of_the_interval(cluster: str) -> None:
    now = [100.0]
    with Telemetry.create(cluster, "n", ["a"], 1) as node:
        source = Rates(cluster, clock=lambda: now[0])
        histogram = node.shard(0).receive_to_output
        histogram[16 + 20] += 1000
        node.set("source.a.messages", 50)
        first = source.look()[0]
        assert first["interval_s"] is None
        assert first["sources"][0]["messages_per_s"] is None
        assert first["shards"][0]["latency_ns"]["p50"] == 20
        histogram[16 + 7] += 10
        node.set("source.a.messages", 250)
        now[0] = 104.0
        second = source.look()[0]
        assert second["interval_s"] == 4.0
        assert second["sources"][0]["messages_per_s"] == 50.0
        assert second["shards"][0]["latency_ns"] == {"p50": 7, "p99": 7, "p999": 7}
        assert source.look()[0]["shards"][0]["latency_ns"]["p50"] is None


def test_a_node_that_starts_again_begins_anew(cluster: str) -> None:
    source = Rates(cluster)
    with Telemetry.create(cluster, "n", ["a"], 2) as node:
        node.set("source.a.messages", 1000)
        source.look()
    with Telemetry.create(cluster, "n", ["b"], 1):
        anew = source.look()[0]
        assert (anew["interval_s"], len(anew["shards"]), anew["sources"][0]["messages_per_s"]) == (None, 1, None)


def test_numbers_as_text() -> None:
    texts = [duration_text(ns) for ns in (None, 0, 999, 1234, 56_789, 1_500_000, 999_000_000, 2_500_000_000, 5_000_000_000_000)]
    assert texts == ["–", "0 ns", "999 ns", "1.23 µs", "56.8 µs", "1.5 ms", "999 ms", "2.5 s", "5,000 s"]
    assert [uptime_text(s) for s in (3.9, 61, 3700, 93784)] == ["3s", "1m 1s", "1h 1m", "1d 2h 3m"]
    assert [number_text(v) for v in (0.123456, 7.1234, 999.0, 1234567.0)] == ["0.123", "7.12", "999", "1,234,567"]
    assert rates({"shard": 1, "a": 5, "histogram": {}}, {"a": 1}, 2.0) == {"a": 5, "a_per_s": 2.0}
    assert interval_latency(np.zeros(BUCKETS, np.int64), None) == {"p50": None, "p99": None, "p999": None}


# ---------------------------------------------------------------- journals


def test_journal_show_names_the_symbol(journal: Path) -> None:
    code, out, err = run("journal", "show", journal, "--count", "3")
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == 3
    assert "reference" in lines[0]
    assert "AAPL" in lines[2]
    assert "price=100.25" in lines[2]


@pytest.mark.parametrize(("start", "count"), [(0, 1), (1, 2), (1023, 3), (1499, 5), (700, 800)])
def test_journal_show_from_anywhere(journal: Path, start: int, count: int) -> None:
    code, out, err = run("journal", "show", journal, "--from", str(start), "--count", str(count), "--json")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["journal"] for row in rows] == list(range(start, min(start + count, 1500)))
    assert all(row["seq"] == row["journal"] and row["symbol"] == "AAPL" for row in rows)


def test_journal_show_all(journal: Path) -> None:
    assert len(run("journal", "show", journal, "--json")[1].splitlines()) == 1500


def test_journal_show_behind_the_end(journal: Path) -> None:
    code, out, err = run("journal", "show", journal, "--from", "1500")
    assert (code, out) == (2, "")
    assert "it holds 0 to 1499" in err


def test_journal_verify(journal: Path) -> None:
    code, out, _ = run("journal", "verify", journal)
    assert code == 0
    assert "1,500 events" in out
    assert out.endswith("whole\n")
    assert json.loads(run("journal", "verify", journal, "--json")[1])["ok"] is True


def test_journal_verify_names_the_damaged_place(journal: Path) -> None:
    path = sorted(journal.glob("*"))[0]
    path = next(p for p in sorted(journal.iterdir()) if p.stem.isdigit())
    data = bytearray(path.read_bytes())
    at = data.find(some_events(1500)[700].tobytes())
    data[at + 40] ^= 1
    path.write_bytes(data)
    code, out, _ = run("journal", "verify", journal)
    assert code == 3
    assert "record 700 (sequence 700): altered" in out
    report = json.loads(run("journal", "verify", journal, "--json")[1])
    assert (report["ok"], report["problems"][0]["sequence"]) == (False, 700)
    code, out, err = run("journal", "show", journal)
    assert code == 1
    assert len(out.splitlines()) == 700
    assert "sequence 700" in err


# ---------------------------------------------------------------- bench and the rest


def test_bench_report_from_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ring = {"tickmesh": 4.0, "g++": 3.9, "ratio": {"g++": 1.02}}
    result = {"throughput_ns": ring, "round_trip_p50_ns": ring, "round_trip_p99_ns": ring}
    result |= {"lines": ["how it lies"], "skipped": {"clang++": "not installed"}}
    monkeypatch.setattr("tickmesh.ops.bench_ring.bench_ring", lambda **_: result)
    monkeypatch.setattr("tickmesh.ops.bench_delivery.bench_delivery", lambda **_: 1 / 0)
    monkeypatch.delenv("TICKMESH_DEBUG", raising=False)
    target = tmp_path / "b.json"
    assert run("bench", "ring", "--quick", "--json", target)[0] == 0
    assert [row["met"] for row in json.loads(target.read_text())["rows"]] == [None, None, None]
    code, out, _ = run("bench", "ring", "delivery", "--json", target)
    assert code == 0
    report = json.loads(target.read_text())
    assert [row["met"] for row in report["rows"]] == [True, True, None]
    assert report["rows"][0]["ratio"] == pytest.approx(1 / 1.02)
    assert report["skipped"] == {"ring, clang++": "not installed", "delivery": "division by zero"}
    assert report["machine"] == machine() | {"load": report["machine"]["load"]}
    assert "\nhow it lies\nleft out: ring, clang++: not installed\nleft out: delivery: division by zero" in out
    assert out == report_text(report) + "\n"
    assert run("bench", "delivery")[0] == 1


def test_bench_list_and_targets() -> None:
    code, out, _ = run("bench", "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [bench.name for bench in BENCHES]
    assert Row("a", "ns", 1, 2, "b", 2.0, 1.9).met
    assert not Row("a", "ns", 1, 2, "b", 2.0, 2.1).met
    for bench in BENCHES:
        assert callable(getattr(importlib.import_module(bench.module), bench.function))


def test_doctor_says_whether_a_check_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tickmesh.ops.doctor.checks", list)
    assert run("doctor", "--json")[:2] == (0, "[]\n")
    monkeypatch.setattr("tickmesh.ops.doctor.run", lambda _: 1)
    assert run("doctor")[0] == 3


def test_config_schema_and_show(tmp_path: Path) -> None:
    code, out, _ = run("config", "schema", "--json")
    assert code == 0
    assert json.loads(out)["properties"]["cluster"]
    path = tmp_path / "c.toml"
    path.write_text('[cluster]\nname = "demo"\n')
    code, out, _ = run("config", "show", path, "--json")
    assert code == 0
    assert {"path": "cluster.name", "value": "demo", "origin": "c.toml:2", "change": "restart"} in json.loads(out)
    assert "cluster.name" in run("config", "show", path)[1]


def test_simulate_writes_a_file(tmp_path: Path) -> None:
    code, out, err = run("simulate", "--messages", "500", "--symbols", "2", "--file", tmp_path / "day.itch", "--json")
    assert code == 0, err
    assert json.loads(out)["messages"] == 500
    assert (tmp_path / "day.itch").stat().st_size > 500
