"""How the threads of a node take turns in Python: short ones, so that heartbeats and acknowledgements do not wait for whoever is busy, but
long ones while something is done that a cluster waits for. Compiled loops take no part in this: they run without the interpreter's lock.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator

_SHORT_S = 0.0005
_LONG_S = 0.01
"""A few milliseconds of work come in one piece; among ten threads with something to do each they would take ten times as long."""


class _Turns:
    """`undisturbed` counts who asks for long turns; `usual_s` is what holds otherwise."""

    def __init__(self) -> None:
        self.lock, self.undisturbed, self.usual_s = threading.Lock(), 0, sys.getswitchinterval()

    def set(self) -> None:
        sys.setswitchinterval(_LONG_S if self.undisturbed > 0 else self.usual_s)

    @contextlib.contextmanager
    def asked(self, more: int) -> Iterator[None]:
        """So many more, or fewer, want long turns meanwhile."""
        with self.lock:
            self.undisturbed += more
            self.set()
        try:
            yield
        finally:
            with self.lock:
                self.undisturbed -= more
                self.set()


_turns = _Turns()


def short_turns() -> None:
    """From now on in this process: a thread lets another one go on after half a millisecond, not after Python's 5 ms."""
    with _turns.lock:
        _turns.usual_s = _SHORT_S
        _turns.set()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Others get their turn when we wait for something, or after 10 ms. From several threads at a time is fine."""
    with _turns.asked(1):
        yield


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Inside :func:`undisturbed`: what is waited for may need other threads of ours, which take their usual turns meanwhile."""
    with _turns.asked(-1):
        yield
