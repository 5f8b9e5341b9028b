"""A virtual machine with Soft-RoCE, for what needs RDMA devices on a host that has none.

A stock Debian kernel boots in QEMU, without hardware support, in some seconds; its root is the host's own, read-only, below a memory
file system, so that everything has the same paths and nothing that is done there stays. What the host lacks is fetched from Debian by
name and kept in ``rdma-guest`` of the cache; nothing of the host's kernel or RDMA packages is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gzip
import hashlib
import lzma
import os
import re
import resource
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tickmesh.transports.codecache import cache_dir

HERE = Path(__file__).resolve().parent / "guest"
CACHE = cache_dir() / "rdma-guest"
LIBRARIES = ("libibverbs1", "ibverbs-providers", "iproute2")
EMULATOR = ("qemu-system-x86", "busybox-static")
UNPACKED_PACKAGES = ("python3-pyverbs", "librdmacm1", "libibverbs-dev")
"""Unpacked beside the host's own: installed, they would bring a newer udev with them."""
WHEEL = "ibverbs==2026.10.22"
MODULES = (
    "virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay", "crc32_generic", "crc32_pclmul", "veth", "sch_netem", "ib_uverbs",
    "rdma_cm", "rdma_ucm", "rdma_rxe",
)  # fmt: skip
MEMORY_MIB, LIMIT_S = 1500, 1500
"""Each test has a limit of its own; this one is for a machine that stands still."""
PROCESSOR = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
"""The emulated processor is not the host's: what is compiled for any of the kind runs on both."""
_SIGNATURE = b"~Module signature appended~\n"
_PR_SET_PDEATHSIG = 1


class Impossible(Exception):
    """It cannot be done here; the message says why."""


# ---------------------------------------------------------------- the machine


@dataclass(frozen=True)
class Guest:
    """A virtual machine that can be started.

    Attributes:
        kernel: an ELF image.
        initramfs: an archive with the kernel's modules; what is run first comes from this folder.
        environment: of its commands.
    """

    kernel: Path
    initramfs: Path
    environment: dict[str, str]

    def run(self, command: list[str]) -> int:
        """Boot it, run a command in this folder, and return its exit code; the machine ends with this process, however that ends."""
        begun = time.monotonic()
        with scratch(Path(tempfile.gettempdir())) as job:
            self._prepare(job, command)
            parent = os.getpid()
            machine = subprocess.Popen(self._command(job), stdin=subprocess.PIPE, preexec_fn=lambda: _end_with(parent))  # stdin stays open
            try:
                machine.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                pass
            finally:
                machine.kill()
                machine.wait()
            took_s, processor_s = time.monotonic() - begun, _processor_s()
            code = _text(job / "exit_code").strip()
            print(f"guest: {took_s:.0f} s with the boot, {processor_s:.0f} s of processor with what came before it", flush=True)
            if not code:
                ended = f"was not finished after {LIMIT_S} s" if took_s >= LIMIT_S else "ended early"
                print(f"guest: the machine {ended}:\n{_text(job / 'console.log')[-4000:]}", flush=True)
                return 125
            if compiled := _text(job / "compiled").split():
                print(f"guest: compiled there, and not before by tests/rdma_warm.py: {', '.join(compiled)}", flush=True)
            return int(code)

    def _prepare(self, job: Path, command: list[str]) -> None:
        """What the machine boots with and reads: the archive with init.sh of today, stage2.sh, the command."""
        first = _Archive()
        first.add("init", stat.S_IFREG | 0o755, (HERE / "init.sh").read_bytes())
        (job / "initramfs.gz").write_bytes(self.initramfs.read_bytes() + gzip.compress(first.closed(), 1))
        shutil.copy(HERE / "stage2.sh", job)
        environment = {"TICKMESH_CACHE_DIR": str(cache_dir()), "TICKMESH_RDMA_GUEST": "1", **self.environment}
        exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in environment.items())
        (job / "job.sh").write_text(f"{exports}cd {shlex.quote(os.getcwd())}\nexec {shlex.join(command)}\n")

    def _command(self, job: Path) -> list[str]:
        share = "local,security_model=none,multidevs=remap"
        boot = "console=ttyS0 panic=-1 tsc=reliable no_timer_check nokaslr mitigations=off audit=0 random.trust_cpu=on"
        return [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", "q35",
            "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", str(MEMORY_MIB), "-kernel", str(self.kernel),
            "-initrd", f"{job}/initramfs.gz", "-append", boot, "-serial", f"file:{job}/console.log", "-device", "virtio-rng-pci",
            "-device", "virtio-serial-pci", "-chardev", "stdio,id=o,signal=off", "-device", "virtserialport,chardev=o,name=out",
            "-fsdev", f"{share},id=root,path=/,readonly=on", "-device", "virtio-9p-pci,fsdev=root,mount_tag=root",
            "-fsdev", f"{share},id=job,path={job}", "-device", "virtio-9p-pci,fsdev=job,mount_tag=job",
        ]  # fmt: skip


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _end_with(parent: int) -> None:
    """In a child: be killed when its parent ends, also if that has been before this."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def cleaned_up(script: str) -> Iterator[None]:
    """Run a shell's script after the block, or when this process ends without reaching that, killed by SIGKILL too."""
    # It sees the end of a pipe that only this process holds, in a session of its own, which Ctrl-C does not reach.
    cleaner = subprocess.Popen(["sh", "-c", f"read -r line; {script}"], stdin=subprocess.PIPE, start_new_session=True)
    assert cleaner.stdin is not None
    try:
        yield
    finally:
        cleaner.stdin.close()
        cleaner.wait()


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A folder that is gone afterwards, see :func:`cleaned_up`."""
    folder = tempfile.mkdtemp(prefix="tickmesh-guest-", dir=parent)
    with cleaned_up(f"rm -rf {shlex.quote(folder)}"):
        yield Path(folder)


# ---------------------------------------------------------------- what it takes


def prepare() -> Guest:
    """Fetch what is missing, and build the machine's files.

    Raises:
        Impossible: that cannot be done here.
    """
    if os.geteuid() != 0 or shutil.which("apt-get") is None or os.uname().machine != "x86_64":
        raise Impossible("it takes an RDMA device, or root on a Debian of x86-64, to start a virtual machine with Soft-RoCE")
    with _alone():
        install((*LIBRARIES, *EMULATOR))
        kernel, archive = fetch_kernel()
        return Guest(kernel, archive, {**PROCESSOR, **bindings()})


@contextmanager
def _alone() -> Iterator[None]:
    """While no other process fetches into the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def install(packages: Iterable[str]) -> None:
    """Install packages of the system that are missing.

    Raises:
        Impossible: apt-get says no.
    """
    missing = [name for name in packages if "install ok installed" not in _told(["dpkg", "-s", name])]
    if missing:
        execute(["apt-get", "update", "-q"])
        execute(["apt-get", "-q", "install", "-y", "--no-install-recommends", *missing])


