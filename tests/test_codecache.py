"""The cache of compiled loops: an edited kernel is never run stale, an edit elsewhere compiles nothing, and a compile can be stopped."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from nodes import simulator_source, until
from replays import config_text
from test_replay import DAY
from test_up import children_with, embedded_text, left_in_memory

from tickmesh.node.decoder import decoder_source
from tickmesh.node.protocol import load_framing, load_spec
from tickmesh.node.telemetry import read_telemetry, telemetry_path
from tickmesh.ops.status_cmd import HEARTBEAT_LATE_S
from tickmesh.transports import codecache
from tickmesh.transports.codecache import CompileError, CompileStopped, load_generated, source_closure, watched_compiles, write_generated

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("TICKMESH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def closure(source: str) -> set[str]:
    """What a generated module is compiled with, as paths inside the package: ``{"node/event.py", …}``."""
    path = write_generated("closure", source)
    return {f"{file.parent.name}/{file.name}" for file in source_closure(path) if file != path}


# ---------------------------------------------------------------- what a loop is compiled with


def test_a_decoder_is_compiled_with_kernels_only(cache: Path) -> None:
    for name, framing in (("itch50", "binaryfile"), ("itch50", "moldudp64"), ("dbn_mbo", "dbn")):
        found = closure(decoder_source(load_spec(name), load_framing(framing)))
        assert {"node/arbiter.py", "node/event.py", "node/feed.py", "node/instruments.py", "transports/toolbox.py"} <= found
        assert not {file for file in found if file.startswith(("control/", "ops/")) or file.endswith("__init__.py")}
        assert not found & {"node/subscription.py", "node/frames.py", "node/decoder.py", "transports/nats.py", "transports/codecache.py"}


@pytest.mark.parametrize(
    ("line", "found", "not_found"),
    [
        ("from tickmesh.node import arbiter as A", "node/arbiter.py", "node/__init__.py"),
        ("from tickmesh.node import arbiter, subscribe", "node/__init__.py", ""),
        ("from tickmesh.node import subscribe", "node/subscription.py", "node/arbiter.py"),
        ("import tickmesh.node", "node/__init__.py", "node/arbiter.py"),
        ("import tickmesh.node.arbiter as A", "node/arbiter.py", "node/__init__.py"),
        ("from tickmesh.node import *", "node/arbiter.py", ""),
        ("from tickmesh.node.window import window_push", "node/window.py", "node/__init__.py"),
        ("def later():\n    try:\n        from tickmesh.node.window import window_push\n    finally:\n        pass", "node/window.py", ""),
        ("match 1:\n    case 1:\n        import tickmesh.node.window", "node/window.py", ""),
        ("import tickmesh.transports.codecache", "", "transports/codecache.py"),
        ("from tickmesh.transports import codecache", "", "transports/codecache.py"),
        ("import numpy", "", "node/__init__.py"),
    ],
)
def test_an_import_is_followed_to_where_the_name_comes_from(cache: Path, line: str, found: str, not_found: str) -> None:
    files = closure(line + "\n")
    assert not found or found in files
    assert not_found not in files


def test_a_generated_module_is_compiled_with_those_it_imports(cache: Path) -> None:
    first = write_generated("first", "from tickmesh.node.window import window_push\n")
    second = write_generated("second", f"import tickmesh_generated.{first.stem} as first\n")
    assert {file.name for file in source_closure(second)} >= {first.name, second.name, "window.py", "toolbox.py"}


# ---------------------------------------------------------------- edits, in a copy of the package

_KERNEL = """
from tickmesh.transports.toolbox import inlined

@inlined
def work(x):
    return x + {number}
"""
_USE = """
import sys
from tickmesh.transports.codecache import load_generated

