"""A running node takes other configurations: real nodes, real servers; what comes out is what the journal says, bit for bit."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nats_fixtures import nats_server, own_nats_server  # noqa: F401
from nodes import (  # noqa: F401
    SYMBOLS,
    assert_whole,
    cluster,
    free_endpoints,
    multicast_source,
    node_text,
    outputs_made,
    running,
    simulator_source,
    stream,
    until,
)
from typer.testing import CliRunner

from tickmesh.control.config import parse_config
from tickmesh.node.event import EventArray, Kind
from tickmesh.node.frames import NameHistory, calculations_subject, decode_names, reference_stream_name
from tickmesh.node.journal import Journal
from tickmesh.node.journal_replay import config_event, replay_journal
from tickmesh.node.process import Node
from tickmesh.node.reload import ChangeRefused, ChangeUnderWay
from tickmesh.node.subscription import subscribe
from tickmesh.node.versions import Document, Documents
from tickmesh.ops.cli import app
from tickmesh.ops.servers import NatsServer
from tickmesh.ops.simulated_lines import LineConfig, SimulatedLines, send_lines
from tickmesh.ops.simulator import Simulator, SimulatorConfig
from tickmesh.transports.nats import connect

FLOW = simulator_source(0, pace='"realtime"', rate=20_000)


class Live:
    """A node under load and its configuration's text, of which parts are replaced."""

    def __init__(self, node: Node, text: str, folder: Path, url: str) -> None:
        self.node, self.text, self.folder, self.url, self.version = node, text, folder, url, 0

    def apply(self, *replacements: tuple[str, str]) -> None:
        """Replace parts of the text and apply it as the next version, after some more outputs."""
        text = self.text
        for old, new in replacements:
            assert old in text, old
            text = text.replace(old, new)
        self.more()
        self.node.apply(parse_config(text, file=self.folder / "node.toml"), self.version + 1)
        self.text, self.version = text, self.version + 1

    def more(self, count: int = 300) -> None:
        """Wait until the node has put out some more."""
        before = outputs_made(self.node)

        def done() -> bool:
            self.node.check()
            return outputs_made(self.node) > before + count

        until(done, "more outputs")

    @property
    def journal(self) -> Path:
        return self.node.journals[0].folder


@contextmanager
def live(url: str, name: str, folder: Path, sources: str = FLOW, **more: str) -> Iterator[Live]:
    text = node_text(name, folder / "data", sources, **more)
    with running(parse_config(text, file=folder / "node.toml"), url) as node:
        yield Live(node, text, folder, url)


def assert_replays(one: Live, name: str) -> EventArray:
    """After the end: the stream holds every output once, and the journal gives the very same ones. Returns those of shard 0."""
    for shard, journal in reversed(list(enumerate(one.node.journals))):
        made = outputs_made(one.node, shard)
        outputs, missing = stream(one.url, name, made, shard)
        assert not missing
        assert_whole(outputs, made)
        parts: list[EventArray] = []
        result = replay_journal(journal.folder, observe=lambda events: parts.append(events.copy()))  # noqa: B023
        assert np.concatenate(parts).tobytes() == outputs.tobytes()
        assert result["outputs_total"] == made
        assert [v["version"] for v in result["versions"]][-1] == one.version
    return outputs


