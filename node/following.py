"""A node that runs what its cluster's configuration in the store says, from the first moment on.

The configuration's follower has a thread and a store of its own; a change is carried out in yet another thread, while the node runs. At the
start the node waits a little for the store: if it does not answer, or what it holds is refused, the node begins with its own file, if that
is a whole configuration, and goes on trying. So a store that is away stops nothing, not even a start.

Versions in a journal only rise. After a canary that was taken back, and after a store that has lost its data, the store's version is not
higher than the journal's: then the change gets the next number there, which the node's status tells as `journal_version`.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import structlog

from tickmesh.control.config import Config
from tickmesh.control.config_store import Documents
from tickmesh.control.follower import ConfigFollower, FollowerOptions, FollowerThread
from tickmesh.node.beginning import BeginningError
from tickmesh.node.config_checks import config_checks
from tickmesh.node.process import Node
from tickmesh.node.reload import ChangeRefused, ChangeUnderWay
from tickmesh.node.store_link import open_store
from tickmesh.node.telemetry import configuration_path

Start = Callable[[Config, int | None], Node]
"""Makes a node of a configuration and its version (None: of the node's own file), and starts it."""
FIRST_WAIT_S = 5.0
_LOOK_S = 0.05
_RETRY_S = 60.0
"""How long a change is tried again that is refused only because another one is under way."""
_Made = TypeVar("_Made")
_log = structlog.get_logger("config")


class Following:
    """Brings a node to the configuration in the store. :meth:`first`, then the node is changed by itself until :meth:`stop`.

    Args:
        own: the node's own file.
        start: makes and starts a node.

    Attributes:
        node: once it runs.
    """

    def __init__(self, own: Config, start: Start) -> None:
        self.own, self._start, self.node = own, start, None
        self._lock = threading.Lock()
        self._begun = threading.Event()
        options = FollowerOptions(own, own.cluster.data_path / "code", config_checks, service={"meta": {"node": own.cluster.node}})
        self._shown = configuration_path(own.cluster.name, own.cluster.node)
        self.follower = ConfigFollower(options, self._apply, self._try_out, facts=self._facts, told=self._show)
        self._thread = FollowerThread(self.follower, partial(open_store, own.store, own.resolve, name=f"tickmesh {own.cluster.node}"))

    node: Node | None

    def first(self, stop: threading.Event, wait_s: float = FIRST_WAIT_S, told: Callable[[str], None] | None = None) -> Node | None:
        """Follow the store, and run what it holds; if it is not there within `wait_s`, what the own file says.

        Returns:
            The running node; None if `stop` was set before there was one.

        Raises:
            NodeError and the typed errors of a node's parts: the own file is a configuration, and cannot be run.
        """
        self._thread.start()
        limit_s = wait_s
        while not stop.is_set():
            if self._begun.wait(_LOOK_S):
                return self.node
            limit_s -= _LOOK_S
            if limit_s > 0:
                continue
            reason = self._reason()
            if self.own.data_sources:
                _log.warning("the node begins with its own file", reason=reason)
                return self._begin(self.own, None)
            if told:
                told(f"waiting for a configuration in the store ({reason})")
            while not stop.is_set() and not self._begun.wait(_LOOK_S):
                pass
        return None

    def _reason(self) -> str:
        refused = self.follower.status["refused"]
        if refused:
            return f"configuration {refused['version']} is refused: {'; '.join(refused['reasons'])}"
        return self._thread.last_error or str(self.follower.status["store"]["reason"]) or "the store holds no configuration"

    def stop(self) -> None:
        """Follow no more; the node is the caller's to stop."""
        self._thread.stop()
        self._shown.unlink(missing_ok=True)

    # -- from the follower

    async def _apply(self, config: Config, version: int, documents: Documents) -> list[str] | None:
        return await _apart(lambda: self._change(config, version))

    async def _try_out(self, config: Config, version: int, documents: Documents) -> list[str] | None:
        return await _apart(lambda: self._trial(config))

    def _change(self, config: Config, version: int) -> list[str] | None:
        with self._lock:
            node = self.node
            if node is None:
                self._begin_locked(config, version)
                return None
        end = time.monotonic() + _RETRY_S
        while True:
            try:
                node.apply(config, max(version, node.version + 1))
            except ChangeRefused as refused:
                if not refused.passing or time.monotonic() > end:
                    return [str(reason) for reason in refused.reasons]
                time.sleep(_LOOK_S)
                continue
            except ChangeUnderWay as waiting:
                _log.warning("a change waits", reason=str(waiting))
            return None

    def _trial(self, config: Config) -> list[str] | None:
        node = self.node
        if node is None:
            return ["the node does not run yet"]
        try:
            node.try_out(config)
        except ChangeRefused as refused:
            return [str(reason) for reason in refused.reasons]
        return None

    def _begin(self, config: Config, version: int | None) -> Node:
        with self._lock:
            return self.node or self._begin_locked(config, version)

    def _begin_locked(self, config: Config, version: int | None) -> Node:
        try:
            self.node = self._start(config, version)
        except BeginningError as error:  # the journal knows later versions, or another one of this number
            _log.warning("the version gets another number in the journal", version=version, reason=str(error))
            self.node = self._start(config, None)
        self.node.expect_changes()
        self._begun.set()
        return self.node

    def _show(self, status: Mapping[str, Any]) -> None:
        """Let `tickmesh status` on this host see it, also while the store is away."""
        temporary = self._shown.with_suffix(".new")
        try:
            temporary.write_text(json.dumps(status), encoding="utf-8")
            temporary.replace(self._shown)
        except OSError as error:
            _log.warning("the configuration's state cannot be shown", reason=str(error))

    def _facts(self) -> Mapping[str, Any]:
        node = self.node
        if node is None:
            return {}
        return {"journal_version": node.version, **({"shards": node.roles.status()} if node.roles else {})}


async def _apart(call: Callable[[], _Made]) -> _Made:
    """Run something that takes time beside the follower's loop."""
    return await asyncio.get_running_loop().run_in_executor(None, call)


@contextmanager
def following(own: Config, start: Start) -> Iterator[Following]:
    """A :class:`Following` that is stopped at the end."""
    made = Following(own, start)
    try:
        yield made
    finally:
        made.stop()
