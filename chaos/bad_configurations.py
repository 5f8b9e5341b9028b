"""Bad configurations: a node under load is given a hundred, by hand in the store, and has to refuse every one and run on.

    python -m tickmesh.chaos.bad_configurations --store consul --count 100 --seed 1

prints one JSON object: what was tried, how each was refused, and what the checker says of the output stream and the journal afterwards.
Servers and node are started on free loopback ports, with data in a temporary folder, and ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nats.errors
import nats.js.errors as js_errors

from tickmesh.chaos.checker import check_stream
from tickmesh.control.config_store import Keys
from tickmesh.ops.servers import ConsulServer, ConsulServerOptions, NatsServer, NatsServerOptions
from tickmesh.transports.nats import Login, NatsLink, connect

_READY_S = 300.0
_ANSWER_S = 200.0
"""Code that does not compile is found out by compiling the whole loop."""
_LOOK_S = 0.02
_CALCULATION = """\
from tickmesh.node.calculation import calculation

@calculation(inputs="trade", state=[("total", "f8")])
def flow(event, state):
    state.total += event.qty
    return state.total
"""
_GOOD = {
    "cluster": "instruments_max = 1024\norders_max = 65536\n",
    "data_sources": '[market]\ntype = "simulator"\nsymbols = ["ALFA", "BRVO", "CHRL"]\nrate = 20000\npace = "realtime"\n',
    "processing": '[calculations.fast]\nuse = "ema"\nwindow = 10\n[calculations.mine]\nuse = "flow.py:flow"\n',
    "risk": "max_qty = 1000\n",
    "journal": "segment_mb = 1\n",
    "logging": "",
}


@dataclass(frozen=True)
class Edit:
    """A bad edit: keys below ``config/`` and their values, None: the key is removed."""

    kind: str
    values: tuple[tuple[str, bytes | None], ...]


def bad_edits(count: int, seed: int) -> Iterator[Edit]:
    """Bad edits of every kind, in an order that `seed` makes."""
    rng = random.Random(seed)
    kinds = [_wrong_type, _unknown_key, _bad_code, _too_large, _binary, _empty, _deleted, _half, _no_toml, _impossible]
    for number in range(count):
        yield kinds[number % len(kinds)](rng)


def _wrong_type(rng: random.Random) -> Edit:
    value = rng.choice(['"many"', "true", "[1, 2]", "{a = 1}", "1979-05-27", "nan"])
    section, key = rng.choice([("risk", "max_qty"), ("cluster", "instruments_max"), ("journal", "segment_mb")])
    return Edit("wrong type", ((section, f"{key} = {value}\n".encode()),))


def _unknown_key(rng: random.Random) -> Edit:
    section, key = rng.choice([("risk", "max_qyt"), ("journal", "keep_days"), ("processing", "calculation"), ("nonsense", "a")])
    return Edit("unknown key", ((section, f"{key} = {rng.randrange(100)}\n".encode()),))


def _bad_code(rng: random.Random) -> Edit:
    body = rng.choice([
        _CALCULATION.replace("return state.total", "return state.totals"),
        _CALCULATION.replace("def flow(event, state):", "def flow(event, state)"),
        _CALCULATION.replace("state.total += event.qty", "state.total += open('/etc/passwd')"),
        "raise RuntimeError('at import')\n",
        "import no_such_package\n" + _CALCULATION,
        _CALCULATION.replace("flow", "other"),
    ])  # fmt: skip
    return Edit("bad code", (("code/flow.py", body.encode()),))


def _too_large(rng: random.Random) -> Edit:
    return Edit("600 KiB", (("risk", b"# " + b"x" * (600 << 10) + b"\nmax_qty = 1\n"),))


def _binary(rng: random.Random) -> Edit:
    return Edit("binary", ((rng.choice(["risk", "processing", "data_sources"]), rng.randbytes(rng.randrange(1, 3000)) + b"\xff"),))


def _empty(rng: random.Random) -> Edit:
    return Edit("empty", (("data_sources", b""),))  # a node without a source; other sections may be empty


def _deleted(rng: random.Random) -> Edit:
    return Edit("deleted", ((rng.choice(["risk", "processing", "data_sources", "cluster", "code/flow.py"]), None),))


def _half(rng: random.Random) -> Edit:
    """What would be good together with a second edit that never comes: a calculation without its code, an alert on nothing."""
    more = rng.choice(['[calculations.more]\nuse = "more.py:more"\n', '[alerts.a]\nuse = "threshold"\nof = "later"\nabove = 1\n'])
    text = _GOOD["processing"] + more
    return Edit("half a transaction", (("processing", text.encode()),))


def _no_toml(rng: random.Random) -> Edit:
    return Edit("no TOML", (("risk", rng.choice([b"max_qty 5\n", b"[[[\n", b'max_qty = "5\n', b"max_qty = 5\nmax_qty = 6\n"])),))


def _impossible(rng: random.Random) -> Edit:
    section, text = rng.choice([
        ("risk", "max_qty = -1\n"), ("processing", '[calculations.fast]\nuse = "ema"\nwindow = 0\n'),
        ("processing", '[calculations.fast]\nuse = "emma"\n'), ("cluster", "shards = 2\ninstruments_max = 1024\norders_max = 65536\n"),
    ])  # fmt: skip
    return Edit("impossible", ((section, text.encode()),))


# ---------------------------------------------------------------- the cluster


class _Store:
    """Raw keys, as a person's tool writes them: no check of ours is in between."""

    def __init__(self, kind: str, consul: ConsulServer | None, link: NatsLink, keys: Keys) -> None:
        self._kind, self._consul, self._link, self._keys = kind, consul, link, keys

    async def put(self, name: str, value: bytes) -> str:
        """Empty, or why the store itself refuses."""
        key = self._keys.config + name
        if self._consul is not None:
            return await asyncio.to_thread(self._http, "PUT", key, value)
        try:
            await (await self._bucket()).put(_subject(key), value)
        except (nats.errors.Error, js_errors.Error, ValueError) as error:
            return str(error) or type(error).__name__
        return ""

    async def delete(self, name: str) -> str:
        """As :meth:`put`."""
        if self._consul is not None:
            return await asyncio.to_thread(self._http, "DELETE", self._keys.config + name, b"")
        await (await self._bucket()).delete(_subject(self._keys.config + name))
        return ""

    async def status(self) -> dict[str, Any]:
        """What the node says of itself; empty if it has said nothing."""
        key = self._keys.status("n1")
        with contextlib.suppress(urllib.error.URLError, nats.errors.Error, js_errors.Error, ValueError):
            if self._consul is not None:
                raw = await asyncio.to_thread(self._get, key)
            else:
                raw = (await (await self._bucket()).get(_subject(key))).value or b""
            found: dict[str, Any] = json.loads(raw)
            return found
        return {}

    async def _bucket(self) -> Any:
        return await self._link.client.jetstream().key_value("tickmesh")

    def _http(self, method: str, key: str, value: bytes) -> str:
        assert self._consul is not None
        request = urllib.request.Request(f"{self._consul.url}/v1/kv/{key}", value, method=method)
        try:
            with urllib.request.urlopen(request, timeout=10):
                return ""
        except urllib.error.HTTPError as error:
            return f"{error.code} {error.read().decode(errors='replace').strip()}"
        except urllib.error.URLError as error:  # it hangs up in the middle of what is too large
            return str(error.reason)

    def _get(self, key: str) -> bytes:
        assert self._consul is not None
        with urllib.request.urlopen(f"{self._consul.url}/v1/kv/{key}?raw", timeout=10) as answer:
            found: bytes = answer.read()
            return found


