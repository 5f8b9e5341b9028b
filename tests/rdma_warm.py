"""Compile, on the host and for the virtual machine's processor, what the tests over RDMA run there: the emulated one would take minutes.

`make test-rdma` runs it with NUMBA_CPU_NAME set as the machine has it.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import test_rdma_takeover as takeover
from rdma_support import wait_until
from replicas import pair

from tickmesh.node.event import EVENT
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.rdma_source import receiving_loop
from tickmesh.node.release_marks import make_marks, put_mark_now
from tickmesh.node.routing_loop import routing_loop
from tickmesh.ops import bench_rdma
from tickmesh.transports import ring as ring_module
from tickmesh.transports.codecache import load_compiled
from tickmesh.transports.ring import Ring
from tickmesh.transports.toolbox import zeros_aligned
from tickmesh.transports.verbs import WRITE
from tickmesh.transports.verbs_post import make_poster


def main() -> None:
    warm_bench()
    warm_rings()
    load_compiled("tickmesh.transports.rdma", "RDMA channel", print)
    load_compiled("tickmesh.node.rdma_events", "RDMA delivery", print)
    routing_loop(1, print)
    for compiled in (True, False):
        receiving_loop(1, compiled, print)
    warm_takeover()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:  # journals and what carries them
        both = stack.enter_context(pair(Path(folder), 100))
        both.follow()
        both.caught_up()
        both.append(1000)
        both.finish()


def warm_takeover() -> None:
    """What :mod:`test_rdma_takeover` runs in its processes, by TCP."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        node, server = takeover.leading("warm", Path(folder) / "leader", "none")
        stack.callback(node.stop)
        stack.callback(server.stop)
        standby = takeover.standing_by("warm", Path(folder) / "standby", "none", server.address, stack)
        wait_until(lambda: standby.taken > 1000, 60)
        server.stop()
        journal, built = standby.take_over(60)
        stack.callback(built.output.close)
        stack.callback(journal.close)
        takeover.go_on(journal, built)
        takeover.outputs_from(built, 1)


def warm_bench() -> None:
    bench_rdma._post_many(make_poster(), zeros_aligned(2, WRITE), np.int64(1))


def warm_rings() -> None:
    table, ring = InstrumentTable(4), Ring.create(None, 64, EVENT)
    table.intern("A")
    table.let_through(0, ["A"])
    table.lets_through("A")
    reader = ring.reader("warm", start="newest")
    ring.writer.write(np.zeros(3, EVENT))
    reader.read()
    reader.hold_from(2)
    ring.reader("again", start="oldest").close()
    ring.release_dead_readers()
    ring_module._release_stale_now(ring._plain)
    put_mark_now(make_marks(), np.uint64(0), np.uint64(0))
    ring.close()


if __name__ == "__main__":
    main()
