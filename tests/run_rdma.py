"""`make test-rdma`: the tests marked `rdma`, on RDMA devices of this host, on one of Soft-RoCE, or in a virtual machine that has two.

Soft-RoCE is taken where this host's kernel has it (Linux 5.3 or newer, root). Where nothing of this is possible the reason is told, and
nothing fails.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from guest import LIBRARIES, Guest, Impossible, bindings, cleaned_up, execute, install, prepare

from tickmesh.transports.verbs import devices

HERE = Path(__file__).resolve().parent
INTERFACE, PEER, DEVICE, ADDRESS = "tickmesh-rdma", "tickmesh-peer", "rxe_tickmesh", "10.77.1.1"
ALONE = "test_rdma_takeover.py"
"""It runs two whole nodes, and takes an emulated processor about as long as all others together."""
_LIMIT_S = 10.0


def main(arguments: list[str]) -> int:
    """Run them, or with ``BENCH=1`` ``tickmesh bench rdma``; the exit code, or 0 with a reason."""
    command = [sys.executable, "-m", *pytest_of(arguments)]
    if os.environ.get("BENCH"):
        command = [sys.executable, "-m", "tickmesh.ops.cli", "bench", "rdma"]
    if found := devices():
        return natively(command, f"this host's devices {', '.join(found)}")
    try:
        with soft_roce():
            return natively(command, "Soft-RoCE of this host's kernel")
    except Impossible as reason:
        print(f"test-rdma: not by this host's kernel: {reason}", flush=True)
    try:
        guest = prepare()
    except Impossible as reason:
        print(f"test-rdma: SKIPPED, nothing was tested: {reason}", flush=True)
        return 0
    warm(guest, command)
    return guest.run(command)


def pytest_of(arguments: list[str]) -> list[str]:
    """Its command. Where no files are named only those that have such tests are read, which takes an emulated processor long enough.

    :data:`ALONE` is run by name only, as CI does.
    """
    options = ["pytest", "-m", "rdma", "-n0", "-p", "no:cacheprovider", *arguments]
    if any(Path(argument.partition("::")[0]).exists() for argument in arguments):
        return options
    return [*options, *(str(path) for path in sorted(HERE.glob("test_*.py")) if path.name != ALONE and "mark.rdma" in path.read_text())]


def natively(command: list[str], where: str) -> int:
    """Run it here, with as many bindings as can be had."""
    try:
        environment = bindings()
    except Impossible as reason:
        environment = {}
        print(f"test-rdma: only the bindings that are installed: {reason}", flush=True)
    print(f"test-rdma: on {where}", flush=True)
    return subprocess.call(command, env=os.environ | environment)


@contextmanager
def soft_roce() -> Iterator[None]:
    """A device of Soft-RoCE over a network interface of its own, which leads nowhere; all is gone afterwards.

    Raises:
        Impossible: this is not root, or the kernel has none.
    """
    if os.geteuid() != 0:
        raise Impossible("Soft-RoCE takes root to set up")
    loaded = Path("/sys/module/rdma_rxe").exists()
    if not loaded:
        execute(["modprobe", "rdma_rxe"])
    with cleaned_up(f"ip link delete {INTERFACE} 2>/dev/null; {'' if loaded else 'modprobe -r rdma_rxe'}"):
        if shutil.which("apt-get"):
            install(LIBRARIES)
        execute(["ip", "link", "add", INTERFACE, "type", "veth", "peer", "name", PEER])
        execute(["ip", "address", "add", f"{ADDRESS}/24", "dev", INTERFACE])
        for name in (INTERFACE, PEER):
            execute(["ip", "link", "set", name, "up"])
        execute(["rdma", "link", "add", DEVICE, "type", "rxe", "netdev", INTERFACE])
        _wait_for_address()
        if DEVICE not in devices():
            raise Impossible("no binding sees its device: libibverbs or its drivers are missing")
        yield


def _wait_for_address() -> None:
    """The kernel gives a device its addresses some time after it is there."""
    wanted, end = "ffff:" + bytes(map(int, ADDRESS.split("."))).hex(":", 2), time.monotonic() + _LIMIT_S
    while time.monotonic() < end:
        for entry in Path(f"/sys/class/infiniband/{DEVICE}/ports/1/gids").glob("*"):
            with contextlib.suppress(OSError):  # entries that are not used cannot be read
                if entry.read_text().strip().endswith(wanted):
                    return
        time.sleep(0.01)
    raise Impossible(f"{DEVICE} has got no address in {_LIMIT_S} s")


def warm(guest: Guest, command: list[str]) -> None:
    """Compile for the machine's processor here, and Python's own code too: the emulated one would take minutes."""
    environment = os.environ | guest.environment | {"LD_LIBRARY_PATH": ""}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run([sys.executable, str(HERE / "rdma_warm.py")], env=environment, check=True)
    if "pytest" in command:
        subprocess.run([*command, "--collect-only"], env=environment, stdout=subprocess.DEVNULL, check=False)  # what is wrong is told there


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
