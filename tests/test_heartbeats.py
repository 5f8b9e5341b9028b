"""Heartbeats over a real nats-server: who is alive, who is suspected, and who had better suspect nobody."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats_fixtures import ConfiguredServer
from store_servers import contract

from tickmesh.control.heartbeats import Beat, Heartbeats, Patience, ShardBeat, beat_subject, client_name, decode_beat, encode_beat
from tickmesh.ops.servers import NatsServer, NatsServerOptions
from tickmesh.transports.nats import Login, NatsLink, connect

SUSPECT_S = 0.3
_SYSTEM = """
accounts { SYS { users: [{user: sys, password: sys}] }, APP { jetstream: enabled, users: [{user: app, password: app}] } }
system_account: SYS
no_auth_user: app
"""
NAMES = st.text("abcXYZ019_-", min_size=1, max_size=20)
SHARDS = st.builds(ShardBeat, st.sampled_from(["leader", "standby"]), st.integers(0, 1 << 60), st.integers(0, 1 << 60), st.booleans())


class Node:
    """A node's heartbeats and connection."""

    def __init__(self, link: NatsLink, beats: Heartbeats) -> None:
        self.link, self.beats = link, beats


@asynccontextmanager
async def node(url: str, name: str, incarnation: str = "1", *, system: bool = False) -> AsyncIterator[Node]:
    """A node that sends and listens."""
    async with AsyncExitStack() as stack:
        link = await connect(url, name=client_name("c", name, incarnation), login=Login())
        stack.push_async_callback(link.close)
        told = None
        if system:
            told = await connect(url, login=Login(user="sys", password="sys"))
            stack.push_async_callback(told.close)
        shards = {0: ShardBeat("standby", 3, 17)}
        beats = Heartbeats(
            link.client, "c", name, incarnation, lambda: Beat(name, incarnation, "127.0.0.1:1", shards),
            suspect_ms=SUSPECT_S * 1000, suspect_ms_max=10 * SUSPECT_S * 1000, system=told.client if told else None,
        )  # fmt: skip
        await beats.start()
        stack.push_async_callback(beats.close)
        yield Node(link, beats)


async def until(condition: object, limit_s: float = 10.0) -> None:
    """Wait until something holds."""
    assert callable(condition)
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.005)


@given(st.builds(Beat, NAMES, NAMES, st.just("127.0.0.1:4000"), st.dictionaries(st.integers(0, 63), SHARDS, max_size=8)))
def test_a_heartbeat_is_what_it_was(beat: Beat) -> None:
    assert decode_beat(encode_beat(beat)) == beat


@given(st.binary(max_size=200))
def test_rubbish_is_no_heartbeat(data: bytes) -> None:
    found = decode_beat(data)
    assert found is None or isinstance(found, Beat)


@contract
async def test_nodes_hear_each_other_and_the_silent_one_is_suspected(tmp_path: object) -> None:
    with NatsServer(NatsServerOptions(tmp_path / "nats")) as server:  # type: ignore[operator]
        async with node(server.url, "a") as a:
            assert a.beats.suspected("b") == "it was never heard of"
            async with node(server.url, "b"):
                await until(lambda: a.beats.alive() == ["a", "b"])
                heard = a.beats.beat("b")
                assert heard is not None
                assert heard.shards[0].position == 17
                begun = time.monotonic()
            await until(lambda: a.beats.suspected("b"))
            assert "silent" in a.beats.suspected("b")
            assert time.monotonic() - begun >= SUSPECT_S * 0.9
            async with node(server.url, "b", "2"):
                await until(lambda: not a.beats.suspected("b"))


@contract
async def test_who_does_not_hear_himself_suspects_nobody(tmp_path: object) -> None:
    server = NatsServer(NatsServerOptions(tmp_path / "nats")).start()  # type: ignore[operator]
    try:
        async with node(server.url, "a") as a, node(server.url, "b") as b:
            await until(lambda: a.beats.alive() == b.beats.alive() == ["a", "b"])
            server.kill()
            await until(lambda: a.beats.cut_off and b.beats.cut_off)
            await asyncio.sleep(2 * SUSPECT_S)  # longer than it takes to suspect somebody
            assert a.beats.alive() == b.beats.alive() == ["a", "b"]
            server.start()
            await until(lambda: not a.beats.cut_off and not b.beats.cut_off)
            assert not a.beats.suspected("b")
    finally:
        server.kill()


