"""The router as entry points for Python: sources that are not compiled end to end, whose node runs already when they come.

Generated for a number of shards, so that a helper process compiles it and the running loops are not disturbed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from tickmesh.transports.codecache import load_generated

_ROUTING = """\
# Routing to {shards} shards, called from Python. Generated.
import numpy as np

from tickmesh.node.event import EVENT
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.router import make_router, route, route_silence
from tickmesh.transports.ring import HEADER_BYTES, RingArrays
from tickmesh.transports.toolbox import loop


@loop
def route_now(router, batch, first, count):
    return route(router, batch, first, count)


@loop
def route_silence_now(router):
    return route_silence(router)


def warm():
    ring = RingArrays(np.zeros(HEADER_BYTES // 8, np.uint64), np.zeros(8, EVENT))
    router = make_router((ring,) * {shards}, InstrumentTable(1).arrays.records, np.ones(1, np.int64), 0, 0)
    route_now(router, np.zeros(1, EVENT), 0, 0)
    route_silence_now(router)
"""


def routing_loop(shards: int, progress: Callable[[str], None] | None = None) -> ModuleType:
    """The module with ``route_now(router, batch, first, count)`` and ``route_silence_now(router)`` (:mod:`tickmesh.node.router`) for a
    router of `shards` rings."""
    return load_generated("routing", _ROUTING.format(shards=shards), progress)
