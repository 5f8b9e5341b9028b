"""Nodes that run what the store says: real nodes, real stores, the real command line."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from nats_fixtures import nats_server  # noqa: F401
from nodes import PROCESSING, cluster, simulator_source, until  # noqa: F401
from store_servers import StoreServer, start

from tickmesh.chaos.checker import Report, check_stream
from tickmesh.ops.servers import NatsServer
from tickmesh.transports.nats import Login, connect

pytestmark = pytest.mark.slow


class Followed:
    """A node process that follows a store, and the commands of an operator."""

    def __init__(self, kind: str, server: StoreServer, nats: NatsServer, cluster: str, folder: Path) -> None:  # noqa: F811
        self.kind, self.server, self.nats, self.cluster, self.folder = kind, server, nats, cluster, folder
        port = server.process.port
        self.store = f"consul://127.0.0.1:{port}" if kind == "consul" else server.process.url
        table = f'kind = "consul"\naddress = "127.0.0.1:{port}"' if kind == "consul" else f'kind = "nats"\naddress = "{self.store}"'
        self.own = folder / "own.toml"
        self.own.write_text(f'[cluster]\nname = "{cluster}"\nnode = "n1"\ndata_dir = "{folder}/data"\n[store]\n{table}\n')
        self.wanted = folder / "wanted.toml"
        self.wanted.write_text(self._text())
        self.process: subprocess.Popen[str] | None = None

    def _text(self) -> str:
        return f"""
[cluster]
name = "{self.cluster}"
instruments_max = 1024
orders_max = 65536
[journal]
segment_mb = 1
{simulator_source(0, pace='"realtime"', rate=5000)}
{PROCESSING}
[delivery.events]
method = "nats"
target = "{self.nats.url}"
"""

    def run(self, *arguments: str, codes: tuple[int, ...] = (0,)) -> str:
        """An operator's command."""
        more = ["--store", self.store, "--cluster", self.cluster]
        done = subprocess.run(
            [sys.executable, "-m", "tickmesh.ops.cli", "config", *arguments, *more], capture_output=True, text=True, timeout=120
        )
        assert done.returncode in codes, (done.returncode, done.stdout, done.stderr)
        return done.stdout

    def start_node(self) -> None:
        """The node's process."""
        log = (self.folder / "node.log").open("a")
        command = [sys.executable, "-m", "tickmesh.ops.cli", "node", "run", "--config", str(self.own)]
        self.process = subprocess.Popen(command, stdout=log, stderr=log, text=True)

    def status(self) -> dict[str, Any]:
        """What the node says of itself in the store."""
        found = json.loads(self.run("status", "--json"))
        nodes = found["nodes"] if isinstance(found, dict) and "nodes" in found else found
        return next((one for one in (nodes.values() if isinstance(nodes, dict) else nodes) if one["node"] == "n1"), {})

    def outputs(self) -> int:
        """Outputs in the stream so far."""
        return asyncio.run(self._checked(None)).outputs

    async def _checked(self, journal: Path | None) -> Report:
        link = await connect(self.nats.url, login=Login())
        try:
            return await check_stream(link, self.cluster, 0, journal, expected=1)
        finally:
            await link.close()

    def grows(self) -> None:
        """Outputs go on."""
        assert self.process is not None
        before = self.outputs()
        until(lambda: self.outputs() > before + 100, "more outputs", 60)
        assert self.process.poll() is None

    def end(self) -> Report:
        """Stop the node, and check everything that it has put out against its journal."""
        assert self.process is not None
        self.process.terminate()
        assert self.process.wait(30) == 0
        return asyncio.run(self._checked(self.folder / "data" / "journal" / "n1" / "shard-0"))

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(params=["kv", "consul"])
def followed(request: pytest.FixtureRequest, nats_server: NatsServer, cluster: str, tmp_path: Path) -> Iterator[Followed]:  # noqa: F811
    with ExitStack() as stack:
        server = start(request.param, tmp_path / "store")
        stack.callback(server.close)
        made = Followed(request.param, server, nats_server, cluster, tmp_path)
        stack.callback(made.kill)
        yield made
        print((tmp_path / "node.log").read_text() if (tmp_path / "node.log").exists() else "")


def running(node: Followed) -> Callable[[], bool]:
    """Whether the node runs a version of the store."""
    return lambda: node.process is not None and node.process.poll() is None and node.status().get("version", 0) > 0


def test_a_node_runs_what_the_store_says_and_follows_it(followed: Followed) -> None:
    followed.start_node()  # before there is a configuration
    followed.run("apply", str(followed.wanted), "--comment", "the first", "--timeout-s", "5", codes=(0, 5))  # it may have to compile
    until(running(followed), "the node runs", 200)
    followed.grows()
    first = followed.status()

    followed.run("set", "processing.calculations.fast.window", "25")  # waits for the node's answer
    assert followed.status()["version"] > first["version"]
    followed.grows()

    followed.run("set", "risk.kill_switch", "true")
    followed.grows()
    report = followed.end()
    assert report.good, report
    assert len(report.config_versions) >= 3


def test_what_is_wrong_is_refused_and_the_node_runs_on(followed: Followed) -> None:
    followed.run("apply", str(followed.wanted))
    followed.start_node()
    until(running(followed), "the node runs", 200)
    followed.grows()
    good = followed.status()
    by_hand(followed, "risk", b"max_qyt = 5\n")
    until(lambda: followed.status()["refused"], "the refusal")
    refused = followed.status()["refused"]
    assert any("max_qty" in reason for reason in refused["reasons"])
    command = [sys.executable, "-m", "tickmesh.ops.cli", "status", "--cluster", followed.cluster]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "REFUSED" in shown
    assert "max_qty" in shown
    followed.grows()
    by_hand(followed, "cluster", b"instruments_max = 2048\n")
    until(lambda: followed.status()["refused"]["version"] > refused["version"], "another refusal")
    followed.grows()
    assert followed.status()["version"] == good["version"]
    by_hand(followed, "risk", b"max_qty = 7\n")
    by_hand(followed, "cluster", b"instruments_max = 1024\norders_max = 65536\n")
    until(lambda: followed.status()["version"] > good["version"] and not followed.status()["refused"], "a good one is taken")
    followed.grows()
    report = followed.end()
    assert report.good, report


def test_a_node_outlives_its_store(followed: Followed) -> None:
    followed.run("apply", str(followed.wanted))
    followed.start_node()
    until(running(followed), "the node runs", 200)
    followed.grows()
    followed.server.process.kill()
    followed.grows()
    followed.server.process.start()
    followed.grows()
    report = followed.end()
    assert report.good, report


def by_hand(followed: Followed, section: str, value: bytes) -> None:
    """Change a section without our command."""
    key = f"tickmesh/{followed.cluster}/config/{section}"
    if followed.kind == "consul":
        request = urllib.request.Request(f"http://127.0.0.1:{followed.server.process.port}/v1/kv/{key}", value, method="PUT")
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.read().strip() == b"true"
        return
    asyncio.run(_put(followed.store, key.replace("/", "."), value))


async def _put(url: str, key: str, value: bytes) -> None:
    link = await connect(url, login=Login())
    try:
        bucket = await link.client.jetstream().key_value("tickmesh")
        await bucket.put(key, value)
    finally:
        await link.close()