module = load_generated("use", '''
import numpy as np
from tickmesh.node import kernel
from tickmesh.transports.toolbox import loop

@loop
def use(x):
    return kernel.work(x)

def warm():
    use(np.int64(0))
''', lambda line: print(line, file=sys.stderr))
import numpy as np
print(module.use(np.int64(0)))
"""


def edited(path: Path, text: str = "\n# edited\n") -> None:
    path.write_text(path.read_text() + text)


def test_an_edited_kernel_is_not_run_stale_and_no_other_edit_compiles(tmp_path: Path) -> None:
    package = tmp_path / "site" / "tickmesh"
    for folder in ("node", "transports", "control"):
        shutil.copytree(ROOT / folder, package / folder, ignore=shutil.ignore_patterns("__pycache__"))
    kernel = package / "node" / "kernel.py"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "TICKMESH_CACHE_DIR": str(tmp_path / "cache")}

    def run() -> tuple[int, bool]:
        """What the loop returns for 0, and whether it had to be compiled."""
        done = subprocess.run([sys.executable, "-c", _USE], env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout), "compiling use loop" in done.stderr

    kernel.write_text(_KERNEL.format(number=1))
    assert run() == (1, True)
    assert run() == (1, False)
    for other in ("node/subscription.py", "node/book.py", "node/__init__.py", "transports/codecache.py"):
        edited(package / other)
    assert run() == (1, False)
    kernel.write_text(_KERNEL.format(number=2))
    assert run() == (2, True)
    edited(package / "transports" / "toolbox.py")
    assert run() == (2, True)
    edited(package / "node" / "__init__.py", "\nimport tickmesh.node.kernel as kernel\n")  # now the name comes from the package too
    assert run() == (2, True)
    edited(package / "node" / "__init__.py")
    assert run() == (2, True)


# ---------------------------------------------------------------- parts that are kept

_INNER = """
from tickmesh.transports.toolbox import inlined, outlined

@outlined
def inner(x):
    return {}
"""
_OUTER = """
from tickmesh.node.inner import inner
from tickmesh.transports.toolbox import inlined

@inlined
def outer(x):
    return min(inner(x), 100)
"""
_LOOP = """
from tickmesh.transports.codecache import load_generated

module = load_generated("using", '''
import numpy as np
from tickmesh.node.outer import outer
from tickmesh.transports.toolbox import loop

@loop
def use(x):
    return max(outer(x), {least})

def warm():
    use(np.int64(0))
''')
import numpy as np
print(module.use(np.int64(7)))
"""


class Copied(NamedTuple):
    """Kernels ``inner`` and ``outer`` in a copy of the package."""

    inner: Path
    folder: Path
    """Where parts are kept."""
    environment: dict[str, str]

    def run(self, least: int) -> int:
        """What a loop over them returns for 7, at least; it is compiled unless it was before."""
        command = [sys.executable, "-c", _LOOP.format(least=least)]
        return int(subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout)

    def kept(self) -> dict[str, bytes]:
        """Parts on disk."""
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}


@pytest.fixture
def copied(tmp_path: Path) -> Copied:
    """See :class:`Copied`; with an empty cache."""
    package = tmp_path / "site" / "tickmesh"
    shutil.copytree(ROOT / "transports", package / "transports", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "node").mkdir()
    (package / "node" / "__init__.py").touch()
    (package / "node" / "inner.py").write_text(_INNER.format("x + 1"))
    (package / "node" / "outer.py").write_text(_OUTER)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "TICKMESH_CACHE_DIR": str(tmp_path / "cache")}
    return Copied(package / "node" / "inner.py", tmp_path / "cache" / "parts", environment)


def test_another_loop_takes_the_parts_of_the_one_before(copied: Copied) -> None:
    assert copied.run(0) == 8
    parts = copied.kept()
    assert len(parts) == 2
    assert copied.run(50) == 50
    assert copied.kept() == parts


def test_a_kept_part_is_not_taken_when_what_it_calls_was_edited(copied: Copied) -> None:
    assert copied.run(0) == 8
    copied.inner.write_text(_INNER.format("x * 2"))
    assert (copied.run(0), copied.run(1)) == (14, 14)
    copied.inner.write_text(_INNER.format("x + 1"))  # as it was: the parts of then fit again
    parts = copied.kept()
    assert len(parts) == 4
    assert copied.run(2) == 8
    assert copied.kept() == parts


@pytest.mark.parametrize("damage", [b"", b"not a part", None])
def test_parts_that_are_damaged_or_missing_are_made_again(copied: Copied, damage: bytes | None) -> None:
    assert copied.run(0) == 8
    for least, name in enumerate(parts := copied.kept(), 1):  # one at a time: one of the two calls the other
        if damage is None:
            (copied.folder / name).unlink()
        else:
            (copied.folder / name).write_bytes(damage)
        assert copied.run(least) == 8
        assert set(copied.kept()) == set(parts)
        assert copied.kept()[name] not in (b"", damage)


# ---------------------------------------------------------------- a helper that is ready

_READY = """
import os, sys, time
from pathlib import Path
from tickmesh.transports import codecache
from tickmesh.transports.codecache import ReadyHelper, load_generated, watched_compiles, write_generated

