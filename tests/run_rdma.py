"""`make test-rdma`: the tests marked `rdma`, on this host's own RDMA devices, or in a virtual machine with Soft-RoCE.

A stock Debian kernel boots in QEMU, without hardware support, in some seconds; its root is the host's own, read-only, below a memory
file system, so that everything has the same paths and nothing that is done there stays. What the host lacks is fetched from Debian by
name and kept in ``~/.cache/tickmesh/rdma-guest``; nothing of the host's kernel or RDMA packages is touched. Where that is not possible
the reason is told, and nothing fails.
"""

from __future__ import annotations

import ctypes
import gzip
import lzma
import os
import re
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = Path("~/.cache/tickmesh/rdma-guest").expanduser()
HOST_PACKAGES = ("qemu-system-x86", "busybox-static", "libibverbs1", "ibverbs-providers", "iproute2")
UNPACKED_PACKAGES = ("python3-pyverbs", "librdmacm1", "libibverbs-dev")
"""Unpacked beside the host's own: installed, they would bring a newer udev with them."""
WHEEL = "ibverbs==2026.10.22"
MODULES = (
    "virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "crc32_generic", "crc32_pclmul", "veth", "sch_netem", "ib_uverbs",
    "rdma_cm", "rdma_ucm", "rdma_rxe",
)  # fmt: skip
MEMORY_MIB, LIMIT_S = 1500, 600
PROCESSOR = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
"""The emulated processor is not the host's: what is compiled for any of the kind runs on both."""
_SIGNATURE = b"~Module signature appended~\n"
_PR_SET_PDEATHSIG = 1


class Impossible(Exception):
    """The tests cannot run here; the message says why."""


def main() -> int:
    """Run them, or with ``BENCH=1`` ``tickmesh bench rdma``; the exit code, or 0 with a reason."""
    tests = ["pytest", "-m", "rdma", "-n0", "-p", "no:cacheprovider", "-o", "timeout=300", *(sys.argv[1:] or [str(HERE)])]
    command = [sys.executable, "-m", *(["tickmesh.ops.cli", "bench", "rdma"] if os.environ.get("BENCH") else tests)]
    sys.path.insert(0, str(HERE))
    from tickmesh.transports.verbs import devices

    found = devices()
    if found:
        print(f"test-rdma: on this host's devices {', '.join(found)}", flush=True)
        return subprocess.call(command)
    try:
        guest = prepare()
    except Impossible as reason:
        print(f"test-rdma: SKIPPED, nothing was tested: {reason}", flush=True)
        return 0
    warm(guest)
    return guest.run(command)


# ---------------------------------------------------------------- what it takes


