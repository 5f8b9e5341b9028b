"""A whole cluster on this machine: servers, nodes as processes of their own, and a simulated market on multicast over loopback.

    with LocalCluster(LocalClusterOptions(folder, store="consul")) as cluster:
        asyncio.run(cluster.whole())              # every shard is led, and has its standbys
        cluster.nodes["n1"].kill()

What `tickmesh cluster` and the chaos scenarios run. Everything is on free ports and in one folder; nothing outlives the process that
started it.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from tickmesh.control.config import StoreSettings
from tickmesh.control.store import StoreError
from tickmesh.ops.config_store_cmd import Place, Wish, apply_file
from tickmesh.ops.namespaces import INTERFACE, Namespaces
from tickmesh.ops.server_clusters import HOST, ConsulCluster, NatsCluster
from tickmesh.ops.servers import die_with
from tickmesh.ops.shards_cmd import Shard, opened
from tickmesh.ops.simulator import symbol_names
from tickmesh.transports.nats import LinkError
from tickmesh.transports.ring import SHM_FOLDER

_STOP_S, _ASK_AGAIN_S = 30.0, 0.2
_LOG_TAIL_BYTES = 2000
_TOKEN = "TICKMESH_REPLICATION_TOKEN"


class NotWhole(Exception):
    """The cluster did not come to what was waited for.

    Attributes:
        missing: what it lacks.
    """

    def __init__(self, limit_s: float, missing: str, hint: str) -> None:
        super().__init__(f"the cluster is not whole after {limit_s:.0f} s: {missing}; {hint}")
        self.missing = missing


class NodeEnded(Exception):
    """A node has ended by itself.

    Attributes:
        node: its name.
        log: path of its log.
    """

    def __init__(self, node: str, code: int, log: Path) -> None:
        tail = log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace") if log.exists() else ""
        super().__init__(f"node {node} has ended with {code}; its log {log} ends with:\n{tail}")
        self.node, self.log = node, log


@dataclass(frozen=True)
class LocalClusterOptions:
    """What is started.

    Attributes:
        folder: for everything; made if absent.
        name: of the cluster.
        store: ``nats``: a bucket on the nats-servers; ``consul``: three Consul servers.
        nodes, shards, replicas: how many; of replicas, per shard.
        nats_servers: 3, or 1.
        stream_replicas: servers that keep each output stream, at most `nats_servers`.
        rate: messages per second of the simulated market.
        symbols: instruments of it.
        seed: of it.
        suspect_ms: silence after which a node is taken for dead; on a host that is busy with other things, more.
        balance_after_s: how long a node leads more than its share before it passes a shard on; 0: for ever.
        per_event: kinds of output that also go out as one message each.
        extra: further TOML for the cluster's configuration.
        namespaces: each node in a network namespace of its own (:mod:`tickmesh.ops.namespaces`), whose link can be cut.
    """

    folder: Path
    name: str = "mesh"
    store: Literal["nats", "consul"] = "nats"
    nodes: int = 3
    shards: int = 4
    replicas: int = 2
    nats_servers: int = 3
    stream_replicas: int = 3
    rate: int = 1000
    symbols: int = 16
    seed: int = 1
    suspect_ms: float = 100.0
    balance_after_s: float = 10.0
    per_event: tuple[str, ...] = ("bbo", "trade", "signal", "alert", "bar", "status")
    extra: str = ""
    namespaces: bool = False


class NodeProcess:
    """A node as a process: `tickmesh node run` with a file of its own.

    Attributes:
        name: of the node.
        data_dir: its data.
        log: path of its log; restarts append.
        paused: it has been stopped by :meth:`pause`.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        own: str,
        environment: Mapping[str, str],
        within: Callable[[Sequence[str]], Sequence[str]] = lambda command: command,
    ) -> None:
        self.name, self.data_dir, self.log, self.paused = name, folder / "data", folder / "node.log", False
        self._file, self._environment, self._within = folder / "own.toml", dict(environment), within
        folder.mkdir(parents=True, exist_ok=True)
        self._file.write_text(own)
        self._process: subprocess.Popen[bytes] | None = None
        self._told = False

    @property
    def ending(self) -> bool:
        """Whether it has been asked to end, and still runs."""
        return self._told and self.running

    @property
    def pid(self) -> int:
        """Process id; 0 when it does not run."""
        return self._process.pid if self._process is not None and self.running else 0

    @property
    def running(self) -> bool:
        """Whether the process is there, paused or not."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Of the last process, once it has ended."""
        return self._process.poll() if self._process is not None else None

    def start(self) -> None:
        """Start it, in the thread that is to outlive it. It is not waited for."""
        if self.running:
            return
        command = self._within([sys.executable, "-m", "tickmesh.ops.cli", "node", "run", "--config", str(self._file)])
        self._process, self.paused, self._told = _child(command, self.log, self._environment), False, False

    def kill(self) -> None:
        """SIGKILL, as a crash would; the rest of what it held in shared memory stays, as after a crash."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        self.paused = False

    def pause(self) -> None:
        """SIGSTOP: it hangs."""
        self._signal(signal.SIGSTOP)
        self.paused = True

    def resume(self) -> None:
        """SIGCONT: it goes on and knows of nothing."""
        self._signal(signal.SIGCONT)
        self.paused = False

    def terminate(self) -> None:
        """SIGTERM: it is asked to end, and hands over what it leads. Not waited for."""
        self._told = True
        self._signal(signal.SIGTERM)

    def stop(self, limit_s: float = _STOP_S) -> None:
        """Ask it to end, wait, and kill it if it does not."""
        if self._process is None:
            return
        if self.paused:
            self.resume()
        self.terminate()
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)  # does nothing once it has ended


def _child(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A process that does not see Ctrl-C, and does not outlive the thread that makes it."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=die_with(os.getpid(), signal.SIGKILL),
        )


@dataclass
class LocalCluster:
    """The cluster. A context manager, or :meth:`start` and :meth:`stop`, both in the main thread.

    Attributes:
        options: what is started.
        nats: its nats-servers.
        consul: its Consul servers; None: the store is a bucket.
        network: the nodes' namespaces; None: all are on this host's loopback.
        nodes: by name, ``n1`` and so on.
        endpoint: of the multicast feed.
    """

    options: LocalClusterOptions
    progress: Callable[[str], None] | None = None
    nats: NatsCluster = field(init=False)
    consul: ConsulCluster | None = field(init=False, default=None)
    network: Namespaces | None = field(init=False, default=None)
    nodes: dict[str, NodeProcess] = field(init=False, default_factory=dict)
    endpoint: str = field(init=False, default_factory=lambda: free_endpoint())
    _secret: dict[str, str] = field(init=False, default_factory=lambda: {_TOKEN: secrets.token_hex(16)})
    _stack: ExitStack = field(init=False, default_factory=ExitStack)
    _feed: subprocess.Popen[bytes] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        options = self.options
        options.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if options.namespaces:
            self.network = Namespaces(options.name, [f"n{number + 1}" for number in range(options.nodes)])
        if self.network is None:
            self._make_servers(HOST)

    def _make_servers(self, host: str) -> None:
        """Not before there is a network for them: they look for free ports."""
        folder = self.options.folder / "servers"
        self.nats = NatsCluster(folder, self.options.nats_servers, host)
        if self.options.store == "consul":
            self.consul = ConsulCluster(folder, host=host)

    # -- starting and stopping

    def start(self) -> Self:
        """Start servers and nodes, give the nodes their configuration, and start the feed once every shard is led; that may compile first.

        Raises:
            ServerError: a server cannot run.
            NotWhole, NodeEnded: the nodes do not come up; nothing is left running.
        """
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self) -> None:
        self._tell("starting the servers")
        self._stack.callback(self._sweep)
        if self.network is not None:
            self._stack.enter_context(self.network)
            self._make_servers(self.network.servers_address)
        self._stack.enter_context(self.nats)
        if self.consul is not None:
            self._stack.enter_context(self.consul)
        self._stack.callback(self._stop_nodes)
        self._configure()
        self._tell("starting the nodes; the first time their loops are compiled, which takes a minute or two")
        for number in range(self.options.nodes):
            self._add_node(f"n{number + 1}", number).start()
        asyncio.run(self.whole(600.0))
        self.start_feed()

    def stop(self) -> None:
        """Stop everything, the nodes in order; leaves data and logs."""
        self._stack.close()

    def start_feed(self) -> None:
        """Start the simulated market, from its first message."""
        o = self.options
        command = [
            *(sys.executable, "-m", "tickmesh.ops.cli", "simulate", "--json", "--multicast", self.endpoint, "--interface", self._interface),
            *("--rate", str(o.rate), "--symbols", str(o.symbols), "--seed", str(o.seed)),
        ]
        self._feed = _child(command, o.folder / "feed.log", environment())
        self._stack.callback(self.stop_feed)

    def stop_feed(self) -> None:
        """End the market."""
        if self._feed is not None:
            self._feed.terminate()
            self._feed.wait()
            self._feed = None

    def _stop_nodes(self) -> None:
        for node in self.nodes.values():
            if node.paused:
                node.resume()
            node.terminate()  # all of them first: each waits for a successor that is ready
        for node in self.nodes.values():
            node.stop()

    def _sweep(self) -> None:
        """What nodes that were killed have left in shared memory."""
        for node in self.nodes:
            for pattern in (f"tickmesh-{self.options.name}.{node}.*", f"tickmesh-{self.options.name}-{node}-*"):
                for path in SHM_FOLDER.glob(pattern):
                    path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _tell(self, text: str) -> None:
        if self.progress:
            self.progress(text)

    # -- configuration

    @property
    def _interface(self) -> str:
        """That carries the feed."""
        return INTERFACE if self.network is not None else "lo"

    def store_address(self, number: int = 0) -> str:
        """Of the store, as node `number` has it: each its own Consul server, as a host has its own agent."""
        return self.consul.address(number) if self.consul is not None else self.nats.url

    @property
    def store_url(self) -> str:
        """As ``--store`` takes it."""
        return f"consul://{self.store_address()}" if self.consul is not None else self.nats.url

    @property
    def place(self) -> Place:
        """The cluster's store and name, for what the commands do."""
        o = self.options
        settings: dict[str, object] = {"kind": o.store, "address": self.store_address(), **self._bucket()}
        return Place(StoreSettings.model_validate(settings), o.name)

    def _bucket(self) -> dict[str, int]:
        return {} if self.consul is not None else {"replicas": self.options.nats_servers}

    def _configure(self) -> None:
        """The cluster's configuration is in the store before its nodes start."""
        file = self.options.folder / "cluster.toml"
        file.write_text(self.configuration())
        asyncio.run(apply_file(file, self.place, Wish("the local cluster", timeout_s=1.0), lambda _: None))

    def configuration(self) -> str:
        """The cluster's configuration: the feed, what the demonstration computes, and one stream per shard."""
        o = self.options
        demo = (resources.files("tickmesh.ops") / "demo.toml").read_text()
        processing = demo[demo.index("[processing]") : demo.index("[delivery.")]
        symbols = symbol_names(o.symbols)
        placed = ", ".join(f"{symbol} = {number % o.shards}" for number, symbol in enumerate(symbols))
        processing = processing.replace("[processing]\n", "[processing]\ntimer_interval_ms = 10\n", 1)
        return f"""[cluster]
name = "{o.name}"
shards = {o.shards}
replicas = {o.replicas}
instruments_max = 1024
orders_max = 65536
shard_overrides = {{ {placed} }}   # evenly: by their names, a few symbols would not be

[leadership]
enabled = true
suspect_ms = {o.suspect_ms}
balance_after_s = {o.balance_after_s}

[journal]
segment_mb = 4

[replication]
acks = 1
timeout_ms = {5 * o.suspect_ms}
{f'token_env = "{_TOKEN}"' if self.network is not None else ""}
solo_after_ms = {10 * o.suspect_ms}

[data_sources.market]
type = "multicast"
endpoint = "{self.endpoint}"
interface = "{self._interface}"
data_format = "itch50"
framing = "moldudp64"

{processing}
[processing.calculations.pair]   # over two shards
use = "spread"
inputs = ["bbo:{symbols[0]}", "bbo:{symbols[1 % len(symbols)]}"]

[processing.calculations.all]   # over all of them
use = "basket"
inputs = {json.dumps([f"bbo:{symbol}" for symbol in symbols[: max(4, o.shards)]])}

[delivery.events]
method = "nats"
target = "{self.nats.url}"
replicas = {o.stream_replicas}
per_event = {json.dumps(o.per_event)}
{o.extra}"""

    def _add_node(self, name: str, number: int) -> NodeProcess:
        o, folder = self.options, self.options.folder / name
        address = f'address = "{self.network.address(name)}"\n' if self.network is not None else ""
        replicas = "".join(f"{key} = {value}\n" for key, value in self._bucket().items())
        own = (
            f'[cluster]\nname = "{o.name}"\nnode = "{name}"\nidle = "sleep"\ndata_dir = "{folder.absolute() / "data"}"\n{address}'
            f'[store]\nkind = "{o.store}"\naddress = "{self.store_address(number)}"\n{replicas}'
        )
        network = self.network
        within = partial(network.command, name) if network is not None else list
        self.nodes[name] = NodeProcess(name, folder, own, environment() | self.nats.system.environment | self._secret, within)
        return self.nodes[name]

    # -- looking

    async def shards(self) -> list[Shard]:
        """How every shard stands now. Raises StoreError, LinkError."""
        async with opened(self.place, self.nats.url) as cluster:
            return await cluster.shards()

    async def whole(self, limit_s: float = 60.0) -> list[Shard]:
        """Wait until every shard is led and has all its standbys ready.

        Raises:
            NotWhole: it is not in time.
            NodeEnded: a node has ended that was not killed.
        """
        end = time.monotonic() + limit_s
        while True:
            try:
                return await self._wait_whole(end, limit_s)
            except (StoreError, LinkError) as error:  # of a server that has just come back, say: the others may answer
                if time.monotonic() > end:
                    raise NotWhole(limit_s, str(error), f"see the logs in {self.options.folder}") from error
                await asyncio.sleep(_ASK_AGAIN_S)

    async def _wait_whole(self, end: float, limit_s: float) -> list[Shard]:
        standbys = min(self.options.replicas, self.options.nodes) - 1
        async with opened(self.place, self.nats.url) as cluster:
            while True:
                self._check_nodes()
                shards = await cluster.shards(0.1)
                missing = [reason for one in shards if (reason := _lack(one, standbys))]
                if not missing and len(shards) == self.options.shards:
                    return shards
                if time.monotonic() > end:
                    raise NotWhole(limit_s, "; ".join(missing) or "not all shards are known", f"see the logs in {self.options.folder}")

    def _check_nodes(self) -> None:
        for node in self.nodes.values():
            if node.exit_code is not None and node.exit_code >= 0:  # below 0: a signal, and that was ours
                raise NodeEnded(node.name, node.exit_code, node.log)


def _lack(shard: Shard, standbys: int) -> str:
    """What keeps a shard from being whole; empty: nothing."""
    ready = sum(one.ready for one in shard.standbys)
    if shard.state != "led":
        return f"shard {shard.shard}: {shard.state}"
    return "" if ready >= standbys else f"shard {shard.shard}: {ready} of {standbys} standbys are ready"


def environment() -> dict[str, str]:
    """Our environment without logins: the cluster's own servers want none."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("TICKMESH_NATS_", "TICKMESH_CONSUL_T"))}


def free_endpoint() -> str:
    """A multicast endpoint that nobody else is likely to use."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return f"udp://239.{77 + secrets.randbelow(100)}.{1 + secrets.randbelow(250)}.{1 + secrets.randbelow(250)}:{port}"
