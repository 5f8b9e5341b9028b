"""``tickmesh cluster``: a whole cluster on this machine to look at and to break, with a live view of who leads what."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from tickmesh.control.store import StoreError
from tickmesh.ops.local_cluster import LocalCluster, LocalClusterOptions, NodeProcess
from tickmesh.ops.shards_cmd import Shard, opened
from tickmesh.ops.shards_cmd import table as shards_table
from tickmesh.transports.nats import LinkError

EXIT_OK, EXIT_INTERRUPTED = 0, 130
_LOOK_S = 0.3
_LINE_EVERY = 15
Say = Callable[[str], None]


class _Stop(Exception):
    """SIGINT or SIGTERM while the cluster starts."""


def run(options: LocalClusterOptions, say: Say, view: bool = True) -> int:
    """Run a cluster until SIGINT or SIGTERM, then end it in order.

    Returns:
        0; 130 if it was ended before it ran.
    """
    cluster = LocalCluster(options, say)
    with _signals_raise():
        try:
            cluster.start()
        except _Stop:
            say("stopped before it ran")
            return EXIT_INTERRUPTED
    try:
        for line in hints(cluster):
            say(line)
        asyncio.run(_watch(cluster, view))
        say("stopping")
    finally:
        cluster.stop()
    return EXIT_OK


@contextmanager
def temporary_folder(given: Path | None) -> Iterator[Path]:
    """The folder that was given, or one that is gone afterwards."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="tickmesh-cluster-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def _signals_raise() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _Stop

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def hints(cluster: LocalCluster) -> list[str]:
    """What to try, as commands of this very cluster."""
    name, place = cluster.options.name, f"--store {cluster.store_url} --cluster {cluster.options.name}"
    server = cluster.nats.servers[0].url
    node = next(iter(cluster.nodes.values()))
    network = cluster.network
    return [
        f"cluster {name} runs in {cluster.options.folder}; in another terminal:",
        *([f"    {network.enter}        first: the servers' network; then"] if network is not None else []),
        f"    tickmesh subscribe 'tm.{name}.bbo.*' --server {server}",
        f"    tickmesh subscribe 'tm.{name}.signal.pair' --server {server}        a spread of two shards' instruments",
        f"    tickmesh shards {place}",
        f"    tickmesh shards move 0 --to {list(cluster.nodes)[-1]} {place}",
        f"    tickmesh config set processing.calculations.fast.window 20 {place}",
        f"    kill -9 {node.pid}        what {node.name} leads goes on at another node; it is started again here",
        *([f"    {network.cutting(node.name)}        cuts {node.name} off; up instead of down: joins it"] if network is not None else []),
        "Ctrl-C stops everything",
    ]


async def _watch(cluster: LocalCluster, view: bool) -> None:
    """Look until a signal comes; a node that has ended is started again, as systemd would."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    console, looks = Console(), 0
    shown = Live(console=console, refresh_per_second=4) if view and console.is_terminal else contextlib.nullcontext()
    with shown as live:
        async with opened(cluster.place, cluster.nats.url) as at:
            while not stop.is_set():
                for node in cluster.nodes.values():
                    node.start()  # if it has ended
                try:
                    shards, trouble = await at.shards(), ""
                except (StoreError, LinkError) as error:
                    shards, trouble = [], str(error)
                if live is not None:
                    live.update(screen(cluster, shards, trouble))
                elif view and looks % _LINE_EVERY == 0:
                    print(line(cluster, shards, trouble), file=sys.stdout, flush=True)
                looks += 1
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), _LOOK_S)


def screen(cluster: LocalCluster, shards: Sequence[Shard], trouble: str = "") -> Group:
    """Shards and nodes, as they are now."""
    nodes = Table(expand=False)
    for name in ("node", "pid", "leads", "stands by for"):
        nodes.add_column(name)
    for node in cluster.nodes.values():
        nodes.add_row(node.name, str(node.pid or "ended"), _leads(node, shards), _stands_by(node, shards))
    return Group(nodes, trouble or shards_table(shards))


def _leads(node: NodeProcess, shards: Sequence[Shard]) -> str:
    return ", ".join(str(one.shard) for one in shards if one.leader == node.name) or "-"


def _stands_by(node: NodeProcess, shards: Sequence[Shard]) -> str:
    return ", ".join(str(one.shard) for one in shards if node.name in [standby.node for standby in one.standbys]) or "-"


def line(cluster: LocalCluster, shards: Sequence[Shard], trouble: str = "") -> str:
    """The same in one line, for logs and pipes."""
    if trouble:
        return trouble
    led = "  ".join(f"{one.shard}: {one.leader or '-'} ({one.state})" for one in shards)
    return f"{sum(node.running for node in cluster.nodes.values())} nodes   {led}"
