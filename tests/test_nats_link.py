"""The publisher against a real server: each record is in the stream exactly once, whatever happens to the server or to the publisher."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nats_fixtures import cluster, nats_server, own_nats_server  # noqa: F401
from processes import resume, suspend

from tickmesh.ops.servers import NatsServer, NatsServerOptions
from tickmesh.transports.connection import backoff_s
from tickmesh.transports.nats import (
    WINDOW_MAX,
    Fenced,
    ForeignStream,
    Login,
    NatsLink,
    NatsRefused,
    NatsUnreachable,
    OutputPublisher,
    OutputStream,
    PublishRefused,
    SequenceGap,
    connect,
    digest_of,
    redacted,
)
from tickmesh.transports.nats_reader import StreamReader

RECORD = struct.Struct("<Q56x")
HEAD = struct.Struct("<QII")


def records(first: int, count: int) -> bytes:
    return b"".join(RECORD.pack(i) for i in range(first, first + count))




def stream(cluster: str) -> OutputStream:  # noqa: F811
    return OutputStream(f"S_{cluster}", f"s.{cluster}", "0", bytes_max=64 << 20)


@asynccontextmanager
async def linked(server: NatsServer) -> AsyncIterator[NatsLink]:
    link = await connect(server.url)
    try:
        yield link
    finally:
        await link.close()


@asynccontextmanager
async def publishing(link: NatsLink, to: OutputStream, **options: object) -> AsyncIterator[OutputPublisher]:
    publisher = OutputPublisher(link, to, HEAD.pack, **options)  # type: ignore[arg-type]
    try:
        await publisher.open()
        yield publisher
    finally:
        await publisher.close()


async def stored(link: NatsLink, to: OutputStream) -> tuple[list[int], list[tuple[int, int]]]:
    """Every record in the stream in order, and the (first, count) of every gap marker."""
    jetstream = link.client.jetstream()
    last = (await jetstream.stream_info(to.name)).state.last_seq
    found: list[int] = []
    gaps: list[tuple[int, int]] = []
    subscription = await jetstream.subscribe(to.subject, ordered_consumer=True)
    while True:
        one = await subscription.next_msg(5)
        if (one.headers or {}).get("Kind") != "fence":
            first, count, missing = HEAD.unpack_from(one.data)
            body = one.data[HEAD.size :]
            assert len(body) == count * RECORD.size
            run = [RECORD.unpack_from(body, i * RECORD.size)[0] for i in range(count)]
            assert run == list(range(first, first + count))
            found += run
            if missing:
                gaps.append((first, missing))
        if one.metadata.sequence.stream == last:
            break
    await subscription.unsubscribe()
    return found, gaps


async def until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.01)


def test_publishes_in_order_and_counts(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    async def run() -> None:
        acked: list[tuple[int, int]] = []
        async with (
            linked(nats_server) as link,
            publishing(link, stream(cluster), window=8, acked=lambda first, last, _ns: acked.append((first, last))) as publisher,
        ):
            for first in range(1, 1000, 10):
                await publisher.publish(first, records(first, 10))
                assert publisher.in_flight <= 8
            assert await publisher.drain(10)
            assert (await stored(link, stream(cluster)))[0] == list(range(1, 1001))
            assert acked == [(first, first + 9) for first in range(1, 1000, 10)]
            assert (publisher.last_out_seq, publisher.counters.records, publisher.counters.frames) == (1000, 1000, 100)
            assert publisher.counters.resent == publisher.counters.duplicates == 0

    asyncio.run(run())


def test_restart_skips_what_is_there(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    """A replay makes the same records again, in other batches."""

    async def run() -> None:
        async with linked(nats_server) as link:
            async with publishing(link, stream(cluster)) as publisher:
                for first in range(1, 101, 10):
                    await publisher.publish(first, records(first, 10))
                await publisher.drain(10)
            async with publishing(link, stream(cluster)) as again:
                assert again.last_out_seq == 100
                for first in range(1, 151, 7):
                    await again.publish(first, records(first, 7))
                await again.drain(10)
                assert again.counters.skipped == 100
            assert (await stored(link, stream(cluster)))[0] == list(range(1, 155))

    asyncio.run(run())


def test_gaps_are_published(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    async def run() -> None:
        async with linked(nats_server) as link, publishing(link, stream(cluster)) as publisher:
            await publisher.publish(1, records(1, 5))
            with pytest.raises(SequenceGap) as caught:
                await publisher.publish(11, records(11, 5))
            assert (caught.value.expected, caught.value.found) == (6, 11)
            await publisher.publish_gap(6, 10)
            await publisher.publish(11, records(11, 5))
            await publisher.drain(10)
            assert await stored(link, stream(cluster)) == ([*range(1, 6), *range(11, 16)], [(6, 5)])
            assert publisher.counters.missing == 5

    asyncio.run(run())


@pytest.mark.parametrize("kills", [3])
def test_nothing_lost_or_doubled_when_the_server_is_killed(own_nats_server: NatsServer, cluster: str, kills: int) -> None:  # noqa: F811
    async def run() -> None:
        async with linked(own_nats_server) as link, publishing(link, stream(cluster), window=64, ack_timeout_s=0.5) as publisher:
            total, batch = 0, 20

            async def feed() -> None:
                nonlocal total
                while not done.is_set():
                    await publisher.publish(total + 1, records(total + 1, batch))
                    total += batch

            done = asyncio.Event()
            feeding = asyncio.create_task(feed())
            for _ in range(kills):
                mark = publisher.last_out_seq + 2000
                await until(lambda mark=mark: publisher.last_out_seq > mark)
                await asyncio.to_thread(own_nats_server.kill)
                await asyncio.to_thread(own_nats_server.start)
            mark = publisher.last_out_seq + 2000
            await until(lambda: publisher.last_out_seq > mark)
            done.set()
            await feeding
            assert await publisher.drain(20)
            assert link.reconnects >= kills
            assert publisher.counters.lost_by_server == 0
            assert (await stored(link, stream(cluster)))[0] == list(range(1, total + 1))

    asyncio.run(run())


def test_suspended_server_is_noticed(own_nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    """A server that hangs acknowledges nothing; when it goes on, everything is there once."""

    async def run() -> None:
        async with linked(own_nats_server) as link, publishing(link, stream(cluster), ack_timeout_s=0.2) as publisher:
            await publisher.publish(1, records(1, 10))
            await publisher.drain(5)
            suspend(own_nats_server.pid)
            try:
                for first in range(11, 101, 10):
                    await publisher.publish(first, records(first, 10))
                await until(lambda: publisher.counters.timeouts > 0)
                assert not await publisher.drain(0.1)
            finally:
                resume(own_nats_server.pid)
            await publisher.drain(20)
            assert (await stored(link, stream(cluster)))[0] == list(range(1, 101))

    asyncio.run(run())


def test_deposed_writer_is_fenced(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    async def run() -> None:
        async with (
            linked(nats_server) as one,
            linked(nats_server) as two,
            publishing(one, stream(cluster), epoch=1) as old,
        ):
            await old.publish(1, records(1, 10))
            await old.drain(5)
            async with publishing(two, stream(cluster), epoch=2) as new:
                assert new.last_out_seq == 10
                await new.publish(11, records(11, 10))
                await new.drain(5)
                await old.publish(11, records(11, 3))
                with pytest.raises(Fenced) as caught:
                    await old.drain(10)
                assert (caught.value.epoch, caught.value.newer_epoch) == (1, 2)
            with pytest.raises(Fenced):
                async with publishing(one, stream(cluster), epoch=1):
                    pass
            assert (await stored(two, stream(cluster)))[0] == list(range(1, 21))

    asyncio.run(run())


def test_messages_under_way_do_not_pass_the_fence(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    """The deposed writer's second message expects the sequence right after the first: a fence of one message would let it in."""

    async def run() -> None:
        async with linked(nats_server) as one, linked(nats_server) as two, publishing(one, stream(cluster), epoch=1) as old:
            await old.publish(1, records(1, 10))
            await old.drain(5)
            async with publishing(two, stream(cluster), epoch=2) as new:
                for first in range(11, 11 + WINDOW_MAX * 2, 2):  # a whole window, sent before the first refusal comes back
                    await old.publish(first, records(first, 2))
                with pytest.raises(Fenced):
                    await old.drain(10)
                assert (await stored(two, stream(cluster)))[0] == list(range(1, 11))
                await new.publish(11, records(11, 10))
                await new.drain(5)
            assert (await stored(two, stream(cluster)))[0] == list(range(1, 21))

    asyncio.run(run())


