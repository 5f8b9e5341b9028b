"""What tests over RDMA share: two devices that reach each other, and which bindings there are."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tickmesh.transports.verbs import Binding, devices, installed

BINDINGS: tuple[Binding, ...] = ("libibverbs", "pyverbs", "ibverbs")
LIMIT_S = 20.0
"""A condition that does not come within this is not coming: Soft-RoCE in an emulated machine is slow."""


@functools.cache
def pair_of_devices() -> tuple[str, str]:
    """Two devices that reach each other: of Soft-RoCE over the two ends of a veth pair, or twice the same one.

    Skips the test if there is none.
    """
    found = devices()
    if not found:
        pytest.skip("there is no RDMA device: `make test-rdma` makes some in a virtual machine")
    return found[0], found[1] if len(found) > 1 else found[0]


def need_binding(binding: Binding) -> None:
    """Skip the test if a binding is not there."""
    if binding not in installed(binding):
        pytest.skip(f"the binding {binding} is not installed: `make test-rdma` brings it")


GUEST_INTERFACES = ("rdma0", "rdma1")
"""The ends of the guest's cable, 10.77.0.1 and 10.77.0.2 (tests/guest/stage2.sh)."""


@contextmanager
def losing(percent: int, *interfaces: str) -> Iterator[None]:
    """Lose packets that leave by the guest's interfaces: RoCE's (UDP port 4791), since TCP between its processes goes by loopback, and
    each end knows the other's hardware address without asking.

    Skips the test elsewhere.
    """
    if os.environ.get("TICKMESH_RDMA_GUEST") != "1" or shutil.which("tc") is None:
        pytest.skip("packets are lost by netem on the veth pair of the virtual machine that `make test-rdma` starts")
    with ExitStack() as stack:
        for i, name in enumerate(GUEST_INTERFACES):
            hardware = Path(f"/sys/class/net/{GUEST_INTERFACES[1 - i]}/address").read_text().strip()
            neighbour = [f"10.77.0.{2 - i}", "lladdr", hardware, "dev", name]
            subprocess.run(["ip", "neigh", "replace", *neighbour, "nud", "permanent"], check=True)
            stack.callback(subprocess.run, ["ip", "neigh", "del", *neighbour], check=True)
        for name in interfaces:
            subprocess.run(["tc", "qdisc", "add", "dev", name, "root", "netem", "loss", f"{percent}%"], check=True)
            stack.callback(subprocess.run, ["tc", "qdisc", "del", "dev", name, "root"], check=True)
        yield


def wait_until(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Wait for a condition.

    Raises:
        TimeoutError: it did not come.
    """
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("a condition has not come")
        time.sleep(0.001)