@contract
async def test_a_process_that_stood_still_listens_before_it_suspects(tmp_path: object) -> None:
    with NatsServer(NatsServerOptions(tmp_path / "nats")) as server:  # type: ignore[operator]
        async with node(server.url, "a") as a, node(server.url, "b"):
            await until(lambda: not a.beats.cut_off and "b" in a.beats.alive())
            time.sleep(2 * SUSPECT_S)  # noqa: ASYNC251  (the whole process stands still)
            await asyncio.sleep(0)
            await until(lambda: a.beats.counters.own_pauses > 0)
            await until(lambda: not a.beats.cut_off)
            assert a.beats.counters.suspicions == 0


@contract
async def test_late_heartbeats_are_waited_for_longer(tmp_path: object) -> None:
    """A silence that was no death is forgiven the next time; nothing moves for it again and again."""
    with NatsServer(NatsServerOptions(tmp_path / "nats")) as server:  # type: ignore[operator]
        async with node(server.url, "a") as a:
            beat = encode_beat(Beat("slow", "1", "", {0: ShardBeat("leader", 1, 1)}))

            async def says() -> None:
                await a.link.client.publish(beat_subject("c", "slow"), beat)

            await until(lambda: not a.beats.cut_off)
            await says()
            await until(lambda: a.beats.suspected("slow").startswith("it has been silent for 300 ms"))
            await says()
            await until(lambda: not a.beats.suspected("slow"))
            assert a.beats.counters.false_alarms == 1
            await until(lambda: a.beats.suspected("slow"))
            told_ms = int(a.beats.suspected("slow").removeprefix("it has been silent for ").removesuffix(" ms"))
            assert 450 <= told_ms <= 3000


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 40)), max_size=60))
def test_patience_is_half_as_long_again_as_the_longest_silence_lately(steps: list[tuple[float, float]]) -> None:
    patience, now_s, heard = Patience(0.1, 1.0), 100.0, []
    for silence_s, passes_s in steps:
        now_s += passes_s
        patience.heard_after(silence_s, now_s)
        heard.append((now_s, silence_s))
        limit_s = patience.limit_s(now_s)
        surely = [one for at_s, one in heard if now_s - at_s < 30 and one <= 1.0]
        perhaps = [one for at_s, one in heard if now_s - at_s <= 90 and one <= 1.0]
        assert min(1.0, max(0.1, 1.5 * max(surely, default=0))) <= limit_s <= min(1.0, max(0.1, 1.5 * max(perhaps, default=0)))


@contract
async def test_the_server_tells_of_a_death_at_once(tmp_path: object) -> None:
    with ConfiguredServer(tmp_path / "nats", _SYSTEM) as server:  # type: ignore[operator]
        async with node(server.url, "a", system=True) as a, node(server.url, "b") as b:
            await until(lambda: "b" in a.beats.alive())
            await b.beats.close()
            assert b.link.client._transport is not None
            b.link.client._transport.close()
            await until(lambda: a.beats.suspected("b"))
            assert "connection" in a.beats.suspected("b")


@contract
async def test_what_is_no_heartbeat_is_counted(tmp_path: object) -> None:
    with NatsServer(NatsServerOptions(tmp_path / "nats")) as server:  # type: ignore[operator]
        async with node(server.url, "a") as a:
            await a.link.client.publish(beat_subject("c", "x"), b"hello")
            await a.link.client.publish(beat_subject("c", "x"), encode_beat(Beat("y", "1")))
            await until(lambda: a.beats.counters.malformed == 2)
            assert a.beats.beat("y") is None


def test_too_quick_a_suspicion_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 60"):
        Heartbeats(None, "c", "a", "1", lambda: Beat("a", "1"), every_ms=20, suspect_ms=50)  # type: ignore[arg-type]