def test_a_writer_learns_under_which_epoch_the_last_record_was_written(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    """However many writers have taken it over since, and written nothing."""

    async def run() -> None:
        async with linked(nats_server) as link:
            async with publishing(link, stream(cluster), epoch=3) as first:
                assert (first.records_epoch, first.taken) == (0, (0, 0))
                await first.publish(1, records(1, 10))
                await first.drain(5)
            for epoch in (5, 6):
                async with publishing(link, stream(cluster), epoch=epoch) as idle:
                    assert idle.records_epoch == 3
                    assert idle.taken == (10, digest_of(records(1, 10)))
            async with publishing(link, stream(cluster), epoch=8) as second:
                assert second.records_epoch == 3
                await second.publish(11, records(11, 10))
                await second.drain(5)
            async with publishing(link, stream(cluster), epoch=9) as last:
                assert (last.records_epoch, last.taken) == (8, (10, digest_of(records(11, 10))))
                await last.publish_gap(21, 25)
                await last.drain(5)
            async with publishing(link, stream(cluster), epoch=10) as after:
                assert (after.records_epoch, after.taken) == (9, (0, 0)), "a record that nobody has is none"

    asyncio.run(run())


def test_a_link_keeps_nothing_of_those_that_are_closed(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    async def run() -> None:
        async with linked(nats_server) as link:
            for epoch in range(1, 4):
                async with publishing(link, stream(cluster), epoch=epoch):
                    assert len(link._listeners) == 1
                reader = StreamReader(link, stream(cluster).name, 1)
                await reader.close()
            assert link._listeners == []

    asyncio.run(run())


def test_a_fence_whose_answer_was_lost_says_the_same(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    async def run() -> None:
        async with linked(nats_server) as link:
            async with publishing(link, stream(cluster), epoch=7) as first:
                await first.publish(1, records(1, 10))
                await first.drain(5)
            async with publishing(link, stream(cluster), epoch=8) as second:
                again = OutputPublisher(link, stream(cluster), HEAD.pack, epoch=8)
                again._writer = second._writer  # it is the same one, which asks once more
                assert await again.open() == 10
                assert (again.records_epoch, again.taken) == (second.records_epoch, second.taken) == (7, (10, digest_of(records(1, 10))))
                await again.close()

    asyncio.run(run())


def test_newest_writer_of_an_epoch_wins(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    """A node started twice by mistake: each record is still there once, and the older one stops."""

    async def run() -> None:
        async def write(link: NatsLink, batch: int) -> bool:
            try:
                async with publishing(link, stream(cluster)) as publisher:
                    for first in range(1, 3001, batch):
                        await publisher.publish(first, records(first, min(batch, 3001 - first)))
                        await asyncio.sleep(0)
                    return await publisher.drain(20)
            except Fenced:
                return False

        async with linked(nats_server) as one, linked(nats_server) as two:
            finished = await asyncio.gather(write(one, 7), write(two, 10))
            assert True in finished
            assert (await stored(one, stream(cluster)))[0] == list(range(1, 3001))

    asyncio.run(run())


def test_stream_deleted_while_publishing_is_made_again(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    async def run() -> None:
        async with linked(nats_server) as link, publishing(link, stream(cluster), ack_timeout_s=0.3) as publisher:
            await publisher.publish(1, records(1, 10))
            await publisher.drain(5)
            await link.client.jetstream().delete_stream(stream(cluster).name)
            await publisher.publish(11, records(11, 10))
            assert await publisher.drain(10)
            assert (await stored(link, stream(cluster)))[0] == list(range(11, 21))

    asyncio.run(run())


def test_purged_stream_goes_on(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    async def run() -> None:
        async with linked(nats_server) as link, publishing(link, stream(cluster)) as publisher:
            await publisher.publish(1, records(1, 10))
            await publisher.drain(5)
            await link.client.jetstream().purge_stream(stream(cluster).name)
            await publisher.publish(11, records(11, 10))
            assert await publisher.drain(10)
            assert (await stored(link, stream(cluster)))[0] == list(range(11, 21))

    asyncio.run(run())


def test_store_that_went_back_leaves_a_gap_marker(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    """What was acknowledged and is gone (a disk that lied) is reported in the stream."""

    async def run() -> None:
        async with linked(nats_server) as link, publishing(link, stream(cluster)) as publisher:
            for first in (1, 11, 21):
                await publisher.publish(first, records(first, 10))
            await publisher.drain(5)
            jetstream = link.client.jetstream()
            info = await jetstream.stream_info(stream(cluster).name)
            await jetstream.delete_msg(stream(cluster).name, info.state.last_seq)
            await link.client.publish(stream(cluster).subject, b"", headers={"Out-Seq": "20", "Epoch": "0", "Kind": "fence"})
            await publisher.publish(31, records(31, 10))
            assert await publisher.drain(10)
            assert publisher.counters.lost_by_server == 10
            assert await stored(link, stream(cluster)) == ([*range(1, 21), *range(31, 41)], [(21, 10)])

    asyncio.run(run())


def test_foreign_stream_is_refused(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    async def run() -> None:
        async with linked(nats_server) as link:
            await link.client.jetstream().add_stream(stream(cluster).config())
            await link.client.jetstream().publish(stream(cluster).subject, b"hello")
            with pytest.raises(ForeignStream):
                async with publishing(link, stream(cluster)):
                    pass

    asyncio.run(run())


def test_stream_larger_than_the_store_is_refused(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    async def run() -> None:
        async with linked(nats_server) as link:
            with pytest.raises(PublishRefused, match="do not fit"):
                async with publishing(link, OutputStream(f"S_{cluster}", f"s.{cluster}", "0", bytes_max=1 << 50)):
                    pass

    asyncio.run(run())


def test_too_large_message_is_refused_for_good(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    async def run() -> None:
        async with linked(nats_server) as link, publishing(link, stream(cluster)) as publisher:
            await publisher.publish(1, bytes(64 * 20000))
            with pytest.raises(PublishRefused, match="larger"):
                await publisher.drain(5)

    asyncio.run(run())


# ---------------------------------------------------------------- the link


@pytest.mark.parametrize("url", ["nats://127.0.0.1:1", "http://127.0.0.1:4222", "nats://", "127.0.0.1:4222", "nats://host:x"])
def test_wrong_address(url: str) -> None:
    with pytest.raises(NatsUnreachable):
        asyncio.run(connect(url, wait_s=0.3))


def test_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TICKMESH_NATS_TOKEN", "s3cret")
    with NatsServer(NatsServerOptions(tmp_path / "data")) as server:
        assert "s3cret" not in (tmp_path / "data" / "nats-server.conf").read_text()

        async def login(login: Login | None, url: str = server.url) -> None:
            await (await connect(url, login=login)).close()

        asyncio.run(login(None))
        with pytest.raises(NatsRefused) as caught:
            asyncio.run(login(Login(token="wrong")))
        assert "wrong" not in str(caught.value)
        asyncio.run(login(Login(), url=server.url.replace("//", "//s3cret@")))
        secret = tmp_path / "token"
        secret.write_text("s3cret\n")
        monkeypatch.setenv("TICKMESH_NATS_TOKEN_FILE", str(secret))
        assert Login.from_environment().token == "s3cret"
        assert "s3cret" not in repr(Login.from_environment())


def test_secrets_are_not_shown() -> None:
    assert redacted("nats://user:pass@host:4222") == "nats://host:4222"
    assert redacted("nats://a@h1:1,tls://b:c@h2:2") == "nats://h1:1,tls://h2:2"


def test_backoff_is_bounded() -> None:
    assert all(0 < backoff_s(attempt) <= 2.0 for attempt in range(100))


