"""Who may change a running node: a change of the configuration alone, changes of shards' roles beside each other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ChangeInTheWay(Exception):
    """A change of the configuration has been under way for so long that a role could not change beside it."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"a change of the configuration is under way for more than {limit_s:g} s: some shard of this node waits")


class Changing:
    """A lock with two ways in: any number of :meth:`role` at a time, or one :meth:`configuration`, which waits for those."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._roles = 0
        self._configuration = False

    @contextmanager
    def role(self, limit_s: float | None = None) -> Iterator[None]:
        """While a shard's role changes.

        Raises:
            ChangeInTheWay: a change of the configuration did not end within the limit.
        """
        with self._condition:
            if not self._condition.wait_for(lambda: not self._configuration, limit_s):
                assert limit_s is not None
                raise ChangeInTheWay(limit_s)
            self._roles += 1
        try:
            yield
        finally:
            with self._condition:
                self._roles -= 1
                self._condition.notify_all()

    @contextmanager
    def configuration(self) -> Iterator[None]:
        """While another configuration is carried out."""
        with self._condition:
            self._condition.wait_for(lambda: not self._configuration)
            self._configuration = True  # no role begins to change from now on
            self._condition.wait_for(lambda: self._roles == 0)
        try:
            yield
        finally:
            with self._condition:
                self._configuration = False
                self._condition.notify_all()