@dataclass(frozen=True)
class Guest:
    """A virtual machine that can be started.

    Attributes:
        kernel, initramfs: files.
        environment: in it.
    """

    kernel: Path
    initramfs: Path
    environment: dict[str, str]

    def run(self, command: list[str]) -> int:
        """Boot it, run a command, and return its exit code; it ends with this process, however that ends."""
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="tickmesh-guest-") as name:
            job = Path(name)
            shutil.copy(HERE / "guest/stage2.sh", job)
            exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in self.environment.items())
            (job / "job.sh").write_text(f"{exports}cd {shlex.quote(os.getcwd())}\nexec {shlex.join(command)}\n")
            machine = subprocess.Popen(self._command(job), stdin=subprocess.PIPE, preexec_fn=_end_with_parent)  # stdin has to stay open
            try:
                machine.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                print(f"test-rdma: not finished after {LIMIT_S} s", flush=True)
                return 124
            finally:
                machine.kill()
                machine.wait()
            code = job / "exit_code"
            if not code.exists():
                print(f"test-rdma: the machine ended early:\n{(job / 'console.log').read_text(errors='replace')[-4000:]}", flush=True)
                return 125
            print(f"test-rdma: {time.monotonic() - begun:.0f} s with the boot", flush=True)
            return int(code.read_text())

    def _command(self, job: Path) -> list[str]:
        share = "local,security_model=none,multidevs=remap"
        boot = "console=ttyS0 panic=-1 tsc=reliable no_timer_check nokaslr mitigations=off audit=0 random.trust_cpu=on"
        return [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35",
            "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", str(MEMORY_MIB), "-kernel", str(self.kernel),
            "-initrd", str(self.initramfs), "-append", boot, "-serial", f"file:{job}/console.log", "-device", "virtio-rng-pci",
            "-device", "virtio-serial-pci", "-chardev", "stdio,id=o,signal=off", "-device", "virtserialport,chardev=o,name=out",
            "-fsdev", f"{share},id=root,path=/,readonly=on", "-device", "virtio-9p-pci,fsdev=root,mount_tag=root",
            "-fsdev", f"{share},id=job,path={job}", "-device", "virtio-9p-pci,fsdev=job,mount_tag=job",
        ]  # fmt: skip


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def prepare() -> Guest:
    """Fetch what is missing, and build the machine's files.

    Raises:
        Impossible: that cannot be done here.
    """
    if os.geteuid() != 0 or shutil.which("apt-get") is None or os.uname().machine != "x86_64":
        raise Impossible("it takes an RDMA device, or root on a Debian of x86-64, to start a virtual machine with Soft-RoCE")
    CACHE.mkdir(parents=True, exist_ok=True)
    install_on_host()
    release = fetch_kernel()
    packages = unpack(UNPACKED_PACKAGES, CACHE / "packages")
    wheel = CACHE / "wheel"
    if not (wheel / "ibverbs").exists():
        _run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(wheel), WHEEL])
    paths = [str(wheel), str(packages / "usr/lib/python3/dist-packages")]
    environment = {**PROCESSOR, "PYTHONPATH": ":".join(paths), "TICKMESH_RDMA_GUEST": "1", "C_INCLUDE_PATH": str(packages / "usr/include")}
    environment["LD_LIBRARY_PATH"] = str(packages / "usr/lib/x86_64-linux-gnu")
    return Guest(CACHE / f"vmlinux-{release}", CACHE / f"initramfs-{release}.gz", environment)


def install_on_host() -> None:
    """The packages that may be installed."""
    missing = [name for name in HOST_PACKAGES if subprocess.run(["dpkg", "-s", name], capture_output=True, check=False).returncode != 0]
    if missing:
        _apt(["install", "-y", "--no-install-recommends", *missing])


def fetch_kernel() -> str:
    """The release of Debian's kernel, which is unpacked in the cache as the machine boots it."""
    release = _kernel_release()
    if not (CACHE / f"initramfs-{release}.gz").exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            root = unpack((f"linux-image-{release}",), Path(name) / "kernel")
            (CACHE / f"vmlinux-{release}").write_bytes(kernel_image((root / f"boot/vmlinuz-{release}").read_bytes()))
            _run(["busybox", "depmod", "-b", str(root), release])
            partial = CACHE / f".initramfs-{release}.part"
            partial.write_bytes(gzip.compress(initramfs(root / f"lib/modules/{release}"), 1))
            partial.rename(CACHE / f"initramfs-{release}.gz")
    return release


def _kernel_release() -> str:
    """Of the image that Debian's newest kernel package depends on: the full one, the cloud's has no RDMA."""
    for updated in (False, True):
        if updated:
            _apt(["update"])
        told = subprocess.run(["apt-cache", "depends", "linux-image-amd64"], capture_output=True, text=True, check=False).stdout
        if found := re.search(r"Depends: linux-image-(\d\S+)", told):
            return found[1]
    raise Impossible("apt knows no package linux-image-amd64")


