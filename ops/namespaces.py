"""A network of its own for a cluster on one machine: a network namespace for each node, one for the servers, and links that can be cut.

    with Namespaces("mesh", ["n1", "n2"]) as network:     # this thread is in the servers' namespace now
        network.command("n1", ["tickmesh", "node", "run"])
        network.cut("n1")                                 # as if somebody pulled the cable: nothing is refused, everything is silent

Every namespace has an interface :data:`INTERFACE`, on one bridge, and its own loopback. It takes root and the program `ip` (iproute2);
:func:`lacking` says what is not there. What a process that was killed has left behind is removed by the next one.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

INTERFACE = "tm0"
"""Of the bridge in the servers' namespace, and of each node's end of its link to it."""
_NETWORK = "10.77.0"
_SERVERS = 254
_CLONE_NEWNET = 0x40000000
_NAMED = Path("/run/netns")


class NamespaceError(Exception):
    """Network namespaces cannot be made or changed. The message says why."""


def lacking() -> str:
    """What keeps this process from making network namespaces; empty: nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the program ip: install iproute2"
    return ""


class Namespaces:
    """The namespaces of one cluster. A context manager: inside it, the thread that entered is in the servers' namespace.

    Args:
        name: of the cluster.
        nodes: their names, at most 253.

    Attributes:
        servers_address: of the servers' namespace on the bridge.
    """

    def __init__(self, name: str, nodes: Sequence[str]) -> None:
        self._prefix = f"tm-{os.getpid()}-{name}"
        self._numbers = {node: number for number, node in enumerate(nodes, 1)}
        self._home: int | None = None
        self.servers_address = f"{_NETWORK}.{_SERVERS}"

    def address(self, node: str) -> str:
        """Of a node on the bridge."""
        return f"{_NETWORK}.{self._numbers[node]}"

    def command(self, node: str, command: Sequence[str]) -> list[str]:
        """A command that runs in a node's namespace, as the same process."""
        return ["ip", "netns", "exec", self._space(node), *command]

    @property
    def enter(self) -> str:
        """A command for people: a shell in the servers' namespace."""
        return f"ip netns exec {self._space()} bash"

    def cutting(self, node: str) -> str:
        """A command for people: what :meth:`cut` does."""
        return f"ip -n {self._space()} link set {self._link(node)} down"

    def cut(self, node: str) -> None:
        """Take a node's link down. Raises NamespaceError."""
        _ip("-n", self._space(), "link", "set", self._link(node), "down")

    def join(self, node: str) -> None:
        """Bring it up again. Raises NamespaceError."""
        _ip("-n", self._space(), "link", "set", self._link(node), "up")

    def __enter__(self) -> Self:
        if reason := lacking():
            raise NamespaceError(reason)
        _remove_left_behind()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove()

    # -- how

    def _space(self, node: str = "servers") -> str:
        return f"{self._prefix}-{node}"

    def _link(self, node: str) -> str:
        return f"v{self._numbers[node]}"

    def _make(self) -> None:
        hub = self._space()
        self._make_space(hub)
        _ip("-n", hub, "link", "add", INTERFACE, "type", "bridge", "mcast_snooping", "0")
        self._bring_up(hub, self.servers_address)
        for node in self._numbers:
            space, link = self._space(node), self._link(node)
            self._make_space(space)
            _ip("-n", hub, "link", "add", link, "type", "veth", "peer", "name", INTERFACE, "netns", space)
            _ip("-n", hub, "link", "set", link, "master", INTERFACE, "up")
            self._bring_up(space, self.address(node))
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        _enter_named(hub)

    @staticmethod
    def _make_space(space: str) -> None:
        _ip("netns", "add", space)
        _ip("-n", space, "link", "set", "lo", "up", "multicast", "on")

    @staticmethod
    def _bring_up(space: str, address: str) -> None:
        _ip("-n", space, "address", "add", f"{address}/24", "dev", INTERFACE)
        _ip("-n", space, "link", "set", INTERFACE, "up", "multicast", "on")
        _ip("-n", space, "route", "add", "224.0.0.0/4", "dev", INTERFACE)

    def _remove(self) -> None:
        if self._home is not None:
            _enter(self._home)
            os.close(self._home)
            self._home = None
        for space in _spaces():
            if space.startswith(f"{self._prefix}-"):
                _ip("netns", "delete", space)


class VethPair:
    """Two namespaces joined by a cable (a veth pair): what `left` sends on :data:`INTERFACE` comes in at `right`.

    A context manager: inside it, the thread that entered is in the right namespace, and so are threads and processes that it starts.

    Args:
        name: short.
        queues: receive and transmit queues of each end.

    Attributes:
        left_address, right_address: of the two ends.
    """

    left_address, right_address = "10.78.0.1", "10.78.0.2"

    def __init__(self, name: str, queues: int = 1) -> None:
        self._prefix, self._queues = f"tm-{os.getpid()}-{name}", queues
        self._spaces = {side: f"{self._prefix}-{side}" for side in ("left", "right")}
        self._home: int | None = None

    def command(self, side: str, command: Sequence[str]) -> list[str]:
        """A command that runs in the namespace `left` or `right`, as the same process."""
        return ["ip", "netns", "exec", self._spaces[side], *command]

    @contextmanager
    def inside(self, side: str) -> Iterator[None]:
        """Put the calling thread into a namespace for a while. Raises NamespaceError."""
        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter_named(self._spaces[side])
            yield
        finally:
            _enter(here)
            os.close(here)

    def __enter__(self) -> Self:
        if reason := lacking():
            raise NamespaceError(reason)
        _remove_left_behind()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove()

    def _make(self) -> None:
        for space in self._spaces.values():
            Namespaces._make_space(space)
        left, right, queues = *self._spaces.values(), ("numtxqueues", str(self._queues), "numrxqueues", str(self._queues))
        peer = ("peer", "name", INTERFACE, "netns", right, *queues)
        _ip("-n", left, "link", "add", INTERFACE, *queues, "type", "veth", *peer)
        for space, address in ((left, self.left_address), (right, self.right_address)):
            Namespaces._bring_up(space, address)
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        _enter_named(right)

    def _remove(self) -> None:
        if self._home is not None:
            _enter(self._home)
            os.close(self._home)
            self._home = None
        for space in _spaces():
            if space.startswith(f"{self._prefix}-"):
                _ip("netns", "delete", space)


def _enter_named(space: str) -> None:
    fd = os.open(_NAMED / space, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(fd)
    finally:
        os.close(fd)


def _spaces() -> list[str]:
    return sorted(path.name for path in _NAMED.glob("tm-*-*"))


def _remove_left_behind() -> None:
    for space in _spaces():
        found = re.match(r"tm-(\d+)-", space)
        if found and not Path(f"/proc/{found[1]}").exists():
            _ip("netns", "delete", space)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NamespaceError(f"ip {' '.join(arguments)}: {done.stderr.strip() or f'ended with {done.returncode}'}")


def _enter(fd: int) -> None:
    """Put the calling thread, and those that it starts, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        raise NamespaceError(f"a network namespace cannot be entered: {os.strerror(ctypes.get_errno())}")