def bindings() -> dict[str, str]:
    """An environment in which Python finds both bindings, and the C compiler the header: unpacked in the cache, not installed.

    Raises:
        Impossible: they cannot be fetched.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    wheel, packages = CACHE / WHEEL.replace("==", "-"), CACHE / "packages"
    if not wheel.exists():
        with scratch(CACHE) as folder:
            execute([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder / "wheel"), WHEEL])
            (folder / "wheel").rename(wheel)
    if not packages.exists():
        with scratch(CACHE) as folder:
            unpack(UNPACKED_PACKAGES, folder).rename(packages)
    return {
        "PYTHONPATH": f"{wheel}:{packages}/usr/lib/python3/dist-packages",
        "LD_LIBRARY_PATH": f"{packages}/usr/lib/x86_64-linux-gnu",
        "C_INCLUDE_PATH": f"{packages}/usr/include",
    }


def fetch_kernel() -> tuple[Path, Path]:
    """Debian's newest kernel and an archive with its modules, as the machine boots them; the ones that are there if apt knows none.

    Raises:
        Impossible: there is none.
    """
    kind = hashlib.sha256(" ".join(MODULES).encode()).hexdigest()[:8]
    try:
        release = kernel_release()
        kernel, archive = CACHE / f"vmlinux-{release}", CACHE / f"initramfs-{release}-{kind}.gz"
        if not archive.exists():
            with scratch(CACHE) as folder:
                _build(release, folder, kernel, archive)
            for old in {*CACHE.glob("vmlinux-*"), *CACHE.glob("initramfs-*")} - {kernel, archive}:
                old.unlink()
        return kernel, archive
    except Impossible:
        for archive in CACHE.glob(f"initramfs-*-{kind}.gz"):
            return CACHE / archive.name.replace("initramfs", "vmlinux").removesuffix(f"-{kind}.gz"), archive
        raise


def _build(release: str, folder: Path, kernel: Path, archive: Path) -> None:
    """Both files are renamed into their places, the archive last: where it is, the kernel is."""
    root = unpack((f"linux-image-{release}",), folder)
    execute(["busybox", "depmod", "-b", str(root), release])
    (folder / "kernel").write_bytes(kernel_image((root / f"boot/vmlinuz-{release}").read_bytes()))
    (folder / "archive").write_bytes(gzip.compress(initramfs(root / f"lib/modules/{release}"), 1))
    (folder / "kernel").rename(kernel)
    (folder / "archive").rename(archive)


def kernel_release() -> str:
    """Of the image that Debian's newest kernel package depends on: the full one, the cloud's has no RDMA.

    Raises:
        Impossible: apt knows none.
    """
    for updated in (False, True):
        if updated:
            execute(["apt-get", "update", "-q"])
        if found := re.search(r"Depends: linux-image-(\d\S+)", _told(["apt-cache", "depends", "linux-image-amd64"])):
            return found[1]
    raise Impossible("apt knows no package linux-image-amd64")


def unpack(packages: Iterable[str], folder: Path) -> Path:
    """Fetch packages and unpack them below a folder; returns where.

    Raises:
        Impossible: apt-get has not got them.
    """
    for package in packages:
        try:
            execute(["apt-get", "download", "-q", package], folder)
        except Impossible:  # the lists may be older than the archive
            execute(["apt-get", "update", "-q"])
            execute(["apt-get", "download", "-q", package], folder)
    for file in folder.glob("*.deb"):
        execute(["dpkg", "-x", str(file), str(folder / "root")])
    return folder / "root"


def execute(command: list[str], folder: Path | None = None) -> None:
    """Run a command to its end.

    Raises:
        Impossible: it is not there, or fails; with what it says.
    """
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Impossible(f"{shlex.join(command)}: {error.strerror}") from error
    if done.returncode != 0:
        raise Impossible(f"{shlex.join(command)} failed: {(done.stderr or done.stdout).strip()[-500:]}")


def _told(command: list[str]) -> str:
    """What a command prints; nothing if it is not there."""
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return ""


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


def initramfs(modules: Path, wanted: Iterable[str] = MODULES) -> bytes:
    """An archive (cpio, newc) with busybox and the modules that are wanted in their order; without /init.

    Raises:
        Impossible: a module is not there.
    """
    order, files = module_order(modules, wanted)
    archive = _Archive()
    for folder in ("bin", "dev", "proc", "sys", "modules", "lower", "upper", "newroot", "job"):
        archive.add(folder, stat.S_IFDIR | 0o755)
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("dev/null", stat.S_IFCHR | 0o666, device=(1, 3))
    archive.add("bin/busybox", stat.S_IFREG | 0o755, Path("/bin/busybox").read_bytes())
    archive.add("bin/sh", stat.S_IFLNK | 0o777, b"busybox")
    for name in order:
        archive.add(f"modules/{name}.ko", stat.S_IFREG | 0o644, _unsigned((modules / files[name]).read_bytes()))
    archive.add("modules/order", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in order).encode())
    return archive.closed()


def module_order(modules: Path, wanted: Iterable[str] = MODULES) -> tuple[list[str], dict[str, str]]:
    """Names of the modules, those that others need first, and the file of each, by ``modules.dep``.

    Raises:
        Impossible: a module is not there.
    """

    def plain(path: str) -> str:
        return Path(path).name.split(".ko")[0].replace("-", "_")

    needs, files, order = dict[str, list[str]](), dict[str, str](), list[str]()
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[plain(path)], files[plain(path)] = [plain(other) for other in rest.split()], path

    def add(name: str) -> None:
        if name not in needs:
            raise Impossible(f"the kernel has no module {name}")
        if name not in order:
            for other in needs[name]:
                add(other)
            order.append(name)

    for name in wanted:
        add(name)
    return order, files


def _unsigned(module: bytes) -> bytes:
    """Without its signature, which takes the emulator 50 ms to check."""
    if not module.endswith(_SIGNATURE):
        return module
    length = int.from_bytes(module[-len(_SIGNATURE) - 4 : -len(_SIGNATURE)], "big")
    return module[: -len(_SIGNATURE) - 12 - length]


class _Archive:
    """Files for the kernel to unpack (Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self._content, self._number = bytearray(), 0

    def add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._number += 1
        path = name.encode() + b"\0"
        fields = (self._number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        self._content += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        self._content += b"\0" * (-len(self._content) % 4) + data
        self._content += b"\0" * (-len(self._content) % 4)

    def closed(self) -> bytes:
        """All of it, with the entry that ends an archive."""
        self.add("TRAILER!!!", 0)
        return bytes(self._content)
