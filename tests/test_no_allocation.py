"""The hot loops allocate nothing: no call of numba's runtime (reference counts, memory) is in the machine code that runs.

The code is what lies in the cache, shared with other tests: nothing is compiled here that was not compiled for its own use.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import shard_twin
from machine_code import kept_machine_code, references_of
from nodes import PROCESSING

from tickmesh.control.config import parse_config
from tickmesh.node.decoder import decoder_source
from tickmesh.node.fix_feed import load_fix_decoder
from tickmesh.node.loops import live_loop, receive_loop, replay_loop, step_loop
from tickmesh.node.pipeline import make_plan
from tickmesh.node.protocol import load_framing, load_spec
from tickmesh.node.shard import BATCH_EVENTS, generate
from tickmesh.transports import codecache

_ENTRY_POINTS = """
import sys
sys.path.insert(0, {tests!r})
import test_no_allocation as t
for name, found in t.entry_points().items():
    for function, symbols in found.items():
        print(name, function.replace(" ", "_"), *sorted(s.replace(" ", "_") for s in symbols if s))
"""
ENTRY_POINTS = {
    "shard.step", "decoder_itch50_binaryfile.decode_stream", "decoder_itch50_moldudp64.decode_packets",
    "decoder_itch50_moldudp64.decode_flush", "decoder_dbn_mbo_dbn.decode_stream", "decoder_fix.decode_stream",
    "live.run", "replay.replay", "receive.receive", "receive_afxdp.receive", "receive_packet.receive",
}  # fmt: skip


def _shard(plan: str) -> ModuleType:
    return codecache.import_generated(codecache.write_generated("shard_parts", generate(make_plan(parse_config(plan), Path()))))


def entry_points() -> dict[str, dict[str, set[str]]]:
    """Every hot loop: the twin test's shard, which has one of everything, the demonstration's node and its replay, decoders."""
    with kept_machine_code():
        demo = _shard(PROCESSING)
        modules = {"shard": step_loop(_shard(shard_twin.PLAN)), "live": live_loop(demo, 1, BATCH_EVENTS)}
        for name, framing in (("itch50", "binaryfile"), ("itch50", "moldudp64"), ("dbn_mbo", "dbn")):
            prefix = f"decoder_{name}_{framing}"
            modules[prefix] = codecache.load_generated(prefix, decoder_source(load_spec(name), load_framing(framing)))
        modules["decoder_fix"] = load_fix_decoder()
        modules["replay"] = replay_loop(modules["decoder_itch50_binaryfile"], demo, timers=True)
        modules["receive"] = receive_loop(modules["decoder_itch50_moldudp64"], 2, 1)
        for way in ("afxdp", "packet"):
            modules[f"receive_{way}"] = receive_loop(modules["decoder_itch50_moldudp64"], 1, 1, way=way, rerequests=True)
    found = {}
    for entry in ENTRY_POINTS:
        prefix, _, name = entry.rpartition(".")
        found[entry] = references_of(getattr(modules[prefix], name))
    return found


def allocating(symbols: set[str]) -> set[str]:
    """Those that belong to numba's runtime, to malloc and its like, or to the Python interpreter."""
    return {name for name in symbols if re.search(r"NRT_|malloc|calloc|realloc|PyObject|PyMem|PyErr_New", name)}


_ALLOCATES = """
from numba import njit
import numpy as np

@njit(cache=True)
def make(n):
    return np.zeros(n)
"""


def test_the_search_finds_an_allocation(tmp_path: Path) -> None:
    """An ordinary function that makes an array is caught, so that silence means something."""
    (tmp_path / "allocates.py").write_text(_ALLOCATES)
    subprocess.run([sys.executable, "-c", "import allocates; allocates.make(3)"], check=True, cwd=tmp_path)
    look = (
        f"import sys; sys.path.append({str(Path(__file__).parent)!r})\nimport allocates, machine_code as m\n"
        "with m.kept_machine_code():\n    allocates.make(3)\n"
        "for symbols in m.references_of(allocates.make).values():\n    print(*symbols)"
    )
    done = subprocess.run([sys.executable, "-c", look], check=True, cwd=tmp_path, capture_output=True, text=True)
    assert any("NRT_" in name for name in allocating(set(done.stdout.split())))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_hot_loops_allocate_nothing() -> None:
    """In a process of its own: modules that are loaded already would not come from the cache again."""
    script = _ENTRY_POINTS.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {row[0] for row in rows} == ENTRY_POINTS
    for entry, function, *symbols in rows:
        assert allocating(set(symbols)) == set(), (entry, function)
    # what the loops do call is seen, so the search looks at the right place
    assert {"clock_gettime", "usleep"} <= {symbol for row in rows for symbol in row[2:]}
