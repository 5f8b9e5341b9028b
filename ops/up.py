"""`tickmesh up`: everything on this host. Embedded nats-server, node, feed, and a live view of what comes out."""

from __future__ import annotations

import datetime
import fcntl
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tickmesh.control.config import Config, Source, parse_config
from tickmesh.control.config import load_config as load
from tickmesh.node.config_checks import config_checks
from tickmesh.node.errors import NodeError
from tickmesh.node.event import NO_PRICE, price_text
from tickmesh.node.process import Node
from tickmesh.node.receivers import BlockSourceMaker
from tickmesh.node.summary import quantity_text
from tickmesh.ops.capture_kind import capture_settings
from tickmesh.ops.servers import NatsServer, NatsServerOptions
from tickmesh.ops.simulator import Simulator, SimulatorConfig
from tickmesh.transports.codecache import CompileStopped, load_compiled

Progress = Callable[[str], None] | None
_ROWS_MAX = 16
_DEMO_SYMBOLS = 8
_DEMO_RATE = 2000


def simulator_of(options: Source, progress: Progress = None) -> Simulator:
    """The market simulator that a `type = "simulator"` source describes."""
    load_compiled("tickmesh.ops.simulator", "market simulator", progress)
    return Simulator(
        SimulatorConfig(
            seed=options.seed,
            symbols=len(options.symbols),
            rate=int(options.rate),
            messages=options.messages_max or None,
            names=tuple(options.symbols),
        )
    )


GENERATORS: Mapping[str, BlockSourceMaker] = {"simulator": simulator_of}
"""In-process sources that `up` and `node run` offer to a node."""


# ---------------------------------------------------------------- configuration


def demo_config(captures: Sequence[Path], data_dir: Path, port: int | None = None) -> Config:
    """The demonstration's configuration: recordings at their own pace, or a simulated market.

    Raises:
        UnknownCapture: a recording is not recognised.
        ConfigError: never, unless the shipped file is damaged.
    """
    text = (resources.files("tickmesh.ops") / "demo.toml").read_text()
    if port is not None:
        text = text.replace("port = 4222", f"port = {port}")
    text = text.replace('idle = "sleep"', f'idle = "sleep"\ndata_dir = {_quoted(data_dir.absolute())}')
    text += _capture_sources(captures) if captures else _simulated_source()
    return parse_config(text, "demonstration")


def _simulated_source() -> str:
    from tickmesh.ops.simulator import symbol_names

    names = ", ".join(f'"{name}"' for name in symbol_names(_DEMO_SYMBOLS))
    today = datetime.date.today().isoformat()
    return f'\n[data_sources.market]\ntype = "simulator"\nsymbols = [{names}]\nrate = {_DEMO_RATE}\npace = "realtime"\ndate = "{today}"\n'


def _capture_sources(captures: Sequence[Path]) -> str:
    groups: dict[tuple[tuple[str, object], ...], list[Path]] = {}
    for path in captures:
        groups.setdefault(tuple(sorted(capture_settings(path).items())), []).append(path.resolve())
    text = ""
    for number, (settings, paths) in enumerate(groups.items()):
        text += f"\n[data_sources.capture{number or ''}]\npace = \"realtime\"\npath = [{', '.join(_quoted(p) for p in paths)}]\n"
        text += "".join(f'{name} = "{value}"\n' for name, value in settings)
    return text


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


# ---------------------------------------------------------------- embedded servers


@contextmanager
def embedded_servers(config: Config) -> Iterator[dict[str, str]]:
    """Start the nats-server of every delivery that embeds one; gives the address by delivery name, and stops them at the end.

    Raises:
        ServerError: one cannot start; the message says what to do.
    """
    with ExitStack() as stack:
        addresses = {}
        for name, delivery in config.delivery.items():
            if delivery.method == "nats" and delivery.embedded:
                options = NatsServerOptions(config.cluster.data_path / "nats", port=delivery.port)
                addresses[name] = stack.enter_context(NatsServer(options)).url
        yield addresses


# ---------------------------------------------------------------- running


def up(
    captures: Sequence[Path],
    config_path: Path | None = None,
    *,
    port: int | None = None,
    data_dir: Path | None = None,
    progress: Progress = None,
) -> int:
    """Run everything until Ctrl-C or SIGTERM; returns 0.

    Args:
        captures: recordings to play; none: the simulator. Only without `config_path`.
        config_path: a configuration of one's own.
        port: of the embedded server (demonstration only); 0: any free one.
        data_dir: of the demonstration; made anew each time.
        progress: told what is being started.
    """
    if config_path is not None:
        return run(load(config_path, config_checks(config_path.parent)), progress)
    folder = data_dir or Path.home() / ".local" / "share" / "tickmesh" / "demo"
    config = demo_config(captures, folder, port)
    if data_dir is not None:
        _require_ours(data_dir)
    with _own_folder(folder):
        return run(config, progress)


def _lock_path(folder: Path) -> Path:
    return folder.absolute().with_name(folder.absolute().name + ".lock")


