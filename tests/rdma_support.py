"""What tests over RDMA share: two devices that reach each other, and which bindings there are."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

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
