"""The embedded nats-server: starts, is ready, ends, and says clearly why it cannot run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tickmesh.ops.servers import (
    NatsServer,
    NatsServerOptions,
    PortBusy,
    ServerBinaryMissing,
    ServerFailed,
    StoreFull,
    StoreInUse,
    StoreUnwritable,
    nats_server_binary,
)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, limit_s: float = 10.0) -> bool:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_starts_on_a_free_port_and_ends(tmp_path: Path) -> None:
    with NatsServer(NatsServerOptions(tmp_path)) as server:
        assert server.running
        assert server.port > 0
        assert server.url == f"nats://127.0.0.1:{server.port}"
        assert server.log.exists()
        pid = server.pid
        assert pid is not None
    assert not alive(pid)
    assert server.pid is None


def test_listens_on_loopback_only(tmp_path: Path) -> None:
    with NatsServer(NatsServerOptions(tmp_path)) as server:
        port = f":{server.port:04X}"
        listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"]
        assert [a for a in listening if a.endswith(port)] == [f"0100007F{port}"]
    with pytest.raises(ValueError, match="loopback"):
        NatsServer(NatsServerOptions(tmp_path, host="0.0.0.0"))


def test_restart_keeps_port_and_folder(tmp_path: Path) -> None:
    server = NatsServer(NatsServerOptions(tmp_path)).start()
    port = server.port
    server.kill()
    assert server.start().port == port
    server.stop()
    server.stop()


def test_busy_port(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortBusy) as caught:
            NatsServer(NatsServerOptions(tmp_path, port=port)).start()
    assert caught.value.port == port


def test_folder_in_use(tmp_path: Path) -> None:
    with NatsServer(NatsServerOptions(tmp_path)), pytest.raises(StoreInUse):
        NatsServer(NatsServerOptions(tmp_path)).start()
    with NatsServer(NatsServerOptions(tmp_path)) as again:
        assert again.running


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(StoreUnwritable):
        NatsServer(NatsServerOptions(in_the_way / "data")).start()


def test_read_only_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    if os.geteuid() == 0:  # root may write to any folder, save those of the kernel
        folder = Path("/sys/tickmesh")
    tmp_path.chmod(0o500)
    with pytest.raises(StoreUnwritable) as caught:
        NatsServer(NatsServerOptions(folder)).start()
    assert caught.value.path == folder
    tmp_path.chmod(0o700)


def test_disk_without_room(tmp_path: Path) -> None:
    with pytest.raises(StoreFull) as caught:
        NatsServer(NatsServerOptions(tmp_path, free_bytes_min=1 << 60)).start()
    assert caught.value.needed_bytes == 1 << 60


def test_no_binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TICKMESH_NATS_SERVER", str(tmp_path / "absent"))
    with pytest.raises(ServerBinaryMissing):
        nats_server_binary()


def test_failing_server_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "broken"
    script.write_text("#!/bin/sh\necho no luck today\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setenv("TICKMESH_NATS_SERVER", str(script))
    server = NatsServer(NatsServerOptions(tmp_path / "data"))
    with pytest.raises(ServerFailed, match="no luck today"):
        server.start()
    assert not server.running


_PARENT = """
import sys, time
from pathlib import Path
from tickmesh.ops.servers import NatsServer, NatsServerOptions
server = NatsServer(NatsServerOptions(Path(sys.argv[1]))).start()
print(server.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_dies_with_its_parent(tmp_path: Path, how: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", _PARENT, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.send_signal(how)
    assert wait_for(lambda: not alive(pid))
