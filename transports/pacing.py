"""Pacing: when the next event of a recording is due, at recorded speed, a multiple of it, or as fast as possible.

The schedule is absolute (start of the run + recorded distance), so waits that end late never add up: a pace does not drift.
A recorded gap longer than `max_wait_ms` is shortened to it, so that a night between two sessions does not stall a replay.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tickmesh.transports.toolbox import inlined

PACE = np.dtype(
    [
        ("factor", "<f8"),
        ("max_wait_ns", "<i8"),
        ("origin_ns", "<i8"),
        ("started_at_ns", "<i8"),
        ("last_ns", "<i8"),
        ("shortened_ns", "<i8"),
        ("shortened", "<i8"),
        ("started", "<i8"),
    ]
)
"""State of a pace (array of one). `factor` 0 = no waiting; `origin_ns` in recorded time belongs to `started_at_ns` of the clock;
`shortened` gaps of `shortened_ns` recorded nanoseconds in all were cut to `max_wait_ns`."""


@inlined
def due(pace: Any, ts_ns: Any, now_ns: Any) -> Any:
    """How long to wait before the event of recorded time `ts_ns`, in ns (i64); 0 if it is due.

    May be asked again for the same event. `now_ns` is of the monotonic clock. An event before the last one is due at once.
    """
    state = pace[0]
    factor = state["factor"]
    if factor == 0.0:
        return np.int64(0)
    if state["started"] == 0:
        state["started"], state["origin_ns"], state["started_at_ns"], state["last_ns"] = 1, ts_ns, now_ns, ts_ns
    gap_ns = ts_ns - state["last_ns"]
    if gap_ns > 0:
        allowed_ns = np.int64(min(float(state["max_wait_ns"]) * factor, 9e18))
        if gap_ns > allowed_ns:
            state["origin_ns"] += gap_ns - allowed_ns
            state["shortened_ns"] += gap_ns - allowed_ns
            state["shortened"] += 1
        state["last_ns"] = ts_ns
    due_ns = state["started_at_ns"] + np.int64((ts_ns - state["origin_ns"]) / factor)
    return np.int64(max(due_ns - now_ns, 0))


class PaceError(ValueError):
    """A speed that is not one. `speed` is what was given."""

    def __init__(self, speed: object) -> None:
        super().__init__(f"speed {speed!r} is not one: use 'max', 'realtime' or a factor above 0, such as 10 (ten times recorded speed)")
        self.speed = speed


class Pace:
    """Tells how long to wait before each event of a recording.

    Args:
        speed: ``"max"`` (never wait), ``"realtime"``, or a factor (2.0 = twice recorded speed).
        max_wait_ms: longest wait between two events.
        clock: monotonic clock in ns.
        sleep: sleeps that many seconds.

    Raises:
        PaceError: the speed is none of these.
    """

    def __init__(
        self,
        speed: Literal["max", "realtime"] | float | str,
        *,
        max_wait_ms: int = 60_000,
        clock: Callable[[], int] = time.monotonic_ns,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.state: npt.NDArray[np.void] = np.zeros(1, PACE)
        """For :func:`due` in a compiled loop."""
        self.state["factor"] = _factor(speed)
        self.state["max_wait_ns"] = max_wait_ms * 1_000_000
        self._clock, self._sleep = clock, sleep

    def wait_ns(self, ts_ns: int) -> int:
        """Nanoseconds to wait before the event recorded at `ts_ns`; 0 if it is due."""
        return int(due.py_func(self.state, ts_ns, self._clock()))

    def sleep(self, ts_ns: int) -> None:
        """Block until the event recorded at `ts_ns` is due."""
        while wait_ns := self.wait_ns(ts_ns):
            self._sleep(wait_ns / 1e9)

    async def wait(self, ts_ns: int) -> None:
        """The same for coroutines."""
        while wait_ns := self.wait_ns(ts_ns):
            await asyncio.sleep(wait_ns / 1e9)

    @property
    def shortened(self) -> tuple[int, int]:
        """How many gaps were shortened, and by how many recorded nanoseconds in all."""
        return int(self.state["shortened"][0]), int(self.state["shortened_ns"][0])


def _factor(speed: object) -> float:
    if speed in ("max", "realtime"):
        return 0.0 if speed == "max" else 1.0
    try:
        factor = float(speed)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise PaceError(speed) from None
    if not 0.0 < factor < float("inf"):
        raise PaceError(speed)
    return factor