def test_parameters_change_at_one_event(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    with live(nats_server.url, cluster, tmp_path) as one:
        arrays = one.node.shards[0].shard.arrays
        one.apply(("window = 10\n", "window = 20\n"))
        assert one.node.shards[0].shard.arrays is arrays, "no other code"
        one.apply(("window = 20\n", "window = 30\n"))
        one.more()
        assert int(one.node.shards[0].shard.arrays.core["config_version"][0]) == 2
    outputs = assert_replays(one, cluster)
    printed = CliRunner().invoke(app, ["replay", str(one.journal), "--json"])
    assert printed.exit_code == 0
    assert json.loads(printed.stdout)["digest"] == hashlib.sha256(outputs.tobytes()).hexdigest()
    assert CliRunner().invoke(app, ["replay", str(one.journal), "--config", "x.toml"]).exit_code == 2
    assert CliRunner().invoke(app, ["replay", str(one.journal / "lock")]).exit_code == 2


def test_a_filter_changes_at_one_event_and_state_goes_on(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    with live(nats_server.url, cluster, tmp_path) as one:
        state = one.node.shards[0].shard.arrays.s0
        one.apply(('use = "book_imbalance"', 'use = "book_imbalance"\nsymbols = ["ALFA"]'))
        assert one.node.shards[0].shard.arrays.s0 is state
        one.more(2000)
        pause = one.node.shards[0].pause_ns
    assert 0 < pause < 1_000_000_000
    outputs = assert_replays(one, cluster)
    plan = one.node.shards[0].shard.plan
    index = next(i.index for i in plan.instances if i.name == "imbalance")
    after = replay_journal(one.journal)["versions"][1]["outputs_before"]
    signals = outputs[(outputs["kind"] == Kind.SIGNAL) & (outputs["id"] == index)]
    before, later = signals[signals["seq"] <= after], signals[signals["seq"] > after]
    assert len(np.unique(before["instrument"])) == len(SYMBOLS)
    assert len(np.unique(later["instrument"])) == 1


FLOW_FILE = '''"""Which way the last trades went."""

from tickmesh.node.calculation import calculation


@calculation(inputs="trade", state=[("sum", "f8")])
def mine(event, state, *, decay: float = 0.9):
    state.sum = state.sum * decay + (1.0 if event.side == 0 else -1.0)
    return state.sum{more}
'''
MINE = '[processing.calculations.mine]\nuse = "flow.py:mine"\n[processing.calculations.imbalance]'


@pytest.mark.slow
def test_calculations_come_change_and_go(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """A built-in one goes, a user's comes, its file changes, it goes again; what is unchanged goes on; mistakes change nothing."""
    file = tmp_path / "flow.py"
    file.write_text(FLOW_FILE.format(more=""))
    slow = '[processing.calculations.slow]\nuse = "ema"\nwindow = 100\n'
    with live(nats_server.url, cluster, tmp_path) as one:
        kept = one.node.shards[0].shard.arrays.s0
        one.apply(("[processing.calculations.imbalance]", MINE), (slow, ""))
        shard = one.node.shards[0].shard
        assert [i.name for i in shard.plan.instances] == ["fast", "imbalance", "mine", "second", "trend", "trend_break"]
        assert shard.arrays.s0 is kept
        one.more(1000)
        assert np.isfinite(shard.arrays.last[:, : len(SYMBOLS)]).any(axis=1).all()
        file.write_text(FLOW_FILE.format(more=" + event.no_such_field"))
        with pytest.raises(ChangeRefused, match=r"flow\.py:mine.*no_such_field") as refused:
            one.apply(("window = 10\n", "window = 11\n"))
        assert [reason.path for reason in refused.value.reasons] == ["processing.calculations.mine.use"]
        one.more()
        assert one.node.version == 1
        assert one.node.shards[0].shard.arrays.s0 is kept
        file.write_text(FLOW_FILE.format(more=""))
        fast = "[processing.calculations.fast]"
        one.apply((MINE, "[processing.calculations.imbalance]"), (fast, f"{slow}{fast}"))
        assert [i.name for i in one.node.shards[0].shard.plan.instances] == ["fast", "imbalance", "second", "slow", "trend", "trend_break"]
        assert one.node.shards[0].shard.arrays.s0 is kept
        one.more(1000)
    assert_replays(one, cluster)
    firsts = [v["outputs_before"] + 1 for v in replay_journal(one.journal)["versions"]]
    history = published_names(nats_server.url, cluster)
    assert [("mine" in names.values(), "slow" in names.values()) for _, names in history] == [(False, True), (True, False), (False, True)]
    assert [first for first, _ in history][1:] == firsts[1:]


def published_names(url: str, name: str) -> NameHistory:
    async def read() -> NameHistory:
        link = await connect(url)
        try:
            message = await link.client.jetstream().get_last_msg(reference_stream_name(name), calculations_subject(name, 0))
            return decode_names(message.data or b"")
        finally:
            await link.close()

    return asyncio.run(read())


@pytest.mark.slow
def test_an_edited_file_takes_over_with_a_state_of_its_own(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "flow.py"
    file.write_text(FLOW_FILE.format(more=""))
    processing = ('[processing.calculations.slow]\nuse = "ema"\nwindow = 100\n', "")
    with live(nats_server.url, cluster, tmp_path) as one:
        one.apply(("[processing.calculations.imbalance]", MINE), processing)
        one.more(1000)
        place = next(i.index for i in one.node.shards[0].shard.plan.instances if i.name == "mine")
        before = getattr(one.node.shards[0].shard.arrays, f"s{place}")
        others = one.node.shards[0].shard.arrays.s0
        file.write_text(FLOW_FILE.format(more=" * 2.0"))
        one.apply()
        arrays = one.node.shards[0].shard.arrays
        assert getattr(arrays, f"s{place}") is not before
        assert arrays.s0 is others
        one.more(1000)
    assert_replays(one, cluster)


def test_everything_wrong_is_said_at_once(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    with live(nats_server.url, cluster, tmp_path) as one:
        wrong = (("instruments_max = 1024", "instruments_max = 2048"), ('use = "book_imbalance"', 'use = "nothing_like_it"'))
        with pytest.raises(ChangeRefused) as refused:
            one.apply(*wrong, ("[journal]", "[risk]\nmax_qty = 1\n[journal]"))
        paths = {reason.path for reason in refused.value.reasons}
        assert paths == {"cluster.instruments_max", "processing.calculations.imbalance.use"}
        with pytest.raises(ChangeRefused, match="restart"):
            one.node.try_out(parse_config(one.text.replace("orders_max = 65536", "orders_max = 131072")))
        one.node.try_out(parse_config(one.text))
        one.apply(("[journal]", "[risk]\nkill_switch = true\nmax_qty = 5\n[journal]"))
        limits = one.node.shards[0].shard.arrays.limits[int(one.node.shards[0].shard.arrays.core["parameters"][0])]
        assert limits["kill_switch"] == 1
        with pytest.raises(ChangeRefused, match="not after"):
            one.node.apply(parse_config(one.text), 1)
        one.more()
    assert_replays(one, cluster)


def test_sources_come_and_go(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    second = simulator_source(0, pace='"realtime"', rate=5000, symbols=("OTHR", "MORE"), name="second")
    third = simulator_source(0, pace='"realtime"', rate=5000, symbols=("THRD",), name="third")
    with live(nats_server.url, cluster, tmp_path) as one:
        plain = one.text
        one.apply(("[processing]", f"{second}[processing]"))
        until(lambda: one.node.table.find("OTHR", 1) is not None, "the second source")
        one.more(1000)
        other = one.node.table.find("OTHR", 1)
        one.node.apply(parse_config(plain.replace("[processing]", f"{third}[processing]", 1)), 2)
        until(lambda: one.node.table.find("THRD", 2) is not None, "the third source, under a number of its own")
        one.text, one.version = plain.replace("[processing]", f"{third}[processing]", 1), 2
        one.more(1000)
        assert [receiver.name for receiver in one.node.receivers] == ["market", "third"]
        quote = one.node.shards[0].shard.arrays.statistics[other]["last_bbo"]
        assert quote[1] == quote[3] == 0, "the books of a source that is gone are empty"
        one.apply(("rate = 20000", "rate = 10000"))  # a simulation that changes begins anew
        one.more(1000)
        one.node.mirror()
    outputs = assert_replays(one, cluster)
    assert dict(one.node.document.sources) == {"market": 0, "second": 1, "third": 2}
    assert len(np.unique(outputs["instrument"][outputs["kind"] == Kind.REFERENCE])) == len(SYMBOLS) + 3


def test_deliveries_come_change_and_go(
    nats_server: NatsServer,  # noqa: F811
    own_nats_server: NatsServer,  # noqa: F811
    cluster: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    more = f'[delivery.more]\nmethod = "nats"\ntarget = "{own_nats_server.url}"\n'
    with live(nats_server.url, cluster, tmp_path) as one:
        one.apply(("[delivery.events]", f"{more}[delivery.events]"))
        one.more(2000)
        until(lambda: one.node.gateways["more"].status()[0]["acks"] > 0, "outputs in the second server")
        one.apply(("[delivery.events]\n", '[delivery.events]\nper_event = ["trade"]\nbatch_max_events = 100\n'))
        one.more(2000)
        one.apply((more, ""))
        one.more()
        assert list(one.node.gateways) == ["events"]
        one.node.mirror()
    assert_replays(one, cluster)


def test_thirty_changes_under_load_lose_nothing(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """Parameters and hand-overs in turns; every frame says the version that its outputs were made under."""
    with live(nats_server.url, cluster, tmp_path, cluster_extra="shards = 2") as one:
        changes: list[tuple[str, str]] = []
        for number in range(15):
            changes.append((f"window = {10 + number}\n", f"window = {11 + number}\n"))
            symbols = ("", 'symbols = ["ALFA"]\n') if number % 2 == 0 else ('symbols = ["ALFA"]\n', "")
            changes.append((f'use = "book_imbalance"\n{symbols[0]}', f'use = "book_imbalance"\n{symbols[1]}'))
        for change in changes:
            one.apply(change)
        one.more()
        assert [int(thread.shard.arrays.counts[Kind.CONFIG]) for thread in one.node.shards] == [30, 30]
    outputs = assert_replays(one, cluster)
    versions = replay_journal(one.journal)["versions"]
    assert [v["version"] for v in versions] == list(range(31))
    firsts = {v["version"]: v["outputs_before"] + 1 for v in versions}
    for version, first, last in frames(nats_server.url, cluster, len(outputs)):
        assert firsts[version] <= first
        assert version == 30 or last < firsts[version + 1]


def test_a_restart_in_the_middle_goes_on_under_the_last_version(
    nats_server: NatsServer,  # noqa: F811
    cluster: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    """A multicast source changes without losing a packet; the node restarts through its versions, and changes again."""
    endpoints, stop = free_endpoints(), threading.Event()
    simulator = Simulator(SimulatorConfig(seed=5, symbols=len(SYMBOLS), rate=2000, messages=1_000_000, names=SYMBOLS))
    lines = SimulatedLines(simulator, LineConfig(heartbeat_ns=50_000_000))
    sender = threading.Thread(target=send_lines, args=(lines, endpoints[:1]), kwargs={"stop": stop})
    try:
        with live(nats_server.url, cluster, tmp_path, multicast_source(endpoints, gap_wait_ms=20)) as one:
            sender.start()
            one.apply(('use = "book_imbalance"', 'use = "book_imbalance"\nsymbols = ["ALFA"]'))
            one.apply(("gap_wait_ms = 20", "gap_wait_ms = 50"))
            one.more()
            one.apply(("window = 10\n", "window = 12\n"))
            one.more()
            gaps = int(one.node.shards[0].shard.arrays.counts[Kind.GAP])
            assert gaps == 0, "nothing was missed while the receivers changed"
        made, text = outputs_made(one.node), one.text.replace("window = 100\n", "window = 99\n")
        with running(parse_config(text, file=tmp_path / "node.toml"), nats_server.url) as node:
            again = Live(node, text, tmp_path, nats_server.url)
            again.version = 4  # the file has changed meanwhile: the next version
            assert node.version == 4
            assert outputs_made(node) >= made
            again.apply(("window = 12\n", "window = 13\n"))
            again.apply(('symbols = ["ALFA"]', 'symbols = ["BRVO"]'))
            again.more()
            stop.set()
            sender.join()
    finally:
        stop.set()
    outputs = assert_replays(again, cluster)
    assert np.count_nonzero(outputs["kind"] == Kind.GAP) == 1, "the time without a node"
    assert [v["version"] for v in replay_journal(again.journal)["versions"]] == [0, 1, 2, 3, 4, 5, 6]


def test_a_change_that_a_crash_cut_in_two_is_finished_by_the_restart(
    nats_server: NatsServer,  # noqa: F811
    cluster: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    """One shard's journal has the CONFIG event, the other's has not; both have the document."""
    endpoints, stop = free_endpoints(), threading.Event()
    simulator = Simulator(SimulatorConfig(seed=5, symbols=len(SYMBOLS), rate=2000, messages=1_000_000, names=SYMBOLS))
    sender = threading.Thread(
        target=send_lines, args=(SimulatedLines(simulator, LineConfig(heartbeat_ns=50_000_000)), endpoints[:1]), kwargs={"stop": stop}
    )
    try:
        with live(nats_server.url, cluster, tmp_path, multicast_source(endpoints), cluster_extra="shards = 2") as one:
            sender.start()
            one.more()
        text = one.text.replace('use = "book_imbalance"', 'use = "book_imbalance"\nsymbols = ["ALFA"]')
        config = parse_config(text, file=tmp_path / "node.toml")
        document = Document.of(config, 1, one.node.document.sources)
        for journal in one.node.journals:
            Documents(journal.folder).write(document)
        with Journal.open(one.journal, 0) as journal:
            journal.append(config_event(1, 0, True, 0))
        with running(config, nats_server.url) as node:
            again = Live(node, text, tmp_path, nats_server.url)
            again.version = 1
            assert [thread.version for thread in node.shards] == [1, 1]
            again.more()
            stop.set()
            sender.join()
    finally:
        stop.set()
    assert_replays(again, cluster)


def test_a_journal_without_an_event_keeps_the_version_that_it_begins_under(
    nats_server: NatsServer,  # noqa: F811
    cluster: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    endpoints, stop = free_endpoints(), threading.Event()
    simulator = Simulator(SimulatorConfig(seed=5, symbols=len(SYMBOLS), rate=2000, messages=1_000_000, names=SYMBOLS))
    sender = threading.Thread(
        target=send_lines, args=(SimulatedLines(simulator, LineConfig(heartbeat_ns=50_000_000)), endpoints[:1]), kwargs={"stop": stop}
    )
    with live(nats_server.url, cluster, tmp_path, multicast_source(endpoints)) as one:
        pass
    try:
        text = one.text.replace("window = 10\n", "window = 20\n")
        with running(parse_config(text, file=tmp_path / "node.toml"), nats_server.url) as node:
            again = Live(node, text, tmp_path, nats_server.url)
            again.version = 1
            sender.start()
            again.more()
            stop.set()
            sender.join()
    finally:
        stop.set()
    assert_replays(again, cluster)
    assert [v["version"] for v in replay_journal(again.journal)["versions"]] == [0, 1]


def test_a_source_leaves_out_symbols_and_takes_them_again(
    nats_server: NatsServer,  # noqa: F811
    cluster: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    endpoints, stop = free_endpoints(), threading.Event()
    simulator = Simulator(SimulatorConfig(seed=5, symbols=len(SYMBOLS), rate=2000, messages=1_000_000, names=SYMBOLS))
    sender = threading.Thread(
        target=send_lines, args=(SimulatedLines(simulator, LineConfig(heartbeat_ns=50_000_000)), endpoints[:1]), kwargs={"stop": stop}
    )
    less = ('data_format = "itch50"', 'data_format = "itch50"\nexclude = ["A*"]')
    try:
        with live(nats_server.url, cluster, tmp_path, multicast_source(endpoints, gap_wait_ms=20)) as one:
            sender.start()
            until(lambda: one.node.table.find("ALFA") is not None, "the instruments")
            alfa = one.node.table.find("ALFA")
            one.apply(less)
            until(lambda: statistics(one, alfa)["last_bbo"][1] == 0, "an empty book")
            updates, trades = (int(statistics(one, alfa)[name]) for name in ("bbo_updates", "trades"))
            one.more(1000)
            assert (updates, trades) == tuple(int(statistics(one, alfa)[name]) for name in ("bbo_updates", "trades"))
        with running(parse_config(one.text, file=tmp_path / "node.toml"), nats_server.url) as node:
            again = Live(node, one.text, tmp_path, nats_server.url)
            again.version = 1
            again.more(500)
            updates = int(statistics(again, alfa)["bbo_updates"])  # the gap made it stale
            again.more(500)
            assert (updates, trades) == tuple(int(statistics(again, alfa)[name]) for name in ("bbo_updates", "trades"))
            again.apply((less[1], less[0]))
            until(lambda: statistics(again, alfa)["bbo_updates"] > updates, "quotes of the symbol again")
            assert node.table.find("ALFA") == alfa
            stop.set()
            sender.join()
    finally:
        stop.set()
    assert_replays(again, cluster)


def statistics(one: Live, instrument: int | None) -> Any:
    return one.node.shards[0].shard.arrays.statistics[instrument]


def test_a_change_waits_for_a_shard_that_waits(own_nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """While NATS is away and the output ring is full, a change is accepted; it takes effect when the shard gets on."""
    with live(own_nats_server.url, cluster, tmp_path, cluster_extra="ring_capacity = 1024") as one:
        thread, stop = one.node.shards[0], threading.Event()
        watching = threading.Thread(target=one.node.watch, args=(stop,))
        watching.start()
        try:
            one.more()
            own_nats_server.stop()
            until(still(lambda: outputs_made(one.node) if thread.shard.arrays.core["blocked"][0] else time.monotonic()), "a full ring")
            config = parse_config(one.text.replace("window = 10\n", "window = 20\n"))
            with pytest.raises(ChangeUnderWay):
                one.node.apply(config, 1, wait_s=0.3)
            with pytest.raises(ChangeRefused, match="configuration 1 is accepted and not in force yet"):
                one.node.apply(config, 2, wait_s=0.3)
            own_nats_server.start()
            until(lambda: one.node.version == 1, "the change")
            one.version = 1
            one.node.apply(config, 2)
            one.version = 2
            one.more()
        finally:
            stop.set()
            watching.join()
    assert_replays(one, cluster)


def still(value: Callable[[], object], seconds: float = 0.5) -> Callable[[], bool]:
    """A condition: the value has stayed the same for so long."""
    seen: list[tuple[object, float]] = []

    def look() -> bool:
        now, at = value(), time.monotonic()
        if not seen or seen[-1][0] != now:
            seen.append((now, at))
        return at - seen[-1][1] > seconds

    return look


def frames(url: str, name: str, last: int) -> list[tuple[int, int, int]]:
    """(configuration, first output, last output) of every frame of a stream."""

    async def read() -> list[tuple[int, int, int]]:
        found = []
        async with asyncio.timeout(30), subscribe(url, cluster=name, shard=0, from_sequence="all") as batches:
            async for batch in batches:
                found.append((batch.config_version, batch.first, batch.first + len(batch.events) - 1))
                if found[-1][2] >= last:
                    return found
        return found

    return asyncio.run(read())
