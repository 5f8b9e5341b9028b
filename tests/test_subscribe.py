"""Subscriptions against a real server: from any sequence, each output once, over server restarts."""

from __future__ import annotations

import asyncio
import io
import json
import uuid
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats_fixtures import cluster, nats_server, own_nats_server  # noqa: F401
from test_delivery import delivering, options, outputs, sequences, wait_for

from tickmesh.node.delivery import Gateway
from tickmesh.node.event import EVENT, Kind
from tickmesh.node.frames import FrameHeader
from tickmesh.node.subscription import Batch, ExactlyOnce, subscribe
from tickmesh.ops.servers import NatsServer, NatsServerOptions
from tickmesh.ops.subscribe_cmd import subscribe_command
from tickmesh.transports.nats import NatsUnreachable, StreamMissing
from tickmesh.transports.ring import Ring, RingNotFound


def deliver(server: NatsServer, cluster: str, total: int, batch: int = 64) -> None:  # noqa: F811
    """Outputs 1..total in shard 0's stream."""
    ring = Ring.create(None, 8192, mode="lossless", dtype=EVENT)
    with delivering(Gateway(options(server, cluster, batch_max_events=batch), {0: ring})) as gateway:
        ring.writer.write(outputs(1, total))
        wait_for(lambda: gateway.status()[0]["last_out_seq"] == total)


async def take(subscription: object, last: int) -> list[Batch]:
    found: list[Batch] = []
    async with asyncio.timeout(20), subscription:  # type: ignore[attr-defined]
        async for batch in subscription:  # type: ignore[attr-defined]
            found.append(batch)
            if len(batch.events) and batch.events["seq"][-1] >= last:
                break
    return found


# ---------------------------------------------------------------- the exactly-once view


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 10), st.booleans()), max_size=40), st.none() | st.integers(1, 30))
@settings(deadline=None)
def test_exactly_once_against_a_set(frames: list[tuple[int, int, bool]], start: int | None) -> None:
    """Frames that overlap, repeat or leave holes: events come out rising, each once; what is skipped is reported as missing."""
    once, shown = ExactlyOnce(start), []
    for first, count, marker in frames:
        events = np.zeros(0 if marker else count, EVENT)
        events["seq"] = np.arange(first, first + len(events))
        header = FrameHeader(0, 1, 1, first, len(events), count if marker else 0)
        for batch in once.take(header, events):
            assert bool(batch.missing) != bool(len(batch.events))
            assert not len(batch.events) or batch.first == batch.events["seq"][0]
            shown += [*range(batch.first, batch.first + batch.missing), *batch.events["seq"].tolist()]
    wanted = start if start is not None else (frames[0][0] if frames else 1)
    ends = [first + count - 1 for first, count, _ in frames if first + count - 1 >= wanted]
    assert shown == list(range(wanted, max(ends) + 1) if ends else [])


# ---------------------------------------------------------------- from where


@pytest.mark.parametrize("start", [1, 2, 64, 65, 500, 999, 1000])
def test_from_any_sequence(nats_server: NatsServer, start: int) -> None:  # noqa: F811
    if start == 1:
        deliver(nats_server, "fromany", 1000)
    found = asyncio.run(take(subscribe(nats_server.url, cluster="fromany", shard=0, from_sequence=start), 1000))
    assert sequences(found) == list(range(start, 1001))


