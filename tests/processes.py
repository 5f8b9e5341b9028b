"""Other processes, held and let go again by signals."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def _states(pid: int) -> set[str]:
    """States of a process's threads as proc(5) names them."""
    return {stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")}


def suspend(pid: int | None, limit_s: float = 10.0) -> None:
    """SIGSTOP, and wait until it is so: a thread on another processor may run on for a while after ``kill`` has returned."""
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + limit_s
    while _states(pid) != {"T"}:
        assert time.monotonic() < end, f"process {pid} does not stop"
        time.sleep(0.001)


def resume(pid: int | None) -> None:
    """SIGCONT."""
    assert pid is not None
    os.kill(pid, signal.SIGCONT)
