"""The hot loops allocate nothing: no call of numba's runtime (reference counts, memory) is in the code that they are compiled to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_COMPILE = """
import sys
from pathlib import Path
from tickmesh.node.decoder import decoder_source
from tickmesh.node.loops import live_loop, receive_loop, replay_loop, step_loop
from tickmesh.node.pipeline import make_plan
from tickmesh.node.protocol import load_framing, load_spec
from tickmesh.node.shard import generate
from tickmesh.control.config import parse_config
from tickmesh.transports import codecache

codecache.compile_in_helper = lambda path, argument: None  # here, in this process: what comes from the cache cannot be looked at
modules = {}


def load(prefix, source):
    modules[prefix] = codecache.load_generated(prefix, source)
    return modules[prefix]


plan = make_plan(parse_config(sys.argv[1]), Path())
shard = codecache.import_generated(codecache.write_generated("shard_parts", generate(plan)))
modules["shard"] = step_loop(shard)
for name, framing in (("itch50", "binaryfile"), ("itch50", "moldudp64"), ("dbn_mbo", "dbn")):
    load(f"decoder_{name}_{framing}", decoder_source(load_spec(name), load_framing(framing)))
modules["live"] = live_loop(shard, 2, 256)
modules["replay"] = replay_loop(modules["decoder_itch50_binaryfile"], shard, timers=True)
modules["receive"] = receive_loop(modules["decoder_itch50_moldudp64"], 2, 2)
for entry in sys.argv[3:]:
    prefix, _, name = entry.rpartition(".")
    loop = getattr(modules[prefix], name)
    (Path(sys.argv[2]) / f"{entry}.s").write_text("\\n".join(loop.inspect_asm(signature) for signature in loop.signatures))
"""
ENTRY_POINTS = {
    "shard.step", "decoder_itch50_binaryfile.decode_stream", "decoder_itch50_moldudp64.decode_packets",
    "decoder_itch50_moldudp64.decode_flush", "decoder_dbn_mbo_dbn.decode_stream", "live.run", "replay.replay", "receive.receive",
}  # fmt: skip
PLAN = """
[processing.calculations.average]
use = "ema"
[processing.calculations.bands]
use = "bollinger"
of = "bbo.mid"
[processing.bars.minutes]
[processing.alerts.jump]
of = "average"
above = 10.0
[risk]
enabled = true
"""
"""One of each: of trades, of the best bid and offer, bars, an alert."""


def allocating(assembly: str) -> set[str]:
    """Names in a piece of assembly that belong to numba's runtime, to malloc and its like, or to the Python interpreter."""
    called = set(re.findall(r"\b(?:call\w*|jmp|movabsq)\s+[$]?([A-Za-z_][\w.$@]*)", assembly))
    return {name for name in called if re.search(r"NRT_|malloc|calloc|realloc|PyObject|PyMem|PyErr_New", name)}


def functions_of(assembly: str) -> dict[str, str]:
    """Compiled functions by name: the loop and what stays out of line. The wrappers through which Python calls are no part of it."""
    found = re.findall(r"^([^\s.#][^\s:]*):\s*\n(.*?)^\.Lfunc_end", assembly, re.MULTILINE | re.DOTALL)
    return {name: body for name, body in found if not name.startswith(("_ZN7cpython", "cfunc.", "NRT_"))}


def test_the_search_finds_an_allocation() -> None:
    """An ordinary function that makes an array is caught, so that silence means something."""
    script = (
        "from numba import njit\nimport numpy as np\n\n@njit\ndef make(n):\n    return np.zeros(n)\n\nmake(3)\n"
        "print(make.inspect_asm(make.signatures[0]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    (body,) = functions_of(done.stdout).values()
    assert any("NRT_" in name for name in allocating(body))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_hot_loops_allocate_nothing(tmp_path: Path) -> None:
    assembly = tmp_path / "assembly"
    assembly.mkdir()
    environment = {**os.environ, "TICKMESH_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", _COMPILE, PLAN, str(assembly), *sorted(ENTRY_POINTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {path.stem: path.read_text() for path in assembly.glob("*.s")}
    assert found.keys() == ENTRY_POINTS
    for name, text in found.items():
        functions = functions_of(text)
        assert sum(len(body) for body in functions.values()) > 1000, name
        for function, body in functions.items():
            assert allocating(body) == set(), (name, function)
