"""A whole node on an AF_XDP line: what it says of it, and that its death, of whatever kind, leaves nothing on the interface."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from nodes import PROCESSING, cluster, until  # noqa: F401
from veth import ENDPOINTS, cable, needs_namespaces, programs_on, send, send_payloads, simulated

from tickmesh.control.config import parse_config
from tickmesh.node.process import Node
from tickmesh.node.telemetry import read_telemetry, telemetry_path
from tickmesh.ops.namespaces import INTERFACE, VethPair
from tickmesh.ops.rerequest_server import RerequestServer
from tickmesh.ops.simulated_lines import SimulatedLines, send_lines

pytestmark = needs_namespaces


def node_text(cluster: str, data: Path, **keys: object) -> str:  # noqa: F811
    more = "".join(f"{key} = {value!r}\n" for key, value in keys.items())
    return f"""
[cluster]
name = "{cluster}"
node = "n1"
idle = "sleep"
data_dir = "{data}"
instruments_max = 1024
orders_max = 65536
[journal]
segment_mb = 1
[data_sources.lines]
type = "multicast"
endpoint = "{ENDPOINTS[0]}"
endpoint_b = "{ENDPOINTS[1]}"
interface = "{INTERFACE}"
data_format = "itch50"
bypass = "auto"
{more}{PROCESSING}"""


@contextmanager
def node_process(folder: Path, text: str) -> Iterator[subprocess.Popen[str]]:
    """A node in the far namespace, ready; killed in the end."""
    file = folder / "node.toml"
    file.write_text(text)
    with (folder / "node.log").open("w") as log:
        command = [sys.executable, "-m", "tickmesh.ops.cli", "node", "run", "--config", str(file)]
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True)
    try:
        until(lambda: process.poll() is not None or "ready" in (folder / "node.log").read_text(), "a node", 120)
        assert process.poll() is None, (folder / "node.log").read_text()
        yield process
    finally:
        process.kill()
        process.wait()


def source(cluster: str) -> dict[str, int]:  # noqa: F811
    return dict(read_telemetry(telemetry_path(cluster, "n1"))["sources"]["lines"])


def remove_counters(cluster: str) -> None:  # noqa: F811
    for left in Path("/dev/shm").glob(f"tickmesh-{cluster}*"):
        left.unlink()


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_stays_on_the_interface_however_a_node_ends(cluster: str, tmp_path: Path, ended_by: signal.Signals) -> None:  # noqa: F811
    with cable() as pair, node_process(tmp_path, node_text(cluster, tmp_path)) as process:
        assert programs_on(INTERFACE) == ["tickmesh_rx"]
        send(pair, simulated(2000))
        until(lambda: source(cluster)["messages"] == 2000, "the feed", 20)
        assert source(cluster)["way"] == 2
        assert_status_says(cluster, "AF_XDP")
        assert "afxdp" in (tmp_path / "node.log").read_text()
        process.send_signal(ended_by)
        assert process.wait(30) == (-ended_by if ended_by == signal.SIGKILL else 0)
        until(lambda: programs_on(INTERFACE) == [], "an interface without a program", 10)
        assert Path("/proc/thread-self/net/packet").read_text().count("\n") == 1, "no packet socket"
    remove_counters(cluster)


def assert_status_says(cluster: str, way: str) -> None:  # noqa: F811
    command = [sys.executable, "-m", "tickmesh.ops.cli", "status", "--cluster", cluster]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert way in shown, shown
    read = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert read["nodes"][0]["sources"]["lines"]["way"] == 2


def test_a_killed_node_asks_for_what_it_has_missed(cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """The re-request server has what was sent while the node was dead: after the restart there is no gap."""
    with cable() as pair:
        server = serve(pair)
        text = node_text(cluster, tmp_path, rerequest=server.endpoint)
        with server:
            whole = simulated(6000)
            batches = list(cut(whole, server))
            with node_process(tmp_path, text) as process:
                send_part(pair, batches[:2])
                until(lambda: source(cluster)["messages"] >= 2048, "the beginning", 20)
                process.kill()
                process.wait()
            send_part(pair, batches[2:3])
            with node_process(tmp_path, text):
                send_part(pair, batches[3:])
                until(lambda: source(cluster)["recovered"] >= 1024, "what was missed", 20)
                found = source(cluster)
                assert (found["gaps"], found["given_up"]) == (0, 0)
    remove_counters(cluster)


def serve(pair: VethPair) -> RerequestServer:
    with pair.inside("left"):
        return RerequestServer(address=pair.left_address)


def cut(lines: SimulatedLines, server: RerequestServer) -> Iterator[list[bytes]]:
    """Line A's datagrams by batch of 1,024 messages; the server gets all of them."""
    for batch in lines.batches():
        server.keep(batch)
        yield [bytes(batch.payload(int(k))) for k in batch.lines[0]]


def send_part(pair: VethPair, parts: list[list[bytes]]) -> None:
    send_payloads(pair, [payload for part in parts for payload in part])


def test_a_running_node_changes_its_way_and_its_groups_and_loses_nothing(cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """What falls between two ways comes from the re-request server; over a change that keeps AF_XDP nothing falls anywhere."""
    stop = threading.Event()
    with cable() as pair, serve(pair) as server:
        lines = simulated(1_000_000, rate=4000)
        sender = threading.Thread(target=flow, args=(pair, lines, server, stop))
        text = node_text(cluster, tmp_path, rerequest=server.endpoint).replace('"auto"', '"none"')
        node = Node(parse_config(text))
        try:
            node.start()
            sender.start()
            version = 0
            group_b = f'endpoint_b = "{ENDPOINTS[1]}"\n'
            for change, way, programs in (
                (('"none"', '"afxdp"'), "afxdp", ["tickmesh_rx"]),
                ((group_b, ""), "afxdp", ["tickmesh_rx"]),
                (('"afxdp"', '"packet"'), "packet", []),
                (('"packet"', '"auto"'), "afxdp", ["tickmesh_rx"]),
                (('"auto"', '"none"'), "sockets", []),
            ):
                more_messages(node)
                text, version = text.replace(*change), version + 1
                assert node.receivers[0].counters()["gaps"] == 0
                node.apply(parse_config(text), version)
                more_messages(node)
                counters = node.receivers[0].counters()
                assert (node.receivers[0].path.way, programs_on(INTERFACE)) == (way, programs)  # type: ignore[attr-defined]
                assert (counters["gaps"], counters["given_up"]) == (0, 0)
                if version == 2:  # the same program, sockets and rings
                    assert counters["requests"] == 0
        finally:
            stop.set()
            sender.join()
            node.stop()
        assert programs_on(INTERFACE) == []


def flow(pair: VethPair, lines: SimulatedLines, server: RerequestServer, stop: threading.Event) -> None:
    with pair.inside("left"):
        send_lines(lines, ENDPOINTS, interface=INTERFACE, stop=stop, keep=server.keep)


def more_messages(node: Node) -> None:
    """Wait until the source's present receiver has decoded some more."""
    before = node.receivers[0].counters()["messages"]

    def done() -> bool:
        node.check()
        return node.receivers[0].counters()["messages"] > before + 500

    until(done, "more messages")
