"""The same inputs give the same outputs, to the bit: replayed from a journal, in batches of any size, held up, in another process."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replays import BINANCE, ES, OKX, all_events, config_of, line_of, recording
from shard_twin import PLAN

from tickmesh.control.config import Config, parse_config
from tickmesh.node.event import ALL_INSTRUMENTS, ANY_VIEW, EVENT, EventArray, Flag, Kind
from tickmesh.node.journal import Journal, JournalReader
from tickmesh.node.pipeline import make_shards
from tickmesh.node.replay import replay
from tickmesh.transports.ring import Ring

RECORDINGS = {"es": ("dbn_mbo", ES), "binance": ("binance", BINANCE)}
EVENTS_MAX = 40_000
ORDER_IDS = "random"


def config_for(name: str) -> Config:
    data_format, _ = RECORDINGS[name]
    return config_of(data_format, more=PLAN)


def with_rare_events(events: EventArray) -> EventArray:
    """Real events with the kinds that recordings of a few seconds lack: timers, halts, a gap, a change of parameters."""
    parts = []
    for first in range(0, len(events), 997):
        piece = events[first : first + 997]
        rare = np.zeros(5, EVENT)
        rare["kind"] = (Kind.TIMER, Kind.STATUS, Kind.STATUS, Kind.GAP, Kind.CONFIG)
        rare["instrument"] = (ALL_INSTRUMENTS, 0, 0, ALL_INSTRUMENTS, ALL_INSTRUMENTS)
        rare["aux"] = (0, 2, 1, first + 3, first & 1)
        rare["ts_event"] = rare["ts_recv"] = piece[-1]["ts_event"]
        parts += [piece, rare[: 5 if first // 997 % 7 == 3 else 3]]
    return np.concatenate(parts)


class Loop:
    """A shard with the full plan and its outputs."""

    def __init__(self, config: Config, ring: Ring | None = None) -> None:
        self.ring = ring or Ring.create(None, 1 << 16, EVENT, mode="lossy")
        self.reader = self.ring.reader("test")
        (self.shard,) = make_shards(config, [self.ring], Path(), ORDER_IDS)

    def run(self, events: EventArray, size: Callable[[], int] = lambda: 256, read: Callable[[], int] = lambda: 1 << 16) -> bytes:
        """All outputs of some events, stepped `size()` at a time, at most `read()` outputs taken after each step."""
        batch, outputs, first, idle = events.copy().view(ANY_VIEW), [], 0, 0
        taken = np.zeros(0, EVENT)
        while first < len(batch) or len(taken):
            end = min(first + size(), len(batch))
            done = self.shard.step(batch, first, end)
            first += done
            taken = self.reader.read(read())
            outputs.append(taken.tobytes())
            idle = 0 if done or len(taken) else idle + 1
            assert idle < 10, "no progress"
        return b"".join(outputs)


@pytest.fixture(scope="module", params=sorted(RECORDINGS))
def recorded(request: pytest.FixtureRequest) -> tuple[str, EventArray, bytes]:
    """Name, input events and outputs of a recording."""
    data_format, path = RECORDINGS[request.param]
    line = line_of(config_of(data_format), recording(path))
    events = with_rare_events(all_events(line.reader)[:EVENTS_MAX])
    outputs = Loop(config_for(request.param)).run(events)
    kinds = set(np.frombuffer(outputs, EVENT)["kind"].tolist())
    assert {Kind.BBO, Kind.TRADE, Kind.SIGNAL, Kind.REFERENCE, Kind.GAP, Kind.STATUS} <= kinds
    if request.param == "binance":
        assert {Kind.ALERT, Kind.BAR, Kind.INTENT, Kind.RISK} <= kinds
    return request.param, events, outputs


def test_outputs_are_numbered_without_a_hole(recorded: tuple[str, EventArray, bytes]) -> None:
    outputs = np.frombuffer(recorded[2], EVENT)
    assert np.array_equal(outputs["seq"], np.arange(1, len(outputs) + 1))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_size_of_batches_does_not_matter(recorded: tuple[str, EventArray, bytes], size: int) -> None:
    name, events, outputs = recorded
    short = events[:9000] if size == 1 else events
    found = Loop(config_for(name)).run(short, lambda: size)
    assert found == outputs[: len(found)]
    assert len(found) == len(outputs) or size == 1


def test_a_blocked_output_ring_does_not_matter(recorded: tuple[str, EventArray, bytes]) -> None:
    name, events, outputs = recorded
    rng = np.random.default_rng(5)
    ring = Ring.create(None, 64, EVENT, mode="lossless")
    loop = Loop(config_for(name), ring)
    found = loop.run(events, lambda: int(rng.integers(1, 400)), lambda: int(rng.integers(0, 64)))
    assert int(loop.shard.arrays.core[0]["blocked"]) > 100
    assert found == outputs


def journalled(events: EventArray, folder: Path) -> EventArray:
    """Events written to a journal and read back."""
    with Journal.create(folder, 0, segment_records=4096, sync="none") as journal:
        for first in range(0, len(events), 300):
            assert journal.append(events[first : first + 300]) == len(events[first : first + 300])
    return np.concatenate([batch.copy() for batch in JournalReader(folder).batches()])


def test_replay_of_the_journal_is_bit_identical(recorded: tuple[str, EventArray, bytes], tmp_path: Path) -> None:
    name, events, outputs = recorded
    again = journalled(events, tmp_path / "journal")
    assert again.tobytes() == events.tobytes()
    assert Loop(config_for(name)).run(again) == outputs


_OTHER_PROCESS = """
import hashlib, sys
from pathlib import Path
import numpy as np
from test_determinism import Loop, config_for
from tickmesh.node.journal import JournalReader
events = np.concatenate([batch.copy() for batch in JournalReader(Path(sys.argv[2])).batches()])
print(hashlib.sha256(Loop(config_for(sys.argv[1])).run(events)).hexdigest())
"""


def test_replay_in_another_process_is_bit_identical(recorded: tuple[str, EventArray, bytes], tmp_path: Path) -> None:
    name, events, outputs = recorded
    journalled(events, tmp_path / "journal")
    command = [sys.executable, "-c", _OTHER_PROCESS, name, str(tmp_path / "journal")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    assert done.stdout.strip() == hashlib.sha256(outputs).hexdigest(), done.stderr


# ---------------------------------------------------------------- several shards


def per_instrument(summary: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = summary["instruments"]
    return found


def test_three_shards_give_what_one_gives() -> None:
    found = []
    for shards in (1, 3):
        outputs: dict[str, list[bytes]] = {}

        def keep(_: int, events: EventArray, outputs: dict[str, list[bytes]] = outputs) -> None:
            for event in events:
                plain = event.copy()
                plain["seq"] = 0  # numbered per shard
                if plain["kind"] not in (Kind.RISK, Kind.TIMER):  # the one names its intent by that number, the other is every shard's
                    outputs.setdefault(str(plain["instrument"]), []).append(plain.tobytes())

        config = config_of("okx", more=PLAN + f"[cluster]\nshards = {shards}\n")
        found.append((replay(config, [recording(OKX)], observe=keep), outputs))
    (one, one_outputs), (three, three_outputs) = found
    assert per_instrument(one) == per_instrument(three)
    assert one["events"] == three["events"]
    assert one_outputs == three_outputs


def test_three_shards_split_the_instruments() -> None:
    config = parse_config(config_text_of_three())
    assert config.cluster.shards == 3
    line = line_of(config, recording(OKX))
    places = set()
    for symbol in ("BTC-USD-220527", "UNI-USD-SWAP", "BTC-USDT"):
        all_events(line.reader)
        places.add(int(line.table.record(line.table.find(symbol) or 0)["shard"]))
    assert places == {0, 1, 2}


def config_text_of_three() -> str:
    placed = '[cluster]\nshards = 3\nshard_overrides = { "BTC-USD-220527" = 0, "UNI-USD-SWAP" = 1, "BTC-USDT" = 2 }\n'
    return f'[data_sources.feed]\ntype = "file"\npath = "x"\ndata_format = "okx"\n{PLAN}{placed}'


def test_flags_of_whole_source_events() -> None:
    """A gap of the whole source makes every book of it stale, until it is cleared."""
    line = line_of(config_of("okx", more=PLAN), recording(OKX))
    line.step(all_events(line.reader))
    gap = np.zeros(1, EVENT)
    gap["kind"], gap["instrument"], gap["id"], gap["aux"] = Kind.GAP, ALL_INSTRUMENTS, 5, 9
    outputs = line.step(gap)
    assert outputs[0]["kind"] == Kind.GAP
    bbos = outputs[outputs["kind"] == Kind.BBO]
    assert sorted(bbos["instrument"].tolist()) == [0, 1, 2]
    assert np.all(bbos["flags"] & Flag.STALE)
    assert line.shards[0].gaps() == [(5, 9)]