def _require_ours(folder: Path) -> None:
    """Refuse to empty a folder that a demonstration has not made."""
    if folder.exists() and not _lock_path(folder).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise NodeError(f"{folder} was not made by a demonstration, which would empty it: name a folder that is new or empty")


@contextmanager
def _own_folder(folder: Path) -> Iterator[None]:
    """Make the demonstration's folder anew and keep it to ourselves.

    Raises:
        NodeError: another demonstration uses it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock_path(folder).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NodeError(f"another demonstration runs in {folder}: stop it first, or use --data-dir and --port 0") from None
        shutil.rmtree(folder, ignore_errors=True)
        yield


def run(config: Config, progress: Progress = None, view: bool = True) -> int:
    """Run a node of this configuration with its embedded servers until SIGINT or SIGTERM; returns 0."""
    stop = threading.Event()
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with embedded_servers(config) as addresses:
            for name, address in addresses.items():
                _tell(progress, f"nats-server of delivery {name}: {address}")
            node = Node(config, GENERATORS, addresses, progress, stop)
            try:
                node.start(stop)
                _greet(config, addresses, progress)
                _watch(node, stop, view)
            finally:
                _tell(progress, "stopping")
                node.stop()
    except CompileStopped:
        _tell(progress, "stopped before the loops were compiled")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def _tell(progress: Progress, text: str) -> None:
    if progress:
        progress(text)


def _greet(config: Config, addresses: Mapping[str, str], progress: Progress) -> None:
    name = config.cluster.name
    address = next(iter(addresses.values()), None)
    server = f" --server {address}" if address and not address.endswith(":4222") else ""
    _tell(progress, f"node {config.cluster.node} of cluster {name} runs; in another terminal:")
    _tell(progress, f"    tickmesh subscribe 'tm.{name}.bbo.*'{server}        best bids and offers as they change")
    _tell(progress, f"    tickmesh subscribe 'tm.{name}.signal.*'{server}     what the calculations make of them")
    _tell(progress, "    tickmesh status        counters and latencies of this node")
    _tell(progress, "Ctrl-C stops everything")


def _watch(node: Node, stop: threading.Event, view: bool) -> None:
    """Watch the node; on a terminal with a live table, elsewhere with a line every few seconds."""
    console = Console()
    if view and console.is_terminal:
        with Live(_table(node), console=console, refresh_per_second=4, transient=False) as live:
            node.watch(stop, lambda n: live.update(_table(n)))
        return
    lines = _Lines(sys.stdout if view else None)
    node.watch(stop, lines)


class _Lines:
    """One line about the node every few seconds, for logs and pipes; and one when the recordings have ended."""

    _EVERY = 20

    def __init__(self, file: Any) -> None:
        self._file, self._calls, self._ended = file, 0, False

    def __call__(self, node: Node) -> None:
        self._calls += 1
        if self._file is None:
            return
        if node.finished and not self._ended:
            self._ended = True
            print(summary_line(node), file=self._file)
            print("the recording has ended; books and streams stay as they are until Ctrl-C", file=self._file, flush=True)
        elif self._calls % self._EVERY == 0 and not self._ended:
            print(summary_line(node), file=self._file, flush=True)


def summary_line(node: Node) -> str:
    """What the node has done so far, and the best prices of its most active instruments, in one line."""
    events = sum(int(s.shard.arrays.core["events"][0]) for s in node.shards)
    outputs = sum(int(s.shard.arrays.core["out_seq"][0]) for s in node.shards)
    best = "  ".join(f"{row[0]} {row[1] or '-'}/{row[3] or '-'}" for row in rows(node)[:4])
    return f"{events:,} events in, {outputs:,} outputs   {best}"


def rows(node: Node) -> list[tuple[str, str | None, str, str | None, str, str, str]]:
    """Per instrument: symbol, bid, quantity, ask, quantity, trades, signals; the most traded first."""
    found = []
    for thread in node.shards:
        shard = thread.shard
        for i in shard.seen_instruments():
            statistics = shard.arrays.statistics[i]
            if not statistics["bbo_updates"] and not statistics["trades"]:
                continue
            exponent = int(shard.arrays.info[i]["exponent"])
            bid, bid_qty, ask, ask_qty = (int(v) for v in statistics["last_bbo"])
            signals = "  ".join(f"{name} {value:.6g}" for name, value in shard.last_signals(i).items())
            sizes = ["" if price == NO_PRICE else quantity_text(qty, exponent) for price, qty in ((bid, bid_qty), (ask, ask_qty))]
            row = (shard.symbol(i), price_text(bid), sizes[0], price_text(ask), sizes[1], f"{int(statistics['trades']):,}", signals)
            found.append((int(statistics["trades"]), row))
    return [row for _, row in sorted(found, key=lambda pair: -pair[0])]


def _table(node: Node) -> Table:
    table = Table(title=f"{summary_line(node).split('   ')[0]}{'   (the recording has ended)' if node.finished else ''}", expand=False)
    for name in ("symbol", "bid", "qty", "ask", "qty", "trades", "signals"):
        table.add_column(name, justify="left" if name in ("symbol", "signals") else "right")
    for row in rows(node)[:_ROWS_MAX]:
        table.add_row(*(cell or "-" for cell in row))
    return table
