"""``tickmesh up`` as a person runs it: a process, its output, its signals, and what it leaves behind."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from nodes import node_text, simulator_source, until
from replays import ES, recording

from tickmesh.node import subscribe
from tickmesh.node.errors import NodeError
from tickmesh.node.event import EventArray, Kind
from tickmesh.node.telemetry import read_telemetry, telemetry_path
from tickmesh.ops.up import demo_config, up


class Up:
    """A running ``tickmesh up``."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self._log = process, log

    @property
    def text(self) -> str:
        return self._log.read_text()

    def wait_for(self, pattern: str, limit_s: float = 90) -> re.Match[str]:
        until(lambda: self.process.poll() is not None or re.search(pattern, self.text), f"{pattern!r} in the output", limit_s)
        found = re.search(pattern, self.text)
        assert found, self.text
        return found


@contextmanager
def running_up(folder: Path, *arguments: str) -> Iterator[Up]:
    log = folder / "up.log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "tickmesh.ops.cli", "up", *arguments], stdout=file, stderr=file, text=True)
    try:
        yield Up(process, log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def collect(url: str, cluster: str, count: int) -> EventArray:
    """Outputs from the first one on, without holes."""

    async def read() -> EventArray:
        parts: list[EventArray] = []
        async with asyncio.timeout(60), subscribe(url, cluster=cluster, from_sequence="all") as batches:
            async for batch in batches:
                assert not batch.missing
                parts.append(batch.events)
                if sum(map(len, parts)) >= count:
                    break
        return np.concatenate(parts)

    return asyncio.run(read())


def left_in_memory(cluster: str) -> list[Path]:
    return list(Path("/dev/shm").glob(f"tickmesh-{cluster}*"))


@pytest.fixture
def cluster() -> Iterator[str]:
    name = f"u{secrets.token_hex(4)}"
    yield name
    assert not left_in_memory(name)


def embedded_text(cluster: str, folder: Path, sources: str, port: int = 0) -> str:
    return node_text(cluster, folder, sources, delivery=f'embedded = true\nport = {port}\nper_event = ["bbo"]')


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_serves_and_leaves_nothing(cluster: str, tmp_path: Path, number: signal.Signals) -> None:
    file = tmp_path / "node.toml"
    file.write_text(embedded_text(cluster, tmp_path / "data", simulator_source(0, pace='"realtime"', rate=1000)))
    with running_up(tmp_path, "--config", str(file)) as started:
        url = started.wait_for(r"nats://127\.0\.0\.1:\d+").group()
        started.wait_for(r"events in, [\d,]+ outputs .*ALFA|events in, [\d,]+ outputs .*\d")
        outputs = collect(url, cluster, 3000)
        reading = read_telemetry(telemetry_path(cluster, "n1"))
        started.process.send_signal(number)
        assert started.process.wait(30) == 0, started.text
        assert "Traceback" not in started.text
    assert np.array_equal(outputs["seq"], np.arange(1, len(outputs) + 1, dtype=np.uint64))
    assert {Kind.BBO, Kind.TRADE, Kind.SIGNAL} <= {Kind(int(kind)) for kind in set(outputs["kind"])}
    assert reading["shards"][0]["outputs"] > 0
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", int(url.rpartition(":")[2])))
    assert not children_with(str(tmp_path))


def children_with(text: str) -> list[str]:
    """Processes whose command line holds this."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in command and int(entry.parent.name) != os.getpid():
            found.append(command)
    return found


def test_a_recording_ends_and_up_stays(cluster: str, tmp_path: Path) -> None:
    file = recording(ES)
    source = f'[data_sources.feed]\ntype = "file"\npath = "{file}"\ndata_format = "dbn_mbo"\npace = "max"\n'
    config = tmp_path / "node.toml"
    config.write_text(embedded_text(cluster, tmp_path / "data", source))
    with running_up(tmp_path, "--config", str(config)) as started:
        started.wait_for("the recording has ended")
        assert "ESM4" in started.text
        assert started.process.poll() is None
        started.process.send_signal(signal.SIGINT)
        assert started.process.wait(30) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--capture", "missing.bin"], 1, "missing.bin"),
        (["--capture", "odd.bin"], 2, "odd.bin: its format is not recognised"),
        (["--config", "busy.toml"], 1, "port"),
        (["--config", "broken.toml"], 2, "nonsense"),
        (["--config", "unwritable.toml"], 1, "file"),
        (["--data-dir", "full"], 1, "was not made by a demonstration"),
    ],
)
def test_one_line_says_what_is_wrong(cluster: str, tmp_path: Path, arguments: list[str], code: int, reason: str) -> None:
    (tmp_path / "odd.bin").write_bytes(b"\1\2\3" * 100)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")
    (tmp_path / "broken.toml").write_text("nonsense = 1\n")
    (tmp_path / "unwritable.toml").write_text(embedded_text(cluster, tmp_path / "file" / "data", simulator_source(10)))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (tmp_path / "busy.toml").write_text(embedded_text(cluster, tmp_path / "data", simulator_source(10), port))
        command = [sys.executable, "-m", "tickmesh.ops.cli", "up", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == code, done.stderr
    assert reason in lines[-1]
    assert len(lines) <= 2, done.stderr
    assert (tmp_path / "full" / "precious").exists()


def test_two_demonstrations_keep_apart(tmp_path: Path) -> None:
    """A second one neither runs nor empties the first one's folder."""
    import fcntl

    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "stream").write_text("the first one's")
    with (tmp_path / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(NodeError, match="another demonstration runs"):
            up([], port=0, data_dir=folder)
    assert (folder / "stream").exists()


def test_the_demonstrations_configuration(tmp_path: Path) -> None:
    config = demo_config([], tmp_path / 'a "quoted" folder', 0)
    assert config.cluster.data_path == tmp_path / 'a "quoted" folder'
    assert config.delivery["events"].port == 0
    assert [source.type for source in config.data_sources.values()] == ["simulator"]
    played = demo_config([recording(ES)], tmp_path)
    assert [(source.type, source.data_format, source.pace) for source in played.data_sources.values()] == [("file", "dbn_mbo", "realtime")]
    assert played.delivery["events"].port == 4222
