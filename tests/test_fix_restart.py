"""A FIX session that is never reset, over restarts of its node: killed or stopped, nothing is lost, nothing comes twice, nothing is a GAP.

What the journals have is the truth: the session's own store is ahead of them by what was handed on and not journalled.
"""

# ruff: noqa: F811 (fixtures)

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from nats_fixtures import nats_server  # noqa: F401
from nodes import cluster, journal_outputs, node_config, node_text, running, stream, until  # noqa: F401
from sources import receiving
from test_fix_source import KEY, Copies, background_loop, drop_copy_source, within
from test_process import log, node_process

from tickmesh.control.config import parse_config
from tickmesh.node.event import ALL_INSTRUMENTS, EVENT, EventArray, Kind
from tickmesh.node.fix_decoder import SENDER_KEY
from tickmesh.node.fix_intake import sender_key
from tickmesh.node.fix_session import build_message, parse_message, utc_timestamp
from tickmesh.node.fix_store import FileStore, MemoryStore
from tickmesh.node.journal import JournalNotFound, JournalReader, truncate
from tickmesh.ops.servers import NatsServer

SYMBOLS = (b"ALFA", b"BRVO")
SPREAD = "shards = 2\nshard_overrides = { ALFA = 0, BRVO = 1 }\n"


@contextmanager
def venue() -> Iterator[Copies]:
    with background_loop() as loop:
        copies = Copies(loop)
        try:
            yield copies
        finally:
            within(loop, copies.acceptor.stop())


class Desk:
    """Says fills of two symbols, numbered from 1; and knows which were said."""

    def __init__(self, copies: Copies) -> None:
        self.copies, self.said = copies, 0

    def say(self, count: int) -> None:
        for _ in range(count):
            self.said += 1
            self.copies.say(self.said, symbol=SYMBOLS[self.said % 2])

    @contextmanager
    def talking(self) -> Iterator[None]:
        """It goes on saying them."""
        stop = threading.Event()

        def talk() -> None:
            while not stop.wait(0.01):
                self.say(5)

        thread = threading.Thread(target=talk)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(30)

    def expected(self, shards: int) -> list[list[int]]:
        every = range(1, self.said + 1)
        return [list(every)] if shards == 1 else [[n for n in every if SYMBOLS[n % 2] == symbol] for symbol in SYMBOLS]


def journalled(folder: Path, shards: int) -> list[EventArray]:
    """The events of every shard's journal."""
    found = []
    for number in range(shards):
        parts = [np.zeros(0, EVENT)]
        with contextlib.suppress(JournalNotFound):  # not yet
            reader = JournalReader(folder / "journal" / "n1" / f"shard-{number}")
            parts += [batch.copy().view(EVENT) for batch in reader.batches(size=1 << 14)]
        found.append(np.concatenate(parts))
    return found


def fills(folder: Path, shards: int = 1) -> list[list[int]]:
    """ExecIDs of the journalled TRADEs, by shard."""
    return [events["id"][events["kind"] == Kind.TRADE].tolist() for events in journalled(folder, shards)]