def _subject(key: str) -> str:
    return key.replace(".", "=2E").replace("/", ".")


@contextmanager
def _node(folder: Path, text: str) -> Iterator[subprocess.Popen[bytes]]:
    own = folder / "own.toml"
    own.write_text(text)
    with (folder / "node.log").open("w") as log:
        command = [sys.executable, "-m", "tickmesh.ops.cli", "node", "run", "--config", str(own)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()  # killed, it would leave its memory in /dev/shm
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()


async def _until(condition: Any, limit_s: float) -> bool:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if await condition():
            return True
        await asyncio.sleep(_LOOK_S)
    return False


# ---------------------------------------------------------------- the run


async def run(kind: str, count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Give a node `count` bad configurations in a store of a kind, ``consul`` or ``nats``; see the module."""
    cluster = f"bad-{os.getpid()}"  # several may run at a time
    keys = Keys(cluster)
    with ExitStack() as stack:
        server = stack.enter_context(NatsServer(NatsServerOptions(folder / "nats")))
        consul = stack.enter_context(ConsulServer(ConsulServerOptions(folder / "consul"))) if kind == "consul" else None
        address = f"127.0.0.1:{consul.port}" if consul else server.url
        own = f'[cluster]\nname = "{cluster}"\nnode = "n1"\ndata_dir = "{folder}/data"\n[store]\nkind = "{kind}"\naddress = "{address}"\n'
        process = stack.enter_context(_node(folder, own))
        link = await connect(server.url, login=Login())
        try:
            store = _Store(kind, consul, link, keys)
            await _begin(store, server.url, process, folder)
            rows = [await _try(store, process, edit, server.url) for edit in bad_edits(count, seed)]
            process.terminate()
            code = await asyncio.to_thread(process.wait, 60)
            report = await check_stream(link, cluster, 0, folder / "data" / "journal" / "n1" / "shard-0", expected=1)
        finally:
            await link.close()
    wrong = [row for row in rows if row["outcome"] not in ("refused", "refused by the store")]
    kinds, outcomes = (dict(Counter(row[name] for row in rows)) for name in ("kind", "outcome"))
    return {
        "store": kind, "tried": len(rows), "by_kind": kinds, "outcomes": outcomes, "wrong": wrong, "node_ran_on": code == 0,
        "checker": str(report), "good": report.good and code == 0 and not wrong,
    }  # fmt: skip


def _good(url: str) -> dict[str, bytes]:
    """By key; the sources last, since a node begins as soon as it has one, and some of the other keys cannot change after that."""
    delivery = f'[events]\nmethod = "nats"\ntarget = "{url}"\n'
    found = {name: text.encode() for name, text in {**_GOOD, "delivery": delivery, "code/flow.py": _CALCULATION}.items()}
    return {name: found[name] for name in sorted(found, key=lambda name: name == "data_sources")}


async def _begin(store: _Store, url: str, process: subprocess.Popen[bytes], folder: Path) -> None:
    async def runs() -> bool:
        if process.poll() is not None:
            raise RuntimeError("the node has ended: " + (folder / "node.log").read_text())
        status = await store.status()
        return bool(status.get("version")) and status.get("refused") is None

    async def written() -> bool:
        return not [reason for name, value in _good(url).items() if (reason := await store.put(name, value))]

    if not await _until(written, 30) or not await _until(runs, _READY_S):
        raise RuntimeError("the node does not run: " + (folder / "node.log").read_text())


async def _try(store: _Store, process: subprocess.Popen[bytes], edit: Edit, url: str) -> dict[str, Any]:
    """Make a bad edit, see what becomes of it, and take it back."""
    before = await store.status()
    row: dict[str, Any] = {"kind": edit.kind, "keys": [name for name, _ in edit.values]}
    for name, value in edit.values:
        refused = await (store.delete(name) if value is None else store.put(name, value))
        if refused:
            return {**row, "outcome": "refused by the store", "reasons": [refused[:200]]}

    async def answered() -> bool:
        status = await store.status()
        return process.poll() is not None or status.get("version") != before["version"] or status.get("refused") is not None

    known = await _until(answered, _ANSWER_S)
    status = await store.status()
    if process.poll() is not None:
        row["outcome"] = "the node ended"
    elif not known:
        row["outcome"] = "no answer"
    elif status.get("refused") is None or not status["refused"]["reasons"]:
        row["outcome"] = "applied"
    else:
        row |= {"outcome": "refused", "reasons": [reason[:200] for reason in status["refused"]["reasons"]]}
    await _take_back(store, edit, url)
    return row


async def _take_back(store: _Store, edit: Edit, url: str) -> None:
    good = _good(url)

    async def well() -> bool:
        return (await store.status()).get("refused") is None

    for name, _ in edit.values:
        await (store.put(name, good[name]) if name in good else store.delete(name))
    await _until(well, _ANSWER_S)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 if every bad configuration was refused and nothing else happened."""
    parser = argparse.ArgumentParser(description="Give a node under load bad configurations.")
    parser.add_argument("--store", choices=("consul", "nats"), default="nats")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="tickmesh-bad-") as folder:
        result = asyncio.run(run(options.store, options.count, options.seed, Path(folder)))
    print(json.dumps(result, indent=1))
    return 0 if result["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
