"""The gateway against a real server and a real ring: every output is in its stream once, or is marked as missing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from nats_fixtures import cluster, nats_server, own_nats_server  # noqa: F401

from tickmesh.node.delivery import DeliveryOptions, Gateway
from tickmesh.node.event import EVENT, QUOTE, REFERENCE, Kind
from tickmesh.node.subscription import Batch, subscribe
from tickmesh.ops.servers import NatsServer
from tickmesh.transports.nats import connect
from tickmesh.transports.ring import Ring

SYMBOLS = ["AAPL", "BRK.B", "MSFT"]


def outputs(first: int, count: int) -> np.ndarray:
    """BBO events of three instruments with output sequences from `first`; the first three outputs of all are REFERENCE events."""
    events = np.zeros(count, EVENT)
    events["seq"] = np.arange(first, first + count)
    events["instrument"] = events["seq"] % 3
    quotes = events.view(QUOTE)
    quotes["kind"], quotes["bid"], quotes["ask"] = Kind.BBO, events["seq"] * 10**7, (events["seq"] + 1) * 10**7
    events["ts_recv"] = time.time_ns()
    for position in np.flatnonzero(events["seq"] <= 3):
        reference = events[position : position + 1].view(REFERENCE)
        reference["kind"], reference["side"], reference["tick_size"] = Kind.REFERENCE, 0, 10**7
        reference["symbol"] = SYMBOLS[int(reference["instrument"][0])]
    return events


def options(server: NatsServer, cluster: str, **more: object) -> DeliveryOptions:  # noqa: F811
    settings = {"stream_max_bytes": 64 << 20, "drain_timeout_s": 10.0, "poll_max_ms": 1.0, **more}
    return DeliveryOptions(cluster=cluster, target=server.url, **settings)  # type: ignore[arg-type]


def wait_for(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.01)


@contextmanager
def delivering(gateway: Gateway) -> Iterator[Gateway]:
    gateway.start()
    try:
        yield gateway
    finally:
        gateway.stop()


async def collect(server: NatsServer, cluster: str, last: int, **filters: object) -> list[Batch]:  # noqa: F811
    """All batches of shard 0 up to output `last`."""
    found: list[Batch] = []
    async with subscribe(server.url, cluster=cluster, shard=0, from_sequence="all", **filters) as subscription:  # type: ignore[call-overload]
        async with asyncio.timeout(20):
            async for batch in subscription:
                found.append(batch)
                if batch.first + len(batch.events) + batch.missing > last:
                    return found
    return found


def sequences(batches: list[Batch]) -> list[int]:
    return np.concatenate([b.events["seq"] for b in batches]).tolist() if batches else []


def test_outputs_arrive_once_and_bit_for_bit(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    ring = Ring.create(None, 4096, mode="lossless", dtype=EVENT)
    sent = outputs(1, 5000)
    with delivering(Gateway(options(nats_server, cluster, per_event=frozenset()), {0: ring})) as gateway:
        gateway.set_config_version(7)
        assert ring.writer.write(sent, timeout_ms=20_000) == 5000
        wait_for(lambda: gateway.status()[0]["last_out_seq"] == 5000)
        status = gateway.status()[0]
    batches = asyncio.run(collect(nats_server, cluster, 5000))
    assert np.concatenate([b.events for b in batches]).tobytes() == sent.tobytes()
    assert {b.epoch for b in batches} == {1}
    assert status["state"] == "delivering"
    assert status["records"] == status["events_read"] == 5000
    assert status["missing"] == status["overwritten"] == status["resent"] == 0
    assert status["received_to_stored_us"]["p50"] > 0
    assert max(len(b.events) for b in batches) <= 1024


def test_restart_continues_where_the_stream_ends(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    """A replay of the journal makes the same outputs from 1 on again."""
    for total in (300, 1000):
        ring = Ring.create(None, 4096, mode="lossless", dtype=EVENT)
        with delivering(Gateway(options(nats_server, cluster), {0: ring})) as gateway:
            ring.writer.write(outputs(1, total))
            wait_for(lambda total=total, gateway=gateway: gateway.status()[0]["last_out_seq"] == total)
            status = gateway.status()[0]
    assert status["skipped"] == 300
    assert sequences(asyncio.run(collect(nats_server, cluster, 1000))) == list(range(1, 1001))


def test_stop_delivers_what_is_left(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    ring = Ring.create(None, 8192, mode="lossless", dtype=EVENT)
    gateway = Gateway(options(nats_server, cluster, per_event=frozenset()), {0: ring})
    ring.writer.write(outputs(1, 8000))
    gateway.start()
    wait_for(lambda: gateway.status()[0]["state"] == "delivering")
    gateway.stop()
    assert gateway.status()[0]["last_out_seq"] == 8000


def test_block_policy_holds_the_writer_while_nats_is_away(own_nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    """Nothing is lost: the ring fills, the writer waits, and goes on when the server is back."""
    ring = Ring.create(None, 1024, mode="lossless", dtype=EVENT, reader_timeout_ms=1000)
    settings = options(own_nats_server, cluster, window=4, batch_max_events=64, per_event=frozenset())
    with delivering(Gateway(settings, {0: ring})) as gateway:
        ring.writer.write(outputs(1, 500))
        wait_for(lambda: gateway.status()[0]["last_out_seq"] == 500)
        own_nats_server.kill()
        room = ring.writer.write(outputs(501, 3000), timeout_ms=2500)
        assert room < 3000
        wait_for(lambda: gateway.status()[0]["state"] == "waiting")
        own_nats_server.start()
        left = outputs(501 + room, 3000 - room)
        assert ring.writer.write(left, timeout_ms=20_000) == len(left)
        wait_for(lambda: gateway.status()[0]["last_out_seq"] == 3500)
        assert gateway.status()[0]["missing"] == 0
        assert gateway.status()[0]["reconnects"] >= 1
    assert ring.writer.released == 0
    assert sequences(asyncio.run(collect(own_nats_server, cluster, 3500))) == list(range(1, 3501))


def test_drop_oldest_policy_marks_what_was_overwritten(own_nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    """The writer never waits; each output is in the stream once or covered by exactly one gap."""
    ring = Ring.create(None, 1024, mode="lossy", dtype=EVENT)
    settings = options(own_nats_server, cluster, window=4, batch_max_events=64, per_event=frozenset())
    with delivering(Gateway(settings, {0: ring})) as gateway:
        ring.writer.write(outputs(1, 500))
        wait_for(lambda: gateway.status()[0]["last_out_seq"] == 500)
        own_nats_server.kill()
        for first in range(501, 10_501, 500):
            assert ring.writer.write(outputs(first, 500), timeout_ms=1000) == 500
        own_nats_server.start()
        wait_for(lambda: gateway.status()[0]["last_out_seq"] == 10_500)
        status = gateway.status()[0]
    batches = asyncio.run(collect(own_nats_server, cluster, 10_500))
    covered = [s for b in batches for s in (range(b.first, b.first + b.missing) if b.missing else b.events["seq"].tolist())]
    assert covered == list(range(1, 10_501))
    missing = sum(b.missing for b in batches)
    assert missing == status["missing"] == status["overwritten"] == status["ring_missed"]
    assert missing > 5000


def test_waits_for_a_server_that_comes_later(own_nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    own_nats_server.kill()
    ring = Ring.create(None, 1024, mode="lossless", dtype=EVENT)
    with delivering(Gateway(options(own_nats_server, cluster), {0: ring})) as gateway:
        ring.writer.write(outputs(1, 100))
        wait_for(lambda: "no NATS server answers" in gateway.status()[0]["error"])
        assert gateway.status()[0]["state"] == "connecting"
        own_nats_server.start()
        wait_for(lambda: gateway.status()[0]["last_out_seq"] == 100)


def test_stops_in_time_when_nats_never_comes(cluster: str) -> None:  # noqa: F811
    ring = Ring.create(None, 1024, mode="lossless", dtype=EVENT)
    gateway = Gateway(DeliveryOptions(cluster=cluster, target="nats://127.0.0.1:1", drain_timeout_s=0.2), {0: ring}).start()
    ring.writer.write(outputs(1, 100))
    wait_for(lambda: bool(gateway.status()[0]["error"]))
    gateway.stop()
    assert gateway._thread is None


def test_refused_stream_is_reported_and_tried_again(nats_server: NatsServer, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("tickmesh.node.delivery._RETRY_REFUSED_S", 0.2)

    async def occupy(name: str, delete: bool) -> None:
        link = await connect(nats_server.url)
        jetstream = link.client.jetstream()
        if delete:
            await jetstream.delete_stream(name)
        else:
            await jetstream.add_stream(name=name, subjects=[f"tm.{cluster}.out.0"])
        await link.close()

    asyncio.run(occupy("OTHER", delete=False))
    ring = Ring.create(None, 1024, mode="lossless", dtype=EVENT)
    with delivering(Gateway(options(nats_server, cluster), {0: ring})) as gateway:
        ring.writer.write(outputs(1, 10))
        wait_for(lambda: gateway.status()[0]["state"] == "refused")
        assert "overlap" in gateway.status()[0]["error"]
        asyncio.run(occupy("OTHER", delete=True))
        wait_for(lambda: gateway.status()[0]["last_out_seq"] == 10)


def test_what_was_read_and_refused_is_delivered_later(nats_server: NatsServer, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """The stream takes no messages of our size for a while, when a whole ring of outputs has been read: all of them are there still."""
    monkeypatch.setattr("tickmesh.node.delivery._RETRY_REFUSED_S", 0.2)

    async def limit(message_bytes_max: int) -> None:
        link = await connect(nats_server.url)
        try:
            jetstream = link.client.jetstream()
            config = (await jetstream.stream_info(f"TM_{cluster}_OUT_0")).config
            config.max_msg_size = message_bytes_max
            await jetstream.update_stream(config)
        finally:
            await link.close()

    ring = Ring.create(None, 256, mode="lossless", dtype=EVENT, reader_timeout_ms=60_000)
    with delivering(Gateway(options(nats_server, cluster, batch_max_events=8), {0: ring})) as gateway:
        ring.writer.write(outputs(1, 100))
        wait_for(lambda: gateway.status()[0]["last_out_seq"] == 100)
        asyncio.run(limit(300))
        assert ring.writer.write(outputs(101, 256), timeout_ms=0) == 256
        wait_for(lambda: gateway.status()[0]["state"] == "refused")
        assert ring.writer.write(outputs(357, 1), timeout_ms=0) == 0, "nothing is let go before it is stored"
        asyncio.run(limit(-1))
        wait_for(lambda: gateway.status()[0]["last_out_seq"] == 356)
        ring.writer.write(outputs(357, 44))
        wait_for(lambda: gateway.status()[0]["last_out_seq"] == 400)
        assert gateway.status()[0]["overwritten"] == 0
    batches = asyncio.run(collect(nats_server, cluster, 400))
    assert sequences(batches) == list(range(1, 401))
    assert not any(batch.missing for batch in batches)


def test_older_node_is_fenced(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    one, two = (Ring.create(None, 1024, mode="lossless", dtype=EVENT) for _ in range(2))
    with delivering(Gateway(options(nats_server, cluster, epoch=1), {0: one})) as old:
        one.writer.write(outputs(1, 10))
        wait_for(lambda: old.status()[0]["last_out_seq"] == 10)
        with delivering(Gateway(options(nats_server, cluster, epoch=2), {0: two})) as new:
            two.writer.write(outputs(1, 20))
            wait_for(lambda: new.status()[0]["last_out_seq"] == 20)
            one.writer.write(outputs(11, 5))
            wait_for(lambda: old.status()[0]["state"] == "fenced")
            assert "must stop" in old.status()[0]["error"]
    assert sequences(asyncio.run(collect(nats_server, cluster, 20))) == list(range(1, 21))


def test_two_shards(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    rings = {shard: Ring.create(None, 1024, mode="lossless", dtype=EVENT) for shard in (0, 3)}
    with delivering(Gateway(options(nats_server, cluster), rings)) as gateway:
        rings[0].writer.write(outputs(1, 100))
        rings[3].writer.write(outputs(1, 200))
        wait_for(lambda: [s["last_out_seq"] for s in gateway.status()] == [100, 200])

    async def both() -> dict[int, int]:
        seen = {0: 0, 3: 0}
        async with subscribe(nats_server.url, cluster=cluster, from_sequence="all") as subscription, asyncio.timeout(20):
            async for batch in subscription:
                seen[batch.shard] += len(batch.events)
                if seen == {0: 100, 3: 200}:
                    break
        return seen

    assert asyncio.run(both()) == {0: 100, 3: 200}


# ---------------------------------------------------------------- one map per event


def test_maps_have_their_symbols_subjects(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    async def run() -> list[tuple[str, dict]]:
        ring = Ring.create(None, 1024, mode="lossless", dtype=EVENT)
        found = []
        async with subscribe(nats_server.url, pattern=f"tm.{cluster}.bbo.*") as subscription:
            gateway = Gateway(options(nats_server, cluster), {0: ring}).start()
            ring.writer.write(outputs(1, 9))
            async with asyncio.timeout(20):
                async for subject, fields in subscription:
                    found.append((subject, fields))
                    if len(found) == 6:
                        break
            await asyncio.to_thread(gateway.stop)
        return found

    found = asyncio.run(run())
    assert [fields["seq"] for _, fields in found] == [4, 5, 6, 7, 8, 9]
    assert found[0][0] == f"tm.{cluster}.bbo.BRK%2EB"
    assert (found[0][1]["symbol"], found[0][1]["bid"], found[0][1]["ask"]) == ("BRK.B", "0.04", "0.05")


def test_maps_are_limited_and_counted(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    ring = Ring.create(None, 8192, mode="lossless", dtype=EVENT)
    with delivering(Gateway(options(nats_server, cluster, per_event_rate_max=100), {0: ring})) as gateway:
        ring.writer.write(outputs(1, 8000))
        wait_for(lambda: gateway.status()[0]["last_out_seq"] == 8000)
        wait_for(lambda: gateway.status()[0]["per_event_published"] + gateway.status()[0]["per_event_skipped"] == 8000)
        assert gateway.status()[0]["per_event_published"] < 4000


def test_only_chosen_kinds_become_maps(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    """A wildcard over the kinds also matches the batch frames' subject: those are not handed out as maps."""

    async def run() -> list[str]:
        ring = Ring.create(None, 1024, mode="lossless", dtype=EVENT)
        found: list[str] = []
        async with subscribe(nats_server.url, pattern=f"tm.{cluster}.*.*") as subscription, asyncio.timeout(20):
            gateway = Gateway(options(nats_server, cluster, per_event=frozenset({int(Kind.REFERENCE)})), {0: ring}).start()
            ring.writer.write(outputs(1, 9))
            async for _, fields in subscription:
                found.append(fields["kind"])
                if len(found) == 3:
                    break
            await asyncio.to_thread(gateway.stop)
        assert gateway.status()[0]["per_event_published"] == 3
        return found

    assert asyncio.run(run()) == ["reference"] * 3