def unpack(packages: Iterable[str], target: Path) -> Path:
    """Fetch packages and unpack them into a folder, if it is not there."""
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            for package in packages:
                _run(["apt-get", "download", "-q", package], cwd=name)
            for file in Path(name).glob("*.deb"):
                _run(["dpkg", "-x", str(file), f"{name}/root"])
            target.parent.mkdir(parents=True, exist_ok=True)
            Path(f"{name}/root").rename(target)
    return target


def _apt(arguments: list[str]) -> None:
    if arguments[0] == "install":
        _run(["apt-get", "update", "-q"])
    _run(["apt-get", "-q", *arguments])


def _run(command: list[str], cwd: str | None = None) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Impossible(f"{shlex.join(command)} failed: {(done.stderr or done.stdout).strip()[-500:]}")


def warm(guest: Guest) -> None:
    """Compile for the machine's processor here: the emulated one would take minutes."""
    subprocess.run([sys.executable, str(HERE / "rdma_warm.py")], env=os.environ | guest.environment | {"LD_LIBRARY_PATH": ""}, check=True)


# ---------------------------------------------------------------- kernel and initramfs


def kernel_image(packed: bytes) -> bytes:
    """The ELF image out of a bzImage, whose own unpacking would take long in the emulator (Documentation/arch/x86/boot.rst).

    Raises:
        Impossible: it is not packed with xz.
    """
    sectors = packed[0x1F1] or 4
    offset, length = struct.unpack_from("<II", packed, 0x248)
    begin = (sectors + 1) * 512 + offset
    payload = packed[begin : begin + length]
    if not payload.startswith(b"\xfd7zXZ\x00"):
        raise Impossible("the kernel image is packed in a way that is not known")
    return lzma.LZMADecompressor().decompress(payload)


def initramfs(modules: Path) -> bytes:
    """An archive (cpio, newc) with busybox, the modules that are needed in their order, and init.sh."""
    order, files = module_order(modules)
    archive = _Archive()
    for folder in ("bin", "dev", "proc", "sys", "modules", "lower", "upper", "newroot", "job"):
        archive.add(folder, stat.S_IFDIR | 0o755)
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("dev/null", stat.S_IFCHR | 0o666, device=(1, 3))
    archive.add("bin/busybox", stat.S_IFREG | 0o755, Path("/bin/busybox").read_bytes())
    archive.add("bin/sh", stat.S_IFLNK | 0o777, b"busybox")
    archive.add("init", stat.S_IFREG | 0o755, (HERE / "guest/init.sh").read_bytes())
    for name in order:
        archive.add(f"modules/{name}.ko", stat.S_IFREG | 0o644, _unsigned((modules / files[name]).read_bytes()))
    archive.add("modules/order", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in order).encode())
    archive.add("TRAILER!!!", 0)
    return bytes(archive.content)


def module_order(modules: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the modules, those that others need first, and the file of each."""

    def plain(path: str) -> str:
        return Path(path).name.split(".ko")[0].replace("-", "_")

    needs, files, order = dict[str, list[str]](), dict[str, str](), list[str]()
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[plain(path)], files[plain(path)] = [plain(other) for other in rest.split()], path

    def add(name: str) -> None:
        if name not in order:
            for other in needs[name]:
                add(other)
            order.append(name)

    for name in MODULES:
        add(name)
    return order, files


def _unsigned(module: bytes) -> bytes:
    """Without its signature, which takes the emulator 50 ms to check."""
    if not module.endswith(_SIGNATURE):
        return module
    length = int.from_bytes(module[-len(_SIGNATURE) - 4 : -len(_SIGNATURE)], "big")
    return module[: -len(_SIGNATURE) - 12 - length]


class _Archive:
    def __init__(self) -> None:
        self.content, self._number = bytearray(), 0

    def add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._number += 1
        path = name.encode() + b"\0"
        fields = (self._number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        self.content += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        self.content += b"\0" * (-len(self.content) % 4) + data
        self.content += b"\0" * (-len(self.content) % 4)


if __name__ == "__main__":
    sys.exit(main())