SOURCE = '''
import numpy as np
from tickmesh.node.outer import outer
from tickmesh.transports.toolbox import loop

@loop
def use(x):
    return max(outer(x), {least})

def warm():
    use(np.int64(0))
'''
ready = ReadyHelper(write_generated("using", SOURCE.format(least=0)))
first = ready._helper.pid
end = time.monotonic() + 60
while not ready.ready:
    assert time.monotonic() < end, "it is not ready"
    time.sleep(0.01)
print(first, flush=True)
if sys.argv[1] == "die":
    os.kill(os.getpid(), 9)
if sys.argv[1]:
    Path(sys.argv[1]).write_text(sys.argv[2])
started, start = [], codecache._started
codecache._started = lambda *arguments: started.append(arguments[1:]) or start(*arguments)
import numpy as np
with watched_compiles(lambda: False, ready):
    module = load_generated("using", SOURCE.format(least=1))
print(module.use(np.int64(7)), [list(one)[0] == "--wait" for one in started])
ready.close()
"""


def _with_ready_helper(copied: Copied, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _READY, *arguments]
    return subprocess.run(command, env=copied.environment, capture_output=True, text=True, timeout=120, check=False)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("edit", "said"), [("", "8 [True]"), (_INNER.format("x * 2"), "14 [True, False]")])
def test_a_helper_that_is_ready_compiles_unless_its_sources_have_changed(copied: Copied, edit: str, said: str) -> None:
    """Another one is made ready in its place; an edited kernel is compiled by a fresh one, with what is on the disk now."""
    done = _with_ready_helper(copied, str(copied.inner) if edit else "", edit)
    assert done.returncode == 0, done.stderr
    pid, answer = done.stdout.splitlines()
    assert answer == said
    assert not _runs(int(pid))


def test_a_helper_that_is_ready_ends_with_its_process(copied: Copied) -> None:
    done = _with_ready_helper(copied, "die")
    assert done.returncode == -signal.SIGKILL, done.stderr
    until(lambda: not _runs(int(done.stdout)), "the helper ends too")


# ---------------------------------------------------------------- the helper process

_GOOD = """
import numpy as np
from tickmesh.transports.toolbox import loop

@loop
def f(x):
    return x {}

def warm():
    f(np.int64(1))
"""


def test_a_module_that_does_not_compile_says_why(cache: Path) -> None:
    with pytest.raises(CompileError, match="no_such_name") as caught:
        load_generated("broken", _GOOD.format("+ no_such_name"))
    assert caught.value.path.parent == cache / "generated"
    assert not codecache.is_compiled(caught.value.path)


def test_who_watches_a_compile_is_called_and_can_end_it(cache: Path) -> None:
    calls: list[int] = []

    def three_times() -> bool:
        calls.append(1)
        return len(calls) >= 3

    with watched_compiles(three_times), pytest.raises(CompileStopped):
        load_generated("watched", _GOOD.format("* 2"))
    assert len(calls) == 3
    assert not children_with(str(cache))
    assert load_generated("watched", _GOOD.format("* 2")).f(4) == 8
    assert len(calls) == 3


@contextmanager
def command(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str]]]:
    """A tickmesh command with an empty cache in a process group of its own, as a shell starts it; and what it has printed."""
    log = folder / "log"
    environment = {**os.environ, "TICKMESH_CACHE_DIR": str(folder / "cache")}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tickmesh.ops.cli", *arguments], stdout=file, stderr=file, text=True, env=environment, process_group=0
        )
    try:
        yield process, log.read_text
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def helpers(folder: Path) -> list[str]:
    """Compiles under way for the cache in this folder; the simulator's is not a generated module and has no path."""
    return [line for line in children_with("tickmesh.transports.codecache") if str(folder) in line or "ops.simulator" in line]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_replay_is_stopped_while_it_compiles(tmp_path: Path, number: signal.Signals, code: int) -> None:
    file = tmp_path / "node.toml"
    file.write_text('[data_sources.day]\ntype = "file"\npath = "day.itch"\ndata_format = "itch50"\n')
    (tmp_path / "day.itch").write_bytes(b"")
    with command(tmp_path, "replay", str(tmp_path / "day.itch"), "--config", str(file)) as (process, text):
        until(lambda: process.poll() is not None or helpers(tmp_path), "a compile", 60)
        assert "compiling" in text(), text()
        os.killpg(process.pid, number)  # as Ctrl-C does: everything in the terminal's foreground group
        assert process.wait(20) == code, text()
        until(lambda: not helpers(tmp_path), "the end of the helper", 20)
        assert "Traceback" not in text()
        assert "does not compile" not in text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_node_that_compiles_says_so_and_can_be_stopped(tmp_path: Path, number: signal.Signals) -> None:
    cluster = f"c{secrets.token_hex(4)}"
    file = tmp_path / "node.toml"
    file.write_text(embedded_text(cluster, tmp_path / "data", simulator_source(0, pace='"realtime"')))
    with command(tmp_path, *(["up"] if number == signal.SIGINT else ["node", "run"]), "--config", str(file)) as (process, text):
        until(lambda: process.poll() is not None or "compiling" in text(), "a compile", 60)
        path = telemetry_path(cluster, "n1")
        until(lambda: process.poll() is not None or read_telemetry(path)["uptime_s"] > HEARTBEAT_LATE_S + 1, "a long compile")
        assert process.poll() is None, text()
        shown = subprocess.run(
            [sys.executable, "-m", "tickmesh.ops.cli", "status", "--cluster", cluster], capture_output=True, text=True, check=True
        )
        assert f"{cluster}/n1  compiling" in shown.stdout
        assert "silent" not in shown.stdout
        os.killpg(process.pid, number)
        assert process.wait(20) == 0, text()
        assert "stopped before the loops were compiled" in text()
        assert "Traceback" not in text()
    until(lambda: not children_with(str(tmp_path)), "the end of everything", 20)
    assert not left_in_memory(cluster)


