"""The virtual machine of `make test-rdma` and what starts it: devices, packets and compiled code in it; nothing left behind outside."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from guest import Impossible, execute, initramfs, kernel_image, module_order, scratch
from hypothesis import given
from hypothesis import strategies as st
from rdma_support import BINDINGS, need_binding
from run_rdma import DEVICE, INTERFACE, pytest_of, soft_roce
from test_verbs import Side, connected

from tickmesh.transports.verbs import Binding, devices

HERE = Path(__file__).resolve().parent
LIMIT_S = 20.0
IN_GUEST = pytest.mark.skipif(os.environ.get("TICKMESH_RDMA_GUEST") != "1", reason="of the virtual machine that `make test-rdma` starts")


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "a condition has not come"
        time.sleep(0.005)


# ---------------------------------------------------------------- in the machine


@pytest.mark.rdma
@IN_GUEST
@pytest.mark.parametrize("binding", BINDINGS)
def test_every_binding_is_there_and_sees_both_devices(binding: Binding) -> None:
    need_binding(binding)
    assert devices(binding) == ["rxe0", "rxe1"]


@pytest.mark.rdma
@IN_GUEST
def test_writes_go_as_packets_from_one_interface_to_the_other() -> None:
    counter = Path("/sys/class/net/rdma1/statistics/rx_bytes")
    before = int(counter.read_text())
    write_through("rxe0", "rxe1", 8000)
    assert int(counter.read_text()) - before > 8000


@pytest.mark.rdma
@IN_GUEST
def test_soft_roce_of_a_host_s_own_kernel_is_set_up_and_gone_afterwards() -> None:
    with soft_roce():
        assert DEVICE in devices()
        write_through(DEVICE, DEVICE, 8000)
    assert DEVICE not in devices()
    assert not Path(f"/sys/class/net/{INTERFACE}").exists()


def write_through(first: str, second: str, count: int) -> None:
    one, other = Side(first, "libibverbs"), Side(second, "libibverbs")
    try:
        connected(one, other)
        one.queue.write([one.write(other, 64, b"x" * count, signaled=True)])
        assert one.completions(1)[0].status == 0
        assert bytes(other.memory[64 : 64 + count]) == b"x" * count
    finally:
        one.close()
        other.close()


@pytest.mark.rdma
@IN_GUEST
def test_a_ring_s_loops_come_compiled_from_the_cache() -> None:
    """Those that the host has compiled for this processor: numba counts what it loads and what it compiles."""
    from tickmesh.node.event import EVENT
    from tickmesh.transports import ring as module
    from tickmesh.transports.ring import Ring

    with Ring.create(None, 64, EVENT) as ring:
        reader = ring.reader("r", start="newest")
        reader.read()
    loops = [found for found in vars(module).values() if hasattr(found, "stats") and found.signatures]
    assert loops
    assert [loop.__name__ for loop in loops if loop.stats.cache_misses] == []


# ---------------------------------------------------------------- what starts it


HOLDER = """
import sys, time
sys.path.insert(0, {here!r})
from pathlib import Path
from guest import scratch
with scratch(Path({parent!r})) as folder:
    (folder / "file").write_text("x")
    print(folder, flush=True)
    time.sleep({sleep_s})
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_folder_is_gone_however_its_process_ends(tmp_path: Path, number: signal.Signals) -> None:
    program = HOLDER.format(here=str(HERE), parent=str(tmp_path), sleep_s=600)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            folder = Path(process.stdout.readline().strip())
            assert (folder / "file").exists()
        finally:
            process.send_signal(number)
        wait_until(lambda: not folder.exists())


CHILD = """
import os, subprocess, sys, time
sys.path.insert(0, {here!r})
from guest import _end_with
parent = os.getpid()
child = subprocess.Popen(["sleep", "600"], preexec_fn=lambda: _end_with(parent))
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_machine_ends_with_the_process_that_started_it() -> None:
    with subprocess.Popen([sys.executable, "-c", CHILD.format(here=str(HERE))], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        process.kill()
        process.wait()
        wait_until(lambda: not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")


def test_an_error_in_the_block_is_not_hidden_and_cleans_up(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), scratch(tmp_path):
        _ = 1 // 0
    assert list(tmp_path.iterdir()) == []


@given(needs=st.lists(st.lists(st.integers(0, 30), max_size=4, unique=True), min_size=1, max_size=30), data=st.data())
def test_modules_come_after_those_that_they_need(
    tmp_path_factory: pytest.TempPathFactory, needs: list[list[int]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("modules")
    needed = {f"m{i}": [f"m{other}" for other in others if other < i] for i, others in enumerate(needs)}
    lines = [f"kernel/a-b/{name}.ko.xz: {' '.join(f'kernel/{other}.ko' for other in others)}" for name, others in needed.items()]
    (folder / "modules.dep").write_text("\n".join(lines))
    wanted = data.draw(st.lists(st.sampled_from(sorted(needed)), min_size=1))
    order, files = module_order(folder, wanted)
    assert len(order) == len(set(order))
    assert set(wanted) <= set(order) <= set(needed)
    assert all(set(needed[name]) <= set(order[:at]) for at, name in enumerate(order))
    assert all(files[name] == f"kernel/a-b/{name}.ko.xz" for name in order)


def test_a_module_that_the_kernel_has_not_got_is_named(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text("kernel/veth.ko:\n")
    with pytest.raises(Impossible, match="rdma_rxe"):
        module_order(tmp_path, ["veth", "rdma_rxe"])


@pytest.mark.skipif(shutil.which("busybox") is None, reason="busybox reads the archive")
def test_the_archive_is_one_that_others_can_read(tmp_path: Path) -> None:
    names = ["virtio_pci", "veth"]
    (tmp_path / "modules.dep").write_text("".join(f"{name}.ko:\n" for name in names))
    for name in names:
        (tmp_path / f"{name}.ko").write_bytes(name.encode() * 99)
    archive = initramfs(tmp_path, names)
    (tmp_path / "out").mkdir()
    subprocess.run(["busybox", "cpio", "-idm", "./modules/*", "modules/*"], input=archive, cwd=tmp_path / "out", check=True)
    assert (tmp_path / "out/modules/order").read_text() == "virtio_pci\nveth\n"
    assert (tmp_path / "out/modules/veth.ko").read_bytes() == b"veth" * 99


def test_a_kernel_that_is_packed_otherwise_is_refused() -> None:
    with pytest.raises(Impossible, match="packed"):
        kernel_image(bytes(4096))


def test_a_command_that_fails_or_is_not_there_says_what_it_said() -> None:
    with pytest.raises(Impossible, match="no-such-program"):
        execute(["no-such-program"])
    with pytest.raises(Impossible, match="told why"):
        execute(["sh", "-c", "echo told why >&2; exit 3"])


def test_only_files_with_such_tests_are_read_unless_some_are_named() -> None:
    files = {Path(argument).name for argument in pytest_of(["--durations=3"]) if argument.endswith(".py")}
    assert {"test_verbs.py", "test_rdma.py", "test_rdma_node.py", "test_guest.py"} <= files
    assert "test_ring.py" not in files
    named = str(HERE / "test_verbs.py")
    assert [argument for argument in pytest_of([f"{named}::test_x"]) if ".py" in argument] == [f"{named}::test_x"]
