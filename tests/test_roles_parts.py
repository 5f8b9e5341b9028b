"""The parts that a node's roles are made of: deliveries that come and go, what a node remembers, who may change it, what is refused."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from nats_fixtures import nats_server  # noqa: F401
from nodes import cluster  # noqa: F401
from test_delivery import collect, delivering, options, outputs, sequences, wait_for

from tickmesh.control.config import ConfigError, parse_config
from tickmesh.node.changing import ChangeInTheWay, Changing
from tickmesh.node.delivery import Gateway
from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, REFERENCE, EventArray, Flag, Kind
from tickmesh.node.instruments import InstrumentTable
from tickmesh.node.known_instruments import KnownInstruments
from tickmesh.node.replica import unfit
from tickmesh.node.restore import RestoredShard
from tickmesh.ops.servers import NatsServer
from tickmesh.transports.ring import Ring


def test_a_gateway_takes_a_shard_while_it_runs_and_lets_it_go(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    ring = Ring.create(None, 1024, mode="lossless", dtype=EVENT)
    with delivering(Gateway(options(nats_server, cluster), {})) as gateway:
        assert gateway.status() == []
        taken = gateway.take(2, ring, epoch=7)
        assert taken.judged.wait(10)
        ring.writer.write(outputs(1, 50))
        wait_for(lambda: gateway.status()[0]["last_out_seq"] == 50)
        ring.writer.write(outputs(51, 50))
        assert gateway.drop(2, deliver_s=5)
        assert gateway.status() == []
        assert ring.lag == 0, "nobody reads it any more"
        ring.writer.write(outputs(101, 10))
        again = gateway.take(2, ring, epoch=8)
        wait_for(lambda: gateway.status()[0]["last_out_seq"] == 110)
        assert again.epoch == 8


def test_a_shard_that_is_taken_again_under_a_later_epoch_loses_nothing(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    ring = Ring.create(None, 256, mode="lossless", dtype=EVENT)
    with delivering(Gateway(options(nats_server, cluster), {})) as gateway:
        gateway.take(0, ring, epoch=1)
        for epoch in range(2, 6):
            ring.writer.write(outputs(100 * (epoch - 2) + 1, 100), timeout_ms=10_000)
            assert gateway.take(0, ring, epoch=epoch).judged.wait(10)
        wait_for(lambda: gateway.status()[0]["last_out_seq"] == 400)
    batches = asyncio.run(collect(nats_server, cluster, 400))
    assert sequences(batches) == list(range(1, 401))


def test_who_is_fenced_is_told(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    one, two = (Ring.create(None, 1024, mode="lossless", dtype=EVENT) for _ in range(2))
    told: list[int] = []
    with delivering(Gateway(options(nats_server, cluster), {})) as old, delivering(Gateway(options(nats_server, cluster), {})) as new:
        old.fenced = told.append
        assert old.take(0, one, epoch=4).judged.wait(10)
        assert new.take(0, two, epoch=5).judged.wait(10)
        one.writer.write(outputs(1, 5))
        wait_for(lambda: told == [0])
        late = old.take(0, one, epoch=4)
        assert late.judged.wait(10)
        assert late.state == "fenced"
        assert new.status()[0]["state"] == "delivering"


def test_whose_outputs_are_not_those_of_the_stream_does_not_go_on_with_it(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    def judged(epoch: int, made: EventArray, agreed: int | None) -> str:
        ring = Ring.create(None, 256, mode="lossless", dtype=EVENT)
        with delivering(Gateway(options(nats_server, cluster), {})) as gateway:
            delivery = gateway.take(0, ring, epoch=epoch)
            assert delivery.judged.wait(10)
            assert delivery.publisher is not None
            with ring.reader("keeps it"):
                ring.writer.write(made)
                return unfit(delivery.publisher, len(made), ring, agreed)

    made, other = outputs(1, 60), outputs(1, 60)
    other["price"][57] += 1
    with delivering(Gateway(options(nats_server, cluster), {})) as leader:
        ring = Ring.create(None, 256, mode="lossless", dtype=EVENT)
        leader.take(0, ring, epoch=3)
        ring.writer.write(made)
        wait_for(lambda: leader.status()[0]["last_out_seq"] == 60)
    assert judged(4, made, 3) == ""
    assert "not those that our journal makes" in judged(5, other, 3)
    assert "our journal makes 59" in judged(6, made[:59], 3)
    assert "last compared with in 2" in judged(7, made, 2)
    assert judged(8, made, None) == "", "after four writers that wrote nothing"


def events(*rows: dict[str, int]) -> EventArray:
    made = np.zeros(len(rows), EVENT)
    for one, row in zip(made, rows):
        for name, value in row.items():
            one[name] = value
    return made


def reference(instrument: int, source: int, symbol: str) -> EventArray:
    made = events({"kind": Kind.REFERENCE, "instrument": instrument, "flags": source, "seq": 1, "price": 10_000_000})
    made.view(REFERENCE)["symbol"] = symbol.encode()
    return made


def test_what_a_journal_says_survives_a_snapshot() -> None:
    """The place in each source, to the event; the instruments; and it goes on from there."""
    first = np.concatenate([
        reference(0, 0, "ALFA"), reference(1, 2, "BRVO"), events({"kind": Kind.CODE, "instrument": 1, "flags": 2, "id": 77, "seq": 1}),
        events({"kind": Kind.ADD, "instrument": 1, "seq": 9}, {"kind": Kind.ADD, "instrument": 1, "seq": 9},
               {"kind": Kind.TIMER, "instrument": ALL_INSTRUMENTS, "price": 0, "ts_event": 5000}),
    ])  # fmt: skip
    more = events({"kind": Kind.ADD, "instrument": 1, "seq": 9}, {"kind": Kind.ADD, "instrument": 0, "seq": 4})
    whole, before = RestoredShard(), RestoredShard()
    whole.take(np.concatenate([first, more]))
    before.take(first)
    after = RestoredShard.from_json(before.as_json())
    after.take(more)
    assert after.positions.tolist() == whole.positions.tolist()
    assert after.sequences == whole.sequences == {0: 4, 2: 9}
    assert int(after.positions["same"][2]) == 3
    assert after.codes == {1: 77}
    assert [after.symbol(number) for number in (0, 1)] == [(0, "ALFA"), (2, "BRVO")]


def test_half_a_snapshot_of_a_book_is_known_to_be_one() -> None:
    """A journal may end within it, and another node's receiver may not have it at that place."""

    def told(*events: tuple[int, Kind, int]) -> EventArray:
        batch = np.zeros(len(events), EVENT)
        batch["instrument"], batch["kind"], batch["flags"] = zip(*events)
        return batch

    shard, more, last = RestoredShard(), Flag.SNAPSHOT | Flag.MORE, Flag.SNAPSHOT
    shard.take(told((1, Kind.CLEAR, more), (1, Kind.LEVEL, last), (4, Kind.CLEAR, more), (4, Kind.LEVEL, 0), (3, Kind.LEVEL, Flag.MORE)))
    assert shard.half_told == set()
    shard.take(told((2, Kind.CLEAR, more), (2, Kind.LEVEL, more), (1, Kind.LEVEL, 0)))
    assert RestoredShard.from_json(json.loads(json.dumps(shard.as_json()))).half_told == shard.half_told == {2}
    shard.take(told((3, Kind.LEVEL, 0), (2, Kind.LEVEL, last)))
    assert shard.half_told == set()