# ---------------------------------------------------------------- one signature per entry point

_SIGNATURES = """
import json, sys, threading
from pathlib import Path
from numba.core.dispatcher import Dispatcher
from tickmesh.control.config import load_config
from tickmesh.node.process import Node
from tickmesh.node.replay import replay
from tickmesh.ops.up import GENERATORS, embedded_servers

config = load_config(Path(sys.argv[1]))
if len(sys.argv) > 2:
    replay(config, [Path(sys.argv[2])], "feed")
else:
    with embedded_servers(config) as targets:
        node = Node(config, GENERATORS, targets)
        node.start()
        stop = threading.Event()
        node.watch(stop, lambda n: stop.set() if n.finished else None)
        node.stop()
found = {}
for name, module in sys.modules.items():
    if name.startswith("tickmesh"):
        for what, value in vars(module).items():
            if isinstance(value, Dispatcher) and value.__module__ == name and value.stats.cache_path:
                found[name.rpartition(".")[2] + "." + what] = len(value.signatures)
json.dump({name: count for name, count in found.items() if count}, sys.stdout)
"""


def signatures(*arguments: str) -> dict[str, int]:
    """Compiled entry points of a run and how many argument types each was compiled for, generated modules without their hash."""
    done = subprocess.run([sys.executable, "-c", _SIGNATURES, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    return {re.sub(r"_[0-9a-f]{16}\.", ".", name): count for name, count in counts.items()}


def test_a_run_compiles_each_entry_point_once_and_none_that_it_does_not_call(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text(embedded_text(f"c{secrets.token_hex(4)}", tmp_path / "data", simulator_source(2000)))
    node = signatures(str(file))
    assert set(node.values()) == {1}
    assert {name for name in node if name.startswith(("shard", "decoder"))} == {"shard.run", "decoder_itch50_binaryfile.decode_stream"}
    (tmp_path / "day.itch").write_bytes(DAY)
    file.write_text(config_text("itch50"))
    replayed = signatures(str(file), str(tmp_path / "day.itch"))
    assert set(replayed.values()) == {1}
    assert {name for name in replayed if name.startswith(("shard", "decoder", "replay"))} == {"replay.replay"}


def test_the_same_code_is_compiled_once_at_a_time(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    compiled, really = [], codecache.compile_in_helper

    def counted(path: Path, argument: str | None = None) -> None:
        compiled.append(path)
        really(path, argument)

    monkeypatch.setattr(codecache, "compile_in_helper", counted)
    source = _GOOD.format("+ 12345")
    with ThreadPoolExecutor(3) as pool:
        modules = [future.result(120) for future in [pool.submit(load_generated, "once", source) for _ in range(3)]]
    assert len(compiled) == 1
    assert {int(module.f(np.int64(1))) for module in modules} == {12346}


def test_who_waits_for_anothers_compile_can_be_stopped(cache: Path) -> None:
    source = _GOOD.format("+ 54321")
    path = write_generated("stopped", source)
    with codecache._one_of_the_host(path), ThreadPoolExecutor(1) as pool:

        def load() -> None:
            with watched_compiles(lambda: True):
                load_generated("stopped", source)

        with pytest.raises(CompileStopped):
            pool.submit(load).result(60)
