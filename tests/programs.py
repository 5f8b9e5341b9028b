"""Servers' programs that tests need: installed if this host has none, once for all test processes."""

from __future__ import annotations

import fcntl
import functools
import tempfile
from pathlib import Path

import pytest

from tickmesh.ops.servers_install import InstallFailed, install


@functools.cache
def _reason(name: str) -> str:
    """Why a program cannot be had; empty if it is there."""
    with (Path(tempfile.gettempdir()) / "tickmesh-test-programs.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            install([name])
        except InstallFailed as failed:
            return str(failed)
    return ""


def require(name: str) -> None:
    """Have ``consul`` or ``toxiproxy``, or skip the test with the reason."""
    reason = _reason(name)
    if reason:
        pytest.skip(reason)