def test_a_node_that_starts_again_knows_all_instruments_and_their_codes(tmp_path: Path) -> None:
    table = InstrumentTable(64, 4)
    numbers = [table.intern(symbol, 1, 10_000_000, 2) for symbol in ("ALFA", "BRVO", "CHRL")]
    table.arrays.records["announced"][numbers[:2]] = 1
    table.arrays.records["code"][numbers] = (11, 12, 13)
    KnownInstruments(tmp_path / "new").keep(table)
    again = InstrumentTable(64, 4)
    known = KnownInstruments(tmp_path / "new")
    assert known.learn(again, known.read()) == {1: {0: 11, 1: 12}}
    assert again.find("BRVO", 1) == 1
    assert again.find("CHRL", 1) is None, "it was never announced"
    assert [int(again.record(k)["shard"]) for k in (0, 1)] == [int(table.record(k)["shard"]) for k in (0, 1)]
    (tmp_path / "new" / "instruments.json").write_text("[[1, ")
    assert known.read() == []


def test_a_role_does_not_wait_for_a_change_for_ever() -> None:
    changing = Changing()
    with changing.configuration(), pytest.raises(ChangeInTheWay, match=r"for more than 0\.01 s"), changing.role(0.01):
        pass
    with changing.role(0.01), changing.role():
        pass


def test_roles_change_beside_each_other_and_never_during_a_change_of_the_configuration() -> None:
    changing, log = Changing(), []
    both, go, done = threading.Barrier(2), threading.Event(), threading.Event()

    def role() -> None:
        with changing.role():
            both.wait(10)  # needs two inside at a time
            go.wait(10)
            log.append("role")

    def configuration() -> None:
        with changing.configuration():
            log.append("configuration")
        done.set()

    threads = [threading.Thread(target=role) for _ in range(2)]
    for thread in threads:
        thread.start()
    change = threading.Thread(target=configuration)
    change.start()
    go.set()
    for thread in [*threads, change]:
        thread.join(10)
    assert log == ["role", "role", "configuration"]
    assert done.is_set()


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ('[data_sources.a]\ntype = "file"\npath = "x.itch"', "data_sources.a.type", "cannot go on at another node"),
        ("[journal]\nenabled = false", "journal.enabled", "standbys follow the journal"),
        ('[delivery.e]\nmethod = "nats"\nembedded = true', "delivery", "no NATS server that all nodes reach"),
    ],
)
def test_what_shared_shards_need_is_asked_for(text: str, path: str, words: str) -> None:
    given = "" if "delivery" in text else '\n[delivery.events]\nmethod = "nats"\n'
    with pytest.raises(ConfigError) as caught:
        parse_config(f"[leadership]\nenabled = true\n{text}{given}")
    found = {problem.path: problem.reason for problem in caught.value.errors}
    assert words in found[path]


def test_a_silence_shorter_than_three_heartbeats_is_no_suspicion() -> None:
    with pytest.raises(ConfigError, match="less than three heartbeats"):
        parse_config("[leadership]\nsuspect_ms = 50\nheartbeat_ms = 20\n")
