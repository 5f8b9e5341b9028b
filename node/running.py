"""Running a node until it is told to end: by its own file, or by the configuration in its cluster's store."""

from __future__ import annotations

import gc
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tickmesh.control.config import Config
from tickmesh.control.turns import short_turns
from tickmesh.node.following import following
from tickmesh.node.process import Node, Progress
from tickmesh.node.receivers import BlockSourceMaker
from tickmesh.transports import durable
from tickmesh.transports.codecache import CompileStopped


def run_node(
    config: Config,
    *,
    progress: Progress = None,
    ready: Callable[[], None] | None = None,
    generators: Mapping[str, BlockSourceMaker] | None = None,
    targets: Mapping[str, str] | None = None,
    each: Callable[[Node], None] | None = None,
) -> int:
    """Run a node until SIGINT or SIGTERM; returns 0.

    Args:
        config: the node's own file. With a `[store]`, what the store holds is run, and followed.
        progress: told what takes time.
        ready: called when it runs.
        generators, targets: see :class:`Node`.
        each: called ten times a second.

    Raises:
        NodeError and the typed errors of the node's parts.
    """

    def start(chosen: Config, version: int | None) -> Node:
        node = Node(chosen, generators, targets, progress, stop, version)
        gc.collect()
        gc.freeze()  # the compiler's half a million objects stay: to look through them would hold the threads up for a tenth of a second
        durable.warm()
        try:
            node.start(stop)
        except BaseException:
            node.stop()
            raise
        return node

    short_turns()
    with _told_to_end() as stop:
        try:
            if config.store.kind == "none":
                _watch(start(config, None), stop, ready, each)
            else:
                _follow(config, start, stop, progress, ready, each)
        except CompileStopped:
            if progress:
                progress("stopped before the loops were compiled")
    return 0


def _follow(
    own: Config,
    start: Callable[[Config, int | None], Node],
    stop: threading.Event,
    progress: Progress,
    ready: Callable[[], None] | None,
    each: Callable[[Node], None] | None,
) -> None:
    with following(own, start) as followed:
        node = followed.first(stop, told=progress)
        if node is None:
            return
        try:
            _watch(node, stop, ready, each)
        finally:
            followed.stop()


def _watch(node: Node, stop: threading.Event, ready: Callable[[], None] | None, each: Callable[[Node], None] | None) -> None:
    try:
        if ready and not stop.is_set():
            ready()
        node.watch(stop, each)
    finally:
        node.stop()


@contextmanager
def _told_to_end() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set."""
    stop = threading.Event()
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