def test_from_now_knows_the_symbols(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    deliver(nats_server, cluster, 100)

    async def run() -> list[Batch]:
        subscription = await subscribe(nats_server.url, cluster=cluster, symbols=["BRK.B"], from_sequence="now").open()
        await asyncio.to_thread(deliver, nats_server, cluster, 200)
        return await take(subscription, 199)

    found = asyncio.run(run())
    assert sequences(found) == [s for s in range(101, 201) if s % 3 == 1]


def test_a_symbol_whose_name_comes_late_is_not_missed(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    """The stream of names is empty when outputs of an unknown instrument come: they are held until it is not."""
    from tickmesh.transports.nats import connect

    deliver(nats_server, cluster, 100)

    async def run() -> list[Batch]:
        link = await connect(nats_server.url)
        await link.client.jetstream().purge_stream(f"TM_{cluster}_REF")
        await link.close()
        subscription = await subscribe(nats_server.url, cluster=cluster, shard=0, symbols=["BRK.B"], from_sequence=50).open()
        reading = asyncio.create_task(take(subscription, 199))
        await asyncio.sleep(0)
        await asyncio.to_thread(deliver, nats_server, cluster, 200)
        return await reading

    assert sequences(asyncio.run(run())) == [s for s in range(50, 201) if s % 3 == 1]


def test_kinds_and_symbols(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    deliver(nats_server, cluster, 300)
    bbo = subscribe(nats_server.url, cluster=cluster, kinds=[Kind.BBO], symbols=["AAPL"], from_sequence="all")
    assert sequences(asyncio.run(take(bbo, 300))) == [s for s in range(4, 301) if s % 3 == 0]


def test_callback(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    deliver(nats_server, cluster, 100)
    seen: list[int] = []

    def on_batch(batch: Batch) -> None:
        seen.extend(batch.events["seq"].tolist())
        if seen[-1] == 100:
            raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        asyncio.run(subscribe(nats_server.url, cluster=cluster, from_sequence="all").run(on_batch))
    assert seen == list(range(1, 101))


def test_start_before_the_oldest_is_reported_as_missing(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    from tickmesh.transports.nats import connect

    deliver(nats_server, cluster, 1000)

    async def run() -> list[Batch]:
        link = await connect(nats_server.url)
        await link.client.jetstream().purge_stream(f"TM_{cluster}_OUT_0", keep=3)
        await link.close()
        return await take(subscribe(nats_server.url, cluster=cluster, shard=0, from_sequence=10), 1000)

    found = asyncio.run(run())
    assert (found[0].first, len(found[0].events)) == (10, 0)
    assert found[0].missing == found[1].first - 10
    assert sequences(found) == list(range(found[1].first, 1001))


def test_subscriber_survives_server_restarts(own_nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    """Outputs flow on, the server is killed twice, the subscriber sees each output once."""

    async def run() -> list[int]:
        ring = Ring.create(None, 1024, mode="lossless", dtype=EVENT)
        gateway = Gateway(options(own_nats_server, cluster, batch_max_events=64), {0: ring}).start()
        seen: list[int] = []

        async def read() -> None:
            async for batch in subscription:
                assert not batch.missing
                seen.extend(batch.events["seq"].tolist())
                if seen[-1] == 3000:
                    return

        ring.writer.write(outputs(1, 500))
        await asyncio.to_thread(wait_for, lambda: gateway.status()[0]["last_out_seq"] == 500)
        async with subscribe(own_nats_server.url, cluster=cluster, from_sequence="all") as subscription, asyncio.timeout(40):
            reading = asyncio.create_task(read())
            for first in (501, 1001):
                await asyncio.to_thread(ring.writer.write, outputs(first, 500))
                await asyncio.to_thread(own_nats_server.kill)
                await asyncio.to_thread(own_nats_server.start)
            await asyncio.to_thread(ring.writer.write, outputs(1501, 1500))
            await reading
        await asyncio.to_thread(gateway.stop)
        return seen

    assert asyncio.run(run()) == list(range(1, 3001))


# ---------------------------------------------------------------- names of calculations


def signals(first: int, count: int) -> np.ndarray:
    """Outputs whose signals are those of calculation 1, output 1, and an alert of calculation 2 last of all."""
    events = outputs(first, count)
    made = events["kind"] == Kind.BBO
    events["kind"][made], events["id"][made] = Kind.SIGNAL, 1 | 1 << 32
    events["kind"][-1], events["id"][-1] = Kind.ALERT, 2
    return events


def test_streams_give_the_names_that_held_when_they_were_made(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    """Also after the node has been started again with other calculations: what is old keeps its names."""
    before = {(1, 1): "bands.upper", (2, 0): "jump"}
    after = {(1, 1): "trend.slope", (2, 0): "break"}
    for first, names in ((1, before), (11, after), (21, after)):
        ring = Ring.create(None, 64, mode="lossless", dtype=EVENT)
        with delivering(Gateway(options(nats_server, cluster), {0: ring}, calculations=names)) as gateway:
            ring.writer.write(signals(first, 10))
            wait_for(lambda last=first + 9, gateway=gateway: gateway.status()[0]["last_out_seq"] == last)
    status, text = command(f"tm.{cluster}.*.*", nats_server.url, from_sequence=4, count=27, as_json=True)
    rows = [json.loads(line) for line in text.splitlines()]
    assert status == 0
    assert [row["seq"] for row in rows] == list(range(4, 31))
    for row in rows:
        names = before if row["seq"] <= 10 else after
        assert row["calculation"] == names[(2, 0) if row["kind"] == "alert" else (1, 1)], row
        assert "output" not in row

    async def ask() -> list[object]:
        async with subscribe(nats_server.url, cluster=cluster, from_sequence="all") as subscription:
            return [subscription.calculations(0, sequence) for sequence in (1, 10, 11, 10**6)] + [subscription.calculations(7, 1)]

    assert asyncio.run(ask()) == [before, before, after, after, {}]


def test_a_subscriber_hears_of_new_names(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    async def run() -> object:
        async with subscribe(nats_server.url, cluster=cluster, from_sequence="all") as subscription, asyncio.timeout(20):
            await asyncio.to_thread(publish, 11, {(1, 1): "new"})
            async for batch in subscription:
                if batch.events["seq"][-1] == 20:
                    return subscription.calculations(0, 10), subscription.calculations(0, 11)
        return None

    def publish(first: int, names: dict[tuple[int, int], str]) -> None:
        ring = Ring.create(None, 64, mode="lossless", dtype=EVENT)
        with delivering(Gateway(options(nats_server, cluster), {0: ring}, calculations=names)) as gateway:
            ring.writer.write(signals(first, 10))
            wait_for(lambda: gateway.status()[0]["last_out_seq"] == first + 9)

    publish(1, {(1, 1): "old"})
    assert asyncio.run(run()) == ({(1, 1): "old"}, {(1, 1): "new"})


# ---------------------------------------------------------------- shared memory


def test_ring_subscription() -> None:
    name = f"test-{uuid.uuid4().hex[:12]}"
    ring = Ring.create(name, 1024, mode="lossy", dtype=EVENT)
    try:
        ring.writer.write(outputs(1, 300))
        found = asyncio.run(take(subscribe(ring=name, kinds=[Kind.BBO], from_sequence="all"), 300))
    finally:
        ring.close()
        ring.unlink()
    assert sequences(found) == list(range(4, 301))


# ---------------------------------------------------------------- what can be wrong


def test_errors_say_what_is_wrong(nats_server: NatsServer) -> None:  # noqa: F811
    with pytest.raises(StreamMissing, match="TM_nobody_OUT_"):
        asyncio.run(subscribe(nats_server.url, cluster="nobody").open())
    with pytest.raises(StreamMissing, match="TM_nobody_OUT_4"):
        asyncio.run(subscribe(nats_server.url, cluster="nobody", shard=4, from_sequence=7).open())
    with pytest.raises(RingNotFound):
        asyncio.run(subscribe(ring="no-such-ring").open())
    with pytest.raises(NatsUnreachable):
        asyncio.run(subscribe("nats://127.0.0.1:1").open())
    with pytest.raises(ValueError, match="'tomorrow'"):
        subscribe(from_sequence="tomorrow")  # type: ignore[call-overload]


# ---------------------------------------------------------------- the command


def command(pattern: str, server: str, **options: object) -> tuple[int, str]:
    out = io.StringIO()
    status = subscribe_command(pattern, server=server, out=out, **options)  # type: ignore[arg-type]
    return status, out.getvalue()


def test_command_prints_lines_and_json(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    deliver(nats_server, cluster, 100)
    status, text = command(f"tm.{cluster}.bbo.BRK%2EB", nats_server.url, from_sequence=1, count=3)
    lines = text.splitlines()
    assert status == 0
    assert len(lines) == 3
    assert all("bbo" in line and "BRK.B" in line and "bid=" in line for line in lines)
    status, text = command(f"tm.{cluster}.*.*", nats_server.url, from_sequence=1, count=4, as_json=True)
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["seq"] for row in rows] == [1, 2, 3, 4]
    assert [row["kind"] for row in rows] == ["reference"] * 3 + ["bbo"]


def test_command_shows_batches(nats_server: NatsServer, cluster: str) -> None:  # noqa: F811
    deliver(nats_server, cluster, 100)
    status, text = command(f"tm.{cluster}.>", nats_server.url, from_sequence=1, count=1, batches=True)
    assert status == 0
    assert "shard 0" in text
    assert "events" in text


def test_command_reports_errors(nats_server: NatsServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert command("tm.demo.bbo.*", "nats://127.0.0.1:1")[0] == 3
    assert "no NATS server answers" in capsys.readouterr().err
    assert command("tm.absent.bbo.*", nats_server.url, from_sequence=1)[0] == 3
    assert "TM_absent_OUT" in capsys.readouterr().err
    assert command("nonsense", nats_server.url, from_sequence=1)[0] == 2
    assert "tm.CLUSTER" in capsys.readouterr().err


def test_command_prints_live_maps(tmp_path: Path) -> None:
    """As in a shell: it subscribes, events come, it ends after --count."""
    import threading

    with NatsServer(NatsServerOptions(tmp_path / "nats")) as server:
        results: list[tuple[int, str]] = []
        shell = threading.Thread(target=lambda: results.append(command("tm.live.bbo.*", server.url, count=2)))
        shell.start()
        ring = Ring.create(None, 1024, mode="lossy", dtype=EVENT)
        with delivering(Gateway(options(server, "live"), {0: ring})) as gateway:
            wait_for(lambda: gateway.status()[0]["state"] == "delivering")
            first = 1
            while shell.is_alive() and first < 5000:
                ring.writer.write(outputs(first, 10))
                first += 10
                shell.join(0.05)
        shell.join(10)
    status, text = results[0]
    assert status == 0
    assert len(text.splitlines()) == 2
