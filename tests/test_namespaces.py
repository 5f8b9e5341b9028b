"""Network namespaces: who reaches whom, what a cut does, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tickmesh.ops.namespaces import INTERFACE, NamespaceError, Namespaces, VethPair, lacking

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())

CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3])).close()"
MULTICAST = """
import socket, sys
group, here = socket.inet_aton("239.77.1.1"), socket.inet_aton(sys.argv[1])
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as inbox:
    inbox.bind(("239.77.1.1", 26400))
    inbox.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group + here)
    inbox.settimeout(10)
    print("joined", flush=True)
    print(inbox.recv(100).decode())
"""


def spaces() -> list[str]:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture
def network() -> Iterator[Namespaces]:
    with Namespaces(f"t{os.getpid()}", ["a", "b"]) as made:
        yield made
    assert not [space for space in spaces() if f"-t{os.getpid()}-" in space]


def reaches(network: Namespaces, node: str, address: str, port: int, limit_s: float = 2.0) -> bool:
    command = network.command(node, [sys.executable, "-c", CONNECT, address, str(port), str(limit_s)])
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_nodes_reach_the_servers_until_they_are_cut_off_and_again(network: Namespaces) -> None:
    with socket.create_server((network.servers_address, 0)) as server:
        port = server.getsockname()[1]
        assert reaches(network, "a", network.servers_address, port)
        assert not reaches(network, "a", "127.0.0.1", port), "each has a loopback of its own"
        network.cut("a")
        assert not reaches(network, "a", network.servers_address, port, 0.5)
        assert reaches(network, "b", network.servers_address, port), "the others are not touched"
        network.join("a")
        end = time.monotonic() + 10
        while not reaches(network, "a", network.servers_address, port, 0.5):
            assert time.monotonic() < end


def test_multicast_reaches_every_node(network: Namespaces) -> None:
    command = [sys.executable, "-c", MULTICAST]
    inboxes = [
        subprocess.Popen(network.command(node, [*command, network.address(node)]), stdout=subprocess.PIPE, text=True) for node in ("a", "b")
    ]
    try:
        for inbox in inboxes:
            assert inbox.stdout is not None
            assert inbox.stdout.readline() == "joined\n"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(network.servers_address))
            sender.sendto(b"hello", ("239.77.1.1", 26400))
        assert [inbox.communicate(timeout=20)[0] for inbox in inboxes] == ["hello\n", "hello\n"]
    finally:
        for inbox in inboxes:
            inbox.kill()
            inbox.wait()


def test_the_thread_is_where_it_was_afterwards_also_after_a_failure() -> None:
    before = os.readlink("/proc/thread-self/ns/net")

    def fail() -> None:
        with Namespaces(f"t{os.getpid()}", ["a"]):
            assert os.readlink("/proc/thread-self/ns/net") != before
            raise KeyError("oops")

    with pytest.raises(KeyError, match="oops"):
        fail()
    assert os.readlink("/proc/thread-self/ns/net") == before
    assert INTERFACE not in [name for _, name in socket.if_nameindex()]


def test_what_a_killed_process_left_is_removed_by_the_next(network: Namespaces) -> None:
    code = (
        "import os, signal\nfrom tickmesh.ops.namespaces import Namespaces\n"
        "made = Namespaces('left', ['x']).__enter__()\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    assert [space for space in spaces() if space.endswith("-left-x")]
    with Namespaces(f"u{os.getpid()}", []):
        assert not [space for space in spaces() if space.endswith("-left-x")]
        assert [space for space in spaces() if space.endswith("-a")], "those of the living stay"


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGKILL])
def test_a_cable_does_not_outlive_its_process(ended_by: signal.Signals) -> None:
    """Ctrl-C unwinds it; after a kill the next one removes it."""
    code = (
        "import signal, time\nfrom tickmesh.ops.namespaces import VethPair\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with VethPair('cut'):\n    print('made', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        process.send_signal(ended_by)
        process.wait(20)
    if ended_by == signal.SIGKILL:
        with VethPair(f"v{os.getpid()}"):
            pass
    assert not [space for space in spaces() if space.startswith(f"tm-{process.pid}-")]


def test_the_reason_is_said(network: Namespaces) -> None:
    subprocess.run(["ip", "netns", "delete", network.enter.split()[3]], check=True)
    with pytest.raises(NamespaceError, match=r"^ip -n tm-\S+-servers link set v1 down: Cannot open network namespace"):
        network.cut("a")
