"""Benchmark: changes of a running node's configuration under load. There is no peer: nobody else changes compiled code while it runs.

A simulated market goes through a real node into a real nats-server. Parameters change again and again, then code: a calculation that was
not there is compiled while the old code runs, and takes over; then filters, which hand over without a compile. Each is timed from the
call of :meth:`Node.apply` to its return, when every shard has taken it. In the end the journal says whether an output is missing.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from tickmesh.control.config import parse_config
from tickmesh.node.frames import stream_name
from tickmesh.node.journal_replay import replay_journal
from tickmesh.node.process import Node
from tickmesh.ops.servers import NatsServer, NatsServerOptions
from tickmesh.ops.up import GENERATORS

_CODE = """\
from tickmesh.node.calculation import calculation


@calculation(inputs="trade", state=[("sum", "f8")])
def flow_{unique}(event, state, *, decay: float = 0.9):
    state.sum = state.sum * decay + (1.0 if event.side == 0 else -1.0)
    return state.sum
"""
_SETTLE_S = 60.0


def bench_config(*, parameters: int = 200, filters: int = 50, rate: int = 20_000, shards: int = 1) -> dict[str, Any]:
    """Measure changes of configuration; returns plain data.

    Args:
        parameters: changes of parameters.
        filters: hand-overs without a compile.
        rate: messages per second of the simulated market.
        shards: of the node.

    Returns:
        ``{"parameters_ms": {"p50", "p99", "max"}, "new_code_s": seconds from the call to the hand-over, compile included,
        "new_code_compiled_s": the same with the code in the cache, "pause_us": {"p50", "p99", "max"} of a shard without a loop at a
        hand-over, "changes", "outputs", "lost": outputs of the journal that the streams lack, "doubled"}``.
    """
    with tempfile.TemporaryDirectory(prefix="tickmesh-bench-") as folder, NatsServer(NatsServerOptions(Path(folder) / "nats")) as server:
        return _measure(Path(folder), server.url, parameters, filters, rate, shards)


def _text(folder: Path, name: str, rate: int, shards: int) -> str:
    demo = (resources.files("tickmesh.ops") / "demo.toml").read_text()
    processing = demo[demo.index("[processing]") : demo.index("[delivery.")]
    symbols = ", ".join(f'"S{number:03d}"' for number in range(50))
    return (
        f'[cluster]\nname = "{name}"\nshards = {shards}\ndata_dir = "{folder / "data"}"\n{processing}\n'
        f'[data_sources.market]\ntype = "simulator"\nsymbols = [{symbols}]\nrate = {rate}\npace = "realtime"\n'
        '[delivery.events]\nmethod = "nats"\n'
    )


def _measure(folder: Path, url: str, parameters: int, filters: int, rate: int, shards: int) -> dict[str, Any]:
    name, unique = f"b{secrets.token_hex(4)}", secrets.token_hex(4)
    text, file = _text(folder, name, rate, shards), folder / "node.toml"
    (folder / "flow.py").write_text(_CODE.format(unique=unique))
    node, pauses, times, version = Node(parse_config(text, file=file), GENERATORS, {"events": url}), [], [], 0
    try:
        node.start()
        node.expect_changes()

        def apply(changed: str) -> float:
            nonlocal version
            version += 1
            config, begun = parse_config(changed, file=file), time.perf_counter()
            node.apply(config, version)
            node.check()
            return time.perf_counter() - begun

        times += [apply(text.replace("window = 10\n", f"window = {11 + number}\n")) * 1000 for number in range(parameters)]
        with_code = text + f'[processing.calculations.mine]\nuse = "flow.py:flow_{unique}"\n'
        new_code_s = apply(with_code)
        pauses += [thread.pause_ns for thread in node.shards]
        apply(text)
        again_s = apply(with_code)
        for number in range(filters):
            symbols = 'symbols = ["S00*"]\n' if number % 2 == 0 else ""
            apply(with_code.replace('use = "book_imbalance"\n', f'use = "book_imbalance"\n{symbols}'))
            pauses += [thread.pause_ns for thread in node.shards]
    finally:
        node.stop()
    made, lost, doubled = _compared(node, url, name)
    return {
        "parameters_ms": _spread(times),
        "new_code_s": new_code_s,
        "new_code_compiled_s": again_s,
        "pause_us": _spread([pause / 1000 for pause in pauses]),
        "changes": version,
        "outputs": made,
        "lost": lost,
        "doubled": doubled,
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"p50": float(np.percentile(values, 50)), "p99": float(np.percentile(values, 99)), "max": max(values)}


def _compared(node: Node, url: str, name: str) -> tuple[int, int, int]:
    """Outputs that the journals make; those that the streams lack, and have twice."""
    import asyncio

    made = sum(int(replay_journal(journal.folder)["outputs_total"]) for journal in node.journals)
    found = [asyncio.run(_sequences(url, name, thread.number, int(thread.shard.arrays.core["out_seq"][0]))) for thread in node.shards]
    once = sum(len(np.unique(sequences)) for sequences in found)
    return made, made - once, sum(len(sequences) for sequences in found) - once


async def _sequences(url: str, name: str, shard: int, last: int) -> np.ndarray[Any, Any]:
    """Output sequences of every frame in a shard's stream, as it holds them."""
    from tickmesh.node.frames import HEADER_SIZE, decode_frame
    from tickmesh.transports.nats import connect

    link = await connect(url)
    try:
        jetstream, found = link.client.jetstream(), []
        state = (await jetstream.stream_info(stream_name(name, shard))).state
        for sequence in range(state.first_seq, state.last_seq + 1):
            data = (await jetstream.get_msg(stream_name(name, shard), sequence)).data or b""
            if len(data) >= HEADER_SIZE:
                found.append(decode_frame(data)[1]["seq"].copy())
        return np.concatenate(found) if found else np.zeros(0, np.uint64)
    finally:
        await link.close()