def count(folder: Path, shards: int) -> int:
    return sum(map(len, fills(folder, shards)))


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 2])
def test_a_node_that_is_killed_loses_no_drop_copy(shards: int, nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with venue() as copies:
        desk = Desk(copies)
        source = drop_copy_source(copies.port, tmp_path / "copies")
        target = f'target = "{nats_server.url}"'
        text = node_text(cluster, data, source, delivery=target, cluster_extra=SPREAD if shards == 2 else "")
        for _ in range(3):
            wanted = count(data, shards) + 300
            with node_process(tmp_path, text) as process, desk.talking():
                until(lambda: process.poll() is not None or count(data, shards) >= wanted, "fills in the journal", 120)  # noqa: B023
                assert process.poll() is None, log(tmp_path)
                process.kill()
                process.wait()
            desk.say(20)  # while it is down
        with node_process(tmp_path, text) as process:
            until(lambda: process.poll() is not None or count(data, shards) >= desk.said, "what was missed", 120)
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0, log(tmp_path)
        assert fills(data, shards) == desk.expected(shards)
        assert not any(np.any(events["kind"] == Kind.GAP) for events in journalled(data, shards))
        assert copies.counter("logons") == 4
        assert copies.counter("resent") >= 60
    for number, expected in enumerate(journal_outputs(parse_config(text))):
        outputs, missing = stream(nats_server.url, cluster, len(expected), number)
        assert not missing
        assert outputs["id"][outputs["kind"] == Kind.TRADE].tolist() == desk.expected(shards)[number]


@pytest.mark.parametrize("shards", [1, 2])
def test_what_was_handed_on_and_not_journalled_is_asked_for(shards: int, nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:
    """The journal of one shard ends in the middle, as after a crash; the session's store says that all has come."""
    more = SPREAD if shards == 2 else ""
    with venue() as copies:
        desk = Desk(copies)
        config = node_config(cluster, tmp_path, drop_copy_source(copies.port, tmp_path / "copies"), cluster_extra=more)
        with running(config, nats_server.url):
            until(lambda: copies.counter("logons") == 1, "a logon")
            desk.say(30)
            until(lambda: count(tmp_path, shards) == 30, "the fills")
        store = FileStore(tmp_path / "copies")
        assert store.next_in > 31
        store.close()
        events = journalled(tmp_path, shards)[0]
        (where,) = np.flatnonzero((events["kind"] == Kind.TRADE) & (events["id"] == 10))
        truncate(tmp_path / "journal" / "n1" / "shard-0", int(where) + 1)
        assert fills(tmp_path, shards)[0][-1] == 10
        desk.say(4)
        with running(config, nats_server.url):
            until(lambda: count(tmp_path, shards) == 34, "what the journal lacked")
        assert fills(tmp_path, shards) == desk.expected(shards)
        assert not any(np.any(events["kind"] == Kind.GAP) for events in journalled(tmp_path, shards))
        assert copies.counter("resent") >= 24


def test_sequences_that_began_anew_while_the_node_was_down(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:
    """Both sides were reset by hand: what comes now has lower sequences than the journal, and is another run of them."""
    with venue() as copies:
        config = node_config(cluster, tmp_path, drop_copy_source(copies.port, tmp_path / "copies"))
        with running(config, nats_server.url):
            until(lambda: copies.counter("logons") == 1, "a logon")
            copies.say(*range(1, 21))
            until(lambda: count(tmp_path, 1) == 20, "the fills")
        until(lambda: KEY in copies.acceptor.ended, "the end of the session")
        shutil.rmtree(tmp_path / "copies")
        copies.acceptor.session(*KEY).store.reset()
        copies.acceptor.session(*KEY)._expected = 1
        copies.say(21, 22)
        with running(config, nats_server.url):
            until(lambda: count(tmp_path, 1) == 22, "the fills of the new run")
        (events,) = journalled(tmp_path, 1)
        assert events["id"][events["kind"] == Kind.TRADE].tolist() == list(range(1, 23))
        clears = events[(events["kind"] == Kind.CLEAR) & (events["instrument"] == ALL_INSTRUMENTS)]
        assert len(clears) == 1
        with running(config, nats_server.url):
            copies.say(23)
            until(lambda: count(tmp_path, 1) == 23, "a fill after one more restart")
        assert len(journalled(tmp_path, 1)[0]["id"][journalled(tmp_path, 1)[0]["kind"] == Kind.CLEAR]) == 1


def test_books_that_are_subscribed_to_are_stale_until_their_snapshots(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:
    """No trade is lost, but the venue tells nobody of the books meanwhile: a GAP stands for that."""
    with venue() as copies:
        source = drop_copy_source(copies.port, tmp_path / "copies").replace("subscribe = false", "subscribe = true")
        source = source.replace("[data_sources.copies.fix]", 'symbols = ["ALFA"]\n[data_sources.copies.fix]')
        config = node_config(cluster, tmp_path, source)
        with running(config, nats_server.url):
            until(lambda: copies.counter("logons") == 1, "a logon")
            copies.say(1, 2, 3)
            until(lambda: count(tmp_path, 1) == 3, "the fills")
        copies.say(4, 5)
        with running(config, nats_server.url):
            until(lambda: count(tmp_path, 1) == 5, "what was missed")
        (events,) = journalled(tmp_path, 1)
        assert events["id"][events["kind"] == Kind.TRADE].tolist() == [1, 2, 3, 4, 5]
        gaps = np.flatnonzero(events["kind"] == Kind.GAP)
        assert len(gaps) == 1
        assert events["id"][: gaps[0]][events["kind"][: gaps[0]] == Kind.TRADE].tolist() == [1, 2, 3]


def test_a_session_that_is_changed_in_a_running_node_loses_nothing(nats_server: NatsServer, cluster: str, tmp_path: Path) -> None:
    with venue() as copies:
        desk, source = Desk(copies), drop_copy_source(copies.port, tmp_path / "copies")
        text = node_text(cluster, tmp_path, source)
        with running(parse_config(text), nats_server.url) as node, desk.talking():
            until(lambda: count(tmp_path, 1) >= 100, "fills")
            node.apply(parse_config(text.replace('target = "VENUE"', 'target = "VENUE"\nheartbeat_s = 20')), 7)
            before = desk.said
            until(lambda: count(tmp_path, 1) > before + 100, "fills after the change")
            until(lambda: copies.counter("logons") == 2, "another logon")
            before = desk.said
            until(lambda: count(tmp_path, 1) > before, "fills of the changed session")
        found = fills(tmp_path)[0]
        assert found == list(range(1, len(found) + 1))
        assert not np.any(journalled(tmp_path, 1)[0]["kind"] == Kind.GAP)


def test_a_lost_connection_is_no_gap(tmp_path: Path) -> None:
    with venue() as copies:
        body = drop_copy_source(copies.port, tmp_path / "copies").partition("\n")[2].replace("data_sources.copies", "data_sources.feed")
        with receiving(body) as feed:
            feed.wait_for(connected=1)
            for number in range(1, 5):
                copies.say(number)
                until(lambda: len(feed.kinds(Kind.TRADE)) == number, "a fill")  # noqa: B023
                copies.cut()
                feed.wait_for(reconnects=number)
            copies.say(5)
            until(lambda: len(feed.kinds(Kind.TRADE)) == 5, "the last")
            assert feed.kinds(Kind.TRADE)["id"].tolist() == [1, 2, 3, 4, 5]
            assert feed.counter("gaps") == 0
            assert not len(feed.kinds(Kind.GAP, Kind.CLEAR))


def test_a_message_that_is_rejected_is_a_gap_and_not_asked_for_for_ever(tmp_path: Path) -> None:
    with venue() as copies:
        session = copies.acceptor.session(*KEY)

        def say_as_another() -> None:
            raw = session._message("8", session.store.next_out, [(37, b"9")], time.time_ns())
            wrong = [(tag, b"OTHER" if tag == 49 else value) for tag, value in parse_message(raw).fields[2:-1]]  # type: ignore[union-attr]
            session.store.append(build_message("FIX.4.4", wrong))
            session._put(build_message("FIX.4.4", wrong))
            copies.acceptor.links[KEY].push()

        body = drop_copy_source(copies.port, tmp_path / "copies").partition("\n")[2].replace("data_sources.copies", "data_sources.feed")
        with receiving(body) as feed:
            feed.wait_for(connected=1)
            copies.say(1)
            copies.call(say_as_another)
            feed.wait_for(reconnects=1)
            copies.say(2)
            until(lambda: len(feed.kinds(Kind.TRADE)) == 2, "what comes behind it")
            (gap,) = feed.kinds(Kind.GAP)
            assert gap["id"] == gap["aux"] == 3
            assert feed.counter("reconnects") == 1


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("name", ["V", "EIGHTCHR", "NINE CHAR", "A VENUE WITH A VERY LONG NAME"])
def test_the_key_of_a_peer_is_the_decoders(name: str, tmp_path: Path) -> None:
    body = (
        'type = "fix"\nendpoint = "tcp://127.0.0.1:1"\ndata_format = "fix44"\nsymbols = ["A"]\n'
        'fix = { sender = "ME", target = "VENUE" }\nreconnect_min_ms = 60000\nreconnect_max_ms = 60000\n'
    )
    fields = [(35, b"X"), (34, b"7"), (49, name.encode()), (52, utc_timestamp(0)), (56, b"ME"), (268, b"0")]
    with receiving(body) as feed:
        intake = feed.receiver.intake
        intake.put(build_message("FIX.4.4", fields), 1, 0)
        while len(intake.next()):
            pass
        assert int(intake.feed.state[SENDER_KEY]) == sender_key(name) != 0
        assert intake.next_sequence == 8


def test_a_store_knows_when_its_sequences_began(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    store = FileStore(folder, 32_768)
    first = store.begun_ms
    assert first > 0
    for _ in range(40):  # over several segments
        store.append(b"x" * 1000)
    store.close()
    again = FileStore(folder, 32_768)
    assert again.begun_ms == first
    again.reset()
    second = again.begun_ms
    assert second > first
    again.close()
    last = FileStore(folder, 32_768)
    assert last.begun_ms == second
    last.close()
    memory = MemoryStore()
    before = memory.begun_ms
    memory.reset()
    assert memory.begun_ms > before


def test_a_store_without_that_is_still_read(tmp_path: Path) -> None:
    """As written before stores knew."""
    from tickmesh.node.fix_store import _NEXT_IN, _OLD_STATE_WORDS, _STATE, _record

    (tmp_path / "s").mkdir()
    old = _record(_STATE, 0, _OLD_STATE_WORDS.pack(5, 9)) + _record(_NEXT_IN, 12, b"")
    (tmp_path / "s" / f"{1:012}.log").write_bytes(old)
    store = FileStore(tmp_path / "s")
    assert (store.next_out, store.next_in, store.begun_ms) == (5, 12, 0)
    store.close()
