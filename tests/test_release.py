"""The release gate: no output leaves before its inputs are where they have to be, and none stays longer than that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats_fixtures import nats_server  # noqa: F401
from nodes import cluster, node_config, simulator_source, stream  # noqa: F401
from replicas import SHARD, Pair, events, new_journal, pair, until
from test_delivery import outputs as make_events

from tickmesh.node.delivery import DeliveryOptions, Gateway
from tickmesh.node.event import EVENT
from tickmesh.node.journal import Journal
from tickmesh.node.release import Acks, ReleaseGate
from tickmesh.node.release_marks import EVERYTHING, MARKS, make_marks, put_mark_now, take_marks
from tickmesh.node.replication import Leading
from tickmesh.ops.servers import NatsServer
from tickmesh.transports.counters import HISTOGRAM_WORDS
from tickmesh.transports.ring import Ring


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def gate(folder: Path, **more: Any) -> Iterator[tuple[ReleaseGate, Journal, Clock]]:
    """A gate of a journal of 100 events, with a mark after each ten: two outputs for every input."""
    clock = Clock()
    with new_journal(folder, 100) as journal:
        made = ReleaseGate(journal, **{"clock": clock, "solo_after_s": 1.0, "lag_s_max": 5.0, **more})
        for sequence in range(10, 101, 10):
            made.mark(sequence, 2 * sequence)
        yield made, journal, clock


def test_without_acknowledgements_everything_goes(tmp_path: Path) -> None:
    with gate(tmp_path, acks=0) as (made, _, _):
        assert made.released() == int(EVERYTHING)
        assert made.standing == "open"
        assert made.status()["outputs_held"] == 0


@pytest.mark.parametrize("acks", [0, 1])
def test_nothing_leaves_while_it_is_closed(tmp_path: Path, acks: Acks) -> None:
    with gate(tmp_path, acks=acks, solo=False) as (made, _, _):
        made.closed = True
        made.update("a", 100, 0)
        assert made.released() == 0
        made.closed = False
        assert made.released() >= 200


def test_one_standby_is_enough(tmp_path: Path) -> None:
    with gate(tmp_path, acks=1, solo=False) as (made, journal, _):
        assert (made.released(), made.standing) == (0, "held")
        for node, sequence in (("a", 100), ("b", 100)):
            made.update(node, sequence, 0)
        assert made.released() == 200
        made.mark(journal.append(events(100, 50)) + 100, 300)
        made.update("a", 120, 0)
        made.update("b", 110, 0)
        assert (made.released(), made.standing) == (200, "waiting")
        assert made.status()["outputs_held"] == 100
        made.update("b", 150, 90)
        assert made.released() == 300
        status = made.status()
        assert status["standbys"]["b"] == {"sequence": 150, "synced": 90, "lag": 0, "keeps_up": True}
        assert status["outputs_held"] == 0
        assert status["held_us"]["p50"] >= 0


def test_all_standbys_that_keep_up(tmp_path: Path) -> None:
    with gate(tmp_path, acks="all", solo=False) as (made, journal, clock):
        made.update("a", 100, 0)
        made.update("late", 20, 0)
        assert made.released() == 200, "one that has not caught up yet holds nobody up"
        made.update("late", 100, 0)
        journal.append(events(100, 100))
        for sequence in (110, 120):
            made.mark(sequence, 2 * sequence)
        made.update("a", 120, 0)
        assert made.released() == 200
        made.update("late", 113, 0)
        assert made.released() == 220
        clock.now += 4
        made.update("a", 200, 0)
        assert made.released() == 220
        clock.now += 2
        made.update("a", 200, 0)
        assert made.released() == 240, "one that falls too far behind does not count any more"
        assert not made.status()["standbys"]["late"]["keeps_up"]


def test_alone_after_a_while_if_that_is_wanted(tmp_path: Path) -> None:
    with gate(tmp_path, acks=1, solo=True) as (made, journal, clock):
        assert (made.released(), made.standing) == (0, "held")
        clock.now += 1.5
        assert (made.released(), made.standing) == (200, "solo")
        made.update("a", 100, 0)
        assert made.standing == "waiting"
        made.mark(journal.append(events(100, 10)) + 100, 230)
        assert made.released() == 200
        made.leave("a")
        assert (made.released(), made.standing) == (200, "held")
        clock.now += 0.9
        assert made.released() == 200
        clock.now += 0.2
        assert (made.released(), made.standing) == (230, "solo")
        assert made.status()["times_alone"] == 2


def test_alone_at_once_when_nobody_could_follow(tmp_path: Path) -> None:
    with gate(tmp_path, acks=1, solo=True) as (made, _, _):
        made.expect(standbys=False)
        made.update("a", 100, 100)
        assert (made.released(), made.standing) == (200, "waiting")  # it acknowledges all the same
        made.leave("a")
        assert made.standing == "solo"
        made.expect(standbys=True)
        assert made.standing == "held"
    with gate(tmp_path / "not alone", acks=1, solo=False) as (made, _, _):
        made.expect(standbys=False)
        assert (made.released(), made.standing) == (0, "held")


def test_standing_still_oneself_is_no_silence_of_the_standbys(tmp_path: Path) -> None:
    """A stopped process goes on: its standbys have left it meanwhile, and may be back. Nothing may leave on that ground."""
    with gate(tmp_path) as (made, journal, clock):
        made.tick()
        made.update("n2", 100, 100)
        assert made.released() == 200
        made.mark(journal.append(events(100, 10)) + 100, 230)
        clock.now += 30.0
        assert (made.released(), made.standing) == (200, "waiting")
        made.leave("n2")
        assert (made.released(), made.standing) == (200, "held")
        for _ in range(9):
            clock.now += 0.1
            made.tick()
        assert made.released() == 200
        clock.now += 0.2
        made.tick()
        assert (made.released(), made.standing) == (230, "solo")


def test_never_alone_if_that_is_not_wanted(tmp_path: Path) -> None:
    with gate(tmp_path, acks=1, solo=False) as (made, _, clock):
        clock.now += 1e6
        assert (made.released(), made.standing) == (0, "held")


steps = st.lists(st.tuples(st.sampled_from(["put", "take"]), st.integers(0, 7), st.integers(0, 3)), max_size=120)


@settings(deadline=None, max_examples=100)
@given(steps=steps)
def test_marks_never_let_go_too_much_and_in_the_end_everything(steps: list[tuple[str, int, int]]) -> None:
    """A ring of four marks: what does not fit is said by a later mark."""
    marks, waits = make_marks(4), np.zeros(HISTOGRAM_WORDS, np.int64)
    appended = outputs = limit = 0
    came_from: list[int] = []  # input sequence, exclusive, of each output
    missed = False
    for what, inputs, made in steps:
        if what == "put":
            appended, outputs = appended + inputs, outputs + made
            came_from += [appended] * made
            missed = not put_mark_now(marks, np.uint64(appended), np.uint64(outputs))
        else:
            limit = min(appended, limit + inputs)
            released = int(take_marks(marks, np.uint64(limit), waits))
            assert all(sequence <= limit for sequence in came_from[:released])
            if missed:
                missed = not put_mark_now(marks, np.uint64(appended), np.uint64(outputs))
    take_marks(marks, EVERYTHING, waits)
    assert put_mark_now(marks, np.uint64(appended), np.uint64(outputs))
    assert int(take_marks(marks, EVERYTHING, waits)) == outputs


def test_no_mark_for_inputs_without_outputs() -> None:
    marks = make_marks()
    for appended in range(10 * MARKS):
        assert put_mark_now(marks, np.uint64(appended), np.uint64(0))
    assert put_mark_now(marks, np.uint64(10 * MARKS), np.uint64(1))


# ---------------------------------------------------------------- with standbys and a stream


class Releasing:
    """A leader whose outputs go to a stream through a gate: event n of the journal makes output n."""

    def __init__(self, both: Pair, cluster: str, url: str, **more: Any) -> None:  # noqa: F811
        self.both, self.cluster, self.url = both, cluster, url
        self.gate = ReleaseGate(both.journal, **more)
        both.server.lead(SHARD, Leading(both.journal, 1, self.gate, stored=self.stored))
        self.ring = Ring.create(None, 1 << 14, EVENT)
        options = DeliveryOptions(cluster=cluster, target=url, per_event=frozenset(), drain_timeout_s=1.0)
        self.gateway = Gateway(options, {0: self.ring}, gates={0: self.gate})
        self.gateway.start()
        self.made = 0

    def stored(self) -> int:
        gateway = getattr(self, "gateway", None)
        return int(gateway.status()[0]["last_out_seq"]) if gateway else 0

    def make(self, count: int) -> None:
        self.both.append(count)
        self.ring.writer.write(make_events(self.made + 1, count))
        self.made += count
        self.gate.mark(self.both.journal.next_sequence, self.made)

    def close(self) -> None:
        self.gateway.stop()
        self.ring.close()


@contextmanager
def releasing(folder: Path, cluster: str, url: str, **more: Any) -> Iterator[Releasing]:  # noqa: F811
    with pair(folder) as both:
        made = Releasing(both, cluster, url, **more)
        try:
            yield made
        finally:
            made.close()


def test_outputs_wait_for_the_standby(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    with releasing(tmp_path, cluster, nats_server.url, acks=1, solo=False) as node:
        node.make(500)
        until(lambda: node.gateway.status()[0]["state"] == "delivering", "gateway")
        until(lambda: node.gateway.status()[0]["release"]["outputs_held"] == 500, "the gate")
        assert node.stored() == 0
        node.both.follow()
        until(lambda: node.stored() == 500, "the stream")
        node.make(700)
        until(lambda: node.stored() == 1200, "the stream")
        node.both.follower.stop()
        until(lambda: node.gate.standing == "held", "the standby's end")
        node.make(100)
        until(lambda: node.gateway.status()[0]["release"]["outputs_held"] == 100, "the gate")
        assert node.stored() == 1200
        node.both.new_follower()
        node.both.follow()
        until(lambda: node.stored() == 1300, "the stream")
        assert node.gateway.status()[0]["release"]["held_us"]["p99"] > 0
    outputs, missing = stream(nats_server.url, cluster, 1300)
    assert not missing
    assert list(outputs["seq"]) == list(range(1, 1301))


def test_alone_after_the_standby_died(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    with releasing(tmp_path, cluster, nats_server.url, acks="all", solo=True, solo_after_s=0.2) as node:
        node.both.follow()
        until(lambda: node.gate.standing == "waiting", "the standby")
        node.make(100)
        until(lambda: node.stored() == 100, "the stream")
        node.both.follower.stop()
        node.make(100)
        until(lambda: node.stored() == 200, "the stream")
        status = node.gateway.status()[0]["release"]
        assert (status["standing"], status["times_alone"] >= 1) == ("solo", True)


def test_a_lapped_gateway_does_not_leak_what_is_held(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:  # noqa: F811
    """A ring that overwrites: what was lost is a gap, and what comes after it waits all the same."""
    with releasing(tmp_path, cluster, nats_server.url, acks=1, solo=False) as node:
        node.gateway.stop()
        lossy = Ring.create(None, 256, EVENT, mode="lossy")
        gateway = Gateway(
            DeliveryOptions(cluster=cluster, target=nats_server.url, per_event=frozenset(), drain_timeout_s=1.0),
            {0: lossy},
            gates={0: node.gate},
        )
        node.ring.close()
        node.ring, node.gateway = lossy, gateway.start()
        node.both.follow()
        until(lambda: node.gate.standing == "waiting", "the standby")
        node.make(10)
        until(lambda: node.stored() == 10, "the stream")
        node.both.follower.stop()
        until(lambda: node.gate.standing == "held", "the standby's end")
        for _ in range(20):
            node.make(100)
        assert node.stored() == 10
        node.both.new_follower()
        node.both.follow()
        until(lambda: node.stored() == 2010, "the stream")
    outputs, missing = stream(nats_server.url, cluster, 2010)
    assert sum(batch.missing for batch in missing) == 2010 - len(outputs)
    assert list(outputs["seq"][:10]) == list(range(1, 11))
    assert outputs["seq"][-1] == 2010


def test_outputs_wait_for_the_one_that_is_about_to_take_over(tmp_path: Path) -> None:
    with gate(tmp_path, acks=1) as (made, journal, _):
        for node in ("other", "next"):
            made.update(node, 100, 0)
        made.mark(journal.append(events(100, 50)) + 100, 300)
        made.require("next")
        made.update("other", 150, 0)
        assert made.released() == 200, "another standby's word is not enough"
        made.leave("next")
        made.mark(journal.append(events(150, 50)) + 150, 400)
        assert made.released() == 200, "what it had when it left stays good, and no more"
        made.require(None)
        assert made.released() == 300
        made.update("other", 200, 0)
        assert made.released() == 400
